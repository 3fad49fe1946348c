"""Policies and grants through the key service's interface: who gets in, who does not, and what a key session sees."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from kms_rig import ALICE, BOB, ROOT, Rig, ask, caller, memfd, memory_directory, refused

from ebsd.domain.errors import EbsdError
from ebsd.domain.ids import AccountId, user_arn
from ebsd.kms.policy import default_policy

pytestmark = pytest.mark.trio

ALICE_ACCOUNT, BOB_ACCOUNT = AccountId(f"{ALICE:012}"), AccountId(f"{BOB:012}")
BOB_ARN = user_arn(BOB_ACCOUNT, "bob")
INFRASTRUCTURE = f"arn:aws:sts::{ALICE_ACCOUNT}:assumed-role/aws:ec2-infrastructure/ebsd"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, nursery)
    yield rig
    await rig.close()


def with_statements(*more: dict[str, Any]) -> str:
    """The default policy of Alice's keys, and further statements."""
    policy = json.loads(default_policy(ALICE_ACCOUNT))
    policy["Statement"] += [{"Resource": "*", "Action": "kms:*", "Principal": "*", **statement} for statement in more]
    return json.dumps(policy)


async def encrypt(rig: Rig, key: str, uid: int = ALICE, **pairs: str) -> str:
    fd = memfd(b"secret")
    reply = await rig.kms(uid, "Encrypt", KeyId=key, PlaintextDescriptor=0, EncryptionContext=pairs, fds=[fd])
    return str(reply["CiphertextBlob"])


async def test_a_policy_is_put_read_and_obeyed(rig: Rig) -> None:
    key = await rig.key()
    blob = await encrypt(rig, key)
    with refused("AccessDeniedException"):
        await rig.kms(BOB, "Decrypt", CiphertextBlob=blob)
    policy = with_statements({"Effect": "Allow", "Principal": {"AWS": BOB_ARN}, "Action": "kms:Decrypt"})
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=policy)
    assert (await rig.kms(ALICE, "GetKeyPolicy", KeyId=key))["Policy"] == policy
    assert (await rig.kms(BOB, "Decrypt", CiphertextBlob=blob)).plaintext() == b"secret"
    assert (await rig.kms(BOB, "Decrypt", CiphertextBlob=blob, KeyId=key)).plaintext() == b"secret"
    with refused("AccessDeniedException", "kms:DescribeKey"):
        await rig.kms(BOB, "DescribeKey", KeyId=key)
    with refused("AccessDeniedException", "kms:PutKeyPolicy"):
        await rig.kms(BOB, "PutKeyPolicy", KeyId=key, Policy=policy)
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=default_policy(ALICE_ACCOUNT))
    with refused("AccessDeniedException", "refers to a customer master key that does not exist"):
        await rig.kms(BOB, "Decrypt", CiphertextBlob=blob)


async def test_the_policy_is_durable(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig = Rig(tmp_path, nursery)
    key = await rig.key()
    policy = with_statements({"Effect": "Deny", "Action": "kms:Encrypt"})
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=policy)
    await rig.close()
    rig = Rig(tmp_path, nursery)
    assert (await rig.kms(ALICE, "GetKeyPolicy", KeyId=key))["Policy"] == policy
    with refused("AccessDeniedException", "explicit deny"):
        await encrypt(rig, key)
    await rig.close()


async def test_a_malformed_policy_changes_nothing(rig: Rig) -> None:
    key = await rig.key()
    before = (await rig.kms(ALICE, "GetKeyPolicy", KeyId=key))["Policy"]
    for policy in ("", "{}", with_statements({"Effect": "Alow"}), with_statements({"Effect": "Deny"})):
        with refused("MalformedPolicyDocumentException"):
            await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=policy)
    with refused("MalformedPolicyDocumentException"):
        await rig.key(Policy="{}")
    with refused("ValidationException", "PolicyName must be default"):
        await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=before, PolicyName="mine")
    assert (await rig.kms(ALICE, "GetKeyPolicy", KeyId=key))["Policy"] == before
    assert (await rig.kms(ALICE, "ListKeyPolicies", KeyId=key))["PolicyNames"] == ["default"]


async def test_a_locked_key_is_opened_again_by_an_administrator_only(rig: Rig) -> None:
    key = await rig.key()
    locked = with_statements({"Effect": "Deny"})
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=locked, BypassPolicyLockoutSafetyCheck=True)
    with refused("AccessDeniedException", "explicit deny"):
        await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=default_policy(ALICE_ACCOUNT))
    with refused("AccessDeniedException", "explicit deny"):
        await rig.kms(ROOT, "DisableKey", KeyId=key)
    await rig.kms(ROOT, "PutKeyPolicy", KeyId=key, Policy=default_policy(ALICE_ACCOUNT))
    await rig.kms(ALICE, "DescribeKey", KeyId=key)


async def test_a_policy_of_the_key_is_put_when_it_is_made(rig: Rig) -> None:
    policy = with_statements({"Effect": "Allow", "Principal": {"AWS": BOB_ARN}, "Action": "kms:DescribeKey"})
    key = await rig.key(Policy=policy)
    await rig.kms(BOB, "DescribeKey", KeyId=key)
    with refused("MalformedPolicyDocumentException", "will not allow you to update"):
        await rig.key(Policy=with_statements({"Effect": "Deny"}))


async def test_the_managed_key_keeps_its_policy(rig: Rig) -> None:
    await rig.kms(ALICE, "DescribeKey", KeyId="alias/aws/ebs")
    policy = json.loads((await rig.kms(ALICE, "GetKeyPolicy", KeyId="alias/aws/ebs"))["Policy"])
    assert policy["Id"] == "auto-ebs-2"
    for uid in (ALICE, ROOT):
        with refused("AccessDeniedException"):
            arn = (await rig.kms(ALICE, "DescribeKey", KeyId="alias/aws/ebs"))["KeyMetadata"]["Arn"]
            await rig.kms(uid, "PutKeyPolicy", KeyId=arn, Policy=default_policy(ALICE_ACCOUNT))


async def test_a_grant_lets_another_user_in_and_is_revoked(rig: Rig) -> None:
    key = await rig.key()
    blob = await encrypt(rig, key, dept="it")
    made = await rig.kms(
        ALICE,
        "CreateGrant",
        KeyId=key,
        GranteePrincipal=BOB_ARN,
        Operations=["Decrypt"],
        Constraints={"EncryptionContextEquals": {"dept": "it"}},
        Name="for-bob",
    )
    opened = await rig.kms(BOB, "Decrypt", CiphertextBlob=blob, EncryptionContext={"dept": "it"})
    assert opened.plaintext() == b"secret"
    other = await encrypt(rig, key, dept="hr")
    with refused("AccessDeniedException"):
        await rig.kms(BOB, "Decrypt", CiphertextBlob=other, EncryptionContext={"dept": "hr"})
    (listed,) = (await rig.kms(ALICE, "ListGrants", KeyId=key))["Grants"]
    assert (listed["GrantId"], listed["Name"], listed["GranteePrincipal"]) == (made["GrantId"], "for-bob", BOB_ARN)
    assert listed["Constraints"] == {"EncryptionContextEquals": {"dept": "it"}}
    assert "GrantToken" not in json.dumps(listed)
    with refused("AccessDeniedException"):
        await rig.kms(BOB, "ListGrants", KeyId=key)
    with refused("AccessDeniedException"):
        await rig.kms(BOB, "RevokeGrant", KeyId=key, GrantId=made["GrantId"])
    with refused("InvalidGrantIdException"):
        await rig.kms(ALICE, "RevokeGrant", KeyId=key, GrantId="0" * 64)
    await rig.kms(ALICE, "RevokeGrant", KeyId=key, GrantId=made["GrantId"])
    with refused("AccessDeniedException"):
        await rig.kms(BOB, "Decrypt", CiphertextBlob=blob, EncryptionContext={"dept": "it"})


async def test_grants_come_in_pages(rig: Rig) -> None:
    key = await rig.key()
    made = {
        (await rig.kms(ALICE, "CreateGrant", KeyId=key, GranteePrincipal=BOB_ARN, Operations=["Decrypt"]))["GrantId"]
        for _ in range(5)
    }
    seen: list[str] = []
    marker = None
    for expected in (2, 2, 1):
        page = await rig.kms(ALICE, "ListGrants", KeyId=key, Limit=2, Marker=marker)
        assert len(page["Grants"]) == expected
        seen += [grant["GrantId"] for grant in page["Grants"]]
        marker = page.parameters.get("NextMarker")
        assert page["Truncated"] is (marker is not None)
    assert set(seen) == made
    assert len(seen) == 5
    with refused("ValidationException"):
        await rig.kms(ALICE, "ListGrants", KeyId=key, Limit=0)
    with refused("ValidationException", "Marker"):
        await rig.kms(ALICE, "ListGrants", KeyId=key, Marker="x")


async def test_a_policy_that_denies_the_volume_processes_stops_a_session(rig: Rig) -> None:
    key = await rig.key()
    blob = await rig.anchored(key)
    grant = await rig.grant(key)
    (await ask(await rig.session(key, grant, blob))).data_key.wipe()  # type: ignore[union-attr]
    await rig.kms(
        ALICE,
        "PutKeyPolicy",
        KeyId=key,
        Policy=with_statements({"Effect": "Deny", "Principal": {"AWS": INFRASTRUCTURE}, "Action": "kms:Decrypt"}),
    )
    with refused("AccessDeniedException", "explicit deny"):
        await rig.session(key, grant, blob)


async def test_a_policy_that_changes_after_a_session_was_opened_still_counts(rig: Rig) -> None:
    key = await rig.key()
    blob = await rig.anchored(key)
    session = await rig.session(key, await rig.grant(key), blob)
    deny = with_statements({"Effect": "Deny", "Principal": {"AWS": INFRASTRUCTURE}, "Action": "kms:Decrypt"})
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=deny)
    with pytest.raises(EbsdError, match="explicit deny"):
        await ask(session)


async def test_a_policy_may_ask_that_keys_are_used_through_ebsd(rig: Rig) -> None:
    direct = {"Effect": "Deny", "Action": "kms:GenerateDataKey*", "Condition": {"Null": {"kms:ViaService": "true"}}}
    key = await rig.key(Policy=with_statements(direct))
    with refused("AccessDeniedException", "explicit deny"):
        await rig.kms(ALICE, "GenerateDataKeyWithoutPlaintext", KeyId=key, NumberOfBytes=64)
    await rig.wrapped(key)


async def test_the_encryption_context_of_a_volume_is_a_condition(rig: Rig) -> None:
    only = {
        "Effect": "Deny",
        "Action": ["kms:GenerateDataKey*", "kms:ReEncrypt*"],
        "Condition": {"StringNotEquals": {"kms:EncryptionContext:dept": "it"}},
    }
    key = await rig.key(Policy=with_statements(only))
    with refused("AccessDeniedException", "explicit deny"):
        await rig.wrapped(key)
    await rig.wrapped(key, dept="it")


async def test_another_user_may_make_volumes_under_a_key_that_lets_him(rig: Rig) -> None:
    through = {
        "Effect": "Allow",
        "Principal": {"AWS": BOB_ARN},
        "Action": ["kms:GenerateDataKeyWithoutPlaintext", "kms:DescribeKey"],
        "Condition": {"StringLike": {"kms:ViaService": "ec2.*.amazonaws.com"}},
    }
    grants = {
        "Effect": "Allow",
        "Principal": {"AWS": BOB_ARN},
        "Action": "kms:CreateGrant",
        "Condition": {
            "Bool": {"kms:GrantIsForAWSResource": "true"},
            "ForAllValues:StringEquals": {"kms:GrantOperations": ["Decrypt"]},
        },
    }
    key = await rig.key(Policy=with_statements(through, grants))
    blob = await rig.anchored(key, BOB)
    grant = await rig.grant(key, BOB)
    answer = await ask(await rig.session(key, grant, blob))
    answer.data_key.wipe()  # type: ignore[union-attr]
    with refused("AccessDeniedException"):
        await rig.kms(BOB, "GenerateDataKeyWithoutPlaintext", KeyId=key, NumberOfBytes=64)
    with refused("AccessDeniedException"):
        await rig.kms(BOB, "CreateGrant", KeyId=key, GranteePrincipal=BOB_ARN, Operations=["Decrypt"])
    with refused("AccessDeniedException"):
        await rig.ebsd("DescribeKey", Caller=caller(1003), KeyId=key)


async def test_a_grant_is_issued_by_who_asked_for_it(rig: Rig) -> None:
    """KMS API, GrantListEntry and RetireGrant: the account under which it was issued may retire it as well."""
    allow = {"Effect": "Allow", "Principal": {"AWS": BOB_ARN}, "Action": ["kms:CreateGrant", "kms:Decrypt"]}
    key = await rig.key(Policy=with_statements(allow))
    request = {"KeyId": key, "GranteePrincipal": BOB_ARN, "Operations": ["Decrypt"], "Name": "same"}
    made = {uid: (await rig.kms(uid, "CreateGrant", **request)).parameters for uid in (ALICE, BOB, ROOT)}
    assert made[ALICE]["GrantId"] == made[ROOT]["GrantId"] != made[BOB]["GrantId"]
    listed = (await rig.kms(ALICE, "ListGrants", KeyId=key))["Grants"]
    issuers = {grant["GrantId"]: grant["IssuingAccount"] for grant in listed}
    assert issuers == {
        made[uid]["GrantId"]: f"arn:aws:iam::{account}:root"
        for uid, account in ((ALICE, ALICE_ACCOUNT), (BOB, BOB_ACCOUNT))
    }
    with refused("InvalidGrantTokenException"):
        await rig.kms(BOB, "RetireGrant", GrantToken=made[ALICE]["GrantToken"])
    with refused("InvalidGrantTokenException"):
        await rig.kms(ALICE, "RetireGrant", GrantToken=made[BOB]["GrantToken"])
    await rig.kms(BOB, "RetireGrant", GrantToken=made[BOB]["GrantToken"])
    await rig.kms(ALICE, "RetireGrant", GrantToken=made[ROOT]["GrantToken"])


async def test_a_grant_that_exists_is_not_told_by_the_name_of_its_key(rig: Rig) -> None:
    key = await rig.key()
    made = await rig.kms(ALICE, "CreateGrant", KeyId=key, GranteePrincipal=BOB_ARN, Operations=["Decrypt"])
    texts = set()
    for grant in (made["GrantId"], "0" * 64):
        for name in (key, "alias/nowhere", "*", "arn:aws:kms:local:0:key/x", key[:-4] + "0000"):
            with refused("InvalidGrantTokenException") as caught:
                await rig.kms(BOB, "RetireGrant", KeyId=name, GrantId=grant)
            texts.add(caught.value.message.replace(grant, "GRANT"))
    assert len(texts) == 1


async def test_a_grant_makes_no_wider_grant(rig: Rig) -> None:
    """From the key's owner to Bob to a third user, and no further than the first grant went."""
    key = await rig.key()
    blob, other = await encrypt(rig, key, dept="it"), await encrypt(rig, key, dept="hr")
    third = 1003
    third_arn = user_arn(AccountId(f"{third:012}"), "third")
    subset = {"EncryptionContextSubset": {"dept": "it"}}
    operations = ["CreateGrant", "Decrypt", "RetireGrant"]
    parent = await rig.kms(
        ALICE, "CreateGrant", KeyId=key, GranteePrincipal=BOB_ARN, Operations=operations, Constraints=subset
    )
    request = {"KeyId": key, "GranteePrincipal": third_arn, "Operations": ["Decrypt"], "Constraints": subset}
    for wider in (
        {"Constraints": None},
        {"Constraints": {"EncryptionContextSubset": {"dept": "hr"}}},
        {"Constraints": {"EncryptionContextEquals": {"dept": "hr"}}},
        {"Operations": ["Decrypt", "Encrypt"]},
        {"Operations": ["DescribeKey"]},
    ):
        with refused("AccessDeniedException"):
            await rig.kms(BOB, "CreateGrant", **{**request, **wider})
    child = await rig.kms(BOB, "CreateGrant", **request)
    opened = await rig.kms(third, "Decrypt", CiphertextBlob=blob, EncryptionContext={"dept": "it"})
    assert opened.plaintext() == b"secret"
    with refused("AccessDeniedException"):
        await rig.kms(third, "Decrypt", CiphertextBlob=other, EncryptionContext={"dept": "hr"})
    with refused("AccessDeniedException"):  # a grantee without CreateGrant
        await rig.kms(third, "CreateGrant", **request)
    # Retiring the parent leaves the child, as on AWS
    await rig.kms(BOB, "RetireGrant", KeyId=key, GrantId=parent["GrantId"])
    (await rig.kms(third, "Decrypt", CiphertextBlob=blob, EncryptionContext={"dept": "it"})).plaintext()
    await rig.kms(ALICE, "RevokeGrant", KeyId=key, GrantId=child["GrantId"])
    with refused("AccessDeniedException"):
        await rig.kms(third, "Decrypt", CiphertextBlob=blob, EncryptionContext={"dept": "it"})


async def test_an_explicit_deny_wins_over_a_grant_at_the_socket(rig: Rig) -> None:
    key = await rig.key(Policy=with_statements({"Effect": "Deny", "Principal": {"AWS": BOB_ARN}}))
    blob = await encrypt(rig, key)
    await rig.kms(ALICE, "CreateGrant", KeyId=key, GranteePrincipal=BOB_ARN, Operations=["Decrypt", "DescribeKey"])
    with refused("AccessDeniedException"):
        await rig.kms(BOB, "Decrypt", CiphertextBlob=blob)
    with refused("AccessDeniedException"):
        await rig.kms(BOB, "DescribeKey", KeyId=key)


async def test_aliases_need_the_permission_of_the_key_that_they_name(rig: Rig) -> None:
    """KMS Developer Guide, "Controlling access to aliases": of the present key and of the new one."""
    deny = {"Effect": "Deny", "Action": ["kms:DeleteAlias", "kms:UpdateAlias"]}
    guarded, free = await rig.key(Policy=with_statements(deny)), await rig.key()
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/guarded", TargetKeyId=guarded)
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/free", TargetKeyId=free)
    with refused("AccessDeniedException", "kms:DeleteAlias"):
        await rig.kms(ALICE, "DeleteAlias", AliasName="alias/guarded")
    with refused("AccessDeniedException", "kms:UpdateAlias"):
        await rig.kms(ALICE, "UpdateAlias", AliasName="alias/guarded", TargetKeyId=free)
    with refused("AccessDeniedException", "kms:UpdateAlias"):
        await rig.kms(ALICE, "UpdateAlias", AliasName="alias/free", TargetKeyId=guarded)
    targets = {a["AliasName"]: a["TargetKeyId"] for a in (await rig.kms(ALICE, "ListAliases"))["Aliases"]}
    assert targets == {"alias/guarded": guarded[-36:], "alias/free": free[-36:]}
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=guarded, Policy=default_policy(ALICE_ACCOUNT))
    await rig.kms(ALICE, "UpdateAlias", AliasName="alias/guarded", TargetKeyId=free)
    await rig.kms(ALICE, "DeleteAlias", AliasName="alias/guarded")


async def test_an_alias_is_one_however_it_is_written(rig: Rig) -> None:
    deny = {"Effect": "Deny", "Action": "kms:Encrypt", "Condition": {"StringEquals": {"kms:RequestAlias": "alias/a"}}}
    key = await rig.key(Policy=with_statements(deny))
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/a", TargetKeyId=key)
    for name in ("alias/a", "a", key.rpartition(":")[0] + ":alias/a"):
        with refused("AccessDeniedException", "explicit deny"):
            await encrypt(rig, name)
    for name in (key, key[-36:]):
        await encrypt(rig, name)


async def test_a_policy_at_the_limit_is_taken_and_one_byte_more_is_not(rig: Rig) -> None:
    key = await rig.key()
    policy = json.loads(default_policy(ALICE_ACCOUNT))
    policy["Id"] = ""
    policy["Id"] = "x" * (32768 - len(json.dumps(policy)))
    assert len(json.dumps(policy)) == 32768
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=json.dumps(policy))
    with refused("MalformedPolicyDocumentException", "longer than 32768 bytes"):
        await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=json.dumps(policy) + " ")
    policy["Id"] = "ü" * 17000
    with refused("MalformedPolicyDocumentException", "longer than 32768 bytes"):
        await rig.kms(ALICE, "PutKeyPolicy", KeyId=key, Policy=json.dumps(policy, ensure_ascii=False))
