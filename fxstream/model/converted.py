"""The converted model: a GraphModule with the original's module tree, whose parameters and buffers it shares."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import WrappedModelError
from ..graph.serialize import dump_graph, load_graph
from ..scan.mirror import mirror, mirror_registries
from ..scan.settings import parse_bytes
from .extended import extended, is_found_by_name
from .older import provide
from .streamed import Streamed


class Converted(fx.GraphModule):
    """What `fxstream.convert` returns.

    It has the original's module tree, the outer graph as its `graph`, and the submodule `streamed`, whose `graph` holds
    the streamed operations. Its class also extends the original's class, so that it has the methods, properties and
    class attributes of that, see `extended`.
    """

    _extends: type[nn.Module] | None = None
    """The original's class, if it is extended."""

    def __new__(cls, model: nn.Module | None = None, *_: Any) -> Converted:
        made: Converted = super().__new__(cls if model is None else extended(cls, type(model)))
        return made

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: the original's class is not told that it has been extended."""

    def __init__(
        self, model: nn.Module, constants: dict[str, torch.Tensor], graph: fx.Graph, name: str, streamed: Streamed
    ):
        super().__init__({}, fx.Graph(), type(model).__name__)
        mirror_registries(self, model, {id(model): self})
        # `meta` is an attribute of a GraphModule that nobody needs, and the name of many a model's submodule.
        vars(self).pop("meta", None)
        # Whatever else the user has put on the model; its forward may read it.
        taken = {*vars(self), *dir(Converted)}
        vars(self).update(
            {name: _rebound(value, model, self) for name, value in vars(model).items() if name not in taken}
        )
        vars(self).update(constants)
        self._is_full_backward_hook = model._is_full_backward_hook
        self.training = streamed.training = model.training
        self._streamed_name = name
        self.add_module(name, streamed)
        self._adopt(graph)
        self._freeze_batchnorms()

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
        """Fresh image positions per step and dimension (N, C, *spatial), or "auto". None: that one is not streamed.

        It may be set to any form that `convert` takes. Raises TileShapeError if other axes would be streamed.
        """
        return self._streamed.settings.tile_shape

    @tile_shape.setter
    def tile_shape(self, tile_shape: int | tuple[int | None, ...] | list[int | None] | str) -> None:
        self._streamed.settings = self._streamed.settings.retiled(tile_shape)

    @property
    def memory_budget(self) -> int:
        """Bytes that may be held between forward and backward so that fewer tiles are computed again.

        It may be set to any form that `convert` takes. Raises MemoryBudgetError if it is none of them.
        """
        return self._streamed.settings.memory_budget

    @memory_budget.setter
    def memory_budget(self, memory_budget: int | str | None) -> None:
        settings = replace(self._streamed.settings, memory_budget=parse_bytes(memory_budget))
        settings.check()
        self._streamed.settings = settings

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's class has it; but batch norms that were frozen at the conversion stay in eval mode."""
        result = super().train(*args, **kwargs)
        self._freeze_batchnorms()
        return result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._freeze_batchnorms()  # the user may have called train() on one of them
        return super().__call__(*args, **kwargs)

    def _freeze_batchnorms(self) -> None:
        streamed = self._modules[self._streamed_name]
        # An estimate has put something else in its place.
        if isinstance(streamed, Streamed) and streamed.settings.freeze_batchnorm:
            for module in self.modules():
                if isinstance(module, _BatchNorm) and module.training:
                    module.training = False

    def _as_original(self) -> nn.Module | None:
        """A model of the original's class, with this one's tensors and modes; None if that class is not known."""
        if self._extends is None:
            return None
        original: nn.Module = object.__new__(self._extends)
        vars(original).update({name: _rebound(value, self, original) for name, value in vars(self).items()})
        original._modules = {name: part for name, part in self._modules.items() if name != self._streamed_name}
        return mirror(original, {})

    def _replicate_for_data_parallel(self) -> NoReturn:
        # The replicas' parameters are results of operations and no Parameters, so the streamed part would miss them.
        raise WrappedModelError(
            "torch.nn.DataParallel copies the model at every call, and the streamed part does not work in such copies. "
            "Way out: torch.nn.parallel.DistributedDataParallel, with one process per GPU"
        )

    def _copied(self) -> dict[str, Any]:
        """What a copy gets, except the graph. The original's class may leave something out."""
        own = getattr(super(), "__getstate__", None)  # Python 3.10 has none of its own
        found = own() if own is not None else None
        state = found if isinstance(found, dict) else vars(self)
        return {name: value for name, value in state.items() if name != "_graph"}

    def __deepcopy__(self, memo: dict[int, Any]) -> Converted:
        # GraphModule's own method would keep only the modules that the graph calls.
        twin: Converted = type(self).__new__(type(self))
        type(twin).__name__ = type(self).__name__
        memo[id(self)] = twin
        super(Converted, twin).__setstate__(copy.deepcopy(self._copied(), memo))  # type: ignore[no-untyped-call]  # torch has no types for it
        twin._adopt(copy.deepcopy(self._graph, memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        # Likewise, and GraphModule's own method would trace the generated code again.
        kind = self._extends if self._extends is not None and is_found_by_name(self._extends) else None
        return _blank, (type(self).__name__, kind), {**self._copied(), "_graph": dump_graph(self._graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = state.pop("_graph")
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch has no types for it
        self._adopt(load_graph(graph))


def _rebound(value: Any, model: nn.Module, other: nn.Module) -> Any:
    """An attribute of a model for another one: a method of the model becomes one of the other."""
    if isinstance(value, MethodType) and value.__self__ is model:
        return MethodType(value.__func__, other)
    return value


def _blank(class_name: str, kind: type[nn.Module] | None = None) -> Converted:
    """A model for pickle to fill."""
    converted: Converted = Converted.__new__(Converted if kind is None else extended(Converted, kind))
    type(converted).__name__ = class_name
    return converted


provide("tree", _blank=_blank)
provide("stream", Streamed=Streamed)
