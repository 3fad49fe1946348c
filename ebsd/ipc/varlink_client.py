"""Varlink client for trio: one connection, one call at a time.

A connection on which anything went wrong (deadline, cancellation, broken frame) is closed, for the next reply
on it could be that of the call before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import trio

from ebsd.domain.errors import DaemonUnreachable, EbsdError, ProtocolError, RemoteError, Timeout
from ebsd.ipc.sockets import close_all, connect, recv_with_fds, send_with_fds
from ebsd.wire import messages
from ebsd.wire.framing import FrameReader, encode
from ebsd.wire.messages import CallMessage, ReplyMessage

_CHUNK = 65536


class Result(NamedTuple):
    """A reply: its parameters, and its descriptors, which are the caller's to close."""

    parameters: dict[str, Any]
    fds: list[int]


class VarlinkClient:
    """A connection to a daemon's socket; make it with ``connect``."""

    def __init__(self, sock: trio.socket.SocketType, name: str) -> None:
        """Take over a connected socket; ``name`` stands for it in errors."""
        self._sock = sock
        self._name = name
        self._lock = trio.Lock()
        self._reader = FrameReader()
        self._closed = False

    @classmethod
    async def connect(cls, path: str | os.PathLike[str], *, deadline: float = 5.0) -> Self:
        """Connect to a socket; raise DaemonUnreachable, at the latest after ``deadline`` seconds."""
        return cls(await connect(path, deadline=deadline), os.fspath(path))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether the connection cannot be used any more."""
        return self._closed

    def close(self) -> None:
        """Close the connection; a second time does nothing."""
        self._closed = True
        self._sock.close()

    async def aclose(self) -> None:
        """Close the connection, as trio's resources are closed."""
        self.close()
        await trio.lowlevel.checkpoint()

    async def call(
        self,
        method: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        deadline: float = 30.0,
    ) -> Result:
        """Call a method by its full name and return its reply. The descriptors sent stay the caller's.

        Raises RemoteError for an error reply; Timeout when ``deadline`` seconds pass, the wait for other
        calls on this connection included; DaemonUnreachable when the connection is or gets closed;
        ProtocolError for a reply that is none. After a RemoteError the connection goes on, after the others
        it is closed.
        """
        asked = CallMessage(method, dict(parameters or {}))
        frame = encode(asked.as_message())
        with trio.move_on_after(deadline):
            async with self._lock:
                return await self._exchange(frame, fds)
        raise Timeout(operation=method, seconds=f"{deadline:g}")

    async def _exchange(self, frame: bytes, fds: Sequence[int]) -> Result:
        if self._closed:
            raise self._unreachable("the connection is closed")
        received: list[int] = []
        try:
            # Even if it hung up, it may have said why: too many connections, or not for this user.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                await send_with_fds(self._sock, frame, fds)
            reply = await self._reply(received)
        except RemoteError:
            close_all(received)
            raise
        except OSError as exc:
            self._give_up(received)
            raise self._unreachable(os.strerror(exc.errno) if exc.errno else str(exc)) from exc
        except BaseException:
            self._give_up(received)
            raise
        return Result(reply.parameters, received)

    async def _reply(self, received: list[int]) -> ReplyMessage:
        while True:
            data, fds = await recv_with_fds(self._sock, _CHUNK)
            received += fds
            if not data:
                raise self._unreachable("it closed the connection")
            replies = self._reader.feed(data)
            self._reader.check()
            if replies:
                break
        if len(replies) > 1 or self._reader.partial:
            raise ProtocolError(reason="more than one reply came to one call")
        reply = messages.parse_reply(replies[0])
        if reply.continues:
            raise ProtocolError(reason="several replies came where one was asked for")
        return reply

    def _give_up(self, received: list[int]) -> None:
        close_all(received)
        self.close()

    def _unreachable(self, reason: str) -> EbsdError:
        return DaemonUnreachable(socket=self._name, reason=reason)
