"""Padding and trimming of blocks: what a `Span` says, done to a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..geometry.window import Border, Span

BORDERS: dict[str, Border] = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate"}
"""The modes of torch.nn.functional.pad that stream, with the name that windows (and torch.nn.Conv2d) have for each."""


def fit(
    block: torch.Tensor,
    spans: Sequence[Span],
    border: Border = "zeros",
    value: float = 0.0,
    dims: Sequence[int] | None = None,
) -> torch.Tensor:
    """Exactly the rows under the windows: a block with padding at the ends of the image, and without spare rows.

    Args:
        block: a block of any shape and dtype, as `Local.run` gets it.
        spans: one `Span` per window, as `Local.run` gets them.
        border: how rows beyond the ends of the image are filled, as in the window: "zeros", "reflect" or "replicate".
        value: what fills them if `border` is "zeros".
        dims: the dimension of `block` that each span belongs to, counted from 0; by default the last ones, in order.

    Returns:
        The block itself, a view of it, or a padded copy.
    """
    if dims is None:
        dims = range(block.dim() - len(spans), block.dim())
    if any(before or after for before, after in (span.pad for span in spans)):
        pads = {dim: span.pad for dim, span in zip(dims, spans, strict=True)}
        # torch takes the amounts from the last dimension to the first.
        amounts = [amount for dim in reversed(range(min(dims), block.dim())) for amount in pads.get(dim, (0, 0))]
        block = F.pad(block, amounts, "constant", value) if border == "zeros" else F.pad(block, amounts, border)
    for dim, span in zip(dims, spans, strict=True):
        before, after = span.trim
        if before or after:
            block = block.narrow(dim, before, block.size(dim) - before - after)
    return block
