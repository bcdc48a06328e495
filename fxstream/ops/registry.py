"""The registry: one rule for every operation that can stream, and the words in which a rule speaks.

A rule is called as the operation is, with a `Value` for each tensor that depends on the image and everything else
as it is (a module's rule gets the module first). It answers `Local`: the operands, the windows and how to run on
a block (a tuple of these for an operation with several results); `Total`: a reduction over whole streamed axes; `Fact`:
something that is known without running, such as a size; or `NotLocal`: why not, and the way out. Rules run once at
conversion, with sizes unknown, and once at every call, so that nothing of a module is captured.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn

from ..geometry.axes import Dim, Undetermined, UndeterminedError, Value
from ..geometry.window import IDENTITY, Window
from .totals import Reduction

Target = type | Callable[..., Any] | str
RuleFunction = TypeVar("RuleFunction", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Sliced:
    """A tensor that does not depend on the image but has its extent: each block gets its own rows of it.

    `dims` maps the tensor's dimensions to streamed axes.
    """

    tensor: torch.Tensor
    dims: Mapping[int, str]


@dataclass(frozen=True, eq=False)
class Noise:
    """Random numbers with some of a value's dimensions: drawn once a call, and the same ones where it is recomputed.

    `dims` are aligned with the result's; along one of size 1 that is not streamed, all positions share a number.
    """

    dims: tuple[Dim, ...]
    draw: Callable[..., torch.Tensor] = torch.rand
    """`torch.rand` or `torch.randn`."""


@dataclass(frozen=True)
class Unknown(Undetermined):
    """At conversion, a value that does not depend on the image and whose shape cannot be known before a call."""

    name: str


@dataclass(frozen=True)
class Local:
    """An operation that is local along every streamed axis."""

    operands: tuple[Value | Sliced | Noise, ...]
    """What `run` gets, as blocks, in this order; a value first."""
    dims: tuple[Dim, ...]
    """Dimensions of the result."""
    run: Callable[..., torch.Tensor]
    """`run(*blocks, *spans)`: the operation on blocks, with a Span for every window, in the order of `windows`."""
    windows: Mapping[int, Window] = field(default_factory=dict)
    """Dimension of the operands -> window; any other streamed dimension has the identity."""
    mutates: Value | None = None
    """The operand that the operation overwrites. `run` itself never writes into a block."""
    aliases: Value | None = None
    """The operand of which the result is a view or which it is itself."""
    differentiable: bool = True
    """Whether the result of operands that require a gradient requires one."""

    @property
    def values(self) -> tuple[Value, ...]:
        """The operands that depend on the image."""
        return tuple(operand for operand in self.operands if isinstance(operand, Value))

    def window(self, value: Value, axis: str) -> Window:
        """The window through which the operation reads one of its operands along a streamed axis."""
        return self.windows.get(value.position(axis), IDENTITY)


@dataclass(frozen=True, eq=False)
class Total:
    """A reduction over whole streamed axes: what reads it does not stream, but it is accumulated tile by tile."""

    operand: Value
    reduction: Reduction
    keepdim: bool
    """Whether the reduced dimensions stay, with size 1."""
    problem: NotLocal
    """Why nothing streams from here on."""


@dataclass(frozen=True)
class Fact:
    """Something about values that is known without running anything."""

    value: Any


@dataclass(frozen=True)
class NotLocal:
    """Why an operation cannot be streamed, and what the user can do about it."""

    reason: str
    way_out: str = ""
    error: type[Exception] | None = None
    """The error to raise if this is found out only at a call."""


Answer = Local | tuple[Local | Fact, ...] | Total | Fact | NotLocal

_SYNONYMS = {
    "axis": "dim",
    "keepdims": "keepdim",
    "split_size": "split_size_or_sections",
    "axis0": "dim0",
    "axis1": "dim1",
}
"""What torch, too, calls some arguments."""


@dataclass(frozen=True)
class Rule:
    function: Callable[..., Answer]
    spatial: int | None
    """Number of spatial axes that the operation is made for."""
    takes_sizes: bool
    """Whether it can make a value out of nothing of the image but a size."""
    signature: inspect.Signature

    def __call__(self, *args: Any, **kwargs: Any) -> Answer:
        own = self.signature.parameters
        kwargs = {name if name in own else _SYNONYMS.get(name, name): value for name, value in kwargs.items()}
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            return NotLocal(f"is called with arguments that its streaming rule does not cover ({error})")
        try:
            return self.function(*args, **kwargs)
        except UndeterminedError:
            return NotLocal("has an argument that is not known before the call", "make it a constant")


_RULES: dict[Target, Rule] = {}


def register(
    *targets: Target, spatial: int | None = None, takes_sizes: bool = False
) -> Callable[[RuleFunction], RuleFunction]:
    """Declare the rule of one or several operations.

    Args:
        targets: module classes (and what extends them without methods of its own), functions as torch.fx records
            them, names of tensor methods; or, of a library that need not be installed, a class or function by its
            qualified name ("torchvision.ops.stochastic_depth.StochasticDepth").
        spatial: the number of spatial axes, for operations that fix it (2 for Conv2d).
        takes_sizes: also ask the rule where only sizes depend on the image (a token expanded to the batch).
    """

    def declare(function: RuleFunction) -> RuleFunction:
        rule = Rule(function, spatial, takes_sizes, inspect.signature(function))
        for target in targets:
            _RULES[target] = rule
        return function

    return declare


def rule_for(target: Target) -> Rule | None:
    """The rule of a module class, a function or a tensor method.

    A class has the rule of the one that it extends, if it changes nothing that may run when it is called.
    """
    for heir in target.__mro__ if isinstance(target, type) else [target]:
        rule = _declared(heir)
        if rule is not None or not isinstance(heir, type) or _behaves(heir):
            return rule
    return None


def _declared(target: Target) -> Rule | None:
    try:
        rule = _RULES.get(target)
    except TypeError:  # not hashable
        return None
    if rule is None and not isinstance(target, str):
        rule = _RULES.get(f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}")
    return rule


def rule_for_module(module: nn.Module) -> Rule | None:
    """The rule of a module: that of its class, unless it has methods of its own."""
    return None if has_own_methods(module, type(module)) else rule_for(type(module))


def has_own_methods(module: nn.Module, kind: type) -> bool:
    """Whether methods of a class have been replaced on one of its instances."""
    return any(callable(value) and callable(getattr(kind, name, None)) for name, value in vars(module).items())


_PASSIVE = set(
    """
    __init__ __init_subclass__ __repr__ __annotate__ __annotate_func__ __getstate__ __setstate__ __deepcopy__
    extra_repr reset_parameters train eval to cpu cuda requires_grad_ zero_grad _apply apply
    state_dict load_state_dict _load_from_state_dict _save_to_state_dict
""".split()
)


def _behaves(heir: type) -> bool:
    """Whether a class changes what may run when it is called.

    That is so if it has descriptors of its own, or methods that are not new, but for those that do not run then.
    """
    inherited = heir.__mro__[1:]
    for name, value in vars(heir).items():
        described = callable(value) or hasattr(type(value), "__get__")
        new = isinstance(value, FunctionType) and not any(name in vars(base) for base in inherited)
        if described and not new and name not in _PASSIVE:
            return True
    return False


def functions() -> tuple[Callable[..., Any], ...]:
    """The registered functions that are written in Python: tracing must not go into them."""
    found = (_named(target) if isinstance(target, str) else target for target in _RULES)
    return tuple(function for function in found if isinstance(function, FunctionType))


def _named(target: str) -> Any:
    """What a qualified name stands for, if its module has been imported."""
    module, _, name = target.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
