"""The catalog's modifications of volumes: the latest one of each, as DescribeVolumesModifications tells it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ebsd.domain.ids import AccountId, VolumeId
from ebsd.domain.limits import Counted
from ebsd.domain.model import Modification
from ebsd.domain.states import ModificationState
from ebsd.store.catalog_rows import Rows

_COLUMNS = "m.volume, m.state, m.original, m.target, m.started, m.ended, m.message"


class ModificationRows(Rows):
    """One row for each volume that was ever grown; it goes with the volume."""

    def put_modification(self, found: Modification) -> None:
        row = self._row("SELECT account, size FROM volume WHERE id=?", found.volume)
        if row is not None and found.state is ModificationState.MODIFYING and found.target > row[1]:
            self.note_growth(AccountId(row[0]), Counted.VOLUME_BYTES)
        self._rows(
            "INSERT OR REPLACE INTO modification VALUES (?,?,?,?,?,?,?)",
            found.volume, found.state.value, found.original, found.target, found.started, found.ended, found.message,
        )  # fmt: skip

    def modification(self, volume: VolumeId) -> Modification | None:
        row = self._row(f"SELECT {_COLUMNS} FROM modification m WHERE volume=?", volume)
        return None if row is None else _from_row(row)

    def modifications(
        self, account: AccountId | None = None, after: tuple[str, str] | None = None, limit: int = -1
    ) -> list[Modification]:
        """Return those of all volumes, or of one account's, oldest first; a page of them behind (time, volume)."""
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM modification m JOIN volume v ON v.id=m.volume "
            "WHERE (?1 IS NULL OR v.account=?1) AND (?2 IS NULL OR (m.started, m.volume) > (?2, ?3)) "
            f"ORDER BY m.started, m.volume LIMIT {limit:d}",
            account,
            *(after or (None, None)),
        )
        return [_from_row(row) for row in rows]


def _from_row(row: Sequence[Any]) -> Modification:
    volume, state, original, target, started, ended, message = row
    return Modification(VolumeId(volume), ModificationState(state), original, target, started, ended, message)
