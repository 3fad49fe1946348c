"""Verification: read all of a volume or snapshot in a process of its own, and remember what was found.

0. It is a job: it goes on when the command that asked for it is gone, and when ebsd is started again, from where it
   was (a snapshot) or from the start (a volume, which may have changed). One that finds damage has failed.
1. A volume must not be attached: what its process writes meanwhile is in no map on the disk. A snapshot of it can be.
2. With the data key, unless that is not wanted or the key service does not give it; then the report says so.
3. While a lineage is read, nothing of it is punched or removed; what was deleted meanwhile is given back afterwards.
4. What it found is kept, and shown with the resource.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from ebsd.control.catalogue import Catalogue
from ebsd.control.filling import claim_members
from ebsd.control.host import Host
from ebsd.control.job_work import START_DEADLINE, JobWork, Sessions, Worker
from ebsd.control.jobs import Jobs
from ebsd.control.leaf_roots import LeafRoots
from ebsd.control.lineages import Lineages
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.volume_link import close_all
from ebsd.control.volumes import Volumes, find_resource
from ebsd.domain.errors import (
    DamageFound,
    EbsdError,
    ExitStatus,
    IncorrectState,
    IncorrectVolumeState,
    IntegrityFailure,
    RemoteError,
    SnapshotDamaged,
    SnapshotPending,
)
from ebsd.domain.ids import (
    ID_RANDOM_BYTES,
    JobId,
    SnapshotId,
    VolumeId,
    looks_like_volume_id,
    new_id,
    parse_resource_id,
)
from ebsd.domain.jobs import new_job
from ebsd.domain.model import Caller, Cipher, Job, Snapshot, Verification, Volume
from ebsd.domain.states import JobKind, SnapshotState, VolumeState
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)


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

    job: JobId
    done: int
    total: int
    report: Report | None = None


class Verifications(JobWork):
    """Starts verifications, which are jobs of the kind verify, and keeps what they find."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        volumes: Volumes,
        snapshot_files: SnapshotFiles,
        lineages: Lineages,
        roots: LeafRoots,
        jobs: Jobs,
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._volumes = volumes
        self._snapshot_files = snapshot_files
        self._lineages = lineages
        self._roots = roots
        self._jobs = jobs
        self._refusals: dict[JobId, str] = {}
        """Why the worker of a job has no key."""
        self._followed: set[JobId] = set()
        """Jobs of which somebody wants the report."""
        self._reports: dict[JobId, Report] = {}

    async def verify(
        self, caller: Caller, name_or_id: str, *, scrub: bool, rate: int | None = None
    ) -> AsyncGenerator[Step, None]:
        """Verify a volume that is not attached, or a snapshot; ``scrub``: without a key, although there may be one.

        Raises IncorrectState and its kind, SnapshotPending; IntegrityFailure, RecordTooOld and the like when its
        record, table, map or root is refused, which is kept as damage.
        """
        found = await self._catalogue.run(lambda t: find_resource(t, caller, name_or_id))
        job = new_job(
            JobId(new_id("job", self._host.random(ID_RANDOM_BYTES))),
            JobKind.VERIFY,
            account=caller.account,
            owner=caller.name,
            source=found.id,
            destination="",
            started=self._host.now(),
            rate=rate,
            parameters={"Scrub": scrub},
        )

        def check(t: Transaction) -> None:
            if any(other.kind is JobKind.VERIFY and other.source == found.id for other in t.active_jobs()):
                raise IncorrectState(reason=f"{found.id} is being verified already")
            _present(t, found.id)

        self._followed.add(job.id)
        try:
            await self._jobs.start(job, check)
            async for view in self._jobs.watch(caller, job.id):
                if view.job.is_active:
                    yield Step(job.id, view.job.done, view.job.total)
            report = self._reports.get(job.id)
        finally:
            self._followed.discard(job.id)
            self._reports.pop(job.id, None)
        if report is None:
            raise _failure_of(view.job)
        yield Step(job.id, report.size, report.size, report)

    # --- JobWork

    @asynccontextmanager
    async def around(self, job: Job) -> AsyncIterator[None]:
        found = await self._catalogue.run(lambda t: _present(t, job.source))
        try:
            with self._lineages.reading(found.lineage):
                yield
        finally:
            with trio.CancelScope(shield=True):
                await self._lineages.catch_up(found.lineage)

    async def hand_over(self, job: Job, worker: Worker, sessions: Sessions, given: Sequence[int], rate: int) -> None:
        try:
            await self._begin(job, worker, sessions, rate)
        except EbsdError as exc:
            if exc.exit_status is ExitStatus.INTEGRITY:
                kept = Verification(self._host.now(), "integrity", 0, 0, 1)
                await self._catalogue.run(lambda t: _keep(t, job.source, kept))
            raise

    async def _begin(self, job: Job, worker: Worker, sessions: Sessions, rate: int) -> None:
        """Open what is verified and hand it over; falls back to no key when the key service gives none."""
        found = await self._catalogue.run(lambda t: _present(t, job.source))
        if isinstance(found, Volume):
            async with self._volumes.lock(found.id):
                volume = await self._catalogue.run(lambda t: _present(t, job.source))
                await self._start(job, volume, worker, sessions, rate)
        else:
            async with self._lineages.lock(found.lineage):
                snapshot = await self._catalogue.run(lambda t: _present(t, job.source))
                await self._start(job, snapshot, worker, sessions, rate)

    async def _start(
        self, job: Job, resource: Volume | Snapshot, worker: Worker, sessions: Sessions, rate: int
    ) -> None:
        session: int | None = None
        refusal = ""
        if job.parameters["Scrub"]:
            refusal = "no key was used, as was asked for"
        elif resource.cipher is Cipher.NONE:
            refusal = "it is not encrypted, so nothing is signed with a key"
        elif resource.key_arn is None:
            raise IntegrityFailure(resource=resource.id, reason="the catalog has no key of it, but it is encrypted")
        else:
            try:
                session = await sessions.open(resource, "verify")
            except EbsdError as exc:
                if exc.exit_status is not ExitStatus.KEY_UNAVAILABLE:
                    raise
                refusal = _no_key(exc)
        try:
            await self._hand_over(job, resource, worker, session, rate)
        except RemoteError as exc:
            if session is None or exc.exit_status is not ExitStatus.KEY_UNAVAILABLE:
                raise
            refusal = _no_key(exc)
            await self._hand_over(job, resource, worker, None, rate)
        self._refusals[job.id] = refusal

    async def _hand_over(
        self, job: Job, resource: Volume | Snapshot, worker: Worker, session: int | None, rate: int
    ) -> None:
        fds = [] if session is None else [session]
        try:
            record = await trio.to_thread.run_sync(self._snapshot_files.record_bytes, resource.id)
            fds += await trio.to_thread.run_sync(self._snapshot_files.open_for_reading, resource.id, resource.lineage)
            is_snapshot = isinstance(resource, Snapshot)
            params = {
                "Resource": {
                    **claim_members(resource),
                    "Head": resource.head if isinstance(resource, Volume) else 0,
                    "AuthorityIds": [resource.authority] if resource.authority else [],
                },
                "Record": base64.b64encode(record).decode(),
                "WithKey": session is not None,
                # A volume may have been attached since: its map is not the one that was read.
                "DoneThrough": job.done_through if is_snapshot else 0,
                "Checkpoint": dict(job.checkpoint) if is_snapshot else {},
                "Rate": rate,
            }
            await worker.request("start", params, fds, deadline=START_DEADLINE)
        finally:
            close_all(fds)

    async def conclude(self, job: Job, answer: Mapping[str, Any]) -> Callable[[Transaction], None]:
        """``answer``: what ``verifier.Verifier._report`` gives. Raises DamageFound, with the report kept."""
        found = await self._catalogue.run(lambda t: _present(t, job.source))
        report = await self._note(found, answer, self._refusals.pop(job.id, ""))
        if job.id in self._followed:
            self._reports[job.id] = report
        if report.damaged_chunks or report.damage:
            raise DamageFound(resource=found.id, chunks=report.damaged_chunks, files=report.damaged_files)
        return lambda t: None

    async def remove(self, job: Job) -> None:
        self._refusals.pop(job.id, None)

    async def _note(self, found: Volume | Snapshot, answer: Mapping[str, Any], refusal: str) -> Report:
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
        await self._catalogue.run(lambda t: _keep(t, found.id, kept))
        if answer["Record"] is not None and isinstance(found, Snapshot):
            await self._roots.store(found.id, answer["Generation"], base64.b64decode(answer["Record"]))
        if kept.is_damaged:
            log.error("%s is damaged: %d chunks, %d files", found.id, kept.damaged_chunks, kept.damaged_files)
        return report


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


def _keep(t: Transaction, ident: str, found: Verification) -> None:
    resource = parse_resource_id(ident)
    if t.name_of(resource):  # else deleted meanwhile
        t.put_verification(resource, found)


def _present(t: Transaction, ident: str) -> Volume | Snapshot:
    """Return what is verified, when that is possible now."""
    resource = parse_resource_id(ident)
    if looks_like_volume_id(ident):
        return _verifiable(t.volume(VolumeId(resource)))
    return _completed(t.snapshot(SnapshotId(resource)))


def _failure_of(job: Job) -> EbsdError:
    failure = job.error or {}
    return RemoteError(failure.get("Code", "InternalFailure"), failure.get("Message", ""), failure.get("Hint", ""))


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
