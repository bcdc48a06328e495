"""Module hooks: some compute a weight and can run outside the tile loop; the others may do anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_REGISTRIES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

_COMPUTING = (BasePruningMethod, SpectralNorm, WeightNorm)


def _all(module: nn.Module) -> Iterator[Any]:
    for registry in _REGISTRIES:
        yield from getattr(module, registry).values()


def runs_own_hooks(module: nn.Module) -> bool:
    """Whether any hook of its own runs when the module is called."""
    return any(True for _ in _all(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run when the module is called, other than those that compute its weights."""
    return any(not isinstance(hook, _COMPUTING) for hook in _all(module))


def remove_hooks(module: nn.Module) -> None:
    """Remove the hooks of a module, other than those that compute its weights."""
    for registry in _REGISTRIES:
        hooks = getattr(module, registry)
        for key in [key for key, hook in hooks.items() if not isinstance(hook, _COMPUTING)]:
            del hooks[key]


def computed_weights(module: nn.Module) -> set[str]:
    """The names of attributes that hooks compute from parameters before each forward: pruned and normalised weights."""
    names = {hook.name for hook in _all(module) if isinstance(hook, (SpectralNorm, WeightNorm))}
    return names | {hook._tensor_name for hook in _all(module) if isinstance(hook, BasePruningMethod)}


def registered(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Path of each module that has hooks -> the numbers under which they are registered."""
    found = {path: tuple(_numbers(module)) for path, module in model.named_modules()}
    return {path: numbers for path, numbers in found.items() if numbers}


def _numbers(module: nn.Module) -> Iterator[int]:
    for registry in _REGISTRIES:
        yield from getattr(module, registry)
