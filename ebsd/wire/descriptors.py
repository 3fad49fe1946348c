"""Descriptors beside bytes on Unix sockets (SCM_RIGHTS), for blocking sockets, and the parts that trio code
shares.

Descriptors that are sent stay the sender's; descriptors that are received are the receiver's to close.
Linux never reads past the segment that carried descriptors (unix(7)), so they belong to the last byte
received.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Final

from ebsd.domain.errors import ProtocolError

MAX_DESCRIPTORS: Final = 253
"""Descriptors of one message: SCM_MAX_FD of the kernel."""

Ancillary = list[tuple[int, int, bytes]]


def ancillary(fds: Sequence[int]) -> Ancillary:
    """Return the control messages that carry the descriptors, for ``sendmsg``."""
    if len(fds) > MAX_DESCRIPTORS:
        raise ProtocolError(reason=f"{len(fds)} descriptors are too many, {MAX_DESCRIPTORS} fit a message")
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []


def ancillary_size(max_fds: int) -> int:
    """Return the control buffer size for ``recvmsg`` that holds exactly ``max_fds`` descriptors, in bytes."""
    # CMSG_LEN, not CMSG_SPACE: the padding would let one more descriptor in.
    return socket.CMSG_LEN(max_fds * _INT)


def received_fds(control: Iterable[tuple[int, int, bytes]], flags: int) -> list[int]:
    """Return the descriptors of a ``recvmsg``; if some were cut off, close them and raise ProtocolError."""
    fds: list[int] = []
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % _INT])
            fds.extend(numbers)
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        close_all(fds)
        # The kernel also cuts when this process has no free descriptor left.
        what = "too many descriptors" if flags & socket.MSG_CTRUNC else "a message that is too long"
        raise ProtocolError(reason=f"{what} came at once")
    return fds


def send_with_fds(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send all of the data on a blocking socket, the descriptors with its first byte."""
    sent = sock.sendmsg([data], ancillary(fds))
    if sent < len(data):
        sock.sendall(memoryview(data)[sent:])


def recv_with_fds(sock: socket.socket, bufsize: int, *, max_fds: int = MAX_DESCRIPTORS) -> tuple[bytes, list[int]]:
    """Receive up to ``bufsize`` bytes and the descriptors that came with them; no bytes means end of file.

    Raises ProtocolError (nothing is left open) when there were more than ``max_fds``, or when a packet was
    longer.
    """
    data, control, flags, _ = sock.recvmsg(bufsize, ancillary_size(max_fds), socket.MSG_CMSG_CLOEXEC)
    return data, received_fds(control, flags)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody wants; an error of close(2) has no one left to matter to."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


_INT = array.array("i").itemsize
