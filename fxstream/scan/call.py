"""Everything one call of the streamed submodule depends on, except its tensors, which are passed beside it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..geometry.axes import IMAGE, Dim, Value
from ..graph.attributes import INCOMPARABLE, fingerprint
from ..graph.borrowed import Part, Record, tensors_of
from ..ops import Given, Typed, registrations
from .keeping import NOTHING, Keep
from .noise import new_seed
from .program import Program, lower
from .settings import Settings

MOST_PROGRAMS = 32
"""How many programs a streamed submodule keeps."""


class _Tensor:
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
    """Path -> module, for every module that `graph` calls."""
    parts: tuple[Part, ...]
    """These modules and all modules in them."""
    shape: tuple[int, ...]
    """Of the image: (N, C, *spatial)."""
    inputs: tuple[Any, ...]
    """What enters besides the image, with `_Tensor` in place of each tensor."""
    state: tuple[tuple[str, str], ...]
    """(path of the module, name) of every parameter and buffer."""
    autocast: tuple[dict[str, Any], ...]
    """The autocast regions in which the call was made."""
    device: torch.device
    """Where the tiles are computed: where the modules' tensors are, whatever the image's device."""
    programs: Programs
    """The programs of earlier calls."""
    keep: Keep = NOTHING
    """The values whose dear kernels' results are held, within the budget."""

    @cached_property
    def seed(self) -> int:
        """The seed of the call's random numbers; drawn only if there are any."""
        return new_seed()

    def autocasting(self) -> AbstractContextManager[Any]:
        """Enter the autocast regions of the call, with their caches off."""
        changing = [options for options in self.autocast if not _is_present(options)]
        if not changing:
            return nullcontext()
        stack = ExitStack()
        for options in changing:
            stack.enter_context(torch.autocast(**options))
        return stack

    def program(self, tensors: Sequence[torch.Tensor]) -> Program:
        """The program of the call, whose tensors these are, or detached leaves that share their memory.

        The rules are asked the first time only, and only if no earlier call was like this one. So what happens to the
        modules before the backward pass changes nothing.
        """
        if "_lowered" not in vars(self):
            vars(self)["_lowered"] = self.programs.of(self, tensors)
        lowered: Program = vars(self)["_lowered"]
        return lowered

    def lowered(self, tensors: Sequence[torch.Tensor], record: Record) -> Program:
        """Ask the rules. `record` notes what they read of the modules."""
        image, *others = (Given(tensor, slot=slot) for slot, tensor in enumerate(tensors))
        rest = iter(others)
        inputs = tree_map(lambda leaf: next(rest) if leaf is _Tensor else leaf, list(self.inputs))
        attributes: dict[str, dict[str, Given]] = {path: {} for path in self.modules}
        for (path, name), tensor in zip(self.state, rest, strict=True):
            attributes[path][name] = tensor
        axes = self.settings.axes
        sizes = zip(self.settings.names, self.shape, strict=True)
        dims = tuple(Dim(name if name in axes else None, size) for name, size in sizes)
        value = Value(dims, IMAGE, _like(image.dtype, self.device))
        return lower(self.graph, value, inputs, self.modules, attributes, axes, self.settings.freeze_batchnorm, record)


def _like(dtype: torch.dtype, device: torch.device) -> Given:
    """What stands for a tensor of a dtype on a device, whose shape does not matter."""
    recipe = Typed(None, lambda _: torch.empty(0, dtype=dtype, device=device))
    return Given(torch.empty(0, dtype=dtype, device="meta"), recipe=recipe, device=device)


class Programs:
    """The latest programs of a streamed submodule.

    The rules are asked again for a call that differs from those before it in what a rule may see: the sizes and types
    of its tensors, its other inputs, the attributes and modes of its modules, and the autocast regions.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[Program, Record]] = OrderedDict()
        """What is alike in calls that may share a program -> the program, and what its rules have read."""
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, call: Call, tensors: Sequence[torch.Tensor]) -> Program:
        """The program of a call, whose tensors these are. Raises what asking the rules raises."""
        inputs = fingerprint(call.inputs)
        key = (inputs, *_key(call, tensors))
        with self._lock:
            program, record = self._kept.pop(key, (None, None))
        if program is None or record is None or not (record.comparable and record.holds(call.parts)):
            record = Record(call.parts)
            program = call.lowered(tensors, record)
            record.close()
        if record.comparable and inputs is not INCOMPARABLE:
            with self._lock:
                self._kept[key] = program, record
                while len(self._kept) > MOST_PROGRAMS:
                    self._kept.popitem(last=False)
        return program


def _key(call: Call, tensors: Sequence[torch.Tensor]) -> Iterator[Hashable]:
    """What two calls of a streamed submodule must have in common to share a program, but for their other inputs."""
    yield call.shape
    yield call.state
    yield call.device
    yield call.settings.axes, call.settings.freeze_batchnorm
    yield tuple((path, type(part), part.training) for path, part in call.parts)
    yield tuple(tuple(options.items()) for options in call.autocast)
    yield torch.get_default_dtype(), torch.get_default_device()
    yield registrations()
    image, *others = tensors
    yield image.dtype, image.device, image.requires_grad
    yield tuple((one.shape, one.dtype, one.stride(), one.device, one.requires_grad) for one in others)


def new_call(
    graph: fx.Graph,
    settings: Settings,
    modules: Mapping[str, nn.Module],
    image: torch.Tensor,
    inputs: Sequence[Any],
    programs: Programs,
) -> tuple[Call, list[torch.Tensor]]:
    """A call and its tensors, read from the modules as they are now."""
    parts = {path: list(module.named_modules(remove_duplicate=False)) for path, module in modules.items()}
    state = {(path, name): tensor for path, inside in parts.items() for name, tensor in tensors_of(inside).items()}
    template = tree_map(lambda leaf: _Tensor if isinstance(leaf, torch.Tensor) else leaf, tuple(inputs))
    tensors = [*(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)), *state.values()]
    computing = state.values() or tensors or [image]
    device = next(iter(computing)).device
    call = Call(
        graph=graph,
        settings=settings,
        tiles=settings.tiling.sizes or (),
        budget=settings.memory_budget,
        modules=modules,
        parts=tuple((f"{path}.{inner}" if inner else path, part) for path, own in parts.items() for inner, part in own),
        shape=tuple(image.shape),
        inputs=template,
        state=tuple(state),
        autocast=_autocast_regions(device),
        device=device,
        programs=programs,
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


def _is_present(region: dict[str, Any]) -> bool:
    """Whether an autocast region changes nothing, since we are out of such regions, as it is."""
    return not region["enabled"] and not torch.is_autocast_enabled(region["device_type"])
