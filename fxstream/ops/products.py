"""Products that sum over dimensions: linear layers, matrix products, einsum.

A product is local if none of the dimensions that it sums over is streamed.
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
from .arguments import unpacked
from .channels import parameter_problem, spanning_problem
from .given import Typed
from .registry import Answer, Local, NotLocal, Sliced, Unknown, register

Labels = Sequence[str]


@register(F.linear)
def linear(input: Value, weight: Any, bias: Any = None) -> Answer:
    if problem := parameter_problem(weight, bias) or spanning_problem(input, [-1], "mixes all positions"):
        return problem
    if not isinstance(weight, Unknown) and weight.dim() != 2:
        return NotLocal("has a weight that is not a matrix")
    dims = input.resized({input.rank - 1: Symbol() if isinstance(weight, Unknown) else weight.shape[0]})
    return Local((input, weight, bias), dims, F.linear)


@register(nn.Linear)
def linear_module(m: Any, input: Value) -> Answer:
    return linear(input, m.weight, m.bias)


def labelled_product(
    operands: Sequence[Any],
    labels: Sequence[Labels],
    result: Labels,
    what: str,
    run: Callable[..., torch.Tensor],
    sizes: Mapping[str, Size] | None = None,
    parameters: Sequence[Any] = (),
) -> Local | NotLocal:
    """The answer for a product whose dimensions are labelled as in einsum.

    Dimensions with the same label belong together. If the result has the label, each of its positions is computed from
    the same position of the operands; if not, all positions of the operands are combined.

    Args:
        operands: values, tensors, and None for an operand that is left out.
        labels: for each operand, a label for each of its dimensions.
        result: the labels of the result's dimensions.
        what: what the product does to positions, as a verb phrase for the user: "sums over".
        run: gets all operands, with blocks in place of the values, and the parameters.
        sizes: the sizes of labels of the result that no operand has.
        parameters: further tensors, which `run` gets whole.
    """
    given = [(operand, own) for operand, own in zip(operands, labels, strict=True) if operand is not None]
    if any(len(own) != rank_of(operand) for operand, own in given if not isinstance(operand, Unknown)):
        return NotLocal("has an operand with a number of dimensions that its streaming rule does not cover")
    tagged = [_tagged(operand, own) for operand, own in given if isinstance(operand, Value)]
    if any(tags != tagged[0] for tags in tagged):
        return NotLocal(f"{what} values whose streamed axes are not aligned")
    tags = tagged[0]
    for label, tag in tags.items():
        if label not in result:
            return NotLocal(f"{what} positions along the streamed {tag}")
    dims = {label: _result_dim(label, tags.get(label), given) for label in result}
    for label, size in (sizes or {}).items():
        dims[label] = Dim(None, size)
    read: list[Any] = []
    for operand, own in zip(operands, labels, strict=True):
        if isinstance(operand, (torch.Tensor, Typed)) and (extents := _labelled_extents(operand, own, tags)):
            if any(dims[own[index]].known not in (None, operand.size(index)) for index in extents):
                return NotLocal(f"{what} a tensor whose size is not that of the image")
            read.append(Sliced(operand, extents))
        else:
            read.append(operand)
    return Local((*read, *parameters), tuple(dims[label] for label in result), run)


def rank_of(operand: Any) -> int:
    """The number of dimensions of a value or a tensor; 0 for None."""
    if operand is None:
        return 0
    return operand.rank if isinstance(operand, Value) else int(operand.dim())


def operand_problem(*operands: Any) -> NotLocal | None:
    """Why a product of these operands is not local: one is not known before the call. Else None."""
    if any(isinstance(operand, Unknown) for operand in operands):
        return NotLocal("has an operand that is not known before the call")
    return None


def batch_labels(operands: Iterable[Any], inner: int) -> list[list[str]]:
    """For each operand, labels of all its dimensions but the last `inner`: these are broadcast against each other."""
    return [[f"batch {number}" for number in range(rank_of(operand) - inner, 0, -1)] for operand in operands]


def _tagged(x: Value, labels: Labels) -> dict[str, str]:
    """Label -> streamed axis, for the dimensions of a value that are streamed."""
    return {label: dim.tag for label, dim in zip(labels, x.dims, strict=True) if dim.tag is not None}


def _result_dim(label: str, tag: str | None, given: Sequence[tuple[Any, Labels]]) -> Dim:
    """The dimension of the result that has `label`; operands of size 1 along it are broadcast."""
    found = [_dim_of(operand, own.index(label)) for operand, own in given if label in own]
    if tag is not None:
        return next(dim for dim in found if dim.tag == tag)
    sizes: list[Size] = [dim.size for dim in found if dim.size != 1] or [1]
    return Dim(None, sizes[0] if all(size == sizes[0] for size in sizes) else Symbol())


def _dim_of(operand: Any, index: int) -> Dim:
    if isinstance(operand, Value):
        return operand.dims[index]
    return Dim(None, Symbol() if isinstance(operand, Unknown) else operand.size(index))


def _labelled_extents(tensor: torch.Tensor | Typed, labels: Labels, tags: Mapping[str, str]) -> dict[int, str]:
    """The dimensions of a tensor whose label is that of a streamed axis, unless they are broadcast."""
    return {i: tags[label] for i, label in enumerate(labels) if label in tags and tensor.size(i) != 1}


@register(torch.matmul, torch.bmm, torch.mm, operator.matmul, "matmul", "bmm", "mm")
def matmul(input: Any, other: Any) -> Answer:
    if problem := operand_problem(input, other):
        return problem
    rows = ["row", "sum"] if rank_of(input) > 1 else ["sum"]
    columns = ["sum", "column"] if rank_of(other) > 1 else ["sum"]
    first, second = batch_labels((input, other), 2)
    result = [*max(first, second, key=len), *rows[:-1], *columns[1:]]
    return labelled_product((input, other), ([*first, *rows], [*second, *columns]), result, "sums over", torch.matmul)


@register(torch.einsum)
def einsum(equation: Any, *operands: Any) -> Answer:
    operands = unpacked(operands)
    if not isinstance(equation, str):
        return NotLocal("is given the labels of its dimensions as lists", "write them as an equation")
    terms, arrow, result = equation.replace(" ", "").partition("->")
    written = [_symbols(term) for term in terms.split(",")]
    if len(written) != len(operands):
        return NotLocal(f"has {len(written)} terms for {len(operands)} operands")
    if _DOTS in equation and (problem := operand_problem(*operands)):
        return problem
    spare = [rank_of(x) - len(term) + 1 if _DOTS in term else 0 for x, term in zip(operands, written, strict=True)]
    labels = [_without_ellipsis(term, count) for term, count in zip(written, spare, strict=True)]
    most = max(spare)
    counts = Counter(symbol for term in written for symbol in term)
    implicit = [_DOTS, *sorted(symbol for symbol, times in counts.items() if times == 1 and symbol != _DOTS)]
    wanted = _without_ellipsis(_symbols(result) if arrow else implicit, most)
    found = labelled_product(operands, labels, wanted, "sums over", partial(torch.einsum, equation))
    # With a single operand, torch.einsum may only permute dimensions, and then it returns a view.
    single = isinstance(found, Local) and len(operands) == 1
    return replace(found, aliases=operands[0]) if single else found


_DOTS = "..."


def _symbols(term: str) -> list[str]:
    """The letters and the ellipsis of a term such as "...ij"."""
    return re.findall(r"\.\.\.|\w", term)


def _without_ellipsis(term: Sequence[str], count: int) -> list[str]:
    """The labels of a term, with one label for each of the `count` dimensions that its ellipsis stands for."""
    dots = [f"{_DOTS}{number}" for number in range(count, 0, -1)]
    return [label for symbol in term for label in (dots if symbol == _DOTS else [symbol])]
