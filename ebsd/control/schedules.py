"""Snapshot schedules: made and shown, run by ebsd itself, one after the other, and what they made given up in time.

A run takes all its volumes at one moment. It is skipped when none of them has changed since the schedule's last
snapshots, or when space is short. What it makes is noted in the transaction of its row, so a schedule knows its own
after every crash, and deletes nothing else. The slot is marked as handled behind the run: one that was cut is made
again, and finds nothing changed when it had come to its end.

A schedule whose volume is gone stays, takes nothing and deletes nothing: what it made may be the only copy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from ebsd.control.catalogue import Catalogue
from ebsd.control.host import Host
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.snapshot_sets import SetRequest, SnapshotSets, is_there
from ebsd.control.snapshots import Snapshots, check_can_be_taken
from ebsd.control.volume_link import VolumeLink
from ebsd.domain.errors import (
    EbsdError,
    InvalidParameterCombination,
    InvalidParameterValue,
    MissingParameter,
    NoSpace,
    SnapshotLimitExceeded,
    SnapshotLocked,
    SnapshotNotFound,
)
from ebsd.domain.ids import ID_RANDOM_BYTES, SnapshotId, VolumeId, new_id, parse_name, uid_of_account
from ebsd.domain.model import Caller, Snapshot, Volume
from ebsd.domain.schedules import (
    MAX_SCHEDULES,
    Kept,
    Retention,
    Run,
    RunState,
    Schedule,
    Timing,
    decide,
    expired,
    seconds_of,
    snapshot_name,
    time_of,
)
from ebsd.domain.states import LockState, SnapshotState
from ebsd.domain.tags import check_tag
from ebsd.ipc.incidents import as_ebsd_error, log_incident
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 30.0
"""How often the wall clock is looked at, at least: it may jump."""

_NO_ROOM: Final = (NoSpace, SnapshotLimitExceeded)
"""What skips a run: on the disk, or by the limits of the account."""

_LOCKED: Final = (LockState.GOVERNANCE, LockState.COMPLIANCE, LockState.COMPLIANCE_COOLOFF)


@dataclass(frozen=True, slots=True)
class ScheduleRequest:
    """The parameters of CreateSchedule after parsing."""

    name: str
    volume: str | None
    tag: tuple[str, str] | None
    timing: Timing
    retention: Retention
    prefix: str


class Schedules:
    """Use cases on schedules, and the task that runs them."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        snapshots: Snapshots,
        sets: SnapshotSets,
        files: SnapshotFiles,
        links: Mapping[VolumeId, VolumeLink],
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._snapshots = snapshots
        self._sets = sets
        self._files = files
        self._links = links
        self._running = trio.Lock()
        """Runs are made one after the other: many schedules at one time of the day must not be many loads at once."""
        self._wake = trio.Event()

    # --- requests

    async def create(self, caller: Caller, request: ScheduleRequest) -> dict[str, Any]:
        """Make a schedule; its first run is at its next time."""
        name = parse_name(request.name)
        if request.prefix:
            parse_name(request.prefix)
        if (request.volume is None) is (request.tag is None):
            raise (
                MissingParameter(parameter="VolumeId or TargetTag")
                if request.volume is None
                else InvalidParameterCombination(reason="VolumeId and TargetTag cannot be given together")
            )
        if request.tag is not None:
            check_tag(*request.tag)
        now = self._host.now()

        def make(t: Transaction) -> Schedule:
            volume = None if request.volume is None else t.find_volume(caller, request.volume)
            account, owner = (caller.account, caller.name) if volume is None else (volume.account, volume.owner)
            if len(t.schedules(account)) >= MAX_SCHEDULES:
                raise InvalidParameterValue(
                    value=name,
                    parameter="Name",
                    reason=f"the account has {MAX_SCHEDULES} schedules, which is the limit",
                )
            schedule = Schedule(
                id=new_id("sched", self._host.random(ID_RANDOM_BYTES)),
                account=account,
                owner=owner,
                name=name,
                volume=None if volume is None else volume.id,
                tag=request.tag,
                timing=request.timing,
                retention=request.retention,
                prefix=request.prefix,
                paused=False,
                handled=request.timing.slot(seconds_of(now)),
                created=now,
            )
            t.add_schedule(schedule)
            return schedule

        schedule = await self._catalogue.run(make)
        self._wake.set()
        return self._described(schedule, {})

    async def describe(self, caller: Caller, names: Sequence[str] | None) -> list[dict[str, Any]]:
        """Return schedules by name, the caller's or, of an administrator, all; an unknown one fails the call."""

        def load(t: Transaction) -> list[tuple[Schedule, Mapping[VolumeId, list[SnapshotId]]]]:
            if names is None:
                found = t.schedules(None if caller.is_admin else caller.account)
            else:
                found = [t.find_schedule(caller, name) for name in names]
            return [(schedule, t.scheduled(schedule.id)) for schedule in found]

        return [self._described(schedule, made) for schedule, made in await self._catalogue.run(load)]

    async def delete(self, caller: Caller, name: str) -> str:
        """Delete a schedule; the snapshots that it made stay."""

        def forget(t: Transaction) -> str:
            ident = t.find_schedule(caller, name).id
            t.remove_schedule(ident)
            return ident

        async with self._running:
            return await self._catalogue.run(forget)

    async def pause(self, caller: Caller, name: str, *, paused: bool) -> dict[str, Any]:
        """Let a schedule rest, or go on; what it missed while it rested is not made up."""

        def change(t: Transaction) -> None:
            schedule = t.find_schedule(caller, name)
            t.pause_schedule(schedule.id, paused)
            t.set_handled(schedule.id, schedule.timing.slot(seconds_of(self._host.now())))

        await self._catalogue.run(change)
        self._wake.set()
        return (await self.describe(caller, [name]))[0]

    async def run(self, caller: Caller, name: str) -> dict[str, Any]:
        """Make a run now, whatever the time is and whether it is paused; how it ended is in the answer."""
        async with self._running:
            schedule = await self._catalogue.run(lambda t: t.find_schedule(caller, name))
            await self._run(schedule, schedule.handled)
            return (await self.describe(caller, [schedule.id]))[0]

    # --- the task

    async def tend(self) -> None:
        """Make the runs that are due, for as long as ebsd serves."""
        while True:
            self._wake = trio.Event()
            pause = LOOK_SECONDS
            try:
                pause = await self.look()
            except (EbsdError, OSError) as exc:
                log.error("schedules cannot be looked at now: %s", exc)
            with trio.move_on_after(pause):
                await self._wake.wait()

    async def look(self) -> float:
        """Make the runs that are due now; returns the seconds to the next look."""
        for ident in await self._catalogue.run(lambda t: [schedule.id for schedule in t.schedules()]):
            async with self._running:
                await self._look_at(ident)
        now = seconds_of(self._host.now())
        rows = await self._catalogue.run(lambda t: t.schedules())
        soon = min((s.timing.next_slot(now) - now for s in rows if not s.paused), default=LOOK_SECONDS)
        return min(LOOK_SECONDS, max(soon, 1.0))

    async def _look_at(self, ident: str) -> None:
        schedule = await self._catalogue.run(lambda t: t.schedule(ident))
        if schedule is None:
            return
        due = decide(schedule, seconds_of(self._host.now()))
        if due.run:
            await self._run(schedule, due.handled)
        elif due.handled != schedule.handled:
            await self._catalogue.run(lambda t: t.set_handled(ident, due.handled))

    async def _run(self, schedule: Schedule, handled: int) -> None:
        """Make one run, and note how it ended; raises nothing that is about this schedule alone."""
        now = self._host.now()
        try:
            run = await self._made(schedule, now)
        except Exception as exc:  # noqa: BLE001 - a bug in one run must not end ebsd, and again at each start
            error = as_ebsd_error(exc, log_incident)
            run = Run(now, RunState.SKIPPED if isinstance(error, _NO_ROOM) else RunState.FAILED, error.message)
        level = logging.WARNING if run.message else logging.INFO
        log.log(level, "schedule %s (%s): %s %s", schedule.name, schedule.id, run.state.value, run.message)

        def note(t: Transaction) -> None:
            t.note_run(schedule.id, run)
            t.set_handled(schedule.id, handled)

        await self._catalogue.run(note)

    async def _made(self, schedule: Schedule, now: str) -> Run:
        volumes, left_out = await self._catalogue.run(lambda t: _targets(t, schedule))
        told = [f"left out: {reason}" for reason in left_out]
        if not volumes:
            return Run(now, RunState.SKIPPED, "; ".join([*told, "there is no volume to take a snapshot of"]))
        made = await self._catalogue.run(lambda t: t.scheduled(schedule.id))
        changed = False
        for volume in volumes:
            changed = changed or await self._has_changed(volume, made.get(volume.id, []))
        state = RunState.COMPLETED if changed else RunState.SKIPPED
        if changed:
            await self._take(schedule, volumes, now)
        else:
            told.append("nothing has changed since the last snapshot")
        told += await self._expire(schedule, [volume.id for volume in volumes], now)
        return Run(now, state, "; ".join(told))

    async def _has_changed(self, volume: Volume, made: Sequence[SnapshotId]) -> bool:
        """Compare the map of a volume with that of the last snapshot: each write since then changed an entry.

        After a snapshot a volume writes to a new layer, which no earlier map names. O(map), no data is read.
        """
        last = await self._catalogue.run(lambda t: _last_completed(t, made))
        if last is None:
            return True
        link = self._links.get(volume.id)
        if link is not None and volume.attachment is not None and not volume.attachment.read_only:
            await link.flush()
        return not await trio.to_thread.run_sync(self._files.has_same_map, volume.id, last)

    async def _take(self, schedule: Schedule, volumes: Sequence[Volume], now: str) -> None:
        def note(t: Transaction, snapshot: Snapshot) -> None:
            t.add_scheduled(schedule.id, snapshot.id, snapshot.volume)

        request = SetRequest(
            volumes=[volume.id for volume in volumes],
            all_attached=False,
            target_tags={},
            excluded=(),
            name=lambda volume: snapshot_name(schedule, volume.name, now),
            description=f"schedule {schedule.name}",
            tags={},
            copy_tags=True,
            note=note,
        )
        await self._sets.create(_owner_of(schedule), request)

    async def _expire(self, schedule: Schedule, volumes: Sequence[VolumeId], now: str) -> list[str]:
        """Delete what the retention lets go, of volumes that this run looked at; returns what could not be deleted."""

        def choose(t: Transaction) -> list[SnapshotId]:
            made = t.scheduled(schedule.id)
            chosen: list[SnapshotId] = []
            for volume in volumes:
                kept = [found for each in made.get(volume, []) if (found := _kept(t, each)) is not None]
                chosen += expired(kept, schedule.retention, seconds_of(now), clock_is_even=self._host.clock_is_even())
            return chosen

        failed = []
        for ident in await self._catalogue.run(choose):
            try:
                await self._snapshots.delete(_owner_of(schedule), ident)
                log.info("schedule %s: %s deleted", schedule.name, ident)
            except (SnapshotNotFound, SnapshotLocked):
                continue
            except (EbsdError, OSError) as exc:
                failed.append(f"{ident} could not be deleted: {exc}")
        return failed

    # --- views

    def _described(self, schedule: Schedule, made: Mapping[VolumeId, list[SnapshotId]]) -> dict[str, Any]:
        """Return the Schedule of io.ebsd.Control."""
        now = seconds_of(self._host.now())
        described: dict[str, Any] = {
            "ScheduleId": schedule.id,
            "Name": schedule.name,
            "OwnerId": schedule.account,
            "State": "paused" if schedule.paused else "active",
            "NamePrefix": schedule.prefix,
            "CreateTime": schedule.created,
            "SnapshotIds": [ident for idents in made.values() for ident in idents],
        }
        if schedule.volume is not None:
            described["VolumeId"] = schedule.volume
        if schedule.tag is not None:
            described["TargetTag"] = {"Key": schedule.tag[0], "Value": schedule.tag[1]}
        if schedule.timing.every:
            described["EverySeconds"] = schedule.timing.every
        else:
            described["Times"] = [f"{at // 3600:02}:{at % 3600 // 60:02}" for at in schedule.timing.at]
        if schedule.retention.count is not None:
            described["RetainCount"] = schedule.retention.count
        if schedule.retention.seconds is not None:
            described["RetainSeconds"] = schedule.retention.seconds
        if not schedule.paused:
            described["NextRunTime"] = time_of(schedule.timing.next_slot(now))
        if schedule.last is not None:
            described |= {"LastRunTime": schedule.last.time, "LastRunState": schedule.last.state.value}
            if schedule.last.message:
                described["LastRunMessage"] = schedule.last.message
        return described


def _targets(t: Transaction, schedule: Schedule) -> tuple[list[Volume], list[str]]:
    """Return the volumes of a run, and why others of a tag are left out: one that is broken must not stop the rest.

    Raises VolumeNotFound when the volume is gone, IncorrectVolumeState when no snapshot can be taken of it.
    """
    if schedule.volume is not None:
        volume = t.volume(schedule.volume)
        check_can_be_taken(volume)
        return [volume], []
    chosen, left_out = [], []
    for volume in t.volumes(schedule.account):
        if schedule.tag is not None and schedule.tag in volume.tags.items() and is_there(volume):
            try:
                check_can_be_taken(volume)
                chosen.append(volume)
            except EbsdError as exc:
                left_out.append(exc.message.rstrip("."))
    return chosen, left_out


def _last_completed(t: Transaction, made: Sequence[SnapshotId]) -> SnapshotId | None:
    for ident in reversed(made):
        if (found := _kept(t, ident)) is not None:
            return ident if found.good else None
    return None


def _kept(t: Transaction, ident: SnapshotId) -> Kept | None:
    snapshot = t.snapshot(ident)
    if snapshot.state is not SnapshotState.COMPLETED:
        return None
    lock = t.lock_of(ident)
    damaged = snapshot.verification is not None and snapshot.verification.is_damaged
    return Kept(ident, seconds_of(snapshot.started), not damaged, lock is not None and lock.state in _LOCKED)


def _owner_of(schedule: Schedule) -> Caller:
    return Caller(uid_of_account(schedule.account), schedule.owner, schedule.account, is_admin=False)
