"""The client library: where the socket is, what crosses it, and every way in which nobody answers."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ebsctl_fakes import FakeServer, job, job_id, volume

from ebsctl.client import SYSTEM_SOCKET, Client, default_socket
from ebsd.domain.errors import (
    DaemonUnreachable,
    ExitStatus,
    InvalidParameterValue,
    RemoteError,
    Timeout,
    VolumeBusy,
)
from ebsd.wire.framing import encode
from ebsd.wire.messages import make_error


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    fake = FakeServer(tmp_path)
    yield fake
    fake.close()


def test_a_call_returns_the_members_of_the_reply(server: FakeServer) -> None:
    server.world.add(volume())
    assert Client(server.path).ec2("DescribeVolumes") == {"Volumes": [volume()]}


def test_members_that_are_none_are_not_sent(server: FakeServer) -> None:
    Client(server.path).ec2("CreateVolume", Name="data", SizeBytes=1 << 20, KmsKeyId=None)
    assert server.parameters("EC2.CreateVolume") == {"Name": "data", "SizeBytes": 1 << 20}


def test_the_key_service_is_asked_on_the_socket_beside(server: FakeServer) -> None:
    client = Client(server.path)
    assert client.keys_path == server.keys_path
    assert client.kms("ListKeys") == {"Keys": []}
    assert client.key_service("GetStatus")["State"] == "running"


def test_an_error_keeps_code_message_hint_and_exit_status(server: FakeServer) -> None:
    busy = VolumeBusy(volume="vol-1", reason="it is open", path="/dev/loop5001")
    server.fail("EC2.DescribeVolumes", busy)
    with pytest.raises(RemoteError) as caught:
        Client(server.path).ec2("DescribeVolumes")
    assert (caught.value.code, caught.value.message, caught.value.hint) == (busy.code, busy.message, busy.hint)
    assert caught.value.exit_status is ExitStatus.CONFLICT


def test_descriptors_cross_and_stay_the_callers(server: FakeServer, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"open sesame")
    os.close(writer)
    file = os.open(tmp_path / "backup", os.O_WRONLY | os.O_CREAT, 0o600)
    reply = Client(server.path).key_service("Backup", (file, reader), Destination=0, PassphraseDescriptor=1)
    assert reply["Bytes"] == len(b"sealed keys")
    assert server.world.passphrases == [b"open sesame"]
    os.close(file)
    os.close(reader)


def test_the_reason_of_a_server_that_refuses_at_once_is_read(tmp_path: Path) -> None:
    """It answers before it has read anything, and hangs up while the client still sends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    client = Client(str(tmp_path / "s"), timeout=5)
    members = {"Code": "RequestLimitExceeded", "Message": "too many", "Hint": ""}
    refusal = encode(make_error("io.ebsd.EC2.ServiceError", members))

    def refuse() -> None:
        peer, _ = listener.accept()
        peer.sendall(refusal)
        peer.shutdown(socket.SHUT_RDWR)
        peer.close()

    thread = threading.Thread(target=refuse)
    thread.start()
    with pytest.raises((RemoteError, DaemonUnreachable)) as caught:
        client.ec2("DescribeVolumes", VolumeIds=["x" * 500_000])
    thread.join()
    listener.close()
    assert caught.value.code == "RequestLimitExceeded"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "it hung up without an answer"),
        (b'{"parameters":{', "it hung up without an answer"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n\0", "its answer is unreadable"),
        (b"[]\0", "its answer is unreadable"),
        (b'{"surprise":1}\0', "its answer is unreadable"),
        (b'{"error":"io.ebsd.EC2.ServiceError"}\0', "its answer is unreadable"),
        (b"\xff\0", "its answer is unreadable"),
    ],
)
def test_whoever_does_not_answer_properly_is_not_ebsd(server: FakeServer, answer: bytes, reason: str) -> None:
    server.raw = answer
    with pytest.raises(DaemonUnreachable) as caught:
        Client(server.path).ec2("DescribeVolumes")
    assert reason in caught.value.message
    assert caught.value.exit_status is ExitStatus.UNREACHABLE


@pytest.mark.parametrize("kind", ["nothing", "file", "directory", "stale"])
def test_what_is_no_living_socket_is_unreachable(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "ebsd.sock"
    if kind == "file":
        path.write_bytes(b"")
    elif kind == "directory":
        path.mkdir()
    elif kind == "stale":
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind(str(path))
    with pytest.raises(DaemonUnreachable, match="No ebsd answers"):
        Client(str(path)).ec2("DescribeVolumes")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use any socket")
def test_a_socket_one_may_not_use_is_unreachable(server: FakeServer) -> None:
    os.chmod(server.path, 0)
    with pytest.raises(DaemonUnreachable, match="you may not use it"):
        Client(server.path).ec2("DescribeVolumes")


def test_a_long_path_works(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    link = tmp_path / "l"
    link.symlink_to(directory)
    fake = FakeServer(link)
    fake.path, fake.keys_path = str(directory / "ebsd.sock"), str(directory / "keys.sock")
    assert Client(fake.path).ec2("DescribeVolumes") == {"Volumes": []}
    fake.close()


def test_a_silent_server_is_a_timeout(server: FakeServer) -> None:
    server.hang("EC2.DescribeVolumes")
    with pytest.raises(Timeout) as caught:
        Client(server.path, timeout=0.05).ec2("DescribeVolumes")
    assert "DescribeVolumes did not finish within 0.05 seconds" in caught.value.message


@pytest.mark.parametrize("name", ["\udc80", "x" * (1 << 20)])
def test_what_cannot_be_sent_is_the_callers_mistake(server: FakeServer, name: str) -> None:
    with pytest.raises(InvalidParameterValue):
        Client(server.path).ec2("DescribeVolumes", VolumeIds=[name])
    assert server.calls == []


# --- several replies to one call ---------------------------------------------------------------------------


def test_a_stream_yields_every_reply(server: FakeServer) -> None:
    server.world.add_jobs(job())
    replies = list(Client(server.path).control_stream("WaitJob", JobId=job_id(1), Absent=None))
    assert [reply["Job"]["State"] for reply in replies] == ["running"] * 4 + ["completed"]
    assert server.streamed == ["Control.WaitJob"]
    assert server.parameters("Control.WaitJob") == {"JobId": job_id(1)}


def test_a_plain_call_of_the_same_method_gets_the_end(server: FakeServer) -> None:
    server.world.add_jobs(job())
    assert Client(server.path).control("WaitJob", JobId=job_id(1))["Job"]["State"] == "completed"
    assert server.streamed == []


def test_a_stream_may_be_left(server: FakeServer) -> None:
    server.world.add_jobs(job())
    server.stays = True
    before = len(os.listdir("/proc/self/fd"))
    replies = Client(server.path).control_stream("WaitJob", JobId=job_id(1))
    assert next(replies)["Job"]["State"] == "running"
    replies.close()
    # The server's end of the connection may still be open: it is closed by another thread.
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_an_error_ends_a_stream(server: FakeServer) -> None:
    with pytest.raises(RemoteError) as caught:
        list(Client(server.path).control_stream("WaitJob", JobId=job_id(1)))
    assert caught.value.code == "Ebsd.JobNotFound"


def test_a_stream_that_breaks_off_is_no_end(server: FakeServer) -> None:
    server.world.add_jobs(job())
    server.breaks = True
    replies = Client(server.path).control_stream("WaitJob", JobId=job_id(1))
    assert [next(replies)["Job"]["State"] for _ in range(4)] == ["running"] * 4
    with pytest.raises(DaemonUnreachable):
        next(replies)


def test_garbage_after_good_replies_is_no_end(server: FakeServer) -> None:
    server.raw = b'{"parameters":{"a":1},"continues":true}\0nonsense\0'
    replies = Client(server.path).control_stream("WaitJob", JobId=job_id(1))
    assert next(replies) == {"a": 1}
    with pytest.raises(DaemonUnreachable, match="unreadable"):
        next(replies)


def test_the_timeout_of_a_stream_counts_for_all_replies(server: FakeServer) -> None:
    server.world.add_jobs(job())
    server.stays = True
    replies = Client(server.path, timeout=0.1).control_stream("WaitJob", JobId=job_id(1))
    with pytest.raises(Timeout):
        list(replies)


# --- where the socket is ----------------------------------------------------------------------------------


def test_the_places_of_the_socket_in_their_order(tmp_path: Path) -> None:
    session = tmp_path / "ebsd"
    session.mkdir()
    own = session / "ebsd.sock"
    environment = {"EBSD_SOCKET": "/a", "EBSD_RUNTIME_DIR": "/b", "XDG_RUNTIME_DIR": str(tmp_path)}
    uid = os.geteuid()
    assert default_socket(environment, uid) == "/a"
    del environment["EBSD_SOCKET"]
    assert default_socket(environment, uid) == "/b/ebsd.sock"
    del environment["EBSD_RUNTIME_DIR"]
    assert default_socket(environment, uid) == SYSTEM_SOCKET  # there is none yet
    own.write_bytes(b"")
    assert default_socket(environment, uid) == SYSTEM_SOCKET  # not a socket
    own.unlink()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(own))
    assert default_socket(environment, uid) == str(own)
    assert default_socket(environment, uid + 1) == SYSTEM_SOCKET  # somebody else's session
    assert default_socket({}, uid) == SYSTEM_SOCKET
