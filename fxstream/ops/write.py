"""Writes by index, such as `x[:, 0] = 0`, `x[x < 0] = 0` and `x[:, :, 1:] = y[:, :, :-1]`, and whole overwrites.

torch.fx records a write as a call of `operator.setitem`. Whoever reads `x` later reads the result of that call.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import InputError
from ..geometry.axes import Dim, Symbol, Value
from ..geometry.window import IDENTITY, Placed, Span, Table, Window
from .index import expanded, is_integer_or_slice, is_list_of_integers, sliced
from .pointwise import pointwise
from .registry import Answer, Local, NotLocal, Sliced, Unknown, register

_WAY_OUT = "use the out-of-place form, such as torch.where or torch.cat"


@register(operator.setitem)
def setitem(input: Any, index: Any, value: Any) -> Answer:
    if not isinstance(input, Value):
        return NotLocal("writes values of the image into what does not depend on it", _WAY_OUT)
    if value is input:
        return NotLocal("writes a value into itself", "write a clone of it")
    if isinstance(index, Value) or _is_mask(index):
        return _write_where(input, index, value)
    return _write_part(input, list(index) if isinstance(index, tuple) else [index], value)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype is torch.bool and index.dim() > 0


def _write_where(x: Value, mask: Value | torch.Tensor, value: Any) -> Answer:
    """The answer for `x[mask] = value`. The dimensions of the mask are the first ones of `x`."""
    rest = x.rank - (mask.rank if isinstance(mask, Value) else mask.dim())
    if isinstance(value, Value):
        return NotLocal("writes values of the image where a mask is true, one after another", _WAY_OUT)
    if isinstance(value, Unknown):
        return NotLocal("writes a tensor that is not known before the call", "make it a constant")
    if rest < 0 or (isinstance(value, torch.Tensor) and not _is_shared(x, rest, value)):
        return NotLocal("writes where a mask is true in a way that its streaming rule does not cover", _WAY_OUT)
    sizes = [dim.known for dim in mask.dims] if isinstance(mask, Value) else mask.shape
    if any(None not in (dim.known, size) and dim.known != size for dim, size in zip(x.dims, sizes, strict=False)):
        return NotLocal("is indexed by a mask of another size")
    if isinstance(mask, Value) and [dim.tag for dim in mask.dims] != [dim.tag for dim in x.dims[: mask.rank]]:
        return NotLocal("is indexed by a mask whose streamed axes are not aligned")
    extents = {index: dim.tag for index, dim in enumerate(x.dims[: x.rank - rest]) if dim.tag is not None}
    operand = mask if isinstance(mask, Value) else Sliced(mask, extents)

    def run(block: torch.Tensor, chosen: torch.Tensor, new: torch.Tensor | None) -> torch.Tensor:
        if chosen.dtype is not torch.bool:
            raise InputError(f"a write by index streams where the index is a mask of type bool, not {chosen.dtype}")
        chosen = chosen.reshape(*chosen.shape, *(1,) * rest)
        return torch.where(chosen, value if new is None else new, block).to(block.dtype)

    written = value if isinstance(value, torch.Tensor) else None
    return Local((x, operand, written), x.dims, run, mutates=x)


def _is_shared(x: Value, rest: int, value: torch.Tensor) -> bool:
    """Whether all positions that a mask chooses get the same values, one for each entry of the last `rest` dimensions.

    Along streamed ones among these, they get one for all entries.
    """
    aligned = zip(x.dims[x.rank - value.dim() :], value.shape, strict=False)
    return value.dim() <= rest and all(dim.tag is None or size == 1 for dim, size in aligned)


def _write_part(x: Value, items: Sequence[Any], value: Any) -> Answer:
    """The answer for a write by integers, slices, and at most one list or tensor of channels."""
    lists = [item for item in items if not isinstance(item, Symbol) and not is_integer_or_slice(item)]
    if len(lists) > 1 or not all(map(_is_list, lists)) or any(item is None for item in items):
        return NotLocal("is written by something else than known integers, slices and one list", _WAY_OUT)
    items = expanded(items, x.rank)
    region: list[Dim] = []
    """The dimensions of the part that is written."""
    parts: dict[int, range | None] = {}
    """A streamed dimension of which not every row is written -> the rows; None if they are not known yet."""
    windows: list[Window] = []
    """For every dimension of the part, how the result reads what is written."""
    for position, (dim, item) in enumerate(zip(x.dims, items, strict=True)):
        if dim.tag is None:
            if not isinstance(item, (int, Symbol)):
                region.append(sliced(dim, item) if isinstance(item, slice) else Dim(None, Symbol()))
                windows.append(IDENTITY)
            continue
        if isinstance(item, slice) and item == slice(None):
            region.append(dim)
            windows.append(IDENTITY)
            continue
        if not isinstance(item, (int, slice, Symbol)):
            return NotLocal(f"is written by a list of positions along the streamed axis {dim.tag}", _WAY_OUT)
        rows = parts[position] = _rows(dim, item)
        if isinstance(item, slice):
            region.append(Dim(dim.tag, Symbol() if rows is None else len(rows)))
            windows.append(_placed(dim, item, rows))
    return _write_rows(x, items, parts, region, windows, value)


def _is_list(item: Any) -> bool:
    """Whether an item of an index is a list of integers, or such a list or a mask as a tensor."""
    if isinstance(item, torch.Tensor):
        return item.dim() == 1 and not item.is_floating_point()
    return is_list_of_integers(item)


def _rows(dim: Dim, item: Any) -> range | None:
    """The rows of a streamed dimension that an item of an index stands for; None if they are not known yet."""
    if isinstance(item, int):
        item = slice(item, item + 1 or None)
    if isinstance(item, Symbol) or isinstance(item.start, Symbol) or isinstance(item.stop, Symbol):
        return None
    return None if dim.known is None else range(*item.indices(dim.known))


def _placed(dim: Dim, item: slice, rows: range | None) -> Window:
    """The window through which the result of a write along a streamed dimension reads what is written."""
    if rows is not None:
        return Placed(rows.start, rows.step, len(rows), dim.known)
    start = 0 if item.start is None else item.start
    if type(start) is int and start >= 0:
        return Placed(start, item.step or 1, None, None)
    # The first row follows from the size of the value: an empty table says that the window is not known yet.
    return Table(0, (), ())


def _write_rows(
    x: Value,
    items: Sequence[Any],
    parts: dict[int, range | None],
    region: Sequence[Dim],
    windows: Sequence[Window],
    value: Any,
) -> Answer:
    """The answer for a write into the part `items` of `x`; see `_write_part` for the other arguments."""
    operands: list[Any] = [x]
    windows_of = {}
    shift = len(region) - (value.rank if isinstance(value, Value) else getattr(value, "ndim", 0))
    if isinstance(value, Unknown):
        return NotLocal("writes a tensor that is not known before the call", "make it a constant")
    if shift < 0:
        return NotLocal("writes a value of more dimensions than the part that it overwrites", _WAY_OUT)
    aligned = region[shift:]
    if isinstance(value, Value):
        if [dim.tag for dim in value.dims] != [dim.tag for dim in aligned] or set(value.tags()) != set(x.tags()):
            return NotLocal("writes a value whose streamed axes are not aligned")
        operands.append(value)
        windows_of[value] = dict(enumerate(windows[shift:]))
    elif isinstance(value, torch.Tensor):
        extents = {
            index: dim.tag for index, dim in enumerate(aligned) if dim.tag is not None and value.size(index) != 1
        }
        if any(windows[shift + index] is not IDENTITY for index in extents):
            return NotLocal("writes a tensor of several rows into a part of a streamed axis", _WAY_OUT)
        if any(aligned[index].known not in (None, value.size(index)) for index in extents):
            return NotLocal("writes a tensor whose size is not that of the image")
        operands.append(Sliced(value, extents))

    written_by_operand = len(operands) > 1
    chosen = {position: item for position, item in enumerate(items) if isinstance(item, torch.Tensor)}
    operands += chosen.values()

    def run(block: torch.Tensor, *rest: Any) -> torch.Tensor:
        given, spans = rest[: len(operands) - 1], rest[len(operands) - 1 :]
        index, taken = list(items), []
        for position, tensor in zip(chosen, given[len(given) - len(chosen) :], strict=True):
            index[position] = tensor
        for (dim, rows), span in zip(parts.items(), spans, strict=True):
            assert rows is not None, "sizes are known at a call"
            inside = _inside(rows, span)
            if not inside:
                return block
            taken.append((dim, rows, inside, span))
            first = inside.start - span.start
            index[dim] = first if isinstance(items[dim], int) else slice(first, inside.stop - span.start, rows.step)
        written = given[0] if written_by_operand else value
        if isinstance(value, Value):
            for dim, rows, inside, span in taken:
                at = value.position(x.dims[dim].tag or "")
                held = windows_of[value][at].span(span.start, span.stop, len(rows))
                written = written.narrow(at, (inside.start - rows.start) // rows.step - held.lo, len(inside))
        result = block.clone()
        result[tuple(index)] = written
        return result

    along: dict[int, Window] = dict.fromkeys(parts, IDENTITY)
    return Local(tuple(operands), x.dims, run, along, windows_of, mutates=x)


def _inside(rows: range, span: Span) -> range:
    """The rows of a range that a block holds."""
    first = max(0, -((rows.start - span.start) // rows.step))
    last = max(first, min(len(rows), (span.stop - 1 - rows.start) // rows.step + 1))
    return rows[first:last]


def _register_overwrite(name: str) -> None:
    """Register a tensor method that overwrites every element, whatever it was."""

    @register(name)
    def rule(input: Any, *args: Any, **kwargs: Any) -> Answer:
        return pointwise(
            lambda old, *new, **further: getattr(old.clone(), name)(*new, **further),
            input,
            *args,
            mutates=True,
            **kwargs,
        )


for _name in ("copy_", "fill_", "zero_"):
    _register_overwrite(_name)
