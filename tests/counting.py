"""Counting FLOPs, which depend neither on the machine nor on what runs beside a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import FlopCounterMode


def flops(function: Callable[[], Any]) -> int:
    """The floating-point operations of a call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())
