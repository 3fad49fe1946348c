"""Create volume permissions of snapshots in the catalog, and which snapshots a caller can see.

A catalog that was rebuilt knows of none: nothing is shared then until its owner shares it again.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from ebsd.domain.errors import ShareLimitExceeded
from ebsd.domain.ids import AccountId, SnapshotId
from ebsd.domain.sharing import EVERYBODY, MAX_SHARES, Scope
from ebsd.store.catalog_rows import Rows

_SHARED = "snapshot.id IN (SELECT snapshot FROM share WHERE account=? AND suspended=0)"
_PUBLIC = (
    f"(snapshot.id IN (SELECT snapshot FROM share WHERE account='{EVERYBODY}' AND suspended=0) "
    "AND snapshot.account NOT IN (SELECT value FROM json_each(?)))"
)


class ShareRows(Rows):
    """Rows of permissions."""

    def shares(self, snapshot: SnapshotId) -> list[str]:
        """Return whom a snapshot is shared with: accounts, and EVERYBODY; suspended ones included."""
        return [str(row[0]) for row in self._rows("SELECT account FROM share WHERE snapshot=?", snapshot)]

    def is_shared_with(self, snapshot: SnapshotId, who: str) -> bool:
        """Say whether this account, or EVERYBODY, has a permission of its own that counts now."""
        return bool(self._rows("SELECT 1 FROM share WHERE snapshot=? AND account=? AND suspended=0", snapshot, who))

    def has_shared(self, account: AccountId) -> bool:
        """Say whether any snapshot is shared with this account by name."""
        return bool(self._rows("SELECT 1 FROM share WHERE account=? LIMIT 1", account))

    def add_shares(self, snapshot: SnapshotId, whom: Collection[str]) -> None:
        """Share a snapshot with these, too. Raises ShareLimitExceeded."""
        for who in whom:
            self._rows("INSERT OR IGNORE INTO share VALUES (?,?,0)", snapshot, who)
        (count,) = self._rows("SELECT count(*) FROM share WHERE snapshot=?", snapshot)[0]
        if count > MAX_SHARES:
            raise ShareLimitExceeded(snapshot=snapshot, limit=MAX_SHARES)

    def remove_shares(self, snapshot: SnapshotId, whom: Collection[str] | None = None) -> None:
        """Take back the permissions of these, or all (None)."""
        if whom is None:
            self._rows("DELETE FROM share WHERE snapshot=?", snapshot)
        for who in whom or ():
            self._rows("DELETE FROM share WHERE snapshot=? AND account=?", snapshot, who)

    def suspend_shares(self, snapshot: SnapshotId) -> None:
        """Let nobody but the owner see a snapshot that can be used by nobody for now: in the recycle bin, archived."""
        self._rows("UPDATE share SET suspended=1 WHERE snapshot=?", snapshot)

    def resume_shares(self, snapshot: SnapshotId) -> None:
        """Share a snapshot again with whom it was shared before ``suspend_shares``."""
        self._rows("UPDATE share SET suspended=0 WHERE snapshot=?", snapshot)


def seen_by(account: AccountId, scope: Scope, hidden: Collection[AccountId]) -> tuple[str, list[Any]]:
    """Return the SQL condition, and its arguments, of the snapshots in a scope that an account can see.

    Without OwnerIds and RestorableByUserIds these are its own and those shared with it by name, as public ones would
    drown them. ``hidden``: accounts whose public snapshots are treated as private.
    """
    own, own_arguments = "snapshot.account=?", [account]
    shared, shared_arguments = _SHARED, [account]
    public, public_arguments = _PUBLIC, [json.dumps(sorted(hidden))]
    alternatives = [own, shared] + [public] * scope.reaches_public
    arguments: list[Any] = [*own_arguments, *shared_arguments, *(public_arguments if scope.reaches_public else ())]
    conditions = [f"({' OR '.join(alternatives)})"]
    if scope.owners is not None:
        conditions.append("snapshot.account IN (SELECT value FROM json_each(?))")
        arguments.append(json.dumps(sorted(scope.owners)))
    if scope.restorable_by is not None:
        choices = []
        for who in sorted(scope.restorable_by):
            if who == EVERYBODY:
                choices.append(public)
                arguments += public_arguments
            elif who == account:
                choices.append(f"{own} OR {shared}")
                arguments += [*own_arguments, *shared_arguments]
            else:
                # With whom else a snapshot is shared is its owner's business.
                choices.append(f"({own} AND {shared})")
                arguments += [account, who]
        conditions.append(f"({' OR '.join(choices) or '0'})")
    return " AND ".join(conditions), arguments


def seen_by_administrators(scope: Scope, hidden: Collection[AccountId]) -> tuple[str, list[Any]]:
    """Return as ``seen_by`` for those who see all snapshots anyway."""
    conditions, arguments = ["1"], []
    if scope.owners is not None:
        conditions.append("snapshot.account IN (SELECT value FROM json_each(?))")
        arguments.append(json.dumps(sorted(scope.owners)))
    if scope.restorable_by is not None:
        choices = []
        for who in sorted(scope.restorable_by):
            if who == EVERYBODY:
                choices.append(_PUBLIC)
                arguments.append(json.dumps(sorted(hidden)))
            else:
                choices.append(f"snapshot.account=? OR {_SHARED}")
                arguments += [who, who]
        conditions.append(f"({' OR '.join(choices) or '0'})")
    return " AND ".join(conditions), arguments
