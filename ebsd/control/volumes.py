"""Volumes: create, delete, describe, rename, tag.

Create and delete write their intent into the catalog first, so that what a crash interrupts is undone (create)
or finished (delete) by ``recover`` at the next start.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from ebsd.control.broker import Broker, KeyDescription
from ebsd.control.catalogue import Catalogue
from ebsd.control.describe import describe_volume, matches
from ebsd.control.host import Host
from ebsd.control.mounts import read_mounts
from ebsd.control.volume_files import VolumeFiles
from ebsd.domain.errors import (
    EbsdError,
    InvalidKeyUsage,
    InvalidParameterCombination,
    KeyDisabled,
    KmsInvalidState,
    MissingParameter,
    NotSupported,
    VolumeInUse,
)
from ebsd.domain.ids import (
    ID_RANDOM_BYTES,
    MANAGED_ALIAS,
    KeyArn,
    LineageId,
    VolumeId,
    format_uuid,
    new_id,
    parse_name,
)
from ebsd.domain.model import Caller, Cipher, Integrity, LayerState, Lineage, Volume
from ebsd.domain.outcomes import Outcome, Source, decide_create_volume
from ebsd.domain.states import VolumeEvent, VolumeState, next_volume_state
from ebsd.domain.tags import merged_tags
from ebsd.domain.units import GIB, SECTOR, check_volume_size
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)

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


class Volumes:
    """Use cases on volumes that are not attached, and the views on all of them."""

    def __init__(self, host: Host, catalogue: Catalogue, broker: Broker, files: VolumeFiles) -> None:
        self._host = host
        self._catalogue = catalogue
        self._broker = broker
        self._files = files
        self._locks: dict[VolumeId, trio.Lock] = {}

    def lock(self, volume: VolumeId) -> trio.Lock:
        """Return the lock that serialises everything done to one volume: create, attach, detach, delete."""
        return self._locks.setdefault(volume, trio.Lock())

    # --- create

    async def create(self, caller: Caller, request: CreateRequest) -> tuple[Volume, str | None]:
        """Make a volume; returns it in state ``available`` and a note for the caller.

        Everything is judged before anything is made. Unlike EBS, which lets a volume with an unusable key
        vanish afterwards, the key is checked here and its error raised.
        """
        size = _requested_size(request)
        ident = VolumeId(new_id("vol", self._host.random(ID_RANDOM_BYTES)))
        name = parse_name(request.name) if request.name is not None else ident
        tags = merged_tags(ident, {}, request.tags)
        settings = await self._broker.account(caller)
        decision = decide_create_volume(
            encrypted=request.encrypted,
            key_named=request.key is not None,
            source=Source.NONE,
            encryption_by_default=settings.encryption_by_default,
            allow_unencrypted=self._host.allow_unencrypted,
        )
        note = None
        if decision.overruled:
            note = "The volume is encrypted: encryption by default is on, and Encrypted=false does not overrule it."
        key: KeyArn | None = None
        if decision.outcome is Outcome.UNENCRYPTED:
            if request.context:
                raise InvalidParameterCombination(reason="An unencrypted volume has no encryption context")
        else:
            wanted = request.key if decision.outcome is Outcome.NAMED_KEY else settings.default_key
            key = _usable_key(await self._broker.describe_key(caller, wanted or MANAGED_ALIAS))
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
            context={} if key is None else {**request.context, "aws:ebs:id": ident, "ebsd:format": FORMAT_CONTEXT},
            lineage=LineageId(format_uuid(_uuid4(self._host.random(16)))),
            head=1,
            snapshot=None,
            attach_generation=0,
            integrity=Integrity.NEW,
            created=self._host.now(),
            reason="",
            tags=tags,
        )
        async with self.lock(ident):
            return await self._make(caller, volume), note

    async def _make(self, caller: Caller, volume: Volume) -> Volume:
        layer_uuid = _uuid4(self._host.random(16))

        def intend(t: Transaction) -> None:
            t.add_lineage(Lineage(volume.lineage, volume.account, SECTOR, volume.cipher))
            t.add_layer(volume.lineage, layer_uuid, volume.id, volume.size)
            t.add_volume(volume)

        await self._catalogue.run(intend)
        try:
            blob: bytes | None = None
            key = volume.key_arn
            if key is not None:
                blob, key = await self._broker.generate_wrapped_key(caller, key, DATA_KEY_BYTES, volume.context)
            await self._broker.create_anchor(
                caller, volume.id, key=key, blob=blob, context=volume.context if key is not None else None
            )
            await trio.to_thread.run_sync(self._files.create, volume, layer_uuid, key, blob)

            def finish(t: Transaction) -> Volume:
                if key is not None and blob is not None:
                    t.set_wrapped_key(volume.id, key, blob, volume.context)
                t.set_layer_state(volume.lineage, volume.head, LayerState.HEAD)
                t.set_volume_state(volume.id, next_volume_state(volume.id, VolumeState.CREATING, VolumeEvent.CREATED))
                return t.volume(volume.id)

            return await self._catalogue.run(finish)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._undo_create(volume)
            raise

    async def _undo_create(self, volume: Volume) -> None:
        """Remove all traces of a volume that was not finished; what cannot be removed now is left to ``recover``."""
        try:
            await self._remove(volume)
        except EbsdError as exc:
            log.warning("%s was not made, and its remains stay until the next start: %s", volume.id, exc)

    # --- delete

    async def delete(self, caller: Caller, name_or_id: str) -> None:
        """Delete a volume that is not attached (EC2 DeleteVolume)."""
        volume = await self._catalogue.run(lambda t: t.find_volume(caller, name_or_id))
        async with self.lock(volume.id):

            def intend(t: Transaction) -> Volume:
                found = t.volume(volume.id)
                if found.attachment is not None:
                    raise VolumeInUse(volume=found.id, state=found.attachment.state.value)
                t.set_volume_state(found.id, next_volume_state(found.id, found.state, VolumeEvent.DELETE))
                return found

            await self._remove(await self._catalogue.run(intend))
        self._locks.pop(volume.id, None)

    async def _remove(self, volume: Volume) -> None:
        # Data first, anchor and rows last: as long as anything is there, the intent to remove it is, too.
        await trio.to_thread.run_sync(self._files.remove, volume)
        await self._broker.delete_anchor(volume.id)

        def forget(t: Transaction) -> None:
            t.remove_volume(volume.id)
            t.remove_lineage(volume.lineage)

        await self._catalogue.run(forget)

    async def recover(self) -> None:
        """Undo half-made volumes and finish half-deleted ones; called once at start, before any request."""
        for volume in await self._catalogue.run(lambda t: t.volumes()):
            if volume.state in (VolumeState.CREATING, VolumeState.DELETING):
                log.warning("%s was left %s; removing it", volume.id, volume.state.value)
                await self._undo_create(volume)

    # --- views

    async def describe(
        self, caller: Caller, names: Sequence[str] | None, filters: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return volumes as EC2 describes them; an unknown name fails the whole call (EC2 DescribeVolumes)."""

        def load(t: Transaction) -> list[Volume]:
            if names is not None:
                return [t.find_volume(caller, name) for name in names]
            return t.volumes(None if caller.is_admin else caller.account)

        volumes = await self._catalogue.run(load)
        described = await trio.to_thread.run_sync(self._describe_all, volumes)
        return [volume for volume in described if matches(volume, filters)]

    def _describe_all(self, volumes: Sequence[Volume]) -> list[dict[str, Any]]:
        mounts = read_mounts()
        return [
            describe_volume(v, self._host, mounts, allocated=self._files.allocated(v), integrity=v.integrity.value)
            for v in volumes
        ]

    async def describe_one(self, volume: Volume) -> dict[str, Any]:
        return (await trio.to_thread.run_sync(self._describe_all, [volume]))[0]

    # --- names and tags

    async def rename(self, caller: Caller, name_or_id: str, name: str) -> VolumeId:
        new = parse_name(name)

        def change(t: Transaction) -> VolumeId:
            volume = t.find_volume(caller, name_or_id)
            t.give_name(volume.account, new, volume.id)
            return volume.id

        return await self._catalogue.run(change)

    async def identify(self, caller: Caller, name_or_id: str) -> tuple[str, str]:
        """Return (kind, id) of what the caller means."""
        return "volume", (await self._catalogue.run(lambda t: t.find_volume(caller, name_or_id))).id

    async def add_tags(self, caller: Caller, names: Sequence[str], tags: Mapping[str, str]) -> None:
        """Add or overwrite tags on all the resources, or on none (EC2 CreateTags)."""

        def change(t: Transaction) -> None:
            for name in names:
                volume = t.find_volume(caller, name)
                t.set_tags(volume.id, merged_tags(volume.id, volume.tags, tags))

        await self._catalogue.run(change)

    async def remove_tags(self, caller: Caller, names: Sequence[str], tags: Mapping[str, str | None]) -> None:
        """Remove tags; one given with a value only where it has that value (EC2 DeleteTags)."""

        def change(t: Transaction) -> None:
            for name in names:
                volume = t.find_volume(caller, name)
                kept = {k: v for k, v in volume.tags.items() if k not in tags or tags[k] not in (None, v)}
                t.set_tags(volume.id, kept)

        await self._catalogue.run(change)


def _requested_size(request: CreateRequest) -> int:
    if request.snapshot is not None:
        raise NotSupported(what="A volume from a snapshot", remedy="")
    if request.size is not None and request.size_gib is not None:
        raise InvalidParameterCombination(reason="Size and SizeBytes cannot be given together")
    if request.size is not None:
        return check_volume_size(request.size)
    if request.size_gib is not None:
        return check_volume_size(request.size_gib * GIB)
    raise MissingParameter(parameter="Size")


def _usable_key(key: KeyDescription) -> KeyArn:
    """Return the ARN when a volume can be encrypted under the key, else raise KMS's error for it."""
    if key.spec != "SYMMETRIC_DEFAULT" or key.usage != "ENCRYPT_DECRYPT":
        raise InvalidKeyUsage(key=key.arn, usage=key.usage, operation="EBS encryption")
    if key.state == "Disabled":
        raise KeyDisabled(key=key.arn)
    if key.state != "Enabled":
        raise KmsInvalidState(key=key.arn, state={"PendingDeletion": "pending deletion"}.get(key.state, key.state))
    return key.arn


def _uuid4(random: bytes) -> bytes:
    """Return 16 random bytes marked as a version 4 UUID (RFC 9562 section 5.4)."""
    raw = bytearray(random)
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    return bytes(raw)
