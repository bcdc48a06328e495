"""The values that do not depend on the image, as far as they are known at conversion."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from ..geometry.axes import Symbol
from ..ops import Unknown


class Constants:
    """What rules are given at conversion for the nodes that do not depend on the image.

    A value that is only known at a call is an `Unknown`.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, torch.Tensor],
        given: Mapping[fx.Node, Any],
    ):
        """`given` is what is known of some nodes beforehand."""
        self._modules = modules
        self._tensors = tensors
        self._given = given
        self._known: dict[fx.Node, Any] = {}

    def __getitem__(self, node: fx.Node) -> Any:
        return self._known[node]

    def is_number(self, node: fx.Node) -> bool:
        """Whether the value of a node was known beforehand to be a number, which has no memory to share."""
        return isinstance(self._given.get(node), (Symbol, int, float))

    def add(self, node: fx.Node) -> None:
        """Note a node, computed on copies if everything that it reads is known."""
        self._known[node] = self._given.get(node, Unknown(node.name))
        if node in self._given:
            return
        if node.op == "placeholder":
            # At conversion an optional argument is taken not to be given. At a call the rules see what is given.
            self._known[node] = node.args[0] if node.args else self._known[node]
            return
        if any(isinstance(self._known[source], Unknown) for source in node.all_input_nodes):
            return
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self._known[node] = self._run(node)
        except Exception:  # whatever a user's function may raise; the call itself will show it
            return

    def _run(self, node: fx.Node) -> Any:
        if node.target in self._tensors:
            return self._tensors[str(node.target)]
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return getattr(self._modules[owner], name)
        # Copies, since nothing that runs at conversion may change the model.
        args, kwargs = copy.deepcopy(fx.node.map_arg((node.args, dict(node.kwargs)), self._known.__getitem__))
        if node.op == "call_module":
            return copy.deepcopy(self._modules[str(node.target)])(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function's target
