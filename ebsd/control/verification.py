"""Verification: read all of a volume or snapshot in a process of its own, and remember what was found.

1. A volume must not be attached: what its process writes meanwhile is in no map on the disk. A snapshot of it can be.
2. With the data key, unless that is not wanted or the key service does not give it; then the report says so.
3. While a lineage is read, nothing of it is punched or removed; what was deleted meanwhile is given back afterwards.
4. It goes on when the command that asked for it is gone: what it found is kept, and shown with the resource.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.host import Host
from ebsd.control.leaf_roots import LeafRoots
from ebsd.control.lineages import Lineages
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.volume_link import close_all
from ebsd.control.volumes import Volumes, find_resource
from ebsd.domain.errors import (
    EbsdError,
    ExitStatus,
    IncorrectState,
    IncorrectVolumeState,
    IntegrityFailure,
    RemoteError,
    SnapshotDamaged,
    SnapshotPending,
)
from ebsd.domain.ids import KeyArn, SnapshotId, VolumeId, uid_of_account
from ebsd.domain.model import Caller, Cipher, Snapshot, Verification, Volume
from ebsd.domain.states import SnapshotState, VolumeState
from ebsd.ipc.process import start_with_channel
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)

MODULE: Final = "ebsd.volume.verifier"
START_DEADLINE: Final = 120.0
POLL_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found. Bytes and chunks count what the map says is stored."""

    resource: str
    kind: str
    """authenticity or integrity."""
    note: str
    """Why it is not authenticity, and what else a reader must know; may be empty."""
    chunks: int
    size: int
    without_leaf: int
    """Chunks that were only read: nothing says what they were."""
    hashed_now: int
    """Chunks that were hashed just before they were compared: what happened to them earlier cannot be seen."""
    damaged_chunks: int
    damage: tuple[dict[str, Any], ...]
    """Members of io.ebsd.Control's Damage."""
    complete: bool
    """Whether all damage is listed."""
    time: str

    @property
    def damaged_files(self) -> int:
        return sum(1 for damage in self.damage if "Chunk" not in damage)


@dataclass(frozen=True, slots=True)
class Step:
    """How far a verification is, in bytes; the last one has the report."""

    done: int
    total: int
    report: Report | None = None


@dataclass(slots=True)
class _Keys:
    """What was asked of the key service."""

    session: int | None = None
    grant: str | None = None
    refusal: str = ""
    fds: list[int] = field(default_factory=list)


class Verifications:
    """Starts verifiers, and keeps what they find."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        broker: Broker,
        volumes: Volumes,
        snapshot_files: SnapshotFiles,
        lineages: Lineages,
        roots: LeafRoots,
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._broker = broker
        self._volumes = volumes
        self._snapshot_files = snapshot_files
        self._lineages = lineages
        self._roots = roots
        self._running: set[str] = set()

    async def verify(self, caller: Caller, name_or_id: str, *, scrub: bool) -> AsyncGenerator[Step, None]:
        """Verify a volume that is not attached, or a snapshot; ``scrub``: without a key, although there may be one.

        Raises IncorrectState and its kind, SnapshotPending; IntegrityFailure, RecordTooOld and the like when its
        record, table, map or root is refused, which is kept as damage.
        """
        found = await self._catalogue.run(lambda t: find_resource(t, caller, name_or_id))
        if found.id in self._running:
            raise IncorrectState(reason=f"{found.id} is being verified already")
        self._running.add(found.id)
        try:
            with self._lineages.reading(found.lineage):
                async with aclosing(self._verify(found, scrub)) as steps:
                    async for step in steps:
                        yield step
        finally:
            self._running.discard(found.id)
            with trio.CancelScope(shield=True):
                await self._lineages.catch_up(found.lineage)

    async def _verify(self, found: Volume | Snapshot, scrub: bool) -> AsyncGenerator[Step, None]:
        child, channel = start_with_channel(MODULE)
        keys = _Keys()
        try:
            try:
                await self._begin(found, channel, keys, scrub)
                while True:
                    progress = (await channel.request("progress", {}, deadline=60.0)).message
                    if progress["Ended"]:
                        break
                    yield Step(progress["Done"], progress["Total"])
                    await trio.sleep(POLL_SECONDS)
                answer = (await channel.request("result", {}, deadline=60.0)).message
            except EbsdError as exc:
                if exc.exit_status is ExitStatus.INTEGRITY:
                    await self._keep(found.id, Verification(self._host.now(), "integrity", 0, 0, 1))
                raise
        finally:
            with trio.CancelScope(shield=True):
                child.kill()
                await child.wait()
                channel.close()
                await self._retire(found, keys)
        report = await self._note(found, answer, keys.refusal)
        yield Step(report.size, report.size, report)

    async def _begin(self, found: Volume | Snapshot, channel: Any, keys: _Keys, scrub: bool) -> None:
        """Open what is verified and hand it over; falls back to no key when the key service gives none."""
        if isinstance(found, Volume):
            async with self._volumes.lock(found.id):
                volume = await self._catalogue.run(lambda t: _verifiable(t.volume(found.id)))
                await self._start(volume, channel, keys, scrub)
        else:
            async with self._lineages.lock(found.lineage):
                snapshot = await self._catalogue.run(lambda t: _completed(t.snapshot(found.id)))
                await self._start(snapshot, channel, keys, scrub)

    async def _start(self, resource: Volume | Snapshot, channel: Any, keys: _Keys, scrub: bool) -> None:
        if scrub:
            keys.refusal = "no key was used, as was asked for"
        elif resource.cipher is Cipher.NONE:
            keys.refusal = "it is not encrypted, so nothing is signed with a key"
        else:
            await self._open_session(resource, keys)
        try:
            await self._hand_over(resource, channel, keys)
        except RemoteError as exc:
            if keys.session is None or exc.exit_status is not ExitStatus.KEY_UNAVAILABLE:
                raise
            keys.session, keys.refusal = None, _no_key(exc)
            await self._hand_over(resource, channel, keys)

    async def _open_session(self, resource: Volume | Snapshot, keys: _Keys) -> None:
        key = resource.key_arn
        if key is None:
            raise IntegrityFailure(resource=resource.id, reason="the catalog has no key of it, but it is encrypted")
        wrapped = (await trio.to_thread.run_sync(self._snapshot_files.record_of, resource.id)).wrapped_key
        if wrapped is None:
            raise IntegrityFailure(resource=resource.id, reason="its record has no wrapped key, but it is encrypted")
        owner = Caller(uid_of_account(resource.account), resource.owner, resource.account, is_admin=False)
        try:
            name = f"verify-{resource.id}"
            keys.grant = await self._broker.create_grant(owner, key, wrapped.context, name)
            keys.session = await self._broker.open_session(
                resource.id, key=key, grant=keys.grant, blob=wrapped.blob, context=wrapped.context
            )
        except EbsdError as exc:
            if exc.exit_status is not ExitStatus.KEY_UNAVAILABLE:
                raise
            keys.refusal = _no_key(exc)

    async def _hand_over(self, resource: Volume | Snapshot, channel: Any, keys: _Keys) -> None:
        fds = [] if keys.session is None else [keys.session]
        try:
            record = await trio.to_thread.run_sync(self._snapshot_files.record_bytes, resource.id)
            fds += await trio.to_thread.run_sync(self._snapshot_files.open_for_reading, resource.id, resource.lineage)
            params = {
                "Resource": {
                    "ResourceId": resource.id,
                    "Owner": resource.account,
                    "Lineage": resource.lineage,
                    "Size": resource.size,
                    "Cipher": int(resource.cipher),
                    "KeyArn": resource.key_arn,
                    "Head": resource.head if isinstance(resource, Volume) else 0,
                    "AuthorityIds": [resource.authority] if resource.authority else [],
                },
                "Record": base64.b64encode(record).decode(),
                "WithKey": keys.session is not None,
            }
            await channel.request("start", params, fds, deadline=START_DEADLINE)
        finally:
            close_all(fds)

    async def _retire(self, found: Volume | Snapshot, keys: _Keys) -> None:
        if keys.grant is None or found.key_arn is None:
            return
        try:
            await self._broker.retire_grant(KeyArn(found.key_arn), keys.grant)
        except EbsdError as exc:
            log.warning("a grant of the verification of %s could not be retired: %s", found.id, exc)

    async def _note(self, found: Volume | Snapshot, answer: dict[str, Any], refusal: str) -> Report:
        report = Report(
            resource=found.id,
            kind=answer["Kind"],
            note=refusal or answer["Why"],
            chunks=answer["Chunks"],
            size=answer["Bytes"],
            without_leaf=answer["WithoutLeaf"],
            hashed_now=answer["HashedNow"],
            damaged_chunks=answer["DamagedChunks"],
            damage=tuple(answer["Damage"]),
            complete=answer["Complete"],
            time=self._host.now(),
        )
        kept = Verification(report.time, report.kind, report.chunks, report.damaged_chunks, report.damaged_files)
        await self._keep(found.id, kept)
        if answer["Record"] is not None and isinstance(found, Snapshot):
            await self._roots.store(found.id, answer["Generation"], base64.b64decode(answer["Record"]))
        if kept.is_damaged:
            log.error("%s is damaged: %d chunks, %d files", found.id, kept.damaged_chunks, kept.damaged_files)
        return report

    async def _keep(self, ident: VolumeId | SnapshotId, found: Verification) -> None:
        def keep(t: Transaction) -> None:
            if t.name_of(ident):  # else deleted meanwhile
                t.put_verification(ident, found)

        await self._catalogue.run(keep)


def describe_verification_report(report: Report) -> dict[str, Any]:
    """Return the VerificationReport of io.ebsd.Control."""
    described: dict[str, Any] = {
        "ResourceId": report.resource,
        "Kind": report.kind,
        "Time": report.time,
        "Chunks": report.chunks,
        "Bytes": report.size,
        "WithoutLeaf": report.without_leaf,
        "HashedNow": report.hashed_now,
        "DamagedChunks": report.damaged_chunks,
        "Damage": list(report.damage),
        "Complete": report.complete,
    }
    return {**described, "Note": report.note} if report.note else described


def refuse_damaged(snapshot: Snapshot) -> None:
    """Raise SnapshotDamaged for a snapshot whose last verification found damage."""
    found = snapshot.verification
    if found is not None and found.is_damaged:
        raise SnapshotDamaged(snapshot=snapshot.id, chunks=found.damaged_chunks, files=found.damaged_files)


def _verifiable(volume: Volume) -> Volume:
    if volume.attachment is not None and volume.state is not VolumeState.ERROR:
        error = IncorrectState(reason=f"Volume {volume.id} is attached, so it cannot be verified")
        error.hint = (
            f"Verify a snapshot of it (ebsctl snapshot {volume.id}, ebsctl verify SNAPSHOT), or detach it first."
        )
        raise error
    if volume.state is not VolumeState.AVAILABLE:
        raise IncorrectVolumeState(volume=volume.id, state=volume.state.value)
    return volume


def _completed(snapshot: Snapshot) -> Snapshot:
    if snapshot.state is not SnapshotState.COMPLETED:
        raise SnapshotPending(snapshot=snapshot.id, state=snapshot.state.value)
    return snapshot


def _no_key(error: EbsdError) -> str:
    return f"its key could not be used ({error.message.removesuffix('.')})"
