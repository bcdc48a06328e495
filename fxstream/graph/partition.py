"""Partition: the traced graph rewritten into one call of the streamed submodule, followed by the head as it was."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import NamedTuple

import networkx as nx
from torch import fx

from .prefix import STREAMED, Analysis, image_sizes

Nodes = dict[fx.Node, fx.Node]


class Partition(NamedTuple):
    """The two graphs of a converted model."""

    outer: fx.Graph
    """Placeholders, what does not depend on the image, the streamed call, the head."""
    streamed: fx.Graph
    """The image, the other values that enter, the streamed nodes under their names."""


def partition(analysis: Analysis, name: str) -> Partition:
    """Split at the border that the analysis found; the streamed submodule is called `name`."""
    status = {finding.node: finding.status for finding in analysis.findings}
    sources = (source for node in analysis.prefix for source in node.all_input_nodes)
    entering = [source for source in dict.fromkeys(sources) if status[source] == "constant"]
    return Partition(_outer(analysis, name, entering), _streamed(analysis, entering))


def _streamed(analysis: Analysis, entering: list[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    new = {node: graph.placeholder(node.name) for node in (analysis.image, *entering)}
    reads = {finding.node: finding.reads for finding in analysis.findings}
    for node in analysis.prefix:
        _copy(graph, node, reads[node], new)
    outputs = [new[node] for node in analysis.outputs]
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    return graph


def _outer(analysis: Analysis, name: str, entering: list[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    new: Nodes = {}
    first = {node.name for node in entering}.union(*(nx.ancestors(analysis.graph, node.name) for node in entering))
    for finding in analysis.findings:
        if finding.node.op == "placeholder" or finding.early or finding.node.name in first:
            _copy(graph, finding.node, finding.reads, new)
    call = graph.call_module(name, (new[analysis.image], *(new[node] for node in entering)))
    if len(analysis.outputs) == 1:
        new[analysis.outputs[0]] = call
    else:
        for index, node in enumerate(analysis.outputs):
            new[node] = graph.call_function(operator.getitem, (call, index))
    outside = _wanted(analysis)
    for finding in analysis.findings:
        if (finding.status not in STREAMED or finding.node in outside) and finding.node not in new:
            _copy(graph, finding.node, finding.reads, new)
    return graph


def _wanted(analysis: Analysis) -> set[fx.Node]:
    """The sizes of the image that the head reads, or that are read for an effect (an assertion)."""
    sizes = image_sizes(analysis.findings)
    wanted: set[fx.Node] = set()
    for finding in reversed(analysis.findings):
        if finding.node in sizes and not finding.node.users:
            wanted.add(finding.node)
        if finding.status in ("stop", "head") or finding.node in wanted:
            wanted |= sizes.intersection(finding.node.all_input_nodes)
    return wanted


def _copy(graph: fx.Graph, node: fx.Node, reads: Mapping[fx.Node, fx.Node], new: Nodes) -> None:
    """Copy a node under its name; what it reads of a value overwritten before is the result of that."""
    new[node] = graph.node_copy(node, lambda old: new[reads.get(old, old)])
