"""Channels of helpers that have no event loop."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from ebsd.domain.errors import RemoteError, Timeout, VolumeNotFound
from ebsd.ipc.blocking_channel import BlockingChannel
from ebsd.ipc.packets import ChannelClosed
from ebsd.wire.descriptors import close_all


def socket_pair():
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_helper_without_event_loop_speaks_the_same_protocol():
    ours, theirs = map(BlockingChannel, socket_pair())
    handlers = {
        "echo": lambda params, fds: ({"n": len(fds)}, fds),
        "fail": lambda params, fds: (_ for _ in ()).throw(VolumeNotFound(volume="v")),
    }

    def work():
        with theirs:
            while theirs.serve_one(handlers):
                pass

    thread = threading.Thread(target=work)
    thread.start()
    with ours:
        packet = ours.request("echo", {}, [0, 0], deadline=5)
        assert packet.message == {"n": 2}
        assert len(packet.fds) == 2
        close_all(packet.fds)
        with pytest.raises(RemoteError) as info:
            ours.request("fail")
        assert info.value.code == "InvalidVolume.NotFound"
    thread.join()


def test_a_blocking_request_has_a_deadline():
    ours, theirs = socket_pair()
    with theirs, BlockingChannel(ours) as channel, pytest.raises(Timeout):
        channel.request("x", deadline=0.05)


def test_the_end_of_the_other_side_is_seen():
    ours, theirs = map(BlockingChannel, socket_pair())
    theirs.close()
    with ours:
        assert ours.receive() is None
        assert not ours.serve_one({})
        with pytest.raises(ChannelClosed):
            ours.send({})
        with pytest.raises(ChannelClosed):
            ours.request("x")


def test_a_helper_does_not_load_the_event_loop():
    code = "import ebsd.ipc.blocking_channel, sys; sys.exit('trio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=os.path.curdir).returncode == 0
