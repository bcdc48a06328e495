"""Pickles of converted models made by fxstream 0.1.0 before its modules were laid out in folders: they still load.

Such a pickle names modules that have moved, and holds settings in an older form.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from ..graph import serialize
from ..graph.trace import Assumptions
from ..scan.settings import Settings, parse_tile_shape


@dataclass(frozen=True)
class OldSettings:
    """The settings of an older pickle, which also held what is now `Assumptions`."""

    names: tuple[str, ...]
    tile_shape: tuple[int | None, ...]
    freeze_batchnorm: bool
    memory_budget: int = 0
    auto: bool = False
    guards: dict[str, bool] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    entered: tuple[str, ...] = ()


def upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a `Streamed` in today's form."""
    old = state["settings"]
    if not isinstance(old, OldSettings):
        return state
    tiling = parse_tile_shape("auto" if old.auto else old.tile_shape, old.names)
    settings = Settings(old.names, tiling, old.freeze_batchnorm, old.memory_budget)
    assumptions = Assumptions(old.guards, old.attributes, old.entered)
    return {**state, "settings": settings, "assumptions": assumptions, "_fits": {}}


def provide(name: str, **members: Any) -> None:
    """Let pickles find `members` in the module `fxstream.<name>`, which is not there any more."""
    module = ModuleType(f"fxstream.{name}", "Only for pickles of an older fxstream.")
    vars(module).update(members)
    sys.modules[module.__name__] = module


provide("settings", Settings=OldSettings)
provide("serialize", _Reference=serialize._Reference, _Function=serialize._Function)
