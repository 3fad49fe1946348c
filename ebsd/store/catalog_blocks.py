"""Snapshots that are filled block by block, in the catalog: their states, and which blocks are durable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ebsd.domain.ids import AccountId, SnapshotId
from ebsd.domain.states import DirectEvent, DirectState, next_direct_state
from ebsd.store.catalog_rows import Rows

PAGE_BLOCKS: Final = 4096
_PAGE_BYTES: Final = PAGE_BLOCKS // 8
_COLUMNS: Final = "id, account, state, parent, layer, timeout, active, written, client_token, request"


@dataclass(frozen=True, slots=True)
class DirectSnapshot:
    """One that StartSnapshot made; the columns of ``direct_snapshot``."""

    id: SnapshotId
    account: AccountId
    state: DirectState
    parent: SnapshotId | None
    layer: int
    timeout: int
    """Minutes."""
    active: int
    """Seconds since 1970."""
    written: int
    client_token: str | None
    request: str

    @property
    def is_pending(self) -> bool:
        return self.state in (DirectState.STARTING, DirectState.OPEN, DirectState.SEALING)

    @property
    def ends(self) -> int:
        """When it is given up, in seconds since 1970."""
        return self.active + 60 * self.timeout


class BlockRows(Rows):
    """Rows of direct_snapshot and direct_blocks."""

    def add_direct(self, direct: DirectSnapshot) -> None:
        self._rows(
            "INSERT INTO direct_snapshot VALUES (?,?,?,?,?,?,?,?,?,?)",
            direct.id,
            direct.account,
            direct.state.value,
            direct.parent,
            direct.layer,
            direct.timeout,
            direct.active,
            direct.written,
            direct.client_token,
            direct.request,
        )

    def direct(self, snapshot: str) -> DirectSnapshot | None:
        found = self._directs("WHERE id=?", snapshot)
        return found[0] if found else None

    def directs(self) -> list[DirectSnapshot]:
        """Return all of them, those that have ended included, by id."""
        return self._directs("")

    def direct_of_token(self, account: AccountId, token: str) -> DirectSnapshot | None:
        found = self._directs("WHERE account=? AND client_token=?", account, token)
        return found[0] if found else None

    def pending_children(self, parent: SnapshotId) -> list[SnapshotId]:
        """Return what is being filled with this snapshot as its parent."""
        return [direct.id for direct in self._directs("WHERE parent=?", parent) if direct.is_pending]

    def _directs(self, where: str, *args: object) -> list[DirectSnapshot]:
        return [
            DirectSnapshot(
                SnapshotId(ident),
                AccountId(account),
                DirectState(state),
                None if parent is None else SnapshotId(parent),
                layer,
                timeout,
                active,
                written,
                token,
                request,
            )
            for ident, account, state, parent, layer, timeout, active, written, token, request in self._rows(
                f"SELECT {_COLUMNS} FROM direct_snapshot {where} ORDER BY id", *args
            )
        ]

    def advance_direct(self, direct: DirectSnapshot, event: DirectEvent, now: int) -> None:
        """Take one from its present state to the next. Raises DirectSnapshotNotPending for an illegal pair."""
        present = self.direct(direct.id) or direct
        state = next_direct_state(direct.id, present.state, event)
        self._rows("UPDATE direct_snapshot SET state=?, active=? WHERE id=?", state.value, now, direct.id)
        if state in (DirectState.COMPLETED, DirectState.ABANDONED, DirectState.TIMED_OUT):
            self._rows("DELETE FROM direct_blocks WHERE snapshot=?", direct.id)

    def note_filled_layer(self, snapshot: SnapshotId, layer: int) -> None:
        """Remember in its family that a layer was made for this snapshot's own blocks (store/sweep.py, rule 6)."""
        self._rows("UPDATE family SET writer=?, first=?, beyond=? WHERE id=?", snapshot, layer, layer + 1, snapshot)

    def note_written(self, snapshot: SnapshotId, blocks: list[int], now: int) -> None:
        """Remember blocks that are durable."""
        pages: dict[int, bytearray] = {}
        for block in blocks:
            page, at = divmod(block, PAGE_BLOCKS)
            bits = pages.setdefault(page, bytearray(_PAGE_BYTES))
            bits[at >> 3] |= 1 << (at & 7)
        added = 0
        for page, bits in pages.items():
            row = self._row("SELECT bits FROM direct_blocks WHERE snapshot=? AND page=?", snapshot, page)
            before = int.from_bytes(bytes(row[0]), "little") if row is not None else 0
            after = before | int.from_bytes(bits, "little")
            added += after.bit_count() - before.bit_count()
            if after != before:
                raw = after.to_bytes(_PAGE_BYTES, "little")
                self._rows("INSERT OR REPLACE INTO direct_blocks VALUES (?,?,?)", snapshot, page, raw)
        self._rows("UPDATE direct_snapshot SET written=written+?, active=? WHERE id=?", added, now, snapshot)

    def written_bits(self, snapshot: SnapshotId) -> bytes:
        """Return a bit for each block, up to the last page that has one; the lowest of the first byte is block 0."""
        found = bytearray()
        for page, bits in self._rows("SELECT page, bits FROM direct_blocks WHERE snapshot=? ORDER BY page", snapshot):
            found += bytes(page * _PAGE_BYTES - len(found)) + bytes(bits)
        return bytes(found)

    def forget_token(self, snapshot: SnapshotId) -> None:
        """Let a client token be used again."""
        self._rows("UPDATE direct_snapshot SET client_token=NULL WHERE id=?", snapshot)

    def forget_directs(self, ended_before: int) -> None:
        """Forget those that ended before a time, and with them their client tokens."""
        self._rows(
            "DELETE FROM direct_snapshot WHERE active<? AND state IN (?,?,?)",
            ended_before,
            DirectState.COMPLETED.value,
            DirectState.ABANDONED.value,
            DirectState.TIMED_OUT.value,
        )
