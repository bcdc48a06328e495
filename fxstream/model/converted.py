"""The converted model: a GraphModule with the original's module tree, whose parameters and buffers it shares."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from ..errors import StreamingError
from ..graph.arguments import Given, Parameters, Slot, surroundings
from ..graph.serialize import dump_graph, load_graph
from ..scan.checks import check_image
from ..scan.mirror import mirror_registries
from ..scan.settings import parse_bytes
from .older import provide
from .streamed import Streamed
from .variants import Variants


class Converted(fx.GraphModule):
    """What `fxstream.convert` returns.

    It has the original's module tree, the outer graph as its `graph`, and the submodule `streamed`, whose `graph` holds
    the streamed operations.
    """

    def __init__(
        self, model: nn.Module, constants: dict[str, torch.Tensor], graph: fx.Graph, name: str, streamed: Streamed
    ):
        super().__init__({}, fx.Graph(), type(model).__name__)
        mirror_registries(self, model, {id(model): self})
        # `meta` is an attribute of a GraphModule that nobody needs, and the name of many a model's submodule.
        vars(self).pop("meta", None)
        # Whatever else the user has put on the model; its forward may read it.
        vars(self).update({name: value for name, value in vars(model).items() if not hasattr(self, name)})
        vars(self).update(constants)
        self._is_full_backward_hook = model._is_full_backward_hook
        self.training = streamed.training = model.training
        self._original_class = type(model)
        self._given: Given | None = streamed.assumptions.given
        self._traced_constants = tuple(constants)
        self._forward_parameters = Parameters.of(type(model))
        self._call_variants = Variants()
        self._streamed_name = name
        self.add_module(name, streamed)
        self._adopt(graph)

    def _adopt(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._streamed.bind(self)

    def recompile(self) -> Any:
        """Generate the code of `graph` again; every call chooses between it and the variants."""
        code = super().recompile()
        kind: Any = type(self)
        kind.forward = _choosing(kind.forward)
        return code

    @property
    def streamed_name(self) -> str:
        """The name of the streamed submodule."""
        return self._streamed_name

    @property
    def image_name(self) -> str:
        """The name of the argument that is streamed."""
        call = next(node for node in self.graph.nodes if node.target == self._streamed_name)
        return str(call.args[0].target)

    def plain(self) -> nn.Module:
        """A plain model with the modules and tensors of this one. Raises StreamingError if its class is not known."""
        if self._original_class is None:
            raise StreamingError(
                "this call needs another graph than that of the conversion, which cannot be made, since the class of "
                "the model was not found when it was unpickled. Way out: define it in a module that can be imported"
            )
        twin: nn.Module = object.__new__(self._original_class)
        vars(twin).update({name: value for name, value in vars(self).items() if name not in self._traced_constants})
        mirror_registries(twin, self, {id(self): twin})
        del twin._modules[self._streamed_name]
        return twin

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
        self._call_variants = Variants()

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
        self._call_variants = Variants()

    def __deepcopy__(self, memo: dict[int, Any]) -> Converted:
        # GraphModule's own method would keep only the modules that the graph calls.
        twin: Converted = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update({name: copy.deepcopy(value, memo) for name, value in self._state().items()})
        twin._call_variants = Variants()
        twin._adopt(copy.deepcopy(self._graph, memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        # Likewise, and GraphModule's own method would trace the generated code again.
        state = {**self._state(), "_graph": dump_graph(self._graph), "_original_class": _by_name(self._original_class)}
        return _blank, (type(self).__name__,), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = load_graph(state.pop("_graph"))
        older = {"_original_class": None, "_given": None, "_traced_constants": ()}
        vars(self).update({**older, "_forward_parameters": _parameters_of(graph), **state})
        self._call_variants = Variants()
        self._adopt(graph)

    def _state(self) -> dict[str, Any]:
        """What a copy gets as it is. It makes variants of its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_graph", "_call_variants")}


def _choosing(generated: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that runs the generated code if it serves the call, and otherwise a variant."""

    @functools.wraps(generated)
    def forward(self: Converted, *args: Any, **kwargs: Any) -> Any:
        chosen, seen, values = _chosen(self, args, kwargs)
        return (chosen or generated)(seen, *values)

    return forward


@torch._disable_dynamo(recursive=False)  # type: ignore[attr-defined]  # torch itself uses it so
def _chosen(model: Converted, args: Any, kwargs: Any) -> tuple[Callable[..., Any] | None, Any, list[Any]]:
    """The code of a variant, or None for that of the model itself; what it is called with."""
    arguments = model._forward_parameters.bound(args, kwargs)
    given = model._given
    if given is None:
        return None, model, list(arguments.values())
    if given.holds(arguments, lambda: surroundings(model)):
        return None, model, given.ordered(arguments)
    check_image(arguments[Slot(model.image_name)], model._streamed.settings)
    variant = model._call_variants.serving(model, arguments)
    return variant.forward, variant.seen, variant.given.ordered(arguments)


def _parameters_of(graph: fx.Graph) -> Parameters:
    """The parameters of a forward as far as its graph knows them, for pickles that do not hold them."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    default = inspect.Parameter.empty
    named = [
        inspect.Parameter(str(node.target), either, default=node.args[0] if node.args else default)
        for node in placeholders
        if not str(node.target).startswith("*")
    ]
    return Parameters(inspect.Signature(named))


def _by_name(kind: type | None) -> type | None:
    """A class if pickle can find it again, else None."""
    if kind is None:
        return None
    found: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    return kind if found is kind else None


def _blank(class_name: str) -> Converted:
    """A model for pickle to fill."""
    converted: Converted = Converted.__new__(Converted)
    type(converted).__name__ = class_name
    return converted


provide("tree", _blank=_blank)
provide("stream", Streamed=Streamed)
