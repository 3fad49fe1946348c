"""ebsd.sock: bound by ebsd itself, or bound by the service manager, which keeps it while ebsd is started again."""

from __future__ import annotations

import socket
from pathlib import Path

import trio

from ebsd.ipc import sockets


class UsersSocket:
    """The socket that users connect to, opened once for each time that ebsd serves it."""

    def __init__(self, path: Path, given: socket.socket | None = None) -> None:
        self.path = path
        self._given = given
        """The service manager's: who connects between two of ours waits there, and its file is not ours to remove."""

    def open(self) -> trio.socket.SocketType:
        """Return a listener, which is the caller's to close. Raises OSError."""
        if self._given is not None:
            return trio.socket.from_stdlib_socket(self._given.dup())
        return sockets.listen(self.path, 0o666)

    def close(self) -> None:
        """Remove the file that ``open`` made."""
        if self._given is None:
            self.path.unlink(missing_ok=True)
