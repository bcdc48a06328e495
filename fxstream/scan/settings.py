"""What a conversion fixes, and the forms of `tile_shape`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import MemoryBudgetError, TileShapeError

TileShape = tuple[int | None, ...]
AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """What a conversion fixes."""

    names: tuple[str, ...]
    """The image's dimensions, such as ("N", "C", "H", "W")."""
    tile_shape: TileShape
    """Fresh image positions per step and dimension; None for a dimension that is not streamed."""
    freeze_batchnorm: bool
    memory_budget: int = 0
    """Bytes that may be held between forward and backward so that fewer tiles are computed again; with `auto`, that
    everything but image and outputs may take."""
    auto: bool = False
    """Whether every call chooses its tiles; `tile_shape` then only says which axes are streamed."""
    guards: Mapping[str, bool] = field(default_factory=dict)
    """Path of a module -> the training flag that the traced control flow relies on."""
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Path of a module -> values of its attributes, by name, that the graphs hold as constants."""
    entered: tuple[str, ...] = ()
    """Paths of modules whose operations are in the graphs without a call of the module."""

    @property
    def tiles(self) -> dict[str, int]:
        """The streamed axes and the size of a tile along each."""
        sizes = zip(self.names, self.tile_shape, strict=True)
        return {name: size for name, size in sizes if size is not None and name != "C"}

    @property
    def axes(self) -> tuple[str, ...]:
        """The streamed axes."""
        return tuple(self.tiles)

    def check(self) -> None:
        """Raises TileShapeError if there is nothing to choose tiles by."""
        if self.auto and not self.memory_budget:
            raise TileShapeError(
                'tile_shape="auto" fits tiles to a memory budget, and there is none. Way out: memory_budget="4GiB" '
                "or what else they may take"
            )

    def tiled(self, tiles: Mapping[str, int]) -> Settings:
        """The same with tiles of these sizes along the streamed axes."""
        sizes = zip(self.names, self.tile_shape, strict=True)
        return replace(self, tile_shape=tuple(tiles.get(name, size) for name, size in sizes), auto=False)

    def retiled(self, tile_shape: object) -> Settings:
        """The same with tiles of another size. Raises TileShapeError, also if other axes would be streamed."""
        changed = replace(self, tile_shape=parse(tile_shape, self.names), auto=tile_shape == AUTO)
        changed.check()
        if changed.axes != self.axes:
            raise TileShapeError(
                f"tile_shape={tile_shape!r} streams along {', '.join(changed.axes)}, and the model was converted to "
                f"stream along {', '.join(self.axes)}. Way out: convert the original model with this tile_shape"
            )
        return changed


def parse(tile_shape: object, names: tuple[str, ...]) -> TileShape:
    """One size a dimension, (N, C, *spatial), from any form of `tile_shape`. Raises TileShapeError."""
    spatial = len(names) - 2
    if tile_shape == AUTO:
        return (None, None, *(sys.maxsize,) * spatial)
    forms = f'"auto", a size, ({", ".join(names[2:])}) or ({", ".join(names)})'
    if isinstance(tile_shape, int) and not isinstance(tile_shape, bool):
        sizes: TileShape = (None, None, *(tile_shape,) * spatial)
    elif not isinstance(tile_shape, (tuple, list)):
        raise TileShapeError(f"tile_shape must be {forms}, not {tile_shape!r}")
    elif len(tile_shape) == spatial:
        sizes = (None, None, *tile_shape)
    elif len(tile_shape) == spatial + 2:
        sizes = tuple(tile_shape)
    else:
        raise TileShapeError(f"tile_shape must be {forms}; {tuple(tile_shape)!r} has {len(tile_shape)} entries")
    for name, size in zip(names, sizes, strict=True):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise TileShapeError(f"tile_shape must hold positive integers or None, and has {size!r} for {name}")
    if all(size is None for name, size in zip(names, sizes, strict=True) if name != "C"):
        raise TileShapeError("tile_shape streams no axis: give at least one of its entries a size")
    return sizes


_UNITS = {"": 1} | {
    f"{prefix}{binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate(("", "K", "M", "G", "T"))
    for binary in (("", "i") if prefix else ("",))
}


def parse_bytes(size: int | str | None) -> int:
    """A number of bytes from a number or from text such as "4GiB" or "500 MB"; None is 0. Raises MemoryBudgetError."""
    if size is None:
        return 0
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if found and found[2].lower() in units:
        return int(float(found[1]) * units[found[2].lower()])
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    raise MemoryBudgetError(f'memory_budget must be a number of bytes or text such as "4GiB" or "500 MB", not {size!r}')
