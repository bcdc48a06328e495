"""Schedules, against a dense simulation: an executor that moves the names of positions instead of activations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxstream.geometry.grid import Grid, Index, Kept, Tile
from fxstream.geometry.schedule import Axis, AxisGraph, SizeError, readers, schedule
from fxstream.geometry.window import IDENTITY, Border, Placed, Same, Sliding, Span, Transposed, Window

Labels = npt.NDArray[np.int64]

BORDERS: tuple[Border, ...] = ("zeros", "reflect", "replicate")


# Random networks.


@dataclass(frozen=True)
class Plan:
    """A network as one graph per axis (the same readers, other windows), and the image and tile along each."""

    graphs: tuple[AxisGraph, ...]
    sizes: tuple[int, ...]
    tiles: tuple[int, ...]

    def axes(self) -> tuple[Axis, ...]:
        return tuple(map(schedule, self.graphs, self.sizes, self.tiles))


@st.composite
def same_convolutions(draw: st.DrawFn) -> Sliding:
    """What most layers of most networks are."""
    margin, dilation = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    before = after = margin * dilation
    border = draw(st.sampled_from(BORDERS))
    return Sliding(2 * margin + 1, draw(st.integers(1, 2)), dilation, before, after, border)


@st.composite
def wild_windows(draw: st.DrawFn) -> Sliding:
    """Gaps between the windows, crops, padding beyond the kernel."""
    before, after = draw(st.integers(-6, 9)), draw(st.integers(-6, 9))
    border = draw(st.sampled_from(BORDERS))
    kernel, stride, dilation = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    return Sliding(kernel, stride, dilation, before, after, border)


@st.composite
def transposed(draw: st.DrawFn) -> Transposed:
    """Windows of values with more rows than the image, gaps between the reaches of two rows included."""
    step, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    output_padding = draw(st.integers(0, max(step, dilation) - 1))
    return Transposed(draw(st.integers(1, 4)), step, dilation, draw(st.integers(0, 3)), output_padding)


poolings = st.builds(Sliding, st.integers(1, 4), st.integers(1, 4), ceil_mode=st.booleans())
same_paddings = st.builds(Same, st.integers(1, 4), st.integers(1, 4), st.integers(1, 2))
any_window: st.SearchStrategy[Window] = st.one_of(
    same_convolutions(), wild_windows(), poolings, transposed(), same_paddings, st.just(IDENTITY)
)


def fitting(window: Window, length: int, image: int) -> Window:
    """The window, or the identity where it does not fit or where the values would grow without bound."""
    try:
        return window if window.size(length) <= 3 * image + 8 else IDENTITY
    except ValueError:
        return IDENTITY


def joining(draw: st.DrawFn, length: int, size: int) -> Window:
    """A window that makes `size` rows of `length`, by padding or cropping: how the other side of a join comes in."""
    kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    margins = size - length + dilation * (kernel - 1)
    before = draw(st.integers(min(margins, 0), max(margins, 0)))
    if length and draw(st.booleans()):
        # Written into a longer value, where there is room.
        step = draw(st.integers(1, 3))
        start = draw(st.integers(0, 4))
        if start + (length - 1) * step < size:
            return Placed(start, step, length, size)
    border = draw(st.sampled_from([border for border in BORDERS if border != "reflect"]))
    return Sliding(kernel, 1, dilation, before, margins - before, border)


@st.composite
def plans(draw: st.DrawFn, axes: int, largest: int, values: int) -> Plan:
    """A chain with skip connections of any length. Every value may be read by several others, or by none."""
    sizes = tuple(draw(st.integers(1, largest)) for _ in range(axes))
    # Small tiles by preference: with an image of one or two tiles little is carried.
    tiles = tuple(draw(st.integers(1, max(largest // 6, 2)) | st.integers(1, largest * 7 // 6)) for _ in range(axes))
    graphs: list[list[tuple[tuple[int, Window], ...]]] = [[()] for _ in range(axes)]
    rows = [[size] for size in sizes]
    for value in range(1, draw(st.integers(2, values + 1))):
        # Producers close by make a chain, the others skip over part of it; the same one may come twice.
        close = st.integers(max(value - 2, 0), value - 1)
        producers = [draw(close), *draw(st.lists(st.integers(0, value - 1), max_size=2))]
        for axis, image in enumerate(sizes):
            first = fitting(draw(any_window), rows[axis][producers[0]], image)
            size = first.size(rows[axis][producers[0]])
            others = [joining(draw, rows[axis][producer], size) for producer in producers[1:]]
            graphs[axis].append(tuple(zip(producers, [first, *others], strict=True)))
            rows[axis].append(size)
    return Plan(tuple(map(tuple, graphs)), sizes, tiles)


one_axis = plans(axes=1, largest=60, values=9)


# The dense simulation.


def block_of(axes: tuple[Axis, ...], value: int, tile: Tile) -> Index:
    """The rows of a value that its frontiers say a tile computes."""
    frontiers = zip((axis.frontier[value] for axis in axes), tile, strict=True)
    return tuple(slice(rows[step], rows[step + 1]) for rows, step in frontiers)


def take(labels: Labels, index: Index) -> Labels:
    """`labels[index]`, but numpy must not clip the slices or count them from the end."""
    for rows, extent in zip(index, labels.shape, strict=True):
        assert 0 <= rows.start < rows.stop <= extent
    return labels[index]


class Simulation:
    """All tiles of a plan, in the order and with the bookkeeping of `scan.tiles.Scan`, on labels.

    A block holds the number of each of its positions in the whole value, so a block from the wrong place shows.
    The image, which a scan slices, is carried here like any other value.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.axes = plan.axes()
        self.grid = Grid(self.axes)
        self.readers = readers(plan.graphs[0])
        shapes = [tuple(axis.sizes[value] for axis in self.axes) for value in range(len(self.readers))]
        self.whole = [np.arange(prod(shape), dtype=np.int64).reshape(shape) for shape in shapes]
        self.computed = [np.zeros(shape, dtype=int) for shape in shapes]
        self.stored = [np.zeros(shape, dtype=int) for shape in shapes]
        self.records: dict[tuple[int, int, Tile], Labels] = {}
        """By value, axis, and the steps of that axis and of those before it."""
        self.most_held = 0

    def run(self) -> None:
        for tile in self.grid.tiles():
            waiting: dict[tuple[int, int], Labels] = {}
            for value in range(len(self.readers)):
                block = self.compute(value, tile, waiting) if self.grid.runs(value, tile) else None
                self.hand_on(value, tile, block, waiting)
            assert not waiting, "a read that nobody was waiting for"
            self.forget_after(tile)

    def forget_after(self, tile: Tile) -> None:
        """Drop every record whose last reader has run. A later read of it fails with a KeyError."""
        self.most_held = max(self.most_held, sum(record.size for record in self.records.values()))
        for number, axis in enumerate(self.axes):
            if all(
                step == one.count - 1 for one, step in zip(self.axes[number + 1 :], tile[number + 1 :], strict=True)
            ):
                for value, step in axis.expiring[tile[number]]:
                    self.records.pop((value, number, (*tile[:number], step)), None)

    def compute(self, value: int, tile: Tile, waiting: dict[tuple[int, int], Labels]) -> Labels:
        fresh = self.grid.fresh(value, tile)
        assert fresh == block_of(self.axes, value, tile)
        for edge, (producer, _) in enumerate(self.plan.graphs[0][value]):
            spans = self.grid.spans(value, edge, tile)
            for axis, graph, rows, span in zip(self.axes, self.plan.graphs, fresh, spans, strict=True):
                window = graph[value][edge][1]
                assert span == window.span(rows.start, rows.stop, axis.sizes[producer])
            wanted = tuple(slice(span.lo, span.hi) for span in spans)
            read = waiting.pop((value, edge))
            assert np.array_equal(read, take(self.whole[producer], wanted)), "not the rows under the windows"
        self.computed[value][fresh] += 1
        return take(self.whole[value], fresh)

    def hand_on(self, value: int, tile: Tile, block: Labels | None, waiting: dict[tuple[int, int], Labels]) -> None:
        layout = self.grid.layout(value, tile)
        assert (layout.own is None) == (block is None)
        assert block is not None or not layout.keeps
        assert [read is not None for read in layout.reads] == [
            self.grid.runs(reader, tile) for reader, _ in self.readers[value]
        ]
        if any(read is not None for read in layout.reads):
            region = self.assemble(value, tile, block)
            for reader, read in zip(self.readers[value], layout.reads, strict=True):
                if read is not None:
                    waiting[reader] = take(region, read)
        for keep in layout.keeps:
            assert block is not None
            key = (value, keep.axis, tile[: keep.axis + 1])
            if key not in self.records:
                self.records[key] = np.full(self.grid.record(value, tile, keep.axis), -1, dtype=np.int64)
            rows = self.in_record(value, tile, keep)
            assert (take(self.records[key], rows) == -1).all(), "two tiles write to the same rows of a record"
            self.records[key][rows] = take(block, keep.place)
            self.stored[value][block_of(self.axes, value, tile)][keep.place] += 1

    def in_thin_corners(self, value: int) -> Labels:
        """At each position, along how many axes but the last its block carries it, and at most a quarter of itself."""
        counts = np.zeros(self.whole[value].shape, dtype=int)
        for number, axis in enumerate(self.axes[:-1]):
            for step in range(axis.count):
                fresh, kept = axis.computed(value, step), axis.kept(value, step)
                if 4 * kept <= fresh:
                    rows = [slice(None)] * counts.ndim
                    rows[number] = slice(axis.frontier[value][step + 1] - kept, axis.frontier[value][step + 1])
                    counts[tuple(rows)] += 1
        return counts

    def in_record(self, value: int, tile: Tile, kept: Kept) -> Index:
        """Rows of a record, counted from its own first row along every axis."""
        origin = (0,) * (kept.axis + 1) + self.grid.origin(value, tile)[kept.axis + 1 :]
        return tuple(
            slice(rows.start + first, rows.stop + first) for rows, first in zip(kept.rows, origin, strict=True)
        )

    def assemble(self, value: int, tile: Tile, block: Labels | None) -> Labels:
        """The fresh block and what was kept for it: without gaps, without overlaps, in the right place."""
        layout = self.grid.layout(value, tile)
        parts: list[tuple[Index, Labels]] = []
        for part in layout.parts:
            begun = (*tile[: part.axis], tile[part.axis] - part.ago)
            record = self.records[value, part.axis, begun]
            parts.append((part.place, take(record, self.in_record(value, tile, part))))
        if block is not None and layout.own is not None:
            parts.append((layout.own, block))
        region = np.full(layout.extent, -1, dtype=np.int64)
        for rows, labels in parts:
            assert (take(region, rows) == -1).all(), "two records hold the same position"
            assert region[rows].shape == labels.shape
            region[rows] = labels
        carried_and_fresh = tuple(
            slice(axis.tail[value][step], axis.frontier[value][step + 1])
            for axis, step in zip(self.axes, tile, strict=True)
        )
        assert np.array_equal(region, take(self.whole[value], carried_and_fresh))
        return region


def check(plan: Plan) -> None:
    simulation = Simulation(plan)
    simulation.run()
    assert not simulation.records, "a record that nobody drops"
    for value, (computed, stored) in enumerate(zip(simulation.computed, simulation.stored, strict=True)):
        assert (computed == 1).all()
        assert (stored <= 1 + simulation.in_thin_corners(value)).all()


@settings(max_examples=250, deadline=None)
@given(plan=one_axis)
def test_tiles_of_one_axis_compute_every_position_once_from_what_is_there(plan: Plan) -> None:
    check(plan)


@settings(max_examples=100, deadline=None)
@given(plan=plans(axes=2, largest=18, values=6))
def test_tiles_of_two_axes_compute_every_position_once_from_what_is_there(plan: Plan) -> None:
    check(plan)


@settings(max_examples=30, deadline=None)
@given(plan=plans(axes=3, largest=6, values=4))
def test_tiles_of_three_axes_compute_every_position_once_from_what_is_there(plan: Plan) -> None:
    check(plan)


UNET: AxisGraph = (
    (),
    ((0, Sliding(3, 1, 1, 1, 1)),),
    ((1, Sliding(2, 2)),),
    ((2, Sliding(3, 1, 1, 1, 1)),),
    ((3, Sliding(2, 2)),),
    ((4, Sliding(3, 1, 1, 1, 1)),),
    ((5, Transposed(2, 2)),),
    ((3, IDENTITY), (6, IDENTITY)),
    ((7, Sliding(3, 1, 1, 1, 1)),),
    ((8, Transposed(2, 2)),),
    ((1, IDENTITY), (9, IDENTITY)),
    ((10, Sliding(3, 1, 1, 1, 1)),),
)
"""Two levels down and up again: the skip of value 1 leads the upward path by many rows."""


@pytest.mark.parametrize("tiles", [(1, 7), (5, 3), (4, 16), (40, 40)])
def test_tiles_of_a_unet_compute_every_position_once_from_what_is_there(tiles: tuple[int, int]) -> None:
    check(Plan((UNET, UNET), (24, 32), tiles))


# One axis at a time.


def rows_read(graph: AxisGraph, axis: Axis, value: int, steps: range) -> list[tuple[int, Span]]:
    """What the readers of a value read of it in some steps, each with its step."""
    runs = [(step, axis.spans[reader][step], edge) for reader, edge in readers(graph)[value] for step in steps]
    return [(step, spans[edge]) for step, spans, edge in runs if spans is not None]


@settings(max_examples=150, deadline=None)
@given(plan=one_axis)
def test_frontiers_advance_to_the_end_and_no_step_is_idle(plan: Plan) -> None:
    (axis,) = plan.axes()
    for size, rows in zip(axis.sizes, axis.frontier, strict=True):
        assert len(rows) == axis.count + 1
        assert rows[0] == 0
        assert rows[-1] == size
        assert rows == sorted(rows)
    for step in range(axis.count):
        assert any(rows[step] < rows[step + 1] for rows in axis.frontier)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 200), tile=st.integers(1, 220))
def test_the_image_enters_in_the_fewest_steps_that_the_tile_allows_and_in_equal_ones(size: int, tile: int) -> None:
    axis = schedule(((), ((0, Sliding(9)),)) if size >= 9 else ((), ((0, IDENTITY),)), size, tile)
    fresh = [axis.fresh(0, step) for step in range(axis.count)]
    counts = [rows.stop - rows.start for rows in fresh if rows.stop > rows.start]
    assert sum(counts) == size
    assert max(counts) <= tile
    assert len(counts) == -(-size // tile)
    assert max(counts) - min(counts) <= 1


@settings(max_examples=150, deadline=None)
@given(plan=one_axis)
def test_the_image_block_is_never_larger_than_the_tile(plan: Plan) -> None:
    (axis,) = plan.axes()
    rows = axis.frontier[0]
    assert all(after - before <= plan.tiles[0] for before, after in pairwise(rows))


@settings(max_examples=150, deadline=None)
@given(plan=one_axis)
def test_the_first_row_of_a_carry_is_the_first_that_a_reader_still_to_run_reads(plan: Plan) -> None:
    (axis,), (graph,) = plan.axes(), plan.graphs
    for value in range(len(graph)):
        for step in range(axis.count + 1):
            later = rows_read(graph, axis, value, range(step, axis.count))
            tail, frontier = axis.tail[value][step], axis.frontier[value][step]
            assert tail <= frontier
            assert tail == min([frontier, *(span.lo for _, span in later)])


@settings(max_examples=150, deadline=None)
@given(plan=one_axis)
def test_a_read_lies_within_what_is_carried_and_fresh(plan: Plan) -> None:
    (axis,), (graph,) = plan.axes(), plan.graphs
    for value in range(len(graph)):
        for step, span in rows_read(graph, axis, value, range(axis.count)):
            assert axis.tail[value][step] <= span.lo < span.hi <= axis.frontier[value][step + 1]


@settings(max_examples=150, deadline=None)
@given(plan=one_axis)
def test_a_piece_expires_with_the_last_step_that_reads_back_into_it(plan: Plan) -> None:
    (axis,), (graph,) = plan.axes(), plan.graphs
    for value in range(len(graph)):
        reads = rows_read(graph, axis, value, range(axis.count))
        for step in range(axis.count):
            start, stop = axis.frontier[value][step], axis.frontier[value][step + 1]
            kept = slice(max(start, axis.tail[value][step + 1]), stop)
            if kept.start < kept.stop:
                assert axis.last[value][step] == max(at for at, span in reads if span.lo < stop)


def test_a_short_lag_takes_no_further_step() -> None:
    # Two 3x3 convolutions lag by two rows. The last of four steps takes them as well.
    convolution = Sliding(3, 1, 1, 1, 1)
    axis = schedule(((), ((0, convolution),), ((1, convolution),)), 64, 16)
    assert axis.frontier == [[0, 16, 32, 48, 64], [0, 15, 31, 47, 64], [0, 14, 30, 46, 64]]
    assert axis.tail[1] == [0, 13, 29, 45, 64]


def test_a_long_lag_is_flushed_in_several_steps() -> None:
    # The window reaches 40 rows ahead, so that the image's last step makes 40 of the 64 rows ready at once; a step
    # takes half as many again as an ordinary one at most.
    axis = schedule(((), ((0, Sliding(81, 1, 1, 40, 40)),)), 64, 16)
    assert axis.frontier == [[0, 16, 32, 48, 64, 64, 64], [0, 0, 0, 8, 32, 56, 64]]


def test_values_of_a_few_rows_a_step_rest() -> None:
    # Five strides of two: the last value has 2 of the tile's 64 rows, too few, and does 4 at every other step.
    axis = schedule(((), *(((value, Sliding(2, 2)),) for value in range(5))), 512, 64)
    assert axis.frontier[4] == [0, 4, 8, 12, 16, 20, 24, 28, 32]
    assert axis.frontier[5] == [0, 0, 4, 4, 8, 8, 12, 12, 16]
    assert axis.count == 8


def kept(grid: Grid, value: int) -> int:
    """Positions of a value in all records, counted tile by tile."""
    layouts = (grid.layout(value, tile) for tile in grid.tiles())
    return sum(prod(rows.stop - rows.start for rows in keep.place) for layout in layouts for keep in layout.keeps)


@settings(max_examples=100, deadline=None)
@given(plan=plans(axes=2, largest=18, values=6))
def test_what_is_carried_is_counted_without_a_scan(plan: Plan) -> None:
    simulation = Simulation(plan)
    simulation.run()
    grid = simulation.grid
    for value in range(len(plan.graphs[0])):
        assert grid.carried(value) == kept(grid, value)
    first, second = grid.axes
    values = range(len(plan.graphs[0]))
    predicted = grid.in_flight(dict.fromkeys(values, 1))
    # Which tiles of a band hold most is not asked, so that a little more may be predicted than is held.
    most_of_a_tile = sum(max(second.held(value)) * max(step.shared for step in first.steps[value]) for value in values)
    assert simulation.most_held <= predicted <= simulation.most_held + most_of_a_tile


def test_a_carry_grows_with_the_lead_of_a_skip_connection_over_its_branch() -> None:
    # Value 2 waits for 20 rows ahead, and the sum has to wait with it. All that time value 1 is carried.
    ahead = Sliding(21, 1, 1, 0, 20)
    axis = schedule(((), ((0, IDENTITY),), ((1, ahead),), ((1, IDENTITY), (2, IDENTITY))), 40, 10)
    assert axis.frontier[1:] == [[0, 10, 20, 30, 40, 40], [0, 0, 0, 10, 25, 40], [0, 0, 0, 10, 25, 40]]
    assert axis.tail[1:] == [[0, 0, 0, 10, 25, 40], [0, 0, 0, 10, 25, 40], [0, 0, 0, 10, 25, 40]]


def test_a_corner_is_kept_once_unless_it_is_thin_and_a_record_no_longer_than_its_axis_needs_it() -> None:
    convolution = Sliding(3, 1, 1, 1, 1)
    axis = schedule(((), ((0, convolution),)), 12, 4)
    grid = Grid((axis, axis))
    # Of the 4 x 4 block the last two rows and the last two columns; their corner goes with the rows.
    rows, columns = grid.layout(0, (0, 1)).keeps
    assert (rows.axis, rows.place) == (0, (slice(2, 4), slice(0, 4)))
    assert (columns.axis, columns.place) == (1, (slice(0, 2), slice(2, 4)))
    # The rows go to the record of all rows of this height, behind the two columns of the region that come before.
    assert rows.rows == (slice(0, 2), slice(2, 6))
    assert grid.record(0, (0, 1), 0) == (2, 12)
    assert grid.record(0, (0, 1), 1) == (2, 2)
    # Rows wait for the band of tiles below; columns for the next tile of the same band.
    assert axis.expiring == [[], [(0, 0)], [(0, 1)]]
    assert axis.held(0) == [2, 4, 2]
    # Of 16 x 16 the last two are few enough: the columns are kept with the corner.
    axis = schedule(((), ((0, convolution),)), 48, 16)
    _, columns = Grid((axis, axis)).layout(0, (0, 1)).keeps
    assert (columns.axis, columns.place) == (1, (slice(0, 16), slice(14, 16)))


# Errors.


@pytest.mark.parametrize(
    ("size", "value", "reason"),
    [
        (2, 1, "2 rows, padded by 0 and 0, are fewer than the 3 that one output row needs"),
        (7, 3, "1 rows, padded by 0 and 0, are fewer than the 2 that one output row needs"),
        (9, 4, "reflect padding of 1 and 1 needs more than 1 rows"),
    ],
)
def test_an_image_too_small_is_refused_at_the_value_that_cannot_be_computed(size: int, value: int, reason: str) -> None:
    graph: AxisGraph = (
        (),
        ((0, Sliding(3)),),
        ((1, Sliding(5)),),
        ((2, Sliding(2, 2)),),
        ((3, Sliding(3, 1, 1, 1, 1, border="reflect")),),
    )
    with pytest.raises(SizeError, match=reason) as raised:
        schedule(graph, size, 4)
    assert raised.value.value == value


def test_operands_that_do_not_fit_together_are_refused_at_the_value_that_joins_them() -> None:
    graph: AxisGraph = ((), ((0, Sliding(3)),), ((0, IDENTITY),), ((2, IDENTITY), (1, IDENTITY)))
    with pytest.raises(SizeError, match="its operands have 8 and 10 rows") as raised:
        schedule(graph, 10, 4)
    assert raised.value.value == 3
