"""Operations that make images larger: transposed convolutions and pixel shuffling, in decoders with long skips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import assert_exact, randomise
from torch import nn

import fxstream


@pytest.mark.parametrize("tile", [3, (5, None), (1, None, None, 4), 100], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2},
        {"kernel_size": 3, "stride": 1, "padding": 1, "bias": False},
        {"kernel_size": (2, 5), "stride": (3, 1), "padding": (0, 3), "dilation": (1, 2)},
        {"kernel_size": 2, "stride": 3, "dilation": 3, "padding": 2, "output_padding": 2},
        {"kernel_size": 1, "stride": 3},
        {"kernel_size": 1, "stride": 4, "padding": 2, "output_padding": 3},
        {"kernel_size": 5, "stride": 1, "padding": 5},
    ],
    ids=lambda options: "-".join(map(str, options.values())).replace(" ", ""),
)
def test_transposed_convolution(options: dict[str, Any], tile: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 6, **options), nn.Tanh(), nn.Conv2d(6, 2, 3, padding=1)
    )
    assert_exact(randomise(model), (2, 2, 19, 17), tile, whole=True)


@pytest.mark.parametrize("axes", [1, 3])
def test_transposed_convolution_over_other_axes(axes: int) -> None:
    conv, back = {1: (nn.Conv1d, nn.ConvTranspose1d), 3: (nn.Conv3d, nn.ConvTranspose3d)}[axes]
    model = nn.Sequential(conv(2, 4, 3, stride=2), nn.ReLU(), back(4, 2, 3, stride=2, output_padding=1))
    assert_exact(randomise(model), (2, 2, *(13, 12, 11)[:axes]), 4, whole=True)


@pytest.mark.parametrize("tile", [3, (None, 5), 64], ids=str)
def test_pixel_shuffling(tile: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(2, 3, 3, padding=1), nn.PixelUnshuffle(3),
        nn.ChannelShuffle(3), nn.PixelShuffle(3), nn.Conv2d(3, 2, 2),
    )  # fmt: skip
    assert_exact(randomise(model), (2, 3, 15, 21), tile, whole=True)


class UNet(nn.Module):
    """Three levels, skips that lead by many rows, transposed convolutions on the way up."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(self.block(old, new) for old, new in zip([3, *sizes], sizes, strict=False))
        self.pool = nn.MaxPool2d(2)
        self.bottom = self.block(sizes[-1], sizes[-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(size, size, 2, stride=2) for size in reversed(sizes))
        outs = [*reversed(sizes[:-1]), width]
        self.merge = nn.ModuleList(self.block(2 * size, out) for size, out in zip(reversed(sizes), outs, strict=True))
        self.last = nn.Conv2d(width, 2, 1)

    @staticmethod
    def block(before: int, after: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottom(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        return self.last(x)


@pytest.mark.parametrize("tile", [7, 16, (32, None), (1, 3, 24, 20)], ids=str)
def test_unet_streams_whole(tile: Any) -> None:
    converted = assert_exact(randomise(UNet()).eval(), (2, 3, 72, 56), tile, whole=True)
    assert [node.op for node in converted.graph.nodes] == ["placeholder", "call_module", "output"]


def test_the_receptive_field_of_a_unet_has_the_stride_of_the_image() -> None:
    field = fxstream.analyze(UNet().eval()).receptive_field("last")
    assert field is not None
    assert field["H"].stride == 1
