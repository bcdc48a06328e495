"""The schedule of one axis: which rows of which value every step computes, keeps and reads. Integers only, no torch.

`schedule` plans one axis; `grid.py` combines the planned axes into tiles. Along one axis, after step `t`:

    frontier[v][t]   rows [0, frontier) of value v are computed
    tail[v][t]       rows [tail, frontier) of value v are needed by a later step: its carry

Step `t` computes the *fresh* rows [frontier[t], frontier[t+1]) of every value.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from .axes import IMAGE
from .window import Span, Window

Edges = tuple[tuple[int, Window], ...]
"""What a value reads along one axis: for each operand its number, and the window through which it is read."""
AxisGraph = tuple[Edges, ...]
"""The edges of all values along one axis, in topological order. The first value is the image, which has none."""
Range = tuple[int, int]
"""The first row, and one past the last."""

TWICE = 4
"""Rows that are carried along one axis are kept with those that later axes carry, too, if they are at most 1 / TWICE of
the block: regions then consist of fewer parts, and hardly any position is kept twice."""

THIN = 12
"""A value that would compute at most tile / (2 * THIN) rows per step skips some steps, and then computes all their rows
at once."""


class SizeError(ValueError):
    """Value number `value` has no rows, or its operands do not have equally many."""

    def __init__(self, value: int, reason: str):
        super().__init__(reason)
        self.value = value


class Past(NamedTuple):
    """Rows of a region that an earlier step has computed."""

    ago: int
    """How many steps ago."""
    src: Range
    """Which rows of the block that was computed then."""
    skip: int
    """The first row of that block that was kept."""
    dst: Range
    """Which rows of the region."""


@dataclass(frozen=True)
class AxisStep:
    """One value at one step of one axis. The region is rows [tail[t], frontier[t+1]): carry and fresh block."""

    extent: int
    """Rows of the region."""
    fresh: int
    """Rows of the block that this step computes, the last ones of the region."""
    keep_from: int
    """The first row of the block that a later step reads; it and those after it are kept."""
    past: tuple[Past, ...]
    """Where the rows before the block come from."""
    reads: tuple[Range | None, ...]
    """What each reader takes of the region; None for one that does not run."""

    @property
    def shared(self) -> int:
        """How many rows of the block the records of later axes hold, from the first on: those that this axis does not
        keep, or all of them if it keeps few."""
        return self.fresh if TWICE * (self.fresh - self.keep_from) <= self.fresh else self.keep_from


@dataclass(frozen=True)
class Axis:
    """The schedule of one axis. Its lists are indexed by [value] or by [value][step]."""

    sizes: list[int]
    frontier: list[list[int]]
    tail: list[list[int]]
    spans: list[list[tuple[Span, ...] | None]]
    """One span per edge of the value; None at a step that computes nothing of it."""
    steps: list[list[AxisStep]]
    last: list[list[int]]
    """The last step that reads any of the rows that this step computes."""

    @property
    def count(self) -> int:
        """Number of steps."""
        return len(self.frontier[0]) - 1

    def fresh(self, value: int, step: int) -> slice:
        """The rows of `value` that `step` computes, in the whole value."""
        return slice(self.frontier[value][step], self.frontier[value][step + 1])

    def computed(self, value: int, step: int) -> int:
        """How many rows of `value` the step computes."""
        return self.frontier[value][step + 1] - self.frontier[value][step]

    def kept(self, value: int, step: int) -> int:
        """How many of the rows of `value` that the step computes are kept."""
        own = self.steps[value][step]
        return own.fresh - own.keep_from

    def held(self, value: int) -> list[int]:
        """How many rows of `value` are held during every step: what that step keeps, and what a step before it has kept
        that is still needed. The rows that one step keeps are released together."""
        changes = [0] * (self.count + 1)
        for step in range(self.count):
            changes[step] += self.kept(value, step)
            changes[max(step, self.last[value][step]) + 1] -= self.kept(value, step)
        return list(accumulate(changes[:-1]))

    @cached_property
    def expiring(self) -> list[list[tuple[int, int]]]:
        """For every step, the (value, step) whose kept rows no later step reads."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.count)]
        for value, last in enumerate(self.last):
            for step, reader in enumerate(last):
                if self.kept(value, step):
                    found[max(step, reader)].append((value, step))
        return found

    def carry(self, value: int, step: int) -> int:
        """How many rows of `value` are kept for later steps when `step` begins."""
        return self.frontier[value][step] - self.tail[value][step]

    @cached_property
    def alike(self) -> list[list[int]]:
        """For every value and step a number; steps that treat the value alike have the same."""
        found = []
        for steps in self.steps:
            known: dict[AxisStep, int] = {}
            found.append([known.setdefault(step, len(known)) for step in steps])
        return found

    @cached_property
    def kinds(self) -> list[int]:
        """The kind of every step. Steps are of one kind if they do the same but for a shift along the axis."""
        known: dict[object, int] = {}
        return [known.setdefault(self._shape(step), len(known)) for step in range(self.count)]

    def _shape(self, step: int) -> tuple[object, ...]:
        """What a step does, apart from where along the axis it does it."""
        steps = tuple(numbers[step] for numbers in self.alike)
        spans = tuple(None if (own := spans[step]) is None else tuple(map(_shifted, own)) for spans in self.spans)
        return steps, spans


def _shifted(span: Span) -> tuple[object, ...]:
    return span.stop - span.start, span.hi - span.lo, span.pad, span.trim


def readers(graph: AxisGraph) -> list[list[tuple[int, int]]]:
    """For every value its readers as (value, edge), in the order in which they run."""
    found: list[list[tuple[int, int]]] = [[] for _ in graph]
    for value, edges in enumerate(graph):
        for edge, (producer, _) in enumerate(edges):
            found[producer].append((value, edge))
    return found


def equal_step(size: int, tile: int) -> int:
    """The rows of a step where `size` rows are cut into as few equal steps as possible of at most `tile` rows.

    Equal steps, since a thin last tile costs nearly as much time as a whole one.
    """
    return -(-size // step_count(size, tile))


def step_count(size: int, tile: int) -> int:
    """The number of steps in which fresh rows of the image enter."""
    return -(-size // tile)


@lru_cache(maxsize=64)
def schedule(graph: AxisGraph, size: int, tile: int) -> Axis:
    """Plan an axis of `size` image rows of which at most `tile` enter per step. Raises SizeError."""
    sizes = _sizes(graph, size)
    frontier = _frontier(graph, sizes, tile)
    tail = _tail(graph, sizes, frontier)
    spans = [
        [
            tuple(window.span(start, stop, sizes[producer]) for producer, window in edges) if stop > start else None
            for start, stop in pairwise(rows)
        ]
        for edges, rows in zip(graph, frontier, strict=True)
    ]
    steps = [
        [
            _axis_step(frontier[value], tail[value], step, _reads(spans, who, step))
            for step in range(len(frontier[0]) - 1)
        ]
        for value, who in enumerate(readers(graph))
    ]
    last = [
        [bisect_left(firsts, done, hi=len(firsts) - 1) - 1 for done in rows[1:]]
        for rows, firsts in zip(frontier, tail, strict=True)
    ]
    return Axis(sizes, frontier, tail, spans, steps, last)


def _sizes(graph: AxisGraph, size: int) -> list[int]:
    sizes: list[int] = []
    for value, edges in enumerate(graph):
        try:
            found = {window.size(sizes[producer]) for producer, window in edges} or {size}
        except ValueError as error:
            raise SizeError(value, str(error)) from None
        if len(found) > 1:
            raise SizeError(value, f"its operands have {' and '.join(map(str, sorted(found)))} rows")
        sizes.append(found.pop())
    return sizes


def _frontier(graph: AxisGraph, sizes: list[int], tile: int) -> list[list[int]]:
    """Let every value advance as far as its inputs allow, but neither in thin steps nor all of a long lag at once."""
    length = sizes[IMAGE]
    count = step_count(length, tile)
    image = [-(-length * step // count) for step in range(1, count + 1)]
    paces = [_pace(size, count, tile) for size in sizes]
    frontier = [[0] for _ in graph]
    while any(rows[-1] < size for rows, size in zip(frontier, sizes, strict=True)):
        for value, edges in enumerate(graph):
            rows = frontier[value]
            if edges:
                ready = min(window.ready(frontier[producer][-1], sizes[producer]) for producer, window in edges)
                rows.append(paces[value].advance(rows[-1], ready, sizes[value]))
            else:
                rows.append(image[min(len(rows), count) - 1])
    return frontier


class _Pace(NamedTuple):
    """The least and the most rows by which a value advances in a step in which it advances at all."""

    least: int
    most: int

    def advance(self, done: int, ready: int, size: int) -> int:
        """How far a value of `size` rows, `done` of which are computed, advances when it could advance to `ready`."""
        reach = max(done, min(ready, done + self.most))
        return reach if ready == size or reach - done >= self.least else done


def _pace(size: int, count: int, tile: int) -> _Pace:
    """The pace of a value of `size` rows.

    A value far smaller than the image rests for some steps and then computes the rows of all of them. Every step in
    which it advances reads its operation's weights and writes their gradients, whatever the number of rows.
    """
    rests = max(1, tile * count // (THIN * size))
    # A power of two, so that values that rest for different numbers of steps repeat together: steps are of fewer kinds.
    rests = 1 << rests.bit_length() - 1
    natural = -(-size * rests // count)
    # Half a step more than that: a short lag then ends with the last step instead of taking another.
    return _Pace(-(-3 * natural // 4) if rests > 1 else 1, -(-3 * natural // 2))


def _tail(graph: AxisGraph, sizes: list[int], frontier: list[list[int]]) -> list[list[int]]:
    """The first row that any reader's next output reads; the frontier where there is none."""
    tail = [list(rows) for rows in frontier]
    for value, edges in enumerate(graph):
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
    return AxisStep(stop - origin, stop - start, max(tail[step + 1], start) - start, tuple(past), taken)
