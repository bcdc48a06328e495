"""What a graph cannot record, or holds as a constant, is never lost without a word: it is right, or a named error."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import Body, assert_exact
from torch import nn

import fxstream
from fxstream.ops import Dim, Local, Noise, Value, registry
from fxstream.testing import compare, head


class Trunk(nn.Module):
    """Two convolutions around a given piece of Python."""

    made = 0

    def __init__(self, body: Callable[[Any, torch.Tensor], torch.Tensor], **attributes: Any):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 3)
        self.body = body
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self, self.first(x)))


class Around(nn.Module):
    """A module in the middle of a model."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 3, 3, padding=1), inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.stem(x))


IMAGE = (1, 3, 21, 18)


# Numbers that a forward reads from its attributes.


class Settings:
    def __init__(self) -> None:
        self.slope, self.act = 0.1, {"scale": 2.0}


class Scale:
    """An object that is called, and is no module."""

    def __init__(self) -> None:
        self.factor = 2.0

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        return y * self.factor


class Member:
    def __init__(self, size: int, others: list[Member]):
        self.size, self.others = size, others


def _circle() -> Member:
    members: list[Member] = []
    members += [Member(size, members) for size in range(12)]
    return members[0]


READ: dict[str, tuple[Any, Callable[[Any, torch.Tensor], torch.Tensor], Callable[[Any], None], str]] = {
    "a number": (2.0, lambda m, y: y * m.read, lambda m: setattr(m, "read", 3.0), "read was 2.0 .*; now it is 3.0"),
    "a dict": ({"a": 2.0}, lambda m, y: y * m.read["a"], lambda m: m.read.update(a=5.0), r"read\['a'\] was 2.0"),
    "a dict in a dict": (
        {"a": {"b": 2.0}},
        lambda m, y: y * m.read["a"]["b"],
        lambda m: m.read["a"].update(b=5.0),
        r"read\['a'\]\['b'\] was 2.0",
    ),
    "a list": ([1, 2], lambda m, y: y * m.read[1], lambda m: m.read.append(3), r"read\[2\] was None .*; now it is 3"),
    "an object": (
        Settings(),
        lambda m, y: F.leaky_relu(y, m.read.slope),
        lambda m: setattr(m.read, "slope", 0.5),
        "read.slope was 0.1 .*; now it is 0.5",
    ),
    "an object that is called": (
        Scale(),
        lambda m, y: m.read(y),
        lambda m: setattr(m.read, "factor", 3.0),
        "read.factor was 2.0 .*; now it is 3.0",
    ),
    "objects that refer to each other": (
        _circle(),
        lambda m, y: y * m.read.others[1].size,
        lambda m: setattr(m.read.others[1], "size", 9),
        r"read.others\[1\].size was 1 .*; now it is 9",
    ),
    "a dict in an object": (
        SimpleNamespace(act={"scale": 2.0}),
        lambda m, y: y * m.read.act["scale"],
        lambda m: m.read.act.update(scale=4.0),
        r"read.act\['scale'\] was 2.0",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_a_forward_reads_and_has_changed_since_is_an_error(name: str) -> None:
    value, body, change, message = READ[name]
    model = nn.Sequential(Trunk(body, read=copy.deepcopy(value)))
    converted = fxstream.convert(model, 8)
    compare(model.double(), converted.double(), torch.randn(IMAGE))
    change(converted.get_submodule("0"))
    with pytest.raises(fxstream.AttributeChangedError, match=rf"^0.{message}"):
        converted(torch.randn(IMAGE, dtype=torch.double))


def test_an_attribute_that_is_not_a_number_stays_the_same_when_pickled() -> None:
    converted = pickle.loads(pickle.dumps(fxstream.convert(Trunk(unless_nan, fill=float("nan")), 8)))
    converted(torch.randn(IMAGE))


def unless_nan(m: Any, y: torch.Tensor) -> torch.Tensor:
    return y if m.fill != m.fill else y + m.fill


class WithClassAttributes(Trunk):
    slope = 0.1

    @property
    def scale(self) -> float:
        return 2 * self.slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(super().forward(x), self.slope) * self.scale


@pytest.mark.parametrize("around", [nn.Identity, Around], ids=["the root", "a submodule"])
def test_class_attributes_and_properties_are_read(around: Any) -> None:
    model = WithClassAttributes(lambda m, y: y)
    assert_exact(model if around is nn.Identity else Around(model), IMAGE, 8, whole=True)


# What a forward changes.


def _log(m: Any, y: torch.Tensor) -> torch.Tensor:
    m.record.means.append(y)
    return y


def _count(m: Any, y: torch.Tensor) -> torch.Tensor:
    m.record.calls += 1
    return y * m.record.calls


def _nested(m: Any, y: torch.Tensor) -> torch.Tensor:
    m.cache["a"]["b"] = y
    return y


def _calm(m: Any, y: torch.Tensor) -> torch.Tensor:
    m.norm.eval()
    return m.norm(y)


def _renormalise(m: Any, y: torch.Tensor) -> torch.Tensor:
    m.last.weight.data = torch.renorm(m.last.weight.data, 2, 0, 0.3)
    return y


def _add_to_data(m: Any, y: torch.Tensor) -> torch.Tensor:
    y.data += 1
    return y


CHANGED: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str]] = {
    "a list in an object": (_log, r"assigns attributes \(record\.means\)"),
    "a counter in an object": (_count, r"assigns attributes \(record\.calls\)"),
    "a dict in a dict": (_nested, r"assigns attributes \(cache\)"),
    "the mode of a submodule": (_calm, r"assigns attributes \(training\)"),
    "a weight's data": (_renormalise, "assigns the attribute 'data' of a tensor"),
    "a value's data": (_add_to_data, "assigns the attribute 'data' of a tensor"),
}


def changing(name: str) -> Trunk:
    record = SimpleNamespace(means=[], calls=0)
    return Trunk(CHANGED[name][0], record=record, cache={"a": {}})


@pytest.mark.parametrize("name", CHANGED)
def test_a_forward_that_changes_something_is_refused(name: str) -> None:
    model = changing(name)
    with pytest.raises(fxstream.TraceError, match=CHANGED[name][1]):
        fxstream.convert(model, 8)
    assert model.record.means == []
    assert model.record.calls == 0
    assert model.cache == {"a": {}}
    assert model.norm.training


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("name", CHANGED)
def test_a_submodule_that_changes_something_stays_one_call(name: str) -> None:
    plain = Around(changing(name)).double()
    converted = fxstream.convert(copy.deepcopy(plain), 8)
    assert head(converted) == ["inner"]
    image = torch.randn(IMAGE, dtype=torch.double)
    for _ in range(2):
        torch.testing.assert_close(converted(image), plain(image), rtol=1e-12, atol=0)
    assert converted.get_submodule("inner").record.calls == plain.inner.record.calls
    assert converted.get_submodule("inner").norm.training == plain.inner.norm.training


CALLS = 0
KEPT: list[torch.Tensor] = []


def _globally(m: Any, y: torch.Tensor) -> torch.Tensor:
    global CALLS
    CALLS += 1
    return y * CALLS


def _kept(m: Any, y: torch.Tensor) -> torch.Tensor:
    KEPT.append(y.detach())
    return y * len(KEPT)


def _newly(m: Any, y: torch.Tensor) -> torch.Tensor:
    globals()["LATEST"] = y.shape[2]
    return y


def _of_the_class(m: Any, y: torch.Tensor) -> torch.Tensor:
    type(m).made += 1
    return y * type(m).made


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize(
    ("body", "name"),
    [
        (_globally, "the global CALLS"),
        (_kept, "the global KEPT"),
        (_newly, "the global LATEST"),
        (_of_the_class, "Trunk.made"),
    ],
)
def test_a_forward_that_changes_a_variable_of_its_file_or_class_is_refused_and_a_submodule_that_does_stays_one_call(
    body: Any, name: str
) -> None:
    plain = Around(Trunk(body)).double()
    with pytest.raises(fxstream.TraceError, match=rf"assigns attributes \({name}\)"):
        fxstream.convert(plain.inner, 8)
    converted = fxstream.convert(copy.deepcopy(plain), 8)
    assert (CALLS, KEPT, "LATEST" in globals(), Trunk.made) == (0, [], False, 0)
    assert head(converted) == ["inner"]
    x = image()
    try:
        expected = [plain(x) for _ in range(2)]
        _forget()
        found = [converted(x) for _ in range(2)]
    finally:
        _forget()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@functools.cache
def _rows(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.double).view(-1, 1)


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_a_function_with_a_cache_keeps_nothing_of_a_conversion() -> None:
    """It may be called on the meta device, where tensors have no numbers, and by the proof."""

    def asked(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.inner(m.stem(x))
        return y * 2 if y.shape[2] > 5 else y

    inner = Trunk(lambda m, y: y + _rows(y.shape[2]))
    plain = Body(asked, stem=nn.Conv2d(3, 3, 3), inner=inner).double()
    converted = fxstream.convert(copy.deepcopy(plain), 8)
    assert _rows.cache_info().currsize == 0
    x = image()
    torch.testing.assert_close(converted(x), plain(x), rtol=1e-12, atol=0)


def _forget() -> None:
    KEPT.clear()
    globals().update(CALLS=0)
    Trunk.made = 0
    globals().pop("LATEST", None)


# Transforms that do not see through the scan.


@pytest.fixture
def converted() -> torch.fx.GraphModule:
    return fxstream.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()).double(), 8)


def image(**options: Any) -> torch.Tensor:
    return torch.randn(IMAGE, dtype=torch.double, **options)


def test_jvp_by_double_backward_is_refused(converted: torch.fx.GraphModule) -> None:
    with pytest.raises(fxstream.DoubleBackwardError, match="cannot be differentiated twice"):
        torch.autograd.functional.jvp(converted, (image(),), (image(),))


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused(converted: torch.fx.GraphModule, grad: bool) -> None:
    with (
        torch.autograd.forward_ad.dual_level(),
        torch.set_grad_enabled(grad),
        pytest.raises(fxstream.TransformError, match="forward-mode"),
    ):
        converted(torch.autograd.forward_ad.make_dual(image(), image()))


def test_a_tangent_of_a_parameter_is_refused(converted: torch.fx.GraphModule) -> None:
    weights = {name: weight.detach() for name, weight in converted.named_parameters()}
    with torch.autograd.forward_ad.dual_level():
        weights["0.bias"] = torch.autograd.forward_ad.make_dual(weights["0.bias"], torch.ones(4, dtype=torch.double))
        with pytest.raises(fxstream.TransformError, match="forward-mode"):
            torch.func.functional_call(converted, weights, (image(),))


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda model: torch.func.grad(lambda x: model(x).sum())(image()),
    "vmap": lambda model: torch.func.vmap(model)(image()[None]),
    "jvp": lambda model: torch.func.jvp(model, (image(),), (image(),)),
    "vjp": lambda model: torch.func.vjp(model, image()),
    "jacrev": lambda model: torch.func.jacrev(model)(image()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_are_refused(converted: torch.fx.GraphModule, name: str) -> None:
    with pytest.raises(fxstream.TransformError, match=r"torch\.func|forward-mode"):
        TRANSFORMS[name](converted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_is_refused(converted: torch.fx.GraphModule) -> None:
    with pytest.raises(fxstream.TransformError, match="trace the plain model"):
        torch.jit.trace(converted, image())


def test_functional_call_and_export_are_right(converted: torch.fx.GraphModule) -> None:
    x = image()
    weights = {name: weight.detach() * 2 for name, weight in converted.named_parameters()}
    expected = F.conv2d(x, weights["0.weight"], weights["0.bias"]).tanh()
    torch.testing.assert_close(torch.func.functional_call(converted, weights, (x,)), expected)
    exported = torch.export.export(converted.eval(), (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), converted(x))


# Rules of a user's own.


class Difference(nn.Module):
    """Adds the difference of two draws."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x) - torch.rand_like(x)


@pytest.mark.parametrize("shared", [False, True], ids=["one number per position", "one number per image"])
def test_two_noise_operands_are_two_draws(monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))

    @fxstream.register(Difference)
    def difference(m: Difference, x: Value) -> Local:
        dims = (x.dims[0], *[Dim(None, 1)] * 3) if shared else x.dims
        return Local((x, Noise(dims), Noise(dims, torch.randn)), x.dims, lambda block, one, other: block + one - other)

    converted = fxstream.convert(nn.Sequential(Difference(), nn.Identity()), (8, None, 16, 16), example_input=image())
    sizes = (4000, 1, 2, 2) if shared else (8, 2, 64, 64)
    found = converted(torch.zeros(sizes))
    # The variance of a uniform number is 1 / 12, that of a normal one 1.
    assert found.var().item() == pytest.approx(1 + 1 / 12, rel=0.1)
    assert found.mean().item() == pytest.approx(0.5, abs=0.05)
    if shared:
        assert torch.equal(found, found[:, :, :1, :1].expand(sizes))


# Augmented assignment: a number is not overwritten, a tensor is.


def _divisible(value: Any, divisor: int) -> Any:
    value += divisor - 1
    return value // divisor * divisor


class Sizes(nn.Module):
    def __init__(self, body: Callable[[torch.Tensor, Any, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.body = body

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return self.body(self.conv(x), scale, x)


def _rows_later(y: torch.Tensor, scale: Any, x: torch.Tensor) -> torch.Tensor:
    rows = x.size(2)
    more = rows
    more += 5
    return y.mean((2, 3)) * rows + more


def _rounded(y: torch.Tensor, scale: Any, x: torch.Tensor) -> torch.Tensor:
    rows = x.size(2)
    return y.mean((2, 3)) * _divisible(rows, 8) * rows


def _argument(y: torch.Tensor, scale: Any, x: torch.Tensor) -> torch.Tensor:
    more = scale
    more *= 3
    return y.relu() * scale + more


def _shape(y: torch.Tensor, scale: Any, x: torch.Tensor) -> torch.Tensor:
    sizes = y.shape[:2]
    both = sizes
    both += y.shape[2:]
    return y.view(both) * sizes[1]


def _value(y: torch.Tensor, scale: Any, x: torch.Tensor) -> torch.Tensor:
    z = y
    z += 1
    z *= scale
    return y * 2 + z


@pytest.mark.parametrize("body", [_rows_later, _rounded, _argument, _shape, _value])
def test_augmented_assignment(body: Any) -> None:
    plain = Sizes(body).double()
    converted = fxstream.convert(copy.deepcopy(plain), 8)
    compare(plain, converted, image())
    compare(plain, pickle.loads(pickle.dumps(converted)), image())


# What a forward asks of its values.


def _if_tensor(m: Any, y: torch.Tensor) -> torch.Tensor:
    return y * 2 if isinstance(y, torch.Tensor) and torch.is_tensor(y) else y


def _if_sizes(m: Any, y: torch.Tensor) -> torch.Tensor:
    shape, rows = y.shape, y.shape[2]
    kinds = isinstance(shape, tuple), isinstance(shape, torch.Size), isinstance(rows, int), isinstance(rows, tuple)
    return y * (5 if kinds == (True, True, True, False) else 7)


def _transposed_in_place(m: Any, y: torch.Tensor) -> torch.Tensor:
    z = y * 1
    turned = z.mT
    turned += 1
    return z


def _of_type(m: Any, y: torch.Tensor) -> torch.Tensor:
    tensors = type(y) is torch.Tensor, type(y).__name__ == "Tensor", y.__class__ is torch.Tensor
    sizes = type(y.shape[2]) is int, type(y.shape) == torch.Size, y.shape[2:].__class__ is torch.Size  # noqa: E721
    others = type(m) is Trunk, isinstance(m.__class__, type), issubclass(type(type(m)), type)
    return y * (5 if all((*tensors, *sizes, *others)) else 7)


def _if_parameter(m: Any, y: torch.Tensor) -> torch.Tensor:
    weight, mean = m.norm.weight, m.norm.running_mean
    parameters = isinstance(weight, nn.Parameter), type(weight) is nn.Parameter, not isinstance(mean, nn.Parameter)
    return y * (5 if all(parameters) else 7)


def _on_the_cpu(m: Any, y: torch.Tensor) -> torch.Tensor:
    """On the meta device, where facts about it are computed, the answers would be others."""
    return y * (5 if y.is_cpu and not y.is_meta and not y.is_cuda else 7)


@pytest.mark.parametrize("body", [_if_tensor, _if_sizes, _of_type, _if_parameter, _on_the_cpu])
@pytest.mark.parametrize("around", [nn.Identity, Around], ids=["the root", "a submodule"])
def test_what_a_value_is(body: Any, around: Any) -> None:
    model = Trunk(body)
    assert_exact(model if around is nn.Identity else Around(model), IMAGE, 8, whole=True)


def test_type_is_python_s_own_again_and_may_make_classes_meanwhile() -> None:
    def named(m: Any, y: torch.Tensor) -> torch.Tensor:
        class Kind(type):
            pass

        return y * len(type("Made", (), {}).__name__) * len(Kind("Of", (), {}).__name__)

    assert_exact(Trunk(named), IMAGE, 8, whole=True)
    assert "type" not in globals()


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "asks", [lambda m: m.training is True, lambda m: False is not m.training, lambda m: m.training is not False]
)
def test_a_mode_that_is_compared_by_identity_is_what_it_is_and_must_not_change(asks: Any, mode: bool) -> None:
    model = Trunk(lambda m, y: y * (2 if asks(m) else 3)).train(mode)
    converted = assert_exact(model, IMAGE, 8, whole=True)
    with pytest.raises(fxstream.ModeError, match="depends on its mode"):
        converted.train(not mode)(image())


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_an_attribute_that_is_a_view_is_overwritten_in_place() -> None:
    plain = Trunk(_transposed_in_place).double()
    compare(plain, fxstream.convert(copy.deepcopy(plain), 8), image())


def _looked_up(m: Any, y: torch.Tensor) -> torch.Tensor:
    return y * (3 if int(y.shape[1]) in {4: 1} else 5)


def _of_optional(y: torch.Tensor, scale: Any, x: torch.Tensor) -> torch.Tensor:
    return y if isinstance(scale, float) else y * 2


def test_a_size_may_be_looked_up_as_a_number_and_the_type_of_an_optional_argument_asked_for() -> None:
    assert_exact(Trunk(_looked_up), IMAGE, 8, whole=True)
    assert_exact(Sizes(_of_optional), IMAGE, 8, whole=True)


def test_no_proxy_stays_behind_in_a_cache() -> None:
    """It would be found there at a later call, since a size is equal to its number."""

    @functools.lru_cache
    def doubled(rows: int) -> int:
        return rows * 2

    model = Trunk(lambda m, y: y * doubled(y.shape[2]))
    with pytest.raises(fxstream.TraceError, match="known only at a call, in a dict, set or cache"):
        fxstream.convert(model, 8)
    model.double()(torch.randn(IMAGE).double())


class Required(nn.Module):
    def __init__(self, body: Callable[[torch.Tensor, Any], torch.Tensor]):
        super().__init__()
        self.conv, self.body = nn.Conv2d(3, 4, 3), body

    def forward(self, x: torch.Tensor, scale: Any) -> torch.Tensor:
        return self.body(self.conv(x), scale)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda y, scale: y if isinstance(scale, float) else y * 2, "asks for the type of scale, which is not known"),
        (lambda y, scale: y * (3 if scale.shape[1] in {4: 1} else 5), "nothing is known of the argument 'scale'"),
        (lambda y, scale: y if y.sum() > 0 else y * scale, "what is in a tensor is known only at a call"),
        (lambda y, scale: y if y.requires_grad else y * scale, "'requires_grad' of a tensor is known only at a call"),
        (lambda y, scale: y * scale * float(y.mean()), "what is in a tensor is known only at a call"),
        (lambda y, scale: y * scale * len(f"{y}"), "what is in a tensor is known only at a call"),
        (lambda y, scale: y * scale * len(str([y])), "what is in a tensor is known only at a call"),
        (lambda y, scale: y * {"2.0": 3}.get(str(scale), 1), "nothing is known of the argument 'scale'"),
        (lambda y, scale: y if scale.dtype is torch.half else y * 2, "compares the dtype of scale by 'is'"),
        (lambda y, scale: y if torch.strided is y.layout else y * 2, "compares the layout of conv by 'is'"),
        (lambda y, scale: y if y.grad_fn is None else y * 2, "compares the grad_fn of conv by 'is'"),
    ],
)
def test_what_is_not_known_while_tracing_is_refused(body: Callable[..., Any], message: str) -> None:
    with pytest.raises(fxstream.TraceError, match=message):
        fxstream.convert(Required(body), 8)


# Names and classes.


class NamedAlike(Trunk):
    def __init__(self, name: str, value: Any):
        super().__init__(lambda m, y: getattr(m, name)(y))
        setattr(self, name, value)


@pytest.mark.parametrize("name", ["meta", "settings", "names", "axes"])
def test_a_submodule_may_have_a_name_that_fx_uses_for_data(name: str) -> None:
    model = NamedAlike(name, nn.Conv2d(4, 4, 1))
    converted = assert_exact(model, IMAGE, 8, whole=True)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(fxstream.convert(Trunk(unless_nan, meta=nn.ReLU(), fill=1.0), 8))))
    assert type(converted.get_submodule(name)) is nn.Conv2d
    assert type(copied.meta) is nn.ReLU


@pytest.mark.parametrize("name", ["tile_shape", "memory_budget", "graph", "recompile", "_given", "_prove"])
@pytest.mark.parametrize("value", [nn.ReLU(), 3], ids=["a module", "a number"])
def test_a_name_that_the_converted_model_needs_is_refused(name: str, value: Any) -> None:
    model = Trunk(lambda m, y: getattr(m, name)(y) if isinstance(value, nn.Module) else y * getattr(m, name))
    setattr(model, name, value)
    with pytest.raises(fxstream.StreamingError, match=f"attribute '{name}', a name that the converted model"):
        fxstream.convert(model, 8)


class Registered(nn.Module):
    """A base class that must be told a key by whoever extends it."""

    def __init_subclass__(cls, *, key: str, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        KEYS.append(key)


KEYS: list[str] = []


class ByKey(Registered, key="by key"):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu()


def test_a_base_class_is_not_told_of_classes_that_tracing_makes() -> None:
    assert_exact(nn.Sequential(ByKey(), nn.Conv2d(4, 2, 1)), IMAGE, 8, whole=True)
    assert KEYS == ["by key"]


class Sealed(type):
    """A metaclass that does not let its classes be extended."""

    def __new__(cls, name: str, bases: Any, namespace: Any) -> Any:
        if name == "Final" and "forward" not in namespace:
            raise TypeError("Final is final")
        return super().__new__(cls, name, bases, namespace)


class Final(nn.Module, metaclass=Sealed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


def test_a_module_whose_class_cannot_be_extended_stays_one_call() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Final()).double()
    converted = fxstream.convert(copy.deepcopy(model), 8)
    assert head(converted) == ["_1"]
    compare(model, converted, image())
    with pytest.raises(fxstream.TraceError, match="Final is final"):
        fxstream.convert(model[1], 8)
    assert [type(module) for module in model] == [nn.Conv2d, Final]


def test_models_are_converted_in_several_threads() -> None:
    models = [WithClassAttributes(lambda m, y: y).double() for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        converted = list(pool.map(lambda model: fxstream.convert(model, 8), models))
    x = image()
    for model, streamed in zip(models, converted, strict=True):
        assert type(model) is WithClassAttributes
        torch.testing.assert_close(streamed(x), model(x), rtol=1e-12, atol=0)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain.exp()


def test_a_rule_that_computes_with_a_parameter_in_its_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))

    @fxstream.register(Gain)
    def gain(m: Gain, x: Value) -> Local:
        factor = m.gain.exp()
        return Local((x,), x.dims, lambda block: block * factor)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Gain())
    with pytest.raises(fxstream.StreamingError, match=r"rule of 1 \(Gain\) computes with a tensor itself \(exp\)"):
        fxstream.convert(model, 8)

    @fxstream.register(Gain)
    def better(m: Gain, x: Value) -> Local:
        return Local((x, m.gain), x.dims, lambda block, gain: block * gain.exp())

    assert_exact(model, IMAGE, 8, whole=True)


def _if_grad(m: Any, y: torch.Tensor) -> torch.Tensor:
    return y * 2 if torch.is_grad_enabled() else y


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_whether_gradients_are_enabled_is_asked_at_every_call() -> None:
    with pytest.raises(fxstream.TraceError, match=r"asks torch\.is_grad_enabled\(\), whose answer"):
        fxstream.convert(Trunk(_if_grad), 8)
    plain = Around(Trunk(_if_grad)).double()
    converted = fxstream.convert(copy.deepcopy(plain), 8)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            x = image()
            torch.testing.assert_close(converted(x), plain(x), rtol=1e-12, atol=0)
    assert torch.is_grad_enabled.__module__ != "fxstream.graph.trace"


def _logged(m: Any, y: torch.Tensor) -> torch.Tensor:
    m.log.debug("here")
    return y


def test_a_forward_may_write_to_a_log() -> None:
    model = Trunk(_logged, log=logging.getLogger("fxstream.tests"))
    converted = assert_exact(model, IMAGE, 8, whole=True)
    logging.getLogger().manager._clear_cache()  # as happens when a level is set
    converted(image())
