"""torchvision's models stream up to their global pooling or flatten, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torchvision
from reference import assert_exact, randomise
from torch import nn

# Every family: model, batch and image (N, H, W), tile, where the streamed part ends. Sizes are awkward on purpose:
# primes, one pixel more than a tile, smaller than a tile, tiles far below the receptive field.
FAMILIES: list[tuple[str, tuple[int, int, int], Any, str | list[str]]] = [
    ("alexnet", (3, 131, 97), (64, 48), "features_12"),
    ("vgg11", (1, 65, 97), 64, "features_20"),
    ("vgg16", (1, 67, 33), 32, "features_30"),
    ("vgg13_bn", (1, 97, 33), (None, 32), "features_34"),
    ("squeezenet1_0", (3, 101, 67), 32, "classifier_2"),
    ("squeezenet1_1", (1, 129, 64), 128, "classifier_2"),
    ("resnet18", (3, 131, 97), 32, "layer4_1_relu_1"),
    ("resnet18", (1, 257, 163), 256, "layer4_1_relu_1"),
    ("resnet18", (1, 211, 300), 512, "layer4_1_relu_1"),
    ("resnet34", (1, 127, 33), (32, None), "layer4_2_relu_1"),
    ("resnet50", (1, 65, 131), 64, "layer4_2_relu_2"),
    ("resnext50_32x4d", (1, 97, 61), 48, "layer4_2_relu_2"),
    ("wide_resnet50_2", (1, 61, 37), 32, "layer4_2_relu_2"),
    ("densenet121", (1, 97, 71), 64, "relu"),
    ("densenet169", (1, 67, 65), (32, 64), "relu"),
    ("mobilenet_v2", (3, 103, 65), (3, 3, 64, 32), "features_18_2"),
    ("mnasnet0_5", (3, 97, 131), (1, None, 32, 64), "layers_16"),
    ("mnasnet1_0", (1, 67, 97), 33, "layers_16"),
    ("regnet_x_400mf", (2, 131, 71), (2, 3, 64, None), "trunk_output_block4_block4_11_activation"),
    ("regnet_x_800mf", (1, 65, 64), 64, "trunk_output_block4_block4_4_activation"),
]


def build(name: str, **options: Any) -> nn.Module:
    """A torchvision model in eval mode with a small classifier and batch norms that matter; activations of order 1."""
    model = torchvision.models.get_model(name, num_classes=5, **options).eval()
    if isinstance(getattr(model, "classifier", None), nn.Sequential) and name.startswith(("vgg", "alexnet")):
        model.classifier = nn.Linear(next(m for m in model.classifier if isinstance(m, nn.Linear)).in_features, 5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model


@pytest.mark.parametrize(("name", "shape", "tile", "last"), FAMILIES, ids=lambda value: str(value).replace(" ", ""))
def test_family(name: str, shape: tuple[int, int, int], tile: Any, last: str | Sequence[str]) -> None:
    batch, height, width = shape
    assert_exact(build(name), (batch, 3, height, width), tile, last=last)


@pytest.mark.parametrize("transform_input", [False, True])
@pytest.mark.parametrize("aux_logits", [False, True])
@pytest.mark.parametrize(
    ("name", "size", "last"), [("googlenet", (65, 97), "cat_8"), ("inception_v3", (101, 83), "cat_14")]
)
def test_inception(name: str, size: tuple[int, int], last: str, aux_logits: bool, transform_input: bool) -> None:
    model = build(name, init_weights=False, aux_logits=aux_logits, transform_input=transform_input)
    if transform_input:
        stem, number = last.split("_")
        last = f"{stem}_{int(number) + 1}"
    assert_exact(model, (2, 3, *size), 64, last=last)


def test_batch_norms_are_frozen_in_a_model_in_training_mode() -> None:
    model = build("resnet18").train()
    assert_exact(model, (2, 3, 67, 65), 32, last="layer4_1_relu_1", freeze_batchnorm=True)


def test_frozen_batch_norm_of_torchvision() -> None:
    model = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d, num_classes=5)
    for module in model.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            for name, buffer in module.named_buffers():
                torch.nn.init.uniform_(buffer, 0.5, 1.5 if name == "running_var" else 1.2)
    assert_exact(model, (1, 3, 97, 131), 64, last="layer4_1_relu_1")


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 1), (7, 200)])
def test_images_of_a_row_or_a_pixel(size: tuple[int, int]) -> None:
    assert_exact(build("resnet18"), (1, 3, *size), 32, last="layer4_1_relu_1")


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
