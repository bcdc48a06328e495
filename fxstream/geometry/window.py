"""Windows: which input rows an output row reads, along one axis. Integers only, no torch.

A window is declared once, and everything else is derived from it: sizes, which rows can be computed when, carries,
padding, receptive fields. "Row" means a position along the axis, whichever axis that is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

Border = Literal["zeros", "reflect", "replicate"]


class Span(NamedTuple):
    """What one run of an operation reads and writes along one axis. All counts are rows.

    The operation gets input rows `[lo, hi)`. Extending them by `pad` rows beyond the image and then
    cutting `trim` rows off gives exactly the rows under the windows of output rows `[start, stop)`.
    """

    start: int
    stop: int
    lo: int
    hi: int
    pad: tuple[int, int]
    trim: tuple[int, int]
    length: int
    """Rows of the whole input."""


class Window(ABC):
    """The rows that an operation reads along one axis; immutable and hashable.

    `stride`, `extent` and `before` describe the receptive field: output row `a` reads input rows
    `[a * stride - before, a * stride - before + extent)`, some of which may lie outside the image.
    """

    stride: int | Fraction | None
    """None if output rows do not advance at one rate; there is no receptive field then."""
    extent: int | Fraction
    before: int | Fraction

    @abstractmethod
    def size(self, length: int) -> int:
        """Output rows for `length` input rows. Raises ValueError where the dense operation would fail."""

    @abstractmethod
    def span(self, start: int, stop: int, length: int) -> Span:
        """What output rows `[start, stop)` (not empty) read of `length` input rows.

        `lo` is the smallest row that any output `>= start` reads and `hi` one past the largest that any
        output `< stop` reads: the monotone hull, so that `lo` and `hi` never decrease along the axis.
        """

    @abstractmethod
    def whole(self, length: int) -> Span:
        """The span of all output rows, for an operation that gets all `length` input rows, needed or not."""

    def ready(self, available: int, length: int) -> int:
        """How many output rows can be computed from the first `available` of `length` input rows."""
        size = self.size(length)
        if available == length:
            return size
        return bisect_right(range(size), available, key=lambda row: self.span(row, row + 1, length).hi)


@dataclass(frozen=True)
class Sliding(Window):
    """The window of a convolution, a pooling, a padding or a crop; the default is the identity.

    Formulas: torch.nn.Conv2d and torch.nn.MaxPool2d ("Shape"), with padding `before` and `after`
    counted separately. A negative padding crops.
    """

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    border: Border = "zeros"
    ceil_mode: bool = False

    @property
    def extent(self) -> int:  # type: ignore[override]  # derived here, a plain attribute elsewhere
        return self.dilation * (self.kernel - 1) + 1

    def size(self, length: int) -> int:
        if self.border == "reflect" and max(self.before, self.after) >= length:
            raise ValueError(f"reflect padding of {self.before} and {self.after} needs more than {length} rows")
        if self.border == "zeros" and length + min(self.before, 0) + min(self.after, 0) < 0:
            raise ValueError(f"a crop of {-self.before} and {-self.after} takes more than {length} rows")
        spare = length + self.before + self.after - self.extent
        if self.ceil_mode:
            size = -(-spare // self.stride) + 1
            # torch drops a window that would start in the padding behind the image.
            size -= (size - 1) * self.stride >= length + self.before
        else:
            size = spare // self.stride + 1
        if size < 1:
            raise ValueError(
                f"{length} rows, padded by {self.before} and {self.after}, are fewer than the {self.extent} "
                "that one output row needs"
            )
        return size

    def span(self, start: int, stop: int, length: int) -> Span:
        first = start * self.stride - self.before
        last = (stop - 1) * self.stride - self.before + self.extent
        # At least one real row, also for a window that lies in the padding: nothing runs on an empty block.
        lo = min(max(first, 0), length - 1)
        hi = max(min(last, length), 1)
        if self.border == "reflect":
            # Output 0 reads mirrored rows up to `before`, and the last output down from the image's end.
            overhang = (self.size(length) - 1) * self.stride - self.before + self.extent - length
            hi = max(hi, min(length, self.before + 1))
            if overhang > 0:
                lo = min(lo, length - 1 - overhang)
        pad = (max(0, lo - first), max(0, last - hi))
        trim = (max(0, first - lo), max(0, hi - last))
        return Span(start, stop, lo, hi, pad, trim, length)

    def whole(self, length: int) -> Span:
        span = self.span(0, self.size(length), length)
        trim = (span.trim[0] + span.lo, span.trim[1] + length - span.hi)
        return span._replace(lo=0, hi=length, trim=trim)


@dataclass(frozen=True)
class Transposed(Window):
    """The window of a transposed convolution, of pixel shuffling or of nearest up-sampling by an integer.

    Input row `i` contributes to output rows `i * step - padding + dilation * k` for `k` in `range(kernel)`, which is
    torch.nn.ConvTranspose2d with stride `step`. Which rows an output row reads depends on its phase: `before` and
    `extent` are bounds for all of them.
    """

    kernel: int
    step: int
    dilation: int = 1
    padding: int = 0
    output_padding: int = 0

    @property
    def reach(self) -> int:
        """Output rows that one input row contributes to, from the first to the last."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def stride(self) -> Fraction:  # type: ignore[override]  # derived here, a plain attribute elsewhere
        return Fraction(1, self.step)

    @property
    def extent(self) -> Fraction:  # type: ignore[override]
        return Fraction(self.reach - 1, self.step) + 1

    @property
    def before(self) -> Fraction:  # type: ignore[override]
        # The first row that contributes to output row 0 is the least i with i * step - padding + reach > 0.
        return Fraction(self.reach - 1 - self.padding, self.step)

    def size(self, length: int) -> int:
        size = (length - 1) * self.step - 2 * self.padding + self.reach + self.output_padding
        if size < 1:
            raise ValueError(f"{length} rows, of which {self.padding} are cut off on both sides, leave none")
        return size

    def span(self, start: int, stop: int, length: int) -> Span:
        # Input row i reaches output rows [i * step - padding, i * step - padding + reach).
        first = -(-(start + self.padding - self.reach + 1) // self.step)
        # An output row in the gap between the reaches of two input rows gets the one before it: never an empty block.
        first = min(first, (start + self.padding) // self.step)
        last = (stop - 1 + self.padding) // self.step + 1
        return self._span(start, stop, min(max(first, 0), length - 1), max(min(last, length), 1), length)

    def whole(self, length: int) -> Span:
        return self._span(0, self.size(length), 0, length, length)

    def _span(self, start: int, stop: int, lo: int, hi: int, length: int) -> Span:
        # Here `pad` and `trim` speak of output rows: those that no input row reaches, those that are not wanted.
        reached = (lo * self.step - self.padding, (hi - 1) * self.step - self.padding + self.reach)
        pad = (max(0, reached[0] - start), max(0, stop - reached[1]))
        trim = (max(0, start - reached[0]), max(0, reached[1] - stop))
        return Span(start, stop, lo, hi, pad, trim, length)


@dataclass(frozen=True)
class Table(Window):
    """A window given row by row, as resampling needs it: output row `i` reads input rows `[first[i], end[i])`.

    It holds for an axis of `length` rows only. Neither `first` nor `end` ever decreases.
    """

    length: int
    first: tuple[int, ...]
    end: tuple[int, ...]
    stride: int | Fraction | None = None
    extent: int | Fraction = 0
    before: int | Fraction = 0

    def size(self, length: int) -> int:
        if length != self.length:
            raise ValueError(f"its rows were laid out for {self.length} rows, and there are {length}")
        return len(self.first)

    def span(self, start: int, stop: int, length: int) -> Span:
        return Span(start, stop, self.first[start], self.end[stop - 1], (0, 0), (0, 0), length)

    def whole(self, length: int) -> Span:
        return Span(0, self.size(length), 0, length, (0, 0), (0, 0), length)


@dataclass(frozen=True)
class Same(Window):
    """TensorFlow's padding "SAME", in front of a convolution or pooling that has a `kernel` and moves by `step` rows.

    It is the least padding with which there is one output row for every `step` rows, the last of which may be
    incomplete. So it follows from the number of rows. An odd row of padding goes behind the image.
    """

    kernel: int
    step: int
    dilation: int = 1

    stride = 1

    @property
    def extent(self) -> int:  # type: ignore[override]  # derived here, a plain attribute elsewhere
        # A bound for all lengths, as `before` is.
        return 1 + self.before - max(self._reach - self.step, 0) // 2

    @property
    def before(self) -> int:  # type: ignore[override]
        return (self._reach - 1) // 2

    @property
    def _reach(self) -> int:
        """Rows under the kernel, from the first to the last."""
        return self.dilation * (self.kernel - 1) + 1

    def at(self, length: int) -> Sliding:
        """The window for `length` rows."""
        total = max((-(-length // self.step) - 1) * self.step + self._reach - length, 0)
        return Sliding(before=total // 2, after=total - total // 2)

    def size(self, length: int) -> int:
        return self.at(length).size(length)

    def span(self, start: int, stop: int, length: int) -> Span:
        return self.at(length).span(start, stop, length)

    def whole(self, length: int) -> Span:
        return self.at(length).whole(length)


@dataclass(frozen=True)
class Placed(Window):
    """The window of rows that are written into a longer value: row `start + i * step` of `target` rows is row `i`.

    The other rows of the result read none of them.
    """

    start: int
    step: int
    count: int | None
    """The number of rows that are written; None before a call."""
    target: int | None
    """The number of rows of the result; None before a call."""

    extent = 1

    @property
    def stride(self) -> int | None:  # type: ignore[override]  # derived here, a plain attribute elsewhere
        return 1 if self.step == 1 else None

    @property
    def before(self) -> int:  # type: ignore[override]
        return self.start

    def size(self, length: int) -> int:
        if self.target is None or length != self.count:
            raise ValueError(f"{length} rows are written in the place of {self.count}")
        return self.target

    def span(self, start: int, stop: int, length: int) -> Span:
        # Rows in a gap, before or behind the written ones get the nearest row before them: never an empty block.
        first = (start - self.start) // self.step
        last = (stop - 1 - self.start) // self.step + 1
        lo, hi = min(max(first, 0), length - 1), max(min(last, length), 1)
        return Span(start, stop, lo, hi, (0, 0), (0, 0), length)

    def whole(self, length: int) -> Span:
        return Span(0, self.size(length), 0, length, (0, 0), (0, 0), length)


IDENTITY = Sliding()
