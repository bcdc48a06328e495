"""Estimates: against what is counted when the step runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from reference import Body, flops
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.convnext import CNBlockConfig

import fxstream
from fxstream.memory.live import LiveBytes


class UNet(nn.Module):
    """Whose output is as large as the image, so that its gradient counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.first(x).relu()
        return self.last(torch.cat([skip, self.up(self.down(skip).relu())], 1))


class Heavy(nn.Module):
    """Most of what it holds belongs to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.InstanceNorm2d(4)
        self.head = nn.Sequential(nn.Conv2d(4, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x))).mean((1, 2, 3))


def _convnext() -> nn.Module:
    """A convnext_tiny of a block per stage, and half as wide."""
    stages = [
        CNBlockConfig(48, 96, 1),
        CNBlockConfig(96, 192, 1),
        CNBlockConfig(192, 384, 1),
        CNBlockConfig(384, None, 1),
    ]
    return torchvision.models.ConvNeXt(stages, num_classes=3)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=3), (1, 3, 320, 256), 96),
    "late weights": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 4, 4),
            nn.ReLU(),
            nn.Conv2d(16, 512, 8, 8),
            *(nn.Conv2d(512, 512, 3, padding=1) for _ in range(3)),
        ),
        (1, 3, 384, 320),
        64,
    ),
    "mobilenet_v2": (
        lambda: torchvision.models.mobilenet_v2(num_classes=3, width_mult=0.25),
        (2, 3, 301, 203),
        (2, 3, 96, None),
    ),
    "convnext": (_convnext, (1, 3, 256, 200), 96),
    "unet": (UNet, (1, 3, 512, 384), (64, 100)),
    "one tile": (UNet, (2, 3, 128, 128), 1000),
    "bags": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()),
        (40, 3, 32, 32),
        (4, None, None, None),
    ),
    "heavy head": (Heavy, (1, 3, 200, 200), 50),
    "wide head": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 2, 4), nn.Flatten(), nn.Linear(8 * 32 * 32, 256)
        ),
        (1, 3, 128, 128),
        64,
    ),
    "dropout": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(), nn.Conv2d(8, 8, 3)), (1, 3, 300, 300), 64),
}


class Counted:
    """A step, run and counted."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], tile: Any, budget: Any = None):
        converted = fxstream.convert(model, tile, memory_budget=budget, prove=False)
        with LiveBytes() as live:
            image = torch.randn(shape)
            output = converted(image)
            self.held = live.now - image.nbytes - output.nbytes
            if output.requires_grad:
                # As a loss would: the output is alive together with its gradient.
                output.backward(torch.ones_like(output))
            del output
        self.peak = live.peak
        for parameter in converted.parameters():
            parameter.grad = None
        self.flops = flops(lambda: self._step(converted, image))

    def _step(self, converted: nn.Module, image: torch.Tensor) -> None:
        output = converted(image)
        if output.requires_grad:
            output.sum().backward()


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("resnet18", "mobilenet_v2") else n for n in MODELS]
)
def test_what_a_training_step_takes(name: str) -> None:
    build, shape, tile = MODELS[name]
    model = build().train(name == "dropout")
    estimate = fxstream.analyze(model).estimate(shape, tile)
    counted = Counted(model, shape, tile)
    assert estimate.flops == counted.flops
    assert estimate.peak_bytes == pytest.approx(counted.peak, rel=0.1)
    if not name.endswith("head"):  # which holds what it saves itself
        assert estimate.carried_bytes == pytest.approx(counted.held, rel=0.02, abs=3000)
    assert f"{estimate.tiles} tiles" in str(estimate)


@pytest.mark.parametrize("budget", ["256KiB", "4MiB", "20MiB", "1GiB"])
@pytest.mark.parametrize("name", ["unet", "dropout", "bags", pytest.param("convnext", marks=pytest.mark.slow)])
def test_what_a_training_step_takes_that_has_a_memory_budget(name: str, budget: str) -> None:
    """The FLOPs are exact; the bytes, too, as long as results are kept and not graphs."""
    build, shape, tile = MODELS[name]
    model = build().train(name == "dropout")
    analysis = fxstream.analyze(model)
    plain, estimate = analysis.estimate(shape, tile), analysis.estimate(shape, tile, budget)
    counted = Counted(model, shape, tile, budget)
    assert estimate.flops == counted.flops < plain.flops
    assert estimate.carried_bytes == pytest.approx(counted.held, rel=0.02, abs=3000)
    assert estimate.peak_bytes == pytest.approx(counted.peak, rel=0.1)


def test_a_budget_that_keeps_everything_saves_all_that_is_computed_again() -> None:
    build, shape, tile = MODELS["unet"]
    model = build()
    estimate = fxstream.analyze(model).estimate(shape, tile, "1GiB")
    assert estimate.flops == flops(lambda: model(torch.randn(shape)).sum().backward())


def test_tiles_that_the_budget_chooses() -> None:
    analysis = fxstream.analyze(UNet())
    least, most = (analysis.estimate((1, 3, 512, 512), "auto", budget) for budget in ("10MiB", "200MiB"))
    assert least.tiles > most.tiles == 1
    assert least.flops > most.flops
    with pytest.raises(fxstream.TileShapeError):
        analysis.estimate((1, 3, 512, 512), "auto")


@pytest.mark.parametrize("name", ["resnet18", "unet", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_what_inference_takes(name: str) -> None:
    build, shape, tile = MODELS[name]
    model = build().eval()
    with torch.no_grad():
        estimate = fxstream.analyze(model).estimate(shape, tile)
        counted = Counted(model, shape, tile)
    assert estimate.flops == counted.flops
    assert estimate.peak_bytes == pytest.approx(counted.peak, rel=0.15)


def test_frozen_models_are_estimated_as_inference() -> None:
    model = UNet().requires_grad_(False)
    estimate = fxstream.analyze(model).estimate((1, 3, 64, 64), 16)
    with torch.no_grad():
        assert estimate == fxstream.analyze(model).estimate((1, 3, 64, 64), 16)


@pytest.mark.parametrize(("tile", "tiles"), [(64, 6), ((None, 64), 3), (1000, 1)])
def test_the_number_of_tiles(tile: Any, tiles: int) -> None:
    assert fxstream.analyze(nn.Conv2d(3, 4, 1)).estimate((1, 3, 100, 192), tile).tiles == tiles


def test_an_image_that_no_memory_could_hold() -> None:
    """A slide of ten gigapixels, and nothing of it is made; nor do the model or the random numbers change."""
    model = torchvision.models.resnet18().eval()
    before, random = {name: one.clone() for name, one in model.state_dict().items()}, torch.get_rng_state()
    estimate = fxstream.analyze(model).estimate((1, 3, 100_352, 100_352), 2048)
    assert estimate.tiles >= 49**2
    assert estimate.peak_bytes > 4 * 3 * 100_352**2
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_what_cannot_be_estimated() -> None:
    analysis = fxstream.analyze(nn.Conv2d(3, 4, 5))
    with pytest.raises(fxstream.TileShapeError):
        analysis.estimate((1, 3, 20, 20), "large")
    with pytest.raises(fxstream.ImageTooSmallError):
        analysis.estimate((1, 3, 4, 20), 8)
    with pytest.raises(fxstream.InputError):
        analysis.estimate((3, 20, 20), 8)


# Counting FLOPs.

CONVOLUTIONS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 9, 7)),
    "depthwise": (lambda groups=4: nn.Conv2d(4, 8, 3, stride=2, groups=groups), (2, 4, 9, 7)),
    "grouped": (lambda groups=2: nn.Conv3d(4, 6, (1, 3, 2), groups=groups, bias=False), (2, 4, 5, 6, 7)),
    "dilated": (lambda groups=2: nn.Conv1d(4, 6, 3, dilation=2, groups=groups), (2, 4, 15)),
    "transposed": (lambda groups=2: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups), (2, 4, 5, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("trained", ["everything", "the weights"])
def test_the_gradients_of_a_convolution_take_what_each_forward_takes(name: str, trained: str) -> None:
    """Torch's counter does not divide by the number of groups. For a dense convolution it is right."""
    build, shape = CONVOLUTIONS[name]
    image = torch.randn(shape, requires_grad=trained == "everything")
    convolution = build()
    forward = flops(lambda: convolution(image))
    assert flops(lambda: convolution(image).sum().backward()) == (3 if image.requires_grad else 2) * forward
    if name != "dense":
        dense = build(groups=1)
        assert forward * convolution.groups == flops(lambda: dense(image))
        convolution = dense
    with FlopCounterMode(display=False) as torchs:
        convolution(image).sum().backward()
    assert flops(lambda: convolution(image).sum().backward()) == torchs.get_total_flops()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_flops_are_torchs_own_in_every_mode(mode: Any) -> None:
    model, image = nn.TransformerEncoderLayer(16, 2), torch.randn(5, 2, 16)
    with mode():
        with FlopCounterMode(display=False) as torchs:
            model(image)
        assert flops(lambda: model(image)) == torchs.get_total_flops() > 0


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_view_of_a_parameter_that_enters_the_streamed_part(mode: Any) -> None:
    """Torch's counter fails on it under `torch.no_grad`."""
    model = Body(lambda m, x: F.conv2d(x, m.p.view(4, 3, 3, 3)), p=nn.Parameter(torch.randn(4, 27)))
    with mode():
        estimate = fxstream.analyze(model).estimate((1, 3, 64, 64), 16)
        assert estimate.flops == Counted(model, (1, 3, 64, 64), 16).flops


def test_an_estimate_of_a_small_model_takes_less_than_a_second() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3)).eval()
    analysis = fxstream.analyze(model)
    model.to("meta")(torch.empty(1, 3, 9, 9, device="meta"))  # torch imports its compiler for the first batch norm
    begin = time.process_time()
    analysis.estimate((1, 3, 4096, 4096), 64)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area"])
def test_a_model_that_resamples_is_estimated(mode: str) -> None:
    """The estimate is made on the meta device, of which autocast knows nothing."""
    model = Body(
        lambda m, x: m.last(F.interpolate(m.first(x), size=(29, 17), mode=mode)),
        first=nn.Conv2d(3, 3, 3),
        last=nn.Conv2d(3, 3, 3),
    )
    assert fxstream.analyze(model).estimate((1, 3, 13, 11), 8).flops > 0
