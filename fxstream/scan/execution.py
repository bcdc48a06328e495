"""Executing the program of a tile: plainly, or with autograd, so that the tile can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..geometry.grid import Index, Tile
from ..ops import Noise
from .instructions import Join
from .noise import draw
from .records import Records
from .region import Stitch, Tape
from .sums import IMAGE_SLOT, Leaf

if TYPE_CHECKING:
    from .tiles import Scan


class Execution:
    """One tile: its registers, what it reads, and where it leaves its results."""

    def __init__(self, scan: Scan, records: Records, tile: Tile, regions: Sequence[torch.Tensor]):
        """`regions` are those of the image that the tile reads, on the device that computes."""
        self.scan, self.records, self.tile, self.regions = scan, records, tile, regions
        program = scan.plan.tile(tile)
        self.registers: list[Any] = [None, *scan.tensors, *[None] * program.registers]
        for instruction in program.instructions:
            instruction(self)
        self.registers = []

    def image(self, number: int) -> torch.Tensor:
        """A region of the image."""
        return self.regions[number]

    def tensor(self, slot: int, value: int, tags: Mapping[int, int]) -> torch.Tensor:
        """The rows of a tensor of the call that belong to the block of `value`."""
        tensor = self.scan.tensors[slot]
        return tensor[self.rows(value, tags, tensor.dim())]

    def rows(self, value: int, tags: Mapping[int, int], rank: int) -> Index:
        """The index into a tensor of `rank` dimensions that selects what belongs to the block of `value`.

        `tags` says which of the tensor's dimensions are streamed axes, by number.
        """
        fresh = self.scan.grid.fresh(value, self.tile)
        return tuple(fresh[tags[dim]] if dim in tags else slice(None) for dim in range(rank))

    def drawn(self, noise: Noise, value: int, place: int, like: torch.Tensor) -> torch.Tensor:
        """The random numbers for the block of `value`: its operand at `place`. `like` is a tensor on their device."""
        axes = self.scan.program.axes
        tags = {dim: axes.index(one.tag) for dim, one in enumerate(noise.dims) if one.tag is not None}
        rows = self.rows(value, tags, len(noise.dims))
        whole = [int(dim.size) for dim in noise.dims]
        if len(tags) == len(axes):
            # No two tiles share any of these: each tile draws its own, and none are kept.
            number = self.scan.draw_number(value, place, 1 + self.scan.grid.number(self.tile))
            shape = [len(range(size)[kept]) for size, kept in zip(whole, rows, strict=True)]
            return draw(self.scan.call.seed, number, noise.draw, shape, like)
        shared = self.scan.noise
        if (value, place) not in shared:
            number = self.scan.draw_number(value, place, 0)
            shared[value, place] = draw(self.scan.call.seed, number, noise.draw, whole, like)
        return shared[value, place][rows]

    def join(self, join: Join, block: torch.Tensor | None) -> Sequence[torch.Tensor]:
        """What is read of a region; what later tiles need of it is kept."""
        taken = join.region.taken(block, self.records, self.tile)
        if block is not None:
            join.region.keep(block, self.records, self.tile)
        return taken

    def emit(self, number: int, value: int, block: torch.Tensor) -> None:
        """Hand a block to an output."""
        self.scan.outputs[number].add(self.scan.plan.fresh(value, self.tile), block)

    def note(self, value: int, block: torch.Tensor) -> None:
        """Note the type of a value."""
        self.scan.likes[value] = block.new_empty(0)


class Recorded(Execution):
    """A tile that is computed with autograd, and its graph.

    What it reads of the image and of sliced tensors are leaves of the graph, whose gradients are added up afterwards.
    """

    def __init__(self, scan: Scan, records: Records, tile: Tile, regions: Sequence[torch.Tensor]):
        self.leaves: list[Leaf] = []
        self.blocks: list[tuple[int, int, torch.Tensor]] = []
        """The blocks of the outputs: the place of the output, its value, and the block."""
        self._tape = Tape(records, tile)
        self.begin = self._end = torch.zeros((), requires_grad=True)
        """A leaf on which all joins depend; and what depends on all joins that keep rows. If it is differentiated, too,
        each of these finds what it is owed."""
        with torch.enable_grad(), scan.call.autocasting():
            super().__init__(scan, records, tile, regions)

    def image(self, number: int) -> torch.Tensor:
        rows = super().image(number)
        if not self.scan.tensors[IMAGE_SLOT].requires_grad:
            return rows
        return self._leaf(rows, IMAGE_SLOT, self.scan.plan.regions(self.tile)[number])

    def tensor(self, slot: int, value: int, tags: Mapping[int, int]) -> torch.Tensor:
        rows, tensor = super().tensor(slot, value, tags), self.scan.tensors[slot]
        return self._leaf(rows, slot, self.rows(value, tags, tensor.dim())) if tensor.requires_grad else rows

    def _leaf(self, rows: torch.Tensor, slot: int, index: Index) -> torch.Tensor:
        leaf = rows.detach().requires_grad_()
        self.leaves.append(Leaf(leaf, slot, index))
        return leaf

    def join(self, join: Join, block: torch.Tensor | None) -> Sequence[torch.Tensor]:
        region = join.region
        # Otherwise those who read it would compute gradients that nobody wants.
        if not self.scan.trained[region.value] or (block is not None and not _is_differentiable(block)):
            return region.taken(block, self.records, self.tile)
        *taken, end = Stitch.apply(region, self._tape, self._end, block)  # type: ignore[no-untyped-call]  # torch has no types for it
        if region.keeps:
            self._end = end
        return taken

    def emit(self, number: int, value: int, block: torch.Tensor) -> None:
        self.blocks.append((number, value, block))

    def backward(
        self,
        records: Records,
        gradient: Callable[[int, int, torch.Tensor], torch.Tensor | None],
        only: Sequence[torch.Tensor] | None,
    ) -> None:
        """Differentiate, and free the graph.

        `records` are those of the backward scan. `gradient` is asked for the gradient of every block of an output. If
        `only` some leaves are given, no others get gradients.
        """
        self._tape.records = records
        roots = [(block, gradient(number, value, block.detach())) for number, value, block in self.blocks]
        wanted = [(root, given) for root, given in roots if given is not None and root.requires_grad]
        if self._end is not self.begin:
            wanted.append((self._end, torch.zeros(())))
        if wanted:
            outputs, given = zip(*wanted, strict=True)
            torch.autograd.backward(outputs, given, inputs=only)


class RecordedAhead(Recorded):
    """A tile of the forward scan that is computed with autograd, so that it need not be computed again."""

    def __init__(self, scan: Scan, records: Records, tile: Tile, regions: Sequence[torch.Tensor]):
        super().__init__(scan, records, tile, regions)
        # The backward scan has records of its own.
        self._tape.records = self.records = None  # type: ignore[assignment]

    def join(self, join: Join, block: torch.Tensor | None) -> Sequence[torch.Tensor]:
        if block is not None:
            join.region.keep(block.detach(), self.records, self.tile)
        return super().join(join, block)

    def emit(self, number: int, value: int, block: torch.Tensor) -> None:
        super().emit(number, value, block)
        Execution.emit(self, number, value, block.detach())


def _is_differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
