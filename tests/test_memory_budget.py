"""memory_budget: tiles whose graphs are kept are not computed again; counted, and exact."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from reference import each_once, flops
from torch import nn

import fxstream
from fxstream.memory.live import LiveBytes
from fxstream.testing import compare, relative_error

SIZE = (1, 3, 131, 99)


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=3).eval()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (None, 0),
        (0, 0),
        (123, 123),
        ("123", 123),
        ("123 B", 123),
        ("4GiB", 4 * 2**30),
        ("1.5 kb", 1500),
        ("500 MB", 500_000_000),
        ("2tib", 2 * 2**40),
    ],
)
def test_what_a_budget_may_be(text: Any, number: int) -> None:
    converted = fxstream.convert(resnet(), 64, memory_budget=text, prove=False)
    assert converted.memory_budget == number
    converted.memory_budget = None
    assert converted.memory_budget == 0
    converted.memory_budget = text
    assert copy.deepcopy(converted).memory_budget == number


@pytest.mark.parametrize("wrong", ["4 GiBi", "-1", -1, "much", 1.5, True, "GiB", ""])
def test_what_it_may_not_be(wrong: Any) -> None:
    with pytest.raises(fxstream.MemoryBudgetError, match='text such as "4GiB"'):
        fxstream.convert(resnet(), 64, memory_budget=wrong, prove=False)


@each_once(tile=[48, (None, 64), 300], budget=["1MB", "8MB", "1GiB"])
def test_with_a_budget_a_step_is_as_exact(budget: str, tile: Any) -> None:
    model = resnet().double()
    compare(model, fxstream.convert(copy.deepcopy(model), tile, memory_budget=budget, prove=False), torch.randn(SIZE))


def test_work_falls_as_the_budget_grows_and_ends_at_that_of_the_plain_model() -> None:
    model, image = resnet(), torch.randn(SIZE)
    converted = fxstream.convert(model, 64, prove=False)
    plain = flops(lambda: model(image).sum().backward())
    work = []
    for budget in (0, "100KB", "500KB", "1MB", "2MB", "1GiB"):
        converted.memory_budget = budget
        work.append(flops(lambda: converted(image).sum().backward()))
    assert sorted(set(work), reverse=True) == work
    assert work[-1] == plain


@pytest.mark.parametrize("budget", [0, 2_000_000, 6_000_000, 2**30])
def test_what_is_held_is_within_the_budget(budget: int) -> None:
    """Beyond what is held without one, up to the graphs' own small change."""
    converted = fxstream.convert(resnet(), 64, prove=False)
    image = torch.randn(SIZE)

    def held() -> int:
        with LiveBytes() as live:
            output = converted(image)
        assert output.grad_fn
        return live.now

    least = held()
    converted.memory_budget = budget
    assert held() - least <= budget


def test_a_kept_graph_serves_once_and_a_later_backward_recomputes() -> None:
    model = resnet().double()
    converted = fxstream.convert(copy.deepcopy(model), 64, memory_budget="1GiB", prove=False)
    image = torch.randn(SIZE, dtype=torch.float64)
    expected = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    loss = converted(image).square().sum()
    parameters = list(converted.parameters())
    first = flops(lambda: torch.autograd.grad(loss, parameters, retain_graph=True))
    found: list[torch.Tensor] = []
    second = flops(lambda: found.extend(torch.autograd.grad(loss, parameters)))
    forward = flops(lambda: converted(image))
    assert second == first + forward - flops(lambda: model.fc(torch.zeros(1, 512).double()))
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-10


def test_only_what_is_asked_for_is_computed() -> None:
    model = resnet().double()
    converted = fxstream.convert(copy.deepcopy(model), 64, memory_budget="1GiB", prove=False)
    image = torch.randn(SIZE, dtype=torch.float64, requires_grad=True)
    loss, expected = converted(image).square().sum(), model(image).square().sum()
    costs = []
    for net, value in ((model, expected), (converted, loss)):
        for wanted in ([image], [net.layer2[0].conv1.weight]):
            gradients: list[torch.Tensor] = []
            grad = torch.autograd.grad
            costs.append(flops(lambda: gradients.extend(grad(value, wanted, retain_graph=True))))  # noqa: B023
    saliency, weight = costs[:2]
    assert costs[2] == saliency
    assert costs[3] == weight + flops(lambda: converted.streamed(image.detach()))  # graphs serve once
    (one,) = torch.autograd.grad(converted(image).square().sum(), image)
    (other,) = torch.autograd.grad(expected, image)
    assert relative_error(one, other) < 1e-10


def test_dropout_is_the_same_whether_a_tile_is_kept_or_computed_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Conv2d(4, 4, 3)).double()
    found = []
    for budget in (0, 100_000, "1GiB"):
        converted = fxstream.convert(model, 16, memory_budget=budget, prove=False)
        torch.manual_seed(1)
        image = torch.randn(2, 3, 50, 60, dtype=torch.float64, requires_grad=True)
        output = converted(image)
        found.append([output, *torch.autograd.grad(output.square().sum(), [image, *converted.parameters()])])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert relative_error(one, other) < 1e-10


def test_what_was_kept_is_released() -> None:
    converted = fxstream.convert(resnet(), 64, memory_budget="1GiB", prove=False)
    image = torch.randn(SIZE)
    converted(image).sum().backward()
    with LiveBytes() as live:
        loss = converted(image).sum()
        loss.backward()
        assert live.now <= 1000
        del loss
        output = converted(image)
        del output
    assert live.now == 0


def test_a_weight_changed_in_place_is_found_out() -> None:
    converted = fxstream.convert(resnet(), 64, memory_budget="1GiB", prove=False)
    loss = converted(torch.randn(SIZE)).sum()
    with torch.no_grad():
        converted.layer1[0].conv1.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_keeps_nothing() -> None:
    converted = fxstream.convert(resnet(), 64, memory_budget="1GiB", prove=False)
    image = torch.randn(SIZE)
    with torch.no_grad(), LiveBytes() as live:
        output = converted(image)
    assert live.now == output.untyped_storage().nbytes()
