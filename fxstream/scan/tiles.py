"""The scan over tiles: forward, and backward as the same scan in reverse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from ..errors import StreamingError
from ..geometry.axes import Extent, Multiple, Value
from ..geometry.grid import Tile
from ..graph.nodes import label
from ..ops import Noise, Total, Totals
from .budget import Budget
from .call import Call
from .execution import Execution, Recorded, RecordedAhead, Shared
from .fetch import Regions, fetch
from .keeping import NOTHING, Collector, Results, Returner
from .outputs import Accumulated, Output, Whole
from .plan import key_of, planned
from .program import Made, Slot
from .records import Key, Records
from .sums import IMAGE_SLOT, Sums, detached_leaves


class Forward(NamedTuple):
    """What the forward scan leaves."""

    outputs: tuple[torch.Tensor, ...]
    states: list[Totals]
    """For each output, what the gradients of its blocks need."""
    records: dict[Key, torch.Tensor]
    recorded: dict[Tile, Recorded]
    """The tiles that need not be computed again."""
    results: dict[Tile, Results]
    """For other tiles, the results of kernels that need not run again."""


class Scan:
    """The tiles of one call, computed with the call's tensors or with leaves that share their memory."""

    def __init__(self, call: Call, tensors: Sequence[torch.Tensor]):
        self.call, self.tensors = call, tensors
        self.program = call.program(tensors)
        self.plan = planned(self.program, call.tiles, len(tensors))
        self.grid = self.plan.grid
        self.outputs = [self._output(key) for key in self.plan.outputs]
        self.shared = Shared(call, self.plan, tensors, self.outputs)
        self.random = any(isinstance(operand, Noise) for step in self.program.steps for operand in step.operands)

    def _output(self, key: int | Total) -> Output:
        value = key if isinstance(key, int) else key.operand.index
        lengths = (axis.sizes[value] for axis in self.grid.axes)
        sizes = dict(zip(self.program.positions[value], lengths, strict=True))
        return Whole(value, sizes) if isinstance(key, int) else Accumulated(value, sizes, key)

    def filled(self, outputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """What the graph returns, with the output tensors in their places."""
        by_key = dict(zip(self.plan.outputs, outputs, strict=True))

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Slot):
                return self.tensors[leaf.slot]
            if isinstance(leaf, Made):
                return self.shared.made(leaf, None if leaf.like is None else self.shared.likes[leaf.like])
            if isinstance(leaf, (Extent, Multiple)):
                return int(leaf)
            return by_key[key_of(leaf)] if isinstance(leaf, (Value, Total)) else leaf

        return tuple(_as_size(tree_map(fill, returned)) for returned in self.program.returns)

    def differentiable(self, value: int, tensor: torch.Tensor) -> bool:
        """Whether a gradient for `tensor`, (part of) the value, is of any use."""
        numeric = tensor.is_floating_point() or tensor.is_complex()
        return numeric and self.shared.trained[value]

    def forward(self, keep: bool) -> Forward:
        """Compute the outputs; with `keep`, also what the backward scan needs."""
        records = Records(self.grid, self.call.device, self.tensors[IMAGE_SLOT].device, keep)
        recorded: dict[Tile, Recorded] = {}
        results: dict[Tile, Results] = {}
        call = self.call if keep else replace(self.call, keep=NOTHING)
        budget = Budget(call, self.tensors)
        recording = self._on_leaves() if budget.graphs else self.shared
        with torch.no_grad(), self.call.autocasting():
            for number, (tile, regions) in enumerate(self._fetched(self.grid.tiles())):
                collector = Collector(values) if (values := call.keep.of(number)) else None
                if budget.graphs:
                    with budget.counting():
                        done = RecordedAhead(recording, records, tile, regions, collector)
                    if budget.affords(done, collector.results() if collector else {}):
                        recorded[tile] = done
                    # Nothing of this tile may be alive while the next one is computed.
                    del done
                else:
                    Execution(self.shared, records, tile, regions, collector)
                if collector is not None and tile not in recorded:
                    results[tile] = budget.afforded(collector.results())
                records.leave(tile)
            records.settle()
            outputs = tuple(output.result() for output in self.outputs)
        return Forward(outputs, [output.state for output in self.outputs], records.held, recorded, results)

    def backward(
        self,
        states: Sequence[Totals],
        held: Mapping[Key, torch.Tensor],
        recorded: dict[Tile, Recorded],
        results: dict[Tile, Results],
        gradients: Sequence[torch.Tensor | None],
    ) -> list[torch.Tensor | None]:
        """Gradients of all tensors, from those of the outputs. The tensors must be detached leaves.

        `states`, `held`, `recorded` and `results` are what the forward scan has left; the last two are used up. Raises
        StreamingError if computing tiles again does not find the positions to which an output's gradient belongs.
        """
        for output, state in zip(self.outputs, states, strict=True):
            output.restore(state)
        records = Records(self.grid, self.call.device, self.tensors[IMAGE_SLOT].device, held=held)
        sums = Sums(self.tensors)
        tiles = list(self.grid.tiles())[::-1]
        fetched = self._fetched(tile for tile in tiles if tile not in recorded)
        for tile in tiles:
            records.enter_reversed(tile)
            done, kept = recorded.pop(tile, None), results.pop(tile, {})
            self._backward_tile(tile, done, kept, fetched, records, gradients, sums=sums)
            records.leave_reversed(tile)
        for output, gradient in zip(self.outputs, gradients, strict=True):
            if gradient is not None and not output.complete():
                raise StreamingError(_LOST.format(label(self.program.step_of(output.value).node)))
        return sums.of_tensors()

    def _backward_tile(
        self,
        tile: Tile,
        done: Recorded | None,
        results: Results,
        fetched: Iterator[tuple[Tile, Regions]],
        records: Records,
        gradients: Sequence[torch.Tensor | None],
        *,
        sums: Sums,
    ) -> None:
        """Add the gradients of one tile to the sums; compute the tile again unless it is `done`.

        The kernels whose `results` there are do not run again.
        """
        only = None
        if done is None:
            done = Recorded(self.shared, records, *next(fetched), Returner(results) if results else None)
        else:
            only = [*sums.shared_with(done.shared.tensors), done.begin, *sums.wanted(done.leaves)]

        def gradient(number: int, value: int, block: torch.Tensor) -> torch.Tensor | None:
            given = gradients[number]
            return None if given is None else self.outputs[number].gradient(self.plan.fresh(value, tile), block, given)

        done.backward(records, gradient, only)
        sums.add(done.leaves)

    def _on_leaves(self) -> Shared:
        """The same with leaves of its own, so that the gradients of its tiles do not reach the call's tensors."""
        leaves = detached_leaves(self.tensors, [tensor.requires_grad for tensor in self.tensors])
        shared = Shared(self.call, self.plan, leaves, self.outputs)
        shared.likes = self.shared.likes
        return shared

    def _fetched(self, tiles: Iterable[Tile]) -> Iterator[tuple[Tile, Regions]]:
        """Tiles, each with the regions of the image that it reads."""
        image = self.tensors[IMAGE_SLOT]
        wanted = ((tile, self.plan.regions(tile)) for tile in tiles)
        return fetch(lambda region: image[region], image.device, self.call.device, wanted)


_LOST = (
    "{}: several positions share its greatest or least value, and computing them again in the backward pass gave other "
    "values. Way out: make the operations in front of it deterministic (torch.use_deterministic_algorithms)"
)


def _as_size(returned: Any) -> Any:
    """A shape that is handed to the head, as the torch.Size that it would be there."""
    sizes = isinstance(returned, tuple) and all(type(size) is int for size in returned)
    return torch.Size(returned) if sizes else returned
