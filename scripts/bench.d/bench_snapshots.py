"""Part ``snapshots``: snapshots, volumes made from them, and copies under another key."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from bench_figures import MIB, Table, spread
from bench_hosts import BenchError, Device, Ebsd, Row, allocated, fill, fio_running, sync
from bench_run import Outcome, Run, say

from ebsd.domain.errors import EbsdError

PAUSES = 20
"""Snapshots in a row while random writes run: what they say of the pause is the point of them."""

RANDOM_WRITES = Row("random write 4 KiB, depth 16", "randwrite", 4096, 16)

Progress = Callable[[str], None]


class SnapshotResults:
    """Figures of part 4; what could not be measured stands in ``failures``."""

    def __init__(self) -> None:
        self.fill_mib_s = 0.0
        self.create_idle_ms: list[float] = []
        self.create_busy_ms: list[float] = []
        self.pause_idle_us: list[float] = []
        self.pause_busy_us: list[float] = []
        self.restore_ms: list[float] = []
        self.maps_kib: list[float] = []
        """Of all maps at the end, per snapshot."""
        self.grown_by: dict[str, int] = {}
        self.copy_mib_s: list[float] = []
        self.failures: dict[str, str] = {}

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def run(run: Run) -> Outcome:
    size, written = 1 << 40, (1 if run.quick else 10) << 30
    with run.ebsd("ebsd-snapshots") as ebsd:
        results = measure_snapshots(ebsd, size, written, 1 if run.quick else 3, say)
    title = f"Snapshots of a volume of {size >> 30} GiB, {written / (1 << 30):g} GiB of it written"
    table = Table(title, ["", "unit", "median (min-max)"])
    for name, unit, values in (
        ("CreateSnapshot, idle", "ms", results.create_idle_ms),
        ("pause of I/O, idle", "us", results.pause_idle_us),
        ("CreateSnapshot, random writes running", "ms", results.create_busy_ms),
        ("pause of I/O, random writes running", "us", results.pause_busy_us),
        ("CreateVolume from the snapshot", "ms", results.restore_ms),
        ("maps on the disk, the volume's own included, per snapshot", "KiB", results.maps_kib),
        ("copy under another key", "MiB/s", results.copy_mib_s),
    ):
        if values:
            table.add(name, unit, spread(values).text())
    for name, grown in results.grown_by.items():
        table.add(f"space taken by a {name}", "KiB", f"{grown / 1024:.0f}")
    table.notes += [f"{name}: not measured: {why}" for name, why in results.failures.items()]
    return Outcome([table], results.as_json())


def measure_snapshots(ebsd: Ebsd, size: int, written: int, rounds: int, say: Progress) -> SnapshotResults:
    """Take ``rounds`` snapshots idle and as many under load, restore each, and copy one under a second key."""
    results = SnapshotResults()
    say(f"writing {written // MIB} MiB")
    ebsd.create("snapped", size)
    device = ebsd.attach("snapped")
    results.fill_mib_s = written / MIB / fill(device, written)
    idle: str | None = None
    try:
        for at in range(rounds):
            say(f"snapshots, round {at + 1} of {rounds}")
            idle = _round(ebsd, device, written, results, at)
    except (EbsdError, BenchError) as exc:
        results.failures["snapshots"] = str(exc)
    os.sync()
    results.maps_kib.append(allocated(ebsd.state / "maps") / 1024 / max(1, len(results.create_busy_ms)))
    if idle is not None:
        say("copy under a second key")
        try:
            results.copy_mib_s.append(_copy(ebsd, idle))
        except (EbsdError, BenchError) as exc:
            results.failures["copy under another key"] = str(exc)
    return results


def _round(ebsd: Ebsd, device: Device, written: int, results: SnapshotResults, at: int) -> str:
    sync(device)
    os.sync()  # delayed allocation would otherwise count as growth
    space = allocated(ebsd.state)
    idle, took = _snapshot(ebsd, f"idle-{at}")
    results.create_idle_ms.append(took * 1000)
    results.pause_idle_us.append(float(idle["PauseMicroseconds"]))
    results.grown_by.setdefault("snapshot", _growth(ebsd, space))
    with fio_running(RANDOM_WRITES, device, written):
        for number in range(PAUSES):
            busy, took = _snapshot(ebsd, f"busy-{at}-{number}")
            results.create_busy_ms.append(took * 1000)
            results.pause_busy_us.append(float(busy["PauseMicroseconds"]))
    sync(device)
    os.sync()
    space = allocated(ebsd.state)
    begin = time.perf_counter()
    made = ebsd.client.ec2("CreateVolume", Name=f"restored-{at}", SnapshotId=idle["SnapshotId"])
    results.restore_ms.append((time.perf_counter() - begin) * 1000)
    results.grown_by.setdefault("volume from it", _growth(ebsd, space))
    ebsd.client.ec2("DeleteVolume", VolumeId=made["Volume"]["VolumeId"])
    return str(idle["SnapshotId"])


def _snapshot(ebsd: Ebsd, name: str) -> tuple[dict[str, Any], float]:
    begin = time.perf_counter()
    reply = ebsd.client.ec2("CreateSnapshot", VolumeId="snapped", Name=name)
    return reply["Snapshot"], time.perf_counter() - begin


def _growth(ebsd: Ebsd, before: int) -> int:
    os.sync()
    return allocated(ebsd.state) - before


def _copy(ebsd: Ebsd, snapshot: str) -> float:
    """Return MiB/s of a re-encrypting copy, its sync included."""
    key = ebsd.client.kms("CreateKey", Description="bench")["KeyMetadata"]["KeyId"]
    begin = time.perf_counter()
    reply = ebsd.client.ec2("CopySnapshot", SourceSnapshotId=snapshot, Encrypted=True, KmsKeyId=key)
    if reply.get("JobId") is None:
        raise BenchError("the copy under another key needed no job")
    job = ebsd.client.control("WaitJob", JobId=reply["JobId"])["Job"]
    took = time.perf_counter() - begin
    if job["State"] != "completed":
        raise BenchError(f"the copy is {job['State']}: {(job.get('Error') or {}).get('Message', '')}")
    return float(job["Total"]) / MIB / took
