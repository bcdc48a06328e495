"""The reasons why streaming ends, for the user: one line for each, with a way out that holds for this model."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from torch import fx

from ..ops import NotLocal
from .answers import complaint
from .findings import STREAMED, Finding, find
from .prefix import Prefix

NAMED = 3
"""How many further nodes are named at which streaming ends for the same reason."""


def reasons(prefix: Prefix, *, short: bool = False) -> str:
    """Where streaming ends and why, one line for each reason. `short`: much of the work stays behind."""
    alike: dict[tuple[str, str], list[Finding]] = {}
    for stop in prefix.stops:
        assert stop.problem is not None
        alike.setdefault((stop.status, stop.problem.reason), []).append(stop)
    alone = _Alone(prefix)
    return "\n".join(f"  {_line(stops, alone, short)}" for stops in alike.values())


def _line(stops: list[Finding], alone: _Alone, short: bool) -> str:
    first, *others = stops
    problem = first.stated
    if first.status == "total":
        if not short:
            return complaint(first.node, problem)
        problem = replace(problem, reason=f"{problem.reason}, but what needs the result does not stream")
    names = ", ".join(stop.label for stop in others[:NAMED])
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    likewise = f" Likewise: {names}{more}." if others else ""
    return f"{complaint(first.node, alone.with_way_out(first.node, problem))}{likewise}"


class _Alone:
    """What streams if only one of the axes does."""

    def __init__(self, prefix: Prefix):
        self._prefix = prefix

    def with_way_out(self, node: fx.Node, problem: NotLocal) -> NotLocal:
        """A reason, with the axes along which the node streams as the way out if it has none yet."""
        if problem.way_out:
            return problem
        free = [axis for axis, nodes in self._nodes.items() if node in nodes]
        return replace(problem, way_out=" or ".join(map(self._words, free)))

    @cached_property
    def _nodes(self) -> dict[str, set[fx.Node]]:
        """Axis -> the nodes that stream along it alone."""
        prefix = self._prefix
        found: dict[str, set[fx.Node]] = {}
        for axis in prefix.names:
            if axis != "C" and (axis,) != prefix.axes:
                findings = find(prefix.trace, prefix.image, prefix.names, (axis,), prefix.freeze_batchnorm)
                found[axis] = {finding.node for finding in findings if finding.status in STREAMED}
        return found

    def _words(self, axis: str) -> str:
        sizes = ["None"] * len(self._prefix.names)
        sizes[self._prefix.names.index(axis)] = "1" if axis == "N" else "512"
        what = "the images of a batch one by one" if axis == "N" else f"along {axis} alone"
        return f"stream {what}, tile_shape=({', '.join(sizes)})"
