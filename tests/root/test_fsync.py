"""FSYNC: whatever asks a volume to be durable reaches the disk, each time, and the device offers nothing else.

Seen with strace on the volume process: a flush that the kernel swallowed, as it does for ever once a FUSE server
answered ENOSYS, leaves no trace there.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import stat
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from installation import Installation, installation

CHUNK = 65536
TIB = 1 << 40
TIMES = 3
BLKFLSBUF = 0x1261

_CALL = re.compile(r"\b(fdatasync|fsync)\(\d+<(?P<path>[^>]*)>\)\s+= 0")


@dataclass
class Trace:
    """The files that a process made durable, in order, until now."""

    log: Path
    pid: int
    _seen: int = field(default=0)

    def since(self) -> list[str]:
        """Return the files synced since the last call, by the last part of their names."""
        lines = self.log.read_text().splitlines()
        fresh, self._seen = lines[self._seen :], len(lines)
        calls = [match["path"].rsplit("/", 2)[-2:] for line in fresh if (match := _CALL.search(line))]
        return ["map" if parent == "maps" else name[-4:] for parent, name in calls]

    def expect(self, wanted: set[str], seconds: float = 2) -> list[str]:
        """Return what was synced since the last call; strace may write it a moment later."""
        found = self.since()
        deadline = time.monotonic() + seconds
        while not wanted <= set(found) and time.monotonic() < deadline:
            time.sleep(0.02)
            found += self.since()
        return found


@contextmanager
def traced(pid: int, log: Path) -> Iterator[Trace]:
    """Trace the syncs of a process and all its threads."""
    command = ["strace", "-f", "-y", "-s", "0", "-e", "trace=fdatasync,fsync", "-o", log, "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        try:
            assert strace.stderr is not None
            line = strace.stderr.readline()
            assert "attached" in line, line
            yield Trace(log, pid)
        finally:
            strace.send_signal(signal.SIGINT)
            strace.communicate(timeout=10)


@dataclass
class Device:
    ebsd: Installation
    volume: str
    path: str
    block_file: str
    pid: int
    fresh: int = 100
    """Chunks from here on have never been written."""

    def fresh_chunk(self) -> int:
        """Return the offset of a chunk that no map has yet."""
        self.fresh += 1
        return self.fresh * CHUNK

    def sysfs(self, name: str) -> str:
        return Path("/sys/block", Path(self.path).name, name).read_text().strip()


def attached(ebsd: Installation, size: int, *options: str) -> Device:
    volume = ebsd.ok("create", f"f{size}{len(options)}", "--size", str(size), "--encrypted")
    (attachment,) = ebsd.ctl_json("attach", volume, *options)["Attachments"]
    (pid,) = (p for p in ebsd.processes()["volumes"] if volume.encode() in b"".join(open_files(p)))
    return Device(ebsd, volume, attachment["Path"], attachment["BlockFile"], pid)


def open_files(pid: int) -> Iterator[bytes]:
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            yield os.fsencode(os.readlink(descriptor))
        except OSError:
            continue


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installation(tmp_path_factory.mktemp("fsync")) as ebsd:
        yield ebsd


@pytest.fixture(scope="module")
def loop(running: Installation) -> Device:
    """A loop device of two segments."""
    return attached(running, TIB + (64 << 20))


@pytest.fixture(scope="module")
def block_file(running: Installation) -> Device:
    """A block file without a loop device."""
    return attached(running, 64 << 20, "--file")


@pytest.fixture
def trace(loop: Device, tmp_path: Path) -> Iterator[Trace]:
    with traced(loop.pid, tmp_path / "strace") as running:
        settle(running, loop.block_file)
        yield running


def settle(trace: Trace, path: str) -> None:
    """Flush what earlier tests left, so that the process's own flushes, every few seconds, find nothing to do."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    time.sleep(0.1)
    trace.since()


def write_and(path: str, offset: int, flush: str, *, flags: int = 0) -> None:
    """Write a chunk through a path and flush in the named way."""
    fd = os.open(path, os.O_RDWR | flags)
    try:
        os.pwrite(fd, os.urandom(CHUNK), offset)
        if flush == "fsync":
            os.fsync(fd)
        elif flush == "fdatasync":
            os.fdatasync(fd)
    finally:
        os.close(fd)


# --- block file ----------------------------------------------------------------------------------------------


def test_fsync_of_the_block_file_makes_segment_and_changed_map_durable(block_file: Device, tmp_path: Path) -> None:
    with traced(block_file.pid, tmp_path / "strace") as trace:
        for _ in range(TIMES):
            settle(trace, block_file.path)
            dd = ["dd", "if=/dev/urandom", f"of={block_file.path}", "bs=64K", "count=1", "conv=fsync,notrunc"]
            offset = block_file.fresh_chunk() // CHUNK
            subprocess.run([*dd, f"seek={offset}"], check=True, capture_output=True)
            found = trace.since()
            assert found[:2] == [".000", "map"], "data first, then the map that names it"
            # The same chunk again: its place is known, so only the data is new.
            subprocess.run([*dd, f"seek={offset}"], check=True, capture_output=True)
            assert trace.since() == [".000"]


@pytest.mark.parametrize("how", ["fsync", "fdatasync"])
def test_each_fsync_on_a_block_file_is_heard(block_file: Device, tmp_path: Path, how: str) -> None:
    with traced(block_file.pid, tmp_path / "strace") as trace:
        settle(trace, block_file.path)
        for _ in range(TIMES):
            write_and(block_file.path, block_file.fresh_chunk(), how)
            assert trace.since()[:2] == [".000", "map"]


def test_a_write_with_o_dsync_is_durable_when_it_returns(block_file: Device, tmp_path: Path) -> None:
    with traced(block_file.pid, tmp_path / "strace") as trace:
        settle(trace, block_file.path)
        for _ in range(TIMES):
            write_and(block_file.path, block_file.fresh_chunk(), "nothing", flags=os.O_DSYNC)
            assert trace.since()[:2] == [".000", "map"]


def test_a_write_alone_makes_nothing_durable(block_file: Device, tmp_path: Path) -> None:
    """A control: without it the tests above could be seeing somebody else's flush."""
    with traced(block_file.pid, tmp_path / "strace") as trace:
        settle(trace, block_file.path)
        write_and(block_file.path, block_file.fresh_chunk(), "nothing")
        time.sleep(0.3)
        assert trace.since() == []


# --- loop device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fsync", "fdatasync"])
def test_a_flush_of_the_device_reaches_segment_and_map(loop: Device, trace: Trace, how: str) -> None:
    for _ in range(TIMES):
        write_and(loop.path, loop.fresh_chunk(), how)
        found = trace.expect({".000", "map"})
        assert found.index(".000") < found.index("map")


def test_flushbufs_hands_over_what_the_device_cached_and_the_next_fsync_makes_it_durable(
    loop: Device, trace: Trace
) -> None:
    """BLKFLSBUF itself asks no disk for a flush (block/ioctl.c): it empties the cache of the device, no more."""
    for turn in range(TIMES):
        offset, data = loop.fresh_chunk(), os.urandom(CHUNK)
        fd = os.open(loop.path, os.O_RDWR)
        try:
            os.pwrite(fd, data, offset)
            if turn:
                fcntl.ioctl(fd, BLKFLSBUF, 0)
            else:
                subprocess.run(["blockdev", "--flushbufs", loop.path], check=True)
            with open(loop.block_file, "rb", buffering=0) as below:
                assert os.pread(below.fileno(), CHUNK, offset) == data
            assert trace.since() == []
            os.fsync(fd)
        finally:
            os.close(fd)
        assert trace.expect({".000", "map"})[:2] == [".000", "map"]


def test_each_segment_that_was_written_is_made_durable(loop: Device, trace: Trace) -> None:
    for _ in range(TIMES):
        fd = os.open(loop.path, os.O_RDWR)
        try:
            for start in (0, TIB):
                os.pwrite(fd, os.urandom(CHUNK), start + loop.fresh_chunk())
            os.fsync(fd)
        finally:
            os.close(fd)
        found = trace.expect({".000", ".001", "map"})
        assert set(found[:2]) == {".000", ".001"}
        assert found[2] == "map"


# --- file systems --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mounted(running: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Device, Path]]:
    mount = tmp_path_factory.mktemp("mnt")
    device = attached(running, 256 << 20, "--mkfs", "ext4", "--mount", str(mount))
    yield device, mount
    running.ok("detach", device.volume)


@pytest.mark.parametrize("how", ["fsync", "sync", "syncfs"])
def test_a_flush_of_a_mounted_file_system_reaches_segment_and_map(
    mounted: tuple[Device, Path], tmp_path: Path, how: str
) -> None:
    device, mount = mounted
    with traced(device.pid, tmp_path / "strace") as trace:
        settle(trace, device.block_file)
        for turn in range(TIMES):
            # Larger than what a chunk holds, so that some chunk is new to the map each time.
            with open(mount / f"{how}-{turn}", "wb", buffering=0) as file:
                file.write(os.urandom(4 * CHUNK))
                if how == "fsync":
                    os.fsync(file.fileno())
                else:
                    subprocess.run(["sync", "-f", mount] if how == "syncfs" else ["sync"], check=True)
            found = trace.expect({".000", "map"})
            assert {".000", "map"} <= set(found)


# --- what the device is --------------------------------------------------------------------------------------


def test_the_device_discards_whole_chunks(loop: Device) -> None:
    assert int(loop.sysfs("queue/discard_max_bytes")) >= 1 << 30
    assert loop.sysfs("queue/discard_granularity") == str(CHUNK)


def test_the_device_reads_half_a_mebibyte_ahead(loop: Device) -> None:
    assert loop.sysfs("queue/read_ahead_kb") == "512"


def test_the_device_has_blocks_of_4096_bytes(loop: Device) -> None:
    assert loop.sysfs("queue/logical_block_size") == "4096"
    assert loop.sysfs("queue/physical_block_size") == "4096"
    fd = os.open(loop.path, os.O_RDONLY | os.O_DIRECT)
    try:
        with pytest.raises(OSError, match="Invalid argument"):
            os.pread(fd, 512, 0)
    finally:
        os.close(fd)


def test_only_root_can_open_the_device(loop: Device) -> None:
    node = os.stat(loop.path)
    assert stat.S_ISBLK(node.st_mode)
    assert stat.S_IMODE(node.st_mode) == 0o600
    assert (node.st_uid, node.st_gid) == (0, 0)
    done = subprocess.run(["setpriv", "--reuid=65534", "--clear-groups", "head", "-c1", loop.path], capture_output=True)
    assert b"Permission denied" in done.stderr


def test_the_device_reads_no_partition_table(loop: Device) -> None:
    assert loop.sysfs("loop/partscan") == "0"
    # A DOS label with one partition, Linux, from block 16 on, 1024 blocks long.
    entry = bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + struct.pack("<II", 16, 1024)
    with open(loop.path, "r+b", buffering=0) as file:
        file.write((bytes(446) + entry + bytes(48) + b"\x55\xaa").ljust(4096, b"\0"))
        os.fsync(file.fileno())
    subprocess.run(["blockdev", "--rereadpt", loop.path], capture_output=True)
    assert not list(Path("/sys/block", Path(loop.path).name).glob(f"{Path(loop.path).name}p*"))


def test_the_device_bypasses_the_cache_of_the_block_file(loop: Device) -> None:
    assert loop.sysfs("loop/dio") == "1"
    assert loop.sysfs("loop/autoclear") == "0"


def test_the_device_takes_flushes(loop: Device) -> None:
    assert loop.sysfs("queue/write_cache") == "write back"
