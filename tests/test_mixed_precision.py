"""Autocast, gradient scaling, low precision and memory formats: as with the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import Shapes, assert_close, each_once, gradients, pair, randomise
from torch import nn

import fxstream
from fxstream.ops import Local
from fxstream.testing import relative_error

BF16, FP16 = torch.bfloat16, torch.float16
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = ["cpu", GPU]

SEEN: list[tuple[torch.dtype, bool]] = []
"""What `spy` has seen, on whole values or on blocks: the type, and whether channels are innermost in memory."""
GRADIENTS: list[bool] = []
"""The latter of the gradients that it has been given."""


def spy(x: torch.Tensor) -> torch.Tensor:
    SEEN.append((x.dtype, x.stride(1) < x.stride(-1)))
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda gradient: GRADIENTS.append(gradient.stride(1) < gradient.stride(-1)))
    return x


@fxstream.register(spy)
def _spy(x: Any) -> Local:
    return Local((x,), x.dims, spy)


class Net(nn.Module):
    """Convolutions, which autocast casts down; a softplus, which it casts up on a GPU; and a sum of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = spy(self.first(x))
        x = F.relu(self.norm(x))
        x = x + F.softplus(spy(self.second(x)))
        features = spy(self.third(x))
        return features, self.head(features.mean((2, 3)))


class Shared(nn.Module):
    """One convolution is used in the streamed part and in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.GroupNorm(1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(F.relu(self.conv(x))))
        return self.conv(self.norm(x)).mean((2, 3))


def net() -> nn.Module:
    return randomise(Net()).eval()


def shared_pair() -> tuple[nn.Module, Any]:
    with pytest.warns(fxstream.StreamingWarning, match="streaming ends at relu_1"):
        return pair(randomise(Shared()), 8)


def assert_close_and_not_zero(
    got: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None], tolerance: float
) -> None:
    """Half precision may round to zero what a test is about."""
    for name, tensor in expected.items():
        assert tensor is not None, name
        assert tensor.any(), name
    assert_close(got, expected, tolerance)


Region = Sequence[tuple[torch.dtype, bool]]
"""Nested regions of autocast, the outermost first: the type, and whether it is enabled."""


@contextmanager
def autocast(region: Region, device: str) -> Iterator[None]:
    with ExitStack() as stack:
        for dtype, enabled in region:
            stack.enter_context(torch.autocast(device, dtype, enabled))
        yield


REGIONS: list[Region] = [
    [],
    [(BF16, True)],
    [(FP16, True)],
    [(BF16, True), (BF16, False)],
    [(BF16, True), (BF16, False), (FP16, True)],
    [(FP16, False), (BF16, True)],
]


@pytest.mark.parametrize("device", DEVICES)
@each_once(around=[[], [(BF16, True)], [(FP16, True)], [(BF16, True), (BF16, False)]], region=REGIONS)
def test_tiles_are_computed_again_in_the_regions_of_the_forward(region: Region, around: Region, device: str) -> None:
    image = torch.randn(1, 3, 41, 33, device=device)
    found = []
    for model in pair(net(), 8):
        model.to(device)
        SEEN.clear()
        leaf = image.clone().requires_grad_()
        with autocast(region, device):
            outputs = model(leaf)
        forward = {dtype for dtype, _ in SEEN}
        SEEN.clear()
        with autocast(around, device):
            (outputs[0].float().square().mean() + outputs[1].float().sum()).backward()
        again = {dtype for dtype, _ in SEEN}
        assert leaf.grad is not None
        found.append((forward, again, dict(enumerate(outputs)), {"image": leaf.grad, **gradients(model)}))
    (types, none, *expected), (forward, again, *got) = found
    assert forward == again == types
    assert not none
    tolerance = 1e-5 if types == {torch.float32} else 1e-2  # float16 has 11 bits, bfloat16 has 8
    for one, other in zip(got, expected, strict=True):
        assert_close_and_not_zero(one, other, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("inference_first", [False, True])
def test_a_module_in_the_streamed_part_and_in_the_head_gets_both_gradients(
    inference_first: bool, dtype: torch.dtype, device: str
) -> None:
    image = torch.randn(2, 3, 24, 20, device=device)
    found = []
    for model in shared_pair():
        model.to(device)
        with torch.autocast(device, dtype):
            if inference_first:
                with torch.no_grad():
                    model(image)
            output = model(image)
        output.float()[:, 1].sum().backward()
        found.append(gradients(model))
    if inference_first and found[0]["conv.weight"] is None:
        pytest.skip("torch before 2.11: a weight that inference has cast has no gradient, in the plain model either")
    assert_close_and_not_zero(found[1], found[0], 2e-2)


@pytest.mark.parametrize("grad", [False, True])
def test_what_the_scan_has_cast_is_not_handed_to_the_head(grad: bool) -> None:
    """Before torch 2.11, a weight that was cast without a graph would be cached, and have no gradient in the head."""

    _, converted = shared_pair()
    image = torch.randn(1, 3, 24, 20)
    with torch.autocast("cpu", BF16), torch.set_grad_enabled(grad):
        converted.streamed(image)
        with Shapes(torch.ops.aten._to_copy) as cast:
            converted.conv(image)
        assert cast.shapes.count(tuple(converted.conv.weight.shape)) == 1
        assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (BF16, 2e-2), (FP16, 5e-3)])
def test_a_gradient_scaler_skips_the_same_steps_and_ends_with_the_same_parameters(
    dtype: torch.dtype | None, tolerance: float, device: str
) -> None:
    found = []
    for model in pair(net(), 8):
        model.to(device)
        start = copy.deepcopy(model.state_dict())
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**4, growth_interval=2)
        generator = torch.Generator().manual_seed(1)
        scales, skipped = [], []
        for step in range(5):
            image = torch.randn(2, 3, 29, 24, generator=generator).to(device)
            optimiser.zero_grad()
            with torch.autocast(device, dtype or BF16, enabled=dtype is not None):
                loss = model(image)[1].float().square().sum() * (torch.inf if step == 2 else 1)
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            skipped.append(not all(gradient.isfinite().all() for gradient in gradients(model).values()))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimiser)
            scaler.update()
            scales.append(scaler.get_scale())
        moved = {name: tensor - start[name] for name, tensor in model.state_dict().items() if "norm.r" not in name}
        found.append((scales, skipped, {name: tensor for name, tensor in moved.items() if tensor.is_floating_point()}))
    assert found[1][:2] == found[0][:2]
    assert found[0][0][1:3] == [2.0**5, 2.0**4]
    assert found[0][1] == [False, False, True, False, False]
    assert_close_and_not_zero(found[1][2], found[0][2], tolerance)


CASTS: list[tuple[Callable[[nn.Module], nn.Module], float]] = [
    (lambda model: model.double(), 1e-10),
    (lambda model: model.to(torch.float64), 1e-10),
    (lambda model: model.half(), 1e-2),
    (lambda model: model.bfloat16(), 5e-2),
    (lambda model: model.double().float(), 1e-5),
    pytest.param(lambda model: model.to("cuda"), 1e-4, marks=GPU.marks),
    pytest.param(lambda model: model.cuda().cpu().double(), 1e-10, marks=GPU.marks),
]


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize(
    ("cast", "tolerance"), CASTS, ids=["double", "to float64", "half", "bfloat16", "and back", "cuda", "cuda and back"]
)
def test_a_converted_model_can_be_cast_and_moved(
    cast: Callable[[nn.Module], nn.Module], tolerance: float, used_before: bool
) -> None:
    found = []
    for model in pair(net(), 8):
        if used_before:
            model(torch.randn(1, 3, 30, 30))[1].sum().backward()
            model.zero_grad()
        cast(model)
        parameter = next(model.parameters())
        image = torch.linspace(-1, 1, 3 * 41 * 33).view(1, 3, 41, 33).sin().to(parameter).requires_grad_()
        features, scores = model(image)
        (features.square().mean() + scores.sum()).backward()
        assert image.grad is not None
        found.append({"features": features, "scores": scores, "image": image.grad, **gradients(model)})
    assert_close_and_not_zero(found[1], found[0], tolerance)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_gradients_of_many_tiles_are_summed_in_float32(dtype: torch.dtype) -> None:
    class Saturated(nn.Module):
        """With two parameters, one of which is sliced along the width with the image."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.column = nn.Parameter(torch.rand(2, 1, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.conv(x) + self.column)

    plain, converted = pair(Saturated(), 2)
    exact = copy.deepcopy(plain).double()
    image = torch.rand(1, 2, 64, 64)
    for model, kind in ((plain, dtype), (converted, dtype), (exact, torch.double)):
        model.to(kind)(image.to(kind)).mean().backward()
    for name, expected in gradients(exact).items():
        errors = [relative_error(gradients(model)[name].double(), expected) for model in (converted, plain)]
        assert errors[0] <= 1.5 * errors[1] + 1e-3, name


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 4, 3, padding=1)
        self.third = nn.Conv3d(4, 5, 3, stride=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = spy(self.third(F.relu(spy(self.first(x)))))
        return features, features.mean((2, 3, 4))


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize(
    ("build", "shape"), [(Net, (2, 3, 40, 32)), (Volume, (2, 3, 9, 12, 10))], ids=["plane", "volume"]
)
def test_memory_formats_are_those_of_the_plain_model(
    build: Callable[[], nn.Module], shape: tuple[int, ...], images: bool, weights: bool, device: str
) -> None:
    memory_format = FORMATS[len(shape)]
    found = []
    for model in pair(randomise(build()).eval(), 8):
        model.to(device)
        if weights:
            model.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's own documentation has it so
        image = torch.randn(shape, device=device)
        image = (image.contiguous(memory_format=memory_format) if images else image).requires_grad_()
        SEEN.clear()
        GRADIENTS.clear()
        features, scores = model(image)
        (features.square().sum() + scores.sum()).backward()
        assert image.grad is not None
        tensors = {"features": features, "image": image.grad, **gradients(model)}
        strides = {name: tensor.stride() for name, tensor in tensors.items()}
        found.append((strides, {innermost for _, innermost in SEEN}, set(GRADIENTS)))
    assert found[1] == found[0]
    if images and weights and device == "cpu":  # cuDNN chooses formats of its own
        assert found[0][1:] == ({True}, {True})


def test_a_crop_or_a_permuted_output_keeps_the_order_of_its_dimensions_in_memory() -> None:
    class Cropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.conv(x)
            return x[..., 1:-1], x.permute(0, 3, 1, 2)

    plain, converted = pair(Cropped().to(memory_format=torch.channels_last), 6)  # type: ignore[call-overload]
    image = torch.randn(2, 3, 20, 17).contiguous(memory_format=torch.channels_last)
    for got, expected in zip(converted(image), plain(image), strict=True):
        order, wanted = (sorted(range(4), key=tensor.stride) for tensor in (got, expected))
        assert order == wanted
