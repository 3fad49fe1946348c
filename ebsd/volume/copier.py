"""The copy worker: read a verified snapshot under one data key, write all of it anew under another.

It is started by ebsd for one copy and told everything over descriptor 0 (``start``, ``progress``, ``finish``; what
they take and give stands at their handlers). It ends with that channel: a worker without ebsd would go on for nobody.

1. Nothing is read as data before both ends were verified. Source files are opened read-only.
2. Everything below ``DoneThrough`` is durable: it moves only after fdatasync returned. What lies above it may hold
   anything, and the next run writes it again: same key, same place, same content, so nothing is given away by that.
3. The destination's map comes last. Until then no map names what was written, so a copy is complete or not there.
4. What is read of a source layer that was hashed is compared with its leaves before it is decrypted; a chunk that
   differs fails the copy, which would launder it. A snapshot that is made gets leaves, and signs their root.
5. LANES threads read, compare, decrypt, encrypt, hash and write a batch each, and wait for the rate in the order of
   the batches; one thread takes what they did in that order, and syncs beside them. Data goes past the page cache,
   except for what is in it already: a copy would evict what others use, and be slower.
"""

from __future__ import annotations

import array
import base64
import contextlib
import errno
import logging
import mmap
import os
import socket
import stat
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

import trio

from ebsd.crypto.codec import CodecFactory, LayerCodec
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import (
    EbsdError,
    HostFailure,
    IncorrectState,
    IntegrityFailure,
    NoSpace,
    NotSupported,
    StoreDamaged,
)
from ebsd.domain.geometry import chunk_count, chunk_place, segment_count, segment_size
from ebsd.domain.ids import LineageId, SnapshotId
from ebsd.domain.units import CHUNK, CHUNKS_PER_SEGMENT, MIB, SECTOR
from ebsd.ipc.channel import ChannelHandler
from ebsd.ipc.confinement import Kind
from ebsd.ipc.incidents import as_ebsd_error, log_incident
from ebsd.store.disk import UNREADABLE, Disk, RealDisk, pread_into_all, pwrite_all
from ebsd.store.durablemap import EXTENT, DurableMap
from ebsd.store.entries import ENTRY, HOLE, PAGE, entry_bytes, is_all_holes, map_hash
from ebsd.store.layers import open_segment, segment_name
from ebsd.store.layertable import LayerTable
from ebsd.store.leaftable import read_slots
from ebsd.store.sealedmap import encode_sealed_map
from ebsd.store.signedrecord import NO_HASH, RecordState, SignedBody
from ebsd.volume import keysession, secrecy
from ebsd.volume.crew import Crew
from ebsd.volume.hashing import LeafChecks
from ebsd.volume.inputs import claim_of, found_in, record_of, sealed_map_of, table_of
from ebsd.volume.leafdigests import leaf_digests
from ebsd.volume.pacing import PacerOfMany
from ebsd.volume.targetleaves import TargetLeaves
from ebsd.volume.verify import Claim, check_leaf_root, covered_layers, next_body, sign
from ebsd.volume.verify_snapshot import (
    believe_snapshot,
    check_destination,
    check_destination_map,
    check_snapshot_map,
    check_snapshot_table,
)
from ebsd.volume.worker import serve_until_gone

log = logging.getLogger("ebsd-copier")

STEP: Final = 2 * MIB
"""Bytes of one batch, at most: of its decryptions, its encryption and its write."""

LANES: Final = min(6, (os.cpu_count() or 1) + 3)
"""Threads that copy: some wait for the disk, which is fastest with a few requests at a time, while others compute."""

LOOK: Final = 256 * 1024
"""Bytes of the source that are read past the page cache unless all of them are in it."""

SYNC_BYTES: Final = 256 * MIB
SYNC_SECONDS: Final = 2.0
"""How much, or how long, is copied at most between two fdatasync: what a kill can cost."""

SOURCE_FILES: Final = 64
"""Source segments kept open by each thread; a snapshot may lie in thousands of layers, and descriptors are few."""

STOP_SECONDS: Final = 5.0
"""How long a process that lost ebsd waits for its copying thread; one that hangs in the kernel ends with it."""

_CHUNKS_PER_STEP: Final = STEP // CHUNK
_SECTORS_PER_CHUNK: Final = CHUNK // SECTOR
_BLOCK: Final = 16 * 1024
"""Entries looked at together; segments begin at multiples of it, so no run of a block crosses into another."""

_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
_FIXED_DESCRIPTORS: Final = 5


# --- maps


class Run(NamedTuple):
    """Consecutive chunks of one source layer, within one segment, at most STEP bytes."""

    first: int
    chunks: int
    layer: int


def runs(entries: memoryview, first: int) -> Iterator[Run]:
    """Yield all stored chunks from ``first`` on, ascending; ``entries`` has format I, an item per chunk."""
    for base in range(first - first % _BLOCK, len(entries), _BLOCK):
        block = entries[base : base + _BLOCK]
        if is_all_holes(block):
            continue
        values = block.tolist()
        at = max(first - base, 0)
        while at < len(values):
            layer, start = values[at], at
            limit = min(at + _CHUNKS_PER_STEP, len(values))
            at += 1
            if layer == HOLE:
                continue
            while at < limit and values[at] == layer:
                at += 1
            yield Run(base + start, at - start, layer)


def stored_in_map(entries: memoryview) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of all chunks that hold data, ascending; pieces may touch."""
    for run in runs(entries, 0):
        yield run.first, run.first + run.chunks


def data_chunks(entries: memoryview) -> int:
    """Return how many chunks hold data."""
    total = 0
    for base in range(0, len(entries), _BLOCK):
        block = entries[base : base + _BLOCK]
        total += len(block) - block.tolist().count(HOLE)
    return total


def copied_entries(entries: memoryview, chunks: int, layer: int) -> memoryview:
    """Return the map of the copy, whole pages of format I: ``layer`` where the source holds data, holes elsewhere.

    ``chunks``: those of the destination, at least as many as the source has.
    """
    copy = memoryview(bytearray(entry_bytes(chunks))).cast("I")
    for base in range(0, len(entries), _BLOCK):
        block = entries[base : base + _BLOCK]
        if not is_all_holes(block):
            copy[base : base + len(block)] = memoryview(array.array("I", [value and layer for value in block.tolist()]))
    return copy


class Batch(NamedTuple):
    """Consecutive chunks of the destination, within one segment, at most STEP bytes, and where each of them is now."""

    first: int
    chunks: int
    runs: tuple[Run, ...]


def batches(following: Iterable[Run]) -> Iterator[Batch]:
    """Join ascending runs that touch."""
    gathered: list[Run] = []
    for run in following:
        if gathered:
            first, end = gathered[0].first, gathered[-1].first + gathered[-1].chunks
            fits = run.first + run.chunks - first <= _CHUNKS_PER_STEP
            if run.first != end or not fits or run.first % CHUNKS_PER_SEGMENT == 0:
                yield Batch(first, end - first, tuple(gathered))
                gathered = []
        gathered.append(run)
    if gathered:
        first = gathered[0].first
        yield Batch(first, gathered[-1].first + gathered[-1].chunks - first, tuple(gathered))


# --- copying


class SourceFiles:
    """The segments of the source's layers: opened at first use, read-only, at most ``limit`` at a time.

    For one thread; another one has its own (``twin``).
    """

    def __init__(
        self, disk: Disk, dirfd: int, table: LayerTable, limit: int = SOURCE_FILES, *, direct: bool = False
    ) -> None:
        """Borrow ``dirfd``, the lineage directory. ``direct``: read past the page cache; buffers are pages then."""
        self._disk = disk
        self._dirfd = dirfd
        self._table = table
        self._limit = limit
        self._direct = direct
        self._leaves = LeafChecks(disk, dirfd, table.lineage)
        self._open: OrderedDict[tuple[int, int], _SourceFile] = OrderedDict()

    def twin(self) -> SourceFiles:
        """Return the same files for another thread."""
        return SourceFiles(self._disk, self._dirfd, self._table, self._limit, direct=self._direct)

    def read(self, run: Run, buffer: memoryview) -> None:
        """Fill ``buffer`` with the ciphertext of a run, compared with its leaves where there are some.

        Raises StoreDamaged, also when the disk cannot read it; HostFailure.
        """
        self.fetch(run, buffer)
        with _reading(f"the leaves of layer {run.layer}"):
            self._leaves.check(run.layer, self._table.uuid_of(run.layer), run.first, buffer)

    def fetch(self, run: Run, buffer: memoryview) -> None:
        """As ``read``, and nothing is compared."""
        segment, place = chunk_place(run.first)
        name = segment_name(run.layer, self._table.uuid_of(run.layer), segment)
        with _reading(name):
            file = self._file(run.layer, segment)
            if file.direct is None:
                pread_into_all(self._disk, file.fd, buffer, place, name)
                _forget(file.fd, place, len(buffer))
                return
            for at, end, cached in self._pieces(file.fd, place, len(buffer)):
                pread_into_all(self._disk, file.fd if cached else file.direct, buffer[at:end], place + at, name)

    def _pieces(self, fd: int, place: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (first, end, cached) of what is to be read in the same way; what is in memory comes from there."""
        began, before = 0, None
        for at in range(0, length, LOOK):
            cached = self._disk.is_cached(fd, place + at, min(LOOK, length - at))
            if before is not None and cached is not before:
                yield began, at, before
                began = at
            before = cached
        if before is not None:
            yield began, length, before

    def close(self) -> None:
        while self._open:
            self._close(self._open.popitem()[1])
        self._leaves.close()

    def _file(self, layer: int, segment: int) -> _SourceFile:
        file = self._open.get((layer, segment))
        if file is not None:
            self._open.move_to_end((layer, segment))
            return file
        while len(self._open) >= self._limit:
            self._close(self._open.popitem(last=False)[1])
        uuid = self._table.uuid_of(layer)
        fd = open_segment(self._disk, self._dirfd, layer, uuid, segment, writable=False)
        file = self._open[layer, segment] = _SourceFile(fd)
        if self._direct:
            direct = open_segment(self._disk, self._dirfd, layer, uuid, segment, writable=False)
            if self._disk.make_direct(direct):
                file.direct = direct
            else:
                self._disk.close(direct)
        return file

    def _close(self, file: _SourceFile) -> None:
        self._disk.close(file.fd)
        if file.direct is not None:
            self._disk.close(file.direct)


@dataclass(slots=True)
class _SourceFile:
    """One segment: a descriptor that reads through the page cache and, where that is wanted, one that does not."""

    fd: int
    direct: int | None = None


def _forget(fd: int, offset: int, length: int) -> None:
    """Tell the kernel not to keep these bytes cached (length 0: to the end): a copy must not evict what others use."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a copy is; bytes count stored chunks only, those of earlier runs included."""

    state: str
    """copying, done or failed."""
    done: int
    total: int
    done_through: int
    """Chunks [0, done_through) are durable in the destination."""
    error: EbsdError | None
    checkpoint: Mapping[str, str]
    """What another worker needs to go on from there."""


class Copy:
    """The data of one copy: ``run`` copies in a thread of its own, all else may be called from any other."""

    def __init__(
        self,
        *,
        disk: Disk,
        entries: memoryview,
        size: int,
        source: SourceFiles,
        source_codec: Callable[[int], LayerCodec],
        target: str,
        target_fds: Sequence[int],
        target_codec: Callable[[], LayerCodec],
        done_through: int,
        checkpoint: Mapping[str, str] | None = None,
        leaves: TargetLeaves | None = None,
        floor: int = 0,
        rate: int = 0,
    ) -> None:
        """``entries`` and ``size`` (bytes) are the source's, ``target_fds`` all segments of the destination's layer.

        ``leaves`` takes the digests of what is written, when it is the layer of a snapshot. ``floor``: free bytes of
        the file system that the copy leaves alone; at the floor it fails with NoSpace. ``rate``: bytes per second at
        most, 0 for no limit.
        """
        self._disk = disk
        self._entries = entries
        self._size = size
        self._source = source
        self._source_codec = source_codec
        self._target = target
        self._target_fds = target_fds
        self._target_codec = target_codec
        self._total = data_chunks(entries) * CHUNK
        self._done = data_chunks(entries[:done_through]) * CHUNK
        self._counting = threading.Lock()
        self._durable: tuple[int, Mapping[str, str]] = (done_through, checkpoint or {})
        """DoneThrough and the checkpoint that belongs to it."""
        self._leaves = leaves
        self._floor = floor
        self._pacer = PacerOfMany(rate)
        self._state = "copying"
        self._error: EbsdError | None = None
        self._stopping = threading.Event()
        # A map of its own for each thread, as what goes past the page cache must begin at a page.
        self._buffers = [page_buffer() for _ in range(LANES)]
        made_direct = [disk.make_direct(fd) for fd in target_fds]
        self._direct = all(made_direct)
        self._unsynced: set[int] = set()

    def progress(self) -> Progress:
        # The error is set before the state, and the state read before the error.
        state = self._state
        done_through, checkpoint = self._durable
        return Progress(state, self._done, self._total, done_through, self._error, checkpoint)

    def limit(self, rate: int) -> None:
        """Change how many bytes per second are copied at most; 0: no limit."""
        self._pacer.limit(rate)

    def stop(self) -> None:
        """Make ``run`` return after its present step; what it synced stays."""
        self._stopping.set()

    def fail(self, error: EbsdError) -> None:
        """End this copy for good; what is durable stays durable."""
        self._error = error
        self._state = "failed"

    def run(self) -> None:
        """Copy everything from DoneThrough on. Raises nothing: ``progress`` tells how it ended."""
        error: EbsdError | None = None
        done = False
        try:
            done = self._copy()
        except EbsdError as exc:
            error = exc
        except Exception as exc:  # noqa: BLE001 - reported as an incident
            error = as_ebsd_error(exc, log_incident)
        if not done and self._leaves is not None:
            self._leaves.abandon()
        for buffer in self._buffers:
            buffer[:] = bytes(STEP)  # a step that failed may have left plaintext
        if error is not None:
            self.fail(error)
        elif done:
            self._state = "done"

    def _copy(self) -> bool:
        """Copy; False when stopped before the end."""
        if self._leaves is not None and not self._take_over(self._leaves):
            return False
        pending = 0
        synced_at = time.monotonic()
        with contextlib.ExitStack() as stack:
            lanes = []
            for buffer in self._buffers:
                source = self._source.twin()
                stack.callback(source.close)
                lanes.append(partial(self._carry, source, buffer))
            crew = stack.enter_context(Crew(lanes))
            for batch, leaves in crew.results(batches(runs(self._entries, self._durable[0]))):
                if self._leaves is not None:
                    with _writing(self._target):
                        self._leaves.add(leaves)
                self._unsynced.add(chunk_place(batch.first)[0])
                pending += batch.chunks * CHUNK
                if self._stopping.is_set():
                    return False
                if pending >= SYNC_BYTES or time.monotonic() - synced_at >= SYNC_SECONDS:
                    self._sync(batch.first + batch.chunks)
                    pending, synced_at = 0, time.monotonic()
        self._sync(len(self._entries))
        return True

    def _take_over(self, leaves: TargetLeaves) -> bool:
        """Have the leaves of what earlier runs wrote, from their notes or from what they wrote; False when stopped."""
        done_through, checkpoint = self._durable
        if not done_through:
            return True
        earlier = data_chunks(self._entries[:done_through])
        with _writing(self._target):
            if leaves.take_over(earlier, checkpoint.get("Leaves", "")):
                return True
        for batch in batches(runs(self._entries[:done_through], 0)):
            if self._stopping.is_set():
                return False
            segment, place = chunk_place(batch.first)
            view = self._buffers[0][: batch.chunks * CHUNK]
            with _writing(self._target):
                pread_into_all(self._disk, self._target_fds[segment], view, place, self._target)
                leaves.add(leaf_digests(leaves.uuid, batch.first, view))
        return True

    def _carry(self, source: SourceFiles, buffer: memoryview, batch: Batch) -> list[bytes]:
        """Copy one batch, and return its leaves when somebody wants them; in any thread."""
        if self._stopping.is_set():
            return []  # nobody counts it
        self._pacer.spend(batch.first, batch.chunks * CHUNK, self._stopping)
        self._check_room(batch.chunks * CHUNK)
        whole = buffer[: batch.chunks * CHUNK]
        for run in batch.runs:
            view = whole[(run.first - batch.first) * CHUNK :][: run.chunks * CHUNK]
            source.read(run, view)
            self._source_codec(run.layer).decrypt_into(view, view, run.first * _SECTORS_PER_CHUNK)
        beyond = (batch.first + batch.chunks) * CHUNK - self._size
        if beyond > 0:
            # Behind the end of the source nobody could write; in a larger volume it is inside and reads as zeros.
            whole[-beyond:] = bytes(beyond)
        self._target_codec().encrypt_into(whole, whole, batch.first * _SECTORS_PER_CHUNK)
        segment, place = chunk_place(batch.first)
        with _writing(self._target):
            pwrite_all(self._disk, self._target_fds[segment], whole, place)
        with self._counting:  # here, as a batch that waits for an earlier one of a slow thread is copied all the same
            self._done += len(whole)
        return [] if self._leaves is None else leaf_digests(self._leaves.uuid, batch.first, whole)

    def _check_room(self, length: int) -> None:
        """Raise NoSpace at the floor: what lies below it is for volumes in use and for deletions."""
        try:
            usage = self._disk.statvfs(self._target_fds[0])
        except OSError:
            return  # what the disk says to the write counts
        if usage.f_bavail * usage.f_frsize - length < self._floor:
            raise NoSpace(where=f"for the data of {self._target}")

    def _sync(self, through: int) -> None:
        for segment in sorted(self._unsynced):
            with _writing(self._target):
                self._disk.fdatasync(self._target_fds[segment])
            if not self._direct:
                _forget(self._target_fds[segment], 0, 0)
        self._unsynced.clear()
        checkpoint: Mapping[str, str] = {}
        if self._leaves is not None:
            with _writing(self._target):
                checkpoint = {"Leaves": self._leaves.note()}
        self._durable = (through, checkpoint)


def page_buffer() -> memoryview:
    """Return STEP bytes that begin at a page: of one huge page, if there is one, which is one piece to the disk.

    Of small pages the disk takes some hundred a request, so a batch would be split; and each is looked up by itself.
    """
    pages = mmap.mmap(-1, STEP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn errors of reading what is stored into StoreDamaged when the disk has lost it, else into HostFailure.

    Whoever has no descriptor or memory left must not say of a good snapshot that it is damaged: that is remembered.
    """
    try:
        yield
    except OSError as exc:
        if exc.errno in UNREADABLE:
            raise StoreDamaged(file=what, reason=f"it cannot be read: {exc.strerror}") from exc
        raise HostFailure(where=f"at {what}", reason=exc.strerror or str(exc)) from exc


@contextlib.contextmanager
def _writing(what: str) -> Iterator[None]:
    """Turn errors of writes and syncs into NoSpace or HostFailure: nothing that was there is damaged by them."""
    try:
        yield
    except OSError as exc:
        if exc.errno in _SPACE:
            raise NoSpace(where=f"for the data of {what}") from exc
        raise HostFailure(where=f"at the data of {what}", reason=exc.strerror or str(exc)) from exc


# --- one copy, from the request to the signed record


@dataclass(slots=True)
class _Job:
    """What a copy holds: keys and descriptors go with ``close``."""

    fds: list[int]
    keys: list[Secret] = field(default_factory=list)
    factories: list[CodecFactory] = field(default_factory=list)
    copy: Copy | None = None

    def wipe(self) -> None:
        """Clear every key; may be called again."""
        for factory in self.factories:
            factory.close()
        for key in self.keys:
            key.wipe()

    def close(self) -> None:
        """Clear every key and close every descriptor; may be called again."""
        self.wipe()
        while self.fds:
            os.close(self.fds.pop())


@dataclass(frozen=True, slots=True)
class _Destination:
    claim: Claim
    is_snapshot: bool
    layer: int
    key: Secret | None
    body: SignedBody
    table: LayerTable
    map_fd: int
    leaves: TargetLeaves | None
    """Of a snapshot; a volume's layer takes writes, and is hashed when it is sealed."""


class CopyWorker:
    """One copy, from ``start`` to ``finish``."""

    def __init__(self, disk: Disk | None = None) -> None:
        self._disk: Disk = disk or RealDisk()
        self._job: _Job | None = None
        self._copy: Copy | None = None
        self._entries = memoryview(b"").cast("I")
        self._destination: _Destination | None = None
        self._finished: dict[str, Any] | None = None
        self._ended = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def run(self, parent: socket.socket) -> None:
        """Serve ebsd until it is gone; then stop copying, wipe and return."""
        handlers: dict[str, ChannelHandler] = {
            "start": self._start, "progress": self._progress, "finish": self._finish
        }  # fmt: skip
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await serve_until_gone(parent, handlers)
            finally:
                with trio.CancelScope(shield=True):
                    await self._end()
                nursery.cancel_scope.cancel()

    @property
    def hangs(self) -> bool:
        """Whether the copying thread did not end in time and must be left to the end of the process."""
        return self._copy is not None and not self._ended.is_set()

    async def _end(self) -> None:
        if self._copy is not None:
            self._copy.stop()
            with trio.move_on_after(STOP_SECONDS):
                await self._ended.wait()
        if self._job is not None:
            if self.hangs:  # its descriptors are in use
                self._job.wipe()
            else:
                self._job.close()

    async def _run_copy(self, copy: Copy, job: _Job) -> None:
        await trio.to_thread.run_sync(copy.run, abandon_on_cancel=True)
        self._ended.set()
        error = copy.progress().error
        if error is not None:
            log.error("the copy failed: %s", error)
            job.wipe()  # a failed copy never goes on in this process

    # --- requests of ebsd

    async def _start(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Verify both ends and begin.

        {"Source": {"ResourceId", "Owner", "Lineage", "Size", "Cipher", "KeyArn", "AuthorityIds"}, "SourceRecord",
        "Destination": {"ResourceId", "Owner", "Lineage", "Size", "Cipher", "KeyArn", "Kind", "Layer"},
        "DestinationRecord", "DoneThrough", "Checkpoint", "SpaceReserve", "Rate"}: sizes in bytes, records in base64,
        ``Cipher`` as in the record, ``KeyArn`` null without a key, ``Kind`` volume or snapshot. ``Layer`` is the one
        layer of the destination; a volume's may be called ``Head``.

        Descriptors: session and session, lineage directory and sealed map of the source; lineage directory, map and
        all layer segments (O_RDWR) of the destination. The map is a file for the sealed map, which holds the worker's
        notes until then (``targetleaves``), or a new volume's durable map.

        {"Chunks", "DataChunks", "Unverified"}: chunks of the source, those that hold data, and whether no signature
        covers the source's map. Raises IntegrityFailure, RecordTooOld, the error of a session, StoreDamaged. After
        an error nothing is held, and ``start`` may come again.
        """
        job = _Job(fds)
        try:
            if self._job is not None:
                raise IncorrectState(reason="This worker copies already")
            answer = await trio.to_thread.run_sync(self._prepare, params, job)
        except BaseException:
            job.close()
            raise
        self._job, self._copy = job, job.copy
        if self._nursery is None or job.copy is None:
            raise AssertionError("BUG: a request before run")
        self._nursery.start_soon(self._run_copy, job.copy, job)
        return answer, ()

    async def _progress(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """{"Rate"} -> {"State": copying, done or failed, "Done", "Total", "DoneThrough", "Checkpoint", "Error"?}.

        ``Rate``: bytes per second at most from now on, 0 for no limit.
        ``Done`` and ``Total`` are bytes of stored chunks, ``DoneThrough`` is the chunk below which all is durable,
        ``Error`` is {"Code", "Message", "Hint"}.
        """
        _close_all(fds)
        if self._copy is None:
            raise IncorrectState(reason="This worker has not begun")
        if "Rate" in params:
            self._copy.limit(int(params["Rate"]))
        progress = self._copy.progress()
        answer: dict[str, Any] = {
            "State": progress.state,
            "Done": progress.done,
            "Total": progress.total,
            "DoneThrough": progress.done_through,
            "Checkpoint": dict(progress.checkpoint),
        }
        if progress.error is not None:
            error = progress.error
            answer["Error"] = {"Code": error.code, "Message": error.message, "Hint": error.hint}
        return answer, ()

    async def _finish(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """{} -> {"Record": the signed record in base64, "Generation": 1}, with the map durable and the keys wiped.

        Answered again in the same words. Raises IncorrectState before the state is done; NoSpace, after which it may
        be asked again; StoreDamaged and HostFailure, after which the copy has failed.
        """
        _close_all(fds)
        if self._finished is not None:
            return self._finished, ()
        if self._copy is None or self._job is None or self._destination is None:
            raise IncorrectState(reason="This worker has not begun")
        state = self._copy.progress().state
        if state != "done":
            raise IncorrectState(reason=f"The copy is not done; its state is {state}")
        await self._ended.wait()  # the thread says "done" a moment before it has ended
        try:
            record = await trio.to_thread.run_sync(self._write_map_and_sign, self._destination)
        except NoSpace:
            raise
        except EbsdError as exc:
            self._copy.fail(exc)
            self._job.close()
            raise
        self._finished = {"Record": base64.b64encode(record).decode(), "Generation": 1}
        self._job.close()
        return self._finished, ()

    # --- in a thread

    def _prepare(self, params: dict[str, Any], job: _Job) -> dict[str, Any]:
        """Ask both sessions, verify both ends, and make the copy; what it opens goes into ``job`` at once."""
        if len(job.fds) < _FIXED_DESCRIPTORS + 2:
            raise IncorrectState(reason="Descriptors are missing")
        answers: list[keysession.Answer] = []
        sessions = [socket.socket(fileno=job.fds.pop(0)) for _ in range(2)]
        with contextlib.ExitStack() as unasked:
            for session in sessions:
                unasked.enter_context(session)
            for session in sessions:
                answer = keysession.ask(session)
                answers.append(answer)
                if answer.data_key is not None:
                    job.keys.append(answer.data_key)
        source_fd, source_map_fd, target_fd, map_fd, *segments = job.fds
        source = claim_of(params["Source"], head=0)
        kind = params["Destination"]["Kind"]
        if kind not in ("snapshot", "volume"):
            raise NotSupported(what=f"a copy into the kind {kind!r}", remedy="")
        is_snapshot = kind == "snapshot"
        layer = int(params["Destination"].get("Layer") or params["Destination"]["Head"])
        target = claim_of(params["Destination"], head=0 if is_snapshot else layer)
        _check_pair(source, target, answers[0].data_key, answers[1].data_key)

        with found_in(source):
            record = record_of(params["SourceRecord"])
            authority_ids = [str(item) for item in params["Source"]["AuthorityIds"]]
            believed = believe_snapshot(source, answers[0].anchor, answers[0].data_key, record, authority_ids)
            # A volume of this lineage may be appending a layer right now: only what is relied on is read.
            table = table_of(self._disk, source_fd, believed.table_count)
            check_snapshot_table(source, believed, table)
            sealed = sealed_map_of(self._disk, source_map_fd, source)
            unverified = check_snapshot_map(source, believed, sealed)
            covered = covered_layers(believed.covering, sealed.entries)
            uuids = {number: table.uuid_of(number) for number in covered}
            slots = read_slots(self._disk, source_fd, table.lineage, uuids)
            check_leaf_root(source, believed.covering, covered, slots)
        with found_in(target):
            record = record_of(params["DestinationRecord"])
            target_table = table_of(self._disk, target_fd, None)
            body = check_destination(target, answers[1].anchor, answers[1].data_key, record, target_table, layer)
            self._check_segments(target, segments)
            if not is_snapshot:
                self._check_volume_map(target, map_fd, sealed.entries)
        done_through = int(params["DoneThrough"])
        if not 0 <= done_through <= sealed.chunks:
            raise IncorrectState(reason=f"A copy of {sealed.chunks} chunks cannot be done through {done_through}")

        source_factory = CodecFactory(answers[0].data_key, cipher=source.cipher)
        target_factory = CodecFactory(answers[1].data_key, cipher=target.cipher)
        job.factories += [source_factory, target_factory]
        target_uuid = target_table.uuid_of(layer)
        leaves: TargetLeaves | None = None
        if is_snapshot:
            stored = stored_in_map(sealed.entries)
            leaves = TargetLeaves(self._disk, target_fd, target_table, layer, stored, map_fd)
        job.copy = Copy(
            disk=self._disk,
            entries=sealed.entries,
            size=source.size,
            source=SourceFiles(self._disk, source_fd, table, direct=True),
            source_codec=lambda number: source_factory.codec(table.uuid_of(number)),
            target=target.volume,
            target_fds=segments,
            target_codec=lambda: target_factory.codec(target_uuid),
            done_through=done_through,
            checkpoint=params.get("Checkpoint") or {},
            leaves=leaves,
            floor=int(params.get("SpaceReserve", 0)),
            rate=int(params.get("Rate", 0)),
        )
        self._entries = sealed.entries
        self._destination = _Destination(
            target, is_snapshot, layer, answers[1].data_key, body, target_table, map_fd, leaves
        )
        data = job.copy.progress().total // CHUNK
        return {"Chunks": sealed.chunks, "DataChunks": data, "Unverified": unverified}

    def _check_segments(self, claim: Claim, fds: Sequence[int]) -> None:
        """Raise StoreDamaged unless these are all segments of the layer, with their lengths."""
        if len(fds) != segment_count(claim.size):
            raise StoreDamaged(file=claim.volume, reason=f"it cannot have {len(fds)} segments")
        for number, fd in enumerate(fds):
            status = self._disk.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != segment_size(claim.size, number):
                raise StoreDamaged(file=claim.volume, reason=f"segment {number} of its layer has a wrong length")

    def _check_volume_map(self, claim: Claim, fd: int, entries: memoryview) -> None:
        durable = DurableMap.from_fd(self._disk, fd, "map")
        header = durable.header
        chunks = chunk_count(claim.size)
        if (header.volume, header.lineage, header.head, header.chunks) != (
            claim.volume, claim.lineage, claim.head, chunks
        ):  # fmt: skip
            raise StoreDamaged(file="map", reason="it is that of another volume")
        check_destination_map(claim, durable.entries(), copied_entries(entries, chunks, claim.head))

    def _write_map_and_sign(self, destination: _Destination) -> bytes:
        """Return the 320 bytes of the signed record, with the map durable. Raises as ``finish``."""
        claim = destination.claim
        chunks = chunk_count(claim.size)
        entries = copied_entries(self._entries, chunks, destination.layer)
        root = NO_HASH
        with _writing(claim.volume):
            if destination.leaves is not None:
                root = destination.leaves.root()
            if destination.is_snapshot:
                data = encode_sealed_map(SnapshotId(claim.volume), LineageId(claim.lineage), entries, chunks)
                self._disk.ftruncate(destination.map_fd, 0)
                pwrite_all(self._disk, destination.map_fd, data, 0)
                self._disk.fsync(destination.map_fd)
            else:
                _write_durable_map(DurableMap.from_fd(self._disk, destination.map_fd, "map"), entries)
        digest = map_hash(entries, chunks)
        body = next_body(destination.body, claim, destination.table, RecordState.CLEAN, digest, root)
        return sign(body, destination.key)


def _write_durable_map(durable: DurableMap, entries: memoryview) -> None:
    """Write all entries, durable at return. Extents of holes are left: ``start`` saw that they name nothing."""
    view = entries.cast("B")
    for at in range(0, len(view), EXTENT):
        extent = view[at : at + EXTENT]
        if not is_all_holes(extent):
            durable.write_out(at // ENTRY, (at + len(extent)) // ENTRY)
            durable.write_page(at // PAGE, bytes(extent))
    durable.sync()


# --- what came with the request


def _check_pair(source: Claim, target: Claim, source_key: Secret | None, target_key: Secret | None) -> None:
    """Refuse a copy that would not be one: into the same lineage, under the same key, or into less space."""
    if source.lineage == target.lineage:
        raise IntegrityFailure(resource=target.volume, reason="it is of the lineage that it is to be a copy of")
    if source_key is not None and target_key is not None and source_key.equals(target_key):
        raise IntegrityFailure(resource=target.volume, reason="its data key is that of what it is to be a copy of")
    if target.size < source.size:
        raise IntegrityFailure(resource=target.volume, reason=f"its {target.size} bytes cannot hold {source.size}")


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def main() -> None:
    """Become a holder of keys, serve descriptor 0, and end with it."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    parent = secrecy.begin(log, Kind.WORKER)
    worker = CopyWorker()
    status = 0
    try:
        trio.run(worker.run, parent)
    except* EbsdError as group:
        log.error("%s", group.exceptions[0])
        status = 1
    if worker.hangs:
        # Its thread is in a system call that does not return: the interpreter would wait for it.
        os._exit(status or 1)
    sys.exit(status)


if __name__ == "__main__":
    main()
