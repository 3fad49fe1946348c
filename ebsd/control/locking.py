"""Locks of snapshots: LockSnapshot, UnlockSnapshot, DescribeLockedSnapshots, and the time that they take.

A lock is a row of the catalog, and every deletion looks at it in its own transaction (``domain.locks``). What keeps a
snapshot from ebsd's clients, root among them, does not keep root from the files of the store.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ebsd.control.catalogue import Catalogue
from ebsd.control.host import Host
from ebsd.control.pages import parse_page, taken
from ebsd.domain.errors import IncorrectSnapshotState
from ebsd.domain.filters import Texts, parse_filters, passes
from ebsd.domain.ids import looks_like_snapshot_id
from ebsd.domain.locks import Lock, LockRequest, advanced, check_unlock, decide_lock
from ebsd.domain.model import Caller
from ebsd.domain.states import LockEvent, LockState, SnapshotState, next_lock_state
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)

_FILTERS: Final[Mapping[str, Texts]] = {
    "snapshot-id": lambda lock: [lock["SnapshotId"]],
    "owner-id": lambda lock: [lock["OwnerId"]],
    "lock-state": lambda lock: [lock["LockState"]],
    "state": lambda lock: [lock["LockState"]],
}

_UNLOCKABLE: Final = (SnapshotState.PENDING, SnapshotState.COMPLETED)
"""States in which a snapshot can be locked."""


class SnapshotLocks:
    """Use cases on the locks of snapshots."""

    def __init__(self, host: Host, catalogue: Catalogue) -> None:
        self._host = host
        self._catalogue = catalogue

    async def lock(self, caller: Caller, name_or_id: str, request: LockRequest) -> dict[str, Any]:
        """Lock a snapshot, or change its lock; returns the members of LockSnapshot."""

        def change(t: Transaction) -> Lock:
            snapshot = t.find_snapshot(caller, name_or_id)
            if snapshot.state not in _UNLOCKABLE:
                raise IncorrectSnapshotState(snapshot=snapshot.id, state=snapshot.state.value)
            lock = decide_lock(
                snapshot.id,
                t.lock_of(snapshot.id),
                request,
                now=self._host.now(),
                completed=snapshot.completed,
                even=self._host.clock_is_even(),
                is_admin=caller.is_admin,
            )
            t.put_lock(lock)
            return lock

        lock = await self._catalogue.run(change)
        log.warning("%s is locked (%s) until %s", lock.snapshot, lock.state.value, lock.expires)
        return _describe(lock)

    async def unlock(self, caller: Caller, name_or_id: str) -> str:
        """Unlock a snapshot where its mode and its time allow that; returns its id."""

        def change(t: Transaction) -> str:
            snapshot = t.find_snapshot(caller, name_or_id)
            lock = t.lock_of(snapshot.id)
            if lock is not None:
                check_unlock(lock, now=self._host.now(), even=self._host.clock_is_even(), is_admin=caller.is_admin)
            next_lock_state(snapshot.id, None if lock is None else lock.state, LockEvent.UNLOCK)
            t.remove_lock(snapshot.id)
            return snapshot.id

        ident = await self._catalogue.run(change)
        log.warning("%s is unlocked", ident)
        return ident

    async def describe(
        self,
        caller: Caller,
        names: Sequence[str] | None,
        filters: Sequence[Mapping[str, Any]],
        limit: int | None,
        token: str | None,
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Return the locks of snapshots, ended ones too, oldest first, in pages (EC2 DescribeLockedSnapshots)."""
        page, chosen = parse_page(limit, token, looks_like_snapshot_id), parse_filters(filters, _FILTERS)

        def load(t: Transaction) -> list[tuple[Lock, str]]:
            if names is None:
                rows = t.locks(None if caller.is_admin else caller.account, page.after, page.size + 1)
                return [(lock, t.snapshot(lock.snapshot).account) for lock in rows]
            found = [t.find_snapshot(caller, name) for name in names]
            locks = [(t.lock_of(snapshot.id), snapshot.account) for snapshot in found]
            return [(lock, account) for lock, account in locks if lock is not None]

        def view(row: tuple[Lock, str]) -> dict[str, Any] | None:
            described = {"OwnerId": row[1], **_describe(row[0])}
            return described if passes(described, chosen) else None

        rows = await self._catalogue.run(load)
        size = page.size if names is None else len(names)
        return taken(rows, size, lambda row: (row[0].created, row[0].snapshot), view)

    async def advance(self) -> None:
        """Note which locks have cooled off and which are over; called now and then while the clock is to be trusted.

        What was noted stays so, whatever the clock says after the next start.
        """

        def note(t: Transaction) -> list[Lock]:
            now = self._host.now()
            changed = [new for lock in t.locks() if (new := advanced(lock, now)) != lock]
            for lock in changed:
                t.put_lock(lock)
            return changed

        for lock in await self._catalogue.run(note):
            log.info("the lock of %s is %s", lock.snapshot, lock.state.value)


def _describe(lock: Lock) -> dict[str, Any]:
    described: dict[str, Any] = {
        "SnapshotId": lock.snapshot,
        "LockState": lock.state.value,
        "LockDuration": lock.days,
        "LockCreatedOn": lock.created,
    }
    optional = {
        "CoolOffPeriod": lock.cool_off if lock.state is not LockState.GOVERNANCE else None,
        "CoolOffPeriodExpiresOn": lock.cool_off_expires,
        "LockDurationStartTime": lock.started,
        "LockExpiresOn": lock.expires,
    }
    return {**described, **{name: value for name, value in optional.items() if value is not None}}
