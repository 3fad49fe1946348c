"""Snapshot schedules: when a run is due, and which of the snapshots that a schedule made may go. Pure.

Modelled on the snapshot schedule of Storage Gateway (StartAt, RecurrenceInHours) and on the schedules and retention
rules of Data Lifecycle Manager
(https://docs.aws.amazon.com/ebs/latest/userguide/snapshot-ami-policy.html). Times are UTC and seconds since 1970.

1. Time is cut into slots; a slot has one run. Whatever was missed while ebsd did not run, or while the clock jumped
   forward, is made up by one run, of the present slot.
2. A clock that was set back by more than a slot begins anew where it is: neither a burst nor a silence of years.
3. A snapshot goes only when every retention rule of its schedule lets it go, and never the newest one that is good.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from ebsd.domain.errors import InvalidParameterCombination, InvalidParameterValue, MissingParameter
from ebsd.domain.ids import AccountId, SnapshotId, VolumeId

MINUTE: Final = 60
DAY: Final = 86400
MAX_EVERY: Final = 366 * DAY
MAX_TIMES: Final = 24
"""Times of the day of one schedule."""
MAX_KEPT: Final = 10_000
MAX_AGE: Final = 100 * 366 * DAY
MAX_SCHEDULES: Final = 100
"""Of one account: DLM's limit of policies per Region."""
MAX_NAME: Final = 63


class RunState(StrEnum):
    """How the last run of a schedule ended."""

    COMPLETED = "completed"
    SKIPPED = "skipped"
    """Nothing has changed, nothing to take, or no space: the message says which."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Timing:
    """When runs are due: every so many seconds from midnight 1970 on, or at times of the day."""

    every: int
    """0: at ``at``."""
    at: tuple[int, ...]
    """Seconds since midnight, ascending."""

    def slot(self, now: int) -> int:
        """Return the beginning of the slot that ``now`` lies in."""
        if self.every:
            return now // self.every * self.every
        midnight = now // DAY * DAY
        before = bisect_right(self.at, now - midnight)
        return midnight + self.at[before - 1] if before else midnight - DAY + self.at[-1]

    def next_slot(self, now: int) -> int:
        """Return the beginning of the slot after that of ``now``."""
        if self.every:
            return self.slot(now) + self.every
        midnight = now // DAY * DAY
        before = bisect_right(self.at, now - midnight)
        return midnight + self.at[before] if before < len(self.at) else midnight + DAY + self.at[0]


def parse_timing(every: int | None, at: Sequence[str] | None) -> Timing:
    """Return the timing of EverySeconds or of Times (HH:MM); raises the errors of a parameter."""
    if every is not None and at:
        raise InvalidParameterCombination(reason="EverySeconds and Times cannot be given together")
    if every is not None:
        if not MINUTE <= every <= MAX_EVERY or every % MINUTE:
            raise InvalidParameterValue(
                value=every, parameter="EverySeconds", reason="it is a number of whole minutes, up to 366 days"
            )
        return Timing(every, ())
    if not at:
        raise MissingParameter(parameter="EverySeconds or Times")
    if len(at) > MAX_TIMES:
        raise InvalidParameterValue(value=len(at), parameter="Times", reason=f"there are at most {MAX_TIMES}")
    return Timing(0, tuple(sorted({_time_of_day(text) for text in at})))


def _time_of_day(text: str) -> int:
    hours, colon, minutes = text.partition(":")
    digits = len(hours) == len(minutes) == 2 and (hours + minutes).isascii() and (hours + minutes).isdigit()
    if not colon or not digits or int(hours) > 23 or int(minutes) > 59:
        raise InvalidParameterValue(value=text, parameter="Times", reason="write a time of the day (UTC) as 02:30")
    return int(hours) * 3600 + int(minutes) * 60


@dataclass(frozen=True, slots=True)
class Retention:
    """What a schedule keeps: None for a rule that there is not; without any, everything."""

    count: int | None
    """The newest so many of each volume."""
    seconds: int | None
    """What is younger than this."""


def parse_retention(count: int | None, seconds: int | None) -> Retention:
    """Return the retention of RetainCount and RetainSeconds; raises InvalidParameterValue."""
    if count is not None and not 1 <= count <= MAX_KEPT:
        raise InvalidParameterValue(value=count, parameter="RetainCount", reason=f"it is 1 to {MAX_KEPT}")
    if seconds is not None and not MINUTE <= seconds <= MAX_AGE:
        raise InvalidParameterValue(value=seconds, parameter="RetainSeconds", reason="it is a minute to 100 years")
    return Retention(count, seconds)


@dataclass(frozen=True, slots=True)
class Run:
    """How the last run ended."""

    time: str
    state: RunState
    message: str
    """Why it was skipped or failed, or what went wrong beside; empty otherwise."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule of the catalog. Exactly one of volume and tag says what it takes snapshots of."""

    id: str
    account: AccountId
    owner: str
    name: str
    volume: VolumeId | None
    tag: tuple[str, str] | None
    """Volumes of the account with this tag, at one moment; they are looked for at each run."""
    timing: Timing
    retention: Retention
    prefix: str
    """What names of snapshots begin with; empty: with the volume's name."""
    paused: bool
    handled: int
    """The beginning of the last slot that had its run, or needs none."""
    created: str
    last: Run | None = None


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be done with a schedule now."""

    run: bool
    handled: int
    """Where it stands afterwards."""


def decide(schedule: Schedule, now: int) -> Due:
    """Say whether a run is due now."""
    slot = schedule.timing.slot(now)
    if slot > schedule.handled:
        # What a paused schedule misses it does not make up.
        return Due(run=not schedule.paused, handled=slot)
    if schedule.timing.next_slot(slot) < schedule.handled:
        return Due(run=False, handled=slot)  # the clock was set back
    return Due(run=False, handled=schedule.handled)


@dataclass(frozen=True, slots=True)
class Kept:
    """A completed snapshot that a schedule made of one volume."""

    id: SnapshotId
    taken: int
    good: bool
    """No verification found damage."""
    locked: bool


def expired(made: Sequence[Kept], retention: Retention, now: int, *, clock_is_even: bool) -> list[SnapshotId]:
    """Return those that may go, of one volume, oldest first; ``made`` in the order in which they were taken.

    A clock that jumped says nothing about ages: then nothing goes by age, and what has both rules stays.
    """
    if retention.count is None and retention.seconds is None:
        return []
    good = [each.id for each in made if each.good]
    last_good = good[-1] if good else None
    old = made[: -retention.count] if retention.count is not None else made
    return [
        each.id
        for each in old
        if each.id != last_good
        and each.id != made[-1].id
        and not each.locked
        and (retention.seconds is None or (clock_is_even and now - each.taken > retention.seconds))
    ]


def snapshot_name(schedule: Schedule, volume: str, now: str) -> str:
    """Return the name of a snapshot of a volume (its name) that a run takes now (RFC 3339 UTC); names sort by time."""
    stamp = now.replace("-", "").replace(":", "")
    parts = [schedule.prefix or volume]
    if schedule.prefix and schedule.tag is not None:
        parts.append(volume)
    base = "-".join(parts)
    return f"{base[: MAX_NAME - 1 - len(stamp)]}-{stamp}"


def seconds_of(time: str) -> int:
    """Return seconds since 1970 of an RFC 3339 UTC time of whole seconds."""
    return int(datetime.strptime(time, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp())


def time_of(seconds: int) -> str:
    """Return the RFC 3339 UTC time of seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
