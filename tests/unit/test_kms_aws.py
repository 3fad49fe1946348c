"""The back end aws: a broker against an endpoint of KMS, over HTTP, with everything that can go wrong on the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from aws_endpoint import CREDENTIALS, REGION, Endpoint, endpoint
from kms_rig import (
    ALICE,
    BOB,
    OTHER,
    ROOT,
    SNAPSHOT,
    VOLUME,
    Rig,
    ask,
    blob_bytes,
    caller,
    context,
    memory_directory,
    refused,
)
from test_kms_process import Host

from ebsd.domain.errors import EbsdError, RemoteError
from ebsd.kms import aws_client, awsleftovers
from ebsd.kms.aws_settings import AwsSettings
from ebsd.kms.awsleftovers import Leftovers

pytestmark = pytest.mark.trio

FAST = {"connect_timeout": 1.0, "read_timeout": 0.4, "attempts": 2, "deadline": 3.0}


@pytest.fixture(scope="module")
def kms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with endpoint(tmp_path_factory.mktemp("aws") / "log") as running:
        yield running


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


@pytest.fixture
def settings(kms: Endpoint, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    kms.order()
    return {"region": REGION, "endpoint_url": kms.url, "users": (ALICE,), **FAST}


@pytest.fixture
async def rig(tmp_path: Path, settings: dict[str, Any], nursery: trio.Nursery) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, nursery, aws=AwsSettings(**settings))
    yield rig
    await rig.close()


@pytest.fixture
def arn(kms: Endpoint) -> str:
    return str(kms.client().create_key()["KeyMetadata"]["Arn"])


async def attached(rig: Rig, arn: str, uid: int = ALICE) -> bytes:
    """Make a volume's data key and open it as a volume process does; return it."""
    blob = await rig.anchored(arn, uid)
    answer = await ask(await rig.session(arn, await rig.grant(arn, uid), blob))
    assert answer.anchor.key_arn == arn
    assert answer.data_key is not None
    with answer.data_key as key:
        return bytes(key.view)


# --- the whole of it --------------------------------------------------------------------------------------


async def test_a_volumes_data_key_comes_from_aws(rig: Rig, kms: Endpoint, arn: str) -> None:
    blob = await rig.anchored(arn)
    grant = await rig.grant(arn)
    answer = await ask(await rig.session(arn, grant, blob))
    assert answer.data_key is not None
    opened = kms.client().decrypt(KeyId=arn, CiphertextBlob=blob_bytes(blob), EncryptionContext=context())
    assert answer.data_key.equals(opened["Plaintext"])
    assert len(answer.data_key) == 64
    answer.data_key.wipe()
    await rig.ebsd("RetireGrant", KeyId=arn, GrantId=grant)
    assert kms.client().list_grants(KeyId=arn)["Grants"] == []
    await rig.ebsd("RetireGrant", KeyId=arn, GrantId=grant)  # ebsd may repeat after a crash
    # The session of a retired grant opens nothing.
    with refused("InvalidGrantTokenException"):
        await rig.session(arn, grant, blob)


async def test_the_key_of_an_archive_comes_from_aws_and_is_opened_for_named_users_only(
    rig: Rig, kms: Endpoint, arn: str
) -> None:
    pairs = {"aws:ebs:id": SNAPSHOT, "ebsd:format": "1/archive", "ebsd:archive": "00112233-4455-4677-8899-aabbccddeeff"}
    made = {"KeyId": arn, "EncryptionContext": pairs}
    wrapped = await rig.ebsd("GenerateDataKeyWithoutPlaintext", Caller=caller(ALICE), NumberOfBytes=64, **made)
    blob = wrapped["CiphertextBlob"]

    async def opened(uid: int) -> bytes:
        reply = await rig.ebsd("OpenArchiveSession", Caller=caller(uid), CiphertextBlob=blob, **made)
        answer = await ask(socket.socket(fileno=reply.fds[0]))
        assert answer.data_key is not None
        with answer.data_key as key:
            return bytes(key.view)

    expected = kms.client().decrypt(KeyId=arn, CiphertextBlob=blob_bytes(blob), EncryptionContext=pairs)["Plaintext"]
    assert await opened(ALICE) == expected
    with refused("AccessDeniedException"):
        await opened(BOB)


async def test_the_attach_grant_is_as_narrow_as_that_of_ebs(rig: Rig, kms: Endpoint, arn: str) -> None:
    await rig.ebsd("CreateGrant", Caller=caller(ALICE), KeyId=arn, EncryptionContextEquals=context(), Name="attach-1")
    again = await rig.ebsd(
        "CreateGrant", Caller=caller(ALICE), KeyId=arn, EncryptionContextEquals=context(), Name="attach-1"
    )
    (made,) = kms.client().list_grants(KeyId=arn)["Grants"]
    assert made["GrantId"] == again["GrantId"]
    assert made["Operations"] == ["Decrypt"]
    assert made["Constraints"] == {"EncryptionContextEquals": context()}
    assert made["GranteePrincipal"] == made["RetiringPrincipal"]
    assert made["GranteePrincipal"].startswith("arn:aws:sts::")


async def test_a_broker_started_since_asks_for_the_grant(
    rig: Rig, kms: Endpoint, arn: str, tmp_path: Path, settings: dict[str, Any], nursery: trio.Nursery
) -> None:
    blob, grant = await rig.anchored(arn), await rig.grant(arn)
    await rig.close()
    later = Rig(tmp_path, nursery, aws=AwsSettings(**settings))
    try:
        answer = await ask(await later.session(arn, grant, blob))
        assert answer.data_key is not None
        answer.data_key.wipe()
        assert kms.seen()["ListGrants"] >= 1
        for wrong in ("0" * 64, await _users_grant(kms, arn, {"aws:ebs:id": OTHER})):
            with refused("InvalidGrantTokenException"):
                await later.session(arn, wrong, blob)
    finally:
        await later.close()


async def _users_grant(kms: Endpoint, arn: str, pairs: dict[str, str]) -> str:
    made = kms.client().create_grant(
        KeyId=arn,
        GranteePrincipal="arn:aws:iam::123456789012:root",
        Operations=["Decrypt"],
        Constraints={"EncryptionContextEquals": pairs},
    )
    return str(made["GrantId"])


async def test_the_same_data_key_for_another_resource(rig: Rig, kms: Endpoint, arn: str) -> None:
    blob = await rig.anchored(arn)
    parameters = {
        "Caller": caller(ALICE),
        "CiphertextBlob": blob,
        "SourceEncryptionContext": context(),
        "DestinationKeyId": arn,
        "DestinationEncryptionContext": context(OTHER),
    }
    moved = await rig.ebsd("ReEncrypt", **parameters)
    assert moved["KeyId"] == arn
    anchor = {"Caller": caller(ALICE), "ResourceId": OTHER, "Encrypted": True, "KeyId": arn}
    await rig.ebsd("CreateAnchor", **anchor, CiphertextBlob=moved["CiphertextBlob"], EncryptionContext=context(OTHER))
    model = rig.broker.running.store.model
    assert model.anchors[OTHER].kcv == model.anchors[VOLUME].kcv
    # A wrong context, and the key of another back end.
    with refused("InvalidCiphertextException"):
        await rig.ebsd("ReEncrypt", **{**parameters, "SourceEncryptionContext": context(SNAPSHOT)})
    with refused("InvalidCiphertextException"):
        await rig.ebsd("ReEncrypt", **{**parameters, "DestinationKeyId": await rig.key()})


async def test_local_keys_work_beside_aws_and_without_it(rig: Rig, kms: Endpoint) -> None:
    kms.order("drop", on=["DescribeKey", "Decrypt", "CreateGrant", "GenerateDataKeyWithoutPlaintext"])
    assert len(await attached(rig, await rig.key())) == 64
    assert not kms.seen()


async def test_without_the_table_a_key_of_aws_is_unavailable(
    tmp_path: Path, nursery: trio.Nursery, arn: str, kms: Endpoint
) -> None:
    rig = Rig(tmp_path, nursery)
    try:
        for call in (
            rig.ebsd("DescribeKey", Caller=caller(ROOT), KeyId=arn),
            rig.ebsd("CreateGrant", Caller=caller(ROOT), KeyId=arn, EncryptionContextEquals=context()),
            rig.kms(ROOT, "DescribeKey", KeyId=arn),
        ):
            with refused("KMSInternalException", "has no [key_service.aws]"):
                await call
    finally:
        await rig.close()


async def test_a_broker_ends_in_order_while_aws_keeps_it_waiting(tmp_path: Path, kms: Endpoint, arn: str) -> None:
    host = Host(tmp_path)
    settings = {"region": REGION, "endpoint_url": kms.url, "environment": CREDENTIALS, "read_timeout": 15.0}
    try:
        kms.order("slow", on=["DescribeKey"], seconds=4)
        host.start(aws=settings)
        async with trio.open_nursery() as nursery:

            async def wait_for_aws() -> None:
                with pytest.raises(EbsdError):
                    await host.ebsd("DescribeKey", Caller={"Uid": os.getuid(), "Name": "me"}, KeyId=arn)

            nursery.start_soon(wait_for_aws)
            while not kms.seen()["DescribeKey"]:
                await trio.sleep(0.05)
            begun = trio.current_time()
            await trio.to_thread.run_sync(host.end, signal.SIGTERM)
            assert trio.current_time() - begun < 3
        assert host.child is not None
        assert host.child.status == 0
    finally:
        host.end()


# --- names and who may use them -----------------------------------------------------------------------------


async def describe(rig: Rig, name: str, uid: int = ALICE) -> str:
    return str((await rig.ebsd("DescribeKey", Caller=caller(uid), KeyId=name))["Key"]["Arn"])


async def test_names_of_keys(rig: Rig, kms: Endpoint, arn: str) -> None:
    kms.client().create_alias(AliasName="alias/names", TargetKeyId=arn)
    base = arn.partition("key/")[0]
    for name in (arn, f"{base}alias/names", "alias/names", "names", arn.rpartition("/")[2]):
        assert await describe(rig, name) == arn
    own = await rig.key()
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/names", TargetKeyId=own)
    assert await describe(rig, "alias/names") == own  # what this host has comes first
    assert await describe(rig, f"{base}alias/names") == arn
    for name in ("alias/nobody", "nobody", "00000000-0000-4000-8000-000000000009"):
        with refused("NotFoundException"):
            await describe(rig, name)
    for name in (arn.replace(REGION, "us-east-1"), arn.replace("123456789012:key/", "123456789012:key/0")):
        with refused("NotFoundException"):
            await describe(rig, name)


async def test_only_named_users_and_administrators_use_aws(rig: Rig, kms: Endpoint, arn: str) -> None:
    assert await describe(rig, arn, ROOT) == arn
    kms.order()
    for call in (
        rig.ebsd("DescribeKey", Caller=caller(BOB), KeyId=arn),
        rig.wrapped(arn, BOB),
        rig.grant(arn, BOB),
        rig.kms(BOB, "DescribeKey", KeyId=arn),
        rig.kms(BOB, "ListAliases", KeyId=arn),
    ):
        with refused("AccessDeniedException", "[key_service.aws] users"):
            await call
    assert not kms.seen()


async def test_everyone_may_be_named(tmp_path: Path, settings: dict[str, Any], nursery: trio.Nursery, arn: str) -> None:
    rig = Rig(tmp_path, nursery, aws=AwsSettings(**{**settings, "users": None}))
    assert await describe(rig, arn, BOB) == arn
    await rig.close()


async def test_aws_as_the_default_back_end(
    tmp_path: Path, settings: dict[str, Any], nursery: trio.Nursery, kms: Endpoint, arn: str
) -> None:
    kms.client().create_alias(AliasName="alias/default", TargetKeyId=arn)
    rig = Rig(tmp_path, nursery, aws=AwsSettings(**settings, default_key="alias/default"))
    assert await describe(rig, "alias/aws/ebs") == arn
    assert not rig.broker.running.store.model.keys
    await rig.close()


async def test_a_default_key_of_an_account(rig: Rig, kms: Endpoint, arn: str) -> None:
    set_key = {"Caller": caller(ALICE), "EbsDefaultKmsKeyId": arn}
    assert (await rig.ebsd("SetAccount", **set_key))["EbsDefaultKmsKeyId"] == arn
    kms.client().disable_key(KeyId=arn.rpartition("/")[2])
    with refused("DisabledException"):
        await rig.ebsd("SetAccount", **set_key)
    assert (await rig.ebsd("SetAccount", Caller=caller(ALICE), EbsDefaultKmsKeyId=""))["EbsDefaultKmsKeyId"] == ""


async def test_a_key_of_aws_is_shown_and_not_administered(rig: Rig, kms: Endpoint, arn: str) -> None:
    kms.client().create_alias(AliasName="alias/shown", TargetKeyId=arn)
    shown = (await rig.kms(ALICE, "DescribeKey", KeyId=arn))["KeyMetadata"]
    assert (shown["Arn"], shown["KeyState"], shown["KeyManager"]) == (arn, "Enabled", "CUSTOMER")
    aliases = (await rig.kms(ALICE, "ListAliases", KeyId=arn))["Aliases"]
    assert [alias["AliasName"] for alias in aliases] == ["alias/shown"]
    kms.order()
    for method, command, more in (
        ("DisableKey", "disable-key", {}),
        ("RotateKeyOnDemand", "rotate-key-on-demand", {}),
        ("ScheduleKeyDeletion", "schedule-key-deletion", {}),
        ("PutKeyPolicy", "put-key-policy", {"Policy": "{}"}),
        ("Decrypt", "decrypt", {"CiphertextBlob": "AAAA"}),
        ("GenerateDataKeyWithoutPlaintext", "generate-data-key-without-plaintext", {"NumberOfBytes": 64}),
    ):
        with refused("UnsupportedOperationException", "is a key of AWS KMS") as caught:
            await rig.kms(ALICE, method, KeyId=arn, **more)
        assert f"aws kms {command} --region {REGION} --key-id {arn}" in caught.value.hint
    with refused("UnsupportedOperationException"):
        await rig.kms(ALICE, "CreateAlias", AliasName="alias/mine", TargetKeyId=arn)
    assert not kms.seen()


async def test_what_doctor_is_told(rig: Rig, kms: Endpoint) -> None:
    found = (await rig.ebsd("CheckAws")).parameters
    assert found["Place"] == f"AWS KMS at {kms.url}"
    assert found["Principal"].startswith("arn:aws:sts::123456789012:")
    assert "Problem" not in found
    kms.order("error", on=["ListAliases"], code="AccessDeniedException")
    assert "Problem" not in (await rig.ebsd("CheckAws")).parameters  # it answers all the same
    kms.order("error", on=["ListAliases"], code="UnrecognizedClientException", message="The security token is invalid.")
    assert "refused the credentials" in (await rig.ebsd("CheckAws"))["Problem"]


async def test_doctor_is_told_nothing_of_what_is_not_configured(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig = Rig(tmp_path, nursery)
    assert (await rig.ebsd("CheckAws")).parameters == {}
    await rig.close()


# --- what goes wrong ----------------------------------------------------------------------------------------


async def test_a_disabled_key_opens_nothing_and_an_enabled_one_does(rig: Rig, kms: Endpoint, arn: str) -> None:
    blob, grant = await rig.anchored(arn), await rig.grant(arn)
    session = await rig.session(arn, grant, blob)
    key_id = arn.rpartition("/")[2]
    kms.client().disable_key(KeyId=key_id)
    with refused("DisabledException", f"{arn} is disabled.") as caught:
        await ask(session)
    assert "aws kms enable-key" in caught.value.hint
    with refused("DisabledException"):
        await rig.grant(arn)
    kms.client().enable_key(KeyId=key_id)
    assert (await ask(await rig.session(arn, grant, blob))).data_key is not None
    kms.client().schedule_key_deletion(KeyId=key_id)
    with refused("KMSInvalidStateException", f"{arn} is pending deletion."):
        await rig.grant(arn)


async def test_substitutions_are_found(rig: Rig, kms: Endpoint, arn: str) -> None:
    blob, grant = await rig.anchored(arn), await rig.grant(arn)
    other_key = str(kms.client().create_key()["KeyMetadata"]["Arn"])
    # Another data key under the same CMK and context; the blob of another CMK; another CMK altogether.
    with refused("Ebsd.IntegrityFailure", "another data key"):
        await ask(await rig.session(arn, grant, await rig.wrapped(arn)))
    with pytest.raises(RemoteError) as caught:  # IncorrectKeyException by AWS's book; moto says AccessDenied
        await ask(await rig.session(arn, grant, await rig.wrapped(other_key)))
    assert caught.value.code in ("IncorrectKeyException", "AccessDeniedException")
    with refused("Ebsd.IntegrityFailure", "its key is"):
        await rig.session(other_key, grant, blob)
    with refused("Ebsd.IntegrityFailure", "its key is"):
        await rig.session(await rig.key(), grant, blob)
    with refused("InvalidGrantTokenException"):
        await rig.session(arn, await rig.grant(arn, resource=OTHER), blob)


OPEN_ANYWAY = ["CreateGrant", "Decrypt", "DescribeKey", "GenerateDataKeyWithoutPlaintext", "ListGrants", "ReEncrypt"]
BODIES = {
    "no JSON": "<html>it works</html>",
    "nothing": "",
    "a list": "[]",
    "an empty object": "{}",
    "cut": '{"Plaintext": "AAAA',
    "numbers": '{"KeyId": 1, "Plaintext": 2, "CiphertextBlob": 3, "GrantId": 4, "KeyMetadata": 5, "Grants": 6}',
    "bad base64": '{"KeyId": "k", "Plaintext": "A", "CiphertextBlob": "A", "GrantId": "g", "GrantToken": ""}',
    "bytes": "\xff\xfe\x00",
    "another key": json.dumps({"KeyId": "arn:aws:kms:local:000000000000:key/x", "CiphertextBlob": "AAAA"}),
}


@pytest.mark.parametrize("body", BODIES)
async def test_nonsense_is_refused_by_name(rig: Rig, kms: Endpoint, arn: str, body: str) -> None:
    blob, grant = await rig.anchored(arn), await rig.grant(arn)
    session = await rig.session(arn, grant, blob)
    kms.order("body", on=OPEN_ANYWAY, body=BODIES[body])
    with refused("KMSInternalException", "cannot be understood"):
        await ask(session)
    for call in (describe(rig, arn), rig.wrapped(arn), rig.grant(arn)):
        with refused("KMSInternalException", "cannot be understood"):
            await call
    kms.order()
    assert (await ask(await rig.session(arn, grant, blob))).data_key is not None


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "drops the connection": ({"fault": "drop"}, "closed the connection"),
    "breaks off its answer": ({"fault": "half"}, ""),
    "answers 500": ({"fault": "error", "status": 500, "code": "KMSInternalException"}, "failed"),
    "answers 500 without a code": ({"fault": "body", "status": 500, "body": "oops"}, "HTTP status 500"),
    "answers 502": ({"fault": "body", "status": 502, "body": "<html>"}, "HTTP status 502"),
    "depends on what is slow": ({"fault": "error", "status": 503, "code": "DependencyTimeoutException"}, "failed"),
    "throttles": ({"fault": "error", "code": "ThrottlingException"}, "rate of requests"),
    "takes long": ({"fault": "slow", "seconds": 1.5}, "did not answer in time"),
}


@pytest.mark.parametrize("what", FAULTS)
async def test_an_endpoint_that_fails_twice_is_unavailable_and_once_is_not_noticed(
    rig: Rig, kms: Endpoint, arn: str, what: str
) -> None:
    fault, text = FAULTS[what]
    blob, grant = await rig.anchored(arn), await rig.grant(arn)
    kms.order(**fault, on=["Decrypt"])
    with refused("KMSInternalException", text):
        await ask(await rig.session(arn, grant, blob))
    assert kms.seen()["Decrypt"] == (1 if what == "breaks off its answer" else FAST["attempts"])
    if what != "breaks off its answer":
        kms.order(**fault, on=["Decrypt"], times=1)
        assert (await ask(await rig.session(arn, grant, blob))).data_key is not None


async def test_denials_are_not_repeated(rig: Rig, kms: Endpoint, arn: str) -> None:
    blob, grant = await rig.anchored(arn), await rig.grant(arn)
    message = "User: arn:aws:iam::123456789012:user/ebsd is not authorized to perform: kms:Decrypt"
    kms.order("error", on=["Decrypt"], code="AccessDeniedException", message=message)
    with refused("AccessDeniedException", message):
        await ask(await rig.session(arn, grant, blob))
    assert kms.seen()["Decrypt"] == 1


async def test_nobody_listens(tmp_path: Path, settings: dict[str, Any], nursery: trio.Nursery, arn: str) -> None:
    rig = Rig(tmp_path, nursery, aws=AwsSettings(**{**settings, "endpoint_url": "http://127.0.0.1:9"}))
    with refused("KMSInternalException", "AWS KMS at http://127.0.0.1:9 cannot be reached"):
        await describe(rig, arn)
    await rig.close()


async def test_the_deadline_ends_a_request_and_threads_do_not_pile_up(
    tmp_path: Path, settings: dict[str, Any], nursery: trio.Nursery, kms: Endpoint, arn: str
) -> None:
    slow = {**settings, "read_timeout": 20.0, "attempts": 1, "deadline": 1.0}
    rig = Rig(tmp_path, nursery, aws=AwsSettings(**slow))
    assert rig.broker.aws is not None
    with trio.fail_after(60):  # to load boto3 takes longer than the deadline, and goes on behind it
        while await rig.broker.aws.client.connect() is not None:
            pass
    assert await describe(rig, arn) == arn
    kms.order("slow", on=["DescribeKey"], seconds=4)
    before = threading.active_count()
    begun = trio.current_time()
    failed = []

    async def one() -> None:
        try:
            await describe(rig, arn)
        except EbsdError as exc:
            failed.append((exc.code, exc.message))

    async with trio.open_nursery() as many:
        for _ in range(4 * aws_client.THREADS):
            many.start_soon(one)
    assert trio.current_time() - begun < 4  # that is, before any answer
    assert len(failed) == 4 * aws_client.THREADS
    assert {code for code, _ in failed} == {"KMSInternalException"}
    assert all("did not answer within 1 seconds" in message for _, message in failed)
    assert threading.active_count() - before <= aws_client.THREADS
    assert kms.seen()["DescribeKey"] <= aws_client.THREADS
    kms.order()
    with trio.fail_after(60):  # the threads come back by themselves, and all is well again
        while failed:
            failed.clear()
            await one()
    await rig.close()


async def test_without_boto3_its_name_is_told(
    tmp_path: Path, settings: dict[str, Any], nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, arn: str
) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    rig = Rig(tmp_path, nursery, aws=AwsSettings(**settings))
    with refused("KMSInternalException", "boto3, which is not installed: pip install 'ebsd[aws]'"):
        await describe(rig, arn)
    await rig.close()


async def test_without_credentials_that_is_told(
    tmp_path: Path, settings: dict[str, Any], nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, arn: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    rig = Rig(tmp_path, nursery, aws=AwsSettings(**settings))
    with refused("KMSInternalException", "no credentials were found"):
        await describe(rig, arn)
    await rig.close()


async def test_an_anchor_that_changes_meanwhile_gives_no_key(rig: Rig, kms: Endpoint, arn: str) -> None:
    blob, grant = await rig.anchored(arn), await rig.grant(arn)
    session = await rig.session(arn, grant, blob)
    kms.order("slow", on=["Decrypt"], seconds=0.3)

    async def meanwhile() -> None:
        await trio.sleep(0.1)
        await rig.ebsd("DeleteAnchor", ResourceId=VOLUME)

    async with trio.open_nursery() as both:
        both.start_soon(meanwhile)
        with refused("Ebsd.IntegrityFailure"):
            await ask(session)


# --- grants that are left over ------------------------------------------------------------------------------


async def test_a_grant_whose_retirement_failed_is_retired_later(rig: Rig, kms: Endpoint, arn: str) -> None:
    grant = await rig.grant(arn)
    kms.order("drop", on=["RetireGrant"])
    with refused("KMSInternalException"):
        await rig.ebsd("RetireGrant", KeyId=arn, GrantId=grant)
    assert rig.broker.aws is not None
    with pytest.raises(EbsdError):
        await rig.broker.aws.retire_leftovers()
    kms.order()
    assert await rig.broker.aws.retire_leftovers() == 1
    assert kms.client().list_grants(KeyId=arn)["Grants"] == []
    assert await rig.broker.aws.retire_leftovers() == 0


async def test_a_grant_whose_making_was_given_up_is_retired_later(rig: Rig, kms: Endpoint, arn: str) -> None:
    request = {"Caller": caller(ALICE), "KeyId": arn, "EncryptionContextEquals": context()}
    kms.order("slow", on=["CreateGrant"], seconds=1)  # longer than an attempt waits
    for name in ("attach-1", "attach-2"):
        with refused("KMSInternalException", "did not answer in time"):
            await rig.ebsd("CreateGrant", **request, Name=name)
    await trio.sleep(1.1)
    kms.order()
    names = [grant["Name"] for grant in kms.client().list_grants(KeyId=arn)["Grants"]]
    assert set(names) == {"attach-1", "attach-2"}
    used = await rig.ebsd("CreateGrant", **request, Name="attach-2")  # asked for again: it is in use now
    assert rig.broker.aws is not None
    await rig.broker.aws.retire_leftovers()
    left = kms.client().list_grants(KeyId=arn)["Grants"]
    assert {grant["Name"] for grant in left} == {"attach-2"}
    assert used["GrantId"] in {grant["GrantId"] for grant in left}


async def test_a_detach_does_not_wait_long(
    tmp_path: Path, settings: dict[str, Any], nursery: trio.Nursery, kms: Endpoint, arn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("ebsd.kms.aws.RETIRE_SECONDS", 0.2)
    rig = Rig(tmp_path, nursery, aws=AwsSettings(**{**settings, "read_timeout": 2.0}))
    grant = await rig.grant(arn)
    kms.order("slow", on=["RetireGrant"], seconds=1)
    with refused("KMSInternalException", "within 0.2 seconds"):
        await rig.ebsd("RetireGrant", KeyId=arn, GrantId=grant)
    assert rig.broker.aws is not None
    kms.order()
    assert await rig.broker.aws.retire_leftovers() == 1
    await rig.close()


async def test_a_denied_retirement_is_not_repeated(rig: Rig, kms: Endpoint, arn: str) -> None:
    grant = await rig.grant(arn)
    kms.order("error", on=["RetireGrant"], code="AccessDeniedException")
    with refused("AccessDeniedException"):
        await rig.ebsd("RetireGrant", KeyId=arn, GrantId=grant)
    assert rig.broker.aws is not None
    assert await rig.broker.aws.retire_leftovers() == 0


async def test_leftovers_are_bounded() -> None:
    leftovers = Leftovers()
    for number in range(awsleftovers.MAX_NOTED + 5):
        leftovers.note_grant("arn", str(number))
    assert len(leftovers.all()) == awsleftovers.MAX_NOTED
    assert ("arn", "4", False) not in leftovers.all()
    assert ("arn", "5", False) in leftovers.all()


# --- secrets ------------------------------------------------------------------------------------------------


async def test_a_bytes_object_is_overwritten_in_place() -> None:
    value = os.urandom(64)
    aws_client.overwrite(value)
    assert value == bytes(64)


async def test_a_data_key_is_wiped_from_the_answer(rig: Rig, arn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    bodies: list[Any] = []
    plain, body = aws_client.secret_of, aws_client._wipe_body

    def spy(answer: dict[str, Any]) -> Any:
        seen.append(answer["Plaintext"])
        return plain(answer)

    def spy_body(http_response: Any, **other: Any) -> None:
        bodies.append(http_response.content)
        assert b"Plaintext" in http_response.content
        body(http_response, **other)

    monkeypatch.setattr("ebsd.kms.aws.secret_of", spy)
    monkeypatch.setattr(aws_client, "_wipe_body", spy_body)
    await attached(rig, arn)
    assert len(seen) == len(bodies) == 2
    assert all(value == bytes(64) for value in seen)
    assert not any(any(content) for content in bodies)


async def test_settings_show_no_credentials() -> None:
    settings = AwsSettings(region=REGION, environment={"AWS_SECRET_ACCESS_KEY": "hush"})
    assert "hush" not in repr(settings)
    assert "hush" not in str(settings)


async def test_a_deadline_leaves_no_thread_for_long() -> None:
    """With the defaults a thread that was given up ends within two seconds of its deadline."""
    defaults = AwsSettings(region=REGION)
    longest = defaults.attempts * (defaults.connect_timeout + defaults.read_timeout)
    backoff = sum(2**attempt for attempt in range(defaults.attempts - 1))
    assert longest + backoff <= defaults.deadline + 2
