"""The sealed map of a snapshot: the map of one moment, compressed in frames, immutable, complete or not there.

1. A frame is 64 KiB of entries (1 GiB of volume), compressed by itself, so that a part can be read alone.
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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from ebsd.domain.errors import SnapshotIdMalformed, StoreDamaged, UnsupportedFormat
from ebsd.domain.ids import LineageId, SnapshotId, format_uuid, parse_snapshot_id, parse_uuid
from ebsd.store.atomic import write_file_atomically
from ebsd.store.disk import Disk, pread_all, read_file
from ebsd.store.durablemap import HEADER_BYTES, KIND_SEALED, MAGIC, VERSION
from ebsd.store.entries import ENTRY, MAX_CHUNKS, map_hash

FRAME: Final = 64 * 1024
TRAILER_MAGIC: Final = b"EBSDMEND"
MAX_FRAME: Final = FRAME + 1024
"""Bytes of a compressed frame: zlib adds at most 0.03 % and 11 bytes to what it cannot compress."""

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


def frame_count(chunks: int) -> int:
    return -(-chunks * ENTRY // FRAME)


def _deflate(frame: bytes) -> bytes:
    """Compress one frame: most of a map is holes, one layer, or single chunks of few layers among holes."""
    if frame == frame[:ENTRY] * (len(frame) // ENTRY):
        return _deflate_uniform(frame[:ENTRY], len(frame))
    runs = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    return min(runs.compress(frame) + runs.flush(), zlib.compress(frame, 1), key=len)


@lru_cache(maxsize=64)
def _deflate_uniform(entry: bytes, length: int) -> bytes:
    return zlib.compress(entry * (length // ENTRY), 9)


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
        parts.append(_deflate(bytes(view[start : min(start + FRAME, chunks * ENTRY)])))
        at += len(parts[-1])
    index.append(at)
    parts.extend(_OFFSET.pack(offset) for offset in index)
    front = b"".join(parts)
    total = len(front) + _TRAILER.size
    return front + _TRAILER.pack(TRAILER_MAGIC, snapshot.encode(), total, hashlib.sha256(front).digest())


def parse_sealed_map(data: bytes | bytearray, snapshot: SnapshotId, *, file: str) -> SealedMap:
    """Read a sealed map of this snapshot. Raises StoreDamaged and UnsupportedFormat, nothing else."""
    raw = memoryview(data).toreadonly()
    lineage, chunks = _parse_header(bytes(raw[:HEADER_BYTES]), snapshot, file)
    frames = frame_count(chunks)
    front_end = len(raw) - _TRAILER.size
    index_at = front_end - (frames + 1) * _OFFSET.size
    if index_at < HEADER_BYTES:
        raise StoreDamaged(file=file, reason="it is too short for its chunks")
    magic, name, total, digest = _TRAILER.unpack(raw[front_end:])
    if magic != TRAILER_MAGIC or total != len(raw) or name.rstrip(b"\0") != snapshot.encode():
        raise StoreDamaged(file=file, reason="its trailer is not its own")
    if hashlib.sha256(raw[:front_end]).digest() != digest:
        raise StoreDamaged(file=file, reason="its checksum is wrong")
    entries = bytearray(chunks * ENTRY)
    for number, (start, end) in enumerate(_frames(raw, index_at, frames, file)):
        first = number * FRAME
        wanted = min(FRAME, len(entries) - first)
        entries[first : first + wanted] = _inflate(raw[start:end], wanted, number, file)
    return SealedMap(snapshot, lineage, chunks, memoryview(entries).toreadonly().cast("I"))


def _parse_header(raw: bytes, snapshot: SnapshotId, file: str) -> tuple[LineageId, int]:
    if len(raw) != HEADER_BYTES:
        raise StoreDamaged(file=file, reason="it is too short for a map")
    if hashlib.sha256(raw[:-32]).digest() != raw[-32:]:
        raise StoreDamaged(file=file, reason="the checksum of its header is wrong")
    magic, version, flags, lineage, name, kind, head, chunks = _HEADER.unpack(raw[: _HEADER.size])
    if magic != MAGIC:
        raise StoreDamaged(file=file, reason="it is not a map")
    for known, what in (
        (version == VERSION, f"version {version}"),
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
    return LineageId(format_uuid(lineage)), chunks


def _frames(raw: memoryview, index_at: int, frames: int, file: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each frame; they must follow each other from the header to the index without gaps."""
    at = HEADER_BYTES
    (first,) = _OFFSET.unpack_from(raw, index_at)
    if first != at:
        raise StoreDamaged(file=file, reason="its first frame is not behind its header")
    for number in range(1, frames + 1):
        (end,) = _OFFSET.unpack_from(raw, index_at + number * _OFFSET.size)
        if not at < end <= min(index_at, at + MAX_FRAME):
            raise StoreDamaged(file=file, reason=f"frame {number - 1} has an impossible place")
        yield at, end
        at = end
    if at != index_at:
        raise StoreDamaged(file=file, reason="there is something between its frames and its index")


def _inflate(frame: memoryview, wanted: int, number: int, file: str) -> bytes:
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(frame, wanted + 1)  # one more, so that "too much" is seen and no more inflated
    except zlib.error as error:
        raise StoreDamaged(file=file, reason=f"frame {number} does not inflate") from error
    if len(plain) != wanted or not inflater.eof or inflater.unused_data or inflater.unconsumed_tail:
        raise StoreDamaged(file=file, reason=f"frame {number} does not hold {wanted} bytes")
    return plain


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
    frames = frame_count(most_chunks)
    limit = HEADER_BYTES + frames * (MAX_FRAME + _OFFSET.size) + _OFFSET.size + _TRAILER.size
    data = read_file(disk, path, limit)
    parsed = _parse_header(bytes(data[:HEADER_BYTES]), snapshot, os.fspath(path))
    if parsed[1] > most_chunks:
        raise StoreDamaged(file=os.fspath(path), reason=f"it has {parsed[1]} chunks, {most_chunks} at most were due")
    return parse_sealed_map(data, snapshot, file=os.fspath(path))


class SealedMapReader:
    """A sealed map read frame by frame, for those who look at many at once; owns its descriptor.

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
            self.lineage, self.chunks = _parse_header(bytes(front), snapshot, self.file)
            frames = frame_count(self.chunks)
            index_bytes = (frames + 1) * _OFFSET.size
            index_at = length - _TRAILER.size - index_bytes
            if index_at < HEADER_BYTES:
                raise StoreDamaged(file=self.file, reason="it is too short for its chunks")
            trailer = pread_all(disk, self._fd, _TRAILER.size, length - _TRAILER.size, self.file)
            magic, name, total, digest = _TRAILER.unpack(trailer)
            if magic != TRAILER_MAGIC or total != length or name.rstrip(b"\0") != snapshot.encode():
                raise StoreDamaged(file=self.file, reason="its trailer is not its own")
            if self._digest(length - _TRAILER.size) != digest:
                raise StoreDamaged(file=self.file, reason="its checksum is wrong")
            self._index_at = index_at
            at = HEADER_BYTES
            for number in range(frames + 1):
                offset = self._offset(number)
                if number and not at < offset <= min(index_at, at + MAX_FRAME):
                    raise StoreDamaged(file=self.file, reason=f"frame {number - 1} has an impossible place")
                if not number and offset != at:
                    raise StoreDamaged(file=self.file, reason="its first frame is not behind its header")
                at = offset
            if at != index_at:
                raise StoreDamaged(file=self.file, reason="there is something between its frames and its index")
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

    def frame(self, number: int) -> bytes:
        """Return the entries of one frame: FRAME bytes, of the last one perhaps fewer. Raises StoreDamaged, OSError."""
        start, end = self._offset(number), self._offset(number + 1)
        if not HEADER_BYTES <= start < end <= start + MAX_FRAME:
            raise StoreDamaged(file=self.file, reason=f"frame {number} has an impossible place")
        raw = pread_all(self._disk, self._fd, end - start, start, self.file)
        return _inflate(memoryview(raw), min(FRAME, self.chunks * ENTRY - number * FRAME), number, self.file)

    def close(self) -> None:
        """Close the descriptor; may be repeated."""
        if self._fd >= 0:
            self._disk.close(self._fd)
            self._fd = -1
