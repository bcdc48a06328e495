"""Receptive fields: what one position of a value sees of the image, by the windows along the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import networkx as nx

from ..geometry.window import Window


@dataclass(frozen=True)
class ReceptiveField:
    """What one position of a value sees of the image along one axis, in pixels.

    Position `a` sees pixels `[a * stride - padding, a * stride - padding + size)`; behind up-sampling these are
    fractions, bounds for every phase. Recurrences: Araujo, Norris and Sim, "Computing Receptive Fields of
    Convolutional Neural Networks", Distill 2019.
    """

    size: int | Fraction = 1
    stride: int | Fraction = 1
    padding: int | Fraction = 0

    def through(self, window: Window) -> ReceptiveField | None:
        """The receptive field of a value that reads this one through `window`; None if it has no constant stride."""
        if window.stride is None:
            return None
        return ReceptiveField(
            self.size + (window.extent - 1) * self.stride,
            self.stride * window.stride,
            self.padding + window.before * self.stride,
        )

    def joined(self, other: ReceptiveField) -> ReceptiveField | None:
        """The union of both; None if they advance at different rates."""
        if self.stride != other.stride:
            return None
        padding = max(self.padding, other.padding)
        end = max(self.size - self.padding, other.size - other.padding)
        return ReceptiveField(padding + end, self.stride, padding)


def receptive_field(graph: nx.DiGraph[str], name: str, axes: tuple[str, ...]) -> dict[str, ReceptiveField] | None:
    """Of a node of the analysis' graph, per streamed axis, when those that it reads have theirs; None if undefined."""
    status = graph.nodes[name]["status"]
    if status != "local":
        return dict.fromkeys(axes, ReceptiveField()) if status == "image" else None
    fields: dict[str, ReceptiveField] = {}
    for source in graph.predecessors(name):
        windows: Mapping[str, Window] | None = graph.edges[source, name]["windows"]
        if windows is None:
            continue  # does not depend on the image
        seen = graph.nodes[source]["receptive_field"]
        for axis in axes:
            here = None if seen is None else seen[axis].through(windows[axis])
            joined = here if here is None or axis not in fields else fields[axis].joined(here)
            if joined is None:
                return None
            fields[axis] = joined
    return fields or None  # a value made of nothing but sizes sees no pixel
