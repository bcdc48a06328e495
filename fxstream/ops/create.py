"""Tensors that are made of sizes and types of the image: maps of zeros, coordinates, numbers of a value's type.

Where such a tensor has the extents of all streamed axes, it is made block by block. Otherwise it is small, or one
value is expanded, and the operation that reads it takes the rows that it needs: see `Typed` and `Sliced`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..geometry.axes import Dim, Value, is_extent, is_extent_of
from ..geometry.window import Window
from .arguments import unpacked
from .derived import derived, typed
from .given import Typed
from .pointwise import cast
from .registry import Answer, Fact, Local, NotLocal, Pending, is_tensor, register


def _created(function: Callable[..., torch.Tensor], size: Sequence[Any], of: Value | None, **options: Any) -> Answer:
    """The answer for `function(like, size, **options)`, which makes a tensor of a size.

    `like` is a block of the value `of`, whose dtype and device the tensor has; None if there is no such value.
    """
    extents = {index: extent for index, extent in enumerate(size) if is_extent(extent)}
    if options.get("requires_grad"):
        return NotLocal("makes a leaf that requires a gradient")
    sources = [extent.value for extent in extents.values()] + ([] if of is None else [of])
    source = next((value for value in reversed(sources) if _are_extents(extents.values(), value)), None)
    if source is None:
        made = derived(function, (None if of is None else typed(of, lambda like: like), size), options)
        # With the type of a value of another size it cannot be made at a call.
        typeless = of is None and not any(isinstance(option, Typed) for option in options.values())
        if typeless and isinstance(made, Fact) and isinstance(made.value, Pending):
            return Fact(replace(made.value, shape=tuple(size)))
        return made
    dims = tuple(
        source.dims[source.position(extents[index].tag)] if index in extents else Dim(None, length)
        for index, length in enumerate(size)
    )
    kinds = {name: option for name, option in options.items() if isinstance(option, Typed)}
    likes = dict.fromkeys(one for one in (of, *(kind.of for kind in kinds.values())) if one is not None)
    others = tuple(like for like in likes if like is not source)
    if any(_extents(other) != _extents(source) for other in others):
        return NotLocal("makes a tensor with the type of a value of another size", "name the type")
    values = (source, *others)
    count = len(values)
    positions = {index: source.position(extent.tag) for index, extent in extents.items()}

    def run(*blocks: torch.Tensor) -> torch.Tensor:
        shape = [
            blocks[0].size(positions[index]) if index in positions else length for index, length in enumerate(size)
        ]
        given = dict(zip(values, blocks[:count], strict=True))
        settled = dict(zip(kinds, blocks[count:], strict=True))
        return function(None if of is None else given[of], shape, **{**options, **settled})

    windows_of: dict[Value, dict[int, Window]] = {other: {} for other in others}
    return Local((*values, *kinds.values()), dims, run, windows_of=windows_of, differentiable=False)


def _are_extents(sizes: Collection[Any], value: Value) -> bool:
    """Whether sizes are the extents of the streamed axes of a value, each once."""
    if sorted(size.tag for size in sizes) != sorted(value.tags()):
        return False
    return all(is_extent_of(size, value.dims[value.position(size.tag)]) for size in sizes)


def _extents(value: Value) -> dict[str, Any]:
    return {dim.tag: dim.size for dim in value.dims if dim.tag is not None}


def _register_new(name: str) -> None:
    """Register a method that makes a tensor of some size with the type of another one."""

    @register(f"new_{name}")
    def rule(input: Value, *size: Any, **options: Any) -> Answer:
        given = tuple(options.pop("size")) if "size" in options else unpacked(size)
        return _created(lambda like, size, **rest: getattr(like, f"new_{name}")(size, **rest), given, input, **options)


for _name in ("zeros", "ones", "empty"):
    _register_new(_name)


@register("new_full")
def new_full(input: Value, size: Any, fill_value: Any, **options: Any) -> Answer:
    if isinstance(fill_value, Value) or is_tensor(fill_value):
        return NotLocal("fills a tensor with a number that is a tensor", "use torch.where")
    options["fill_value"] = fill_value
    return _created(lambda like, size, **rest: like.new_full(size, **rest), tuple(size), input, **options)


@register("new_tensor")
def new_tensor(input: Value, data: Any, **options: Any) -> Answer:
    return derived(
        lambda like, data, **rest: like.new_tensor(data, **rest), (typed(input, lambda like: like), data), options
    )


def _register_filled(name: str) -> None:
    """Register a function of torch that makes a tensor of some size."""
    function = getattr(torch, name)

    @register(function, takes_sizes=True)
    def rule(*size: Any, **options: Any) -> Answer:
        given = tuple(options.pop("size")) if "size" in options else unpacked(size)
        return _created(lambda like, size, **rest: function(size, **rest), given, None, **options)


for _name in ("zeros", "ones", "empty"):
    _register_filled(_name)


@register(torch.full, takes_sizes=True)
def full(size: Any, fill_value: Any, **options: Any) -> Answer:
    if isinstance(fill_value, Value) or is_tensor(fill_value):
        return NotLocal("fills a tensor with a number that is a tensor", "use torch.where")
    options["fill_value"] = fill_value
    return _created(lambda like, size, **rest: torch.full(size, **rest), tuple(size), None, **options)


def _register_made(function: Callable[..., Any]) -> None:
    """Register a function that makes a tensor of numbers, such as the coordinates along an axis."""

    @register(function, takes_sizes=True)
    def rule(*args: Any, **options: Any) -> Answer:
        if any(isinstance(arg, Value) for arg in args):
            return NotLocal("copies a value", "use clone")
        return derived(function, args, options)


for _name in ("arange", "linspace", "logspace", "eye", "tensor", "scalar_tensor"):
    _register_made(getattr(torch, _name))
_register_made(torch.meshgrid)


def _register_conversion(function: Callable[..., torch.Tensor]) -> None:
    """Register a function that returns a tensor itself, with another dtype or device if one is given."""

    @register(function, takes_sizes=True)
    def rule(data: Any, **options: Any) -> Answer:
        return cast(function, data, **options) if isinstance(data, Value) else derived(function, (data,), options)


for _name in ("as_tensor", "asarray"):
    _register_conversion(getattr(torch, _name))
