"""fx graphs as plain data for pickle, since a `torch.fx.Graph` itself cannot be pickled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from typing import Any, NamedTuple

from torch import fx

from .nodes import modules_around


@dataclass(frozen=True)
class _Reference:
    """Another node of the graph, by its name. This is no tuple, since fx would map over its parts."""

    name: str


class _Function(NamedTuple):
    """A function by module and name, since some of torch's functions cannot be pickled themselves."""

    module: str
    name: str


def _refer(node: fx.Node) -> Any:
    return _Reference(node.name)


def dump_graph(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The graph's nodes as picklable tuples. The path of a node's module is the only metadata that is kept."""
    return [
        (
            node.op,
            node.name,
            _by_name(node.target) if callable(node.target) else node.target,
            *fx.node.map_arg((node.args, dict(node.kwargs)), _refer),
            modules_around(node)[-1:],
        )
        for node in graph.nodes
    ]


def load_graph(nodes: list[tuple[Any, ...]]) -> fx.Graph:
    """The graph that `dump_graph` was given, from what it returned."""
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        return known[value.name] if isinstance(value, _Reference) else value

    for op, name, target, args, kwargs, path in nodes:
        if isinstance(target, _Function):
            target = getattr(import_module(target.module), target.name)
        args, kwargs = fx.node.map_aggregate((args, kwargs), resolve)
        known[name] = graph.create_node(op, target, args, kwargs, name)
        if path:
            known[name].meta["nn_module_stack"] = {path[0]: (path[0], None)}
    return graph


def fingerprint(graph: fx.Graph) -> str:
    """A short text that is the same for two graphs only if they do the same with the same modules and tensors."""
    return sha256(repr(dump_graph(graph)).encode()).hexdigest()


def _by_name(function: Callable[..., Any]) -> Any:
    module, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
    found = getattr(sys.modules.get(module or ""), name, None)
    return _Function(str(module), name) if found is function else function
