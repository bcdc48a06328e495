"""Padding and cropping of blocks: the tensor side of a Span."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..geometry.window import Border, Span

MODES: dict[Border, str] = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}
"""What torch.nn.functional.pad calls a border."""


def fit(block: torch.Tensor, spans: tuple[Span, ...], border: Border = "zeros", value: float = 0.0) -> torch.Tensor:
    """The rows under the windows: `block`, whose last dimensions belong to `spans`, padded and trimmed."""
    pads = [amount for span in reversed(spans) for amount in span.pad]
    if any(pads):
        block = F.pad(block, pads, MODES[border], value if border == "zeros" else None)
    for dim, span in enumerate(spans, start=block.dim() - len(spans)):
        before, after = span.trim
        if before or after:
            block = block.narrow(dim, before, block.size(dim) - before - after)
    return block
