"""Operations that draw random numbers: dropouts in training mode, and noise with the shape of a value.

A dropout that drops whole channels or images drops them in all tiles. In eval mode, dropouts return their input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..geometry.axes import Dim, Value
from .pointwise import pointwise
from .registry import Answer, Local, Noise, NotLocal, register

_Drop = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def dropping(
    input: Value, p: float, training: bool, inplace: bool, drop: _Drop, along: tuple[int, ...] | None = None
) -> Answer:
    """The answer for a dropout with probability `p`.

    `drop(block, kept, p)` computes the result from a block and a boolean mask. The mask differs between positions of
    the dimensions `along`, by default all, and has size 1 along the others.
    """
    mutates = input if inplace else None
    if not training or p == 0:
        return Local((input,), input.dims, lambda block: block, mutates=mutates, aliases=input)
    if not 0 <= p <= 1:
        return NotLocal(f"drops with a probability of {p}")
    shared = [index for index in range(input.rank) if along is not None and index not in along]
    noise = Noise(tuple(Dim(None, 1) if index in shared else dim for index, dim in enumerate(input.dims)))

    def run(block: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return drop(block, noise >= p, p)

    # In eval mode the result is the input itself, and in-place writes after it must be treated alike in both modes.
    return Local((input, noise), input.dims, run, mutates=mutates, aliases=input)


def _zero(block: torch.Tensor, kept: torch.Tensor, p: float) -> torch.Tensor:
    """Set what is dropped to zero, and scale up the rest so that the expected value stays the same."""
    return block * (kept.to(block.dtype) * (1 / (1 - p) if p < 1 else 0.0))


def _saturate(block: torch.Tensor, kept: torch.Tensor, p: float) -> torch.Tensor:
    """Alpha dropout: Klambauer et al., "Self-Normalizing Neural Networks", NeurIPS 2017, section "Dropout"."""
    if p == 1:
        return block * 0
    low = -1.7580993408473766  # -lambda * alpha, the limit of a SELU
    scale = math.sqrt(1 / ((1 - p) * (1 + p * low**2)))
    kept = kept.to(block.dtype)
    return block * (kept * scale) + ((1 - kept) * (low * scale) - p * low * scale)


def _register_dropout(name: str, function: Any, drop: _Drop, rank: int | None = None, channels: bool = False) -> None:
    """Register a dropout as a module and as a function.

    `rank` is the number of dimensions that the input must have in training mode. With `channels`, whole channels are
    dropped.
    """
    trains = signature(function).parameters["training"].default

    @register(function)
    def function_rule(input: Value, p: float = 0.5, training: bool = trains, inplace: bool = False) -> Answer:
        if training and rank not in (None, input.rank):
            return NotLocal(f"expects {rank} dimensions in training mode and gets {input.rank}")
        return dropping(input, p, training, inplace, drop, (0, 1) if channels else None)

    @register(getattr(nn, name))
    def module_rule(m: Any, input: Value) -> Answer:
        return function_rule(input, m.p, m.training, m.inplace)


_register_dropout("Dropout", F.dropout, _zero)
_register_dropout("Dropout1d", F.dropout1d, _zero, rank=3, channels=True)
_register_dropout("Dropout2d", F.dropout2d, _zero, rank=4, channels=True)
_register_dropout("Dropout3d", F.dropout3d, _zero, rank=5, channels=True)
_register_dropout("AlphaDropout", F.alpha_dropout, _saturate)
_register_dropout("FeatureAlphaDropout", F.feature_alpha_dropout, _saturate, channels=True)


@register("torchvision.ops.stochastic_depth.stochastic_depth")
def stochastic_depth(input: Value, p: float, mode: str, training: bool = True) -> Answer:
    along = {"row": (0,), "batch": ()}.get(mode)
    if along is None:
        return NotLocal(f"drops in mode '{mode}', which has no streaming rule")
    return dropping(input, p, training, False, _zero, along)


@register("torchvision.ops.stochastic_depth.StochasticDepth")
def stochastic_depth_module(m: Any, input: Value) -> Answer:
    return stochastic_depth(input, m.p, m.mode, m.training)


@register("timm.layers.drop.drop_path")
def drop_path(x: Value, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True) -> Answer:
    def drop(block: torch.Tensor, kept: torch.Tensor, p: float) -> torch.Tensor:
        return _zero(block, kept, p) if scale_by_keep else block * kept.to(block.dtype)

    return dropping(x, drop_prob, training, False, drop, (0,))


@register("timm.layers.drop.DropPath")
def drop_path_module(m: Any, x: Value) -> Answer:
    return drop_path(x, m.drop_prob or 0.0, m.training, m.scale_by_keep)


@register(nn.RReLU)
def rrelu_module(m: Any, input: Value) -> Answer:
    return rrelu(input, m.lower, m.upper, m.training, m.inplace)


@register(F.rrelu)
def rrelu(
    input: Value, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Answer:
    if not training:
        return pointwise(F.leaky_relu, input, (lower + upper) / 2, mutates=inplace)

    def run(block: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        slopes = (noise * (upper - lower) + lower).to(block.dtype)
        return torch.where(block > 0, block, block * slopes)

    return Local((input, Noise(input.dims)), input.dims, run, mutates=input if inplace else None)


def _register_noise(function: Callable[..., torch.Tensor], draw: Callable[..., torch.Tensor]) -> None:
    @register(function)
    def rule(input: Value, *, dtype: torch.dtype | None = None, requires_grad: bool = False) -> Answer:
        if requires_grad:
            return NotLocal("makes a leaf that requires a gradient")

        def run(block: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            return noise.to(dtype or block.dtype)

        return Local((input, Noise(input.dims, draw)), input.dims, run, differentiable=False)


_register_noise(torch.rand_like, torch.rand)
_register_noise(torch.randn_like, torch.randn)
