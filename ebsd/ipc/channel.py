"""Channels between our own processes: packets of one JSON object and up to 253 descriptors, over
SOCK_SEQPACKET.

Version 1. A request is ``{"v": 1, "id": n, "method": m, "params": {...}}``; its answer ``{"id": n, "result":
{...}}`` or ``{"id": n, "error": {"Code", "Message", "Hint"}}``. Requests on one channel follow one another.

Both ends are ours, so the limits guard against bugs; still nothing that arrives leaves descriptors open
unnoticed. ``Channel`` is for trio, ``BlockingChannel`` for short-lived helpers that have no event loop.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

import trio

from ebsd.domain.errors import EbsdError, NotSupported, ProtocolError, RemoteError, Timeout
from ebsd.ipc import sockets
from ebsd.ipc.incidents import OnIncident, as_ebsd_error, log_incident
from ebsd.wire import descriptors
from ebsd.wire.descriptors import close_all
from ebsd.wire.framing import decode_object, encode_object
from ebsd.wire.messages import error_from_members, error_members

VERSION: Final = 1

MAX_PACKET: Final = 192 * 1024
"""Bytes of one packet. A packet must fit the send buffer as a whole, and Linux's default limit is 208 KiB."""

_SEND_BUFFER: Final = 256 * 1024


class ChannelClosed(ProtocolError):
    """The other end is gone, or the channel was given up after a deadline."""


class Packet(NamedTuple):
    """What arrived: a JSON object, and descriptors, which are the receiver's to close."""

    message: dict[str, Any]
    fds: list[int]


ChannelHandler = Callable[[dict[str, Any], list[int]], Awaitable[tuple[dict[str, Any], Sequence[int]]]]
"""Takes parameters and descriptors (its own from then on), gives result and descriptors (then closed)."""

BlockingHandler = Callable[[dict[str, Any], list[int]], tuple[dict[str, Any], Sequence[int]]]
"""As ChannelHandler."""

Perform = Callable[[str, dict[str, Any]], tuple[dict[str, Any], Sequence[int]]]
"""Takes method and parameters of any request; for helpers that are sent no descriptors."""


class Channel:
    """One end of a SEQPACKET socket for trio; takes the socket over."""

    def __init__(self, sock: socket.socket | trio.socket.SocketType) -> None:
        if isinstance(sock, socket.socket):
            sock = trio.socket.from_stdlib_socket(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
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
        return _packet(data, fds)

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
        number = _number_of(packet)
        result_fds: Sequence[int] = ()
        try:
            method, params = parse_request(packet)
            handler = _find(handlers, method, packet)
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


class BlockingChannel:
    """One end of a SEQPACKET socket for a process without an event loop; takes the socket over."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._sock = sock
        self._number = 0

    @classmethod
    def of_descriptor(cls, fd: int = 0) -> Self:
        """Take over the socket that the parent put at this descriptor."""
        return cls(socket.socket(fileno=fd))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """As ``Channel.send``."""
        try:
            descriptors.send_with_fds(self._sock, encode_object(message, limit=MAX_PACKET), fds)
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise ChannelClosed(reason="the other end is gone") from exc

    def receive(self) -> Packet | None:
        """As ``Channel.receive``."""
        try:
            data, fds = descriptors.recv_with_fds(self._sock, MAX_PACKET)
        except ConnectionResetError:
            return None
        return _packet(data, fds)

    def request(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        fds: Sequence[int] = (),
        *,
        deadline: float | None = None,
    ) -> Packet:
        """As ``Channel.request``; ``deadline`` is for each of sending and receiving."""
        self._number += 1
        self._sock.settimeout(deadline)
        try:
            self.send(make_request(self._number, method, params or {}), fds)
            packet = self.receive()
        except TimeoutError as exc:
            self.close()
            raise Timeout(operation=method, seconds=f"{deadline:g}") from exc
        if packet is None:
            raise ChannelClosed(reason="the other end is gone")
        return parse_answer(packet, self._number)

    def serve_one(
        self,
        handlers: Mapping[str, BlockingHandler] | Perform,
        *,
        on_incident: OnIncident = log_incident,
    ) -> bool:
        """Answer one request as ``serve`` does; False when the other end is gone instead.

        One function may stand for all handlers; descriptors that came are then closed before it is called.
        """
        packet = self.receive()
        if packet is None:
            return False
        number = _number_of(packet)
        result_fds: Sequence[int] = ()
        try:
            method, params = parse_request(packet)
            if callable(handlers):
                close_all(packet.fds)
                result, result_fds = handlers(method, params)
            else:
                result, result_fds = _find(handlers, method, packet)(params, packet.fds)
            answer: dict[str, Any] = {"id": number, "result": result}
            encode_object(answer, limit=MAX_PACKET)
        except Exception as exc:  # noqa: BLE001 - reported as an incident; the other requests go on
            close_all(result_fds)
            result_fds = ()
            answer = {"id": number, "error": error_members(as_ebsd_error(exc, on_incident))}
        try:
            self.send(answer, result_fds)
        except ChannelClosed:
            return False
        finally:
            close_all(result_fds)
        return True


def make_request(number: int, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    return {"v": VERSION, "id": number, "method": method, "params": dict(params)}


def parse_request(packet: Packet) -> tuple[str, dict[str, Any]]:
    """Return method and parameters; raise NotSupported or ProtocolError, with the descriptors closed."""
    message = packet.message
    error: EbsdError
    if message.get("v") != VERSION:
        error = NotSupported(
            what=f"version {message.get('v')!r} of the channel between ebsd's processes",
            remedy="Processes of two versions of ebsd run side by side; restart the older one.",
        )
    else:
        method, params = message.get("method"), message.get("params")
        if set(message) == _REQUEST and isinstance(method, str) and isinstance(params, dict):
            return method, params
        error = ProtocolError(reason="a request has not the members v, id, method and params")
    close_all(packet.fds)
    raise error


def parse_answer(packet: Packet, number: int) -> Packet:
    """Return the result and its descriptors; raise the answered error (RemoteError), or ProtocolError."""
    message = packet.message
    try:
        if message.get("id") != number:
            raise ProtocolError(reason="an answer came to another request")
        if set(message) == {"id", "error"}:
            raise error_from_members(message["error"])
        result = message.get("result")
        if set(message) != {"id", "result"} or not isinstance(result, dict):
            raise ProtocolError(reason="an answer has neither a result nor an error")
    except EbsdError:
        close_all(packet.fds)
        raise
    return Packet(result, packet.fds)


_Handler = TypeVar("_Handler")

_REQUEST: Final = {"v", "id", "method", "params"}


def _packet(data: bytes, fds: list[int]) -> Packet | None:
    if not data:
        close_all(fds)
        return None
    try:
        return Packet(decode_object(data), fds)
    except ProtocolError:
        close_all(fds)
        raise


def _number_of(packet: Packet) -> int:
    """Return the id that the answer must bear; without one there is nobody to answer to."""
    number = packet.message.get("id")
    if not isinstance(number, int) or isinstance(number, bool):
        close_all(packet.fds)
        raise ProtocolError(reason="a request has no id")
    return number


def _find(handlers: Mapping[str, _Handler], method: str, packet: Packet) -> _Handler:
    try:
        return handlers[method]
    except KeyError:
        close_all(packet.fds)
        raise NotSupported(what=f"the request {method}", remedy="") from None
