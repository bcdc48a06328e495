"""Proxies: what a forward computes with while it is traced. They record it, or refuse what cannot be recorded."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy
import torch
from torch import fx
from torch.fx.proxy import Proxy, TracerBase

from ..ops import inplace
from .facts import NotAcceptedError, UnknownFactError
from .frames import compares_by_identity, reads_attribute


class UnrecordedError(Exception):
    """A forward does something that a graph does not record."""


class RecordingProxy(Proxy):
    """A proxy that is more faithful than fx's own.

    - In-place operators are recorded. Python would otherwise turn `x += y` into `x = x + y`.
    - Assigning an attribute (`x.data = ...`) is refused, since it would change only the proxy.
    - What is known of the value is answered: its dtype and device, and a number where Python itself needs it, as for
      `if`, `range` or text. What is not known is refused.
    - A number is refused as a key of a dict, a member of a set, or an argument of a function with a cache.
    """

    tracer: Any

    def __init__(self, tracer: TracerBase, node: fx.Node | None = None, of: tuple[RecordingProxy, str] | None = None):
        """A proxy for a node; or for an attribute `of` another proxy, whose node is made when it is asked for."""
        vars(self).update(tracer=tracer, _node=node, _of=of)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]  # a plain attribute there
        state = vars(self)
        if state["_node"] is None:
            state["_node"] = self.tracer.create_proxy("call_function", getattr, state["_of"], {}).node
        found: fx.Node = state["_node"]
        return found

    @property  # type: ignore[misc]  # nobody sets it
    def __class__(self) -> Any:
        asking = sys._getframe(1)
        if reads_attribute(asking, "__class__") and not _is_library(asking):
            return self.tracer.answer("type_of", self.node)
        return RecordingProxy

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__array_"):  # numpy asks for these, and may use __array__ instead
            raise AttributeError(name)
        if name in ("dtype", "device"):
            try:
                return getattr(self.tracer.facts, name)(self.node)
            except UnknownFactError:
                pass
        # It would be false, whatever the value is.
        if hasattr(torch.Tensor, name) and compares_by_identity(sys._getframe(1)):
            raise UnrecordedError(f"it compares the {name} of {self.node.name} by 'is', which is known only at a call")
        return RecordingProxy(self.tracer, of=(self, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if vars(self)["_of"] is None:
            return Proxy.__call__(self, *args, **kwargs)
        owner, name = vars(self)["_of"]
        return self.tracer.create_proxy("call_method", name, (owner, *args), kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnrecordedError(f"it assigns the attribute '{name}' of a tensor, which fx does not record")

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        return int(self.tracer.answer("length", self.node))

    def __index__(self) -> int:
        return operator.index(self.tracer.answer("value", self.node))

    def __int__(self) -> int:
        return int(self.tracer.answer("value", self.node))

    def __float__(self) -> float:
        return float(self.tracer.answer("value", self.node))

    def __round__(self, *digits: int) -> Any:
        return round(self.tracer.answer("value", self.node), *digits)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:
        return other // self, other % self

    def __str__(self) -> str:
        return self._written(str)

    def __repr__(self) -> str:
        return self._written(repr)

    def __format__(self, how: str) -> str:
        return self._written(lambda value: format(value, how))

    def _written(self, write: Callable[[Any], str]) -> str:
        """The value as text, which a forward may use as a key; in error messages of torch and of ours, only a name."""
        if _is_library(sys._getframe(2)):
            return Proxy.__repr__(self)
        try:
            return write(self.tracer.answer("value", self.node))
        except UnrecordedError as error:
            if not isinstance(error.__context__, NotAcceptedError):
                raise
            # Nobody will call the model with such an image. The text may be that of an assertion, which tells that.
            self.tracer.facts.holds_for_shape()
            return Proxy.__repr__(self)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return numpy.array(self.tracer.answer("value", self.node), *args, **kwargs)

    def __hash__(self) -> int:
        # It could be answered, but then a proxy would stay behind in whatever cache it is a key of.
        if self._is_tensor():
            return object.__hash__(self)
        raise UnrecordedError(f"it looks up {self.node.name}, which is known only at a call, in a dict, set or cache")

    def _is_tensor(self) -> bool:
        return issubclass(self.tracer.answer("type_of", self.node), torch.Tensor)


def _is_library(asking: FrameType) -> bool:
    """Whether a frame runs code of torch or ours."""
    return asking.f_globals.get("__name__", "").partition(".")[0] in ("torch", "fxstream")


def _inplace(name: str) -> Callable[[RecordingProxy, Any], Proxy]:
    function = inplace.FUNCTIONS[name]
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in inplace.NAMES:
    setattr(RecordingProxy, f"__{_name}__", _inplace(_name))
