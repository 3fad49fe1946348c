"""Attachments: bring a volume onto the host, take it away, adopt and bury volume processes.

The order of the steps, and why it is that order, stands in ARCHITECTURE.md ("Attach, in order", "Detach, in
order"). Every step of ``attach`` pushes its undoing onto a stack; a failure runs the stack in reverse.
"""

from __future__ import annotations

import json
import logging
import os
import pwd
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import trio

from ebsd.control import host_helper, rollback
from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.drains import Drains
from ebsd.control.host import Host
from ebsd.control.leaf_roots import LeafRoots
from ebsd.control.lineages import Lineages
from ebsd.control.mounts import loop_minors_of
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.volume_files import VolumeFiles
from ebsd.control.volume_link import VolumeLink, close_all, control_listener
from ebsd.control.volumes import Volumes
from ebsd.domain.errors import (
    EbsdError,
    IncorrectVolumeState,
    IntegrityFailure,
    KeyNotFound,
    KeyRevoked,
    KeyServiceUnavailable,
    NeedsRoot,
    RemoteError,
    VolumeAlreadyAttached,
    WritesFailed,
    WritesLackedSpace,
)
from ebsd.domain.ids import KeyArn, VolumeId, uid_of_account
from ebsd.domain.model import Attachment, Caller, ExposedAs, Integrity, Volume
from ebsd.domain.states import (
    AttachmentEvent,
    AttachmentState,
    VolumeEvent,
    VolumeState,
    next_attachment_state,
    next_volume_state,
)
from ebsd.domain.units import SECTOR
from ebsd.ipc.channel import Channel
from ebsd.store.catalog import Transaction
from ebsd.store.livemap import LiveMapInUse
from ebsd.store.salvage import SalvageOutcome
from ebsd.store.signedrecord import parse_signed

log = logging.getLogger(__name__)

T = TypeVar("T")

DEATH_PATIENCE: Final = 10.0
"""Seconds in which a volume process that was killed must have let go of its live map."""

DIED: Final = "its volume process ended unexpectedly; everything that was written is kept"
STOPPED: Final = "its disk failed to make something durable; what was written since the last flush may be lost"
"""Why a volume is in ``error``."""

END_PATIENCE: Final = 2.0
"""Seconds in which a volume process that did not answer must be gone to count as dead."""

MAX_UNSYNCED: Final = 10_000
"""Layers that are named one by one as perhaps not durable: they must fit a packet."""

FLOORS_DUE: Final = "floors due"
"""Setting of the catalog: floors that a key service which did not answer could not be told at a detach."""

LONGEST_PAUSE: Final = 60.0
"""Seconds between two looks at a loop device that somebody still has open after a forced detach."""

_REVOKED: Final = {"DisabledException", "KMSInvalidStateException", "NotFoundException"}
"""Errors of the key service at attach that EC2 shows as CustomerKeyHasBeenRevoked: the key is disabled, waits for its
deletion, or was deleted."""


@dataclass(frozen=True, slots=True)
class AttachResult:
    volume: Volume
    blank: bool
    """Nothing was ever written, so a file system may be made."""


class Attachments:
    """Use cases on attached volumes. One volume process per attached volume."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        broker: Broker,
        files: VolumeFiles,
        volumes: Volumes,
        lineages: Lineages,
        links: dict[VolumeId, VolumeLink],
        roots: LeafRoots,
        drains: Drains,
        snapshot_files: SnapshotFiles,
        nursery: trio.Nursery,
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._broker = broker
        self._files = files
        self._snapshot_files = snapshot_files
        self._volumes = volumes
        self._lineages = lineages
        self._nursery = nursery
        self._links = links
        self._roots = roots
        self._drains = drains
        self._empty_loops: dict[int, VolumeId] = {}
        """Loop devices that were taken from their users by force: the kernel keeps the numbers until we remove them."""

    # --- attach

    async def attach(
        self,
        caller: Caller,
        name_or_id: str,
        *,
        read_only: bool,
        expose_as: ExposedAs | None,
        accept: int | None = None,
    ) -> AttachResult:
        """Attach a volume (EC2 AttachVolume); returns when it can be used.

        ``accept``: the generation of its record, which is older than the key service remembers (control/rollback.py);
        a read-only attachment accepts it for itself alone.
        """
        if accept is not None:
            rollback.refuse_others(caller)
        volume = await self._catalogue.run(lambda t: t.find_volume(caller, name_or_id))
        exposed = self._judge_exposure(caller, expose_as)
        async with self._volumes.lock(volume.id), AsyncExitStack() as undo:
            volume = await self._begin(volume.id, read_only, exposed)
            undo.push_async_callback(self._shielded, self._forget_attachment, volume.id)
            async with host_helper.running() as helper:  # starts while the volume is verified
                result = await self._bring_up(caller, volume, undo, accept, helper)
            undo.pop_all()
            return result

    def _judge_exposure(self, caller: Caller, wanted: ExposedAs | None) -> ExposedAs:
        if wanted is ExposedAs.FILE:
            return wanted
        if not self._host.is_root:
            raise NeedsRoot(
                operation="A loop device",
                remedy="This ebsd does not run as root; attach the block file: ebsctl attach --file.",
            )
        if not caller.is_admin:
            raise NeedsRoot(
                operation="A loop device",
                remedy="Attach the block file (ebsctl attach --file), or let root attach the volume.",
            )
        return ExposedAs.LOOP

    async def _begin(self, ident: VolumeId, read_only: bool, exposed: ExposedAs) -> Volume:
        def intend(t: Transaction) -> Volume:
            volume = t.volume(ident)
            if volume.attachment is not None and volume.state is not VolumeState.ERROR:
                raise VolumeAlreadyAttached(volume=ident, path=volume.attachment.path)
            state = next_volume_state(ident, volume.state, VolumeEvent.ATTACH)
            t.set_volume_state(ident, state)
            t.put_attachment(
                Attachment(
                    volume=ident,
                    state=AttachmentState.ATTACHING,
                    boot_id=self._host.boot_id,
                    generation=t.next_attach_generation(ident),
                    exposed_as=exposed,
                    read_only=read_only,
                    path=str(self._host.runtime.block_file(ident)),
                    loop_minor=None,
                    grant=None,
                    head=volume.head,
                    mount_point=None,
                    time=self._host.now(),
                )
            )
            return t.volume(ident)

        return await self._catalogue.run(intend)

    async def _bring_up(
        self, caller: Caller, volume: Volume, undo: AsyncExitStack, accept: int | None, helper: Channel
    ) -> AttachResult:
        attachment = _attachment(volume)
        read_only = attachment.read_only
        await self._salvage_leftover(volume)
        await self._catch_up(volume.id)
        former = None
        if accept is not None:
            former = await rollback.lower(self._broker, self._snapshot_files, caller, volume.id, accept)
        if former is not None:
            undo.push_async_callback(self._shielded, self._broker.raise_floor, volume.id, former)
        # It imports what it needs while the key service is asked; until it is configured it knows no volume.
        link = VolumeLink.start(volume.id, self._host.runtime.control_socket(volume.id))
        undo.push_async_callback(self._shielded, self._kill, link)
        session = await self._open_session(caller, volume, undo)
        verified = await self._configure_process(volume.id, link, session, undo)

        if verified.next_record is not None:
            # Record first, floor second: a crash between the two leaves a record above the floor, which is
            # fine; the other order would leave a volume that no record on disk can open.
            await trio.to_thread.run_sync(self._files.write_signed_record, volume.id, verified.next_record)
            signed = parse_signed(verified.next_record, file=volume.id)
            await self._broker.raise_floor(volume.id, signed.generation)
        elif former is not None:
            await self._broker.raise_floor(volume.id, former)

        block_file = self._host.runtime.block_file(volume.id)
        uid, gid = _owner_ids(volume)
        block_file.touch(mode=0o600)
        undo.push_async_callback(self._shielded, self._remove_block_file, volume.id)
        fuse = await host_helper.mount_fuse(block_file, uid=uid, gid=gid, read_only=read_only, by=helper)
        undo.push_async_callback(self._shielded, host_helper.unmount_fuse, volume.id, block_file, force=True)
        try:
            await link.serve(fuse)
        finally:
            os.close(fuse)

        path, minor = str(block_file), None
        if attachment.exposed_as is ExposedAs.LOOP:
            # Nor an empty one that somebody else removed meanwhile: we still take that number away.
            used = {*await self._catalogue.run(lambda t: t.used_loop_minors()), *self._empty_loops}
            device = await host_helper.attach_loop(
                volume.id,
                block_file,
                read_only=read_only,
                avoid=sorted(used),
                discard=self._host.transport == "native",
                by=helper,
            )
            undo.push_async_callback(self._shielded, self._detach_loop, volume.id, device.minor, force=True, dead=True)
            path, minor = device.path, device.minor
            await host_helper.make_links(volume, path, by=helper)
            undo.push_async_callback(self._shielded, host_helper.remove_links, volume, path)

        integrity = Integrity.UNVERIFIED if verified.unverified else Integrity.VERIFIED

        def finish(t: Transaction) -> Volume:
            now = _attachment(t.volume(volume.id))
            state = next_attachment_state(volume.id, now.state, AttachmentEvent.EXPOSED)
            t.put_attachment(replace(now, state=state, path=path, loop_minor=minor))
            if not read_only:
                t.set_integrity(volume.id, integrity)
            return t.volume(volume.id)

        attached = await self._catalogue.run(finish)
        self._watch(volume.id, link)
        self._drains.follow(attached, link)
        log.info("%s attached at %s", volume.id, path)
        return AttachResult(attached, verified.blank)

    async def _salvage_leftover(self, volume: Volume) -> None:
        """Apply a live map that an unclean end left behind; until then the durable map is not authoritative."""
        earlier = _attachment(volume).generation - 1
        await self._salvage(volume, earlier)

    async def _open_session(self, caller: Caller, volume: Volume, undo: AsyncExitStack) -> int:
        key = volume.key_arn if volume.encrypted else None
        try:
            if key is None:
                return await self._broker.open_session(volume.id, key=None, grant=None, blob=None, context=None)
            wrapped = await trio.to_thread.run_sync(self._files.wrapped_key, volume)
            grant = await self._broker.create_grant(_owner(volume), key, wrapped.context, _grant_name(volume))
            undo.push_async_callback(self._shielded, self._retire, volume.id, key, grant)

            def note(t: Transaction) -> None:
                t.put_attachment(replace(_attachment(t.volume(volume.id)), grant=grant))

            await self._catalogue.run(note)
            return await self._broker.open_session(
                volume.id, key=key, grant=grant, blob=wrapped.blob, context=wrapped.context
            )
        except RemoteError as exc:
            raise _as_revoked(exc, volume) from exc

    async def _configure_process(self, ident: VolumeId, link: VolumeLink, session: int, undo: AsyncExitStack) -> Any:
        fds = [session]
        try:
            volume = await self._catalogue.run(lambda t: t.volume(ident))
            attachment = _attachment(volume)
            opened = await trio.to_thread.run_sync(self._files.open_for_attach, volume, attachment.read_only)
            fds += opened.fds
            control = self._host.runtime.control_socket(volume.id)
            listener = control_listener(control)
            undo.callback(control.unlink, missing_ok=True)
            undo.push_async_callback(self._shielded, self._end_live_map, volume)
            fds.insert(1, listener.detach())
            undo.push_async_callback(self._shielded, self._kill, link)  # before the live map that it made is looked at
            configuration = {
                "VolumeId": volume.id,
                "Owner": volume.account,
                "Lineage": volume.lineage,
                "Size": volume.size,
                "Head": volume.head,
                "Preallocated": volume.preallocated,
                "Cipher": int(volume.cipher),
                "SectorSize": SECTOR,
                "KeyArn": volume.key_arn,
                "Sources": [volume.authority] if volume.authority else [],
                "AttachGeneration": attachment.generation,
                # Of the sealed ones each was made durable before its state said so.
                "Unsynced": await self._catalogue.run(lambda t: t.unsealed_layers(volume.lineage, MAX_UNSYNCED)),
                "BootId": self._host.boot_id,
                "ReadOnly": attachment.read_only,
                "SpaceReserve": self._host.space.limits.reserve,
                "FullWait": self._host.space.limits.full_wait,
                "LiveDirectory": str(self._host.runtime.live),
                "Transport": self._host.transport,
                "Deaths": self._host.engine_deaths,
                "Uid": _owner_ids(volume)[0],
                "Gid": _owner_ids(volume)[1],
            }
            try:
                return await link.configure(configuration, opened.record, fds)
            except RemoteError as exc:
                raise _as_revoked(exc, volume) from exc
        finally:
            close_all(fds)

    # --- detach

    async def detach(self, caller: Caller, name_or_id: str, *, force: bool) -> Volume:
        """Detach a volume (EC2 DetachVolume); raises VolumeBusy and leaves it usable while somebody uses it."""
        found = await self._catalogue.run(lambda t: t.find_volume(caller, name_or_id))
        async with self._volumes.lock(found.id):
            volume = await self._catalogue.run(lambda t: t.volume(found.id))
            if volume.attachment is None:
                raise IncorrectVolumeState(volume=volume.id, state=volume.state.value)
            # A flush of the device would wait as long as its writes wait for space, and longer than its helper may.
            await self._hurry(volume.id, True)
            try:
                released = await self._take_down(volume, force=force)
            except BaseException:
                await self._shielded(self._hurry, volume.id, False)
                raise
            with trio.CancelScope(shield=True):
                await self._lineages.sweep_left(volume.id, volume.lineage)
            return released

    async def restart_engine(self, caller: Caller, name_or_id: str) -> tuple[VolumeId, int]:
        """Have another engine go on with an attached volume, which only sees a pause; returns that in ms.

        For an upgrade: a volume goes on with the program that it was attached with until then.
        """
        found = await self._catalogue.run(lambda t: t.find_volume(caller, name_or_id))
        async with self._volumes.lock(found.id):
            volume = await self._catalogue.run(lambda t: t.volume(found.id))
            link = self._links.get(volume.id)
            if link is None:
                raise IncorrectVolumeState(volume=volume.id, state=volume.state.value)
            return volume.id, await link.restart_engine()

    async def _take_down(self, volume: Volume, *, force: bool) -> Volume:
        link = self._links.get(volume.id)
        await self._set_attachment_state(volume.id, AttachmentEvent.DETACH)
        block_file = self._host.runtime.block_file(volume.id)
        attachment = _attachment(volume)
        try:
            async with host_helper.running() as helper:
                if attachment.loop_minor is not None:
                    minor = attachment.loop_minor
                    await self._detach_loop(volume.id, minor, force=force, dead=link is None, helper=helper)
                    await host_helper.remove_links(volume, f"/dev/loop{minor}", by=helper)
                await host_helper.unmount_fuse(volume.id, block_file, force=force or link is None, by=helper)
        except EbsdError as exc:
            # In use (the helper's VolumeBusy), or the helper hangs with the process behind the device. Either way
            # what is still there goes on, and asking again begins with whatever is left to do.
            await self._set_attachment_state(volume.id, AttachmentEvent.REFUSED)
            if exc.code == WritesFailed.code and await _lacked_space(link):
                raise WritesLackedSpace(volume=volume.id) from exc
            raise
        await self._remove_block_file(volume.id)
        head = await self._end_process(volume, link, force=force)
        if attachment.grant is not None and volume.key_arn is not None:
            await self._retire(volume.id, volume.key_arn, attachment.grant)
        released = await self._release(volume.id, clean=head is not None, read_only=attachment.read_only, head=head)
        if head is None:
            # That of an engine that had failed is still there; until now it said so to whoever had to do this again.
            await trio.to_thread.run_sync(self._files.remove_live_map, volume.id)
        return released

    async def _detach_loop(
        self, ident: VolumeId, minor: int, *, force: bool, dead: bool, helper: Channel | None = None
    ) -> None:
        if not await host_helper.detach_loop(ident, minor, force=force, dead=dead, by=helper):
            self._empty_loops[minor] = ident
            self._nursery.start_soon(self._remove_when_closed, minor)

    async def _remove_when_closed(self, minor: int) -> None:
        """Nothing tells when the last user of a device is gone; so ask, ever more seldom."""
        pause = 1.0
        while minor in self._empty_loops:
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            await self._remove_empty(minor)

    async def remove_empty_loops(self) -> None:
        """Remove the loop devices that were taken by force and are closed by now; for the end of ebsd."""
        for minor in list(self._empty_loops):
            await self._remove_empty(minor)

    async def _remove_empty(self, minor: int) -> None:
        ident = self._empty_loops.get(minor)
        if ident is None:
            return
        try:
            removed = await host_helper.detach_loop(ident, minor, force=True, dead=True)
        except EbsdError as exc:
            log.warning("%s: loop%d stays: %s", ident, minor, exc)
            removed = True
        if removed:
            self._empty_loops.pop(minor, None)

    async def _hurry(self, ident: VolumeId, hurried: bool) -> None:
        """Have the volume's writes wait for space no longer, or again; a process that cannot hear it is no failure."""
        link = self._links.get(ident)
        if link is not None:
            try:
                await link.hurry(hurried)
            except EbsdError as exc:
                log.warning("%s: %s", link.volume, exc)

    async def _end_process(self, volume: Volume, link: VolumeLink | None, *, force: bool) -> int | None:
        """Stop the volume process and write its clean record; returns the head in that, None without a clean end."""
        attachment = _attachment(volume)
        clean, head = False, volume.head
        if link is not None:
            try:
                stopped = await link.stop()
                await self._collect_roots(link)
                if stopped.record is not None:
                    await trio.to_thread.run_sync(self._files.write_signed_record, volume.id, stopped.record)
                    await self._raise_floor(volume.id, stopped.generation)
                    head = parse_signed(stopped.record, file=volume.id).head
                    await self._catalogue.run(lambda t: t.note_left(volume.id, stopped.left))
                clean = True
            except EbsdError as exc:
                log.error("%s did not end cleanly: %s", volume.id, exc)
                # One that died meanwhile is not asked again: its device is gone, and what it leaves is salvaged. One
                # that tells of an error is alive, or ends for it: somebody must hear that before it is detached.
                force = force or (not isinstance(exc, RemoteError) and await _has_ended(link))
                if not force:
                    link.stopping = False
                    raise
            finally:
                if clean or force:
                    await (link.end() if clean else link.kill())
                    self._links.pop(volume.id, None)
        self._host.runtime.control_socket(volume.id).unlink(missing_ok=True)
        if not clean:
            await self._salvage(volume, attachment.generation)
        return head if clean else None

    async def _raise_floor(self, ident: VolumeId, generation: int) -> None:
        """Raise the floor to the record of a clean end.

        A key service that does not answer keeps nobody from detaching: that it is due is noted, for the next ebsd, too.
        Until then an older record of that one attachment would be accepted, as while it lasted.
        """
        try:
            await self._broker.raise_floor(ident, generation)
        except KeyServiceUnavailable as exc:
            log.warning("the floor of %s is raised when the key service answers: %s", ident, exc.message)
            await self._catalogue.run(lambda t: _put_due(t, {**_due(t), ident: generation}))
            self._raise_afterwards(ident)

    def _raise_afterwards(self, ident: VolumeId) -> None:
        async def catch_up() -> None:
            async with self._volumes.lock(ident):
                await self._catch_up(ident)

        self._broker.afterwards(f"raising the floor of {ident}", catch_up)

    async def _catch_up(self, ident: VolumeId) -> None:
        """Raise the floor of a volume if that is due, before anybody could lower it; its lock is held."""
        generation = await self._catalogue.run(lambda t: _due(t).get(ident))
        if generation is None:
            return
        try:
            await self._broker.raise_floor(ident, generation)
        except RemoteError as exc:
            if exc.code != IntegrityFailure.code:
                raise
            log.info("%s was deleted meanwhile, and its floor with it", ident)

        def done(t: Transaction) -> None:
            _put_due(t, {each: due for each, due in _due(t).items() if each != ident})

        await self._catalogue.run(done)

    async def _collect_roots(self, link: VolumeLink) -> None:
        """Fetch what the process signed for snapshots; without it they are as good, but their leaves not signed."""
        try:
            await self._roots.collect(link)
        except (EbsdError, OSError) as exc:
            log.warning("the leaves of %s: %s", link.volume, exc)

    async def _salvage(self, volume: Volume, generation: int) -> None:
        """Salvage an attachment's live map; its process may have been killed a moment ago and still hold it."""
        await self._when_let_go(volume, self._files.salvage, generation)

    async def _when_let_go(self, volume: Volume, step: Callable[[Volume, str, int], T], generation: int) -> T:
        """Do something with the live map of an attachment whose holder has ended, as soon as its engine is gone, too.

        The lock on the live map says so: it is of the open file that both have.
        """
        with trio.move_on_after(DEATH_PATIENCE):
            while True:
                try:
                    return await trio.to_thread.run_sync(step, volume, self._host.boot_id, generation)
                except LiveMapInUse:
                    await trio.sleep(0.05)
        raise IncorrectVolumeState(volume=volume.id, state="still held by a volume process")

    async def _release(self, ident: VolumeId, *, clean: bool, read_only: bool, head: int | None = None) -> Volume:
        def finish(t: Transaction) -> Volume:
            volume = t.volume(ident)
            if head is not None:
                # Behind the catalog's when a snapshot was abandoned before the process had switched.
                t.set_volume_head(ident, head)
            t.set_volume_state(ident, next_volume_state(ident, volume.state, VolumeEvent.RELEASED))
            t.remove_attachment(ident)
            if not read_only:
                t.set_integrity(ident, Integrity.VERIFIED if clean else Integrity.UNVERIFIED)
            return t.volume(ident)

        volume = await self._catalogue.run(finish)
        log.info("%s detached", ident)
        return volume

    async def record_mount(self, caller: Caller, name_or_id: str, mount_point: str | None) -> None:
        """Remember where ``ebsctl`` mounted the device; used for display and to find it again at detach."""

        def note(t: Transaction) -> None:
            volume = t.find_volume(caller, name_or_id)
            if volume.attachment is None:
                raise IncorrectVolumeState(volume=volume.id, state=volume.state.value)
            t.put_attachment(replace(volume.attachment, mount_point=mount_point))

        await self._catalogue.run(note)

    async def reclaim(self, caller: Caller, name_or_id: str) -> int:
        """Give the blocks of what was discarded back to the store's file system, which otherwise happens soon.

        Returns how many bytes were since the volume process began: who asks twice sees what came back between.
        """
        volume = await self._catalogue.run(lambda t: t.find_volume(caller, name_or_id))
        link = self._links.get(volume.id)
        if link is None:
            raise IncorrectVolumeState(volume=volume.id, state=volume.state.value)
        return await link.reclaim()

    # --- restarts and deaths

    async def adopt_all(self) -> None:
        """Take over what an earlier ebsd left: called once at start, before any request."""
        for ident in await self._catalogue.run(_due):
            self._raise_afterwards(ident)
        for volume in await self._catalogue.run(lambda t: t.volumes()):
            if volume.attachment is None:
                continue
            async with self._volumes.lock(volume.id):
                try:
                    await self._adopt(volume, volume.attachment)
                except (EbsdError, OSError) as exc:
                    # One volume must not keep ebsd from serving the others.
                    await self._fail(volume.id, f"it could not be taken over: {exc}")

    async def _adopt(self, volume: Volume, attachment: Attachment) -> None:
        if attachment.boot_id != self._host.boot_id:
            log.warning("%s was attached when the host went down; its attachment is void", volume.id)
            await self._void(volume, attachment)
            return
        link = await VolumeLink.find(volume.id, self._host.runtime.control_socket(volume.id))
        if link is None:
            if attachment.state in (AttachmentState.ATTACHING, AttachmentState.DETACHING):
                await self._tear_down_half_attached(volume)
            else:
                await self._fail(volume.id, await self._why_gone(volume.id))
            return
        self._links[volume.id] = link
        if attachment.state is AttachmentState.ATTACHING:
            await self._tear_down_half_attached(volume)
            return
        if attachment.state is AttachmentState.DETACHING:
            if (await link.status())["Unmounted"]:
                # Nobody can use it any more: what was begun is brought to its end.
                await self._take_down(volume, force=False)
                return
            await self._set_attachment_state(volume.id, AttachmentEvent.REFUSED)
        self._watch(volume.id, link)
        self._roots.follow(link)
        self._drains.follow(volume, link)
        log.info("%s is still attached at %s; its process goes on", volume.id, attachment.path)

    async def _void(self, volume: Volume, attachment: Attachment) -> None:
        await self._remove_block_file(volume.id)
        self._host.runtime.control_socket(volume.id).unlink(missing_ok=True)
        if volume.key_arn is not None:
            grant = attachment.grant or await self._lost_grant(volume, volume.key_arn)
            if grant is not None:
                await self._retire(volume.id, volume.key_arn, grant)
        await self._release(volume.id, clean=False, read_only=attachment.read_only)

    async def _lost_grant(self, volume: Volume, key: KeyArn) -> str | None:
        """Return the id of the attach grant that ebsd may have been given without getting to note it."""
        try:
            wrapped = await trio.to_thread.run_sync(self._files.wrapped_key, volume)
            return await self._broker.create_grant(_owner(volume), key, wrapped.context, _grant_name(volume))
        except (EbsdError, OSError) as exc:
            log.warning("whether %s has an attach grant left cannot be said: %s", volume.id, exc)
            return None

    async def _tear_down_half_attached(self, volume: Volume) -> None:
        """End an attachment that nobody uses: it was not finished, or its process ended while it was taken away."""
        log.warning("%s was %s when ebsd ended; ending that", volume.id, _attachment(volume).state.value)
        link = self._links.pop(volume.id, None)
        attachment = _attachment(volume)
        block_file = self._host.runtime.block_file(volume.id)
        # The catalog learns of the device last. Looked for before the unmount, after which no path leads to it.
        minors = set(loop_minors_of(block_file))
        if attachment.loop_minor is not None:
            minors.add(attachment.loop_minor)
        for minor in minors:
            await self._detach_loop(volume.id, minor, force=True, dead=link is None)
            await host_helper.remove_links(volume, f"/dev/loop{minor}")
        await host_helper.unmount_fuse(volume.id, block_file, force=True)
        await self._remove_block_file(volume.id)
        if link is not None:
            await link.kill()
        await self._salvage(volume, attachment.generation)
        await self._void(volume, attachment)

    def _watch(self, ident: VolumeId, link: VolumeLink) -> None:
        self._links[ident] = link
        self._nursery.start_soon(self._bury, ident, link)

    async def _bury(self, ident: VolumeId, link: VolumeLink) -> None:
        """Wait for the end of a volume process; one that nobody wanted puts the volume into ``error``."""
        await link.child.wait()
        if link.stopping or self._links.get(ident) is not link:
            return
        del self._links[ident]
        try:
            await self._fail(ident, await self._why_gone(ident))
        except (EbsdError, OSError) as exc:
            # The disk that took the volume away may hold the catalog, too: the other volumes go on, and so does ebsd.
            log.error("%s: its volume process ended, which could not be noted: %s", ident, exc)

    async def _why_gone(self, ident: VolumeId) -> str:
        volume = await self._catalogue.run(lambda t: t.volume(ident))
        if volume.attachment is None:
            return DIED
        generation = volume.attachment.generation
        failed = await self._when_let_go(volume, self._files.has_failed, generation)
        return STOPPED if failed else DIED

    async def _fail(self, ident: VolumeId, reason: str) -> None:
        log.error("%s: %s. Detach it to use it again", ident, reason)

        def note(t: Transaction) -> None:
            volume = t.volume(ident)
            t.set_volume_state(ident, next_volume_state(ident, volume.state, VolumeEvent.FAILED), reason)

        await self._catalogue.run(note)

    @property
    def running(self) -> list[VolumeId]:
        """Volumes whose process runs; they go on when ebsd ends."""
        return sorted(self._links)

    def processes(self) -> dict[str, int]:
        """Return {volume id: pid} of the volume processes that run."""
        return {str(volume): link.child.pid for volume, link in self._links.items()}

    # --- small steps

    async def _shielded(self, step: Callable[..., Awaitable[object]], *args: Any, **kwargs: Any) -> None:
        """Run one undoing step whatever happens to the caller; its failure is logged, the next step still runs."""
        with trio.CancelScope(shield=True):
            try:
                await step(*args, **kwargs)
            except (EbsdError, OSError) as exc:
                log.error("undoing an attachment: %s", exc)

    async def _end_live_map(self, volume: Volume) -> None:
        """Keep what was acknowledged through an attachment that failed after all, and remove its live map."""
        generation = _attachment(volume).generation
        result = await self._when_let_go(volume, self._files.salvage, generation)
        if result.outcome is not SalvageOutcome.FAILED:
            await trio.to_thread.run_sync(self._files.remove_live_map, volume.id)

    async def relink(self, ident: str) -> None:
        """Give the device of an attached volume the links of its present name."""
        volume = await self._catalogue.run(lambda t: t.volume(VolumeId(ident)))
        if volume.attachment is not None and volume.attachment.loop_minor is not None:
            device = f"/dev/loop{volume.attachment.loop_minor}"
            await host_helper.remove_links(volume, device)
            await host_helper.make_links(volume, device)

    async def _kill(self, link: VolumeLink) -> None:
        await link.kill()

    async def _retire(self, ident: VolumeId, key: Any, grant: str) -> None:
        try:
            await self._broker.retire_grant(key, grant)
        except EbsdError as exc:
            # A grant that outlives its attachment allows nothing by itself: only ebsd can open a session.
            log.warning("the attach grant of %s could not be retired: %s", ident, exc)

    async def _remove_block_file(self, ident: VolumeId) -> None:
        # The helper knows the file is unmounted now; unlink never asks the FUSE server anything.
        self._host.runtime.block_file(ident).unlink(missing_ok=True)

    async def _forget_attachment(self, ident: VolumeId) -> None:
        def forget(t: Transaction) -> None:
            volume = t.volume(ident)
            t.set_volume_state(ident, next_volume_state(ident, volume.state, VolumeEvent.RELEASED))
            t.remove_attachment(ident)

        await self._catalogue.run(forget)

    async def _set_attachment_state(self, ident: VolumeId, event: AttachmentEvent) -> None:
        def change(t: Transaction) -> None:
            attachment = _attachment(t.volume(ident))
            t.put_attachment(replace(attachment, state=next_attachment_state(ident, attachment.state, event)))

        await self._catalogue.run(change)


def _attachment(volume: Volume) -> Attachment:
    if volume.attachment is None:
        raise IncorrectVolumeState(volume=volume.id, state=volume.state.value)
    return volume.attachment


async def _lacked_space(link: VolumeLink | None) -> bool:
    """Say whether writes of this attachment failed for want of space: a loop device turns any error into EIO."""
    try:
        return link is not None and bool((await link.status())["Space"]["Failures"])
    except EbsdError:
        return False


async def _has_ended(link: VolumeLink) -> bool:
    with trio.move_on_after(END_PATIENCE):
        await link.child.wait()
        return True
    return False


def _due(t: Transaction) -> dict[VolumeId, int]:
    """Return the floors that are to be raised, by volume."""
    return {VolumeId(ident): int(generation) for ident, generation in json.loads(t.setting(FLOORS_DUE) or "{}").items()}


def _put_due(t: Transaction, due: Mapping[VolumeId, int]) -> None:
    t.set_setting(FLOORS_DUE, json.dumps(due))


def _grant_name(volume: Volume) -> str:
    return f"attach-{volume.id}-{_attachment(volume).generation}"


def _owner(volume: Volume) -> Caller:
    return Caller(uid_of_account(volume.account), volume.owner, volume.account, is_admin=False)


def _owner_ids(volume: Volume) -> tuple[int, int]:
    uid = uid_of_account(volume.account)
    try:
        return uid, pwd.getpwuid(uid).pw_gid
    except KeyError:
        return uid, 65534


def _as_revoked(error: RemoteError, volume: Volume) -> EbsdError:
    if error.code not in _REVOKED:
        return error
    revoked = KeyRevoked(volume=volume.id, reason=error.message, key=volume.key_arn)
    if error.code == KeyNotFound.code:
        revoked.hint = (
            "A key that was deleted cannot be had back, except from a backup of the keys: ebsctl key restore."
        )
    return revoked
