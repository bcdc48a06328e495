"""Where a tile reads the image, other tensors and kept pieces from: as they are, or as leaves of an autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from ..geometry.grid import Index
from .fetch import Region, Regions
from .pieces import Key

IMAGE_SLOT = 0
"""The place of the image among the tensors of a call."""
Origin = tuple["int | Key", Index]
"""Where rows come from: the place of a tensor among those of the call, or the key of a piece; and which rows of it."""


def detached_leaves(tensors: Sequence[torch.Tensor], trained: Sequence[bool]) -> list[torch.Tensor]:
    """Detached leaves that share the tensors' memory; `trained` says which require a gradient.

    With the Parameters themselves, their hooks would fire once per tile.
    """
    return [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(tensors, trained, strict=True)]


@dataclass
class Source:
    """What a tile of a scan without gradients reads from."""

    tensors: Sequence[torch.Tensor]
    """The tensors of the call, the image first."""
    device: torch.device
    """Where the tile is computed."""
    regions: Regions
    """The regions of the image that the tile reads, on that device."""
    pieces: Mapping[Key, torch.Tensor]

    def image(self, region: Region, index: Index) -> torch.Tensor:
        """A region of the image; `index` is the same region as an index into the whole image."""
        return self.regions[region]

    def tensor(self, slot: int, index: Index) -> torch.Tensor:
        """Rows of a tensor of the call that is not the image."""
        return self.tensors[slot][index]

    def piece(self, key: Key, index: Index) -> torch.Tensor:
        """Rows of a piece that an earlier tile has kept."""
        # The whole piece: only what is contiguous is copied without the host's doing.
        return self.pieces[key].to(self.device, non_blocking=True)[index]


@dataclass
class Tape(Source):
    """Reads rows as leaves of the tile's own autograd graph. The scan adds up their gradients."""

    differentiable: Callable[[int, torch.Tensor], bool]
    """Whether a gradient for part of a value is of any use, given the value's number and the part."""
    leaves: list[torch.Tensor] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    """Where each leaf was read from."""

    def image(self, region: Region, index: Index) -> torch.Tensor:
        rows = super().image(region, index)
        return self._leaf(rows, IMAGE_SLOT, index) if self.tensors[IMAGE_SLOT].requires_grad else rows

    def tensor(self, slot: int, index: Index) -> torch.Tensor:
        rows = super().tensor(slot, index)
        return self._leaf(rows, slot, index) if self.tensors[slot].requires_grad else rows

    def piece(self, key: Key, index: Index) -> torch.Tensor:
        rows = super().piece(key, index)
        # A carry requires grad only if its value does; otherwise its readers would compute gradients that nobody wants.
        return self._leaf(rows, key, index) if self.differentiable(key[0], rows) else rows

    def _leaf(self, rows: torch.Tensor, origin: int | Key, index: Index) -> torch.Tensor:
        leaf = rows.detach().requires_grad_()
        self.leaves.append(leaf)
        self.origins.append((origin, index))
        return leaf


@dataclass
class RecordedTile:
    """A tile that was computed with autograd, and its graph."""

    tape: Tape
    blocks: dict[int, torch.Tensor]
    """The fresh blocks of the outputs."""
    kept: dict[Key, torch.Tensor]
    """The pieces that later tiles need."""

    def backward(
        self,
        roots: Sequence[tuple[torch.Tensor, torch.Tensor]],
        slots: Sequence[int],
        adding: Callable[[Origin], Callable[[torch.Tensor], None]],
    ) -> None:
        """Differentiate, and free the graph.

        `roots` are blocks and pieces with their gradients. `adding` makes a hook that takes the gradient of a leaf that
        was read at an origin; of the call's tensors, only those in `slots` get one. A gradient is taken as soon as it
        is there: all those of the weights together are as large as the model.
        """
        pairs = zip(self.tape.leaves, self.tape.origins, strict=True)
        wanted = [(leaf, origin) for leaf, origin in pairs if not isinstance(origin[0], int) or origin[0] in slots]
        wanted += [(self.tape.tensors[slot], (slot, ())) for slot in slots]
        roots = [(root, gradient) for root, gradient in roots if root.requires_grad]
        if not roots or not wanted:
            return
        outputs, given = zip(*roots, strict=True)
        with ExitStack() as hooks:
            for leaf, origin in wanted:
                hook = leaf.register_post_accumulate_grad_hook(adding(origin))  # type: ignore[no-untyped-call]  # torch has no types for it
                hooks.enter_context(hook)
            torch.autograd.backward(outputs, given, inputs=[leaf for leaf, _ in wanted])
