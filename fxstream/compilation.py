"""The second door: TorchDynamo captures the model at its first call, and its graphs stream.

`convert` makes another model. Here the model stays what it is, and `torch.compile` calls a backend with each graph that
it captures. The backend hands the graph to the same analysis, partition and scan.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .conversion import check_unwrapped, warn_if_short
from .errors import (
    BatchNormModeError,
    HookError,
    NothingToStreamError,
    PlainCallError,
    StreamingError,
    StreamingWarning,
    WrappedModelError,
)
from .geometry.axes import axis_names
from .graph.capture import Capture, UncapturedError, image_among, is_resumed, read
from .graph.hooks import registered
from .graph.prefix import Prefix, find_prefix
from .graph.regions import restore_regions
from .graph.trace import Assumptions
from .model.streamed import Streamed
from .model.variants import rewrite
from .scan.settings import Settings, parse_bytes, parse_tile_shape

TileShape = int | tuple[int | None, ...] | list[int | None] | Literal["auto"]
Runnable = Callable[..., Any]
_NAME = "streamed"
"""The submodule of a graph that streams."""
_CAPTURES = 64
"""How many captures of a model's code `compile` lets torch make before torch runs the plain model."""


def compile(
    model: nn.Module,
    tile_shape: TileShape,
    *,
    freeze_batchnorm: bool = False,
    memory_budget: int | str | None = None,
    image: str | None = None,
    strict: bool = False,
) -> nn.Module:
    """Let a model stream in place, through `torch.compile`'s front end.

    The model keeps its class, its modules, its parameters and the keys of its state dict. torch captures the forward at
    the first call, and again where a guard fails: another mode, another attribute, another branch that depends on the
    size of the image. No C++ compiler is needed. docs/compile.md says when torch runs the plain model instead.

    Args:
        model: any module that torch.compile can capture; its forward takes one image (N, C, *spatial).
        tile_shape: as `fxstream.convert` takes it.
        freeze_batchnorm: batch norms use their running statistics, whatever their mode, and do not update them.
        memory_budget: as `fxstream.convert` takes it.
        image: the name of the argument of `model.forward` that is streamed; by default the only one that is a
            floating-point tensor of 3 to 5 dimensions.
        strict: raise PlainCallError after a call in which nothing was streamed, instead of a warning.

    Returns:
        The model itself.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        WrappedModelError: the model is converted, or wrapped by torch.compile, DistributedDataParallel or the like.
        StreamingError: `image` is not an argument of the model's forward.
        MemoryBudgetError, TileShapeError: at once or, if only the image can tell, at the first call.

        A call of the model raises what a call of a converted model raises, and: NothingToStreamError; HookError, if a
        module has other hooks than at the first call; BatchNormModeError, if a batch norm that should be frozen ran
        outside a captured graph; WrappedModelError, inside DistributedDataParallel; PlainCallError.

    Warns:
        StreamingWarning: nothing was streamed in a call, or little.

    Example:
        >>> import torch, fxstream
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> model = fxstream.compile(model, tile_shape=(64, 64))
        >>> model(torch.randn(1, 3, 200, 150)).sum().backward()
        >>> model[0].weight.grad.shape
        torch.Size([8, 3, 3, 3])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    check_unwrapped(model)
    _check_image_name(model, image)
    used = backend(tile_shape, freeze_batchnorm=freeze_batchnorm, memory_budget=memory_budget, image=image)
    # A torch that lacks one of these does without: it makes at most 8 captures, for all models of a class together.
    known = inspect.signature(torch.compile).parameters
    wanted = {"isolate_recompiles": True, "recompile_limit": _CAPTURES}
    options: dict[str, Any] = {name: value for name, value in wanted.items() if name in known}
    compiled = torch.compile(_captured_call(model), backend=used, dynamic=True, **options)
    model._compiled_call_impl = _WatchedCall(model, compiled, freeze_batchnorm, strict)
    return model


def backend(
    tile_shape: TileShape,
    *,
    freeze_batchnorm: bool = False,
    memory_budget: int | str | None = None,
    image: str | None = None,
) -> Backend:
    """A backend for torch.compile: `torch.compile(model, backend=fxstream.backend((512, 512)), dynamic=True)`.

    `fxstream.compile` uses it, and sees to it that no call runs the plain model without a word. The arguments are those
    of `fxstream.compile`. By its name, the same backend is
    `torch.compile(model, backend="fxstream", options={"tile_shape": (512, 512)}, dynamic=True)`.

    Raises:
        MemoryBudgetError, TileShapeError: if an argument has a wrong form.

    Example:
        >>> import torch, fxstream
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> compiled = torch.compile(model, backend=fxstream.backend((64, 64)), dynamic=True)
        >>> compiled(torch.randn(1, 3, 200, 150)).shape
        torch.Size([1, 8, 198, 148])
    """
    made = Backend(_hashable(tile_shape), bool(freeze_batchnorm), parse_bytes(memory_budget), image)
    made.check()
    return made


def named_backend(
    captured: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **others: Any,
) -> Runnable:
    """What `backend="fxstream"` stands for: torch.compile passes `options` and `mode` on. Errors come at the call."""
    given = {**(options or {}), **others}
    known = inspect.signature(backend).parameters
    try:
        if mode is not None:
            raise StreamingError(f"the backend fxstream has no mode, and is given {mode!r}. Way out: leave it out")
        if unknown := [name for name in given if name not in known]:
            raise StreamingError(f"the backend fxstream has no option {unknown[0]!r}; it has {', '.join(known)}")
        if "tile_shape" not in given:
            raise StreamingError('the backend fxstream needs options={"tile_shape": ...}, such as (512, 512)')
        made = backend(**given)
    except StreamingError as error:
        return _Raising(error)
    return made(captured, example_inputs)


@dataclass(frozen=True)
class Backend:
    """What `fxstream.backend` returns. Two with the same options are equal: torch uses the captures of either."""

    tile_shape: Any
    freeze_batchnorm: bool
    memory_budget: int
    image: str | None

    def check(self) -> None:
        """Raises TileShapeError if no image can have such a tile_shape."""
        if self.tile_shape == "auto":
            Settings((), parse_tile_shape(self.tile_shape, axis_names(2)), False, self.memory_budget).check()

    def __call__(self, captured: fx.GraphModule, example_inputs: Sequence[Any]) -> Runnable:
        """What torch.compile runs instead of a captured graph.

        It never raises, since torch would wrap or even swallow the error. The result raises, at the call.
        """
        try:
            _check_not_split()
            return self._streaming(captured)
        except UncapturedError as why:
            return _AsItIs(captured, str(why), warns=True)
        except Exception as error:  # whatever it is: the call raises it
            return _Raising(error)

    def _streaming(self, captured: fx.GraphModule) -> Runnable:
        image = image_among(captured, self.image)
        if image is None:
            return _AsItIs(captured, "a captured graph has no image")
        capture = read(captured, image, self.freeze_batchnorm)
        settings = self.settings(capture)
        try:
            prefix, parts = rewrite(capture.trace, str(capture.image.target), settings, _NAME)
            streamed = set(prefix.nodes)
            if kept := [name for name, nodes in capture.checkpoints.items() if streamed.isdisjoint(nodes)]:
                capture = read(captured, image, self.freeze_batchnorm, kept)
                prefix, parts = rewrite(capture.trace, str(capture.image.target), settings, _NAME)
        except NothingToStreamError as error:
            resumed = is_resumed(captured.graph)
            return _AsItIs(captured, str(error), warns=resumed, raises=not resumed)
        warn_if_short(prefix)
        part = Streamed(parts.streamed, settings, Assumptions({}, {}, ()))
        restore_regions(parts.outer)
        module = fx.GraphModule({**_attributes(captured, parts.outer), _NAME: part}, parts.outer)
        part.bind(module)
        return _Streaming(module)

    def settings(self, capture: Capture) -> Settings:
        """The settings for the image of a captured graph. Raises TileShapeError."""
        names = axis_names(len(capture.trace.known[capture.image]) - 2)
        tiling = parse_tile_shape(self.tile_shape, names)
        settings = Settings(names, tiling, self.freeze_batchnorm, self.memory_budget)
        settings.check()
        return settings


def _hashable(tile_shape: Any) -> Any:
    return tuple(tile_shape) if isinstance(tile_shape, list) else tile_shape


def _attributes(captured: fx.GraphModule, graph: fx.Graph) -> dict[str, Any]:
    """What a graph reads of the captured module: submodules of higher-order operations, tensors that forward made."""
    targets = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")} - {_NAME}
    found = {}
    for target in targets:
        owner, _, name = target.rpartition(".")
        found[target] = getattr(captured.get_submodule(owner), name)
    return found


def _check_not_split() -> None:
    """Raises WrappedModelError where torch splits graphs by the buckets of DistributedDataParallel."""
    # Of a torch without distributed training, or one whose DDP has not been imported, there is no such module.
    parallel = getattr(getattr(nn.parallel, "distributed", None), "DistributedDataParallel", None)
    if parallel is not None and parallel._get_active_ddp_module() and torch._dynamo.config.optimize_ddp:
        raise WrappedModelError(
            "inside DistributedDataParallel, torch splits the captured graph into one per bucket of gradients, and "
            "nothing would stream behind the first. Way out: torch._dynamo.config.optimize_ddp = False"
        )


# What a backend returns.


@dataclass
class _CallInProgress:
    """What runs during a call of a model that was given to `compile`."""

    streamed: bool = False
    """Whether a graph has streamed."""
    reasons: list[str] = field(default_factory=list)
    """Why other graphs have not."""


_CALL: ContextVar[_CallInProgress | None] = ContextVar("fxstream_call", default=None)


class _Streaming:
    """Runs a graph of which a part streams."""

    def __init__(self, module: fx.GraphModule):
        self.module = module

    def __call__(self, *inputs: Any) -> Any:
        if (call := _CALL.get()) is not None:
            call.streamed = True
        return self.module.forward(*inputs)


class _AsItIs:
    """Runs a graph as it was captured.

    With `warns`, it says so, unless `compile` watches the call. With `raises`, it does so only if another graph of the
    same call has streamed.
    """

    def __init__(self, captured: fx.GraphModule, reason: str, warns: bool = False, raises: bool = False):
        self.captured = captured
        self.reason = reason
        self.warns = warns
        self.raises = raises

    def __call__(self, *inputs: Any) -> Any:
        call = _CALL.get()
        if self.raises and not (call is not None and call.streamed):
            raise NothingToStreamError(self.reason)
        if call is not None:
            call.reasons.append(self.reason)
        elif self.warns:
            warnings.warn(f"a captured graph runs as it is: {self.reason}", StreamingWarning, stacklevel=2)
        return self.captured.forward(*inputs)


class _Raising:
    """Raises an error, a new one at each call."""

    def __init__(self, error: Exception):
        self.kind = type(error)
        self.args = error.args  # not the error itself, whose traceback holds the tensors of the capture

    def __call__(self, *inputs: Any) -> Any:
        raise self.kind(*self.args)


# What `compile` makes of a model's call.


class _WatchedCall:
    """The call of a model that was given to `compile`: warns, or raises, if nothing has streamed."""

    def __init__(self, model: nn.Module, compiled: Runnable, freeze_batchnorm: bool, strict: bool):
        self.model = model
        self.compiled = compiled
        self.freeze_batchnorm = freeze_batchnorm
        self.strict = strict
        self.hooks: dict[str, tuple[int, ...]] | None = None
        """The hooks of all modules at the first call, by path; later ones would not be seen."""

    @torch._disable_dynamo  # type: ignore[attr-defined]  # torch itself uses it so
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._check_hooks()
        counted = self._counters()
        with _watching() as call:
            result = self.compiled(*args, **kwargs)
        self._check_frozen(counted)
        if self.hooks is None:
            self.hooks = registered(self.model)
        if not call.streamed:
            self._complain(call.reasons)
        return result

    def _check_hooks(self) -> None:
        if self.hooks is None:
            return
        now = registered(self.model)
        if changed := [path for path in {**self.hooks, **now} if self.hooks.get(path) != now.get(path)]:
            raise HookError(
                f"{changed[0] or 'the model'} has other hooks than at the first call, which torch.compile would not "
                "see. Way out: register hooks before the first call; or call torch.compiler.reset(), and then "
                "fxstream.compile again"
            )

    def _counters(self) -> dict[str, int]:
        """Path of a batch norm that should be frozen -> how often its counter of batches was written to."""
        if not self.freeze_batchnorm:
            return {}
        norms = ((path, module) for path, module in self.model.named_modules() if isinstance(module, _BatchNorm))
        counters = ((path, module.num_batches_tracked) for path, module in norms)
        return {path: counter._version for path, counter in counters if counter is not None}

    def _check_frozen(self, before: dict[str, int]) -> None:
        """Raises BatchNormModeError if a batch norm that should be frozen has used batch statistics."""
        now = self._counters()
        if changed := [path for path, version in before.items() if now.get(path, version) != version]:
            raise BatchNormModeError(
                f"{changed[0]} used the statistics of the batch in this call, and has updated its running ones, though "
                "freeze_batchnorm=True: torch ran it outside the captured graphs, as it does with momentum=None. Way "
                "out: call .eval() on it"
            )

    def _complain(self, reasons: list[str]) -> None:
        why = "".join(f"\n  {reason}" for reason in dict.fromkeys(reasons))
        why = why or "\n  torch captured nothing: docs/compile.md lists when it runs the plain model"
        message = f"nothing was streamed in this call of {type(self.model).__name__}, which was computed whole:{why}"
        if self.strict:
            raise PlainCallError(message)
        warnings.warn(message, StreamingWarning, stacklevel=6)


@contextmanager
def _watching() -> Iterator[_CallInProgress]:
    """Watch a call, which may be part of another one that is watched."""
    call, around = _CallInProgress(), _CALL.get()
    token = _CALL.set(call)
    try:
        yield call
    finally:
        _CALL.reset(token)
        if around is not None:
            around.streamed |= call.streamed


def _captured_call(model: nn.Module) -> Runnable:
    """The call of a model, as a function whose code TorchDynamo captures."""
    if not type(model).forward.__module__.startswith("torch.nn."):
        return model._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        # The forward of a Sequential is torch's own code, which is captured only as a part of other code.
        return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch has no types for it

    return call


def _check_image_name(model: nn.Module, image: str | None) -> None:
    """Raises StreamingError if `image` is not an argument of the model's forward."""
    parameters = inspect.signature(model.forward).parameters
    if image is None or image in parameters:
        return
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise StreamingError(f"image={image!r} is not an argument of the model's forward ({', '.join(parameters)})")


# Analysis through this door.


class _FoundError(Exception):
    """Ends a call as soon as what streams is known."""

    def __init__(self, prefix: Prefix):
        super().__init__(prefix)
        self.prefix = prefix


def captured_prefix(
    model: nn.Module, example_input: torch.Tensor, *, freeze_batchnorm: bool = False, image: str | None = None
) -> Prefix:
    """What of a model streams along all spatial axes, as TorchDynamo captures it for `model(example_input)`.

    Python of the forward in front of the first operation runs; nothing is computed. Raises StreamingError if no graph
    with an image is captured.
    """

    def find(captured: fx.GraphModule, example_inputs: Sequence[Any]) -> Runnable:
        try:
            if (node := image_among(captured, image)) is None:
                return captured.forward
            capture = read(captured, node, freeze_batchnorm)
            names = axis_names(len(capture.trace.known[capture.image]) - 2)
            prefix = find_prefix(capture.trace, capture.image, names, names[2:], freeze_batchnorm)
        except Exception as error:
            return _Raising(error)
        return _Raising(_FoundError(prefix))

    try:
        torch.compile(model._call_impl, backend=find, dynamic=True)(example_input)
    except _FoundError as found:
        return found.prefix
    except UncapturedError as why:
        raise StreamingError(str(why)) from None
    raise StreamingError("torch.compile has captured no graph with an image")
