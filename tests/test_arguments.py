"""The arguments of a forward: optional ones, keywords and any number of them, in every combination that plain takes."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import gradients, image
from torch import nn

import fxstream
from fxstream.graph.arguments import Given, Parameters, Slot, form_of
from fxstream.testing import head, relative_error

MASK = torch.rand(2, 1, 26, 21, dtype=torch.double)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1).double(), nn.Conv2d(4, 2, 3, padding=1).double()


class Optional(Net):
    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, features: bool = False, scale: float = 2.0
    ) -> Any:
        y = self.first(x) * scale
        if mask is not None:
            y = y * mask
        return (self.last(y), y) if features is True else self.last(y)


class Named(Net):
    def forward(self, x: torch.Tensor, *, mode: str = "both", mask: torch.Tensor | None = None) -> Any:
        y = self.first(x)
        y = y if mask is None else y * mask
        return {"first": y} if mode == "first" else {"first": y, "last": self.last(y)}


class Variadic(Net):
    def forward(self, x: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        y = self.first(x)
        for other in others:
            y = y * other
        if options.get("negative"):
            y = -y
        return self.last(y + options.get("shift", 0))


class Required(Net):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, gain: float) -> torch.Tensor:
        y = self.first(x) * gain
        return self.last(y if mask is None else y * mask)


class Sizes(Net):
    def forward(self, x: torch.Tensor, size: tuple[int, int] = (9, 9), dims: list[int] = [2, 3]) -> torch.Tensor:  # noqa: B006
        return self.last(nn.functional.interpolate(self.first(x), size=size)).mean(dims)


CALLS: list[tuple[Callable[[], nn.Module], list[tuple[tuple[Any, ...], dict[str, Any]]]]] = [
    (
        Optional,
        [
            ((), {}),
            ((MASK,), {}),
            ((None,), {}),
            ((), {"mask": MASK, "features": True}),
            ((None, True), {}),
            ((None, False, 3.0), {}),
            ((), {"scale": 2}),
            ((MASK, True, 0.5), {}),
        ],
    ),
    (Named, [((), {}), ((), {"mode": "first"}), ((), {"mask": MASK}), ((), {"mask": MASK, "mode": "first"})]),
    (
        Variadic,
        [
            ((), {}),
            ((MASK,), {}),
            ((MASK, 2.0, MASK), {}),
            ((), {"negative": True}),
            ((2,), {"shift": MASK, "unused": None}),
            ((), {"negative": False, "shift": 1}),
        ],
    ),
    (Required, [((MASK, 2.0), {}), ((None, 2.0), {}), ((MASK, 3), {}), ((), {"gain": 1.5, "mask": None})]),
    (Sizes, [((), {}), (((8, 5),), {}), (([9, 9],), {}), ((torch.Size([8, 7]),), {}), ((), {"dims": [2]})]),
]


def _step(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    x = image().requires_grad_()
    model.zero_grad()
    output = model(x, *args, **kwargs)
    leaves = torch.utils._pytree.tree_leaves(output)
    sum(leaf.square().sum() for leaf in leaves).backward()
    assert x.grad is not None
    return output, {**gradients(model), "image": x.grad, **{f"output {i}": leaf for i, leaf in enumerate(leaves)}}


@pytest.mark.parametrize(("build", "calls"), CALLS, ids=[build.__name__ for build, _ in CALLS])
def test_every_call_that_plain_takes(build: Callable[[], nn.Module], calls: list[Any]) -> None:
    plain = build()
    converted = fxstream.convert(copy.deepcopy(plain), 8, prove=build is not Required)
    copies = [converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))]
    for number, (args, kwargs) in enumerate(calls + calls[:2]):
        output, expected = _step(plain, args, kwargs)
        got, found = _step(copies[number % 3], args, kwargs)
        assert type(got) is type(output)
        assert expected.keys() == found.keys()
        for name in expected:
            assert relative_error(found[name], expected[name]) <= 1e-10, (args, kwargs, name)


def test_the_default_arguments_stream_and_the_graph_keeps_the_signature() -> None:
    converted = fxstream.convert(Optional(), 8)
    assert not head(converted)
    names = list(inspect.signature(converted.forward).parameters)
    assert names == ["x", "mask", "features", "scale"]
    assert [node.name for node in converted.graph.nodes if node.op == "placeholder"] == names


def test_a_call_that_plain_refuses_is_refused_alike() -> None:
    converted = fxstream.convert(Optional(), 8)
    for args, kwargs in [((), {}), ((image(), None, False, 2.0, 5), {}), ((image(),), {"x": image()}), ((), {"z": 1})]:
        with pytest.raises(TypeError):
            converted(*args, **kwargs)


def test_an_image_that_is_no_tensor_is_refused() -> None:
    converted = fxstream.convert(Optional(), 8)
    for value in (None, 3, "image", [image()]):
        with pytest.raises(fxstream.errors.InputError, match="must be a tensor"):
            converted(value)


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", None, (1, 2), [1, 2], torch.float32])
def test_a_graph_serves_only_the_constants_that_it_was_traced_with(value: Any) -> None:
    given = Given({Slot("x"): form_of(torch.ones(2)), Slot("value"): form_of(value)})
    others = [True, 1, 1.0, "1", None, (1, 2), [1, 2], torch.float32, torch.ones(2), False, (1, 3)]
    served = [other for other in others if given.holds({Slot("x"): torch.ones(3), Slot("value"): other}, dict)]
    assert len(served) == 1
    assert served[0] is value or served[0] == value


def test_arguments_are_bound_and_passed_as_python_does() -> None:
    def forward(self: Any, a: Any, /, b: Any, *c: Any, d: Any, e: Any = 5, **f: Any) -> Any:
        return a, b, c, d, e, f

    parameters = Parameters.of(type("Model", (nn.Module,), {"forward": forward}))
    args, kwargs = (1, 2, 3, 4), {"d": 6, "g": 7, "self_": 8}
    bound = parameters.bound(args, kwargs)
    assert [slot.name for slot in bound] == ["a", "b", "c_0", "c_1", "d", "e", "f_g", "f_self_"]
    passed, named = parameters.passed(parameters.sorted(bound))
    assert forward(None, *passed, **named) == forward(None, *args, **kwargs)
