"""Lowering: the streamed graph becomes a program, one step per value, for the image and the tensors of one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from ..errors import NotLocalError
from ..geometry.axes import IMAGE, Dim, Value
from ..geometry.grid import Grid
from ..geometry.schedule import AxisGraph, SizeError, schedule
from ..geometry.window import Span
from ..graph.answers import answer, complaint, define, locals_of
from ..graph.nodes import label, leaves, output_nodes, requires_grad
from ..ops import Local, NotLocal


@dataclass(frozen=True)
class Step:
    """How one value is computed: an operation of the streamed part, ready to run on blocks."""

    node: fx.Node
    local: Local
    spans: tuple[int | Span, ...]
    """For every window the number of the streamed axis that it slides along, or the span of a whole, other axis."""
    differentiable: bool
    """Whether the value depends on something that requires a gradient."""


@dataclass(frozen=True)
class Program:
    """The streamed graph of one call. Its values are numbered in topological order; value `IMAGE` is the image."""

    axes: tuple[str, ...]
    """The streamed axes."""
    image: Value
    steps: tuple[Step, ...]
    """One per value but the image, in their order."""
    returns: tuple[Any, ...]
    """What the graph returns, nested as it is: values, totals and facts."""

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


def lower(
    graph: fx.Graph,
    image: Value,
    differentiable: bool,
    inputs: Sequence[Any],
    modules: Mapping[str, nn.Module],
    attributes: Mapping[str, Mapping[str, torch.Tensor]],
    axes: tuple[str, ...],
    freeze_batchnorm: bool,
) -> Program:
    """Lower the streamed graph onto an image and what else the call is given.

    Args:
        graph: the streamed graph.
        image: sizes and tags of the image's dimensions.
        differentiable: whether the image requires a gradient.
        inputs: what the placeholders of `graph` but the first receive.
        modules: path -> module, for every module that `graph` calls.
        attributes: path -> the tensors that stand in for the module's own, by name.
        axes: the streamed axes.
        freeze_batchnorm: batch norms use their running statistics in every mode.

    Raises:
        NotLocalError, or the error that the rule names: an operation that was local at conversion is not local now.
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
        module = modules[path] if node.op == "call_module" else None
        found = answer(node, values.__getitem__, module, own, freeze_batchnorm)
        if isinstance(found, NotLocal):
            raise (found.error or NotLocalError)(complaint(node, found))
        values[node] = define(found, IMAGE + 1 + len(steps))
        read = [*own.values(), *(leaf for source in node.all_input_nodes for leaf in leaves(values[source]))]
        used = any(trained[leaf.index] if isinstance(leaf, Value) else requires_grad(leaf) for leaf in read)
        for local in locals_of(found):
            trained.append(used and local.differentiable)
            steps.append(Step(node, local, tuple(_spans(local, axes)), trained[-1]))
    return Program(axes, image, tuple(steps), tuple(values[node] for node in output_nodes(graph)))


def _spans(local: Local, axes: tuple[str, ...]) -> Iterator[int | Span]:
    """See `Step.spans`."""
    for dim, window in local.windows.items():
        here = local.values[0].dims[dim]
        if here.tag is not None:
            yield axes.index(here.tag)
        else:
            assert isinstance(here.size, int), "sizes are known at a call"
            yield window.whole(here.size)
