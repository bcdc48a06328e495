"""The pass: trace, find the prefix, partition, rewrite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn

from .errors import ShardedError, StreamingError, StreamingWarning, WrappedModelError
from .graph.arguments import Question
from .graph.example import traced_with_example
from .graph.findings import Finding
from .graph.nodes import spatial_axes
from .graph.partition import Partition, partition
from .graph.prefix import Prefix, image_names
from .graph.reasons import reasons
from .graph.trace import Trace, trace
from .memory.work import MOST_BEHIND, work_of
from .model.converted import Converted
from .model.extended import own_names
from .model.streamed import Streamed
from .model.variants import rewrite
from .proof.images import MOST, SIZES, resized
from .proof.prove import find_proof
from .scan.checks import is_sharded
from .scan.settings import Settings, parse_bytes, parse_tile_shape


def convert(
    model: nn.Module,
    tile_shape: int | tuple[int | None, ...] | list[int | None] | Literal["auto"],
    *,
    freeze_batchnorm: bool = False,
    memory_budget: int | str | None = None,
    image: str | None = None,
    example_input: torch.Tensor | tuple[Any, ...] | None = None,
    prove: bool = True,
) -> fx.GraphModule:
    """Convert a CNN so that the front of it runs tile by tile, with the same outputs and the same gradients.

    The streamed front is the maximal prefix of operations that are local along the streamed axes, in the modes that the
    modules have now. The rest of the model, the head, follows unchanged. The pass has these steps:

    1. Check that the model is a plain one.
    2. Trace it, and read `tile_shape` for an image of its dimensions.
    3. Find the prefix.
    4. Partition the traced graph into an outer graph and the streamed graph.
    5. Assemble the converted model from the two.
    6. Prove it on a small random image.

    The converted model has modules of its own, with the original's Parameters and buffers. Changing its modes or hooks
    never changes the original's. Moving or casting one of the two afterwards separates their tensors.

    Args:
        model: any module that torch.fx can trace. One of the arguments of its forward is an image (N, C, *spatial) with
            1 to 3 spatial axes, of any floating-point dtype that the model takes.
        tile_shape: how many fresh image positions (pixels) enter per step along each axis. Rows that are carried over
            from earlier tiles do not count. One size for all spatial axes; or one per spatial axis, `(H, W)`; or one
            per dimension, `(N, C, H, W)`. N is the number of images of a batch that are streamed at a time. C must be
            the image's number of channels, or None. None elsewhere: this axis is not streamed. Any positive size works;
            an axis is cut into equal steps of at most that size. "auto": all spatial axes are streamed, and every call
            chooses the largest tiles that leave half of the memory budget for what need not be computed again.
        freeze_batchnorm: all batch norms of the converted model, streamed or in the head, are in eval mode and stay so,
            whatever mode the model is put in: they use their running statistics, and do not update them. Their affine
            parameters still train. A batch norm without running statistics (`track_running_stats=False`) normalises
            by those of the batch as ever, and is not streamed.
        memory_budget: how many bytes may be held between forward and backward beyond carries and outputs, as a number
            or as text such as "4GiB" or "500 MB". The results of as many convolutions and matrix products as fit are
            then not computed again, those first that save most FLOPs per byte. If all of them fit, as many of the first
            tiles as fit are not computed again at all; if all tiles fit, a training step costs what a conventional one
            costs. None: everything is computed again. With tile_shape="auto" the budget also covers carries and the
            tile that is being computed.
        image: the name of the argument of `model.forward` that is streamed; by default the first.
        example_input: an image, or a tuple of all arguments of forward, of which only shapes and dtypes are used. They
            answer what the forward asks about its tensors. It is needed if no operation of the model tells how many
            spatial axes there are, or if the forward refuses the small images that are tried.
        prove: run the graphs and the plain model side by side on a small random image, and compare outputs, gradients,
            everything that a forward changes in the model, and the random numbers that it draws. The model is left as
            it was. False saves the time; docs/training.md says what torch.fx may then miss. A model on the meta device
            is not proved.

    Returns:
        A torch.fx.GraphModule. Its `graph` holds the values that do not depend on the image, one call of the submodule
        `streamed`, and the head. `streamed.graph` holds the streamed operations. `tile_shape` and `memory_budget` can
        be changed by assignment.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        TraceError: torch.fx cannot trace the model.
        WrappedModelError, ShardedError: the model is converted already; or it has been given to torch.compile,
            DistributedDataParallel or fully_shard, which belong around the converted model.
        TileShapeError: `tile_shape` has a wrong form or a size that is not positive, or is "auto" without a budget.
        MemoryBudgetError: `memory_budget` is no number of bytes; at a call, with "auto": no tiles fit it.
        NothingToStreamError: the first operations are not local.
        ProofError: the proof finds a difference between the graphs and the model.
        StreamingError: the base class of these errors, and of those that the converted model raises when it is called:
            InputError (rank or channels of the image), ImageTooSmallError, BatchNormModeError (a streamed batch norm is
            in training mode), ModeError, AttributeChangedError, HookError (a streamed module has acquired a hook),
            ShardedError, NotLocalError, TransformError (torch.func, forward-mode AD), DoubleBackwardError.

    Warns:
        StreamingWarning: more than a twentieth of the FLOPs stays behind the streamed part; or the converted model
            lacks methods of the model's class; or the conversion could not be proved.

    Example:
        >>> import torch, fxstream
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> converted = fxstream.convert(model, tile_shape=(64, 64))
        >>> converted(torch.randn(1, 3, 200, 150)).sum().backward()
        >>> model[0].weight.grad.shape
        torch.Size([8, 3, 3, 3])
    """
    # 1. Check that the model is a plain one.
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    check_unwrapped(model)
    _check_whole(model)
    # 2. Trace it, and read tile_shape for an image of its dimensions.
    traced = traced_with_example(model, image, example_input, freeze_batchnorm)
    _check_names(traced)
    names = image_names(traced, image)
    settings = Settings(names, parse_tile_shape(tile_shape, names), freeze_batchnorm, parse_bytes(memory_budget))
    settings.check()
    # 3. Find the prefix; 4. partition the traced graph.
    name = _unused_name(model)
    prefix, parts = rewrite(traced, image, settings, name)
    warn_if_short(prefix)
    # 5. Assemble the converted model from the two.
    converted = _assemble(model, prefix, parts, name, settings)
    _warn_of_lost_names(model, converted)
    # 6. Prove it on a small random image.
    if prove:
        prove_on_small_image(prefix, parts, name, settings, example_input)
        converted._prove = prove_on_small_image
    return converted


def _assemble(model: nn.Module, prefix: Prefix, parts: Partition, name: str, settings: Settings) -> Converted:
    part = Streamed(parts.streamed, settings, prefix.trace.assumptions)
    return Converted(model, prefix.trace.constants, parts.outer, name, part)


def prove_on_small_image(
    prefix: Prefix,
    parts: Partition,
    name: str,
    settings: Settings,
    example_input: torch.Tensor | tuple[Any, ...] | None = None,
) -> None:
    """Raises ProofError if the graphs do not do what the model does. Warns if that cannot be found out."""
    unproved = "there is no small image to try"
    for holding in _of_small_images(prefix, parts, name, settings):
        unproved = _unproved(*holding, name, settings, example_input)
        if not unproved:
            return
    warnings.warn(
        f"the conversion of {type(prefix.trace.root).__name__} is not proved on a small image: {unproved}. Or, if "
        "you have compared it yourself, prove=False",
        StreamingWarning,
        stacklevel=3,
    )


def _unproved(
    prefix: Prefix,
    parts: Partition,
    name: str,
    settings: Settings,
    example_input: torch.Tensor | tuple[Any, ...] | None,
) -> str:
    """Why the graphs are not proved; empty if they are."""

    def tiled(model: nn.Module, sizes: tuple[int, ...]) -> Converted:
        retiled = replace(settings, tiling=replace(settings.tiling, sizes=sizes))
        return _assemble(model, prefix, partition(prefix, name), name, retiled)

    return find_proof(prefix, parts, name, settings.tiling.channels, example_input, tiled)


def _of_small_images(
    prefix: Prefix, parts: Partition, name: str, settings: Settings
) -> Iterator[tuple[Prefix, Partition]]:
    """The graphs to prove: where they hold for one size alone, those for further sizes, too, until one is accepted."""
    given, image = prefix.trace.assumptions.given, str(prefix.image.target)
    form = given.form_of(image)
    if given.question is not Question.SHAPE:
        yield prefix, parts
        return
    if math.prod(form.shape) <= MOST:
        yield prefix, parts
    for size in SIZES[len(settings.names) - 2]:
        forms = resized(given.forms, image, (*form.shape[:2], *[size] * (len(settings.names) - 2)))
        try:
            yield rewrite(trace(prefix.trace.root, forms, {}, settings.freeze_batchnorm), image, settings, name)
        except StreamingError:  # the model does not accept this size
            continue


def _check_names(traced: Trace) -> None:
    """Raises StreamingError if the converted model needs a name for itself by which the model knows something else."""
    taken = (set(dir(Converted)) | set(Converted.__annotations__)) - set(dir(nn.Module))
    model, read = traced.root, traced.assumptions.attributes.get("", {})
    own = {*model._modules, *model._parameters, *model._buffers, *read}
    if clash := sorted(own & taken):
        raise StreamingError(
            f"the model has an attribute '{clash[0]}', a name that the converted model, a torch.fx.GraphModule, uses "
            "itself. Way out: rename it"
        )


def check_unwrapped(model: nn.Module) -> None:
    """Raises WrappedModelError if a model is converted or wrapped."""
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


def _check_whole(model: nn.Module) -> None:
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
"""Classes that wrap a model, by name, since importing them all would take seconds."""


def warn_if_short(prefix: Prefix) -> None:
    """Warn if much of the work stays behind the streamed part."""
    work = work_of(prefix)
    if work is not None and (not work.unknown or work.share > MOST_BEHIND):
        much = f"the streamed part has {work}" if work.share > MOST_BEHIND else ""
    else:
        left = sum(_is_work(finding, prefix) for finding in prefix.head)
        what = "convolutions, poolings, batch norms and modules that cannot be traced"
        much = f"{left} {what} stay behind it, whose FLOPs cannot be counted" if left else ""
    if much:
        text = f"streaming ends at {prefix.nodes[-1].name}; {much}. The reasons:\n{reasons(prefix, short=True)}"
        warnings.warn(text, StreamingWarning, stacklevel=3)


def _is_work(finding: Finding, prefix: Prefix) -> bool:
    """Whether an operation is one that users expect to be streamed, or may be anything."""
    windowed = spatial_axes(finding.node, prefix.trace.module_of(finding.node)) is not None
    return windowed or str(finding.node.target) in prefix.trace.opaque


def _warn_of_lost_names(model: nn.Module, converted: Converted) -> None:
    """Warn if the converted model lacks methods or attributes of the model."""
    taken = set(dir(Converted)) - set(dir(nn.Module))
    own = own_names(type(model))
    lost = (taken & {*own, *vars(model)}) | (set() if converted._extends is not None else own)
    if lost:
        warnings.warn(
            f"the converted model lacks what {type(model).__name__} has as {', '.join(sorted(lost))}. Way out: rename "
            "it, or move the part that is to be streamed into a submodule, and convert that",
            StreamingWarning,
            stacklevel=3,
        )


def _unused_name(model: nn.Module) -> str:
    name = "streamed"
    while hasattr(model, name):
        name += "_"
    return name
