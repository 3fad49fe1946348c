"""What the benchmark computes and prints, without measuring anything: medians, fio's JSON, tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class Spread:
    """The median of several rounds, and how far they lie apart."""

    median: float
    low: float
    high: float
    rounds: int

    def text(self, digits: int = 0) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"

    def as_json(self) -> dict[str, float]:
        return {"median": self.median, "min": self.low, "max": self.high, "rounds": self.rounds}


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError for no values."""
    if not values:
        raise ValueError("no rounds")
    return Spread(statistics.median(values), min(values), max(values), len(values))


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios round by round.

    The two of a round stood next to each other in time, so what slowed the host slowed both; a ratio of the two
    medians would compare different moments.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} rounds against {len(theirs)}")
    return spread([a / b for a, b in zip(ours, theirs, strict=True)]).median


@dataclass(frozen=True)
class Sample:
    """One fio run."""

    iops: float
    mib_per_s: float
    mean_us: float
    p99_us: float
    requests: int
    server_us: float | None = None
    """CPU time of the serving process per request."""


def parse_fio(document: Mapping[str, Any], server_seconds: float | None = None) -> Sample:
    """Return the figures of the one job in fio's JSON; raises ValueError when it did nothing or failed."""
    jobs = document.get("jobs", [])
    if len(jobs) != 1:
        raise ValueError(f"fio reports {len(jobs)} jobs")
    job = jobs[0]
    if job.get("error"):
        raise ValueError(f"fio failed with error {job['error']}")
    side = max((job["read"], job["write"]), key=lambda s: s["total_ios"])
    requests = side["total_ios"]
    if not requests:
        raise ValueError("fio made no request")
    return Sample(
        iops=side["iops"],
        mib_per_s=side["bw_bytes"] / MIB,
        mean_us=side["lat_ns"]["mean"] / 1000,
        p99_us=side["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1000,
        requests=requests,
        server_us=None if server_seconds is None else server_seconds * 1e6 / requests,
    )


def parse_fio_output(text: str) -> str:
    """Return the JSON document in what fio printed, which warnings may precede."""
    start = text.find("{")
    if start < 0:
        raise ValueError(f"fio printed no JSON: {text.strip()[:200]}")
    return text[start:]


def parse_openssl_speed(text: str) -> float:
    """Return bytes per second of ``openssl speed -mr`` with one size: the line ``+F:25:AES-256-XTS:2986015507.69``."""
    for line in text.splitlines():
        if line.startswith("+F:"):
            return float(line.rsplit(":", 1)[1])
    raise ValueError(f"openssl speed printed no result: {text.strip()[:200]}")


def parse_pss(text: str) -> int:
    """Return bytes from /proc/<pid>/smaps_rollup; raises ValueError."""
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no Pss in smaps_rollup")


def descendants(parents: Mapping[int, int], ancestor: int) -> set[int]:
    """Return all children of a process and theirs, of a table pid -> parent."""
    found: set[int] = set()
    fresh = {ancestor}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh and pid not in found}
        found |= fresh
    return found


def parse_size(text: str) -> int:
    """Return bytes of ``512M``, ``2G``, ``1T`` or plain bytes, a multiple of 1 MiB; raises ValueError."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    bare = text.strip().upper().removesuffix("IB").removesuffix("B")
    number, unit = (bare[:-1], bare[-1]) if bare[-1:].isalpha() else (bare, "")
    if not number.isdecimal() or unit not in units:
        raise ValueError(f"{text} is no size: such as 512M or 2G")
    size = int(number) * units[unit]
    if size == 0 or size % MIB:
        raise ValueError(f"{text} is no multiple of 1 MiB")
    return size


@dataclass(frozen=True)
class Bar:
    """One ratio for the picture: how many times as fast ebsd is."""

    group: str
    label: str
    value: float


@dataclass
class Table:
    """One part of the report: the first column is text, the others are figures."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells in {len(self.columns)} columns")
        self.rows.append(cells)

    def plain(self) -> str:
        widths = [max(len(row[at]) for row in (self.columns, *self.rows)) for at in range(len(self.columns))]
        lines = [self.title]
        for row in (self.columns, *self.rows):
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            cells[0] = row[0].ljust(widths[0])
            lines.append("  " + "  ".join(cells).rstrip())
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", _bar(self.columns), _bar(["---", *["---:"] * (len(self.columns) - 1)])]
        lines += [_bar(row) for row in self.rows]
        if self.notes:
            lines += ["", " ".join(self.notes)]
        return "\n".join(lines)


def _bar(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
