"""Contents that cross in descriptors: reading and writing what a client passed.

A descriptor of a client is read in a thread, with a deadline and at most two at a time per user: a pipe that is never
written, or a file of a hanging FUSE server, stops nobody else. The thread owns the descriptor.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from typing import Final, TypeVar

import trio

from ebsd.domain.errors import InvalidParameterValue, Timeout

DEADLINE: Final = 10.0
"""Seconds to read one descriptor of a client."""
WRITE_DEADLINE: Final = 120.0
_PER_USER: Final = 2

T = TypeVar("T")


class Descriptors:
    """Reads and writes descriptors of clients."""

    def __init__(self, *, deadline: float = DEADLINE) -> None:
        self._deadline = deadline
        self._limiters: dict[int, trio.CapacityLimiter] = {}
        self._closers: dict[int, trio.CapacityLimiter] = {}

    async def read(self, fd: int, limit: int, uid: int, parameter: str) -> bytearray:
        """Return the content of a regular file, memfd or pipe: 1 to ``limit`` bytes, the caller's to wipe.

        Takes the descriptor over. A file is read from its start. Raises InvalidParameterValue and Timeout.
        """
        return await self._in_thread(
            lambda: _read(fd, limit, parameter), fd, uid, self._deadline, f"Reading {parameter}"
        )

    async def write(self, fd: int, content: bytes, uid: int, parameter: str) -> None:
        """Write everything to a descriptor and sync it. Takes it over. Raises InvalidParameterValue and Timeout."""
        await self._in_thread(lambda: _write(fd, content, parameter), fd, uid, WRITE_DEADLINE, f"Writing {parameter}")

    async def _in_thread(self, work: Callable[[], T], fd: int, uid: int, deadline: float, operation: str) -> T:
        limiter = self._limiters.setdefault(uid, trio.CapacityLimiter(_PER_USER))
        # Whoever takes this first closes the descriptor: the thread, or we when it never came to run.
        ownership = threading.Lock()

        def run() -> T:
            if not ownership.acquire(blocking=False):
                raise Timeout(operation=operation, seconds=f"{deadline:g}")  # nobody waits for it any more
            try:
                return work()
            finally:
                os.close(fd)

        try:
            with trio.move_on_after(deadline):
                return await trio.to_thread.run_sync(run, limiter=limiter, abandon_on_cancel=True)
            raise Timeout(operation=operation, seconds=f"{deadline:g}")
        finally:
            if ownership.acquire(blocking=False):
                closers = self._closers.setdefault(uid, trio.CapacityLimiter(_PER_USER))
                with trio.CancelScope(shield=True):  # in a thread: its sender decides how long it takes
                    await trio.to_thread.run_sync(os.close, fd, limiter=closers)


def _invalid(parameter: str, reason: str) -> InvalidParameterValue:
    return InvalidParameterValue(value="a descriptor", parameter=parameter, reason=reason)


def _read(fd: int, limit: int, parameter: str) -> bytearray:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise _invalid(parameter, "it must be a regular file, a memfd or a pipe")
    content = bytearray(min(limit, os.fstat(fd).st_size) + 1 if stat.S_ISREG(mode) else limit + 1)
    length = 0
    try:
        while length < len(content):
            with memoryview(content)[length:] as rest:
                got = os.preadv(fd, [rest], length) if stat.S_ISREG(mode) else os.readv(fd, [rest])
            if not got:
                break
            length += got
    except OSError as exc:
        content[:] = bytes(len(content))
        raise _invalid(parameter, f"it cannot be read ({exc.strerror})") from exc
    if not 1 <= length <= limit:
        content[:] = bytes(len(content))
        raise _invalid(parameter, f"it must have 1 to {limit} bytes")
    del content[length:]
    return content


def _write(fd: int, content: bytes, parameter: str) -> None:
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(fd, rest) :]
        try:
            os.fsync(fd)
        except OSError as exc:
            if exc.errno not in (errno.EINVAL, errno.EROFS, errno.ENOTSUP):  # a pipe has nothing to sync
                raise
    except OSError as exc:
        raise _invalid(parameter, f"it cannot be written ({exc.strerror})") from exc
