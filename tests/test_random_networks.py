"""Random fully convolutional networks: whatever is built from streamable operations is streamed whole, and exactly.

A network is drawn as Python source, line by line, and every line is run as it is drawn: so sizes are known, and what
does not fit is not drawn. A failure prints the network, ready to be pasted into a test of its own.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from reference import freeze_batchnorms, randomise
from torch import nn
from torch.utils._pytree import tree_leaves

import fxstream
from fxstream.testing import compare, head, relative_error, run

Draw = Callable[[st.SearchStrategy[Any]], Any]
Shape = tuple[int, ...]
Line = str
Case = tuple["Network", Any, bool, tuple[int, int]]
EXAMPLES = int(os.environ.get("FXSTREAM_EXAMPLES", "2000"))


class _Plain(nn.Module):
    """What a drawn network is made from: it only holds what its lines define."""

    code: Any

    def forward(self, x: torch.Tensor) -> Any:
        names: dict[str, Any] = {"self": self, "x": x, "torch": torch, "F": F, "nn": nn}
        exec(self.code, names)
        return names["result"]


@dataclass
class Network:
    """A network as Python source."""

    shape: Shape
    init: list[Line] = field(default_factory=list)
    forward: list[Line] = field(default_factory=list)
    result: str = ""
    fails: bool = False
    """The last line does not work on an image of this shape."""
    fixed: bool = False
    """It holds tensors of the size of the image."""
    may_stop: bool = False
    """Something is overwritten of which there is a view: fxstream may leave that to the head."""

    def build(self) -> nn.Module:
        model = _Plain()
        for line in self.init:
            exec(line, {"self": model, "torch": torch, "nn": nn})
        model.code = compile("\n".join([*self.forward, f"result = {self.result}"]), "<network>", "exec")
        return randomise(model.double())

    def unused(self) -> bool:
        """Whether some line does not contribute to the result: it is not streamed, so it cannot fail either."""
        needed = set(re.findall(r"\bv\d+\b", self.result))
        for line in reversed(self.forward):
            words = re.findall(r"\bv\d+\b", line)
            if not needed.intersection(words[:1] if re.match(r"v\d+ .?=", line) else words):
                return True
            needed.update(words)
        return False

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        for line in ("", *str(self).splitlines(), ""):
            printer.text(line)
            printer.break_()

    def __str__(self) -> str:
        init = "".join(f"        {line}\n" for line in self.init)
        forward = "".join(f"        {line}\n" for line in self.forward)
        head = "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        flags = f"  # may_stop={self.may_stop} fails={self.fails}"
        return (
            f"{head}{init}\n    def forward(self, x):  # {self.shape}{flags}\n{forward}        return {self.result}\n"
        )


class Builder:
    """Draws a network line by line."""

    def __init__(self, draw: Draw, shape: Shape):
        self.draw = draw
        self.network = Network(shape)
        self.owner = nn.Module()
        self.names: dict[str, Any] = {
            "self": self.owner,
            "x": torch.zeros(shape, dtype=torch.double),
            "torch": torch,
            "F": F,
            "nn": nn,
        }
        self.values: list[str] = ["x"]
        self.views: list[str] = []
        self.modules: list[str] = []
        self.count = 0

    # Choices

    def integer(self, first: int, last: int) -> int:
        return int(self.draw(st.integers(first, last)))

    def choice(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def chance(self, one_in: int) -> bool:
        return bool(self.draw(st.sampled_from([False] * (one_in - 1) + [True])))

    def pair(self, first: int, last: int) -> Any:
        """One number, or one for each axis."""
        if self.draw(st.booleans()):
            return self.integer(first, last)
        return self.integer(first, last), self.integer(first, last)

    def value(self) -> str:
        """Mostly one of the latest values."""
        recent = self.values[-3:] if not self.chance(4) else self.values
        return str(self.choice(recent[::-1]))

    def overwritable(self) -> str | None:
        """A value that does not lie in the memory of the image."""
        names = [name for name in self.values if self.storage(name) != self.storage("x")]
        return str(self.choice(names[-4:][::-1])) if names else None

    def storage(self, name: str) -> int:
        return int(self.names[name].untyped_storage().data_ptr())

    def size(self, name: str) -> Shape:
        return tuple(self.names[name].shape)

    def partner(self, name: str, any_channels: bool = False) -> str | None:
        """Another value of the same size, to join it with."""
        _, c, h, w = self.size(name)
        fitting = [v for v in self.values if self.size(v)[2:] == (h, w) and (any_channels or self.size(v)[1] in (c, 1))]
        return str(self.choice(fitting)) if fitting else None

    # Lines

    def fresh(self, kind: str = "v") -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def attribute(self, kind: str, expression: str) -> str:
        """`self.kind = expression`; drawn lines are undone together with it, see `line`."""
        name = self.fresh(kind)
        line = f"self.{name} = {expression}"
        exec(line, self.names)
        if isinstance(getattr(self.owner, name), nn.Module):
            self.owner.double()
        self.network.init.append(line)
        return f"self.{name}"

    def parameter(self, *shape: int) -> str:
        if self.chance(4):
            name = self.fresh("b")
            line = f"self.register_buffer({name!r}, torch.linspace(-1, 1, {_product(shape)}).reshape({shape}))"
            exec(line, self.names)
            self.network.init.append(line)
            self.owner.double()
            return f"self.{name}"
        found = self.attribute("p", f"nn.Parameter(torch.zeros({shape}))")
        self.owner.double()
        return found

    def line(self, expression: str, comment: str = "", name: str | None = None, may_fail: bool = False) -> str | None:
        """`name = expression`, run at once; None if it does not work on this size."""
        named = name is not None
        name = name or self.fresh()
        try:
            with torch.no_grad():
                exec(f"{name} = {expression}", self.names)
            result = self.names[name]
            # A dilated max pooling whose window holds padding alone gives -inf, and corrupts memory in its backward.
            if result.dim() != 4 or not 0 < result.numel() < 40000 or not result.isfinite().all():
                raise RuntimeError("not a value to go on with")
        except (RuntimeError, ValueError, IndexError, NotImplementedError) as error:
            if may_fail and isinstance(error, RuntimeError) and "go on" not in str(error) and self.chance(3):
                self.network.forward.append(f"{name} = {expression}{comment}")
                self.values.append(name)
                self.network.fails = True
            return None
        self.network.forward.append(f"{name} = {expression}{comment}")
        if not named:
            self.values.append(name)
        return name

    def step(self) -> None:
        family = self.choice(_FAMILIES)
        kept = len(self.network.init)
        if family(self) is None and not self.network.fails:
            for line in self.network.init[kept:]:  # nothing uses what was made for a line that did not work
                delattr(self.owner, re.findall(r"\w+", line)[2 if "register" in line else 1])
            del self.network.init[kept:]
            self.modules = [name for name in self.modules if hasattr(self.owner, name.removeprefix("self."))]

    # Families of operations: each adds lines and returns the name of the value, or None

    def convolution(self) -> str | None:
        v = self.value()
        channels = self.size(v)[1]
        groups = self.choice([g for g in (1, 1, 2, 3) if channels % g == 0])
        out = groups * self.integer(1, 3)
        kernel = (self.integer(1, 4), self.integer(1, 4)) if self.chance(3) else (self.integer(1, 3),) * 2
        stride, dilation = self.stride(), self.choice([1, 1, 1, 2, 3, (1, 2), (2, 1)])
        padding: Any = self.choice(["'same'", "'valid'", "number", "number", "number", "half", "half", "over"])
        if padding == "number":
            padding = self.pair(0, 2)
        elif padding == "half":
            padding = (kernel[0] // 2, kernel[1] // 2)
        elif padding == "over":
            padding = self.pair(3, 7)
        if padding == "'same'":
            stride = 1
        if self.chance(3):
            weight, bias = self.weight(out, channels // groups, *kernel), "None"
            if self.chance(2):
                bias = self.parameter(out)
            call = f"F.conv2d({v}, {weight}, {bias}, {stride}, {padding}, {dilation}, {groups})"
            return self.line(call, may_fail=True)
        mode = self.choice(["zeros", "zeros", "reflect", "replicate"])
        module = self.attribute(
            "m",
            f"nn.Conv2d({channels}, {out}, {kernel}, {stride}, {padding}, {dilation}, {groups}, "
            f"bias={self.chance(2)}, padding_mode={mode!r})",
        )
        self.modules.append(module)
        return self.line(f"{module}({v})", may_fail=True)

    def weight(self, *shape: int) -> str:
        name = self.parameter(*shape)
        form = self.choice(["{0}", "{0}", "({0} - 0.5 * {0}.mean(dim=(1, 2, 3), keepdim=True))", "torch.tanh({0})"])
        return str(form.format(name))

    def stride(self) -> Any:
        return self.choice([1, 1, 1, 1, 2, 2, 3, 5, (1, 2), (2, 1), (3, 2)])

    def again(self) -> str | None:
        """A module that is used a second time."""
        return self.line(f"{self.choice(self.modules)}({self.value()})") if self.modules else None

    def half(self, kernel: Any) -> Shape:
        """A padding of at most half of the kernel, as poolings want it."""
        return tuple(self.integer(0, size // 2) for size in (kernel if isinstance(kernel, tuple) else (kernel,) * 2))

    def max_pool(self) -> str | None:
        v, kernel, dilation = self.value(), self.pair(1, 4), self.choice([1, 1, 2, 3, (1, 2)])
        stride = self.choice([None, 1, 1, 2, 2, 3, 5, (1, 2), (2, 1)])
        arguments = f"{kernel}, {stride}, {self.half(kernel)}, {dilation}, ceil_mode={self.chance(2)}"
        if self.chance(2):
            return self.line(f"F.max_pool2d({v}, {arguments})", may_fail=True)
        return self.line(f"{self.attribute('m', f'nn.MaxPool2d({arguments})')}({v})", may_fail=True)

    def average_pool(self) -> str | None:
        v, kernel, stride = self.value(), self.pair(1, 4), self.choice([None, 1, 1, 2, 2, 3, 5, (1, 2), (2, 1)])
        arguments = f"{kernel}, {stride}, {self.half(kernel)}, ceil_mode={self.chance(2)}"
        arguments += f", count_include_pad={self.chance(2)}, divisor_override={self.choice([None, None, 1, 5])}"
        if self.chance(2):
            return self.line(f"F.avg_pool2d({v}, {arguments})", may_fail=True)
        return self.line(f"{self.attribute('m', f'nn.AvgPool2d({arguments})')}({v})", may_fail=True)

    def batch_norm(self) -> str | None:
        v = self.value()
        return self.line(f"{self.attribute('m', f'nn.BatchNorm2d({self.size(v)[1]}, affine={self.chance(2)})')}({v})")

    def activation(self) -> str | None:
        kind, overwrites = self.choice(_ACTIVATIONS), self.chance(3)
        if kind == "PReLU":
            v = self.value()
            return self.line(f"{self.attribute('m', f'nn.PReLU({self.choice([1, self.size(v)[1]])})')}({v})")
        options = "0.1, -0.5" if kind == "Threshold" else ""
        if overwrites and kind in _WITH_INPLACE:
            v = self.overwritable()
            module = self.attribute("m", f"nn.{kind}({options + ', ' if options else ''}inplace=True)")
            return v and self.overwrite(v, f"{module}({v})")
        return self.line(f"{self.attribute('m', f'nn.{kind}({options})')}({self.value()})")

    def elementwise(self) -> str | None:
        return self.line(self.choice(_ELEMENTWISE).format(self.value()))

    def with_constant(self) -> str | None:
        """Arithmetic with a parameter or a buffer, which may have the size of the whole value."""
        v = self.value()
        n, c, h, w = self.size(v)
        shapes = [(1, c, 1, 1), (c, 1, 1), (1,), (1, c, h, w), (c, h, w), (h, w), (1, 1, h, 1), (w,), (n, c, h, w)]
        shape = self.choice([*shapes, (n, 1, 1, 1)])
        self.network.fixed |= shape not in shapes[:3]
        return self.line(self.choice(_WITH_CONSTANT).format(v, self.parameter(*shape)))

    def joined(self) -> str | None:
        v = self.value()
        u = self.partner(v)
        return u and self.line(self.choice(_JOINED).format(v, u), f"  # joins {v} {u}")

    def concatenated(self) -> str | None:
        v = self.value()
        n, _, h, w = self.size(v)
        parts = [v]
        for _ in range(self.integer(1, 2)):
            parts.append(self.partner(v, any_channels=True) or v)
        if self.chance(6):
            self.network.fixed = True
            parts.insert(self.integer(0, 2), self.parameter(n, 1, h, w))
        return self.line(f"torch.cat([{', '.join(parts)}], {self.choice(['1', 'dim=1', '-3'])})")

    def cropped_and_joined(self) -> str | None:
        """Two values of different sizes, the greater one cropped."""
        v, u = self.value(), self.value()
        (h, w), (k, l) = self.size(v)[2:], self.size(u)[2:]  # noqa: E741
        if (h, w) == (k, l) or h < k or w < l:
            return None
        top, left = self.integer(0, h - k), self.integer(0, w - l)
        bottom, right = h - k - top, w - l - left
        if self.chance(2):
            crop = f"F.pad({v}, (-{left}, -{right}, -{top}, -{bottom}))"
        else:
            crop = f"{v}[..., {top}:{-bottom or None}, {left}:{-right or None}]"
        cropped = self.viewed(crop)
        return cropped and self.line(f"torch.cat([{cropped}, {u}], 1)")

    def padded(self) -> str | None:
        v, mode = self.value(), self.choice(["constant", "constant", "reflect", "replicate"])
        least = -3 if mode == "constant" or self.chance(4) else 0
        amounts = tuple(self.integer(least, 3) for _ in range(4))
        # Cropping more rows than there are fails in torch even if rows are added on the other side.
        failing = min(amounts) >= 0
        self.network.fixed |= amounts[0] * amounts[1] < 0 or amounts[2] * amounts[3] < 0
        if self.chance(3):
            kind = {"constant": "ConstantPad2d", "reflect": "ReflectionPad2d", "replicate": "ReplicationPad2d"}[mode]
            value = f", {self.choice([0.0, -1.5])}" if mode == "constant" else ""
            return self.line(f"{self.attribute('m', f'nn.{kind}({amounts}{value})')}({v})", may_fail=failing)
        if mode == "constant":
            call = f"F.pad({v}, {self.choice([amounts, amounts[:2]])}, value={self.choice([0.0, 0.5])})"
        else:
            call = f"F.pad({v}, {amounts}, {mode!r})"
        return self.line(call, may_fail=failing)

    def sliced(self) -> str | None:
        v = self.value()
        c = self.size(v)[1]
        first = self.integer(0, c - 1)
        index = self.choice(
            [
                f"[:, {first}:{self.integer(first + 1, c)}]",
                f"[:, {first}].unsqueeze(1)",
                f"[:, {-1 - first}][:, None]",
                "[:, ::2]",
                f"[:, :, {self.integer(0, 3)}:, {self.integer(0, 2)}:-{self.integer(1, 3)}]",
                f"[..., {self.integer(0, 2)}::{self.integer(1, 4)}]",
                f"[:, :, ::{self.integer(1, 4)}, 1:-1:2]",
            ]
        )
        return self.viewed(f"{v}{index}")

    def same(self) -> str | None:
        """What returns its input."""
        v = self.value()
        if self.chance(2):
            return self.viewed(f"{self.choice(['{}.contiguous()', '{}.double()', '{}.detach()']).format(v)}")
        return self.viewed(f"{self.attribute('m', self.choice(['nn.Identity()', 'nn.Dropout(0.5).eval()']))}({v})")

    def viewed(self, expression: str) -> str | None:
        name = self.line(expression)
        if name:
            self.views.append(name)
        return name

    def overwritten(self) -> str | None:
        v = self.overwritable()
        if v is None:
            return None
        u = self.partner(v)
        form = self.choice(_OVERWRITING)
        if "{1}" in form and u is None:
            return None
        if self.chance(3):
            u = self.parameter(1, self.size(v)[1], 1, 1)
        elif u is not None and self.size(u) != self.size(v) and self.storage(u) == self.storage(v):
            return None  # reads what it overwrites: what torch computes then depends on its loops
        return self.overwrite(v, form.format(v, u), f"  # joins {v} {u}" if u in self.values and "{1}" in form else "")

    def overwrite(self, v: str, expression: str, comment: str = "") -> str | None:
        """An in-place operation: a statement such as `v += u`, or an expression whose result may get a name."""
        shares = [name for name in self.views if self.storage(name) == self.storage(v)]
        if "= " in expression.split("(")[0]:
            done = self.statement(v, expression, comment)
        elif self.chance(2):
            done = self.line(expression, comment)
        elif self.chance(2):
            done = self.line(expression, comment, name=v)
        else:
            done = self.statement(v, expression, comment)
        if done and shares:
            self.network.may_stop = True
        return done

    def statement(self, v: str, statement: str, comment: str) -> str | None:
        try:
            with torch.no_grad():
                exec(statement, self.names)
        except RuntimeError:
            return None
        self.network.forward.append(f"{statement}{comment}")
        return v

    def finish(self) -> Network:
        if self.network.fails:
            self.network.result = self.values[-1]
            return self.network
        used = " ".join(line.split("=", 1)[-1] for line in self.network.forward)
        results = [name for name in self.values[1:] if not re.search(rf"\b{name}\b", used)] if self.chance(2) else []
        results += [self.values[-1], *(self.value() for _ in range(self.choice([0, 0, 1, 2])))]
        results = list(dict.fromkeys(results))
        form = self.choice(["{}", "{}", "({},)", "dict(a={}, b=[{}])"]) if len(results) == 1 else "({})"
        self.network.result = form.replace("{}", ", ".join(results))
        return self.network


_FAMILIES = (
    [Builder.convolution] * 6
    + [Builder.max_pool, Builder.average_pool, Builder.activation, Builder.with_constant, Builder.joined] * 2
    + [Builder.overwritten] * 4
    + [Builder.concatenated, Builder.cropped_and_joined, Builder.padded, Builder.sliced] * 2
    + [Builder.batch_norm, Builder.elementwise, Builder.same, Builder.again]
)
_WITH_INPLACE = "CELU ELU Hardsigmoid Hardswish Hardtanh LeakyReLU Mish ReLU ReLU6 RReLU SELU SiLU Threshold".split()
_ACTIVATIONS = [
    *_WITH_INPLACE,
    *"GELU Hardshrink LogSigmoid PReLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink".split(),
]
_ELEMENTWISE = [
    "F.relu({})",
    "F.gelu({}, approximate='tanh')",
    "F.leaky_relu({}, negative_slope=0.2)",
    "F.silu({})",
    "torch.tanh({})",
    "{}.sigmoid()",
    "{}.clamp(-1, 1.5)",
    "torch.clamp({}, min=-0.3)",
    "1.5 - {}",
    "-{}",
    "2 / (1 + {0}.abs())",
    "({0} * 0.3) ** 2",
    "torch.addcmul({0}, {0}, {0}, value=0.1)",
    "torch.where({0} > 0, {0}, {0} * 0.3)",
    "{0}.masked_fill({0} > 0.4, 0.25)",
    "{0} * ({0} < 1)",
    "{}.mean(1, keepdim=True)",
    "{}.sum(dim=1, keepdim=True)",
    "{}.amax(1, keepdim=True)",
    "{}.clone()",
]
_WITH_CONSTANT = [
    "{0} * {1}",
    "{1} + {0}",
    "{0} - torch.sigmoid({1})",
    "torch.add({0}, {1}, alpha=0.5)",
    "torch.maximum({1}, {0})",
    "{0}.mul({1})",
    "torch.lerp({0}, {1}, 0.3)",
    "torch.where({1} > 0, {0}, {1})",
]
_JOINED = [
    "{0} + {1}",
    "{1} - 0.5 * {0}",
    "{0} * {1}",
    "torch.maximum({0}, {1})",
    "torch.add({0}, {1}, alpha=2)",
    "{0}.add({1})",
    "torch.where({0} > {1}, {0}, {1} * 0.5)",
    "{0} * torch.sigmoid({1})",
    "{0}.masked_fill({1} > 0, 0.5)",
]
_OVERWRITING = [
    "{0} += {1}",
    "{0} -= {1}",
    "{0} *= 0.5",
    "{0} *= {1}",
    "{0} /= 1.5",
    "{0}.add_({1})",
    "{0}.add_({1}, alpha=0.5)",
    "{0}.mul_({1})",
    "{0}.sub_(0.25)",
    "{0}.relu_()",
    "{0}.clamp_(-1, 1)",
    "F.relu({0}, inplace=True)",
    "F.leaky_relu({0}, 0.1, True)",
    "torch.relu_({0})",
    "{0}.masked_fill_({1} > 0, 0.1)",
    "{0}.lerp_({1}, 0.5)",
]


def _product(shape: Shape) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


SIZES = st.one_of(st.integers(1, 12), st.integers(1, 40), st.sampled_from([7, 13, 16, 17, 31, 32, 37]))


@st.composite
def networks(draw: Draw) -> Network:
    shape = (draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 4)), draw(SIZES), draw(SIZES))
    builder = Builder(draw, shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(draw(st.integers(4, 18))):
            builder.step()
            if builder.network.fails:
                break
    assume(builder.network.forward)
    return builder.finish()


@st.composite
def tile_shapes(draw: Draw, shape: Shape) -> Any:
    """Any form of tile_shape, of not too many tiles."""

    def size(length: int) -> int:
        return int(draw(st.integers(-(-length // 7), length + 2)))

    n, c, h, w = shape
    tile = (draw(st.integers(1, n)), draw(st.sampled_from([None, c])), size(h), size(w))
    form = draw(st.sampled_from(["int", "HW", "HW", "H", "W", "NCHW", "NC", "NCH"]))
    forms = {
        "int": max(tile[2:]),
        "HW": tile[2:],
        "H": (tile[2], None),
        "W": (None, tile[3]),
        "NCHW": tile,
        "NC": (tile[0], tile[1], None, None),
        "NCH": (tile[0], tile[1], tile[2], None),
    }
    return forms[form]


@st.composite
def cases(draw: Draw) -> Case:
    network = draw(networks())
    return network, draw(tile_shapes(network.shape)), draw(st.booleans()), (draw(SIZES), draw(SIZES))


def check(network: Network, tile_shape: Any, freeze: bool, other: tuple[int, int]) -> None:
    """The property: streamed whole and exactly, or refused where the plain model fails on the size."""
    freeze = freeze and not network.may_stop  # a batch norm in the head keeps its mode
    model = network.build()
    model.train(freeze)
    for name, module in model.named_modules():
        if name and not (freeze and isinstance(module, nn.BatchNorm2d)):
            module.eval()
    torch.manual_seed(0)
    image = torch.randn(network.shape, dtype=torch.double)
    plain = network.build()
    plain.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, about even 'same' kernels
        if network.fails:
            # What is left to the head, or lies along an axis that is not streamed, fails with torch's own error.
            own = network.may_stop or (isinstance(tile_shape, tuple) and None in tile_shape[-2:])
            with pytest.raises(RuntimeError if own else fxstream.StreamingError):
                fxstream.convert(model, tile_shape, freeze_batchnorm=freeze, example_input=image)(image)
            event("refused")
            return
        try:
            outputs, _, gradients, _ = run(plain, image)
        except RuntimeError as error:
            assume("modified by an inplace operation" not in str(error) and "view" not in str(error))
            raise
        leaves = [*tree_leaves(outputs), *gradients.values()]
        assume(all(leaf is None or (leaf.isfinite().all() and leaf.abs().max() < 1e6) for leaf in leaves))
        try:
            converted = fxstream.convert(model, tile_shape, freeze_batchnorm=freeze, example_input=image)
        except fxstream.NothingToStreamError:
            assert network.may_stop
            event("nothing to stream")
            return
        left = head(converted)
        assert network.may_stop or not left, f"not streamed: {left}"
        if freeze:
            freeze_batchnorms(model, converted)
        try:
            compare(model, converted, image)
        except AssertionError:
            assume(_well_conditioned(model, image))
            raise
        if not network.fixed and not network.may_stop and not network.unused():
            check_size(network, plain, converted, torch.randn(*network.shape[:2], *other, dtype=torch.double))


def check_size(network: Network, plain: nn.Module, converted: nn.Module, image: torch.Tensor) -> None:
    """An image of another size, on which the network may fail."""
    with torch.no_grad():
        try:
            expected = tree_leaves(plain(image))
        except RuntimeError:
            # Along an axis that is not streamed, the error may be torch's own.
            with pytest.raises(RuntimeError if None in converted.tile_shape[2:] else fxstream.StreamingError):
                converted(image)
            event("refused another size")
            return
        try:
            got = tree_leaves(converted(image))
        except RuntimeError:
            # Empty values, and one row that is broadcast against several, are not streamed.
            assert not sizes_agree(network, plain, image)
            event("refused empty or broadcast rows")
            return
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < 1e-10 or not other.isfinite().all() or not _well_conditioned(plain, image)


def sizes_agree(network: Network, model: nn.Module, image: torch.Tensor) -> bool:
    """Whether no value is empty and only values of equal size are joined."""
    names: dict[str, Any] = {"self": model, "x": image, "torch": torch, "F": F, "nn": nn}
    for line in network.forward:
        joined = re.findall(r"# joins (\w+) (\w+)", line)
        if any(names[one].shape[2:] != names[other].shape[2:] for one, other in joined):
            return False
        exec(line, names)
        if not all(value.numel() for value in names.values() if isinstance(value, torch.Tensor)):
            return False
    return True


def _well_conditioned(model: nn.Module, image: torch.Tensor) -> bool:
    """Whether changes of the image in the last digit change results in their last digits."""
    for seed in range(4):
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed), dtype=image.dtype)
        try:
            compare(model, _Nudged(model, 1e-15 * noise), image, 1e-12)
        except AssertionError:
            return False
    return True


class _Nudged(nn.Module):
    def __init__(self, model: nn.Module, noise: torch.Tensor):
        super().__init__()
        for name, module in model.named_children():
            self.add_module(name, module)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in model.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self._model = (model,)
        self.noise = noise

    def forward(self, x: torch.Tensor) -> Any:
        return self._model[0](x * (1 + self.noise))


_QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
_LONG = settings(_QUICK, max_examples=EXAMPLES, derandomize=False)


@_QUICK
@given(cases())
def test_random_networks_are_streamed_exactly(case: Case) -> None:
    check(*case)


@pytest.mark.slow
@_LONG
@given(cases())
def test_many_random_networks_are_streamed_exactly(case: Case) -> None:
    check(*case)
