"""Reductions, which are local along every dimension that they keep.

A reduction over the channels streams along height and width, one within each image streams along the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ..geometry.axes import Dim, Value
from .arguments import as_tuple
from .channels import spanning_problem
from .pointwise import pointwise
from .registry import Answer, Local, NotLocal, Total, is_tensor, register
from .totals import Extreme, Reduction, Sum


def _reduced(
    input: Value,
    dim: Any,
    keepdim: Any,
    name: str,
    run: Callable[..., Any],
    single: bool = False,
    total: Callable[[tuple[int, ...]], Reduction] | None = None,
) -> Answer:
    """The answer for a reduction over some dimensions.

    Args:
        input: the value that is reduced.
        dim: a dimension or several; None and () mean all.
        keepdim: whether the reduced dimensions stay, with size 1.
        name: the reduction in the words of the user.
        run: called as `run(block, dim, keepdim=...)`, with a tuple of dimensions.
        single: `run` takes one dimension instead.
        total: makes the `Reduction` that accumulates the result if the dimensions are streamed; None if there is none.
    """
    given = () if dim is None else as_tuple(dim)
    if not isinstance(keepdim, bool) or any(type(index) is not int for index in given):
        return NotLocal(f"takes the {name} with arguments that its streaming rule does not cover")
    reduced = sorted({input.dim(index) for index in given or range(input.rank)})
    if problem := spanning_problem(input, reduced, f"takes the {name}"):
        return Total(input, total(tuple(reduced)), keepdim, problem) if total is not None else problem
    dims = [
        Dim(None, 1) if index in reduced else old
        for index, old in enumerate(input.dims)
        if keepdim or index not in reduced
    ]
    over = reduced[0] if single else tuple(reduced)
    return Local((input,), tuple(dims), lambda block: run(block, over, keepdim=keepdim))


def _register_reduction(
    name: str, single: bool = False, takes_dtype: bool = False, total: Callable[..., Reduction] | None = None
) -> None:
    """Register a reduction by its name in torch. `total(dimensions, function)` makes its `Reduction`, if it has one."""
    function = getattr(torch, name)

    @register(function, name)
    def rule(input: Value, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Answer:
        if dtype is not None and not takes_dtype:
            return NotLocal(f"takes the {name} with arguments that its streaming rule does not cover")
        options = {"dtype": dtype} if takes_dtype else {}
        run = partial(function, **options)
        accumulate = None if total is None else partial(total, function=run)
        return _reduced(input, dim, keepdim, name, run, single, accumulate)


for _name in ("amax", "amin"):
    _register_reduction(_name, total=lambda over, function, largest=_name == "amax": Extreme(over, largest))
for _name in ("mean", "sum"):
    _register_reduction(_name, takes_dtype=True, total=partial(Sum, mean=_name == "mean"))
_register_reduction("logsumexp")
_register_reduction("prod", single=True, takes_dtype=True)


def _register_spread(name: str) -> None:
    function = getattr(torch, name)

    @register(function, name)
    def rule(
        input: Value, dim: Any = None, unbiased: Any = True, keepdim: bool = False, *, correction: Any = None
    ) -> Answer:
        if isinstance(dim, bool):  # called as std(input, unbiased)
            dim, unbiased = None, dim
        correction = int(unbiased) if correction is None else correction
        return _reduced(input, dim, keepdim, name, partial(function, correction=correction))


_register_spread("std")
_register_spread("var")


def _by_keyword(function: Callable[..., torch.Tensor], **options: Any) -> Callable[..., torch.Tensor]:
    """The function as `_reduced` calls it: in torch's own signature, `dim` is not the second argument."""
    return lambda block, dim, keepdim: function(block, dim=dim, keepdim=keepdim, **options)


@register(torch.norm, torch.functional.norm, "norm")
def norm(
    input: Value, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None
) -> Answer:
    if out is not None:
        return NotLocal("writes into a tensor given as `out`", "use its result instead")
    return _reduced(input, dim, keepdim, "norm", _by_keyword(torch.norm, p=p, dtype=dtype))


@register(torch.linalg.vector_norm)
def vector_norm(x: Value, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Answer:
    return _reduced(x, dim, keepdim, "norm", _by_keyword(torch.linalg.vector_norm, ord=ord, dtype=dtype))


class Extremes(NamedTuple):
    """The results of `max` and `min` along a dimension, with the names that torch gives them."""

    values: Any
    indices: Any


def _register_extreme(name: str) -> None:
    """Register `max` or `min`, along one dimension (with indices) or of two operands, and `argmax` or `argmin`."""
    function, pairwise, arg_function = (getattr(torch, form.format(name)) for form in ("{}", "{}imum", "arg{}"))

    @register(arg_function, f"arg{name}")
    def index_rule(input: Value, dim: Any = None, keepdim: bool = False) -> Answer:
        local = _reduced(input, dim, keepdim, name, arg_function, single=True)
        return replace(local, differentiable=False) if isinstance(local, Local) else local

    @register(function, name)
    def rule(input: Any, dim: Any = None, keepdim: bool = False, other: Any = None) -> Answer:
        other = dim if isinstance(dim, Value) or is_tensor(dim) else other
        if other is not None:
            return pointwise(pairwise, input, other)
        # Not torch.amax: its gradient is shared by all positions that hold the extreme value, while the gradient of
        # `max` goes to the position that it returns.
        values = _reduced(
            input, dim, keepdim, name, lambda *args, **options: function(*args, **options)[0], single=True
        )
        indices = index_rule(input, dim, keepdim)
        if isinstance(values, Local) and isinstance(indices, Local):
            return Extremes(values, indices)
        return values


_register_extreme("max")
_register_extreme("min")


def _register_test(name: str) -> None:
    function = getattr(torch, name)

    @register(function, name)
    def rule(input: Value, dim: Any = None, keepdim: bool = False) -> Answer:
        local = _reduced(input, dim, keepdim, name, function, single=not isinstance(dim, (tuple, list)))
        return replace(local, differentiable=False) if isinstance(local, Local) else local


_register_test("all")
_register_test("any")
