"""What goes around a model's tensors stays what it is: the classes of its outputs."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from reference import Body, image, pair
from torch import nn
from torch.utils import _pytree

import fxstream
from fxstream.graph.nodes import overwrites
from fxstream.testing import relative_error

# Outputs.


class Named(dict):  # type: ignore[type-arg]  # as users write it
    """A dict with attributes, which also gives its items as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Ordered(OrderedDict):  # type: ignore[type-arg]  # as users write it
    """A dict whose constructor takes something else than items."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale


class Several(list):  # type: ignore[type-arg]  # as users write it
    pass


class Both(tuple):  # type: ignore[type-arg]  # as users write it
    pass


Plain = namedtuple("Plain", "one other")


class Typed(NamedTuple):
    one: torch.Tensor
    number: int = 3


class Checked(Plain):
    """A named tuple with a constructor of its own."""

    def __new__(cls, both: Any) -> Any:
        return super().__new__(cls, *both)


@dataclass
class Doubling:
    """A dataclass whose constructor computes, and that holds more than its arguments."""

    value: Any
    scale: float = 2.0
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.value = self.value * self.scale


@dataclass(frozen=True)
class Frozen:
    value: Any
    kind: str = "a"


class Slotted:
    __slots__ = ("size", "tensors")

    def __init__(self, size: int, *tensors: Any) -> None:
        self.size, self.tensors = size, tensors


_pytree.register_pytree_node(
    Slotted, lambda value: (list(value.tensors), value.size), lambda tensors, size: Slotted(size, *tensors)
)


class Unregistered:
    def __init__(self, value: Any) -> None:
        self.value = value


class Single:
    """A registered class whose objects are not copied."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        raise RuntimeError("there is only one")


_pytree.register_pytree_node(Single, lambda value: ([value.value], None), lambda values, _: Single(*values))


def named(y: torch.Tensor) -> Any:
    found = Named(y=y, several=[y.relu(), 3])
    object.__setattr__(found, "mean", y.mean())
    return found


def ordered(y: torch.Tensor) -> Any:
    found = Ordered(2.0)
    found["last"], found["first"] = y.tanh(), y
    found.move_to_end("last")
    return found


def filled(y: torch.Tensor) -> Any:
    found = defaultdict(list)
    found["a"].append(y)
    return found


def nested(y: torch.Tensor) -> Any:
    return {"a": Frozen(Plain(Doubling(y), Several([y.relu(), named(y)]))), "b": (Slotted(4, y), None)}


OUTPUTS: dict[str, Callable[[Any], Any]] = {
    "a subclass of dict": named,
    "a subclass of OrderedDict": ordered,
    "an OrderedDict": lambda y: OrderedDict(b=y, a=y.relu()),
    "a defaultdict": filled,
    "a subclass of list": lambda y: Several([y]),
    "a subclass of tuple": lambda y: Both((y, 1)),
    "a deque": lambda y: deque([y], 2),
    "a namedtuple": lambda y: Plain(y, y.relu()),
    "a NamedTuple": lambda y: Typed(y),
    "a subclass of a namedtuple": lambda y: Checked([y, y.relu()]),
    "a dataclass that computes": lambda y: Doubling(y),
    "a frozen dataclass": lambda y: Frozen(y),
    "a registered class": lambda y: Slotted(3, y, y.relu()),
    "nested ones": nested,
}


def parts(value: Any) -> list[Any]:
    """The classes in a value and what it holds, except tensors, in order; and separately the tensors."""
    if isinstance(value, torch.Tensor):
        return [torch.Tensor]
    found: list[Any] = [type(value)]
    if isinstance(value, (str, int, float, type)):
        return [*found, value]
    held = [value.default_factory] if isinstance(value, defaultdict) else []
    held += [value.maxlen] if isinstance(value, deque) else []
    held += list(value.items()) if isinstance(value, dict) else []
    held += list(value) if isinstance(value, (list, tuple, deque)) else []
    held += [getattr(value, name) for name in getattr(value, "__slots__", ())]
    held += sorted(getattr(value, "__dict__", {}).items())
    for part in held:
        found += parts(part)
    return found


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a value, those in attributes included, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    held = list(value.values()) if isinstance(value, dict) else []
    held += list(value) if isinstance(value, (list, tuple, deque)) else []
    held += [getattr(value, name) for name in getattr(value, "__slots__", ())]
    held += list(getattr(value, "__dict__", {}).values())
    return [tensor for part in held for tensor in tensors(part)]


def assert_alike(got: Any, expected: Any) -> None:
    """Check that two outputs are of the same classes, with the same keys, attributes and numbers."""
    assert parts(got) == parts(expected)
    assert len(tensors(got)) == len(tensors(expected)) > 0
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        assert relative_error(one, other) <= 1e-10


def gradient(model: nn.Module, output: Any) -> torch.Tensor:
    sum(tensor.square().sum() for tensor in tensors(output) if tensor.requires_grad).backward()  # type: ignore[union-attr]  # there are tensors
    (weight,) = (parameter for name, parameter in model.named_parameters() if name.endswith("conv.weight"))
    assert weight.grad is not None
    return weight.grad


def returning(output: Callable[[Any], Any]) -> nn.Module:
    return Body(_with_output, conv=nn.Conv2d(3, 4, 3), output=output).double()


def _with_output(m: Any, x: torch.Tensor) -> Any:
    return m.output(m.conv(x))


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_keep_their_classes(name: str) -> None:
    plain, converted = pair(returning(OUTPUTS[name]), 8)
    expected = plain(image())
    for model in (converted, copy.deepcopy(converted)):
        assert_alike(model(image()), expected)
    assert_alike(converted(image()), expected)
    assert relative_error(gradient(converted, converted(image())), gradient(plain, expected)) <= 1e-10


@pytest.mark.parametrize("output", [named, ordered, Doubling, nested], ids=lambda output: output.__name__)
def test_a_pickled_model_returns_objects_of_the_same_classes(output: Any) -> None:
    plain, converted = pair(returning(output), 8)
    loaded = pickle.loads(pickle.dumps(converted))
    assert_alike(loaded(image()), plain(image()))


@pytest.mark.parametrize("name", ["a subclass of dict", "nested ones"])
def test_a_compiled_model_returns_objects_of_the_same_classes(name: str) -> None:
    plain, converted = pair(returning(OUTPUTS[name]), 8)
    torch._dynamo.reset()
    assert_alike(torch.compile(converted, backend="eager")(image()), plain(image()))


def test_making_an_object_overwrites_nothing() -> None:
    converted = fxstream.convert(returning(nested), 8)
    made = [node for node in converted.graph.nodes if node.op == "call_function" and node.name != "getitem"]
    assert {"doubling", "plain", "named", "several", "frozen", "slotted"} <= {node.name for node in made}
    assert not any(overwrites(node, None) for node in made)


def of_transformers(name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(import_module("transformers.modeling_outputs"), name)(*args, **kwargs)


BASE = "BaseModelOutputWithNoAttention"
MODEL_OUTPUTS: dict[str, Callable[[Any], Any]] = {
    "by name": lambda y: of_transformers(BASE, last_hidden_state=y, hidden_states=(y, y * 2)),
    "one alone": lambda y: of_transformers(BASE, y),
    "of pairs": lambda y: of_transformers(BASE, [("hidden_states", (y,))]),
    "in a dict": lambda y: {"a": [of_transformers("SemanticSegmenterOutput", logits=y.tanh())]},
}


@pytest.mark.parametrize("name", MODEL_OUTPUTS)
def test_a_model_output_of_transformers_stays_one(name: str) -> None:
    pytest.importorskip("transformers")
    plain, converted = pair(returning(MODEL_OUTPUTS[name]), 8)
    expected = plain(image())
    assert_alike(converted(image()), expected)
    if name == "by name":
        got = converted(image())
        assert relative_error(got.last_hidden_state, expected[0]) <= 1e-10
        assert [field.name for field in fields(got)] == [*got.keys()]
        assert len(got.to_tuple()) == 2


class Taking(nn.Module):
    """A module that takes an object, and cannot be traced."""

    def forward(self, found: Any) -> Any:
        assert type(found) is Doubling, type(found)
        return found.value * float(found.value.sum() > 0)


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_a_module_that_stays_one_call_gets_an_object_of_the_same_class() -> None:
    model = Body(lambda m, x: m.last(Doubling(m.conv(x))), conv=nn.Conv2d(3, 4, 3), last=Taking()).double()
    plain, converted = pair(model, 8)
    assert_alike(converted(image()), plain(image()))


@pytest.mark.parametrize("kind", [Unregistered, Single])
def test_an_object_that_a_graph_does_not_hold_is_refused(kind: Any) -> None:
    for output in (kind, lambda y: {"a": [kind(y)]}):
        with pytest.raises(
            fxstream.TraceError, match=rf"object of the class test_forms\.{kind.__name__}, which a graph"
        ):
            fxstream.convert(returning(output), 8)
