"""The arguments of a model's forward: what it is traced with, and what a graph takes for granted about them.

A forward is traced with proxies in place of tensors. It gets a number, a string, None or a flag as it is, since that
may decide which operations run. The graph then holds for this value alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import EllipsisType, NoneType
from typing import Any, NamedTuple

import torch
from torch import nn

_CONSTANTS = (NoneType, EllipsisType, bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_NONE = inspect.Parameter.empty


class Slot(NamedTuple):
    """A place for one argument."""

    parameter: str
    key: int | str | None = None
    """Which one, for a parameter `*args` (by position) or `**kwargs` (by keyword)."""

    @property
    def name(self) -> str:
        """The name of its placeholder."""
        return self.parameter if self.key is None else f"{self.parameter}_{self.key}"


@dataclass(frozen=True)
class Form:
    """What is known of a tensor before it is computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Unspecified:
    """The form of an argument of which nothing is known: of any object at a call, of a tensor before any call."""


def form_of(value: Any) -> Any:
    """What a forward is traced with in place of an argument: a tensor's form, or a constant itself."""
    if isinstance(value, torch.Tensor):
        return Form(tuple(value.shape), value.dtype, value.device)
    return value if is_constant(value) else Unspecified()


def is_constant(value: Any) -> bool:
    """Whether a forward gets an argument as it is, instead of a proxy."""
    if type(value) in (tuple, list, torch.Size):
        return all(map(is_constant, value))
    return isinstance(value, _CONSTANTS)


class Parameters:
    """The parameters of a model's forward, without `self`."""

    def __init__(self, signature: inspect.Signature):
        self.signature = signature

    @classmethod
    def of(cls, kind: type[nn.Module]) -> Parameters:
        """Those of a class. Annotations are left out, since pickle may not find what they name."""
        _, *own = inspect.signature(kind.forward).parameters.values()
        return cls(inspect.Signature([parameter.replace(annotation=_NONE) for parameter in own]))

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Slot, Any]:
        """The arguments of a call, defaults included. Raises TypeError where they do not fit, as Python does."""
        found = self.signature.bind(*args, **kwargs)
        found.apply_defaults()
        return dict(self._slots(found.arguments))

    def unbound(self) -> dict[Slot, Any]:
        """What is known of the arguments before any call: the defaults."""
        named = (one for one in self.signature.parameters.values() if one.kind not in _VARIADIC)
        return {Slot(one.name): Unspecified() if one.default is _NONE else one.default for one in named}

    def passed(self, values: Mapping[Slot, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments by which the forward gets these values."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        order = {name: index for index, name in enumerate(self.signature.parameters)}
        for slot in sorted(values, key=lambda slot: order[slot.parameter]):
            if self.signature.parameters[slot.parameter].kind in (inspect.Parameter.KEYWORD_ONLY, _VARIADIC[1]):
                kwargs[str(slot.key or slot.parameter)] = values[slot]
            else:
                args.append(values[slot])
        return args, kwargs

    def sorted(self, values: Mapping[Slot, Any]) -> dict[Slot, Any]:
        """The values in the order of placeholders: Python wants parameters without a default first."""
        return {slot: values[slot] for slot in sorted(values, key=lambda slot: len(self.default(slot)))}

    def default(self, slot: Slot) -> tuple[Any, ...]:
        """The default value for a placeholder, if it has one."""
        default = self.signature.parameters[slot.parameter].default
        return () if default is _NONE else (default,)

    def _slots(self, arguments: Mapping[str, Any]) -> Iterator[tuple[Slot, Any]]:
        for name, value in arguments.items():
            kind = self.signature.parameters[name].kind
            if kind in _VARIADIC:
                for key, part in enumerate(value) if kind is _VARIADIC[0] else value.items():
                    yield Slot(name, key), part
            else:
                yield Slot(name), value


class Question(IntEnum):
    """How much about its tensors a forward has asked while it was traced."""

    NOTHING = 0
    FORM = 1
    """Numbers of dimensions, dtypes or devices."""
    SHAPE = 2
    """Sizes."""


@dataclass(frozen=True)
class Given:
    """What a traced graph takes for granted about the arguments of a call."""

    forms: Mapping[Slot, Any] = field(default_factory=dict)
    """What the forward was traced with, in the order of the placeholders."""
    question: Question = Question.NOTHING
    """What it has asked about the tensors among them; the graph depends on the answers."""
    surroundings: Any = None
    """The `surroundings` in which it was traced."""

    def holds(self, arguments: Mapping[Slot, Any], surroundings: Callable[[], Any]) -> bool:
        """Whether the graph serves a call with these arguments."""
        if self.question and surroundings() != self.surroundings:
            return False
        return arguments.keys() == self.forms.keys() and all(
            self._serves(form, arguments[slot]) for slot, form in self.forms.items()
        )

    def form_of(self, name: str) -> Any:
        """What the forward was traced with for an argument, by the name of its placeholder; captures do not tell."""
        return next((form for slot, form in self.forms.items() if slot.name == name), Unspecified())

    @property
    def constants(self) -> list[tuple[Slot, type, Any]]:
        """The constants among what the forward was traced with, which decide what it does whatever the tensors are."""
        return [(slot, type(form), form) for slot, form in self.forms.items() if is_constant(form)]

    def ordered(self, arguments: Mapping[Slot, Any]) -> list[Any]:
        """The arguments of a call in the order of the placeholders."""
        return [arguments[slot] for slot in self.forms]

    def _serves(self, form: Any, value: Any) -> bool:
        if isinstance(form, Unspecified):
            return not is_constant(value)
        if not isinstance(form, Form):
            return is_constant(value) and type(value) is type(form) and bool(value == form)
        if not isinstance(value, torch.Tensor):
            return False
        now = form_of(value)
        if self.question is Question.FORM:
            return (len(now.shape), now.dtype, now.device) == (len(form.shape), form.dtype, form.device)
        return self.question is Question.NOTHING or now == form


def surroundings(model: nn.Module) -> Any:
    """What else the dtypes and devices of a model's values depend on: those of its tensors, and autocast regions."""
    tensors = (*model.parameters(), *model.buffers())
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return frozenset((tensor.dtype, tensor.device) for tensor in tensors), tuple(autocast)
