"""Carries: join a block with the rows that earlier tiles kept, hand it to its readers, keep what later tiles need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..geometry.grid import Index, Layout

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


class TensorLayout:
    """The layout of a value's region as indices into tensors: the slices of streamed axes at the value's dimensions."""

    def __init__(self, layout: Layout, dims: Sequence[int], rank: int):
        whole = tuple(slice(0, extent) for extent in layout.extent)
        self.layout = layout  # kept alive, since a scan finds this object by the layout's identity
        self.extent = dict(zip(dims, layout.extent, strict=True))
        self.own = None if layout.own is None else index_of(layout.own, dims, rank)
        self.parts = [
            (part.offset, part.axis, index_of(part.src, dims, rank), index_of(part.dst, dims, rank))
            for part in layout.parts
        ]
        self.reads = [None if read is None else index_of(read, dims, rank) for read in layout.reads]
        self.keeps = [(axis, index_of(kept, dims, rank)) for axis, kept in layout.keeps]
        self.idle = not self.keeps and all(read is None for read in self.reads)
        """Nothing is read and nothing kept."""
        self.is_block = layout.own == whole and not self.keeps and all(read in (None, whole) for read in layout.reads)
        """The region is the fresh block, which every reader takes whole; nothing is carried in or out."""


def _region(layout: TensorLayout, block: torch.Tensor | None, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The fresh block behind the rows carried into the tile."""
    if block is not None and not parts:
        return block
    region = empty_like(parts[0] if block is None else block, layout.extent)
    for part, (_, _, _, dst) in zip(parts, layout.parts, strict=True):
        region[dst] = part
    if block is not None:
        region[layout.own] = block
    return region


def stitch(layout: TensorLayout, block: torch.Tensor | None, *parts: torch.Tensor) -> Blocks:
    """What each reader gets, then what is kept (views of the block), as plain tensors.

    `block` is the fresh block, if the tile computes one; `parts` are the rows that earlier tiles kept.
    """
    region = None if all(read is None for read in layout.reads) else _region(layout, block, parts)
    reads = tuple(None if read is None or region is None else region[read] for read in layout.reads)
    keeps = tuple(block[kept] for _, kept in layout.keeps) if block is not None else ()
    return reads + keeps


class Stitch(torch.autograd.Function):
    """`stitch` for autograd: the gradients of all reads are added up in the region, which is then cut apart again."""

    @staticmethod
    def forward(ctx: Any, layout: TensorLayout, block: torch.Tensor | None, *parts: torch.Tensor) -> Blocks:
        ctx.layout = layout
        ctx.has_block = block is not None
        ctx.shape = (parts[0] if block is None else block).shape
        ctx.set_materialize_grads(False)
        return stitch(layout, block, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        layout: TensorLayout = ctx.layout
        reads, keeps = grads[: len(layout.reads)], grads[len(layout.reads) :]
        given = [(g, i) for g, i in zip(reads, layout.reads, strict=True) if g is not None]
        region, owned = Stitch._gradient(ctx, given)
        parts = [None if region is None else region[dst] for _, _, _, dst in layout.parts]
        if not ctx.has_block:
            return (None, None, *parts)
        block = None if region is None or layout.own is None else region[layout.own]
        kept = [(g, i) for g, (_, i) in zip(keeps, layout.keeps, strict=True) if g is not None]
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
        """The gradient of the region, and whether we may modify it in place.

        We may not if it is the gradient of a read, which autograd may have given to other nodes, too.
        """
        layout: TensorLayout = ctx.layout
        if not reads:
            return None, True
        shape = [layout.extent.get(dim, size) for dim, size in enumerate(ctx.shape)]
        whole = next((read for read in reads if list(read[0].shape) == shape), None)
        if whole is None:
            total = empty_like(reads[0][0], layout.extent).zero_()
        elif len(reads) == 1:
            return whole[0], False
        else:
            total = whole[0].clone()
        for read in reads:
            if read is not whole:
                gradient, index = read
                total[index].add_(gradient)
        return total, True
