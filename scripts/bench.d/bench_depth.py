"""Part ``depth``: what history costs: one volume with many snapshots, and a long chain of restores.

Each figure is taken of that volume and of a peer without history in turns: building the history takes long, and the
machine may be another by then.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bench_figures import Table
from bench_hosts import Device, Ebsd, Row, aligned, allocated, fill, run_fio
from bench_run import Outcome, Run, say

Progress = Callable[[str], None]

READS = Row("random read 4 KiB", "randread", 4096, 1)
WRITES = Row("random write 4 KiB", "randwrite", 4096, 1)
CHUNK = 64 * 1024
DEEP, FLAT, CHAIN = "deep", "flat", "link"


ROUNDS = 3
"""Turns of each volume."""

TOUCHES = 200
"""Chunks, each for the first time since the volume was attached, that the cost of a first touch is the median of."""


@dataclass
class Figures:
    """Figures of one volume; times are medians in milliseconds."""

    create_ms: float
    delete_ms: float
    attach_ms: float
    detach_ms: float
    first_read_us: float
    """Microseconds of a first read of a chunk, right after the volume was attached."""
    first_write_us: float
    read_iops: float
    write_iops: float


@dataclass
class Point:
    """Figures at one depth, of the deep volume and of its flat peer."""

    label: str
    deep: Figures
    flat: Figures
    list_ms: float
    """Of all snapshots."""
    map_kib: float
    """Of maps per snapshot."""


COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("CreateSnapshot ms", "create_ms", 1),
    ("DeleteSnapshot ms", "delete_ms", 1),
    ("attach ms", "attach_ms", 0),
    ("detach ms", "detach_ms", 0),
    ("first read us", "first_read_us", 0),
    ("first write us", "first_write_us", 0),
    ("read IOPS", "read_iops", 0),
    ("write IOPS", "write_iops", 0),
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
        title = f"A volume of {size >> 20} MiB, all written, one chunk changed before each snapshot"
        table = Table(title, ["depth", *(name for name, _, _ in COLUMNS), "list of all ms", "KiB of maps each"])
        for point in self.points:
            cells = []
            for _, name, digits in COLUMNS:
                deep, flat = getattr(point.deep, name), getattr(point.flat, name)
                cells.append(f"{deep:.{digits}f} ({deep / flat:.2f})")
            table.add(point.label, *cells, f"{point.list_ms:.1f}", f"{point.map_kib:.1f}")
        table.notes.append("In parentheses: the ratio to a volume of this size with one snapshot, measured in turns.")
        table.notes.append("Attach and reads: the volume itself. Writes: a volume made from its last snapshot.")
        table.notes.append(
            f"First read, first write: of 4 KiB in a chunk that nobody has met since the volume was attached, at once; "
            f"the median of {TOUCHES}. Before the IOPS are measured each chunk is read once."
        )
        table.notes.append("Page cache warm.")
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


def run(run: Run) -> Outcome:
    depth, chain = (100, 10) if run.quick else (10000, 1000)
    depth = depth if run.depth is None else run.depth
    chain = chain if run.chain is None else run.chain
    size = run.size if run.sized else 256 << 20
    depths = [at for at in (1, 10, 100, 1000, 3000) if at < depth] + [depth]
    with run.ebsd("ebsd-depth") as ebsd:
        results = measure_depth(ebsd, size=size, depths=depths, chain=chain, seconds=run.seconds, say=say)
    return Outcome([results.table(size, depth, chain)], results.as_json())


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
        self.snapshots: dict[str, list[str]] = {DEEP: [], FLAT: []}
        """Volume -> those that are there, oldest first."""
        self.paths: dict[str, str] = {}
        """Attached volume -> its device."""

    def run(self, depths: list[int], chain: int) -> DepthResults:
        for name in (FLAT, DEEP):
            self.ebsd.create(name, self.size)
            fill(self._attach(name), self.size)
        self._change(FLAT)
        self._snapshot(FLAT)
        self.results.baseline = self._space()
        for depth in depths:
            while len(self.snapshots[DEEP]) < depth:
                self._change(DEEP)
                took = self._snapshot(DEEP)
                if len(self.snapshots[DEEP]) % 500 == 0:
                    self.say(f"{len(self.snapshots[DEEP])} snapshots, the last in {took:.1f} ms")
            self._point(str(depth), DEEP)
        self._detach(DEEP)
        if chain:
            self._chain(chain)
        self.results.full = self._space()
        self._delete_all()
        self.results.after = self._space()
        return self.results

    def _point(self, label: str, volume: str) -> None:
        self.say(f"depth {label}")
        taken: dict[str, dict[str, list[float]]] = {
            name: {field: [] for _, field, _ in COLUMNS} for name in (volume, FLAT)
        }
        for _ in range(ROUNDS):
            for name in (volume, FLAT):
                for field, value in self._round(name).items():
                    taken[name][field] += value
        deep, flat = (
            Figures(**{field: statistics.median(values) for field, values in taken[name].items()})
            for name in (volume, FLAT)
        )
        listed = statistics.median(self._timed(self._list) for _ in range(3))
        snapshots = sum(len(names) for names in self.snapshots.values())
        maps = allocated(self.ebsd.state / "maps") / snapshots
        self.results.points.append(Point(label, deep, flat, listed, maps / 1024))
        self.say(str(self.results.points[-1]))

    def _round(self, volume: str) -> dict[str, list[float]]:
        """One turn of an attached volume: every figure once or a few times."""
        created, deleted = [], []
        for _ in range(3):
            self._change(volume)
            created.append(self._snapshot(volume))
            deleted.append(self._delete(self.snapshots[volume].pop()))
        detached = [self._timed(lambda: self._detach(volume))]
        attached = [self._timed(lambda: self.ebsd.client.ec2("AttachVolume", VolumeId=volume))]
        self._detach(volume)
        device = self._attach(volume)
        first_reads = self._touch(device, os.preadv)
        self._warm(device)
        reads = run_fio(READS, device, self.size, self.seconds).iops
        return {
            "create_ms": created,
            "delete_ms": deleted,
            "attach_ms": attached,
            "detach_ms": detached,
            "first_read_us": first_reads,
            "read_iops": [reads],
            **self._writes(volume),
        }

    def _writes(self, volume: str) -> dict[str, list[float]]:
        self.ebsd.client.ec2("CreateVolume", Name="written", SnapshotId=self.snapshots[volume][-1])
        device = self.ebsd.attach("written")
        first_writes = self._touch(device, os.pwritev)
        self._warm(device)
        iops = run_fio(WRITES, device, self.size, self.seconds).iops
        self._detach("written")
        self.ebsd.client.ec2("DeleteVolume", VolumeId="written")
        return {"first_write_us": first_writes, "write_iops": [iops]}

    def _touch(self, device: Device, call: Callable[[int, list[memoryview], int], int]) -> list[float]:
        """Read or write a block of each of some chunks, and return how many microseconds each took."""
        chunks = self.dice.sample(range(self.size // CHUNK), min(TOUCHES, self.size // CHUNK))
        fd = os.open(device.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            block, took = aligned(os.urandom(4096)), []
            for chunk in chunks:
                begin = time.perf_counter()
                call(fd, [block], chunk * CHUNK + 4096)
                took.append((time.perf_counter() - begin) * 1e6)
            return took
        finally:
            os.close(fd)

    def _warm(self, device: Device) -> None:
        """Read a block of every chunk, so that what follows shows the steady cost."""
        fd = os.open(device.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            block = aligned(bytes(4096))
            for at in range(0, self.size, CHUNK):
                os.preadv(fd, [block], at)
        finally:
            os.close(fd)

    def _chain(self, links: int) -> None:
        source, name = self.snapshots[DEEP][-1], ""
        self.snapshots[CHAIN] = []
        for at in range(links):
            if at % 100 == 0:
                self.say(f"chain, link {at + 1} of {links}")
            begin = time.perf_counter()
            name = f"{CHAIN}-{at}"
            self.ebsd.client.ec2("CreateVolume", Name=name, SnapshotId=source)
            self.paths[name] = self.ebsd.client.ec2("AttachVolume", VolumeId=name)["Attachment"]["Path"]
            self._change(name)
            self._snapshot(name, CHAIN)
            source = self.snapshots[CHAIN][-1]
            if at != links - 1:
                self._detach(name)
                self.ebsd.client.ec2("DeleteVolume", VolumeId=name)
            self.results.chain_ms.append((time.perf_counter() - begin) * 1000)
        self.snapshots[name] = self.snapshots.pop(CHAIN)
        self._point(f"{links} restores", name)
        self._detach(name)
        self.ebsd.client.ec2("DeleteVolume", VolumeId=name)

    def _delete_all(self) -> None:
        """All but the peer's."""
        snapshots = [ident for name, idents in self.snapshots.items() if name != FLAT for ident in idents]
        self.dice.shuffle(snapshots)
        while snapshots:
            self.results.delete_all_ms.append(self._delete(snapshots.pop()))
            if len(snapshots) % 500 == 0:
                self.say(f"{len(snapshots)} left, the last deleted in {self.results.delete_all_ms[-1]:.1f} ms")

    # --- small steps

    def _attach(self, volume: str) -> Device:
        device = self.ebsd.attach(volume)
        self.paths[volume] = device.path
        return device

    def _detach(self, volume: str) -> None:
        self.ebsd.client.ec2("DetachVolume", VolumeId=volume)

    def _change(self, volume: str) -> None:
        """Write one block somewhere."""
        fd = os.open(self.paths[volume], os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(fd, os.urandom(4096), self.dice.randrange(self.size // CHUNK) * CHUNK)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _snapshot(self, volume: str, kept_as: str = "") -> float:
        begin = time.perf_counter()
        reply = self.ebsd.client.ec2("CreateSnapshot", VolumeId=volume)
        took = (time.perf_counter() - begin) * 1000
        self.snapshots[kept_as or volume].append(reply["Snapshot"]["SnapshotId"])
        return took

    def _delete(self, snapshot: str) -> float:
        return self._timed(lambda: self.ebsd.client.ec2("DeleteSnapshot", SnapshotId=snapshot))

    def _list(self) -> None:
        found, made = len(self.ebsd.client.snapshots()), sum(len(names) for names in self.snapshots.values())
        if found != made:
            raise AssertionError(f"{found} snapshots are listed of {made}")

    def _timed(self, work: Callable[[], object]) -> float:
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1000

    def _space(self) -> int:
        os.sync()
        return sum(allocated(self.ebsd.state / name) for name in ("layers", "maps"))
