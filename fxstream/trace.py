"""Tracing: an fx graph that says as much as the model's forward does.

Three things differ from `torch.fx.symbolic_trace`. In-place operators (`x += y`) are recorded as such instead of
as their out-of-place twins. A module's `training` flag is recorded as a `get_attr`, so that it is read at every
call; where it decides the control flow, the decision is noted as a guard. A module stays one call if it is a streamable
operation, has hooks, cannot be traced, or does what a graph does not record: assign attributes, or open a region of
`torch.no_grad` or `torch.autocast`.
"""

from __future__ import annotations

import operator
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from .errors import TraceError
from .hooks import computed_weights, has_hooks
from .ops import NotLocal, functions, rule_for

INPLACE_OPERATORS = "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split()
"""The functions of `operator` that overwrite their first argument, if that is a tensor."""


@dataclass
class Trace:
    """A traced model."""

    root: nn.Module
    graph: fx.Graph
    entered: list[str]
    """Paths of the modules that were traced through: the graph holds their operations, not calls of them."""
    guards: dict[str, bool]
    """Path of a module -> training flag, where the flag decided what was traced."""
    frozen: set[str]
    """Paths of batch norms of the user's own that were traced as if in eval mode."""
    opaque: dict[str, NotLocal]
    """Path of a module that stays one call -> why it is not local."""
    constants: dict[str, torch.Tensor]
    """Name of a get_attr -> the tensor that forward made while it was traced."""

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """All modules by path, the root under ""."""
        return dict(self.root.named_modules())

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.modules[str(node.target)] if node.op == "call_module" else None


class _Proxy(Proxy):
    """A proxy that records in-place operators, which Python would otherwise turn into `x = x + y`."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _inplace(name: str) -> Callable[[_Proxy, Any], Proxy]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in INPLACE_OPERATORS:
    setattr(_Proxy, f"__{_name}__", _inplace(_name))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, opaque: Mapping[str, NotLocal], freeze_batchnorm: bool):
        super().__init__(autowrap_functions=functions())
        self.opaque = opaque
        self.freeze_batchnorm = freeze_batchnorm
        self.guards: dict[str, bool] = {}
        self.frozen: set[str] = set()
        self.entered: list[str] = []
        self.failed_in: str | None = None
        self.classes: dict[nn.Module, type] = {}
        self.flags: dict[fx.Node, tuple[str, bool]] = {}
        self.region = _region()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _region() != self.region:
            raise _UnrecordedError(
                "it computes inside torch.no_grad, torch.autocast or the like, which fx does not record"
            )
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> fx.node.Argument:
        # fx would make a plain dict of it.
        if type(a) is OrderedDict:
            return self.create_proxy("call_function", OrderedDict, ([*a.items()],), {}).node
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if has_hooks(m) or module_qualified_name in self.opaque:
            return True
        if is_parametrized(m) or computed_weights(m):
            return False
        return rule_for(self.classes.get(m, type(m))) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self.entered.append(path)
        before = _state(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
            _check_unchanged(m, before)
        except Exception:
            self.failed_in = self.failed_in or path
            raise
        return result

    def to_bool(self, obj: Proxy) -> bool:
        if obj.node in self.flags:
            path, value = self.flags[obj.node]
            self.guards[path] = value
            return value
        return super().to_bool(obj)

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]  # modules only
        with self._watched_flags(root):
            return super().trace(root, concrete_args)

    @contextmanager
    def _watched_flags(self, root: nn.Module) -> Iterator[None]:
        """For the time of tracing, reading `module.training` gives a proxy in every module of the user's own."""
        for path, module in root.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            if module is not root and self.is_leaf_module(module, path):
                continue
            self.classes[module] = type(module)
            module.__class__ = self._watched(type(module), path)
        try:
            yield
        finally:
            for module, original in self.classes.items():
                module.__class__ = original

    def _watched(self, original: type[nn.Module], path: str) -> type[nn.Module]:
        def training(module: nn.Module) -> Any:
            if not hasattr(self, "graph"):
                return module.__dict__["training"]
            if self.freeze_batchnorm and issubclass(original, _BatchNorm):
                self.frozen.add(path)
                return False
            flag = self.create_proxy("get_attr", f"{path}.training" if path else "training", (), {})
            self.flags[flag.node] = (path, module.__dict__["training"])
            return flag

        def set_training(module: nn.Module, value: bool) -> None:
            module.__dict__["training"] = value

        names = {"training": property(training, set_training), "__module__": original.__module__}
        return type(original.__name__, (original,), names)


def trace(model: nn.Module, opaque: Mapping[str, NotLocal], freeze_batchnorm: bool) -> Trace:
    """Trace a model. Raises TraceError if its own forward cannot be traced.

    Modules of which `opaque` says why they are not local stay one call. With `freeze_batchnorm`, batch norms of the
    user's own are traced as if they were in eval mode.
    """
    opaque = dict(opaque)
    while True:
        tracer = _Tracer(opaque, freeze_batchnorm)
        states = {module: _state(module) for module in model.modules()}
        try:
            graph = tracer.trace(model)
            constants = {
                name: vars(model).pop(name) for name in list(vars(model)) if name.startswith("_tensor_constant")
            }
            _check_unchanged(model, states[model])
        except Exception as error:
            if tracer.failed_in is None:
                raise TraceError(_explain(model, error)) from error
            # The model around it may be traceable: leave this module as one call.
            why = f"is one opaque call: torch.fx cannot trace it: {_first_line(error)} ({_where(error)})"
            opaque[tracer.failed_in] = NotLocal(why, "make it traceable")
            continue
        finally:
            # The model is not ours to change, and fx leaves there the tensors that forward makes.
            for module, state in states.items():
                _restore(module, state)
        _remove_unused_flags(graph, tracer)
        return Trace(model, graph, tracer.entered, tracer.guards, tracer.frozen, opaque, constants)


class _UnrecordedError(Exception):
    """A forward does something that a graph does not record."""


def _region() -> tuple[Any, ...]:
    """What `with` blocks change without leaving a trace in a graph."""
    autocast = ((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def _state(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, its registries copied."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}


def _check_unchanged(module: nn.Module, before: dict[str, Any]) -> None:
    now, computed = _state(module), computed_weights(module)
    changed = [
        name
        for name in now.keys() | before.keys()
        if name not in computed and not _same(now.get(name), before.get(name))
    ]
    if changed:
        raise _UnrecordedError(
            f"its forward assigns attributes ({', '.join(sorted(changed))}), which fx does not record"
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(one[key] is other[key] for key in one)
    return one is other


def _restore(module: nn.Module, state: dict[str, Any]) -> None:
    for name in list(vars(module)):
        if name not in state:
            del vars(module)[name]
    for name, value in state.items():
        if isinstance(value, dict):
            # The registry itself stays: others may hold it.
            registry = vars(module)[name]
            if not _same(registry, value):
                registry.clear()
                registry.update(value)
        else:
            vars(module)[name] = value


def _remove_unused_flags(graph: fx.Graph, tracer: _Tracer) -> None:
    for node in tracer.flags:
        if not node.users:
            graph.erase_node(node)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _where(error: Exception) -> str:
    """The last line of the user's own code on the way to the error."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parent)
    own = [frame for frame in frames if "/torch/" not in frame.filename and not frame.filename.startswith(ours)]
    return f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "the module as a whole"


def _explain(model: nn.Module, error: Exception) -> str:
    return (
        f"torch.fx cannot trace {type(model).__name__}.forward: {_first_line(error)}\n"
        f"  at {_where(error)}\n"
        "Way out: keep data-dependent control flow out of this forward. Move it into a submodule, which then stays "
        "one call behind the streamed part, or mark a function with torch.fx.wrap."
    )
