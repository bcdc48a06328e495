"""Padding as an operation of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..geometry.axes import Size, Symbol, Value
from ..geometry.window import Same, Sliding, Span, Window
from .border import BORDERS, fit
from .registry import Local, NotLocal, register, unstreamed


@register(F.pad)
def pad(input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Local | NotLocal:
    if mode == "circular":
        return _circular(input, pad)
    if mode not in BORDERS:
        return NotLocal(f"pads in mode '{mode}', which has no streaming rule")
    if not all(isinstance(amount, (int, Symbol)) for amount in pad):
        return NotLocal("pads by amounts that are not known before the call")
    border, fill = BORDERS[mode], 0.0 if value is None else value
    count = len(pad) // 2
    if any(isinstance(amount, Symbol) for amount in pad):
        # The amounts follow from sizes of the image, which are known only at the call, and so does the window.
        resized = {dim: Symbol() for dim in range(input.rank - count, input.rank)}
        return Local((input,), input.resized(resized), lambda block: block)
    # torch takes the amounts from the last dimension to the first.
    amounts = [(pad[2 * i], pad[2 * i + 1]) for i in reversed(range(count))]
    windows: dict[int, Window] = {
        dim: Sliding(before=before, after=after, border=border)
        for dim, (before, after) in enumerate(amounts, start=input.rank - count)
    }

    def run(block: torch.Tensor, *spans: Span) -> torch.Tensor:
        return fit(block, spans, border, fill)

    return Local((input,), input.slid(windows), run, windows)


def _circular(x: Value, pad: Sequence[int]) -> Local | NotLocal:
    """Circular padding reads rows from the opposite border: it is local along axes that are not streamed."""
    if not all(isinstance(amount, int) for amount in pad):
        return NotLocal("pads by amounts that are not known before the call")
    amounts = {x.rank - 1 - i: (pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)}
    if tags := x.tags(dim for dim, both in sorted(amounts.items()) if any(both)):
        return NotLocal(
            f"pads in mode 'circular', which reads rows from the opposite border along {' and '.join(tags)}",
            unstreamed(tags),
        )
    sizes: dict[int, Size] = {}
    for dim, (before, after) in amounts.items():
        size = x.dims[dim].size
        if before or after:
            size = Symbol() if isinstance(size, Symbol) else size + before + after
        sizes[dim] = size
    return Local((x,), x.resized(sizes), lambda block: F.pad(block, pad, "circular"))


@register("timm.layers.padding.pad_same")
def pad_same(
    x: Value, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int] = (1, 1), value: float = 0
) -> Local | NotLocal:
    # All of timm's convolutions and poolings with TensorFlow's padding call this function.
    geometry = zip((x.rank - 2, x.rank - 1), kernel_size, stride, dilation, strict=True)
    windows: dict[int, Window] = {dim: Same(kernel, step, gap) for dim, kernel, step, gap in geometry}
    # Whether the padding keeps the size depends on the size.
    unknown: dict[int, Size] = {dim: Symbol() for dim in windows if x.dims[dim].known is None}
    dims = x.resized(unknown) if unknown else x.slid(windows)

    def run(block: torch.Tensor, *spans: Span) -> torch.Tensor:
        return fit(block, spans, value=value)

    return Local((x,), dims, run, windows)


def _register_module(axes: int, module_type: type[nn.Module], mode: str) -> None:
    @register(module_type, spatial=axes)
    def rule(m: Any, input: Value) -> Local | NotLocal:
        return pad(input, m.padding, mode, getattr(m, "value", None))


for _axes in (1, 2, 3):
    _register_module(_axes, getattr(nn, f"ZeroPad{_axes}d"), "constant")
    _register_module(_axes, getattr(nn, f"ConstantPad{_axes}d"), "constant")
    _register_module(_axes, getattr(nn, f"ReflectionPad{_axes}d"), "reflect")
    _register_module(_axes, getattr(nn, f"CircularPad{_axes}d"), "circular")
    _register_module(_axes, getattr(nn, f"ReplicationPad{_axes}d"), "replicate")
