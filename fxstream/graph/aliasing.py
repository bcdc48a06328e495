"""In-place operations: which values share memory, and what a reader sees after one of them is overwritten.

The streamed part is functional: an in-place operation becomes an out-of-place one, and whoever reads the overwritten
value later reads the result instead. Where that would not be the same thing, the operation is not local. Values that do
not depend on the image are read once, before the streamed call: all of its operations must want them in that state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import fx

from ..ops import NotLocal
from .nodes import label

Homes = frozenset["fx.Node | str"]
_WAY_OUT = "use the out-of-place form"


class Aliasing:
    """The memory of the values of one graph, filled in as a walk passes its nodes."""

    def __init__(self, graph: fx.Graph, image: fx.Node):
        self._order = {node: index for index, node in enumerate(graph.nodes)}
        self._image = image
        self._homes: dict[fx.Node, Homes] = {image: frozenset([image])}
        """A value -> whose memory it may share: itself, values that it may be a view of, parameters by their path."""
        self._latest: dict[fx.Node, fx.Node] = {}
        """A value that was overwritten -> the result."""
        self._spoilt: set[fx.Node | str] = set()
        """Homes that an operation of the head has written into."""
        self._constant_reads: list[tuple[fx.Node, Homes]] = []
        """Streamed operations and the homes of the constants that they read."""
        self._constant_writes: list[tuple[fx.Node, Homes]] = []
        self._barrier = -1

    def latest(self, node: fx.Node) -> fx.Node:
        """The node whose value a reader of `node` sees from here on."""
        return self._latest.get(node, node)

    def spoilt(self, sources: Iterable[fx.Node], state: Iterable[str]) -> bool:
        """Whether the head may have changed a value or a module's state: what reads it now belongs to the head."""
        return not self._spoilt.isdisjoint(self._union(sources, state))

    def add(self, node: fx.Node, shares: Iterable[fx.Node], state: Iterable[str] = ()) -> None:
        """A new value, which may be a view of others or of parameters and buffers."""
        self._homes[node] = self._union(shares, state) or frozenset([node])

    def write_constants(self, node: fx.Node, sources: Iterable[fx.Node]) -> None:
        """An operation may overwrite values that do not depend on the image."""
        self._constant_writes.append((node, self._union(sources, ())))

    def read_constants(self, node: fx.Node, sources: Iterable[fx.Node], state: Iterable[str]) -> NotLocal | None:
        """A streamed operation reads values that do not depend on the image. Returns why it cannot."""
        homes = self._union(sources, state)
        last = max((self._order[write] for write, target in self._constant_writes if target & homes), default=-1)
        for write, target in self._constant_writes:
            for read, wanted in self._constant_reads:
                if self._order[read] < self._order[write] <= last and wanted & target:
                    return NotLocal(
                        f"needs {label(write)} done, which overwrites what {label(read)} reads before", _WAY_OUT
                    )
        self._barrier = max(self._barrier, last)
        self._constant_reads.append((node, homes))
        return None

    def precedes_streaming(self, node: fx.Node) -> bool:
        """Whether an operation on constants stands before one that must have overwritten its target for streaming."""
        return self._order[node] <= self._barrier

    def overwrite(self, node: fx.Node, target: fx.Node) -> None:
        """A streamed operation that overwrites a value: its result is what later readers see."""
        self._homes[node] = self._homes[target]
        for old in [target, *(old for old, new in self._latest.items() if new is target)]:
            self._latest[old] = node

    def obstacle(self, node: fx.Node, target: fx.Node, in_head: Callable[[fx.Node], bool]) -> NotLocal | None:
        """Why `node`, which overwrites `target`, cannot become an out-of-place operation; None if it can."""
        if self._image in self._homes[target]:
            return NotLocal("overwrites the image in place", _WAY_OUT)
        read = set(map(self.latest, node.all_input_nodes))
        for other in self._sharing(target):
            if other in read:
                return NotLocal(f"overwrites memory that {label(other)}, which it reads as well, may share", _WAY_OUT)
            if self._read_after(node, other):
                return NotLocal(f"overwrites memory that {label(other)}, which is read later, may share", _WAY_OUT)
        for other in (target, *self._sharing(target)):
            for user in self._readers(other):
                if self._order[user] < self._order[node] and in_head(user):
                    return NotLocal(
                        f"overwrites a value that {label(user)}, which is not streamed, may share", _WAY_OUT
                    )
        return None

    def spoil(self, node: fx.Node, sources: list[fx.Node], streamed: Callable[[fx.Node], bool]) -> fx.Node | None:
        """The head's `node` may write into values. Returns a streamed value that the head would have to see change.

        That is so where several values that share memory in the plain model would each cross to the head, or where
        the image shares it: the user would see that change.
        """
        for source in sources:
            homes = self._union([source], ())
            self._spoilt.update(homes)
            sharing = {source, *self._sharing(source)}
            members = {member for member in sharing if streamed(member)}
            several = len(members) > 1 and any(self._read_after(node, member) for member in sharing)
            if members and (several or self._image in homes):
                return max(members, key=self._order.__getitem__)
        return None

    def _sharing(self, node: fx.Node) -> set[fx.Node]:
        """The other values, as they are now, that may share the memory of `node`."""
        mine = self._union([node], ())
        return {self.latest(other) for other, homes in self._homes.items() if not mine.isdisjoint(homes)} - {node}

    def _union(self, values: Iterable[fx.Node], state: Iterable[str]) -> Homes:
        return frozenset(state).union(*(self._homes[value] for value in values if value in self._homes))

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """Whoever reads `node`, or a value of which it is the overwritten state."""
        for value in (node, *(old for old, new in self._latest.items() if new is node)):
            yield from value.users

    def _read_after(self, node: fx.Node, value: fx.Node) -> bool:
        return any(self._order[user] > self._order[node] for user in self._readers(value))
