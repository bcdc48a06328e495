"""Reductions over whole streamed axes: how their totals are accumulated block by block, and what a block's gradient is.

What reads such a result does not stream, so a reduction ends the streamed part; but nobody has to put its operand
together. Totals have the operand's dimensions, of size 1 along those that are reduced, and are updated in place.
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

WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""What many small terms are summed in; other types in themselves."""


class Place(NamedTuple):
    """Where a block lies in the operand."""

    starts: tuple[int, ...]
    """Per dimension, the block's first position."""
    sizes: tuple[int, ...]
    """Per dimension, the size of the whole operand."""


@dataclass(frozen=True)
class Reduction(ABC):
    """A reduction over the dimensions `over`, which are in order."""

    over: tuple[int, ...]

    @abstractmethod
    def empty(self, block: torch.Tensor, shape: Sequence[int]) -> Totals:
        """The totals, of that shape, before the first block."""

    @abstractmethod
    def add(self, totals: Totals, block: torch.Tensor, place: Place) -> None:
        """Add a block."""

    def dtype(self, block: torch.Tensor) -> torch.dtype:
        """Of the result."""
        return block.dtype

    def result(self, totals: Totals, sizes: Sequence[int]) -> torch.Tensor:
        """The result, but for its dtype, when all blocks of an operand of these sizes are added."""
        return totals[0]

    @abstractmethod
    def gradient(self, totals: Totals, block: torch.Tensor, place: Place, given: torch.Tensor) -> torch.Tensor:
        """The gradient of a block from that of the result."""

    def complete(self, totals: Totals) -> bool:
        """Whether, when `gradient` has been asked for all blocks, each position has got its share."""
        return True


@dataclass(frozen=True)
class Sum(Reduction):
    """A sum or a mean."""

    function: Callable[[torch.Tensor], torch.Tensor]
    """The dense operation, which tells the result's dtype."""
    mean: bool

    def empty(self, block: torch.Tensor, shape: Sequence[int]) -> Totals:
        dtype = self.dtype(block)
        return (block.new_zeros(shape, dtype=WIDE.get(dtype, dtype)),)

    def add(self, totals: Totals, block: torch.Tensor, place: Place) -> None:
        (total,) = totals
        total += block.sum(self.over, keepdim=True, dtype=total.dtype)

    def result(self, totals: Totals, sizes: Sequence[int]) -> torch.Tensor:
        (total,) = totals
        return total / self._positions(sizes) if self.mean else total

    def gradient(self, totals: Totals, block: torch.Tensor, place: Place, given: torch.Tensor) -> torch.Tensor:
        each = given / self._positions(place.sizes) if self.mean else given
        return each.to(block.dtype).expand(block.shape)

    def dtype(self, block: torch.Tensor) -> torch.dtype:
        return self.function(block[(slice(0, 1),) * block.dim()]).dtype

    def _positions(self, sizes: Sequence[int]) -> int:
        return math.prod(sizes[dim] for dim in self.over)


_MAX_POOL: dict[int, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    1: F.adaptive_max_pool1d_with_indices,
    2: F.adaptive_max_pool2d_with_indices,
    3: F.adaptive_max_pool3d_with_indices,
}


@dataclass(frozen=True)
class First(Reduction):
    """The maximum, whose gradient goes to one position, as that of adaptive max pooling does.

    That is the first in raster order, but of several NaN the last.
    """

    def empty(self, block: torch.Tensor, shape: Sequence[int]) -> Totals:
        value = block.new_full(shape, -math.inf)
        return value, value.new_full(shape, torch.iinfo(torch.int64).max, dtype=torch.int64)

    def add(self, totals: Totals, block: torch.Tensor, place: Place) -> None:
        best, position = totals
        value, local = _MAX_POOL[len(self.over)](block, 1)
        here = _position(local, self.over, block, place)
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
    """`amax` or `amin`, whose gradient is shared by all positions that have the extreme value.

    One alone is known by its position: computed again, its value may differ in the last bit. Several, as ReLU leaves
    them, are known by their value, and counted.
    """

    largest: bool

    def empty(self, block: torch.Tensor, shape: Sequence[int]) -> Totals:
        best = block.new_full(shape, _worst(block.dtype, self.largest))
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
        here = _position(local, self.over, block, place)
        position.copy_(torch.where(value == joined, here, position))
        count.copy_(torch.where(best == joined, count, 0) + torch.where(value == joined, tied, 0))
        best.copy_(joined)

    def gradient(self, totals: Totals, block: torch.Tensor, place: Place, given: torch.Tensor) -> torch.Tensor:
        best, position, count, met = totals
        chosen = torch.where(count == 1, _positions(self.over, block, place) == position, block == best)
        met += chosen.sum(self.over, keepdim=True)
        # As torch has it, a NaN comes to 0 / 0.
        return given * chosen / count

    def complete(self, totals: Totals) -> bool:
        _, _, count, met = totals
        return count.is_meta or torch.equal(count, met)


def _worst(dtype: torch.dtype, largest: bool) -> float | int | bool:
    if dtype.is_floating_point:
        return -math.inf if largest else math.inf
    if dtype == torch.bool:
        return not largest
    return torch.iinfo(dtype).min if largest else torch.iinfo(dtype).max


def _position(local: torch.Tensor, over: Sequence[int], block: torch.Tensor, place: Place) -> torch.Tensor:
    """Positions numbered in raster order of the whole operand, from those in that of the block."""
    position, stride = torch.zeros_like(local), 1
    for dim in reversed(over):
        position += (local % block.shape[dim] + place.starts[dim]) * stride
        local = local // block.shape[dim]
        stride *= place.sizes[dim]
    return position


def _positions(over: Sequence[int], block: torch.Tensor, place: Place) -> torch.Tensor:
    """The number of each position of a block, in a shape that can be broadcast to it."""
    local = torch.arange(math.prod(block.shape[dim] for dim in over), device=block.device)
    shape = [size if dim in over else 1 for dim, size in enumerate(block.shape)]
    return _position(local, over, block, place).view(shape)
