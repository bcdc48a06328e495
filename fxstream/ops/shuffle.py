"""Pixel shuffling, which moves channels to pixels or pixels to channels, and channel shuffling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..geometry.axes import Dim, Symbol, Value
from ..geometry.window import Sliding, Span, Transposed
from .border import fit
from .conv import image_problem
from .registry import Answer, Local, NotLocal, register


@register(F.pixel_shuffle, torch.pixel_shuffle, spatial=2)
def pixel_shuffle(input: Value, upscale_factor: int) -> Answer:
    if problem := image_problem(input, 2, "spreads its channels over pixels"):
        return problem
    factor, channels = upscale_factor, input.dims[1].known
    if channels is not None and channels % factor**2:
        return NotLocal(f"needs a multiple of {factor**2} channels and gets {channels}")
    windows = {dim: Transposed(factor, factor) for dim in (2, 3)}

    def run(block: torch.Tensor, *spans: Span) -> torch.Tensor:
        return fit(F.pixel_shuffle(block, factor), spans)

    dims = input.slid(windows)
    count = Symbol() if channels is None else channels // factor**2
    return Local((input,), (dims[0], Dim(None, count), *dims[2:]), run, windows)


@register(nn.PixelShuffle, spatial=2)
def pixel_shuffle_module(m: Any, input: Value) -> Answer:
    return pixel_shuffle(input, m.upscale_factor)


@register(F.pixel_unshuffle, torch.pixel_unshuffle, spatial=2)
def pixel_unshuffle(input: Value, downscale_factor: int) -> Answer:
    if problem := image_problem(input, 2, "gathers pixels into its channels"):
        return problem
    factor = downscale_factor
    if any(dim.known is not None and dim.known % factor for dim in input.dims[2:]):
        return NotLocal(f"needs an image whose height and width are multiples of {factor}")
    windows = {dim: Sliding(kernel=factor, stride=factor) for dim in (2, 3)}

    def run(block: torch.Tensor, *spans: Span) -> torch.Tensor:
        return F.pixel_unshuffle(fit(block, spans), factor)

    dims = input.slid(windows)
    channels = input.dims[1].known
    count = Symbol() if channels is None else channels * factor**2
    return Local((input,), (dims[0], Dim(None, count), *dims[2:]), run, windows)


@register(nn.PixelUnshuffle, spatial=2)
def pixel_unshuffle_module(m: Any, input: Value) -> Answer:
    return pixel_unshuffle(input, m.downscale_factor)


@register(F.channel_shuffle, torch.channel_shuffle)
def channel_shuffle(input: Value, groups: int) -> Answer:
    if tags := input.tags([1]):
        return NotLocal(f"has its channels along the streamed axis {tags[0]}")
    return Local((input,), input.dims, lambda block: F.channel_shuffle(block, groups))


@register(nn.ChannelShuffle)
def channel_shuffle_module(m: Any, input: Value) -> Answer:
    return channel_shuffle(input, m.groups)
