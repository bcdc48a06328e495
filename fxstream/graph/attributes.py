"""What a graph holds of a module's attributes: numbers and strings, also those in containers and plain objects.

A forward that reads `self.slope`, `self.settings["slope"]` or `self.config.slope` leaves only the number in the graph.
Later changes would be ignored without a word, so every call compares the attribute with what it was.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator
from enum import Enum
from itertools import count
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, NoneType, SimpleNamespace
from typing import Any

import torch
from torch import nn

Held = Any
"""A number, a string, None or a tuple of these; or nested dicts of such, by key, index or name of an attribute."""
_NUMBERS = (bool, int, float, complex, str, NoneType)
_NAMED = (bytes, torch.dtype, torch.device, torch.layout, torch.memory_format, slice)
LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "fxstream"}
"""Packages whose objects are not a user's own."""


def held(value: Any) -> Held:
    """The numbers and strings in a value; an empty dict if there are none."""
    return _held(value, set())


def _held(value: Any, seen: set[int]) -> Held:
    """See `held`. `seen` are the ids of what has been looked into: objects may refer to each other."""
    if _is_number(value):
        return value
    if id(value) in seen:
        return {}
    seen.add(id(value))
    parts = {key: _held(part, seen) for key, part in _parts(value)}
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


INCOMPARABLE = object()
"""The fingerprint of a value that cannot be compared with what it was before."""
_MOST_PARTS = 1000
"""Beyond so many parts, a value is not compared, which would take longer than what is saved."""


def fingerprint(value: Any) -> Any:
    """What tells whether a value has changed: equal for values of the same types and contents; or `INCOMPARABLE`.

    Containers and plain objects are looked into.
    """
    return _fingerprint(value, (), count())


def _fingerprint(value: Any, around: tuple[Any, ...], counter: Iterator[int]) -> Any:
    """See `fingerprint`. `around` are the values that hold this one, `counter` counts those that are looked into."""
    kind = type(value)
    if kind in _NUMBERS or isinstance(value, _NAMED):
        return kind, repr(value)  # unlike 0.0 and -0.0, their texts differ
    if _is_constant(value):
        return value
    if next(counter) > _MOST_PARTS or any(value is other for other in around):
        return INCOMPARABLE
    if kind in (set, frozenset):
        parts: Any = [("", part) for part in sorted(value, key=repr)]
    elif kind in (dict, OrderedDict):
        parts = value.items()
    elif kind in (list, tuple, torch.Size, deque) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        parts = [("", part) for part in value]
    elif is_plain_object(value) and not isinstance(value, (list, tuple, set, dict)):
        parts = vars(value).items()
    else:
        return INCOMPARABLE
    marks = [tuple(_fingerprint(part, (*around, value), counter) for part in pair) for pair in parts]
    return INCOMPARABLE if any(INCOMPARABLE in mark for mark in marks) else (kind, tuple(marks))


def _is_constant(value: Any) -> bool:
    """Whether a value stays what it is: a class, or a function that closes over nothing."""
    if isinstance(value, BuiltinFunctionType):
        return isinstance(value.__self__, (type, ModuleType, NoneType))
    return isinstance(value, (type, Enum)) or (isinstance(value, FunctionType) and not value.__closure__)


def is_plain_object(value: Any) -> bool:
    """Whether a value is an object of a user's own, such as a configuration, whose attributes a forward may use.

    Objects of Python's, torch's and our own libraries are not: a logger has a cache, and a proxy has a tracer.
    """
    if isinstance(value, (argparse.Namespace, SimpleNamespace)):
        return True
    if isinstance(value, (type, FunctionType, MethodType, nn.Module, torch.Tensor)) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] not in LIBRARIES


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
    elif is_plain_object(value):
        yield from ((_Attribute(name), part) for name, part in vars(value).items())


def _equal(one: Any, other: Any) -> bool:
    """NaN is equal to itself, as a number that has not changed is."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return True
    return one is other or bool(one == other)
