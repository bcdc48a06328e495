"""What is made of sizes, types and tensors, none of which depends on the pixels of the image."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..geometry.axes import IMAGE, Symbol, Value
from .registry import Answer, Fact, NotLocal, Pending, Typed, Unknown


def typed(of: Value, make: Callable[[torch.Tensor], Any]) -> Any:
    """What follows from the dtype and the device of a value, or what stands for it.

    Those of the image are known at a call, those of other values when a block of them is there.
    """
    if of.index != IMAGE:
        return Typed(of, make)
    return Pending("a type") if of.like is None else make(of.like)


def derived(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Answer:
    """The answer for a function of sizes, types and tensors, none of which depends on pixels.

    What is made of a tensor that requires a gradient is made anew for every tile, with a graph of its own.
    """
    leaves: list[Any] = []
    fx.node.map_aggregate((tuple(args), dict(kwargs)), leaves.append)
    if any(isinstance(leaf, (Symbol, Unknown)) for leaf in leaves):
        return Fact(Pending(getattr(function, "__name__", "a tensor")))
    sources = dict.fromkeys(leaf.of for leaf in leaves if isinstance(leaf, Typed) and leaf.of is not None)
    if len(sources) > 1:
        return NotLocal("combines the types of different values", "name the types")

    def make(like: torch.Tensor | None) -> Any:
        given, options = fx.node.map_aggregate(
            (tuple(args), dict(kwargs)), lambda leaf: leaf.make(like) if isinstance(leaf, Typed) else leaf
        )
        return function(*given, **options)

    if function is operator.getitem and isinstance(args[0], torch.Tensor) and _is_basic(args[1]):
        with torch.enable_grad():  # rules run without gradients in the backward pass, but this view needs them
            return Fact(args[0][args[1]])
    trained = any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)
    if sources or trained or any(isinstance(leaf, Typed) for leaf in leaves):
        return Fact(Typed(next(iter(sources), None), make))
    return Fact(make(None))


def _is_basic(index: Any) -> bool:
    """Whether a tensor with this index is a view of the tensor."""
    entries = index if isinstance(index, tuple) else (index,)
    return not any(isinstance(entry, (torch.Tensor, list, bool)) for entry in entries)
