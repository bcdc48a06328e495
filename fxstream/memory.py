"""In-place operations: which values share memory, and what a reader sees after one of them is overwritten.

The streamed part is functional: an in-place operation becomes an out-of-place one, and whoever reads the overwritten
value later reads the result instead. Where that would not be the same thing, the operation is not local.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx

from .lower import label
from .ops import NotLocal

_WAY_OUT = "use the out-of-place form"


class Memory:
    """The memory of the values of one graph, filled in as a walk passes its nodes."""

    def __init__(self, graph: fx.Graph, image: fx.Node):
        self._order = {node: index for index, node in enumerate(graph.nodes)}
        self._image = image
        self._home: dict[fx.Node, fx.Node] = {image: image}
        """A value -> the first value of those that may share its memory."""
        self._latest: dict[fx.Node, fx.Node] = {}
        """A value that was overwritten -> the result."""
        self._spoilt: set[fx.Node] = set()
        """Homes that an operation of the head has written into."""

    def latest(self, node: fx.Node) -> fx.Node:
        """The node whose value a reader of `node` sees from here on."""
        return self._latest.get(node, node)

    def spoilt(self, node: fx.Node) -> bool:
        """Whether the head may have changed the value, so that what reads it now belongs to the head."""
        return self._home.get(node) in self._spoilt

    def add(self, node: fx.Node, shares: fx.Node | None, overwritten: fx.Node | None) -> None:
        """A new value, which may share the memory of another or overwrite it."""
        base = overwritten or shares
        self._home[node] = node if base is None else self._home[base]
        if overwritten is not None:
            for old in [overwritten, *(old for old, new in self._latest.items() if new is overwritten)]:
                self._latest[old] = node

    def obstacle(self, node: fx.Node, target: fx.Node, in_head: Callable[[fx.Node], bool]) -> NotLocal | None:
        """Why `node`, which overwrites `target`, cannot become an out-of-place operation; None if it can."""
        if self._home[target] is self._image:
            return NotLocal("overwrites the image in place", _WAY_OUT)
        for other in self._sharing(target):
            if self._read_after(node, other):
                return NotLocal(f"overwrites memory that {label(other)}, which is read later, may share", _WAY_OUT)
        for other in (target, *self._sharing(target)):
            for user in self._readers(other):
                if self._order[user] < self._order[node] and in_head(user):
                    return NotLocal(
                        f"overwrites a value that {label(user)}, which is not streamed, may share", _WAY_OUT
                    )
        return None

    def spoil(self, node: fx.Node, sources: list[fx.Node]) -> fx.Node | None:
        """The head's `node` writes into values. Returns one that must not be streamed: the head sees it change."""
        for source in sources:
            if source not in self._home:
                continue
            self._spoilt.add(self._home[source])
            for other in self._sharing(source):
                if self._read_after(node, other):
                    return max((source, other), key=self._order.__getitem__)
        return None

    def _sharing(self, node: fx.Node) -> set[fx.Node]:
        """The other values, as they are now, that may share the memory of `node`."""
        return {self.latest(other) for other, home in self._home.items() if home is self._home[node]} - {node}

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """Whoever reads `node`, or a value of which it is the overwritten state."""
        for value in (node, *(old for old, new in self._latest.items() if new is node)):
            yield from value.users

    def _read_after(self, node: fx.Node, value: fx.Node) -> bool:
        return any(self._order[user] > self._order[node] for user in self._readers(value))
