"""What goes around a model's tensors stays what it is: the classes of its outputs, and its own class."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from reference import Body, Shapes, image, pair
from torch import nn
from torch.utils import _pytree

import fxstream
from fxstream.graph.nodes import overwrites
from fxstream.testing import compare, relative_error

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


# The class of the model.


class Told(nn.Module):
    """A base class that keeps a list of its subclasses, and counts how often it is constructed."""

    made = 0
    subclasses: ClassVar[list[str]] = []

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        Told.subclasses.append(cls.__name__)

    def __init__(self) -> None:
        super().__init__()
        Told.made += 1


class Full(Told):
    """A model with more than a forward."""

    classes = 4
    call_super_init = True

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.slope, self.classes = slope, 5
        self.activation = self._activation

    def _activation(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.leaky_relu(x, self.slope)

    @property
    def both(self) -> tuple[float, int]:
        return self.slope, self.classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.norm(self.conv(x))) * self.classes

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self(x).square().mean() + self.forward(x).mean()

    def train(self, mode: bool = True) -> Full:
        super().train(mode)
        self.norm.eval()
        return self

    def extra_repr(self) -> str:
        return "a full one"

    @classmethod
    def name(cls) -> str:
        return cls.__name__


DUPLICATES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "a deepcopy": copy.deepcopy,
    "a pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "a deepcopy of a pickle": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
}


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_a_converted_model_has_what_the_class_of_the_model_has(duplicate: str) -> None:
    plain = Full(0.2).double().eval()
    subclasses, made = [*Told.subclasses], Told.made
    converted = DUPLICATES[duplicate](fxstream.convert(plain, 8))
    assert (Told.subclasses, Told.made) == (subclasses, made), "the model's class was told, or constructed an object"
    assert isinstance(converted, Full)
    assert isinstance(converted, torch.fx.GraphModule)
    assert type(converted).__name__ == converted.name() == "Full"
    assert repr(converted).startswith("Full(\n  a full one")
    assert (converted.both, Full.classes) == ((0.2, 5), 4)
    assert list(converted.state_dict()) == list(plain.state_dict())
    with Shapes(torch.ops.aten.convolution) as convolved:
        assert relative_error(converted.loss(image()), plain.loss(image())) <= 1e-10
    assert any(shape[2] < 15 for shape in convolved.shapes), "its methods do not call the streamed forward"
    for mode in (True, False):
        assert converted.train(mode) is converted
        assert [module.training for module in (converted, converted.conv, converted.norm)] == [mode, mode, False]
    compare(plain.train(), converted.train(), image())


def test_a_method_in_an_attribute_becomes_one_of_the_converted_model() -> None:
    converted: Any = fxstream.convert(Full(0.2).eval(), 8)
    assert converted.activation.__self__ is converted
    converted.slope = -1.0
    assert converted.activation(torch.tensor(-2.0)) == 2


class Own(nn.Sequential):
    """Layers of a user's own class."""

    def last(self) -> nn.Module:
        return self[-1]


@pytest.mark.parametrize("kind", [nn.Sequential, Own])
def test_a_sequence_of_layers_stays_one(kind: Any) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    converted: Any = fxstream.convert(kind(*layers), 8)
    assert len(converted) == 3
    assert [type(layer) for layer in converted] == [type(layer) for layer in layers]
    assert converted[-1] is converted.get_submodule("2")
    assert [*converted[:2]] == [converted[0], converted[1]]
    assert kind is nn.Sequential or converted.last() is converted[2]
    for change in (lambda: converted.append(nn.ReLU()), lambda: converted.pop(0), lambda: converted.__delitem__(0)):
        with pytest.raises(fxstream.StreamingError, match="layers of a converted model are fixed"):
            change()


class WithSlots(nn.Module):
    __slots__ = ("size",)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)

    def train(self, mode: bool = True) -> WithSlots:
        return self

    def loss(self) -> None: ...


class Coded(nn.Module):
    """A model with a method whose name a GraphModule uses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def code(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.code(x)


def test_methods_that_a_converted_model_lacks_are_told_of() -> None:
    with pytest.warns(fxstream.StreamingWarning, match="lacks what WithSlots has as loss, size, train"):
        assert not isinstance(fxstream.convert(WithSlots(), 8), WithSlots)
    with pytest.warns(fxstream.StreamingWarning, match="lacks what Coded has as code"):
        converted = fxstream.convert(Coded(), 8)
    assert isinstance(converted.code, str)
    model = Full(0.2)
    vars(model)["recompile"] = 3
    with pytest.warns(fxstream.StreamingWarning, match="lacks what Full has as recompile"):
        fxstream.convert(model.eval(), 8)
    traced = torch.fx.symbolic_trace(Full(0.2).eval())
    assert type(fxstream.convert(traced, 8)).__mro__[1].__name__ == "Converted"


def test_a_class_that_pickle_does_not_find_is_left_out_of_the_pickle() -> None:
    class Local(nn.Sequential):
        def loss(self) -> None: ...

    converted = fxstream.convert(Local(nn.Conv2d(3, 4, 3)), 8)
    assert hasattr(copy.deepcopy(converted), "loss")
    loaded = pickle.loads(pickle.dumps(converted))
    assert type(loaded).__name__ == "Local"
    assert not hasattr(loaded, "loss")
    assert torch.equal(loaded(image().float()), converted(image().float()))


# Lightning.


def lightning() -> Any:
    return pytest.importorskip("lightning")


def fit(model: Any) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(3, 17, 18), index % 2) for index in range(4)]
    lightning().Trainer(
        accelerator="cpu",
        fast_dev_run=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, torch.utils.data.DataLoader(data, batch_size=2))


def classifier() -> Any:
    class Classifier(lightning().LightningModule):  # type: ignore[misc]  # of a package without types
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"lr": 0.1})
            layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.net, self.last = nn.Sequential(*layers), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.net(x))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.net[1].eval()
            return self

    return Classifier().train()


@pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*GPU available")
@pytest.mark.parametrize("whole", [True, False], ids=["as a whole", "its network"])
def test_lightning_trains_a_converted_module(whole: bool) -> None:
    plain = classifier()
    converted = copy.deepcopy(plain)
    before = copy.deepcopy(plain.state_dict())
    if whole:
        converted = fxstream.convert(converted, 8)
    else:
        converted.net = fxstream.convert(converted.net, 8)
    for model in (plain, converted):
        fit(model)
    assert not torch.equal(plain.state_dict()["net.0.weight"], before["net.0.weight"])
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert copy.deepcopy(converted)._trainer is None


# DataParallel.


@pytest.mark.parametrize("around", [lambda model: model, nn.Sequential], ids=["itself", "inside another model"])
def test_a_copy_for_data_parallel_is_refused(around: Any) -> None:
    """On a CPU, DataParallel makes no copies, so the step in which it makes them is called here."""
    converted = around(fxstream.convert(Full(0.2).double().eval(), 8))
    wrapped = nn.DataParallel(converted, device_ids=[])
    assert relative_error(wrapped(image()), converted(image())) == 0
    with pytest.raises(fxstream.WrappedModelError, match=r"Way out: torch\.nn\.parallel\.DistributedDataParallel"):
        [module._replicate_for_data_parallel() for module in converted.modules()]
