"""The pass: trace, analyse, partition, rewrite."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Literal

import torch
from torch import fx, nn

from .errors import NothingToStreamError, ShardedError, StreamingError, StreamingWarning, WrappedModelError
from .graph.answers import spatial_axes
from .graph.partition import partition
from .graph.prefix import Analysis, image_names, image_node
from .graph.trace import Trace, trace
from .model.converted import Converted
from .model.streamed import Streamed
from .scan.checks import is_sharded
from .scan.settings import AUTO, Settings, parse, parse_bytes


def convert(
    model: nn.Module,
    tile_shape: int | tuple[int | None, ...] | list[int | None] | Literal["auto"],
    *,
    freeze_batchnorm: bool = False,
    memory_budget: int | str | None = None,
    image: str | None = None,
    example_input: torch.Tensor | None = None,
) -> fx.GraphModule:
    """Convert a CNN so that the front of it runs tile by tile, with the same outputs and gradients.

    The streamed front is the maximal prefix of operations that are local along the streamed axes, with the modes that
    modules have now; the rest, the head, follows as it was. The converted model has modules of its own, with the
    original's Parameters and buffers; nothing that is done to it changes the original's modes or hooks. (Moving or
    casting one of the two afterwards parts their buffers.)

    Args:
        model: any module that torch.fx can trace, with an image (N, C, *spatial) of 1 to 3 spatial axes among its
            arguments.
        tile_shape: how many fresh image positions (pixels) enter per step and axis, not counting what is carried over
            from earlier tiles: one size for all spatial axes, one a spatial axis, `(H, W)`, or one a dimension,
            `(N, C, H, W)`. N is the number of images of a batch that are streamed at a time; C must be the image's
            number of channels, or None. None elsewhere: this axis is not streamed. Any positive size works; axes are
            cut into equal steps of at most that size. "auto": along all spatial axes, every call chooses the largest
            tiles that leave half of the memory budget to keep graphs in.
        freeze_batchnorm: streamed batch norms use their running statistics, and go on doing so whatever mode the model
            is put in. Their affine parameters still train.
        memory_budget: bytes, as a number or as text such as "4GiB" or "500 MB", that may be held between forward and
            backward, beyond carries and outputs, so that as many tiles as fit are not computed again: with enough of it
            for all of them, a training step costs what a conventional one costs. None: every tile is. With
            tile_shape="auto", carries and the tile being computed count, too.
        image: the name of the argument of `model.forward` that is streamed; the first by default.
        example_input: an image, needed only if no operation tells the number of spatial axes.

    Returns:
        A torch.fx.GraphModule. `graph` holds the values that do not depend on the image, one call of the submodule
        `streamed`, and the head; `streamed.graph` holds the streamed operations.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        TraceError: torch.fx cannot trace the model.
        WrappedModelError, ShardedError: `model` is converted already; or it has been given to torch.compile,
            DistributedDataParallel or fully_shard, which are for the converted model.
        TileShapeError: `tile_shape` has a wrong form or a size that is not positive, or is "auto" without a budget.
        MemoryBudgetError: `memory_budget` is no number of bytes; at a call, with "auto": no tiles fit it.
        NothingToStreamError: the first operations are not local.
        StreamingError: the base class of these and of everything that the converted model raises at a call: InputError
            (rank or channels of the image), ImageTooSmallError, BatchNormModeError (a streamed batch norm in training
            mode), ModeError, HookError (a streamed module has acquired a hook), ShardedError, NotLocalError,
            DoubleBackwardError.

    Warns:
        StreamingWarning: convolutions or poolings stay behind the streamed part.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    _check_unwrapped(model)
    _check_names(model)
    analysis, settings = plan(model, tile_shape, freeze_batchnorm, image, example_input)
    settings = replace(settings, memory_budget=parse_bytes(memory_budget))
    settings.check()
    if not analysis.prefix:
        raise NothingToStreamError(_nothing(analysis))
    _warn_if_short(analysis)
    name = _unused_name(model)
    outer, streamed = partition(analysis, name)
    return Converted(model, analysis.trace.constants, outer, name, Streamed(streamed, settings))


def _check_names(model: nn.Module) -> None:
    taken = set(dir(fx.GraphModule)) - set(dir(nn.Module))
    own = {*model._modules, *model._parameters, *model._buffers}
    if clash := sorted(own & taken):
        raise StreamingError(
            f"the model has a module or parameter '{clash[0]}', a name that torch.fx.GraphModule uses itself. "
            "Way out: rename it"
        )


def _check_unwrapped(model: nn.Module) -> None:
    if isinstance(model, Converted):
        raise WrappedModelError(
            "the model is converted already. Way out: set its tile_shape, or convert the original model"
        )
    for kind, name in _WRAPPERS.items():
        if any(f"{base.__module__}.{base.__qualname__}" == kind for base in type(model).__mro__):
            raise WrappedModelError(
                f"the model is wrapped by {name}. Way out: convert the model itself, and wrap the result: "
                f"{name}(fxstream.convert(model, tile_shape))"
            )
    if sharded := [name for name, parameter in model.named_parameters() if is_sharded(parameter)]:
        raise ShardedError(
            f"{sharded[0]} is only a shard (DTensor). Way out: convert the model first, and fully_shard the result"
        )


_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "torch.compile",
    "torch.nn.parallel.distributed.DistributedDataParallel": "DistributedDataParallel",
    "torch.nn.parallel.data_parallel.DataParallel": "DataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "FullyShardedDataParallel",
}
"""By name: importing them all would take seconds."""


def plan(
    model: nn.Module, tile_shape: object, freeze_batchnorm: bool, image: str | None, example_input: torch.Tensor | None
) -> tuple[Analysis, Settings]:
    """What `convert` is going to do."""
    traced = trace(model, {}, freeze_batchnorm)
    names = image_names(traced, example_input)
    settings = Settings(names, parse(tile_shape, names), freeze_batchnorm, auto=tile_shape == AUTO)
    analysis = _analysis(traced, names, settings.axes, freeze_batchnorm, image)
    traced = analysis.trace
    return analysis, replace(
        settings, guards=traced.guards, attributes=traced.attributes, entered=tuple(traced.entered)
    )


def _analysis(
    traced: Trace, names: tuple[str, ...], axes: tuple[str, ...], freeze_batchnorm: bool, image: str | None
) -> Analysis:
    """Analyse; a module that depends on its mode and is not streamed becomes one call, which then follows its mode."""
    while True:
        analysis = Analysis(traced, image_node(traced.graph, image), names, axes, freeze_batchnorm)
        bypassed = analysis.bypassed()
        if not bypassed:
            return analysis
        traced = trace(traced.root, traced.opaque | bypassed, freeze_batchnorm)


def analyze(
    model: nn.Module,
    *,
    freeze_batchnorm: bool = False,
    image: str | None = None,
    example_input: torch.Tensor | None = None,
) -> Analysis:
    """Find out what of a model can be streamed along all spatial axes, where streaming stops and why.

    The arguments are those of `convert`. `print` shows the result as a table. Raises TraceError and TileShapeError
    as `convert` does.
    """
    traced = trace(model, {}, freeze_batchnorm)
    names = image_names(traced, example_input)
    return _analysis(traced, names, names[2:], freeze_batchnorm, image)


def _nothing(analysis: Analysis) -> str:
    reasons = "\n".join(f"  {stop.reason}" for stop in analysis.stops) or "  the head uses the image itself"
    return f"nothing at the front of the model can be streamed along {', '.join(analysis.axes)}:\n{reasons}"


def _warn_if_short(analysis: Analysis) -> None:
    """Windowed operations left in the head are what one would have expected to be streamed."""
    head = (finding.node for finding in analysis.findings if finding.status in ("stop", "head"))
    left = sum(spatial_axes(node, analysis.trace.module_of(node)) is not None for node in head)
    if left:
        reasons = "\n".join(f"  {stop.reason}" for stop in analysis.stops)
        last = analysis.prefix[-1].name
        warnings.warn(
            f"streaming ends at {last}; {left} convolutions, poolings or batch norms stay behind it, since\n{reasons}",
            StreamingWarning,
            stacklevel=3,
        )


def _unused_name(model: nn.Module) -> str:
    name = "streamed"
    while hasattr(model, name):
        name += "_"
    return name
