"""The layout of the package: who may import whom. Imports are read from the source, not run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import fxstream

PACKAGE = Path(fxstream.__file__).parent
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}

ORDER = ["errors", "geometry", "ops", "graph", "scan", "memory", "model"]
"""The folders (and errors.py), from the bottom up; each may import those before it. The other modules come last."""
ORDER += ["proof", "conversion", "compilation", "estimate", "analysis", "testing", "__init__"]


def packages(node: ast.AST) -> Iterator[str]:
    """The packages that an import statement names; "." for this one."""
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield "." if node.level else str(node.module).partition(".")[0]


def imports(module: str, node: ast.AST) -> Iterator[str]:
    """The modules of the package that an import statement names, by dotted name."""
    assert "fxstream" not in packages(node), f"{module} imports the package by its own name"
    if not isinstance(node, ast.ImportFrom) or not node.level:
        return
    folders = module.split(".")[: -node.level]
    source = ".".join([*folders, *([node.module] if node.module else [])])
    for alias in node.names:
        inner = f"{source}.{alias.name}" if source else alias.name
        found = [name for name in (inner, source, f"{source}.__init__") if name in MODULES]
        assert found, f"{module} imports {inner}, which is not there"
        yield found[0]


def trees() -> Iterator[tuple[str, ast.AST]]:
    for name, path in MODULES.items():
        yield name, ast.parse(path.read_text())


def edges() -> list[tuple[str, str]]:
    """Which module imports which."""
    return [
        (name, target)
        for name, tree in trees()
        for node in ast.walk(tree)
        for target in imports(name, node)
        if target != name
    ]


def rank(module: str) -> int:
    return ORDER.index(module.partition(".")[0])


def test_every_module_has_a_place_in_the_order() -> None:
    assert {module.partition(".")[0] for module in MODULES} == set(ORDER)


def test_a_folder_imports_only_folders_above_it_in_the_list() -> None:
    wrong = [f"{one} imports {other}" for one, other in edges() if rank(other) > rank(one)]
    assert not wrong


def test_modules_import_each_other_in_no_circle() -> None:
    # A package's __init__ imports its modules; they import the names of their neighbours from where these are defined.
    graph = nx.DiGraph(edges())
    assert not list(nx.simple_cycles(graph))


SLOW_OR_OPTIONAL: set[str] = set()
"""Packages that may be imported inside a function, since importing them takes long or they need not be installed."""


def test_only_packages_that_are_slow_or_optional_are_imported_inside_a_function() -> None:
    for name, tree in trees():
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside = [package for node in ast.walk(function) for package in packages(node)]
                assert set(inside) <= SLOW_OR_OPTIONAL, f"{name} imports {inside} inside a function"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("geometry.")))
def test_geometry_is_integers_and_names_only(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert str(node.module).partition(".")[0] in {*sys.stdlib_module_names, "tabulate"}
        elif isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= set(sys.stdlib_module_names)


def test_a_name_of_the_package_is_either_a_module_or_something_else() -> None:
    """`import fxstream.convert` would give a function if there were a module of that name, too."""
    public = set(fxstream.__all__)
    assert not public & {module.partition(".")[0] for module in MODULES}
