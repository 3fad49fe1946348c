"""Volumes: create, delete, describe, rename, tag.

Create and delete write their intent into the catalog first, so that what a crash interrupts is undone (create)
or finished (delete) by ``recover`` at the next start.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import trio

from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.describe import VOLUME_FILTERS, describe_volume
from ebsd.control.encryption import Encryption
from ebsd.control.host import Host
from ebsd.control.into_bin import check_permanently, put_into_bin
from ebsd.control.lineages import Lineages
from ebsd.control.mounts import read_mounts
from ebsd.control.pages import parse_page, taken
from ebsd.control.volume_files import VolumeFiles
from ebsd.domain.admission import Making
from ebsd.domain.errors import (
    EbsdError,
    IncorrectState,
    InvalidParameterCombination,
    InvalidParameterValue,
    KeyServiceUnavailable,
    KmsValidation,
    MissingParameter,
    ResourceNotFound,
    VolumeInUse,
    VolumeNotFound,
)
from ebsd.domain.filters import parse_filters, passes
from ebsd.domain.geometry import chunk_count
from ebsd.domain.ids import (
    ID_RANDOM_BYTES,
    KeyArn,
    LineageId,
    VolumeId,
    format_uuid,
    looks_like_snapshot_id,
    looks_like_volume_id,
    new_id,
    parse_name,
)
from ebsd.domain.model import Caller, Cipher, Integrity, Job, LayerState, Lineage, Snapshot, Volume
from ebsd.domain.mountinfo import Mount
from ebsd.domain.outcomes import Source, decide_create_volume, source_of
from ebsd.domain.states import VolumeEvent, VolumeState, next_volume_state
from ebsd.domain.tags import merged_tags
from ebsd.domain.units import CHUNK, GIB, SECTOR, check_volume_size
from ebsd.store.catalog import Transaction
from ebsd.store.durablemap import FIRST_ENTRY
from ebsd.store.entries import entry_bytes
from ebsd.store.usage import Usage

log = logging.getLogger(__name__)

DESCRIPTION_SECONDS: Final = 3.0
"""For what descriptions of resources say beyond the catalog."""

DATA_KEY_BYTES: Final = 64
"""Two AES-256 keys: what EBS asks of GenerateDataKeyWithoutPlaintext."""

FORMAT_CONTEXT: Final = f"1/aes-256-xts/{SECTOR}"
"""Value of ``ebsd:format`` in the encryption context: the key service authenticates it with every unwrap."""


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """The parameters of CreateVolume after parsing."""

    name: str | None
    size: int | None
    size_gib: int | None
    snapshot: str | None
    encrypted: bool | None
    key: str | None
    context: Mapping[str, str]
    tags: Mapping[str, str]
    allow_damaged: bool = False
    """Restore, under its own key, a snapshot whose last verification found damage."""
    preallocate: bool = False
    """Give an empty volume all its blocks at once."""
    rate: int | None = None
    """Bytes per second at most where data is re-encrypted; 0: no limit, None: the configured one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a CreateVolume will make, judged and not yet begun."""

    volume: Volume
    shares_key: bool
    """The volume joins the lineage of its snapshot; else data is re-encrypted, or there is none."""
    note: str | None


class Volumes:
    """Use cases on volumes that are not attached, and the views on all of them."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        broker: Broker,
        encryption: Encryption,
        files: VolumeFiles,
        lineages: Lineages,
    ) -> None:
        self._host = host
        self._encryption = encryption
        self._catalogue = catalogue
        self._broker = broker
        self._files = files
        self._lineages = lineages
        self._locks: dict[VolumeId, trio.Lock] = {}
        self._preallocating = trio.Lock()
        """Held from the look at the free space until it is taken: two that fit one by one may not fit together."""

    def lock(self, volume: VolumeId) -> trio.Lock:
        """Return the lock that serialises everything done to one volume: create, attach, detach, delete."""
        return self._locks.setdefault(volume, trio.Lock())

    # --- create

    async def plan(self, caller: Caller, request: CreateRequest, source: Snapshot | None) -> Plan:
        """Judge a CreateVolume before anything is made: size, name, tags, encryption outcome, key.

        Unlike EBS, which lets a volume with an unusable key vanish afterwards, the key is checked here.
        """
        size = _requested_size(request, source)
        ident = VolumeId(new_id("vol", self._host.random(ID_RANDOM_BYTES)))
        name = parse_name(request.name) if request.name is not None else ident
        tags = merged_tags(ident, {}, request.tags)
        for pair in request.context:
            if pair.casefold().startswith(("aws:", "ebsd:")):
                raise KmsValidation(
                    reason=f"Keys of an encryption context that start with {pair.partition(':')[0]}: are reserved"
                )
        kind = Source.NONE if source is None else source_of(encrypted=source.encrypted, own=_is_own(caller, source))
        settled = await self._encryption.settle(
            caller,
            Making.VOLUME,
            partial(decide_create_volume, encrypted=request.encrypted, key_named=request.key is not None, source=kind),
            named=request.key,
            source=None if source is None else source.key_arn,
        )
        key, note = settled.key, None
        if key is None and request.context:
            raise InvalidParameterCombination(reason="An unencrypted volume has no encryption context")
        if key is not None and request.encrypted is False:
            why = "its snapshot is" if source is not None and source.encrypted else "encryption by default is on"
            note = f"The volume is encrypted: {why}, and Encrypted=false does not overrule it."
        shares = source is not None and source.key_arn == key and source.account == caller.account
        volume = Volume(
            id=ident,
            account=caller.account,
            owner=caller.name,
            name=name,
            size=size,
            state=VolumeState.CREATING,
            cipher=Cipher.NONE if key is None else Cipher.AES_256_XTS,
            key_arn=key,
            wrapped_key=None,
            context={} if key is None else new_context(ident, request.context),
            lineage=source.lineage if source is not None and shares else new_lineage_id(self._host.random(16)),
            head=1,
            snapshot=None if source is None else source.id,
            attach_generation=0,
            integrity=Integrity.NEW if source is None else source.integrity,
            authority=None,
            created=self._host.now(),
            reason="",
            tags=tags,
        )
        return Plan(volume, shares, note)

    async def create(self, caller: Caller, volume: Volume, *, preallocate: bool = False) -> Volume:
        """Make an empty volume as planned; returns it in state ``available``.

        ``preallocate`` gives it all its blocks. Raises NoSpace, before anything is made where that can be foreseen.
        """
        if not preallocate:
            await self._host.space.require()
            return await self._create(caller, volume, preallocate=False)
        async with self._preallocating:
            chunks = chunk_count(volume.size)
            await self._host.space.require(chunks * CHUNK + FIRST_ENTRY + entry_bytes(chunks))
            return await self._create(caller, volume, preallocate=True)

    async def _create(self, caller: Caller, volume: Volume, *, preallocate: bool) -> Volume:
        layer_uuid = new_uuid(self._host.random(16))
        async with self.lock(volume.id):

            def intend(t: Transaction) -> None:
                t.add_lineage(Lineage(volume.lineage, volume.account, SECTOR, volume.cipher))
                t.add_layer(
                    volume.lineage, layer_uuid, volume.id, volume.size, preallocated=volume.size if preallocate else 0
                )
                t.add_volume(volume)

            await self._catalogue.run(intend)
            try:
                blob = await self.wrap_new_key(caller, volume.id, volume.key_arn, volume.context)
                make = partial(self._files.create, preallocate=preallocate)
                await trio.to_thread.run_sync(make, volume, layer_uuid, volume.key_arn, blob)
                return await self.finish_create(volume, volume.key_arn, blob)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self.undo_create(volume)
                raise

    async def wrap_new_key(
        self, caller: Caller, resource: str, key: KeyArn | None, context: Mapping[str, str]
    ) -> bytes | None:
        """Have the broker make a data key for a new resource, and its anchor; returns the wrapped key."""
        blob: bytes | None = None
        if key is not None:
            blob, key = await self._broker.generate_wrapped_key(caller, key, DATA_KEY_BYTES, context)
        await self._broker.create_anchor(
            caller, resource, key=key, blob=blob, context=context if key is not None else None
        )
        return blob

    async def finish_create(self, volume: Volume, key: KeyArn | None, blob: bytes | None) -> Volume:
        """Commit a volume whose files are durable as ``available``."""

        def finish(t: Transaction) -> Volume:
            if key is not None and blob is not None:
                t.set_wrapped_key(volume.id, key, blob, volume.context)
            present = t.volume(volume.id)
            t.set_layer_state(volume.lineage, present.head, LayerState.HEAD)
            t.set_volume_state(volume.id, next_volume_state(volume.id, present.state, VolumeEvent.CREATED))
            return t.volume(volume.id)

        return await self._catalogue.run(finish)

    async def undo_create(self, volume: Volume) -> None:
        """Remove all traces of a volume that was not finished; what cannot be removed now is left to ``recover``."""
        try:
            await self._remove(volume)
        except KeyServiceUnavailable as exc:
            log.warning("%s is removed when the key service answers: %s", volume.id, exc.message)
            self._broker.afterwards(f"removing {volume.id}", partial(self._remove_rest, volume))
        except (EbsdError, OSError) as exc:
            log.warning("%s was not made, and its remains stay until the next start: %s", volume.id, exc)

    async def _remove_rest(self, volume: Volume) -> None:
        async with self.lock(volume.id), self._lineages.lock(volume.lineage):
            await self.remove_half_made(volume.id)

    # --- delete

    async def delete(self, caller: Caller, name_or_id: str, *, permanently: bool = False) -> bool:
        """Delete a volume that is not attached (EC2 DeleteVolume); its snapshots stay.

        Says whether it went into the recycle bin. ``permanently``: not there, or out of it; for administrators.
        """
        if permanently:
            check_permanently(caller)
        volume = await self._catalogue.run(lambda t: t.find_volume(caller, name_or_id, in_bin=permanently))
        return await self._delete(volume, permanently=permanently)

    async def purge(self, ident: VolumeId) -> None:
        """Delete a volume whose time in the recycle bin is over; nothing when it was taken out meanwhile."""
        volume = await self._catalogue.run(lambda t: t.volume(ident) if t.binned(ident) is not None else None)
        if volume is not None:
            await self._delete(volume, permanently=True, due=True)

    async def _delete(self, volume: Volume, *, permanently: bool, due: bool = False) -> bool:
        async with self.lock(volume.id), self._lineages.lock(volume.lineage):

            def intend(t: Transaction) -> Volume | None:
                found = t.volume(volume.id)
                binned = t.binned(found.id)
                if due and (binned is None or binned.leaves > self._host.now()):
                    return None
                if binned is not None and not permanently:
                    raise VolumeNotFound(volume=found.id)  # whoever came first put it there
                if found.attachment is not None:
                    raise VolumeInUse(volume=found.id, state=found.attachment.state.value)
                for job in t.active_jobs():
                    if job.destination == found.id:
                        raise _being_made(found, job)
                if not permanently and put_into_bin(t, found, self._host.now()):
                    return None
                t.set_volume_state(found.id, next_volume_state(found.id, found.state, VolumeEvent.DELETE))
                return found

            gone = await self._catalogue.run(intend)
            if gone is None:
                return not due
            try:
                await self._remove(gone)
            except KeyServiceUnavailable:
                self._broker.afterwards(f"removing {gone.id}", partial(self._remove_rest, gone))
                raise
        self._locks.pop(volume.id, None)
        return False

    async def _remove(self, volume: Volume) -> None:
        """Remove record, anchor and rows of a volume, then sweep its lineage, whose lock is held or unneeded."""
        await trio.to_thread.run_sync(self._files.remove, volume)
        await self._broker.delete_anchor(volume.id)

        def forget(t: Transaction) -> None:
            # Its head may still be ``creating``, which no sweep touches.
            t.set_layer_state(volume.lineage, t.volume(volume.id).head, LayerState.SEALED)
            t.begin_removing(volume.id)
            t.remove_volume(volume.id)

        await self._catalogue.run(forget)
        await self._lineages.sweep(volume.lineage)

    async def remove_unfinished(self, volume: Volume) -> None:
        """Remove a volume that a copy did not finish; raises when something cannot be removed."""
        await self._remove(volume)

    async def remove_half_made(self, ident: VolumeId) -> None:
        """Remove a volume that is neither made nor removed, and that no job fills; its locks are the caller's.

        Raises IncorrectState for a volume that is something else by now.
        """
        volume = await self._catalogue.run(lambda t: t.volume(ident))
        if volume.state not in (VolumeState.CREATING, VolumeState.DELETING):
            raise IncorrectState(reason=f"{ident} is {volume.state.value}")
        await self._remove(volume)

    async def recover(self) -> None:
        """Undo half-made volumes and finish half-deleted ones; called once at start, before any request."""

        def load(t: Transaction) -> tuple[list[Volume], set[str]]:
            return t.volumes(), {job.destination for job in t.active_jobs()}

        volumes, filling = await self._catalogue.run(load)
        for volume in volumes:
            if volume.state in (VolumeState.CREATING, VolumeState.DELETING) and volume.id not in filling:
                log.warning("%s was left %s; removing it", volume.id, volume.state.value)
                await self.undo_create(volume)

    # --- views

    async def describe(
        self,
        caller: Caller,
        names: Sequence[str] | None,
        filters: Sequence[Mapping[str, Any]],
        limit: int | None = None,
        token: str | None = None,
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Return volumes as EC2 describes them, and the token of what follows; an unknown name fails the whole call.

        Named ones come all at once (EC2 DescribeVolumes). Raises InvalidParameterValue for a limit, token or filter
        that cannot be.
        """
        page, chosen = parse_page(limit, token, looks_like_volume_id), parse_filters(filters, VOLUME_FILTERS)

        def load(t: Transaction) -> list[Volume]:
            if names is not None:
                return [t.find_volume(caller, name) for name in names]
            return t.volumes(None if caller.is_admin else caller.account, page.after, page.size + 1, in_bin=False)

        volumes = await self._catalogue.run(load)
        usages = await self._lineages.usages({volume.lineage for volume in volumes}, continued=page.after is not None)

        def views() -> tuple[list[dict[str, Any]], str | None]:
            mounts = read_mounts()

            def view(volume: Volume) -> dict[str, Any] | None:
                described = self._describe(volume, mounts, usages.get(volume.id))
                return described if passes(described, chosen) else None

            size = page.size if names is None else len(names)
            return taken(volumes, size, lambda volume: (volume.created, volume.id), view)

        found, following = await trio.to_thread.run_sync(views)
        if names is not None:
            await add_data_keys(self._broker, {volume.id: volume for volume in volumes}, found, "VolumeId")
        return found, following

    def _describe(self, volume: Volume, mounts: Sequence[Mount], usage: Usage | None) -> dict[str, Any]:
        return describe_volume(volume, self._host, mounts, usage=usage, integrity=volume.integrity.value)

    async def describe_one(self, volume: Volume) -> dict[str, Any]:
        """Return a volume that something was done to, without what it uses: that may take longer than what was done."""
        return self._describe(volume, await trio.to_thread.run_sync(read_mounts), None)

    # --- names and tags

    async def rename(self, caller: Caller, name_or_id: str, name: str) -> str:
        """Name a volume or snapshot anew; returns its id."""
        new = parse_name(name)

        def change(t: Transaction) -> str:
            found = find_resource(t, caller, name_or_id)
            t.give_name(found.account, new, found.id)
            return found.id

        found = await self._catalogue.run(lambda t: find_resource(t, caller, name_or_id))
        lock = self.lock(found.id) if isinstance(found, Volume) else self._lineages.lock(found.lineage)
        async with lock:  # whoever else replaces the record holds it, too
            ident = await self._catalogue.run(change)
            with trio.CancelScope(shield=True):
                try:
                    await trio.to_thread.run_sync(self._files.rename, found.id, new)
                except (EbsdError, OSError) as exc:
                    # The name is the catalog's business; the record only serves to rebuild that.
                    log.warning("the record of %s keeps its old name: %s", ident, exc)
        return ident

    async def identify(self, caller: Caller, name_or_id: str) -> tuple[str, str]:
        """Return (kind, id) of what the caller means; raises ResourceNotFound."""
        found = await self._catalogue.run(lambda t: find_resource(t, caller, name_or_id))
        return ("volume" if isinstance(found, Volume) else "snapshot"), found.id

    async def add_tags(self, caller: Caller, names: Sequence[str], tags: Mapping[str, str]) -> None:
        """Add or overwrite tags on all the resources, or on none (EC2 CreateTags)."""

        def change(t: Transaction) -> None:
            for name in names:
                found = find_resource(t, caller, name)
                t.set_tags(found.id, merged_tags(found.id, found.tags, tags))

        await self._catalogue.run(change)

    async def remove_tags(self, caller: Caller, names: Sequence[str], tags: Mapping[str, str | None]) -> None:
        """Remove tags; one given with a value only where it has that value (EC2 DeleteTags)."""

        def change(t: Transaction) -> None:
            for name in names:
                found = find_resource(t, caller, name)
                kept = {k: v for k, v in found.tags.items() if k not in tags or tags[k] not in (None, v)}
                t.set_tags(found.id, kept)

        await self._catalogue.run(change)


async def add_data_keys(
    broker: Broker, resources: Mapping[Any, Volume | Snapshot], described: Sequence[dict[str, Any]], member: str
) -> None:
    """Add to each description how old the data key is, and what wraps it; ``member`` names its id.

    A key service that does not tell, or not soon, is no error: whatever needs the key shows that, and a description
    does not.
    """
    with trio.move_on_after(DESCRIPTION_SECONDS):
        for document in described:
            resource = resources[document[member]]
            if resource.wrapped_key is not None:
                with contextlib.suppress(EbsdError):
                    document.update(await broker.describe_data_key(resource.id, resource.wrapped_key))


def _being_made(volume: Volume, job: Job) -> IncorrectState:
    error = IncorrectState(reason=f"Volume {volume.id} is being made by {job.id}")
    error.hint = f"Cancel the job, and the volume goes with it: ebsctl job cancel {job.id}"
    return error


def _requested_size(request: CreateRequest, source: Snapshot | None) -> int:
    if request.size is not None and request.size_gib is not None:
        raise InvalidParameterCombination(reason="Size and SizeBytes cannot be given together")
    if request.size is not None:
        size = check_volume_size(request.size)
    elif request.size_gib is not None:
        size = check_volume_size(request.size_gib * GIB)
    elif source is not None:
        return source.size
    else:
        raise MissingParameter(parameter="Size")
    if source is not None and size < source.size:
        raise InvalidParameterValue(
            value=size,
            parameter="Size",
            reason=f"it is smaller than snapshot {source.id}, expect size >= {source.size} bytes",
        )
    return size


def _is_own(caller: Caller, source: Snapshot) -> bool:
    return source.account == caller.account


def new_context(resource: str, pairs: Mapping[str, str]) -> dict[str, str]:
    """Return the encryption context of a new resource's wrapped key: its id, its format, and the user's pairs."""
    return {**pairs, "aws:ebs:id": resource, "ebsd:format": FORMAT_CONTEXT}


def new_lineage_id(random: bytes) -> LineageId:
    """Return the id of a new lineage from 16 random bytes."""
    return LineageId(format_uuid(new_uuid(random)))


def new_uuid(random: bytes) -> bytes:
    """Return 16 random bytes marked as a version 4 UUID (RFC 9562 section 5.4)."""
    raw = bytearray(random)
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    return bytes(raw)


def find_resource(t: Transaction, caller: Caller, name_or_id: str) -> Volume | Snapshot:
    """Return the volume or snapshot a caller means; raises ResourceNotFound, or the error of an id's own kind."""
    if looks_like_volume_id(name_or_id):
        return t.find_volume(caller, name_or_id)
    if looks_like_snapshot_id(name_or_id):
        return t.find_snapshot(caller, name_or_id)
    resource = t.resource_named(caller.account, name_or_id)
    if resource is None:
        raise ResourceNotFound(resource=name_or_id)
    return t.find_volume(caller, resource) if looks_like_volume_id(resource) else t.find_snapshot(caller, resource)
