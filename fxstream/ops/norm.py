"""Batch and instance norms.

A batch norm that uses its running statistics maps each position by itself. With statistics of the image at hand, a norm
is local only along the axes that these do not span.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import BatchNormModeError, InputError
from ..geometry.axes import Value
from .registry import Local, NotLocal, Unknown, register

_FREEZE = "call .eval() on it, or convert with freeze_batchnorm=True"


def batch_norm(
    x: Value, mean: Any, var: Any, weight: Any, bias: Any, training: bool, eps: float, way_out: str
) -> Local | NotLocal:
    """The answer for a batch norm; `mean` and `var` are the running statistics, `way_out` is advice for the user."""
    if training or mean is None:
        # The statistics span all axes but the channels, so every streamed axis.
        why = "is in training mode" if training else "has no running statistics"
        return NotLocal(
            f"{why} and needs the mean and variance over the streamed axes {', '.join(x.tags())}",
            way_out,
            BatchNormModeError,
        )
    if tags := x.tags([1]):
        return NotLocal(f"has its channels along the streamed axis {tags[0]}")
    if any(isinstance(operand, Value) for operand in (mean, var, weight, bias)):
        return NotLocal("has statistics that depend on the image")
    channels = x.dims[1].known
    if channels is not None and not isinstance(mean, Unknown) and channels != mean.numel():
        return NotLocal(f"has statistics of {mean.numel()} channels and gets {channels}", error=InputError)

    def run(block: torch.Tensor, *statistics: torch.Tensor | None) -> torch.Tensor:
        # torch takes these to be contiguous in the backward pass of a block that is channels_last or a single position.
        own = [None if tensor is None else tensor.contiguous() for tensor in statistics]
        enabled = torch.backends.cudnn.enabled
        return _strided_alike(torch.batch_norm(block, own[2], own[3], own[0], own[1], False, 0.0, eps, enabled))

    return Local((x, mean, var, weight, bias), x.dims, run)


def _strided_alike(result: torch.Tensor) -> torch.Tensor:
    """The result of a batch or instance norm; its gradient will get the same strides in memory.

    Otherwise torch's `native_batch_norm_backward` can be wrong on the CPU. If the input or the gradient of the output
    is channels_last and has a dimension of size 1 with an unusual stride, torch takes it to be contiguous, and reads it
    in the layout of the other. An instance norm of one image always makes such a stride. A batch norm meets one with a
    single image or a single row, and blocks have a single row more often than images do.
    """
    if not (result.requires_grad and result.is_cpu and 1 in result.shape):
        return result
    strides = result.stride()

    def lay_out(gradient: torch.Tensor | None) -> torch.Tensor | None:
        # None for a block of which nobody reads anything.
        if gradient is None or gradient.stride() == strides:
            return gradient
        return gradient.new_empty_strided(gradient.shape, strides).copy_(gradient)

    result.register_hook(lay_out)  # type: ignore[no-untyped-call]  # torch has no types for it
    return result


def batch_norm_module(m: Any, input: Value) -> Local | NotLocal:
    way_out = _FREEZE if m.running_mean is not None else "build it with track_running_stats=True"
    return batch_norm(input, m.running_mean, m.running_var, m.weight, m.bias, m.training, m.eps, way_out)


def _register_norm(module_type: type[nn.Module], rule: Any, ranks: tuple[int, ...], spatial: int | None) -> None:
    @register(module_type, spatial=spatial)
    def module_rule(m: Any, input: Value) -> Local | NotLocal:
        if input.rank not in ranks:
            return NotLocal(f"expects {' or '.join(map(str, ranks))} dimensions and gets {input.rank}")
        return rule(m, input)  # type: ignore[no-any-return]  # one of this file's rules


@register(F.batch_norm)
def batch_norm_function(
    input: Value,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Local | NotLocal:
    return batch_norm(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        eps,
        "call it with training=False, or convert with freeze_batchnorm=True",
    )


def instance_norm_module(m: Any, input: Value) -> Local | NotLocal:
    own = m.training or not m.track_running_stats
    return instance_norm(input, m.running_mean, m.running_var, m.weight, m.bias, own, eps=m.eps)


@register(F.instance_norm)
def instance_norm(
    input: Value,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Local | NotLocal:
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, eps, "")
    if running_mean is not None:
        return NotLocal("updates its running statistics", "call .eval() on it")
    if any(isinstance(parameter, Value) for parameter in (weight, bias)):
        return NotLocal("has parameters that depend on the image")
    if tags := input.tags(range(1, input.rank)):
        return NotLocal(
            f"needs the mean and variance over the streamed axes {', '.join(tags)}",
            "use a batch norm with running statistics (freeze_batchnorm=True)",
        )
    if math.prod(2 if dim.known is None else dim.known for dim in input.dims[2:]) == 1:
        raise ValueError("an instance norm of single values")  # torch's own condition

    def run(block: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        return _strided_alike(F.instance_norm(block, None, None, weight, bias, True, 0.0, eps))

    return Local((input, weight, bias), input.dims, run)


_register_norm(nn.BatchNorm1d, batch_norm_module, (2, 3), None)
_register_norm(nn.BatchNorm2d, batch_norm_module, (4,), 2)
_register_norm(nn.BatchNorm3d, batch_norm_module, (5,), 3)
_register_norm(nn.SyncBatchNorm, batch_norm_module, (2, 3, 4, 5), None)
_register_norm(nn.InstanceNorm1d, instance_norm_module, (3,), None)
_register_norm(nn.InstanceNorm2d, instance_norm_module, (4,), 2)
_register_norm(nn.InstanceNorm3d, instance_norm_module, (5,), 3)
