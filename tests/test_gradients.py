"""Whatever one does with autograd: as with the plain model, at the cost of one more forward of the streamed part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import Allocations, Body, assert_close, assert_exact, each_once, flops, gradients, image, pair, randomise
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fxstream


class Net(nn.Module):
    """Residual and strided, with batch norms that are frozen; returns a feature map and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(6)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Softplus(), nn.Conv2d(6, 6, 3, padding=1))
        self.last = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tanh(self.norm(self.stem(x)))
        x = x + self.block(x)
        x = F.max_pool2d(x, 2)
        features = self.last(x)
        return features, self.head(features.mean((2, 3)).square())


PARAMETERS = [name for name, _ in Net().named_parameters()]

Found = Mapping[str, "torch.Tensor | None"]


def plain_and_converted(build: Callable[[], nn.Module] = Net) -> tuple[nn.Module, Any]:
    return pair(randomise(build()).double().eval(), (9, 11))


def loss_of(outputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    features, scores = outputs
    return features.sin().sum() + F.cross_entropy(scores, torch.arange(len(scores)) % 3)


def assert_same(use: Callable[[nn.Module], Found], build: Callable[[], nn.Module] = Net) -> None:
    """Whoever uses the converted model as the plain one finds the same tensors."""
    plain, converted = plain_and_converted(build)
    expected = use(plain)
    assert_close(use(converted), expected)


def assert_no_waste(use: Callable[[nn.Module], Any], build: Callable[[], nn.Module] = Net) -> None:
    """It costs what it costs with the plain model, and one forward of the streamed part."""
    plain, converted = plain_and_converted(build)
    with torch.no_grad():
        prefix = flops(lambda: converted.streamed(image()))
    assert 0 < flops(lambda: use(converted)) <= flops(lambda: use(plain)) + prefix


def test_gradients_accumulate_over_backwards_and_are_clipped() -> None:
    def use(model: nn.Module) -> Found:
        for height, width, batch in ((26, 21, 2), (20, 37, 1), (15, 16, 3)):
            loss_of(model(image(height, width, batch))).backward()
        summed = {name: gradient.clone() for name, gradient in gradients(model).items() if gradient is not None}
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return {**summed, "norm": norm, **{f"clipped {name}": gradient for name, gradient in gradients(model).items()}}

    assert_same(use)


@pytest.mark.parametrize("image_grad", [False, True])
@pytest.mark.parametrize(("seed", "before_conversion"), [(seed, seed % 2 == 1) for seed in range(6)])
def test_any_subset_may_be_frozen_and_costs_nothing(seed: int, before_conversion: bool, image_grad: bool) -> None:
    chosen = torch.rand(len(PARAMETERS), generator=torch.Generator().manual_seed(seed)) < 0.4

    def freeze(model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(chosen[PARAMETERS.index(name)]))
        return model

    def use(model: nn.Module) -> Found:
        if not before_conversion:
            freeze(model)
        leaf = image().requires_grad_(image_grad)
        loss_of(model(leaf)).backward()
        return {"image": leaf.grad, **gradients(model)}

    def build() -> nn.Module:
        return freeze(Net()) if before_conversion else Net()

    assert_same(use, build)
    assert_no_waste(use, build)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_that_nobody_wants_take_no_memory(frozen: bool) -> None:
    """Neither those of frozen parameters, nor those that `autograd.grad` is not asked for."""
    _, converted = plain_and_converted()
    weights = {tuple(parameter.shape) for parameter in converted.parameters() if parameter.dim() == 4}
    if frozen:
        converted.requires_grad_(False)
    converted.stem.requires_grad_(True)
    loss = loss_of(converted(image()))
    with Allocations() as made:
        torch.autograd.grad(loss, converted.stem.weight)
    assert made.largest.keys() & weights == {tuple(converted.stem.weight.shape)}


@pytest.mark.parametrize("leaf", [True, False])
def test_saliency_costs_no_gradients_of_weights(leaf: bool) -> None:
    def saliency(model: nn.Module, leaf: bool) -> Found:
        pixels = image().requires_grad_()
        entering = pixels if leaf else pixels * 1
        (gradient,) = torch.autograd.grad(loss_of(model(entering)), entering)
        return {"image": gradient, "pixels": pixels.grad, **gradients(model)}

    assert_same(lambda model: saliency(model, leaf))
    # torch's counter hooks into what enters the modules, which works with leaves in no call of `grad`.
    assert_no_waste(lambda model: saliency(model, False))


@each_once(image_grad=[False, True], name=PARAMETERS)
def test_backward_for_one_parameter_gives_and_costs_no_others(name: str, image_grad: bool) -> None:
    def use(model: nn.Module) -> Found:
        leaf = image().requires_grad_(image_grad)
        loss_of(model(leaf)).backward(inputs=[model.get_parameter(name)])
        return {"image": leaf.grad, **gradients(model)}

    assert_same(use)
    assert_no_waste(use)


@pytest.mark.parametrize("names", [["block.2.bias"], ["last.weight", "stem.bias"], ["head.weight", "norm.weight"]])
@pytest.mark.parametrize("image_grad", [False, True])
def test_autograd_grad_for_chosen_parameters(names: list[str], image_grad: bool) -> None:
    def use(model: nn.Module) -> Found:
        leaf = image().requires_grad_(image_grad)
        wanted = {name: model.get_parameter(name) for name in names}
        unused = torch.ones(2, requires_grad=True)
        found = torch.autograd.grad(loss_of(model(leaf * 1)), [*wanted.values(), unused], allow_unused=True)
        assert gradients(model) == dict.fromkeys(PARAMETERS)
        return dict(zip((*wanted, "unused"), found, strict=True))

    assert_same(use)
    assert_no_waste(use)


def test_one_graph_serves_several_backwards_for_different_tensors() -> None:
    def use(model: nn.Module) -> Found:
        leaf = image().requires_grad_()
        loss = loss_of(model(leaf))
        (saliency,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        loss.backward(inputs=[model.get_parameter("stem.weight")], retain_graph=True)
        stem = gradients(model)["stem.weight"]
        assert stem is not None
        stem = stem.clone()
        loss.backward()
        return {"saliency": saliency, "stem": stem, "image": leaf.grad, **gradients(model)}

    assert_same(use)


@pytest.mark.parametrize("changed", ["stem.weight", "norm.bias", "last.weight", "image", "features", "scores"])
def test_a_hook_of_a_tensor_fires_once_per_backward_and_may_change_the_gradient(changed: str) -> None:
    def use(model: nn.Module) -> Found:
        seen: dict[str, torch.Tensor] = {}
        leaf = image().requires_grad_()
        features, scores = model(leaf)
        tensors = {**dict(model.named_parameters()), "image": leaf, "features": features, "scores": scores}
        counts = dict.fromkeys(tensors, 0)

        def hook(gradient: torch.Tensor, name: str) -> torch.Tensor | None:
            counts[name] += 1
            seen[f"{name}, {counts[name]}"] = gradient.clone()
            return gradient.flip(-1) * 3 if name == changed else None

        accumulated = {name: 0 for name, tensor in tensors.items() if tensor.is_leaf}

        def after(tensor: torch.Tensor, name: str) -> None:
            accumulated[name] += 1

        for name, tensor in tensors.items():
            tensor.register_hook(lambda gradient, name=name: hook(gradient, name))
        for name in accumulated:
            tensors[name].register_post_accumulate_grad_hook(lambda tensor, name=name: after(tensor, name))
        loss = loss_of((features, scores))
        loss.backward(retain_graph=True)
        loss.backward()
        assert set(counts.values()) == set(accumulated.values()) == {2}
        return {**seen, "image": leaf.grad, **gradients(model)}

    assert_same(use)


def test_gradients_of_outputs_and_of_images_that_are_no_leaves_are_retained() -> None:
    def use(model: nn.Module) -> Found:
        augmented = image().requires_grad_() * 2
        outputs = model(augmented)
        for tensor in (augmented, *outputs):
            tensor.retain_grad()
        loss_of(outputs).backward()
        return {"image": augmented.grad, "features": outputs[0].grad, "scores": outputs[1].grad, **gradients(model)}

    assert_same(use)


def test_an_optimiser_that_steps_in_a_hook_during_backward() -> None:
    def use(model: nn.Module) -> Found:
        optimisers = {parameter: torch.optim.SGD([parameter], lr=0.01) for parameter in model.parameters()}

        def step(parameter: torch.Tensor) -> None:
            optimisers[parameter].step()
            parameter.grad = None

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for seed in range(3):
            loss_of(model(image(seed=seed))).backward()
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    assert_same(use)


def test_hooks_of_modules_in_the_head_see_what_they_see_in_the_plain_model() -> None:
    def use(model: nn.Module) -> Found:
        found: dict[str, torch.Tensor | None] = {}
        head = model.get_submodule("head")
        head.register_forward_pre_hook(lambda module, inputs: found.update(input=inputs[0]))
        head.register_full_backward_hook(lambda module, given, taken: found.update(given=given[0], taken=taken[0]))
        leaf = image().requires_grad_()
        loss_of(model(leaf)).backward()
        return {**found, "image": leaf.grad, **gradients(model)}

    assert_same(use)


def _augmented(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.sin() * 2


def _viewed(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.permute(0, 1, 3, 2)[..., 2:, ::2]


def _expanded(leaf: torch.Tensor) -> torch.Tensor:
    return leaf[:1, :1].expand(2, 3, -1, -1)


def _interleaved(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.unfold(2, 16, 10).flatten(0, 1).permute(1, 0, 3, 2).reshape(-1, 3, 16, 21)


@pytest.mark.parametrize("make", [_augmented, _viewed, _expanded, _interleaved])
def test_the_image_need_not_be_a_leaf(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def use(model: nn.Module) -> Found:
        leaf = image().requires_grad_()
        loss_of(model(make(leaf))).backward()
        return {"leaf": leaf.grad, **gradients(model)}

    assert_same(use)


def test_images_of_different_size_and_the_same_image_twice_in_one_loss() -> None:
    def use(model: nn.Module) -> Found:
        first, second = image().requires_grad_(), image(16, 50, 1).requires_grad_()
        losses = [loss_of(model(one)) for one in (first, second, first)]
        (losses[0] * losses[1] + losses[2].square()).backward()
        return {"first": first.grad, "second": second.grad, **gradients(model)}

    assert_same(use)


def test_a_model_of_its_own_output() -> None:
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.conv(x))

    def use(model: nn.Module) -> Found:
        leaf = image().requires_grad_()
        once = model(leaf)
        (model(once) * once).sum().backward()
        return {"leaf": leaf.grad, **gradients(model)}

    assert_same(use, Filter)


def test_parameters_that_are_functions_of_others() -> None:
    def use(model: nn.Module) -> Found:
        generator = torch.ones((), dtype=torch.double, requires_grad=True)
        made = {name: parameter * generator for name, parameter in model.named_parameters()}
        loss_of(torch.func.functional_call(model, made, image())).backward()
        return {"generator": generator.grad, **gradients(model)}

    assert_same(use)


PARTS: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
    lambda features, scores: scores.sum(),
    lambda features, scores: features.sin().sum(),
    lambda features, scores: features[..., 1:4, 2:3].sin().sum(),
    lambda features, scores: features[-1, 1, -1, -1],
    lambda features, scores: features[0].sum() + scores[1, 2],
    lambda features, scores: features.detach().sum() * scores.mean(),
    lambda features, scores: features.amax((1, 2, 3)).sum(),
]


@pytest.mark.parametrize("part", PARTS, ids=range(len(PARTS)))
def test_of_the_outputs_only_a_part_is_used(part: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    def use(model: nn.Module) -> Found:
        leaf = image().requires_grad_()
        part(*model(leaf)).backward()
        return {"image": leaf.grad, **gradients(model)}

    assert_same(use)
    assert_no_waste(use)


GRADIENTS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda like: torch.ones((), dtype=torch.double).expand_as(like),
    lambda like: torch.arange(4.0).double().view(1, 4, 1, 1).expand_as(like),
    lambda like: torch.randn(like.shape[::-1], dtype=torch.double).permute(3, 2, 1, 0),
    lambda like: torch.randn(*like.shape, 3, dtype=torch.double)[..., 1],
    lambda like: torch.randn(like.shape, dtype=torch.double).contiguous(memory_format=torch.channels_last),
    lambda like: torch.zeros_like(like),
]


@pytest.mark.parametrize("make", GRADIENTS, ids=range(len(GRADIENTS)))
def test_gradients_may_be_expanded_or_strided_and_are_left_as_they_are(
    make: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    def use(model: nn.Module) -> Found:
        leaf = image().requires_grad_()
        features, scores = model(leaf)
        torch.manual_seed(3)
        given = make(features)
        before = given.clone()
        torch.autograd.backward([features, scores], [given, torch.ones(()).double().expand_as(scores)])
        assert torch.equal(given, before)
        return {"image": leaf.grad, **gradients(model)}

    assert_same(use)


@pytest.mark.filterwarnings("ignore:Error detected in")
def test_anomaly_mode_finds_nothing_where_there_is_nothing_and_what_there_is() -> None:
    def use(model: nn.Module) -> Found:
        leaf = image().requires_grad_()
        with torch.autograd.set_detect_anomaly(True):
            features, scores = model(leaf)
            loss_of((features, scores)).backward(retain_graph=True)
            features.register_hook(lambda gradient: gradient * torch.nan)
            with pytest.raises(RuntimeError, match="'ConvolutionBackward0' returned nan values"):
                features.sum().backward()
        return {"image": leaf.grad, **gradients(model)}

    assert_same(use)


@pytest.mark.parametrize("toggled", ["stem.weight", "norm.weight", "block.0.bias", "head.weight", "image"])
@pytest.mark.parametrize("at_first", [False, True])
def test_requires_grad_may_change_between_forward_and_backward(at_first: bool, toggled: str) -> None:
    def use(model: nn.Module) -> Found:
        leaf = image().requires_grad_()
        tensor = leaf if toggled == "image" else model.get_parameter(toggled)
        tensor.requires_grad_(at_first)
        loss = loss_of(model(leaf))
        tensor.requires_grad_(not at_first)
        loss.backward()
        return {"image": leaf.grad, **gradients(model)}

    assert_same(use)


@contextmanager
def _packed_elsewhere() -> Iterator[None]:
    """Each saved tensor becomes a number, and a copy when it is asked for."""
    stored: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> int:
        stored.append(tensor.detach().clone())
        return len(stored) - 1

    with saved_tensors_hooks(pack, lambda number: stored[number].clone()):
        yield


@pytest.mark.parametrize("around_backward", [False, True])
@pytest.mark.parametrize("hooks", [save_on_cpu, _packed_elsewhere])
def test_saved_tensors_may_be_packed(hooks: Callable[[], AbstractContextManager[None]], around_backward: bool) -> None:
    def use(model: nn.Module) -> Found:
        leaf = image().requires_grad_()
        with hooks():
            loss = loss_of(model(leaf))
            if around_backward:
                loss.backward()
        if not around_backward:
            loss.backward()
        return {"image": leaf.grad, **gradients(model)}

    assert_same(use)


@pytest.mark.parametrize("reentrant", [False, True])
def test_within_a_checkpoint(reentrant: bool) -> None:
    def use(model: nn.Module) -> Found:
        leaf = image().requires_grad_()
        loss_of(checkpoint(model, leaf * 2, use_reentrant=reentrant)).backward()
        return {"image": leaf.grad, **gradients(model)}

    assert_same(use)


def test_a_second_backward_needs_a_retained_graph_and_finds_the_same_bits() -> None:
    _, converted = plain_and_converted()
    leaf = image().requires_grad_()
    loss = loss_of(converted(leaf))
    found = []
    for retain_graph in (True, False):
        loss.backward(retain_graph=retain_graph)
        found.append({"image": leaf.grad, **gradients(converted)})
        leaf.grad = None
        converted.zero_grad()
    assert_close(found[1], found[0], tolerance=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("what", ["image", "weight", "bias", "running_mean", "buffer that enters"])
def test_what_recompute_reads_must_not_change_in_between(what: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.register_buffer("scale", torch.rand(4, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.norm(self.conv(x)) * self.scale).mean((2, 3))

    converted = fxstream.convert(Scaled().eval(), 8)
    image = torch.randn(1, 3, 20, 20)
    changed = {
        "image": image,
        "weight": converted.conv.weight,
        "bias": converted.conv.bias,
        "running_mean": converted.norm.running_mean,
        "buffer that enters": converted.scale,
    }[what]
    loss = converted(image).sum()
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_is_refused_and_first_derivatives_with_create_graph_are_right() -> None:
    plain, converted = plain_and_converted()
    leaf = image().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(plain(leaf)), leaf)
    (found,) = torch.autograd.grad(loss_of(converted(leaf)), leaf, create_graph=True)
    assert_close({"image": found}, {"image": expected})
    with pytest.raises(fxstream.DoubleBackwardError, match="differentiated twice"):
        (loss_of(converted(leaf)) + found.square().sum()).backward()


# Which outputs require a gradient.


def _convolutions(body: Callable[[Any, torch.Tensor], Any]) -> nn.Module:
    """Two convolutions and a parameter for `body` to use."""
    first, second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    return randomise(Body(body, first=first, second=second, scale=nn.Parameter(torch.ones(1, 4, 1, 1))))


def _detached(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    return m.second(y.detach()), y.detach()


def _comparison(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    return y, y > 0, (y > 0).double()


def _values_of_two_results(m: Any, x: torch.Tensor) -> Any:
    return m.first(x).max(1)[0]


def _indices_of_two_results(m: Any, x: torch.Tensor) -> Any:
    return m.first(x).max(1)[1]


@pytest.mark.parametrize("body", [_detached, _comparison, _values_of_two_results, _indices_of_two_results])
def test_outputs_require_a_gradient_where_those_of_the_plain_model_do(body: Callable[..., Any]) -> None:
    assert_exact(_convolutions(body), (2, 2, 9, 8), 3, whole=True)


# Sums of what comes from several places.


def _image_in_the_head(m: Any, x: torch.Tensor) -> Any:
    y = m.second(m.first(x))
    return y * x.mean(), y, y, x


def _parameters_in_the_head(m: Any, x: torch.Tensor) -> Any:
    y = m.second(m.first(x)) * m.scale
    return y.mean((2, 3)) * m.scale.sum() + m.second.weight.sum()


def _modules_called_several_times(m: Any, x: torch.Tensor) -> Any:
    return m.second(m.second(m.first(x))) + m.second(m.first(x))


@pytest.mark.parametrize(
    ("body", "last"),
    [(_image_in_the_head, "second"), (_parameters_in_the_head, "mean"), (_modules_called_several_times, "add")],
)
def test_what_is_used_in_several_places_gets_the_sum_of_their_gradients(body: Callable[..., Any], last: str) -> None:
    assert_exact(_convolutions(body), (2, 2, 9, 8), 3, last=last)


def test_two_modules_with_one_weight_give_it_both_gradients() -> None:
    model = _convolutions(lambda m, x: m.third(m.second(m.first(x))) * m.scale)
    model.third = nn.Conv2d(4, 4, 3, padding=1)
    model.third.weight = model.second.weight
    assert_exact(model, (2, 2, 9, 8), 3, whole=True)


def test_rows_that_nobody_reads_get_no_gradient_in_a_tile_of_their_own() -> None:
    """The last row has no window of the strided convolution, and with tiles of one row it has a tile to itself."""
    layers = nn.CELU(), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 2, stride=2)
    assert_exact(randomise(nn.Sequential(*layers)).eval(), (1, 1, 3, 2), 1, whole=True)
