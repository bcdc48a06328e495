"""Module hooks, parametrizations and what else stands between a module and its weight, against the plain model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from reference import Body, assert_close, counts, gradients, pair, randomise
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.flop_counter import FlopCounterMode

import fxstream
from fxstream.testing import compare, head

IMAGE = (2, 3, 31, 27)


def net(wrap: Callable[[nn.Module], Any], **options: Any) -> nn.Module:
    """A convolution that streams, one behind it, and one in the head, whose weights are `wrap`ped."""
    convs = [nn.Conv2d(3, 4, 3, padding=1, **options), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 5, 1)]
    model = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.AdaptiveAvgPool2d(3), convs[2], nn.Flatten()).double()
    randomise(model)
    for conv in convs:
        wrap(conv)
    return model


def twins(wrap: Callable[[nn.Module], Any], **options: Any) -> tuple[nn.Module, nn.Module]:
    """The plain model twice: of weights that a hook has set, torch cannot make a deep copy."""
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(net(wrap, **options))
    return states[0], states[1]


def _prune_twice(conv: nn.Module) -> None:
    prune.random_unstructured(conv, "weight", 0.3)
    prune.ln_structured(conv, "weight", 0.3, n=2, dim=0)
    prune.l1_unstructured(conv, "bias", 1)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": weight_norm,
    "weight_norm of the whole": lambda conv: weight_norm(conv, dim=None),
    "weight_norm of weight and bias": lambda conv: weight_norm(weight_norm(conv), "bias", dim=None),
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.4),
    "pruned several times": _prune_twice,
}

PARAMETRIZATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm, then spectral_norm": lambda conv: parametrizations.spectral_norm(parametrizations.weight_norm(conv)),
}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxstream.StreamingWarning)  # about the convolution in the head
        warnings.simplefilter("ignore", FutureWarning)  # the old functions are deprecated
        yield


def assert_trains_alike(plain: nn.Module, converted: nn.Module, steps: int = 3) -> None:
    """Gradients, buffers and parameters through some steps of training and one in eval mode."""
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (plain, converted)]
    for step in range(steps):
        plain.train(step < steps - 1)
        converted.train(step < steps - 1)
        image = torch.randn(IMAGE, dtype=torch.float64)
        for model, optimiser in zip((plain, converted), optimisers, strict=True):
            optimiser.zero_grad()
            model(image).square().sum().backward()
            optimiser.step()
        assert_close(converted.state_dict(), plain.state_dict())
        assert_close(gradients(converted), gradients(plain))


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_hooks_that_compute_a_weight_are_hoisted(name: str, mode: str) -> None:
    plain, original = twins(HOOKS[name], padding_mode=mode)
    converted = fxstream.convert(original, 9)
    assert head(converted)[0] == "_3"
    compare(plain, converted, torch.randn(IMAGE))
    assert_trains_alike(plain, converted)


@pytest.mark.parametrize(("name", "operation"), [("weight_norm", "_weight_norm_interface"), ("pruned", "mul")])
def test_they_run_once_a_call(name: str, operation: str) -> None:
    plain, original = twins(HOOKS[name])
    converted = fxstream.convert(original, 5)
    image = torch.randn(IMAGE, dtype=torch.float64)
    expected, found = counts(plain, image), counts(converted, image)
    assert found["convolution"] > 20 * expected["convolution"]
    assert found[operation] == expected[operation] > 0


def test_other_modules_with_computed_weights() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(3), weight_norm(nn.Linear(3, 4))
            prune.random_unstructured(self.norm, "weight", 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.norm(x.movedim(1, -1))).movedim(-1, 1)

    torch.manual_seed(0)
    plain = Last().double()
    torch.manual_seed(0)
    original = Last().double()
    converted = fxstream.convert(original, 8, example_input=torch.zeros(IMAGE))
    assert not head(converted)
    compare(plain, converted, torch.randn(IMAGE))


def test_old_spectral_norm_streams_in_eval_mode_and_is_refused_in_training_mode() -> None:
    plain, original = twins(spectral_norm)
    for model in (plain, original):
        model(torch.randn(IMAGE, dtype=torch.float64))  # the first iteration
    with pytest.raises(fxstream.NothingToStreamError, match=r"0 is one opaque call: .* computes inside torch\.no_grad"):
        fxstream.convert(original, 9)
    converted = fxstream.convert(original.eval(), 9)
    assert head(converted)[0] == "_3"
    compare(plain.eval(), converted, torch.randn(IMAGE))
    with pytest.raises(fxstream.ModeError, match=r"^the forward of 0 depends on its mode"):
        converted.train()(torch.randn(IMAGE, dtype=torch.float64))


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize("train", [True, False])
def test_parametrizations_are_hoisted_and_change_their_state_once_a_call(name: str, train: bool) -> None:
    plain, original = twins(PARAMETRIZATIONS[name])
    before = copy.deepcopy(original.state_dict())
    converted = fxstream.convert(original.train(train), 9)
    assert head(converted)[0] == "_3"
    for key, tensor in original.state_dict().items():
        assert torch.equal(tensor, before[key]), f"the conversion has changed {key}"
    compare(plain.train(train), converted, torch.randn(IMAGE))
    assert_trains_alike(plain, converted)


def test_a_module_that_counts_its_calls_is_left_to_the_head() -> None:
    class Counting(nn.Conv2d):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Counting(4, 4, 3)).double()
    (stop,) = fxstream.analyze(model).stops
    assert stop.reason.startswith(
        "1 is one opaque call: torch.fx cannot trace it: its forward assigns attributes (calls)"
    )
    converted = fxstream.convert(model, 8)
    compare(model, converted, torch.randn(IMAGE))
    assert (model[1].calls, converted.get_submodule("1").calls) == (1, 1)


def test_a_buffer_that_forward_updates_from_the_image_is_left_to_the_head() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3), keepdim=True)[0])
            return x - self.mean

    model, converted = pair(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Centred(), nn.Conv2d(4, 4, 3)).double(), 8)
    for _ in range(3):
        compare(model, converted, torch.randn(IMAGE))  # buffers, too


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm, lambda conv: conv])
def test_a_module_used_in_two_places(norm: Callable[[nn.Module], nn.Module]) -> None:
    class Twice(nn.Module):
        """In the prefix, again in the prefix, and in the head."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.conv = norm(nn.Conv2d(4, 4, 3, padding=1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x = x + self.conv(self.conv(x).relu())
            return self.conv(nn.functional.adaptive_avg_pool2d(x, 4))

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Twice().double())
    converted = fxstream.convert(models[1], 9)
    assert head(converted)[0] == "adaptive_avg_pool2d"
    compare(models[0], converted, torch.randn(IMAGE))
    assert_trains_alike(models[0], converted)


def test_a_hook_on_a_part_of_a_streamed_module() -> None:
    """The parts of an attention layer are not called one by one, so hooks of theirs would run per tile or never."""
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)).eval()
    image = torch.randn(6, 5, 8)
    converted = fxstream.convert(model, (2, None, None), example_input=image)
    assert not head(converted)
    converted.get_submodule("1.linear1").register_forward_hook(lambda *_: None)
    with pytest.raises(fxstream.HookError, match=r"^1 has acquired a hook"):
        converted(image)
    seen: list[int] = []
    model.get_submodule("1.linear1").register_forward_hook(lambda *_: seen.append(1))
    converted = fxstream.convert(model, (2, None, None), example_input=image)
    assert head(converted) == ["_1"]
    converted(image)
    assert len(seen) == 1


@pytest.mark.parametrize("path", ["layer3.0.conv1", "layer3.0", "layer3"])
def test_a_hook_at_conversion_ends_the_prefix_and_still_runs(path: str) -> None:
    model = torchvision.models.resnet18().eval()
    seen: list[torch.Size] = []
    model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with pytest.warns(fxstream.StreamingWarning, match=rf"{path} has a hook"):
        converted = fxstream.convert(model, 64)
    image = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(converted(image), model(image))
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_forward_hooks_of_the_root_run_once_per_call() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    fxstream.convert(model, 4)(torch.randn(1, 3, 20, 20))
    assert seen == [1]


def test_a_full_backward_hook_of_the_root_runs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3)).double()
    model.register_full_backward_hook(lambda module, inner, outer: (inner[0] * 3,))
    compare(model, fxstream.convert(model, 8), torch.randn(IMAGE))


def test_hooks_of_all_modules_do_not_see_proxies() -> None:
    """torch's FlopCounterMode registers such hooks, and a forward that asks for sizes is traced again at a call."""

    def padded(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.inner(F.pad(x, (0, x.shape[3] % 2)))

    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    plain, converted = pair(Body(padded, inner=inner).double(), 8)
    x = torch.randn(IMAGE).double()
    with FlopCounterMode(display=False):
        assert_close({"output": converted(x)}, {"output": plain(x)})
