"""Rewrap: wrap data keys anew under the newest backing key of their own KMS key. No data is read or written.

1. The wrapped key stands in the record, which counts, and in the catalog. Record first, catalog second: whichever of
   the two a crash leaves behind, both blobs open to the same data key.
2. The signed part of a record is not touched: generation, floor and signature stay as they are, and whoever serves
   the volume does not notice.
3. What a crash left between record and catalog is settled at the next start, and by the next rewrap.

The KMS key of a volume or snapshot never changes (EBS User Guide, "Amazon EBS encryption"): that takes a copy.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.lineages import Lineages
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.volumes import Volumes, find_resource
from ebsd.domain.errors import (
    EbsdError,
    IntegrityFailure,
    InvalidParameterValue,
    KeyServiceUnavailable,
    NotSupported,
    SnapshotNotFound,
    VolumeNotFound,
)
from ebsd.domain.ids import KeyArn, uid_of_account
from ebsd.domain.model import Caller, Snapshot, Volume
from ebsd.domain.states import SnapshotState, VolumeState
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)

SETTING: Final = "rewrapping"
"""Catalog setting: ARN of the key whose data keys are being rewrapped; empty when none is."""

MAX_FAILURES: Final = 100
"""Failures that a report names."""

Progress = Callable[[int, int], Awaitable[None]]
"""Takes (resources done, resources in all)."""


@dataclass(slots=True)
class Report:
    """What a rewrap did, in numbers of resources."""

    key: KeyArn
    total: int
    rewrapped: int = 0
    current: int = 0
    """Were under the newest backing key already."""
    skipped: int = 0
    """Being made or deleted, or gone since."""
    failed: int = 0
    failures: list[tuple[str, EbsdError]] = field(default_factory=list)

    @property
    def done(self) -> int:
        return self.rewrapped + self.current + self.skipped + self.failed


class Rewrapping:
    """The use case; one at a time."""

    def __init__(
        self, catalogue: Catalogue, broker: Broker, volumes: Volumes, files: SnapshotFiles, lineages: Lineages
    ) -> None:
        self._catalogue = catalogue
        self._broker = broker
        self._volumes = volumes
        self._files = files
        self._lineages = lineages
        self._busy = trio.Lock()

    async def rewrap(
        self, caller: Caller, key: str, names: Sequence[str] | None, target: str | None, progress: Progress
    ) -> Report:
        """Rewrap the data keys of what the caller has under a key, or of the named ones; others are not touched.

        Raises NotSupported for another ``target`` than the key itself, InvalidParameterValue for a name under another
        key, KeyServiceUnavailable. What fails for one resource alone is in the report. May be cut and repeated.
        """
        arn = (await self._broker.describe_key(caller, key)).arn
        if target is not None and (await self._broker.describe_key(caller, target)).arn != arn:
            raise NotSupported(
                what="Changing the KMS key of a volume or snapshot",
                remedy="Copy a snapshot of it under the other key: "
                f"ebsctl copy SNAPSHOT --encrypted --key {target}; this moves its data to a new data key.",
            )
        found = await self._catalogue.run(lambda t: _chosen(t, caller, arn, names))
        report = Report(arn, len(found))
        async with self._busy:
            await self._catalogue.run(lambda t: t.set_setting(SETTING, arn))
            for resource in found:
                await progress(report.done, report.total)
                await self._rewrap_one(resource, report)
            await self._catalogue.run(lambda t: t.set_setting(SETTING, ""))
        return report

    async def _rewrap_one(self, resource: Volume | Snapshot, report: Report) -> None:
        try:
            if isinstance(resource, Volume):
                async with self._volumes.lock(resource.id), self._lineages.lock(resource.lineage):
                    await self._rewrap_locked(resource, report)
            else:
                async with self._lineages.lock(resource.lineage):
                    await self._rewrap_locked(resource, report)
        except (KeyServiceUnavailable, OSError):
            raise
        except EbsdError as exc:
            log.error("the data key of %s was not rewrapped: %s", resource.id, exc)
            report.failed += 1
            if len(report.failures) < MAX_FAILURES:
                report.failures.append((resource.id, exc))

    async def _rewrap_locked(self, resource: Volume | Snapshot, report: Report) -> None:
        """The locks keep everybody away who reads or writes the record."""
        try:
            present = await self._catalogue.run(lambda t: _row(t, resource))
        except (VolumeNotFound, SnapshotNotFound):
            present = None
        if present is None or not _is_final(present):
            report.skipped += 1
            return
        wrapped = (await trio.to_thread.run_sync(self._files.record_of, present.id)).wrapped_key
        if wrapped is None or wrapped.key_arn != report.key:
            raise IntegrityFailure(resource=present.id, reason="its record and the catalog disagree about its key")
        owner = Caller(uid_of_account(present.account), present.owner, present.account, is_admin=False)
        blob = await self._broker.rewrap(owner, present.id, wrapped.blob, wrapped.key_arn, wrapped.context)
        with trio.CancelScope(shield=True):
            if blob is not None:
                await trio.to_thread.run_sync(self._files.put_wrapped_key, present.id, wrapped, blob)
            now = blob or wrapped.blob
            if present.wrapped_key != now:
                await self._catalogue.run(lambda t: _note(t, present, now))
        if blob is None:
            report.current += 1
        else:
            report.rewrapped += 1

    async def recover(self) -> None:
        """Settle what a cut rewrap left between records and catalog; at start, before any request."""
        arn = await self._catalogue.run(lambda t: t.setting(SETTING))
        if not arn:
            return
        log.warning("a rewrap under %s was cut; looking at the records", arn)
        for resource in await self._catalogue.run(lambda t: _under(t, KeyArn(arn))):
            try:
                wrapped = (await trio.to_thread.run_sync(self._files.record_of, resource.id)).wrapped_key
            except (EbsdError, OSError) as exc:
                log.error("%s: %s", resource.id, exc)
                continue
            if wrapped is not None and wrapped.key_arn == arn and wrapped.blob != resource.wrapped_key:
                blob = wrapped.blob
                await self._catalogue.run(lambda t, r=resource, b=blob: _note(t, r, b))  # type: ignore[misc]
        await self._catalogue.run(lambda t: t.set_setting(SETTING, ""))


def _under(t: Transaction, arn: KeyArn) -> list[Volume | Snapshot]:
    resources: list[Volume | Snapshot] = [*t.volumes(), *t.snapshots()]
    return [resource for resource in resources if resource.key_arn == arn]


def _chosen(t: Transaction, caller: Caller, arn: KeyArn, names: Sequence[str] | None) -> list[Volume | Snapshot]:
    if names is None:
        return [found for found in _under(t, arn) if caller.is_admin or found.account == caller.account]
    chosen = {}
    for name in names:
        found = find_resource(t, caller, name)
        if found.key_arn != arn:
            reason = f"its key is {found.key_arn}, and not {arn}" if found.encrypted else "it is not encrypted"
            raise InvalidParameterValue(value=name, parameter="Resources", reason=reason)
        chosen[found.id] = found
    return list(chosen.values())


def _row(t: Transaction, resource: Volume | Snapshot) -> Volume | Snapshot:
    return t.volume(resource.id) if isinstance(resource, Volume) else t.snapshot(resource.id)


def _is_final(resource: Volume | Snapshot) -> bool:
    """Say whether nobody is about to write the record of a resource with the wrapped key that the catalog has."""
    if isinstance(resource, Volume):
        return resource.state not in (VolumeState.CREATING, VolumeState.DELETING)
    return resource.state in (SnapshotState.COMPLETED, SnapshotState.RECOVERABLE)


def _note(t: Transaction, resource: Volume | Snapshot, blob: bytes) -> None:
    if resource.key_arn is None:
        raise AssertionError("BUG: a wrapped key without its key")
    if isinstance(resource, Volume):
        t.set_wrapped_key(resource.id, resource.key_arn, blob, resource.context)
    else:
        t.set_snapshot_key(resource.id, resource.key_arn, blob, resource.context)
