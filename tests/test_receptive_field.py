"""Receptive fields equal the published ones and, independently, the support of the gradient of one output position.

Published: the tables of google-research/receptive_field (README.md and RECEPTIVE_FIELD_TABLE.md), which belong to
Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019. They are those of
TF-Slim's networks. torchvision's differ in two places, derived below: the padding of alexnet's first convolution, and
which residual unit of a resnet carries a stride.

TensorFlow's "SAME" pads by `kernel - stride` rows if the stride divides the size, and by `kernel - 1` rows if the size
is one more than that; in front by the smaller half. So paddings depend on the resolution: at 224 pixels every layer of
stride 2 reads an even number of rows, at 321 an odd one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from reference import each_once
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import Permute

import fxstream
from fxstream import ReceptiveField

Number = int | Fraction
Row = tuple[Number, Number, Number]
"""Size, stride, padding."""


def fields(model: nn.Module) -> Iterator[tuple[str, dict[str, ReceptiveField] | None]]:
    """For every node, the paths of the modules it is called in and what it sees; a module's last node is its result."""
    analysis = fxstream.analyze(model.eval())
    for finding in analysis.findings:
        for path in finding.node.meta.get("nn_module_stack", ()):
            yield path, analysis.receptive_field(finding.node)


def rows(model: nn.Module, paths: Any) -> dict[str, Row]:
    """What the results of these submodules see; the same along both axes."""
    found = dict(fields(model))
    result: dict[str, Row] = {}
    for path in paths:
        seen = found[path]
        assert seen is not None, path
        assert seen["H"] == seen["W"], path
        result[path] = (seen["H"].size, seen["H"].stride, seen["H"].padding)
    return result


# Part 1: the published tables.

# torchvision's networks that are TF-Slim's. Endpoints by torchvision's names, in the order of the table.
TORCHVISION: dict[str, dict[str, Row]] = {
    "alexnet": {  # alexnet_v2/conv1, pool1, conv2, conv3, conv4, conv5, pool5
        "features.0": (11, 4, 0), "features.2": (19, 8, 0), "features.3": (51, 8, 16), "features.6": (99, 16, 32),
        "features.8": (131, 16, 48), "features.10": (163, 16, 64), "features.12": (195, 32, 64),
    },
    "vgg11": {  # vgg_a: conv1_1, pool1, conv2_1, pool2, conv3_1, conv3_2, pool3, ... pool5
        "features.0": (3, 1, 1), "features.2": (4, 2, 1), "features.3": (8, 2, 3), "features.5": (10, 4, 3),
        "features.6": (18, 4, 7), "features.8": (26, 4, 11), "features.10": (30, 8, 11), "features.11": (46, 8, 19),
        "features.13": (62, 8, 27), "features.15": (70, 16, 27), "features.16": (102, 16, 43),
        "features.18": (134, 16, 59), "features.20": (150, 32, 59),
    },
    "vgg16": {  # vgg_16: conv1_1, pool1, conv2_1, pool2, conv3_1, conv3_2, pool3, ... pool5
        "features.0": (3, 1, 1), "features.4": (6, 2, 2), "features.5": (10, 2, 4), "features.9": (16, 4, 6),
        "features.10": (24, 4, 10), "features.12": (32, 4, 14), "features.16": (44, 8, 18),
        "features.17": (60, 8, 26), "features.19": (76, 8, 34), "features.23": (100, 16, 42),
        "features.24": (132, 16, 58), "features.26": (164, 16, 74), "features.30": (212, 32, 90),
    },
    "inception_v3": {  # the same names, but for MaxPool_3a_3x3 and MaxPool_5a_3x3
        "Conv2d_1a_3x3": (3, 2, 0), "Conv2d_2a_3x3": (7, 2, 0), "Conv2d_2b_3x3": (11, 2, 2), "maxpool1": (15, 4, 2),
        "Conv2d_3b_1x1": (15, 4, 2), "Conv2d_4a_3x3": (23, 4, 2), "maxpool2": (31, 8, 2), "Mixed_5b": (63, 8, 18),
        "Mixed_5c": (95, 8, 34), "Mixed_5d": (127, 8, 50), "Mixed_6a": (159, 16, 58), "Mixed_6b": (351, 16, 154),
        "Mixed_6c": (543, 16, 250), "Mixed_6d": (735, 16, 346), "Mixed_6e": (927, 16, 442),
        "Mixed_7a": (1055, 32, 490), "Mixed_7b": (1183, 32, 554), "Mixed_7c": (1311, 32, 618),
    },
}  # fmt: skip


def build(name: str, **options: Any) -> nn.Module:
    """A model of torchvision without the memory and the time of its parameters."""
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": False}
    # regnet computes its widths with tensors.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        return torchvision.models.get_model(name, weights=None, **options)


@pytest.mark.parametrize("name", TORCHVISION)
def test_published_fields_of_networks_of_torchvision(name: str) -> None:
    # In alexnet's first convolution torchvision pads the image itself by 2 pixels, and TF-Slim does not: whatever comes
    # behind it begins 2 pixels earlier.
    extra = 2 if name == "alexnet" else 0
    expected = {path: (size, stride, padding + extra) for path, (size, stride, padding) in TORCHVISION[name].items()}
    assert rows(build(name), expected) == expected


# Units of each block, and size, stride, padding at 224 and padding at 321 behind it.
RESNETS: list[tuple[tuple[int, ...], list[tuple[int, int, int, int]]]] = [
    ((3, 4, 6, 3), [(35, 8, 15, 17), (99, 16, 47, 49), (291, 32, 143, 145), (483, 32, 239, 241)]),
    ((3, 4, 23, 3), [(35, 8, 15, 17), (99, 16, 47, 49), (835, 32, 415, 417), (1027, 32, 511, 513)]),
    ((3, 8, 36, 3), [(35, 8, 15, 17), (163, 16, 79, 81), (1315, 32, 655, 657), (1507, 32, 751, 753)]),
    ((3, 24, 36, 3), [(35, 8, 15, 17), (419, 16, 207, 209), (1571, 32, 783, 785), (1763, 32, 879, 881)]),
]
LAYERS = ["layer1", "layer2", "layer3", "layer4"]


def resnet(units: tuple[int, ...]) -> ResNet:
    with torch.device("meta"):
        return ResNet(Bottleneck, list(units))


def resnet_of_slim(units: tuple[int, ...], resolution: int) -> ResNet:
    """TF-Slim's resnet_v1: the last unit of a block has the stride, not the first unit of the next block."""
    model = resnet(units)
    if resolution == 224:
        # "SAME" pads 112 rows by one, and that behind them: what ceil_mode does.
        model.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
    for before, after in itertools.pairwise(getattr(model, layer) for layer in LAYERS):
        after[0].conv2.stride = after[0].downsample[0].stride = (1, 1)
        before[-1].conv2.stride = (2, 2)
        before[-1].downsample = nn.MaxPool2d(1, 2)
    return model


@each_once(resolution=[224, 321], units_and_published=RESNETS)
def test_published_fields_of_resnets(units_and_published: tuple[tuple[int, ...], list[Any]], resolution: int) -> None:
    units, published = units_and_published
    expected = {
        layer: (size, stride, even if resolution == 224 else odd)
        for layer, (size, stride, even, odd) in zip(LAYERS, published, strict=True)
    }
    assert rows(resnet_of_slim(units, resolution), LAYERS) == expected


@pytest.mark.parametrize(("units", "published"), RESNETS, ids=["50", "101", "152", "200"])
def test_resnets_of_torchvision_differ_by_where_the_stride_is(units: tuple[int, ...], published: list[Any]) -> None:
    # Either way the convolution with the stride, of 3 x 3, reads rows that are s = 4, 8, 16 pixels apart. TF-Slim has
    # it in the last unit of a block, and the first unit of the next one reads rows that are 2s apart already.
    # torchvision has it in that first unit, whose convolution then reads rows s apart; the last unit before it does in
    # both. So behind each of the blocks 2, 3 and 4 the field is smaller by (3 - 1) * (2s - s) pixels, half of it in
    # front. In all by 2 * (4 + 8 + 16) = 56: 427 pixels for resnet50, where the table has 483.
    missing = [0, 4, 4 + 8, 4 + 8 + 16]
    # So the stride behind the first three blocks is half of the table's.
    strides = [4, 8, 16, 32]
    expected = {
        layer: (size - 2 * less, stride, odd - less)
        for layer, (size, _, _, odd), less, stride in zip(LAYERS, published, missing, strides, strict=True)
    }
    assert rows(resnet(units), LAYERS) == expected


# Networks that torchvision does not have. What a layer computes does not matter: all of them are convolutions with one
# channel here, and branches are added. A unit is its branches, a branch its layers: "7x1/2v" has a kernel of 7 by 1,
# stride 2, and "v" for no padding, where others are padded as "SAME". An empty branch is a shortcut.
ENTRY = ["1 | 1 3 | 1 3 3 | 3 1"]
HALVING = ["1 3/2 | 1 3 3/2 | 3/2"]
STEM = [("Conv2d_1a_3x3", ["3/2v"], 3, 2, 0), ("Conv2d_2a_3x3", ["3v"], 7, 2, 0), ("Conv2d_2b_3x3", ["3"], 11, 2, 2)]
MIXED_6 = ["1 | 1 1x7 7x1 | 1 7x1 1x7 7x1 1x7 | 3 1"]
MIXED_7 = ["1 | 1 1x3 | 1 3x1 | 1 3x1 1x3 1x3 | 1 3x1 1x3 3x1 | 3 1"]

# The end-point, its units, size, stride, padding: one, or at 224 and at 321.
SLIM: dict[str, list[tuple[str, list[str], int, int, Any]]] = {
    "mobilenet_v1": [
        ("Conv2d_0", ["3/2"], 3, 2, (0, 1)),
        ("Conv2d_1_pointwise", ["3 1"], 7, 2, (2, 3)),
        ("Conv2d_2_pointwise", ["3/2 1"], 11, 4, (2, 5)),
        ("Conv2d_3_pointwise", ["3 1"], 19, 4, (6, 9)),
        ("Conv2d_4_pointwise", ["3/2 1"], 27, 8, (6, 13)),
        ("Conv2d_5_pointwise", ["3 1"], 43, 8, (14, 21)),
        ("Conv2d_6_pointwise", ["3/2 1"], 59, 16, (14, 29)),
        ("Conv2d_11_pointwise", ["3 1"] * 5, 219, 16, (94, 109)),
        ("Conv2d_12_pointwise", ["3/2 1"], 251, 32, (94, 125)),
        ("Conv2d_13_pointwise", ["3 1"], 315, 32, (126, 157)),
    ],
    "inception_v2": [
        ("Conv2d_1a_7x7", ["7/2"], 7, 2, (2, 3)),
        ("MaxPool_2a_3x3", ["3/2"], 11, 4, (2, 5)),
        ("Conv2d_2c_3x3", ["1 3"], 19, 4, (6, 9)),
        ("MaxPool_3a_3x3", ["3/2"], 27, 8, (6, 13)),
        ("Mixed_3c", ENTRY * 2, 91, 8, (38, 45)),
        ("Mixed_4a", HALVING, 123, 16, (46, 61)),
        ("Mixed_4e", ENTRY * 4, 379, 16, (174, 189)),
        ("Mixed_5a", HALVING, 443, 32, (190, 221)),
        ("Mixed_5c", ENTRY * 2, 699, 32, (318, 349)),
    ],
    "inception_v4": [
        *STEM,
        ("Mixed_3a", ["3/2v | 3/2v"], 15, 4, 2),
        ("Mixed_4a", ["1 3v | 1 1x7 7x1 3v"], 47, 4, 14),
        ("Mixed_5a", ["3/2v | 3/2v"], 55, 8, 14),
        ("Mixed_5e", ENTRY * 4, 183, 8, 78),
        ("Mixed_6a", ["3/2v | 1 3 3/2v | 3/2v"], 215, 16, 86),
        ("Mixed_6h", MIXED_6 * 7, 1559, 16, 758),
        ("Mixed_7a", ["1 3/2v | 1 1x7 7x1 3/2v | 3/2v"], 1687, 32, 806),
        ("Mixed_7d", MIXED_7 * 3, 2071, 32, 998),
    ],
    "inception_resnet_v2": [
        *STEM,
        ("MaxPool_3a_3x3", ["3/2v"], 15, 4, 2),
        ("Conv2d_4a_3x3", ["1 3v"], 23, 4, 2),
        ("MaxPool_5a_3x3", ["3/2v"], 31, 8, 2),
        ("Mixed_5b", ["1 | 1 5 | 1 3 3 | 3 1"], 63, 8, 18),
        ("Mixed_6a", [*["| 1 | 1 3 | 1 3 3"] * 10, "3/2v | 1 3 3/2v | 3/2v"], 415, 16, 186),
        ("PreAuxLogits", ["| 1 | 1 1x7 7x1"] * 20, 2335, 16, 1146),
        ("Mixed_7a", ["1 3/2v | 1 3/2v | 1 3 3/2v | 3/2v"], 2399, 32, 1162),
        ("Conv2d_7b_1x1", [*["| 1 | 1 1x3 3x1"] * 10, "1"], 3039, 32, 1482),
    ],
}


class Unit(nn.Module):
    """Branches, added."""

    def __init__(self, text: str, resolution: int) -> None:
        super().__init__()
        branches = ([convolution(one, resolution) for one in branch.split()] for branch in text.split("|"))
        self.branches = nn.ModuleList(nn.Sequential(*branch) for branch in branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1).sum(1, keepdim=True)


def convolution(text: str, resolution: int) -> nn.Module:
    size, _, step = text.removesuffix("v").partition("/")
    height, width = (int(one) for one in (size.split("x") * 2)[:2])
    stride = int(step or 1)
    conv = nn.Conv2d(1, 1, (height, width), stride)
    if text.endswith("v"):
        return conv
    down, across = (kernel - (stride if resolution % 2 == 0 else 1) for kernel in (height, width))
    return nn.Sequential(nn.ZeroPad2d((across // 2, -(-across // 2), down // 2, -(-down // 2))), conv)


@each_once(resolution=[224, 321], name=SLIM)
def test_published_fields_of_networks_of_slim(name: str, resolution: int) -> None:
    model = nn.Sequential()
    expected: dict[str, Row] = {}
    for endpoint, units, size, stride, padding in SLIM[name]:
        model.add_module(endpoint, nn.Sequential(*(Unit(text, resolution) for text in units)))
        at = padding[resolution == 321] if isinstance(padding, tuple) else padding
        expected[endpoint] = (size, stride, at)
    assert rows(model.to("meta"), expected) == expected


# Part 2: the support of a gradient, of the plain model.


def front(name: str, last: str, **options: Any) -> nn.Module:
    """A model of torchvision up to this one of its children."""
    children = dict(build(name, **options).named_children())
    names = list(children)
    return nn.Sequential(*(children[one] for one in names[: names.index(last) + 1]))


MAX_POOLS = {nn.MaxPool1d: nn.AvgPool1d, nn.MaxPool2d: nn.AvgPool2d, nn.MaxPool3d: nn.AvgPool3d}
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU)


def positive(model: nn.Module) -> nn.Module:
    """The model changed in place to one of the same geometry whose gradients cannot cancel or vanish, in float64.

    Every path from a pixel to an output counts then: no pooling picks one pixel among several, no activation is flat,
    no two weights have different signs. Functions stay: what F.relu sees is positive, and the branches of inception_v3
    that call F.max_pool2d lie within the convolutions beside them.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (*ACTIVATIONS, _BatchNorm)):
                setattr(module, name, nn.Identity())
            elif (pool := MAX_POOLS.get(type(child))) is not None:
                setattr(module, name, pool(child.kernel_size, child.stride, child.padding, child.ceil_mode))
    model = model.to_empty(device="cpu").double()
    with torch.no_grad():
        for parameter in model.parameters():
            # Of mean 1 over what is summed, so that neither values nor gradients leave the range of float64.
            parameter.uniform_(0.5, 1.5).div_(max(1, parameter[0].numel()))
    return model


Rows = tuple[Number, Number]
"""The first one and the end."""


def support(output: torch.Tensor, image: torch.Tensor, dim: int, position: int) -> Rows | None:
    """The rows of the image that the output depends on at this position along one dimension."""
    value = output.select(dim, position).sum()
    (gradient,) = torch.autograd.grad(value, image, retain_graph=True)
    found = (gradient != 0).sum([other for other in range(image.dim()) if other != dim]).nonzero()
    return (int(found[0]), int(found[-1]) + 1) if len(found) else None


def positions(field: ReceptiveField, count: int) -> tuple[range, int]:
    """Output positions whose fields lie in an image, and the length of that image.

    The stride, and at least a pixel, is left of it on both sides: room for a support that is larger than the field.
    """
    margin = max(1, math.ceil(field.stride))
    first = max(0, math.ceil((field.padding + margin) / Fraction(field.stride)))
    end = math.ceil((first + count - 1) * field.stride - field.padding + field.size)
    # Down- and up-sampling by 2, 4, 8 and by 3 meet the skips beside them only if the image is a multiple of that.
    return range(first, first + count), 24 * math.ceil((end + margin) / 24)


def compare(model: nn.Module, axis: str, across: int, count: int = 2) -> list[tuple[Rows, Rows | None]]:
    """The field and the support of some output positions; the image is as long as that takes, and `across` wide."""
    analysis = fxstream.analyze(model.eval())
    assert not analysis.stops
    (last,) = analysis.outputs
    seen = analysis.receptive_field(last)
    assert seen is not None
    field = seen[axis]
    chosen, length = positions(field, count)
    image = torch.rand(1, 3, *(length if name == axis else across for name in analysis.axes), dtype=torch.float64)
    output = positive(model)(image.requires_grad_())
    result: list[tuple[Rows, Rows | None]] = []
    for position in chosen:
        first = position * field.stride - field.padding
        result.append(((first, first + field.size), support(output, image, analysis.names.index(axis), position)))
    return result


# Model, options, the child that it is cut behind, axis, and the size of the image along the others, as small as the
# network allows. Only inception_v3 and r3d_18 differ from axis to axis. What the slow ones are made of is also in the
# small networks below.
FRONTS: list[tuple[str, dict[str, Any], str, str, int]] = [
    ("alexnet", {}, "features", "H", 67),
    ("resnet18", {}, "layer4", "H", 33),
    ("shufflenet_v2_x0_5", {}, "conv5", "H", 33),
]
SLOW_FRONTS: list[tuple[str, dict[str, Any], str, str, int]] = [
    ("vgg11", {}, "features", "H", 33),
    ("squeezenet1_0", {}, "features", "H", 67),
    ("resnet50", {"replace_stride_with_dilation": [False, True, True]}, "layer4", "H", 33),
    ("densenet121", {}, "features", "H", 33),
    ("mobilenet_v2", {}, "features", "H", 33),
    ("mnasnet0_5", {}, "layers", "H", 33),
    ("regnet_x_400mf", {}, "trunk_output", "H", 33),
    ("convnext_tiny", {}, "features", "H", 33),
    ("googlenet", {}, "inception5b", "H", 33),
    ("inception_v3", {}, "Mixed_7c", "H", 75),
    ("inception_v3", {}, "Mixed_7c", "W", 75),
    ("r3d_18", {}, "layer4", "D", 3),
    ("r3d_18", {}, "layer4", "H", 3),
]


@pytest.mark.parametrize(
    ("name", "options", "last", "axis", "across"),
    [
        *(pytest.param(*front, id=f"{front[0]}-{front[3]}") for front in FRONTS),
        *(pytest.param(*front, id=f"{front[0]}-{front[3]}", marks=pytest.mark.slow) for front in SLOW_FRONTS),
    ],
)
def test_gradients_of_torchvision(name: str, options: dict[str, Any], last: str, axis: str, across: int) -> None:
    for field, found in compare(front(name, last, **options), axis, across):
        assert found == field


class Branches(nn.Module):
    """Two, added."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (branch(x) for branch in self.branches)
        return first + second


class Crop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., 3:-1, 1:]


def dilated_1d() -> nn.Module:
    """Causal on its second half: padded in front alone."""
    same = [nn.Conv1d(3, 3, 3, padding=rate, dilation=rate) for rate in (1, 2, 4, 8)]
    causal = [nn.Sequential(nn.ConstantPad1d((2 * rate, 0), 0.0), nn.Conv1d(3, 3, 3, dilation=rate)) for rate in (1, 5)]
    return nn.Sequential(*same, nn.MaxPool1d(3, 2, ceil_mode=True), nn.GELU(), *causal)


def uneven_2d() -> nn.Module:
    """Another kernel, stride, padding, dilation along each axis; padding and cropping on one side."""
    return nn.Sequential(
        nn.Conv2d(3, 4, (5, 2), (2, 1), (0, 1), padding_mode="reflect"),
        nn.ReLU(),
        nn.MaxPool2d((2, 3), (1, 2), (1, 0)),
        nn.ZeroPad2d((4, 0, -1, 3)),
        nn.Conv2d(4, 4, 3, (1, 3), (2, 0), (4, 1), groups=4),
        Crop(),
        nn.AvgPool2d((3, 1), (2, 1)),
        nn.Conv2d(4, 2, (1, 4), padding="same"),
    )


def misaligned_2d() -> nn.Module:
    """Along H one branch reaches farther in front and the other one farther behind; along W one holds the other."""
    in_front = nn.Sequential(nn.ZeroPad2d((2, 2, 6, 0)), nn.Conv2d(2, 2, (7, 5)))
    behind = nn.Sequential(nn.ZeroPad2d((0, 0, 0, 3)), nn.MaxPool2d((4, 3), 1, (0, 1)))
    return nn.Sequential(nn.Conv2d(3, 2, 3, 2), Branches(in_front, behind), nn.Conv2d(2, 2, 2))


def channels_last_2d() -> nn.Module:
    """The channels move behind H and W, and back."""
    permuted = (Permute([0, 2, 3, 1]), nn.Linear(4, 4), Permute([0, 3, 1, 2]))
    return nn.Sequential(nn.Conv2d(3, 4, (3, 5), 2), *permuted, nn.Conv2d(4, 2, (2, 3)))


def uneven_3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 4, (3, 5, 7), (1, 2, 3), (1, 0, 3)),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.MaxPool3d((1, 2, 3), (1, 2, 1)),
        nn.Conv3d(4, 2, (3, 3, 1), padding=(2, 0, 0), dilation=(4, 2, 1)),
        nn.AvgPool3d((2, 1, 2)),
    )


# A warning about speed: the padding is one more behind than in front, and that is what it is here for.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("network", "axis"),
    [
        (dilated_1d, "L"), (uneven_2d, "H"), (uneven_2d, "W"), (misaligned_2d, "H"), (misaligned_2d, "W"),
        (channels_last_2d, "H"), (channels_last_2d, "W"),
        (uneven_3d, "D"), (uneven_3d, "H"), (uneven_3d, "W"),
    ],
)  # fmt: skip
def test_gradients_of_small_networks(network: Callable[[], nn.Module], axis: str) -> None:
    for field, found in compare(network(), axis, 31):
        assert found == field


class Hourglass(nn.Module):
    """A U-Net that adds its skips."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 3, 3, padding=1)
        self.down = nn.MaxPool2d(2)
        self.inner = Hourglass(depth - 1) if depth else nn.Identity()
        self.up = nn.ConvTranspose2d(3, 3, 2, 2)
        self.after = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        return self.after(self.up(self.inner(self.down(x))) + x)


def shuffled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.PixelShuffle(2),
        nn.Conv2d(2, 3, 3, padding=1),
        nn.PixelUnshuffle(3),
        nn.Conv2d(27, 3, 2),
    )


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 3, 3), nn.ConvTranspose2d(3, 2, (3, 5), (2, 3), (1, 0), (1, 1)), nn.Conv2d(2, 2, 3)
    )


def dilated_transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(3, 2, (3, 2), 2, dilation=(2, 3)), nn.Conv2d(2, 2, 3, (2, 1)))


def with_gaps() -> nn.Module:
    """Of three rows one sees nothing but the bias, and of four columns three."""
    return nn.Sequential(nn.ConvTranspose2d(3, 2, (2, 1), (3, 4)))


def twice() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 3, 4, 2, 1), Hourglass(0))


def resampled(scale: float, mode: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, 2), nn.Upsample(scale_factor=scale, mode=mode), nn.Conv2d(3, 3, 3, padding=1)
    )


# Networks, and the pixels by which the field is larger than any support, at each end.
UP_SAMPLING: list[tuple[Callable[[], nn.Module], int]] = [
    (partial(Hourglass, 2), 0),
    (shuffled, 0),
    (transposed, 0),
    (dilated_transposed, 0),
    (with_gaps, 0),
    (partial(resampled, 2, "nearest"), 0),
    (partial(resampled, 2.5, "nearest-exact"), 0),
    (partial(resampled, 1.5, "bilinear"), 0),
    (partial(resampled, 0.75, "bicubic"), 0),
    # At every position the hourglass reads rows of the transposed convolution from an odd one to an even one. The bound
    # counts with what all rows reach; even ones begin, and odd ones end, a pixel farther out than these two.
    (twice, 1),
]


@pytest.mark.parametrize("axis", ["H", "W"])
@pytest.mark.parametrize(("network", "slack"), UP_SAMPLING)
def test_gradients_behind_up_sampling(network: Callable[[], nn.Module], slack: int, axis: str) -> None:
    """There the field is a bound: it holds the support of every phase, and some of them reach its two ends."""
    pairs = [(field, found) for field, found in compare(network(), axis, 24, 16) if found is not None]
    assert min(found[0] - field[0] for field, found in pairs) == slack
    assert min(field[1] - found[1] for field, found in pairs) == slack
