"""Operations that compute nothing: they read sizes, or reorder, split, merge, add and remove dimensions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..geometry.axes import Dim, Regrouped, Size, Symbol, Value, is_extent, is_extent_of, product, regrouped, reshaped
from ..geometry.window import Sliding, Span, Table, Transposed, Window
from .arguments import as_tuple, unpacked
from .border import fit
from .derived import derived, typed
from .given import Typed
from .registry import Answer, Fact, Local, NotLocal, Pending, Sliced, Unknown, register


@register(nn.Identity)
def identity(m: Any, input: Value) -> Answer:
    return Local((input,), input.dims, lambda block: block, aliases=input)


# Sizes and attributes. A size that the model reads is that of the whole value, not of a block.


@register("size")
def size(input: Value, dim: int | None = None) -> Answer:
    return Fact(tuple(map(input.size, range(input.rank))) if dim is None else input.size(dim))


@register(torch.numel, "numel", "nelement")
def numel(input: Value) -> Answer:
    return Fact(product(dim.size for dim in input.dims))


@register("dim", "ndimension")
def rank(input: Value) -> Answer:
    return Fact(input.rank)


@register(getattr)
def attribute(input: Any, name: str) -> Answer:
    if isinstance(input, tuple):  # the results of an operation with several
        if hasattr(input, name):
            return Fact(getattr(input, name))
        return NotLocal(f"reads the attribute {name} of several results")
    if name == "shape":
        return size(input)
    if name == "ndim":
        return rank(input)
    if name == "mT":
        return transpose(input, -2, -1)
    if name == "T":
        return _permuted(input, range(input.rank)[::-1])
    if name in ("dtype", "device"):
        return Fact(typed(input, lambda like: getattr(like, name)))
    return NotLocal(f"reads the attribute {name} of a value")


@register(OrderedDict)
def ordered_dict(items: Any) -> Answer:
    return Fact(OrderedDict(items))


# Reordering dimensions.


def _permuted(x: Value, order: Sequence[int]) -> Answer:
    order = tuple(x.dim(index) for index in order)
    return Local((x,), tuple(x.dims[index] for index in order), lambda block: block.permute(order), aliases=x)


@register(torch.permute, "permute")
def permute(input: Value, *order: Any, dims: Any = None) -> Answer:
    return _permuted(input, unpacked(order) if dims is None else tuple(dims))


@register(torch.t, "t")
def transpose_matrix(input: Value) -> Answer:
    return _permuted(input, range(input.rank)[::-1])


@register(torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims")
def transpose(input: Value, dim0: int, dim1: int) -> Answer:
    order = list(range(input.rank))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permuted(input, order)


@register(torch.movedim, torch.moveaxis, "movedim", "moveaxis")
def movedim(input: Value, source: Any, destination: Any) -> Answer:
    sources, destinations = ([input.dim(dim) for dim in as_tuple(dims)] for dims in (source, destination))
    order = [dim for dim in range(input.rank) if dim not in sources]
    for where, dim in sorted(zip(destinations, sources, strict=True)):
        order.insert(where, dim)
    return _permuted(input, order)


# Splitting, merging, adding and removing dimensions.


def _reshape(x: Value, sizes: Sequence[Any]) -> Answer:
    if any(isinstance(size, Unknown) for size in sizes):
        return NotLocal("is reshaped to sizes that are not known before the call")
    dims = reshaped(x.dims, sizes)
    if dims is None and (found := regrouped(x.dims, sizes)) is not None:
        return _regroup(x, found)
    if dims is None:
        return NotLocal(f"splits, merges or moves a streamed axis ({', '.join(x.tags())}) by reshaping")
    # Along a streamed axis, the result has as many rows as the block.
    positions = [None if dim.tag is None else x.position(dim.tag) for dim in dims]

    def run(block: torch.Tensor) -> torch.Tensor:
        shape: list[Any] = [
            dim.size if position is None else block.size(position)
            for dim, position in zip(dims, positions, strict=True)
        ]
        return block.reshape(shape)

    return Local((x,), tuple(dims), run, aliases=x)


def _regroup(x: Value, found: Regrouped) -> Answer:
    """The answer for a reshape that splits streamed axes into windows, or merges them with dimensions behind them."""
    windows: dict[int, Window] = {}
    for tag, length in found.parts.items():
        window = Transposed if found.merges else Sliding
        windows[x.position(tag)] = window(length, length) if isinstance(length, int) else Table(0, (), ())
    result = Value(tuple(found.dims))
    positions = {result.position(tag): x.position(tag) for tag in x.tags()}
    merged = [result.position(tag) for tag in found.parts]

    def run(block: torch.Tensor, *spans: Span) -> torch.Tensor:
        rows = block if found.merges else fit(block, spans, dims=list(windows))
        shape: list[Any] = [dim.size for dim in found.dims]
        for place, position in positions.items():
            length: Any = found.parts.get(found.dims[place].tag or "", 1)
            shape[place] = rows.size(position) * length if found.merges else rows.size(position) // length
        return fit(rows.reshape(shape), spans, dims=merged) if found.merges else rows.reshape(shape)

    return Local((x,), result.dims, run, windows, aliases=x)


@register(torch.reshape, "view", "reshape", takes_sizes=True)
def view(input: Any, *sizes: Any, shape: Any = None, size: Any = None) -> Answer:
    given = unpacked(sizes) if sizes else tuple(shape if size is None else size)
    if given and isinstance(given[0], torch.dtype):
        return NotLocal("reads the bits of a value as another type")
    return _reshape(input, given) if isinstance(input, Value) else _constant_resized(input, given, torch.reshape)


def _constant_resized(tensor: Any, sizes: tuple[Any, ...], function: Callable[..., torch.Tensor]) -> Answer:
    """The answer for `function(tensor, sizes)` on a tensor that does not depend on the image.

    Some sizes are read off values: at a call the result is a tensor, and nothing streams.
    """
    if not all(isinstance(size, (int, Symbol)) for size in sizes):
        return NotLocal("is given sizes that are not known before the call")
    if isinstance(tensor, (Typed, Pending)):
        return derived(function, (tensor, sizes), {})
    if isinstance(tensor, Unknown) or any(isinstance(size, Symbol) for size in sizes):
        return Fact(Unknown("a view"))
    return derived(function, (tensor, sizes), {})


@register("view_as", "reshape_as")
def view_as(input: Value, other: Value) -> Answer:
    return view(input, *map(other.size, range(other.rank)))


@register(torch.flatten, "flatten")
def flatten(input: Value, start_dim: int = 0, end_dim: int = -1) -> Answer:
    start, end = input.dim(start_dim), input.dim(end_dim)
    if start == end:
        return Local((input,), input.dims, lambda block: block, aliases=input)
    if tags := input.tags(range(start, end + 1)):
        return NotLocal(f"merges the streamed axis {' and '.join(tags)} into another dimension")
    merged = Dim(None, product(dim.size for dim in input.dims[start : end + 1]))
    dims = (*input.dims[:start], merged, *input.dims[end + 1 :])
    return Local((input,), dims, lambda block: block.flatten(start, end), aliases=input)


@register(nn.Flatten)
def flatten_module(m: Any, input: Value) -> Answer:
    return flatten(input, m.start_dim, m.end_dim)


@register(torch.unflatten, "unflatten")
def unflatten(input: Value, dim: int, sizes: Sequence[Any]) -> Answer:
    dim = input.dim(dim)
    return _reshape(input, [*map(input.size, range(dim)), *sizes, *map(input.size, range(dim + 1, input.rank))])


@register(nn.Unflatten)
def unflatten_module(m: Any, input: Value) -> Answer:
    return unflatten(input, m.dim, m.unflattened_size)


@register(torch.unsqueeze, "unsqueeze")
def unsqueeze(input: Value, dim: int) -> Answer:
    if not -input.rank - 1 <= dim <= input.rank:
        return NotLocal(f"inserts a dimension at {dim} of {input.rank}")
    at = dim % (input.rank + 1)
    dims = (*input.dims[:at], Dim(None, 1), *input.dims[at:])
    return Local((input,), dims, lambda block: block.unsqueeze(at), aliases=input)


@register(torch.squeeze, "squeeze")
def squeeze(input: Value, dim: Any = None) -> Answer:
    given = tuple(range(input.rank)) if dim is None else as_tuple(dim)
    chosen = [index for index in map(input.dim, given) if input.dims[index].size == 1 or dim is not None]
    if tags := input.tags(chosen if dim is not None else range(input.rank)):
        return NotLocal(f"removes dimensions of size 1, and the streamed axis {tags[0]} may be one of them")
    if any(input.dims[index].known is None for index in given):
        return NotLocal("removes dimensions of size 1, whose sizes are not known before the call")
    removed = tuple(index for index in chosen if input.dims[index].size == 1)
    dims = tuple(d for index, d in enumerate(input.dims) if index not in removed)
    return Local((input,), dims, lambda block: block.squeeze(removed), aliases=input)


@register(torch.broadcast_to, "expand", "broadcast_to", takes_sizes=True)
def expand(input: Any, *sizes: Any, size: Any = None) -> Answer:
    given = unpacked(sizes) if sizes else tuple(size)
    if isinstance(input, Value):
        return _expanded_value(input, given)
    if not any(map(is_extent, given)):
        return _constant_resized(input, given, torch.Tensor.expand)
    return _expanded_constant(input, given) or derived(torch.Tensor.expand, (input, given), {})


@register("expand_as")
def expand_as(input: Any, other: Value) -> Answer:
    return expand(input, *map(other.size, range(other.rank)))


@register("repeat", takes_sizes=True)
def repeat(input: Any, *repeats: Any) -> Answer:
    counts = unpacked(repeats)
    if isinstance(input, Value):
        return _repeated_value(input, counts)
    extents = [is_extent(count) for count in counts]
    if any(extents) and all(extent or count == 1 for extent, count in zip(extents, counts, strict=True)):
        sizes = [count if extent else -1 for extent, count in zip(extents, counts, strict=True)]
        return _expanded_constant(input, sizes) or derived(_repeated, (input, counts), {})
    return _constant_resized(input, counts, torch.Tensor.repeat)


def _repeated(tensor: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The tensor repeated; a view of it, where only dimensions of size 1 are."""
    sizes = (1,) * (len(counts) - tensor.dim()) + tuple(tensor.shape)
    if all(1 in pair for pair in zip(sizes, counts, strict=True)):
        return tensor.expand([max(pair) for pair in zip(sizes, counts, strict=True)])
    return tensor.repeat(*counts)


def _repeated_value(x: Value, counts: Sequence[Any]) -> Answer:
    new = len(counts) - x.rank
    if new < 0 or any(isinstance(count, Unknown) or is_extent(count) for count in counts):
        return NotLocal("is repeated in a way that its streaming rule does not cover")
    dims = [Dim(None, count) for count in counts[:new]]
    for dim, count in zip(x.dims, counts[new:], strict=True):
        if dim.tag is not None and count != 1:
            return NotLocal(f"repeats the streamed axis {dim.tag}")
        dims.append(dim if count == 1 else Dim(None, product([dim.size, count])))
    return Local((x,), tuple(dims), lambda block: block.tile(*counts))


def _expanded_value(x: Value, sizes: Sequence[Size]) -> Answer:
    new = len(sizes) - x.rank
    dims = [Dim(None, size) for size in sizes[:new]]
    for dim, size in zip(x.dims, sizes[new:], strict=True):
        if dim.tag is not None and size != -1 and not is_extent_of(size, dim):
            return NotLocal(f"expands the streamed axis {dim.tag}")
        dims.append(dim if dim.tag is not None or size == -1 else Dim(None, size))
    if any(map(is_extent, sizes[:new])):
        return NotLocal("expands a value to the extent of a streamed axis")
    kept = [-1 if size == -1 or dim.tag is not None else size for dim, size in zip(dims, sizes, strict=True)]
    return Local((x,), tuple(dims), lambda block: block.expand(kept), aliases=x)


def _expanded_constant(tensor: Any, sizes: Sequence[Any]) -> Answer | None:
    """The answer for a tensor that does not depend on the image and is expanded to the extents of streamed axes.

    None if these are not all axes that are streamed.

    Example: the class token of a vision transformer, expanded to the size of the batch.
    """
    extents = {index: size for index, size in enumerate(sizes) if is_extent(size)}
    if not extents or any(isinstance(size, Unknown) for size in sizes):
        return NotLocal("expands a tensor to a size that is not the extent of a streamed axis")
    source = next(iter(extents.values())).value
    if any(not is_extent_of(size, source.dims[source.position(size.tag)]) for size in extents.values()):
        return NotLocal("expands a tensor to the extents of different values")
    if {size.tag for size in extents.values()} != set(source.tags()) or len(extents) != len(source.tags()):
        return None
    if isinstance(tensor, Unknown):
        whole: tuple[Any, ...] = tuple(1 if index in extents else Symbol() for index in range(len(sizes)))
    else:
        whole = (1,) * (len(sizes) - tensor.dim()) + tuple(tensor.shape)
    own = {index: size.tag for index, size in extents.items() if whole[index] != 1}
    if any(whole[index] != extents[index] for index in own):
        return NotLocal("expands a tensor that has an extent of its own along a streamed axis")
    dims = tuple(
        source.dims[source.position(extents[index].tag)]
        if index in extents
        else Dim(None, whole[index] if size == -1 else size)
        for index, size in enumerate(sizes)
    )
    positions = {index: source.position(extents[index].tag) for index in extents}
    new = 0 if isinstance(tensor, Unknown) else len(sizes) - tensor.dim()
    operand = Sliced(tensor, {index - new: tag for index, tag in own.items()})

    def run(block: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return rows.expand(
            [block.size(positions[index]) if index in positions else size for index, size in enumerate(sizes)]
        )

    return Local((source, operand), dims, run)
