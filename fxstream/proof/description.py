"""What a value or a module tree holds, as a flat dict of tensors, numbers and types by name; and how two differ."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from reprlib import repr as shortened
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..graph.attributes import is_plain_object
from ..graph.hooks import computed_weights

Description = dict[str, Any]
"""Names such as "output['logits'][0]" -> a tensor, a number, or a `Kind`."""


class Kind(NamedTuple):
    """What stands for a value that is neither a tensor nor a number."""

    type: type
    content: Any = None
    """The keys of a dict, the length of another container, the elements of an array."""

    def __str__(self) -> str:
        name = f"{self.type.__module__}.{self.type.__qualname__}".removeprefix("builtins.")
        return f"a {name}" if self.content is None else f"a {name} of {shortened(self.content)}"


def of_value(name: str, value: Any) -> Description:
    """What a value holds."""
    return dict(_items(name, value, {}, every_object=True))


def of_modules(root: nn.Module) -> Description:
    """What the modules of a tree hold: parameters, buffers, modes and all other attributes but hooks.

    Weights that hooks compute before each forward are left out: a graph computes them, too, and leaves them nowhere.
    """
    seen: dict[int, Any] = {}
    found: Description = {}
    for path, module in root.named_modules():
        left_out = _REGISTRIES | computed_weights(module)
        scripted = isinstance(module, torch.jit.ScriptModule)  # its attributes are in C++
        attributes = {} if scripted else {name: value for name, value in vars(module).items() if name not in left_out}
        for name, value in {**module._parameters, **module._buffers, **attributes}.items():
            # Objects of libraries, such as loggers, are not part of the model's state.
            found.update(_items(f"{path}.{name}" if path else name, value, seen, every_object=False))
    return found


_REGISTRIES = {name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))}
_NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)


def _items(name: str, value: Any, seen: dict[int, Any], every_object: bool) -> Iterator[tuple[str, Any]]:
    """`seen` has the objects that have been looked into, by id."""
    if isinstance(value, (torch.Tensor, *_NUMBERS)):
        yield name, value
        return
    parts, content = _parts(name, value, every_object)
    yield name, Kind(type(value), content)
    if id(value) not in seen:
        seen[id(value)] = value
        for inner, part in parts:
            yield from _items(inner, part, seen, every_object)


def _parts(name: str, value: Any, every_object: bool) -> tuple[list[tuple[str, Any]], Any]:
    """What a value holds, by name; and what else tells it from others of its type."""
    if isinstance(value, dict):
        keys = [key if isinstance(key, _NUMBERS) else type(key) for key in value]
        return [(f"{name}[{key!r}]", part) for key, part in zip(keys, value.values(), strict=True)], keys
    if isinstance(value, (set, frozenset)):
        return [], sorted(str(part) if isinstance(part, _NUMBERS) else type(part).__name__ for part in value)
    if isinstance(value, (list, tuple, deque)):
        return [(f"{name}[{index}]", part) for index, part in enumerate(value)], len(value)
    if isinstance(value, np.ndarray):
        return [], (value.shape, str(value.dtype), value.tobytes())
    if isinstance(value, torch.Generator):
        return [(f"{name}.get_state()", value.get_state())], None
    if is_plain_object(value) or (every_object and hasattr(value, "__dict__") and not isinstance(value, _OPAQUE)):
        return [(f"{name}.{key}", part) for key, part in vars(value).items()], None
    return [], None


_OPAQUE = (type, FunctionType, MethodType, nn.Module)


def difference(plain: Description, graph: Description, tolerance: float) -> str | None:
    """What differs first between what the plain model and the graph have left, in words; None if nothing does.

    `tolerance` is the greatest relative L2 error of a tensor; 0 for tensors that are equal bit by bit.
    """
    for name, expected in plain.items():
        if name not in graph:
            return f"{name} is {_words(expected)} in the plain model, and the graph does not make it"
        found = _differing(expected, graph[name], tolerance)
        if found is not None:
            return f"{name} {found}"
    for name, value in graph.items():
        if name not in plain:
            return f"{name} is {_words(value)} in the graph, and the plain model does not make it"
    return None


def gradient_difference(
    plain: dict[str, torch.Tensor | None], graph: dict[str, torch.Tensor | None], tolerance: float
) -> str | None:
    """Likewise for gradients. Small gradients, which are sums that cancel, are measured by the largest of the model."""
    largest: float | None = None
    for name, expected in plain.items():
        got = graph[name]
        if (expected is None) is not (got is None):
            one, other = ("the plain model", "the graph") if got is None else ("the graph", "the plain model")
            return f"the gradient of {name} is computed in {one}, and in {other} there is none"
        if expected is None or got is None or _equal(expected, got):
            continue
        if problem := _form(expected, got):
            return f"the gradient of {name} {problem}"
        if largest is None:  # which takes long, and is seldom needed
            largest = max(_norm(gradient) for gradient in plain.values() if gradient is not None)
        error = _norm(got - expected) / max(_norm(expected), _SMALL * largest)
        if not error <= tolerance and not _same_where_not_finite(expected, got, tolerance):
            return f"the gradient of {name} differs (relative error {error:.1e})"
    return None


_SMALL = 1e-2


def _differing(expected: Any, got: Any, tolerance: float) -> str | None:
    if isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor):
        if problem := _form(expected, got):
            return problem
        if _equal(expected, got):
            return None
        error = _norm(got.detach() - expected.detach()) / max(_norm(expected), 1e-300) if _measurable(got) else 1.0
        near = tolerance > 0 and (error <= tolerance or _same_where_not_finite(expected, got, tolerance))
        return None if near else f"differs (relative error {error:.1e})"
    if type(expected) is not type(got):
        return f"is {_words(expected)} in the plain model, and {_words(got)} in the graph"
    same = expected is got or expected == got or (expected != expected and got != got)  # NaN
    if not same and tolerance and isinstance(expected, float):
        same = abs(got - expected) <= tolerance * abs(expected)
    return None if same else f"is {_words(expected)} in the plain model, and {_words(got)} in the graph"


def _form(expected: torch.Tensor, got: torch.Tensor) -> str | None:
    """What differs of two tensors besides their values."""
    for what in ("shape", "dtype", "device", "layout", "requires_grad"):
        one, other = getattr(expected, what), getattr(got, what)
        if one != other:
            one, other = (tuple(one), tuple(other)) if what == "shape" else (one, other)
            return f"has {what}={one} in the plain model, and {what}={other} in the graph"
    if type(expected) is not type(got):
        return f"is {_words(expected)} in the plain model, and {_words(got)} in the graph"
    return None


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one form are equal bit by bit, but for signs of 0; NaN is equal to itself."""
    one, other = one.detach(), other.detach()
    if one.layout is not torch.strided:
        one, other = one.to_dense(), other.to_dense()
    if torch.equal(one, other):
        return True
    return _measurable(one) and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _measurable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _same_where_not_finite(expected: torch.Tensor, got: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors with infinities or NaN have these at the same places, and are close elsewhere."""
    finite = expected.isfinite()
    if finite.all() or not torch.equal(finite, got.isfinite()):
        return False
    return _norm((got - expected)[finite]) <= tolerance * _norm(expected[finite])


def _norm(tensor: torch.Tensor) -> float:
    """The L2 norm, in double precision."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    if tensor.device.type == "mps":  # it has no float64
        tensor = tensor.cpu()
    return float(tensor.detach().to(wide).norm())


def _words(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {type(value).__name__} {tuple(value.shape)}"
    return str(value) if isinstance(value, Kind) else shortened(value)
