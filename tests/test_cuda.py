"""Models on a GPU: a streamed step against the plain one there, its memory, its random numbers, and its streams."""

from __future__ import annotations

import copy
import runpy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from reference import assert_close, freeze_batchnorms, gradients, pair, randomise
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.models.convnext import CNBlockConfig

import fxstream

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MIB = 2**20
PLACES = ["device", "pageable", "pinned"]
"""Where the image is: with the model on the GPU, or in one of two kinds of host memory."""


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def put(image: torch.Tensor, place: str) -> torch.Tensor:
    if place == "pinned":
        return image.pin_memory()
    return image.to(DEVICE) if place == "device" else image


def step(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Outputs and gradients of one training step. The gradient of the image must be where the image is."""
    image = image.detach().requires_grad_()
    model.zero_grad()
    outputs = tree_leaves(model(image))
    losses = []
    for output in outputs:
        assert output.device.type == DEVICE
        weights = torch.linspace(-1, 1, output.numel(), device=DEVICE, dtype=output.dtype)
        losses.append((output * weights.view(output.shape)).sum())
    torch.stack(losses).sum().backward()
    assert image.grad is not None
    assert image.grad.device == image.device
    numbered = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    # Copies: the next step on the same model would change the gradients themselves.
    named = {name: None if grad is None else grad.clone() for name, grad in gradients(model).items()}
    return {**numbered, "the image": image.grad.to(DEVICE), **named}


def check(
    build: Callable[[], nn.Module], shape: tuple[int, ...], tile: Any, place: str = "device", **options: Any
) -> None:
    """A step of the converted model against one of the plain model, in float64."""
    plain, converted = pair(build().double().to(DEVICE), tile, **options)
    if options.get("freeze_batchnorm"):
        freeze_batchnorms(plain)
    image = torch.randn(shape, dtype=torch.float64)
    assert_close(step(converted, put(image, place)), step(plain, image.to(DEVICE)))


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=5).eval()


def resnet50() -> nn.Module:
    return torchvision.models.resnet50(num_classes=5, width_per_group=16).eval()


def convnext() -> nn.Module:
    widths = 16, 32, 48, 64, None
    stages = [CNBlockConfig(widths[i], widths[i + 1], 2) for i in range(4)]
    model = torchvision.models.ConvNeXt(stages, num_classes=5, layer_scale=1.0)
    return model.eval()


def unet() -> nn.Module:
    cases = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "cases.py"))
    model: nn.Module = cases["UNet"](width=4)
    return model


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any]] = {
    "resnet18": (resnet18, (2, 3, 131, 99), 48),
    "resnet50": (resnet50, (1, 3, 131, 99), (None, 40)),
    "convnext": (convnext, (1, 3, 133, 97), 37),
    "unet": (unet, (1, 3, 80, 112), (33, 29)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NETS)
def test_a_step_is_that_of_the_plain_model(name: str, place: str) -> None:
    check(*NETS[name], place)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("budget", ["2MB", "8MB", "1GiB"])
def test_with_a_memory_budget_a_step_is_as_exact(budget: str, place: str) -> None:
    check(*NETS["resnet18"], place, memory_budget=budget)


@pytest.mark.parametrize("place", ["device", "pageable"])
def test_with_tiles_of_a_size_that_fits_a_step_is_as_exact(place: str) -> None:
    check(resnet18, (1, 3, 301, 283), "auto", place, memory_budget="200MB")


@pytest.mark.parametrize("place", ["device", "pageable"])
def test_with_frozen_batch_norms_a_step_is_as_exact(place: str) -> None:
    check(lambda: resnet18().train(), (2, 3, 131, 99), 48, place, freeze_batchnorm=True)


@pytest.mark.parametrize("place", PLACES)
def test_batches_may_be_streamed_by_images(place: str) -> None:
    check(resnet18, (5, 3, 70, 61), (2, None, 32, None), place)


def between(*layers: nn.Module, dims: int = 2) -> Callable[[], nn.Module]:
    """Layers of eight channels between convolutions, so that they read blocks, and their results are read."""
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return lambda: nn.Sequential(kind(3, 8, 3, padding=1), nn.Tanh(), *copy.deepcopy(layers), kind(8, 4, 3))


PLANE = (2, 3, 43, 38)
OPERATIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any]] = {
    **{
        f"{mode} {factor}, align_corners={corners}": (
            between(nn.Upsample(scale_factor=factor, mode=mode, align_corners=corners)),
            PLANE,
            (11, 13),
        )
        for mode in ("bilinear", "bicubic")
        for factor in (2, 1.7)
        for corners in (False, True)
    },
    "bilinear to a size": (between(nn.Upsample((61, 29), mode="bilinear")), PLANE, (11, 13)),
    "nearest": (between(nn.Upsample(scale_factor=2)), PLANE, (11, 13)),
    "nearest 1.7": (between(nn.Upsample(scale_factor=1.7)), PLANE, (11, 13)),
    "nearest-exact": (between(nn.Upsample(scale_factor=1.7, mode="nearest-exact")), PLANE, (11, 13)),
    "trilinear": (
        between(nn.Upsample(scale_factor=2, mode="trilinear"), dims=3),
        (1, 3, 9, 13, 11),
        (4, 5, 6),
    ),
    "maximum with padding": (between(nn.MaxPool2d(3, 2, padding=1)), PLANE, (11, 13)),
    "maximum with ceil": (between(nn.MaxPool2d(3, 2, ceil_mode=True)), PLANE, (11, 13)),
    "dilated maximum": (between(nn.MaxPool2d(3, 2, padding=1, dilation=2)), PLANE, (11, 13)),
    "average with padding": (between(nn.AvgPool2d(3, 2, padding=1)), PLANE, (11, 13)),
    "average without padding's share": (
        between(nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False)),
        PLANE,
        (11, 13),
    ),
    "transposed": (between(nn.ConvTranspose2d(8, 8, 3, 2, padding=1, output_padding=1)), PLANE, (11, 13)),
    "transposed, dilated": (between(nn.ConvTranspose2d(8, 8, 3, 2, dilation=2)), PLANE, (11, 13)),
    "depthwise": (between(nn.Conv2d(8, 8, 7, padding=3, groups=8)), PLANE, (11, 13)),
    "dilated": (between(nn.Conv2d(8, 8, 3, padding=4, dilation=4)), PLANE, (11, 13)),
    "reflected": (between(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")), PLANE, (11, 13)),
    "replicated": (between(nn.ReplicationPad2d((1, 2, 3, 0))), PLANE, (11, 13)),
    "batch norm": (lambda: randomise(between(nn.BatchNorm2d(8))().eval()), PLANE, (11, 13)),
    "pixel shuffle": (between(nn.Conv2d(8, 32, 1), nn.PixelShuffle(2)), PLANE, (11, 13)),
    "sequence": (between(nn.MaxPool1d(2), nn.Conv1d(8, 8, 5, stride=2), dims=1), (2, 3, 201), 23),
    "volume": (
        between(nn.MaxPool3d(2), nn.Conv3d(8, 8, 3, padding=1), dims=3),
        (1, 3, 19, 22, 21),
        (5, 9, 8),
    ),
}


@pytest.mark.parametrize("place", ["device", "pageable"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_the_plain_model(name: str, place: str) -> None:
    check(*OPERATIONS[name], place)


@pytest.mark.parametrize("place", PLACES)
def test_channels_last(place: str) -> None:
    model = resnet18().double().to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own documentation has it so
    plain, converted = pair(model, 48)
    image = torch.randn(2, 3, 131, 99, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    assert_close(step(converted, put(image, place)), step(plain, image.to(DEVICE)))


@pytest.mark.parametrize("place", PLACES)
def test_a_step_on_another_stream_is_as_exact(place: str) -> None:
    plain, converted = pair(resnet18().double().to(DEVICE), 48)
    image = torch.randn(2, 3, 131, 99, dtype=torch.float64)
    moved = image.to(DEVICE)
    expected = step(plain, moved)
    stream = torch.cuda.Stream()
    for _ in range(3):
        given = moved if place == "device" else put(image, place)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = step(converted, given)
        torch.cuda.current_stream().wait_stream(stream)
        assert_close(found, expected)


@pytest.mark.parametrize("place", PLACES)
def test_two_calls_before_one_backward_pass(place: str) -> None:
    plain, converted = pair(resnet18().double().to(DEVICE), 48)
    images = [torch.randn(1, 3, 131, 99, dtype=torch.float64) for _ in range(2)]
    found = []
    for model, where in ((plain, "device"), (converted, place)):
        leaves = [put(image, where).detach().requires_grad_() for image in images]
        outputs = [model(leaf) for leaf in leaves]
        (outputs[0] * outputs[1]).sum().backward()
        found.append({str(index): leaf.grad.to(DEVICE) for index, leaf in enumerate(leaves)} | gradients(model))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", NETS)
def test_inference(name: str, mode: Callable[[], Any], place: str) -> None:
    build, shape, tile = NETS[name]
    plain, converted = pair(build().double().to(DEVICE), tile)
    image = torch.randn(shape, dtype=torch.float64)
    with mode():
        assert_close({"output": converted(put(image, place))}, {"output": plain(image.to(DEVICE))})


def test_a_converted_model_moves_there_and_back() -> None:
    plain, converted = pair(resnet18().double(), 48)
    image = torch.randn(2, 3, 131, 99, dtype=torch.float64)
    plain.to(DEVICE)
    expected = step(plain, image.to(DEVICE))
    before = plain.cpu()(image)
    for _ in range(2):
        assert_close({"output": converted.cpu()(image)}, {"output": before})
        assert_close(step(converted.to(DEVICE), image.to(DEVICE)), expected)
    assert_close(step(copy.deepcopy(converted), image.to(DEVICE)), expected)


def test_a_model_that_was_converted_on_the_gpu_is_copied_with_its_parameters() -> None:
    plain, converted = pair(resnet18().double().to(DEVICE), 48)
    image = torch.randn(2, 3, 131, 99, dtype=torch.float64, device=DEVICE)
    copied = copy.deepcopy(converted)
    for parameter in converted.parameters():
        parameter.data.zero_()
    assert_close(step(copied, image), step(plain, image))


# Random numbers.


class Dropping(nn.Module):
    """A dropout between convolutions; what it reads and what it returns come out, too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Conv2d(3, 8, 3), layer, nn.Conv2d(8, 4, 3)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        read = self.first(image)
        dropped = self.layer(read)
        return self.last(dropped), read, dropped


DROPOUTS = [nn.Dropout(0.4), nn.Dropout2d(0.4)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layer", DROPOUTS, ids=str)
def test_gradients_are_those_of_the_masks_that_were_drawn(layer: nn.Module, place: str) -> None:
    converted = fxstream.convert(Dropping(layer).double().to(DEVICE).train(), 16)
    image = put(torch.randn(4, 3, 67, 59, dtype=torch.float64), place).requires_grad_()
    output, read, dropped = converted(image)
    factor = (dropped / read).detach()
    kept = factor != 0
    assert abs(kept.double().mean().item() - 0.6) < (0.02 if isinstance(layer, nn.Dropout) else 0.3)
    assert torch.allclose(factor[kept], torch.full_like(factor[kept], 1 / 0.6))
    weights = torch.randn_like(output)
    named = [image, *converted.parameters()]
    found = torch.autograd.grad((output * weights).sum(), named)
    replayed = converted.last(converted.first(image.to(DEVICE)) * factor)
    expected = torch.autograd.grad((replayed * weights).sum(), named)
    assert_close(dict(enumerate([output, *found])), dict(enumerate([replayed, *expected])))


@pytest.mark.parametrize("layer", DROPOUTS, ids=str)
def test_a_seed_gives_the_same_step_twice(layer: nn.Module) -> None:
    converted = fxstream.convert(Dropping(layer).double().to(DEVICE).train(), 16)
    image = torch.randn(4, 3, 67, 59, dtype=torch.float64, device=DEVICE)
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append({**step(converted, image), "drawn next": torch.rand(3, device=DEVICE)})
    assert_close(found[1], found[0])
    assert not torch.allclose(found[2]["output 0"], found[0]["output 0"])


def test_neither_tiles_nor_the_recompute_draw_from_the_generator_of_the_gpu() -> None:
    converted = fxstream.convert(Dropping(nn.Dropout(0.4)).to(DEVICE).train(), 16)
    state = torch.cuda.get_rng_state()
    output = converted(torch.randn(2, 3, 67, 59).to(DEVICE))[0]
    host = torch.get_rng_state()
    output.sum().backward()
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.equal(torch.get_rng_state(), host)


# Low precision.


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_no_worse_than_the_plain_model(dtype: torch.dtype, place: str) -> None:
    """Both steps, in float32 under autocast, against a float64 step: all outputs together, and all gradients."""
    plain, converted = pair(resnet18().to(DEVICE), 48)
    exact = copy.deepcopy(plain).double()
    image = torch.randn(2, 3, 131, 99)
    expected = _joined(step(exact, image.double().to(DEVICE)))
    errors = []
    for model, given in ((plain, image.to(DEVICE)), (converted, put(image, place))):
        leaf = given.detach().requires_grad_()
        model.zero_grad()
        with torch.autocast(DEVICE, dtype):
            output = model(leaf)
        weights = torch.linspace(-1, 1, output.numel(), device=DEVICE).view(output.shape)
        (output * weights).sum().backward()
        assert output.dtype is dtype
        errors.append((_joined({"output 0": output.detach(), **gradients(model)}) - expected).norm().item())
    assert 0 < errors[1] <= 1.5 * errors[0]


def _joined(found: dict[str, torch.Tensor | None]) -> torch.Tensor:
    tensors = (tensor for name, tensor in found.items() if name != "the image" and tensor is not None)
    return torch.cat([tensor.double().flatten() for tensor in tensors])


# Memory and synchronisation.


def peak(function: Callable[[], Any]) -> int:
    """The most bytes that a call allocates at any time beyond what is allocated before; it has been called once."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def training_step(model: nn.Module, image: torch.Tensor) -> None:
    model(image).square().mean().backward()
    model.zero_grad()


@pytest.fixture
def empty_gpu() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("place", ["device", "pageable"])
def test_a_streamed_step_takes_less_than_a_third_of_the_memory(place: str) -> None:
    plain, converted = pair(resnet18().to(DEVICE), 256)
    image = torch.randn(1, 3, 2048, 2048)
    moved = image.to(DEVICE)
    most = peak(lambda: training_step(plain, moved))
    given = moved if place == "device" else image
    streamed = peak(lambda: training_step(converted, given))
    print(f"plain {most / MIB:.0f} MiB, streamed {streamed / MIB:.0f} MiB, image: {place}")
    assert streamed < most / 3


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("tile", [256, 512])
def test_the_estimate_is_near_what_is_allocated(tile: int, mode: str) -> None:
    """The measured peak has the working memory of cuDNN beyond the bytes of tensors, and the image less."""
    model = resnet18().to(DEVICE)
    shape = (1, 3, 1536, 1536)
    image = torch.randn(shape, device=DEVICE)
    with torch.set_grad_enabled(mode == "training"):
        estimate = fxstream.analyze(model).estimate(shape, tile)
        converted = fxstream.convert(model, tile)
        run = training_step if mode == "training" else lambda model, image: model(image)
        measured = peak(lambda: run(converted, image)) + image.nbytes
    print(f"estimate {estimate.peak_bytes / MIB:.0f} MiB, measured {measured / MIB:.0f} MiB, tile {tile}, {mode}")
    assert 0.8 * estimate.peak_bytes <= measured <= 1.5 * estimate.peak_bytes + 128 * MIB


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("name", ["resnet18", "unet"])
@pytest.mark.parametrize("place", ["device", "pinned"])
def test_the_host_waits_no_oftener_where_there_are_more_tiles(name: str, place: str) -> None:
    """Counted by torch's own warnings of synchronising calls; copies out of pageable memory would be counted, too."""
    model = fxstream.convert(NETS[name][0]().to(DEVICE), 64)
    found = {}
    for edge in (256, 512):
        image = put(torch.randn(1, 3, edge, edge), place)
        training_step(model, image)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                training_step(model, image)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found[edge] = sum("synchronizing" in str(warning.message) for warning in caught)
    print(f"synchronising calls of a step by the size of the image: {found}, image: {place}")
    assert found[512] <= found[256]
