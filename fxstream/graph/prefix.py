"""The prefix: the maximal front part of a traced graph whose operations are all local, and what it hands over."""

from __future__ import annotations

from functools import cached_property

import networkx as nx
from torch import fx

from ..errors import StreamingError, TileShapeError
from ..geometry.axes import axis_names
from ..ops import NotLocal
from .arguments import Form
from .findings import STREAMED, Finding, crossing, find, image_sizes
from .nodes import modules_around, spatial_axes
from .receptive_field import receptive_field
from .trace import Trace, trace


def find_prefix(
    traced: Trace, image: fx.Node, names: tuple[str, ...], axes: tuple[str, ...], freeze_batchnorm: bool
) -> Prefix:
    """The prefix of a traced model that streams along `axes`.

    A module that was traced in one mode but is not streamed becomes one call, which then follows its own mode. The
    model is therefore traced again until there is no such module.
    """
    while True:
        prefix = Prefix(traced, image, names, axes, freeze_batchnorm)
        bypassed = prefix.bypassed()
        if not bypassed:
            return prefix
        arguments = traced.assumptions.given.forms
        traced = trace(traced.root, arguments, traced.opaque | bypassed, freeze_batchnorm)
        image = image_node(traced.graph, str(image.target))


class Prefix:
    """Which nodes of a traced graph are streamed, and why not the others.

    Attributes:
        trace: the traced model.
        image: the placeholder of the streamed image.
        names: the image's dimensions, such as ("N", "C", "H", "W").
        axes: the streamed ones among them, such as ("H", "W").
        freeze_batchnorm: whether batch norms use their running statistics in every mode.
        findings: one `Finding` per node of the traced graph, in order.
        outputs: the nodes whose values the streamed part hands to the head.
        graph: a networkx.DiGraph over node names; nodes carry `status`, `operation` and `receptive_field`, edges
            between local nodes carry `windows`.
    """

    def __init__(
        self, trace: Trace, image: fx.Node, names: tuple[str, ...], axes: tuple[str, ...], freeze_batchnorm: bool
    ):
        self.trace = trace
        self.image = image
        self.names = names
        self.axes = axes
        self.freeze_batchnorm = freeze_batchnorm
        self.findings = find(trace, image, names, axes, freeze_batchnorm)
        self.outputs = _outputs(self.findings)
        self.graph = _graph(self.findings, axes)

    @property
    def stops(self) -> list[Finding]:
        """The findings at which streaming stops."""
        return [finding for finding in self.findings if finding.status in ("total", "stop")]

    @property
    def head(self) -> list[Finding]:
        """The findings that depend on the image and are not streamed."""
        return [finding for finding in self.findings if finding.in_head]

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """The nodes of the streamed part, in order: those that an output needs."""
        names = {node.name for node in self.outputs}
        needed = names.union(*(nx.ancestors(self.graph, name) for name in names))
        return [f.node for f in self.findings if f.status in STREAMED and f.node.name in needed]

    def bypassed(self) -> dict[str, NotLocal]:
        """Path of a module that was traced in its present mode, and none of whose operations is streamed -> why."""
        streamed = {path for node in self.nodes for path in modules_around(node)}
        candidates = {*self.trace.assumptions.modes, *self.trace.frozen} - streamed
        found: dict[str, NotLocal] = {}
        for finding in self.head:
            for path in candidates.intersection(modules_around(finding.node)):
                found.setdefault(path, finding.problem or NotLocal("depends on its mode"))
        return found


def image_node(graph: fx.Graph, name: str | None) -> fx.Node:
    """The placeholder that is streamed: the one called `name`, by default the first. Raises StreamingError."""
    placeholders: list[fx.Node] = [node for node in graph.nodes if node.op == "placeholder"]
    if not placeholders:
        raise StreamingError("the model's forward takes no argument that could be the image")
    if name is None:
        return placeholders[0]
    for node in placeholders:
        if node.target == name:
            return node
    known = ", ".join(str(node.target) for node in placeholders)
    raise StreamingError(f"image={name!r} is not an argument of the model's forward ({known})")


def image_names(trace: Trace, image: str | None) -> tuple[str, ...]:
    """Names of the image's dimensions, such as ("N", "C", "H", "W").

    The number of spatial axes is that of the first operation that is made for one, otherwise that of the example with
    which the model was traced. Raises TileShapeError if neither tells it.
    """
    for node in trace.graph.nodes:
        if (axes := spatial_axes(node, trace.module_of(node))) is not None:
            return axis_names(axes)
    form = trace.assumptions.given.form_of(str(image_node(trace.graph, image).target))
    if not isinstance(form, Form):
        raise TileShapeError(
            "the model does not tell how many spatial axes its image has. Way out: give an example_input"
        )
    if not 3 <= len(form.shape) <= 5:
        raise TileShapeError(f"example_input has {len(form.shape)} dimensions; an image has 3 to 5: (N, C, *spatial)")
    return axis_names(len(form.shape) - 2)


def _outputs(findings: list[Finding]) -> list[fx.Node]:
    """The streamed values that the head reads."""
    wanted = crossing(findings) - image_sizes(findings)
    return [finding.node for finding in findings if finding.status in STREAMED and finding.node in wanted]


def _graph(findings: list[Finding], axes: tuple[str, ...]) -> nx.DiGraph[str]:
    graph: nx.DiGraph[str] = nx.DiGraph()
    for finding in findings:
        name = finding.node.name
        graph.add_node(name, status=finding.status, operation=finding.operation)
        for source in finding.sources:
            graph.add_edge(source.name, name, windows=finding.windows.get(source))
        # The findings are in topological order, so what the node reads has its receptive field already.
        graph.nodes[name]["receptive_field"] = receptive_field(graph, name, axes)
    return graph
