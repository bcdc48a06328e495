"""The built-in rules, one module a family; importing this package registers them."""

from . import channels, conv, dropout, index, norm, pad, pointwise, pool, resample, shape, shuffle, whole
from .registry import Answer, Fact, Local, NotLocal, Rule, Sliced, Unknown, register, rule_for

__all__ = ["Answer", "Fact", "Local", "NotLocal", "Rule", "Sliced", "Unknown", "register", "rule_for"]
__all__ += [
    "channels",
    "conv",
    "dropout",
    "index",
    "norm",
    "pad",
    "pointwise",
    "pool",
    "resample",
    "shape",
    "shuffle",
    "whole",
]
