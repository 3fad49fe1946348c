"""What every place of the volume may hold: the values that were answered or are pending since the last flush.

A cell is half a sector, so writes of cells are unaligned ones too; requests on one cell never overlap in time.
"""

from __future__ import annotations

from typing import ClassVar

from ebsd.domain.units import SECTOR

CELL = SECTOR // 2
ZEROS = bytes(CELL)


def value_of(number: int) -> bytes:
    """Return a cell that no other number gives, and that is recognised whatever happens to its first byte."""
    return (b"\xa5" + number.to_bytes(7, "little")) * (CELL // 8)


class Broken(AssertionError):
    """A promise was broken. ``first`` keeps the first one, for the product may catch what its calls raise."""

    first: ClassVar[Broken | None] = None

    def __init__(self, what: str) -> None:
        super().__init__(what)
        if Broken.first is None:
            Broken.first = self


class Line:
    """The values of one cell, all of them, in order."""

    __slots__ = ("acked", "durable", "values")

    def __init__(self, value: bytes) -> None:
        self.values = [value]
        self.acked = 0
        """Index of the newest answered value: what is read is that or a later one."""
        self.durable = 0
        """Index of the oldest value that a power cut may bring back."""

    def begin(self, value: bytes) -> int:
        self.values.append(value)
        return len(self.values) - 1


class Oracle:
    """All cells that a schedule uses."""

    def __init__(self, cells: list[int]) -> None:
        self.lines = {cell: Line(ZEROS) for cell in cells}

    def begin(self, cells: range, values: list[bytes]) -> list[tuple[Line, int]]:
        lines = self.lines
        return [(lines[cell], lines[cell].begin(value)) for cell, value in zip(cells, values, strict=True)]

    @staticmethod
    def answer(entries: list[tuple[Line, int]]) -> None:
        for line, number in entries:
            line.acked = max(line.acked, number)

    def mark(self) -> dict[Line, int]:
        """Return what a flush that begins now makes durable."""
        return {line: line.acked for line in self.lines.values()}

    @staticmethod
    def flushed(mark: dict[Line, int]) -> None:
        for line, number in mark.items():
            line.durable = max(line.durable, number)

    def check_live(self, when: str, cell: int, got: bytes, since: int | None = None) -> None:
        line = self.lines[cell]
        allowed = line.values[line.acked if since is None else since :]
        if got not in allowed:
            raise Broken(f"{when}: cell {cell} reads {show(got)}, not {[show(v) for v in allowed]}")

    def settle(self, when: str, contents: dict[int, bytes]) -> None:
        """After a power cut: each cell is one of its values since the last flush, and that is its past from now."""
        for cell, got in contents.items():
            line = self.lines[cell]
            allowed = line.values[line.durable :]
            if got not in allowed:
                raise Broken(f"{when}: cell {cell} reads {show(got)}, allowed {[show(v) for v in allowed]}")
            self.lines[cell] = Line(got)

    @staticmethod
    def check_zero_elsewhere(when: str, entries: list[int], used: frozenset[int]) -> None:
        for chunk, layer in enumerate(entries):
            if layer and chunk not in used:
                raise Broken(f"{when}: chunk {chunk}, which nobody wrote, names layer {layer}")


def show(value: bytes) -> str:
    """Name a value for a message."""
    if value == ZEROS:
        return "zeros"
    if value[8:16] == value[16:24] and value[8:9] == b"\xa5":
        number = int.from_bytes(value[9:16], "little")
        return f"v{number}" if value == value_of(number) else f"garbage like v{number}"
    return f"garbage {value[:9].hex()}"
