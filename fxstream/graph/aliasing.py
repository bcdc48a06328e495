"""In-place operations: which values share memory, and what a reader sees after one of them is overwritten.

The streamed part is functional. An in-place operation becomes an out-of-place one, and whoever reads the overwritten
value later reads the result instead. Where that would not compute the same thing, the operation is not local.

Values that do not depend on the image, here called constants, are read once, before the streamed call. All streamed
operations must therefore need the same version of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator

from torch import fx

from ..ops import NotLocal
from .nodes import label

Bases = frozenset["fx.Node | str"]
"""What owns memory that a value may share: nodes, and parameters and buffers by their path."""
_WAY_OUT = "use the out-of-place form"


class Aliasing:
    """Which values of a graph may share memory. A walk over the graph fills it in, node by node."""

    def __init__(self, graph: fx.Graph, image: fx.Node):
        self._order = {node: index for index, node in enumerate(graph.nodes)}
        self._image = image
        self._bases: dict[fx.Node, Bases] = {image: frozenset([image])}
        self._latest: dict[fx.Node, fx.Node] = {}
        """A value that was overwritten -> the result of the last operation that did so."""
        self._written_by_head: set[fx.Node | str] = set()
        """The bases into which an operation of the head may have written."""
        self._constant_reads: list[tuple[fx.Node, Bases]] = []
        """Streamed operations, and the bases of the constants that they read."""
        self._constant_writes: list[tuple[fx.Node, Bases]] = []
        """Operations that may overwrite constants, and the bases of these."""
        self._barrier = -1
        """The position in the graph of the last write that a streamed operation depends on."""

    def latest(self, node: fx.Node) -> fx.Node:
        """The node whose value a reader of `node` sees from here on."""
        return self._latest.get(node, node)

    def written_by_head(self, sources: Iterable[fx.Node], state: Iterable[str]) -> bool:
        """Whether the head may have changed one of these values, or this state of a module.

        If so, an operation that reads them from here on belongs to the head.
        """
        return not self._written_by_head.isdisjoint(self._union(sources, state))

    def add(self, node: fx.Node, shares: Iterable[fx.Node], state: Iterable[str] = ()) -> None:
        """Note a new value, which may be a view of the values in `shares`, or of parameters and buffers in `state`."""
        self._bases[node] = self._union(shares, state) or frozenset([node])

    def write_constants(self, node: fx.Node, sources: Iterable[fx.Node]) -> None:
        """Note an operation that may overwrite the constants that it reads."""
        self._constant_writes.append((node, self._union(sources, ())))

    def read_constants(self, node: fx.Node, sources: Iterable[fx.Node], state: Iterable[str]) -> NotLocal | None:
        """Note a streamed operation that reads constants.

        Returns why it cannot be streamed, if an earlier streamed operation needs another version of them.
        """
        bases = self._union(sources, state)
        last = max((self._order[write] for write, target in self._constant_writes if target & bases), default=-1)
        for write, target in self._constant_writes:
            for read, wanted in self._constant_reads:
                if self._order[read] < self._order[write] <= last and wanted & target:
                    return NotLocal(
                        f"needs {label(write)} done, which overwrites what {label(read)} reads before", _WAY_OUT
                    )
        self._barrier = max(self._barrier, last)
        self._constant_reads.append((node, bases))
        return None

    def precedes_streaming(self, node: fx.Node) -> bool:
        """Whether a constant must be computed before the streamed call, as a write that streaming needs follows it."""
        return self._order[node] <= self._barrier

    def overwrite(self, node: fx.Node, target: fx.Node) -> None:
        """Note a streamed operation that overwrites `target`: later readers see its result."""
        self._bases[node] = self._bases[target]
        for old in [target, *(old for old, new in self._latest.items() if new is target)]:
            self._latest[old] = node

    def obstacle(self, node: fx.Node, target: fx.Node, ends: Callable[[fx.Node], bool]) -> NotLocal | None:
        """Why `node`, which overwrites `target`, cannot become an out-of-place operation; None if it can.

        `ends` says whether streaming ends at a node.
        """
        if self._image in self._bases[target]:
            return NotLocal("overwrites the image in place", _WAY_OUT)
        read = set(map(self.latest, node.all_input_nodes))
        for other in self._sharing(target):
            if (
                self._writes_back(node, target, other)
                or self._is_written_back(node, target, other)
                or self._is_apart(node, target, other)
            ):
                continue
            if other in read:
                return NotLocal(f"overwrites memory that {label(other)}, which it reads as well, may share", _WAY_OUT)
            if self._read_after(node, other):
                return NotLocal(f"overwrites memory that {label(other)}, which is read later, may share", _WAY_OUT)
        for other in (target, *self._sharing(target)):
            for user in self._readers(other):
                if self._order[user] < self._order[node] and ends(user):
                    return NotLocal(
                        f"overwrites a value that {label(user)}, which is not streamed, may share", _WAY_OUT
                    )
        return None

    def write_in_head(
        self, node: fx.Node, sources: list[fx.Node], streamed: Callable[[fx.Node], bool]
    ) -> fx.Node | None:
        """Note that `node`, an operation of the head, may write into what it reads.

        Returns a streamed value that must move to the head, or None. It must if the write would be visible through
        another value that shares its memory (or through the image), because values that cross to the head are copies.
        """
        for source in sources:
            bases = self._union([source], ())
            self._written_by_head.update(bases)
            others = self._sharing(source)
            members = {member for member in (source, *others) if streamed(member)}
            several = len(members) > 1 and any(self._read_from(node, other) for other in others)
            if members and (several or self._image in bases):
                return max(members, key=self._order.__getitem__)
        return None

    def _is_written_back(self, node: fx.Node, target: fx.Node, whole: fx.Node) -> bool:
        """Whether the next reader of `whole` writes the result of `node` there, where its `target` has been taken from.

        So Python evaluates `x[:, 0] += 1`: it reads a part of `x`, overwrites it, and writes it into `x`.
        """
        later = [user for user in self._readers(whole) if self._order[user] > self._order[node]]
        following = min(later, key=self._order.__getitem__, default=None)
        return following is not None and _is_part(target, following) and following.args[2] is node

    def _writes_back(self, node: fx.Node, target: fx.Node, part: fx.Node) -> bool:
        """Whether `node` writes `part`, a part of `target` that was overwritten, where it has been taken from.

        In the plain model this changes nothing, since the two share memory.
        """
        parts = (old for old, new in self._latest.items() if new is part)
        return any(_is_part(old, node) and self._bases[old] == self._bases[target] for old in parts)

    def _is_apart(self, node: fx.Node, target: fx.Node, other: fx.Node) -> bool:
        """Whether `node` overwrites a part of a value and `other` is another one, such as two different channels."""
        written = node if node.target is operator.setitem else target
        if written.target not in (operator.getitem, operator.setitem) or other.target is not operator.getitem:
            return False
        (whole, index), (same, taken) = written.args[:2], other.args
        return self.latest(whole) is self.latest(same) and _differ(index, taken)  # type: ignore[arg-type]  # nodes

    def _sharing(self, node: fx.Node) -> set[fx.Node]:
        """The other values, in their latest version, that may share the memory of `node`."""
        mine = self._union([node], ())
        return {self.latest(other) for other, bases in self._bases.items() if not mine.isdisjoint(bases)} - {node}

    def _union(self, values: Iterable[fx.Node], state: Iterable[str]) -> Bases:
        return frozenset(state).union(*(self._bases[value] for value in values if value in self._bases))

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes that read `node`, or an earlier version of the value that it overwrote."""
        for value in (node, *(old for old, new in self._latest.items() if new is node)):
            yield from value.users

    def _read_from(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether `value` is read by `node` or after it."""
        return node in self._readers(value) or self._read_after(node, value)

    def _read_after(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether `value` is read after `node` has run."""
        return any(self._order[user] > self._order[node] for user in self._readers(value))


def _is_part(part: fx.Node, write: fx.Node) -> bool:
    """Whether `part` is what `write`, a write by index, overwrites."""
    return part.target is operator.getitem and write.target is operator.setitem and part.args == write.args[:2]


def _differ(index: object, other: object) -> bool:
    """Whether two indices have different integers at the same place, so that no element has both."""
    pairs = zip(*(given if isinstance(given, tuple) else (given,) for given in (index, other)), strict=False)
    for one, two in pairs:
        if one is Ellipsis or two is Ellipsis or one is None or two is None:
            return False
        if type(one) is int and type(two) is int and one != two and (one < 0) == (two < 0):
            return True
        if not isinstance(one, (int, slice)) or not isinstance(two, (int, slice)):
            return False
    return False
