"""The sealed map of a snapshot: the map of one moment, compressed in frames, immutable, complete or not there.

1. A frame is compressed by itself, so that a part can be read alone: 16 GiB of volume in columns (``mapframes.py``);
   in files of version 1, which are read and not written any more, 1 GiB in one zlib stream.
2. Inflation is bounded: a frame gives exactly the bytes it must, or the file is damaged. No length of the file is
   believed before it was compared with what the chunk count implies.
3. The trailer comes last and names snapshot, length and digest; with the rename after fsync it makes a map either
   complete or absent. Complete is not authentic: the signed record holds the map hash.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from ebsd.domain.errors import SnapshotIdMalformed, StoreDamaged, UnsupportedFormat
from ebsd.domain.ids import LineageId, SnapshotId, format_uuid, parse_snapshot_id, parse_uuid
from ebsd.store.atomic import write_file_atomically
from ebsd.store.disk import Disk, pread_all, read_file
from ebsd.store.durablemap import HEADER_BYTES, KIND_SEALED, MAGIC
from ebsd.store.entries import ENTRY, MAX_CHUNKS, map_hash
from ebsd.store.mapframes import FRAME, OVERHEAD, FrameDamaged, decode_frame, encode_frame

VERSION: Final = 2
TRAILER_MAGIC: Final = b"EBSDMEND"
BLOCK: Final = 64 * 1024
"""Bytes of entries that a reader gives at a time: 1 GiB of volume."""

_PIECE: Final = 1024 * 1024
_HEADER = struct.Struct("<8sII16s24sIIQ")
_TRAILER = struct.Struct("<8s24sQ32s")
_OFFSET = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class SealedMap:
    """A parsed sealed map; ``entries`` has format I and ``chunks`` items."""

    snapshot: SnapshotId
    lineage: LineageId
    chunks: int
    entries: memoryview

    def hash(self) -> bytes:
        """Return the map hash, as the signed record holds it."""
        return map_hash(self.entries, self.chunks)


@dataclass(frozen=True, slots=True)
class _Coding:
    """How the frames of one version hold entries."""

    frame: int
    """Bytes of entries in one."""
    overhead: int
    """Bytes that an encoded one is longer at most."""
    decode: Callable[[memoryview, memoryview, int, int], None]
    """Fills entries from a frame of so many chunks, from a chunk of it on: as ``decode_frame``."""

    def frames(self, chunks: int) -> int:
        return -(-chunks * ENTRY // self.frame)


def _inflate(frame: memoryview, entries: memoryview, chunks: int, first: int) -> None:
    wanted = len(entries)
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(frame, wanted + 1)  # one more, so that "too much" is seen and no more inflated
    except zlib.error as error:
        raise FrameDamaged("does not inflate") from error
    if len(plain) != wanted or not inflater.eof or inflater.unused_data or inflater.unconsumed_tail:
        raise FrameDamaged(f"does not hold {wanted} bytes")
    entries[:] = plain


_CODINGS: Final = {
    1: _Coding(BLOCK, 1024, _inflate),
    VERSION: _Coding(FRAME, OVERHEAD, decode_frame),
}


def most_bytes(chunks: int) -> int:
    """Return how long the sealed map of so many chunks can be, of any version."""
    return (
        HEADER_BYTES
        + _TRAILER.size
        + _OFFSET.size
        + max(chunks * ENTRY + coding.frames(chunks) * (coding.overhead + _OFFSET.size) for coding in _CODINGS.values())
    )


def encode_sealed_map(snapshot: SnapshotId, lineage: LineageId, entries: memoryview, chunks: int) -> bytes:
    """Return the file for the first ``chunks`` entries (format I or B). Raises ValueError."""
    parse_snapshot_id(snapshot)
    view = entries.cast("B") if entries.format != "B" else entries
    if not 0 < chunks <= MAX_CHUNKS or len(view) < chunks * ENTRY:
        raise ValueError(f"{len(view)} bytes of entries for {chunks} chunks")
    body = _HEADER.pack(MAGIC, VERSION, 0, parse_uuid(lineage), snapshot.encode(), KIND_SEALED, 0, chunks)
    body = body.ljust(HEADER_BYTES - 32, b"\0")
    parts = [body + hashlib.sha256(body).digest()]
    at = HEADER_BYTES
    index: list[int] = []
    for start in range(0, chunks * ENTRY, FRAME):
        index.append(at)
        parts.append(encode_frame(view[start : min(start + FRAME, chunks * ENTRY)]))
        at += len(parts[-1])
    index.append(at)
    parts.extend(_OFFSET.pack(offset) for offset in index)
    front = b"".join(parts)
    total = len(front) + _TRAILER.size
    return front + _TRAILER.pack(TRAILER_MAGIC, snapshot.encode(), total, hashlib.sha256(front).digest())


def parse_sealed_map(data: bytes | bytearray, snapshot: SnapshotId, *, file: str) -> SealedMap:
    """Read a sealed map of this snapshot. Raises StoreDamaged and UnsupportedFormat, nothing else."""
    raw = memoryview(data).toreadonly()
    lineage, chunks, coding = _parse_header(bytes(raw[:HEADER_BYTES]), snapshot, file)
    frames = coding.frames(chunks)
    front_end = len(raw) - _TRAILER.size
    index_at = front_end - (frames + 1) * _OFFSET.size
    if index_at < HEADER_BYTES:
        raise StoreDamaged(file=file, reason="it is too short for its chunks")
    magic, name, total, digest = _TRAILER.unpack(raw[front_end:])
    if magic != TRAILER_MAGIC or total != len(raw) or name.rstrip(b"\0") != snapshot.encode():
        raise StoreDamaged(file=file, reason="its trailer is not its own")
    if hashlib.sha256(raw[:front_end]).digest() != digest:
        raise StoreDamaged(file=file, reason="its checksum is wrong")
    entries = memoryview(bytearray(chunks * ENTRY))
    for number, (start, end) in enumerate(_frames(raw, index_at, chunks, coding, file)):
        part = entries[number * coding.frame : (number + 1) * coding.frame]
        _decode(coding, raw[start:end], part, len(part) // ENTRY, 0, f"frame {number}", file)
    return SealedMap(snapshot, lineage, chunks, entries.toreadonly().cast("I"))


def _decode(
    coding: _Coding, frame: memoryview, entries: memoryview, chunks: int, first: int, name: str, file: str
) -> None:
    try:
        coding.decode(frame, entries, chunks, first)
    except FrameDamaged as error:
        raise StoreDamaged(file=file, reason=f"{name} {error}") from error


def _parse_header(raw: bytes, snapshot: SnapshotId, file: str) -> tuple[LineageId, int, _Coding]:
    if len(raw) != HEADER_BYTES:
        raise StoreDamaged(file=file, reason="it is too short for a map")
    if hashlib.sha256(raw[:-32]).digest() != raw[-32:]:
        raise StoreDamaged(file=file, reason="the checksum of its header is wrong")
    magic, version, flags, lineage, name, kind, head, chunks = _HEADER.unpack(raw[: _HEADER.size])
    if magic != MAGIC:
        raise StoreDamaged(file=file, reason="it is not a map")
    for known, what in (
        (version in _CODINGS, f"version {version}"),
        (flags == 0, f"feature flags {flags:#x}"),
        (kind == KIND_SEALED, f"kind {kind} where a sealed map was expected"),
    ):
        if not known:
            raise UnsupportedFormat(file=file, what=what)
    try:
        named = parse_snapshot_id(name.rstrip(b"\0").decode("ascii"))
    except (UnicodeDecodeError, SnapshotIdMalformed) as error:
        raise StoreDamaged(file=file, reason="its header names no snapshot") from error
    if named != snapshot:
        raise StoreDamaged(file=file, reason=f"it is the map of {named}")
    if head or any(raw[_HEADER.size : -32]):
        raise StoreDamaged(file=file, reason="reserved bytes of its header are not zero")
    if not 0 < chunks <= MAX_CHUNKS:
        raise StoreDamaged(file=file, reason=f"it has {chunks} chunks")
    return LineageId(format_uuid(lineage)), chunks, _CODINGS[version]


def _frames(raw: memoryview, index_at: int, chunks: int, coding: _Coding, file: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each frame; they must follow each other from the header to the index without gaps."""
    offsets = (
        _OFFSET.unpack_from(raw, index_at + number * _OFFSET.size)[0] for number in range(coding.frames(chunks) + 1)
    )
    yield from pairwise(_checked_offsets(offsets, index_at, coding, file))


def _checked_offsets(offsets: Iterable[int], index_at: int, coding: _Coding, file: str) -> Iterator[int]:
    at = HEADER_BYTES
    for number, offset in enumerate(offsets):
        if not number and offset != at:
            raise StoreDamaged(file=file, reason="its first frame is not behind its header")
        if number and not at < offset <= min(index_at, at + coding.frame + coding.overhead):
            raise StoreDamaged(file=file, reason=f"frame {number - 1} has an impossible place")
        at = offset
        yield at
    if at != index_at:
        raise StoreDamaged(file=file, reason="there is something between its frames and its index")


def write_sealed_map(
    disk: Disk, path: Path, snapshot: SnapshotId, lineage: LineageId, entries: memoryview, chunks: int
) -> bytes:
    """Write a sealed map, durable and complete at return; return its map hash. Raises OSError, ValueError.

    The caller has made durable every layer that an entry names before the snapshot is committed (I1).
    """
    write_file_atomically(disk, path, encode_sealed_map(snapshot, lineage, entries, chunks))
    return map_hash(entries, chunks)


def read_sealed_map(disk: Disk, path: Path, snapshot: SnapshotId, *, most_chunks: int = MAX_CHUNKS) -> SealedMap:
    """Read a sealed map; errors as ``parse_sealed_map``, and FileNotFoundError, OSError.

    ``most_chunks`` bounds the memory by what the caller knows of the size.
    """
    data = read_file(disk, path, most_bytes(most_chunks))
    parsed = _parse_header(bytes(data[:HEADER_BYTES]), snapshot, os.fspath(path))
    if parsed[1] > most_chunks:
        raise StoreDamaged(file=os.fspath(path), reason=f"it has {parsed[1]} chunks, {most_chunks} at most were due")
    return parse_sealed_map(data, snapshot, file=os.fspath(path))


class SealedMapReader:
    """A sealed map read in blocks of 1 GiB of volume, for those who look at many at once; owns its descriptor.

    Header, trailer, index and checksum are checked when it is opened; a frame when it is read.
    """

    def __init__(self, disk: Disk, path: Path, snapshot: SnapshotId) -> None:
        """Raises StoreDamaged, UnsupportedFormat, OSError."""
        self._disk = disk
        self.file = os.fspath(path)
        self._fd = disk.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = disk.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise StoreDamaged(file=self.file, reason="it is not a regular file")
            length = status.st_size
            front = pread_all(disk, self._fd, min(HEADER_BYTES, length), 0, self.file)
            self.lineage, self.chunks, self._coding = _parse_header(bytes(front), snapshot, self.file)
            frames = self._coding.frames(self.chunks)
            index_at = length - _TRAILER.size - (frames + 1) * _OFFSET.size
            if index_at < HEADER_BYTES:
                raise StoreDamaged(file=self.file, reason="it is too short for its chunks")
            trailer = pread_all(disk, self._fd, _TRAILER.size, length - _TRAILER.size, self.file)
            magic, name, total, digest = _TRAILER.unpack(trailer)
            if magic != TRAILER_MAGIC or total != length or name.rstrip(b"\0") != snapshot.encode():
                raise StoreDamaged(file=self.file, reason="its trailer is not its own")
            if self._digest(length - _TRAILER.size) != digest:
                raise StoreDamaged(file=self.file, reason="its checksum is wrong")
            self._index_at = index_at
            offsets = (self._offset(number) for number in range(frames + 1))
            for _ in _checked_offsets(offsets, index_at, self._coding, self.file):
                pass
        except BaseException:
            self.close()
            raise

    def _digest(self, end: int) -> bytes:
        digest = hashlib.sha256()
        for at in range(0, end, _PIECE):
            digest.update(pread_all(self._disk, self._fd, min(_PIECE, end - at), at, self.file))
        return digest.digest()

    def _offset(self, number: int) -> int:
        raw = pread_all(self._disk, self._fd, _OFFSET.size, self._index_at + number * _OFFSET.size, self.file)
        return int(_OFFSET.unpack(raw)[0])

    def block(self, number: int) -> bytes:
        """Return BLOCK bytes of entries, of the last one perhaps fewer. Raises StoreDamaged, OSError."""
        size = self._coding.frame
        frame, at = divmod(number * BLOCK, size)
        start, end = self._offset(frame), self._offset(frame + 1)
        if not HEADER_BYTES <= start < end <= start + size + self._coding.overhead:
            raise StoreDamaged(file=self.file, reason=f"frame {frame} has an impossible place")
        raw = memoryview(pread_all(self._disk, self._fd, end - start, start, self.file))
        covered = min(size, self.chunks * ENTRY - frame * size)
        # Not kept: there may be thousands of readers at a time.
        entries = bytearray(min(BLOCK, covered - at))
        _decode(self._coding, raw, memoryview(entries), covered // ENTRY, at // ENTRY, f"frame {frame}", self.file)
        return bytes(entries)

    def close(self) -> None:
        """Close the descriptor; may be repeated."""
        if self._fd >= 0:
            self._disk.close(self._fd)
            self._fd = -1
