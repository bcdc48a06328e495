"""Tables and plots of the records of `compare.py`. It is imported, not run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

COLUMNS = {
    "seconds": ("seconds", 1),
    "peak_bytes": ("peak MiB", 2**20),
    "flops": ("TFLOP", 1e12),
    "live_bytes": ("live MiB", 2**20),
    "held_bytes": ("held MiB", 2**20),
}
"""Figure of a record -> its heading and its unit."""


def table(records: list[dict[str, Any]]) -> Table:
    """A table of cases that differ only in their way; each figure is followed by its ratio to the conventional one."""
    found = Table(title=title(records[0]), title_justify="left")
    found.add_column("", no_wrap=True)
    for heading, _ in COLUMNS.values():
        found.add_column(heading, justify="right")
    found.add_column("error", justify="right")
    for record in records:
        error = record["compared"].get("error")
        figures = (_figure(record, key) for key in COLUMNS)
        found.add_row(record["label"], *figures, "" if error is None else f"{error:.0e}")
    return found


def title(record: dict[str, Any]) -> str:
    """What the cases of a table have in common."""
    autocast = f", {record['autocast']} autocast" if record["autocast"] else ""
    host = ", image on the host" if record["image_on"] == "host" else ""
    return "{model}, {size} x {size}, {mode}".format(**record) + autocast + host


def notes(records: list[dict[str, Any]]) -> Iterator[str]:
    """Remarks on the cases for which the table has no room."""
    for record in records:
        if record["note"]:
            status = "" if record["status"] == "ok" else f"{record['status']}: "
            yield f"{record['label']}: {status}{record['note']}"


def _figure(record: dict[str, Any], key: str) -> str:
    if record[key] is None:
        return ""
    ratio = record["ratios"][key]
    return f"{record[key] / COLUMNS[key][1]:.3g}" + ("" if ratio is None else f" ({ratio:.2f})")


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory against the size of the image, in one row for each model and mode."""
    groups = list(dict.fromkeys(map(_group, records)))
    figure = Figure(figsize=(11, 3.6 * len(groups)), layout="constrained")
    rows = figure.subplots(len(groups), 2, squeeze=False)
    labels = list(dict.fromkeys(record["label"] for record in records))
    colours = dict(zip(labels, mpl.color_sequences["tab20"] * len(labels), strict=False))
    for group, row in zip(groups, rows, strict=True):
        mine = [record for record in records if _group(record) == group]
        for axes, key in zip(row, ("seconds", "peak_bytes"), strict=True):
            _lines(axes, mine, key, colours)
            axes.set_title(group)
        row[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path, dpi=120)


def _group(record: dict[str, Any]) -> str:
    """The title of a plot."""
    return ", ".join(part for part in title(record).split(", ") if part != f"{record['size']} x {record['size']}")


def _lines(axes: Axes, records: Iterable[dict[str, Any]], key: str, colours: dict[str, Any]) -> None:
    heading, unit = COLUMNS[key]
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record[key] is not None:
            lines.setdefault(record["label"], []).append((record["size"], record[key] / unit))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=label, color=colours[label])
    sizes = sorted({record["size"] for record in records})
    axes.set(xlabel="image size in pixels", ylabel=heading, xscale="log", yscale="log")
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.tick_params(axis="x", which="minor", labelbottom=False)
