"""What a user sees of the analysis: which operations stream, where streaming ends and why, what each value sees."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import torch
from tabulate import tabulate
from torch import fx, nn

from .compilation import captured_prefix
from .errors import StreamingError, TraceError
from .estimate import Estimate, estimate
from .graph.example import traced_with_example
from .graph.findings import Finding
from .graph.prefix import Prefix, find_prefix, image_names, image_node
from .graph.reasons import reasons
from .graph.receptive_field import ReceptiveField
from .memory.work import MOST_BEHIND, work_of
from .model.converted import Converted, plain_model


def analyze(
    model: nn.Module,
    *,
    freeze_batchnorm: bool = False,
    image: str | None = None,
    example_input: torch.Tensor | tuple[Any, ...] | None = None,
) -> Analysis:
    """Find out what of a model can be streamed along all spatial axes, where streaming stops, and why.

    Nothing is computed, and the model is not changed.

    Args:
        model: any module that torch.fx can trace, as for `fxstream.convert`; or what that has made of one.
        freeze_batchnorm: analyse the model as if its batch norms used their running statistics in every mode.
        image: the name of the argument of `model.forward` that is the image; by default the first.
        example_input: an image, or a tuple of all arguments of forward, of which only shapes and dtypes are used. They
            answer what the forward asks about its tensors. It is needed if no operation of the model tells how many
            spatial axes there are, or if the forward refuses the images that are tried. With
            an image, a model that torch.fx cannot trace is captured as `fxstream.compile` captures it.

    Returns:
        An `Analysis`, which `print` shows as a table.

    Raises:
        TraceError: torch.fx cannot trace the model, and there is no example_input.
        TileShapeError: nothing tells the number of spatial axes.
        StreamingError: `image` is not an argument of the model's forward.

    Example:
        >>> import fxstream
        >>> from torch import nn
        >>> analysis = fxstream.analyze(nn.Sequential(nn.Conv2d(3, 8, 7, stride=2, padding=3), nn.MaxPool2d(3, 2)))
        >>> analysis.receptive_field("_1")["H"]
        ReceptiveField(size=11, stride=4, padding=3)
    """
    if isinstance(model, Converted):
        model = plain_model(model)
    try:
        traced = traced_with_example(model, image, example_input, freeze_batchnorm)
    except TraceError:
        if not isinstance(example_input, torch.Tensor):
            raise
        return Analysis(captured_prefix(model, example_input, freeze_batchnorm=freeze_batchnorm, image=image))
    names = image_names(traced, image)
    return Analysis(find_prefix(traced, image_node(traced.graph, image), names, names[2:], freeze_batchnorm))


class Analysis:
    """The result of `fxstream.analyze`; `print` shows it as a table.

    Attributes:
        findings: one `Finding` per node of the traced graph, in order.
        image: the node of the streamed input.
        names: the image's dimensions, such as ("N", "C", "H", "W").
        axes: the streamed ones among them, such as ("H", "W").
        graph: a networkx.DiGraph over node names. Nodes carry `status`, `operation` and `receptive_field` (a dict axis
            -> ReceptiveField, or None where it is undefined); edges between local nodes carry `windows` (a dict axis ->
            Window).
        prefix: the nodes of the streamed part, in order.
        outputs: the nodes whose values the streamed part hands to the head.
        stops: the findings at which streaming stops.
    """

    def __init__(self, found: Prefix):
        self._found = found
        self.findings = found.findings
        self.image = found.image
        self.names = found.names
        self.axes = found.axes
        self.graph = found.graph
        self.prefix = found.nodes
        self.outputs = found.outputs
        self.stops = found.stops

    def receptive_field(self, node: fx.Node | str) -> dict[str, ReceptiveField] | None:
        """What one position of a local node sees of the image, per streamed axis, in pixels.

        None where it is undefined: behind branches that advance at different rates, and behind resampling to a size.
        Raises KeyError for a node that the traced graph does not have.
        """
        name = node.name if isinstance(node, fx.Node) else node
        found: dict[str, ReceptiveField] | None = self.graph.nodes[name]["receptive_field"]
        return found

    def estimate(
        self,
        image_shape: Sequence[int],
        tile_shape: int | Sequence[int | None] | Literal["auto"],
        memory_budget: int | str | None = None,
    ) -> Estimate:
        """Predict what a step of the converted model takes, on the meta device, where nothing is computed.

        A step is forward and backward of the whole model, without the gradient of the image. Where gradients are
        disabled, or nothing requires one, it is the forward alone. Peak bytes are those of tensors, beyond the loaded
        model.

        Args:
            image_shape: (N, C, *spatial), in pixels.
            tile_shape: as `fxstream.convert` takes it.
            memory_budget: as `fxstream.convert` takes it.

        Returns:
            An `Estimate`: number of tiles, FLOPs, bytes carried between forward and backward, peak bytes.

        Raises:
            What `fxstream.convert` raises, and what the converted model raises if it is called with such an image.
            TypeError: the model needs further arguments.
        """
        found = self._found
        if found.trace.known:
            raise StreamingError(
                "estimate() needs a model that torch.fx can trace. Way out: measure a step of fxstream.compile's model"
            )
        name = str(found.image.target)
        return estimate(found.trace.root, image_shape, tile_shape, memory_budget, found.freeze_batchnorm, name)

    def __str__(self) -> str:
        rows = [self._row(finding) for finding in self.findings]
        text = tabulate(rows, headers=["node", "operation", "", "receptive field", "stride", "padding"])
        ends = ", ".join(node.name for node in self.outputs) or "nothing"
        work = work_of(self._found)
        share = f" with {work}" if work is not None else ""
        text += (
            f"\n\nStreamed along {', '.join(self.axes)}: {len(self.prefix)} operations{share}; they hand over {ends}."
        )
        if self.stops:
            text += "\nStreaming stops where an operation is not local:\n"
            text += reasons(self._found, short=work is not None and work.share > MOST_BEHIND)
        return text

    def _row(self, finding: Finding) -> list[str]:
        fields = self.receptive_field(finding.node) if finding.status in ("image", "local") else None
        seen = ["", "", ""]
        if fields:
            seen = [_by_axis([getattr(f, what) for f in fields.values()]) for what in ("size", "stride", "padding")]
        return [finding.node.name, finding.operation, finding.status, *seen]


def _by_axis(numbers: list[int | Fraction]) -> str:
    """One number if it is the same along all axes, otherwise one per axis."""
    return str(numbers[0]) if len(set(numbers)) == 1 else " x ".join(map(str, numbers))
