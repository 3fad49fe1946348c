"""The catalog's recycle bin: the rules, and what lies in it.

A volume or snapshot in the bin keeps its row, in state ``recoverable``: so it counts as alive for the sweep, for checks
and for the keys that are in use, and only who looks for it by name does not find it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ebsd.domain.ids import AccountId, LineageId, parse_resource_id
from ebsd.domain.recycling import Binned, ResourceType, Rule, TagChoice
from ebsd.store.catalog_rows import Rows

_RULE = "id, account, type, days, tags, excluded, description, created"
_BINNED = "resource, account, name, entered, leaves, rule"


class BinRows(Rows):
    """Rules, and one row for each thing in the bin, which goes with the thing's own."""

    def put_bin_rule(self, rule: Rule) -> None:
        self._rows(
            "INSERT INTO bin_rule VALUES (?,?,?,?,?,?,?,?)",
            rule.id, rule.account, rule.type.value, rule.days, json.dumps(rule.tags), json.dumps(rule.excluded),
            rule.description, rule.created,
        )  # fmt: skip

    def bin_rules(self, account: AccountId | None = None) -> list[Rule]:
        """Return all rules, or those of one account, oldest first."""
        sql = f"SELECT {_RULE} FROM bin_rule WHERE ?1 IS NULL OR account=?1 ORDER BY created, id"
        return [_rule(row) for row in self._rows(sql, account)]

    def remove_bin_rule(self, rule: str) -> None:
        self._rows("DELETE FROM bin_rule WHERE id=?", rule)

    def put_binned(self, found: Binned) -> None:
        self._rows(
            "INSERT INTO recycle_bin VALUES (?,?,?,?,?,?)",
            found.resource, found.account, found.name, found.entered, found.leaves, found.rule,
        )  # fmt: skip

    def binned(self, resource: str) -> Binned | None:
        row = self._row(f"SELECT {_BINNED} FROM recycle_bin WHERE resource=?", resource)
        return None if row is None else _binned(row)

    def bin_content(
        self, account: AccountId | None = None, after: tuple[str, str] | None = None, limit: int = -1, kind: str = ""
    ) -> list[Binned]:
        """Return what is in the bin, of all or of one account, oldest first; a page of it behind (time, id).

        ``kind``: what its ids begin with.
        """
        rows = self._rows(
            f"SELECT {_BINNED} FROM recycle_bin WHERE (?1 IS NULL OR account=?1) "
            "AND (?2 IS NULL OR (entered, resource) > (?2, ?3)) AND substr(resource, 1, length(?4))=?4 "
            f"ORDER BY entered, resource LIMIT {limit:d}",
            account,
            *(after or (None, None)),
            kind,
        )
        return [_binned(row) for row in rows]

    def bin_lineages(self, account: AccountId | None = None) -> list[LineageId]:
        """Return the lineages of what is in the bin, of all or of one account."""
        rows = self._rows(
            "SELECT lineage FROM volume v JOIN recycle_bin b ON b.resource=v.id WHERE ?1 IS NULL OR b.account=?1 "
            "UNION SELECT lineage FROM snapshot s JOIN recycle_bin b ON b.resource=s.id "
            "WHERE ?1 IS NULL OR b.account=?1",
            account,
        )
        return [LineageId(row[0]) for row in rows]

    def bin_due(self, now: str) -> list[Binned]:
        return [_binned(row) for row in self._rows(f"SELECT {_BINNED} FROM recycle_bin WHERE leaves<=?", now)]

    def remove_binned(self, resource: str) -> None:
        self._rows("DELETE FROM recycle_bin WHERE resource=?", resource)


def _rule(row: Sequence[Any]) -> Rule:
    ident, account, kind, days, tags, excluded, description, created = row
    return Rule(
        ident, AccountId(account), ResourceType(kind), days, _choices(tags), _choices(excluded), description, created
    )


def _choices(text: str) -> tuple[TagChoice, ...]:
    return tuple((key, value) for key, value in json.loads(text))


def _binned(row: Sequence[Any]) -> Binned:
    resource, account, name, entered, leaves, rule = row
    return Binned(parse_resource_id(resource), AccountId(account), name, entered, leaves, rule)
