"""All maps of a lineage against its layers, 1 GiB of volume at a time: entries, data that is missing, space that leaks.

1. Maps are walked side by side, so that nothing that grows with a volume is kept: one block of entries of each map.
2. A map that cannot be read further is told once; the others go on. Then nothing is said about leaked space.
3. While a volume is in use, its durable map and its files change. "No data" is believed only while the entry stays.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from ebsd.domain.errors import EbsdError, StoreDamaged
from ebsd.domain.ids import LineageId, SnapshotId
from ebsd.domain.units import CHUNK, CHUNKS_PER_SEGMENT
from ebsd.store.disk import Disk, pread_all
from ebsd.store.durablemap import FIRST_ENTRY, DurableMap
from ebsd.store.entries import ENTRY, FIRST_RESERVED, HOLE, begin_map_hash
from ebsd.store.findings import Code, Finding
from ebsd.store.layers import segment_name
from ebsd.store.sealedmap import BLOCK, SealedMapReader

if TYPE_CHECKING:
    import hashlib

BLOCK_CHUNKS: Final = BLOCK // ENTRY
_BLOCK_BYTES: Final = BLOCK_CHUNKS * CHUNK
_BLOCKS_PER_SEGMENT: Final = CHUNKS_PER_SEGMENT // BLOCK_CHUNKS
_ALL: Final = b"\1" * BLOCK_CHUNKS
_NONE: Final = bytes(BLOCK_CHUNKS)
_ALL_HOLES: Final = bytes(BLOCK)
OPEN_FILES: Final = 256
"""Segments that are open at once."""


class MapReader(Protocol):
    """A map, read in blocks of 16384 entries; ``lineage`` and ``chunks`` are what its header says."""

    lineage: LineageId
    chunks: int

    def block(self, index: int) -> bytes:
        """Return a block of entries, the last one perhaps shorter. Raises StoreDamaged, OSError."""
        ...

    def close(self) -> None: ...


class DurableReader:
    """The durable map of a volume."""

    def __init__(self, disk: Disk, path: Path) -> None:
        """Raises StoreDamaged, UnsupportedFormat, OSError."""
        self._disk = disk
        self._map = DurableMap.open(disk, path, writable=False)
        self.header = self._map.header
        self.lineage, self.chunks = self.header.lineage, self.header.chunks

    def block(self, index: int) -> bytes:
        count = min(BLOCK_CHUNKS, self.chunks - index * BLOCK_CHUNKS)
        at = FIRST_ENTRY + index * BLOCK
        return bytes(pread_all(self._disk, self._map.fd, count * ENTRY, at, self._map.file))

    def close(self) -> None:
        self._map.close()


class SealedReader:
    """The sealed map of a snapshot."""

    def __init__(self, disk: Disk, path: Path, snapshot: SnapshotId) -> None:
        """Raises StoreDamaged, UnsupportedFormat, OSError."""
        self._sealed = SealedMapReader(disk, path, snapshot)
        self.lineage, self.chunks = self._sealed.lineage, self._sealed.chunks

    def block(self, index: int) -> bytes:
        return self._sealed.block(index)

    def close(self) -> None:
        self._sealed.close()


@dataclass(slots=True)
class MapInHand:
    """A map with what its entries are judged by."""

    resource: str
    file: str
    reader: MapReader
    allowed: Collection[int]
    """Layers that the signed record that covers it knows; empty when only holes are legal."""
    heads_of_others: Collection[int]
    """Layers that other volumes write to, which no entry of this map may name."""
    signed_chunks: int = 0
    map_hash: bytes | None = None
    """What the record that covers it was signed over, of its first ``signed_chunks`` chunks; None: not covered."""
    changing: bool = False
    """Whether a process writes to it meanwhile."""
    digest: hashlib._Hash | None = None
    behind_signed: bool = False
    """Whether some entry behind the signed chunks is no hole."""
    told: set[str] = field(default_factory=set)
    broken: bool = False


class LayerFiles:
    """Which chunks of the layers hold data, by SEEK_DATA; keeps some segments open. Raises OSError."""

    def __init__(self, disk: Disk, dirfd: int, uuids: Mapping[int, bytes]) -> None:
        self._disk = disk
        self._dirfd = dirfd
        self._uuids = uuids
        self._open: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._gaps: dict[tuple[int, int], tuple[int, int]] = {}
        """(layer, segment) -> (first, end) of bytes without data behind the block that was asked for last."""

    def close(self) -> None:
        for fd in self._open.values():
            if fd >= 0:
                self._disk.close(fd)
        self._open.clear()

    def _segment(self, layer: int, segment: int) -> int:
        """Return a descriptor, -1 when there is no such file or it cannot be read (which is told elsewhere)."""
        key = layer, segment
        fd = self._open.get(key)
        if fd is None:
            try:
                name = segment_name(layer, self._uuids[layer], segment)
                fd = self._disk.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._dirfd)
                if not stat.S_ISREG(self._disk.fstat(fd).st_mode):
                    self._disk.close(fd)
                    fd = -1
            except (OSError, KeyError, ValueError):
                fd = -1
            self._open[key] = fd
            if len(self._open) > OPEN_FILES:
                _, oldest = self._open.popitem(last=False)
                if oldest >= 0:
                    self._disk.close(oldest)
        self._open.move_to_end(key)
        return fd

    def flags(self, layer: int, block: int) -> bytes | None:
        """Return a byte per chunk of the block, 1 where some of it holds data; None when the file cannot be asked."""
        segment, index = divmod(block, _BLOCKS_PER_SEGMENT)
        fd = self._segment(layer, segment)
        if fd < 0:
            return None
        start, end = index * _BLOCK_BYTES, (index + 1) * _BLOCK_BYTES
        gap = self._gaps.get((layer, segment), (0, 0))
        if gap[0] <= start and end <= gap[1]:
            return _NONE
        found = bytearray(BLOCK_CHUNKS)
        at = start
        while at < end:
            first = self._seek(fd, at, os.SEEK_DATA)
            if first is None:
                # What is written later is no leak, and "no data" is asked for again.
                self._gaps[layer, segment] = (end, 1 << 62)
                break
            if first >= end:
                self._gaps[layer, segment] = (end, first)
                break
            last = min(self._seek(fd, first, os.SEEK_HOLE) or end, end)
            low, high = (first - start) // CHUNK, -(-(last - start) // CHUNK)
            found[low:high] = b"\1" * (high - low)
            at = max(last, first + 1)
        return bytes(found)

    def has_data(self, layer: int, chunk: int) -> bool | None:
        """Ask for one chunk, anew; None when the file cannot be asked."""
        segment, index = divmod(chunk, CHUNKS_PER_SEGMENT)
        fd = self._segment(layer, segment)
        if fd < 0:
            return None
        first = self._seek(fd, index * CHUNK, os.SEEK_DATA)
        return first is not None and first < (index + 1) * CHUNK

    def _seek(self, fd: int, at: int, whence: int) -> int | None:
        try:
            return self._disk.lseek(fd, at, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            if error.errno == errno.EINVAL and whence == os.SEEK_DATA:  # a file system that cannot say: all is data
                return at
            raise


@dataclass(slots=True)
class Comparison:
    """What came out besides the findings."""

    complete: bool = True
    """Whether every map was read to its end."""
    leaked: dict[int, int] = field(default_factory=dict)
    """Layer -> chunks that hold data and that no map names, of the layers asked for."""
    named: set[int] = field(default_factory=set)
    """Layers that some entry names."""


def compare(
    maps: list[MapInHand],
    files: LayerFiles,
    *,
    known: Collection[int],
    sweepable: Collection[int],
    blocks_of_layers: int,
    unencrypted: bool,
    emit: Callable[[Finding], None],
    step: Callable[[int], None],
) -> Comparison:
    """Walk all maps and layers. ``known``: layers of the table; ``sweepable``: those whose unnamed chunks are leaks;
    ``blocks_of_layers``: blocks that the longest layer has. ``step`` is called with the chunks that were looked at.
    """
    result = Comparison()
    for one in maps:
        one.digest = begin_map_hash(one.signed_chunks) if one.map_hash is not None else None
    most = max((_blocks(one.reader.chunks) for one in maps), default=0)
    for index in range(max(most, blocks_of_layers)):
        distinct: dict[bytes, list[MapInHand]] = {}
        for one in maps:
            if one.broken or index >= _blocks(one.reader.chunks):
                continue
            try:
                block = one.reader.block(index)
            except (EbsdError, OSError) as error:
                one.broken = True
                result.complete = False
                reason = str(error.facts.get("reason", error)) if isinstance(error, StoreDamaged) else str(error)
                code = Code.MAP_DAMAGED if isinstance(error, EbsdError) else Code.UNREADABLE
                emit(Finding(code, one.resource, one.file, reason))
                continue
            _digest(one, index, block)
            distinct.setdefault(block, []).append(one)
        named = _look_at(index, distinct, files, known, unencrypted, emit, result)
        for layer in sweepable:
            data = files.flags(layer, index)
            if data is None or data == _NONE:
                continue
            spare = _number(data) & ~named.get(layer, 0)
            if spare:
                result.leaked[layer] = result.leaked.get(layer, 0) + spare.bit_count()
        step(BLOCK_CHUNKS)
    for one in maps:
        if one.digest is None or one.broken:
            continue
        if one.digest.digest() != one.map_hash or one.behind_signed:
            emit(Finding(Code.MAP_UNSIGNED, one.resource, one.file, "it is not the one its record was signed over"))
    return result


def _blocks(chunks: int) -> int:
    return -(-chunks // BLOCK_CHUNKS)


def _number(flags: bytes) -> int:
    return int.from_bytes(flags, "little")


def _digest(one: MapInHand, index: int, block: bytes) -> None:
    if one.digest is None:
        return
    left = one.signed_chunks * ENTRY - index * BLOCK
    if left > 0:
        one.digest.update(block[:left])
    if any(block[max(left, 0) :]):
        one.behind_signed = True


def _look_at(
    index: int,
    distinct: Mapping[bytes, list[MapInHand]],
    files: LayerFiles,
    known: Collection[int],
    unencrypted: bool,
    emit: Callable[[Finding], None],
    result: Comparison,
) -> dict[int, int]:
    """Judge one block of every map; return layer -> bytes (as a number) that are 1 where some map names the chunk."""
    named: dict[int, int] = {}
    for block, readers in distinct.items():
        if block == _ALL_HOLES:
            continue
        values = memoryview(block).cast("I")
        found = set(values)
        whole = len(found) == 1
        found.discard(HOLE)
        for one in readers:
            _judge_entries(one, index, values, found, known, emit)
        for layer in found:
            if layer not in known:
                continue
            result.named.add(layer)
            flags = _ALL[: len(values)] if whole else bytes(value == layer for value in values)
            mask = _number(flags)
            named[layer] = named.get(layer, 0) | mask
            data = files.flags(layer, index)
            missing = 0 if data is None else mask & ~_number(data)
            if missing:
                _judge_missing(readers, layer, index, missing, files, unencrypted, emit)
    return named


def _judge_entries(
    one: MapInHand,
    index: int,
    values: memoryview,
    found: Iterable[int],
    known: Collection[int],
    emit: Callable[[Finding], None],
) -> None:
    """Tell of each layer once per map that an entry names and may not."""
    for layer in sorted(found):
        if layer >= FIRST_RESERVED:
            what = f"the reserved value {layer:#x}"
        elif layer not in known:
            what = f"the unknown layer {layer:#x}"
        elif layer in one.heads_of_others:
            what = f"layer {layer}, to which another volume writes"
        elif layer not in one.allowed:
            what = f"layer {layer}, which its record does not know" if one.allowed else "data, and nobody has signed it"
        else:
            continue
        if what not in one.told:
            one.told.add(what)
            chunk = index * BLOCK_CHUNKS + next(at for at, value in enumerate(values) if value == layer)
            emit(Finding(Code.MAP_ENTRY, one.resource, one.file, f"chunk {chunk} names {what}"))


def _judge_missing(
    readers: list[MapInHand],
    layer: int,
    index: int,
    missing: int,
    files: LayerFiles,
    unencrypted: bool,
    emit: Callable[[Finding], None],
) -> None:
    flags = missing.to_bytes(BLOCK_CHUNKS, "little")
    chunks = [index * BLOCK_CHUNKS + at for at in range(BLOCK_CHUNKS) if flags[at]]
    for one in readers:
        gone = [chunk for chunk in chunks if _is_missing(one, layer, chunk, files)]
        what = f"no data in layer {layer}"
        if gone and what not in one.told:
            one.told.add(what)
            more = f" and {len(gone) - 1} more near it" if len(gone) > 1 else ""
            detail = f"chunk {gone[0]}{more} has {what}"
            # A copy of the directory that leaves out zeros does that to unencrypted data, and it reads the same.
            emit(Finding(Code.DATA_MISSING, one.resource, one.file, detail, note=unencrypted))


def _is_missing(one: MapInHand, layer: int, chunk: int, files: LayerFiles) -> bool:
    """Ask again, of a map that changes: an entry moves off a chunk before the chunk is punched."""
    if not one.changing:
        return files.has_data(layer, chunk) is False
    index, at = divmod(chunk, BLOCK_CHUNKS)
    for _ in range(2):
        if files.has_data(layer, chunk) is not False:
            return False
        entry = one.reader.block(index)[at * ENTRY : (at + 1) * ENTRY]
        if int.from_bytes(entry, "little") != layer:
            return False
    return True
