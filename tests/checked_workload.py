"""Workloads whose state is known at every moment, so that a snapshot taken under them can be judged.

Each part says two positions: what is *promised* (made durable before somebody looked) and what was *begun*. A snapshot
whose call began at one moment and was answered at another must hold everything promised at the first, nothing begun
after the second, and what lies between in the way that the part explains.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

KIB = 1 << 10
MIB = 1 << 20
SECTOR = 512

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16

_libc = ctypes.CDLL(None, use_errno=True)


def expect(condition: bool, text: str) -> None:
    """Say what is wrong with the data: the asserts of a helper module are not rewritten."""
    if not condition:
        raise AssertionError(text)


def payload(number: int, length: int) -> bytes:
    """Return the content that the operation of this number writes; no two are alike."""
    return random.Random(number).randbytes(length)


class Part(ABC):
    """One writer in a thread of its own."""

    def __init__(self) -> None:
        self._ending = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._guarded, name=type(self).__name__)

    def _guarded(self) -> None:
        try:
            self.run(self._ending)
        except BaseException as exc:  # noqa: BLE001 - it is raised where the thread is joined
            self._failure = exc

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the writer in order; raises what went wrong in it."""
        self._ending.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    @property
    def broken(self) -> bool:
        return self._failure is not None

    @abstractmethod
    def run(self, ending: threading.Event) -> None:
        """Write until told to end; what was done last is promised."""


@contextmanager
def running(parts: Sequence[Part]) -> Iterator[None]:
    """Run all parts for the body; raises the first thing that went wrong in one of them."""
    for part in parts:
        part.start()
    try:
        yield
    finally:
        failures = []
        for part in parts:
            try:
                part.stop()
            except BaseException as exc:  # noqa: BLE001 - raised below, after all have ended
                failures.append(exc)
        if failures:
            raise failures[0]


# --- numbered records


class Journal(Part):
    """Appends numbered, checksummed records and syncs each; a snapshot must hold a prefix of them.

    Every ``PER_FILE`` records a new file begins under a temporary name and is renamed when its first record is durable.
    """

    PER_FILE = 100
    MAGIC = b"JRNL"
    _HEADER = struct.Struct("<4sQII")

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.begun = 0
        self.promised = 0

    @classmethod
    def record(cls, number: int) -> bytes:
        body = payload(number, random.Random(~number).randrange(40, 9000))
        return cls._HEADER.pack(cls.MAGIC, number, len(body), _crc(number, body)) + body

    def run(self, ending: threading.Event) -> None:
        directory = os.open(self.directory, os.O_RDONLY)
        fd = -1
        try:
            while not ending.is_set():
                number = self.begun
                self.begun = number + 1
                name = self.directory / f"journal-{number // self.PER_FILE:06}"
                first = number % self.PER_FILE == 0
                if first:
                    if fd >= 0:
                        os.close(fd)
                    fd = os.open(f"{name}.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
                record = self.record(number)
                expect(os.write(fd, record) == len(record), "a short write of a record")
                os.fsync(fd)
                if first:
                    os.rename(f"{name}.new", name)
                    os.fsync(directory)
                self.promised = number + 1
        finally:
            if fd >= 0:
                os.close(fd)
            os.close(directory)

    @classmethod
    def count(cls, directory: Path) -> int:
        """Return how many records there are from the first on; raises AssertionError when they are no prefix."""
        count = 0
        files = sorted(path for path in directory.glob("journal-*") if path.suffix != ".new")
        for position, path in enumerate(files):
            expect(path.name == f"journal-{position:06}", f"{path.name} follows {position} files")
            raw = path.read_bytes()
            at = 0
            while raw[at : at + len(expected := cls.record(count))] == expected:
                at += len(expected)
                count += 1
                if count % cls.PER_FILE == 0:
                    break
            if count % cls.PER_FILE:
                expect(position == len(files) - 1, f"{path.name} ends after record {count - 1}, and files follow")
                expect(len(raw) - at <= len(cls.record(count)), f"{path.name}: {len(raw) - at} bytes are no records")
                # What was being written may be there in part: zeros, or the beginning of the next record.
                rest, expected = raw[at:].rstrip(b"\0"), cls.record(count)
                expect(_is_torn(rest, expected), f"{path.name}: what follows record {count - 1} is not the next one")
            else:
                expect(at == len(raw), f"{path.name}: bytes follow its last record")
        return count


def _crc(number: int, body: bytes) -> int:
    return crc32c(struct.pack("<Q", number) + body[:64])


def _is_torn(found: bytes, wanted: bytes) -> bool:
    """Say whether each sector-sized piece is as wanted or zero: pages may have been written back in any order."""
    for at in range(0, len(found), SECTOR):
        piece = found[at : at + SECTOR]
        if piece.strip(b"\0") and not all(x in (0, y) for x, y in zip(piece, wanted[at : at + SECTOR], strict=False)):
            return False
    return True


# --- one file in every way


@dataclass(frozen=True)
class Step:
    """One operation on the exercised file."""

    kind: str
    offset: int
    length: int
    number: int


class Exerciser(Part):
    """Writes, maps, truncates, punches, zeroes and allocates one file at random, and reads it back against a model.

    After each sync everything is promised. Between two, a snapshot may hold every byte as of any moment since the
    promise, and any length from the shortest to the longest since.
    """

    LIMIT = 384 * KIB
    LONGEST = 48 * KIB
    KINDS: ClassVar = {
        "write": 30,
        "map": 12,
        "truncate": 5,
        "punch": 8,
        "zero": 6,
        "allocate": 5,
        "read": 25,
        "sync": 6,
        "rest": 3,
    }

    def __init__(self, path: Path, seed: int) -> None:
        super().__init__()
        self.path = path
        self.steps: list[Step] = []
        self.promised = 0
        self.reads = 0
        self._chance = random.Random(seed)

    @property
    def begun(self) -> int:
        return len(self.steps)

    def run(self, ending: threading.Event) -> None:
        model = Contents(self.LIMIT)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.fsync(fd)
            while not ending.is_set():
                self._step(fd, model, self._choose(model))
            self._step(fd, model, Step("sync", 0, 0, len(self.steps)))
        finally:
            os.close(fd)

    def _choose(self, model: Contents) -> Step:
        (kind,) = self._chance.choices(list(self.KINDS), list(self.KINDS.values()))
        offset = self._chance.randrange(self.LIMIT)
        if self._chance.random() < 0.3:
            offset &= ~4095
        length = self._chance.randrange(1, min(self.LONGEST, self.LIMIT - offset) + 1)
        if kind in ("map", "punch", "zero"):  # these stay within the file
            offset = min(offset, max(0, model.size - 1))
            length = min(length, model.size - offset)
            if length <= 0:
                kind, length = "write", 4096
        return Step(kind, offset, length, len(self.steps))

    def _step(self, fd: int, model: Contents, step: Step) -> None:
        self.steps.append(step)
        match step.kind:
            case "write":
                data = payload(step.number, step.length)
                expect(os.pwrite(fd, data, step.offset) == step.length, "a short write")
            case "map":
                with mmap.mmap(fd, model.size) as view:
                    view[step.offset : step.offset + step.length] = payload(step.number, step.length)
            case "truncate":
                os.ftruncate(fd, step.offset)
            case "punch":
                _fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, step.offset, step.length)
            case "zero":
                _fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, step.offset, step.length)
            case "allocate":
                _fallocate(fd, 0, step.offset, step.length)
            case "read":
                found = os.pread(fd, step.length, step.offset)
                wanted = bytes(model.data[step.offset : min(step.offset + step.length, max(model.size, step.offset))])
                expect(found == wanted, f"{self.path.name}: step {step.number} reads something else at {step.offset}")
                self.reads += 1
            case "sync":
                os.fsync(fd)
                self.promised = len(self.steps)
            case "rest":
                time.sleep(0.01)
        model.apply(step)


class Contents:
    """What the exercised file holds after some steps; bytes behind its end are zero."""

    def __init__(self, limit: int) -> None:
        self.data = bytearray(limit)
        self.size = 0
        self.done = 0

    def apply(self, step: Step) -> None:
        end = step.offset + step.length
        match step.kind:
            case "write":
                self.data[step.offset : end] = payload(step.number, step.length)
                self.size = max(self.size, end)
            case "map":
                self.data[step.offset : end] = payload(step.number, step.length)
            case "punch" | "zero":
                self.data[step.offset : end] = bytes(step.length)
            case "allocate":
                self.size = max(self.size, end)
            case "truncate":
                self.data[step.offset :] = bytes(len(self.data) - step.offset)
                self.size = step.offset
        self.done += 1

    def advance(self, steps: Sequence[Step], position: int) -> None:
        """Apply the steps from where it is up to the position."""
        for step in steps[self.done : position]:
            self.apply(step)

    def check(self, found: bytes, steps: Sequence[Step], begun: int) -> None:
        """Judge a copy of the file that was taken after what is applied here and before step ``begun``."""
        version = Contents(len(self.data))
        version.data[:], version.size, version.done = self.data, self.size, self.done
        doubtful = (
            {at for at in range(len(found)) if found[at] != version.data[at]}
            if (found != bytes(version.data[: len(found)]))
            else set()
        )
        sizes = [version.size]
        for step in steps[self.done : begun]:
            version.apply(step)
            sizes.append(version.size)
            if step.kind not in ("read", "sync", "rest"):
                doubtful = {at for at in doubtful if found[at] != version.data[at]}
        expect(min(sizes) <= len(found) <= max(sizes), f"{len(found)} bytes long instead of {min(sizes)}..{max(sizes)}")
        expect(
            not doubtful,
            f"{len(doubtful)} bytes, the first at {min(doubtful, default=0)}, are as at no moment since {self.done}",
        )


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "fallocate")


# --- a device without a file system


@dataclass
class BlockWrite:
    """One write to a device: where, and between which two moments it was made."""

    offset: int
    length: int
    number: int
    began: float
    ended: float = float("inf")


class BlockWriter(Part):
    """Writes its own part of a device, 512 B to 1 MiB at a time, each over earlier ones.

    A write is answered before the next one begins. A snapshot holds the answered ones, none that began later, and of
    the one between each sector old or new: the kernel cuts a large write into several requests.
    """

    LONGEST = MIB

    def __init__(self, device: Path, at: int, size: int, *, direct: bool, unit: int, seed: int) -> None:
        """``unit``: the bytes of which every offset and length is a multiple."""
        super().__init__()
        self._unit = unit
        self.device = device
        self.at = at
        self.size = size
        self.direct = direct
        self.writes: list[BlockWrite] = []
        self.promised = 0
        self._seed = seed
        self._chance = random.Random(seed)

    @property
    def begun(self) -> int:
        return len(self.writes)

    def run(self, ending: threading.Event) -> None:
        fd = os.open(self.device, os.O_RDWR | (os.O_DIRECT if self.direct else 0))
        try:
            with mmap.mmap(-1, self.LONGEST) as aligned:
                while not ending.is_set():
                    self._write(fd, aligned)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _write(self, fd: int, aligned: mmap.mmap) -> None:
        chance = self._chance
        unit = self._unit
        length = unit * int((self.LONGEST // unit) ** chance.random())
        offset = unit * chance.randrange((self.size - length) // unit + 1)
        number = self._seed << 32 | len(self.writes)
        aligned[:length] = payload(number, length)
        write = BlockWrite(offset, length, number, time.monotonic())
        self.writes.append(write)
        with memoryview(aligned) as view, view[:length] as piece:
            expect(os.pwrite(fd, piece, self.at + offset) == length, "a short write to the device")
        if not self.direct or chance.random() < 0.1:
            os.fsync(fd)
        write.ended = time.monotonic()
        self.promised = len(self.writes)


@dataclass(frozen=True)
class Found:
    """A state of one writer's part that a snapshot may show: how many writes are whole, and whether one more began."""

    whole: int
    partly: bool


class BlockModel:
    """What one writer's part holds after some of its writes."""

    def __init__(self, writer: BlockWriter) -> None:
        self._writer = writer
        self.data = bytearray(writer.size)
        self.done = 0

    def advance(self, position: int) -> None:
        for write in self._writer.writes[self.done : position]:
            self.data[write.offset : write.offset + write.length] = payload(write.number, write.length)
        self.done = max(self.done, position)

    def matches(self, found: bytes, begun: int) -> list[Found]:
        """Return the states, from here to write ``begun``, that ``found`` can be; none is a broken snapshot."""
        version = bytearray(self.data)
        wrong = {at for at in range(0, len(found), SECTOR) if found[at : at + SECTOR] != version[at : at + SECTOR]}
        states = [] if wrong else [Found(self.done, False)]
        for position in range(self.done, begun):
            write = self._writer.writes[position]
            data = payload(write.number, write.length)
            end = write.offset + write.length
            if wrong and all(
                write.offset <= at < end and found[at : at + SECTOR] == data[at - write.offset :][:SECTOR]
                for at in wrong
            ):
                states.append(Found(position, True))
            version[write.offset : end] = data
            for at in range(write.offset, end, SECTOR):
                if found[at : at + SECTOR] == version[at : at + SECTOR]:
                    wrong.discard(at)
                else:
                    wrong.add(at)
            if not wrong:
                states.append(Found(position + 1, False))
        return states


def is_one_moment(writers: Sequence[BlockWriter], states: Sequence[Found]) -> bool:
    """Say whether these states of all parts can be of one moment: nothing is there that began after something
    that is missing had been answered."""
    latest = max(
        (
            writer.writes[state.whole - 1 + state.partly].began
            for writer, state in zip(writers, states, strict=True)
            if state.whole + state.partly
        ),
        default=0.0,
    )
    return all(
        state.whole == len(writer.writes) or writer.writes[state.whole].ended >= latest
        for writer, state in zip(writers, states, strict=True)
    )


# --- fio


_FIO = """
[global]
directory={directory}
size={size}
verify=crc32c
verify_interval=4096
verify_fatal=1
do_verify=1
randrepeat=0
fallocate=none
group_reporting=1
[direct]
rw=randwrite
bs=4k
direct=1
ioengine=libaio
iodepth=8
[direct-large]
rw=randwrite
bsrange=4k-128k
direct=1
ioengine=libaio
iodepth=4
[buffered]
rw=randwrite
bs=4k
ioengine=psync
fsync=64
[buffered-sequential]
rw=write
bs=64k
ioengine=psync
fdatasync=8
"""


class Fio(Part):
    """Runs fio's verified jobs again and again over the same files. In a snapshot each block of them is whole."""

    SIZE = 3 * MIB
    MAGIC = 0xACCA
    _HEADER = struct.Struct("<HHIQQIIHHI")

    def __init__(self, directory: Path, scratch: Path) -> None:
        super().__init__()
        self.directory = directory
        self.passes = 0
        self._job_file = scratch / "jobs.fio"

    def run(self, ending: threading.Event) -> None:
        self._job_file.write_text(_FIO.format(directory=self.directory, size=self.SIZE))
        while not ending.is_set():
            done = subprocess.run(
                ["fio", self._job_file.name], cwd=self._job_file.parent, capture_output=True, text=True, timeout=300
            )
            expect(done.returncode == 0, f"fio: {done.stdout[-2000:]}{done.stderr[-2000:]}")
            self.passes += 1

    @classmethod
    def check(cls, directory: Path, *, sample: int = 40) -> int:
        """Judge fio's files in a snapshot; returns how many blocks carry data. Some bodies are read, all headers."""
        blocks = 0
        for path in sorted(directory.glob("*.0")):
            raw = path.read_bytes()
            written = []
            for at in range(0, len(raw), 4096):
                block = raw[at : at + 4096]
                if not block.strip(b"\0"):
                    continue
                magic, _, length, _, offset, *_ = cls._HEADER.unpack_from(block)
                whole = (magic, length, offset) == (cls.MAGIC, 4096, at)
                expect(whole, f"{path.name}: the block at {at} says {magic:#x}, {length}, {offset}")
                written.append(at)
            for at in random.Random(len(written)).sample(written, min(sample, len(written))):
                block = raw[at : at + 4096]
                (header_sum,) = struct.unpack_from("<I", block, cls._HEADER.size - 4)
                (body_sum,) = struct.unpack_from("<I", block, cls._HEADER.size)
                # fio stores the checksums without the inversion at the end.
                right = crc32c(block[: cls._HEADER.size - 4]) ^ 0xFFFFFFFF == header_sum
                expect(right, f"{path.name}: a broken header at {at}")
                right = crc32c(block[cls._HEADER.size + 4 :]) ^ 0xFFFFFFFF == body_sum
                expect(right, f"{path.name}: a broken block at {at}")
            blocks += len(written)
        return blocks


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def crc32c(data: bytes) -> int:
    """Return the Castagnoli CRC (RFC 3720, B.4), which neither zlib nor hashlib has."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
