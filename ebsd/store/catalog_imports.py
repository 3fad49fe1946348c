"""Snapshots that were made of archives, in the catalog."""

from __future__ import annotations

from typing import Any

from ebsd.domain.ids import AccountId, SnapshotId
from ebsd.domain.model import Imported
from ebsd.store.catalog_rows import Rows


class ImportRows(Rows):
    """What content imported snapshots have."""

    def note_import(self, found: Imported) -> None:
        self._rows(
            "INSERT OR REPLACE INTO imported VALUES (?,?,?,?,?,?)",
            found.snapshot,
            found.account,
            found.archive,
            found.source,
            found.content,
            found.mac,
        )

    def imported(self, snapshot: SnapshotId) -> Imported | None:
        row = self._row("SELECT * FROM imported WHERE snapshot=?", snapshot)
        return None if row is None else _imported_from_row(row)

    def imports_of(self, account: AccountId, content: bytes) -> list[Imported]:
        """Return the snapshots of an account that have this content."""
        sql = "SELECT * FROM imported WHERE account=? AND content=? ORDER BY snapshot"
        return [_imported_from_row(row) for row in self._rows(sql, account, content)]


def _imported_from_row(row: tuple[Any, ...]) -> Imported:
    snapshot, account, archive, source, content, mac = row
    return Imported(SnapshotId(snapshot), AccountId(account), archive, source, bytes(content), bytes(mac))
