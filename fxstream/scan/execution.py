"""Executing the program of a tile: plainly, or with autograd, so that the tile can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..geometry.grid import Index, Tile
from ..ops import Noise
from .call import Call
from .instructions import Join
from .keeping import Collector, Returner
from .noise import draw
from .outputs import Output
from .plan import Plan
from .program import Made, Slot
from .records import Records
from .region import Stitch, Tape
from .sums import IMAGE_SLOT, Leaf


class Shared:
    """What the tiles of a scan share."""

    def __init__(self, call: Call, plan: Plan, tensors: Sequence[torch.Tensor], outputs: Sequence[Output]):
        self.call, self.plan, self.tensors, self.outputs = call, plan, tensors, outputs
        self.trained = plan.program.trained(tensors)
        """For every value, whether it depends on something that requires a gradient."""
        self.likes: dict[int, torch.Tensor] = {}
        """For each value whose type the graph returns an empty tensor of it, once a block has been computed."""
        self._noise: dict[tuple[int, int], torch.Tensor] = {}
        """For a value and the place of a Noise among its operands, the random numbers that its tiles share."""
        self._made: dict[Callable[..., Any], Any] = {}
        """What is made of sizes and tensors and is the same for all tiles, by the function that makes it."""

    def made(self, made: Made, like: torch.Tensor | None) -> Any:
        """What is made of tensors of the call, or of the type of `like`; once, if it is the same for all tiles."""
        if made.make in self._made:
            return self._made[made.make]
        parts = [self.tensors[one.slot] if isinstance(one, Slot) else self.made(one, like) for one in made.parts]
        result = made.make(None if made.like is None else like, *parts)
        if made.like is None and not any(self.tensors[slot].requires_grad for slot in made.slots):
            self._made[made.make] = result
        return result

    def drawn(self, noise: Noise, value: int, place: int, like: torch.Tensor, tile: Tile, rows: Index) -> torch.Tensor:
        """The random numbers for `rows` of a value in a tile: its operand at `place`."""
        whole = [int(dim.size) for dim in noise.dims]
        if sum(dim.tag is not None for dim in noise.dims) == len(self.plan.program.axes):
            # No two tiles share any of these: each tile draws its own, and none are kept.
            number = self._draw_number(value, place, 1 + self.plan.grid.number(tile))
            shape = [len(range(size)[kept]) for size, kept in zip(whole, rows, strict=True)]
            return draw(self.call.seed, number, noise.draw, shape, like)
        if (value, place) not in self._noise:
            number = self._draw_number(value, place, 0)
            self._noise[value, place] = draw(self.call.seed, number, noise.draw, whole, like)
        return self._noise[value, place][rows]

    def _draw_number(self, value: int, place: int, tile: int) -> int:
        """A number of its own for every draw: by value, operand and tile; tile 0 is for what all tiles share."""
        places = max(len(step.operands) for step in self.plan.program.steps)
        return (tile * len(self.plan.readers) + value) * places + place


class Execution:
    """One tile: its registers, what it reads, and where it leaves its results. See `instructions.Run`."""

    records_graph = False
    registers: list[Any]

    def __init__(
        self,
        shared: Shared,
        records: Records,
        tile: Tile,
        regions: Sequence[torch.Tensor],
        keeping: Collector | Returner | None = None,
    ):
        """`regions` are those of the image that the tile reads, on the device that computes.

        `keeping` collects the results of dear kernels or returns them.
        """
        self.shared, self.records, self.tile, self.regions, self.keeping = shared, records, tile, regions, keeping
        program = shared.plan.tile(tile)
        registers = self.registers = [None, *shared.tensors, *[None] * program.registers]
        for instruction in program.instructions:
            instruction(self)
            for register in instruction.frees:
                registers[register] = None
        self.registers, self.keeping = [], None

    def image(self, number: int) -> torch.Tensor:
        return self.regions[number]

    def tensor(self, slot: int, value: int, tags: Mapping[int, int]) -> torch.Tensor:
        tensor = self.shared.tensors[slot]
        return tensor[self.rows(value, tags, tensor.dim())]

    def rows(self, value: int, tags: Mapping[int, int], rank: int) -> Index:
        fresh = self.shared.plan.grid.fresh(value, self.tile)
        return tuple(fresh[tags[dim]] if dim in tags else slice(None) for dim in range(rank))

    def drawn(self, noise: Noise, value: int, place: int, like: torch.Tensor) -> torch.Tensor:
        axes = self.shared.plan.program.axes
        tags = {dim: axes.index(one.tag) for dim, one in enumerate(noise.dims) if one.tag is not None}
        rows = self.rows(value, tags, len(noise.dims))
        return self.shared.drawn(noise, value, place, like, self.tile, rows)

    def made(self, made: Made, like: torch.Tensor | None) -> Any:
        return self.shared.made(made, like)

    def join(self, join: Join, block: torch.Tensor | None, whole: torch.Tensor | None) -> Sequence[torch.Tensor]:
        taken = join.region.taken(block, self.records, self.tile, whole)
        if block is not None:
            join.region.keep(block, self.records, self.tile)
        return taken

    def emit(self, number: int, value: int, block: torch.Tensor) -> None:
        self.shared.outputs[number].add(self.shared.plan.fresh(value, self.tile), block)

    def note(self, value: int, block: torch.Tensor) -> None:
        self.shared.likes[value] = block.new_empty(0)


class Recorded(Execution):
    """A tile that is computed with autograd, and its graph.

    What it reads of the image and of sliced tensors are leaves of the graph, whose gradients are added up afterwards.
    """

    records_graph = True

    def __init__(
        self,
        shared: Shared,
        records: Records,
        tile: Tile,
        regions: Sequence[torch.Tensor],
        keeping: Collector | Returner | None = None,
    ):
        self.leaves: list[Leaf] = []
        self.blocks: list[tuple[int, int, torch.Tensor]] = []
        """The blocks of the outputs: the place of the output, its value, and the block."""
        self._tape = Tape(records, tile)
        self.begin = self._end = torch.zeros((), requires_grad=True)
        """A leaf on which all joins depend; and what depends on all joins that keep rows. If it is differentiated, too,
        each of these finds what it is owed."""
        with torch.enable_grad(), shared.call.autocasting():
            super().__init__(shared, records, tile, regions, keeping)

    def image(self, number: int) -> torch.Tensor:
        rows = super().image(number)
        if not self.shared.tensors[IMAGE_SLOT].requires_grad:
            return rows
        return self._leaf(rows, IMAGE_SLOT, self.shared.plan.regions(self.tile)[number])

    def tensor(self, slot: int, value: int, tags: Mapping[int, int]) -> torch.Tensor:
        rows, tensor = super().tensor(slot, value, tags), self.shared.tensors[slot]
        return self._leaf(rows, slot, self.rows(value, tags, tensor.dim())) if tensor.requires_grad else rows

    def _leaf(self, rows: torch.Tensor, slot: int, index: Index) -> torch.Tensor:
        leaf = rows.detach().requires_grad_()
        self.leaves.append(Leaf(leaf, slot, index))
        return leaf

    def join(self, join: Join, block: torch.Tensor | None, whole: torch.Tensor | None) -> Sequence[torch.Tensor]:
        region = join.region
        # Otherwise those who read it would compute gradients that nobody wants.
        if not self.shared.trained[region.value] or (block is not None and not _is_differentiable(block)):
            return region.taken(block, self.records, self.tile, recorded=True)
        taken: list[torch.Tensor]
        *taken, end = Stitch.apply(region, self._tape, self._end, block)
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

    def __init__(
        self,
        shared: Shared,
        records: Records,
        tile: Tile,
        regions: Sequence[torch.Tensor],
        keeping: Collector | Returner | None = None,
    ):
        super().__init__(shared, records, tile, regions, keeping)
        # The backward scan has records of its own.
        self._tape.records = self.records = None  # type: ignore[assignment]

    def join(self, join: Join, block: torch.Tensor | None, whole: torch.Tensor | None) -> Sequence[torch.Tensor]:
        if block is not None:
            join.region.keep(block.detach(), self.records, self.tile)
        return super().join(join, block, whole)

    def emit(self, number: int, value: int, block: torch.Tensor) -> None:
        super().emit(number, value, block)
        Execution.emit(self, number, value, block.detach())


def _is_differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
