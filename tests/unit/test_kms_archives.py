"""The keys of archives: whom the KMS key allows it opens them, once; nobody opens anything else that way."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from kms_rig import ALICE, BOB, ROOT, SNAPSHOT, Rig, ask, caller, context, memory_directory, refused

from ebsd.domain.errors import RemoteError

pytestmark = pytest.mark.trio

ARCHIVE = "00112233-4455-4677-8899-aabbccddeeff"
PAIRS = {"aws:ebs:id": SNAPSHOT, "ebsd:format": "1/archive", "ebsd:archive": ARCHIVE}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, nursery)
    yield rig
    await rig.close()


async def wrapped(rig: Rig, arn: str, uid: int = ALICE, size: int = 64, **changes: str) -> str:
    made = await rig.ebsd(
        "GenerateDataKeyWithoutPlaintext",
        Caller=caller(uid),
        KeyId=arn,
        NumberOfBytes=size,
        EncryptionContext={**PAIRS, **changes},
    )
    return str(made["CiphertextBlob"])


async def session(rig: Rig, uid: int, arn: str, blob: str, **changes: str) -> socket.socket:
    reply = await rig.ebsd(
        "OpenArchiveSession",
        Caller=caller(uid),
        KeyId=arn,
        CiphertextBlob=blob,
        EncryptionContext={**PAIRS, **changes},
    )
    return socket.socket(fileno=reply.fds[reply["Session"]])


async def test_a_session_gives_the_key_of_the_archive_to_whom_the_kms_key_allows_it(rig: Rig) -> None:
    arn = await rig.key()
    blob = await wrapped(rig, arn)
    keys = []
    for uid in (ALICE, ROOT):
        answer = await ask(await session(rig, uid, arn, blob))
        assert answer.data_key is not None
        keys.append(bytes(answer.data_key.view))
        assert (answer.anchor.resource, answer.anchor.key_arn, answer.anchor.encrypted) == (ARCHIVE, arn, True)
        answer.data_key.wipe()
    assert keys[0] == keys[1]
    assert len(keys[0]) == 64


async def test_another_user_is_refused_until_the_policy_of_the_key_allows_him(rig: Rig) -> None:
    arn = await rig.key()
    blob = await wrapped(rig, arn)
    with refused("AccessDeniedException"):
        await ask(await session(rig, BOB, arn, blob))
    policy = json.loads((await rig.kms(ALICE, "GetKeyPolicy", KeyId=arn))["Policy"])
    policy["Statement"].append(
        {
            "Effect": "Allow",
            "Principal": {"AWS": "arn:aws:iam::000000001002:root"},
            "Action": "kms:Decrypt",
            "Resource": "*",
            "Condition": {"StringEquals": {"kms:EncryptionContext:ebsd:archive": ARCHIVE}},
        }
    )
    await rig.kms(ALICE, "PutKeyPolicy", KeyId=arn, Policy=json.dumps(policy))
    answer = await ask(await session(rig, BOB, arn, blob))
    assert answer.data_key is not None
    answer.data_key.wipe()


async def test_a_disabled_key_opens_nothing_also_when_it_was_disabled_after_the_session_was_opened(rig: Rig) -> None:
    arn = await rig.key()
    blob = await wrapped(rig, arn)
    early = await session(rig, ALICE, arn, blob)
    await rig.kms(ALICE, "DisableKey", KeyId=arn)
    with refused("DisabledException"):
        await ask(early)


async def test_a_session_of_this_kind_opens_no_key_of_the_store(rig: Rig) -> None:
    """Neither under the context that such a key has, nor under an archive's."""
    arn = await rig.key()
    blob = await rig.anchored(arn)
    for pairs in (context(), {**context(), "ebsd:archive": ARCHIVE}, {**PAIRS, "more": "x"}):
        with refused("ValidationException"):
            await rig.ebsd(
                "OpenArchiveSession", Caller=caller(ALICE), KeyId=arn, CiphertextBlob=blob, EncryptionContext=pairs
            )
    with refused("InvalidCiphertextException"):
        await ask(await session(rig, ALICE, arn, blob))


async def test_the_key_of_an_archive_becomes_no_key_of_the_store(rig: Rig) -> None:
    """No anchor, no grant and no ReEncrypt takes its context."""
    arn = await rig.key()
    blob = await wrapped(rig, arn)
    alice = caller(ALICE)
    for method, members in (
        ("CreateAnchor", {"ResourceId": SNAPSHOT, "Encrypted": True, "KeyId": arn, "CiphertextBlob": blob,
                          "EncryptionContext": PAIRS}),
        ("CreateGrant", {"KeyId": arn, "EncryptionContextEquals": PAIRS}),
        ("ReEncrypt", {"CiphertextBlob": blob, "SourceEncryptionContext": PAIRS, "DestinationKeyId": arn,
                       "DestinationEncryptionContext": context(SNAPSHOT)}),
        ("ReEncrypt", {"CiphertextBlob": await rig.wrapped(arn), "SourceEncryptionContext": context(),
                       "DestinationKeyId": arn, "DestinationEncryptionContext": PAIRS}),
    ):  # fmt: skip
        with refused("ValidationException", "reserved"):
            await rig.ebsd(method, Caller=alice, **members)
    assert not rig.broker.running.store.model.anchors


@pytest.mark.parametrize(
    "change",
    [{"ebsd:archive": "x"}, {"ebsd:archive": ARCHIVE.upper()}, {"ebsd:format": "1/aes-256-xts/4096"}],
)
async def test_contexts_that_are_no_archives(rig: Rig, change: dict[str, str]) -> None:
    arn = await rig.key()
    with refused("ValidationException"):
        await wrapped(rig, arn, **change)
    with refused("ValidationException"):
        await session(rig, ALICE, arn, "AAAA", **change)


async def test_what_does_not_fit_is_refused(rig: Rig) -> None:
    arn, other = await rig.key(), await rig.key()
    blob = await wrapped(rig, arn)
    for key, given, changes, code in (
        (other, blob, {}, "IncorrectKeyException"),
        (arn, blob, {"ebsd:archive": "99999999-4455-4677-8899-aabbccddeeff"}, "InvalidCiphertextException"),
        (arn, blob, {"aws:ebs:id": "snap-00000000000000004"}, "InvalidCiphertextException"),
        (arn, await wrapped(rig, arn, size=32), {}, "ValidationException"),
        (arn[:-4] + "0000", blob, {}, "NotFoundException"),
    ):
        with refused(code):
            await ask(await session(rig, ALICE, key, given, **changes))
    with refused("InvalidArnException"):
        await session(rig, ALICE, "alias/x", blob)


async def test_every_use_is_in_the_audit_log_as_the_users_own(rig: Rig) -> None:
    arn = await rig.key()
    blob = await wrapped(rig, arn)
    answer = await ask(await session(rig, ALICE, arn, blob))
    assert answer.data_key is not None
    answer.data_key.wipe()
    with pytest.raises(RemoteError):
        await ask(await session(rig, BOB, arn, blob))
    lines = [line for path in (rig.state / "audit").glob("*.jsonl") for line in path.read_text().splitlines()]
    seen = [line for line in lines if '"Decrypt"' in line]
    assert len(seen) == 2
    assert all(ARCHIVE in line for line in seen)
    assert "user1001" in seen[0]
    assert "AccessDenied" in seen[1]
    assert "user1002" in seen[1]
