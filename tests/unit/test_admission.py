"""Admission rules: what they refuse, who may change them, and that the sealed documents and the audit log have them."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from kms_rig import ALICE, BOB, ROOT, Rig, caller, memory_directory, refused

from ebsd.domain.admission import AdmissionRule, Making, check_allowed_keys, is_like, refuse_unlisted
from ebsd.domain.errors import AdmissionRefused, InvalidParameterValue
from ebsd.domain.ids import AccountId, KeyArn, account_of_uid

KEY = KeyArn("arn:aws:kms:local:000000001001:key/0d3b4f6c-0000-4000-8000-000000000001")
OTHER = KeyArn("arn:aws:kms:local:000000001002:key/0d3b4f6c-0000-4000-8000-000000000002")
ANY, ONE = (), (str(KEY),)


@pytest.fixture
async def rig(nursery: trio.Nursery) -> AsyncIterator[Rig]:
    for directory in memory_directory():
        made = Rig(directory, nursery)
        yield made
        await made.close()


async def restarted(rig: Rig, nursery: trio.Nursery) -> Rig:
    """Return a new broker over the state of one that was closed."""
    await rig.close()
    return Rig(rig.state.parent, nursery, may_create=False)


# --- the rule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("making", Making)
@pytest.mark.parametrize(
    ("key", "rules", "refusing"),
    [
        (None, [], None),
        (KEY, [], None),
        (None, [(None, ANY)], "the admission rule for all accounts"),
        (KEY, [(None, ANY)], None),
        (KEY, [(None, ONE)], None),
        (OTHER, [(None, ONE)], "the admission rule for all accounts"),
        (None, [(None, ONE)], "the admission rule for all accounts"),
        (None, [("000000001001", ANY)], "the admission rule of 000000001001"),
        (OTHER, [(None, ANY), ("000000001001", ONE)], "the admission rule of 000000001001"),
        (OTHER, [(None, (str(OTHER),)), ("000000001001", ONE)], "the admission rule of 000000001001"),
        (KEY, [(None, (str(OTHER),)), ("000000001001", ONE)], "the admission rule for all accounts"),
        (KEY, [(None, (str(OTHER), "arn:aws:kms:local:000000001001:key/*"))], None),
    ],
)
def test_what_is_refused(
    making: Making, key: KeyArn | None, rules: list[tuple[str | None, tuple[str, ...]]], refusing: str | None
) -> None:
    bound = [AdmissionRule(None if account is None else AccountId(account), keys) for account, keys in rules]
    if refusing is None:
        refuse_unlisted(making, key, bound)
        return
    with pytest.raises(AdmissionRefused) as caught:
        refuse_unlisted(making, key, bound)
    assert (caught.value.code, caught.value.exit_status) == ("UnauthorizedOperation", 5)
    assert refusing in caught.value.message
    assert making.value in caught.value.message
    assert ("unencrypted" if key is None else key) in caught.value.message
    assert "add --encrypted" in caught.value.hint


@pytest.mark.parametrize(
    ("pattern", "value", "expected"),
    [
        ("abc", "abc", True),
        ("abc", "abcd", False),
        ("abc", "ABC", False),
        ("*", "", True),
        ("", "", True),
        ("", "a", False),
        ("a*", "a", True),
        ("a?", "a", False),
        ("a?c", "abc", True),
        ("*bc", "abcbc", True),
        ("a*b*c", "axxbyybzzc", True),
        ("a*b*c", "axxbyybzz", False),
        ("a.c", "abc", False),
        ("[a]", "a", False),
        ("*?", "", False),
        ("**a", "a", True),
    ],
)
def test_wildcards(pattern: str, value: str, expected: bool) -> None:
    assert is_like(value, pattern) is expected


def test_no_pattern_takes_long() -> None:
    begin = time.process_time()
    assert not is_like("a" * 512, "*a" * 255 + "b")
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    "pattern",
    ["", "backup", "alias/backup", "arn:aws:kms:local:1:alias/x", "0d3b4f6c", "key/*", "arn:aws:\n*", "x" * 513],
)
def test_what_no_key_is_like_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidParameterValue, match="no ARN of a KMS key is like it") as caught:
        check_allowed_keys([pattern])
    assert "ebsctl key show" in caught.value.hint


def test_a_rule_lists_at_most_100_keys_each_once() -> None:
    assert check_allowed_keys([KEY, "arn:*", KEY]) == (KEY, "arn:*")
    with pytest.raises(InvalidParameterValue, match="at most 100"):
        check_allowed_keys([KEY] * 101)


# --- the key service --------------------------------------------------------------------------------------


async def put(rig: Rig, account: str | None, *keys: str, by: int = ROOT) -> Any:
    members = {} if account is None else {"AccountId": account}
    return (await rig.ebsd("PutAdmissionRule", Caller=caller(by), AllowedKeys=list(keys), **members))["Rule"]


async def judged(rig: Rig, uid: int) -> bool:
    return bool((await rig.ebsd("GetAccount", Caller=caller(uid)))["AdmissionRules"])


async def admit(rig: Rig, uid: int, key: str | None) -> None:
    await rig.ebsd("Admit", Caller=caller(uid), Making="volume", **({} if key is None else {"KeyId": key}))


@pytest.mark.trio
async def test_rules_bind_an_account_or_all_and_outlive_the_broker(rig: Rig, nursery: trio.Nursery) -> None:
    alice, bob = account_of_uid(ALICE), account_of_uid(BOB)
    assert not await judged(rig, ALICE)
    await admit(rig, ALICE, None)
    rule = await put(rig, alice, KEY)
    assert (rule["AccountId"], rule["AllowedKeys"]) == (alice, [KEY])
    rig = await restarted(rig, nursery)
    assert (await judged(rig, ALICE), await judged(rig, BOB)) == (True, False)
    await admit(rig, ALICE, KEY)
    await admit(rig, BOB, None)
    for key in (None, OTHER):
        with refused("UnauthorizedOperation", f"the admission rule of {alice}"):
            await admit(rig, ALICE, key)
    rule = await put(rig, None)
    assert "AccountId" not in rule
    for uid in (ALICE, BOB, ROOT):
        assert await judged(rig, uid)
        with refused("UnauthorizedOperation", "the admission rule for all accounts"):
            await admit(rig, uid, None)
    await rig.ebsd("DeleteAdmissionRule", Caller=caller(ROOT))
    await rig.ebsd("DeleteAdmissionRule", Caller=caller(ROOT), AccountId=alice)
    rig = await restarted(rig, nursery)
    assert not await judged(rig, ALICE)
    await admit(rig, ALICE, None)
    for account in ({}, {"AccountId": bob}):
        with refused("Ebsd.AdmissionRuleNotFound"):
            await rig.ebsd("DeleteAdmissionRule", Caller=caller(ROOT), **account)
    await rig.close()


@pytest.mark.trio
async def test_only_administrators_change_rules_and_others_see_their_own(rig: Rig) -> None:
    alice, bob = account_of_uid(ALICE), account_of_uid(BOB)
    with refused("UnauthorizedOperation"):
        await put(rig, alice, by=ALICE)
    for account in (None, alice, bob):
        await put(rig, account)
    for members in ({}, {"AccountId": alice}):
        with refused("UnauthorizedOperation"):
            await rig.ebsd("DeleteAdmissionRule", Caller=caller(ALICE), **members)

    async def seen(uid: int) -> list[Any]:
        return [rule.get("AccountId") for rule in (await rig.ebsd("ListAdmissionRules", Caller=caller(uid)))["Rules"]]

    assert await seen(ROOT) == [None, alice, bob]
    assert await seen(ALICE) == [None, alice]


@pytest.mark.trio
@pytest.mark.parametrize("account", ["", "*", "1001", "alice", "0000000010011", "00000000100x"])
async def test_an_account_that_is_none_is_refused(rig: Rig, account: str) -> None:
    with refused("InvalidParameterValue", "twelve digits"):
        await put(rig, account)


@pytest.mark.trio
async def test_what_is_made_is_one_of_three(rig: Rig) -> None:
    with refused("InvalidParameterValue", "nothing of it is made"):
        await rig.ebsd("Admit", Caller=caller(ALICE), Making="cake")


@pytest.mark.trio
async def test_a_rule_cannot_be_taken_out_of_the_database(rig: Rig, nursery: trio.Nursery) -> None:
    """Not even by root's hand: a store of documents that lacks one is not opened at all."""
    await put(rig, None)
    await rig.close()
    with contextlib.closing(sqlite3.connect(rig.state / "keys.sqlite")) as database, database:
        for table in ("documents", "ledger"):
            assert database.execute(f"DELETE FROM {table} WHERE kind = 'admission'").rowcount == 1
    rig = Rig(rig.state.parent, nursery, may_create=False)
    assert rig.status == "rescue"
    with refused("Ebsd.Rescue"):
        await rig.ebsd("GetAccount", Caller=caller(ALICE))
    await rig.close()
