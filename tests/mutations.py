"""Mutation testing: does the test suite find small faults? Draws one-line faults in fxstream/, and tests each of them.

    python tests/mutations.py --count 40 --seed 0        # or: make mutations

Every fault is one change of one operator, constant or call, such as `<` to `<=`, `+` to `-`, `min` to `max`, or a
`.clone()` left out. The faults are drawn at random, equally many from every folder. For each fault the tests run on a
copy of the working tree until the first one fails. A fault that no test finds is reported as "survived"; whoever reads
the report decides whether it changes behaviour at all. Before that, the tests run once without a fault, and must pass.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LEFT_BEHIND = shutil.ignore_patterns(".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "dist", "out")
"""What a copy of the working tree does not need."""

OPERATORS: dict[type, tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.FloorDiv: ("//", "*"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}
LEFT_OUT = {"clone", "detach", "contiguous", "copy", "requires_grad_"}


class Fault(NamedTuple):
    """Text that stands in a file from `start` to `stop` (character offsets), and what replaces it."""

    file: Path
    start: int
    stop: int
    new: str

    def apply(self, tree: Path) -> None:
        path = tree / self.file
        text = path.read_text()
        path.write_text(text[: self.start] + self.new + text[self.stop :])

    def __str__(self) -> str:
        text = (ROOT / self.file).read_text()
        line = text.count("\n", 0, self.start) + 1
        source = text.splitlines()[line - 1].strip()
        return f"{self.file}:{line}  {source}  [{text[self.start : self.stop] or 'nothing'} -> {self.new or 'nothing'}]"


def faults(file: Path) -> Iterator[Fault]:
    """All faults that can be made in a file."""
    text = (ROOT / file).read_text()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def at(line: int, column: int) -> int:
        # ast counts columns in bytes of UTF-8.
        source = text[starts[line - 1] : starts[line]].encode()
        return starts[line - 1] + len(source[:column].decode())

    def begin(node: ast.expr) -> int:
        return at(node.lineno, node.col_offset)

    def end(node: ast.expr) -> int:
        return at(node.end_lineno or node.lineno, node.end_col_offset or 0)

    def between(left: ast.expr, right: ast.expr, kind: type) -> Iterator[Fault]:
        if kind in OPERATORS:
            old, new = OPERATORS[kind]
            place = text.find(old, end(left), begin(right))
            if place >= 0:
                yield Fault(file, place, place + len(old), new)

    tree = ast.parse(text)
    # `zip(..., strict=True)` states that lengths agree, and computes nothing.
    strict = {node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "strict"}
    for node in ast.walk(tree):
        if node in strict:
            continue
        if isinstance(node, ast.Compare):
            for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                yield from between(left, right, type(op))
        elif isinstance(node, ast.BinOp):
            yield from between(node.left, node.right, type(node.op))
        elif isinstance(node, ast.BoolOp):
            yield from between(node.values[0], node.values[1], type(node.op))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield Fault(file, begin(node), begin(node.operand), "")
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int):
            new = str(not node.value) if isinstance(node.value, bool) else str(node.value + 1)
            yield Fault(file, begin(node), end(node), new)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield Fault(file, begin(node.func), end(node.func), CALLS[node.func.id])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEFT_OUT:
            yield Fault(file, end(node.func.value), end(node), "")


def drawn(count: int, seed: int) -> list[Fault]:
    """`count` faults, in turn from every folder; the modules beside the folders count as one."""
    choose = random.Random(seed)
    folders: dict[str, list[Fault]] = {}
    for path in sorted((ROOT / "fxstream").rglob("*.py")):
        file = path.relative_to(ROOT)
        folders.setdefault(file.parts[1] if len(file.parts) > 2 else "", []).extend(faults(file))
    for found in folders.values():
        choose.shuffle(found)
    turns = [fault for group in zip(*(found[:count] for found in folders.values()), strict=False) for fault in group]
    return turns[:count]


def first_failure(tree: Path, tests: Sequence[str], limit: int) -> str:
    """The first test that fails on a tree, or why there is none."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode == 0:
        return "survived"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0] if lines else "does not start"


def tried(fault: Fault | None, tests: Sequence[str], limit: int) -> str:
    """The first failure on a copy of the working tree with a fault, and the seconds that this took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_BEHIND)
        if fault is not None:
            fault.apply(tree)
        found = first_failure(tree, tests, limit)
    return f"{found} ({time.monotonic() - start:.0f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="how many faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="leave out the faults before this one")
    parser.add_argument("--limit", type=int, default=900, help="seconds that the tests may take on one fault")
    parser.add_argument("--list", action="store_true", help="show the faults, and run nothing")
    parser.add_argument("tests", nargs="*", help="test files, in the order in which they run; all by default")
    options = parser.parse_args()
    if not options.list:
        print(f"without a fault: {tried(None, options.tests, options.limit)}", flush=True)
    for number, fault in list(enumerate(drawn(options.count, options.seed)))[options.first :]:
        print(f"{number:3} {fault}", flush=True)
        if not options.list:
            print(f"    {tried(fault, options.tests, options.limit)}", flush=True)


if __name__ == "__main__":
    main()
