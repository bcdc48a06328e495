"""Regions of the image on the device that computes. Each is copied once per pass, ahead of the tile that reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch

Region = tuple[slice, ...]
"""An index into the image."""
Regions = list[torch.Tensor]
Tile = TypeVar("Tile")


def fetch(
    cut: Callable[[Region], torch.Tensor],
    source: torch.device,
    target: torch.device,
    wanted: Iterable[tuple[Tile, list[Region]]],
) -> Iterator[tuple[Tile, Regions]]:
    """Yields every tile with its regions on `target`. The copies for the next tile have been started by then.

    `wanted` lists the regions of each tile. `cut` gives a region as a view of the image, which is on `source`. Nothing
    is copied if that is the target.
    """
    move: _Move = _Beside(target) if source.type == "cpu" and target.type == "cuda" else _Plainly(target)
    coming: tuple[Tile, Regions] | None = None
    for tile, regions in wanted:
        here, coming = coming, (tile, [move.start(cut(region)) for region in regions])
        if here is not None:
            yield here
        move.finish(coming[1])
    if coming is not None:
        yield coming


class _Move(Protocol):
    def start(self, rows: torch.Tensor) -> torch.Tensor:
        """Start a copy. The result holds the rows once `finish` has been called."""

    def finish(self, regions: Regions) -> None:
        """Make everything that is computed from here on wait for these copies."""


class _Plainly:
    """Copies that are finished as soon as they have been started, if a copy is needed at all."""

    def __init__(self, target: torch.device):
        self.target = target

    def start(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self.target)

    def finish(self, regions: Regions) -> None:
        pass


class _Beside:
    """Copies out of pinned memory, on another stream than the one that computes."""

    def __init__(self, target: torch.device):
        self.target = target
        self.stream = torch.cuda.Stream(target)  # type: ignore[no-untyped-call]  # torch has no types for it

    def start(self, rows: torch.Tensor) -> torch.Tensor:
        pinned = torch.empty_like(rows, pin_memory=True).copy_(rows)
        with torch.cuda.stream(self.stream):
            return pinned.to(self.target, non_blocking=True)

    def finish(self, regions: Regions) -> None:
        computing = torch.cuda.current_stream(self.target)
        computing.wait_stream(self.stream)
        for rows in regions:
            # The memory belongs to the other stream, which must not reuse it before this one is done with it.
            rows.record_stream(computing)
