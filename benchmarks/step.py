"""Time and peak memory of one training step, conventional and streamed, each in a process of its own, side by side.

    python benchmarks/step.py --model resnet18 --size 4096 --tiles 256 512

The step is: forward of the convolutional trunk, global average pooling, loss, backward; float32, batch norms with
running statistics, no gradient for the image. Peak memory is the process's peak resident memory minus what was
resident when the model was loaded and the image was not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision
from tabulate import tabulate

import fxstream


def resident() -> int:
    """Resident memory of this process now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(model_name: str, size: int, tile: int | None, inference: bool) -> dict[str, float]:
    """One step in this process: seconds, and peak bytes over the loaded model. `tile` None: the plain model."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(model_name, num_classes=10).eval()
    if tile is not None:
        model = fxstream.convert(model, tile)
    _step(model, torch.randn(1, 3, 64, 64), inference)  # lazy initialisation is nobody's memory
    model.zero_grad()
    loaded = resident()
    image = torch.randn(1, 3, size, size)
    start = time.perf_counter()
    _step(model, image, inference)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "bytes": peak - loaded}


def _step(model: torch.nn.Module, image: torch.Tensor, inference: bool) -> None:
    with torch.inference_mode(inference):
        output = model(image)
    if not inference:
        output.square().mean().backward()


def run_apart(model: str, size: int, tile: int | None, inference: bool) -> dict[str, float]:
    """The same in a fresh process."""
    case = json.dumps([model, size, tile, inference])
    done = subprocess.run([sys.executable, __file__, "--case", case], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a torchvision model")
    parser.add_argument("--size", type=int, default=4096, help="height and width of the image in pixels")
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 512], help="tile sizes in pixels")
    parser.add_argument("--repeats", type=int, default=1, help="the cases alternate; medians are reported")
    parser.add_argument("--inference", action="store_true", help="forward only")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*json.loads(options.case))))
        return
    tiles = [None, *options.tiles]
    runs: dict[int | None, list[dict[str, float]]] = {tile: [] for tile in tiles}
    for _ in range(options.repeats):
        for tile in tiles:
            runs[tile].append(run_apart(options.model, options.size, tile, options.inference))
    medians = {
        tile: {key: statistics.median(run[key] for run in found) for key in ("seconds", "bytes")}
        for tile, found in runs.items()
    }
    plain = medians[None]
    rows = [
        [
            "conventional" if tile is None else f"fxstream, tile {tile}",
            f"{found['seconds']:.1f}",
            f"{found['bytes'] / 2**20:.0f}",
            f"{found['seconds'] / plain['seconds']:.2f}",
            f"1/{plain['bytes'] / found['bytes']:.1f}",
        ]
        for tile, found in medians.items()
    ]
    what = "inference" if options.inference else "training step"
    print(f"{options.model}, {options.size}x{options.size}, {what}, {torch.get_num_threads()} threads")
    print(tabulate(rows, headers=["", "seconds", "peak MiB", "time ratio", "memory ratio"], disable_numparse=True))


if __name__ == "__main__":
    main()
