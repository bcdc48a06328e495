"""What a graph does not record must not be lost silently: it is seen in another way, or refused, or ends the prefix."""

from __future__ import annotations

import copy
import functools
import random
import types
from collections import deque
from collections.abc import Callable
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import Body, assert_exact, pair
from torch import nn
from torch.nn.functional import celu

import fxstream
import fxstream.graph.trace
from fxstream.testing import compare, head

IMAGE = (2, 3, 13, 11)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=1, **options).double()


def converted_exactly(model: nn.Module) -> Any:
    """Without the copies that `assert_exact` makes: replaced methods would be those of the copied module."""
    converted = fxstream.convert(model.double(), 4, prove=False)
    compare(model, converted, torch.randn(IMAGE))
    return converted


def test_a_forward_replaced_on_a_submodule_is_the_one_that_runs() -> None:
    replaced = conv()
    original = replaced.forward
    replaced.forward = lambda x: original(x) * 2  # type: ignore[method-assign]  # on purpose
    converted = converted_exactly(nn.Sequential(replaced, nn.ReLU(), conv()))
    assert not head(converted)


def test_another_method_replaced_on_a_submodule() -> None:
    """As patches for seamless textures do."""

    def circular(self: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (1,) * 4, mode="circular"), weight, bias)

    replaced = conv()
    replaced._conv_forward = types.MethodType(circular, replaced)  # type: ignore[method-assign]  # on purpose
    with pytest.warns(fxstream.StreamingWarning, match="circular"):
        converted_exactly(nn.Sequential(conv(), replaced, nn.ReLU()))


def test_a_forward_replaced_on_the_model_itself_is_refused() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv())
    model.forward = types.MethodType(lambda self, x: self[0](x), model)  # type: ignore[method-assign]  # on purpose
    with pytest.raises(fxstream.TraceError, match="replaced on the instance"):
        fxstream.convert(model, 4)


class ByProperty(nn.Conv2d):
    @property
    def stride(self) -> Any:
        return (2, 2)

    @stride.setter
    def stride(self, value: Any) -> None:
        pass


class ByPartial(nn.Conv2d):
    def _scaled(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return nn.Conv2d.forward(self, x) * scale

    forward = functools.partialmethod(_scaled, scale=2.0)  # type: ignore[assignment]  # on purpose


class Initialised(nn.Conv2d):
    """Changes nothing that runs when it is called."""

    limit = 0.1

    def init_weights(self) -> None:
        nn.init.uniform_(self.weight, -self.limit, self.limit)

    @staticmethod
    def helper(x: int) -> int:
        return x

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


class Doubled(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class AlwaysEval(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> Any:
        return super().train(False)


@pytest.mark.parametrize("kind", [ByProperty, ByPartial, Initialised])
def test_subclasses_of_convolutions_are_what_they_are(kind: type[nn.Conv2d]) -> None:
    assert not head(converted_exactly(nn.Sequential(kind(3, 3, 3, padding=1), nn.ReLU(), conv())))


@pytest.mark.parametrize("kind", [Doubled, AlwaysEval])
def test_subclasses_of_batch_norms_stream(kind: type[nn.BatchNorm2d]) -> None:
    model = nn.Sequential(conv(), kind(3), conv()).double().eval()
    assert not head(converted_exactly(model))
    converted = fxstream.convert(model.train(), 4, freeze_batchnorm=True)
    assert not head(converted)
    compare(model.eval(), converted, torch.randn(IMAGE))


@pytest.mark.parametrize("start", [True, False], ids=["converted in train mode", "converted in eval mode"])
@pytest.mark.parametrize("drop", [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5)])
def test_what_dropout_returns_in_eval_mode_is_its_input(drop: nn.Module, start: bool) -> None:
    def body(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        z = self.relu(self.drop(y))
        return y + z

    model = Body(body, a=conv(), drop=drop, relu=nn.ReLU(inplace=True)).train(start)
    converted = fxstream.convert(model, 4)
    compare(model.eval(), converted.eval(), torch.randn(IMAGE))


def test_the_flag_of_another_module_is_followed() -> None:
    model = Body(lambda self, x: F.dropout(self.a(x), 0.5, self.drop.training), a=conv(), drop=nn.Dropout())
    converted = fxstream.convert(model, 4)
    assert not head(converted)
    compare(model.eval(), converted.eval(), torch.randn(IMAGE))
    image = torch.randn(IMAGE).double()
    assert not torch.equal(converted.train()(image), converted(image))
    branching = Body(lambda self, x: self.a(x) * (2 if self.norm.training else 1), a=conv(), norm=nn.BatchNorm2d(3))
    converted = fxstream.convert(branching, 4)
    with pytest.raises(fxstream.ModeError, match=r"^the forward of norm depends on its mode"):
        converted.eval()(image)


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return -gradients[0]


def test_an_autograd_function_that_returns_its_argument() -> None:
    reversal = Body(lambda self, x: Reversal.apply(x))
    with pytest.warns(fxstream.StreamingWarning, match=r"it calls Reversal, an autograd\.Function"):
        converted_exactly(nn.Sequential(conv(), reversal, conv()))
    with pytest.raises(fxstream.TraceError, match=r"it calls Reversal, an autograd\.Function"):
        fxstream.convert(Body(lambda self, x: self.b(Reversal.apply(self.a(x))), a=conv(), b=conv()), 4)


DRAWING: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "random": random.random,
    "numpy": lambda: float(np.random.rand()),
}


@pytest.mark.parametrize("draw", DRAWING.values(), ids=DRAWING)
def test_numbers_drawn_while_tracing_are_drawn_at_every_call(draw: Callable[[], float]) -> None:
    noisy = Body(lambda self, x: x + draw())
    model = nn.Sequential(conv(), noisy, conv())
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    with pytest.warns(fxstream.StreamingWarning, match="draws random numbers while it is traced"):
        converted = fxstream.convert(model, 4)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()
    image = torch.randn(IMAGE).double()
    assert not torch.equal(converted(image), converted(image))
    with pytest.raises(fxstream.TraceError, match="draws random numbers"):
        fxstream.convert(Body(lambda self, x: self.a(x) * draw(), a=conv()), 4)


def test_a_weight_that_is_a_plain_tensor_gets_its_gradient() -> None:
    """As hypernetworks and meta-learning set them."""
    module = conv()
    del module.weight
    module.weight = torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    model = nn.Sequential(module, nn.ReLU())
    converted = fxstream.convert(model, 4)
    image = torch.randn(IMAGE).double()
    (expected,) = torch.autograd.grad(model(image).square().sum(), module.weight)
    loss = converted(image).square().sum()
    (found,) = torch.autograd.grad(loss, module.weight)
    torch.testing.assert_close(found, expected)
    loss = converted(image).square().sum()
    with torch.no_grad():
        module.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_attribute_that_was_read_and_has_changed_is_an_error() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha, self.steps, self.sizes = 1.0, 0, (1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.pad(x, self.sizes) * self.alpha

    model = nn.Sequential(conv(), Scaled())
    converted = converted_exactly(model)
    image = torch.randn(IMAGE).double()
    scaled = converted.get_submodule("1")
    scaled.steps = 5  # nobody has read it
    converted(image)
    for name, value in (("alpha", 2.0), ("sizes", (2, 1))):
        before = getattr(scaled, name)
        setattr(scaled, name, value)
        with pytest.raises(fxstream.AttributeChangedError, match=rf"^1\.{name} was .* at the conversion"):
            converted(image)
        setattr(scaled, name, before)
    copy.deepcopy(converted)(image)


@pytest.mark.parametrize("index", [[True, False, True], [[0, 1], [1, 2]]], ids=str)
def test_other_lists_than_of_integers_as_an_index(index: Any) -> None:
    model = Body(lambda self, x: self.a(x)[:, index] * self.a(x)[:, index].shape[1], a=conv())
    converted_exactly(model)


@pytest.mark.filterwarnings("ignore:streaming ends:fxstream.StreamingWarning")
@pytest.mark.parametrize("kind", [list, set, deque, dict])
def test_what_forward_puts_into_a_container_is_not_left_there_by_the_conversion(kind: Any) -> None:
    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv()
            self.seen = kind()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.clear()
            y = self.a(x)
            put = {list: "append", deque: "append", set: "add"}.get(kind)
            getattr(self.seen, put)(y.mean()) if put else self.seen.update(mean=y.mean())
            return y

    recording = Recording()
    converted = fxstream.convert(nn.Sequential(conv(), recording), 4)
    assert head(converted) == ["_1"]
    assert not recording.seen
    converted(torch.randn(IMAGE).double())
    (seen,) = converted.get_submodule("1").seen.values() if kind is dict else converted.get_submodule("1").seen
    assert isinstance(seen, torch.Tensor)


def test_a_parameter_reshaped_by_sizes_with_the_extent_of_the_image() -> None:
    model = Body(lambda self, x: (y := self.a(x)) + self.p.view(1, y.shape[1], 13, 11), a=conv())
    model.p = nn.Parameter(torch.randn(3, 143))
    assert not head(converted_exactly(model))


@pytest.mark.parametrize("name", ["graph", "code"])
def test_names_that_a_graph_module_has_taken(name: str) -> None:
    model = nn.Sequential(conv(), nn.ReLU())
    model.add_module(name, nn.ReLU())
    with pytest.raises(fxstream.StreamingError, match=f"attribute '{name}'.*rename it"):
        fxstream.convert(model, 4)


def test_noise_does_not_depend_on_the_default_device() -> None:
    converted = fxstream.convert(nn.Sequential(conv(), nn.Dropout(0.5)), 4)
    image = torch.randn(IMAGE).double()
    torch.manual_seed(1)
    expected = converted(image)
    torch.manual_seed(1)
    with torch.device("meta"):
        assert torch.equal(converted(image), expected)


class Imported(nn.Module):
    """Calls a function that has been imported by its name, where it does not stream."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return celu(x.flatten(1))


def test_a_function_of_torch_that_was_imported_by_its_name_does_not_spoil_later_conversions() -> None:
    for _ in range(2):
        converted_exactly(nn.Sequential(conv(), Imported()))


# Tensors that forward makes or assigns.


def _buffer_assigned(m: Any, x: torch.Tensor) -> Any:
    m.buffer = m.buffer * 0.5
    return m.a(x) * m.buffer


def _buffer_counted_up(m: Any, x: torch.Tensor) -> Any:
    m.buffer += 1
    return m.a(x)


@pytest.mark.parametrize("body", [_buffer_assigned, _buffer_counted_up])
def test_a_forward_that_assigns_a_buffer_is_refused_and_the_buffer_is_what_it_was(body: Any) -> None:
    model = Body(body, a=conv(), buffer=nn.Buffer(torch.linspace(1, 2, 3)[:, None, None]))
    before, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    with pytest.raises(fxstream.TraceError, match="its forward assigns attributes"):
        fxstream.convert(model, 4)
    assert type(model.buffer) is torch.Tensor
    assert set(vars(model)) == attributes
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_tensors_made_in_forward_are_constants_and_leave_no_attribute_behind() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        return m.b(m.a(x) * torch.tensor(2.0) + torch.linspace(0, 1, 11))

    model = Body(body, a=conv(), b=conv())
    attributes = set(vars(model))
    assert_exact(model, IMAGE, 4, whole=True, example_input=torch.zeros(IMAGE))
    fxstream.convert(model, 4, example_input=torch.zeros(IMAGE).double())
    assert set(vars(model)) == attributes


# Regions, which a graph has no node for.

REGIONS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
}


class InRegion(nn.Module):
    """Computes inside a region."""

    def __init__(self, region: str) -> None:
        super().__init__()
        self.region = region
        self.conv = conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with REGIONS[self.region]():
            x = self.conv(x)
        return x * 2


@pytest.mark.filterwarnings("ignore:streaming ends:fxstream.StreamingWarning")
@pytest.mark.parametrize("region", REGIONS)
def test_a_module_that_computes_inside_a_region_is_left_to_the_head(region: str) -> None:
    model, converted = pair(nn.Sequential(conv(), nn.Sequential(InRegion(region)), nn.ReLU()), 4)
    (stop,) = fxstream.analyze(model).stops
    assert stop.reason.startswith("1.0 is one opaque call: torch.fx cannot trace it: it computes inside torch.no_grad")
    assert head(converted) == ["_1_0", "_2"]
    # As it is, with what the region does: the gradient ends there, or numbers are rounded.
    image = torch.randn(IMAGE).double()
    output, expected = converted(image), model(image)
    assert output.requires_grad == expected.requires_grad == (region == "autocast")
    torch.testing.assert_close(output, expected)


def _in_front(m: Any, x: torch.Tensor) -> Any:
    with REGIONS[m.region]():
        y = m.a(x)
    return m.b(y)


def _in_the_head(m: Any, x: torch.Tensor) -> Any:
    y = m.a(x)
    with REGIONS[m.region]():
        weight = y.mean((2, 3), keepdim=True)
    return m.b(y) * weight


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("body", [_in_front, _in_the_head])
def test_a_region_in_the_forward_of_the_model_itself_is_refused(body: Any, region: str) -> None:
    with pytest.raises(fxstream.TraceError, match=r"Body\.forward: it computes inside torch\.no_grad"):
        fxstream.convert(Body(body, a=conv(), b=conv(), region=region), 4)


# Modules that cannot be traced.


class Branching(nn.Module):
    """Branches on a number that only a call knows."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * (2 if bool(x.sum() > 0) else 3)


class Noting(nn.Module):
    """Assigns an attribute."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x.mean()
        return x * 2


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that have been traced, one entry per trace."""
    found: list[nn.Module] = []
    original = fxstream.graph.trace._Tracer.trace

    def counted(self: Any, root: nn.Module, *args: Any) -> Any:
        found.append(root)
        return original(self, root, *args)

    monkeypatch.setattr(fxstream.graph.trace._Tracer, "trace", counted)
    return found


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("count", [0, 1, 12])
def test_however_many_modules_cannot_be_traced_the_model_is_traced_twice(count: int, traces: list[nn.Module]) -> None:
    layers = [layer for _ in range(count) for layer in (Branching(), Noting(), nn.Sequential(Branching(Noting())))]
    converted = converted_exactly(nn.Sequential(conv(), *layers, conv()))
    assert len(traces) == (2 if count else 1)
    assert len(head(converted)) == (3 * count + 1 if count else 0)


def test_what_a_module_does_before_it_fails_is_not_charged_to_others() -> None:
    """They would otherwise not be traced through, either."""
    seen: list[Any] = []

    class Telling(Branching):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.owner[0].calls += 1
            self.seen.append(x)
            torch.rand(1)
            torch.set_grad_enabled(False)
            return super().forward(x)

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.inner, self.last = conv(), Telling(), conv()
            self.inner.owner, self.inner.seen = [self], seen
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.inner(self.conv(x)))

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.seen = Counting(), seen

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            if not self.seen:
                return y
            raise ValueError

    model = nn.Sequential(Asking(), nn.ReLU())
    state = torch.get_rng_state()
    with pytest.warns(fxstream.StreamingWarning, match=r"0\.inner\.inner is one opaque call"):
        converted = fxstream.convert(model, 4, prove=False)  # it accepts one call only
    assert head(converted) == ["_0_inner_inner", "_0_inner_last", "_1"]
    assert not seen
    assert model[0].inner.calls == 0
    assert torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())


def test_what_a_module_changes_in_one_that_then_fails_is_not_lost() -> None:
    class Setting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Branching()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.inner.slope = x.mean()
            return self.inner(x)

    (stop,) = fxstream.analyze(nn.Sequential(conv(), Setting())).stops
    assert stop.reason.startswith("1 is one opaque call: torch.fx cannot trace it: its forward assigns attributes")


def test_the_model_is_not_searched_for_every_parameter_that_a_forward_reads() -> None:
    searches = []

    class Searched(nn.Sequential):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            searches.append(self)
            return super().named_parameters(*args, **kwargs)

    def found(count: int) -> int:
        searches.clear()
        layers = (Body(lambda m, x: F.conv2d(x, m.a.weight, m.a.bias, padding=1), a=conv()) for _ in range(count))
        assert not head(fxstream.convert(Searched(*layers), 4))
        return len(searches)

    assert found(12) == found(1)


def test_a_forward_that_adds_a_submodule_is_named_by_what_it_does() -> None:
    class Growing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.part = nn.ReLU()
            return x * 2

    (stop,) = fxstream.analyze(nn.Sequential(conv(), Growing())).stops
    assert stop.reason.startswith("1 is one opaque call: torch.fx cannot trace it: its forward assigns attributes (")


def _pooled_by(pool: Callable[[], nn.Module]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    return lambda m, x: m.last(pool()(m.first(x)))


MADE = {
    "a pooling": lambda: nn.AvgPool2d(2),
    "nested": lambda: nn.Sequential(nn.ReLU(), nn.Sequential(nn.Upsample(scale_factor=2), nn.MaxPool2d(3))),
}


@pytest.mark.parametrize("name", MADE)
def test_a_module_without_parameters_that_is_made_in_forward_is_traced_through(name: str) -> None:
    model = Body(_pooled_by(MADE[name]), first=conv(), last=conv())
    assert_exact(model, IMAGE, 4, whole=True)


def _hooked() -> nn.Module:
    made = nn.ReLU()
    made.register_forward_hook(lambda module, args, result: result * 2)
    return made


KEPT: dict[str, Callable[[], Callable[[], nn.Module]]] = {
    "parameters": lambda: conv,
    "buffers": lambda: lambda: nn.BatchNorm2d(3, affine=False).double().eval(),
    "a hook": lambda: _hooked,
    "a flag, kept from call to call": lambda: functools.partial(lambda kept: kept, nn.Dropout(0.5).eval()),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_module_with_state_that_is_not_a_submodule_is_refused(name: str) -> None:
    """Its state would be part of the graph."""
    with pytest.raises(fxstream.TraceError, match=r"calls a .* that is not one of the model's submodules"):
        fxstream.convert(Body(_pooled_by(KEPT[name]()), first=conv(), last=conv()), 4)


class Rounding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * ceil(0.5 * x.shape[1])


def test_a_function_of_python_that_was_imported_by_its_name_is_no_variable_that_forward_changes() -> None:
    assert_exact(nn.Sequential(conv(), Rounding()), IMAGE, 4, whole=True)
