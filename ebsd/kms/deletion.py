"""Deletion of CMKs: scheduled with a waiting period, cancelled within it, carried out once it is over.

1. The key state makes a scheduled key unusable at once, so that who still needs it finds out while it can be had back.
2. A key is deleted with its aliases and grants. The anchors of what it encrypted stay: such a volume is refused by the
   name of its key, and not taken for one that the key service never knew.
3. Nothing is scheduled while volumes or snapshots are encrypted under the key, unless the loss was accepted.
Source: KMS API reference, ScheduleKeyDeletion, CancelKeyDeletion; Developer Guide, "Delete an AWS KMS key". The
refusal of 3 is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import msgspec

from ebsd.domain.errors import KeyStillUsed, KmsValidation
from ebsd.kms.documents import Drop, Put
from ebsd.kms.keystates import Group, KeyState, check_state
from ebsd.kms.local import LocalKeys
from ebsd.kms.model import Model
from ebsd.kms.policy import Action, Facts, Requester
from ebsd.kms.records import Anchor, Cmk, Kind
from ebsd.kms.rotation import format_time, parse_time
from ebsd.kms.store import Rewrite, Store

MIN_WINDOW: Final = 7
MAX_WINDOW: Final = 30
DEFAULT_WINDOW: Final = 30
"""Days."""
_NAMED: Final = 10
"""Resources that a refusal names; ListKeyResources has all."""


def scheduled(key: Cmk, days: int, now: str) -> Cmk:
    """Return the key waiting for its deletion in ``days`` days. Raises KmsValidation, KmsInvalidState."""
    if not MIN_WINDOW <= days <= MAX_WINDOW:
        raise KmsValidation(reason=f"PendingWindowInDays must be between {MIN_WINDOW} and {MAX_WINDOW}")
    check_state(key.arn, key.state, Group.SCHEDULE_DELETION)
    return msgspec.structs.replace(key, state=KeyState.PENDING_DELETION, deletion_date=_after(now, days))


def _after(now: str, days: int) -> str:
    return format_time(parse_time(now) + timedelta(days=days))


def cancelled(key: Cmk) -> Cmk:
    """Return the key as it is after CancelKeyDeletion: disabled. Raises KmsInvalidState."""
    check_state(key.arn, key.state, Group.CANCEL_DELETION)
    return msgspec.structs.replace(key, state=KeyState.DISABLED, deletion_date=None)


def is_due(key: Cmk, now: str) -> bool:
    """Say whether the waiting period of the key is over."""
    waits = key.state is KeyState.PENDING_DELETION and key.deletion_date is not None
    return waits and parse_time(key.deletion_date or "") <= parse_time(now)


def check_unused(key: Cmk, anchored: Sequence[Anchor]) -> None:
    """Raise KeyStillUsed when there is something that only this key opens."""
    if anchored:
        names = ", ".join(anchor.resource for anchor in anchored[:_NAMED])
        more = f" and {len(anchored) - _NAMED} more" if len(anchored) > _NAMED else ""
        raise KeyStillUsed(key=key.arn, what=f"{names}{more}")


def removal(model: Model, key: Cmk) -> list[Drop]:
    """Return what goes with a key: the key, its grants and its aliases."""
    return [
        Drop(Kind.KEY, key.id),
        *(Drop(Kind.GRANT, grant.id) for grant in model.grants_of(key.id)),
        *(Drop(Kind.ALIAS, alias.doc_id) for alias in model.aliases_of(key.account) if alias.target == key.id),
    ]


@dataclass(frozen=True, slots=True)
class Pending:
    """Keys that wait for their deletion, what is encrypted under them, and the first date."""

    keys: int
    resources: int
    next: str


class Deletion:
    """ScheduleKeyDeletion and CancelKeyDeletion over the broker's own keys."""

    def __init__(self, store: Store, keys: LocalKeys, clock: Callable[[], str]) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock

    async def schedule(self, requester: Requester, key_name: str, days: int | None, *, accept_loss: bool) -> Cmk:
        """Make the key unusable and note when it goes; ``days`` is 30 without it.

        Raises KeyStillUsed unless ``accept_loss``, KmsValidation, KmsInvalidState.
        """
        window = DEFAULT_WINDOW if days is None else days
        facts = Facts(deletion_window=window)
        async with self._store.mutation() as commit:
            key = self._keys.resolve_existing(requester, key_name, Action.SCHEDULE_KEY_DELETION, facts)
            waiting = scheduled(key, window, self._clock())
            if not accept_loss:
                check_unused(key, self._store.model.anchored_by(key.arn))
            await commit(Put(waiting))
        return waiting

    def pending(self) -> Pending | None:
        """Return what waits; None when no key does."""
        model = self._store.model
        keys = [key for key in model.keys.values() if key.state is KeyState.PENDING_DELETION]
        if not keys:
            return None
        resources = sum(len(model.anchored_by(key.arn)) for key in keys)
        return Pending(len(keys), resources, min(key.deletion_date or "" for key in keys))

    async def destroy_due(self, rewrite: Rewrite) -> list[Cmk]:
        """Delete every key whose waiting period is over, with the epoch that sealed it; return them."""
        now = self._clock()
        model = self._store.model
        if not any(is_due(key, now) for key in model.keys.values()):
            return []
        async with self._store.destruction(rewrite) as destroy:
            due = [key for key in model.keys.values() if is_due(key, now)]  # one may have been kept meanwhile
            if due:
                await destroy([drop for key in due for drop in removal(model, key)])
        return due

    async def postpone_due(self) -> None:
        """Give each key whose waiting period is over another one: after a restore, which may be there to keep it."""
        now = self._clock()
        async with self._store.mutation() as commit:
            due = [key for key in self._store.model.keys.values() if is_due(key, now)]
            date = _after(now, MIN_WINDOW)
            if due:
                await commit(*(Put(msgspec.structs.replace(key, deletion_date=date)) for key in due))

    async def cancel(self, requester: Requester, key_name: str) -> Cmk:
        """Keep the key, disabled. Raises KmsInvalidState for one that does not wait for its deletion."""
        async with self._store.mutation() as commit:
            key = cancelled(self._keys.resolve_existing(requester, key_name, Action.CANCEL_KEY_DELETION))
            await commit(Put(key))
        return key

    def resources(self, requester: Requester, key_name: str) -> list[Anchor]:
        """Return what is encrypted under the key, whoever owns it: for those who may schedule its deletion."""
        facts = Facts(deletion_window=DEFAULT_WINDOW)
        key = self._keys.resolve_existing(requester, key_name, Action.SCHEDULE_KEY_DELETION, facts)
        return self._store.model.anchored_by(key.arn)
