"""Element-wise operations, as modules, functions and tensor methods: activations, arithmetic, comparisons, casts."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..geometry.axes import Dim, Symbol, Value, broadcast
from . import inplace
from .derived import derived, typed
from .given import Typed
from .registry import Answer, Fact, Local, NotLocal, Pending, Sliced, Unknown, is_tensor, register


def pointwise(
    function: Callable[..., torch.Tensor], *args: Any, mutates: bool = False, **kwargs: Any
) -> Local | NotLocal:
    """The answer for an element-wise function with broadcasting, called with these arguments.

    `function` itself must not write into its arguments; `mutates` says that the operation overwrites its first one.
    """
    named: dict[int | str, Any] = dict(enumerate(args)) | kwargs
    values = [arg for arg in named.values() if isinstance(arg, Value)]
    if kwargs.pop("out", None) is not None:
        return NotLocal("writes into a tensor given as `out`", "use its result instead")
    if (dims := broadcast(values)) is None:
        return NotLocal("combines values whose streamed axes are not aligned")
    for arg in named.values():
        if is_tensor(arg):
            dims = _widened(dims, arg)
    if mutates and not isinstance(args[0], Value):
        return NotLocal(
            "writes values of the image into a tensor that does not depend on it", "use the out-of-place form"
        )
    if mutates and _grows(args[0], dims):
        return NotLocal("writes more values into a tensor than it holds")
    operands: dict[int | str, Value | Sliced] = {}
    for name, arg in named.items():
        if isinstance(arg, Value):
            operands[name] = arg
        elif isinstance(arg, (torch.Tensor, Typed)):
            if problem := _size_problem(arg, dims):
                return problem
            # Along dimensions that are not streamed, the tensor broadcasts against a block as against the whole value.
            operands[name] = Sliced(arg, _broadcast_extents(arg, dims))

    def run(*blocks: torch.Tensor) -> torch.Tensor:
        filled = named | dict(zip(operands, blocks, strict=True))
        return function(*(filled[i] for i in range(len(args))), **{name: filled[name] for name in kwargs})

    # Most operations take operands and nothing else.
    plain = list(operands) == list(range(len(args))) and not kwargs
    chosen = function if plain else run
    into = _INTO.get(function) if plain else None
    if mutates:
        return Local(tuple(operands.values()), dims, partial(_keeping_dtype, chosen), mutates=args[0], into=into)
    return Local(tuple(operands.values()), dims, chosen, into=into)


def _relu_into(block: torch.Tensor, *, out: torch.Tensor) -> None:
    torch.clamp_min(block, 0, out=out)


_INTO: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.Tensor.relu), _relu_into),
    **dict.fromkeys((torch.sigmoid, torch.Tensor.sigmoid), torch.sigmoid),
    **dict.fromkeys((torch.tanh, torch.Tensor.tanh), torch.tanh),
    **dict.fromkeys((operator.add, torch.add, torch.Tensor.add), torch.add),
    **dict.fromkeys((operator.sub, torch.sub, torch.Tensor.sub), torch.sub),
    **dict.fromkeys((operator.mul, torch.mul, torch.Tensor.mul), torch.mul),
}
"""The functions that can write into a given tensor, and the form of each that does."""


def _keeping_dtype(function: Callable[..., torch.Tensor], *blocks: torch.Tensor) -> torch.Tensor:
    """What an operation in place leaves: it keeps the dtype of the operand that it overwrites, which is the first."""
    result = function(*blocks)
    return result if result.dtype is blocks[0].dtype else result.to(blocks[0].dtype)


def _widened(dims: tuple[Dim, ...], constant: torch.Tensor | Typed | Unknown) -> tuple[Dim, ...]:
    """The dimensions of the result of broadcasting `dims` against a constant, which may have more channels."""
    if isinstance(constant, Unknown):
        return tuple(dim if dim.tag is not None else Dim(None, Symbol()) for dim in dims)
    sizes = (1,) * (len(dims) - constant.dim()) + tuple(constant.shape)
    wider = (
        dim if dim.tag is not None or size == 1 else Dim(None, size) for dim, size in zip(dims, sizes, strict=False)
    )
    return tuple(wider)


def _grows(target: Value, dims: tuple[Dim, ...]) -> bool:
    """Whether a result with dimensions `dims` does not fit into the value that it should overwrite."""
    sizes = zip(target.dims, dims, strict=False)
    return len(dims) > target.rank or any(
        None not in (old.known, new.known) and old.size != new.size for old, new in sizes
    )


def _broadcast_extents(tensor: torch.Tensor | Typed, dims: tuple[Dim, ...]) -> dict[int, str]:
    """The dimensions of a tensor that meet a streamed axis when it is broadcast against `dims`, unless of size 1."""
    aligned = dims[len(dims) - tensor.dim() :]
    return {index: dim.tag for index, dim in enumerate(aligned) if dim.tag is not None and tensor.size(index) != 1}


def _size_problem(tensor: torch.Tensor | Typed, dims: tuple[Dim, ...]) -> NotLocal | None:
    if tensor.dim() > len(dims):
        return NotLocal(f"combines a value of {len(dims)} dimensions with a tensor of {tensor.dim()}")
    aligned = dims[len(dims) - tensor.dim() :]
    for index, tag in _broadcast_extents(tensor, dims).items():
        if aligned[index].known not in (None, tensor.size(index)):
            return NotLocal(
                f"combines {aligned[index].size} positions along {tag} with {tensor.size(index)} of a tensor"
            )
    return None


def where(condition: Any, input: Any = None, other: Any = None) -> Local | NotLocal:
    if input is None or other is None:
        return NotLocal("returns the positions of elements, which depend on the image")
    return pointwise(torch.where, condition, input, other)


register(torch.where)(where)
register("where")(lambda input, condition, other: where(condition, input, other))


def cast(function: Callable[..., torch.Tensor], input: Value, *args: Any, **kwargs: Any) -> Local | NotLocal:
    """The answer for an element-wise function that returns its argument itself if there is nothing to change."""
    local = pointwise(function, input, *args, **kwargs)
    return replace(local, aliases=input) if isinstance(local, Local) else local


def cast_like(function: Callable[..., torch.Tensor], input: Any, *args: Any, **kwargs: Any) -> Answer:
    """The answer for `to` and `type_as`, which take a dtype and a device, or a tensor that has them."""
    given = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Value) or is_tensor(arg)), None)
    if not isinstance(input, Value):
        return _cast_constant(function, input, args, kwargs)
    if given is None:
        return cast(function, input, *args, **kwargs)
    if isinstance(given, Unknown) and not isinstance(given, Pending):
        return NotLocal("takes the type of a tensor that is not known before the call", "name the type")
    if isinstance(given, Pending):  # at a call it is a dtype, a device or a tensor
        return cast(function, input)
    if isinstance(given, torch.Tensor):
        return cast(torch.Tensor.to, input, given.device, given.dtype)
    source = given if isinstance(given, Value) else given.of
    if source is None or [dim.size for dim in source.dims] != [dim.size for dim in input.dims]:
        return NotLocal("takes the type of a value of another size", "name the type")

    if isinstance(given, Value):
        return cast(lambda block, like: block.to(like), input, given)
    return Local((input, given), input.dims, lambda block, kind: block.to(kind), aliases=input)


def _cast_constant(
    function: Callable[..., torch.Tensor], input: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Answer:
    """The answer for a tensor that does not depend on the image and gets the type of a value."""
    if isinstance(input, Unknown):
        return Fact(Pending("a tensor with the type of a value"))

    def like(arg: Any) -> Any:
        return typed(arg, lambda block: block) if isinstance(arg, Value) else arg

    return derived(function, (input, *map(like, args)), {name: like(arg) for name, arg in kwargs.items()})


def undifferentiable(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Local | NotLocal:
    """The answer for an element-wise function whose result never requires a gradient."""
    local = pointwise(function, *args, **kwargs)
    return replace(local, differentiable=False) if isinstance(local, Local) else local


def undifferentiable_cast(function: Callable[..., torch.Tensor], input: Value, **kwargs: Any) -> Local | NotLocal:
    """The answer for a `cast` whose result never requires a gradient."""
    local = cast(function, input, **kwargs)
    return replace(local, differentiable=False) if isinstance(local, Local) else local


for _name in "to type_as".split():
    register(_name)(partial(cast_like, getattr(torch.Tensor, _name)))
for _name in "bfloat16 contiguous cpu cuda double float half positive".split():
    register(_name)(partial(cast, getattr(torch.Tensor, _name)))
register(torch.positive)(partial(cast, torch.positive))
register(operator.pos)(partial(cast, operator.pos))

_UNDIFFERENTIABLE = """
    bitwise_and bitwise_not bitwise_or bitwise_xor eq ge greater greater_equal gt isclose isfinite isinf isnan le less
    less_equal logical_and logical_not logical_or logical_xor lt ne not_equal signbit
""".split()
for _name in _UNDIFFERENTIABLE:
    register(_name)(partial(undifferentiable, getattr(torch.Tensor, _name)))
    if callable(_function := getattr(torch, _name, None)):
        register(_function)(partial(undifferentiable, _function))
register("type")(lambda input, dtype, **kwargs: cast(torch.Tensor.type, input, dtype, **kwargs))
for _name in "bool detach int long".split():
    register(_name)(partial(undifferentiable_cast, getattr(torch.Tensor, _name)))
register(torch.detach)(partial(undifferentiable_cast, torch.detach))
for _function in (torch.full_like, torch.ones_like, torch.zeros_like):
    register(_function)(partial(undifferentiable, _function))
for _name in "invert eq ne lt le gt ge and_ or_ xor".split():
    register(getattr(operator, _name))(partial(undifferentiable, getattr(operator, _name)))
# torch.fx records operators as these methods if the tensor on the left does not depend on the image.
for _name in "and or xor".split():
    register(f"__{_name}__")(partial(undifferentiable, getattr(operator, f"__{_name}__")))
register("__floordiv__")(partial(pointwise, operator.floordiv))


_NAMES = """
    abs absolute acos acosh add addcdiv addcmul arctan arctan2 asin asinh atan atan2 ceil celu clamp clamp_max
    clamp_min clip clone copysign cos cosh deg2rad digamma div divide elu erf erfc erfinv exp exp2 expm1 fix
    float_power floor floor_divide fmax fmin fmod frac gelu hardshrink hardsigmoid hardswish hardtanh hypot ldexp
    leaky_relu lerp lgamma log log10 log1p log2 logaddexp logaddexp2 logit logsigmoid masked_fill maximum minimum
    mish mul multiply nan_to_num neg negative nextafter pow rad2deg reciprocal relu relu6 remainder round rsqrt rsub
    selu sgn sigmoid sign silu sin sinc sinh softplus softshrink softsign sqrt square sub subtract tan tanh
    tanhshrink threshold true_divide trunc xlogy
""".split()


def _register(function: Callable[..., torch.Tensor], target: Any, mutates: bool = False) -> None:
    position = _position_of_inplace(function)

    @register(target)
    def rule(*args: Any, inplace: bool = False, **kwargs: Any) -> Local | NotLocal:
        if position is not None and len(args) > position:
            args, inplace = args[:position], args[position]
        return pointwise(function, *args, mutates=mutates or inplace, **kwargs)


def _position_of_inplace(function: Callable[..., torch.Tensor]) -> int | None:
    """Which argument of a function is `inplace`, counted from 0; None if it has no such argument."""
    try:
        return list(inspect.signature(function).parameters).index("inplace")
    except ValueError:  # it has no such argument, or it is built in and has no signature
        return None


for _name in _NAMES:
    for _space in (torch, F, torch.Tensor):
        if _function := getattr(_space, _name, None):
            _register(_function, _name if _space is torch.Tensor else _function)
            if _mutating := getattr(_space, f"{_name}_", None):
                _register(_function, f"{_name}_" if _space is torch.Tensor else _mutating, mutates=True)

for _name in "add sub mul truediv floordiv mod pow".split():
    _register(getattr(operator, _name), getattr(operator, _name))
    _register(getattr(operator, _name), getattr(operator, f"i{_name}"), mutates=True)
    _register(getattr(operator, _name), inplace.FUNCTIONS[f"i{_name}"], mutates=True)
for _name in "neg abs".split():
    _register(getattr(operator, _name), getattr(operator, _name))


# Activation modules, the function that each calls, and the attributes that it passes to the function.
_ACTIVATIONS: list[tuple[type[nn.Module], Callable[..., torch.Tensor], tuple[str, ...]]] = [
    (nn.CELU, F.celu, ("alpha",)),
    (nn.ELU, F.elu, ("alpha",)),
    (nn.GELU, F.gelu, ("approximate",)),
    (nn.Hardshrink, F.hardshrink, ("lambd",)),
    (nn.Hardsigmoid, F.hardsigmoid, ()),
    (nn.Hardswish, F.hardswish, ()),
    (nn.Hardtanh, F.hardtanh, ("min_val", "max_val")),
    (nn.LeakyReLU, F.leaky_relu, ("negative_slope",)),
    (nn.LogSigmoid, F.logsigmoid, ()),
    (nn.Mish, F.mish, ()),
    (nn.ReLU, F.relu, ()),
    (nn.ReLU6, F.relu6, ()),
    (nn.SELU, F.selu, ()),
    (nn.Sigmoid, torch.sigmoid, ()),
    (nn.SiLU, F.silu, ()),
    (nn.Softplus, F.softplus, ("beta", "threshold")),
    (nn.Softshrink, F.softshrink, ("lambd",)),
    (nn.Softsign, F.softsign, ()),
    (nn.Tanh, torch.tanh, ()),
    (nn.Tanhshrink, F.tanhshrink, ()),
    (nn.Threshold, F.threshold, ("threshold", "value")),
]


def _register_activation(
    module_type: type[nn.Module], function: Callable[..., torch.Tensor], attributes: tuple[str, ...]
) -> None:
    @register(module_type)
    def rule(m: Any, input: Value) -> Local | NotLocal:
        options = {name: getattr(m, name) for name in attributes}
        mutates = getattr(m, "inplace", False)
        if function is F.gelu:  # takes its option by keyword only
            return pointwise(function, input, mutates=mutates, **options)
        # Some of the others take theirs by position only.
        return pointwise(function, input, *options.values(), mutates=mutates)


for _activation in _ACTIVATIONS:
    _register_activation(*_activation)


@register(nn.PReLU)
def prelu_module(m: Any, input: Value) -> Local | NotLocal:
    return prelu(input, m.weight)


@register(F.prelu, torch.prelu, "prelu")
def prelu(input: Value, weight: Any) -> Local | NotLocal:
    # There is one slope for all channels, or one per channel: then dimension 1 must not be streamed.
    if isinstance(weight, Value):
        return NotLocal("has slopes that depend on the image")
    if (isinstance(weight, Unknown) or weight.numel() > 1) and (tags := input.tags([1])):
        return NotLocal(f"has its channels along the streamed axis {tags[0]}")
    return Local((input, weight), input.dims, F.prelu)
