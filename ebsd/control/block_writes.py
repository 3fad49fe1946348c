"""Writing snapshots block by block: StartSnapshot, PutSnapshotBlock and CompleteSnapshot of the EBS direct APIs.

1. Start: rows first (the snapshot ``pending``, its state ``starting``), then key, anchor and files, then ``open``.
2. Put: a worker process of the caller encrypts and writes; it answers when that is durable, then the catalog notes the
   blocks, then the client is answered. What was answered survives whatever comes; what was not may be put again.
3. Complete: count and checksum are compared; ``sealing``, from where no block can be put any more; the worker hashes
   the layer, writes the map and signs; record, map, floor, then the row ``completed``. The next start goes on with
   what was cut.
4. A snapshot that is deleted before it is completed, or to which no block came for its timeout, goes without a trace;
   its layer as that of a deleted snapshot does. Until the end its parent cannot be deleted.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import trio

from ebsd.control.block_reads import find, readable, seconds_of, source_members
from ebsd.control.block_workers import BlockWorkers, Worker
from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.encryption import Encryption
from ebsd.control.filling import claim_members
from ebsd.control.host import Host
from ebsd.control.lineages import Lineages
from ebsd.control.snapshot_files import Destination, SnapshotFiles
from ebsd.control.verification import refuse_damaged
from ebsd.control.volume_link import close_all
from ebsd.control.volumes import Volumes, new_context, new_lineage_id, new_uuid
from ebsd.domain.admission import Making
from ebsd.domain.blocks import (
    MAX_CLIENT_TOKEN,
    MAX_PENDING,
    MOST_AT_ONCE,
    check_block,
    check_timeout,
    encode_checksum,
    parse_checksum,
)
from ebsd.domain.errors import (
    BlocksMissing,
    BlocksNotFound,
    ClientTokenConflict,
    DirectSnapshotNotPending,
    DirectSnapshotTimedOut,
    EbsdError,
    ForeignParent,
    IntegrityFailure,
    InvalidParameter,
    InvalidSize,
    ParentSizeMismatch,
    RemoteError,
    TooManyPendingSnapshots,
)
from ebsd.domain.ids import COPY_SOURCE, ID_RANDOM_BYTES, KeyArn, SnapshotId, new_id, parse_name, uid_of_account
from ebsd.domain.model import Caller, Cipher, Integrity, Layer, LayerState, Lineage, Snapshot
from ebsd.domain.outcomes import Parent, decide_start_snapshot
from ebsd.domain.states import DirectEvent, DirectState, SnapshotState
from ebsd.domain.tags import merged_tags
from ebsd.domain.units import GIB, SECTOR, check_volume_size
from ebsd.ipc.incidents import as_ebsd_error, host_failure, log_incident
from ebsd.store.catalog import Transaction
from ebsd.store.catalog_blocks import DirectSnapshot

log = logging.getLogger(__name__)

MODULE: Final = "ebsd.volume.block_writer"
START_DEADLINE: Final = 120.0
SEAL_DEADLINE: Final = 24 * 3600.0
"""The layer is read once more and hashed; it may have terabytes."""
CHECK_DEADLINE: Final = 24 * 3600.0
ANSWER_SECONDS: Final = 20.0
"""How long CompleteSnapshot waits for the end before it answers that the snapshot is pending."""
TEND_SECONDS: Final = 30.0
REMEMBERED: Final = 24 * 3600
"""Seconds for which the end of a snapshot, and its client token, are remembered."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StartRequest:
    """The parameters of StartSnapshot after parsing."""

    size_gib: int | None
    size: int | None
    parent: str | None
    name: str | None
    description: str
    tags: Mapping[str, str]
    encrypted: bool | None
    key: str | None
    timeout: int | None
    client_token: str | None

    def digest(self) -> str:
        """Return what tells this request from another one with the same client token."""
        told = [self.size_gib, self.size, self.parent, self.name, self.description, sorted(self.tags.items())]
        told += [self.encrypted, self.key, self.timeout]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class _Completion:
    """The in-memory side of a completion that is under way."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.error: EbsdError | None = None


class BlockWrites:
    """Use cases of whoever makes a snapshot out of blocks."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        broker: Broker,
        encryption: Encryption,
        volumes: Volumes,
        files: SnapshotFiles,
        lineages: Lineages,
        workers: BlockWorkers,
        nursery: trio.Nursery,
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._broker = broker
        self._encryption = encryption
        self._volumes = volumes
        self._files = files
        self._lineages = lineages
        self._workers = workers
        self._nursery = nursery
        self._locks: dict[SnapshotId, trio.Lock] = {}
        """Held by whoever makes, fills, completes or removes one."""
        self._completing: dict[SnapshotId, _Completion] = {}

    # --- start

    async def start(self, caller: Caller, request: StartRequest) -> tuple[Snapshot, DirectSnapshot]:
        """Begin a snapshot (StartSnapshot): it is ``pending`` and takes blocks."""
        self._check(request)
        timeout = check_timeout(request.timeout)
        known = await self._same_request(caller, request)
        if known is not None:
            return known
        parent: Snapshot | None = None
        if request.parent is not None:
            parent = readable(await find(self._catalogue, caller, request.parent))
            if parent.account != caller.account:
                raise ForeignParent(snapshot=parent.id)
            refuse_damaged(parent)
        size = _size(request)
        if parent is not None and size < parent.size:
            raise ParentSizeMismatch(size=size, parent=parent.id, parent_size=parent.size)
        decide = partial(
            decide_start_snapshot,
            encrypted=request.encrypted,
            key_named=request.key is not None,
            parent=_kind(parent),
        )
        settled = await self._encryption.settle(
            caller, Making.SNAPSHOT, decide, named=request.key, source=None if parent is None else parent.key_arn
        )
        await self._host.space.require()
        ident = SnapshotId(new_id("snap", self._host.random(ID_RANDOM_BYTES)))
        snapshot = Snapshot(
            id=ident,
            account=caller.account,
            owner=caller.name,
            name=parse_name(request.name) if request.name is not None else ident,
            volume=COPY_SOURCE,
            size=size,
            state=SnapshotState.PENDING,
            message=f"Started by StartSnapshot; given up after {timeout} minutes without a block.",
            description=request.description,
            cipher=Cipher.NONE if settled.key is None else Cipher.AES_256_XTS,
            key_arn=settled.key,
            wrapped_key=None,
            context={} if settled.key is None else new_context(ident, {}),
            lineage=parent.lineage if parent is not None else new_lineage_id(self._host.random(16)),
            new_head=0,
            integrity=parent.integrity if parent is not None else Integrity.VERIFIED,
            authority=None,
            pause_us=None,
            started=self._host.now(),
            completed=None,
            tags=merged_tags(ident, {}, request.tags),
        )
        async with self._held(ident), self._lineages.lock(snapshot.lineage):
            await self._make(caller, request, snapshot, parent, timeout)
            return await self._catalogue.run(lambda t: (t.snapshot(ident), _direct(t, ident)))

    def _check(self, request: StartRequest) -> None:
        token = request.client_token
        if token is not None and not 1 <= len(token) <= MAX_CLIENT_TOKEN:
            raise InvalidParameter(parameter="ClientToken", reason=f"it has from 1 to {MAX_CLIENT_TOKEN} characters")

    async def _same_request(self, caller: Caller, request: StartRequest) -> tuple[Snapshot, DirectSnapshot] | None:
        """Return what an earlier request with this client token made, when it is still there."""
        token = request.client_token
        if token is None:
            return None

        def load(t: Transaction) -> tuple[Snapshot, DirectSnapshot] | None:
            known = t.direct_of_token(caller.account, token)
            if known is None:
                return None
            if known.request != request.digest():
                raise ClientTokenConflict()
            if known.is_pending or t.name_of(known.id):
                return t.snapshot(known.id), known
            t.forget_token(known.id)
            return None

        return await self._catalogue.run(load)

    async def _make(
        self, caller: Caller, request: StartRequest, snapshot: Snapshot, parent: Snapshot | None, timeout: int
    ) -> None:
        layer_uuid = new_uuid(self._host.random(16))
        known = 0
        if parent is not None:
            known = await trio.to_thread.run_sync(self._files.known_layers, snapshot.lineage)

        def intend(t: Transaction) -> list[Layer]:
            if len([d for d in t.directs() if d.is_pending and d.account == caller.account]) >= MAX_PENDING:
                raise TooManyPendingSnapshots(limit=MAX_PENDING)
            if request.client_token is not None and t.direct_of_token(caller.account, request.client_token):
                raise ClientTokenConflict()  # the other request is at work right now
            if parent is None:
                t.add_lineage(Lineage(snapshot.lineage, snapshot.account, SECTOR, snapshot.cipher))
            else:
                readable(t.snapshot(parent.id))
            layer = t.add_layer(snapshot.lineage, layer_uuid, snapshot.id, snapshot.size)
            t.add_snapshot(snapshot)
            if parent is not None:
                t.note_made_from(snapshot.id, parent.id)
            t.note_filled_layer(snapshot.id, layer.number)
            t.add_direct(
                DirectSnapshot(
                    snapshot.id,
                    snapshot.account,
                    DirectState.STARTING,
                    None if parent is None else parent.id,
                    layer.number,
                    timeout,
                    self._now(),
                    0,
                    request.client_token,
                    request.digest(),
                )
            )
            return t.layers(snapshot.lineage, known)

        layers = await self._catalogue.run(intend)
        try:
            blob = await self._make_key(caller, snapshot, parent)
            destination = _destination(snapshot)
            if parent is None:
                await trio.to_thread.run_sync(
                    self._files.prepare_destination, destination, layers[-1], snapshot.key_arn, blob, snapshot.context
                )
            else:
                await trio.to_thread.run_sync(
                    self._files.prepare_child, destination, layers, snapshot.key_arn, blob, snapshot.context
                )

            def opened(t: Transaction) -> None:
                if snapshot.key_arn is not None and blob is not None:
                    t.set_snapshot_key(snapshot.id, snapshot.key_arn, blob, snapshot.context)
                t.advance_direct(_direct(t, snapshot.id), DirectEvent.STARTED, self._now())

            await self._catalogue.run(opened)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._remove_or_log(snapshot.id, DirectEvent.ABANDON)
            raise

    async def _make_key(self, caller: Caller, snapshot: Snapshot, parent: Snapshot | None) -> bytes | None:
        """Have the broker make a data key, or wrap the parent's anew, and remember the snapshot."""
        key: KeyArn | None = snapshot.key_arn
        if parent is None or key is None:
            return await self._volumes.wrap_new_key(caller, snapshot.id, key, snapshot.context)
        wrapped = (await trio.to_thread.run_sync(self._files.record_of, parent.id)).wrapped_key
        if wrapped is None:
            raise IntegrityFailure(resource=parent.id, reason="its record has no wrapped key, but it is encrypted")
        blob = await self._broker.re_encrypt(caller, wrapped.blob, wrapped.context, key, snapshot.context)
        await self._broker.create_anchor(caller, snapshot.id, key=key, blob=blob, context=snapshot.context)
        return blob

    # --- put

    async def put(self, caller: Caller, name: str, blocks: Sequence[tuple[int, str]], fd: int) -> None:
        """Write blocks, (number, checksum) each, from a client's memory file, which stays its owner's."""
        if not 1 <= len(blocks) <= MOST_AT_ONCE:
            raise InvalidParameter(parameter="Blocks", reason=f"it has from 1 to {MOST_AT_ONCE} blocks")
        wanted = [[block, encode_checksum(parse_checksum(checksum))] for block, checksum in blocks]
        found = await self._found(caller, name)
        async with self._held(found.id):
            snapshot, _ = await self._open(caller, found.id)
            for block, _checksum in blocks:
                check_block(block, snapshot.size)

            async def write(worker: Worker) -> None:
                _, fds = await worker.request("put", {"Blocks": wanted}, [fd])
                close_all(fds)

            await self._with_writer(caller, snapshot, write)

            def note(t: Transaction) -> None:
                direct = _direct(t, snapshot.id)
                if direct.state is not DirectState.OPEN:
                    raise DirectSnapshotNotPending(snapshot=snapshot.id, state=direct.state.value)
                t.note_written(snapshot.id, [block for block, _ in blocks], self._now())

            await self._catalogue.run(note)

    # --- complete

    async def complete(self, caller: Caller, name: str, *, changed: int, checksum: str | None) -> SnapshotState:
        """Complete a snapshot (CompleteSnapshot), and say whether it is: when it takes long it is pending for a while.

        May be repeated. Raises BlocksMissing and AggregateMismatch, after which blocks can be written as before.
        """
        if checksum is not None:
            parse_checksum(checksum)
        found = await self._found(caller, name)
        completion = self._completing.get(found.id)
        if completion is None:
            async with self._held(found.id):
                snapshot, direct = await self._catalogue.run(lambda t: (t.snapshot(found.id), _direct(t, found.id)))
                if direct.state is DirectState.COMPLETED:
                    self._check_count(direct, changed)
                    return snapshot.state
                if direct.state is not DirectState.SEALING:
                    snapshot, direct = await self._open(caller, found.id)
                self._check_count(direct, changed)
                if direct.state is DirectState.OPEN:
                    if checksum is not None:
                        await self._compare(caller, snapshot, checksum)
                    await self._advance(snapshot.id, DirectEvent.SEAL)
                completion = self._begin_completion(caller, snapshot.id)
        with trio.move_on_after(ANSWER_SECONDS):
            await completion.ended.wait()
        if completion.error is not None:
            raise completion.error
        return (await self._catalogue.run(lambda t: t.snapshot(found.id))).state

    def _check_count(self, direct: DirectSnapshot, changed: int) -> None:
        if changed != direct.written:
            raise BlocksMissing(count=changed, snapshot=direct.id, written=direct.written)

    async def _compare(self, caller: Caller, snapshot: Snapshot, checksum: str) -> None:
        async def compare(worker: Worker) -> None:
            bits = await self._bits(snapshot.id)
            try:
                await worker.request("check", {"Checksum": checksum}, [bits], deadline=CHECK_DEADLINE)
            finally:
                os.close(bits)

        await self._with_writer(caller, snapshot, compare)

    def _begin_completion(self, caller: Caller, ident: SnapshotId) -> _Completion:
        completion = self._completing.get(ident)
        if completion is None:
            completion = self._completing[ident] = _Completion()
            self._nursery.start_soon(self._complete, caller, ident, completion)
        return completion

    async def _complete(self, caller: Caller, ident: SnapshotId, completion: _Completion) -> None:
        try:
            async with self._held(ident):
                await self._seal(caller, ident)
        except EbsdError as exc:
            completion.error = exc
        except OSError as exc:
            completion.error = host_failure(exc)
        except Exception as exc:  # noqa: BLE001 - a bug in one completion must not end ebsd, and again at each start
            completion.error = as_ebsd_error(exc, log_incident)
        finally:
            if completion.error is not None:
                log.error("%s could not be completed: %s", ident, completion.error)
            self._completing.pop(ident, None)
            completion.ended.set()

    async def _seal(self, caller: Caller, ident: SnapshotId) -> None:
        snapshot, direct = await self._catalogue.run(lambda t: (t.snapshot(ident), _direct(t, ident)))
        if direct.state is not DirectState.SEALING:
            return
        signed = await trio.to_thread.run_sync(self._files.signed_copy, ident)
        if signed is None:

            async def seal(worker: Worker) -> bytes:
                fds = [await self._bits(ident)]
                try:
                    fds.append(await trio.to_thread.run_sync(self._files.open_new_map, ident))
                    answer, _ = await worker.request("seal", {}, fds, deadline=SEAL_DEADLINE)
                finally:
                    close_all(fds)
                return base64.b64decode(answer["Record"])

            signed = await self._with_writer(caller, snapshot, seal)
            # Before a signed record says that it is there: without it nobody could sign another one.
            await trio.to_thread.run_sync(self._files.sync_new_maps)
        with trio.CancelScope(shield=True):
            await self._finish(snapshot, direct, signed)

    async def _finish(self, snapshot: Snapshot, direct: DirectSnapshot, signed: bytes) -> None:
        """Put record and map of a signed snapshot in place, and commit it; may be repeated."""
        await self._workers.end(_place(snapshot))
        async with self._lineages.lock(snapshot.lineage):
            snapshot = await self._catalogue.run(
                lambda t: t.snapshot(snapshot.id)
            )  # its key may be wrapped anew by now
            await trio.to_thread.run_sync(self._files.finish_copied_snapshot, snapshot, signed)
            await self._broker.raise_floor(snapshot.id, 1)

            def commit(t: Transaction) -> Layer | None:
                t.complete_snapshot(snapshot.id, self._host.now(), None, snapshot.integrity)
                t.set_snapshot_message(snapshot.id, "")
                t.set_layer_state(snapshot.lineage, direct.layer, LayerState.SEALED)
                t.advance_direct(direct, DirectEvent.COMPLETE, self._now())
                return t.layer(snapshot.lineage, direct.layer)

            layer = await self._catalogue.run(commit)
            log.info("%s completed with %d blocks", snapshot.id, direct.written)
            if layer is not None:
                await trio.to_thread.run_sync(self._files.seal_layer, layer)
            await self._lineages.sweep(snapshot.lineage)  # what was deleted meanwhile had to wait

    async def _bits(self, ident: SnapshotId) -> int:
        """Return a memory file with a bit for each block that is durable."""
        bits = await self._catalogue.run(lambda t: t.written_bits(ident))
        fd = os.memfd_create("ebsd-blocks", os.MFD_CLOEXEC)
        try:
            rest = memoryview(bits)
            while rest:
                rest = rest[os.write(fd, rest) :]
        except BaseException:
            os.close(fd)
            raise
        return fd

    # --- removal

    async def abandon(self, caller: Caller, name: str) -> bool:
        """Delete a snapshot that was not completed (EC2 DeleteSnapshot); False when this is none."""
        try:
            found = await self._found(caller, name)
        except EbsdError:
            return False
        async with self._held(found.id):
            direct = await self._catalogue.run(lambda t: t.direct(found.id))
            if direct is None or not direct.is_pending:
                return False
            with trio.CancelScope(shield=True):
                await self._remove(found.id, DirectEvent.ABANDON)
        return True

    async def _remove_or_log(self, ident: SnapshotId, event: DirectEvent) -> None:
        """Remove all traces of a snapshot; what cannot be removed now is left to the next start, and noted."""
        try:
            await self._remove(ident, event, locked=True)
        except (EbsdError, OSError) as exc:
            log.error("%s is not wholly removed until the next start: %s", ident, exc)

    async def _remove(self, ident: SnapshotId, event: DirectEvent, *, locked: bool = False) -> None:
        snapshot = await self._catalogue.run(lambda t: t.snapshot(ident))
        await self._workers.end(_place(snapshot))

        def forget(t: Transaction) -> None:
            direct = _direct(t, ident)
            t.begin_removing(ident)
            # Nobody writes to it any more, so that the sweep of what was deleted takes it.
            t.set_layer_state(snapshot.lineage, direct.layer, LayerState.SEALED)
            t.remove_snapshot(ident)
            t.advance_direct(direct, event, self._now())

        async with AsyncExitStack() as stack:
            if not locked:
                await stack.enter_async_context(self._lineages.lock(snapshot.lineage))
            await self._catalogue.run(forget)
            await trio.to_thread.run_sync(self._files.remove, ident)
            await self._broker.delete_anchor(ident)
            await self._lineages.sweep(snapshot.lineage)

    # --- start and passing of time

    async def recover(self) -> None:
        """Finish or remove what was cut when ebsd ended; at start, before temporary files are removed."""
        for direct in await self._pending():
            try:
                await self._recover(direct)
            except (EbsdError, OSError) as exc:
                log.error("%s: %s", direct.id, exc)

    async def _recover(self, direct: DirectSnapshot) -> None:
        if direct.state is DirectState.STARTING:
            log.warning("%s was being started when ebsd ended", direct.id)
            return await self._remove(direct.id, DirectEvent.ABANDON)
        snapshot = await self._catalogue.run(lambda t: t.snapshot(direct.id))
        await self._workers.retire_left(_owner(snapshot), snapshot, "write")
        if direct.parent is not None:
            wanted = direct.parent
            parent = await self._catalogue.run(lambda t: t.snapshot(wanted))
            await self._workers.retire_left(_owner(snapshot), parent, "parent")
        if direct.state is DirectState.SEALING:
            signed = await trio.to_thread.run_sync(self._files.signed_copy, direct.id)
            if signed is not None:
                log.warning("%s was signed when ebsd ended", direct.id)
                await self._finish(snapshot, direct, signed)

    async def resume_all(self) -> None:
        """Go on with what was being sealed when ebsd ended; called once at start."""
        for direct in await self._pending():
            if direct.state is DirectState.SEALING:
                snapshot = await self._catalogue.run(lambda t, ident=direct.id: t.snapshot(ident))  # type: ignore[misc]
                self._begin_completion(_owner(snapshot), direct.id)

    async def _pending(self) -> list[DirectSnapshot]:
        return await self._catalogue.run(lambda t: [direct for direct in t.directs() if direct.is_pending])

    async def tend(self) -> None:
        """Give up what nobody writes to any more, and end workers without work, for as long as ebsd runs."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._workers.tend)
            await self._tend()

    async def _tend(self) -> None:
        while True:
            try:
                now = self._now()
                for direct in await self._pending():
                    if direct.ends <= now and direct.id not in self._completing:
                        await self._time_out(direct.id)
                await self._catalogue.run(lambda t, now=now: t.forget_directs(now - REMEMBERED))  # type: ignore[misc]
            except EbsdError as exc:
                log.error("snapshots that nobody completes: %s", exc)
            await trio.sleep(TEND_SECONDS)

    async def _time_out(self, ident: SnapshotId) -> None:
        async with self._held(ident):
            try:
                direct = await self._catalogue.run(lambda t: t.direct(ident))
                pending = direct is not None and direct.state in (DirectState.OPEN, DirectState.SEALING)
                if direct is None or not pending or direct.ends > self._now():
                    return
                log.warning("%s: no block for %d minutes; it is given up", ident, direct.timeout)
                await self._remove(ident, DirectEvent.TIME_OUT)
            except (EbsdError, OSError) as exc:
                log.error("%s could not be given up: %s", ident, exc)

    # --- what all of them need

    @asynccontextmanager
    async def _held(self, ident: SnapshotId) -> AsyncIterator[None]:
        lock = self._locks.setdefault(ident, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and self._locks.get(ident) is lock:
                del self._locks[ident]

    async def _found(self, caller: Caller, name: str) -> Snapshot:
        """Return the row of a snapshot that StartSnapshot made for the caller's account, whatever its state.

        Raises BlocksNotFound, DirectSnapshotTimedOut, DirectSnapshotNotPending for a snapshot of another kind.
        """
        try:
            found = await find(self._catalogue, caller, name)
        except BlocksNotFound:
            gone = await self._catalogue.run(lambda t: t.direct(name))
            if gone is not None and gone.state is DirectState.TIMED_OUT and gone.account == caller.account:
                raise DirectSnapshotTimedOut(snapshot=gone.id, minutes=gone.timeout) from None
            raise
        if found.account != caller.account and not caller.is_admin:
            raise BlocksNotFound(snapshot=name)
        if await self._catalogue.run(lambda t: t.direct(found.id)) is None:
            raise DirectSnapshotNotPending(snapshot=found.id, state=found.state.value)
        return found

    async def _open(self, caller: Caller, ident: SnapshotId) -> tuple[Snapshot, DirectSnapshot]:
        """Return one that takes blocks; the caller holds its lock."""
        direct = await self._catalogue.run(lambda t: t.direct(ident))
        if direct is not None and direct.state is DirectState.OPEN and direct.ends <= self._now():
            await self._remove(ident, DirectEvent.TIME_OUT)
            raise DirectSnapshotTimedOut(snapshot=ident, minutes=direct.timeout)
        if direct is None or direct.state is not DirectState.OPEN:
            state = "unknown" if direct is None else direct.state.value
            raise DirectSnapshotNotPending(snapshot=ident, state=state)
        return await self._catalogue.run(lambda t: t.snapshot(ident)), direct

    async def _advance(self, ident: SnapshotId, event: DirectEvent) -> None:
        await self._catalogue.run(lambda t: t.advance_direct(_direct(t, ident), event, self._now()))

    async def _with_writer(self, caller: Caller, snapshot: Snapshot, work: Callable[[Worker], Awaitable[T]]) -> T:
        async def do(worker: Worker) -> T:
            if worker.opened and caller.account not in worker.opened:
                raise _Anothers
            if not worker.opened:
                try:
                    await self._hand_over(caller, snapshot, worker)
                except RemoteError:
                    worker.discarded = True
                    raise
                worker.opened.add(caller.account)
            return await work(worker)

        with contextlib.suppress(_Anothers):
            return await self._workers.use(_place(snapshot), MODULE, do)
        return await self._workers.use(_place(snapshot), MODULE, do)

    async def _hand_over(self, caller: Caller, snapshot: Snapshot, worker: Worker) -> None:
        direct, layer = await self._catalogue.run(
            lambda t: (_direct(t, snapshot.id), t.layer(snapshot.lineage, _direct(t, snapshot.id).layer))
        )
        if layer is None:
            raise IntegrityFailure(resource=snapshot.id, reason="its layer is not in the catalog")
        async with self._lineages.lock(snapshot.lineage), AsyncExitStack() as stack:
            fds: list[int] = []
            stack.callback(close_all, fds)
            parent_members = None
            if direct.parent is not None:
                wanted = direct.parent
                parent = await self._catalogue.run(lambda t: t.snapshot(wanted))
                fds.append(await stack.enter_async_context(self._workers.session(caller, parent, "parent")))
                parent_members, files = await source_members(self._catalogue, self._files, parent)
                fds += files
            fds.append(await stack.enter_async_context(self._workers.session(caller, snapshot, "write")))
            fds += await trio.to_thread.run_sync(self._files.open_layer_to_fill, snapshot.id, layer)
            record = await trio.to_thread.run_sync(self._files.record_bytes, snapshot.id)
            params: dict[str, Any] = {
                "Destination": claim_members(snapshot),
                "DestinationRecord": base64.b64encode(record).decode(),
                "Layer": layer.number,
                "Parent": parent_members,
                "SpaceReserve": self._host.space.limits.reserve,
            }
            await worker.request("start", params, fds, deadline=START_DEADLINE)

    def _now(self) -> int:
        return int(seconds_of(self._host.now()))


class _Anothers(Exception):
    """The writer got its key with another one's rights: it is ended, and another one started."""


def _direct(t: Transaction, ident: SnapshotId) -> DirectSnapshot:
    found = t.direct(ident)
    if found is None:
        raise BlocksNotFound(snapshot=ident)
    return found


def _place(snapshot: Snapshot) -> tuple[str, Any, str]:
    return "write", snapshot.account, snapshot.id


def _kind(parent: Snapshot | None) -> Parent:
    if parent is None:
        return Parent.NONE
    return Parent.ENCRYPTED if parent.encrypted else Parent.PLAIN


def _size(request: StartRequest) -> int:
    """Return the size in bytes. Raises InvalidParameter."""
    if (request.size_gib is None) is (request.size is None):
        raise InvalidParameter(parameter="VolumeSize", reason="exactly one of VolumeSize (GiB) and SizeBytes is given")
    size = request.size if request.size is not None else (request.size_gib or 0) * GIB
    try:
        return check_volume_size(size)
    except InvalidSize as exc:
        raise InvalidParameter(parameter="VolumeSize", reason=str(exc.facts["reason"])) from None


def _destination(snapshot: Snapshot) -> Destination:
    return Destination(
        snapshot.id,
        snapshot.lineage,
        snapshot.account,
        snapshot.owner,
        snapshot.name,
        snapshot.size,
        snapshot.cipher,
        snapshot.started,
        source=snapshot.volume,
        description=snapshot.description,
    )


def _owner(snapshot: Snapshot) -> Caller:
    return Caller(uid_of_account(snapshot.account), snapshot.owner, snapshot.account, is_admin=False)
