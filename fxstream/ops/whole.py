"""Adaptive pooling, whose windows follow from the size of the image.

Along streamed axes it ends the streamed part. If the result has size 1, it is accumulated tile by tile.
"""

from __future__ import annotations

from functools import partial
from types import NoneType
from typing import Any

import torch.nn.functional as F
from torch import nn

from ..geometry.axes import Symbol, Value
from .arguments import as_tuple
from .registry import Answer, Local, NotLocal, Total, register
from .totals import First, Sum


def _register_adaptive(axes: int, kind: str) -> None:
    function = getattr(F, f"adaptive_{kind}_pool{axes}d")

    @register(function)
    def function_rule(input: Value, output_size: Any, return_indices: bool = False) -> Answer:
        sizes = as_tuple(output_size, axes)
        if len(sizes) != axes or input.rank <= axes or any(not isinstance(s, (int, Symbol, NoneType)) for s in sizes):
            return NotLocal("pools to a size that its streaming rule does not cover")
        # An output size of None keeps the size along that axis.
        pooled = {input.rank - axes + axis: size for axis, size in enumerate(sizes) if size is not None}
        if tags := input.tags(pooled):
            problem = NotLocal(f"pools over the whole image along {' and '.join(tags)}")
            if return_indices or any(size != 1 for size in sizes):
                return problem
            over = tuple(sorted(pooled))
            reduction = Sum(over, partial(function, output_size=1), mean=True) if kind == "avg" else First(over)
            return Total(input, reduction, True, problem)
        if return_indices:
            return NotLocal("returns indices")
        return Local((input,), input.resized(pooled), lambda block: function(block, sizes))

    @register(getattr(nn, f"Adaptive{kind.capitalize()}Pool{axes}d"))
    def module_rule(m: Any, input: Value) -> Answer:
        return function_rule(input, m.output_size, getattr(m, "return_indices", False))


for _axes in (1, 2, 3):
    for _kind in ("avg", "max"):
        _register_adaptive(_axes, _kind)
