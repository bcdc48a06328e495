"""What must hold when the streamed part is called, and the errors if it does not."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from reprlib import repr as shortened
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import (
    AttributeChangedError,
    BatchNormModeError,
    HookError,
    InputError,
    ModeError,
    ShardedError,
    TransformError,
)
from ..graph.attributes import Held, difference, held
from ..graph.hooks import has_hooks
from .settings import Settings


def check_image(image: Any, settings: Settings) -> None:
    """Raises InputError unless the image is a tensor of the right rank and number of channels."""
    form = f"({', '.join(settings.names)})"
    if not isinstance(image, torch.Tensor):
        raise InputError(f"the streamed image must be a tensor {form}, not {type(image).__name__}")
    if image.dim() != len(settings.names):
        raise InputError(f"the streamed image must be {form}, and has the shape {tuple(image.shape)}")
    channels = settings.tiling.channels
    if channels is not None and image.shape[1] != channels:
        raise InputError(f"tile_shape says {channels} channels, and the image has {image.shape[1]}")
    if not image.numel():
        raise InputError(f"the streamed image is empty: {tuple(image.shape)}")


def is_sharded(value: Any) -> bool:
    """Whether a value is a DTensor, of which this process may hold a part."""
    # Not imported here, which would take a second: whoever shards parameters has imported it already.
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(value, distributed.DTensor)


def check_transforms(tensors: Sequence[torch.Tensor]) -> None:
    """Raises TransformError inside a transform of torch that does not see through the scan, and would be wrong."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # torch has no types for it
        raise TransformError("torch.jit.trace would record the tiles of one image size. Way out: trace the plain model")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise TransformError(
            "transforms of torch.func (grad, vmap, jvp) do not see through the streamed part. "
            "Way out: torch.autograd.grad; or the plain model, which has the same weights"
        )
    if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        raise TransformError(
            "the streamed part does not support forward-mode automatic differentiation: a tangent would be lost. "
            "Way out: the plain model, which has the same weights"
        )


def _has_tangent(tensor: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]  # torch has no types for it


def check_whole(called: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> None:
    """Raises ShardedError if one of the modules or inputs, by path or name, is a shard."""
    sharded = [path for path, module in called.items() if any(map(is_sharded, module.parameters()))]
    sharded += [name for name, value in inputs.items() if is_sharded(value)]
    if sharded:
        raise ShardedError(
            f"{sharded[0]} is only a shard (DTensor) when the streamed part reads it. "
            "Way out: fully_shard the converted model as a whole, and none of its streamed submodules."
        )


def check_hooks(called: Mapping[str, nn.Module], entered: Mapping[str, nn.Module]) -> None:
    """Raises HookError if a module has a hook that would not run as it should.

    The hooks of a module that is called would run once per tile. Those of a module that was `entered`, or traced
    through, would not run at all, except for the root (under ""), whose hooks do run.
    """
    inside = ((path, part) for path, module in called.items() for part in module.modules())
    for path, module in chain(entered.items(), inside):
        if path and has_hooks(module):
            raise HookError(
                f"{path} has acquired a hook after the conversion, which would run once per tile or not at all. "
                "Way out: register it before the conversion; streaming then ends in front of this module."
            )


def in_modes(owner: nn.Module, modes: Mapping[str, bool]) -> bool:
    """Whether modules are in the modes, training or evaluation, that are given by their paths."""
    return all(owner.get_submodule(path).training is training for path, training in modes.items())


def mode_error(owner: nn.Module, modes: Mapping[str, bool]) -> ModeError:
    """The error for the first module that is not in the mode in which its forward was traced."""
    path = next(path for path, training in modes.items() if not in_modes(owner, {path: training}))
    module = owner.get_submodule(path)
    if isinstance(module, _BatchNorm) and module.training:
        return BatchNormModeError(
            f"{path} is in training mode and needs the mean and variance over the streamed axes. "
            "Way out: call .eval() on it, or convert with freeze_batchnorm=True."
        )
    mode, now = ("eval", "train") if module.training else ("train", "eval")
    return ModeError(
        f"the forward of {path or 'the model'} depends on its mode: it was converted in {mode} mode and is "
        f"called in {now} mode. Way out: call .{mode}(), convert the model again in {now} mode, or register a rule "
        "for this module (docs/your_own_op.md)."
    )


def check_attributes(owner: nn.Module, attributes: Mapping[str, Mapping[str, Held]]) -> None:
    """Raises AttributeChangedError if an attribute has another value than the one that was traced."""
    for path, traced in attributes.items():
        module = owner.get_submodule(path)
        for name, value in traced.items():
            full_name = f"{path}.{name}" if path else name
            if found := difference(value, held(getattr(module, name, None)), full_name):
                where, before, now = found
                raise AttributeChangedError(
                    f"{where} was {shortened(before)} at the conversion, which took it as a constant; now it is "
                    f"{shortened(now)}. "
                    "Way out: convert the model again, or make it a buffer, which every call reads."
                )
