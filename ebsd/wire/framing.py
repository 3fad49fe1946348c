"""Varlink frames: JSON objects, each ended by a NUL byte, cut out of a byte stream. No input or output of its
own.

1. Whatever a peer sends ends as a message or as ProtocolError, never as another exception.
2. How the bytes were split on their way changes nothing: messages before a bad frame are still delivered.
3. JSON is read strictly, because two programs must not read one message differently: valid UTF-8, no
   duplicate members (RFC 8259 section 4 leaves them undefined), no NaN or Infinity, no lone surrogates.
"""

from __future__ import annotations

import json
from typing import Any, Final

from ebsd.domain.errors import ProtocolError

MAX_FRAME: Final = 1024 * 1024
"""Bytes of one frame, without its NUL."""

MAX_DEPTH: Final = 64
"""Nested arrays and objects; the interface files need five."""


def encode(message: dict[str, Any], *, limit: int = MAX_FRAME) -> bytes:
    """Return the message as one frame, with its NUL.

    Raises ProtocolError when it is longer than ``limit`` bytes, and when a text in it is not valid Unicode (a
    path that came from ``os.fsdecode``, for instance): the receiver could not read it.
    """
    return encode_object(message, limit=limit) + b"\0"


def encode_object(message: dict[str, Any], *, limit: int) -> bytes:
    """Return the message as UTF-8 JSON of at most ``limit`` bytes, or raise ProtocolError."""
    try:
        data = json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as exc:
        raise ProtocolError(reason="a text of the message is not valid Unicode") from exc
    if len(data) > limit:
        raise ProtocolError(reason=f"the message has {len(data)} bytes, at most {limit} are possible")
    return data


def decode_object(data: bytes | bytearray) -> dict[str, Any]:
    """Return the one JSON object that the bytes hold, or raise ProtocolError."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ProtocolError(reason="the message is not valid UTF-8") from exc
    try:
        message = _DECODER.decode(text)
    except ProtocolError:
        raise
    except RecursionError as exc:
        raise ProtocolError(reason=_TOO_DEEP) from exc
    except ValueError as exc:
        raise ProtocolError(reason="the message is not JSON") from exc
    if not isinstance(message, dict):
        raise ProtocolError(reason="the message is not a JSON object")
    # The walk is slower than the parser, so it is made only where there can be something to find.
    texts = "\\u" in text
    if texts or text.count("[") + text.count("{") > MAX_DEPTH:
        _inspect(message, texts)
    return message


class FrameReader:
    """Collects bytes and gives back messages; after ProtocolError the stream cannot be used any more."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._searched = 0
        self._failure: ProtocolError | None = None

    @property
    def partial(self) -> bool:
        """Whether the beginning of a frame is here and its end is not."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Take bytes and return the messages that they complete, oldest first.

        Raises ProtocolError for a bad frame. When good messages stand before it, they are returned first, and
        the next ``feed`` or ``check`` raises.
        """
        self.check()
        self._buffer += data
        messages: list[dict[str, Any]] = []
        try:
            while (end := self._buffer.find(0, self._searched)) >= 0:
                if end > self._limit:
                    raise ProtocolError(reason=self._too_long())
                frame = self._buffer[:end]
                del self._buffer[: end + 1]
                self._searched = 0
                messages.append(decode_object(frame))
            self._searched = len(self._buffer)
            if self._searched > self._limit:
                raise ProtocolError(reason=self._too_long())
        except ProtocolError as exc:
            self._failure = exc
            self._buffer.clear()
            if not messages:
                raise
        return messages

    def check(self) -> None:
        """Raise the ProtocolError that stands behind the messages already returned, if there is one."""
        if self._failure is not None:
            raise self._failure

    def _too_long(self) -> str:
        return f"a message is longer than {self._limit} bytes"


_TOO_DEEP = f"the message is nested more than {MAX_DEPTH} deep"


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ProtocolError(reason="a JSON object has the same member twice")
    return members


def _refuse_constant(name: str) -> Any:
    raise ProtocolError(reason=f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):  # 1e999
        raise ProtocolError(reason="a number is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_members, parse_constant=_refuse_constant, parse_float=_finite)


def _inspect(message: dict[str, Any], texts: bool) -> None:
    """Raise ProtocolError when the message is nested too deep or holds a lone surrogate (``"\\ud800"``).

    The latter is looked for only if ``texts``.
    """
    level: list[dict[str, Any] | list[Any]] = [message]
    for _ in range(MAX_DEPTH):
        below: list[dict[str, Any] | list[Any]] = []
        for container in level:
            values = container.values() if isinstance(container, dict) else container
            below += [value for value in values if isinstance(value, dict | list)]
            if texts:
                for text in (*container, *values):
                    if isinstance(text, str):
                        _refuse_surrogates(text)
        if not below:
            return
        level = below
    raise ProtocolError(reason=_TOO_DEEP)


def _refuse_surrogates(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise ProtocolError(reason="a text of the message is not valid Unicode") from exc
