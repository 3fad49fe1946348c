"""Snapshots that belong to something, in the catalog: to a set that is completed as a whole, or to a clone."""

from __future__ import annotations

from collections.abc import Iterable

from ebsd.domain.ids import SnapshotId
from ebsd.store.catalog_rows import Rows


class SetRows(Rows):
    """Rows of ``snapshot_set``, which a set has only until it is settled, and of ``implicit_snapshot``."""

    def add_set(self, name: str, snapshots: Iterable[SnapshotId]) -> None:
        for snapshot in snapshots:
            self._rows("INSERT INTO snapshot_set VALUES (?,?,0)", snapshot, name)

    def set_of(self, snapshot: SnapshotId) -> str | None:
        """Return the set that a snapshot is being taken with, None when it is taken alone or is not pending."""
        row = self._row("SELECT name FROM snapshot_set WHERE snapshot=?", snapshot)
        return None if row is None else str(row[0])

    def sets(self) -> list[str]:
        return [str(row[0]) for row in self._rows("SELECT DISTINCT name FROM snapshot_set ORDER BY name")]

    def set_members(self, name: str) -> tuple[list[SnapshotId], bool]:
        """Return the snapshots of a set that are left, and whether it is given up."""
        rows = self._rows("SELECT snapshot, abandoned FROM snapshot_set WHERE name=? ORDER BY snapshot", name)
        return [SnapshotId(row[0]) for row in rows], any(row[1] for row in rows)

    def abandon_set(self, name: str) -> None:
        """Decide, for every later start as well, that none of a set is completed."""
        self._rows("UPDATE snapshot_set SET abandoned=1 WHERE name=?", name)

    def end_set(self, name: str) -> None:
        self._rows("DELETE FROM snapshot_set WHERE name=?", name)

    def add_implicit(self, snapshot: SnapshotId) -> None:
        """Note that a snapshot is only taken to make something of it."""
        self._rows("INSERT INTO implicit_snapshot VALUES (?)", snapshot)

    def implicit_snapshots(self) -> list[SnapshotId]:
        return [SnapshotId(row[0]) for row in self._rows("SELECT snapshot FROM implicit_snapshot ORDER BY snapshot")]
