"""Estimates: what a step will compute and hold, found out on the meta device, where tensors have no memory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from .analysis import Analysis
from .call import Call
from .convert import convert
from .errors import StreamingError, StreamingWarning
from .live import LiveBytes
from .mirror import on_meta, tensor_on_meta
from .scan import Scan
from .schedule import Grid
from .stream import Streamed
from .tape import aliases

STEPS = 4
"""A part of the image with so many steps along each axis shows what a tile needs."""


@dataclass(frozen=True)
class Estimate:
    """What one step on one batch is going to take, the loaded model aside: see `Analysis.estimate`."""

    tiles: int
    """Number of tiles."""
    flops: int
    """As torch.utils.flop_counter counts them: without what is element-wise."""
    carried_bytes: int
    """Held by the streamed part between forward and backward; in inference, at most at a time."""
    peak_bytes: int
    """Of live tensors, the image and the parameters' gradients included."""

    def __str__(self) -> str:
        return (
            f"{self.tiles} tiles, {self.flops / 1e12:.3g} TFLOP, {self.carried_bytes / 2**20:.0f} MiB carried, "
            f"{self.peak_bytes / 2**20:.0f} MiB at most"
        )


class WorkingSet(NamedTuple):
    """Bytes that a streamed call needs beyond the image, the outputs and the model."""

    carried: int
    """Kept between forward and backward; without gradients, at most at a time."""
    owed: int
    """Gradients of what is carried, at most at a time."""
    tile: int
    """What the largest tile makes, and the sums of the parameters' gradients."""


def estimate(analysis: Analysis, image_shape: Sequence[int], tile_shape: object) -> Estimate:
    """See `Analysis.estimate`."""
    model = on_meta(analysis.trace.root)
    dtypes = (tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point())
    image = torch.empty(tuple(image_shape), dtype=next(dtypes, None), device="meta")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", StreamingWarning)
        converted = convert(
            model,
            tile_shape,  # type: ignore[arg-type]  # convert itself says what is wrong with it
            freeze_batchnorm=analysis.freeze,
            image=str(analysis.image.target),
            example_input=image,
        )
        return _of_step(converted, image)


def _of_step(converted: fx.GraphModule, image: torch.Tensor) -> Estimate:
    name, streamed = next((name, part) for name, part in converted.named_children() if isinstance(part, Streamed))
    settings = streamed.settings
    # In one tile, every position is computed once, as it is in many.
    streamed.settings = replace(settings, tile_shape=tuple(image.shape))
    calls: list[tuple[Any, Any]] = []
    hook = streamed.register_forward_hook(lambda _, inputs, outputs: calls.append((inputs, outputs)))
    with FlopCounterMode(display=False) as flops:
        _step(converted, image)
    hook.remove()
    streamed.settings = settings
    ((inputs, outputs),) = calls

    call, tensors = streamed.prepare(*inputs)
    needs = working_set(call, tensors)
    handed = sum(leaf.nbytes for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor))
    converted._modules[name] = _Given(outputs)
    with LiveBytes() as head:
        _step(converted, image)
    peak = handed + max(sum(needs), needs.carried + head.peak)
    tiles = sum(1 for _ in Scan(call, tensors).grid.tiles())
    return Estimate(tiles, int(flops.get_total_flops()), needs.carried, image.nbytes + peak)


def _step(model: nn.Module, image: torch.Tensor) -> None:
    """Forward and, where there is something to train, backward."""
    roots = [leaf for leaf in tree_leaves(model(image)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])
    model.zero_grad()


class _Given(nn.Module):
    """Stands in for the streamed submodule, and hands over what that has handed over."""

    def __init__(self, outputs: Any):
        super().__init__()
        self.outputs = tree_map(lambda leaf: tensor_on_meta(leaf) if isinstance(leaf, torch.Tensor) else leaf, outputs)

    def forward(self, *inputs: Any) -> Any:
        return self.outputs


def working_set(call: Call, tensors: Sequence[torch.Tensor]) -> WorkingSet:
    """What a call takes whose tensors are on the meta device; for training, if one of them requires a gradient."""
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    call = replace(call, settings=replace(call.settings, memory_budget=0))
    try:
        sample = _Sample(*_part(call, tensors), trains)
    except StreamingError:
        # Not every size suits every model.
        sample = _Sample(call, tensors, trains)
    grid = Scan(call, tensors).grid
    return WorkingSet(sample.carried(grid), sample.owed(grid), sample.tile)


def _part(call: Call, tensors: Sequence[torch.Tensor]) -> tuple[Call, list[torch.Tensor]]:
    """A call on a part of the image with the same tiles."""
    shape, tiles = list(call.shape), list(call.settings.tile_shape)
    for axis, tile in call.settings.tiles.items():
        dim = call.settings.names.index(axis)
        step = -(-shape[dim] // -(-shape[dim] // tile))
        shape[dim], tiles[dim] = min(shape[dim], STEPS * step), step
    image, *others = tensors
    part = image.new_empty(shape).requires_grad_(image.requires_grad)
    return replace(call, shape=tuple(shape), settings=replace(call.settings, tile_shape=tuple(tiles))), [part, *others]


class _Sample:
    """A call, made on the meta device."""

    def __init__(self, call: Call, tensors: Sequence[torch.Tensor], trains: bool):
        self.trains = trains
        self.scan = scan = Scan(call, tensors)
        with nullcontext() if trains else LiveBytes() as live:
            results, states, pieces, _ = scan.forward(keep=trains)
        self.dtypes = {value: piece.dtype for (value, _, _), piece in pieces.items()}
        if trains:
            gradients = [torch.empty_like(result) if result.is_floating_point() else None for result in results]
            with LiveBytes() as live, torch.no_grad():
                Scan(call, aliases(tensors, [one.requires_grad for one in tensors])).backward(
                    states, pieces, {}, gradients
                )
            self.tile = live.peak - self.owed(scan.grid)
        else:
            self.tile = live.peak - self.carried(scan.grid) - sum(result.nbytes for result in results)

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
