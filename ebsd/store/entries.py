"""Map entries: the u32 per chunk that both maps hold; their meaning, digest and structure. No I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from typing import Final

from ebsd.domain.errors import StoreDamaged

HOLE: Final = 0
"""The chunk reads as zeros and no layer holds it (I6)."""

FIRST_RESERVED: Final = 0xFFFFFF00
"""Entries from here on have no meaning yet and are refused, so that one can be given to them later."""

ENTRY: Final = 4
PAGE: Final = 4096
"""Bytes of one map page: the unit of the dirty marks and of the writes of a flush."""

ENTRIES_PER_PAGE: Final = PAGE // ENTRY
PAGE_SHIFT: Final = 10
"""chunk >> PAGE_SHIFT is the map page of a chunk."""

MAX_CHUNKS: Final = 1 << 30
"""Chunks of 64 TiB, the largest volume."""

_BLOCK: Final = 64 * 1024
_LABEL: Final = b"ebsd/1/map\0"


def page_count(chunks: int) -> int:
    """Return how many map pages the entries of ``chunks`` chunks fill."""
    return -(-chunks // ENTRIES_PER_PAGE)


def entry_bytes(chunks: int) -> int:
    """Return the bytes of the entries of a map, whole pages."""
    return page_count(chunks) * PAGE


def map_hash(entries: memoryview, chunks: int) -> bytes:
    """Return SHA-256("ebsd/1/map\\0" || u64 chunk count || entries) over the first ``chunks`` entries.

    ``entries`` is a view of bytes (format B) or of u32 (format I); the signed record of a clean volume holds
    this value.
    """
    view = entries.cast("B") if entries.format != "B" else entries
    digest = begin_map_hash(chunks)
    digest.update(view[: chunks * ENTRY])
    return digest.digest()


def begin_map_hash(chunks: int) -> hashlib._Hash:
    """Return the map hash of ``chunks`` chunks before any entry: give it their entries in order, then ``digest``."""
    digest = hashlib.sha256(_LABEL)
    digest.update(chunks.to_bytes(8, "little"))
    return digest


def _blocks(entries: memoryview) -> Iterator[tuple[int, bytes]]:
    view = entries.cast("B") if entries.format != "B" else entries
    for at in range(0, len(view), _BLOCK):
        yield at // ENTRY, bytes(view[at : at + _BLOCK])


def is_all_holes(entries: memoryview) -> bool:
    """Say whether no chunk is stored. Compares copies of 64 KiB: memoryviews compare item by item, bytes at once."""
    zeros = bytes(_BLOCK)
    return all(block == zeros or not any(block) for _, block in _blocks(entries))


def named_layers(entries: memoryview) -> set[int]:
    """Return the numbers of all layers that some entry names. A block equal to the one before costs one compare."""
    named: set[int] = set()
    previous = b""
    for _, block in _blocks(entries):
        if block != previous:
            named.update(memoryview(block).cast("I"))
            previous = block
    named.discard(HOLE)
    return named


def check_map_structure(
    entries: memoryview,
    chunks: int,
    layers: Collection[int],
    *,
    file: str,
    head: int | None = None,
    has_data: Callable[[int, int], bool] | None = None,
) -> set[int]:
    """Check what can be checked of a map without a signature, and return the layers it names.

    Every one of the first ``chunks`` entries must be 0, one of ``layers`` or ``head``; those behind must be 0.
    Pass ``head`` only when entries may name it although no table does. ``has_data(layer, chunk)``, when given,
    is asked for every stored chunk (SEEK_DATA: a chunk that was written is never a hole of its file, so "no"
    is damage; "yes" proves nothing). Raises StoreDamaged with the first chunk that breaks the rule.
    """
    allowed = {HOLE, *layers}
    if head is not None:
        allowed.add(head)
    body = entries.cast("B") if entries.format != "B" else entries
    if any(body[chunks * ENTRY :]):
        raise StoreDamaged(file=file, reason="it has entries behind its last chunk")
    named: set[int] = set()
    previous = b""
    for first, block in _blocks(body[: chunks * ENTRY]):
        if block != previous:
            values = memoryview(block).cast("I")
            found = set(values)
            if not found <= allowed:
                at, value = next((i, v) for i, v in enumerate(values) if v not in allowed)
                what = "the reserved value" if value >= FIRST_RESERVED else "the unknown layer"
                raise StoreDamaged(file=file, reason=f"chunk {first + at} names {what} {value:#x}")
            named |= found
            previous = block
        if has_data is not None:
            for at, value in enumerate(memoryview(block).cast("I")):
                if value != HOLE and not has_data(value, first + at):
                    raise StoreDamaged(file=file, reason=f"chunk {first + at} has no data in layer {value}")
    named.discard(HOLE)
    return named
