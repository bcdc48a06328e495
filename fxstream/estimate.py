"""What a step will compute and hold, predicted on the meta device, where tensors have no memory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from .conversion import convert
from .errors import StreamingWarning
from .graph.mirror import on_meta, tensor_on_meta
from .memory.flops import Flops
from .memory.footprint import working_set
from .memory.live import LiveBytes
from .model.streamed import Streamed
from .scan.checks import check_image


@dataclass(frozen=True)
class Estimate:
    """What one step on one batch will take, beyond the loaded model: see `Analysis.estimate`."""

    tiles: int
    """Number of tiles."""
    flops: int
    """Those of convolutions, matrix products and attention; element-wise operations are not counted."""
    carried_bytes: int
    """Held by the streamed part between forward and backward, what the memory budget keeps included; in inference, the
    most at any time."""
    peak_bytes: int
    """The most that live tensors take at any time, the image and the parameters' gradients included."""

    def __str__(self) -> str:
        return (
            f"{self.tiles} tiles, {self.flops / 1e12:.3g} TFLOP, {self.carried_bytes / 2**20:.0f} MiB carried, "
            f"{self.peak_bytes / 2**20:.0f} MiB at most"
        )


def estimate(
    model: nn.Module,
    image_shape: Sequence[int],
    tile_shape: object,
    memory_budget: int | str | None,
    freeze_batchnorm: bool,
    image_name: str,
) -> Estimate:
    """See `Analysis.estimate`."""
    model = on_meta(model)
    dtypes = (tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point())
    image = torch.empty(tuple(image_shape), dtype=next(dtypes, None), device="meta")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", StreamingWarning)
        converted = convert(
            model,
            tile_shape,  # type: ignore[arg-type]  # convert itself says what is wrong with it
            freeze_batchnorm=freeze_batchnorm,
            memory_budget=memory_budget,
            image=image_name,
            example_input=image,
            prove=False,
        )
        return _of_step(converted, image)


def _of_step(converted: fx.GraphModule, image: torch.Tensor) -> Estimate:
    name, streamed = next((name, part) for name, part in converted.named_children() if isinstance(part, Streamed))
    check_image(image, streamed.settings)
    flops, inputs, outputs = _counted(converted, streamed, image)
    call, tensors = streamed.checked_call(*inputs)
    needs = working_set(call, tensors)
    converted._modules[name] = given = _Given(outputs)
    head, left = _head(converted, image, given.leaves)
    handed = sum(leaf.nbytes for leaf in given.leaves)
    # While the streamed part computes gradients, what it has handed over is freed, unless it is the model's result.
    held = needs.carried + needs.kept
    peak = handed + max(sum(needs) + left, held + head)
    tiles = call.program(tensors).grid(call.tiles).count
    return Estimate(tiles, flops - call.keep.flops, held, image.nbytes + peak)


def _counted(converted: fx.GraphModule, streamed: Streamed, image: torch.Tensor) -> tuple[int, Any, Any]:
    """FLOPs of a step that keeps nothing; what the streamed part is called with, and what it returns."""
    settings = streamed.settings
    # One tile, since every position is computed once, however many tiles there are.
    whole = tuple(image.shape[settings.names.index(axis)] for axis in settings.axes)
    streamed.settings = replace(settings, tiling=replace(settings.tiling, sizes=whole), memory_budget=0)
    calls: list[tuple[Any, Any]] = []
    hook = streamed.register_forward_hook(lambda _, inputs, outputs: calls.append((inputs, outputs)))
    with Flops() as flops:
        roots = _roots(converted(image))
        torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])
    hook.remove()
    streamed.settings = settings
    ((inputs, outputs),) = calls
    return flops.total, inputs, outputs


def _head(converted: fx.GraphModule, image: torch.Tensor, given: Sequence[torch.Tensor]) -> tuple[int, int]:
    """The most bytes that the head makes at any time; and the bytes of its result and of its parameters' gradients,
    which stay until the step ends."""
    with LiveBytes() as live:
        result = converted(image)
        roots = _roots(result)
        if not roots:
            return int(live.peak), 0
        parameters = [parameter for parameter in converted.parameters() if parameter.requires_grad]
        # Not accumulated in leaves, which would copy what is the gradient of an output itself.
        wanted = [*parameters, *(leaf for leaf in given if leaf.requires_grad)]
        found = torch.autograd.grad(roots, wanted, [torch.empty_like(root) for root in roots], allow_unused=True)
    return int(live.peak), sum(leaf.nbytes for leaf in _tensors([result, found[: len(parameters)]]))


def _roots(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in _tensors(output) if leaf.requires_grad]


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


class _Given(nn.Module):
    """Takes the place of the streamed submodule, and returns what that has returned."""

    def __init__(self, outputs: Any):
        super().__init__()
        self.outputs = tree_map(lambda leaf: tensor_on_meta(leaf) if isinstance(leaf, torch.Tensor) else leaf, outputs)
        self.leaves = _tensors(self.outputs)

    def forward(self, *inputs: Any) -> Any:
        return self.outputs
