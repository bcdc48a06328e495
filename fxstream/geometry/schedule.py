"""The schedule: which rows of which value are computed, kept and read at every step. Integers only, no torch.

A *program* lists the values of the streamed part in topological order, the image first, each as the edges
`(producer, window)` that it reads along one axis. `schedule` plans one axis; `Grid` combines the planned axes
into tiles. Along one axis, after step `t`:

    frontier[v][t]   rows [0, frontier) of value v are computed
    tail[v][t]       rows [tail, frontier) of value v are needed by a later step: its carry

A tile computes the *fresh* block of every value, rows [frontier[t], frontier[t+1]) on every axis. What a later
tile needs of it is kept in *pieces*, one per axis and disjoint: piece `d` holds the rows that axis `d` carries,
of those that no axis before `d` carries. So a position is stored once, however many tiles read it, corners included.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

from .window import Span, Window

Edges = tuple[tuple[int, Window], ...]
Program = tuple[Edges, ...]
Range = tuple[int, int]
Tile = tuple[int, ...]
Index = tuple[slice, ...]


THIN = 12
"""Values of fewer rows a step than a tile's divided by this, and by two, do not advance at every step."""


class SizeError(ValueError):
    """Value `value` of the program has no rows, or rows that do not fit together."""

    def __init__(self, value: int, reason: str):
        super().__init__(reason)
        self.value = value


class Past(NamedTuple):
    """Rows of an earlier step: rows `src` of the block that was computed `offset` steps ago, at `dst` of the region."""

    offset: int
    src: Range
    skip: int
    """So many rows at the beginning of that block were not kept."""
    dst: Range


@dataclass(frozen=True, eq=False)
class AxisStep:
    """One value at one step of one axis. The region is rows [tail[t], frontier[t+1]): carry and fresh block.

    Most steps are alike; `_alike` makes those that are one object, so that layouts are found by identity.
    """

    extent: int
    """Rows of the region."""
    fresh: int
    """Rows of the block that this step computes, the last ones of the region."""
    passing: int
    """Rows of the block that no later step reads; the others are kept."""
    past: tuple[Past, ...]
    """Where the rows before the block come from."""
    reads: tuple[Range | None, ...]
    """What each reader takes of the region; None for one that does not run."""


@dataclass(frozen=True)
class Axis:
    """The schedule of one axis. Lists are indexed [value] or [value][step]."""

    sizes: list[int]
    frontier: list[list[int]]
    tail: list[list[int]]
    spans: list[list[tuple[Span, ...] | None]]
    """Per edge of the value; None at a step that computes nothing of it."""
    steps: list[list[AxisStep]]
    last: list[list[int]]
    """The last step that needs rows which the value's step computed."""

    @property
    def count(self) -> int:
        """Number of steps."""
        return len(self.frontier[0]) - 1

    def fresh(self, value: int, step: int) -> slice:
        """The rows of `value` that `step` computes, in the whole value."""
        return slice(self.frontier[value][step], self.frontier[value][step + 1])


def readers(program: Program) -> list[list[tuple[int, int]]]:
    """For every value its readers as (value, edge), in the order in which they run."""
    found: list[list[tuple[int, int]]] = [[] for _ in program]
    for value, edges in enumerate(program):
        for edge, (producer, _) in enumerate(edges):
            found[producer].append((value, edge))
    return found


@lru_cache(maxsize=64)
def schedule(program: Program, size: int, tile: int) -> Axis:
    """Plan an axis of `size` image rows of which about `tile` enter per step. Raises SizeError."""
    sizes = _sizes(program, size)
    frontier = _frontier(program, sizes, tile)
    tail = _tail(program, sizes, frontier)
    spans = [
        [
            tuple(window.span(start, stop, sizes[producer]) for producer, window in edges) if stop > start else None
            for start, stop in pairwise(rows)
        ]
        for edges, rows in zip(program, frontier, strict=True)
    ]
    steps = [
        [
            _axis_step(frontier[value], tail[value], step, _reads(spans, who, step))
            for step in range(len(frontier[0]) - 1)
        ]
        for value, who in enumerate(readers(program))
    ]
    last = [
        [bisect_left(firsts, done, hi=len(firsts) - 1) - 1 for done in rows[1:]]
        for rows, firsts in zip(frontier, tail, strict=True)
    ]
    return Axis(sizes, frontier, tail, spans, steps, last)


def _sizes(program: Program, size: int) -> list[int]:
    sizes: list[int] = []
    for value, edges in enumerate(program):
        try:
            found = {window.size(sizes[producer]) for producer, window in edges} or {size}
        except ValueError as error:
            raise SizeError(value, str(error)) from None
        if len(found) > 1:
            raise SizeError(value, f"its operands have {' and '.join(map(str, sorted(found)))} rows")
        sizes.append(found.pop())
    return sizes


def _frontier(program: Program, sizes: list[int], tile: int) -> list[list[int]]:
    """Let every value advance as far as its inputs allow, but neither in thin steps nor all of a long lag at once."""
    count = -(-sizes[0] // tile)
    # Equal steps: a thin last tile costs nearly as much time as a whole one.
    image = [-(-sizes[0] * step // count) for step in range(1, count + 1)]
    paces = [_pace(size, count, tile) for size in sizes]
    frontier = [[0] for _ in program]
    while any(rows[-1] < size for rows, size in zip(frontier, sizes, strict=True)):
        for value, edges in enumerate(program):
            rows = frontier[value]
            if edges:
                ready = min(window.ready(frontier[producer][-1], sizes[producer]) for producer, window in edges)
                rows.append(paces[value].advance(rows[-1], ready, sizes[value]))
            else:
                rows.append(image[min(len(rows), count) - 1])
    return frontier


class _Pace(NamedTuple):
    """By how many rows a value advances in a step, if it does."""

    least: int
    most: int

    def advance(self, done: int, ready: int, size: int) -> int:
        """How far a value of `size` rows, `done` of which are computed, advances when it could advance to `ready`."""
        reach = max(done, min(ready, done + self.most))
        return reach if ready == size or reach - done >= self.least else done


def _pace(size: int, count: int, tile: int) -> _Pace:
    """The pace of a value of `size` rows.

    Values far smaller than the image rest for some steps and then do the rows of all of them: a step has a price of its
    own, that of reading an operation's weights and writing their gradients, whose share would be large.
    """
    rests = max(1, tile * count // (THIN * size))
    natural = -(-size * rests // count)
    # Half a step more than that: a short lag then ends with the last step instead of taking another.
    return _Pace(-(-3 * natural // 4) if rests > 1 else 1, -(-3 * natural // 2))


def _tail(program: Program, sizes: list[int], frontier: list[list[int]]) -> list[list[int]]:
    """The first row that any reader's next output reads; the frontier where there is none."""
    tail = [list(rows) for rows in frontier]
    for value, edges in enumerate(program):
        for step, done in enumerate(frontier[value]):
            if done == sizes[value]:
                continue
            for producer, window in edges:
                lo = window.span(done, done + 1, sizes[producer]).lo
                tail[producer][step] = min(tail[producer][step], lo)
    return tail


def _reads(spans: list[list[tuple[Span, ...] | None]], who: list[tuple[int, int]], step: int) -> list[Span | None]:
    running = ((spans[value][step], edge) for value, edge in who)
    return [read[edge] if read is not None else None for read, edge in running]


def _axis_step(frontier: list[int], tail: list[int], step: int, reads: list[Span | None]) -> AxisStep:
    origin, start, stop = tail[step], frontier[step], frontier[step + 1]
    past = []
    for before in range(step - 1, -1, -1):
        first, last = max(origin, frontier[before]), frontier[before + 1]
        if last <= origin:
            break
        if last > first:
            skip = max(tail[before + 1], frontier[before]) - frontier[before]
            src = (first - frontier[before], last - frontier[before])
            past.append(Past(step - before, src, skip, (first - origin, last - origin)))
    taken = tuple(None if span is None else (span.lo - origin, span.hi - origin) for span in reads)
    return _alike(stop - origin, stop - start, max(tail[step + 1], start) - start, tuple(past), taken)


_alike = lru_cache(maxsize=65536)(AxisStep)


@dataclass(frozen=True)
class Part:
    """Rows kept by an earlier tile: `src` of its piece `piece` goes to `dst` of this tile's region."""

    offset: Tile
    piece: int
    src: Index
    dst: Index


@dataclass(frozen=True)
class Layout:
    """How one value's region is put together in one tile, what its readers take of it and what is kept."""

    extent: tuple[int, ...]
    own: Index | None
    """Where the fresh block lies in the region; None where there is none."""
    parts: tuple[Part, ...]
    reads: tuple[Index | None, ...]
    """Slices of the region; None for a reader that does not run in this tile."""
    keeps: tuple[tuple[int, Index], ...]
    """(piece, slices of the fresh block)"""


class Grid:
    """The tiles of all streamed axes, the first axis outermost."""

    def __init__(self, axes: tuple[Axis, ...]):
        self.axes = axes

    def tiles(self) -> Iterator[Tile]:
        """All tiles in raster order."""
        return product(*(range(axis.count) for axis in self.axes))

    def number(self, tile: Tile) -> int:
        """The place of a tile in raster order."""
        number = 0
        for axis, step in zip(self.axes, tile, strict=True):
            number = number * axis.count + step
        return number

    def runs(self, value: int, tile: Tile) -> bool:
        """Whether the tile computes anything of `value`."""
        return all(axis.spans[value][step] is not None for axis, step in zip(self.axes, tile, strict=True))

    def spans(self, value: int, edge: int, tile: Tile) -> tuple[Span, ...]:
        """Per axis, what `value` reads through `edge`; only where it runs."""
        found = (axis.spans[value][step] for axis, step in zip(self.axes, tile, strict=True))
        return tuple(spans[edge] for spans in found if spans is not None)

    def fresh(self, value: int, tile: Tile) -> Index:
        """The block of `value` that the tile computes, in the whole value."""
        return tuple(axis.fresh(value, step) for axis, step in zip(self.axes, tile, strict=True))

    def earlier(self, tile: Tile, offset: Tile) -> Tile:
        """The tile that many steps ago."""
        return tuple(step - ago for step, ago in zip(tile, offset, strict=True))

    def expiry(self, value: int, tile: Tile, piece: int) -> Tile:
        """The last tile that may read a piece of `tile`."""
        last = (max(step, axis.last[value][step]) for axis, step in zip(self.axes[piece:], tile[piece:], strict=True))
        return (*tile[:piece], *last)

    def carried(self, value: int) -> int:
        """Positions of `value` in all pieces together, along streamed axes: all but those that no axis carries."""
        sizes = [axis.sizes[value] for axis in self.axes]
        passing = [sum(step.passing for step in axis.steps[value]) for axis in self.axes]
        return prod(sizes) - prod(passing)

    def in_flight(self, weights: Mapping[int, int]) -> int:
        """Positions that earlier tiles leave to later ones, at most at a time; each counts by its value's weight.

        That is the carry of a band along the first axis, of a tile's width along the last.
        """
        total = 0
        for depth, axis in enumerate(self.axes):
            across = {
                value: weight
                * prod(max(step.passing for step in outer.steps[value]) for outer in self.axes[:depth])
                * prod(inner.sizes[value] for inner in self.axes[depth + 1 :])
                for value, weight in weights.items()
            }
            total += max(
                sum(rows * (axis.frontier[value][step] - axis.tail[value][step]) for value, rows in across.items())
                for step in range(axis.count)
            )
        return total

    def layout(self, value: int, tile: Tile) -> Layout:
        return _layout(tuple(axis.steps[value][step] for axis, step in zip(self.axes, tile, strict=True)))


@lru_cache(maxsize=65536)
def _layout(steps: tuple[AxisStep, ...]) -> Layout:
    computes = all(step.fresh for step in steps)
    reads = zip(*(step.reads for step in steps), strict=True)
    return Layout(
        extent=tuple(step.extent for step in steps),
        own=tuple(slice(step.extent - step.fresh, step.extent) for step in steps) if computes else None,
        parts=tuple(_parts(steps)),
        reads=tuple(None if None in read else tuple(slice(*rows) for rows in read) for read in reads),
        keeps=tuple(_keeps(steps)),
    )


def _keeps(steps: tuple[AxisStep, ...]) -> Iterator[tuple[int, Index]]:
    for piece, carrying in enumerate(steps):
        rows = [(0, step.passing) for step in steps[:piece]]
        rows += [(carrying.passing, carrying.fresh)]
        rows += [(0, step.fresh) for step in steps[piece + 1 :]]
        if all(last > first for first, last in rows):
            yield piece, tuple(slice(*row) for row in rows)


def _parts(steps: tuple[AxisStep, ...]) -> Iterator[Part]:
    """The region without the fresh block, cut along the pieces of earlier tiles."""
    for piece in range(len(steps)):
        choices = [[_now(step, 0, step.passing)] for step in steps[:piece]]
        choices += [[*steps[piece].past, _now(steps[piece], steps[piece].passing, steps[piece].fresh)]]
        choices += [[*step.past, _now(step, 0, step.fresh)] for step in steps[piece + 1 :]]
        for choice in product(*choices):
            offset = tuple(past.offset for past in choice)
            if any(offset) and all(past.src[1] > past.src[0] for past in choice):
                # Of the axis that carries it, the piece holds only what was kept.
                skips = [past.skip if axis == piece else 0 for axis, past in enumerate(choice)]
                src = tuple(slice(a.src[0] - skip, a.src[1] - skip) for a, skip in zip(choice, skips, strict=True))
                yield Part(offset, piece, src, tuple(slice(*past.dst) for past in choice))


def _now(step: AxisStep, first: int, last: int) -> Past:
    """Rows of the current step's own block, in the form of rows of an earlier one."""
    origin = step.extent - step.fresh
    return Past(0, (first, last), step.passing, (origin + first, origin + last))
