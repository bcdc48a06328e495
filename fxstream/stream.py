"""The streamed submodule: a scan over tiles, the same scan in reverse, and the autograd contract around them.

The contract is that of `torch.utils.checkpoint`: one differentiable operation whose inputs are the image and every
tensor that it uses, and which computes its activations again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import fx, nn

from .axes import Dim, Value
from .carry import Placement, Stitch, empty_like, index_of, stitch
from .errors import DoubleBackwardError, HookError, ImageTooSmallError, InputError, ModeError
from .lower import Step, label, lower, program
from .ops import Sliced
from .schedule import Grid, SizeError, Tile, readers, schedule
from .trace import has_hooks

Key = tuple[int, Tile, int]
"""A kept piece: value, tile, piece."""


@dataclass(frozen=True)
class Settings:
    """What a conversion fixed."""

    names: tuple[str, ...]
    """The image's dimensions, such as ("N", "C", "H", "W")."""
    tile_shape: tuple[int | None, ...]
    """Fresh image positions per step and dimension; None for a dimension that is not streamed."""
    freeze_batchnorm: bool
    guards: Mapping[str, bool]
    """Path of a module -> the training flag that the traced control flow relies on."""
    entered: tuple[str, ...]
    """Paths of modules that the graph's operations come from without calling them."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The streamed axes."""
        sizes = zip(self.names, self.tile_shape, strict=True)
        return tuple(name for name, size in sizes if size is not None and name != "C")


class Streamed(nn.Module):
    """The streamed part of a converted model; registers nothing, and finds what it needs in the model.

    Called with the image (N, C, *spatial) and the values that its graph takes besides, it returns the output of its
    graph. Raises StreamingError and subclasses, see `fxstream.convert`.
    """

    def __init__(self, graph: fx.Graph, settings: Settings):
        super().__init__()
        self.graph = graph
        self.settings = settings
        self._owner: tuple[nn.Module, ...] = ()

    def bind(self, owner: nn.Module) -> None:
        """Use the modules of `owner`, which is kept in a tuple to stay unregistered."""
        self._owner = (owner,)

    def forward(self, image: torch.Tensor, *inputs: Any) -> Any:
        call = self._prepare(image, inputs)
        tensors = call.tensors(image, inputs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            outputs = _StreamedFunction.apply(call, *tensors)
        else:
            outputs = Scan(call, tensors).forward()[0]
        output = next(node for node in reversed(self.graph.nodes) if node.op == "output").args[0]
        return outputs[0] if isinstance(output, fx.Node) else outputs

    def extra_repr(self) -> str:
        return f"tile_shape={self.settings.tile_shape}"

    def _prepare(self, image: torch.Tensor, inputs: Sequence[Any]) -> Call:
        (owner,) = self._owner
        settings = self.settings
        called = [str(node.target) for node in self.graph.nodes if node.op == "call_module"]
        modules = {path: owner.get_submodule(path) for path in dict.fromkeys((*called, *settings.entered))}
        for path, module in modules.items():
            if has_hooks(module):
                raise HookError(
                    f"{path} has acquired a hook after the conversion, which would run once a tile or not at all. "
                    "Way out: register it before the conversion; streaming then ends in front of this module."
                )
        for path, training in settings.guards.items():
            if owner.get_submodule(path).training is not training:
                mode, now = ("train", "eval") if training else ("eval", "train")
                raise ModeError(
                    f"{path or 'the model'} was converted in {mode} mode, on which its forward depends, and is called in "
                    f"{now} mode. Way out: call .{mode}(), or convert it again in {now} mode."
                )
        _check(image, settings)
        state = {path: _state(modules[path]) for path in dict.fromkeys(called)}
        return Call(self.graph, settings, {path: modules[path] for path in state}, state, tuple(image.shape), inputs)


def _check(image: Any, settings: Settings) -> None:
    form = f"({', '.join(settings.names)})"
    if not isinstance(image, torch.Tensor):
        raise InputError(f"the streamed image must be a tensor {form}, not {type(image).__name__}")
    if image.dim() != len(settings.names):
        raise InputError(f"the streamed image must be {form}, and has the shape {tuple(image.shape)}")
    channels = settings.tile_shape[1]
    if channels is not None and image.shape[1] != channels:
        raise InputError(f"tile_shape says {channels} channels, and the image has {image.shape[1]}")
    if not image.numel():
        raise InputError(f"the streamed image is empty: {tuple(image.shape)}")


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@dataclass(eq=False)
class Call:
    """All of one call but its tensors, which autograd keeps."""

    graph: fx.Graph
    settings: Settings
    modules: Mapping[str, nn.Module]
    state: Mapping[str, Mapping[str, torch.Tensor]] | None
    shape: tuple[int, ...]
    inputs: Sequence[Any]
    autocast: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.state is not None
        self.names = [(path, name) for path, tensors in self.state.items() for name in tensors]

    def tensors(self, image: torch.Tensor, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """Every tensor that the call uses, the image first; from here on the call itself holds none."""
        assert self.state is not None
        found = [image, *(value for value in inputs if isinstance(value, torch.Tensor))]
        found += [self.state[path][name] for path, name in self.names]
        self.inputs = [_SLOT if isinstance(value, torch.Tensor) else value for value in inputs]
        self.state = None
        for device in dict.fromkeys(("cpu", image.device.type)):
            self.autocast.append(
                {
                    "device_type": device,
                    "enabled": torch.is_autocast_enabled(device),
                    "dtype": torch.get_autocast_dtype(device),
                    "cache_enabled": torch.is_autocast_cache_enabled(),
                }
            )
        return found

    @contextmanager
    def as_in_forward(self) -> Iterator[None]:
        """The autocast regions that the call was made in."""
        with ExitStack() as stack:
            for options in self.autocast:
                stack.enter_context(torch.autocast(**options))
            yield

    def steps(self, tensors: Sequence[torch.Tensor]) -> list[Step]:
        """Lower the graph onto `tensors`, given in the order of `tensors()`."""
        rest = iter(tensors[1:])
        values = [next(rest) if value is _SLOT else value for value in self.inputs]
        attributes: dict[str, dict[str, torch.Tensor]] = {path: {} for path in self.modules}
        for (path, name), tensor in zip(self.names, rest, strict=True):
            attributes[path][name] = tensor
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        axes = self.settings.axes
        dims = (Dim(name if name in axes else None, n) for name, n in zip(self.settings.names, self.shape, strict=True))
        return lower(
            self.graph,
            Value(tuple(dims)),
            axes,
            dict(zip(placeholders[1:], values, strict=True)),
            self.modules.__getitem__,
            attributes,
            self.settings.freeze_batchnorm,
            tensors[0].requires_grad,
        )

    def grid(self, steps: Sequence[Step]) -> Grid:
        """The schedule of all streamed axes. Raises ImageTooSmallError."""
        planned = []
        for name, size, tile in zip(self.settings.names, self.shape, self.settings.tile_shape, strict=True):
            if name in self.settings.axes and tile is not None:
                try:
                    planned.append(schedule(program(steps, name), size, tile))
                except SizeError as error:
                    where = label(steps[error.value - 1].node)
                    raise ImageTooSmallError(f"{where}, along {name} of an image of {size}: {error}") from None
        return Grid(tuple(planned))


_SLOT = object()


class Scan:
    """The tiles of one call, on given tensors."""

    def __init__(self, call: Call, tensors: Sequence[torch.Tensor]):
        self.call = call
        self.tensors = tensors
        self.steps = call.steps(tensors)
        self.grid = call.grid(self.steps)
        self.axes = call.settings.axes
        self.slots = {id(tensor): slot for slot, tensor in enumerate(tensors)}
        self.readers = readers(program(self.steps, self.axes[0]))
        self.dims = [self._dims(Value(step.local.dims)) for step in self.steps]
        self.image_dims = tuple(call.settings.names.index(axis) for axis in self.axes)
        self.places: dict[tuple[int, int], Placement] = {}

    def _dims(self, value: Value) -> tuple[int, ...]:
        return tuple(value.position(axis) for axis in self.axes)

    @cached_property
    def outputs(self) -> list[int]:
        """The values that the graph returns, numbered as in the program."""
        numbers = {step.node: value for value, step in enumerate(self.steps, start=1)}
        output = next(node for node in reversed(self.call.graph.nodes) if node.op == "output")
        return [numbers[node] for node in output.all_input_nodes]

    def forward(self, keep: bool = False) -> tuple[tuple[torch.Tensor, ...], dict[Key, torch.Tensor]]:
        """The outputs and, with `keep`, every piece that the backward scan needs."""
        whole: dict[int, torch.Tensor] = {}
        pieces: dict[Key, torch.Tensor] = {}
        expiring: dict[Tile, list[Key]] = {}
        source = _Source(self.tensors, pieces)
        previous: Tile = ()
        with torch.no_grad():
            for tile in self.grid.tiles():
                if not keep:
                    _drop_expired(pieces, expiring, previous, tile)
                previous = tile
                blocks, kept = self._tile(tile, source, stitch)
                for value, block in blocks.items():
                    self._write(whole, value, tile, block)
                for key, piece in kept.items():
                    pieces[key] = piece.clone()
                    expiring.setdefault(self.grid.expiry(*key), []).append(key)
        return tuple(whole[value] for value in self.outputs), pieces

    def backward(
        self, pieces: Mapping[Key, torch.Tensor], gradients: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Gradients of all tensors, from those of the outputs. The tensors must be leaves of their own."""
        given = {value: g for value, g in zip(self.outputs, gradients, strict=True) if g is not None}
        trained = [slot for slot, tensor in enumerate(self.tensors) if tensor.requires_grad]
        totals: dict[int, torch.Tensor] = {}
        owed: dict[Key, torch.Tensor] = {}
        for tile in reversed(list(self.grid.tiles())):
            tape = _Tape(self.tensors, pieces, [step.differentiable for step in self.steps])
            with torch.enable_grad(), self.call.as_in_forward():
                blocks, kept = self._tile(tile, tape, Stitch.apply)
            roots = [(block, given[value][self._fresh(value, tile)]) for value, block in blocks.items() if value in given]
            roots += [(piece, owed.pop(key)) for key, piece in kept.items() if key in owed]
            del blocks, kept
            roots = [(root, gradient) for root, gradient in roots if root.requires_grad]
            leaves = [*tape.leaves, *(self.tensors[slot] for slot in trained)]
            if not roots or not leaves:
                continue
            found = torch.autograd.grad(*_unzip(roots, leaves), allow_unused=True)
            for (target, index), gradient in zip(tape.origins, found, strict=False):
                if gradient is not None and isinstance(target, int):
                    _total(totals, target, self.tensors[target])[index] += gradient
                elif gradient is not None:
                    _total(owed, target, pieces[target])[index] += gradient
            for slot, gradient in zip(trained, found[len(tape.leaves) :], strict=True):
                if gradient is not None:
                    _total(totals, slot, self.tensors[slot]).add_(gradient)
        return [totals.get(slot) for slot in range(len(self.tensors))]

    def _tile(
        self, tile: Tile, source: _Source, join: Callable[..., Any]
    ) -> tuple[dict[int, torch.Tensor], dict[Key, torch.Tensor]]:
        """Compute one tile: the fresh blocks of the outputs, and what later tiles will need."""
        waiting: dict[tuple[int, int], torch.Tensor] = {}
        blocks: dict[int, torch.Tensor] = {}
        kept: dict[Key, torch.Tensor] = {}
        for value, step in enumerate(self.steps, start=1):
            block = self._run(value, step, tile, waiting, source) if self.grid.runs(value, tile) else None
            if block is not None and value in self.outputs:
                blocks[value] = block
            place = self._place(value, tile)
            if place.idle:
                continue
            if place.passes:
                reads: Any = [block] * len(place.reads)
            else:
                earlier = (((value, self.grid.earlier(tile, offset), piece), src) for offset, piece, src, _ in place.parts)
                joined = join(place, block, *(source.piece(key, src) for key, src in earlier))
                reads = joined[: len(place.reads)]
                kept.update(((value, tile, piece), rows) for (piece, _), rows in zip(place.keeps, joined[len(reads) :], strict=True))
            for reader, wanted, read in zip(self.readers[value], place.reads, reads, strict=True):
                if wanted is not None:
                    waiting[reader] = read
        return blocks, kept

    def _run(
        self, value: int, step: Step, tile: Tile, waiting: dict[tuple[int, int], torch.Tensor], source: _Source
    ) -> torch.Tensor:
        operands = []
        edge = 0
        for operand in step.local.operands:
            if isinstance(operand, Sliced):
                operands.append(source.tensor(self.slots[id(operand.tensor)], self._rows(operand, value, tile)))
                continue
            if operand.index == 0:
                rows = tuple(slice(span.lo, span.hi) for span in self.grid.spans(value, edge, tile))
                operands.append(source.tensor(0, index_of(rows, self.image_dims, operand.rank)))
            else:
                operands.append(waiting.pop((value, edge)))
            edge += 1
        streamed = self.grid.spans(value, 0, tile)
        return step.local.run(*operands, *(streamed[span] if isinstance(span, int) else span for span in step.spans))

    def _rows(self, operand: Sliced, value: int, tile: Tile) -> tuple[slice, ...]:
        """The rows of a tensor with the image's extent that belong to the block of `value`."""
        fresh = dict(zip(self.axes, self.grid.fresh(value, tile), strict=True))
        return tuple(fresh[operand.dims[dim]] if dim in operand.dims else slice(None) for dim in range(operand.tensor.dim()))

    def _fresh(self, value: int, tile: Tile) -> tuple[slice, ...]:
        """The block of `value` that the tile computes, as an index into the whole value."""
        return index_of(self.grid.fresh(value, tile), self.dims[value - 1], len(self.steps[value - 1].local.dims))

    def _place(self, value: int, tile: Tile) -> Placement:
        layout = self.grid.layout(value, tile)
        key = (value, id(layout))
        if key not in self.places:
            self.places[key] = Placement(layout, self.dims[value - 1], len(self.steps[value - 1].local.dims))
        return self.places[key]

    def _write(self, whole: dict[int, torch.Tensor], value: int, tile: Tile, block: torch.Tensor) -> None:
        if value not in whole:
            sizes = (axis.sizes[value] for axis in self.grid.axes)
            whole[value] = empty_like(block, dict(zip(self.dims[value - 1], sizes, strict=True)))
        whole[value][self._fresh(value, tile)] = block


class _Source:
    """Where the forward scan reads tensors and kept pieces."""

    def __init__(self, tensors: Sequence[torch.Tensor], pieces: Mapping[Key, torch.Tensor]):
        self.tensors = tensors
        self.pieces = pieces

    def tensor(self, slot: int, index: tuple[slice, ...]) -> torch.Tensor:
        return self.tensors[slot][index]

    def piece(self, key: Key, index: tuple[slice, ...]) -> torch.Tensor:
        return self.pieces[key][index]


class _Tape(_Source):
    """Where one tile of the backward scan reads them: as leaves, whose gradients are added up by the scan itself."""

    def __init__(
        self, tensors: Sequence[torch.Tensor], pieces: Mapping[Key, torch.Tensor], differentiable: Sequence[bool]
    ):
        super().__init__(tensors, pieces)
        self.differentiable = differentiable
        self.leaves: list[torch.Tensor] = []
        self.origins: list[tuple[int | Key, tuple[slice, ...]]] = []
        """For each leaf the tensor's slot or the piece's key, and the rows of it."""

    def tensor(self, slot: int, index: tuple[slice, ...]) -> torch.Tensor:
        return self._leaf(self.tensors[slot][index], slot, index) if self.tensors[slot].requires_grad else super().tensor(slot, index)

    def piece(self, key: Key, index: tuple[slice, ...]) -> torch.Tensor:
        rows = super().piece(key, index)
        # A carry requires grad only if its value does; otherwise its reader would compute a gradient for nobody.
        differentiable = self.differentiable[key[0] - 1] and (rows.is_floating_point() or rows.is_complex())
        return self._leaf(rows, key, index) if differentiable else rows

    def _leaf(self, rows: torch.Tensor, origin: int | Key, index: tuple[slice, ...]) -> torch.Tensor:
        leaf = rows.detach().requires_grad_()
        self.leaves.append(leaf)
        self.origins.append((origin, index))
        return leaf


def _drop_expired(pieces: dict[Key, Any], expiring: dict[Tile, list[Key]], previous: Tile, tile: Tile) -> None:
    """Forget the pieces that no tile from `tile` on reads: those filed under a beginning that it has left behind."""
    for depth in range(1, len(previous) + 1):
        if previous[:depth] != tile[:depth]:
            for key in expiring.pop(previous[:depth], ()):
                del pieces[key]


Which = TypeVar("Which", int, Key)


def _total(totals: dict[Which, torch.Tensor], which: Which, like: torch.Tensor) -> torch.Tensor:
    """The running sum of a gradient. It starts from zeros of its own: what autograd returns may be shared."""
    if which not in totals:
        totals[which] = torch.zeros_like(like)
    return totals[which]


def _unzip(roots: list[tuple[torch.Tensor, torch.Tensor]], leaves: list[torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
    return [root for root, _ in roots], leaves, [gradient for _, gradient in roots]


class _StreamedFunction(torch.autograd.Function):
    """The streamed call as one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scan = Scan(call, tensors)
        outputs, pieces = scan.forward(keep=True)
        ctx.call = call
        ctx.keys = list(pieces)
        ctx.save_for_backward(*tensors, *pieces.values())
        ctx.set_materialize_grads(False)
        constant = [
            output
            for value, output in zip(scan.outputs, outputs, strict=True)
            if not (scan.steps[value - 1].differentiable and (output.is_floating_point() or output.is_complex()))
        ]
        ctx.mark_non_differentiable(*constant)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        tensors, kept = saved[: len(saved) - len(ctx.keys)], saved[len(saved) - len(ctx.keys) :]
        # Aliases of the parameters, not the Parameters themselves: the hooks of those would fire once a tile.
        aliases = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        pieces = dict(zip(ctx.keys, kept, strict=True))
        with torch.no_grad():
            found = Scan(ctx.call, aliases).backward(pieces, gradients)
        if torch.is_grad_enabled():
            found = [None if gradient is None else _RefuseSecond.apply(gradient, *tensors) for gradient in found]
        return (None, *found)


class _RefuseSecond(torch.autograd.Function):
    """Passes a first derivative on; refuses to be differentiated itself."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise DoubleBackwardError(
            "the streamed part of a converted model cannot be differentiated twice. "
            "Way out: compute second derivatives (gradient penalties, Hessians) with the plain model."
        )
