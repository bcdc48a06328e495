"""Partition: the traced graph rewritten into one call of the streamed submodule, followed by the head as it was."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from typing import NamedTuple

import networkx as nx
import torch.nn.functional as F
from torch import fx

from .findings import STREAMED, image_sizes
from .prefix import Prefix

Nodes = dict[fx.Node, fx.Node]
"""Nodes of the traced graph -> their copies in one of the two new graphs."""


class Partition(NamedTuple):
    """The two graphs of a converted model."""

    outer: fx.Graph
    """Placeholders, what does not depend on the image, the streamed call, the head."""
    streamed: fx.Graph
    """The image, the other values that enter, the streamed nodes under their names."""


def partition(prefix: Prefix, name: str) -> Partition:
    """Split the traced graph where the prefix ends; the outer graph calls the streamed submodule `name`."""
    status = {finding.node: finding.status for finding in prefix.findings}
    sources = (source for node in prefix.nodes for source in node.all_input_nodes)
    entering = [source for source in dict.fromkeys(sources) if status[source] == "constant"]
    parts = Partition(_outer(prefix, name, entering), _streamed(prefix, entering))
    if prefix.freeze_batchnorm:
        _freeze_functions(parts.outer)
    for graph in parts:
        graph.lint()  # finds a node that would read a value before it is there
    return parts


def _streamed(prefix: Prefix, entering: list[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    new = {node: graph.placeholder(node.name) for node in (prefix.image, *entering)}
    reads = {finding.node: finding.reads for finding in prefix.findings}
    for node in prefix.nodes:
        _copy(graph, node, reads[node], new)
    outputs = [new[node] for node in prefix.outputs]
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    return graph


def _outer(prefix: Prefix, name: str, entering: list[fx.Node]) -> fx.Graph:
    """The graph of the converted model, in three parts.

    1. The arguments, what enters the streamed call besides the image, and what must run before it.
    2. The streamed call and the values that it hands over.
    3. The head: everything else, in its old order.
    """
    graph = fx.Graph()
    new: Nodes = {}
    # 1. Before the streamed call.
    first = {node.name for node in entering}.union(*(nx.ancestors(prefix.graph, node.name) for node in entering))
    for finding in prefix.findings:
        if finding.node.op == "placeholder" or finding.early or finding.node.name in first:
            _copy(graph, finding.node, finding.reads, new)
    # 2. The streamed call.
    call = graph.call_module(name, (new[prefix.image], *(new[node] for node in entering)))
    if len(prefix.outputs) == 1:
        new[prefix.outputs[0]] = call
    else:
        for index, node in enumerate(prefix.outputs):
            new[node] = graph.call_function(operator.getitem, (call, index))
    # 3. The head.
    outside = _wanted(prefix)
    for finding in prefix.findings:
        if (finding.status not in STREAMED or finding.node in outside) and finding.node not in new:
            _copy(graph, finding.node, finding.reads, new)
    return graph


def _freeze_functions(graph: fx.Graph) -> None:
    """Let `F.batch_norm` use the running statistics that it is given; modules have a mode for that."""
    for node in graph.find_nodes(op="call_function", target=F.batch_norm):
        given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs).arguments
        if given["running_mean"] is not None:
            node.args, node.kwargs = (), {**given, "training": False}


def _wanted(prefix: Prefix) -> set[fx.Node]:
    """The sizes of the image that the head reads, or that are read for an effect (an assertion)."""
    sizes = image_sizes(prefix.findings)
    wanted: set[fx.Node] = set()
    for finding in reversed(prefix.findings):
        if finding.node in sizes and not finding.node.users:
            wanted.add(finding.node)
        if finding.in_head or finding.node in wanted:
            wanted |= sizes.intersection(finding.node.all_input_nodes)
    return wanted


def _copy(graph: fx.Graph, node: fx.Node, reads: Mapping[fx.Node, fx.Node], new: Nodes) -> None:
    """Copy a node under its name; where it reads a value that was overwritten, it now reads the result of that."""
    new[node] = graph.node_copy(node, lambda old: new[reads.get(old, old)])
