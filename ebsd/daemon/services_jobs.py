"""Methods of io.ebsd.Control on jobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ebsd.control.describe import describe_job
from ebsd.control.jobs import Jobs
from ebsd.domain.states import JobState
from ebsd.ipc.peer import caller_of
from ebsd.ipc.varlink_server import Call, Handler


class JobMethods:
    """The handlers; each asks for the use cases anew, which are not there in rescue mode."""

    def __init__(self, jobs: Callable[[], Jobs], admin_uid: int) -> None:
        self._jobs = jobs
        self._admin_uid = admin_uid

    def table(self) -> dict[str, Handler]:
        """Return method -> handler."""
        return {
            "DescribeJobs": self._describe,
            "WaitJob": self._wait,
            "CancelJob": self._cancel,
            "LimitJob": self._limit,
            "ResumeJob": self._resume,
        }

    async def _describe(self, call: Call) -> dict[str, Any]:
        caller = caller_of(call.peer, self._admin_uid)
        p = call.parameters
        views = await self._jobs().describe(caller, p.get("JobIds"), p.get("Filters") or ())
        return {"Jobs": [describe_job(view) for view in views]}

    async def _wait(self, call: Call) -> dict[str, Any]:
        view = None
        async for view in self._jobs().watch(caller_of(call.peer, self._admin_uid), call.parameters["JobId"]):
            if view.job.state is JobState.RUNNING:
                await call.stream({"Job": describe_job(view)})
        if view is None:
            raise AssertionError("BUG: a watch yields at least once")
        return {"Job": describe_job(view)}

    async def _cancel(self, call: Call) -> dict[str, Any]:
        caller = caller_of(call.peer, self._admin_uid)
        return {"Job": describe_job(await self._jobs().cancel(caller, call.parameters["JobId"]))}

    async def _limit(self, call: Call) -> dict[str, Any]:
        caller, p = caller_of(call.peer, self._admin_uid), call.parameters
        return {"Job": describe_job(await self._jobs().limit(caller, p["JobId"], p.get("Rate")))}

    async def _resume(self, call: Call) -> dict[str, Any]:
        caller, p = caller_of(call.peer, self._admin_uid), call.parameters
        jobs = self._jobs()
        given = [call.take_fd(index) for index in p.get("Descriptors") or []]
        return {"Job": describe_job(await jobs.resume(caller, p["JobId"], given))}
