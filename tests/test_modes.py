"""train() and eval(), of the whole model and of single modules, at any time: as the plain model follows them."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from reference import (
    Replayed,
    assert_close,
    assert_exact,
    freeze_batchnorms,
    gradients,
    handed_over,
    image,
    pair,
    randomise,
)
from torch import nn

import fxstream
from fxstream.testing import compare, head


class OwnNorm(nn.BatchNorm2d):
    """A batch norm written out, as timm's BatchNormAct2d and others are: its forward branches on its mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var)
        if self.training:
            x = F.batch_norm(x, *statistics, self.weight, self.bias, True, 0.1, self.eps)
        else:
            x = F.batch_norm(x, *statistics, self.weight, self.bias, False, 0.1, self.eps)
        return F.relu(x)


def timms(channels: int) -> nn.Module:
    layer: nn.Module = pytest.importorskip("timm.layers").BatchNormAct2d(channels)
    return layer


class WithFlag(nn.Module):
    """Hands its flag to torch's function."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.mean, self.var, training=self.training)


class Net(nn.Module):
    """Normalises in the part that streams and, behind a pooling over the image, in the head."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        # Without biases, whose gradients a batch norm in training mode lets vanish.
        self.conv, self.norm = nn.Conv2d(3, 4, 3, stride=2, bias=False), norm(4)
        self.last = nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.head = nn.Sequential(nn.Conv2d(5, 6, 1, bias=False), norm(6), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(self.norm(self.conv(x)))
        return self.head(F.adaptive_avg_pool2d(x, 4))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "torch": nn.BatchNorm2d,
    "subclass": type("Subclass", (nn.BatchNorm2d,), {}),
    "own forward": OwnNorm,
    "timm": timms,
}


def net(norm: Callable[[int], nn.Module]) -> nn.Module:
    return randomise(Net(norm).double())


IMAGE = (2, 3, 33, 29)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxstream.StreamingWarning)
        yield


@pytest.mark.parametrize("norm", [*NORMS, "function"])
@pytest.mark.parametrize("start", [True, False], ids=["converted in train mode", "converted in eval mode"])
def test_frozen_batch_norms_stay_so_in_every_mode(norm: str, start: bool) -> None:
    """Those in the head as well as the streamed ones."""
    plain, converted = pair(net({**NORMS, "function": WithFlag}[norm]).train(start), 8, freeze_batchnorm=True)
    assert handed_over(converted) == ["last"]
    changes: list[Callable[[Any], Any]] = [
        lambda model: model,
        lambda model: model.train(),
        lambda model: model.eval(),
        lambda model: model.head.train(),
        lambda model: model.norm.train(),
    ]
    for change in changes:
        change(plain)
        plain.norm.eval()
        plain.head[1].eval()
        change(converted)
        compare(plain, converted, torch.randn(IMAGE))
        assert converted.training == plain.training
        assert norm == "function" or not converted.get_submodule("head.1").training
    # How often they were updated is among the buffers.
    assert_close(dict(converted.named_buffers()), dict(plain.named_buffers()))


def test_a_frozen_batch_norm_without_running_statistics_normalises_by_the_batch() -> None:
    plain, converted = pair(net(lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)), 8)
    frozen = fxstream.convert(copy.deepcopy(plain), 8, freeze_batchnorm=True)
    assert handed_over(converted) == handed_over(frozen) == ["conv"]
    for model in (converted, frozen):
        compare(plain.train(), model.train(), torch.randn(IMAGE))


def test_deeplab_trains_with_one_image_if_batch_norms_are_frozen() -> None:
    """Its head normalises a pooled value, of which there is one per image."""
    model = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3, aux_loss=True
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain, converted = pair(randomise(model).double().train(), 48, freeze_batchnorm=True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        copy.deepcopy(plain)(torch.randn(1, 3, 65, 49).double())
    freeze_batchnorms(plain)
    compare(plain, converted, torch.randn(1, 3, 65, 49))


@pytest.mark.parametrize("norm", NORMS)
def test_a_streamed_batch_norm_in_training_mode_is_an_error(norm: str) -> None:
    plain, converted = pair(net(NORMS[norm]).eval(), 8)
    compare(plain, converted, torch.randn(IMAGE))
    converted.train()
    with pytest.raises(fxstream.BatchNormModeError, match=r"^norm is in training mode.*freeze_batchnorm=True"):
        converted(torch.randn(IMAGE).double())
    converted.norm.eval()
    plain.train()
    plain.norm.eval()
    compare(plain, converted, torch.randn(IMAGE))


@pytest.mark.parametrize("norm", NORMS)
def test_a_batch_norm_that_ended_the_prefix_follows_its_mode(norm: str) -> None:
    plain, converted = pair(net(NORMS[norm]).train(), 8)
    assert handed_over(converted) == ["conv"]
    for mode in (True, False, True):
        compare(plain.train(mode), converted.train(mode), torch.randn(IMAGE))


def test_a_flag_that_is_handed_to_torch() -> None:
    plain, converted = pair(net(WithFlag).eval(), 8)
    assert handed_over(converted) == ["last"]
    compare(plain, converted, torch.randn(IMAGE))
    converted.head.train()
    plain.head.train()
    compare(plain, converted, torch.randn(IMAGE))
    converted.train()
    with pytest.raises(fxstream.BatchNormModeError, match=r"^norm: batch_norm is in training mode"):
        converted(torch.randn(IMAGE).double())


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_model_whose_structure_depends_on_its_mode(name: str) -> None:
    model = torchvision.models.get_model(name, init_weights=False, aux_logits=True).double()
    for mode, converting in ((True, "train"), (False, "eval")):
        converted = fxstream.convert(model.train(mode), 64, freeze_batchnorm=True, prove=False)
        with pytest.raises(
            fxstream.ModeError, match=rf"the model depends on its mode: it was converted in {converting}"
        ):
            converted.train(not mode)(torch.randn(2, 3, 75, 75).double())


def test_a_model_whose_structure_depends_on_its_mode_is_exact_in_that_mode() -> None:
    model = torchvision.models.googlenet(init_weights=False, aux_logits=True, num_classes=5).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    last = ["cat_2", "cat_5", "avgpool"]
    assert_exact(randomise(model), (2, 3, 171, 187), 96, last=last, freeze_batchnorm=True)


class Auxiliary(nn.Module):
    """A module of the head that branches on its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if self.training else x.relu()


def test_a_branch_in_the_head_follows_its_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Auxiliary()).double().eval()
    model, converted = pair(model, 8)
    assert head(converted) == ["_2", "_3"]
    for mode in (True, False):
        compare(model.train(mode), converted.train(mode), torch.randn(IMAGE))


def test_a_branch_in_the_prefix_is_named() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if self.training else x

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Branch()), nn.Conv2d(4, 4, 3))
    converted = fxstream.convert(model.eval(), 8)
    converted.get_submodule("1.0").train()
    with pytest.raises(fxstream.ModeError, match=r"^the forward of 1\.0 depends on its mode: it was converted in eval"):
        converted(torch.randn(IMAGE))


# Flags that are asked and decide nothing.


class Deep(nn.Module):
    """Returns an auxiliary output in training mode, if there is a layer for it; and takes a second branch."""

    def __init__(self, supervised: bool = False) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 4, 3), nn.Sequential(Gate())
        self.auxiliary = nn.Conv2d(4, 2, 1)
        self.supervised = supervised

    def forward(self, x: torch.Tensor) -> Any:
        y = self.inner(self.conv(x))
        if self.training and self.supervised:
            return y, self.auxiliary(y)
        return y * 2


class Gate(nn.Module):
    """Branches on one of two flags, its own or that of a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() if self.training or self.drop.training else x.tanh()


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("duplicate", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_flag_that_decides_nothing_may_change(start: bool, duplicate: Callable[[Any], Any]) -> None:
    model = Deep().double()
    for module in model.modules():
        module.training = start
    plain, converted = pair(model, 8)
    converted = duplicate(converted)
    for mode in (not start, start, not start):
        for net in (plain, converted):
            net.training = mode
            net.conv.train(mode)
        compare(plain, converted, torch.randn(IMAGE))
    assert len(converted.streamed._other_modes) == 1, "traced more often than needed"


def test_an_attribute_that_is_read_in_another_mode_only_is_watched() -> None:
    plain, converted = pair(Deep().double().eval(), 8)
    for net in (plain, converted):
        net.training = True
    compare(plain, converted, torch.randn(IMAGE))
    converted.supervised = True
    with pytest.raises(fxstream.AttributeChangedError, match="supervised was False"):
        converted(image())
    converted.eval()
    compare(plain.eval(), converted, torch.randn(IMAGE))


def test_a_flag_that_decides_together_with_another_is_not_dropped() -> None:
    """Either of two flags may change, as long as the other one is still set."""
    plain, converted = pair(Deep().double().train(), 8)
    gates = [model.get_submodule("inner.0") for model in (plain, converted)]
    for gate in gates:
        gate.training = False
    compare(plain, converted, torch.randn(IMAGE))
    for gate in gates:
        gate.drop.training = False
    with pytest.raises(fxstream.ModeError, match=r"^the forward of inner\.0 depends on its mode"):
        converted(image())
    for gate in gates:
        gate.training = True
    compare(plain, converted, torch.randn(IMAGE))


def test_a_flag_that_decides_is_an_error_where_the_model_s_class_is_not_known() -> None:
    class Local(Deep):
        pass

    converted = pickle.loads(pickle.dumps(fxstream.convert(Local().double().eval(), 8)))
    converted.training = True
    with pytest.raises(fxstream.ModeError, match=r"^the forward of the model depends on its mode"):
        converted(image())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "regnetx_002", "hrnet_w18_small"])
def test_timms_models_stream_to_their_global_pooling(name: str) -> None:
    """Their batch norms are classes of their own."""
    model = pytest.importorskip("timm").create_model(name)
    (stop,) = fxstream.analyze(model, freeze_batchnorm=True).stops
    assert "pools over the whole image" in stop.reason


def test_a_model_of_timm_trains_exactly() -> None:
    model = randomise(pytest.importorskip("timm").create_model("resnet14t", num_classes=3)).double().train()
    model, converted = pair(model, 40, freeze_batchnorm=True)
    compare(model.eval(), converted.train(), torch.randn(1, 3, 97, 71))


# Between forward and backward.


def test_a_model_in_eval_mode_may_be_put_into_training_mode_between_forward_and_backward() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.RReLU(), nn.Conv2d(4, 4, 3)).double().eval()
    found = []
    for net in pair(model, 8):
        loss = net(image()).square().sum()
        net.train()
        loss.backward()
        found.append(gradients(net))
    assert_close(found[1], found[0])


class Noisy(nn.Module):
    """Dropouts and batch norms in front; returns what the dropouts get and give, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.4)
        self.drop_channels = nn.Dropout2d(0.4)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        before = F.softplus(self.norm(self.first(x)))
        after = self.drop(before)
        between = F.softplus(self.second(after))
        beyond = self.drop_channels(between)
        return self.third(beyond), before, after, between, beyond


def _to_eval(model: nn.Module) -> None:
    model.eval()


def _out_and_in(model: nn.Module) -> None:
    model.eval().train()


def _other_rates(model: nn.Module) -> None:
    model.get_submodule("drop").p = 0.9  # type: ignore[assignment]  # torch says that attributes are tensors


def _another_call(model: nn.Module) -> None:
    model(image(seed=5))


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("change", [_to_eval, _out_and_in, _other_rates, _another_call])
def test_the_modes_of_dropouts_and_batch_norms_may_change_between_forward_and_backward(
    change: Callable[[nn.Module], None], freeze: bool
) -> None:
    plain = randomise(Noisy()).double().eval()
    model = copy.deepcopy(plain)
    model.train(freeze)
    for dropout in (model.drop, model.drop_channels):
        dropout.train()
    converted = fxstream.convert(model, 8, freeze_batchnorm=freeze)
    leaf = image().requires_grad_()
    outputs = converted(leaf)
    change(converted)
    outputs[0].sin().sum().backward()
    _, before, after, between, beyond = outputs
    assert 0.3 < (after == 0).double().mean() < 0.5
    plain.drop = Replayed([(after / before).detach()])
    plain.drop_channels = Replayed([(beyond / between).detach()])
    twin = image().requires_grad_()
    plain(twin)[0].sin().sum().backward()
    assert_close({"image": leaf.grad, **gradients(converted)}, {"image": twin.grad, **gradients(plain)})
