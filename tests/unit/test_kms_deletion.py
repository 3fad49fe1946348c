"""ScheduleKeyDeletion and CancelKeyDeletion: the waiting period, what it refuses, and what it leaves alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
import trio
from kms_rig import ALICE, BOB, OTHER, ROOT, VOLUME, Rig, ask, memory_directory, refused

from ebsd.domain.errors import EbsdError
from ebsd.domain.ids import AccountId, KeyId
from ebsd.kms import deletion
from ebsd.kms.keys import KeyRequest, customer_key
from ebsd.kms.keystates import KeyState
from ebsd.kms.records import Anchor, Cmk
from ebsd.kms.rotation import format_time, parse_time

pytestmark = pytest.mark.trio

NOW = "2026-01-01T00:00:00.000Z"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, nursery)
    yield rig
    await rig.close()


def later(days: float, start: str = NOW) -> str:
    return format_time(parse_time(start) + timedelta(days=days))


def new_key() -> Cmk:
    key_id = KeyId("12345678-1234-1234-1234-123456789abc")
    return customer_key(key_id, AccountId("000000001001"), KeyRequest("", {}), bytes(32), NOW)


# --- decisions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("days", [7, 8, 30])
async def test_a_key_is_due_when_its_window_is_over_and_not_before(days: int) -> None:
    key = deletion.scheduled(new_key(), days, NOW)
    assert (key.state, key.deletion_date) == (KeyState.PENDING_DELETION, later(days))
    assert not deletion.is_due(key, later(days - 0.001))
    assert deletion.is_due(key, later(days))
    assert deletion.is_due(key, later(days + 400))


async def test_only_a_key_that_waits_is_ever_due() -> None:
    key = new_key()
    assert not deletion.is_due(key, later(1000))
    assert not deletion.is_due(deletion.cancelled(deletion.scheduled(key, 7, NOW)), later(1000))
    # A date without the state counts as little as the state without a date.
    assert not deletion.is_due(msgspec.structs.replace(key, deletion_date=NOW), later(1000))
    assert not deletion.is_due(msgspec.structs.replace(key, state=KeyState.PENDING_DELETION), later(1000))


@pytest.mark.parametrize("days", [6, 31, 0, -7, 365])
async def test_windows_out_of_range(days: int) -> None:
    with pytest.raises(EbsdError, match="between 7 and 30") as caught:
        deletion.scheduled(new_key(), days, NOW)
    assert caught.value.code == "ValidationException"


async def test_a_refusal_names_ten_and_counts_the_rest() -> None:
    anchored = [
        Anchor(f"vol-{number:017x}", AccountId("000000001001"), True, new_key().arn, "0" * 32, f"vol-{number:017x}")
        for number in range(12)
    ]
    deletion.check_unused(new_key(), [])
    with pytest.raises(EbsdError) as caught:
        deletion.check_unused(new_key(), anchored)
    assert "vol-00000000000000009 and 2 more" in caught.value.message
    assert "vol-0000000000000000a" not in caught.value.message


# --- through the service ----------------------------------------------------------------------------------


async def test_a_scheduled_key_shows_its_date_and_cancelling_disables_it(rig: Rig) -> None:
    key = await rig.key()
    reply = (await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=key, PendingWindowInDays=7)).parameters
    shown = (await rig.kms(ALICE, "DescribeKey", KeyId=key))["KeyMetadata"]
    assert reply == {
        "KeyId": key,
        "DeletionDate": shown["DeletionDate"],
        "KeyState": "PendingDeletion",
        "PendingWindowInDays": 7,
    }
    assert parse_time(reply["DeletionDate"]) - parse_time(shown["CreationDate"]) >= timedelta(days=7)
    assert (shown["KeyState"], shown["Enabled"]) == ("PendingDeletion", False)
    assert (await rig.kms(ALICE, "CancelKeyDeletion", KeyId=key)).parameters == {"KeyId": key}
    shown = (await rig.kms(ALICE, "DescribeKey", KeyId=key))["KeyMetadata"]
    assert (shown["KeyState"], "DeletionDate" in shown) == ("Disabled", False)


async def test_thirty_days_without_a_number(rig: Rig) -> None:
    reply = await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=await rig.key())
    assert reply["PendingWindowInDays"] == 30


async def test_a_key_in_use_is_refused_by_the_names_of_what_it_encrypts(rig: Rig) -> None:
    key, other = await rig.key(), await rig.key()
    await rig.anchored(key)
    await rig.anchored(other, resource=OTHER)
    with refused("Ebsd.KeyStillUsed", f"Once {key} is deleted, {VOLUME} can never"):
        await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=key)
    assert (await rig.kms(ALICE, "DescribeKey", KeyId=key))["KeyMetadata"]["KeyState"] == "Enabled"
    listed = await rig.service(ALICE, "ListKeyResources", KeyId=key)
    assert listed.parameters == {"Resources": [{"ResourceId": VOLUME, "OwnerId": "000000001001"}], "Total": 1}
    await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=key, AcceptDataLoss=True)
    await rig.kms(ALICE, "CancelKeyDeletion", KeyId=key)
    await rig.ebsd("DeleteAnchor", ResourceId=VOLUME)
    await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=key)


async def test_who_may_delete_a_key(rig: Rig) -> None:
    key = await rig.key()
    managed = (await rig.kms(ALICE, "DescribeKey", KeyId="alias/aws/ebs"))["KeyMetadata"]["Arn"]
    for method in ("ScheduleKeyDeletion", "CancelKeyDeletion"):
        with refused("AccessDeniedException", f"kms:{method}"):
            await rig.kms(BOB, method, KeyId=key)
        with refused("AccessDeniedException", "only the service itself"):
            await rig.kms(ALICE, method, KeyId=managed)
        with refused("AccessDeniedException", "only the service itself"):
            await rig.kms(ROOT, method, KeyId=managed)
        with refused("AccessDeniedException"):  # which is not made for this
            await rig.kms(BOB, method, KeyId="alias/aws/ebs")
    with refused("AccessDeniedException"):
        await rig.service(BOB, "ListKeyResources", KeyId=key)
    grantee = "arn:aws:iam::000000001002:user/user1002"
    await rig.kms(ALICE, "CreateGrant", KeyId=key, GranteePrincipal=grantee, Operations=["DescribeKey"])
    await rig.kms(BOB, "DescribeKey", KeyId=key)
    with refused("AccessDeniedException"):
        await rig.service(BOB, "ListKeyResources", KeyId=key)
    await rig.kms(ROOT, "ScheduleKeyDeletion", KeyId=key)
    await rig.kms(ROOT, "CancelKeyDeletion", KeyId=key)


async def test_a_policy_may_ask_for_a_longer_window(rig: Rig) -> None:
    """Condition key kms:ScheduleKeyDeletionPendingWindowInDays of the KMS Developer Guide."""
    key = await rig.key()
    policy = (await rig.kms(ALICE, "GetKeyPolicy", KeyId=key))["Policy"]
    document = msgspec.json.decode(policy)
    document["Statement"].append(
        {
            "Effect": "Deny",
            "Principal": "*",
            "Action": "kms:ScheduleKeyDeletion",
            "Resource": "*",
            "Condition": {"NumericLessThan": {"kms:ScheduleKeyDeletionPendingWindowInDays": "14"}},
        }
    )
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=msgspec.json.encode(document).decode())
    with refused("AccessDeniedException", "explicit deny"):
        await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=key, PendingWindowInDays=13)
    await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=key, PendingWindowInDays=14)


async def test_a_session_opened_before_is_refused_when_it_is_asked(rig: Rig) -> None:
    key = await rig.key()
    blob = await rig.anchored(key)
    session = await rig.session(key, await rig.grant(key), blob)
    await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=key, AcceptDataLoss=True)
    with refused("KMSInvalidStateException", "is pending deletion"):
        await ask(session)


async def test_rotation_waits_for_the_key_to_be_kept(rig: Rig) -> None:
    key = await rig.key()
    await rig.kms(ALICE, "EnableKeyRotation", KeyId=key, RotationPeriodInDays=90)
    before = (await rig.kms(ALICE, "GetKeyRotationStatus", KeyId=key)).parameters
    await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=key)
    assert (await rig.kms(ALICE, "GetKeyRotationStatus", KeyId=key))["KeyRotationEnabled"] is False
    await rig.kms(ALICE, "CancelKeyDeletion", KeyId=key)
    assert (await rig.kms(ALICE, "GetKeyRotationStatus", KeyId=key)).parameters == before


async def test_a_schedule_survives_a_restart(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig = Rig(tmp_path, nursery)
    key = await rig.key()
    date = (await rig.kms(ALICE, "ScheduleKeyDeletion", KeyId=key))["DeletionDate"]
    await rig.close()
    rig = Rig(tmp_path, nursery)
    shown = (await rig.kms(ALICE, "DescribeKey", KeyId=key))["KeyMetadata"]
    assert (shown["KeyState"], shown["DeletionDate"]) == ("PendingDeletion", date)
    await rig.close()
