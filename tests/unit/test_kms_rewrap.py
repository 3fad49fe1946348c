"""The key service's part of a rewrap: same data key, newest backing key, and the ages of both."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from kms_rig import ALICE, BOB, OTHER, SNAPSHOT, VOLUME, Reply, Rig, ask, caller, context, memory_directory, refused


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, nursery)
    yield rig
    await rig.close()


async def rewrap(rig: Rig, key: str, blob: str, uid: int = ALICE, resource: str = VOLUME) -> Reply:
    return await rig.ebsd(
        "ReEncrypt",
        Caller=caller(uid),
        CiphertextBlob=blob,
        SourceEncryptionContext=context(),
        DestinationKeyId=key,
        DestinationEncryptionContext=context(),
        ResourceId=resource,
    )


async def data_key(rig: Rig, key: str, blob: str) -> bytes:
    answer = await ask(await rig.session(key, await rig.grant(key), blob))
    assert answer.data_key is not None
    with answer.data_key as secret:
        return bytes(secret.view)


@pytest.mark.trio
async def test_a_rewrapped_blob_opens_to_the_same_data_key_and_names_the_newest_backing_key(rig: Rig) -> None:
    key = await rig.key()
    blob = await rig.anchored(key)
    before = await data_key(rig, key, blob)
    await rig.kms(ALICE, "RotateKeyOnDemand", KeyId=key)
    reply = await rewrap(rig, key, blob)
    assert reply["SourceKeyMaterialId"] != reply["DestinationKeyMaterialId"]
    fresh = reply["CiphertextBlob"]
    assert fresh != blob
    assert await data_key(rig, key, fresh) == before
    assert await data_key(rig, key, blob) == before, "the old wrapping opens as long as its backing key is there"
    again = await rewrap(rig, key, fresh)
    assert again["SourceKeyMaterialId"] == again["DestinationKeyMaterialId"] == reply["DestinationKeyMaterialId"]


@pytest.mark.trio
async def test_ages_of_a_data_key_and_of_what_wraps_it(rig: Rig) -> None:
    key = await rig.key()
    blob = await rig.anchored(key)
    first = await rig.ebsd("DescribeDataKey", ResourceId=VOLUME, CiphertextBlob=blob)
    assert first["KeyMaterialState"] == "CURRENT"
    assert first["KeyMaterialCreationDate"] <= first["DataKeyCreationDate"], "a key is made before what it wraps"
    await rig.kms(ALICE, "RotateKeyOnDemand", KeyId=key)
    old = await rig.ebsd("DescribeDataKey", ResourceId=VOLUME, CiphertextBlob=blob)
    assert old.parameters == {**first.parameters, "KeyMaterialState": "NON_CURRENT"}
    fresh = (await rewrap(rig, key, blob))["CiphertextBlob"]
    new = await rig.ebsd("DescribeDataKey", ResourceId=VOLUME, CiphertextBlob=fresh)
    assert new["KeyMaterialState"] == "CURRENT"
    assert new["DataKeyCreationDate"] == first["DataKeyCreationDate"], "a rewrap makes no data key"
    assert new["KeyMaterialCreationDate"] > first["KeyMaterialCreationDate"]
    listed = (await rig.kms(ALICE, "ListKeyRotations", KeyId=key, IncludeKeyMaterial="ALL_KEY_MATERIAL"))["Rotations"]
    assert [entry["KeyMaterialId"] for entry in listed] == [first["KeyMaterialId"], new["KeyMaterialId"]]
    assert [entry["CreationDate"] for entry in listed] == [
        first["KeyMaterialCreationDate"],
        new["KeyMaterialCreationDate"],
    ]


@pytest.mark.trio
async def test_what_shares_a_data_key_shares_its_age(rig: Rig) -> None:
    key = await rig.key()
    blob = await rig.anchored(key)
    made = (await rig.ebsd("DescribeDataKey", ResourceId=VOLUME, CiphertextBlob=blob))["DataKeyCreationDate"]
    await trio.sleep(0.01)  # times have milliseconds
    await rig.ebsd("CreateAnchor", Caller=caller(ALICE), ResourceId=SNAPSHOT, Encrypted=True, SourceResourceId=VOLUME)
    shared = await rig.ebsd(
        "ReEncrypt",
        Caller=caller(ALICE),
        CiphertextBlob=blob,
        SourceEncryptionContext=context(),
        DestinationKeyId=key,
        DestinationEncryptionContext=context(OTHER),
    )
    await rig.ebsd(
        "CreateAnchor",
        Caller=caller(ALICE),
        ResourceId=OTHER,
        Encrypted=True,
        KeyId=key,
        CiphertextBlob=shared["CiphertextBlob"],
        EncryptionContext=context(OTHER),
        MadeFromResourceId=SNAPSHOT,
    )
    third = "vol-00000000000000009"
    fresh = await rig.anchored(key, resource=third)
    for resource in (SNAPSHOT, OTHER):
        described = await rig.ebsd("DescribeDataKey", ResourceId=resource, CiphertextBlob=blob)
        assert described["DataKeyCreationDate"] == made, resource
    described = await rig.ebsd("DescribeDataKey", ResourceId=third, CiphertextBlob=fresh)
    assert described["DataKeyCreationDate"] > made


@pytest.mark.trio
async def test_a_blob_of_another_key_is_not_taken_for_that_of_the_resource(rig: Rig) -> None:
    key, other = await rig.key(), await rig.key()
    await rig.anchored(key)
    with refused("Ebsd.IntegrityFailure", "its key is"):
        await rewrap(rig, other, await rig.wrapped(other))


@pytest.mark.parametrize("damage", ["state", "policy", "blob"])
@pytest.mark.trio
async def test_what_refuses_re_encryption_refuses_a_rewrap(rig: Rig, damage: str) -> None:
    key = await rig.key()
    blob = await rig.anchored(key)
    if damage == "state":
        await rig.kms(ALICE, "DisableKey", KeyId=key)
        with refused("DisabledException"):
            await rewrap(rig, key, blob)
    elif damage == "policy":
        with refused("AccessDeniedException"):
            await rewrap(rig, key, blob, uid=BOB)
    else:
        with refused("InvalidCiphertextException"):
            await rewrap(rig, key, blob[:-8] + "AAAAAAA=")


@pytest.mark.trio
async def test_a_blob_that_is_none_has_no_material(rig: Rig) -> None:
    await rig.anchored(await rig.key())
    described = await rig.ebsd("DescribeDataKey", ResourceId=VOLUME, CiphertextBlob="AAAA")
    assert set(described.parameters) == {"DataKeyCreationDate"}
