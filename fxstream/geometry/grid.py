"""The grid: the tiles of all streamed axes together, and how a tile puts values together. Integers only, no torch.

The axes are independent, so a tile is one step of each. It computes the *fresh* block of every value: the rows that
its step computes, along every axis. In front of that block lie the rows that earlier tiles have kept for it; the two
together are the value's *region*, from which its readers take what they need.

What later tiles need of the blocks of a value is kept in *records*. A record of an axis belongs to one step of it and
of each axis before it. It holds the rows that this axis carries; along the axes behind it everything, so that all tiles
of a band write to one record of the first axis; and along the axes before it the rows that these do not carry, since a
position is kept once, however many tiles read it. Only the corners of thin carries are kept twice (see
`AxisStep.shared`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from math import prod

from tabulate import tabulate

from .schedule import Axis, AxisStep
from .window import Span

Tile = tuple[int, ...]
"""A step of every axis, the first axis outermost."""
Index = tuple[slice, ...]
"""A slice of every axis."""


@dataclass(frozen=True)
class Kept:
    """Rows in a record of a value, and where they lie in the tile.

    Along the axes behind that of the record, which the record holds whole, its rows are counted from the first row of
    the region; along the others, from the first row of the record.
    """

    axis: int
    """The axis of the record."""
    ago: int
    """How many steps of that axis ago the record was begun; 0 for the tile's own step."""
    rows: Index
    """The rows of the record."""
    place: Index
    """Which rows they are: of the region if the tile reads them, of its fresh block if the tile writes them."""


@dataclass(frozen=True)
class Layout:
    """How one value's region is put together in one tile, what its readers take of it and what is kept."""

    extent: tuple[int, ...]
    """Rows of the region."""
    own: Index | None
    """Where the fresh block lies in the region; None if the tile computes nothing of the value."""
    parts: tuple[Kept, ...]
    """The rows of the region that earlier tiles have kept."""
    reads: tuple[Index | None, ...]
    """What each reader takes of the region; None for a reader that does not run in this tile."""
    keeps: tuple[Kept, ...]
    """What the tile keeps of the fresh block."""


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

    def origin(self, value: int, tile: Tile) -> tuple[int, ...]:
        """The first row of the value's region."""
        return tuple(axis.tail[value][step] for axis, step in zip(self.axes, tile, strict=True))

    def record(self, value: int, tile: Tile, axis: int) -> tuple[int, ...]:
        """The rows of the record of an axis into which the tile writes."""
        before = [one.steps[value][step].shared for one, step in zip(self.axes[:axis], tile, strict=False)]
        return (*before, self.axes[axis].kept(value, tile[axis]), *(one.sizes[value] for one in self.axes[axis + 1 :]))

    def kind(self, tile: Tile) -> tuple[int, ...]:
        """The kind of a tile: that of its step of every axis. Tiles of one kind do the same, but in another place."""
        return tuple(axis.kinds[step] for axis, step in zip(self.axes, tile, strict=True))

    def carried(self, value: int) -> int:
        """How many positions of `value` all records hold together."""
        return sum(self.carried_along(value, axis) for axis in range(len(self.axes)))

    def carried_along(self, value: int, number: int) -> int:
        """How many positions of `value` all records of one axis hold together."""
        axis = self.axes[number]
        shared = [sum(step.shared for step in outer.steps[value]) for outer in self.axes[:number]]
        kept = sum(axis.kept(value, step) for step in range(axis.count))
        return prod(shared) * kept * prod(inner.sizes[value] for inner in self.axes[number + 1 :])

    def in_flight(self, weights: Mapping[int, int]) -> int:
        """The most positions that earlier tiles hold for later ones at any time, each times the weight of its value.

        These are the records of a band of tiles along the first axis, of one tile's width along the last.
        """
        total = 0
        for depth, axis in enumerate(self.axes):
            held = [0] * axis.count
            for value, weight in weights.items():
                across = prod(max(step.shared for step in outer.steps[value]) for outer in self.axes[:depth])
                across *= prod(inner.sizes[value] for inner in self.axes[depth + 1 :])
                for step, rows in enumerate(axis.held(value)):
                    held[step] += weight * across * rows
            total += max(held)
        return total

    def layout(self, value: int, tile: Tile) -> Layout:
        """How the region of `value` is put together in a tile; the same in all tiles of a kind."""
        steps = tuple(axis.steps[value][step] for axis, step in zip(self.axes, tile, strict=True))
        reads = zip(*(step.reads for step in steps), strict=True)
        return Layout(
            extent=tuple(step.extent for step in steps),
            own=tuple(map(_own, steps)) if all(step.fresh for step in steps) else None,
            parts=tuple(_parts(steps)),
            reads=tuple(None if None in read else tuple(slice(*rows) for rows in read) for read in reads),
            keeps=tuple(_keeps(steps)),
        )

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


def _own(step: AxisStep) -> slice:
    """The step's own rows, in the region."""
    return slice(step.extent - step.fresh, step.extent)


def _all(step: AxisStep) -> slice:
    """All rows of the region."""
    return slice(0, step.extent)


def _earlier(step: AxisStep) -> slice:
    """The rows of earlier steps, in the region."""
    return slice(0, step.extent - step.fresh)


def _shared(step: AxisStep) -> slice:
    """The step's own rows that the records of later axes hold, in the region."""
    return slice(step.extent - step.fresh, step.extent - step.fresh + step.shared)


def _kept(step: AxisStep) -> slice:
    """The step's own rows that are kept, in the region."""
    return slice(step.extent - step.fresh + step.keep_from, step.extent)


def _keeps(steps: tuple[AxisStep, ...]) -> Iterator[Kept]:
    """What is kept of the fresh block."""
    for axis, carrying in enumerate(steps):
        before = [slice(0, step.shared) for step in steps[:axis]]
        here, kept = slice(carrying.keep_from, carrying.fresh), slice(0, carrying.fresh - carrying.keep_from)
        after = steps[axis + 1 :]
        place = (*before, here, *(slice(0, step.fresh) for step in after))
        if _has_rows(place):
            yield Kept(axis, 0, (*before, kept, *map(_own, after)), place)


def _parts(steps: tuple[AxisStep, ...]) -> Iterator[Kept]:
    """The region without the fresh block, cut along the records.

    Along every axis the region is the rows of earlier steps, then the step's own, of which some are kept. In two
    dimensions, the rows come from the block itself or from one of the records of this axis:

                            columns of earlier steps   own columns
        rows of earlier steps         axis 0              axis 0
        own rows, not kept            axis 1              fresh block
        own rows, kept                axis 0 or 1         fresh block

    The rows of each earlier step are in a record of their own. The own rows that are kept are in the record that the
    tile itself adds to, unless those of the axes behind hold them, too.
    """
    for axis, carrying in enumerate(steps):
        before, after = steps[:axis], steps[axis + 1 :]
        for past in carrying.past:
            rows = slice(past.src[0] - past.skip, past.src[1] - past.skip)
            yield from _part(axis, past.ago, before, rows, slice(*past.dst), tuple(map(_all, after)))
        if carrying.shared == carrying.fresh:
            continue
        kept = slice(0, carrying.fresh - carrying.keep_from)
        for number, step in enumerate(after):
            behind = (*map(_own, after[:number]), _earlier(step), *map(_all, after[number + 1 :]))
            yield from _part(axis, 0, before, kept, _kept(carrying), behind)


def _part(
    axis: int, ago: int, before: tuple[AxisStep, ...], rows: slice, place: slice, behind: Index
) -> Iterator[Kept]:
    """A part of the region from a record of `axis`, unless it is empty.

    It is `rows` of the record, at `place` in the region, along that axis, and `behind` along those behind it.
    """
    part = Kept(
        axis,
        ago,
        (*(slice(0, step.shared) for step in before), rows, *behind),
        (*map(_shared, before), place, *behind),
    )
    if _has_rows(part.place):
        yield part


def _has_rows(index: Index) -> bool:
    return all(rows.stop > rows.start for rows in index)
