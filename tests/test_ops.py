"""Every built-in rule against the dense operation, by `fxstream.testing.check_op`, over a grid of its arguments.

The tables hold cases; `test_every_built_in_rule_has_a_case` compares what they reach with the registry.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from einops.layers.torch import Rearrange, Reduce
from reference import randomise
from timm.layers import DropPath, drop_path
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from timm.layers.std_conv import ScaledStdConv2dSame, StdConv2dSame
from torch import fx, nn
from torch.nn.functional import sigmoid, tanh
from torchvision.models import swin_transformer
from torchvision.ops import DeformConv2d, FrozenBatchNorm2d, StochasticDepth, deform_conv2d, stochastic_depth

import fxstream
from fxstream.geometry.axes import Value
from fxstream.geometry.window import Sliding, Span
from fxstream.graph.example import traced_with_example
from fxstream.ops import Local, pointwise, register
from fxstream.ops.border import fit
from fxstream.ops.pool import INFINITE_IS_MAXIMUM
from fxstream.ops.registry import _RULES
from fxstream.testing import _as_module, check_op

LINE = (2, 4, 13)
PLANE = (3, 4, 7, 6)
VOLUME = (2, 4, 5, 4, 6)
SHAPES = {1: LINE, 2: PLANE, 3: VOLUME}

Op = nn.Module | Callable[..., Any]
Options = dict[str, Any]


def _works(call: Callable[[], Any]) -> bool:
    """Whether this release of torch can do something; the oldest supported one cannot do everything."""
    try:
        call()
    except (RuntimeError, TypeError):
        return False
    return True


LDEXP_IN_PLACE = _works(lambda: torch.ones(1, requires_grad=True).clone().ldexp_(torch.ones(1)))
"""Whether `ldexp_` has a gradient."""
TRACES_SIZES = _works(lambda: fx.symbolic_trace(lambda x: torch.broadcast_to(x, (x.size(0), 4))))
"""Whether torch.fx can trace a function of torch that is given a tuple which begins with a size read from a value."""


@dataclass(frozen=True)
class Case:
    """A call of an operation, and the axes along which it streams."""

    label: str
    op: Op
    shape: tuple[int, ...] = PLANE
    axes: str | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    fixed: bool = False
    """Whether all images have just this shape, and not one of at most it."""
    trials: int = 3
    marks: tuple[pytest.MarkDecorator, ...] = ()

    def __str__(self) -> str:
        return f"{self.label} along {self.axes}" if self.axes else self.label


class With(nn.Module):
    """A function's call; the floating-point tensors among its arguments are parameters, whose gradients are checked.

    Their values are drawn anew when a case runs.
    """

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any):
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs
        self.tensors = nn.ParameterList(arg for arg in (*args, *kwargs.values()) if _is_parameter(arg))

    def forward(self, image: torch.Tensor) -> Any:
        tensors = iter(self.tensors)
        args = [next(tensors) if _is_parameter(arg) else arg for arg in self.args]
        kwargs = {name: next(tensors) if _is_parameter(arg) else arg for name, arg in self.kwargs.items()}
        return self.function(image, *args, **kwargs)


def _is_parameter(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor) and arg.is_floating_point()


class Behind(nn.Module):
    """An operation on an image whose dimensions have been moved."""

    def __init__(self, op: nn.Module, before: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.op, self.before = op, before

    def forward(self, image: torch.Tensor) -> Any:
        return self.op(self.before(image))


def _call(
    op: str | Op,
    *args: Any,
    shape: tuple[int, ...] = PLANE,
    axes: str | None = None,
    fixed: bool = False,
    **kwargs: Any,
) -> Case:
    """A call of a module, of a function, or of a tensor's method by its name."""
    if isinstance(op, nn.Module):
        return Case(" ".join(str(op).split()), op, shape, axes, fixed=fixed)
    given = [_short(arg) for arg in args] + [f"{name}={_short(arg)}" for name, arg in kwargs.items()]
    label = f"{_label(op)}({', '.join(given)})"
    if isinstance(op, str):
        return Case(label, With(partial(_method, op), *args, **kwargs), shape, axes, fixed=fixed)
    if any(isinstance(arg, torch.Tensor) for arg in (*args, *kwargs.values())):
        return Case(label, With(op, *args, **kwargs), shape, axes, fixed=fixed)
    return Case(label, op, shape, axes, args, kwargs, fixed)


def _method(name: str, image: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return getattr(image, name)(*args, **kwargs)


def _label(op: str | Callable[..., Any]) -> str:
    if isinstance(op, str):
        return f".{op}"
    family = (getattr(op, "__module__", None) or "torch").lstrip("_")
    return f"{'F' if family in ('torch.nn.functional', 'torch._C._nn') else family}.{op.__name__}"


def _short(arg: Any) -> str:
    return f"tensor{list(arg.shape)}" if isinstance(arg, torch.Tensor) else repr(arg)


def _named(expressions: Mapping[str, Callable[[Any], Any]], **options: Any) -> list[Case]:
    return [Case(label, op, **options) for label, op in expressions.items()]


def _grid(**choices: Iterable[Any]) -> Iterator[Options]:
    """All combinations of some arguments."""
    for values in product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


# Convolutions. Kernels and strides of one axis in all combinations; more axes where they differ.

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

CONVOLUTIONS: list[tuple[int, Options]] = [
    *((1, options) for options in _grid(kernel_size=(1, 2, 3), stride=(1, 2, 4), padding=(0, 1, 2), dilation=(1, 2))),
    (1, {"kernel_size": 4, "padding": "same", "dilation": 3}),
    (1, {"kernel_size": 3, "padding": 3, "padding_mode": "reflect", "stride": 2}),
    (2, {"kernel_size": 3, "padding": 1, "groups": 2}),
    (2, {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False}),
    (2, {"kernel_size": (3, 1), "stride": (1, 3), "padding": (0, 2)}),
    (2, {"kernel_size": (1, 5), "stride": (2, 1), "padding": (1, 0), "dilation": (3, 1)}),
    (2, {"kernel_size": (2, 4), "padding": "same"}),
    (2, {"kernel_size": (3, 2), "padding": "same", "dilation": (1, 3), "groups": 2}),
    (2, {"kernel_size": (3, 2), "padding": "valid", "stride": 2}),
    (2, {"kernel_size": 2, "stride": 3, "padding": 5}),
    *((2, {"kernel_size": 3, "padding": 1, "padding_mode": mode}) for mode in ("zeros", "reflect", "replicate")),
    *(
        (2, {"kernel_size": (3, 4), "padding": (2, 1), "stride": (2, 1), "padding_mode": mode})
        for mode in ("reflect", "replicate")
    ),
    *((2, {"kernel_size": (4, 3), "padding": "same", "padding_mode": mode}) for mode in ("reflect", "replicate")),
    (3, {"kernel_size": 3, "padding": 1}),
    (3, {"kernel_size": (1, 2, 3), "stride": (2, 1, 2), "padding": (0, 1, 1), "dilation": (1, 1, 2), "groups": 2}),
    (3, {"kernel_size": (2, 1, 2), "padding": "same"}),
    (3, {"kernel_size": 3, "padding": (1, 2, 1), "padding_mode": "replicate"}),
    (3, {"kernel_size": (3, 1, 3), "padding": (1, 0, 1), "padding_mode": "reflect"}),
]
CIRCULAR = [
    (2, {"kernel_size": 3, "padding": 1}, "N"),
    (2, {"kernel_size": 3, "padding": (2, 0), "stride": 2}, "NW"),
    (2, {"kernel_size": 3, "padding": (0, 1)}, "H"),
    (1, {"kernel_size": 4, "padding": "same"}, "N"),
    (3, {"kernel_size": 3, "padding": (0, 1, 0)}, "NDW"),
]
TRANSPOSED: list[tuple[int, Options]] = [
    *(
        (1, options)
        for options in _grid(kernel_size=(1, 2, 3), stride=(1, 2, 3), padding=(0, 1), dilation=(1, 2))
        if options["padding"] < 2 * options["kernel_size"]
    ),
    (1, {"kernel_size": 3, "stride": 3, "padding": 1, "output_padding": 2}),
    (2, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}),
    (2, {"kernel_size": (2, 3), "stride": (1, 4), "padding": (1, 0), "output_padding": (0, 3), "bias": False}),
    (2, {"kernel_size": 3, "stride": 2, "dilation": (3, 1), "output_padding": (2, 1), "groups": 2}),
    (2, {"kernel_size": 2, "stride": 2, "groups": 4}),
    (3, {"kernel_size": 2, "stride": 2}),
    (3, {"kernel_size": (1, 3, 2), "stride": (2, 1, 3), "padding": (0, 2, 1), "output_padding": (1, 0, 1)}),
]
WEIGHT = torch.zeros(3, 4, 2, 2)


class Deformed(nn.Module):
    """A deformable convolution whose offsets and mask follow from the image, or are parameters."""

    def __init__(self, of_image: bool, masked: bool):
        super().__init__()
        self.conv = DeformConv2d(4, 3, (2, 1), stride=(1, 2), padding=(1, 0), bias=masked)
        self.shifts = None if of_image else nn.Parameter(torch.ones(3, 4, 8, 3))
        self.masked = masked

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        shifts = F.pad(image[..., ::2], (0, 0, 0, 1)).tanh() * 1.3 if self.shifts is None else self.shifts
        return self.conv(image, shifts, shifts[:, :2].sigmoid() if self.masked else None)


CONV_CASES = [
    *(
        Case(f"deformable {of_image} {masked}", Deformed(of_image, masked), PLANE, "N", fixed=True)
        for of_image, masked in product((False, True), (False, True))
    ),
    Case(
        "deform_conv2d",
        deform_conv2d,
        axes="N",
        args=(nn.Parameter(torch.linspace(-2, 2, 252).view(3, 2, 7, 6)), nn.Parameter(torch.ones(2, 4, 1, 1))),
        fixed=True,
    ),
    *(_call(_CONVS[axes](4, 4, **options), shape=SHAPES[axes]) for axes, options in CONVOLUTIONS),
    *(
        _call(_CONVS[axes](4, 3, padding_mode="circular", **options), shape=SHAPES[axes], axes=where)
        for axes, options, where in CIRCULAR
    ),
    *(_call(_TRANSPOSED[axes](4, 4, **options), shape=SHAPES[axes]) for axes, options in TRANSPOSED),
    _call(F.conv1d, torch.zeros(4, 2, 3), torch.zeros(4), 2, 1, 2, 2, shape=LINE),
    _call(F.conv2d, torch.zeros(6, 2, 3, 2), None, (2, 1), "valid", (1, 2), groups=2),
    _call(F.conv2d, torch.zeros(3, 4, 2, 3), bias=torch.zeros(3), padding="same", dilation=(3, 1)),
    Case(
        "F.conv2d by keyword",
        With(lambda x, w, b: F.conv2d(input=x, weight=w, bias=b, stride=2), WEIGHT, WEIGHT[:, 0, 0, 0]),
    ),
    _call(F.conv3d, torch.zeros(3, 4, 2, 2, 2), torch.zeros(3), padding=(1, 0, 1), shape=VOLUME),
    _call(F.conv_transpose1d, torch.zeros(4, 2, 3), torch.zeros(2), 2, 1, 1, 1, 1, shape=LINE),
    _call(F.conv_transpose2d, torch.zeros(4, 2, 3, 2), torch.zeros(4), (2, 1), 1, groups=2, dilation=(1, 2)),
    _call(F.conv_transpose3d, torch.zeros(4, 2, 2, 2, 2), stride=2, output_padding=(1, 0, 1), shape=VOLUME),
]

# Pooling.

MAX_POOLS: list[tuple[int, Options]] = [
    *(
        (1, options)
        for options in _grid(
            kernel_size=(2, 3), stride=(None, 1, 4), padding=(0, 1), dilation=(1, 2), ceil_mode=(False, True)
        )
    ),
    (2, {"kernel_size": 3, "stride": 2, "padding": 1}),
    (2, {"kernel_size": (2, 3), "stride": (3, 1), "padding": (1, 0), "dilation": (2, 1), "ceil_mode": True}),
    (3, {"kernel_size": 2}),
    (3, {"kernel_size": (1, 2, 3), "stride": (2, 1, 2), "padding": (0, 1, 1), "ceil_mode": True}),
]
AVG_POOLS: list[tuple[int, Options]] = [
    *(
        (1, options)
        for options in _grid(
            kernel_size=(2, 3),
            stride=(None, 1, 4),
            padding=(0, 1),
            ceil_mode=(False, True),
            count_include_pad=(False, True),
        )
    ),
    (2, {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False, "ceil_mode": True}),
    (2, {"kernel_size": (2, 3), "stride": (3, 2), "padding": (1, 0), "divisor_override": 5, "ceil_mode": True}),
    (2, {"kernel_size": (4, 1), "stride": (1, 2), "padding": (2, 0), "ceil_mode": True}),
    (3, {"kernel_size": (1, 2, 3), "stride": (2, 1, 2), "padding": (0, 1, 1), "count_include_pad": False}),
    (3, {"kernel_size": 2, "padding": 1, "divisor_override": 3}),
]


def _has_norm(args: tuple[Any, ...]) -> bool:
    return INFINITE_IS_MAXIMUM or abs(args[0]) != float("inf")


LP_POOLS: list[tuple[int, tuple[Any, ...]]] = [
    (1, (2, 3)),
    (1, (3, 2, 3)),
    (1, (1.0, 3, 2, True)),
    (1, (4, 3, 2, True)),
    (2, (2, 2)),
    (2, (4, (2, 3), (3, 1))),
    (2, (2, 3, 2, True)),
    (2, (float("inf"), 3, 2, True)),
    (2, (-float("inf"), 2)),
    (3, (2, (1, 2, 2), 1)),
    (3, (2, 2, None, True)),
]
_MAXES = {1: (F.max_pool1d, torch.max_pool1d), 2: (F.max_pool2d, torch.max_pool2d), 3: (F.max_pool3d, torch.max_pool3d)}
_AVERAGES = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
ADAPTIVE = [(1, 1, LINE), (1, 5, LINE), (2, (1, 1), PLANE), (2, (3, 2), PLANE), (3, 2, VOLUME), (3, (1, 3, 2), VOLUME)]
ADAPTIVE_PARTLY = [((None, 1), "NH"), ((2, None), "NW"), ((None, 3), "H"), ((None, None), None)]
POOL_CASES = [
    # Of a window in the padding alone, which a small image may have, torch's own gradient goes to another channel.
    *(
        _call(getattr(nn, f"MaxPool{axes}d")(**options), shape=SHAPES[axes], fixed=options.get("dilation", 1) != 1)
        for axes, options in MAX_POOLS
    ),
    *(_call(getattr(nn, f"AvgPool{axes}d")(**options), shape=SHAPES[axes]) for axes, options in AVG_POOLS),
    *(_call(getattr(nn, f"LPPool{axes}d")(*args), shape=SHAPES[axes]) for axes, args in LP_POOLS if _has_norm(args)),
    *(_call(getattr(F, f"lp_pool{axes}d"), *args, shape=SHAPES[axes]) for axes, args in LP_POOLS if _has_norm(args)),
    *(_call(function, 3, 2, 1, shape=SHAPES[axes]) for axes in (1, 2, 3) for function in _MAXES[axes]),
    *(
        _call(function, 2, stride=1, dilation=2, ceil_mode=True, shape=SHAPES[axes])
        for axes in (1, 2, 3)
        for function in _MAXES[axes]
    ),
    *(_call(_AVERAGES[axes], 3, 2, 1, True, False, shape=SHAPES[axes]) for axes in (1, 2, 3)),
    *(_call(_AVERAGES[axes], 2, padding=1, divisor_override=3, shape=SHAPES[axes]) for axes in (2, 3)),
    *(
        case
        for (axes, size, shape), kind in product(ADAPTIVE, ("avg", "max"))
        for case in (
            _call(getattr(F, f"adaptive_{kind}_pool{axes}d"), size, shape=shape, axes="N"),
            _call(getattr(nn, f"Adaptive{kind.title()}Pool{axes}d")(size), shape=shape, axes="N"),
        )
    ),
    *(
        _call(pool(size), axes=axes)
        for pool, (size, axes) in product((nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), ADAPTIVE_PARTLY)
    ),
    _call(nn.AdaptiveAvgPool3d((None, 1, None)), shape=VOLUME, axes="NDW"),
]

# Padding.

_EACH_SIDE: dict[int, tuple[int, ...]] = {1: (1, 3), 2: (1, 2, 3, 0), 3: (1, 0, 2, 1, 0, 2)}
_CROPS: dict[int, tuple[int, ...]] = {1: (-2, 1), 2: (-1, -1, 2, -2), 3: (-1, 1, 0, -1, 2, -1)}
PAD_CASES = [
    *(
        _call(getattr(nn, f"{kind}Pad{axes}d")(amounts), shape=SHAPES[axes])
        for kind, axes in product(("Zero", "Reflection", "Replication"), (1, 2, 3))
        for amounts in (1, _EACH_SIDE[axes])
    ),
    *(_call(getattr(nn, f"ConstantPad{axes}d")(_EACH_SIDE[axes], -2.5), shape=SHAPES[axes]) for axes in (1, 2, 3)),
    *(
        _call(pad, shape=SHAPES[axes], fixed=True)
        for axes, amounts in _CROPS.items()
        for pad in (
            getattr(nn, f"ZeroPad{axes}d")(amounts),
            getattr(nn, f"ConstantPad{axes}d")(amounts, -2.5),
            getattr(nn, f"ReflectionPad{axes}d")(amounts),
            getattr(nn, f"ReplicationPad{axes}d")(amounts),
        )
    ),
    *(
        _call(getattr(nn, f"CircularPad{axes}d")(amounts), shape=SHAPES[axes], axes="N")
        for axes in (1, 2, 3)
        for amounts in (1, _EACH_SIDE[axes])
    ),
    _call(nn.CircularPad2d((2, 1, 0, 0)), axes="NH"),
    _call(F.pad, (0, 0, 1, 2), mode="circular", axes="NW"),
    *(_call(F.pad, (2, 1, 0, 3), mode) for mode in ("constant", "reflect", "replicate")),
    *(_call(F.pad, (2, -1, -2, 1), mode, fixed=True) for mode in ("constant", "reflect", "replicate")),
    _call(F.pad, (1, 2), value=3.0),
    _call(F.pad, (0, 0, 0, 0, 1, 2), value=1.0),
    _call(F.pad, (1, -1, 0, 0, -1, 2), value=-1.0, fixed=True),
    _call(F.pad, (0, 0, 0, 0, 0, 0, 1, 1), axes="HW"),
    _call(F.pad, (-5, 9)),
    _call(F.pad, (0, 0, 0, 0)),
]

# TensorFlow's padding "SAME", which follows from the size of the image, as timm's layers have it.

SAME_CASES = [
    *(_call(pad_same, *geometry) for geometry in (((3, 3), (2, 2)), ((4, 2), (3, 1), (2, 3)), ((1, 2), (1, 2)))),
    _call(pad_same, (3, 2), (2, 4), value=-1.5),
    *(
        _call(Conv2dSame(4, 2, kernel, stride, dilation=dilation))
        for kernel, stride, dilation in product((1, 2, 5), (1, 2, 3), (1, 2))
    ),
    *(
        _call(pool(kernel, stride, ceil_mode=ceil))
        for pool, kernel, stride, ceil in product((MaxPool2dSame, AvgPool2dSame), (2, 3), (1, 2, 4), (False, True))
    ),
    _call(AvgPool2dSame(3, 2, count_include_pad=False)),
    _call(StdConv2dSame(4, 2, 3, 2)),
    _call(StdConv2dSame(4, 2, 3)),
    _call(ScaledStdConv2dSame(4, 2, (3, 2), 2)),
]

# Resampling. In mode 'nearest', torch's own backward and forward disagree at some other scale factors.

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
_SCALES = {"nearest": (2.0, 3.0, 0.5, 1.5), "interpolating": (2.0, 3.0, 0.5, 1.5, 2 / 3, 2.7)}


def _resamplings() -> Iterator[Case]:
    for axes, shape in SHAPES.items():
        for mode, scale in product(("nearest", "nearest-exact"), _SCALES["nearest"]):
            yield _call(F.interpolate, scale_factor=scale, mode=mode, shape=shape)
        modes = (_LINEAR[axes], "bicubic") if axes == 2 else (_LINEAR[axes],)
        for mode, scale, corners in product(modes, _SCALES["interpolating"], (False, True)):
            yield _call(F.interpolate, scale_factor=scale, mode=mode, align_corners=corners, shape=shape)
        for size in (5, (9, 4, 6)[:axes], (1, 12, 3)[:axes]):
            yield _call(F.interpolate, size, mode="nearest-exact", shape=shape)
            for mode, corners in product(modes, (False, True)):
                yield _call(F.interpolate, size=size, mode=mode, align_corners=corners, shape=shape)
    for mode, scale in product(("nearest", "bilinear", "bicubic"), (1.5, 2.7, 2 / 3)):
        yield _call(F.interpolate, scale_factor=scale, mode=mode, recompute_scale_factor=True)
    for mode, scale in product(("nearest", "bilinear", "bicubic"), ((2.0, 1.5), (0.5, 3.0), (1.0, 2.0))):
        yield _call(F.interpolate, scale_factor=scale, mode=mode)
    for mode in ("bilinear", "bicubic"):
        yield _call(F.interpolate, scale_factor=0.5, mode=mode, antialias=True, axes="N")
    yield _call(F.interpolate, scale_factor=0.7, mode="area", axes="N", fixed=True)
    for shape, scale in product(SHAPES.values(), (0.5, 0.3, 2.5)):
        yield _call(F.interpolate, scale_factor=scale, mode="area", shape=shape, fixed=scale < 1)
    yield _call(F.interpolate, (3, 11), mode="area")
    yield _call(nn.Upsample((5, 4), mode="area"))
    # An image that is one pixel wide is resampled wrongly by torch, which takes it for channels_last.
    for mode, scale, corners in product(("bilinear", "bicubic"), (0.5, 0.3, (1.7, 1.0)), (False, True)):
        options = {"mode": mode, "align_corners": corners, "antialias": True}
        yield _call(F.interpolate, scale_factor=scale, shape=(3, 4, 13, 9), fixed=True, **options)
    for mode, size in product(("bilinear", "bicubic"), ((4, 9), (1, 20), (13, 2))):
        yield _call(F.interpolate, size, mode=mode, antialias=True, shape=(2, 2, 13, 9), fixed=True)
    yield _call(
        F.interpolate, scale_factor=0.4, mode="bicubic", antialias=True, recompute_scale_factor=True, fixed=True
    )
    yield _call(F.interpolate, scale_factor=2.7, mode="bilinear", axes="N")
    yield _call(nn.Upsample(scale_factor=2))
    yield _call(nn.Upsample(size=(9, 4), mode="bicubic", align_corners=True))
    yield _call(nn.Upsample(scale_factor=(1.5, 2.7), mode="bilinear", align_corners=False))
    yield _call(nn.Upsample(scale_factor=2.7, mode="bilinear", recompute_scale_factor=True))
    yield _call(nn.Upsample(scale_factor=3, mode="linear"), shape=LINE)
    yield _call(nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True), shape=VOLUME)
    yield _call(nn.UpsamplingNearest2d(scale_factor=3))
    yield _call(nn.UpsamplingNearest2d(size=(5, 11)))
    yield _call(nn.UpsamplingBilinear2d(scale_factor=2))
    yield _call(nn.UpsamplingBilinear2d((4, 9)))


_MANY_CHANNELS = (2, 9, 4, 5)
SHUFFLE_CASES = [
    *(_call(function, 2) for function in (F.pixel_shuffle, torch.pixel_shuffle, nn.functional.pixel_unshuffle)),
    _call(torch.pixel_shuffle, 3, shape=_MANY_CHANNELS),
    _call(nn.PixelShuffle(2)),
    _call(nn.PixelShuffle(3), shape=_MANY_CHANNELS),
    _call(nn.PixelShuffle(1)),
    _call(torch.pixel_unshuffle, 3, shape=(2, 1, 9, 6)),
    _call(nn.PixelUnshuffle(2)),
    _call(nn.PixelUnshuffle(3), shape=(2, 2, 6, 9)),
    _call(F.channel_shuffle, 2),
    _call(torch.channel_shuffle, 4),
    _call(nn.ChannelShuffle(2), shape=VOLUME),
]

# Normalisation.


class BatchNormFunction(nn.Module):
    """Running statistics have no gradient."""

    def __init__(self, affine: bool, **options: Any):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.zeros(4))
        self.weight, self.bias = (nn.Parameter(torch.zeros(4)) if affine else None for _ in range(2))
        self.options = options

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(image, self.mean, self.var, self.weight, self.bias, **self.options)


def _to_end(image: torch.Tensor) -> torch.Tensor:
    """The channels as the last dimension."""
    return image.movedim(1, -1)


NORM_CASES = [
    *(_call(getattr(nn, f"BatchNorm{axes}d")(4), shape=SHAPES[axes]) for axes in (1, 2, 3)),
    _call(nn.BatchNorm2d(4, eps=0.1, affine=False)),
    _call(nn.SyncBatchNorm(4)),
    _call(nn.SyncBatchNorm(4), shape=VOLUME),
    Case("F.batch_norm affine", BatchNormFunction(True, training=False, eps=0.1)),
    Case("F.batch_norm not affine", BatchNormFunction(False)),
    Case("FrozenBatchNorm2d", FrozenBatchNorm2d(4)),
    *(
        _call(getattr(nn, f"InstanceNorm{axes}d")(4, affine=True, track_running_stats=True), shape=SHAPES[axes])
        for axes in (1, 2, 3)
    ),
    *(
        _call(getattr(nn, f"InstanceNorm{axes}d")(4, affine=affine), shape=SHAPES[axes], axes="N", fixed=True)
        for axes, affine in ((1, False), (2, True), (3, False))
    ),
    *(_call(nn.GroupNorm(groups, 4, affine=groups != 2), axes="N") for groups in (1, 2, 4)),
    _call(F.group_norm, 2, torch.zeros(4), torch.zeros(4), 0.1, axes="N"),
    _call(F.instance_norm, eps=0.1, axes="N", fixed=True),
    Case("LayerNorm over channels", Behind(nn.LayerNorm(4), _to_end)),
    Case("LayerNorm without bias over channels", Behind(nn.LayerNorm(4, bias=False, eps=0.1), _to_end), VOLUME),
    _call(nn.LayerNorm((7, 6), elementwise_affine=False), axes="N", fixed=True),
    _call(nn.LayerNorm((6,)), axes="NH", fixed=True),
    Case("F.layer_norm over channels", Behind(With(F.layer_norm, (4,), torch.zeros(4), torch.zeros(4), 0.1), _to_end)),
    Case("RMSNorm over channels", Behind(nn.RMSNorm(4), _to_end)),
    _call(nn.RMSNorm((4, 7, 6), eps=0.1), axes="N", fixed=True),
    Case("F.rms_norm over channels", Behind(With(F.rms_norm, (4,), torch.zeros(4)), _to_end)),
    _call(nn.LocalResponseNorm(3, 0.5, 0.6, 2.0)),
    _call(F.local_response_norm, 2, alpha=0.3, shape=VOLUME),
    *(_call(nn.Softmax(dim)) for dim in (1, -3)),
    _call(nn.Softmax(3), axes="NH"),
    _call(nn.LogSoftmax(1), shape=LINE),
    _call(nn.Softmax2d()),
    *(_call(function, 1) for function in (torch.softmax, torch.log_softmax, F.softmax, F.log_softmax, torch.cumsum)),
    *(_call(name, -3, dtype=torch.float64) for name in ("softmax", "log_softmax", "cumsum")),
    *(_call(name, dim=2, axes="NW") for name in ("softmax", "log_softmax", "cumsum")),
    _call(F.softmax, dim=1, dtype=torch.float64),
    *(_call(F.normalize, p, 1) for p in (1.0, 2.0, float("inf"))),
    _call(F.normalize, dim=(1, 3), eps=5.0, axes="NH"),
    *(_call(F.glu, dim, axes=axes) for dim, axes in ((1, None), (-3, None), (-1, "NH"))),
    _call(nn.GLU(1), shape=VOLUME),
    _call(nn.GLU(), axes="NH"),
]

# Reductions.

_OVER = [  # dimensions, and the axes that are streamed then
    ((1,), {}, None),
    ((-3, True), {}, None),
    (([1],), {"keepdim": True}, None),
    ((2,), {}, "NW"),
    (((2, 3), True), {}, "N"),
    (((-1, 1),), {}, "NH"),
]
_ONE = [over for over in _OVER if isinstance(over[0][0], int)]


def _reductions() -> Iterator[Case]:
    for name in ("amax", "amin", "logsumexp", "mean", "sum"):
        for function, (args, kwargs, axes) in product((getattr(torch, name), name), _OVER):
            yield _call(function, *args, axes=axes, **kwargs)
    for name in ("prod", "argmax", "argmin"):
        for function, (args, kwargs, axes) in product((getattr(torch, name), name), _ONE):
            yield _call(function, *args, axes=axes, **kwargs)
    for name, (args, _, axes) in product(("max", "min"), _ONE):
        for function in (getattr(torch, name), partial(_method, name)):
            yield Case(f"{name}{args} {_label(name)}", With(partial(_unpacked, function), *args), axes=axes)
    for name in ("mean", "sum", "prod"):
        yield _call(name, 1, dtype=torch.float32)
        yield _call(getattr(torch, name), 1, True, dtype=torch.float64)
    for name in ("std", "var"):
        for function, (args, kwargs, axes) in product((getattr(torch, name), name), _OVER):
            dim, *keep = args
            options = {"keepdim": bool(keep)} | kwargs
            yield _call(function, dim, False, axes=axes, **options)
            yield _call(function, dim, correction=2, axes=axes, **options)
        yield _call(name, 1)
    for function, p in product((torch.norm, "norm"), ("fro", 1, 2, 3.5, float("inf"))):
        yield _call(function, p, 1)
        yield _call(function, p, (2, 3) if p in ("fro", 2) else 2, True, axes="N")
    for order, dim in product((2, 1, float("-inf"), 0.5), (1, (1, 3))):
        yield _call(torch.linalg.vector_norm, order, dim, keepdim=True, axes="NH")
    for name, (args, kwargs, axes) in product(("all", "any"), _OVER):
        for function in (getattr(torch, name), partial(_method, name)):
            yield Case(f"{name}{args} {kwargs}", With(partial(_of_signs, function), *args, **kwargs), axes=axes)
    yield Case("max of two", lambda x: (torch.max(x, -x), x.max(other=x * 2), torch.min(x, -x), x.min(x * 2)))
    yield Case("axis= and keepdims=", lambda x: (x.mean(axis=1, keepdims=True), x.sum(axis=(1,)), x.std(axis=1)))
    yield Case("of bools", lambda x: ((x > 0).sum(1), (x > 0).sum(1, dtype=torch.int32)))
    yield Case("results by name", lambda x: (x.max(1).values, x.min(1, keepdim=True).indices))
    yield Case("only the positions", lambda x: x.max(1)[1])


def _of_signs(function: Callable[..., Any], image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return function(image > -0.8, *args, **kwargs)


def _unpacked(function: Callable[..., Any], image: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    values, places = function(image, *args)
    return values, places


REDUCTION_CASES = list(_reductions())
RESAMPLING_CASES = list(_resamplings())

# Dimensions in another order, split and merged.

SHAPE_CASES = [
    _call(nn.Identity()),
    _call(torch.permute, (0, 2, 3, 1)),
    _call("permute", 3, 1, 0, 2),
    _call("permute", (0, -1, -2, 1)),
    _call("permute", dims=(1, 0, 2, 3)),
    *(_call(f, 1, -1) for f in (torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims")),
    _call("transpose", 0, 2),
    *(_call(f, 1, -1) for f in (torch.movedim, torch.moveaxis, "movedim", "moveaxis")),
    _call(torch.movedim, (0, 3), (2, 0)),
    _call("movedim", source=-1, destination=1),
    _call(torch.flatten, 2, 3, axes="N"),
    _call("flatten", start_dim=1, axes="N"),
    _call("flatten", 0, 1, axes="HW"),
    _call("flatten", 1, 1),
    _call(nn.Flatten(), axes="N"),
    _call(nn.Flatten(1, 2), axes="NW"),
    _call(torch.unflatten, 1, (2, 2)),
    _call("unflatten", -3, (1, -1, 2)),
    _call(nn.Unflatten(1, (2, 2))),
    *(_call(f, dim) for f, dim in product((torch.unsqueeze, "unsqueeze"), (0, 2, -1, -5))),
    *(_call(f, (-1, 3, -1, -1), shape=(2, 1, 5, 4)) for f in (torch.broadcast_to, "broadcast_to", "expand")),
    _call("expand", 2, -1, 4, -1, -1),
    _call("repeat", 1, 3, 1, 1),
    _call("repeat", (2, 1, 2, 1, 1)),
    _call("repeat", 1, 1, 2, 3, axes="N"),
    *_named(
        {
            "torch.reshape": lambda x: torch.reshape(x, (-1, 2, 2, x.size(2), x.shape[3])),
            ".reshape": lambda x: x.reshape(x.size(0), -1, 2, x.size(2), x.size(3)),
            ".view": lambda x: x.view(x.size(0), 2, -1, x.size(2), x.size(3)),
            ".view to a shape": lambda x: x.view(x.shape),
            ".view_as": lambda x: (x * 2).view_as(x),
            ".reshape_as": lambda x: x.permute(2, 0, 3, 1).reshape_as(x.movedim(1, -1).permute(1, 0, 2, 3)),
            ".expand_as": lambda x: x.mean(1, True).expand_as(x),
            "torch.squeeze": lambda x: torch.squeeze(x.mean(1, True), 1),
            ".squeeze": lambda x: (x[:, [2]].squeeze(-3), x[:, [1, 2]].squeeze(1), x.sum(1, True).squeeze((1,))),
            ".squeeze(dim=)": lambda x: x[:, None].squeeze(dim=1),
            ".expand to sizes": lambda x: x.mean(1, True).expand(x.size(0), 3, x.size(2), x.size(3)),
        }
    ),
    *_named(
        {
            "torch.t": lambda x: torch.t(x.mean((1, 2))),
            ".t": lambda x: x.sum((1, 2)).t(),
            ".T": lambda x: x.mean((1, 2)).T,
            ".mT": lambda x: x.mT,
            ".view merges": lambda x: x.view(x.size(0), -1, x.size(3)),
        },
        axes="NW",
    ),
    Case(".T of an image", lambda x: x.T),
    Case("OrderedDict", lambda x: OrderedDict(b=x, a=x * 2)),
]


class Token(nn.Module):
    """A parameter expanded to the sizes of the image."""

    def __init__(self, expand: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *shape: int):
        super().__init__()
        self.token, self.expand = nn.Parameter(torch.ones(shape)), expand

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.expand(self.token, image) + image


SIZE_CASES = [
    *_named(
        {
            ".size()": lambda x: x * x.size()[2] + x.size(-1),
            ".shape": lambda x: x + x.shape[0] * x.shape[3],
            ".numel": lambda x: x / x.numel() + torch.numel(x) + x.nelement(),
            ".dim": lambda x: x * x.dim() + x.ndimension() - x.ndim,
            "sizes of another value": lambda x: F.max_pool2d(x, 1, 2) * F.avg_pool2d(x, 1).size(2),
            "full_like": lambda x: (torch.full_like(x, 2), torch.ones_like(x) + x, torch.zeros_like(x[:, :1])),
        }
    ),
    *(
        Case(label, Token(expand, *shape), axes=axes)
        for label, expand, shape, axes in (
            (".expand of a token", lambda t, x: t.expand(x.size(0), -1, -1, -1), (1, 4, 1, 1), "N"),
            ("broadcast_to of a token", lambda t, x: torch.broadcast_to(t, (x.size(0), 4, 1, 1)), (4, 1, 1), "N"),
            (".repeat of a token", lambda t, x: t.repeat(x.shape[0], 1, 1, 1), (1, 4, 1, 1), "N"),
            (".view of a token", lambda t, x: t.view(1, x.size(1), 1, 1), (4,), None),
        )
        if TRACES_SIZES or label != "broadcast_to of a token"
    ),
]

# Tensors made of sizes and types of values: maps, coordinates, numbers.


def _all_made(x: torch.Tensor) -> torch.Tensor:
    """Every way to fill a map of a value's size."""
    n, _, h, w = x.shape
    like = {"dtype": x.dtype, "device": x.device}
    new = [x.new_zeros(n, 1, h, w), x.new_ones((n, 1, h, w)), x.new_full((n, 1, h, w), 2.5)]
    made = [torch.zeros((n, 1, h, w), **like), torch.ones(size=(n, 1, h, w), **like), torch.full((n, 1, h, w), 3.0)]
    empty = [x.new_empty((n, 2, h, w)).fill_(0.5), torch.empty((n, 1, h, w), **like).fill_(0.25)]
    return torch.cat([x, *new, *made, *empty], 1)


def _coordinates(x: torch.Tensor) -> torch.Tensor:
    n, _, h, w = x.shape
    down = torch.linspace(-1, 1, h, dtype=x.dtype, device=x.device).view(1, 1, h, 1).expand(n, 1, h, w)
    along = torch.arange(w, device=x.device).to(x)[None, None, None].repeat(n, 1, 1, 1)
    return torch.cat([x, down, x * along / w], 1) + torch.logspace(0, 1, w).to(x.dtype)


def _mesh(x: torch.Tensor) -> torch.Tensor:
    down, along = torch.meshgrid(torch.arange(x.size(2)), torch.arange(x.size(3)), indexing="ij")
    both = torch.stack([down, along]).unsqueeze(0).repeat(x.shape[0], 1, 1, 1).to(x.dtype)
    return torch.cat([x, both / 10], 1)


def _like_others(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    half = x.half()
    typed = torch.ones(4, 1, 1).type_as(half) * torch.tensor([2.0], dtype=half.dtype)
    return (
        half * half.new_tensor(2.0) + torch.ones(1, dtype=half.dtype, device=half.device),
        torch.where(x > 0, x, x.new_tensor(-1.5)) * x.new_tensor([1.0, 2.0, 3.0, 4.0]).view(1, -1, 1, 1),
        x.to(half.dtype) + typed.exp(),
        x.float().to(dtype=x.dtype),
        torch.as_tensor(2.0, dtype=x.dtype) * x
        + torch.asarray(1.0, dtype=x.dtype)
        + torch.scalar_tensor(3, dtype=x.dtype),
        x * torch.eye(x.size(0))[:, :1, None, None],
    )


MADE_CASES = [
    *_named({"maps": _all_made, "coordinates": _coordinates, "a grid": _mesh, "types": _like_others}),
    *(
        Case(f"of a parameter and sizes: {label}", Token(make, 4, 1, 1))
        for label, make in (
            ("scaled", lambda t, x: t * x.shape[2]),
            ("not a view", lambda t, x: (t * x.shape[3]).sigmoid().to(x * 2)),
            ("a slice", lambda t, x: t[:, :, : x.shape[3]] * x.shape[1]),
        )
    ),
]

# Windows that divide a streamed axis, and streamed axes that are merged with others.


def _space_to_depth(x: torch.Tensor) -> torch.Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 3, 3).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 6, h // 2, w // 3)


def _depth_to_space(x: torch.Tensor) -> torch.Tensor:
    b, c, h, w = x.shape
    return x.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, h * 2, 2 * w)


def _softmax_of_windows(x: torch.Tensor) -> torch.Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 3, 3).softmax(3).view(b, c, h, w) * x


def _windows_as_batch(x: torch.Tensor) -> torch.Tensor:
    """As in a Swin transformer."""
    x = x.permute(0, 2, 3, 1)
    b, h, w, c = x.shape
    y = x.view(b, h // 2, 2, w // 3, 3, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 2, 3, c)
    y = y * y.softmax(1)
    y = y.view(b, h // 2, w // 3, 2, 3, -1).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, -1)
    return y + x


WINDOW_CASES = [
    *_named(
        {
            "space to depth": _space_to_depth,
            "depth to space": _depth_to_space,
            "softmax of windows": _softmax_of_windows,
        },
        shape=(3, 4, 12, 6),
        trials=5,
    ),
    Case("windows as batch", _windows_as_batch, (3, 4, 12, 6), "N"),
    Case("rows as batch", lambda x: x.permute(0, 2, 1, 3).reshape(-1, 4, x.size(3)).softmax(1), axes="N"),
    Case("positions in one", lambda x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1, 4).softmax(-1), axes="NH"),
]

# einops.


class Rearranged(nn.Module):
    """Calls by a global name, which torch.fx records as such; lengths may follow from the sizes of the image."""

    def forward(self, x: torch.Tensor) -> Any:
        windows = rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=2, q=3)
        rows = repeat(reduce(x, "b c h w -> b 1 h w", "mean"), "b 1 h w -> b k h w", k=x.shape[1])
        return windows, x + rows


LONG = (3, 4, 12, 6)
EINOPS_CASES = [
    *(
        _call(function, pattern, shape=LONG, axes=axes, **options)
        for function, pattern, axes, options in (
            (rearrange, "b c (h p) (w q) -> b (c p q) h w", None, {"p": 2, "q": 3}),
            (rearrange, "b (c p q) h w -> b c (h p) (w q)", None, {"p": 2, "q": 2}),
            (rearrange, "b c (h p) w -> p b c h w", None, {"p": 2}),
            (rearrange, "b (g c) h w -> (g b) c h w", "HW", {"g": 2}),
            (rearrange, "b (g c) h w -> (b g) c h w", None, {"c": 2}),
            (rearrange, "b c (h p) (w q) -> (b h w) c p q", "N", {"p": 2, "q": 3}),
            (rearrange, "b c ... -> b ... c", None, {}),
            (rearrange, "b c ... -> b c (...)", "N", {}),
            (rearrange, "b c h w -> b () c h w 1", None, {}),
            (reduce, "b c (h 2) (w 3) -> b c h w", None, {"reduction": "mean"}),
            (reduce, "b (c d) h w -> b c h w", None, {"reduction": "max", "d": 2}),
            (reduce, "b c h w -> b h w", None, {"reduction": "sum"}),
            (reduce, "b c h w -> b c", "N", {"reduction": "prod"}),
            (repeat, "b c h w -> b c (h 2) (w r)", None, {"r": 3}),
            (repeat, "b c h w -> k (b n) c h w", None, {"k": 3, "n": 2}),
        )
    ),
    _call(Rearrange("b c (h p) (w q) -> b (c p q) h w", p=2, q=3), shape=LONG),
    _call(Reduce("b c (h p) (w q) -> b c h w", "min", p=2, q=3), shape=LONG),
    Case("by a global name", Rearranged(), LONG, fixed=True),
]

# Values cut apart and joined.

CHANNELS = [0, 1, 2, 3]  # picked, so that their number is known at conversion

INDEX_CASES = [
    *_named(
        {
            "cat and stack along axis=": lambda x: (torch.cat([x, x], axis=1), torch.stack((x, x), axis=-1)),
            "torch.cat": lambda x: torch.cat([x, x * 2, -x[:, :1]], 1),
            "torch.concat": lambda x: torch.concat((x, x.relu()), dim=-3),
            "torch.concatenate": lambda x: torch.concatenate([x], 1),
            "torch.stack": lambda x: torch.stack([x, -x], 1),
            "torch.stack behind": lambda x: torch.stack([x, -x, x * 2], dim=-1),
            "torch.chunk": lambda x: torch.chunk(x, 2, 1)[0],
            "torch.chunk of known channels": lambda x: torch.chunk(x[:, CHANNELS], 3, 1),
            ".chunk": lambda x: x.chunk(3, dim=1)[1],
            "torch.split": lambda x: torch.split(x, [1, 2, 1], 1)[1],
            ".split": lambda x: x.split((3, 1), dim=-3)[0],
            "torch.split by a size": lambda x: torch.split(x[:, CHANNELS], 3, dim=1),
            ".split by a size": lambda x: x[:, CHANNELS].split(split_size=2, dim=1)[1],
            "torch.unbind": lambda x: torch.unbind(x[:, CHANNELS], 1),
            ".unbind": lambda x: x[:, CHANNELS].unbind(-3)[2],
            "[...]": lambda x: x[..., None],
            "[:, 1]": lambda x: (x[:, 1], x[:, -1], x[:, None, 2]),
            "[:, ::2]": lambda x: (x[:, ::2], x[:, 1:], x[:, :-3]),
            "[:, [2, 0]]": lambda x: x[:, [2, 0, 2]],
            "[:, :, ::2, ::3]": lambda x: (x[:, :, ::2, ::3], x[:, 0, ::2], x[..., ::2]),
        }
    ),
    *_named(
        {
            "[..., 1:]": lambda x: (x[..., 1:], x[:, :, 1:], x[1:]),
            "[:, :, 2:5]": lambda x: (x[:, :, 2:5], x[..., -3:], x[..., 1:-2:2]),
            "crop by a size": lambda x: (x[:, :, x.size(2) // 2 :], x[..., x.size(3) - 2 : x.size(3)]),
            ".narrow of rows": lambda x: (x.narrow(2, 1, x.size(2) - 3), x.narrow(-1, 2, 3)),
        },
        fixed=True,
    ),
    _call("narrow", 1, 1, 2),
    _call(torch.narrow, -3, -2, 1),
    _call(torch.narrow, 1, 0, length=3),
    *(_call(f, 1, index) for f, index in product((torch.select, "select"), (0, -1))),
    *(_call(f, 1, torch.tensor([2, 0, 2])) for f in (torch.index_select, "index_select")),
    _call("index_select", 2, torch.tensor([0]), axes="NW"),
    *(_call(f, (1,)) for f in (torch.flip, "flip")),
    _call("flip", 1, -1, axes="NH"),
    *(_call(f, 1, 1) for f in (torch.roll, "roll")),
    _call("roll", (1, -2), dims=(1, 2), axes="NW"),
    _call(torch.roll, (3,), (-3,)),
]

# Writes by index. Each writes into a copy of the image, from the image itself or from a constant.


class Written(nn.Module):
    """The image times 1.5, into a part of which a value is written that is computed from the image or is given."""

    def __init__(self, index: Any, value: Any):
        super().__init__()
        self.index, self.value = index, value
        self.constant = nn.Parameter(value) if isinstance(value, torch.Tensor) else None

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        y = image * 1.5
        index = self.index(y) if callable(self.index) else self.index
        y[index] = (
            self.constant if self.constant is not None else self.value(image) if callable(self.value) else self.value
        )
        return y


ALL = slice(None)
ROW = torch.linspace(0.5, 1.5, 4)
WRITES: dict[str, tuple[Any, Any]] = {
    "[:, 0] = number": ((ALL, 0), 0),
    "[:, -1] = value": ((ALL, -1), lambda x: x[:, 1].sin()),
    "[:, 1:3] = value": ((ALL, slice(1, 3)), lambda x: x[:, :2]),
    "[:, 1:3] = one channel": ((ALL, slice(1, 3)), lambda x: x[:, :1]),
    "[:, [2, 0]] = value": ((ALL, [2, 0]), lambda x: x[:, 1:3]),
    "[:, tensor] = constant": ((ALL, torch.tensor([2, 1])), ROW[:2].view(2, 1, 1)),
    "[:, mask of channels] = value": ((ALL, ROW > 1), lambda x: x[:, :2]),
    "[:] = constant": (ALL, ROW.view(4, 1, 1)),
    "[...] = constant": (Ellipsis, ROW[1]),
    "[mask] = number": (lambda y: y < 0.1, 0),
    "[mask] = constant": (lambda y: y > 0.3, ROW[0]),
    "[constant mask] = number": (torch.arange(504).view(PLANE) % 3 == 0, -1.5),
    "[mask of images and channels] = number": ((torch.arange(12) % 3 == 0).view(3, 4), 2),
}
PARTS: dict[str, tuple[Any, Any]] = {
    "[:, :, 1:] = rows above": ((ALL, ALL, slice(1, None)), lambda x: x[:, :, :-1]),
    "[:, :, :-1] = rows below": ((ALL, ALL, slice(None, -1)), lambda x: x[:, :, 1:]),
    "[..., 1:-1, :-2] = shifted": ((Ellipsis, slice(1, -1), slice(None, -2)), lambda x: x[:, :, 1:-1, 2:]),
    "[:, :, ::2] = value": ((ALL, ALL, slice(None, None, 2)), lambda x: x[:, :, ::2].exp()),
    "[:, :, 2::3, 1::2] = value": (
        (ALL, ALL, slice(2, None, 3), slice(1, None, 2)),
        lambda x: x[:, :, 2::3, 1::2] * x[:, :, 1:-1:3, ::2][:, :, : x[:, :, 2::3].shape[2], : x.shape[3] // 2],
    ),
    "[:, 1, -3:] = number": ((ALL, 1, slice(-3, None)), 5.0),
    "[1:] = value": (slice(1, None), lambda x: x[:-1]),
    "[:, :, 2:4] = constant": ((ALL, ALL, slice(2, 4)), ROW.view(4, 1, 1)),
    "[:, :, 0] = number": ((ALL, ALL, 0), 0),
    "[..., -1] = constant": ((Ellipsis, -1), ROW.view(4, 1)),
    "up to a size": (lambda y: (ALL, ALL, slice(None, y.shape[2] // 2)), 3.0),
    "from a size": (
        lambda y: (ALL, ALL, slice(y.shape[2] // 2, None)),
        lambda x: x.sin()[:, :, x.shape[2] // 2 :],
    ),
    "at a size": (lambda y: (ALL, ALL, y.shape[2] // 2), 3.0),
}
WRITE_CASES = [
    *(Case(f"write {label}", Written(*write)) for label, write in WRITES.items()),
    *(Case(f"write {label}", Written(*write), trials=6, fixed=True) for label, write in PARTS.items()),
    *_named(
        {
            "zero_": lambda x: (x * 2).zero_(),
            "fill_": lambda x: (x * 2).fill_(1.5),
            "copy_": lambda x: (x * 2).copy_(x[:, :1]),
            "several rules": lambda x: torch.zeros_like(x).copy_(x).zero_() + x,
        }
    ),
    Case("fill_ by a parameter", With(lambda x, p: (x * 2).fill_(p), torch.ones(()))),
    Case("copy_ of a parameter", With(lambda x, p: (x * 2).copy_(p), torch.ones(4, 1, 1))),
]

# Products, attention: along the batch, and along whatever they do not sum or attend over.


class Attention(nn.Module):
    """Positions of an image (N, C, L) that attend to each other, or to a parameter."""

    def __init__(self, memory: int = 0, options: Options | None = None, **attention: Any):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **attention)
        self.memory = nn.Parameter(torch.ones(2, memory, 4)) if memory else None
        self.batch_first, self.options = attention.get("batch_first", False), options or {}

    def forward(self, image: torch.Tensor) -> Any:
        tokens = image.transpose(1, 2) if self.batch_first else image.permute(2, 0, 1)
        memory = tokens
        if self.memory is not None:
            memory = self.memory if self.batch_first else self.memory.transpose(0, 1)
        attended, weights = self.attention(tokens, memory, memory, **self.options)
        return (attended, weights) if self.options.get("need_weights", True) else attended


def _attend(image: torch.Tensor, **options: Any) -> torch.Tensor:
    """Positions of an image (N, C, L) that attend to each other, in heads (N, C, L, 1)."""
    queries = image[..., None]
    keys = queries[:, :2] if options.get("enable_gqa") else queries
    return F.scaled_dot_product_attention(queries, keys * 2, keys.sin(), **options)


def _attend_to(image: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(_tokens(image), keys, values)


def _tokens(image: torch.Tensor) -> torch.Tensor:
    return image.transpose(1, 2)


MASK = torch.ones(13, 13).triu(1).bool()
TOKENS = (3, 4, 13)

PRODUCT_CASES = [
    Case("Linear over channels", Behind(nn.Linear(4, 3), _to_end)),
    Case("Linear without bias over channels", Behind(nn.Linear(4, 5, bias=False), _to_end), VOLUME),
    _call(nn.Linear(6, 3), axes="NH", fixed=True),
    Case("F.linear over channels", Behind(With(F.linear, torch.zeros(3, 4), torch.zeros(3)), _to_end)),
    *(_call(f, torch.zeros(6, 5), axes="NH", fixed=True) for f in (torch.matmul, operator.matmul, "matmul")),
    _call(torch.matmul, torch.zeros(6), axes="NH", fixed=True),
    _call(torch.matmul, torch.zeros(3, 1, 6, 5), axes="NH", fixed=True),
    *(_call(f, torch.zeros(2, 13, 5), shape=LINE, axes="N", fixed=True) for f in (torch.bmm, "bmm")),
    *_named(
        {
            "torch.matmul of two": lambda x: torch.matmul(x.mT, x * 2),
            "@": lambda x: x @ x.mT,
            "torch.bmm of two": lambda x: torch.bmm(x[:, 0], x[:, 1].mT),
            ".bmm of two": lambda x: x[:, 0].bmm(x[:, 1].mT),
        },
        axes="N",
    ),
    *_named(
        {
            "torch.mm": lambda x: torch.mm(x.mean((2, 3)), torch.ones(4, 3).double()),
            ".mm": lambda x: x.amax((2, 3)).mm(torch.ones(4, 3).double()),
            "tensor @ image": lambda x: torch.ones(5, 4).double() @ x.flatten(2),
        },
        axes="N",
    ),
    *_named(
        {
            "einsum over channels": lambda x: torch.einsum("nchw,dc->ndhw", x, torch.ones(3, 4).double()),
            "einsum of two": lambda x: torch.einsum("n c ..., n d ... -> n c d ...", x, x * 2),
            "einsum without a result": lambda x: torch.einsum("...,n...", torch.ones(1).double(), x),
            "einsum of positions": lambda x: torch.einsum("nchw,nchw->nhw", [x, x.sin()]),
            "einsum with a batch": lambda x: torch.einsum("nchw,nc->nhcw", x, torch.ones(3, 4).double()),
        }
    ),
    Case("einsum over positions", lambda x: torch.einsum("nchw,nchv->nwv", x, x), axes="N"),
    *(
        Case(f"attention {options}", Attention(options=options), TOKENS, "N")
        for options in ({}, {"need_weights": False}, {"average_attn_weights": False})
    ),
    *(
        Case(f"attention {options}", Attention(batch_first=True, **options), TOKENS, "N")
        for options in ({}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}, {"dropout": 0.5})
    ),
    Case("attention masked", Attention(options={"attn_mask": MASK}, batch_first=True), TOKENS, "N", fixed=True),
    Case("attention to a parameter", Attention(5, {"need_weights": False}), LINE),
    Case("attention to a parameter, weights", Attention(5, batch_first=True), LINE),
    Case("attention padded", Attention(5, {"key_padding_mask": MASK[:2, :5]}, batch_first=True), LINE),
    *(
        Case(
            f"transformer layer {options}",
            Behind(nn.TransformerEncoderLayer(4, 2, 6, 0.5, **options), _tokens),
            TOKENS,
            "N",
        )
        for options in ({"batch_first": True}, {"batch_first": True, "norm_first": True, "activation": "gelu"})
    ),
    Case(
        "transformer layer, batch second",
        Behind(nn.TransformerEncoderLayer(4, 1, 6), lambda x: x.permute(2, 0, 1)),
        TOKENS,
        "N",
    ),
    Case(
        "transformer",
        Behind(nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 2), _tokens),
        TOKENS,
        "N",
    ),
    *(
        Case(f"F.scaled_dot_product_attention {options}", With(_attend, **options), TOKENS, "N")
        for options in ({}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True})
    ),
    Case(
        "F.scaled_dot_product_attention masked", With(_attend, attn_mask=torch.zeros(13, 13)), TOKENS, "N", fixed=True
    ),
    Case(
        "F.scaled_dot_product_attention to a parameter", With(_attend_to, torch.zeros(5, 4), torch.zeros(5, 3)), TOKENS
    ),
]

# Windows side by side, dropout in eval mode, Swin transformers.


class InheritedDepth(StochasticDepth):
    """Traced through: with a forward of its own it has no rule, but the function has that it calls."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return stochastic_depth(input, self.p, self.mode, self.training)


OTHER_CASES = [
    *(_call("unfold", dim, size, step) for dim, size, step in ((2, 3, 1), (-1, 2, 3), (1, 2, 2), (2, 1, 4))),
    _call("unfold", dimension=0, size=2, step=1, axes="HW"),
    _call(F.unfold, 2, axes="N"),
    _call(F.unfold, (3, 2), (1, 2), (1, 0), (2, 1), axes="N"),
    _call(nn.Unfold((2, 3), padding=1, stride=2), axes="N"),
    _call(F.fold, (4, 5), (2, 2), shape=(3, 8, 12), axes="N", fixed=True),
    _call(nn.Fold((5, 4), 2, dilation=2, padding=1, stride=1), shape=(3, 4, 6), axes="N", fixed=True),
    *(
        _call(getattr(nn, name)(0.7), shape=shape)
        for name, shape in (
            ("Dropout", PLANE),
            ("Dropout1d", LINE),
            ("Dropout2d", PLANE),
            ("Dropout3d", VOLUME),
            ("AlphaDropout", PLANE),
            ("FeatureAlphaDropout", PLANE),
        )
    ),
    *(
        _call(getattr(F, name), 0.7, training=False, shape=shape)
        for name, shape in (
            ("dropout", PLANE),
            ("dropout1d", LINE),
            ("dropout2d", PLANE),
            ("dropout3d", VOLUME),
            ("alpha_dropout", PLANE),
            ("feature_alpha_dropout", PLANE),
        )
    ),
    *(_call(F.dropout, p, training) for p, training in ((0.0, True), (0.5, False))),
    *(_call(StochasticDepth(0.3, mode)) for mode in ("row", "batch")),
    _call(InheritedDepth(0.3, "row")),
    _call(DropPath(0.3)),
    _call(drop_path, 0.3, training=False),
    *(
        Case(
            f"Swin windows shifted by {shift}",
            Behind(swin_transformer.ShiftedWindowAttention(4, [2, 3], shift, 2), _to_end),
            axes="N",
        )
        for shift in ([0, 0], [1, 2])
    ),
    Case("Swin V2 windows", Behind(swin_transformer.ShiftedWindowAttentionV2(4, [2, 2], [1, 1], 2), _to_end), axes="N"),
    Case("Swin patch merging", Behind(swin_transformer.PatchMerging(4), _to_end), axes="N"),
]

# Types and devices.

CAST_CASES = [
    *(_call(name) for name in ("bfloat16", "contiguous", "cpu", "double", "float", "half", "positive")),
    *(_call(name) for name in ("bool", "detach", "int", "long")),
    _call(torch.detach),
    replace(_call("cuda"), marks=(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),)),
    _call("type", torch.float32),
    _call("contiguous", memory_format=torch.channels_last),
    *(_call(f) for f in (torch.positive, operator.pos)),
    *(_call("to", *args) for args in ((torch.float32,), ("cpu",), ("cpu", torch.float16), (torch.float64,))),
    _call("to", dtype=torch.float32, copy=True),
    *_named(
        {
            ".to(other)": lambda x: (x.to(x.float() * 2), x.to(tensor=x.half()), x.to(torch.zeros(1).float())),
            ".type_as": lambda x: (x.type_as(x.float()), x.type_as(torch.zeros(1).half())),
        }
    ),
]

# Element-wise operations: every name that `pointwise` registers, as a function, a method, and in place.

Form = Callable[[Callable[..., Any], Any, Any], Any]
"""A call of a function on an image and on a second operand."""

CONSTANT = torch.linspace(0.5, 1.5, 12).double().view(3, 4, 1, 1)


def _fresh(x: Any) -> Any:
    return x * 1.5


def _positive(x: Any) -> Any:
    return x.abs() + 0.2


def _above_one(x: Any) -> Any:
    return x.abs() + 1.1


def _below_one(x: Any) -> Any:
    return x.sin() * 0.9


def _probability(x: Any) -> Any:
    return x.sigmoid() * 0.9 + 0.05


def _rounded(x: Any) -> Any:
    return (x * 2).round()


def _bits(x: Any) -> Any:
    return (x * 4).int()


def _untracked(x: Any) -> Any:
    """Of what torch has no derivative."""
    return x.detach().abs() * 3 + 1.1


DOMAINS: dict[Callable[[Any], Any], str] = {
    _positive: "digamma float_power lgamma log log10 log1p log2 pow rsqrt sqrt xlogy",
    _above_one: "acosh",
    _below_one: "acos asin atanh erfinv",
    _probability: "logit",
    _rounded: """
        eq fmax fmin ge greater greater_equal gt le less less_equal logical_and logical_not logical_or logical_xor lt
        maximum minimum ne not_equal
    """,
    _bits: "and_ bitwise_and bitwise_not bitwise_or bitwise_xor invert or_ xor",
    _untracked: "acosh_ asinh_ floor_divide floor_divide_ floordiv ifloordiv nextafter nextafter_"
    + (" ldexp_" if not LDEXP_IN_PLACE else ""),
}
DOMAIN = {name: domain for domain, names in DOMAINS.items() for name in names.split()}
"""What maps an image to where an operation is defined, without a tie that rounding breaks; `_fresh` elsewhere."""

TENSORS_ONLY = """
    arctan2 atan2 copysign fmax fmin hypot isclose ldexp logaddexp logaddexp2 logical_and logical_or logical_xor maximum
    minimum nextafter
""".split()
BINARY = """
    add and_ bitwise_and bitwise_or bitwise_xor div divide eq float_power floor_divide floordiv fmod ge greater
    greater_equal gt le less less_equal lt mod mul multiply ne not_equal or_ pow remainder rsub sub subtract true_divide
    truediv xlogy xor
""".split()

FORMS: dict[str, list[Form]] = {
    "add": [lambda f, x, y: f(x, 2.0, alpha=3), lambda f, x, y: f(x, other=y)],
    "addcdiv": [lambda f, x, y: f(x, y, y.abs() + 1, value=0.5), lambda f, x, y: f(x, CONSTANT, CONSTANT)],
    "addcmul": [lambda f, x, y: f(x, y, y.sin(), value=0.5), lambda f, x, y: f(x, CONSTANT, CONSTANT)],
    "celu": [lambda f, x, y: f(x), lambda f, x, y: f(x, 0.5)],
    "clamp": [
        lambda f, x, y: f(x, -0.5, 0.7),
        lambda f, x, y: f(x, max=0.2),
        lambda f, x, y: f(x, min=CONSTANT),
        lambda f, x, y: f(x, y, y + 1),
    ],
    "clamp_max": [lambda f, x, y: f(x, 0.3), lambda f, x, y: f(x, y.mean(1, True))],
    "clamp_min": [lambda f, x, y: f(x, 0.3), lambda f, x, y: f(x, CONSTANT)],
    "clip": [lambda f, x, y: f(x, -0.5, 0.7), lambda f, x, y: f(x, y.mean(1, True), CONSTANT)],
    "div": [
        lambda f, x, y: f(x, 0.7, rounding_mode="floor"),
        lambda f, x, y: f(x, CONSTANT, rounding_mode="trunc"),
        lambda f, x, y: f(x, y, rounding_mode=None),
    ],
    "divide": [lambda f, x, y: f(x, 0.7, rounding_mode="floor")],
    "elu": [lambda f, x, y: f(x), lambda f, x, y: f(x, 0.5)],
    "full_like": [lambda f, x, y: f(x, 2.0), lambda f, x, y: f(x, fill_value=3, dtype=torch.float32)],
    "gelu": [lambda f, x, y: f(x), lambda f, x, y: f(x, approximate="tanh")],
    "hardshrink": [lambda f, x, y: f(x), lambda f, x, y: f(x, 0.2)],
    "hardtanh": [lambda f, x, y: f(x), lambda f, x, y: f(x, -0.2, 0.6)],
    "isclose": [lambda f, x, y: f(x, y, rtol=0.1, atol=0.5)],
    "leaky_relu": [lambda f, x, y: f(x), lambda f, x, y: f(x, 0.3)],
    "lerp": [
        lambda f, x, y: f(x, y, 0.3),
        lambda f, x, y: f(x, y, weight=y.cos()),
        lambda f, x, y: f(x, CONSTANT, CONSTANT),
    ],
    "logit": [lambda f, x, y: f(x), lambda f, x, y: f(x, 0.3)],
    "masked_fill": [lambda f, x, y: f(x, y > 0, 0.5), lambda f, x, y: f(x, CONSTANT > 1, value=-1.0)],
    "mul": [lambda f, x, y: f(x, y > 0), lambda f, x, y: f(x, 3)],
    "nan_to_num": [
        lambda f, x, y: f(x / (y > 0)),
        lambda f, x, y: f(x / (y > 0), nan=1.0, posinf=2.0, neginf=3.0),
    ],
    "pow": [lambda f, x, y: f(x, 1.5)],
    "round": [lambda f, x, y: f(x), lambda f, x, y: f(x, decimals=1)],
    "rsub": [lambda f, x, y: f(x, y, alpha=0.5)],
    "softplus": [lambda f, x, y: f(x), lambda f, x, y: f(x, 2.0, 0.5)],
    "softshrink": [lambda f, x, y: f(x), lambda f, x, y: f(x, 0.2)],
    "sub": [lambda f, x, y: f(x, y, alpha=3), lambda f, x, y: f(x, 1)],
    "threshold": [lambda f, x, y: f(x, 0.2, -1.0)],
}
"""Calls, besides those of any binary operation; of others once with the image alone."""


def _elementwise(label: str, name: str, function: Callable[..., Any], forms: Iterable[Form]) -> Case:
    """All calls of an operation on an image, each on a tensor of its own, which it may overwrite."""
    domain = DOMAIN.get(name, DOMAIN.get(name.removesuffix("_"), _fresh))
    op = With(_calls, function, domain, list(forms))
    return Case(label, op, trials=2)


def _calls(image: Any, function: Callable[..., Any], domain: Callable[[Any], Any], forms: list[Form]) -> list[Any]:
    return [form(function, domain(image), domain(image.flip(1) * 0.7)) for form in forms]


def _binary(name: str) -> list[Form]:
    """Calls with another value, constants, and a number."""
    constant = _bits(CONSTANT) if DOMAIN.get(name) is _bits else CONSTANT
    forms: list[Form] = [
        lambda f, x, y: f(x, y),
        lambda f, x, y: f(x, y[:, 1:2]),
        lambda f, x, y: f(x, constant),
        lambda f, x, y: f(x, constant[0]),
    ]
    return forms if name in TENSORS_ONLY else [*forms, lambda f, x, y: f(x, 2)]


def _forms(name: str, function: Callable[..., Any]) -> list[Form]:
    forms = FORMS.get(name, []) + (_binary(name) if name in BINARY + TENSORS_ONLY else [])
    forms = forms or [lambda f, x, y: f(x)]
    first = forms[0]
    return [*forms, lambda f, x, y: first(partial(f, inplace=True), x, y)] if _takes_inplace(function) else forms


def _takes_inplace(function: Callable[..., Any]) -> bool:
    try:
        return "inplace" in inspect.signature(function).parameters
    except ValueError:  # built in
        return False


def _elementwise_cases() -> Iterator[Case]:
    alike = ["full_like", "ones_like", "zeros_like"]
    names = [*pointwise._NAMES, *(f"{name}_" for name in pointwise._NAMES), *pointwise._UNDIFFERENTIABLE, *alike]
    for name in names:
        forms = partial(_forms, name.removesuffix("_"))
        for space, family in ((torch, "torch"), (F, "F")):
            if function := getattr(space, name, None):
                yield _elementwise(f"{family}.{name}", name, function, forms(function))
        if hasattr(torch.Tensor, name):
            method = partial(_method, name)
            yield _elementwise(f".{name}", name, method, forms(method))
    for name in "eq ge gt le lt ne and_ or_ xor iadd isub imul itruediv ifloordiv imod ipow".split():
        yield _elementwise(f"operator.{name}", name, getattr(operator, name), _binary(name))
    for name in "iadd isub imul itruediv imod ipow".split():
        # As a node, which a graph has that was made by others, or by an older fxstream.
        yield Case(f"operator.{name} as a node", getattr(operator, name), args=(2.5,))
    for name in "floordiv mod".split():
        yield _elementwise(f"operator.{name}", name, getattr(operator, name), _binary(name))
    yield Case("tensor // image", lambda x: CONSTANT // x.detach())
    signs = CONSTANT > 0
    yield Case("tensor & image", lambda x: (signs & (x > 0), signs | (x > 0), signs ^ (x > 0)))
    for name in "add mul pow sub truediv".split():
        swapped: list[Form] = [lambda f, x, y: f(2.0, x), lambda f, x, y: f(CONSTANT, x)]
        yield _elementwise(f"operator.{name}", name, getattr(operator, name), _binary(name) + swapped)
    for name in "abs invert neg".split():
        yield _elementwise(f"operator.{name}", name, getattr(operator, name), [lambda f, x, y: f(x)])


ELEMENTWISE_CASES = list(_elementwise_cases())

# Activations as modules.

ACTIVATION_CASES = [
    *(
        _call(activation)
        for activation in (
            nn.CELU(),
            nn.CELU(0.5, inplace=True),
            nn.ELU(),
            nn.ELU(0.5, inplace=True),
            nn.GELU(),
            nn.GELU("tanh"),
            nn.Hardshrink(0.2),
            nn.Hardsigmoid(),
            nn.Hardsigmoid(inplace=True),
            nn.Hardswish(inplace=True),
            nn.Hardtanh(),
            nn.Hardtanh(-0.2, 0.6, inplace=True),
            nn.LeakyReLU(),
            nn.LeakyReLU(0.3, inplace=True),
            nn.LogSigmoid(),
            nn.Mish(inplace=True),
            nn.PReLU(),
            nn.PReLU(4),
            nn.RReLU(0.1, 0.5),
            nn.RReLU(inplace=True),
            nn.ReLU(),
            nn.ReLU(inplace=True),
            nn.ReLU6(inplace=True),
            nn.SELU(inplace=True),
            nn.SiLU(),
            nn.SiLU(inplace=True),
            nn.Sigmoid(),
            nn.Softplus(2.0, 0.5),
            nn.Softshrink(0.2),
            nn.Softsign(),
            nn.Tanh(),
            nn.Tanhshrink(),
            nn.Threshold(0.2, -1.0, inplace=True),
        )
    ),
    _call(F.rrelu, 0.1, 0.5),
    _call(F.rrelu, 0.1, 0.5, False, True),
    *(_call(f, torch.zeros(size)) for f, size in product((F.prelu, torch.prelu, "prelu"), (1, 4))),
    *_named(
        {
            "torch.where": lambda x: (torch.where(x > 0, x, x * 2), torch.where(x > 0, 1.0, x)),
            ".where": lambda x: (x.where(x > 0.5, CONSTANT), (x * 2).where(CONSTANT > 1, x)),
            "where of constants": lambda x: torch.where(x < CONSTANT, CONSTANT[0], 2.0) * x,
        }
    ),
]


class ByName(nn.Module):
    """Calls by a global name, which torch.fx records as such: `F.tanh(x)` becomes `x.tanh()`."""

    def forward(self, image: torch.Tensor) -> Any:
        return tanh(image), sigmoid(image)


ACTIVATION_CASES.append(Case("by name", ByName()))


def _parameters(cases: Iterable[Case]) -> list[Any]:
    return [pytest.param(case, id=str(case), marks=case.marks) for case in cases]


CASES = [
    *CONV_CASES,
    *POOL_CASES,
    *PAD_CASES,
    *SAME_CASES,
    *RESAMPLING_CASES,
    *SHUFFLE_CASES,
    *NORM_CASES,
    *REDUCTION_CASES,
    *SHAPE_CASES,
    *SIZE_CASES,
    *MADE_CASES,
    *WINDOW_CASES,
    *EINOPS_CASES,
    *INDEX_CASES,
    *WRITE_CASES,
    *PRODUCT_CASES,
    *OTHER_CASES,
    *CAST_CASES,
    *(
        replace(case, marks=(*case.marks, pytest.mark.slow)) if index % 3 else case
        for index, case in enumerate(ELEMENTWISE_CASES)  # the slow ones have the same rule
    ),
    *ACTIVATION_CASES,
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about arguments on purpose odd
@pytest.mark.parametrize("case", [pytest.param(case, id=str(case), marks=case.marks) for case in CASES])
@pytest.mark.parametrize("part", [1 / 3, pytest.param(1, marks=pytest.mark.slow)], ids=["some trials", "all trials"])
def test_rule(case: Case, part: float) -> None:
    _prepare(case.op)
    check = partial(check_op, case.op, case.shape, args=case.args, kwargs=case.kwargs, axes=case.axes)
    seed = crc32(str(case).encode())  # other sizes, axes and tiles for every case, the same in every run
    trials = math.ceil(part * case.trials)
    if not case.fixed:
        check(trials=trials, seed=seed)
        return
    for trial in range(trials):
        check(trials=1, seed=seed + trial)


def _prepare(op: Op) -> None:
    """Eval mode, and values of parameters and running statistics that matter."""
    if isinstance(op, nn.Module):
        randomise(op.eval())
        for buffer in op.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)


def test_every_built_in_rule_has_a_case() -> None:
    reached = {key for case in CASES for key in _reached(case)}
    reached |= {torch.rand_like, torch.randn_like}  # never the same twice: see test_randomness.py
    reached |= {operator.ifloordiv}  # cannot be differentiated as a node, which check_op would have to do
    missing = [key for key, rule in _RULES.items() if _is_built_in(rule.function) and key not in reached]
    assert not missing, f"no case reaches the rules of {missing}"


def _is_built_in(function: Callable[..., Any]) -> bool:
    """Tests of other modules register rules as users do, and may have run before."""
    return (function.func if isinstance(function, partial) else function).__module__.startswith("fxstream.")


def _reached(case: Case) -> Iterator[Any]:
    """The keys of the registry under which the traced graph of a case is looked up."""
    key = type(case.op) if isinstance(case.op, nn.Module) else case.op
    if key in _RULES:  # check_op makes one node of it
        yield key
        return
    if case.label.startswith("torch.") and isinstance(case.op, With) and case.op.function is _calls:
        yield case.op.args[0]  # operators are recorded by other names
        return
    if isinstance(case.op, nn.Module):
        case.op.eval()
    traced = traced_with_example(_as_module(case.op, case.args, dict(case.kwargs)), None, None, freeze_batchnorm=False)
    for node in traced.graph.nodes:
        if not node.op.startswith("call"):
            continue
        target = node.target if node.op != "call_module" else type(traced.module_of(node))
        by_name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
        yield target if target in _RULES else by_name


# What check_op finds: rules that are wrong, and operations that are not streamed.


AROUND = Sliding(kernel=3, before=1, after=1)


class Smooth(nn.Module):
    """The mean of the 3 x 3 pixels around each, zeros around the image, times a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(image, 3, 1, 1) * self.weight


class Mirrored(nn.Module):
    """Rows in reverse order."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(2)


class Reflected(nn.Module):
    """The image itself, if it has more than 3 rows and columns."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return F.pad(image, (3, 3, 3, 3), "reflect")[..., 3:-3, 3:-3]


@pytest.fixture
def _own_rules() -> Iterator[None]:
    """Rules that a test registers are gone after it."""
    before = dict(_RULES)
    yield
    _RULES.clear()
    _RULES.update(before)


def _smooth(window: Sliding = AROUND, trained: bool = True, detached: bool = False) -> Callable[..., Local]:
    """A rule of Smooth, right by default."""

    def rule(m: Any, input: Value) -> Local:
        weight = m.weight if trained else m.weight.detach()

        def run(block: torch.Tensor, weight: torch.Tensor, *spans: Span) -> torch.Tensor:
            factor = weight.detach() if detached else weight
            return F.avg_pool2d(fit(block, spans, window.border), (window.kernel, 3), 1) * factor

        return Local((input, weight), input.dims, run, {2: window, 3: AROUND})

    return rule


def _smooth_blocks(m: Any, input: Value) -> Local:
    """A rule of Smooth that takes each block for an image of its own."""

    def run(block: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        smooth: torch.Tensor = m.with_tensors({"weight": weight})(block)
        return smooth

    return Local((input, m.weight), input.dims, run)


def _blockwise(function: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[..., Local]:
    """The rule of an operation that is element-wise, as which others may be declared by mistake."""
    return lambda m, input: Local((input,), input.dims, partial(function, m))


@pytest.mark.usefixtures("_own_rules")
def test_right_rule_of_ones_own_passes() -> None:
    register(Smooth, spatial=2)(_smooth())
    check_op(Smooth(), PLANE)


@pytest.mark.usefixtures("_own_rules")
@pytest.mark.parametrize(
    ("op", "rule", "message"),
    [
        pytest.param(Smooth, _smooth_blocks, "output 0: relative error", id="no window"),
        pytest.param(Smooth, _blockwise(Smooth.forward), r"computes with a tensor itself \(mul\)", id="a closure"),
        pytest.param(Smooth, _smooth(Sliding(2, before=1)), "output 0: relative error", id="window too small"),
        pytest.param(Smooth, _smooth(Sliding(3, before=0, after=2)), "output 0: relative error", id="window shifted"),
        pytest.param(
            Smooth, _smooth(Sliding(3, before=1, after=1, border="replicate")), "output 0: relative error", id="border"
        ),
        pytest.param(Smooth, _smooth(trained=False), r"computes with a tensor itself \(detach\)", id="a parameter"),
        pytest.param(Smooth, _smooth(detached=True), "gradient of op.op.weight", id="gradient of a parameter"),
        pytest.param(Mirrored, _blockwise(Mirrored.forward), "output 0: relative error", id="order of rows"),
        pytest.param(
            Reflected, _blockwise(lambda m, block: block), "accepted, while the dense operation fails", id="sizes"
        ),
    ],
)
def test_wrong_rule_is_found(op: type[nn.Module], rule: Callable[..., Local], message: str) -> None:
    register(op, spatial=2)(rule)
    with pytest.raises(AssertionError, match=message):
        check_op(op(), PLANE)


def test_operation_without_a_rule_is_reported() -> None:
    with pytest.raises(AssertionError, match="fft_fft has no streaming rule"):
        check_op(With(torch.fft.fft), PLANE)


def test_operation_that_is_not_local_is_reported() -> None:
    with pytest.raises(AssertionError, match="takes the cumulative sum along the streamed H"):
        check_op(torch.cumsum, PLANE, args=(2,), axes="H")


def test_registered_function_takes_tensors() -> None:
    check_op(F.conv2d, PLANE, args=(nn.Parameter(torch.ones(3, 4, 2, 2)),), kwargs={"bias": torch.ones(3)})


def test_results_of_max_have_names() -> None:
    class Max(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return (x * 2).max(1)

    image = torch.randn(PLANE)
    got, expected = fxstream.convert(Max(), 3, example_input=image)(image), Max()(image)
    assert torch.equal(got.values, expected.values)
    assert torch.equal(got.indices, expected.indices)
