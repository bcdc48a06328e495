"""Functions of Python and torch that are replaced while a model is traced, since they would miss or misread a proxy."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.fx.proxy import Proxy
from torch.overrides import TorchFunctionMode

from ..ops import functions
from .facts import UnknownFactError
from .nodes import leaves
from .proxy import RecordingProxy, UnrecordedError
from .snapshot import files_of

_FACTORIES = (
    *("zeros", "ones", "full", "empty", "eye", "arange", "linspace", "logspace", "tril_indices", "triu_indices"),
    *("rand", "randn", "randint", "tensor", "as_tensor", "asarray", "scalar_tensor"),
)
"""Functions that make a tensor from sizes, numbers or other tensors."""
_QUESTIONS = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")
"""What a forward may ask torch about a call; the answer of the conversion would stay in the graph."""


@contextmanager
def replaced_functions(root: nn.Module, record: Callable[..., Proxy], recording: Callable[[], bool]) -> Iterator[None]:
    """In this context, some functions record a call with a proxy, answer it, or refuse it.

    `root` is the model that is traced. `record` makes a node, with the arguments of `fx.Tracer.create_proxy`.
    `recording` tells whether it is the traced forward that asks.

    - Functions that make tensors record it, and so do functions of other packages that have a rule. Torch itself asks a
      proxy only where it expects a tensor.
    - An autograd.Function refuses it, and questions about the state of a call refuse whoever asks.
    - `isinstance` answers as for the value itself. A proxy cannot do that by its `__class__`, since the C++ code of
      torch, too, would then take it for a tensor.
    - `type` does so, too, in the files in which the classes of the model's modules are written.
    """
    with torch.device("meta"):
        torch.empty(0)  # fills a cache that torch has of its functions, before they are replaced
    # It lists Python's functions when it is imported, which batch norm on the meta device or the forward may cause.
    import_module("torch._dynamo")
    factories = _Factories([getattr(torch, name) for name in _FACTORIES], record)
    replacements: list[tuple[Any, str, Callable[[Any], Any]]] = [
        *((torch, name, factories.instead_of) for name in _FACTORIES),
        *((torch, name, lambda function: _refused_question(function, recording)) for name in _QUESTIONS),
        *((module, name, factories.instead_of) for module, name in _exported(functions())),
        (torch.autograd.Function, "apply", _refused_function),
        (builtins, "isinstance", _answered),
    ]
    originals = [vars(owner)[name] for owner, name, _ in replacements]
    for (owner, name, replacement), original in zip(replacements, originals, strict=True):
        setattr(owner, name, replacement(original))
    try:
        with factories, _answered_type(root):
            yield
    finally:
        for (owner, name, _), original in zip(replacements, originals, strict=True):
            setattr(owner, name, original)


def _exported(functions: Iterable[Callable[..., Any]]) -> Iterator[tuple[ModuleType, str]]:
    """Where a forward may find functions with a rule that do not ask proxies themselves, as those of torch do.

    These are the packages of the functions: `einops.rearrange` is defined in `einops.einops`.
    """
    for function in functions:
        package = function.__module__.partition(".")[0]
        found = sys.modules.get(package)
        if package not in ("torch", "fxstream") and found is not None:
            yield from ((found, name) for name, value in vars(found).items() if value is function)


class _Factories(TorchFunctionMode):
    """Records calls of some functions with a proxy, whatever name they are called by."""

    def __init__(self, functions: Any, record: Callable[..., Proxy]):
        super().__init__()
        self._functions, self._record = set(functions), record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.instead_of(func)(*args, **kwargs) if func in self._functions else func(*args, **kwargs)

    def instead_of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which is recorded if it is called with a proxy."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, Proxy) for leaf in leaves((args, kwargs))):
                return self._record("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call


def _refused_function(apply: Any) -> Any:
    """`autograd.Function.apply`, which refuses a proxy."""

    def refuse(kind: type, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, Proxy) for value in (*args, *kwargs.values())):
            raise UnrecordedError(f"it calls {kind.__name__}, an autograd.Function, which fx does not record")
        return apply.__get__(None, kind)(*args, **kwargs)

    return classmethod(refuse)


def _refused_question(function: Callable[..., Any], recording: Callable[[], bool]) -> Callable[..., Any]:
    """The function, which answers torch and us, but refuses a user's forward while it is being traced."""

    def answer(*args: Any) -> Any:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if not recording() or asking.partition(".")[0] in ("torch", "fxstream"):
            return function(*args)
        raise UnrecordedError(f"it asks torch.{function.__name__}(), whose answer fx does not record")

    return answer


def _answered(original: Callable[..., bool]) -> Callable[..., bool]:
    """`isinstance`, which gives the right answer for a proxy, or refuses to if that is not known."""

    def answer(value: Any, classes: Any) -> bool:
        if type(value) is not RecordingProxy or original(value, classes):
            return original(value, classes)
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if asking.startswith(("torch.fx.", "torch.nn.parameter", "fxstream.")):
            return False  # they ask whether it is a proxy
        try:
            return issubclass(value.tracer.facts.type_of(value.node), classes)
        except UnknownFactError as error:
            if asking.startswith("torch."):
                return False
            what = f"it asks for the type of {value.node.name}, which is not known while it is traced ({error})"
            raise UnrecordedError(what) from None

    return answer


@contextmanager
def _answered_type(root: nn.Module) -> Iterator[None]:
    """In this context, `type` is `_Type` in the files in which the classes of a model's modules are written."""
    files = [names for names in map(vars, files_of(*root.modules())) if "type" not in names]
    for names in files:
        names["type"] = _Type
    try:
        yield
    finally:
        for names in files:
            del names["type"]


class _Answering(type):
    """The class of `_Type`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not _Type:  # a metaclass of the user's own
            return super().__call__(*args, **kwargs)
        if len(args) == 1 and type(args[0]) is RecordingProxy:
            return args[0].tracer.answer("type_of", args[0].node)
        if len(args) == 1 and isinstance(args[0], nn.Module):
            return args[0].__class__  # that of the user, who knows nothing of the class that it has while it is traced
        return type(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return issubclass(type(value), type)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, type)


class _Type(type, metaclass=_Answering):
    """Stands for `type`, and gives the class of a value for its proxy."""
