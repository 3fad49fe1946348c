"""Snapshots of volumes under heavy, checked load: each must be its moment, and nothing may stay behind.

By default the load runs for a few seconds. ``EBSD_STRESS_SECONDS=120`` makes it as long as wanted, with one snapshot a
second; each is restored and checked afterwards, which takes about four seconds more. ``EBSD_STRESS_REPORT=FILE``
appends what was done.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from checked_workload import (
    MIB,
    SECTOR,
    BlockModel,
    BlockWriter,
    Contents,
    Exerciser,
    Fio,
    Journal,
    is_one_moment,
    running,
)
from installation import Installation, installation

from ebsd.store.disk import RealDisk
from ebsd.store.durablemap import DurableMap

SECONDS = float(os.environ.get("EBSD_STRESS_SECONDS", "3"))
LIMIT = 300 + 30 * SECONDS
COPY_EVERY = 5
CHUNK = 64 * 1024

FSCK = {
    "ext4": ["e2fsck", "-f", "-n"],
    "xfs": ["xfs_repair", "-n"],
    "btrfs": ["btrfs", "check", "--readonly"],
}


@dataclass(frozen=True)
class Moment:
    """One snapshot, and for each part of the load what was promised before the call and begun before its answer."""

    name: str
    promised: tuple[int, ...]
    begun: tuple[int, ...]


def take_snapshots(ebsd: Installation, parts: Sequence[Journal | Exerciser | BlockWriter]) -> list[Moment]:
    """Take a snapshot of ``data`` each second while the load runs."""
    moments: list[Moment] = []
    began = time.monotonic()
    while time.monotonic() < began + SECONDS and not any(part.broken for part in parts):
        promised = tuple(part.promised for part in parts)
        name = f"s{len(moments)}"
        ebsd.ok("snapshot", "data", "--name", name)
        moments.append(Moment(name, promised, tuple(part.begun for part in parts)))
        time.sleep(max(0.0, began + len(moments) - time.monotonic()))
    return moments


def used(ebsd: Installation) -> int:
    data = (ebsd.state / name for name in ("layers", "maps", "records"))
    return sum(f.stat().st_blocks * 512 for top in data for f in top.rglob("*") if f.is_file())


def named_bytes(ebsd: Installation, volume: str) -> int:
    """Return the bytes of the chunks that the map of a detached volume names."""
    durable = DurableMap.open(RealDisk(), ebsd.state / "maps" / volume, writable=False)
    try:
        return sum(1 for entry in durable.entries() if entry) * CHUNK
    finally:
        durable.close()


def delete_in_random_order(ebsd: Installation, snapshots: Sequence[str], volume: str, done: Counter[str]) -> None:
    """Delete everything; the space of what only snapshots held comes back first, the rest with the volume."""
    shuffled = list(snapshots)
    random.Random(len(shuffled)).shuffle(shuffled)
    for name in shuffled:
        ebsd.ok("delete", name, "--yes")
        done["deleted"] += 1
    named = named_bytes(ebsd, volume)
    assert used(ebsd) <= named + named // 50 + 2 * MIB, "more is on the disk than the volume names"
    ebsd.ok("delete", "data", "--yes")
    assert used(ebsd) == 0
    assert not list((ebsd.state / "layers").iterdir())


def report(what: str, done: Counter[str]) -> None:
    line = f"{what}: {json.dumps(done)}"
    print(line)
    if "EBSD_STRESS_REPORT" in os.environ:
        with open(os.environ["EBSD_STRESS_REPORT"], "a") as file:
            file.write(line + "\n")


# --- file systems


class FileSystemJudge:
    """Compares what is mounted with the load's model, for one moment after the other."""

    def __init__(self, journal: Journal, exerciser: Exerciser, done: Counter[str]) -> None:
        self._journal = journal
        self._exerciser = exerciser
        self._contents = Contents(Exerciser.LIMIT)
        self.done = done

    def check(self, tree: Path, moment: Moment) -> None:
        records = Journal.count(tree / "journal")
        assert moment.promised[0] <= records <= moment.begun[0], (moment, records)
        self._contents.advance(self._exerciser.steps, moment.promised[1])
        self._contents.check((tree / "exercised").read_bytes(), self._exerciser.steps, moment.begun[1])
        self.done["records compared"] += records
        self.done["blocks of fio compared"] += Fio.check(tree / "fio")
        self.done["checks"] += 1


def fsck(device: str, file_system: str) -> None:
    done = subprocess.run([*FSCK[file_system], device], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def judge_snapshot(ebsd: Installation, judge: FileSystemJudge, moment: Moment, snapshot: str, kind: str) -> None:
    """Restore, mount (the journal of the file system is replayed), compare, and check the file system."""
    tree = ebsd.root / "restored"
    ebsd.ok("create", "restored", "--from", snapshot, "--mount", tree)
    judge.check(tree, moment)
    (attachment,) = ebsd.ctl_json("show", "restored")["Attachments"]
    subprocess.run(["umount", tree], check=True)
    fsck(attachment["Device"], kind)
    ebsd.ok("detach", "restored")
    ebsd.ok("delete", "restored", "--yes")


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("file_system", FSCK)
def test_each_snapshot_of_a_busy_file_system_is_its_moment(file_system: str, tmp_path: Path) -> None:
    done: Counter[str] = Counter()
    with installation(tmp_path) as ebsd:
        mount = tmp_path / "mnt"
        ebsd.ok("key", "create", "second")
        ebsd.ok("create", "data", "--size", "384M")
        ebsd.ok("attach", "data", "--mkfs", file_system, "--mount", mount)
        for name in ("journal", "fio"):
            (mount / name).mkdir()
        (mount / "exercised").touch()
        os.sync()
        volume = ebsd.ctl_json("show", "data")["VolumeId"]
        journal, exerciser = Journal(mount / "journal"), Exerciser(mount / "exercised", seed=1)
        fio = Fio(mount / "fio", tmp_path)
        with running([journal, exerciser, fio]):
            moments = take_snapshots(ebsd, [journal, exerciser])
        assert len(moments) >= SECONDS / 2
        done.update({"snapshots": len(moments), "records": journal.promised, "steps": len(exerciser.steps)})
        done.update({"read back": exerciser.reads, "passes of fio": fio.passes})

        end = Moment("the end", (journal.begun, exerciser.begun), (journal.begun, exerciser.begun))
        ebsd.ok("detach", "data")
        judge = FileSystemJudge(journal, exerciser, done)
        snapshots = []
        for number, moment in enumerate(moments):
            judge_snapshot(ebsd, judge, moment, moment.name, file_system)
            snapshots.append(moment.name)
            if number % COPY_EVERY == 1:
                copy = f"{moment.name}-copy"
                ebsd.ok("copy", moment.name, "--name", copy, "--encrypted", "--key", "second")
                assert ebsd.ctl_json("show", copy)["KmsKeyId"] != ebsd.ctl_json("show", moment.name)["KmsKeyId"]
                judge_snapshot(ebsd, judge, moment, copy, file_system)
                snapshots.append(copy)
                done["copies"] += 1
        ebsd.ok("attach", "data", "--mount", mount)
        judge.check(mount, end)
        (attachment,) = ebsd.ctl_json("show", "data")["Attachments"]
        subprocess.run(["umount", mount], check=True)
        fsck(attachment["Device"], file_system)
        ebsd.ok("detach", "data")
        delete_in_random_order(ebsd, snapshots, volume, done)
    report(file_system, done)


# --- no file system


def logical_block(device: Path) -> int:
    """Return the smallest write that may go past the page cache: the loop device's block; any sector of the file."""
    if not device.is_block_device():
        return SECTOR
    return int(Path("/sys/class/block", device.resolve().name, "queue/logical_block_size").read_text())


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("exposed", ["loop", "file"])
def test_each_snapshot_of_a_busy_device_is_one_moment_of_all_its_writers(exposed: str, tmp_path: Path) -> None:
    flags = ["--file"] if exposed == "file" else []
    done: Counter[str] = Counter()
    part = 4 * MIB
    with installation(tmp_path) as ebsd:
        ebsd.ok("key", "create", "second")
        ebsd.ok("create", "data", "--size", "64M")
        volume = ebsd.ctl_json("show", "data")["VolumeId"]
        device = Path(ebsd.ok("attach", "data", *flags))
        block = logical_block(device)
        # Side by side, and not on the boundaries of chunks: neighbours share a chunk.
        places = [number * (part + 12 * 1024) for number in range(3)]
        writers = [
            BlockWriter(device, at, part, direct=direct, unit=block if direct else SECTOR, seed=number + 1)
            for number, (at, direct) in enumerate(zip(places, (True, True, False), strict=True))
        ]
        with running(writers):
            moments = take_snapshots(ebsd, writers)
        assert len(moments) >= SECONDS / 2
        done.update({"snapshots": len(moments), "writes": sum(len(writer.writes) for writer in writers)})

        models = [BlockModel(writer) for writer in writers]

        def judge(path: str, moment: Moment) -> None:
            with open(path, "rb", buffering=0) as raw:
                states = []
                for writer, model, promised, begun in zip(writers, models, moment.promised, moment.begun, strict=True):
                    model.advance(promised)
                    found = os.pread(raw.fileno(), writer.size, writer.at)
                    states.append(model.matches(found, begun))
                    assert states[-1], f"{moment.name}: the part at {writer.at} is as after no write of it"
                between = os.pread(raw.fileno(), 64 * MIB, writers[-1].at + part)
                assert not between.strip(b"\0"), "nobody wrote there"
            assert any(is_one_moment(writers, cut) for cut in itertools.product(*states)), (moment, states)
            done["checks"] += 1

        snapshots = []
        for number, moment in enumerate(moments):
            snapshots.append(moment.name)
            if number % COPY_EVERY == 1:
                snapshots.append(f"{moment.name}-copy")
                ebsd.ok("copy", moment.name, "--name", snapshots[-1], "--encrypted", "--key", "second")
                done["copies"] += 1
            for name in snapshots[-1 - (number % COPY_EVERY == 1) :]:
                ebsd.ok("create", "restored", "--from", name)
                judge(ebsd.ok("attach", "restored"), moment)
                ebsd.ok("detach", "restored")
                ebsd.ok("delete", "restored", "--yes")
        whole = tuple(len(writer.writes) for writer in writers)
        judge(str(device), Moment("the end", whole, whole))
        ebsd.ok("detach", "data")
        judge(ebsd.ok("attach", "data", *flags), Moment("the end", whole, whole))
        ebsd.ok("detach", "data")
        delete_in_random_order(ebsd, snapshots, volume, done)
    report(f"no file system, {exposed}", done)
