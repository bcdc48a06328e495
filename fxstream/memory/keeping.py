"""Which results of dear kernels a call keeps within its memory budget: those that save most FLOPs per byte.

Every value's results save what these kernels take, whatever else is kept, since all kernels would run again. So the
best choice is greedy. It is the same for all tiles, but for one value at most.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch

from ..graph.mirror import tensor_on_meta
from ..scan.call import Call
from ..scan.keeping import Keep, Result, results_nbytes
from ..scan.tiles import Scan
from .flops import result_flops


class Dear(NamedTuple):
    """The dear kernels of a value, on the whole image."""

    value: int
    flops: int
    nbytes: int
    """Of their results."""

    @property
    def worth(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.nbytes


def chosen(call: Call, tensors: Sequence[torch.Tensor]) -> Keep:
    """What a call keeps of its budget; its tiles must have been chosen."""
    tensors = [tensor_on_meta(tensor) for tensor in tensors]
    left = call.budget
    kept: list[Dear] = []
    candidates = sorted(dear_kernels(call, tensors), key=lambda dear: dear.worth, reverse=True)
    for dear in candidates:
        if dear.nbytes > left:
            return _with_part(call, tensors, _keep(kept), dear, left)
        kept.append(dear)
        left -= dear.nbytes
    return replace(_keep(kept), complete=True)


def dear_kernels(call: Call, tensors: Sequence[torch.Tensor]) -> list[Dear]:
    """The dear kernels of every value that has any, counted with tensors on the meta device.

    The whole image is one tile: every position is computed once, however many tiles there are.
    """
    sizes = dict(zip(call.settings.names, call.shape, strict=True))
    keep = Keep(frozenset(value for value, _ in call.program(tensors).computed()))
    whole = replace(
        call,
        tiles=tuple(sizes[axis] for axis in call.settings.axes),
        budget=sys.maxsize,
        keep=keep,
        device=torch.device("meta"),
    )
    with torch.random.fork_rng(devices=[]):
        (results,) = Scan(whole, tensors).forward(keep=True).results.values()
    return [
        Dear(value, sum(map(result_flops, kept)), sum(_nbytes(call, result) for result in kept))
        for value, kept in results.items()
    ]


def _nbytes(call: Call, result: Result) -> int:
    """The bytes of a result that was made on the meta device, where autocast casts nothing."""
    nbytes = results_nbytes([result])
    for region in call.autocast:
        if region["device_type"] == call.device.type and region["enabled"] and torch.float32 in result.signature.dtypes:
            nbytes = nbytes * region["dtype"].itemsize // torch.float32.itemsize
    return nbytes


def _keep(kept: Sequence[Dear]) -> Keep:
    values = frozenset(dear.value for dear in kept)
    return Keep(values, nbytes=sum(dear.nbytes for dear in kept), flops=sum(dear.flops for dear in kept))


def _with_part(call: Call, tensors: Sequence[torch.Tensor], keep: Keep, dear: Dear, left: int) -> Keep:
    """Keep the results of one more value, in as many of the first tiles as `left` bytes allow."""
    grid = call.program(tensors).grid(call.tiles)
    positions = prod(axis.sizes[dear.value] for axis in grid.axes)
    held = tiles = 0
    for tile in grid.tiles():
        held += prod(rows.stop - rows.start for rows in grid.fresh(dear.value, tile))
        if held * dear.nbytes > left * positions:
            held -= prod(rows.stop - rows.start for rows in grid.fresh(dear.value, tile))
            break
        tiles += 1
    return replace(
        keep,
        partial=dear.value,
        tiles=tiles,
        nbytes=keep.nbytes + held * dear.nbytes // positions,
        flops=keep.flops + held * dear.flops // positions,
    )
