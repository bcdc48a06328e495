"""memory_budget: what is kept is not computed again, neither kernels nor whole tiles; counted, and exact."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from reference import Body, each_once, flops, gradients
from torch import nn

import fxstream
from fxstream.memory import flops as counting
from fxstream.memory.live import LiveBytes
from fxstream.scan.keeping import DEAR, Collector, Keep, Returner
from fxstream.scan.tiles import Scan
from fxstream.testing import compare, relative_error

SIZE = (1, 3, 131, 99)


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=3).eval()


def products(dropout: float = 0.0) -> nn.Module:
    """Convolutions of several kinds, linear layers and matrix products; each pixel is a vector to some of them."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.dropout(m.first(x)).relu_()
        skip, x = x, m.depthwise(m.down(x))
        x = m.mix(m.norm(x.permute(0, 2, 3, 1)))
        x = F.gelu(x) @ m.matrix
        return m.last(F.pixel_shuffle(m.up(x.permute(0, 3, 1, 2)), 2) + skip)

    return Body(
        body,
        first=nn.Conv2d(3, 6, 3, padding=1),
        dropout=nn.Dropout(dropout),
        down=nn.Conv2d(6, 12, 3, 2, 1, bias=False),
        depthwise=nn.Conv2d(12, 12, 5, padding=2, groups=12),
        norm=nn.LayerNorm(12),
        mix=nn.Linear(12, 10),
        matrix=nn.Parameter(torch.randn(10, 8)),
        up=nn.Conv2d(8, 24, 1),
        last=nn.Conv2d(6, 2, 1),
    )


def convolutions() -> nn.Module:
    """Whose largest value takes least work, and of whose convolutions one has no batch norm behind it."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, (5, 3), 2), nn.BatchNorm2d(16), nn.SiLU(inplace=True), nn.Conv2d(16, 4, 1)),
    ).eval()


def attention() -> nn.Module:
    """Attention over the pixels of each image, for streaming along the batch. In eval mode, the FLOPs of torch's fast
    path would not be counted."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.embed(x).flatten(2).transpose(1, 2)
        query, key, value = m.qkv(x).view(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return m.attend(x, x, x, need_weights=False)[0]

    attend = nn.MultiheadAttention(8, 2, batch_first=True)
    return Body(body, embed=nn.Conv2d(3, 8, 3, 3), qkv=nn.Linear(8, 24), attend=attend)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any]] = {
    "convolutions": (convolutions, (2, 3, 41, 29), 12),
    "products": (products, (2, 3, 38, 30), 12),
    "attention": (attention, (7, 3, 12, 12), (3, None, None, None)),
}


def keep(converted: nn.Module, image: torch.Tensor, share: float) -> Keep:
    """Set a memory budget that is a share of what all dear kernels return; what is kept of an image."""
    converted.memory_budget = "1TiB"
    everything = planned(converted, image)
    converted.memory_budget = int(share * everything.nbytes)
    return planned(converted, image)


def planned(converted: nn.Module, image: torch.Tensor) -> Keep:
    calls: list[Keep] = []

    def stop(streamed: Any, inputs: Any) -> None:
        calls.append(streamed.checked_call(*inputs)[0].keep)
        raise InterruptedError

    hook = converted.streamed.register_forward_pre_hook(stop)
    with contextlib.suppress(InterruptedError):
        converted(image)
    hook.remove()
    return calls[0]


def held(converted: nn.Module, image: torch.Tensor) -> int:
    """Bytes that are alive between forward and backward, without the output."""
    with LiveBytes() as live:
        output = converted(image)
    assert output.grad_fn
    return live.now - output.nbytes


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


@each_once(tile=[48, (None, 64), 300], budget=["100KB", "1MB", "8MB", "1GiB"])
def test_with_a_budget_a_step_is_as_exact(budget: str, tile: Any) -> None:
    model = resnet().double()
    compare(model, fxstream.convert(copy.deepcopy(model), tile, memory_budget=budget, prove=False), torch.randn(SIZE))


@pytest.mark.parametrize("share", [0, 0.05, 0.4, 1, 1.5])
@pytest.mark.parametrize("name", ["products", "attention"])
def test_whatever_share_of_the_results_is_kept_a_step_is_as_exact(name: str, share: float) -> None:
    """Convolutions, linear layers, matrix products, attention; in eval mode, where torch has a fast path for it."""
    build, shape, tile = MODELS[name]
    model, image = build().double().eval(), torch.randn(shape, dtype=torch.double)
    converted = fxstream.convert(copy.deepcopy(model), tile, prove=False, example_input=image)
    found = keep(converted, image, share)
    assert (found.nbytes > 0) == (share > 0)
    assert found.complete == (share >= 1)
    compare(model, converted, image)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_is_what_was_predicted_and_its_work_is_saved(name: str) -> None:
    """Bytes and FLOPs, each to the last one. Of attention, fewer bytes: the meta device has no kernel for it."""
    build, shape, tile = MODELS[name]
    image = torch.randn(shape)
    converted = fxstream.convert(build(), tile, prove=False, example_input=image)
    work, least = flops(lambda: converted(image).sum().backward()), held(converted, image)
    for share in (0.01, 0.2, 0.6, 1):
        found = keep(converted, image, share)
        assert found.nbytes <= converted.memory_budget
        kept = held(converted, image) - least
        assert kept == found.nbytes or (name == "attention" and kept < found.nbytes)
        assert flops(lambda: converted(image).sum().backward()) == work - found.flops


def test_results_are_kept_where_torch_has_a_fast_path_for_inference() -> None:
    """That of nn.MultiheadAttention in eval mode, whose kernel has no derivative."""
    image = torch.randn(7, 3, 12, 12)
    kept = []
    for training in (True, False):
        model = attention().train(training)
        converted = fxstream.convert(model, (3, None, None, None), prove=False, example_input=image)
        keep(converted, image, 1)
        kept.append(held(converted, image))
    assert kept[0] == kept[1] > 0


def test_what_saves_most_per_byte_is_kept_first() -> None:
    """The 3 x 3 convolution of many channels; the wide 1 x 1 convolution, which is large and cheap, is last."""
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 16, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3))
    converted, image = fxstream.convert(model, 16, prove=False), torch.randn(1, 3, 64, 64)
    orders = []
    for share in (0.05, 0.12, 0.5):
        found = keep(converted, image, share)
        orders.append((sorted(found.values), found.partial))
    assert orders == [([], 2), ([2], 4), ([2, 4], 1)]


@each_once(
    autocast=[None, torch.bfloat16, None], dtype=[torch.float32, torch.float32, torch.bfloat16], share=[0.1, 0.5, 1]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_it_changes_no_bit(autocast: Any, dtype: torch.dtype, share: float, layout: torch.memory_format) -> None:
    """Of the output and of the gradients, with dropout, autocast, half precision and channels_last."""
    model = products(dropout=0.3).to(dtype, memory_format=layout)
    image = torch.randn(2, 3, 22, 18, dtype=dtype).to(memory_format=layout)
    converted = fxstream.convert(model, 8, prove=False)

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        converted.zero_grad()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            output = converted(image)
        output.float().square().sum().backward()
        return {"output": output, **gradients(converted)}

    expected = step()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        least = held(converted, image)
        found = keep(converted, image, share)
        assert held(converted, image) == pytest.approx(least + found.nbytes, rel=0.03)
    assert found.nbytes > 0
    for name, one in step().items():
        assert torch.equal(one, expected[name]), name


def test_work_falls_as_the_budget_grows_and_ends_at_that_of_the_plain_model() -> None:
    """First by results, then by graphs that are kept as well."""
    model, image = convolutions(), torch.randn(2, 3, 41, 29)
    converted = fxstream.convert(model, 12, prove=False)
    plain = flops(lambda: model(image).sum().backward())
    work = []
    for share in (0, 0.03, 0.1, 0.3, 0.6, 0.9, 1, 1.3, 100):
        keep(converted, image, share)
        work.append(flops(lambda: converted(image).sum().backward()))
    assert sorted(set(work[:7]), reverse=True) == work[:7]
    assert work[6:] == [plain] * 3


@pytest.mark.parametrize("budget", [0, 100_000, 2_000_000, 6_000_000, 10_000_000, 2**30])
def test_what_is_held_is_within_the_budget(budget: int) -> None:
    converted = fxstream.convert(resnet(), 64, prove=False)
    image = torch.randn(SIZE)
    least = held(converted, image)
    converted.memory_budget = budget
    assert held(converted, image) - least <= budget


def test_results_that_take_more_than_was_predicted_stay_within_the_budget() -> None:
    """Blocks of a transposed convolution overlap, so that those of all tiles are larger than the whole value."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 8, 7, 2)).double()
    image = torch.randn(1, 3, 17, 13, dtype=torch.double)
    converted = fxstream.convert(copy.deepcopy(model), 4, prove=False)
    least = held(converted, image)
    for share in (0.3, 1):
        keep(converted, image, share)
        assert 0 < held(converted, image) - least <= converted.memory_budget
        compare(model, converted, image)


def test_results_serve_once_and_a_later_backward_recomputes() -> None:
    model, image = convolutions().double(), torch.randn(2, 3, 41, 29, dtype=torch.float64)
    converted = fxstream.convert(copy.deepcopy(model), 12, prove=False)
    found = keep(converted, image, 0.5)
    loss, parameters = converted(image).square().sum(), list(converted.parameters())
    expected = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    steps: list[tuple[torch.Tensor, ...]] = []
    work = [flops(lambda: steps.append(torch.autograd.grad(loss, parameters, retain_graph=True))) for _ in range(3)]
    assert work == [work[0], work[0] + found.flops, work[0] + found.flops]
    for step in steps:
        for one, other in zip(step, expected, strict=True):
            assert relative_error(one, other) < 1e-10


def test_only_the_gradients_that_are_asked_for_are_computed_from_results() -> None:
    model, image = products().double(), torch.randn(2, 3, 38, 30, dtype=torch.double, requires_grad=True)
    converted = fxstream.convert(copy.deepcopy(model), 8, prove=False)
    keep(converted, image, 0.5)
    for name in ("first.weight", "mix.bias", "last.weight"):
        ours, theirs = converted.get_parameter(name), model.get_parameter(name)
        (one,) = torch.autograd.grad(converted(image).square().sum(), ours)
        (other,) = torch.autograd.grad(model(image).square().sum(), theirs)
        assert relative_error(one, other) < 1e-10
    (one,) = torch.autograd.grad(converted(image).square().sum(), image)
    (other,) = torch.autograd.grad(model(image).square().sum(), image)
    assert relative_error(one, other) < 1e-10


@pytest.mark.parametrize("budget", [2_000_000, "1GiB"])
def test_a_backward_pass_that_fails_releases_what_was_kept(budget: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise InterruptedError

    converted = fxstream.convert(resnet(), 64, prove=False)
    image = torch.randn(SIZE)
    least = held(converted, image)
    converted.memory_budget = budget
    with LiveBytes() as live:
        loss = converted(image).sum()
        assert live.now > least + 1_000_000
        monkeypatch.setattr(Scan, "_backward_tile", fail)
        with pytest.raises(InterruptedError):
            loss.backward()
        assert live.now <= least + 10_000
    assert loss.grad_fn


def test_results_are_released_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    converted, image = fxstream.convert(convolutions(), 12, prove=False), torch.randn(2, 3, 41, 29)
    found = keep(converted, image, 0.9)
    bytes_left: list[int] = []
    backward_tile = Scan._backward_tile

    def counted(*args: Any, **kwargs: Any) -> None:
        backward_tile(*args, **kwargs)
        bytes_left.append(live.now)

    with LiveBytes() as live:
        loss = converted(image).square().sum()
        begin = live.now
        monkeypatch.setattr(Scan, "_backward_tile", counted)
        loss.backward()
    # The gradients of the parameters and of the last carries have been added.
    assert begin - bytes_left[-1] > 0.7 * found.nbytes
    assert bytes_left[0] > bytes_left[len(bytes_left) // 2] > bytes_left[-1]


# The kernels' results.


def collected(function: Callable[..., torch.Tensor], *operands: torch.Tensor) -> tuple[torch.Tensor, Collector]:
    """Run a function as the forward scan runs a step whose results are kept, on tensors that require gradients."""
    collector = Collector(frozenset({1}))
    with torch.no_grad():
        return collector.run(1, function, *(one.detach().requires_grad_() for one in operands)), collector


def returned(function: Callable[..., torch.Tensor], collector: Collector, *operands: torch.Tensor) -> tuple[Any, int]:
    """Run it again with autograd; its gradients, and the FLOPs of running it."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    found: list[torch.Tensor] = []
    run = Returner(collector.results()).run
    work = flops(lambda: found.append(run(1, function, *leaves)))
    return torch.autograd.grad(found[0].square().sum(), leaves), work


STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "overwrites its result": lambda x, w: (x @ w).mul_(2),
    "overwrites a view of it": lambda x, w: _halved(x @ w),
    "overwrites it before the next": lambda x, w: (x @ w).relu_() @ w.t(),
    "returns a view of it": lambda x, w: (x @ w)[1:],
}


def _halved(x: torch.Tensor) -> torch.Tensor:
    x[1:].div_(2)
    return x


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_overwrites_the_result_of_its_kernel(name: str) -> None:
    function, (x, w) = STEPS[name], torch.randn(2, 4, 4, dtype=torch.double)
    block, collector = collected(function, x, w)
    assert torch.equal(block, function(x, w))
    assert not block.requires_grad
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    found, work = returned(function, collector, x, w)
    assert work == 0
    assert all(map(torch.equal, found, expected))


def test_a_result_that_a_later_step_overwrites_is_not_kept() -> None:
    x, w = torch.randn(2, 4, 4, dtype=torch.double)
    block, collector = collected(torch.matmul, x, w)
    assert collector.results()
    block.mul_(3)
    assert not collector.results()


def test_other_kernels_than_before_are_computed() -> None:
    """Of another shape, another kind, or another number."""
    x, w = torch.randn(2, 4, 4, dtype=torch.double)
    _, collector = collected(lambda x, w: (x @ w) @ w, x, w)
    single = flops(lambda: x @ w)
    others = {
        3 * single: lambda x, w: torch.addmm(w, x, w) @ w + x @ w,
        1.5 * single: lambda x, w: ((x[:2] @ w) @ w) @ w,
        single: lambda x, w: ((x @ w) @ w) @ w,
        0: lambda x, w: x @ w,
    }
    for work, other in others.items():
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        expected = torch.autograd.grad(other(*leaves).square().sum(), leaves)
        found, counted = returned(other, collector, x, w)
        assert counted == work
        assert all(map(torch.equal, found, expected))


def test_there_is_a_formula_for_the_work_of_every_dear_kernel() -> None:
    assert counting._FORMULAS.keys() >= DEAR


# Whole tiles.


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
