"""The pass: trace, analyse, partition, rewrite."""

from __future__ import annotations

import warnings

import torch
from torch import fx, nn

from .analysis import Analysis, image_names, image_node
from .call import Settings
from .errors import NothingToStreamError, StreamingError, StreamingWarning, TileShapeError
from .lower import spatial_axes
from .partition import partition
from .stream import Streamed
from .trace import trace
from .tree import Converted


def convert(
    model: nn.Module,
    tile_shape: int | tuple[int | None, ...] | list[int | None],
    *,
    freeze_batchnorm: bool = False,
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
            cut into equal steps of at most that size.
        freeze_batchnorm: streamed batch norms use their running statistics, and go on doing so whatever mode the model
            is put in. Their affine parameters still train.
        image: the name of the argument of `model.forward` that is streamed; the first by default.
        example_input: an image, needed only if no operation tells the number of spatial axes.

    Returns:
        A torch.fx.GraphModule. `graph` holds the values that do not depend on the image, one call of the submodule
        `streamed`, and the head; `streamed.graph` holds the streamed operations.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        TraceError: torch.fx cannot trace the model.
        TileShapeError: `tile_shape` has a wrong form or a size that is not positive.
        NothingToStreamError: the first operations are not local.
        StreamingError: the base class of these and of everything that the converted model raises at a call: InputError
            (rank or channels of the image), ImageTooSmallError, BatchNormModeError (a streamed batch norm in training
            mode), ModeError, HookError (a streamed module has acquired a hook), NotLocalError, DoubleBackwardError.

    Warns:
        StreamingWarning: convolutions or poolings stay behind the streamed part.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, Converted):
        raise StreamingError("the model is converted already. Way out: convert the original with the new tile_shape")
    analysis, settings = plan(model, tile_shape, freeze_batchnorm, image, example_input)
    if not analysis.prefix:
        raise NothingToStreamError(_nothing(analysis))
    _warn_if_short(analysis)
    name = _unused_name(model)
    outer, streamed = partition(analysis, name)
    return Converted(model, analysis.trace.constants, outer, name, Streamed(streamed, settings))


def plan(
    model: nn.Module, tile_shape: object, freeze_batchnorm: bool, image: str | None, example_input: torch.Tensor | None
) -> tuple[Analysis, Settings]:
    """What `convert` is going to do."""
    traced = trace(model)
    names = image_names(traced, example_input)
    sizes = _tile_shape(tile_shape, names)
    settings = Settings(names, sizes, freeze_batchnorm, traced.guards, tuple(traced.entered))
    analysis = Analysis(traced, image_node(traced.graph, image), names, settings.axes, freeze_batchnorm)
    return analysis, settings


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
    traced = trace(model)
    names = image_names(traced, example_input)
    return Analysis(traced, image_node(traced.graph, image), names, names[2:], freeze_batchnorm)


def _tile_shape(tile_shape: object, names: tuple[str, ...]) -> tuple[int | None, ...]:
    """One size a dimension, (N, C, *spatial)."""
    spatial = len(names) - 2
    forms = f"a size, ({', '.join(names[2:])}) or ({', '.join(names)})"
    if isinstance(tile_shape, int) and not isinstance(tile_shape, bool):
        sizes: tuple[int | None, ...] = (None, None, *(tile_shape,) * spatial)
    elif not isinstance(tile_shape, (tuple, list)):
        raise TileShapeError(f"tile_shape must be {forms}, not {tile_shape!r}")
    elif len(tile_shape) == spatial:
        sizes = (None, None, *tile_shape)
    elif len(tile_shape) == spatial + 2:
        sizes = tuple(tile_shape)
    else:
        raise TileShapeError(f"tile_shape must be {forms}; {tuple(tile_shape)!r} has {len(tile_shape)} entries")
    for name, size in zip(names, sizes, strict=True):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise TileShapeError(f"tile_shape must hold positive integers or None, and has {size!r} for {name}")
    if all(size is None for name, size in zip(names, sizes, strict=True) if name != "C"):
        raise TileShapeError("tile_shape streams no axis: give at least one of its entries a size")
    return sizes


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
