"""Measure one case and print what was found as JSON. `compare.py` starts this program in a fresh process each time.

    python benchmarks/measure.py TASK CASE

TASK is timed, counted or compared. CASE is a `cases.Case` as JSON.
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
from typing import Any

import torch
from cases import MODELS, Case
from ways import WAYS, Conventional

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(case: Case, dtype: torch.dtype = torch.float32) -> Conventional:
    torch.manual_seed(0)
    network = MODELS[case.model]().eval().to(DEVICE, dtype)
    return WAYS[case.way](network, case.tile)


def image_of(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, 3, size, size, device=DEVICE, dtype=dtype)


def run(way: Conventional, image: torch.Tensor, mode: str) -> torch.Tensor | None:
    if mode == "inference":
        with torch.inference_mode():
            return way.output(image)
    way.backward(way.forward(image))
    return None


def timed(case: Case) -> dict[str, float]:
    """The seconds of a step, and its peak bytes beyond the loaded model."""
    way = build(case)
    meter = Cuda() if DEVICE.type == "cuda" else Host()
    # A first run takes care of lazy initialisation, which on CUDA includes the kernels for this very size.
    run(way, image_of(case.size if DEVICE.type == "cuda" else way.warm_up), case.mode)
    _release(way)
    meter.loaded()
    image = image_of(case.size)
    meter.start()
    output = run(way, image, case.mode)
    found = meter.stop()
    del output
    return found


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
        image = image_of(case.size)
        if case.mode == "training":
            loss = way.forward(image)
            gc.collect()
            held = live.now - image.nbytes
            way.backward(loss)
            del loss
        else:
            run(way, image, case.mode)
    _release(way)
    with Flops() as flops:
        run(way, image, case.mode)
    return {"flops": flops.total, "live_bytes": live.peak, "held_bytes": held}


def compared(case: Case) -> dict[str, Any]:
    """The largest relative L2 error of a parameter's gradient (in inference: of the output) in float64.

    The reference is the conventional way. The image is small, whatever the size of the case.
    """
    plain = build(replace(case, way="conventional", tile=None), torch.float64)
    way = build(case, torch.float64)
    found, expected = (_results(one, way.small, case.mode) for one in (way, plain))
    errors = {
        name: ((found[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-300)).item() for name in found
    }
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return {"error": errors[worst], "worst": worst, "size": way.small, "untrained": len(expected) - len(found)}


def _results(way: Conventional, size: int, mode: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    output = run(way, image_of(size, torch.float64), mode)
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

if __name__ == "__main__":
    _limit_memory()
    print(json.dumps(TASKS[sys.argv[1]](Case(**json.loads(sys.argv[2])))))
