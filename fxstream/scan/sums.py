"""Sums of gradients over tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from ..ops.totals import WIDE

IMAGE_SLOT = 0
"""The place of the image among the tensors of a call."""


class Leaf(NamedTuple):
    """Rows of a tensor of the call that are a leaf of a tile's graph."""

    rows: torch.Tensor
    slot: int
    """The place of the tensor among those of the call."""
    part: tuple[slice, ...]
    """Which rows of it, as an index."""


def detached_leaves(tensors: Sequence[torch.Tensor], trained: Sequence[bool]) -> list[torch.Tensor]:
    """Detached leaves that share the tensors' memory; `trained` says which require a gradient.

    With the Parameters themselves, their hooks would fire once per tile.
    """
    return [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(tensors, trained, strict=True)]


class Sums:
    """The sums of the gradients of the tensors of a call: the `.grad` of leaves, to which autograd itself adds.

    Each sum starts from zeros of its own, since the first gradient that autograd hands a leaf may be used elsewhere.
    The sums are in float32 or better, since every tile may add to them. That of the image has the image's own dtype:
    few tiles read a pixel, and the sum may be large.
    """

    def __init__(self, leaves: Sequence[torch.Tensor]):
        """`leaves` share the memory of the tensors of a call."""
        self._leaves = leaves
        self._totals: dict[int, torch.Tensor] = {}
        for slot, leaf in enumerate(leaves):
            if leaf.requires_grad:
                dtype = leaf.dtype if slot == IMAGE_SLOT else WIDE.get(leaf.dtype, leaf.dtype)
                self._totals[slot] = torch.zeros_like(leaf, dtype=dtype, requires_grad=False)
        self.shared_with(leaves)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return sum(total.nbytes for total in self._totals.values())

    def shared_with(self, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Let autograd add the gradients of other leaves for the same tensors to these sums. Returns those leaves."""
        found = [leaves[slot] for slot in self._totals]
        for leaf, total in zip(found, self._totals.values(), strict=True):
            if total.dtype == leaf.dtype:
                leaf.grad = total
            elif hasattr(leaf, "grad_dtype"):
                leaf.grad_dtype = total.dtype
                leaf.grad = total
            else:
                leaf.register_post_accumulate_grad_hook(_adding_to(total))  # type: ignore[no-untyped-call]  # torch has no types for it
        return found

    def wanted(self, leaves: Iterable[Leaf]) -> list[torch.Tensor]:
        """Those leaves whose gradients are asked for."""
        return [leaf.rows for leaf in leaves if leaf.slot in self._totals]

    def add(self, leaves: Iterable[Leaf]) -> None:
        """Add the gradients of parts of the tensors."""
        for rows, slot, part in leaves:
            if rows.grad is not None and slot in self._totals:
                total = self._totals[slot]
                total[part].add_(rows.grad.to(total.device))

    def of_tensors(self) -> list[torch.Tensor | None]:
        """The gradient of every tensor of the call; None for one to which nothing was added."""
        return [
            self._totals[slot].to(leaf.dtype) if slot in self._totals and self._totals[slot]._version else None
            for slot, leaf in enumerate(self._leaves)
        ]


def _adding_to(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that moves the gradient of a leaf to a sum of another dtype."""

    def add(leaf: torch.Tensor) -> None:
        if leaf.grad is not None:  # the engine calls hooks for gradients that are not defined, too
            total.add_(leaf.grad)
            leaf.grad = None

    return add
