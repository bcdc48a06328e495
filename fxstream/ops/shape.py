"""Operations that move, join or cut dimensions without computing anything."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..axes import Dim, Value
from ..window import IDENTITY, Sliding, Span, Window
from .border import fit
from .registry import Local, NotLocal, Sliced, Unknown, register


@register(nn.Identity)
def identity(m: Any, input: Value) -> Local | NotLocal:
    return Local((input,), input.dims, lambda block: block, aliases=input)


@register(torch.cat, torch.concat, torch.concatenate)
def cat(tensors: Sequence[Any], dim: int = 0) -> Local | NotLocal:
    values = [tensor for tensor in tensors if isinstance(tensor, Value)]
    first = values[0]
    dim = first.dim(dim)
    if tags := first.tags([dim]):
        return NotLocal(f"concatenates along the streamed axis {tags[0]}", "concatenate along the channels")
    if any(isinstance(tensor, Unknown) for tensor in tensors):
        return NotLocal("concatenates a tensor that is not known before the call")
    if any([d.tag for d in value.dims] != [d.tag for d in first.dims] for value in values):
        return NotLocal("concatenates values whose streamed axes are not aligned")
    extents = {index: d.tag for index, d in enumerate(first.dims) if d.tag is not None}
    operands = tuple(tensor if isinstance(tensor, Value) else Sliced(tensor, extents) for tensor in tensors)
    sizes = [tensor.dims[dim].size if isinstance(tensor, Value) else tensor.size(dim) for tensor in tensors]
    total = None if None in sizes else sum(sizes)  # type: ignore[arg-type]  # no None among them
    return Local(operands, first.resized({dim: total}), lambda *blocks: torch.cat(blocks, dim))


@register(torch.unsqueeze, "unsqueeze")
def unsqueeze(input: Value, dim: int) -> Local | NotLocal:
    at = dim if dim >= 0 else dim + input.rank + 1
    dims = (*input.dims[:at], Dim(None, 1), *input.dims[at:])
    return Local((input,), dims, lambda block: block.unsqueeze(at), aliases=input)


@register(torch.flatten, "flatten")
def flatten(input: Value, start_dim: int = 0, end_dim: int = -1) -> Local | NotLocal:
    start, end = input.dim(start_dim), input.dim(end_dim)
    merged = input.dims[start : end + 1]
    if tags := input.tags(range(start, end + 1)):
        return NotLocal(f"merges the streamed axis {' and '.join(tags)} into another dimension")
    size: int | None = 1
    for dim in merged:
        size = None if size is None or dim.size is None else size * dim.size
    dims = (*input.dims[:start], Dim(None, size), *input.dims[end + 1 :])
    return Local((input,), dims, lambda block: block.flatten(start, end), aliases=input)


@register(operator.getitem)
def getitem(input: Value, index: Any) -> Local | NotLocal:
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(map(_is_plain, items)):
        return NotLocal("is indexed by something else than known integers and slices")
    used = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = items.index(Ellipsis)
    items[at : at + 1] = [slice(None)] * (input.rank - used)

    dims: list[Dim] = []
    block_index: list[Any] = []
    windows: dict[int, Window] = {}
    source = iter(enumerate(input.dims))
    for item in items:
        if item is None:
            dims.append(Dim(None, 1))
            block_index.append(None)
            continue
        position, dim = next(source)
        if dim.tag is None:
            if isinstance(item, slice):
                size = None if dim.size is None else len(range(*item.indices(dim.size)))
                dims.append(Dim(None, size))
            block_index.append(item)
        elif item == slice(None):
            dims.append(dim)
            block_index.append(slice(None))
        elif (window := _crop(item)) is None:
            return NotLocal(f"picks positions along the streamed axis {dim.tag} by an index counted from the start")
        else:
            windows[position] = window
            dims.append(Dim(dim.tag, None if dim.size is None else window.size(dim.size)))
            block_index.append(slice(None, None, window.stride))

    if not windows:
        return Local((input,), tuple(dims), lambda block: block[tuple(block_index)], aliases=input)
    # `fit` takes one span for each of the last dimensions.
    first = min(windows)
    windows = {position: windows.get(position, IDENTITY) for position in range(first, input.rank)}

    def run(block: torch.Tensor, *spans: Span) -> torch.Tensor:
        return fit(block, spans)[tuple(block_index)]

    return Local((input,), tuple(dims), run, windows, aliases=input)


def _is_plain(item: Any) -> bool:
    parts = (item.start, item.stop, item.step) if isinstance(item, slice) else (item,)
    return all(part is None or part is Ellipsis or isinstance(part, int) for part in parts)


def _crop(item: Any) -> Sliding | None:
    """`x[a:-b:s]` as a window; None where what it picks depends on the image's size."""
    if not isinstance(item, slice):
        return None
    start, stop, step = item.start or 0, item.stop or 0, item.step or 1
    if start < 0 or stop > 0 or step < 1 or item.stop == 0:
        return None
    return Sliding(stride=step, before=-start, after=stop)


def _register_dropout(module_type: type[nn.Module], function: Any) -> None:
    @register(function)
    def function_rule(input: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Local | NotLocal:
        if training and p > 0:
            return NotLocal("draws random numbers in training mode", "call .eval() on it")
        return Local((input,), input.dims, lambda block: block, aliases=input)

    @register(module_type)
    def module_rule(m: Any, input: Value) -> Local | NotLocal:
        return function_rule(input, m.p, m.training)


for _module, _function in (
    (nn.Dropout, torch.nn.functional.dropout),
    (nn.Dropout1d, torch.nn.functional.dropout1d),
    (nn.Dropout2d, torch.nn.functional.dropout2d),
    (nn.Dropout3d, torch.nn.functional.dropout3d),
    (nn.AlphaDropout, torch.nn.functional.alpha_dropout),
    (nn.FeatureAlphaDropout, torch.nn.functional.feature_alpha_dropout),
):
    _register_dropout(_module, _function)
