"""Methods of io.ebsd.EC2 that make something of volumes as they are now: CreateSnapshots and CopyVolumes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ebsd.control.cloning import CloneRequest, Cloning
from ebsd.control.describe import describe_snapshot
from ebsd.control.snapshot_sets import SetRequest, SnapshotSets
from ebsd.control.volumes import Volumes
from ebsd.domain.errors import InvalidParameterValue
from ebsd.domain.model import Caller
from ebsd.domain.tags import check_description, tags_of_members
from ebsd.domain.tokens import parse_client_token


class SetServices:
    """The handlers; each argument gives use cases, or raises why there are none now."""

    def __init__(
        self, sets: Callable[[], SnapshotSets], cloning: Callable[[], Cloning], volumes: Callable[[], Volumes]
    ) -> None:
        self._sets = sets
        self._cloning = cloning
        self._volumes = volumes

    def table(self) -> Mapping[str, Callable[[Caller, dict[str, Any]], Awaitable[dict[str, Any]]]]:
        """Return method -> handler."""
        return {"CreateSnapshots": self._create_snapshots, "CopyVolumes": self._copy_volumes}

    async def _create_snapshots(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        copied = p.get("CopyTagsFromSource")
        if copied not in (None, "volume"):
            raise InvalidParameterValue(value=copied, parameter="CopyTagsFromSource", reason="it is volume")
        prefix = p.get("NamePrefix")
        request = SetRequest(
            volumes=p.get("VolumeIds") or (),
            all_attached=bool(p.get("AllAttached")),
            target_tags=tags_of_members(p.get("TargetTags") or []),
            excluded=p.get("ExcludeVolumeIds") or (),
            name=lambda volume: None if prefix is None else f"{prefix}-{volume.name}",
            description=check_description(p.get("Description") or ""),
            tags=tags_of_members(p.get("Tags") or []),
            copy_tags=copied is not None,
        )
        made = await self._sets().create(caller, request)
        return {"Snapshots": [describe_snapshot(snapshot, 0) for snapshot in made]}

    async def _copy_volumes(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        request = CloneRequest(
            source=p["SourceVolumeId"],
            name=p.get("Name"),
            size=p.get("SizeBytes"),
            size_gib=p.get("Size"),
            key=p.get("KmsKeyId"),
            tags=tags_of_members(p.get("Tags") or []),
            copy_tags=bool(p.get("CopyTags")),
        )
        token = parse_client_token(caller.account, "CopyVolumes", p)
        volume, job, note = await self._cloning().clone(caller, request, token)
        members = {"Volumes": [await self._volumes().describe_one(volume)], "JobId": job, "Note": note}
        return {name: value for name, value in members.items() if value is not None}
