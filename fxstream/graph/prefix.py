"""Analysis: which operations are local, where the streamed part ends and why, what each value sees of the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import networkx as nx
import torch
from torch import fx, nn

from ..errors import StreamingError, TileShapeError
from ..geometry.axes import Dim, Symbol, Value, axis_names
from ..geometry.window import IDENTITY, Window
from ..ops import Answer, Fact, Local, NotLocal, Total
from .aliasing import Memory
from .answers import (
    answer,
    complaint,
    define,
    label,
    leaves,
    locals_of,
    modules_around,
    operation,
    overwrites,
    spatial_axes,
)
from .constants import Constants
from .hooks import has_hooks
from .receptive_field import ReceptiveField, receptive_field
from .trace import Trace

if TYPE_CHECKING:
    from ..estimate import Estimate

Status = Literal["image", "constant", "size", "local", "total", "stop", "head"]

STREAMED: tuple[Status, ...] = ("size", "local", "total")
"""What the streamed submodule computes."""


@dataclass(eq=False)
class Finding:
    """What the analysis found about one node."""

    node: fx.Node
    status: Status
    """image: the streamed input; constant: does not depend on it; size: depends on its size alone; local: streams;
    total: reduces whole axes, and is accumulated tile by tile; stop: depends on the image but is not local; head: comes
    after one of these two."""
    operation: str
    answer: Answer | None = None
    problem: NotLocal | None = None
    reads: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    """Values that were overwritten in place before this node runs -> the results to read instead."""
    windows: Mapping[fx.Node, Mapping[str, Window]] = field(default_factory=dict)
    """For a local node: what it reads of each value, per streamed axis."""
    early: bool = False
    """For a constant: it runs before the streamed call, since something in front of it overwrites what that reads."""

    @property
    def label(self) -> str:
        return label(self.node)

    @property
    def reason(self) -> str:
        """Where streaming stops, why, and the way out; empty elsewhere."""
        if self.problem is None:
            return ""
        further = ", and is accumulated tile by tile" if self.status == "total" else ""
        return complaint(self.node, replace(self.problem, reason=self.problem.reason + further))


class Analysis:
    """The result of `fxstream.analyze`; `print` shows it as a table.

    Attributes:
        findings: one `Finding` per node of the traced graph, in order.
        image: the node of the streamed input.
        names: the image's dimensions, such as ("N", "C", "H", "W").
        axes: the streamed ones among them, such as ("H", "W").
        graph: a networkx.DiGraph over node names. Nodes carry `status`, `operation` and `receptive_field` (a dict axis
            -> ReceptiveField, or None where it is undefined); edges between local nodes carry `windows` (a dict axis ->
            Window).
        outputs: the nodes whose values the streamed part hands to the head.
        stops: the findings at which streaming stops.
    """

    def __init__(self, trace: Trace, image: fx.Node, names: tuple[str, ...], axes: tuple[str, ...], freeze: bool):
        self.trace = trace
        self.image = image
        self.names = names
        self.axes = axes
        self.freeze = freeze
        self.findings = _find(trace, image, names, axes, freeze)
        self.outputs = _outputs(self.findings)
        self.graph = _graph(self.findings, axes)

    @property
    def stops(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status in ("total", "stop")]

    @property
    def prefix(self) -> list[fx.Node]:
        """The nodes of the streamed part, in order: those that an output needs."""
        names = {node.name for node in self.outputs}
        needed = names.union(*(nx.ancestors(self.graph, name) for name in names))
        return [f.node for f in self.findings if f.status in STREAMED and f.node.name in needed]

    def bypassed(self) -> dict[str, NotLocal]:
        """Modules that were traced as they are in one mode, and none of whose operations is streamed -> why."""
        streamed = {path for node in self.prefix for path in modules_around(node)}
        candidates = {*self.trace.guards, *self.trace.frozen} - streamed
        found: dict[str, NotLocal] = {}
        for finding in self.findings:
            if finding.status in ("stop", "head"):
                for path in candidates.intersection(modules_around(finding.node)):
                    problem = finding.problem or NotLocal("depends on its mode")
                    found.setdefault(path, problem)
        return found

    def receptive_field(self, node: fx.Node | str) -> dict[str, ReceptiveField] | None:
        """Per streamed axis, what one position of a local node sees; None where it is undefined:
        behind branches that advance at different rates, and behind resampling to a size."""
        name = node.name if isinstance(node, fx.Node) else node
        found: dict[str, ReceptiveField] | None = self.graph.nodes[name]["receptive_field"]
        return found

    def estimate(self, image_shape: Sequence[int], tile_shape: int | Sequence[int | None]) -> Estimate:
        """Predict what a step of the converted model takes, without running anything: on the meta device.

        The step is forward and backward of the whole model, no gradient for the image; where gradients are disabled,
        or nothing requires one, it is the forward alone. Peak bytes are those of tensors, over the loaded model.

        Args:
            image_shape: (N, C, *spatial).
            tile_shape: as `fxstream.convert` takes it.

        Returns:
            An `Estimate`: number of tiles, FLOPs, bytes carried between forward and backward, peak bytes.

        Raises:
            As `fxstream.convert`, and as the converted model where it is called with such an image. TypeError, if the
            model needs further arguments.
        """
        from ..estimate import estimate

        return estimate(self, image_shape, tile_shape)

    def __str__(self) -> str:
        from ..analysis import table

        return table(self)


def image_node(graph: fx.Graph, name: str | None) -> fx.Node:
    """The placeholder that is streamed."""
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


def image_names(trace: Trace, example_input: torch.Tensor | None) -> tuple[str, ...]:
    """The image's dimensions: by the first operation made for a number of spatial axes, else by an example."""
    for node in trace.graph.nodes:
        if (axes := spatial_axes(node, trace.module_of(node))) is not None:
            return axis_names(axes)
    if example_input is None:
        raise TileShapeError(
            "the model does not tell how many spatial axes its image has. Way out: give an example_input"
        )
    if not 3 <= example_input.dim() <= 5:
        raise TileShapeError(
            f"example_input has {example_input.dim()} dimensions; an image has 3 to 5: (N, C, *spatial)"
        )
    return axis_names(example_input.dim() - 2)


def _find(trace: Trace, image: fx.Node, names: tuple[str, ...], axes: tuple[str, ...], freeze: bool) -> list[Finding]:
    """Classify every node; again, with one more node left to the head, while the head overwrites streamed memory."""
    left_to_head: dict[fx.Node, NotLocal] = {}
    while True:
        walk = _Walk(trace, image, names, axes, freeze, left_to_head)
        findings = [walk.visit(node) for node in trace.graph.nodes]
        if walk.conflict is None:
            for finding in findings:
                finding.early = finding.status == "constant" and walk.memory.precedes_streaming(finding.node)
            _leave_totals(findings)
            return findings
        node, problem = walk.conflict
        left_to_head[node] = problem


def _leave_totals(findings: list[Finding]) -> None:
    """Leave those reductions to the head whose operands it gets in any case."""
    crossing = _crossing(findings)
    for finding in findings:
        if finding.status == "total" and not crossing.isdisjoint(_sources(finding)):
            finding.status = "stop"


class _Walk:
    """One walk over the graph, in order."""

    def __init__(
        self,
        trace: Trace,
        image: fx.Node,
        names: tuple[str, ...],
        axes: tuple[str, ...],
        freeze: bool,
        left_to_head: Mapping[fx.Node, NotLocal],
    ):
        self.trace = trace
        self.image = image
        self.axes = axes
        self.freeze = freeze
        self.left_to_head = left_to_head
        self.nodes = list(trace.graph.nodes)
        self.memory = Memory(trace.graph, image)
        self.constants = Constants(trace.modules, trace.constants)
        self.found: dict[fx.Node, Finding] = {}
        self.states = {
            path: [f"{path}.{name}" for name in module.state_dict()] for path, module in trace.modules.items()
        }
        dims = tuple(Dim(name if name in axes else None, Symbol()) for name in names)
        self.values: dict[fx.Node, Any] = {image: Value(dims, 0)}
        self.owners = [image]
        """The nodes to which the numbered values belong."""
        self.conflict: tuple[fx.Node, NotLocal] | None = None

    def visit(self, node: fx.Node) -> Finding:
        finding = self.found[node] = self._classify(node)
        if finding.status in ("local", "size"):
            assert finding.answer is not None
            self.values[node] = define(finding.answer, len(self.owners))
            local = locals_of(finding.answer)
            self.owners += [node] * len(local)
            if len(local) == 1 and local[0].mutates is not None:
                self.memory.overwrite(node, self._node_of(local[0].mutates))
            else:
                passed = [leaf for leaf in leaves(self.values[node]) if isinstance(leaf, Value)] if not local else []
                bases = [one.aliases for one in local if one.aliases is not None]
                self.memory.add(node, map(self._node_of, [*bases, *passed]))
        elif finding.status == "total":
            self.memory.add(node, ())
        elif finding.status != "image":
            # Without a rule that says otherwise, its result may be a view of anything that it reads.
            slides = spatial_axes(node, self.trace.module_of(node)) is not None
            shares = () if slides else map(self.memory.latest, node.all_input_nodes)
            self.memory.add(node, shares, [str(node.target)] if node.op == "get_attr" else self._state(node))
        return finding

    def _state(self, node: fx.Node) -> list[str]:
        """Parameters and buffers, by path, of the module that a node calls."""
        return self.states[str(node.target)] if node.op == "call_module" else []

    def _classify(self, node: fx.Node) -> Finding:
        module = self.trace.module_of(node)
        name = operation(node, module) if node.op.startswith("call") else node.op
        if node is self.image:
            return Finding(node, "image", name)
        sources = [self.memory.latest(source) for source in node.all_input_nodes]
        depending = [source for source in sources if self.found[source].status != "constant"]
        if not depending and node.op != "output":
            self.constants.add(node)
            if node.op.startswith("call") and overwrites(node, module):
                self.memory.write_constants(node, sources)
            return Finding(node, "constant", name)
        reads = {old: new for old, new in zip(node.all_input_nodes, sources, strict=True) if old is not new}
        ended = node.op == "output" or any(map(self._in_head, depending))
        ended = ended or self.memory.spoilt(sources, self._state(node))
        found = None if ended else self._ask(node, module)
        if found is not None and locals_of(found):
            constants = [source for source in sources if source not in depending]
            found = self.memory.read_constants(node, constants, self._state(node)) or found
        if isinstance(found, Total):
            return Finding(node, "total", name, found, found.problem, reads)
        if found is not None and not isinstance(found, NotLocal):
            of_values = not isinstance(found, Fact) or any(isinstance(leaf, Value) for leaf in leaves(found.value))
            status: Status = "local" if of_values else "size"
            return Finding(node, status, name, found, reads=reads, windows=self._windows(node, found))
        if node.op != "output" and overwrites(node, module):
            self._spoil(node, sources)
        return Finding(node, "head" if found is None else "stop", name, problem=found, reads=reads)

    def _in_head(self, node: fx.Node) -> bool:
        return self.found[node].status in ("total", "stop", "head")

    def _ask(self, node: fx.Node, module: nn.Module | None) -> Answer:
        if node in self.left_to_head:
            return self.left_to_head[node]
        if module is not None and any(map(has_hooks, module.modules())):
            return NotLocal("has a hook, which would run once a tile", "remove the hook")
        if module is not None and str(node.target) in self.trace.opaque:
            return self.trace.opaque[str(node.target)]
        found = answer(node, self._input, module, freeze=self.freeze)
        if isinstance(found, Total) and found.operand.index == 0:
            return found.problem  # there is nothing to stream
        if isinstance(found, Local) and found.mutates is not None:
            return self.memory.obstacle(node, self._node_of(found.mutates), self._in_head) or found
        return found

    def _input(self, node: fx.Node) -> Any:
        node = self.memory.latest(node)
        return self.values[node] if node in self.values else self.constants[node]

    def _node_of(self, value: Value) -> fx.Node:
        return self.owners[value.index]

    def _windows(self, node: fx.Node, found: Answer) -> dict[fx.Node, dict[str, Window]]:
        """What a local node reads of each node whose values it takes, per streamed axis."""
        reads = [(local, value) for local in locals_of(found) for value in local.values]
        windows: dict[fx.Node, dict[str, Window]] = {}
        for source in map(self.memory.latest, node.all_input_nodes):
            held = {leaf.index for leaf in leaves(self.values.get(source)) if isinstance(leaf, Value)}
            if held and isinstance(found, Fact):
                windows[source] = dict.fromkeys(self.axes, IDENTITY)
            for local, value in reads:
                if value.index in held:
                    windows[source] = {axis: local.window(value, axis) for axis in self.axes}
        return windows

    def _spoil(self, node: fx.Node, sources: list[fx.Node]) -> None:
        shared = self.memory.spoil(node, sources, lambda source: self.found[source].status == "local")
        if shared is not None and self.conflict is None:
            problem = NotLocal(f"shares memory that {label(node)}, which is not streamed, overwrites")
            self.conflict = (shared, problem)


def _outputs(findings: list[Finding]) -> list[fx.Node]:
    """The streamed values that the head reads."""
    wanted = _crossing(findings) - image_sizes(findings)
    return [finding.node for finding in findings if finding.status in STREAMED and finding.node in wanted]


def _crossing(findings: list[Finding]) -> set[fx.Node]:
    """What the head reads."""
    head = (finding for finding in findings if finding.status in ("stop", "head"))
    return {source for finding in head for source in _sources(finding)}


def _sources(finding: Finding) -> list[fx.Node]:
    """What a node reads, each under the name of the result that it sees."""
    return [finding.reads.get(source, source) for source in finding.node.all_input_nodes]


def image_sizes(findings: list[Finding]) -> set[fx.Node]:
    """The nodes that depend on nothing but the size of the image itself: the head can read it there."""
    found: set[fx.Node] = set()
    for finding in findings:
        sources = set(_sources(finding))
        if finding.status in ("image", "constant") or (finding.status == "size" and sources <= found):
            found.add(finding.node)
    return {finding.node for finding in findings if finding.status == "size" and finding.node in found}


def _graph(findings: list[Finding], axes: tuple[str, ...]) -> nx.DiGraph[str]:
    graph: nx.DiGraph[str] = nx.DiGraph()
    for finding in findings:
        name = finding.node.name
        graph.add_node(name, status=finding.status, operation=finding.operation, receptive_field=None)
        for source in _sources(finding):
            graph.add_edge(source.name, name, windows=finding.windows.get(source))
    for name in nx.topological_sort(graph):
        graph.nodes[name]["receptive_field"] = receptive_field(graph, name, axes)
    return graph
