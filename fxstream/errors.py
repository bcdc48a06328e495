"""Every error and warning that fxstream raises on purpose."""

from __future__ import annotations


class StreamingError(RuntimeError):
    """Base class: a model, an argument or an input that fxstream cannot stream exactly."""


class TraceError(StreamingError):
    """torch.fx cannot trace the model; the message says where and what to do."""


class NothingToStreamError(StreamingError):
    """Not one operation at the front of the model is local."""


class WrappedModelError(StreamingError):
    """What is to be converted is a wrapper around a model: it belongs around the converted one."""


class TileShapeError(StreamingError, ValueError):
    """`tile_shape` has a wrong form, or a size in it is not positive."""


class MemoryBudgetError(StreamingError, ValueError):
    """`memory_budget` is no number of bytes."""


class InputError(StreamingError, ValueError):
    """The image has the wrong rank, number of channels or type."""


class ImageTooSmallError(InputError):
    """The image is too small for the network; the plain model fails on it as well."""


class ModeError(StreamingError):
    """A module's training flag contradicts what the conversion relied on."""


class AttributeChangedError(StreamingError):
    """An attribute has changed since the conversion that is a constant of the converted model."""


class BatchNormModeError(ModeError):
    """A streamed batch norm is in training mode, so it needs statistics of the whole image."""


class HookError(StreamingError):
    """A streamed module has acquired a hook, which would run once a tile or not at all."""


class ShardedError(StreamingError):
    """A streamed module holds only a shard of its parameters."""


class NotLocalError(StreamingError):
    """An operation that was local at conversion is not local any more."""


class TransformError(StreamingError):
    """The converted model is called inside a transform that does not see through it: torch.func, forward-mode AD."""


class DoubleBackwardError(StreamingError):
    """The streamed call was differentiated twice."""


class StreamingWarning(UserWarning):
    """Streaming is exact, but covers less of the network than one would expect."""
