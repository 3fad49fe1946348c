"""The jobs that write and read archives of snapshots.

1. ebsd parses no archive and has no key of one: what it knows comes from the inspector and the workers.
2. Both kinds need the client's descriptor, so after a restart of ebsd they wait for it. A job over a pipe cannot go on:
   what was written or read is gone.
3. An import fills a new lineage, or, of an incremental archive, one new layer in the lineage of the base.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio

from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.filling import Filling, as_destination, claim_members, destination_of
from ebsd.control.host import Host
from ebsd.control.job_work import START_DEADLINE, JobWork, Sessions, Worker
from ebsd.control.lineages import Lineages
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.volume_link import close_all
from ebsd.control.volumes import new_uuid
from ebsd.domain.errors import EbsdError, IncorrectState, InvalidParameterValue, SnapshotPending
from ebsd.domain.ids import AccountId, JobId, KeyArn, SnapshotId, uid_of_account
from ebsd.domain.model import Caller, Imported, Job, Layer, LayerState, Snapshot, Volume
from ebsd.domain.states import SnapshotState
from ebsd.store.catalog import Transaction


def user_of(job: Job) -> Caller:
    """Return whom a job works for; whether he administers is the key service's to know."""
    return Caller(uid_of_account(AccountId(job.account)), job.owner, job.account, is_admin=False)


async def open_archive_session(broker: Broker, caller: Caller, archive: Mapping[str, Any]) -> int:
    """Return a session for the key of an archive; ``archive`` has KeyArn, Blob (base64) and Context."""
    blob = base64.b64decode(archive["Blob"])
    return await broker.open_archive_session(caller, KeyArn(archive["KeyArn"]), blob, archive["Context"])


def one_given(given: Sequence[int]) -> int:
    if len(given) != 1:
        raise InvalidParameterValue(value=len(given), parameter="Descriptors", reason="it is the file of the archive")
    return given[0]


class Once:
    """What was begun over a pipe, which is not to be begun again."""

    def __init__(self) -> None:
        self._begun: set[JobId] = set()

    def begin(self, job: Job) -> None:
        """Raise IncorrectState when a worker had its try at this pipe already."""
        if job.parameters["IsFile"]:
            return
        if job.id in self._begun:
            raise IncorrectState(reason="The process that had the stream died, and a stream cannot be continued")
        self._begun.add(job.id)

    def end(self, job: Job) -> None:
        self._begun.discard(job.id)


class ArchiveExports(JobWork):
    """The kind export-archive: nothing of the store is changed."""

    def __init__(
        self, host: Host, catalogue: Catalogue, broker: Broker, files: SnapshotFiles, lineages: Lineages
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._broker = broker
        self._files = files
        self._lineages = lineages
        self._once = Once()

    async def hand_over(self, job: Job, worker: Worker, sessions: Sessions, given: Sequence[int], rate: int) -> None:
        output = one_given(given)

        def load(t: Transaction) -> tuple[Snapshot, Snapshot | None]:
            base = job.parameters["Base"]
            return t.snapshot(SnapshotId(job.source)), None if base is None else t.snapshot(SnapshotId(base))

        source, base = await self._catalogue.run(load)
        # No record of either may be signed between the one that the worker gets and the floor that its session tells.
        async with self._lineages.lock(source.lineage):
            fds: list[int] = []
            try:
                fds.append(await open_archive_session(self._broker, user_of(job), job.parameters["Archive"]))
                fds.append(await sessions.open(source, "source"))
                if base is not None:
                    fds.append(await sessions.open(base, "base"))
                fds += await trio.to_thread.run_sync(self._files.open_source, source)
                if base is not None:
                    lineage_fd, map_fd = await trio.to_thread.run_sync(self._files.open_source, base)
                    fds.append(map_fd)
                    close_all([lineage_fd])
                params = {
                    "Source": _source_members(source),
                    "SourceRecord": await _record(self._files, source),
                    "Base": None if base is None else _source_members(base),
                    "BaseRecord": None if base is None else await _record(self._files, base),
                    "Archive": job.parameters["Archive"],
                    "DoneThrough": job.done_through,
                    "Rate": rate,
                }
                self._once.begin(job)
                await worker.request("start", params, [*fds, output], deadline=START_DEADLINE)
            finally:
                close_all(fds)

    async def conclude(self, job: Job, answer: Mapping[str, Any]) -> Callable[[Transaction], None]:
        self._once.end(job)
        return lambda t: None

    async def remove(self, job: Job) -> None:
        self._once.end(job)

    async def is_prepared(self, job: Job) -> bool:
        return bool(job.parameters["IsFile"])

    async def check_given(self, job: Job, given: Sequence[int]) -> None:
        one_given(given)


class ArchiveImports(Filling):
    """The kind import-archive."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._once = Once()

    # --- the destination of an incremental archive

    async def fill_onto(
        self, caller: Caller, job: Job, destination: Snapshot, base: Snapshot, given: Sequence[int]
    ) -> Job:
        """As ``fill``, for a snapshot in the lineage of its base, under the same data key."""
        layer_uuid = new_uuid(self._host.random(16))
        layers: list[Layer] = []

        def intend(t: Transaction) -> None:
            present = t.snapshot(base.id)
            if present.state is not SnapshotState.COMPLETED:
                raise SnapshotPending(snapshot=present.id, state=present.state.value)
            layers[:] = [t.add_layer(base.lineage, layer_uuid, destination.id, destination.size)]
            t.add_snapshot(destination)
            t.note_made_from(destination.id, base.id)

        async def prepare(is_cancelled: Callable[[], bool]) -> None:
            async with self._lineages.lock(base.lineage):
                await self._prepare_increment(caller, destination, base, layers[0], is_cancelled)

        return await self._jobs.start(job, intend, prepare, given)

    async def _prepare_increment(
        self, caller: Caller, destination: Snapshot, base: Snapshot, layer: Layer, is_cancelled: Callable[[], bool]
    ) -> None:
        key, context = destination.key_arn, destination.context
        wrapped = (await trio.to_thread.run_sync(self._files.record_of, base.id)).wrapped_key
        if key is None or wrapped is None:
            raise IncorrectState(reason=f"{base.id} was not imported: it is not encrypted")
        blob = await self._broker.re_encrypt(caller, wrapped.blob, wrapped.context, key, context)
        await self._broker.create_anchor(caller, destination.id, key=key, blob=blob, context=context)
        if is_cancelled():
            return
        known = await trio.to_thread.run_sync(self._files.known_layers, base.lineage)
        missing = await self._catalogue.run(lambda t: t.layers(base.lineage, known))
        await trio.to_thread.run_sync(
            self._files.prepare_increment, as_destination(destination), missing, layer, key, blob, context
        )
        if not is_cancelled():
            await self._catalogue.run(lambda t: t.set_snapshot_key(destination.id, key, blob, context))

    # --- JobWork

    async def hand_over(self, job: Job, worker: Worker, sessions: Sessions, given: Sequence[int], rate: int) -> None:
        archive_fd = one_given(given)
        parameters = job.parameters

        def load(t: Transaction) -> tuple[Snapshot | Volume, Layer, Snapshot | None, Imported | None]:
            destination, layer = destination_of(t, job)
            if parameters["Base"] is None:
                return destination, layer, None, None
            base = SnapshotId(parameters["Base"])
            return destination, layer, t.snapshot(base), t.imported(base)

        destination, layer, base, imported = await self._catalogue.run(load)
        async with self._lineages.lock(destination.lineage):
            fds: list[int] = []
            try:
                fds.append(await open_archive_session(self._broker, user_of(job), parameters["Archive"]))
                fds.append(await sessions.open(destination, "destination"))
                if base is not None:
                    fds.append(await sessions.open(base, "base"))
                lineage_fd, map_fd, *segments = await self.open_destination(destination, layer)
                fds += [lineage_fd, map_fd]
                base_fds = [] if base is None else await trio.to_thread.run_sync(self._files.open_source, base)
                opened = [*base_fds, *segments]
                try:
                    params = {
                        "Header": parameters["Header"],
                        "HeaderDigest": parameters["HeaderDigest"],
                        "Destination": claim_members(destination),
                        "DestinationRecord": await _record(self._files, destination),
                        "Layer": layer.number,
                        "Base": None if base is None else _source_members(base),
                        "BaseRecord": None if base is None else await _record(self._files, base),
                        "BaseContent": None if imported is None else imported.content.hex(),
                        "BaseContentMac": None if imported is None else base64.b64encode(imported.mac).decode(),
                        "DoneThrough": job.done_through,
                        "SpaceReserve": self._host.space.limits.reserve,
                        "Rate": rate,
                    }
                    self._once.begin(job)
                    sent = [*fds, *base_fds[1:], archive_fd, *segments]
                    await worker.request("start", params, sent, deadline=START_DEADLINE)
                finally:
                    close_all(opened)
            finally:
                close_all(fds)

    async def conclude(self, job: Job, answer: Mapping[str, Any]) -> Callable[[Transaction], None]:
        commit = await super().conclude(job, answer)
        found = Imported(
            SnapshotId(job.destination),
            job.account,
            job.parameters["Archive"]["ArchiveId"],
            job.parameters["SnapshotId"],
            bytes.fromhex(job.parameters["Content"]),
            base64.b64decode(job.checkpoint["ContentMac"]),
        )
        self._once.end(job)

        def both(t: Transaction) -> None:
            commit(t)
            t.note_import(found)

        return both

    async def concluded(self, job: Job) -> None:
        await super().concluded(job)
        if job.parameters["Base"] is not None:
            lineage = (await self._catalogue.run(lambda t: t.snapshot(SnapshotId(job.destination)))).lineage
            async with self._lineages.lock(lineage):
                await self._lineages.sweep(lineage)  # what was deleted meanwhile had to wait

    async def is_prepared(self, job: Job) -> bool:
        return bool(job.parameters["IsFile"]) and await super().is_prepared(job)

    async def remove(self, job: Job) -> None:
        self._once.end(job)
        if job.parameters["Base"] is None:
            await super().remove(job)
            return
        try:
            destination, layer = await self._catalogue.run(lambda t: destination_of(t, job))
        except EbsdError:
            return
        async with self._lineages.lock(destination.lineage):
            await trio.to_thread.run_sync(self._files.remove, SnapshotId(destination.id))
            await self._broker.delete_anchor(destination.id)

            def forget(t: Transaction) -> None:
                # Nobody names the layer: as a sealed one it is the sweep's.
                t.set_layer_state(destination.lineage, layer.number, LayerState.SEALED)
                t.remove_snapshot(SnapshotId(destination.id))

            await self._catalogue.run(forget)
            await self._lineages.sweep_whole(destination.lineage)

    async def check_given(self, job: Job, given: Sequence[int]) -> None:
        one_given(given)


def _source_members(snapshot: Snapshot) -> dict[str, Any]:
    return {**claim_members(snapshot), "AuthorityIds": [snapshot.authority] if snapshot.authority else []}


async def _record(files: SnapshotFiles, resource: Snapshot | Volume) -> str:
    return base64.b64encode(await trio.to_thread.run_sync(files.record_bytes, resource.id)).decode()
