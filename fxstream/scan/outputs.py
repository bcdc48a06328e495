"""What the scan returns: whole values, put together block by block, and totals of reductions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from ..ops import Place, Total, Totals
from .records import empty_like

Rows = tuple[slice, ...]
"""A block's place in the whole value."""


class Output(ABC):
    """One output of a scan, made of the blocks of one value."""

    def __init__(self, value: int, sizes: Mapping[int, int]):
        """`value` is its number in the program; `sizes` are those of the whole value along its streamed dimensions."""
        self.value = value
        self.sizes = sizes

    @abstractmethod
    def add(self, rows: Rows, block: torch.Tensor) -> None:
        """Take in the block of a tile."""

    @abstractmethod
    def result(self) -> torch.Tensor:
        """The output, once all blocks are in."""

    @abstractmethod
    def gradient(self, rows: Rows, block: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """The gradient of a block from the gradient of the output; `block` is the block, computed once more."""

    @property
    def state(self) -> Totals:
        """The tensors that `gradient` needs besides those."""
        return ()

    def restore(self, state: Totals) -> None:
        """Take over the state that the forward scan has left."""
        assert not state, "an output without totals has no state"

    def complete(self) -> bool:
        """Whether every position has got its share, after `gradient` has been asked for all blocks."""
        return True


class Whole(Output):
    """The value itself."""

    def __init__(self, value: int, sizes: Mapping[int, int]):
        super().__init__(value, sizes)
        self._whole: torch.Tensor | None = None

    def add(self, rows: Rows, block: torch.Tensor) -> None:
        if self._whole is None:
            self._whole = empty_like(block, self.sizes)
        self._whole[rows] = block

    def result(self) -> torch.Tensor:
        assert self._whole is not None, "there is a tile"
        return self._whole

    def gradient(self, rows: Rows, block: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return given[rows]


class Accumulated(Output):
    """The total of a reduction."""

    def __init__(self, value: int, sizes: Mapping[int, int], total: Total):
        super().__init__(value, sizes)
        self._reduction, self._keepdim = total.reduction, total.keepdim
        self._over = total.reduction.over
        self._totals: Totals = ()
        self._whole_sizes: Sequence[int] = ()
        self._dtype: torch.dtype | None = None

    def add(self, rows: Rows, block: torch.Tensor) -> None:
        place = self._place(rows, block)
        if not self._totals:
            shape = [1 if dim in self._over else size for dim, size in enumerate(place.sizes)]
            self._totals = self._reduction.empty(block, shape)
            self._whole_sizes, self._dtype = place.sizes, self._reduction.dtype(block)
        self._reduction.add(self._part(rows), block, place)

    def result(self) -> torch.Tensor:
        result = self._reduction.result(self._totals, self._whole_sizes)
        # A copy, so that whoever overwrites it does not change a total.
        return (result if self._keepdim else result.squeeze(self._over)).to(self._dtype, copy=True)

    def gradient(self, rows: Rows, block: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        for dim in () if self._keepdim else self._over:
            given = given.unsqueeze(dim)
        place = self._place(rows, block)
        return self._reduction.gradient(self._part(rows), block, place, given[self._kept(rows)])

    @property
    def state(self) -> Totals:
        return self._totals

    def restore(self, state: Totals) -> None:
        # Copies: there may be another backward pass.
        self._totals = tuple(total.clone() for total in state)

    def complete(self) -> bool:
        return self._reduction.complete(self._totals)

    def _place(self, rows: Rows, block: torch.Tensor) -> Place:
        sizes = (self.sizes.get(dim, size) for dim, size in enumerate(block.shape))
        return Place(tuple(kept.start or 0 for kept in rows), tuple(sizes))

    def _part(self, rows: Rows) -> Totals:
        """The totals to which a block belongs: all, but along a streamed axis that stays."""
        kept = self._kept(rows)
        return tuple(total[kept] for total in self._totals)

    def _kept(self, rows: Rows) -> Rows:
        return tuple(slice(None) if dim in self._over else kept for dim, kept in enumerate(rows))
