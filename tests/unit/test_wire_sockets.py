"""Unix sockets by path and descriptors beside bytes, blocking."""

import errno
import os
import socket
import stat

import pytest

from ebsd.domain.errors import DaemonUnreachable, ProtocolError
from ebsd.wire.descriptors import close_all, recv_with_fds, send_with_fds
from ebsd.wire.sockets import connect, listen


@pytest.fixture
def long_path(tmp_path):
    directory = tmp_path / ("d" * 120) / ("e" * 120)
    directory.mkdir(parents=True)
    return directory / "ebsd.sock"


def test_a_socket_works_below_a_path_that_sockaddr_un_cannot_hold(long_path):
    with listen(long_path, 0o660) as listener, connect(long_path) as client:
        server, _ = listener.accept()
        with server:
            client.sendall(b"hello")
            assert server.recv(16) == b"hello"


def test_a_listener_has_exactly_the_mode_asked_for_and_is_not_inherited(tmp_path):
    path = tmp_path / "s"
    with listen(path, 0o666) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        assert not listener.get_inheritable()
        assert not listener.getblocking()


def test_a_stale_socket_is_replaced(long_path):
    listen(long_path, 0o600).close()
    with listen(long_path, 0o600), connect(long_path):
        pass


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_socket_that_answers_stays_whatever_its_type(tmp_path, kind):
    path = tmp_path / "s"
    with listen(path, 0o600, kind):
        with pytest.raises(OSError) as info:
            listen(path, 0o600)
        assert info.value.errno == errno.EADDRINUSE
        with connect(path, kind=kind):
            pass


def test_what_is_not_a_socket_is_never_removed(tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError):
        listen(path, 0o600)
    assert path.read_text() == "data"


def test_a_full_backlog_is_waited_for_and_then_reported(tmp_path):
    path = tmp_path / "s"
    with listen(path, 0o600, backlog=0), connect(path), pytest.raises(DaemonUnreachable, match="wait"):
        connect(path, timeout=0.05)


@pytest.mark.parametrize("leave", ["nothing", "stale", "file"])
def test_a_daemon_that_is_not_there_is_named_with_its_reason(tmp_path, leave):
    path = tmp_path / "s"
    if leave == "stale":
        listen(path, 0o600).close()
    elif leave == "file":
        path.touch()
    with pytest.raises(DaemonUnreachable, match=str(path)):
        connect(path)


def test_descriptors_cross_and_are_not_inherited():
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    with ours, theirs:
        send_with_fds(ours, b"x", [read, write])
        data, fds = recv_with_fds(theirs, 16)
        assert data == b"x"
        assert not any(os.get_inheritable(fd) for fd in fds)
        os.write(fds[1], b"through")
        assert os.read(read, 16) == b"through"
        close_all([read, write, *fds])


def test_more_descriptors_than_asked_for_are_refused_and_none_stays_open():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for count in (3, 4, 250):  # control messages are padded to 8 bytes: an odd one more must not slip in
            before = os.listdir("/proc/self/fd")
            send_with_fds(ours, b"x", [0] * count)
            with pytest.raises(ProtocolError, match="descriptors"):
                recv_with_fds(theirs, 16, max_fds=count - 1)
            assert os.listdir("/proc/self/fd") == before
        with pytest.raises(ProtocolError, match="254"):
            send_with_fds(ours, b"x", [0] * 254)


def test_a_packet_that_does_not_fit_is_refused_and_its_descriptors_are_closed():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        before = os.listdir("/proc/self/fd")
        send_with_fds(ours, b"x" * 17, [0])
        with pytest.raises(ProtocolError, match="too long"):
            recv_with_fds(theirs, 16)
        assert os.listdir("/proc/self/fd") == before


def test_a_large_message_is_sent_whole():
    ours, theirs = socket.socketpair()
    data = os.urandom(3_000_000)
    pid = os.fork()
    if pid == 0:
        send_with_fds(ours, data, [0])
        os._exit(0)
    ours.close()
    got, descriptors = bytearray(), []
    with theirs:
        while chunk := recv_with_fds(theirs, 1 << 16):
            if not chunk[0]:
                break
            got += chunk[0]
            descriptors += chunk[1]
    os.waitpid(pid, 0)
    assert bytes(got) == data
    assert len(descriptors) == 1
    close_all(descriptors)
