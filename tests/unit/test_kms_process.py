"""The broker as a process of its own: started as ebsd starts it, spoken to over its sockets, killed, restarted."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from kms_rig import BOB, VOLUME, caller, context

from ebsd.domain.errors import EbsdError, RemoteError
from ebsd.ipc.channel import BlockingChannel
from ebsd.ipc.process import Child, start_module
from ebsd.ipc.varlink_client import VarlinkClient
from ebsd.volume import keysession

pytestmark = pytest.mark.trio

UID = os.getuid()


class Host:
    """The part of ebsd that starts a broker."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.channel: BlockingChannel | None = None
        self.child: Child | None = None

    def start(self, **changes: Any) -> dict[str, Any]:
        listeners = []
        for name in ("kms.sock", "keys.sock"):
            path = self.directory / name
            path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(str(path))
            listener.listen()
            path.chmod(0o666)
            listeners.append(listener)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, (self.directory / "log").open("ab") as log:
            self.child = start_module("ebsd.kms", stdin_socket=theirs, log_fd=log.fileno())
        self.channel = BlockingChannel(ours)
        configuration = {
            "version": 1,
            "state_dir": str(self.directory / "state"),
            "root_key": {"kind": "file", "path": str(self.directory / "root.key")},
            "admin_uid": UID,
            "may_create": True,
            **changes,
        }
        try:
            fds = [listener.fileno() for listener in listeners]
            return self.channel.request("configure", configuration, fds, deadline=30).message
        finally:
            for listener in listeners:
                listener.close()

    def end(self, number: int = signal.SIGKILL) -> None:
        if self.channel is not None:
            self.channel.close()
        if self.child is not None and not self.child.ended:
            self.child.kill(number)
            os.waitid(os.P_PIDFD, self.child.pidfd, os.WEXITED | os.WNOWAIT)
            self.child.poll()

    async def kms(self, method: str, fds: list[int] | None = None, **parameters: Any) -> Any:
        async with await VarlinkClient.connect(self.directory / "keys.sock") as client:
            return await client.call(f"io.ebsd.KMS.{method}", parameters, fds=fds or [])

    async def ebsd(self, method: str, **parameters: Any) -> Any:
        async with await VarlinkClient.connect(self.directory / "kms.sock") as client:
            return await client.call(f"io.ebsd.Broker.{method}", parameters)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.end()


async def attach(host: Host) -> tuple[str, keysession.Answer]:
    """Do what ebsd and a volume process do for a new volume."""
    who = {"Uid": UID, "Name": "user"}
    arn = (await host.kms("CreateKey")).parameters["KeyMetadata"]["Arn"]
    blob = (
        await host.ebsd(
            "GenerateDataKeyWithoutPlaintext",
            Caller=who,
            KeyId=arn,
            NumberOfBytes=64,
            EncryptionContext=context(),
        )
    ).parameters["CiphertextBlob"]
    wrapped = {"KeyId": arn, "CiphertextBlob": blob, "EncryptionContext": context()}
    await host.ebsd("CreateAnchor", Caller=who, ResourceId=VOLUME, Encrypted=True, **wrapped)
    grant = (await host.ebsd("CreateGrant", Caller=who, KeyId=arn, EncryptionContextEquals=context())).parameters
    opened = await host.ebsd("OpenKeySession", ResourceId=VOLUME, GrantId=grant["GrantId"], **wrapped)
    return arn, await trio.to_thread.run_sync(keysession.ask, socket.socket(fileno=opened.fds[0]))


async def test_life_of_a_broker(host: Host) -> None:
    started = host.start()
    assert host.child is not None
    assert host.channel is not None
    assert started == {"State": "running", "Reason": None, "Pid": host.child.pid}
    arn, answer = await attach(host)
    assert answer.data_key is not None
    answer.data_key.wipe()
    made = await host.kms("GenerateDataKey", KeyId=arn, NumberOfBytes=32)
    plaintext = os.read(made.fds[0], 100)
    os.close(made.fds[0])

    # it outlives the ebsd that started it
    host.channel.close()
    await trio.sleep(0.2)
    assert (await host.ebsd("GetStatus")).parameters["Pid"] == host.child.pid

    # nothing that it answered is lost when it is killed
    await host.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=6)
    host.end(signal.SIGKILL)
    assert host.start(may_create=False)["State"] == "running"
    assert (await host.ebsd("DescribeAnchor", ResourceId=VOLUME)).parameters["Anchor"]["Floor"] == 6
    opened = await host.kms("Decrypt", CiphertextBlob=made.parameters["CiphertextBlob"])
    assert os.read(opened.fds[0], 100) == plaintext
    os.close(opened.fds[0])

    await host.ebsd("Shutdown")
    with trio.fail_after(10):
        assert await host.child.wait() == 0
    log = (host.directory / "log").read_bytes()
    for secret in (plaintext, plaintext.hex().encode(), (host.directory / "root.key").read_bytes()[16:-1]):
        assert secret not in log
    assert b"Traceback" not in log


async def test_sigterm_ends_it_in_order(host: Host) -> None:
    host.start()
    assert host.child is not None
    await host.kms("CreateKey")
    host.child.kill(signal.SIGTERM)
    with trio.fail_after(10):
        assert await host.child.wait() == 0
    assert sorted(path.name for path in (host.directory / "state").iterdir()) == [
        "audit",
        "epoch",
        "keys.sqlite",
        "lock",
    ]


async def test_kills_between_operations(host: Host) -> None:
    who = caller(UID)
    host.start()
    await host.ebsd("CreateAnchor", Caller=who, ResourceId=VOLUME, Encrypted=False)
    answered = 0
    for round_number in range(4):

        async def raise_floors() -> None:
            nonlocal answered
            while True:
                try:
                    reply = await host.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=answered + 1)
                except EbsdError:  # the broker is being killed
                    return
                answered = reply.parameters["Floor"]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(raise_floors)
            await trio.sleep(0.05 + 0.03 * round_number)
            host.end(signal.SIGKILL)
        assert host.start()["State"] == "running"
        floor = (await host.ebsd("DescribeAnchor", ResourceId=VOLUME)).parameters["Anchor"]["Floor"]
        assert answered <= floor <= answered + 1
        answered = floor
    assert answered > 0


async def test_peers_of_keys_sock_are_their_uids(host: Host) -> None:
    if UID != 0:
        pytest.skip("needs another uid")
    for directory in (host.directory, *host.directory.parents):
        if directory.stat().st_mode & 0o005 == 0o005:
            break  # above here everybody may pass already
        directory.chmod(0o755)
    host.start()
    arn = (await host.kms("CreateKey")).parameters["KeyMetadata"]["Arn"]
    # SO_PEERCRED is the effective uid at connect(2).
    os.seteuid(BOB)
    try:
        users = await VarlinkClient.connect(host.directory / "keys.sock")
        ebsds = await VarlinkClient.connect(host.directory / "kms.sock")
    finally:
        os.seteuid(0)
    async with users, ebsds:
        with pytest.raises(RemoteError) as caught:
            await users.call("io.ebsd.KMS.DescribeKey", {"KeyId": arn})
        assert caught.value.code == "AccessDeniedException"
        assert "arn:aws:iam::000000001002:user/" in caught.value.message
        with pytest.raises(RemoteError) as caught:
            await ebsds.call("io.ebsd.Broker.GetStatus")
        assert caught.value.code == "AuthFailure"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"version": 2}, "UnsupportedOperation"),
        ({"more": 1}, "Ebsd.Protocol"),
        ({"state_dir": "relative"}, "InvalidParameterValue"),
        ({"root_key": {"kind": "tpm"}}, "InvalidParameterValue"),
        ({"root_key": {"kind": "file", "path": "x"}}, "InvalidParameterValue"),
        ({"root_key": {"kind": "credential", "name": "../x", "directory": "/"}}, "InvalidParameterValue"),
        ({"admin_uid": "0"}, "Ebsd.Protocol"),
    ],
)
async def test_configurations_that_are_refused(host: Host, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(RemoteError) as caught:
        host.start(**changes)
    assert caught.value.code == code
    assert host.child is not None
    assert host.channel is not None
    host.channel.close()
    with trio.fail_after(10):
        assert await host.child.wait() == 1


async def test_a_second_broker_on_the_same_state(host: Host, tmp_path: Path) -> None:
    host.start()
    second = Host(tmp_path)
    with pytest.raises(RemoteError) as caught:
        second.start()
    assert caught.value.code == "Ebsd.StateDirectoryInUse"
    second.end()


async def test_the_process_is_hardened(host: Host) -> None:
    host.start()
    assert host.child is not None
    assert "NoNewPrivs:\t1" in Path(f"/proc/{host.child.pid}/status").read_text()
    if UID == 0:  # it is not dumpable, so nobody else may read this
        assert "Max core file size        0" in Path(f"/proc/{host.child.pid}/limits").read_text()
