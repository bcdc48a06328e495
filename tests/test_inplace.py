"""In-place operations: what plain PyTorch does with whoever shares the memory, or an operation left to the head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import Body, assert_exact, handed_over, pair, randomise
from torch import nn
from torch.nn.functional import celu

import fxstream
from fxstream.testing import head

Function = Callable[[Any, torch.Tensor], Any]

pytestmark = pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")


class Overwriting(nn.Module):
    """Overwrites its input and cannot be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1) if x.sum() > -1e9 else x


class Adding(nn.Module):
    """Overwrites one of its arguments, and cannot be traced."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.add_(1) if x.sum() > -1e9 else x
        return x + y.mean(1, keepdim=True)


def _doubled(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def net(body: Function) -> nn.Module:
    """Two convolutions, and what a test may do with their results, constants among it."""
    # Overwrites its input, and is one opaque call since it has a hook.
    hooked = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    hooked.register_forward_hook(_doubled)
    model = Body(
        body,
        first=nn.Conv2d(2, 4, 3, padding=1),
        second=nn.Conv2d(4, 4, 3, padding=1),
        relu=nn.ReLU(inplace=True),
        pool=nn.AdaptiveAvgPool2d(1),
        hooked=hooked,
        untraceable=Overwriting(),
        adding=Adding(),
        told=Told(),
        opaque=NotOverwriting(),
        attending=Attending(),
        dropout=nn.Dropout(0.0),
        scale=nn.Parameter(torch.ones(1, 4, 1, 1)),
        buffer=nn.Buffer(torch.linspace(1, 2, 4)[:, None, None]),
    )
    return randomise(model)


def assert_exact_in_inference(model: nn.Module, tile_shape: Any, shape: tuple[int, ...]) -> None:
    """Autograd compares the versions of what it has saved; without it, nothing may have been overwritten too early."""
    plain, converted = pair(model.double(), tile_shape)
    image = torch.randn(shape, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(converted(image.clone()), plain(image.clone()))


# Values that are overwritten where they are streamed.


def _augmented_assignment(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x)
    y = x
    y += 1
    y *= m.scale
    return m.second(x)


def _added_to_its_relu(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x)
    return m.second(x + torch.relu_(x))


def _module_on_a_skip(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x)
    y = m.relu(x)
    return m.second(x * 2 + y)


def _chain_of_methods(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x)
    x.mul_(0.5).add_(1).clamp_(min=0)
    return m.second(x)


def _functions(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x)
    F.leaky_relu(x, 0.1, True)
    F.dropout(x, 0.5, False, True)
    return m.second(torch.add(x, 1, alpha=2))


def _through_an_identity(m: Any, x: torch.Tensor) -> Any:
    y = F.dropout(m.first(x), training=False)
    return m.second(torch.relu_(y))


def _where_a_comparison_of_it_says(m: Any, x: torch.Tensor) -> Any:
    """A comparison is not a view of what it compares."""
    y = m.first(x)
    return m.second(y.masked_fill_(y > 0, 0.1))


def _by_index(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    y[:, 0] = 2.0
    y[y < 0.1] = 0
    y[:, :, 1:] = m.second(x.repeat(1, 2, 1, 1))[:, :, :-1]
    return m.second(y) + y


def _parts_of_itself(m: Any, x: torch.Tensor) -> Any:
    """Python reads a part, overwrites it, and writes it into the whole."""
    y = m.first(x)
    y[:, 0] += m.scale[:, 1]
    y[:, 1] -= y[:, 2]
    y[:, 2] = y[:, 3]
    y[:, :, 1:] *= 2
    y *= 3
    return m.second(y)


def _whole(m: Any, x: torch.Tensor) -> Any:
    y, z = m.first(x), torch.zeros_like(x[:, :1])
    z.fill_(2).copy_(y[:, :1])
    return m.second(y.zero_() + z)


STREAMED = [
    _augmented_assignment,
    _added_to_its_relu,
    _module_on_a_skip,
    _chain_of_methods,
    _functions,
    _through_an_identity,
    _where_a_comparison_of_it_says,
    _by_index,
    _parts_of_itself,
    _whole,
]


@pytest.mark.parametrize("body", STREAMED)
def test_overwritten_values_are_read_as_overwritten(body: Function) -> None:
    assert_exact(net(body), (2, 2, 19, 23), 6, whole=True)
    assert_exact_in_inference(net(body), 6, (2, 2, 19, 23))


def test_an_operator_keeps_the_type_of_what_it_overwrites() -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.avg_pool2d(x, 1).half()
            y += torch.full((1, 1), 0.1, dtype=torch.float64)[None]
            return y

    model = Half()
    image = torch.randn(1, 2, 9, 9)
    converted = fxstream.convert(model, 4)
    assert converted(image).dtype == torch.float16
    assert torch.equal(converted(image), model(image))


class Told(nn.Module):
    """Overwrites its input, as an argument without its name tells the function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return celu(x, 1.0, True)


class Attending(nn.Module):
    """Adds to each position what a module that cannot be traced makes of all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(4), NotOverwriting()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.flatten(2).transpose(1, 2)
        return y + self.attention(self.norm(y))


class NotOverwriting(nn.Module):
    """Cannot be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x * 3


def _by_a_module_that_reads_it_alone(m: Any, x: torch.Tensor) -> Any:
    """Nobody sees whether it overwrites what others share: they do not read it any more."""
    y = m.dropout(m.first(x))
    return y + m.opaque(y)


def _by_a_module_that_reads_what_is_computed_of_it(m: Any, x: torch.Tensor) -> Any:
    return m.attending(m.dropout(m.first(x)))


NOT_SUSPECTED: list[tuple[Function, Any, str]] = [
    (_by_a_module_that_reads_it_alone, "dropout", "opaque is one opaque call"),
    (_by_a_module_that_reads_what_is_computed_of_it, "dropout", "attending: flatten merges the streamed axis H and W"),
]


@pytest.mark.parametrize(("body", "last", "reason"), NOT_SUSPECTED, ids=[body.__name__ for body, _, _ in NOT_SUSPECTED])
def test_what_an_opaque_module_might_overwrite_ends_nothing_where_nobody_would_see_it(
    body: Function, last: Any, reason: str
) -> None:
    model = net(body)
    assert_exact(model, (2, 2, 9, 8), 3, last=last)
    (stop,) = fxstream.analyze(model).stops
    assert stop.reason.startswith(reason)


# Values of which a view is overwritten, or that are overwritten where they are not streamed: all that shares the memory
# is left to the head.


def _half_of_its_channels(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x)
    x[:, :2].mul_(3)
    return m.second(x)


def _view_of_a_whole(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x)
    view = x[:, :2]
    x.mul_(3)
    return m.second(torch.cat([x[:, :2], view], 1))


def _view_of_overwritten(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    view = y[:, :2]
    y.mul_(2)
    return view


def _assigned_under_a_view(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    view = y[:, :2]
    y[:, 0] = 2.0
    return m.second(y) + view.mean(1, True)


def _part_written_elsewhere(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    part = y[:, 0]
    part += 1
    y[:, 1] = part
    return m.second(y)


def _part_written_late(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    part = y[:, 0]
    part += 1
    z = y * 3
    y[:, 0] = part
    return m.second(y) + z


def _part_overwritten_again(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    part = y[:, 0]
    part += 1
    y[:, 0] = part
    part += 1
    return m.second(y)


def _perhaps_another_part(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    y[:, -1] = y[:, 3]
    return m.second(y)


def _divided_by_what_the_head_computes(m: Any, x: torch.Tensor) -> Any:
    x = m.first(x)
    y = x * 1
    view = y[:, :2]
    y.div_(m.pool(x))
    return m.second(torch.cat([view, y[:, 2:]], 1))


def _two_views(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    view = y[:, :, 1:-1]
    same = y.contiguous()
    view.relu_()
    return m.second(same)


def _shifted(m: Any, x: torch.Tensor) -> Any:
    y = (m.first(x) * 4).long()
    same = y
    y <<= 1
    return m.second(same.double())


def _positive(m: Any, x: torch.Tensor) -> Any:
    """torch.positive returns its argument itself."""
    y = m.first(x)
    z = torch.positive(y)
    z.mul_(2)
    return m.second(y)


def _plus(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    z = +y
    z += 1
    return y + m.second(z)


def _by_a_module_with_a_hook(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    z = m.hooked(y)
    return z + m.second(y)


def _by_a_module_that_cannot_be_traced(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    m.untraceable(y)
    return m.second(y)


def _by_a_module_that_reads_a_view_of_it(m: Any, x: torch.Tensor) -> Any:
    """What the module sees of the one changes with the other."""
    y = m.first(x)
    return m.second(m.adding(y, y[:, :2]))


def _flattened(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    y.flatten(1).mul_(2)
    return m.second(y)


def _permuted(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    y.permute(0, 2, 3, 1)[..., 0].zero_()
    return m.second(y)


def _permuted_by_einsum(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    z = torch.einsum("nchw->nhwc", y)
    z += 1
    return m.second(y) + z.permute(0, 3, 1, 2)


def _told_by_position(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    z = y[:, :2]
    m.told(y.view(-1))
    return m.second(torch.cat([y[:, 2:], z], 1))


def _data(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    y.data.mul_(2)
    return m.second(y + 1)


def _detached(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x)
    y.detach().mul_(2)
    return m.second(y + 1)


LEFT_TO_THE_HEAD: list[tuple[Function, Any, str]] = [
    (_half_of_its_channels, "first", "getitem shares memory that mul_, which is not streamed, overwrites"),
    (_view_of_a_whole, "first", "getitem shares memory that mul_, which is not streamed, overwrites"),
    (_view_of_overwritten, "first", "getitem shares memory that mul_, which is not streamed, overwrites"),
    (_assigned_under_a_view, "first", "getitem shares memory that setitem, which is not streamed, overwrites"),
    (_part_written_elsewhere, "first", "getitem shares memory that iadd, which is not streamed, overwrites"),
    (_part_written_late, "first", "getitem shares memory that iadd, which is not streamed, overwrites"),
    (_part_overwritten_again, "first", "getitem shares memory that iadd, which is not streamed, overwrites"),
    (_perhaps_another_part, "first", "getitem shares memory that setitem, which is not streamed, overwrites"),
    (
        _divided_by_what_the_head_computes,
        ["mul", "pool"],
        "getitem shares memory that div_, which is not streamed, overwrites",
    ),
    (_two_views, "first", "contiguous shares memory that relu_, which is not streamed, overwrites"),
    (_shifted, "long", "ilshift has no streaming rule"),
    (_positive, "first", "positive shares memory that mul_, which is not streamed, overwrites"),
    (_plus, "first", "pos shares memory that iadd, which is not streamed, overwrites"),
    (_by_a_module_with_a_hook, "first", "hooked has a hook"),
    (_by_a_module_that_cannot_be_traced, "first", "untraceable is one opaque call"),
    (_by_a_module_that_reads_a_view_of_it, "first", "getitem shares memory that adding might overwrite"),
    (_flattened, "first", "flatten merges the streamed axis H and W"),
    (_permuted, "first", "permute shares memory that zero_, which is not streamed, overwrites"),
    (_told_by_position, "first", "getitem shares memory that told: celu, which is not streamed, overwrites"),
    (_data, "first", "reads the attribute data of a value"),
    (_permuted_by_einsum, "first", "einsum shares memory that iadd, which is not streamed, overwrites"),
    (_detached, "first", "detach shares memory that mul_, which is not streamed, overwrites"),
]


@pytest.mark.parametrize(
    ("body", "last", "reason"), LEFT_TO_THE_HEAD, ids=[body.__name__ for body, _, _ in LEFT_TO_THE_HEAD]
)
def test_what_would_differ_is_left_to_the_head(body: Function, last: Any, reason: str) -> None:
    model = net(body)
    assert_exact(model, (2, 2, 9, 8), 3, last=last)
    assert_exact_in_inference(model, 3, (2, 2, 9, 8))
    assert any(reason in stop.reason for stop in fxstream.analyze(model).stops)


def test_an_operation_that_reads_a_view_of_what_it_overwrites_is_left_to_the_head() -> None:
    """For a batch of several, plain PyTorch's own result depends on the order of its loops. The head repeats them."""

    def body(m: Any, x: torch.Tensor) -> Any:
        y = m.first(x)
        z = y[:, :1]
        y += z
        return m.second(y)

    converted = assert_exact(net(body), (2, 2, 9, 8), 3, last="first")
    assert head(converted) == ["getitem", "iadd", "second"]


def test_what_the_head_overwrites_it_alone_has() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        y = m.second(m.first(x))
        z = y * 2
        mean = z.mean()
        z.add_(mean)
        y.add_(mean)
        return y + z

    assert_exact(net(body), (2, 2, 9, 8), 3, last=["second", "mul"])
    assert_exact_in_inference(net(body), 3, (2, 2, 9, 8))


def test_an_in_place_operation_cannot_write_more_channels_than_there_are() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.first(x)
        z = y.mean(1, keepdim=True)
        z += y
        return z

    model = net(body)
    converted = fxstream.convert(model, 3)
    for one in (model, converted):
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            one(torch.randn(1, 2, 9, 8))


# Constants: values that do not depend on the image, and are computed outside the streamed call.


def _buffer_before(m: Any, x: torch.Tensor) -> Any:
    m.buffer.mul_(0.5)
    return m.second(m.first(x) + m.buffer)


def _buffer_after(m: Any, x: torch.Tensor) -> Any:
    y = m.first(x) + m.buffer.clone()
    m.buffer.add_(1)
    return m.second(y)


def _constant_before(m: Any, x: torch.Tensor) -> Any:
    scale = m.scale * 1.0
    scale.mul_(2)
    return m.second(m.first(x) * scale)


def _constant_by_a_function(m: Any, x: torch.Tensor) -> Any:
    scale = m.scale * 1.0
    F.relu(scale, inplace=True)
    return m.second(m.first(x) + scale)


def _constant_item(m: Any, x: torch.Tensor) -> Any:
    scale = m.scale * 1.0
    scale[:, 0] = 1
    return m.second(m.first(x) + scale)


def _constant_view(m: Any, x: torch.Tensor) -> Any:
    scale = m.scale * 1.0
    scale[:, :2].zero_()
    return m.second(m.first(x) + scale)


@pytest.mark.parametrize(
    "body",
    [_buffer_before, _buffer_after, _constant_before, _constant_by_a_function, _constant_item, _constant_view],
)
def test_a_constant_is_overwritten_before_or_after_the_streamed_call_as_in_the_plain_forward(body: Function) -> None:
    assert_exact(net(body), (2, 2, 9, 8), 3, whole=True)
    assert_exact_in_inference(net(body), 3, (2, 2, 9, 8))


@pytest.mark.parametrize("reduced", [torch.mean, lambda scale: F.avg_pool2d(scale, 1)], ids=["mean", "pooling"])
def test_a_constant_that_is_overwritten_after_the_streamed_call_read_it_can_be_used_in_inference_alone(
    reduced: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """The streamed call saves its inputs for the backward pass, whose version autograd then finds changed."""

    def body(m: Any, x: torch.Tensor) -> Any:
        scale = m.scale * 1.0
        y = m.first(x) + scale
        scale.mul_(2)
        return m.second(y) * reduced(scale)

    model = net(body)
    assert_exact_in_inference(copy.deepcopy(model), 3, (2, 2, 9, 8))
    converted = fxstream.convert(model, 3)
    assert handed_over(converted) == ["second"]
    loss = converted(torch.randn(2, 2, 9, 8)).sum()
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()


# The image.


def test_a_model_that_overwrites_the_image_is_refused() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 3, 3))
    with pytest.raises(fxstream.NothingToStreamError, match="0 overwrites the image in place"):
        fxstream.convert(model, 8)


def test_a_model_that_overwrites_the_image_through_another_value_is_refused() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.same(x)
        z = m.conv(y)
        y.sub_(y.mean())
        return z.mean() + y.sum()

    model = Body(body, same=nn.Identity(), conv=nn.Conv2d(2, 3, 3))
    with pytest.raises(fxstream.NothingToStreamError, match="same shares memory that sub_, which is not streamed"):
        fxstream.convert(model, 4)
