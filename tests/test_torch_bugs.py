"""Where torch's own gradient is wrong, so that the plain model cannot be the reference as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import Body, assert_exact, randomise
from torch import nn

import fxstream


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
