"""The client end of the NBD protocol, for images of other formats that a program of the client's serves on a socket.

1. The other end is whatever the client chose: every number it sends is checked before it is used, and while it sends
   nothing ``stopping`` is looked at.
2. One request at a time, under a lock; the other thread encrypts or decrypts meanwhile.

The protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Final

from ebsd.domain.errors import HostFailure, ImageChanged, ImageUnusable
from ebsd.domain.units import CHUNK, GIB, MIB
from ebsd.volume import image_target
from ebsd.volume.copier import STEP
from ebsd.volume.image_source import POLL_MILLISECONDS, ImageSource, Span

_GREETING: Final = struct.Struct(">8s8sH")
_OPTION: Final = struct.Struct(">8sII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_REQUEST: Final = struct.Struct(">IHHQQI")
_SIMPLE: Final = struct.Struct(">IQ")
_CHUNK: Final = struct.Struct(">HHQI")
_EXPORT: Final = struct.Struct(">QH")

_MAGIC: Final = b"NBDMAGIC"
_HAVE_OPTION: Final = b"IHAVEOPT"
_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
_REQUEST_MAGIC: Final = 0x25609513
_SIMPLE_MAGIC: Final = 0x67446698
_CHUNK_MAGIC: Final = 0x668E33EF

_FIXED_NEWSTYLE: Final = 1
_GO, _STRUCTURED_REPLY, _SET_META_CONTEXT = 7, 8, 10
_ACK, _INFO, _META_CONTEXT = 1, 3, 4
_READ, _WRITE, _DISCONNECT, _FLUSH, _BLOCK_STATUS = 0, 1, 2, 3, 7
_DONE: Final = 1
_NONE, _OFFSET_DATA, _OFFSET_HOLE, _STATUS = 0, 1, 2, 5
_READ_ONLY: Final = 2
_ZERO: Final = 2
_ALLOCATION: Final = b"base:allocation"
_MAX_ANSWER: Final = 4 * MIB
_STATUS_STEP: Final = GIB


class Gone(OSError):
    """The other end has hung up or talks nonsense."""


class NbdClient:
    """A connection, negotiated for one export; blocks. Raises OSError: Gone, or what the server answered."""

    def __init__(self, fd: int, stopping: threading.Event) -> None:
        """Take a copy of the descriptor, and negotiate."""
        self._sock = socket.socket(fileno=os.dup(fd))
        self._sock.setblocking(False)
        self._stopping = stopping
        self._lock = threading.Lock()
        self._cookie = 0
        self._structured = False
        self._context: int | None = None
        self.size = 0
        self.read_only = False
        try:
            self._negotiate()
        except BaseException:
            self._sock.close()
            raise

    def close(self) -> None:
        with self._lock:
            with contextlib.suppress(OSError):  # it is gone already
                self._request(_DISCONNECT, 0, 0)
            self._sock.close()

    # --- bytes

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._sock, event)
        while not poll.poll(POLL_MILLISECONDS):
            if self._stopping.is_set():
                raise Gone(errno.ECANCELED, "it was stopped")

    def _receive_into(self, buffer: memoryview) -> None:
        while len(buffer):
            try:
                count = self._sock.recv_into(buffer)
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            if not count:
                raise Gone(errno.ECONNRESET, "the program that serves the image has ended")
            buffer = buffer[count:]

    def _receive(self, length: int) -> bytes:
        if length > _MAX_ANSWER:
            raise Gone(errno.EPROTO, "the program that serves the image talks nonsense")
        buffer = bytearray(length)
        self._receive_into(memoryview(buffer))
        return bytes(buffer)

    def _send(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            try:
                view = view[self._sock.send(view, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)

    # --- negotiation

    def _negotiate(self) -> None:
        magic, have_option, flags = _GREETING.unpack(self._receive(_GREETING.size))
        if magic != _MAGIC or have_option != _HAVE_OPTION or not flags & _FIXED_NEWSTYLE:
            raise _nonsense()
        self._send(struct.pack(">I", _FIXED_NEWSTYLE | flags & 2))
        self._structured = self._option(_STRUCTURED_REPLY, b"")
        if self._structured:
            query = struct.pack(">III", 0, 1, len(_ALLOCATION)) + _ALLOCATION
            self._option(_SET_META_CONTEXT, query)
        if not self._option(_GO, struct.pack(">IH", 0, 0)):
            raise _nonsense()

    def _option(self, option: int, data: bytes) -> bool:
        """Ask for an option and say whether it was granted; takes what the answer tells."""
        self._send(_OPTION.pack(_HAVE_OPTION, option, len(data)) + data)
        for _ in range(64):
            magic, answered, kind, length = _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))
            body = self._receive(length)
            if magic != _OPTION_REPLY_MAGIC or answered != option:
                raise _nonsense()
            if kind == _ACK:
                return True
            if kind & 1 << 31:
                return False
            if kind == _META_CONTEXT and body[4:] == _ALLOCATION:
                self._context = int.from_bytes(body[:4], "big")
            if kind == _INFO and body[:2] == b"\0\0" and len(body) >= 2 + _EXPORT.size:
                self.size, export_flags = _EXPORT.unpack_from(body, 2)
                self.read_only = bool(export_flags & _READ_ONLY)
        raise _nonsense()

    # --- requests

    def _request(self, kind: int, offset: int, length: int, flags: int = 0) -> None:
        self._cookie += 1
        self._send(_REQUEST.pack(_REQUEST_MAGIC, flags, kind, self._cookie, offset, length))

    def _answer(self, take: Callable[[int, int], None]) -> None:
        """Receive an answer to the last request; ``take`` (kind, length) receives the body of a chunk with data."""
        failure: OSError | None = None
        while True:
            magic = int.from_bytes(self._receive(4), "big")
            if magic == _SIMPLE_MAGIC:
                error, cookie = _SIMPLE.unpack(self._receive(_SIMPLE.size))
                if cookie != self._cookie:
                    raise _nonsense()
                if error:
                    raise _failed(error)
                take(-1, 0)
                return
            if magic != _CHUNK_MAGIC:
                raise _nonsense()
            flags, kind, cookie, length = _CHUNK.unpack(self._receive(_CHUNK.size))
            if cookie != self._cookie:
                raise _nonsense()
            if kind & 1 << 15:
                body = self._receive(length)
                number = int.from_bytes(body[:4], "big")
                failure = _failed(number)
            elif kind == _NONE:
                self._receive(length)
            else:
                take(kind, length)
            if flags & _DONE:
                if failure is not None:
                    raise failure
                return

    def _drop(self, kind: int, length: int) -> None:
        self._receive(length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        got = 0

        def take(kind: int, length: int) -> None:
            nonlocal got
            if kind == -1:  # a simple reply: all of it follows
                self._receive_into(buffer)
                got = len(buffer)
                return
            start = int.from_bytes(self._receive(8), "big") - offset
            count = length - 8 if kind == _OFFSET_DATA else int.from_bytes(self._receive(4), "big")
            if kind not in (_OFFSET_DATA, _OFFSET_HOLE) or not 0 <= start <= start + count <= len(buffer):
                raise _nonsense()
            if kind == _OFFSET_DATA:
                self._receive_into(buffer[start : start + count])
            else:
                buffer[start : start + count] = bytes(count)
            got += count

        with self._lock:
            self._request(_READ, offset, len(buffer))
            self._answer(take)
        if got != len(buffer):
            raise _nonsense()

    def write(self, offset: int, data: memoryview) -> None:
        with self._lock:
            self._request(_WRITE, offset, len(data))
            self._send(data)
            self._answer(self._drop)

    def flush(self) -> None:
        with self._lock:
            self._request(_FLUSH, 0, 0)
            self._answer(self._drop)

    def status(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Return (length, whether it reads as zeros) of the extents from an offset on, at least one."""
        if self._context is None:
            return [(length, False)]
        found: list[tuple[int, bool]] = []

        def take(kind: int, size: int) -> None:
            body = self._receive(size)
            if kind != _STATUS or size < 12 or (size - 4) % 8 or int.from_bytes(body[:4], "big") != self._context:
                raise _nonsense()
            found.extend((extent, bool(flags & _ZERO)) for extent, flags in struct.iter_unpack(">II", body[4:]))

        with self._lock:
            self._request(_BLOCK_STATUS, offset, length)
            self._answer(take)
        if not found or any(not extent for extent, _ in found):
            raise _nonsense()
        return found


def _failed(number: int) -> OSError:
    # The numbers of the protocol are Linux's.
    return OSError(number, f"the program that serves the image failed ({errno.errorcode.get(number, number)})")


def _nonsense() -> Gone:
    return Gone(errno.EPROTO, "the program that serves the image talks nonsense")


class NbdSource(ImageSource):
    """An image of another format: its blocks over NBD, its identity from its file."""

    resumable = True

    def __init__(
        self, client: NbdClient, identity: dict[str, Any], size: int, look_again: Callable[[], object]
    ) -> None:
        if client.size != size:
            raise ImageChanged(reason=f"it holds {client.size} bytes now, and held {size}")
        self._client = client
        self._size = size
        self._at = 0
        self._data_until = 0
        self._look_again = look_again
        self.identity = identity
        self.total = size

    def go_on_at(self, offset: int) -> None:
        self._at = offset

    def claim(self, buffer: memoryview) -> Span | None:
        try:
            while self._at < self._size:
                start = self._at
                hole = self._hole_at(start) if start >= self._data_until else 0
                if hole:
                    self._at += hole
                    continue
                data = self._data_until + -self._data_until % CHUNK
                self._at = min(start - start % STEP + STEP, self._size, max(data, start + CHUNK))
                self._client.read_into(start, buffer[: self._at - start])
                return Span(start, self._at - start)
        except OSError as exc:
            raise HostFailure(where="at the image that is imported", reason=exc.strerror or str(exc)) from exc
        return None

    def _hole_at(self, start: int) -> int:
        """Return how many bytes from a chunk's start on are whole chunks of zeros, as far as one answer tells."""
        length = 0
        for extent, zero in self._client.status(start, min(_STATUS_STEP, self._size - start)):
            if not zero:
                self._data_until = start + length + extent
                break
            length += extent
        length = min(length, self._size - start)
        return length if start + length == self._size else length - length % CHUNK

    def fill(self, span: Span, buffer: memoryview) -> None:
        """``claim`` has read it."""

    def check_end(self) -> None:
        if self._look_again() != self.identity:
            raise ImageChanged(reason="somebody wrote to it")
        self._client.close()


class NbdTarget(image_target.ImageTarget):
    """A new image of another format, in which everything reads as zeros that was not written."""

    threads = 2

    def __init__(self, client: NbdClient, size: int) -> None:
        if client.read_only or client.size < size:
            raise ImageUnusable(reason=f"what is served takes {client.size} bytes, and {size} are needed", remedy="")
        self._client = client

    def write(self, offset: int, data: memoryview) -> None:
        try:
            self._client.write(offset, data)
        except OSError as exc:
            raise image_target.failure(exc) from exc

    def zero(self, offset: int, length: int) -> None:
        """Nothing is written."""

    def sync(self) -> None:
        try:
            self._client.flush()
        except OSError as exc:
            raise image_target.failure(exc) from exc
        self._client.close()
