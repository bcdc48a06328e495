"""Measure what a tile costs beyond its arithmetic: milliseconds and calls of operations per tile.

    python benchmarks/overhead.py --tile 32 --size 512

The networks are a resnet18 and a U-Net whose convolutions have two channels each, so that there is little to compute.
They run in float32, on one thread. The program prints a table and writes overhead.json to the output folder.

- ms per tile: the time of a step on an image of --size, divided by the number of tiles; the median of --repeats steps.
  These steps find caches warm: the model has been called with the same image before.
- first: the same for the first step after the conversion, when caches are cold. It includes planning the tiles and, on
  a GPU, whatever is initialised only once.
- PyTorch: the time that the plain network takes for an image of the size of a tile, with warm caches. In training, it
  is the sum of a forward pass and of a training step, since fxstream computes every tile twice.
- calls: the calls of aten operations per tile, below autograd. On a GPU, a call may start more than one kernel.
- kernels: the calls without those that only make views or allocate memory. The program lists these operations.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cases import MODELS, MODES, UNet
from measure import environment
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxstream

WIDTH = 2
"""Channels of every convolution."""
NO_KERNEL = frozenset(
    "_reshape_alias _unsafe_view alias as_strided detach diagonal empty empty_like empty_permuted empty_strided expand "
    "is_pinned is_same_size lift_fresh new_empty new_empty_strided permute record_stream select set_ slice split "
    "split_with_sizes squeeze sym_size t transpose unbind unfold unsqueeze view".split()
)
"""Operations that only make views, read sizes, or allocate memory."""


def _resnet() -> nn.Module:
    """The trunk of a resnet18, with all convolutions and batch norms made narrow."""
    trunk = MODELS["resnet18"]().trunk
    for module in list(trunk.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                channels = min(child.in_channels, WIDTH) if child.in_channels != 3 else 3
                sizes = child.kernel_size, child.stride, child.padding
                setattr(module, name, nn.Conv2d(channels, WIDTH, *sizes, bias=False))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.BatchNorm2d(WIDTH))
    return trunk


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet18": _resnet, "unet": lambda: UNet(WIDTH, growth=1)}


class Calls(TorchDispatchMode):
    """Counts the calls of aten operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Row:
    """What was found for one network in one mode; the times and numbers are per tile."""

    model: str
    mode: str
    tiles: int
    milliseconds: float
    first_milliseconds: float
    plain_milliseconds: float
    calls: dict[str, float]
    plain_calls: dict[str, float]

    def cells(self) -> list[str]:
        times = [self.milliseconds, self.first_milliseconds, self.plain_milliseconds]
        counts = [
            f"{number:.0f}"
            for calls in (self.calls, self.plain_calls)
            for number in (sum(calls.values()), _kernels(calls))
        ]
        ratio = self.milliseconds / self.plain_milliseconds
        return [
            f"{self.model}, {self.mode}",
            str(self.tiles),
            *(f"{one:.3g}" for one in times),
            f"{ratio:.2f}",
            *counts,
        ]


def _kernels(calls: dict[str, float]) -> float:
    return sum(number for name, number in calls.items() if name not in NO_KERNEL)


class Overhead:
    """Measures networks with the settings of the command line."""

    def __init__(self, options: argparse.Namespace):
        self.device, self.repeats = torch.device(options.device), options.repeats
        self.size, self.tile = options.size, options.tile

    def row(self, name: str, mode: str) -> Row:
        torch.manual_seed(0)
        model = NETWORKS[name]().eval().to(self.device)
        image = torch.randn(1, 3, self.size, self.size, device=self.device)
        cut = image[..., : self.tile, : self.tile].contiguous()
        tiles = fxstream.analyze(model).estimate(image.shape, self.tile).tiles
        plain, plain_calls = self.plain(model, cut, mode)
        converted = fxstream.convert(model, self.tile)
        first = self.milliseconds(lambda: step(converted, image, mode))
        warm = median(self.milliseconds(lambda: step(converted, image, mode)) for _ in range(self.repeats))
        calls = counted(lambda: step(converted, image, mode))
        per_tile = {operation: number / tiles for operation, number in calls.items()}
        return Row(name, mode, tiles, warm / tiles, first / tiles, plain, per_tile, dict(plain_calls))

    def plain(self, model: nn.Module, cut: torch.Tensor, mode: str) -> tuple[float, Counter[str]]:
        """Milliseconds and calls of the plain network for one tile."""

        def run() -> None:
            step(model, cut, "inference")
            if mode == "training":
                step(model, cut, mode)

        for _ in range(3):
            run()
        return median(self.milliseconds(run) for _ in range(20 * self.repeats)), counted(run)

    def milliseconds(self, function: Callable[[], None]) -> float:
        """The time of a call by the clock, until the device has finished."""
        self.wait()
        began = time.perf_counter()
        function()
        self.wait()
        return 1000 * (time.perf_counter() - began)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def step(model: nn.Module, image: torch.Tensor, mode: str) -> None:
    if mode == "inference":
        # Not inference_mode, in which calls of operations that consist of others are counted as a whole.
        with torch.no_grad():
            model(image)
    else:
        model(image).square().mean().backward()
        model.zero_grad()


def counted(function: Callable[[], None]) -> Counter[str]:
    with Calls() as calls:
        function()
    return calls.counts


def table(rows: list[Row], title: str) -> Table:
    found = Table(title=title, title_justify="left")
    found.add_column("", no_wrap=True)
    headings = ["tiles", "ms per tile", "first", "PyTorch", "ratio", "calls", "kernels"]
    for heading in [*headings, "PyTorch: calls", "kernels"]:
        found.add_column(heading, justify="right")
    for row in rows:
        found.add_row(*row.cells())
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=[*NETWORKS], metavar="MODEL")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["inference", "training"], metavar="MODE")
    parser.add_argument("--size", type=int, default=512, help="height and width of the image in pixels")
    parser.add_argument("--tile", type=int, default=32, help="height and width of a tile in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=Path("out/overhead"), help="folder for overhead.json")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    overhead, rows = Overhead(options), []
    for model in options.models:
        for mode in options.modes:
            rows.append(overhead.row(model, mode))
            found = {"environment": environment(), "options": {**vars(options), "output": str(options.output)}}
            text = json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=1)
            (options.output / "overhead.json").write_text(text + "\n")
    edge = f"{options.size} x {options.size}"
    console.print(
        table(rows, f"{edge} in tiles of {options.tile}, {options.device}, one thread, warm caches but for first")
    )
    met = sorted({name for row in rows for name in (*row.calls, *row.plain_calls)} & NO_KERNEL)
    console.print(f"Operations that count as no kernel: {', '.join(met)}")
    console.print(f"{options.output}/overhead.json")


if __name__ == "__main__":
    main()
