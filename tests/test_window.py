"""Windows, against torch's own sizes and against the padded input written out row by row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxstream.geometry.window import IDENTITY, Border, Placed, Same, Sliding, Span

BORDERS: tuple[Border, ...] = ("zeros", "reflect", "replicate")
TORCH_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}

lengths = st.integers(1, 20)
paddings = st.integers(-9, 9)


@st.composite
def padded_windows(draw: st.DrawFn) -> Sliding:
    """What a convolution, a padding or a crop can be: any padding on either side, larger than the kernel too."""
    return Sliding(
        kernel=draw(st.integers(1, 5)),
        stride=draw(st.integers(1, 7)),
        dilation=draw(st.integers(1, 4)),
        before=draw(paddings),
        after=draw(paddings),
        border=draw(st.sampled_from(BORDERS)),
    )


@st.composite
def pooling_windows(draw: st.DrawFn) -> Sliding:
    """What a pooling can be: only poolings have a `ceil_mode`, and torch pads them by half a kernel at most."""
    kernel = draw(st.integers(1, 6))
    margin = draw(st.integers(0, kernel // 2))
    return Sliding(
        kernel,
        stride=draw(st.integers(1, 8)),
        dilation=draw(st.integers(1, 3)),
        before=margin,
        after=margin,
        ceil_mode=draw(st.booleans()),
    )


windows = st.one_of(padded_windows(), pooling_windows())


# The reference: every position of the padded input is looked up on its own.


def source(position: int, length: int, border: Border) -> int | None:
    """The row that lies at a position of the padded input; None for a zero."""
    if 0 <= position < length:
        return position
    if border == "reflect":
        return -position if position < 0 else 2 * (length - 1) - position
    if border == "replicate":
        return 0 if position < 0 else length - 1
    return None


def positions(window: Sliding, row: int) -> range:
    """The positions from the first to the last tap of an output row, those between the taps included."""
    taps = [row * window.stride - window.before + tap * window.dilation for tap in range(window.kernel)]
    return range(taps[0], taps[-1] + 1)


def needed(window: Sliding, output: int, length: int) -> set[int]:
    """The input rows that an output row cannot do without.

    Padding is added to a block that ends with the image's border, so a window that leaves the image needs the
    border's own row besides, even where zeros are all that it sees.
    """
    rows = {source(position, length, window.border) for position in positions(window, output)}
    rows |= {0 for position in positions(window, output) if position < 0}
    rows |= {length - 1 for position in positions(window, output) if position >= length}
    return {row for row in rows if row is not None}


def all_needed(window: Sliding, length: int) -> list[set[int]]:
    """`needed` for every output row; discards an input that is too small for the window."""
    try:
        size = window.size(length)
    except ValueError:
        assume(False)
    return [needed(window, row, length) for row in range(size)]


# Sizes.


def torch_size(window: Sliding, length: int) -> int | None:
    """The size of torch's dense result; None where torch raises."""
    image = torch.zeros(1, 1, length)
    try:
        padded = F.pad(image, (window.before, window.after), TORCH_MODES[window.border])
        kernel = torch.ones(1, 1, window.kernel)
        return F.conv1d(padded, kernel, stride=window.stride, dilation=window.dilation).shape[-1]
    except RuntimeError:
        return None


def pooled_sizes(window: Sliding, length: int) -> set[int | None]:
    """The sizes of torch's poolings; None where one raises."""
    image = torch.zeros(1, 1, length)
    padding, ceil = window.before, window.ceil_mode
    poolings: list[Callable[[], torch.Tensor]] = [
        lambda: F.max_pool1d(image, window.kernel, window.stride, padding, window.dilation, ceil)
    ]
    if window.dilation == 1:
        poolings.append(lambda: F.avg_pool1d(image, window.kernel, window.stride, padding, ceil))
    found: set[int | None] = set()
    for pooling in poolings:
        try:
            found.add(pooling().shape[-1])
        except RuntimeError:
            found.add(None)
    return found


def window_size(window: Sliding, length: int) -> int | None:
    try:
        return window.size(length)
    except ValueError:
        return None


@settings(max_examples=750, deadline=None)
@given(window=padded_windows(), length=lengths)
def test_size_of_a_padded_convolution_is_torchs_and_fails_where_torch_does(window: Sliding, length: int) -> None:
    assert window_size(window, length) == torch_size(window, length)


@settings(max_examples=750, deadline=None)
@given(window=pooling_windows(), length=lengths)
def test_size_of_a_pooling_is_torchs_and_fails_where_torch_does(window: Sliding, length: int) -> None:
    assert pooled_sizes(window, length) == {window_size(window, length)}


@settings(max_examples=100, deadline=None)
@given(start=st.integers(0, 9), cut=st.integers(0, 9), step=st.integers(1, 5), length=lengths)
def test_a_crop_is_a_slice(start: int, cut: int, step: int, length: int) -> None:
    window = Sliding(stride=step, before=-start, after=-cut)
    rows = range(length)[start : max(length - cut, 0) : step]
    # The one deliberate exception: torch returns an empty tensor from an empty slice, a window always has rows.
    assert window_size(window, length) == (len(rows) or None)
    for row, expected in enumerate(rows):
        span = window.span(row, row + 1, length)
        assert range(length)[span.lo : span.hi] == range(expected, expected + 1)


@settings(max_examples=150, deadline=None)
@given(start=st.integers(0, 9), step=st.integers(1, 5), count=st.integers(1, 6), spare=st.integers(0, 5))
def test_rows_that_are_placed_are_read_where_they_are_written(start: int, step: int, count: int, spare: int) -> None:
    target = start + (count - 1) * step + 1 + spare
    window = Placed(start, step, count, target)
    written = [[row for row in range(count) if start + row * step == place] for place in range(target)]
    assert window.size(count) == target
    for first in range(target):
        for stop in range(first + 1, target + 1):
            span = window.span(first, stop, count)
            wanted = [row for rows in written[first:stop] for row in rows]
            assert 0 <= span.lo < span.hi <= count, "nothing runs on an empty block"
            assert all(span.lo <= row < span.hi for row in wanted)
    spans = [window.span(place, place + 1, count) for place in range(target)]
    assert [span.lo for span in spans] == sorted(span.lo for span in spans)
    assert [span.hi for span in spans] == sorted(span.hi for span in spans)
    assert all(span.hi - span.lo == 1 for span in spans)
    with pytest.raises(ValueError, match=f"{count + 1} rows are written in the place of {count}"):
        window.size(count + 1)


@settings(max_examples=150, deadline=None)
@given(kernel=st.integers(1, 5), step=st.integers(1, 5), dilation=st.integers(1, 3), length=st.integers(1, 40))
def test_same_padding_is_the_least_one_with_a_row_for_every_step(
    kernel: int, step: int, dilation: int, length: int
) -> None:
    window = Same(kernel, step, dilation)
    before, after = window.at(length).before, window.at(length).after
    follower = Sliding(kernel, step, dilation)
    count = -(-length // step)
    assert window.size(length) == length + before + after
    # Where the kernel is smaller than the step, more rows than are needed may be there already.
    assert follower.size(window.size(length)) == count
    assert 0 <= after - before <= 1
    assert before + after == 0 or window.size(length) == (count - 1) * step + follower.extent
    # The receptive field holds for every length.
    assert window.before - window.extent + 1 <= before <= window.before


def test_reflect_padding_must_be_smaller_than_the_image() -> None:
    assert Sliding(before=3, after=3, border="reflect").size(4) == 10
    with pytest.raises(ValueError, match="reflect padding of 4 and 0 needs more than 4 rows"):
        Sliding(before=4, border="reflect").size(4)
    with pytest.raises(ValueError, match="reflect padding of 0 and 4 needs more than 4 rows"):
        Sliding(after=4, border="reflect").size(4)


def test_a_kernel_larger_than_the_padded_image_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="4 rows, padded by 1 and 2, are fewer than the 9 that one output row needs"):
        Sliding(kernel=5, dilation=2, before=1, after=2).size(4)


# Spans.


@settings(max_examples=300, deadline=None)
@given(before=paddings, after=paddings, border=st.sampled_from(BORDERS), length=lengths)
def test_the_reference_pads_as_torch_does(before: int, after: int, border: Border, length: int) -> None:
    image = torch.arange(1, length + 1, dtype=torch.float64).view(1, 1, -1)
    try:
        padded = F.pad(image, (before, after), TORCH_MODES[border]).flatten().tolist()
    except RuntimeError:
        assume(False)
    rows = [source(position, length, border) for position in range(-before, length + after)]
    assert [0 if row is None else row + 1 for row in rows] == padded


def under_the_windows(span: Span, border: Border) -> list[int | None]:
    """What a span makes of its rows: extend them in the border's mode, then trim."""
    rows = list(range(span.lo, span.hi))
    ahead, behind = span.pad
    if border == "reflect":
        assert max(span.pad) < len(rows), "torch reflects fewer rows than there are"
    indices = [source(index, len(rows), border) for index in range(-ahead, len(rows) + behind)]
    extended = [None if index is None else rows[index] for index in indices]
    return extended[span.trim[0] : len(extended) - span.trim[1]]


@settings(max_examples=500, deadline=None)
@given(window=windows, length=lengths)
def test_a_span_padded_and_trimmed_gives_the_rows_under_the_windows(window: Sliding, length: int) -> None:
    size = len(all_needed(window, length))
    for start in range(size):
        for stop in range(start + 1, size + 1):
            span = window.span(start, stop, length)
            covered = range(positions(window, start)[0], positions(window, stop - 1)[-1] + 1)
            assert (span.start, span.stop, span.length) == (start, stop, length)
            assert 0 <= span.lo < span.hi <= length
            assert min(*span.pad, *span.trim) >= 0
            assert under_the_windows(span, window.border) == [source(p, length, window.border) for p in covered]


@settings(max_examples=500, deadline=None)
@given(window=windows, length=lengths)
def test_a_span_is_the_tightest_monotone_hull(window: Sliding, length: int) -> None:
    rows = all_needed(window, length)
    for start in range(len(rows)):
        for stop in range(start + 1, len(rows) + 1):
            span = window.span(start, stop, length)
            assert span.lo == min(map(min, rows[start:])), f"outputs from {start} on"
            assert span.hi == max(map(max, rows[:stop])) + 1, f"outputs before {stop}"


@settings(max_examples=100, deadline=None)
@given(window=windows, length=lengths)
def test_spans_move_only_forwards(window: Sliding, length: int) -> None:
    spans = [window.span(row, row + 1, length) for row in range(len(all_needed(window, length)))]
    assert [span.lo for span in spans] == sorted(span.lo for span in spans)
    assert [span.hi for span in spans] == sorted(span.hi for span in spans)


@given(window=windows, row=st.integers(0, 20))
def test_stride_extent_and_before_describe_the_receptive_field(window: Sliding, row: int) -> None:
    first = row * window.stride - window.before
    assert positions(window, row) == range(first, first + window.extent)


@pytest.mark.parametrize(
    ("window", "rows", "length", "expected"),
    [
        # The stem of a ResNet: three rows of padding in front of the first block, none inside.
        (Sliding(7, 2, before=3, after=3), (0, 2), 224, Span(0, 2, 0, 6, (3, 0), (0, 0), 224)),
        (Sliding(7, 2, before=3, after=3), (2, 4), 224, Span(2, 4, 1, 10, (0, 0), (0, 0), 224)),
        # Ceil mode: the last window hangs over the end by one row.
        (Sliding(3, 2, ceil_mode=True), (4, 5), 10, Span(4, 5, 8, 10, (0, 1), (0, 0), 10)),
        # Two mirrored rows in front of one output row: rows 1 and 2 have to be there, row 2 is not under the window.
        (Sliding(2, before=2, border="reflect"), (1, 2), 9, Span(1, 2, 0, 3, (1, 0), (0, 2), 9)),
        # The same behind: the mirrored rows 6 and 7 must still be there, row 6 is not under the window.
        (Sliding(2, after=2, border="reflect"), (8, 9), 9, Span(8, 9, 6, 9, (0, 1), (2, 0), 9)),
        # A window that lies in the padding altogether still gets a row.
        (Sliding(2, 4, before=4), (0, 1), 5, Span(0, 1, 0, 1, (4, 0), (0, 3), 5)),
        # x[2:-3]
        (Sliding(before=-2, after=-3), (0, 4), 9, Span(0, 4, 2, 6, (0, 0), (0, 0), 9)),
        (IDENTITY, (3, 5), 9, Span(3, 5, 3, 5, (0, 0), (0, 0), 9)),
    ],
)
def test_spans_worked_out_by_hand(window: Sliding, rows: tuple[int, int], length: int, expected: Span) -> None:
    assert window.span(*rows, length) == expected


# Readiness.


@settings(max_examples=500, deadline=None)
@given(window=windows, length=lengths)
def test_ready_counts_the_rows_whose_needs_are_there(window: Sliding, length: int) -> None:
    rows = all_needed(window, length)
    for available in range(length):
        count = 0
        while count < len(rows) and max(rows[count]) < available:
            count += 1
        assert window.ready(available, length) == count, f"{available} rows available"
    assert window.ready(0, length) == 0
    assert window.ready(length, length) == len(rows)
