"""What goes wrong inside a tile leaves nothing behind; what is not finite passes; threads do not meet."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from reference import Replayed, assert_close, each_once, gradients, image, live_bytes, pair, randomise
from torch import nn

import fxstream
from fxstream.ops import Local, resample


class Fuse:
    """Blows at the k-th time that something happens."""

    def __init__(self) -> None:
        self.what = ""
        self.left = 0
        self.error: type[BaseException] = RuntimeError

    def set(self, what: str = "", at: int = 0, error: type[BaseException] = RuntimeError) -> None:
        self.what, self.left, self.error = what, at, error

    def __call__(self, what: str) -> None:
        if what == self.what:
            self.left -= 1
            if self.left == 0:
                raise self.error("blown")


FUSE = Fuse()


@pytest.fixture(autouse=True)
def _fuse_in_order() -> Iterator[None]:
    FUSE.set()
    yield
    FUSE.set()


def fused(x: torch.Tensor) -> torch.Tensor:
    FUSE("recompute" if torch.is_grad_enabled() else "forward")
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda gradient: FUSE("hook"))
    return x


@fxstream.register(fused)
def _fused(x: Any) -> Local:
    return Local((x,), x.dims, fused)


class Net(nn.Module):
    """Whole of it streams; returns what its dropout gets and gives, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 5, padding=2)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.4)
        self.second = nn.Conv2d(5, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        before = nn.functional.softplus(fused(self.norm(self.first(x))))
        after = self.drop(before)
        return fused(self.second(after + before)), before, after


TILES = 12
"""Of an image, by which each of the two fuses of the network is passed."""


def network(dropout: bool = False, seed: int = 0) -> nn.Module:
    """In float64 and eval mode, but for its dropout if that is wanted."""
    model = randomise(Net(), seed).double().eval()
    model.get_submodule("drop").train(dropout)
    return model


def loss_of(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return outputs[0].sin().sum()


def caught(function: Callable[[], object]) -> type[BaseException] | None:
    """The type of what a function raises; of the exception itself, whose traceback holds tensors, nothing is left."""
    try:
        function()
    except BaseException as error:
        return type(error)
    return None


def settings_of(model: nn.Module) -> dict[str, Any]:
    """The modes that a fault might leave as they are inside a tile."""
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "dtype": torch.get_autocast_dtype("cpu"),
    }


@pytest.mark.parametrize(
    ("what", "at", "error", "autocast"),
    [
        ("forward", 1, torch.OutOfMemoryError, False),
        ("recompute", TILES, KeyboardInterrupt, True),
        ("hook", TILES, KeyboardInterrupt, True),
        pytest.param("forward", TILES, KeyboardInterrupt, True, marks=pytest.mark.slow),
        pytest.param("recompute", 2 * TILES, torch.OutOfMemoryError, False, marks=pytest.mark.slow),
        pytest.param("hook", 1, torch.OutOfMemoryError, False, marks=pytest.mark.slow),
        pytest.param("forward", 2 * TILES, torch.OutOfMemoryError, False, marks=pytest.mark.slow),
        pytest.param("recompute", 1, torch.OutOfMemoryError, False, marks=pytest.mark.slow),
        pytest.param("hook", 2 * TILES, torch.OutOfMemoryError, False, marks=pytest.mark.slow),
    ],
)
def test_a_fault_inside_a_tile_leaves_nothing_behind(
    what: str, at: int, error: type[BaseException], autocast: bool
) -> None:
    converted, spared = (fxstream.convert(network(dropout=True), 8) for _ in range(2))
    pixels = image().requires_grad_()
    for model in (converted, spared):
        torch.manual_seed(2)
        loss_of(model(pixels)).backward()  # what is there before stays
    pixels.grad = None
    before = copy.deepcopy(gradients(converted))
    settings, state, alive = settings_of(converted), torch.get_rng_state(), live_bytes()

    def step(model: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss_of(model(pixels)).backward()

    FUSE.set(what, at, error)
    assert caught(lambda: step(converted)) is error
    assert live_bytes() == alive
    assert settings_of(converted) == settings
    assert pixels.grad is None
    assert_close(gradients(converted), before, tolerance=0)
    if what == "forward":
        assert torch.equal(torch.get_rng_state(), state)

    torch.manual_seed(3)
    step(converted)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    step(spared)
    assert torch.equal(torch.get_rng_state(), after)
    assert_close(gradients(converted), gradients(spared), tolerance=0)
    assert before["first.weight"].ne(gradients(converted)["first.weight"]).any()


@pytest.mark.parametrize("at", [1, TILES + 2, 2 * TILES])
@pytest.mark.parametrize("what", ["recompute", "hook"])
def test_a_backward_that_has_failed_may_be_repeated(what: str, at: int) -> None:
    plain, converted = pair(network(), 8)
    found = []
    for model in (plain, converted):
        pixels = image().requires_grad_()
        loss = loss_of(model(pixels))
        FUSE.set(what, at if model is converted else 1, KeyboardInterrupt)
        if model is converted or what == "hook":
            assert caught(lambda loss=loss: loss.backward(retain_graph=True)) is KeyboardInterrupt
        FUSE.set()
        model.zero_grad()
        loss.backward()
        assert pixels.grad is not None
        found.append({"image": pixels.grad, **gradients(model)})
    assert_close(found[1], found[0])


@pytest.mark.parametrize("where", ["output", pytest.param("parameter", marks=pytest.mark.slow), "image"])
def test_a_hook_outside_that_raises_leaves_the_next_step_right(where: str) -> None:
    def interrupt(gradient: torch.Tensor) -> None:
        raise KeyboardInterrupt

    plain, converted = pair(network(), 8)
    alive = []
    for _ in range(2):
        pixels = image().requires_grad_()
        outputs = converted(pixels)
        hooked = {"output": outputs[0], "parameter": converted.second.weight, "image": pixels}[where]
        handle = hooked.register_hook(interrupt)
        assert caught(lambda outputs=outputs: loss_of(outputs).backward()) is KeyboardInterrupt
        handle.remove()
        del outputs, hooked, pixels
        converted.zero_grad()
        alive.append(live_bytes())
    assert alive[0] == alive[1]
    for model in (plain, converted):
        loss_of(model(image())).backward()
    assert_close(gradients(converted), gradients(plain))


class Sensitive(nn.Module):
    """Everything that might treat what is not finite in its own way."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.front = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(x)
        return self.layers(x)


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "convolutions": lambda: [nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 5, dilation=2, padding=3)],
    "transposed": lambda: [nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)],
    "reflected": lambda: [nn.Conv2d(4, 4, 5, padding=2, padding_mode="reflect")],
    "norm": lambda: [nn.BatchNorm2d(4), nn.ReLU()],
    "activations": lambda: [nn.LeakyReLU(), nn.SiLU(), nn.Hardtanh(), nn.Softmax(1)],
    "max pooling": lambda: [nn.MaxPool2d(3, 2, 1)],
    "average pooling": lambda: [nn.AvgPool2d(3, 2, 1, count_include_pad=False)],
    "dropout": lambda: [nn.Dropout(0.5).eval(), nn.Conv2d(4, 4, 3)],
    "nearest": lambda: [nn.Upsample(scale_factor=3)],
    "bilinear": lambda: [nn.Upsample(scale_factor=2, mode="bilinear")],
    "bilinear to corners": lambda: [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)],
    "bilinear by 1.5": lambda: [nn.Upsample(scale_factor=1.5, mode="bilinear")],
    "bilinear by 0.4": lambda: [nn.Upsample(scale_factor=0.4, mode="bilinear")],
    "bilinear of height": lambda: [nn.Upsample(scale_factor=(3, 1), mode="bilinear")],
    "bicubic": lambda: [nn.Upsample(scale_factor=3, mode="bicubic")],
    "padding": lambda: [nn.ReplicationPad2d(2), nn.ZeroPad2d(1)],
    "shuffle": lambda: [nn.PixelShuffle(2)],
}


@each_once(layers=LAYERS, value=[torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_passes_as_in_the_plain_model(value: float, layers: str) -> None:
    plain, converted = pair(randomise(Sensitive(*LAYERS[layers]())).double().eval(), 7)
    pixels = image()
    pixels[0, 1, 0, 0] = pixels[0, 0, 13, 7] = pixels[1, 2, -1, 11] = value
    given = torch.randn_like(plain(pixels))
    for broken_gradient in (False, True):
        if broken_gradient:
            pixels, given = image(), given.clone()
            given[0, :, 0, 0] = given[1, 0, given.shape[2] // 2, 3] = value
        found = []
        for model in (plain, converted):
            leaf = pixels.clone().requires_grad_()
            output = model(leaf)
            model.zero_grad()
            output.backward(given)
            assert leaf.grad is not None
            found.append({"output": output.detach(), "image": leaf.grad, **gradients(model)})
        broken = [~tensor.isfinite() for name, tensor in found[0].items() if name in ("output", "image")]
        assert any(0 < where.sum() < where.numel() for where in broken)
        assert_close(found[1], found[0])


def side_by_side(*jobs: Callable[[], Any]) -> list[Any]:
    """What each job returns, if they run in threads that take turns very often."""
    results: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def run(index: int) -> None:
        start.wait()
        results[index] = jobs[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert None not in results, "a thread has failed"
    return results


def train_and_record(
    model: nn.Module, seed: int, steps: int = 12
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The parameters after some steps, and by which factors the dropout has scaled in each of them."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    factors = []
    for step in range(steps):
        optimiser.zero_grad()
        outputs = model(image(seed=100 * seed + step))
        factors.append((outputs[2] / outputs[1]).detach())
        loss_of(outputs).backward()
        optimiser.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}, factors


def test_models_with_dropout_train_in_threads_as_alone() -> None:
    models = [pair(network(dropout=True, seed=seed), 8) for seed in (1, 2)]
    trained = side_by_side(
        *(lambda m=converted, s=s: train_and_record(m, s) for s, (_, converted) in enumerate(models))
    )
    for seed, ((plain, _), (parameters, factors)) in enumerate(zip(models, trained, strict=True)):
        assert 0.3 < (torch.stack(factors) == 0).double().mean() < 0.5
        plain.drop = Replayed(factors)
        assert_close(train_and_record(plain, seed)[0], parameters)


@pytest.mark.parametrize("autocast", [False, True])
def test_one_model_serves_two_threads(autocast: bool) -> None:
    """Of which one may be in a region of autocast: that is the thread's own."""
    converted = fxstream.convert(network(), 8)

    def work(seed: int, autocast: bool) -> dict[str, torch.Tensor]:
        named = dict(converted.named_parameters())
        totals = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
        for step in range(6):
            pixels = image(seed=10 * seed + step).float() if autocast else image(seed=10 * seed + step)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs = converted(pixels.double())
            found = torch.autograd.grad(loss_of(outputs), list(named.values()))
            for total, gradient in zip(totals.values(), found, strict=True):
                total += gradient
        return totals

    jobs = [lambda: work(0, False), lambda: work(1, autocast)]
    alone = [job() for job in jobs]
    for got, expected in zip(side_by_side(*jobs), alone, strict=True):
        assert_close(got, expected, tolerance=0)


def test_backward_in_another_thread_than_forward() -> None:
    plain, converted = pair(network(), 8)
    loss = loss_of(converted(image()))
    side_by_side(lambda: loss.backward() or True)
    loss_of(plain(image())).backward()
    assert_close(gradients(converted), gradients(plain))


@pytest.fixture
def _nothing_cached() -> None:
    """The tables of resampling are kept for the life of the process, so another test may have filled them."""
    for cached in (resample._nearest, resample._weighted, resample._window):
        cached.cache_clear()


@pytest.mark.usefixtures("_nothing_cached")
@pytest.mark.parametrize("layers", ["nearest", "bilinear by 1.5", "bicubic", "average pooling"])
def test_training_after_inference(layers: str) -> None:
    """Autograd refuses inference tensors, so none may be among what inference computes and keeps for later calls."""
    plain, converted = pair(randomise(Sensitive(*LAYERS[layers]())).double().eval(), 11)
    with torch.inference_mode():
        converted(image())
    for model in (plain, converted):
        model(image()).sin().sum().backward()
    assert_close(gradients(converted), gradients(plain))
