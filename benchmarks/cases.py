"""The networks that `compare.py` measures, and what a case of a measurement is. It is imported, not run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

MODES = ("training", "inference")
PLACES = ("device", "host")
"""Where the image may be: with the network, or in host memory."""


@dataclass(frozen=True)
class Case:
    """One step of a network on one square image, run in one way."""

    model: str
    size: int
    mode: str
    way: str
    tile: int | None = None
    autocast: str | None = None
    """The dtype of autocast around the forward pass, if there is autocast."""
    image_on: str = "device"

    @property
    def label(self) -> str:
        return self.way if self.tile is None else f"{self.way}, tile {self.tile}"


class Network(nn.Module):
    """A convolutional trunk, which can be streamed, followed by a head."""

    def __init__(self, trunk: nn.Module, head: nn.Module):
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(image))


class UNet(nn.Module):
    """A U-Net of four levels with two padded convolutions each, down and up. Its output is as large as the image.

    The outermost level has `width` channels, and each further level has `growth` times as many.
    """

    def __init__(self, width: int = 16, levels: int = 4, growth: int = 2):
        super().__init__()
        widths = [width * growth**level for level in range(levels + 1)]
        self.down = nn.ModuleList(_double(*pair) for pair in zip([3, *widths], widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        self.widen = nn.ModuleList(nn.ConvTranspose2d(below, width, 2, stride=2) for width, below in pairwise(widths))
        self.up = nn.ModuleList(_double(2 * width, width) for width in widths[:-1])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skips = [self.down[0](image)]
        for block in self.down[1:]:
            skips.append(block(self.pool(skips[-1])))
        value = skips.pop()
        for widen, block in zip(reversed(self.widen), reversed(self.up), strict=True):
            value = block(torch.cat([skips.pop(), widen(value)], dim=1))
        return value


def _double(channels: int, width: int) -> nn.Sequential:
    convolutions = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
    return nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU())


def _notebook() -> Network:
    """The network of the notebook that was published with StreamingCNN. It has no padding."""
    layers: list[nn.Module] = []
    for channels in (3, 16, 16):
        layers += [nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.MaxPool2d(2)]
    return _classifier(nn.Sequential(*layers), 16)


def _resnet(name: str) -> Network:
    import torchvision  # imported here, since that takes seconds and not every network needs it

    model = torchvision.models.get_model(name)
    layers = (model.layer1, model.layer2, model.layer3, model.layer4)
    return _classifier(_flat(model.conv1, model.bn1, model.relu, model.maxpool, *layers), model.fc.in_features)


def _convnext() -> Network:
    import torchvision

    return _classifier(_flat(torchvision.models.convnext_tiny().features), 768)


def _densenet() -> Network:
    import torchvision

    features = torchvision.models.densenet121().features
    return _classifier(nn.Sequential(*features, nn.ReLU()), 1024)


def _classifier(trunk: nn.Module, channels: int) -> Network:
    return Network(trunk, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)))


def _flat(*modules: nn.Module) -> nn.Sequential:
    """One sequence instead of nested ones, so that checkpoint_sequential can cut it between blocks."""
    found: list[nn.Module] = []
    for module in modules:
        found += _flat(*module) if isinstance(module, nn.Sequential) else [module]
    return nn.Sequential(*found)


MODELS: dict[str, Callable[[], Network]] = {
    "notebook": _notebook,
    "resnet18": lambda: _resnet("resnet18"),
    "resnet34": lambda: _resnet("resnet34"),
    "resnet50": lambda: _resnet("resnet50"),
    "convnext_tiny": _convnext,
    "densenet121": _densenet,
    "unet": lambda: Network(UNet(), nn.Conv2d(16, 2, 1)),
}
