"""How a call uses its memory budget, chosen when the image's size is known: its tiles if tile_shape is "auto", and what
it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import MemoryBudgetError
from ..graph.mirror import tensor_on_meta
from ..scan.call import Call
from ..scan.keeping import NOTHING, Keep
from .footprint import working_set
from .keeping import chosen

LEAST = 128
"""Pixels along the edge of the smallest tile: smaller ones carry more than they save, and take long."""
MARGIN = 10
"""Safety margin: 1/MARGIN is added to every prediction."""
SHARE = 2
"""Tiles may use 1/SHARE of the budget. The rest is for what need not be computed again."""


class Fit(NamedTuple):
    """How a call uses its memory budget: the fields of its `Call` of the same names."""

    tiles: tuple[int, ...]
    """The size of a tile along each streamed axis."""
    budget: int
    """Bytes that are left for what need not be computed again."""
    keep: Keep = NOTHING


@_disable_current_modes()  # so that a FlopCounterMode around the call does not count what is found out here
def fitted(call: Call, tensors: Sequence[torch.Tensor]) -> Fit:
    """The tiles of the call, and what it keeps if there will be a backward pass.

    Raises MemoryBudgetError if no tiles fit the budget.
    """
    fit = Fit(call.tiles, call.budget) if call.settings.tiling.sizes is not None else _fitting_tiles(call, tensors)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return fit
    return fit._replace(keep=chosen(replace(call, **fit._asdict()), tensors))


def _fitting_tiles(call: Call, tensors: Sequence[torch.Tensor]) -> Fit:
    """The largest square tiles that take half of the call's memory budget, or else the largest that take all of it.

    Raises MemoryBudgetError if no tiles fit it.
    """
    budget = call.settings.memory_budget
    tensors = [tensor_on_meta(tensor) for tensor in tensors]
    needs: dict[int, int] = {}

    def need(edge: int) -> int:
        if edge not in needs:
            predicted = sum(working_set(replace(call, tiles=_square(call, edge)), tensors))
            needs[edge] = predicted + predicted // MARGIN
        return needs[edge]

    edges = _edges(call)
    for limit in (budget // SHARE, budget):
        for edge in edges:
            if need(edge) <= limit:
                return Fit(_square(call, edge), budget - need(edge))
    best = min(edges, key=need)
    raise MemoryBudgetError(
        f"an image of {call.shape} takes {need(best)} bytes in tiles of {best}, and the memory_budget is {budget}. "
        "Way out: a greater budget, or tiles of a size of your choice"
    )


def _edges(call: Call) -> list[int]:
    """Sizes of square tiles that cut the image's longest axis into 1, 2, 3, 4, 6, 8 ... steps; the largest first."""
    longest = max(call.shape[call.settings.names.index(axis)] for axis in call.settings.axes)
    counts = (parts << power for power in range(longest.bit_length()) for parts in (2, 3))
    edges = {-(-longest // count) for count in (1, *counts)}
    return sorted((edge for edge in edges if edge >= min(LEAST, longest)), reverse=True)


def _square(call: Call, edge: int) -> tuple[int, ...]:
    return (edge,) * len(call.settings.axes)
