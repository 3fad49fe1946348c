"""Snapshot schedules in the catalog, and which snapshots each of them made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ebsd.domain.errors import ScheduleNameInUse, ScheduleNotFound
from ebsd.domain.ids import AccountId, SnapshotId, VolumeId
from ebsd.domain.model import Caller
from ebsd.domain.schedules import Retention, Run, RunState, Schedule, Timing
from ebsd.store.catalog_rows import Rows

_COLUMNS = (
    "id, account, owner, name, volume, tag_key, tag_value, every, at, keep_count, keep_seconds, prefix, paused, "
    "handled, created, last_time, last_state, last_message"
)


class ScheduleRows(Rows):
    """Rows of ``schedule`` and ``schedule_snapshot``."""

    def add_schedule(self, schedule: Schedule) -> None:
        """Add a schedule; raises ScheduleNameInUse when another one of the account has its name."""
        found = self._row("SELECT id FROM schedule WHERE account=? AND name=?", schedule.account, schedule.name)
        if found is not None:
            raise ScheduleNameInUse(name=schedule.name, resource=found[0])
        key, value = schedule.tag or (None, None)
        self._rows(
            f"INSERT INTO schedule ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,NULL,NULL,'')",
            schedule.id, schedule.account, schedule.owner, schedule.name, schedule.volume, key, value,
            schedule.timing.every, json.dumps(schedule.timing.at), schedule.retention.count,
            schedule.retention.seconds, schedule.prefix, int(schedule.paused), schedule.handled, schedule.created,
        )  # fmt: skip

    def schedules(self, account: AccountId | None = None) -> list[Schedule]:
        """Return all schedules, or those of one account, by name."""
        where, args = ("", ()) if account is None else ("WHERE account=?", (account,))
        return [
            _from_row(row) for row in self._rows(f"SELECT {_COLUMNS} FROM schedule {where} ORDER BY name, id", *args)
        ]

    def schedule(self, ident: str) -> Schedule | None:
        row = self._row(f"SELECT {_COLUMNS} FROM schedule WHERE id=?", ident)
        return None if row is None else _from_row(row)

    def find_schedule(self, caller: Caller, name_or_id: str) -> Schedule:
        """Return the schedule a caller means by a name of his own or an id; raises ScheduleNotFound."""
        row = self._row(f"SELECT {_COLUMNS} FROM schedule WHERE id=?", name_or_id) or self._row(
            f"SELECT {_COLUMNS} FROM schedule WHERE account=? AND name=?", caller.account, name_or_id
        )
        if row is None or (row[1] != caller.account and not caller.is_admin):
            raise ScheduleNotFound(schedule=name_or_id)
        return _from_row(row)

    def pause_schedule(self, ident: str, paused: bool) -> None:
        self._rows("UPDATE schedule SET paused=? WHERE id=?", int(paused), ident)

    def set_handled(self, ident: str, handled: int) -> None:
        self._rows("UPDATE schedule SET handled=? WHERE id=?", handled, ident)

    def note_run(self, ident: str, run: Run) -> None:
        self._rows(
            "UPDATE schedule SET last_time=?, last_state=?, last_message=? WHERE id=?",
            run.time, run.state.value, run.message, ident,
        )  # fmt: skip

    def remove_schedule(self, ident: str) -> None:
        """Forget a schedule; what it made stays, and is nobody's but its owner's."""
        self._rows("DELETE FROM schedule_snapshot WHERE schedule=?", ident)
        self._rows("DELETE FROM schedule WHERE id=?", ident)

    def add_scheduled(self, schedule: str, snapshot: SnapshotId, volume: VolumeId) -> None:
        """Note that a schedule takes a snapshot: only such ones it ever deletes. Does nothing when it is gone."""
        self._rows(
            "INSERT INTO schedule_snapshot (snapshot, schedule, volume) SELECT ?, id, ? FROM schedule WHERE id=?",
            snapshot, volume, schedule,
        )  # fmt: skip

    def scheduled(self, schedule: str) -> Mapping[VolumeId, list[SnapshotId]]:
        """Return what a schedule made of each volume, in the order in which it was taken."""
        found: dict[VolumeId, list[SnapshotId]] = {}
        sql = "SELECT volume, snapshot FROM schedule_snapshot WHERE schedule=? ORDER BY number"
        for volume, snapshot in self._rows(sql, schedule):
            found.setdefault(VolumeId(volume), []).append(SnapshotId(snapshot))
        return found


def _from_row(row: tuple[Any, ...]) -> Schedule:
    (
        ident, account, owner, name, volume, key, value, every, at, count, seconds, prefix, paused, handled, created,
        last_time, last_state, last_message,
    ) = row  # fmt: skip
    return Schedule(
        id=ident,
        account=AccountId(account),
        owner=owner,
        name=name,
        volume=None if volume is None else VolumeId(volume),
        tag=None if key is None else (key, value),
        timing=Timing(every, tuple(json.loads(at))),
        retention=Retention(count, seconds),
        prefix=prefix,
        paused=bool(paused),
        handled=handled,
        created=created,
        last=None if last_time is None else Run(last_time, RunState(last_state), last_message),
    )
