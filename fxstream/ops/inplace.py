"""Augmented assignment as functions: `iadd(x, y)` does what `x += y` does and returns the new `x`.

They overwrite a tensor in place, and leave a number as it is. torch.fx writes a call of `operator.iadd` as the
statement `x += y`, which would be wrong for a number that is read again later.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

NAMES = "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split()
"""The functions of `operator` that overwrite their first argument, if it is a tensor."""


def _augmented(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def assign(target: Any, other: Any) -> Any:
        return function(target, other)

    assign.__name__ = assign.__qualname__ = name
    return assign


FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {name: _augmented(name) for name in NAMES}
"""By name."""
# As attributes of this module, by which pickle finds them.
globals().update(FUNCTIONS)
