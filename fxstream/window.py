"""Windows: which input rows an output row reads, along one axis. Integers only, no torch.

A window is declared once; sizes, readiness, carries, padding and receptive fields all follow from it.
"Row" stands for a position along whichever axis is meant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
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

    def of_whole(self) -> Span:
        """The same for an operation that gets all rows of the input."""
        before, after = self.trim
        return self._replace(lo=0, hi=self.length, trim=(before + self.lo, after + self.length - self.hi))


class Window(ABC):
    """The rows that an operation reads along one axis; immutable and hashable.

    `stride`, `extent` and `before` describe the receptive field: output row `a` reads input rows
    `[a * stride - before, a * stride - before + extent)`, some of which may lie outside the image.
    """

    stride: int
    extent: int
    before: int

    @abstractmethod
    def size(self, length: int) -> int:
        """Output rows for `length` input rows. Raises ValueError where the dense operation would fail."""

    @abstractmethod
    def span(self, start: int, stop: int, length: int) -> Span:
        """What output rows `[start, stop)` (not empty) read of `length` input rows.

        `lo` is the smallest row that any output `>= start` reads and `hi` one past the largest that any
        output `< stop` reads: the monotone hull, so that `lo` and `hi` never decrease along the axis.
        """

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


IDENTITY = Sliding()
