"""One call of the streamed submodule: everything that it hangs on but its tensors, which autograd keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from ..errors import NotLocalError
from ..geometry.axes import Dim, Value
from ..geometry.schedule import Grid, SizeError, schedule
from ..graph.answers import Lowered, Step, label, lower, program
from .mirror import mirror
from .noise import new_seed
from .settings import Settings


class _Slot:
    """Stands for a tensor among the inputs of a call."""


_SLOT = _Slot()


@dataclass(frozen=True, eq=False)
class Call:
    """One call. Its tensors, in order: the image, the tensors among its other inputs, the state of its modules."""

    graph: fx.Graph
    settings: Settings
    modules: Mapping[str, nn.Module]
    """As they were at the call: whoever changes a mode before the backward pass does not change that."""
    shape: tuple[int, ...]
    inputs: tuple[Any, ...]
    """What enters besides the image, with a slot in place of each tensor."""
    state: tuple[tuple[str, str], ...]
    """(path of the module, name) of every parameter and buffer."""
    autocast: tuple[dict[str, Any], ...]
    """The autocast regions in which the call was made."""
    device: torch.device
    """Where the tiles are computed: where the modules' tensors are, whatever the image's device."""

    @cached_property
    def seed(self) -> int:
        """Of the random numbers of the call; drawn only if there are any."""
        return new_seed()

    @contextmanager
    def autocasting(self) -> Iterator[None]:
        """In the autocast regions of the call, with a cache that is off."""
        with ExitStack() as stack:
            for options in self.autocast:
                stack.enter_context(torch.autocast(**options))
            yield

    def lowered(self, tensors: Sequence[torch.Tensor]) -> Lowered:
        """Lower the graph onto the call's tensors, or onto aliases of them."""
        rest = iter(tensors[1:])
        inputs = [next(rest) if value is _SLOT else value for value in self.inputs]
        attributes: dict[str, dict[str, torch.Tensor]] = {path: {} for path in self.modules}
        for (path, name), tensor in zip(self.state, rest, strict=True):
            attributes[path][name] = tensor
        axes = self.settings.axes
        sizes = zip(self.settings.names, self.shape, strict=True)
        image = Value(tuple(Dim(name if name in axes else None, size) for name, size in sizes), index=0)
        differentiable = tensors[0].requires_grad
        return lower(
            self.graph, image, differentiable, inputs, self.modules, attributes, axes, self.settings.freeze_batchnorm
        )

    def grid(self, steps: Sequence[Step]) -> Grid:
        """The schedule of all streamed axes. Raises NotLocalError where an operation broadcasts along one of them."""
        sizes = dict(zip(self.settings.names, self.shape, strict=True))
        planned = []
        for axis, tile in self.settings.tiles.items():
            try:
                planned.append(schedule(program(steps, axis), sizes[axis], tile))
            except SizeError as error:
                # That a window does not fit has come up in lowering.
                where = label(steps[error.value - 1].node)
                raise NotLocalError(f"{where}, along {axis} of an image of {sizes[axis]}: {error}") from None
        return Grid(tuple(planned))


def prepare(
    graph: fx.Graph, settings: Settings, modules: Mapping[str, nn.Module], image: torch.Tensor, inputs: Sequence[Any]
) -> tuple[Call, list[torch.Tensor]]:
    """A call and its tensors, read from the modules as they are now."""
    state = {(path, name): tensor for path, module in modules.items() for name, tensor in _tensors(module).items()}
    template = tuple(_SLOT if isinstance(value, torch.Tensor) else value for value in inputs)
    tensors = [*(value for value in inputs if isinstance(value, torch.Tensor)), *state.values()]
    computing = state.values() or tensors or [image]
    device = next(iter(computing)).device
    autocast = tuple(
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
    memo: dict[int, nn.Module] = {}
    frozen = {path: mirror(module, memo) for path, module in modules.items()}
    call = Call(graph, settings, frozen, tuple(image.shape), template, tuple(state), autocast, device)
    return call, [image, *tensors]


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and other attributes that are tensors, by their path in the module."""
    found: dict[str, torch.Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        own = {**vars(part), **part._buffers, **part._parameters}
        start = f"{path}." if path else ""
        found |= {start + name: value for name, value in own.items() if isinstance(value, torch.Tensor)}
    return found
