"""Products that sum over dimensions: linear layers, matrix products, einsum.

They are local wherever the dimensions that they sum over are not streamed.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..geometry.axes import Dim, Size, Symbol, Value
from .channels import of_image, spanning
from .registry import Answer, Local, NotLocal, Sliced, Unknown, register

Labels = Sequence[str]


@register(F.linear)
def linear(input: Value, weight: Any, bias: Any = None) -> Answer:
    if problem := of_image(weight, bias) or spanning(input, [-1], "mixes all positions"):
        return problem
    if not isinstance(weight, Unknown) and weight.dim() != 2:
        return NotLocal("has a weight that is not a matrix")
    dims = input.resized({input.rank - 1: Symbol() if isinstance(weight, Unknown) else weight.shape[0]})
    return Local((input,), dims, lambda block: F.linear(block, weight, bias))


@register(nn.Linear)
def linear_module(m: Any, input: Value) -> Answer:
    return linear(input, m.weight, m.bias)


def product(
    operands: Sequence[Any],
    labels: Sequence[Labels],
    result: Labels,
    what: str,
    run: Callable[..., torch.Tensor],
    sizes: Mapping[str, Size] | None = None,
) -> Local | NotLocal:
    """The rule of a product whose dimensions are labelled as in einsum.

    Positions with the same label are combined, one by one if the result has the label, else all with each other.

    Args:
        operands: values, tensors, and None for one that is left out.
        labels: for each operand, a label for each of its dimensions.
        result: those of the result.
        what: what it does to positions, in words: "sums over".
        run: gets all operands, those that depend on the image as blocks.
        sizes: of labels of the result which no operand has.
    """
    given = [(operand, own) for operand, own in zip(operands, labels, strict=True) if operand is not None]
    if any(len(own) != rank_of(operand) for operand, own in given if not isinstance(operand, Unknown)):
        return NotLocal(f"{what} operands of which one has a number of dimensions that its rule does not cover")
    tagged = [_tagged(operand, own) for operand, own in given if isinstance(operand, Value)]
    if any(tags != tagged[0] for tags in tagged):
        return NotLocal(f"{what} values whose streamed axes are not aligned")
    tags = tagged[0]
    for label, tag in tags.items():
        if label not in result:
            return NotLocal(f"{what} positions along the streamed {tag}")
    dims = {label: _combined(label, tags.get(label), given) for label in result}
    for label, size in (sizes or {}).items():
        dims[label] = Dim(None, size)
    blocks: dict[int, Value | Sliced] = {}
    for place, (operand, own) in enumerate(zip(operands, labels, strict=True)):
        if isinstance(operand, Value):
            blocks[place] = operand
        elif isinstance(operand, torch.Tensor) and (extents := _extents(operand, own, tags)):
            if any(dims[own[index]].known not in (None, operand.size(index)) for index in extents):
                return NotLocal(f"{what} a tensor that has not the size of the image")
            blocks[place] = Sliced(operand, extents)

    def on_blocks(*tensors: torch.Tensor) -> torch.Tensor:
        filled = dict(enumerate(operands)) | dict(zip(blocks, tensors, strict=True))
        return run(*filled.values())

    return Local(tuple(blocks.values()), tuple(dims[label] for label in result), on_blocks)


def rank_of(operand: Any) -> int:
    """The number of dimensions of a value or a tensor; of nothing, 0."""
    return 0 if operand is None else operand.rank if isinstance(operand, Value) else operand.dim()


def unknown(*operands: Any) -> NotLocal | None:
    """Why a product of operands without a known number of dimensions cannot be streamed; None if it can."""
    if any(isinstance(operand, Unknown) for operand in operands):
        return NotLocal("has an operand that is not known before the call")
    return None


def batch_labels(operands: Iterable[Any], inner: int) -> list[list[str]]:
    """Labels of the dimensions of operands but for the last `inner`, which are broadcast against each other."""
    return [[f"batch {number}" for number in range(rank_of(operand) - inner, 0, -1)] for operand in operands]


def _tagged(x: Value, labels: Labels) -> dict[str, str]:
    return {label: dim.tag for label, dim in zip(labels, x.dims, strict=True) if dim.tag is not None}


def _combined(label: str, tag: str | None, given: Sequence[tuple[Any, Labels]]) -> Dim:
    """The dimension of a result that carries `label`; operands of size 1 broadcast."""
    found = [_dim_of(operand, own.index(label)) for operand, own in given if label in own]
    if tag is not None:
        return next(dim for dim in found if dim.tag == tag)
    sizes: list[Size] = [dim.size for dim in found if dim.size != 1] or [1]
    return Dim(None, sizes[0] if all(size == sizes[0] for size in sizes) else Symbol())


def _dim_of(operand: Any, index: int) -> Dim:
    if isinstance(operand, Value):
        return operand.dims[index]
    return Dim(None, Symbol() if isinstance(operand, Unknown) else operand.size(index))


def _extents(tensor: torch.Tensor, labels: Labels, tags: Mapping[str, str]) -> dict[int, str]:
    """The dimensions of a tensor that run along a streamed axis."""
    return {i: tags[label] for i, label in enumerate(labels) if label in tags and tensor.size(i) != 1}


@register(torch.matmul, torch.bmm, torch.mm, operator.matmul, "matmul", "bmm", "mm")
def matmul(input: Any, other: Any) -> Answer:
    if problem := unknown(input, other):
        return problem
    rows = ["row", "sum"] if rank_of(input) > 1 else ["sum"]
    columns = ["sum", "column"] if rank_of(other) > 1 else ["sum"]
    first, second = batch_labels((input, other), 2)
    result = [*max(first, second, key=len), *rows[:-1], *columns[1:]]
    return product((input, other), ([*first, *rows], [*second, *columns]), result, "sums over", torch.matmul)


@register(torch.einsum)
def einsum(equation: Any, *operands: Any) -> Answer:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str):
        return NotLocal("is given the labels of its dimensions as lists", "write them as an equation")
    terms, arrow, result = equation.replace(" ", "").partition("->")
    written = [_symbols(term) for term in terms.split(",")]
    if len(written) != len(operands):
        return NotLocal(f"has {len(written)} terms for {len(operands)} operands")
    if _DOTS in equation and (problem := unknown(*operands)):
        return problem
    spare = [rank_of(x) - len(term) + 1 if _DOTS in term else 0 for x, term in zip(operands, written, strict=True)]
    labels = [_spelt_out(term, count) for term, count in zip(written, spare, strict=True)]
    most = max(spare)
    counts = Counter(symbol for term in written for symbol in term)
    implicit = [_DOTS, *sorted(symbol for symbol, times in counts.items() if times == 1 and symbol != _DOTS)]
    wanted = _spelt_out(_symbols(result) if arrow else implicit, most)
    found = product(operands, labels, wanted, "sums over", partial(torch.einsum, equation))
    # Of a single operand it may be no more than a permutation.
    single = isinstance(found, Local) and len(operands) == 1
    return replace(found, aliases=operands[0]) if single else found


_DOTS = "..."


def _symbols(term: str) -> list[str]:
    return re.findall(r"\.\.\.|\w", term)


def _spelt_out(term: Sequence[str], count: int) -> list[str]:
    """Labels of a term, its ellipsis standing for `count` dimensions, which are broadcast."""
    dots = [f"{_DOTS}{number}" for number in range(count, 0, -1)]
    return [label for symbol in term for label in (dots if symbol == _DOTS else [symbol])]
