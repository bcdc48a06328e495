"""Resampling: every output row is a weighted sum of a few input rows, gathered along one axis after the other.

`F.interpolate` cannot run on blocks: it computes in floating point, from the sizes of its input and output, which rows
an output row reads. So the rows and weights of a whole axis are computed once, with torch's own arithmetic
(ATen/native/UpSample.h and AdaptivePooling.h), and each block takes its part of them. Only scale factors that are
powers of two run natively, since the arithmetic with them is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ..geometry.axes import Dim, Extent, Size, Symbol, Value
from ..geometry.window import Span, Table, Window
from .arguments import as_tuple
from .registry import Answer, Local, NotLocal, Unknown, register

_TAPS = {"nearest": 1, "nearest-exact": 1, "linear": 2, "bilinear": 2, "trilinear": 2, "bicubic": 4}
"""The modes in which an output row reads a fixed number of input rows, with that number."""
_WAY_OUT = "use a mode of " + ", ".join([*_TAPS, "area"])
_RANKS = {"linear": (3,), "bilinear": (4,), "trilinear": (5,), "bicubic": (4,)}


@dataclass(frozen=True)
class _Axis:
    """Resampling along one axis, from `length` rows to `size` rows."""

    mode: str
    length: int
    size: int
    scale: float | None
    """The scale factor, if torch uses it instead of the ratio of the sizes."""
    align_corners: bool
    antialias: bool = False

    @property
    def factor(self) -> int | None:
        """The integer factor of the enlargement, if it is a power of two, so that arithmetic with it is exact."""
        if self.antialias or self.mode == "area":
            return None
        factor = self.size // self.length
        exact = factor * self.length == self.size and factor.bit_count() == 1 and self.scale in (None, factor)
        return factor if exact and not (self.align_corners and factor > 1) else None


class _Like(NamedTuple):
    """The properties of a block from which torch chooses its arithmetic for nearest neighbours.

    Source: ATen/native/cpu/UpSampleKernel.cpp.
    """

    dtype: torch.dtype
    device: torch.device
    channels: int = 1
    """The number of channels if the block is channels_last in memory, else 1."""
    others: tuple[int, ...] = ()
    """The sizes of the result along the other axes, in rows."""

    @staticmethod
    def of(block: torch.Tensor, others: tuple[int, ...]) -> _Like:
        # `_nearest` numbers the rows in this dtype, so it must hold all row numbers exactly. With shorter dtypes torch
        # chooses the same rows as with float32.
        dtype = block.dtype if block.dtype.itemsize > 2 else torch.float32
        channels = block.size(1) if others and block.stride(1) == 1 else 1
        # torch only asks whether a size is greater than 128, so all greater sizes share an entry of the cache.
        return _Like(dtype, block.device, channels, tuple(min(size, 129) for size in others))


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept must serve training, too, which refuses inference tensors
def _nearest(axis: _Axis, like: _Like) -> torch.Tensor:
    """For every output row the input row that it is: torch's own answer to numbered rows."""
    rows = torch.arange(axis.length, device=like.device).to(like.dtype)
    rows = rows.expand(1, like.channels, *(1,) * len(like.others), axis.length)
    if like.channels > 1:
        rows = rows.contiguous(memory_format=torch.channels_last if rows.dim() == 4 else torch.channels_last_3d)
    target: dict[str, Any] = {"size": (*like.others, axis.size)}
    if axis.scale is not None:
        target = {"scale_factor": (*map(float, like.others), float(axis.scale))}
    found = F.interpolate(rows, **target, mode=axis.mode)
    return found[(0,) * (rows.dim() - 1)].long()


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept must serve training, too, which refuses inference tensors
def _weighted(axis: _Axis, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """For every output row the input rows that it reads and their weights, both (taps, size).

    If some output rows read fewer rows than others, the last tensor says which of these are read; else it is None.
    """
    if axis.mode == "area":
        return _mean(axis, dtype)
    if axis.antialias:
        return _antialiased(axis, dtype)
    position = _source(axis, dtype)
    below = position.floor().clamp(max=axis.length - 1)
    fraction = (position - below).clamp(0, 1)
    weights = torch.stack([1 - fraction, fraction]) if _TAPS[axis.mode] == 2 else _cubic(fraction)
    first = 1 - len(weights) // 2
    # An axis that keeps its size is copied: there, a row does not read the next one, not even with weight 0.
    step = 0 if axis.size == axis.length and len(weights) == 2 else 1
    rows = torch.stack([below.long() + step * offset for offset in range(first, first + len(weights))])
    return rows.clamp(0, axis.length - 1), weights, None


def _mean(axis: _Axis, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of adaptive average pooling (ATen/native/AdaptivePooling.h)."""
    output = torch.arange(axis.size, device="cpu")
    first = output * axis.length // axis.size
    counts = -(-(output + 1) * axis.length // axis.size) - first
    rows, read = _taps(first, counts)
    return rows, (1 / counts.to(dtype)).expand(rows.shape), read


def _antialiased(axis: _Axis, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Filters that are as wide as the rows of the result where these are wider than the input's (Pillow's resampling).

    Formulas: ATen/native/cpu/UpSampleKernel.cpp, _compute_indices_min_size_weights_aa.
    """
    output = torch.arange(axis.size, device="cpu")
    if axis.size == axis.length:  # it is copied, whatever the scale factor
        rows, read = _taps(output, torch.ones_like(output))
        return rows, read.to(dtype), read
    ratio = _ratio(axis, dtype)
    widening = ratio.clamp(min=1)
    support = widening * (_TAPS[axis.mode] / 2)
    center = ratio * (output.to(dtype) + 0.5)
    # torch's conversion to an integer truncates.
    first = (center - support + 0.5).long().clamp(min=0)
    counts = (center + support + 0.5).long().clamp(max=axis.length) - first
    rows, read = _taps(first, counts)
    distance = (first + torch.arange(len(rows), device="cpu")[:, None] - center + 0.5) / widening
    weights = _FILTERS[axis.mode](distance.abs()) * read
    return rows, weights / weights.sum(0), read


def _taps(first: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`counts` rows from `first` on, and which are among them, both (taps, size). Superfluous taps are the last row."""
    tap = torch.arange(int(counts.max()), device="cpu")[:, None]
    return first + torch.minimum(tap, counts - 1), tap < counts


def _triangle(x: torch.Tensor) -> torch.Tensor:
    return (1 - x).clamp(min=0)


def _cubic_filter(x: torch.Tensor) -> torch.Tensor:
    """Cubic convolution with A = -0.5 (Keys 1981), as in Pillow."""
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic_filter}
"""The filters of the modes that torch can antialias, as functions of the distance in rows."""


def _source(axis: _Axis, dtype: torch.dtype) -> torch.Tensor:
    """The position of each output row among the input rows, in rows (torch: area_pixel_compute_source_index)."""
    rows = torch.arange(axis.size, dtype=dtype, device="cpu")  # whatever the default device is
    if axis.size == axis.length:
        return rows
    if axis.align_corners:
        return rows * _ratio(axis, dtype)
    position = _ratio(axis, dtype) * (rows + 0.5) - 0.5
    return position if axis.mode == "bicubic" else position.clamp(min=0)


def _ratio(axis: _Axis, dtype: torch.dtype) -> torch.Tensor:
    """The input rows per output row (torch: area_pixel_compute_scale)."""
    if axis.align_corners:
        return torch.tensor(axis.length - 1 if axis.size > 1 else 0, dtype=dtype, device="cpu") / max(axis.size - 1, 1)
    if axis.scale is None:
        return torch.tensor(axis.length, dtype=dtype, device="cpu") / axis.size
    return torch.tensor(1 / axis.scale, dtype=dtype, device="cpu")


def _cubic(fraction: torch.Tensor) -> torch.Tensor:
    """The four weights of cubic convolution with A = -0.75 (Keys 1981; get_cubic_upsample_coefficients)."""
    a = -0.75

    def near(x: torch.Tensor) -> torch.Tensor:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: torch.Tensor) -> torch.Tensor:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return torch.stack([far(fraction + 1), near(fraction), near(1 - fraction), far(2 - fraction)])


@lru_cache(maxsize=256)
def _window(axis: _Axis) -> Table:
    """The rows that each output row may read, in whichever dtype and memory format torch computes their numbers."""
    if _TAPS.get(axis.mode) == 1:
        cpu, precisions = torch.device("cpu"), (torch.float32, torch.float64)
        # torch has separate kernels for channels_last.
        likes = [like for dtype in precisions for like in (_Like(dtype, cpu), _Like(dtype, cpu, 4, (1,)))]
        rows = torch.stack([_nearest(axis, like) for like in likes])
    else:
        rows = torch.cat([_weighted(axis, dtype)[0] for dtype in (torch.float32, torch.float64)])
    # A window must never move back, but rounding may give an output row an earlier row of weight 0.
    first = rows.amin(0).flip(0).cummin(0).values.flip(0)
    end = rows.amax(0).cummax(0).values + 1
    return Table(axis.length, tuple(first.tolist()), tuple(end.tolist()))


def _nominal(mode: str, scale: float | None) -> Table:
    """The window at conversion, when no size is known: only its stride, extent and `before`, for the receptive field.

    They are bounds that hold for every output row. Without a constant scale factor there are none.
    """
    if scale is None:
        return Table(0, (), ())
    # Output row a lies at a * stride + offset among the input rows. The fractional parts of these positions are
    # multiples of 1 / phases, plus a constant shift.
    stride = 1 / Fraction(str(scale))
    offset = {"nearest": Fraction(0), "nearest-exact": stride / 2}.get(mode, (stride - 1) / 2)
    phases = stride.denominator
    shift, spread = offset % Fraction(1, phases), Fraction(phases - 1, phases)
    before = shift + spread - offset + (_TAPS[mode] - 1) // 2
    return Table(0, (), (), stride, _TAPS[mode] + spread, before)


def _natively(block: torch.Tensor, axes: Sequence[_Axis], spans: Sequence[Span]) -> torch.Tensor:
    """torch's own interpolation of a block, by factors that are powers of two, cut to the output rows of the spans."""
    factors = [axis.factor or 1 for axis in axes]
    corners = {"align_corners": False} if _TAPS[axes[0].mode] > 1 else {}
    result = F.interpolate(block, scale_factor=[float(f) for f in factors], mode=axes[0].mode, **corners)
    for dim, (factor, span) in enumerate(zip(factors, spans, strict=True), start=2):
        result = result.narrow(dim, span.start - factor * span.lo, span.stop - span.start)
    return result


def _nearest_rows(block: torch.Tensor, axes: Sequence[_Axis], spans: Sequence[Span]) -> torch.Tensor:
    """Interpolation by nearest neighbours: each output row is a copy of one input row."""
    dtype = _dtype_of_result(block, axes[0].mode)
    sizes = [axis.size for axis in axes]
    likes = [_Like.of(block, (*sizes[:index], *sizes[index + 1 :])) for index in range(len(axes))]
    for dim, (axis, like, span) in enumerate(zip(axes, likes, spans, strict=True), start=2):
        block = block.index_select(dim, _nearest(axis, like)[span.start : span.stop] - span.lo)
    return block.to(dtype)


def _weighted_sums(block: torch.Tensor, axes: Sequence[_Axis], spans: Sequence[Span]) -> torch.Tensor:
    """Interpolation and means: each output row is a weighted sum of input rows, along one axis after another."""
    if not block.is_floating_point():
        raise InputError(f"interpolation in mode '{axes[0].mode}' streams floating-point values, not {block.dtype}")
    dtype = _dtype_of_result(block, axes[0].mode)
    if block.dtype.itemsize < 4:  # torch also adds up half precision in float32
        block = block.float()
    kind = block.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        for dim, (axis, span) in enumerate(zip(axes, spans, strict=True), start=2):
            block = _weighted_sum_along(block, dim, axis, span)
    return block.to(dtype)


def _weighted_sum_along(block: torch.Tensor, dim: int, axis: _Axis, span: Span) -> torch.Tensor:
    """The output rows `[span.start, span.stop)` along one dimension.

    A product with a matrix of weights would be faster, but wrong: its zeros would multiply infinities and NaN of rows
    that the output row does not read.
    """
    here = slice(span.start, span.stop)
    rows, weights, read = _weighted(axis, block.dtype)
    rows, weights = rows[:, here].to(block.device), weights[:, here].to(block.device)
    along = [-1 if index == dim else 1 for index in range(block.dim())]
    result = block.new_zeros(())
    for tap, (index, weight) in enumerate(zip(rows - span.lo, weights, strict=True)):
        product = block.index_select(dim, index) * weight.view(along)
        if read is not None:
            product = torch.where(read[tap, here].to(block.device).view(along), product, 0)
        result = result + product
    return result


def _dtype_of_result(block: torch.Tensor, mode: str) -> torch.dtype:
    """The dtype of the result: the block's, unless autocast changes it."""
    kind = block.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return block.dtype
    return F.interpolate(block.new_zeros((1,) * block.dim()), size=(1,) * (block.dim() - 2), mode=mode).dtype


@register(F.interpolate)
def interpolate(
    input: Value,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Answer:
    axes = input.rank - 2
    sizes, scales = as_tuple(size, axes), as_tuple(scale_factor, axes)
    if problem := _arguments_problem(input, sizes, scales, mode, align_corners, antialias):
        return problem
    lengths = [input.size(dim) for dim in range(2, input.rank)]
    targets = [_target(*given) for given in zip(lengths, sizes, scales, strict=True)]
    dims = (*input.dims[:2], *map(_resized, input.dims[2:], targets))
    if not input.tags(range(2, input.rank)):
        native = partial(F.interpolate, size=size, scale_factor=scale_factor, mode=mode, align_corners=align_corners)
        options = {"recompute_scale_factor": recompute_scale_factor, "antialias": antialias}
        return Local((input,), dims, partial(native, **options))
    if mode not in (_FILTERS if antialias else [*_TAPS, "area"]):
        return NotLocal(f"resamples with mode={mode!r}{' and antialias=True' if antialias else ''}", _WAY_OUT)
    corners = bool(align_corners)
    if any(isinstance(number, Symbol) for number in (*lengths, *targets)):
        irregular = corners or antialias or mode == "area"
        regular = [_constant_rate(scale, irregular, recompute_scale_factor) for scale in scales]
        windows: dict[int, Window] = {dim: _nominal(mode, scale) for dim, scale in enumerate(regular, start=2)}
        return Local((input,), dims, lambda block: block, windows)
    scales = (None,) * axes if recompute_scale_factor else scales
    plan = [
        _Axis(mode, length, target, scale, corners, antialias)
        for length, target, scale in zip(map(_integer, lengths), map(_integer, targets), scales, strict=True)
    ]
    windows = {dim: _window(axis) for dim, axis in enumerate(plan, start=2)}
    if all(axis.factor for axis in plan):
        run = _natively
    elif _TAPS.get(mode) == 1:
        run = _nearest_rows
    else:
        run = _weighted_sums
    return Local((input,), dims, lambda block, *spans: run(block, plan, spans), windows)


def _arguments_problem(
    x: Value, sizes: tuple[Any, ...], scales: tuple[Any, ...], mode: str, align_corners: bool | None, antialias: bool
) -> NotLocal | None:
    if any(isinstance(given, Unknown) for given in (*sizes, *scales)):
        return NotLocal("resamples to a size that is not known before the call")
    if any(isinstance(given, (Value, torch.Tensor)) for given in (*sizes, *scales)):
        return NotLocal("resamples to a size that is a tensor", "give it integers")
    numbers = len(sizes) == len(scales) == x.rank - 2 > 0 and all(
        (size is None) != (scale is None) for size, scale in zip(sizes, scales, strict=True)
    )
    corners = align_corners is None or _TAPS.get(mode, 1) > 1
    filtered = not antialias or (mode in _FILTERS and x.rank == 4)
    if not numbers or not corners or not filtered or x.rank not in _RANKS.get(mode, (x.rank,)):
        return NotLocal(f"resamples {x.rank} dimensions in mode '{mode}' with arguments that torch refuses")
    return None


def _target(length: Size, size: Any, scale: Any) -> Size:
    """The size of the result along an axis of `length` rows. Raises ValueError if it is not positive."""
    if size is None:
        known = not isinstance(scale, Symbol) and not isinstance(length, Symbol)
        size = math.floor(length * scale) if known else Symbol()
    if isinstance(size, int) and size < 1:
        raise ValueError(f"{length} rows resampled to {size}")
    return size  # type: ignore[no-any-return]  # an integer or a symbol, as the user gave it


def _integer(size: Size) -> int:
    assert isinstance(size, int), "sizes are known at a call"
    return int(size)


def _resized(dim: Dim, size: Size) -> Dim:
    """The dimension with another size.

    If the size is a symbol that the model has read off another value, the dimension gets the symbol of that value, so
    that the two dimensions compare equal.
    """
    if isinstance(size, Symbol) and size.original is not None:
        size = size.original
    return Dim(dim.tag, int(size) if isinstance(size, Extent) else size)


def _constant_rate(scale: Any, irregular: bool, recompute: bool | None) -> float | None:
    """The scale factor, if it is the rate at which output rows advance for images of every size; else None.

    `irregular` says that it is not in this mode.
    """
    if scale is None or isinstance(scale, Symbol) or irregular:
        return None
    return None if recompute and not float(scale).is_integer() else scale


@register(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def upsample(m: Any, input: Value) -> Answer:
    return interpolate(input, m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor)
