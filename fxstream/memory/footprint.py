"""What a streamed call holds at a time, found out on the meta device, where tensors have no memory."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import torch

from ..errors import StreamingError
from ..geometry.grid import Grid
from ..geometry.schedule import Axis, equal_step
from ..scan.call import Call
from ..scan.sums import IMAGE_SLOT, Sums, detached_leaves
from ..scan.tiles import Forward, Scan
from .live import LiveBytes

STEPS, MOST_STEPS, REACH = 4, 8, 512
"""We predict from a crop of STEPS steps per axis; of more, up to MOST_STEPS, where deep layers, which see hundreds of
pixels, would not produce any rows in it."""


class WorkingSet(NamedTuple):
    """Bytes that a streamed call needs beyond the image, the outputs and the model."""

    carried: int
    """Kept between forward and backward; without gradients, the most at any time."""
    kept: int
    """Kept beside that because the memory budget allows it."""
    owed: int
    """Gradients of what is carried, the most at any time."""
    tile: int
    """What the largest tile makes, and the sums of the parameters' gradients."""


def working_set(call: Call, tensors: Sequence[torch.Tensor]) -> WorkingSet:
    """What a call takes whose tensors are on the meta device; for training, if one of them requires a gradient.

    A crop of the image that has a few tiles is enough: how much these leave to later ones follows from the schedule.
    """
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    grid = call.program(tensors).grid(call.tiles)
    kept, sample = call.keep.nbytes, None
    if call.keep.complete and call.budget > kept:
        recorded = _sample(replace(call, budget=sys.maxsize), tensors, trains)
        graphs = recorded.held * prod(call.shape) // prod(recorded.scan.call.shape)
        if graphs <= call.budget:
            kept, sample = graphs, recorded
        else:
            # Each tile that stays recorded holds its graph and not its results.
            tiles = (call.budget - kept) * grid.count // (graphs - kept)
            kept += tiles * (graphs - kept) // grid.count
    if sample is None:
        # The largest tile keeps neither its graph nor the results of a value of which only the first tiles keep them.
        keep = replace(call.keep, partial=None, complete=False)
        sample = _sample(replace(call, keep=keep), tensors, trains)
    return WorkingSet(sample.carried(grid), kept, sample.owed(grid), sample.tile)


def _sample(call: Call, tensors: Sequence[torch.Tensor], trains: bool) -> _Sample:
    """A call on a part of the image, or on the image if its size does not suit the model."""
    call = replace(call, device=torch.device("meta"))
    with torch.random.fork_rng(devices=[]):
        try:
            return _Sample(*_crop(call, tensors), trains)
        except StreamingError:
            return _Sample(call, tensors, trains)


def _crop(call: Call, tensors: Sequence[torch.Tensor]) -> tuple[Call, list[torch.Tensor]]:
    """A call on part of the image, with the same tiles."""
    shape = list(call.shape)
    tiles = []
    grid = call.program(tensors).grid(call.tiles)
    for name, axis, tile in zip(call.settings.axes, grid.axes, call.tiles, strict=True):
        dim = call.settings.names.index(name)
        step = equal_step(shape[dim], tile)
        shape[dim] = min(shape[dim], _steps(axis, step) * step)
        tiles.append(step)
    image, *others = tensors
    part = image.new_empty(shape).requires_grad_(image.requires_grad)
    return replace(call, shape=tuple(shape), tiles=tuple(tiles)), [part, *others]


def _steps(axis: Axis, step: int) -> int:
    """How many steps of an axis suffice: until those have come that are repeated from there on, or REACH pixels."""
    (kind, _), *_ = Counter(axis.kinds).most_common()
    enough = min(axis.kinds.index(kind) + 2, -(-REACH // step))
    return min(MOST_STEPS, max(STEPS, enough))


class _Measured(Scan):
    """A scan that counts the bytes of each tile of its backward pass."""

    def __init__(self, call: Call, tensors: Sequence[torch.Tensor]):
        super().__init__(call, tensors)
        self.peak = 0

    def _backward_tile(self, *args: Any, sums: Sums) -> None:
        with LiveBytes() as live:
            super()._backward_tile(*args, sums=sums)
        self.peak = max(self.peak, sums.nbytes + int(live.peak))


class _Sample:
    """A call, made on the meta device."""

    def __init__(self, call: Call, tensors: Sequence[torch.Tensor], trains: bool):
        self.trains = trains
        self.scan = Scan(call, tensors)
        with LiveBytes() as live:
            kept = self.scan.forward(keep=True)
        known = (*kept.outputs, *kept.records.values(), *chain(*kept.states))
        self.held = int(live.now) - sum(tensor.nbytes for tensor in known)
        """Bytes of results and graphs."""
        self.dtypes = {value: record.dtype for (value, _, _), record in kept.records.items()}
        self.tile = self._training(kept) if trains else self._inference()

    def _training(self, kept: Forward) -> int:
        tensors = self.scan.tensors
        gradients = [torch.empty_like(output) if output.is_floating_point() else None for output in kept.outputs]
        backward = _Measured(self.scan.call, detached_leaves(tensors, [tensor.requires_grad for tensor in tensors]))
        with torch.no_grad():
            backward.backward(kept.states, kept.records, kept.recorded, kept.results, gradients)
        return backward.peak

    def _inference(self) -> int:
        with LiveBytes() as live:
            outputs = Scan(self.scan.call, self.scan.tensors).forward(keep=False).outputs
        return int(live.peak) - sum(output.nbytes for output in outputs) - self.carried(self.scan.grid)

    def carried(self, grid: Grid) -> int:
        """Bytes of all pieces; without gradients, of those that are alive at a time."""
        sizes = {value: self._bytes(value) for value, _ in self.scan.program.computed()}
        if not self.trains:
            return grid.in_flight(sizes)
        return sum(size * grid.carried(value) for value, size in sizes.items())

    def owed(self, grid: Grid) -> int:
        """Bytes of the gradients of pieces that are alive at a time."""
        if not self.trains:
            return 0
        trained = (value for value, _ in self.scan.program.computed() if self.scan.shared.trained[value])
        return grid.in_flight({value: self._bytes(value) for value in trained})

    def _bytes(self, value: int) -> int:
        """Bytes per position of the value along the streamed axes."""
        dtype = self.dtypes.get(value, self.scan.tensors[IMAGE_SLOT].dtype)
        return dtype.itemsize * prod(int(dim.size) for dim in self.scan.program.dims(value) if dim.tag is None)
