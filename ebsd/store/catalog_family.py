"""The family tree of a lineage's maps in the catalog, and what is being removed from it.

The rules and what they are good for: store/sweep.py.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ebsd.domain.errors import StoreDamaged
from ebsd.domain.ids import LineageId, SnapshotId, VolumeId
from ebsd.domain.model import Snapshot
from ebsd.store.catalog_rows import Rows, numbers_column


@dataclass(frozen=True, slots=True)
class Kin:
    """Where a volume or snapshot stands among those whose maps have one origin; the columns of ``family``."""

    id: str
    lineage: LineageId
    parent: str | None
    writer: str
    first: int
    beyond: int
    left: frozenset[int]
    deleted: bool


class FamilyRows(Rows):
    """Who descends from whom, and what of it still waits for the sweep."""

    def kin(self, resource: str) -> Kin | None:
        """Return where a volume or snapshot stands in its family, deleted ones too as long as they are of use."""
        found = self._kin("WHERE id=?", resource)
        return found[0] if found else None

    def relatives(self, kin: Kin) -> list[str]:
        """Return the nearest that are not deleted, in every direction, through deleted ones; ascending.

        Raises StoreDamaged when a link of the family is missing.
        """
        seen, near, queue = {kin.id}, [], [kin]
        roots_seen = False
        while queue:
            at = queue.pop()
            around = self._kin("WHERE parent=?", at.id)
            if at.parent is not None:
                above = self._kin("WHERE id=?", at.parent)
                if not above:
                    raise StoreDamaged(file="catalog", reason=f"it lacks {at.parent}, which {at.id} was made from")
                around += above
            elif not roots_seen:
                # What has no parent hangs on a root that never had a map.
                roots_seen = True
                around += self._kin("WHERE lineage=? AND parent IS NULL", at.lineage)
            for other in around:
                if other.id in seen:
                    continue
                seen.add(other.id)
                if other.deleted:
                    queue.append(other)
                else:
                    near.append(other.id)
        return sorted(near)

    def note_taken(self, snapshot: Snapshot) -> None:
        """Put a snapshot that is taken now between its volume and what that was made from."""
        volume = self.kin(snapshot.volume)
        if volume is None:
            return
        self._rows(
            "UPDATE family SET parent=?, writer=?, first=?, beyond=?, left=? WHERE id=?",
            volume.parent,
            volume.writer,
            volume.first,
            snapshot.new_head,
            numbers_column(volume.left),
            snapshot.id,
        )
        self._rows(
            "UPDATE family SET parent=?, first=?, left='[]' WHERE id=?", snapshot.id, snapshot.new_head, volume.id
        )

    def note_not_taken(self, snapshot: Snapshot) -> None:
        """Undo ``note_taken`` for a snapshot that did not come into being."""
        kin = self.kin(snapshot.id)
        if kin is not None and kin.beyond > 1:
            self._rows(
                "UPDATE family SET parent=?, first=? WHERE parent=? AND id=?",
                kin.parent,
                kin.first,
                kin.id,
                snapshot.volume,
            )
            self.note_left(snapshot.volume, kin.left)

    def note_left(self, resource: VolumeId | SnapshotId, layers: Collection[int]) -> None:
        """Remember layers that a volume has moved chunks off; for a snapshot, before it was taken."""
        kin = self.kin(resource)
        if kin is not None and not kin.left.issuperset(layers):
            self._rows("UPDATE family SET left=? WHERE id=?", numbers_column(kin.left.union(layers)), resource)

    def forget_left(self, volume: VolumeId, layers: Collection[int]) -> None:
        kin = self.kin(volume)
        if kin is not None:
            self._rows("UPDATE family SET left=? WHERE id=?", numbers_column(kin.left.difference(layers)), volume)

    def note_made_from(self, resource: VolumeId | SnapshotId, source: SnapshotId) -> None:
        """Put what is made with the map of a snapshot below it."""
        self._rows("UPDATE family SET parent=? WHERE id=?", source, resource)

    def _add_kin(self, kin: Kin) -> None:
        self._rows(
            "INSERT INTO family VALUES (?,?,?,?,?,?,?,?)",
            kin.id,
            kin.lineage,
            kin.parent,
            kin.writer,
            kin.first,
            kin.beyond,
            numbers_column(kin.left),
            int(kin.deleted),
        )

    def _kin(self, where: str, *args: Any) -> list[Kin]:
        return [
            Kin(ident, LineageId(lineage), parent, writer, first, beyond, frozenset(json.loads(left)), bool(deleted))
            for ident, lineage, parent, writer, first, beyond, left, deleted in self._rows(
                f"SELECT id, lineage, parent, writer, first, beyond, left, deleted FROM family {where}", *args
            )
        ]

    def _bury_kin(self, resource: str) -> None:
        self._rows("UPDATE family SET deleted=1 WHERE id=?", resource)
        self._prune_kin(resource)

    def _prune_kin(self, resource: str) -> None:
        """Forget a deleted one when no two relatives need it to be joined; one whose map is not swept yet stays."""
        kin = self.kin(resource)
        if kin is None or not self._is_joint(kin):
            return
        for child in self._kin("WHERE parent=?", resource):
            if self._is_joint(child):
                self._splice_kin(child)
        children = self._kin("WHERE parent=?", resource)
        parent = None if kin.parent is None else self.kin(kin.parent)
        if len(children) < 2 or parent is None or self._is_joint(parent):
            self._splice_kin(kin)
            if parent is not None and not children:
                self._prune_kin(parent.id)

    def _is_joint(self, kin: Kin) -> bool:
        """Say whether it is there only to join others: deleted, and its map compared with theirs."""
        return kin.deleted and not self._rows("SELECT 1 FROM removing WHERE resource=?", kin.id)

    def _splice_kin(self, kin: Kin) -> None:
        self._rows("UPDATE family SET parent=? WHERE parent=?", kin.parent, kin.id)
        self._rows("DELETE FROM family WHERE id=?", kin.id)

    # --- what is being removed

    def begin_removing(self, resource: str) -> None:
        """Note that files and anchor of a resource, whose row goes after this, are to go too: before it goes."""
        self._rows("INSERT OR IGNORE INTO removing VALUES (?)", resource)

    def end_removing(self, resource: str) -> None:
        self._rows("DELETE FROM removing WHERE resource=?", resource)
        self._prune_kin(resource)

    def removing_of(self, lineage: LineageId) -> list[Kin]:
        """Return what was deleted from a lineage and whose map was not compared with its relatives' yet."""
        return self._kin("WHERE lineage=? AND deleted=1 AND id IN (SELECT resource FROM removing) ORDER BY id", lineage)

    def removing(self) -> list[str]:
        return [str(row[0]) for row in self._rows("SELECT resource FROM removing ORDER BY resource")]
