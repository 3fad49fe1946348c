"""The block writer: fills the one new layer of a snapshot with blocks that a client gives, and signs the snapshot.

Started by ebsd for one pending snapshot, ended after a while without work, and told everything over descriptor 0
(``start``, ``put``, ``check``, ``seal``; what they take and give stands at their handlers). It ends with that channel.

1. ``put`` answers when the blocks are durable in the layer. Which ones were answered is ebsd's to remember; all else in
   the layer is nothing, and no map names it.
2. A client's memory file is hostile: it may change while it is read. It is read once, into memory of our own, and what
   is compared with the checksum is what is encrypted. Only memory files are read: such a read cannot be made to hang.
3. Two writers never write to one layer: the first segment is locked for as long as its descriptor lives, so that what a
   writer of an ebsd that was killed still does in the kernel comes before anything of the next one.
4. ``seal`` hashes the layer, and leaves are written once: ebsd asks for it when no block can be put any more. The map
   comes last: the parent's, with the layer in place of every block that was put.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import trio

from ebsd.crypto.codec import CodecFactory
from ebsd.crypto.secret import Secret
from ebsd.domain.blocks import (
    BLOCK,
    MOST_AT_ONCE,
    block_chunks,
    block_count,
    check_block,
    parse_checksum,
)
from ebsd.domain.errors import (
    AggregateMismatch,
    BlockDataUnusable,
    ChecksumMismatch,
    HostFailure,
    IncorrectState,
    IntegrityFailure,
    NoSpace,
    StoreDamaged,
)
from ebsd.domain.geometry import chunk_count, chunk_place, segment_count, segment_size
from ebsd.domain.ids import LineageId, SnapshotId
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.ipc.channel import ChannelHandler
from ebsd.store.blocklists import overlay, written_blocks
from ebsd.store.disk import Disk, RealDisk, pread_all, pread_into_all, pwrite_all
from ebsd.store.entries import entry_bytes, map_hash, named_layers
from ebsd.store.layertable import LayerTable
from ebsd.store.leaftable import leaf_root, read_slots
from ebsd.store.leaves import Runs, remove_unfinished
from ebsd.store.sealedmap import encode_sealed_map
from ebsd.store.signedrecord import NO_HASH, RecordState, SignedBody
from ebsd.volume import keysession
from ebsd.volume.block_reader import opened_snapshot
from ebsd.volume.hashing import hash_layer, slots_of
from ebsd.volume.inputs import claim_of, found_in, record_of, table_of
from ebsd.volume.verify import Claim, next_body, sign
from ebsd.volume.verify_snapshot import check_filled
from ebsd.volume.worker import run_worker, serve_until_gone

log = logging.getLogger("ebsd-block-writer")

LOCK_SECONDS: Final = 20.0
"""How long another writer, which is being killed, may take to be gone."""

_SECTORS_PER_CHUNK: Final = CHUNK // SECTOR
_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


class _Target(NamedTuple):
    """The snapshot that is filled."""

    claim: Claim
    layer: int
    uuid: bytes
    body: SignedBody
    table: LayerTable
    key: Secret | None
    lineage_fd: int
    segments: list[int]
    entries: memoryview
    """The parent's map in whole pages of this snapshot's length, format I; without a parent all holes."""


class BlockWriter:
    """One pending snapshot."""

    def __init__(self, disk: Disk | None = None) -> None:
        self._disk: Disk = disk or RealDisk()
        self._fds: list[int] = []
        self._keys: list[Secret] = []
        self._factory: CodecFactory | None = None
        self._target: _Target | None = None
        self._floor = 0
        self._buffer = memoryview(bytearray(BLOCK))

    async def run(self, parent: socket.socket) -> None:
        """Serve ebsd until it is gone; then wipe and return."""
        handlers: dict[str, ChannelHandler] = {
            "start": self._start, "put": self._put, "check": self._check, "seal": self._seal
        }  # fmt: skip
        try:
            await serve_until_gone(parent, handlers)
        finally:
            self.wipe()

    def wipe(self) -> None:
        """Clear the keys and the plaintext, and close all files."""
        if self._factory is not None:
            self._factory.close()
        for key in self._keys:
            key.wipe()
        self._buffer[:] = bytes(BLOCK)
        while self._fds:
            os.close(self._fds.pop())

    # --- requests of ebsd

    async def _start(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Verify what is to be filled, and its parent.

        {"Destination": {"ResourceId", "Owner", "Lineage", "Size", "Cipher", "KeyArn"}, "DestinationRecord", "Layer",
        "Parent": {"Source", "AuthorityIds", "Record"} as a reader's ``open`` has them, or null, "SpaceReserve"}.
        Descriptors: with a parent its key session, lineage directory and map; then key session, lineage directory and
        all segments (O_RDWR) of the destination. {} as answer. Raises IntegrityFailure, RecordTooOld, the error of a
        session, StoreDamaged, HostFailure while another writer has the layer.
        """
        self._fds += fds
        if self._target is not None:
            raise IncorrectState(reason="This writer has begun already")
        await trio.to_thread.run_sync(self._start_in_thread, params)
        return {}, ()

    async def _put(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """{"Blocks": [[number, SHA-256 in base64]]}, a client's memory file with 512 KiB for each, in this order -> {}.

        All of them are durable, or an error says why not; then any of them may hold anything. Raises
        ChecksumMismatch, BlockDataUnusable, NoSpace, HostFailure.
        """
        try:
            if len(fds) != 1:
                raise IncorrectState(reason="One descriptor has the data")
            await trio.to_thread.run_sync(self._put_in_thread, params["Blocks"], fds[0])
        finally:
            for fd in fds:
                await trio.to_thread.run_sync(os.close, fd)  # a client's may take its time
        return {}, ()

    async def _check(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Compare {"Checksum": in base64} with the digests of all blocks that were put, as they are stored -> {}.

        Descriptor: a memory file of ebsd with a bit for each block that was put. Raises AggregateMismatch, HostFailure.
        """
        try:
            await trio.to_thread.run_sync(self._check_in_thread, parse_checksum(params["Checksum"]), fds[0])
        finally:
            _close(fds)
        return {}, ()

    async def _seal(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """{} -> {"Record": the signed record in base64}; may be asked again, with the same blocks.

        Descriptors: as of ``check``, and the new map, an empty file; it is durable at return. Raises NoSpace,
        HostFailure, StoreDamaged.
        """
        try:
            bits_fd, map_fd = fds
            record = await trio.to_thread.run_sync(self._seal_in_thread, bits_fd, map_fd)
        finally:
            _close(fds)
        return {"Record": base64.b64encode(record).decode()}, ()

    # --- start

    def _start_in_thread(self, params: dict[str, Any]) -> None:
        fds = list(self._fds)
        self._fds.clear()
        try:
            claim = claim_of(params["Destination"], head=0)
            chunks = chunk_count(claim.size)
            entries = memoryview(bytearray(entry_bytes(chunks))).cast("I")
            parent_key: Secret | None = None
            parent = params["Parent"]
            if parent is not None:
                parent_key = self._take_parent(parent, claim, entries, fds)
            answer = keysession.ask(socket.socket(fileno=fds.pop(0)))
            if answer.data_key is not None:
                self._keys.append(answer.data_key)
            if parent is not None:
                _check_same_key(claim, parent_key, answer.data_key)
            lineage_fd, *segments = fds
            layer = int(params["Layer"])
            with found_in(claim):
                record = record_of(params["DestinationRecord"])
                # A volume of this lineage may be getting a new layer: only what is relied on is read.
                table = table_of(self._disk, lineage_fd, record.body().table_count)
                body = check_filled(claim, answer.anchor, answer.data_key, record, table, layer, alone=parent is None)
                self._check_segments(claim, segments)
            _lock(segments[0])
        except BaseException:
            self._fds += fds
            raise
        self._fds += fds
        self._floor = int(params["SpaceReserve"])
        self._factory = CodecFactory(answer.data_key, cipher=claim.cipher)
        self._target = _Target(
            claim, layer, table.uuid_of(layer), body, table, answer.data_key, lineage_fd, segments, entries
        )

    def _take_parent(self, members: dict[str, Any], claim: Claim, entries: memoryview, fds: list[int]) -> Secret | None:
        """Verify the parent and copy its map into ``entries``; takes three of the descriptors."""
        source = claim_of(members["Source"], head=0)
        answer = keysession.ask(socket.socket(fileno=fds.pop(0)))
        if answer.data_key is not None:
            self._keys.append(answer.data_key)
        if (source.lineage, source.cipher) != (claim.lineage, claim.cipher) or source.size > claim.size:
            raise IntegrityFailure(resource=claim.volume, reason=f"{source.volume} cannot be its parent")
        opened = opened_snapshot(self._disk, source, answer, members, fds[0], fds[1])
        used = opened.chunks
        entries[:used] = opened.entries[:used]
        opened.files.close()
        for _ in range(2):
            os.close(fds.pop(0))
        return answer.data_key

    def _check_segments(self, claim: Claim, fds: Sequence[int]) -> None:
        if len(fds) != segment_count(claim.size):
            raise StoreDamaged(file=claim.volume, reason=f"it cannot have {len(fds)} segments")
        for number, fd in enumerate(fds):
            status = self._disk.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != segment_size(claim.size, number):
                raise StoreDamaged(file=claim.volume, reason=f"segment {number} of its layer has a wrong length")

    # --- put

    def _begun(self) -> _Target:
        if self._target is None:
            raise IncorrectState(reason="This writer has not begun")
        return self._target

    def _put_in_thread(self, blocks: Sequence[Sequence[Any]], fd: int) -> None:
        target = self._begun()
        size = target.claim.size
        if not 1 <= len(blocks) <= MOST_AT_ONCE:
            raise IncorrectState(reason=f"{len(blocks)} blocks at once")
        wanted = [(check_block(int(number), size), parse_checksum(str(checksum))) for number, checksum in blocks]
        self._check_room(target, len(blocks) * BLOCK)
        try:
            fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            raise BlockDataUnusable(reason="it does not come in a memory file (memfd_create)") from None
        written: set[int] = set()
        try:
            for at, (block, digest) in enumerate(wanted):
                self._receive(fd, at * BLOCK, block, digest)
                written.add(self._store(target, block))
            with _writing(target.claim.volume):
                for segment in sorted(written):
                    self._disk.fdatasync(target.segments[segment])
        finally:
            self._buffer[:] = bytes(BLOCK)

    def _receive(self, fd: int, offset: int, block: int, digest: bytes) -> None:
        """Read one block of a client's memory file, once, and compare it with its checksum."""
        at = 0
        try:
            while at < BLOCK:
                with self._buffer[at:] as rest:
                    got = os.preadv(fd, [rest], offset + at)
                if not got:
                    raise BlockDataUnusable(reason=f"it is shorter than the {BLOCK} bytes of each block")
                at += got
        except OSError as exc:
            raise BlockDataUnusable(reason=f"it cannot be read ({exc.strerror})") from exc
        if hashlib.sha256(self._buffer).digest() != digest:
            raise ChecksumMismatch(block=block)

    def _store(self, target: _Target, block: int) -> int:
        """Encrypt the buffer and write it to its place; returns the segment."""
        inside = min(BLOCK, target.claim.size - block * BLOCK)
        if any(bytes(self._buffer[inside:])):
            raise BlockDataUnusable(reason=f"block {block} has data behind the end of the volume")
        chunks = block_chunks(block, chunk_count(target.claim.size))
        segment, place = chunk_place(chunks.start)
        view = self._buffer[: len(chunks) * CHUNK]
        if self._factory is None:
            raise AssertionError("BUG: a target without a codec")
        self._factory.codec(target.uuid).encrypt_into(view, view, chunks.start * _SECTORS_PER_CHUNK)
        with _writing(target.claim.volume):
            pwrite_all(self._disk, target.segments[segment], view, place)
        return segment

    def _check_room(self, target: _Target, length: int) -> None:
        """Raise NoSpace at the floor: what lies below it is for volumes in use and for deletions."""
        try:
            usage = self._disk.statvfs(target.segments[0])
        except OSError:
            return  # what the disk says to the write counts
        if usage.f_bavail * usage.f_frsize - length < self._floor:
            raise NoSpace(where=f"for the data of {target.claim.volume}")

    # --- complete

    def _written(self, target: _Target, bits_fd: int) -> bytes:
        written = bytes(pread_all(self._disk, bits_fd, self._disk.fstat(bits_fd).st_size, 0, "the written blocks"))
        blocks = written_blocks(written)
        if blocks and blocks[-1] >= block_count(target.claim.size):
            raise StoreDamaged(file="catalog", reason=f"it says that block {blocks[-1]} was written")
        return written

    def _check_in_thread(self, wanted: bytes, bits_fd: int) -> None:
        target = self._begun()
        if self._factory is None:
            raise AssertionError("BUG: a target without a codec")
        codec = self._factory.codec(target.uuid)
        aggregate = hashlib.sha256()
        try:
            for block in written_blocks(self._written(target, bits_fd)):
                chunks = block_chunks(block, chunk_count(target.claim.size))
                segment, place = chunk_place(chunks.start)
                self._buffer[:] = bytes(BLOCK)
                view = self._buffer[: len(chunks) * CHUNK]
                with _writing(target.claim.volume):
                    pread_into_all(self._disk, target.segments[segment], view, place, target.claim.volume)
                codec.decrypt_into(view, view, chunks.start * _SECTORS_PER_CHUNK)
                aggregate.update(hashlib.sha256(self._buffer).digest())
        finally:
            self._buffer[:] = bytes(BLOCK)
        if aggregate.digest() != wanted:
            raise AggregateMismatch(snapshot=target.claim.volume)

    def _seal_in_thread(self, bits_fd: int, map_fd: int) -> bytes:
        """Return the 320 bytes of the signed record, with leaves and map durable."""
        target = self._begun()
        written = self._written(target, bits_fd)
        chunks = chunk_count(target.claim.size)
        entries = memoryview(bytearray(target.entries.cast("B"))).cast("I")
        overlay(entries, written, target.layer, chunks)
        root = self._leaf_root(target, entries, written_blocks(written), chunks)
        with _writing(target.claim.volume):
            data = encode_sealed_map(SnapshotId(target.claim.volume), LineageId(target.claim.lineage), entries, chunks)
            self._disk.ftruncate(map_fd, 0)
            pwrite_all(self._disk, map_fd, data, 0)
            self._disk.fsync(map_fd)
        digest = map_hash(entries, chunks)
        return sign(next_body(target.body, target.claim, target.table, RecordState.CLEAN, digest, root), target.key)

    def _leaf_root(self, target: _Target, entries: memoryview, blocks: Sequence[int], chunks: int) -> bytes:
        """Hash the layer and return the root over all layers that the map names; NO_HASH when one has no leaves."""
        lineage, number, uuid = target.table.lineage, target.layer, target.uuid
        with _writing(target.claim.volume):
            if blocks and number not in read_slots(self._disk, target.lineage_fd, lineage, {number: uuid}):
                remove_unfinished(self._disk, target.lineage_fd)  # of a writer that died
                runs = Runs(_ranges(blocks, chunks))
                hash_layer(self._disk, target.lineage_fd, lineage, number, uuid, runs)
            uuids = {layer: target.table.uuid_of(layer) for layer in named_layers(entries)}
            slots, missing = slots_of(self._disk, target.lineage_fd, lineage, uuids)
        return NO_HASH if missing else leaf_root(slots.values())


def _ranges(blocks: Sequence[int], chunks: int) -> Iterator[tuple[int, int]]:
    for block in blocks:
        those = block_chunks(block, chunks)
        yield those.start, those.stop


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _check_same_key(claim: Claim, parent: Secret | None, own: Secret | None) -> None:
    same = parent.equals(own) if parent is not None and own is not None else parent is own
    if not same:
        raise IntegrityFailure(resource=claim.volume, reason="its data key is not that of its parent")


def _lock(fd: int, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep) -> None:
    until = clock() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if clock() > until:
                raise HostFailure(where="at the new layer", reason="another process is still writing to it") from None
        sleep(0.05)


@contextlib.contextmanager
def _writing(what: str) -> Iterator[None]:
    """Turn errors of the disk into NoSpace or HostFailure: nothing that was there is damaged by them."""
    try:
        yield
    except OSError as exc:
        if exc.errno in _SPACE:
            raise NoSpace(where=f"for the data of {what}") from exc
        raise HostFailure(where=f"at the data of {what}", reason=exc.strerror or str(exc)) from exc


def main() -> None:
    """Become a holder of a key, serve descriptor 0, and end with it."""
    run_worker(log, BlockWriter().run)


if __name__ == "__main__":
    main()
