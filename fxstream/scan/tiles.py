"""The scan over tiles: forward, and backward as the same scan in reverse.

The schedule says which rows; the rules say how an operation runs on them; this module moves tensors between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from ..errors import StreamingError
from ..geometry.axes import Extent, Value
from ..geometry.schedule import Index, Tile, readers
from ..graph.answers import Step, label, leaves, program
from ..ops import Noise, Sliced, Total, Totals
from .call import Call
from .carry import Placement, Stitch, index_of, stitch
from .fetch import Region, Regions, fetch
from .noise import draw
from .outputs import Accumulated, Output, Whole
from .pieces import Key, Pieces
from .tape import Budget, Source, Sums, Tape, TileGraph, aliases


class Forward(NamedTuple):
    """What the forward scan leaves."""

    results: tuple[torch.Tensor, ...]
    """One of each output."""
    states: list[Totals]
    """What the outputs need for the gradients of their blocks."""
    pieces: dict[Key, torch.Tensor]
    graphs: dict[Tile, TileGraph]
    """Of the tiles that need not be computed again."""


class Scan:
    """The tiles of one call, on given tensors."""

    def __init__(self, call: Call, tensors: Sequence[torch.Tensor]):
        self.call = call
        self.tensors = tensors
        lowered = call.lowered(tensors)
        self.steps, self.results = lowered.steps, lowered.results
        self.grid = call.grid(self.steps)
        self.axes = call.settings.axes
        self.slots = {id(tensor): slot for slot, tensor in enumerate(tensors)}
        self.readers = readers(program(self.steps, self.axes[0]))
        self.dims = [self._dims(Value(step.local.dims)) for step in self.steps]
        self.image_dims = tuple(call.settings.names.index(axis) for axis in self.axes)
        self.outputs = self._outputs()
        self.handed = {output.value for output in self.outputs.values()}
        """The values of which the outputs are made."""
        self.places: dict[tuple[int, int], Placement] = {}
        self.noise: dict[int, torch.Tensor] = {}
        """For a value, the random numbers that its tiles share."""
        self.random = any(isinstance(operand, Noise) for step in self.steps for operand in step.local.operands)

    def _dims(self, value: Value) -> tuple[int, ...]:
        return tuple(value.position(axis) for axis in self.axes)

    def _outputs(self) -> dict[int | Total, Output]:
        """What the graph returns, by what `_key` says of it."""
        found = (leaf for leaf in leaves(self.results) if isinstance(leaf, (Value, Total)))
        return {_key(leaf): self._output(leaf) for leaf in found}

    def _output(self, leaf: Value | Total) -> Output:
        value = leaf.index if isinstance(leaf, Value) else leaf.operand.index
        sizes = dict(zip(self.dims[value - 1], (axis.sizes[value] for axis in self.grid.axes), strict=True))
        return Whole(value, sizes) if isinstance(leaf, Value) else Accumulated(value, sizes, leaf)

    def returned(self, results: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """What the graph returns, with the outputs' results in their places."""
        by_key = dict(zip(self.outputs, results, strict=True))
        fill = lambda leaf: by_key[_key(leaf)] if isinstance(leaf, (Value, Total)) else leaf  # noqa: E731
        return tuple(_as_size(tree_map(fill, result)) for result in self.results)

    def differentiable(self, value: int, tensor: torch.Tensor) -> bool:
        """Whether a gradient for (a part of) the value is of any use."""
        return self.steps[value - 1].differentiable and (tensor.is_floating_point() or tensor.is_complex())

    def forward(self, keep: bool) -> Forward:
        """Compute the outputs and, with `keep`, have what the backward scan needs."""
        pieces = Pieces(self.call.device, self.tensors[0].device, keep)
        graphs: dict[Tile, TileGraph] = {}
        budget = Budget(self.call.settings.memory_budget if keep else 0, self.tensors)
        recording = self._on_aliases() if budget.left else self
        tiles = list(self.grid.tiles())
        with torch.no_grad(), self.call.autocasting():
            for tile, regions in zip(tiles, self._fetch(tiles), strict=True):
                if budget.left:
                    computed = self._afforded(recording._graph, budget, graphs, tile, regions, pieces.held)
                else:
                    computed = self._tile(tile, Source(self.tensors, self.call.device, regions, pieces.held), stitch)
                self._take(tile, *computed, pieces)
                # Nothing of this tile shall be alive while the next one is computed.
                del computed
                pieces.expire(tile)
            pieces.settle()
            results = tuple(output.result() for output in self.outputs.values())
        return Forward(results, [output.state for output in self.outputs.values()], pieces.held, graphs)

    def _afforded(
        self,
        compute: Callable[[Tile, Regions, Mapping[Key, torch.Tensor]], TileGraph],
        budget: Budget,
        graphs: dict[Tile, TileGraph],
        tile: Tile,
        regions: Regions,
        pieces: Mapping[Key, torch.Tensor],
    ) -> tuple[dict[int, torch.Tensor], dict[Key, torch.Tensor]]:
        """Compute a tile with autograd, and add its graph to `graphs` if the budget allows."""
        with budget.counting():
            graph = compute(tile, regions, pieces)
        if budget.affords(graph):
            graphs[tile] = graph
        return graph.blocks, graph.kept

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
        graphs: dict[Tile, TileGraph],
        gradients: Sequence[torch.Tensor | None],
        around: Callable[[Sums], AbstractContextManager[object]] = nullcontext,
    ) -> list[torch.Tensor | None]:
        """Gradients of all tensors, from those of the outputs. The tensors must be leaves of their own.

        A tile whose graph is there is not computed again; `graphs` are used up. Each tile is computed in a context of
        `around`. Raises StreamingError where computing
        tiles again has lost what an output's gradient belongs to.
        """
        for output, state in zip(self.outputs.values(), states, strict=True):
            output.restore(state)
        given = [(output, g) for output, g in zip(self.outputs.values(), gradients, strict=True) if g is not None]
        trained = [slot for slot, tensor in enumerate(self.tensors) if tensor.requires_grad]
        sums = Sums(self.tensors, pieces)
        tiles = list(self.grid.tiles())[::-1]
        fetched = self._fetch([tile for tile in tiles if tile not in graphs])
        for tile in tiles:
            with around(sums):
                graph = graphs.pop(tile) if tile in graphs else self._graph(tile, next(fetched), pieces)
                roots = [
                    (graph.blocks[output.value], self._root(output, tile, graph.blocks[output.value], gradient))
                    for output, gradient in given
                    if output.value in graph.blocks
                ]
                roots += [(piece, sums.owed.pop(key)) for key, piece in graph.kept.items() if key in sums.owed]
                graph.backward(roots, trained, sums)
                # Nothing of this tile shall be alive while the next one is computed.
                del graph, roots
        for output, _ in given:
            if not output.complete():
                raise StreamingError(_LOST.format(label(self.steps[output.value - 1].node)))
        return sums.of_tensors()

    def _root(self, output: Output, tile: Tile, block: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """The gradient that a block gets from an output."""
        return output.gradient(self._fresh(output.value, tile), block.detach(), given)

    def _on_aliases(self) -> Scan:
        """The same scan for tiles whose gradients are not those of the tensors themselves."""
        return Scan(self.call, aliases(self.tensors, [tensor.requires_grad for tensor in self.tensors]))

    def _graph(self, tile: Tile, regions: Regions, pieces: Mapping[Key, torch.Tensor]) -> TileGraph:
        """Compute a tile with autograd."""
        tape = Tape(self.tensors, self.call.device, regions, pieces, self.differentiable)
        with torch.enable_grad(), self.call.autocasting():
            return TileGraph(tape, *self._tile(tile, tape, Stitch.apply))

    def _fetch(self, tiles: Sequence[Tile]) -> Iterator[Regions]:
        plan = [list(dict.fromkeys(self._region(*edge, tile) for edge in self._edges(tile))) for tile in tiles]
        image = self.tensors[0]
        return fetch(lambda region: image[self._cut(region)], image.device, self.call.device, plan)

    def _edges(self, tile: Tile) -> Iterator[tuple[int, int]]:
        """Through which edges values that run in a tile read the image."""
        return (edge for edge in self.readers[0] if self.grid.runs(edge[0], tile))

    def _region(self, value: int, edge: int, tile: Tile) -> Region:
        """What a value reads of the image."""
        return tuple((span.lo, span.hi) for span in self.grid.spans(value, edge, tile))

    def _cut(self, region: Region) -> Index:
        return index_of(tuple(slice(*rows) for rows in region), self.image_dims, self.tensors[0].dim())

    def _tile(
        self, tile: Tile, source: Source, join: Callable[..., Any]
    ) -> tuple[dict[int, torch.Tensor], dict[Key, torch.Tensor]]:
        """Compute one tile: the fresh blocks of the outputs, and what later tiles will need."""
        waiting: dict[tuple[int, int], torch.Tensor] = {}
        blocks: dict[int, torch.Tensor] = {}
        kept: dict[Key, torch.Tensor] = {}
        for value, step in enumerate(self.steps, start=1):
            # Of several results of an operation, not all may be of use.
            used = bool(self.readers[value]) or value in self.handed
            runs = used and self.grid.runs(value, tile)
            block = self._run(value, step, tile, waiting, source) if runs else None
            if block is not None and value in self.handed:
                blocks[value] = block
            place = self._place(value, tile)
            if place.idle:
                continue
            if place.passes:
                reads: Any = [block] * len(place.reads)
            else:
                earlier = (
                    ((value, self.grid.earlier(tile, offset), piece), src) for offset, piece, src, _ in place.parts
                )
                joined = join(place, block, *(source.piece(key, src) for key, src in earlier))
                reads = joined[: len(place.reads)]
                kept.update(
                    ((value, tile, piece), rows)
                    for (piece, _), rows in zip(place.keeps, joined[len(reads) :], strict=True)
                )
            for reader, wanted, read in zip(self.readers[value], place.reads, reads, strict=True):
                if wanted is not None:
                    waiting[reader] = read
        return blocks, kept

    def _run(
        self, value: int, step: Step, tile: Tile, waiting: dict[tuple[int, int], torch.Tensor], source: Source
    ) -> torch.Tensor:
        operands = []
        edge = 0
        for operand in step.local.operands:
            if isinstance(operand, Sliced):
                rows = self._rows(operand.dims, operand.tensor.dim(), value, tile)
                slot = self.slots.get(id(operand.tensor))
                # What a rule has made of a tensor has no slot: its graph leads to the one that has.
                operands.append(operand.tensor[rows] if slot is None else source.tensor(slot, rows))
                continue
            if isinstance(operand, Noise):
                operands.append(self._drawn(operand, value, tile, operands[0]))
                continue
            if operand.index == 0:
                region = self._region(value, edge, tile)
                operands.append(source.image(region, self._cut(region)))
            else:
                operands.append(waiting.pop((value, edge)))
            edge += 1
        streamed = self.grid.spans(value, 0, tile)
        return step.local.run(*operands, *(streamed[span] if isinstance(span, int) else span for span in step.spans))

    def _drawn(self, noise: Noise, value: int, tile: Tile, like: torch.Tensor) -> torch.Tensor:
        """The random numbers for the block of `value`; `like` is a tensor on their device."""
        tags = {index: dim.tag for index, dim in enumerate(noise.dims) if dim.tag is not None}
        rows = self._rows(tags, len(noise.dims), value, tile)
        whole = [int(dim.size) for dim in noise.dims]
        if len(tags) == len(self.axes):
            # No two tiles share any: each draws its own, and none are kept.
            number = value + len(self.readers) * (1 + self.grid.number(tile))
            return draw(self.call.seed, number, noise.draw, torch.empty(whole, device="meta")[rows].shape, like)
        if value not in self.noise:
            self.noise[value] = draw(self.call.seed, value, noise.draw, whole, like)
        return self.noise[value][rows]

    def _rows(self, tags: Mapping[int, str], rank: int, value: int, tile: Tile) -> tuple[slice, ...]:
        """What belongs to the block of `value` of a tensor whose dimensions `tags` run along streamed axes."""
        fresh = dict(zip(self.axes, self.grid.fresh(value, tile), strict=True))
        return tuple(fresh[tags[dim]] if dim in tags else slice(None) for dim in range(rank))

    def _fresh(self, value: int, tile: Tile) -> tuple[slice, ...]:
        """The block of `value` that the tile computes, as an index into the whole value."""
        return index_of(self.grid.fresh(value, tile), self.dims[value - 1], len(self.steps[value - 1].local.dims))

    def _place(self, value: int, tile: Tile) -> Placement:
        layout = self.grid.layout(value, tile)
        key = (value, id(layout))
        if key not in self.places:
            self.places[key] = Placement(layout, self.dims[value - 1], len(self.steps[value - 1].local.dims))
        return self.places[key]


_LOST = (
    "{}: several positions share its greatest or least value, and computing them again in the backward pass gave other "
    "values. Way out: make the operations in front of it deterministic (torch.use_deterministic_algorithms)"
)


def _key(leaf: Value | Total) -> int | Total:
    """What tells outputs apart."""
    return leaf.index if isinstance(leaf, Value) else leaf


def _as_size(result: Any) -> Any:
    """A shape that is handed to the head, as the torch.Size that it would be there."""
    sizes = isinstance(result, tuple) and all(type(size) in (int, Extent) for size in result)
    return torch.Size(map(int, result)) if sizes else result
