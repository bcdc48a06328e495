"""Operations over the whole image: they end the streamed part, unless the axes that they span are not streamed."""

from __future__ import annotations

from functools import partial
from types import NoneType
from typing import Any

import torch.nn.functional as F
from torch import nn

from ..geometry.axes import Symbol, Value
from .registry import Answer, Local, NotLocal, Total, register
from .totals import First, Sum


def _register_adaptive(axes: int, kind: str) -> None:
    function = getattr(F, f"adaptive_{kind}_pool{axes}d")

    @register(function)
    def function_rule(input: Value, output_size: Any, return_indices: bool = False) -> Answer:
        sizes = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size,) * axes
        if len(sizes) != axes or input.rank <= axes or any(not isinstance(s, (int, Symbol, NoneType)) for s in sizes):
            return NotLocal("pools to a size that its rule does not cover")
        # None keeps the size along an axis.
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
