"""CreateVolume and CopySnapshot: which of the ways to make a resource a request takes.

An empty volume is made at once; one that shares its source's data key costs a copy of the map; everything else is a
job that re-encrypts the data under a new data key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from ebsd.control.catalogue import Catalogue
from ebsd.control.copying import Copying
from ebsd.control.encryption import Encryption
from ebsd.control.host import Host
from ebsd.control.idempotency import ClientTokens
from ebsd.control.sharing import Sharing
from ebsd.control.snapshots import Snapshots
from ebsd.control.verification import refuse_damaged
from ebsd.control.volumes import CreateRequest, Volumes, new_context, new_lineage_id
from ebsd.domain.admission import Making
from ebsd.domain.errors import InvalidParameterCombination, SnapshotDamaged, SnapshotPending
from ebsd.domain.ids import COPY_SOURCE, ID_RANDOM_BYTES, JobId, KeyArn, SnapshotId, VolumeId, new_id, parse_name
from ebsd.domain.model import Caller, Cipher, Integrity, Snapshot, Volume
from ebsd.domain.outcomes import decide_copy_snapshot, source_of
from ebsd.domain.states import SnapshotState
from ebsd.domain.tags import merged_tags
from ebsd.domain.tokens import ClientToken


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """The parameters of CopySnapshot after parsing."""

    source: str
    name: str | None
    description: str
    encrypted: bool | None
    key: str | None
    tags: Mapping[str, str]
    allow_damaged: bool = False
    """Copy, under its own key, a snapshot whose last verification found damage."""
    rate: int | None = None
    """Bytes per second at most where data is re-encrypted; 0: no limit, None: the configured one."""


class Creation:
    """Use cases that make volumes and copies."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        encryption: Encryption,
        volumes: Volumes,
        snapshots: Snapshots,
        copying: Copying,
        tokens: ClientTokens,
        sharing: Sharing,
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._encryption = encryption
        self._volumes = volumes
        self._snapshots = snapshots
        self._copying = copying
        self._tokens = tokens
        self._sharing = sharing

    # --- each once for a client token

    async def create_volume(
        self, caller: Caller, request: CreateRequest, token: ClientToken | None = None
    ) -> tuple[Volume, JobId | None, str | None]:
        """Make a volume; with a job id it is ``creating`` until that job is done. The third value is a note."""

        async def again(ident: str) -> tuple[Volume, JobId | None, str | None]:
            volume = await self._catalogue.run(lambda t: t.volume(VolumeId(ident)))
            return volume, await self._job_of(ident), None

        return await self._tokens.once(token, lambda: self._create_volume(caller, request, token), again)

    async def copy_snapshot(
        self, caller: Caller, request: CopyRequest, token: ClientToken | None = None
    ) -> tuple[Snapshot, JobId | None, str | None]:
        """Copy a snapshot; with a job id the copy is ``pending`` until that job is done."""

        async def again(ident: str) -> tuple[Snapshot, JobId | None, str | None]:
            return await self._snapshot(ident), await self._job_of(ident), None

        return await self._tokens.once(token, lambda: self._copy_snapshot(caller, request, token), again)

    async def take_snapshot(
        self,
        caller: Caller,
        volume: str,
        *,
        name: str | None,
        description: str,
        tags: Mapping[str, str],
        token: ClientToken | None = None,
    ) -> Snapshot:
        """Take a snapshot of a volume (EC2 CreateSnapshot)."""
        make = partial(
            self._snapshots.create, caller, volume, name=name, description=description, tags=tags, token=token
        )
        return await self._tokens.once(token, make, self._snapshot)

    async def _snapshot(self, ident: str) -> Snapshot:
        return await self._catalogue.run(lambda t: t.snapshot(SnapshotId(ident)))

    async def _job_of(self, destination: str) -> JobId | None:
        jobs = await self._catalogue.run(lambda t: t.jobs())
        return next((job.id for job in jobs if job.destination == destination), None)

    # --- what making one takes

    async def _create_volume(
        self, caller: Caller, request: CreateRequest, token: ClientToken | None
    ) -> tuple[Volume, JobId | None, str | None]:
        source = None
        if request.preallocate and request.snapshot is not None:
            raise InvalidParameterCombination(
                reason="Preallocate is for empty volumes, and cannot be given together with SnapshotId"
            )
        if request.snapshot is not None:
            source = await self._sharing.reach(caller, request.snapshot)
            _check_usable(source)
        plan = await self._volumes.plan(caller, request, source)
        plan = replace(plan, volume=replace(plan.volume, token=token))
        if source is None:
            made = await self._volumes.create(caller, plan.volume, preallocate=request.preallocate)
            return made, None, plan.note
        if not (request.allow_damaged and plan.shares_key):
            # Re-encrypted, what is damaged could not be told from data any more.
            _refuse_damaged(caller, source)
        if plan.shares_key:
            return await self._snapshots.restore(caller, plan.volume, source), None, plan.note
        await self._sharing.check_key(caller, source)
        job = await self._copying.copy_into(caller, source, plan.volume, rate=request.rate)
        if source.account != caller.account:
            note = _note_of_shared(plan.volume.key_arn)
        else:
            note = f"The data is re-encrypted under {plan.volume.key_arn}; without --key a restore is instant."
        return plan.volume, job.id, plan.note or note

    async def _copy_snapshot(
        self, caller: Caller, request: CopyRequest, token: ClientToken | None
    ) -> tuple[Snapshot, JobId | None, str | None]:
        source = await self._sharing.reach(caller, request.source)
        _check_usable(source)
        ident = SnapshotId(new_id("snap", self._host.random(ID_RANDOM_BYTES)))
        name = parse_name(request.name) if request.name is not None else ident
        tags = merged_tags(ident, {}, request.tags)
        kind = source_of(encrypted=source.encrypted, own=source.account == caller.account)
        settled = await self._encryption.settle(
            caller,
            Making.COPY,
            partial(decide_copy_snapshot, encrypted=request.encrypted, key_named=request.key is not None, source=kind),
            named=request.key,
            source=source.key_arn,
        )
        key = settled.key
        shares = key == source.key_arn and caller.account == source.account
        copy = Snapshot(
            id=ident,
            account=caller.account,
            owner=caller.name,
            name=name,
            volume=COPY_SOURCE,
            size=source.size,
            state=SnapshotState.PENDING,
            message="",
            description=request.description,
            cipher=Cipher.NONE if key is None else Cipher.AES_256_XTS,
            key_arn=key,
            wrapped_key=None,
            context={} if key is None else new_context(ident, {}),
            lineage=source.lineage if shares else new_lineage_id(self._host.random(16)),
            new_head=0,
            integrity=source.integrity if shares else Integrity.VERIFIED,
            authority=None,
            pause_us=None,
            started=self._host.now(),
            completed=None,
            tags=tags,
            token=token,
        )
        if not (request.allow_damaged and shares):
            _refuse_damaged(caller, source)
        if shares:
            return await self._snapshots.copy_within_lineage(caller, copy, source), None, None
        await self._sharing.check_key(caller, source)
        job = await self._copying.copy_into(caller, source, copy, rate=request.rate)
        if source.account != caller.account:
            return copy, job.id, _note_of_shared(key)
        note = f"The data is re-encrypted under {key}."
        if source.key_arn is not None:
            note += f" An instant copy keeps the key: --encrypted --key {source.key_arn}"
        return copy, job.id, note


def _refuse_damaged(caller: Caller, source: Snapshot) -> None:
    try:
        refuse_damaged(source)
    except SnapshotDamaged as error:
        if source.account != caller.account:
            error.hint = f"Use another snapshot; this one belongs to account {source.account}, which can look at it."
        raise


def _note_of_shared(key: KeyArn | None) -> str:
    """Say why a job makes what an own snapshot would give at once."""
    how = "copied" if key is None else f"encrypted under {key}"
    return f"The snapshot belongs to another account: its data is {how}, and the result is yours alone."


def _check_usable(snapshot: Snapshot) -> None:
    if snapshot.state is not SnapshotState.COMPLETED:
        raise SnapshotPending(snapshot=snapshot.id, state=snapshot.state.value)
