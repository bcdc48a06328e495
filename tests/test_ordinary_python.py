"""Ordinary Python around convolutions, as users write it: the converted model is exact, or a named error says why not.

Forwards are drawn from the grammar in `forwards`. The plain model and the converted one are called in turn on images of
several sizes, and what they return and leave behind is compared. A failure prints the forward.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from forwards import Forward, draw
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import fxstream

EXAMPLES = int(os.environ.get("FXSTREAM_EXAMPLES", "2000"))
QUICK = 10
PARTS = 4
TOLERANCE = 1e-9
VANISHING = 1e-2
"""A smaller norm may be that of rounding errors alone."""

Door = Callable[[nn.Module, Forward, torch.Tensor], nn.Module]
"""Makes a model that streams of a plain one; it gets an image like that of the first call, too."""


def converted(model: nn.Module, forward: Forward, image: torch.Tensor) -> nn.Module:
    return fxstream.convert(model, forward.tile_shape, example_input=image if forward.example else None)


def compiled(model: nn.Module, forward: Forward, image: torch.Tensor) -> nn.Module:
    torch._dynamo.reset()
    return fxstream.compile(model, forward.tile_shape, strict=True)


class Differs(Exception):  # noqa: N818
    """The plain model and the streaming one do not do the same."""


@dataclass
class Verdict:
    """What has come of a forward."""

    kind: str
    """"exact"; "refused" with a named error, at the conversion or at a "call"; "wrong"; "crash"; or "plain fails"."""
    reason: str = ""
    calls: int = 0
    """So many were compared."""
    unproved: bool = False

    @property
    def good(self) -> bool:
        return self.kind not in ("wrong", "crash")


def judge(forward: Forward, door: Door) -> Verdict:
    """Compare the model of a forward with the one that comes through a door."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return _judge(forward, door)


def _judge(forward: Forward, door: Door) -> Verdict:
    plain, other = forward.build(), forward.build()
    plain.train(forward.modes[0])
    other.train(forward.modes[0])
    verdict = Verdict("exact")
    first = _outcome(plain, forward, 0)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            streaming = door(other, forward, forward.images(0))
        verdict.unproved = any("is not proved" in str(warning.message) for warning in caught)
    except fxstream.StreamingError as error:
        return Verdict("refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        own = first.error
        if own is not None and type(own) is type(error) and str(own) == str(error):
            return Verdict("plain fails", f"{type(error).__name__}: {error}")
        return Verdict("crash", f"at the conversion: {_first_line(error)}")
    for number in range(len(forward.calls)):
        for model in (plain, streaming):
            if model.training is not forward.modes[number]:
                model.train(forward.modes[number])
        expected = first if number == 0 else _outcome(plain, forward, number)
        found = _outcome(streaming, forward, number, expected.upstream)
        where = f"call {number}: "
        if isinstance(found.error, fxstream.StreamingError):
            if expected.error is not None:
                continue
            return replace(verdict, kind="refused", reason=f"call: {_first_line(found.error)}")
        if found.error is not None and str(found.error) in expected.caught:
            return replace(verdict, kind="refused", reason="call: an error of torch that the forward catches")
        try:
            _compare_outcomes(expected, found)
            _compare_state(plain, streaming)
        except Differs as error:
            kind = "crash" if found.error is not None and expected.error is None else "wrong"
            return replace(verdict, kind=kind, reason=where + str(error))
        verdict.calls += expected.error is None
    return verdict if verdict.calls else replace(verdict, kind="plain fails")


@dataclass
class Outcome:
    """What has come of a call."""

    error: Exception | None = None
    output: Any = None
    image: torch.Tensor | None = None
    """Afterwards."""
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    upstream: list[torch.Tensor] | None = None
    undifferentiable: str = ""
    caught: set[str] = field(default_factory=set)
    """Errors of torch, whether the forward catches them or not."""


def _outcome(model: nn.Module, forward: Forward, number: int, upstream: list[torch.Tensor] | None = None) -> Outcome:
    leaf = forward.images(number).requires_grad_()
    x = leaf.clone()  # no leaf, since a forward may overwrite it
    args, kwargs = forward.arguments(number, x)
    errors = _Errors()
    try:
        with errors if upstream is None else contextlib.nullcontext():
            output = model(x, *args, **kwargs)
    except Exception as error:
        return Outcome(error)
    roots = [one for one in tree_leaves(_opened(output)) if isinstance(one, torch.Tensor) and one.requires_grad]
    if upstream is None:
        generator = torch.Generator().manual_seed(7)
        upstream = [torch.randn(root.shape, dtype=root.dtype, generator=generator) for root in roots]
    outcome = Outcome(None, _copied(output), x.detach().clone(), {}, upstream, "", errors.found)
    named = {"the image": leaf, **{name: one for name, one in model.named_parameters() if one.requires_grad}}
    if not roots or len(upstream) != len(roots):
        return outcome
    try:
        found = torch.autograd.grad(roots, list(named.values()), upstream, allow_unused=True)
    except Exception as error:
        outcome.undifferentiable = _first_line(error)
        return outcome
    outcome.gradients = dict(zip(named, found, strict=True))
    return outcome


class _Errors(TorchFunctionMode):
    """Notes the errors that torch raises."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    @torch.compiler.disable  # if the plain model fails, the compiled one runs in this mode, and is not to contain it
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception as error:
            self.found.add(str(error))
            raise


def _opened(value: Any) -> Any:
    """Lists and dicts in place of what is no registered pytree."""
    if isinstance(value, dict):
        return [_opened(part) for part in value.values()]
    if isinstance(value, (list, tuple)):
        return [_opened(part) for part in value]
    return [_opened(part) for part in vars(value).values()] if type(value).__module__ == "generated" else value


def _copied(value: Any) -> Any:
    """What a forward has returned, as the pairs of a path and a value: nothing can change them later."""
    return list(_parts("the output", value))


def _parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        yield path, value.detach().clone().requires_grad_(value.requires_grad)
        return
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, dict):
        yield path, (kind, list(value))
        for key, part in value.items():
            yield from _parts(f"{path}[{key!r}]", part)
    elif isinstance(value, (list, tuple, deque)):
        yield path, (kind, len(value))
        for index, part in enumerate(value):
            yield from _parts(f"{path}[{index}]", part)
    elif kind.startswith("generated.") and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        yield path, kind
        for name, part in vars(value).items():
            yield from _parts(f"{path}.{name}", part)
    elif isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.device, set)):
        yield path, (kind, value if not isinstance(value, set) else sorted(map(str, value)))
    else:
        yield path, kind


_LAYOUT = "view size is not compatible with input tensor's size and stride"
"""Of a view of a tensor that is not contiguous. The blocks of it are, so that it streams."""


def _compare_outcomes(expected: Outcome, found: Outcome) -> None:
    if expected.error is not None and found.error is None and _LAYOUT in str(expected.error):
        return
    if (expected.error is None) is not (found.error is None) or type(expected.error) is not type(found.error):
        raise Differs(f"plain: {_first_line(expected.error)}; streaming: {_first_line(found.error)}")
    if expected.error is not None:
        return
    _compare_parts(expected.output, found.output)
    _check_close("the image afterwards", expected.image, found.image)
    if expected.undifferentiable:
        return
    if found.undifferentiable:
        raise Differs(f"the backward pass fails: {found.undifferentiable}")
    if expected.gradients.keys() != found.gradients.keys():
        raise Differs(f"gradients of {list(expected.gradients)}, {list(found.gradients)}")
    largest = max((float(one.norm()) for one in expected.gradients.values() if one is not None), default=0.0)
    for name, gradient in expected.gradients.items():
        _check_close(f"the gradient of {name}", gradient, found.gradients[name], 1e-3 * largest)


def _compare_parts(expected: list[tuple[str, Any]], found: list[tuple[str, Any]]) -> None:
    for (path, one), (other_path, other) in zip(expected, found, strict=False):
        if path != other_path:
            raise Differs(f"{other_path} in place of {path}")
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            _check_close(path, one, other)
        elif isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor) or not _same(one, other):
            raise Differs(f"{path} is {_shown(one)} in plain, {_shown(other)} in streaming")
    if len(expected) != len(found):
        raise Differs(f"{len(expected)} and {len(found)} parts")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(one[-1], float):
        return one[0] == other[0] and abs(one[1] - other[1]) <= TOLERANCE * abs(one[1])
    return bool(one == other)


def _shown(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else str(value)


def _check_close(what: str, expected: Any, found: Any, scale: float = 0.0) -> None:
    if expected is None or found is None:
        if expected is not found:
            raise Differs(f"{what} is {_shown(expected)} in plain, {_shown(found)} in streaming")
        return
    for name in ("shape", "dtype", "requires_grad"):
        if getattr(expected, name) != getattr(found, name):
            raise Differs(f"{what}: {name} {getattr(expected, name)} in plain, {getattr(found, name)} in streaming")
    if expected.dtype is torch.bool or not expected.dtype.is_floating_point:
        error, limit = float(not torch.equal(expected, found)), 0.0
    else:
        expected, found = expected.detach().nan_to_num(), found.detach().nan_to_num()
        error = float((expected - found).norm())
        single = expected.dtype is not torch.double
        limit = (1e-4 if single else TOLERANCE) * max(float(expected.norm()), scale, VANISHING)
    if not error <= limit:
        raise Differs(f"{what}: error {error:.1e}, allowed {limit:.1e}")


_OF_MODULES = {*vars(nn.Module()), "_is_full_backward_hook"} - {"training"}


def _state(model: nn.Module) -> dict[str, list[tuple[str, Any]]]:
    """What the modules hold besides other modules, by name."""
    found = {}
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
        for name, value in {**module._parameters, **module._buffers, **own}.items():
            found[f"{path}.{name}"] = list(_parts(f"{path}.{name}", value))
        if path and type(module).__module__ == "generated":
            variables = {name: value for name, value in vars(type(module)).items() if isinstance(value, (int, float))}
            found[f"the class of {path}"] = list(_parts(f"the class of {path}", variables))
    return found


def _compare_state(plain: nn.Module, streaming: nn.Module) -> None:
    expected, found = _state(plain), _state(streaming)
    for name, parts in expected.items():
        if name not in found:
            raise Differs(f"after the call, there is no {name}")
        _compare_parts(parts, found[name])
    modules = {path for path, _ in plain.named_modules()}
    new = [name for name in found if name not in expected and name.rpartition(".")[0] in modules - {""}]
    if new:
        raise Differs(f"after the call, there is {new[0]}")


def _first_line(error: Exception | None) -> str:
    return "no error" if error is None else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def shrunk(forward: Forward, door: Door) -> Forward:
    """The forward without the statements and calls that a fault does not need."""
    wanted = _fault(judge(forward, door))
    found = True
    while found:
        found = False
        for smaller in _smaller(forward):
            try:
                if _fault(judge(smaller, door)) == wanted:
                    forward, found = smaller, True
                    break
            except SyntaxError:
                continue
    return forward


def _fault(verdict: Verdict) -> tuple[str, str]:
    return verdict.kind, re.sub(r"\w*\d[\w.+-]*", "", verdict.reason)[:200]


def _smaller(forward: Forward) -> Iterator[Forward]:
    for name, statements in forward.statements.items():
        for index in range(len(statements) - 1):
            if not statements[index].startswith("y = self.stem"):
                left = [*statements[:index], *statements[index + 1 :]]
                yield replace(forward, statements={**forward.statements, name: left})
        for index, statement in enumerate(statements):
            for other in _simpler(statement):
                yield replace(
                    forward,
                    statements={**forward.statements, name: [*statements[:index], other, *statements[index + 1 :]]},
                )
    if len(forward.calls) > 1:
        for index in range(len(forward.calls)):
            yield replace(
                forward,
                calls=[*forward.calls[:index], *forward.calls[index + 1 :]],
                modes=[*forward.modes[:index], *forward.modes[index + 1 :]],
            )


def _simpler(statement: str) -> Iterator[str]:
    """A statement without one of its lines, or with the lines of a block alone."""
    lines = statement.splitlines()
    if len(lines) > 1:
        for index in range(len(lines)):
            yield "\n".join([*lines[:index], *lines[index + 1 :]])
        if all(line.startswith("    ") for line in lines[1:]):
            yield "\n".join(line[4:] for line in lines[1:])
    elif statement.startswith("return ") and statement != "return y":
        yield "return y"


@dataclass
class Tally:
    """What has come of many forwards."""

    kinds: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """Why forwards were refused, and how often."""
    faults: list[int] = field(default_factory=list)
    """The seeds of forwards that differ or crash."""

    def add(self, seed: int, verdict: Verdict) -> None:
        self.kinds[verdict.kind] += 1
        self.kinds["not proved"] += verdict.unproved
        if verdict.kind == "refused":
            self.reasons[re.sub(r"\w*\d[\w.+-]*", "_", verdict.reason.splitlines()[0])[:200]] += 1
        if not verdict.good:
            self.faults.append(seed)

    def __str__(self) -> str:
        reasons = (f"{count:5} {reason}" for reason, count in self.reasons.most_common(25))
        return "\n".join([", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common()), *reasons])


def explore(seeds: range, door: Door) -> Tally:
    """Judge the forwards of some seeds. Raises AssertionError with the smallest form of the first that is at fault."""
    tally = Tally()
    for seed in seeds:
        tally.add(seed, judge(draw(seed), door))
    print(tally)
    if tally.faults:
        smallest = shrunk(draw(tally.faults[0]), door)
        verdict = judge(smallest, door)
        raise AssertionError(f"seeds {tally.faults}; {verdict.kind}: {verdict.reason}\n{smallest.short()}\n{tally}")
    return tally


DOORS: dict[str, tuple[Door, int]] = {"convert": (converted, 1), "compile": (compiled, 10)}
"""The ways to a model that streams, and by how much fewer forwards come through one than through the first."""


@pytest.mark.parametrize("part", range(PARTS))  # for as many processes
@pytest.mark.parametrize("name", DOORS)
def test_ordinary_forwards_are_exact_or_refused_by_name(name: str, part: int) -> None:
    door, fewer = DOORS[name]
    explore(range(QUICK * part // fewer, QUICK * (part + 1) // fewer), door)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", DOORS)
def test_many_ordinary_forwards_are_exact_or_refused_by_name(name: str, part: int) -> None:
    door, fewer = DOORS[name]
    count = EXAMPLES // PARTS // fewer
    start = 10**6 + random.randrange(2**32)
    tally = explore(range(start, start + count), door)
    assert tally.kinds["exact"] >= 0.6 * count, f"too many are refused\n{tally}"


BROKEN: list[Callable[[nn.Module], nn.Module]] = []
"""What a door may do wrong."""


@BROKEN.append
def _scaled(model: nn.Module) -> nn.Module:
    """Other numbers."""
    with torch.no_grad():
        next(model.parameters()).mul_(1 + 1e-6)
    return model


@BROKEN.append
def _listed(model: nn.Module) -> nn.Module:
    """An output of another type."""
    model.register_forward_hook(lambda module, args, output: [output])
    return model


@BROKEN.append
def _without_gradients(model: nn.Module) -> nn.Module:
    model.get_submodule("stem").register_full_backward_hook(lambda module, grads, _: (grads[0] * 0,))
    return model


@BROKEN.append
def _counted(model: nn.Module) -> nn.Module:
    """Other attributes after a call."""
    model.register_forward_hook(lambda module, args, output: setattr(module, "calls", 7))
    return model


@BROKEN.append
def _failing(model: nn.Module) -> nn.Module:
    """An error of no name."""
    model.register_forward_pre_hook(lambda module, args: {}["nothing"])
    return model


@pytest.mark.parametrize("broken", BROKEN)
def test_a_door_that_does_something_else_is_at_fault(broken: Callable[[nn.Module], nn.Module]) -> None:
    seed = next(seed for seed in range(100) if judge(draw(seed), lambda model, forward, image: model).kind == "exact")
    assert not judge(draw(seed), lambda model, forward, image: broken(model)).good


def test_a_fault_is_shown_in_its_smallest_form() -> None:
    def door(model: nn.Module, forward: Forward, image: torch.Tensor) -> nn.Module:
        return _counted(model) if "F.pad" in forward.source() else model

    with pytest.raises(AssertionError, match=r"after the call|calls") as caught:
        explore(range(40), door)
    shown = [line for line in str(caught.value).splitlines() if line.startswith("    ") and "init" not in line]
    assert len(shown) <= 6
