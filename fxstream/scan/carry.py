"""Carries: put a block together with what earlier tiles kept, hand it to its readers, keep what later tiles need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..geometry.schedule import Index, Layout

Blocks = tuple["torch.Tensor | None", ...]


def index_of(rows: Index, dims: Sequence[int], rank: int) -> tuple[slice, ...]:
    """An index into a tensor from slices of the streamed axes, which are its dimensions `dims`."""
    index = [slice(None)] * rank
    for dim, wanted in zip(dims, rows, strict=True):
        index[dim] = wanted
    return tuple(index)


def empty_like(block: torch.Tensor, sizes: Mapping[int, int]) -> torch.Tensor:
    """An uninitialised tensor with other sizes along some dimensions, which are in the same order in memory."""
    shape = [sizes.get(dim, size) for dim, size in enumerate(block.shape)]
    order = list(range(block.dim()))
    if 0 not in block.stride():  # not expanded
        order.sort(key=block.stride, reverse=True)
    return torch.empty_permuted(shape, order, dtype=block.dtype, device=block.device)


class Placement:
    """A layout, whose slices speak of streamed axes, in terms of a value's own dimensions."""

    def __init__(self, layout: Layout, dims: Sequence[int], rank: int):
        whole = tuple(slice(0, extent) for extent in layout.extent)
        self.layout = layout  # kept alive: a scan finds the placement by the layout's identity
        self.extent = dict(zip(dims, layout.extent, strict=True))
        self.own = None if layout.own is None else index_of(layout.own, dims, rank)
        self.parts = [
            (part.offset, part.piece, index_of(part.src, dims, rank), index_of(part.dst, dims, rank))
            for part in layout.parts
        ]
        self.reads = [None if read is None else index_of(read, dims, rank) for read in layout.reads]
        self.keeps = [(piece, index_of(kept, dims, rank)) for piece, kept in layout.keeps]
        self.idle = not self.keeps and all(read is None for read in self.reads)
        """Nothing is read and nothing kept."""
        self.passes = layout.own == whole and not self.keeps and all(read in (None, whole) for read in layout.reads)
        """Nothing is carried in or out, and every reader takes the whole block."""


def _region(place: Placement, block: torch.Tensor | None, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The fresh block behind the rows carried into the tile."""
    if block is not None and not parts:
        return block
    region = empty_like(parts[0] if block is None else block, place.extent)
    for part, (_, _, _, dst) in zip(parts, place.parts, strict=True):
        region[dst] = part
    if block is not None:
        region[place.own] = block
    return region


def stitch(place: Placement, block: torch.Tensor | None, *parts: torch.Tensor) -> Blocks:
    """What each reader gets, then what is kept (views of the block), as plain tensors."""
    region = None if all(read is None for read in place.reads) else _region(place, block, parts)
    reads = tuple(None if read is None or region is None else region[read] for read in place.reads)
    keeps = tuple(block[kept] for _, kept in place.keeps) if block is not None else ()
    return reads + keeps


class Stitch(torch.autograd.Function):
    """`stitch` with its gradient: the reads' gradients are added up in the region, once, and cut apart again."""

    @staticmethod
    def forward(ctx: Any, place: Placement, block: torch.Tensor | None, *parts: torch.Tensor) -> Blocks:
        ctx.place = place
        ctx.has_block = block is not None
        ctx.shape = (parts[0] if block is None else block).shape
        ctx.set_materialize_grads(False)
        return stitch(place, block, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        place: Placement = ctx.place
        reads, keeps = grads[: len(place.reads)], grads[len(place.reads) :]
        given = [(g, i) for g, i in zip(reads, place.reads, strict=True) if g is not None]
        region, owned = Stitch._gradient(ctx, given)
        parts = [None if region is None else region[dst] for _, _, _, dst in place.parts]
        if not ctx.has_block:
            return (None, None, *parts)
        block = None if region is None or place.own is None else region[place.own]
        kept = [(g, i) for g, (_, i) in zip(keeps, place.keeps, strict=True) if g is not None]
        if kept:
            if block is None:
                block = empty_like(kept[0][0], dict(enumerate(ctx.shape))).zero_()
            elif not owned:
                block = block.clone()
            for gradient, index in kept:
                block[index].add_(gradient)
        return (None, block, *parts)

    @staticmethod
    def _gradient(ctx: Any, reads: list[tuple[torch.Tensor, Any]]) -> tuple[torch.Tensor | None, bool]:
        """The gradient of the region, and whether it is ours to add to: that of a read may be other nodes', too."""
        place: Placement = ctx.place
        if not reads:
            return None, True
        shape = [place.extent.get(dim, size) for dim, size in enumerate(ctx.shape)]
        whole = next((read for read in reads if list(read[0].shape) == shape), None)
        if whole is None:
            total = empty_like(reads[0][0], place.extent).zero_()
        elif len(reads) == 1:
            return whole[0], False
        else:
            total = whole[0].clone()
        for read in reads:
            if read is not whole:
                gradient, index = read
                total[index].add_(gradient)
        return total, True
