"""Counter-examples to axis tracking: each was a wrong result, a crash, or a refusal of something local."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import randomise
from torch import nn

import fxstream
from fxstream.testing import compare

pytestmark = pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")

BATCH = (2, None, None, None)
Body = Callable[[Any, torch.Tensor], Any]


class Net(nn.Module):
    def __init__(self, body: Body, norm: nn.Module | None = None):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2)
        self.linear = nn.Linear(8, 8)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1))
        self.token = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.map = nn.Parameter(torch.rand(3, 2, 13, 13))
        self.norm = norm or nn.Identity()
        self.body = body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, self.conv(x))


def make(body: Body, norm: nn.Module | None = None) -> nn.Module:
    return randomise(Net(body, norm)).double()


def gated(m: Any, x: torch.Tensor) -> Any:
    """One channel, broadcast to 8 by a parameter."""
    return x.mean(1, keepdim=True) * m.gamma


@pytest.mark.parametrize("tile", [3, (None, 4), BATCH], ids=str)
@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x * x.var(1, False).unsqueeze(1),
        lambda m, x: torch.std(x, (1,), False),
        lambda m, x: x.var(False),
        lambda m, x: x.mean(1, keepdims=True),
    ],
    ids=["var", "std", "var of all", "keepdims"],
)
def test_positional_and_renamed_options_of_reductions(body: Body, tile: Any) -> None:
    model = make(body)
    compare(model, fxstream.convert(model, tile), torch.randn(3, 3, 13, 11))


@pytest.mark.parametrize("tile", [3, (None, 4), BATCH], ids=str)
@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: gated(m, x).chunk(2, 1),
        lambda m, x: gated(m, x).unbind(1),
        lambda m, x: (gated(m, x), gated(m, x).shape[1]),
        lambda m, x: gated(m, x).squeeze(1),
        lambda m, x: torch.cat([gated(m, x), x], 1).chunk(2, 1),
        lambda m, x: gated(m, x).reshape(x.shape[0], 2, 4, x.shape[2], x.shape[3]),
    ],
    ids=["chunk", "unbind", "size", "squeeze", "cat", "reshape"],
)
def test_a_tensor_that_broadcasts_a_value_to_more_channels(body: Body, tile: Any) -> None:
    model = make(body)
    compare(model, fxstream.convert(model, tile), torch.randn(3, 3, 13, 11))


@pytest.mark.parametrize("tile", [3, (None, 4), (3, None), BATCH], ids=str)
@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x.view(x.size(0), 8, -1).mean(-1),
        lambda m, x: m.linear(x.permute(0, 2, 3, 1).reshape(-1, 8)),
        lambda m, x: m.linear(x.permute(0, 2, 3, 1).reshape(x.size(0), -1, 8)),
        lambda m, x: x.permute(0, 2, 1, 3).reshape(-1, 8, x.size(3)).softmax(1),
        lambda m, x: x.view(x.size(0), 8, x.size(3), x.size(2)),
    ],
    ids=["positions", "all rows", "tokens", "rows as batch", "swapped"],
)
def test_a_reshape_that_is_not_local_is_left_to_the_head(body: Body, tile: Any) -> None:
    model = make(body)
    compare(model, fxstream.convert(model, tile), torch.randn(3, 3, 13, 11))


@pytest.mark.parametrize("tile", [3, BATCH], ids=str)
def test_the_shape_of_a_value_is_a_torch_size(tile: Any) -> None:
    model = make(lambda m, x: (x / x.shape[2:].numel(), x.size()))
    compare(model, fxstream.convert(model, tile), torch.randn(3, 3, 13, 11))


@pytest.mark.parametrize("tile", [3, (None, 4), (3, None)], ids=str)
def test_a_single_row_expanded_to_the_extent_of_another_value(tile: Any) -> None:
    model = make(lambda m, x: m.down(x).expand(-1, -1, x.shape[2], x.shape[3]))
    converted = fxstream.convert(model, tile)
    try:
        got = converted(torch.randn(3, 3, 3, 3).double())
    except fxstream.StreamingError:
        return
    assert got.shape == (3, 8, 3, 3)


def test_a_token_expanded_to_the_extents_of_two_values() -> None:
    model = make(lambda m, x: m.token.expand(-1, -1, x.shape[2], m.down(x).shape[3]))
    compare(model, fxstream.convert(model, 3), torch.randn(3, 3, 13, 13))


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x.split(x.shape[2] // 2, 1),
        lambda m, x: x.chunk(x.shape[2] % 3 + 1, 1),
        lambda m, x: torch.cat([x, torch.zeros(0)], 1),
    ],
    ids=["split", "chunk", "cat"],
)
def test_what_a_rule_does_not_cover_is_left_to_the_head(body: Body) -> None:
    model = make(body)
    compare(model, fxstream.convert(model, 3), torch.randn(3, 3, 13, 13))


def test_instance_norm_takes_two_dimensions_for_one_image() -> None:
    model = make(lambda m, x: m.norm(x.mean((2, 3))), nn.InstanceNorm1d(8))
    compare(model, fxstream.convert(model, BATCH), torch.randn(3, 3, 13, 13))


@pytest.mark.parametrize(
    ("body", "norm"),
    [
        (lambda m, x: torch.cat([x, m.map], 1), None),
        (lambda m, x: x.mean(1, keepdim=True).mul_(m.gamma), None),
        (lambda m, x: x.split([2, 3], 1), None),
        (lambda m, x: x.unsqueeze(7), None),
        (lambda m, x: torch.stack([x, x], 9), None),
        (lambda m, x: m.norm(x), nn.BatchNorm1d(8).eval()),
    ],
    ids=["cat", "mul_", "split", "unsqueeze", "stack", "BatchNorm1d"],
)
def test_what_fails_in_the_plain_model_fails(body: Body, norm: nn.Module | None) -> None:
    model = make(body, norm)
    image = torch.randn(3, 3, 11, 13).double()
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        model(image)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        fxstream.convert(model, 3)(image)


def test_linear_with_one_output_drops_the_last_dimension() -> None:
    model = make(lambda m, x: F.linear(x.permute(0, 2, 3, 1), m.gamma.flatten()))
    compare(model, fxstream.convert(model, 3), torch.randn(3, 3, 13, 11))
