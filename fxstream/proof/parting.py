"""Where two runs part: the first operation that differs between the plain model and the graph."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OURS = str(Path(__file__).parents[1])
_TORCH = str(Path(torch.__file__).parent)


class Step(NamedTuple):
    """One operation of a run."""

    operation: str
    """With the form of what it reads, such as "aten.mul.Tensor(float32 2x8x64x64, 2)"."""
    result: tuple[float, ...]
    """Sums over what it returns, which tell results apart."""
    place: str
    """The module in whose forward it runs, and the line of the user's code."""


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Records the operations that run."""

    def __init__(self, steps: list[Step], place: Callable[[], str]):
        """`steps` are added to; `place` says where we are."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps = steps
        self._place = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = ", ".join(map(_form, tree_leaves((args, kwargs or {}))))
        result = func(*args, **(kwargs or {}))
        if not func.name().startswith(("aten::detach", "prim::")):
            sums = tuple(_sum(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
            self._steps.append(Step(f"{func}({called})", sums, self._place()))
        return result


def place_in_code(modules: Mapping[int, str]) -> str:
    """The module, by the paths of modules by id, and the line of the user's code that runs now."""
    path = line = None
    frame = sys._getframe(1)
    while frame is not None and (path is None or line is None):
        file = frame.f_code.co_filename
        own = not file.startswith((_OURS, _TORCH)) and not file.startswith("<")
        module = frame.f_locals.get("self")
        if path is None and isinstance(module, nn.Module):
            path = modules.get(id(module))
        if line is None and own:
            line = f"{file}:{frame.f_lineno}: {linecache.getline(file, frame.f_lineno).strip()}"
        if id(module) in modules and modules[id(module)] == "":
            break
        frame = frame.f_back  # type: ignore[assignment]  # None at the end
    return f"{path or 'the forward of the model itself'} ({line or 'code of a library'})"


def parting(plain: list[Step], graph: list[Step]) -> str | None:
    """Where two runs part, in words; None if they do the same."""
    for expected, got in zip(plain, graph, strict=False):
        if expected.operation != got.operation or not _alike(expected.result, got.result):
            return (
                f"They part in {expected.place}: the plain model computes {expected.operation}, and the graph "
                f"{got.operation} for {got.place}"
            )
    if len(plain) > len(graph):
        step = plain[len(graph)]
        return f"They part in {step.place}: the plain model computes {step.operation}, and the graph nothing more"
    if len(graph) > len(plain):
        step = graph[len(plain)]
        return f"They part where the graph computes {step.operation} for {step.place}, and the plain model nothing more"
    return None


def _alike(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether numbers are equal; NaN is equal to itself."""
    return len(one) == len(other) and all(a == b or (a != a and b != b) for a, b in zip(one, other, strict=True))


def _form(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {'x'.join(map(str, leaf.shape))}".strip()
    return str(leaf)


def _sum(tensor: torch.Tensor) -> float:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return 0.0
    wide = tensor.detach().to("cpu").to(torch.complex128 if tensor.is_complex() else torch.float64)
    return float(wide.abs().sum()) + float(wide.sum().abs())
