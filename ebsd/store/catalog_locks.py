"""The catalog's locks of snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ebsd.domain.ids import AccountId, SnapshotId
from ebsd.domain.locks import Lock, started_at
from ebsd.domain.states import LockState
from ebsd.store.catalog_rows import Rows

_COLUMNS = "l.snapshot, l.state, l.days, l.cool_off, l.created, l.started, l.expires, l.cool_off_expires"


class LockRows(Rows):
    """At most one row for a snapshot; one whose time is over stays until the snapshot goes, as in EC2."""

    def lock_of(self, snapshot: SnapshotId) -> Lock | None:
        row = self._row(f"SELECT {_COLUMNS} FROM snapshot_lock l WHERE snapshot=?", snapshot)
        return None if row is None else _from_row(row)

    def put_lock(self, lock: Lock) -> None:
        self._rows(
            "INSERT OR REPLACE INTO snapshot_lock VALUES (?,?,?,?,?,?,?,?)",
            lock.snapshot, lock.state.value, lock.days, lock.cool_off, lock.created, lock.started, lock.expires,
            lock.cool_off_expires,
        )  # fmt: skip

    def remove_lock(self, snapshot: SnapshotId) -> None:
        self._rows("DELETE FROM snapshot_lock WHERE snapshot=?", snapshot)

    def start_lock(self, snapshot: SnapshotId, completed: str) -> None:
        """Let the duration of a lock begin that was put on a snapshot while it was pending."""
        lock = self.lock_of(snapshot)
        if lock is not None:
            self.put_lock(started_at(lock, completed))

    def locks(
        self, account: AccountId | None = None, after: tuple[str, str] | None = None, limit: int = -1
    ) -> list[Lock]:
        """Return all locks, or those of one account's snapshots, oldest first; a page of them behind (time, id)."""
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM snapshot_lock l JOIN snapshot s ON s.id=l.snapshot "
            "WHERE (?1 IS NULL OR s.account=?1) AND (?2 IS NULL OR (l.created, l.snapshot) > (?2, ?3)) "
            f"ORDER BY l.created, l.snapshot LIMIT {limit:d}",
            account,
            *(after or (None, None)),
        )
        return [_from_row(row) for row in rows]


def _from_row(row: Sequence[Any]) -> Lock:
    snapshot, state, days, cool_off, created, started, expires, cool_off_expires = row
    return Lock(SnapshotId(snapshot), LockState(state), days, cool_off, created, started, expires, cool_off_expires)
