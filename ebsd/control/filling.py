"""Jobs that fill a new volume or snapshot, in a lineage and under a data key of its own.

1. The destination is pending (a snapshot) or creating (a volume) until the job has completed: nobody can use it half.
2. The worker signs its record when all is there; that record is the end. Whatever ends before removes the destination.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio

from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.host import Host
from ebsd.control.job_work import JobWork
from ebsd.control.jobs import Jobs
from ebsd.control.lineages import Lineages
from ebsd.control.snapshot_files import Destination, SnapshotFiles
from ebsd.control.volumes import Volumes, new_uuid
from ebsd.domain.errors import EbsdError, ResourceNotFound
from ebsd.domain.ids import KeyArn, SnapshotId, VolumeId
from ebsd.domain.jobs import KINDS, Makes
from ebsd.domain.model import Caller, Integrity, Job, Layer, LayerState, Lineage, Snapshot, Volume
from ebsd.domain.states import VolumeEvent, next_volume_state
from ebsd.domain.units import SECTOR
from ebsd.store.catalog import Transaction


class Filling(JobWork):
    """Makes, completes and removes the destination of a job; ``hand_over`` is the kind's own."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        broker: Broker,
        volumes: Volumes,
        files: SnapshotFiles,
        lineages: Lineages,
        jobs: Jobs,
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._broker = broker
        self._volumes = volumes
        self._files = files
        self._lineages = lineages
        self._jobs = jobs

    async def fill(
        self,
        caller: Caller,
        job: Job,
        destination: Snapshot | Volume,
        check: Callable[[Transaction], None],
        given: Sequence[int] = (),
    ) -> Job:
        """Make an empty destination and start to fill it; returns when the job works.

        ``check`` may refuse, in the transaction that makes the rows. ``given``: descriptors of the client, taken over.
        """
        layer_uuid = new_uuid(self._host.random(16))
        layers: list[Layer] = []

        def intend(t: Transaction) -> None:
            check(t)
            t.add_lineage(Lineage(destination.lineage, destination.account, SECTOR, destination.cipher))
            layers[:] = [t.add_layer(destination.lineage, layer_uuid, destination.id, destination.size)]
            if isinstance(destination, Snapshot):
                t.add_snapshot(destination)
            else:
                t.add_volume(destination)

        async def prepare(is_cancelled: Callable[[], bool]) -> None:
            await self._prepare(caller, destination, layers[0], is_cancelled)

        return await self._jobs.start(job, intend, prepare, given)

    async def _prepare(
        self, caller: Caller, destination: Snapshot | Volume, layer: Layer, is_cancelled: Callable[[], bool]
    ) -> None:
        """Make the destination's key and files. A cancellation takes effect at the next step: none is cut in two."""
        key, context = destination.key_arn, destination.context
        blob = await self._volumes.wrap_new_key(caller, destination.id, key, context)
        if is_cancelled():
            return
        await trio.to_thread.run_sync(
            self._files.prepare_destination, as_destination(destination), layer, key, blob, context
        )

        def note(t: Transaction) -> None:
            if key is not None and blob is not None:
                _set_key(t, destination, key, blob, context)

        if not is_cancelled():
            await self._catalogue.run(note)

    async def open_destination(self, destination: Snapshot | Volume, layer: Layer) -> list[int]:
        """Return descriptors of lineage directory, map, and the segments of the one layer; the caller closes them."""
        return await trio.to_thread.run_sync(self._files.open_destination, as_destination(destination), layer)

    # --- JobWork

    async def conclude(self, job: Job, answer: Mapping[str, Any]) -> Callable[[Transaction], None]:
        """``answer``: {"Record": the signed record of the destination, 320 bytes in base64}."""
        signed = base64.b64decode(answer["Record"])
        destination, layer = await self._catalogue.run(lambda t: destination_of(t, job))
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
                state = next_volume_state(destination.id, destination.state, VolumeEvent.CREATED)
                t.set_volume_state(destination.id, state)
                t.set_integrity(destination.id, Integrity.VERIFIED)

        return commit

    async def concluded(self, job: Job) -> None:
        destination, layer = await self._catalogue.run(lambda t: destination_of(t, job))
        if isinstance(destination, Snapshot):
            await trio.to_thread.run_sync(self._files.seal_layer, layer)

    async def is_prepared(self, job: Job) -> bool:
        return await trio.to_thread.run_sync(self._files.is_prepared, resource_id(job))

    async def answer_left(self, job: Job) -> Mapping[str, Any] | None:
        await self._note_key(job)
        signed = await trio.to_thread.run_sync(self._files.signed_copy, resource_id(job))
        return None if signed is None else {"Record": base64.b64encode(signed).decode()}

    async def _note_key(self, job: Job) -> None:
        """Bring the wrapped key of a destination into the catalog, where ebsd ended between its record and that."""
        if not await self.is_prepared(job):
            return
        wrapped = (await trio.to_thread.run_sync(self._files.record_of, resource_id(job))).wrapped_key
        if wrapped is None:
            return
        destination, _ = await self._catalogue.run(lambda t: destination_of(t, job))
        if destination.wrapped_key is None:
            await self._catalogue.run(
                lambda t: _set_key(t, destination, wrapped.key_arn, wrapped.blob, wrapped.context)
            )

    async def remove(self, job: Job) -> None:
        try:
            destination, _ = await self._catalogue.run(lambda t: destination_of(t, job))
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


def resource_id(job: Job) -> VolumeId | SnapshotId:
    """Return the id of what a job makes."""
    makes_snapshot = KINDS[job.kind].makes is Makes.SNAPSHOT
    return SnapshotId(job.destination) if makes_snapshot else VolumeId(job.destination)


def destination_of(t: Transaction, job: Job) -> tuple[Snapshot | Volume, Layer]:
    """Return what a job makes, with the layer that was made for it; raises when it is not there."""
    destination: Snapshot | Volume
    if KINDS[job.kind].makes is Makes.SNAPSHOT:
        destination = t.snapshot(SnapshotId(job.destination))
    else:
        destination = t.volume(VolumeId(job.destination))
    number = t.layers_of(destination.id, 1, 0)[0]
    layer = t.layer(destination.lineage, number)
    if layer is None:
        raise ResourceNotFound(resource=destination.id)
    return destination, layer


def as_destination(resource: Snapshot | Volume) -> Destination:
    """Return a row as its files see it."""
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


def claim_members(resource: Snapshot | Volume) -> dict[str, Any]:
    """Return what the catalog says of a resource, as a worker's ``start`` takes it."""
    return {
        "ResourceId": resource.id,
        "Owner": resource.account,
        "Lineage": resource.lineage,
        "Size": resource.size,
        "Cipher": int(resource.cipher),
        "KeyArn": resource.key_arn,
    }


def _set_key(
    t: Transaction, destination: Snapshot | Volume, key: KeyArn, blob: bytes, context: Mapping[str, str]
) -> None:
    if isinstance(destination, Snapshot):
        t.set_snapshot_key(destination.id, key, blob, context)
    else:
        t.set_wrapped_key(destination.id, key, blob, context)
