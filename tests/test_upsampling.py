"""Operations that make images larger: transposed convolutions, pixel shuffling, resampling; in decoders with skips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import Body, assert_exact, each_once, randomise
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


class ResampledUNet(nn.Module):
    """A U-Net for images of any size, which brings a level up by resampling."""

    def __init__(self, up: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], width: int = 4) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(UNet.block(old, new) for old, new in zip([3, *sizes], sizes, strict=False))
        self.merge = nn.ModuleList(
            UNet.block(old + new, new) for old, new in zip(sizes[:0:-1], sizes[1::-1], strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.last = nn.Conv2d(width, 2, 1)
        self.up = up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.down:
            x = block(self.pool(x) if skips else x)
            skips.append(x)
        x = skips.pop()
        for merge, skip in zip(self.merge, reversed(skips), strict=True):
            x = merge(torch.cat([skip, self.up(self, x, skip)], 1))
        return self.last(x)


def _padded(m: Any, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """Twice the size, centred on the skip: the odd row is padded."""
    x = m.upsample(x)
    rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
    return F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])


def _cropped(m: Any, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    return F.interpolate(x, scale_factor=2)[..., : skip.shape[-2], : skip.shape[-1]]


UPSAMPLINGS = {
    "corners": _padded,
    "nearest": _cropped,
    "to size": lambda m, x, skip: F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False),
    "corners to size": lambda m, x, skip: F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=True),
    "bicubic to size": lambda m, x, skip: F.interpolate(x, skip.size()[2:], mode="bicubic"),
}


@each_once(
    size_tile=[((67, 53), 7), ((67, 53), (32, None)), ((31, 37), (1, 3, 24, 5)), ((41, 23), (2, None, None, None))],
    up=UPSAMPLINGS,
)
def test_unet_of_resampling_streams_whole_on_odd_sizes(up: str, size_tile: tuple[tuple[int, int], Any]) -> None:
    size, tile = size_tile
    assert_exact(randomise(ResampledUNet(UPSAMPLINGS[up])).eval(), (3, 3, *size), tile, whole=True)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(True), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * self.body(x)


class SuperResolution(nn.Module):
    """EDSR: residual blocks without norms, a skip over all of them, then `tail`; above a bicubic image if `factor`."""

    def __init__(self, tail: nn.Module, factor: int | None = None, width: int = 8) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.front = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(3)), nn.Conv2d(width, width, 3, padding=1))
        self.tail = tail
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.front(x - self.mean)
        y = self.tail(y + self.blocks(y)) + self.mean
        return y if self.factor is None else y + F.interpolate(x, scale_factor=self.factor, mode="bicubic").clamp(0, 1)


def _shuffles(factors: tuple[int, ...]) -> nn.Module:
    steps = (layer for r in factors for layer in (nn.Conv2d(8, 8 * r * r, 3, padding=1), nn.PixelShuffle(r)))
    return nn.Sequential(*steps, nn.Conv2d(8, 3, 3, padding=1))


def _resampled(factor: int, mode: str) -> nn.Module:
    return nn.Sequential(
        nn.Upsample(scale_factor=factor, mode=mode),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.PReLU(8),
        nn.Conv2d(8, 3, 3, padding=1),
    )


SUPER_RESOLUTION: dict[str, Callable[[], nn.Module]] = {
    "edsr x4": lambda: SuperResolution(_shuffles((2, 2))),
    "edsr x3": lambda: SuperResolution(_shuffles((3,))),
    "shuffled above bicubic x3": lambda: SuperResolution(_shuffles((3,)), 3),
    "bicubic x3": lambda: SuperResolution(_resampled(3, "bicubic"), 3),
    "nearest x2": lambda: SuperResolution(_resampled(2, "nearest")),
}


@each_once(tile=[5, (None, 11), (1, 3, 8, None), (2, None, None, None)], name=SUPER_RESOLUTION)
def test_super_resolution(name: str, tile: Any) -> None:
    assert_exact(randomise(SUPER_RESOLUTION[name]()), (3, 3, 17, 19), tile, whole=True)


@pytest.mark.parametrize("tile", [11, (None, 3), (2, None, None, 16)], ids=str)
def test_dense_upsampling_convolution(tile: Any) -> None:
    """Hybrid dilated convolutions on an eighth of the resolution, whose channels become the full one."""
    dilated = [
        layer for d in (1, 2, 5) for layer in (nn.Conv2d(8, 8, 3, padding=d, dilation=d), nn.BatchNorm2d(8), nn.ReLU())
    ]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=4, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1),
        *dilated, nn.Conv2d(8, 2 * 64, 3, padding=1), nn.PixelShuffle(8),
    )  # fmt: skip
    assert_exact(randomise(model).eval(), (3, 3, 61, 53), tile, whole=True)


def test_a_crop_of_what_has_a_fixed_size_to_the_size_of_another_value() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        return F.interpolate(y, size=(19, 17), mode="bilinear")[..., : y.shape[2], : y.shape[3]] + y

    assert_exact(randomise(Body(body, conv=nn.Conv2d(2, 4, 3, padding=1))), (1, 2, 9, 8), 3, whole=True)
