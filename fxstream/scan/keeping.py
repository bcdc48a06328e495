"""Results of dear kernels that are kept, so that computing a tile again in the backward pass need not run them.

Convolutions, matrix products and attention are dear; normalisation, activations and joining blocks are cheap. While a
tile of the forward scan is computed, `Collector` notes the results of the dear kernels of some values. When the tile is
computed again with autograd, `Returner` lets the same kernels return these results. Autograd is above both: it records
a kernel that returns a kept result as it would record any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_ATEN = torch.ops.aten
DEAR = frozenset(
    (
        *(_ATEN.convolution, _ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm),
        *(_ATEN._scaled_dot_product_flash_attention, _ATEN._scaled_dot_product_flash_attention_for_cpu),
        *(_ATEN._scaled_dot_product_efficient_attention, _ATEN._scaled_dot_product_cudnn_attention),
    )
)
"""The kernels whose results may be kept: those that arrive below autograd where FLOPs are."""


@dataclass(frozen=True)
class Keep:
    """The values whose dear kernels' results are kept. The values are those of a call's program, by number."""

    values: frozenset[int] = frozenset()
    """Those of which the results of all tiles are kept."""
    partial: int | None = None
    """A value of which they are kept in the first `tiles` tiles."""
    tiles: int = 0
    nbytes: int = 0
    """The bytes that the results are expected to take."""
    flops: int = 0
    """The FLOPs that need not be computed again."""
    complete: bool = False
    """Whether these are all results that there are, so that what is left of the budget may hold the graphs of tiles."""

    def of(self, number: int) -> frozenset[int]:
        """The values whose results are kept in the tile of that number."""
        return self.values | {self.partial} if self.partial is not None and number < self.tiles else self.values


NOTHING = Keep()


class Signature(NamedTuple):
    """A kernel, and what it was called with, tensors replaced by their shapes."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtypes: tuple[torch.dtype, ...]
    """Of the tensors."""


class Result:
    """What a dear kernel has returned."""

    def __init__(self, signature: Signature, returned: Any):
        self.signature = signature
        self.returned = returned
        self._versions = _versions(returned)

    def copy_if_in(self, storages: set[int]) -> None:
        """Keep a copy instead if one of these storages is ours."""
        if storages & _storages(self.returned).keys():
            self.returned = _each_tensor(torch.clone, self.returned)
            self._versions = _versions(self.returned)

    @property
    def intact(self) -> bool:
        """Whether nobody has overwritten what was returned."""
        return _versions(self.returned) == self._versions

    def detach(self) -> None:
        """Let go of the graph, if the kernel ran with autograd."""
        self.returned = _each_tensor(torch.Tensor.detach, self.returned)


Results = dict[int, list[Result]]
"""The results that one tile keeps: value -> the results of its dear kernels, in the order in which these ran."""
Run = Callable[..., torch.Tensor]
"""Runs a step of a tile: called with the number of the value, the step's function and what that is called with."""


def results_nbytes(results: Iterable[Result]) -> int:
    """The bytes that results hold."""
    return sum({key: size for result in results for key, size in _storages(result.returned).items()}.values())


class Collector:
    """Runs the steps of one tile, and collects the results of the dear kernels of some values."""

    def __init__(self, values: frozenset[int]):
        self._values = values
        self._found: Results = {}

    def run(self, value: int, function: Run, *operands: Any) -> torch.Tensor:
        """The result of the function."""
        if value not in self._values:
            return function(*operands)
        recorded = torch.is_grad_enabled()
        # With autograd, since torch runs other kernels without it where it has a fast path for inference.
        with torch.enable_grad(), _Collecting() as mode:
            block = function(*operands)
        for result in mode.results:
            result.detach()
        self._found[value] = mode.results
        return block if recorded else block.detach()

    def results(self) -> Results:
        """What has been collected; asked for once the tile has been computed.

        A result that has been overwritten since is not among it, nor are those of the same value that came later.
        """
        found = {}
        for value, results in self._found.items():
            intact = [result.intact for result in results]
            found[value] = results[: intact.index(False)] if False in intact else results
        return {value: results for value, results in found.items() if results}


class Returner:
    """Runs the steps of a tile again, whose dear kernels return what was kept.

    The results are used up, since nothing else should hold what autograd does not.
    """

    def __init__(self, results: Results):
        self._results = results

    def run(self, value: int, function: Run, *operands: Any) -> torch.Tensor:
        """The result of the function."""
        results = self._results.pop(value, None)
        if results is None:
            return function(*operands)
        with _Returning(results):
            return function(*operands)


class _Collecting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Notes the results of dear kernels in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results: list[Result] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            written = _written(func, args, kwargs)
            for result in self.results:
                result.copy_if_in(written)
        returned = func(*args, **kwargs)
        if func._overloadpacket in DEAR and not func._schema.is_mutable:
            self.results.append(Result(_signature(func, args, kwargs), returned))
        return returned


class _Returning(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Returns kept results in order, as long as the kernels that run are those that ran before.

    Where they are not, because torch chooses others when an operand requires a gradient, these and the later ones of
    the same value are computed.
    """

    def __init__(self, results: list[Result]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results = results[::-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket in DEAR and not func._schema.is_mutable and self._results:
            result = self._results.pop()
            if result.signature == _signature(func, args, kwargs):
                return result.returned
            self._results.clear()
        return func(*args, **kwargs)


def _signature(function: Any, args: Any, kwargs: Any) -> Signature:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    shapes = tree_map(lambda leaf: leaf.shape if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
    return Signature(function, shapes[0], shapes[1], tuple(tensor.dtype for tensor in tensors))


def _written(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[int]:
    """The keys of the storages that an operation writes to."""
    declared = function._schema.arguments
    given = {**dict(zip((argument.name for argument in declared), args, strict=False)), **kwargs}
    writes = (argument.alias_info is not None and argument.alias_info.is_write for argument in declared)
    written = [given.get(argument.name) for argument, write in zip(declared, writes, strict=True) if write]
    return set(_storages(written))


def _each_tensor(function: Callable[[torch.Tensor], torch.Tensor], values: Any) -> Any:
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, values)


def _versions(values: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _storages(values: Any) -> dict[int, int]:
    """Key of a storage -> its bytes."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return {storage_key(storage): storage.nbytes() for storage in storages}


def storage_key(storage: torch.UntypedStorage) -> int:
    """What tells a storage from all others that are alive. Its address does not: on the meta device all have one."""
    return int(storage._cdata)
