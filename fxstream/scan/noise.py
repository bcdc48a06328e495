"""Random numbers of a streamed call: asked for again, they are the same.

Every call draws one seed from the global generator. Each draw of the call then has a generator of its own, seeded by
that seed and by the number of the value and tile it is for. A tile that is computed again therefore sees the numbers
that it saw before, even if other threads draw in between, and computing it again draws nothing from the global
generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

_SEEDS = 2**63
_SPREAD = 0x9E3779B97F4A7C15  # odd, so that different numbers give different seeds


def new_seed() -> int:
    """A seed from the global generator of the CPU, which `torch.manual_seed` determines."""
    return int(torch.randint(_SEEDS - 1, (), device="cpu"))


@contextmanager
def restored_on_failure() -> Iterator[None]:
    """After an exception, restore the global generator, as if nothing had been drawn."""
    state = torch.get_rng_state()
    try:
        yield
    except BaseException:
        torch.set_rng_state(state)
        raise


def draw(
    seed: int, number: int, function: Callable[..., torch.Tensor], sizes: Sequence[int], like: torch.Tensor
) -> torch.Tensor:
    """Random numbers on the device of `like`, in float64 if `like` is, otherwise in float32.

    `function` is torch.rand or torch.randn. `number` tells the draws of a call apart.
    """
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    if like.is_meta:  # meta tensors have no values, and there is no generator for them
        return function(sizes, device=like.device, dtype=dtype)
    generator = torch.Generator(like.device).manual_seed((seed + number * _SPREAD) % _SEEDS)
    return function(sizes, generator=generator, device=like.device, dtype=dtype)
