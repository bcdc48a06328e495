"""Shallow copies of module trees: new modules with the same Parameters and buffers, or with tensors without memory."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)

_OWN = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
"""The registries that torch.nn.Module gives every module: parameters, buffers, submodules, hooks."""
_BOUND = ("_compiled_call_impl",)
"""Attributes that a copy must not have: what `module.compile()` has made of the module."""


def mirror(module: Module, memo: dict[int, nn.Module]) -> Module:
    """A shallow copy of a module tree. A module that stands in several places of the tree stays one module."""
    if id(module) not in memo:
        twin = memo[id(module)] = object.__new__(type(module))
        vars(twin).update({name: value for name, value in vars(module).items() if name not in _BOUND})
        mirror_registries(twin, module, memo)
    return memo[id(module)]  # type: ignore[return-value]  # the memo holds modules of all types


def on_meta(module: Module) -> Module:
    """A shallow copy of a module tree whose tensors are on the meta device: with their shapes, and without memory."""
    twins: dict[int, torch.Tensor] = {}
    memo: dict[int, nn.Module] = {}
    copied = mirror(module, memo)
    for twin in memo.values():
        registries: list[dict[str, Any]] = [twin._parameters, twin._buffers, vars(twin)]
        for registry in registries:
            for name, value in registry.items():
                if isinstance(value, torch.Tensor):
                    registry[name] = twins.setdefault(id(value), tensor_on_meta(value))
    return copied


def tensor_on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf of the same shape, dtype and strides without memory; a Parameter for a Parameter."""
    twin = torch.empty_like(tensor, device="meta", requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, tensor.requires_grad)
    return twin.requires_grad_(tensor.requires_grad)


def mirror_registries(twin: nn.Module, module: nn.Module, memo: dict[int, nn.Module]) -> None:
    """Give `twin` registries of its own: those of `module`, with its submodules mirrored."""
    for name in _OWN:
        if name in vars(module):  # a module pickled by an older torch may lack some
            vars(twin)[name] = copy.copy(vars(module)[name])
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else mirror(child, memo)
