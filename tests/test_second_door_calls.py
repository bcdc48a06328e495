"""Calls of a model that was given to `fxstream.compile`: what works as it is, and when torch runs the plain model."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from reference import Body, assert_close, gradients, randomise
from test_drop_in import Net, train
from test_second_door import Masked, conv, net
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fxstream
from fxstream.compilation import named_backend
from fxstream.testing import compare

PLAIN = "nothing was streamed in this call of"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A model, and a copy that streams, or raises."""
    model = randomise((model or net()).double()).eval()
    return model, fxstream.compile(copy.deepcopy(model), 16, **{"strict": True, **options})


def image() -> torch.Tensor:
    return torch.randn(2, 3, 40, 36).double()


# In place.


def test_training_ends_with_the_same_parameters() -> None:
    plain, compiled = pair(Net())
    assert type(compiled) is Net
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in compiled.named_modules()] == [name for name, _ in plain.named_modules()]
    expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.05), 3)
    assert train(compiled, torch.optim.SGD(compiled.parameters(), lr=0.05), 3) == pytest.approx(expected, abs=1e-9)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor, rtol=0, atol=1e-9)
    plain.load_state_dict(compiled.state_dict())


def test_less_is_saved_for_the_backward_pass() -> None:
    def saved(model: nn.Module) -> int:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(1, 3, 200, 200).double())
        return sum(sizes)

    plain, compiled = pair()
    assert saved(compiled) < saved(plain) / 2


def test_a_module_inside_a_plain_model() -> None:
    plain = nn.Sequential(randomise(net().double()).eval(), nn.AdaptiveAvgPool2d(3))
    outer = copy.deepcopy(plain)
    fxstream.compile(outer[0], 16, strict=True)
    compare(plain, outer, image())


def test_a_call_inside_another_one_counts_for_both() -> None:
    model = Body(lambda self, x: torch._dynamo.disable(self.inner)(x), inner=Net())
    plain, compiled = pair(model)
    fxstream.compile(compiled.inner, 16, strict=True)
    compare(plain, compiled, image())


def test_keyword_arguments() -> None:
    plain, compiled = pair(Masked())
    picture, mask = image(), torch.rand(2, 1, 40, 36) > 0.5
    torch.testing.assert_close(compiled(mask=mask, x=picture), plain(picture, mask), rtol=0, atol=1e-10)


# Works as it is.


def in_inference_mode(model: nn.Module) -> Any:
    with torch.inference_mode():
        return model(image())


def without_gradients(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(image())


def under_autocast(model: nn.Module) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.float()(image().float()) * 0


def saved_on_the_cpu(model: nn.Module) -> Any:
    with torch.autograd.graph.save_on_cpu():
        model(image()).square().sum().backward()
    return gradients(model)


def in_a_checkpoint(model: nn.Module) -> Any:
    checkpoint(model, image(), use_reentrant=False).square().sum().backward()
    return gradients(model)


def with_anomaly_detection(model: nn.Module) -> Any:
    with torch.autograd.set_detect_anomaly(True):
        model(image()).square().sum().backward()
    return gradients(model)


def in_a_thread(model: nn.Module) -> Any:
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(model(image()[:1]))) for _ in range(2)]
    for thread in threads:
        torch.manual_seed(0)
        thread.start()
        thread.join()
    return found


@pytest.mark.parametrize(
    "use",
    [
        in_inference_mode,
        without_gradients,
        under_autocast,
        saved_on_the_cpu,
        in_a_checkpoint,
        with_anomaly_detection,
        in_a_thread,
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_works_as_it_is(use: Callable[[nn.Module], Any]) -> None:
    results = []
    for model in pair():
        torch.manual_seed(0)
        results.append(use(model))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-9)


# torch runs the plain model.


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def in_a_dispatch_mode(model: nn.Module) -> Any:
    with Watching():
        return model(image())


def with_a_stance(model: nn.Module) -> Any:
    with torch.compiler.set_stance("force_eager"):
        return model(image())


@pytest.mark.parametrize("use", [in_a_dispatch_mode, with_a_stance])
def test_a_call_of_the_plain_model_warns_or_raises(use: Callable[[nn.Module], Any]) -> None:
    plain, compiled = pair(strict=False)
    torch.manual_seed(0)
    expected = plain(image())
    torch.manual_seed(0)
    with pytest.warns(fxstream.StreamingWarning, match=f"{PLAIN} Body, which was computed whole") as caught:
        found = use(compiled)
    assert torch.equal(found, expected)
    assert caught[0].filename == __file__
    with pytest.raises(fxstream.PlainCallError, match=r"torch captured nothing: docs/compile\.md"):
        use(pair()[1])


def with_a_lock(self: Any, x: torch.Tensor) -> torch.Tensor:
    with self.lock[0]:
        return self.first(x)


def with_a_file(self: Any, x: torch.Tensor) -> torch.Tensor:
    with open(__file__) as file:
        return self.first(x) * len(file.readline()[:1])


def until_it_is_small(self: Any, x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = self.first(x[:, :3])
        if x.norm() < 1e9:
            break
    return x


@pytest.mark.parametrize("body", [with_a_lock, with_a_file, until_it_is_small])
def test_code_that_torch_skips_is_not_skipped_without_a_word(body: Callable[..., Any]) -> None:
    """Which code torch skips depends on its version; a graph break is no skip, as what is around it streams."""
    model = Body(body, first=conv(), lock=[threading.Lock()]).double()
    fxstream.compile(model, 16, strict=True)
    try:
        found = model(image())
    except fxstream.PlainCallError:
        return
    assert found.shape == (2, 4, 40, 36)


def test_behind_a_graph_break_streaming_goes_on() -> None:
    def body(self: Any, x: torch.Tensor) -> Any:
        y = self.first(x)
        torch._dynamo.graph_break()
        y = self.second(y).relu()
        torch._dynamo.graph_break()
        return y.mean((2, 3))

    compare(*pair(Body(body, first=conv(), second=conv(4, 4))), image())


def test_a_graph_behind_a_break_may_have_nothing_to_stream() -> None:
    def body(self: Any, x: torch.Tensor) -> Any:
        y = self.first(x)
        torch._dynamo.graph_break()
        return y.mean((2, 3))

    model = Body(body, first=conv()).double()
    compiled = torch.compile(model, backend=fxstream.backend(16))
    with pytest.warns(fxstream.StreamingWarning, match=r"runs as it is: nothing at the front(.|\n)*takes the mean"):
        found = compiled(picture := image())
    torch.testing.assert_close(found, model(picture), rtol=0, atol=1e-10)


def test_an_inner_function_of_which_nothing_streams_does_not_fail_the_call() -> None:
    class Pooled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.adaptive_avg_pool2d(x, 2)
            torch._dynamo.graph_break()
            return y * 2

    model = Body(lambda self, x: self.second(self.first(x).relu()), first=conv(), second=Pooled())
    compare(*pair(model), image())


def test_copies_and_the_bare_forward_are_plain() -> None:
    """torch drops the compiled call in copies and pickles, and the other two do not ask for it: nothing can warn."""
    plain, compiled = pair(Net())
    ways = [copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled)), compiled.forward]
    ways.append(torch.compile(nn.Sequential(compiled), backend="eager"))
    picture = image()
    for way in ways:
        assert "_Streamed" not in type(way(picture).grad_fn).__name__
        torch.testing.assert_close(way(picture), plain(picture), rtol=0, atol=1e-10)


@pytest.mark.skipif("recompile_limit" not in signature(torch.compile).parameters, reason="this torch allows eight")
def test_many_captures_of_one_model() -> None:
    """torch allows eight, unless it is told otherwise."""
    model = Body(lambda self, x: self.first(x) if self.name else x, first=conv(), name="").double()
    fxstream.compile(model, 16, strict=True)
    for number in range(12):
        model.name = str(number)
        model(image())


# Hooks.


def test_a_hook_that_was_added_after_the_first_call_is_found() -> None:
    _, compiled = pair(Net())
    compiled.register_forward_hook(lambda *_: None)
    compiled(image())
    handle = compiled.get_submodule("blocks").register_forward_hook(lambda *_: None)
    with pytest.raises(fxstream.HookError, match="blocks has other hooks than at the first call"):
        compiled(image())
    handle.remove()
    compiled(image())


def test_hooks_that_are_there_at_the_first_call_run() -> None:
    model = Body(lambda self, x: self.second(self.first(x)), first=conv(), second=conv(4, 4))
    plain, compiled = pair(model)
    for one in (plain, compiled):
        one.first.register_forward_hook(lambda module, inputs, output: output * 2)
        one.first.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    compare(plain, compiled, image())


# Distributed training.


@pytest.fixture
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
def test_distributed_data_parallel() -> None:
    plain, compiled = pair()
    wrapped = DistributedDataParallel(compiled)
    with pytest.raises(fxstream.WrappedModelError, match=r"Way out: torch\._dynamo\.config\.optimize_ddp = False"):
        wrapped(image())
    torch._dynamo.reset()
    plain, compiled = pair()
    wrapped = DistributedDataParallel(compiled)
    picture = image()
    with torch._dynamo.config.patch(optimize_ddp=False):
        results = [one(picture) for one in (plain, wrapped)]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-10)
    for result in results:
        result.square().sum().backward()
    assert_close(gradients(compiled), gradients(plain))


@pytest.mark.usefixtures("_process_group")
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards on GPUs alone")
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_fully_sharded_models(inner: bool) -> None:
    plain = randomise(Body(lambda self, x: self.second(self.first(x).relu()), first=conv(), second=conv(4, 4)).double())
    sharded = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (1,))
    if inner:
        fully_shard(sharded.first, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    fxstream.compile(sharded, 16, strict=True)
    picture = image()
    results = [one(picture) for one in (plain, sharded)]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-9)
    for result in results:
        result.square().sum().backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(sharded)[name].full_tensor(), gradient, rtol=0, atol=1e-9)


# The entry point.


def entry_point() -> str:
    """What pyproject.toml says."""
    written = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    return written.partition("[project.entry-points.torch_dynamo_backends]\n")[2].partition("\n\n")[0]


def test_the_entry_point_is_there() -> None:
    name, _, target = entry_point().replace('"', "").partition(" = ")
    found = EntryPoint(name, target, "torch_dynamo_backends").load()
    assert (name, found) == ("fxstream", named_backend)


@pytest.mark.slow
def test_the_backend_has_a_name(tmp_path: Path) -> None:
    """In a process of its own, which finds the entry point as that of an installed package."""
    folder = tmp_path / "door-0.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: door\nVersion: 0.0\n")
    (folder / "entry_points.txt").write_text("[torch_dynamo_backends]\n" + entry_point().replace('"', ""))
    code = """if True:
        import torch, fxstream
        from torch import nn
        class Net(nn.Module):
            def forward(self, x):
                return nn.functional.max_pool2d(x * 2, 3)
        image = torch.randn(1, 3, 40, 36)
        found = torch.compile(Net(), backend="fxstream", options={"tile_shape": 16}, fullgraph=True)(image)
        assert torch.equal(found, Net()(image))
        try:
            torch.compile(Net(), backend="fxstream")(image)
        except fxstream.StreamingError as error:
            print("refused", error)
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": f"{tmp_path}:{Path(fxstream.__file__).parents[1]}"},
    )
    assert done.stdout.startswith("refused the backend fxstream needs options"), done.stderr


def test_a_conversion_leaves_the_compiler_of_torch_as_it_is() -> None:
    """It lists the functions of Python when it is imported, some of which are replaced while a model is traced."""
    code = """if True:
        import sys, torch, fxstream
        from torch import nn
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval()
            def forward(self, x):
                y = self.norm(self.conv(x))
                return y * 2 if isinstance(y.shape[2], int) else y
        assert "torch._dynamo" not in sys.modules
        fxstream.convert(Net(), 8)
        assert torch._dynamo.trace_rules.is_builtin_callable(isinstance)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
