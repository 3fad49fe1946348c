"""Which blocks of 512 KiB hold data in a map, and which differ between two maps of a lineage. No I/O.

Within a lineage an entry names the layer that holds a chunk, and a layer never changes once it is sealed: equal entries
mean equal bytes. Unequal ones mean that the chunk was written, zeroed or discarded between the two.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from ebsd.domain.blocks import CHUNKS_PER_BLOCK
from ebsd.store.entries import ENTRY

_BLOCK_BYTES: Final = CHUNKS_PER_BLOCK * ENTRY
_WINDOW: Final = 2048 * _BLOCK_BYTES
"""Bytes of entries that are compared at once: 1 GiB of volume."""
_HOLES: Final = bytes(_WINDOW)
_NONE: Final = bytes(_BLOCK_BYTES)


class Listed(NamedTuple):
    """Some blocks, ascending, and with which block to go on; None when there are no further ones."""

    blocks: list[int]
    following: int | None


def _view(entries: memoryview) -> memoryview:
    return entries.cast("B") if entries.format != "B" else entries


def holds_data(entries: memoryview, block: int) -> bool:
    """Say whether some chunk of a block is stored; False behind the end of the map."""
    raw = _view(entries)[block * _BLOCK_BYTES : (block + 1) * _BLOCK_BYTES]
    return any(bytes(raw))


def stored_blocks(entries: memoryview, start: int, limit: int) -> Listed:
    """Return up to ``limit`` blocks from ``start`` on that hold data."""
    return changed_blocks(memoryview(b""), entries, start, limit)


def changed_blocks(first: memoryview, second: memoryview, start: int, limit: int) -> Listed:
    """Return up to ``limit`` blocks from ``start`` on whose entries differ; a map ends with holes for ever."""
    one, other = _view(first), _view(second)
    found: list[int] = []
    length = max(len(one), len(other))
    at = start * _BLOCK_BYTES
    while at < length:
        # Windows begin at multiples, so that most are compared whole: bytes at once, memoryviews item by item.
        end = min(length, at - at % _WINDOW + _WINDOW)
        a, b = _window(one, at, end), _window(other, at, end)
        if a == b:
            at = end
            continue
        for place in range(0, end - at, _BLOCK_BYTES):
            if a[place : place + _BLOCK_BYTES] != b[place : place + _BLOCK_BYTES]:
                if len(found) == limit:
                    return Listed(found, (at + place) // _BLOCK_BYTES)
                found.append((at + place) // _BLOCK_BYTES)
        at = end
    return Listed(found, None)


def _window(raw: memoryview, at: int, end: int) -> bytes:
    """Return the entries [at, end), filled up with holes behind the end of the map."""
    part = bytes(raw[at:end])
    return part + _HOLES[: end - at - len(part)]


def overlay(entries: memoryview, written: bytes, layer: int, chunks: int) -> None:
    """Name ``layer`` in the entries (format I) of all chunks of the blocks whose bits are set in ``written``."""
    for block in written_blocks(written):
        first = block * CHUNKS_PER_BLOCK
        for chunk in range(first, min(first + CHUNKS_PER_BLOCK, chunks)):
            entries[chunk] = layer


def written_blocks(written: bytes) -> list[int]:
    """Return the numbers of the bits that are set, the lowest bit of the first byte being 0."""
    return [8 * at + bit for at, byte in enumerate(written) if byte for bit in range(8) if byte >> bit & 1]
