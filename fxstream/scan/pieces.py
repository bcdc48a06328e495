"""What tiles carry to later ones, and where it is kept."""

from __future__ import annotations

import torch

from ..geometry.schedule import Tile

Key = tuple[int, Tile, int]
"""A kept piece: value, tile, piece."""


class Pieces:
    """The pieces of a forward pass, on the device that computes for as long as tiles of this pass read them.

    The others wait for the backward pass where the image is: one too large for a GPU comes with carries that are. That
    memory is pinned, and the copies into it are waited for once, at the end.

    Attributes:
        held: all that there are.
    """

    def __init__(self, device: torch.device, home: torch.device, keep: bool):
        """`home`: where the image is; `keep`: whether there will be a backward pass."""
        self.held: dict[Key, torch.Tensor] = {}
        self._device, self._home, self._keep = device, home, keep
        self._expiring: dict[Tile, list[Key]] = {}

    def add(self, key: Key, rows: torch.Tensor, expiry: Tile) -> None:
        """Keep a copy of `rows`; `expiry` is the last tile that reads it."""
        self.held[key] = rows.detach().clone()
        self._expiring.setdefault(expiry, []).append(key)

    def expire(self, tile: Tile) -> None:
        """Let go of the pieces that `tile`, which is done, was the last to read."""
        for key in self._expiring.pop(tile, ()):
            rows = self.held.pop(key)
            if self._keep:
                self.held[key] = store(rows, self._home)

    def settle(self) -> None:
        """After the last tile."""
        if self._keep and _leaves_gpu(self._device, self._home):
            torch.cuda.current_stream(self._device).synchronize()


def store(rows: torch.Tensor, home: torch.device) -> torch.Tensor:
    """`rows` at `home`; out of a GPU, in pinned memory, which will hold them when the GPU has come to that."""
    if _leaves_gpu(rows.device, home):
        return torch.empty_like(rows, device=home, pin_memory=True).copy_(rows, non_blocking=True)
    return rows.to(home)


def _leaves_gpu(device: torch.device, home: torch.device) -> bool:
    return device.type == "cuda" and home.type == "cpu"
