"""Grants, anchors and key sessions: what opens a volume's data key, and every substitution that must not."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from kms_rig import ALICE, BOB, OTHER, ROOT, SNAPSHOT, VOLUME, Rig, ask, caller, context, memory_directory, refused

from ebsd.domain.errors import EbsdError, KeyServiceUnavailable, RemoteError
from ebsd.kms.sessions import Answer, Sessions

pytestmark = pytest.mark.trio


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


GRANTEE = "arn:aws:iam::000000001002:user/1002"


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, nursery)
    yield rig
    await rig.close()


# --- grants -----------------------------------------------------------------------------------------------


async def test_a_grant_with_the_same_name_and_parameters_is_the_same(rig: Rig) -> None:
    arn = await rig.key()
    request = {
        "KeyId": arn,
        "GranteePrincipal": GRANTEE,
        "Operations": ["Decrypt"],
        "Name": "mine",
        "Constraints": {"EncryptionContextSubset": {"a": "b"}},
    }
    first, again = [(await rig.kms(ALICE, "CreateGrant", **request)).parameters for _ in range(2)]
    assert first["GrantId"] == again["GrantId"]
    assert first["GrantToken"] != again["GrantToken"]
    other = await rig.kms(ALICE, "CreateGrant", **{**request, "Operations": ["Encrypt"]})
    unnamed = await rig.kms(ALICE, "CreateGrant", **{key: value for key, value in request.items() if key != "Name"})
    assert len({first["GrantId"], other["GrantId"], unnamed["GrantId"]}) == 3
    assert len(bytes.fromhex(first["GrantId"])) == 32


@pytest.mark.parametrize(
    "change",
    [
        {"GranteePrincipal": "alice"},
        {"RetiringPrincipal": "*"},
        {"Operations": []},
        {"Operations": ["Sign"]},
        {"Name": ""},
        {"Name": "a b"},
        {"Constraints": {"EncryptionContextEquals": {}}},
        {"Constraints": {"EncryptionContextEquals": {str(n): "" for n in range(9)}}},
        {"Constraints": {"EncryptionContextSubset": {"a": "x" * 385}}},
    ],
)
async def test_grants_that_kms_would_not_make(rig: Rig, change: dict[str, object]) -> None:
    request = {"KeyId": await rig.key(), "GranteePrincipal": GRANTEE, "Operations": ["Decrypt"]}
    with refused("ValidationException"):
        await rig.kms(ALICE, "CreateGrant", **{**request, **change})


async def test_who_may_retire_a_grant(rig: Rig) -> None:
    arn = await rig.key()

    async def grant(**more: object) -> dict[str, object]:
        request = {"KeyId": arn, "GranteePrincipal": GRANTEE, "Operations": ["Decrypt"], **more}
        return (await rig.kms(ALICE, "CreateGrant", **request)).parameters

    for uid, more in (
        (ALICE, {}),
        (ROOT, {}),
        (BOB, {"RetiringPrincipal": GRANTEE}),
        (BOB, {"RetiringPrincipal": "arn:aws:iam::000000001002:root"}),
        (BOB, {"Operations": ["RetireGrant", "Decrypt"]}),
    ):
        for by_token in (True, False):
            made = await grant(**more)
            named = {"GrantToken": made["GrantToken"]} if by_token else {"KeyId": arn, "GrantId": made["GrantId"]}
            await rig.kms(uid, "RetireGrant", **named)
            with refused("InvalidGrantTokenException"):
                await rig.kms(uid, "RetireGrant", **named)
    made = await grant()
    for named in ({"GrantToken": made["GrantToken"]}, {"KeyId": arn, "GrantId": made["GrantId"]}):
        with refused("InvalidGrantTokenException"):
            await rig.kms(BOB, "RetireGrant", **named)
    for named in ({}, {"KeyId": arn}, {"GrantId": made["GrantId"]}, {"GrantToken": "x", "KeyId": arn, "GrantId": "y"}):
        with refused("ValidationException"):
            await rig.kms(ALICE, "RetireGrant", **named)


async def test_ebsd_may_retire_twice(rig: Rig) -> None:
    arn = await rig.key()
    grant = await rig.grant(arn)
    # A key that was deleted meanwhile took its grants with it; no other key's grant goes by its name.
    await rig.ebsd("RetireGrant", KeyId=arn[:-4] + "0000", GrantId=grant)
    assert list(rig.broker.running.store.model.grants) == [grant]
    for _ in range(2):
        await rig.ebsd("RetireGrant", KeyId=arn, GrantId=grant)
    assert not rig.broker.running.store.model.grants
    with refused("InvalidArnException"):
        await rig.ebsd("RetireGrant", KeyId="alias/x", GrantId=grant)


async def test_grant_tokens_are_not_kept(rig: Rig) -> None:
    made = await rig.kms(ALICE, "CreateGrant", KeyId=await rig.key(), GranteePrincipal=GRANTEE, Operations=["Decrypt"])
    [grant] = rig.broker.running.store.model.grants.values()
    assert made["GrantToken"] not in repr(grant)


# --- anchors ----------------------------------------------------------------------------------------------


async def test_anchor_is_made_once_and_forgotten_idempotently(rig: Rig) -> None:
    arn = await rig.key()
    blob = await rig.anchored(arn)
    anchor = (await rig.ebsd("DescribeAnchor", ResourceId=VOLUME))["Anchor"]
    assert anchor == {
        "ResourceId": VOLUME,
        "OwnerId": "000000001001",
        "Encrypted": True,
        "KeyId": arn,
        "Floor": 0,
    }
    with refused("IncorrectState", "already has an anchor"):
        await rig.ebsd("CreateAnchor", Caller=caller(ALICE), ResourceId=VOLUME, Encrypted=False)
    for _ in range(2):
        await rig.ebsd("DeleteAnchor", ResourceId=VOLUME)
    with refused("Ebsd.IntegrityFailure", "no anchor"):
        await rig.ebsd("DescribeAnchor", ResourceId=VOLUME)
    del blob


async def test_floor_only_rises(rig: Rig) -> None:
    await rig.ebsd("CreateAnchor", Caller=caller(ALICE), ResourceId=SNAPSHOT, Encrypted=False)
    floors = [
        (await rig.ebsd("RaiseFloor", ResourceId=SNAPSHOT, Generation=generation))["Floor"]
        for generation in (3, 2, 0, 3, 9)
    ]
    assert floors == [3, 3, 3, 3, 9]
    for generation in (-1, 2**63):
        with refused("InvalidParameterValue"):
            await rig.ebsd("RaiseFloor", ResourceId=SNAPSHOT, Generation=generation)
    with refused("Ebsd.IntegrityFailure"):
        await rig.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=1)


async def test_anchors_that_are_refused(rig: Rig) -> None:
    arn, foreign = await rig.key(), await rig.key(BOB)
    blob = await rig.wrapped(arn)
    good = {
        "Caller": caller(ALICE),
        "ResourceId": VOLUME,
        "Encrypted": True,
        "KeyId": arn,
        "CiphertextBlob": blob,
        "EncryptionContext": context(),
    }
    short = await rig.ebsd(
        "GenerateDataKeyWithoutPlaintext",
        Caller=caller(ALICE),
        KeyId=arn,
        NumberOfBytes=32,
        EncryptionContext=context(),
    )
    for change, code in (
        ({"Encrypted": False}, "InvalidParameterCombination"),
        ({"KeyId": None}, "InvalidParameterCombination"),
        ({"CiphertextBlob": None}, "InvalidParameterCombination"),
        ({"EncryptionContext": context(OTHER)}, "InvalidCiphertextException"),
        ({"CiphertextBlob": await rig.wrapped(foreign, BOB)}, "IncorrectKeyException"),
        ({"CiphertextBlob": short["CiphertextBlob"]}, "ValidationException"),
        ({"KeyId": foreign}, "AccessDeniedException"),
        ({"ResourceId": "vol-1"}, "InvalidVolumeID.Malformed"),
        ({"ResourceId": "snap-1"}, "InvalidSnapshotID.Malformed"),
    ):
        with refused(code):
            await rig.ebsd("CreateAnchor", **{**good, **change})
    assert not rig.broker.running.store.model.anchors


# --- sessions ---------------------------------------------------------------------------------------------


async def test_session_gives_anchor_and_key(rig: Rig) -> None:
    arn = await rig.key()
    blob = await rig.anchored(arn)
    await rig.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=7)
    answer = await ask(await rig.session(arn, await rig.grant(arn), blob))
    opened = await rig.kms(ALICE, "Decrypt", CiphertextBlob=blob, EncryptionContext=context())
    assert answer.data_key is not None
    assert answer.data_key.equals(opened.plaintext())
    anchor = answer.anchor
    assert (anchor.resource, anchor.owner, anchor.encrypted, anchor.key_arn, anchor.floor) == (
        VOLUME,
        "000000001001",
        True,
        arn,
        7,
    )
    assert anchor.key_check_value is not None
    assert len(anchor.key_check_value) == 16
    answer.data_key.wipe()


async def test_session_of_the_managed_key(rig: Rig) -> None:
    blob = await rig.anchored("alias/aws/ebs")
    arn = (await rig.ebsd("DescribeAnchor", ResourceId=VOLUME))["Anchor"]["KeyId"]
    answer = await ask(await rig.session(arn, await rig.grant("alias/aws/ebs"), blob))
    assert answer.data_key is not None
    answer.data_key.wipe()


async def test_administrator_attaches_for_the_owner(rig: Rig) -> None:
    arn = await rig.key()
    blob = await rig.anchored(arn)
    answer = await ask(await rig.session(arn, await rig.grant(arn, ROOT), blob))
    assert answer.data_key is not None
    answer.data_key.wipe()


async def test_session_of_an_unencrypted_volume_has_no_key(rig: Rig) -> None:
    await rig.ebsd("CreateAnchor", Caller=caller(ALICE), ResourceId=VOLUME, Encrypted=False)
    reply = await rig.ebsd("OpenKeySession", ResourceId=VOLUME)
    answer = await ask(socket.socket(fileno=reply.fds[0]))
    assert answer.data_key is None
    assert answer.anchor.encrypted is False
    assert answer.anchor.key_arn is None


async def test_session_answers_once(rig: Rig) -> None:
    arn = await rig.key()
    session = await rig.session(arn, await rig.grant(arn), await rig.anchored(arn))
    with session:
        session.send(b"EBSDKS01")
        session.settimeout(5)  # in a thread: the answer waits for the disk, in which the broker must get its turn
        assert (await trio.to_thread.run_sync(session.recv, 4096)).startswith(b"EBSDKA01\0\0\0\0")
        assert len(await trio.to_thread.run_sync(session.recv, 4096)) == 64
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(BrokenPipeError):
            session.send(b"EBSDKS01")
        assert session.recv(4096) == b""
    assert rig.sessions.count == 0


@pytest.mark.parametrize("question", [b"", b"EBSDKS02", b"EBSDKS01x", b"{}"])
async def test_session_ends_with_a_wrong_question(rig: Rig, question: bytes) -> None:
    arn = await rig.key()
    with await rig.session(arn, await rig.grant(arn), await rig.anchored(arn)) as session:
        session.send(question)
        await trio.testing.wait_all_tasks_blocked()
        session.settimeout(5)
        assert session.recv(4096) == b""
    assert rig.sessions.count == 0


async def unheard(error: EbsdError | None) -> None:
    raise AssertionError(f"recorded: {error}")


async def test_session_ends_after_its_deadline(autojump_clock: trio.testing.MockClock) -> None:
    async def never() -> None:
        raise AssertionError("asked")

    async with trio.open_nursery() as nursery:
        sessions = Sessions(nursery)
        with socket.socket(fileno=sessions.open(VOLUME, never, unheard)) as session:  # type: ignore[arg-type]
            await trio.sleep(29.9)
            assert sessions.count == 1
            await trio.sleep(0.2)
            assert sessions.count == 0
            assert session.recv(4096) == b""


async def test_sessions_are_bounded(nursery: trio.Nursery) -> None:
    sessions = Sessions(nursery, limit=2)
    opened = [sessions.open(VOLUME, lambda: None, unheard) for _ in range(2)]  # type: ignore[arg-type, return-value]
    with pytest.raises(KeyServiceUnavailable, match="2 key sessions are open"):
        sessions.open(VOLUME, lambda: None, unheard)  # type: ignore[arg-type, return-value]
    for fd in opened:
        os.close(fd)
    await trio.testing.wait_all_tasks_blocked()
    assert sessions.count == 0


async def test_a_session_needs_all_of_its_parts(rig: Rig) -> None:
    arn = await rig.key()
    await rig.anchored(arn)
    with refused("InvalidParameterCombination"):
        await rig.ebsd("OpenKeySession", ResourceId=VOLUME, KeyId=arn)


# --- attacks on what a session is opened for ----------------------------------------------------------------


async def test_no_anchor_no_session(rig: Rig) -> None:
    arn = await rig.key()
    blob = await rig.wrapped(arn)
    with refused("Ebsd.IntegrityFailure", "no anchor"):
        await rig.session(arn, await rig.grant(arn), blob)
    with refused("Ebsd.IntegrityFailure", "no anchor"):
        await rig.ebsd("OpenKeySession", ResourceId=VOLUME)


async def test_encrypted_volume_cannot_be_opened_as_unencrypted(rig: Rig) -> None:
    await rig.anchored(await rig.key())
    with refused("Ebsd.IntegrityFailure", "knows it as encrypted"):
        await rig.ebsd("OpenKeySession", ResourceId=VOLUME)


async def test_unencrypted_volume_cannot_be_opened_with_a_key(rig: Rig) -> None:
    arn = await rig.key()
    await rig.ebsd("CreateAnchor", Caller=caller(ALICE), ResourceId=VOLUME, Encrypted=False)
    with refused("Ebsd.IntegrityFailure", "knows it as unencrypted"):
        await rig.session(arn, await rig.grant(arn), await rig.wrapped(arn))


async def test_attackers_own_key_is_not_the_anchored_one(rig: Rig) -> None:
    await rig.anchored(await rig.key())
    mallorys = await rig.key(BOB)
    blob = await rig.wrapped(mallorys, BOB)
    with refused("Ebsd.IntegrityFailure", f"not {mallorys}"):
        await rig.session(mallorys, await rig.grant(mallorys, BOB), blob)


async def test_blob_of_another_key_under_the_anchored_name(rig: Rig) -> None:
    arn = await rig.key()
    await rig.anchored(arn)
    substitute = await rig.wrapped(await rig.key())
    with refused("IncorrectKeyException"):
        await ask(await rig.session(arn, await rig.grant(arn), substitute))


async def test_another_data_key_of_the_same_key_and_context(rig: Rig) -> None:
    arn = await rig.key()
    await rig.anchored(arn)
    substitute = await rig.wrapped(arn)
    with refused("Ebsd.IntegrityFailure", "another data key"):
        await ask(await rig.session(arn, await rig.grant(arn), substitute))


async def test_blob_of_another_volume(rig: Rig) -> None:
    arn = await rig.key()
    await rig.anchored(arn)
    others = await rig.anchored(arn, resource=OTHER)
    grant = await rig.grant(arn)
    with refused("InvalidCiphertextException"):
        await ask(await rig.session(arn, grant, others))
    # with its own context as well
    with refused("Ebsd.IntegrityFailure", "another resource"):
        await rig.ebsd(
            "OpenKeySession",
            ResourceId=VOLUME,
            KeyId=arn,
            GrantId=await rig.grant(arn, resource=OTHER),
            CiphertextBlob=others,
            EncryptionContext=context(OTHER),
        )


async def test_grants_that_open_no_session(rig: Rig) -> None:
    arn, other_key = await rig.key(), await rig.key()
    blob = await rig.anchored(arn)
    users = await rig.kms(ALICE, "CreateGrant", KeyId=arn, GranteePrincipal=GRANTEE, Operations=["Decrypt"])
    infrastructure = await rig.kms(
        ALICE,
        "CreateGrant",
        KeyId=arn,
        GranteePrincipal="arn:aws:sts::000000001001:assumed-role/aws:ec2-infrastructure/ebsd",
        Operations=["Decrypt"],
    )
    for grant in (
        "0" * 64,
        await rig.grant(arn, resource=OTHER),
        await rig.grant(other_key),
        str(users["GrantId"]),
        str(infrastructure["GrantId"]),
    ):
        with refused("InvalidGrantTokenException"):
            await rig.session(arn, grant, blob)
    with refused("ValidationException"):
        await rig.ebsd(
            "OpenKeySession",
            ResourceId=VOLUME,
            KeyId=arn,
            GrantId=await rig.grant(arn),
            CiphertextBlob=blob,
            EncryptionContext={"aws:ebs:id": VOLUME},
        )


async def test_more_context_than_the_grant_has(rig: Rig) -> None:
    arn = await rig.key()
    blob = await rig.wrapped(arn, more="x")
    await rig.anchored(arn)
    with refused("InvalidGrantTokenException"):
        await rig.ebsd(
            "OpenKeySession",
            ResourceId=VOLUME,
            KeyId=arn,
            GrantId=await rig.grant(arn),
            CiphertextBlob=blob,
            EncryptionContext=context(more="x"),
        )


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ("disabled", "DisabledException"),
        ("retired", "InvalidGrantTokenException"),
        ("anchor deleted", "Ebsd.IntegrityFailure"),
    ],
)
async def test_what_changes_between_opening_and_asking_counts(rig: Rig, event: str, code: str) -> None:
    arn = await rig.key()
    blob = await rig.anchored(arn)
    grant = await rig.grant(arn)
    session = await rig.session(arn, grant, blob)
    if event == "disabled":
        await rig.kms(ALICE, "DisableKey", KeyId=arn)
    elif event == "retired":
        await rig.ebsd("RetireGrant", KeyId=arn, GrantId=grant)
    else:
        await rig.ebsd("DeleteAnchor", ResourceId=VOLUME)
    with pytest.raises(RemoteError) as caught:
        await ask(session)
    assert caught.value.code == code


async def test_no_grant_for_a_disabled_key(rig: Rig) -> None:
    arn = await rig.key()
    await rig.kms(ALICE, "DisableKey", KeyId=arn)
    with refused("DisabledException", f"{arn} is disabled."):
        await rig.grant(arn)


async def test_broker_socket_is_for_ebsd_only(rig: Rig) -> None:
    from ebsd.domain.errors import AuthFailure
    from ebsd.ipc.peer import Peer
    from ebsd.kms.broker_interface import admit_only

    admit_only(990)(Peer(990, 990, 1))
    admit_only(990)(Peer(0, 0, 1))
    with pytest.raises(AuthFailure):
        admit_only(990)(Peer(ALICE, ALICE, 1))


async def test_a_question_that_ends_with_its_session_is_recorded(autojump_clock: trio.testing.MockClock) -> None:
    told: list[str] = []

    async def endless() -> Answer:
        await trio.sleep_forever()
        raise AssertionError("BUG: woken")

    async def witness(error: EbsdError | None) -> None:
        assert error is not None
        told.append(error.message)

    async with trio.open_nursery() as nursery:
        sessions = Sessions(nursery)
        with socket.socket(fileno=sessions.open(VOLUME, endless, witness)) as session:
            session.send(b"EBSDKS01")
            await trio.sleep(31)
            assert session.recv(4096) == b""
    assert len(told) == 1
    assert "ended before its answer" in told[0]
