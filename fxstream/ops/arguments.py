"""The forms in which torch takes one argument: a number or a sequence, one argument or several."""

from __future__ import annotations

from typing import Any


def as_tuple(given: Any, times: int = 1) -> tuple[Any, ...]:
    """The entries of a tuple or list as they are; anything else repeated `times`."""
    return tuple(given) if isinstance(given, (tuple, list)) else (given,) * times


def per_axis(given: Any, axes: int) -> tuple[Any, ...]:
    """One entry per axis, given as one number for all axes, as a sequence of one, or as one number per axis."""
    entries = as_tuple(given)
    return entries * axes if len(entries) == 1 else entries


def unpacked(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call such as `view(2, 3)`, which torch also takes as `view((2, 3))`."""
    return as_tuple(given[0]) if len(given) == 1 else given
