"""Convolutions and transposed convolutions."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ..geometry.axes import Dim, Symbol, Value
from ..geometry.window import IDENTITY, Sliding, Span, Transposed, Window
from .arguments import per_axis
from .border import BORDERS, fit
from .registry import Answer, Local, NotLocal, Sliced, Unknown, register, unstreamed

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def image_problem(x: Value, axes: int, name: str) -> NotLocal | None:
    """Why a value cannot be the image (N, C, *spatial) that an operation over `axes` spatial axes takes, or None.

    `name` says what the operation does to channels, for the case that they are streamed.
    """
    if x.rank != axes + 2:
        return NotLocal(f"expects {axes + 2} dimensions and gets {x.rank}")
    if tags := x.tags([1]):
        return NotLocal(f"{name} along the streamed axis {tags[0]}")
    return None


def _kernel_problem(x: Value, axes: int, weight: Any, bias: Any) -> NotLocal | None:
    problem = image_problem(x, axes, "mixes channels")
    if problem is None and (isinstance(weight, (Unknown, Value)) or isinstance(bias, Value)):
        return NotLocal("has a kernel that is not known before the call", "give it a kernel made of parameters alone")
    return problem


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
    border = BORDERS.get("constant" if mode == "zeros" else mode)  # None for mode "circular"
    windows: dict[int, Window] = {
        axis: Sliding(k, s, d, before, after, border or "zeros")
        for axis, (k, s, d, (before, after)) in enumerate(zip(kernel, stride, dilation, paddings, strict=True), start=2)
    }
    dims = x.slid(windows)
    circular: list[int] = []
    native = [0] * axes
    if border is None:
        if tags := x.tags(axis for axis, amounts in enumerate(paddings, start=2) if any(amounts)):
            return NotLocal(
                f"pads in mode '{mode}', which reads rows from the opposite border along {' and '.join(tags)}",
                f"use padding_mode='zeros', 'reflect' or 'replicate', or {unstreamed(tags)}",
            )
        circular = [amount for amounts in reversed(paddings) for amount in amounts]
        windows = {axis: window if x.dims[axis].tag is not None else IDENTITY for axis, window in windows.items()}
    elif mode == "zeros":
        # Along an axis that is not streamed, torch's convolution pads by itself, which saves a padded copy.
        for axis, (before, after) in enumerate(paddings, start=2):
            if x.dims[axis].tag is None and before == after:
                windows[axis], native[axis - 2] = IDENTITY, before
    function = _FUNCTIONS[axes]

    def run(block: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *spans: Any) -> torch.Tensor:
        rows = fit(block, spans, border or "zeros")
        if circular:
            rows = F.pad(rows, circular, mode)
        return function(rows, weight, bias, stride, native, dilation, groups)

    return Local((x, weight, bias), (dims[0], Dim(None, weight.shape[0]), *dims[2:]), run, windows)


def _paddings(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    if padding == "valid":
        return [(0, 0) for _ in kernel]
    if padding == "same":
        # If the total is odd, torch pads one row more behind the image than before it.
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
    # A module computes it from its output_size, and so from sizes of the image, which are known only at the call.
    output_padding = per_axis(output_padding, axes)
    pending = any(isinstance(amount, Symbol) for amount in output_padding)
    added = (0,) * axes if pending else output_padding
    sizes = zip(weight.shape[2:], stride, dilation, per_axis(padding, axes), added, strict=True)
    windows = {axis: Transposed(*size) for axis, size in enumerate(sizes, start=2)}
    if any(window.output_padding >= max(window.step, window.dilation) for window in windows.values()):
        return NotLocal("pads its output by a whole stride, which torch refuses")
    if any(isinstance(size, Unknown) for size in output_size or ()):
        return NotLocal("has an output_size that is not known before the call")
    sizes_given = dict(enumerate(tuple(output_size)[-axes:], start=2)) if output_size is not None else {}
    if pending:
        dims = x.resized({dim: Symbol() for dim in range(2, x.rank)})
    elif any(isinstance(number, Symbol) for number in (*sizes_given.values(), *(dim.size for dim in x.dims[2:]))):
        dims = x.resized(sizes_given) if sizes_given else x.slid(windows)
    else:
        windows = {
            axis: _with_size(window, x.dims[axis].known, sizes_given.get(axis)) for axis, window in windows.items()
        }
        dims = x.slid(windows)
    function = _TRANSPOSED[axes]

    def run(block: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *spans: Span) -> torch.Tensor:
        # The bias is added after `fit`, since it also belongs to rows that no input row contributes to.
        rows = fit(function(block, weight, None, stride, 0, 0, groups, dilation), spans)
        return rows if bias is None else rows + bias.view(-1, *(1,) * axes)

    return Local((x, weight, bias), (dims[0], Dim(None, weight.shape[1] * groups), *dims[2:]), run, dict(windows))


def _with_size(window: Transposed, length: int | None, size: int | None) -> Transposed:
    """The window with the output padding with which `length` input rows give `size` output rows.

    Raises ValueError if torch refuses such an output padding.
    """
    if size is None or length is None:
        return window
    window = replace(window, output_padding=0)
    spare = size - window.size(length)
    if not 0 <= spare < max(window.step, window.dilation):
        raise ValueError(f"{length} rows cannot become {size}")
    return replace(window, output_padding=spare)


@register("torchvision.ops.deform_conv.deform_conv2d", spatial=2)
def deformable(
    input: Value,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    mask: Any = None,
) -> Answer:
    if problem := _kernel_problem(input, 2, weight, bias) or _shifting_problem(input, offset, mask):
        return problem
    function = getattr(sys.modules["torchvision.ops"], "deform_conv2d")  # noqa: B009  # torchvision need not be there
    rows = {0: input.dims[0].tag} if input.dims[0].tag is not None else {}
    others = [other for other in (offset, mask) if other is not None]
    operands = tuple(other if isinstance(other, Value) else Sliced(other, rows) for other in others)

    def run(
        block: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shifts: torch.Tensor,
        factors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return function(block, shifts, weight, bias, stride, padding, dilation, factors)  # type: ignore[no-any-return]  # a tensor

    sizes = [others[0].dims[axis].size if isinstance(others[0], Value) else others[0].size(axis) for axis in (2, 3)]
    dims = (input.dims[0], Dim(None, weight.shape[0]), *(Dim(None, size) for size in sizes))
    return Local((input, weight, bias, *operands), dims, run)


def _shifting_problem(x: Value, offset: Any, mask: Any) -> NotLocal | None:
    """Why a deformable convolution is not local, or None."""
    if tags := x.tags([2, 3]):
        axes = " and ".join(tags)
        return NotLocal(f"reads positions that its offsets choose, however far away along {axes}", unstreamed(tags))
    for other in (offset, mask):
        if isinstance(other, Unknown) or (
            isinstance(other, Value) and [d.tag for d in other.dims] != [d.tag for d in x.dims]
        ):
            return NotLocal("has offsets whose streamed axes are not those of its input")
    return None


@register("torchvision.ops.deform_conv.DeformConv2d", spatial=2)
def deformable_module(m: Any, input: Value, offset: Any, mask: Any = None) -> Answer:
    return deformable(input, offset, m.weight, m.bias, m.stride, m.padding, m.dilation, mask)


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
