"""The durable map of a volume: a header page and one u32 per chunk, moved only by flush and salvage.

1. Everything of the header lies in its first 512 bytes, the unit that a device writes whole: an update is atomic.
2. An entry lies in one aligned word of such a unit, so no entry can be torn and the map needs no journal.
3. The file is written out with real zeros, 1 MiB of it at the first touch: a flush then allocates nothing, cannot
   run out of space, and its fdatasync costs no journal commit (1.0 commits per flush instead of 1.96 on ext4).
   For the same reason it is copied by writing and never by sharing extents.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ebsd.domain.errors import StoreDamaged, UnsupportedFormat, VolumeIdMalformed
from ebsd.domain.geometry import chunk_count
from ebsd.domain.ids import LineageId, VolumeId, format_uuid, parse_uuid, parse_volume_id
from ebsd.store.disk import Disk, fsync_directory, opened, pread_all, pread_into_all, pwrite_all
from ebsd.store.entries import ENTRY, FIRST_RESERVED, MAX_CHUNKS, PAGE, entry_bytes

MAGIC: Final = b"EBSDMAP1"
VERSION: Final = 1
KIND_VOLUME: Final = 1
KIND_SEALED: Final = 2
HEADER_BYTES: Final = 512
FIRST_ENTRY: Final = 4096
EXTENT: Final = 1024 * 1024
"""Bytes of entries written out at once: the entries of 16 GiB of volume."""

EXTENT_PAGES: Final = EXTENT // PAGE
_ZEROS: Final = bytes(EXTENT)
_BODY = struct.Struct("<8sII16s24sIIQ")


@dataclass(frozen=True, slots=True)
class MapHeader:
    """What a durable map says of itself."""

    lineage: LineageId
    volume: VolumeId
    head: int
    """Newest head layer when the header was written; the catalog's newest row wins over it."""
    chunks: int


def encode_map_header(header: MapHeader) -> bytes:
    """Return the 512 bytes of the header. Raises ValueError for values that no map can have."""
    if not 0 < header.head < FIRST_RESERVED or not 0 < header.chunks <= MAX_CHUNKS:
        raise ValueError(f"no map: {header}")
    parse_volume_id(header.volume)
    body = _BODY.pack(
        MAGIC,
        VERSION,
        0,
        parse_uuid(header.lineage),
        header.volume.encode(),
        KIND_VOLUME,
        header.head,
        header.chunks,
    ).ljust(HEADER_BYTES - 32, b"\0")
    return body + hashlib.sha256(body).digest()


def parse_map_header(data: bytes | bytearray, *, file: str) -> MapHeader:
    """Read the first 512 bytes of a durable map. Raises StoreDamaged and UnsupportedFormat."""
    raw = bytes(data)
    if len(raw) != HEADER_BYTES:
        raise StoreDamaged(file=file, reason="it is too short for a map")
    if hashlib.sha256(raw[:-32]).digest() != raw[-32:]:
        raise StoreDamaged(file=file, reason="the checksum of its header is wrong")
    magic, version, flags, lineage, raw_volume, kind, head, chunks = _BODY.unpack(raw[: _BODY.size])
    if magic != MAGIC:
        raise StoreDamaged(file=file, reason="it is not a map")
    if version != VERSION:
        raise UnsupportedFormat(file=file, what=f"version {version}")
    if flags:
        raise UnsupportedFormat(file=file, what=f"feature flags {flags:#x}")
    if kind != KIND_VOLUME:
        raise UnsupportedFormat(file=file, what=f"kind {kind} where the map of a volume was expected")
    if any(raw[_BODY.size : -32]):
        raise StoreDamaged(file=file, reason="reserved bytes of its header are not zero")
    try:
        volume = parse_volume_id(raw_volume.rstrip(b"\0").decode("ascii"))
    except (UnicodeDecodeError, VolumeIdMalformed) as error:
        raise StoreDamaged(file=file, reason="its header names no volume") from error
    if not 0 < head < FIRST_RESERVED:
        raise StoreDamaged(file=file, reason=f"its head layer is {head:#x}")
    if not 0 < chunks <= MAX_CHUNKS:
        raise StoreDamaged(file=file, reason=f"it has {chunks} chunks")
    return MapHeader(LineageId(format_uuid(lineage)), volume, head, chunks)


class DurableMap:
    """An open durable map; owns its descriptor.

    ``pages`` are counted from the first entry: page p holds the entries of chunks [1024 p, 1024 p + 1024).
    """

    def __init__(self, disk: Disk, fd: int, header: MapHeader, file: str) -> None:
        self._disk = disk
        self.fd = fd
        self.header = header
        self.file = file
        self._end = entry_bytes(header.chunks)
        self._written_out = bytearray(-(-self._end // EXTENT))

    @classmethod
    def create(cls, disk: Disk, path: Path, header: MapHeader) -> DurableMap:
        """Create the map of a new volume, all holes, durable at return.

        May be repeated after a crash: a file that is there is begun anew, so the caller makes sure (``creating``
        row) that it belongs to nobody. Raises OSError.
        """
        fd = disk.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            disk.ftruncate(fd, FIRST_ENTRY + entry_bytes(header.chunks))
            pwrite_all(disk, fd, encode_map_header(header).ljust(FIRST_ENTRY, b"\0"), 0)
            disk.fsync(fd)
            fsync_directory(disk, path.parent)
            return cls(disk, fd, header, os.fspath(path))
        except BaseException:
            disk.close(fd)
            raise

    @classmethod
    def open(cls, disk: Disk, path: Path, *, writable: bool = True) -> DurableMap:
        """Open and check header and length. Raises StoreDamaged, UnsupportedFormat, OSError."""
        fd = disk.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK)
        try:
            return cls.from_fd(disk, fd, os.fspath(path))
        except BaseException:
            disk.close(fd)
            raise

    @classmethod
    def from_fd(cls, disk: Disk, fd: int, file: str, *, chunks: int | None = None) -> DurableMap:
        """Take over a descriptor that another process opened; checked as by ``open``. It stays open on errors.

        ``chunks``: no more than so many of the map, which may have grown; ``refresh`` learns of the rest.
        """
        status = disk.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StoreDamaged(file=file, reason="it is not a regular file")
        header = parse_map_header(pread_all(disk, fd, HEADER_BYTES, 0, file), file=file)
        _check_length(status.st_size, header, file)
        if chunks is not None:
            if header.chunks < chunks:
                raise StoreDamaged(file=file, reason=f"it has {header.chunks} chunks instead of {chunks}")
            header = replace(header, chunks=chunks)
        return cls(disk, fd, header, file)

    def refresh(self) -> None:
        """Learn the length that ``grow_durable_map`` gave the file since. Raises StoreDamaged, OSError.

        For the event loop of the engine that uses this object: nothing else may be in it but writes of pages.
        """
        header = parse_map_header(pread_all(self._disk, self.fd, HEADER_BYTES, 0, self.file), file=self.file)
        if replace(header, chunks=self.header.chunks, head=self.header.head) != self.header:
            raise StoreDamaged(file=self.file, reason="its header became that of another map")
        if header.chunks < self.header.chunks:
            raise StoreDamaged(file=self.file, reason=f"it shrank to {header.chunks} chunks")
        _check_length(self._disk.fstat(self.fd).st_size, header, self.file)
        end = entry_bytes(header.chunks)
        if end > self._end and self._end % EXTENT:
            self._written_out[-1] = 0  # it is longer than what was looked at
        self._written_out.extend(bytes(-(-end // EXTENT) - len(self._written_out)))
        self.header = header
        self._end = end

    def close(self) -> None:
        """Close the descriptor; may be repeated."""
        if self.fd >= 0:
            self._disk.close(self.fd)
            self.fd = -1

    def read_into(self, entries: memoryview) -> None:
        """Copy all entries into a view of format B and ``entry_bytes(chunks)`` bytes, which must hold zeros.

        Holes of the file are left out: they read as zeros. Raises StoreDamaged, OSError.
        """
        at = 0
        while at < self._end:
            start, end = self._next_data(at)
            if start >= self._end:
                return
            pread_into_all(self._disk, self.fd, entries[start:end], FIRST_ENTRY + start, self.file)
            at = end

    def entries(self) -> memoryview:
        """Return a copy of all entries, format I, whole pages."""
        copy = memoryview(bytearray(self._end))
        self.read_into(copy)
        return copy.cast("I")

    def _next_data(self, at: int) -> tuple[int, int]:
        """Return the next (start, end) in the entry area, at or after ``at``, that is no hole of the file."""
        try:
            start = self._disk.lseek(self.fd, FIRST_ENTRY + at, os.SEEK_DATA) - FIRST_ENTRY
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self._end, self._end
            if error.errno == errno.EINVAL:  # a file system without SEEK_DATA: all of it is data
                return at, self._end
            raise
        start = max(start, at)
        if start >= self._end:
            return self._end, self._end
        end = self._disk.lseek(self.fd, FIRST_ENTRY + start, os.SEEK_HOLE) - FIRST_ENTRY
        return start, min(end, self._end)

    def write_out(self, first_chunk: int, end_chunk: int) -> None:
        """Give the entries of these chunks real blocks, so that writing them later allocates nothing.

        Called before data is written for them; no I/O once done. Raises OSError (ENOSPC: that request fails,
        and nothing else). On a full disk only their own pages count: what has blocks already needs none, though
        the rest of its extent, which a growth has added, may find none.
        """
        for extent in range(first_chunk * ENTRY // EXTENT, (end_chunk * ENTRY - 1) // EXTENT + 1):
            if self._written_out[extent]:
                continue
            start, end = extent * EXTENT, min((extent + 1) * EXTENT, self._end)
            try:
                self._fill_holes(start, end)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                first, last = first_chunk * ENTRY // PAGE * PAGE, -(-end_chunk * ENTRY // PAGE) * PAGE
                self._fill_holes(max(start, first), min(end, last))
            else:
                self._written_out[extent] = 1

    @property
    def written_out(self) -> Sequence[int]:
        """For each extent of entries 1 when ``write_out`` has nothing left to do there, else 0. To be read at once."""
        return self._written_out

    def _fill_holes(self, at: int, end: int) -> None:
        while at < end:
            start, stop = self._next_data(at)
            if start > at:
                hole = min(start, end) - at
                pwrite_all(self._disk, self.fd, _ZEROS[:hole], FIRST_ENTRY + at)
            at = stop

    def write_page(self, page: int, entries: bytes) -> None:
        """Write consecutive whole pages of entries from ``page`` on; not durable before ``sync``. Raises OSError."""
        if len(entries) % PAGE or not 0 <= page * PAGE < page * PAGE + len(entries) <= self._end:
            raise ValueError(f"{len(entries)} bytes at page {page} of a map of {self._end} bytes")
        pwrite_all(self._disk, self.fd, entries, FIRST_ENTRY + page * PAGE)

    def write_head(self, head: int) -> None:
        """Name another head layer in the header; not durable before ``sync``. Raises OSError."""
        self.header = replace(self.header, head=head)
        pwrite_all(self._disk, self.fd, encode_map_header(self.header), 0)

    def sync(self) -> None:
        """Make what was written durable. Raises OSError, after which the map must not be trusted (fail-stop)."""
        self._disk.fdatasync(self.fd)


def _check_length(length: int, header: MapHeader, file: str) -> None:
    """Refuse a file that is too short, or is not whole pages; a longer one was about to grow when it was cut."""
    wanted = FIRST_ENTRY + entry_bytes(header.chunks)
    if length < wanted or length % PAGE:
        raise StoreDamaged(file=file, reason=f"it has {length} bytes instead of {wanted}")


def create_durable_map(
    disk: Disk, path: Path, header: MapHeader, entries: memoryview | None = None, *, written_out: bool = False
) -> None:
    """Create a map with these entries (all holes when None), durable at return; see ``create``.

    With entries, or ``written_out``, all of it has blocks.
    """
    created = DurableMap.create(disk, path, header)
    try:
        if entries is None and written_out:
            created.write_out(0, header.chunks)
            created.sync()
        if entries is not None:
            view = entries.cast("B") if entries.format != "B" else entries
            if len(view) != entry_bytes(header.chunks):
                raise ValueError(f"{len(view)} bytes of entries for {header.chunks} chunks")
            created.write_out(0, header.chunks)
            for at in range(0, len(view), EXTENT):
                created.write_page(at // PAGE, bytes(view[at : at + EXTENT]))
            created.sync()
    finally:
        created.close()


def grow_durable_map(disk: Disk, path: Path, size: int) -> None:
    """Make the map fit a volume grown to ``size`` bytes; durable at return; may be repeated. Never shrinks.

    The file first, the header second: a cut between leaves a longer file, which is as good as it was. A growth that
    was cut after the header leaves a map that is longer than its volume, and a later one may want less of it. An engine
    that has the map open goes on with its old length until ``refresh``.
    """
    with opened(disk, path, os.O_RDWR | os.O_NONBLOCK) as fd:
        name = os.fspath(path)
        header = parse_map_header(pread_all(disk, fd, HEADER_BYTES, 0, name), file=name)
        # Written and synced even when it is long enough: what is read here may be in the page cache only.
        chunks = max(chunk_count(size), header.chunks)
        disk.ftruncate(fd, FIRST_ENTRY + entry_bytes(chunks))
        disk.fdatasync(fd)
        pwrite_all(disk, fd, encode_map_header(replace(header, chunks=chunks)), 0)
        disk.fdatasync(fd)
