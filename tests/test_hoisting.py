"""What does not depend on the image is computed once, outside the tile loop, with exact gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, assert_exact, counts, each_once, handed_over, pair
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fxstream
from fxstream.testing import head

Body = Callable[[Any, torch.Tensor, Any], torch.Tensor]
Tensors = dict[str, torch.Tensor | None]

IMAGE = (5, 3, 23, 37)

# Along H and W; one of them; the batch, too; the batch alone. The last batch of five is smaller than a tile.
TILES = [7, (None, 5), (2, None, 16, 16), (2, None, None, None)]


def assert_computed_once(model: nn.Module, inputs: tuple[Any, ...], hoisted: list[str]) -> None:
    """`hoisted` are operations that only what can be hoisted is made of."""
    converted = fxstream.convert(copy.deepcopy(model), 4, prove=False)
    expected, got = counts(model, *inputs), counts(converted, *inputs)
    assert got["convolution"] > 20 * expected["convolution"], "there are many tiles"
    for name in hoisted:
        assert got[name] == expected[name] > 0, name


# Weights that are computed from parameters.


class Standardised(nn.Conv2d):
    """Weight standardisation, written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardisedByBatchNorm(nn.Conv2d):
    """Weight standardisation as BiT and NFNets have it, through the method of the superclass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


class Mirrored(nn.Module):
    """A parametrization of one's own: kernels that are symmetric, by a learned amount."""

    def __init__(self) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.randn(()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.amount * weight.flip(-1)


class Scaled(nn.Module):
    """Learned scales that are the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.temperature = nn.Parameter(torch.randn(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale.exp()
        return self.conv(x * F.softplus(self.temperature)) * scale / scale.sum()


def convolutions(
    wrap: Callable[[nn.Module], nn.Module] = lambda conv: conv, kind: type[nn.Conv2d] = nn.Conv2d
) -> nn.Module:
    """Two convolutions of a kind, each wrapped: a strided, padded one and a dilated one."""
    first, second = kind(3, 4, 3, stride=2, padding=1), kind(4, 2, 3, dilation=2, bias=False)
    return nn.Sequential(wrap(first), nn.ReLU(), wrap(second))


def mirrored(conv: nn.Module) -> nn.Module:
    parametrize.register_parametrization(conv, "weight", Mirrored())
    return conv


def orthogonal(orthogonal_map: str) -> nn.Module:
    return convolutions(lambda conv: parametrizations.orthogonal(conv, orthogonal_map=orthogonal_map))


def transposed() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.ConvTranspose2d(3, 4, 3, stride=2), dim=1), nn.Conv2d(4, 2, 3, stride=2)
    )


# A model, and operations that only its weights are made of.
WEIGHTS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "standardised": (lambda: convolutions(kind=Standardised), ["var_mean", "rsqrt"]),
    "standardised by batch norm": (
        lambda: convolutions(kind=StandardisedByBatchNorm),
        ["native_batch_norm", "native_batch_norm_backward"],
    ),
    "weight norm": (
        lambda: convolutions(parametrizations.weight_norm),
        ["_weight_norm_interface", "_weight_norm_interface_backward"],
    ),
    "weight norm, transposed": (transposed, ["norm"]),
    "orthogonal by exponential": (lambda: orthogonal("matrix_exp"), ["linalg_matrix_exp"]),
    "orthogonal by Cayley": (lambda: orthogonal("cayley"), ["_linalg_solve_ex"]),
    "orthogonal by Householder": (lambda: orthogonal("householder"), ["linalg_householder_product"]),
    # In training mode it also overwrites its vectors, once per forward.
    "spectral norm": (lambda: convolutions(parametrizations.spectral_norm), ["mv", "linalg_vector_norm"]),
    "spectral norm in eval mode": (lambda: convolutions(parametrizations.spectral_norm).eval(), ["mv"]),
    "own parametrization": (lambda: convolutions(mirrored), ["flip"]),
    "scale": (Scaled, ["exp", "softplus", "softplus_backward"]),
}


@pytest.mark.parametrize("tile", TILES[::2], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_computed_from_parameters(name: str, tile: Any) -> None:
    build, _ = WEIGHTS[name]
    assert_exact(build(), IMAGE, tile, whole=True)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_computed_once(name: str) -> None:
    build, hoisted = WEIGHTS[name]
    assert_computed_once(build(), (torch.randn(1, 3, 23, 37),), hoisted)


def test_weights_are_computed_once_in_inference() -> None:
    with torch.no_grad():
        assert_computed_once(convolutions(kind=Standardised), (torch.randn(1, 3, 23, 37),), ["var_mean", "rsqrt"])


# Inputs besides the image.


class Conditioned(nn.Module):
    """Streams with something that `body` makes of a second input. The network for that is in training mode."""

    def __init__(self, body: Body):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.same = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 3)
        # No bias in front of the batch norm: its gradient would be nothing but rounding.
        self.mlp = nn.Sequential(
            nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 8)
        )
        self.embedding = nn.Embedding(7, 4)
        self.position = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Softplus())
        self.body = body

    def forward(self, image: torch.Tensor, other: Any) -> torch.Tensor:
        return self.body(self, image, other)


def _film(m: Any, image: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    gamma, beta = m.mlp(condition).chunk(2, 1)
    return m.last(F.relu(m.down(image) * gamma[:, :, None, None] + beta[..., None, None]))


def _film_by_view(m: Any, image: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    gamma, beta = m.mlp(condition).view(-1, 2, 4, 1, 1).unbind(1)
    return m.last(torch.addcmul(beta, m.down(image), gamma))


def _channel_weights(m: Any, image: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    return m.last(m.down(image) * m.mlp(condition)[:, :4].softmax(1)[:, :, None, None])


def _embedded(m: Any, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return m.last(m.down(image) * m.embedding(label)[:, :, None, None])


def _strength(m: Any, image: torch.Tensor, strength: float) -> torch.Tensor:
    return m.last(m.down(image * strength) + strength)


def _positions(m: Any, image: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return m.last(F.relu(m.same(image * positions) + positions))


def _convolved(m: Any, image: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return m.last(m.same(image) * m.position(positions))


def _masked(m: Any, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return m.last(torch.where(mask > 0, m.same(image), 0.0))


def _in_the_head_too(m: Any, image: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    gamma = m.mlp(condition)[:, :4]
    return m.last(m.down(image) * gamma[:, :, None, None]).amax((2, 3)) * gamma.sum(1, keepdim=True)


def _kernel(m: Any, image: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    return F.conv2d(m.down(image), m.mlp(condition).sum(0).view(2, 4, 1, 1))


def normal(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


# A body, its second input, and operations that only what is made of that is made of.
CONDITIONED: dict[str, tuple[Body, Callable[[], Any], list[str]]] = {
    "FiLM": (_film, normal(5, 6), ["mm", "native_batch_norm", "bernoulli_", "tanh_backward"]),
    "FiLM by a view": (_film_by_view, normal(5, 6), ["mm", "native_batch_norm_backward"]),
    "channel weights": (_channel_weights, normal(5, 6), ["_softmax", "_softmax_backward_data"]),
    "one condition for all": (_embedded, lambda: torch.tensor([3]), ["embedding", "embedding_dense_backward"]),
    "class": (_embedded, lambda: torch.randint(7, (5,)), ["embedding", "embedding_dense_backward"]),
    "number": (_strength, lambda: 0.7, []),
    "positions": (_positions, normal(1, 1, 23, 37), []),
    "positions of an axis": (_positions, normal(23, 1), []),
    "convolved positions": (_convolved, normal(1, 1, 23, 37), ["softplus", "softplus_backward"]),
    "positions of each image": (_convolved, normal(5, 1, 23, 37), ["softplus", "softplus_backward"]),
    "mask": (_masked, normal(1, 1, 23, 37), ["gt"]),
}


def results(model: nn.Module, image: torch.Tensor, other: Any) -> Tensors:
    """The output, the gradients of image, second input and parameters, and buffers."""
    inputs = {"image": image.clone().requires_grad_()}
    if isinstance(other, torch.Tensor) and other.is_floating_point():
        inputs["other"] = other = other.clone().requires_grad_()
    torch.manual_seed(1)  # dropout draws the same in both models
    output = model(inputs["image"], other)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
    inputs |= {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(output, list(inputs.values()), upstream, allow_unused=True)
    return {**dict(model.named_buffers()), "output": output, **dict(zip(inputs, gradients, strict=True))}


def assert_same_results(model: nn.Module, converted: nn.Module, other: Any) -> None:
    image = torch.randn(*IMAGE, dtype=torch.float64)
    assert_close(results(converted, image, other), results(model, image, other))


@each_once(tile=TILES, name=CONDITIONED)
def test_a_second_input(name: str, tile: Any) -> None:
    body, other, _ = CONDITIONED[name]
    model, converted = pair(Conditioned(body).double(), tile)
    assert not head(converted)
    for _ in range(2):  # the buffers move, and must not have moved with the conversion
        assert_same_results(model, converted, other())


@pytest.mark.parametrize("name", [name for name, (_, _, hoisted) in CONDITIONED.items() if hoisted])
def test_what_is_made_of_a_second_input_is_computed_once(name: str) -> None:
    body, other, hoisted = CONDITIONED[name]
    assert_computed_once(Conditioned(body).double(), (torch.randn(*IMAGE, dtype=torch.float64), other()), hoisted)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_second_input_alone_requires_a_gradient(tile: Any) -> None:
    model, converted = pair(Conditioned(_film).double().requires_grad_(False), tile)
    image, condition = torch.randn(*IMAGE, dtype=torch.float64), normal(5, 6)()
    found = []
    for one in (converted, model):
        leaf = condition.clone().requires_grad_()
        torch.manual_seed(1)
        found.append({"other": torch.autograd.grad(one(image, leaf).square().sum(), leaf)[0]})
    assert_close(*found)


@pytest.mark.parametrize("tile", TILES[:3], ids=str)
def test_what_is_made_of_a_second_input_in_the_head_too(tile: Any) -> None:
    model, converted = pair(Conditioned(_in_the_head_too).double(), tile)
    assert handed_over(converted) == ["amax"]
    assert_same_results(model, converted, normal(5, 6)())


def test_a_kernel_that_an_input_makes_is_left_to_the_head() -> None:
    with pytest.warns(fxstream.StreamingWarning, match="a kernel that is not known before the call"):
        model, converted = pair(Conditioned(_kernel).double(), 7)
    assert handed_over(converted) == ["down"]
    assert_same_results(model, converted, normal(5, 6)())


# A number that is given at the call.


class Cropped(nn.Module):
    def __init__(self, channels: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.channels = channels

    def forward(self, image: torch.Tensor, n: int = 1) -> torch.Tensor:
        y = self.conv(image)
        return y[:, n:] if self.channels else y[:, :, n:]


@pytest.mark.parametrize("channels", [False, True])
def test_a_slice_by_a_number_that_is_given_at_the_call_streams(channels: bool) -> None:
    model, converted = pair(Cropped(channels).double(), 7)
    assert not head(converted)
    for n in (1, 2):
        assert_same_results(model, converted, n)
