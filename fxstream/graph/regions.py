"""Regions: the `torch.no_grad` and `torch.autocast` blocks around the nodes of a graph that TorchDynamo has captured.

Such a graph switches gradients and autocast on and off between its nodes. A partition moves nodes, and would move them
out of their blocks. So the switches are taken out of the graph, and every node remembers its region instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.amp import autocast_mode

from ..ops import Answer, Fact, Local, NotLocal

_KEY = "region"
"""The region of a node, in its `meta`."""
_SET_GRAD = torch._C._set_grad_enabled
_ENTER_AUTOCAST = autocast_mode._enter_autocast
_EXIT_AUTOCAST = autocast_mode._exit_autocast


@dataclass(frozen=True)
class Region:
    """The blocks that a node is in, beyond those that the graph as a whole runs in."""

    grad: bool | None = None
    """Whether gradients are enabled, if it is not as it is where the graph starts; else None."""
    autocast: tuple[tuple[Any, ...], ...] = ()
    """(device type, dtype, enabled) of the `torch.autocast` blocks, the innermost last."""

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be inside the blocks."""
        with ExitStack() as stack:
            for device_type, dtype, enabled in self.autocast:
                # The scan casts a weight without a graph: the head must not find that cast in the cache.
                stack.enter_context(torch.autocast(device_type, dtype, enabled, cache_enabled=False))
            if self.grad is not None:
                stack.enter_context(torch.set_grad_enabled(self.grad))
            yield


class Switches:
    """Follows the nodes of a graph that switch gradients and autocast on and off."""

    def __init__(self, grad: bool):
        """`grad` says whether gradients are enabled where the graph starts."""
        self._grad_at_start = grad
        self._grad = grad
        self._autocast: list[fx.Node] = []

    def follow(self, node: fx.Node) -> bool:
        """Whether a node is a switch; if so, the region of the nodes behind it is another."""
        if node.target is _SET_GRAD:
            self._grad = bool(node.args[0])
        elif node.target is _ENTER_AUTOCAST:
            self._autocast.append(node)
        elif node.target is _EXIT_AUTOCAST:
            self._autocast.remove(node.args[0])  # type: ignore[arg-type]  # the node that entered
        else:
            return False
        return True

    @property
    def region(self) -> Region:
        """The region of a node that comes next."""
        blocks = tuple(tuple(node.args[:3]) for node in self._autocast)
        return Region(None if self._grad is self._grad_at_start else self._grad, blocks)


def mark(node: fx.Node, region: Region) -> None:
    """Let a node remember its region."""
    if region != Region():
        node.meta[_KEY] = region


def answer_in_region(node: fx.Node, found: Answer) -> Answer:
    """The answer of a node's rule, for a node that may be in a region of its own."""
    region: Region | None = node.meta.get(_KEY)
    if region is None:
        return found
    if not isinstance(found, tuple):
        single: Answer = _in_region(region, found)
        return single
    parts = [_in_region(region, part) for part in found]
    problems = [part for part in parts if isinstance(part, NotLocal)]
    kind: Any = type(found)
    several: Answer = kind(*parts) if hasattr(found, "_fields") else tuple(parts)
    if problems:
        return problems[0]
    return several


def _in_region(region: Region, found: Any) -> Any:
    if isinstance(found, (Fact, NotLocal)):
        return found
    if region.grad:
        return NotLocal("computes inside torch.enable_grad while gradients are disabled")
    if not isinstance(found, Local):
        return NotLocal("is a reduction inside torch.no_grad or torch.autocast")
    if found.mutates is not None and region.grad is False:
        return NotLocal("overwrites a value inside torch.no_grad", "use the out-of-place form")

    def run(*args: Any) -> torch.Tensor:
        with region.entered():
            return found.run(*args)

    return replace(found, run=run, differentiable=found.differentiable and region.grad is None)


def restore_regions(graph: fx.Graph) -> None:
    """Let every node of a graph run inside its region, whatever the order of the nodes."""
    for node in list(graph.nodes):
        region = node.meta.get(_KEY)
        if region is None or not node.op.startswith("call"):
            continue
        with graph.inserting_before(node):
            if node.op == "call_module":
                function: Callable[..., Any] = _call
                args = (graph.get_attr(str(node.target)), *node.args)
            else:
                function = partial(_call_method, node.target) if node.op == "call_method" else node.target
                args = node.args
            new = graph.call_function(_Within(region, function, node.name), args, dict(node.kwargs))
        node.replace_all_uses_with(new)
        graph.erase_node(node)


class _Within:
    """A function that runs inside a region."""

    def __init__(self, region: Region, function: Callable[..., Any], name: str):
        self.region = region
        self.function = function
        self.__name__ = self.__qualname__ = f"{name}_in_its_region"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.region.entered():
            return self.function(*args, **kwargs)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _call_method(name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(owner, name)(*args, **kwargs)
