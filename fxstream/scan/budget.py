"""The memory budget: which tiles keep the graph that autograd has made of them, and are not computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .execution import Recorded


class Budget:
    """Decides which tiles stay recorded: the first ones, as long as their graphs hold at most `limit` bytes in all."""

    def __init__(self, limit: int, alive: Sequence[torch.Tensor]):
        """`alive` are tensors whose memory is held in any case."""
        self.limit = limit
        self.left = limit > 0
        """Whether another tile may fit."""
        self._alive = {tensor.untyped_storage().data_ptr() for tensor in alive if self.left}
        self._held: dict[int, int] = {}
        """Address of a storage -> its bytes."""

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what autograd saves inside this context."""
        # Detached, since a graph that saved its own result as it is would hold itself.
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: self._count(saved.detach()), lambda saved: saved):
            yield

    def affords(self, recorded: Recorded) -> bool:
        """Whether a tile that was recorded while `counting` is within the budget."""
        for result in (block for _, _, block in recorded.blocks):
            self._count(result)
        self.left = sum(self._held.values()) <= self.limit
        return self.left

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._alive:
            self._held[storage.data_ptr()] = storage.nbytes()
        return tensor
