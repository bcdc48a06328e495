"""Tracing: from a model to an fx graph that says all that the model's forward does.

Four things differ from `torch.fx.symbolic_trace`.

- In-place operators (`x += y`) are recorded as such, instead of as their out-of-place twins.
- A module's `training` flag is recorded as a `get_attr`, so that it is read at every call. Where the flag decides the
  control flow, the decision becomes one of the graph's `Assumptions`.
- What an example of its arguments tells is answered, if the forward asks: see `facts`. `Given` holds what was asked.
- A module stays one call if it is an operation with a rule, has hooks, cannot be traced, or does something that a graph
  does not record: assign attributes, or open a region of `torch.no_grad` or `torch.autocast`.
"""

from __future__ import annotations

import copy
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy
import torch
from torch import fx, nn
from torch.fx.proxy import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from ..errors import TraceError
from ..ops import NotLocal, functions, has_own_methods, rule_for
from .arguments import Given, Parameters, Slot, is_constant, surroundings
from .attributes import Held, held
from .facts import Facts, UnknownFactError
from .frames import compares_by_identity
from .hooks import computed_weights, has_hooks, runs_own_hooks
from .proxy import RecordingProxy, UnrecordedError
from .rebuild import NotCopiedError, is_named_tuple, is_rebuilt, parts
from .replaced import replaced_functions
from .serialize import fingerprint
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
    opaque: tuple[str, ...] = ()
    """Paths of the modules that stayed one call, though they are no operation with a rule."""
    fingerprint: str | None = None
    """Of the graph, if a training flag decided anything; None also if forward made tensors while it was traced."""
    given: Given = field(default_factory=Given)
    """What the arguments are taken to be."""


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

    def __init__(
        self,
        arguments: Mapping[Slot, Any],
        snapshot: Snapshot,
        opaque: dict[str, NotLocal],
        freeze_batchnorm: bool,
        alone: bool,
    ):
        super().__init__(autowrap_functions=functions())
        self.arguments = arguments
        self.snapshot = snapshot
        self.opaque = opaque
        self.freeze_batchnorm = freeze_batchnorm
        self.alone = alone
        self.modes: dict[str, bool] = {}
        self.frozen: set[str] = set()
        self.attributes: dict[str, dict[str, Held]] = {}
        self.entered: list[str] = []
        self.classes: dict[nn.Module, type] = {}
        self.flags: dict[fx.Node, tuple[str, bool]] = {}
        self.facts = Facts({}, {})
        self.asked: set[fx.Node] = set()
        self.tensors: dict[int, tuple[str, torch.Tensor]] = {}
        self.region = _region()
        self.thread = threading.get_ident()
        self.made = WeakSet[nn.Module]()

    def recording(self) -> bool:
        """Whether whoever asks is the forward that is being traced.

        fx replaces methods of all modules, and other threads may run models meanwhile.
        """
        return hasattr(self, "graph") and not self.facts.computing and threading.get_ident() == self.thread

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _region() != self.region:
            raise UnrecordedError(
                "it computes inside torch.no_grad, torch.autocast or the like, which fx does not record"
            )
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> fx.node.Argument:
        if isinstance(a, numpy.generic):
            return super().create_arg(a.item())
        if type(a) is OrderedDict:
            return self.create_proxy("call_function", OrderedDict, ([*a.items()],), {}).node
        try:
            found = parts(a) if is_rebuilt(a) and not is_named_tuple(a) else None
            if found is None:
                return super().create_arg(a)
        except (NotImplementedError, NotCopiedError) as error:
            raise UnrecordedError(
                f"it returns or hands on an object of the class {type(a).__module__}.{type(a).__qualname__}, which a "
                "graph does not hold; it would hold one of a dataclass, or of a class that "
                "torch.utils._pytree.register_pytree_node has been called for"
            ) from error
        return self.create_proxy("call_function", *found, {}).node

    def proxy(self, node: fx.Node) -> Proxy:
        return RecordingProxy(self, node)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The forward's arguments: constants as they are, and a proxy for anything else."""
        parameters = Parameters.of(type(self.root))
        values: dict[Slot, Any] = {}
        for slot, form in self.arguments.items():
            proxy = self.create_proxy("placeholder", slot.name, parameters.default(slot), {})
            values[slot] = copy.copy(form) if is_constant(form) else proxy
        args, kwargs = parameters.passed(values)
        return partial(root_fn, **kwargs), [self.root, *args]

    def answer(self, question: str, node: fx.Node) -> Any:
        """What is known of a node's value: its "value", "length" or "type_of". Raises UnrecordedError."""
        try:
            found = getattr(self.facts, question)(node)
        except UnknownFactError as error:
            raise UnrecordedError(
                f"it asks something about {node.name} that is known only at a call ({error})"
            ) from None
        self.asked.add(node)
        for path, value in (self.flags[flag] for flag in _ancestors(node) & self.flags.keys()):
            self.modes[path] = value
        return found

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
        if not self.recording():
            return forward(*args, **kwargs)
        # Hooks that torch runs in every module are made for tensors; those of one module see to it that it is entered.
        forward = forward if runs_own_hooks(m) else m.forward
        try:
            path = self.path_of_module(m)
        except NameError:
            return self._without_state(m)(*args, **kwargs)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self.entered.append(path)
        drawn, depth, known = RandomState(), len(self.module_stack), len(self.opaque)
        try:
            result = super().call_module(m, forward, args, kwargs)
            try:
                _check_unchanged(self.snapshot, m, *m.children())
                _check_nothing_drawn(drawn, self.alone)
            except UnrecordedError:
                # A module in it that has failed may have left this behind. The next trace will tell.
                if len(self.opaque) == known:
                    raise
            return result
        except Exception as error:
            self.opaque[path] = _opaque(error)
        # The model around it may be traceable. We go on as if it were one call, to find all such modules in one trace.
        self.snapshot.restore_reached(m.modules())
        torch.set_grad_enabled(self.region[0])
        while len(self.module_stack) > depth:
            self.module_stack.popitem()
        return self.create_proxy("call_module", path, args, kwargs)

    def _without_state(self, module: nn.Module) -> Callable[..., Any]:
        """The forward of a module that another one has just made, and that has no state."""
        state = any(True for _ in (*module.parameters(), *module.buffers()))
        if module not in self.made or state or runs_own_hooks(module):
            raise UnrecordedError(
                f"it calls a {type(module).__name__} that is not one of the model's submodules and may have a state"
            )
        return module.forward

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """What a forward gets for an attribute: a proxy for a parameter or buffer.

        fx would search the whole model for the tensor each time.
        """
        if not self.recording() or id(attr_val) not in self.tensors:
            return attr_val
        name, _ = self.tensors[id(attr_val)]
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def to_bool(self, obj: Proxy) -> bool:
        if obj.node in self.flags:
            path, value = self.flags[obj.node]
            self.modes[path] = value
            return value
        return bool(self.answer("value", obj.node))

    def iter(self, obj: Proxy) -> Iterator[Any]:
        return (obj[index] for index in range(self.answer("length", obj.node)))  # type: ignore[index]  # RecordingProxy is

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]  # modules only
        forms = {slot.name: form for slot, form in self.arguments.items()}
        self.facts = Facts(dict(root.named_modules(remove_duplicate=False)), forms)
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            self.tensors.setdefault(id(tensor), (name, tensor))
        with self._watched_flags(root), _noted(self.made), replaced_functions(root, self.create_proxy, self.recording):
            return super().trace(root, concrete_args)

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
        except TypeError as error:  # its class cannot be extended
            self.classes.pop(module, None)
            if not path:
                raise
            self.opaque[path] = _opaque(error)

    def _watched(self, original: type[nn.Module], path: str) -> type[nn.Module]:
        def training(module: nn.Module) -> Any:
            if not self.recording():
                return module.__dict__["training"]
            if self.freeze_batchnorm and issubclass(original, _BatchNorm):
                self.frozen.add(path)
                return False
            if compares_by_identity(sys._getframe(2)):  # behind `attribute`
                value: bool = module.__dict__["training"]
                self.modes[path] = value
                return value
            flag = self.create_proxy("get_attr", f"{path}.training" if path else "training", (), {})
            self.flags[flag.node] = (path, module.__dict__["training"])
            return flag

        def set_training(module: nn.Module, value: bool) -> None:
            module.__dict__["training"] = value

        def attribute(module: nn.Module, name: str) -> Any:
            if name == "__class__":
                return original
            value = original.__getattribute__(module, name)
            if self.recording() and name not in _OF_MODULES and not name.startswith("__"):
                # A converted model does not always have the class attributes of the root, see `extended`.
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


@contextmanager
def _noted(made: WeakSet[nn.Module]) -> Iterator[None]:
    """In this context, modules that are made are added to a set."""
    original = nn.Module.__init__

    def init(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(module, *args, **kwargs)
        made.add(module)

    nn.Module.__init__ = init  # type: ignore[method-assign, assignment]  # on purpose
    try:
        yield
    finally:
        nn.Module.__init__ = original  # type: ignore[method-assign]  # on purpose


class _Unannounced:
    """A base class in front of another, which is then not told that it has been extended."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


_OF_MODULES = set(vars(nn.Module()))
LOCK = threading.RLock()
"""Tracing replaces classes of modules and functions of torch, which two threads must not do at a time."""


def trace(
    model: nn.Module, arguments: Mapping[Slot, Any], opaque: Mapping[str, NotLocal], freeze_batchnorm: bool
) -> Trace:
    """Trace a model. Raises TraceError if its own forward cannot be traced.

    The forward gets the constants among its `arguments`, and proxies for others, of which their `Form` may be known.
    Modules of which `opaque` says why they are not local stay one call. With `freeze_batchnorm`, batch norms of the
    user's own are traced as if they were in eval mode.
    """
    arguments = Parameters.of(type(model)).sorted(arguments)
    with LOCK, torch.inference_mode(False):
        before = RandomState()
        for _ in range(_ATTEMPTS if threading.active_count() > 1 else 0):
            try:
                return _trace(model, arguments, dict(opaque), freeze_batchnorm, alone=False)
            except _SomethingDrawn:
                continue
        try:
            return _trace(model, arguments, dict(opaque), freeze_batchnorm, alone=True)
        finally:
            before.restore()


_ATTEMPTS = 5


class _SomethingDrawn(BaseException):
    """Random numbers were drawn, perhaps by another thread. No forward must catch this."""


def _trace(
    model: nn.Module,
    arguments: Mapping[Slot, Any],
    opaque: dict[str, NotLocal],
    freeze_batchnorm: bool,
    alone: bool,
) -> Trace:
    """See `trace`. Adds to `opaque` the modules that cannot be traced through.

    One trace finds them, and another one leaves them out from the start, so that nothing remains of their forwards.
    Unless no other thread runs (`alone`), _SomethingDrawn is raised if anything draws random numbers meanwhile.
    """
    before = RandomState()
    while True:
        snapshot, drawn, known = Snapshot(model), RandomState(), len(opaque)
        tracer = _Tracer(arguments, snapshot, opaque, freeze_batchnorm, alone)
        try:
            if "forward" in vars(model):
                raise UnrecordedError("its forward has been replaced on the instance, which fx does not see")
            graph = tracer.trace(model)
            constants = {
                name: vars(model).pop(name) for name in list(vars(model)) if name.startswith("_tensor_constant")
            }
            _check_unchanged(snapshot, *model.modules())
            _check_nothing_drawn(drawn, alone)
        except Exception as error:
            if len(opaque) == known:
                raise TraceError(_explain(model, error)) from error
        finally:
            # The model is not ours to change, and fx leaves there the tensors that forward makes.
            snapshot.restore()
        if len(opaque) > known:
            continue
        if not alone:
            _check_nothing_drawn(before, alone)
        _remove_unused(graph, tracer)
        _forget_wrapped(graph)
        assumptions = Assumptions(
            tracer.modes,
            tracer.attributes,
            tuple(tracer.entered),
            tuple(opaque),
            fingerprint(graph) if tracer.modes and not constants else None,
            Given(arguments, tracer.facts.question, surroundings(model)),
        )
        return Trace(model, graph, assumptions, tracer.frozen, opaque, constants)


def _opaque(error: Exception) -> NotLocal:
    """Why a module that has raised an error while it was traced is not local."""
    why = f"is one opaque call: torch.fx cannot trace it: {_first_line(error)} ({_where(error)})"
    return NotLocal(why, "register a rule for its class, or use fxstream.compile, which captures what torch.fx cannot")


def traced_again(model: nn.Module, before: Assumptions, freeze_batchnorm: bool) -> Assumptions | None:
    """What holds for a model in its present modes, if tracing it gives the same graph as `before`; None if it does not.

    A flag that was asked may have decided nothing, as in `if self.training and self.auxiliary`.
    """
    if before.fingerprint is None:
        return None
    try:
        found = trace(
            model, before.given.forms, dict.fromkeys(before.opaque, NotLocal("")), freeze_batchnorm
        ).assumptions
    except TraceError:
        return None
    return found if (found.fingerprint, {*found.opaque}) == (before.fingerprint, {*before.opaque}) else None


def _region() -> tuple[Any, ...]:
    """The state that `with` blocks change, which a graph does not record."""
    autocast = ((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def _check_unchanged(snapshot: Snapshot, *modules: nn.Module) -> None:
    if changed := snapshot.changed(*modules):
        raise UnrecordedError(f"its forward assigns attributes ({', '.join(changed)}), which fx does not record")


def _check_nothing_drawn(before: RandomState, alone: bool) -> None:
    if before.has_changed():
        if not alone:
            raise _SomethingDrawn
        raise UnrecordedError("it draws random numbers while it is traced, which fx does not record")


def _remove_unused(graph: fx.Graph, tracer: _Tracer) -> None:
    """Erase flags and sizes that have been recorded only for a question: nothing else reads them."""
    questions = tracer.asked.union(*map(_ancestors, tracer.asked))
    for node in reversed(graph.nodes):
        number = node.op.startswith("call_") and node in questions and tracer.facts.is_number(node)
        if not node.users and (number or node in tracer.flags):
            graph.erase_node(node)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The nodes that the value of a node depends on."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return found


def _forget_wrapped(graph: fx.Graph) -> None:
    """Do not let the code that fx generates call `torch.fx.wrap` for functions of torch.

    Their names have dots, and every later trace in the process would fail.
    """
    for node in graph.nodes:
        if (getattr(node.target, "__module__", None) or "").startswith("torch."):
            node.meta.pop("is_wrapped", None)


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
        "Way out: use fxstream.compile, which captures what torch.fx cannot; or convert a module of your own whose "
        "forward(self, x) calls the parts of the model; or move this code into a submodule or into a function that is "
        "marked with torch.fx.wrap, and it stays one call behind the streamed part."
    )
