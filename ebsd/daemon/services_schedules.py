"""Methods of io.ebsd.Control on snapshot schedules."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ebsd.control.schedules import ScheduleRequest, Schedules
from ebsd.domain.model import Caller
from ebsd.domain.schedules import parse_retention, parse_timing

Method = Callable[[Caller, dict[str, Any]], Awaitable[dict[str, Any]]]


def schedule_methods(schedules: Callable[[], Schedules]) -> dict[str, Method]:
    """Return method -> handler; ``schedules`` returns the use cases, or raises why there are none now."""

    async def create(caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        tag = p.get("TargetTag")
        request = ScheduleRequest(
            name=p["Name"],
            volume=p.get("VolumeId"),
            tag=None if tag is None else (tag["Key"], tag.get("Value") or ""),
            timing=parse_timing(p.get("EverySeconds"), p.get("Times")),
            retention=parse_retention(p.get("RetainCount"), p.get("RetainSeconds")),
            prefix=p.get("NamePrefix") or "",
        )
        return {"Schedule": await schedules().create(caller, request)}

    async def describe(caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {"Schedules": await schedules().describe(caller, p.get("ScheduleIds"))}

    async def delete(caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {"ScheduleId": await schedules().delete(caller, p["ScheduleId"])}

    async def pause(caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {"Schedule": await schedules().pause(caller, p["ScheduleId"], paused=p["Paused"])}

    async def run(caller: Caller, p: dict[str, Any]) -> dict[str, Any]:
        return {"Schedule": await schedules().run(caller, p["ScheduleId"])}

    return {
        "CreateSchedule": create,
        "DescribeSchedules": describe,
        "DeleteSchedule": delete,
        "PauseSchedule": pause,
        "RunSchedule": run,
    }
