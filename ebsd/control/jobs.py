"""Jobs: re-encrypting copies, each in a worker process of its own, that survive a restart of ebsd.

1. The destination is pending (a snapshot) or creating (a volume) until the job has completed: nobody can use it half.
2. A worker dies with ebsd. The next ebsd starts another one from ``done_through``, which was committed only after
   the worker had synced that far.
3. Cancelling, and a final error, remove the destination. The source is never written to, and cannot be deleted
   while a job reads it.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import trio

from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.describe import JOB_FILTERS, describe_job
from ebsd.control.host import Host
from ebsd.control.lineages import Lineages
from ebsd.control.snapshot_files import Destination, SnapshotFiles
from ebsd.control.volume_link import close_all
from ebsd.control.volumes import Volumes, new_uuid
from ebsd.domain.errors import (
    EbsdError,
    IncorrectState,
    IntegrityFailure,
    JobCancelled,
    KeyServiceUnavailable,
    RemoteError,
    SnapshotPending,
)
from ebsd.domain.filters import parse_filters, passes
from ebsd.domain.ids import ID_RANDOM_BYTES, AccountId, JobId, KeyArn, SnapshotId, VolumeId, new_id, uid_of_account
from ebsd.domain.model import Caller, Integrity, Job, Layer, LayerState, Lineage, Snapshot, Volume
from ebsd.domain.states import (
    JobEvent,
    JobKind,
    JobState,
    SnapshotState,
    VolumeEvent,
    next_job_state,
    next_volume_state,
)
from ebsd.domain.units import SECTOR
from ebsd.ipc.channel import Channel, ChannelClosed
from ebsd.ipc.incidents import as_ebsd_error, host_failure, log_incident
from ebsd.ipc.process import Child, start_with_channel
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)

MODULE: Final = "ebsd.volume.copier"
START_DEADLINE: Final = 120.0
FINISH_DEADLINE: Final = 600.0
POLL_SECONDS: Final = 0.2
RESTART_PAUSE: Final = (0.1, 1.0, 5.0)
"""Seconds before each further start of a worker that died."""


class _Running:
    """The in-memory side of a running job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.changed = trio.Event()
        self.ended = trio.Event()
        self.scope = trio.CancelScope()
        self.cancelled = False

    def update(self, job: Job) -> None:
        self.job = job
        self.changed.set()
        self.changed = trio.Event()


class Jobs:
    """Starts, watches, resumes and cancels jobs."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        broker: Broker,
        volumes: Volumes,
        files: SnapshotFiles,
        lineages: Lineages,
        nursery: trio.Nursery,
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._broker = broker
        self._volumes = volumes
        self._files = files
        self._lineages = lineages
        self._nursery = nursery
        self._running: dict[JobId, _Running] = {}

    # --- start

    async def copy_into(
        self, caller: Caller, source: Snapshot, destination: Snapshot | Volume, kind: JobKind
    ) -> tuple[Job, Snapshot | Volume]:
        """Make an empty destination in a lineage and under a data key of its own, and start filling it."""
        await self._host.space.require()
        ident = JobId(new_id("job", self._host.random(ID_RANDOM_BYTES)))
        layer_uuid = new_uuid(self._host.random(16))
        job = Job(
            id=ident,
            account=destination.account,
            owner=destination.owner,
            kind=kind,
            state=JobState.RUNNING,
            source=source.id,
            destination=destination.id,
            total=0,
            done=0,
            done_through=0,
            started=self._host.now(),
            ended=None,
            error=None,
        )

        def intend(t: Transaction) -> Layer:
            present = t.snapshot(source.id)
            if present.state is not SnapshotState.COMPLETED:
                raise SnapshotPending(snapshot=present.id, state=present.state.value)
            t.add_lineage(Lineage(destination.lineage, destination.account, SECTOR, destination.cipher))
            layer = t.add_layer(destination.lineage, layer_uuid, destination.id, destination.size)
            if isinstance(destination, Snapshot):
                t.add_snapshot(destination)
            else:
                t.add_volume(destination)
            t.put_job(job)
            return layer

        running = self._running[job.id] = _Running(job)  # it can be cancelled as soon as it can be seen
        try:
            layer = await self._catalogue.run(intend)
        except BaseException:
            self._forget(running)
            raise
        try:
            await self._prepare(caller, running, destination, layer)
        except BaseException as exc:
            with trio.CancelScope(shield=True):
                await self._end(job, JobEvent.FAIL, exc if isinstance(exc, EbsdError) else None, running)
                self._forget(running)
            raise
        self._nursery.start_soon(self._work, running)
        return job, destination

    async def _prepare(self, caller: Caller, running: _Running, destination: Snapshot | Volume, layer: Layer) -> None:
        """Make the destination's key and files. A cancellation takes effect at the next step: none is cut in two."""
        key, context = destination.key_arn, destination.context
        blob = await self._volumes.wrap_new_key(caller, destination.id, key, context)
        if running.cancelled:
            return
        await trio.to_thread.run_sync(
            self._files.prepare_destination, _as_destination(destination), layer, key, blob, context
        )

        def note(t: Transaction) -> None:
            if key is not None and blob is not None:
                _set_key(t, destination, key, blob, context)

        if not running.cancelled:
            await self._catalogue.run(note)

    async def recover(self) -> None:
        """Complete the jobs that had ended but for the catalog; at start, before temporary files are removed."""
        for job in await self._catalogue.run(lambda t: t.jobs()):
            if job.state is not JobState.RUNNING:
                continue
            try:
                await self._note_key(job)
                signed = await trio.to_thread.run_sync(self._files.signed_copy, _resource_id(job))
                if signed is not None:
                    log.warning("%s had ended when ebsd did", job.id)
                    await self._complete(_Running(job), signed)
            except (EbsdError, OSError) as exc:
                log.error("%s: %s", job.id, exc)

    async def _note_key(self, job: Job) -> None:
        """Bring the wrapped key of a destination into the catalog, where ebsd ended between its record and that."""
        resource = _resource_id(job)
        if not await trio.to_thread.run_sync(self._files.is_prepared, resource):
            return
        wrapped = (await trio.to_thread.run_sync(self._files.record_of, resource)).wrapped_key
        if wrapped is None:
            return
        _, destination, _ = await self._catalogue.run(lambda t: _load(t, job))
        if destination.wrapped_key is None:
            await self._catalogue.run(
                lambda t: _set_key(t, destination, wrapped.key_arn, wrapped.blob, wrapped.context)
            )

    async def resume_all(self) -> None:
        """Go on with the jobs that were running when ebsd ended; called once at start."""
        for job in await self._catalogue.run(lambda t: t.jobs()):
            if job.state is not JobState.RUNNING:
                continue
            if await trio.to_thread.run_sync(self._files.is_prepared, _resource_id(job)):
                log.warning("%s goes on from chunk %d", job.id, job.done_through)
                self._start(job)
            else:
                await self._end(job, JobEvent.FAIL, None)

    def _start(self, job: Job) -> None:
        running = self._running[job.id] = _Running(job)
        self._nursery.start_soon(self._work, running)

    def _forget(self, running: _Running) -> None:
        """Let those who wait for the end of a job look at what the catalog says of it."""
        self._running.pop(running.job.id, None)
        running.ended.set()
        running.changed.set()

    # --- work

    async def _work(self, running: _Running) -> None:
        job = running.job
        error: EbsdError | None = None
        try:
            with running.scope:
                await trio.lowlevel.checkpoint()  # it may have been cancelled while it was prepared
                await self._run_workers(running)
        except EbsdError as exc:
            error = exc
        except OSError as exc:
            error = host_failure(exc)
        except Exception as exc:  # noqa: BLE001 - a bug in one job must not end ebsd, and again at each start
            error = as_ebsd_error(exc, log_incident)
        if error is not None:
            log.error("%s failed: %s", job.id, error)
        with trio.CancelScope(shield=True):
            if running.job.state is JobState.COMPLETED:
                pass  # whatever came after that: others may use what it made
            elif running.cancelled:
                await self._end(running.job, JobEvent.CANCEL, JobCancelled(job=job.id), running)
            elif error is not None:
                await self._end(running.job, JobEvent.FAIL, error, running)
            elif running.scope.cancelled_caught:
                return  # ebsd ends; the next one goes on
            self._forget(running)

    async def _run_workers(self, running: _Running) -> None:
        """Run a worker to its end, and another one from where it had come to when it died, or the key service did."""
        for pause in RESTART_PAUSE:
            try:
                return await self._run_worker(running)
            except EbsdError as exc:
                if not isinstance(exc, ChannelClosed) and exc.code != KeyServiceUnavailable.code:
                    raise
                log.error("%s: %s", running.job.id, exc)
            await trio.sleep(pause)
            log.warning("%s goes on from chunk %d", running.job.id, running.job.done_through)
        await self._run_worker(running)

    async def _run_worker(self, running: _Running) -> None:
        worker = _Worker.start()
        grants: list[tuple[KeyArn, str]] = []
        try:
            await self._hand_over(running, worker, grants)
            await self._retire(
                running.job, grants
            )  # the worker has its keys, and ebsd may end without an end of the job
            committed = running.job.done_through
            while True:
                progress = await worker.request("progress", {})
                job = replace(
                    running.job,
                    total=progress["Total"],
                    done=progress["Done"],
                    done_through=progress["DoneThrough"],
                )
                running.update(job)
                if progress["State"] == "failed":
                    failure = progress["Error"]
                    raise _failure(failure)
                if job.done_through > committed or progress["State"] == "done":
                    await self._catalogue.run(lambda t, job=job: t.put_job(job))  # type: ignore[misc]
                    committed = job.done_through
                if progress["State"] == "done":
                    break
                await trio.sleep(POLL_SECONDS)
            answer = await worker.request("finish", {}, deadline=FINISH_DEADLINE)
            with trio.CancelScope(shield=True):
                await self._complete(running, base64.b64decode(answer["Record"]))
        finally:
            with trio.CancelScope(shield=True):
                await worker.end()
                await self._retire(running.job, grants)

    async def _retire(self, job: Job, grants: list[tuple[KeyArn, str]]) -> None:
        while grants:
            key, grant = grants.pop()
            try:
                await self._broker.retire_grant(key, grant)
            except EbsdError as exc:
                log.warning("a grant of %s could not be retired: %s", job.id, exc)

    async def _hand_over(self, running: _Running, worker: _Worker, grants: list[tuple[KeyArn, str]]) -> None:
        job = running.job
        source, destination, layer = await self._catalogue.run(lambda t: _load(t, job))
        # Of the source no other record may be signed, and its floor raised, between the record that the worker gets and
        # the floor that its session tells: it would refuse the one as too old.
        async with self._lineages.lock(source.lineage):
            await self._hand_over_locked(job, source, destination, layer, worker, grants)

    async def _hand_over_locked(
        self,
        job: Job,
        source: Snapshot,
        destination: Snapshot | Volume,
        layer: Layer,
        worker: _Worker,
        grants: list[tuple[KeyArn, str]],
    ) -> None:
        fds: list[int] = []
        try:
            fds.append(await self._session(job, source, grants, "source"))
            fds.append(await self._session(job, destination, grants, "destination"))
            fds += await trio.to_thread.run_sync(self._files.open_source, source)
            fds += await trio.to_thread.run_sync(self._files.open_destination, _as_destination(destination), layer)
            records = [
                await trio.to_thread.run_sync(self._files.record_bytes, resource)
                for resource in (source.id, destination.id)
            ]
            params = {
                "Source": {**_claim(source), "AuthorityIds": [source.authority] if source.authority else []},
                "SourceRecord": base64.b64encode(records[0]).decode(),
                "Destination": {
                    **_claim(destination),
                    "Kind": "snapshot" if isinstance(destination, Snapshot) else "volume",
                    "Layer": layer.number,
                },
                "DestinationRecord": base64.b64encode(records[1]).decode(),
                "DoneThrough": job.done_through,
                "SpaceReserve": self._host.space.limits.reserve,
            }
            await worker.request("start", params, fds, deadline=START_DEADLINE)
        finally:
            close_all(fds)

    async def _session(self, job: Job, resource: Snapshot | Volume, grants: list[tuple[KeyArn, str]], role: str) -> int:
        if resource.key_arn is None:
            return await self._broker.open_session(resource.id, key=None, grant=None, blob=None, context=None)
        wrapped = (await trio.to_thread.run_sync(self._files.record_of, resource.id)).wrapped_key
        if wrapped is None:
            raise IntegrityFailure(resource=resource.id, reason="its record has no wrapped key, but it is encrypted")
        owner = _owner(resource.account, resource.owner)
        grant = await self._broker.create_grant(owner, resource.key_arn, wrapped.context, f"{job.id}-{role}")
        grants.append((resource.key_arn, grant))
        return await self._broker.open_session(
            resource.id, key=resource.key_arn, grant=grant, blob=wrapped.blob, context=wrapped.context
        )

    # --- end

    async def _complete(self, running: _Running, signed: bytes) -> None:
        state = next_job_state(running.job.id, running.job.state, JobEvent.COMPLETE)
        job = replace(running.job, state=state, ended=self._host.now(), done=running.job.total)
        _, destination, layer = await self._catalogue.run(lambda t: _load(t, job))
        if isinstance(destination, Snapshot):
            await trio.to_thread.run_sync(self._files.finish_copied_snapshot, destination, signed)
        else:
            await trio.to_thread.run_sync(self._files.finish_copied_volume, destination, signed)
        await self._broker.raise_floor(destination.id, 1)

        def commit(t: Transaction) -> None:
            if isinstance(destination, Snapshot):
                t.complete_snapshot(destination.id, self._host.now(), None, Integrity.VERIFIED)
                t.set_layer_state(destination.lineage, layer.number, LayerState.SEALED)
            else:
                t.set_layer_state(destination.lineage, layer.number, LayerState.HEAD)
                made = next_volume_state(destination.id, destination.state, VolumeEvent.CREATED)
                t.set_volume_state(destination.id, made)
                t.set_integrity(destination.id, Integrity.VERIFIED)
            t.put_job(job)

        await self._catalogue.run(commit)
        running.update(job)
        if isinstance(destination, Snapshot):
            await trio.to_thread.run_sync(self._files.seal_layer, layer)
        log.info("%s completed: %s", job.id, destination.id)

    async def _end(self, job: Job, event: JobEvent, error: EbsdError | None, running: _Running | None = None) -> None:
        """Remove the destination and commit how the job ended.

        What cannot be removed is left to the next start, where nothing says any more that a job fills it. The job has
        ended all the same: one that seems to run for ever could be neither waited for nor cancelled.
        """
        left = ""
        try:
            await self._remove_destination(job)
        except (EbsdError, OSError) as exc:
            log.error("%s: what it had made stays until the next start: %s", job.id, exc)
            left = f"{job.destination} could not be removed ({exc}); the next start of ebsd removes it."
            if error is None:
                error = exc if isinstance(exc, EbsdError) else host_failure(exc)
        members = None
        if error is not None:
            members = {"Code": error.code, "Message": error.message, "Hint": f"{error.hint} {left}".strip()}
        ended = replace(job, state=next_job_state(job.id, job.state, event), ended=self._host.now(), error=members)
        await self._catalogue.run(lambda t: t.put_job(ended))
        if running is not None:
            running.update(ended)

    async def _remove_destination(self, job: Job) -> None:
        try:
            _, destination, _ = await self._catalogue.run(lambda t: _load(t, job))
        except EbsdError:
            return
        async with self._lineages.lock(destination.lineage):
            if isinstance(destination, Volume):
                await self._volumes.remove_unfinished(destination)
                return
            await trio.to_thread.run_sync(self._files.remove, destination.id)
            await self._broker.delete_anchor(destination.id)
            await self._catalogue.run(lambda t: t.remove_snapshot(destination.id))
            await self._lineages.sweep(destination.lineage)

    # --- requests

    async def describe(
        self, caller: Caller, idents: Sequence[str] | None, filters: Sequence[Mapping[str, Any]] = ()
    ) -> list[Job]:
        """Return the jobs of these ids, or all that the caller can see, that pass the filters; oldest first."""
        chosen = parse_filters(filters, JOB_FILTERS)

        def load(t: Transaction) -> list[Job]:
            if idents is not None:
                return [t.find_job(caller, ident) for ident in idents]
            return t.jobs(None if caller.is_admin else caller.account)

        present = [self._present(job) for job in await self._catalogue.run(load)]
        return [job for job in present if passes(describe_job(job), chosen)]

    def _present(self, job: Job) -> Job:
        running = self._running.get(job.id)
        return job if running is None else running.job

    async def watch(self, caller: Caller, ident: str) -> AsyncIterator[Job]:
        """Yield the job now, at every change, and at its end last."""
        job = await self._catalogue.run(lambda t: t.find_job(caller, ident))
        running = self._running.get(job.id)
        while running is not None and not running.ended.is_set():
            changed = running.changed
            yield running.job
            await changed.wait()
        yield await self._catalogue.run(lambda t: t.find_job(caller, ident))

    async def cancel(self, caller: Caller, ident: str) -> Job:
        """End a running job and remove its destination; returns when that is done.

        Raises IncorrectState for a job that had ended, also when it completed before it could be ended.
        """
        job = await self._catalogue.run(lambda t: t.find_job(caller, ident))
        running = self._running.get(job.id)
        if running is None or job.state is not JobState.RUNNING:
            raise IncorrectState(reason=f"The job {job.id} is {job.state.value}")
        running.cancelled = True
        running.scope.cancel()
        await running.ended.wait()
        ended = await self._catalogue.run(lambda t: t.find_job(caller, ident))
        if ended.state is JobState.COMPLETED:
            raise IncorrectState(reason=f"The job {ended.id} is {ended.state.value}")
        return ended


@dataclass(slots=True)
class _Worker:
    """A copy worker process."""

    child: Child
    channel: Channel

    @classmethod
    def start(cls) -> _Worker:
        return cls(*start_with_channel(MODULE))

    async def request(
        self, method: str, params: dict[str, Any], fds: Sequence[int] = (), *, deadline: float = 60.0
    ) -> dict[str, Any]:
        return (await self.channel.request(method, params, fds, deadline=deadline)).message

    async def end(self) -> None:
        """End the worker at once: whatever it has not synced is done again."""
        self.child.kill()
        await self.child.wait()
        self.channel.close()


def _load(t: Transaction, job: Job) -> tuple[Snapshot, Snapshot | Volume, Layer]:
    source = t.snapshot(job.source)
    destination: Snapshot | Volume
    if job.kind is JobKind.COPY_SNAPSHOT:
        destination = t.snapshot(SnapshotId(job.destination))
    else:
        destination = t.volume(VolumeId(job.destination))
    return source, destination, t.layers(destination.lineage)[0]


def _set_key(
    t: Transaction, destination: Snapshot | Volume, key: KeyArn, blob: bytes, context: Mapping[str, str]
) -> None:
    if isinstance(destination, Snapshot):
        t.set_snapshot_key(destination.id, key, blob, context)
    else:
        t.set_wrapped_key(destination.id, key, blob, context)


def _resource_id(job: Job) -> VolumeId | SnapshotId:
    return SnapshotId(job.destination) if job.kind is JobKind.COPY_SNAPSHOT else VolumeId(job.destination)


def _claim(resource: Snapshot | Volume) -> dict[str, Any]:
    return {
        "ResourceId": resource.id,
        "Owner": resource.account,
        "Lineage": resource.lineage,
        "Size": resource.size,
        "Cipher": int(resource.cipher),
        "KeyArn": resource.key_arn,
    }


def _as_destination(resource: Snapshot | Volume) -> Destination:
    created = resource.started if isinstance(resource, Snapshot) else resource.created
    return Destination(
        resource.id,
        resource.lineage,
        resource.account,
        resource.owner,
        resource.name,
        resource.size,
        resource.cipher,
        created,
        source=resource.volume if isinstance(resource, Snapshot) else resource.snapshot or "",
        description=resource.description if isinstance(resource, Snapshot) else "",
    )


def _owner(account: AccountId, name: str) -> Caller:
    return Caller(uid_of_account(account), name, account, is_admin=False)


def _failure(members: dict[str, str]) -> EbsdError:
    return RemoteError(members["Code"], members["Message"], members.get("Hint", ""))
