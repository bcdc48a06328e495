"""The converted model: a GraphModule with the original's module tree, whose parameters and buffers it shares."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import StreamingError, WrappedModelError
from ..graph.arguments import Given, Parameters, Slot, surroundings
from ..graph.mirror import mirror_registries, refer_to_twins
from ..graph.serialize import dump_graph, load_graph
from ..scan.checks import check_image
from ..scan.settings import parse_bytes
from .extended import extended, is_found_by_name
from .older import provide
from .streamed import Streamed
from .variants import Prove, Variants, new_variant


class Converted(fx.GraphModule):
    """What `fxstream.convert` returns.

    It has the original's module tree, the outer graph as its `graph`, and the submodule `streamed`, whose `graph` holds
    the streamed operations. Its class also extends the original's class, so that it has the methods, properties and
    class attributes of that, see `extended`.
    """

    _extends: type[nn.Module] | None = None
    """The original's class, if it is extended."""

    # A model that has an attribute of one of these names is refused. Older pickles lack those that have a default.
    _original_class: type[nn.Module] | None = None
    _given: Given | None = None
    """What `graph` takes for granted; None if that is not known."""
    _traced_constants: tuple[str, ...] = ()
    _forward_parameters: Parameters
    _prove: Prove | None = None
    """Proves variants; None if the conversion is not to be proved."""
    _call_variants: Variants
    _streamed_name: str

    def __new__(cls, model: nn.Module | None = None, *_: Any) -> Converted:
        made: Converted = super().__new__(cls if model is None else extended(cls, type(model)))
        return made

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: the original's class is not told that it has been extended."""

    def __init__(
        self, model: nn.Module, constants: dict[str, torch.Tensor], graph: fx.Graph, name: str, streamed: Streamed
    ):
        super().__init__({}, fx.Graph(), type(model).__name__)
        twins: dict[int, Any] = {id(model): self}
        mirror_registries(self, model, twins)
        # `meta` is an attribute of a GraphModule that nobody needs, and the name of many a model's submodule.
        vars(self).pop("meta", None)
        # Whatever else the user has put on the model; its forward may read it.
        taken = {*vars(self), *dir(Converted)}
        vars(self).update(
            {name: _rebound(value, model, self) for name, value in vars(model).items() if name not in taken}
        )
        refer_to_twins([self], twins)
        vars(self).update(constants)
        self._is_full_backward_hook = model._is_full_backward_hook
        self.training = streamed.training = model.training
        self._original_class = type(model)
        self._given = streamed.assumptions.given
        self._traced_constants = tuple(constants)
        self._forward_parameters = Parameters.of(type(model))
        self._call_variants = Variants()
        self._streamed_name = name
        self.add_module(name, streamed)
        self._adopt(graph)
        self._freeze_batchnorms()

    def _adopt(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._streamed.bind(self)

    def recompile(self) -> Any:
        """Generate the code of `graph` again; every call chooses between it and the variants."""
        code = super().recompile()
        kind: Any = type(self)
        kind.forward = _choosing(kind.forward)
        return code

    def _image_name(self) -> str:
        """The name of the argument that is streamed."""
        call = next(node for node in self.graph.nodes if node.target == self._streamed_name)
        return str(call.args[0].target)

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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's class has it; but batch norms that were frozen at the conversion stay in eval mode."""
        result = super().train(*args, **kwargs)
        self._freeze_batchnorms()
        return result

    def _freeze_batchnorms(self) -> None:
        streamed = self._modules[self._streamed_name]
        # An estimate has put something else in its place.
        if isinstance(streamed, Streamed) and streamed.settings.freeze_batchnorm:
            for module in self.modules():
                if isinstance(module, _BatchNorm) and module.training:
                    module.training = False

    def _as_original(self) -> nn.Module | None:
        """A model of the original's class, with this one's tensors and modes; None if that class is not known."""
        if self._original_class is None:
            return None
        original: nn.Module = object.__new__(self._original_class)
        own = {name: value for name, value in vars(self).items() if name not in self._traced_constants}
        vars(original).update({name: _rebound(value, self, original) for name, value in own.items()})
        twins: dict[int, Any] = {id(self): original}
        mirror_registries(original, self, twins)
        refer_to_twins([original], twins)
        del original._modules[self._streamed_name]
        return original

    def _replicate_for_data_parallel(self) -> NoReturn:
        # The replicas' parameters are results of operations and no Parameters, so the streamed part would miss them.
        raise WrappedModelError(
            "torch.nn.DataParallel copies the model at every call, and the streamed part does not work in such copies. "
            "Way out: torch.nn.parallel.DistributedDataParallel, with one process per GPU"
        )

    def _copied(self) -> dict[str, Any]:
        """What a copy gets, except the graphs. The original's class may leave something out."""
        own = getattr(super(), "__getstate__", None)  # Python 3.10 has none of its own
        found = own() if own is not None else None
        state = found if isinstance(found, dict) else vars(self)
        return {name: value for name, value in state.items() if name not in ("_graph", "_call_variants")}

    def __deepcopy__(self, memo: dict[int, Any]) -> Converted:
        # GraphModule's own method would keep only the modules that the graph calls.
        twin: Converted = type(self).__new__(type(self))
        type(twin).__name__ = type(self).__name__
        memo[id(self)] = twin
        super(Converted, twin).__setstate__(copy.deepcopy(self._copied(), memo))  # type: ignore[no-untyped-call]  # torch has no types for it
        twin._call_variants = Variants()
        twin._adopt(copy.deepcopy(self._graph, memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        # Likewise, and GraphModule's own method would trace the generated code again.
        kind = (
            None if self._original_class is None or not is_found_by_name(self._original_class) else self._original_class
        )
        state = {**self._copied(), "_graph": dump_graph(self._graph), "_original_class": kind}
        return _blank, (type(self).__name__, kind), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = load_graph(state.pop("_graph"))
        state = {"_forward_parameters": _parameters_of(graph), **state}
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch has no types for it
        self._call_variants = Variants()
        self._adopt(graph)


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
    model._freeze_batchnorms()  # the user may have called train() on one of them
    arguments = model._forward_parameters.bound(args, kwargs)
    given = model._given
    if given is None:
        return None, model, list(arguments.values())
    if given.holds(arguments, lambda: surroundings(model)):
        return None, model, given.ordered(arguments)
    image, streamed = model._image_name(), model._streamed
    check_image(arguments[Slot(image)], streamed.settings)
    variant = model._call_variants.serving(
        arguments,
        lambda: surroundings(model),
        lambda others: new_variant(
            model,
            plain_model(model),
            arguments,
            image,
            model._streamed_name,
            streamed.settings,
            model._prove,
            [given, *others],
        ),
    )
    return variant.forward, variant.seen, variant.given.ordered(arguments)


def plain_model(converted: Converted) -> nn.Module:
    """A plain model with the modules and tensors of a converted one. Raises StreamingError if its class is unknown."""
    original = converted._as_original()
    if original is None:
        raise StreamingError(
            "this needs another graph than that of the conversion, which cannot be made, since the class of the model "
            "was not found when it was unpickled. Way out: define it in a module that can be imported"
        )
    return original


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
