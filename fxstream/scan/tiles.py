"""The scan over tiles: forward, and backward as the same scan in reverse.

The grid says which rows, and the rules say how an operation runs on them. This module moves tensors between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from ..errors import StreamingError
from ..geometry.axes import IMAGE, Extent, Multiple, Value
from ..geometry.grid import Index, Tile
from ..geometry.schedule import readers
from ..graph.nodes import label, leaves
from ..ops import Noise, Total, Totals
from .budget import Budget
from .call import Call
from .carry import Stitch, TensorLayout, index_of, stitch
from .fetch import Region, Regions, fetch
from .noise import draw
from .outputs import Accumulated, Output, Whole
from .pieces import Key, Pieces
from .program import Edge, Made, Slot, Step
from .sums import Sums
from .tape import IMAGE_SLOT, RecordedTile, Source, Tape, detached_leaves


class Forward(NamedTuple):
    """What the forward scan leaves."""

    outputs: tuple[torch.Tensor, ...]
    states: list[Totals]
    """For each output, what the gradients of its blocks need."""
    pieces: dict[Key, torch.Tensor]
    recorded: dict[Tile, RecordedTile]
    """The tiles that need not be computed again."""


class Scan:
    """The tiles of one call, computed with the call's tensors or with leaves that share their memory."""

    def __init__(self, call: Call, tensors: Sequence[torch.Tensor]):
        self.call = call
        self.tensors = tensors
        self.program = call.program(tensors)
        self.grid = self.program.grid(call.tiles)
        self.axes = self.program.axes
        self.trained = [slot for slot, tensor in enumerate(tensors) if tensor.requires_grad]
        """The places of the tensors that require a gradient."""
        self.made: dict[Callable[..., Any], Any] = {}
        """What is made of sizes and tensors and is the same for all tiles, by the function that makes it."""
        self.readers = readers(self.program.axis_graph(self.axes[0]))
        """For each value its readers as (value, edge), in the order in which they run."""
        self.outputs = self._outputs()
        self.handed = {output.value for output in self.outputs.values()}
        """The values of which the outputs are made."""
        self.typing = {leaf.like for leaf in leaves(self.program.returns) if isinstance(leaf, Made)}
        """The values whose types the graph returns, or tensors of these types."""
        self.likes: dict[int, torch.Tensor] = {}
        """For each of these values an empty tensor of its type, once a block has been computed."""
        self.layouts: dict[tuple[int, int], TensorLayout] = {}
        self.noise: dict[tuple[int, int], torch.Tensor] = {}
        """For a value and the place of a Noise among its operands, the random numbers that its tiles share."""
        self.random = any(isinstance(operand, Noise) for step in self.program.steps for operand in step.operands)

    def _outputs(self) -> dict[int | Total, Output]:
        """What the graph returns, by what `_key` says of it."""
        found = (leaf for leaf in leaves(self.program.returns) if isinstance(leaf, (Value, Total)))
        return {_key(leaf): self._output(leaf) for leaf in found}

    def _output(self, leaf: Value | Total) -> Output:
        value = leaf.index if isinstance(leaf, Value) else leaf.operand.index
        lengths = (axis.sizes[value] for axis in self.grid.axes)
        sizes = dict(zip(self.program.positions[value], lengths, strict=True))
        return Whole(value, sizes) if isinstance(leaf, Value) else Accumulated(value, sizes, leaf)

    def filled(self, outputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """What the graph returns, with the output tensors in their places."""
        by_key = dict(zip(self.outputs, outputs, strict=True))

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Slot):
                return self.tensors[leaf.slot]
            if isinstance(leaf, Made):
                return self._made(leaf, self.likes)
            if isinstance(leaf, (Extent, Multiple)):
                return int(leaf)
            return by_key[_key(leaf)] if isinstance(leaf, (Value, Total)) else leaf

        return tuple(_as_size(tree_map(fill, returned)) for returned in self.program.returns)

    def differentiable(self, value: int, tensor: torch.Tensor) -> bool:
        """Whether a gradient for `tensor`, (part of) the value, is of any use."""
        numeric = tensor.is_floating_point() or tensor.is_complex()
        return numeric and self.program.step_of(value).differentiable

    def forward(self, keep: bool) -> Forward:
        """Compute the outputs; with `keep`, also what the backward scan needs."""
        pieces = Pieces(self.call.device, self.tensors[IMAGE_SLOT].device, keep)
        recorded: dict[Tile, RecordedTile] = {}
        budget = Budget(self.call.budget if keep else 0, self.tensors)
        recording = self._on_leaves() if budget.left else self
        tiles = list(self.grid.tiles())
        with torch.no_grad(), self.call.autocasting():
            for tile, regions in zip(tiles, self._fetch(tiles), strict=True):
                if budget.left:
                    computed = recording._afforded(budget, recorded, tile, regions, pieces.held)
                else:
                    computed = self._compute(tile, Source(self.tensors, self.call.device, regions, pieces.held), stitch)
                self._take(tile, *computed, pieces)
                # Nothing of this tile may be alive while the next one is computed.
                del computed
                pieces.expire(tile)
            pieces.settle()
            outputs = tuple(output.result() for output in self.outputs.values())
        return Forward(outputs, [output.state for output in self.outputs.values()], pieces.held, recorded)

    def _afforded(
        self,
        budget: Budget,
        recorded: dict[Tile, RecordedTile],
        tile: Tile,
        regions: Regions,
        pieces: Mapping[Key, torch.Tensor],
    ) -> tuple[dict[int, torch.Tensor], dict[Key, torch.Tensor]]:
        """Compute a tile with autograd, and add it to `recorded` if the budget allows."""
        with budget.counting():
            done = self._record(tile, regions, pieces)
        if budget.affords(done):
            recorded[tile] = done
        return done.blocks, done.kept

    def _take(
        self,
        tile: Tile,
        blocks: Mapping[int, torch.Tensor],
        kept: Mapping[Key, torch.Tensor],
        pieces: Pieces,
    ) -> None:
        """Give the blocks of a tile to the outputs, and file what later tiles need."""
        for output in self.outputs.values():
            if output.value in blocks:
                output.add(self._fresh(output.value, tile), blocks[output.value].detach())
        for key, piece in kept.items():
            pieces.add(key, piece, self.grid.expiry(*key))

    def backward(
        self,
        states: Sequence[Totals],
        pieces: Mapping[Key, torch.Tensor],
        recorded: dict[Tile, RecordedTile],
        gradients: Sequence[torch.Tensor | None],
    ) -> list[torch.Tensor | None]:
        """Gradients of all tensors, from those of the outputs. The tensors must be detached leaves.

        `states`, `pieces` and `recorded` are what the forward scan has left; `recorded` is used up. Raises
        StreamingError if computing tiles again does not find the positions to which an output's gradient belongs.
        """
        for output, state in zip(self.outputs.values(), states, strict=True):
            output.restore(state)
        given = [(output, g) for output, g in zip(self.outputs.values(), gradients, strict=True) if g is not None]
        sums = Sums(self.tensors, pieces)
        tiles = list(self.grid.tiles())[::-1]
        fetched = self._fetch([tile for tile in tiles if tile not in recorded])
        for tile in tiles:
            done = recorded.pop(tile, None)
            self._backward_tile(tile, done, fetched, pieces, given, sums=sums)
        for output, _ in given:
            if not output.complete():
                raise StreamingError(_LOST.format(label(self.program.step_of(output.value).node)))
        return sums.of_tensors()

    def _backward_tile(
        self,
        tile: Tile,
        done: RecordedTile | None,
        fetched: Iterator[Regions],
        pieces: Mapping[Key, torch.Tensor],
        given: Sequence[tuple[Output, torch.Tensor]],
        *,
        sums: Sums,
    ) -> None:
        """Add the gradients of one tile to the sums; compute the tile again unless it is `done`."""
        if done is None:
            done = self._record(tile, next(fetched), pieces)
        roots = [
            (block, output.gradient(self._fresh(output.value, tile), block.detach(), gradient))
            for output, gradient in given
            if (block := done.blocks.get(output.value)) is not None
        ]
        roots += [(piece, sums.owed.pop(key)) for key, piece in done.kept.items() if key in sums.owed]
        done.backward(roots, self.trained, sums.adding)

    def _on_leaves(self) -> Scan:
        """The same scan with leaves of its own, so that the gradients of its tiles do not reach the call's tensors."""
        scan = Scan(self.call, detached_leaves(self.tensors, [tensor.requires_grad for tensor in self.tensors]))
        scan.likes = self.likes
        return scan

    def _record(self, tile: Tile, regions: Regions, pieces: Mapping[Key, torch.Tensor]) -> RecordedTile:
        """Compute a tile with autograd."""
        tape = Tape(self.tensors, self.call.device, regions, pieces, self.differentiable)
        with torch.enable_grad(), self.call.autocasting():
            return RecordedTile(tape, *self._compute(tile, tape, Stitch.apply))

    def _fetch(self, tiles: Sequence[Tile]) -> Iterator[Regions]:
        """For each tile the regions of the image that it reads."""
        wanted = [list(dict.fromkeys(self._region(*edge, tile) for edge in self._edges(tile))) for tile in tiles]
        image = self.tensors[IMAGE_SLOT]
        return fetch(lambda region: image[self._index(region)], image.device, self.call.device, wanted)

    def _edges(self, tile: Tile) -> Iterator[tuple[int, int]]:
        """Through which edges values that run in a tile read the image."""
        return (edge for edge in self.readers[IMAGE] if self.grid.runs(edge[0], tile))

    def _region(self, value: int, edge: int, tile: Tile) -> Region:
        """What a value reads of the image through an edge."""
        return tuple((span.lo, span.hi) for span in self.grid.spans(value, edge, tile))

    def _index(self, region: Region) -> Index:
        """A region as an index into the whole image."""
        return self._index_of(IMAGE, tuple(slice(*rows) for rows in region))

    def _compute(
        self, tile: Tile, source: Source, join: Callable[..., Any]
    ) -> tuple[dict[int, torch.Tensor], dict[Key, torch.Tensor]]:
        """Compute one tile: the fresh blocks of the outputs, and what later tiles will need.

        `join` is `stitch`, or its differentiable form.
        """
        waiting: dict[tuple[int, int], torch.Tensor] = {}
        blocks: dict[int, torch.Tensor] = {}
        kept: dict[Key, torch.Tensor] = {}
        for value, step in self.program.computed():
            # Of several results of an operation, some may be of no use.
            used = bool(self.readers[value]) or value in self.handed or value in self.typing
            runs = used and self.grid.runs(value, tile)
            block = self._run(value, step, tile, waiting, source) if runs else None
            if block is not None and value in self.handed:
                blocks[value] = block
            if block is not None and value in self.typing:
                self.likes[value] = block.new_empty(0)
            layout = self._layout(value, tile)
            if layout.idle:
                continue
            count = len(layout.reads)
            if layout.is_block:
                reads: Sequence[torch.Tensor | None] = [block] * count
            else:
                earlier = (
                    source.piece((value, self.grid.earlier(tile, offset), axis), src)
                    for offset, axis, src, _ in layout.parts
                )
                joined = join(layout, block, *earlier)
                reads = joined[:count]
                for (axis, _), rows in zip(layout.keeps, joined[count:], strict=True):
                    kept[value, tile, axis] = rows
            for reader, wanted, read in zip(self.readers[value], layout.reads, reads, strict=True):
                if wanted is not None and read is not None:
                    waiting[reader] = read
        return blocks, kept

    def _run(
        self, value: int, step: Step, tile: Tile, waiting: dict[tuple[int, int], torch.Tensor], source: Source
    ) -> torch.Tensor:
        """Run a step on what its operands have for this tile. `waiting` are the blocks that its readers wait for."""
        blocks: dict[int, torch.Tensor] = {}
        """By number, those of the values among the operands."""
        for operand in step.operands:
            if isinstance(operand, Edge) and operand.value == IMAGE:
                region = self._region(value, operand.number, tile)
                blocks[operand.number] = source.image(region, self._index(region))
            elif isinstance(operand, Edge):
                blocks[operand.number] = waiting.pop((value, operand.number))
        types = {one.value: blocks[one.number] for one in step.operands if isinstance(one, Edge)}
        operands: list[Any] = []
        for operand in step.operands:
            if isinstance(operand, Edge):
                operands.append(blocks[operand.number])
            elif isinstance(operand, Slot) and not operand.dims:
                operands.append(source.tensors[operand.slot])
            elif isinstance(operand, Slot):
                rows = self._rows(operand.dims, self.tensors[operand.slot].dim(), value, tile)
                operands.append(source.tensor(operand.slot, rows))
            elif isinstance(operand, Noise):
                operands.append(self._drawn(operand, value, len(operands), tile, blocks[0]))
            elif isinstance(operand, Made):
                made = self._made(operand, types)
                rows = self._rows(operand.dims, made.dim(), value, tile) if operand.dims else ()
                operands.append(made[rows] if operand.dims else made)
            else:
                operands.append(None)
        streamed = self.grid.spans(value, 0, tile)
        return step.local.run(*operands, *(streamed[span] if isinstance(span, int) else span for span in step.spans))

    def _made(self, operand: Made, types: Mapping[int, torch.Tensor]) -> Any:
        """What is made of tensors of the call, or of the types of values; once, if it is the same for all tiles."""
        if operand.make in self.made:
            return self.made[operand.make]
        parts = (self.tensors[one.slot] if isinstance(one, Slot) else self._made(one, types) for one in operand.parts)
        made = operand.make(None if operand.like is None else types[operand.like], *parts)
        if operand.like is None and not any(self.tensors[slot].requires_grad for slot in operand.slots):
            self.made[operand.make] = made
        return made

    def _drawn(self, noise: Noise, value: int, place: int, tile: Tile, like: torch.Tensor) -> torch.Tensor:
        """The random numbers for the block of `value`: its operand at `place`. `like` is a tensor on their device."""
        tags = {index: dim.tag for index, dim in enumerate(noise.dims) if dim.tag is not None}
        rows = self._rows(tags, len(noise.dims), value, tile)
        whole = [int(dim.size) for dim in noise.dims]
        if len(tags) == len(self.axes):
            # No two tiles share any of these: each tile draws its own, and none are kept.
            number = self._draw_number(value, place, 1 + self.grid.number(tile))
            shape = [len(range(size)[kept]) for size, kept in zip(whole, rows, strict=True)]
            return draw(self.call.seed, number, noise.draw, shape, like)
        key = (value, place)
        if key not in self.noise:
            self.noise[key] = draw(self.call.seed, self._draw_number(value, place, 0), noise.draw, whole, like)
        return self.noise[key][rows]

    def _draw_number(self, value: int, place: int, tile: int) -> int:
        """A number of its own for every draw: by value, operand and tile; tile 0 is for what all tiles share."""
        places = max(len(step.operands) for step in self.program.steps)
        return (tile * len(self.readers) + value) * places + place

    def _rows(self, tags: Mapping[int, str], rank: int, value: int, tile: Tile) -> tuple[slice, ...]:
        """The index into a tensor that selects what belongs to the block of `value`.

        `tags` says which of the tensor's dimensions are streamed axes.
        """
        fresh = dict(zip(self.axes, self.grid.fresh(value, tile), strict=True))
        return tuple(fresh[tags[dim]] if dim in tags else slice(None) for dim in range(rank))

    def _fresh(self, value: int, tile: Tile) -> tuple[slice, ...]:
        """The block of `value` that the tile computes, as an index into the whole value."""
        return self._index_of(value, self.grid.fresh(value, tile))

    def _index_of(self, value: int, rows: Index) -> tuple[slice, ...]:
        """Slices of the streamed axes as an index into (part of) a value."""
        return index_of(rows, self.program.positions[value], len(self.program.dims(value)))

    def _layout(self, value: int, tile: Tile) -> TensorLayout:
        layout = self.grid.layout(value, tile)
        key = (value, id(layout))
        if key not in self.layouts:
            self.layouts[key] = TensorLayout(layout, self.program.positions[value], len(self.program.dims(value)))
        return self.layouts[key]


_LOST = (
    "{}: several positions share its greatest or least value, and computing them again in the backward pass gave other "
    "values. Way out: make the operations in front of it deterministic (torch.use_deterministic_algorithms)"
)


def _key(leaf: Value | Total) -> int | Total:
    """What tells outputs apart."""
    return leaf.index if isinstance(leaf, Value) else leaf


def _as_size(returned: Any) -> Any:
    """A shape that is handed to the head, as the torch.Size that it would be there."""
    sizes = isinstance(returned, tuple) and all(type(size) is int for size in returned)
    return torch.Size(returned) if sizes else returned
