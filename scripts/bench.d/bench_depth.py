"""Part 5: what history costs: one volume with many snapshots, and a long chain of restores."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bench_figures import Table
from bench_hosts import Device, Ebsd, Row, allocated, fill, run_fio

Progress = Callable[[str], None]

READS = Row("random read 4 KiB", "randread", 4096, 1)
WRITES = Row("random write 4 KiB", "randwrite", 4096, 1)
CHUNK = 64 * 1024


@dataclass
class Point:
    """Figures at one depth; times are medians in milliseconds."""

    label: str
    create_ms: float
    delete_ms: float
    list_ms: float
    attach_ms: float
    detach_ms: float
    read_iops: float
    write_iops: float
    map_kib: float
    """Of maps per snapshot."""


COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("CreateSnapshot ms", "create_ms", 1),
    ("DeleteSnapshot ms", "delete_ms", 1),
    ("list of all ms", "list_ms", 1),
    ("attach ms", "attach_ms", 0),
    ("detach ms", "detach_ms", 0),
    ("read IOPS", "read_iops", 0),
    ("write IOPS", "write_iops", 0),
    ("KiB of maps each", "map_kib", 1),
)


class DepthResults:
    def __init__(self) -> None:
        self.points: list[Point] = []
        self.chain_ms: list[float] = []
        self.delete_all_ms: list[float] = []
        self.baseline = self.full = self.after = 0
        """Bytes of layers and maps: one snapshot's worth of history, all of it, all deleted."""

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "points": [asdict(point) for point in self.points]}

    def table(self, size: int, depth: int, chain: int) -> Table:
        title = f"5. A volume of {size >> 20} MiB, all written, one chunk changed before each snapshot"
        table = Table(title, ["depth", *(name for name, _, _ in COLUMNS)])
        first = self.points[0]
        for point in self.points:
            cells = []
            for _, name, digits in COLUMNS:
                value, base = getattr(point, name), getattr(first, name)
                cells.append(f"{value:.{digits}f}" + (f" ({value / base:.2f})" if base and point is not first else ""))
            table.add(point.label, *cells)
        table.notes.append("In parentheses the ratio to the first row. Attach and reads: the volume itself.")
        table.notes.append("Writes: a volume made from the last snapshot. Page cache warm.")
        if self.chain_ms:
            ends = [statistics.median(part) for part in (self.chain_ms[:20], self.chain_ms[-20:])]
            table.notes.append(
                f"A link of the chain (restore, attach, write, snapshot, detach): {ends[0]:.0f} ms among the first, "
                f"{ends[1]:.0f} ms among the last of {chain}."
            )
        if self.delete_all_ms:
            quarter = max(1, len(self.delete_all_ms) // 4)
            ends = [statistics.median(part) for part in (self.delete_all_ms[:quarter], self.delete_all_ms[-quarter:])]
            table.notes.append(
                f"All {len(self.delete_all_ms)} snapshots deleted in random order: {ends[0]:.1f} ms each in the first "
                f"quarter, {ends[1]:.1f} ms in the last."
            )
            table.notes.append(
                f"Layers and maps: {self.baseline >> 20} MiB before, {self.full >> 20} MiB with all, "
                f"{self.after >> 20} MiB when all are deleted again."
            )
        return table


def measure_depth(
    ebsd: Ebsd, *, size: int, depths: list[int], chain: int, seconds: float, say: Progress
) -> DepthResults:
    """Take snapshots up to the last depth, with figures at each; then the chain; then delete all of it."""
    return _Run(ebsd, size, seconds, say).run(depths, chain)


class _Run:
    def __init__(self, ebsd: Ebsd, size: int, seconds: float, say: Progress) -> None:
        self.ebsd = ebsd
        self.size = size
        self.seconds = seconds
        self.say = say
        self.dice = random.Random(1)
        self.results = DepthResults()
        self.snapshots: list[str] = []

    def run(self, depths: list[int], chain: int) -> DepthResults:
        self.ebsd.create("deep", self.size)
        device = self.ebsd.attach("deep")
        fill(device, self.size)
        self.results.baseline = self._space()
        for depth in depths:
            taken: list[float] = []
            while len(self.snapshots) < depth:
                self._change(device)
                taken.append(self._snapshot("deep"))
                if len(self.snapshots) % 500 == 0:
                    self.say(f"{len(self.snapshots)} snapshots, the last in {taken[-1]:.1f} ms")
            device = self._point(str(depth), "deep", device, taken[-9:])
        self._detach("deep")
        if chain:
            self._chain(chain)
        self.results.full = self._space()
        self._delete_all()
        self.results.after = self._space()
        return self.results

    def _point(self, label: str, volume: str, device: Device, taken: list[float]) -> Device:
        self.say(f"depth {label}")
        created, deleted = list(taken[-5:]), []
        for _ in range(5):
            self._change(device)
            created.append(self._snapshot(volume))
            deleted.append(self._delete(self.snapshots.pop()))
        listed = [self._timed(lambda: self._list()) for _ in range(3)]
        attached, detached = [], []
        for _ in range(3):
            detached.append(self._timed(lambda: self._detach(volume)))
            begin = time.perf_counter()
            reply = self.ebsd.client.ec2("AttachVolume", VolumeId=volume)
            attached.append((time.perf_counter() - begin) * 1000)
            assert reply
        self._detach(volume)
        device = self.ebsd.attach(volume)
        run_fio(READS, device, self.size, self.seconds)
        reads = run_fio(READS, device, self.size, self.seconds).iops
        writes = self._writes()
        maps = allocated(self.ebsd.state / "maps") / max(1, len(self.snapshots))
        figures = [statistics.median(values) for values in (created, deleted, listed, attached, detached)]
        self.results.points.append(Point(label, *figures, reads, writes, maps / 1024))
        self.say(str(self.results.points[-1]))
        return device

    def _writes(self) -> float:
        self.ebsd.client.ec2("CreateVolume", Name="written", SnapshotId=self.snapshots[-1])
        device = self.ebsd.attach("written")
        # Every chunk is moved to the new head first, so that all rows measure the same.
        iops = run_fio(WRITES, device, self.size, self.seconds).iops
        self._detach("written")
        self.ebsd.client.ec2("DeleteVolume", VolumeId="written")
        return iops

    def _chain(self, links: int) -> None:
        source = self.snapshots[-1]
        for at in range(links):
            if at % 100 == 0:
                self.say(f"chain, link {at + 1} of {links}")
            begin = time.perf_counter()
            name = f"link-{at}"
            self.ebsd.client.ec2("CreateVolume", Name=name, SnapshotId=source)
            reply = self.ebsd.client.ec2("AttachVolume", VolumeId=name)
            self._write_chunk(reply["Attachment"]["Path"])
            self._snapshot(name)
            source = self.snapshots[-1]
            self._detach(name)
            if at != links - 1:
                self.ebsd.client.ec2("DeleteVolume", VolumeId=name)
            self.results.chain_ms.append((time.perf_counter() - begin) * 1000)
        if links:
            last = f"link-{links - 1}"
            device = self.ebsd.attach(last)
            self._point(f"{links} restores", last, device, [])
            self._detach(last)
            self.ebsd.client.ec2("DeleteVolume", VolumeId=last)

    def _delete_all(self) -> None:
        self.dice.shuffle(self.snapshots)
        while self.snapshots:
            self.results.delete_all_ms.append(self._delete(self.snapshots.pop()))
            if len(self.snapshots) % 500 == 0:
                self.say(f"{len(self.snapshots)} left, the last deleted in {self.results.delete_all_ms[-1]:.1f} ms")

    # --- small steps

    def _change(self, device: Device) -> None:
        self._write_chunk(device.path)

    def _write_chunk(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(fd, os.urandom(4096), self.dice.randrange(self.size // CHUNK) * CHUNK)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _snapshot(self, volume: str) -> float:
        begin = time.perf_counter()
        reply = self.ebsd.client.ec2("CreateSnapshot", VolumeId=volume)
        took = (time.perf_counter() - begin) * 1000
        self.snapshots.append(reply["Snapshot"]["SnapshotId"])
        return took

    def _delete(self, snapshot: str) -> float:
        return self._timed(lambda: self.ebsd.client.ec2("DeleteSnapshot", SnapshotId=snapshot))

    def _list(self) -> None:
        found = len(self.ebsd.client.snapshots())
        if found != len(self.snapshots):
            raise AssertionError(f"{found} snapshots are listed of {len(self.snapshots)}")

    def _detach(self, volume: str) -> None:
        self.ebsd.client.ec2("DetachVolume", VolumeId=volume)

    def _timed(self, work: Callable[[], object]) -> float:
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1000

    def _space(self) -> int:
        os.sync()
        return sum(allocated(self.ebsd.state / name) for name in ("layers", "maps"))
