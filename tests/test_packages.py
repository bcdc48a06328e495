"""Networks of other packages stream exactly as they are: one of every kind of decoder, and of many kinds of encoders.

docs/models.md lists more of them. Here they are small, and the sizes of images are awkward where the network takes
such: odd, not multiples of a tile, and tiles far below the receptive field.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from reference import handed_over, pair, randomise
from torch import nn

from fxstream.testing import compare, head

pytestmark = pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
"""Warnings say how much does not stream. What streams is asserted."""


class Case(NamedTuple):
    """A network, with an image and a tile."""

    name: str
    options: dict[str, Any]
    image: tuple[int, ...]
    tile: Any
    last: list[str] | None = None
    """Nodes that are streamed and handed to the head; None: the network streams whole."""
    args: tuple[Any, ...] = ()
    slow: bool = False
    frozen: tuple[str, ...] = ()
    """Biases in front of a norm, by the ends of their names. Their gradients vanish but for rounding."""


def parametrized(cases: list[Case]) -> Any:
    marks = [pytest.mark.slow if case.slow else () for case in cases]
    names = [f"{case.name}-{len(case.image) - 2}d-{case.options.get('encoder_name', '')}".strip("-") for case in cases]
    found = [pytest.param(case, marks=mark, id=name) for case, mark, name in zip(cases, marks, names, strict=True)]
    return pytest.mark.parametrize("case", found)


def check(make: Callable[..., nn.Module], case: Case) -> torch.fx.GraphModule:
    """Compare outputs and gradients, and return the converted model."""
    torch.manual_seed(0)
    image = torch.randn(case.image, dtype=torch.double)
    model = randomise(make(*case.args, **case.options)).eval().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(case.frozen))
    plain, converted = pair(model, case.tile, example_input=image)
    compare(plain, converted, image)
    if case.last is None:
        assert not head(converted)
    else:
        assert not set(case.last) - set(handed_over(converted))
    return converted


SLIM = {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": (16, 8, 8)}
DEEP = {"encoder_name": "resnet18", "encoder_depth": 4, "encoder_output_stride": 8, "decoder_channels": 16}
RATES = {"decoder_atrous_rates": (2, 4, 6)}
PYRAMID = {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32}
DECODERS = [
    Case("Unet", SLIM, (1, 3, 45, 37), 24),
    Case("UnetPlusPlus", SLIM, (1, 3, 40, 48), (32, 24)),
    Case("MAnet", {**SLIM, "decoder_pab_channels": 8}, (1, 3, 40, 48), 32, ["encoder_relu", "decoder_center_top_conv"]),
    Case("Linknet", {"encoder_name": "resnet18", "encoder_depth": 3}, (1, 3, 40, 48), 32),
    Case(
        "FPN",
        {"encoder_name": "resnet18", "encoder_depth": 4, "upsampling": 2, **PYRAMID},
        (1, 3, 48, 64),
        24,
        [f"decoder_seg_blocks_{index}_block_0_block_0" for index in range(4)],
    ),
    Case(
        "PSPNet", {"encoder_name": "resnet18", "psp_out_channels": 16}, (1, 3, 72, 56), 40, ["encoder_layer2_1_relu_1"]
    ),
    Case(
        "PAN",
        {"encoder_name": "mobilenet_v2", "decoder_channels": 8},
        (1, 3, 128, 128),
        64,
        ["decoder_fpa_branch1_0", "decoder_gau1_conv2_activation"],
    ),
    Case("DeepLabV3", {**DEEP, **RATES}, (1, 3, 40, 48), 32, ["decoder_aspp_convs_3_2", "decoder_aspp_convs_4_0"]),
    Case("DeepLabV3Plus", {**DEEP, **RATES}, (1, 3, 40, 48), 32, ["decoder_aspp_0_convs_4_0", "decoder_block1_2"]),
    Case(
        "UPerNet",
        {"encoder_name": "resnet18", "encoder_depth": 4, "decoder_channels": 16},
        (1, 3, 48, 64),
        32,
        [f"decoder_fpn_lateral_blocks_{index}_conv_norm_relu_2" for index in range(2)],
    ),
    Case(
        "Segformer", {"encoder_name": "resnet18", "encoder_depth": 4}, (1, 3, 48, 64), 32, ["encoder_layer3_1_relu_1"]
    ),
    Case(
        "DPT",
        {"encoder_name": "tu-test_vit3", "decoder_intermediate_channels": (8,) * 4},
        (1, 3, 160, 160),
        64,
        ["encoder_model_patch_embed_proj"],
        slow=True,
    ),
]
LAST = ["segmentation_head_2_activation"]
ENCODERS = [
    Case("Unet", {**SLIM, "encoder_name": "densenet121"}, (1, 3, 69, 53), 16, slow=True),
    Case("Unet", {**SLIM, "encoder_name": "vgg11_bn"}, (1, 3, 69, 53), 16, slow=True),
    Case("Unet", {**SLIM, "encoder_name": "timm-tf_efficientnet_lite0"}, (1, 3, 69, 53), 16, slow=True),
    Case("Unet", {**SLIM, "encoder_name": "efficientnet-b0"}, (1, 3, 69, 53), 24, ["encoder__swish"], slow=True),
    Case("UnetPlusPlus", {**SLIM, "encoder_name": "tu-convnext_atto"}, (1, 3, 72, 56), 16, LAST, slow=True),
]


@parametrized([*DECODERS, *ENCODERS])
def test_segmentation_models(case: Case) -> None:
    package = pytest.importorskip("segmentation_models_pytorch")
    options = {"encoder_weights": None, "classes": 2, **case.options}
    check(getattr(package, case.name), case._replace(options=options))


BASIC = {"features": (4, 4, 8, 8, 8, 4), "norm": "batch"}
LEVELS = {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2] * 2, "filters": [4, 8, 8]}
DENSE = {"block_config": (2, 2), "init_features": 8, "growth_rate": 4, "bn_size": 2}
UNET = {"channels": (4, 8, 8), "strides": (2, 2)}
RESIDUAL = {"init_filters": 8, "blocks_down": (1, 1, 1), "norm": "batch"}
IMAGE = (1, 1, 52, 44)
PLANE, SPACE = (2, 1, 2), (3, 1, 2)
ATTENTION = ["model_0_conv_1_adn_a", "model_1_submodule_1_merge_conv", "model_1_attention_w_x_1"]
MONAI = [
    Case("UNet", {**UNET, "num_res_units": 2, "norm": "batch"}, IMAGE, 32, args=PLANE),
    Case("UNet", {**UNET, "norm": "batch"}, (1, 1, 12, 20, 24), 12, args=SPACE),
    Case("UNet", {**UNET, "bias": False}, IMAGE, 32, ["model_0_conv"], PLANE),
    Case("BasicUNet", BASIC, (1, 1, 53, 43), 32, args=PLANE),
    Case("BasicUNet", BASIC, (1, 1, 16, 21, 17), 12, args=SPACE, slow=True),
    Case("BasicUNetPlusPlus", BASIC, (1, 1, 48, 32), 24, args=PLANE, slow=True),
    Case("AttentionUnet", UNET, IMAGE, 32, ATTENTION, PLANE, frozen=("merge.conv.bias",)),
    Case("SegResNet", {**RESIDUAL, "blocks_up": (1, 1)}, IMAGE, 32, args=(2,)),
    Case("SegResNetDS", RESIDUAL, IMAGE, 32, args=(2,)),
    Case("DynUNet", {**LEVELS, "norm_name": "batch", "res_block": True}, IMAGE, 32, args=PLANE),
    Case("FlexibleUNet", {"decoder_channels": (16, 8, 8, 8, 8)}, (1, 1, 32, 64), 32, args=(1, 2, "resnet10")),
    Case("VNet", {}, (1, 1, 32, 48), 24, args=PLANE, slow=True),
    Case("HighResNet", {}, (1, 1, 29, 37), 16, args=PLANE, slow=True),
    Case("RegUNet", {}, (1, 1, 32, 48), 24, args=(2, 1, 4, 2)),
    Case("AutoEncoder", {"norm": "batch"}, IMAGE, 32, args=(*PLANE, (4, 8), (2, 2))),
    Case("DenseNet", DENSE, (1, 1, 53, 43), 32, ["class_layers_pool"], PLANE),
]


@parametrized(MONAI)
def test_monai(case: Case) -> None:
    pytest.importorskip("monai")
    check(getattr(importlib.import_module("monai.networks.nets"), case.name), case)


POOL, HEAD_POOL = ["global_pool_pool"], ["head_global_pool_pool"]
TIMM = [
    Case("test_resnet", {}, (1, 3, 69, 53), 24, POOL),
    Case("test_convnext", {}, (1, 3, 69, 53), 40, HEAD_POOL),
    Case("test_mambaout", {}, (1, 3, 69, 53), 24, ["mean"]),
    Case("test_byobnet", {}, (1, 3, 69, 53), 24, ["stages_0_0_conv1_kxk_bn_act", "stages_0_0_shortcut_conv_bn_act"]),
    Case("test_efficientnet", {}, (1, 3, 69, 53), 24, ["blocks_3_0_aa"]),
    Case("test_nfnet", {}, (1, 3, 69, 53), 24, ["conv2d_4", "conv2d_8"]),
    Case("regnetx_002", {}, (1, 3, 69, 53), 40, HEAD_POOL),
    Case("starnet_s050", {}, (1, 3, 69, 53), 24, POOL),
    Case("tf_mobilenetv3_small_minimal_100", {}, (1, 3, 69, 53), 40, POOL, slow=True),
    Case("dla46x_c", {}, (1, 3, 96, 64), 40, POOL, slow=True),
    Case("hrnet_w18_small", {}, (1, 3, 96, 64), 40, POOL, slow=True),
    Case("inception_v4", {}, (1, 3, 107, 91), 40, POOL, slow=True),
    Case("mobilenetv4_conv_small_035", {}, (1, 3, 69, 53), 40, POOL, slow=True),
    *(
        Case(name, {}, (1, 3, 97, 71), 40, POOL, slow=True)
        for name in (
            *("tf_efficientnet_lite0", "densenet121", "res2net50_26w_4s"),
            *("convmixer_768_32", "dpn68", "selecsls42", "fasternet_t0"),
        )
    ),
    *(
        Case(name, {}, (1, 3, 97, 71), 40, HEAD_POOL, slow=True)
        for name in ("xception41", "repvgg_a0", "vovnet39a", "cspdarknet53", "inception_next_atto", "resnetv2_50")
    ),
]


@parametrized(TIMM)
def test_timm(case: Case) -> None:
    package = pytest.importorskip("timm")
    check(lambda **options: package.create_model(case.name, num_classes=2, **options), case)


SMALL = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
GROUPS = {"embedding_size": 8, "groups_width": 4, "layer_type": "x"}
TRANSFORMERS = [
    Case("ResNet", {**SMALL, "embedding_size": 8}, (1, 3, 69, 53), 40, ["resnet_pooler"]),
    Case("ConvNext", SMALL, (1, 3, 69, 53), 40, ["mean"]),
    Case("RegNet", {**SMALL, **GROUPS}, (1, 3, 69, 53), 40, ["regnet_pooler"]),
]


@parametrized(TRANSFORMERS)
def test_transformers(case: Case) -> None:
    """The outputs are of the package's own class."""
    package = pytest.importorskip("transformers")
    kind = getattr(package, f"{case.name}ForImageClassification")
    config = getattr(package, f"{case.name}Config")(num_labels=2, **case.options)
    converted = check(lambda: kind(config), case._replace(options={}))
    output = converted(torch.randn(case.image, dtype=torch.double))
    assert type(output) is package.modeling_outputs.ImageClassifierOutputWithNoAttention
    assert output.logits.shape == (1, 2)
