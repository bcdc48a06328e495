"""Reductions over whole streamed axes: exact in value and gradient, whatever is tied or not a number."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import reduce
from reference import assert_exact, each_once, handed_over
from torch import nn

import fxstream
from fxstream.ops import Local, Value, register
from fxstream.testing import compare, head

Operation = Callable[[torch.Tensor], Any]
TILES = [100, (None, 5), (4, 3), (2, 3, 4, 5), (1, None, 5, None)]


class Net(nn.Module):
    """Convolutions, and an operation on what they make."""

    def __init__(self, operation: Operation, channels: int = 5):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.operation = operation

    def forward(self, image: torch.Tensor) -> Any:
        return self.operation(self.second(self.first(image).relu()))


class Same(nn.Module):
    """An operation on the image, but for a parameter."""

    def __init__(self, operation: Operation):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, 1, 1))
        self.operation = operation

    def forward(self, image: torch.Tensor) -> Any:
        return self.operation(image + self.shift)


REDUCTIONS: dict[str, Operation] = {
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(1),
    "AdaptiveAvgPool2d((1, 1))": nn.AdaptiveAvgPool2d((1, 1)),
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(1),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 1),
    "avg_pool2d over the image": lambda x: F.avg_pool2d(x, x.shape[-2:]),
    "max_pool2d over the image": lambda x: F.max_pool2d(x, kernel_size=x.size()[2:], stride=1),
    "einops mean": lambda x: reduce(x, "b c h w -> b c", "mean"),
    "einops max, keepdim": lambda x: reduce(x, "b c h w -> b c 1 1", "max"),
    "einops sum of some": lambda x: reduce(x, "b c h w -> c", "sum"),
    "mean": lambda x: x.mean((2, 3)),
    "mean, keepdim": lambda x: torch.mean(x, [-1, -2], keepdim=True),
    "mean of all": lambda x: x.mean(),
    "mean of positions and channels": lambda x: x.mean((1, 2, 3)),
    "mean, dtype": lambda x: x.float().mean((2, 3), dtype=torch.double),
    "sum": lambda x: x.sum(dim=(-2, -1)),
    "sum of all": lambda x: torch.sum(x),
    "sum of counts": lambda x: (x.sum((2, 3)), (x > 0).sum((2, 3))),
    "amax": lambda x: x.amax((2, 3)),
    "amax of all": lambda x: torch.amax(x),
    "amin": lambda x: x.amin((2, 3), keepdim=True),
    "amax of counts": lambda x: (x.mean((2, 3)), (x * 3).int().amax((2, 3)), (x > 0).amin((2, 3))),
    "of ties": lambda x: x.relu().amax((2, 3)) + (x * 2).round().amin((2, 3)) + x.clamp(max=0.1).amax((2, 3)),
    "several": lambda x: torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1).flatten(1),
    "of several values": lambda x: x.mean((2, 3)) + x.sin().amax((2, 3)) + F.avg_pool2d(x, 2).sum((2, 3)),
}


@each_once(tile=TILES, name=REDUCTIONS)
def test_reductions_are_exact_and_nothing_whole_is_handed_over(name: str, tile: Any) -> None:
    converted = fxstream.convert(Net(REDUCTIONS[name]).double(), tile, prove=False)
    converted = assert_exact(Net(REDUCTIONS[name]), (4, 3, 19, 23), tile, last=handed_over(converted))
    image = torch.randn(4, 3, 19, 23, dtype=torch.double)
    handed = converted.streamed(image)
    for tensor in handed if isinstance(handed, tuple) else [handed]:
        assert tensor.numel() <= 4 * 5


@pytest.mark.parametrize("tile", [(4, 5), (None, 5), (3, None), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dim", [2, 3, (0, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("name", ["mean", "sum", "amax"])
def test_reductions_over_some_axes_keep_the_others(name: str, dim: Any, tile: Any) -> None:
    model = Net(lambda x: (getattr(torch, name)(x, dim), x.amin((2, 3))))
    compare(model.double(), fxstream.convert(model.double(), tile), torch.randn(4, 3, 19, 23))


def test_one_and_three_spatial_axes() -> None:
    for conv, pools, size in (
        (nn.Conv1d, (nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d), (41,)),
        (nn.Conv3d, (nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d), (9, 11, 7)),
    ):
        for pool in pools:
            assert_exact(nn.Sequential(conv(2, 4, 3), pool(1), nn.Flatten()), (2, 2, *size), 4, last="_1")


@pytest.mark.parametrize("tile", [2, (1, 7), (None, 2), 50], ids=str)
def test_of_equal_values_the_first_in_raster_order_gets_the_gradient_of_max_pooling(tile: Any) -> None:
    """The tile that comes first need not hold it: tiles are not in raster order of their positions."""
    model = Same(nn.AdaptiveMaxPool2d(1)).double()
    converted = fxstream.convert(model, tile, example_input=torch.zeros(1, 3, 5, 7))
    for places in ([(1, 0), (0, 6)], [(0, 3), (0, 2), (4, 0)], [(4, 6), (4, 5)]):
        image = torch.zeros(1, 3, 5, 7, dtype=torch.double)
        for place in places:
            image[:, 1:, place[0], place[1]] = 1
        compare(model, converted, image)
        leaf = image.requires_grad_()
        converted(leaf).sum().backward()
        assert leaf.grad[0, 1].nonzero().tolist() == [list(min(places))]


@pytest.mark.parametrize("tile", [2, (1, 7), (None, 2), 50], ids=str)
@pytest.mark.parametrize("places", [[(0, 0)], [(4, 6)], [(1, 5), (3, 0)], [(3, 2), (2, 6), (2, 1)]], ids=str)
@pytest.mark.parametrize("name", ["AdaptiveMaxPool2d", "amax", "amin", "mean"])
def test_not_a_number_and_infinities(name: str, places: list[tuple[int, int]], tile: Any) -> None:
    model = Same(REDUCTIONS[name]).double()
    converted = fxstream.convert(model, tile, example_input=torch.zeros(1, 3, 5, 7))
    image = torch.randn(2, 3, 5, 7, dtype=torch.double)
    for (row, column), value in zip(places, (math.nan, math.nan, math.inf), strict=False):
        image[0, 0, row, column] = value
    image[0, 1], image[0, 2], image[1, 0] = math.nan, -math.inf, math.inf
    compare(model, converted, image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mean", "sum", "AdaptiveAvgPool2d", "amax"])
def test_half_precision_is_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    """Partial sums in half precision would stagnate: of 4,096 ones, bfloat16 counts 256."""
    model = Same(REDUCTIONS[name]).to(dtype)
    converted = fxstream.convert(model, 4, example_input=torch.zeros(1, 3, 5, 7))
    image = torch.ones(1, 3, 64, 64, dtype=dtype)
    assert torch.equal(converted(image), model(image))
    assert converted(image).dtype == dtype


@pytest.mark.parametrize("name", ["mean", "sum", "amax", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d"])
def test_autocast_gives_the_dtypes_of_the_plain_model(name: str) -> None:
    model = Net(REDUCTIONS[name])
    converted = fxstream.convert(model, 8)
    found = []
    for net in (model, converted):
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = net(torch.linspace(-1, 1, 3 * 40 * 40).view(1, 3, 40, 40))
        output.float().square().sum().backward()
        found.append((output, model.second.weight.grad.clone()))
    (plain, gradient), (streamed, streamed_gradient) = found
    assert streamed.dtype == plain.dtype
    torch.testing.assert_close(streamed, plain, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(streamed_gradient, gradient, rtol=0.1, atol=0.02 * gradient.abs().max().item())


def test_what_the_head_gets_in_any_case_is_reduced_there() -> None:
    """Squeeze-and-excitation reads a value twice: whole, and its mean."""
    model = Net(lambda x: (x * x.mean((2, 3), keepdim=True).sigmoid(), x.sin().amax((2, 3))))
    converted = assert_exact(model, (2, 3, 19, 23), 5, last=["second", "amax"])
    assert head(converted) == ["mean", "sigmoid", "mul"]
    kinds = {finding.node.name: finding.status for finding in fxstream.analyze(model).findings}
    assert (kinds["mean"], kinds["amax"]) == ("stop", "total")


def test_a_reduction_of_the_image_itself_streams_nothing() -> None:
    with pytest.raises(fxstream.NothingToStreamError, match="takes the mean along the streamed H and W"):
        fxstream.convert(nn.Sequential(Mean(), nn.Conv2d(3, 4, 1)), 4)


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3), keepdim=True)


def test_values_that_are_overwritten_after_they_were_reduced() -> None:
    def operation(x: torch.Tensor) -> torch.Tensor:
        before = x.mean((2, 3))
        return before + x.relu_().amax((2, 3))

    model = Net(operation).double()
    compare(model, fxstream.convert(model, 5), torch.randn(1, 3, 19, 23))


def test_a_result_that_the_head_overwrites() -> None:
    model = Net(lambda x: x.sum((2, 3)).add_(1) * x.mean((2, 3)).mul_(2)).double()
    compare(model, fxstream.convert(model, 5), torch.randn(2, 3, 19, 23))


def _maximum_and_mean(x: torch.Tensor) -> torch.Tensor:
    """A lambda could not be pickled."""
    return x.amax((2, 3)) + x.mean((2, 3))


def _through_torch_save(model: nn.Module, file: Path) -> Any:
    torch.save(model, file)
    return torch.load(file, weights_only=False)


def _through_pickle(model: nn.Module, file: Path) -> Any:
    file.write_bytes(pickle.dumps(model))
    return pickle.loads(file.read_bytes())


def _deep_copy(model: nn.Module, file: Path) -> Any:
    return copy.deepcopy(model)


@pytest.mark.parametrize("duplicate", [_deep_copy, _through_pickle, _through_torch_save])
def test_copies_files_and_another_tile_shape(duplicate: Callable[[nn.Module, Path], Any], tmp_path: Path) -> None:
    model = Net(_maximum_and_mean).double()
    converted = duplicate(fxstream.convert(model, 5), tmp_path / "model")
    assert handed_over(converted) == ["amax", "mean"]
    for tile_shape in (5, (3, 7)):
        converted.tile_shape = tile_shape
        compare(model, converted, torch.randn(2, 3, 19, 23))


def test_several_backward_passes_and_partial_ones() -> None:
    model = Net(REDUCTIONS["of ties"]).double()
    image = torch.randn(2, 3, 19, 23, dtype=torch.double)
    output = fxstream.convert(model, 5)(image)
    first = torch.autograd.grad(output[0].sum(), model.second.weight, retain_graph=True)
    again = torch.autograd.grad(output[0].sum(), model.second.weight, retain_graph=True)
    rest = torch.autograd.grad(output[1].sum(), model.second.weight)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    (whole,) = torch.autograd.grad(model(image).sum(), model.second.weight)
    torch.testing.assert_close(first[0] + rest[0], whole)


@pytest.mark.parametrize("budget", [10_000, 30_000, "1GiB"])
def test_within_a_memory_budget(budget: Any) -> None:
    model = Net(REDUCTIONS["of ties"]).double()
    compare(model, fxstream.convert(model, 5, memory_budget=budget), torch.randn(2, 3, 19, 23))


def wobbling(x: torch.Tensor) -> torch.Tensor:
    return x


@register(wobbling)
def _wobbling(x: Value) -> Local:
    """Gives other values in the backward pass, as operations do that are not deterministic."""
    return Local((x,), x.dims, lambda block: block * (1 + 1e-9 * torch.is_grad_enabled()))


def test_an_extreme_value_keeps_its_gradient_if_the_recomputed_one_differs() -> None:
    model = Same(lambda x: wobbling(x).amax((2, 3))).double()
    image = torch.randn(2, 3, 19, 23, dtype=torch.double, requires_grad=True)
    fxstream.convert(model, 5, example_input=image)(image).sum().backward()
    expected = torch.autograd.grad(image.amax((2, 3)).sum(), image)
    torch.testing.assert_close((image.grad,), expected)


def test_tied_values_that_the_recomputation_parts_are_an_error() -> None:
    model = Same(lambda x: wobbling(x).amax((2, 3))).double()
    image = torch.ones(2, 3, 19, 23, dtype=torch.double, requires_grad=True)
    output = fxstream.convert(model, 5, example_input=image)(image)
    with pytest.raises(fxstream.StreamingError, match="wobbling: several positions share"):
        output.sum().backward()


def test_the_table_says_what_is_accumulated() -> None:
    text = str(fxstream.analyze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())))
    assert "they hand over _1." in text
    assert "1 pools over the whole image along H and W, and is accumulated tile by tile." in text
