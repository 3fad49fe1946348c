"""The catalog's names, tags and verifications of volumes and snapshots, and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebsd.domain.errors import NameInUse
from ebsd.domain.ids import AccountId
from ebsd.domain.model import Verification
from ebsd.store.catalog_rows import Rows


class NameRows(Rows):
    """Names, tags, verifications, settings."""

    def _verifications(self, table: str, where: str, *args: Any) -> dict[str, Verification]:
        """Return what the last verification found of those rows of a table that were verified, by id."""
        rows = self._rows(
            "SELECT v.resource, v.time, v.kind, v.chunks, v.damaged, v.files "
            f"FROM verification v JOIN {table} ON {table}.id=v.resource {where}",
            *args,
        )
        return {row[0]: Verification(*row[1:]) for row in rows}

    def put_verification(self, resource: str, found: Verification) -> None:
        self._rows(
            "INSERT OR REPLACE INTO verification VALUES (?,?,?,?,?,?)",
            resource, found.time, found.kind, found.chunks, found.damaged_chunks, found.damaged_files,
        )  # fmt: skip

    def name_of(self, resource: str) -> str:
        row = self._row("SELECT name FROM name WHERE resource=?", resource)
        return "" if row is None else str(row[0])

    def resource_named(self, account: AccountId, name: str) -> str | None:
        row = self._row("SELECT resource FROM name WHERE account=? AND name=?", account, name)
        return None if row is None else str(row[0])

    def give_name(self, account: AccountId, name: str, resource: str) -> None:
        """Name a resource, or name it anew. Raises NameInUse when another one of the account has the name."""
        holder = self.resource_named(account, name)
        if holder is not None and holder != resource:
            raise NameInUse(name=name, resource=holder)
        self._rows("DELETE FROM name WHERE resource=?", resource)
        self._rows("INSERT INTO name VALUES (?,?,?)", account, name, resource)

    def tags_of(self, resource: str) -> dict[str, str]:
        return {
            str(k): str(v) for k, v in self._rows("SELECT key, value FROM tag WHERE resource=? ORDER BY key", resource)
        }

    def set_tags(self, resource: str, tags: Mapping[str, str]) -> None:
        self._rows("DELETE FROM tag WHERE resource=?", resource)
        for key, value in tags.items():
            self._rows("INSERT INTO tag VALUES (?,?,?)", resource, key, value)

    def setting(self, key: str) -> str | None:
        row = self._row("SELECT value FROM setting WHERE key=?", key)
        return None if row is None else str(row[0])

    def set_setting(self, key: str, value: str) -> None:
        self._rows("INSERT OR REPLACE INTO setting VALUES (?,?)", key, value)
