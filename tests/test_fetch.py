"""The image on another device than the model: which regions are fetched, when, and that they are the right ones; which
carries wait there for the backward pass, and from when on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import fxstream
from fxstream.geometry.grid import Tile
from fxstream.scan.fetch import Region, Regions, fetch
from fxstream.scan.records import Records
from fxstream.testing import relative_error

CPU, META = torch.device("cpu"), torch.device("meta")


def rows_of(first: int, last: int) -> Region:
    return (slice(first, last),)


def test_the_next_regions_are_on_their_way_while_a_tile_computes() -> None:
    plan = [[rows_of(0, 4)], [rows_of(4, 8), rows_of(5, 9)], [], [rows_of(8, 12)]]
    image = torch.arange(12.0)
    cut: list[Region] = []

    def rows(region: Region) -> torch.Tensor:
        cut.append(region)
        return image[region]

    tiles = fetch(rows, CPU, META, enumerate(plan))
    for index, wanted in enumerate(plan):
        number, regions = next(tiles)
        assert number == index
        assert [tensor.shape for tensor in regions] == [image[region].shape for region in wanted]
        assert all(tensor.device == META for tensor in regions)
        assert cut == [*chain(*plan[: index + 2])], "those of the next tile, and none twice"
    assert next(tiles, None) is None


def test_nothing_is_copied_where_the_image_is_there_already() -> None:
    image = torch.arange(12.0)
    ((_, regions),) = fetch(lambda region: image[region], CPU, CPU, [(0, [rows_of(3, 7)])])
    assert regions[0].data_ptr() == image[3:].data_ptr()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[list[list[Region]]]:
    """For every pass the regions of its tiles."""
    plans: list[list[list[Region]]] = []

    def recording(
        cut: Callable[[Region], torch.Tensor],
        source: torch.device,
        target: torch.device,
        wanted: Iterable[tuple[Tile, list[Region]]],
    ) -> Iterator[tuple[Tile, Regions]]:
        tiles = list(wanted)
        plans.append([regions for _, regions in tiles])
        # Copies, as they would be on another device: no tensor of the image itself reaches a tile.
        for tile, regions in fetch(cut, source, target, tiles):
            yield tile, [rows.clone() for rows in regions]

    monkeypatch.setattr("fxstream.scan.tiles.fetch", recording)
    return plans


class Branches(nn.Module):
    """Reads the image twice with one window, once with another, and as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(3, 4, 5, padding=2)
        self.three = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) * self.two(x) + self.three(x) * x[:, :1]


@pytest.mark.parametrize("image_grad", [True, False])
def test_every_region_is_fetched_once_a_pass(fetched: list[list[list[Region]]], image_grad: bool) -> None:
    model = Branches().double()
    converted = fxstream.convert(copy.deepcopy(model), (16, 20))
    image = torch.randn(2, 3, 53, 47, dtype=torch.float64, requires_grad=image_grad)
    inputs = [image] if image_grad else []
    output, expected = converted(image), model(image)
    assert relative_error(output, expected) < 1e-10
    found = torch.autograd.grad(output.square().sum(), [*inputs, *converted.parameters()])
    for one, other in zip(
        found, torch.autograd.grad(expected.square().sum(), [*inputs, *model.parameters()]), strict=True
    ):
        assert relative_error(one, other) < 1e-10
    forward, backward = fetched
    assert backward == forward[::-1], "the backward pass fetches the same, in reverse"
    covered = torch.zeros(53, 47)
    for regions in forward:
        assert len(regions) == len(set(map(str, regions))) <= 2, "two readers with the same window share a copy"
        for _, _, rows, columns in regions:
            assert rows.stop - rows.start <= 16 + 8
            assert columns.stop - columns.start <= 20 + 8
            covered[rows, columns] = 1
    assert covered.all()


class Deep(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 5, padding=2), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Conv2d(6, 5, 3)
        )


def test_carries_leave_the_device_as_soon_as_no_tile_of_the_forward_pass_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored: list[torch.Tensor] = []
    on_device: list[int] = []

    def elsewhere(rows: torch.Tensor, home: torch.device) -> torch.Tensor:
        """As if it were on another device: nobody reads it where it was."""
        stored.append(rows.clone())
        rows.fill_(torch.nan)
        return stored[-1]

    class Watched(Records):
        def leave(self, tile: Tile) -> None:
            live = [record for steps in self.live for values in steps for record in values if record is not None]
            on_device.append(sum(record.rows.nbytes for record in live))
            super().leave(tile)

    monkeypatch.setattr("fxstream.scan.records.store", elsewhere)
    monkeypatch.setattr("fxstream.scan.tiles.Records", Watched)
    model = Deep().double()
    image = torch.randn(2, 3, 253, 247, dtype=torch.float64, requires_grad=True)
    converted = fxstream.convert(copy.deepcopy(model), (16, 20))
    output, expected = converted(image), model(image)
    found = torch.autograd.grad(output.square().sum(), [image, *converted.parameters()])
    wanted = torch.autograd.grad(expected.square().sum(), [image, *model.parameters()])
    assert all(relative_error(one, other) < 1e-10 for one, other in zip(found, wanted, strict=True))
    analysis = fxstream.analyze(model)
    with torch.no_grad():
        at_a_time = analysis.estimate(image.shape, (16, 20)).carried_bytes
    # As predicted for a pass that keeps nothing.
    assert 0 < max(on_device) <= 1.1 * at_a_time < analysis.estimate(image.shape, (16, 20)).carried_bytes / 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("image_grad", [True, False])
def test_an_image_in_host_memory_and_a_model_on_the_gpu(image_grad: bool) -> None:
    model = Branches().double().cuda()
    converted = fxstream.convert(copy.deepcopy(model), (16, 20))
    for _ in range(3):
        image = torch.randn(2, 3, 253, 247, dtype=torch.float64, requires_grad=image_grad)
        moved = image.detach().cuda().requires_grad_(image_grad)
        output, expected = converted(image), model(moved)
        assert output.is_cuda
        assert relative_error(output, expected) < 1e-10
        inputs, others = ([image], [moved]) if image_grad else ([], [])
        found = torch.autograd.grad(output.square().sum(), [*inputs, *converted.parameters()])
        wanted = torch.autograd.grad(expected.square().sum(), [*others, *model.parameters()])
        assert not image_grad or found[0].device == image.device
        for one, other in zip(found, wanted, strict=True):
            assert relative_error(one.cpu(), other.cpu()) < 1e-10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_carries_wait_in_host_memory_if_the_image_is_there() -> None:
    converted = fxstream.convert(Deep().cuda(), (16, 20))
    saved: list[torch.Tensor] = []

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    image = torch.randn(1, 3, 253, 247)
    with saved_tensors_hooks(seen, lambda tensor: tensor):
        converted(image)
    ours = {tensor.data_ptr() for tensor in (image, *converted.parameters())}
    carries = [tensor for tensor in saved if tensor.data_ptr() not in ours]
    assert carries
    assert all(rows.is_pinned() for rows in carries)
