"""The plan of a call: its tiles, and for every kind of tile a program, which is compiled once and replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ..geometry.axes import IMAGE, Value
from ..geometry.grid import Index, Layout, Tile
from ..geometry.schedule import readers
from ..geometry.window import Span
from ..graph.nodes import label, leaves
from ..ops import Noise, Total
from .instructions import NOTHING, Compute, Draw, Emit, Instruction, Join, Load, Make, Note, Slice
from .program import Edge, Made, Operand, Program, Slot, Step
from .region import Region, index_of

MOST_PLANS = 4
"""How many plans are kept with a program: a model is rarely called with tiles of many sizes."""


class TileProgram:
    """What the tiles of one kind do: a flat list of instructions. `print` shows them."""

    def __init__(self, loads: Sequence[Index], instructions: Sequence[Instruction], registers: int, tensors: int):
        """`loads` are the regions of the image that the tile reads, counted from the first row of the first.

        `registers` is how many there are besides those of the `tensors` of the call.
        """
        self.loads, self.instructions, self.registers = loads, tuple(instructions), registers
        first = NOTHING + 1 + tensors
        read: set[int] = set()
        for instruction in reversed(self.instructions):
            used = {*instruction.reads, *instruction.writes}
            instruction.frees = tuple(sorted(register for register in used - read if register >= first))
            read |= used

    def __str__(self) -> str:
        return "\n".join(map(str, self.instructions))


class Plan:
    """The tiles of a program on an image of one size, and what they do.

    Attributes:
        grid: the tiles.
        outputs: what the scan returns: values and totals, each once.
        typing: the values whose types the graph returns, or tensors of these types.
    """

    def __init__(self, program: Program, tiles: Sequence[int], tensors: int):
        """`tensors` is how many a call has."""
        self.program = program
        self.grid = program.grid(tiles)
        self.tensors = tensors
        found = [leaf for returned in program.returns for leaf in leaves(returned)]
        self.outputs = list(dict.fromkeys(key_of(leaf) for leaf in found if isinstance(leaf, (Value, Total))))
        self.typing = {leaf.like for leaf in found if isinstance(leaf, Made)} - {None}
        self._handed: dict[int, list[int]] = {}
        for number, output in enumerate(self.outputs):
            self._handed.setdefault(output if isinstance(output, int) else output.operand.index, []).append(number)
        self._kinds = [max(axis.kinds) + 1 for axis in self.grid.axes]
        total = 1
        for count in self._kinds:
            total *= count
        self._regions: dict[tuple[int, ...], tuple[Layout, Sequence[Index], Region | None]] = {}
        """By a value and what the tile's step of every axis does with it."""
        self._programs: list[TileProgram | None] = [None] * total
        """By the kind of the tile."""

    @cached_property
    def readers(self) -> list[list[tuple[int, int]]]:
        """For each value its readers as (value, edge), in the order in which they run."""
        return readers(self.program.axis_graph(self.program.axes[0]))

    def tile(self, tile: Tile) -> TileProgram:
        """The program of a tile."""
        place = 0
        for axis, step, count in zip(self.grid.axes, tile, self._kinds, strict=True):
            place = place * count + axis.kinds[step]
        found = self._programs[place]
        if found is None:
            found = self._programs[place] = _Compiler(self, tile).compiled()
        return found

    def region(self, value: int, tile: Tile) -> tuple[Layout, Sequence[Index], Region | None]:
        """How a tile treats the region of a value: its layout, the rows that are taken of it besides the fresh block,
        and how it is put together if that is needed."""
        key = (value, *(axis.alike[value][step] for axis, step in zip(self.grid.axes, tile, strict=True)))
        if key not in self._regions:
            layout = self.grid.layout(value, tile)
            taken = [read for read in _distinct(layout.reads) if read != layout.own]
            dims = self.program.positions[value]
            needed = taken or layout.keeps
            region = Region(value, layout, taken, self.grid, tile, self.shape(value), dims) if needed else None
            self._regions[key] = (layout, taken, region)
        return self._regions[key]

    def fresh(self, value: int, tile: Tile) -> tuple[slice, ...]:
        """The block of `value` that the tile computes, as an index into the whole value."""
        return index_of(self.grid.fresh(value, tile), self.program.positions[value], len(self.program.dims(value)))

    def regions(self, tile: Tile) -> list[tuple[slice, ...]]:
        """The regions of the image that a tile reads, as indices into the whole image."""
        origin = self.grid.origin(IMAGE, tile)
        positions, rank = self.program.positions[IMAGE], len(self.program.image.dims)
        return [index_of(_moved(read, origin), positions, rank) for read in self.tile(tile).loads]

    def shape(self, value: int) -> tuple[int, ...]:
        """The shape of a whole value."""
        shape = [dim.size for dim in self.program.dims(value)]
        for position, axis in zip(self.program.positions[value], self.grid.axes, strict=True):
            shape[position] = axis.sizes[value]
        return tuple(map(int, shape))


def planned(program: Program, tiles: tuple[int, ...], tensors: int) -> Plan:
    """The plan of a program for tiles of some sizes; one of the latest, if it is among these."""
    plan: Plan = program.plans.pop(tiles, None) or Plan(program, tiles, tensors)
    program.plans[tiles] = plan
    for old in list(program.plans)[:-MOST_PLANS]:
        program.plans.pop(old, None)
    return plan


class _Compiler:
    """Compiles the program of a tile."""

    def __init__(self, plan: Plan, tile: Tile):
        self.plan, self.tile = plan, tile
        self.first = self.next = NOTHING + 1 + plan.tensors
        self.instructions: list[Instruction] = []
        self.blocks: dict[int, int] = {}
        """Value -> the register of its block."""
        self.reads: dict[tuple[int, int], int] = {}
        """(value, edge) -> the register of what it reads."""

    def compiled(self) -> TileProgram:
        plan = self.plan
        loads = self._load_image()
        for value, step in plan.program.computed():
            handed = plan._handed.get(value, [])
            # Of several results of an operation, some may be of no use.
            used = bool(plan.readers[value]) or bool(handed) or value in plan.typing
            block = NOTHING
            if used and plan.grid.runs(value, self.tile):
                block = self._compute(value, step)
                self.instructions += [Emit(block, number, value) for number in handed]
                self.instructions += [Note(block, value)] if value in plan.typing else []
            self._join(value, step, block)
        return TileProgram(loads, self.instructions, self.next - self.first, plan.tensors)

    def _register(self) -> int:
        self.next += 1
        return self.next - 1

    def _load_image(self) -> Sequence[Index]:
        layout = self.plan.grid.layout(IMAGE, self.tile)
        taken = _distinct(layout.reads)
        registers = [self._register() for _ in taken]
        self.instructions += map(Load, registers, range(len(taken)), taken)
        self._hand_out(IMAGE, layout, taken, registers, NOTHING)
        return taken

    def _hand_out(
        self, value: int, layout: Layout, taken: Sequence[Index], registers: Sequence[int], block: int
    ) -> None:
        """Let readers find what is `taken` of a region in these registers, and all else in that of the block."""
        for reader, read in zip(self.plan.readers[value], layout.reads, strict=True):
            if read is not None:
                self.reads[reader] = registers[taken.index(read)] if read in taken else block

    def _compute(self, value: int, step: Step) -> int:
        args = self._args(value, step)
        spans: list[Any] = []
        for span in step.spans:
            spans.append(span if isinstance(span, Span) else (span, self.plan.grid.axes[span].spans[value]))
        out = self._register()
        self.instructions.append(Compute(out, value, step.node.name, step.local.run, args, spans))
        return out

    def _args(self, value: int, step: Step) -> list[int]:
        """The registers of the operands."""
        edges = {one.number: self.reads[value, one.number] for one in step.operands if isinstance(one, Edge)}
        types = {one.value: edges[one.number] for one in step.operands if isinstance(one, Edge)}
        return [self._arg(value, place, operand, edges, types) for place, operand in enumerate(step.operands)]

    def _arg(self, value: int, place: int, operand: Operand, edges: Mapping[int, int], types: Mapping[int, int]) -> int:
        """The register of an operand; `edges` are those of the values among them by number, `types` by value."""
        if operand is None:
            return NOTHING
        if isinstance(operand, Edge):
            return edges[operand.number]
        if isinstance(operand, Slot) and not operand.dims:
            return NOTHING + 1 + operand.slot
        out = self._register()
        if isinstance(operand, Noise):
            self.instructions.append(Draw(out, operand, value, place, edges[0]))
            return out
        tags = {dim: self.plan.program.axes.index(tag) for dim, tag in operand.dims.items()}
        if isinstance(operand, Slot):
            self.instructions.append(Slice(out, operand.slot, value, tags))
        else:
            like = NOTHING if operand.like is None else types[operand.like]
            self.instructions.append(Make(out, operand, like, value, tags))
        return out

    def _join(self, value: int, step: Step, block: int) -> None:
        layout, taken, region = self.plan.region(value, self.tile)
        registers = [self._register() for _ in taken]
        self._hand_out(value, layout, taken, registers, block)
        if region is None:
            return
        whole, computed = NOTHING, self.instructions[-1] if self.instructions else None
        # Not where a reader, or an output, gets the block itself.
        only_joined = layout.own is not None and layout.own not in layout.reads
        if step.local.into and only_joined and region.reads and region.parts and isinstance(computed, Compute):
            whole = self._register()
            computed.write_into(region, whole, step.local.into)
        self.instructions.append(Join(registers, block, region, label(step.node), whole))


def key_of(leaf: Value | Total) -> int | Total:
    """What tells outputs apart."""
    return leaf.index if isinstance(leaf, Value) else leaf


def _distinct(reads: Sequence[Index | None]) -> list[Index]:
    """Each read once."""
    found: list[Index] = []
    for read in reads:
        if read is not None and read not in found:
            found.append(read)
    return found


def _moved(rows: Index, origin: Sequence[int]) -> Index:
    return tuple(slice(kept.start + first, kept.stop + first) for kept, first in zip(rows, origin, strict=True))
