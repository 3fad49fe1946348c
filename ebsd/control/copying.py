"""Re-encrypting copies: a snapshot's data into a new snapshot or volume, under another data key.

The source is never written to, and cannot be deleted while a job reads it.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import trio

from ebsd.control.filling import Filling, claim_members, destination_of
from ebsd.control.job_work import START_DEADLINE, Sessions, Worker
from ebsd.control.sharing import is_let_use
from ebsd.control.volume_link import close_all
from ebsd.domain.errors import SnapshotNotFound, SnapshotPending
from ebsd.domain.ids import ID_RANDOM_BYTES, JobId, SnapshotId, new_id
from ebsd.domain.jobs import new_job
from ebsd.domain.model import Caller, Job, Snapshot, Volume
from ebsd.domain.states import JobKind, SnapshotState
from ebsd.store.catalog import Transaction


class Copying(Filling):
    """The kinds copy-snapshot and restore-volume."""

    async def copy_into(
        self, caller: Caller, source: Snapshot, destination: Snapshot | Volume, *, rate: int | None = None
    ) -> Job:
        """Make an empty destination in a lineage and under a data key of its own, and start filling it."""
        await self._host.space.require()
        job = new_job(
            JobId(new_id("job", self._host.random(ID_RANDOM_BYTES))),
            JobKind.COPY_SNAPSHOT if isinstance(destination, Snapshot) else JobKind.RESTORE_VOLUME,
            account=destination.account,
            owner=destination.owner,
            source=source.id,
            destination=destination.id,
            started=self._host.now(),
            rate=rate,
        )

        def check(t: Transaction) -> None:
            present = t.snapshot(source.id)
            if present.state is not SnapshotState.COMPLETED:
                raise SnapshotPending(snapshot=present.id, state=present.state.value)
            if not is_let_use(t, caller, present):  # not any more
                raise SnapshotNotFound(snapshot=present.id)

        return await self.fill(caller, job, destination, check)

    async def hand_over(self, job: Job, worker: Worker, sessions: Sessions, given: Sequence[int], rate: int) -> None:
        source = await self._catalogue.run(lambda t: t.snapshot(SnapshotId(job.source)))
        # Of the source no other record may be signed, and its floor raised, between the record that the worker gets and
        # the floor that its session tells: it would refuse the one as too old.
        async with self._lineages.lock(source.lineage):
            await self._hand_over_locked(job, source, worker, sessions, rate)

    async def _hand_over_locked(
        self, job: Job, source: Snapshot, worker: Worker, sessions: Sessions, rate: int
    ) -> None:
        destination, layer = await self._catalogue.run(lambda t: destination_of(t, job))
        fds: list[int] = []
        try:
            fds.append(await sessions.open(source, "source"))
            fds.append(await sessions.open(destination, "destination"))
            fds += await trio.to_thread.run_sync(self._files.open_source, source)
            fds += await self.open_destination(destination, layer)
            records = [
                await trio.to_thread.run_sync(self._files.record_bytes, resource)
                for resource in (source.id, destination.id)
            ]
            params = {
                "Source": {**claim_members(source), "AuthorityIds": [source.authority] if source.authority else []},
                "SourceRecord": base64.b64encode(records[0]).decode(),
                "Destination": {
                    **claim_members(destination),
                    "Kind": "snapshot" if isinstance(destination, Snapshot) else "volume",
                    "Layer": layer.number,
                },
                "DestinationRecord": base64.b64encode(records[1]).decode(),
                "DoneThrough": job.done_through,
                "Checkpoint": dict(job.checkpoint),
                "SpaceReserve": self._host.space.limits.reserve,
                "Rate": rate,
            }
            await worker.request("start", params, fds, deadline=START_DEADLINE)
        finally:
            close_all(fds)
