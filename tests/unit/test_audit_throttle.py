"""How much of the audit log a user may fill: who is refused, who never is, and what the log says of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from kms_rig import ALICE, BOB, ROOT, Rig, ask, caller, context, memory_directory, refused

from ebsd.domain.errors import RemoteError, Throttled
from ebsd.ipc import peer
from ebsd.kms.audit import throttle as throttle_module
from ebsd.kms.audit.boundary import RULES, Rule
from ebsd.kms.audit.throttle import Throttle

BURST, REFILL = 10_000, 10
UNNAMED = (5001, 5002)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def rig(
    tmp_path: Path, nursery: trio.Nursery, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Rig]:
    monkeypatch.setattr(peer, "user_name", lambda uid: str(uid) if uid in UNNAMED else f"user{uid}")
    made = Rig(tmp_path, nursery, throttle=Throttle(clock, burst=BURST, refill=REFILL))
    yield made
    await made.close()


def logged(rig: Rig) -> list[dict[str, Any]]:
    paths = rig.broker.trail.log.segments()
    return [json.loads(line)["record"] for path in paths for line in path.read_text().splitlines()]


async def exhaust(rig: Rig, uid: int) -> int:
    """Make refused calls until they are no longer recorded; return how many were."""
    for number in range(100):
        try:
            await rig.kms(uid, "DescribeKey", KeyId="alias/nothing")
        except RemoteError as exc:
            if exc.code == Throttled.code:
                return number
    raise AssertionError("nobody stopped him")


# --- the bucket -------------------------------------------------------------------------------------------


def test_a_bucket_empties_by_what_is_recorded_and_fills_with_time(clock: Clock) -> None:
    throttle = Throttle(clock, burst=100, refill=10)
    assert not throttle.refuses("1")
    throttle.charge("1", 99)
    assert not throttle.refuses("1")
    throttle.charge("1", 51)
    assert throttle.refuses("1")
    assert not throttle.refuses("2")
    clock.now += 5
    assert throttle.refuses("1")  # the debt is paid, and no more
    clock.now += 0.1
    assert not throttle.refuses("1")
    clock.now += 10_000
    throttle.charge("1", 100)
    assert throttle.refuses("1")  # no more than a full bucket was saved up


def test_a_summary_is_due_at_the_first_refusal_and_then_once_a_minute(clock: Clock) -> None:
    throttle = Throttle(clock, burst=1, refill=0)
    throttle.charge("1", 1)
    assert throttle.summary("1") is None
    throttle.refuses("1")
    assert throttle.summary("1") == 1
    for _ in range(3):
        throttle.refuses("1")
        assert throttle.summary("1") is None
    clock.now += throttle_module.SUMMARY_PAUSE
    throttle.refuses("1")
    assert throttle.summary("1") == 4
    clock.now += throttle_module.SUMMARY_PAUSE
    assert throttle.summary("1") is None


def test_the_number_of_buckets_is_bounded_and_the_emptiest_are_kept(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle_module, "MAX_BUCKETS", 3)
    throttle = Throttle(clock, burst=100, refill=1)
    for payer, size in (("a", 100), ("b", 50), ("c", 90)):
        throttle.charge(payer, size)
    throttle.charge("d", 100)
    assert throttle.bucket_count == 3
    assert throttle.refuses("a")
    assert throttle.refuses("d")
    clock.now += 200
    throttle.charge("e", 1)
    assert throttle.bucket_count == 1  # the others are full again


# --- calls ------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_who_fills_the_log_is_refused_before_anything_happens_and_nobody_else_is(rig: Rig, clock: Clock) -> None:
    hers, his = await rig.key(ALICE), await rig.key(BOB)
    before = len(logged(rig))
    recorded = await exhaust(rig, BOB)
    assert 3 < recorded < 20
    records = logged(rig)[before:]
    assert [record["eventName"] for record in records] == ["DescribeKey"] * recorded + ["ThrottleUser"]
    assert records[-1]["errorCode"] == "ThrottlingException"
    assert records[-1]["userIdentity"]["userName"] == f"user{BOB}"
    assert records[-1]["requestParameters"] == {"refusedCalls": 1}
    sizes = [len(json.dumps(record, separators=(",", ":"))) for record in records]
    assert sum(sizes[:-1]) < BURST
    for _ in range(5):
        with refused("ThrottlingException", "Rate exceeded"):
            await rig.kms(BOB, "DisableKey", KeyId=his)
    assert len(logged(rig)) == before + recorded + 1
    await rig.kms(ALICE, "DisableKey", KeyId=hers)
    assert (await rig.kms(ROOT, "DescribeKey", KeyId=his))["KeyMetadata"]["Enabled"]
    clock.now += throttle_module.SUMMARY_PAUSE + 60
    await rig.kms(BOB, "DisableKey", KeyId=his)
    await exhaust(rig, BOB)
    assert logged(rig)[-1]["requestParameters"] == {"refusedCalls": 6}


@pytest.mark.trio
async def test_an_administrator_is_never_refused(rig: Rig) -> None:
    for _ in range(40):
        with refused("NotFoundException"):
            await rig.kms(ROOT, "DescribeKey", KeyId="alias/nothing")
    assert not [record for record in logged(rig) if record["eventName"] == "ThrottleUser"]


@pytest.mark.trio
async def test_what_is_done_through_ebsd_is_the_users_but_an_end_is_not(rig: Rig) -> None:
    key = await rig.key(ALICE)
    blob, grant = await rig.anchored(key), await rig.grant(key)
    session = await rig.session(key, grant, blob)  # which the question closes
    await exhaust(rig, ALICE)
    with refused("ThrottlingException"):
        await rig.grant(key)
    with refused("ThrottlingException"):
        await rig.kms(ALICE, "RetireGrant", KeyId=key, GrantId=grant)  # his own, which could be one that is not there
    assert (await ask(session)).data_key is not None
    await rig.ebsd("RetireGrant", KeyId=key, GrantId=grant)
    await rig.ebsd("DeleteAnchor", ResourceId="vol-00000000000000001")
    assert [record["eventName"] for record in logged(rig)[-3:]] == ["Decrypt", "RetireGrant", "DeleteAnchor"]
    await rig.ebsd("CreateGrant", Caller=caller(ROOT), KeyId=key, EncryptionContextEquals=context())


@pytest.mark.trio
async def test_uids_without_a_name_have_one_share(rig: Rig) -> None:
    await exhaust(rig, UNNAMED[0])
    with refused("ThrottlingException"):
        await rig.kms(UNNAMED[1], "ListKeys")
    await rig.kms(BOB, "ListKeys")


def test_only_ebsd_makes_calls_whose_failures_alone_are_recorded() -> None:
    """They are not throttled."""
    assert [
        name for name, rule in RULES.items() if rule is Rule.FAILURES and not name.startswith("io.ebsd.Broker.")
    ] == []
