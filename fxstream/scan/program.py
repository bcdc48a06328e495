"""Lowering: the streamed graph becomes a program, one step per value, for all calls that are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from ..errors import NotLocalError, RuleError
from ..geometry.axes import IMAGE, Dim, Value
from ..geometry.grid import Grid
from ..geometry.schedule import AxisGraph, SizeError, schedule
from ..geometry.window import Span
from ..graph.answers import answer, complaint, define, locals_of
from ..graph.borrowed import Record
from ..graph.nodes import label, output_nodes
from ..ops import Given, Local, Noise, NotLocal, Sliced, Typed


@dataclass(frozen=True)
class Edge:
    """An operand of a step: a block of a value."""

    value: int
    number: int
    """The number of this operand among those of the step that are values, by which the schedule knows the edge."""


@dataclass(frozen=True)
class Slot:
    """An operand of a step: a tensor of the call that is not the image."""

    slot: int
    """Its place among the tensors of the call."""
    dims: Mapping[int, str]
    """Dimension of the tensor -> streamed axis, for those along which the step gets its own rows; else it is whole."""


@dataclass(frozen=True, eq=False)
class Made:
    """An operand of a step: what is made of tensors of the call, or of the type of a value, or of nothing but sizes."""

    make: Callable[..., Any]
    """`make(block, *parts)` makes it, given a block of the value `like`, or None, and its parts."""
    like: int | None
    """The value whose type it has; None if it is made without."""
    parts: tuple[Slot | Made, ...]
    """The tensors of which it is made, each of them whole."""
    dims: Mapping[int, str]
    """As for a `Slot`. What is made need not be a tensor if this is empty."""

    @cached_property
    def slots(self) -> frozenset[int]:
        """The places of the tensors of the call of which it is made."""
        return frozenset(
            slot for part in self.parts for slot in ((part.slot,) if isinstance(part, Slot) else part.slots)
        )


Operand = Edge | Slot | Made | Noise | None


@dataclass(frozen=True)
class Step:
    """How one value is computed: an operation of the streamed part, ready to run on blocks."""

    node: fx.Node
    local: Local
    operands: tuple[Operand, ...]
    """What `local.run` gets in front of the spans, one for each of its operands."""
    spans: tuple[int | Span, ...]
    """For every window the number of the streamed axis that it slides along, or the span of a whole, other axis."""


@dataclass(frozen=True, eq=False)
class Program:
    """The streamed graph for calls that are alike. It holds no tensor: its steps know the places of those of a call.

    Its values are numbered in topological order; value `IMAGE` is the image.
    """

    axes: tuple[str, ...]
    """The streamed axes."""
    image: Value
    steps: tuple[Step, ...]
    """One per value but the image, in their order."""
    returns: tuple[Any, ...]
    """What the graph returns, nested as it is: values, totals, facts, and `Slot` and `Made` for tensors."""
    plans: dict[tuple[int, ...], Any] = field(default_factory=dict, repr=False)
    """What has been planned for it (see plan.py), by the sizes of tiles."""

    def step_of(self, value: int) -> Step:
        """The step that computes a value; the image has none."""
        return self.steps[value - IMAGE - 1]

    def computed(self) -> Iterator[tuple[int, Step]]:
        """Every value but the image, by number, with its step."""
        return enumerate(self.steps, start=IMAGE + 1)

    def dims(self, value: int) -> tuple[Dim, ...]:
        """The dimensions of a value."""
        return self.image.dims if value == IMAGE else self.step_of(value).local.dims

    @cached_property
    def positions(self) -> list[tuple[int, ...]]:
        """For every value, which of its dimensions the streamed axes are."""
        values = [self.image, *(Value(step.local.dims) for step in self.steps)]
        return [tuple(map(value.position, self.axes)) for value in values]

    def axis_graph(self, axis: str) -> AxisGraph:
        """What the values read of one another along a streamed axis: integers for the schedule."""
        edges = (tuple((v.index, step.local.window(v, axis)) for v in step.local.values) for step in self.steps)
        return ((), *edges)

    def grid(self, tiles: Sequence[int]) -> Grid:
        """The tiles: `tiles` are their sizes along the streamed axes.

        Raises NotLocalError where operands have different numbers of rows, as in broadcasting along a streamed axis.
        """
        planned = []
        for axis, tile in zip(self.axes, tiles, strict=True):
            size = self.image.dims[self.image.position(axis)].size
            assert isinstance(size, int), "sizes are known at a call"
            try:
                planned.append(schedule(self.axis_graph(axis), size, tile))
            except SizeError as error:
                # Lowering has already found the windows that do not fit.
                where = label(self.step_of(error.value).node)
                raise NotLocalError(f"{where}, along {axis} of an image of {size}: {error}") from None
        return Grid(tuple(planned), self.axes, ["image", *(step.node.name for step in self.steps)])

    def trained(self, tensors: Sequence[torch.Tensor]) -> list[bool]:
        """For every value, whether it depends on something that requires a gradient, given the tensors of the call."""
        slots = [tensor.requires_grad for tensor in tensors]
        found = [slots[IMAGE]]
        for step in self.steps:
            used = any(_is_trained(operand, found, slots) for operand in step.operands)
            found.append(used and step.local.differentiable)
        return found


def _is_trained(operand: Operand, values: Sequence[bool], slots: Sequence[bool]) -> bool:
    """Whether an operand depends on something that requires a gradient, given which values and tensors do."""
    if isinstance(operand, Edge):
        return values[operand.value]
    if isinstance(operand, Slot):
        return slots[operand.slot]
    return isinstance(operand, Made) and any(slots[slot] for slot in operand.slots)


def lower(
    graph: fx.Graph,
    image: Value,
    inputs: Sequence[Any],
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Mapping[str, Given]],
    axes: tuple[str, ...],
    freeze_batchnorm: bool,
    record: Record,
) -> Program:
    """Lower the streamed graph onto an image and what else a call is given. In the result nothing is trained yet.

    Args:
        graph: the streamed graph.
        image: sizes and tags of the image's dimensions.
        inputs: what the placeholders of `graph` but the first receive, with a `Given` in place of each tensor.
        modules: path -> module, for every module that `graph` calls.
        tensors: path -> what stands for the tensors of the module, by name.
        axes: the streamed axes.
        freeze_batchnorm: batch norms use their running statistics in every mode.
        record: notes what the rules read of the modules.

    Raises:
        NotLocalError, or the error that the rule names: an operation that was local at conversion is not local now.
        RuleError: a rule lists a tensor that is none of those of the call.
    """
    first, *others = (node for node in graph.nodes if node.op == "placeholder")
    values: dict[fx.Node, Any] = {first: image, **dict(zip(others, inputs, strict=True))}
    steps: list[Step] = []
    for node in graph.nodes:
        if not node.op.startswith("call"):
            continue
        path = str(node.target) if node.op == "call_module" else ""
        module, own = (modules[path], tensors[path]) if path else (None, None)
        found = answer(node, values.__getitem__, module, freeze_batchnorm, own, record)
        if isinstance(found, NotLocal):
            raise (found.error or NotLocalError)(complaint(node, found))
        values[node] = define(found, IMAGE + 1 + len(steps))
        for local in locals_of(found):
            steps.append(Step(node, local, tuple(_operands(local)), tuple(_spans(local, axes))))
    returned = tuple(values[node] for node in output_nodes(graph))
    return Program(axes, image, tuple(steps), tree_map(_handed, returned))


def _operands(local: Local) -> Iterator[Operand]:
    """See `Step.operands`."""
    numbers = count()
    for operand in local.operands:
        if isinstance(operand, Value):
            yield Edge(operand.index, next(numbers))
        elif isinstance(operand, Sliced):
            yield _resolved(operand.tensor, operand.dims)
        elif isinstance(operand, (torch.Tensor, Typed)):
            yield _resolved(operand, {})
        else:
            yield operand


def _resolved(tensor: torch.Tensor | Typed, dims: Mapping[int, str]) -> Slot | Made:
    """Where a tensor that a rule was given comes from at a call."""
    recipe = tensor if isinstance(tensor, Typed) else getattr(tensor, "recipe", None)
    if recipe is not None:
        like = None if recipe.of is None else recipe.of.index
        return Made(recipe.make, like, tuple(_resolved(one, {}) for one in recipe.tensors), dims)
    return Slot(_slot(tensor), dims)


def _slot(tensor: Any) -> int:
    if isinstance(tensor, Given) and tensor.slot is not None:
        return tensor.slot
    reader = f"the streaming rule of {tensor.reader}" if isinstance(tensor, Given) else "a streaming rule"
    raise RuleError(
        f"{reader} has an operand that is neither a tensor that the operation is called with nor a parameter, buffer "
        "or attribute of its module. Way out: make it a buffer of the module"
    )


def _handed(leaf: Any) -> Any:
    """What the graph returns, with the origin of a tensor in place of the tensor."""
    return _resolved(leaf, {}) if isinstance(leaf, (torch.Tensor, Typed)) else leaf


def _spans(local: Local, axes: tuple[str, ...]) -> Iterator[int | Span]:
    """See `Step.spans`."""
    for dim, window in local.windows.items():
        here = local.values[0].dims[dim]
        if here.tag is not None:
            yield axes.index(here.tag)
        else:
            assert isinstance(here.size, int), "sizes are known at a call"
            yield window.whole(here.size)
