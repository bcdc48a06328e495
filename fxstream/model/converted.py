"""The converted model: the module tree is the original's, with parameters and buffers shared."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from ..graph.serialize import dump_graph, load_graph
from ..scan.mirror import mirror_registries
from ..scan.settings import AUTO, parse_bytes
from .streamed import Streamed


class Converted(fx.GraphModule):
    """What `fxstream.convert` returns: the original's module tree, the outer graph, and the submodule `streamed`."""

    def __init__(
        self, model: nn.Module, constants: dict[str, torch.Tensor], graph: fx.Graph, name: str, streamed: Streamed
    ):
        super().__init__({}, fx.Graph(), type(model).__name__)
        mirror_registries(self, model, {id(model): self})
        # What else the user has put on the model, tensors that forward reads among it.
        vars(self).update({name: value for name, value in vars(model).items() if not hasattr(self, name)})
        vars(self).update(constants)
        self._is_full_backward_hook = model._is_full_backward_hook
        self.training = streamed.training = model.training
        self._streamed_name = name
        self.add_module(name, streamed)
        self._adopt(graph)

    def _adopt(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._streamed.bind(self)

    @property
    def _streamed(self) -> Streamed:
        found = self._modules[self._streamed_name]
        assert isinstance(found, Streamed)
        return found

    @property
    def tile_shape(self) -> tuple[int | None, ...] | str:
        """Fresh image positions per step and dimension, (N, C, *spatial); None for one that is not streamed. Or "auto".

        May be set to any form that `convert` takes, as long as the same axes are streamed: TileShapeError otherwise.
        """
        settings = self._streamed.settings
        return AUTO if settings.auto else settings.tile_shape

    @tile_shape.setter
    def tile_shape(self, tile_shape: int | tuple[int | None, ...] | list[int | None] | str) -> None:
        self._streamed.settings = self._streamed.settings.retiled(tile_shape)

    @property
    def memory_budget(self) -> int:
        """Bytes that may be held between forward and backward so that fewer tiles are computed again; may be set."""
        return self._streamed.settings.memory_budget

    @memory_budget.setter
    def memory_budget(self, memory_budget: int | str | None) -> None:
        settings = replace(self._streamed.settings, memory_budget=parse_bytes(memory_budget))
        settings.check()
        self._streamed.settings = settings

    def __deepcopy__(self, memo: dict[int, Any]) -> Converted:
        # GraphModule's own would keep only those modules that the graph calls.
        twin: Converted = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "_graph"})
        twin._adopt(copy.deepcopy(self._graph, memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        # Likewise, and GraphModule's own would trace the generated code anew.
        state = {name: value for name, value in vars(self).items() if name != "_graph"}
        return _blank, (type(self).__name__,), {**state, "_graph": dump_graph(self._graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = state.pop("_graph")
        vars(self).update(state)
        self._adopt(load_graph(graph))


def _blank(class_name: str) -> Converted:
    converted: Converted = Converted.__new__(Converted)
    type(converted).__name__ = class_name
    return converted
