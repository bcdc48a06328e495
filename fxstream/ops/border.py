"""Padding and trimming of blocks, as a `Span` says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..geometry.window import Border, Span

BORDERS: dict[str, Border] = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate"}
"""The modes of torch.nn.functional.pad that stream, with the name that windows (and torch.nn.Conv2d) have for each."""
_NONE = (0, 0)


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

    Example:
        The first two output rows of a 3 x 3 convolution with padding 1 read all three rows of an image (N, C, H, W).

        >>> import torch
        >>> from fxstream.ops import Sliding, fit
        >>> span = Sliding(kernel=3, before=1, after=1).span(0, 2, 3)
        >>> fit(torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1), [span], dims=[2]).flatten()
        tensor([0., 1., 2., 3.])
    """
    for span in spans:
        if span.pad != _NONE or span.trim != _NONE:
            break
    else:
        return block
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
