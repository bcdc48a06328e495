"""The proof of a conversion: whatever the graph does not do as the model does is found, and the model is left alone."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from reference import Body, Operations
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

import fxstream
from fxstream.graph.snapshot import RandomState
from fxstream.ops import Local, Sliding, fit
from fxstream.proof.prove import _Proof


def seen(x: Any) -> bool:
    """True in the model, and False while it is traced, where `x` is a proxy or a tensor without numbers."""
    return not vars(x) and not x.is_meta


class Named(OrderedDict[str, Any]):
    """As the outputs of some libraries."""


@dataclass
class Result:
    value: torch.Tensor
    name: str


def net(difference: Callable[[Any, torch.Tensor, torch.Tensor], Any] = lambda m, x, y: y, **parts: Any) -> nn.Module:
    """A model; `difference` is given the model, the image and what would be the output."""
    convolutions = {"first": nn.Conv2d(3, 4, 3, padding=1), "last": nn.Conv2d(4, 2, 3, padding=1)}
    return Body(lambda m, x: difference(m, x, m.last(m.first(x).relu())), **convolutions, **parts)


def _counted(m: Any, x: Any, y: Any) -> Any:
    if seen(x):
        m.count.add_(1)
    return y


def _overwritten_parameter(m: Any, x: Any, y: Any) -> Any:
    if seen(x):
        m.first.weight.data.add_(1)
    return y


def _set_attribute(m: Any, x: Any, y: Any) -> Any:
    if seen(x):
        m.calls = 1
    return y


def _logged(m: Any, x: Any, y: Any) -> Any:
    if seen(x):
        m.log.append(1)
    return y


def _calmed(m: Any, x: Any, y: Any) -> Any:
    if seen(x):
        m.first.eval()
    return y


def _drawing(draw: Callable[[], Any]) -> Callable[[Any, Any, Any], Any]:
    def difference(m: Any, x: Any, y: Any) -> Any:
        if seen(x):
            draw()
        return y

    return difference


def _overwritten_image(m: Any, x: Any, y: Any) -> Any:
    if seen(x):
        x.data.zero_()
    return y


def _accumulated(m: Any, x: Any, y: Any) -> Any:
    total = torch.zeros(())
    return y + total.add_(y.mean())


DIFFERENCES: dict[str, tuple[Callable[[Any, Any, Any], Any], str]] = {
    "values": (lambda m, x, y: y * 2 if seen(x) else y, r"the output differs \(relative error 5.0e-01\)"),
    "last bits": (lambda m, x, y: y * (1 + 1e-15) if seen(x) else y, "the output differs"),
    "shape": (lambda m, x, y: y[..., 1:] if seen(x) else y, r"shape=\(2, 2, 64, 63\) in the plain model"),
    "dtype": (lambda m, x, y: y.float() if seen(x) else y, "dtype=torch.float32 in the plain model, and dtype=torch.f"),
    "requires_grad": (lambda m, x, y: y.detach() if seen(x) else y, "requires_grad=False in the plain model"),
    "container": (lambda m, x, y: (y,) if seen(x) else [y], "a tuple of 1 in the plain model, and a list of 1"),
    "length": (lambda m, x, y: (y, y) if seen(x) else (y,), "a tuple of 2 in the plain model, and a tuple of 1"),
    "dict subclass": (lambda m, x, y: Named(a=y) if seen(x) else {"a": y}, "Named of .* in the graph"),
    "key": (lambda m, x, y: {"a": y} if seen(x) else {"b": y}, r"a dict of \['a'\] in the plain model"),
    "tuple for a tensor": (lambda m, x, y: (y,) if seen(x) else y, "a tuple of 1 in the plain model, and a Tensor"),
    "string in a dataclass": (
        lambda m, x, y: Result(y, "one") if seen(x) else Result(y, "two"),
        "the output.name is 'one' in the plain model, and 'two' in the graph",
    ),
    "None": (lambda m, x, y: (y, None) if seen(x) else (y, 0), r"the output\[1\] is None in the plain model, and 0"),
    "type of a number": (lambda m, x, y: (y, 1) if seen(x) else (y, True), r"the output\[1\] is 1 .* True"),
    "gradient of the image": (
        lambda m, x, y: y + (x.mean() - x.mean().detach()) if seen(x) else y,
        "the gradient of the image differs",
    ),
    "gradient of a parameter": (
        lambda m, x, y: y + (m.last.bias - m.last.bias.detach())[:, None, None] if seen(x) else y,
        "the gradient of last.bias differs",
    ),
    "no gradient": (
        lambda m, x, y: y + (m.gain - m.gain.detach()) if seen(x) else y,
        "the gradient of gain is computed in the plain model, and in the graph there is none",
    ),
    "a buffer": (_counted, "after the call, count differs"),
    "a parameter": (_overwritten_parameter, "after the call, first.weight differs"),
    "an attribute": (_set_attribute, "after the call, calls is 1 in the plain model, and 0 in the graph"),
    "a list": (_logged, "after the call, log is a list of 1 in the plain model, and a list of 0"),
    "a mode": (_calmed, "after the call, first.training is False in the plain model"),
    "the image": (_overwritten_image, "the image afterwards differs"),
    "random numbers of torch": (_drawing(lambda: torch.rand(1)), "they draw different random numbers"),
    "random numbers of Python": (_drawing(random.random), "they draw different random numbers"),
    "random numbers of numpy": (_drawing(lambda: np.random.rand(1)), "they draw different random numbers"),
    "a failing graph": (
        lambda m, x, y: y if seen(x) else y.view(7),
        r"the graph fails, and the plain model does not \(RuntimeError: shape '\[7\]' is invalid",
    ),
    "a failing backward pass": (
        lambda m, x, y: y.exp() + 1 if seen(x) else y.cumsum(2).exp().add_(1),
        "the graph's backward pass fails, and the plain model's does not .*modified by an inplace operation",
    ),
    "a constant that is overwritten": (_accumulated, "_tensor_constant0, which forward makes once and overwrites, is"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_found_and_named(name: str) -> None:
    difference, words = DIFFERENCES[name]
    model = net(difference, count=nn.Buffer(torch.zeros(())), gain=nn.Parameter(torch.ones(()))).double()
    model.calls, model.log = 0, []  # type: ignore[assignment]  # no modules
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxstream.StreamingWarning)  # a head that slides
        with pytest.raises(fxstream.ProofError, match=words):
            fxstream.convert(model, 16)
        fxstream.convert(model, 16, prove=False)


class Block(nn.Module):
    """Doubles tensors, and not proxies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if seen(x) else x


def test_the_error_names_the_module_and_the_line_where_they_part() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), Block()), nn.Conv2d(4, 2, 3))
    line = inspect.getsourcelines(Block.forward)[1] + 1
    with pytest.raises(fxstream.ProofError) as error:
        fxstream.convert(model, 16)
    message = str(error.value)
    assert f"They part in 1.1 ({__file__}:{line}: return x * 2 if seen(x) else x)" in message
    assert "the plain model computes aten.mul.Tensor(float32 2x4x62x62, 2), and the graph aten.convolution" in message
    assert "for 2. Way out:" in message
    assert "fxstream.compile" in message


def test_where_all_operations_are_the_same_the_error_names_the_forward() -> None:
    line = inspect.getsourcelines(Body.forward)[1]
    with pytest.raises(fxstream.ProofError, match=rf"See Body.forward \(.*reference.py:{line}\)"):
        fxstream.convert(net(DIFFERENCES["container"][0]), 16)


@pytest.mark.parametrize("value", [0.0, 1e-6, 1.0])
def test_a_branch_that_is_initialised_to_nothing_is_seen(value: float) -> None:
    """The scale of the branch gets no gradient, which would show the difference as well."""
    scale = nn.Parameter(torch.full((2, 1, 1), value), requires_grad=False)
    model = net(lambda m, x, y: y + (m.scale - m.scale.mean()) * (y.sin() if seen(x) else y), scale=scale)
    with pytest.raises(fxstream.ProofError, match="the output differs"):
        fxstream.convert(model, 16)


# What is no difference.


class Listed(nn.Module):
    """Finds its modules in a list, in an object and in a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.layers = [self.conv, (self.norm,)]
        self.act = lambda x: self.norm(x).relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.layers[1][0](self.layers[0](x)))  # type: ignore[operator, index]  # a list


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x.mean(3).transpose(1, 2))[0]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


def _two_branches(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.first(x)
    head = m.drop(y.mean((2, 3)))
    return m.drop(m.last(y)).sum((2, 3)) + head


def _changed(module: nn.Module) -> nn.Module:
    """The weight that its hook has computed does not belong to its parameters any more."""
    module.weight_g.data.mul_(2)  # type: ignore[operator, union-attr]  # a parameter
    return module


SAME: dict[str, Callable[[], nn.Module]] = {
    "modules in containers": Listed,
    "a recurrent layer": Recurrent,
    "a checkpoint": Checkpointed,
    "weight_norm": lambda: _changed(nn.utils.weight_norm(nn.Conv2d(4, 4, 3))),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
    "pruning": lambda: nn.utils.prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5),
    "an in-place operation": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Hardswish(inplace=True)),
    "nothing but NaN": lambda: Body(lambda m, x: (-x.abs() - 1).log()),
    "dropouts in two branches": lambda: Body(
        _two_branches, first=nn.Conv2d(4, 4, 3), last=nn.Conv2d(4, 4, 3), drop=nn.Dropout(0.5)
    ),
    "scripted": lambda: torch.jit.script(nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("name", SAME)
def test_an_ordinary_model_in_training_mode_is_proved_and_left_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, or left to the head
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), SAME[name]())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", fxstream.StreamingWarning)
        fxstream.convert(model, 16)
    assert not [one for one in caught if "not proved" in str(one.message)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class OwnNorm(nn.BatchNorm2d):
    """Is traced through."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, OwnNorm])
def test_a_frozen_batch_norm_is_proved_as_frozen(norm: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 4, 3))
    fxstream.convert(model.train(), 16, freeze_batchnorm=True)
    assert model[1].training


@pytest.mark.filterwarnings("ignore:streaming ends")
def test_a_model_that_overwrites_its_input_is_proved() -> None:
    convolutions = {"first": nn.Conv2d(3, 4, 3), "last": nn.Conv2d(3, 4, 3)}
    fxstream.convert(Body(lambda m, x: m.first(x * 2) + m.last(x.mul_(2) + 1), **convolutions), 16)


def test_the_graphs_of_the_partition_are_run_and_not_the_traced_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(prefix: Any, name: str) -> Any:
        parts = partition(prefix, name)
        (call,) = (node for node in parts.streamed.nodes if node.name == "last")
        call.target = "other"
        return parts

    partition = fxstream.model.variants.partition
    monkeypatch.setattr(fxstream.model.variants, "partition", wrong)
    with pytest.raises(fxstream.ProofError, match="the output differs"):
        fxstream.convert(net(other=nn.Conv2d(4, 2, 3, padding=1)), 16)


# What is left alone.


class Diary:
    """An object that is no module."""

    def __init__(self) -> None:
        self.calls, self.means = 0, [torch.zeros(())]


class Stateful(nn.Module):
    """Its head, which stays one call, changes all that a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.diary, self.calls, self.shared = nn.BatchNorm2d(4), Diary(), 0, [0]
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.diary.calls += 1
        self.diary.means[0].add_(1)
        self.diary.means.append(x.detach().mean())
        self.shared[0] += 1
        noise = torch.rand(1, generator=self.generator) + torch.rand(1) + random.random() + np.random.rand()
        self.norm.weight.data.mul_(2)
        return self.norm(x) * noise.to(x.dtype)


def state_of(model: nn.Module, head: Stateful) -> list[Any]:
    """All that must not change, as far as it is no random number."""
    tensors = [*model.parameters(), *model.buffers(), *head.diary.means]
    values = [(id(one), one.data_ptr(), one._version, one.sum().item(), id(one.grad)) for one in tensors]
    gradients = [one.grad.sum().item() for one in model.parameters() if one.grad is not None]
    plain = [head.calls, head.diary.calls, list(head.shared), head.generator.get_state().tolist()]
    return [values, gradients, plain, [module.training for module in model.modules()]]


ENDINGS: dict[str, tuple[Callable[[Any], Any], type[Exception]]] = {
    "success": (lambda x: x, fxstream.StreamingWarning),
    "a difference": (lambda x: x * 2 if seen(x) else x, fxstream.ProofError),
    "a forward that always fails": (lambda x: x.view(7) if seen(x) else x, fxstream.StreamingWarning),
}


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_model_is_left_alone(ending: str) -> None:
    head, hooked = Stateful(), []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), head, Body(lambda m, x: ENDINGS[ending][0](x)))
    model[:2](torch.randn(1, 3, 8, 8)).sum().backward()
    for module in (model, head, head.norm):
        module.register_forward_hook(lambda *_: hooked.append("hook"))
    head.norm.weight.register_hook(lambda gradient: hooked.append("tensor hook"))
    # Tracing calls it with proxies.
    globally = register_module_forward_hook(lambda m, x, y: hooked.append("global hook") if seen(y) else None)
    before, drawn = state_of(model, head), RandomState()
    try:
        fxstream.convert(model, 16)
    except fxstream.ProofError:
        assert ending == "a difference"
    else:
        assert ending != "a difference"
    assert not hooked
    assert state_of(model, head) == before
    assert not drawn.has_changed()
    head(torch.zeros(1, 4, 1, 2))
    globally.remove()
    assert hooked == ["global hook", "hook"] * 2  # they are still there: the batch norm and the head itself


def test_a_conversion_without_gradients_or_in_inference_mode_is_proved() -> None:
    for region in (torch.no_grad, torch.inference_mode):
        with region():
            with pytest.raises(fxstream.ProofError, match="the gradient of the image differs"):
                fxstream.convert(net(DIFFERENCES["gradient of the image"][0]), 16)
            assert not torch.is_grad_enabled()


# How often, and with what.


def test_the_plain_model_runs_once_and_so_does_the_graph() -> None:
    model = net().eval()
    with Operations() as operations:
        fxstream.convert(model, 16)
    assert operations.counts["convolution"] == 4
    with Operations() as operations:
        fxstream.convert(model, 16, prove=False)
    assert "convolution" not in operations.counts


def test_a_model_on_the_meta_device_is_not_proved() -> None:
    with torch.device("meta"):
        model = net(DIFFERENCES["values"][0])
    fxstream.convert(model, 16)


def _convolved(m: Any, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.conv2d(x, m.weight)


@pytest.mark.parametrize(
    ("shape", "model"),
    {
        "channels of a convolution": ((2, 7, 64, 64), lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(7, 2, 3))),
        "one dimension": ((2, 5, 64), lambda: nn.Conv1d(5, 2, 3)),
        "three dimensions": ((2, 5, 16, 16, 16), lambda: nn.Conv3d(5, 2, 3)),
        "greater images": ((2, 3, 96, 96), lambda: nn.Conv2d(3, 3, 65)),
        "one image": ((1, 3, 64, 64), lambda: Body(lambda m, x: m.conv(x).reshape(3, 64, 64), conv=nn.Conv2d(3, 3, 1))),
        "one channel": ((2, 1, 64, 64), lambda: Body(_convolved, weight=nn.Parameter(torch.ones(3, 1, 2, 2)))),
        "channels of several images": (
            (2, 3, 64, 64),
            lambda: Body(lambda m, x: m.conv(torch.cat([x, x], 1)), conv=nn.Conv2d(6, 3, 1)),
        ),
    }.values(),
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_the_small_image_is_one_that_the_model_takes(shape: tuple[int, ...], model: Callable[[], nn.Module]) -> None:
    shapes: list[Any] = []

    def body(m: Any, x: torch.Tensor) -> Any:
        y = m.model(x)
        shapes.append(x.shape if seen(x) else None)
        return y

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxstream.StreamingWarning)  # what is left to the head
        fxstream.convert(Body(body, model=model()), 16)
    assert [tuple(one) for one in shapes if one is not None] == [shape]


def test_the_shape_of_the_example_comes_first_and_its_dtype_is_taken() -> None:
    given: list[Any] = []

    def difference(m: Any, x: Any, y: Any) -> Any:
        if seen(x):
            given.append((tuple(x.shape), x.dtype))
        return y

    model = net(difference)
    fxstream.convert(model, 16, example_input=torch.zeros(1, 3, 20, 24))
    assert given == [((1, 3, 20, 24), torch.float32)]


class Masked(nn.Module):
    """Takes a second argument that no image could be."""

    def __init__(self, factor: Callable[[Any], Any] = lambda x: 1) -> None:
        super().__init__()
        self.conv, self.factor = nn.Conv2d(3, 4, 3, padding=1), factor

    def forward(self, x: torch.Tensor, scale: torch.Tensor, *, further: float = 1.0) -> torch.Tensor:
        return self.conv(x) * scale.reshape(2, 4, 1, 1) * self.factor(x)


def test_a_model_that_accepts_nothing_is_not_proved_and_the_warning_says_why_and_the_way_out() -> None:
    with pytest.warns(fxstream.StreamingWarning) as caught:
        fxstream.convert(Masked(), 16)
    (message,) = [str(one.message) for one in caught]
    assert message.startswith("the conversion of Masked is not proved on a small image")
    assert "RuntimeError" in message
    assert "example_input, which may be a tuple of all arguments" in message
    assert caught[0].filename == __file__


class Moded(nn.Module):
    """Does one of three things, one of which a graph does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor, mode: str = "one", mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.conv(x)
        if mask is not None:
            y = y * mask
        if y.shape[2] > 500:  # a graph for each size
            y = y + 1
        if mode == "three":
            return y if seen(x) else y * 2
        return y * len(mode)


@pytest.mark.parametrize("size", [12, 90])
def test_a_call_with_other_constants_is_proved_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes are those of a small image, or not."""
    proofs = []
    monkeypatch.setattr(_Proof, "_compare", lambda *given, do=_Proof._compare: proofs.append(do(*given)))
    model = Moded()
    converted = pickle.loads(pickle.dumps(copy.deepcopy(fxstream.convert(model, 8))))
    assert len(proofs) == 1
    mask = torch.rand(1, 1, size, size + 1)
    calls = [
        ({}, 1),
        ({"mode": "two!"}, 2),
        ({"mask": mask}, 3),
        ({"mode": "two!"}, 3),
        ({"mode": "two!", "mask": mask}, 4),
    ]
    for options, expected in calls:
        for rows in (0, 1):
            image = torch.randn(1, 3, size, size + 1 if "mask" in options else size + 2 + rows)
            torch.testing.assert_close(converted(image, **options), model(image, **options))
        assert len(proofs) == expected
    with pytest.raises(fxstream.ProofError, match="the output differs"):
        converted(image, mode="three")
    unproved = fxstream.convert(model, 8, prove=False)
    torch.testing.assert_close(unproved(image, mode="two!"), model(image, mode="two!"))
    assert len(proofs) == 4


def test_an_example_may_be_a_tuple_of_all_arguments() -> None:
    example = (torch.randn(2, 3, 9, 9), torch.randn(2, 4))
    fxstream.convert(Masked(), 4, example_input=example)
    with pytest.raises(fxstream.ProofError, match="the output differs"):
        fxstream.convert(Masked(lambda x: 2 if seen(x) else 1), 4, example_input=example)
    without = Body(lambda m, x: x.relu())
    assert fxstream.analyze(without, example_input=(torch.zeros(1, 1, 4, 4),)).names == ("N", "C", "H", "W")


def test_an_optional_argument_is_left_at_its_default() -> None:
    class Optional(Masked):
        def forward(self, x: torch.Tensor, scale: Any = 2.0, *, further: float = 1.0) -> torch.Tensor:  # type: ignore[override]
            return self.conv(x) * scale * further

    fxstream.convert(Optional(), 16)


ELSEWHERE: list[nn.Module] = []


def test_a_forward_that_reaches_the_model_from_elsewhere_is_not_proved_and_changes_nothing() -> None:
    norm = nn.BatchNorm2d(4)
    ELSEWHERE[:] = [norm]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Body(lambda m, x: ELSEWHERE[0](x) + 1, norm=norm))
    with pytest.warns(fxstream.StreamingWarning, match="not proved .* a copy of it calls 1.norm of the model itself"):
        fxstream.convert(model, 16, freeze_batchnorm=True)
    assert norm.num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:streaming ends")
def test_a_buffer_that_is_reached_from_elsewhere_gets_its_numbers_back() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Buffer(torch.zeros(()))
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if seen(x):
                buffers[0].add_(1)
            return x + 1

    opaque = Opaque()
    buffers = [opaque.mean]  # in a closure of the class, which all copies share
    with pytest.warns(fxstream.StreamingWarning, match="a copy of it changes 1.mean of the model itself"):
        fxstream.convert(nn.Sequential(nn.Conv2d(3, 4, 3), opaque), 16)
    assert opaque.mean == 0


HIDDEN = torch.Generator()


def test_a_model_that_does_not_repeat_itself_is_not_proved() -> None:
    class Restless(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand((), generator=HIDDEN)

    with pytest.warns(fxstream.StreamingWarning, match="not proved .* two runs of the plain model differ"):
        fxstream.convert(nn.Sequential(nn.Conv2d(3, 4, 3), Restless()), 16)


def test_a_model_whose_backward_pass_fails_is_proved_forwards() -> None:
    def difference(factor: int) -> Callable[[Any, Any, Any], Any]:
        return lambda m, x, y: y.exp().sub_(1) * (factor if seen(x) else 1)

    fxstream.convert(net(difference(1)), 16)
    with pytest.raises(fxstream.ProofError, match="the output differs"):
        fxstream.convert(net(difference(2)), 16)


# Rules of a user's own.


class Blurred(nn.Module):
    """The mean of each pixel and the one above it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x, (2, 1), stride=1)


def _blurred(kernel: int) -> Callable[[Any, Any], Local]:
    def rule(module: Any, x: Any) -> Local:
        windows = {2: Sliding(kernel=2)}
        scale = 1.0 if kernel == 2 else 1.5
        return Local((x,), x.slid(windows), lambda block, span: scale * module(fit(block, [span])), windows)

    return rule


@pytest.mark.parametrize("following", [(), (nn.Dropout(0.5),)], ids=["", "random"])
def test_a_wrong_rule_of_a_users_own_is_found_unless_the_prefix_draws(following: tuple[nn.Module, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Blurred(), *following)
    fxstream.register(Blurred, spatial=2)(_blurred(2))
    fxstream.convert(model, 16)
    fxstream.register(Blurred, spatial=2)(_blurred(3))
    if following:
        fxstream.convert(model, 16)
        return
    with pytest.raises(
        fxstream.ProofError, match=r"in tiles of \(32, 32\): the output differs.*1 \(Blurred\).*check_op"
    ):
        fxstream.convert(model, 16)


def test_a_value_that_is_the_image_itself_is_proved() -> None:
    """A cast that changes nothing returns what it is given; the rule of a cast is fxstream's own."""
    model = Body(lambda m, x: (m.conv(x.to(m.conv.weight)), x.to(m.conv.weight)), conv=nn.Conv2d(3, 4, 3))
    fxstream.convert(model, 8)


# Copies of module trees, which the converted model is, too.


@pytest.mark.filterwarnings("ignore:streaming ends")
def test_containers_and_closures_of_a_converted_model_hold_its_own_modules() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Listed())
    converted = fxstream.convert(model, 16)
    inside = converted.get_submodule("2")
    assert inside is not model[2]
    assert inside.layers == [inside.conv, (inside.norm,)]  # type: ignore[comparison-overlap]
    before = model[2].layers
    inside.norm.eval()
    image = torch.zeros(1, 1, 1, 1).expand(1, 4, 1, 1)
    assert inside.act(image).shape == image.shape  # its batch norm is not in training mode, which would fail
    assert model[2].layers is before
    assert before[0] is model[2].conv
    assert model[2].norm.training
