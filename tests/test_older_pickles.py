"""Converted models that an older fxstream has pickled still load.

`data/converted_before_folders.pt` was written at commit ad699ae, when the package had no folders, by

    tiles = fxstream.convert(model, (16, None), freeze_batchnorm=True)
    auto = fxstream.convert(model, "auto", memory_budget="1MB", freeze_batchnorm=True)
    torch.save([tiles, auto], path)

with the model below, in float64.
"""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from reference import freeze_batchnorms
from torch import nn

import fxstream
from fxstream.testing import compare

PICKLE = Path(__file__).parent / "data" / "converted_before_folders.pt"
LAYERS = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 2, 3)]
MODEL = nn.Sequential(*LAYERS, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()


@pytest.fixture(params=[0, 1], ids=["tiles", "auto"])
def loaded(request: pytest.FixtureRequest) -> torch.fx.GraphModule:
    return torch.load(PICKLE, weights_only=False)[request.param]


def test_it_computes_what_its_model_computes(loaded: torch.fx.GraphModule) -> None:
    MODEL.load_state_dict(loaded.state_dict())
    freeze_batchnorms(MODEL)
    compare(MODEL, loaded, torch.randn(2, 3, 41, 33))


def test_its_settings_are_those_that_it_was_converted_with() -> None:
    tiles, auto = torch.load(PICKLE, weights_only=False)
    assert (tiles.tile_shape, tiles.memory_budget) == ((None, None, 16, None), 0)
    assert (auto.tile_shape, auto.memory_budget) == ("auto", 1_000_000)
    with pytest.raises(fxstream.TileShapeError):
        tiles.tile_shape = (16, 16)


def test_what_its_graph_takes_for_granted_is_still_checked(loaded: torch.fx.GraphModule) -> None:
    loaded.get_submodule("0").register_forward_hook(lambda *_: None)
    with pytest.raises(fxstream.HookError, match=r"^0 has acquired a hook"):
        loaded(torch.randn(1, 3, 20, 20, dtype=torch.float64))


def test_it_can_be_pickled_again(loaded: torch.fx.GraphModule) -> None:
    file = io.BytesIO()
    torch.save(loaded, file)
    assert b"OldSettings" not in file.getvalue()
    file.seek(0)
    again = torch.load(file, weights_only=False)
    image = torch.randn(1, 3, 30, 30, dtype=torch.float64)
    assert torch.equal(again(image), loaded(image))
