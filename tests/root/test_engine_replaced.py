"""Engines of attached volumes are killed under load: whoever uses the volume sees a pause, and no error.

What is written is known at every moment: nothing that was acknowledged may be gone or be older, in any sector.
``EBSD_ENGINE_KILLS`` says how many engines are killed under the load of the device (1,000 were).
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from checked_workload import Journal, Part, expect, running
from installation import Installation, _listeners_of, holder_of, installation

MIB = 1 << 20
SECTOR = 4096
SETTINGS = 'transport = "native"\nengine_deaths = 1000000'
DEPTH = 16
KILLS = int(os.environ.get("EBSD_ENGINE_KILLS", "12"))

_release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
pytestmark = pytest.mark.skipif(_release < (6, 9), reason="the kernel does not send requests again (Linux 6.9)")


@pytest.fixture(scope="module")
def ebsd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installation(tmp_path_factory.mktemp("replaced"), SETTINGS) as made:
        yield made


class Sectors(Part):
    """Writes whole sectors with their place and a number, directly, and reads them back; some are synced."""

    def __init__(self, path: Path, size: int, share: int) -> None:
        super().__init__()
        self._path, self._share = path, share
        self._mine = range(share, size // SECTOR, DEPTH)
        self.written: dict[int, int] = {}
        """Sector -> number of the last write that was acknowledged."""
        self.requests = 0
        self.longest = 0.0

    def content(self, sector: int, number: int) -> bytes:
        return struct.pack("<QQ", sector, number) * (SECTOR // 16) if number else bytes(SECTOR)

    def run(self, ending: threading.Event) -> None:
        dice = random.Random(self._share)
        buffer = mmap.mmap(-1, SECTOR)
        fd = os.open(self._path, os.O_RDWR | os.O_DIRECT)
        try:
            while not ending.is_set():
                sector = dice.choice(self._mine)
                before = self.written.get(sector, 0)
                began = time.monotonic()
                if dice.random() < 0.6:
                    buffer[:] = self.content(sector, before + 1)
                    expect(os.pwritev(fd, [buffer], sector * SECTOR) == SECTOR, "a short write")
                    self.written[sector] = before + 1
                    if dice.random() < 0.02:
                        os.fdatasync(fd)
                else:
                    self.check(fd, buffer, sector)
                self.longest = max(self.longest, time.monotonic() - began)
                self.requests += 1
        finally:
            os.close(fd)

    def check(self, fd: int, buffer: mmap.mmap, sector: int) -> None:
        expect(os.preadv(fd, [buffer], sector * SECTOR) == SECTOR, "a short read")
        wanted = self.written.get(sector, 0)
        expect(
            buffer[:] == self.content(sector, wanted), f"sector {sector} is not that of write {wanted}: {buffer[:16]!r}"
        )

    def check_all(self) -> None:
        buffer = mmap.mmap(-1, SECTOR)
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        try:
            for sector in self.written:
                self.check(fd, buffer, sector)
        finally:
            os.close(fd)


def engine_of(ebsd: Installation, name: str) -> int:
    """Return the engine of a volume that is attached; works while ebsd is down."""
    return _engine(ebsd.runtime / "control" / f"{name}.sock")


def _engine(control: Path) -> int:
    deadline = time.monotonic() + 30
    while True:
        pids = [pid for pid in _listeners_of(control) if _is_engine(pid)]
        if pids:
            (pid,) = pids
            return pid
        assert time.monotonic() < deadline, "no engine"
        time.sleep(0.01)


def _is_engine(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"ebsd.volume\0")
    except OSError:
        return False


def kill_engine(ebsd: Installation, volume: str, number: int = signal.SIGKILL) -> int:
    pid = engine_of(ebsd, volume)
    os.kill(pid, number)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return pid


def wait_for_progress(parts: list[Sectors]) -> None:
    """Wait until every one of them was answered again."""
    before = [part.requests for part in parts]
    deadline = time.monotonic() + 60
    while any(part.requests < was + 2 for part, was in zip(parts, before, strict=True)):
        assert not any(part.broken for part in parts), "a request was answered with an error, or wrongly"
        assert time.monotonic() < deadline, "requests of an engine that was killed are not answered"
        time.sleep(0.005)


@contextmanager
def attached(
    ebsd: Installation, name: str, *flags: str, size: str = "64M", key: str = "alias/aws/ebs"
) -> Iterator[tuple[str, Path]]:
    """Give id and path of a new attached volume; it is detached in order, verified and deleted at the end."""
    ebsd.ok("create", name, "--size", size, "--encrypted", "--key", key)
    path = Path(ebsd.ok("attach", name, *flags))
    ident = ebsd.ctl_json("show", name)["VolumeId"]
    yield ident, path
    assert ebsd.ctl_json("show", name)["State"] == "in-use"
    ebsd.ok("detach", name)
    assert ebsd.ctl_json("show", name)["Integrity"] == "verified"
    ebsd.ok("attach", name, "--file", "--read-only")
    ebsd.ok("detach", name)
    ebsd.ok("delete", name, "--yes")


def pauses(ebsd: Installation, volume: str) -> list[int]:
    """Return for how many ms nothing was served, of every engine that went on."""
    lines = [line for line in ebsd.log.read_text().splitlines() if volume in line and "goes on, after" in line]
    return sorted(int(line.split()[-2]) for line in lines)


def test_requests_at_depth_go_on_over_many_kills(ebsd: Installation) -> None:
    dice = random.Random(3)
    with attached(ebsd, "depth") as (ident, device):
        parts = [Sectors(device, 64 * MIB, share) for share in range(DEPTH)]
        with running(parts):
            for turn in range(KILLS):
                time.sleep(dice.uniform(0.0, 0.3))
                kill_engine(ebsd, ident, dice.choice([signal.SIGKILL, signal.SIGSEGV]))
                if turn % 3:  # otherwise the next one is killed while it begins
                    wait_for_progress(parts)
            wait_for_progress(parts)
        for part in parts:
            part.check_all()
        found = pauses(ebsd, ident)
        requests = sum(part.requests for part in parts)
        print(
            f"\n{KILLS} kills under {requests} requests at depth {DEPTH}: paused for {found[0]} to {found[-1]} ms, "
            f"median {found[len(found) // 2]}; the slowest request took {max(part.longest for part in parts):.2f} s"
        )


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_file_system_goes_on(ebsd: Installation, tmp_path: Path, kind: str) -> None:
    mount = tmp_path / "mnt"
    size = {"ext4": "128M", "xfs": "512M", "btrfs": "256M"}[kind]
    with attached(ebsd, kind, "--mkfs", kind, "--mount", str(mount), size=size) as (ident, _):
        journal = Journal(mount)
        with running([journal]):
            for _ in range(3):
                time.sleep(0.2)
                kill_engine(ebsd, ident)
                before = journal.promised
                deadline = time.monotonic() + 60
                while journal.promised < before + 3:
                    assert not journal.broken
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
        promised = journal.promised
        assert Journal.count(mount) >= promised
        ebsd.ok("detach", kind)
        ebsd.ok("attach", kind, "--mount", str(mount))
        assert Journal.count(mount) >= promised
        with (mount / "last").open("w") as last:  # it is not read-only
            last.write("as if nothing had been")


def test_nobody_else_is_needed(ebsd: Installation) -> None:
    """Not ebsd, not the key service, and not the key: who took the volume's key may be asked for it no more."""
    key = ebsd.ctl_json("key", "create")["Arn"]
    with attached(ebsd, "alone", key=key) as (ident, device):
        parts = [Sectors(device, 64 * MIB, share) for share in range(4)]
        ebsd.ok("key", "disable", key)
        (broker,) = ebsd.processes()["broker"]
        with running(parts):
            ebsd.kill()
            os.kill(broker, signal.SIGKILL)
            kill_engine(ebsd, ident)
            wait_for_progress(parts)
            kill_engine(ebsd, ident)
            ebsd.start()  # which looks for it while it is not there
            wait_for_progress(parts)
            kill_engine(ebsd, ident)
            wait_for_progress(parts)
        assert ebsd.ctl_json("show", "alone")["State"] == "in-use"
        ebsd.ok("key", "enable", key)
        for part in parts:
            part.check_all()


def settled(ebsd: Installation, volume: str) -> list[dict[str, str]]:
    deadline = time.monotonic() + 30
    while True:
        found = [s for s in ebsd.ctl_json("list", "snapshots")["Snapshots"] if s["VolumeId"] == volume]
        if all(s["State"] == "completed" for s in found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_a_snapshot_is_taken_whenever_an_engine_dies(ebsd: Installation) -> None:
    dice = random.Random(5)
    with attached(ebsd, "snapped", size="32M") as (ident, device):
        parts = [Sectors(device, 32 * MIB, share) for share in range(4)]
        outcomes = []
        with running(parts):
            for turn in range(6):
                taking = threading.Thread(
                    target=lambda turn=turn: outcomes.append(
                        ebsd.ctl("snapshot", "snapped", "--name", f"s{turn}").status
                    )
                )
                taking.start()
                time.sleep(dice.uniform(0.1, 0.4))
                kill_engine(ebsd, ident)
                taking.join(60)
                assert not taking.is_alive()
                wait_for_progress(parts)
                settled(ebsd, ident)
            there = {s["Name"] for s in settled(ebsd, ident)}
            assert outcomes == [0] * 6
            assert there == {f"s{turn}" for turn in range(6)}
            ebsd.ok("snapshot", "snapped", "--name", "last")
        for part in parts:
            part.check_all()
        for name in (*there, "last"):
            ebsd.ok("verify", name)
            ebsd.ok("delete", name, "--yes")


class Pairs(Part):
    """Writes a number into two sectors, one after the other: they are equal, or the first is one ahead."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.requests = 0

    def run(self, ending: threading.Event) -> None:
        buffer = mmap.mmap(-1, SECTOR)
        fd = os.open(self._path, os.O_RDWR | os.O_DIRECT)
        try:
            while not ending.is_set():
                buffer[:] = struct.pack("<Q", self.requests + 1) * (SECTOR // 8)
                for at in (0, 8 * MIB):
                    expect(os.pwritev(fd, [buffer], at) == SECTOR, "a short write")
                self.requests += 1
        finally:
            os.close(fd)


def test_a_snapshot_whose_engine_dies_in_the_seal_is_taken_by_the_next(ebsd: Installation) -> None:
    """The call does not fail, and what it leaves is one moment within it."""
    cut = turn = 0
    maps = ebsd.state / "maps"
    with attached(ebsd, "cut", size="32M") as (ident, device):
        pairs = Pairs(device)
        with running([pairs]), ThreadPoolExecutor(1) as pool:
            while cut < 3:
                turn += 1
                assert turn < 30, "no seal was cut"
                wait_for_progress([pairs])
                acknowledged, before, pid = pairs.requests, set(os.listdir(maps)), engine_of(ebsd, ident)
                call = pool.submit(ebsd.ctl, "--json", "snapshot", "cut", "--name", f"cut{turn}")
                while not set(os.listdir(maps)) - before and not call.done():
                    pass  # its map comes into being just before the seal is asked for
                os.kill(pid, signal.SIGKILL)
                outcome = call.result(60)
                assert outcome.status == 0, outcome.stderr
                cut += ebsd.log.read_text().count("; the snapshot is ") - cut
                ebsd.ok("create", f"restored{turn}", "--from", f"cut{turn}")
                with open(ebsd.ok("attach", f"restored{turn}", "--file", "--read-only"), "rb", buffering=0) as file:
                    first = struct.unpack("<Q", file.read(8))[0]
                    file.seek(8 * MIB)
                    second = struct.unpack("<Q", file.read(8))[0]
                assert acknowledged <= second <= first <= second + 1
                assert first <= pairs.requests + 1
                ebsd.ok("detach", f"restored{turn}")
                ebsd.ok("delete", f"restored{turn}", "--yes")
        names = [s["Name"] for s in settled(ebsd, ident)]
        assert sorted(names) == sorted(f"cut{each}" for each in range(1, turn + 1)), "each once"
        for name in names:
            ebsd.ok("verify", name)
            ebsd.ok("delete", name, "--yes")


def test_a_growth_is_made(ebsd: Installation) -> None:
    dice = random.Random(7)
    with attached(ebsd, "grown", size="32M") as (ident, device):
        parts = [Sectors(device, 32 * MIB, share) for share in range(4)]
        size = 32
        with running(parts):
            for _ in range(5):
                size += 16
                growing = threading.Thread(target=lambda size=size: ebsd.ctl("resize", "grown", f"{size}M"))
                growing.start()
                time.sleep(dice.uniform(0.05, 0.3))
                kill_engine(ebsd, ident)
                growing.join(60)
                assert not growing.is_alive()
                wait_for_progress(parts)
                if ebsd.ctl_json("show", "grown")["SizeBytes"] == size * MIB:
                    kill_engine(ebsd, ident)  # with the new size
                    wait_for_progress(parts)
            ebsd.ok("resize", "grown", f"{size + 16}M")
        for part in parts:
            part.check_all()
        fd = os.open(device, os.O_RDWR)
        assert os.lseek(fd, 0, os.SEEK_END) == (size + 16) * MIB
        assert os.pwrite(fd, b"the end", (size + 16) * MIB - 7) == 7
        os.fsync(fd)
        os.close(fd)


def test_an_engine_is_restarted_on_request(ebsd: Installation) -> None:
    with attached(ebsd, "upgraded") as (ident, device):
        parts = [Sectors(device, 64 * MIB, share) for share in range(4)]
        with running(parts):
            before = engine_of(ebsd, ident)
            holder = holder_of(before)
            answer = ebsd.ctl_json("restart-engine", "upgraded")
            after = engine_of(ebsd, ident)
            assert after != before
            assert holder_of(after) == holder
            assert answer["VolumeId"] == ident
            wait_for_progress(parts)
            restarted = ebsd.ctl_json("restart-engine", "--all")["Volumes"]
            assert ident in {volume["VolumeId"] for volume in restarted}
            wait_for_progress(parts)
        for part in parts:
            part.check_all()
        print(f"\nrestarted: paused for {pauses(ebsd, ident)} ms")
    status, error = ebsd.refused("restart-engine", "upgraded")
    assert (status, error["Code"]) == (3, "InvalidVolume.NotFound")


def test_the_death_of_the_holder_is_the_end_of_both(ebsd: Installation) -> None:
    ebsd.ok("create", "held", "--size", "16M")
    path = ebsd.ok("attach", "held", "--file")
    ident = ebsd.ctl_json("show", "held")["VolumeId"]
    with open(path, "r+b", buffering=0) as file:
        file.write(b"acknowledged")
    engine = engine_of(ebsd, ident)
    os.kill(holder_of(engine), signal.SIGKILL)
    wait_for_state(ebsd, "held", "error")
    assert not _is_engine(engine)
    with pytest.raises(OSError):
        Path(path).read_bytes()
    ebsd.ok("detach", "held")
    with open(ebsd.ok("attach", "held", "--file"), "rb") as file:
        assert file.read(12) == b"acknowledged"
    ebsd.ok("detach", "held")
    ebsd.ok("delete", "held", "--yes")


def wait_for_state(ebsd: Installation, name: str, state: str) -> None:
    deadline = time.monotonic() + 30
    while ebsd.ctl_json("show", name)["State"] != state:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def in_error(ebsd: Installation, name: str, spoil: Callable[[str], None]) -> str:
    """Attach a volume, have something happen to it after which it must not go on, and return why it does not."""
    ebsd.ok("create", name, "--size", "16M")
    path = ebsd.ok("attach", name, "--file")
    with open(path, "r+b", buffering=0) as file:
        file.write(b"x" * SECTOR)
        os.fsync(file)
    spoil(ebsd.ctl_json("show", name)["VolumeId"])
    wait_for_state(ebsd, name, "error")
    with pytest.raises(OSError):
        Path(path).read_bytes()
    reason = str(ebsd.ctl_json("show", name).get("StateReason"))
    ebsd.ok("detach", name)
    with open(ebsd.ok("attach", name, "--file"), "rb") as file:
        assert file.read(SECTOR) == b"x" * SECTOR
    ebsd.ok("detach", name)
    ebsd.ok("delete", name, "--yes")
    return reason


def test_an_engine_that_has_failed_is_not_replaced(ebsd: Installation) -> None:
    def fail(ident: str) -> None:
        fd = os.open(ebsd.runtime / "live" / ident, os.O_RDWR)
        os.pwrite(fd, b"\1\0\0\0", 128)
        os.close(fd)
        kill_engine(ebsd, ident)

    in_error(ebsd, "failed", fail)
    assert "it gets no successor" in ebsd.log.read_text()


def test_a_volume_whose_engines_keep_dying_is_given_up(tmp_path: Path) -> None:
    with installation(tmp_path, 'transport = "native"\nengine_deaths = 2') as ebsd:

        def keep_killing(ident: str) -> None:
            for _ in range(3):
                kill_engine(ebsd, ident)

        in_error(ebsd, "poisoned", keep_killing)
        assert "one death too many" in ebsd.log.read_text()


def test_what_a_dead_engine_was_hashing_is_removed_at_the_take_over(ebsd: Installation) -> None:
    """And nothing that a living process writes: others work in the directory of a lineage, too."""
    with attached(ebsd, "hashed", size="16M") as (ident, device):
        lineage = ebsd.state / "layers" / ebsd.ctl_json("show", "hashed")["DataEncryptionKeyId"]
        dead = engine_of(ebsd, ident)
        names = {pid: lineage / f".0000000001-{'ab' * 16}.leaves.{pid}.tmp" for pid in (dead, os.getpid())}
        for path in names.values():
            path.write_bytes(b"half")
        kill_engine(ebsd, ident)
        deadline = time.monotonic() + 30
        while names[dead].exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert names[os.getpid()].read_bytes() == b"half"
        names[os.getpid()].unlink()
        with open(device, "r+b", buffering=0) as file:
            file.write(b"z" * SECTOR)


@pytest.mark.slow
def test_a_successor_that_hangs_in_its_set_up_is_replaced(ebsd: Installation) -> None:
    with attached(ebsd, "hung", size="16M") as (ident, device):
        with open(device, "r+b", buffering=0) as file:
            file.write(b"y" * SECTOR)
        holder = holder_of(engine_of(ebsd, ident))
        hung = None
        while hung is None:  # until one was stopped in time
            served = ebsd.log.read_text().count("goes on, after")
            os.kill(engine_of(ebsd, ident), signal.SIGKILL)
            children = Path(f"/proc/{holder}/task/{holder}/children")
            while not (found := [int(pid) for pid in children.read_text().split() if _is_engine(int(pid))]):
                pass
            os.kill(found[0], signal.SIGSTOP)
            time.sleep(0.5)
            hung = found[0] if ebsd.log.read_text().count("goes on, after") == served else None
            if hung is None:
                os.kill(found[0], signal.SIGCONT)
        reading = threading.Thread(target=lambda: os.close(os.open(device, os.O_RDONLY)))
        reading.start()
        deadline = time.monotonic() + 150
        while Path(f"/proc/{hung}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        reading.join(30)
        assert "does not come to serve; ending it" in ebsd.log.read_text()
        with open(device, "rb", buffering=0) as file:
            assert file.read(SECTOR) == b"y" * SECTOR
        ebsd.ok("snapshot", "hung")
