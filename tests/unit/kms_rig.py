"""A key broker in one process for tests: real state files, real handlers, no sockets in between."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from ebsd.domain.errors import RemoteError
from ebsd.ipc.peer import Peer
from ebsd.ipc.varlink_server import Call, VarlinkServer
from ebsd.kms.audit.throttle import Throttle
from ebsd.kms.aws_settings import AwsSettings
from ebsd.kms.backup import Argon2
from ebsd.kms.broker import Broker, Settings, utc_now
from ebsd.kms.local import Clock
from ebsd.kms.rootkey import KeyFile, RootKeySource
from ebsd.kms.server import Servers
from ebsd.kms.sessions import Sessions
from ebsd.volume import keysession
from ebsd.wire import messages

CHEAP = Argon2(memory=64, passes=1, lanes=1)
ROOT, ALICE, BOB = 0, 1001, 1002
VOLUME = "vol-00000000000000001"
OTHER = "vol-00000000000000002"
SNAPSHOT = "snap-00000000000000003"
FORMAT = "1/aes-256-xts/4096"


def memory_directory() -> Iterator[Path]:
    """Yield a directory in memory where there is one: these tests sync files thousands of times."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ebsd-kms-", dir=place) as name:
        yield Path(name)


@contextmanager
def refused(code: str, text: str = "") -> Iterator[pytest.ExceptionInfo[RemoteError]]:
    """Expect the error that a client gets: this code, and this text somewhere in its message."""
    with pytest.raises(RemoteError) as caught:
        yield caught
    assert (caught.value.code, caught.value.message) == (code, caught.value.message)
    assert text in caught.value.message


def context(resource: str = VOLUME, **more: str) -> dict[str, str]:
    return {"aws:ebs:id": resource, "ebsd:format": FORMAT, **more}


def caller(uid: int) -> dict[str, Any]:
    return {"Uid": uid, "Name": f"user{uid}"}


def memfd(content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


def read_fd(fd: int) -> bytes:
    try:
        return os.pread(fd, 65536, 0)
    finally:
        os.close(fd)


class Reply:
    def __init__(self, parameters: dict[str, Any], fds: Sequence[int]) -> None:
        self.parameters = parameters
        self.fds = list(fds)

    def __getitem__(self, member: str) -> Any:
        return self.parameters[member]

    def __contains__(self, member: str) -> bool:
        return member in self.parameters

    def plaintext(self) -> bytes:
        return read_fd(self.fds[self["PlaintextDescriptor"]])


class Rig:
    """One broker over ``directory/state`` and ``directory/root.key``."""

    def __init__(
        self,
        directory: Path,
        nursery: trio.Nursery,
        *,
        may_create: bool = True,
        root_key: RootKeySource | None = None,
        state: str = "state",
        clock: Clock = utc_now,
        aws: AwsSettings | None = None,
        throttle: Throttle | None = None,
    ) -> None:
        self.state = directory / state
        self.key_file = directory / "root.key"
        settings = Settings(self.state, root_key or KeyFile(self.key_file), may_create, aws)
        self.broker = Broker(settings, clock=clock, backup_cost=CHEAP)
        self.broker.open()
        self.sessions = Sessions(nursery)
        self.shut_down = False
        self.servers = Servers(
            self.broker,
            self.sessions,
            admin_uid=0,
            shutdown=self._shutdown,
            check_replies=True,
            throttle=throttle,
        )

    def _shutdown(self) -> None:
        self.shut_down = True

    async def close(self) -> None:
        await self.broker.close()

    @property
    def status(self) -> str:
        return self.broker.status().state

    @property
    def reason(self) -> str:
        return self.broker.status().reason or ""

    async def _call(
        self, server: VarlinkServer, uid: int, method: str, parameters: dict[str, Any], fds: Sequence[int]
    ) -> Reply:
        received: list[int | None] = list(fds)
        call = Call(Peer(uid, uid, 1), method, parameters, received=received)
        try:
            frame, reply_fds = await server.answer(call)
        finally:
            for fd in received:
                if fd is not None:
                    os.close(fd)
        message = json.loads(frame.removesuffix(b"\0"))
        return Reply(messages.parse_reply(message).parameters, reply_fds)

    async def kms(self, uid: int, method: str, *, fds: Sequence[int] = (), **parameters: Any) -> Reply:
        return await self._call(self.servers.keys, uid, f"io.ebsd.KMS.{method}", parameters, fds)

    async def service(self, uid: int, method: str, *, fds: Sequence[int] = (), **parameters: Any) -> Reply:
        return await self._call(self.servers.keys, uid, f"io.ebsd.KeyService.{method}", parameters, fds)

    async def ebsd(self, method: str, **parameters: Any) -> Reply:
        return await self._call(self.servers.kms, 0, f"io.ebsd.Broker.{method}", parameters, ())

    async def key(self, uid: int = ALICE, **parameters: Any) -> str:
        """Make a key and return its ARN."""
        return str((await self.kms(uid, "CreateKey", **parameters))["KeyMetadata"]["Arn"])

    async def wrapped(self, key: str, uid: int = ALICE, resource: str = VOLUME, **more: str) -> str:
        reply = await self.ebsd(
            "GenerateDataKeyWithoutPlaintext",
            Caller=caller(uid),
            KeyId=key,
            NumberOfBytes=64,
            EncryptionContext=context(resource, **more),
        )
        return str(reply["CiphertextBlob"])

    async def anchored(self, key: str, uid: int = ALICE, resource: str = VOLUME) -> str:
        """Make a data key and an anchor for it; return the blob."""
        blob = await self.wrapped(key, uid, resource)
        await self.ebsd(
            "CreateAnchor",
            Caller=caller(uid),
            ResourceId=resource,
            Encrypted=True,
            KeyId=key,
            CiphertextBlob=blob,
            EncryptionContext=context(resource),
        )
        return blob

    async def grant(self, key: str, uid: int = ALICE, resource: str = VOLUME) -> str:
        reply = await self.ebsd("CreateGrant", Caller=caller(uid), KeyId=key, EncryptionContextEquals=context(resource))
        return str(reply["GrantId"])

    async def session(self, key: str, grant: str, blob: str, resource: str = VOLUME) -> socket.socket:
        reply = await self.ebsd(
            "OpenKeySession",
            ResourceId=resource,
            KeyId=key,
            GrantId=grant,
            CiphertextBlob=blob,
            EncryptionContext=context(resource),
        )
        return socket.socket(fileno=reply.fds[reply["Session"]])


async def ask(session: socket.socket) -> keysession.Answer:
    """Ask a session as a volume process does."""
    return await trio.to_thread.run_sync(keysession.ask, session)


def blob_bytes(text: str) -> bytes:
    return base64.b64decode(text)


def error_packet(status: int, body: bytes) -> bytes:
    return struct.pack("<8sII", b"EBSDKA01", status, len(body)) + body


def at_every_step(patch: pytest.MonkeyPatch, state: Path, steps: Sequence[tuple[Any, str]]) -> list[Path]:
    """Have the directory copied before each step on it, as a crash at that step would leave it; the copies so far."""
    copies: list[Path] = []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            copy = state.with_name(f"cut{len(copies)}")
            shutil.copytree(state, copy)
            copies.append(copy)
            return real(*arguments, **options)

        return step

    for owner, name in steps:
        patch.setattr(owner, name, counted(getattr(owner, name)))
    return copies
