"""The sweep: give back what no map of a lineage names, and the files that no row of the catalog names.

Two ways. ``sweep`` reads every map of the lineage: after a crash, at doubt, and as the measure of the other one.
``sweep_deleted`` reads those of the nearest relatives, whatever the number of snapshots.

1. Order, without which a power cut or a snapshot taken meanwhile loses data: choose the layers, THEN read every map,
   THEN make durable what was read, THEN punch and unlink. A map in the page cache may have moved a chunk off a layer
   while the map on the disk still names it there.
2. Never touched: protected layers, chunks that some map names, and every file that is not in the layer table.
3. It may be cut anywhere and repeated: what is left over is found again.

What is protected is the caller's to say: the heads of all volumes of the lineage, and of an attached one every layer
that its process may write to or that was sealed since its last whole flush. No map on the disk shows those.

Why the relatives are enough. The maps of a lineage form a tree: a snapshot stands between its volume and what that was
made from; what is made from a snapshot (volume, copy) hangs below it. Volumes are leaves. A deleted one stays in the
tree as a mere joint while two others need it to be connected; one that has a single neighbour below, or a joint or
nothing above, is spliced out.

4. For every layer L and chunk c: when two maps name (L, c), every map between them on their path in the tree does.
   It holds for one map. A snapshot is inserted next to its volume, with the same map; a new volume or copy is a new
   leaf, with the map of its neighbour: any path to it goes through that neighbour, and both name the same. A write or
   discard changes a leaf, which lies between no others; what it names from then on is in its head, which no other map
   names, or nothing: an entry never returns to an older layer. A deletion makes a map a joint, which names nothing and
   asks for nothing. Splicing leaves the maps on every path the same; joining trees at their roots by a root without a
   map makes paths through it longer by nobody.
5. So, when X is deleted, whoever else names (L, c) that X named is reached from X through maps that name it, too, and
   the first of them that is not deleted is one of X's nearest relatives. If none of those does, nobody does.
6. The same with "L at all" in place of (L, c): entries of L first come from the one volume that L was made for, before
   its next snapshot, so all maps that name some chunk of L contain, or contained, what that snapshot (or the volume
   itself) is the top of. Layers made for X's own writing, which X does not name, are named by nobody.
7. A layer that only one map names may lose every other chunk. Two maps that share a layer may keep a chunk in it that
   neither names: it comes back when one of them leaves the layer, or with a full sweep.
8. A volume that moved chunks off a layer, by writes or by draining it, counts as two: as a deleted one with the map
   that it had, between its parent and itself. What it left before its next snapshot was taken lies between its parent
   and that snapshot, and is looked at when either goes: a snapshot remembers the layers that its volume left before it.
9. Blocks that were allocated and never written are no data, and SEEK_DATA does not find them. A layer that was made
   with all its blocks is punched by the maps (``give_back``), and so is one that has far more than its named chunks
   take, in case nobody remembers how it was made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final, Protocol

from ebsd.domain.errors import SnapshotIdMalformed, StoreDamaged, VolumeIdMalformed
from ebsd.domain.ids import LineageId, SnapshotId, VolumeId, looks_like_snapshot_id, parse_snapshot_id, parse_volume_id
from ebsd.domain.units import CHUNK, CHUNKS_PER_SEGMENT
from ebsd.store.disk import Disk, fsync_directory, opened
from ebsd.store.durablemap import DurableMap
from ebsd.store.entries import ENTRY, HOLE
from ebsd.store.layers import MAX_SEGMENTS, chunks_with_data, parse_segment_name, segment_name
from ebsd.store.layertable import LayerTable
from ebsd.store.layout import StateLayout
from ebsd.store.leaftable import NAME as LEAF_TABLE
from ebsd.store.leaves import parse_leaf_file_name, remove_leaf_file
from ebsd.store.sealedmap import read_sealed_map

BLOCK: Final = 64 * 1024
"""Bytes of entries that are looked at together: 1 GiB of volume."""

PUNCH_STEP: Final = 4096
"""Chunks that one punch takes at most: it stops all I/O of the file while it runs."""

EXCESS_SHARE: Final = 64
"""Blocks of a file beyond its named chunks that are its file system's own: one in so many, ..."""

EXCESS_LEAST: Final = CHUNK
"""... and these many bytes."""

_BLOCK_CHUNKS: Final = BLOCK // ENTRY
_SEGMENT_BLOCKS: Final = CHUNKS_PER_SEGMENT // _BLOCK_CHUNKS
_TEMPORARY = re.compile(r"\..+\.tmp")


class MapSource(Protocol):
    """A map of the lineage; ``read`` is called once, ``sync`` after it."""

    @property
    def name(self) -> str: ...

    def read(self) -> Iterator[bytes]:
        """Yield all entries, BLOCK bytes at a time, the last time perhaps fewer. Raises StoreDamaged, OSError."""
        ...

    def sync(self) -> None:
        """Make what ``read`` gave durable. Raises OSError."""
        ...


class DurableSource:
    """The durable map of a volume, attached or not.

    ``held``: a descriptor of it that was opened before the volume process was asked to flush. A sync of that process
    may fail after the flush, and its pages then show what is on no disk; the kernel tells of it once through each
    descriptor that was open already, and not through a later one (errseq_t; Linux, Documentation/core-api/errseq.rst).
    """

    def __init__(self, disk: Disk, path: Path, held: int | None = None) -> None:
        self._disk = disk
        self._path = path
        self._held = held
        self.name = os.fspath(path)

    def read(self) -> Iterator[bytes]:
        source = DurableMap.open(self._disk, self._path, writable=False)
        try:
            yield from _blocks(source.entries())
        finally:
            source.close()

    def sync(self) -> None:
        if self._held is not None:
            self._disk.fdatasync(self._held)
            return
        with opened(self._disk, self._path, os.O_RDONLY | os.O_NONBLOCK) as fd:
            self._disk.fdatasync(fd)


class SealedSource:
    """The sealed map of a snapshot; durable since it has its name."""

    def __init__(self, disk: Disk, path: Path, snapshot: SnapshotId) -> None:
        self._disk = disk
        self._path = path
        self._snapshot = snapshot
        self.name = os.fspath(path)

    def read(self) -> Iterator[bytes]:
        yield from _blocks(read_sealed_map(self._disk, self._path, self._snapshot).entries)

    def sync(self) -> None:
        """Nothing: it never changes."""


def _blocks(entries: memoryview) -> Iterator[bytes]:
    raw = entries.cast("B")
    for at in range(0, len(raw), BLOCK):
        yield bytes(raw[at : at + BLOCK])


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep gave back."""

    removed: tuple[int, ...]
    """Numbers of the layers whose files are gone, ascending."""
    punched_chunks: int
    freed: int
    """Bytes, as the file system counts its blocks."""


class _Named:
    """Which chunks of the chosen layers some map names: bits per layer and block of the map, made when needed."""

    def __init__(self, layers: Iterable[int], known: int) -> None:
        self._bits: dict[int, dict[int, bytearray]] = {layer: {} for layer in layers}
        self._chosen = frozenset(self._bits)
        self._known = known
        self._seen: set[tuple[int, bytes]] = set()

    def add(self, source: MapSource) -> None:
        """Add one map. Raises StoreDamaged when it names a layer that the table does not have."""
        for index, block in enumerate(source.read()):
            # Relatives share most of their maps: a block that was seen at this place adds nothing. A digest and not
            # the block itself, so that it may be any earlier map's; a collision would lose data, so a strong one.
            key = (index, blake2b(block, digest_size=32).digest())
            if key in self._seen:
                continue
            self._seen.add(key)
            self._add_block(source.name, index, block)

    def _add_block(self, name: str, index: int, block: bytes) -> None:
        values = memoryview(block).cast("I")
        found = set(values)
        if max(found) > self._known:
            raise StoreDamaged(file=name, reason=f"an entry names the unknown layer {max(found):#x}")
        wanted = found & self._chosen
        if not wanted:
            return
        targets = {layer: self._bits[layer].setdefault(index, bytearray(_BLOCK_CHUNKS // 8)) for layer in wanted}
        if len(found - {HOLE}) == 1 and HOLE not in found and len(values) == _BLOCK_CHUNKS:
            (bits,) = targets.values()
            bits[:] = b"\xff" * len(bits)
            return
        for at, value in enumerate(values):
            if value in wanted:
                targets[value][at >> 3] |= 1 << (at & 7)

    def names_any(self, layer: int) -> bool:
        return bool(self._bits[layer])

    def names(self, layer: int, chunk: int) -> bool:
        block, at = divmod(chunk, _BLOCK_CHUNKS)
        bits = self._bits[layer].get(block)
        return bits is not None and bool(bits[at >> 3] & 1 << (at & 7))

    def count(self, layer: int, segment: int) -> int:
        """Return how many chunks of a segment some map names."""
        bits = self._bits[layer]
        blocks = range(segment * _SEGMENT_BLOCKS, (segment + 1) * _SEGMENT_BLOCKS)
        return sum(int.from_bytes(bits[block], "little").bit_count() for block in blocks if block in bits)

    def unnamed(self, layer: int, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges [first, end) of chunks that no map names, ascending, joined."""
        begin = -1  # of the range that is being joined
        at = first
        while at < end:
            block = at // _BLOCK_CHUNKS
            stop = min(end, (block + 1) * _BLOCK_CHUNKS)
            bits = self._bits[layer].get(block)
            if bits is None:
                begin = at if begin < 0 else begin
            else:
                for chunk in range(at, stop):
                    place = chunk - block * _BLOCK_CHUNKS
                    if not bits[place >> 3] & 1 << (place & 7):
                        begin = chunk if begin < 0 else begin
                    elif begin >= 0:
                        yield begin, chunk
                        begin = -1
            at = stop
        if begin >= 0:
            yield begin, end


def sweep(
    disk: Disk,
    dirfd: int,
    table: LayerTable,
    *,
    protected: Collection[int],
    maps: Iterable[MapSource],
    rows: Collection[int] = (),
) -> SweepReport:
    """Remove the layers that no map names, and punch the chunks of the others that none does.

    ``maps``: of every volume and snapshot of the lineage, pending and pinned ones included, and of whatever else
    reads its layers (a running copy); missing one loses its data. ``maps`` is iterated after the layers are chosen.
    ``table`` was read before. ``rows``: numbers of the layers that the catalog has rows of; one without a file and
    that no map names counts as removed, too: a sweep, or a restore, was cut there. Raises StoreDamaged and OSError;
    nothing was punched or removed when a map could not be read or synced.
    """
    chosen = _choose(disk, dirfd, table, protected, rows)
    named = _Named(chosen, len(table.layers))
    _read_and_sync(named, maps)
    removed: list[int] = []
    punched = freed = 0
    for layer, segments in chosen.items():
        uuid = table.uuid_of(layer)
        if named.names_any(layer):
            for segment in segments:
                chunks, gained = _punch_unnamed(disk, dirfd, layer, uuid, segment, named)
                punched += chunks
                freed += gained
        else:
            # First the leaf file: what a power cut leaves is a layer without one, which is removed the next time.
            remove_leaf_file(disk, dirfd, layer, uuid)
            for segment in segments:
                freed += _remove(disk, dirfd, segment_name(layer, uuid, segment))
            removed.append(layer)
    if removed:
        disk.fsync(dirfd)
    return SweepReport(tuple(removed), punched, freed)


def _read_and_sync(named: _Named, maps: Iterable[MapSource]) -> None:
    sources: list[MapSource] = []
    for source in maps:
        named.add(source)
        sources.append(source)
    for source in sources:
        source.sync()


def give_back(
    disk: Disk, dirfd: int, table: LayerTable, *, layers: Collection[int], maps: Iterable[MapSource]
) -> SweepReport:
    """Punch whatever of these layers no map names, blocks that were never written included; removes nothing.

    ``layers``: none that anybody may write to. ``maps`` as of ``sweep``: every one, iterated after the layers were
    chosen. Raises StoreDamaged and OSError; nothing was punched when a map could not be read or synced.
    """
    everything = _choose(disk, dirfd, table, (), ())
    chosen = {layer: segments for layer, segments in everything.items() if layer in layers}
    named = _Named(chosen, len(table.layers))
    _read_and_sync(named, maps)
    freed = 0
    for layer, segments in chosen.items():
        for segment in segments:
            name = segment_name(layer, table.uuid_of(layer), segment)
            with opened(disk, name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=dirfd) as fd:
                freed += _punch_by_map(disk, dirfd, fd, layer, name, segment, named)
    return SweepReport((), 0, freed)


def sweep_deleted(
    disk: Disk,
    dirfd: int,
    table: LayerTable,
    *,
    deleted: MapSource | None,
    also: Collection[int],
    relatives: Mapping[str, MapSource],
    beyond: Mapping[str, Iterable[MapSource]],
    protected: Collection[int],
) -> SweepReport:
    """Give back what a deleted map named and no other map of its lineage does, by its nearest relatives.

    ``deleted``: its map, None when it is not known. ``also``: further layers that it named, that were made for its own
    writing (rule 6), or that its volume left (rule 8).
    ``relatives``: all of its nearest ones, by id; ``beyond``: all of theirs, of those that rule 7 shall be used for.
    ``protected`` as in ``sweep``.
    Durable maps of attached volumes are read: each was flushed as a whole after the last seal. May be repeated.
    Raises StoreDamaged and OSError; nothing was punched or removed when a map could not be read or synced.
    """
    lonely = b"" if deleted is None else b"".join(deleted.read())
    named = _layers_of(memoryview(lonely), table, "" if deleted is None else deleted.name) | set(also)
    rest = bytearray(lonely)
    namers: dict[int, list[str]] = {}
    for ident, source in relatives.items():
        for layer in _cross_out(rest, source, table):
            namers.setdefault(layer, []).append(ident)
    for source in relatives.values():
        source.sync()
    work = _Work(disk, dirfd, table)
    chosen = frozenset(table.numbers()) - frozenset(protected)
    for layer in sorted(named & chosen - namers.keys()):
        work.remove(layer)
    for layer, chunks in _by_layer(rest, chosen - set(work.removed)).items():
        work.punch(layer, chunks)
    alone: dict[str, set[int]] = {}
    for layer in named & chosen:
        if len(namers.get(layer, ())) == 1 and namers[layer][0] in beyond:
            alone.setdefault(namers[layer][0], set()).add(layer)
    for ident, layers in alone.items():
        _punch_all_but(work, relatives[ident], _unnamed_by(layers, beyond[ident], table))
    return work.report()


def _layers_of(entries: memoryview, table: LayerTable, name: str) -> set[int]:
    """Return the layers that entries (bytes) name. Raises StoreDamaged for one that the table does not have."""
    found: set[int] = set()
    previous = b""
    for at in range(0, len(entries), BLOCK):
        block = bytes(entries[at : at + BLOCK])
        if block != previous:
            found.update(memoryview(block).cast("I"))
            previous = block
    found.discard(HOLE)
    if found and max(found) > len(table.layers):
        raise StoreDamaged(file=name, reason=f"an entry names the unknown layer {max(found):#x}")
    return found


def _cross_out(rest: bytearray, source: MapSource, table: LayerTable) -> set[int]:
    """Make 0 every entry of ``rest`` that a map has, too; return the layers that the map names."""
    found: set[int] = set()
    previous = b""
    holes = bytes(BLOCK)
    for index, block in enumerate(source.read()):
        if block != previous:
            found |= _layers_of(memoryview(block), table, source.name)
            previous = block
        at = index * BLOCK
        mine = rest[at : at + len(block)]
        if mine == holes[: len(mine)]:
            continue
        if mine == block[: len(mine)]:
            rest[at : at + len(mine)] = bytes(len(mine))
            continue
        left = memoryview(mine).cast("I")
        for place, (a, b) in enumerate(zip(left, memoryview(block).cast("I"), strict=False)):
            if a == b:
                left[place] = HOLE
        left.release()
        rest[at : at + len(mine)] = mine
    return found


def _by_layer(entries: bytearray, chosen: Collection[int]) -> dict[int, list[int]]:
    """Return layer -> chunks, ascending, of the entries that name one of the chosen layers."""
    chunks: dict[int, list[int]] = {}
    holes = bytes(BLOCK)
    for at in range(0, len(entries), BLOCK):
        block = bytes(entries[at : at + BLOCK])
        if block != holes[: len(block)]:
            for place, layer in enumerate(memoryview(block).cast("I"), at // ENTRY):
                if layer in chosen:
                    chunks.setdefault(layer, []).append(place)
    return chunks


def _unnamed_by(layers: set[int], sources: Iterable[MapSource], table: LayerTable) -> set[int]:
    """Return which of the layers none of the maps names, on the disk either."""
    left = set(layers)
    for source in sources:
        if not left:
            break
        for block in source.read():
            left -= _layers_of(memoryview(block), table, source.name)
        source.sync()
    return left


def _punch_all_but(work: _Work, only: MapSource, layers: set[int]) -> None:
    """Give back what the one map that may name these layers does not name in them, and those that it does not name."""
    if not layers:
        return
    named = _Named(layers, work.known)
    named.add(only)
    only.sync()
    for layer in sorted(layers):
        if named.names_any(layer):
            work.punch_unnamed(layer, named)
        else:
            work.remove(layer)


class _Work:
    """What a sweep does to layers, and the account of it."""

    def __init__(self, disk: Disk, dirfd: int, table: LayerTable) -> None:
        self._disk = disk
        self._dirfd = dirfd
        self._table = table
        self.known: Final = len(table.layers)
        self.removed: list[int] = []
        self._punched = self._freed = 0

    def _segments(self, layer: int, wanted: Iterable[int] = range(MAX_SEGMENTS)) -> list[int]:
        """Return which segments of a layer there are: by name, as a removal may have been cut between them."""
        uuid = self._table.uuid_of(layer)
        there = []
        for segment in wanted:
            with contextlib.suppress(FileNotFoundError):
                fd = self._disk.open(
                    segment_name(layer, uuid, segment), os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._dirfd
                )
                self._disk.close(fd)
                there.append(segment)
        return there

    def remove(self, layer: int) -> None:
        uuid = self._table.uuid_of(layer)
        remove_leaf_file(self._disk, self._dirfd, layer, uuid)
        for segment in self._segments(layer):
            self._freed += _remove(self._disk, self._dirfd, segment_name(layer, uuid, segment))
        self.removed.append(layer)

    def punch(self, layer: int, chunks: Sequence[int]) -> None:
        """Punch chunks of a layer, ascending."""
        uuid = self._table.uuid_of(layer)
        by_segment: dict[int, list[int]] = {}
        for chunk in chunks:
            by_segment.setdefault(chunk // CHUNKS_PER_SEGMENT, []).append(chunk % CHUNKS_PER_SEGMENT)
        for segment in self._segments(layer, by_segment):
            with opened(
                self._disk, segment_name(layer, uuid, segment), os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._dirfd
            ) as fd:
                self._account(
                    _punch(self._disk, self._dirfd, fd, segment_name(layer, uuid, segment), by_segment[segment])
                )

    def punch_unnamed(self, layer: int, named: _Named) -> None:
        for segment in self._segments(layer):
            self._account(_punch_unnamed(self._disk, self._dirfd, layer, self._table.uuid_of(layer), segment, named))

    def _account(self, result: tuple[int, int]) -> None:
        self._punched += result[0]
        self._freed += result[1]

    def report(self) -> SweepReport:
        """Make removals durable, and say what was done."""
        if self.removed:
            self._disk.fsync(self._dirfd)
        return SweepReport(tuple(sorted(self.removed)), self._punched, self._freed)


def _choose(
    disk: Disk, dirfd: int, table: LayerTable, protected: Collection[int], rows: Collection[int]
) -> dict[int, list[int]]:
    """Return layer -> its segments, for the layers that may be touched; a leaf file or a row may be all that is left
    of one.
    """
    chosen: dict[int, list[int]] = {number: [] for number in sorted({*rows} & {*table.numbers()} - {*protected})}
    for name in sorted(disk.listdir(_below(dirfd))):
        parsed = parse_segment_name(name)
        found = parse_leaf_file_name(name) if parsed is None else parsed[:2]
        if found is None:
            continue
        layer, uuid = found
        if layer not in protected and layer in table.numbers() and table.uuid_of(layer) == uuid:
            chosen.setdefault(layer, []).extend([parsed[2]] if parsed is not None else [])
    return chosen


def _below(dirfd: int, name: str = "") -> str:
    return f"/proc/self/fd/{dirfd}/{name}"


def _remove(disk: Disk, dirfd: int, name: str) -> int:
    with opened(disk, name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=dirfd) as fd:
        blocks = disk.fstat(fd).st_blocks
    disk.unlink(_below(dirfd, name))
    return blocks * 512


def _punch_unnamed(disk: Disk, dirfd: int, layer: int, uuid: bytes, segment: int, named: _Named) -> tuple[int, int]:
    """Punch what one segment holds and no map names; return (chunks, bytes gained)."""
    name = segment_name(layer, uuid, segment)
    base = segment * CHUNKS_PER_SEGMENT
    with opened(disk, name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=dirfd) as fd:
        stored = (chunk for first, end in chunks_with_data(disk, fd) for chunk in range(first, end))
        unnamed = [chunk for chunk in stored if not named.names(layer, base + chunk)]
        punched, freed = _punch(disk, dirfd, fd, name, unnamed)
        status = disk.fstat(fd)
        needed = named.count(layer, segment) * CHUNK
        if status.st_blocks * 512 > needed + needed // EXCESS_SHARE + EXCESS_LEAST:
            freed += _punch_by_map(disk, dirfd, fd, layer, name, segment, named)
    return punched, freed


def _punch_by_map(disk: Disk, dirfd: int, fd: int, layer: int, name: str, segment: int, named: _Named) -> int:
    """Punch all of a segment that no map names, data or not; return the bytes gained."""
    base = segment * CHUNKS_PER_SEGMENT
    end = base + -(-disk.fstat(fd).st_size // CHUNK)
    steps = (
        (at - base, min(at + PUNCH_STEP, stop) - base)
        for first, stop in named.unnamed(layer, base, end)
        for at in range(first, stop, PUNCH_STEP)
    )
    return _punch_runs(disk, dirfd, fd, name, steps)


def _punch(disk: Disk, dirfd: int, fd: int, name: str, chunks: Sequence[int]) -> tuple[int, int]:
    """Punch chunks of a segment, ascending, that is open at ``fd``; return (chunks, bytes gained)."""
    if not chunks:
        return 0, 0
    return len(chunks), _punch_runs(disk, dirfd, fd, name, _runs(chunks))


def _punch_runs(disk: Disk, dirfd: int, fd: int, name: str, runs: Iterable[tuple[int, int]]) -> int:
    """Punch (first, end) of chunks of a segment that is open at ``fd``; return the bytes gained."""
    before = disk.fstat(fd).st_blocks
    # Sealed segments are 0440, and punching needs a descriptor for writing.
    disk.fchmod(fd, 0o600)
    try:
        writable = disk.open(name, os.O_RDWR | os.O_NONBLOCK, dir_fd=dirfd)
    finally:
        disk.fchmod(fd, 0o440)
    try:
        for first, end in runs:
            disk.punch(writable, first * CHUNK, (end - first) * CHUNK)
    finally:
        disk.close(writable)
    return max(0, before - disk.fstat(fd).st_blocks) * 512


def _runs(chunks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Join ascending chunks to (first, end) of at most PUNCH_STEP."""
    first = end = -1
    for chunk in chunks:
        if chunk != end or end - first >= PUNCH_STEP:
            if first >= 0:
                yield first, end
            first = chunk
        end = chunk + 1
    if first >= 0:
        yield first, end


@dataclass(frozen=True, slots=True)
class Known:
    """What the catalog has rows of, in any state."""

    layers: Mapping[LineageId, Collection[tuple[int, bytes]]]
    """(number, uuid) of the layers of each lineage."""
    resources: Collection[VolumeId | SnapshotId]


def find_orphans(disk: Disk, layout: StateLayout, known: Callable[[], Known]) -> list[Path]:
    """Return the files, and directories of lineages, that no row names; temporary files always.

    Only names that this program gives are looked at. ``known`` is called after the directories were listed: a row
    precedes its files, so what was listed and has no row then is nobody's. Temporary files are somebody's while he
    writes: call it when nobody does. Raises OSError.
    """
    listed: list[tuple[Path, list[str]]] = []
    lineages = [name for name in sorted(disk.listdir(layout.layers)) if _is_lineage(layout, name)]
    for directory in (*(layout.layers / name for name in lineages), layout.maps, layout.records):
        listed.append((directory, sorted(disk.listdir(directory))))
    rows = known()
    orphans: list[Path] = []
    for directory, names in listed:
        if directory in (layout.maps, layout.records):
            wanted = frozenset(rows.resources)
            orphans += [directory / name for name in names if _is_resource(name) and name not in wanted]
            orphans += [directory / name for name in names if _TEMPORARY.fullmatch(name)]
            continue
        lineage = LineageId(directory.name)
        if lineage not in rows.layers:
            orphans += [directory / name for name in names if _is_lineage_file(name)]
            orphans.append(directory)
            continue
        layers = frozenset(rows.layers[lineage])
        for name in names:
            parsed = parse_segment_name(name)
            layer = parse_leaf_file_name(name) if parsed is None else parsed[:2]
            if (layer is not None and layer not in layers) or _TEMPORARY.fullmatch(name):
                orphans.append(directory / name)
    return orphans


def remove_orphans(disk: Disk, orphans: Iterable[Path]) -> None:
    """Remove what ``find_orphans`` returned, in its order; durable at return, and may be repeated.

    A directory that holds something foreign stays. Raises OSError.
    """
    parents: set[Path] = set()
    for path in orphans:
        with contextlib.suppress(FileNotFoundError):
            try:
                disk.unlink(path)
            except (IsADirectoryError, PermissionError):
                parents.discard(path)
                try:
                    disk.rmdir(path)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
            parents.add(path.parent)
    for parent in sorted(parents):
        with contextlib.suppress(FileNotFoundError):
            fsync_directory(disk, parent)


def _is_lineage(layout: StateLayout, name: str) -> bool:
    try:
        layout.lineage(LineageId(name))
    except ValueError:
        return False
    return True


def _is_lineage_file(name: str) -> bool:
    if name in ("table", LEAF_TABLE) or parse_leaf_file_name(name) is not None:
        return True
    return parse_segment_name(name) is not None or _TEMPORARY.fullmatch(name) is not None


def _is_resource(name: str) -> bool:
    try:
        _ = parse_snapshot_id(name) if looks_like_snapshot_id(name) else parse_volume_id(name)
    except (SnapshotIdMalformed, VolumeIdMalformed):
        return False
    return True
