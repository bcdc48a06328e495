"""Small random images, and the other arguments of a forward, with which a model may run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..graph.arguments import Form, Parameters, Question, Slot, Unspecified
from ..graph.prefix import Prefix

SIZES = {
    1: (64, 128, 256, 1024, 4096, 32),
    2: (64, 96, 128, 224, 256, 32, 320, 512),
    3: (16, 32, 48, 64, 24),
}
"""Sizes of all spatial axes to try, by the number of spatial axes."""
_SMALL = 2**15
"""Of images with more positions, one at a time is tried before two."""
MOST = 2**24
"""An image of more elements is not small."""

Arguments = dict[str, Any]
"""Arguments of a forward, by the names of the placeholders of its graph."""


def candidates(prefix: Prefix, channels: int | None, example_input: Any) -> Iterator[Arguments]:
    """Arguments to try, the likeliest first.

    Args:
        prefix: says what the image is.
        channels: the number of channels that the image must have, if that is known.
        example_input: an image, whose shape comes first; or a tuple of all arguments, which are the only ones.
    """
    model, given = prefix.trace.root, prefix.trace.assumptions.given
    parameters = Parameters.of(type(model))
    if isinstance(example_input, tuple):
        yield {slot.name: value for slot, value in parameters.bound(example_input, {}).items()}
        return
    like = _like(model, example_input)
    generator = torch.Generator().manual_seed(0)
    image = str(prefix.image.target)
    shapes = _shapes(prefix, channels, example_input)
    if given.question is Question.SHAPE:  # the graph holds for this one alone
        shape = given.form_of(image).shape
        shapes = iter([shape] if math.prod(shape) <= MOST else [])
    for shape in shapes:
        others = {slot.name: form for slot, form in resized(given.forms, image, shape).items() if slot.name != image}
        arguments = {name: _argument(form, shape, like, generator) for name, form in others.items()}
        yield {image: _random(shape, like, generator), **arguments}


def _argument(form: Any, shape: tuple[int, ...], like: torch.Tensor, generator: torch.Generator) -> Any:
    """An argument besides the image: of its form, as far as that is known, and otherwise a second image."""
    if isinstance(form, Form):
        return _random(form.shape, torch.empty(0, dtype=form.dtype, device=form.device), generator)
    return _random(shape, like, generator) if isinstance(form, Unspecified) else form


def resized(forms: Mapping[Slot, Any], image: str, shape: tuple[int, ...]) -> dict[Slot, Any]:
    """The forms of arguments for an image of another shape: what has the image's sizes gets the new ones."""
    old = next((form.shape for slot, form in forms.items() if slot.name == image and isinstance(form, Form)), ())

    def like_image(form: Form) -> tuple[int, ...]:
        sizes = zip(reversed(form.shape), reversed(old), reversed(shape), strict=False)
        last = [new if size == before else size for size, before, new in sizes]
        return (*form.shape[: len(form.shape) - len(last)], *reversed(last))

    return {
        slot: replace(form, shape=like_image(form)) if isinstance(form, Form) else form for slot, form in forms.items()
    }


def call(model: nn.Module, slots: Iterable[Slot], parameters: Parameters, arguments: Arguments) -> Any:
    """Call a model with these arguments."""
    args, kwargs = parameters.passed({slot: arguments[slot.name] for slot in slots})
    return model(*args, **kwargs)


def _like(model: nn.Module, example_input: Any) -> torch.Tensor:
    """A tensor of the dtype and on the device of the image."""
    floating = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    device = floating[0].device if floating else torch.device("cpu")
    dtype = floating[0].dtype if floating else torch.get_default_dtype()
    if isinstance(example_input, torch.Tensor):
        dtype = example_input.dtype
    return torch.empty(0, dtype=dtype, device=device)


def _random(shape: tuple[int, ...], like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if like.is_floating_point() or like.is_complex():
        dtype = like.dtype if like.dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32
        return torch.randn(shape, dtype=dtype, generator=generator, device="cpu").to(like)
    return torch.randint(0, 2, shape, generator=generator, device="cpu").to(like)


def _shapes(prefix: Prefix, channels: int | None, example_input: torch.Tensor | None) -> Iterator[tuple[int, ...]]:
    axes = len(prefix.names) - 2
    counts = [channels] if channels else _channels(prefix)
    if example_input is not None:
        if 0 < example_input.numel() <= MOST:
            yield tuple(example_input.shape)
        counts = [channels or int(example_input.shape[1])]
    for further in (False, True):
        for size in SIZES[axes]:
            # Two images show what mixes them, and are normalised where each has one position left.
            batch = 2 if (size**axes <= _SMALL) is not further else 1
            for count in counts:
                if batch * count * size**axes <= MOST:
                    yield (batch, count, *(size,) * axes)


def _channels(prefix: Prefix) -> list[int]:
    """Numbers of channels to try: at first what the first convolution reads, behind the image or in the model."""
    waiting, seen = [prefix.image], {prefix.image}
    for node in waiting:
        new = [user for user in node.users if user not in seen]
        waiting += new
        seen.update(new)
    # The weight of the first one may be computed, so that no node calls it.
    modules = [*map(prefix.trace.module_of, waiting), *prefix.trace.modules.values()]
    read = [module.in_channels for module in modules if isinstance(module, nn.modules.conv._ConvNd)]
    return list(dict.fromkeys([*read[:1], 3, 1, 4]))
