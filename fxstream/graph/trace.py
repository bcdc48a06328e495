"""Tracing: from a model to an fx graph that says all that the model's forward does.

Three things differ from `torch.fx.symbolic_trace`.

- In-place operators (`x += y`) are recorded as such, instead of as their out-of-place twins.
- A module's `training` flag is recorded as a `get_attr`, so that it is read at every call. Where the flag decides the
  control flow, the decision becomes one of the graph's `Assumptions`.
- A module stays one call if it is an operation with a rule, has hooks, cannot be traced, or does something that a graph
  does not record: assign attributes, or open a region of `torch.no_grad` or `torch.autocast`.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from ..errors import TraceError
from ..ops import NotLocal, functions, has_own_methods, rule_for
from .attributes import Held, held
from .hooks import computed_weights, has_hooks
from .proxy import Kind, RecordingProxy, UnrecordedError, answered_isinstance, kind_of
from .snapshot import RandomState, Snapshot


@dataclass(frozen=True)
class Assumptions:
    """What a traced graph takes for granted about its modules; every call checks that it still holds."""

    modes: Mapping[str, bool]
    """Path of a module -> the training flag that decided which operations were traced."""
    attributes: Mapping[str, Mapping[str, Held]]
    """Path of a module -> the numbers and strings in its attributes that were read, by name: constants of the graph."""
    entered: tuple[str, ...]
    """Paths of the modules that were traced through: the graph holds their operations, not calls of them."""


@dataclass
class Trace:
    """A traced model."""

    root: nn.Module
    graph: fx.Graph
    assumptions: Assumptions
    frozen: set[str]
    """Paths of batch norms of the user's own that were traced as if in eval mode."""
    opaque: dict[str, NotLocal]
    """Path of a module that stays one call, since it was not traced through -> why it is not local."""
    constants: dict[str, torch.Tensor]
    """Target of a get_attr -> the tensor that forward made while it was traced."""
    known: Mapping[fx.Node, Any] = field(default_factory=dict)
    """What is known of values beforehand. For the image: its sizes, with None for one that is not known; for other
    nodes that do not depend on it, and for these alone: what rules are given at conversion."""

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """All modules by path, the root under ""."""
        return dict(self.root.named_modules())

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls; None for another kind of node."""
        return self.modules[str(node.target)] if node.op == "call_module" else None


_CHECKS = {kind._check_input_dim for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)}
"""The methods by which torch's batch norms check their input."""


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, snapshot: Snapshot, opaque: Mapping[str, NotLocal], freeze_batchnorm: bool):
        super().__init__(autowrap_functions=functions())
        self.snapshot = snapshot
        self.opaque = opaque
        self.freeze_batchnorm = freeze_batchnorm
        self.modes: dict[str, bool] = {}
        self.frozen: set[str] = set()
        self.attributes: dict[str, dict[str, Held]] = {}
        self.entered: list[str] = []
        self.failed_in: str | None = None
        self.classes: dict[nn.Module, type] = {}
        self.flags: dict[fx.Node, tuple[str, bool]] = {}
        self.kinds: dict[fx.Node, Kind | None] = {}
        self.modules: dict[str, nn.Module] = {}
        self.region = _region()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _region() != self.region:
            raise UnrecordedError(
                "it computes inside torch.no_grad, torch.autocast or the like, which fx does not record"
            )
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> fx.node.Argument:
        # fx would make a plain dict of it.
        if type(a) is OrderedDict:
            return self.create_proxy("call_function", OrderedDict, ([*a.items()],), {}).node
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> Proxy:
        return RecordingProxy(self, node)

    def kind(self, node: fx.Node) -> Kind | None:
        """What the value of a node is, as far as that is known."""
        waiting = [node]
        while waiting:
            sources = waiting[-1].all_input_nodes
            if unknown := [source for source in sources if source not in self.kinds]:
                waiting += unknown
            else:
                found = waiting.pop()
                module = self.modules[str(found.target)] if found.op == "call_module" else None
                self.kinds[found] = kind_of(found, [self.kinds[source] for source in sources], module)
        return self.kinds[node]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if has_hooks(m) or module_qualified_name in self.opaque:
            return True
        if is_parametrized(m) or computed_weights(m):
            return False
        kind = self.classes.get(m, type(m))
        if has_own_methods(m, kind):
            return False
        return rule_for(kind) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self.entered.append(path)
        drawn = RandomState()
        try:
            result = super().call_module(m, forward, args, kwargs)
            _check_unchanged(self.snapshot, m, *m.children())
            _check_nothing_drawn(drawn)
        except Exception:
            self.failed_in = self.failed_in or path
            raise
        return result

    def to_bool(self, obj: Proxy) -> bool:
        if obj.node in self.flags:
            path, value = self.flags[obj.node]
            self.modes[path] = value
            return value
        return super().to_bool(obj)

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]  # modules only
        self.modules = dict(root.named_modules(remove_duplicate=False))
        with self._watched_flags(root), self._watched_functions(), answered_isinstance():
            return super().trace(root, concrete_args)

    @contextmanager
    def _watched_functions(self) -> Iterator[None]:
        """While tracing, functions of torch that a graph does not record fail.

        These are an autograd.Function that is called with a proxy, and questions about the state of a call.
        """
        apply = vars(torch.autograd.Function)["apply"]
        questions = {name: getattr(torch, name) for name in _QUESTIONS}

        def refusing(kind: type, *args: Any, **kwargs: Any) -> Any:
            if any(isinstance(value, Proxy) for value in (*args, *kwargs.values())):
                raise UnrecordedError(f"it calls {kind.__name__}, an autograd.Function, which fx does not record")
            return apply.__get__(None, kind)(*args, **kwargs)

        torch.autograd.Function.apply = classmethod(refusing)
        for name, function in questions.items():
            setattr(torch, name, _refused_question(function))
        try:
            yield
        finally:
            torch.autograd.Function.apply = apply
            for name, function in questions.items():
                setattr(torch, name, function)

    @contextmanager
    def _watched_flags(self, root: nn.Module) -> Iterator[None]:
        """While tracing, `module.training` gives a proxy, in every module that is traced through."""
        try:
            for path, module in root.named_modules():
                if not isinstance(module, torch.jit.ScriptModule) and path not in self.opaque:
                    self._watch(module, path)
            yield
        finally:
            for module, original in self.classes.items():
                module.__class__ = original

    def _watch(self, module: nn.Module, path: str) -> None:
        try:
            watched = self._watched(type(module), path)
            self.classes[module] = type(module)
            module.__class__ = watched
        except TypeError:  # its class cannot be extended
            self.classes.pop(module, None)
            self.failed_in = path or None
            raise

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

        def attribute(module: nn.Module, name: str) -> Any:
            value = original.__getattribute__(module, name)
            if hasattr(self, "graph") and name not in _OF_MODULES and not name.startswith("__"):
                # The converted model is of another class than the root, so it does not have its class attributes.
                own = bool(path) or name in original.__getattribute__(module, "__dict__")
                if own and (parts := held(value)) != {}:
                    self.attributes.setdefault(path, {})[name] = parts
            return value

        names: dict[str, Any] = {"training": property(training, set_training), "__module__": original.__module__}
        names["__getattribute__"] = attribute
        if getattr(original, "_check_input_dim", None) in _CHECKS:
            names["_check_input_dim"] = lambda module, input: None  # it branches on the number of dimensions
        kind: Any = type(original)
        watched: type[nn.Module] = kind(original.__name__, (_Unannounced, original), names)
        return watched


_QUESTIONS = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")
"""What a forward may ask torch about a call; the answer of the conversion would stay in the graph."""


def _refused_question(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which answers torch and us, but refuses a user's forward."""

    def answer(*args: Any) -> Any:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if asking.partition(".")[0] in ("torch", "fxstream"):
            return function(*args)
        raise UnrecordedError(f"it asks torch.{function.__name__}(), whose answer fx does not record")

    return answer


class _Unannounced:
    """A base class in front of another, which is then not told that it has been extended."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


_OF_MODULES = set(vars(nn.Module()))
_LOCK = threading.RLock()
"""Tracing replaces classes of modules and functions of torch, which two threads must not do at a time."""


def trace(model: nn.Module, opaque: Mapping[str, NotLocal], freeze_batchnorm: bool) -> Trace:
    """Trace a model. Raises TraceError if its own forward cannot be traced.

    Modules of which `opaque` says why they are not local stay one call. With `freeze_batchnorm`, batch norms of the
    user's own are traced as if they were in eval mode.
    """
    with _LOCK:
        return _trace(model, dict(opaque), freeze_batchnorm)


def _trace(model: nn.Module, opaque: dict[str, NotLocal], freeze_batchnorm: bool) -> Trace:
    """See `trace`. Adds to `opaque` the modules that cannot be traced through."""
    while True:
        snapshot, drawn = Snapshot(model), RandomState()
        tracer = _Tracer(snapshot, opaque, freeze_batchnorm)
        try:
            if "forward" in vars(model):
                raise UnrecordedError("its forward has been replaced on the instance, which fx does not see")
            graph = tracer.trace(model)
            constants = {
                name: vars(model).pop(name) for name in list(vars(model)) if name.startswith("_tensor_constant")
            }
            _check_unchanged(snapshot, *model.modules())
            _check_nothing_drawn(drawn)
        except Exception as error:
            if tracer.failed_in is None:
                raise TraceError(_explain(model, error)) from error
            # The model around it may be traceable, so leave this module as one call.
            why = f"is one opaque call: torch.fx cannot trace it: {_first_line(error)} ({_where(error)})"
            opaque[tracer.failed_in] = NotLocal(why, "make it traceable")
            continue
        finally:
            # The model is not ours to change, and fx leaves there the tensors that forward makes.
            snapshot.restore()
            drawn.restore()
        _remove_unused_flags(graph, tracer)
        assumptions = Assumptions(tracer.modes, tracer.attributes, tuple(tracer.entered))
        return Trace(model, graph, assumptions, tracer.frozen, opaque, constants)


def _region() -> tuple[Any, ...]:
    """The state that `with` blocks change, which a graph does not record."""
    autocast = ((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def _check_unchanged(snapshot: Snapshot, *modules: nn.Module) -> None:
    if changed := snapshot.changed(*modules):
        raise UnrecordedError(f"its forward assigns attributes ({', '.join(changed)}), which fx does not record")


def _check_nothing_drawn(before: RandomState) -> None:
    if before.has_changed():
        raise UnrecordedError("it draws random numbers while it is traced, which fx does not record")


def _remove_unused_flags(graph: fx.Graph, tracer: _Tracer) -> None:
    for node in tracer.flags:
        if not node.users:
            graph.erase_node(node)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _where(error: Exception) -> str:
    """The last line of the user's own code on the way to the error."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parents[1])
    own = [frame for frame in frames if "/torch/" not in frame.filename and not frame.filename.startswith(ours)]
    return f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "the module as a whole"


def _explain(model: nn.Module, error: Exception) -> str:
    return (
        f"torch.fx cannot trace {type(model).__name__}.forward: {_first_line(error)}\n"
        f"  at {_where(error)}\n"
        "Way out: keep data-dependent control flow out of this forward. Move it into a submodule, which then stays "
        "one call behind the streamed part, or mark a function with torch.fx.wrap."
    )
