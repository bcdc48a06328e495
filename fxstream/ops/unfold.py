"""Unfolding, which lays windows of a value out along a new dimension, and folding, which adds them up again.

`Tensor.unfold` streams along every axis. `F.unfold` and `F.fold` stream only along the batch.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..geometry.axes import Dim, Symbol, Value
from ..geometry.window import Sliding, Span
from .arguments import per_axis
from .border import fit
from .registry import Answer, Local, NotLocal, register


@register("unfold")
def unfold_dimension(input: Value, dimension: int, size: int, step: int) -> Answer:
    dim = input.dim(dimension)
    if type(size) is not int or type(step) is not int:
        return NotLocal("cuts out windows by numbers that are not known before the call")
    windows = {dim: Sliding(kernel=size, stride=step)}

    def run(block: torch.Tensor, *spans: Span) -> torch.Tensor:
        return fit(block, spans, dims=[dim]).unfold(dim, size, step)

    return Local((input,), (*input.slid(windows), Dim(None, size)), run, windows, aliases=input)


@register(F.unfold)
def unfold(input: Value, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Answer:
    if input.rank != 4:
        return NotLocal(f"expects 4 dimensions and gets {input.rank}")
    if tags := input.tags(range(1, 4)):
        return NotLocal(f"puts windows along the streamed {' and '.join(tags)} into one row", "use Tensor.unfold")
    kernels, strides, dilations, paddings = (per_axis(given, 2) for given in (kernel_size, stride, dilation, padding))
    slides = [Sliding(k, s, d, p, p) for k, s, d, p in zip(kernels, strides, dilations, paddings, strict=True)]
    channels, *lengths = (dim.known for dim in input.dims[1:])
    sizes = [slide.size(length) for slide, length in zip(slides, lengths, strict=True) if length is not None]
    entries = Symbol() if channels is None else channels * math.prod(kernels)
    count = math.prod(sizes) if len(sizes) == 2 else Symbol()
    run = partial(F.unfold, kernel_size=kernel_size, dilation=dilation, padding=padding, stride=stride)
    return Local((input,), (input.dims[0], Dim(None, entries), Dim(None, count)), run)


@register(nn.Unfold)
def unfold_module(m: Any, input: Value) -> Answer:
    return unfold(input, m.kernel_size, m.dilation, m.padding, m.stride)


@register(F.fold)
def fold(
    input: Value, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Answer:
    if input.rank != 3:
        return NotLocal(f"expects 3 dimensions and gets {input.rank}")
    if tags := input.tags([1, 2]):
        return NotLocal(f"adds up windows that lie along the streamed {' and '.join(tags)}")
    sizes = per_axis(output_size, 2)
    if not all(isinstance(size, (int, Symbol)) for size in sizes):
        return NotLocal("folds to a size that is not known before the call")
    entries = input.dims[1].known
    channels = Symbol() if entries is None else entries // math.prod(per_axis(kernel_size, 2))
    options = {"kernel_size": kernel_size, "dilation": dilation, "padding": padding, "stride": stride}
    dims = (input.dims[0], Dim(None, channels), *(Dim(None, size) for size in sizes))
    return Local((input,), dims, lambda block: F.fold(block, output_size, **options))


@register(nn.Fold)
def fold_module(m: Any, input: Value) -> Answer:
    return fold(input, m.output_size, m.kernel_size, m.dilation, m.padding, m.stride)
