"""Ordinary forwards as users write them, as Python source: drawn from a grammar of statements around convolutions.

Every model has an image `x` of three channels and a feature map `y` of four. A statement of the grammar makes another
`y` of four channels. In its text, `<<NAME>>` stands for a text of that name's list, `<<one|other>>` for one of several,
and `#` for a number that only this statement has. Its lines after `@init`, `@class` and `@top` go to the constructor,
the class and the module; `@state` says that a forward changes something that the next call sees.
"""

from __future__ import annotations

import linecache
import random
import re
import sys
import textwrap
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from reference import randomise
from torch import nn

_IMPORTS = """
import collections, contextlib, copy, dataclasses, functools, itertools, math, operator, types, typing
import torch
from torch import nn
import torch.nn.functional as F
""".strip().splitlines()


def _blocks(text: str) -> list[str]:
    """Texts that empty lines separate."""
    return re.split(r"\n\n+", text.strip())


def _lines(text: str) -> list[str]:
    return text.strip().splitlines()


_GRAMMAR: dict[str, list[str]] = {}

_GRAMMAR["SIZE"] = _lines("""
y.shape[2]
y.size(3)
y.shape[-1]
y.size()[2]
x.shape[2]
x.size(-2)
min(y.shape[2:])
max(y.shape[-2:])
y.shape[2:][0]
list(y.shape)[3]
((y.shape[2] + y.shape[3]) // 2)
int(y.shape[2] / 2)
math.ceil(y.shape[3] / 2)
y.shape[2:].numel()
len(range(0, y.shape[2], 2))
torch.Size(y.shape[2:])[1]
""")

_GRAMMAR["NUMBER"] = _lines("""
0.5
2
<<SIZE>>
1 / <<SIZE>>
<<SIZE>> ** 0.5
math.sqrt(<<SIZE>>)
float(<<SIZE>>)
<<SIZE>> % 3 + 1
-<<SIZE>>
round(<<SIZE>> / 3)
abs(3 - <<SIZE>>)
divmod(<<SIZE>>, 4)[1]
math.trunc(<<SIZE>> / 2)
math.floor(<<SIZE>> / 3)
max(<<SIZE>>, 10)
pow(<<SIZE>>, 2)
<<SIZE>>.bit_length()
float(f"{<<SIZE>>}.5")
(3 if <<IF>> else 0.25)
self.scale
self.gain
type(self).gain
self.doubled
self.steps[1]
self.settings.slope
self.settings.scales[-1]
self.options["rate"]
self.options.get("absent", 1.5)
sum(self.steps)
{4: 0.5, 8: 2.0}.get(y.shape[1], 1.0)
{20: 0.5, 13: 2.0}.get(<<SIZE>>, 1.0)
len(self.layers)
y.dim()
y.shape[1] * 0.1
math.log2(<<SIZE>>)
torch.finfo(y.dtype).eps + 1
int(self.training) + 1
(1.0 + self.training)
[0.5, 1.5, 2.5][<<SIZE>> % 3]
bool(<<SIZE>> % 2) + 1
""")

_GRAMMAR["IF"] = _lines("""
y.shape[2] % 2
<<SIZE>> % <<2|3|4>> == <<0|1>>
<<SIZE>> <<<|<=|!=|==>> <<SIZE>>
y.shape[-1] > 12
y.shape[2:] != x.shape[2:]
y.size() == x.size()
y.size(2) >= y.size(3)
x.dim() == 4
x.ndim == 3
len(y.shape) != 3
y.shape[1] == 4
y.size(1) in (4, 8)
<<SIZE>> in {17: 1, 20: 2, 9: 3}
<<SIZE>> in [13, 17]
not <<SIZE>> & 1
isinstance(y, torch.Tensor)
isinstance(y, (list, tuple))
not isinstance(y, dict) and torch.is_tensor(y)
type(y) is torch.Tensor
type(y) == torch.Tensor
y.__class__ is torch.Tensor
y.__class__.__name__ == "Tensor"
isinstance(self.weight, nn.Parameter)
type(self.offset) is torch.Tensor
isinstance(y.shape, tuple) and isinstance(y.shape[2], int)
isinstance(y.shape[2:], torch.Size)
type(y.shape[2]) is int
isinstance(<<SIZE>> / 2, float)
y.dtype is torch.float64
y.dtype == torch.float64 and y.is_floating_point()
y.dtype in (torch.float16, torch.bfloat16)
y.dtype == self.stem.weight.dtype
y.is_cuda
y.device.type == "cpu"
y.device == x.device
str(y.device) == "cpu"
self.training
self.training is True
self.training == False
not self.training
self.training and self.flag
self.flag or self.training
not (self.training and y.shape[0] > 1)
bool(self.training)
y is x
y is not None
x is not y
getattr(self, "flag", True)
hasattr(self, "nothing")
hasattr(y, "shape")
self.kind == "one"
self.settings.on
self.options["on"]
self.options.get("off")
self.head is None
"rate" in self.options
min(y.shape[2:]) < 10
all(size > 4 for size in y.shape[2:])
any(size % 2 for size in y.shape)
any([size % 2 for size in y.shape[-2:]])
math.gcd(y.shape[2], y.shape[3]) > 1
sum(y.shape[2:]) % 3 == 0
y.numel() > <<300|1000>>
y.shape[0] == 1
list(y.shape[2:]) == [20, 17]
tuple(y.shape[-2:]) == (20, 17)
y.shape[-2:] == torch.Size([20, 17])
(rows := y.shape[2]) > 10 and rows % 2
y.shape[2] == y.shape[3] or y.shape[2] > 15
1 < <<SIZE>> <= 13
y.shape[2] != y.shape[2] // 2 * 2
isinstance(self.stem, nn.Conv2d)
len(self.layers) > 1
self.norm.training
next(self.parameters()).dtype == y.dtype
self.stem.bias is not None
self.stem.weight.requires_grad
self.stem.weight.shape[0] == y.shape[1]
x.nelement() > y.nelement()
y.shape[3] > x.shape[3] // 2
self.odd(y)
even(<<SIZE>>)
callable(self.act)
(<<IF>>) and (<<IF>>)
(<<IF>>) or (<<IF>>)
not (<<IF>>)
""")

# Conditions that a trace cannot answer: few, since they are refused.
_GRAMMAR["RARE"] = _lines("""
y.requires_grad
x.requires_grad
y.is_contiguous()
torch.is_grad_enabled()
y.mean() > 0
y.grad_fn is not None
y.is_leaf
y.stride(-1) == 1
y.abs().max().item() < 5
torch.isfinite(y).all()
y._version == 0
y.data_ptr() == x.data_ptr()
y.shape in self.seen
""")

_GRAMMAR["LAYER"] = _blocks("""
self.conv#(y)
@init self.conv# = nn.Conv2d(4, 4, 3, padding=1)

self.conv#(y)
@init self.conv# = nn.Conv2d(4, 4, <<3|(3, 1)|5>>, padding=<<1|0|"same">>, groups=<<1|2|4>>)

self.conv#(y)
@init self.conv# = nn.Conv2d(4, 4, 3, stride=2, padding=1)

self.block#(y)
@init self.block# = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))

self.norm#(y)
@init self.norm# = nn.BatchNorm2d(4)

F.relu(y, inplace=<<True|False>>)

F.max_pool2d(y, <<2|3, 1, 1>>)

self.pool(y)

self.act(y)

F.avg_pool2d(y, 3, stride=<<1|2>>, padding=1)

F.conv2d(y, self.stem.weight.mean(1, keepdim=True), padding=1, groups=4)

F.batch_norm(y, self.norm.running_mean, self.norm.running_var, self.norm.weight, training=<<False|self.training>>)

F.leaky_relu(y, <<0.1|self.settings.slope>>)

F.dropout(y, 0.0, self.training)

self.layers[<<0|-1>>](y)

self.named["<<one|two>>"](y)

self.stages(y)

F.gelu(y)

F.interpolate(y, <<scale_factor=2|size=x.shape[2:]|size=(9, 11)>>, mode=<<"nearest"|"bilinear">>)

self.part#(y)
@init self.part# = Part<<1|2>>()
""")

_GRAMMAR["MAP"] = _lines("""
y
y
<<LAYER>>
<<LAYER>>
y * <<NUMBER>>
torch.sigmoid(y)
y.relu()
y + 1
y.clone()
y.contiguous()
y[:, [0, 2, 1, 3]]
y.flip(1)
y.roll(1, 1)
""")

_GRAMMAR["STATEMENT"] = _blocks("""
y = <<LAYER>>

y = <<LAYER>>

y = y * <<NUMBER>>

if <<IF>>:
    <<STATEMENTS>>

if <<IF>>:
    <<STATEMENTS>>
else:
    <<STATEMENTS>>

if <<IF>>:
    <<STATEMENTS>>
elif <<IF>>:
    <<STATEMENTS>>

if <<RARE>>:
    <<STATEMENTS>>

for step# in range(<<2|3>>):
    <<STATEMENTS>>

for step# in range(<<SIZE>> // <<8|6>>):
    y = y * 0.5 + step#

for layer# in self.layers:
    y = layer#(y)

for index#, layer# in enumerate(self.layers):
    y = layer#(y)
    if index# == <<0|1>> and <<IF>>:
        y = y * 2

for name#, layer# in self.named.items():
    if name# != "two" or <<IF>>:
        y = layer#(y)

for layer#, scale# in zip(self.layers, self.settings.scales):
    y = layer#(y) * scale#

for layer# in self.stages.children():
    y = layer#(y)
    if <<IF>>:
        break

for name#, layer# in self.stages.named_children():
    if name# == "0":
        continue
    y = layer#(y)

rest# = <<SIZE>>
while rest# > 6:
    y = y * 0.9 + 0.01 * rest#
    rest# //= 2

rows# = y.shape[2]
rows# += 3
rows# *= 2
y = y * (rows# / y.shape[2])

total# = 0
for size# in y.shape[2:]:
    total# += size#
y = y / total#

b#, c#, h#, w# = y.shape
y = y.view(b#, c#, h# * w#).view(b#, c#, h#, w#)

b#, c#, h#, w# = y.size()
y = y.reshape(b#, 2, c# // 2, h#, w#).transpose(1, 2).reshape(b#, c#, h#, w#)

b#, *rest# = y.shape
y = y.reshape(b#, *rest#)

b#, c#, *sizes# = y.shape
y = y * (sizes#[0] / sizes#[-1]) + len(sizes#)

*_, h#, w# = y.shape
y = y + h# - w#

h#, w# = y.shape[-2:]
y = F.pad(y, (0, -w# % <<2|4>>, 0, -h# % 4))

if y.shape[2] % 2 or y.shape[3] % 2:
    y = F.pad(y, (0, y.shape[3] % 2, 0, y.shape[2] % 2), mode=<<"constant"|"replicate">>)

pads# = [y.shape[3] % 2, 0, y.shape[2] % 2, 0]
if any(pads#):
    y = F.pad(y, pads#)

skip# = y
y = <<LAYER>>
if y.shape[2:] != skip#.shape[2:]:
    y = F.interpolate(y, size=skip#.shape[2:], mode=<<"nearest"|"bilinear">>)
y = y + skip#

skip# = y
y = <<LAYER>>
dy# = skip#.size(2) - y.size(2)
dx# = skip#.size(3) - y.size(3)
y = F.pad(y, [dx# // 2, dx# - dx# // 2, dy# // 2, dy# - dy# // 2]) + skip#

skip# = y
y = <<LAYER>>
rows#, columns# = min(y.shape[2], skip#.shape[2]), min(y.shape[3], skip#.shape[3])
y = y[:, :, :rows#, :columns#] + skip#[..., :rows#, :columns#]

skip# = y
y = self.pool(y)
y = F.interpolate(y, skip#.shape[2:])
y = torch.cat([y[:, :2], skip#[:, 2:]], <<1|dim=1>>)

before# = y.shape
y = <<LAYER>>
if y.shape == before#:
    y = y * 3

start# = (<<SIZE>> % 3)
y = y[:, :, start#:]

y = y[..., : y.shape[-1] // 2 * 2]

y = y[:, :, ::<<1|2>>, <<1:|:-1|:>>]

y = y[:, :, y.shape[2] // 4 :]

y = y + torch.zeros(y.shape<<|, dtype=y.dtype|, device=y.device, dtype=x.dtype>>)

y = y + torch.ones(1, y.shape[1], 1, 1, dtype=y.dtype, device=y.device)

y = y * torch.linspace(<<0|-1>>, 1, y.shape[3], dtype=y.dtype<<|, device=y.device>>)

y = y + torch.arange(y.shape[2], dtype=y.dtype).view(1, 1, -1, 1)

y = y + torch.arange(y.size(3), device=y.device).to(y.dtype)

y = y + torch.arange(<<SIZE>>).type_as(y).mean()

y = y + y.new_zeros(y.shape[0], 1, *y.shape[2:])

y = y + y.new_full((1, 4, 1, 1), <<NUMBER>>)

y = torch.where(y > 0, y, y.new_tensor(0.1))

y = y.to(x)

y = y.to(<<x.dtype|y.device|self.stem.weight.dtype|dtype=torch.float64>>)

y = y.type_as(x).contiguous()

y = y.to(torch.float32).to(x.dtype)

y = y.float().to(y.dtype)

y = y.double()

rows#, columns# = (torch.linspace(0, 1, size, dtype=y.dtype) for size in y.shape[2:])
rows#, columns# = torch.meshgrid(rows#, columns#, indexing="ij")
y = y + rows# * columns#

y = y + torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=y.dtype).view(1, 4, 1, 1)

y = y * torch.tensor(<<NUMBER>>, dtype=y.dtype)

y += <<1|<<NUMBER>>>>

y = y.clone()
y <<+=|*=|-=>> <<2|x.mean(1, keepdim=True)[:, :, :1, :1]|<<NUMBER>>>>

y = y.clone()
y[:, 0] = 0

y = y.clone()
y[:, 1:2] *= <<NUMBER>>

y = y.clone()
y[:, :, 0] = <<0.5|y[:, :, 0] * 2>>

y = y.clone()
y[y < 0] = 0.25

y = y.clone()
y[:, :2].mul_(2)

y = y.clone()
part# = y[:, :2]
part# += 1

y = y.relu_()

y = y.add_(<<1|<<NUMBER>>>>).mul_(0.5)

old# = y
y = y + 1
old# = old# * 2
y = y - old#

one#, two# = y.chunk(2, <<1|dim=1>>)
y = torch.cat((two#, one#), 1)

one#, two# = y.split(2, dim=1)
y = torch.cat([one# * torch.sigmoid(two#), two#], 1)

parts# = list(torch.split(y, [1, 3], 1))
parts#[0] = parts#[0] * 2
y = torch.cat(parts#, dim=1)

parts# = y.unbind(1)
y = torch.stack([part * (index + 1) for index, part in enumerate(parts#)], 1)

parts# = [<<MAP>> for _ in range(2)]
y = parts#[0] + parts#[-1] if parts#[0].shape == parts#[1].shape else parts#[1]

parts# = {"one": y, "two": <<MAP>>}
parts#["one"] = parts#["one"] * 2
y = parts#.pop("two") if <<IF>> else parts#["one"]

parts# = {}
for name# in ("a", "b"):
    parts#[name#] = y * len(parts#)
    parts#.setdefault(name#, None)
y = sum(parts#.values())

parts# = [y]
for layer# in self.layers:
    parts#.append(layer#(parts#[-1]))
y = parts#[-1] + len(parts#)

parts# = []
parts#.extend([y, <<MAP>>])
parts#.reverse()
y, last# = parts#

maps# = Maps(y, <<MAP>>)
y = maps#.low if <<IF>> else maps#.high

maps# = Maps(low=y, high=y * 2)._replace(high=y * 3)
low#, high# = maps#
y = low# + high#

bag# = Bag(y)
bag#.y = bag#.y * 2
bag#.history.append(bag#.y.shape[2])
y = bag#.y * len(bag#.history)

bag# = Bag(y, scale=<<NUMBER>>)
y = bag#.scaled()

key# = f"{y.shape[2]}x{y.shape[3]}"
y = y * {"20x17": 2.0, "13x9": 3.0}.get(key#, 0.5)

key# = "%d" % <<SIZE>>
y = y * len(key#)

key# = str(tuple(y.shape[2:]))
y = y * (2 if key# == "(20, 17)" else 3)

table# = {(20, 17): 2, (13, 9): 3}
y = y * table#.get((y.shape[2], y.shape[3]), 1)

table# = collections.defaultdict(lambda: 0.5)
table#[20] = 2.0
y = y * table#[y.shape[2]]

try:
    y = y.view(y.shape[0], 4, y.shape[2] // 2, 2, y.shape[3])[:, :, :, 0]
except RuntimeError:
    y = y * 3

try:
    assert y.shape[2] % 2 == 0, "odd"
    y = y + 1
except AssertionError:
    y = y - 1

try:
    check(<<SIZE>>)
except ValueError as error#:
    y = y * len(str(error#))
finally:
    y = y + 1

try:
    y = y * self.options["nothing"]
except KeyError:
    y = y * 2

try:
    y = self.nothing(y)
except AttributeError:
    y = y + 2

assert y.shape[1] == 4, f"{y.shape[1]} channels"

assert <<IF>> or y.shape[2] > 1, f"{tuple(y.shape)}"

if <<SIZE>> < <<3|12>>:
    raise ValueError(f"too small: {tuple(y.shape)}")

if <<IF>> and y.shape[0] > 1 and <<IF>>:
    return y

if <<IF>> and <<IF>>:
    return <<RESULT>>

torch._assert(y.shape[1] == 4, "channels")

def helper#(z, scale=2):
    if z.shape[2] % 2:
        return z * scale
    return z + scale
y = helper#(y, <<3|scale=4>>)

def helper#(z):
    nonlocal y
    y = y * 2
    return z + y
y = helper#(y)

scale# = <<NUMBER>>
helper# = lambda z: z * scale#
y = helper#(y)

y = functools.reduce(lambda one, other: one + other, [y, <<MAP>> if False else y, y * 2])

y = functools.partial(F.leaky_relu, negative_slope=0.2)(y)

y = list(map(self.act, [y]))[0]

y = sum(y * scale for scale in self.settings.scales)

y = sum(layer(y).mean() for layer in self.layers) + y

y = [y, y * 2][bool(<<IF>>)]

y = max([y, y * 2], key=lambda z: z.shape[2])

y = (y * 2 if <<IF>> else y * 3)

y = (low# := y * 2) + low#

y = next(iter([y, x]))

y = [*[y], *[x]][0]

y = dict(one=y, **{"two": x})["one"]

y = operator.mul(y, <<NUMBER>>)

y = getattr(torch, "tanh")(y)

y = getattr(self, "<<act|pool|stages>>")(y)

y = self.fn(y)

y = self.partial(y)

y = self.helper(y, <<NUMBER>>)

y = self.method(y, <<NUMBER>>)

y = self.bound(y)

y = self.branch(y)

y = self.static(y)

y = type(self).static(y)

y = Net.gain * y

y = super().__getattr__("stem").weight.sum() + y

y = y * self.weight.view(1, -1, 1, 1)

y = y + self.offset

y = y + self.weight.mean() * self.weight.shape[0]

y = y + sum(parameter.sum() for parameter in self.stem.parameters())

y = y * self.weight.data.sum()

y = y + self.weight.detach().sum()

y = y - y.mean((2, 3), keepdim=True)

y = y * torch.sigmoid(F.adaptive_avg_pool2d(y, 1))

y = y / (y.norm(dim=1, keepdim=True) + 1)

y = F.layer_norm(y, y.shape[1:])

y = F.layer_norm(y.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)

y = F.group_norm(y, 2)

y = F.instance_norm(y, use_input_stats=True)

y = y.flatten(2).softmax(-1).view_as(y)

y = y.view(y.size(0), y.size(1), -1).max(-1)[0][:, :, None, None] + y

y = y.squeeze(0).reshape(y.shape) if y.shape[0] == 1 else y

y = y.unsqueeze(0).squeeze(0)

with torch.no_grad():
    scale# = y.detach().mean()
y = y * scale#

with torch.no_grad():
    size# = y.shape[2] * 2
y = y * size#

y = y.detach() + y

with contextlib.nullcontext():
    y = y + 1

with contextlib.suppress(KeyError):
    y = y * self.options["nothing"]

y = self.cached(y.shape[2])[:, :, : y.shape[2]] + y

y = y + position(y.shape[2], y.shape[3]).to(y)

gone# = y
del gone#
y = y + 1

print(end="")

self.debug(y)

y = copy.copy(y)

y = torch.utils.checkpoint.checkpoint(self.act, y, use_reentrant=False)
@top import torch.utils.checkpoint

sizes# = [tuple(one.shape) for one in (x, y)]
y = y * len(set(sizes#))

sizes# = sorted(y.shape[2:])
y = y * sizes#[0] / sizes#[1]

y = torch.einsum("bchw,c->bchw", y, self.weight)

y = y @ torch.eye(y.shape[3], dtype=y.dtype)

y = y.permute(0, 2, 3, 1)
y = y * self.weight
y = y.permute(0, 3, 1, 2)

half# = y.shape[1] // 2
y = torch.cat([y[:, half#:], y[:, :half#]], 1)

for index# in range(y.shape[1]):
    y = y + y[:, index# : index# + 1]

for index# in range(len(y.shape) - 2):
    y = y * y.shape[index# + 2]

for axis#, size# in enumerate(y.shape):
    if size# % 2 and axis# > 1:
        y = y * 2

for one# in y.split(1):
    y = y + one#.mean()

for one# in y:
    y = y + one#.mean()

y = torch.stack([one for one in y])

while y.shape[2] > 12:
    y = self.pool(y)

match y.shape[2] % 3:
    case 0:
        y = y * 2
    case 1:
        y = y * 3
    case _:
        y = y * 4

y = y * COUNT

y = y * Limits.MOST

y = y * Mode.FAST.value if self.mode is Mode.FAST else y

y = torch.nn.Identity()(y)
if y is x:
    y = y * 2

alias# = y
y = y.clone()
alias# = alias#.add(1)
y = y + alias#

z# = y[:, :2]
y = y.mul(2)
y = y + z#.repeat(1, 2, 1, 1)
""")

# What only the proof sees, whether one value is the same object as another. It has to run in the proof.
_GRAMMAR["IDENTITY"] = _blocks("""
before# = y
y = <<y.to(x.dtype)|y.contiguous()|F.dropout(y, 0.5, False)|y.expand_as(y)|y.float()|y.relu_()>>
y = y.to(x.dtype)
if y is before#:
    y = y * 2

before# = y
y = self.identity(y)
y = y * (2 if y is before# else 3)
""")

# What the next call sees.
_GRAMMAR["STATE"] = _blocks(
    """
self.calls += 1
y = y * <<1|self.calls>>

self.last_shape = tuple(y.shape)

self.last = y.detach()

self.features.append(y.shape[2])

self.features[:] = [y.shape[2]]

key# = (y.shape[2], y.shape[3])
if key# not in self.cache:
    self.cache[key#] = torch.ones(key#, dtype=y.dtype)
y = y + self.cache[key#]

if self.grid is None or self.grid.shape[-1] != y.shape[3]:
    self.grid = torch.linspace(0, 1, y.shape[3], dtype=y.dtype)
y = y + self.grid

self.total.add_(1)
y = y + self.total

self.total += y.detach().mean()

self.offset.mul_(0.9).add_(y.detach().mean(), alpha=0.1)
y = y - self.offset

self.offset.copy_(y.detach().amax((0, 2, 3)).view(1, 4, 1, 1))

if self.training:
    self.total += 1
y = y * (1 + self.total)

if self.training:
    with torch.no_grad():
        self.offset.lerp_(y.mean((0, 2, 3)).view(1, 4, 1, 1), 0.1)
y = y - self.offset

self.offset = self.offset * 0.5
y = y + self.offset

self.offset = self.offset + 0.1 * y.detach().mean()

self.total.data = self.total + 1

self.offset.data.mul_(0.5)
y = y + self.offset

self.norm.eval()
y = self.norm(y)

self.norm.<<train|eval>>(<<|not self.training>>)
y = self.norm(y)
""".replace("train(|", "train(")
) + _blocks("""
self.settings.slope = self.settings.slope * 0.5
y = F.leaky_relu(y, self.settings.slope)

self.options["rate"] = y.shape[2]

self.options.setdefault(y.shape[2], len(self.options))
y = y * self.options[y.shape[2]]

self.seen.add(y.shape[2])
y = y * len(self.seen)

setattr(self, "calls", self.calls + 2)
y = y * self.calls

type(self).made = y.shape[2]
y = y * <<2|self.made>>

type(self).count += 1
y = y * type(self).count

self.__dict__["calls"] = self.calls + 1

self.register_buffer("later", torch.zeros(y.shape[2]), persistent=False)

self.weight.requires_grad_(False)

nn.init.ones_(self.offset)

with torch.no_grad():
    self.weight.clamp_(-1, 1)
y = y * self.weight.view(1, 4, 1, 1)

self.norm.momentum = 0.5
y = self.norm(y)

self.history.appendleft(y.shape[2])
y = y * self.history[-1]

globals()["COUNT"] += 1
y = y * COUNT

COUNTS.append(y.shape[2])
y = y * len(COUNTS)
""")

_GRAMMAR["IMAGE"] = _blocks("""
assert x.shape[1] == 3, "three channels"

assert isinstance(x, torch.Tensor) and x.dim() == 4

if x.dim() == 3:
    x = x.unsqueeze(0)

if x.shape[1] == 1:
    x = x.expand(-1, 3, -1, -1)

if x.ndim != 4 or x.shape[1] != 3:
    raise ValueError(f"expected an image, got {tuple(x.shape)}")

x = x.to(self.stem.weight.dtype)

x = x.to(self.stem.weight)

x = (x - 0.5) / 0.25

x = x - self.mean.to(x)

x = x - torch.tensor([0.4, 0.5, 0.6], dtype=x.dtype, device=x.device).view(1, 3, 1, 1)

x = x[:, [2, 1, 0]]

x = x.clone()
x[:, 0] -= 0.5

height, width = x.shape[-2:]
if height % 8 or width % 8:
    x = F.pad(x, (0, (8 - width % 8) % 8, 0, (8 - height % 8) % 8))

if max(x.shape[2:]) > 18:
    x = F.avg_pool2d(x, 2)

x = x.contiguous()

if not torch.jit.is_scripting():
    x = x * 2

x = F.pad(x, [1, 1, 1, 1], "reflect")

h, w = x.shape[2:]
side = max(h, w)
x = F.pad(x, (0, side - w, 0, side - h))

x = x.float().to(x.dtype)

x = x.type(self.stem.weight.dtype)

original = x.shape

x = x * 2 if self.options["on"] else x

x = x.requires_grad_() if False else x

x.mul_(2)
""")

_GRAMMAR["SIGNATURE"] = _lines("""
x
x
x
x, mask=None, scale=1.0
x, features=False, *, mode="a"
x, *others, **options
x, size=None
""")

_GRAMMAR["RESULT"] = _lines("""
y
y
y
(y, x)
[y, y * 2]
y, y.shape[2]
{"out": y, "size": tuple(y.shape)}
{"out": y, "aux": [y * 2, (y.mean(),)]}
Maps(y, y + 1)
Bag(y, 2.0)
collections.OrderedDict(out=y, more=y * 2)
Output(out=y, none=None)
y.mean((2, 3))
self.fc(y.mean((2, 3)))
self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))
self.fc(torch.flatten(F.adaptive_max_pool2d(y, (1, 1)), 1)).softmax(-1)
y.sum()
F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
(y, None)
y if self.training else y.sigmoid()
[one for one in y]
y, y.shape
y, x.shape[2:]
{0: y, (1, 2): y.amax(1)}
{f"p{index}": y * index for index in range(2)}
tuple(y for _ in range(2))
(y, {"shape": list(y.shape), "dtype": y.dtype})
[y][0]
""")

_TOP = """
Maps = collections.namedtuple("Maps", "low high")
COUNT = 2
COUNTS = []

@dataclasses.dataclass
class Bag:
    y: typing.Any
    scale: float = 1.0
    history: list = dataclasses.field(default_factory=list)

    def scaled(self):
        return self.y * self.scale

class Output(dict):
    def __getattr__(self, name):
        return self[name]

class Mode(__import__("enum").Enum):
    FAST = 2
    SLOW = 3

class Limits:
    MOST = 3

class Settings:
    def __init__(self):
        self.slope, self.scales, self.on = 0.1, [0.5, 1.5], True

def even(size):
    return size % 2 == 0

def check(size):
    if size % 2:
        raise ValueError(f"{size} is odd")

@functools.lru_cache(maxsize=None)
def position(rows, columns):
    across = torch.linspace(0, 1, columns, dtype=torch.double)
    return torch.linspace(0, 1, rows, dtype=torch.double).view(-1, 1) * across
"""

_CLASS = """
    gain = 1.25
    count = 1

    @property
    def doubled(self):
        return self.scale * 2

    @staticmethod
    def static(y):
        return y * 1.5 if y.shape[2] % 2 else y

    def helper(self, y, factor):
        return y * factor if y.dim() == 4 else y

    @property
    def branch(self):
        return self.stages if self.kind == "one" else self.act

    def odd(self, y):
        return y.shape[2] % 2 == 1

    def debug(self, y):
        if self.verbose:
            print(f"{tuple(y.shape)} {y.dtype}")

    @functools.lru_cache(maxsize=4)
    def cached(self, rows):
        return torch.arange(rows, dtype=torch.double).view(1, 1, -1, 1)
"""

_INIT = """
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, 4, 3, padding=1)
        self.norm, self.pool, self.act, self.identity = nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU(), nn.Identity()
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)])
        self.named = nn.ModuleDict({"one": nn.Conv2d(4, 4, 1), "two": nn.Tanh()})
        self.stages = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.fc = nn.Linear(4, 2)
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.4))
        self.register_buffer("offset", torch.full((1, 4, 1, 1), 0.3))
        self.register_buffer("total", torch.zeros(()))
        self.scale, self.kind, self.flag, self.head, self.verbose = 0.7, "one", True, None, False
        self.steps, self.options, self.settings = (1, 2, 3), {"rate": 0.5, "on": True}, Settings()
        self.mode, self.calls, self.grid, self.cache, self.features = Mode.FAST, 0, None, {}, []
        self.seen, self.history, self.last = set(), collections.deque([2]), None
        self.fn = lambda y: self.act(y) * self.scale
        self.method, self.bound = self.helper, functools.partial(self.helper, factor=self.scale)
        self.partial = functools.partial(F.leaky_relu, negative_slope=0.3)
"""

SIZES = [(20, 17), (13, 9), (16, 16), (17, 20), (21, 18), (11, 24), (9, 13)]
"""Of images."""
CALLS: dict[str, list[str]] = {
    "x": [""],
    "x, mask=None, scale=1.0": ["", "scale=2.0", "mask=x.new_ones(x.shape[0], 1, 1, 1) * 3", "None, 3"],
    'x, features=False, *, mode="a"': ["", "True", 'mode="b"', 'features=True, mode="b"'],
    "x, *others, **options": ["", "2.0", "x.mean(), 3", "scale=2"],
    "x, size=None": ["", "(9, 9)", "x.shape[2:]", "size=[8, 7]"],
}
"""Further arguments with which a forward may be called, by its signature."""
_USES = {
    "x": "",
    "x, mask=None, scale=1.0": "if mask is not None:\n    y = y * mask\nif scale != 1.0:\n    y = y * scale",
    'x, features=False, *, mode="a"': 'if features or mode == "b":\n    return y, {"features": y, "mode": mode}',
    "x, *others, **options": 'for other in others:\n    y = y * other\ny = y * options.get("scale", 1)',
    "x, size=None": "size = size or y.shape[2:]\ny = F.interpolate(y, size=size)",
}
TILES = [8, (7, 5), (9, None), 16, 6, (None, 8), 30]
"""Shapes of tiles."""


@dataclass
class Forward:
    """A model as source, and how it is used."""

    seed: int
    statements: dict[str, list[str]]
    """Of every class, by its name: the statements of its forward, which may be left out one by one."""
    init: dict[str, list[str]]
    top: list[str]
    signature: str
    tile_shape: Any
    calls: list[tuple[int, tuple[int, int], str]]
    """Of every call, the number of images, their size, and the further arguments."""
    modes: list[bool]
    """Whether the model is in training mode, of every call."""
    example: bool
    """Whether the conversion gets an example, which is as the first call's image."""
    changes: bool
    """Whether a forward changes something that the next call sees."""

    def source(self) -> str:
        parts = [*_IMPORTS, _TOP, *self.top]
        for name, statements in self.statements.items():
            root = name == "Net"
            parts.append(f"class {name}(nn.Module):{_CLASS}")
            init = [f"        {line}" for line in self.init[name]]
            parts.append("    def __init__(self):" + _INIT.replace("CHANNELS", "3" if root else "4"))
            parts += init
            parts.append(f"    def forward(self, {self.signature if root else 'x'}):")
            parts += [textwrap.indent(statement, "        ") for statement in statements]
        return "\n".join(parts) + "\n"

    def short(self) -> str:
        """The statements alone, for a report."""
        shown = []
        for name, statements in self.statements.items():
            shown.append(f"{name}.forward(self, {self.signature if name == 'Net' else 'x'}):")
            shown += [textwrap.indent(statement, "    ") for statement in statements]
            shown += [f"    # init: {line}" for line in self.init[name]]
        use = f"# seed={self.seed} tile_shape={self.tile_shape} calls={self.calls} train={self.modes}"
        return "\n".join([*shown, f"{use} example={self.example}"])

    def build(self) -> nn.Module:
        """A new model, with the same numbers every time."""
        name = f"<forward {self.seed}>"
        source = self.source()
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        module = sys.modules["generated"] = ModuleType("generated")  # dataclasses look for it there
        exec(compile(source, name, "exec"), vars(module))
        torch.manual_seed(0)
        model = randomise(module.Net().double())
        for buffer in model.buffers():
            buffer.requires_grad_(False)
        return model

    def images(self, number: int) -> torch.Tensor:
        """The images of a call."""
        batch, size, _ = self.calls[number]
        return torch.randn(batch, 3, *size, dtype=torch.double, generator=torch.Generator().manual_seed(number))

    def arguments(self, number: int, x: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The further arguments of a call."""
        found: tuple[tuple[Any, ...], dict[str, Any]] = eval(
            f"(lambda *args, **kwargs: (args, kwargs))({self.calls[number][2]})", {"x": x.detach()}
        )
        return found


class _Writer:
    """Draws statements."""

    def __init__(self, choose: random.Random, state: bool, parts: bool):
        self.choose, self.state, self.parts = choose, state, parts
        self.init: list[str] = []
        self.top: list[str] = []
        self.count = 0
        self.changes = False

    def text(self, name: str, depth: int) -> str:
        """An alternative of a list, with all that stands in it drawn."""
        self.count += 1
        number = str(self.count)
        drawn = self.choose.choice(_GRAMMAR[name])
        if drawn.startswith("self.part") and not self.parts:
            drawn = "self.act(y)"
        if depth > 5 and "<<" in drawn and name in ("IF", "NUMBER", "MAP"):
            drawn = {"IF": "y.shape[2] % 2", "NUMBER": "0.5", "MAP": "y"}[name]
        lines = []
        for line in drawn.replace("#", number).splitlines():
            line = self.filled(line, depth)
            where, _, rest = line.partition(" ")
            if where == "@init":
                self.init.append(rest)
            elif where == "@top":
                self.top.append(rest)
            else:
                lines.append(line)
        return "\n".join(lines)

    def filled(self, line: str, depth: int) -> str:
        while found := re.search(r"<<((?:(?!<<|>>).)+)>>", line):
            inner = found[1]
            if inner == "STATEMENTS":
                indent = " " * found.start()
                some = [self.statement(depth + 1) for _ in range(self.choose.randint(1, 2))]
                return textwrap.indent("\n".join(some), indent)
            drawn = self.text(inner, depth + 1) if inner in _GRAMMAR else self.choose.choice(inner.split("|"))
            line = line[: found.start()] + drawn + line[found.end() :]
        return line

    def statement(self, depth: int = 0) -> str:
        if self.state and self.choose.random() < 0.25:
            self.changes = True
            return self.text("STATE", depth)
        drawn = self.text("STATEMENT", depth)
        return drawn if depth < 3 or "\n" not in drawn else f"y = {self.text('LAYER', depth)}"


def draw(seed: int) -> Forward:
    """The forward of a seed."""
    choose = random.Random(seed)
    state = choose.random() < 0.15
    statements: dict[str, list[str]] = {}
    init: dict[str, list[str]] = {}
    top: list[str] = []
    changes = False
    signature = choose.choice(_GRAMMAR["SIGNATURE"])
    for name, most, state_here in (("Part1", 3, choose.random() < 0.15), ("Part2", 3, False), ("Net", 5, state)):
        writer = _Writer(choose, state_here, parts=name == "Net")
        lines = [writer.text("IMAGE", 0)] if name == "Net" and choose.random() < 0.5 else []
        lines.append("y = self.stem(x)")
        if choose.random() < 0.02:
            lines.append(writer.text("IDENTITY", 0))
        if name == "Net" and _USES[signature]:
            lines.append(_USES[signature])
        lines += [writer.statement() for _ in range(choose.randint(1, most))]
        lines.append(f"return {writer.text('RESULT', 0) if name == 'Net' else 'y'}")
        statements[name], init[name] = lines, writer.init
        top += writer.top
        changes |= writer.changes
    used = " ".join(init["Net"])
    for name in ("Part1", "Part2"):
        if f"{name}()" not in used:
            del statements[name], init[name]
    calls = [
        (choose.choice([1, 1, 2]), choose.choice(SIZES), choose.choice(CALLS[signature]))
        for _ in range(choose.randint(2, 3))
    ]
    calls[0] = (*calls[0][:2], CALLS[signature][0])
    training = choose.random() < 0.4
    modes = [training ^ (number > 0 and choose.random() < 0.1) for number in range(len(calls))]
    return Forward(
        seed, statements, init, top, signature, choose.choice(TILES), calls, modes, choose.random() < 0.5, changes
    )
