"""Where a tile reads the image, other tensors and kept pieces: as they are, or as leaves of a graph of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from ..geometry.schedule import Index
from ..ops.totals import WIDE
from .fetch import Region, Regions
from .pieces import Key

Origin = tuple["int | Key", Index]
"""Where rows come from: the tensor's slot or the piece's key, and which rows of it."""


def aliases(tensors: Sequence[torch.Tensor], trained: Sequence[bool]) -> list[torch.Tensor]:
    """Leaves with the memory of the parameters. Of the Parameters themselves, the hooks would fire once a tile."""
    return [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(tensors, trained, strict=True)]


@dataclass
class Source:
    """Reads for a tile of a scan without gradients."""

    tensors: Sequence[torch.Tensor]
    """Those of the call, the image first."""
    device: torch.device
    """Where the tile is computed."""
    regions: Regions
    """Of the image, there."""
    pieces: Mapping[Key, torch.Tensor]

    def image(self, region: Region, index: Index) -> torch.Tensor:
        return self.regions[region]

    def tensor(self, slot: int, index: Index) -> torch.Tensor:
        return self.tensors[slot][index]

    def piece(self, key: Key, index: Index) -> torch.Tensor:
        # Whole: only what is contiguous is copied without the host's doing.
        return self.pieces[key].to(self.device, non_blocking=True)[index]


@dataclass
class Tape(Source):
    """Reads rows as leaves, whose gradients the scan itself adds up."""

    differentiable: Callable[[int, torch.Tensor], bool]
    """Whether a gradient for a part of a value is of any use."""
    leaves: list[torch.Tensor] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    """Of each leaf."""

    def image(self, region: Region, index: Index) -> torch.Tensor:
        rows = super().image(region, index)
        return self._leaf(rows, 0, index) if self.tensors[0].requires_grad else rows

    def tensor(self, slot: int, index: Index) -> torch.Tensor:
        rows = super().tensor(slot, index)
        return self._leaf(rows, slot, index) if self.tensors[slot].requires_grad else rows

    def piece(self, key: Key, index: Index) -> torch.Tensor:
        rows = super().piece(key, index)
        # A carry requires grad only if its value does: its reader would compute a gradient for nobody.
        return self._leaf(rows, key, index) if self.differentiable(key[0], rows) else rows

    def _leaf(self, rows: torch.Tensor, origin: int | Key, index: Index) -> torch.Tensor:
        leaf = rows.detach().requires_grad_()
        self.leaves.append(leaf)
        self.origins.append((origin, index))
        return leaf


@dataclass
class TileGraph:
    """A tile that was computed with autograd."""

    tape: Tape
    blocks: dict[int, torch.Tensor]
    """The fresh blocks of the outputs."""
    kept: dict[Key, torch.Tensor]
    """What later tiles need."""

    def backward(self, roots: Sequence[tuple[torch.Tensor, torch.Tensor]], slots: Sequence[int], sums: Sums) -> None:
        """From gradients of roots, add those of what was read to `sums`; of tensors, only those in `slots`.

        Each is added as soon as it is there, and then freed: together, those of the weights are as large as the model.
        Frees the graph.
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
                hook = leaf.register_post_accumulate_grad_hook(sums.adding(origin))  # type: ignore[no-untyped-call]  # torch has no types for it
                hooks.enter_context(hook)
            torch.autograd.backward(outputs, given, inputs=[leaf for leaf, _ in wanted])


class Sums:
    """Running sums of gradients, each from zeros of its own: what autograd computes may be shared."""

    def __init__(self, tensors: Sequence[torch.Tensor], pieces: Mapping[Key, torch.Tensor]):
        self._tensors = tensors
        self._pieces = pieces
        self._totals: dict[int, torch.Tensor] = {}
        self.owed: dict[Key, torch.Tensor] = {}
        """What later tiles owe to the pieces of earlier ones."""

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
        """Bytes of the sums for tensors."""
        return sum(total.nbytes for total in self._totals.values())

    def of_tensors(self) -> list[torch.Tensor | None]:
        """The gradient of every tensor, None of one that has none."""
        return [
            self._totals[slot].to(tensor.dtype) if slot in self._totals else None
            for slot, tensor in enumerate(self._tensors)
        ]

    def _owed(self, key: Key, device: torch.device) -> torch.Tensor:
        if key not in self.owed:
            self.owed[key] = torch.zeros_like(self._pieces[key], device=device)
        return self.owed[key]

    def _total(self, slot: int) -> torch.Tensor:
        """In float32 or better, since each tile may add to it.

        A pixel of the image is read by few tiles, and its gradient may be large.
        """
        if slot not in self._totals:
            tensor = self._tensors[slot]
            dtype = tensor.dtype if slot == 0 else WIDE.get(tensor.dtype, tensor.dtype)
            self._totals[slot] = torch.zeros_like(tensor, dtype=dtype)
        return self._totals[slot]


class Budget:
    """Decides which graphs are kept: the first ones, as long as all that they hold is within so many bytes."""

    def __init__(self, limit: int, alive: Sequence[torch.Tensor]):
        """`alive` are tensors whose memory is held anyway."""
        self.limit = limit
        self.left = limit > 0
        """Whether another graph may fit."""
        self._alive = {tensor.untyped_storage().data_ptr() for tensor in alive if self.left}
        self._held: dict[int, int] = {}
        """Bytes of each storage."""

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what autograd saves meanwhile."""
        # Detached, since a graph that saved its own result as it is would hold itself.
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: self._count(saved.detach()), lambda saved: saved):
            yield

    def affords(self, graph: TileGraph) -> bool:
        """Whether a graph, what it has saved being counted, is within the budget."""
        for result in (*graph.blocks.values(), *graph.kept.values()):
            self._count(result)
        self.left = sum(self._held.values()) <= self.limit
        return self.left

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._alive:
            self._held[storage.data_ptr()] = storage.nbytes()
        return tensor
