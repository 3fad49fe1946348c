"""Snapshots: take, restore under the same data key, copy within a lineage, delete, describe.

Taking one, in order (recovery of each cut in ``recover``):

1. Catalog: the row ``pending``, a new head layer for the volume, the volume's head := that layer.
2. Anchor of the snapshot: inherited from the volume's; files of the new head.
3. Attached: the volume process signs a record that knows the new head; record, then floor.
4. Attached: it seals: drains writers, copies the map, switches heads; syncs; writes the sealed map; signs.
   Detached: the durable map is sealed as it is.
5. Record of the snapshot; the map renamed to its final name: from here on the snapshot exists.
6. Catalog: ``completed``. 7. The old head is made read-only for ever.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import trio

from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.describe import SNAPSHOT_FILTERS, describe_shared_snapshot, describe_snapshot
from ebsd.control.host import Host
from ebsd.control.into_bin import check_permanently, put_into_bin
from ebsd.control.leaf_roots import LeafRoots
from ebsd.control.lineages import Lineages
from ebsd.control.pages import parse_page, taken
from ebsd.control.sharing import Sharing
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.volume_files import VolumeFiles
from ebsd.control.volume_link import Sealed, VolumeLink, close_all
from ebsd.control.volumes import Volumes, add_data_keys, new_uuid
from ebsd.domain.errors import (
    EbsdError,
    EngineReplaced,
    IncorrectState,
    IncorrectVolumeState,
    IntegrityFailure,
    InvalidParameterCombination,
    KeyServiceUnavailable,
    RemoteError,
    SharedSnapshotInUse,
    SnapshotInUse,
    SnapshotNotFound,
    SnapshotPending,
    SnapshotRateExceeded,
    VolumeNotAnswering,
)
from ebsd.domain.filters import parse_filters, passes
from ebsd.domain.ids import (
    ID_RANDOM_BYTES,
    JobId,
    SnapshotId,
    VolumeId,
    looks_like_snapshot_id,
    new_id,
    parse_name,
    parse_resource_id,
    parse_snapshot_id,
    uid_of_account,
)
from ebsd.domain.jobs import KINDS
from ebsd.domain.locks import check_deletion
from ebsd.domain.model import Attachment, Caller, Integrity, Job, Layer, LayerState, Snapshot, Volume
from ebsd.domain.sharing import ORDINARY, Scope
from ebsd.domain.states import AttachmentState, SnapshotEvent, SnapshotState, VolumeState, next_snapshot_state
from ebsd.domain.tags import merged_tags
from ebsd.domain.tokens import ClientToken
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)

DEATH_PATIENCE: Final = 2.0
"""Seconds in which a volume process whose channel broke must be gone, to count as dead."""


class Snapshots:
    """Use cases on snapshots that move no data."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        broker: Broker,
        volumes: Volumes,
        volume_files: VolumeFiles,
        files: SnapshotFiles,
        lineages: Lineages,
        links: Mapping[VolumeId, VolumeLink],
        roots: LeafRoots,
        sharing: Sharing,
        nursery: trio.Nursery,
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._broker = broker
        self._volumes = volumes
        self._volume_files = volume_files
        self._files = files
        self._lineages = lineages
        self._links = links
        self._roots = roots
        self._sharing = sharing
        self._nursery = nursery
        self._awaited: set[SnapshotId] = set()
        """Pending snapshots that a task will settle when their volume process answers again."""
        self.settle_set: Callable[[Snapshot], None] = lambda snapshot: None
        """Called for a pending snapshot that is settled only together with others (``snapshot_sets.py``)."""

    # --- take

    def new_id(self) -> SnapshotId:
        return SnapshotId(new_id("snap", self._host.random(ID_RANDOM_BYTES)))

    async def create(
        self,
        caller: Caller,
        volume_name: str,
        *,
        name: str | None,
        description: str,
        tags: Mapping[str, str],
        token: ClientToken | None = None,
        ident: SnapshotId | None = None,
    ) -> Snapshot:
        """Take a snapshot (EC2 CreateSnapshot): a point in time within the call, and complete at return.

        ``ident``: its id, of a caller who keeps it before; else a new one.
        """
        ident = ident or self.new_id()
        wanted = parse_name(name) if name is not None else ident
        checked_tags = merged_tags(ident, {}, tags)
        found = await self._catalogue.run(lambda t: t.find_volume(caller, volume_name))
        # After it every chunk that is written needs space: where there is none, that would stop the volume.
        await self._host.space.require()
        pending = await self._catalogue.run(lambda t: t.pending_snapshots())
        if self._volumes.lock(found.id).locked() and any(s.volume == found.id for s in pending):
            raise SnapshotRateExceeded(volume=found.id)
        async with self._volumes.lock(found.id), self._lineages.lock(found.lineage):
            await self.settle_pending(found.id)
            intend = partial(self._intend, found, ident, wanted, description, checked_tags, token)
            try:
                return await self._taken(*await intend())
            except EngineReplaced as exc:
                # The engine that ended left its answer with the holder, and the snapshot is complete by that, or there
                # was none: then no moment was taken that anybody could still name, and the next engine takes another.
                state = await self._catalogue.run(lambda t: _state_of(t, ident))
                log.warning("%s: %s; the snapshot is %s", ident, exc.message, state.value if state else "taken again")
                if state is SnapshotState.PENDING:
                    raise
                if state is not None:
                    return await self._catalogue.run(lambda t: t.snapshot(ident))
            return await self._taken(*await intend())

    async def _taken(self, volume: Volume, snapshot: Snapshot, layers: Sequence[Layer]) -> Snapshot:
        """Take a snapshot that is pending, or decide it where that fails, and raise."""
        try:
            await self._take(volume, snapshot, layers)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._settle(snapshot.id)
            raise
        return await self._catalogue.run(lambda t: t.snapshot(snapshot.id))

    async def _intend(
        self,
        found: Volume,
        ident: SnapshotId,
        name: str,
        description: str,
        tags: Mapping[str, str],
        token: ClientToken | None,
    ) -> tuple[Volume, Snapshot, list[Layer]]:
        known = await trio.to_thread.run_sync(self._files.known_layers, found.lineage)
        layer_uuid = new_uuid(self._host.random(16))

        def intend(t: Transaction) -> tuple[Volume, Snapshot, list[Layer]]:
            volume = t.volume(found.id)
            check_can_be_taken(volume)
            layer = t.add_layer(volume.lineage, layer_uuid, volume.id, volume.size)
            t.set_volume_head(volume.id, layer.number)
            row = pending_snapshot(volume, ident, name, description, tags, layer.number, self._host.now())
            snapshot = replace(row, token=token)
            t.add_snapshot(snapshot)
            t.note_taken(snapshot)
            return volume, snapshot, t.layers(volume.lineage, known)

        return await self._catalogue.run(intend)

    async def _take(self, volume: Volume, snapshot: Snapshot, layers: Sequence[Layer]) -> None:
        head = await self.add_head(volume, snapshot, layers)
        pause_us: int | None = None
        try:
            link = self.writing_link(volume)
            if link is not None:
                pause_us = await self._seal_attached(volume, snapshot, link, head)
            else:
                await self.take_detached(volume, snapshot)
        finally:
            close_all(head)
        await self._commit(snapshot, served_head(volume), pause_us)
        if link is not None:
            self._roots.follow(link)

    async def add_head(self, volume: Volume, snapshot: Snapshot, layers: Sequence[Layer]) -> list[int]:
        """Make the snapshot's anchor and the volume's new head, the last of ``layers``; the caller closes the head."""
        owner = _owner_of(volume)
        await self._broker.inherit_anchor(owner, snapshot.id, encrypted=volume.encrypted, source=volume.id)
        return await trio.to_thread.run_sync(self._files.add_head, layers, volume.size)

    def writing_link(self, volume: Volume) -> VolumeLink | None:
        """Return the process that writes to a volume, None when nobody does; raises IncorrectVolumeState."""
        if volume.attachment is None or volume.attachment.read_only:
            return None
        link = self._links.get(volume.id)
        if link is None:
            raise IncorrectVolumeState(volume=volume.id, state=volume.state.value)
        return link

    async def take_detached(self, volume: Volume, snapshot: Snapshot) -> None:
        """Make the files of the snapshot of a volume that nobody writes to, whose lock is held."""
        authority = await trio.to_thread.run_sync(self._files.take_detached, volume, snapshot)
        await self._catalogue.run(lambda t: t.set_authority(snapshot.id, authority))

    async def prepare_attached(self, volume: Volume, snapshot: Snapshot, link: VolumeLink, head: Sequence[int]) -> int:
        """Bring a record that knows the new head to the disk, before the switch; returns the file for the map."""
        generation, record = await link.prepare_seal(snapshot.new_head, head)
        await trio.to_thread.run_sync(self._volume_files.write_signed_record, volume.id, record)
        await self._broker.raise_floor(volume.id, generation)
        return await trio.to_thread.run_sync(self._files.open_new_map, snapshot.id)

    async def _seal_attached(self, volume: Volume, snapshot: Snapshot, link: VolumeLink, head: Sequence[int]) -> int:
        output = await self.prepare_attached(volume, snapshot, link, head)
        try:
            sealed = await link.seal(snapshot.id, snapshot.account, output)
        finally:
            os.close(output)
        return await self.finish_sealed(volume, snapshot, sealed)

    async def finish_sealed(self, volume: Volume, snapshot: Snapshot, sealed: Sealed) -> int:
        """Make the files of a snapshot whose volume was sealed final; returns how long its requests were held."""
        await self._note_head(volume.id, snapshot.new_head, snapshot.id, sealed.left)
        await trio.to_thread.run_sync(self._files.finish, snapshot, sealed.record, None)
        await self._broker.raise_floor(snapshot.id, 1)
        return sealed.pause_us

    async def _note_head(self, ident: VolumeId, head: int, snapshot: SnapshotId, left: frozenset[int]) -> None:
        def note(t: Transaction) -> None:
            t.note_left(snapshot, left)
            attachment = t.volume(ident).attachment
            if attachment is not None:
                t.put_attachment(replace(attachment, head=head))

        await self._catalogue.run(note)

    async def _commit(self, snapshot: Snapshot, old_head: int, pause_us: int | None) -> None:
        await self.seal_layer(await self._catalogue.run(lambda t: self.complete(t, snapshot, old_head, pause_us)))

    def complete(self, t: Transaction, snapshot: Snapshot, old_head: int, pause_us: int | None) -> Layer | None:
        """Complete a snapshot whose files are there; returns the layer that was the head, to be sealed."""
        t.complete_snapshot(snapshot.id, self._host.now(), pause_us, snapshot.integrity)
        t.set_layer_state(snapshot.lineage, snapshot.new_head, LayerState.HEAD)
        t.set_layer_state(snapshot.lineage, old_head, LayerState.SEALED)
        return t.layer(snapshot.lineage, old_head)

    async def seal_layer(self, layer: Layer | None) -> None:
        """Make what was a head read-only for ever; the caller holds the lineage's lock."""
        if layer is not None:
            await trio.to_thread.run_sync(self._files.seal_layer, layer)
            if layer.preallocated:
                await self._lineages.give_back(layer.lineage)

    # --- a snapshot that was cut short

    async def recover(self) -> None:
        """Finish or undo the snapshots that were pending when ebsd ended; after adoption, before any request."""
        running = await self._catalogue.run(
            lambda t: {
                *(job.destination for job in t.active_jobs()),
                *(direct.id for direct in t.directs() if direct.is_pending),
            }
        )
        for ident, kin in await self._catalogue.run(lambda t: [(each, t.kin(each)) for each in t.removing()]):
            try:
                await self._remove_record(parse_resource_id(ident))
                if kin is None:  # deleted before families were remembered: only a whole sweep knows what it named
                    await trio.to_thread.run_sync(self._files.remove, parse_snapshot_id(ident))
                    await self._catalogue.run(lambda t, ident=ident: t.end_removing(ident))  # type: ignore[misc]
            except (EbsdError, OSError) as exc:
                log.error("%s is not wholly removed until the next start: %s", ident, exc)
        for snapshot, in_set in await self._catalogue.run(lambda t: [(s, t.set_of(s.id)) for s in t.snapshots()]):
            if snapshot.state is SnapshotState.PENDING and snapshot.id not in running and in_set is None:
                log.warning("%s was pending when ebsd ended", snapshot.id)
                async with self._lineages.lock(snapshot.lineage):
                    await self._settle(snapshot.id)

    async def settle(self, ident: SnapshotId) -> None:
        """Finish or undo a pending snapshot that nobody is at work on; the caller holds the lineage's lock.

        What cannot be done now is logged, and left to the next start.
        """
        await self._settle(ident)

    async def _settle(self, ident: SnapshotId) -> None:
        """Decide a pending snapshot by what is there: complete, or gone without a trace but for an unused layer."""
        try:
            snapshot, in_set = await self._catalogue.run(lambda t: (t.snapshot(ident), t.set_of(ident)))
            if snapshot.state is not SnapshotState.PENDING:
                return
            if in_set is not None:
                self.settle_set(snapshot)
                return
            if await self.is_complete(snapshot):
                await self.note_record(snapshot)
                await self._commit(snapshot, await self.old_head(snapshot), None)
            else:
                await self.abandon(snapshot)
        except VolumeNotAnswering as exc:
            log.error("%s stays pending until that is known: %s", ident, exc.message)
            if ident not in self._awaited:
                self._awaited.add(ident)
                self._nursery.start_soon(self._settle_when_possible, snapshot)
        except KeyServiceUnavailable as exc:
            log.error("%s stays pending until the key service answers: %s", ident, exc.message)
            self.settle_afterwards(ident, partial(self._settle_now, snapshot))
        except (EbsdError, OSError) as exc:
            log.error("%s stays pending until the next start: %s", ident, exc)

    def settle_afterwards(self, name: str, step: Callable[[], Awaitable[object]]) -> None:
        """Have a snapshot, or several of one moment, decided when the key service answers."""
        self._broker.afterwards(f"settling {name}", step)

    async def _settle_when_possible(self, snapshot: Snapshot) -> None:
        """Decide a pending snapshot as soon as the process that may have sealed it answers, or has ended."""
        link = self._links.get(snapshot.volume)
        if link is not None:
            await link.answering()
        self._awaited.discard(snapshot.id)
        await self._settle_now(snapshot)

    async def _settle_now(self, snapshot: Snapshot) -> None:
        async with self._volumes.lock(snapshot.volume), self._lineages.lock(snapshot.lineage):
            if snapshot.id in await self._catalogue.run(_pending_of(snapshot.volume)):
                await self._settle(snapshot.id)

    async def settle_pending(self, volume: VolumeId) -> None:
        """Decide the snapshots that earlier calls left pending; the caller holds the volume's lock and the lineage's.

        Raises SnapshotRateExceeded when that cannot be done yet.
        """
        for ident in await self._catalogue.run(_pending_of(volume)):
            await self._settle(ident)
        if await self._catalogue.run(_pending_of(volume)):
            raise SnapshotRateExceeded(volume=volume)

    async def is_complete(self, snapshot: Snapshot) -> bool:
        """Say whether a pending snapshot has all its files, made now where only the process's answer was lost."""
        if await trio.to_thread.run_sync(self._files.exists, snapshot.id):
            return True
        link = self._links.get(snapshot.volume)
        if link is None:
            return False
        # The volume process may have sealed, and only its answer was lost: it gives the same answer again, after a seal
        # that is still under way. Its head is asked for after that, when it cannot change any more.
        signed: bytes | None = None
        left: frozenset[int] = frozenset()
        try:
            try:
                sealed = await link.sealed_again(snapshot.id)
                signed, left = sealed.record, sealed.left
            except RemoteError as exc:
                if exc.code != IncorrectState.code:
                    raise
            await self._note_head(snapshot.volume, (await link.status())["Head"], snapshot.id, left)
            if signed is None:
                return False
        except EbsdError:
            with trio.move_on_after(DEATH_PATIENCE):
                await link.child.wait()
                return False  # it died: nobody has that answer any more
            raise
        await trio.to_thread.run_sync(self._files.finish, snapshot, signed, None)
        await self._broker.raise_floor(snapshot.id, 1)
        return True

    async def note_record(self, snapshot: Snapshot) -> None:
        """Bring into the catalog what only the record says when ebsd ended between the two."""
        record = await trio.to_thread.run_sync(self._files.record, snapshot)
        wrapped, authority = record.wrapped_key, self._files.signer_of(record)

        def note(t: Transaction) -> None:
            t.set_authority(snapshot.id, authority)
            if wrapped is not None and snapshot.wrapped_key is None:
                t.set_snapshot_key(snapshot.id, wrapped.key_arn, wrapped.blob, wrapped.context)

        await self._catalogue.run(note)

    async def old_head(self, snapshot: Snapshot) -> int:
        """Return the layer that was the volume's head before a snapshot that is pending."""
        return await self._catalogue.run(lambda t: _head_before(t.layers(snapshot.lineage), snapshot))

    async def abandon(self, snapshot: Snapshot) -> None:
        """Remove a pending snapshot; its volume keeps the new head."""
        await trio.to_thread.run_sync(self._files.remove, snapshot.id)
        await self._broker.delete_anchor(snapshot.id)
        if snapshot.new_head:
            await self._complete_head(snapshot)

        def forget(t: Transaction) -> None:
            # The new head stays the volume's head, whether its process had switched or not: it costs an empty layer.
            if snapshot.new_head:
                t.set_layer_state(snapshot.lineage, snapshot.new_head, LayerState.HEAD)
                t.note_not_taken(snapshot)
            t.remove_snapshot(snapshot.id)

        await self._catalogue.run(forget)

    async def _complete_head(self, snapshot: Snapshot) -> None:
        """Make the files of a head that the catalog names already, and that may not have come into being."""

        def load(t: Transaction) -> tuple[list[Layer], int]:
            layers = [layer for layer in t.layers(snapshot.lineage) if layer.number <= snapshot.new_head]
            sizes = {volume.head: volume.size for volume in t.lineage_volumes(snapshot.lineage)}
            return layers, sizes.get(snapshot.new_head, 0)

        layers, size = await self._catalogue.run(load)
        if size:
            close_all(await trio.to_thread.run_sync(self._files.complete_head, layers, size))

    # --- restore and copy under the same data key

    async def restore(self, caller: Caller, volume: Volume, source: Snapshot) -> Volume:
        """Make a volume that shares the snapshot's data key and layers; ``volume`` says what it shall be."""
        await self._host.space.require()
        layer_uuid = new_uuid(self._host.random(16))
        async with self._volumes.lock(volume.id), self._lineages.lock(source.lineage):
            known = await trio.to_thread.run_sync(self._files.known_layers, source.lineage)

            def intend(t: Transaction) -> tuple[Volume, list[Layer]]:
                _check_usable(t.snapshot(source.id))
                layer = t.add_layer(source.lineage, layer_uuid, volume.id, volume.size)
                t.add_volume(replace(volume, head=layer.number))
                t.note_made_from(volume.id, source.id)
                return t.volume(volume.id), t.layers(source.lineage, known)

            made, layers = await self._catalogue.run(intend)
            try:
                blob = await self._rewrapped(caller, source, made)
                await self._broker.create_anchor(
                    caller,
                    made.id,
                    key=made.key_arn,
                    blob=blob,
                    context=made.context if made.key_arn is not None else None,
                    made_from=source.id,
                )
                authority = await trio.to_thread.run_sync(self._files.restore, source, made, layers, blob)
                await self._catalogue.run(lambda t: t.set_authority(made.id, authority))
                return await self._volumes.finish_create(made, made.key_arn, blob)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._volumes.undo_create(made)
                raise

    async def _rewrapped(self, caller: Caller, source: Snapshot, made: Volume | Snapshot) -> bytes | None:
        if made.key_arn is None:
            return None
        wrapped = (await trio.to_thread.run_sync(self._files.record, source)).wrapped_key
        if wrapped is None:
            raise IntegrityFailure(resource=source.id, reason="its record has no wrapped key, but it is encrypted")
        return await self._broker.re_encrypt(caller, wrapped.blob, wrapped.context, made.key_arn, made.context)

    async def copy_within_lineage(self, caller: Caller, copy: Snapshot, source: Snapshot) -> Snapshot:
        """Make a copy that shares data key and layers with its source; no data moves (EC2: an incremental copy)."""
        await self._host.space.require()
        async with self._lineages.lock(source.lineage):

            def intend(t: Transaction) -> None:
                _check_usable(t.snapshot(source.id))
                t.add_snapshot(copy)
                t.note_made_from(copy.id, source.id)

            await self._catalogue.run(intend)
            try:
                blob = await self._rewrapped(caller, source, copy)
                made = replace(copy, wrapped_key=blob)
                await self._broker.create_anchor(
                    caller,
                    copy.id,
                    key=copy.key_arn,
                    blob=blob,
                    context=copy.context if copy.key_arn is not None else None,
                    made_from=source.id,
                )
                authority = await trio.to_thread.run_sync(self._files.copy_within_lineage, source, made)

                def finish(t: Transaction) -> Snapshot:
                    if copy.key_arn is not None and blob is not None:
                        t.set_snapshot_key(copy.id, copy.key_arn, blob, copy.context)
                    t.set_authority(copy.id, authority)
                    t.complete_snapshot(copy.id, self._host.now(), None, copy.integrity)
                    return t.snapshot(copy.id)

                return await self._catalogue.run(finish)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._settle(copy.id)
                raise

    # --- delete

    async def delete(self, caller: Caller, name_or_id: str, *, permanently: bool = False) -> bool:
        """Delete a snapshot (EC2 DeleteSnapshot) and give back what nobody else names.

        Says whether it went into the recycle bin. ``permanently``: not there, or out of it; for administrators.
        """
        if permanently:
            check_permanently(caller)
        found = await self._catalogue.run(lambda t: t.find_snapshot(caller, name_or_id, in_bin=permanently))
        return await self._delete(found, permanently=permanently)

    async def purge(self, ident: SnapshotId) -> None:
        """Delete a snapshot whose time in the recycle bin is over; nothing when it was taken out meanwhile."""
        found = await self._catalogue.run(lambda t: t.snapshot(ident) if t.binned(ident) is not None else None)
        if found is not None:
            await self._delete(found, permanently=True, due=True)

    async def remove_passing(self, snapshot: Snapshot, user: JobId) -> None:
        """Delete a snapshot that a job took for itself, at the end of that job; no recycle bin keeps it."""
        await self._delete(snapshot, permanently=True, user=user)

    async def _delete(
        self, found: Snapshot, *, permanently: bool, due: bool = False, user: JobId | None = None
    ) -> bool:
        _check_not_pending(found)  # before the lock, which whoever takes a snapshot holds until it is complete
        async with self._lineages.lock(found.lineage):

            def forget(t: Transaction) -> Snapshot | None:
                snapshot = t.snapshot(found.id)
                binned = t.binned(snapshot.id)
                if due and (binned is None or binned.leaves > self._host.now()):
                    return None
                if binned is not None and not permanently:
                    raise SnapshotNotFound(snapshot=snapshot.id)  # whoever came first put it there
                _check_not_pending(snapshot)
                for job in t.active_jobs():
                    if job.source == snapshot.id and job.id != user and KINDS[job.kind].holds_source:
                        raise _in_use(snapshot, job)
                for child in t.pending_children(snapshot.id):
                    raise SnapshotInUse(snapshot=snapshot.id, user=child)
                check_deletion(t.lock_of(snapshot.id), now=self._host.now(), even=self._host.clock_is_even())
                if not permanently and put_into_bin(t, snapshot, self._host.now()):
                    return None
                next_snapshot_state(snapshot.id, snapshot.state, SnapshotEvent.DELETE)
                # Commit first: what is punched afterwards is named by nothing.
                t.begin_removing(snapshot.id)
                t.remove_snapshot(snapshot.id)
                return snapshot

            snapshot = await self._catalogue.run(forget)
            if snapshot is None:
                return not due
            with trio.CancelScope(shield=True):
                await self._finish_removal(snapshot)
        return False

    async def discard(self, ident: SnapshotId) -> None:
        """Remove a snapshot that ebsd took for itself: no lock, no job and no recycle bin keeps it."""
        snapshot = await self._catalogue.run(lambda t: t.snapshot(ident))
        async with self._lineages.lock(snapshot.lineage):

            def forget(t: Transaction) -> None:
                t.begin_removing(ident)
                t.remove_snapshot(ident)

            await self._catalogue.run(forget)
            with trio.CancelScope(shield=True):
                await self._finish_removal(snapshot)

    async def _finish_removal(self, snapshot: Snapshot) -> None:
        """Remove what is left of a snapshot that the catalog forgot; the caller holds the lineage's lock.

        Where the key service does not answer that is done afterwards, and at the next start if ebsd ends before.
        """
        try:
            await self._remove_record(snapshot.id)
        except KeyServiceUnavailable as exc:
            log.warning("the rest of %s is removed when the key service answers: %s", snapshot.id, exc.message)
            self._broker.afterwards(f"removing {snapshot.id}", partial(self._remove_rest, snapshot))
            return
        # Its map stays until the chunks that it named alone are given back.
        await self._lineages.sweep(snapshot.lineage)

    async def _remove_rest(self, snapshot: Snapshot) -> None:
        async with self._lineages.lock(snapshot.lineage):
            await self._finish_removal(snapshot)

    async def _remove_record(self, ident: VolumeId | SnapshotId) -> None:
        await trio.to_thread.run_sync(self._files.remove_record, ident)
        await self._broker.delete_anchor(ident)

    # --- views, names, tags

    async def describe(
        self,
        caller: Caller,
        names: Sequence[str] | None,
        filters: Sequence[Mapping[str, Any]],
        limit: int | None = None,
        token: str | None = None,
        scope: Scope = ORDINARY,
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Return snapshots as EC2 describes them, and the token of what follows; an unknown name fails the whole call.

        Named ones come all at once. Without names: those in the scope that the caller can see. Raises
        InvalidParameterValue for a limit or token that cannot be, and InvalidParameterCombination for names in a scope.
        """
        page, chosen = parse_page(limit, token, looks_like_snapshot_id), parse_filters(filters, SNAPSHOT_FILTERS)
        if names is not None and scope != ORDINARY:
            raise InvalidParameterCombination(
                reason="SnapshotIds cannot be given together with OwnerIds or RestorableByUserIds"
            )
        if names is not None:
            snapshots = await self._sharing.reach_all(caller, names)
        else:
            snapshots = await self._sharing.page(caller, scope, page.after, page.size + 1)
        progress, hidden = await self._catalogue.run(
            lambda t: (
                {j.destination: 100 * j.done // j.total for j in t.active_jobs() if j.total},
                frozenset(t.implicit_snapshots()),
            )
        )
        own = {s.id: s for s in snapshots if s.account == caller.account or caller.is_admin}
        usages = await self._lineages.usages({s.lineage for s in own.values()}, continued=page.after is not None)

        def view(snapshot: Snapshot) -> dict[str, Any] | None:
            if snapshot.id in hidden and names is None:
                return None
            if snapshot.id in own:
                described = describe_snapshot(snapshot, progress.get(snapshot.id, 0), usages.get(snapshot.id))
            else:
                described = describe_shared_snapshot(snapshot)
            return described if passes(described, chosen) else None

        size = page.size if names is None else len(names)
        found, following = taken(snapshots, size, lambda snapshot: (snapshot.started, snapshot.id), view)
        if names is not None:
            mine = [document for document in found if document["SnapshotId"] in own]
            await add_data_keys(self._broker, own, mine, "SnapshotId")
        return found, following


def _in_use(snapshot: Snapshot, job: Job) -> EbsdError:
    if job.account != snapshot.account:
        return SharedSnapshotInUse(snapshot=snapshot.id, account=job.account)  # the job itself is not his to see
    return SnapshotInUse(snapshot=snapshot.id, user=job.id)


def pending_snapshot(
    volume: Volume, ident: SnapshotId, name: str, description: str, tags: Mapping[str, str], new_head: int, now: str
) -> Snapshot:
    """Return the row of a snapshot that is taken now of a volume, whose key and lineage it has."""
    return Snapshot(
        id=ident,
        account=volume.account,
        owner=volume.owner,
        name=name,
        volume=volume.id,
        size=volume.size,
        state=SnapshotState.PENDING,
        message="",
        description=description,
        cipher=volume.cipher,
        key_arn=volume.key_arn,
        wrapped_key=volume.wrapped_key,
        context=volume.context,
        lineage=volume.lineage,
        new_head=new_head,
        integrity=Integrity.VERIFIED if volume.integrity is Integrity.NEW else volume.integrity,
        authority=None,
        pause_us=None,
        started=now,
        completed=None,
        tags=tags,
    )


def check_can_be_taken(volume: Volume) -> None:
    """Raise IncorrectVolumeState unless a snapshot can be taken of the volume now."""
    attachment: Attachment | None = volume.attachment
    if volume.state is VolumeState.AVAILABLE:
        return
    if volume.state is VolumeState.IN_USE and attachment is not None:
        if attachment.state in (AttachmentState.ATTACHED, AttachmentState.BUSY):
            return
        raise IncorrectVolumeState(volume=volume.id, state=attachment.state.value)
    raise IncorrectVolumeState(volume=volume.id, state=volume.state.value)


def _check_usable(snapshot: Snapshot) -> None:
    if snapshot.state is not SnapshotState.COMPLETED:
        raise SnapshotPending(snapshot=snapshot.id, state=snapshot.state.value)


def _state_of(t: Transaction, ident: SnapshotId) -> SnapshotState | None:
    """Return the state of a snapshot, None when it is not there."""
    try:
        return t.snapshot(ident).state
    except SnapshotNotFound:
        return None


def _pending_of(volume: VolumeId) -> Callable[[Transaction], list[SnapshotId]]:
    """Return what looks for the snapshots being taken of a volume; the destinations of copies are not among them."""
    return lambda t: [s.id for s in t.pending_snapshots() if s.volume == volume and s.new_head]


def _check_not_pending(snapshot: Snapshot) -> None:
    if snapshot.state is SnapshotState.PENDING:
        raise SnapshotPending(snapshot=snapshot.id, state=snapshot.state.value)


def served_head(volume: Volume) -> int:
    """Return the layer that takes the volume's writes: a snapshot that was abandoned may have left a later head."""
    attachment = volume.attachment
    return volume.head if attachment is None or attachment.read_only else attachment.head


def _head_before(layers: Sequence[Layer], snapshot: Snapshot) -> int:
    """Return the layer that was the volume's head before this snapshot's new one."""
    mine = [layer.number for layer in layers if layer.volume == snapshot.volume and layer.number < snapshot.new_head]
    return max(mine, default=0)


def _owner_of(volume: Volume) -> Caller:
    """Return the owner as the caller on whose behalf ebsd acts, whoever asked."""
    return Caller(uid_of_account(volume.account), volume.owner, volume.account, is_admin=False)
