"""Random numbers of a streamed call, the same ones wherever they are asked for again.

The global generator gives one seed a call. Everything that is drawn has a generator of its own, seeded by that and by
what it is for. So a tile that is computed again sees the numbers that it saw before, whoever else draws meanwhile, in
whichever thread, and the global stream of numbers goes on as if nothing had been computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

_SEEDS = 2**63
_SPREAD = 0x9E3779B97F4A7C15  # odd, so that different numbers have different seeds


def new_seed() -> int:
    """A seed from the global generator of the CPU, which `torch.manual_seed` determines."""
    return int(torch.randint(_SEEDS - 1, (), device="cpu"))


@contextmanager
def restored_on_failure() -> Iterator[None]:
    """After an exception, the global generator goes on as if nothing had been drawn."""
    state = torch.get_rng_state()
    try:
        yield
    except BaseException:
        torch.set_rng_state(state)
        raise


def draw(
    seed: int, number: int, function: Callable[..., torch.Tensor], sizes: Sequence[int], like: torch.Tensor
) -> torch.Tensor:
    """Random numbers on the device of `like`: float64 where that is, float32 elsewhere.

    `function` is torch.rand or torch.randn; `number` is that of what they are for.
    """
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    if like.is_meta:  # where numbers have no values
        return function(sizes, device=like.device, dtype=dtype)
    generator = torch.Generator(like.device).manual_seed((seed + number * _SPREAD) % _SEEDS)
    return function(sizes, generator=generator, device=like.device, dtype=dtype)
