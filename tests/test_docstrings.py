"""The examples in the docstrings of the package run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fxstream
from fxstream.ops import registry

MODULES = ["fxstream", *(module.name for module in pkgutil.walk_packages(fxstream.__path__, "fxstream."))]
FINDER = doctest.DocTestFinder(exclude_empty=True)
EXAMPLES = {
    test.name: test for name in MODULES for test in FINDER.find(importlib.import_module(name), name) if test.examples
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_prints_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    failed, tried = doctest.DocTestRunner().run(EXAMPLES[name])
    assert tried
    assert not failed, "the difference is in the captured output"


@pytest.mark.parametrize(
    "name",
    [
        "fxstream.analysis.analyze",
        "fxstream.conversion.convert",
        "fxstream.ops.registry.Local",
        "fxstream.ops.registry.register",
    ],
)
def test_what_every_user_calls_has_an_example(name: str) -> None:
    assert name in EXAMPLES
