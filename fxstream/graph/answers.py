"""Asking the rule of a node's operation what the node reads and how it runs on a block."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ..errors import ImageTooSmallError
from ..geometry.axes import Symbol, Value, multiplied
from ..ops import Answer, Fact, Local, NotLocal, Pending, Rule, Total, Typed, Unknown, inplace
from ..ops.derived import derived
from .nodes import label, leaves, operation, overwrites, rule_of
from .regions import answer_in_region


class Borrowed:
    """A module with other values for some of its attributes, such as leaves that share its parameters' memory.

    `attributes` are given by their path in the module. A submodule is borrowed, too, with its part of them.
    """

    def __init__(self, module: nn.Module, attributes: Mapping[str, Any]):
        self._module = module
        self._attributes = attributes

    def __getattr__(self, name: str) -> Any:
        if name in self._attributes:
            return self._attributes[name]
        own = getattr(self._module, name)
        if not isinstance(own, nn.Module):
            return own
        start = f"{name}."
        inner = {path.removeprefix(start): value for path, value in self._attributes.items() if path.startswith(start)}
        return Borrowed(own, inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module itself with the tensors among the other attributes."""
        tensors = {path: value for path, value in self._attributes.items() if isinstance(value, torch.Tensor)}
        return torch.func.functional_call(self._module, tensors, args, kwargs)


class Watching(TorchFunctionMode):
    """Sees whether a rule computes with its tensors in its body. In the backward pass, the gradient would be lost."""

    def __init__(self, given: Iterable[Any]) -> None:
        """`given` holds what the rule is given, among it tensors."""
        super().__init__()
        self._given = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
        """The rule's tensors, and what it has made of them."""
        self.computed: list[str] = []
        """The names of the functions that have made a new tensor of these."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        used = [leaf for leaf in leaves((args, kwargs or {})) if self._is_given(leaf)]
        if used and isinstance(result, torch.Tensor) and result.is_floating_point():
            made = not result._is_view() and all(result is not tensor for tensor in used)
            self.computed += [getattr(func, "__name__", str(func))] if made else []
            self._given.append(result)
        return result

    def _is_given(self, leaf: Any) -> bool:
        return isinstance(leaf, nn.Parameter) or any(leaf is tensor for tensor in self._given)


def answer(
    node: fx.Node,
    inputs: Callable[[fx.Node], Any],
    module: nn.Module | None,
    attributes: Mapping[str, Any] | None = None,
    freeze_batchnorm: bool = False,
) -> Answer:
    """What the rule of a node's operation says, given the value of each node that it reads.

    Tensors in `attributes` stand in for the module's own. With `freeze_batchnorm`, batch norms use their running
    statistics in every mode. Raises ImageTooSmallError where a window does not fit the image.
    """
    args: tuple[Any, ...]
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), inputs)
    if node.target is operator.getitem and isinstance(args[0], (tuple, list)) and isinstance(args[1], (int, slice)):
        return Fact(args[0][args[1]])
    rule = rule_of(node, module)
    found = leaves((args, kwargs))
    if not any(isinstance(leaf, Value) for leaf in found) and (rule is None or not rule.takes_sizes):
        if (sizes := _sizes_asked(node, args)) is not None:
            return Fact(sizes)
        made = any(isinstance(leaf, (torch.Tensor, Typed, Pending)) for leaf in found)
        if made and module is None and rule is not None and _is_repeatable(rule) and not overwrites(node, None):
            return derived(_called(node), args, kwargs)
        return _of_sizes(node, args, kwargs, found)
    if rule is None:
        return NotLocal(f"has no streaming rule ({operation(node, module)})", "register one, see fxstream.register")
    if module is not None:
        frozen = {"training": False} if freeze_batchnorm and isinstance(module, _BatchNorm) else {}
        args = (Borrowed(module, {**(attributes or {}), **frozen}), *args)
    elif freeze_batchnorm and node.target is F.batch_norm:
        kwargs = _frozen(rule, args, kwargs)
        args = ()
    try:
        return answer_in_region(node, rule(*args, **kwargs))
    except ValueError as error:
        raise ImageTooSmallError(f"the image is too small for {label(node)}: {error}") from None


def _sizes_asked(node: fx.Node, args: tuple[Any, ...]) -> Any:
    """The shape, or one of the sizes, of a tensor that is made of sizes, if that is what a node reads; else None."""
    if not args or not isinstance(args[0], Pending) or args[0].shape is None:
        return None
    if (node.target is getattr and args[1] == "shape") or (node.target == "size" and len(node.args) == 1):
        return args[0].shape
    return args[0].shape[args[1]] if node.target == "size" and len(args) == 2 else None


def _is_repeatable(rule: Rule) -> bool:
    """Whether an operation does the same every time: one of ours that draws no random numbers."""
    function = getattr(rule.function, "func", rule.function)  # of a partial
    ours, _, family = function.__module__.rpartition(".")
    return ours == Rule.__module__.rpartition(".")[0] and family != "dropout"


def _called(node: fx.Node) -> Callable[..., Any]:
    """What a node calls, as a function."""
    if node.op == "call_function":
        assert callable(node.target)
        return node.target
    return lambda self, *args, **kwargs: getattr(self, str(node.target))(*args, **kwargs)


def _of_sizes(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], found: list[Any]) -> Answer:
    """The answer for arithmetic with sizes that a model has read off values; they are those of the whole values."""
    known = (
        getattr(node.target, "__module__", None) in ("_operator", "builtins", "math", inplace.__name__)
        or node.target is torch._assert
    )
    if node.op != "call_function" or not known or any(isinstance(leaf, torch.Tensor) for leaf in found):
        return NotLocal(
            f"uses a size of the image in {operation(node, None)}", "register a rule for it with takes_sizes=True"
        )
    if (found_multiple := _multiple(node.target, args)) is not None:
        return Fact(found_multiple)
    of_shapes = any(isinstance(arg, tuple) for arg in args) and node.target in (
        operator.add,
        inplace.FUNCTIONS["iadd"],
        operator.mul,
        tuple,
        list,
        len,
    )
    if not of_shapes and any(isinstance(leaf, (Symbol, Unknown)) for leaf in found):
        return Fact(Symbol())
    assert callable(node.target)
    return Fact(node.target(*args, **kwargs))


def _multiple(target: Any, args: tuple[Any, ...]) -> Any:
    """The extent of a streamed axis times a number or divided by one, of which the result knows; else None."""
    if target is operator.mul and len(args) == 2:
        size, number = args if type(args[1]) is int else args[::-1]
        return multiplied(size, Fraction(number)) if type(number) is int and number > 1 else None
    if target is operator.floordiv and type(args[1]) is int and args[1] > 1:
        return multiplied(args[0], Fraction(1, args[1]))
    return None


def _frozen(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**rule.signature.bind(*args, **kwargs).arguments, "training": False}


def locals_of(found: Answer) -> tuple[Local, ...]:
    """The operations in an answer."""
    parts = found if isinstance(found, tuple) else (found,)
    return tuple(part for part in parts if isinstance(part, Local))


def define(found: Answer, index: int) -> Any:
    """The value of a node, from its rule's answer.

    A Local becomes a Value; several are numbered from `index`. A Fact becomes what it says. A Total stays itself, since
    no streamed operation reads it.
    """
    if isinstance(found, Total):
        return found
    numbers = count(index)
    parts = found if isinstance(found, tuple) else (found,)
    values = tuple(
        Value(part.dims, next(numbers)) if isinstance(part, Local) else part.value
        for part in parts
        if not isinstance(part, NotLocal)
    )
    if not isinstance(found, tuple):
        return values[0]
    kind: Any = type(found)
    return kind(*values) if hasattr(found, "_fields") else values


def complaint(node: fx.Node, problem: NotLocal) -> str:
    """A sentence for the user: where, why, and the way out."""
    return f"{label(node)} {problem.reason}." + (f" Way out: {problem.way_out}." if problem.way_out else "")
