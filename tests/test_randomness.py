"""Dropout, stochastic depth and noise in the streamed part: their statistics, and exact gradients of what was drawn."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from reference import assert_close, handed_over
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth, stochastic_depth

import fxstream
from fxstream.testing import head, relative_error

SHAPE = (3, 4, 33, 41)
TILES = [7, (None, 16), (2, None, 16, 16), (1, None, None, None), 100]


class Recorder(nn.Module):
    """Random operations between convolutions; what each of them gets and returns comes out, too."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(len(layers) + 1))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.convs[0](x)
        seen = []
        for layer, conv in zip(self.layers, self.convs[1:], strict=True):
            y = layer(x)
            seen += [x, y]
            x = conv(y)
        return (x, *seen)


class Replay(nn.Module):
    """The same with the recorded factors, and what was added."""

    def __init__(self, recorder: Recorder, factors: list[torch.Tensor], terms: list[torch.Tensor]) -> None:
        super().__init__()
        self.convs = copy.deepcopy(recorder.convs)
        self.factors, self.terms = factors, terms

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convs[0](x)
        for factor, term, conv in zip(self.factors, self.terms, self.convs[1:], strict=True):
            x = conv(x * factor + term)
        return x


class Function(nn.Module):
    """A function that is told whether to draw."""

    def __init__(self, function: Callable[..., torch.Tensor], *args: Any) -> None:
        super().__init__()
        self.function, self.args = function, args

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *self.args, training=self.training)


def _by_row(x: torch.Tensor, training: bool) -> torch.Tensor:
    return stochastic_depth(x, 0.4, "row", training)


def timms() -> nn.Module:
    layer: nn.Module = pytest.importorskip("timm.layers").DropPath(0.4)
    return layer


# What is multiplied by a random factor: the module, the dimensions along which factors differ.
FACTORS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Dropout": (lambda: nn.Dropout(0.4), (0, 1, 2, 3)),
    "Dropout in place": (lambda: nn.Dropout(0.4, inplace=True), (0, 1, 2, 3)),
    "F.dropout": (lambda: Function(F.dropout, 0.4), (0, 1, 2, 3)),
    "Dropout2d": (lambda: nn.Dropout2d(0.4), (0, 1)),
    "F.dropout2d": (lambda: Function(F.dropout2d, 0.4), (0, 1)),
    "StochasticDepth by row": (lambda: StochasticDepth(0.4, "row"), (0,)),
    "StochasticDepth by batch": (lambda: StochasticDepth(0.4, "batch"), ()),
    "stochastic_depth": (lambda: Function(_by_row), (0,)),
    "DropPath": (timms, (0,)),
}


def recorder(*layers: nn.Module) -> Recorder:
    return Recorder(*layers).double().train()


def factors_of(seen: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Output over input of each random operation."""
    return [(y / x).detach() for x, y in zip(seen[::2], seen[1::2], strict=True)]


def gradients_of(model: nn.Module, output: torch.Tensor, image: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {"image": image, **{name: p for name, p in model.named_parameters() if "convs" in name}}
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    found = torch.autograd.grad((output.sin() * weights).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", [name for name in FACTORS if "place" not in name])
def test_gradients_are_those_of_the_masks_that_were_drawn(name: str, tile: Any) -> None:
    build, dims = FACTORS[name]
    converted = fxstream.convert(recorder(build(), build()), tile, prove=False)
    assert not head(converted)
    image = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    output, *seen = converted(image)
    factors = factors_of(tuple(seen))
    for factor in factors:
        others = [dim for dim in range(4) if dim not in dims]
        first = factor[tuple(slice(0, 1) if dim in others else slice(None) for dim in range(4))]
        torch.testing.assert_close(factor, first.expand_as(factor))
        assert sorted(factor.unique().round(decimals=9).unique().tolist()) in ([0.0, 1.666666667], [0.0], [1.666666667])
    replay = Replay(converted, factors, [torch.zeros(())] * 2)
    assert relative_error(output, replay(image)) < 1e-10
    assert_close(gradients_of(converted, output, image), gradients_of(replay, replay(image), image))


@pytest.mark.parametrize("layer", [nn.RReLU(0.1, 0.9), nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3)])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_gradients_of_other_random_operations(layer: nn.Module, tile: Any) -> None:
    """A position is x * factor + term: with the output's derivative as factor, what is left is the term."""
    model = recorder(layer)
    converted = fxstream.convert(model, tile)
    assert not head(converted)
    image = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    output, x, y = converted(image)
    if isinstance(layer, nn.RReLU):
        factor = torch.where(x > 0, torch.ones(()), y / x).detach()
        assert ((factor[x <= 0] > 0.1) & (factor[x <= 0] < 0.9)).all()
        assert abs(factor[x <= 0].mean() - 0.5) < 0.01
    else:
        kept = _kept(y)
        factor = kept.double() * _ALPHA_SCALE
        if isinstance(layer, nn.FeatureAlphaDropout):
            assert (kept == kept[:, :, :1, :1]).all()
        else:
            assert abs(kept.double().mean() - 0.7) < 0.03
    term = (y - x * factor).detach()
    replay = Replay(converted, [factor], [term])
    assert_close(gradients_of(converted, output, image), gradients_of(replay, replay(image), image))


_LOW = -1.0507009873554805 * 1.6732632423543772
_ALPHA_SCALE = (0.7 * (1 + 0.3 * _LOW**2)) ** -0.5


def _kept(y: torch.Tensor) -> torch.Tensor:
    """Alpha dropout sets what it drops to one number."""
    dropped = _ALPHA_SCALE * (_LOW - 0.3 * _LOW)
    return (y - dropped).abs() > 1e-9


def test_alpha_dropout_keeps_mean_and_variance() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.AlphaDropout(0.2)).double()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.zero_()
    output = fxstream.convert(model, 64)(torch.randn(1, 1, 400, 300, dtype=torch.float64))
    assert abs(output.mean().item()) < 0.02
    assert abs(output.std().item() - 1) < 0.02


def test_in_place_dropout_is_what_later_readers_see() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop = nn.Conv2d(4, 4, 3), nn.Dropout(0.5, inplace=True)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.conv(x)
            return self.drop(x), x + 0

    converted = fxstream.convert(Net(), 9)
    dropped, read = converted.train()(torch.randn(SHAPE))
    assert torch.equal(dropped, read)
    assert (dropped == 0).any()
    dropped, read = converted.eval()(torch.randn(SHAPE))
    assert torch.equal(dropped, read)
    assert not (dropped == 0).any()


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("start", [True, False], ids=["converted in train mode", "converted in eval mode"])
def test_dropping_follows_the_mode(name: str, start: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), FACTORS[name][0](), nn.Conv2d(4, 4, 3)).double().train(start)
    converted = fxstream.convert(model, 8)
    assert not head(converted)
    image = torch.randn(SHAPE, dtype=torch.float64)
    expected = model.eval()(image)
    for _ in range(2):
        converted.eval()
        assert relative_error(converted(image), expected) < 1e-10
        converted.train()
        assert any(relative_error(converted(image), expected) > 0.1 for _ in range(10))


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, lambda p: StochasticDepth(p, "row")])
def test_all_or_nothing(kind: Callable[[float], nn.Module], p: float) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), kind(p)).double()
    converted = fxstream.convert(model, 8)
    image = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    expected, output = model(image), converted(image)
    torch.testing.assert_close(output, expected)
    for one, other in zip(
        torch.autograd.grad(output.sum(), [image, *converted.parameters()]),
        torch.autograd.grad(expected.sum(), [image, *model.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tile", [(16, 16), (1, None, 16, 16)], ids=str)
def test_every_activation_is_dropped_with_the_same_probability(tile: Any) -> None:
    """Tile borders included: counted by position within tiles, by tile, and between neighbours."""
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Dropout(0.3))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.fill_(1)
    converted = fxstream.convert(model.train(), tile)
    kept = (converted(torch.ones(4, 2, 160, 160)) != 0).double()
    assert abs(kept.mean() - 0.7) < 0.002
    by_tile = kept.view(4, 8, 10, 16, 10, 16)
    assert (by_tile.mean((1, 3, 5)) - 0.7).abs().max() < 0.06  # 2048 each: six standard deviations
    assert (by_tile.mean((0, 1, 2, 4)) - 0.7).abs().max() < 0.05  # 3200 each
    # No two neighbours, tiles, channels or images share their numbers.
    for shifted in (
        kept.roll(1, 3),
        kept.roll(1, 2),
        kept.roll(16, 3),
        kept.roll(16, 2),
        kept.roll(1, 1),
        kept.roll(1, 0),
    ):
        assert abs((kept * shifted).mean() - 0.49) < 0.003


def test_the_share_of_images_that_a_path_is_dropped_for() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), StochasticDepth(0.3, "row"), nn.Dropout2d(0.2))
    converted = fxstream.convert(model.train(), (None, 3))
    with torch.no_grad():
        kept = (converted(torch.ones(4000, 1, 1, 7)) != 0).double()
    assert (kept == kept[..., :1]).all()
    images = kept[..., 0, 0]
    assert abs(images.amax(1).mean() - 0.7 * (1 - 0.2**2)) < 0.03
    assert abs(images.mean() - 0.7 * 0.8) < 0.03


@pytest.mark.parametrize("name", FACTORS)
def test_a_seed_gives_the_same_run_twice(name: str) -> None:
    converted = fxstream.convert(recorder(FACTORS[name][0]()), 16)
    image = torch.randn(SHAPE, dtype=torch.float64)

    def run() -> list[torch.Tensor]:
        torch.manual_seed(3)
        outputs = []
        for _ in range(8):
            converted.zero_grad()
            output = converted(image)[0]
            output.square().sum().backward()
            outputs += [output.detach(), *(p.grad.clone() for p in converted.parameters()), torch.rand(3)]
        return outputs

    first, second = run(), run()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not all(torch.equal(first[0], output) for output in first[:: len(first) // 8])


def test_the_global_stream_goes_on_as_if_nothing_had_been_replayed() -> None:
    converted = fxstream.convert(recorder(nn.Dropout(0.5)), 16)
    output = converted(torch.randn(SHAPE, dtype=torch.float64))[0]
    state = torch.get_rng_state()
    output.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_drawn_where_nothing_is_random() -> None:
    converted = fxstream.convert(recorder(nn.Dropout(0.5)).eval(), 16)
    image, state = torch.randn(SHAPE, dtype=torch.float64), None
    state = torch.get_rng_state()
    converted(image)[0].sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_whoever_draws_meanwhile_does_not_disturb_the_recompute() -> None:
    """A thread that draws from the global generator all the time, as a data loader's may."""
    converted = fxstream.convert(recorder(nn.Dropout(0.5)), 8)
    image = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            torch.rand(100)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        output, x, y = converted(image)
        replay = Replay(converted, factors_of((x, y)), [torch.zeros(())])
        found, expected = gradients_of(converted, output, image), gradients_of(replay, replay(image), image)
    finally:
        done.set()
        thread.join()
    assert_close(found, expected)


def test_a_checkpoint_around_the_model_drops_the_same_twice() -> None:
    converted = fxstream.convert(recorder(nn.Dropout(0.4)), 8)
    image = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (converted, partial(checkpoint, converted, use_reentrant=False)):
        torch.manual_seed(4)
        found.append(gradients_of(converted, run(image)[0], image))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("noise", [torch.rand_like, torch.randn_like])
def test_noise_of_the_size_of_a_value(noise: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            drawn = noise(x)
            return self.conv(x * 1.0 + self.scale * drawn), drawn

    converted = fxstream.convert(Noisy().double(), 8)
    assert not head(converted)
    image = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    output, drawn = converted(image)
    assert drawn.dtype is torch.float64
    assert not drawn.requires_grad
    mean, deviation = (0.5, 12**-0.5) if noise is torch.rand_like else (0.0, 1.0)
    assert abs(drawn.mean() - mean) < 0.02
    assert abs(drawn.std() - deviation) < 0.02
    expected = converted.conv(image + converted.scale * drawn)
    assert relative_error(output, expected) < 1e-10
    named = [image, *converted.parameters()]
    for one, other in zip(
        torch.autograd.grad(output.square().sum(), named),
        torch.autograd.grad(expected.square().sum(), named),
        strict=True,
    ):
        assert relative_error(one, other) < 1e-10


def test_convnext_trains_with_stochastic_depth() -> None:
    """In training mode, streamed to the end of its features; every block is dropped for an image as a whole."""
    model = torchvision.models.convnext_tiny(stochastic_depth_prob=0.5)
    model.features = model.features[:2]
    model.classifier[0], model.classifier[2] = nn.Identity(), nn.Identity()
    converted = fxstream.convert(model.train(), (1, None, 16, 16))
    assert handed_over(converted) == ["avgpool"]
    with torch.no_grad():
        for block in model.features[1]:
            block.stochastic_depth.p = 1.0
    bare = model.eval()
    for block in bare.features[1]:
        block.layer_scale.data.zero_()
    image = torch.randn(2, 3, 40, 44)
    torch.testing.assert_close(fxstream.convert(model.train(), 16)(image), bare.eval()(image))


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("p", [0.5, 0.0])
@pytest.mark.parametrize("layers", [1, 2])
def test_dropout_inside_a_transformer_layer_ends_the_streamed_part_in_training_mode(layers: int, p: float) -> None:
    """The layer draws its own numbers, which computing a tile again would not find; without dropout it streams."""
    layer: nn.Module = nn.TransformerEncoderLayer(16, 2, 8, dropout=p, batch_first=True)
    if layers > 1:
        layer = nn.TransformerEncoder(layer, layers)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), layer)
    chunks = (2, None, None, None)
    assert bool(head(fxstream.convert(model.train(), chunks, prove=False))) == (p > 0)
    assert not head(fxstream.convert(model.eval(), chunks, prove=False))
