"""Axis tags: which dimension of a value is which streamed axis. Integers and names only, no torch.

Streaming runs along a chosen set of the image's axes. Only these have a tag ("N", "H", "W" ...). A dimension without a
tag is whole in every block, so an operation may do anything along it. Every value of the streamed part has every tag
exactly once. A size that a model reads off a value is that of the whole value; it remembers the streamed axis that it
belongs to, if any.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NoReturn

from .window import IDENTITY, Window

IMAGE = 0
"""The number of the image among the values of the streamed part, which come in topological order."""

SPATIAL_NAMES = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}


def axis_names(spatial: int) -> tuple[str, ...]:
    """Names of an image's dimensions by its number of spatial axes: ("N", "C", "H", "W") for 2."""
    return ("N", "C", *SPATIAL_NAMES[spatial])


class UndeterminedError(Exception):
    """A rule has computed with something that is known only at a call."""


class Undetermined:
    """Something that is known only at a call; computing with it before raises UndeterminedError."""

    def _refuse(self, *args: object) -> NoReturn:
        raise UndeterminedError

    __bool__ = __index__ = __int__ = __float__ = __len__ = __iter__ = __neg__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = _refuse


class Symbol(Undetermined):
    """A size that is known only at a call. Each symbol equals itself alone.

    One that a model reads off a value along a streamed axis remembers where: see `Extent`.
    """

    def __init__(self, original: Symbol | None = None, tag: str | None = None, value: Value | None = None):
        """`original` is the size of the dimension `tag` of `value`, off which this symbol was read."""
        self.original = original
        self.tag = tag
        self.value = value


class Extent(int):
    """A known size that a model has read off a value along a streamed axis.

    It is the size of the whole value; `tag` names the axis, and `value` is what it was read off.
    """

    tag: str
    value: Value


class SymbolicMultiple(Symbol):
    """A size that is known only at a call, computed as a multiple or a fraction of the extent of a streamed axis."""

    def __init__(self, extent: Symbol, factor: Fraction):
        super().__init__()
        self.extent = extent
        self.factor = factor


class Multiple(int):
    """A known size that was computed as a multiple or a fraction of the extent of a streamed axis."""

    extent: Extent
    factor: Fraction


Size = int | Symbol


@dataclass(frozen=True)
class Dim:
    """One dimension of a value: the streamed axis that it is (or None) and its size in the whole value."""

    tag: str | None
    size: Size

    @property
    def known(self) -> int | None:
        """Its size; None at conversion, if the size is known only at a call."""
        return self.size if isinstance(self.size, int) else None

    def through(self, window: Window) -> Dim:
        """The dimension after a window has slid along it. Raises ValueError where the window does not fit."""
        if window == IDENTITY or (isinstance(self.size, Symbol) and _keeps_size(window)):
            return self
        return Dim(self.tag, window.size(self.size) if isinstance(self.size, int) else Symbol())


def _keeps_size(window: Window) -> bool:
    """Whether there are always as many output rows as input rows: a "same" convolution."""
    many = 2**40  # more than any window asks for
    return window.stride == 1 and window.size(many) == many


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that depends on the image, as a rule sees it: its dimensions. Compared by identity."""

    dims: tuple[Dim, ...]
    index: int = -1
    """Its number among the values of the streamed part; set by whoever asks the rules."""
    like: Any = None
    """A tensor of its dtype and device, if they are known: those of the image are, at a call."""

    @property
    def rank(self) -> int:
        return len(self.dims)

    def dim(self, index: int) -> int:
        """The dimension that `index`, possibly counted from the end, stands for. Raises IndexError."""
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

    def resized(self, sizes: Mapping[int, Size]) -> tuple[Dim, ...]:
        """Its dimensions with other sizes."""
        return tuple(replace(dim, size=sizes.get(index, dim.size)) for index, dim in enumerate(self.dims))

    def slid(self, windows: Mapping[int, Window]) -> tuple[Dim, ...]:
        """Its dimensions after windows have slid along some of them. Raises ValueError where one does not fit."""
        return tuple(dim.through(windows.get(index, IDENTITY)) for index, dim in enumerate(self.dims))

    def size(self, index: int) -> Size:
        """The size of a dimension as a model reads it: that of the whole value, and aware of its streamed axis."""
        dim = self.dims[self.dim(index)]
        if dim.tag is None:
            return dim.size
        if isinstance(dim.size, Symbol):
            return Symbol(dim.size, dim.tag, self)
        extent = Extent(dim.size)
        extent.tag, extent.value = dim.tag, self
        return extent


def broadcast(values: Iterable[Value]) -> tuple[Dim, ...] | None:
    """Dimensions of the element-wise combination of values; None if that would combine different axes."""
    values = list(values)
    rank = max(value.rank for value in values)
    if len({tuple(rank - value.rank + value.position(tag) for tag in sorted(value.tags())) for value in values}) > 1:
        return None
    columns = [[value.dims[index - rank] for value in values if rank - index <= value.rank] for index in range(rank)]
    return tuple(_joined(column) for column in columns)


def _joined(dims: list[Dim]) -> Dim:
    others = [dim for dim in dims if dim.size != 1] or dims
    # Known sizes that differ are found when the schedule is made, as an error that names the operation.
    alike = all(dim.size == others[0].size for dim in others) or all(dim.known is not None for dim in others)
    return others[0] if alike else Dim(others[0].tag, Symbol())


def is_extent(size: object) -> bool:
    """Whether a size that a model uses was read off a value along a streamed axis."""
    return isinstance(size, (Extent, Symbol)) and size.tag is not None


def is_extent_of(size: object, dim: Dim) -> bool:
    """Whether a size that a model uses is the extent of just this streamed dimension."""
    return dim.tag is not None and _tag(size) == dim.tag and _ratio(size, dim) == 1


def _tag(size: object) -> str | None:
    """The streamed axis whose extent, or a multiple of it, a size is; None for another size."""
    return size.extent.tag if isinstance(size, (Multiple, SymbolicMultiple)) else getattr(size, "tag", None)


def _ratio(size: object, dim: Dim) -> Fraction | Symbol:
    """A size of a streamed axis as a multiple of that of a dimension."""
    if isinstance(size, int) and isinstance(dim.size, int):
        return Fraction(size, dim.size)
    if isinstance(size, Symbol) and isinstance(dim.size, Symbol):
        (base, factor), (own, by) = _factorised(size), _factorised(dim.size)
        return factor / by if base is own else Symbol()
    return Symbol()


def _factorised(size: Symbol) -> tuple[Symbol, Fraction]:
    """The size that a symbol has been read off or computed from, and the factor by which it is larger."""
    if isinstance(size, SymbolicMultiple):
        base, factor = _factorised(size.extent)
        return base, factor * size.factor
    return (size, Fraction(1)) if size.original is None else _factorised(size.original)


def multiplied(size: object, factor: Fraction) -> Multiple | SymbolicMultiple | None:
    """An extent of a streamed axis, or a multiple of one, times a factor; None for another size, or no whole number."""
    if isinstance(size, (Multiple, SymbolicMultiple)):
        return multiplied(size.extent, size.factor * factor)
    if isinstance(size, Symbol) and size.tag is not None:
        return SymbolicMultiple(size, factor)
    if isinstance(size, Extent) and (size * factor).denominator == 1:
        found = Multiple(size * factor)
        found.extent, found.factor = size, factor
        return found
    return None


def product(sizes: Iterable[Size]) -> Size:
    """The product of sizes; a new Symbol if one of them is not known."""
    total = 1
    for size in sizes:
        if isinstance(size, Symbol):
            return Symbol()
        total *= size
    return total


def reshaped(dims: Sequence[Dim], sizes: Sequence[Size]) -> list[Dim] | None:
    """The dimensions of a reshape to `sizes`; None if it would split, merge or reorder a streamed axis.

    A streamed dimension must appear in `sizes` as its own extent, or be what the one -1 among them stands for; between
    two of these, other dimensions may be split and merged.
    """
    streamed = [index for index, dim in enumerate(dims) if dim.tag is not None]
    for inferred in [None, *streamed]:
        result = _reshaped(dims, sizes, inferred)
        if result is not None:
            return result
    return None


def _reshaped(dims: Sequence[Dim], sizes: Sequence[Size], inferred: int | None) -> list[Dim] | None:
    """The same, if -1 stands for the streamed dimension `inferred`; with None, for a dimension that is not streamed."""
    result: list[Dim] = []
    start = at = 0
    for index in [*(i for i, dim in enumerate(dims) if dim.tag is not None), len(dims)]:
        last = index == len(dims)
        stop = len(sizes) if last else _find(sizes, at, index, dims, inferred)
        if stop is None:
            return None
        run = _run(dims[start:index], sizes[at:stop])
        if run is None:
            return None
        result += run
        if not last:
            result.append(dims[index])
        start, at = index + 1, stop + 1
    return result


def _find(sizes: Sequence[Size], at: int, index: int, dims: Sequence[Dim], inferred: int | None) -> int | None:
    """Where in `sizes`, from `at` on, the streamed dimension `index` stands; None if it does not."""
    for position in range(at, len(sizes)):
        size = sizes[position]
        if is_extent_of(size, dims[index]) or (inferred == index and size == -1):
            return position
    return None


def _run(dims: Sequence[Dim], sizes: Sequence[Size]) -> list[Dim] | None:
    """Dimensions that are not streamed, reshaped to `sizes`; None unless the numbers of elements can agree."""
    if any(map(is_extent, sizes)):
        return None
    old, new = [dim.size for dim in dims], [size for size in sizes if size != -1]
    unknown = [size for size in old if isinstance(size, Symbol)]
    wanted = [size for size in new if isinstance(size, Symbol)]
    for symbol in list(wanted):
        if symbol in unknown:
            unknown.remove(symbol)
            wanted.remove(symbol)
    before = math.prod(size for size in old if isinstance(size, int))
    after = math.prod(size for size in new if isinstance(size, int))
    missing: Size = Symbol()
    if not unknown and not wanted:
        if -1 in sizes and after and before % after == 0:
            missing = before // after
        elif before != after:
            return None
    elif -1 in sizes:
        missing = unknown[0] if len(unknown) == 1 and not wanted and before == after else missing
    elif not wanted and (not before or after % before or after == before):
        return None  # an unknown size cannot disappear
    return [Dim(None, missing if size == -1 else size) for size in sizes]


@dataclass(frozen=True)
class Regrouped:
    """A reshape that splits or merges streamed axes."""

    dims: list[Dim]
    """The dimensions of the result."""
    parts: dict[str, Size]
    """Streamed axis -> into how many positions each of its positions was merged, or the length of its windows."""
    merges: bool
    """Whether streamed axes are merged with dimensions behind them, and not split into windows."""


def regrouped(dims: Sequence[Dim], sizes: Sequence[Size]) -> Regrouped | None:
    """The reshape of dimensions to `sizes` that splits or merges streamed axes; None if it does so in another way.

    A streamed dimension may be split into itself and windows behind it, or merged with the dimensions behind it.
    """
    for change in (_split_apart(dims, sizes), _merged(dims, sizes), _inferred_merge(dims, sizes)):
        if change is not None and (result := reshaped(change.dims, change.sizes)) is not None:
            return Regrouped(result, change.parts, change.merges)
    return None


@dataclass
class _Change:
    """What is left of a reshape once streamed axes have been split or merged: they stay as they are."""

    dims: list[Dim]
    sizes: list[Size]
    """The sizes to which these are then reshaped."""
    parts: dict[str, Size]
    """See `Regrouped`."""
    merges: bool
    """See `Regrouped`."""


def _split_apart(dims: Sequence[Dim], sizes: Sequence[Size]) -> _Change | None:
    """The reshape after streamed dimensions have been split into themselves and windows."""
    change = _Change(list(dims), list(sizes), {}, merges=False)
    for size in sizes:
        position = _position(change.dims, _tag(size))
        if position is None:
            continue
        dim = change.dims[position]
        ratio = _ratio(size, dim)
        # Of a symbol nothing is known: it is the extent of another value, such as a batch that was merged with windows.
        length: Size = ratio if isinstance(ratio, Symbol) else ratio.denominator
        if dim.tag is None or length == 1 or (isinstance(ratio, Fraction) and ratio.numerator != 1):
            continue
        part = int(size) if isinstance(size, int) else size
        change.dims[position : position + 1] = [Dim(dim.tag, part), Dim(None, length)]
        change.parts[dim.tag] = length
    return change if change.parts else None


def _merged(dims: Sequence[Dim], sizes: Sequence[Size]) -> _Change | None:
    """The reshape after streamed dimensions have been merged with as many of those behind them as their sizes say."""
    change = _Change(list(dims), list(sizes), {}, merges=True)
    for size in sizes:
        position = _position(change.dims, _tag(size))
        if position is None:
            continue
        dim = change.dims[position]
        ratio = _ratio(size, dim)
        if dim.tag is None or isinstance(ratio, Symbol) or ratio.denominator > 1 or ratio == 1:
            continue
        stop = _reaching(change.dims, position + 1, ratio.numerator)
        if stop is None:
            return None
        change.dims[position:stop] = [Dim(dim.tag, int(size) if isinstance(size, int) else size)]
        change.parts[dim.tag] = ratio.numerator
    return change if change.parts else None


def _position(dims: Sequence[Dim], tag: str | None) -> int | None:
    """The dimension that is a streamed axis; None if there is none."""
    return next((index for index, dim in enumerate(dims) if tag is not None and dim.tag == tag), None)


def _reaching(dims: Sequence[Dim], start: int, count: int) -> int | None:
    """The index behind dimensions from `start` on whose sizes multiply to `count`; None if there is none."""
    for stop in range(start + 1, len(dims) + 1):
        if any(dim.tag is not None for dim in dims[start:stop]):
            return None
        if product(dim.size for dim in dims[start:stop]) == count:
            return stop
    return None


def _inferred_merge(dims: Sequence[Dim], sizes: Sequence[Size]) -> _Change | None:
    """The reshape to sizes with a -1, which stands for a streamed dimension and some behind it."""
    for position, dim in enumerate(dims):
        for stop in range(position + 2, len(dims) + 1):
            behind = dims[position + 1 : stop]
            if dim.tag is None or any(other.tag is not None for other in behind):
                break
            count = product(other.size for other in behind)
            merged = Dim(dim.tag, product([dim.size, count]))
            old = [*dims[:position], merged, *dims[stop:]]
            new = [Value((merged,)).size(0) if size == -1 else size for size in sizes]
            if reshaped(old, new) is not None:
                return _Change(old, new, {dim.tag: count}, merges=True)
    return None
