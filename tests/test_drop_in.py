"""A converted model in place of the plain one: module tree, optimisers, averages, copies, files, tile shapes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from reference import Shapes, assert_close, each_once, gradients, pair
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxstream
from fxstream.testing import compare


class Net(nn.Module):
    """Residual, with batch norms, an unused head, a shared activation and a module list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(True)) for _ in range(3)]
        )
        self.unused = nn.Linear(3, 3)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        images = torch.randn(2, 3, 45, 37, generator=generator, dtype=torch.float64)
        labels = torch.randint(2, (2,), generator=generator)
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    return losses


OPTIMISERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
]


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=["sgd", "adamw"])
def test_training_ends_with_the_same_parameters(optimiser: Callable[[Any], torch.optim.Optimizer]) -> None:
    plain, converted = pair(Net().double().eval(), 16)
    before = copy.deepcopy(plain.state_dict())
    expected = train(plain, optimiser(plain.parameters()), 6)
    assert train(converted, optimiser(converted.parameters()), 6) == pytest.approx(expected, abs=1e-9)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name], tensor, rtol=0, atol=1e-9)
    assert not torch.equal(before["stem.weight"], plain.state_dict()["stem.weight"])


def test_an_optimiser_state_of_the_original_continues_identically() -> None:
    plain = Net().double().eval()
    first = torch.optim.AdamW(plain.parameters(), lr=0.01)
    train(plain, first, 2)
    converted = fxstream.convert(copy.deepcopy(plain), 16)
    second = torch.optim.AdamW(converted.parameters(), lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(plain, first, 2)
    train(converted, second, 2)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name], tensor, rtol=0, atol=1e-9)


def names(model: nn.Module) -> tuple[list[str], list[str], list[str]]:
    return (
        list(model.state_dict()),
        [name for name, _ in model.named_parameters()],
        [name for name, _ in model.named_buffers()],
    )


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: list[Callable[[Any], Any]] = [lambda model: model, copy.deepcopy, through_pickle, through_a_file]


@each_once(duplicate=COPIES, build=[Net, lambda: torchvision.models.googlenet(init_weights=False)])
def test_the_module_tree_is_the_originals(build: Callable[[], nn.Module], duplicate: Callable[[Any], Any]) -> None:
    original = build().eval()
    converted = duplicate(fxstream.convert(original, (32, 40)))
    assert names(converted) == names(original)
    assert converted.tile_shape == (None, None, 32, 40)
    plain_modules = [name for name, _ in original.named_modules()]
    assert [name for name, _ in converted.named_modules() if name != "streamed"] == plain_modules
    image = torch.randn(1, 3, 67, 71)
    torch.testing.assert_close(converted(image), original(image), rtol=1e-4, atol=1e-5)
    converted(image).sum().backward()
    assert str(converted.streamed.graph) == str(fxstream.convert(original, (32, 40)).streamed.graph)


@pytest.mark.parametrize("duplicate", COPIES[1:], ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_independent(duplicate: Callable[[Any], Any]) -> None:
    converted = fxstream.convert(Net().eval(), 16)
    twin = duplicate(converted)
    image = torch.randn(1, 3, 33, 33)
    expected = converted(image)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(converted(image), expected)
    assert torch.equal(twin(image), torch.zeros_like(expected))


@pytest.mark.parametrize("weights_only", [True, False])
def test_state_dicts_go_both_ways_through_a_file(weights_only: bool) -> None:
    original, converted = Net().double().eval(), fxstream.convert(Net().double().eval(), 16)
    image = torch.randn(1, 3, 33, 33, dtype=torch.float64)
    for source, target in ((original, converted), (converted, Net().double().eval())):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        missing = target.load_state_dict(torch.load(file, weights_only=weights_only), strict=True)
        assert not missing.missing_keys
        torch.testing.assert_close(target(image), original(image))


def test_averaged_models_follow_as_those_of_the_plain_model_do() -> None:
    plain, converted = pair(Net().double().eval(), 16)
    image = torch.randn(1, 3, 33, 29, dtype=torch.float64)
    outputs = []
    for model in (plain, converted):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            train(model, optimiser, 1)
            average.update_parameters(model)
        outputs += [average(image), model(image)]
    torch.testing.assert_close(outputs[2:], outputs[:2])
    assert not torch.allclose(outputs[2], outputs[3])


def test_a_copy_of_a_copy_trains() -> None:
    plain = Net().double().eval()
    twin = through_pickle(copy.deepcopy(through_a_file(fxstream.convert(plain, 16))))
    expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.05), 3)
    assert train(twin, torch.optim.SGD(twin.parameters(), lr=0.05), 3) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("tile_shape", [7, (64, 9), [16, 16], (None, None, 33, 12)])
@pytest.mark.parametrize("duplicate", COPIES, ids=["itself", "deepcopy", "pickle", "torch.save"])
def test_the_tile_shape_can_be_changed(tile_shape: Any, duplicate: Callable[[Any], Any]) -> None:
    model = Net().double().eval()
    converted = fxstream.convert(model, 16)
    graph = converted.streamed.graph
    converted.tile_shape = tile_shape
    assert converted.streamed.graph is graph, "traced anew"
    expected = fxstream.convert(model, tile_shape)
    assert converted.tile_shape == expected.tile_shape
    converted = duplicate(converted)
    assert converted.tile_shape == expected.tile_shape
    image = torch.randn(1, 3, 33, 29, dtype=torch.float64)
    shapes = []
    for net in (converted, expected):
        with Shapes(torch.ops.aten.convolution) as convolved:
            net(image)
        shapes.append(convolved.shapes)
    assert shapes[0] == shapes[1], "other tiles"
    compare(model, converted, image)


def test_the_tile_shape_may_change_between_forward_and_backward() -> None:
    model, converted = pair(Net().double().eval(), 16)
    image = torch.randn(1, 3, 33, 29, dtype=torch.float64)
    for net in (model, converted):
        loss = net(image).square().sum()
        if net is converted:
            converted.tile_shape = 5
        loss.backward()
    assert_close(gradients(converted), gradients(model))


@pytest.mark.parametrize("tile_shape", [0, (8,), "8", None])
def test_a_wrong_tile_shape_changes_nothing(tile_shape: Any) -> None:
    converted = fxstream.convert(Net().eval(), 16)
    with pytest.raises(fxstream.TileShapeError, match="tile_shape must"):
        converted.tile_shape = tile_shape
    assert converted.tile_shape == (None, None, 16, 16)


@pytest.mark.parametrize("tile_shape", [(1, None, 8, 8), (None, 8), (4, None, None, None)])
def test_a_tile_shape_along_other_axes_needs_another_conversion(tile_shape: Any) -> None:
    converted = fxstream.convert(Net().eval(), 16)
    with pytest.raises(fxstream.TileShapeError, match=r"converted to stream along H, W\. Way out: convert"):
        converted.tile_shape = tile_shape


def test_parameters_are_the_same_objects_and_containers_are_reachable() -> None:
    model = torchvision.models.resnet18().eval()
    converted = fxstream.convert(model, 64)
    for (name, ours), (_, theirs) in zip(converted.named_parameters(), model.named_parameters(), strict=True):
        assert ours is theirs, name
    for (name, ours), (_, theirs) in zip(converted.named_buffers(), model.named_buffers(), strict=True):
        assert ours is theirs, name
    assert converted.layer1[0].conv1.weight is model.layer1[0].conv1.weight
    assert converted.layer1[0].conv1 is not model.layer1[0].conv1


def test_conversion_and_mode_changes_leave_the_original_untouched() -> None:
    model = Net().eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    classes = {name: type(module) for name, module in model.named_modules()}
    converted = fxstream.convert(model, 16, freeze_batchnorm=True)
    converted.train()
    converted.blocks[0].register_forward_hook(lambda *_: None)
    converted.extra = nn.Linear(1, 1)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not model.training


def test_parameters_are_read_at_every_call() -> None:
    model = Net().double().eval()
    converted = fxstream.convert(model, 16)
    image = torch.randn(1, 3, 33, 29, dtype=torch.float64)
    other = Net().double().eval()
    converted.load_state_dict(other.state_dict(), assign=True)
    converted.stem.weight = other.stem.weight
    torch.testing.assert_close(converted(image), other(image))
