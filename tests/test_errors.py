"""Errors are part of the interface: each misuse its own, naming the node by its path, the reason and the way out."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from reference import Body
from torch import nn

import fxstream
from fxstream.testing import head


def small(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, **options), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()


@pytest.mark.parametrize("tile_shape", [0, -1, (32,), (32, 0), (1, 3, 32), (32, 32.0), "32", True, None, (None, None)])
def test_a_wrong_tile_shape(tile_shape: Any) -> None:
    with pytest.raises(fxstream.TileShapeError, match="tile_shape"):
        fxstream.convert(small(), tile_shape)


@pytest.mark.parametrize(
    "tile_shape", [8, (8, 5), [8, 5], (None, 3, 8, 8), (1, 3, 8, 8), (2, None, 8, None), (None, 8)]
)
def test_the_forms_of_tile_shape(tile_shape: Any) -> None:
    model = small()
    image = torch.randn(3, 3, 21, 17)
    torch.testing.assert_close(fxstream.convert(model, tile_shape)(image), model(image))


def test_number_of_spatial_axes_from_an_example() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sigmoid())
    with pytest.raises(fxstream.TileShapeError, match="example_input"):
        fxstream.convert(model, 8)
    with pytest.raises(fxstream.TileShapeError, match="2 dimensions"):
        fxstream.convert(model, 8, example_input=torch.zeros(3, 3))
    converted = fxstream.convert(model, 8, example_input=torch.zeros(1, 3, 20, 20, 20))
    image = torch.randn(1, 3, 20, 21, 9)
    torch.testing.assert_close(converted(image), model(image))


def test_channels_that_disagree() -> None:
    with pytest.raises(fxstream.InputError, match="4 channels"):
        fxstream.convert(small(), (None, 4, 8, 8), prove=False)(torch.randn(1, 3, 20, 20))
    with pytest.raises(fxstream.InputError, match=r"0 has a kernel for 3 channels and gets 4"):
        fxstream.convert(small(), 8, prove=False)(torch.randn(1, 4, 20, 20))


@pytest.mark.parametrize("shape", [(3, 20, 20), (1, 1, 3, 20, 20), (0, 3, 20, 20)])
def test_an_image_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(fxstream.InputError, match=r"\(N, C, H, W\)|empty"):
        fxstream.convert(small(), 8)(torch.randn(shape))


def test_an_image_that_is_no_tensor() -> None:
    with pytest.raises(fxstream.InputError, match="must be a tensor"):
        fxstream.convert(small(), 8)([1, 2, 3])


@pytest.mark.parametrize(
    ("model", "least"),
    [
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 2, 5, dilation=2)), 9),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 2, 3, padding=3, padding_mode="reflect")), 4),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(4)), 4),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(4, ceil_mode=True)), 1),
        (nn.Sequential(nn.ReLU(), nn.AvgPool2d(3, 2, padding=1)), 1),
        (nn.Sequential(nn.ReLU(), nn.ZeroPad2d(-3)), 7),
    ],
)
def test_an_image_too_small_fails_where_the_plain_model_fails(model: nn.Module, least: int) -> None:
    converted = fxstream.convert(model, 4)
    enough = torch.randn(1, 3, least, least)
    torch.testing.assert_close(converted(enough), model(enough))
    if least > 1:
        for shape in ((least - 1, least), (least, least - 1)):
            short = torch.randn(1, 3, *shape)
            with pytest.raises(fxstream.ImageTooSmallError, match="too small for 1:"):
                converted(short)
            try:
                plain = model(short)
            except RuntimeError:
                continue
            assert plain.numel() == 0  # a crop that leaves nothing


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_a_model_that_cannot_be_traced() -> None:
    with pytest.raises(fxstream.TraceError, match=r"test_errors.py:\d+: return x if x.sum\(\) > 0") as caught:
        fxstream.convert(Branching(), 8)
    assert "Way out" in str(caught.value)
    assert "Branching.forward" in str(caught.value)


def test_a_submodule_that_cannot_be_traced_ends_the_prefix() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Branching(), nn.Conv2d(4, 4, 3))
    analysis = fxstream.analyze(model)
    (stop,) = analysis.stops
    assert stop.reason.startswith("1 is one opaque call: torch.fx cannot trace it")
    with pytest.warns(fxstream.StreamingWarning, match="1 is one opaque call"):
        converted = fxstream.convert(model, 8)
    for sign in (1, -1):
        image = sign * torch.rand(1, 3, 20, 20)
        torch.testing.assert_close(converted(image), model(image))


def test_nothing_local_at_the_front() -> None:
    with pytest.raises(fxstream.NothingToStreamError, match="0 needs the mean and variance") as caught:
        fxstream.convert(nn.Sequential(nn.InstanceNorm2d(3), nn.Conv2d(3, 3, 1)), 8)
    assert "Way out" in str(caught.value)


def test_batch_norm_in_training_mode_at_conversion_warns_once() -> None:
    model = torchvision.models.resnet18()
    with pytest.warns(fxstream.StreamingWarning) as caught:
        converted = fxstream.convert(model, 64)
    (warning,) = caught
    for words in ("ends at conv1", "bn1 is in training mode", "freeze_batchnorm=True", ".eval()"):
        assert words in str(warning.message)
    assert warning.filename == __file__
    assert [node.name for node in converted.streamed.graph.nodes] == ["x", "conv1", "output"]


def test_batch_norm_in_training_mode_at_a_call() -> None:
    model = torchvision.models.resnet18().eval()
    converted = fxstream.convert(model, 64)
    converted.layer2[0].bn2.train()
    with pytest.raises(fxstream.BatchNormModeError, match=r"^layer2.0.bn2 is in training mode") as caught:
        converted(torch.randn(1, 3, 64, 64))
    assert ".eval()" in str(caught.value)
    assert "freeze_batchnorm=True" in str(caught.value)
    converted.eval()
    converted(torch.randn(1, 3, 64, 64))


def test_batch_norm_without_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 3)).eval()
    for freeze in (False, True):
        with pytest.warns(fxstream.StreamingWarning, match="1 has no running statistics"):
            fxstream.convert(model, 8, freeze_batchnorm=freeze)


def test_no_warning_when_everything_that_slides_is_streamed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxstream.convert(torchvision.models.resnet18(), 64, freeze_batchnorm=True)


@pytest.mark.parametrize("path", ["layer1.0.conv1", "layer1.0", "layer3"])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_a_hook_acquired_after_the_conversion(path: str, register: str) -> None:
    converted = fxstream.convert(torchvision.models.resnet18().eval(), 64, prove=False)
    handle = getattr(converted.get_submodule(path), register)(lambda *_: None)
    with pytest.raises(fxstream.HookError, match=rf"^{path} has acquired a hook"):
        converted(torch.randn(1, 3, 64, 64))
    handle.remove()
    converted(torch.randn(1, 3, 64, 64))


def test_the_name_of_the_image_argument() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, shift: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + shift.exp()[:, :, None, None]

    model = Conditioned()
    with pytest.raises(fxstream.StreamingError, match=r"image='y' is not an argument .*\(shift, x\)"):
        fxstream.convert(model, 8, image="y")
    converted = fxstream.convert(model, 8, image="x", prove=False)
    shift, image = torch.randn(2, 4, requires_grad=True), torch.randn(2, 3, 20, 17)
    output, expected = converted(shift, image), model(shift, image)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output.sin().sum(), shift), torch.autograd.grad(expected.sin().sum(), shift)
    )


def test_the_analysis_says_where_streaming_stops_and_why() -> None:
    analysis = fxstream.analyze(torchvision.models.efficientnet_b0().eval())
    assert "adaptive" not in str(analysis.outputs)
    first = analysis.stops[0]
    assert first.reason.startswith("features.1.0.block.1.avgpool pools over the whole image along H and W")
    text = str(analysis)
    assert first.reason in text
    assert "receptive field" in text
    assert analysis.graph.nodes["features_0_0"]["status"] == "local"
    assert analysis.graph.nodes["features_1_0_block_1_avgpool"]["status"] == "stop"


def test_receptive_fields() -> None:
    analysis = fxstream.analyze(torchvision.models.resnet18().eval())
    assert analysis.receptive_field("layer4_1_relu_1") == {
        axis: fxstream.ReceptiveField(size=435, stride=32, padding=217) for axis in ("H", "W")
    }
    assert [node.name for node in analysis.outputs] == ["avgpool"]


def test_the_graphs_print_as_tables(capsys: pytest.CaptureFixture[str]) -> None:
    converted = fxstream.convert(torchvision.models.resnet18().eval(), 64, prove=False)
    assert [node.name for node in converted.graph.nodes] == ["x", "streamed", "flatten", "fc", "output"]
    converted.graph.print_tabular()
    converted.streamed.graph.print_tabular()
    text = capsys.readouterr().out
    assert "streamed" in text
    assert "layer4.1.conv2" in text


def test_what_is_not_a_model() -> None:
    with pytest.raises(TypeError, match=r"torch.nn.Module, not str"):
        fxstream.convert("resnet18", 8)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(fxstream.WrappedModelError, match=r"converted already\. Way out: set its tile_shape"):
        fxstream.convert(fxstream.convert(small(), 8), 16)
    with pytest.raises(fxstream.WrappedModelError, match=r"DataParallel.*DataParallel\(fxstream\.convert"):
        fxstream.convert(nn.DataParallel(small()), 8)


def test_an_operation_without_a_rule_is_named() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).sort(-1)[0]

    (stop,) = fxstream.analyze(Sorted()).stops
    assert stop.reason == "sort has no streaming rule (.sort()). Way out: register one, see fxstream.register."


# Sizes that do not fit, which torch would find at the call.


def test_cropping_more_than_there_is() -> None:
    """torch crops before it pads, and cannot crop more rows than there are."""
    converted = fxstream.convert(Body(lambda m, x: F.pad(m.conv(x), (2, -3)), conv=nn.Conv2d(2, 4, 1)), 3)
    with pytest.raises(fxstream.ImageTooSmallError, match="too small for pad:"):
        converted(torch.randn(1, 2, 9, 2))


def test_average_pooling_of_volumes_whose_kernel_does_not_fit_without_the_padding() -> None:
    """Unlike that of images, torch's average pooling of volumes refuses it."""
    model = nn.Sequential(nn.Conv3d(1, 1, 1), nn.AvgPool3d(3, padding=1))
    image = torch.randn(1, 1, 2, 5, 5)
    with pytest.raises(RuntimeError, match="smaller than kernel size"):
        model(image)
    converted = fxstream.convert(model, 2, prove=False)
    with pytest.raises(fxstream.ImageTooSmallError, match="too small for 1:"):
        converted(image)


def test_a_row_that_is_broadcast_along_a_streamed_axis() -> None:
    """Plain PyTorch can do that; the error must not say that the image is too small."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.first(x)
        return y * F.conv2d(y, m.second.weight[:, :, :1, :1].expand(4, 4, 9, 1) * 1.0)

    model = Body(body, first=nn.Conv2d(2, 4, 3, padding=1), second=nn.Conv2d(4, 4, 3))
    converted = fxstream.convert(model, 3, prove=False)
    with pytest.raises(fxstream.NotLocalError, match="its operands have 1 and 9 rows"):
        converted(torch.randn(1, 2, 9, 8))


def test_operands_of_different_sizes_at_a_call() -> None:
    """Whatever follows them; their size must not be taken for one that is not known yet."""
    model = Body(
        lambda m, x: m.second(m.first(x) + F.interpolate(m.first(x), size=(5, 5))),
        first=nn.Conv2d(2, 4, 3, padding=1),
        second=nn.Conv2d(4, 4, 3),
    )
    converted = fxstream.convert(model, 3, prove=False)
    with pytest.raises(fxstream.NotLocalError, match="its operands have 5 and"):
        converted(torch.randn(1, 2, 9, 9))


# What stays behind the streamed part.


def _conv(channels: int = 4) -> nn.Conv2d:
    return nn.Conv2d(channels, 4, 3, padding=1)


class Gate(nn.Module):
    """Squeeze-excite."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Secret(nn.Module):
    """Cannot be traced, nor be run without numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum().item() > 0 else x * 3


def warning_of(model: nn.Module) -> str:
    """What the conversion says, once."""
    with pytest.warns(fxstream.StreamingWarning) as caught:
        fxstream.convert(model, 8, prove=False)
    (warning,) = caught
    return str(warning.message)


def test_a_conversion_warns_once_of_the_share_of_the_work_that_stays_behind() -> None:
    text = warning_of(nn.Sequential(_conv(3), Gate(), _conv(), Gate(), _conv(), _conv()))
    share = 3 / (3 + 3 * 4)
    assert (
        f"the streamed part has {share:.1%} of the FLOPs of a forward pass (of an image of 1 x 3 x 1024 x 1024)" in text
    )
    assert "1: mean takes the mean along the streamed H and W." in text
    assert text.count("\n") == 1


def test_a_convolution_behind_a_global_pooling_is_nothing_to_warn_of() -> None:
    fxstream.convert(nn.Sequential(_conv(3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Flatten()), 8)


def test_the_work_of_a_module_that_cannot_be_traced_counts() -> None:
    class Opaque(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = x.mean()
            return super().forward(x)

    text = warning_of(nn.Sequential(_conv(3), Opaque(_conv(), _conv())))
    assert f"the streamed part has {3 / 11:.1%} of the FLOPs" in text


def test_work_that_cannot_be_counted_is_said_to_be_unknown() -> None:
    text = warning_of(nn.Sequential(_conv(3), Secret(), _conv()))
    assert "2 convolutions, poolings, batch norms and modules that cannot be traced stay behind it, whose FLOPs" in text


def test_one_reason_is_given_once_with_all_places() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = _conv(3)
            self.norms = nn.ModuleList(nn.InstanceNorm2d(4) for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return F.conv2d(torch.cat([norm(y) for norm in self.norms], 1), torch.ones(4, 24, 3, 3))

    text = warning_of(Branches())
    assert text.count("needs the mean and variance") == 1
    assert "Likewise: norms.1, norms.2, norms.3 and 2 more." in text


def test_a_reduction_behind_which_much_is_left_does_not_read_as_if_it_streamed() -> None:
    text = warning_of(nn.Sequential(_conv(3), Summed()))
    assert "is accumulated tile by tile, but what needs the result does not stream" in text


class Summed(nn.Module):
    """Adds to each position what a convolution makes of a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return self.second(mean.expand(1, 4, 512, 512))


def test_the_way_out_that_names_other_axes_can_be_followed() -> None:
    model = nn.Sequential(_conv(3), nn.Softmax(3), _conv())
    text = warning_of(model)
    assert "1 takes the softmax along the streamed W." in text
    assert "Way out: stream the images of a batch one by one, tile_shape=(1, None, None, None) or" in text
    assert "or stream along H alone, tile_shape=(None, None, 512, None)." in text
    for tile_shape in ((1, None, None, None), (None, None, 512, None)):
        assert not head(fxstream.convert(model, tile_shape))


def test_counting_runs_no_hooks_and_draws_no_random_numbers() -> None:
    model = nn.Sequential(_conv(3), Gate(), nn.Dropout(0.5), _conv())
    model[3].register_forward_hook(lambda *_: pytest.fail("a hook has run"))
    state = torch.get_rng_state()
    assert "FLOPs of a forward pass" in warning_of(model)
    assert torch.equal(state, torch.get_rng_state())
