"""Tensors that a model makes of sizes and types of its values, where they leave the streamed part or change type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import Body, assert_exact, handed_over, pair, randomise
from torch import nn

import fxstream
from fxstream.testing import compare

pytestmark = pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")


def _net(body: Callable[[Any, torch.Tensor], Any]) -> nn.Module:
    parts = {"first": nn.Conv2d(2, 4, 3, padding=1), "scale": nn.Parameter(torch.ones(4, 1, 1))}
    return randomise(Body(lambda m, x: body(m, m.first(x)), **parts))


def _sorted(y: torch.Tensor) -> torch.Tensor:
    """An operation that does not stream."""
    return y.flatten(1).sort(1).values


@pytest.mark.parametrize(
    "body",
    [
        lambda m, y: _sorted(y) * y.new_tensor(2.0),
        lambda m, y: _sorted(y).sum() * (m.scale * y.shape[2]).exp(),
        lambda m, y: _sorted(y).sum() * m.scale.view(1, y.shape[1], 1, 1),
        lambda m, y: _sorted(y).sum() * torch.arange(y.shape[2]).double().add_(1),
        lambda m, y: (_sorted(y), torch.arange(y.shape[2]), m.scale.to(y), y.new_zeros(2, 2)),
        lambda m, y: y * y.new_full((4, 1, 1), y.shape[2]) + y.new_full(y.shape, y.shape[3]),
        lambda m, y: _sorted(y).sum() * torch.full((1,), y.shape[2] / 2, dtype=y.dtype),
    ],
)
@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_the_head_gets_tensors_made_of_sizes_and_types(body: Callable[..., Any], budget: str | None) -> None:
    plain, converted = pair(_net(body).double(), 4, memory_budget=budget)
    compare(plain, converted, torch.randn(2, 2, 9, 8))


def test_a_value_of_which_only_the_type_is_read_is_not_handed_over() -> None:
    model = _net(lambda m, y: (y.mean(1, True), torch.ones(3).to(y)))
    converted = fxstream.convert(model, 4)
    assert handed_over(converted) == ["mean", "to"]


def test_a_type_is_that_of_the_call() -> None:
    """The model is cast after the conversion, and runs under autocast."""
    model = _net(lambda m, y: y * y.new_tensor(2.0) + torch.ones(1, dtype=y.dtype))
    plain, converted = pair(model, 4)
    image = torch.randn(1, 2, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert converted(image).dtype == plain(image).dtype == torch.bfloat16
    assert converted.double()(image.double()).dtype == torch.float64


def test_coordinates_of_a_smaller_map() -> None:
    def body(m: Any, y: torch.Tensor) -> torch.Tensor:
        y = F.avg_pool2d(y, 2, ceil_mode=True)
        h, w = y.shape[-2:]
        down = torch.linspace(0, 1, h, dtype=y.dtype).view(1, 1, h, 1)
        return torch.cat([y * down, torch.zeros_like(y[:, :1]) + torch.arange(w, device=y.device) / (w - 1)], 1)

    for shape in ((2, 2, 19, 23), (2, 2, 6, 7)):
        assert_exact(_net(body), shape, 4, whole=True)
        assert_exact(_net(body), shape, (1, None, None, 3), whole=True)


def test_the_type_of_a_value_of_another_size_is_refused_with_the_way_out() -> None:
    model = _net(lambda m, y: F.avg_pool2d(y, 2) * torch.ones(1).to(y))
    reasons = [stop.reason for stop in fxstream.analyze(model).stops]
    assert reasons == ["mul uses the type of a value of another size. Way out: name the type."]
    assert_exact(model, (1, 2, 9, 8), 4, last=["avg_pool2d", "to"])


def test_a_parameter_indexed_by_a_tensor_that_is_made_of_sizes_gets_its_gradient() -> None:
    """Such as a table of relative positions, of which only those of a smaller window are used."""

    def biased(m: Any, y: torch.Tensor) -> torch.Tensor:
        index = torch.arange(y.shape[1]) % 3
        return y + m.scale[index] + m.scale[[0, 1], 0].sum() * m.scale[index, 0].view(-1, 1, 1)

    assert_exact(_net(biased).double(), (2, 2, 9, 8), 4, whole=True)


def _as_large_as_a_map_without_channels(m: Any, y: torch.Tensor) -> torch.Tensor:
    """The maps of some encoders have no channels, since they are made only for their size."""
    none = torch.empty(y.shape[0], 0, y.shape[2] // 2, y.shape[3] // 2, dtype=y.dtype)
    small = F.interpolate(F.max_pool2d(y, 4), size=(none.shape[2], none.size(3)))
    return m.scale * torch.cat([small, none], 1)


@pytest.mark.parametrize(
    ("dtype", "last"),
    [(torch.double, "mul"), (torch.float, "max_pool2d")],
    ids=["known dtype", "dtype read at a call"],
)
def test_the_sizes_of_a_map_that_is_made_for_its_size(dtype: torch.dtype, last: str) -> None:
    """An example of another dtype than the model's does not tell the dtype of the map."""
    model, example = _net(_as_large_as_a_map_without_channels).double(), torch.randn(2, 2, 24, 16, dtype=dtype)
    plain, converted = pair(model, 4, example_input=example)
    assert last in handed_over(converted)
    for shape in ((2, 2, 13, 18), (1, 2, 21, 16)):
        compare(plain, converted, torch.randn(shape))
