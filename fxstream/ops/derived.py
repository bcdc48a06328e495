"""What is made of sizes, types and tensors, none of which depends on the pixels of the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..errors import RuleError
from ..geometry.axes import IMAGE, Symbol, Value
from .given import Given, Typed, facts_of, made_of_tensors
from .registry import Answer, Fact, NotLocal, Pending, Unknown


def typed(of: Value, make: Callable[[Any], Any]) -> Any:
    """What follows from the dtype and the device of a value, or what stands for it.

    Those of the image are known at a call, those of other values when a block of them is there.
    """
    if of.index != IMAGE:
        return Typed(of, make)
    return Pending("a type") if of.like is None else make(of.like)


def derived(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Answer:
    """The answer for a function of sizes, types and tensors, none of which depends on pixels.

    What is a tensor is made when the tiles are computed: anew for every tile, with a graph of its own, if it is made of
    a tensor that requires a gradient or has the type of a value; else once.
    """
    leaves: list[Any] = []
    fx.node.map_aggregate((tuple(args), dict(kwargs)), leaves.append)
    if any(isinstance(leaf, (Symbol, Unknown)) for leaf in leaves):
        return Fact(Pending(getattr(function, "__name__", "a tensor")))
    later = [leaf for leaf in leaves if isinstance(leaf, Typed)]
    sources = dict.fromkeys(leaf.of for leaf in later if leaf.of is not None)
    if len(sources) > 1:
        return NotLocal("combines the types of different values", "name the types")
    tensors = [one for leaf in leaves for one in _tensors(leaf)]

    def make(like: torch.Tensor | None, *given: torch.Tensor) -> Any:
        rest = iter(given)

        def fill(leaf: Any) -> Any:
            own = [next(rest) for _ in _tensors(leaf)]
            if isinstance(leaf, Given):
                return own[0]
            return leaf.make(like, *own) if isinstance(leaf, Typed) else leaf

        settled, options = fx.node.map_aggregate((tuple(args), dict(kwargs)), fill)
        return function(*settled, **options)

    if later:
        return Fact(Typed(next(iter(sources), None), make, tuple(tensors)))
    try:
        found = function(*args, **kwargs)  # it may only ask for a size
        return Fact(found if tensors else made_of_tensors(make, found, ()))
    except RuleError:
        of_sizes = all(one.is_of_sizes for one in tensors)
        found = make(None, *(one.made() for one in tensors)) if of_sizes else facts_of(make, tensors)
        return Fact(made_of_tensors(make, found, tensors))


def _tensors(leaf: Any) -> tuple[Given, ...]:
    """The tensors of which an argument is made."""
    if isinstance(leaf, Given):
        return (leaf,)
    return leaf.tensors if isinstance(leaf, Typed) else ()
