"""The ways to run a step, which should all give the same loss and gradients. It is imported, not run."""

from __future__ import annotations

import contextlib
import io
import math
from unittest import mock

import torch
from cases import Network
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


class Conventional:
    """Ordinary PyTorch. The other ways override what they do differently."""

    warm_up = 64
    """The size of an image that is large enough for a warm-up run."""
    small = 128
    """The size of an image that is large enough for a comparison of gradients."""
    moves_image = False
    """Whether the network itself copies an image in host memory to the GPU."""

    def __init__(self, network: Network, tile: int | None):
        self.network: nn.Module = network

    def output(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return _loss(self.output(image))

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by their names in the network."""
        return {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}


class Checkpoint(Conventional):
    """Activation checkpointing with torch.utils.checkpoint.

    A sequence is cut into as many segments as the square root of the number of its blocks. A U-Net, which is not a
    sequence, is checkpointed block by block.
    """

    def __init__(self, network: Network, tile: int | None):
        super().__init__(network, tile)
        if not isinstance(network.trunk, nn.Sequential):
            for block in network.trunk.modules():
                if isinstance(block, nn.Sequential):
                    block.forward = _checkpointed(block)

    def output(self, image: torch.Tensor) -> torch.Tensor:
        trunk = self.network.trunk
        if not isinstance(trunk, nn.Sequential):
            return self.network(image)
        segments = math.isqrt(len(trunk))
        return self.network.head(checkpoint_sequential(trunk, segments, image, use_reentrant=False))


def _checkpointed(block: nn.Sequential):
    plain = block.forward
    return lambda value: checkpoint(plain, value, use_reentrant=False)


class Fxstream(Conventional):
    """fxstream, which computes every tile again in the backward pass."""

    memory_budget: str | None = None
    moves_image = True

    def __init__(self, network: Network, tile: int | None):
        import fxstream  # imported here, so that the other ways are measured without it

        super().__init__(network, tile)
        self.network = fxstream.convert(network, tile, memory_budget=self.memory_budget)
        self.small = math.ceil(1.25 * tile / 32) * 32  # a multiple of 32, which a U-Net can halve and double again


class Budgeted(Fxstream):
    """fxstream with a memory budget into which the graphs of all tiles fit, so that nothing is computed twice."""

    memory_budget = "1TiB"


class Lightstream(Conventional):
    """lightstream, whose StreamingCNN runs the trunk. As its documentation asks, normalisation is not trained."""

    def __init__(self, network: Network, tile: int | None):
        if any(isinstance(module, nn.ConvTranspose2d) for module in network.trunk.modules()):
            raise TypeError("lightstream has no transposed convolutions")
        field = _receptive_field(network.trunk)
        if tile < field:
            raise ValueError(f"tile {tile} is smaller than the receptive field, {field}")
        self.warm_up = tile
        self.head, self.trunk = network.head, _streaming(network.trunk, tile)
        lost = self.trunk.tile_gradient_lost.top + self.trunk.tile_gradient_lost.bottom
        stride = int(self.trunk.output_stride[1])
        steps = (tile - lost) // stride
        if steps < 1:
            raise ValueError(f"tile {tile} leaves no valid gradient: {lost} positions are lost at its edges")
        # Three tiles per axis, so that one touches no border. lightstream needs a multiple of the stride.
        self.small = (math.ceil(lost / stride) + 3 * steps) * stride

    def output(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(image))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.image, self.features = image, self.trunk(image).requires_grad_()
        return _loss(self.head(self.features))

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.trunk.backward(self.image, self.features.grad)
        del self.image, self.features

    def parameters(self) -> dict[str, nn.Parameter]:
        modules = {"trunk": self.trunk.stream_module, "head": self.head}
        named = ((f"{key}.{name}", one) for key, module in modules.items() for name, one in module.named_parameters())
        return {name: parameter for name, parameter in named if parameter.requires_grad}


def _receptive_field(trunk: nn.Module) -> int:
    import fxstream

    analysis = fxstream.analyze(trunk)
    return max(axis.size for axis in analysis.receptive_field(analysis.outputs[-1]).values())


def _streaming(trunk: nn.Module, tile: int) -> nn.Module:
    # Importing lightstream asks this, and some versions of torch raise an error if there is no GPU.
    queries = [] if torch.cuda.is_available() else [mock.patch("torch.cuda.is_bf16_supported", return_value=False)]
    with contextlib.ExitStack() as stack:
        for query in queries:
            stack.enter_context(query)
        from lightstream.core.constructor import StreamingConstructor
        from lightstream.core.utils import freeze_normalization_layers
    with contextlib.redirect_stdout(io.StringIO()):
        constructor = StreamingConstructor(
            trunk,
            tile,
            verbose=False,
            normalize_on_gpu=False,
            add_keep_modules=[nn.BatchNorm2d],
            before_streaming_init_callbacks=[_fill_layer_scale],
        )
        # Not earlier: if this is False, the constructor moves the model to CUDA; if it is True, StreamingCNN does.
        constructor.statistics_on_cpu = False
        streaming = constructor.prepare_streaming_model()
    freeze_normalization_layers(streaming)
    streaming.zero_grad()
    return streaming


def _fill_layer_scale(model: nn.Module) -> None:
    """Set ConvNeXt's layer scales to 1, since 1e-6 would hide errors that its blocks make at the edges of tiles."""
    for module in model.modules():
        if isinstance(scale := getattr(module, "layer_scale", None), nn.Parameter):
            scale.data.fill_(1)


def _loss(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


WAYS: dict[str, type[Conventional]] = {
    "conventional": Conventional,
    "checkpoint": Checkpoint,
    "lightstream": Lightstream,
    "fxstream": Fxstream,
    "budgeted": Budgeted,
}
TILED = ("lightstream", "fxstream", "budgeted")
SAME_INFERENCE = ("checkpoint", "budgeted")
"""Ways that are the same as another way in inference."""
