"""Pooling over windows. Pooling over the whole image is in `whole.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..geometry.axes import Symbol, Value, is_extent_of
from ..geometry.window import Sliding, Span
from .arguments import as_tuple, per_axis
from .border import fit
from .conv import image_problem
from .registry import Answer, Local, NotLocal, Total, register
from .totals import First, Reduction, Sum

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _windows(axes: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> dict[int, Sliding]:
    if stride is None or stride in ((), []):
        stride = kernel
    sizes = zip(
        per_axis(kernel, axes), per_axis(stride, axes), per_axis(padding, axes), per_axis(dilation, axes), strict=True
    )
    return {axis: Sliding(k, s, d, p, p, ceil_mode=ceil_mode) for axis, (k, s, p, d) in enumerate(sizes, start=2)}


def _padding_problem(windows: dict[int, Sliding]) -> NotLocal | None:
    """Why torch refuses the padding of a pooling, or None."""
    if any(window.before > window.kernel // 2 for window in windows.values()):
        return NotLocal("pads by more than half of its kernel, which torch refuses")
    return None


def _follows_from_sizes(*geometry: Any) -> bool:
    """Whether a kernel or stride was computed from a size of the image, so that it is known only at a call."""
    return any(isinstance(number, Symbol) for given in geometry for number in as_tuple(given))


def _pooling_by_sizes(x: Value) -> Local | NotLocal:
    """The answer at conversion for a pooling whose kernel or stride follows from sizes of the image.

    Its windows usually span the whole image, so it is not local if a spatial axis is streamed.
    """
    if tags := x.tags(range(2, x.rank)):
        return NotLocal(f"pools windows whose size along {' and '.join(tags)} is not known before the call")
    return Local((x,), x.resized({dim: Symbol() for dim in range(2, x.rank)}), lambda block: block)


def _spans_the_image(x: Value, axes: int, kernel: Any, padding: Any, dilation: Any = 1) -> bool:
    """Whether a pooling has one window, which is as large as the image: `F.avg_pool2d(x, x.shape[-2:])`."""
    sizes = zip(x.dims[2:], per_axis(kernel, axes), strict=True)
    whole = all(is_extent_of(size, dim) if dim.tag is not None else size is dim.size for dim, size in sizes)
    return whole and set(per_axis(padding, axes)) == {0} and set(per_axis(dilation, axes)) == {1}


def _whole(x: Value, reduction: Reduction) -> Answer:
    """The answer for a pooling with one window over the image, some axes of which are streamed."""
    problem = NotLocal(f"pools over the whole image along {' and '.join(x.tags(range(2, x.rank)))}")
    return Total(x, reduction, True, problem)


def max_pooling(
    axes: int, x: Value, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, return_indices: bool
) -> Answer:
    if problem := image_problem(x, axes, "has its channels"):
        return problem
    if return_indices:
        return NotLocal("returns indices, which are positions in the whole image", "use return_indices=False")
    if x.tags(range(2, x.rank)) and _spans_the_image(x, axes, kernel, padding, dilation):
        return _whole(x, First(tuple(range(2, x.rank))))
    if _follows_from_sizes(kernel, stride):
        return _pooling_by_sizes(x)
    windows = _windows(axes, kernel, stride, padding, dilation, ceil_mode)
    if problem := _padding_problem(windows):
        return problem
    kernels, strides, dilations = zip(*((w.kernel, w.stride, w.dilation) for w in windows.values()), strict=True)
    function = _MAX[axes]

    def run(block: torch.Tensor, *spans: Span) -> torch.Tensor:
        # torch's own padding is used before the block: where all rows of a window have the lowest value, torch gives
        # the gradient to a row of the image and not to one of the padding. It also pads behind the block, and the
        # output rows that come from there are cut off.
        padding = tuple(span.pad[0] for span in spans)
        behind = tuple(span._replace(pad=(0, span.pad[1])) for span in spans)
        padded = fit(block, behind, value=_lowest(block.dtype))
        pooled = function(padded, kernels, strides, padding, dilations)
        for dim, span in enumerate(spans, start=2):
            pooled = pooled.narrow(dim, 0, span.stop - span.start)
        return pooled

    return Local((x,), x.slid(windows), run, dict(windows))


def _lowest(dtype: torch.dtype) -> float:
    return -float("inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def average_pooling(
    axes: int,
    x: Value,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Answer:
    if problem := image_problem(x, axes, "has its channels"):
        return problem
    if x.tags(range(2, x.rank)) and divisor_override is None and _spans_the_image(x, axes, kernel, padding):
        return _whole(x, Sum(tuple(range(2, x.rank)), torch.mean, mean=True))
    if _follows_from_sizes(kernel, stride):
        return _pooling_by_sizes(x)
    windows = _windows(axes, kernel, stride, padding, 1, ceil_mode)
    if problem := _padding_problem(windows):
        return problem
    if axes == 3:
        _check_size(x, windows)
    kernels, strides = zip(*((w.kernel, w.stride) for w in windows.values()), strict=True)
    function = _AVG[axes]
    margins = [window.before if count_include_pad else 0 for window in windows.values()]

    def run(block: torch.Tensor, *spans: Span) -> torch.Tensor:
        means = function(fit(block, spans), kernels, strides)
        for dim, (window, span, margin) in enumerate(zip(windows.values(), spans, margins, strict=True), start=2):
            counts = _counts(window, span, margin) if divisor_override is None else (window.kernel,)
            if any(count != window.kernel for count in counts):
                weights = torch.tensor(counts, dtype=means.dtype, device=means.device)
                means = means * (window.kernel / weights).view(-1, *(1,) * (means.dim() - dim - 1))
        return means if divisor_override is None else means * (math.prod(kernels) / divisor_override)

    return Local((x,), x.slid(windows), run, dict(windows))


def _check_size(x: Value, windows: dict[int, Sliding]) -> None:
    """Raise ValueError where torch's average pooling of volumes fails: the kernel exceeds the unpadded size."""
    for dim, window in windows.items():
        length = x.dims[dim].known
        if length is not None and length < window.kernel:
            raise ValueError(f"{length} rows are fewer than the {window.kernel} of its kernel")


@lru_cache(maxsize=4096)
def _counts(window: Sliding, span: Span, margin: int) -> tuple[int, ...]:
    """For each output row of a span, how many rows under its window the average counts.

    These are rows of the image and `margin` rows of padding on each side. The rows that `ceil_mode` adds behind the
    padding never count (torch.nn.AvgPool2d).
    """
    starts = (row * window.stride - window.before for row in range(span.start, span.stop))
    return tuple(min(start + window.kernel, span.length + margin) - max(start, -margin) for start in starts)


INFINITE_IS_MAXIMUM = F.lp_pool1d(torch.tensor([[[-2.0, 1.0]]]), math.inf, 2).item() == 2
"""Whether torch takes the maximum for a norm of infinite order. Older releases use the general formula."""


def power_pooling(axes: int, x: Value, norm: float, kernel: Any, stride: Any, ceil_mode: bool) -> Answer:
    """The answer for the p-norm of each window (torch.nn.LPPool2d).

    torch computes it from the mean of the powers, times the number of positions of a whole window.
    """
    if not isinstance(norm, (int, float)) or norm == 0:
        return NotLocal("takes a norm whose order is 0 or not known before the call")
    if math.isinf(norm):
        if not INFINITE_IS_MAXIMUM:
            return NotLocal("takes a norm of infinite order, which this release of torch does not compute")
        maximum = max_pooling(axes, x, kernel, stride, 0, 1, ceil_mode, False)
        sign = math.copysign(1, norm)
        return _wrapped(maximum, lambda block: sign * block.abs(), lambda pooled: sign * pooled)
    if _follows_from_sizes(kernel, stride):
        return _pooling_by_sizes(x)
    count = math.prod(per_axis(kernel, axes))
    mean = average_pooling(axes, x, kernel, stride, 0, ceil_mode, True, None)
    return _wrapped(mean, lambda block: block.pow(norm), lambda pooled: _root(pooled, count, norm))


def _root(mean: torch.Tensor, count: int, norm: float) -> torch.Tensor:
    """The root of `count` times the mean, by torch's own formula, whose derivative is 0 where the mean is 0."""
    return (mean.sign() * F.relu(mean.abs())).mul(count).pow(1 / norm)


def _wrapped(
    local: Answer,
    before: Callable[[torch.Tensor], torch.Tensor],
    after: Callable[[torch.Tensor], torch.Tensor],
) -> Answer:
    """An operation with one element-wise function applied to its input and another to its result."""
    if isinstance(local, Total):
        return local.problem
    if not isinstance(local, Local):
        return local
    inner = local.run
    return replace(local, run=lambda block, *spans: after(inner(before(block), *spans)))


def _register_power_pooling(axes: int) -> None:
    @register(getattr(F, f"lp_pool{axes}d"), spatial=axes)
    def function_rule(
        input: Value, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
    ) -> Answer:
        return power_pooling(axes, input, norm_type, kernel_size, stride, ceil_mode)

    @register(getattr(nn, f"LPPool{axes}d"), spatial=axes)
    def module_rule(m: Any, input: Value) -> Answer:
        return power_pooling(axes, input, m.norm_type, m.kernel_size, m.stride, m.ceil_mode)


def _register_pooling(
    axes: int, max_type: type[nn.Module], avg_type: type[nn.Module], maxes: Any, averages: Any
) -> None:
    @register(*maxes, spatial=axes)
    def max_function(
        input: Value,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Answer:
        return max_pooling(axes, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)

    @register(max_type, spatial=axes)
    def max_module(m: Any, input: Value) -> Answer:
        return max_pooling(axes, input, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)

    @register(*averages, spatial=axes)
    def average_function(
        input: Value,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Answer:
        return average_pooling(
            axes, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )

    @register(avg_type, spatial=axes)
    def average_module(m: Any, input: Value) -> Answer:
        divisor = getattr(m, "divisor_override", None)  # AvgPool1d has none
        return average_pooling(
            axes, input, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, divisor
        )


_register_pooling(1, nn.MaxPool1d, nn.AvgPool1d, (F.max_pool1d, torch.max_pool1d), (F.avg_pool1d,))
_register_pooling(2, nn.MaxPool2d, nn.AvgPool2d, (F.max_pool2d, torch.max_pool2d), (F.avg_pool2d,))
_register_pooling(3, nn.MaxPool3d, nn.AvgPool3d, (F.max_pool3d, torch.max_pool3d), (F.avg_pool3d,))
for _axes in (1, 2, 3):
    _register_power_pooling(_axes)
