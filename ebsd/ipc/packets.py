"""The protocol of the channels between our own processes, without input or output.

Version 1, over SOCK_SEQPACKET: a packet is one JSON object of at most 192 KiB and up to 253 descriptors. A request is
``{"v": 1, "id": n, "method": m, "params": {...}}``; its answer ``{"id": n, "result": {...}}`` or
``{"id": n, "error": {"Code", "Message", "Hint"}}``. Requests on one channel follow one another.

Both ends are ours, so the limits guard against bugs; still nothing that arrives leaves descriptors open unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeVar

from ebsd.domain.errors import EbsdError, NotSupported, ProtocolError
from ebsd.wire.descriptors import close_all
from ebsd.wire.framing import decode_object
from ebsd.wire.messages import error_from_members

VERSION: Final = 1

MAX_PACKET: Final = 192 * 1024
"""Bytes of one packet. A packet must fit the send buffer as a whole, and Linux's default limit is 208 KiB."""

SEND_BUFFER: Final = 256 * 1024
"""What SO_SNDBUF is asked for; the kernel takes what it allows."""

_Handler = TypeVar("_Handler")

_REQUEST: Final = {"v", "id", "method", "params"}


class ChannelClosed(ProtocolError):
    """The other end is gone, or the channel was given up after a deadline."""


class Packet(NamedTuple):
    """What arrived: a JSON object, and descriptors, which are the receiver's to close."""

    message: dict[str, Any]
    fds: list[int]


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


def to_packet(data: bytes, fds: list[int]) -> Packet | None:
    """Return what was received as a packet, None at the end; raise ProtocolError, with the descriptors closed."""
    if not data:
        close_all(fds)
        return None
    try:
        return Packet(decode_object(data), fds)
    except ProtocolError:
        close_all(fds)
        raise


def number_of(packet: Packet) -> int:
    """Return the id that the answer must bear; without one there is nobody to answer to."""
    number = packet.message.get("id")
    if not isinstance(number, int) or isinstance(number, bool):
        close_all(packet.fds)
        raise ProtocolError(reason="a request has no id")
    return number


def find_handler(handlers: Mapping[str, _Handler], method: str, packet: Packet) -> _Handler:
    """Return the handler of a request; raise NotSupported, with the descriptors closed."""
    try:
        return handlers[method]
    except KeyError:
        close_all(packet.fds)
        raise NotSupported(what=f"the request {method}", remedy="") from None
