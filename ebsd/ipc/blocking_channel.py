"""A channel for processes without an event loop: helpers that answer one request and end.

It does not import trio, which would double the time that a helper takes to start.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from ebsd.domain.errors import Timeout
from ebsd.ipc.incidents import OnIncident, as_ebsd_error, log_incident
from ebsd.ipc.packets import (
    MAX_PACKET,
    SEND_BUFFER,
    ChannelClosed,
    Packet,
    find_handler,
    make_request,
    number_of,
    parse_answer,
    parse_request,
    to_packet,
)
from ebsd.wire import descriptors
from ebsd.wire.descriptors import close_all
from ebsd.wire.framing import encode_object
from ebsd.wire.messages import error_members

BlockingHandler = Callable[[dict[str, Any], list[int]], tuple[dict[str, Any], Sequence[int]]]
"""Takes parameters and descriptors (its own from then on), gives result and descriptors (then closed)."""


class BlockingChannel:
    """One end of a SEQPACKET socket for a process without an event loop; takes the socket over."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
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
        return to_packet(data, fds)

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

    def serve_one(self, handlers: Mapping[str, BlockingHandler], *, on_incident: OnIncident = log_incident) -> bool:
        """Answer one request as ``channel.serve`` does; False when the other end is gone instead."""
        packet = self.receive()
        if packet is None:
            return False
        number = number_of(packet)
        result_fds: Sequence[int] = ()
        try:
            method, params = parse_request(packet)
            result, result_fds = find_handler(handlers, method, packet)(params, packet.fds)
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
