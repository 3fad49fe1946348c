"""A device that fails under real volume processes: errors go to whom they concern, and what was flushed is kept.

Layers and maps lie on a file system of the test's own (``flaky.c``, passed through to a directory), which fails the
calls of one volume on command; catalog and records on an ext4 of their own, which is shut down as by a device that is
gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from installation import Installation, run

CHUNK = 65536
MIB = 1 << 20
GOING_DOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32) (include/uapi/linux/ext4.h); 2: nothing is flushed before."""


class Store(Installation):
    """An ebsd whose layers, maps and catalog can be made to fail."""

    def prepare(self) -> None:
        self.binary, self.rules, self.backing = self.root / "flaky", self.root / "rules", self.root / "backing"
        self.mounted = self.root / "flaky-mount"
        flags = run("pkg-config", "--cflags", "--libs", "fuse3").stdout.split()
        run("gcc", "-O1", "-o", self.binary, Path(__file__).with_name("flaky.c"), *flags)
        image = self.root / "image"
        with image.open("wb") as file:
            file.truncate(48 * MIB)
        run("mkfs.ext4", "-q", image)
        for path in (self.state, self.backing, self.mounted, self.backing / "layers", self.backing / "maps"):
            path.mkdir(mode=0o700)
        self.server = subprocess.Popen(
            [self.binary, self.backing, self.rules, self.mounted],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until(lambda: os.path.ismount(self.mounted))
        self.mount_state()

    def mount_state(self) -> None:
        run("mount", "-o", "loop", self.root / "image", self.state)
        for name in ("layers", "maps"):
            (self.state / name).mkdir(mode=0o700, exist_ok=True)
            run("mount", "--bind", self.mounted / name, self.state / name)

    def unmount_state(self) -> None:
        for name in ("layers", "maps"):
            run("umount", "-l", self.state / name)
        run("umount", self.state)

    def take_down(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.unmount_state()
        with contextlib.suppress(subprocess.CalledProcessError):
            run("umount", "-l", self.mounted)
        self.server.wait(10)

    def kill_blindly(self) -> None:
        """As ``kill``, of an ebsd that cannot answer."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait(30)
        self.daemon = None

    def fail(self, call: str, volume: Volume, times: int = 1) -> None:
        """Let the next calls for a volume's layers fail with EIO, so many times."""
        new = self.rules.with_name("rules.new")
        new.write_text(f"{call} {volume.lineage} {errno.EIO} {times}\n")
        new.rename(self.rules)

    def hits(self) -> list[str]:
        """Return the calls that failed since the last time, each with the lineage of its volume."""
        path = self.rules.with_name("rules.hits")
        lines = path.read_text().splitlines()
        path.unlink()
        return [f"{line.split()[0]} {Path(line.split()[1]).parent.name}" for line in lines]


class Volume:
    """An attached volume and what is flushed on it."""

    def __init__(self, ebsd: Store, name: str, *flags: str) -> None:
        self.ebsd, self.name, self.flags = ebsd, name, flags
        before = set(os.listdir(ebsd.state / "layers"))
        ebsd.ok("create", name, "--size", "16M")
        (self.lineage,) = set(os.listdir(ebsd.state / "layers")) - before
        self.path = ebsd.ok("attach", name, *flags)
        self.content = os.urandom(8 * CHUNK)
        self.write(0, self.content)
        self.flush()

    def opened(self, flags: int = os.O_RDWR) -> contextlib.AbstractContextManager[int]:
        return opened(self.path, flags)

    def write(self, offset: int, data: bytes) -> None:
        with self.opened() as fd:
            assert os.pwrite(fd, data, offset) == len(data)

    def flush(self) -> None:
        with self.opened() as fd:
            os.fsync(fd)

    def flush_new(self, offset: int, data: bytes) -> None:
        with self.opened() as fd:
            os.pwrite(fd, data, offset)
            os.fsync(fd)

    def read(self, offset: int, length: int) -> bytes:
        with self.opened(os.O_RDONLY) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return os.pread(fd, length, offset)

    def show(self, member: str) -> Any:
        return self.ebsd.ctl_json("show", self.name)[member]

    def goes_on(self) -> None:
        """See that writing, flushing and reading work."""
        chunk = os.urandom(CHUNK)
        self.content = chunk + self.content[CHUNK:]
        self.write(0, chunk)
        self.flush()
        assert self.read(0, len(self.content)) == self.content


@contextlib.contextmanager
def opened(path: str | Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def ebsd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    made = Store(tmp_path_factory.mktemp("failing"))
    made.prepare()
    try:
        made.start()
        yield made
        made.ctl("detach", "--all")
        made.ctl("detach", "--all", "--force")
        made.stop()
    finally:
        made.take_down()
    assert not made.leftovers()


@pytest.fixture(scope="module")
def bystander(ebsd: Store) -> Volume:
    return Volume(ebsd, "bystander")


def test_a_failed_sync_stops_the_volume_and_no_other(ebsd: Store, bystander: Volume) -> None:
    volume = Volume(ebsd, "unlucky")
    ebsd.fail("fsync", volume)
    volume.write(4 * CHUNK, b"\1" * CHUNK)  # in place
    volume.write(20 * CHUNK, b"\2" * CHUNK)  # new
    with pytest.raises(OSError, match="Input/output error"):
        volume.flush()
    assert ebsd.hits() == [f"fsync {volume.lineage}"]
    # The device is sound again, but nobody knows what the kernel has dropped: everything is refused from here on.
    with pytest.raises(OSError, match="Input/output error"):
        volume.flush_new(0, b"\3" * CHUNK)
    until(lambda: volume.show("State") == "error")
    assert "failed to make something durable" in ebsd.ok("show", "unlucky")
    bystander.goes_on()
    ebsd.ok("detach", "unlucky")
    volume.path = ebsd.ok("attach", "unlucky")
    found = volume.read(0, len(volume.content))
    assert found[: 4 * CHUNK] == volume.content[: 4 * CHUNK]
    assert found[5 * CHUNK :] == volume.content[5 * CHUNK :]
    assert found[4 * CHUNK : 5 * CHUNK] in (volume.content[4 * CHUNK : 5 * CHUNK], b"\1" * CHUNK)
    assert volume.read(20 * CHUNK, CHUNK) == bytes(CHUNK)  # the map is that of the last completed flush
    volume.content = found
    volume.goes_on()
    ebsd.ok("detach", "unlucky")
    assert ebsd.ctl_json("verify", "unlucky")["DamagedChunks"] == 0
    ebsd.ok("check")


def test_a_detach_whose_last_flush_fails_says_so(ebsd: Store, bystander: Volume) -> None:
    volume = Volume(ebsd, "late", "--file")
    volume.write(4 * CHUNK, b"\1" * CHUNK)
    ebsd.fail("fsync", volume)
    status, error = ebsd.refused("detach", "late")
    assert (status, error["Code"]) == (1, "Ebsd.HostFailure")
    assert "Detach again" in error["Hint"]
    assert ebsd.hits() == [f"fsync {volume.lineage}"]
    until(lambda: volume.show("State") == "error")
    ebsd.ok("detach", "late")
    volume.path = ebsd.ok("attach", "late", "--file")
    assert volume.read(0, 4 * CHUNK) == volume.content[: 4 * CHUNK]
    bystander.goes_on()


def test_a_failed_write_or_read_is_that_of_its_request(ebsd: Store, bystander: Volume) -> None:
    volume = Volume(ebsd, "scratched", "--file")
    for offset in (2 * CHUNK, 30 * CHUNK):  # in place, new
        ebsd.fail("write", volume)
        with pytest.raises(OSError, match="Input/output error"):
            volume.write(offset, b"\1" * CHUNK)
    assert volume.read(30 * CHUNK, CHUNK) == bytes(CHUNK)
    assert volume.read(0, len(volume.content)) == volume.content
    ebsd.fail("read", volume)
    with pytest.raises(OSError, match="Input/output error"):
        volume.read(0, CHUNK)
    assert [hit.split()[0] for hit in ebsd.hits()] == ["write", "write", "read"]
    volume.goes_on()
    assert volume.show("State") == "in-use"
    bystander.goes_on()
    ebsd.ok("snapshot", "scratched", "--name", "after")
    ebsd.ok("detach", "scratched")
    assert ebsd.ctl_json("verify", "after")["DamagedChunks"] == 0
    volume.path = ebsd.ok("attach", "scratched", "--file")
    assert volume.read(30 * CHUNK, CHUNK) == bytes(CHUNK)
    volume.goes_on()


def test_without_the_disk_of_the_catalog_attached_volumes_go_on(ebsd: Store, bystander: Volume) -> None:
    volume, doomed = Volume(ebsd, "kept", "--file"), Volume(ebsd, "doomed", "--file")
    with opened(ebsd.state, os.O_RDONLY) as fd:
        fcntl.ioctl(fd, GOING_DOWN, struct.pack("I", 2))
    for command in (("create", "more", "--size", "16M"), ("snapshot", "kept"), ("detach", "kept")):
        _, error = ebsd.refused(*command)
        assert error["Code"] in ("Ebsd.HostFailure", "Ebsd.StoreDamaged")
        assert "catalog" in error["Message"]
    ebsd.fail("fsync", doomed)
    with pytest.raises(OSError, match="Input/output error"):
        doomed.flush_new(0, b"\1" * CHUNK)
    until(lambda: "could not be noted" in ebsd.log.read_text())
    bystander.goes_on()
    volume.goes_on()
    ebsd.kill_blindly()
    ebsd.unmount_state()
    ebsd.mount_state()
    ebsd.start()
    for each in (bystander, volume):
        each.goes_on()
        ebsd.ok("detach", each.name)
        each.path = ebsd.ok("attach", each.name, *each.flags)
        each.goes_on()
    assert doomed.show("State") == "error"
    ebsd.ok("detach", "doomed")
    assert "more" not in ebsd.ok("list")
    ebsd.ok("check")
