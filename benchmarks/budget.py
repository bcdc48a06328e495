"""Count the work that a memory budget saves: FLOPs of a training step against those of a conventional step.

    python benchmarks/budget.py --size 2048 --tile 512 --shares 0.1 0.2

Everything is counted on the meta device, where tensors have no memory and nothing is computed, so any image size will
do. The program prints a table and writes budget.json to the output folder.

- conventional: the bytes that the plain network holds between forward and backward, without the image.
- carried: what fxstream holds between the passes without a budget, as a share of these bytes.
- kept: what it holds beyond that with a memory budget of 10% or 20% of these bytes, or what --shares says.
- step: the FLOPs of forward and backward, divided by those of the conventional step. Those of convolutions, matrix
  products and attention count; the gradients of a grouped convolution take what each forward takes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cases import MODELS
from measure import environment
from rich.console import Console
from rich.table import Table
from torch import nn

import fxstream
from fxstream.memory.flops import Flops
from fxstream.memory.live import LiveBytes


@dataclass
class Counts:
    """A training step on the meta device."""

    held: int
    """Bytes that are alive between forward and backward."""
    flops: int


@dataclass
class Row:
    """What was counted for one network."""

    model: str
    conventional: Counts
    streamed: dict[float, Counts]
    """By the memory budget, as a share of the conventional bytes."""

    def cells(self) -> list[str]:
        held = self.conventional.held
        carried = self.streamed[0].held
        cells = [self.model, f"{held / 2**20:.0f}", f"{self.conventional.flops / 1e12:.2f}", f"{carried / held:.1%}"]
        for share, counts in self.streamed.items():
            if share:
                cells.append(f"{(counts.held - carried) / held:.1%}")
            cells.append(f"{counts.flops / self.conventional.flops:.3f}")
        return cells


def row(model: str, size: int, tile: int, shares: list[float]) -> Row:
    with torch.device("meta"):
        network = MODELS[model]().eval()
        image = torch.randn(1, 3, size, size)
    conventional = counts(network, image)
    converted = fxstream.convert(network, tile, prove=False)
    streamed = {}
    for share in (0, *shares):
        converted.memory_budget = int(share * conventional.held)
        streamed[share] = counts(converted, image)
    return Row(model, conventional, streamed)


def counts(network: nn.Module, image: torch.Tensor) -> Counts:
    with Flops() as flops, LiveBytes() as live:
        loss = network(image).square().mean()
        held = live.now
        loss.backward()
    network.zero_grad()
    return Counts(held, flops.total)


def table(rows: list[Row], shares: list[float], title: str) -> Table:
    found = Table(title=title, title_justify="left")
    found.add_column("", no_wrap=True)
    budgets = (heading for share in shares for heading in (f"budget {share:.0%}: kept", "step"))
    for heading in ("conventional MiB", "TFLOP", "carried", "step", *budgets):
        found.add_column(heading, justify="right")
    for one in rows:
        found.add_row(*one.cells())
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["resnet18", "resnet50", "convnext_tiny"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=default, metavar="MODEL")
    parser.add_argument("--size", type=int, default=2048, help="height and width of the image in pixels")
    parser.add_argument("--tile", type=int, default=512, help="height and width of a tile in pixels")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.1, 0.2], help="memory budgets as shares of the conventional bytes"
    )
    parser.add_argument("--output", type=Path, default=Path("out/budget"), help="folder for budget.json")
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    rows = []
    for model in options.models:
        rows.append(row(model, options.size, options.tile, options.shares))
        found = {"environment": environment(), "options": {**vars(options), "output": str(options.output)}}
        text = json.dumps({**found, "rows": [asdict(one) for one in rows]}, indent=1)
        (options.output / "budget.json").write_text(text + "\n")
    edge = f"{options.size} x {options.size}"
    console.print(table(rows, options.shares, f"A training step, {edge} in tiles of {options.tile}, counted"))
    console.print(f"{options.output}/budget.json")


if __name__ == "__main__":
    main()
