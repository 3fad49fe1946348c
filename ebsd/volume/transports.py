"""What a block file is to the kernel, whatever serves it: the two transports behind one interface.

``native`` (native_transport.py) reads requests in threads of its own, outside the interpreter; ``pyfuse3``
(transport.py) is the portable one. A process imports the one that it uses.
"""

from __future__ import annotations

import errno
import logging
import secrets
import traceback
from collections.abc import Callable
from typing import Final, Protocol

from ebsd.domain.errors import EbsdError

log = logging.getLogger(__name__)

ATTRIBUTE_SECONDS: Final = 300.0
"""How long the kernel may keep attributes; nothing but a resize, which invalidates them, changes any."""

MAX_TASKS: Final = 64
"""Requests in work at once in Python. The kernel queues more by itself (max_background)."""


class BlockDevice(Protocol):
    """What a transport needs of an engine; offsets and lengths in bytes."""

    size: int
    read_only: bool

    async def read(self, offset: int, length: int) -> bytes | bytearray | memoryview: ...
    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> int: ...
    async def write_zeroes(self, offset: int, length: int) -> None: ...
    async def flush(self) -> None: ...
    async def find(self, offset: int, *, data: bool) -> int: ...


class Connection(Protocol):
    """A block file that is served over a FUSE connection."""

    async def serve(self) -> None:
        """Answer requests until the file is unmounted or its connection aborted."""
        ...

    def forget_attributes(self) -> None:
        """Tell the kernel that the file's attributes changed. Waits for the kernel, so not on the event loop."""
        ...

    def close(self) -> None:
        """Let go of the connection; the mount itself is the business of whoever made it."""
        ...


class Transport(Protocol):
    """How a connection is made."""

    def __call__(
        self,
        device: BlockDevice,
        fuse_fd: int,
        *,
        uid: int,
        gid: int,
        hot: int | None = None,
        keep_init: Callable[[bytes], None] = lambda values: None,
        resume: bytes | None = None,
        on_zeroed: Callable[[int], None] = lambda length: None,
    ) -> Connection:
        """Bind a connection that somebody else mounted; the descriptor is the connection's from then on.

        ``hot``: address of the engine's ``ebsd_hot`` (native/hot.h). ``keep_init`` is given the 64 bytes of the
        kernel's FUSE_INIT before it is answered; a process that takes over gives them as ``resume``, and then the
        kernel sends again what was not answered. ``on_zeroed`` is told how many bytes a discard freed. pyfuse3 knows
        none of these. Raises OSError.
        """
        ...


def load(name: str) -> Transport:
    """Return the transport of this name, ``native`` or ``pyfuse3``, and import what it needs."""
    if name == "native":
        from ebsd.volume.native_transport import NativeConnection

        return NativeConnection
    if name == "pyfuse3":
        from ebsd.volume.transport import Pyfuse3Connection

        return Pyfuse3Connection
    raise ValueError(f"there is no transport {name!r}")


def error_number(error: Exception) -> int:
    """Return the errno to answer a request with that ended in this error; what is no error of ours is logged."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if isinstance(error, EbsdError):
        log.error("a request is answered with EIO: %s", error.message)  # names files and chunks, never contents
        return errno.EIO
    incident = secrets.token_hex(4)
    # Frames only: the values of local variables would be sectors in clear.
    log.error("incident %s: %s\n%s", incident, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return errno.EIO
