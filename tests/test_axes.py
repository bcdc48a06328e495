"""Axis tracking: what is local along which axis, through permutations, reshapes, splits and sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from reference import Body, assert_exact, handed_over, randomise
from torch import nn

import fxstream
from fxstream.geometry.axes import Dim, Extent, Symbol, Value, reshaped
from fxstream.testing import compare

BATCH = (2, None, None, None)


# Reshapes, as integers.


def value(**sizes: int) -> Value:
    """Dimensions by name; those in capitals are streamed, except C."""
    return Value(tuple(Dim(name if name in "NHW" else None, size) for name, size in sizes.items()))


def tags(dims: list[Dim] | None) -> list[tuple[str | None, Any]] | None:
    return None if dims is None else [(dim.tag, dim.size) for dim in dims]


def test_channels_split_and_merged_between_streamed_axes() -> None:
    x = value(N=2, C=12, H=5, W=7)
    n, h, w = x.size(0), x.size(2), x.size(3)
    split = [("N", 2), (None, 3), (None, 4), ("H", 5), ("W", 7)]
    assert tags(reshaped(x.dims, [n, 3, 4, h, w])) == split
    assert tags(reshaped(x.dims, [n, 3, -1, h, w])) == split
    assert tags(reshaped(x.dims, [-1, 3, 4, h, w])) == split
    assert tags(reshaped(x.dims, [n, 3, 4, -1, w])) == split


@pytest.mark.parametrize(
    "sizes",
    [
        lambda n, h, w: [n, 12, 35],  # merges H and W
        lambda n, h, w: [n, 12, int(h), w],  # the number of rows is not known to be the rows
        lambda n, h, w: [n, 12, w, h],  # swaps them
        lambda n, h, w: [n, h, 12, w],  # moves one
        lambda n, h, w: [n, 11, h, w],  # does not fit
        lambda n, h, w: [n, h, w],
        lambda n, h, w: [-1, 12, 5, 7],
    ],
)
def test_reshapes_that_touch_a_streamed_axis(sizes: Callable[..., list[int]]) -> None:
    x = value(N=2, C=12, H=5, W=7)
    assert reshaped(x.dims, sizes(x.size(0), x.size(2), x.size(3))) is None


def test_the_extent_of_another_value_is_not_this_values() -> None:
    x, smaller = value(C=4, H=8), value(C=4, H=4)
    assert reshaped(x.dims, [2, 2, smaller.size(1)]) is None
    assert tags(reshaped(x.dims, [2, 2, x.size(1)])) == [(None, 2), (None, 2), ("H", 8)]
    assert isinstance(x.size(1), Extent)


def test_symbolic_sizes_are_those_of_their_own_dimension() -> None:
    x = Value((Dim(None, Symbol()), Dim(None, 8), Dim("H", Symbol())))
    other = Value((Dim("H", Symbol()),))
    assert reshaped(x.dims, [x.size(0), 2, 4, x.size(2)]) is not None
    assert reshaped(x.dims, [x.size(0), 2, 4, other.size(0)]) is None


# Networks that stream whole.


Function = Callable[[Any, torch.Tensor], Any]


def between_convolutions(body: Function) -> nn.Module:
    model = Body(
        lambda m, x: m.out(body(m, m.conv(x))),
        conv=nn.Conv2d(3, 8, 3, stride=2, padding=1),
        out=nn.Conv2d(8, 4, 3, padding=1),
        norm=nn.LayerNorm(8),
        linear=nn.Linear(8, 8),
        gamma=nn.Parameter(torch.rand(8)),
        token=nn.Parameter(torch.rand(1, 1, 8)),
    )
    return randomise(model)


def _channels_last(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.linear(F.gelu(m.norm(x.permute(0, 2, 3, 1)))) * m.gamma
    return x + y.permute(0, 3, 1, 2)


def _moved(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.movedim(x, 1, -1).softmax(-1)
    return torch.movedim(y, (3, 1), (1, 2)).transpose(2, 3).swapaxes(-1, -2)


def _shuffled(m: Any, x: torch.Tensor) -> torch.Tensor:
    b, c, h, w = x.size()
    y = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous()
    return y.view(b, -1, h, w)


def _halves(m: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=1)
    c, d, e = torch.split(x, [1, 3, 4], 1)
    return torch.cat([a * b.sigmoid(), torch.cat([d, c], 1)], 1) + F.pad(e, (0, 0, 0, 0, 0, 4))


def _stacked(m: Any, x: torch.Tensor) -> torch.Tensor:
    parts = x.unbind(1)
    y = torch.stack([parts[0], parts[-1]], -1).mean(-1, keepdim=True)
    return x * y.permute(0, 3, 1, 2) + x.unflatten(1, (4, 2)).flatten(1, 2)


def _squeezed(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x.mean(1, keepdim=True).squeeze(1).unsqueeze(-1)
    return x + y.expand(-1, -1, -1, 8).permute(0, 3, 1, 2) + F.glu(torch.cat([x, x], 1), 1)


def _sizes(m: Any, x: torch.Tensor) -> torch.Tensor:
    h, w = x.shape[-2:]
    return F.pad(x, (0, (-w) % 4, 0, (-h) % 4)) / (h * w) + x.dim()


def _normed(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=1) + F.local_response_norm(x, 3) - x.var(1, keepdim=True) + x.logsumexp(1, True)


STREAMED = [_channels_last, _moved, _shuffled, _halves, _stacked, _squeezed, _sizes, _normed]


@pytest.mark.parametrize("tile", [3, (None, 4), (1, None, 8, None), BATCH], ids=str)
@pytest.mark.parametrize("body", STREAMED)
def test_tags_are_followed(body: Callable[[Any, torch.Tensor], Any], tile: Any) -> None:
    assert_exact(between_convolutions(body), (3, 3, 19, 23), tile, whole=True)


# What spans a streamed axis ends the prefix, and only along that axis.


def _rows_last(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x.softmax(2) * x


def _merged(m: Any, x: torch.Tensor) -> torch.Tensor:
    b, c, h, w = x.shape
    return x.flatten(2).softmax(1).reshape(b, c, h, w)


def _excited(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x * m.linear(x.mean((2, 3))).sigmoid()[:, :, None, None]


def _grouped(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, 2)


def _tokens(m: Any, x: torch.Tensor) -> torch.Tensor:
    b = x.shape[0]
    y = torch.cat([m.token.expand(b, -1, -1), x.flatten(2).transpose(1, 2)], 1)
    return x * m.norm(y)[:, 0][:, :, None, None]


SPANNING = [_rows_last, _merged, _excited, _grouped, _tokens]


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("body", SPANNING)
def test_what_spans_the_image_streams_along_the_batch_alone(body: Function) -> None:
    model = between_convolutions(body)
    converted = assert_exact(model, (5, 3, 19, 23), BATCH, whole=True)
    assert converted.tile_shape == BATCH
    model = model.double()
    ended = fxstream.convert(model, 6)
    assert "out" not in handed_over(ended)
    compare(model, ended, torch.randn(2, 3, 19, 23))


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_an_axis_that_is_not_streamed_may_be_spanned() -> None:
    assert_exact(between_convolutions(_rows_last), (2, 3, 19, 23), (None, 4), whole=True)
    converted = fxstream.convert(between_convolutions(_rows_last), (4, None))
    assert handed_over(converted) == ["conv"]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.new_zeros(x.shape[0], 8, 1, 1),
        lambda x: x.new_full((x.shape[-1],), 0.5),
        lambda x: x.new_ones(x.size(3)),
    ],
)
def test_a_tensor_made_from_a_size_streams(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = between_convolutions(lambda m, x: x + make(x)).double()
    assert_exact(model, (2, 3, 19, 23), 4, whole=True)
    assert_exact(model, (2, 3, 19, 23), (1, None, None, None), whole=True)


def test_a_size_that_the_head_reads_does_not_drag_the_value_along() -> None:
    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, stride=2)
            self.last = nn.Conv2d(4, 4, 3, stride=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return F.adaptive_avg_pool2d(self.last(y), (y.shape[-2] // 4, x.shape[-1] // 8))

    converted = assert_exact(Resized(), (1, 3, 37, 41), 8, last=["last", "floordiv"])
    shapes = [v.shape for v in converted.streamed(torch.zeros(1, 3, 37, 41).double()) if isinstance(v, torch.Tensor)]
    assert shapes == [(1, 4, 4, 5)]


@pytest.mark.parametrize("tile", [(3, None), (None, 3), 3, (1, None, None, None)], ids=str)
@pytest.mark.parametrize("amounts", [(0, -2), (-2, 0), (-1, -1, -2, -1), (2, -1, -1, 2)], ids=str)
def test_padding_may_crop_axes_that_are_streamed_and_others(amounts: tuple[int, ...], tile: Any) -> None:
    model = Body(
        lambda m, x: m.second(F.pad(m.first(x), amounts)),
        first=nn.Conv2d(2, 4, 3, padding=1),
        second=nn.Conv2d(4, 4, 3, padding=1),
    )
    assert_exact(randomise(model), (2, 2, 9, 8), tile, whole=True)


# Reductions, broadcasts and sizes.


def behind_a_convolution(body: Function, norm: nn.Module | None = None) -> nn.Module:
    model = Body(
        lambda m, x: body(m, m.conv(x)),
        conv=nn.Conv2d(3, 8, 3, padding=1),
        down=nn.Conv2d(8, 8, 3, stride=2),
        linear=nn.Linear(8, 8),
        gamma=nn.Parameter(torch.rand(8, 1, 1)),
        token=nn.Parameter(torch.rand(1, 8, 1, 1)),
        map=nn.Parameter(torch.rand(3, 2, 13, 13)),
        norm=norm or nn.Identity(),
    )
    return randomise(model)


@pytest.mark.parametrize("tile", [3, (None, 4), BATCH], ids=str)
@pytest.mark.parametrize(
    ("body", "last"),
    [
        (lambda m, x: x * x.var(1, False).unsqueeze(1), "mul"),
        (lambda m, x: torch.std(x, (1,), False), "std"),
        (lambda m, x: x.var(False), "conv"),
        (lambda m, x: x.mean(1, keepdims=True), "mean"),
    ],
    ids=["var", "std", "var of all", "keepdims"],
)
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_positional_and_renamed_options_of_reductions(body: Function, last: str, tile: Any) -> None:
    assert_exact(behind_a_convolution(body), (3, 3, 13, 11), tile, last=last)


def _gated(m: Any, x: torch.Tensor) -> Any:
    """One channel, broadcast to 8 by a parameter."""
    return x.mean(1, keepdim=True) * m.gamma


@pytest.mark.parametrize("tile", [3, (None, 4), BATCH], ids=str)
@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: _gated(m, x).chunk(2, 1),
        lambda m, x: _gated(m, x).unbind(1),
        lambda m, x: (_gated(m, x), _gated(m, x).shape[1]),
        lambda m, x: _gated(m, x).squeeze(1),
        lambda m, x: torch.cat([_gated(m, x), x], 1).chunk(2, 1),
        lambda m, x: _gated(m, x).reshape(x.shape[0], 2, 4, x.shape[2], x.shape[3]),
    ],
    ids=["chunk", "unbind", "size", "squeeze", "cat", "reshape"],
)
def test_a_tensor_that_broadcasts_a_value_to_more_channels(body: Function, tile: Any) -> None:
    assert_exact(behind_a_convolution(body), (3, 3, 13, 11), tile, whole=True)


# A body; what the head gets where its reshape is not local; and along which axes it is local, with the last node.
RESHAPES: dict[str, tuple[Function, list[str], dict[Any, str]]] = {
    "positions": (lambda m, x: x.view(x.size(0), 8, -1).mean(-1), ["conv", "size"], {BATCH: "mean", (3, None): "mean"}),
    "all rows": (lambda m, x: m.linear(x.permute(0, 2, 3, 1).reshape(-1, 8)), ["permute"], {BATCH: "linear"}),
    "tokens": (
        lambda m, x: m.linear(x.permute(0, 2, 3, 1).reshape(x.size(0), -1, 8)),
        ["permute", "size"],
        {BATCH: "linear", (3, None): "linear"},
    ),
    "rows as batch": (
        lambda m, x: x.permute(0, 2, 1, 3).reshape(-1, 8, x.size(3)).softmax(1),
        ["permute", "size"],
        {(None, 4): "softmax", BATCH: "softmax"},
    ),
    "swapped": (
        lambda m, x: x.view(x.size(0), 8, x.size(3), x.size(2)),
        ["conv", "size", "size_1", "size_2"],
        {BATCH: "view"},
    ),
}


@pytest.mark.parametrize("tile", [3, (None, 4), (3, None), BATCH], ids=str)
@pytest.mark.parametrize("name", RESHAPES)
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_a_reshape_streams_along_the_axes_along_which_it_is_local(name: str, tile: Any) -> None:
    body, before, local = RESHAPES[name]
    assert_exact(behind_a_convolution(body), (3, 3, 13, 11), tile, last=local.get(tile, before))


@pytest.mark.parametrize("tile", [3, BATCH], ids=str)
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_the_shape_of_a_value_is_a_torch_size(tile: Any) -> None:
    model = behind_a_convolution(lambda m, x: (x / x.shape[2:].numel(), x.size()))
    assert_exact(model, (3, 3, 13, 11), tile, last=["conv", "getitem", "size"])


@pytest.mark.parametrize("tile", [3, (None, 4), (3, None)], ids=str)
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_a_single_row_is_expanded_to_the_extent_of_another_value_in_the_head(tile: Any) -> None:
    model = behind_a_convolution(lambda m, x: m.down(x).expand(-1, -1, x.shape[2], x.shape[3]))
    assert_exact(model, (3, 3, 3, 3), tile, last=["down", "getitem", "getitem_1"])


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_a_token_is_expanded_to_the_extents_of_two_values_in_the_head() -> None:
    model = behind_a_convolution(lambda m, x: m.token.expand(-1, -1, x.shape[2], m.down(x).shape[3]))
    assert_exact(model, (3, 3, 13, 13), 3, last=["getitem", "getitem_1"])


@pytest.mark.parametrize(
    ("body", "last"),
    [
        (lambda m, x: x.split(x.shape[2] // 2, 1), ["conv", "floordiv"]),
        (lambda m, x: x.chunk(x.shape[2] % 3 + 1, 1), ["conv", "add"]),
        (lambda m, x: torch.cat([x, torch.zeros(0)], 1), ["conv"]),
        # Gives one number to each position, and no channels.
        (lambda m, x: F.linear(x.permute(0, 2, 3, 1), m.gamma.flatten()), ["permute"]),
    ],
    ids=["split", "chunk", "cat", "linear"],
)
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_what_a_rule_does_not_cover_is_left_to_the_head(body: Function, last: list[str]) -> None:
    assert_exact(behind_a_convolution(body), (3, 3, 13, 11), 3, last=last)


@pytest.mark.parametrize(
    ("body", "norm", "last", "error"),
    [
        (lambda m, x: torch.cat([x, m.map], 1), None, "cat", "cat concatenates a tensor"),
        (lambda m, x: x.mean(1, keepdim=True).mul_(m.gamma), None, "mean", "doesn't match the broadcast shape"),
        (lambda m, x: x.split([2, 3], 1), None, "conv", "split_with_sizes expects split_sizes to sum exactly to 8"),
        (lambda m, x: x.unsqueeze(7), None, "conv", "Dimension out of range"),
        (lambda m, x: torch.stack([x, x], 9), None, "conv", "Dimension out of range"),
        (lambda m, x: m.norm(x), nn.BatchNorm1d(8).eval(), "conv", "expected 2D or 3D input"),
    ],
    ids=["cat", "mul_", "split", "unsqueeze", "stack", "BatchNorm1d"],
)
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_what_fails_in_the_plain_model_fails_at_the_call(
    body: Function, norm: nn.Module | None, last: str, error: str
) -> None:
    model = behind_a_convolution(body, norm)
    image = torch.randn(3, 3, 11, 13)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        model(image)
    converted = fxstream.convert(model, 3)
    assert handed_over(converted) == [last]
    with pytest.raises((RuntimeError, IndexError, ValueError), match=error):
        converted(image)


# torchvision.


@pytest.mark.parametrize(
    ("name", "shape", "tile", "last"),
    [
        ("convnext_tiny", (1, 3, 65, 49), 48, "avgpool"),
        ("shufflenet_v2_x0_5", (2, 3, 67, 97), 32, "mean"),
        ("mobilenet_v3_small", (1, 3, 67, 65), 32, "features_1_block_0_2"),
        ("efficientnet_b0", (1, 3, 65, 33), 32, "features_1_0_block_0_2"),
        (
            "regnet_y_400mf",
            (1, 3, 67, 33),
            32,
            ["trunk_output_block1_block1_0_proj_1", "trunk_output_block1_block1_0_f_b_2"],
        ),
        ("efficientnet_b0", (3, 3, 33, 33), BATCH, "classifier_1"),
        pytest.param("shufflenet_v2_x0_5", (3, 3, 33, 33), BATCH, "fc", marks=pytest.mark.slow),
        pytest.param("convnext_tiny", (3, 3, 33, 33), BATCH, "classifier_2", marks=pytest.mark.slow),
        pytest.param("regnet_y_400mf", (3, 3, 33, 33), BATCH, "fc", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_model(name: str, shape: tuple[int, ...], tile: Any, last: Any) -> None:
    assert_exact(torchvision.models.get_model(name, num_classes=3).eval(), shape, tile, last=last)


def test_a_resnet_with_group_norm_streams_along_the_batch() -> None:
    model = torchvision.models.resnet18(num_classes=3, norm_layer=lambda channels: nn.GroupNorm(8, channels))
    assert_exact(model, (5, 3, 33, 35), BATCH, last="fc")


@pytest.mark.parametrize("tile", [5, BATCH], ids=str)
def test_instance_norm_by_its_running_statistics_is_local_everywhere(tile: Any) -> None:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 2, 3)).eval()
    assert_exact(model, (3, 3, 17, 15), tile, whole=True)


def test_instance_norm_by_the_images_statistics_is_local_along_the_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 2, 3))
    assert_exact(model, (3, 3, 17, 15), BATCH, whole=True)
    (stop,) = fxstream.analyze(model).stops
    assert stop.reason.startswith("1 needs the mean and variance over the streamed axes H, W")


def test_instance_norm_takes_two_dimensions_for_one_image() -> None:
    model = behind_a_convolution(lambda m, x: m.norm(x.mean((2, 3))), nn.InstanceNorm1d(8))
    assert_exact(model, (3, 3, 13, 13), BATCH, last="mean")


def test_a_group_norm_of_single_values_streams_if_the_batch_has_several() -> None:
    """torch's condition is on the whole batch, of which a chunk may be one image."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(4, 4), nn.Conv2d(4, 2, 1))
    assert_exact(randomise(model), (3, 2, 1, 1), BATCH, whole=True)
    with pytest.raises(fxstream.ImageTooSmallError, match="single values"):
        fxstream.convert(model, BATCH)(torch.randn(1, 2, 1, 1))


def test_a_dimension_may_be_counted_from_the_end() -> None:
    x = Value((Dim("N", 2), Dim(None, 8), Dim("H", 5)))
    assert [x.dim(index) for index in (-3, -2, -1, 0, 1, 2)] == [0, 1, 2, 0, 1, 2]
    for index in (-4, 3):
        with pytest.raises(IndexError, match=f"dimension {index} of a value with 3 dimensions"):
            x.dim(index)
