"""Streaming rules: what a rule is written with, and the built-in rules, one module per family of operations.

Importing this package registers the built-in rules. docs/your_own_op.md shows how to write a rule.
"""

from ..geometry.axes import Dim, Value
from ..geometry.window import Sliding, Span, Transposed, Window
from . import (
    attention,
    channels,
    conv,
    create,
    dropout,
    index,
    inplace,
    norm,
    pad,
    pointwise,
    pool,
    products,
    rearrange,
    reduce,
    resample,
    shape,
    shuffle,
    unfold,
    whole,
    write,
)
from .border import fit
from .given import Given, Typed, named
from .registry import (
    Answer,
    Fact,
    Local,
    Noise,
    NotLocal,
    Pending,
    Rule,
    Sliced,
    Total,
    Unknown,
    functions,
    has_own_methods,
    register,
    registrations,
    rule_for,
    rule_for_module,
)
from .totals import Extreme, First, Place, Reduction, Sum, Totals

__all__ = [
    "Answer",
    "Dim",
    "Extreme",
    "Fact",
    "First",
    "Given",
    "Local",
    "Noise",
    "NotLocal",
    "Pending",
    "Place",
    "Reduction",
    "Rule",
    "Sliced",
    "Sliding",
    "Span",
    "Sum",
    "Total",
    "Totals",
    "Transposed",
    "Typed",
    "Unknown",
]
__all__ += ["Value", "Window", "fit", "functions", "has_own_methods", "named", "register"]
__all__ += ["registrations", "rule_for", "rule_for_module"]
__all__ += [
    "attention",
    "channels",
    "conv",
    "create",
    "dropout",
    "index",
    "inplace",
    "norm",
    "pad",
    "pointwise",
    "pool",
    "products",
]
__all__ += ["rearrange", "reduce", "resample", "shape", "shuffle", "unfold", "whole", "write"]
