"""What a block file promises its users, whichever transport and engine serve it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from block_server import ENGINES, UID, Options, Served, served

from ebsd.domain.units import CHUNK, MIB, SECTOR

SIZE = 64 * MIB + 12 * SECTOR
"""Not a whole number of chunks: the last one is cut."""

PUNCH, ZERO, KEEP = 0x02, 0x10, 0x01
"""FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, FALLOC_FL_KEEP_SIZE."""

RWF_DSYNC = 0x00000002
MS_REMOUNT = 32

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]

BOTH = [(transport, engine) for transport in ("native", "pyfuse3") for engine in ENGINES]
NATIVE = [pair for pair in BOTH if pair[0] == "native"]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def expect_errno(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno == number


@pytest.fixture(scope="module", params=BOTH, ids=lambda pair: "-".join(pair))
def block(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One served volume for all tests of a pair that leave it usable."""
    transport, engine = request.param
    directory = tmp_path_factory.mktemp("block")
    with served(Options(str(directory), SIZE, transport, engine)) as made:
        yield made


@pytest.fixture
def fd(block: Served) -> Iterator[int]:
    opened = os.open(block.path, os.O_RDWR)
    try:
        yield opened
    finally:
        os.close(opened)


@pytest.fixture(params=BOTH, ids=lambda pair: "-".join(pair))
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """A volume for a test that breaks it."""
    transport, engine = request.param
    with served(Options(str(tmp_path), SIZE, transport, engine)) as made:
        yield made


def is_native(block: Served) -> bool:
    return block.options.transport == "native"


# --- reads and writes --------------------------------------------------------------------------------------------


def test_what_was_written_is_read_at_any_alignment(fd: int) -> None:
    dice = random.Random(1)
    content = bytearray(4 * CHUNK)
    base = 8 * MIB
    os.pwrite(fd, content, base)
    for _ in range(200):
        offset = dice.randrange(len(content))
        length = min(
            dice.choice([1, 511, 512, SECTOR - 1, SECTOR, SECTOR + 1, CHUNK, CHUNK + 7]), len(content) - offset
        )
        if dice.random() < 0.5:
            offset = offset // SECTOR * SECTOR
        if dice.random() < 0.6:
            data = dice.randbytes(length)
            assert os.pwrite(fd, data, base + offset) == length
            content[offset : offset + length] = data
        assert os.pread(fd, length, base + offset) == content[offset : offset + length]
    assert os.pread(fd, len(content), base) == content


def test_a_hole_reads_as_zeros(fd: int) -> None:
    assert os.pread(fd, CHUNK, 32 * MIB) == bytes(CHUNK)


def test_the_largest_requests_arrive_whole(fd: int) -> None:
    data = os.urandom(5 * MIB + SECTOR)  # several requests of the kernel's largest
    assert os.pwrite(fd, data, 3 * SECTOR) == len(data)
    assert os.pread(fd, len(data), 3 * SECTOR) == data


def areas_with(pid: int, flags: set[str]) -> list[range]:
    """Return the memory of a process that the kernel shows with all of these flags (proc(5), VmFlags)."""
    found, area = [], range(0)
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if name == "VmFlags:":
            if flags <= set(rest.split()):
                found.append(area)
        elif not name.endswith(":"):
            area = range(*(int(part, 16) for part in name.split("-")))
    return found


def test_requests_lie_in_locked_huge_pages_that_no_dump_has(tmp_path: Path) -> None:
    flags = {"lo", "dd"} | ({"hg"} if Path("/sys/kernel/mm/transparent_hugepage").exists() else set())
    with served(Options(str(tmp_path), SIZE, "native", "native")) as block:
        assert block.path.read_bytes()[:SECTOR] == bytes(SECTOR)  # all threads have theirs before one answers
        # Whole ones: a huge page needs an area with all of it. Two threads at least.
        whole = [area.stop // (2 * MIB) - -(-area.start // (2 * MIB)) for area in areas_with(block.process.pid, flags)]
        assert sum(max(0, pages) for pages in whole) >= 2


def test_a_read_right_after_a_write_of_the_same_thread_has_nothing_of_it(fd: int) -> None:
    # Both lie in the same memory, one after the other; a thread takes either as it comes.
    os.pwrite(fd, b"r" * MIB, 16 * MIB)
    for size in (SECTOR, CHUNK, MIB - SECTOR, MIB):
        for _ in range(8):
            os.pwrite(fd, b"w" * MIB, 20 * MIB)
            assert os.pread(fd, size, 16 * MIB) == b"r" * size


def test_reads_end_at_the_end(fd: int) -> None:
    os.pwrite(fd, b"z" * SECTOR, SIZE - SECTOR)
    assert os.pread(fd, 2 * SECTOR, SIZE - SECTOR) == b"z" * SECTOR
    assert os.pread(fd, 10, SIZE - 3) == b"zzz"
    assert os.pread(fd, SECTOR, SIZE) == b""
    assert os.pread(fd, SECTOR, SIZE + MIB) == b""


def test_writes_do_not_pass_the_end(fd: int) -> None:
    os.pwrite(fd, b"a" * SECTOR, SIZE - SECTOR)
    expect_errno(errno.EFBIG, lambda: os.pwrite(fd, b"b" * (2 * SECTOR), SIZE - SECTOR))
    expect_errno(errno.EFBIG, lambda: os.pwrite(fd, b"b", SIZE))
    assert os.pread(fd, SECTOR, SIZE - SECTOR) == b"a" * SECTOR
    assert os.fstat(fd).st_size == SIZE


def test_64_requests_at_once(block: Served) -> None:
    dice = random.Random(2)
    blocks = {index: dice.randbytes(SECTOR) for index in range(64)}
    barrier = threading.Barrier(64)

    def work(index: int) -> None:
        own = os.open(block.path, os.O_RDWR)
        try:
            barrier.wait(30)
            for turn in range(4):
                at = 16 * MIB + (index * 4 + turn) * 3 * SECTOR
                assert os.pwrite(own, blocks[index], at) == SECTOR
                assert os.pread(own, SECTOR, at) == blocks[index]
                if index % 16 == 0:
                    os.fsync(own)
        finally:
            os.close(own)

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(work, range(64)))
    with open(block.path, "rb", buffering=0) as file:
        for index, data in blocks.items():
            for turn in range(4):
                assert os.pread(file.fileno(), SECTOR, 16 * MIB + (index * 4 + turn) * 3 * SECTOR) == data


# --- durability --------------------------------------------------------------------------------------------------


def syncs(block: Served) -> int:
    counted = block.directory / "syncs"
    return counted.stat().st_size if counted.exists() else 0


@pytest.mark.parametrize("how", [os.fsync, os.fdatasync])
def test_each_sync_reaches_the_engine(block: Served, fd: int, how: Callable[[int], None]) -> None:
    for _ in range(3):
        os.pwrite(fd, os.urandom(SECTOR), 0)
        before = syncs(block)
        how(fd)
        assert syncs(block) > before


def test_a_write_alone_syncs_nothing(block: Served, fd: int) -> None:
    os.fsync(fd)
    before = syncs(block)
    os.pwrite(fd, os.urandom(SECTOR), 0)
    os.close(os.open(block.path, os.O_RDWR))  # nor does close(2)
    assert syncs(block) == before


@pytest.mark.parametrize("flag", [os.O_DSYNC, os.O_SYNC])
def test_a_write_of_a_synchronous_handle_is_durable(block: Served, flag: int) -> None:
    own = os.open(block.path, os.O_RDWR | flag)
    try:
        for _ in range(3):
            before = syncs(block)
            os.pwrite(own, os.urandom(SECTOR), 0)
            assert syncs(block) > before
    finally:
        os.close(own)


def test_a_single_synchronous_write_is_durable(block: Served, fd: int) -> None:
    if not is_native(block):
        pytest.skip("pyfuse3 is not told of it")
    for _ in range(3):
        before = syncs(block)
        os.pwritev(fd, [os.urandom(SECTOR)], 0, RWF_DSYNC)
        assert syncs(block) > before


def test_a_failed_sync_is_told_to_everybody(fresh: Served) -> None:
    own = os.open(fresh.path, os.O_RDWR)
    try:
        os.pwrite(own, os.urandom(SECTOR), 0)
        (fresh.directory / "fail-sync").touch()
        expect_errno(errno.EIO, lambda: os.fsync(own))
        (fresh.directory / "fail-sync").unlink()
        expect_errno(errno.EIO, lambda: os.fsync(own))
        expect_errno(errno.EIO, lambda: os.pread(own, SECTOR, 0))
        expect_errno(errno.EIO, lambda: os.pwrite(own, bytes(SECTOR), 0))
    finally:
        os.close(own)


def test_what_nobody_expects_is_an_error_and_an_incident(fresh: Served) -> None:
    own = os.open(fresh.path, os.O_RDWR)
    try:
        os.pwrite(own, b"secret" * 100, 0)
        (fresh.directory / "bug").touch()
        expect_errno(errno.EIO, lambda: os.pwrite(own, b"secret" * 100, MIB))
        log = fresh.log.read_text()
        assert "incident " in log
        assert "RuntimeError" in log
        assert "secret" not in log
        (fresh.directory / "bug").unlink()
        assert os.pwrite(own, b"on it goes", MIB) == 10
    finally:
        os.close(own)


# --- what the file is --------------------------------------------------------------------------------------------


def test_attributes(block: Served) -> None:
    found = os.stat(block.path)
    assert (found.st_uid, found.st_gid, found.st_mode, found.st_nlink) == (UID, UID, 0o100600, 1)
    assert (found.st_size, found.st_blocks, found.st_blksize) == (SIZE, SIZE // 512, CHUNK)


def test_the_file_system_has_blocks_of_a_chunk(block: Served) -> None:
    found = os.statvfs(block.path)
    assert (found.f_bsize, found.f_frsize, found.f_blocks, found.f_bfree) == (CHUNK, CHUNK, SIZE // CHUNK, 0)


def test_it_keeps_its_size_owner_and_mode(block: Served, fd: int) -> None:
    os.pwrite(fd, b"kept", 0)
    for size in (0, SIZE - SECTOR, SIZE + SECTOR):
        expect_errno(errno.EPERM, lambda size=size: os.ftruncate(fd, size))
        expect_errno(errno.EPERM, lambda size=size: os.truncate(block.path, size))
    expect_errno(errno.EPERM, lambda: os.close(os.open(block.path, os.O_RDWR | os.O_TRUNC)))
    expect_errno(errno.EPERM, lambda: os.chmod(block.path, 0o644))
    expect_errno(errno.EPERM, lambda: os.chown(block.path, 0, 0))
    os.truncate(block.path, SIZE)
    os.utime(block.path)
    assert os.stat(block.path).st_size == SIZE
    assert os.pread(fd, 4, 0) == b"kept"


def test_a_read_only_file_takes_nothing(fresh: Served) -> None:
    # What the mount option alone would refuse is tried on a mount that is not read-only.
    fresh.end()
    with_nothing = replace(fresh.options, directory=str(fresh.directory / "read-only"), read_only=True)
    Path(with_nothing.directory).mkdir()
    with served(with_nothing) as block:
        assert _libc.mount(None, os.fsencode(block.path), None, ctypes.c_ulong(MS_REMOUNT), None) == 0
        assert os.stat(block.path).st_mode & 0o777 == 0o400
        expect_errno(errno.EROFS, lambda: os.close(os.open(block.path, os.O_RDWR)))
        expect_errno(errno.EROFS, lambda: os.close(os.open(block.path, os.O_WRONLY)))
        own = os.open(block.path, os.O_RDONLY)
        try:
            assert os.pread(own, SECTOR, 0) == bytes(SECTOR)
            os.fsync(own)
        finally:
            os.close(own)


# --- zeros and holes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [PUNCH | KEEP, ZERO, ZERO | KEEP])
def test_zeroed_ranges_read_as_zeros_and_nothing_else_changes(block: Served, fd: int, mode: int) -> None:
    if not is_native(block):
        expect_errno(errno.EOPNOTSUPP, lambda: fallocate(fd, mode, 0, CHUNK))
        return
    base = 40 * MIB
    for offset, length in ((0, CHUNK), (CHUNK // 2, 3 * CHUNK), (10, 20), (SECTOR, SECTOR), (CHUNK - 1, 2)):
        content = bytearray(os.urandom(6 * CHUNK))
        os.pwrite(fd, content, base)
        fallocate(fd, mode, base + offset, length)
        content[offset : offset + length] = bytes(length)
        assert os.pread(fd, len(content), base) == content
    assert os.fstat(fd).st_size == SIZE


def test_zeroing_at_the_end(block: Served, fd: int) -> None:
    if not is_native(block):
        pytest.skip("pyfuse3 has no fallocate")
    os.pwrite(fd, b"x" * CHUNK, SIZE - CHUNK)
    expect_errno(errno.EFBIG, lambda: fallocate(fd, ZERO | KEEP, SIZE - SECTOR, 2 * SECTOR))
    expect_errno(errno.EFBIG, lambda: fallocate(fd, ZERO, SIZE, SECTOR))
    assert os.pread(fd, CHUNK, SIZE - CHUNK) == b"x" * CHUNK
    fallocate(fd, PUNCH | KEEP, SIZE - SECTOR, MIB)  # what lies behind the end is no part of the file
    fallocate(fd, PUNCH | KEEP, SIZE + MIB, MIB)
    assert os.pread(fd, CHUNK, SIZE - CHUNK) == b"x" * (CHUNK - SECTOR) + bytes(SECTOR)
    assert os.fstat(fd).st_size == SIZE


@pytest.mark.parametrize("mode", [0, KEEP])
def test_an_allocation_is_not_promised(fd: int, mode: int) -> None:
    expect_errno(errno.EOPNOTSUPP, lambda: fallocate(fd, mode, 0, CHUNK))


def test_holes_are_those_of_the_map(fresh: Served) -> None:
    if not is_native(fresh):
        pytest.skip("pyfuse3 has no lseek")
    own = os.open(fresh.path, os.O_RDWR)
    try:
        expect_errno(errno.ENXIO, lambda: os.lseek(own, 0, os.SEEK_DATA))
        assert os.lseek(own, 5, os.SEEK_HOLE) == 5
        os.pwrite(own, b"x", 2 * CHUNK + 9)
        os.pwrite(own, bytes(CHUNK), 3 * CHUNK)  # zeros that were written are data
        os.pwrite(own, b"x", SIZE - 1)
        assert os.lseek(own, 0, os.SEEK_DATA) == 2 * CHUNK
        assert os.lseek(own, 2 * CHUNK + 77, os.SEEK_DATA) == 2 * CHUNK + 77
        assert os.lseek(own, 2 * CHUNK, os.SEEK_HOLE) == 4 * CHUNK
        assert os.lseek(own, 4 * CHUNK, os.SEEK_DATA) == SIZE // CHUNK * CHUNK
        assert os.lseek(own, SIZE - 1, os.SEEK_HOLE) == SIZE
        expect_errno(errno.ENXIO, lambda: os.lseek(own, SIZE, os.SEEK_DATA))
        expect_errno(errno.ENXIO, lambda: os.lseek(own, SIZE, os.SEEK_HOLE))
        fallocate(own, PUNCH | KEEP, 2 * CHUNK, CHUNK)
        assert os.lseek(own, 0, os.SEEK_DATA) == 3 * CHUNK
    finally:
        os.close(own)


# --- when something is missing -----------------------------------------------------------------------------------


def test_writes_wait_for_space_while_everything_else_goes_on(fresh: Served) -> None:
    own = os.open(fresh.path, os.O_RDWR)
    shut = fresh.directory / "shut"
    try:
        os.pwrite(own, b"a" * CHUNK, 0)
        shut.touch()
        with ThreadPoolExecutor(8) as pool:
            held = [pool.submit(os.pwrite, own, b"b" * SECTOR, (10 + index) * CHUNK) for index in range(8)]
            try:
                time.sleep(0.2)
                # No fsync here: the kernel holds the inode's lock while a write waits, and fsync(2) wants it.
                for turn in range(50):
                    assert os.pread(own, CHUNK, 0) == b"a" * CHUNK, turn
                if is_native(fresh):  # with parallel writes that lock is shared
                    os.pwrite(own, b"c" * SECTOR, SECTOR)  # the head has this chunk
                assert not any(write.done() for write in held)
            finally:
                shut.unlink()
            assert [write.result(30) for write in held] == [SECTOR] * 8
    finally:
        os.close(own)


def test_an_abort_ends_the_process_in_order(fresh: Served) -> None:
    own = os.open(fresh.path, os.O_RDWR)
    try:
        os.pwrite(own, b"a", 0)
        (fresh.directory / "shut").touch()
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(os.pwrite, own, b"b" * SECTOR, CHUNK)
            time.sleep(0.1)
            _libc.umount2(os.fsencode(fresh.path), 1)  # MNT_FORCE: the connection is aborted, the mount is busy
            with pytest.raises(OSError):
                held.result(30)
        (fresh.directory / "shut").unlink()
        assert fresh.process.wait(30) == 0, fresh.log.read_text()
        with pytest.raises(OSError):
            os.pread(own, 1, 0)
    finally:
        with contextlib.suppress(OSError):
            os.close(own)


def test_an_unmount_ends_the_process_in_order(fresh: Served) -> None:
    own = os.open(fresh.path, os.O_RDWR)
    os.pwrite(own, b"a" * 3, 0)
    assert os.pread(own, 3, 0) == b"aaa"
    os.close(own)
    counted = fresh.end()
    assert (counted["writes"], counted["written_bytes"]) == (1, 3)
