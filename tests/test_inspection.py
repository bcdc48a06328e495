"""What can be looked at: the graphs of a converted model, and the schedule of its tiles."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import pairwise, product

import pytest
import torch
from torch import nn

import fxstream
from fxstream.geometry.grid import Grid
from fxstream.geometry.schedule import equal_step, schedule
from fxstream.geometry.window import IDENTITY, Sliding


class Residual(nn.Module):
    """With several values that cross to the head, a constant and a size that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        y = self.first(x) * self.scale.exp()
        z = y + self.second(y).relu_()
        return z, y.flatten(1).sort(-1).values, x.shape[2]


@pytest.fixture
def converted() -> torch.fx.GraphModule:
    return fxstream.convert(Residual(), 16)


def test_both_graphs_are_well_formed(converted: torch.fx.GraphModule) -> None:
    converted.graph.lint()
    converted.streamed.graph.lint()


def test_a_graph_that_is_not_well_formed_is_found_at_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(graph: torch.fx.Graph, *args: object) -> None:
        raise RuntimeError("Argument 'relu' of Node 'conv' was used before it has been defined!")

    monkeypatch.setattr(torch.fx.Graph, "lint", shuffled)
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        fxstream.convert(Residual(), 16)


def test_the_streamed_part_alone_says_that_it_needs_its_model(converted: torch.fx.GraphModule) -> None:
    alone = copy.deepcopy(converted.streamed)
    with pytest.raises(fxstream.StreamingError, match="copy or pickle the converted model as a whole"):
        alone(torch.randn(1, 3, 20, 20))


def test_the_schedule_prints_rows_carries_and_kinds_of_tiles() -> None:
    graph = ((), ((0, Sliding(3, before=1, after=1)),), ((1, Sliding(2, 2)),))
    grid = Grid((schedule(graph, 50, 10), schedule(graph, 13, 13)), ("H", "W"), ("image", "conv", "pool"))
    assert str(grid) == (
        "H: 5 steps (A B 2xC D); rows that a step computes + rows that are kept after it\n"
        "  value    rows     A     B     C     D\n"
        "-------  ------  ----  ----  ----  ----\n"
        "  image      50  10+2  10+2  10+2  10+0\n"
        "   conv      50   9+1  10+1  10+1  11+0\n"
        "   pool      25   4+0   5+0   5+0   6+0\n"
        "\n"
        "W: 1 steps (A); rows that a step computes + rows that are kept after it\n"
        "  value    rows     A\n"
        "-------  ------  ----\n"
        "  image      13  13+0\n"
        "   conv      13  13+0\n"
        "   pool       6   6+0\n"
        "\n"
        "5 tiles of 4 kinds: 2 x C.A, 1 x A.A, 1 x B.A, 1 x D.A"
    )


def test_a_grid_without_names_prints_numbers() -> None:
    text = str(Grid((schedule(((), ((0, IDENTITY),)), 5, 5),)))
    assert text.startswith("axis 0: 1 steps (A)")
    assert "value 1       5  5+0" in text


@pytest.mark.parametrize(("size", "tile"), [(4096, 512), (1000, 96), (97, 10)])
def test_steps_of_one_kind_do_the_same_but_for_a_shift(size: int, tile: int) -> None:
    convolution, pooling = Sliding(3, before=1, after=1), Sliding(3, 2, before=1, after=1)
    graph = ((), ((0, convolution),), ((1, pooling),), ((2, convolution),), ((2, IDENTITY), (3, IDENTITY)))
    axis = schedule(graph, size, tile)
    for one, other in product(range(axis.count), repeat=2):
        if axis.kinds[one] == axis.kinds[other]:
            for value in range(len(graph)):
                assert axis.steps[value][one] == axis.steps[value][other]
                assert axis.computed(value, one) == axis.computed(value, other)
                assert axis.carry(value, one + 1) == axis.carry(value, other + 1)
    grid = Grid((axis, axis))
    counts = Counter(product(axis.kinds, repeat=2))
    assert f"{grid.count} tiles of {len(counts)} kinds" in str(grid)


def test_an_axis_is_cut_into_equal_steps_of_at_most_the_tile() -> None:
    for size, tile in product(range(1, 60), range(1, 70)):
        step = equal_step(size, tile)
        assert step <= tile
        assert -(-size // step) == -(-size // tile)
        fresh = schedule(((),), size, tile).frontier[0]
        assert max(b - a for a, b in pairwise(fresh)) == step


def test_the_report_shows_what_each_value_sees_where_streaming_ends_and_why() -> None:
    layers = [nn.Conv2d(3, 4, (3, 5), stride=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    wanted = """\
node     operation                 receptive field      stride    padding
input_1  placeholder        image  1                         1          0
_0       Conv2d             local  3 x 5                     2          0
_1       ReLU               local  3 x 5                     2          0
_2       MaxPool2d          local  7 x 9                     4          0
_3       AdaptiveAvgPool2d  total
_4       Flatten            head
output   output             head

Streamed along H, W: 4 operations with 100.0% of the FLOPs of a forward pass (of an image of 1 x 3 x 1024 x 1024); \
they hand over _3.
Streaming stops where an operation is not local:
  3 pools over the whole image along H and W, and is accumulated tile by tile."""
    found = [line for line in str(fxstream.analyze(nn.Sequential(*layers))).splitlines() if not line.startswith("---")]
    # How wide tabulate makes a column depends on its release.
    assert [line.split() for line in found] == [line.split() for line in wanted.splitlines()]


def test_the_report_of_a_converted_model_is_that_of_the_model() -> None:
    model = Residual()
    assert str(fxstream.analyze(fxstream.convert(model, 16))) == str(fxstream.analyze(model))
