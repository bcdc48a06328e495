"""What a streamed call holds at a time, found out on the meta device, where tensors have no memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch

from ..errors import StreamingError
from ..geometry.schedule import Grid
from ..scan.call import Call
from ..scan.tape import Sums, aliases
from ..scan.tiles import Forward, Scan
from .live import LiveBytes

STEPS, MOST_STEPS, REACH = 4, 8, 512
"""A part of the image with so many steps along each axis shows what a tile needs; with more, if steps are so small that
deep values, which see hundreds of pixels, only get going after a few."""


class WorkingSet(NamedTuple):
    """Bytes that a streamed call needs beyond the image, the outputs and the model."""

    carried: int
    """Kept between forward and backward; without gradients, at most at a time."""
    owed: int
    """Gradients of what is carried, at most at a time."""
    tile: int
    """What the largest tile makes, and the sums of the parameters' gradients."""


def working_set(call: Call, tensors: Sequence[torch.Tensor]) -> WorkingSet:
    """What a call takes whose tensors are on the meta device; for training, if one of them requires a gradient.

    Of the image, a part is enough that has a few tiles: how much they leave to later ones follows from the schedule.
    """
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    call = replace(call, settings=replace(call.settings, memory_budget=0), device=torch.device("meta"))
    with torch.random.fork_rng(devices=[]):
        try:
            sample = _Sample(*_part(call, tensors), trains)
        except StreamingError:
            # Not every size suits every model.
            sample = _Sample(call, tensors, trains)
    grid = Scan(call, tensors).grid
    return WorkingSet(sample.carried(grid), sample.owed(grid), sample.tile)


def _part(call: Call, tensors: Sequence[torch.Tensor]) -> tuple[Call, list[torch.Tensor]]:
    """A call on a part of the image with the same tiles."""
    shape, tiles = list(call.shape), {}
    for axis, tile in call.settings.tiles.items():
        dim = call.settings.names.index(axis)
        step = -(-shape[dim] // -(-shape[dim] // tile))
        steps = min(MOST_STEPS, max(STEPS, -(-REACH // step)))
        shape[dim], tiles[axis] = min(shape[dim], steps * step), step
    image, *others = tensors
    part = image.new_empty(shape).requires_grad_(image.requires_grad)
    return replace(call, shape=tuple(shape), settings=call.settings.tiled(tiles)), [part, *others]


class _Sample:
    """A call, made on the meta device."""

    def __init__(self, call: Call, tensors: Sequence[torch.Tensor], trains: bool):
        self.trains = trains
        self.scan = Scan(call, tensors)
        kept = self.scan.forward(keep=True)
        self.dtypes = {value: piece.dtype for (value, _, _), piece in kept.pieces.items()}
        self.tile = self._training(kept) if trains else self._inference()

    def _training(self, kept: Forward) -> int:
        tensors = self.scan.tensors
        results, states, pieces, _ = kept
        gradients = [torch.empty_like(result) if result.is_floating_point() else None for result in results]
        backward = Scan(self.scan.call, aliases(tensors, [tensor.requires_grad for tensor in tensors]))
        peaks: list[int] = []

        @contextmanager
        def counting(sums: Sums) -> Iterator[None]:
            # Earlier tiles have made these, for all that follow.
            made = sums.nbytes
            with LiveBytes() as live:
                yield
            peaks.append(made + int(live.peak))

        with torch.no_grad():
            backward.backward(states, pieces, {}, gradients, around=counting)
        return max(peaks)

    def _inference(self) -> int:
        with LiveBytes() as live:
            results = Scan(self.scan.call, self.scan.tensors).forward(keep=False).results
        return int(live.peak) - sum(result.nbytes for result in results) - self.carried(self.scan.grid)

    def carried(self, grid: Grid) -> int:
        """Bytes of all pieces; without gradients, of those that are alive at a time."""
        sizes = {value: self._bytes(value) for value in range(1, len(self.scan.steps) + 1)}
        if not self.trains:
            return grid.in_flight(sizes)
        return sum(size * grid.carried(value) for value, size in sizes.items())

    def owed(self, grid: Grid) -> int:
        """Bytes of the gradients of pieces that are alive at a time."""
        trained = [value for value, step in enumerate(self.scan.steps, start=1) if self.trains and step.differentiable]
        return grid.in_flight({value: self._bytes(value) for value in trained})

    def _bytes(self, value: int) -> int:
        """Of one position along the streamed axes."""
        dims = self.scan.steps[value - 1].local.dims
        dtype = self.dtypes.get(value, self.scan.tensors[0].dtype)
        return dtype.itemsize * prod(int(dim.size) for dim in dims if dim.tag is None)
