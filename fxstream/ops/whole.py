"""Operations over the whole image: they end the streamed part, unless the axes that they span are not streamed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..axes import Value
from .registry import Local, NotLocal, register


def _register_adaptive(axes: int, kind: str) -> None:
    function = getattr(F, f"adaptive_{kind}_pool{axes}d")

    @register(function)
    def function_rule(input: Value, output_size: Any, return_indices: bool = False) -> Local | NotLocal:
        if tags := input.tags(range(-axes, 0)):
            return NotLocal(f"pools over the whole image along {' and '.join(tags)}")
        if return_indices:
            return NotLocal("returns indices")
        sizes = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size,) * axes
        dims = input.resized({input.rank - axes + i: size for i, size in enumerate(sizes) if size is not None})
        return Local((input,), dims, lambda block: function(block, sizes))

    @register(getattr(nn, f"Adaptive{kind.capitalize()}Pool{axes}d"))
    def module_rule(m: Any, input: Value) -> Local | NotLocal:
        return function_rule(input, m.output_size, getattr(m, "return_indices", False))


for _axes in (1, 2, 3):
    for _kind in ("avg", "max"):
        _register_adaptive(_axes, _kind)


def _reduction(name: str, function: Any) -> None:
    @register(function, name)
    def rule(input: Value, dim: Any = None, keepdim: bool = False, **options: Any) -> Local | NotLocal:
        dims = range(input.rank) if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,)
        reduced = {input.dim(index) for index in dims}
        if tags := input.tags(reduced):
            return NotLocal(f"takes the {name} along the streamed axis {' and '.join(tags)}")
        kept = [(i, d) for i, d in enumerate(input.resized(dict.fromkeys(reduced, 1))) if keepdim or i not in reduced]
        return Local(
            (input,),
            tuple(d for _, d in kept),
            lambda block: function(block, tuple(reduced), keepdim=keepdim, **options),
        )


for _name, _function in (("mean", torch.mean), ("sum", torch.sum), ("amax", torch.amax), ("amin", torch.amin)):
    _reduction(_name, _function)
