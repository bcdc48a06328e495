"""The built-in rules, one module a family; importing this package registers them."""

from . import conv, norm, pad, pointwise, pool, shape, whole
from .registry import Local, NotLocal, Rule, Sliced, Unknown, register, rule_for

__all__ = ["Local", "NotLocal", "Rule", "Sliced", "Unknown", "register", "rule_for"]
__all__ += ["conv", "norm", "pad", "pointwise", "pool", "shape", "whole"]
