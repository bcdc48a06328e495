"""torch.compile of a converted model: the head is compiled, the streamed part runs as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_drop_in import Net, train
from torch import fx, nn

import fxstream
from fxstream.testing import compare


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recording:
    """A backend of torch.compile that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    def operations(self) -> list[str]:
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        return [getattr(node.target, "__name__", str(node.target)) for node in nodes if node.op.startswith("call")]


def test_the_head_is_compiled_and_the_streamed_part_is_not() -> None:
    backend = Recording()
    model = Net().double().eval()
    converted = fxstream.convert(copy.deepcopy(model), 16)
    converted.compile(backend=backend)
    compare(model, converted, torch.randn(2, 3, 45, 37))
    assert backend.operations() == ["linear"]
    compare(model, converted, torch.randn(2, 3, 81, 64))
    assert set(backend.operations()) == {"linear"}


def test_what_is_hoisted_is_compiled_too() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()).double()
    converted = fxstream.convert(copy.deepcopy(model), 16)
    converted.compile(backend="eager")
    compare(model, converted, torch.randn(2, 3, 45, 37))


def test_training_ends_with_the_same_parameters() -> None:
    plain = Net().double().eval()
    converted = fxstream.convert(copy.deepcopy(plain), 16)
    compiled = torch.compile(converted, backend="aot_eager")
    expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.05), 3)
    assert train(compiled, torch.optim.SGD(compiled.parameters(), lr=0.05), 3) == pytest.approx(expected, abs=1e-9)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name], tensor, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_the_default_backend() -> None:
    model = Net().double().eval()
    converted = fxstream.convert(copy.deepcopy(model), 16)
    converted.compile()
    compare(model, converted, torch.randn(2, 3, 45, 37))


def test_a_compiled_model_is_to_be_converted_first() -> None:
    with pytest.raises(fxstream.WrappedModelError, match=r"wrapped by torch\.compile.*compile\(fxstream\.convert"):
        fxstream.convert(torch.compile(Net()), 16)


def test_a_model_that_was_compiled_in_place() -> None:
    """Its compiled forward is its own: the converted model does not run that instead of streaming."""
    theirs, ours = Recording(), Recording()
    model = Net().double().eval()
    model.compile(backend=theirs)
    model.head.compile(backend=theirs)
    converted = fxstream.convert(model, 16)
    compare(copy.deepcopy(model), converted, torch.randn(2, 3, 45, 37))
    assert not theirs.graphs
    converted.compile(backend=ours)
    converted(torch.randn(2, 3, 45, 37).double())
    assert ours.operations() == ["linear"]


def test_a_compiled_submodule_ends_the_prefix() -> None:
    model = Net().double().eval()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    with pytest.warns(fxstream.StreamingWarning, match=r"blocks\.1.* is one opaque call"):
        converted = fxstream.convert(model, 16)
    image = torch.randn(2, 3, 45, 37).double()
    torch.testing.assert_close(converted(image), model(image))
