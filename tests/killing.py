"""Kill a process of a running ebsd in the middle of an operation, and see that nothing is left half done.

An ``Operation`` prepares something, acts, and judges what is there after the kill: the old state or the new one.
Every volume holds a region whose blocks all carry one generation number, so a mixture of two states shows. Between
operations ``Rig.audit`` compares everything that there is on the host with what ebsd lists.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import sqlite3
import stat
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from installation import BIN, Installation

from ebsctl.client import Client
from ebsd.domain.errors import EbsdError

MIB = 1 << 20
SIZE = 64 * MIB
BLOCK = 4096
REGION = 96
"""Blocks that carry the generation: a chunk and a half at the start, and as much again at the end of SIZE."""
LOG_AT = 8 * MIB
LOG_BLOCKS = 48
"""Blocks that a writer fills in turn with a counter, for snapshots of a volume that is written to."""
PATIENCE = 30.0
SLACK = 512 * 1024
"""Bytes by which a state directory without resources may be larger than at the start: the catalog and its WAL."""
LOOP_GET_STATUS64 = 0x4C05
LOOP_INFO_BYTES = 232
LOOP_NAME = slice(56, 120)
MODULES = {"broker": "ebsd.kms", "volume": "ebsd.volume.holder", "worker": "ebsd.volume.copier"}


class Broken(AssertionError):
    """A state that no operation may leave behind."""


def region(generation: int) -> bytes:
    """Return the content of the region: generation and place in every block, and nothing else."""
    return b"".join(struct.pack("<QQ", generation, block) * (BLOCK // 16) for block in range(REGION))


@dataclass
class Outcome:
    """How a call ended, as its caller saw it."""

    reply: dict[str, Any] | None = None
    error: EbsdError | None = None


@dataclass
class Writer:
    """Writes the log area of an attached volume until the volume is gone or somebody stops it."""

    path: str
    count: int
    acknowledged: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self.acknowledged = self.count
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(PATIENCE)
            assert not self._thread.is_alive(), "a write to the volume hangs"

    def _run(self) -> None:
        try:
            fd = os.open(self.path, os.O_RDWR)
        except OSError:
            return
        try:
            while not self._stop.is_set():
                self.count += 1
                block = struct.pack("<Q", self.count) * (BLOCK // 8)
                os.pwrite(fd, block, LOG_AT + self.count % LOG_BLOCKS * BLOCK)
                self.acknowledged = self.count
                time.sleep(0.002)
        except OSError:
            pass  # the volume process was killed
        finally:
            with suppress(OSError):  # the flush of a dead process's file
                os.close(fd)


def log_count(raw: bytes) -> int:
    """Return up to which count the log area was written; raises Broken when an earlier write is missing."""
    counts: list[int] = [struct.unpack_from("<Q", raw, block * BLOCK)[0] for block in range(LOG_BLOCKS)]
    last = max(counts)
    for block, found in enumerate(counts):
        if raw[block * BLOCK : (block + 1) * BLOCK] != struct.pack("<Q", found) * (BLOCK // 8):
            raise Broken(f"block {block} of the log is torn")
        due = last - (last - block) % LOG_BLOCKS
        if found != max(due, 0):
            raise Broken(f"the log goes to {last}, but block {block} holds {found} instead of {max(due, 0)}")
    return last


class Rig:
    """One ebsd with a volume ``data`` and a snapshot ``base`` of it, to be killed again and again."""

    def __init__(self, root: Path) -> None:
        self.ebsd = Installation(root)
        self.client = Client(str(self.ebsd.socket), timeout=60)
        self.seen: set[str] = set()
        """Every id that was ever listed or answered."""
        self.durations: dict[str, float] = {}
        self._log_mark = 0
        self._broker_deaths = 0
        self.baseline = 0
        self.keys: list[str] = []
        self.data = self.base = ""
        self.generation = self.base_generation = 1
        self.count = 0
        self.attach_seconds = self.start_seconds = 0.5

    def begin(self) -> None:
        """Start ebsd, and make the volume and the snapshot."""
        self.start()
        self.baseline = self.state_bytes()
        self.keys = [self.client.kms("CreateKey")["KeyMetadata"]["Arn"] for _ in range(2)]
        made = self.client.ec2("CreateVolume", Name="data", SizeBytes=SIZE, Encrypted=True, KmsKeyId=self.keys[0])
        self.data = self.note(made["Volume"]["VolumeId"])
        began = time.monotonic()
        path = self.attach(self.data)
        self.attach_seconds = time.monotonic() - began
        self.write(self.data, 1, path=path)
        self.detach(self.data)
        self.base = self.note(self.client.ec2("CreateSnapshot", VolumeId="data", Name="base")["Snapshot"]["SnapshotId"])

    # --- processes

    def start(self) -> None:
        """Start ebsd and wait until it answers; as ``Installation.start``, without a process per question."""
        self._launch()
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.client.control("GetStatus")
                return
            except EbsdError:
                gone = self.ebsd.daemon is None or self.ebsd.daemon.poll() is not None
                if gone or time.monotonic() > deadline:
                    raise Broken("ebsd does not start again") from None
                time.sleep(0.01)

    def start_and_kill(self, delay: float) -> None:
        """Start ebsd and kill it again before or while it recovers."""
        self._launch()
        time.sleep(delay)
        self.kill("ebsd", lambda: False)

    def _launch(self) -> None:
        ebsd = self.ebsd
        ebsd.write_config()
        with ebsd.log.open("ab") as log:
            ebsd.daemon = subprocess.Popen(
                [BIN / "ebsd", "--config", ebsd.root / "ebsd.toml"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, what: str, during: Callable[[], bool]) -> bool:
        """Kill one process; False when there was none before ``during`` said that its time is over."""
        if what == "ebsd":
            assert self.ebsd.daemon is not None
            self.ebsd.daemon.kill()
            self.ebsd.daemon.wait(PATIENCE)
            self.ebsd.daemon = None
            return True
        while True:
            goes_on = during()
            for pid in self.processes().get(MODULES[what], []):
                os.kill(pid, signal.SIGKILL)
                return True
            if not goes_on:
                return False
            time.sleep(0.001)

    def calm(self) -> None:
        """Have the next broker started again at once: ebsd pauses longer and longer when one dies after the other."""
        self._broker_deaths += 1
        if self._broker_deaths > 2:
            self.ebsd.stop()
            self.start()
            self._broker_deaths = 1

    def processes(self) -> dict[str, list[int]]:
        """Return module -> pids of what logs into this installation's log, the daemon as ``ebsd``."""
        found: dict[str, list[int]] = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(process / "fd" / "2") != str(self.ebsd.log):
                    continue
                arguments = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            # A child between fork and exec still has the arguments of ebsd.
            module = next((x.decode() for x in arguments if x.startswith(b"ebsd.")), "ebsd")
            found.setdefault(module, []).append(int(process.name))
        return found

    def mark(self) -> None:
        """Remember where the log ends, for ``resumed``."""
        self._log_mark = self.ebsd.log.stat().st_size

    def resumed(self, job: str) -> bool:
        """Say whether the job was taken up by another ebsd since ``mark``."""
        with self.ebsd.log.open("rb") as log:
            log.seek(self._log_mark)
            return f"{job} goes on".encode() in log.read()

    # --- volumes

    def note(self, ident: str) -> str:
        self.seen.add(ident)
        return ident

    def attach(self, volume: str, expose_as: str = "file") -> str:
        return str(self.client.ec2("AttachVolume", VolumeId=volume, ExposeAs=expose_as)["Attachment"]["Path"])

    def detach(self, volume: str, *, force: bool = False) -> None:
        self.client.ec2("DetachVolume", VolumeId=volume, Force=force)

    def volume(self, name: str) -> dict[str, Any] | None:
        return next((v for v in self.volumes() if name in (v["VolumeId"], v["Name"])), None)

    def volumes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.volumes()
        self.seen.update(v["VolumeId"] for v in found)
        return found

    def snapshot(self, name: str) -> dict[str, Any] | None:
        return next((s for s in self.snapshots() if name in (s["SnapshotId"], s["Name"])), None)

    def snapshots(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.snapshots()
        self.seen.update(s["SnapshotId"] for s in found)
        return found

    def write(self, volume: str, generation: int, *, path: str | None = None) -> None:
        """Write the generation into the region, attaching the volume for that unless a path is given."""
        target = path or self.attach(volume)
        fd = os.open(target, os.O_RDWR)
        try:
            content = region(generation)
            half = len(content) // 2
            os.pwrite(fd, content[:half], 0)
            os.pwrite(fd, content[half:], SIZE - half)
            os.fsync(fd)
        finally:
            os.close(fd)
        if path is None:
            self.detach(volume)

    def check(self, path: str, generation: int | None, *, size: int = SIZE, least: int = 0) -> int:
        """Compare a block file with the model (None: nothing was ever written); return the count of its log."""
        fd = os.open(path, os.O_RDONLY)
        try:
            half = REGION * BLOCK // 2
            found = os.pread(fd, half, 0) + os.pread(fd, half, SIZE - half)
            log = os.pread(fd, LOG_BLOCKS * BLOCK, LOG_AT)
            length = os.lseek(fd, 0, os.SEEK_END)
            rest = os.pread(fd, MIB, size - MIB) if size > SIZE else b""
        finally:
            os.close(fd)
        if length != size:
            raise Broken(f"{path} has {length} bytes instead of {size}")
        if any(rest):
            raise Broken(f"what {path} grew by is not zeros")
        if found != (bytes(len(found)) if generation is None else region(generation)):
            there = sorted({struct.unpack_from("<Q", found, at)[0] for at in range(0, len(found), BLOCK)})
            raise Broken(f"{path} holds the generations {there} instead of {generation}")
        count = log_count(log)
        if count < least:
            raise Broken(f"{path} holds the log to {count}, but {least} was acknowledged")
        return count

    def check_volume(self, volume: str, generation: int | None, *, size: int = SIZE, least: int = 0) -> int:
        """Attach a volume, compare it with the model, and detach it."""
        path = self.attach(volume)
        count = self.check(path, generation, size=size, least=least)
        self.detach(volume)
        return count

    def check_snapshot(self, snapshot: str, generation: int) -> int:
        """Restore a snapshot into a volume of its own, compare that with the model, and delete it."""
        made = self.client.ec2("CreateVolume", SnapshotId=snapshot, Name="restored")["Volume"]
        self.note(made["VolumeId"])
        count = self.check_volume(made["VolumeId"], generation)
        self.client.ec2("DeleteVolume", VolumeId=made["VolumeId"])
        return count

    def check_data(self) -> None:
        """See that ``data`` is as the model says, and give it the next generation."""
        path = self.attach(self.data)
        self.count = self.check(path, self.generation, least=self.count)
        self.generation += 1
        self.write(self.data, self.generation, path=path)
        self.detach(self.data)

    # --- after a kill

    def settle(self) -> None:
        """Wait until the broker answers and nothing is under way any more."""
        deadline = time.monotonic() + PATIENCE
        while True:
            unfinished = self._unfinished()
            if not unfinished:
                return
            if time.monotonic() > deadline:
                raise Broken(f"not finished after {PATIENCE:g} s: {unfinished}")
            time.sleep(0.02)

    def wait_for_notice(self) -> None:
        """Wait until ebsd has noticed the death of a volume process: until then it calls the volume attached."""
        deadline = time.monotonic() + PATIENCE
        while True:
            attached = [v["VolumeId"] for v in self.volumes() if v["State"] == "in-use"]
            if len(attached) == len(self.processes().get(MODULES["volume"], [])):
                return
            if time.monotonic() > deadline:
                raise Broken(f"{attached} in use, after {PATIENCE:g} s, without a process")
            time.sleep(0.01)

    def _unfinished(self) -> list[str]:
        try:
            status = self.client.control("GetStatus")["KeyService"]
            if status["State"] != "running":
                return ["the broker"]
            states = [(v["VolumeId"], v["State"]) for v in self.volumes()]
            states += [(s["SnapshotId"], s["State"]) for s in self.snapshots()]
            jobs = [(j["JobId"], j["State"]) for j in self.client.control("DescribeJobs")["Jobs"]]
        except EbsdError as exc:
            return [str(exc)]
        final = ("available", "in-use", "error", "completed", "failed", "cancelled")
        return [f"{ident} {state}" for ident, state in states + jobs if state not in final]

    def audit(self) -> None:
        """Compare files, processes, mounts, devices, anchors and grants with what ebsd lists; raises Broken."""
        wrong = self._wrong()
        deadline = time.monotonic() + 3
        while wrong and time.monotonic() < deadline:  # a process that was killed a moment ago
            time.sleep(0.05)
            wrong = self._wrong()
        if wrong:
            raise Broken("; ".join(wrong))

    def _wrong(self) -> list[str]:
        wrong: list[str] = []
        volumes, snapshots = self.volumes(), self.snapshots()
        resources = {v["VolumeId"] for v in volumes} | {s["SnapshotId"] for s in snapshots}
        lineages = {x.get("DataEncryptionKeyId") for x in (*volumes, *snapshots)}
        attached = {v["VolumeId"] for v in volumes if v["Attachments"]}
        names = [x["Name"] for x in (*volumes, *snapshots)]
        if len(names) != len(set(names)):
            wrong.append(f"names are not unique: {sorted(names)}")
        wrong += [f"{v['VolumeId']} is {v['State']}" for v in volumes if v["State"] not in ("available", "in-use")]
        wrong += [f"{s['SnapshotId']} is {s['State']}" for s in snapshots if s["State"] != "completed"]
        for name, there, wanted in (
            ("maps", _names(self.ebsd.state / "maps"), resources),
            ("records", _names(self.ebsd.state / "records"), resources),
            ("lineages", _names(self.ebsd.state / "layers"), lineages),
            ("live maps", _names(self.ebsd.runtime / "live"), attached),
            ("control sockets", _names(self.ebsd.runtime / "control"), {f"{v}.sock" for v in attached}),
            ("block files", _names(self.ebsd.runtime / "volumes"), attached),
            ("anchors", self.key_documents("anchor"), resources),
        ):
            if there != wanted:
                wrong.append(f"{name}: {sorted(there - wanted)} too many, {sorted(wanted - there)} missing")
        if len(grants := self.key_documents("grant")) != len(attached):
            wrong.append(f"{len(grants)} grants for {len(attached)} attachments")
        processes = {module: len(pids) for module, pids in self.processes().items()}
        due = {"ebsd": 1, "ebsd.kms": 1}
        if attached:
            due |= {"ebsd.volume": len(attached), "ebsd.volume.holder": len(attached)}
        if processes != due:
            wrong.append(f"processes: {processes} instead of {due}")
        wrong += self._wrong_devices(volumes)
        wrong += self._wrong_layers()
        return wrong

    def _wrong_devices(self, volumes: list[dict[str, Any]]) -> list[str]:
        wrong = []
        mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        there = {path for path in mounted if path.startswith(str(self.ebsd.root))}
        due = {a["BlockFile"] for v in volumes for a in v["Attachments"]} | {str(self.ebsd.runtime / "live")}
        if there != due:
            wrong.append(f"mounts: {sorted(there)} instead of {sorted(due)}")
        # By the name in the device: after a lazy unmount its backing file has no path any more.
        loops = {device for device, name in _loop_devices() if name.removeprefix("ebsd:") in self.seen}
        devices = {a["Device"] for v in volumes for a in v["Attachments"] if a.get("Device")}
        if loops != devices:
            wrong.append(f"loop devices: {sorted(loops)} instead of {sorted(devices)}")
        links = Path("/dev/ebsd")
        for ident in self.seen:
            if (links / ident).is_symlink() and not any(
                a["VolumeId"] == ident for v in volumes for a in v["Attachments"]
            ):
                wrong.append(f"/dev/ebsd/{ident} is left")
        return wrong

    def _wrong_layers(self) -> list[str]:
        """Compare the catalog's layers with the files: a head that is named must be there, and no other file may."""
        wrong = []
        with _copied(self.ebsd.state / "catalog.sqlite") as catalog:
            heads = catalog.execute("SELECT volume.id, lineage, head FROM volume").fetchall()
            rows = catalog.execute("SELECT lineage, number, hex(uuid), state FROM layer").fetchall()
        files: dict[tuple[str, int], str] = {}
        leaf_files: dict[tuple[str, int], str] = {}
        for lineage in (self.ebsd.state / "layers").iterdir():
            for name in lineage.iterdir():
                if name.name in ("table", "leaves"):
                    continue
                number, _, uuid = name.name.partition("-")
                if not number.isdigit():
                    wrong.append(f"{name} is left")
                    continue
                kind = leaf_files if name.suffix == ".leaves" else files
                kind[lineage.name, int(number)] = uuid.split(".")[0]
        known = {(lineage, number): uuid.lower() for lineage, number, uuid, _ in rows}
        wrong += [f"the leaf file of layer {place} is nobody's" for place in leaf_files.items() - known.items()]
        wrong += [f"layer {place} is nobody's" for place, uuid in files.items() if known.get(place) != uuid]
        wrong += [f"{v}: its head {head} has no file" for v, lineage, head in heads if (lineage, head) not in files]
        wrong += [
            f"layer {number} of {lineage} is {state}" for lineage, number, _, state in rows if state == "creating"
        ]
        return wrong

    def key_documents(self, kind: str) -> set[str]:
        """Return the ids of what the broker keeps of one kind; the documents themselves are sealed."""
        with _copied(self.ebsd.kms_state / "keys.sqlite") as keys:
            return {row[0] for row in keys.execute("SELECT id FROM documents WHERE kind=?", (kind,))}

    def has_anchor(self, resource: str) -> bool:
        try:
            self.client.call(
                str(self.ebsd.runtime / "kms.sock"), "io.ebsd.Broker.DescribeAnchor", {"ResourceId": resource}
            )
        except EbsdError as exc:
            if exc.code != "IntegrityFailure" and not exc.code.endswith(".IntegrityFailure"):
                raise
            return False
        return True

    def state_bytes(self) -> int:
        """Return the space that the state directory takes on the host."""
        total = 0
        for directory, _, names in os.walk(self.ebsd.state):
            for name in names:
                if name.endswith(("-wal", "-shm")):
                    continue  # a checkpoint comes when SQLite sees fit
                status = Path(directory, name).lstat()
                total += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
        return total

    def close(self) -> None:
        """Delete everything, and see that nothing of it is left: no files, anchors, grants, processes, mounts."""
        for volume in self.volumes():
            if volume["Attachments"]:
                self.detach(volume["VolumeId"], force=True)
            self.client.ec2("DeleteVolume", VolumeId=volume["VolumeId"])
        for snapshot in self.snapshots():
            self.client.ec2("DeleteSnapshot", SnapshotId=snapshot["SnapshotId"])
        self.audit()
        self.ebsd.stop()
        more = self.state_bytes() - self.baseline
        self.start()
        left = [ident for ident in self.seen if self.has_anchor(ident)]
        if left:
            raise Broken(f"the key service still has anchors of {left}")
        if more > SLACK:
            raise Broken(f"the empty state directory takes {more} bytes more than at the start")
        self.ebsd.close()
        if running := self.processes():
            raise Broken(f"processes are left: {running}")

    def abandon(self) -> None:
        """End an installation that a check found broken, whatever its state; nothing may stay on the host."""
        try:
            self.ebsd.close()
        except Exception:  # noqa: BLE001 - the failure that led here is the one to show
            for pids in self.processes().values():
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
                place = line.split()[4]
                if place.startswith(str(self.ebsd.root)):
                    subprocess.run(["umount", "-l", place], check=False)


def _names(directory: Path) -> set[str]:
    return set(os.listdir(directory))


def _loop_devices() -> Iterator[tuple[str, str]]:
    """Yield (device, name given at its binding) of the loop devices that are bound."""
    for bound in Path("/sys/block").glob("loop*/loop"):
        device = f"/dev/{bound.parts[3]}"
        status = bytearray(LOOP_INFO_BYTES)
        try:
            fd = os.open(device, os.O_RDONLY)
            try:
                fcntl.ioctl(fd, LOOP_GET_STATUS64, status)
            finally:
                os.close(fd)
        except OSError:
            continue  # it was released meanwhile
        yield device, status[LOOP_NAME].rstrip(b"\0").decode(errors="replace")


@contextmanager
def _copied(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a copy of a database that its owner has locked; it must not be writing to it now."""
    with tempfile.TemporaryDirectory() as directory:
        for name in (path.name, path.name + "-wal"):
            with suppress(FileNotFoundError):
                shutil.copyfile(path.with_name(name), Path(directory, name))
        with closing(sqlite3.connect(Path(directory, path.name))) as database:
            yield database


# --- operations


class Operation:
    """What is under way when the kill comes."""

    name = ""
    attachments = 0.1
    """How long it takes, in attachments of a volume."""
    rare = False
    """Killed only when there is time for many kills: another one does nearly the same."""

    def prepare(self, rig: Rig) -> None:
        """Bring about the old state."""

    def act(self, rig: Rig) -> dict[str, Any]:
        """Make the call; another thread kills meanwhile."""
        raise NotImplementedError

    def follow(self, rig: Rig) -> None:
        """Wait for what goes on after the call; only to measure how long all of it takes."""

    def judge(self, rig: Rig, outcome: Outcome) -> str:
        """Check what is there, remove it, and say whether it was ``old``, ``new`` or ``resumed``."""
        raise NotImplementedError


class Create(Operation):
    name = "create"

    def act(self, rig: Rig) -> dict[str, Any]:
        return rig.client.ec2("CreateVolume", Name="made", SizeBytes=SIZE, Encrypted=True, KmsKeyId=rig.keys[0])

    def judge(self, rig: Rig, outcome: Outcome) -> str:
        there = rig.volume("made") is not None
        if outcome.reply is not None and not there:
            raise Broken("a volume that was answered is gone")
        if not there:
            self.act(rig)
        rig.check_volume("made", None)
        rig.client.ec2("DeleteVolume", VolumeId="made")
        return "new" if there else "old"


class SnapshotDetached(Operation):
    name = "snapshot detached"

    def act(self, rig: Rig) -> dict[str, Any]:
        return rig.client.ec2("CreateSnapshot", VolumeId="data", Name="taken")

    def judge(self, rig: Rig, outcome: Outcome) -> str:
        there = rig.snapshot("taken") is not None
        if outcome.reply is not None and not there:
            raise Broken("a snapshot that was answered is gone")
        if not there:
            self.act(rig)
        taken = rig.generation
        rig.check_data()
        rig.check_snapshot("taken", taken)
        rig.client.ec2("DeleteSnapshot", SnapshotId="taken")
        return "new" if there else "old"


class SnapshotAttached(Operation):
    name = "snapshot attached"

    def __init__(self) -> None:
        self._writer: Writer | None = None
        self._before = 0

    def prepare(self, rig: Rig) -> None:
        path = rig.attach("data")
        rig.generation += 1
        rig.write(rig.data, rig.generation, path=path)
        self._writer = Writer(path, rig.count)
        self._writer.start()
        time.sleep(0.01)

    def act(self, rig: Rig) -> dict[str, Any]:
        assert self._writer is not None
        self._before = self._writer.acknowledged
        return rig.client.ec2("CreateSnapshot", VolumeId="data", Name="taken")

    def judge(self, rig: Rig, outcome: Outcome) -> str:
        writer = self._writer
        assert writer is not None
        writer.stop()
        rig.count = writer.acknowledged
        there = rig.snapshot("taken") is not None
        if outcome.reply is not None and not there:
            raise Broken("a snapshot that was answered is gone")
        volume = rig.volume("data")
        assert volume is not None
        if volume["State"] == "error":
            rig.detach("data", force=True)
        else:
            if not there:
                self.act(rig)
                self._before = writer.acknowledged
            rig.detach("data")
        taken = rig.generation
        rig.check_data()
        if rig.snapshot("taken") is not None:
            count = rig.check_snapshot("taken", taken)
            if not self._before <= count <= writer.count:
                raise Broken(f"the snapshot holds the log to {count}, not {self._before} to {writer.count}")
            rig.client.ec2("DeleteSnapshot", SnapshotId="taken")
        return "new" if there else "old"


class Restore(Operation):
    name = "restore"

    def act(self, rig: Rig) -> dict[str, Any]:
        return rig.client.ec2("CreateVolume", SnapshotId="base", Name="made")

    def judge(self, rig: Rig, outcome: Outcome) -> str:
        there = rig.volume("made") is not None
        if outcome.reply is not None and not there:
            raise Broken("a volume that was answered is gone")
        if not there:
            self.act(rig)
        rig.check_volume("made", rig.base_generation)
        rig.client.ec2("DeleteVolume", VolumeId="made")
        return "new" if there else "old"


class _Job(Operation):
    """A call that is answered early, and a job that goes on."""

    def _destination(self, rig: Rig) -> dict[str, Any] | None:
        raise NotImplementedError

    def _remove(self, rig: Rig) -> None:
        raise NotImplementedError

    def follow(self, rig: Rig) -> None:
        while any(job["State"] == "running" for job in rig.client.control("DescribeJobs")["Jobs"]):
            time.sleep(0.005)

    def judge(self, rig: Rig, outcome: Outcome) -> str:
        jobs = rig.client.control("DescribeJobs")["Jobs"]
        there = self._destination(rig)
        if there is None:
            done = [job for job in jobs if job["State"] == "completed" and job["JobId"] not in self.done]
            if done:
                raise Broken(f"{done[0]['JobId']} completed, and its destination is gone")
            self.act(rig)
            self.follow(rig)
            if self._destination(rig) is None:
                raise Broken(f"a second attempt failed: {rig.client.control('DescribeJobs')['Jobs'][-1].get('Error')}")
        self._remove(rig)
        fresh = [job for job in jobs if job["JobId"] not in self.done]
        if there is None:
            return "old"
        if [job["State"] for job in fresh] != ["completed"]:
            raise Broken(f"the destination is there, and the job is {fresh}")
        return "resumed" if rig.resumed(fresh[0]["JobId"]) else "new"

    def __init__(self) -> None:
        self.done: set[str] = set()

    def prepare(self, rig: Rig) -> None:
        self.done = {job["JobId"] for job in rig.client.control("DescribeJobs")["Jobs"]}


class Copy(_Job):
    name = "re-encrypting copy"
    attachments = 1.5

    def act(self, rig: Rig) -> dict[str, Any]:
        return rig.client.ec2(
            "CopySnapshot", SourceSnapshotId="base", Name="copied", Encrypted=True, KmsKeyId=rig.keys[1]
        )

    def _destination(self, rig: Rig) -> dict[str, Any] | None:
        return rig.snapshot("copied")

    def _remove(self, rig: Rig) -> None:
        rig.check_snapshot("copied", rig.base_generation)
        rig.client.ec2("DeleteSnapshot", SnapshotId="copied")


class RestoreAnew(_Job):
    name = "re-encrypting restore"
    attachments = 1.5
    rare = True

    def act(self, rig: Rig) -> dict[str, Any]:
        return rig.client.ec2("CreateVolume", SnapshotId="base", Name="copied", Encrypted=True, KmsKeyId=rig.keys[1])

    def _destination(self, rig: Rig) -> dict[str, Any] | None:
        return rig.volume("copied")

    def _remove(self, rig: Rig) -> None:
        rig.check_volume("copied", rig.base_generation)
        rig.client.ec2("DeleteVolume", VolumeId="copied")


class CopyShared(Operation):
    name = "copy under the same key"
    rare = True

    def act(self, rig: Rig) -> dict[str, Any]:
        return rig.client.ec2(
            "CopySnapshot", SourceSnapshotId="base", Name="copied", Encrypted=True, KmsKeyId=rig.keys[0]
        )

    def judge(self, rig: Rig, outcome: Outcome) -> str:
        there = rig.snapshot("copied") is not None
        if outcome.reply is not None and not there:
            raise Broken("a copy that was answered is gone")
        if not there:
            self.act(rig)
        rig.check_snapshot("copied", rig.base_generation)
        rig.client.ec2("DeleteSnapshot", SnapshotId="copied")
        return "new" if there else "old"


class DeleteSnapshot(Operation):
    name = "delete snapshot"

    def __init__(self) -> None:
        self._generation = 0

    def prepare(self, rig: Rig) -> None:
        self._generation = rig.generation
        rig.note(rig.client.ec2("CreateSnapshot", VolumeId="data", Name="taken")["Snapshot"]["SnapshotId"])
        rig.check_data()

    def act(self, rig: Rig) -> dict[str, Any]:
        return rig.client.ec2("DeleteSnapshot", SnapshotId="taken")

    def judge(self, rig: Rig, outcome: Outcome) -> str:
        there = rig.snapshot("taken") is not None
        if there:
            if outcome.reply is not None:
                raise Broken("a deletion that was answered has not happened")
            rig.check_snapshot("taken", self._generation)
            self.act(rig)
        rig.check_data()
        return "old" if there else "new"


class DeleteVolume(Operation):
    name = "delete volume"

    def prepare(self, rig: Rig) -> None:
        rig.note(rig.client.ec2("CreateVolume", SnapshotId="base", Name="made")["Volume"]["VolumeId"])

    def act(self, rig: Rig) -> dict[str, Any]:
        return rig.client.ec2("DeleteVolume", VolumeId="made")

    def judge(self, rig: Rig, outcome: Outcome) -> str:
        there = rig.volume("made") is not None
        if there:
            if outcome.reply is not None:
                raise Broken("a deletion that was answered has not happened")
            rig.check_volume("made", rig.base_generation)
            self.act(rig)
        return "old" if there else "new"


class ResizeDetached(Operation):
    name = "resize detached"

    def prepare(self, rig: Rig) -> None:
        rig.note(rig.client.ec2("CreateVolume", SnapshotId="base", Name="made")["Volume"]["VolumeId"])

    def act(self, rig: Rig) -> dict[str, Any]:
        return rig.client.ec2("ModifyVolume", VolumeId="made", SizeBytes=2 * SIZE)

    def judge(self, rig: Rig, outcome: Outcome) -> str:
        volume = rig.volume("made")
        if volume is None or volume["SizeBytes"] not in (SIZE, 2 * SIZE):
            raise Broken(f"the volume is {volume}")
        grown = volume["SizeBytes"] == 2 * SIZE
        if outcome.reply is not None and not grown:
            raise Broken("a growth that was answered has not happened")
        rig.check_volume("made", rig.base_generation, size=volume["SizeBytes"])
        if not grown:
            self.act(rig)
            rig.check_volume("made", rig.base_generation, size=2 * SIZE)
        rig.client.ec2("DeleteVolume", VolumeId="made")
        return "new" if grown else "old"


class ResizeAttached(ResizeDetached):
    name = "resize attached"
    attachments = 0.3

    def prepare(self, rig: Rig) -> None:
        super().prepare(rig)
        rig.attach("made")

    def judge(self, rig: Rig, outcome: Outcome) -> str:
        volume = rig.volume("made")
        assert volume is not None
        if volume["State"] == "error":
            rig.detach("made", force=True)
        else:
            if volume["SizeBytes"] == 2 * SIZE:
                self.act(rig)  # what the catalog has, the running process gets at a second attempt at the latest
                rig.check(volume["Attachments"][0]["BlockFile"], rig.base_generation, size=2 * SIZE)
            rig.detach("made")
        return super().judge(rig, outcome)


class Attach(Operation):
    name = "attach"
    attachments = 1.0
    expose_as = "file"

    def act(self, rig: Rig) -> dict[str, Any]:
        return rig.client.ec2("AttachVolume", VolumeId="data", ExposeAs=self.expose_as)

    def judge(self, rig: Rig, outcome: Outcome) -> str:
        volume = rig.volume("data")
        assert volume is not None
        there = volume["State"] != "available"
        if volume["State"] == "error":
            rig.detach("data", force=True)
        elif there:
            rig.check(volume["Attachments"][0]["Path"], rig.generation, least=rig.count)
            rig.detach("data")
        rig.check_data()
        return "new" if there else "old"


class AttachLoop(Attach):
    name = "attach loop"
    attachments = 1.3
    rare = True
    expose_as = "loop"


class Detach(Operation):
    name = "detach"
    attachments = 0.4
    expose_as = "file"

    def prepare(self, rig: Rig) -> None:
        path = rig.attach("data", self.expose_as)
        rig.generation += 1
        rig.write(rig.data, rig.generation, path=path)

    def act(self, rig: Rig) -> dict[str, Any]:
        return rig.client.ec2("DetachVolume", VolumeId="data")

    def judge(self, rig: Rig, outcome: Outcome) -> str:
        volume = rig.volume("data")
        assert volume is not None
        there = volume["State"] != "available"
        if there:
            if outcome.reply is not None:
                raise Broken("a detach that was answered has not happened")
            rig.detach("data", force=volume["State"] == "error")
        rig.check_data()
        return "old" if there else "new"


class DetachLoop(Detach):
    name = "detach loop"
    attachments = 0.7
    rare = True
    expose_as = "loop"


OPERATIONS: dict[str, type[Operation]] = {
    operation.name: operation
    for operation in (
        Create, SnapshotDetached, SnapshotAttached, Restore, Copy, RestoreAnew, CopyShared, DeleteSnapshot,
        DeleteVolume, ResizeDetached, ResizeAttached, Attach, AttachLoop, Detach, DetachLoop,
    )
}  # fmt: skip

TWICE = "ebsd twice"
"""The next ebsd is killed, too, while it recovers."""
COMBINATIONS = [(killed, name) for name in OPERATIONS for killed in ("ebsd", "broker")]
COMBINATIONS += [(TWICE, operation.name) for operation in (SnapshotAttached, Copy, DeleteSnapshot, Attach, Detach)]
COMBINATIONS += [("worker", Copy.name), ("worker", RestoreAnew.name)]
COMBINATIONS += [
    ("volume", operation.name)
    for operation in (SnapshotAttached, ResizeAttached, Attach, AttachLoop, Detach, DetachLoop)
]


# --- one kill


@dataclass
class Tally:
    """What the kills of one combination came to."""

    kills: int = 0
    old: int = 0
    new: int = 0
    resumed: int = 0
    missed: int = 0
    """Times that the process to kill was not there."""

    def add(self, result: str) -> None:
        self.kills += 1
        setattr(self, result, getattr(self, result) + 1)


def perform(rig: Rig, operation: Operation, at: Callable[[], bool] | None) -> Outcome:
    """Run the operation in a thread; ``at`` waits for its moment and kills."""
    outcome = Outcome()

    def run() -> None:
        try:
            outcome.reply = operation.act(rig)
        except EbsdError as exc:
            outcome.error = exc

    thread = threading.Thread(target=run)
    thread.start()
    if at is not None:
        at()
    thread.join(90)
    assert not thread.is_alive(), f"{operation.name} hangs"
    return outcome


def estimate(rig: Rig, operation: Operation) -> float:
    """Return about how long the operation takes here, by how long the first attachment took."""
    return operation.attachments * rig.attach_seconds


def measure(rig: Rig, operation: Operation) -> float:
    """Return the seconds that the operation takes when nobody is killed: the most of three times."""
    if operation.name not in rig.durations:
        longest = 0.0
        for _ in range(3):
            operation.prepare(rig)
            began = time.monotonic()
            outcome = perform(rig, operation, None)
            operation.follow(rig)
            longest = max(longest, time.monotonic() - began)
            if outcome.error is not None:
                raise Broken(f"{operation.name} fails without any kill: {outcome.error}")
            operation.judge(rig, outcome)
        rig.audit()
        rig.durations[operation.name] = longest
    return rig.durations[operation.name]


def moments(chance: random.Random, duration: float, count: int) -> list[float]:
    """Return when to kill, in seconds after the call: at once, a moment after the end, and everywhere between."""
    if count < 3:
        return [duration * chance.uniform(0.0, 1.1) for _ in range(count)]
    ends = max(1, count // 20)
    between = count - 2 * ends
    spread = [duration * (part + chance.random()) / between for part in range(between)]
    return [0.0] * ends + spread + [duration * 1.1] * ends


def kill_once(rig: Rig, killed: str, operation: Operation, delay: float) -> str | None:
    """Kill at one moment, start again what died, and check everything; None when there was nothing to kill."""
    if killed == "broker":
        rig.calm()
    operation.prepare(rig)
    hit = []

    def at() -> bool:
        deadline = time.monotonic() + delay
        time.sleep(delay)
        hit.append(rig.kill("ebsd" if killed == TWICE else killed, lambda: time.monotonic() < deadline + 0.5))
        return True

    rig.mark()
    outcome = perform(rig, operation, at)
    if killed == TWICE:
        rig.start_and_kill(random.Random(delay).uniform(0.3, 1.0) * rig.start_seconds)
    if killed in ("ebsd", TWICE):
        began = time.monotonic()
        rig.start()
        rig.start_seconds = time.monotonic() - began
    rig.settle()
    if killed == "volume":
        rig.wait_for_notice()
    result = operation.judge(rig, outcome)
    rig.audit()
    return result if hit[0] else None
