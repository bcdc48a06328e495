"""Reductions over whole streamed axes: their totals are accumulated block by block.

A reduction ends the streamed part, since its result is known only when all tiles are done. Its operand is never
assembled: the scan keeps running totals of the blocks, and the backward scan asks for the gradient of each block.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

Totals = tuple[torch.Tensor, ...]
"""The tensors that a reduction accumulates, such as the maximum and its position.

Each has the dimensions of the operand, with size 1 along the reduced ones, and is updated in place. Along other
streamed axes, the methods of a `Reduction` get the part of the totals that belongs to the block.
"""

WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""The dtype in which sums of half precision are accumulated; sums of any other dtype are accumulated in that dtype."""


class Place(NamedTuple):
    """The location of a block in the operand of a reduction, in positions (rows, pixels) of the operand."""

    starts: tuple[int, ...]
    """For each dimension, the first position of the block."""
    sizes: tuple[int, ...]
    """For each dimension, the size of the whole operand."""


@dataclass(frozen=True)
class Reduction(ABC):
    """A reduction over whole dimensions, at least one of them streamed, accumulated block by block.

    The scan calls `empty` for the first block of a call, `add` for every block, and `result` at the end. The backward
    scan calls `gradient` for every block, and then `complete`. A block has the number of dimensions of the operand; its
    dtype is that of the operand.
    """

    over: tuple[int, ...]
    """The reduced dimensions of the operand, counted from 0, in ascending order."""

    @abstractmethod
    def empty(self, block: torch.Tensor, shape: Sequence[int]) -> Totals:
        """The totals before any block is added; `shape` is the shape of each, `block` gives dtype and device."""

    @abstractmethod
    def add(self, totals: Totals, block: torch.Tensor, place: Place) -> None:
        """Update the totals in place by a block."""

    def dtype(self, block: torch.Tensor) -> torch.dtype:
        """The dtype of the result, given a block of the operand."""
        return block.dtype

    def result(self, totals: Totals, sizes: Sequence[int]) -> torch.Tensor:
        """The result once all blocks of an operand of these sizes are added; the scan casts it to `dtype`.

        The reduced dimensions stay, with size 1.
        """
        return totals[0]

    @abstractmethod
    def gradient(self, totals: Totals, block: torch.Tensor, place: Place, given: torch.Tensor) -> torch.Tensor:
        """The gradient of a block, with the block's shape, from `given`, the gradient of the result.

        `given` has the reduced dimensions, with size 1.
        """

    def complete(self, totals: Totals) -> bool:
        """Whether the blocks of the backward pass agreed with those of the forward pass, once `gradient` had them all.

        False if recomputed blocks differ from the blocks that were added: their gradients may then be wrong.
        """
        return True


@dataclass(frozen=True)
class Sum(Reduction):
    """A sum or a mean. Half precision is accumulated in float32."""

    function: Callable[[torch.Tensor], torch.Tensor]
    """The dense operation. It is called on one element, to learn the dtype of the result."""
    mean: bool
    """Whether the result is divided by the number of reduced positions."""

    def empty(self, block: torch.Tensor, shape: Sequence[int]) -> Totals:
        dtype = self.dtype(block)
        return (block.new_zeros(shape, dtype=WIDE.get(dtype, dtype)),)

    def add(self, totals: Totals, block: torch.Tensor, place: Place) -> None:
        (total,) = totals
        total += block.sum(self.over, keepdim=True, dtype=total.dtype)

    def result(self, totals: Totals, sizes: Sequence[int]) -> torch.Tensor:
        (total,) = totals
        return total / self._count(sizes) if self.mean else total

    def gradient(self, totals: Totals, block: torch.Tensor, place: Place, given: torch.Tensor) -> torch.Tensor:
        each = given / self._count(place.sizes) if self.mean else given
        return each.to(block.dtype).expand(block.shape)

    def dtype(self, block: torch.Tensor) -> torch.dtype:
        return self.function(block[(slice(0, 1),) * block.dim()]).dtype

    def _count(self, sizes: Sequence[int]) -> int:
        """The number of reduced positions."""
        return math.prod(sizes[dim] for dim in self.over)


_MAX_POOL: dict[int, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    1: F.adaptive_max_pool1d_with_indices,
    2: F.adaptive_max_pool2d_with_indices,
    3: F.adaptive_max_pool3d_with_indices,
}


@dataclass(frozen=True)
class First(Reduction):
    """The maximum, whose gradient goes to one position, as in torch's adaptive max pooling.

    It is the first position of the maximum in raster order. If there are NaN, it is the last position of a NaN.
    """

    def empty(self, block: torch.Tensor, shape: Sequence[int]) -> Totals:
        value = block.new_full(shape, -math.inf)
        return value, value.new_full(shape, torch.iinfo(torch.int64).max, dtype=torch.int64)

    def add(self, totals: Totals, block: torch.Tensor, place: Place) -> None:
        best, position = totals
        value, local = _MAX_POOL[len(self.over)](block, 1)
        here = _in_operand(local, self.over, block, place)
        among_nan = value.isnan() & (~best.isnan() | (here > position))
        among_numbers = (value > best) | ((value == best) & (here < position))
        better = among_nan | among_numbers
        best.copy_(torch.where(better, value, best))
        position.copy_(torch.where(better, here, position))

    def gradient(self, totals: Totals, block: torch.Tensor, place: Place, given: torch.Tensor) -> torch.Tensor:
        _, position = totals
        return torch.where(_positions(self.over, block, place) == position, given, 0)


@dataclass(frozen=True)
class Extreme(Reduction):
    """`torch.amax` or `torch.amin`, whose gradient is shared equally by all positions that hold the extreme value.

    In the backward pass, a single such position is recognised by its position in the operand, since its recomputed
    value may differ in the last bit. Several positions, such as the zeros after a ReLU, are recognised by their value,
    and `complete` checks that their number is the same as in the forward pass.
    """

    largest: bool
    """True for `amax`, False for `amin`."""

    def empty(self, block: torch.Tensor, shape: Sequence[int]) -> Totals:
        best = block.new_full(shape, _neutral(block.dtype, self.largest))
        position, count, met = (best.new_zeros(shape, dtype=torch.int64) for _ in range(3))
        return best, position, count, met

    def add(self, totals: Totals, block: torch.Tensor, place: Place) -> None:
        best, position, count, _ = totals
        last = range(-len(self.over), 0)
        rows = block.movedim(self.over, tuple(last)).flatten(-len(self.over))
        value, local = rows.max(-1, keepdim=True) if self.largest else rows.min(-1, keepdim=True)
        tied = (rows == value).sum(-1)
        value, local, tied = (found.reshape(best.shape) for found in (value, local, tied))
        joined = torch.maximum(best, value) if self.largest else torch.minimum(best, value)
        here = _in_operand(local, self.over, block, place)
        position.copy_(torch.where(value == joined, here, position))
        count.copy_(torch.where(best == joined, count, 0) + torch.where(value == joined, tied, 0))
        best.copy_(joined)

    def gradient(self, totals: Totals, block: torch.Tensor, place: Place, given: torch.Tensor) -> torch.Tensor:
        best, position, count, met = totals
        chosen = torch.where(count == 1, _positions(self.over, block, place) == position, block == best)
        met += chosen.sum(self.over, keepdim=True)
        # If the extreme value is NaN, no position equals it: 0 / 0 is NaN, which is torch's gradient, too.
        return given * chosen / count

    def complete(self, totals: Totals) -> bool:
        _, _, count, met = totals
        return count.is_meta or torch.equal(count, met)


def _neutral(dtype: torch.dtype, largest: bool) -> float | int | bool:
    """The value that changes no maximum (if `largest`) or no minimum of values of a dtype."""
    if dtype.is_floating_point:
        return -math.inf if largest else math.inf
    if dtype == torch.bool:
        return not largest
    return torch.iinfo(dtype).min if largest else torch.iinfo(dtype).max


def _in_operand(local: torch.Tensor, over: Sequence[int], block: torch.Tensor, place: Place) -> torch.Tensor:
    """Positions numbered in the raster order of the whole operand, from positions numbered in that of the block."""
    position, stride = torch.zeros_like(local), 1
    for dim in reversed(over):
        position += (local % block.shape[dim] + place.starts[dim]) * stride
        local = local // block.shape[dim]
        stride *= place.sizes[dim]
    return position


def _positions(over: Sequence[int], block: torch.Tensor, place: Place) -> torch.Tensor:
    """The number of each position of a block in the raster order of the whole operand, in a shape that broadcasts."""
    local = torch.arange(math.prod(block.shape[dim] for dim in over), device=block.device)
    shape = [size if dim in over else 1 for dim, size in enumerate(block.shape)]
    return _in_operand(local, over, block, place).view(shape)
