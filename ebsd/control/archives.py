"""Archives of snapshots: export, import, show, verify.

1. Before anything is made, a process of its own has read the header and, for an import, opened it with the archive's
   key, on behalf of the user: who may not use the key, and a host that does not have it, is refused with nothing done.
2. A file that holds a part of the archive that is asked for is continued; so is an import that was interrupted, when
   its user brings the same archive again.
"""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import trio

from ebsd.control.archive_jobs import ArchiveImports, open_archive_session
from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.encryption import Encryption, usable_key
from ebsd.control.host import Host
from ebsd.control.job_work import Worker, close_given
from ebsd.control.jobs import Jobs
from ebsd.control.verification import refuse_damaged
from ebsd.control.volumes import DATA_KEY_BYTES, new_context, new_lineage_id, new_uuid
from ebsd.domain.admission import Making
from ebsd.domain.errors import (
    ArchiveDamaged,
    ArchiveKeyUnavailable,
    ArchiveNeedsBase,
    ArchiveOfAnother,
    EbsdError,
    ExitStatus,
    IncorrectState,
    InvalidParameterCombination,
    KeyServiceUnavailable,
    RemoteError,
    SnapshotPending,
    UnsupportedFormat,
)
from ebsd.domain.ids import (
    COPY_SOURCE,
    ID_RANDOM_BYTES,
    JobId,
    KeyArn,
    SnapshotId,
    format_uuid,
    new_id,
    parse_name,
)
from ebsd.domain.jobs import new_job
from ebsd.domain.model import Caller, Cipher, Integrity, Job, Snapshot
from ebsd.domain.outcomes import decide_import_archive
from ebsd.domain.states import JobKind, JobState, SnapshotState
from ebsd.domain.tags import merged_tags
from ebsd.store.archive import archive_context
from ebsd.store.catalog import Transaction

INSPECTOR: Final = "ebsd.volume.archive_inspector"
OPEN_DEADLINE: Final = 60.0
"""For the header of an archive, which may come through a pipe."""
POLL_SECONDS: Final = 0.2

_UNUSABLE: Final = frozenset((ExitStatus.KEY_UNAVAILABLE, ExitStatus.NOT_FOUND, ExitStatus.DENIED))


@dataclass(frozen=True, slots=True)
class ExportRequest:
    snapshot: str
    since: str | None
    key: str | None
    rate: int | None


@dataclass(frozen=True, slots=True)
class ImportRequest:
    name: str
    onto: str | None
    key: str | None
    description: str | None
    tags: Mapping[str, str]
    rate: int | None


@dataclass(frozen=True, slots=True)
class Started:
    """A job over an archive."""

    job: JobId
    archive: str
    key: KeyArn
    """That the archive is under."""
    snapshot: SnapshotId
    """What is exported, or made."""
    resumed: bool


@dataclass(frozen=True, slots=True)
class Check:
    """How far a verification is, and at its end what it says."""

    done: int
    ended: bool
    authentic: bool
    note: str
    digest: str


class Archives:
    """Use cases on archives; every descriptor that is given is the use case's to close."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        broker: Broker,
        encryption: Encryption,
        jobs: Jobs,
        imports: ArchiveImports,
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._broker = broker
        self._encryption = encryption
        self._jobs = jobs
        self._imports = imports

    # --- export

    async def export(self, caller: Caller, request: ExportRequest, fd: int) -> Started:
        """Write a snapshot, or what changed in it since another of its lineage, to a descriptor of the caller.

        Raises SnapshotPending, SnapshotDamaged, InvalidParameterCombination, ArchiveOfAnother when the file has
        something else, and what the key service says.
        """
        async with _owned(fd):

            def load(t: Transaction) -> tuple[Snapshot, Snapshot | None]:
                source = t.find_snapshot(caller, request.snapshot)
                return source, None if request.since is None else t.find_snapshot(caller, request.since)

            source, base = await self._catalogue.run(load)
            _check_exportable(source, base)
            key = None if request.key is None else await self._usable(caller, request.key)
            async with _inspector() as worker:
                found = await _opened(worker, fd, may_be_empty=True)
            present = found["Manifest"]
            if present is None:
                archive = await self._new_archive(caller, source, key or source.key_arn)
            else:
                archive = _continued(present, source, base, key)
                if job := await self._interrupted(caller, JobKind.EXPORT_ARCHIVE, archive["ArchiveId"], None):
                    view = await self._jobs.resume(caller, job.id, [os.dup(fd)])
                    return _started(view.job, source.id, resumed=True)
            job = new_job(
                self._job_id(),
                JobKind.EXPORT_ARCHIVE,
                account=caller.account,
                owner=caller.name,
                source=source.id,
                destination="",
                started=self._host.now(),
                rate=request.rate,
                parameters={
                    "Archive": archive,
                    "Base": None if base is None else base.id,
                    "IsFile": found["IsFile"],
                },
            )

            def check(t: Transaction) -> None:
                for snapshot in (source, base):
                    if snapshot is not None:
                        _check_completed(t.snapshot(snapshot.id))

            await self._jobs.start(job, check, given=[os.dup(fd)])
            return _started(job, source.id, resumed=present is not None)

    async def _new_archive(self, caller: Caller, source: Snapshot, key: KeyArn | None) -> dict[str, Any]:
        if key is None:
            raise InvalidParameterCombination(
                reason=f"{source.id} is not encrypted, and an archive always is: name a key for it (--key)"
            )
        archive = format_uuid(new_uuid(self._host.random(16)))
        context = archive_context(archive, source.id)
        blob, arn = await self._broker.generate_wrapped_key(caller, key, DATA_KEY_BYTES, context)
        return {
            "ArchiveId": archive,
            "Created": self._host.now(),
            "KeyArn": arn,
            "Blob": base64.b64encode(blob).decode(),
            "Context": context,
            "Volume": source.volume,
            "OwnerName": source.owner,
            "Name": source.name,
            "Description": source.description,
            "Started": source.started,
        }

    async def _usable(self, caller: Caller, name: str) -> KeyArn:
        return usable_key(await self._broker.describe_key(caller, name))

    async def _interrupted(self, caller: Caller, kind: JobKind, archive: str, name: str | None) -> Job | None:
        """Return the caller's job over this archive that waits for it; raises IncorrectState for one that works."""

        def load(t: Transaction) -> list[tuple[Job, str]]:
            jobs = [job for job in t.active_jobs() if job.kind is kind and job.account == caller.account]
            return [(job, t.snapshot(SnapshotId(job.destination)).name if job.destination else "") for job in jobs]

        for job, made in await self._catalogue.run(load):
            if job.parameters["Archive"]["ArchiveId"] != archive or (name is not None and made != name):
                continue
            if job.state is not JobState.INTERRUPTED:
                raise IncorrectState(reason=f"{job.id} works with this archive already")
            return job
        return None

    def _job_id(self) -> JobId:
        return JobId(new_id("job", self._host.random(ID_RANDOM_BYTES)))

    # --- import

    async def import_archive(self, caller: Caller, request: ImportRequest, fd: int) -> Started:
        """Make a snapshot of an archive; it is pending until the job is done.

        Raises ArchiveDamaged, UnsupportedFormat, ArchiveKeyUnavailable, AccessDenied and its kind, ArchiveNeedsBase,
        NameInUse, and what the key service says of the snapshot's own key.
        """
        name = parse_name(request.name)
        async with _owned(fd):
            async with _inspector() as worker:
                found = await _opened(worker, fd, may_be_empty=False)
                manifest = found["Manifest"]
                await self._unlock(caller, worker, manifest)
            job = await self._interrupted(caller, JobKind.IMPORT_ARCHIVE, manifest["ArchiveId"], name)
            if job is not None:
                view = await self._jobs.resume(caller, job.id, [os.dup(fd)])
                return _started(view.job, SnapshotId(job.destination), resumed=True)
            await self._host.space.require()
            base = await self._base(caller, request, manifest)
            made = await self._planned(caller, request, manifest, base, name)
            job = new_job(
                self._job_id(),
                JobKind.IMPORT_ARCHIVE,
                account=caller.account,
                owner=caller.name,
                source="" if base is None else base.id,
                destination=made.id,
                started=self._host.now(),
                rate=request.rate,
                parameters={
                    "Archive": {member: manifest[member] for member in ("ArchiveId", "KeyArn", "Blob", "Context")},
                    "SnapshotId": manifest["SnapshotId"],
                    "Content": manifest["Content"],
                    "HeaderDigest": found["HeaderDigest"],
                    "Header": found["Header"],
                    "IsFile": found["IsFile"],
                    "Base": None if base is None else base.id,
                },
            )
            if base is None:
                await self._imports.fill(caller, job, made, lambda t: None, [os.dup(fd)])
            else:
                await self._imports.fill_onto(caller, job, made, base, [os.dup(fd)])
            return _started(job, made.id, resumed=False)

    async def _unlock(self, caller: Caller, worker: Worker, manifest: Mapping[str, Any]) -> None:
        """Have the inspector open the header with the archive's key, on behalf of the caller."""
        try:
            session = await open_archive_session(self._broker, caller, manifest)
            try:
                await worker.request("unlock", {}, [session], deadline=OPEN_DEADLINE)
            finally:
                os.close(session)
        except EbsdError as exc:
            if exc.exit_status is ExitStatus.NOT_FOUND:
                reason = f"the key service of this host does not have it ({exc.message.removesuffix('.')})"
                raise ArchiveKeyUnavailable(key=manifest["KeyArn"], reason=reason) from exc
            raise

    async def _base(self, caller: Caller, request: ImportRequest, manifest: Mapping[str, Any]) -> Snapshot | None:
        """Return the snapshot that an incremental archive goes onto: the named one, or the only one it can be."""
        needed = manifest["Base"]
        facts = {"snapshot": manifest["SnapshotId"], "base": "nothing" if needed is None else needed["SnapshotId"]}
        if needed is None:
            if request.onto is not None:
                raise InvalidParameterCombination(reason="The archive is full: it goes onto no other snapshot")
            return None
        content = bytes.fromhex(needed["Content"])

        def load(t: Transaction) -> Snapshot | None:
            if request.onto is not None:
                named = t.find_snapshot(caller, request.onto)
                found = t.imported(named.id)
                return named if found is not None and found.content == content else None
            known = [t.snapshot(found.snapshot) for found in t.imports_of(caller.account, content)]
            return next((each for each in known if each.state is SnapshotState.COMPLETED), None)

        base = await self._catalogue.run(load)
        if base is None or base.account != caller.account:
            here = f"{request.onto} was not made of an archive of that" if request.onto else "no import of that is here"
            raise ArchiveNeedsBase(**facts, reason=here)
        _check_completed(base)
        refuse_damaged(base)
        return base

    async def _planned(
        self, caller: Caller, request: ImportRequest, manifest: Mapping[str, Any], base: Snapshot | None, name: str
    ) -> Snapshot:
        decide = partial(decide_import_archive, key_named=request.key is not None, is_incremental=base is not None)
        source = None if base is None else base.key_arn
        settled = await self._encryption.settle(caller, Making.SNAPSHOT, decide, named=request.key, source=source)
        key = settled.key
        if base is not None and request.key is not None and await self._usable(caller, request.key) != key:
            raise InvalidParameterCombination(reason=f"It shares the data key of {base.id}, and so its KMS key")
        ident = SnapshotId(new_id("snap", self._host.random(ID_RANDOM_BYTES)))
        return Snapshot(
            id=ident,
            account=caller.account,
            owner=caller.name,
            name=name,
            volume=COPY_SOURCE,
            size=manifest["SizeBytes"],
            state=SnapshotState.PENDING,
            message="",
            description=manifest["Description"] if request.description is None else request.description,
            cipher=Cipher.AES_256_XTS,
            key_arn=key,
            wrapped_key=None,
            context=new_context(ident, {}),
            lineage=new_lineage_id(self._host.random(16)) if base is None else base.lineage,
            new_head=0,
            integrity=Integrity.VERIFIED,
            authority=None,
            pause_us=None,
            started=self._host.now(),
            completed=None,
            tags=merged_tags(ident, {}, request.tags),
        )

    # --- show, verify

    async def describe(self, fd: int) -> dict[str, Any]:
        """Return what an archive says of itself, none of it authentic."""
        async with _owned(fd), _inspector() as worker:
            found = await _opened(worker, fd, may_be_empty=False)
        manifest: dict[str, Any] = found["Manifest"]
        return manifest

    async def verify(self, caller: Caller, fd: int, *, scrub: bool) -> AsyncGenerator[Check, None]:
        """Read all of an archive; with its key where the caller may use that, else its checksums alone.

        Raises ArchiveDamaged, UnsupportedFormat, HostFailure.
        """
        async with _owned(fd), _inspector() as worker:
            manifest = (await _opened(worker, fd, may_be_empty=False))["Manifest"]
            note = "no key was used, as was asked for" if scrub else ""
            if not scrub:
                try:
                    await self._unlock(caller, worker, manifest)
                except EbsdError as exc:
                    if exc.exit_status not in _UNUSABLE or exc.code == KeyServiceUnavailable.code:
                        raise
                    note = f"its key could not be used ({exc.message.removesuffix('.')})"
            await worker.request("verify", {})
            while True:
                progress = await worker.request("progress", {})
                ended, authentic = progress["Ended"], progress["Authentic"]
                yield Check(progress["Bytes"], ended, authentic, note, progress["Digest"])
                if ended:
                    return
                await trio.sleep(POLL_SECONDS)


# --- parts


@asynccontextmanager
async def _owned(fd: int) -> AsyncIterator[None]:
    """Close a descriptor of the client at the end, whatever happens."""
    try:
        yield
    finally:
        await close_given([fd])


@asynccontextmanager
async def _inspector() -> AsyncIterator[Worker]:
    worker = Worker.begin(INSPECTOR)
    try:
        yield worker
    finally:
        with trio.CancelScope(shield=True):
            await worker.end()


async def _opened(worker: Worker, fd: int, *, may_be_empty: bool) -> dict[str, Any]:
    try:
        return await worker.request("open", {"MayBeEmpty": may_be_empty}, [fd], deadline=OPEN_DEADLINE)
    except RemoteError as exc:
        if may_be_empty and exc.code in (ArchiveDamaged.code, UnsupportedFormat.code):
            reason = f"it has something else ({exc.message.removesuffix('.')})"
            raise ArchiveOfAnother(file="The file", reason=reason) from exc
        raise


def _check_completed(snapshot: Snapshot) -> None:
    if snapshot.state is not SnapshotState.COMPLETED:
        raise SnapshotPending(snapshot=snapshot.id, state=snapshot.state.value)


def _check_exportable(source: Snapshot, base: Snapshot | None) -> None:
    _check_completed(source)
    refuse_damaged(source)
    if base is None:
        return
    _check_completed(base)
    if base.id == source.id or base.lineage != source.lineage or base.size > source.size:
        raise InvalidParameterCombination(
            reason=f"{base.id} shares no data with {source.id}, or is larger: export {source.id} in full"
        )


def _continued(
    present: Mapping[str, Any], source: Snapshot, base: Snapshot | None, key: KeyArn | None
) -> dict[str, Any]:
    """Return the members of the archive that a file has the beginning of; raises ArchiveOfAnother."""
    known = None if present["Base"] is None else present["Base"]["SnapshotId"]
    if present["SnapshotId"] != source.id or known != (None if base is None else base.id):
        since = "" if known is None else f" since {known}"
        raise ArchiveOfAnother(file="The file", reason=f"it is an archive of {present['SnapshotId']}{since}")
    if key is not None and key != present["KeyArn"]:
        raise ArchiveOfAnother(file="The file", reason=f"it is an archive under {present['KeyArn']}")
    return {
        "ArchiveId": present["ArchiveId"],
        "Created": present["CreateTime"],
        "KeyArn": present["KeyArn"],
        "Blob": present["Blob"],
        "Context": present["Context"],
        "Volume": present["VolumeId"],
        "OwnerName": present["OwnerName"],
        "Name": present["Name"],
        "Description": present["Description"],
        "Started": present["StartTime"],
    }


def _started(job: Job, snapshot: SnapshotId, *, resumed: bool) -> Started:
    archive = job.parameters["Archive"]
    return Started(job.id, archive["ArchiveId"], KeyArn(archive["KeyArn"]), snapshot, resumed)
