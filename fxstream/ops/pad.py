"""Padding as an operation of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..axes import Symbol, Value
from ..window import Border, Sliding, Span, Window
from .border import MODES, fit
from .registry import Local, NotLocal, register

_BORDERS: dict[str, Border] = {mode: border for border, mode in MODES.items()}


@register(F.pad)
def pad(input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Local | NotLocal:
    if mode not in _BORDERS:
        return NotLocal(f"pads in mode '{mode}', which reads rows from the opposite border")
    if not all(isinstance(amount, (int, Symbol)) for amount in pad):
        return NotLocal("pads by amounts that are not known before the call")
    border, fill = _BORDERS[mode], 0.0 if value is None else value
    count = len(pad) // 2
    if any(isinstance(amount, Symbol) for amount in pad):
        # They follow from sizes; so does the window, at the call.
        resized = {dim: Symbol() for dim in range(input.rank - count, input.rank)}
        return Local((input,), input.resized(resized), lambda block: block)
    # torch lists the last dimension first.
    amounts = [(pad[2 * i], pad[2 * i + 1]) for i in reversed(range(count))]
    windows: dict[int, Window] = {
        dim: Sliding(before=before, after=after, border=border)
        for dim, (before, after) in enumerate(amounts, start=input.rank - count)
    }

    def run(block: torch.Tensor, *spans: Span) -> torch.Tensor:
        return fit(block, spans, border, fill)

    return Local((input,), input.slid(windows), run, windows)


def _register_module(axes: int, module_type: type[nn.Module], mode: str) -> None:
    @register(module_type, spatial=axes)
    def rule(m: Any, input: Value) -> Local | NotLocal:
        return pad(input, m.padding, mode, getattr(m, "value", None))


for _axes in (1, 2, 3):
    _register_module(_axes, getattr(nn, f"ZeroPad{_axes}d"), "constant")
    _register_module(_axes, getattr(nn, f"ConstantPad{_axes}d"), "constant")
    _register_module(_axes, getattr(nn, f"ReflectionPad{_axes}d"), "reflect")
    _register_module(_axes, getattr(nn, f"ReplicationPad{_axes}d"), "replicate")
