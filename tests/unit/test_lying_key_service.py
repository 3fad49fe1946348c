"""ebsd's and the volume processes' ends of the key service, when who answers there is broken, slow or lies.

Each answer ends as KeyServiceUnavailable with a reason, never as a surprise, and no descriptor of it is kept.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from ebsd.control import broker as broker_module
from ebsd.control.broker import MAX_BLOB, Broker
from ebsd.daemon import broker_process as broker_process_module
from ebsd.daemon.broker_process import BrokerProcess
from ebsd.domain.admission import Making
from ebsd.domain.errors import KeyServiceNotAnswering, KeyServiceUnavailable, RemoteError
from ebsd.domain.ids import AccountId, KeyArn
from ebsd.domain.model import Caller
from ebsd.ipc.sockets import listen, recv_with_fds, send_with_fds
from ebsd.volume import keysession
from ebsd.wire.idl import Array, Basic, Interface, Named, Optional, Struct, Type

CALLER = Caller(1001, "alice", AccountId("000000001001"), is_admin=False)
KEY = KeyArn("arn:aws:kms:local:000000001001:key/12345678-1234-1234-1234-123456789abc")
CONTEXT = {"aws:ebs:id": "vol-00000000000000001", "ebsd:format": "1/aes-256-xts/4096"}
BLOB = base64.b64encode(bytes(206)).decode()
INTERFACE = Interface.load("io.ebsd.Broker")


def sample(kind: Type) -> Any:
    """Return some value of a type of the interface."""
    match kind:
        case Struct():
            return {name: sample(field) for name, field in kind.fields.items()}
        case Optional():
            return sample(kind.inner)
        case Array():
            return [sample(kind.inner)]
        case Basic():
            return {"bool": True, "int": 1, "string": BLOB}[kind.name]
        case Named():
            return sample(INTERFACE.types[kind.name])
    raise AssertionError(kind)


def good_answer(method: str) -> dict[str, Any]:
    account = {"SnapshotBlockPublicAccess": "unblocked"}
    sensible = {"OpenKeySession": {"Session": 0}, "GetAccount": account, "SetAccount": account}
    return sample(INTERFACE.methods[method].result) | sensible.get(method, {})


Method = Callable[[Broker], Awaitable[Any]]


async def _open(broker: Broker) -> int:
    return await broker.open_session(CONTEXT["aws:ebs:id"], key=KEY, grant="g", blob=b"b", context=CONTEXT)


METHODS: dict[str, Method] = {
    "GetStatus": lambda b: b.status(),
    "DescribeKey": lambda b: b.describe_key(CALLER, "alias/x"),
    "GenerateDataKeyWithoutPlaintext": lambda b: b.generate_wrapped_key(CALLER, KEY, 64, CONTEXT),
    "ReEncrypt": lambda b: b.re_encrypt(CALLER, b"b", CONTEXT, KEY, CONTEXT),
    "CreateGrant": lambda b: b.create_grant(CALLER, KEY, CONTEXT, "n"),
    "RetireGrant": lambda b: b.retire_grant(KEY, "g"),
    "OpenKeySession": _open,
    "CreateAnchor": lambda b: b.create_anchor(CALLER, "vol-1", key=KEY, blob=b"b", context=CONTEXT),
    "DescribeAnchor": lambda b: b.describe_anchor("vol-1"),
    "DescribeDataKey": lambda b: b.describe_data_key("vol-1", b"b"),
    "RaiseFloor": lambda b: b.raise_floor("vol-1", 3),
    "DeleteAnchor": lambda b: b.delete_anchor("vol-1"),
    "GetAccount": lambda b: b.account(CALLER),
    "SetAccount": lambda b: b.set_account(CALLER),
    "CheckSharedKey": lambda b: b.check_shared_key(CALLER, KEY, CONTEXT),
    "RecordSharing": lambda b: b.record_sharing(CALLER, "snap-1", ["all"], []),
    "ListPublicAccessBlocks": lambda b: b.accounts_without_public_snapshots(),
    "Admit": lambda b: b.admit(CALLER, Making.VOLUME, KEY),
    "PutAdmissionRule": lambda b: b.put_admission_rule(CALLER, None, []),
    "DeleteAdmissionRule": lambda b: b.delete_admission_rule(CALLER, None),
    "ListAdmissionRules": lambda b: b.admission_rules(CALLER),
    "CheckAws": lambda b: b.check_aws(),
    "Shutdown": lambda b: b.shutdown(),
}
"""Each method of the interface, as the client asks it."""


class Liar:
    """A server on kms.sock that answers every call with the same bytes and descriptors, then hangs up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answer = b""
        self.fds = 0
        self.descriptor = lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach()
        self.silent = False
        self.slow = ""
        self.answers: dict[str, Any] = {}
        self.calls = 0
        self.methods: list[str] = []

    async def serve(self) -> None:
        with listen(self.path, 0o600) as listener:
            await self._accept(listener)

    async def _accept(self, listener: trio.socket.SocketType) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                sock, _ = await listener.accept()
                self.calls += 1
                nursery.start_soon(self._one, sock)

    async def _one(self, sock: trio.socket.SocketType) -> None:
        with sock, contextlib.suppress(OSError):
            data, _ = await recv_with_fds(sock, 65536)
            if not data:
                return
            method = json.loads(data.rstrip(b"\0"))["method"]
            self.methods.append(method)
            if self.silent or method == self.slow:
                await trio.sleep_forever()
            if method in self.answers:
                self.say(self.answers[method])
            sent = [self.descriptor() for _ in range(self.fds)]
            try:
                await send_with_fds(sock, self.answer, sent)
            finally:
                for fd in sent:
                    os.close(fd)

    def say(self, parameters: Any, fds: int = 0) -> None:
        self.answer, self.fds = json.dumps({"parameters": parameters}).encode() + b"\0", fds


class NoBallast:
    def release(self) -> bool:
        return False


@pytest.fixture
async def liar(tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> tuple[Liar, Broker]:
    for name, seconds in (("PATIENCE", 0.05), ("RETRY_PAUSE", 0.02)):
        monkeypatch.setattr(broker_module, name, seconds)
    liar = Liar(tmp_path / "kms.sock")
    nursery.start_soon(liar.serve)
    await trio.testing.wait_all_tasks_blocked()
    return liar, Broker(liar.path, NoBallast())  # type: ignore[arg-type]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def settled_fds() -> int:
    """How many are open; fewer than before are no leak: the collector meets objects of earlier tests at any time."""
    await trio.testing.wait_all_tasks_blocked()
    return open_fds()


def test_only_methods_of_the_interface_are_asked_and_each_has_a_deadline() -> None:
    assert METHODS.keys() <= broker_module.WAITS.keys() == INTERFACE.methods.keys()
    assert broker_module.DEADLINES.keys() == {*broker_module.Wait}


@pytest.mark.trio
@pytest.mark.parametrize("method", METHODS)
async def test_good_answers_are_taken_and_their_descriptors_closed(liar: tuple[Liar, Broker], method: str) -> None:
    server, broker = liar
    call, good = METHODS[method], good_answer(method)
    before = await settled_fds()
    server.say(good, fds=1)
    result = await call(broker)
    if method == "OpenKeySession":
        os.close(result)
    assert await settled_fds() <= before


BAD: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "nothing": lambda good: b"",
    "noise": lambda good: bytes(range(1, 256)) * 40 + b"\0",
    "no json": lambda good: b"nonsense\0",
    "an array": lambda good: b"[]\0",
    "half of it": lambda good: json.dumps({"parameters": good}).encode(),
    "ten megabytes": lambda good: b'{"parameters":{"x":"' + b"x" * 10_000_000 + b'"}}\0',
    "nested": lambda good: b'{"parameters":' + b'{"x":' * 5000 + b"1" + b"}" * 5000 + b"}\0",
    "twice": lambda good: (json.dumps({"parameters": good}).encode() + b"\0") * 2,
    "another member": lambda good: json.dumps({"parameters": {**good, "Plaintext": "AAAA"}}).encode() + b"\0",
    "parameters of no object": lambda good: b'{"parameters":[1]}\0',
}


@pytest.mark.trio
@pytest.mark.parametrize("lie", BAD)
async def test_bad_answers_are_a_key_service_that_is_not_available(liar: tuple[Liar, Broker], lie: str) -> None:
    server, broker = liar
    for method, call in METHODS.items():
        before = await settled_fds()
        server.answer, server.fds = BAD[lie](good_answer(method)), 0 if lie == "nothing" else 3
        with pytest.raises(KeyServiceUnavailable) as caught:
            await call(broker)
        assert len(caught.value.message) < 300
        assert caught.value.message.endswith(".")
        assert ".." not in caught.value.message
        assert await settled_fds() <= before


@pytest.mark.trio
@pytest.mark.parametrize("method", [name for name in METHODS if good_answer(name)])
async def test_answers_with_members_missing_or_of_other_types_are_refused(
    liar: tuple[Liar, Broker], method: str
) -> None:
    server, broker = liar
    call, good = METHODS[method], good_answer(method)
    before = await settled_fds()
    for member in good:
        rest = {name: value for name, value in good.items() if name != member}
        optional = isinstance(INTERFACE.methods[method].result.fields[member], Optional)
        others = ([1] if isinstance(good[member], list) else [], {"x": 1}, 1.5)
        for lie in ([] if optional else [rest]) + [{**rest, member: other} for other in others]:
            server.say(lie, fds=1)
            with pytest.raises(KeyServiceUnavailable, match=f"its answer to {method} cannot be understood"):
                await call(broker)
    assert await settled_fds() <= before


@pytest.mark.trio
@pytest.mark.parametrize("method", ["GenerateDataKeyWithoutPlaintext", "ReEncrypt"])
@pytest.mark.parametrize("blob", ["", "*", "AAA", base64.b64encode(bytes(MAX_BLOB + 1)).decode()], ids=len)
async def test_wrapped_keys_that_are_none_are_refused(liar: tuple[Liar, Broker], method: str, blob: str) -> None:
    server, broker = liar
    server.say({**good_answer(method), "CiphertextBlob": blob})
    with pytest.raises(KeyServiceUnavailable, match="wrapped key"):
        await METHODS[method](broker)


@pytest.mark.trio
@pytest.mark.parametrize(("answer", "fds"), [({"Session": 0}, 0), ({"Session": 0}, 2), ({"Session": 1}, 1)])
async def test_a_session_without_its_descriptor_or_with_more_is_none(
    liar: tuple[Liar, Broker], answer: dict[str, int], fds: int
) -> None:
    server, broker = liar
    before = await settled_fds()
    server.say(answer, fds)
    with pytest.raises(KeyServiceUnavailable, match="it opened no key session"):
        await _open(broker)
    assert await settled_fds() <= before


@pytest.mark.trio
async def test_a_session_that_is_no_socket_is_none(liar: tuple[Liar, Broker]) -> None:
    server, broker = liar
    before = await settled_fds()
    server.descriptor = lambda: os.open("/dev/null", os.O_RDONLY)
    server.say({"Session": 0}, 1)
    with pytest.raises(KeyServiceUnavailable, match="it opened no key session"):
        await _open(broker)
    assert await settled_fds() <= before


@pytest.mark.trio
async def test_an_error_of_the_key_service_keeps_its_code_and_no_descriptor(liar: tuple[Liar, Broker]) -> None:
    server, broker = liar
    before = await settled_fds()
    members = {"Code": "DisabledException", "Message": "x is disabled.", "Hint": ""}
    server.answer = json.dumps({"error": "io.ebsd.Broker.ServiceError", "parameters": members}).encode() + b"\0"
    server.fds = 4
    for call in METHODS.values():
        with pytest.raises(RemoteError) as caught:
            await call(broker)
        assert caught.value.code == "DisabledException"
    assert await settled_fds() <= before


@pytest.mark.trio
async def test_a_silent_key_service_is_given_up(liar: tuple[Liar, Broker], monkeypatch: pytest.MonkeyPatch) -> None:
    server, broker = liar
    server.silent = True
    for name in ("SILENCE", "PROBE", "RECHECK"):
        monkeypatch.setattr(broker_module, name, 0.1)
    monkeypatch.setattr(broker_module, "PATIENCE", 1000)  # for one that died, and not for one that hangs
    monkeypatch.setitem(broker_module.DEADLINES, broker_module.Wait.NOTHING, 0.1)
    for method, call in METHODS.items():
        broker._is_silent = False
        with trio.fail_after(20), pytest.raises(KeyServiceNotAnswering, match="seconds"):
            await call(broker)
        assert server.methods[0] == f"io.ebsd.Broker.{method}"
        server.methods.clear()
        with trio.fail_after(20), pytest.raises(KeyServiceNotAnswering, match="seconds"):
            await call(broker)
        assert server.methods == ["io.ebsd.Broker.GetStatus"], "what may be done late is not sent"
        server.methods.clear()


@pytest.mark.trio
async def test_a_key_service_that_is_slow_is_waited_for_while_it_is_alive(
    liar: tuple[Liar, Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, broker = liar
    for name in ("SILENCE", "PROBE"):
        monkeypatch.setattr(broker_module, name, 0.05)
    monkeypatch.setitem(broker_module.DEADLINES, broker_module.Wait.KEYS, 1.0)
    server.say(good_answer("GetStatus"))
    server.slow = "io.ebsd.Broker.ReEncrypt"
    with trio.fail_after(20), pytest.raises(KeyServiceNotAnswering, match="for 1 seconds"):
        await METHODS["ReEncrypt"](broker)
    assert server.methods.count("io.ebsd.Broker.GetStatus") >= 3


@pytest.mark.trio
async def test_what_is_owed_is_done_when_the_key_service_answers(
    liar: tuple[Liar, Broker], monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    """Of a grant whose making had no answer nobody knows the id: it is made again, by its name, and retired."""
    server, broker = liar
    for name in ("SILENCE", "PROBE", "RECHECK", "RETURN_PAUSE"):
        monkeypatch.setattr(broker_module, name, 0.05)
    nursery.start_soon(broker.tend)
    server.silent = True
    for method in ("CreateGrant", "RetireGrant"):
        with pytest.raises(KeyServiceNotAnswering):
            await METHODS[method](broker)
    await broker.raise_floor_soon("vol-1", 3)
    server.methods.clear()
    server.silent = False
    server.answers = {f"io.ebsd.Broker.{name}": good_answer(name) for name in METHODS}
    server.answers["io.ebsd.Broker.GetStatus"] |= {"State": "running"}
    with trio.fail_after(20):
        while not {"io.ebsd.Broker.RaiseFloor"} <= {*server.methods}:
            await trio.sleep(0.01)
    asked = [name.rpartition(".")[2] for name in server.methods]
    assert [name for name in asked if name != "GetStatus"] == [
        "CreateGrant",
        "RetireGrant",
        "RetireGrant",
        "RaiseFloor",
    ]


@pytest.mark.trio
async def test_a_grant_that_is_wanted_again_is_not_retired_afterwards(
    liar: tuple[Liar, Broker], monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    server, broker = liar
    for name in ("SILENCE", "PROBE", "RECHECK", "RETURN_PAUSE"):
        monkeypatch.setattr(broker_module, name, 0.05)
    server.silent = True
    with pytest.raises(KeyServiceNotAnswering):
        await METHODS["CreateGrant"](broker)
    server.silent = False
    server.answers = {f"io.ebsd.Broker.{name}": good_answer(name) for name in METHODS}
    server.answers["io.ebsd.Broker.GetStatus"] |= {"State": "running"}
    assert await METHODS["CreateGrant"](broker)
    server.methods.clear()
    nursery.start_soon(broker.tend)
    done = trio.Event()

    async def last() -> None:
        done.set()

    broker.afterwards("last", last)
    with trio.fail_after(20):
        await done.wait()
    assert {*server.methods} == {"io.ebsd.Broker.GetStatus"}


@pytest.mark.trio
async def test_calls_that_may_be_repeated_find_a_key_service_that_came_back(
    liar: tuple[Liar, Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, broker = liar
    monkeypatch.setattr(broker_module, "PATIENCE", 20)
    for method in ("CreateGrant", "RetireGrant", "RaiseFloor", "DeleteAnchor"):
        call, good = METHODS[method], good_answer(method)
        server.answer, server.calls = b"nonsense\0", 0
        async with trio.open_nursery() as nursery:

            async def mend(good: dict[str, Any] = good) -> None:
                while server.calls < 2:
                    await trio.sleep(0.005)
                server.say(good)

            nursery.start_soon(mend)
            await call(broker)


@pytest.mark.trio
async def test_a_pid_that_is_nobodys_is_no_running_broker(
    liar: tuple[Liar, Broker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker may die between its answer and the look at its process."""
    server, broker = liar
    started = 0

    class Starting(BrokerProcess):
        async def _start(self) -> None:
            nonlocal started
            started += 1

    process = Starting(
        broker,
        broker_socket=server.path,
        keys_socket=tmp_path / "keys.sock",
        state_dir=tmp_path,
        root_key={"kind": "file", "path": "/x"},
        admin_uid=0,
        may_create=False,
    )
    for pid in (0, -1, 1 << 22, 1 << 40):
        server.say({**good_answer("GetStatus"), "Pid": pid})
        await process.ensure()
    assert started == 4


@pytest.mark.trio
async def test_a_broker_that_listens_and_does_not_answer_is_told_at_the_start(
    liar: tuple[Liar, Broker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the keys, so another one could not be started; nothing is left of the attempt."""
    server, broker = liar
    server.silent = True
    monkeypatch.setattr(broker_process_module, "ADOPTION_DEADLINE", 0.1)
    process = BrokerProcess(
        broker,
        broker_socket=server.path,
        keys_socket=tmp_path / "keys.sock",
        state_dir=tmp_path,
        root_key={"kind": "file", "path": "/x"},
        admin_uid=0,
        may_create=False,
    )
    with pytest.raises(KeyServiceUnavailable, match=r"listens on .*kms\.sock and does not answer"):
        await process.ensure()
    # nor of one that was half way when it found it
    process._broker_socket = free = tmp_path / "kms.free"
    with (
        listen(tmp_path / "keys.sock", 0o600),
        pytest.raises(KeyServiceUnavailable, match=r"listens on .*keys\.sock and does not answer"),
    ):
        await process.ensure()
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(ConnectionRefusedError):
        sock.connect(str(free))


# --- the volume process's end -----------------------------------------------------------------------------------

MEMBERS = {
    "resource": CONTEXT["aws:ebs:id"], "owner": "000000001001", "encrypted": True, "key_arn": KEY, "kcv": "00" * 16,
    "floor": 0, "authority": None, "authority_floor": 0,
}  # fmt: skip


def packet(body: bytes, *, magic: bytes = b"EBSDKA01", status: int = 0, length: int | None = None) -> bytes:
    return struct.pack("<8sII", magic, status, len(body) if length is None else length) + body


def good(**changes: Any) -> bytes:
    return packet(json.dumps({**MEMBERS, **changes}).encode())


@contextlib.contextmanager
def answering(*packets: bytes) -> Iterator[socket.socket]:
    """A session whose other end sends these packets once it is asked, and hangs up."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def answer() -> None:
        with theirs, contextlib.suppress(OSError):
            theirs.recv(64)
            for each in packets:
                theirs.send(each)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield ours
    finally:
        thread.join()


def test_the_answer_of_an_honest_session_is_taken() -> None:
    with answering(good(), bytes(range(64))) as session:
        answer = keysession.ask(session)
    assert answer.anchor.resource == MEMBERS["resource"]
    assert answer.data_key is not None
    assert answer.data_key.equals(bytes(range(64)))
    answer.data_key.wipe()


NONSENSE: dict[str, tuple[bytes, ...]] = {
    "an end": (),
    "an empty packet": (b"",),
    "noise": (os.urandom(300),),
    "another magic": (packet(b"{}", magic=b"EBSDKA02"), bytes(64)),
    "another status": (packet(b"{}", status=2),),
    "a wrong length": (packet(b"{}", length=7),),
    "no json": (packet(b"{"),),
    "bytes that are no text": (packet(b"\xff\xfe"),),
    "an array": (packet(b"[]"),),
    "nested": (packet(b"[" * 16000),),
    "nested objects": (packet(b'{"a":' * 3000 + b"1" + b"}" * 3000),),
    "longer than any": (packet(b'{"x":"' + b"x" * 60000 + b'"}'),),
    "an error of nothing": (packet(b"{}", status=1),),
    "an error of a list": (packet(b"[1]", status=1),),
    "no members": (packet(b"{}"),),
    "encrypted is a number": (good(encrypted=1), bytes(64)),
    "a floor of text": (good(floor="3"), bytes(64)),
    "an authority's floor of text": (good(authority_floor="3"), bytes(64)),
    "a check value of text": (good(kcv="zz"), bytes(64)),
    "a check value of a number": (good(kcv=5), bytes(64)),
    "no key": (good(),),
    "an empty key": (good(), b""),
    "a short key": (good(), bytes(63)),
    "a long key": (good(), bytes(65)),
    "a very long key": (good(), bytes(100_000)),
}


@pytest.mark.parametrize("lie", NONSENSE)
def test_a_session_that_answers_nonsense_is_a_key_service_that_is_not_available(lie: str) -> None:
    before = open_fds()
    with answering(*NONSENSE[lie]) as session, pytest.raises(KeyServiceUnavailable) as caught:
        keysession.ask(session)
    assert "cannot be understood" in caught.value.message
    assert open_fds() == before


def test_a_session_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keysession, "DEADLINE", 0.1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, pytest.raises(KeyServiceUnavailable, match="did not answer within"):
        keysession.ask(ours)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(good())  # and the key never comes
    with theirs, pytest.raises(KeyServiceUnavailable, match="did not answer within"):
        keysession.ask(ours)


def test_a_session_that_is_closed_is_a_key_service_that_is_not_available() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with pytest.raises(KeyServiceUnavailable):
        keysession.ask(ours)


def test_the_error_that_a_session_answers_keeps_its_code() -> None:
    body = json.dumps({"Code": "DisabledException", "Message": "x is disabled.", "Hint": ""}).encode()
    with answering(packet(body, status=1)) as session, pytest.raises(RemoteError) as caught:
        keysession.ask(session)
    assert caught.value.code == "DisabledException"
