"""The registry of streaming rules, one for every operation that can stream, and the answers that a rule can give.

A rule is called with the arguments of the operation. Each tensor that depends on the image is replaced by a `Value`,
and each other tensor by a `Given`, which has its shape and dtype, but no numbers. Everything else is passed as it is.
The rule of a module gets the module first, whose parameters and buffers are `Given`, too. What a rule wants to compute
with a tensor belongs into the `run` of its `Local`, which gets the tensors that are listed among the operands. A rule
returns one of these answers:

- `Local`: the operation is local, with these operands and windows, and runs on a block in this way;
- `Total`: the operation is a reduction over whole streamed axes, which can be accumulated tile by tile;
- `Fact`: the result is known without running anything, such as a size;
- `NotLocal`: the operation cannot be streamed, for this reason;
- a tuple of `Local` and `Fact`: the operation has several results.

Rules run at conversion, when the sizes of the image are not known, and again at a call. What they answer is kept for
the calls that are alike: in the sizes and types of all tensors, in the other inputs, and in the attributes and modes of
the modules. So changes of a module's attributes take effect, and a rule must not depend on anything else.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn

from ..geometry.axes import Dim, Undetermined, UndeterminedError, Value
from ..geometry.window import IDENTITY, Window
from .given import Typed
from .totals import Reduction

Target = type | Callable[..., Any] | str
"""What a rule is registered for: a module class, a function, or the name of a tensor method or of one of these."""
RuleFunction = TypeVar("RuleFunction", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Sliced:
    """An operand that does not depend on the image but has its extent along streamed axes, such as a mask.

    Each block gets the rows of the tensor that belong to the rows of the result.
    """

    tensor: torch.Tensor | Typed
    """A tensor of any dtype, such as (1, 1, H, W): one that the rule was given."""
    dims: Mapping[int, str]
    """Dimension of the tensor, counted from 0 -> streamed axis, such as {2: "H", 3: "W"}.

    Along these, the tensor has the size of the result. Other dimensions are passed whole.
    """


@dataclass(frozen=True, eq=False)
class Noise:
    """An operand of random numbers, which are the same when a tile is computed again in the backward pass.

    They have the device of the block, and float32, or float64 if the block has float64.
    """

    dims: tuple[Dim, ...]
    """The dimensions of the random tensor, one for each dimension of the result.

    Each is the result's own, or `Dim(None, 1)`: then all positions along it share a number.
    """
    draw: Callable[..., torch.Tensor] = torch.rand
    """The distribution: `torch.rand` or `torch.randn`."""


@dataclass(frozen=True)
class Unknown(Undetermined):
    """At conversion, the stand-in for a tensor that does not depend on the image but is computed only at a call.

    Neither its shape nor its dtype is known. A rule that computes with it is answered by `NotLocal`.
    """

    name: str
    """What the tensor is, for whoever prints it."""


@dataclass(frozen=True)
class Pending(Unknown):
    """At conversion, the stand-in for a tensor that is made of sizes or types of the image."""

    shape: tuple[Any, ...] | None = None
    """Its shape, if that is what it was made of; some of the sizes may be known only at a call."""


def is_tensor(given: Any) -> bool:
    """Whether what a rule is given stands for a tensor that does not depend on the pixels of the image."""
    return isinstance(given, (torch.Tensor, Typed, Unknown))


@dataclass(frozen=True)
class Local:
    """The answer for an operation that is local: each position of the result reads a bounded window of its operands.

    Example:
        The sum of two neighbouring columns, of an image (N, C, H, W) that is streamed along H and W. Columns 10 to 19
        of the result read columns 10 to 20 of the image.

        >>> import torch
        >>> from fxstream.ops import Dim, Local, Sliding, Value, fit
        >>> x = Value((Dim(None, 1), Dim(None, 3), Dim("H", 200), Dim("W", 150)))
        >>> windows = {3: Sliding(kernel=2)}
        >>> def run(block, span):
        ...     rows = fit(block, [span])
        ...     return rows[..., 1:] + rows[..., :-1]
        >>> local = Local((x,), x.slid(windows), run, windows)
        >>> [dim.size for dim in local.dims]
        [1, 3, 200, 149]
        >>> span = windows[3].span(10, 20, 150)
        >>> span.lo, span.hi
        (10, 21)
        >>> local.run(torch.randn(1, 3, 8, 11), span).shape
        torch.Size([1, 3, 8, 10])
    """

    operands: tuple[Value | torch.Tensor | Typed | Sliced | Noise | None, ...]
    """What `run` gets, at least one `Value` among it.

    For a `Value`, `run` gets a block; for a `Sliced`, the rows of a tensor that belong to the block; for a `Noise`,
    random numbers. Any other tensor that the rule was given is passed whole, such as the weight of a convolution, and
    None as None.
    """
    dims: tuple[Dim, ...]
    """The dimensions of the result in whole, such as (N, C, H, W). Every streamed axis must be among them."""
    run: Callable[..., torch.Tensor]
    """`run(*operands, *spans)` computes a block of the result.

    The blocks are tensors with the dimensions, dtypes and device of the operands. Along a dimension with a window, a
    block holds the rows that the window reaches and the image has. There is one `Span` for every window, in the order
    of `windows`. `run` must not write into what it gets, and must not compute with a tensor that the rule was given and
    that is no operand: that is a `RuleError`.
    """
    windows: Mapping[int, Window] = field(default_factory=dict)
    """Dimension of the operands, counted from 0 -> the window that slides along it.

    Along any other dimension, each position of the result reads the same position of the operands.
    """
    windows_of: Mapping[Value, Mapping[int, Window]] = field(default_factory=dict)
    """Operands of which each is read through windows of its own, in place of `windows`, along its own dimensions.

    The spans that `run` gets are those of the first operand.
    """
    mutates: Value | None = None
    """The operand that the operation overwrites in the plain model, or None. `run` does not overwrite it."""
    aliases: Value | None = None
    """The operand that the result of the plain operation shares memory with, or None."""
    differentiable: bool = True
    """Whether the result requires a gradient if an operand does."""
    into: Callable[..., Any] | None = None
    """`into(*blocks, *spans, out=out)` writes what `run` returns into `out`, a tensor of its shape and dtype with any
    strides; None if the operation cannot. Where no gradient is needed, the result then need not be copied to its place
    behind the rows that earlier tiles have kept."""

    @property
    def values(self) -> tuple[Value, ...]:
        """The operands that depend on the image, in order."""
        return tuple(operand for operand in self.operands if isinstance(operand, Value))

    def window(self, value: Value, axis: str) -> Window:
        """The window through which the operation reads one of its operands along a streamed axis."""
        return self.windows_of.get(value, self.windows).get(value.position(axis), IDENTITY)


@dataclass(frozen=True, eq=False)
class Total:
    """The answer for a reduction over whole streamed axes.

    It ends the streamed part, but is accumulated tile by tile, so that its operand is never assembled.
    """

    operand: Value
    """The value that is reduced."""
    reduction: Reduction
    """How the result is accumulated and its gradient is computed: `Sum`, `First`, `Extreme`, or one of your own."""
    keepdim: bool
    """Whether the reduced dimensions stay, with size 1."""
    problem: NotLocal
    """The reason why operations that read the result do not stream, for the user."""


@dataclass(frozen=True)
class Fact:
    """The answer for an operation whose result is known without running anything, such as a size."""

    value: Any
    """The result. It may hold a `Symbol` at conversion, and values if they are passed on as they are."""


@dataclass(frozen=True)
class NotLocal:
    """The answer for an operation that cannot be streamed, with the reason. It ends the streamed part."""

    reason: str
    """A verb phrase, to which the report adds the operation: "takes the mean along the streamed H"."""
    way_out: str = ""
    """What the user can do about it, as an imperative phrase: "call .eval() on it"."""
    error: type[Exception] | None = None
    """The error to raise if the operation was local at conversion; by default `NotLocalError`."""


def unstreamed(tags: Sequence[str]) -> str:
    """The way out for an operation that is local along every axis but some streamed ones."""
    return f"stream an axis other than {' and '.join(tags)}, such as the batch (None in tile_shape: not streamed)"


Answer = Local | tuple[Local | Fact, ...] | Total | Fact | NotLocal

_SYNONYMS = {
    "axis": "dim",
    "keepdims": "keepdim",
    "split_size": "split_size_or_sections",
    "axis0": "dim0",
    "axis1": "dim1",
}
"""Other names that torch accepts for an argument, and the names that rules use."""


@dataclass(frozen=True)
class Rule:
    """A registered rule: the function, and what `register` was told about its operations."""

    function: Callable[..., Answer]
    """The function that `register` decorated."""
    spatial: int | None
    """The number of spatial axes that the operation is made for; None if any number."""
    takes_sizes: bool
    """Whether the rule is also asked if none of the arguments but sizes and types depends on the image."""
    signature: inspect.Signature
    """The signature of the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Answer:
        """The answer for a call of the operation with these arguments, under any of the names that torch has for them.

        It is `NotLocal` for arguments that the function does not take, and if the function computes with something that
        is not known before the call. Raises ValueError where the function does: the image is too small.
        """
        own = self.signature.parameters
        kwargs = {name if name in own else _SYNONYMS.get(name, name): value for name, value in kwargs.items()}
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            return NotLocal(f"is called with arguments that its streaming rule does not cover ({error})")
        try:
            return _with_types(self.function(*args, **kwargs))
        except UndeterminedError:
            return NotLocal("has an argument that is not known before the call", "make it a constant")


def _with_types(found: Answer) -> Answer:
    """The answer, in which the values that give tensors their types are operands."""
    if not isinstance(found, Local):
        return found
    tensors = (operand.tensor if isinstance(operand, Sliced) else operand for operand in found.operands)
    sources = dict.fromkeys(tensor.of for tensor in tensors if isinstance(tensor, Typed) and tensor.of is not None)
    more = tuple(source for source in sources if all(source is not value for value in found.values))
    if not more:
        return found
    sizes = {dim.tag: dim.size for dim in found.dims if dim.tag is not None}
    if any({dim.tag: dim.size for dim in source.dims if dim.tag is not None} != sizes for source in more):
        return NotLocal("uses the type of a value of another size", "name the type")
    count, run = len(found.operands), found.run
    return replace(
        found,
        operands=(*found.operands, *more),
        windows_of={**found.windows_of, **{source: {} for source in more}},
        run=lambda *given: run(*given[:count], *given[count + len(more) :]),
    )


_RULES: dict[Target, Rule] = {}
_REGISTERED = [0]
"""How often a rule has been registered."""


def registrations() -> int:
    """How often a rule has been registered: answers from before the last time may be out of date."""
    return _REGISTERED[0]


def register(
    *targets: Target, spatial: int | None = None, takes_sizes: bool = False
) -> Callable[[RuleFunction], RuleFunction]:
    """A decorator that declares a function as the streaming rule of one or several operations.

    The rule is a function of the operation's arguments, with the same names. It returns a `Local`, `Total`, `Fact` or
    `NotLocal`, or a tuple for several results. It raises ValueError if the image is too small for the operation. A
    later registration replaces an earlier one for the same target, and that of fxstream itself, too.

    Args:
        targets: what the rule is for. Each is a module class, and the rule also holds for subclasses that override
            nothing that runs in a call; a function, as torch.fx records it; the name of a tensor method ("relu"); or
            the qualified name of a class or function of a library that need not be installed
            ("torchvision.ops.stochastic_depth.StochasticDepth").
        spatial: the number of spatial axes if the operation fixes it (2 for Conv2d), else None. The number of spatial
            axes of a model's image is taken from such operations.
        takes_sizes: also ask the rule if only sizes among the arguments depend on the image, as for a class token that
            is expanded to the size of the batch.

    Returns:
        A decorator that returns the function unchanged.

    Example:
        >>> import fxstream, torch
        >>> from fxstream.ops import Local, Sliding, fit
        >>> from fxstream.testing import check_op
        >>> def difference(x):  # of each pixel and its left neighbour
        ...     return x[..., 1:] - x[..., :-1]
        >>> class Difference(torch.nn.Module):
        ...     def forward(self, x):
        ...         return difference(torch.nn.functional.pad(x, (1, 0)))
        >>> @fxstream.register(Difference, spatial=2)
        ... def difference_rule(m, x):
        ...     windows = {3: Sliding(kernel=2, before=1)}
        ...     return Local((x,), x.slid(windows), lambda block, span: difference(fit(block, [span])), windows)
        >>> check_op(Difference(), (2, 3, 11, 12))
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), Difference())
        >>> fxstream.convert(model, tile_shape=16)(torch.randn(1, 3, 40, 50)).shape
        torch.Size([1, 8, 38, 48])
    """

    def declare(function: RuleFunction) -> RuleFunction:
        rule = Rule(function, spatial, takes_sizes, inspect.signature(function))
        for target in targets:
            _RULES[target] = rule
        _REGISTERED[0] += 1
        return function

    return declare


def rule_for(target: Target) -> Rule | None:
    """The rule of a module class, a function or a tensor method; None if it has none.

    A class inherits the rule of its base class if it overrides nothing that runs in a call.
    """
    if not isinstance(target, type):
        return _declared(target)
    for kind in target.__mro__:
        rule = _declared(kind)
        if rule is not None or _overrides_call(kind):
            return rule
    return None


def _declared(target: Target) -> Rule | None:
    """The rule that is registered for just this target or for its qualified name."""
    try:
        rule = _RULES.get(target)
    except TypeError:  # not hashable
        return None
    if rule is None and not isinstance(target, str):
        rule = _RULES.get(f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}")
    return rule


def rule_for_module(module: nn.Module) -> Rule | None:
    """The rule of a module's class; None if it has none, or if the module replaces one of its methods."""
    return None if has_own_methods(module, type(module)) else rule_for(type(module))


def has_own_methods(module: nn.Module, kind: type) -> bool:
    """Whether a module, an instance of `kind`, has an attribute that replaces a method of its class."""
    return any(callable(value) and callable(getattr(kind, name, None)) for name, value in vars(module).items())


_PASSIVE = set(
    """
    __init__ __init_subclass__ __repr__ __annotate__ __annotate_func__ __getstate__ __setstate__ __deepcopy__
    extra_repr reset_parameters train eval to cpu cuda requires_grad_ zero_grad _apply apply
    state_dict load_state_dict _load_from_state_dict _save_to_state_dict
""".split()
)
"""Methods that do not run during a call: a subclass may override them and still inherit a rule."""


def _overrides_call(kind: type) -> bool:
    """Whether a class overrides anything that runs during a call.

    That is a descriptor, or an inherited method that is not listed in `_PASSIVE`. A method under a new name does not
    run, since the forward of the base class does not know it.
    """
    inherited = kind.__mro__[1:]
    for name, value in vars(kind).items():
        described = callable(value) or hasattr(type(value), "__get__")
        new = isinstance(value, FunctionType) and not any(name in vars(base) for base in inherited)
        if described and not new and name not in _PASSIVE:
            return True
    return False


def functions() -> tuple[Callable[..., Any], ...]:
    """The registered functions that are written in Python. torch.fx must record their calls instead of tracing them."""
    found = (_named(target) if isinstance(target, str) else target for target in _RULES)
    return tuple(function for function in found if isinstance(function, FunctionType))


def _named(target: str) -> Any:
    """The class or function with a qualified name; None if its module has not been imported."""
    module, _, name = target.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
