"""Locks of snapshots: how one is made, changed and ended, and what it keeps anybody from doing. Pure.

Source: https://docs.aws.amazon.com/ebs/latest/userguide/ebs-snapshot-lock.html and LockSnapshot of the API reference:
a lock lasts LockDuration days or until ExpirationDate. In governance mode who has the right (here: an administrator)
may shorten and remove it. In compliance mode nobody may, once the cooling-off period is over; then it can only be
extended.
While the host's clock is not to be trusted (``domain.clockwatch``) a lock is taken for the stricter of what it may be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from ebsd.domain.errors import (
    InvalidParameterCombination,
    InvalidParameterValue,
    MissingParameter,
    SnapshotLocked,
    UnauthorizedOperation,
)
from ebsd.domain.ids import SnapshotId
from ebsd.domain.states import LockEvent, LockState, next_lock_state
from ebsd.domain.times import parse_time, plus, seconds_between

GOVERNANCE: Final = "governance"
COMPLIANCE: Final = "compliance"
MAX_DAYS: Final = 36500
MAX_COOL_OFF: Final = 72
"""Hours."""

DAY: Final = 86400
HOUR: Final = 3600


@dataclass(frozen=True, slots=True)
class Lock:
    """The lock of a snapshot. Times: RFC 3339."""

    snapshot: SnapshotId
    state: LockState
    days: int
    """LockDuration; of one with an expiration date the days to it, rounded up."""
    cool_off: int | None
    """Hours."""
    created: str
    started: str | None
    """LockDurationStartTime: when the snapshot was completed, if that was later than the lock. None until then."""
    expires: str | None
    """None while it is not known: a duration begins when the snapshot is completed."""
    cool_off_expires: str | None


@dataclass(frozen=True, slots=True)
class LockRequest:
    """The parameters of LockSnapshot."""

    mode: str
    days: int | None
    until: str | None
    cool_off: int | None


def checked(request: LockRequest, now: str) -> LockRequest:
    """Return the request with its date as text of the catalog. Raises what EC2 says of impossible parameters."""
    if request.mode not in (GOVERNANCE, COMPLIANCE):
        raise InvalidParameterValue(value=request.mode, parameter="LockMode", reason="it is governance or compliance")
    if request.days is not None and request.until is not None:
        raise InvalidParameterCombination(reason="LockDuration and ExpirationDate cannot be given together")
    if request.days is None and request.until is None:
        raise MissingParameter(parameter="LockDuration or ExpirationDate")
    if request.days is not None and not 1 <= request.days <= MAX_DAYS:
        raise InvalidParameterValue(
            value=request.days, parameter="LockDuration", reason=f"it is from 1 to {MAX_DAYS} days"
        )
    if request.cool_off is not None:
        if request.mode != COMPLIANCE:
            raise InvalidParameterCombination(reason="CoolOffPeriod is for compliance mode only")
        if not 1 <= request.cool_off <= MAX_COOL_OFF:
            reason = f"it is from 1 to {MAX_COOL_OFF} hours"
            raise InvalidParameterValue(value=request.cool_off, parameter="CoolOffPeriod", reason=reason)
    if request.until is None:
        return request
    until = parse_time(request.until, "ExpirationDate")
    if not 0 < seconds_between(now, until) <= MAX_DAYS * DAY:
        reason = f"it is in the future, within {MAX_DAYS} days"
        raise InvalidParameterValue(value=until, parameter="ExpirationDate", reason=reason)
    return replace(request, until=until)


def decide_lock(
    snapshot: SnapshotId,
    present: Lock | None,
    request: LockRequest,
    *,
    now: str,
    completed: str | None,
    even: bool,
    is_admin: bool,
) -> Lock:
    """Return the lock after LockSnapshot. ``completed``: when the snapshot was, None while it is pending.

    Raises the errors of ``checked``, SnapshotLocked for what compliance mode does not allow, UnauthorizedOperation for
    a weaker lock in governance mode that no administrator asks for.
    """
    request = checked(request, now)
    state = None if present is None else strict_state(present, now, even=even)
    if present is None or state is LockState.EXPIRED:
        created, started = now, None if completed is None else now
    else:  # LockDuration counts from where it began, or asking for it once more would extend it
        created, started = present.created, present.started
    expires = request.until
    if request.days is not None and started is not None:
        expires = plus(started, request.days * DAY)
        if expires <= now:
            reason = f"it began at {started}, and would be over"
            raise InvalidParameterValue(value=request.days, parameter="LockDuration", reason=reason)
    days = request.days if request.days is not None else math.ceil(seconds_between(now, expires or now) / DAY)
    if present is not None and state is not LockState.EXPIRED:
        _check_change(present, state, request, _shorter(present, days, expires), is_admin=is_admin)
    return Lock(
        snapshot=snapshot,
        state=_required(snapshot, state, _event(request)),
        days=days,
        cool_off=request.cool_off,
        created=created,
        started=started,
        expires=expires,
        cool_off_expires=None if request.cool_off is None else plus(now, request.cool_off * HOUR),
    )


def _event(request: LockRequest) -> LockEvent:
    if request.mode == GOVERNANCE:
        return LockEvent.GOVERN
    return LockEvent.COMPLY if request.cool_off is None else LockEvent.COOL_OFF


def _shorter(present: Lock, days: int, expires: str | None) -> bool:
    if present.expires is None or expires is None:
        return not (present.expires is None and expires is None and days >= present.days)
    return expires < present.expires


def _check_change(
    present: Lock, state: LockState | None, request: LockRequest, shorter: bool, *, is_admin: bool
) -> None:
    if state is LockState.COMPLIANCE and (shorter or _event(request) is not LockEvent.COMPLY):
        raise _locked(present, "In compliance mode a lock can only be extended, by anybody.")
    # A cooling-off period would let its owner unlock what only an administrator may.
    if state is LockState.GOVERNANCE and (shorter or request.cool_off is not None) and not is_admin:
        raise UnauthorizedOperation(reason="only an administrator may weaken a lock in governance mode")


def is_later(time: str | None, now: str) -> bool:
    return time is None or time > now


def strict_state(lock: Lock, now: str, *, even: bool) -> LockState:
    """Return the strictest state that a lock may be in: it ends by a clock that is to be trusted only."""
    state = advanced(lock, now).state if even else lock.state
    if state is LockState.COMPLIANCE_COOLOFF and not is_later(lock.cool_off_expires, now):
        return LockState.COMPLIANCE
    return state


def advanced(lock: Lock, now: str) -> Lock:
    """Return the lock with what has passed by a clock that is to be trusted: the cooling-off period, or all of it."""
    state = lock.state
    if state is LockState.COMPLIANCE_COOLOFF and not is_later(lock.cool_off_expires, now):
        state = _required(lock.snapshot, state, LockEvent.COOLED)
    if state is not LockState.EXPIRED and not is_later(lock.expires, now):
        state = _required(lock.snapshot, state, LockEvent.EXPIRE)
    return replace(lock, state=state)


def _required(snapshot: SnapshotId, state: LockState | None, event: LockEvent) -> LockState:
    following = next_lock_state(snapshot, state, event)
    if following is None:
        raise AssertionError(f"BUG: {event} ends no lock")
    return following


def started_at(lock: Lock, completed: str) -> Lock:
    """Return the lock of a snapshot that was pending and is completed now: its duration begins."""
    if lock.started is not None:
        return lock
    return replace(lock, started=completed, expires=lock.expires or plus(completed, lock.days * DAY))


def check_unlock(lock: Lock, *, now: str, even: bool, is_admin: bool) -> None:
    """Raise SnapshotLocked or UnauthorizedOperation where UnlockSnapshot is not allowed."""
    state = strict_state(lock, now, even=even)
    if state is LockState.COMPLIANCE:
        raise _locked(lock, "In compliance mode nobody can unlock it after its cooling-off period.")
    if state is LockState.GOVERNANCE and not is_admin:
        raise UnauthorizedOperation(reason="only an administrator may unlock a snapshot in governance mode")


def check_deletion(lock: Lock | None, *, now: str, even: bool) -> None:
    """Raise SnapshotLocked for a snapshot that must not be deleted, whoever asks."""
    if lock is None:
        return
    state = strict_state(lock, now, even=even)
    if state is LockState.EXPIRED:
        return
    if not is_later(lock.expires, now):
        raise _locked(
            lock, "Its time is over by a clock that has not gone evenly for an hour yet; try again after that."
        )
    raise _locked(lock, _HINTS[state])


_HINTS: Final = {
    LockState.GOVERNANCE: "An administrator can unlock it: ebsctl unlock {snapshot}",
    LockState.COMPLIANCE_COOLOFF: "While it cools off it can be unlocked: ebsctl unlock {snapshot}",
    LockState.COMPLIANCE: "In compliance mode nobody can delete it before that, administrators included.",
}


def _locked(lock: Lock, hint: str) -> SnapshotLocked:
    error = SnapshotLocked(snapshot=lock.snapshot, state=lock.state.value, until=lock.expires or "its end")
    error.hint = hint.format(snapshot=lock.snapshot)
    return error
