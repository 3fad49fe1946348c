"""Rollbacks that an administrator accepts: of volumes and snapshots that he restored from a backup.

The key service remembers the generation that a record has reached, and refuses older ones: it cannot tell a restored
backup from one that somebody slipped in. Accepting one is a decision about one resource and one generation, made by an
administrator who is told what it loses. What is signed afterwards is above all that was given up.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import trio

from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.lineages import Lineages
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.volumes import find_resource
from ebsd.domain.errors import IncorrectState, IntegrityFailure, NeedsRoot
from ebsd.domain.ids import SnapshotId, VolumeId
from ebsd.domain.model import Caller, Volume


class Rollback:
    """Use cases on resources whose record is older than the key service remembers."""

    def __init__(self, catalogue: Catalogue, broker: Broker, files: SnapshotFiles, lineages: Lineages) -> None:
        self._catalogue = catalogue
        self._broker = broker
        self._files = files
        self._lineages = lineages

    async def describe(self, caller: Caller, name: str) -> dict[str, Any]:
        """Return the generation of a resource's record, the one it had reached, and when the record was written.

        Raises NeedsRoot, ResourceNotFound, IntegrityFailure where there is no anchor or record.
        """
        refuse_others(caller)
        found = await self._catalogue.run(lambda t: find_resource(t, caller, name))
        generation, written = await trio.to_thread.run_sync(self._files.generation_of, found.id)
        return {
            "ResourceId": found.id,
            "Generation": generation,
            "Floor": await reached(self._broker, found.id),
            "RecordTime": datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    async def accept(self, caller: Caller, name: str, generation: int) -> dict[str, Any]:
        """Accept the record of a snapshot as it is; of a volume its attachment does that. Returns as ``describe``."""
        refuse_others(caller)
        found = await self._catalogue.run(lambda t: find_resource(t, caller, name))
        if isinstance(found, Volume):
            raise IncorrectState(reason="A volume is accepted by attaching it with AcceptGeneration")
        async with self._lineages.lock(found.lineage):
            await lower(self._broker, self._files, caller, found.id, generation)
        return await self.describe(caller, found.id)


def refuse_others(caller: Caller) -> None:
    """Raise NeedsRoot unless the caller administers this host."""
    if not caller.is_admin:
        raise NeedsRoot(operation="Accepting a rollback", remedy="Ask an administrator of this host.")


async def reached(broker: Broker, resource: str) -> int:
    """Return the floor of a resource; raises IntegrityFailure when the key service does not know it."""
    anchor = await broker.describe_anchor(resource)
    if anchor is None:
        raise IntegrityFailure(resource=resource, reason="the key service has no anchor for it")
    return anchor[2]


async def lower(
    broker: Broker, files: SnapshotFiles, caller: Caller, resource: VolumeId | SnapshotId, generation: int
) -> int | None:
    """Lower the floor to the generation of the record; returns the former one, None when that was no higher.

    Raises IncorrectState when the record has another generation than the one that was shown to the administrator.
    """
    present, _ = await trio.to_thread.run_sync(files.generation_of, resource)
    if present != generation:
        raise IncorrectState(reason=f"The record of {resource} has generation {present}, not {generation}")
    if present >= await reached(broker, resource):
        return None
    return await broker.accept_rollback(caller, resource, generation)
