"""Byte-range arithmetic: how a request on a volume falls into chunks, segments and sectors. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ebsd.domain.units import CHUNK, CHUNKS_PER_SEGMENT, SECTOR, SEGMENT


@dataclass(frozen=True, slots=True)
class ChunkPiece:
    """The part of a byte range that lies in one chunk."""

    chunk: int
    """Number of the chunk in the volume."""
    start: int
    """First byte of the piece, counted from the start of the chunk."""
    length: int
    """Bytes of the piece; at least 1, at most CHUNK - start."""
    at: int
    """Offset of the piece in the caller's buffer."""

    @property
    def is_whole(self) -> bool:
        return self.length == CHUNK

    @property
    def is_sector_aligned(self) -> bool:
        return self.start % SECTOR == 0 and self.length % SECTOR == 0


def pieces(offset: int, length: int) -> Iterator[ChunkPiece]:
    """Split the volume's bytes [offset, offset + length) at chunk borders, in ascending order."""
    if offset < 0 or length < 0:
        raise ValueError(f"negative range: offset {offset}, length {length}")
    at = 0
    while at < length:
        chunk, start = divmod(offset + at, CHUNK)
        take = min(CHUNK - start, length - at)
        yield ChunkPiece(chunk, start, take, at)
        at += take


def chunk_count(size: int) -> int:
    """Return how many chunks a volume of ``size`` bytes has; the last one may be cut by the size."""
    return -(-size // CHUNK)


def segment_count(size: int) -> int:
    """Return how many segment files a layer of a volume of ``size`` bytes has."""
    return -(-size // SEGMENT)


def segment_size(size: int, segment: int) -> int:
    """Return the length in bytes of one segment file: whole chunks, at most SEGMENT."""
    if not 0 <= segment < segment_count(size):
        raise ValueError(f"segment {segment} of a volume of {size} bytes")
    return min(SEGMENT, chunk_count(size) * CHUNK - segment * SEGMENT)


def chunk_place(chunk: int) -> tuple[int, int]:
    """Return (segment number, byte offset in the segment file) of a chunk: identity placement."""
    segment, index = divmod(chunk, CHUNKS_PER_SEGMENT)
    return segment, index * CHUNK


def sector_cover(start: int, length: int) -> tuple[int, int]:
    """Return (start, length) of the smallest run of whole sectors that holds the byte range."""
    first = start - start % SECTOR
    end = start + length
    end += -end % SECTOR
    return first, end - first
