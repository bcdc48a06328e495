"""Convolutions, transposed ones among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ..geometry.axes import Dim, Symbol, Value
from ..geometry.window import IDENTITY, Border, Sliding, Span, Transposed, Window
from .border import MODES, fit
from .registry import Answer, Local, NotLocal, Unknown, register

_BORDERS: dict[str, Border] = {border: border for border in MODES}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
    """torch's convention for sizes: one number for all axes, or one for each."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * axes if len(values) == 1 else values


def image_problem(x: Value, axes: int, name: str) -> NotLocal | None:
    """What keeps a value from being the (N, C, *spatial) input of an operation over `axes` spatial axes."""
    if x.rank != axes + 2:
        return NotLocal(f"expects {axes + 2} dimensions and gets {x.rank}")
    if tags := x.tags([1]):
        return NotLocal(f"{name} along the streamed axis {tags[0]}")
    return None


def _kernel_problem(x: Value, axes: int, weight: Any, bias: Any) -> NotLocal | None:
    if isinstance(weight, (Unknown, Value)) or isinstance(bias, Value):
        unknown = "has a kernel that is not known before the call"
        return image_problem(x, axes, "mixes channels") or NotLocal(
            unknown, "give it a kernel made of parameters alone"
        )
    return image_problem(x, axes, "mixes channels")


def _channel_problem(x: Value, expected: int) -> NotLocal | None:
    channels = x.dims[1].known
    if channels not in (None, expected):
        return NotLocal(f"has a kernel for {expected} channels and gets {channels}", error=InputError)
    return None


def convolution(
    axes: int,
    x: Value,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    mode: str = "zeros",
) -> Local | NotLocal:
    if problem := _kernel_problem(x, axes, weight, bias):
        return problem
    if problem := _channel_problem(x, weight.shape[1] * groups):
        return problem
    kernel, stride, dilation = tuple(weight.shape[2:]), per_axis(stride, axes), per_axis(dilation, axes)
    paddings = _paddings(padding, kernel, dilation)
    border = _BORDERS.get(mode, "zeros")
    windows: dict[int, Window] = {
        axis: Sliding(k, s, d, before, after, border)
        for axis, (k, s, d, (before, after)) in enumerate(zip(kernel, stride, dilation, paddings, strict=True), start=2)
    }
    dims = x.slid(windows)
    around: list[int] = []
    own = [0] * axes
    if mode not in _BORDERS:
        if tags := x.tags(axis for axis, amounts in enumerate(paddings, start=2) if any(amounts)):
            return NotLocal(
                f"pads in mode '{mode}', which reads rows from the opposite border along {' and '.join(tags)}",
                "use padding_mode='zeros', 'reflect' or 'replicate'",
            )
        around = [amount for amounts in reversed(paddings) for amount in amounts]
        windows = {axis: window if x.dims[axis].tag is not None else IDENTITY for axis, window in windows.items()}
    elif mode == "zeros":
        # Where blocks are whole, the convolution pads by itself, which takes no copy.
        for axis, (before, after) in enumerate(paddings, start=2):
            if x.dims[axis].tag is None and before == after:
                windows[axis], own[axis - 2] = IDENTITY, before
    function = _FUNCTIONS[axes]

    def run(block: torch.Tensor, *spans: Any) -> torch.Tensor:
        rows = fit(block, spans, border)
        return function(F.pad(rows, around, mode) if around else rows, weight, bias, stride, own, dilation, groups)

    return Local((x,), (dims[0], Dim(None, weight.shape[0]), *dims[2:]), run, windows)


def _paddings(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    if padding == "valid":
        return [(0, 0) for _ in kernel]
    if padding == "same":
        # An odd total pads one more behind, as torch does.
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(amount, amount) for amount in per_axis(padding, len(kernel))]


def _register_convolution(axes: int, module_type: type[nn.Module], *functions: Any) -> None:
    @register(*functions, spatial=axes)
    def function_rule(
        input: Value,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Local | NotLocal:
        return convolution(axes, input, weight, bias, stride, padding, dilation, groups)

    @register(module_type, spatial=axes)
    def module_rule(m: Any, input: Value) -> Local | NotLocal:
        return convolution(axes, input, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups, m.padding_mode)


def transposed(
    axes: int,
    x: Value,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
    output_size: Any = None,
) -> Answer:
    if problem := _kernel_problem(x, axes, weight, bias) or _channel_problem(x, weight.shape[0]):
        return problem
    stride, dilation = per_axis(stride, axes), per_axis(dilation, axes)
    sizes = zip(
        weight.shape[2:], stride, dilation, per_axis(padding, axes), per_axis(output_padding, axes), strict=True
    )
    windows = {axis: Transposed(*size) for axis, size in enumerate(sizes, start=2)}
    if any(window.output_padding >= max(window.step, window.dilation) for window in windows.values()):
        return NotLocal("pads its output by a whole stride, which torch refuses")
    if any(isinstance(size, Unknown) for size in output_size or ()):
        return NotLocal("makes as many rows as are not known before the call")
    sizes_given = dict(enumerate(tuple(output_size)[-axes:], start=2)) if output_size is not None else {}
    if any(isinstance(number, Symbol) for number in (*sizes_given.values(), *(dim.size for dim in x.dims[2:]))):
        dims = x.resized(sizes_given) if sizes_given else x.slid(windows)
    else:
        windows = {
            axis: _reaching(window, x.dims[axis].known, sizes_given.get(axis)) for axis, window in windows.items()
        }
        dims = x.slid(windows)
    function = _TRANSPOSED[axes]

    def run(block: torch.Tensor, *spans: Span) -> torch.Tensor:
        # Rows that no input row reaches get nothing but the bias.
        rows = fit(function(block, weight, None, stride, 0, 0, groups, dilation), spans)
        return rows if bias is None else rows + bias.view(-1, *(1,) * axes)

    return Local((x,), (dims[0], Dim(None, weight.shape[1] * groups), *dims[2:]), run, dict(windows))


def _reaching(window: Transposed, length: int | None, size: int | None) -> Transposed:
    """The window with the output padding that makes so many rows of `length` ones."""
    if size is None or length is None:
        return window
    window = replace(window, output_padding=0)
    spare = size - window.size(length)
    if not 0 <= spare < max(window.step, window.dilation):
        raise ValueError(f"{length} rows cannot become {size}")
    return replace(window, output_padding=spare)


def _register_transposed(axes: int, module_type: type[nn.Module], function: Any) -> None:
    @register(function, spatial=axes)
    def function_rule(
        input: Value,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Answer:
        return transposed(axes, input, weight, bias, stride, padding, output_padding, groups, dilation)

    @register(module_type, spatial=axes)
    def module_rule(m: Any, input: Value, output_size: Any = None) -> Answer:
        settings = (m.stride, m.padding, m.output_padding, m.groups, m.dilation)
        return transposed(axes, input, m.weight, m.bias, *settings, output_size)


_register_convolution(1, nn.Conv1d, F.conv1d)
_register_convolution(2, nn.Conv2d, F.conv2d)
_register_convolution(3, nn.Conv3d, F.conv3d)
_register_transposed(1, nn.ConvTranspose1d, F.conv_transpose1d)
_register_transposed(2, nn.ConvTranspose2d, F.conv_transpose2d)
_register_transposed(3, nn.ConvTranspose3d, F.conv_transpose3d)
