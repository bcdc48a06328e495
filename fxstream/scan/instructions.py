"""Instructions: what the program of a tile is made of. All integers in them are resolved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..errors import StreamingError
from ..geometry.grid import Index, Tile
from ..geometry.window import Span
from ..ops import Noise
from .keeping import Collector, Returner
from .program import Made
from .region import Region

NOTHING = 0
"""The register that always holds None."""


class Run(Protocol):
    """What instructions need of the tile that executes them."""

    registers: list[Any]
    tile: Tile
    keeping: Collector | Returner | None
    records_graph: bool
    """Whether the tile is computed with autograd."""

    def image(self, number: int) -> torch.Tensor:
        """A region of the image, by its place among those of the tile."""

    def rows(self, value: int, tags: Mapping[int, int], rank: int) -> Index:
        """The index into a tensor of `rank` dimensions that selects what belongs to the block of `value`.

        `tags` says which of the tensor's dimensions are streamed axes, by number.
        """

    def tensor(self, slot: int, value: int, tags: Mapping[int, int]) -> torch.Tensor:
        """The rows of a tensor of the call that belong to the block of `value`."""

    def drawn(self, noise: Noise, value: int, place: int, like: torch.Tensor) -> torch.Tensor:
        """The random numbers for the block of `value`: its operand at `place`. `like` is a tensor on their device."""

    def made(self, made: Made, like: torch.Tensor | None) -> Any:
        """What is made of tensors of the call, or of the type of `like`."""

    def join(self, join: Join, block: torch.Tensor | None, whole: torch.Tensor | None) -> Sequence[torch.Tensor]:
        """What is read of a region; what later tiles need of it is kept. `whole` is the region if it has the block."""

    def emit(self, number: int, value: int, block: torch.Tensor) -> None:
        """Hand a block of `value` to an output, by its place among those of the scan."""

    def note(self, value: int, block: torch.Tensor) -> None:
        """Note the type of a value."""


class Instruction(ABC):
    """One step of the program of a tile. Registers are numbered; each holds a tensor."""

    def __init__(self, reads: Sequence[int], writes: Sequence[int]):
        self.reads, self.writes = tuple(reads), tuple(writes)
        self.frees: tuple[int, ...] = ()
        """The registers that no later instruction reads."""

    @abstractmethod
    def __call__(self, run: Run) -> None:
        """Execute it in one tile."""

    @abstractmethod
    def __str__(self) -> str: ...


class Load(Instruction):
    """Read a region of the image."""

    def __init__(self, out: int, number: int, rows: Index):
        """`number` is the place of the region among those of the tile; `rows` are printed."""
        super().__init__((), (out,))
        self.out, self.number, self.rows = out, number, rows

    def __call__(self, run: Run) -> None:
        run.registers[self.out] = run.image(self.number)

    def __str__(self) -> str:
        return f"%{self.out} = image[{_ranges(self.rows)}]"


class Slice(Instruction):
    """Read the rows of a tensor, which does not depend on the image, that belong to the block of a value."""

    def __init__(self, out: int, slot: int, value: int, tags: dict[int, int]):
        """`tags` says which of the tensor's dimensions are streamed axes, by number."""
        super().__init__((), (out,))
        self.out, self.slot, self.value, self.tags = out, slot, value, tags

    def __call__(self, run: Run) -> None:
        run.registers[self.out] = run.tensor(self.slot, self.value, self.tags)

    def __str__(self) -> str:
        return f"%{self.out} = rows of tensor {self.slot}"


class Draw(Instruction):
    """Draw the random numbers for the block of a value."""

    def __init__(self, out: int, noise: Noise, value: int, place: int, like: int):
        """`place` is that among the operands; the numbers are on the device of register `like`."""
        super().__init__((like,), (out,))
        self.out, self.noise, self.value, self.place, self.like = out, noise, value, place, like

    def __call__(self, run: Run) -> None:
        run.registers[self.out] = run.drawn(self.noise, self.value, self.place, run.registers[self.like])

    def __str__(self) -> str:
        return f"%{self.out} = {self.noise.draw.__name__} for %{self.like}"


class Make(Instruction):
    """Make something of tensors of the call, or of the type of a value."""

    def __init__(self, out: int, made: Made, like: int, value: int, tags: dict[int, int]):
        super().__init__((like,), (out,))
        self.out, self.made, self.like, self.value, self.tags = out, made, like, value, tags

    def __call__(self, run: Run) -> None:
        made = run.made(self.made, run.registers[self.like])
        run.registers[self.out] = made[run.rows(self.value, self.tags, made.dim())] if self.tags else made

    def __str__(self) -> str:
        return f"%{self.out} = made of the type of %{self.like}" if self.like else f"%{self.out} = made"


class Compute(Instruction):
    """Run an operation on blocks."""

    def __init__(
        self,
        out: int,
        value: int,
        name: str,
        run: Callable[..., Any],
        args: Sequence[int],
        spans: Sequence[tuple[int, Sequence[tuple[Span, ...] | None]] | Span],
    ):
        """`spans` holds spans, and for those along streamed axes the axis and the spans of its steps."""
        super().__init__(args, (out,))
        self.out, self.value, self.name = out, value, name
        self.run, self.args, self.spans = run, tuple(args), tuple(spans)
        self._into: Callable[..., Any] | None = None
        self._region: tuple[Region, int] | None = None

    def write_into(self, region: Region, register: int, into: Callable[..., Any]) -> None:
        """Compute the block in its place in a region if no gradient is needed; `into` is that of the operation.

        The region goes to the register.
        """
        self._region, self._into = (region, register), into
        self.writes = (*self.writes, register)

    def __call__(self, run: Run) -> None:
        registers = run.registers
        given = [registers[arg] for arg in self.args]
        for span in self.spans:
            given.append(span if isinstance(span, Span) else span[1][run.tile[span[0]]][0])  # type: ignore[index]
        if self._region is None or run.records_graph or not self._computed_into(registers, given):
            keeping = run.keeping
            registers[self.out] = self.run(*given) if keeping is None else keeping.run(self.value, self.run, *given)

    def _computed_into(self, registers: list[Any], given: Sequence[Any]) -> bool:
        """Compute the block in its place in a new region, unless the strides of such regions are not known yet."""
        region, register = self._region  # type: ignore[misc]  # asked for only where there is one
        opened = region.opened()
        if opened is None:
            return False
        registers[register], registers[self.out] = opened
        self._into(*given, out=registers[self.out])  # type: ignore[misc]  # there is one if there is a region
        return True

    def __str__(self) -> str:
        return f"%{self.out} = {self.name}({', '.join(f'%{arg}' for arg in self.args)})"


class Join(Instruction):
    """Put a region together, hand it to its readers, and keep what later tiles need."""

    def __init__(self, outs: Sequence[int], block: int, region: Region, name: str, whole: int):
        """`whole` is the register of the region if the block may have been computed in it, or else of nothing."""
        super().__init__((block, whole), outs)
        self.outs, self.block, self.region, self.name, self.whole = tuple(outs), block, region, name, whole

    def __call__(self, run: Run) -> None:
        registers = run.registers
        block = registers[self.block]
        if block is not None and block.shape != self.region.block_shape:
            raise StreamingError(
                f"{self.name}: the `run` of its streaming rule made a block of the shape {tuple(block.shape)}, and "
                f"the `dims` of the rule say {self.region.block_shape}. Way out: mend the rule (docs/your_own_op.md)"
            )
        for out, taken in zip(self.outs, run.join(self, block, registers[self.whole]), strict=True):
            registers[out] = taken

    def __str__(self) -> str:
        region = self.region
        sources = [f"{part.shape} of record {part.axis}, {part.ago} steps ago" for part in region.parts]
        sources = [*sources, f"%{self.block}"] if self.block else sources
        kept = [f"keep {keep.place.shape} in record {keep.axis}" for keep in region.keeps]
        outs = ", ".join(f"%{out}" for out in self.outs)
        joined = [f"{outs} = join({'; '.join(sources)})"] if outs else [f"%{self.block}:"]
        return ", ".join([*joined, *kept])


class Emit(Instruction):
    """Hand a block to an output."""

    def __init__(self, block: int, number: int, value: int):
        """`number` is the place of the output among those of the scan."""
        super().__init__((block,), ())
        self.block, self.number, self.value = block, number, value

    def __call__(self, run: Run) -> None:
        run.emit(self.number, self.value, run.registers[self.block])

    def __str__(self) -> str:
        return f"output {self.number} <- %{self.block}"


class Note(Instruction):
    """Note the type of a value, which the graph returns."""

    def __init__(self, block: int, value: int):
        super().__init__((block,), ())
        self.block, self.value = block, value

    def __call__(self, run: Run) -> None:
        run.note(self.value, run.registers[self.block])

    def __str__(self) -> str:
        return f"type of %{self.block}"


def _ranges(rows: Index) -> str:
    return ", ".join(f"{kept.start}:{kept.stop}" for kept in rows)
