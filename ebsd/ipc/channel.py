"""Channels between our own processes, for trio; the protocol is in ``ipc/packets.py``."""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import trio

from ebsd.domain.errors import RemoteError, Timeout
from ebsd.ipc import sockets
from ebsd.ipc.blocking_channel import BlockingChannel
from ebsd.ipc.incidents import OnIncident, as_ebsd_error, log_incident
from ebsd.ipc.packets import (
    MAX_PACKET,
    SEND_BUFFER,
    VERSION,
    ChannelClosed,
    Packet,
    find_handler,
    make_request,
    number_of,
    parse_answer,
    parse_request,
    to_packet,
)
from ebsd.wire.descriptors import close_all
from ebsd.wire.framing import encode_object
from ebsd.wire.messages import error_members

__all__ = [
    "MAX_PACKET",
    "VERSION",
    "BlockingChannel",
    "Channel",
    "ChannelClosed",
    "ChannelHandler",
    "Packet",
    "serve",
]

ChannelHandler = Callable[[dict[str, Any], list[int]], Awaitable[tuple[dict[str, Any], Sequence[int]]]]
"""Takes parameters and descriptors (its own from then on), gives result and descriptors (then closed)."""


class Channel:
    """One end of a SEQPACKET socket for trio; takes the socket over."""

    def __init__(self, sock: socket.socket | trio.socket.SocketType) -> None:
        if isinstance(sock, socket.socket):
            sock = trio.socket.from_stdlib_socket(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._sock = sock
        self._sending = trio.Lock()
        self._requesting = trio.Lock()
        self._number = 0
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Close this end; a second time does nothing."""
        self._closed = True
        self._sock.close()

    async def aclose(self) -> None:
        """Close this end, as trio's resources are closed."""
        self.close()
        await trio.lowlevel.checkpoint()

    async def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send one packet, whole or not at all. The descriptors stay the caller's.

        Raises ProtocolError when it is too large, ChannelClosed when the other end is gone.
        """
        data = encode_object(message, limit=MAX_PACKET)
        async with self._sending:
            self._refuse_closed()
            try:
                await sockets.send_with_fds(self._sock, data, fds)
            except (BrokenPipeError, ConnectionResetError) as exc:
                raise ChannelClosed(reason="the other end is gone") from exc
            except trio.ClosedResourceError as exc:
                raise ChannelClosed(reason="the channel was closed") from exc

    async def receive(self) -> Packet | None:
        """Return the next packet, or None when the other end is gone.

        Raises ProtocolError for a packet that is not a JSON object or too large (its descriptors are closed),
        and ChannelClosed when this end was closed. Cancelling it loses nothing.
        """
        self._refuse_closed()
        try:
            data, fds = await sockets.recv_with_fds(self._sock, MAX_PACKET)
        except ConnectionResetError:
            return None
        except trio.ClosedResourceError as exc:
            raise ChannelClosed(reason="the channel was closed") from exc
        return to_packet(data, fds)

    async def request(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        fds: Sequence[int] = (),
        *,
        deadline: float | None,
    ) -> Packet:
        """Ask the other end and return the result and its descriptors. The descriptors sent stay the
        caller's.

        Raises the error that it answers as RemoteError; Timeout after ``deadline`` seconds (None: never),
        which do not count the wait for other requests; ChannelClosed when the other end is gone;
        ProtocolError. After all but a RemoteError, and after a cancellation, the channel is closed: its next
        packet could be a late answer.
        """
        async with self._requesting:
            self._refuse_closed()
            self._number += 1
            number = self._number
            message = make_request(number, method, params or {})
            encode_object(message, limit=MAX_PACKET)  # a request that cannot be sent does no harm
            try:
                with trio.move_on_after(math.inf if deadline is None else deadline):
                    await self.send(message, fds)
                    packet = await self.receive()
                    if packet is None:
                        raise ChannelClosed(reason="the other end is gone")
                    return parse_answer(packet, number)
                raise Timeout(operation=method, seconds=f"{deadline:g}")
            except RemoteError:
                raise
            except BaseException:
                self.close()
                raise

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ChannelClosed(reason="the channel was closed")


async def serve(
    channel: Channel, handlers: Mapping[str, ChannelHandler], *, on_incident: OnIncident = log_incident
) -> None:
    """Answer requests, one after the other, until the other end is gone.

    EbsdError from a handler is answered as it is, anything else as InternalFailure and reported. Raises
    ProtocolError when the other end sends what is no request.
    """
    while (packet := await channel.receive()) is not None:
        number = number_of(packet)
        result_fds: Sequence[int] = ()
        try:
            method, params = parse_request(packet)
            handler = find_handler(handlers, method, packet)
            result, result_fds = await handler(params, packet.fds)
            answer: dict[str, Any] = {"id": number, "result": result}
            encode_object(answer, limit=MAX_PACKET)
        except Exception as exc:  # noqa: BLE001 - reported as an incident; the other requests go on
            close_all(result_fds)
            result_fds = ()
            answer = {"id": number, "error": error_members(as_ebsd_error(exc, on_incident))}
        try:
            await channel.send(answer, result_fds)
        except ChannelClosed:
            return
        finally:
            close_all(result_fds)
