"""Who is at the other end."""

import os
import socket

import pytest

from ebsd.domain.errors import AuthFailure
from ebsd.ipc import peer as peers
from ebsd.ipc.peer import Peer, caller_of, overflow_uid, peer_of, uid_map_is_identity, user_name


def test_the_kernel_tells_who_the_peer_is():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_of(ours) == Peer(os.getuid(), os.getgid(), os.getpid())


def test_root_and_named_uids_administer_and_nobody_else():
    assert caller_of(Peer(0, 0, 1)).is_admin
    assert not caller_of(Peer(1000, 1000, 1)).is_admin
    caller = caller_of(Peer(1000, 1000, 1), 1000)
    assert caller.is_admin
    assert caller.account == "000000001000"


@pytest.mark.parametrize("uid", [2**32 - 1, overflow_uid(), 61184, 65519])
def test_uids_that_name_no_lasting_user_are_refused(uid):
    with pytest.raises(AuthFailure, match=str(uid)):
        caller_of(Peer(uid, 0, 1))


@pytest.mark.parametrize("uid", [61183, 65520])
def test_uids_beside_the_dynamic_ones_are_not(uid):
    assert caller_of(Peer(uid, 0, 1)).uid == uid


def test_a_uid_without_a_name_and_an_odd_name_are_shown_as_numbers(monkeypatch):
    assert user_name(0) == "root"
    assert user_name(4_000_000_000) == "4000000000"

    class Entry:
        pw_name = "a:b/c d"

    monkeypatch.setattr(peers.pwd, "getpwuid", lambda uid: Entry)
    assert user_name(1234) == "1234"


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        ("         0          0 4294967295\n", True),
        ("         0     100000      65536\n", False),
        ("         0          0       1000\n      1000       1000 4294966295\n", False),
    ],
)
def test_only_the_full_identity_map_counts(monkeypatch, text, identity):
    monkeypatch.setattr(peers.Path, "read_text", lambda self, encoding: text)
    assert uid_map_is_identity() is identity
