"""What rules are given, and when they are asked: handles in place of tensors, and once for calls that are alike."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, assert_exact, counts, gradients, image, pair
from torch import nn

import fxstream
from fxstream.model.streamed import Streamed
from fxstream.ops import Given, Local, Noise, Sliced, Value, registry
from fxstream.scan.call import MOST_PROGRAMS
from fxstream.testing import check_op


@pytest.fixture(autouse=True)
def _own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that a test registers are gone after it."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


class Scale(nn.Module):
    """Multiplies by everything that a module may hold."""

    slope = 1.0

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, channels).view(-1, 1, 1))
        self.register_buffer("offset", torch.full((1,), 0.25))
        self.plain = torch.full((1,), 1.5)
        self.held = [torch.full((1,), 2.0)]
        self.factor = 2.0
        self.factors = [1.0, 1.0]
        self.config = SimpleNamespace(factor=1.0)

    @property
    def doubled(self) -> float:
        return 2 * self.slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = self.factor * self.factors[0] * self.config.factor * self.slope
        return (x * self.weight + self.offset) * self.plain * number


def scale(m: Any, x: Value) -> Local:
    """The rule of `Scale`, which reads some attributes itself, and leaves the others to `run`."""
    number = m.factor * m.factors[0]

    def run(block: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        return (block * weight + offset) * plain * (number * m.config.factor * m.slope)

    return Local((x, m.weight, m.offset, m.plain), x.dims, run)


class Counted:
    """A rule that counts how often it is asked."""

    def __init__(self, rule: Callable[[Any, Value], Local]) -> None:
        self.rule = rule
        self.asked = 0

    def register(self, kind: type[nn.Module]) -> Counted:
        fxstream.register(kind)(lambda m, x: self(m, x))
        return self

    def __call__(self, m: Any, x: Value) -> Local:
        self.asked += 1
        return self.rule(m, x)


def network(middle: nn.Module | None = None) -> nn.Module:
    middle = Scale() if middle is None else middle
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), middle, nn.Conv2d(4, 2, 3)).double()


def step(model: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    """Forward and backward; returns the output."""
    output: torch.Tensor = model(image() if x is None else x)
    model.zero_grad()
    output.square().sum().backward()
    return output.detach()


def assert_equal(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert_close({"a tensor": found}, {"a tensor": expected})


def assert_same(plain: nn.Module, converted: nn.Module, x: torch.Tensor | None = None) -> None:
    """Outputs and gradients of all parameters are."""
    assert_equal(step(converted, x), step(plain, x))
    assert_close(gradients(converted), gradients(plain))


# Handles.


def _refusals() -> dict[str, tuple[Callable[[Any, Value], Local], str]]:
    def parameter(m: Any, x: Value) -> Local:
        doubled = m.weight * 2
        return Local((x,), x.dims, lambda block: block * doubled)

    def buffer(m: Any, x: Value) -> Local:
        return Local((x,), x.dims, lambda block: block * float(m.offset))

    def number(m: Any, x: Value) -> Local:
        many = m.offset.item() > 0
        return Local((x,), x.dims, lambda block: block * many)

    def listed(m: Any, x: Value) -> Local:
        numbers = m.weight.tolist()
        return Local((x,), x.dims, lambda block: block * len(numbers))

    def held(m: Any, x: Value) -> Local:
        doubled = m.held[0] * 2
        return Local((x,), x.dims, lambda block: block * doubled)

    def method(m: Any, x: Value) -> Local:
        weights = [parameter.exp() for parameter in m.parameters()]
        return Local((x,), x.dims, lambda block: block * weights[0])

    def closure(m: Any, x: Value) -> Local:
        weight = m.weight
        return Local((x,), x.dims, lambda block: block * weight)

    def attribute(m: Any, x: Value) -> Local:
        return Local((x,), x.dims, lambda block: block.mul(m.plain))

    def itself(m: Any, x: Value) -> Local:
        return Local((x,), x.dims, m)

    return {
        "a parameter": (parameter, "mul"),
        "a number": (number, "item"),
        "a list": (listed, "tolist"),
        "a tensor in a list": (held, "mul"),
        "by a method": (method, "exp"),
        "a closure over a parameter": (closure, "mul"),
        "a buffer in run": (buffer, "__float__"),
        "a tensor attribute in run": (attribute, "mul"),
        "the module itself": (itself, "mul"),
    }


@pytest.mark.parametrize("case", _refusals())
def test_a_rule_that_computes_with_a_tensor_is_refused_at_the_conversion(case: str) -> None:
    """In its body or in a closure, which the proof runs: the error names the module, the operation and the way out."""
    rule, name = _refusals()[case]
    fxstream.register(Scale)(rule)
    message = (
        rf"rule of 1 \(Scale\) computes with a tensor itself \({name}\).*Way out: list the tensor among the operands"
    )
    with pytest.raises(fxstream.RuleError, match=message):
        fxstream.convert(network(), 8)


def test_a_closure_over_a_tensor_is_refused_at_a_call_if_nothing_was_proved() -> None:
    fxstream.register(Scale)(_refusals()["a closure over a parameter"][0])
    converted = fxstream.convert(network(), 8, prove=False)
    with pytest.raises(fxstream.RuleError, match=r"rule of 1 \(Scale\) computes with a tensor itself \(mul\)"):
        converted(image())


def test_a_handle_answers_questions_about_its_tensor() -> None:
    seen: list[Any] = []

    def rule(m: Any, x: Value) -> Local:
        for given in (m.weight, m.offset, m.plain, m.held[0]):
            assert isinstance(given, Given)
            assert isinstance(given, torch.Tensor)
            seen.append((tuple(given.shape), given.dtype, given.device.type, given.stride(), given.requires_grad))
            assert given.size(0) == given.numel() == len(given)
            assert given.dim() == len(given.shape) == given.ndim
        return scale(m, x)

    fxstream.register(Scale)(rule)
    assert_exact(network(), image(), 8, whole=True)
    weight = ((4, 1, 1), torch.float64, "cpu", (1, 1, 1), True)
    assert set(seen) == {weight, ((1,), torch.float64, "cpu", (1,), False), ((1,), torch.float32, "cpu", (1,), False)}


def test_every_kind_of_tensor_is_an_operand() -> None:
    """A parameter, a buffer and a plain attribute of a module; outputs and gradients are exact."""
    fxstream.register(Scale)(scale)
    assert_exact(network(), image(), 8, whole=True)
    check_op(Scale(3), (2, 3, 11, 12))


class Dropping(nn.Module):
    """Drops with a probability that is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("p", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.conv(x), self.p, True)


def test_a_rule_of_ours_that_needs_the_numbers_in_a_tensor_leaves_the_operation_to_the_head() -> None:
    (stop,) = fxstream.analyze(Dropping()).stops
    assert stop.reason == "dropout depends on the numbers in a tensor. Way out: give it numbers of Python."
    assert_exact(Dropping(), image(), 8, last="conv")


class Rows(nn.Module):
    """Multiplies each row by a number that is made of the image's size, and then by a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.factor = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        rows = torch.linspace(1, 2, y.shape[-2], dtype=y.dtype).view(-1, 1)
        return y * rows * (self.factor * rows).exp()


def test_what_is_made_of_sizes_is_made_once_per_call_and_of_parameters_for_every_tile() -> None:
    converted = assert_exact(Rows(), image(), 8, whole=True)
    with torch.no_grad():
        converted(image())
        assert counts(converted, image())["linspace"] == 1
        assert counts(converted, image())["exp"] == 12


class Handing(Rows):
    """Also returns what is made of a parameter and of sizes."""

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        rows = (self.factor * torch.linspace(1, 2, y.shape[-2], dtype=y.dtype).view(-1, 1)).exp()
        return y * rows, rows


class Added(nn.Module):
    def forward(self, pair: Any) -> torch.Tensor:
        return pair[0].flip(2).sum(2) + pair[1].square().sum()


def test_what_is_made_of_a_parameter_has_its_gradient_where_the_head_gets_it() -> None:
    assert_exact(nn.Sequential(Handing(), Added()), image(), 8, last=("mul_1", "sum_2"))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.linspace(0, 1, 26 * 21).view(1, 26, 21))
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask.exp()


def test_none_is_passed_as_none_and_rows_of_a_parameter_as_rows() -> None:
    @fxstream.register(Masked)
    def masked(m: Any, x: Value) -> Local:
        def run(block: torch.Tensor, bias: None, mask: torch.Tensor) -> torch.Tensor:
            assert bias is None
            assert mask.shape[1:] == block.shape[2:]
            return block * mask.exp()

        return Local((x, m.bias, Sliced(m.mask, {1: "H", 2: "W"})), x.dims, run)

    assert_exact(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Masked()), image(), 8, whole=True)


def test_an_operand_that_is_no_tensor_of_the_call_is_refused() -> None:
    def rule(m: Any, x: Value) -> Local:
        return Local((x, m.held[0]), x.dims, lambda block, held: block * held)

    fxstream.register(Scale)(rule)
    converted = fxstream.convert(network(), 8, prove=False)
    with pytest.raises(fxstream.RuleError, match=r"1 \(Scale\) has an operand that is neither .* Way out"):
        converted(image())


class Sorted(nn.Module):
    """Sorts the pixels of each image; has no parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).sort(-1).values.view(x.shape)


class SortedInside(Sorted):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Scale(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.inner(x))


def test_a_module_without_tensors_can_be_run_itself() -> None:
    fxstream.register(Sorted)(lambda m, x: Local((x,), x.dims, m))
    check_op(Sorted(), (5, 3, 7, 6), axes="N")


def test_a_module_with_parameters_is_run_with_those_that_it_is_given() -> None:
    @fxstream.register(SortedInside)
    def rule(m: Any, x: Value) -> Local:
        own = {"inner.weight": m.inner.weight, "inner.offset": m.inner.offset, "inner.plain": m.inner.plain}

        def run(block: torch.Tensor, *tensors: torch.Tensor) -> Any:
            return m.with_tensors(dict(zip(own, tensors, strict=True)))(block)

        return Local((x, *own.values()), x.dims, run)

    check_op(SortedInside(), (5, 3, 7, 6), axes="N")
    fxstream.register(SortedInside)(lambda m, x: Local((x,), x.dims, m))
    with pytest.raises(fxstream.RuleError, match=r"rule of 0 \(SortedInside\) computes with a tensor itself"):
        fxstream.convert(nn.Sequential(SortedInside()), (2, None, None, None), example_input=image().float())


def test_two_noise_operands_of_the_same_distribution_are_two_draws() -> None:
    class Jitter(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x) - torch.rand_like(x)

    @fxstream.register(Jitter)
    def jitter(m: Any, x: Value) -> Local:
        return Local((x, Noise(x.dims), Noise(x.dims)), x.dims, lambda block, one, other: block + one - other)

    model = fxstream.convert(nn.Sequential(Jitter(), nn.Identity()), 16, example_input=image())
    found = model(torch.zeros(2, 3, 64, 64))
    # The difference of two independent uniform numbers has the variance 1 / 6.
    assert found.var().item() == pytest.approx(1 / 6, rel=0.1)


# When rules are asked.


@pytest.fixture
def counted() -> Counted:
    return Counted(scale).register(Scale)


def converted_pair(counted: Counted, **options: Any) -> tuple[nn.Module, Any]:
    plain, converted = pair(network(), 8, prove=False, **options)
    counted.asked = 0
    return plain, converted


@pytest.mark.parametrize("budget", [None, "1GiB"], ids=["computed again", "recorded"])
def test_a_rule_is_asked_once_for_the_forward_pass_the_recorded_one_and_the_recomputation(
    counted: Counted, budget: str | None
) -> None:
    plain, converted = converted_pair(counted, memory_budget=budget)
    assert_same(plain, converted)
    asked = counted.asked
    assert asked == 1 or budget is not None  # what is kept is chosen with programs of its own, on the meta device
    assert_same(plain, converted)
    assert counted.asked == asked


def _set_factor(m: Any) -> None:
    m.factor = 3.0


def _change_a_list(m: Any) -> None:
    m.factors[0] = 3.0


def _change_an_object(m: Any) -> None:
    m.config.factor = 3.0


def _replace_an_object(m: Any) -> None:
    m.config = SimpleNamespace(factor=0.5)


def _shadow_the_class(m: Any) -> None:
    m.slope = 3.0


def _other_parameter(m: Any) -> None:
    m.weight = nn.Parameter(torch.full((1, 1, 1), 3.0, dtype=torch.double))


def _other_buffer(m: Any) -> None:
    m.offset = torch.full((4, 1, 1), 3.0, dtype=torch.double)


def _freeze(m: Any) -> None:
    m.weight.requires_grad_(False)


def _negative_zero(m: Any) -> None:
    m.factors[1] = -0.0


CHANGES = [
    _set_factor,
    _change_a_list,
    _change_an_object,
    _replace_an_object,
    _shadow_the_class,
    _other_parameter,
    _other_buffer,
    _freeze,
    _negative_zero,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_change_of_a_module_takes_effect_at_the_next_call(counted: Counted, change: Callable[[Any], None]) -> None:
    """Whether the rule itself has read the attribute or `run` does."""
    plain, converted = converted_pair(counted)
    assert_same(plain, converted)
    for model in (plain, converted):
        change(model.get_submodule("1"))
    assert_same(plain, converted)
    assert counted.asked == 2
    assert_same(plain, converted)
    assert counted.asked == 2


@pytest.mark.parametrize("read", ["doubled", "slope"], ids=["a property", "an attribute of the class"])
def test_a_change_of_what_is_no_attribute_of_the_module_itself_takes_effect(
    monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    class Own(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(getattr(self, read))

    def rule(m: Any, x: Value) -> Local:
        number = getattr(m, read)
        return Local((x,), x.dims, lambda block: block * number)

    asked = Counted(rule).register(Own)
    plain, converted = pair(network(Own()), 8, prove=False)
    assert_equal(converted(image()), plain(image()))
    monkeypatch.setattr(Own, "slope", 7.0)
    asked.asked = 0
    assert_equal(converted(image()), plain(image()))
    assert asked.asked == 1


def test_an_attribute_that_no_call_has_read_yet_is_what_it_is_now() -> None:
    asking = []

    def rule(m: Any, x: Value) -> Local:
        return Local((x,), x.dims, lambda block: block * (getattr(m, "late", m.factor) if asking else 1.0))

    fxstream.register(Scale)(rule)
    for name in ("factor", "late"):
        asking.clear()
        _, converted = pair(network(), 8, prove=False)
        with torch.no_grad():
            one = converted(image())
            asking.append(True)
            setattr(converted.get_submodule("1"), name, 6.0)
            bias = converted.get_submodule("2").bias.view(-1, 1, 1)
            assert_equal(converted(image()) - bias, 6 * (one - bias))


def test_what_changes_between_forward_and_backward_changes_nothing(counted: Counted) -> None:
    plain, converted = converted_pair(counted)
    expected, output = step(plain), converted(image())
    module = converted.get_submodule("1")
    module.factor, module.slope = 9.0, 9.0
    module.eval()
    output.square().sum().backward()
    assert_equal(output, expected)
    assert_close(gradients(converted), gradients(plain))
    assert counted.asked == 1


def test_a_gradient_of_a_few_parameters_asks_no_rule_again(counted: Counted) -> None:
    plain, converted = converted_pair(counted)
    found = [
        torch.autograd.grad(model(image()).sum(), [model.get_submodule("2").weight])[0] for model in (plain, converted)
    ]
    assert_equal(*found)
    assert counted.asked == 1


def test_calls_that_differ_in_what_a_rule_sees_each_ask_once(counted: Counted) -> None:
    """Sizes, modes, whether the image requires a gradient, autocast, dtypes; going back to the first asks nothing."""
    plain, converted = converted_pair(counted)
    sizes = [image(26, 21), image(18, 17), image(26, 21, batch=1), image(26, 21).requires_grad_()]
    for x in (*sizes, *sizes):
        assert_equal(step(converted, x), step(plain, x))
    assert counted.asked == len(sizes)
    for training in (False, True, False):
        converted.train(training)
        step(converted)
    assert counted.asked == len(sizes) + 1
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            converted.train()(image())
    assert counted.asked == len(sizes) + 2
    converted.float()
    step(converted, image().float())
    assert counted.asked == len(sizes) + 3


def test_a_rule_that_is_registered_anew_is_asked(counted: Counted) -> None:
    _, converted = converted_pair(counted)
    before = step(converted)
    fxstream.register(Scale)(lambda m, x: Local((x,), x.dims, lambda block: 0 * block))
    assert not torch.equal(step(converted), before)


def test_a_rule_that_reads_what_cannot_be_compared_is_asked_at_every_call() -> None:
    class Box:
        __slots__ = ("number",)

    class Boxed(Scale):
        def __init__(self) -> None:
            super().__init__()
            self.box = Box()
            self.box.number = 2.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.box.number

    def rule(m: Any, x: Value) -> Local:
        number = m.box.number
        return Local((x,), x.dims, lambda block: block * number)

    fxstream.register(Boxed)(rule)
    plain, converted = pair(network(Boxed()), 8, prove=False)
    for number in (2.0, 3.0):
        for model in (plain, converted):
            model.get_submodule("1").box.number = number
        assert_equal(converted(image()), plain(image()))


class Powered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("number", torch.ones(()))

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * self.number.item() * factor


def test_numbers_and_tensors_that_enter_beside_the_image_are_told_apart() -> None:
    plain, converted = pair(Powered().double(), 8, prove=False)
    for number in (1, 2.0, -1.0):
        for model in (plain, converted):
            model.get_buffer("number").fill_(number)
        for factor in (torch.tensor(2.0), torch.tensor(3.0), torch.ones(4, 1, 1)):
            assert_equal(converted(image(), factor), plain(image(), factor))


def _streamed(converted: nn.Module) -> Streamed:
    return next(module for module in converted.modules() if isinstance(module, Streamed))


def test_programs_of_many_image_sizes_are_not_all_kept(counted: Counted) -> None:
    _, converted = converted_pair(counted)
    with torch.no_grad():
        for width in range(10, 10 + MOST_PROGRAMS + 5):
            converted(image(9, width, batch=1))
    assert len(_streamed(converted)._programs) == MOST_PROGRAMS


def test_a_copy_starts_without_programs(counted: Counted) -> None:
    plain, converted = converted_pair(counted)
    step(converted)
    for copied in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert not len(_streamed(copied)._programs)
        asked = counted.asked
        assert_same(plain, copied)
        assert counted.asked == asked + 1


def test_a_program_keeps_no_tensor_of_a_call_alive(counted: Counted) -> None:
    """Neither the parameters and buffers, nor the image."""
    _, converted = converted_pair(counted)
    module = converted.get_submodule("1")

    def replace_tensors() -> list[Any]:
        module.weight = nn.Parameter(module.weight.detach().clone())
        module.offset, module.plain = module.offset.clone(), module.plain.clone()
        return [weakref.ref(tensor) for tensor in (module.weight, module.offset, module.plain)]

    held = replace_tensors()  # those before have been seen by the conversion
    x = image()
    step(converted, x)
    held.append(weakref.ref(x))
    replace_tensors()
    del x
    gc.collect()
    assert [tensor() for tensor in held] == [None] * 4
    assert len(_streamed(converted)._programs) == 1
