"""Examples: what a forward is traced with before any call."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..errors import StreamingError, TraceError
from ..ops import rule_for_module
from .arguments import Form, Parameters, Question, Slot, Unspecified, form_of
from .facts import tensors_of
from .snapshot import RandomState, Snapshot
from .trace import Trace, trace

_SIZES = (64, 224, 96, 512)
"""Heights of images, in pixels, that models may take: some want a multiple, a least or a certain size."""


def traced_with_example(
    model: nn.Module, image: str | None, example_input: torch.Tensor | tuple[Any, ...] | None, freeze_batchnorm: bool
) -> Trace:
    """Trace a model with the example, or with one that suits its first layers.

    Where the forward asks about sizes, several are tried, and that one is taken with which most can be traced. Raises
    what the forward itself raises on purpose for the example, and TraceError.
    """
    best: Trace | None = None
    failure: TraceError | None = None
    for arguments in _examples(model, image, example_input):
        try:
            found = trace(model, arguments, {}, freeze_batchnorm)
        except TraceError as error:
            own = rejection(model, arguments, error)
            if own is not None and example_input is not None:
                raise own from None
            failure = failure or (error if own is None else _rejected(model, own))
            continue
        if best is None or len(found.opaque) < len(best.opaque):
            best = found
        if found.assumptions.given.question is not Question.SHAPE or not found.opaque:
            break
    if best is None:
        assert failure is not None
        raise failure
    return best


def _rejected(model: nn.Module, own: Exception) -> TraceError:
    sizes = ", ".join(map(str, _SIZES))
    return TraceError(
        f"{type(model).__name__}.forward accepts no image of the sizes with which it could be traced ({sizes}): "
        f"{type(own).__name__}: {own}. Way out: give an example_input that it accepts"
    )


def image_slot(slots: Mapping[Slot, Any], image: str | None) -> Slot:
    """The argument that is streamed: the one called `image`, by default the first. Raises StreamingError."""
    if not slots:
        raise StreamingError("the model's forward takes no argument that could be the image")
    found = next((slot for slot in slots if image in (None, slot.name)), None)
    if found is None:
        known = ", ".join(slot.name for slot in slots)
        raise StreamingError(f"image={image!r} is not an argument of the model's forward ({known})")
    return found


def rejection(model: nn.Module, arguments: Mapping[Slot, Any], error: TraceError) -> Exception | None:
    """The error that the model itself raises for such arguments, if that is what has ended its tracing."""
    cause = error.__cause__
    snapshot, drawn = Snapshot(model), RandomState()
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors_of(model).items()}
    values = {slot: _on_meta(form) for slot, form in arguments.items()}
    args, kwargs = Parameters.of(type(model)).passed(values)
    try:
        with torch.no_grad():
            torch.func.functional_call(model, state, tuple(args), kwargs)
    except Exception as own:  # whatever a user's forward may raise
        return own if cause is not None and _raised_at(own) == _raised_at(cause) else None
    finally:
        snapshot.restore()
        drawn.restore()
    return None


def _raised_at(error: BaseException) -> Any:
    """The line of code that has raised an error."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return type(error), frame.f_code, line


def _on_meta(form: Any) -> Any:
    return torch.empty(form.shape, dtype=form.dtype, device="meta") if isinstance(form, Form) else form


def _examples(
    model: nn.Module, image: str | None, example_input: torch.Tensor | tuple[Any, ...] | None
) -> Iterator[dict[Slot, Any]]:
    """What is known of the arguments, by the order in which it should be tried."""
    arguments = Parameters.of(type(model)).unbound()
    # A default that is no constant is an object, of which nothing is known.
    arguments = {slot: form_of(value) for slot, value in arguments.items()}
    slot = image_slot(arguments, image)
    if isinstance(example_input, tuple):
        yield {slot: form_of(value) for slot, value in Parameters.of(type(model)).bound(example_input, {}).items()}
        return
    if example_input is not None:
        yield {**arguments, slot: form_of(example_input)}
        return
    rules = {module: rule_for_module(module) for module in model.modules()}
    layers = {module: rule.spatial for module, rule in rules.items() if rule is not None and rule.spatial is not None}
    if not layers:
        yield {**arguments, slot: Unspecified()}
        return
    spatial = next(iter(layers.values()))
    channels = next((getattr(module, name) for module in layers for name in _CHANNELS if hasattr(module, name)), 3)
    tensors = [tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.is_floating_point()]
    kind = tensors[0] if tensors else torch.empty(0)
    for size in _SIZES:
        yield {**arguments, slot: Form((1, channels, *[size] * spatial), kind.dtype, kind.device)}


_CHANNELS = ("in_channels", "num_features", "num_channels")
"""Attributes of layers that say how many channels their input has."""
