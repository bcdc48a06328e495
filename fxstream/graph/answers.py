"""Lowering: from a node of the graph, by its rule, to what it reads and how it runs on a block."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ImageTooSmallError, NotLocalError
from ..geometry.axes import Symbol, Value
from ..geometry.schedule import Program
from ..geometry.window import Span
from ..ops import Answer, Fact, Local, NotLocal, Rule, Total, Unknown, rule_for, rule_for_module
from .trace import INPLACE_OPERATORS

_KNOWN = ("torch", "torchvision", "_operator", "builtins", "math")
_ASSIGNING = {getattr(operator, name) for name in INPLACE_OPERATORS} | {operator.setitem}


class Borrowed:
    """A module some of whose attributes are replaced: tensors by aliases of them, a flag by a frozen one.

    `attributes` are by their path in the module; submodules are borrowed with their part of them.
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
        """Call the module itself, with the tensors that stand in for its own."""
        tensors = {path: value for path, value in self._attributes.items() if isinstance(value, torch.Tensor)}
        return torch.func.functional_call(self._module, tensors, args, kwargs)


def label(node: fx.Node) -> str:
    """How a node is named to the user: by the module's path in the model, else by the module that it is in."""
    if node.op == "call_module":
        return str(node.target)
    path = next(reversed(modules_around(node)), "")
    return f"{path}: {node.name}" if path else node.name


def modules_around(node: fx.Node) -> list[str]:
    """Paths of the modules in whose forward a node was traced, the innermost last."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def operation(node: fx.Node, module: nn.Module | None) -> str:
    """The operation of a node in the user's words: BatchNorm2d, torch.relu, .view()."""
    if module is not None:
        return type(module).__name__
    if node.op == "call_method":
        return f".{node.target}()"
    name = getattr(node.target, "__name__", str(node.target))
    return f"{(getattr(node.target, '__module__', None) or 'torch').lstrip('_')}.{name}"


def rule_of(node: fx.Node, module: nn.Module | None) -> Rule | None:
    """The rule of a node's operation; `module` is the one that it calls."""
    return rule_for(node.target) if module is None else rule_for_module(module)


def spatial_axes(node: fx.Node, module: nn.Module | None) -> int | None:
    """The number of spatial axes that a node's operation is made for, if it fixes one: it slides, pools or pads."""
    rule = rule_of(node, module)
    return None if rule is None else rule.spatial


def overwrites(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation may write into its arguments: torch's names tell, of a user's own code nothing is known."""
    if module is not None:
        own = rule_for_module(module) is None and not type(module).__module__.startswith("torch.nn.")
        return own or any(getattr(part, "inplace", False) for part in module.modules())
    if node.op == "call_function" and (getattr(node.target, "__module__", None) or "torch").split(".")[0] not in _KNOWN:
        return True
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    by_name = name.endswith("_") and not name.endswith("__")
    by_argument = bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None
    return by_name or by_argument or node.target in _ASSIGNING


def answer(
    node: fx.Node,
    inputs: Callable[[fx.Node], Any],
    module: nn.Module | None,
    attributes: Mapping[str, Any] | None = None,
    freeze: bool = False,
) -> Answer:
    """What the rule of a node's operation says, given the value of each node that it reads.

    `attributes` stand in for the module's; with `freeze` a batch norm uses its running statistics whatever its mode.
    Raises ImageTooSmallError where a window does not fit the image.
    """
    args: tuple[Any, ...]
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), inputs)
    if node.target is operator.getitem and isinstance(args[0], (tuple, list)) and isinstance(args[1], (int, slice)):
        return Fact(args[0][args[1]])
    rule = rule_of(node, module)
    found = leaves((args, kwargs))
    expands = rule is not None and rule.takes_sizes and any(isinstance(leaf, (torch.Tensor, Unknown)) for leaf in found)
    if not expands and not any(isinstance(leaf, Value) for leaf in found):
        return _of_sizes(node, args, kwargs, found)
    if rule is None:
        return NotLocal(f"has no streaming rule ({operation(node, module)})")
    if module is not None:
        frozen = {"training": False} if freeze and isinstance(module, _BatchNorm) else {}
        args = (Borrowed(module, {**(attributes or {}), **frozen}), *args)
    elif freeze and node.target is F.batch_norm:
        kwargs = _frozen(rule, args, kwargs)
        args = ()
    try:
        return rule(*args, **kwargs)
    except ValueError as error:
        raise ImageTooSmallError(f"the image is too small for {label(node)}: {error}") from None


def _of_sizes(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], found: list[Any]) -> Answer:
    """Arithmetic with sizes that were read off values; they are those of the whole values."""
    known = (
        getattr(node.target, "__module__", None) in ("_operator", "builtins", "math") or node.target is torch._assert
    )
    if node.op != "call_function" or not known or any(isinstance(leaf, torch.Tensor) for leaf in found):
        return NotLocal(
            f"uses a size of the image in {operation(node, None)}", "use the size of a value that is not streamed"
        )
    of_shapes = any(isinstance(arg, tuple) for arg in args) and node.target in (
        operator.add,
        operator.mul,
        tuple,
        list,
        len,
    )
    if not of_shapes and any(isinstance(leaf, (Symbol, Unknown)) for leaf in found):
        return Fact(Symbol())
    assert callable(node.target)
    return Fact(node.target(*args, **kwargs))


def _frozen(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**rule.signature.bind(*args, **kwargs).arguments, "training": False}


def leaves(nested: Any) -> list[Any]:
    """What nested tuples, lists, dicts and slices hold."""
    found: list[Any] = []
    fx.node.map_aggregate(nested, found.append)
    return found


def locals_of(found: Answer) -> tuple[Local, ...]:
    """The operations in an answer."""
    parts = found if isinstance(found, tuple) else (found,)
    return tuple(part for part in parts if isinstance(part, Local))


def define(found: Answer, index: int) -> Any:
    """The value of a node: for each operation in the answer a Value, numbered from `index`; for a fact what it says.

    A total stands for itself: no streamed operation reads it.
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


@dataclass(frozen=True)
class Step:
    """One value of the program: an operation of the streamed part, ready to run on blocks."""

    node: fx.Node
    local: Local
    spans: tuple[int | Span, ...]
    """For every window the streamed axis that it slides along, or the one span of an axis that is not streamed."""
    differentiable: bool
    """Whether the value depends on something that requires a gradient."""


@dataclass(frozen=True)
class Lowered:
    """The streamed graph of one call: value 0 is the image, value i comes from `steps[i - 1]`."""

    steps: list[Step]
    results: tuple[Any, ...]
    """What the graph returns: Values, totals and facts."""


def lower(
    graph: fx.Graph,
    image: Value,
    differentiable: bool,
    inputs: Sequence[Any],
    modules: Mapping[str, nn.Module],
    attributes: Mapping[str, Mapping[str, torch.Tensor]],
    axes: tuple[str, ...],
    freeze: bool,
) -> Lowered:
    """Lower the streamed graph onto an image and `inputs`, what its placeholders but the first receive.

    `attributes` are the tensors of each module. Raises NotLocalError, or the error that the rule names, where an
    operation is not local any more.
    """
    first, *others = (node for node in graph.nodes if node.op == "placeholder")
    values: dict[fx.Node, Any] = {first: image, **dict(zip(others, inputs, strict=True))}
    trained = [differentiable]
    steps: list[Step] = []
    for node in graph.nodes:
        if not node.op.startswith("call"):
            continue
        path = str(node.target)
        own = attributes[path] if node.op == "call_module" else {}
        found = answer(node, values.__getitem__, modules[path] if node.op == "call_module" else None, own, freeze)
        if isinstance(found, NotLocal):
            raise (found.error or NotLocalError)(complaint(node, found))
        values[node] = define(found, len(steps) + 1)
        read = [*own.values(), *(leaf for source in node.all_input_nodes for leaf in leaves(values[source]))]
        used = any(trained[leaf.index] if isinstance(leaf, Value) else requires_grad(leaf) for leaf in read)
        for local in locals_of(found):
            trained.append(used and local.differentiable)
            steps.append(Step(node, local, tuple(_spans(local, axes)), trained[-1]))
    return Lowered(steps, tuple(values[node] for node in returned(graph)))


def returned(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that a streamed graph returns."""
    (output,) = graph.output_node().args
    return [output] if isinstance(output, fx.Node) else list(output)  # type: ignore[arg-type]  # a tuple of nodes


def requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def complaint(node: fx.Node, problem: NotLocal) -> str:
    """A sentence for the user: where, why, and the way out."""
    return f"{label(node)} {problem.reason}." + (f" Way out: {problem.way_out}." if problem.way_out else "")


def _spans(local: Local, axes: tuple[str, ...]) -> Iterator[int | Span]:
    for dim, window in local.windows.items():
        here = local.values[0].dims[dim]
        if here.tag is not None:
            yield axes.index(here.tag)
        else:
            assert isinstance(here.size, int), "sizes are known at a call"
            yield window.whole(here.size)


def program(steps: Iterable[Step], axis: str) -> Program:
    """The integer program of one streamed axis."""
    return ((), *(tuple((v.index, step.local.window(v, axis)) for v in step.local.values) for step in steps))
