"""What the code of a user does with a value that it has just asked for, as far as no object can tell.

`is` asks no method of what it compares, and `y.__class__` looks like a question of `isinstance`.
"""

from __future__ import annotations

import dis
from bisect import bisect_right
from functools import lru_cache
from types import CodeType, FrameType

_MOST_LOADS = 8
"""The other operand of a comparison is a name with at most so many dots, or almost."""


def compares_by_identity(frame: FrameType) -> bool:
    """Whether a frame compares the attribute that it is reading by `is`, at once or after loading the other operand."""
    now, *following = _instructions(frame, _MOST_LOADS + 2)
    if not now.opname.startswith("LOAD_ATTR"):
        return False
    comparison = next((one.opname for one in following if not one.opname.startswith("LOAD_")), "")
    return comparison == "IS_OP" or comparison.endswith("_NONE")


def reads_attribute(frame: FrameType, name: str) -> bool:
    """Whether a frame is reading an attribute of this name."""
    if name not in frame.f_code.co_names:
        return False
    (now,) = _instructions(frame, 1)
    return now.opname.startswith("LOAD_ATTR") and now.argval == name


def _instructions(frame: FrameType, count: int) -> list[dis.Instruction]:
    """The instruction that a frame is at, and those that follow."""
    offsets, instructions = _listing(frame.f_code)
    first = max(bisect_right(offsets, frame.f_lasti) - 1, 0)
    return instructions[first : first + count]


@lru_cache(maxsize=1000)
def _listing(code: CodeType) -> tuple[list[int], list[dis.Instruction]]:
    instructions = list(dis.get_instructions(code))
    return [one.offset for one in instructions], instructions
