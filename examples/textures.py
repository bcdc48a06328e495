"""The network, the data set and the command line that the training examples share. It is imported, not run."""

from __future__ import annotations

import argparse
from pathlib import Path

import skimage.data
import torch
import torchvision
from torch import nn
from torch.utils.data import Dataset

CLASSES = ("brick", "grass", "gravel")
BATCH = 4


def network() -> nn.Module:
    """A resnet18 for three classes, with the same weights at every call."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=len(CLASSES), zero_init_residual=True)


class Textures(Dataset[tuple[torch.Tensor, int]]):
    """Random crops of three of scikit-image's textures, enlarged to (3, size, size), and the class of the texture.

    A crop depends only on its index. The textures have equal brightness and contrast.
    """

    def __init__(self, length: int, size: int):
        self.length = length
        self.size = size
        photographs = (torch.from_numpy(getattr(skimage.data, name)()).float() for name in CLASSES)
        self.photographs = [(pixels - pixels.mean()) / pixels.std() for pixels in photographs]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        target, top, left = (int(torch.randint(n, (), generator=generator)) for n in (len(CLASSES), 384, 384))
        crop = self.photographs[target][None, None, top : top + 128, left : left + 128]
        image = nn.functional.interpolate(crop, size=(self.size, self.size), mode="bilinear")
        return image[0].expand(3, -1, -1), target


def arguments(description: str | None) -> argparse.Namespace:
    """The command line that the training examples have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", type=int, default=256, help="height and width of an image in pixels")
    parser.add_argument("--tile", type=int, default=128, help="tile size in pixels")
    parser.add_argument("--save", type=Path, metavar="FILE", help="where to save the state dict of the trained model")
    return parser.parse_args()
