"""Operations that cut values apart and join them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..axes import Dim, Extent, Symbol, Value
from ..window import IDENTITY, Sliding, Span, Window
from .border import fit
from .registry import Answer, Local, NotLocal, Sliced, Unknown, register


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
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.dim() != first.rank:
            return NotLocal("concatenates a tensor with another number of dimensions")
        if isinstance(tensor, torch.Tensor) and any(
            first.dims[index].known not in (None, tensor.size(index)) for index in extents
        ):
            return NotLocal("concatenates a tensor that has not the size of the image")
    operands = tuple(tensor if isinstance(tensor, Value) else Sliced(tensor, extents) for tensor in tensors)
    sizes = [tensor.dims[dim].known if isinstance(tensor, Value) else tensor.size(dim) for tensor in tensors]
    known = [size for size in sizes if size is not None]
    total = sum(known) if len(known) == len(sizes) else Symbol()
    return Local(operands, first.resized({dim: total}), lambda *blocks: torch.cat(blocks, dim))


@register(torch.stack)
def stack(tensors: Sequence[Any], dim: int = 0) -> Answer:
    if not all(isinstance(tensor, Value) for tensor in tensors):
        return NotLocal("stacks values with a tensor that does not depend on the image")
    first = tensors[0]
    if any([d.tag for d in value.dims] != [d.tag for d in first.dims] for value in tensors):
        return NotLocal("stacks values whose streamed axes are not aligned")
    if not -first.rank - 1 <= dim <= first.rank:
        return NotLocal(f"inserts a dimension at {dim} of {first.rank}")
    at = dim % (first.rank + 1)
    dims = (*first.dims[:at], Dim(None, len(tensors)), *first.dims[at:])
    return Local(tuple(tensors), dims, lambda *blocks: torch.stack(blocks, at))


def _parts(x: Value, dim: int, sizes: Sequence[int]) -> tuple[Local, ...]:
    """Consecutive parts of a dimension that is not streamed."""

    def part(start: int, size: int) -> Local:
        return Local((x,), x.resized({dim: size}), lambda block: block.narrow(dim, start, size), aliases=x)

    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(part(start, size) for start, size in zip(starts, sizes, strict=True))


def _uncuttable(x: Value, dim: int, *counts: Any) -> NotLocal | None:
    if not all(isinstance(count, int) for count in counts):
        return NotLocal("cuts a dimension apart by numbers that are not known before the call")
    if tags := x.tags([dim]):
        return NotLocal(f"cuts the streamed axis {tags[0]} apart")
    if x.dims[dim].known is None:
        return NotLocal("cuts apart a dimension whose size is not known before the call")
    return None


@register(torch.chunk, "chunk")
def chunk(input: Value, chunks: int, dim: int = 0) -> Answer:
    dim = input.dim(dim)
    if problem := _uncuttable(input, dim, chunks):
        return problem
    size = input.dims[dim].known or 0
    each = -(-size // chunks)
    return _parts(input, dim, [min(each, size - start) for start in range(0, size, max(each, 1))])


@register(torch.split, torch.functional.split, "split")
def split(tensor: Value, split_size_or_sections: Any, dim: int = 0) -> Answer:
    dim = tensor.dim(dim)
    sections = split_size_or_sections
    if problem := _uncuttable(tensor, dim, *(sections if isinstance(sections, (tuple, list)) else (sections,))):
        return problem
    size = tensor.dims[dim].known or 0
    if isinstance(sections, int):
        sections = [min(sections, size - start) for start in range(0, size, sections)]
    if sum(sections) != size:
        return NotLocal(f"splits {size} positions into sections of {sum(sections)}")
    return _parts(tensor, dim, list(sections))


@register(torch.unbind, "unbind")
def unbind(input: Value, dim: int = 0) -> Answer:
    dim = input.dim(dim)
    if problem := _uncuttable(input, dim):
        return problem
    return tuple(_selects(input, dim, input.dims[dim].known or 0))


def _selects(x: Value, dim: int, count: int) -> Iterator[Local]:
    for index in range(count):
        dims = (*x.dims[:dim], *x.dims[dim + 1 :])
        yield Local((x,), dims, lambda block, index=index: block.select(dim, index), aliases=x)


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
                dims.append(_cut(dim, item))
            block_index.append(item)
        elif item == slice(None):
            dims.append(dim)
            block_index.append(slice(None))
        elif (window := _crop(item)) is None:
            return NotLocal(f"picks positions along the streamed axis {dim.tag} by an index counted from the start")
        else:
            windows[position] = window
            dims.append(dim.through(window))
            block_index.append(slice(None, None, window.stride))

    if not windows:
        return Local((input,), tuple(dims), lambda block: block[tuple(block_index)], aliases=input)
    # `fit` takes one span for each of the last dimensions.
    first = min(windows)
    windows = {position: windows.get(position, IDENTITY) for position in range(first, input.rank)}

    def run(block: torch.Tensor, *spans: Span) -> torch.Tensor:
        return fit(block, spans)[tuple(block_index)]

    return Local((input,), tuple(dims), run, windows, aliases=input)


def _cut(dim: Dim, item: slice) -> Dim:
    if item == slice(None):
        return dim
    return Dim(None, len(range(*item.indices(dim.size))) if isinstance(dim.size, int) else Symbol())


def _is_plain(item: Any) -> bool:
    parts = (item.start, item.stop, item.step) if isinstance(item, slice) else (item,)
    return all(part is None or part is Ellipsis or type(part) in (int, Extent) for part in parts)


def _crop(item: Any) -> Sliding | None:
    """`x[a:-b:s]` as a window; None where what it picks depends on the image's size."""
    if not isinstance(item, slice):
        return None
    start, stop, step = item.start or 0, item.stop or 0, item.step or 1
    if start < 0 or stop > 0 or step < 1 or item.stop == 0:
        return None
    return Sliding(stride=step, before=-start, after=stop)
