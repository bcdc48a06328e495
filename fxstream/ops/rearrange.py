"""The functions and layers of einops, which split, merge, reorder, reduce and repeat the axes that a pattern names.

A streamed axis may be split into the streamed axis and windows that divide it, as in "(h p) -> h p", and merged with
others that follow it, as in "h p -> (h p)". In either form the streamed axis is the first one in the parentheses.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..geometry.axes import Dim, Size, Symbol, Value, product
from ..geometry.window import Sliding, Span, Table, Transposed, Window
from .border import fit
from .registry import Answer, Local, NotLocal, Total, register
from .totals import Extreme, Reduction, Sum

Groups = list[list[str]]
"""For every dimension, the axes that it holds. Numbers and the dimensions that "..." stands for have names, too."""

_REST = "…s"
"""Stands for dimensions that "..." stands for outside parentheses: each is one of its own."""
_NUMBER = "number "
"""How the names of axes begin that a pattern gives as a number."""


def _parsed(side: str, rank: int | None) -> Groups | None:
    """One side of a pattern; None if it has not `rank` dimensions, or is none that einops reads."""
    words = re.findall(r"\([^()]*\)|…|\w+", side.replace("...", "…"))
    groups: Groups = [[_REST] if word == "…" else [n for n in word.strip("()").split() if n != "1"] for word in words]
    groups = [
        [f"{_NUMBER}{place}.{index}={name}" if name.isdigit() else name for index, name in enumerate(group)]
        for place, group in enumerate(groups)
    ]
    if rank is not None:
        groups = _spread(groups, rank - len(groups) + 1)
    return groups if rank is None or len(groups) == rank else None


def _length(name: str, lengths: Mapping[str, Size]) -> Size | None:
    """The length of an axis, if it is given."""
    return int(name.partition("=")[2]) if name.startswith(_NUMBER) else lengths.get(name)


def _spread(groups: Groups, count: int) -> Groups:
    """The groups with the dimensions that "..." stands for in its place."""
    names = [f"…{index}" for index in range(count)]
    result: Groups = []
    for group in groups:
        if group == [_REST]:
            result += [[name] for name in names]
        else:
            result.append([name for word in group for name in (names if word == "…" else [word])])
    return result


def _rearranged(
    x: Value,
    pattern: str,
    lengths: Mapping[str, Any],
    function: Callable[..., torch.Tensor],
    total: Callable[[tuple[int, ...]], Reduction] | None = None,
) -> Answer:
    """The answer for `function(x, pattern, **lengths)`, one of those of einops.

    `total` makes the `Reduction` that accumulates the result if streamed axes are reduced; None if there is none.
    """
    left, _, right = pattern.partition("->")
    before, after = _parsed(left, x.rank), _parsed(right, None)
    covered = all(isinstance(length, (int, Symbol)) for length in lengths.values())
    if before is None or after is None or not covered:
        return NotLocal(f"is given the pattern '{pattern}' in a way that its streaming rule does not cover")
    after = _spread(after, sum(name.startswith("…") for group in before for name in group))
    sizes: dict[str, Size] = {}
    tags: dict[str, str] = {}
    windows: dict[int, Window] = {}
    for position, (dim, group) in enumerate(zip(x.dims, before, strict=True)):
        given = [_length(name, lengths) for name in group]
        if dim.tag is None:
            sizes |= zip(group, _split(dim.size, given), strict=True)
            continue
        if not group or any(length is None for length in given[1:]):
            return NotLocal(f"splits the streamed axis {dim.tag} into parts of unknown lengths ('{pattern}')")
        inner = product(length for length in given[1:] if length is not None)
        first, *rest = _split(dim.size, [None, *given[1:]])
        counted = [number for number in (given[0], first) if isinstance(number, int)]
        divided = not isinstance(inner, int) or dim.known is None or dim.known % inner == 0
        if not divided or len(set(counted)) > 1:
            return NotLocal(f"splits {dim.known} positions along {dim.tag} into unequal windows ('{pattern}')")
        tags[group[0]] = dim.tag
        sizes |= zip(group, [first, *rest], strict=True)
        if inner != 1:
            windows[position] = Sliding(inner, stride=inner) if isinstance(inner, int) else Table(0, (), ())
    for name in (name for group in after for name in group if name not in sizes):
        if (length := _length(name, lengths)) is not None:
            sizes[name] = length
    lost = {tag for name, tag in tags.items() if not any(name in group for group in after)}
    if lost:
        problem = NotLocal(f"combines all positions along the streamed {' and '.join(sorted(lost))} ('{pattern}')")
        return _total(x, before, after, total, problem) if total is not None else problem
    free = {name: length for name, length in lengths.items() if name not in tags}
    return _merged(x, pattern, (before, after), sizes, tags, windows, partial(function, pattern=pattern, **free))


def _total(
    x: Value, before: Groups, after: Groups, total: Callable[[tuple[int, ...]], Reduction], problem: NotLocal
) -> Answer:
    """The answer for a reduction over streamed axes, if it does nothing else: its total, or `problem`."""
    kept = [group for group in before if group in after and group]
    over = tuple(position for position, group in enumerate(before) if group not in kept)
    named = all(len(group) <= 1 for group in (*before, *after))
    if named and after in (kept, [group if group in kept else [] for group in before]):
        return Total(x, total(over), len(after) == len(before), problem)
    return problem


def _split(size: Size, given: Sequence[Size | None]) -> list[Size]:
    """The lengths of the axes that a dimension of some size holds; one of them may not be given."""
    known = product(length for length in given if length is not None)
    return [_quotient(size, known) if length is None else length for length in given]


def _quotient(size: Size, parts: Size) -> Size:
    if parts == 1:
        return size
    return size // parts if isinstance(size, int) and isinstance(parts, int) and parts else Symbol()


def _merged(
    x: Value,
    pattern: str,
    sides: tuple[Groups, Groups],
    sizes: Mapping[str, Size],
    tags: Mapping[str, str],
    windows: dict[int, Window],
    function: Callable[..., Any],
) -> Answer:
    """The answer, once the axes on the left side of the pattern are known by name.

    `windows` are those that split streamed axes; here those are added that merge them with others.
    """
    before, after = sides
    position_of = {name: position for position, group in enumerate(before) for name in group}
    dims: list[Dim] = []
    grown: dict[int, int] = {}
    """Dimension of the operand through which a larger streamed dimension of the result is read -> that dimension."""
    for place, group in enumerate(after):
        if any(name not in sizes for name in group):
            return NotLocal(f"is given the pattern '{pattern}' in a way that its streaming rule does not cover")
        streamed = [name for name in group if name in tags]
        if not streamed:
            dims.append(Dim(None, product(sizes[name] for name in group)))
            continue
        tag = tags[streamed[0]]
        if len(streamed) > 1 or group[0] != streamed[0]:
            return NotLocal(f"merges the streamed axis {tag} with others in front of it ('{pattern}')")
        inner = product(sizes[name] for name in group[1:])
        size = sizes[streamed[0]]
        if inner != 1:
            position = position_of[streamed[0]]
            if position in windows:
                return NotLocal(
                    f"splits the streamed axis {tag} and merges it with others in one pattern ('{pattern}')"
                )
            windows[position] = Transposed(inner, inner) if isinstance(inner, int) else Table(0, (), ())
            grown[position] = place
            size = size * inner if isinstance(size, int) and isinstance(inner, int) else Symbol()
        dims.append(Dim(tag, size))

    def run(block: torch.Tensor, *spans: Span) -> torch.Tensor:
        pairs = list(zip(windows, spans, strict=True))
        split = {dim: span for dim, span in pairs if dim not in grown}
        merged = {grown[dim]: span for dim, span in pairs if dim in grown}
        if split:
            block = fit(block, list(split.values()), dims=list(split))
        result = function(block)
        return fit(result, list(merged.values()), dims=list(merged)) if merged else result

    return Local((x,), tuple(dims), run, windows)


def _einops(name: str, *args: Any, **lengths: Any) -> torch.Tensor:
    """Call a function of einops, which is there if it is asked for."""
    function: Callable[..., torch.Tensor] = getattr(sys.modules["einops"], name)
    return function(*args, **lengths)


@register("einops.einops.rearrange")
def rearrange(tensor: Any, pattern: str, **axes_lengths: Any) -> Answer:
    if not isinstance(tensor, Value):
        return NotLocal("rearranges a list of values", "use torch.stack")
    return _rearranged(tensor, pattern, axes_lengths, partial(_einops, "rearrange"))


@register("einops.einops.repeat")
def repeat(tensor: Any, pattern: str, **axes_lengths: Any) -> Answer:
    if not isinstance(tensor, Value):
        return NotLocal("repeats a list of values", "use torch.stack")
    return _rearranged(tensor, pattern, axes_lengths, partial(_einops, "repeat"))


_TOTALS: dict[str, Callable[[tuple[int, ...]], Reduction]] = {
    "mean": lambda over: Sum(over, torch.mean, mean=True),
    "sum": lambda over: Sum(over, torch.sum, mean=False),
    "max": lambda over: Extreme(over, largest=True),
    "min": lambda over: Extreme(over, largest=False),
}


@register("einops.einops.reduce")
def reduce(tensor: Any, pattern: str, reduction: Any, **axes_lengths: Any) -> Answer:
    if not isinstance(tensor, Value) or not isinstance(reduction, str):
        return NotLocal("reduces by a function, or a list of values", "name the reduction")
    run = partial(_einops, "reduce", reduction=reduction)
    return _rearranged(tensor, pattern, axes_lengths, run, _TOTALS.get(reduction))


@register("einops.layers.torch.Rearrange")
def rearrange_layer(m: Any, input: Value) -> Answer:
    return rearrange(input, m.pattern, **m.axes_lengths)


@register("einops.layers.torch.Reduce")
def reduce_layer(m: Any, input: Value) -> Answer:
    return reduce(input, m.pattern, m.reduction, **m.axes_lengths)
