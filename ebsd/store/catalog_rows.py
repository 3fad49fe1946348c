"""What every part of a catalog transaction stands on: rows of SQL statements, and how values stand in columns."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import apsw

from ebsd.domain.ids import AccountId
from ebsd.domain.limits import Counted


class Rows:
    """One open transaction; the parts of ``catalog.Transaction`` inherit from it."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db
        self.grown: set[tuple[AccountId, Counted]] = set()
        """What accounts have more of at the end of the transaction than at its beginning, as far as that has limits."""

    def changes(self) -> int:
        """Return a number that is another one after each change of a row: there is no second connection."""
        return self._db.total_changes()

    def note_growth(self, account: AccountId, *counted: Counted) -> None:
        """Note that an account has more of something now: whoever commits judges it then."""
        self.grown.update((account, one) for one in counted)

    def _rows(self, sql: str, *args: Any) -> list[tuple[Any, ...]]:
        return list(self._db.execute(sql, args))

    def _row(self, sql: str, *args: Any) -> tuple[Any, ...] | None:
        rows = self._rows(sql, *args)
        return rows[0] if rows else None


def numbers_column(layers: Collection[int]) -> str:
    """Return layer numbers as a JSON list, ascending."""
    return json.dumps(sorted(layers))


def json_column(value: Mapping[str, str]) -> str:
    """Return a mapping of texts as JSON, keys sorted."""
    return json.dumps(dict(value), sort_keys=True)
