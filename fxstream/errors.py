"""Every error and warning that fxstream raises on purpose. Messages name the operation, the reason and the way out."""

from __future__ import annotations


class StreamingError(RuntimeError):
    """Base class of all errors of fxstream: it cannot stream this model, or this call, exactly."""


class TraceError(StreamingError):
    """At conversion: torch.fx cannot trace the model. The message names the line of code and the way out."""


class NothingToStreamError(StreamingError):
    """At conversion: no operation at the front of the model is local, so that nothing can be streamed."""


class ProofError(StreamingError):
    """At conversion: on a small random image, the converted model does not do what the plain model does.

    The message says what differs, and names the module and the line where they part.
    """


class RuleError(StreamingError):
    """A streaming rule computes with a tensor in its body, or in a `run` that closes over it.

    It is raised at the conversion, or when `run` first computes with the tensor. The way out is to list the tensor
    among the operands of the rule's `Local`.
    """


class WrappedModelError(StreamingError):
    """At conversion: the model is already converted, or wrapped, as by DistributedDataParallel or torch.compile.

    The way out is to convert the model itself and to wrap the converted model.

    At a call: torch.nn.DataParallel copies the converted model. The way out is DistributedDataParallel.
    """


class TileShapeError(StreamingError, ValueError):
    """`tile_shape` has a wrong form or a size that is not positive, or is "auto" without a `memory_budget`."""


class MemoryBudgetError(StreamingError, ValueError):
    """`memory_budget` is not a number of bytes; or, with `tile_shape="auto"`, no tiles fit it."""


class InputError(StreamingError, ValueError):
    """At a call: the image has the wrong number of dimensions or channels, or the wrong type."""


class ImageTooSmallError(InputError):
    """At a call: the image is too small for an operation of the model. The plain model fails on it as well."""


class ModeError(StreamingError):
    """At a call: a module is not in the mode, training or evaluation, that the conversion relied on."""


class AttributeChangedError(StreamingError):
    """At a call: an attribute that the forward reads has changed since the conversion, where it became a constant."""


class BatchNormModeError(ModeError):
    """At a call: a streamed batch norm is in training mode, and so it needs the statistics of the whole image."""


class HookError(StreamingError):
    """At a call: a streamed module has acquired a hook, which would run once per tile or not at all."""


class ShardedError(StreamingError):
    """A streamed module holds only a shard of its parameters, as after `fully_shard`."""


class NotLocalError(StreamingError):
    """At a call: an operation that was local at conversion is not local any more."""


class PlainCallError(StreamingError):
    """At a call of a model that was given to `fxstream.compile` with `strict=True`: torch ran the plain model."""


class TransformError(StreamingError):
    """The converted model is called inside a transform that does not see through it: torch.func, forward-mode AD."""


class DoubleBackwardError(StreamingError):
    """In a backward pass: the streamed part was differentiated twice, which it does not support."""


class StreamingWarning(UserWarning):
    """At conversion: streaming is exact but covers less of the model than one would expect."""
