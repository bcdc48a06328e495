"""What each node of the traced graph is: local or not, and if not, why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import fx, nn

from ..geometry.axes import IMAGE, Dim, Symbol, Value
from ..geometry.window import IDENTITY, Window
from ..ops import Answer, Fact, Local, NotLocal, Total
from .aliasing import Aliasing
from .answers import answer, complaint, define, locals_of
from .constants import Constants
from .hooks import has_hooks
from .nodes import is_new, is_own_code, label, leaves, operation, overwrites
from .trace import Trace

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
    after a total or a stop."""
    operation: str
    """The operation in the user's words, such as "BatchNorm2d" or "torch.relu"."""
    answer: Answer | None = None
    """What the rule of the operation says, if the node is streamed."""
    problem: NotLocal | None = None
    """Why nothing streams from here on, for a total or a stop."""
    reads: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    """A value that was overwritten in place before this node runs -> the result that the node reads instead."""
    windows: Mapping[fx.Node, Mapping[str, Window]] = field(default_factory=dict)
    """For a local node: what it reads of each value, by streamed axis."""
    early: bool = False
    """True for a constant that must run before the streamed call, see `Aliasing.precedes_streaming`."""

    @property
    def label(self) -> str:
        """How the node is named to the user: by the path of its module in the model."""
        return label(self.node)

    @property
    def sources(self) -> list[fx.Node]:
        """The nodes that this one reads; of a value that was overwritten, the result that this node sees."""
        return [self.reads.get(source, source) for source in self.node.all_input_nodes]

    @property
    def in_head(self) -> bool:
        """Whether the node depends on the image, and the head computes it."""
        return self.status in ("stop", "head")

    @property
    def reason(self) -> str:
        """Where streaming stops, why, and the way out; empty elsewhere."""
        return "" if self.problem is None else complaint(self.node, self.stated)

    @property
    def stated(self) -> NotLocal:
        """Why streaming stops, as it is told to the user."""
        assert self.problem is not None
        further = ", and is accumulated tile by tile" if self.status == "total" else ""
        return replace(self.problem, reason=self.problem.reason + further)


def find(
    trace: Trace, image: fx.Node, names: tuple[str, ...], axes: tuple[str, ...], freeze_batchnorm: bool
) -> list[Finding]:
    """One finding per node of the traced graph, in order.

    Where the head would overwrite memory that a streamed value shares, the graph is classified again with that value
    left to the head.
    """
    left_to_head: dict[fx.Node, NotLocal] = {}
    while True:
        walk = _Walk(trace, image, names, axes, freeze_batchnorm, left_to_head)
        findings = [walk.visit(node) for node in trace.graph.nodes]
        if walk.conflict is None:
            for finding in findings:
                finding.early = finding.status == "constant" and walk.aliasing.precedes_streaming(finding.node)
            _leave_totals(findings)
            return findings
        node, problem = walk.conflict
        left_to_head[node] = problem


def crossing(findings: list[Finding]) -> set[fx.Node]:
    """The nodes that the head reads."""
    return {source for finding in findings if finding.in_head for source in finding.sources}


def image_sizes(findings: list[Finding]) -> set[fx.Node]:
    """The nodes that depend on nothing but the size of the image itself, which the head can therefore compute."""
    known: set[fx.Node] = set()
    for finding in findings:
        of_image = finding.status == "size" and known.issuperset(finding.sources)
        if finding.status in ("image", "constant") or of_image:
            known.add(finding.node)
    return {finding.node for finding in findings if finding.status == "size" and finding.node in known}


def _leave_totals(findings: list[Finding]) -> None:
    """Leave a reduction to the head if the head gets the operand of it in any case."""
    crosses = crossing(findings)
    for finding in findings:
        if finding.status == "total" and not crosses.isdisjoint(finding.sources):
            finding.status = "stop"


class _Walk:
    """One walk over the graph, in order."""

    def __init__(
        self,
        trace: Trace,
        image: fx.Node,
        names: tuple[str, ...],
        axes: tuple[str, ...],
        freeze_batchnorm: bool,
        left_to_head: Mapping[fx.Node, NotLocal],
    ):
        self.trace = trace
        self.image = image
        self.axes = axes
        self.freeze_batchnorm = freeze_batchnorm
        self.left_to_head = left_to_head
        self.aliasing = Aliasing(trace.graph, image)
        self.constants = Constants(trace.modules, trace.constants, trace.known)
        self.found: dict[fx.Node, Finding] = {}
        self.states = {path: _tensor_names(path, module) for path, module in trace.modules.items()}
        sizes = trace.known.get(image, [None] * len(names))
        dims = tuple(
            Dim(name if name in axes else None, Symbol() if size is None else size)
            for name, size in zip(names, sizes, strict=True)
        )
        self.values: dict[fx.Node, Any] = {image: Value(dims, 0)}
        self.owners = [image]
        """The node to which each numbered value belongs."""
        self.conflict: tuple[fx.Node, NotLocal] | None = None
        """A streamed node that must be left to the head, and why."""

    def visit(self, node: fx.Node) -> Finding:
        """Classify a node, and note what its result is and whose memory it may share."""
        finding = self.found[node] = self._classify(node)
        if finding.status in ("local", "size"):
            self._define(finding)
        elif finding.status == "total":
            self.aliasing.add(node, ())
        elif finding.status != "image" and not self.constants.is_number(node):
            # It may be a view of anything that it reads. A constant counts as one even if it is not, since a write into
            # what it reads must come before or after it.
            new = finding.in_head and node.op != "output" and is_new(node, self.trace.module_of(node))
            shares = () if new else map(self.aliasing.latest, node.all_input_nodes)
            self.aliasing.add(node, shares, [str(node.target)] if node.op == "get_attr" else self._state(node))
        return finding

    def _define(self, finding: Finding) -> None:
        """Note the values of a streamed node, by number, and their memory."""
        assert finding.answer is not None
        node, local = finding.node, locals_of(finding.answer)
        self.values[node] = define(finding.answer, len(self.owners))
        self.owners += [node] * len(local)
        if len(local) == 1 and local[0].mutates is not None:
            self.aliasing.overwrite(node, self._node_of(local[0].mutates))
            return
        shared = [one.aliases for one in local if one.aliases is not None]
        if not local:
            # A fact hands values on as they are.
            shared = [leaf for leaf in leaves(self.values[node]) if isinstance(leaf, Value)]
        self.aliasing.add(node, map(self._node_of, shared))

    def _state(self, node: fx.Node) -> list[str]:
        """Parameters and buffers, by path, of the module that a node calls."""
        return self.states[str(node.target)] if node.op == "call_module" else []

    def _classify(self, node: fx.Node) -> Finding:
        module = self.trace.module_of(node)
        name = operation(node, module) if node.op.startswith("call") else node.op
        if node is self.image:
            return Finding(node, "image", name)
        sources = [self.aliasing.latest(source) for source in node.all_input_nodes]
        depending = [source for source in sources if self.found[source].status != "constant"]
        if not depending and node.op != "output":
            self.constants.add(node)
            if node.op.startswith("call") and overwrites(node, module):
                self.aliasing.write_constants(node, sources)
            return Finding(node, "constant", name)
        reads = {old: new for old, new in zip(node.all_input_nodes, sources, strict=True) if old is not new}
        ended = node.op == "output" or any(map(self._ends, depending))
        ended = ended or self.aliasing.written_by_head(sources, self._state(node))
        found = None if ended else self._ask(node, module)
        if found is not None and locals_of(found):
            constants = [source for source in sources if source not in depending]
            found = self.aliasing.read_constants(node, constants, self._state(node)) or found
        if isinstance(found, Total):
            return Finding(node, "total", name, found, found.problem, reads)
        if found is not None and not isinstance(found, NotLocal):
            of_values = not isinstance(found, Fact) or any(isinstance(leaf, Value) for leaf in leaves(found.value))
            status: Status = "local" if of_values else "size"
            return Finding(node, status, name, found, reads=reads, windows=self._windows(node, found))
        if node.op != "output" and overwrites(node, module):
            self._write(node, sources, found)
        return Finding(node, "head" if found is None else "stop", name, problem=found, reads=reads)

    def _ends(self, node: fx.Node) -> bool:
        """Whether whatever reads a node belongs to the head."""
        return self.found[node].status == "total" or self.found[node].in_head

    def _ask(self, node: fx.Node, module: nn.Module | None) -> Answer:
        """What a node is, given that everything that it reads streams."""
        if node in self.left_to_head:
            return self.left_to_head[node]
        if module is not None and any(map(has_hooks, module.modules())):
            return NotLocal("has a hook, which would run once per tile", "remove the hook")
        if module is not None and str(node.target) in self.trace.opaque:
            return self.trace.opaque[str(node.target)]
        found = answer(node, self._input, module, self.freeze_batchnorm)
        if isinstance(found, Total) and found.operand.index == IMAGE:
            return found.problem  # there is nothing to stream
        if isinstance(found, Local) and found.mutates is not None:
            return self.aliasing.obstacle(node, self._node_of(found.mutates), self._ends) or found
        return found

    def _input(self, node: fx.Node) -> Any:
        """What a rule is given for a node."""
        node = self.aliasing.latest(node)
        return self.values[node] if node in self.values else self.constants[node]

    def _node_of(self, value: Value) -> fx.Node:
        return self.owners[value.index]

    def _windows(self, node: fx.Node, found: Answer) -> dict[fx.Node, dict[str, Window]]:
        """What a local node reads of each node whose values it takes, per streamed axis."""
        reads = [(local, value) for local in locals_of(found) for value in local.values]
        windows: dict[fx.Node, dict[str, Window]] = {}
        for source in map(self.aliasing.latest, node.all_input_nodes):
            held = {leaf.index for leaf in leaves(self.values.get(source)) if isinstance(leaf, Value)}
            if held and isinstance(found, Fact):
                windows[source] = dict.fromkeys(self.axes, IDENTITY)
            for local, value in reads:
                if value.index in held:
                    windows[source] = {axis: local.window(value, axis) for axis in self.axes}
        return windows

    def _write(self, node: fx.Node, sources: list[fx.Node], problem: NotLocal | None) -> None:
        """Note that a node of the head, which is not local for this reason if it is the first, may overwrite what it
        reads."""
        shared = self.aliasing.write_in_head(node, sources, lambda source: self.found[source].status == "local")
        if shared is None or self.conflict is not None:
            return
        if not is_own_code(node, self.trace.module_of(node)):
            self.conflict = shared, NotLocal(f"shares memory that {label(node)}, which is not streamed, overwrites")
            return
        problem = problem or self.trace.opaque.get(str(node.target)) or NotLocal("has no streaming rule")
        reason = f"shares memory that {label(node)} might overwrite, of whose code nothing is known: {label(node)} "
        self.conflict = shared, replace(problem, reason=reason + problem.reason)


def _tensor_names(path: str, module: nn.Module) -> list[str]:
    """The parameters and buffers of a module and of those in it, by their path in the model."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return [f"{path}.{name}" if path else name for name, _ in named]
