"""The class of a converted model: that of every `torch.fx.GraphModule`, and with it what the user's own class has.

Methods (`training_step`, an overridden `train`), properties and class attributes are found on the user's class, which
is a base class of the converted model's. `forward` and what a GraphModule needs come first. Nothing of the user's class
runs when the class or an object of it is made: no constructor, no `__init_subclass__`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import new_class
from typing import Any, NoReturn

import torch
from torch import fx, nn

from ..errors import StreamingError

_NOT_EXTENDED = (torch.jit.ScriptModule, fx.GraphModule, nn.ModuleDict)
"""Classes that cannot be a base class together with GraphModule, or that say of all their submodules what they are."""


class Barrier(nn.Module):
    """A base class in front of the user's class, whose constructors are then not called."""

    call_super_init = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init__(self) -> None:
        nn.Module.__init__(self)


class Layers(nn.Module):
    """Methods of nn.Sequential and nn.ModuleList for a converted model, whose submodule `streamed` is no layer."""

    _streamed_name: str

    def _layers(self) -> nn.Sequential:
        layers = nn.Sequential()
        for name, layer in self._modules.items():
            if name != self._streamed_name:
                layers.add_module(name, layer)
        return layers

    def __len__(self) -> int:
        return len(self._layers())

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._layers())

    def __getitem__(self, index: Any) -> Any:
        return self._layers()[index]

    def _refuse(self, *_: Any) -> NoReturn:
        raise StreamingError(
            "the layers of a converted model are fixed, since its graph calls them. "
            "Way out: change the model itself, and convert it again"
        )

    append = extend = insert = pop = __delitem__ = __iadd__ = _refuse


def extended(converted: type[nn.Module], kind: type[nn.Module]) -> type[Any]:
    """A class that extends both `converted` and the user's class `kind`; `converted` itself if that is impossible."""
    has_slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    if kind is nn.Module or issubclass(kind, _NOT_EXTENDED) or has_slots:
        return converted
    layers = (Layers,) if issubclass(kind, (nn.Sequential, nn.ModuleList)) else ()
    names = {"__module__": converted.__module__, "__doc__": kind.__doc__, "_extends": kind}
    try:
        return new_class(kind.__name__, (converted, *layers, Barrier, kind), exec_body=lambda body: body.update(names))
    except Exception:  # whatever a metaclass may raise
        return converted


def own_names(kind: type[nn.Module]) -> set[str]:
    """What a user's class and its bases define, except the constructor and the like, and what torch defines."""
    own = (base for base in kind.__mro__ if issubclass(base, nn.Module) and not base.__module__.startswith("torch."))
    return {name for base in own for name in vars(base) if not name.startswith("__")} - {"forward"}


def is_found_by_name(kind: type) -> bool:
    """Whether pickle can find a class."""
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind
