"""The reference block engine: reads, writes, flushes and discards of one volume over its layers and maps.

This is the executable specification; ``CONCURRENCY.md`` has the reasons behind its rules.

1. A request holds its chunks, shared or exclusive, from the look-up of their entries to the end of its I/O.
2. New data of a chunk that the head does not hold: the whole chunk is built, encrypted and written, then its entry
   is stored. Data of a chunk in the head is written in place.
3. A flush pass copies the changed map pages, makes the data durable, writes those copies, makes the map durable. A
   flush joins only a pass that has not copied yet.
4. The first pass of an engine trusts nothing that an earlier engine left in the page cache: it syncs everything.
5. An error of a pass ends the engine: first the failed flag in the live map, then EIO for everybody, for ever.
6. A hole is zeros and never meets the cipher.
7. A chunk of the head is punched only under its exclusive claim, when neither map names it there.
8. A write that needs new chunks where space is short gives its claim back and waits (``spacegate.py``).
9. A snapshot is a copy of the entries while nobody reads or writes, and another head from then on; what was the
   head is never written again, and is made durable by the next pass.
10. What is drained of a layer is read without a claim, and moved to the head under one, if the entry is still the same.

Between two ``await`` nothing else runs; every ``point`` is a place where something else may.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from ebsd.domain.errors import EbsdError, StoreDamaged
from ebsd.domain.geometry import chunk_count, segment_count
from ebsd.domain.units import CHUNK, CHUNKS_PER_SEGMENT, MIB, SECTOR, SEGMENT
from ebsd.store.disk import Disk, pread_into_all, pwrite_all
from ebsd.store.durablemap import EXTENT, DurableMap
from ebsd.store.entries import (
    ENTRY,
    FIRST_RESERVED,
    HOLE,
    MAX_CHUNKS,
    PAGE,
    PAGE_SHIFT,
    is_all_holes,
    map_hash,
    named_layers,
)
from ebsd.store.layers import open_segment, segment_name, sync_layer
from ebsd.store.layertable import LayerTable
from ebsd.store.leaves import leaf_digest
from ebsd.store.livemap import CLEAN, DIRTY, FROZEN, LiveMap
from ebsd.store.salvage import recent_layers
from ebsd.volume.chunklocks import ChunkLocks
from ebsd.volume.hashing import damaged_chunk
from ebsd.volume.scheduling import Event, Scheduler
from ebsd.volume.spacegate import NO_SPACE_ERRORS, Gate, OpenGate

_SHIFT: Final = CHUNK.bit_length() - 1
_SECTOR_MASK: Final = SECTOR - 1

_SCRATCH: Final = MIB + 2 * CHUNK
"""Ciphertext of one run: the largest FUSE request, and the chunks that its ragged ends may have to complete."""

ZERO_STEP: Final = 64
"""Chunks that a discard claims at a time: one request may span 4 GiB, and readers must not wait for all of it."""

LEAK_STEP: Final = 4096 * CHUNK
"""Bytes of the head that ``find_leaks`` looks at between two turns of the event loop."""

FIND_STEP: Final = 65536
"""Entries that ``find`` looks at between two turns of the event loop."""

PageCopy: TypeAlias = tuple[int, bytes | memoryview]
"""A page of entries: its number and what it held."""

SEALED_FDS: Final = 256
"""Segments of sealed layers kept open; there may be thousands, and descriptors are few."""

AHEAD: Final = 12_000
"""Segments of sealed layers that are open when no more are opened ahead: each takes 5 KiB, with its key and leaves."""


class Codec(Protocol):
    """Encrypts and decrypts whole sectors of one layer; the tweak is the sector number in the volume."""

    def encrypt_into(self, src: bytes | bytearray | memoryview, dst: memoryview, first_sector: int) -> None: ...

    def decrypt_into(self, src: memoryview, dst: memoryview, first_sector: int) -> None: ...


class CodecFactory(Protocol):
    """Gives the codec of a layer. One call of a codec never crosses a border of segments, which have own keys."""

    def for_layer(self, number: int) -> Codec: ...


class Leaves(Protocol):
    """Says what chunks of sealed layers must hash to; ``LeafChecks`` in production."""

    def knows(self, layer: int) -> bool: ...

    def load_small(self, layer: int, uuid: bytes) -> bool:
        """Make ``knows`` true at once if that is as quick as reading a chunk, and say whether it did."""
        ...

    def load(self, layer: int, uuid: bytes) -> Callable[[], None]:
        """Read a whole leaf file, in a thread; what it returns is called on the loop and makes ``knows`` true."""
        ...

    def load_ahead(self, layer: int, uuid: bytes) -> Callable[[], bool] | None:
        """As ``load`` of what was hashed and is small, else None; known only if that takes the room of no other."""
        ...

    def leaf(self, layer: int, chunk: int) -> bytes | None: ...


class Meeting(Protocol):
    """Where an engine that is sealed together with others waits for them (``meeting.py``); both raise to give up."""

    async def arrived(self) -> None:
        """All that is slow is done; requests run."""
        ...

    async def holding(self) -> None:
        """Everything is claimed; the switch follows when this returns."""
        ...


class EngineFailed(OSError):
    """The engine met an error it cannot go on from; every request is answered with EIO. ``cause`` says which."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(errno.EIO, f"the engine has stopped: {cause}")
        self.cause = cause
        self.cause_errno = getattr(cause, "errno", None) or errno.EIO


class EngineClosed(OSError):
    """A request after ``close``."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the engine is closed")


@dataclass(frozen=True, slots=True)
class Head:
    """The layer that takes writes: its number and one open segment per TiB of the volume, in order."""

    number: int
    fds: Sequence[int]


@dataclass(frozen=True, slots=True)
class Opened:
    """A segment of a sealed layer that was opened ahead, of use while ``chunk`` lies in it."""

    chunk: int
    layer: int
    fd: int
    name: str
    keep_leaves: Callable[[], bool] | None


@dataclass(frozen=True, slots=True)
class SealedCopy:
    """The map of one moment, and how long the moment was."""

    entries: memoryview
    """u32 per chunk, format I, read-only; every layer that it names is durable."""
    chunks: int
    layer: int
    """The layer that was the head until then."""
    pause_us: int
    """From the moment new requests were held back until they went on."""
    wait_us: int
    """The part of the pause that waited for requests in work."""
    left: frozenset[int] = frozenset()
    """Older layers that chunks were moved off since the seal before this one."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts since the engine was made; bytes are those of requests."""

    reads: int
    read_bytes: int
    writes: int
    written_bytes: int
    copied_chunks: int
    """Chunks that moved to the head because a part of them was written."""
    zeroed_bytes: int
    flushes: int
    flush_passes: int
    """Passes that ran; flushes that shared one are not counted."""
    punched_chunks: int
    drained_chunks: int
    """Chunks that moved to the head so that their layer can go."""
    dirty_pages: int
    """Map pages (64 MiB of volume each) that are ahead of the durable map now."""
    punch_queue: int


class _Pass:
    """One flush pass: joined by flushes until it freezes."""

    __slots__ = ("done", "error", "finished")

    def __init__(self, done: Event) -> None:
        self.done = done
        self.finished = False
        self.error: EngineFailed | None = None


class BlockEngine:
    """A volume as a block device. Offsets and lengths in bytes; ``size`` and ``read_only`` may be read.

    Every request may raise: EngineFailed or EngineClosed (EIO); OSError of that one request (nothing else is
    touched); StoreDamaged (a file of the store is not what it must be: answer EIO).
    """

    hot: int | None = None
    """Address of what a native transport may call from its threads (native/hot.h); this engine has nothing for it."""

    def __init__(
        self,
        *,
        disk: Disk,
        scheduler: Scheduler,
        size: int,
        head: Head,
        lineage_dirfd: int,
        table: LayerTable,
        live: LiveMap,
        durable: DurableMap,
        codecs: CodecFactory,
        read_only: bool = False,
        unsynced_layers: Collection[int] | None = None,
        sealed_files: int | None = None,
        leaves: Leaves | None = None,
        space: Gate | None = None,
        preallocated: int = 0,
        on_failure: Callable[[], object] = lambda: None,
    ) -> None:
        """Serve a volume of ``size`` bytes (a multiple of the sector).

        The descriptors and both maps stay the caller's, who closes them after ``close``. ``unsynced_layers`` are
        layers whose data is not known to be durable, of any volume; None means: every layer that the map names.
        What is copied from a sealed layer into the head is compared with ``leaves`` before.
        ``space`` says when new chunks may be written; None means always. The first ``preallocated`` bytes of the head
        have their blocks: writing there asks nobody, and nothing is punched there, until the head is sealed.
        ``on_failure`` is called once, when the engine has stopped for ever.
        """
        if size <= 0 or size % SECTOR or chunk_count(size) > live.chunks:
            raise ValueError(f"a map of {live.chunks} chunks does not fit a volume of {size} bytes")
        if live.chunks != durable.header.chunks:
            raise ValueError("live and durable map differ in length")
        if len(head.fds) != segment_count(size):
            raise ValueError(f"{len(head.fds)} segments of the head for a volume of {size} bytes")
        if live.failed:
            raise EngineFailed(OSError(errno.EIO, "an earlier engine of this attachment failed"))
        self.size = size
        self.read_only = read_only
        self._disk = disk
        self._scheduler = scheduler
        self._point = scheduler.point
        self._head = head.number
        self._head_fds = tuple(head.fds)
        self._dirfd = lineage_dirfd
        self._table = table
        self._live = live
        self._entries = live.entries
        self._marks = live.marks
        self._durable = durable
        self._factory = codecs
        self._leaves = leaves
        self._head_codec = codecs.for_layer(head.number)
        self._sealed: OrderedDict[tuple[int, int], tuple[int, str]] = OrderedDict()
        self._head_files = _named(self._head_fds)
        self._locks = ChunkLocks(scheduler.event)
        self._space: Gate = space or OpenGate()
        self._preallocated = chunk_count(min(preallocated, size))
        """Chunks from the first on that have blocks in the head, whatever the map says."""
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._stopped = False
        self._on_failure = on_failure
        self._cause: BaseException | None = None
        self._closed_hash: bytes | None = None

        self._dirty = set(live.marked_pages())
        self._touched: set[int] = set()
        """Descriptors of segments that were written since a pass last took them over: the head's, and those of a
        layer that was the head until a moment ago."""
        self._first_pass = True
        self._unsynced = unsynced_layers
        self._sealed_files = SEALED_FDS if sealed_files is None else sealed_files
        self._gathering: _Pass | None = None
        self._running: _Pass | None = None
        self._freezes = 0
        self._durable_freeze = -1
        """Number of the last freeze whose copies are durable."""
        self._punch_queue: dict[int, int] = {}
        """Chunk of the head that was zeroed -> number of the freeze that will see the zero."""
        self._left: set[int] = set()
        """Sealed layers that chunks were moved off since the last seal, or the start: what is dead there now may be
        nobody else's."""
        self._told: set[int] = set()
        """Those of them that ``tell_left`` told and ``forget_left`` did not take back."""
        self._exclusive: frozenset[int] = frozenset()
        """Sealed layers that no other map names, so that it is of use to move their chunks into the head."""
        self._changed: set[int] = set()
        """Map pages with an entry that was stored since a seal began to copy the map; at most all of them."""
        self._reshaping = False
        """A seal or a growth is under way; there is one at a time."""
        if not read_only and live.head != head.number:
            # The engine before this one died between the row of a new head and its seal. Before the first write.
            live.head = head.number

        self._reads = self._read_bytes = self._writes = self._written_bytes = self._copied = 0
        self._zeroed_bytes = self._flushes = self._passes = self._punched = self._drained = 0
        self._prepare()

    # --- what an engine with a part outside of Python does besides (native_engine.py)

    def _prepare(self) -> None:
        """Called last by the constructor."""

    def _collect(self) -> None:
        """Take over what was changed outside of Python: into ``_touched``, ``_changed``, ``_left``."""

    def _stop(self) -> None:
        self._stopped = True

    def _use_map(self) -> None:
        """The live map has been replaced; everything is claimed."""

    # --- reading

    async def read(self, offset: int, length: int) -> bytearray | memoryview:
        """Return the bytes [offset, offset + length), cut at the end of the volume as for a file."""
        if self._stopped:
            raise self._refusal()
        if offset < 0 or length < 0:
            raise OSError(errno.EINVAL, "negative range")
        length = min(length, self.size - offset)
        if length <= 0:
            return bytearray()
        claim = self._locks.enqueue(offset >> _SHIFT, (offset + length - 1 >> _SHIFT) + 1, False)
        if claim.blockers:
            await self._locks.wait(claim)
        try:
            await self._point("read.claimed")
            if self._stopped:
                raise self._refusal()
            self._reads += 1
            self._read_bytes += length
            if (offset | length) & _SECTOR_MASK == 0:
                whole = bytearray(length)
                await self._read_sectors(offset, memoryview(whole))
                return whole
            start = offset & ~_SECTOR_MASK
            end = -(-(offset + length) // SECTOR) * SECTOR
            cover = memoryview(bytearray(end - start))
            await self._read_sectors(start, cover)
            return cover[offset - start : offset - start + length]
        finally:
            self._locks.release(claim)

    async def _read_sectors(self, offset: int, out: memoryview) -> None:
        """Fill ``out``, which holds zeros, with whole sectors; the caller has claimed them.

        Consecutive chunks of one layer and segment are one pread and one decryption.
        """
        entries = self._entries
        at = 0
        length = len(out)
        while at < length:
            position = offset + at
            chunk = position >> _SHIFT
            layer = entries[chunk]
            last = offset + length - 1 >> _SHIFT
            following = chunk + 1
            while following <= last and entries[following] == layer:
                following += 1
            run = min((following << _SHIFT) - position, length - at)
            if layer != HOLE:
                await self._point("read.looked-up")
                self._read_run(layer, position, out[at : at + run])
            at += run

    def _read_run(self, layer: int, position: int, out: memoryview) -> None:
        """Read and decrypt sectors that one layer holds."""
        done = 0
        length = len(out)
        while done < length:
            segment, place = divmod(position + done, SEGMENT)
            run = min(length - done, SEGMENT - place, _SCRATCH)
            fd, name = self._head_files[segment] if layer == self._head else self._sealed_file(layer, segment)
            # No await between here and the end of the decryption: the scratch buffer is everybody's.
            piece = out if run == length else out[done : done + run]
            pread_into_all(self._disk, fd, piece, place, name)
            self._codec(layer).decrypt_into(piece, piece, (position + done) // SECTOR)
            done += run

    def _codec(self, layer: int) -> Codec:
        # Not kept: there may be thousands of layers, and the factory remembers the ones in use.
        return self._head_codec if layer == self._head else self._factory.for_layer(layer)

    def _sealed_file(self, layer: int, segment: int) -> tuple[int, str]:
        """Return (fd, name) of a sealed layer's segment, opened at first use, read-only."""
        file = self._sealed.get((layer, segment))
        if file is not None:
            self._sealed.move_to_end((layer, segment))
            return file
        uuid = self._uuid_of(layer)
        fd = open_segment(self._disk, self._dirfd, layer, uuid, segment, writable=False)
        while len(self._sealed) >= self._sealed_files:
            self._close_sealed_file(self._least_used())
        file = self._sealed[layer, segment] = (fd, segment_name(layer, uuid, segment))
        return file

    def _least_used(self) -> tuple[int, int]:
        """Return the open segment of a sealed layer that can be missed best; there is one."""
        return next(iter(self._sealed))

    def _close_sealed_file(self, key: tuple[int, int]) -> None:
        self._disk.close(self._sealed.pop(key)[0])

    # --- opening ahead (ahead.py)

    @property
    def room_ahead(self) -> int:
        """How many more segments of sealed layers may be opened ahead; 0 when this engine has stopped."""
        return 0 if self._stopped else max(0, min(AHEAD, self._sealed_files) - len(self._sealed))

    def is_of_use_ahead(self, chunk: int, layer: int) -> bool:
        """Say whether a chunk still lies in this layer, which is sealed and not open where the chunk is."""
        return (
            HOLE < layer < FIRST_RESERVED
            and layer != self._head
            and self._entries[chunk] == layer
            and (layer, chunk // CHUNKS_PER_SEGMENT) not in self._sealed
        )

    def open_ahead(self, chunk: int, layer: int) -> Opened:
        """Do all that the first use of a layer may have to wait for. For a thread: touches nothing of the engine.

        Raises StoreDamaged, OSError.
        """
        uuid, segment = self._uuid_of(layer), chunk // CHUNKS_PER_SEGMENT
        fd = open_segment(self._disk, self._dirfd, layer, uuid, segment, writable=False)
        keep_leaves = None
        if self._leaves is not None and not self.read_only:
            with contextlib.suppress(OSError):  # without leaves it is as good for reads
                keep_leaves = self._leaves.load_ahead(layer, uuid)
        return Opened(chunk, layer, fd, segment_name(layer, uuid, segment), keep_leaves)

    def take_opened(self, opened: Opened) -> bool:
        """Keep what was opened ahead, and say so, or close it. On the loop.

        It is looked at again: a layer that the chunk has left may have been removed, and would keep its blocks while it
        is open; a request may have opened it itself.
        """
        if not self.room_ahead or not self.is_of_use_ahead(opened.chunk, opened.layer):
            self._disk.close(opened.fd)
            return False
        key = opened.layer, opened.chunk // CHUNKS_PER_SEGMENT
        self._sealed[key] = (opened.fd, opened.name)
        self._sealed.move_to_end(key, last=False)  # nobody has used it yet
        if opened.keep_leaves is not None:
            opened.keep_leaves()
        return True

    def _uuid_of(self, layer: int) -> bytes:
        try:
            return self._table.uuid_of(layer)
        except KeyError:
            what = "the reserved value" if layer >= FIRST_RESERVED else "the unknown layer"
            raise StoreDamaged(file=self._durable.file, reason=f"an entry names {what} {layer:#x}") from None

    # --- writing

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Write all of ``data`` and return its length; at return it survives the end of this process (I4).

        Raises OSError EROFS on a read-only engine and EFBIG when a part lies behind the end: nothing is written
        then. After any other OSError each sector in the range holds old or new bytes, and no other sector changed.
        """
        if self._stopped:
            raise self._refusal()
        length = len(data)
        self._check_change(offset, length)
        if length == 0:
            return 0
        view = memoryview(data)
        first, end = offset >> _SHIFT, (offset + length - 1 >> _SHIFT) + 1
        refused: float | None = None
        while True:
            claim = self._locks.enqueue(first, end, True)
            if claim.blockers:
                await self._locks.wait(claim)
            try:
                await self._point("write.claimed")
                if self._stopped:
                    raise self._refusal()
                new = self._new_chunks(first, end)
                if not new or self._space.admits(new):
                    await self._write_claimed(offset, view)
                    if new:
                        self._space.written()
                    self._writes += 1
                    self._written_bytes += length
                    return length
            except OSError as error:
                if error.errno not in NO_SPACE_ERRORS:
                    raise
                with contextlib.suppress(OSError):  # without map blocks for it nothing was written either
                    self._queue_unnamed(first, end)
            finally:
                self._locks.release(claim)
            # Without the claim: reads, discards, a seal and the rest go on. The write is done again as a whole.
            refused = await self._space.wait(refused)
            if self._stopped:
                raise self._refusal()

    def _new_chunks(self, first: int, end: int) -> int:
        """Return how many of these chunks the head has no blocks for; the caller has claimed them."""
        entries, head = self._entries, self._head
        first = max(first, self._preallocated)
        if first >= end:
            return 0
        if end - first == 1:
            return 0 if entries[first] == head else 1
        return sum(1 for entry in entries[first:end] if entry != head)

    def _check_change(self, offset: int, length: int) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "the volume is attached read-only")
        if offset < 0 or length < 0:
            raise OSError(errno.EINVAL, "negative range")
        if offset + length > self.size:
            raise OSError(errno.EFBIG, "the range ends behind the end of the volume")

    async def _write_claimed(self, offset: int, data: memoryview) -> None:
        """Write into chunks that the caller holds exclusively: split into runs that are one pwrite each."""
        first = offset >> _SHIFT
        end = (offset + len(data) - 1 >> _SHIFT) + 1
        # Before any data, so that a disk without space for the map fails this request and not a flush.
        self._durable.write_out(first, end)
        if self._punch_queue:
            for chunk in range(first, end):
                self._punch_queue.pop(chunk, None)
        at = 0
        while at < len(data):
            position = offset + at
            run = min(len(data) - at, SEGMENT - position % SEGMENT)
            if run > MIB:  # the next run begins with a chunk, so that only the ends of the request are ragged
                run = MIB - position % CHUNK
            await self._write_run(position, data[at : at + run])
            at += run

    async def _write_run(self, offset: int, data: memoryview) -> None:
        """Write a range within one segment: complete its ragged ends, encrypt, one pwrite, store the entries."""
        end = offset + len(data)
        first, last = offset >> _SHIFT, end - 1 >> _SHIFT
        start, front = await self._completed_front(offset, end, first)
        stop, back = await self._completed_back(offset, end, last, joined=front is not None and first == last)
        scratch = self._scratch
        codec = self._head_codec
        # No await from the first encryption to the mark of the segment: the scratch buffer is everybody's, and a
        # pass that freezes between pwrite and mark would not sync this write, nor would the next one.
        if front is not None and first == last:
            front[offset - start : end - start] = data
            codec.encrypt_into(front, scratch[: len(front)], start // SECTOR)
            stop = start + len(front)
        else:
            lower, upper = offset, end
            if front is not None:
                lower = start + len(front)
                front[offset - start :] = data[: lower - offset]
                codec.encrypt_into(front, scratch[: len(front)], start // SECTOR)
            if back is not None:
                upper = stop - len(back)
                back[: end - upper] = data[upper - offset :]
                codec.encrypt_into(back, scratch[upper - start : stop - start], upper // SECTOR)
            if lower < upper:
                middle = data[lower - offset : upper - offset]
                codec.encrypt_into(middle, scratch[lower - start : upper - start], lower // SECTOR)
        segment, place = divmod(start, SEGMENT)
        fd = self._head_fds[segment]
        try:
            pwrite_all(self._disk, fd, scratch[: stop - start], place)
        finally:
            self._touched.add(fd)
        await self._point("write.data-written")
        self._name_head(first, last + 1)
        await self._point("write.entries-stored")

    async def _completed_front(self, offset: int, end: int, chunk: int) -> tuple[int, memoryview | None]:
        """Return (first byte to write, plaintext of the piece that must be completed there or None).

        The piece is the first sector of a chunk in the head, or all of a chunk that the head does not hold yet;
        when the request ends in the same chunk, the piece reaches to the end of the request's last sector.
        """
        if self._entries[chunk] == self._head:
            if offset & _SECTOR_MASK == 0 and (end & _SECTOR_MASK == 0 or end - 1 >> _SHIFT != chunk):
                return offset, None
            start = offset & ~_SECTOR_MASK
            stop = -(-end // SECTOR) * SECTOR if end - 1 >> _SHIFT == chunk else start + SECTOR
            piece = memoryview(bytearray(stop - start))
            if offset != start or len(piece) == SECTOR:
                await self._read_sectors(start, piece[:SECTOR])
            if len(piece) > SECTOR and end & _SECTOR_MASK:
                await self._read_sectors(stop - SECTOR, piece[-SECTOR:])
            return start, piece
        start = chunk << _SHIFT
        stop = start + CHUNK
        if offset == start and end >= stop:
            return offset, None
        return start, await self._whole_chunk(chunk, offset, end)

    async def _completed_back(
        self, offset: int, end: int, chunk: int, *, joined: bool
    ) -> tuple[int, memoryview | None]:
        """Return (end of what to write, plaintext of the piece that must be completed there or None)."""
        if joined:
            return end, None
        if self._entries[chunk] == self._head:
            if end & _SECTOR_MASK == 0:
                return end, None
            stop = -(-end // SECTOR) * SECTOR
            piece = memoryview(bytearray(SECTOR))
            await self._read_sectors(stop - SECTOR, piece)
            return stop, piece
        start = chunk << _SHIFT
        stop = start + CHUNK
        if end == stop and offset <= start:
            return end, None
        return stop, await self._whole_chunk(chunk, offset, end)

    async def _whole_chunk(self, chunk: int, offset: int, end: int) -> memoryview:
        """Return the plaintext of a chunk that the head does not hold: its layer's, or zeros for a hole.

        Nothing is read when [offset, end) covers all of it that lies in the volume. What lies behind the end of
        the volume is zeros, so a volume that grows later shows zeros there.
        """
        start = chunk << _SHIFT
        stop = min(start + CHUNK, self.size)
        whole = memoryview(bytearray(CHUNK))
        if (offset > start or end < stop) and self._entries[chunk] != HOLE:
            if not await self._read_checked(chunk, whole):
                await self._read_sectors(start, whole[: stop - start])
            whole[stop - start :] = bytes(start + CHUNK - stop)
            self._copied += 1
        return whole

    async def _read_checked(self, chunk: int, whole: memoryview) -> bool:
        """Fill ``whole`` with a chunk of a sealed layer, compared with its leaf; False when nothing says what it was.

        What is copied into the head is encrypted and hashed anew: damage would not be seen any more. Plain reads are
        not compared. Raises StoreDamaged; the entry stays, and so does the damage.
        """
        leaves, layer = self._leaves, self._entries[chunk]
        if leaves is None or layer >= FIRST_RESERVED:
            return False
        uuid = self._uuid_of(layer)
        while not leaves.knows(layer) and not leaves.load_small(layer, uuid):
            (await self._scheduler.blocking(leaves.load, layer, uuid))()
        # Nobody but this loop loads, so no await from here on means that the layer is still known.
        leaf = leaves.leaf(layer, chunk)
        if leaf is None:
            return False
        await self._point("read.looked-up")
        segment, place = divmod(chunk << _SHIFT, SEGMENT)
        fd, name = self._sealed_file(layer, segment)
        pread_into_all(self._disk, fd, whole, place, name)
        if leaf_digest(uuid, chunk, whole) != leaf:
            raise damaged_chunk(layer, uuid, chunk)
        self._codec(layer).decrypt_into(whole, whole, chunk * (CHUNK // SECTOR))
        return True

    def _name_head(self, first: int, end: int) -> None:
        """Store the entries of chunks whose data the head holds now; mark before entry, without await between."""
        entries, marks, head = self._entries, self._marks, self._head
        for chunk in range(first, end):
            if entries[chunk] != head:
                self._left.add(entries[chunk])
                page = chunk >> PAGE_SHIFT
                marks[page] = DIRTY
                self._dirty.add(page)
                self._changed.add(page)
                entries[chunk] = head

    # --- zeroing

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeros, exactly. Whole chunks become holes, ragged ends are written.

        Done in steps: after an error, or a cancellation, a front part of the range may be zeros already.
        Raises as ``write``.
        """
        if self._stopped:
            raise self._refusal()
        self._check_change(offset, length)
        at = offset
        end = offset + length
        refused: float | None = None
        while at < end:
            step = min(end, ((at >> _SHIFT) + ZERO_STEP) << _SHIFT)
            claim = self._locks.enqueue(at >> _SHIFT, (step - 1 >> _SHIFT) + 1, True)
            if claim.blockers:
                await self._locks.wait(claim)
            try:
                await self._point("zero.claimed")
                if self._stopped:
                    raise self._refusal()
                # Not asked for admission: what it gives back is more than its edges may take.
                await self._zero_claimed(at, step)
                self._zeroed_bytes += step - at
                at = step
                continue
            except OSError as error:
                if error.errno not in NO_SPACE_ERRORS:
                    raise
            finally:
                self._locks.release(claim)
            refused = await self._space.wait(refused)

    async def discard(self, offset: int, length: int) -> None:
        """Same as ``write_zeroes``: discarded bytes read as zeros from then on."""
        await self.write_zeroes(offset, length)

    async def _zero_claimed(self, offset: int, end: int) -> None:
        # The last chunk of a volume may be cut by its end: covered up to there, it is whole.
        first_whole = (offset + CHUNK - 1) >> _SHIFT
        end_whole = chunk_count(self.size) if end == self.size else end >> _SHIFT
        if first_whole >= end_whole:
            await self._zero_edge(offset, end)
            return
        if offset < first_whole << _SHIFT:
            await self._zero_edge(offset, first_whole << _SHIFT)
        self._name_nothing(first_whole, end_whole)
        await self._point("zero.entries-stored")
        if end > end_whole << _SHIFT:
            await self._zero_edge(end_whole << _SHIFT, end)

    async def _zero_edge(self, offset: int, end: int) -> None:
        """Write zeros into a part of chunks; a hole has them already."""
        for chunk in range(offset >> _SHIFT, (end - 1 >> _SHIFT) + 1):
            if self._entries[chunk] != HOLE:
                start, stop = max(offset, chunk << _SHIFT), min(end, chunk + 1 << _SHIFT)
                await self._write_claimed(start, memoryview(bytes(stop - start)))

    def _name_nothing(self, first: int, end: int) -> None:
        entries, marks, head = self._entries, self._marks, self._head
        if not any(entries[first:end]):
            return
        self._durable.write_out(first, end)
        for chunk in range(first, end):
            layer = entries[chunk]
            if layer != HOLE:
                page = chunk >> PAGE_SHIFT
                marks[page] = DIRTY
                self._dirty.add(page)
                self._changed.add(page)
                entries[chunk] = HOLE
                if layer == head:
                    if chunk >= self._preallocated:
                        self._punch_queue[chunk] = self._freezes
                else:
                    self._left.add(layer)

    # --- flush

    async def flush(self) -> None:
        """Make every write that was answered before this call durable.

        Flushes that arrive before a pass freezes share it. Raises EngineFailed when the pass fails, for ever.
        """
        if self._stopped:
            raise self._refusal()
        self._flushes += 1
        if self.read_only:
            return
        while True:
            joined = self._gathering
            if joined is None:
                await self._lead_pass()
                return
            await joined.done.wait()
            if joined.error is not None:
                raise joined.error
            if joined.finished:
                return
            # The leader was cancelled before the end of its pass: this flush got nothing, so it begins again.
            if self._stopped:
                raise self._refusal()

    async def _lead_pass(self) -> None:
        mine = self._gathering = _Pass(self._scheduler.event())
        try:
            while self._running is not None:  # one pass at a time
                await self._running.done.wait()
            await self._point("flush.before-freeze")
            if self._stopped:
                raise self._refusal()
            self._running = mine
            self._gathering = None  # frozen from here on: later flushes need a later pass
            await self._run_pass()
            mine.finished = True
        except EngineFailed as failed:
            mine.error = failed
            raise
        except OSError as closed:
            mine.error = EngineFailed(closed)
            raise
        finally:
            if self._gathering is mine:
                self._gathering = None
            if self._running is mine:
                self._running = None
            mine.done.set()

    async def _run_pass(self) -> None:
        """Freeze, sync the data, write the copies, sync the map. Any error ends the engine."""
        touched: set[int] = set()
        pages: list[int] = []
        first_pass = self._first_pass
        completed = False
        try:
            # The freeze: no await up to the end of the copies.
            freeze = self._freezes
            self._freezes += 1
            head = self._head
            # Before the copies: where others store entries meanwhile, no layer that a copy names is missed so.
            sealed = self._sealed_to_sync() if first_pass else []
            touched, copies = self._freeze_changes()
            pages = [page for page, _ in copies]
            if first_pass:
                touched.update(self._head_fds)
            await self._point("flush.frozen")
            for fd in sorted(touched):
                await self._scheduler.blocking(self._disk.fdatasync, fd)
                await self._point("flush.segment-synced")
            if sealed:
                await self._scheduler.blocking(self._sync_sealed, sealed)
            await self._point("flush.data-synced")
            if copies or first_pass:
                await self._scheduler.blocking(self._write_copies, copies)
                await self._point("flush.map-written")
                await self._scheduler.blocking(self._durable.sync)
            await self._point("flush.map-synced")
            self._clean(pages)
            # The head of the freeze, not of now: a seal since then has left writes in it that this pass knows not.
            self._live.oldest_unsynced = head
            self._durable_freeze = freeze
            self._first_pass = False
            self._passes += 1
            completed = True
        except Exception as error:
            raise self._fail(error) from error
        finally:
            if not completed:  # cancelled: nothing of this pass counts as done
                self._touched |= touched
                self._dirty.update(pages)

    def _freeze_changes(self) -> tuple[set[int], list[PageCopy]]:
        """Take over the touched descriptors and copies of the dirty pages, which are FROZEN from here on."""
        touched, self._touched = self._touched, set()
        pages, self._dirty = sorted(self._dirty), set()
        copies: list[PageCopy] = []
        for page in pages:
            self._marks[page] = FROZEN
            self._write_out_page(page)
            copies.append((page, self._live.page(page)))
        return touched, copies

    def _write_out_page(self, page: int) -> None:
        # Marks of an earlier engine may lie in extents that this one has not looked at; not in the thread of the pass,
        # where it could put zeros over what a pass writes.
        first = page << PAGE_SHIFT
        self._durable.write_out(first, min(first + (1 << PAGE_SHIFT), self._live.chunks))

    def _clean(self, pages: Sequence[int]) -> None:
        for page in pages:
            if self._marks[page] == FROZEN:  # else changed since, and the next pass's business
                self._marks[page] = CLEAN

    def _sealed_to_sync(self) -> list[int]:
        layers: set[int] = set()
        if self._unsynced is None or set(self._unsynced) - {self._head}:
            layers = named_layers(self._live.raw_entries)
            self._live.let_pages_go()
        if self._unsynced is not None:
            layers &= set(self._unsynced)
        recent = recent_layers(self._live, self._table)
        return sorted({*layers, *recent} - {self._head})

    def _sync_sealed(self, layers: Sequence[int]) -> None:
        """Sync sealed layers through descriptors of their own: the cache's may be closed by a read meanwhile."""
        for layer in layers:
            sync_layer(self._disk, self._dirfd, layer, self._uuid_of(layer))

    def _write_copies(self, copies: Sequence[PageCopy]) -> None:
        """Write page copies; neighbours go in one write."""
        at = 0
        while at < len(copies):
            end = at + 1
            while end < len(copies) and end - at < EXTENT // PAGE and copies[end][0] == copies[at][0] + end - at:
                end += 1
            self._durable.write_page(copies[at][0], b"".join(data for _, data in copies[at:end]))
            at = end

    def _fail(self, cause: BaseException) -> EngineFailed:
        """Stop for ever; the flag in the live map comes before anything else."""
        self._live.mark_failed()
        self._stop()
        # Without its traceback: the frames hold buffers, and each raise would make it longer.
        self._cause = cause.with_traceback(None)
        self._on_failure()
        return EngineFailed(cause)

    def _refusal(self) -> OSError:
        """Return the error for a request to an engine that has stopped."""
        return EngineClosed() if self._cause is None else EngineFailed(self._cause)

    # --- punching

    async def reclaim(self) -> int:
        """Give the blocks of zeroed chunks back to the file system; return how many chunks were punched.

        For the background, after a flush. Only chunks whose zero is durable qualify, and each is looked at again
        under its claim: a rewrite cancels, a later discard waits for a later flush. Raises OSError; a failed punch
        costs space, nothing else.
        """
        if self.read_only:
            return 0
        punched = 0
        for first, end in _ranges(sorted(c for c, seen in self._punch_queue.items() if seen <= self._durable_freeze)):
            if self._stopped:
                raise self._refusal()
            claim = self._locks.enqueue(first, end, True)
            if claim.blockers:
                await self._locks.wait(claim)
            try:
                await self._point("punch.claimed")
                queue, entries, head = self._punch_queue, self._entries, self._head
                still = [
                    chunk
                    for chunk in range(first, end)
                    if queue.get(chunk, self._durable_freeze + 1) <= self._durable_freeze and entries[chunk] != head
                ]
                for chunk in range(first, end):
                    if entries[chunk] == head:  # written by who does not know the queue: a later zero puts it back
                        queue.pop(chunk, None)
                for low, high in _ranges(still):
                    segment, place = divmod(low << _SHIFT, SEGMENT)
                    for chunk in range(low, high):
                        del queue[chunk]
                    fd = self._head_fds[segment]
                    await self._scheduler.blocking(self._disk.punch, fd, place, (high - low) << _SHIFT)
                    punched += high - low
            finally:
                self._locks.release(claim)
        self._punched += punched
        return punched

    async def find_leaks(self) -> int:
        """Queue chunks of the head that hold data and that neither map names; return how many.

        They are left by engines that ended before they punched. Meant for the start, before the first request or
        in the background; what it queues is punched by ``reclaim`` after the next flush. Raises OSError.
        """
        found = 0
        if self.read_only:
            return found
        head = self._head
        for segment in range(len(self._head_fds)):
            # A descriptor of its own: the head's may be closed by a seal meanwhile, which no claim holds back here.
            fd = open_segment(self._disk, self._dirfd, head, self._uuid_of(head), segment, writable=False)
            try:
                found += await self._find_leaks_in(fd, head, segment * CHUNKS_PER_SEGMENT)
            finally:
                self._disk.close(fd)
            if self._head != head:
                break  # sealed meanwhile: its leaks are the sweep's, and the new head has none
        return found

    async def _find_leaks_in(self, fd: int, head: int, base: int) -> int:
        """Queue the leaks of the head's segment whose first chunk is ``base``; return how many."""
        found = at = 0
        while self._head == head:
            extent = await self._scheduler.blocking(self._next_extent, fd, at)
            if extent is None:
                break
            start, at = extent
            last = min(base + -(-at // CHUNK), chunk_count(self.size))
            for first in range(base + start // CHUNK, last, ZERO_STEP):
                found += await self._queue_leaks(head, first, min(first + ZERO_STEP, last))
        return found

    def _next_extent(self, fd: int, at: int) -> tuple[int, int] | None:
        """Return the next (start, end) of data of a head segment, at most LEAK_STEP; None at the end."""
        try:
            start = self._disk.lseek(fd, at, os.SEEK_DATA)
            end = self._disk.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise
        return start, min(end, start + LEAK_STEP)

    def _queue_unnamed(self, first: int, end: int) -> None:
        """Queue chunks that the head may hold and that no map names; the caller has claimed them. Raises OSError."""
        for chunk in range(max(first, self._preallocated), end):
            if self._entries[chunk] != self._head and chunk not in self._punch_queue:
                # Here, where it may fail: the pass that writes the page must find blocks for it (R4).
                self._durable.write_out(chunk, chunk + 1)
                self._punch_queue[chunk] = self._freezes
                self._force_page(chunk >> PAGE_SHIFT)

    async def _queue_leaks(self, head: int, first: int, end: int) -> int:
        found = 0
        claim = self._locks.enqueue(first, end, True)
        if claim.blockers:
            await self._locks.wait(claim)
        try:
            before = len(self._punch_queue)
            self._queue_unnamed(first, end if self._head == head else first)
            found += len(self._punch_queue) - before
        finally:
            self._locks.release(claim)
        return found

    def _force_page(self, page: int) -> None:
        """Have the next pass write this page, so that the durable entry is known to be the live one."""
        self._marks[page] = DIRTY
        self._dirty.add(page)

    # --- draining

    @property
    def exclusive(self) -> frozenset[int]:
        """Layers that may be drained."""
        return self._exclusive

    def let_drain(self, layers: Collection[int]) -> None:
        """Say which sealed layers no other map names, in place of what was said before; the next seal ends that.

        One that another map does name costs space when it is drained, nothing else.
        """
        self._exclusive = frozenset(() if self.read_only else layers) - {HOLE, self._head}

    def entries_of(self, first: int, count: int) -> bytes:
        """Return a copy of at most so many entries from chunk ``first`` on; empty behind the end."""
        return bytes(self._live.raw_entries[first * ENTRY : min(first + count, chunk_count(self.size)) * ENTRY])

    def let_pages_go(self) -> None:
        """Keep no memory of a look at the whole map."""
        self._live.let_pages_go()

    async def drain(self, chunk: int) -> bool:
        """Move a chunk of an exclusive layer into the head, as a write of the same bytes; False: it is in none now.

        Raises as ``write``, ENOSPC at once, and StoreDamaged; the chunk stays where it is then.
        """
        if self._stopped:
            raise self._refusal()
        layer = self._entries[chunk] if chunk < chunk_count(self.size) else HOLE
        if layer not in self._exclusive:
            return False
        # Without a claim, so that nobody waits for this read. A sealed layer does not change, and an entry never comes
        # back to it: when it is the same afterwards, so is the content, and else what was read, or failed, is nothing.
        read = await self._read_aside(layer, chunk)
        claim = self._locks.enqueue(chunk, chunk + 1, True)
        if claim.blockers:
            await self._locks.wait(claim)
        try:
            await self._point("drain.claimed")
            if self._stopped:
                raise self._refusal()
            if self._entries[chunk] != layer or layer not in self._exclusive:
                return False
            if isinstance(read, Exception):
                raise read
            whole = memoryview(read)
            self._codec(layer).decrypt_into(whole, whole, chunk * (CHUNK // SECTOR))
            start = chunk << _SHIFT
            await self._write_claimed(start, whole[: min(CHUNK, self.size - start)])
            self._drained += 1
            return True
        except OSError as error:
            if error.errno in NO_SPACE_ERRORS:
                with contextlib.suppress(OSError):
                    self._queue_unnamed(chunk, chunk + 1)
            raise
        finally:
            self._locks.release(claim)

    async def _read_aside(self, layer: int, chunk: int) -> bytearray | EbsdError | OSError:
        """Return the ciphertext of a chunk of a sealed layer, compared with its leaf, or what is wrong with it."""
        try:
            uuid, leaves, leaf = self._uuid_of(layer), self._leaves, None
            if leaves is not None:
                while not leaves.knows(layer):
                    (await self._scheduler.blocking(leaves.load, layer, uuid))()
                leaf = leaves.leaf(layer, chunk)
            await self._point("drain.looked-up")
            return await self._scheduler.blocking(self._read_whole, layer, uuid, chunk, leaf)
        except (EbsdError, OSError) as error:
            return error

    def _read_whole(self, layer: int, uuid: bytes, chunk: int, leaf: bytes | None) -> bytearray:
        """Read through a descriptor of its own: one of the cache may be closed meanwhile."""
        segment, place = divmod(chunk << _SHIFT, SEGMENT)
        fd = open_segment(self._disk, self._dirfd, layer, uuid, segment, writable=False)
        try:
            whole = bytearray(CHUNK)
            pread_into_all(self._disk, fd, memoryview(whole), place, segment_name(layer, uuid, segment))
        finally:
            self._disk.close(fd)
        if leaf is not None and leaf_digest(uuid, chunk, whole) != leaf:
            raise damaged_chunk(layer, uuid, chunk)
        return whole

    def close_all_but(self, layers: Collection[int]) -> None:
        """Close the files of other sealed layers: one that is unlinked keeps its blocks as long as it is open."""
        for key in [key for key in self._sealed if key[0] not in layers]:
            self._close_sealed_file(key)

    def tell_left(self) -> frozenset[int]:
        """Return ``left``; what is told now stays in it until ``forget_left``, or the next seal."""
        self._collect()
        self._told |= self._left
        self._left = set()
        return self.left

    def forget_left(self, layers: Collection[int]) -> None:
        """Take out of ``left`` what was told and is remembered elsewhere; not what chunks were moved off since."""
        self._told.difference_update(layers)

    # --- snapshots

    async def seal(self, new_head: Head, table: LayerTable, meeting: Meeting | None = None) -> SealedCopy:
        """Take the map of one moment, and write into ``new_head`` from that moment on.

        With a ``meeting`` the moment is shared with other volumes (rule R26): what it raises ends the seal before the
        switch, with nothing changed.

        ``table`` is the present one with new layers at its end; ``new_head`` is one of them, empty and durable, and
        the codecs know it. Its descriptors stay the caller's as the others do; those of the layer that was sealed
        may be closed when this returned, not before. At return every layer that the copy names is durable.

        Not to be cancelled: the moment would have passed and the copy be lost. After an error ``head`` says whether
        the new head is in use; a repeated call needs another, newer one. Raises ValueError for arguments that do not
        fit; OSError EROFS (read-only: the durable map is the map), EBUSY (another one is under way), EngineFailed.
        """
        if self._stopped:
            raise self._refusal()
        if self.read_only:
            raise OSError(errno.EROFS, "the volume is attached read-only")
        self._begin_reshaping()
        try:
            self._check_new_head(new_head, table)
            codec = self._factory.for_layer(new_head.number)
            await self.flush()  # so that little is left to sync after the pause
            self._collect()
            self._changed = set()
            copy = await self._scheduler.blocking(self._copy_of, self._live.raw_entries)
            if meeting is not None:
                await meeting.arrived()
            await self._point("seal.before-claim")
            asked = time.monotonic_ns()
            everything = self._locks.enqueue(0, MAX_CHUNKS, True)
            await self._locks.wait(everything)
            granted = time.monotonic_ns()
            try:
                await self._point("seal.claimed")
                if meeting is not None:
                    await meeting.holding()
                if self._stopped:
                    raise self._refusal()
                sealed = self._head
                self._collect()
                for page in self._changed:
                    copy[page * PAGE : (page + 1) * PAGE] = self._live.raw_entries[page * PAGE : (page + 1) * PAGE]
                await self._point("seal.copied")
                if self._stopped:
                    raise self._refusal()
                left, self._left, self._told = self.left, set(), set()
                # First the header that a salvage goes by, while no data can be in the new head.
                self._live.head = new_head.number
                self._use_head(new_head, table, codec)
                await self._point("seal.switched")
            finally:
                self._locks.release(everything)
            released = time.monotonic_ns()
            self._live.let_pages_go()
            # The descriptors of the old head are still in the touched set, so any pass from here on syncs it.
            await self.flush()
            await self._point("seal.synced")
            chunks = chunk_count(self.size)
            entries = copy[: chunks * ENTRY].cast("I").toreadonly()
            pause_us, wait_us = (released - asked) // 1000, (granted - asked) // 1000
            return SealedCopy(entries, chunks, sealed, pause_us, wait_us, left)
        finally:
            self._reshaping = False

    def _begin_reshaping(self) -> None:
        if self._reshaping:
            raise OSError(errno.EBUSY, "the engine is being sealed or grown already")
        self._reshaping = True

    def _check_new_head(self, new_head: Head, table: LayerTable) -> None:
        if new_head.number <= self._head or new_head.number not in table.numbers():
            raise ValueError(f"layer {new_head.number} is not a new layer after the head, {self._head}")
        known = len(self._table.layers)
        if table.lineage != self._table.lineage or table.layers[:known] != self._table.layers:
            raise ValueError("the table is not the present one with layers at its end")
        if len(new_head.fds) != len(self._head_fds):
            raise ValueError(f"{len(new_head.fds)} segments of the new head instead of {len(self._head_fds)}")

    @staticmethod
    def _copy_of(entries: memoryview) -> memoryview:
        """Return a copy, in which pages that are changed meanwhile hold anything."""
        copy = memoryview(bytearray(len(entries)))
        for at in range(0, len(entries), EXTENT):  # in steps, so that the event loop gets its turns
            copy[at : at + EXTENT] = entries[at : at + EXTENT]
        return copy

    def _use_head(self, head: Head, table: LayerTable, codec: Codec) -> None:
        """Switch; the caller has claimed everything."""
        # What the queue names lies in a layer that is sealed from here on, and the snapshot may name it.
        self._punch_queue.clear()
        self._preallocated = 0
        self._exclusive = frozenset()  # whatever the copy names has two maps now
        self._table = table
        self._head = head.number
        self._head_fds = tuple(head.fds)
        self._head_files = _named(self._head_fds)
        self._head_codec = codec

    # --- growth

    async def grow(self, size: int, extra_head_fds: Sequence[int], live: LiveMap, durable: DurableMap) -> None:
        """Serve ``size`` bytes from now on; the new ones read as zeros.

        Before: the head has its length and its further segments (``grow_layer``; ``extra_head_fds``, one each), the
        durable map has its length, which ``durable`` knows (the engine's own after ``refresh``, or another object),
        and ``live`` was made by ``LiveMap.grown`` from the engine's. After: the caller closes the maps that are not
        in use any more: the old ones, or on an error the new ones.

        Raises ValueError for arguments that do not fit; OSError EBUSY (a seal or a growth is under way);
        EngineFailed; OSError. After an error ``size`` is the old one and nothing has changed. Not to be cancelled.
        """
        if self._stopped:
            raise self._refusal()
        if size <= self.size or size % SECTOR or chunk_count(size) > live.chunks:
            raise ValueError(f"{size} bytes after {self.size}, with a map of {live.chunks} chunks")
        if live.chunks != durable.header.chunks or live.identity != self._live.identity:
            raise ValueError("the live map is not one for this attachment and this durable map")
        if len(self._head_fds) + len(extra_head_fds) != segment_count(size):
            raise ValueError(f"{len(extra_head_fds)} more segments of the head for a volume of {size} bytes")
        self._begin_reshaping()
        try:
            await self._point("grow.before-claim")
            everything = self._locks.enqueue(0, MAX_CHUNKS, True)
            await self._locks.wait(everything)
            try:
                await self._point("grow.claimed")
                if self._stopped:
                    raise self._refusal()
                # No await from the copy to the switch: what a pass stores into the old map would be lost.
                live.replace(self._live)
                self._live = live
                self._entries = live.entries
                self._marks = live.marks
                self._durable = durable
                self._head_fds += tuple(extra_head_fds)
                self._head_files = _named(self._head_fds)
                self.size = size
                self._use_map()
                await self._point("grow.switched")
            finally:
                self._locks.release(everything)
            if self._running is not None:  # it may be writing to the old durable map, which the caller will close
                await self._running.done.wait()
        finally:
            self._reshaping = False

    # --- the rest

    async def find(self, offset: int, *, data: bool) -> int:
        """Return where data, or else a hole, begins at or behind ``offset``, as lseek(2) has it.

        Holes are those of the map; the end of the volume counts as one. Raises OSError ENXIO: ``offset`` is no place
        in the volume, or no data follows it; EngineFailed, EngineClosed.
        """
        if not 0 <= offset < self.size:
            raise OSError(errno.ENXIO, "the offset lies behind the end of the volume")
        chunk = offset >> _SHIFT
        while chunk < chunk_count(self.size):
            if self._stopped:
                raise self._refusal()
            end = min(chunk + FIND_STEP, chunk_count(self.size))
            if not (data and is_all_holes(self._live.raw_entries[chunk * ENTRY : end * ENTRY])):
                for at, layer in enumerate(self._entries[chunk:end], chunk):
                    if (layer != HOLE) is data:
                        return max(offset, at << _SHIFT)
            chunk = end
            if chunk < chunk_count(self.size):
                await self._scheduler.sleep(0)  # a map may have millions of entries
        if data:
            raise OSError(errno.ENXIO, "no data follows")
        return self.size

    @property
    def head(self) -> int:
        """Number of the layer that takes writes."""
        return self._head

    @property
    def left(self) -> frozenset[int]:
        """Layers that chunks were moved off since the last seal, or the start; the head is none of them."""
        self._collect()
        return frozenset((self._left | self._told) - {HOLE, self._head})

    def is_blank(self) -> bool:
        """Say whether every chunk is a hole: nothing was ever written, or all of it discarded."""
        return is_all_holes(self._live.raw_entries)

    @property
    def dirty_pages(self) -> int:
        """Map pages that changed since the last freeze: whether a background flush is worth it."""
        return len(self._dirty)

    @property
    def needs_flush(self) -> bool:
        """Whether a flush would do anything: data or map changed since the last pass."""
        return bool(self._touched or self._dirty or self._first_pass) and not self.read_only

    @property
    def requests(self) -> int:
        """How many reads, writes and flushes there have been."""
        return self._reads + self._writes + self._flushes

    @property
    def failed(self) -> bool:
        return self._cause is not None

    def statistics(self) -> Statistics:
        """Return the counts of now."""
        return Statistics(
            reads=self._reads,
            read_bytes=self._read_bytes,
            writes=self._writes,
            written_bytes=self._written_bytes,
            copied_chunks=self._copied,
            zeroed_bytes=self._zeroed_bytes,
            flushes=self._flushes,
            flush_passes=self._passes,
            punched_chunks=self._punched,
            drained_chunks=self._drained,
            dirty_pages=len(self._dirty),
            punch_queue=len(self._punch_queue),
        )

    async def close(self) -> bytes:
        """Wait for the requests in work, flush, and return the hash of the map, for the signed record.

        Requests from then on raise EngineClosed; repeated calls return the same hash. Raises EngineFailed when
        the engine had failed or the last flush fails: nothing is signed then.
        """
        if self._closed_hash is not None:
            return self._closed_hash
        everything = self._locks.enqueue(0, MAX_CHUNKS, True)
        await self._locks.wait(everything)
        try:
            await self.flush()
            self._closed_hash = await self._scheduler.blocking(map_hash, self._live.raw_entries, chunk_count(self.size))
            self._stop()
        finally:
            self._locks.release(everything)
            if self._stopped:
                self._close_sealed()
        return self._closed_hash

    def _close_sealed(self) -> None:
        while self._sealed:
            self._close_sealed_file(next(iter(self._sealed)))


def _named(fds: Sequence[int]) -> list[tuple[int, str]]:
    return [(fd, f"segment {at} of the head layer") for at, fd in enumerate(fds)]


def _ranges(chunks: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending chunk numbers as (first, end): at most ZERO_STEP long, none across a border of segments."""
    ranges: list[tuple[int, int]] = []
    for chunk in chunks:
        if ranges:
            first, end = ranges[-1]
            if end == chunk and chunk - first < ZERO_STEP and chunk % CHUNKS_PER_SEGMENT:
                ranges[-1] = (first, chunk + 1)
                continue
        ranges.append((chunk, chunk + 1))
    return ranges
