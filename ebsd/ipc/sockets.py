"""Unix sockets for trio: connect, listen, and descriptors beside bytes. Rules and limits: ``ebsd.wire``."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import trio

from ebsd.domain.errors import DaemonUnreachable
from ebsd.wire import sockets as blocking
from ebsd.wire.descriptors import MAX_DESCRIPTORS, ancillary, ancillary_size, close_all, received_fds

__all__ = ["MAX_DESCRIPTORS", "close_all", "connect", "listen", "recv_with_fds", "send_with_fds"]


async def connect(
    path: str | os.PathLike[str], *, deadline: float = 5.0, kind: int = socket.SOCK_STREAM
) -> trio.socket.SocketType:
    """Return a socket connected to the path; raise DaemonUnreachable, also when ``deadline`` seconds pass."""
    limit = trio.current_time() + deadline
    # Not trio's own connect: it takes the EAGAIN of a full backlog for a connect that is under way.
    while (sock := blocking.try_connect(path, kind)) is None:
        if trio.current_time() >= limit:
            raise DaemonUnreachable(socket=os.fspath(path), reason="too many connections wait there")
        await trio.sleep(blocking.BUSY_PAUSE)
    try:
        await trio.lowlevel.checkpoint()
    except BaseException:
        sock.close()
        raise
    return trio.socket.from_stdlib_socket(sock)


def listen(path: str | os.PathLike[str], mode: int, kind: int = socket.SOCK_STREAM) -> trio.socket.SocketType:
    """Return a listening socket for ``VarlinkServer.serve``; see ``ebsd.wire.sockets.listen``."""
    return trio.socket.from_stdlib_socket(blocking.listen(path, mode, kind))


async def send_with_fds(sock: trio.socket.SocketType, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send all of the data, the descriptors with its first byte. They stay the caller's.

    After a cancellation a part may have been sent: the connection is of no use any more.
    """
    sent = await sock.sendmsg([data], ancillary(fds))
    rest = memoryview(data)[sent:]
    while rest:
        rest = rest[await sock.send(rest) :]


async def recv_with_fds(
    sock: trio.socket.SocketType, bufsize: int, *, max_fds: int = MAX_DESCRIPTORS
) -> tuple[bytes, list[int]]:
    """Receive up to ``bufsize`` bytes and the descriptors that came with them; no bytes means end of file.

    Raises ProtocolError (nothing is left open) when there were more than ``max_fds``, or when a packet was
    longer. Cancelling it loses nothing.
    """
    data, control, flags, _ = await sock.recvmsg(bufsize, ancillary_size(max_fds), socket.MSG_CMSG_CLOEXEC)
    return data, received_fds(control, flags)
