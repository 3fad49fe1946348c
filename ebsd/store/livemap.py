"""The live map of an attached volume: a tmpfs file that survives the process and never a reboot.

1. It is ahead of the durable map. While one of the current attachment exists, the durable map is not authoritative.
2. An entry is stored by ONE aligned 4-byte store, ``memoryview.cast("I")[i] = v``. The packing functions of
   ``struct`` that write into a buffer zero it first, and a kill between the two would leave a hole for ever.
3. The dirty mark of a page is set BEFORE its entry is stored. It is a byte and not a bit: setting it is one plain
   store that cannot lose a neighbour's mark, which a read-modify-write of shared bits could.
4. A mark is CLEAN, DIRTY or FROZEN (a flush pass copied the page and is not done). Only the flush pass turns FROZEN
   into CLEAN, after the map is durable; a kill in the middle of a pass thus loses no mark. Everything that is not
   CLEAN is dirty to a salvage or to the next engine.
5. The file has all its pages from the start: a store into a full tmpfs would be SIGBUS, in every replacement too.
6. The magic is stored last: a file without it was never in use.
7. The header names the head, and the oldest layer that may hold data that is not durable: what a salvage syncs is
   all of this volume's layers between the two.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ebsd.domain.errors import HostUnsupported, MemoryForMapMissing, StoreDamaged, UnsupportedFormat, VolumeIdMalformed
from ebsd.domain.ids import LineageId, VolumeId, format_uuid, parse_uuid, parse_volume_id
from ebsd.store.disk import Disk, opened
from ebsd.store.durablemap import EXTENT, DurableMap
from ebsd.store.entries import FIRST_RESERVED, MAX_CHUNKS, PAGE, PAGE_SHIFT, entry_bytes, page_count

MAGIC: Final = b"EBSDLIV1"
VERSION: Final = 1
HEADER_PAGE: Final = 4096
CLEAN: Final = 0
DIRTY: Final = 1
FROZEN: Final = 2

_HEADER = struct.Struct("<8sII16s24s16sQIIQQQ")
_HEAD_AT: Final = 80
_OLDEST_AT: Final = 84
FAILED_AT: Final = 128
"""Offset of the u32 that is not 0 once an engine has failed."""
_INIT_AT: Final = 192
_MADV_DONTNEED_LOCKED: Final = 24
INIT_BYTES: Final = 64
"""Space for the values of the first FUSE_INIT, which a replacement engine must go on with."""


@dataclass(frozen=True, slots=True)
class LiveIdentity:
    """Whose live map it is: one attachment of one volume in one boot. Any other file at its place is void."""

    boot_id: bytes
    """16 bytes of /proc/sys/kernel/random/boot_id."""
    volume: VolumeId
    lineage: LineageId
    generation: int
    """Attach generation from the catalog."""


class LiveMapInUse(Exception):
    """Another process holds the lock of this live map: its engine runs, or is not yet quite dead."""


def _layout(chunks: int) -> tuple[int, int, int]:
    """Return (offset of the marks, offset of the entries, length of the file)."""
    marks = HEADER_PAGE
    entries = marks + -(-page_count(chunks) // PAGE) * PAGE
    return marks, entries, entries + entry_bytes(chunks)


class LiveMap:
    """An open live map, locked by this object's own descriptor until ``close``.

    ``entries``: u32 per chunk, format I. ``marks``: a byte per page of entries. Both are the shared memory itself.
    """

    def __init__(self, disk: Disk, fd: int, memory: mmap.mmap, identity: LiveIdentity, chunks: int) -> None:
        self._disk = disk
        self._fd = fd
        self._memory = memory
        self.identity = identity
        self.chunks = chunks
        marks, entries, end = _layout(chunks)
        self._view = memoryview(memory)
        self.marks = self._view[marks : marks + page_count(chunks)]
        self.raw_entries = self._view[entries:end]
        self.entries = self.raw_entries.cast("I")
        self._head = self._view[_HEAD_AT : _HEAD_AT + 4].cast("I")
        self._oldest = self._view[_OLDEST_AT : _OLDEST_AT + 4].cast("I")
        self._failed = self._view[FAILED_AT : FAILED_AT + 4].cast("I")
        self._unpublished: tuple[Path, Path] | None = None
        """Temporary name and final name of a map that ``replace`` has not put in place yet."""

    @classmethod
    def create(cls, disk: Disk, path: Path, identity: LiveIdentity, durable: DurableMap, *, head: int) -> LiveMap:
        """Make the live map of a new attachment from the durable map, in place of any void file.

        The caller has salvaged before. Raises MemoryForMapMissing (the tmpfs is full; nothing is left behind),
        LiveMapInUse, HostUnsupported (big-endian machine), OSError.
        """
        if sys.byteorder != "little":
            raise HostUnsupported(reason="Live maps need a little-endian machine", remedy="Use another host.")
        with contextlib.suppress(FileNotFoundError):
            disk.unlink(_growing(path))
        with contextlib.suppress(FileNotFoundError):
            void = _locked(disk, path)
            try:
                disk.unlink(path)
            finally:
                disk.close(void)
        fd = disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _lock(disk, fd, path)
            if disk.fstat(fd).st_nlink == 0:  # another one began between our open and our lock, and took it for void
                raise LiveMapInUse(os.fspath(path))
        except BaseException:
            disk.close(fd)  # and no unlink: what lies there may be the other one's
            raise
        live = cls._with_memory(disk, fd, path, identity, durable.header.chunks)
        try:
            durable.read_into(live.raw_entries)
            live._write_header(head, head)
        except BaseException:
            live.close()
            with contextlib.suppress(OSError):
                disk.unlink(path)
            raise
        return live

    @classmethod
    def grown(cls, disk: Disk, path: Path, old: LiveMap, chunks: int) -> LiveMap:
        """Make a longer map to take the place of ``old``, the one at ``path``, by ``replace``. May take long.

        Until then it is a file of another name, which the next attempt or attachment removes. Raises ValueError
        (it would be shorter), MemoryForMapMissing (both need their memory for a moment), OSError.
        """
        if chunks < old.chunks:
            raise ValueError(f"a map of {old.chunks} chunks does not shrink to {chunks}")
        temporary = _growing(path)
        with contextlib.suppress(FileNotFoundError):
            disk.unlink(temporary)  # nobody's: who makes one holds the lock of the map that it is to replace
        fd = disk.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _lock(disk, fd, temporary)
        except BaseException:
            disk.close(fd)
            raise
        live = cls._with_memory(disk, fd, temporary, old.identity, chunks)
        live._unpublished = (temporary, path)
        end = len(old.raw_entries)
        for at in range(0, end, EXTENT):  # so that no page is touched for the first time while requests wait
            live.raw_entries[at : min(at + EXTENT, end)] = old.raw_entries[at : at + EXTENT]
        return live

    def replace(self, old: LiveMap) -> None:
        """Take everything from ``old`` and its place; nobody may change ``old`` meanwhile. Its lock stays until
        it is closed. A kill leaves the old one or this one. Raises OSError: the old one is then still there.
        """
        if self._unpublished is None:
            raise ValueError("this live map has its place already")
        self.raw_entries[: len(old.raw_entries)] = old.raw_entries
        self.marks[: len(old.marks)] = old.marks
        self.init_values = old.init_values
        self._failed[0] = old._failed[0]
        self._write_header(old.head, old.oldest_unsynced)
        self._disk.rename(*self._unpublished)
        self._unpublished = None

    @classmethod
    def _with_memory(cls, disk: Disk, fd: int, path: Path, identity: LiveIdentity, chunks: int) -> LiveMap:
        """Give a new file all its pages and map it; on errors the file is closed and removed."""
        end = _layout(chunks)[2]
        try:
            try:
                disk.fallocate(fd, 0, end)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise MemoryForMapMissing(volume=identity.volume, need=end, directory=path.parent) from error
                raise
            return cls(disk, fd, disk.mmap(fd, end), identity, chunks)
        except BaseException:
            disk.close(fd)
            with contextlib.suppress(OSError):
                disk.unlink(path)
            raise

    def _write_header(self, head: int, oldest: int) -> None:
        """Write all but the words that have their own setters; the magic last."""
        marks, entries, _ = _layout(self.chunks)
        header = _HEADER.pack(
            bytes(8), VERSION, 0, self.identity.boot_id, parse_volume_id(self.identity.volume).encode(),
            parse_uuid(self.identity.lineage), self.identity.generation, head, oldest, self.chunks, marks, entries,
        )  # fmt: skip
        self._view[: len(header)] = header
        self._view[:8] = MAGIC

    @classmethod
    def open(cls, disk: Disk, path: Path, identity: LiveIdentity) -> LiveMap | None:
        """Open and lock the live map of exactly this attachment; None when there is none or it is void.

        Raises LiveMapInUse, StoreDamaged (it is ours and its structure is not), UnsupportedFormat (it is a live
        map of a version that this program does not know), OSError.
        """
        try:
            fd = _locked(disk, path)
        except FileNotFoundError:
            return None
        try:
            return cls._from_locked(disk, fd, identity, os.fspath(path))
        except BaseException:
            disk.close(fd)
            raise

    @classmethod
    def inherited(cls, disk: Disk, fd: int, identity: LiveIdentity) -> LiveMap:
        """Go on with a live map whose lock is that of this very open file, whoever opened it; takes ``fd`` over.

        Raises as ``open``, and StoreDamaged for what is not the live map of this attachment.
        """
        try:
            live = cls._from_locked(disk, fd, identity, "live map")
        except BaseException:
            disk.close(fd)
            raise
        if live is None:
            raise StoreDamaged(file="live map", reason="it is not that of this attachment")
        return live

    def descriptor(self) -> int:
        """Return the descriptor, for a process that is to keep the file, and its lock, beyond the end of this one."""
        return self._fd

    @classmethod
    def _from_locked(cls, disk: Disk, fd: int, identity: LiveIdentity, file: str) -> LiveMap | None:
        size = disk.fstat(fd).st_size
        raw = disk.pread(fd, _HEADER.size, 0)
        if len(raw) < _HEADER.size or raw[:8] != MAGIC:
            disk.close(fd)
            return None
        (_, version, flags, boot_id, raw_volume, lineage, generation, head, oldest, chunks, marks, entries) = (
            _HEADER.unpack(raw)
        )
        if boot_id != identity.boot_id:
            disk.close(fd)
            return None
        if version != VERSION:
            raise UnsupportedFormat(file=file, what=f"version {version}")
        if flags:
            raise UnsupportedFormat(file=file, what=f"feature flags {flags:#x}")
        if raw_volume.rstrip(b"\0") != identity.volume.encode() or generation != identity.generation:
            disk.close(fd)
            return None
        if not 0 < oldest <= head < FIRST_RESERVED or not 0 < chunks <= MAX_CHUNKS:
            raise StoreDamaged(file=file, reason="its header is impossible")
        if (marks, entries, size) != _layout(chunks):
            raise StoreDamaged(file=file, reason="its length and its header disagree")
        if lineage != parse_uuid(identity.lineage):
            raise StoreDamaged(file=file, reason=f"it belongs to lineage {format_uuid(lineage)}")
        return cls(disk, fd, disk.mmap(fd, size), identity, chunks)

    @property
    def head(self) -> int:
        """The layer that takes writes, as one aligned word of the shared memory. It only moves to a newer one."""
        return self._head[0]

    @head.setter
    def head(self, number: int) -> None:
        if not self.head <= number < FIRST_RESERVED:
            raise ValueError(f"the head moves from layer {self.head} to a newer one, not to {number}")
        self._head[0] = number

    @property
    def oldest_unsynced(self) -> int:
        """The oldest layer that may hold data that is not durable: the head, or one sealed a moment ago."""
        return self._oldest[0]

    @oldest_unsynced.setter
    def oldest_unsynced(self, number: int) -> None:
        if not self.oldest_unsynced <= number <= self.head:
            raise ValueError(f"layer {number} is not between {self.oldest_unsynced} and {self.head}")
        self._oldest[0] = number

    @property
    def failed(self) -> bool:
        """Whether an engine met an error it could not go on from; entries may name data that was lost."""
        return self._failed[0] != 0

    def mark_failed(self) -> None:
        """Store the failed flag: the first thing that is done at such an error. Cannot fail itself."""
        self._failed[0] = 1

    @property
    def init_values(self) -> bytes:
        """The 64 bytes kept for the values of the first FUSE_INIT; zeros until stored."""
        return bytes(self._view[_INIT_AT : _INIT_AT + INIT_BYTES])

    @init_values.setter
    def init_values(self, values: bytes) -> None:
        if len(values) != INIT_BYTES:
            raise ValueError(f"{INIT_BYTES} bytes wanted, {len(values)} given")
        self._view[_INIT_AT : _INIT_AT + INIT_BYTES] = values

    def store(self, chunk: int, entry: int) -> None:
        """Mark the page, then store the entry. No await, and no second writer of the page's mark, in between."""
        self.marks[chunk >> PAGE_SHIFT] = DIRTY
        self.entries[chunk] = entry

    def marked_pages(self) -> list[int]:
        """Return the numbers of all pages that are not CLEAN, ascending."""
        marks = bytes(self.marks)
        return [page for page in range(len(marks)) if marks[page]] if any(marks) else []

    def page(self, page: int) -> bytes:
        """Return a copy of one page of entries."""
        return bytes(self.raw_entries[page * PAGE : (page + 1) * PAGE])

    def let_pages_go(self) -> None:
        """Take the file's pages out of this process, after a look at all of them: 64 MiB for each TiB of volume.

        They come back as they are used, and the content is the file's. The memory of the process is locked, so this
        needs Linux 5.18 (madvise(2), MADV_DONTNEED_LOCKED); without it they stay.
        """
        if isinstance(self._memory, mmap.mmap):
            with contextlib.suppress(OSError):
                self._memory.madvise(_MADV_DONTNEED_LOCKED)

    def close(self) -> None:
        """Unmap and unlock; may be repeated. The file stays, but for one that was to ``replace`` and did not."""
        if self._fd < 0:
            return
        if self._unpublished is not None:
            with contextlib.suppress(OSError):
                self._disk.unlink(self._unpublished[0])
        # After an error a traceback may still hold a slice: the memory goes with the last of them, the lock goes now,
        # and the error is not replaced by one of ours.
        with contextlib.suppress(BufferError):
            for view in (
                self._head, self._oldest, self._failed, self.entries, self.raw_entries, self.marks, self._view,
            ):  # fmt: skip
                view.release()
            self._memory.close()
        self._disk.close(self._fd)
        self._fd = -1


def read_live_identity(disk: Disk, path: Path) -> LiveIdentity | None:
    """Return whose live map lies at ``path`` without locking it; None when it is none, or of another version.

    Nothing but the header is read, and nothing of it is believed. Raises StoreDamaged (no regular file), OSError.
    """
    with opened(disk, path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        if not stat.S_ISREG(disk.fstat(fd).st_mode):
            raise StoreDamaged(file=os.fspath(path), reason="it is not a regular file")
        raw = disk.pread(fd, _HEADER.size, 0)
    if len(raw) < _HEADER.size or raw[:8] != MAGIC:
        return None
    _, version, flags, boot_id, raw_volume, lineage, generation, *_ = _HEADER.unpack(raw)
    if version != VERSION or flags:
        return None
    try:
        volume = parse_volume_id(raw_volume.rstrip(b"\0").decode("ascii"))
    except (UnicodeDecodeError, VolumeIdMalformed):
        return None
    return LiveIdentity(boot_id, volume, LineageId(format_uuid(lineage)), generation)


def remove_live_map(disk: Disk, path: Path) -> None:
    """Remove a live map, and a longer one that was to take its place; nothing when there is none. Raises OSError."""
    for each in (path, _growing(path)):
        with contextlib.suppress(FileNotFoundError):
            disk.unlink(each)


def _growing(path: Path) -> Path:
    """Where the longer map is made that is to take the place of the one at ``path``."""
    return path.with_name(f".{path.name}.grown")


def _lock(disk: Disk, fd: int, path: Path) -> None:
    try:
        disk.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LiveMapInUse(os.fspath(path)) from error


def _locked(disk: Disk, path: Path) -> int:
    """Open and lock what lies at ``path``; raises FileNotFoundError, LiveMapInUse, StoreDamaged, OSError."""
    fd = disk.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(disk.fstat(fd).st_mode):
            raise StoreDamaged(file=os.fspath(path), reason="it is not a regular file")
        _lock(disk, fd, path)
        if disk.fstat(fd).st_nlink == 0:  # its holder removed it between our open and our lock
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    except BaseException:
        disk.close(fd)
        raise
    return fd
