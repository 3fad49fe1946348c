"""Methods of io.ebsd.EC2 and io.ebsd.Control on the recycle bin: members to use cases and back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ebsd.control.describe import describe_snapshot
from ebsd.control.host import Host
from ebsd.control.recycle_bin import RecycleBin, describe_rule
from ebsd.control.volumes import Volumes
from ebsd.domain.errors import InvalidParameterValue
from ebsd.domain.model import Caller, Snapshot, Volume
from ebsd.domain.recycling import ResourceType, Rule, TagChoice

Method = Callable[[Caller, dict[str, Any]], Awaitable[dict[str, Any]]]


class BinMethods:
    """Handlers; ``recycle_bin`` and ``volumes`` give the use cases, or raise why there are none."""

    def __init__(self, host: Host, recycle_bin: Callable[[], RecycleBin], volumes: Callable[[], Volumes]) -> None:
        self._host = host
        self._bin = recycle_bin
        self._volumes = volumes

    def ec2(self) -> dict[str, Method]:
        return {
            "ListSnapshotsInRecycleBin": self._list_snapshots,
            "RestoreSnapshotFromRecycleBin": self._restore_snapshot,
            "ListVolumesInRecycleBin": self._list_volumes,
            "RestoreVolumeFromRecycleBin": self._restore_volume,
        }

    def control(self) -> dict[str, Method]:
        return {
            "CreateRecycleBinRule": self._create_rule,
            "ListRecycleBinRules": self._list_rules,
            "DeleteRecycleBinRule": self._delete_rule,
        }

    async def _list(
        self, caller: Caller, kind: ResourceType, names: str, answer: str, p: dict[str, Any]
    ) -> dict[str, Any]:
        found, token = await self._bin().content(caller, kind, p.get(names), p.get("MaxResults"), p.get("NextToken"))
        return {answer: found, **({} if token is None else {"NextToken": token})}

    async def _list_snapshots(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return await self._list(caller, ResourceType.SNAPSHOT, "SnapshotIds", "Snapshots", p)

    async def _list_volumes(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return await self._list(caller, ResourceType.VOLUME, "VolumeIds", "Volumes", p)

    async def _restore_snapshot(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        found = await self._bin().restore(caller, p["SnapshotId"], ResourceType.SNAPSHOT)
        assert isinstance(found, Snapshot)
        return {"Snapshot": describe_snapshot(found, 100)}

    async def _restore_volume(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        found = await self._bin().restore(caller, p["VolumeId"], ResourceType.VOLUME)
        assert isinstance(found, Volume)
        return {"Volume": await self._volumes().describe_one(found)}

    async def _create_rule(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        if p["ResourceType"] not in tuple(ResourceType):
            raise InvalidParameterValue(
                value=p["ResourceType"], parameter="ResourceType", reason="it is snapshot or volume"
            )
        rule = Rule(
            id=self._bin().new_rule_id(),
            account=caller.account,
            type=ResourceType(p["ResourceType"]),
            days=p["RetentionDays"],
            tags=_choices(p.get("ResourceTags")),
            excluded=_choices(p.get("ExcludeResourceTags")),
            description=p.get("Description") or "",
            created=self._host.now(),
        )
        return {"Rule": describe_rule(await self._bin().create_rule(caller, rule))}

    async def _list_rules(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {"Rules": [describe_rule(rule) for rule in await self._bin().rules(caller)]}

    async def _delete_rule(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        await self._bin().delete_rule(caller, p["Identifier"])
        return {}


def _choices(tags: list[Mapping[str, Any]] | None) -> tuple[TagChoice, ...]:
    return tuple((str(tag["Key"]), tag.get("Value")) for tag in tags or ())
