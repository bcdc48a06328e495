"""The distributions: what the sdist and the wheel hold, and what the wheel needs to be imported and used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from email.policy import compat32
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from hatchling.build import build_sdist, build_wheel
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FOLDERS = ("fxstream", "tests", "docs", "examples", "benchmarks")
FILES = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml")
STRAY = (
    ".venv/lib/module.py",
    "build/lib/fxstream/old.py",
    "dist/fxstream-0.0.1.tar.gz",
    "fxstream/__pycache__/analysis.cpython-310.pyc",
    "out/needle.png",
    "scratch.py",
    "tests/__pycache__/conftest.cpython-310.pyc",
)


class Built(NamedTuple):
    """A copy of the source tree, the files in it that belong to the project, and the unpacked distributions."""

    sources: set[str]
    sdist: Path
    wheel: Path


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The distributions as `python -m build` makes them: the sdist from the tree, the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in (*FILES, ".gitignore"):
        shutil.copy(ROOT / name, tree)
    sources = files(tree)
    for name in STRAY:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("not part of the project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree)
        with tarfile.open(folder / build_sdist(str(folder))) as archive:
            archive.extractall(folder / "sdist")
        (sdist,) = (folder / "sdist").iterdir()
        patch.chdir(sdist)
        with zipfile.ZipFile(folder / build_wheel(str(folder))) as archive:
            archive.extractall(folder / "wheel")
    return Built(sources, sdist, folder / "wheel")


def metadata(built: Built) -> dict[str, list[str]]:
    """The wheel's core metadata: the values of each field."""
    (path,) = built.wheel.glob("*.dist-info/METADATA")
    message = HeaderParser(policy=compat32).parsestr(path.read_text())
    return {key: message.get_all(key, []) for key in message}


def requirements(built: Built) -> tuple[set[str], set[str]]:
    """The names of the distributions that the wheel requires, and of those that only its extras require."""
    found = [Requirement(line) for line in metadata(built)["Requires-Dist"]]
    core = {requirement.name for requirement in found if requirement.marker is None}
    return core, {requirement.name for requirement in found} - core


def test_the_sdist_holds_the_sources_and_nothing_else(built: Built) -> None:
    assert files(built.sdist) == built.sources | {"PKG-INFO"}


def test_the_wheel_holds_the_package_its_type_marker_and_the_licence(built: Built) -> None:
    names = files(built.wheel)
    package = {name for name in names if name.startswith("fxstream/")}
    assert package == {name for name in built.sources if name.startswith("fxstream/")}
    assert {name for name in package if not name.endswith(".py")} == {"fxstream/py.typed"}
    modules = {Path(name).parent.name for name in package if name.endswith("/__init__.py")}
    assert modules == {"fxstream", "geometry", "ops", "graph", "scan", "memory", "model", "proof"}
    info = f"fxstream-{metadata(built)['Version'][0]}.dist-info"
    assert names - package == {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    assert (built.wheel / info / "licenses/LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_wheel_requires_four_packages_and_its_extras_are_optional(built: Built) -> None:
    core, extras = requirements(built)
    assert core == {"torch", "networkx", "numpy", "tabulate"}
    assert {"torchvision", "lightning", "pytest"} <= extras
    assert metadata(built)["Requires-Python"] == [">=3.10"]


def test_the_citation_and_the_changelog_name_the_version(built: Built) -> None:
    (version,) = metadata(built)["Version"]
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [version]
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_trains_without_the_packages_of_its_extras(built: Built) -> None:
    """Importing fxstream asks for none of them, and a training step runs where they cannot be found."""
    _, extras = requirements(built)
    hidden = sorted(name for name, owners in packages_distributions().items() if extras & set(owners))
    assert {"torchvision", "pytest"} <= set(hidden)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(built.wheel)}
    command = [sys.executable, "-c", TRAINING, *hidden]
    done = subprocess.run(command, cwd=built.wheel, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(built.wheel / "fxstream" / "__init__.py"), "trained"]


TRAINING = """
import sys

import networkx, tabulate, torch


class Finder:
    found, asked = sys.meta_path, []

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            self.asked.append(name)
            return None
        return next(filter(None, (finder.find_spec(name, path, target) for finder in self.found)), None)


sys.meta_path = [Finder()]

import fxstream, fxstream.ops, fxstream.testing

assert not Finder.asked, Finder.asked
print(fxstream.__file__)

layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4, 2))
model = fxstream.convert(model, tile_shape=(8, 8), freeze_batchnorm=True)
loss = torch.nn.functional.cross_entropy(model(torch.randn(1, 3, 20, 21)), torch.tensor([1]))
loss.backward()
assert all(parameter.grad.any() for parameter in model.parameters())
fxstream.testing.check_op(torch.nn.Conv2d(2, 2, 3), (1, 2, 9, 8))
print(fxstream.analyze(torch.nn.ReLU(), example_input=torch.ones(1, 1, 2, 2)), file=sys.stderr)
assert not {name.partition(".")[0] for name in sys.modules} & set(sys.argv[1:])
print("trained")
"""
