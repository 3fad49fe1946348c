"""Rotation: periods, on demand, by itself; old key material opens what it wrapped, new one wraps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
import trio
from kms_rig import ALICE, BOB, Rig, ask, blob_bytes, memfd, memory_directory, refused

from ebsd.crypto import wrap
from ebsd.domain.errors import EbsdError
from ebsd.domain.ids import AccountId, KeyId
from ebsd.kms import rotation
from ebsd.kms.broker import utc_now
from ebsd.kms.keys import KeyRequest, customer_key, managed_key
from ebsd.kms.keystates import KeyState
from ebsd.kms.records import Cmk

NOW = "2026-01-01T00:00:00.000Z"


def later(days: float, start: str = NOW) -> str:
    return rotation.format_time(rotation.parse_time(start) + timedelta(days=days))


def new_key() -> Cmk:
    key_id = KeyId("12345678-1234-1234-1234-123456789abc")
    return customer_key(key_id, AccountId("000000001001"), KeyRequest("", {}), bytes(32), NOW)


def test_a_key_rotates_when_its_period_is_over_and_not_before() -> None:
    key = rotation.enabled(new_key(), 90, NOW)
    assert not rotation.is_due(key, later(89.99))
    assert rotation.is_due(key, later(90))
    turned = rotation.rotated(key, b"\1" * 32, rotation.AUTOMATIC, later(93))
    assert turned.current.id == "01" * 32
    assert turned.backing[0] == key.backing[0]
    assert not rotation.is_due(turned, later(93 + 89))
    assert rotation.is_due(turned, later(93 + 90)), "a late rotation counts from the day it happened"


def test_without_rotation_a_key_is_never_due() -> None:
    assert not rotation.is_due(new_key(), later(10_000))
    assert not rotation.is_due(rotation.disabled(rotation.enabled(new_key(), None, NOW)), later(10_000))


def test_a_disabled_key_waits_until_it_is_enabled() -> None:
    key = rotation.enabled(new_key(), None, NOW)
    off = msgspec.structs.replace(key, state=KeyState.DISABLED)
    assert not rotation.is_due(off, later(400))
    assert rotation.is_due(msgspec.structs.replace(off, state=KeyState.ENABLED), later(400))


def test_the_managed_key_rotates_every_year() -> None:
    key = managed_key(KeyId("12345678-1234-1234-1234-123456789abc"), AccountId("000000001001"), bytes(32), NOW)
    assert not rotation.is_due(key, later(364))
    assert rotation.is_due(key, later(365))
    turned = rotation.rotated(key, b"\1" * 32, rotation.AUTOMATIC, later(365))
    assert not rotation.is_due(turned, later(729))
    assert rotation.is_due(turned, later(730))
    assert rotation.status(key)["KeyRotationEnabled"] is True


def test_enabling_again_with_the_same_period_moves_nothing() -> None:
    key = rotation.enabled(new_key(), 100, NOW)
    assert rotation.enabled(key, 100, later(50)) is key
    assert rotation.status(rotation.enabled(key, 200, later(50)))["NextRotationDate"] == later(250)


@pytest.mark.parametrize("days", [89, 2561, 0, -1])
def test_periods_out_of_range(days: int) -> None:
    with pytest.raises(EbsdError, match="between 90 and 2560"):
        rotation.enabled(new_key(), days, NOW)


def test_a_key_turns_25_times_on_demand() -> None:
    key = new_key()
    for number in range(rotation.MAX_ON_DEMAND):
        rotation.check_on_demand(key, NOW)
        key = rotation.rotated(key, bytes([number + 1]) * 32, rotation.ON_DEMAND, NOW)
    with pytest.raises(EbsdError, match="at most 25 times") as caught:
        rotation.check_on_demand(key, NOW)
    assert caught.value.code == "LimitExceededException"
    assert len(rotation.rotations(key, all_material=True)) == 26
    assert len(rotation.rotations(key, all_material=False)) == 25


def test_on_demand_is_refused_just_before_an_automatic_rotation() -> None:
    key = rotation.enabled(new_key(), 90, NOW)
    rotation.check_on_demand(key, later(89.9))
    with pytest.raises(EbsdError, match="within 20 minutes") as caught:
        rotation.check_on_demand(key, later(90 - 10 / 1440))
    assert caught.value.code == "ConflictException"


@pytest.mark.parametrize(
    ("state", "code"),
    [(KeyState.DISABLED, "DisabledException"), (KeyState.PENDING_DELETION, "KMSInvalidStateException")],
)
def test_the_state_decides(state: KeyState, code: str) -> None:
    key = msgspec.structs.replace(new_key(), state=state)
    for attempt in (
        lambda: rotation.enabled(key, None, NOW),
        lambda: rotation.disabled(key),
        lambda: rotation.check_on_demand(key, NOW),
    ):
        with pytest.raises(EbsdError) as caught:
            attempt()
        assert caught.value.code == code


# --- through the service ------------------------------------------------------------------------------------


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


class Time:
    """A clock that tests move on."""

    def __init__(self) -> None:
        self.now = utc_now()

    def __call__(self) -> str:
        return self.now


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, nursery)
    yield rig
    await rig.close()


def material_of(blob: str) -> str:
    return wrap.parse_blob(blob_bytes(blob)).backing_id.hex()


async def encrypt(rig: Rig, key: str) -> str:
    fd = memfd(b"secret")
    return str((await rig.kms(ALICE, "Encrypt", KeyId=key, PlaintextDescriptor=0, fds=[fd]))["CiphertextBlob"])


@pytest.mark.trio
async def test_what_was_wrapped_before_a_rotation_opens_after_it(rig: Rig) -> None:
    key = await rig.key()
    blobs = [await encrypt(rig, key)]
    for _ in range(3):
        await rig.kms(ALICE, "RotateKeyOnDemand", KeyId=key)
        blobs.append(await encrypt(rig, key))
    listed = (await rig.kms(ALICE, "ListKeyRotations", KeyId=key, IncludeKeyMaterial="ALL_KEY_MATERIAL"))["Rotations"]
    assert [material_of(blob) for blob in blobs] == [entry["KeyMaterialId"] for entry in listed]
    assert [entry["KeyMaterialState"] for entry in listed] == ["NON_CURRENT"] * 3 + ["CURRENT"]
    for blob in blobs:
        opened = await rig.kms(ALICE, "Decrypt", CiphertextBlob=blob)
        assert opened.plaintext() == b"secret"
        assert opened["KeyMaterialId"] == material_of(blob)
    moved = await rig.kms(ALICE, "ReEncrypt", CiphertextBlob=blobs[0], DestinationKeyId=key)
    assert material_of(moved["CiphertextBlob"]) == listed[-1]["KeyMaterialId"]


@pytest.mark.trio
async def test_a_volume_of_before_a_rotation_is_attached_after_it(rig: Rig) -> None:
    key = await rig.key()
    blob = await rig.anchored(key)
    await rig.kms(ALICE, "RotateKeyOnDemand", KeyId=key)
    answer = await ask(await rig.session(key, await rig.grant(key), blob))
    answer.data_key.wipe()  # type: ignore[union-attr]


@pytest.mark.trio
async def test_rotations_survive_a_restart(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig = Rig(tmp_path, nursery)
    key = await rig.key()
    before = await encrypt(rig, key)
    await rig.kms(ALICE, "RotateKeyOnDemand", KeyId=key)
    await rig.kms(ALICE, "EnableKeyRotation", KeyId=key, RotationPeriodInDays=100)
    status = (await rig.kms(ALICE, "GetKeyRotationStatus", KeyId=key)).parameters
    await rig.close()
    rig = Rig(tmp_path, nursery)
    assert (await rig.kms(ALICE, "GetKeyRotationStatus", KeyId=key)).parameters == status
    assert status["RotationPeriodInDays"] == 100
    assert (await rig.kms(ALICE, "Decrypt", CiphertextBlob=before)).plaintext() == b"secret"
    assert material_of(await encrypt(rig, key)) != material_of(before)
    await rig.close()


@pytest.mark.trio
async def test_keys_rotate_by_themselves_when_they_are_due(rig: Rig) -> None:
    time = Time()
    rig.broker.running.keys._clock = time
    key, other, off = await rig.key(), await rig.key(), await rig.key()
    for name in (key, off):
        await rig.kms(ALICE, "EnableKeyRotation", KeyId=name, RotationPeriodInDays=90)
    await rig.kms(ALICE, "DisableKey", KeyId=off)
    before = {name: (await rig.kms(ALICE, "DescribeKey", KeyId=name))["KeyMetadata"] for name in (key, other, off)}
    assert await rig.broker.running.keys.rotate_due() == []
    time.now = later(91, time.now)
    assert [turned.arn for turned in await rig.broker.running.keys.rotate_due()] == [key]
    assert await rig.broker.running.keys.rotate_due() == []
    for name, changed in ((key, True), (other, False), (off, False)):
        after = (await rig.kms(ALICE, "DescribeKey", KeyId=name))["KeyMetadata"]
        assert (after["CurrentKeyMaterialId"] != before[name]["CurrentKeyMaterialId"]) is changed
    (entry,) = (await rig.kms(ALICE, "ListKeyRotations", KeyId=key))["Rotations"]
    assert entry["RotationType"] == "AUTOMATIC"


@pytest.mark.trio
async def test_who_may_rotate(rig: Rig) -> None:
    key = await rig.key()
    managed = (await rig.kms(ALICE, "DescribeKey", KeyId="alias/aws/ebs"))["KeyMetadata"]["Arn"]
    for method in ("RotateKeyOnDemand", "EnableKeyRotation", "DisableKeyRotation"):
        with refused("AccessDeniedException"):
            await rig.kms(BOB, method, KeyId=key)
        with refused("AccessDeniedException", "only the service itself"):
            await rig.kms(ALICE, method, KeyId=managed)
    assert (await rig.kms(ALICE, "GetKeyRotationStatus", KeyId=managed))["RotationPeriodInDays"] == 365
    with refused("ValidationException", "IncludeKeyMaterial"):
        await rig.kms(ALICE, "ListKeyRotations", KeyId=key, IncludeKeyMaterial="SOME")
