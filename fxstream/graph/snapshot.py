"""Snapshots: what a forward changes while it is traced is found out and undone. The model is not ours to change."""

from __future__ import annotations

import operator
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from .attributes import LIBRARIES, is_plain_object
from .hooks import computed_weights

_CONTAINERS = (dict, list, set, deque)
_CACHED = type(lru_cache(len))
MOST_OBJECTS = 20_000
"""A model may hold a whole data set. Beyond so many containers and objects, we do not look at further ones."""


class Snapshot:
    """What all modules of a model hold, and the containers and plain objects that can be reached from them.

    Besides, the variables of the modules' classes and of the files in which these are written.
    """

    def __init__(self, model: nn.Module):
        self._contents: dict[int, tuple[Any, Any]] = {}
        """The id of a module, container or object -> the thing itself, and a shallow copy of what it holds."""
        self._held_by: dict[nn.Module, list[tuple[str, Any]]] = {}
        """A module -> what can be reached from it without passing another module, by name, the module itself as ""."""
        modules = list(model.modules())
        for module in modules:
            self._note(module)
        most = len(modules) + MOST_OBJECTS
        for module in modules:
            self._held_by[module] = [("", module), *self._reached(module, most)]
        owners = (*files_of(*modules), *_classes_of(*modules))
        self._variables = {id(owner): _Variables(owner) for owner in owners}

    def _reached(self, module: nn.Module, most: int) -> Iterator[tuple[str, Any]]:
        """Note what can be reached from a module, the nearest first, until `most` things have been noted."""
        waiting = deque(_watched("", module))
        while waiting and len(self._contents) < most:
            name, thing = waiting.popleft()
            if id(thing) not in self._contents:
                self._note(thing)
                yield name, thing
                waiting.extend(_watched(name, thing))

    def _note(self, thing: Any) -> None:
        self._contents[id(thing)] = (thing, _copied(_contents(thing)))

    def changed(self, *modules: nn.Module) -> list[str]:
        """The names of attributes and variables that are not what they were.

        Attributes of some modules and of what is reached from them, variables of their classes and of the files.
        """
        found: list[str] = []
        for variables in self._variables_of(*modules):
            found += variables.changed()
        for module in modules:
            computed = computed_weights(module)
            for name, thing in self._held_by.get(module, ()):  # none for a module that forward has made
                found += (part for part in self._differing(name, thing) if part not in computed)
        return sorted(found)

    def _differing(self, name: str, thing: Any) -> Iterator[str]:
        """The names of the attributes of a thing that differ; of a container, its own name."""
        now, before = _contents(thing), self._contents[id(thing)][1]
        if not isinstance(thing, _CONTAINERS):
            differing = (key for key in now.keys() | before.keys() if now.get(key) is not before.get(key))
            yield from (_joined(name, key) for key in differing)
        elif not _same(now, before):
            yield name

    def restore(self) -> None:
        """Put everything back."""
        for thing, _ in self._contents.values():
            self._restore(thing)
        for variables in self._variables.values():
            variables.restore()

    def restore_reached(self, modules: Iterable[nn.Module]) -> None:
        """Put back what some modules hold, and what is reached from them, even if other modules hold it, too."""
        waiting: deque[Any] = deque(modules)
        seen: set[int] = set()
        while waiting:
            thing = waiting.popleft()
            if id(thing) in self._contents and id(thing) not in seen:
                seen.add(id(thing))
                self._restore(thing)
                waiting.extend(part for _, part in _watched("", thing))
            if isinstance(thing, nn.Module):
                for variables in self._variables_of(thing):
                    variables.restore()

    def _variables_of(self, *modules: nn.Module) -> list[_Variables]:
        """The variables of the files and classes of some modules."""
        owners = map(id, (*files_of(*modules), *_classes_of(*modules)))
        return [self._variables[owner] for owner in owners if owner in self._variables]

    def _restore(self, thing: Any) -> None:
        _, contents = self._contents[id(thing)]
        if not _same(_contents(thing), contents):
            _fill(thing, contents)


class _Variables:
    """The variables of a file or a class; of containers among them, what they hold.

    What a function with a cache has kept since is forgotten: it may be a proxy, or a tensor on the meta device.
    """

    def __init__(self, owner: Any):
        self._owner = owner
        self._values = self._now()
        self._contents = {
            name: _copied(value) for name, value in self._values.items() if isinstance(value, _CONTAINERS)
        }
        cached = ((name, value) for name, value in self._values.items() if isinstance(value, _CACHED))
        self._misses = {name: value.cache_info().misses for name, value in cached}

    def _now(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self._owner).items() if not _is_definition(name, value)}

    def changed(self) -> list[str]:
        """The names of variables that have other values, or hold something else."""
        owner = f"{self._owner.__name__}." if isinstance(self._owner, type) else "the global "
        return [f"{owner}{name}" for name in self._differing()]

    def _differing(self) -> set[str]:
        now = self._now()
        other = (name for name in now.keys() | self._values.keys() if now.get(name) is not self._values.get(name))
        held = (name for name, held in self._contents.items() if not _same(self._values[name], held))
        return {*other, *held}

    def restore(self) -> None:
        """Put everything back."""
        for name, misses in self._misses.items():
            if self._values[name].cache_info().misses != misses:
                self._values[name].cache_clear()
        for name in self._differing():
            if name not in self._values:
                delattr(self._owner, name)
                continue
            setattr(self._owner, name, self._values[name])
            if name in self._contents:
                _fill(self._values[name], self._contents[name])


def files_of(*modules: nn.Module) -> list[ModuleType]:
    """The files in which the classes of a user's modules are written."""
    names = sorted({kind.__module__ for kind in _classes_of(*modules)})
    return [sys.modules[name] for name in names if name in sys.modules]


def _classes_of(*modules: nn.Module) -> list[type]:
    """The classes of a user's modules, each once."""
    found = dict.fromkeys(kind for module in modules for kind in type(module).__mro__)
    return [kind for kind in found if kind.__module__.partition(".")[0] not in LIBRARIES]


def _is_definition(name: str, value: Any) -> bool:
    """Whether a name is that of Python itself, or of a function, a class or a module."""
    # fx puts functions of its own in the place of some of Python's, such as math.ceil.
    return name.startswith("__") or isinstance(value, (type, FunctionType, BuiltinFunctionType, ModuleType))


class RandomState:
    """The states of the generators that a forward may draw from."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        self._numpy: Any = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # torch has no types for it

    def has_changed(self) -> bool:
        """Whether anything has been drawn since."""
        return self.differs_from(RandomState())

    def differs_from(self, other: RandomState) -> bool:
        """Whether the next random numbers are others."""
        tensors = zip([self._torch, *self._cuda], [other._torch, *other._cuda], strict=False)
        if not all(torch.equal(one, another) for one, another in tensors) or self._python != other._python:
            return True
        if self._numpy is None or other._numpy is None:
            return False
        (_, keys, position, *_), (_, other_keys, other_position, *_) = self._numpy, other._numpy
        return bool(position != other_position or (keys != other_keys).any())

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


def _contents(thing: Any) -> Any:
    """The container in which a module or object holds its attributes; a container itself."""
    return thing if isinstance(thing, _CONTAINERS) else vars(thing)


def _watched(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """The containers and plain objects that a thing holds itself; those in it have the name of a container."""
    held = _contents(thing)
    for key, value in held.items() if isinstance(held, dict) else enumerate(held):
        inner = name if isinstance(thing, _CONTAINERS) else _joined(name, str(key))
        # What a tuple holds cannot be replaced, but changed.
        yield from ((inner, part) for part in (value if isinstance(value, tuple) else [value]) if _is_watched(part))


def _joined(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute


def _is_watched(value: Any) -> bool:
    """Whether a forward may change what a value holds."""
    return isinstance(value, _CONTAINERS) or is_plain_object(value)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(dict.get(one, key) is dict.get(other, key) for key in one)
    if isinstance(one, set):
        return bool(one == other)  # a copy may have another order
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _fill(thing: Any, contents: Any) -> None:
    """Give a thing back what it held. The thing itself stays, since others may hold it."""
    target = _contents(thing)
    base: Any = _base(target)
    base.clear(target)
    if isinstance(target, dict):
        for key, value in contents.items():
            base.__setitem__(target, key, value)
    else:
        (base.update if isinstance(target, set) else base.extend)(target, contents)


def _copied(container: Any) -> Any:
    """What a container holds, in a plain one: methods of a subclass may compute what they return."""
    return dict(dict.items(container)) if isinstance(container, dict) else _base(container)(container)


def _base(container: Any) -> type:
    """The class of Python whose methods do nothing but hold."""
    return next(kind for kind in (OrderedDict, *_CONTAINERS) if isinstance(container, kind))
