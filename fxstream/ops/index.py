"""Indexing, splitting, joining and reordering along dimensions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..geometry.axes import Dim, Extent, Multiple, Size, Symbol, Value
from ..geometry.window import Sliding, Span, Table, Window
from .arguments import as_tuple, unpacked
from .border import fit
from .given import Typed
from .registry import Answer, Local, NotLocal, Pending, Sliced, Unknown, register, unstreamed


@register(torch.cat, torch.concat, torch.concatenate)
def cat(tensors: Sequence[Any], dim: int = 0) -> Local | NotLocal:
    values = [tensor for tensor in tensors if isinstance(tensor, Value)]
    first = values[0]
    dim = first.dim(dim)
    if tags := first.tags([dim]):
        return NotLocal(f"concatenates along the streamed axis {tags[0]}", "concatenate along the channels")
    if any([d.tag for d in value.dims] != [d.tag for d in first.dims] for value in values):
        return NotLocal("concatenates values whose streamed axes are not aligned")
    extents = {index: d.tag for index, d in enumerate(first.dims) if d.tag is not None}
    for tensor in tensors:
        if isinstance(tensor, (torch.Tensor, Typed)) and tensor.dim() != first.rank:
            return NotLocal("concatenates a tensor with another number of dimensions")
        if isinstance(tensor, (torch.Tensor, Typed)) and any(
            first.dims[index].known not in (None, tensor.size(index)) for index in extents
        ):
            return NotLocal("concatenates a tensor whose size is not that of the image")
    operands = tuple(tensor if isinstance(tensor, Value) else Sliced(tensor, extents) for tensor in tensors)
    sizes = [_known(tensor, dim) for tensor in tensors]
    known = [size for size in sizes if size is not None]
    total = sum(known) if len(known) == len(sizes) else Symbol()
    return Local(operands, first.resized({dim: total}), lambda *blocks: torch.cat(blocks, dim))


def _known(tensor: Any, dim: int) -> int | None:
    """The size of a dimension; None if it is not known before the call."""
    if isinstance(tensor, Value):
        return tensor.dims[dim].known
    if isinstance(tensor, Unknown):
        size = tensor.shape[dim] if isinstance(tensor, Pending) and tensor.shape is not None else None
        return size if isinstance(size, int) else None
    return int(tensor.size(dim))


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


_UNCOUNTABLE = NotLocal("cuts a dimension into a number of parts that is not known before the call")


def _parts(x: Value, dim: int, sizes: Sequence[Any]) -> tuple[Local, ...]:
    """One result per size: consecutive parts of a dimension that is not streamed."""
    if any(isinstance(size, Symbol) for size in sizes):
        # At conversion only the dimensions of the results are needed: nothing runs before the call.
        return tuple(Local((x,), x.resized({dim: size}), lambda block: block, aliases=x) for size in sizes)

    def part(start: int, size: int) -> Local:
        return Local((x,), x.resized({dim: size}), lambda block: block.narrow(dim, start, size), aliases=x)

    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(part(start, size) for start, size in zip(starts, sizes, strict=True))


def _cut_problem(x: Value, dim: int, *counts: Any) -> NotLocal | None:
    """Why a dimension cannot be cut into parts of sizes or numbers `counts`, or None."""
    if not all(isinstance(count, int) for count in counts):
        return NotLocal("cuts a dimension apart by numbers that are not known before the call")
    if tags := x.tags([dim]):
        return NotLocal(f"cuts the streamed axis {tags[0]} apart")
    return None


@register(torch.chunk, "chunk")
def chunk(input: Value, chunks: int, dim: int = 0) -> Answer:
    dim = input.dim(dim)
    if problem := _cut_problem(input, dim, chunks):
        return problem
    size = input.dims[dim].known
    if size is None:  # at the call there may be fewer parts than `chunks`
        return _parts(input, dim, [Symbol() for _ in range(chunks)])
    each = -(-size // chunks)
    return _parts(input, dim, [min(each, size - start) for start in range(0, size, max(each, 1))])


@register(torch.split, torch.functional.split, "split")
def split(tensor: Value, split_size_or_sections: Any, dim: int = 0) -> Answer:
    dim = tensor.dim(dim)
    sections = split_size_or_sections
    if problem := _cut_problem(tensor, dim, *as_tuple(sections)):
        return problem
    size = tensor.dims[dim].known
    if isinstance(sections, int):
        if size is None:
            return _UNCOUNTABLE
        sections = [min(sections, size - start) for start in range(0, size, sections)]
    if size is not None and sum(sections) != size:
        return NotLocal(f"splits {size} positions into sections of {sum(sections)}")
    return _parts(tensor, dim, list(sections))


@register(torch.unbind, "unbind")
def unbind(input: Value, dim: int = 0) -> Answer:
    dim = input.dim(dim)
    if problem := _cut_problem(input, dim):
        return problem
    count = input.dims[dim].known
    return _UNCOUNTABLE if count is None else tuple(_selects(input, dim, count))


def _selects(x: Value, dim: int, count: int) -> Iterator[Local]:
    for index in range(count):
        dims = (*x.dims[:dim], *x.dims[dim + 1 :])
        yield Local((x,), dims, lambda block, index=index: block.select(dim, index), aliases=x)


@register(operator.getitem)
def getitem(input: Value, index: Any) -> Answer:
    items = list(index) if isinstance(index, tuple) else [index]
    lists = [position for position, item in enumerate(items) if is_list_of_integers(item)]
    if lists and all(item == slice(None) for position, item in enumerate(items) if position != lists[0]):
        return _reordered(input, lists[0], items[lists[0]], lambda block: block[index])
    if not all(map(is_integer_or_slice, items)):
        return NotLocal("is indexed by something else than known integers and slices")
    dims: list[Dim] = []
    block_index: list[Any] = []
    windows: dict[int, Window] = {}
    source = iter(enumerate(input.dims))
    for item in expanded(items, input.rank):
        if item is None:
            dims.append(Dim(None, 1))
            block_index.append(None)
            continue
        position, dim = next(source)
        if dim.tag is None:
            if isinstance(item, slice):
                dims.append(sliced(dim, item))
            block_index.append(item)
        elif item == slice(None):
            dims.append(dim)
            block_index.append(slice(None))
        elif not isinstance(item, slice):
            return NotLocal(f"picks one position along the streamed axis {dim.tag}")
        else:
            windows[position], cropped = _crop(dim, item)
            dims.append(cropped)
            block_index.append(slice(None, None, item.step))

    if not windows:
        return Local((input,), tuple(dims), lambda block: block[tuple(block_index)], aliases=input)

    def run(block: torch.Tensor, *spans: Span) -> torch.Tensor:
        return fit(block, spans, dims=tuple(windows))[tuple(block_index)]

    return Local((input,), tuple(dims), run, windows, aliases=input)


def expanded(items: Sequence[Any], rank: int) -> list[Any]:
    """The items of an index into a value of `rank` dimensions, with a full slice for every dimension left out."""
    used = sum(item is not None and item is not Ellipsis for item in items)
    at = next((position for position, item in enumerate(items) if item is Ellipsis), len(items))
    return [*items[:at], *[slice(None)] * (rank - used), *items[at + 1 :]]


def sliced(dim: Dim, item: slice) -> Dim:
    """The result of `x[item]` along a dimension that is not streamed."""
    if item == slice(None):
        return dim
    known = isinstance(dim.size, int) and not any(isinstance(end, Symbol) for end in (item.start, item.stop))
    return Dim(None, len(range(*item.indices(dim.size))) if known else Symbol())


def is_integer_or_slice(item: Any) -> bool:
    """Whether an item of an index is an integer, a slice with a positive step, None or an ellipsis."""
    if not isinstance(item, slice):
        return item is None or item is Ellipsis or type(item) in (int, Extent, Multiple)
    # The ends of a slice may follow from sizes of the image, which are known only at the call.
    ends = all(
        end is None or type(end) in (int, Extent, Multiple) or isinstance(end, Symbol)
        for end in (item.start, item.stop)
    )
    return ends and (item.step is None or (type(item.step) is int and item.step > 0))


def _crop(dim: Dim, item: slice) -> tuple[Window, Dim]:
    """The window and the result of `x[item]` along a streamed dimension. Raises ValueError if the result is empty."""
    step = item.step or 1
    if isinstance(dim.size, int) and not any(isinstance(end, Symbol) for end in (item.start, item.stop)):
        start, stop, _ = item.indices(dim.size)
        window: Window = Sliding(stride=step, before=-start, after=stop - dim.size)
        return window, dim.through(window)
    start, stop = (0 if end is None else end for end in (item.start, item.stop))
    if type(start) is int and start >= 0 and type(stop) is int and (stop < 0 or item.stop is None):
        window = Sliding(stride=step, before=-start, after=stop)
        return window, dim.through(window)
    result = Dim(dim.tag, Symbol())
    if type(start) is int and start >= 0:
        return Sliding(stride=step, before=-start), result
    # The first row follows from the size of the value: an empty table says that the window is not known yet.
    return Table(0, (), ()), result


@register(torch.narrow, "narrow")
def narrow(input: Value, dim: int, start: Any, length: Any) -> Answer:
    dim = input.dim(dim)
    if not all(isinstance(number, (int, Symbol)) for number in (start, length)):
        return NotLocal("cuts a part out by numbers that are not known before the call")
    if isinstance(start, Symbol) or isinstance(length, Symbol):
        cut = slice(start, Symbol())
    else:
        cut = slice(start, start + length or None)
        size = input.dims[dim].known
        if size is not None and not -size <= start <= size - length:
            raise ValueError(f"rows {start} to {start + length} of {size}")
    return getitem(input, (*[slice(None)] * dim, cut))


@register(torch.select, "select")
def select(input: Value, dim: int, index: int) -> Answer:
    return getitem(input, (*[slice(None)] * input.dim(dim), index))


def is_list_of_integers(item: Any) -> bool:
    return isinstance(item, list) and all(type(number) is int for number in item)


def _reordered(x: Value, dim: int, index: Any, run: Callable[..., torch.Tensor]) -> Answer:
    """The positions `index` of a dimension, a list or a tensor of integers, in that order.

    `run` gets a block, and the index if it is a tensor.
    """
    if tags := x.tags([dim]):
        return NotLocal(f"puts positions along the streamed axis {tags[0]} in another order")
    count: Size = Symbol()
    if not isinstance(index, Unknown):
        count = len(index) if isinstance(index, list) else index.numel()
    operands = (x,) if isinstance(index, list) else (x, index)
    return Local(operands, x.resized({dim: count}), run)


@register(torch.index_select, "index_select")
def index_select(input: Value, dim: int, index: Any) -> Answer:
    if isinstance(index, Value):
        return NotLocal("picks positions that depend on the image")
    return _reordered(input, input.dim(dim), index, lambda block, index: block.index_select(dim, index))


@register(torch.flip, "flip")
def flip(input: Value, *order: Any, dims: Any = None) -> Answer:
    given = unpacked(order) if dims is None else as_tuple(dims)
    if tags := input.tags(given):
        return NotLocal(f"mirrors the streamed {' and '.join(tags)}", unstreamed(tags))
    return Local((input,), input.dims, lambda block: block.flip(given))


@register(torch.roll, "roll")
def roll(input: Value, shifts: Any, dims: Any = None) -> Answer:
    if tags := input.tags(range(input.rank) if dims is None else as_tuple(dims)):
        return NotLocal(f"moves positions around the end of the streamed {' and '.join(tags)}", unstreamed(tags))
    return Local((input,), input.dims, lambda block: block.roll(shifts, dims))
