"""Who is at the other end of a Unix socket: SO_PEERCRED, the only authentication there is.

The kernel recorded the credentials at connect(2) (unix(7)). Nothing is ever read from ``/proc/<pid>``: the
number may belong to another process by now.
"""

from __future__ import annotations

import pwd
import re
import socket
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Protocol

from ebsd.domain.errors import AuthFailure
from ebsd.domain.ids import account_of_uid
from ebsd.domain.model import Caller

NO_UID: Final = 2**32 - 1
"""(uid_t)-1: what the kernel says when it has no credentials."""

DYNAMIC_UIDS: Final = range(61184, 65520)
"""Uids that systemd gives to a service for one run (systemd.io/UIDS-GIDS): they own nothing that lasts."""

_UCRED = struct.Struct("iII")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,32}")


class _HasOptions(Protocol):
    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Peer:
    """Credentials of a peer. The pid is for log lines only."""

    uid: int
    gid: int
    pid: int


def peer_of(sock: _HasOptions) -> Peer:
    """Return the credentials of the other end of a connected Unix socket."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(uid, gid, pid)


def user_name(uid: int) -> str:
    """Return the user's name, or the uid as text when there is none or it is not [A-Za-z0-9._-]{1,32}.

    A name becomes a part of principals and log lines, so odd ones do not get there.
    """
    try:
        name = pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)
    return name if _NAME.fullmatch(name) else str(uid)


def refuse_unusable(peer: Peer) -> None:
    """Raise AuthFailure for uids that do not name one user for good: none, overflow, dynamic."""
    if peer.uid == NO_UID:
        raise AuthFailure(uid=peer.uid, reason="the kernel knows no credentials")
    if peer.uid == overflow_uid():
        raise AuthFailure(uid=peer.uid, reason="it stands for every user of other user namespaces")
    if peer.uid in DYNAMIC_UIDS:
        raise AuthFailure(uid=peer.uid, reason="it is given to one service after the other")


def caller_of(peer: Peer, *admin_uids: int) -> Caller:
    """Return the peer as the domain sees it; root and ``admin_uids`` administer. Raises AuthFailure.

    The name is looked up in the user database (NSS), which may take time where that is a network service.
    """
    refuse_unusable(peer)
    is_admin = peer.uid == 0 or peer.uid in admin_uids
    return Caller(peer.uid, user_name(peer.uid), account_of_uid(peer.uid), is_admin)


@cache
def overflow_uid() -> int:
    """Return the uid that stands for unmapped users, by default 65534 (proc_sys_kernel(5))."""
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text("ascii"))
    except OSError:
        return 65534


def uid_map_is_identity() -> bool:
    """Say whether uids mean here what they mean on the host (user_namespaces(7))."""
    try:
        lines = Path("/proc/self/uid_map").read_text("ascii").split("\n")
    except FileNotFoundError:  # a kernel without user namespaces
        return True
    return [line.split() for line in lines if line] == [["0", "0", str(NO_UID)]]
