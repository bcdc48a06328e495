"""Train resnet18 on one large photograph, conventionally and streamed, side by side.

    python examples/quickstart.py

The program prints the losses, the time and the peak memory of both ways of training, which differ in one line:
`fxstream.convert`. The photograph is scikit-image's retina.jpg, upsampled. Each way of training runs in a process of
its own, from the same seed, so that its peak memory can be measured separately.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import skimage.data
import torch
import torchvision
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import fxstream

WAYS = ("conventional", "streamed")


def photograph(size: int) -> torch.Tensor:
    """The photograph of a retina: (1, 3, size, size), float32 in [-1, 1]."""
    pixels = torch.from_numpy(skimage.data.retina()).permute(2, 0, 1)[None].float() / 127.5 - 1
    return nn.functional.interpolate(pixels, size=(size, size), mode="bilinear")


def train(way: str, size: int, tile: int, steps: int) -> Iterator[dict[str, float]]:
    """Yield the loss, the seconds and the peak bytes (beyond the loaded model) of every step."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet18(num_classes=2).eval()
    if way == "streamed":
        model = fxstream.convert(model, tile_shape=(tile, tile), freeze_batchnorm=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    loaded = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    image, target = photograph(size), torch.tensor([1])
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = criterion(model(image), target)
        loss.backward()
        optimizer.step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        yield {"loss": loss.item(), "seconds": time.perf_counter() - start, "bytes": peak - loaded}


def run_apart(way: str, options: argparse.Namespace, progress: Progress) -> list[dict[str, float]]:
    """Train in a fresh process and show a progress bar; returns what `train` yields."""
    task = progress.add_task(way, total=options.steps)
    command = [sys.executable, __file__, "--way", way, "--size", str(options.size)]
    command += ["--tile", str(options.tile), "--steps", str(options.steps)]
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found.append(json.loads(line))
            progress.advance(task)
    if process.returncode:
        raise SystemExit(f"training {way} ended with exit status {process.returncode}")
    return found


def report(found: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> Table:
    title = f"resnet18 on {options.size} x {options.size} pixels, tile {options.tile}"
    table = Table("", *WAYS, "", title=title)
    losses = zip(*([step["loss"] for step in found[way]] for way in WAYS), strict=True)
    difference = 0.0
    for number, (plain, streamed) in enumerate(losses, start=1):
        difference = max(difference, abs(plain - streamed))
        table.add_row(f"loss, step {number}", f"{plain:.6f}", f"{streamed:.6f}", "")
    table.add_row("largest difference", "", f"{difference:.1e}", "", end_section=True)
    seconds, peaks = (
        [
            max(step[key] for step in found[way]) if key == "bytes" else sum(step[key] for step in found[way])
            for way in WAYS
        ]
        for key in ("seconds", "bytes")
    )
    table.add_row("time", *(f"{value:.1f} s" for value in seconds), f"{seconds[1] / seconds[0]:.2f} x")
    table.add_row("peak memory", *(f"{value / 2**20:.0f} MiB" for value in peaks), f"1/{peaks[0] / peaks[1]:.1f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=3000, help="height and width of the photograph in pixels")
    parser.add_argument("--tile", type=int, default=512, help="tile size in pixels")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        for step in train(options.way, options.size, options.tile, options.steps):
            print(json.dumps(step), flush=True)
        return
    console = Console()
    columns: list[Any] = [TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console) as progress:
        found = {way: run_apart(way, options, progress) for way in WAYS}
    console.print(report(found, options))


if __name__ == "__main__":
    main()
