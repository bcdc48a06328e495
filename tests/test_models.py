"""Whole networks stream exactly: torchvision's up to where docs/torchvision.md says, and others that it does not have.

Torchvision's families that hang on tracked axes (convnext, shufflenet, efficientnet, regnet_y) are in test_axes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from reference import assert_exact, randomise
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.segmentation.deeplabv3 import _deeplabv3_mobilenetv3, _deeplabv3_resnet
from torchvision.models.segmentation.fcn import _fcn_resnet
from torchvision.models.segmentation.lraspp import _lraspp_mobilenetv3
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.video import resnet as video_resnet
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import fxstream

# Families at full size: model, batch and image (N, H, W), tile, where the streamed part ends. Sizes are awkward on
# purpose: primes, one pixel more than a tile, smaller than a tile, tiles far below the receptive field.
FAMILIES: list[tuple[str, tuple[int, int, int], Any, str | list[str]]] = [
    ("alexnet", (3, 131, 97), (64, 48), "features_12"),
    ("squeezenet1_0", (3, 101, 67), 32, "classifier_3"),
    ("squeezenet1_1", (1, 129, 64), 128, "classifier_3"),
    ("resnet18", (3, 131, 97), 32, "avgpool"),
    ("densenet121", (1, 97, 71), 64, "adaptive_avg_pool2d"),
    ("mobilenet_v2", (3, 103, 65), (3, 3, 64, 32), "adaptive_avg_pool2d"),
    ("regnet_x_400mf", (2, 131, 71), (2, 3, 64, None), "avgpool"),
]
# Made of the same operations as one of those above.
SIBLINGS: list[tuple[str, tuple[int, int, int], Any, str | list[str]]] = [
    ("vgg13_bn", (1, 97, 33), (None, 32), "features_34"),
    ("vgg16", (1, 67, 33), 32, "features_30"),
    ("resnet34", (1, 127, 33), (32, None), "avgpool"),
    ("resnext50_32x4d", (1, 97, 61), 48, "avgpool"),
    ("resnet18", (1, 211, 300), 512, "avgpool"),
    ("resnet50", (1, 65, 131), 64, "avgpool"),
    ("resnet18", (1, 257, 163), 256, "avgpool"),
    ("vgg11", (1, 65, 97), 64, "features_20"),
    ("mnasnet0_5", (3, 97, 131), (1, None, 32, 64), "mean"),
    ("wide_resnet50_2", (1, 61, 37), 32, "avgpool"),
    ("densenet169", (1, 67, 65), (32, 64), "adaptive_avg_pool2d"),
    ("mnasnet1_0", (1, 67, 97), 33, "mean"),
    ("regnet_x_800mf", (1, 65, 64), 64, "avgpool"),
]


def build(name: str, **options: Any) -> nn.Module:
    """A torchvision model in eval mode with a small classifier and batch norms that matter; activations of order 1."""
    model = torchvision.models.get_model(name, num_classes=5, **options)
    if isinstance(getattr(model, "classifier", None), nn.Sequential) and name.startswith(("vgg", "alexnet")):
        model.classifier = nn.Linear(next(m for m in model.classifier if isinstance(m, nn.Linear)).in_features, 5)
    return normed(model)


def normed(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and parameters that matter and keep activations of order 1; eval mode."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "shape", "tile", "last"),
    [*FAMILIES, *(pytest.param(*family, marks=pytest.mark.slow) for family in SIBLINGS)],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_family(name: str, shape: tuple[int, int, int], tile: Any, last: str | Sequence[str]) -> None:
    batch, height, width = shape
    assert_exact(build(name), (batch, 3, height, width), tile, last=last)


def _efficientnet_v2() -> nn.Module:
    fused = [FusedMBConvConfig(1, 3, 1, 8, 8, 1), FusedMBConvConfig(4, 3, 2, 8, 16, 2)]
    return EfficientNet([*fused, MBConvConfig(4, 3, 2, 16, 24, 1)], dropout=0.2, last_channel=32, num_classes=5)


def _swin() -> nn.Module:
    return SwinTransformer([4, 4], 16, depths=[2, 2], num_heads=[2, 2], window_size=[3, 3], num_classes=5)


def _swin_v2() -> nn.Module:
    return SwinTransformer(
        [4, 4], 16, [2, 2], [2, 2], [3, 3], num_classes=5, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2
    )


def _maxvit() -> nn.Module:
    return torchvision.models.MaxVit(
        (35, 35), 8, partition_size=3, block_channels=[16], block_layers=[1], head_dim=4,
        stochastic_depth_prob=0.1, num_classes=5,
    )  # fmt: skip


def _vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(48, 16, 1, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=5)
    return randomise(model)  # its head is zero at first, and so were all gradients


def _video(conv: Any, others: Any = None, stem: Any = video_resnet.BasicStem) -> nn.Module:
    """One block a stage, and nothing for the fourth stage, which has most of the parameters."""
    makers = [conv, *[others or conv] * 3]
    model = video_resnet.VideoResNet(video_resnet.BasicBlock, makers, [1, 1, 1, 1], stem, num_classes=5)
    model.layer4, model.fc = nn.Identity(), nn.Linear(256, 5)
    return model


def _s3d() -> nn.Module:
    model = torchvision.models.video.s3d(num_classes=5)
    model.avgpool = nn.AvgPool3d((2, 1, 2), stride=1)  # instead of 7 x 7, which takes a large clip
    return model


# Families of which a full model would take long, reduced in width and depth: how to build one, batch and image
# (N, [D,] H, W), tile, where the streamed part ends, and whether convolutions stay behind it.
REDUCED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any, str | list[str], bool]] = {
    "mobilenet_v3_large": (
        lambda: torchvision.models.mobilenet_v3_large(num_classes=5),
        (1, 67, 65), 32, "features_4_block_1_2", True,
    ),
    "efficientnet_v2": (_efficientnet_v2, (3, 67, 65), 32, "features_3_0_block_1_2", False),
    "maxvit": (
        _maxvit, (1, 35, 35), 16,
        ["blocks_0_layers_0_layers_mbconv_proj_1", "blocks_0_layers_0_layers_mbconv_layers_conv_b_2"], True,
    ),
    "swin": (_swin, (2, 37, 41), (None, 15), ["features_0_2", "features_1_0_norm1"], True),
    "swin_v2": (_swin_v2, (1, 43, 37), 7, "features_0_2", True),
    "vit": (_vit, (2, 48, 48), 20, "conv_proj", False),
    "r3d": (lambda: _video(video_resnet.Conv3DSimple), (1, 5, 37, 41), (3, 24, 24), "avgpool", False),
    "mc3": (
        lambda: _video(video_resnet.Conv3DSimple, video_resnet.Conv3DNoTemporal),
        (2, 7, 33, 29), (3, 17, None), "avgpool", False,
    ),
    "r2plus1d": (
        lambda: _video(video_resnet.Conv2Plus1D, stem=video_resnet.R2Plus1dStem),
        (1, 5, 37, 41), (None, 24, 24), "avgpool", False,
    ),
    "s3d": (_s3d, (1, 13, 33, 65), (8, 40, 40), "mean", False),
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCED)
def test_reduced_family(name: str) -> None:
    build, (batch, *size), tile, last, warns = REDUCED[name]
    model = normed(build())
    with pytest.warns(fxstream.StreamingWarning) if warns else nullcontext():
        assert_exact(model, (batch, 3, *size), tile, last=last)


INCEPTIONS = [("googlenet", True, True), ("inception_v3", False, False)]
"""Each value once: the name, aux_logits, transform_input."""
OTHER_INCEPTIONS = sorted({*product(("googlenet", "inception_v3"), (False, True), (False, True))} - {*INCEPTIONS})


@pytest.mark.parametrize(
    ("name", "aux_logits", "transform_input"),
    [*INCEPTIONS, *(pytest.param(*options, marks=pytest.mark.slow) for options in OTHER_INCEPTIONS)],
)
def test_inception(name: str, aux_logits: bool, transform_input: bool) -> None:
    model = build(name, init_weights=False, aux_logits=aux_logits, transform_input=transform_input)
    size = (65, 97) if name == "googlenet" else (101, 83)
    assert_exact(model, (2, 3, *size), 64, last="avgpool")


def test_batch_norms_are_frozen_in_a_model_in_training_mode() -> None:
    model = build("resnet18").train()
    assert_exact(model, (2, 3, 67, 65), 32, last="avgpool", freeze_batchnorm=True)


def test_frozen_batch_norm_of_torchvision() -> None:
    model = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d, num_classes=5)
    for module in model.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            for name, buffer in module.named_buffers():
                torch.nn.init.uniform_(buffer, 0.5, 1.5 if name == "running_var" else 1.2)
    assert_exact(model, (1, 3, 97, 131), 64, last="avgpool")


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 1), pytest.param((7, 200), marks=pytest.mark.slow)])
def test_images_of_a_row_or_a_pixel(size: tuple[int, int]) -> None:
    assert_exact(build("resnet18"), (1, 3, *size), 32, last="avgpool")


@pytest.mark.parametrize("tile", [1, (3, 5), (1, 1000), (1, None, None, None), (2, None, 16, None)])
def test_extreme_tiles(tile: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 7, stride=2, padding=3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, padding_mode="reflect"),
        nn.GELU(),
        nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False),
    ).eval()
    assert_exact(randomise(model), (3, 3, 37, 29), tile, whole=True)


@pytest.mark.parametrize("axes", [1, 3])
def test_one_and_three_spatial_axes(axes: int) -> None:
    conv, norm, pool = {1: (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d), 3: (nn.Conv3d, nn.BatchNorm3d, nn.AvgPool3d)}[
        axes
    ]
    model = nn.Sequential(
        conv(2, 4, 5, stride=2, padding=2), norm(4), nn.SiLU(), pool(3, 2, padding=1), conv(4, 3, 3, padding="same")
    ).eval()
    assert_exact(randomise(model), (2, 2, *(23, 19, 17)[:axes]), 6, whole=True)


class Waveform(nn.Module):
    """The front of M5, then the gated, dilated residual convolutions of WaveNet with the sum of their skips."""

    def __init__(self, width: int = 6, blocks: int = 4) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv1d(1, width, 80, stride=4), nn.BatchNorm1d(width), nn.ReLU(), nn.MaxPool1d(4))
        self.gates = nn.ModuleList(
            nn.Conv1d(width, 2 * width, 3, padding=2**block, dilation=2**block) for block in range(blocks)
        )
        self.residuals = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(blocks))
        self.skips = nn.ModuleList(nn.Conv1d(width, 3, 1) for _ in range(blocks))
        self.last = nn.Conv1d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(x)
        total: Any = 0
        for gate, residual, skip in zip(self.gates, self.residuals, self.skips, strict=True):
            signal, opening = gate(x).chunk(2, dim=1)
            y = torch.tanh(signal) * torch.sigmoid(opening)
            x = x + residual(y)
            total = total + skip(y)
        return self.last(F.relu(total))


# Tiles larger and smaller than the first kernel, and one that is no multiple of the stride.
@pytest.mark.parametrize("tile", [257, 64, 7, (2, None, 500)], ids=str)
def test_waveform(tile: Any) -> None:
    assert_exact(normed(Waveform()), (3, 1, 811), tile, whole=True)


class VNet(nn.Module):
    """Residual stages, strided convolutions down and transposed ones up, for volumes of any size."""

    def __init__(self, widths: Sequence[int] = (4, 6, 8)) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, widths[0], 3, padding=1)
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(nn.Conv3d(before, after, 2, stride=2) for before, after in pairs)
        self.stages = nn.ModuleList(self.stage(width) for width in widths)
        self.up = nn.ModuleList(nn.ConvTranspose3d(after, before, 2, stride=2) for before, after in reversed(pairs))
        self.merge = nn.ModuleList(nn.Conv3d(2 * before, before, 3, padding=1) for before, _ in reversed(pairs))
        self.last = nn.Conv3d(widths[0], 2, 1)

    @staticmethod
    def stage(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv3d(width, width, 3, padding=1), nn.BatchNorm3d(width), nn.PReLU(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        depth, height, width = x.shape[2:]
        padding = (0, -width % 4, 0, -height % 4, 0, -depth % 4)
        x = self.first(F.pad(x, padding))
        skips = []
        for stage, down in zip(self.stages, self.down, strict=False):
            x = x + stage(x)
            skips.append(x)
            x = down(x)
        x = x + self.stages[-1](x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = F.elu(merge(torch.cat([up(x), skip], dim=1)))
        return F.pad(self.last(x), [-amount for amount in padding])


@pytest.mark.parametrize("tile", [(6, 8, 8), (None, 5, 16), (1, None, None, 7, None)], ids=str)
def test_volumes(tile: Any) -> None:
    assert_exact(normed(VNet()), (2, 1, 7, 17, 13), tile, whole=True)


class Pyramid(nn.Module):
    """A detector: levels of different strides, coarse ones brought up to fine ones, the same heads on all of them."""

    def __init__(self, widths: Sequence[int] = (6, 8, 10)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 7, stride=2, padding=3), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU())
            for before, after in pairwise([widths[0], *widths])
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, 4, 1) for width in widths)
        self.up = nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1)
        self.coarser = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.classes = nn.Conv2d(4, 3, 3, padding=1)
        self.boxes = nn.Conv2d(4, 4, 3, padding=1)
        self.scales = nn.ParameterList(torch.rand(1) for _ in range(len(widths) + 1))

    @staticmethod
    def fit(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """An odd number of rows becomes one more on the way down and up: crop it."""
        (height, width), (rows, columns) = x.shape[-2:], other.shape[-2:]
        return F.pad(x, (0, columns - width, 0, rows - height))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        x = self.stem(x)
        levels = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            levels.append(lateral(x))
        for fine in range(len(levels) - 2, -1, -1):
            levels[fine] = levels[fine] + self.fit(self.up(levels[fine + 1]), levels[fine])
        levels.append(self.coarser(levels[-1]))
        boxes = [F.relu(self.boxes(level) * scale) for level, scale in zip(levels, self.scales, strict=True)]
        return {"classes": [self.classes(level) for level in levels], "boxes": boxes, "finest": levels[0]}


@pytest.mark.parametrize("size", [(129, 97), (61, 23), (1, 40)], ids=str)
@pytest.mark.parametrize("tile", [32, (None, 20)], ids=str)
def test_pyramid_of_several_outputs(size: tuple[int, int], tile: Any) -> None:
    assert_exact(normed(Pyramid()), (2, 3, *size), tile, whole=True)


class PlainDict(nn.Module):
    """A model whose outputs are an OrderedDict, of which a trace makes a dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.m = model

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(self.m(x))


def _dilated_resnet() -> ResNet:
    """One block a stage of the backbone of fcn_resnet50 and deeplabv3_resnet50."""
    return ResNet(Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True])


def _mobilenet() -> nn.Module:
    return torchvision.models.mobilenet_v3_large(dilated=True)


def _feature_pyramid(extra: nn.Module) -> nn.Module:
    layers = {f"layer{level}": str(level) for level in (1, 2, 3)}
    return BackboneWithFPN(ResNet(BasicBlock, [1, 1, 1, 1]), layers, [64, 128, 256], 8, extra)


# Dense prediction: how to build it, what the head gets when space is streamed, and when the batch is, and whether
# much work stays behind where space is.
_DEEPLAB = [f"m_classifier_0_convs_{branch}_2" for branch in range(4)]
_FPN = [f"m_fpn_layer_blocks_{level}_0" for level in (2, 1, 0)]
DENSE: dict[str, tuple[Callable[[], nn.Module], list[str], list[str], bool]] = {
    "fcn": (
        lambda: _fcn_resnet(_dilated_resnet(), 3, True),
        ["interpolate", "interpolate_1"], ["interpolate", "interpolate_1"], False,
    ),
    "deeplab": (
        # Its image pooling spans the image; the other branches and the auxiliary head do not.
        lambda: _deeplabv3_resnet(_dilated_resnet(), 3, True),
        [*_DEEPLAB, "getitem_1", "m_classifier_0_convs_4_0", "interpolate_2"],
        ["interpolate_1", "interpolate_2"], False,
    ),
    "deeplab of mobilenet": (
        lambda: _deeplabv3_mobilenetv3(_mobilenet(), 3, True),
        ["m_backbone_4_block_1_2"], ["interpolate_1", "interpolate_2"], True,
    ),
    "lraspp": (lambda: _lraspp_mobilenetv3(_mobilenet(), 3), ["m_backbone_4_block_1_2"], ["interpolate_1"], True),
    "fpn": (lambda: _feature_pyramid(LastLevelMaxPool()), [*_FPN, "max_pool2d"], [*_FPN, "max_pool2d"], False),
    "fpn p6 p7": (
        lambda: _feature_pyramid(LastLevelP6P7(8, 8)),
        [*_FPN, "m_fpn_extra_blocks_p6", "m_fpn_extra_blocks_p7"],
        [*_FPN, "m_fpn_extra_blocks_p6", "m_fpn_extra_blocks_p7"], False,
    ),
}  # fmt: skip


# deeplab and fcn of a resnet have nothing that the others have not.
LIGHT = [pytest.param(name, marks=pytest.mark.slow) if name in ("deeplab", "fcn") else name for name in DENSE]


@pytest.mark.parametrize(
    ("tile", "size"), [(24, (41, 37)), pytest.param((None, 7), (17, 31), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("name", LIGHT)
def test_dense_prediction(name: str, tile: Any, size: tuple[int, int]) -> None:
    build, last, _, warns = DENSE[name]
    with pytest.warns(fxstream.StreamingWarning) if warns else nullcontext():
        assert_exact(PlainDict(normed(build())), (1, 3, *size), tile, last=last)


@pytest.mark.parametrize("name", LIGHT)
def test_dense_prediction_along_the_batch(name: str) -> None:
    build, _, last, _ = DENSE[name]
    assert_exact(PlainDict(normed(build())), (3, 3, 17, 23), (2, None, None, None), last=last)


def test_an_ordered_dict_stays_one() -> None:
    """torch.fx alone would make a plain dict of it."""
    assert_exact(normed(_feature_pyramid(LastLevelMaxPool())), (1, 3, 33, 29), 24, last="ordered_dict")
