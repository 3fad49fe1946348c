"""The block engine with a native hot path: reads and writes that need nothing rare are done by C, in any thread.

``native/`` does the work of ``engine.py`` for them, over the same live map, descriptors and keys; whatever it meets
that is rare it hands back, and the request is done here as a whole. What that takes, in addition to CONCURRENCY.md:

1. Claims are one queue for threads and tasks (``native_claims.py``). Head, maps and size change only while everything
   is claimed, so whoever holds a claim sees one state of them.
2. Python's changes are noted in Python's sets, the native ones in the core's; a freeze and a seal take both. Only the
   event loop freezes and cleans marks; both are one step of the core, as is the end of a native write.
3. Descriptors and keys of sealed layers are Python's. The core knows those that Python has used or opened ahead, and
   gives them back before they are closed. So it does with leaves.
4. New chunks need credit, which the gate lends for as long as its last look is good, and takes back at every refusal.
5. The punch queue is Python's alone: a native write leaves its chunks in it, and the punch drops what the head names.
   A later zero of such a chunk renews its number, so that no punch comes before that zero is durable.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from ebsd.crypto.xts import XtsKey, run_address
from ebsd.domain.errors import EbsdError
from ebsd.domain.units import CHUNK, CHUNKS_PER_SEGMENT, SEGMENT
from ebsd.store.durablemap import EXTENT, DurableMap
from ebsd.store.entries import ENTRY, FIRST_RESERVED, HOLE, PAGE
from ebsd.store.layertable import LayerTable
from ebsd.store.leaves import SharedLeaves
from ebsd.store.livemap import LiveMap
from ebsd.volume._core import ffi, lib
from ebsd.volume.engine import ZERO_STEP, BlockEngine, Codec, Head, Opened, PageCopy, Statistics
from ebsd.volume.native_claims import NativeClaims, WatchesDescriptors
from ebsd.volume.spacegate import Gate

if TYPE_CHECKING:
    from ebsd.volume._core import CData

_SHIFT: Final = CHUNK.bit_length() - 1
_SLACK: Final = 64
"""Pages beyond those that are dirty now: more may become so before the freeze."""

_HOLES: Final = 1 << 20
"""Holes that a discard claims at a time: looking at their entries takes half a millisecond."""

_NANOSECONDS: Final = 10**9
_FOR_EVER: Final = 2**63 - 1


@runtime_checkable
class NativeCodec(Protocol):
    """A codec whose keys native code can use."""

    def native_key(self, segment: int) -> XtsKey | None:
        """Return the key of one segment; None when sectors are stored as they are."""
        ...


@runtime_checkable
class SharesLeaves(Protocol):
    """Leaves that native code can look up; ``LeafChecks``."""

    on_forget: Callable[[int], object]

    def knows(self, layer: int) -> bool: ...

    def shared(self, layer: int) -> SharedLeaves | None: ...


class _LendingGate:
    """The engine's gate; what its looks allow is lent to the core."""

    def __init__(self, gate: Gate, core: CData) -> None:
        self._gate = gate
        self._core = core

    def admits(self, chunks: int) -> bool:
        return self._gate.admits(chunks)

    def written(self) -> None:
        """New chunks have found their space, so the next ones may be written without a question."""
        self._gate.written()
        chunks, until = self._gate.lend()
        lib.ebsd_core_lend(self._core, chunks, _FOR_EVER if math.isinf(until) else int(until * _NANOSECONDS))

    def lend(self) -> tuple[int, float]:
        return self._gate.lend()

    async def wait(self, since: float | None) -> float:
        lib.ebsd_core_lend(self._core, 0, 0)  # until one is written: then the gate knows that the shortage is over
        return await self._gate.wait(since)


class NativeEngine(BlockEngine):
    """See ``BlockEngine``; and ``hot``, which any number of threads may use until ``close`` and after it.

    The object, and with it the core, must outlive them. Where a codec has no native key everything is handed back.
    """

    def _prepare(self) -> None:
        core = lib.ebsd_core_new(run_address(), self.read_only, self._leaves is not None)
        if core == ffi.NULL:
            raise MemoryError("no memory for the native engine")
        self._core = ffi.gc(core, lib.ebsd_core_free)
        self.hot = lib.ebsd_core_hot(self._core)
        watch = self._scheduler.watch if isinstance(self._scheduler, WatchesDescriptors) else None
        self._locks = NativeClaims(self._core, self._scheduler.event, watch)
        self._space = _LendingGate(self._space, self._core)
        self._shared: dict[tuple[int, int], XtsKey | None] = {}
        """Segments of sealed layers that the core knows, and their keys, which must live as long."""
        self._with_leaves: set[tuple[int, int]] = set()
        """Those of them whose leaves it knows, or that it knows to have none."""
        self._head_keys: list[XtsKey | None] = []
        if isinstance(self._leaves, SharesLeaves):
            self._leaves.on_forget = self._forget_leaves
        self._reserve(self._live.chunks, self._head)
        self._use_map()

    # --- maps and head

    def _reserve(self, chunks: int, head: int) -> None:
        """Make room, so that a later switch cannot fail."""
        if lib.ebsd_core_reserve(self._core, chunks, head):
            raise OSError(errno.ENOMEM, "no memory for the native engine")

    def _use_map(self) -> None:
        live = self._live
        lib.ebsd_core_use_map(
            self._core, _address(live.raw_entries), _address(live.marks), live.chunks, self.size
        )  # fmt: skip
        self._share_written_out(0, live.chunks)
        self._share_head(self._head_codec)

    def _share_written_out(self, first: int, end: int) -> None:
        """Tell the core which extents of the durable map, of those with these chunks, have all their blocks."""
        written_out = self._durable.written_out
        for extent in range(first * ENTRY // EXTENT, (end * ENTRY - 1) // EXTENT + 1):
            lib.ebsd_core_wrote_out(self._core, extent, written_out[extent])

    def _share_head(self, codec: Codec) -> None:
        """Let the core write into the head, as far as its codec has native keys."""
        segments = range(len(self._head_fds)) if isinstance(codec, NativeCodec) else ()
        self._head_keys = [codec.native_key(at) for at in segments] if isinstance(codec, NativeCodec) else []
        addresses = [_key_address(key) for key in self._head_keys]
        result = lib.ebsd_core_use_head(
            self._core, self._head, self._head_fds, addresses, len(addresses), self._preallocated
        )
        if result:
            raise OSError(-result, os.strerror(-result))

    def _check_new_head(self, new_head: Head, table: LayerTable) -> None:
        super()._check_new_head(new_head, table)
        # Before the pause of the seal: memory, and the keys, which the codec keeps.
        self._reserve(self._live.chunks, new_head.number)
        codec = self._factory.for_layer(new_head.number)
        if isinstance(codec, NativeCodec):
            for segment in range(len(new_head.fds)):
                codec.native_key(segment)

    def _use_head(self, head: Head, table: LayerTable, codec: Codec) -> None:
        super()._use_head(head, table, codec)
        self._share_head(codec)

    async def grow(self, size: int, extra_head_fds: Sequence[int], live: LiveMap, durable: DurableMap) -> None:
        """See ``BlockEngine``."""
        self._reserve(live.chunks, self._head)
        for segment in range(len(self._head_fds) + len(extra_head_fds)):
            if isinstance(self._head_codec, NativeCodec):
                self._head_codec.native_key(segment)
        await super().grow(size, extra_head_fds, live, durable)

    def _stop(self) -> None:
        lib.ebsd_core_stop(self._core)
        super()._stop()

    # --- sealed layers

    def _sealed_file(self, layer: int, segment: int) -> tuple[int, str]:
        file = super()._sealed_file(layer, segment)
        if (layer, segment) not in self._shared:
            self._share_layer(layer, segment, file[0])
        return file

    def _share_layer(self, layer: int, segment: int, fd: int) -> None:
        codec = self._codec(layer)
        if not isinstance(codec, NativeCodec):
            return
        key = codec.native_key(segment)
        # Without memory for it the layer is read here, as before.
        if not lib.ebsd_core_add_layer(
            self._core, layer, segment, self._uuid_of(layer), fd, _key_address(key)
        ):  # fmt: skip
            self._shared[layer, segment] = key

    def open_ahead(self, chunk: int, layer: int) -> Opened:
        """See ``BlockEngine``; derives the key, too, which the codec keeps."""
        opened = super().open_ahead(chunk, layer)
        codec = self._codec(layer)
        if isinstance(codec, NativeCodec):
            codec.native_key(chunk // CHUNKS_PER_SEGMENT)
        return opened

    def take_opened(self, opened: Opened) -> bool:
        """See ``BlockEngine``; from here on requests meet the layer without Python."""
        if not super().take_opened(opened):
            return False
        segment = opened.chunk // CHUNKS_PER_SEGMENT
        self._share_layer(opened.layer, segment, opened.fd)
        self._share_leaves(opened.layer, segment)
        return True

    def _unshare_layer(self, key: tuple[int, int]) -> None:
        """Have the core forget a segment; at return nobody uses its descriptor, its key or its leaves."""
        if key in self._shared:
            lib.ebsd_core_drop_layer(self._core, *key)
            del self._shared[key]
            self._with_leaves.discard(key)

    def _close_sealed_file(self, key: tuple[int, int]) -> None:
        self._unshare_layer(key)
        super()._close_sealed_file(key)

    def _least_used(self) -> tuple[int, int]:
        # A second chance for what threads have used, of which the order here knows nothing.
        for _ in range(len(self._sealed)):
            key = next(iter(self._sealed))
            if not lib.ebsd_core_was_used(self._core, *key):
                break
            self._sealed.move_to_end(key)
        return next(iter(self._sealed))

    async def _read_checked(self, chunk: int, whole: memoryview) -> bool:
        checked = await super()._read_checked(chunk, whole)
        layer = self._entries[chunk]
        if HOLE < layer < FIRST_RESERVED and layer != self._head:
            self._share_leaves(layer, (chunk << _SHIFT) // SEGMENT)
        return checked

    def _share_leaves(self, layer: int, segment: int) -> None:
        leaves, key = self._leaves, (layer, segment)
        if not isinstance(leaves, SharesLeaves) or key in self._with_leaves or not leaves.knows(layer):
            return
        try:
            found = leaves.shared(layer)
            self._sealed_file(layer, segment)
        except (EbsdError, OSError):
            return  # the request that needs them is told
        if key not in self._shared:
            return
        if found is None:
            result = lib.ebsd_core_give_no_leaves(self._core, *key)
        else:
            result = _give_leaves(self._core, key, found)
        if not result:
            self._with_leaves.add(key)

    def _forget_leaves(self, layer: int) -> None:
        for key in [key for key in self._with_leaves if key[0] == layer]:
            self._unshare_layer(key)

    # --- writing

    async def _write_claimed(self, offset: int, data: memoryview) -> None:
        await super()._write_claimed(offset, data)
        self._share_written_out(offset >> _SHIFT, (offset + len(data) - 1 >> _SHIFT) + 1)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """See ``BlockEngine``. A long run of holes is one step: ``mkfs`` discards all of a volume that is all holes."""
        if self._stopped:
            raise self._refusal()
        self._check_change(offset, length)
        at, end = offset, offset + length
        while at < end:
            first = at >> _SHIFT
            holes = 0 if at % CHUNK else self._next_stored(first, min(end >> _SHIFT, first + _HOLES)) - first
            if holes > ZERO_STEP:
                holes = await self._pass_over(first, first + holes) - first
                self._zeroed_bytes += holes << _SHIFT
                at += holes << _SHIFT
                if holes:
                    continue
            step = min(end, ((at >> _SHIFT) + ZERO_STEP) << _SHIFT)
            await super().write_zeroes(at, step - at)
            at = step

    def _next_stored(self, first: int, end: int) -> int:
        return lib.ebsd_core_next_stored(self._core, first, end)

    async def _pass_over(self, first: int, end: int) -> int:
        """Return the first of these chunks that is no hole, when those who came before have done what they do."""
        claim = self._locks.enqueue(first, end, True)
        if claim.blockers:
            await self._locks.wait(claim)
        try:
            await self._point("zero.claimed")
            if self._stopped:
                raise self._refusal()
            return self._next_stored(first, end)
        finally:
            self._locks.release(claim)

    # --- flush

    def _freeze_changes(self) -> tuple[set[int], list[PageCopy]]:
        for page in self._dirty:
            self._write_out_page(page)
        also = list(self._dirty)
        touched = ffi.new("uint64_t *")
        room = lib.ebsd_core_dirty_pages(self._core) + len(also) + _SLACK
        while True:
            pages, copies = ffi.new("uint32_t[]", room), bytearray(room * PAGE)
            count = lib.ebsd_core_freeze(
                self._core, also, len(also), pages,
                ffi.from_buffer("unsigned char[]", copies, True), room, touched,
            )  # fmt: skip
            if count >= 0:
                break
            room = _SLACK - count
        self._dirty = set()
        fds, self._touched = self._touched | self._fds_of(touched[0]), set()
        view = memoryview(copies)
        return fds, [(pages[at], view[at * PAGE : (at + 1) * PAGE]) for at in range(count)]

    def _clean(self, pages: Sequence[int]) -> None:
        lib.ebsd_core_clean(self._core, list(pages), len(pages))

    def _fds_of(self, segments: int) -> set[int]:
        return {fd for at, fd in enumerate(self._head_fds) if segments >> at & 1}

    def _collect(self) -> None:
        self._touched |= self._fds_of(lib.ebsd_core_touched(self._core))
        self._changed.update(self._taken(lib.EBSD_CORE_CHANGED))
        self._left.update(self._taken(lib.EBSD_CORE_LEFT))

    def _taken(self, which: int) -> Iterator[int]:
        count = lib.ebsd_core_words(self._core, which)
        words = ffi.new("uint64_t[]", count)
        lib.ebsd_core_take(self._core, which, words, count)
        return _bits(words, count)

    @property
    def dirty_pages(self) -> int:
        return len(self._dirty) + lib.ebsd_core_dirty_pages(self._core)

    @property
    def needs_flush(self) -> bool:
        return super().needs_flush or (not self.read_only and bool(lib.ebsd_core_needs_flush(self._core)))

    # --- counts

    def _counts(self) -> tuple[int, int, int, int, int]:
        counts = ffi.new("uint64_t[]", lib.EBSD_CORE_COUNTS)
        lib.ebsd_core_counts(self._core, counts)
        reads, read_bytes, writes, written_bytes, copied = (int(counts[at]) for at in range(lib.EBSD_CORE_COUNTS))
        return reads, read_bytes, writes, written_bytes, copied

    @property
    def requests(self) -> int:
        reads, _, writes, _, _ = self._counts()
        return super().requests + reads + writes

    def statistics(self) -> Statistics:
        """See ``BlockEngine``."""
        here = super().statistics()
        reads, read_bytes, writes, written_bytes, copied = self._counts()
        return replace(
            here,
            reads=here.reads + reads,
            read_bytes=here.read_bytes + read_bytes,
            writes=here.writes + writes,
            written_bytes=here.written_bytes + written_bytes,
            copied_chunks=here.copied_chunks + copied,
            dirty_pages=self.dirty_pages,
        )


def engine_kind(native: bool) -> type[BlockEngine]:
    """Return the engine to serve a volume with: the native one, or the reference alone."""
    return NativeEngine if native else BlockEngine


def _address(view: memoryview) -> int:
    """Return where a view is. Nothing of it is held: who owns the view keeps it as long as the core uses it."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer("unsigned char[]", view)))


def _key_address(key: XtsKey | None) -> int:
    return 0 if key is None else key.address


def _give_leaves(core: CData, key: tuple[int, int], leaves: SharedLeaves) -> int:
    whole = ffi.NULL if leaves.whole is None else leaves.whole
    length = 0 if leaves.whole is None else len(leaves.whole)
    pages = ffi.from_buffer("uint32_t[]", leaves.pages)
    return lib.ebsd_core_give_leaves(
        core, *key, whole, length, leaves.fd, leaves.runs, leaves.chunks, pages, len(leaves.pages)
    )


def _bits(words: CData, count: int) -> Iterator[int]:
    """Yield the numbers of the bits that are set."""
    for at in range(count):
        word = words[at]
        while word:
            lowest = word & -word
            yield at * 64 + lowest.bit_length() - 1
            word ^= lowest
