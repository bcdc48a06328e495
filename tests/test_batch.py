"""Streaming along the batch: bags of patches and contrastive batches, chunk by chunk, up to what couples samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from reference import assert_exact, each_once, handed_over
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.efficientnet import EfficientNet, _efficientnet_conf
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.swin_transformer import SwinTransformer

import fxstream
from fxstream.memory.live import LiveBytes
from fxstream.testing import compare, head, stops_along

BAG, CHUNK = 130, (48, None, None, None)  # the last chunk is smaller
CONTRASTIVE, CONTRASTIVE_CHUNK = 96, (28, None, None, None)


# Encoders, each with its own pooling and without a classifier, and how many features they return.


def _vit() -> tuple[nn.Module, int]:
    """vit_b_16 of two narrow layers."""
    model = torchvision.models.VisionTransformer(32, 16, 2, num_heads=2, hidden_dim=24, mlp_dim=48)
    model.heads = nn.Identity()
    return model, 24


def _efficientnet() -> tuple[nn.Module, int]:
    """efficientnet_b0 at a quarter of its width and half of its depth."""
    stages, last_channel = _efficientnet_conf("efficientnet_b0", width_mult=0.25, depth_mult=0.5)
    model = EfficientNet(stages, dropout=0.2, last_channel=last_channel)
    model.classifier = nn.Identity()
    return model, 4 * stages[-1].out_channels


def _resnet(norm: Callable[[int], nn.Module]) -> tuple[nn.Module, int]:
    """The stem and two stages of resnet18: the others have most of the parameters."""
    model = ResNet(BasicBlock, [2, 2, 1, 1], norm_layer=norm)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Identity()
    return model, 128


def _group_norm_resnet() -> tuple[nn.Module, int]:
    return _resnet(lambda channels: nn.GroupNorm(8, channels))


def _swin() -> tuple[nn.Module, int]:
    model = SwinTransformer([4, 4], 16, depths=[2, 2], num_heads=[2, 2], window_size=[3, 3])
    model.head = nn.Identity()
    return model, 32


# How to build one, the size of a patch, and the node that returns the features.
ENCODERS: dict[str, tuple[Callable[[], tuple[nn.Module, int]], int, str]] = {
    "vit": (_vit, 32, "encoder_heads"),
    "efficientnet": (_efficientnet, 24, "encoder_classifier"),
    "resnet with group norm": (_group_norm_resnet, 24, "encoder_fc"),
    "swin": (_swin, 24, "encoder_head"),
}


class GatedAttention(nn.Module):
    """Multiple-instance learning with gated attention pooling: Ilse, Tomczak and Welling, 2018."""

    def __init__(self, encoder: nn.Module, features: int, hidden: int = 8) -> None:
        super().__init__()
        self.encoder = encoder
        self.what = nn.Linear(features, hidden)
        self.gate = nn.Linear(features, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)  # the softmax takes no notice of a bias: its gradient is noise
        self.classifier = nn.Linear(features, 2)

    def forward(self, bag: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        instances = self.encoder(bag)
        scores = self.score(torch.tanh(self.what(instances)) * torch.sigmoid(self.gate(instances)))
        weights = F.softmax(scores, dim=0)
        return self.classifier((weights * instances).sum(0)), weights


class Contrastive(nn.Module):
    """The NT-Xent loss of SimCLR: image i and image i + N / 2 are views of the same one."""

    def __init__(self, embed: nn.Module, temperature: float = 0.5) -> None:
        super().__init__()
        self.embed = embed
        self.temperature = temperature
        self.register_buffer("itself", torch.eye(CONTRASTIVE, dtype=torch.bool))
        self.register_buffer("partner", torch.arange(CONTRASTIVE).roll(CONTRASTIVE // 2))

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        z = F.normalize(self.embed(views), dim=1)
        similarity = z @ z.T / self.temperature
        return F.cross_entropy(similarity.masked_fill(self.itself, -torch.inf), self.partner)


def calibrated(model: nn.Module, size: int) -> nn.Module:
    """Eval mode, with batch statistics of data: else features hardly differ between images, and gradients cancel."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    with torch.no_grad():
        model.train()(torch.randn(64, 3, size, size))
    return model.eval()


def bag_model(name: str) -> nn.Module:
    build, size, _ = ENCODERS[name]
    return calibrated(GatedAttention(*build()), size)


def contrastive_model(name: str) -> nn.Module:
    build, size, _ = ENCODERS[name]
    encoder, features = build()
    projector = nn.Sequential(nn.Linear(features, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
    return Contrastive(calibrated(nn.Sequential(encoder, projector), size))


@pytest.mark.parametrize("name", ENCODERS)
def test_bag_of_patches_under_attention_pooling(name: str) -> None:
    _, size, features = ENCODERS[name]
    converted = assert_exact(bag_model(name), (BAG, 3, size, size), CHUNK, last=[features, "score"])
    softmax, *rest = head(converted)[-4:]
    assert (softmax, rest[1:]) == ("softmax", ["sum_1", "classifier"])


@pytest.mark.parametrize("name", ENCODERS)
def test_contrastive_loss_over_a_large_batch(name: str) -> None:
    _, size, _ = ENCODERS[name]
    model = contrastive_model(name)
    converted = fxstream.convert(model.double(), CONTRASTIVE_CHUNK)
    assert handed_over(converted)[0] == "normalize"
    assert head(converted)[-4:] == ["matmul", "truediv", "masked_fill", "cross_entropy"]
    compare(model, converted, torch.randn(CONTRASTIVE, 3, size, size))


@pytest.mark.parametrize("chunk", [1, 7, *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in (37, 1000))])
def test_bags_of_different_sizes_go_through_one_converted_model(chunk: int) -> None:
    model = bag_model("vit").double()
    converted = fxstream.convert(model, (chunk, None, None, None))
    for size in (37, 1, 60):
        compare(model, converted, torch.randn(size, 3, 32, 32))


# What couples the samples behind the encoder ends the prefix, and nothing before it.

Couple = Callable[[Any, torch.Tensor], torch.Tensor]


class Coupled(nn.Module):
    def __init__(self, couple: Couple) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.classifier = nn.Linear(8, 3)
        self.couple = couple

    def forward(self, bag: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.couple(self, self.encoder(bag)))


def _transformer(m: Any, h: torch.Tensor) -> torch.Tensor:
    tokens = h.unsqueeze(0)
    return m.attention(tokens, tokens, tokens)[0].mean(1)


# What couples, what the head gets, and the reason.
COUPLES: dict[str, tuple[Couple, list[str], str]] = {
    "mean": (lambda m, h: h.mean(0), ["mean"], "takes the mean along the streamed N"),
    "max": (lambda m, h: h.max(0).values, ["encoder_3"], "takes the max along the streamed N"),
    "bags": (lambda m, h: h.view(4, -1, 8).mean(1), ["encoder_3"], "splits, merges or moves a streamed axis (N)"),
    "transformer": (_transformer, ["unsqueeze"], "attends"),
    "top instances": (lambda m, h: h[h.norm(dim=1).topk(5).indices], ["encoder_3", "norm"], "no streaming rule"),
    "neighbours": (lambda m, h: h - h.roll(1, 0), ["encoder_3"], "moves positions around the end of the streamed N"),
    "order": (lambda m, h: h.cumsum(0), ["encoder_3"], "takes the cumulative sum along the streamed N"),
    "batch norm": (lambda m, h: m.norm(h), ["encoder_3"], "norm is in training mode"),
}


@pytest.mark.parametrize("name", COUPLES)
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_streaming_ends_where_samples_are_coupled(name: str) -> None:
    couple, last, reason = COUPLES[name]
    model, chunk = Coupled(couple), (5, None, None, None)
    assert_exact(model, (12, 3, 9, 9), chunk, last=last)
    (stop,) = stops_along(model, ("N",))
    assert reason in stop.reason


def test_every_second_sample_streams() -> None:
    assert_exact(Coupled(lambda m, h: h[::2]), (13, 3, 9, 9), (5, None, None, None), whole=True)


# Batch norms of the encoder in training mode.


def test_batch_norm_in_training_mode_ends_the_prefix() -> None:
    model = GatedAttention(*_resnet(nn.BatchNorm2d))
    with pytest.warns(fxstream.StreamingWarning) as caught:
        assert_exact(model, (20, 3, 24, 24), (8, None, None, None), last="encoder_conv1")
    (warning,) = caught
    message = str(warning.message)
    assert "encoder.bn1 is in training mode and needs the mean and variance over the streamed axes N." in message
    assert "freeze_batchnorm=True" in message


def test_frozen_batch_norm_does_not() -> None:
    encoder, features = _resnet(nn.BatchNorm2d)
    model = GatedAttention(calibrated(encoder, 24).train(), features)
    last = [ENCODERS["resnet with group norm"][2], "score"]
    assert_exact(model, (20, 3, 24, 24), (8, None, None, None), last=last, freeze_batchnorm=True)


# Peak memory, counted.


def peak(model: nn.Module, images: torch.Tensor) -> int:
    """Of a training step, beyond the images and the parameters."""
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        model(images)  # a forward that asks for sizes is traced at the first call with them
    with LiveBytes() as live:
        model(images)[0].sum().backward()
    return live.peak


@each_once(image_grad=[False, True], name=["vit", "resnet with group norm", "swin"])
def test_peak_memory_is_that_of_a_chunk(name: str, image_grad: bool) -> None:
    model, size, chunk = bag_model(name), ENCODERS[name][1], 32
    converted = fxstream.convert(model, (chunk, None, None, None))
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    bags = {n: torch.randn(n, 3, size, size, requires_grad=image_grad) for n in (chunk, 128, 256)}
    crossing = bags[chunk].element_size() * (model.classifier.in_features + 1)  # of each sample: features and a score
    per_image = crossing + bags[chunk][0].nbytes * image_grad
    one = peak(model, bags[chunk])
    # The head has a few values of the size of the features. A scan has up to two more gradients of every parameter and
    # tile: the sums so far, and those of the tile before.
    allowed = 1.5 * one + 2 * (parameters + chunk * per_image)
    assert peak(converted, bags[256]) < allowed + 256 * (per_image + 4 * crossing)
    growth = peak(converted, bags[256]) - peak(converted, bags[128])
    assert growth <= 128 * (per_image + 2 * crossing)
    assert peak(model, bags[256]) > 1.9 * peak(model, bags[128])
