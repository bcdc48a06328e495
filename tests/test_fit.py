"""tile_shape="auto": tiles that fit a memory budget, exact as any others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import flops
from torch import nn

import fxstream
from fxstream.memory.fit import Fit
from fxstream.memory.live import LiveBytes
from fxstream.model import streamed
from fxstream.testing import compare

MIB = 2**20


def net() -> nn.Module:
    """Whose activations take 90 MiB on an image of 640 x 512, and whose parameters nearly nothing."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def peak(converted: nn.Module, image: torch.Tensor) -> int:
    """Live bytes of a step, at most, the image aside."""
    with LiveBytes() as live:
        output = converted(image)
        if output.requires_grad:
            output.sum().backward()
    return live.peak


@pytest.mark.parametrize("budget", [16 * MIB, 40 * MIB, 100 * MIB, "1GiB"])
def test_a_training_step_stays_within_its_budget(budget: Any) -> None:
    converted = fxstream.convert(net(), "auto", memory_budget=budget)
    assert peak(converted, torch.randn(1, 3, 640, 512)) <= converted.memory_budget


def test_a_budget_that_suffices_for_everything_costs_no_recomputation() -> None:
    model = net()
    converted = fxstream.convert(model, "auto", memory_budget="1GiB")
    image = torch.randn(1, 3, 256, 200)
    plain = flops(lambda: model(image).sum().backward())
    assert flops(lambda: converted(image).sum().backward()) == plain


def test_tiles_grow_with_the_budget_and_shrink_with_the_image() -> None:
    def edge(budget: int, size: int) -> int:
        converted = fxstream.convert(net(), "auto", memory_budget=budget * MIB)
        call, _ = converted.streamed.checked_call(torch.empty(1, 3, size, size))
        return max(call.tiles)

    edges = [edge(budget, 512) for budget in (10, 25, 70)]
    assert edges[0] < edges[1] < edges[2]
    assert edge(25, 1024) < edges[1]


@pytest.mark.parametrize("shape", [(1, 3, 303, 261), (2, 3, 90, 147)], ids=str)
def test_it_is_exact(shape: tuple[int, ...]) -> None:
    model = net().double()
    converted = fxstream.convert(copy.deepcopy(model), "auto", memory_budget=30 * MIB)
    compare(model, converted, torch.randn(shape))


def test_inference_needs_less() -> None:
    converted = fxstream.convert(net(), "auto", memory_budget=7 * MIB)
    image = torch.randn(1, 3, 640, 512)
    with torch.no_grad():
        assert peak(converted, image) <= converted.memory_budget
    with pytest.raises(fxstream.MemoryBudgetError, match=r"takes \d+ bytes in tiles of .* and the memory_budget is"):
        converted(image)


def test_it_is_chosen_once_for_images_of_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr(streamed, "fitted", lambda call, tensors: chosen.append(call.shape) or Fit((16, 16), 0))
    converted = fxstream.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), "auto", memory_budget=10 * MIB)
    for size in (20, 20, 30, 20):
        converted(torch.randn(1, 3, size, size))
    assert chosen == [(1, 3, 20, 20), (1, 3, 30, 30)]
    with torch.no_grad():
        converted(torch.randn(1, 3, 20, 20))
    assert len(chosen) == 3
    converted.get_parameter("0.weight").requires_grad_(False)
    converted(torch.randn(1, 3, 20, 20))
    assert len(chosen) == 4
    converted.eval()
    converted(torch.randn(1, 3, 20, 20))
    assert len(chosen) == 5


def test_what_is_remembered_of_many_sizes_of_images_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is forgotten."""
    monkeypatch.setattr(streamed, "MOST_FITS", 3)
    chosen: list[Any] = []
    monkeypatch.setattr(streamed, "fitted", lambda call, tensors: chosen.append(call.shape[2]) or Fit((16, 16), 0))
    converted = fxstream.convert(nn.Conv2d(3, 4, 3), "auto", memory_budget=10 * MIB)
    for size in (20, 21, 22, 23, 22, 20):
        converted(torch.randn(1, 3, size, 20))
    assert chosen == [20, 21, 22, 23, 20]
    assert len(converted.streamed._fits) == 3


def test_random_numbers_are_those_of_the_call() -> None:
    """Choosing draws none."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout())
    image = torch.randn(1, 3, 40, 40)
    found = []
    for _ in range(2):
        converted = fxstream.convert(model, "auto", memory_budget=10 * MIB)
        torch.manual_seed(1)
        found += [converted(image), converted(image)]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_setting_it_later_and_copies() -> None:
    model = nn.Conv2d(3, 4, 3)
    converted = fxstream.convert(model, 8, memory_budget=10 * MIB)
    converted.tile_shape = "auto"
    assert converted.tile_shape == copy.deepcopy(converted).tile_shape == "auto"
    assert "tile_shape=auto" in repr(converted)
    with pytest.raises(fxstream.TileShapeError, match="there is none"):
        converted.memory_budget = None
    converted.tile_shape = 4
    converted.memory_budget = None
    assert converted.tile_shape == (None, None, 4, 4)


def test_what_needs_a_budget() -> None:
    with pytest.raises(fxstream.TileShapeError, match='Way out: memory_budget="4GiB"'):
        fxstream.convert(nn.Conv2d(3, 4, 3), "auto")
    with pytest.raises(fxstream.TileShapeError, match='must be "auto", a size'):
        fxstream.convert(nn.Conv2d(3, 4, 3), "large")
