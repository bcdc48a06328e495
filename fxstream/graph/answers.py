"""Asking the rule of a node's operation what the node reads and how it runs on a block."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ImageTooSmallError, RuleError
from ..geometry.axes import Symbol, Value, multiplied
from ..ops import Answer, Fact, Local, NotLocal, Pending, Rule, Total, Typed, Unknown, inplace, named
from ..ops.derived import derived
from .borrowed import Record, borrowed, tensors_of
from .nodes import label, leaves, operation, overwrites, rule_of
from .regions import answer_in_region


def answer(
    node: fx.Node,
    inputs: Callable[[fx.Node], Any],
    module: nn.Module | None,
    freeze_batchnorm: bool = False,
    tensors: Mapping[str, torch.Tensor] | None = None,
    record: Record | None = None,
) -> Answer:
    """What the rule of a node's operation says, given the value of each node that it reads.

    It is given the `tensors` of the module, by path in the module; by default the module's own. What it reads of the
    module's attributes is noted in `record`. With `freeze_batchnorm`, batch norms use their running statistics in every
    mode. Raises ImageTooSmallError where a window does not fit the image, and RuleError if a rule of a user's own
    computes with a tensor.
    """
    reader = f"{label(node)} ({operation(node, module)})"
    args: tuple[Any, ...]
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda source: named(inputs(source), reader))
    if node.target is operator.getitem and isinstance(args[0], (tuple, list)) and isinstance(args[1], (int, slice)):
        return Fact(args[0][args[1]])
    rule = rule_of(node, module)
    found = leaves((args, kwargs))
    if not any(isinstance(leaf, Value) for leaf in found) and (rule is None or not rule.takes_sizes):
        if (sizes := _sizes_asked(node, args)) is not None:
            return Fact(sizes)
        made = any(isinstance(leaf, (torch.Tensor, Typed, Pending)) for leaf in found)
        if made and module is None and rule is not None and _is_repeatable(rule) and not overwrites(node, None):
            return _unless_numbers(derived, _called(node), args, kwargs)
        return _of_sizes(node, args, kwargs, found)
    if rule is None:
        return NotLocal(f"has no streaming rule ({operation(node, module)})", "register one, see fxstream.register")
    if module is not None:
        given = tensors_of(module.named_modules(remove_duplicate=False)) if tensors is None else tensors
        own = borrowed(module, str(node.target), reader, given, record)
        if freeze_batchnorm and isinstance(module, _BatchNorm):
            own.freeze()
        args = (own, *args)
    elif freeze_batchnorm and node.target is F.batch_norm:
        kwargs = _frozen(rule, args, kwargs)
        args = ()
    try:
        found_by_rule = _unless_numbers(rule, *args, **kwargs) if _is_ours(rule) else rule(*args, **kwargs)
        return answer_in_region(node, found_by_rule)
    except ValueError as error:
        raise ImageTooSmallError(f"the image is too small for {label(node)}: {error}") from None


def _unless_numbers(rule: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
    """The answer of one of our own rules; `NotLocal` if it depends on the numbers in a tensor."""
    try:
        return rule(*args, **kwargs)
    except RuleError:
        return NotLocal("depends on the numbers in a tensor", "give it numbers of Python")


def _sizes_asked(node: fx.Node, args: tuple[Any, ...]) -> Any:
    """The shape, or one of the sizes, of a tensor that is made of sizes, if that is what a node reads; else None."""
    if not args or not isinstance(args[0], Pending) or args[0].shape is None:
        return None
    if (node.target is getattr and args[1] == "shape") or (node.target == "size" and len(node.args) == 1):
        return args[0].shape
    return args[0].shape[args[1]] if node.target == "size" and len(args) == 2 else None


def _is_repeatable(rule: Rule) -> bool:
    """Whether an operation does the same every time: one of ours that draws no random numbers."""
    return _is_ours(rule) and _module_of(rule).rpartition(".")[2] != "dropout"


def _is_ours(rule: Rule) -> bool:
    """Whether a rule is one of fxstream's own."""
    return _module_of(rule).rpartition(".")[0] == Rule.__module__.rpartition(".")[0]


def _module_of(rule: Rule) -> str:
    """The Python module in which a rule is written."""
    function = getattr(rule.function, "func", rule.function)  # of a partial
    return str(function.__module__)


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
