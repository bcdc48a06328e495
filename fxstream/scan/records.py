"""Records: what tiles carry to later ones, where it is kept, and the gradients that later tiles owe it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, takewhile
from math import prod

import torch

from ..geometry.grid import Grid, Tile

Key = tuple[int, int, Tile]
"""A record: its value, its axis, and the steps of that axis and of those before it."""


class Record:
    """The rows of a value that the tiles of one step carry to later ones."""

    __slots__ = ("owed", "rows", "spare")

    def __init__(self, rows: torch.Tensor, spare: list[torch.Tensor]):
        """`spare` are gradients that are not needed any more, of records of the same value and axis."""
        self.rows, self.spare = rows, spare
        self.owed: torch.Tensor | None = None
        """In the backward pass, the gradient of the rows, as far as the tiles that read them are done."""

    def owing(self) -> torch.Tensor:
        """The gradient, to which more is added."""
        if self.owed is None:
            # Memory that was used for one of the last records leaves no gap between large blocks that come and go.
            used = self.spare.pop() if self.spare else None
            fits = used is not None and used.shape == self.rows.shape
            self.owed = used.zero_() if used is not None and fits else torch.zeros_like(self.rows)
        return self.owed

    def release(self) -> None:
        """Let the next record use the memory of the gradient."""
        if self.owed is not None:
            self.spare[:] = [self.owed]


class Records:
    """The records that the tiles of a scan need at a time.

    A record stays on the device that computes until the last tile of the forward scan has read it. Then it moves to the
    image's device to wait for the backward scan: if the image is too large for the GPU, so are all records together.
    Out of a GPU it goes to pinned memory, and the copies are waited for once, after the last tile.

    Attributes:
        growing: whether tiles write to them, as they do in the forward scan.
        live: axis -> step of that axis -> value -> its record, for the present steps of the axes before.
        held: what waits for the backward scan.
    """

    def __init__(
        self,
        grid: Grid,
        device: torch.device,
        home: torch.device,
        keep: bool = False,
        held: Mapping[Key, torch.Tensor] | None = None,
    ):
        """`device` computes, `home` holds the image. `keep` says whether there will be a backward scan; in that scan,
        `held` is what the forward scan has left."""
        self._grid = grid
        self._device, self._home, self._keep = device, home, keep
        self.growing = held is None
        self._values = len(grid.axes[0].sizes)
        self.live: list[list[list[Record | None]]] = [
            [[None] * self._values for _ in range(axis.count)] for axis in grid.axes
        ]
        self.held: dict[Key, torch.Tensor] = dict(held or {})
        self._spare: list[list[list[torch.Tensor]]] = [[[] for _ in range(self._values)] for _ in grid.axes]
        self._rooms: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}
        """By value and axis, memory for records that are kept, and how much of it is in use."""

    def begin(self, value: int, axis: int, step: int, block: torch.Tensor, rows: Mapping[int, int]) -> Record:
        """Begin a record for a step of an axis; `rows` are its sizes along the streamed dimensions of the block."""
        if self._keep and self._device == self._home:
            found = self._room(value, axis, step, block, rows)
        else:
            found = empty_like(block, rows)
        record = self.live[axis][step][value] = Record(found, self._spare[axis][value])
        return record

    def _room(self, value: int, number: int, step: int, block: torch.Tensor, rows: Mapping[int, int]) -> torch.Tensor:
        """Room for a record in memory that it shares with those of the next steps, as many as are as large as a block.

        They all wait for the backward scan. If each had memory of its own, the blocks that come and go between them
        would leave gaps that few others fit.
        """
        shape = [rows.get(dim, size) for dim, size in enumerate(block.shape)]
        needed = prod(shape)
        memory, used = self._rooms.get((value, number), (None, 0))
        if memory is None or used == memory.numel():
            axis = self._grid.axes[number]
            sizes = (needed * axis.kept(value, one) // axis.kept(value, step) for one in range(step, axis.count))
            together = takewhile(lambda total: total <= max(needed, block.numel()), accumulate(sizes))
            memory, used = block.new_empty(max(together)), 0
        self._rooms[value, number] = memory, used + needed
        return memory.as_strided(shape, strides_like(block.stride(), shape), used)

    def leave(self, tile: Tile) -> None:
        """After a tile of the forward scan, release the records that no later tile of it reads."""
        for axis, step in self._ended(tile):
            for value, begun in self._grid.axes[axis].expiring[step]:
                record, self.live[axis][begun][value] = self.live[axis][begun][value], None
                if self._keep and record is not None:
                    self.held[value, axis, (*tile[:axis], begun)] = store(record.rows, self._home)

    def enter_reversed(self, tile: Tile) -> None:
        """Before a tile of the backward scan, fetch the records that no tile before it has read."""
        for axis, step in self._ended(tile):
            for value, begun in self._grid.axes[axis].expiring[step]:
                rows = self.held.get((value, axis, (*tile[:axis], begun)))
                if rows is not None:
                    spare = self._spare[axis][value]
                    self.live[axis][begun][value] = Record(rows.to(self._device, non_blocking=True), spare)

    def leave_reversed(self, tile: Tile) -> None:
        """After a tile of the backward scan, release the records that it has begun in the forward scan."""
        for axis in range(len(tile)):
            if not any(tile[axis + 1 :]):
                for record in self.live[axis][tile[axis]]:
                    if record is not None:
                        record.release()
                self.live[axis][tile[axis]] = [None] * self._values

    def settle(self) -> None:
        """Wait for the copies; called after the last tile."""
        if self._keep and _leaves_gpu(self._device, self._home):
            torch.cuda.current_stream(self._device).synchronize()

    def _ended(self, tile: Tile) -> Iterator[tuple[int, int]]:
        """The axes whose step ends with a tile, and these steps."""
        for axis in reversed(range(len(tile))):
            yield axis, tile[axis]
            if tile[axis] < self._grid.axes[axis].count - 1:
                return


def empty_like(block: torch.Tensor, sizes: Mapping[int, int]) -> torch.Tensor:
    """An uninitialised tensor with other sizes along some dimensions, which are in the same order in memory."""
    shape = [sizes.get(dim, size) for dim, size in enumerate(block.shape)]
    return torch.empty_strided(shape, strides_like(block.stride(), shape), dtype=block.dtype, device=block.device)


def strides_like(stride: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor of another shape whose dimensions are in the same order in memory."""
    order = list(range(len(shape)))
    if 0 not in stride:  # not expanded
        order.sort(key=stride.__getitem__, reverse=True)
    strides = [1] * len(shape)
    step = 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


def store(rows: torch.Tensor, home: torch.device) -> torch.Tensor:
    """`rows` on the device `home`; out of a GPU, in pinned memory, which holds them once the GPU has got that far."""
    if _leaves_gpu(rows.device, home):
        return torch.empty_like(rows, device=home, pin_memory=True).copy_(rows, non_blocking=True)
    return rows.to(home)


def _leaves_gpu(device: torch.device, home: torch.device) -> bool:
    return device.type == "cuda" and home.type == "cpu"
