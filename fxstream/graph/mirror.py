"""Copies of module trees: modules of their own, with the same Parameters and buffers, or with twins of these."""

from __future__ import annotations

import copy
import functools
import io
import random
from collections import deque
from collections.abc import Callable, Iterable
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from .attributes import is_plain_object
from .snapshot import MOST_OBJECTS

Module = TypeVar("Module", bound=nn.Module)
Twins = dict[int, Any]
"""The id of an original -> its twin."""
TwinOfLeaf = Callable[[Any], Any]

_OWN = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
"""The registries that torch.nn.Module gives every module: parameters, buffers, submodules, hooks."""
_BOUND = ("_compiled_call_impl",)
"""Attributes that a copy must not have: what `module.compile()` has made of the module."""


def mirror(module: Module, twins: Twins) -> Module:
    """A shallow copy of a module tree. A module that stands in several places of the tree stays one module."""
    if id(module) not in twins:
        twin = twins[id(module)] = object.__new__(type(module))
        vars(twin).update({name: value for name, value in vars(module).items() if name not in _BOUND})
        _mirror_registries(twin, module, twins)
    return twins[id(module)]  # type: ignore[no-any-return]  # the twins are of all types


def mirror_registries(twin: nn.Module, module: nn.Module, twins: Twins) -> None:
    """Give `twin` registries of its own: those of `module`, with its submodules mirrored.

    What the mirrored modules hold in other attributes and refers to modules of the tree refers to their twins, too.
    """
    _mirror_registries(twin, module, twins)
    refer_to_twins([*twins.values()], twins)


def twin_of(module: Module, twin_of_leaf: TwinOfLeaf) -> Module:
    """A copy of a module tree with twins of its tensors, and of all that holds modules or tensors.

    `twin_of_leaf` is given what is neither a module nor a container nor an object of a user's own. It returns a twin,
    or None for what the copy shares with the original.
    """
    scripted = [part for part in module.modules() if isinstance(part, torch.jit.ScriptModule)]
    twins: Twins = {id(part): _loaded(part) for part in scripted}
    root = mirror(module, twins)
    known = len(scripted)
    while holders := [twin for twin in [*twins.values()][known:] if isinstance(twin, nn.Module)]:
        known = len(twins)
        refer_to_twins(holders, twins, twin_of_leaf)  # adds the modules that are registered nowhere
    return root


def on_meta(module: Module) -> Module:
    """A copy of a module tree whose tensors are on the meta device: with their shapes, and without memory."""
    return twin_of(module, lambda leaf: tensor_on_meta(leaf) if isinstance(leaf, torch.Tensor) else None)


def tensor_on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf of the same shape, dtype and strides without memory; a Parameter for a Parameter."""
    twin = torch.empty_like(tensor, device="meta", requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, tensor.requires_grad)
    return twin.requires_grad_(tensor.requires_grad)


def cloned(leaf: Any) -> Any:
    """A twin of a tensor with memory of its own, or of a random generator; None for anything else."""
    if isinstance(leaf, torch.Tensor):
        twin = leaf.detach().clone()
        if isinstance(leaf, nn.Parameter):
            return nn.Parameter(twin, leaf.requires_grad)
        return twin.requires_grad_(leaf.requires_grad)
    if isinstance(leaf, torch.Generator):
        return torch.Generator(leaf.device).set_state(leaf.get_state())
    numpy = type(leaf).__module__.partition(".")[0] == "numpy" and not isinstance(leaf, type)
    return copy.deepcopy(leaf) if numpy or isinstance(leaf, random.Random) else None


def _loaded(scripted: torch.jit.ScriptModule) -> Any:
    """A copy of a scripted module, whose tensors are in C++; a deep copy of it would compute with the original's."""
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)  # type: ignore[no-untyped-call]  # torch has no types for it


def _mirror_registries(twin: nn.Module, module: nn.Module, twins: Twins) -> None:
    for name in _OWN:
        if name in vars(module):  # a module pickled by an older torch may lack some
            vars(twin)[name] = copy.copy(vars(module)[name])
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else mirror(child, twins)


def refer_to_twins(holders: Iterable[nn.Module], twins: Twins, twin_of_leaf: TwinOfLeaf | None = None) -> None:
    """Let the attributes of some mirrored modules refer to twins, also inside containers, objects and functions.

    A container, an object of a user's own, a bound method, a `functools.partial` or a function with a closure that
    leads to something that has a twin is copied. Anything else stays shared with the original, and so do tensors and
    modules that are registered nowhere if there is no `twin_of_leaf`.
    """
    walk = _Walk(twins, twin_of_leaf)
    registries: list[dict[str, Any]] = []
    for holder in holders:
        state = vars(holder)
        registries += [state, *(state[name] for name in ("_parameters", "_buffers") if name in state)]
    attributes = [(held, name, value) for held in registries for name, value in held.items() if name not in _OWN]
    walk.look_at([value for _, _, value in attributes])
    for held, name, value in attributes:
        if walk.has_twin(value):
            held[name] = walk.twin(value)


class _Walk:
    """What can be reached from some values; what of it has a twin, or leads to something that has one."""

    def __init__(self, twins: Twins, twin_of_leaf: TwinOfLeaf | None):
        self.twins = twins
        self.twin_of_leaf = twin_of_leaf
        self.seen: dict[int, Any] = {}
        self.leading: set[int] = set()
        """The ids of things that are no twins' originals, but lead to some."""

    def look_at(self, values: Iterable[Any]) -> None:
        holders: dict[int, list[int]] = {}
        waiting = deque(values)
        found: list[int] = []
        while waiting and len(self.seen) < MOST_OBJECTS:
            thing = waiting.popleft()
            if isinstance(thing, _PLAIN) or id(thing) in self.seen:
                continue
            self.seen[id(thing)] = thing
            parts = () if id(thing) in self.twins else _parts(thing)
            for part in parts:
                holders.setdefault(id(part), []).append(id(thing))
                waiting.append(part)
            if id(thing) in self.twins or (not parts and self._give_twin(thing)):
                found.append(id(thing))
        while found:
            for holder in holders.get(found.pop(), ()):
                if holder not in self.leading:
                    self.leading.add(holder)
                    found.append(holder)

    def _give_twin(self, leaf: Any) -> bool:
        """Whether a thing that holds nothing gets a twin of its own."""
        if self.twin_of_leaf is None:
            return False
        if isinstance(leaf, nn.Module):
            mirror(leaf, self.twins)
        elif (twin := self.twin_of_leaf(leaf)) is not None:
            self.twins[id(leaf)] = twin
        return id(leaf) in self.twins

    def has_twin(self, thing: Any) -> bool:
        return id(thing) in self.seen and (id(thing) in self.twins or id(thing) in self.leading)

    def twin(self, thing: Any) -> Any:
        """The twin of a thing, made where it leads to others; the thing itself if there is none."""
        if not self.has_twin(thing):
            return thing
        if id(thing) not in self.twins:
            self._make(thing)
        return self.twins[id(thing)]

    def _make(self, thing: Any) -> None:
        if isinstance(thing, (tuple, frozenset)):
            parts = [self.twin(part) for part in thing]
            self.twins[id(thing)] = type(thing)(*parts) if hasattr(thing, "_fields") else type(thing)(parts)
        elif isinstance(thing, MethodType):
            self.twins[id(thing)] = MethodType(thing.__func__, self.twin(thing.__self__))
        elif isinstance(thing, functools.partial):
            keywords = {name: self.twin(value) for name, value in thing.keywords.items()}
            self.twins[id(thing)] = type(thing)(self.twin(thing.func), *map(self.twin, thing.args), **keywords)
        else:
            # These may lead back to themselves: the twin is known before it is filled.
            self.twins[id(thing)] = twin = _shell(thing)
            self._fill(twin, thing)

    def _fill(self, twin: Any, thing: Any) -> None:
        if isinstance(thing, FunctionType):
            for cell, original in zip(twin.__closure__, thing.__closure__ or (), strict=True):
                if _is_filled(original):
                    cell.cell_contents = self.twin(original.cell_contents)
        elif isinstance(thing, dict):
            twin.update({self.twin(key): self.twin(value) for key, value in thing.items()})
        elif isinstance(thing, set):
            twin.update(map(self.twin, thing))
        elif isinstance(thing, (list, deque)):
            twin.extend(map(self.twin, thing))
        else:
            vars(twin).update({name: self.twin(value) for name, value in vars(thing).items()})


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
"""Types of values that lead to nothing."""


def _parts(thing: Any) -> list[Any]:
    """What a thing refers to, if it can be copied to refer to something else."""
    if isinstance(thing, dict):
        return [*thing.keys(), *thing.values()]
    if isinstance(thing, (list, tuple, set, frozenset, deque)):
        return list(thing)
    if isinstance(thing, MethodType):
        return [thing.__self__]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, FunctionType):
        return [cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell)]
    return list(vars(thing).values()) if is_plain_object(thing) else []


def _is_filled(cell: CellType) -> bool:
    """Whether the variable that a function shares with the one around it has a value."""
    try:
        cell.cell_contents  # noqa: B018  # raises
    except ValueError:
        return False
    return True


def _shell(thing: Any) -> Any:
    """A thing of the same type that holds nothing yet."""
    if isinstance(thing, FunctionType):
        cells = tuple(CellType() for _ in thing.__closure__ or ())
        function = FunctionType(thing.__code__, thing.__globals__, thing.__name__, thing.__defaults__, cells)
        function.__kwdefaults__, function.__qualname__ = thing.__kwdefaults__, thing.__qualname__
        vars(function).update(vars(thing))
        return function
    if isinstance(thing, (dict, list, set, deque)):
        container = copy.copy(thing)
        container.clear()
        return container
    return object.__new__(type(thing))
