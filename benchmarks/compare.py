"""Compare conventional PyTorch, checkpointing, lightstream, and fxstream without and with a memory budget.

    python benchmarks/compare.py --models resnet18 --sizes 1024 2048 --tiles 256 512 --repeats 3

The program prints a table of times, memory and counts for every network, size and mode. After each table, it writes
bench.json, and bench.png with time and memory against size, to the output folder. After each measurement, it appends a
line to runs.jsonl there, so that nothing is lost if the program is stopped.

A training step is the forward pass of the network, a loss, and the backward pass; an inference step is the forward pass
alone. A step runs in float32 on one image, which gets no gradient, and all normalisation uses running statistics. Each
measurement runs in a process of its own, one after the other. The ways take turns, and medians are reported. Before
that, the gradients of each way (in inference: its outputs) are compared with the conventional ones, in float64 and on a
small image. If they are wrong, the case is not comparable and is not timed.

On a GPU, starting processes may take longer than measuring. With --shared, one process makes all measurements; with
--steps, a measurement is the median of several steps; with --unchecked, nothing is compared.

- seconds: the time of one step, measured by CUDA events if there is a GPU.
- peak: the peak of resident memory (on a GPU: of allocated memory) beyond the loaded model, the image included.
- TFLOP: floating-point operations as torch.utils.flop_counter counts them, without element-wise operations.
- live: the peak of the bytes of all tensors that the step makes, the image included.
- held: the bytes of those tensors that are alive between forward and backward, without the image.
- error: the largest relative error found by the comparison.

The FLOPs, live and held bytes are counted in another process, since counting disturbs time and memory.
"""

from __future__ import annotations

import argparse
import json
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from cases import MODELS, MODES, PLACES, Case
from measure import environment
from report import notes, plot, table
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from ways import SAME_INFERENCE, TILED, WAYS

MEASURED = ("seconds", "peak_bytes")
COUNTED = ("flops", "live_bytes", "held_bytes")
AUTOCAST = ("none", "bfloat16", "float16")
MEASURE = (sys.executable, str(Path(__file__).with_name("measure.py")))
TOLERANCE = 1e-6
"""The largest accepted relative error of gradients in float64. Rounding alone has given 1e-14."""


@dataclass
class Row:
    """The measurements of one case."""

    case: Case
    status: str = "ok"
    note: str = ""
    compared: dict[str, Any] = field(default_factory=dict)
    counted: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, float]] = field(default_factory=list)

    def fail(self, note: str) -> None:
        self.status, self.note = "failed", note

    def figures(self) -> dict[str, float | None]:
        found = {key: median(run[key] for run in self.runs) if self.runs else None for key in MEASURED}
        return {**found, **{key: self.counted.get(key) for key in COUNTED}}

    def record(self, plain: dict[str, float | None]) -> dict[str, Any]:
        """What bench.json says of the case; `plain` are the figures of the conventional case."""
        figures = self.figures() if self.status == "ok" else dict.fromkeys(MEASURED + COUNTED)
        ratios = {key: value / plain[key] if value and plain[key] else None for key, value in figures.items()}
        found = {"status": self.status, "note": self.note, **figures, "ratios": ratios}
        return {**asdict(self.case), "label": self.case.label, **found, "compared": self.compared, "runs": self.runs}


class ProcessError(Exception):
    """A measuring process has failed; the message says why."""


class Fresh:
    """Starts a process for each task."""

    def __init__(self, timeout: int):
        self.timeout = timeout

    def ask(self, task: str, case: Case, *steps: int) -> dict[str, Any]:
        command = [*MEASURE, task, json.dumps(asdict(case)), *map(str, steps)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.timeout)
        except subprocess.TimeoutExpired:
            raise ProcessError(f"more than {self.timeout} s ({task})") from None
        if done.returncode < 0:
            raise ProcessError(f"killed by {signal.Signals(-done.returncode).name} ({task})")
        if done.returncode:
            raise ProcessError(f"{done.stderr.strip().splitlines()[-1]} ({task})")
        return json.loads(done.stdout)


class Shared:
    """Gives all tasks to one process. After a failure, it starts another one: CUDA may be unusable in the first."""

    def __init__(self, timeout: int):
        self.timeout = timeout
        self.process: subprocess.Popen[str] | None = None

    def ask(self, task: str, case: Case, *steps: int) -> dict[str, Any]:
        if self.process is None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen([*MEASURE, "serve"], stdin=pipe, stdout=pipe, text=True)
        process, line = self.process, ""
        process.stdin.write(json.dumps([task, asdict(case), *steps]) + "\n")
        process.stdin.flush()
        in_time, _, _ = select.select([process.stdout], [], [], self.timeout)
        if in_time:
            line = process.stdout.readline()
        if not line:
            self.close()
            raise ProcessError(f"the process has ended ({task})" if in_time else f"more than {self.timeout} s ({task})")
        answer = json.loads(line)
        if "failure" in answer:
            self.close()
            raise ProcessError(f"{answer['failure']} ({task})")
        return answer

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Bench:
    """Runs cases, by default each in a fresh process."""

    def __init__(self, options: argparse.Namespace, progress: Progress):
        self.options, self.progress = options, progress
        self.processes = (Shared if options.shared else Fresh)(options.timeout)
        self.task = progress.add_task("")
        self.comparisons: dict[Case, dict[str, Any] | ProcessError] = {}

    def group(self, cases: list[Case]) -> list[dict[str, Any]]:
        """Measure cases that differ only in their way, in turns; returns their records."""
        rows = [Row(case) for case in cases]
        for row in rows:
            self.prepare(row)
        for _ in range(self.options.repeats):
            for row in rows:
                self.attempt(row)
        plain = next((row.figures() for row in rows if row.case.way == "conventional"), {})
        return [row.record({**dict.fromkeys(MEASURED + COUNTED), **plain}) for row in rows]

    def close(self) -> None:
        if isinstance(self.processes, Shared):
            self.processes.close()

    def prepare(self, row: Row) -> None:
        """Compare the results of a case with the conventional ones, and count what it does."""
        try:
            if row.case.way != "conventional" and not self.options.unchecked:
                row.compared = self.compare(row.case)
            if row.compared and not row.compared["error"] <= TOLERANCE:
                row.status = "not comparable"
                row.note = "relative error {error:.1e} of {worst}".format(**row.compared)
            elif row.case.size <= self.options.count_up_to:
                row.counted = self.run("counted", row.case)
            if row.status == "ok" and row.compared.get("untrained"):
                row.note = "{untrained} parameters (normalisation) are not trained".format(**row.compared)
        except ProcessError as error:
            row.fail(str(error))

    def compare(self, case: Case) -> dict[str, Any]:
        """The comparison of a case with the conventional one, made once for all sizes."""
        key = replace(case, size=0, autocast=None)
        if key not in self.comparisons:
            try:
                self.comparisons[key] = self.run("compared", case)
            except ProcessError as error:
                self.comparisons[key] = error
        found = self.comparisons[key]
        if isinstance(found, ProcessError):
            raise found
        return found

    def attempt(self, row: Row) -> None:
        if row.status == "ok":
            try:
                row.runs.append(self.run("timed", row.case, self.options.steps))
            except ProcessError as error:
                row.fail(str(error))
            found = {**asdict(row.case), "note": row.note, **(row.runs[-1] if row.status == "ok" else {})}
            with (self.options.output / "runs.jsonl").open("a") as log:
                log.write(json.dumps(found) + "\n")

    def run(self, task: str, case: Case, *steps: int) -> dict[str, Any]:
        self.progress.update(self.task, description=f"{case.model}, {case.size}, {case.mode}, {case.label}: {task}")
        return self.processes.ask(task, case, *steps)


def groups(options: argparse.Namespace) -> Iterator[list[Case]]:
    for model in options.models:
        for mode in options.modes:
            for size in options.sizes:
                for dtype in options.autocast:
                    yield [
                        Case(model, size, mode, way, tile, None if dtype == "none" else dtype, options.image_on)
                        for way in options.ways
                        if not (way in SAME_INFERENCE and mode == "inference")
                        for tile in ([tile for tile in options.tiles if tile < size] if way in TILED else [None])
                    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["resnet18"], metavar="MODEL", help=f"{[*MODELS]}"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["training"], metavar="MODE", help=f"{[*MODES]}")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], metavar="WAY", help=f"{[*WAYS]}")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 2048, 4096], help="height and width in pixels")
    parser.add_argument("--large", action="store_true", help="measure 8192, too")
    parser.add_argument("--tiles", nargs="+", type=int, default=[256, 512, 1024], help="tile sizes in pixels")
    parser.add_argument(
        "--autocast",
        nargs="+",
        choices=AUTOCAST,
        default=["none"],
        metavar="DTYPE",
        help=f"dtypes of autocast: {[*AUTOCAST]}",
    )
    parser.add_argument("--image-on", choices=PLACES, default="device", help="where the image is if there is a GPU")
    parser.add_argument("--repeats", type=int, default=3, help="how often a case is measured")
    parser.add_argument("--steps", type=int, default=1, help="how many steps a measurement takes; the median counts")
    parser.add_argument("--shared", action="store_true", help="make all measurements in one process")
    parser.add_argument("--unchecked", action="store_true", help="do not compare the gradients first")
    parser.add_argument("--count-up-to", type=int, default=2048, metavar="SIZE", help="count only up to this size")
    parser.add_argument("--timeout", type=int, default=1800, metavar="SECONDS", help="time limit for one process")
    parser.add_argument("--output", type=Path, default=Path("out/bench"), help="folder for bench.json and bench.png")
    options = parser.parse_args()
    options.sizes += [8192] if options.large and 8192 not in options.sizes else []
    return options


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    found = {"environment": environment(), "options": {**vars(options), "output": str(options.output)}, "cases": []}
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bench = Bench(options, progress)
        for cases in groups(options):
            records = bench.group(cases)
            console.print(table(records), *notes(records), sep="\n")
            found["cases"] += records
            (options.output / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
            plot(found["cases"], options.output / "bench.png")
        bench.close()
    console.print(f"{options.output}/bench.json, {options.output}/bench.png")


if __name__ == "__main__":
    main()
