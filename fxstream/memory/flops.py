"""Counting floating-point operations."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..scan.keeping import Result


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Counts the FLOPs of what runs while it is active: those of convolutions, matrix products and attention.

    It uses the formulas of torch.utils.flop_counter, but for the backward pass of convolutions: there, torch does not
    divide by the number of groups. Unlike torch's FlopCounterMode it does not watch modules, so that it can count under
    `torch.no_grad` what computes with a view of a parameter.

    Attributes:
        total: the FLOPs so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None:
            # In inference mode, operations arrive here that consist of others.
            with self:
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        self.total += int(formula(*args, **kwargs, out_val=result))
        return result


def _convolution_backward(
    gradient: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: tuple[bool, bool, bool],
    **_: Any,
) -> int:
    """FLOPs of the gradients of a convolution's input and weight: each takes what the forward pass takes."""
    small = input if transposed else gradient
    # `weight` has the channels of one group only along its second dimension.
    forward = 2 * prod(weight.shape) * small.shape[0] * prod(small.shape[2:])
    return forward * sum(wanted[:2])


_ATEN = torch.ops.aten
_FORMULAS = {
    **flop_registry,
    _ATEN.convolution_backward: _convolution_backward,
    # Torch has formulas for the kernels of a GPU only.
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}


def result_flops(result: Result) -> int:
    """The FLOPs that a kernel has taken for a result."""
    function, args, kwargs, _ = result.signature
    return int(_FORMULAS[function._overloadpacket](*args, **kwargs, out_val=result.returned))
