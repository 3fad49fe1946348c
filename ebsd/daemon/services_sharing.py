"""Methods of io.ebsd.EC2 on sharing: permissions of snapshots, and the account's block of public ones."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ebsd.control.sharing import Sharing
from ebsd.domain.model import Caller
from ebsd.domain.sharing import parse_change

Method = Callable[[Caller, dict[str, Any]], Awaitable[dict[str, Any]]]


class SharingMethods:
    """The handlers; ``sharing`` returns the use cases, or raises why there are none now."""

    def __init__(self, sharing: Callable[[], Sharing]) -> None:
        self._sharing = sharing

    def table(self) -> dict[str, Method]:
        return {
            "ModifySnapshotAttribute": self._modify,
            "DescribeSnapshotAttribute": self._describe,
            "ResetSnapshotAttribute": self._reset,
            "EnableSnapshotBlockPublicAccess": self._block,
            "DisableSnapshotBlockPublicAccess": self._unblock,
            "GetSnapshotBlockPublicAccess": self._get_block,
        }

    async def _modify(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        change = parse_change(
            operation=p.get("OperationType"),
            users=p.get("UserIds") or [],
            groups=p.get("GroupNames") or [],
            permissions=p.get("CreateVolumePermission"),
        )
        await self._sharing().modify(caller, p["SnapshotId"], p.get("Attribute"), change)
        return {}

    async def _describe(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return await self._sharing().describe(caller, p["SnapshotId"], p["Attribute"])

    async def _reset(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        await self._sharing().reset(caller, p["SnapshotId"], p["Attribute"])
        return {}

    async def _block(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {"State": (await self._sharing().block(caller, p["State"])).value}

    async def _unblock(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {"State": (await self._sharing().unblock(caller)).value}

    async def _get_block(self, caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {"State": (await self._sharing().blocking(caller)).value, "ManagedBy": "account"}
