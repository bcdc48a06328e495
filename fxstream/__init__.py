"""Exact streaming of convolutional networks over images too large for memory."""

from .analysis import Analysis, analyze
from .compilation import backend, compile
from .conversion import convert
from .errors import (
    AttributeChangedError,
    BatchNormModeError,
    DoubleBackwardError,
    HookError,
    ImageTooSmallError,
    InputError,
    MemoryBudgetError,
    ModeError,
    NothingToStreamError,
    NotLocalError,
    PlainCallError,
    ProofError,
    RuleError,
    ShardedError,
    StreamingError,
    StreamingWarning,
    TileShapeError,
    TraceError,
    TransformError,
    WrappedModelError,
)
from .estimate import Estimate
from .graph.findings import Finding
from .graph.receptive_field import ReceptiveField
from .ops import register

__all__ = [
    "Analysis",
    "AttributeChangedError",
    "BatchNormModeError",
    "DoubleBackwardError",
    "Estimate",
    "Finding",
    "HookError",
    "ImageTooSmallError",
    "InputError",
    "MemoryBudgetError",
    "ModeError",
    "NotLocalError",
    "NothingToStreamError",
    "PlainCallError",
    "ProofError",
    "ReceptiveField",
    "RuleError",
    "ShardedError",
    "StreamingError",
    "StreamingWarning",
    "TileShapeError",
    "TraceError",
    "TransformError",
    "WrappedModelError",
    "analyze",
    "backend",
    "compile",
    "convert",
    "register",
]
