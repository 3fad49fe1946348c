"""Methods of io.ebsd.EC2 on the locks of snapshots: members to use cases and back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ebsd.control.locking import SnapshotLocks
from ebsd.domain.locks import LockRequest
from ebsd.domain.model import Caller


def lock_methods(
    locks: Callable[[], SnapshotLocks],
) -> dict[str, Callable[[Caller, dict[str, Any]], Awaitable[dict[str, Any]]]]:
    """Return method -> handler. ``locks`` gives the use cases, or raises why there are none."""

    async def lock_snapshot(caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        request = LockRequest(p["LockMode"], p.get("LockDuration"), p.get("ExpirationDate"), p.get("CoolOffPeriod"))
        return await locks().lock(caller, p["SnapshotId"], request)

    async def unlock_snapshot(caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {"SnapshotId": await locks().unlock(caller, p["SnapshotId"])}

    async def describe_locked_snapshots(caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        found, token = await locks().describe(
            caller, p.get("SnapshotIds"), p.get("Filters") or (), p.get("MaxResults"), p.get("NextToken")
        )
        return {"Snapshots": found, **({} if token is None else {"NextToken": token})}

    return {
        "LockSnapshot": lock_snapshot,
        "UnlockSnapshot": unlock_snapshot,
        "DescribeLockedSnapshots": describe_locked_snapshots,
    }
