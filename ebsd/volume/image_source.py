"""What an import reads: a regular file, a block device or a stream, of a client and so not to be trusted.

1. A descriptor of a client may be anything, and may change at any time: what it is is looked at here, in a process that
   can be killed, and what it gives is data and nothing else. Reads are positioned: the offset is shared with him.
2. A file that is shorter than it was fails the import, and so does one that was written to meanwhile: what was read
   is no state that it ever had.
3. Holes that the kernel tells of are left out. What it tells is only believed as far as it makes sense.
4. A stream has as many bytes as were announced: whoever writes it may have died before its end, which nothing else
   tells. While nothing comes, ``stopping`` is looked at.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Final

from ebsd.domain.errors import EbsdError, HostFailure, ImageChanged, ImageUnusable
from ebsd.domain.units import CHUNK
from ebsd.volume.copier import STEP

POLL_MILLISECONDS: Final = 500

MAX_COUNTED: Final = 1 << 16
"""Extents that are counted before an import begins; of a file with more, the rest counts as data."""

FILE: Final = "file"
DEVICE: Final = "device"
STREAM: Final = "stream"

_NO_HOLES: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ESPIPE)
_UNREADABLE: Final = "at the image that is imported"

_KINDS: Final = {
    stat.S_IFDIR: "it is a directory",
    stat.S_IFCHR: "it is a character device",
    stat.S_IFLNK: "it is a symbolic link",
}


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of the image that hold data; ``start`` is a multiple of the chunk."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class ImageSource(ABC):
    """An image, read from its beginning to its end. ``claim`` is for one thread at a time, ``fill`` for any."""

    total: int
    """Bytes that are about to be read, as far as that is known."""
    resumable: bool
    identity: dict[str, Any]
    """What tells this image from another one, as JSON values; of a stream nothing does."""

    @abstractmethod
    def claim(self, buffer: memoryview) -> Span | None:
        """Return the next bytes, at most STEP, none across a multiple of it; None at the end."""

    @abstractmethod
    def fill(self, span: Span, buffer: memoryview) -> None:
        """Read a span into the beginning of the buffer, unless ``claim`` did."""

    @abstractmethod
    def check_end(self) -> None:
        """Raise ImageChanged or ImageUnusable unless it was read to its end, and is still what it was."""

    def go_on_at(self, offset: int) -> None:
        """Leave out what lies before ``offset``, a multiple of the chunk."""
        raise ImageUnusable(reason="a stream cannot be read again", remedy="Import it anew.")


def look_at(fd: int) -> dict[str, Any]:
    """Return what is behind a descriptor: its "Kind" (file, device, stream), and what tells it from another image.

    Blocks for as long as the owner of the file likes. Raises ImageUnusable, HostFailure.
    """
    try:
        status = os.fstat(fd)
        mode = fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError as exc:
        raise HostFailure(where=_UNREADABLE, reason=exc.strerror or str(exc)) from exc
    kind = stat.S_IFMT(status.st_mode)
    if kind in _KINDS:
        raise ImageUnusable(reason=_KINDS[kind], remedy="Give a regular file, a block device, or - for a stream.")
    if mode & os.O_ACCMODE == os.O_WRONLY or mode & os.O_PATH:
        raise ImageUnusable(reason="it is not open for reading", remedy="")
    if kind in (stat.S_IFIFO, stat.S_IFSOCK):
        return {"Kind": STREAM}
    if kind == stat.S_IFBLK:
        return {"Kind": DEVICE, "Size": _seek_end(fd), "Number": status.st_rdev}
    return {
        "Kind": FILE,
        "Size": status.st_size,
        "Device": status.st_dev,
        "Inode": status.st_ino,
        "Modified": status.st_mtime_ns,
    }


def _seek_end(fd: int) -> int:
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError as exc:
        raise HostFailure(where=_UNREADABLE, reason=exc.strerror or str(exc)) from exc


def image_of(fd: int, size: int, stopping: threading.Event) -> ImageSource:
    """Return the image behind a descriptor, which has ``size`` bytes. Raises what ``look_at`` does, ImageChanged."""
    found = look_at(fd)
    return StreamSource(fd, size, stopping) if found["Kind"] == STREAM else FileSource(fd, found, size)


class FileSource(ImageSource):
    """A regular file or block device."""

    resumable = True

    def __init__(self, fd: int, found: dict[str, Any], size: int) -> None:
        """``found`` is what ``look_at`` says; raises ImageChanged when it does not have ``size`` bytes."""
        self._fd = fd
        self._size = size
        self._is_device = found["Kind"] == DEVICE
        self._holes = True
        self._at = 0
        self._extent = Span(0, 0)
        if found["Size"] != size:
            raise ImageChanged(reason=f"it has {found['Size']} bytes now, and had {size}")
        self.identity = found
        self.total = self._count()

    def _seek(self, offset: int, whence: int) -> int:
        try:
            return os.lseek(self._fd, offset, whence)
        except OSError as exc:
            if exc.errno == errno.ENXIO and whence == os.SEEK_DATA:
                return self._size
            if exc.errno in (*_NO_HOLES, errno.ENXIO) and whence in (os.SEEK_DATA, os.SEEK_HOLE):
                self._holes = False
                return offset if whence == os.SEEK_DATA else self._size
            raise HostFailure(where=_UNREADABLE, reason=exc.strerror or str(exc)) from exc

    def _next_extent(self, at: int) -> Span | None:
        """Return the next data at or after a byte, in whole chunks; the last one may be cut by the end."""
        if at >= self._size:
            return None
        start, end = at, self._size
        if self._holes and not self._is_device:
            start = self._seek(at, os.SEEK_DATA)
            if start >= self._size:
                return None
            end = self._seek(start, os.SEEK_HOLE)
        if not at <= start < end:  # nonsense: all that follows is data
            self._holes, start, end = False, at, self._size
        start = max(start - start % CHUNK, at)
        end = min(end + -end % CHUNK, self._size)
        return Span(start, end - start)

    def _count(self) -> int:
        total, at = 0, 0
        for _ in range(MAX_COUNTED):
            extent = self._next_extent(at)
            if extent is None:
                return total
            total += extent.length
            at = extent.end
        return total + self._size - at

    def go_on_at(self, offset: int) -> None:
        self._at = offset
        self._extent = Span(offset, 0)

    def claim(self, buffer: memoryview) -> Span | None:
        if self._at >= self._extent.end:
            found = self._next_extent(self._at)
            if found is None:
                return None
            self._extent, self._at = found, found.start
        end = min(self._extent.end, self._at - self._at % STEP + STEP)
        span = Span(self._at, end - self._at)
        self._at = end
        return span

    def fill(self, span: Span, buffer: memoryview) -> None:
        at = 0
        while at < span.length:
            try:
                count = os.preadv(self._fd, [buffer[at : span.length]], span.start + at)
            except OSError as exc:
                raise HostFailure(where=_UNREADABLE, reason=exc.strerror or str(exc)) from exc
            if count == 0:
                raise ImageChanged(reason=f"it ends at byte {span.start + at}, and had {self._size}")
            at += count
        if not self._is_device:
            _forget(self._fd, span)

    def check_end(self) -> None:
        found = look_at(self._fd)
        if found.get("Size") != self._size:
            raise ImageChanged(reason=f"it had {self._size} bytes, and has {found.get('Size')}")
        if found != self.identity:
            raise ImageChanged(reason="somebody wrote to it")


def _forget(fd: int, span: Span) -> None:
    """Tell the kernel not to keep these bytes cached: an import must not evict what others use."""
    try:
        os.posix_fadvise(fd, span.start, span.length, os.POSIX_FADV_DONTNEED)
    except OSError:
        return  # only advice


class StreamSource(ImageSource):
    """A pipe or stream socket, read until its end."""

    resumable = False

    def __init__(self, fd: int, size: int, stopping: threading.Event) -> None:
        self._fd = fd
        self._size = size
        self._stopping = stopping
        self._at = 0
        self._ended = False
        self.identity = {"Kind": STREAM}
        self.total = size

    def claim(self, buffer: memoryview) -> Span | None:
        start = self._at
        while not self._ended and self._at - start < STEP:
            # Behind the announced end one byte is one too many.
            room = min(STEP - (self._at - start), max(self._size - self._at, 1))
            count = self._read(buffer[self._at - start :][:room])
            if count is None:
                return None
            self._at += count
            self._ended = not count
            if self._at > self._size:
                raise _wrong_length(f"has more than the announced {self._size} bytes")
        return Span(start, self._at - start) if self._at > start else None

    def _read(self, buffer: memoryview) -> int | None:
        """Read some bytes when there are any; 0 at the end, None when stopped."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        while True:
            if self._stopping.is_set():
                return None
            if not poll.poll(POLL_MILLISECONDS):
                continue
            try:
                return os.readv(self._fd, [buffer])
            except BlockingIOError:
                continue  # somebody else read it
            except OSError as exc:
                raise HostFailure(where=_UNREADABLE, reason=exc.strerror or str(exc)) from exc

    def fill(self, span: Span, buffer: memoryview) -> None:
        """``claim`` has read it."""

    def check_end(self) -> None:
        if self._at != self._size:
            raise _wrong_length(f"ended after {self._at} of {self._size} bytes")


def _wrong_length(reason: str) -> EbsdError:
    return ImageUnusable(
        reason=f"the stream {reason}", remedy="--size is the exact size of a stream. Nothing was kept of it."
    )
