"""What the documentation shows works as it is written there."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import fxstream
from fxstream.ops import registry
from fxstream.testing import check_op, head

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the code in docs/your_own_op.md defines, its rules forgotten afterwards."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    names: dict[str, object] = {"__name__": "your_own_op"}
    exec("\n".join(re.findall(r"```python\n(.*?)```", (DOCS / "your_own_op.md").read_text(), re.DOTALL)), names)
    return names


def test_your_own_op(example: dict[str, type[nn.Module]]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), example["MedianFilter"](3), nn.Conv2d(4, 2, 1))
    assert not head(fxstream.convert(model, 7))
    assert fxstream.analyze(model).receptive_field("_2")["H"].size == 5
    with pytest.raises(AssertionError, match="sorts the pixels along the streamed"):
        check_op(example["Sorted"](), (5, 3, 7, 6), axes="HW")


def test_ones_own_random_operation(example: dict[str, type[nn.Module]]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), example["DropPath"](0.4), nn.Conv2d(4, 4, 3)).double().train()
    converted = fxstream.convert(model, (2, None, 9, 9))
    assert not head(converted)
    image = torch.randn(40, 3, 22, 19, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        converted.get_submodule("2").bias.zero_()
    output = converted(image)
    kept = (output != 0).all(dim=(1, 2, 3))
    assert torch.equal(kept, (output != 0).any(dim=(1, 2, 3)))
    assert 12 < kept.sum() < 36
    expected = converted.get_submodule("2")(converted.get_submodule("0")(image) * kept.view(-1, 1, 1, 1) / 0.6)
    torch.testing.assert_close(output, expected)
    (found,) = torch.autograd.grad(output.square().sum(), image)
    (wanted,) = torch.autograd.grad(expected.square().sum(), image)
    torch.testing.assert_close(found, wanted)


def test_a_function_of_ones_own_is_seen_under_its_global_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))

    @fxstream.register(soften)
    def rule(x: fxstream.ops.Value, by: float) -> fxstream.ops.Local:
        return fxstream.ops.Local((x,), x.dims, lambda block: soften(block, by))

    check_op(soften, (2, 3, 9, 8), args=(0.5,))

    class Softened(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return soften(x * 2, 0.5)

    (call,) = (
        node
        for node in fxstream.analyze(Softened(), example_input=torch.randn(1, 1, 4, 4)).prefix
        if node.target is soften
    )
    assert call.op == "call_function"


def soften(x: torch.Tensor, by: float) -> torch.Tensor:
    return x.tanh() * by if x.numel() else x  # a condition that torch.fx cannot trace


def test_the_second_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the code in docs/compile.md does, except for the backend's name, which an installed package has."""
    first, second = re.findall(r"```python\n(.*?)```", (DOCS / "compile.md").read_text(), re.DOTALL)
    (tmp_path / "compiling.py").write_text(first)  # TorchDynamo names lines of code by their file
    monkeypatch.syspath_prepend(str(tmp_path))
    module = import_module("compiling")
    assert module.model.calls == 1
    assert all(parameter.grad.any() for parameter in module.model.parameters())
    by_object = second.splitlines()[1]
    exec(f"{by_object}\ncompiled(torch.randn(1, 3, 200, 150))", vars(module))
