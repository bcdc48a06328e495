"""What tiles carry to later ones, and where it is kept."""

from __future__ import annotations

import torch

from ..geometry.grid import Tile

Key = tuple[int, Tile, int]
"""A kept piece: the value, the tile that computed it, the axis along which it is carried."""


class Pieces:
    """The pieces that a forward pass keeps.

    A piece stays on the device that computes until the last tile of this pass has read it. Then it moves to the image's
    device to wait for the backward pass: if the image is too large for the GPU, so are the saved carries. Out of a GPU
    it goes to pinned memory, and the copies are waited for once, after the last tile.

    Attributes:
        held: the pieces that there are now.
    """

    def __init__(self, device: torch.device, home: torch.device, keep: bool):
        """`device` computes, `home` holds the image; `keep` says whether there will be a backward pass."""
        self.held: dict[Key, torch.Tensor] = {}
        self._device, self._home, self._keep = device, home, keep
        self._expiring: dict[Tile, list[Key]] = {}

    def add(self, key: Key, rows: torch.Tensor, expiry: Tile) -> None:
        """Keep a copy of `rows`; `expiry` is the last tile that reads it."""
        self.held[key] = rows.detach().clone()
        self._expiring.setdefault(expiry, []).append(key)

    def expire(self, tile: Tile) -> None:
        """Release the pieces that `tile`, which is done, was the last to read, or move them to the image's device."""
        for key in self._expiring.pop(tile, ()):
            rows = self.held.pop(key)
            if self._keep:
                self.held[key] = store(rows, self._home)

    def settle(self) -> None:
        """Wait for the copies; called after the last tile."""
        if self._keep and _leaves_gpu(self._device, self._home):
            torch.cuda.current_stream(self._device).synchronize()


def store(rows: torch.Tensor, home: torch.device) -> torch.Tensor:
    """`rows` on the device `home`; out of a GPU, in pinned memory, which holds them once the GPU has got that far."""
    if _leaves_gpu(rows.device, home):
        return torch.empty_like(rows, device=home, pin_memory=True).copy_(rows, non_blocking=True)
    return rows.to(home)


def _leaves_gpu(device: torch.device, home: torch.device) -> bool:
    return device.type == "cuda" and home.type == "cpu"
