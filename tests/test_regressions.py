"""What random networks and thinking against the code have brought up, each as small as it gets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import assert_exact, randomise
from torch import nn

import fxstream
from fxstream.testing import compare

Body = Callable[["Net", torch.Tensor], Any]
pytestmark = pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")


class Hooked(nn.Sequential):
    """A block that overwrites its input, and whose hook makes it one opaque call."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
        self.register_forward_hook(_doubled)


def _doubled(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


class Untraceable(nn.Module):
    """Overwrites its input and cannot be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1) if x.sum() > -1e9 else x


class Net(nn.Module):
    def __init__(self, body: Body):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.hooked = Hooked()
        self.untraceable = Untraceable()
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.register_buffer("buffer", torch.linspace(1, 2, 4)[:, None, None])
        self.body = body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


def exact_or_refused(body: Body, tile_shape: Any = 3, shape: tuple[int, ...] = (2, 2, 9, 8)) -> None:
    """Whatever is streamed: what comes out is plain PyTorch's, or fxstream refuses at conversion."""
    plain = randomise(Net(body)).double()
    model = copy.deepcopy(plain)
    try:
        converted = fxstream.convert(model, tile_shape)
    except fxstream.StreamingError:
        return
    image = torch.randn(shape, dtype=torch.double)
    once, again = copy.deepcopy(plain), copy.deepcopy(converted)
    with torch.no_grad():  # where nothing checks the versions of what was overwritten
        torch.testing.assert_close(again(image.clone()), once(image.clone()))
    try:
        compare(plain, converted, image)
    except RuntimeError as error:  # all that the streamed part reads is saved, and a change of it refused, as ever
        assert "has been modified by an inplace operation" in str(error)  # noqa: PT017


# Cropping by F.pad along an axis that is not streamed.
# Was wrong: lower._spans gives `run` the whole axis, where the span says that only rows [lo, hi) come.


@pytest.mark.parametrize("tile_shape", [(3, None), (None, 3), 3, (1, None, None, None)])
@pytest.mark.parametrize("amounts", [(0, -2), (-2, 0), (-1, -1, -2, -1), (2, -1, -1, 2)])
def test_a_crop_by_padding(amounts: tuple[int, ...], tile_shape: Any) -> None:
    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.second(F.pad(m.first(x), amounts))

    assert_exact(randomise(Net(body)), (2, 2, 9, 8), tile_shape, whole=True)


# torch crops before it pads, and cannot crop more rows than there are.
def test_cropping_more_than_there_is_is_refused() -> None:
    converted = fxstream.convert(Net(lambda m, x: F.pad(m.first(x), (2, -3))), 3)
    with pytest.raises(fxstream.ImageTooSmallError):
        converted(torch.randn(1, 2, 9, 2))


# What requires a gradient.


def _detached(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x)
    return m.second(y.detach()), y.detach()


def _comparison(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x)
    return y, y > 0, (y > 0).double()


# Was wrong: Step.differentiable is true behind detach() and behind comparisons, so these outputs require a gradient.
@pytest.mark.parametrize("body", [_detached, _comparison])
def test_outputs_require_a_gradient_as_in_plain_torch(body: Body) -> None:
    assert_exact(randomise(Net(body)), (2, 2, 9, 8), 3, whole=True)


def _no_grad_in_front(m: Net, x: torch.Tensor) -> Any:
    with torch.no_grad():
        y = m.first(x)
    return m.second(y)


def _no_grad_in_the_head(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x)
    with torch.no_grad():
        weight = y.mean((2, 3), keepdim=True)
    return m.second(y) * weight


# Was wrong: fx drops the block: wrong gradients, silently.
@pytest.mark.parametrize("body", [_no_grad_in_front, _no_grad_in_the_head])
def test_no_grad_blocks_keep_their_meaning(body: Body) -> None:
    exact_or_refused(body)


# Was wrong: fx drops the block: computed in float32, silently.
def test_autocast_blocks_keep_their_meaning() -> None:
    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = m.first(x)
        return m.second(y.float())

    model = Net(body)
    try:
        converted = fxstream.convert(model, 3)
    except fxstream.StreamingError:
        return
    image = torch.randn(1, 2, 9, 8)
    torch.testing.assert_close(converted(image), model(image), rtol=1e-5, atol=1e-5)


# Values that do not depend on the image, overwritten in place.
# Was wrong: an in-place operation on a constant whose result nobody reads runs after the streamed call.


def _buffer_before(m: Net, x: torch.Tensor) -> Any:
    m.buffer.mul_(0.5)
    return m.second(m.first(x) + m.buffer)


def _buffer_after(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x) + m.buffer.clone()
    m.buffer.add_(1)
    return m.second(y)


def _constant_before(m: Net, x: torch.Tensor) -> Any:
    scale = m.scale * 1.0
    scale.mul_(2)
    return m.second(m.first(x) * scale)


def _constant_function(m: Net, x: torch.Tensor) -> Any:
    scale = m.scale * 1.0
    F.relu(scale, inplace=True)
    return m.second(m.first(x) + scale)


def _constant_between(m: Net, x: torch.Tensor) -> Any:
    scale = m.scale * 1.0
    y = m.first(x) + scale
    scale.mul_(2)
    return m.second(y) * scale.mean()


def _constant_item(m: Net, x: torch.Tensor) -> Any:
    scale = m.scale * 1.0
    scale[:, 0] = 1
    return m.second(m.first(x) + scale)


def _constant_view(m: Net, x: torch.Tensor) -> Any:
    scale = m.scale * 1.0
    scale[:, :2].zero_()
    return m.second(m.first(x) + scale)


@pytest.mark.parametrize(
    "body",
    [
        _buffer_before,
        _buffer_after,
        _constant_before,
        _constant_function,
        _constant_between,
        _constant_item,
        _constant_view,
    ],
)
def test_constants_overwritten_in_place(body: Body) -> None:
    exact_or_refused(body)


# Memory that is shared unnoticed.


def _positive(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x)
    z = torch.positive(y)
    z.mul_(2)
    return m.second(y)


def _plus(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x)
    z = +y
    z += 1
    return y + m.second(z)


def _hooked(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x)
    z = m.hooked(y)
    return z + m.second(y)


def _untraceable(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x)
    m.untraceable(y)
    return m.second(y)


def _view_in_the_head(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x)
    y.flatten(1).mul_(2)
    return m.second(y)


def _permuted_in_the_head(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x)
    y.permute(0, 2, 3, 1)[..., 0].zero_()
    return m.second(y)


def _data(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x)
    y.data.mul_(2)
    return m.second(y + 1)


def _detached_in_place(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x)
    y.detach().mul_(2)
    return m.second(y + 1)


def _two_views(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x)
    z = y[:, :, 1:-1]
    same = y.contiguous()
    z.relu_()
    return m.second(same)


def _reads_a_view_of_what_it_overwrites(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x)
    z = y[:, :1]
    y += z
    return m.second(y)


def _shifted_in_place(m: Net, x: torch.Tensor) -> Any:
    y = (m.first(x) * 4).long()
    same = y
    y <<= 1
    return m.second(same.double())


def _view_of_overwritten(m: Net, x: torch.Tensor) -> Any:
    y = m.first(x)
    z = y[:, :2]
    y.mul_(2)
    return z


@pytest.mark.parametrize(
    "body",
    [
        _two_views,  # Was wrong: `same` is left to the head and reads y, while z crosses as a value of its own
        _shifted_in_place,
        _view_of_overwritten,
        _positive,  # Was wrong: torch.positive returns its argument itself
        _plus,  # Was wrong: the same
        _hooked,  # Was wrong: an opaque module may overwrite its input
        _untraceable,  # Was wrong: the same
        _view_in_the_head,
        _permuted_in_the_head,
        _data,
        _detached_in_place,
    ],
)
def test_shared_memory(body: Body) -> None:
    exact_or_refused(body)


# Was accepted: plain torch refuses to write four channels into one.
def test_an_in_place_operation_does_not_grow() -> None:
    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.first(x)
        z = y.mean(1, keepdim=True)
        z += y
        return z

    with pytest.raises(RuntimeError):
        fxstream.convert(Net(body), 3)(torch.randn(1, 2, 9, 8))


# Numbers given at the call.


class Cropped(nn.Module):
    def __init__(self, channels: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.channels = channels

    def forward(self, x: torch.Tensor, n: int = 1) -> torch.Tensor:
        y = self.conv(x)
        return y[:, n:] if self.channels else y[:, :, n:]


# Was wrong: TypeError at conversion; a slice may hold an Unknown.
@pytest.mark.parametrize("channels", [False, True])
def test_a_slice_by_an_argument(channels: bool) -> None:
    model = Cropped(channels)
    converted = fxstream.convert(model, 3)
    image = torch.randn(1, 2, 9, 8)
    for n in (1, 2):
        torch.testing.assert_close(converted(image, n), model(image, n))


# Conversion must leave the original alone.


def _assigns(m: Net, x: torch.Tensor) -> Any:
    m.buffer = m.buffer * 0.5
    return m.second(m.first(x) * m.buffer)


def _counts(m: Net, x: torch.Tensor) -> Any:
    m.buffer += 1
    return m.second(m.first(x))


def _makes_a_tensor(m: Net, x: torch.Tensor) -> Any:
    return m.second(m.first(x) * torch.tensor(2.0))


# Was wrong: the original's buffer is a torch.fx proxy afterwards, and the converted model fails at its call.
@pytest.mark.parametrize("body", [_assigns, _counts, _makes_a_tensor])
def test_tracing_leaves_the_original_as_it_was(body: Body) -> None:
    model = Net(body)
    before, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    try:
        fxstream.convert(model, 3)
    except fxstream.StreamingError as error:
        assert isinstance(error, fxstream.TraceError)  # noqa: PT017  # refusing is fine, but not required
    assert type(model.buffer) is torch.Tensor
    assert set(vars(model)) == attributes
    torch.testing.assert_close(dict(model.state_dict()), dict(before))


def _tensor_made(m: Net, x: torch.Tensor) -> Any:
    return m.second(m.first(x) * torch.tensor(2.0) + torch.linspace(0, 1, 8))


def test_tensors_made_in_forward() -> None:
    assert_exact(randomise(Net(_tensor_made)), (1, 2, 9, 8), 3, whole=True)


# The rest holds: the head reads what it may.


def _head_writes(m: Net, x: torch.Tensor) -> Any:
    y = m.second(m.first(x))
    z = y * 2
    mean = z.mean()
    z.add_(mean)
    y.add_(mean)
    return y + z


def _image_in_the_head(m: Net, x: torch.Tensor) -> Any:
    y = m.second(m.first(x))
    return y * x.mean(), y, y, x


def _parameter_on_both_sides(m: Net, x: torch.Tensor) -> Any:
    y = m.second(m.first(x)) * m.scale
    return y.mean((2, 3)) * m.scale.sum() + m.second.weight.sum()


def _tied(m: Net, x: torch.Tensor) -> Any:
    return m.second(m.second(m.first(x))) + m.second(m.first(x))


@pytest.mark.parametrize("body", [_head_writes, _image_in_the_head, _parameter_on_both_sides, _tied])
def test_values_on_both_sides(body: Body) -> None:
    exact_or_refused(body)


def test_two_modules_with_one_weight() -> None:
    model = Net(lambda m, x: m.hooked[1](m.second(m.first(x))) * m.scale)
    model.hooked[1] = nn.Conv2d(4, 4, 3, padding=1)
    model.hooked[1].weight = model.second.weight
    assert_exact(randomise(model), (2, 2, 9, 8), 3, whole=True)


def test_a_row_that_is_broadcast_along_a_streamed_axis_is_refused() -> None:
    """Plain PyTorch can; the error must not say that the image is too small."""

    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.first(x)
        return y * F.conv2d(y, m.second.weight[:, :, :1, :1].expand(4, 4, 9, 1) * 1.0)

    converted = fxstream.convert(Net(body), 3)
    with pytest.raises(fxstream.NotLocalError, match="its operands have 1 and 9 rows"):
        converted(torch.randn(1, 2, 9, 8))


def test_an_operation_does_not_read_a_view_of_what_it_overwrites() -> None:
    """For a batch of several, plain PyTorch's own result hangs on the order of its loops."""
    model = Net(_reads_a_view_of_what_it_overwrites)
    converted = fxstream.convert(model, 3)
    assert "iadd" in [node.name for node in converted.graph.nodes]


@pytest.mark.parametrize("tile", [(2, None, None, None), (1, None)], ids=str)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)])
def test_the_gradient_of_a_batch_norm_on_a_block_of_one_image_or_row(norm: nn.Module, tile: Any) -> None:
    """torch's own is wrong if it comes channels_last, as that of a Linear does; of the whole image it is right."""
    model = Net(lambda m, x: torch.einsum("nchw,ck->nhwk", m.norm(m.first(x)), m.scale.view(4, 1)))
    model.norm = norm
    assert_exact(randomise(model).eval(), (3, 2, 9, 8), tile, whole=True)


def test_a_comparison_is_not_a_view_of_what_it_compares() -> None:
    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.first(x)
        return y.masked_fill_(y > 0, 0.1)

    assert_exact(randomise(Net(body)), (2, 2, 9, 8), 3, whole=True)


@pytest.mark.parametrize("place", [0, 1])
def test_of_two_results_only_the_values_require_a_gradient(place: int) -> None:
    model = Net(lambda m, x: m.first(x).max(1)[place])
    assert_exact(randomise(model), (2, 2, 9, 8), 3, whole=True)


def test_average_pooling_of_volumes_refuses_what_torch_refuses() -> None:
    """Its kernel must fit the image without the padding, unlike that of images."""
    model = nn.Sequential(nn.Conv3d(1, 1, 1), nn.AvgPool3d(3, padding=1))
    image = torch.randn(1, 1, 2, 5, 5)
    with pytest.raises(RuntimeError, match="smaller than kernel size"):
        model(image)
    with pytest.raises(fxstream.ImageTooSmallError):
        fxstream.convert(model, 2)(image)


def test_nearest_neighbours_have_the_gradient_of_what_they_are() -> None:
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


def test_a_group_norm_of_single_values_streams_if_the_batch_has_several() -> None:
    """torch's condition is on the whole batch, of which a chunk may be one image."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(4, 4), nn.Conv2d(4, 2, 1))
    assert_exact(randomise(model), (3, 2, 1, 1), (2, None, None, None), whole=True)
    with pytest.raises(fxstream.ImageTooSmallError, match="single values"):
        fxstream.convert(model, (2, None, None, None))(torch.randn(1, 2, 1, 1))


def test_operands_of_other_sizes_at_a_call_are_an_error_of_ours() -> None:
    """Whatever follows them; their size must not be taken for one that is not known yet."""
    model = Net(lambda m, x: m.second(m.first(x) + F.interpolate(m.first(x), size=(5, 5))))
    converted = fxstream.convert(model, 3)
    with pytest.raises(fxstream.NotLocalError, match="its operands have 5 and"):
        converted(torch.randn(1, 2, 9, 9))


def test_a_crop_to_a_size_of_what_has_a_fixed_size() -> None:
    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.first(x)
        return F.interpolate(y, size=(19, 17), mode="bilinear")[..., : y.shape[2], : y.shape[3]] + y

    assert_exact(randomise(Net(body)), (1, 2, 9, 8), 3, whole=True)
