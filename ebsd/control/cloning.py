"""CopyVolumes: a volume made from another one as it is at the moment of the call, attached or not.

A clone is a snapshot that nobody sees, a restore of it, and its deletion. The snapshot is noted as implicit with its
row, so whatever cuts this short, ``recover`` removes it: a clone either is there, or nothing of it is. Under the
source's key that costs a copy of the map; any other key re-encrypts in a job, and the snapshot stays until its end.

EC2 refuses to clone an unencrypted volume. Here that follows the rule of every restore: it is refused where the
configuration does not allow unencrypted volumes, and where it does, it can be done by hand in two steps anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import trio

from ebsd.control.catalogue import Catalogue
from ebsd.control.copying import Copying
from ebsd.control.host import Host
from ebsd.control.idempotency import ClientTokens
from ebsd.control.snapshot_sets import SetRequest, SnapshotSets
from ebsd.control.snapshots import Snapshots, check_can_be_taken, pending_snapshot
from ebsd.control.verification import refuse_damaged
from ebsd.control.volumes import CreateRequest, Volumes
from ebsd.domain.errors import EbsdError, SnapshotNotFound
from ebsd.domain.ids import ID_RANDOM_BYTES, JobId, SnapshotId, VolumeId, new_id
from ebsd.domain.jobs import KINDS
from ebsd.domain.model import Caller, Snapshot, Volume
from ebsd.domain.states import SnapshotState
from ebsd.domain.tokens import ClientToken
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 5.0
"""Between two looks whether the job that reads an implicit snapshot has ended."""


@dataclass(frozen=True, slots=True)
class CloneRequest:
    """The parameters of CopyVolumes after parsing."""

    source: str
    name: str | None
    size: int | None
    """Bytes; at least those of the source, whose size it has when both are None."""
    size_gib: int | None
    key: str | None
    """Another KMS key than the source's."""
    tags: Mapping[str, str]
    copy_tags: bool
    """EC2 does not copy tags; on request the source's are added."""


class Cloning:
    """Use cases that make volumes from volumes."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        volumes: Volumes,
        snapshots: Snapshots,
        sets: SnapshotSets,
        copying: Copying,
        nursery: trio.Nursery,
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._volumes = volumes
        self._snapshots = snapshots
        self._sets = sets
        self._copying = copying
        self._nursery = nursery
        self._tokens = ClientTokens(catalogue)

    async def clone(
        self, caller: Caller, request: CloneRequest, token: ClientToken | None
    ) -> tuple[Volume, JobId | None, str | None]:
        """Make a clone; with a job id it is ``creating`` until that job is done. The third value is a note."""

        async def again(ident: str) -> tuple[Volume, JobId | None, str | None]:
            def load(t: Transaction) -> tuple[Volume, JobId | None]:
                made = next((job.id for job in t.jobs() if job.destination == ident), None)
                return t.volume(VolumeId(ident)), made

            return *await self._catalogue.run(load), None

        return await self._tokens.once(token, lambda: self._clone(caller, request, token), again)

    async def _clone(
        self, caller: Caller, request: CloneRequest, token: ClientToken | None
    ) -> tuple[Volume, JobId | None, str | None]:
        source = await self._catalogue.run(lambda t: t.find_volume(caller, request.source))
        check_can_be_taken(source)
        # Judged before anything is made or held, by a snapshot as the one that will be taken.
        ident = SnapshotId(new_id("snap", self._host.random(ID_RANDOM_BYTES)))
        expected = pending_snapshot(source, ident, ident, "", {}, 0, self._host.now())
        expected = replace(expected, verification=source.verification)
        plan = await self._volumes.plan(caller, _as_create(request, source), expected)
        if not plan.shares_key:
            refuse_damaged(expected)
        wanted = replace(plan.volume, token=token, snapshot=None, source_volume=source.id)
        taken = await self._take(caller, source)
        try:
            if plan.shares_key:
                return await self._snapshots.restore(caller, wanted, taken), None, plan.note
            job = await self._copying.copy_into(caller, taken, wanted)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._remove(taken.id)
            raise
        finally:
            if plan.shares_key:
                with trio.CancelScope(shield=True):
                    await self._remove(taken.id)
        self._nursery.start_soon(self._remove_when_read, taken.id)
        note = f"The data are re-encrypted under {wanted.key_arn}; without --key a clone is instant."
        return wanted, job.id, plan.note or note

    async def _take(self, caller: Caller, source: Volume) -> Snapshot:
        def note(t: Transaction, snapshot: Snapshot) -> None:
            t.add_implicit(snapshot.id)

        request = SetRequest(
            volumes=(source.id,),
            all_attached=False,
            target_tags={},
            excluded=(),
            name=lambda volume: None,
            description=f"of a clone of {source.id}",
            tags={},
            copy_tags=False,
            note=note,
        )
        (taken,) = await self._sets.create(caller, request)
        return taken

    async def recover(self) -> None:
        """Remove the snapshots of clones that were cut short; those that a job reads go with its end."""
        for ident in await self._catalogue.run(lambda t: t.implicit_snapshots()):
            if await self._catalogue.run(_is_read(ident)):
                self._nursery.start_soon(self._remove_when_read, ident)
            else:
                await self._remove(ident)

    async def _remove_when_read(self, ident: SnapshotId) -> None:
        while await self._catalogue.run(_is_read(ident)):  # noqa: ASYNC110 - a row, which has no event
            await trio.sleep(POLL_SECONDS)
        await self._remove(ident)

    async def _remove(self, ident: SnapshotId) -> None:
        try:
            snapshot = await self._catalogue.run(lambda t: t.snapshot(ident))
            if snapshot.state is not SnapshotState.PENDING:  # else it is removed when it is settled, or taken up again
                await self._snapshots.discard(ident)
        except SnapshotNotFound:
            return
        except (EbsdError, OSError) as exc:
            log.error("%s, which a clone was made from, stays until the next start: %s", ident, exc)


def _as_create(request: CloneRequest, source: Volume) -> CreateRequest:
    return CreateRequest(
        name=request.name,
        size=request.size,
        size_gib=request.size_gib,
        snapshot=None,
        encrypted=None if request.key is None else True,
        key=request.key,
        context={},
        tags={**(source.tags if request.copy_tags else {}), **request.tags},
    )


def _is_read(ident: SnapshotId) -> Callable[[Transaction], bool]:
    return lambda t: any(job.source == ident and KINDS[job.kind].holds_source for job in t.active_jobs())
