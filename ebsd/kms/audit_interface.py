"""io.ebsd.Audit on keys.sock: looking at the audit log, and handing it over for verification.

Users see the records that concern their account; administrators see all, and only they get the log itself.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any

import trio

from ebsd.domain.errors import IncorrectState, InvalidParameterValue, NeedsRoot
from ebsd.ipc.peer import caller_of
from ebsd.ipc.varlink_server import Call, Handler, Reply
from ebsd.kms.audit import keys
from ebsd.kms.audit.reader import MAX_RESULTS, Page, Query, read_page
from ebsd.kms.audit.trail import Trail
from ebsd.kms.descriptors import Descriptors


class AuditInterface:
    """The handlers; ``handlers`` maps method names to them."""

    def __init__(self, trail: Trail, descriptors: Descriptors, admin_uid: int) -> None:
        self._trail = trail
        self._descriptors = descriptors
        self._admin_uid = admin_uid

    def handlers(self) -> dict[str, Handler]:
        return {
            "LookupEvents": self._lookup_events,
            "GetLog": self._get_log,
            "OpenSegment": self._open_segment,
            "TakeVerificationKey": self._take_verification_key,
        }

    async def _lookup_events(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        caller = await trio.to_thread.run_sync(caller_of, call.peer, self._admin_uid)
        limit = MAX_RESULTS if p.get("MaxResults") is None else p["MaxResults"]
        if not 1 <= limit <= MAX_RESULTS:
            raise _invalid(limit, "MaxResults", f"it is not between 1 and {MAX_RESULTS}")
        query = Query(
            None if caller.is_admin else caller.account,
            (p.get("KeyId") or "").rpartition("/")[2] or None,
            p.get("ResourceId"),
            p.get("EventName"),
            p.get("Username"),
            _time(p.get("StartTime")),
            bool(p.get("ErrorsOnly")),
        )
        page = await self._page(p.get("NextToken"), query, limit)
        return {
            "Events": [{"Number": number, "CloudTrailEvent": text} for number, text in page.records],
            "NextToken": page.position,
            "Complete": page.complete,
        }

    async def _page(self, position: str | None, query: Query, limit: int) -> Page:
        count, segments = self._trail.log.head.count, self._trail.log.segments()
        return await trio.to_thread.run_sync(read_page, segments, position, count, query, limit)

    # --- for administrators ---------------------------------------------------------------------------------

    def _refuse_others(self, call: Call, operation: str) -> None:
        if not caller_of(call.peer, self._admin_uid).is_admin:
            raise NeedsRoot(operation=operation, remedy="Ask an administrator of this host.")

    async def _get_log(self, call: Call) -> dict[str, Any]:
        self._refuse_others(call, "Verification of the audit log")
        log = self._trail.log
        return {
            "Head": str(log.head),
            "Directory": str(log.directory),
            "Segments": [path.name for path in log.segments()],
            "VerificationKeyPresent": keys.is_here(log.directory),
        }

    async def _open_segment(self, call: Call) -> Reply:
        self._refuse_others(call, "Verification of the audit log")
        name = call.parameters["Name"]
        for path in self._trail.log.segments():
            if path.name == name:
                return Reply({"Descriptor": 0}, [os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)])
        raise _invalid(name[:64], "Name", "the audit log has no such segment")

    async def _take_verification_key(self, call: Call) -> None:
        self._refuse_others(call, "Taking the verification key away")
        directory = self._trail.log.directory
        try:
            text = keys.read_text(directory)
        except FileNotFoundError as exc:
            raise IncorrectState(reason="The verification key of the audit log was taken away already") from exc
        try:
            fd = call.take_fd(call.parameters["Destination"])
            # A copy that nobody can wipe, of something that leaves this host now.
            await self._descriptors.write(fd, bytes(text), call.peer.uid, "Destination")
        finally:
            text[:] = bytes(len(text))
        await trio.to_thread.run_sync(keys.destroy, directory)


def _time(text: str | None) -> str | None:
    """Return a time as records have it."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise _invalid(text[:64], "StartTime", "it is no RFC 3339 time") from exc
    if moment.tzinfo is None:
        raise _invalid(text[:64], "StartTime", "it has no time zone")
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _invalid(value: object, parameter: str, reason: str) -> InvalidParameterValue:
    return InvalidParameterValue(value=value, parameter=parameter, reason=reason)
