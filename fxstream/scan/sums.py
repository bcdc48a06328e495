"""Sums of gradients over tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..ops.totals import WIDE
from .pieces import Key
from .tape import IMAGE_SLOT, Origin


class Sums:
    """Running sums of gradients.

    Each starts from its own zeros, since a tensor that autograd hands us may be used elsewhere.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], pieces: Mapping[Key, torch.Tensor]):
        self._tensors = tensors
        self._pieces = pieces
        self._totals: dict[int, torch.Tensor] = {}
        self.owed: dict[Key, torch.Tensor] = {}
        """The gradient of each piece, as far as the tiles that read it have been done."""

    def adding(self, origin: Origin) -> Callable[[torch.Tensor], None]:
        """A hook that moves the gradient of a leaf to the sum for its origin."""
        source, index = origin

        def add(leaf: torch.Tensor) -> None:
            if leaf.grad is None:
                return  # the engine calls hooks for gradients that are not defined, too
            total = self._total(source) if isinstance(source, int) else self._owed(source, leaf.device)
            total[index].add_(leaf.grad.to(total.device))
            leaf.grad = None

        return add

    @property
    def nbytes(self) -> int:
        """Bytes of the sums for the call's tensors."""
        return sum(total.nbytes for total in self._totals.values())

    def of_tensors(self) -> list[torch.Tensor | None]:
        """The gradient of every tensor of the call; None for one that has none."""
        return [
            self._totals[slot].to(tensor.dtype) if slot in self._totals else None
            for slot, tensor in enumerate(self._tensors)
        ]

    def _owed(self, key: Key, device: torch.device) -> torch.Tensor:
        if key not in self.owed:
            self.owed[key] = torch.zeros_like(self._pieces[key], device=device)
        return self.owed[key]

    def _total(self, slot: int) -> torch.Tensor:
        """The sum for a tensor, in float32 or better, since every tile may add to it.

        That of the image has the image's own dtype: few tiles read a pixel, and the sum may be large.
        """
        if slot not in self._totals:
            tensor = self._tensors[slot]
            dtype = tensor.dtype if slot == IMAGE_SLOT else WIDE.get(tensor.dtype, tensor.dtype)
            self._totals[slot] = torch.zeros_like(tensor, dtype=dtype)
        return self._totals[slot]
