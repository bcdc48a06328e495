"""Write docs/torchvision.md, which lists how much of every torchvision model streams.

    python benchmarks/zoo.py

Models are built without weights, in eval mode, and on the meta device, so that nothing is downloaded or computed. A
share is the part of the FLOPs of one forward pass that the streamed part takes. It is given for streaming along all
spatial axes, to which everything else in the table refers, too, and for streaming along the batch alone.
"""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from tabulate import tabulate
from torch import nn

import fxstream
from fxstream.memory.flops import Flops
from fxstream.model.streamed import Streamed

_KINDS = {
    torchvision.models: "classification",
    torchvision.models.segmentation: "segmentation",
    torchvision.models.video: "video",
}
_SIZES = {"inception_v3": 299}
HEADERS = [
    "model",
    "traced",
    "streamed up to",
    "share",
    "receptive field",
    "stride",
    "why it stops there",
    "along the batch",
]


def image_of(name: str, kind: str) -> torch.Tensor:
    size = _SIZES.get(name, 224)
    if kind == "video":
        size = 224 if any(one in name for one in ("s3d", "swin", "mvit")) else 112
        return torch.empty(1, 3, 16, size, size, device="meta")
    return torch.empty(1, 3, size, size, device="meta")


def build(name: str) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    options: dict[str, Any] = {}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return on_meta(lambda: builder(weights=None, **options))


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The model that `make` builds, in eval mode and on the meta device."""
    try:
        with torch.device("meta"):
            return make().eval()
    except (NotImplementedError, RuntimeError):  # building this model computes something, which meta tensors cannot
        return make().eval().to("meta")


def without_proof(model: nn.Module, tile_shape: Any) -> nn.Module:
    """`fxstream.convert`, which proves nothing on the meta device."""
    return fxstream.convert(model, tile_shape, prove=False)


def streamed_share(
    model: nn.Module, tile_shape: Any, image: torch.Tensor, stream: Callable[..., nn.Module] = without_proof
) -> str:
    """The share of the FLOPs of a forward pass that the streamed part takes, in percent.

    `stream` is the door: it gets the model and the tile shape, and gives the streamed model.
    """
    run, streamed = Streamed.forward, Flops()

    def counted(part: Streamed, *args: Any, **kwargs: Any) -> Any:
        with streamed:
            return run(part, *args, **kwargs)

    with torch.no_grad(), warnings.catch_warnings(), mock.patch.object(Streamed, "forward", counted):
        warnings.simplefilter("ignore", fxstream.StreamingWarning)
        with Flops() as whole:
            model(image)
        try:
            stream(model, tile_shape)(image)
        except fxstream.NothingToStreamError:
            return "0%"
    return f"{streamed.total / whole.total:.1%}"


def last_nodes(analysis: fxstream.Analysis, most: int = 2) -> str:
    """The nodes whose values the streamed part hands over, without those that are mere sizes."""
    local = {finding.node for finding in analysis.findings if finding.status != "size"}
    names = [node.name for node in analysis.outputs if node in local]
    others = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + others if names else "nothing"


def reason(analysis: fxstream.Analysis) -> str:
    """Where streaming stops first, and why."""
    if not analysis.stops:
        return "it streams whole"
    others = f" And {len(analysis.stops) - 1} more." if len(analysis.stops) > 1 else ""
    return analysis.stops[0].reason.split(" Way out:")[0] + others


def row(name: str, kind: str) -> list[str]:
    model, image = build(name), image_of(name, kind)
    try:
        analysis = fxstream.analyze(model)
    except fxstream.TraceError as error:
        return [name, "no", "nothing", "0%", "", "", " ".join(str(error).split()), "0%"]
    # A size has no receptive field, nor has a reduction over the image. For these, the field of an operand is shown.
    seen = [one for node in reversed(analysis.outputs) for one in (node, *node.all_input_nodes)]
    fields = map(analysis.receptive_field, seen)
    field = next(filter(None, fields), {})
    return [
        name,
        "yes",
        last_nodes(analysis),
        streamed_share(model, max(image.shape), image),
        " x ".join(dict.fromkeys(str(one.size) for one in field.values())),
        " x ".join(dict.fromkeys(str(one.stride) for one in field.values())),
        reason(analysis),
        streamed_share(model, (1, *[None] * (image.dim() - 1)), image),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "torchvision.md")
    parser.add_argument("--only", nargs="*", help="print these models only, and write nothing")
    options = parser.parse_args()
    text = "# How much of torchvision's models streams\n\nWritten by `python benchmarks/zoo.py`, "
    text += f"with torchvision {torchvision.__version__}. "
    text += "Receptive fields and strides are in pixels.\n"
    for module, kind in _KINDS.items():
        names = [
            name
            for name in torchvision.models.list_models(module=module)
            if options.only is None or name in options.only
        ]
        rows = [row(name, kind) for name in names]
        text += (
            f"\n## {kind.capitalize()}\n\n{tabulate(rows, headers=HEADERS, tablefmt='github', disable_numparse=True)}\n"
        )
    if options.only is None:
        options.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
