"""In-place operations on values that others read, too: what plain PyTorch does, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import assert_exact, handed_over, randomise
from torch import nn

import fxstream
from fxstream.testing import compare


class Net(nn.Module):
    """A convolution, then what a test does with its result, then another convolution."""

    def __init__(self, body: Callable[[nn.Module, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 3, 3)
        self.relu = nn.ReLU(inplace=True)
        self.tanh = nn.Tanh()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.register_parameter("scale", nn.Parameter(torch.ones(4, 1, 1)))
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.body(self, self.first(x)))


def augmented_assignment(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x
    y += 1
    y *= m.scale
    return x


def _add_relu(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + torch.relu_(x)


def _module_on_a_skip(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = m.relu(x)
    return x * 2 + y


def _method_chain(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x.mul_(0.5).add_(1).clamp_(min=0)
    return x


def _functional(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    nn.functional.leaky_relu(x, 0.1, True)
    nn.functional.dropout(x, 0.5, False, True)
    return torch.add(x, 1, alpha=2)


def _through_identity(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = nn.functional.dropout(x, training=False)
    return torch.relu_(y)


EXACT = [augmented_assignment, _add_relu, _module_on_a_skip, _method_chain, _functional, _through_identity]


@pytest.mark.parametrize("body", EXACT)
def test_overwritten_values_are_read_as_overwritten(body: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
    assert_exact(randomise(Net(body)), (2, 2, 19, 23), 6, whole=True)


def test_an_operator_keeps_the_type_of_what_it_overwrites() -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.avg_pool2d(x, 1).half()
            y += torch.full((1, 1), 0.1, dtype=torch.float64)[None]
            return y

    model = Half()
    image = torch.randn(1, 2, 9, 9)
    converted = fxstream.convert(model, 4)
    assert converted(image).dtype == torch.float16
    assert torch.equal(converted(image), model(image))


def _half_of_a_view(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x[:, :2].mul_(3)
    return m.tanh(x)


def _view_of_a_whole(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    view = x[:, :2]
    x.mul_(3)
    return m.tanh(torch.cat([x[:, :2], view], 1))


def _assigned(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    y[:, 0] = 2.0
    return m.tanh(y)


def _overwritten_in_the_head(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    view = y[:, :2]
    y.div_(m.pool(x))
    return m.tanh(torch.cat([view, y[:, 2:]], 1))


REFUSED = [_half_of_a_view, _view_of_a_whole, _assigned, _overwritten_in_the_head]


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("body", REFUSED)
def test_what_would_differ_is_left_to_the_head(body: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
    model = randomise(Net(body)).double()
    converted = fxstream.convert(model, 6)
    assert "tanh" not in handed_over(converted)
    compare(model, converted, torch.randn(2, 2, 19, 23))


def test_the_image_itself_is_never_overwritten_silently() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 3, 3))
    with pytest.raises(fxstream.NothingToStreamError, match="0 overwrites the image in place"):
        fxstream.convert(model, 8)

    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Identity()
            self.conv = nn.Conv2d(2, 3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.same(x)
            z = self.conv(y)
            y.sub_(y.mean())
            return z.mean() + y.sum()

    with pytest.raises(fxstream.NothingToStreamError, match="same shares memory that sub_, which is not streamed"):
        fxstream.convert(Aliased(), 4)
