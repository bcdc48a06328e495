"""Write docs/models.md, which lists how much of the models of four packages streams.

    python benchmarks/models.py
    python benchmarks/models.py --check --only Unet       # run these for real, too, and compare with the plain model

Models are built without weights, in eval mode, and on the meta device, so that nothing is downloaded or computed. A
share is the part of the FLOPs of one forward pass, of an image of the size in the table, that the streamed part takes.
All spatial axes are streamed. With --check, every model is converted with random parameters in float64, too, and its
outputs and gradients are compared with those of the plain model.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from zoo import last_nodes, on_meta, reason, streamed_share

import fxstream

HEAD = """# How much of other packages' models streams

Written by `python benchmarks/models.py`. The doors are `fxstream.convert` and, for what torch.fx cannot trace,
`fxstream.compile`. A share is that of the FLOPs of one forward pass of one image, streamed along all spatial axes."""
HEADERS = ["model", "image", "door", "streamed up to", "share", "why it stops there"]
LARGEST = 150_000_000
"""The most parameters of a model that --check runs."""


class Entry(NamedTuple):
    """A model of the table."""

    name: str
    make: Callable[[], nn.Module]
    image: tuple[int, ...]


# segmentation_models_pytorch: every architecture with six kinds of encoders.

_ARCHITECTURES = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet"),
    "Segformer",
)
_ENCODERS = {
    "resnet18": "residual",
    "densenet121": "dense",
    "mobilenet_v2": "depthwise",
    "efficientnet-b0": "squeeze-excite",
    "mit_b0": "transformer",
    "tu-convnext_atto": "of timm, channels last",
}
_TRANSFORMERS = (
    *("tu-vit_tiny_patch16_224", "tu-deit_tiny_patch16_224", "tu-vit_small_patch16_dinov3"),
    *("tu-deit3_small_patch16_224", "tu-vit_base_patch16_rope_224", "tu-vit_base_patch32_224"),
)
"""DPT takes no other encoders."""
_WITHOUT = {
    *(("UnetPlusPlus", "mit_b0"), ("Linknet", "mit_b0")),
    *((name, "densenet121") for name in ("PAN", "DeepLabV3", "DeepLabV3Plus")),
}
"""The package refuses to build these."""


def segmentation_models() -> Iterator[Entry]:
    import segmentation_models_pytorch as smp

    def made(architecture: str, encoder: str, **options: Any) -> Callable[[], nn.Module]:
        return lambda: getattr(smp, architecture)(encoder, encoder_weights=None, classes=2, **options)

    for name in _ARCHITECTURES:
        for encoder in _ENCODERS:
            if (name, encoder) not in _WITHOUT:
                yield Entry(f"{name}, {encoder}", made(name, encoder), (1, 3, 256, 256))
    for encoder in _TRANSFORMERS:
        yield Entry(f"DPT, {encoder}", made("DPT", encoder, dynamic_img_size=True), (1, 3, 224, 224))


# MONAI: as they are by default; and with batch norms, where the default is another norm.


def monai() -> Iterator[Entry]:
    for axes, size in ((2, 128), (3, 64)):
        for name, make in _monai(axes, size).items():
            yield Entry(f"{name}, {axes}-D", make, (1, 1, *[size] * axes))


def _monai(axes: int, size: int) -> dict[str, Callable[[], nn.Module]]:
    from monai.networks import nets

    levels: dict[str, Any] = {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3}
    unet: dict[str, Any] = {"channels": (16, 32, 64, 128), "strides": (2, 2, 2), "num_res_units": 2}
    auto: dict[str, Any] = {"channels": (16, 32, 64), "strides": (2, 2, 2)}
    deep: dict[str, Any] = {"deep_supervision": True, "res_block": True}
    batch: dict[str, Any] = {"norm": "batch"}
    ae: dict[str, Any] = {"num_res_blocks": (1, 1, 1), "channels": (32, 32, 32), "attention_levels": (False,) * 3}
    image = (size,) * axes
    return {
        "UNet": lambda: nets.UNet(axes, 1, 2, **unet),
        "UNet, batch norm": lambda: nets.UNet(axes, 1, 2, **unet, **batch),
        "AttentionUnet": lambda: nets.AttentionUnet(axes, 1, 2, (16, 32, 64, 128), (2, 2, 2)),
        "BasicUNet": lambda: nets.BasicUNet(axes, 1, 2),
        "BasicUNet, batch norm": lambda: nets.BasicUNet(axes, 1, 2, **batch),
        "BasicUNetPlusPlus, batch norm": lambda: nets.BasicUNetPlusPlus(axes, 1, 2, **batch),
        "SegResNet": lambda: nets.SegResNet(axes),
        "SegResNet, batch norm": lambda: nets.SegResNet(axes, **batch),
        "SegResNetDS": lambda: nets.SegResNetDS(axes),
        "DynUNet": lambda: nets.DynUNet(axes, 1, 2, **levels),
        "DynUNet, batch norm": lambda: nets.DynUNet(axes, 1, 2, norm_name="batch", **levels),
        "DynUNet, deep supervision": lambda: nets.DynUNet(axes, 1, 2, norm_name="batch", **levels, **deep),
        "FlexibleUNet, efficientnet-b0": lambda: nets.FlexibleUNet(1, 2, "efficientnet-b0", spatial_dims=axes),
        "FlexibleUNet, resnet18": lambda: nets.FlexibleUNet(1, 2, "resnet18", spatial_dims=axes),
        "VNet": lambda: nets.VNet(axes, 1, 2),
        "HighResNet": lambda: nets.HighResNet(axes, 1, 2),
        "AHNet": lambda: nets.AHNet(spatial_dims=axes, out_channels=2, psp_block_num=0),
        "RegUNet": lambda: nets.RegUNet(axes, 1, 16, 3),
        "UNETR": lambda: nets.UNETR(1, 2, image, spatial_dims=axes),
        "SwinUNETR": lambda: nets.SwinUNETR(1, 2, spatial_dims=axes, feature_size=24),
        "DenseNet121": lambda: nets.DenseNet121(axes, 1, 2),
        "ResNet18": lambda: nets.resnet18(spatial_dims=axes, n_input_channels=1, num_classes=2),
        "SEResNet50": lambda: nets.SEResNet50(spatial_dims=axes, in_channels=1, num_classes=2),
        "EfficientNetBN": lambda: nets.EfficientNetBN("efficientnet-b0", False, True, axes, 1, 2),
        "AutoEncoder": lambda: nets.AutoEncoder(axes, 1, 2, **auto),
        "AutoEncoder, batch norm": lambda: nets.AutoEncoder(axes, 1, 2, **auto, **batch),
        "VarAutoEncoder": lambda: nets.VarAutoEncoder(axes, (1, *image), 2, 8, (16, 32), (2, 2)),
        "ViTAutoEnc": lambda: nets.ViTAutoEnc(1, image, (16,) * axes, spatial_dims=axes),
        "AutoencoderKL": lambda: nets.AutoencoderKL(axes, 1, 1, latent_channels=3, norm_num_groups=8, **ae),
        "VQVAE": lambda: nets.VQVAE(axes, 1, 1),
        "PatchDiscriminator": lambda: nets.PatchDiscriminator(axes, 16, 1),
    }


# timm: one model of every family.

_CHOSEN = """
vit_tiny_patch16_224 repvgg_a0 beit_base_patch16_224 halonet26t poolformer_s12 cait_xxs24_224 coat_tiny
coatnet_nano_rw_224 convit_tiny convmixer_768_32 convnext_tiny cpubone_nano crossvit_tiny_240 cspdarknet53 csatv2
cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla34 nfnet_l0 dpn68 vovnet39a resnet50
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientvim_m1 efficientvit_b0
efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 mobilenetv3_large_100 focalnet_tiny_srf gcvit_xxtiny
gemma4_vit_167m ghostnet_100 mixer_s32_224 hardcorenas_a hgnet_tiny hiera_tiny_224 sam2_hiera_tiny hrnet_w18 iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small legacy_seresnet18 legacy_xception
levit_128s lowformer_b0 mambaout_femto mobilenetv5_300m mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_gap
nasnetalarge nest_tiny nextvit_small pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002
repghostnet_050 repvit_m1 res2net50_26w_4s resnest14d resnetv2_50 rexnet_100 samvit_base_patch16 selecsls42
sequencer2d_s shvit_s1 skresnet18 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
swinv2_cr_tiny_224 vit_relpos_small_patch16_224 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_svt_small vgg11
visformer_tiny vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41 xcit_nano_12_p16_224
""".split()
"""A small model of each family; of a family that is not here, the first one is taken."""


def timm() -> Iterator[Entry]:
    import timm

    for family in timm.list_modules():
        names = timm.list_models(module=family)
        name = next((name for name in _CHOSEN if name in names), names[0] if names else None)
        if name is not None:
            settings = timm.get_pretrained_cfg(name)
            size = (3, 224, 224) if settings is None else settings.input_size
            yield Entry(f"{family}: {name}", _timm_made(name), (1, *size))


def _timm_made(name: str) -> Callable[[], nn.Module]:
    import timm

    return lambda: timm.create_model(name)


# transformers: its convolutional networks.


def transformers() -> Iterator[Entry]:
    import transformers as package

    def made(model: str, **options: Any) -> Callable[[], nn.Module]:
        config = getattr(package, model.removesuffix("Model").removesuffix("ForImageClassification") + "Config")
        return lambda: getattr(package, model)(config(**options))

    image = (1, 3, 224, 224)
    for name in ("ResNetModel", "ConvNextModel"):
        yield Entry(name, made(name), image)
    for name in ("ResNet", "ConvNext", "ConvNextV2"):
        yield Entry(f"{name}ForImageClassification", made(f"{name}ForImageClassification"), image)
    for kind in ("x", "y"):
        name = "RegNetForImageClassification"
        yield Entry(f"{name}, {kind}", made(name, layer_type=kind), image)


PACKAGES = {
    "segmentation_models_pytorch": segmentation_models,
    "monai": monai,
    "timm": timm,
    "transformers": transformers,
}


def row(entry: Entry) -> list[str]:
    """What the table says about a model."""
    model, image = on_meta(entry.make), torch.empty(entry.image, device="meta")
    size = " x ".join(map(str, entry.image[2:]))
    try:
        analysis = fxstream.analyze(model, example_input=image)
    except fxstream.StreamingError as error:
        return [entry.name, size, "none", "nothing", "0%", " ".join(str(error).split())]
    last = last_nodes(analysis)
    door, stream = "convert", partial(fxstream.convert, example_input=image, prove=False)
    try:
        share = streamed_share(model, max(image.shape), image, stream)
    except fxstream.TraceError:  # so it has been analysed as torch.compile captures it
        door, share = "compile", streamed_share(model, max(image.shape), image, fxstream.compile)
    return [entry.name, size, door if analysis.prefix else "none", last, share, reason(analysis)]


def check(entry: Entry) -> str:
    """Whether the streamed model computes what the plain model does, in words."""
    probe = on_meta(entry.make)
    if sum(parameter.numel() for parameter in probe.parameters()) > LARGEST:
        return "not run, since it is too large"
    size = next((size for size in (69, 96, 64) if _takes(probe, entry, size)), entry.image[-1])
    plain, other = (normed(entry.make) for _ in range(2))
    # For one image, torch's own gradients of batch norms are wrong in some models, see README.md.
    image = torch.randn(2, entry.image[1], *[size] * (len(entry.image) - 2), dtype=torch.double)
    try:
        expected = results(plain, image)
    except RuntimeError as error:
        return f"the plain model fails: {error}"
    door = "convert"
    try:
        streamed = fxstream.convert(other, 32, example_input=image, prove=False)
    except fxstream.TraceError:
        door, streamed = "compile", fxstream.compile(other, 32)
    except fxstream.StreamingError as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    error, where = max(_errors(expected, results(streamed, image)))
    return f"{'exact' if error < 1e-9 else 'WRONG'} by {door}: {error:.0e} in {where}, {size} pixels"


def _takes(model: nn.Module, entry: Entry, size: int) -> bool:
    """Whether a model accepts images of so many pixels along each axis."""
    try:
        with torch.no_grad():
            model(torch.empty(1, entry.image[1], *[size] * (len(entry.image) - 2), device="meta"))
    except Exception:  # whatever it raises for such an image
        return False
    return True


def results(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """The outputs of a model and the gradients of all its parameters and of the image."""
    image = image.clone().requires_grad_()
    torch.manual_seed(1)
    outputs = [leaf for leaf in tree_leaves(model(image)) if isinstance(leaf, torch.Tensor)]
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(one.shape, dtype=one.dtype, generator=generator) for one in outputs]
    losses = [(one * weight).sum() for one, weight in zip(outputs, weights, strict=True) if one.requires_grad]
    sum(losses, torch.zeros(())).backward()
    found: dict[str, torch.Tensor | None] = {f"output {index}": one.detach() for index, one in enumerate(outputs)}
    return {**found, "image": image.grad, **{name: one.grad for name, one in model.named_parameters()}}


def _errors(
    expected: dict[str, torch.Tensor | None], got: dict[str, torch.Tensor | None]
) -> Iterator[tuple[float, str]]:
    """Relative errors, with names. A gradient that is tiny beside the largest vanishes but for rounding."""
    assert expected.keys() == got.keys()
    largest = max(float(one.norm()) for one in expected.values() if one is not None)
    for name, one in expected.items():
        other = got[name]
        if one is None or other is None:
            yield (0.0 if one is other else 1.0), name
        else:
            yield float((other - one).norm()) / max(float(one.norm()), 1e-6 * largest), name


def normed(make: Callable[[], nn.Module]) -> nn.Module:
    """The model in eval mode, in float64, and always the same. No parameter is zero, and batch norms do something."""
    torch.manual_seed(0)
    model = make().double().eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.uniform_(parameter, -0.2, 0.2)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "models.md")
    parser.add_argument("--packages", nargs="*", choices=PACKAGES, help="these packages only; nothing is written")
    parser.add_argument("--only", nargs="*", help="models with one of these words in their names; nothing is written")
    parser.add_argument("--check", action="store_true", help="run the models and compare; nothing is written")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    text = ""
    part = options.packages or options.only or options.check
    rows: list[list[str]] = []
    for package in options.packages or PACKAGES:
        entries = [
            entry
            for entry in PACKAGES[package]()
            if not options.only or any(word in entry.name for word in options.only)
        ]
        if options.check:
            for entry in entries:
                print(f"{package}: {entry.name}: {check(entry)}", flush=True)
            continue
        found = []
        for entry in entries:
            found.append(row(entry))
            print(" | ".join(found[-1]), flush=True)
        rows += found
        text += f"\n## {package} {version(package)}\n\n"
        text += tabulate(found, headers=HEADERS, tablefmt="github", disable_numparse=True) + "\n"
    if options.check:
        return
    entered = sum(found[2] != "none" for found in rows)
    summary = f"{entered} of these {len(rows)} models get in by one of the doors"
    print(summary)
    if not part:
        options.output.write_text(f"{HEAD}\n{summary}.\n{text}")


if __name__ == "__main__":
    main()
