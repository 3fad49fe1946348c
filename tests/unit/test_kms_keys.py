"""The KMS actions on keys.sock and ebsd's on kms.sock: keys, aliases, data keys, accounts, status."""

from __future__ import annotations

import base64
import json
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from kms_rig import ALICE, BOB, FORMAT, OTHER, ROOT, VOLUME, Rig, caller, context, memfd, memory_directory, refused

from ebsd.domain.errors import RemoteError, Timeout
from ebsd.domain.ids import AccountId
from ebsd.ipc.peer import user_name
from ebsd.kms.descriptors import Descriptors
from ebsd.kms.policy import default_policy

pytestmark = pytest.mark.trio


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, nursery)
    yield rig
    await rig.close()


# --- CreateKey, DescribeKey, ListKeys ---------------------------------------------------------------------


async def test_new_key_has_the_metadata_of_kms(rig: Rig) -> None:
    reply = await rig.kms(ALICE, "CreateKey", Description="mine", Tags=[{"TagKey": "a", "TagValue": "b"}])
    metadata = reply["KeyMetadata"]
    assert metadata["AWSAccountId"] == "000000001001"
    assert metadata["Arn"] == f"arn:aws:kms:local:000000001001:key/{metadata['KeyId']}"
    assert str(uuid.UUID(metadata["KeyId"])) == metadata["KeyId"]
    assert metadata["Enabled"] is True
    assert metadata["KeyState"] == "Enabled"
    assert (metadata["KeySpec"], metadata["KeyUsage"]) == ("SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT")
    assert (metadata["Origin"], metadata["KeyManager"]) == ("AWS_KMS", "CUSTOMER")
    assert len(bytes.fromhex(metadata["CurrentKeyMaterialId"])) == 32
    assert (await rig.kms(ALICE, "DescribeKey", KeyId=metadata["KeyId"]))["KeyMetadata"] == metadata


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"KeySpec": "RSA_2048", "KeyUsage": "ENCRYPT_DECRYPT"}, "UnsupportedOperationException"),
        ({"KeySpec": "ECC_NIST_P256", "KeyUsage": "SIGN_VERIFY"}, "UnsupportedOperationException"),
        ({"KeySpec": "HMAC_256"}, "UnsupportedOperationException"),
        ({"KeySpec": "AES"}, "ValidationException"),
        ({"KeyUsage": "SIGN_VERIFY"}, "ValidationException"),
        ({"KeyUsage": "EVERYTHING"}, "ValidationException"),
        ({"Origin": "EXTERNAL"}, "UnsupportedOperation"),
        ({"Origin": "MARS"}, "ValidationException"),
        ({"MultiRegion": True}, "UnsupportedOperation"),
        ({"Description": "x" * 8193}, "ValidationException"),
        ({"Description": "\ud800"}, "ValidationException"),
        ({"Tags": [{"TagKey": "aws:x", "TagValue": ""}]}, "InvalidParameterValue"),
        ({"Tags": [{"TagKey": "x", "TagValue": "1"}, {"TagKey": "x", "TagValue": "2"}]}, "ValidationException"),
        ({"Tags": [{"TagKey": str(n), "TagValue": ""} for n in range(51)]}, "TagLimitExceeded"),
    ],
)
async def test_create_key_refuses_what_it_cannot_make(rig: Rig, parameters: dict[str, object], code: str) -> None:
    with refused(code):
        await rig.kms(ALICE, "CreateKey", **parameters)
    assert (await rig.kms(ALICE, "ListKeys"))["Keys"] == []


async def test_list_keys_shows_only_the_callers(rig: Rig) -> None:
    mine = [await rig.key(), await rig.key()]
    await rig.key(BOB)
    assert {key["KeyArn"] for key in (await rig.kms(ALICE, "ListKeys"))["Keys"]} == set(mine)


async def test_a_key_is_found_by_every_kind_of_name(rig: Rig) -> None:
    arn = await rig.key()
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/backup", TargetKeyId=arn)
    names = [arn, arn.partition("/")[2], "alias/backup", "backup", "arn:aws:kms:local:000000001001:alias/backup"]
    for name in names:
        assert (await rig.kms(ALICE, "DescribeKey", KeyId=name))["KeyMetadata"]["Arn"] == arn


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("", "ValidationException"),
        ("x" * 2049, "ValidationException"),
        ("12345678-1234-1234-1234-123456789abc", "NotFoundException"),
        ("arn:aws:kms:local:000000001001:key/12345678-1234-1234-1234-123456789abc", "NotFoundException"),
        ("arn:aws:kms:mars:000000001001:key/12345678-1234-1234-1234-123456789abc", "NotFoundException"),
        ("arn:aws:kms:local:000000001002:key/12345678-1234-1234-1234-123456789abc", "AccessDeniedException"),
        ("arn:aws:kms:local:000000001002:alias/x", "AccessDeniedException"),
        ("arn:aws:s3:::bucket", "InvalidArnException"),
        ("alias/none", "NotFoundException"),
        ("none", "NotFoundException"),
        ("no such/../\x00name", "InvalidArnException"),
        ("alias/", "InvalidArnException"),
    ],
)
async def test_wrong_names_of_keys(rig: Rig, name: str, code: str) -> None:
    with refused(code):
        await rig.kms(ALICE, "DescribeKey", KeyId=name)


# --- authorisation ----------------------------------------------------------------------------------------


def with_deny_for(uid: int) -> str:
    """The default policy of Alice's keys, and a denial for somebody else."""
    policy = json.loads(default_policy(AccountId(f"{ALICE:012}")))
    principal = {"AWS": f"arn:aws:iam::{uid:012}:root"}
    policy["Statement"].append({"Effect": "Deny", "Principal": principal, "Action": "kms:*", "Resource": "*"})
    return json.dumps(policy)


async def test_a_foreign_key_is_refused_like_one_that_does_not_exist(rig: Rig) -> None:
    """Also by its alias, and when its policy denies: AWS has one text for all of these, which names no key."""
    arn, denying = await rig.key(), await rig.key(Policy=with_deny_for(BOB))
    account = arn.rpartition(":")[0]
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/there", TargetKeyId=arn)
    names = [arn, denying, arn[:-4] + "0000", f"{account}:alias/there", f"{account}:alias/nowhere"]
    texts = set()
    for name in (*names, f"{account}:alias/aws/ebs"):
        with pytest.raises(RemoteError) as caught:
            await rig.kms(BOB, "DescribeKey", KeyId=name)
        assert caught.value.code == "AccessDeniedException"
        texts.add(caught.value.message)
    assert texts == {
        f"User: arn:aws:iam::000000001002:user/{user_name(BOB)} is not authorized to perform: kms:DescribeKey on "
        "this resource because the resource does not exist in this Region, no resource-based policies allow access, or "
        "a resource-based policy explicitly denies access"
    }
    with refused("NotFoundException"):
        await rig.kms(BOB, "DescribeKey", KeyId=arn.partition("/")[2])


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("EnableKey", {}),
        ("DisableKey", {}),
        ("GenerateDataKey", {"KeySpec": "AES_256"}),
        ("GenerateDataKeyWithoutPlaintext", {"KeySpec": "AES_256"}),
        ("CreateGrant", {"GranteePrincipal": "arn:aws:iam::000000001002:user/1002", "Operations": ["Decrypt"]}),
        ("ListAliases", {}),
    ],
)
async def test_strangers_are_denied_and_the_administrator_is_not(
    rig: Rig, method: str, parameters: dict[str, object]
) -> None:
    arn = await rig.key()
    with refused("AccessDeniedException", f"kms:{method}"):
        await rig.kms(BOB, method, KeyId=arn, **parameters)
    for fd in (await rig.kms(ROOT, method, KeyId=arn, **parameters)).fds:
        os.close(fd)


async def test_create_alias_to_a_foreign_key_is_denied(rig: Rig) -> None:
    arn = await rig.key()
    with refused("AccessDeniedException"):
        await rig.kms(BOB, "CreateAlias", AliasName="alias/x", TargetKeyId=arn)
    with refused("ValidationException", "same account"):
        await rig.kms(ROOT, "CreateAlias", AliasName="alias/x", TargetKeyId=arn)


async def test_decrypt_of_a_foreign_or_unknown_key_says_the_same(rig: Rig) -> None:
    blob = (await rig.kms(ALICE, "GenerateDataKeyWithoutPlaintext", KeyId=await rig.key(), KeySpec="AES_256"))[
        "CiphertextBlob"
    ]
    raw = bytearray(base64.b64decode(blob))
    raw[5] ^= 1  # in the CMK's id
    texts = set()
    for text in (blob, base64.b64encode(raw).decode()):
        with pytest.raises(RemoteError) as caught:
            await rig.kms(BOB, "Decrypt", CiphertextBlob=text)
        texts.add((caught.value.code, caught.value.message))
    assert len(texts) == 1
    assert texts.pop()[0] == "AccessDeniedException"


# --- EnableKey, DisableKey --------------------------------------------------------------------------------


async def test_disable_and_enable_are_idempotent_and_survive(rig: Rig) -> None:
    arn = await rig.key()
    for _ in range(2):
        await rig.kms(ALICE, "DisableKey", KeyId=arn)
    metadata = (await rig.kms(ALICE, "DescribeKey", KeyId=arn))["KeyMetadata"]
    assert (metadata["Enabled"], metadata["KeyState"]) == (False, "Disabled")
    with refused("DisabledException", f"{arn} is disabled."):
        await rig.kms(ALICE, "GenerateDataKey", KeyId=arn, KeySpec="AES_256")
    for _ in range(2):
        await rig.kms(ALICE, "EnableKey", KeyId=arn)
    await rig.kms(ALICE, "GenerateDataKeyWithoutPlaintext", KeyId=arn, KeySpec="AES_256")


async def test_a_disabled_key_does_nothing_but_be_described(rig: Rig) -> None:
    arn = await rig.key()
    blob = (await rig.kms(ALICE, "GenerateDataKeyWithoutPlaintext", KeyId=arn, NumberOfBytes=32))["CiphertextBlob"]
    good = await rig.key()
    await rig.kms(ALICE, "DisableKey", KeyId=arn)
    for method, parameters in (
        ("Decrypt", {"CiphertextBlob": blob}),
        ("Decrypt", {"CiphertextBlob": blob, "KeyId": arn}),
        ("ReEncrypt", {"CiphertextBlob": blob, "DestinationKeyId": good}),
        ("GenerateDataKeyWithoutPlaintext", {"KeyId": arn, "NumberOfBytes": 1}),
        (
            "CreateGrant",
            {"KeyId": arn, "GranteePrincipal": "arn:aws:iam::000000001002:root", "Operations": ["Decrypt"]},
        ),
    ):
        with refused("DisabledException"):
            await rig.kms(ALICE, method, **parameters)
    with refused("DisabledException"):
        await rig.kms(ALICE, "Encrypt", fds=[memfd(b"x")], KeyId=arn, PlaintextDescriptor=0)
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/off", TargetKeyId=arn)
    await rig.kms(ALICE, "DescribeKey", KeyId="alias/off")


# --- data keys --------------------------------------------------------------------------------------------


async def test_data_key_opens_again_with_its_context_only(rig: Rig) -> None:
    arn = await rig.key()
    pairs = {"app": "db", "ü": "ß"}
    made = await rig.kms(ALICE, "GenerateDataKey", KeyId=arn, KeySpec="AES_256", EncryptionContext=pairs)
    plaintext = made.plaintext()
    assert len(plaintext) == 32
    opened = await rig.kms(ALICE, "Decrypt", CiphertextBlob=made["CiphertextBlob"], EncryptionContext=pairs)
    assert opened.plaintext() == plaintext
    assert (opened["KeyId"], opened["KeyMaterialId"]) == (arn, made["KeyMaterialId"])
    for wrong in ({}, {"app": "db"}, {"app": "db", "ü": "ss"}):
        with refused("InvalidCiphertextException"):
            await rig.kms(ALICE, "Decrypt", CiphertextBlob=made["CiphertextBlob"], EncryptionContext=wrong)


async def test_every_bit_of_a_blob_counts(rig: Rig) -> None:
    arn = await rig.key()
    raw = base64.b64decode(
        (await rig.kms(ALICE, "GenerateDataKeyWithoutPlaintext", KeyId=arn, NumberOfBytes=16))["CiphertextBlob"]
    )
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 0x10
        with pytest.raises(RemoteError) as caught:
            await rig.kms(ALICE, "Decrypt", KeyId=arn, CiphertextBlob=base64.b64encode(damaged).decode())
        assert caught.value.code == ("IncorrectKeyException" if 2 <= position < 18 else "InvalidCiphertextException")


@pytest.mark.parametrize("text", ["", "!", "AAAA", "A" * 9000, base64.b64encode(bytes(500)).decode()])
async def test_what_is_no_blob_is_refused(rig: Rig, text: str) -> None:
    with refused("InvalidCiphertextException"):
        await rig.kms(ALICE, "Decrypt", CiphertextBlob=text)


async def test_decrypt_with_another_key_than_the_blobs(rig: Rig) -> None:
    first, second = await rig.key(), await rig.key()
    blob = (await rig.kms(ALICE, "GenerateDataKeyWithoutPlaintext", KeyId=first, NumberOfBytes=8))["CiphertextBlob"]
    with refused("IncorrectKeyException"):
        await rig.kms(ALICE, "Decrypt", KeyId=second, CiphertextBlob=blob)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"NumberOfBytes": 32, "KeySpec": "AES_256"},
        {"NumberOfBytes": 0},
        {"NumberOfBytes": -1},
        {"NumberOfBytes": 1025},
        {"KeySpec": "AES_512"},
    ],
)
async def test_length_of_a_data_key(rig: Rig, parameters: dict[str, object]) -> None:
    arn = await rig.key()
    with refused("ValidationException"):
        await rig.kms(ALICE, "GenerateDataKey", KeyId=arn, **parameters)


@pytest.mark.parametrize("pairs", [{"aws:ebs:id": VOLUME}, {"EBSD:format": FORMAT}, {"Aws:x": ""}])
async def test_users_cannot_wrap_for_a_volume(rig: Rig, pairs: dict[str, str]) -> None:
    arn = await rig.key()
    plain = (await rig.kms(ALICE, "GenerateDataKeyWithoutPlaintext", KeyId=arn, NumberOfBytes=8))["CiphertextBlob"]
    grantee = {"GranteePrincipal": "arn:aws:iam::000000001002:root", "Operations": ["Decrypt"]}
    for method, parameters in (
        ("GenerateDataKey", {"KeyId": arn, "NumberOfBytes": 64, "EncryptionContext": pairs}),
        ("GenerateDataKeyWithoutPlaintext", {"KeyId": arn, "NumberOfBytes": 64, "EncryptionContext": pairs}),
        ("ReEncrypt", {"CiphertextBlob": plain, "DestinationKeyId": arn, "DestinationEncryptionContext": pairs}),
        ("CreateGrant", {"KeyId": arn, "Constraints": {"EncryptionContextEquals": pairs}, **grantee}),
        ("CreateGrant", {"KeyId": arn, "Constraints": {"EncryptionContextSubset": pairs}, **grantee}),
    ):
        with refused("ValidationException", "reserved"):
            await rig.kms(ALICE, method, **parameters)
    with refused("ValidationException", "reserved"):
        await rig.kms(ALICE, "Encrypt", fds=[memfd(b"x")], KeyId=arn, PlaintextDescriptor=0, EncryptionContext=pairs)


async def test_owner_opens_his_own_volumes_key(rig: Rig) -> None:
    arn = await rig.key()
    blob = await rig.wrapped(arn)
    assert len((await rig.kms(ALICE, "Decrypt", CiphertextBlob=blob, EncryptionContext=context())).plaintext()) == 64
    with refused("AccessDeniedException"):
        await rig.kms(BOB, "Decrypt", CiphertextBlob=blob, EncryptionContext=context())


async def test_encrypt_takes_files_memfds_and_pipes(rig: Rig, tmp_path: Path) -> None:
    arn = await rig.key()
    file = tmp_path / "plain"
    file.write_bytes(b"from a file")
    reader, writer = os.pipe()
    os.write(writer, b"from a pipe")
    os.close(writer)
    for fd, plaintext in (
        (memfd(b"from a memfd"), b"from a memfd"),
        (os.open(file, os.O_RDONLY), b"from a file"),
        (reader, b"from a pipe"),
    ):
        made = await rig.kms(ALICE, "Encrypt", fds=[fd], KeyId=arn, PlaintextDescriptor=0)
        assert (await rig.kms(ALICE, "Decrypt", CiphertextBlob=made["CiphertextBlob"])).plaintext() == plaintext


async def test_encrypt_refuses_other_descriptors(rig: Rig, tmp_path: Path) -> None:
    arn = await rig.key()
    (tmp_path / "secret").write_bytes(b"x")
    for fd in (
        os.open("/dev/zero", os.O_RDONLY),
        os.open(tmp_path, os.O_RDONLY),
        os.open(tmp_path / "secret", os.O_WRONLY),
        os.open(tmp_path / "secret", os.O_PATH),
        memfd(b""),
        memfd(bytes(4097)),
    ):
        with refused("InvalidParameterValue"):
            await rig.kms(ALICE, "Encrypt", fds=[fd], KeyId=arn, PlaintextDescriptor=0)
    with refused("InvalidParameterValue"):
        await rig.kms(ALICE, "Encrypt", KeyId=arn, PlaintextDescriptor=0)


async def test_a_plaintext_descriptor_cannot_be_changed(rig: Rig) -> None:
    made = await rig.kms(ALICE, "GenerateDataKey", KeyId=await rig.key(), KeySpec="AES_128")
    fd = made.fds[0]
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    assert len(made.plaintext()) == 16


async def test_re_encrypt_moves_key_and_context(rig: Rig) -> None:
    first, second = await rig.key(), await rig.key()
    made = await rig.kms(ALICE, "GenerateDataKey", KeyId=first, NumberOfBytes=64, EncryptionContext={"a": "1"})
    moved = await rig.kms(
        ALICE,
        "ReEncrypt",
        CiphertextBlob=made["CiphertextBlob"],
        SourceKeyId=first,
        SourceEncryptionContext={"a": "1"},
        DestinationKeyId=second,
        DestinationEncryptionContext={"b": "2"},
    )
    assert (moved["SourceKeyId"], moved["KeyId"]) == (first, second)
    assert moved["SourceKeyMaterialId"] == made["KeyMaterialId"]
    opened = await rig.kms(ALICE, "Decrypt", CiphertextBlob=moved["CiphertextBlob"], EncryptionContext={"b": "2"})
    assert opened.plaintext() == made.plaintext()
    with refused("AccessDeniedException"):
        await rig.kms(ALICE, "ReEncrypt", CiphertextBlob=moved["CiphertextBlob"], DestinationKeyId=await rig.key(BOB))


# --- aliases ----------------------------------------------------------------------------------------------


async def test_life_of_an_alias(rig: Rig) -> None:
    first, second = await rig.key(), await rig.key()
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/app/db", TargetKeyId=first)
    with refused("AlreadyExistsException"):
        await rig.kms(ALICE, "CreateAlias", AliasName="app/db", TargetKeyId=second)
    await rig.kms(BOB, "CreateAlias", AliasName="alias/app/db", TargetKeyId=await rig.key(BOB))
    await rig.kms(ALICE, "UpdateAlias", AliasName="alias/app/db", TargetKeyId=second)
    [alias] = (await rig.kms(ALICE, "ListAliases"))["Aliases"]
    assert alias["AliasArn"] == "arn:aws:kms:local:000000001001:alias/app/db"
    assert second.endswith(alias["TargetKeyId"])
    assert (await rig.kms(ALICE, "ListAliases", KeyId=first))["Aliases"] == []
    await rig.kms(ALICE, "DeleteAlias", AliasName="alias/app/db")
    with refused("NotFoundException"):
        await rig.kms(ALICE, "DeleteAlias", AliasName="alias/app/db")
    with refused("NotFoundException"):
        await rig.kms(ALICE, "UpdateAlias", AliasName="alias/app/db", TargetKeyId=second)


@pytest.mark.parametrize("name", ["alias/", "", "alias/a b", "alias/" + "x" * 251, "alias/ü", "alias/aws/ebs", "aws/x"])
async def test_names_that_aliases_cannot_have(rig: Rig, name: str) -> None:
    with refused("InvalidAliasNameException"):
        await rig.kms(ALICE, "CreateAlias", AliasName=name, TargetKeyId=await rig.key())


async def test_a_key_has_at_most_50_aliases(rig: Rig) -> None:
    arn, other = await rig.key(), await rig.key()
    for number in range(50):
        await rig.kms(ALICE, "CreateAlias", AliasName=f"a{number}", TargetKeyId=arn)
    with refused("LimitExceededException"):
        await rig.kms(ALICE, "CreateAlias", AliasName="one-more", TargetKeyId=arn)
    await rig.kms(ALICE, "UpdateAlias", AliasName="a0", TargetKeyId=arn)
    await rig.kms(ALICE, "CreateAlias", AliasName="one-more", TargetKeyId=other)
    with refused("LimitExceededException"):
        await rig.kms(ALICE, "UpdateAlias", AliasName="one-more", TargetKeyId=arn)


# --- the AWS managed key ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alias/aws/ebs", "aws/ebs", "arn:aws:kms:local:000000001001:alias/aws/ebs"])
async def test_managed_key_is_made_once_on_first_use(rig: Rig, name: str) -> None:
    metadata = (await rig.kms(ALICE, "DescribeKey", KeyId=name))["KeyMetadata"]
    assert metadata["KeyManager"] == "AWS"
    through_ebsd = await rig.ebsd("DescribeKey", Caller=caller(ALICE), KeyId="alias/aws/ebs")
    assert through_ebsd["Key"]["Arn"] == metadata["Arn"]
    assert through_ebsd["Key"]["KeyManager"] == "AWS"
    assert (await rig.ebsd("DescribeKey", Caller=caller(BOB), KeyId="alias/aws/ebs"))["Key"]["Arn"] != metadata["Arn"]
    assert [alias["AliasName"] for alias in (await rig.kms(ALICE, "ListAliases"))["Aliases"]] == ["alias/aws/ebs"]


async def test_simultaneous_first_uses_make_one_managed_key(rig: Rig) -> None:
    arns = set()

    async def use() -> None:
        reply = await rig.ebsd("DescribeKey", Caller=caller(ALICE), KeyId="alias/aws/ebs")
        arns.add(reply["Key"]["Arn"])

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(use)
    assert len(arns) == 1
    assert len((await rig.kms(ALICE, "ListKeys"))["Keys"]) == 1


@pytest.mark.parametrize("made_before", [False, True])
async def test_managed_key_is_used_through_ebsd_only(rig: Rig, made_before: bool) -> None:
    if made_before:
        await rig.wrapped("alias/aws/ebs")
    grantee = {"GranteePrincipal": "arn:aws:iam::000000001002:root", "Operations": ["Decrypt"]}
    for uid in (ALICE, ROOT) if made_before else (ALICE,):
        name = "alias/aws/ebs" if uid == ALICE else "arn:aws:kms:local:000000001001:alias/aws/ebs"
        for method, parameters in (
            ("GenerateDataKey", {"KeySpec": "AES_256"}),
            ("GenerateDataKeyWithoutPlaintext", {"KeySpec": "AES_256"}),
            ("CreateGrant", grantee),
            ("DisableKey", {}),
            ("EnableKey", {}),
        ):
            with refused("AccessDeniedException", "AWS managed"):
                await rig.kms(uid, method, KeyId=name, **parameters)
        with refused("AccessDeniedException", "AWS managed"):
            await rig.kms(uid, "Encrypt", fds=[memfd(b"x")], KeyId=name, PlaintextDescriptor=0)
    with refused("AccessDeniedException"):
        await rig.kms(ALICE, "CreateAlias", AliasName="mine", TargetKeyId="alias/aws/ebs")
    for method, parameters in (("UpdateAlias", {"TargetKeyId": await rig.key()}), ("DeleteAlias", {})):
        with refused("AccessDeniedException", "AWS managed"):
            await rig.kms(ALICE, method, AliasName="alias/aws/ebs", **parameters)


async def test_blobs_of_the_managed_key_do_not_open_directly(rig: Rig) -> None:
    blob = await rig.wrapped("alias/aws/ebs")
    for uid in (ALICE, ROOT, BOB):
        with refused("AccessDeniedException"):
            await rig.kms(uid, "Decrypt", CiphertextBlob=blob, EncryptionContext=context())
        with refused("AccessDeniedException"):
            await rig.kms(
                uid,
                "ReEncrypt",
                CiphertextBlob=blob,
                SourceEncryptionContext=context(),
                DestinationKeyId=await rig.key(uid),
            )


async def test_managed_key_of_another_account_is_not_made_or_used(rig: Rig) -> None:
    foreign = "arn:aws:kms:local:000000001001:alias/aws/ebs"
    with refused("AccessDeniedException"):
        await rig.ebsd("DescribeKey", Caller=caller(BOB), KeyId=foreign)
    with refused("NotFoundException"):
        await rig.kms(ROOT, "DescribeKey", KeyId=foreign)


# --- ebsd's channel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pairs",
    [
        {},
        {"aws:ebs:id": VOLUME},
        {"ebsd:format": FORMAT},
        {"aws:ebs:id": VOLUME, "ebsd:format": ""},
        {"aws:ebs:id": VOLUME, "ebsd:format": FORMAT, "aws:x": "y"},
        {"aws:ebs:id": VOLUME, "ebsd:format": FORMAT, "": "y"},
    ],
)
async def test_ebsd_must_name_resource_and_format(rig: Rig, pairs: dict[str, str]) -> None:
    arn = await rig.key()
    with refused("ValidationException"):
        await rig.ebsd(
            "GenerateDataKeyWithoutPlaintext",
            Caller=caller(ALICE),
            KeyId=arn,
            NumberOfBytes=64,
            EncryptionContext=pairs,
        )
    with refused("ValidationException"):
        await rig.ebsd("CreateGrant", Caller=caller(ALICE), KeyId=arn, EncryptionContextEquals=pairs)


async def test_ebsd_must_name_a_well_formed_resource(rig: Rig) -> None:
    arn = await rig.key()
    for resource in ("vol-1", "job-00000000000000001", "snap-x"):
        with pytest.raises(RemoteError, match="Invalid id"):
            await rig.wrapped(arn, resource=resource)


async def test_ebsd_acts_with_its_callers_rights(rig: Rig) -> None:
    arn = await rig.key()
    with refused("AccessDeniedException"):
        await rig.wrapped(arn, uid=BOB)
    await rig.wrapped(arn, uid=ROOT)
    for uid in (-1, 2**32 - 1, 2**40):
        with refused("InvalidParameterValue"):
            await rig.wrapped(arn, uid=uid)


async def test_re_encrypt_through_ebsd(rig: Rig) -> None:
    first, second = await rig.key(), await rig.key()
    blob = await rig.anchored(first)
    moved = await rig.ebsd(
        "ReEncrypt",
        Caller=caller(ALICE),
        CiphertextBlob=blob,
        SourceEncryptionContext=context(),
        DestinationKeyId=second,
        DestinationEncryptionContext=context(OTHER),
    )
    assert moved["KeyId"] == second
    plaintexts = [
        (await rig.kms(ALICE, "Decrypt", CiphertextBlob=text, EncryptionContext=context(resource))).plaintext()
        for text, resource in ((blob, VOLUME), (moved["CiphertextBlob"], OTHER))
    ]
    assert plaintexts[0] == plaintexts[1]
    with refused("ValidationException"):
        await rig.ebsd(
            "ReEncrypt",
            Caller=caller(ALICE),
            CiphertextBlob=blob,
            SourceEncryptionContext=context(),
            DestinationKeyId=second,
            DestinationEncryptionContext={"mine": "x"},
        )


async def test_re_encrypt_does_not_carry_over_a_blob_of_another_key(rig: Rig) -> None:
    await rig.anchored(await rig.key())
    substitute = await rig.wrapped(await rig.key())
    with refused("Ebsd.IntegrityFailure", "its key is"):
        await rig.ebsd(
            "ReEncrypt",
            Caller=caller(ALICE),
            CiphertextBlob=substitute,
            SourceEncryptionContext=context(),
            DestinationKeyId=await rig.key(),
            DestinationEncryptionContext=context(OTHER),
        )


# --- accounts ---------------------------------------------------------------------------------------------


async def test_account_settings(rig: Rig) -> None:
    who = caller(ALICE)
    access = {"SnapshotBlockPublicAccess": "unblocked"}
    start = {"EbsEncryptionByDefault": True, "EbsDefaultKmsKeyId": "", "AdmissionRules": False, **access}
    assert (await rig.ebsd("GetAccount", Caller=who)).parameters == start
    arn = await rig.key()
    await rig.kms(ALICE, "CreateAlias", AliasName="vols", TargetKeyId=arn)
    changed = await rig.ebsd("SetAccount", Caller=who, EbsEncryptionByDefault=False, EbsDefaultKmsKeyId="vols")
    assert changed.parameters == {"EbsEncryptionByDefault": False, "EbsDefaultKmsKeyId": arn, **access}
    assert (await rig.ebsd("SetAccount", Caller=who, EbsEncryptionByDefault=True))["EbsDefaultKmsKeyId"] == arn
    assert (await rig.ebsd("GetAccount", Caller=caller(BOB))).parameters == start
    for reset in ("", "alias/aws/ebs"):
        await rig.ebsd("SetAccount", Caller=who, EbsDefaultKmsKeyId=arn)
        assert (await rig.ebsd("SetAccount", Caller=who, EbsDefaultKmsKeyId=reset))["EbsDefaultKmsKeyId"] == ""


async def test_an_unusable_key_does_not_become_the_default(rig: Rig) -> None:
    arn = await rig.key()
    await rig.kms(ALICE, "DisableKey", KeyId=arn)
    for uid, name, code in (
        (ALICE, arn, "DisabledException"),
        (BOB, arn, "AccessDeniedException"),
        (ALICE, "alias/none", "NotFoundException"),
    ):
        with refused(code):
            await rig.ebsd("SetAccount", Caller=caller(uid), EbsEncryptionByDefault=False, EbsDefaultKmsKeyId=name)
        assert (await rig.ebsd("GetAccount", Caller=caller(uid)))["EbsEncryptionByDefault"] is True


# --- status -----------------------------------------------------------------------------------------------


async def test_status_on_both_sockets(rig: Rig) -> None:
    await rig.key()
    status = (await rig.service(BOB, "GetStatus")).parameters
    assert status == {
        "State": "running",
        "Pid": os.getpid(),
        "StateDirectory": str(rig.state),
        "RootKey": str(rig.key_file),
        "RootKeyKind": "file",
        "Keys": 1,
    }
    assert (await rig.ebsd("GetStatus"))["State"] == "running"
    await rig.ebsd("Shutdown")
    assert rig.shut_down


# --- descriptors of users ---------------------------------------------------------------------------------


async def test_a_pipe_that_nobody_writes_stops_only_its_user(rig: Rig) -> None:
    descriptors = Descriptors(deadline=0.2)
    pipes = [os.pipe() for _ in range(4)]
    outcomes: list[str] = []

    async def read(fd: int) -> None:
        with pytest.raises(Timeout):
            await descriptors.read(fd, 100, ALICE, "PlaintextDescriptor")
        outcomes.append("alice")

    async with trio.open_nursery() as nursery:
        for reader, _ in pipes:
            nursery.start_soon(read, reader)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert await descriptors.read(memfd(b"x"), 100, BOB, "PlaintextDescriptor") == b"x"
        assert outcomes == []
    for _, writer in pipes:
        os.close(writer)
    assert outcomes == ["alice"] * 4


async def test_lone_surrogates_do_no_harm(rig: Rig) -> None:
    arn, odd = await rig.key(), "\ud800"
    for method, parameters in (
        ("DescribeKey", {"KeyId": odd}),
        ("CreateAlias", {"AliasName": odd, "TargetKeyId": arn}),
        ("CreateKey", {"Tags": [{"TagKey": odd, "TagValue": ""}]}),
        ("GenerateDataKey", {"KeyId": arn, "NumberOfBytes": 8, "EncryptionContext": {"a": odd}}),
        ("Decrypt", {"CiphertextBlob": odd}),
        ("RetireGrant", {"GrantToken": odd}),
        ("CreateGrant", {"KeyId": arn, "GranteePrincipal": odd, "Operations": ["Decrypt"]}),
        ("CreateGrant", {"KeyId": arn, "GranteePrincipal": "arn:aws:iam::000000001002:root", "Operations": [odd]}),
    ):
        with pytest.raises(RemoteError) as caught:
            await rig.kms(ALICE, method, **parameters)
        assert caught.value.code != "InternalFailure"
