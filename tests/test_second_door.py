"""The second door: `fxstream.compile` and the backend of torch.compile, against the plain model."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import Body, randomise
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import fxstream
from fxstream import compilation
from fxstream.compilation import named_backend
from fxstream.graph.nodes import overwrites
from fxstream.graph.prefix import Prefix
from fxstream.ops import registry
from fxstream.testing import compare

Prefixes = list[Prefix]
pytestmark = pytest.mark.filterwarnings("ignore:streaming ends at:fxstream.StreamingWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def prefixes(monkeypatch: pytest.MonkeyPatch) -> Prefixes:
    """What streams of each graph that is captured during the test."""
    found: Prefixes = []
    rewrite = compilation.rewrite

    def recording(*args: Any) -> Any:
        result = rewrite(*args)
        found.append(result[0])
        return result

    monkeypatch.setattr(compilation, "rewrite", recording)
    return found


def conv(inputs: int = 3, outputs: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def chain(*layers: nn.Module) -> nn.Module:
    """Not a Sequential itself: `model.compile()` of an old torch runs that as it is."""
    return Body(lambda self, x: self.layers(x), layers=nn.Sequential(*layers))


def net() -> nn.Module:
    return chain(conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), conv(4, 2))


def check(
    model: nn.Module,
    *sizes: tuple[int, int],
    tile: Any = 16,
    batch: int = 2,
    dynamic: bool | None = True,
    **options: Any,
) -> nn.Module:
    """Compare a copy that went through the backend with the model, on images of some sizes; returns the copy."""
    model = randomise(model.double())
    compiled = copy.deepcopy(model)
    compiled.compile(backend=fxstream.backend(tile, **options), dynamic=dynamic)
    for size in sizes or ((40, 36),):
        compare(model, compiled, torch.randn(batch, 3, *size))
    return compiled


def whole(prefixes: Prefixes) -> bool:
    """Whether all that depends on the image is streamed, in every captured graph."""
    heads = [finding.node.op for prefix in prefixes for finding in prefix.head]
    return bool(prefixes) and heads == ["output"] * len(prefixes)


# Operations as TorchDynamo writes them: parameters are inputs, sizes are numbers or symbols.

BOTH = pytest.mark.parametrize("dynamic", [None, True], ids=["numbers", "symbols"])


def shuffled(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.first(x)
    n, c, h, w = y.shape
    return self.second(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def padded_if_odd(self: Any, x: torch.Tensor) -> torch.Tensor:
    h, w = x.shape[-2:]
    y = F.max_pool2d(F.pad(self.first(x), (0, w % 2, 0, h % 2)), 2)
    return self.second(F.interpolate(y, size=(max(h, 5), w), mode="bilinear"))


def with_token(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.cat([self.token.expand(len(x), -1, *x.shape[2:]), self.first(x)], 1)
    return y * torch.empty(len(x), 1, 1, 1, dtype=x.dtype).fill_(0.5)


def overwritten(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.first(x)
    y += 1
    y.mul_(self.scale)
    return self.second(F.leaky_relu_(y * 0.7, 0.1))


class MaxNorm(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


weight_norm = nn.utils.parametrizations.weight_norm
BODIES: dict[str, Callable[[], nn.Module]] = {
    "channel shuffle": lambda: Body(shuffled, first=conv(), second=conv(4, 4)),
    "sizes that are computed": lambda: Body(padded_if_odd, first=conv(), second=conv(4, 4)),
    "parameters of the image's size": lambda: Body(
        with_token, first=conv(), token=nn.Parameter(torch.ones(1, 1, 1, 1))
    ),
    "in place": lambda: Body(overwritten, first=conv(), second=conv(4, 4), scale=nn.Parameter(torch.ones(4, 1, 1))),
    "assigned weight": lambda: chain(MaxNorm(3, 4, 3), nn.ReLU(), conv(4, 2)),
    "weight norm": lambda: chain(weight_norm(conv()), nn.PReLU(4)),
    "transposed": lambda: Body(
        lambda self, x: self.second(self.first(x), output_size=[2 * x.shape[2], 2 * x.shape[3]]),
        first=conv(),
        second=nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1),
    ),
    "norms": lambda: Body(
        lambda self, x: self.third(self.second(self.first(x)).permute(0, 2, 3, 1)).chunk(2, -1)[0],
        first=conv(),
        second=nn.InstanceNorm2d(4, track_running_stats=True),
        third=nn.LayerNorm(4),
    ),
}


@BOTH
@pytest.mark.parametrize("name", BODIES)
def test_operations_stream_whole_and_exactly(name: str, dynamic: bool | None, prefixes: Prefixes) -> None:
    check(BODIES[name]().eval(), (40, 36), (33, 36), dynamic=dynamic)
    assert whole(prefixes)


@pytest.mark.parametrize("dynamic", [False, True], ids=["numbers", "symbols"])
def test_sizes_of_a_square_image_that_are_equal_are_told_apart(dynamic: bool, prefixes: Prefixes) -> None:
    check(BODIES["channel shuffle"](), (32, 32), (32, 32), (40, 32), dynamic=dynamic)
    assert whole(prefixes)


@pytest.mark.parametrize(
    "shape", [(2, 4, 36 * 40), (8, 40, 36), (2, 4, 20, 72), (2, 40, 4, 36), (2, 4, 36, 40), (2, 4, 3, 40, 12)]
)
def test_a_reshape_that_splits_or_merges_a_streamed_axis_is_refused(shape: tuple[int, ...], prefixes: Prefixes) -> None:
    check(Body(lambda self, x: self.first(x).view(shape) * 2, first=conv()), dynamic=None)
    assert ["by reshaping" in stop.reason for stop in prefixes[0].stops] == [True] * (shape != (8, 40, 36))


def test_twenty_sizes_in_a_row_are_one_capture(prefixes: Prefixes) -> None:
    choose = random.Random(0)
    sizes = [(choose.randint(17, 60), choose.randint(17, 60)) for _ in range(20)]
    check(net().eval(), *sizes)
    assert len(prefixes) == 1


def test_a_branch_on_the_size_follows_the_guards(prefixes: Prefixes) -> None:
    model = Body(lambda self, x: self.first(x) * (2 if x.shape[2] % 4 else 3), first=conv())
    check(model, (40, 36), (41, 36), (44, 36))
    assert len(prefixes) == 2


def test_modes_and_attributes_follow_the_guards() -> None:
    model = Body(
        lambda self, x: self.second(self.first(x) * self.factor), first=conv(), second=nn.BatchNorm2d(4), factor=2
    )
    compiled = check(model.eval())
    for one in (model, compiled):
        one.factor = 3
    compare(model, compiled, torch.randn(2, 3, 40, 36))
    for one in (model, compiled):
        one.first.requires_grad_(False)
        one.train()
    compare(model, compiled, torch.randn(2, 3, 40, 36))
    assert compiled.second.num_batches_tracked == model.second.num_batches_tracked == 1


def test_the_batch_streams(prefixes: Prefixes) -> None:
    model = chain(conv(bias=False), nn.InstanceNorm2d(4, affine=True), nn.AdaptiveAvgPool2d(3))
    check(model, batch=5, tile=(2, None, None, None))
    assert whole(prefixes)


def in_windows(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Softmax in windows of four by four, as attention has it: the windows are merged into the batch, and split off."""
    y = self.first(x)
    n, c, h, w = y.shape
    windows = y.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(n * (h // 4) * (w // 4), c, 16)
    mixed = (windows.softmax(-1) * self.scale).view(n, h // 4, w // 4, c, 4, 4)
    return self.second(mixed.permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w))


@BOTH
def test_windows_are_merged_into_the_batch_and_split_off(dynamic: bool | None, prefixes: Prefixes) -> None:
    model = Body(in_windows, first=conv(), second=conv(4, 2), scale=nn.Parameter(torch.ones(16)))
    check(model, (40, 36), (16, 24), batch=5, tile=(2, None, None, None), dynamic=dynamic)
    assert whole(prefixes)


def test_a_size_that_is_that_of_the_batch_by_chance(prefixes: Prefixes) -> None:
    def body(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).permute(0, 2, 3, 1)
        return y.reshape(*y.shape[:3], 2, -1).softmax(-1).flatten(3) * self.scale

    model = Body(body, first=conv(), scale=nn.Parameter(torch.ones(4)))
    check(model, batch=2, tile=(1, None, None, None), dynamic=False)
    assert whole(prefixes)


def test_space_to_depth_of_a_known_size(prefixes: Prefixes) -> None:
    def body(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        n, c, h, w = y.shape
        return self.second(
            y.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
        )

    check(Body(body, first=conv(), second=conv(16, 2)), dynamic=False)
    assert whole(prefixes)


@pytest.mark.parametrize("rank", [3, 5])
def test_other_numbers_of_spatial_axes(rank: int, prefixes: Prefixes) -> None:
    layer: Any = {3: nn.Conv1d, 5: nn.Conv3d}[rank]
    model = chain(layer(3, 4, 3), nn.ReLU(), layer(4, 2, 3)).double()
    compiled = copy.deepcopy(model)
    compiled.compile(backend=fxstream.backend(5))
    compare(model, compiled, torch.randn(2, 3, *[13] * (rank - 2)))
    assert whole(prefixes)


@pytest.mark.parametrize("budget", ["1GiB", 100_000])
@pytest.mark.parametrize("tile", [16, "auto"])
def test_a_memory_budget(tile: Any, budget: Any) -> None:
    check(net().eval(), (80, 72), tile=tile, memory_budget="10MB" if tile == "auto" else budget)


# Instances and memory.


def test_one_capture_serves_every_instance_of_a_class(prefixes: Prefixes) -> None:
    """What the backend returns computes with its arguments alone, so that each instance has its own weights."""
    for seed in range(3):
        model = randomise(net().double().eval(), seed)
        compiled = copy.deepcopy(model)
        compiled.compile(backend=fxstream.backend(16), dynamic=True)
        compare(model, compiled, torch.randn(2, 3, 40, 36))
    assert len(prefixes) == 1


def test_nothing_of_the_capture_is_kept() -> None:
    model = fxstream.compile(net().eval(), 16)
    image = torch.randn(1, 3, 40, 36)
    weight = model.get_parameter("layers.0.weight")
    freed = [weakref.ref(image), weakref.ref(weight)]
    model(image)
    model.get_submodule("layers.0").weight = nn.Parameter(torch.zeros_like(weight))
    del image, weight
    gc.collect()
    assert [reference() for reference in freed] == [None, None]


def test_more_objects_than_captures_are_allowed(prefixes: Prefixes) -> None:
    """torch allows eight captures of a code object. Backends with the same options are one to it."""
    assert fxstream.backend(16) == fxstream.backend(16)
    assert fxstream.backend([16, 8]) == fxstream.backend((16, 8))
    assert fxstream.backend(16) != fxstream.backend(16, freeze_batchnorm=True)
    assert len({fxstream.backend(16), fxstream.backend(16), fxstream.backend(8)}) == 2
    model = net().eval()
    for _ in range(10):
        torch.compile(model, backend=fxstream.backend(16), dynamic=True)(torch.randn(1, 3, 40, 36))
    assert len(prefixes) == 1


# Effects that are no data: regions, counters, checkpoints.


def without_gradients(self: Any, x: torch.Tensor) -> Any:
    y = self.first(x)
    with torch.no_grad():
        factor = self.second(y).relu()
        weight = self.second.weight * 2
    return F.conv2d(y, weight + self.second.weight, padding=1) * factor, factor


def half_in_the_middle(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.first(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = self.second(y)
    return torch.cat([z.to(y.dtype), self.second(y)], 1)


@BOTH
def test_a_region_without_gradients(dynamic: bool | None, prefixes: Prefixes) -> None:
    check(Body(without_gradients, first=conv(), second=conv(4, 4)), dynamic=dynamic)
    assert whole(prefixes)


def test_a_region_without_gradients_in_the_head(prefixes: Prefixes) -> None:
    model = Body(lambda self, x: without_gradients(self, self.first(x).roll(1, 2)), first=conv(3, 3), second=conv(3, 3))
    check(model)
    assert not whole(prefixes)


@pytest.mark.parametrize("front", [lambda x: x, lambda x: x.roll(1, 2)], ids=["streamed", "in the head"])
def test_a_region_of_autocast(front: Callable[[torch.Tensor], torch.Tensor], prefixes: Prefixes) -> None:
    model = Body(
        lambda self, x: half_in_the_middle(self, front(self.third(x))),
        first=conv(),
        second=conv(4, 4),
        third=conv(3, 3),
    )
    randomise(model)
    compiled = copy.deepcopy(model)
    compiled.compile(backend=fxstream.backend(16))
    image = torch.randn(1, 3, 40, 36)
    results = [one(image) for one in (model, compiled)]
    assert results[0].dtype == results[1].dtype
    # Summed in another order, then rounded to bfloat16.
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0.01)
    torch.testing.assert_close(results[1][:, 4:], results[0][:, 4:], rtol=0, atol=1e-5)
    assert not torch.equal(results[1][:, :4], results[1][:, 4:])


def test_a_write_without_gradients_is_left_to_the_head(prefixes: Prefixes) -> None:
    def body(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        with torch.no_grad():
            y.clamp_(-1, 1)
        return self.second(y)

    check(Body(body, first=conv(), second=conv(4, 4)))
    assert "inside torch.no_grad" in prefixes[0].stops[0].reason


def test_gradients_that_are_enabled_inside_a_call_without_them(prefixes: Prefixes) -> None:
    def body(self: Any, x: torch.Tensor) -> Any:
        with torch.enable_grad():
            y = self.first(x)
        return y, self.first(x)

    compiled = check(Body(body, first=conv()))
    with torch.no_grad():
        with_gradient, without = compiled(torch.randn(2, 3, 40, 36).double())
    assert (with_gradient.requires_grad, without.requires_grad) == (True, False)
    assert "inside torch.enable_grad" in prefixes[-1].stops[0].reason


@BOTH
def test_a_checkpoint_in_the_front_streams(dynamic: bool | None, prefixes: Prefixes) -> None:
    def body(self: Any, x: torch.Tensor) -> Any:
        return self.second(checkpoint(lambda y: shuffled(self.inner, y), x, use_reentrant=False))

    check(Body(body, inner=BODIES["channel shuffle"](), second=conv(4, 4)), dynamic=dynamic)
    assert whole(prefixes)


def test_a_checkpoint_in_the_head_stays_one(prefixes: Prefixes) -> None:
    def body(self: Any, x: torch.Tensor) -> Any:
        return checkpoint(lambda y: self.second(y).relu(), self.first(x).roll(1, 2), use_reentrant=False)

    check(Body(body, first=conv(), second=conv(4, 4)))
    operations = {node.target for node in prefixes[-1].trace.graph.nodes}
    assert torch.ops.higher_order.tag_activation_checkpoint in operations


def test_a_custom_function_ends_the_streamed_part(prefixes: Prefixes) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 3

    check(Body(lambda self, x: self.second(Doubled.apply(self.first(x))), first=conv(), second=conv(4, 4)))
    assert "has no streaming rule" in prefixes[0].stops[0].reason


@torch.library.custom_op("fxstream_test::double", mutates_args=("x",))
def double_in_place(x: torch.Tensor) -> None:
    x.mul_(2)


def test_what_a_custom_operation_overwrites_is_not_streamed_past_it(prefixes: Prefixes) -> None:
    def body(self: Any, x: torch.Tensor) -> Any:
        y = self.first(x)
        torch.ops.fxstream_test.double.default(y)
        return self.second(y)

    model = Body(body, first=conv(), second=conv(4, 4)).requires_grad_(False).double()
    compiled = fxstream.compile(copy.deepcopy(model), 16, strict=True)
    image = torch.randn(2, 3, 40, 36).double()
    torch.testing.assert_close(compiled(image), model(image), rtol=0, atol=1e-10)
    assert [node.name for node in prefixes[0].outputs] == ["y"]


def test_a_higher_order_operation_may_overwrite_what_it_is_given() -> None:
    graph = fx.Graph()
    image = graph.placeholder("image")
    assert overwrites(graph.call_function(torch.ops.higher_order.tag_activation_checkpoint, (image,)), None)
    assert not overwrites(graph.call_function(torch.ops.aten.relu.default, (image,)), None)


# Batch norms.


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_frozen_batch_norms_use_and_keep_their_running_statistics(kind: Any, prefixes: Prefixes) -> None:
    model = randomise(chain(conv(), kind(4), nn.ReLU(), conv(4, 2)).double())
    compiled = copy.deepcopy(model)
    fxstream.compile(compiled, 16, freeze_batchnorm=True, strict=True)
    compare(model.eval(), compiled.train(), torch.randn(2, 3, 40, 36))
    assert compiled.get_buffer("layers.1.num_batches_tracked") == 0
    assert whole(prefixes)


def test_batch_norms_behind_the_streamed_part_are_frozen_too() -> None:
    model = Body(lambda self, x: self.norm(self.first(x).roll(1, 2)), first=conv(), norm=nn.BatchNorm2d(4))
    model = randomise(model.double())
    compiled = fxstream.compile(copy.deepcopy(model).train(), 16, freeze_batchnorm=True)
    compare(model.eval(), compiled, torch.randn(2, 3, 40, 36))


def test_batch_norms_that_train_count_their_batches(prefixes: Prefixes) -> None:
    model = Body(lambda self, x: self.norm(self.first(x).relu()), first=conv(), norm=nn.BatchNorm2d(4))
    compiled = check(model.train())
    assert compiled.norm.num_batches_tracked == 1
    assert "is in training mode" in prefixes[0].stops[0].reason


def test_a_batch_norm_that_torch_runs_outside_the_graphs_is_not_frozen_without_a_word() -> None:
    model = Body(lambda self, x: self.norm(self.first(x)), first=conv(), norm=nn.BatchNorm2d(4, momentum=None))
    fxstream.compile(model, 16, freeze_batchnorm=True)
    with pytest.raises(fxstream.BatchNormModeError, match=r"norm used the statistics of the batch.*momentum=None"):
        model(torch.randn(2, 3, 40, 36))
    model.eval()
    assert model(torch.randn(2, 3, 40, 36)).shape == (2, 4, 40, 36)


# Which input is the image.


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(), conv(4, 2)
        self.register_buffer("memory", torch.ones(1, 4, 1, 1))

    def forward(self, x: torch.Tensor, mask: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
        y = self.second(self.first(x) * mask * self.memory)
        return y if factor is None else y * factor


def masked() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = randomise(Masked().double())
    return model, torch.randn(2, 3, 40, 36).double(), torch.rand(2, 1, 40, 36).double()


def test_integers_and_flags_are_no_images(prefixes: Prefixes) -> None:
    model, image, mask = masked()
    compiled = fxstream.compile(copy.deepcopy(model), 16, strict=True)
    torch.testing.assert_close(compiled(image, mask > 0.5), model(image, mask > 0.5), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        compiled(image, mask > 0.5, image[:, 0, 0, 0].mean()), model(image, mask > 0.5, image[:, 0, 0, 0].mean())
    )
    assert whole(prefixes)


def test_several_maps_run_as_they_are_unless_one_is_named(prefixes: Prefixes) -> None:
    model, image, mask = masked()
    compiled = copy.deepcopy(model)
    compiled.compile(backend=fxstream.backend(16))
    with pytest.warns(fxstream.StreamingWarning, match=r"several inputs may be the image \(x, mask\).*image="):
        torch.testing.assert_close(compiled(image, mask), model(image, mask), rtol=0, atol=1e-10)
    compiled = fxstream.compile(copy.deepcopy(model), 16)
    with pytest.warns(
        fxstream.StreamingWarning, match=r"nothing was streamed in this call of Masked(.|\n)*\(x, mask\)"
    ):
        compiled(image, mask)
    assert not prefixes
    mask.requires_grad_()
    compiled = fxstream.compile(copy.deepcopy(model), 16, image="x", strict=True)
    results = [torch.autograd.grad(one(image, mask).square().sum(), mask)[0] for one in (model, compiled)]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-10)
    assert whole(prefixes)


def test_an_unsuitable_image_is_an_error_at_the_call() -> None:
    model, image, mask = masked()
    with pytest.raises(fxstream.StreamingError, match=r"image='y' is not an argument of the model's forward \(x, mask"):
        fxstream.compile(model, 16, image="y")
    fxstream.compile(model, 16, image="mask")
    with pytest.raises(fxstream.StreamingError, match="image='mask' is not a floating-point tensor"):
        model(image, mask > 0.5)
    compiled = torch.compile(Masked().double(), backend=fxstream.backend(16, image="y"))
    with pytest.raises(fxstream.StreamingError, match=r"image='y' is not an input of the captured graph \(x, mask\)"):
        compiled(image, mask)


def test_an_image_in_a_dict(prefixes: Prefixes) -> None:
    model = Body(lambda self, batch: self.first(batch["image"]) * batch["scale"], first=conv()).double()
    compiled = fxstream.compile(copy.deepcopy(model), 16, strict=True)
    batch: Any = {"image": torch.randn(2, 3, 40, 36).double(), "scale": 3}
    torch.testing.assert_close(compiled(batch), model(batch), rtol=0, atol=1e-10)
    assert [str(prefix.image) for prefix in prefixes] == ["x_image"]


def test_a_graph_without_an_image_runs_as_it_is() -> None:
    model = nn.Linear(3, 2)
    plain = model(torch.ones(4, 3))
    model.compile(backend=fxstream.backend(16))
    assert torch.equal(model(torch.ones(4, 3)), plain)


# Errors come at the call, under their names.


def first_error(model: nn.Module, *options: Any, **named: Any) -> None:
    torch.compile(model, *options, **named)(torch.randn(1, 3, 40, 36))


@pytest.mark.parametrize("suppressed", [False, True])
def test_nothing_to_stream(suppressed: bool) -> None:
    """Neither wrapped nor swallowed, as torch does with what a backend raises itself."""
    model = chain(nn.AdaptiveAvgPool2d(3), conv())
    with (
        torch._dynamo.config.patch(suppress_errors=suppressed),
        pytest.raises(
            fxstream.NothingToStreamError, match=r"^nothing at the front(.|\n)*layers.0.*over the whole image"
        ),
    ):
        first_error(model, backend=fxstream.backend(16))


@pytest.mark.parametrize("tile", [16, (1, 2, 3)])
def test_an_error_keeps_nothing_of_the_capture(tile: Any) -> None:
    compiled = torch.compile(chain(nn.AdaptiveAvgPool2d(3)), backend=fxstream.backend(tile))
    image = torch.randn(1, 3, 40, 36)
    freed = weakref.ref(image)
    with pytest.raises(fxstream.StreamingError):
        compiled(image)
    del image
    gc.collect()
    assert freed() is None


def test_options() -> None:
    """torch passes a mode as a keyword, and leaves empty options out."""
    model = net().eval()
    for options, message in (
        ({"tile": 16}, r"has no option 'tile'; it has tile_shape, freeze_batchnorm, memory_budget, image"),
        ({}, r"needs options=\{\"tile_shape\": \.\.\.\}"),
        ({"tile_shape": "all"}, "tile_shape must be"),
        ({"tile_shape": (1, 2, 3)}, r"tile_shape must be.*has 3 entries"),
        ({"tile_shape": "auto"}, "memory budget, and there is none"),
        ({"tile_shape": 16, "memory_budget": "big"}, "memory_budget must be"),
    ):
        torch._dynamo.reset()
        with pytest.raises(fxstream.StreamingError, match=message):
            first_error(model, backend=named_backend, options=options)
    torch._dynamo.reset()
    with pytest.raises(fxstream.StreamingError, match="has no mode, and is given 'max-autotune'"):
        first_error(model, backend=named_backend, mode="max-autotune")
    first_error(model, backend=named_backend, options={"tile_shape": (16, 16), "freeze_batchnorm": True})


def test_what_convert_refuses_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a torch"):
        fxstream.compile(torch.relu, 16)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(fxstream.WrappedModelError, match="converted already"):
        fxstream.compile(fxstream.convert(net().eval(), 16), 16)
    with pytest.raises(fxstream.TileShapeError, match="there is none"):
        fxstream.compile(net(), "auto")


def softened(x: torch.Tensor, by: float) -> torch.Tensor:
    return torch.tanh(x) * by


def test_a_rule_of_ones_own_for_a_function_that_torch_does_not_look_into(
    monkeypatch: pytest.MonkeyPatch, prefixes: Prefixes
) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    fxstream.register(softened)(lambda x, by: registry.Local((x,), x.dims, lambda block: softened(block, by)))
    torch._dynamo.allow_in_graph(softened)
    try:
        check(Body(lambda self, x: softened(self.first(x), 0.5), first=conv()))
        assert [node.target for node in prefixes[0].nodes][1:] == [softened]
    finally:
        torch._dynamo.disallow_in_graph(softened)


def test_a_rule_that_computes_with_a_parameter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a parameter that is an input of the graph."""

    def rule(input: Any, weight: Any) -> Any:
        doubled = weight.sum() * 2
        return registry.Local((input,), input.dims, lambda block: block * doubled)

    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    fxstream.register(F.prelu)(rule)
    with pytest.raises(fxstream.StreamingError, match=r"computes with a tensor itself \(sum\)"):
        check(chain(conv(), nn.PReLU(4)))


def test_an_image_that_is_too_small() -> None:
    model = fxstream.compile(chain(nn.Conv2d(3, 4, 5), nn.Conv2d(4, 4, 5)), 16)
    assert model(torch.randn(1, 3, 9, 9)).shape == (1, 4, 1, 1)
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 3, 8, 8))


# The report.


def counting(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.calls += 1
    return F.adaptive_avg_pool2d(self.layers(x) * self.calls, 3)


def test_analyze_goes_through_this_door_where_the_first_cannot_trace() -> None:
    model = Body(counting, layers=nn.Sequential(nn.Sequential(conv()), nn.BatchNorm2d(4)), calls=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(fxstream.TraceError):
        fxstream.analyze(model)
    analysis = fxstream.analyze(model, example_input=torch.randn(2, 3, 40, 36), freeze_batchnorm=True)
    text = str(analysis)
    assert analysis.names == ("N", "C", "H", "W")
    assert analysis.image.name == "x"
    assert "layers_0_0_weight" in text
    assert "torch.conv2d" in text
    assert [node.name for node in analysis.prefix] == ["input_1", "input_2", "mul"]
    assert model.calls == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(fxstream.StreamingError, match=r"estimate\(\) needs a model that torch\.fx can trace"):
        analysis.estimate((1, 3, 40, 36), 16)


def test_stops_are_named_by_the_path_in_the_users_model(prefixes: Prefixes) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Sequential(conv(), nn.ReLU()), nn.Sequential(conv(4, 4, padding_mode="circular")))

    fxstream.compile(model(), 16)(torch.randn(1, 3, 40, 36))
    assert prefixes[0].stops[0].reason.startswith("1.0: ")
    check(chain(model()))
    assert prefixes[1].stops[0].reason.startswith("layers.0.1.0: ")
