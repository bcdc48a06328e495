"""The built-in rules, one module a family; importing this package registers them."""

from . import (
    attention,
    channels,
    conv,
    dropout,
    index,
    norm,
    pad,
    pointwise,
    pool,
    products,
    reduce,
    resample,
    shape,
    shuffle,
    unfold,
    whole,
)
from .registry import Answer, Fact, Local, NotLocal, Rule, Sliced, Unknown, functions, register, rule_for

__all__ = ["Answer", "Fact", "Local", "NotLocal", "Rule", "Sliced", "Unknown", "functions", "register", "rule_for"]
__all__ += ["attention", "channels", "conv", "dropout", "index", "norm", "pad", "pointwise", "pool", "products"]
__all__ += ["reduce", "resample", "shape", "shuffle", "unfold", "whole"]
