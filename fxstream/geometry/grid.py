"""The grid: the tiles of all streamed axes together, and how a tile puts values together. Integers only, no torch.

The axes are independent, so a tile is one step of each. It computes the *fresh* block of every value: the rows that
its step computes, along every axis. In front of that block lie the rows that earlier tiles have kept for it; the two
together are the value's *region*, from which its readers take what they need.

What a later tile needs of a block is kept in *pieces*, at most one per axis, which share no position: the piece of an
axis holds the rows that this axis carries, of those that no axis before it carries. So a position is kept once,
however many tiles read it, corners included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, product
from math import prod

from tabulate import tabulate

from .schedule import Axis, AxisStep, Past
from .window import Span

Tile = tuple[int, ...]
"""A step of every axis, the first axis outermost."""
Index = tuple[slice, ...]
"""A slice of every axis."""


@dataclass(frozen=True)
class Part:
    """Rows of a tile's region that an earlier tile has kept."""

    offset: Tile
    """How many steps ago the earlier tile was, along every axis."""
    axis: int
    """Which of its pieces holds the rows."""
    src: Index
    """Where they lie in that piece."""
    dst: Index
    """Where they belong in the region."""


@dataclass(frozen=True)
class Layout:
    """How one value's region is put together in one tile, what its readers take of it and what is kept."""

    extent: tuple[int, ...]
    """Rows of the region."""
    own: Index | None
    """Where the fresh block lies in the region; None if the tile computes nothing of the value."""
    parts: tuple[Part, ...]
    reads: tuple[Index | None, ...]
    """What each reader takes of the region; None for a reader that does not run in this tile."""
    keeps: tuple[tuple[int, Index], ...]
    """The pieces that are kept: the axis of each, and which rows of the fresh block."""


class Grid:
    """The tiles of all streamed axes.

    `print` shows the rows that every step computes and keeps of every value, and the kinds of tiles.
    """

    def __init__(self, axes: tuple[Axis, ...], names: Sequence[str] = (), values: Sequence[str] = ()):
        """`names` of the axes and of the `values` are for printing."""
        self.axes = axes
        self._names = names or [f"axis {number}" for number in range(len(axes))]
        self._values = values or [f"value {number}" for number in range(len(axes[0].sizes))]

    @property
    def count(self) -> int:
        """Number of tiles."""
        return prod(axis.count for axis in self.axes)

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
        """What `value` reads through `edge` along every axis; only where it runs."""
        found = (axis.spans[value][step] for axis, step in zip(self.axes, tile, strict=True))
        return tuple(spans[edge] for spans in found if spans is not None)

    def fresh(self, value: int, tile: Tile) -> Index:
        """The block of `value` that the tile computes, in the whole value."""
        return tuple(axis.fresh(value, step) for axis, step in zip(self.axes, tile, strict=True))

    def earlier(self, tile: Tile, offset: Tile) -> Tile:
        """The tile that many steps before `tile`."""
        return tuple(step - ago for step, ago in zip(tile, offset, strict=True))

    def expiry(self, value: int, tile: Tile, axis: int) -> Tile:
        """The last tile that may read the piece that `tile` keeps along `axis`."""
        pairs = zip(self.axes[axis:], tile[axis:], strict=True)
        return (*tile[:axis], *(max(step, one.last[value][step]) for one, step in pairs))

    def carried(self, value: int) -> int:
        """How many positions of `value` all pieces hold together: all but those that no axis carries."""
        sizes = [axis.sizes[value] for axis in self.axes]
        not_kept = [sum(step.keep_from for step in axis.steps[value]) for axis in self.axes]
        return prod(sizes) - prod(not_kept)

    def in_flight(self, weights: Mapping[int, int]) -> int:
        """The most positions that earlier tiles hold for later ones at any time, each times the weight of its value.

        These are the carry of a band of tiles along the first axis, of one tile's width along the last.
        """
        total = 0
        for depth, axis in enumerate(self.axes):
            across = {
                value: weight
                * prod(max(step.keep_from for step in outer.steps[value]) for outer in self.axes[:depth])
                * prod(inner.sizes[value] for inner in self.axes[depth + 1 :])
                for value, weight in weights.items()
            }
            total += max(
                sum(positions * axis.carry(value, step) for value, positions in across.items())
                for step in range(axis.count)
            )
        return total

    def layout(self, value: int, tile: Tile) -> Layout:
        """How the region of `value` is put together in a tile. Tiles that do it alike get one and the same object."""
        return _layout(tuple(axis.steps[value][step] for axis, step in zip(self.axes, tile, strict=True)))

    def __str__(self) -> str:
        tables = [_table(axis, name, self._values) for axis, name in zip(self.axes, self._names, strict=True)]
        return "\n\n".join([*tables, self._kinds()])

    def _kinds(self) -> str:
        """How often each kind of tile occurs, the most frequent first."""
        counts = Counter(product(*(axis.kinds for axis in self.axes)))
        shown = [f"{count} x {'.'.join(map(_letters, kind))}" for kind, count in counts.most_common(_SHOWN)]
        further = [f"{len(counts) - _SHOWN} kinds more"] if len(counts) > _SHOWN else []
        return f"{self.count} tiles of {len(counts)} kinds: {', '.join([*shown, *further])}"


_SHOWN = 12
"""How many kinds of tiles are printed."""


def _table(axis: Axis, name: str, values: Sequence[str]) -> str:
    """One axis as text: a line per value, a column per kind of step."""
    first = [axis.kinds.index(kind) for kind in range(max(axis.kinds) + 1)]
    rows = [
        [label, size, *(f"{axis.computed(value, step)}+{axis.carry(value, step + 1)}" for step in first)]
        for value, (label, size) in enumerate(zip(values, axis.sizes, strict=True))
    ]
    runs = [(_letters(kind), len(list(steps))) for kind, steps in groupby(axis.kinds)]
    order = " ".join(letters if count == 1 else f"{count}x{letters}" for letters, count in runs)
    title = f"{name}: {axis.count} steps ({order}); rows that a step computes + rows that are kept after it"
    return f"{title}\n" + tabulate(rows, headers=["value", "rows", *map(_letters, range(len(first)))], stralign="right")


def _letters(kind: int) -> str:
    """A, B, ..., Z, AA, AB, ... for 0, 1, ..."""
    return (_letters(kind // 26 - 1) if kind >= 26 else "") + chr(ord("A") + kind % 26)


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
    """The pieces of the fresh block that are kept."""
    for axis, carrying in enumerate(steps):
        rows = [(0, step.keep_from) for step in steps[:axis]]
        rows += [(carrying.keep_from, carrying.fresh)]
        rows += [(0, step.fresh) for step in steps[axis + 1 :]]
        if all(last > first for first, last in rows):
            yield axis, tuple(slice(*row) for row in rows)


def _parts(steps: tuple[AxisStep, ...]) -> Iterator[Part]:
    """The region without the fresh block, cut along the pieces of earlier tiles.

    Along every axis the region is the rows of earlier steps, then the step's own, of which some are kept. In two
    dimensions, the rows come from the block itself or from an earlier tile's piece of this axis:

                            columns of earlier steps   own columns
        rows of earlier steps         axis 0              axis 0
        own rows, not kept            axis 1              fresh block
        own rows, kept                axis 0              fresh block
    """
    for axis, carrying in enumerate(steps):
        before = [[_own(step, 0, step.keep_from)] for step in steps[:axis]]
        here = [*carrying.past, _own(carrying, carrying.keep_from, carrying.fresh)]
        after = [[*step.past, _own(step, 0, step.fresh)] for step in steps[axis + 1 :]]
        for choice in product(*before, here, *after):
            offset = tuple(past.offset for past in choice)
            if any(offset) and all(past.src[1] > past.src[0] for past in choice):
                # Along its own axis, the piece holds only the rows that were kept.
                skips = [past.skip if number == axis else 0 for number, past in enumerate(choice)]
                src = tuple(slice(a.src[0] - skip, a.src[1] - skip) for a, skip in zip(choice, skips, strict=True))
                yield Part(offset, axis, src, tuple(slice(*past.dst) for past in choice))


def _own(step: AxisStep, first: int, last: int) -> Past:
    """Rows of the step's own block, in the form of rows of an earlier one."""
    origin = step.extent - step.fresh
    return Past(0, (first, last), step.keep_from, (origin + first, origin + last))
