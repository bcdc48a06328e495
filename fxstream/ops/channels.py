"""Operations that combine all positions of some dimensions and are local along every other one.

Among them are softmax and all normalisations but batch and instance norm. They stream if none of the dimensions that
they combine is streamed: a LayerNorm over the channels of an image, or a group norm of each image of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..geometry.axes import Symbol, Value
from .arguments import as_tuple
from .registry import Answer, Local, NotLocal, register


def spanning_problem(x: Value, dims: Iterable[int], what: str) -> NotLocal | None:
    """Why an operation that combines all positions of `dims` is not local; None if it is.

    `what` says for the user what the operation does: "takes the mean".
    """
    if tags := x.tags(dims):
        return NotLocal(f"{what} along the streamed {' and '.join(tags)}")
    return None


def parameter_problem(*parameters: Any) -> NotLocal | None:
    """Why an operation with these parameters is not local: one of them depends on the image. Else None."""
    if any(isinstance(parameter, Value) for parameter in parameters):
        return NotLocal("has parameters that depend on the image")
    return None


def _across(x: Value, dims: Iterable[int], what: str, run: Callable[..., torch.Tensor], *parameters: Any) -> Answer:
    """The answer for an operation that keeps the shape and combines all positions of `dims`.

    `run` gets a block and the parameters.
    """
    return parameter_problem(*parameters) or spanning_problem(x, dims, what) or Local((x, *parameters), x.dims, run)


@register(F.layer_norm)
def layer_norm(
    input: Value, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Answer:
    shape = tuple(normalized_shape)

    def run(block: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        return F.layer_norm(block, shape, weight, bias, eps)

    return _across(input, range(-len(shape), 0), "takes the mean and variance", run, weight, bias)


@register(nn.LayerNorm)
def layer_norm_module(m: Any, input: Value) -> Answer:
    return layer_norm(input, m.normalized_shape, m.weight, m.bias, m.eps)


@register(F.rms_norm)
def rms_norm(input: Value, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Answer:
    shape = tuple(normalized_shape)

    def run(block: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return F.rms_norm(block, shape, weight, eps)

    return _across(input, range(-len(shape), 0), "takes the mean square", run, weight)


@register(nn.RMSNorm)
def rms_norm_module(m: Any, input: Value) -> Answer:
    return rms_norm(input, m.normalized_shape, m.weight, m.eps)


@register(F.group_norm)
def group_norm(input: Value, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Answer:
    # torch refuses to normalise single values. This is checked on the sizes of the whole value, since a block of a
    # batch may have fewer positions than the batch.
    if math.prod(num_groups + 1 if dim.known is None else dim.known for dim in input.dims) == num_groups:
        raise ValueError("a group norm of single values")

    def run(block: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.group_norm(block, num_groups, weight, bias, eps)

    return _across(input, range(1, input.rank), "takes the mean and variance of groups", run, weight, bias)


@register(nn.GroupNorm)
def group_norm_module(m: Any, input: Value) -> Answer:
    return group_norm(input, m.num_groups, m.weight, m.bias, m.eps)


@register(F.local_response_norm)
def local_response_norm(input: Value, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Answer:
    run = partial(F.local_response_norm, size=size, alpha=alpha, beta=beta, k=k)
    return _across(input, [1], "combines neighbouring positions", run)


@register(nn.LocalResponseNorm)
def local_response_norm_module(m: Any, input: Value) -> Answer:
    return local_response_norm(input, m.size, m.alpha, m.beta, m.k)


def _register_over_one_dimension(what: str, function: Callable[..., torch.Tensor], *targets: Any) -> None:
    """Register functions that keep the shape and combine all positions of their argument `dim`."""

    @register(*targets)
    def rule(input: Value, dim: Any = None, *args: Any, **kwargs: Any) -> Answer:
        kwargs.pop("_stacklevel", None)
        if dim is None:
            return NotLocal(f"takes {what} along a dimension that it does not name")
        return _across(input, [dim], f"takes {what}", lambda block: function(block, dim, *args, **kwargs))


_register_over_one_dimension("the softmax", torch.softmax, torch.softmax, F.softmax, "softmax")
_register_over_one_dimension("the softmax", torch.log_softmax, torch.log_softmax, F.log_softmax, "log_softmax")
_register_over_one_dimension("the cumulative sum", torch.cumsum, torch.cumsum, "cumsum")


def _register_softmax_module(module_type: type[nn.Module], function: Callable[..., torch.Tensor]) -> None:
    @register(module_type)
    def rule(m: Any, input: Value) -> Answer:
        if m.dim is None:
            return NotLocal("takes the softmax along a dimension that it does not name")
        return _across(input, [m.dim], "takes the softmax", partial(function, dim=m.dim))


_register_softmax_module(nn.Softmax, torch.softmax)
_register_softmax_module(nn.LogSoftmax, torch.log_softmax)


@register(nn.Softmax2d)
def softmax_of_channels(m: Any, input: Value) -> Answer:
    return _across(input, [-3], "takes the softmax", partial(torch.softmax, dim=-3))


@register(F.normalize)
def normalize(input: Value, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Answer:
    if out is not None:
        return NotLocal("writes into a tensor given as `out`", "use its result instead")
    return _across(input, as_tuple(dim), "takes the norm", lambda block: F.normalize(block, p, dim, eps))


@register(F.glu)
def glu(input: Value, dim: int = -1) -> Answer:
    if problem := spanning_problem(input, [dim], "gates one half with the other"):
        return problem
    size = input.dims[input.dim(dim)].known
    dims = input.resized({input.dim(dim): Symbol() if size is None else size // 2})
    return Local((input,), dims, lambda block: F.glu(block, dim))


@register(nn.GLU)
def glu_module(m: Any, input: Value) -> Answer:
    return glu(input, m.dim)
