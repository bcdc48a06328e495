"""Measure one case and print what was found as JSON. `compare.py` starts this program in a fresh process each time.

    python benchmarks/measure.py TASK CASE [STEPS]
    python benchmarks/measure.py serve

TASK is timed, counted or compared. CASE is a `cases.Case` as JSON. STEPS is how many steps are timed; the median of
their times is reported. With serve, the program reads such arguments as a list in JSON from each line of its input, and
prints each answer as a line.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cases import MODELS, Case
from ways import WAYS, Conventional

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(case: Case, dtype: torch.dtype = torch.float32) -> Conventional:
    torch.manual_seed(0)
    network = MODELS[case.model]().eval().to(DEVICE, dtype)
    return WAYS[case.way](network, case.tile)


def image_of(size: int, dtype: torch.dtype = torch.float32, image_on: str = "device") -> torch.Tensor:
    return torch.randn(1, 3, size, size, device=DEVICE if image_on == "device" else "cpu", dtype=dtype)


def run(way: Conventional, image: torch.Tensor, case: Case) -> torch.Tensor | None:
    if case.mode == "inference":
        with torch.inference_mode(), _autocast(case):
            return way.output(_moved(way, image))
    way.backward(forward(way, image, case))
    return None


def forward(way: Conventional, image: torch.Tensor, case: Case) -> torch.Tensor:
    """The loss."""
    with _autocast(case):
        return way.forward(_moved(way, image))


def _autocast(case: Case) -> torch.autocast:
    return torch.autocast(DEVICE.type, getattr(torch, case.autocast or "bfloat16"), enabled=case.autocast is not None)


def _moved(way: Conventional, image: torch.Tensor) -> torch.Tensor:
    return image if way.moves_image else image.to(DEVICE)


def timed(case: Case, steps: int = 1) -> dict[str, float]:
    """The median of the seconds of several steps, and their peak bytes beyond the loaded model."""
    way = build(case)
    meter = Cuda() if DEVICE.type == "cuda" else Host()
    # A first run takes care of lazy initialisation, which on CUDA includes the kernels for this very size.
    warm_up = image_of(case.size if DEVICE.type == "cuda" else way.warm_up, image_on=case.image_on)
    run(way, warm_up, case)
    del warm_up
    _release(way)
    meter.loaded()
    image = image_of(case.size, image_on=case.image_on)
    found = []
    for _ in range(steps):
        meter.start()
        output = run(way, image, case)
        found.append(meter.stop())
        del output
        _release(way)
    return {"seconds": median(one["seconds"] for one in found), "peak_bytes": found[-1]["peak_bytes"]}


class Host:
    """Measures time by the clock, and resident memory."""

    def loaded(self) -> None:
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # memory that was freed while the model was built does not belong to it
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory
        self.before = _status("VmRSS")

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        return {"seconds": seconds, "peak_bytes": _status("VmHWM") - self.before}


class Cuda:
    """Measures time by CUDA events, and allocated device memory."""

    def __init__(self) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def loaded(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def start(self) -> None:
        torch.cuda.synchronize()
        self.events[0].record()

    def stop(self) -> dict[str, float]:
        self.events[1].record()
        torch.cuda.synchronize()
        seconds = self.events[0].elapsed_time(self.events[1]) / 1000
        return {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated() - self.before}


def _release(way: Conventional) -> None:
    for parameter in way.parameters().values():
        parameter.grad = None
    gc.collect()


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def counted(case: Case) -> dict[str, int | None]:
    """FLOPs of a step; bytes of live tensors at their peak, and between forward and backward without the image."""
    from fxstream.memory.flops import Flops  # so that `timed` runs without it
    from fxstream.memory.live import LiveBytes

    way = build(case)
    held = None
    with LiveBytes() as live:
        image = image_of(case.size, image_on=case.image_on)
        if case.mode == "training":
            loss = forward(way, image, case)
            gc.collect()
            held = live.now - image.nbytes
            way.backward(loss)
            del loss
        else:
            run(way, image, case)
    _release(way)
    with Flops() as flops:
        run(way, image, case)
    return {"flops": flops.total, "live_bytes": live.peak, "held_bytes": held}


def compared(case: Case) -> dict[str, Any]:
    """The largest relative L2 error of a parameter's gradient (in inference: of the output) in float64.

    The reference is the conventional way. The image is small, whatever the size of the case, and there is no autocast.
    """
    case = replace(case, autocast=None)
    plain = build(replace(case, way="conventional", tile=None), torch.float64)
    way = build(case, torch.float64)
    found, expected = (_results(one, way.small, case) for one in (way, plain))
    errors = {
        name: ((found[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-300)).item() for name in found
    }
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return {"error": errors[worst], "worst": worst, "size": way.small, "untrained": len(expected) - len(found)}


def _results(way: Conventional, size: int, case: Case) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    output = run(way, image_of(size, torch.float64, case.image_on), case)
    return {name: one.grad for name, one in way.parameters().items()} if output is None else {"output": output}


def environment() -> dict[str, Any]:
    """The versions, the hardware and the settings on which the figures depend."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    prefixes = ("OMP_", "MKL_", "KMP_", "MALLOC_", "LD_PRELOAD", "PYTORCH_", "GLIBC_TUNABLES", "DNNL_", "ONEDNN_")
    return {
        "versions": {name: _version(name) for name in ("torch", "torchvision", "lightstream")},
        "python": platform.python_version(),
        "cpu": cpus[0].partition(":")[2].strip() if cpus else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "tf32": torch.backends.cudnn.allow_tf32 if DEVICE.type == "cuda" else None,
        "libc": " ".join(platform.libc_ver()),
        "variables": {key: value for key, value in sorted(os.environ.items()) if key.startswith(prefixes)},
        "load": os.getloadavg(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _limit_memory() -> None:
    """Make allocations beyond the available memory fail, before the kernel chooses a process to kill."""
    if DEVICE.type == "cpu":
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        resource.setrlimit(resource.RLIMIT_DATA, (available, available))


TASKS = {"timed": timed, "counted": counted, "compared": compared}


def serve() -> None:
    """Answer requests, one after the other. An error, such as that memory is exhausted, is an answer, too."""
    for line in sys.stdin:
        task, case, *steps = json.loads(line)
        try:
            answer = TASKS[task](Case(**case), *steps)
        except Exception as error:
            answer = {"failure": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), flush=True)
        # The next case gets memory that is not in pieces.
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    _limit_memory()
    if sys.argv[1] == "serve":
        serve()
    else:
        print(json.dumps(TASKS[sys.argv[1]](Case(**json.loads(sys.argv[2])), *map(int, sys.argv[3:]))))
