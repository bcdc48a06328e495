"""Capture: a graph of TorchDynamo, `torch.compile`'s front end, becomes a `Trace` that the analysis takes.

In such a graph all operations are functions and methods of torch. Parameters and buffers are placeholders, and so are
the sizes of the image that are not known when the graph is captured. Five things change.

- Switches of gradients and autocast become the regions of the nodes, see `regions`.
- In a reshape, a size that is that of a dimension of the reshaped value becomes `value.size(dimension)`, and a multiple
  of it is computed from that. Otherwise the analysis would not know a streamed axis again: not by a number, and not by
  arithmetic with sizes.
- A `torch.Size` of sizes becomes a tuple, which is what rules take.
- In-place operators and `F.pad` get the names under which torch.fx records them.
- With `freeze_batchnorm`, batch norms use their running statistics, and count no batches.

What is known of the values, their shapes, dtypes and sizes, goes into `Trace.known`. No tensor of the capture is kept.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import StreamingError
from ..geometry.axes import SPATIAL_NAMES, Symbol
from ..ops import Unknown, inplace
from .regions import Switches, mark
from .trace import Assumptions, Trace

_RENAMED = {getattr(operator, name): function for name, function in inplace.FUNCTIONS.items()}
_RENAMED[torch._C._nn.pad] = F.pad
_RESHAPING = ("view", "reshape", torch.reshape)
_EXPANDING = ("expand", "broadcast_to", torch.broadcast_to)
_REGISTRIES = ("__self__", "__dict__", "_modules", "_parameters", "_buffers")
_TRAINING = 5
"""The position of `training` among the arguments of `F.batch_norm`."""
_CHECKPOINT = "tag_activation_checkpoint"
"""The name of what TorchDynamo makes of `torch.utils.checkpoint.checkpoint`."""
_HARMLESS = (torch._C._log_api_usage_once,)
"""Functions that neither take nor return tensors, and that have no effect on other operations."""
_RESUMED = "torch_dynamo_resume_in_"
"""How TorchDynamo names the code behind a graph break."""


class UncapturedError(Exception):
    """A graph does something whose effect on other nodes is not known, so that it must run as it is."""


@dataclass
class Capture:
    """A captured graph, as the analysis takes it."""

    trace: Trace
    image: fx.Node
    checkpoints: dict[str, set[fx.Node]]
    """Name of a call of `torch.utils.checkpoint` in the captured graph -> the nodes of what it calls."""


def read(captured: fx.GraphModule, image: fx.Node, freeze_batchnorm: bool, kept: Collection[str] = ()) -> Capture:
    """Read a captured graph. Raises UncapturedError.

    Calls of `torch.utils.checkpoint` are opened, except those whose names are in `kept`: what streams is computed again
    in the backward pass in any case.
    """
    reader = _Reader(captured, image, freeze_batchnorm, kept)
    for node in captured.graph.nodes:
        reader.read(node)
    trace = Trace(captured, reader.graph, Assumptions({}, {}, ()), set(), {}, {}, reader.known)
    return Capture(trace, reader.new[image], reader.checkpoints)


def maps(graph: fx.Graph) -> dict[str, fx.Node]:
    """The inputs that may be an image, by their names in the user's code.

    These are the floating-point tensors of 3 to 5 dimensions that do not belong to a module.
    """
    ranks = range(3, 3 + len(SPATIAL_NAMES))
    found: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = _example(node)
        fits = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() in ranks
        if fits and not isinstance(value, torch.nn.Parameter) and not _of_module(node) and 0 not in value.shape:
            found[input_name(node)] = node
    return found


def input_names(graph: fx.Graph) -> list[str]:
    """The names of the inputs, in the user's code, that do not belong to a module and are no sizes."""
    tensors = (node for node in graph.find_nodes(op="placeholder") if isinstance(_example(node), torch.Tensor))
    return [input_name(node) for node in tensors if not _of_module(node)]


def input_name(node: fx.Node) -> str:
    """What a placeholder is called in the user's code; a parameter or buffer, by its path in the module."""
    source = _source(node)
    if source is None:
        return str(node.target)
    if not _of_module(node):
        return _written(source)
    return ".".join(str(key) for key in list(_keys(source))[1:] if key not in _REGISTRIES)


def is_resumed(graph: fx.Graph) -> bool:
    """Whether a graph was captured behind a graph break, so that its inputs are what was computed before."""
    return any(_RESUMED in (node.meta.get("stack_trace") or "") for node in graph.nodes)


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _source(node: fx.Node) -> Any:
    """Where TorchDynamo has found the value of a placeholder: nested objects, the innermost is a variable."""
    source = getattr(node, "_dynamo_source", None)
    return source if source is not None else getattr(node.meta.get("grapharg"), "source", None)


def _of_module(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter, a buffer or another attribute of a module."""
    source = _source(node)
    while source is not None:
        # By name, since importing TorchDynamo takes a second.
        if "NNModule" in type(source).__name__ or "ParamBuffer" in type(source).__name__:
            return True
        source = getattr(source, "base", None)
    return False


def _keys(source: Any) -> Iterator[Any]:
    """A variable, and the attributes and indices by which a value is found from there."""
    if hasattr(source, "base"):
        yield from _keys(source.base)
    for name in ("local_name", "global_name", "member", "index"):
        if hasattr(source, name):
            yield getattr(source, name)


def _written(source: Any) -> str:
    """A source as an expression in the user's code."""
    if not hasattr(source, "base"):
        return str(next(_keys(source), type(source).__name__))
    base = _written(source.base)
    if hasattr(source, "member"):
        return f"{base}.{source.member}"
    return f"{base}[{source.index!r}]" if hasattr(source, "index") else base


def _identifier(node: fx.Node) -> str:
    """The name of a placeholder: that in the user's code as far as it can be a name of Python's."""
    name = "_".join(re.findall(r"\w+", input_name(node)))
    return name if name.isidentifier() and not _is_number(node) else node.name


def _is_number(node: fx.Node) -> bool:
    return not isinstance(_example(node), torch.Tensor)


class _Reader:
    """Copies a captured graph, node by node."""

    def __init__(self, captured: fx.GraphModule, image: fx.Node, freeze_batchnorm: bool, kept: Collection[str]):
        self.captured = captured
        self.kept = kept
        self.checkpoints: dict[str, set[fx.Node]] = {}
        self.graph = fx.Graph()
        self.new: dict[fx.Node, Any] = {}
        """A node of the captured graph -> its copy; or a tuple of copies."""
        self.known: dict[fx.Node, Any] = {}
        self.switches = Switches(torch.is_grad_enabled())
        self.image = image
        self.depending = {image}
        """The captured nodes that depend on the image."""
        self.freeze_batchnorm = freeze_batchnorm

    def read(self, node: fx.Node) -> None:
        """Copy a node, or take note of what it stands for."""
        if self.switches.follow(node) or (self.freeze_batchnorm and _counts_batches(node)):
            return
        if not self.depending.isdisjoint(node.all_input_nodes):
            self.depending.add(node)
        read: Any = fx.node.map_arg((node.args, dict(node.kwargs)), self.new.__getitem__)
        args, kwargs = read
        if node.target is torch.Size:
            self.new[node] = tuple(args[0]) if args else ()
            return
        if node.target is operator.getitem and isinstance(args[0], tuple) and isinstance(args[1], int):
            self.new[node] = args[0][args[1]]
            return
        if getattr(node.target, "__name__", "") == _CHECKPOINT and node.name not in self.kept:
            self._open(node)
            return
        if node.op.startswith("call") and _example(node) is None and not _reads_tensors(node):
            if node.target in _HARMLESS:
                return
            raise UncapturedError(f"{node.name} may change what the operations behind it do")
        if node in self.depending:
            args = self._with_extents(node, args)
        if self.freeze_batchnorm and node.target is F.batch_norm:
            args, kwargs = _frozen(args, kwargs)
        target = _RENAMED.get(node.target, node.target) if node.op == "call_function" else node.target
        name = node.name
        if node.op == "placeholder":
            name = target = _identifier(node)
            if isinstance(_example(node), torch.SymInt) and _of_module(node):
                # A stride or the like, which torch takes to be variable under FSDP. This adds a guard.
                node.meta["example_value"] = int(_example(node))
        self._add(node, self.graph.create_node(node.op, target, args, kwargs, name))

    def _open(self, node: fx.Node) -> None:
        """Copy what a call of `torch.utils.checkpoint` calls, in place of the call."""
        function, *given = node.args
        assert isinstance(function, fx.Node)
        body = self.captured.get_submodule(str(function.target))
        assert isinstance(body, fx.GraphModule)
        before = set(self.graph.nodes)
        for inner, outer in zip(body.graph.find_nodes(op="placeholder"), given, strict=True):
            self.new[inner] = fx.node.map_arg(outer, self.new.__getitem__)
            if outer in self.depending:
                self.depending.add(inner)
        for inner in body.graph.nodes:
            if inner.op == "output":
                self.new[node] = fx.node.map_arg(inner.args[0], self.new.__getitem__)
            elif inner.op != "placeholder":
                self.read(inner)
        self.checkpoints[node.name] = set(self.graph.nodes) - before

    def _add(self, node: fx.Node, new: fx.Node) -> None:
        self.new[node] = new
        new.meta["nn_module_stack"] = {path: (path, None) for path in _paths(node)}
        if node.op.startswith("call"):
            mark(new, self.switches.region)
        if node is self.image:
            self.known[new] = tuple(size if isinstance(size, int) else None for size in _example(node).shape)
        elif node not in self.depending and node.op not in ("output", "get_attr"):
            self.known[new] = _known(node.name, _example(node))

    def _with_extents(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a node, in which sizes of the value that it reshapes are those that it reads off the value.

        Under torch's guards, a dimension of the result is one of the value if it has the same size and the same number
        of elements behind it. Where one dimension is split, or several are merged, its size follows from theirs.
        """
        if node.target not in (*_RESHAPING, *_EXPANDING) or not isinstance(node.args[0], fx.Node) or len(args) < 2:
            return args
        value, result = _example(node.args[0]), _example(node)
        nested = isinstance(args[1], (tuple, list))
        sizes = list(args[1] if nested else args[1:])
        if node.args[0] not in self.depending or len(sizes) != result.dim():
            return args
        if node.target in _RESHAPING:
            self._reshape(node.args[0], _exact(value.shape), _exact(result.shape), sizes)
        else:
            added = result.dim() - value.dim()
            for old, (one, other) in enumerate(zip(_exact(value.shape), _exact(result.shape)[added:], strict=True)):
                sizes[old + added] = -1 if one == other else sizes[old + added]
        return (args[0], tuple(sizes)) if nested else (args[0], *sizes)

    def _reshape(self, node: fx.Node, old: list[Any], new: list[Any], sizes: list[Any]) -> None:
        """Replace those `sizes` of a reshape of `node` that follow from its dimensions."""
        same = _same_dims(old, new)
        for before, after in same.items():
            sizes[after] = self._size(node, before)
        for befores, afters in _groups(old, new):
            if not same.keys().isdisjoint(befores) or not set(same.values()).isdisjoint(afters):
                continue
            first, *others = befores if len(afters) == 1 else afters
            factor = _product([(old if len(afters) == 1 else new)[index] for index in others])
            if len(afters) == 1 and isinstance(factor, int):
                sizes[afters[0]] = self._computed(operator.mul, node, first, factor)
            elif len(afters) == 1 and -1 not in sizes:
                sizes[afters[0]] = -1
            elif len(befores) == 1 and isinstance(factor, int):
                sizes[first] = self._computed(operator.floordiv, node, befores[0], factor)
            elif len(befores) == 1 and new[first] == _exact(_example(self.image).shape)[0]:
                # The batch, off which as many windows are split as the size of the image says.
                sizes[first] = self._size(self.image, 0)

    def _computed(self, function: Callable[..., Any], node: fx.Node, dim: int, number: int) -> fx.Node:
        size = self._size(node, dim)
        result = self.graph.call_function(function, (size, number))
        result.meta["nn_module_stack"] = size.meta["nn_module_stack"]
        return result

    def _size(self, node: fx.Node, dim: int) -> fx.Node:
        size = self.graph.call_method("size", (self.new[node], dim))
        size.meta["nn_module_stack"] = self.new[node].meta["nn_module_stack"]
        return size


def _exact(shape: Sequence[Any]) -> list[Any]:
    """Sizes as numbers and sympy expressions, which can be compared without a guard."""
    return [size if isinstance(size, int) else size.node.expr for size in shape]


def _same_dims(old: list[Any], new: list[Any]) -> dict[int, int]:
    """Dimensions before and after a reshape that are the same: of the same size, at the same place."""
    found: dict[int, int] = {}
    start = 0
    for one in range(len(old)):
        for other in range(start, len(new)):
            if old[one] == new[other] and _at_one_place(old, one, new, other):
                found[one] = other
                start = other + 1
                break
    return found


def _groups(old: list[Any], new: list[Any]) -> list[tuple[range, range]]:
    """The dimensions before and after a reshape that are split or merged: one becomes several, or several one."""
    ends = [(0, 0)]
    for one in range(1, len(old) + 1):
        fitting = (other for other in range(ends[-1][1] + 1, len(new) + 1) if _at_one_place(old, one, new, other))
        if (other := next(fitting, None)) is not None:
            ends.append((one, other))
    found = [(range(i, k), range(j, m)) for (i, j), (k, m) in pairwise(ends)]
    return [(befores, afters) for befores, afters in found if 1 in (len(befores), len(afters))]


def _at_one_place(old: list[Any], one: int, new: list[Any], other: int) -> bool:
    """Whether dimensions before and after a reshape start at the same place.

    There are as many elements in front of them, and then as many behind them. For sizes with symbols, it may be that
    only one of the two can be seen.
    """
    return bool(_product(old[:one]) == _product(new[:other]) or _product(old[one:]) == _product(new[other:]))


def _product(sizes: list[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _known(name: str, value: Any) -> Any:
    """What rules are given at conversion for a value that does not depend on the image."""
    if isinstance(value, torch.Tensor):
        if not all(isinstance(size, int) for size in value.shape) or type(value).__name__ == "DTensor":
            return Unknown(name)
        twin = torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")
        return twin.requires_grad_(value.requires_grad)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return Symbol()
    if isinstance(value, (tuple, list)):
        return type(value)(_known(name, part) for part in value) if type(value) in (tuple, list) else Unknown(name)
    return value if isinstance(value, (int, float, str)) else Unknown(name)


def _reads_tensors(node: fx.Node) -> bool:
    """Whether a node reads tensors, and not sizes alone."""
    return any(isinstance(_example(source), torch.Tensor) for source in node.all_input_nodes)


def _frozen(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `F.batch_norm`, for it to use its running statistics if it has any."""
    mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
    if mean is None:
        return args, dict(kwargs)
    if len(args) > _TRAINING:
        return (*args[:_TRAINING], False, *args[_TRAINING + 1 :]), dict(kwargs)
    return args, {**kwargs, "training": False}


def _counts_batches(node: fx.Node) -> bool:
    """Whether a node is the `self.num_batches_tracked.add_(1)` of a batch norm."""
    if node.target != "add_" or not isinstance(node.args[0], fx.Node):
        return False
    source = _source(node.args[0])
    counter = "num_batches_tracked" in (getattr(source, "index", None), getattr(source, "member", None))
    classes = [kind for _, kind in (node.meta.get("nn_module_stack") or {}).values()]
    return counter and bool(classes) and isinstance(classes[-1], type) and issubclass(classes[-1], _BatchNorm)


def _paths(node: fx.Node) -> list[str]:
    """The paths of the modules in whose forward a node was captured, the innermost last; without the root."""
    written = (path for path, _ in (node.meta.get("nn_module_stack") or {}).values())
    return [path for path in map(_path, written) if path]


def _path(written: str) -> str:
    """A module's path, from how TorchDynamo writes it: "L['self']._modules['layer1'].0" is "layer1.0"."""
    _, _, path = written.partition("]")
    for before, after in ((".__self__", ""), ("._modules['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(before, after)
    return path.strip(".")


def image_among(captured: fx.GraphModule, name: str | None) -> fx.Node | None:
    """The image of a captured graph: the input called `name`, by default the only map. None if there is none.

    Raises UncapturedError if there are several, and StreamingError if the input called `name` cannot be the image.
    """
    found = maps(captured.graph)
    if name is not None and name in found:
        return found[name]
    if name is not None and not is_resumed(captured.graph):
        known = input_names(captured.graph)
        if name in known:
            raise StreamingError(f"image={name!r} is not a floating-point tensor of 3 to 5 dimensions")
        if found:
            raise StreamingError(f"image={name!r} is not an input of the captured graph ({', '.join(known)})")
    if len(found) > 1:
        raise UncapturedError(f"several inputs may be the image ({', '.join(found)}). Way out: name one in image=")
    return next(iter(found.values()), None)
