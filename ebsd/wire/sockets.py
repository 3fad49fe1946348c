"""Unix sockets by path: connect and listen, also where the path is longer than the 107 bytes of sockaddr_un.

Such a path goes through ``/proc/self/fd/N`` of its directory, opened with O_PATH.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from typing import Final

from ebsd.domain.errors import DaemonUnreachable

MAX_PATH: Final = 107
"""Bytes of sun_path without its NUL (unix(7))."""

BUSY_PAUSE: Final = 0.02
"""Seconds between attempts while a listener's backlog is full: connect(2) says EAGAIN and no more."""

_BACKLOG: Final = 128


@contextlib.contextmanager
def address_of(path: str | os.PathLike[str]) -> Iterator[str]:
    """Give an address for the path, valid inside the block, that fits sockaddr_un. Raises OSError."""
    text = os.fspath(path)
    if len(os.fsencode(text)) <= MAX_PATH:
        yield text
        return
    directory, name = os.path.split(text)
    fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def connect(path: str | os.PathLike[str], *, timeout: float = 5.0, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Return a blocking socket connected to the path; raise DaemonUnreachable within ``timeout`` seconds."""
    limit = time.monotonic() + timeout
    while (sock := try_connect(path, kind)) is None:
        if time.monotonic() >= limit:
            raise DaemonUnreachable(socket=os.fspath(path), reason="too many connections wait there")
        time.sleep(BUSY_PAUSE)
    sock.setblocking(True)
    return sock


def try_connect(path: str | os.PathLike[str], kind: int = socket.SOCK_STREAM) -> socket.socket | None:
    """Return a nonblocking connected socket, None when the listener is busy, or raise DaemonUnreachable."""
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with address_of(path) as address:
            sock.connect(address)
    except BlockingIOError:
        sock.close()
        return None
    except OSError as exc:
        sock.close()
        raise DaemonUnreachable(socket=os.fspath(path), reason=_reason(exc)) from exc
    except BaseException:
        sock.close()
        raise
    return sock


def listen(
    path: str | os.PathLike[str], mode: int, kind: int = socket.SOCK_STREAM, *, backlog: int = _BACKLOG
) -> socket.socket:
    """Return a listening socket at the path with these permissions: nonblocking, not inherited by children.

    A socket left there by a process that is gone is removed; one that still answers, or anything that is not
    a socket, raises OSError (EADDRINUSE) and stays. Two starters of one path need a lock of their own.
    """
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with address_of(path) as address:
            # bind(2) creates the file with the mode of the socket's own inode, so it is never wider than
            # asked.
            os.fchmod(sock.fileno(), mode)
            try:
                sock.bind(address)
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE or not _is_stale(path, address, kind):
                    raise OSError(exc.errno, os.strerror(exc.errno or 0), os.fspath(path)) from exc
                os.unlink(address)
                sock.bind(address)
            os.chmod(address, mode)  # what the umask took away
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_stale(path: str | os.PathLike[str], address: str, kind: int) -> bool:
    if not stat.S_ISSOCK(os.lstat(address).st_mode):
        return False
    try:
        sock = try_connect(path, kind)
    except DaemonUnreachable as exc:
        return isinstance(exc.__cause__, ConnectionRefusedError)
    if sock is not None:
        sock.close()
    return False


def _reason(exc: OSError) -> str:
    match exc.errno:
        case errno.ENOENT:
            return "there is no such socket"
        case errno.ECONNREFUSED:
            return "nobody listens on it"
        case errno.EACCES | errno.EPERM:
            return "you may not use it"
        case _:
            return os.strerror(exc.errno) if exc.errno else str(exc)
