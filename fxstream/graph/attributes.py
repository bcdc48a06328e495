"""What a graph holds of a module's attributes: numbers and strings, also those in containers and plain objects.

A forward that reads `self.slope`, `self.settings["slope"]` or `self.config.slope` leaves only the number in the graph.
Later changes would be ignored without a word, so every call compares the attribute with what it was.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from types import NoneType
from typing import Any

import torch
from torch import nn

Held = Any
"""A number, a string, None or a tuple of these; or nested dicts of such, by key, index or name of an attribute."""
_NUMBERS = (bool, int, float, complex, str, NoneType)
_DEEPEST = 8
"""Levels of nesting that are looked at."""


def held(value: Any, depth: int = 0) -> Held:
    """The numbers and strings in a value; an empty dict if there are none."""
    if _is_number(value):
        return value
    if depth == _DEEPEST:
        return {}
    parts = {key: held(part, depth + 1) for key, part in _parts(value)}
    return {key: part for key, part in parts.items() if part != {}}


def difference(before: Held, now: Held, name: str) -> tuple[str, Any, Any] | None:
    """The first part that differs: its path, such as "settings['slope']", what it was and what it is; None if none."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return None if _equal(before, now) else (name, before, now)
    for key in (*before, *(key for key in now if key not in before)):
        path = f"{name}.{key}" if isinstance(key, _Attribute) else f"{name}[{key!r}]"
        found = difference(before.get(key), now.get(key), path)
        if found is not None:
            return found
    return None


def _is_number(value: Any) -> bool:
    return all(map(_is_number, value)) if isinstance(value, tuple) else isinstance(value, _NUMBERS)


class _Attribute(str):
    """A key that is the name of an attribute."""


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from ((key, part) for key, part in value.items() if isinstance(key, _NUMBERS))
    elif isinstance(value, (list, tuple, deque)):
        yield from enumerate(value)
    elif isinstance(value, (set, frozenset)):
        yield from ((str(part), part) for part in sorted(value, key=str))
    elif _is_plain_object(value):
        yield from ((_Attribute(name), part) for name, part in vars(value).items())


def _is_plain_object(value: Any) -> bool:
    if isinstance(value, (type, nn.Module, torch.Tensor)) or callable(value) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] not in ("torch", "numpy", "builtins")


def _equal(one: Any, other: Any) -> bool:
    """NaN is equal to itself, as a number that has not changed is."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return True
    return one is other or bool(one == other)
