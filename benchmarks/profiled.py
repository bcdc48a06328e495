"""Profile one streamed training step: where its time goes on the CPU, and on the GPU if there is one.

    python benchmarks/profiled.py --size 2048 --tile 512

Each profiler gets a step of its own, since it slows down what it observes: cProfile counts Python functions, and
torch.profiler counts operations and kernels. On a GPU, cProfile may not see the backward pass, which runs in another
thread. The program prints tables and writes profile.json, with the totals and the costliest operations, to the output
folder.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from pathlib import Path
from typing import Any

import torch
from cases import MODELS
from measure import DEVICE, environment
from torch.profiler import ProfilerActivity, profile

import fxstream


def step(model: torch.nn.Module, image: torch.Tensor) -> float:
    """A training step; its seconds, until the device has finished."""
    began = time.perf_counter()
    model(image).square().mean().backward()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--size", type=int, default=2048, help="height and width of the image in pixels")
    parser.add_argument("--tile", type=int, default=512, help="height and width of a tile in pixels")
    parser.add_argument("--rows", type=int, default=25, help="length of the tables")
    parser.add_argument("--output", type=Path, default=Path("out/profile"), help="folder for profile.json")
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = fxstream.convert(MODELS[options.model]().eval().to(DEVICE), options.tile)
    image = torch.randn(1, 3, options.size, options.size, device=DEVICE)
    first, warm = step(model, image), step(model, image)
    print(
        f"{options.model}, {options.size}, tile {options.tile}, {DEVICE}: first step {first:.3f} s, next {warm:.3f} s"
    )
    found: dict[str, Any] = {"environment": environment(), "first_seconds": first, "seconds": warm}
    functions = cProfile.Profile()
    functions.runcall(step, model, image)
    pstats.Stats(functions).sort_stats("tottime").print_stats(options.rows)
    found["operations"] = operations(model, image, options.rows)
    (options.output / "profile.json").write_text(json.dumps(found, indent=1) + "\n")


def operations(model: torch.nn.Module, image: torch.Tensor, rows: int) -> list[dict[str, Any]]:
    """Print what torch.profiler finds in a step, and return the costliest operations; times are in microseconds."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        step(model, image)
    averages = profiler.key_averages()
    keys = ["self_cpu_time_total"] + (["self_device_time_total"] if DEVICE.type == "cuda" else [])
    for key in keys:
        print(averages.table(sort_by=key, row_limit=rows, max_name_column_width=60))
    costliest = sorted(averages, key=lambda one: one.self_cpu_time_total + one.self_device_time_total, reverse=True)
    return [
        {
            "name": one.key,
            "count": one.count,
            "cpu_microseconds": one.self_cpu_time_total,
            "device_microseconds": one.self_device_time_total,
        }
        for one in costliest[: 4 * rows]
    ]


if __name__ == "__main__":
    main()
