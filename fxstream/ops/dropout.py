"""Operations that drop activations at random in training mode, and do nothing in eval mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..axes import Value
from .registry import Answer, Local, NotLocal, register


def _drops(input: Value, p: float, training: bool) -> Answer:
    if training and p > 0:
        return NotLocal("draws random numbers in training mode", "call .eval() on it")
    return Local((input,), input.dims, lambda block: block, aliases=input)


def _register_dropout(module_type: type[nn.Module], function: Any) -> None:
    @register(function)
    def function_rule(input: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Answer:
        return _drops(input, p, training)

    @register(module_type)
    def module_rule(m: Any, input: Value) -> Answer:
        return function_rule(input, m.p, m.training)


for _module, _function in (
    (nn.Dropout, torch.nn.functional.dropout),
    (nn.Dropout1d, torch.nn.functional.dropout1d),
    (nn.Dropout2d, torch.nn.functional.dropout2d),
    (nn.Dropout3d, torch.nn.functional.dropout3d),
    (nn.AlphaDropout, torch.nn.functional.alpha_dropout),
    (nn.FeatureAlphaDropout, torch.nn.functional.feature_alpha_dropout),
):
    _register_dropout(_module, _function)


@register("torchvision.ops.stochastic_depth.stochastic_depth")
def stochastic_depth(input: Value, p: float, mode: str, training: bool = True) -> Answer:
    return _drops(input, p, training)


@register("torchvision.ops.stochastic_depth.StochasticDepth")
def stochastic_depth_module(m: Any, input: Value) -> Answer:
    return _drops(input, m.p, m.training)
