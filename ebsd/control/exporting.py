"""ExportImage: what a volume or snapshot holds, decrypted into a file, device or stream that the client opened.

1. Of a volume a snapshot is taken, whose id stands in the job before it is there. It goes with the job, however that
   ends: a job that was cut by an end of ebsd fails at the next start.
2. The worker reads the snapshot as a copy does; the data key is used in the name of the resource's owner.
3. ebsd holds the client's descriptor and never uses it.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio

from ebsd.control.catalogue import Catalogue
from ebsd.control.filling import claim_members
from ebsd.control.host import Host
from ebsd.control.job_work import START_DEADLINE, JobWork, Sessions, Worker, close_given
from ebsd.control.jobs import Jobs
from ebsd.control.lineages import Lineages
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.snapshots import Snapshots
from ebsd.control.verification import refuse_damaged
from ebsd.control.volume_link import close_all
from ebsd.control.volumes import find_resource
from ebsd.domain.errors import EbsdError, SnapshotPending
from ebsd.domain.ids import ID_RANDOM_BYTES, JobId, SnapshotId, new_id
from ebsd.domain.jobs import new_job
from ebsd.domain.model import Caller, Job, Snapshot, Volume
from ebsd.domain.states import JobKind, SnapshotState
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)


class Exporting(JobWork):
    """Writes volumes and snapshots into images."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        snapshots: Snapshots,
        files: SnapshotFiles,
        lineages: Lineages,
        jobs: Jobs,
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._snapshots = snapshots
        self._files = files
        self._lineages = lineages
        self._jobs = jobs

    async def export(
        self,
        caller: Caller,
        name_or_id: str,
        given: Sequence[int],
        *,
        served: bool,
        sparse: bool,
        allow_damaged: bool,
        rate: int | None = None,
    ) -> JobId:
        """Begin to export; ``given``: the target, taken over whatever happens.

        Raises what taking a snapshot raises, SnapshotPending, SnapshotDamaged.
        """
        handed_on = False
        try:
            found = await self._catalogue.run(lambda t: find_resource(t, caller, name_or_id))
            if isinstance(found, Snapshot) and not allow_damaged:
                refuse_damaged(found)
            passing = isinstance(found, Volume)
            source = self._snapshots.new_id() if passing else found.id
            job = new_job(
                JobId(new_id("job", self._host.random(ID_RANDOM_BYTES))),
                JobKind.EXPORT_IMAGE,
                account=found.account,
                owner=found.owner,
                source=source,
                destination="",
                started=self._host.now(),
                rate=rate,
                parameters={
                    "Resource": found.id,
                    "Passing": passing,
                    "Sparse": sparse,
                    "Format": "nbd" if served else "raw",
                    "AllowDamaged": allow_damaged,
                },
            )

            async def prepare(is_cancelled: Callable[[], bool]) -> None:
                if passing:
                    what = f"of the export {job.id}, and goes with it"
                    await self._snapshots.create(
                        caller, found.id, name=None, description=what, tags={}, ident=SnapshotId(source)
                    )

            handed_on = True
            await self._jobs.start(job, lambda t: _check(t, job), prepare, given)
        finally:
            if not handed_on:
                await close_given(given)
        return job.id

    # --- JobWork

    async def hand_over(self, job: Job, worker: Worker, sessions: Sessions, given: Sequence[int], rate: int) -> None:
        snapshot = await self._catalogue.run(lambda t: t.snapshot(SnapshotId(job.source)))
        # No other record may be signed, and its floor raised, between the record that the worker gets and the floor
        # that its session tells: it would refuse the one as too old.
        async with self._lineages.lock(snapshot.lineage):
            fds: list[int] = []
            try:
                fds.append(await sessions.open(snapshot, "source"))
                fds += await trio.to_thread.run_sync(self._files.open_source, snapshot)
                record = await trio.to_thread.run_sync(self._files.record_bytes, snapshot.id)
                params = {
                    "Source": {
                        **claim_members(snapshot),
                        "AuthorityIds": [snapshot.authority] if snapshot.authority else [],
                    },
                    "SourceRecord": base64.b64encode(record).decode(),
                    "Sparse": job.parameters["Sparse"],
                    "Format": job.parameters["Format"],
                    "AllowDamaged": job.parameters["AllowDamaged"],
                    "Rate": rate,
                }
                await worker.request("start", params, [*fds, *given], deadline=START_DEADLINE)
            finally:
                close_all(fds)

    async def conclude(self, job: Job, answer: Mapping[str, Any]) -> Callable[[Transaction], None]:
        """Remove the passing snapshot: a crash after this leaves nothing behind."""
        await self.remove(job)
        return lambda t: None

    async def remove(self, job: Job) -> None:
        if not job.parameters["Passing"]:
            return
        ident = SnapshotId(job.source)
        try:
            snapshot = await self._catalogue.run(lambda t: t.snapshot(ident))
        except EbsdError:
            return  # it was never there, or is gone
        await self._snapshots.remove_passing(snapshot, job.id)

    async def tidy(self) -> None:
        """Remove passing snapshots whose job has ended, and that could not be removed with it; at start."""
        ended = [job for job in await self._catalogue.run(lambda t: t.jobs()) if not job.is_active]
        for job in ended:
            if job.kind is JobKind.EXPORT_IMAGE:
                try:
                    await self.remove(job)
                except (EbsdError, OSError) as exc:
                    log.error("%s, which the export %s took, stays until the next start: %s", job.source, job.id, exc)

    async def describe(self, caller: Caller, ident: str) -> dict[str, Any]:
        """Return what io.ebsd.Control's DescribeExport does. Raises JobNotFound."""
        job = await self._catalogue.run(lambda t: t.find_job(caller, ident))
        found = job.checkpoint
        return {"DamagedChunks": int(found.get("DamagedChunks", 0)), "Damaged": list(found.get("Damaged", []))}

    async def is_prepared(self, job: Job) -> bool:
        """What was exported of is nobody's any more: the client's command has ended with its connection."""
        return False


def _check(t: Transaction, job: Job) -> None:
    if job.parameters["Passing"]:
        return
    present = t.snapshot(SnapshotId(job.source))
    if present.state is not SnapshotState.COMPLETED:
        raise SnapshotPending(snapshot=present.id, state=present.state.value)
