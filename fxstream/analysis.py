"""Tables of an analysis."""

from __future__ import annotations

from fractions import Fraction

from tabulate import tabulate

from .graph.prefix import Analysis, Finding


def table(analysis: Analysis) -> str:
    """The nodes in order, with what each value sees of the image, and where streaming stops and why."""
    rows = [_row(analysis, finding) for finding in analysis.findings]
    text = tabulate(rows, headers=["node", "operation", "", "receptive field", "stride", "padding"])
    ends = ", ".join(node.name for node in analysis.outputs) or "nothing"
    text += f"\n\nStreamed along {', '.join(analysis.axes)}: {len(analysis.prefix)} operations; they hand over {ends}."
    if analysis.stops:
        text += "\nStreaming stops where an operation is not local:"
        text += "".join(f"\n  {stop.reason}" for stop in analysis.stops)
    return text


def _row(analysis: Analysis, finding: Finding) -> list[str]:
    fields = analysis.receptive_field(finding.node) if finding.status in ("image", "local") else None
    seen = (
        [_by_axis([getattr(f, what) for f in fields.values()]) for what in ("size", "stride", "padding")]
        if fields
        else ["", "", ""]
    )
    return [finding.node.name, finding.operation, finding.status, *seen]


def _by_axis(numbers: list[int | Fraction]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else " x ".join(map(str, numbers))
