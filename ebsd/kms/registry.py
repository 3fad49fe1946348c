"""Anchors, account settings and admission rules: what the broker keeps itself, whichever back end has the keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ebsd.domain.ids import AccountId
from ebsd.domain.sharing import PublicAccess
from ebsd.kms import accounts, admission, anchors
from ebsd.kms.documents import Drop, Put
from ebsd.kms.records import Account, Admission, Anchor, Kind
from ebsd.kms.service import KeyDescription
from ebsd.kms.store import Store


class Registry:
    def __init__(self, store: Store, clock: Callable[[], str]) -> None:
        self._store = store
        self._clock = clock

    def anchor(self, resource: str) -> Anchor:
        """Return a resource's anchor; raises IntegrityFailure when there is none."""
        return anchors.existing(self._store.model, resource)

    def anchor_if_any(self, resource: str) -> Anchor | None:
        return self._store.model.anchors.get(anchors.check_resource(resource))

    async def create_anchor(
        self,
        resource: str,
        owner: AccountId,
        key_arn: str | None,
        kcv: bytes | None,
        context_id: str | None,
        made_from: str | None = None,
    ) -> Anchor:
        """Remember a new resource; raises IncorrectState when it is known already."""
        anchors.check_resource(resource)
        async with self._store.mutation() as commit:
            anchor = anchors.create(
                self._store.model, resource, owner, key_arn, kcv, context_id, made_from, now=self._clock()
            )
            await commit(Put(anchor))
        return anchor

    async def inherit_anchor(self, resource: str, owner: AccountId, source: str) -> Anchor:
        """Remember a snapshot that has the wrapped key of its source; errors as ``anchors.inherited``."""
        anchors.check_resource(resource)
        async with self._store.mutation() as commit:
            anchor = anchors.inherited(self._store.model, resource, owner, source)
            await commit(Put(anchor))
        return anchor

    async def raise_floor(self, resource: str, generation: int) -> int:
        """Return the floor, durably at least ``generation``."""
        async with self._store.mutation() as commit:
            anchor = self.anchor(resource)
            raised = anchors.raised(anchor, generation)
            if raised is not anchor:
                await commit(Put(raised))
        return raised.floor

    async def accept_rollback(self, resource: str, generation: int) -> int:
        """Let a resource have a record of an earlier generation; returns the former floor. Raises IncorrectState."""
        async with self._store.mutation() as commit:
            anchor = self.anchor(resource)
            await commit(Put(anchors.lowered(anchor, generation)))
        return anchor.floor

    async def delete_anchor(self, resource: str) -> None:
        """Forget a resource; one that is not known is forgotten already."""
        async with self._store.mutation() as commit:
            if self.anchor_if_any(resource) is not None:
                await commit(Drop(Kind.ANCHOR, resource))

    def account(self, account: AccountId) -> Account:
        return self._store.model.account(account)

    async def set_account(
        self,
        account_id: AccountId,
        encryption_by_default: bool | None,
        default_key: tuple[KeyDescription | None] | None,
        public_access: PublicAccess | None = None,
    ) -> Account:
        """Change an account's settings; None leaves a setting, ``(None,)`` is alias/aws/ebs again.

        Raises InvalidKeyUsage, KeyDisabled, KmsInvalidState for a key that volumes could not use.
        """
        async with self._store.mutation() as commit:
            before = self._store.model.account(account_id)
            after = accounts.with_encryption_by_default(before, encryption_by_default)
            after = accounts.with_public_access(after, public_access)
            if default_key is not None:
                after = accounts.with_default_key(after, default_key[0])
            if after != before:
                await commit(Put(after))
        return after

    def accounts_without_public_snapshots(self) -> list[AccountId]:
        """Return the accounts whose public snapshots are treated as private."""
        found = self._store.model.accounts.values()
        return sorted(account.id for account in found if account.snapshot_public_access is PublicAccess.BLOCK_ALL)

    async def put_admission(self, account: str | None, allowed_keys: Sequence[str]) -> Admission:
        """Make or replace the rule of an account; None: of all. Raises InvalidParameterValue."""
        rule = admission.made(account, allowed_keys, self._clock())
        async with self._store.mutation() as commit:
            await commit(Put(rule))
        return rule

    async def delete_admission(self, account: str | None) -> None:
        """Forget a rule; raises AdmissionRuleNotFound."""
        async with self._store.mutation() as commit:
            await commit(Drop(Kind.ADMISSION, admission.existing(self._store.model, account).doc_id))
