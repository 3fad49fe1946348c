"""Snapshots of several volumes at one moment (EC2 CreateSnapshots): all of them are completed, or none.

In order; ``snapshots.py`` says what is done for each of them, and why in this order:

1. One transaction: all rows ``pending``, the rows of the set, a new head for each volume. One StartTime.
2. Anchors and files of the new heads. Of volumes that nobody writes to, the snapshot's files: their locks are held.
3. Each volume process signs a record that knows its new head; records, floors.
4. Each process makes ready (``gather``), with requests going on. Then each holds its requests (``hold``). When the last
   one does, each is told to seal (``go``) and lets its requests go on by itself. So no request is answered between
   the first and the last of their moments (``volume/CONCURRENCY.md``, R26).
5. Records, and the maps renamed to their final names.
6. One transaction: all rows ``completed``, the rows of the set gone.

What is cut is decided for the whole set: completed when every member's files are there, or its process answers again
that it has sealed. Otherwise that decision is committed before the first member is removed, as later the others might
look complete. Nobody was told of a set before step 6, so removing one that could be completed would be no less right.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

import trio

from ebsd.control.catalogue import Catalogue
from ebsd.control.host import Host
from ebsd.control.leaf_roots import LeafRoots
from ebsd.control.lineages import Lineages
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.snapshots import Snapshots, check_can_be_taken, pending_snapshot, served_head
from ebsd.control.volume_link import Sealed, VolumeLink, close_all
from ebsd.control.volumes import Volumes, new_uuid
from ebsd.domain.errors import (
    EbsdError,
    InvalidParameterCombination,
    InvalidParameterValue,
    KeyServiceUnavailable,
    MissingParameter,
    NotSupported,
    RemoteError,
    SnapshotSetFailed,
    VolumeNotAnswering,
)
from ebsd.domain.ids import ID_RANDOM_BYTES, LineageId, SnapshotId, VolumeId, new_id, parse_name
from ebsd.domain.model import Caller, Layer, Snapshot, Volume
from ebsd.domain.states import SnapshotState, VolumeState
from ebsd.domain.tags import merged_tags
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_SET: Final = 64
"""Volumes of one set. All wait for the slowest of them, so many make a pause long."""


@dataclass(frozen=True, slots=True)
class SetRequest:
    """The parameters of CreateSnapshots after parsing. Exactly one of the first three chooses the volumes."""

    volumes: Sequence[str]
    all_attached: bool
    target_tags: Mapping[str, str]
    """Volumes of the caller that have one of these tags, as Data Lifecycle Manager chooses its targets."""
    excluded: Sequence[str]
    name: Callable[[Volume], str | None]
    """The name of each snapshot; None: its id."""
    description: str
    tags: Mapping[str, str]
    copy_tags: bool
    """Each snapshot also gets the tags of its volume (CopyTagsFromSource)."""
    note: Callable[[Transaction, Snapshot], None] | None = None
    """Called for each of them in the transaction that adds its row: what belongs to it whatever happens then."""


@dataclass(slots=True)
class _Member:
    """One volume of a set that is being taken."""

    volume: Volume
    snapshot: Snapshot
    layers: Sequence[Layer]
    """Layers of its lineage that the table lacks, the volume's new head last."""
    link: VolumeLink | None = None
    fds: list[int] = field(default_factory=list)
    output: int = -1
    sealed: Sealed | None = None
    pause_us: int | None = None


class SnapshotSets:
    """Use cases on several volumes at one moment."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        volumes: Volumes,
        snapshots: Snapshots,
        files: SnapshotFiles,
        lineages: Lineages,
        links: Mapping[VolumeId, VolumeLink],
        roots: LeafRoots,
        nursery: trio.Nursery,
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._volumes = volumes
        self._snapshots = snapshots
        self._files = files
        self._lineages = lineages
        self._links = links
        self._roots = roots
        self._nursery = nursery
        self._awaited: set[str] = set()
        """Sets that a task will settle."""
        snapshots.settle_set = self._settle_later

    # --- take

    async def create(self, caller: Caller, request: SetRequest) -> list[Snapshot]:
        """Take snapshots of several volumes, attached or not: one moment within the call, all complete at return.

        In the order of the volumes that were named, else of their creation. Raises SnapshotSetFailed when their
        requests could not be held together; then, as after every other error, nothing of the set stays.
        """
        chosen = await self._catalogue.run(lambda t: _chosen(t, caller, request))
        if not 1 <= len(chosen) <= MAX_SET:
            raise InvalidParameterValue(
                value=len(chosen), parameter="VolumeIds", reason=f"a set has 1 to {MAX_SET} volumes"
            )
        names = {v.id: None if (name := request.name(v)) is None else parse_name(name) for v in chosen}
        await self._host.space.require()
        async with self._locked(chosen):
            for volume in chosen:
                await self._snapshots.settle_pending(volume.id)
            name, members = await self._intend([volume.id for volume in chosen], names, request)
            try:
                await self._take(name, members)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._settle(name)
                raise
            return await self._catalogue.run(lambda t: [t.snapshot(member.snapshot.id) for member in members])

    @asynccontextmanager
    async def _locked(self, rows: Sequence[Volume | Snapshot]) -> AsyncIterator[None]:
        """Hold the locks of volumes and of their lineages, in the order of their ids, or two sets could block."""
        volumes = {row.id if isinstance(row, Volume) else row.volume for row in rows}
        async with AsyncExitStack() as stack:
            for ident in sorted(volumes):
                await stack.enter_async_context(self._volumes.lock(ident))
            for lineage in sorted({row.lineage for row in rows}):
                await stack.enter_async_context(self._lineages.lock(lineage))
            yield

    async def _intend(
        self, idents: Sequence[VolumeId], names: Mapping[VolumeId, str | None], request: SetRequest
    ) -> tuple[str, list[_Member]]:
        set_name = self._host.random(16).hex()
        new = {v: SnapshotId(new_id("snap", self._host.random(ID_RANDOM_BYTES))) for v in idents}
        uuids = {v: new_uuid(self._host.random(16)) for v in idents}
        lineages = await self._catalogue.run(lambda t: {t.volume(ident).lineage for ident in idents})
        known: dict[LineageId, int] = {}
        for lineage in lineages:
            known[lineage] = await trio.to_thread.run_sync(self._files.known_layers, lineage)
        now = self._host.now()

        def intend(t: Transaction) -> list[_Member]:
            members = []
            for ident in idents:
                volume, snapshot = t.volume(ident), new[ident]
                check_can_be_taken(volume)
                tags = merged_tags(snapshot, {}, {**(volume.tags if request.copy_tags else {}), **request.tags})
                layer = t.add_layer(volume.lineage, uuids[ident], ident, volume.size)
                t.set_volume_head(ident, layer.number)
                row = pending_snapshot(
                    volume, snapshot, names[ident] or snapshot, request.description, tags, layer.number, now
                )
                t.add_snapshot(row)
                t.note_taken(row)
                if request.note is not None:
                    request.note(t, row)
                members.append(_Member(volume, row, t.layers(volume.lineage, known[volume.lineage])))
            t.add_set(set_name, new.values())
            return members

        return set_name, await self._catalogue.run(intend)

    async def _take(self, name: str, members: Sequence[_Member]) -> None:
        try:
            for member in members:
                # A failed earlier attempt may be why a process is missing: before anything is made for the others.
                member.link = self._snapshots.writing_link(member.volume)
            for member in members:
                member.fds = await self._snapshots.add_head(member.volume, member.snapshot, member.layers)
            for member in members:
                if member.link is None:
                    await self._snapshots.take_detached(member.volume, member.snapshot)
                else:
                    member.output = await self._snapshots.prepare_attached(
                        member.volume, member.snapshot, member.link, member.fds
                    )
            await self._seal_together([member for member in members if member.link is not None])
        finally:
            for member in members:
                close_all(member.fds)
                if member.output >= 0:
                    os.close(member.output)
        for member in members:
            if member.sealed is not None:
                member.pause_us = await self._snapshots.finish_sealed(member.volume, member.snapshot, member.sealed)
        await self._complete(name, [(m.snapshot, served_head(m.volume), m.pause_us) for m in members])
        for member in members:
            if member.link is not None:
                self._roots.follow(member.link)

    async def _seal_together(self, members: Sequence[_Member]) -> None:
        """Have all processes seal at one moment. Raises what the first of them that could not answered."""
        if len(members) == 1:  # nobody else writes, so it need not be held for anybody
            (one,) = members
            one.sealed = await _link(one).seal(one.snapshot.id, one.snapshot.account, one.output)
            return
        try:
            await _all([partial(self._gather, member) for member in members])
            await _all([partial(_hold, member) for member in members])
            # From here on every request of every volume waits: each may seal, and go on, without looking at the others.
            await _all([partial(_go, member) for member in members])
        except BaseException as exc:
            # Who does not answer is not asked once more: it goes on by itself.
            silent = exc.facts.get("volume") if isinstance(exc, VolumeNotAnswering) else None
            with trio.CancelScope(shield=True):
                await _all([partial(_let_go, member) for member in members if member.volume.id != silent])
            raise

    async def _gather(self, member: _Member) -> None:
        try:
            await _link(member).gather(member.snapshot.id, member.snapshot.account, member.output)
        except RemoteError as exc:
            if exc.code != NotSupported.code:
                raise
            reason = "its volume process was started by an earlier version of ebsd; detach it and attach it again"
            raise SnapshotSetFailed(volume=member.volume.id, reason=reason) from exc

    async def _complete(self, name: str, done: Sequence[tuple[Snapshot, int, int | None]]) -> None:
        def complete(t: Transaction) -> list[Layer | None]:
            t.end_set(name)
            return [self._snapshots.complete(t, snapshot, old, pause) for snapshot, old, pause in done]

        for layer in await self._catalogue.run(complete):
            await self._snapshots.seal_layer(layer)

    # --- a set that was cut short

    async def recover(self) -> None:
        """Complete or remove the sets that were being taken when ebsd ended; after adoption, before any request."""
        for name in await self._catalogue.run(lambda t: t.sets()):
            log.warning("%d snapshots of one moment were pending when ebsd ended", len((await self._members(name))[0]))
            await self._settle_locked(name)

    async def _members(self, name: str) -> tuple[list[Snapshot], bool]:
        def load(t: Transaction) -> tuple[list[Snapshot], bool]:
            idents, abandoned = t.set_members(name)
            return [t.snapshot(ident) for ident in idents], abandoned

        return await self._catalogue.run(load)

    async def _settle_locked(self, name: str) -> None:
        members, _ = await self._members(name)
        async with self._locked(members):
            await self._settle(name)

    async def _settle(self, name: str) -> None:
        """Decide a set by what is there; the caller holds all its locks. What cannot be decided stays pending."""
        try:
            members, abandoned = await self._members(name)
            pending = [snapshot for snapshot in members if snapshot.state is SnapshotState.PENDING]
            if not pending:
                return
            if not abandoned:
                # All are looked at, whatever the first says: this also notes the heads that the processes write to.
                complete = [await self._snapshots.is_complete(snapshot) for snapshot in pending]
                if all(complete):
                    for snapshot in pending:
                        await self._snapshots.note_record(snapshot)
                    done = [(snapshot, await self._snapshots.old_head(snapshot), None) for snapshot in pending]
                    await self._complete(name, done)
                    return
                await self._catalogue.run(lambda t: t.abandon_set(name))
            for snapshot in pending:
                await self._snapshots.abandon(snapshot)
        except VolumeNotAnswering as exc:
            log.error("snapshots of one moment stay pending until that is known: %s", exc.message)
            self._await(name)
        except KeyServiceUnavailable as exc:
            log.error("snapshots of one moment stay pending until the key service answers: %s", exc.message)
            self._snapshots.settle_afterwards(name, partial(self._settle_locked, name))
        except (EbsdError, OSError) as exc:
            log.error("snapshots of one moment stay pending until the next start: %s", exc)

    def _settle_later(self, snapshot: Snapshot) -> None:
        self._nursery.start_soon(self._await_set_of, snapshot.id)

    async def _await_set_of(self, snapshot: SnapshotId) -> None:
        name = await self._catalogue.run(lambda t: t.set_of(snapshot))
        if name is not None:
            self._await(name)

    def _await(self, name: str) -> None:
        if name not in self._awaited:
            self._awaited.add(name)
            self._nursery.start_soon(self._settle_when_possible, name)

    async def _settle_when_possible(self, name: str) -> None:
        """Settle a set as soon as every process that may have sealed answers, or has ended."""
        members, _ = await self._members(name)
        for snapshot in members:
            link = self._links.get(snapshot.volume)
            if link is not None:
                await link.answering()
        self._awaited.discard(name)
        await self._settle_locked(name)


def is_there(volume: Volume) -> bool:
    """Say whether a volume counts where nobody names it: not in the recycle bin, nor on its way out."""
    return volume.state not in (VolumeState.RECOVERABLE, VolumeState.DELETING)


def _chosen(t: Transaction, caller: Caller, request: SetRequest) -> list[Volume]:
    ways = [bool(request.volumes), request.all_attached, bool(request.target_tags)]
    if sum(ways) > 1:
        raise InvalidParameterCombination(reason="Give one of VolumeIds, AllAttached and TargetTags")
    if not any(ways):
        raise MissingParameter(parameter="VolumeIds")
    if request.volumes:
        found = {volume.id: volume for volume in (t.find_volume(caller, name) for name in request.volumes)}
    else:
        wanted = request.target_tags.items()
        found = {
            volume.id: volume
            for volume in t.volumes(caller.account)
            if is_there(volume)
            and (volume.attachment is not None if request.all_attached else wanted & volume.tags.items())
        }
    for name in request.excluded:
        found.pop(t.find_volume(caller, name).id, None)
    return list(found.values())


def _link(member: _Member) -> VolumeLink:
    if member.link is None:
        raise AssertionError("BUG: nobody writes to this volume")
    return member.link


async def _hold(member: _Member) -> None:
    try:
        await _link(member).hold(member.snapshot.id)
    except VolumeNotAnswering as exc:
        # Said for the whole set: that process goes on by itself, and what it has done is asked for afterwards.
        raise SnapshotSetFailed(volume=member.volume.id, reason=exc.message.rstrip(".")) from exc


async def _go(member: _Member) -> None:
    member.sealed = await _link(member).go(member.snapshot.id)


async def _let_go(member: _Member) -> None:
    try:
        await _link(member).let_go(member.snapshot.id)
    except EbsdError as exc:
        log.debug("%s goes on by itself: %s", member.volume.id, exc)  # nothing was begun, or its process is gone


async def _all(works: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Do all at once, to the end of all; raises the error of the first in order that failed."""
    errors: dict[int, Exception] = {}

    async def do(number: int, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except (EbsdError, OSError) as exc:
            errors[number] = exc

    async with trio.open_nursery() as nursery:
        for number, work in enumerate(works):
            nursery.start_soon(do, number, work)
    if errors:
        raise errors[min(errors)]
