"""Objects that a forward makes with values in them, such as its outputs: a graph makes others of the same class.

They are objects of registered pytree classes and dataclasses, and of subclasses of dict, list and tuple. fx would make
plain dicts, lists and tuples of some, and call the constructors of others, which may compute, a second time.
"""

from __future__ import annotations

import copy
import enum
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from itertools import takewhile
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx.proxy import Proxy
from torch.utils import _pytree

_OF_FX = (dict, list, tuple, slice, range, torch.Size)
"""Classes whose objects stand in a graph as they are."""


class NotCopiedError(Exception):
    """An object that does not tell what it is made of."""


@dataclass(frozen=True, repr=False)
class Rebuild:
    """A function that makes an object of a class from what `parts` returns."""

    kind: type
    make: Callable[..., Any]
    fixed: tuple[Any, ...]
    """The first arguments of `make`: classes and functions, which fx does not take as arguments."""

    @property
    def __name__(self) -> str:
        """Under this name it appears in a graph and its code."""
        return self.kind.__name__

    def __repr__(self) -> str:
        return f"<another {self.kind.__module__}.{self.kind.__qualname__}>"

    # torch.compile would follow what happens here, and not always come to the same object.
    @torch._disable_dynamo  # type: ignore[attr-defined]  # torch itself uses it so
    def __call__(self, *found: Any) -> Any:
        return self.make(*self.fixed, *found)


def _another_container(kind: Any, items: list[Any], attributes: dict[str, Any]) -> Any:
    """An object of a subclass of dict, list or tuple. Methods of that class, which may compute, are not called."""
    made = tuple.__new__(kind, items) if issubclass(kind, tuple) else kind.__new__(kind)
    if issubclass(kind, list):
        list.extend(made, items)
    if issubclass(kind, dict):
        for key, value in items:
            _dict(kind).__setitem__(made, key, value)
    if attributes:
        vars(made).update(attributes)
    return made


def _dict(kind: type) -> type[dict[Any, Any]]:
    """The class whose methods fill a subclass of dict."""
    return OrderedDict if issubclass(kind, OrderedDict) else dict


def _another(make: Callable[..., Any], fixed: tuple[Any, ...], arguments: tuple[Any, ...], *contents: Any) -> Any:
    """An object that is made as `copy.copy` makes one."""
    return copy.copy(_Reduced(make, (*fixed, *arguments), *contents))


class _Reduced:
    """Something that `copy.copy` takes for an object whose `__reduce_ex__` returns the given parts."""

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...], state: Any, *items: list[Any]) -> None:
        self.parts = (make, arguments, state, *map(iter, items))

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def is_named_tuple(value: Any) -> bool:
    """Whether the class of a value is made by `namedtuple` or NamedTuple; fx calls such a class with what it holds."""
    return type(value).__bases__ == (tuple,) and hasattr(value, "_fields")


def is_rebuilt(value: Any) -> bool:
    """Whether another object of the same class is made in place of a value."""
    kind = type(value)
    if kind in _OF_FX or kind.__module__.startswith("torch.fx.") or isinstance(value, (Proxy, nn.Module, enum.Enum)):
        return False
    return isinstance(value, (dict, list, tuple)) or is_dataclass(kind) or kind in _pytree.SUPPORTED_NODES


def parts(value: Any) -> tuple[Rebuild, tuple[Any, ...]]:
    """How to make an object like `value`, and the arguments for that, which hold what the object holds.

    Raises NotCopiedError if the class does not say how its objects are copied.
    """
    kind = type(value)
    if isinstance(value, (dict, list, tuple)) and not _holds_more(kind):
        return Rebuild(kind, _another_container, (kind,)), (_items(value), {**getattr(value, "__dict__", {})})
    try:
        reduced = value.__reduce_ex__(4)
    except Exception as error:  # whatever a user's class may raise
        raise NotCopiedError(str(error)) from error
    if isinstance(reduced, str):
        raise NotCopiedError("it is the only one of its class")
    make, arguments, state, listed, paired = (*reduced, *[None] * 5)[:5]
    fixed = tuple(takewhile(_is_fixed, arguments))
    contents = (state, list(listed or ()), list(paired or ()))
    return Rebuild(kind, _another, (make, fixed)), (tuple(arguments[len(fixed) :]), *contents)


def _items(value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> list[Any]:
    if isinstance(value, dict):
        return [*_dict(type(value)).items(value)]
    return [*(list.__iter__(value) if isinstance(value, list) else tuple.__iter__(value))]


def _holds_more(kind: type) -> bool:
    """Whether objects of a subclass of dict, list or tuple hold more than items and a `__dict__`."""
    slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    return slots or issubclass(kind, defaultdict) or hasattr(kind, "n_sequence_fields")


def _is_fixed(value: Any) -> bool:
    """Whether a value is a class, or a function that holds no other values."""
    if isinstance(value, FunctionType):
        return not (value.__closure__ or value.__defaults__ or value.__kwdefaults__)
    return isinstance(value, (type, BuiltinFunctionType))


def only_makes(target: Any) -> bool:
    """Whether a function does nothing but make an object that holds its arguments."""
    return isinstance(target, Rebuild) or (isinstance(target, type) and issubclass(target, (tuple, dict)))
