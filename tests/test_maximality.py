"""Maximality: what a rule refuses because it spans a streamed axis truly does, and streams where that axis is whole.

A case is an operation of which a rule says that it combines positions of one axis. Three things are shown: where that
axis alone is streamed, the operation is what ends the streamed part, for the reason stated; in plain torch its output
at one position changes with the input at another far away; and it streams, exactly, along every axis that it does not
span.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import assert_exact, handed_over, randomise
from torch import nn
from torchvision.ops import DeformConv2d

import fxstream
from fxstream.geometry.axes import axis_names
from fxstream.graph.findings import Finding
from fxstream.testing import head, stops_along

LONG = 68
"""Positions along the axis in question, which halves exactly; no window here is as large."""
HALF = LONG // 2
SHAPES = {"N": (LONG, 4, 3, 4), "H": (2, 4, LONG, 5), "W": (2, 4, 5, LONG), "L": (2, 4, LONG), "D": (2, 4, LONG, 4, 3)}
DIMS = {"N": 0, "H": 2, "W": 3, "L": 2, "D": 2}
NO_AXIS = (None, -1)
"""For `Case.probe`: the output lacks the axis, and the first of its elements depends on the last position."""

Operation = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Case:
    """An operation on a value of four channels that spans an axis."""

    name: str
    axis: str
    operation: Operation
    reason: str
    """What fxstream says of it, behind its name; {} stands for the axis."""
    free: str = ""
    """The axes along which it is local."""
    probe: tuple[int | None, int] = (0, -1)
    """The output at the first of these positions depends on the input at the second."""
    shape: tuple[int, ...] | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.shape or SHAPES[self.axis]

    def __str__(self) -> str:
        return f"{self.axis}-{self.name}"


TRAINING = "is in training mode and needs the mean and variance over the streamed axes {}"
INSTANCE = "needs the mean and variance over the streamed axes {}"
LAYER = "takes the mean and variance along the streamed {}"
SOFTMAX = "takes the softmax along the streamed {}"
SUM = "sums over positions along the streamed {}"
BEFORE = "attends to what comes before along the streamed {}"
APART = "whose streamed axes are not aligned"


# Operations of several steps.


def _squeeze_excite(x: torch.Tensor) -> torch.Tensor:
    return x * x.mean((2, 3), keepdim=True).sigmoid()


def _max_gate(x: torch.Tensor) -> torch.Tensor:
    return x * F.adaptive_max_pool2d(x, 1).sigmoid()


def _attention(x: torch.Tensor) -> torch.Tensor:
    """Among the rows of each column."""
    y = x.permute(0, 3, 2, 1)
    return ((y @ y.transpose(-2, -1)).softmax(-1) @ y).permute(0, 3, 2, 1)


def _fused_attention(x: torch.Tensor, causal: bool = False) -> torch.Tensor:
    y = x.permute(0, 3, 2, 1)
    return F.scaled_dot_product_attention(y, y, y, is_causal=causal).permute(0, 3, 2, 1)


def _causal_attention(x: torch.Tensor) -> torch.Tensor:
    return _fused_attention(x, causal=True)


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.transpose(1, 2)
        return self.attention(y, y, y, need_weights=False)[0].transpose(1, 2)


def _similarities(x: torch.Tensor) -> torch.Tensor:
    z = F.normalize(x.flatten(1), dim=1)
    return z @ z.transpose(0, 1)


def _differences(x: torch.Tensor) -> torch.Tensor:
    return (x.unsqueeze(0) - x.unsqueeze(1)).abs()


class _AsChannels(nn.Module):
    """A module whose channels are the rows (2) or the images (0)."""

    def __init__(self, dim: int, module: nn.Module):
        super().__init__()
        self.dim = dim
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x.transpose(1, self.dim)).transpose(1, self.dim)


# What spans the axis, by family.


def _statistics(axis: str) -> list[Case]:
    """Batch norms without fixed statistics span every axis but the channels."""
    without = "has no running statistics and needs the mean and variance over the streamed axes {}"
    return [
        Case("BatchNorm2d", axis, nn.BatchNorm2d(4), TRAINING),
        Case("batch_norm", axis, lambda x: F.batch_norm(x, None, None, training=True), TRAINING),
        Case("BatchNorm2d without statistics", axis, nn.BatchNorm2d(4, track_running_stats=False).eval(), without),
    ]


def _of_an_image(axis: str) -> list[Case]:
    """What takes each image as a whole."""
    groups = "takes the mean and variance of groups along the streamed {}"
    pool = "pools over the whole image along {}"
    sizes = SHAPES[axis][1:]
    return [
        Case("InstanceNorm2d", axis, nn.InstanceNorm2d(4, affine=True), INSTANCE, "N"),
        Case("GroupNorm", axis, nn.GroupNorm(2, 4), groups, "N"),
        Case("group_norm", axis, lambda x: F.group_norm(x, 1), groups, "N"),
        Case("LayerNorm", axis, nn.LayerNorm(sizes), LAYER, "N"),
        Case("layer_norm", axis, lambda x: F.layer_norm(x, sizes[1:]), LAYER, "N"),
        Case("AdaptiveAvgPool2d", axis, nn.AdaptiveAvgPool2d(1), pool, "N"),
        Case("AdaptiveMaxPool2d", axis, nn.AdaptiveMaxPool2d((1, 1)), pool, "N"),
        Case("adaptive_avg_pool2d", axis, lambda x: F.adaptive_avg_pool2d(x, 1), pool, "N"),
        Case("gate of adaptive_max_pool2d", axis, _max_gate, pool, "N"),
        Case("squeeze-excite", axis, _squeeze_excite, "takes the mean along the streamed {}", "N"),
        # Its windows grow with the image: the first of two sees all up to the middle.
        Case("AdaptiveAvgPool2d(2)", axis, nn.AdaptiveAvgPool2d(2), pool, "N", (0, HALF - 1)),
    ]


def _over(axis: str, free: str) -> list[Case]:
    """What is told the dimension that it spans."""
    dim = DIMS[axis]
    norm = "takes the norm along the streamed {}"
    total = "takes the cumulative sum along the streamed {}"
    gate = "gates one half with the other along the streamed {}"
    apart = "cuts the streamed axis {} apart"
    joined = "concatenates along the streamed axis {}"
    return [
        Case("Softmax", axis, nn.Softmax(dim), SOFTMAX, free),
        Case("LogSoftmax", axis, nn.LogSoftmax(dim), SOFTMAX, free),
        Case("softmax", axis, lambda x: F.softmax(x, dim), SOFTMAX, free),
        Case("log_softmax", axis, lambda x: x.log_softmax(dim), SOFTMAX, free),
        Case("normalize", axis, lambda x: F.normalize(x, dim=dim), norm, free),
        *_reductions(axis, free),
        # Only what comes before counts: the last position sees the first.
        Case("cumsum", axis, lambda x: x.cumsum(dim), total, free, (-1, 0)),
        # The first of the second half gates the first.
        Case("GLU", axis, nn.GLU(dim), gate, free, (0, HALF)),
        Case("glu", axis, lambda x: F.glu(x, dim), gate, free, (0, HALF)),
        # The first of the second part comes from the middle. They have no free axes: the number of parts is not known.
        Case("chunk", axis, lambda x: x.chunk(2, dim)[1], apart, probe=(0, HALF)),
        Case("split", axis, lambda x: torch.split(x, HALF, dim)[1], apart, probe=(0, HALF)),
        Case("unbind", axis, lambda x: x.unbind(dim)[-1], apart, probe=NO_AXIS),
        # The second copy begins behind all of the first.
        Case("cat", axis, lambda x: torch.cat([x, x], dim), joined, free, (LONG, 0)),
    ]


def _reductions(axis: str, free: str) -> list[Case]:
    def case(name: str) -> Case:
        reason = f"takes the {name} along the streamed {axis}"
        return Case(name, axis, lambda x: getattr(torch, name)(x, DIMS[axis], keepdim=True), reason, free)

    return [case(name) for name in ("amax", "amin", "logsumexp", "mean", "std", "sum", "var")]


def _over_channels(axis: str, free: str) -> list[Case]:
    """What combines channels, and finds the streamed axis in their place."""
    dim = DIMS[axis]
    mixes, shuffles = "mixes channels along the streamed axis {}", "has its channels along the streamed axis {}"
    neighbours = "combines neighbouring positions along the streamed {}"
    cases = [
        ("Conv2d", nn.Conv2d(LONG, 2, 1), mixes, (0, -1)),
        ("ConvTranspose2d", nn.ConvTranspose2d(LONG, 2, 1), mixes, (0, -1)),
        # Each position sees as many neighbours as it is told to: here all.
        ("LocalResponseNorm", nn.LocalResponseNorm(2 * LONG, 1.0), neighbours, (0, -1)),
        # The second position comes from the middle.
        ("ChannelShuffle", nn.ChannelShuffle(2), shuffles, (1, HALF)),
    ]
    return [Case(name, axis, _AsChannels(dim, module), reason, free, probe) for name, module, reason, probe in cases]


class _Deformed(nn.Module):
    """Each position sees the one that is as far away along an axis as the image is long."""

    def __init__(self, axis: str) -> None:
        super().__init__()
        self.conv = DeformConv2d(4, 4, 1)
        self.shift = nn.Buffer(torch.tensor([axis == "H", axis == "W"]).view(2, 1, 1) * (LONG - 1.0))

    def forward(self, x: torch.Tensor) -> Any:
        return self.conv(x, x[:, :2] * 0 + self.shift)


def _around(axis: str) -> list[Case]:
    """Borders that are those on the other side."""
    reason = "pads in mode 'circular', which reads rows from the opposite border"
    pads = {"H": (0, 0, 1, 1), "W": (1, 1)}[axis]
    return [
        Case("circular Conv2d", axis, nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), reason),
        Case("circular pad", axis, lambda x: F.pad(x, (*pads, *(0,) * (4 - len(pads))), mode="circular"), reason),
    ]


def _mirrored(axis: str) -> list[Case]:
    """Each position meets the one that mirrors it at the diagonal."""
    square = (2, 4, LONG, LONG)
    cases: list[tuple[str, Operation, str]] = [
        ("add", lambda x: x + x.transpose(2, 3), f"combines values {APART}"),
        ("cat", lambda x: torch.cat([x, x.transpose(2, 3)], 1), f"concatenates values {APART}"),
        ("stack", lambda x: torch.stack([x, x.transpose(2, 3)], -1), f"stacks values {APART}"),
    ]
    return [Case(f"{name} mirrored", axis, operation, reason, "N", shape=square) for name, operation, reason in cases]


CASES = [
    *(case for axis in "NHW" for case in _statistics(axis)),
    *(case for axis in "HW" for case in [*_of_an_image(axis), *_around(axis), *_mirrored(axis)]),
    *(case for axis, free in (("N", "HW"), ("H", "NW"), ("W", "NH")) for case in _over(axis, free)),
    *(case for axis, free in (("N", "HW"), ("H", "NW"), ("W", "NH")) for case in _over_channels(axis, free)),
    Case("Linear", "W", nn.Linear(LONG, 3), "mixes all positions along the streamed {}", "NH"),
    Case("Linear", "L", nn.Linear(LONG, 3), "mixes all positions along the streamed {}", "N"),
    Case("LayerNorm of a row", "W", nn.LayerNorm(LONG), LAYER, "NH"),
    Case("Softmax2d", "H", _AsChannels(2, nn.Softmax2d()), SOFTMAX, "NW"),
    Case("mean of everything", "H", torch.mean, "takes the mean along the streamed {}", probe=NO_AXIS),
    Case("sum of everything", "N", lambda x: x.sum(), "takes the sum along the streamed {}", probe=NO_AXIS),
    Case("BatchNorm1d of features", "N", nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48)), TRAINING),
    Case("BatchNorm1d", "L", nn.BatchNorm1d(4), TRAINING),
    Case("BatchNorm3d", "D", nn.BatchNorm3d(4), TRAINING),
    Case("InstanceNorm1d", "L", nn.InstanceNorm1d(4), INSTANCE, "N"),
    Case("InstanceNorm3d", "D", nn.InstanceNorm3d(4), INSTANCE, "N"),
    Case("attention", "H", _attention, f"sums over values {APART}", "NW"),
    Case("fused attention", "H", _fused_attention, f"attends over values {APART}", "NW"),
    Case("causal attention", "H", _causal_attention, BEFORE, "NW", (-1, 0)),
    Case("MultiheadAttention", "L", _SelfAttention(), f"attends over values {APART}", "N"),
    Case("similarities", "N", _similarities, f"sums over values {APART}"),
    Case("differences", "N", _differences, f"combines values {APART}", "HW"),
    Case("matmul", "H", lambda x: x.transpose(2, 3) @ x, SUM, "N", NO_AXIS),
    Case("einsum", "H", lambda x: torch.einsum("nchw,nchv->ncwv", x, x), SUM, "N", NO_AXIS),
    *(Case("DeformConv2d", axis, _Deformed(axis), "reads positions that its offsets choose", "N") for axis in "HW"),
    Case("flip", "H", lambda x: x.flip(2), "mirrors the streamed {}", "NW"),
    Case("roll", "W", lambda x: torch.roll(x, 1, 3), "moves positions around the end of the streamed {}", "NH"),
]


# The three things shown of every case.


class Behind(nn.Module):
    """An operation behind a convolution that is local along every axis."""

    def __init__(self, operation: Operation, spatial: int):
        super().__init__()
        # Without a bias, whose gradient would be 0 but for rounding behind a softmax or a norm.
        self.conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial](4, 4, 1, bias=False)
        self.operation = operation

    def forward(self, x: torch.Tensor) -> Any:
        return self.operation(self.conv(x))


def model_of(case: Case) -> nn.Module:
    return randomise(Behind(copy.deepcopy(case.operation), len(case.sizes) - 2))


def tile_shape(case: Case, axis: str, size: int) -> tuple[int | None, ...]:
    """Streams one axis alone."""
    return tuple(size if name == axis else None for name in axis_names(len(case.sizes) - 2))


def stops(model: nn.Module, case: Case) -> list[Finding]:
    """Where streaming along the case's axis alone ends."""
    return stops_along(model, (case.axis,), len(case.sizes) - 2)


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_spans_a_streamed_axis_ends_the_streamed_part(case: Case) -> None:
    model = model_of(case)
    (stop,) = stops(model, case)
    assert stop.reason.startswith(f"{stop.label} {case.reason.format(case.axis)}")
    converted = fxstream.convert(model, tile_shape(case, case.axis, 8), prove=False)
    # What is accumulated tile by tile is all that the head gets.
    got = handed_over(converted) if stop.status == "total" else head(converted)[:1]
    assert got == [stop.node.name]
    assert "conv" in [node.name for node in converted.streamed.graph.nodes]


def change(operation: Operation, sizes: tuple[int, ...], dim: int, position: int | None, source: int) -> float:
    """By how much the output at one position along a dimension changes with a pixel of the input at another."""
    run = randomise(copy.deepcopy(operation)).double() if isinstance(operation, nn.Module) else operation
    x = torch.randn(sizes, dtype=torch.float64)
    pixel = tuple(source if index == dim else 0 for index in range(x.dim()))
    outputs = []
    # A maximum changes with a pixel that becomes greater than all, and a minimum with one that becomes less.
    for value in (x[pixel].item(), 10.0, -10.0):
        x[pixel] = value
        output = run(x).detach()
        outputs.append((output.flatten()[0] if position is None else output.select(dim, position)).clone())
    return max((output - outputs[0]).abs().max().item() for output in outputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_depends_on_what_is_far_away(case: Case) -> None:
    assert change(case.operation, case.sizes, DIMS[case.axis], *case.probe) > 1e-12


@pytest.mark.parametrize(("case", "axis"), [(case, axis) for case in CASES for axis in case.free], ids=str)
def test_it_streams_along_an_axis_that_it_does_not_span(case: Case, axis: str) -> None:
    size = 2 if case.sizes[DIMS[axis]] > 2 else 1
    assert_exact(model_of(case), case.sizes, tile_shape(case, axis, size), whole=True)


# What is local along an axis: the probe finds nothing there.

LOCAL: list[tuple[str, Operation, str]] = [
    ("Conv2d", nn.Conv2d(4, 4, 3, padding=1), "NHW"),
    ("MaxPool2d", nn.MaxPool2d(3, 2), "NHW"),
    ("BatchNorm2d", nn.BatchNorm2d(4).eval(), "NHW"),
    ("softmax of channels", lambda x: x.softmax(1), "NHW"),
    ("LayerNorm of channels", lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2), "NHW"),
    ("GroupNorm", nn.GroupNorm(2, 4), "N"),
    ("softmax of columns", lambda x: x.softmax(3), "NH"),
]


@pytest.mark.parametrize(
    ("operation", "axis"),
    [pytest.param(operation, axis, id=f"{axis}-{name}") for name, operation, axes in LOCAL for axis in axes],
)
def test_what_is_local_depends_on_nothing_far_away_and_streams(operation: Operation, axis: str) -> None:
    case = Case("", axis, operation, "")
    assert change(operation, case.sizes, DIMS[axis], 0, -1) == 0
    assert_exact(model_of(case), case.sizes, tile_shape(case, axis, 8), whole=True)


@pytest.mark.parametrize("name", ["flip", "roll", "circular pad", "circular Conv2d", "DeformConv2d"])
def test_the_way_out_of_what_is_local_along_other_axes_is_to_stream_these(name: str) -> None:
    for case in (case for case in CASES if case.name == name):
        (stop,) = stops(model_of(case), case)
        assert f"stream an axis other than {case.axis}, such as the batch" in stop.reason
        assert not stops_along(model_of(case), ("N",))
