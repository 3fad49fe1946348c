"""Sharing of snapshots: permissions, what they reach, and the account's block of public ones.

1. A snapshot of another account is reached by its id: by an account with a permission, or by everybody while it is
   public and its owner's account does not block that. Who cannot reach one is told what he is told of none, and the
   same is asked of catalog and key service for both.
2. What is made from a shared snapshot is the recipient's altogether, in a lineage and under a data key of his own; his
   rights on the owner's key are judged by the key service, before anything is made and when the data key is opened.
3. A change of permissions is in the audit log before it is made.
4. What has begun goes on when the permission is taken back, as in EC2: the job had been accepted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

import trio

from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.domain.errors import AccessDenied, RemoteError, SnapshotNotFound
from ebsd.domain.ids import (
    AccountId,
    SnapshotId,
    foreign_region,
    looks_like_snapshot_id,
    parse_snapshot_id,
    uid_of_account,
)
from ebsd.domain.model import Caller, Snapshot
from ebsd.domain.sharing import (
    ATTRIBUTE,
    EVERYBODY,
    ORDINARY,
    PRODUCT_CODES,
    PermissionChange,
    PublicAccess,
    Scope,
    check_attribute,
    check_change,
    parse_blocking,
    permissions_of,
)
from ebsd.store.catalog import Transaction
from ebsd.store.catalog_sharing import seen_by, seen_by_administrators
from ebsd.store.catalog_snapshots import usable

log = logging.getLogger(__name__)

KEY_HINT: Final = (
    "The snapshot is encrypted under {key}. Its owner must allow your account to use that key (kms:DescribeKey, "
    "kms:CreateGrant, kms:GenerateDataKey*, kms:ReEncrypt*, kms:Decrypt): ebsctl key policy, or ebsctl key grant."
)


class Sharing:
    """Use cases on create volume permissions."""

    def __init__(self, catalogue: Catalogue, broker: Broker) -> None:
        self._catalogue = catalogue
        self._broker = broker
        self._publishing = trio.Lock()
        """Held from the look at an account's block, or at whom it is shared with, to the commit of permissions."""

    # --- use

    async def reach(self, caller: Caller, name_or_id: str) -> Snapshot:
        """Return a snapshot that the caller can make something from: his own, or one that he was let use, by its id.

        Raises SnapshotNotFound, SnapshotIdMalformed.
        """
        return (await self.reach_all(caller, [name_or_id]))[0]

    async def reach_all(self, caller: Caller, names: Sequence[str]) -> list[Snapshot]:
        """Return the snapshots as ``reach`` does; fails for one as for all."""

        def look(t: Transaction) -> list[Snapshot | None]:
            return [_own(t, caller, name) for name in names]

        found = await self._catalogue.run(look)
        if None not in found:
            return [snapshot for snapshot in found if snapshot is not None]
        # Of what is not there the same is asked as of what is, or the time would tell the one from the other.
        hidden = await self._broker.accounts_without_public_snapshots()
        return await self._catalogue.run(
            lambda t: [_own(t, caller, name) or _foreign(t, caller, name, hidden) for name in names]
        )

    async def check_key(self, caller: Caller, source: Snapshot) -> None:
        """Raise what the key service has against the caller's use of a snapshot of somebody else.

        Raises AccessDeniedException, KeyDisabled and the like; nothing for an unencrypted one or his own.
        """
        if source.account == caller.account or source.key_arn is None:
            return
        try:
            await self._broker.check_shared_key(caller, source.key_arn, source.context)
        except RemoteError as exc:
            if exc.code == AccessDenied.code and foreign_region(source.key_arn) is None:
                exc.hint = KEY_HINT.format(key=source.key_arn)
            raise

    # --- lists

    async def page(self, caller: Caller, scope: Scope, after: tuple[str, str] | None, limit: int) -> list[Snapshot]:
        """Return a page of the snapshots that a caller sees within a scope, oldest first."""
        plain = scope == ORDINARY
        if plain and caller.is_admin:
            return await self._catalogue.run(lambda t: t.snapshots(None, after, limit, in_bin=False))
        hidden: frozenset[AccountId] = frozenset()
        if scope.reaches_public:
            hidden = await self._broker.accounts_without_public_snapshots()

        def load(t: Transaction) -> list[Snapshot]:
            if plain and not t.has_shared(caller.account):
                return t.snapshots(caller.account, after, limit, in_bin=False)
            where = seen_by_administrators(scope, hidden) if caller.is_admin else seen_by(caller.account, scope, hidden)
            return t.snapshots_where(*where, after, limit)

        return await self._catalogue.run(load)

    # --- permissions

    async def modify(
        self, caller: Caller, name_or_id: str, attribute: str | None, change: PermissionChange
    ) -> SnapshotId:
        """Share a snapshot, or stop sharing it (EC2 ModifySnapshotAttribute); only its owner can.

        Raises SnapshotNotFound, SnapshotNotOwned, what ``check_change`` raises, and ShareLimitExceeded.
        """
        check_attribute(attribute, ATTRIBUTE)
        async with self._publishing:
            snapshot = await self._catalogue.run(lambda t: t.find_snapshot(caller, name_or_id))
            owner = _owner_of(snapshot)
            managed, blocked = False, PublicAccess.UNBLOCKED
            if change.add and snapshot.key_arn is not None:
                managed = (await self._broker.describe_key(owner, snapshot.key_arn)).manager == "AWS"
            if EVERYBODY in change.add:
                blocked = (await self._broker.account(owner)).public_access
            check_change(
                change,
                snapshot.id,
                snapshot.account,
                encrypted=snapshot.encrypted,
                under_managed_key=managed,
                blocked=blocked,
            )

            await self._broker.record_sharing(caller, snapshot.id, change.add, change.remove)

            def commit(t: Transaction) -> None:
                t.snapshot(snapshot.id)  # it may be gone by now
                t.add_shares(snapshot.id, change.add)
                t.remove_shares(snapshot.id, change.remove)

            await self._catalogue.run(commit)
        log.info(
            "uid %d changed with whom %s is shared: added %s, removed %s",
            caller.uid, snapshot.id, sorted(change.add), sorted(change.remove),
        )  # fmt: skip
        return snapshot.id

    async def reset(self, caller: Caller, name_or_id: str, attribute: str) -> SnapshotId:
        """Make a snapshot private (EC2 ResetSnapshotAttribute)."""
        check_attribute(attribute, ATTRIBUTE)

        def load(t: Transaction) -> tuple[SnapshotId, list[str]]:
            ident = t.find_snapshot(caller, name_or_id).id
            return ident, t.shares(ident)

        async with self._publishing:
            ident, whom = await self._catalogue.run(load)
            await self._broker.record_sharing(caller, ident, (), whom, reset=True)
            await self._catalogue.run(lambda t: t.remove_shares(ident))
        log.info("uid %d made %s private", caller.uid, ident)
        return ident

    async def describe(self, caller: Caller, name_or_id: str, attribute: str) -> dict[str, Any]:
        """Return an attribute of a snapshot as EC2 DescribeSnapshotAttribute; only its owner sees it."""
        check_attribute(attribute, ATTRIBUTE, PRODUCT_CODES)

        def load(t: Transaction) -> tuple[SnapshotId, list[str]]:
            ident = t.find_snapshot(caller, name_or_id).id
            return ident, t.shares(ident)

        ident, whom = await self._catalogue.run(load)
        if attribute == PRODUCT_CODES:
            return {"SnapshotId": ident, "ProductCodes": []}
        return {"SnapshotId": ident, "CreateVolumePermissions": permissions_of(whom)}

    # --- the account

    async def blocking(self, caller: Caller) -> PublicAccess:
        return (await self._broker.account(caller)).public_access

    async def block(self, caller: Caller, state: str) -> PublicAccess:
        """Block public sharing of the account's snapshots (EC2 EnableSnapshotBlockPublicAccess)."""
        return await self._set(caller, parse_blocking(state))

    async def unblock(self, caller: Caller) -> PublicAccess:
        """Allow public sharing again (EC2 DisableSnapshotBlockPublicAccess); what was public is so again."""
        return await self._set(caller, PublicAccess.UNBLOCKED)

    async def _set(self, caller: Caller, state: PublicAccess) -> PublicAccess:
        async with self._publishing:
            return (await self._broker.set_account(caller, public_access=state)).public_access


def _own(t: Transaction, caller: Caller, name_or_id: str) -> Snapshot | None:
    """Return a snapshot of the caller's, or any for an administrator; None for the id of none such."""
    if not looks_like_snapshot_id(name_or_id):
        return t.find_snapshot(caller, name_or_id)  # names are his own
    try:
        snapshot = t.snapshot(parse_snapshot_id(name_or_id))
    except SnapshotNotFound:
        return None
    if not caller.is_admin and snapshot.account != caller.account:
        return None
    return usable(snapshot, name_or_id)


def _foreign(t: Transaction, caller: Caller, ident: str, hidden: frozenset[AccountId]) -> Snapshot:
    snapshot = t.snapshot(parse_snapshot_id(ident))
    if not is_let_use(t, caller, snapshot, hidden):
        raise SnapshotNotFound(snapshot=ident)
    return snapshot


def is_let_use(t: Transaction, caller: Caller, snapshot: Snapshot, hidden: frozenset[AccountId] = frozenset()) -> bool:
    """Say whether a caller may make something from a snapshot. ``hidden``: accounts that have no public ones."""
    return (
        snapshot.account == caller.account
        or caller.is_admin
        or t.is_shared_with(snapshot.id, caller.account)
        or (snapshot.account not in hidden and t.is_shared_with(snapshot.id, EVERYBODY))
    )


def _owner_of(snapshot: Snapshot) -> Caller:
    """Return the owner as the caller on whose behalf ebsd acts, whoever asked."""
    return Caller(uid_of_account(snapshot.account), snapshot.owner, snapshot.account, is_admin=False)
