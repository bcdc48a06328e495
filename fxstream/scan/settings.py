"""What the user has asked for: which axes are streamed, in tiles of which size, and how much memory may be used."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import MemoryBudgetError, TileShapeError

AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True)
class Tiling:
    """A `tile_shape`, whichever form it was given in."""

    axes: tuple[str, ...]
    """The streamed axes, such as ("H", "W")."""
    sizes: tuple[int, ...] | None
    """Fresh image positions per step along each of them; None if every call chooses them ("auto")."""
    channels: int | None = None
    """The number of channels that the image must have, if `tile_shape` says so."""


@dataclass(frozen=True)
class Settings:
    """What the user has asked for."""

    names: tuple[str, ...]
    """The image's dimensions, such as ("N", "C", "H", "W")."""
    tiling: Tiling
    freeze_batchnorm: bool
    """Whether streamed batch norms use their running statistics in every mode."""
    memory_budget: int = 0
    """Bytes that may be held between forward and backward so that fewer tiles are computed again. With tile_shape
    "auto": bytes that everything but the image and the outputs may take."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The streamed axes."""
        return self.tiling.axes

    @property
    def tile_shape(self) -> tuple[int | None, ...] | Literal["auto"]:
        """Fresh image positions per step and dimension, (N, C, *spatial); None for one that is not streamed."""
        if self.tiling.sizes is None:
            return AUTO
        sizes = {"C": self.tiling.channels, **dict(zip(self.axes, self.tiling.sizes, strict=True))}
        return tuple(map(sizes.get, self.names))

    def check(self) -> None:
        """Raises TileShapeError if there is nothing to choose tiles by."""
        if self.tiling.sizes is None and not self.memory_budget:
            raise TileShapeError(
                'tile_shape="auto" fits tiles to a memory budget, and there is none. Way out: memory_budget="4GiB" '
                "or what else they may take"
            )

    def retiled(self, tile_shape: object) -> Settings:
        """The same with tiles of another size. Raises TileShapeError, also if other axes would be streamed."""
        changed = replace(self, tiling=parse_tile_shape(tile_shape, self.names))
        changed.check()
        if changed.axes != self.axes:
            raise TileShapeError(
                f"tile_shape={tile_shape!r} streams along {', '.join(changed.axes)}, and the model was converted to "
                f"stream along {', '.join(self.axes)}. Way out: convert the original model with this tile_shape"
            )
        return changed


def parse_tile_shape(tile_shape: object, names: tuple[str, ...]) -> Tiling:
    """The tiling that `tile_shape` asks for; `names` are those of the image's dimensions. Raises TileShapeError."""
    if tile_shape == AUTO:
        return Tiling(names[2:], None)
    sizes = dict(zip(names, _per_dimension(tile_shape, names), strict=True))
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise TileShapeError(f"tile_shape must hold positive integers or None, and has {size!r} for {name}")
    channels = sizes.pop("C")
    streamed = {name: size for name, size in sizes.items() if size is not None}
    if not streamed:
        raise TileShapeError("tile_shape streams no axis: give at least one of its entries a size")
    return Tiling(tuple(streamed), tuple(streamed.values()), channels)


def _per_dimension(tile_shape: object, names: tuple[str, ...]) -> tuple[int | None, ...]:
    """One entry per dimension, (N, C, *spatial), which may be anything yet."""
    spatial = len(names) - 2
    forms = f'"auto", a size, ({", ".join(names[2:])}) or ({", ".join(names)})'
    if isinstance(tile_shape, int) and not isinstance(tile_shape, bool):
        return (None, None, *(tile_shape,) * spatial)
    if not isinstance(tile_shape, (tuple, list)):
        raise TileShapeError(f"tile_shape must be {forms}, not {tile_shape!r}")
    if len(tile_shape) == spatial:
        return (None, None, *tile_shape)
    if len(tile_shape) == spatial + 2:
        return tuple(tile_shape)
    raise TileShapeError(f"tile_shape must be {forms}; {tuple(tile_shape)!r} has {len(tile_shape)} entries")


_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(size: int | str | None) -> int:
    """A number of bytes from a number or from text such as "4GiB" or "500 MB"; None is 0. Raises MemoryBudgetError."""
    if size is None:
        return 0
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    if found and found[2].lower() in _UNITS:
        return int(float(found[1]) * _UNITS[found[2].lower()])
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    raise MemoryBudgetError(f'memory_budget must be a number of bytes or text such as "4GiB" or "500 MB", not {size!r}')
