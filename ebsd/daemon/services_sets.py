"""Methods of io.ebsd.EC2 on several volumes at once, or on a volume and what is made from it at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ebsd.control.describe import describe_snapshot
from ebsd.control.snapshot_sets import SetRequest, SnapshotSets
from ebsd.domain.errors import InvalidParameterValue
from ebsd.domain.model import Caller
from ebsd.domain.tags import check_description, tags_of_members


class SetServices:
    """The handlers; ``sets`` gives the use cases, or raises where there are none."""

    def __init__(self, sets: Callable[[], SnapshotSets]) -> None:
        self._sets = sets

    def table(self) -> Mapping[str, Callable[[Caller, dict[str, Any]], Awaitable[dict[str, Any]]]]:
        """Return method -> handler."""
        return {"CreateSnapshots": self._create_snapshots}

    async def _create_snapshots(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        copied = p.get("CopyTagsFromSource")
        if copied not in (None, "volume"):
            raise InvalidParameterValue(value=copied, parameter="CopyTagsFromSource", reason="it is volume")
        request = SetRequest(
            volumes=p.get("VolumeIds") or (),
            all_attached=bool(p.get("AllAttached")),
            target_tags=tags_of_members(p.get("TargetTags") or []),
            excluded=p.get("ExcludeVolumeIds") or (),
            prefix=p.get("NamePrefix"),
            description=check_description(p.get("Description") or ""),
            tags=tags_of_members(p.get("Tags") or []),
            copy_tags=copied is not None,
        )
        made = await self._sets().create(caller, request)
        return {"Snapshots": [describe_snapshot(snapshot, 0) for snapshot in made]}
