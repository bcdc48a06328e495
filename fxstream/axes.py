"""Axis tags: which dimension of a value is which streamed axis. Integers and names only, no torch.

Streaming is along a chosen set of axes of the image. Only those carry a tag (`"N"`, `"H"`, `"W"` ...); a dimension
without a tag is whole in every block, and operations may do with it what they like. Every value of the streamed
part has every tag exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .window import Window

SPATIAL_NAMES = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}


def axis_names(spatial: int) -> tuple[str, ...]:
    """Names of the dimensions of an image with so many spatial axes: ("N", "C", "H", "W") for 2."""
    return ("N", "C", *SPATIAL_NAMES[spatial])


@dataclass(frozen=True)
class Dim:
    """One dimension of a value: the streamed axis that it is (or None) and its size in the whole value, if known."""

    tag: str | None = None
    size: int | None = None


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of a tensor that depends on the image; compared by identity."""

    dims: tuple[Dim, ...]
    index: int = -1
    """Its place in the program; set by whoever runs the rules."""

    @property
    def rank(self) -> int:
        return len(self.dims)

    def dim(self, index: int) -> int:
        """A dimension counted from 0, from one that may be counted from the end. Raises IndexError."""
        if not -self.rank <= index < self.rank:
            raise IndexError(f"dimension {index} of a value with {self.rank} dimensions")
        return index % self.rank

    def tags(self, dims: Iterable[int] | None = None) -> tuple[str, ...]:
        """The streamed axes among `dims`, by default among all."""
        chosen = self.dims if dims is None else [self.dims[self.dim(index)] for index in dims]
        return tuple(dim.tag for dim in chosen if dim.tag is not None)

    def position(self, tag: str) -> int:
        """The dimension that is the streamed axis `tag`."""
        return next(index for index, dim in enumerate(self.dims) if dim.tag == tag)

    def resized(self, sizes: Mapping[int, int | None]) -> tuple[Dim, ...]:
        """Its dimensions with other sizes."""
        return tuple(replace(dim, size=sizes.get(index, dim.size)) for index, dim in enumerate(self.dims))

    def slid(self, windows: Mapping[int, Window]) -> tuple[Dim, ...]:
        """Its dimensions after windows have slid along some of them. Raises ValueError where one does not fit."""
        sizes = ((index, self.dims[index].size, window) for index, window in windows.items())
        return self.resized({index: None if size is None else window.size(size) for index, size, window in sizes})


def broadcast(values: Iterable[Value]) -> tuple[Dim, ...] | None:
    """Dimensions of the element-wise combination of values; None if that would combine different axes."""
    values = list(values)
    rank = max(value.rank for value in values)
    if len({tuple(rank - value.rank + value.position(tag) for tag in sorted(value.tags())) for value in values}) > 1:
        return None
    columns = [[value.dims[index - rank] for value in values if rank - index <= value.rank] for index in range(rank)]
    return tuple(_joined(column) for column in columns)


def _joined(dims: list[Dim]) -> Dim:
    tag = next((dim.tag for dim in dims if dim.tag is not None), None)
    sizes = {dim.size for dim in dims} - {1}
    return Dim(tag, sizes.pop() if len(sizes) == 1 else (None if sizes else 1))
