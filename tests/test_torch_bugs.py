"""Where torch itself is wrong, so that the plain model, or its capture, cannot be the reference as it is."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import Body, assert_exact, randomise
from torch import nn

import fxstream
from fxstream.testing import head


@pytest.mark.parametrize("tile", [(2, None, None, None), (1, None)], ids=str)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)])
def test_the_gradient_of_a_batch_norm_on_a_block_of_one_image_or_row(norm: nn.Module, tile: Any) -> None:
    """torch's own is wrong if it comes channels_last, as that of a Linear does; of the whole image it is right."""
    model = Body(
        lambda m, x: torch.einsum("nchw,ck->nhwk", m.norm(m.conv(x)), m.scale),
        conv=nn.Conv2d(2, 4, 3, padding=1),
        norm=norm,
        scale=nn.Parameter(torch.ones(4, 1)),
    )
    assert_exact(randomise(model).eval(), (3, 2, 9, 8), tile, whole=True)


def test_the_gradient_of_nearest_neighbours_is_that_of_the_neighbours_that_the_forward_has_chosen() -> None:
    """In float64, torch's own backward of these sizes takes other neighbours than its forward: ours does not."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Upsample(scale_factor=2.7)).double()
    nn.init.ones_(model[0].weight)
    image = torch.randn(1, 1, 40, 40, dtype=torch.double, requires_grad=True)
    enlarged = fxstream.convert(model, 9)(image)
    torch.testing.assert_close(enlarged, model(image), rtol=0, atol=0)
    upstream = torch.randn_like(enlarged)
    (gradient,) = torch.autograd.grad(enlarged, image, upstream)
    # The operation is linear: <gradient, image> = <upstream, enlarged>.
    torch.testing.assert_close((gradient * image).sum(), (upstream * enlarged).sum())


@pytest.mark.parametrize("shape", [(1, 2, 1, 3), (1, 2, 4, 1), (1, 2, 4, 3), (2, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_the_gradient_of_an_instance_norm_of_one_image(affine: bool, shape: tuple[int, ...]) -> None:
    """torch's own is wrong if it comes channels_last, as that of a LayerNorm over channels does, on images of any size.

    On the CPU, torch (2.14) computes an instance norm's gradient as that of a batch norm of one image with N * C
    channels. If N is 1, the reshaped gradient is a view whose first stride is C. `native_batch_norm_backward` takes it
    to be laid out as the contiguous input is, and reads values of all channels as those of one. Finite differences
    decide here, and not the plain model, which is off by 80% and more.
    """
    model = Body(
        lambda m, x: F.layer_norm(m.norm(m.conv(x)).tanh().movedim(1, -1), (4,)).movedim(-1, 1),
        conv=nn.Conv2d(2, 4, 3, padding=1),
        norm=nn.InstanceNorm2d(4, affine=affine),
    )
    converted = fxstream.convert(randomise(model).double(), (1, None, None, None))
    assert not head(converted)
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True), *converted.parameters()]
    torch.autograd.gradcheck(lambda image, *_: converted(image), inputs)


def test_the_plain_gradient_of_an_instance_norm_is_still_wrong() -> None:
    """If this fails, torch has been mended, and the layout of gradients in fxstream/ops/norm.py may go."""
    norm = nn.InstanceNorm2d(4).double()
    image = torch.randn(1, 4, 1, 3, dtype=torch.double, requires_grad=True)
    upstream = torch.randn(1, 4, 1, 3, dtype=torch.double).to(memory_format=torch.channels_last)
    (found,) = torch.autograd.grad(norm(image), image, upstream)
    (same_values,) = torch.autograd.grad(norm(image), image, upstream.contiguous())
    assert not torch.allclose(found, same_values)


def test_antialiasing_an_image_that_is_one_pixel_wide() -> None:
    """torch takes such an image for channels_last, and reads other rows; as a part of a wider one, it is right."""
    column = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    options: dict[str, Any] = {"mode": "bilinear", "antialias": True}
    expected = F.interpolate(column.expand(-1, -1, -1, 2), size=(3, 2), **options)[..., :1]
    assert expected.flatten().tolist() == [1.0, 1.5, 2.0]
    model = Body(lambda m, x: F.interpolate(m.conv(x), size=(3, 1), **options), conv=nn.Conv2d(1, 1, 1))
    nn.init.ones_(model.conv.weight)
    nn.init.zeros_(model.conv.bias)
    torch.testing.assert_close(fxstream.convert(model, 1)(column), expected)


def test_plain_antialiasing_of_such_an_image_is_still_wrong() -> None:
    """If this fails, torch has been mended, and test_ops.py may draw images of any width."""
    column = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    assert F.interpolate(column, size=(3, 1), mode="bilinear", antialias=True).flatten().tolist() != [1.0, 1.5, 2.0]


@pytest.mark.parametrize("tile", [1, 3, (1, None, None, None)], ids=str)
def test_the_gradient_of_a_batch_norm_with_statistics_that_are_not_contiguous(tile: Any) -> None:
    """torch reads these, and the weight, as if they were, where a block is channels_last or a single position."""

    def body(m: Body, x: torch.Tensor) -> torch.Tensor:
        mean, var, weight, bias = m.table.unbind(1)
        return m.last(F.batch_norm(m.conv(x), mean, var, weight, bias))

    model = Body(body, conv=nn.Conv2d(2, 4, 3, padding=1), last=nn.Conv2d(4, 4, 3, padding=1))
    model.register_buffer("table", torch.linspace(0.5, 2, 16).view(4, 4))
    assert_exact(randomise(model), (2, 2, 5, 4), tile, whole=True)


def test_torch_dynamo_forgets_the_last_entry_of_a_full_deque_that_grows_on_the_left() -> None:
    """So a model that does this is wrong under any torch.compile; once this fails, docs/compile.md need not say so."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.sizes.appendleft(x.shape[2])
        return x * m.sizes[-1]

    def last(model: Any) -> list[float]:
        return [model(torch.ones(1, 1, rows, 2))[0, 0, 0, 0].item() for rows in (5, 6, 7)]

    def model() -> Body:
        return Body(body, sizes=deque([2], maxlen=3))

    assert last(model()) == [2, 2, 5]
    assert last(torch.compile(model(), backend="eager", dynamic=True)) == [2, 2, 2]
