"""The bytes of documents that an account may have: counted as they come and go, refused where too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from kms_rig import ALICE, BOB, ROOT, Rig, memory_directory, refused

from ebsd.domain.ids import AccountId, user_arn
from ebsd.kms import budget
from ebsd.kms.model import Model
from ebsd.kms.policy import default_policy
from ebsd.kms.records import to_json

pytestmark = pytest.mark.trio

ALICE_ACCOUNT, BOB_ACCOUNT = AccountId(f"{ALICE:012}"), AccountId(f"{BOB:012}")
BOB_ARN = user_arn(BOB_ACCOUNT, "bob")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Rig]:
    made = Rig(tmp_path, nursery)
    yield made
    await made.close()


def model(rig: Rig) -> Model:
    return rig.broker.running.store.model


def counted(rig: Rig) -> dict[AccountId, int]:
    """Return the bytes of each account, counted anew from all documents."""
    sizes: Counter[AccountId] = Counter()
    for owned in (*model(rig).keys.values(), *model(rig).aliases.values()):
        sizes[owned.account] += len(to_json(owned))
    for grant in model(rig).grants.values():
        sizes[grant.issuing_account] += len(to_json(grant))
    return {account: size for account, size in sizes.items() if size}


def kept(rig: Rig) -> dict[AccountId, int]:
    accounts = (ALICE_ACCOUNT, BOB_ACCOUNT, AccountId("0" * 12))
    return {account: size for account in accounts if (size := model(rig).account_bytes(account))}


def long_policy(size: int) -> str:
    """Return the default policy and this many spaces: it is kept as it was put."""
    return default_policy(ALICE_ACCOUNT) + " " * size


async def grant(rig: Rig, key: str, uid: int = ALICE, text: str = "x") -> Any:
    constraints = {"EncryptionContextEquals": {text * 384: text * 384}}
    return await rig.kms(
        uid, "CreateGrant", KeyId=key, GranteePrincipal=BOB_ARN, Operations=["Decrypt"], Constraints=constraints
    )


async def test_the_bytes_of_an_account_are_those_of_its_documents_through_every_change(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    rig = Rig(tmp_path, nursery)
    key, other = await rig.key(), await rig.key(BOB)
    await rig.key(ROOT)
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/a", TargetKeyId=key)
    await rig.kms(BOB, "CreateAlias", AliasName="alias/b", TargetKeyId=other)
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=long_policy(500))
    await rig.kms(ALICE, "RotateKeyOnDemand", KeyId=key)
    first, second = await grant(rig, key), await grant(rig, key, ROOT)  # an administrator's is the owner's
    await rig.kms(ALICE, "DisableKey", KeyId=key)
    assert set(kept(rig)) == {ALICE_ACCOUNT, BOB_ACCOUNT, "0" * 12}
    assert kept(rig) == counted(rig)
    await rig.kms(ALICE, "RevokeGrant", KeyId=key, GrantId=first["GrantId"])
    await rig.kms(BOB, "DeleteAlias", AliasName="alias/b")
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=long_policy(1))
    assert kept(rig) == counted(rig)
    assert second["GrantId"] in model(rig).grants
    before = kept(rig)
    await rig.close()
    again = Rig(tmp_path, nursery)
    assert kept(again) == before
    await again.close()


async def test_what_would_be_too_much_is_refused_for_its_account_only(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, his = await rig.key(), await rig.key(BOB)
    monkeypatch.setattr(budget, "MAX_ACCOUNT_BYTES", kept(rig)[ALICE_ACCOUNT] + 2 * 2**10)
    made = await grant(rig, key)
    with refused("LimitExceededException", "MiB"):
        await grant(rig, key, text="\U0001d11e")
    with refused("LimitExceededException", "MiB"):
        await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=long_policy(2000))
    with refused("LimitExceededException", "MiB"):
        await rig.kms(ALICE, "CreateKey", Description="x" * 2000)
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/a", TargetKeyId=key)
    monkeypatch.setattr(budget, "MAX_ACCOUNT_BYTES", 0)
    with refused("LimitExceededException", "MiB"):
        await rig.kms(ALICE, "CreateAlias", AliasName="alias/b", TargetKeyId=key)
    with refused("LimitExceededException", "MiB"):
        await grant(rig, his, BOB)
    assert kept(rig) == counted(rig)
    await rig.kms(ROOT, "CreateKey")
    await rig.kms(ALICE, "DisableKey", KeyId=key)  # the key's states, and what gets smaller, are never refused
    await rig.kms(ALICE, "EnableKey", KeyId=key)
    await rig.kms(ALICE, "RotateKeyOnDemand", KeyId=key)
    await rig.kms(ALICE, "RevokeGrant", KeyId=key, GrantId=made["GrantId"])
    await rig.kms(ALICE, "DeleteAlias", AliasName="alias/a")


async def test_a_policy_above_the_budget_may_become_shorter(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await rig.key()
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=long_policy(5000))
    monkeypatch.setattr(budget, "MAX_ACCOUNT_BYTES", 1000)
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=long_policy(4000))
    with refused("LimitExceededException"):
        await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=long_policy(4001))
