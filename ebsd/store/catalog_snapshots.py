"""Snapshots in the catalog."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ebsd.domain.errors import SnapshotNotFound, SnapshotNotOwned
from ebsd.domain.ids import (
    AccountId,
    KeyArn,
    LineageId,
    SnapshotId,
    VolumeId,
    looks_like_snapshot_id,
    parse_snapshot_id,
)
from ebsd.domain.limits import Counted
from ebsd.domain.model import Caller, Cipher, Integrity, Snapshot, Verification
from ebsd.domain.states import SnapshotEvent, SnapshotState, next_snapshot_state
from ebsd.store.catalog_family import FamilyRows, Kin
from ebsd.store.catalog_locks import LockRows
from ebsd.store.catalog_names import NameRows
from ebsd.store.catalog_rows import json_column
from ebsd.store.catalog_sharing import ShareRows
from ebsd.store.catalog_tokens import TokenRows


class SnapshotRows(NameRows, FamilyRows, TokenRows, LockRows, ShareRows):
    """Rows of snapshots."""

    def add_snapshot(self, snapshot: Snapshot) -> None:
        self._rows(
            "INSERT INTO snapshot VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            snapshot.id,
            snapshot.account,
            snapshot.owner,
            snapshot.volume,
            snapshot.size,
            snapshot.state.value,
            snapshot.message,
            snapshot.description,
            int(snapshot.cipher),
            snapshot.key_arn,
            snapshot.wrapped_key,
            json_column(snapshot.context),
            snapshot.lineage,
            snapshot.new_head,
            snapshot.integrity.value,
            snapshot.authority,
            snapshot.pause_us,
            snapshot.started,
            snapshot.completed,
        )
        self.note_growth(snapshot.account, Counted.SNAPSHOTS)
        self.give_name(snapshot.account, snapshot.name, snapshot.id)
        self.set_tags(snapshot.id, snapshot.tags)
        if snapshot.token is not None:
            self.note_token(snapshot.token, snapshot.id)
        self._add_kin(Kin(snapshot.id, snapshot.lineage, None, snapshot.volume, 1, 1, frozenset(), False))

    def snapshot(self, snapshot: SnapshotId) -> Snapshot:
        """Return one snapshot with its name and tags; raises SnapshotNotFound."""
        found = self._snapshots("WHERE snapshot.id=?", snapshot)
        if not found:
            raise SnapshotNotFound(snapshot=snapshot)
        return found[0]

    def snapshots(
        self,
        account: AccountId | None = None,
        after: tuple[str, str] | None = None,
        limit: int = -1,
        *,
        in_bin: bool = True,
    ) -> list[Snapshot]:
        """Return all snapshots, or those of one account, oldest first; a page of them behind (time, id).

        ``in_bin``: those in the recycle bin, too.
        """
        # Only the conditions that there are: "or there is none" in SQL would keep SQLite from using its index.
        conditions = ["snapshot.account=?"] * (account is not None) + ["(started, snapshot.id)>(?, ?)"] * bool(after)
        conditions += ["state<>'recoverable'"] * (not in_bin)
        where = "WHERE " + " AND ".join(conditions) if conditions else ""
        arguments = (*(() if account is None else (account,)), *(after or ()))
        return self._snapshots(where, *arguments, limit=limit)

    def snapshots_where(
        self, condition: str, arguments: Sequence[Any], after: tuple[str, str] | None, limit: int
    ) -> list[Snapshot]:
        """Return a page of what is not in the recycle bin and meets a condition (``catalog_sharing.seen_by``)."""
        where = f"WHERE {condition} AND state<>'recoverable'" + " AND (started, snapshot.id)>(?, ?)" * bool(after)
        return self._snapshots(where, *arguments, *(after or ()), limit=limit)

    def pending_snapshots(self) -> list[Snapshot]:
        return self._snapshots("WHERE state='pending'")

    def lineage_snapshot_ids(self, lineage: LineageId) -> list[SnapshotId]:
        """Return the ids of all snapshots of a lineage, oldest first."""
        sql = "SELECT id FROM snapshot WHERE lineage=? ORDER BY started, id"
        return [SnapshotId(row[0]) for row in self._rows(sql, lineage)]

    def lineage_snapshots(self, lineage: LineageId) -> list[Snapshot]:
        return self._snapshots("WHERE snapshot.lineage=?", lineage)

    def _snapshots(self, where: str, *args: Any, limit: int = -1) -> list[Snapshot]:
        rows = self._rows(
            "SELECT snapshot.id, snapshot.account, owner, name.name, volume, size, state, message, description, "
            "cipher, key_arn, wrapped_key, context, lineage, new_head, integrity, authority, pause_us, started, "
            "completed "
            f"FROM snapshot JOIN name ON name.resource=snapshot.id {where} "
            f"ORDER BY started, snapshot.id LIMIT {limit:d}",
            *args,
        )
        tags: dict[str, dict[str, str]] = {}
        for resource, key, value in self._rows(
            f"SELECT resource, key, value FROM tag JOIN snapshot ON snapshot.id=tag.resource {where} ORDER BY key",
            *args,
        ):
            tags.setdefault(resource, {})[key] = value
        found = self._verifications("snapshot", where, *args)
        return [_snapshot_from_row(row, tags.get(row[0], {}), found.get(row[0])) for row in rows]

    def find_snapshot(self, caller: Caller, name_or_id: str, *, in_bin: bool = False) -> Snapshot:
        """Return the snapshot a caller means; the rules are those of ``find_volume``.

        Raises SnapshotNotOwned for one that is shared with the caller by name: that it exists is told already.
        """
        if looks_like_snapshot_id(name_or_id):
            snapshot_id = parse_snapshot_id(name_or_id)
        else:
            resource = self.resource_named(caller.account, name_or_id)
            if resource is None or not looks_like_snapshot_id(resource):
                raise SnapshotNotFound(snapshot=name_or_id)
            snapshot_id = SnapshotId(resource)
        snapshot = self.snapshot(snapshot_id)
        if snapshot.account != caller.account and not caller.is_admin:
            if self.is_shared_with(snapshot.id, caller.account):
                raise SnapshotNotOwned(snapshot=snapshot.id, owner=snapshot.account)
            raise SnapshotNotFound(snapshot=name_or_id)
        return snapshot if in_bin else usable(snapshot, name_or_id)

    def set_snapshot_state(self, snapshot: SnapshotId, state: SnapshotState) -> None:
        self._rows("UPDATE snapshot SET state=? WHERE id=?", state.value, snapshot)

    def complete_snapshot(
        self, snapshot: SnapshotId, completed: str, pause_us: int | None, integrity: Integrity
    ) -> None:
        state = next_snapshot_state(snapshot, self.snapshot(snapshot).state, SnapshotEvent.COMPLETE)
        self._rows(
            "UPDATE snapshot SET state=?, completed=?, pause_us=?, integrity=? WHERE id=?",
            state,
            completed,
            pause_us,
            integrity.value,
            snapshot,
        )
        self.start_lock(snapshot, completed)

    def set_snapshot_message(self, snapshot: SnapshotId, message: str) -> None:
        """Say why a snapshot is in its state; EC2's StateMessage."""
        self._rows("UPDATE snapshot SET message=? WHERE id=?", message, snapshot)

    def set_snapshot_key(
        self, snapshot: SnapshotId, key_arn: KeyArn, wrapped_key: bytes, context: Mapping[str, str]
    ) -> None:
        self._rows(
            "UPDATE snapshot SET key_arn=?, wrapped_key=?, context=? WHERE id=?",
            key_arn,
            wrapped_key,
            json_column(context),
            snapshot,
        )

    def set_authority(self, resource: VolumeId | SnapshotId, authority: str | None) -> None:
        table = "snapshot" if looks_like_snapshot_id(resource) else "volume"
        self._rows(f"UPDATE {table} SET authority=? WHERE id=?", authority, resource)

    def remove_snapshot(self, snapshot: SnapshotId) -> None:
        for table, column in (
            ("tag", "resource"),
            ("name", "resource"),
            ("verification", "resource"),
            ("imported", "snapshot"),
            ("client_token", "resource"),
            ("recycle_bin", "resource"),
            ("snapshot_lock", "snapshot"),
            ("share", "snapshot"),
            ("snapshot_set", "snapshot"),
            ("implicit_snapshot", "snapshot"),
            ("schedule_snapshot", "snapshot"),
            ("snapshot", "id"),
        ):
            self._rows(f"DELETE FROM {table} WHERE {column}=?", snapshot)
        self._bury_kin(snapshot)


def usable(snapshot: Snapshot, named: str) -> Snapshot:
    """Return a snapshot that its owner asks for, unless it is in the recycle bin; raises SnapshotNotFound."""
    if snapshot.state is SnapshotState.RECOVERABLE:
        error = SnapshotNotFound(snapshot=named)
        error.hint = f"It is in the recycle bin; to have it back: ebsctl undelete {snapshot.id}"
        raise error
    return snapshot


def _snapshot_from_row(row: tuple[Any, ...], tags: Mapping[str, str], verification: Verification | None) -> Snapshot:
    (
        ident,
        account,
        owner,
        name,
        volume,
        size,
        state,
        message,
        description,
        cipher,
        key_arn,
        wrapped_key,
        context,
        lineage,
        new_head,
        integrity,
        authority,
        pause_us,
        started,
        completed,
    ) = row
    return Snapshot(
        id=SnapshotId(ident),
        account=AccountId(account),
        owner=owner,
        name=name,
        volume=VolumeId(volume),
        size=size,
        state=SnapshotState(state),
        message=message,
        description=description,
        cipher=Cipher(cipher),
        key_arn=None if key_arn is None else KeyArn(key_arn),
        wrapped_key=None if wrapped_key is None else bytes(wrapped_key),
        context=json.loads(context),
        lineage=LineageId(lineage),
        new_head=new_head,
        integrity=Integrity(integrity),
        authority=authority,
        pause_us=pause_us,
        started=started,
        completed=completed,
        tags=tags,
        verification=verification,
    )
