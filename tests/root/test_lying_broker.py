"""A key service that is down, slow, flapping or lies: real ebsd, real broker, and somebody between the two on kms.sock.

An attachment fails with a clear error before there is a device; volumes that are attached never notice; and nothing is
left of it in ebsd, no descriptor, no thread, no process.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from installation import Installation

MIB = 1 << 20
HEADER = struct.Struct("<8sII")
UNAVAILABLE = "KMSInternalException"
INTEGRITY = "Ebsd.IntegrityFailure"

Answer = tuple[dict[str, Any], bytes | None]
"""What a key session answers: its members, and the data key."""
SessionLie = Callable[["Between", dict[str, Any], bytes], Answer | list[bytes]]
"""Gets the true answer; returns another one, or the packets to send in its place."""


@dataclass(frozen=True)
class Lie:
    """What somebody between ebsd and the broker does for one volume, and what ebsd must say of it."""

    code: str
    method: str = "OpenKeySession"
    reply: Callable[[], bytes] | None = None
    """The bytes that ebsd gets for this method, instead of what the broker answers."""
    session: SessionLie | None = None
    silent: bool = False
    extra_fds: int = 0
    delay: float = 0.0


def packet(members: Any, status: int = 0) -> bytes:
    body = members if isinstance(members, bytes) else json.dumps(members).encode()
    return HEADER.pack(b"EBSDKA01", status, len(body)) + body


def replaced(**changes: Any) -> SessionLie:
    return lambda _between, members, key: ({**members, **changes}, key)


def others_key(between: Between, members: dict[str, Any], _key: bytes) -> Answer:
    return members, between.known["other"][1]


def others_key_with_its_check_value(between: Between, members: dict[str, Any], _key: bytes) -> Answer:
    """All that the anchor says of the data key fits the data key; only the volume's own record does not."""
    other, key = between.known["other"]
    return {**members, "kcv": other["kcv"]}, key


def others_answer(between: Between, _members: dict[str, Any], _key: bytes) -> Answer:
    return between.known["other"]


def reply(parameters: Any) -> bytes:
    return json.dumps({"parameters": parameters}).encode() + b"\0"


LIES: dict[str, Lie] = {
    "hangs up": Lie(UNAVAILABLE, reply=lambda: b""),
    "noise": Lie(UNAVAILABLE, reply=lambda: os.urandom(3000) + b"\0"),
    "no json": Lie(UNAVAILABLE, reply=lambda: b"<html>\0"),
    "ten megabytes": Lie(UNAVAILABLE, reply=lambda: b'{"parameters":{"x":"' + b"x" * 10 * MIB + b'"}}\0'),
    "another member": Lie(UNAVAILABLE, reply=lambda: reply({"Session": 0, "Plaintext": "x"})),
    "no descriptor": Lie(UNAVAILABLE, reply=lambda: reply({"Session": 0})),
    "more descriptors": Lie(UNAVAILABLE, reply=lambda: reply({"Session": 0}), extra_fds=16),
    "a descriptor that is no socket": Lie(UNAVAILABLE, reply=lambda: reply({"Session": 0}), extra_fds=1),
    "the session hangs up": Lie(UNAVAILABLE, session=lambda _b, _m, _k: []),
    "the session speaks noise": Lie(UNAVAILABLE, session=lambda _b, _m, _k: [os.urandom(500)]),
    "the session nests": Lie(UNAVAILABLE, session=lambda _b, _m, _k: [packet(b"[" * 16000)]),
    "the session has much to say": Lie(UNAVAILABLE, session=lambda _b, _m, _k: [packet(b"x" * 150_000)]),
    "half a key": Lie(UNAVAILABLE, session=lambda _b, members, key: [packet(members), key[:32]]),
    "a longer key": Lie(UNAVAILABLE, session=lambda _b, members, key: [packet(members), key + b"\0"]),
    "a random key": Lie(INTEGRITY, session=lambda _b, members, _k: (members, os.urandom(64))),
    "another volume's key": Lie(INTEGRITY, session=others_key),
    "another volume's key and check value": Lie(INTEGRITY, session=others_key_with_its_check_value),
    "another volume's answer": Lie(INTEGRITY, session=others_answer),
    "not encrypted": Lie(INTEGRITY, session=replaced(encrypted=False)),
    "another owner": Lie(INTEGRITY, session=replaced(owner="000000031001")),
    "another key": Lie(INTEGRITY, session=replaced(key_arn="arn:aws:kms:local:000000000000:key/x")),
    "a later floor": Lie("Ebsd.RecordTooOld", session=replaced(floor=1 << 40)),
    "an error nobody knows": Lie(
        "Some.Error", session=lambda _b, _m, _k: [packet({"Code": "Some.Error", "Message": "m", "Hint": ""}, 1)]
    ),
}
"""Those that are told at once. One volume each."""

PATIENT: dict[str, Lie] = {
    "mute call": Lie(UNAVAILABLE, silent=True),
    "mute session": Lie(UNAVAILABLE, session=lambda between, _m, _k: between.never()),
    "noise for a grant": Lie(UNAVAILABLE, method="CreateGrant", reply=lambda: b"noise\0"),
    "slow": Lie("", delay=1.0),
}
"""Those that ebsd waits for: up to half a minute, all at the same time."""


@dataclass
class Between:
    """Listens where ebsd looks for the broker, passes everything on, and lies for the volumes that it was told."""

    path: Path
    lies: dict[str, Lie] = field(default_factory=dict)
    known: dict[str, Answer] = field(default_factory=dict)
    """What the sessions of volumes truly answered, by id, and by what a test calls them."""
    ended: threading.Event = field(default_factory=threading.Event)
    problems: list[BaseException] = field(default_factory=list)

    @property
    def real(self) -> Path:
        return self.path.with_name("kms.real")

    def start(self) -> None:
        self.path.rename(self.real)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.path))
        self.listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        self.ended.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.real.rename(self.path)

    def never(self) -> list[bytes]:
        self.ended.wait(60)
        return []

    def _accept(self) -> None:
        while not self.ended.is_set():
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._guarded, args=(client,), daemon=True).start()

    def _guarded(self, client: socket.socket) -> None:
        try:
            with client:
                self._serve(client)
        except (BrokenPipeError, ConnectionResetError, ConnectionRefusedError):
            pass  # ebsd gave up, or the broker is being killed
        except BaseException as exc:  # noqa: BLE001 - the test looks
            self.problems.append(exc)

    def _serve(self, client: socket.socket) -> None:
        frame = b""
        while not frame.endswith(b"\0"):
            more = client.recv(65536)
            if not more:
                return
            frame += more
        call = json.loads(frame[:-1])
        method, parameters = call["method"].rpartition(".")[2], call.get("parameters", {})
        lie = self.lies.get(_resource_of(parameters))
        if lie is not None:
            time.sleep(lie.delay)
            if lie.method == method and lie.silent:
                self.never()
                return
            if lie.method == method and lie.reply is not None:
                self._reply(client, lie)
                return
        answer, fds = self._ask_broker(frame)
        try:
            if method == "OpenKeySession" and fds:
                fds = [self._session_between(fds[0], parameters["ResourceId"], lie)]
            _send(client, answer, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _reply(self, client: socket.socket, lie: Lie) -> None:
        assert lie.reply is not None
        fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(lie.extra_fds)]
        try:
            _send(client, lie.reply(), fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _ask_broker(self, frame: bytes) -> tuple[bytes, list[int]]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as broker:
            broker.connect(str(self.real))
            broker.sendall(frame)
            answer, fds = b"", []
            while not answer.endswith(b"\0"):
                more, received, _, _ = socket.recv_fds(broker, 65536, 4)
                fds += received
                if not more:
                    break
                answer += more
            return answer, list(fds)

    def _session_between(self, true: int, resource: str, lie: Lie | None) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        session = socket.socket(fileno=true)
        threading.Thread(target=self._answer, args=(ours, session, resource, lie), daemon=True).start()
        return theirs.detach()

    def _answer(self, asked: socket.socket, session: socket.socket, resource: str, lie: Lie | None) -> None:
        try:
            with asked, session:
                question = asked.recv(64)
                if not question:
                    return
                session.send(question)
                first = session.recv(65536)
                _, status, _ = HEADER.unpack_from(first)
                if status:
                    asked.send(first)
                    return
                members, key = json.loads(first[HEADER.size :]), session.recv(128)
                self.known[resource] = (members, key)
                packets: list[bytes] = [first, key]
                if lie is not None and lie.session is not None:
                    told = lie.session(self, members, key)
                    packets = told if isinstance(told, list) else [packet(told[0])] + ([told[1]] if told[1] else [])
                for each in packets:
                    asked.send(each)
        except (BrokenPipeError, ConnectionResetError):
            pass
        except BaseException as exc:  # noqa: BLE001 - the test looks
            self.problems.append(exc)


def _send(client: socket.socket, data: bytes, fds: list[int]) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = client.sendmsg([data], ancillary) if data else 0
    client.sendall(data[sent:])


def _resource_of(parameters: dict[str, Any]) -> str:
    context = parameters.get("EncryptionContextEquals") or parameters.get("EncryptionContext") or {}
    return str(parameters.get("ResourceId") or context.get("aws:ebs:id") or "")


class Load:
    """Writes, syncs and reads an attached volume for as long as it is told; every error is kept."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self._ending = threading.Event()
        self.rounds = 0
        self.longest = 0.0
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                at = (self.rounds % 16) * MIB
                began = time.monotonic()
                data = os.urandom(4096) * 16
                os.pwrite(self._fd, data, at)
                os.fsync(self._fd)
                assert os.pread(self._fd, len(data), at) == data
                self.longest = max(self.longest, time.monotonic() - began)
                self.rounds += 1
        except BaseException as exc:  # noqa: BLE001 - the test looks
            self.failure = exc

    def stop(self) -> None:
        self._ending.set()
        self._thread.join()
        os.close(self._fd)


@pytest.fixture
def between(ebsd: Installation) -> Iterator[Between]:
    made = Between(ebsd.runtime / "kms.sock")
    made.start()
    try:
        yield made
    finally:
        made.stop()


def used(pid: int) -> tuple[int, int]:
    """Return descriptors and threads of a process."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def settled(ebsd: Installation, pid: int, wanted: tuple[int, int]) -> tuple[int, int]:
    """Return what the process uses once it is no more than wanted, or at last: idle threads end after a while."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        now = used(pid)
        if now[0] <= wanted[0] and now[1] <= wanted[1]:
            return now
        time.sleep(0.2)
    return used(pid)


def volume_processes(ebsd: Installation) -> list[int]:
    daemon = ebsd.daemon_pid()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == daemon and b"ebsd.volume.holder\0" in command:
                found.append(int(process.name))
    return found


def make(ebsd: Installation, name: str) -> str:
    """Make a volume that was attached once, so that its record is signed."""
    ebsd.ok("create", name, "--size", "16M", "--encrypted")
    with open(ebsd.ok("attach", name, "--file"), "r+b", buffering=0) as file:
        file.write(name.encode().ljust(4096))
    ebsd.ok("detach", name)
    return str(ebsd.ctl_json("show", name)["VolumeId"])


def tell(ebsd: Installation, between: Between, name: str, ident: str, lie: Lie, calm: threading.Event) -> None:
    """Attach under the lie, see that it fails as it must and leaves nothing; then, when it is calm, without it."""
    between.lies[ident] = lie
    block = ebsd.runtime / "volumes" / ident
    try:
        if lie.code:
            status, error = ebsd.refused("attach", name, "--file")
            assert (error["Code"], status != 0) == (lie.code, True), error
            assert len(error["Message"]) < 1000
            assert "incident" not in error["Message"].lower()
            assert not block.exists()
            assert ebsd.ctl_json("show", name)["State"] == "available"
    finally:
        if lie.code:
            del between.lies[ident]
    assert calm.wait(60)
    with open(ebsd.ok("attach", name, "--file"), "rb", buffering=0) as file:
        assert file.read(4096).rstrip() == name.encode()
    ebsd.ok("detach", name)
    assert ebsd.ctl_json("show", name)["Integrity"] == "verified"


@pytest.mark.timeout(300)
def test_a_key_service_that_lies_or_dies_attaches_nothing_and_disturbs_nothing(
    ebsd: Installation, between: Between
) -> None:
    workers = 3
    with ThreadPoolExecutor(workers) as pool:
        names = ["other", *(f"lied-{n}" for n in range(workers)), *PATIENT]
        idents = dict(zip(names, pool.map(lambda name: make(ebsd, name.replace(" ", "-")), names), strict=True))
    at_once, calm = threading.Event(), threading.Event()
    at_once.set()
    between.known["other"] = between.known[idents["other"]]
    ebsd.ok("create", "busy", "--size", "16M", "--encrypted")
    load = Load(ebsd.ok("attach", "busy", "--file"))
    pid = ebsd.daemon_pid()
    before = used(pid)
    try:
        with ThreadPoolExecutor(workers + len(PATIENT)) as pool:
            waiting = [
                pool.submit(
                    tell, ebsd, between, name.replace(" ", "-"), idents[name], lie, calm if lie.code else at_once
                )
                for name, lie in PATIENT.items()
            ]

            def tell_each(worker: int) -> None:
                for each in list(LIES)[worker::workers]:
                    try:
                        tell(ebsd, between, f"lied-{worker}", idents[f"lied-{worker}"], LIES[each], at_once)
                    except BaseException as exc:
                        raise AssertionError(f"the lie was: {each}") from exc

            told = [pool.submit(tell_each, worker) for worker in range(workers)]
            try:
                for call in (
                    *told,
                    *(call for call, lie in zip(waiting, PATIENT.values(), strict=True) if not lie.code),
                ):
                    call.result()
                flap(ebsd, idents["lied-0"])
            finally:
                calm.set()
            for call in waiting:
                call.result()
    finally:
        load.stop()
    assert load.failure is None
    assert load.rounds > 20
    assert load.longest < 10, "an attached volume waited for the key service"
    assert not between.problems, between.problems
    assert settled(ebsd, pid, before) <= before
    assert len(volume_processes(ebsd)) == 1, "the busy one's"
    assert sorted(os.listdir(ebsd.runtime / "volumes")) == [ebsd.ctl_json("show", "busy")["VolumeId"]]
    log = ebsd.log.read_text()
    assert "incident" not in log, log[-6000:]
    assert "Traceback" not in log, log[-6000:]


def flap(ebsd: Installation, ident: str) -> None:
    """Stop, continue and kill the broker, again and again; between two deaths everything works."""
    for number in range(2):
        broker = ebsd.ctl_json("status")["KeyService"]["Pid"]
        os.kill(broker, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(broker, signal.SIGCONT)
        os.kill(broker, signal.SIGKILL)
        # Whether the broker is back by then or not: it works, or says that there is no key service.
        outcome = ebsd.ctl("--json", "attach", "lied-0", "--file")
        if outcome.status != 0:
            assert outcome.error["Code"] == UNAVAILABLE, outcome
            assert not (ebsd.runtime / "volumes" / ident).exists()
        deadline = time.monotonic() + 30
        while ebsd.ctl_json("status")["KeyService"]["State"] != "running":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        if outcome.status != 0:
            ebsd.ok("attach", "lied-0", "--file")
        ebsd.ok("detach", "lied-0")
        assert ebsd.ctl_json("show", "lied-0")["Integrity"] == "verified", number


def test_a_wrapped_key_that_is_another_volumes_makes_no_volume(ebsd: Installation, between: Between) -> None:
    """ebsd is given the blob of an older volume for a new one: the anchor is refused, and nothing is made."""
    blobs: list[bytes] = []
    honest = between._ask_broker

    def record(frame: bytes) -> tuple[bytes, list[int]]:
        answer, fds = honest(frame)
        if b"GenerateDataKeyWithoutPlaintext" in frame:
            blobs.append(answer)
            return blobs[0], fds
        return answer, fds

    between._ask_broker = record  # type: ignore[method-assign]
    ebsd.ok("create", "first", "--size", "8M", "--encrypted")
    status, error = ebsd.refused("create", "second", "--size", "8M", "--encrypted")
    assert (status != 0, error["Code"]) == (True, "InvalidCiphertextException"), error
    assert len(blobs) == 2
    assert [volume["Name"] for volume in ebsd.ctl_json("list", "volumes")["Volumes"]] == ["first"]
    between._ask_broker = honest  # type: ignore[method-assign]
    ebsd.ok("create", "second", "--size", "8M", "--encrypted")
    ebsd.ok("attach", "first", "--file")
    ebsd.ok("detach", "first")
    assert not between.problems
