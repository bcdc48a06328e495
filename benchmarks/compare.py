"""Compare conventional PyTorch, checkpointing, lightstream, and fxstream without and with a memory budget.

    python benchmarks/compare.py --models resnet18 --sizes 1024 2048 --tiles 256 512 --repeats 3

The program prints a table of times, memory and counts for every network, size and mode. After each table, it writes
bench.json, and bench.png with time and memory against size, to the output folder.

A training step is the forward pass of the network, a loss, and the backward pass; an inference step is the forward pass
alone. A step runs in float32 on one image, which gets no gradient, and all normalisation uses running statistics. Each
measurement runs in a process of its own, one after the other. The ways take turns, and medians are reported. Before
that, the gradients of each way (in inference: its outputs) are compared with the conventional ones, in float64 and on a
small image. If they are wrong, the case is not comparable and is not timed.

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
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from cases import MODELS, MODES, Case
from measure import environment
from report import notes, plot, table
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from ways import SAME_INFERENCE, TILED, WAYS

MEASURED = ("seconds", "peak_bytes")
COUNTED = ("flops", "live_bytes", "held_bytes")
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


class Bench:
    """Runs cases, each in a fresh process."""

    def __init__(self, options: argparse.Namespace, progress: Progress):
        self.options, self.progress = options, progress
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

    def prepare(self, row: Row) -> None:
        """Compare the results of a case with the conventional ones, and count what it does."""
        try:
            if row.case.way != "conventional":
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
        key = replace(case, size=0)
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
                row.runs.append(self.run("timed", row.case))
            except ProcessError as error:
                row.fail(str(error))

    def run(self, task: str, case: Case) -> dict[str, Any]:
        self.progress.update(self.task, description=f"{case.model}, {case.size}, {case.mode}, {case.label}: {task}")
        command = [sys.executable, str(Path(__file__).with_name("measure.py")), task, json.dumps(asdict(case))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.options.timeout)
        except subprocess.TimeoutExpired:
            raise ProcessError(f"more than {self.options.timeout} s ({task})") from None
        if done.returncode < 0:
            raise ProcessError(f"killed by {signal.Signals(-done.returncode).name} ({task})")
        if done.returncode:
            raise ProcessError(f"{done.stderr.strip().splitlines()[-1]} ({task})")
        return json.loads(done.stdout)


def groups(options: argparse.Namespace) -> Iterator[list[Case]]:
    for model in options.models:
        for mode in options.modes:
            for size in options.sizes:
                yield [
                    Case(model, size, mode, way, tile)
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
    parser.add_argument("--repeats", type=int, default=3)
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
    console.print(f"{options.output}/bench.json, {options.output}/bench.png")


if __name__ == "__main__":
    main()
