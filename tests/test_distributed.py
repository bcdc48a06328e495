"""A converted model in two processes, with DistributedDataParallel and fully_shard, against the plain one in one."""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from reference import randomise
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessRaisedException, start_processes
from torch.nn.parallel import DistributedDataParallel

import fxstream

PROCESSES = 2
SECONDS = 240
"""After which tests fail, should processes wait for one another; they take a few."""
TILE = 9
Batch = tuple[torch.Tensor, torch.Tensor]


class Net(nn.Module):
    """A skip connection, batch norms, and every way to share weights.

    One module is called twice, two modules have one weight, and the prefix and the head use one, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 5, stride=2, padding=2)
        first, second = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        second.weight = first.weight
        self.layer1 = nn.Sequential(first, nn.BatchNorm2d(6), nn.ReLU(), second)
        self.mix = nn.Conv2d(6, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.layer1(x)
        x = self.norm(self.mix(x + self.layer1(x))).relu()
        return self.fc(nn.functional.linear(x.mean((2, 3)), self.mix.weight.flatten(1)))


def plain() -> nn.Module:
    """As it stands in for the converted model: with frozen batch norms, all of which are streamed."""
    return randomise(Net()).double().eval()


def converted() -> nn.Module:
    return fxstream.convert(plain().train(), TILE, freeze_batchnorm=True)


def batches(count: int) -> list[Batch]:
    """Batches for all processes together, each of another image size."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(2 * PROCESSES, 3, 37 + 4 * index, 29, generator=generator, dtype=torch.float64),
            torch.randint(3, (2 * PROCESSES,), generator=generator),
        )
        for index in range(count)
    ]


def share(batch: Batch) -> Batch:
    """What of a batch belongs to this process."""
    rank = dist.get_rank()
    return batch[0].chunk(PROCESSES)[rank], batch[1].chunk(PROCESSES)[rank]


def train(
    model: nn.Module,
    steps: Iterable[Batch],
    optimiser: type[torch.optim.Optimizer] = torch.optim.SGD,
    accumulate: int = 1,
    unsynchronised: Callable[[], Any] = nullcontext,
) -> None:
    """Ordinary training; gradients of `accumulate` batches are added up, all but the last `unsynchronised`."""
    options = {"momentum": 0.9} if optimiser is torch.optim.SGD else {}
    chosen = optimiser(model.parameters(), lr=0.01, **options)
    for number, (images, targets) in enumerate(steps, start=1):
        complete = number % accumulate == 0
        with nullcontext() if complete else unsynchronised():
            nn.functional.cross_entropy(model(images), targets).backward()
        if complete:
            chosen.step()
            chosen.zero_grad()


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    """All parameters and buffers agree, and training has moved every parameter."""
    start = plain().state_dict()
    tensors = found.state_dict()
    assert list(tensors) == list(expected.state_dict())
    moved = dict(expected.named_parameters(remove_duplicate=False))
    for name, tensor in expected.state_dict().items():
        value = tensors[name].full_tensor() if isinstance(tensors[name], DTensor) else tensors[name]
        torch.testing.assert_close(value, tensor, rtol=1e-11, atol=1e-12)
        assert (name in moved) != torch.equal(tensor, start[name])


def ddp(optimiser: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    expected, model = plain(), converted()
    train(expected, batches(4), optimiser)
    train(DistributedDataParallel(model, **options), map(share, batches(4)), optimiser)
    assert_same(model, expected)


def ddp_accumulates() -> None:
    expected, model = plain(), converted()
    train(expected, batches(6), accumulate=3)
    parallel = DistributedDataParallel(model)
    train(parallel, map(share, batches(6)), accumulate=3, unsynchronised=parallel.no_sync)
    assert_same(model, expected)


def ddp_with_images_of_different_sizes() -> None:
    """One step, in which the gradients are the average of those of the two images."""
    images = [torch.randn(1, 3, height, width, dtype=torch.float64) for height, width in ((23, 40), (51, 9))]
    expected, model = plain(), converted()
    (sum(expected(image).square().sum() for image in images) / PROCESSES).backward()
    parallel = DistributedDataParallel(model)
    parallel(images[dist.get_rank()]).square().sum().backward()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-12)


def fsdp(apart: list[str], options: dict[str, Any]) -> None:
    """Shard the modules `apart` on their own, then the rest."""
    expected, model = plain(), converted()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for path in [*apart, ""]:
        fully_shard(model.get_submodule(path), mesh=mesh, **options)
    train(expected, batches(4), torch.optim.AdamW)
    train(model, map(share, batches(4)), torch.optim.AdamW)
    assert isinstance(model.get_parameter("stem.weight"), DTensor)
    assert_same(model, expected)


def fsdp_of_a_streamed_module() -> None:
    model = converted()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    fully_shard(model.get_submodule("layer1"), mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(fxstream.StreamingError, match=r"^layer1\.0 is only a shard"):
        model(share(batches(1)[0])[0])


def fsdp_before_the_conversion() -> None:
    model = plain()
    fully_shard(model.get_submodule("fc"), mesh=init_device_mesh("cpu", (PROCESSES,)))
    with pytest.raises(fxstream.ShardedError, match=r"^fc\.weight is only a shard.*convert the model first"):
        fxstream.convert(model, TILE)


Work = tuple[Callable[..., None], tuple[Any, ...]]

DDP: dict[str, Work] = {
    "SGD": (ddp, (torch.optim.SGD, {})),
    "AdamW": (ddp, (torch.optim.AdamW, {})),
    "static_graph": (ddp, (torch.optim.AdamW, {"static_graph": True})),
    "gradient_as_bucket_view": (ddp, (torch.optim.AdamW, {"gradient_as_bucket_view": True})),
    "accumulated gradients": (ddp_accumulates, ()),
    "images of different sizes": (ddp_with_images_of_different_sizes, ()),
}
FSDP: dict[str, Work] = {
    "whole": (fsdp, ([], {})),
    "head apart": (fsdp, (["fc"], {})),
    "whole, resharded": (fsdp, ([], {"reshard_after_forward": True})),
    "head apart, resharded": (fsdp, (["fc"], {"reshard_after_forward": True})),
    "of a streamed module is refused": (fsdp_of_a_streamed_module, ()),
    "before the conversion is refused": (fsdp_before_the_conversion, ()),
}


def in_process(rank: int, folder: Path, works: dict[str, Work]) -> None:
    """One process: do all of it in order, and leave a file for each that is done."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=SECONDS / 2)
    meeting_point = (folder / "meeting_point").as_uri()
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=PROCESSES, timeout=limit)
    for name, (work, arguments) in works.items():
        torch.manual_seed(0)
        try:
            work(*arguments)
        except BaseException:
            # Raised in the test is the first to come; another's may be the cause.
            print(f"Process {rank}, {name}: {traceback.format_exc()}", file=sys.stderr)
            raise
        done(folder, name, rank).touch()
    dist.destroy_process_group()


def done(folder: Path, name: str, rank: int) -> Path:
    """The file that says that a process has done something."""
    return folder / f"{name}.{rank}"


class Ran:
    """Several things done one after the other in all processes, which are started once for all of them."""

    def __init__(self, folder: Path, works: dict[str, Work]):
        self.folder = folder
        self.failure = "nothing has failed"
        # Forked from a process that has done no more than import: fast, and without this one's threads.
        multiprocessing.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "fxstream"])
        context = start_processes(in_process, (folder, works), nprocs=PROCESSES, join=False, start_method="forkserver")
        end = time.monotonic() + SECONDS
        try:
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    self.failure = f"it took more than {SECONDS} s"
                    break
        except ProcessRaisedException as error:
            self.failure = str(error)
        finally:
            for process in context.processes:
                process.kill()

    def assert_done(self, name: str) -> None:
        """Fails with what a process has raised, in this or in something before it."""
        assert all(done(self.folder, name, rank).exists() for rank in range(PROCESSES)), self.failure


@pytest.fixture(scope="module")
def ran_ddp(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("ddp"), DDP)


@pytest.fixture(scope="module")
def ran_fsdp(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("fsdp"), FSDP)


@pytest.mark.parametrize("name", DDP)
def test_ddp(ran_ddp: Ran, name: str) -> None:
    ran_ddp.assert_done(name)


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of this torch needs a GPU")
@pytest.mark.parametrize("name", FSDP)
def test_fsdp(ran_fsdp: Ran, name: str) -> None:
    ran_fsdp.assert_done(name)
