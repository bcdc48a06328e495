"""Regions: a value's fresh block behind the rows that earlier tiles have kept, as its readers take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..geometry.grid import Grid, Index, Kept, Layout, Tile
from .records import Record, Records, empty_like, strides_like

Shape = tuple[int, ...]


def index_of(rows: Index, dims: Sequence[int], rank: int) -> tuple[slice, ...]:
    """An index into a tensor from slices of the streamed axes, which are its dimensions `dims`."""
    index = [slice(None)] * rank
    for dim, wanted in zip(dims, rows, strict=True):
        index[dim] = wanted
    return tuple(index)


class Rows:
    """The same rows of many tensors of one shape: a view of each, by one call."""

    __slots__ = ("_firsts", "_seen", "shape")

    def __init__(self, rows: Index, dims: Sequence[int], shape: Sequence[int]):
        """`rows` of the streamed axes, which are the dimensions `dims` of tensors of this `shape`."""
        counts = {dim: kept.stop - kept.start for dim, kept in zip(dims, rows, strict=True)}
        self.shape = tuple(counts.get(dim, size) for dim, size in enumerate(shape))
        self._firsts = [(dim, kept.start) for dim, kept in zip(dims, rows, strict=True)]
        self._seen: tuple[Any, int] = (None, 0)
        """The strides that were seen last, and the place of the first row in memory."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These rows of a tensor."""
        stride = tensor.stride()
        seen, first = self._seen
        if stride != seen:
            first = self.first(stride)
            self._seen = (stride, first)
        return tensor.as_strided(self.shape, stride, tensor.storage_offset() + first)

    def first(self, stride: Shape) -> int:
        """The place of the first row in the memory of a tensor with these strides."""
        return sum(start * stride[dim] for dim, start in self._firsts)


class RecordRows:
    """Rows of a record, and where in the region or in the fresh block they belong."""

    __slots__ = ("_behind", "_rows", "_seen", "ago", "axis", "place", "shape", "value")

    def __init__(self, kept: Kept, value: int, grid: Grid, dims: Sequence[int], shape: Sequence[int]):
        """`shape` is that of the region or of the block."""
        self.axis, self.ago, self.value = kept.axis, kept.ago, value
        self._rows = Rows(kept.rows, dims, shape)
        self.shape = self._rows.shape
        self.place = Rows(kept.place, dims, shape)
        behind = range(kept.axis + 1, len(dims))
        self._behind = [(axis, dims[axis], grid.axes[axis].tail[value]) for axis in behind]
        """The axes along which the record is whole, their dimensions, and the region's first row at every step."""
        self._seen: tuple[Any, int, list[tuple[int, list[int]]]] = (None, 0, [])
        """The strides of a record that were seen last; the place of the first row in its memory, and how far a step of
        each axis behind moves it."""

    def record(self, records: Records, tile: Tile) -> Record | None:
        """The record; None if nobody has written to it yet."""
        return records.live[self.axis][tile[self.axis] - self.ago][self.value]

    def read(self, records: Records, tile: Tile) -> Record:
        """The record that a tile reads, to which an earlier one has written."""
        return records.live[self.axis][tile[self.axis] - self.ago][self.value]  # type: ignore[return-value]  # so it is there

    def of(self, tensor: torch.Tensor, tile: Tile) -> torch.Tensor:
        """The rows of a record, or of its gradient, that belong to a tile."""
        if not self._behind and tensor.shape == self.shape:
            return tensor
        stride = tensor.stride()
        seen, first, moves = self._seen
        if stride != seen:
            first = self._rows.first(stride)
            moves = [(axis, [row * stride[dim] for row in origins]) for axis, dim, origins in self._behind]
            self._seen = (stride, first, moves)
        for axis, places in moves:
            first += places[tile[axis]]
        return tensor.as_strided(self.shape, stride, tensor.storage_offset() + first)


class Region:
    """The region of a value in tiles that treat it alike: how it is put together, what is read and kept of it."""

    def __init__(
        self, value: int, layout: Layout, reads: Sequence[Index], grid: Grid, tile: Tile, whole: Shape, dims: Shape
    ):
        """`reads` are those rows of the region that anybody takes and that are not just the fresh block.

        `whole` is the shape of the whole value, whose streamed axes are its dimensions `dims`; `tile` is one of these.
        """
        self.value = value
        extent = tuple(slice(0, rows) for rows in layout.extent)
        self.shape = Rows(extent, dims, whole).shape
        self.own = None if layout.own is None else Rows(layout.own, dims, self.shape)
        self.parts = [RecordRows(part, value, grid, dims, self.shape) for part in layout.parts]
        self.reads = [None if read == extent else Rows(read, dims, self.shape) for read in reads]
        """None for the region itself."""
        self.block_shape = None if self.own is None else self.own.shape
        self.keeps = [RecordRows(keep, value, grid, dims, self.block_shape or ()) for keep in layout.keeps]
        self.begins = [dict(zip(dims, grid.record(value, tile, keep.axis), strict=True)) for keep in layout.keeps]
        """For each of `keeps`, the rows of the whole record."""
        self._seen: tuple[Any, Shape] = (None, ())
        """The strides of a block that were seen last, and those of the region for it."""
        self._placed: tuple[Any, list[tuple[Shape, int]]] = (None, [])
        """The strides of a region that were seen last, and the places of its parts."""
        self._like: torch.Tensor | None = None
        """An empty tensor with the dtype and device of a block."""

    def opened(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """An uninitialised region as the last one was, and the place of the block in it; None if there was none."""
        if self._like is None or self.own is None:
            return None
        whole = self._like.new_empty_strided(self.shape, self._seen[1])
        return whole, self.own.of(whole)

    def taken(
        self,
        block: torch.Tensor | None,
        records: Records,
        tile: Tile,
        whole: torch.Tensor | None = None,
        recorded: bool = False,
    ) -> list[torch.Tensor]:
        """What each of `reads` takes of the region, or of the `whole` in which the block has been computed.

        `recorded` says whether there will be a graph of what is computed with it.
        """
        if not self.reads:
            return []
        region = self._assembled(block, records, tile, whole, recorded)
        return [region if read is None else read.of(region) for read in self.reads]

    def _assembled(
        self, block: torch.Tensor | None, records: Records, tile: Tile, whole: torch.Tensor | None, recorded: bool
    ) -> torch.Tensor:
        if block is not None and not self.parts:
            return block
        parts = [part.of(part.read(records, tile).rows, tile) for part in self.parts]
        if block is None and len(parts) == 1:
            # A graph must not hold a part of a record to which other tiles still write.
            return parts[0].clone() if recorded and records.growing else parts[0]
        if whole is None:
            like = parts[0] if block is None else block
            whole = like.new_empty_strided(self.shape, self._strides(like.stride()))
            if block is not None:
                parts.append(block)
                self._like = block.new_empty(0) if self._like is None else self._like
        strides = whole.stride()
        for rows, (shape, first) in zip(parts, self._places(strides), strict=False):
            whole.as_strided(shape, strides, first).copy_(rows)
        return whole

    def _strides(self, stride: Shape) -> Shape:
        """The strides of the region for a block with these."""
        seen, strides = self._seen
        if stride != seen:
            strides = strides_like(stride, self.shape)
            self._seen = (stride, strides)
        return strides

    def _places(self, strides: Shape) -> list[tuple[Shape, int]]:
        """For each part of a region with these strides, the block last, its shape and the place of its first row."""
        seen, places = self._placed
        if strides != seen:
            rows = [part.place for part in self.parts] + ([] if self.own is None else [self.own])
            places = [(one.shape, one.first(strides)) for one in rows]
            self._placed = (strides, places)
        return places

    def keep(self, block: torch.Tensor, records: Records, tile: Tile) -> None:
        """Write to the records what later tiles need of a block."""
        for keep, sizes in zip(self.keeps, self.begins, strict=True):
            record = keep.record(records, tile)
            if record is None:
                record = records.begin(self.value, keep.axis, tile[keep.axis], block, sizes)
            keep.of(record.rows, tile).copy_(keep.place.of(block))

    def gradient(self, reads: Sequence[torch.Tensor | None], records: Records, tile: Tile) -> torch.Tensor | None:
        """The gradient of the fresh block, from those of what is read and from what is owed to the records.

        It adds the gradients of carried rows to what is owed to their records.
        """
        total, ours = self._total(reads)
        block = total
        if total is not None and self.parts:
            for part in self.parts:
                part.of(part.read(records, tile).owing(), tile).add_(part.place.of(total))
            block = None if self.own is None else self.own.of(total)
        for keep in self.keeps:
            owed = keep.read(records, tile).owed
            if owed is None:
                continue
            if block is None:
                assert self.block_shape is not None, "only a fresh block is kept"
                block = empty_like(owed, dict(enumerate(self.block_shape))).zero_()
            elif not ours:
                block = block.clone()
            ours = True
            keep.place.of(block).add_(keep.of(owed, tile))
        return block

    def _total(self, reads: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, bool]:
        """The gradient of the region, and whether we may modify it in place.

        We may not if it is the gradient of a read, which autograd may have given to other nodes, too.
        """
        given = [(gradient, read) for gradient, read in zip(reads, self.reads, strict=True) if gradient is not None]
        if not given:
            return None, True
        whole = next((gradient for gradient, read in given if read is None), None)
        if whole is not None and len(given) == 1:
            return whole, False
        total = empty_like(given[0][0], dict(enumerate(self.shape))).zero_() if whole is None else whole.clone()
        for gradient, read in given:
            if read is not None:
                read.of(total).add_(gradient)
        return total, True


class Tape:
    """Where the joins of a recorded tile find their records: in the backward pass, those of the backward scan."""

    def __init__(self, records: Records, tile: Tile):
        self.records, self.tile = records, tile


class Stitch(torch.autograd.Function):
    """What is read of a region, for autograd.

    In the backward pass it adds to what is owed to the records that it has read, and takes what is owed to those that
    the tile has written to. So carried rows are no leaves of the tile's graph, and kept rows no roots.
    """

    @staticmethod
    def forward(ctx: Any, region: Region, tape: Tape, end: torch.Tensor, block: torch.Tensor | None) -> Any:
        """`end` is what an earlier join has returned last, so that this one is differentiated even without a block."""
        ctx.region, ctx.tape = region, tape
        ctx.set_materialize_grads(False)
        return (*region.taken(block, tape.records, tape.tile, recorded=True), end.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        tape: Tape = ctx.tape
        return None, None, None, ctx.region.gradient(grads[:-1], tape.records, tape.tile)
