"""Everything one call of the streamed submodule depends on, except its tensors, which are passed beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from ..geometry.axes import IMAGE, Dim, Value
from .keeping import NOTHING, Keep
from .mirror import mirror
from .noise import new_seed
from .program import Program, lower
from .settings import Settings

_TENSOR = object()
"""Stands for a tensor among the inputs of a call."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call.

    Its tensors are listed in this order: the image, the tensors among its other inputs, the state of its modules.
    """

    graph: fx.Graph
    settings: Settings
    tiles: tuple[int, ...]
    """The size of a tile along each streamed axis; empty until it has been chosen."""
    budget: int
    """Bytes that may be held between forward and backward so that less is computed again."""
    modules: Mapping[str, nn.Module]
    """Path -> module, as it was at the call: changing its mode before the backward pass changes nothing here."""
    shape: tuple[int, ...]
    """Of the image: (N, C, *spatial)."""
    inputs: tuple[Any, ...]
    """What enters besides the image, with `_TENSOR` in place of each tensor."""
    state: tuple[tuple[str, str], ...]
    """(path of the module, name) of every parameter and buffer."""
    autocast: tuple[dict[str, Any], ...]
    """The autocast regions in which the call was made."""
    device: torch.device
    """Where the tiles are computed: where the modules' tensors are, whatever the image's device."""
    keep: Keep = NOTHING
    """The values whose dear kernels' results are held, within the budget."""

    @cached_property
    def seed(self) -> int:
        """The seed of the call's random numbers; drawn only if there are any."""
        return new_seed()

    @contextmanager
    def autocasting(self) -> Iterator[None]:
        """Enter the autocast regions of the call, with their caches off."""
        with ExitStack() as stack:
            for options in self.autocast:
                stack.enter_context(torch.autocast(**options))
            yield

    def program(self, tensors: Sequence[torch.Tensor]) -> Program:
        """Lower the graph onto the call's tensors, or onto detached leaves that share their memory."""
        image, *others = tensors
        rest = iter(others)
        inputs = [next(rest) if value is _TENSOR else value for value in self.inputs]
        attributes: dict[str, dict[str, torch.Tensor]] = {path: {} for path in self.modules}
        for (path, name), tensor in zip(self.state, rest, strict=True):
            attributes[path][name] = tensor
        axes = self.settings.axes
        sizes = zip(self.settings.names, self.shape, strict=True)
        dims = tuple(Dim(name if name in axes else None, size) for name, size in sizes)
        value = Value(dims, IMAGE, image.new_empty(0, device=self.device))
        freeze = self.settings.freeze_batchnorm
        return lower(self.graph, value, image.requires_grad, inputs, self.modules, attributes, axes, freeze)


def new_call(
    graph: fx.Graph, settings: Settings, modules: Mapping[str, nn.Module], image: torch.Tensor, inputs: Sequence[Any]
) -> tuple[Call, list[torch.Tensor]]:
    """A call and its tensors, read from the modules as they are now."""
    state = {(path, name): tensor for path, module in modules.items() for name, tensor in _tensors(module).items()}
    template = tuple(_TENSOR if isinstance(value, torch.Tensor) else value for value in inputs)
    tensors = [*(value for value in inputs if isinstance(value, torch.Tensor)), *state.values()]
    computing = state.values() or tensors or [image]
    device = next(iter(computing)).device
    memo: dict[int, nn.Module] = {}
    call = Call(
        graph=graph,
        settings=settings,
        tiles=settings.tiling.sizes or (),
        budget=settings.memory_budget,
        modules={path: mirror(module, memo) for path, module in modules.items()},
        shape=tuple(image.shape),
        inputs=template,
        state=tuple(state),
        autocast=_autocast_regions(device),
        device=device,
    )
    return call, [image, *tensors]


def _autocast_regions(device: torch.device) -> tuple[dict[str, Any], ...]:
    """The options of the autocast regions that we are in, as far as they matter on `device`."""
    return tuple(
        {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            # The forward scan casts without a graph: the head must not find such a cast of a weight in the cache.
            "cache_enabled": False,
        }
        for kind in dict.fromkeys(("cpu", device.type))
        if torch.amp.is_autocast_available(kind)
    )


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and other attributes that are tensors, by their path in the module."""
    found: dict[str, torch.Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        own = {**vars(part), **part._buffers, **part._parameters}
        start = f"{path}." if path else ""
        found |= {start + name: value for name, value in own.items() if isinstance(value, torch.Tensor)}
    return found
