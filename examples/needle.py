"""Train a small network at full resolution and on downsampled images, where only full resolution shows the label.

    python examples/needle.py

The program prints a table with the validation AUC, time and peak memory of each way of training, and draws the learning
curves to out/needle.png.

An image of 2048 x 2048 pixels is a blend of photographs of brick, grass and gravel that scikit-image ships, with eight
crosses of 3 x 3 pixels at random places: upright crosses (+) for label 0, diagonal ones (x) for label 1. Both kinds
have the same pixel values, which sum to zero, so neither the brightness nor the histogram of an image reveals its
label. The same network is trained on the full images, streamed, and on images downsampled by 4 and by 8, for four times
as many steps. One conventional step on a full image is measured for comparison. Each way of training runs in a process
of its own, from the same seed.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fxstream

CROSSES = [
    np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=np.float32),
    np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=np.float32),
]
MARKS = 8
CELL = 16  # pixels; no two crosses share a cell of this size, so crosses do not overlap
BATCH = 2
CHECKS = 8


@dataclass(frozen=True)
class Way:
    """A way to train: on images downsampled by `factor`, for `patience` times the steps; for one step if it is 0."""

    name: str
    factor: int
    patience: int
    streamed: bool = False

    def steps(self, options: argparse.Namespace) -> int:
        return self.patience * options.steps if self.patience else 1


WAYS = {
    "streamed": Way("streamed", factor=1, patience=1, streamed=True),
    "down4": Way("downsampled 4x", factor=4, patience=4),
    "down8": Way("downsampled 8x", factor=8, patience=4),
    "conventional": Way("conventional", factor=1, patience=0),
}


def downsample(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    """Averages of `factor` x `factor` pixels, so that the result has no aliasing and depends on every pixel."""
    return nn.functional.avg_pool2d(pixels, factor) if factor > 1 else pixels


class Haystack(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images (1, size / factor, size / factor), made when they are read, with labels 0 and 1 in turn."""

    def __init__(self, seed: tuple[int, ...], length: int, size: int, factor: int = 1) -> None:
        self.seed, self.length, self.size, self.factor = seed, length, size, factor
        photographs = (skimage.data.brick(), skimage.data.grass(), skimage.data.gravel())
        # Each photograph is joined with its mirror images, so that copies side by side have no seams.
        self.textures = [np.pad(np.float32(each) / 255, (0, len(each)), mode="symmetric") for each in photographs]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, _ = self.draw(index)
        return downsample(image, self.factor), torch.tensor(float(index % 2))

    def draw(self, index: int) -> tuple[torch.Tensor, np.ndarray]:
        """Image `index` at full resolution, roughly standardised, and the top left corners of its crosses."""
        random = np.random.default_rng((*self.seed, index))
        share = random.uniform()
        texture = share * self._texture(random) + (1 - share) * self._texture(random)
        # The texture takes at most half of the range from black to white, so that no cross needs clipping.
        texture = 0.5 + random.uniform(0.2, 0.4) * (texture - 0.5)
        copies = -(-self.size // len(texture))
        image = np.tile(texture, (copies, copies))[: self.size, : self.size]
        cross = CROSSES[index % 2] - CROSSES[index % 2].mean()
        cells = random.choice((self.size // CELL) ** 2, MARKS, replace=False)
        corners = CELL * np.stack(np.divmod(cells, self.size // CELL), axis=1) + random.integers(0, 8, (MARKS, 2))
        for row, column in corners:
            image[row : row + 3, column : column + 3] += 0.38 * cross
        return torch.from_numpy(8 * (image - 0.5))[None], corners

    def _texture(self, random: np.random.Generator) -> np.ndarray:
        """A random texture, shifted by a random offset and transposed at random."""
        texture = self.textures[random.integers(len(self.textures))]
        texture = np.roll(texture, random.integers(len(texture), size=2), axis=(0, 1))
        return texture.T if random.integers(2) else texture


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.MaxPool2d(4),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 1),
        nn.Flatten(0),
    )


def area_under_curve(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of pairs in which the image of label 1 has a higher score than that of label 0; ties count half."""
    differences = scores[labels == 1][:, None] - scores[labels == 0]
    return ((differences > 0).double() + (differences == 0).double() / 2).mean().item()


@torch.no_grad()
def validate(model: nn.Module, validation: Haystack) -> float:
    scores, labels = zip(*((model(images), labels) for images, labels in DataLoader(validation, BATCH)), strict=True)
    return area_under_curve(torch.cat(scores), torch.cat(labels))


def train(way: Way, options: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Yield the loss, the seconds and the peak bytes (beyond the loaded model) of every step, and the AUC of some."""
    torch.manual_seed(options.seed)
    model = network()
    if way.streamed:
        model = fxstream.convert(model, tile_shape=(options.tile, options.tile))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    criterion = nn.BCEWithLogitsLoss()
    steps = way.steps(options)
    training = Haystack((options.seed, 0), BATCH * steps, options.size, way.factor)
    validation = Haystack((options.seed, 1), options.validation, options.size, way.factor)
    loaded = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    start = time.perf_counter()
    for step, (images, labels) in enumerate(DataLoader(training, BATCH), start=1):
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        found = {"step": step, "loss": loss.item(), "seconds": time.perf_counter() - start}
        if way.patience and (step == steps or step % max(1, steps // CHECKS) == 0):
            found["auc"] = validate(model, validation)
        found["bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - loaded
        yield found
        start = time.perf_counter()


def run_apart(key: str, options: argparse.Namespace, progress: Progress) -> list[dict[str, float]]:
    """Train in a fresh process and show a progress bar; returns what `train` yields."""
    task = progress.add_task(WAYS[key].name, total=WAYS[key].steps(options), auc="")
    command = [sys.executable, __file__, "--way", key]
    for option in ("seed", "size", "tile", "steps", "validation"):
        command += [f"--{option}", str(getattr(options, option))]
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found.append(json.loads(line))
            progress.advance(task)
            if "auc" in found[-1]:
                progress.update(task, auc=f"AUC {found[-1]['auc']:.3f}")
    if process.returncode:
        raise SystemExit(f"training {WAYS[key].name} ended with exit status {process.returncode}")
    return found


def report(found: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> Table:
    title = f"{MARKS} crosses of 3 x 3 pixels in {options.size} x {options.size}, seed {options.seed}"
    table = Table("", title=title)
    for heading in ("pixels", "steps", "AUC", "seconds", "s / step", "peak MiB"):
        table.add_column(heading, justify="right")
    for key, steps in found.items():
        side = options.size // WAYS[key].factor
        auc = f"{steps[-1]['auc']:.3f}" if "auc" in steps[-1] else ""
        seconds = sum(step["seconds"] for step in steps)
        costs = f"{seconds:.1f}", f"{seconds / len(steps):.2f}", f"{steps[-1]['bytes'] / 2**20:.0f}"
        table.add_row(WAYS[key].name, f"{side} x {side}", str(len(steps)), auc, *costs)
    return table


def plot(found: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> Figure:
    """A cross of each label at every resolution, and the learning curves."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    examples = Haystack((options.seed, 1), 2, options.size)
    for label, row in enumerate(left.subplots(2, 3)):
        image, corners = examples.draw(label)
        top, bottom = (slice(start, start + 32) for start in np.clip(corners[0] // 8 * 8 - 8, 0, options.size - 32))
        for factor, axes in zip((1, 4, 8), row, strict=True):
            patch = downsample(image[:, top, bottom], factor)[0]
            axes.imshow(patch, cmap="gray", vmin=-3, vmax=3)
            axes.set(xticks=[], yticks=[], title=f"label {label}" + (f", {factor}x" if factor > 1 else ""))
    axes = right.subplots()
    for key, steps in found.items():
        checks = [step for step in steps if "auc" in step]
        if checks:
            axes.plot([step["step"] for step in checks], [step["auc"] for step in checks], "o-", label=WAYS[key].name)
    axes.axhline(0.5, color="gray", linestyle=":", label="chance")
    axes.set(xlabel=f"steps of {BATCH} images", ylabel=f"AUC on {options.validation} other images", ylim=(0, 1.03))
    axes.set_xscale("log", base=2)
    axes.legend(loc="lower right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=2048, help="height and width of the images in pixels")
    parser.add_argument("--tile", type=int, default=256, help="tile size in pixels")
    parser.add_argument("--steps", type=int, default=40, help="at full resolution; four times as many downsampled")
    parser.add_argument("--validation", type=int, default=48, help="number of images to validate on")
    parser.add_argument("--plot", type=Path, default=Path("out/needle.png"), help="where to write the learning curves")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        for step in train(WAYS[options.way], options):
            print(json.dumps(step), flush=True)
        return
    console = Console()
    columns: list[Any] = [TextColumn("{task.description:>20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("{task.fields[auc]}"), console=console) as progress:
        found = {key: run_apart(key, options, progress) for key in WAYS}
    console.print(report(found, options))
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(found, options).savefig(options.plot, dpi=120)
    console.print(f"learning curves: {options.plot}")


if __name__ == "__main__":
    main()
