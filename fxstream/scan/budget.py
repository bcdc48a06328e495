"""The memory budget: what the forward scan may hold so that less is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch

from .call import Call
from .execution import Recorded
from .keeping import Results, results_nbytes, storage_key


class Budget:
    """Decides what the tiles of a call keep: results of dear kernels, then the graphs that autograd makes of tiles.

    `Call.keep` says of which values the results are kept. If that leaves part of the budget, the first tiles stay
    recorded instead, as long as there is room for their graphs beside the results of all others.
    """

    def __init__(self, call: Call, alive: Sequence[torch.Tensor]):
        """`alive` are tensors whose memory is held in any case."""
        self.graphs = call.keep.complete and call.budget > call.keep.nbytes
        """Whether the graph of another tile may fit."""
        self._limit = call.budget
        self._expected = call.keep.nbytes
        """The bytes of the results of tiles that have not been computed yet."""
        self._results = 0
        """The bytes of results that are held."""
        self._recorded = 0
        """The bytes of graphs that are held."""
        self._alive = {storage_key(tensor.untyped_storage()) for tensor in alive if self.graphs}
        self._held: dict[int, int] = {}
        """Storage of a graph -> its bytes."""

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what autograd saves inside this context."""
        # Detached, since a graph that saved its own result as it is would hold itself.
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: self._count(saved.detach()), lambda saved: saved):
            yield

    def affords(self, recorded: Recorded, results: Results) -> bool:
        """Whether a tile that was recorded while `counting` fits, if its graph is held and not its `results`."""
        for _, _, block in recorded.blocks:
            self._count(block)
        graphs = sum(self._held.values())
        others = max(0, self._expected - _nbytes(results))
        self.graphs = graphs + self._results + others <= self._limit
        if self.graphs:
            self._recorded, self._expected = graphs, others
        return self.graphs

    def afforded(self, results: Results) -> Results:
        """As many of the results of a tile as fit; these are counted as held."""
        self._expected -= _nbytes(results)
        found: Results = {}
        for value, kept in results.items():
            nbytes = results_nbytes(kept)
            if self._recorded + self._results + nbytes <= self._limit:
                self._results += nbytes
                found[value] = kept
        return found

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage_key(storage) not in self._alive:
            self._held[storage_key(storage)] = storage.nbytes()
        return tensor


def _nbytes(results: Results) -> int:
    return results_nbytes(chain.from_iterable(results.values()))
