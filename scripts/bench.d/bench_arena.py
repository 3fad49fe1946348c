"""The same fio workloads on several contestants, which take turns row by row; the first of them is what others meet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench_figures import MIB, Bar, Sample, Table, median_ratio, spread
from bench_hosts import Device, Row, fill, run_fio, sync
from bench_run import say

ROWS = (
    Row("write 1 MiB", "write", MIB, 1),
    Row("read 1 MiB", "read", MIB, 1),
    Row("random read 4 KiB", "randread", 4096, 1),
    Row("random read 4 KiB, depth 16", "randread", 4096, 16),
    Row("random write 4 KiB", "randwrite", 4096, 1),
    Row("random write 4 KiB, depth 16", "randwrite", 4096, 16),
)

Samples = dict[str, dict[str, list[Sample]]]
"""Row -> contestant -> rounds."""


def compete(devices: Mapping[str, Device], size: int, rounds: int, seconds: float, *, written: int = 0) -> Samples:
    """Fill all devices (``written`` bytes, all by default) and run every row on each of them, ``rounds`` times."""
    for name, device in devices.items():
        say(f"filling {name}")
        fill(device, written or size)
        sync(device)
    os.sync()
    samples: Samples = {row.name: {name: [] for name in devices} for row in ROWS}
    for at in range(rounds):
        for row in ROWS:
            say(f"round {at + 1} of {rounds}: {row.name}")
            for name in in_turn(list(devices), at):
                samples[row.name][name].append(run_fio(row, devices[name], size, seconds))
                if row.writes:
                    sync(devices[name])
    return samples


def in_turn(names: list[str], turn: int) -> list[str]:
    """Return the order of one round: it is reversed in every other one, so that nobody always goes first."""
    return names if turn % 2 == 0 else names[::-1]


def rate(row: Row, sample: Sample) -> float:
    return sample.mib_per_s if row.sequential else sample.iops


def processor_time(row: Row, sample: Sample) -> float:
    """Return the CPU time of the serving processes: seconds per GiB, or microseconds per request of a random row."""
    each = sample.server_us or 0.0
    return each / 1e6 * (1 << 30) / row.block if row.sequential else each


def table_of(title: str, samples: Samples, notes: Sequence[str] = ()) -> Table:
    """Return rates, and in parentheses how many times a contestant's ebsd, the first one, reaches."""
    names = list(next(iter(samples.values())))
    ours, others = names[0], names[1:]
    table = Table(title, ["", "unit", ours, *(cell for name in others for cell in (name, "ratio"))])
    for row in ROWS:
        found = {name: [rate(row, sample) for sample in samples[row.name][name]] for name in names}
        cells = [spread(found[ours]).text()]
        for name in others:
            cells += [spread(found[name]).text(), f"{median_ratio(found[ours], found[name]):.2f}"]
        table.add(row.name, "MiB/s" if row.sequential else "IOPS", *cells)
    for row in ROWS:
        used = {name: [processor_time(row, sample) for sample in samples[row.name][name]] for name in names}
        cells = [f"{spread(used[ours]).median:.2f}"]
        for name in others:
            # CPU time has a coarse clock: of what took less than its tick there is no ratio.
            ratio = f"{median_ratio(used[name], used[ours]):.2f}" if min(used[ours]) > 0 else ""
            cells += [f"{spread(used[name]).median:.2f}", ratio]
        table.add(f"CPU of the server, {row.name}", "s/GiB" if row.sequential else "us each", *cells)
    ratio = "Ratio: how many times as fast the first one is, or how many times less CPU it takes; median of rounds."
    table.notes += [*notes, "Direct I/O, page cache warm.", ratio]
    return table


def bars_of(samples: Samples, label: str = "") -> list[Bar]:
    """Return a bar for each row and contestant but the first: how many times as fast the first one is."""
    bars = []
    for row in ROWS:
        names = list(samples[row.name])
        found = {name: [rate(row, sample) for sample in samples[row.name][name]] for name in names}
        bars += [Bar(row.name, label or name, median_ratio(found[names[0]], found[name])) for name in names[1:]]
    return bars


def as_json(samples: Samples) -> dict[str, Any]:
    return {row: {name: [asdict(s) for s in runs] for name, runs in by.items()} for row, by in samples.items()}
