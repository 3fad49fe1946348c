"""A key session opens one wrapped key, once: what several askers, replays and a curious ebsd get out of it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from kms_rig import ALICE, OTHER, SNAPSHOT, VOLUME, Rig, ask, caller, context, memory_directory, refused

from ebsd.domain.errors import KeyServiceUnavailable, RemoteError
from ebsd.kms import sessions
from ebsd.volume import keysession
from ebsd.wire.idl import Interface

pytestmark = pytest.mark.trio
QUESTION = b"EBSDKS01"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, nursery)
    yield rig
    await rig.close()


async def opened(rig: Rig) -> tuple[str, str, str, socket.socket]:
    """Return key, grant, blob and a session for them."""
    key = await rig.key()
    blob = await rig.anchored(key)
    grant = await rig.grant(key)
    return key, grant, blob, await rig.session(key, grant, blob)


def packets(session: socket.socket) -> list[bytes]:
    """Return everything that comes, to the end; one that had more to say than it was asked may see a reset."""
    session.settimeout(5)
    found = []
    with contextlib.suppress(ConnectionResetError):
        while packet := session.recv(65536):
            found.append(packet)
    return found


async def test_questions_that_come_at_once_are_one(rig: Rig) -> None:
    *_, session = await opened(rig)
    with session:
        for _ in range(5):
            session.send(QUESTION)
        got = await trio.to_thread.run_sync(packets, session)
    assert len([packet for packet in got if len(packet) == 64]) <= 1
    assert len(got) <= 2
    assert rig.sessions.count == 0


async def test_of_many_who_share_a_session_one_gets_the_key(rig: Rig) -> None:
    """As when a descriptor was passed on: what comes of it is one answer, whoever gets which part."""
    *_, session = await opened(rig)
    shared = [session, *(session.dup() for _ in range(7))]

    def race() -> list[bytes]:
        def one(end: socket.socket) -> list[bytes]:
            with end:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    end.send(QUESTION)
                return packets(end)

        with ThreadPoolExecutor(len(shared)) as pool:
            return [packet for got in pool.map(one, shared) for packet in got]

    got = await trio.to_thread.run_sync(race)
    assert len([packet for packet in got if len(packet) == 64]) <= 1
    assert len(got) <= 2
    assert rig.sessions.count == 0


async def test_an_answered_session_answers_nobody_again(rig: Rig) -> None:
    *_, session = await opened(rig)
    again = session.dup()
    answer = await ask(session)
    assert answer.data_key is not None
    answer.data_key.wipe()
    with pytest.raises(KeyServiceUnavailable):
        await ask(again)


async def test_a_session_is_over_after_its_time(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Asked 30 seconds late, with everything else in order: nothing comes, and the next session works."""
    async with trio.open_nursery() as nursery:
        rig = Rig(tmp_path, nursery)
        key, grant, blob, session = await opened(rig)
        await trio.sleep(30.1)
        with session:
            with pytest.raises(BrokenPipeError):
                session.send(QUESTION)
            assert session.recv(4096) == b""
        assert rig.sessions.count == 0
        autojump_clock.autojump_threshold = 3600
        answer = await ask(await rig.session(key, grant, blob))
        assert answer.data_key is not None
        answer.data_key.wipe()
        await rig.close()
        nursery.cancel_scope.cancel()


async def test_a_replay_after_the_end_of_the_attachment_opens_nothing(rig: Rig) -> None:
    """The same grant, blob and context again, when the grant was retired; and the same name of grant is another."""
    key, grant, blob, session = await opened(rig)
    with session:
        await rig.ebsd("RetireGrant", KeyId=key, GrantId=grant)
        with pytest.raises(RemoteError) as caught:
            await ask(session)
    assert caught.value.code == "InvalidGrantTokenException"
    with refused("InvalidGrantTokenException"):
        await rig.session(key, grant, blob)
    assert await rig.grant(key) != grant
    with refused("InvalidGrantTokenException"):
        await rig.session(key, grant, blob)


async def test_a_grant_that_its_owner_revoked_opens_nothing(rig: Rig) -> None:
    key, grant, blob, session = await opened(rig)
    await rig.kms(ALICE, "RevokeGrant", KeyId=key, GrantId=grant)
    with pytest.raises(RemoteError) as caught:
        await ask(session)
    assert caught.value.code == "InvalidGrantTokenException"
    answer = await ask(await rig.session(key, await rig.grant(key), blob))  # the owner may attach again
    assert answer.data_key is not None
    answer.data_key.wipe()


async def test_no_part_of_a_session_can_be_another_volumes(rig: Rig) -> None:
    """Two volumes under one key, everything of both at hand: only what belongs together opens, and nothing else."""
    key = await rig.key()
    parts = {
        volume: {
            "ResourceId": volume,
            "GrantId": await rig.grant(key, resource=volume),
            "CiphertextBlob": await rig.anchored(key, resource=volume),
            "EncryptionContext": context(volume),
        }
        for volume in (VOLUME, OTHER)
    }
    names = list(parts[VOLUME])
    works, codes = [], set()
    for choice in range(1 << len(names)):
        chosen = {name: parts[OTHER if choice >> bit & 1 else VOLUME][name] for bit, name in enumerate(names)}
        try:
            reply = await rig.ebsd("OpenKeySession", KeyId=key, **chosen)
            answer = await ask(socket.socket(fileno=reply.fds[0]))
        except RemoteError as exc:
            codes.add(exc.code)
            continue
        works.append(choice)
        assert answer.data_key is not None
        answer.data_key.wipe()
    assert works == [0, (1 << len(names)) - 1]
    assert codes == {"InvalidGrantTokenException", "InvalidCiphertextException", "Ebsd.IntegrityFailure"}


async def test_ebsds_channel_has_no_way_to_a_data_key(rig: Rig) -> None:
    methods = Interface.load("io.ebsd.Broker").methods
    assert not {"Decrypt", "Encrypt", "GenerateDataKey", "Sign", "GenerateMac"} & set(methods)
    words = {name for method in methods.values() for name in method.result.fields}
    assert not {name for name in words if "plaintext" in name.lower()}
    for method in ("Decrypt", "Encrypt", "GenerateDataKey"):
        with refused("UnsupportedOperation", method):
            await rig.ebsd(method, KeyId="x")


async def test_no_reply_to_ebsd_holds_a_data_key(rig: Rig) -> None:
    """All that ebsd can ask about one volume and its snapshot, searched for the key that it is all about."""
    key, grant, blob, session = await opened(rig)
    session.close()
    plain = (await rig.kms(ALICE, "Decrypt", CiphertextBlob=blob, EncryptionContext=context())).plaintext()
    assert len(plain) == 64
    about = {"Caller": caller(ALICE), "KeyId": key}
    calls: list[tuple[str, dict[str, Any]]] = [
        ("GetStatus", {}),
        ("DescribeKey", about),
        ("ReEncrypt", {
            "Caller": caller(ALICE), "CiphertextBlob": blob, "SourceEncryptionContext": context(),
            "DestinationKeyId": key, "DestinationEncryptionContext": context(OTHER),
        }),
        ("CreateGrant", {**about, "EncryptionContextEquals": context()}),
        ("OpenKeySession", {
            "ResourceId": VOLUME, "KeyId": key, "GrantId": grant, "CiphertextBlob": blob,
            "EncryptionContext": context(),
        }),
        ("CreateAnchor", {
            "Caller": caller(ALICE), "ResourceId": SNAPSHOT, "Encrypted": True, "SourceResourceId": VOLUME,
        }),
        ("DescribeAnchor", {"ResourceId": VOLUME}),
        ("RaiseFloor", {"ResourceId": VOLUME, "Generation": 2}),
        ("GetAccount", {"Caller": caller(ALICE)}),
        ("RetireGrant", {"KeyId": key, "GrantId": grant}),
    ]  # fmt: skip
    forms = [plain.hex(), base64.b64encode(plain).decode(), base64.b64encode(plain[:30]).decode(), plain[32:].hex()]
    for method, parameters in calls:
        reply = await rig.ebsd(method, **parameters)
        text = json.dumps(reply.parameters)
        assert not [form for form in forms if form in text], method
        for fd in reply.fds:
            assert method == "OpenKeySession"
            os.close(fd)


async def test_the_two_ends_agree_on_the_time() -> None:
    assert keysession.DEADLINE == sessions.DEADLINE == 30
