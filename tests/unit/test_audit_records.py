"""What the audit log says of each operation, beside what AWS CloudTrail says of it."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from kms_rig import ALICE, BOB, ROOT, VOLUME, Rig, ask, caller, context, memfd, memory_directory, refused

from ebsd.domain.errors import AuditLogFull, RemoteError
from ebsd.kms.audit import boundary, records
from ebsd.kms.descriptors import Descriptors
from ebsd.wire.idl import Interface

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
SERVICE = "ec2.local.amazonaws.com"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Rig]:
    made = Rig(tmp_path, nursery)
    yield made
    await made.close()


def logged(rig: Rig) -> list[dict[str, Any]]:
    """Return all records but those of chains, oldest first."""
    found = []
    for path in rig.broker.trail.log.segments():
        found += [json.loads(line)["record"] for line in path.read_text().splitlines()]
    return [record for record in found if not record["eventName"].endswith("AuditChain")]


def raw(rig: Rig) -> str:
    return "".join(path.read_text() for path in rig.broker.trail.log.segments())


@pytest.mark.trio
async def test_the_attachment_of_a_volume_as_cloudtrail_has_it(rig: Rig) -> None:
    arn = await rig.key()
    blob = await rig.wrapped(arn, team="blue")
    members = {"KeyId": arn, "CiphertextBlob": blob, "EncryptionContext": context(team="blue")}
    await rig.ebsd("CreateAnchor", Caller=caller(ALICE), ResourceId=VOLUME, Encrypted=True, **members)
    constraint = {"EncryptionContextEquals": context(team="blue")}
    grant = (await rig.ebsd("CreateGrant", Caller=caller(ALICE), KeyId=arn, Name="attach-1", **constraint))["GrantId"]
    reply = await rig.ebsd("OpenKeySession", ResourceId=VOLUME, GrantId=grant, **members)
    answer = await ask(socket.socket(fileno=reply.fds[0]))
    assert answer.data_key is not None
    answer.data_key.wipe()
    await rig.ebsd("RetireGrant", KeyId=arn, GrantId=grant)

    found = logged(rig)
    assert [record["eventName"] for record in found] == [
        "CreateKey",
        "GenerateDataKeyWithoutPlaintext",
        "CreateAnchor",
        "CreateGrant",
        "Decrypt",
        "RetireGrant",
    ]
    create_key, generate, anchor, create_grant, decrypt, retire = found
    account = f"{ALICE:012}"
    pairs = {"aws:ebs:id": VOLUME, "ebsd:format": "1/aes-256-xts/4096", "team": "blue"}
    infrastructure = f"arn:aws:sts::{account}:assumed-role/aws:ec2-infrastructure/ebsd"
    material = create_key["responseElements"]["keyMetadata"]["currentKeyMaterialId"]
    common = {
        "eventVersion": "1.11",
        "eventSource": "kms.amazonaws.com",
        "awsRegion": "local",
        "sourceIPAddress": SERVICE,
        "userAgent": SERVICE,
        "eventType": "AwsApiCall",
        "managementEvent": True,
        "eventCategory": "Management",
        "recipientAccountId": account,
    }
    user = {
        "type": "IAMUser",
        "principalId": str(ALICE),
        "arn": f"arn:aws:iam::{account}:user/user{ALICE}",
        "accountId": account,
        "userName": f"user{ALICE}",
        "invokedBy": SERVICE,
    }
    key_resource = {"accountId": account, "type": "AWS::KMS::Key", "ARN": arn}
    volume_resource = {
        "accountId": account,
        "type": "AWS::EC2::Volume",
        "ARN": f"arn:aws:ec2:local:{account}:volume/{VOLUME}",
    }
    expected = [
        (
            generate,
            {
                "userIdentity": user,
                "eventName": "GenerateDataKeyWithoutPlaintext",
                "requestParameters": {"keyId": arn, "numberOfBytes": 64, "encryptionContext": pairs},
                "responseElements": None,
                "additionalEventData": {"keyMaterialId": material},
                "readOnly": True,
                "resources": [key_resource],
            },
        ),
        (
            create_grant,
            {
                "userIdentity": user,
                "eventName": "CreateGrant",
                "requestParameters": {
                    "keyId": arn,
                    "constraints": {"encryptionContextEquals": pairs},
                    "operations": ["Decrypt"],
                    "granteePrincipal": infrastructure,
                    "retiringPrincipal": SERVICE,
                    "name": "attach-1",
                },
                "responseElements": {"grantId": grant},
                "readOnly": False,
                "resources": [key_resource],
            },
        ),
        (
            decrypt,
            {
                "userIdentity": {
                    "type": "AssumedRole",
                    "principalId": "aws:ec2-infrastructure/ebsd",
                    "arn": infrastructure,
                    "accountId": account,
                    "invokedBy": SERVICE,
                },
                "eventName": "Decrypt",
                "requestParameters": {"encryptionContext": pairs, "encryptionAlgorithm": "SYMMETRIC_DEFAULT"},
                "responseElements": None,
                "additionalEventData": {"resourceId": VOLUME, "grantId": grant, "keyMaterialId": material},
                "readOnly": True,
                "resources": [key_resource, volume_resource],
            },
        ),
        (
            retire,
            {
                "userIdentity": {"type": "AWSService", "invokedBy": SERVICE},
                "eventName": "RetireGrant",
                "requestParameters": {"keyId": arn, "grantId": grant},
                "responseElements": None,
                "readOnly": False,
                "resources": [key_resource],
            },
        ),
    ]
    for record, members in expected:
        fresh = {name: record[name] for name in ("eventTime", "requestID", "eventID")}
        assert record == {**common, **members, **fresh}, record["eventName"]
        assert TIME.fullmatch(fresh["eventTime"])
        assert UUID.fullmatch(fresh["requestID"])
        assert UUID.fullmatch(fresh["eventID"])
    assert create_grant["requestID"] == decrypt["requestID"]  # as on AWS
    assert len({record["eventID"] for record in found}) == len(found)
    assert anchor["eventSource"] == "ebsd.local"
    assert volume_resource in anchor["resources"]
    assert create_key["sourceIPAddress"] == "local"
    assert create_key["userAgent"] == f"keys.sock uid {ALICE}"
    assert "invokedBy" not in create_key["userIdentity"]


@pytest.mark.trio
async def test_refusals_are_recorded_with_code_and_text(rig: Rig) -> None:
    arn = await rig.key()
    blob, grant = await rig.anchored(arn), await rig.grant(arn)
    with refused("AccessDeniedException"):
        await rig.kms(BOB, "DisableKey", KeyId=arn)
    denied = logged(rig)[-1]
    assert (denied["eventName"], denied["errorCode"]) == ("DisableKey", "AccessDeniedException")
    assert f"{BOB:012}" in denied["errorMessage"]
    assert denied["userIdentity"]["accountId"] == f"{BOB:012}"
    assert denied["recipientAccountId"] == f"{ALICE:012}"
    assert UUID.fullmatch(denied["sharedEventID"])
    assert records.accounts_of(denied) == {f"{ALICE:012}", f"{BOB:012}"}

    session = await rig.session(arn, grant, blob)
    await rig.kms(ALICE, "DisableKey", KeyId=arn)
    with pytest.raises(RemoteError):
        await ask(session)
    decrypt = logged(rig)[-1]
    assert (decrypt["eventName"], decrypt["errorCode"]) == ("Decrypt", "DisabledException")
    assert decrypt["errorMessage"] == f"{arn} is disabled."
    with refused("InvalidGrantTokenException"):
        await rig.session(arn, "0" * 64, blob)
    opening = logged(rig)[-1]
    assert (opening["eventName"], opening["errorCode"]) == ("OpenKeySession", "InvalidGrantTokenException")


@pytest.mark.trio
async def test_an_administrator_is_named_and_so_is_whom_he_acted_for(rig: Rig) -> None:
    arn = await rig.key()
    await rig.kms(ROOT, "DisableKey", KeyId=arn)
    record = logged(rig)[-1]
    assert record["userIdentity"]["accountId"] == "0" * 12
    assert record["additionalEventData"] == {"actingFor": [f"{ALICE:012}"]}
    assert record["recipientAccountId"] == f"{ALICE:012}"


@pytest.mark.trio
async def test_settings_have_the_names_of_ec2(rig: Rig) -> None:
    for members in ({"EbsEncryptionByDefault": False}, {"EbsEncryptionByDefault": True}, {"EbsDefaultKmsKeyId": ""}):
        await rig.ebsd("SetAccount", Caller=caller(ALICE), **members)
    arn = await rig.key()
    await rig.ebsd("SetAccount", Caller=caller(ALICE), EbsDefaultKmsKeyId=arn)
    found = [(record["eventSource"], record["eventName"]) for record in logged(rig)]
    assert found == [
        ("ec2.amazonaws.com", "DisableEbsEncryptionByDefault"),
        ("ec2.amazonaws.com", "EnableEbsEncryptionByDefault"),
        ("ec2.amazonaws.com", "ResetEbsDefaultKmsKeyId"),
        ("kms.amazonaws.com", "CreateKey"),
        ("ec2.amazonaws.com", "ModifyEbsDefaultKmsKeyId"),
    ]


@pytest.mark.trio
async def test_no_plaintext_wrapped_key_token_or_passphrase_is_in_the_log(rig: Rig) -> None:
    arn = await rig.key()
    secret = b"a plaintext of a user, 32 bytes."
    wrapped = (await rig.kms(ALICE, "Encrypt", KeyId=arn, PlaintextDescriptor=0, fds=[memfd(secret)]))["CiphertextBlob"]
    opened = await rig.kms(ALICE, "Decrypt", CiphertextBlob=wrapped)
    assert opened.plaintext() == secret
    made = await rig.kms(ALICE, "GenerateDataKey", KeyId=arn, NumberOfBytes=32)
    data_key = made.plaintext()
    again = await rig.kms(ALICE, "ReEncrypt", CiphertextBlob=wrapped, DestinationKeyId=arn)
    lent = {"GranteePrincipal": f"arn:aws:iam::{BOB:012}:user/b", "Operations": ["Decrypt"]}
    token = (await rig.kms(ALICE, "CreateGrant", KeyId=arn, **lent))["GrantToken"]
    with refused("InvalidGrantIdException", token[:20]):  # given in the wrong place, and quoted by the refusal
        await rig.kms(ALICE, "RevokeGrant", KeyId=arn, GrantId=token)
    await rig.kms(ALICE, "RetireGrant", GrantToken=token)
    with refused("InvalidGrantTokenException"):
        await rig.kms(ALICE, "RetireGrant", GrantToken=token)
    blob, grant = await rig.anchored(arn), await rig.grant(arn)
    answer = await ask(await rig.session(arn, grant, blob))
    assert answer.data_key is not None
    volume_key = bytes(answer.data_key.view)
    answer.data_key.wipe()
    passphrase = b"correct horse battery staple"
    await rig.service(ROOT, "Backup", Destination=0, PassphraseDescriptor=1, fds=[memfd(b""), memfd(passphrase)])
    log = raw(rig)
    for text in (
        token,
        wrapped,
        again["CiphertextBlob"],
        made["CiphertextBlob"],
        blob,
        "CiphertextBlob",
        "ciphertextBlob",
    ):
        assert text not in log
    for content in (secret, data_key, volume_key, passphrase):
        assert content.hex() not in log
        assert json.dumps(content.decode("latin-1"))[1:-1] not in log


def test_an_error_that_quotes_a_secret_of_its_request_does_not_carry_it_into_the_log() -> None:
    token = "t" * 44
    error = RemoteError("InvalidGrantTokenException", f"The token {token} is no token.")
    event = records.Event(
        "s",
        "RetireGrant",
        {"accountId": "1"},
        {"GrantToken": token, "NewMember": "x" * 40},
        records.Outcome(error=error),
    )
    record = records.record_of(event, records.Stamp("t", "e", "r", "s"))
    assert record["errorMessage"] == f"The token {records.HIDDEN} is no token."
    assert record["requestParameters"] == {"newMember": records.HIDDEN}


@pytest.mark.trio
async def test_what_is_left_out_for_other_reasons_is_not_hidden_elsewhere(rig: Rig) -> None:
    arn = await rig.key()
    name = "a-user-name-of-many-letters"
    await rig.ebsd("DescribeKey", Caller={"Uid": ALICE, "Name": name}, KeyId=arn)
    record = logged(rig)[-1]
    assert record["userIdentity"]["userName"] == name
    assert [resource["ARN"] for resource in record["resources"]] == [arn]
    await rig.kms(ALICE, "ListKeys")
    assert records.HIDDEN not in raw(rig)


def test_a_record_that_is_too_long_keeps_a_digest_of_what_it_leaves_out() -> None:
    event = records.Event("s", "PutKeyPolicy", {"accountId": "1"}, {"Policy": "\x01" * 32768}, records.Outcome())
    record = records.record_of(event, records.Stamp("t", "e", "r", "s"))
    assert record["requestParameters"]["omitted"] is True
    assert re.fullmatch(r"[0-9a-f]{64}", record["requestParameters"]["sha256"])
    assert len(json.dumps(record)) < 2000


def test_every_method_is_recorded_unless_a_rule_names_it() -> None:
    methods = {
        f"{name}.{method}"
        for name in ("io.ebsd.Broker", "io.ebsd.KMS", "io.ebsd.KeyService")
        for method in Interface.load(name).methods
    }
    assert {name for name in boundary.RULES if not name.startswith("io.ebsd.Audit.")} <= methods
    assert not [name for name in boundary.RULES if name.startswith("io.ebsd.KMS.")]


@pytest.mark.trio
async def test_what_cannot_be_recorded_does_not_happen(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    arn = await rig.key()
    blob, grant = await rig.anchored(arn), await rig.grant(arn)
    session = await rig.session(arn, grant, blob)

    def full(*_args: object, **_more: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(rig.broker.trail.log, "append", full)
        with pytest.raises(RemoteError) as caught:
            await ask(session)  # the record comes first, so the key stays
        assert (caught.value.code, caught.value.message) == (AuditLogFull.code, AuditLogFull.template)
        with refused("Ebsd.NoSpace", "audit log"):
            await rig.kms(ALICE, "GenerateDataKey", KeyId=arn, NumberOfBytes=32)
        patched.setattr(rig.broker.trail.log, "has_room", lambda: False)
        patched.setattr(rig.broker.trail.log, "make_room", full)
        with refused("Ebsd.NoSpace", "audit log"):
            await rig.kms(ALICE, "DisableKey", KeyId=arn)
    described = await rig.kms(ALICE, "DescribeKey", KeyId=arn)
    assert described["KeyMetadata"]["Enabled"]  # the refusal came before anything happened


@pytest.mark.trio
async def test_what_the_broker_does_to_a_key_by_itself_is_seen_by_its_owner(rig: Rig) -> None:
    arn = await rig.key()
    await rig.broker.trail.key_event("RotateKey", arn, {"rotationType": "AUTOMATIC"})
    record = logged(rig)[-1]
    assert (record["eventType"], record["eventSource"]) == ("AwsServiceEvent", "kms.amazonaws.com")
    assert record["serviceEventDetails"] == {"keyId": arn, "rotationType": "AUTOMATIC"}
    assert records.accounts_of(record) == {f"{ALICE:012}"}
    seen = await rig._call(rig.servers.keys, ALICE, "io.ebsd.Audit.LookupEvents", {"EventName": "RotateKey"}, ())
    assert [json.loads(event["CloudTrailEvent"]) for event in seen["Events"]] == [record]


@pytest.mark.trio
async def test_users_see_what_concerns_their_account(rig: Rig) -> None:
    hers, his = await rig.key(ALICE), await rig.key(BOB)
    with refused("AccessDeniedException"):
        await rig.kms(BOB, "DisableKey", KeyId=hers)

    async def seen(uid: int) -> list[tuple[str, str]]:
        reply = await rig._call(rig.servers.keys, uid, "io.ebsd.Audit.LookupEvents", {}, ())
        found = [json.loads(event["CloudTrailEvent"]) for event in reply["Events"]]
        return [(record["eventName"], record["resources"][0]["ARN"]) for record in found if record["resources"]]

    assert await seen(ALICE) == [("CreateKey", hers), ("DisableKey", hers)]
    assert await seen(BOB) == [("CreateKey", his), ("DisableKey", hers)]
    assert await seen(ROOT) == [("CreateKey", hers), ("CreateKey", his), ("DisableKey", hers)]
    assert await seen(1003) == []
    for method, parameters in (
        ("GetLog", {}),
        ("OpenSegment", {"Name": "x"}),
        ("TakeVerificationKey", {"Destination": 0}),
    ):
        with refused("UnauthorizedOperation"):
            await rig._call(rig.servers.keys, ALICE, f"io.ebsd.Audit.{method}", parameters, ())


@pytest.mark.trio
async def test_what_the_end_of_the_broker_cut_short_is_recorded(rig: Rig) -> None:
    reader, writer = os.pipe()
    try:
        with trio.move_on_after(0.05) as scope:
            fds = [memfd(b""), reader]  # a passphrase that never comes
            await rig.service(ROOT, "Backup", Destination=0, PassphraseDescriptor=1, fds=fds)
        assert scope.cancelled_caught
    finally:
        os.close(writer)
    record = logged(rig)[-1]
    assert (record["eventName"], record["errorCode"]) == ("Backup", "KMSInternalException")
    assert "ended before its answer" in record["errorMessage"]


@pytest.mark.trio
async def test_records_that_wait_together_are_written_together_and_in_order(rig: Rig) -> None:
    before = rig.broker.trail.log.head.count
    written: list[int] = []
    append = rig.broker.trail.log.append

    def counting(batch: Sequence[dict[str, Any]], *, sync: bool) -> None:
        written.append(len(batch))
        append(batch, sync=sync)

    rig.broker.trail.log.append = counting  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(rig.broker.trail.record, {"eventName": str(number)})
            await trio.lowlevel.checkpoint_if_cancelled()
    assert sum(written) == 30
    assert len(written) < 30
    assert rig.broker.trail.log.head.count == before + 30
    names = [record["eventName"] for record in logged(rig)]
    assert sorted(names, key=int) == [str(number) for number in range(30)]


@pytest.mark.trio
async def test_heads_are_told_every_so_many_records(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ebsd.kms.audit")
    for number in range(130):
        await rig.broker.trail.record({"eventName": str(number)}, sync=False)
    heads = [record.message for record in caplog.records if record.message.startswith("audit head ")]
    assert len(heads) == 2
    assert re.fullmatch(r"audit head \d+:[0-9a-f]{64}", heads[-1])


@pytest.mark.trio
async def test_a_record_does_not_tell_what_another_accounts_alias_means(rig: Rig) -> None:
    key = await rig.key(ALICE)
    await rig.kms(ALICE, "CreateAlias", AliasName="alias/project", TargetKeyId=key)
    name = "arn:aws:kms:local:000000001001:alias/project"
    with refused("AccessDeniedException"):
        await rig.kms(BOB, "DescribeKey", KeyId=name)
    record = logged(rig)[-1]
    assert [resource["ARN"] for resource in record["resources"]] == [name]
    assert key.rpartition("/")[2] not in json.dumps(record)
    await rig.kms(ALICE, "DescribeKey", KeyId=name)
    assert [resource["ARN"] for resource in logged(rig)[-1]["resources"]] == [key]


@pytest.mark.trio
async def test_a_refusal_takes_little_of_the_log_however_much_was_asked(rig: Rig) -> None:
    before = len(raw(rig))
    with refused("InvalidCiphertextException"):
        await rig.kms(BOB, "Decrypt", CiphertextBlob="AAAA", EncryptionContext={"k": "\u0100" * 9000})
    with refused("ValidationException"):
        await rig.kms(BOB, "CreateKey", Description="\u0100" * 9000)
    assert len(raw(rig)) - before < 2 * 8 * 1024
    assert set(logged(rig)[-1]["requestParameters"]) == {"omitted", "sha256"}


@pytest.mark.trio
@pytest.mark.parametrize("name", ["Backup", "TakeVerificationKey"])
async def test_what_leaves_before_its_record_is_announced_durably(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    begun: list[list[str]] = []
    synced: list[bool] = []
    write, append = Descriptors.write, rig.broker.trail.log.append

    async def looking(self: Descriptors, fd: int, content: bytes, uid: int, parameter: str) -> None:
        begun.append([record["eventName"] for record in logged(rig)])
        await write(self, fd, content, uid, parameter)

    def noting(batch: Sequence[dict[str, Any]], *, sync: bool) -> None:
        synced.append(sync)
        append(batch, sync=sync)

    async def leave(uid: int, fds: list[int]) -> None:
        if name == "Backup":
            await rig.service(uid, "Backup", Destination=0, PassphraseDescriptor=1, fds=[*fds, memfd(b"long enough")])
        else:
            await rig._call(rig.servers.keys, uid, f"io.ebsd.Audit.{name}", {"Destination": 0}, fds)

    monkeypatch.setattr(Descriptors, "write", looking)
    monkeypatch.setattr(rig.broker.trail.log, "append", noting)
    with refused("UnauthorizedOperation"):
        await leave(ALICE, [memfd(b"")])
    assert [record["eventName"] for record in logged(rig)] == [name]  # who gets nothing is not said to begin
    synced.clear()
    await leave(ROOT, [memfd(b"")])
    assert begun == [[name, f"Begin{name}"]]
    assert synced == [True, True]
    announced, done = logged(rig)[1:]
    assert done["eventName"] == name
    assert "errorCode" not in done
    assert done["additionalEventData"]["announcedBy"] == announced["eventID"]
    assert announced["userIdentity"] == done["userIdentity"]


@pytest.mark.trio
async def test_what_cannot_be_announced_does_not_leave(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_more: object) -> None:
        raise OSError(28, "No space left on device")

    destination = memfd(b"")
    copy = os.dup(destination)
    monkeypatch.setattr(rig.broker.trail.log, "append", full)
    with refused("Ebsd.NoSpace", "audit log"):
        await rig.service(
            ROOT, "Backup", Destination=0, PassphraseDescriptor=1, fds=[destination, memfd(b"long enough")]
        )
    assert os.fstat(copy).st_size == 0
    os.close(copy)
