"""What a rule gets in place of a module, and a record of what the module's attributes were when the rule read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..ops import Given, named
from .attributes import INCOMPARABLE, fingerprint
from .mirror import mirror

_ABSENT = object()
"""The value of an attribute that a module does not have."""
Part = tuple[str, nn.Module]
"""A module and its path."""


def tensors_of(parts: Iterable[Part]) -> dict[str, torch.Tensor]:
    """Parameters, buffers and other attributes that are tensors, by path, of modules that are given by path."""
    found: dict[str, torch.Tensor] = {}
    for path, part in parts:
        start = f"{path}." if path else ""
        for held in (vars(part), part._buffers, part._parameters):
            for name, value in held.items():
                if isinstance(value, torch.Tensor):
                    found[start + name] = value
    return found


def with_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of a module tree with other tensors in place of its own, given by their path in the module."""
    twin = mirror(module, {})
    for path, tensor in tensors.items():
        owner, _, name = path.rpartition(".")
        part = twin.get_submodule(owner)
        registries: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, vars(part))
        next(held for held in registries if name in held)[name] = tensor
    return twin


class Record:
    """What the attributes of some modules were when rules were asked, but for tensors and submodules.

    Rules are asked about copies of modules, which have the attributes of that time. What a rule reads later, in `run`,
    must be right for every call that uses its answer. So all attributes of the modules are compared, whether a rule has
    read them yet or not; of what is not an attribute of the module itself, such as a property, what has been read.
    """

    def __init__(self, parts: Iterable[Part]):
        self.comparable = True
        """Whether all that the rules have read can be compared."""
        self._asking = True
        self._own = {path: _Attributes(part) for path, part in parts}
        self._further: dict[tuple[str, str], Any] = {}
        """(path of a module, name of an attribute that is not its own) -> a fingerprint of what was read."""

    def close(self) -> None:
        """The rules have been asked. From now on what is read is read by `run`, which sees what objects are then."""
        self._asking = False

    def read(self, path: str, part: nn.Module, name: str, value: Any) -> None:
        """Note that an attribute was read; `_ABSENT` if there is none."""
        if isinstance(value, (torch.Tensor, nn.Module)):
            return
        if isinstance(value, MethodType) and value.__self__ is part:
            self.read_all(path)  # the method may read anything
        elif name in vars(part):
            self.comparable &= not self._asking or name not in self._own[path].incomparable
        else:
            mark = self._further[path, name] = _mark(value)
            self.comparable &= mark is not INCOMPARABLE

    def read_all(self, path: str) -> None:
        """Note that all attributes of a module and of the modules in it may have been read."""
        inside = (own for other, own in self._own.items() if f"{other}.".startswith(f"{path}."))
        self.comparable &= not self._asking or not any(own.incomparable for own in inside)

    def holds(self, parts: Iterable[Part]) -> bool:
        """Whether the attributes are still what they were. The modules must be those, or others of the same classes."""
        now = dict(parts)
        return all(self._own[path].hold(part) for path, part in now.items()) and all(
            _mark(getattr(now[path], name, _ABSENT)) == mark for (path, name), mark in self._further.items()
        )


class _Attributes:
    """What a module's own attributes were."""

    def __init__(self, part: nn.Module):
        own = {name: value for name, value in vars(part).items() if name not in _REGISTRIES}
        self._count = len(vars(part))
        marks = {name: _mark(value) for name, value in own.items() if not isinstance(value, torch.Tensor)}
        self.incomparable = {name: own[name] for name, mark in marks.items() if mark is INCOMPARABLE}
        """By name. They must at least stay the same objects."""
        self._constant = {name: own[name] for name in marks if _is_constant(own[name])}
        self._marks = {name: mark for name, mark in marks.items() if mark is not INCOMPARABLE}
        self._varying = [name for name in self._marks if name not in self._constant]

    def hold(self, part: nn.Module) -> bool:
        own = vars(part)
        return (
            len(own) == self._count
            and all(own.get(name, _ABSENT) is value for name, value in self.incomparable.items())
            and all(
                (now := own.get(name, _ABSENT)) is value or _mark(now) == self._marks[name]
                for name, value in self._constant.items()
            )
            and all(_mark(own.get(name, _ABSENT)) == self._marks[name] for name in self._varying)
        )


_REGISTRIES = set(vars(nn.Module())) - {"training"}
"""What torch.nn.Module gives every module besides its mode: its tensors, submodules and hooks."""


def _mark(value: Any) -> Any:
    return _ABSENT if value is _ABSENT else fingerprint(value)


def _is_constant(value: Any) -> bool:
    """Whether a value can be replaced, but not changed."""
    return all(map(_is_constant, value)) if type(value) is tuple else isinstance(value, (int, float, str, type(None)))


class Borrowed:
    """A module as its rule sees it: with a `Given` in place of every tensor, and the attributes that it has had.

    A submodule that is read is borrowed, too.
    """

    def __init__(self, module: nn.Module, path: str, reader: str, record: Record | None):
        """`module` has been stripped of its tensors. `reader` is the operation whose rule is asked."""
        self._module = module
        self._path = path
        self._reader = reader
        self._record = record

    def __getattr__(self, name: str) -> Any:
        value: Any = getattr(self._module, name, _ABSENT)
        if name in self._module._modules and value is not None:
            return Borrowed(value, f"{self._path}.{name}", self._reader, self._record)
        if self._record is not None:
            self._record.read(self._path, self._module, name, value)
        if value is _ABSENT:
            raise AttributeError(f"{type(self._module).__name__} has no attribute {name!r}")
        return tree_map(self._stray, value)

    def _stray(self, leaf: Any) -> Any:
        """What may be in a container: for a tensor or module that is not registered, one that refuses to compute."""
        if isinstance(leaf, nn.Module):
            return with_tensors(leaf, named(tensors_of(leaf.named_modules(remove_duplicate=False)), self._reader))
        return leaf if isinstance(leaf, Given) else named(leaf, self._reader)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module itself, which must have no tensors: for those that it has there is `with_tensors`."""
        self._read_all()
        return self._module(*args, **kwargs)

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """A copy of the module with these tensors in place of its own, given by their path in the module.

        So `run` can call a module: the tensors are what it gets for the operands of the `Local`.
        """
        self._read_all()
        return with_tensors(self._module, tensors)

    def freeze(self) -> None:
        """Let the rule see the module in eval mode."""
        self._module.training = False

    def _read_all(self) -> None:
        if self._record is not None:
            self._record.read_all(self._path)


def borrowed(
    module: nn.Module, path: str, reader: str, tensors: Mapping[str, torch.Tensor], record: Record | None = None
) -> Borrowed:
    """A module for the rule of the operation `reader`; `tensors` are those that it is given, by path in the module."""
    return Borrowed(with_tensors(module, named(tensors, reader)), path, reader, record)
