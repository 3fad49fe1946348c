"""What accounts use, in the catalog, and which of that a transaction made grow."""

from __future__ import annotations

from ebsd.domain.ids import AccountId
from ebsd.domain.limits import Counted
from ebsd.domain.states import ACTIVE_JOBS, ModificationState
from ebsd.store.catalog_rows import Rows

_ACTIVE = ",".join(f"'{state.value}'" for state in sorted(ACTIVE_JOBS, key=lambda state: state.value))
_QUERIES = {
    Counted.VOLUMES: "SELECT count(*) FROM volume WHERE account=?",
    # A growth is counted from its beginning, or two at once would both fit.
    Counted.VOLUME_BYTES: (
        "SELECT coalesce(sum(max(v.size, coalesce((SELECT m.target FROM modification m WHERE m.volume=v.id"
        f" AND m.state='{ModificationState.MODIFYING.value}'), 0))), 0) FROM volume v WHERE v.account=?"
    ),
    # Those of clones are taken and removed by ebsd itself.
    Counted.SNAPSHOTS: (
        "SELECT count(*) FROM snapshot WHERE account=? AND id NOT IN (SELECT snapshot FROM implicit_snapshot)"
    ),
    Counted.JOBS: f"SELECT count(*) FROM job WHERE account=? AND state IN ({_ACTIVE})",
}


class UsageRows(Rows):
    """Counts of rows. Whatever adds a row calls ``note_growth`` of ``Rows``; ``control.Catalogue`` judges it."""

    def used(self, account: AccountId, counted: Counted) -> int:
        """Return how much of it the account has, what is being made or grown included."""
        row = self._row(_QUERIES[counted], account)
        return 0 if row is None else int(row[0])
