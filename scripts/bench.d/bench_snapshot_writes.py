"""Part ``snapshot-writes``: random writes right after a snapshot, when all is copied on write, against steady ones.

The peer is a qcow2 image with LUKS in qemu-storage-daemon, and its internal snapshots. Before each measurement all of
the volume is written, so that "steady" means chunks that nobody shares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from bench_arena import in_turn
from bench_figures import Bar, Sample, Table, median_ratio, spread
from bench_hosts import Device, Row, fill, run_fio, sync
from bench_qemu import Qemu
from bench_run import Outcome, Run, say

ROWS = (
    Row("random write 4 KiB", "randwrite", 4096, 1),
    Row("random write 4 KiB, depth 16", "randwrite", 4096, 16),
)
STEADY, AFTER = "steady", "after a snapshot"


def run(run: Run) -> Outcome:
    samples: dict[str, dict[str, dict[str, list[Sample]]]] = {}
    with contextlib.ExitStack() as stack:
        ebsd = stack.enter_context(run.ebsd("ebsd-after"))
        ebsd.create("written", run.size)
        devices = {"ebsd": ebsd.attach("written")}
        snapshots: dict[str, Callable[[str], Any]] = {
            "ebsd": lambda name: ebsd.client.ec2("CreateSnapshot", VolumeId="written", Name=name)
        }
        version = Qemu.version()
        if version is not None:
            qemu = Qemu(run.root / "qcow2", qcow2=True)
            stack.callback(qemu.close)
            peer = f"{version}, qcow2"
            devices[peer], snapshots[peer] = qemu.start(run.size), qemu.snapshot
        for at in range(run.rounds):
            for row in ROWS:
                for name in in_turn(list(devices), at):
                    say(f"round {at + 1} of {run.rounds}: {row.name}, {name}")
                    found = samples.setdefault(row.name, {}).setdefault(name, {STEADY: [], AFTER: []})
                    _turn(run, row, devices[name], partial(snapshots[name], f"s{at}-{row.depth}"), found)
    return Outcome(_tables(samples), _plain(samples), _bars(samples))


def _turn(run: Run, row: Row, device: Device, snapshot: Callable[[], Any], found: dict[str, list[Sample]]) -> None:
    fill(device, run.size)
    sync(device)
    found[STEADY].append(run_fio(row, device, run.size, run.seconds))
    sync(device)
    snapshot()
    found[AFTER].append(run_fio(row, device, run.size, run.seconds))
    sync(device)


def _tables(samples: dict[str, dict[str, dict[str, list[Sample]]]]) -> list[Table]:
    table = Table(
        "Random writes right after a snapshot",
        ["", "", f"{STEADY}, IOPS", f"{AFTER}, IOPS", "of steady", f"ebsd's ratio {AFTER}"],
    )
    for row, by in samples.items():
        ours = [sample.iops for sample in by["ebsd"][AFTER]]
        for name, found in by.items():
            steady, after = ([sample.iops for sample in found[state]] for state in (STEADY, AFTER))
            table.add(
                row,
                name,
                spread(steady).text(),
                spread(after).text(),
                f"{median_ratio(after, steady):.2f}",
                "" if name == "ebsd" else f"{median_ratio(ours, after):.2f}",
            )
    table.notes.append("All of the volume is written before each steady figure.")
    return [table]


def _bars(samples: dict[str, dict[str, dict[str, list[Sample]]]]) -> list[Bar]:
    bars = []
    for row, by in samples.items():
        ours = [sample.iops for sample in by["ebsd"][AFTER]]
        for name, found in by.items():
            if name != "ebsd":
                ratio = median_ratio(ours, [sample.iops for sample in found[AFTER]])
                bars.append(Bar(f"{row}, {AFTER}", name, ratio))
    return bars


def _plain(samples: dict[str, dict[str, dict[str, list[Sample]]]]) -> Any:
    return {
        row: {name: {state: [asdict(s) for s in runs] for state, runs in found.items()} for name, found in by.items()}
        for row, by in samples.items()
    }
