"""Where an export goes: a regular file, a block device or a stream that a client opened.

1. What it is is looked at here, in a process that can be killed: it may hang, and it may be anything.
2. What is left out of a new file reads as zeros. On a device and in a stream, zeros are written.
3. ``end`` returns when all of it is durable, where there is such a thing.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import threading
from abc import ABC, abstractmethod
from typing import Final

from ebsd.domain.errors import HostFailure, ImageUnusable, NoSpace, OutputClosed
from ebsd.domain.units import MIB
from ebsd.store.disk import Disk
from ebsd.volume.image_source import POLL_MILLISECONDS

WHERE: Final = "at the place of the export"

_ZEROS: Final = bytes(MIB)
_ZERO_STEP: Final = 1024 * MIB
_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
_GONE: Final = (errno.EPIPE, errno.ECONNRESET)
_NO_PUNCH: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV)


def failure(exc: OSError) -> NoSpace | OutputClosed | HostFailure:
    """Return the error for what the client's file answered."""
    if exc.errno in _SPACE or exc.errno == errno.EFBIG:
        error = NoSpace(where="at the place of the export")
        error.hint = "Nothing was changed in ebsd. Export to another file system, or free space there."
        return error
    if exc.errno in _GONE:
        return OutputClosed()
    return HostFailure(where=WHERE, reason=exc.strerror or str(exc))


class ImageTarget(ABC):
    """An image that is written. Offsets and lengths in bytes. Raises what ``failure`` makes."""

    threads: int
    """How many threads may write at a time; 1: from the beginning to the end."""

    @abstractmethod
    def write(self, offset: int, data: memoryview) -> None: ...

    @abstractmethod
    def zero(self, offset: int, length: int) -> None:
        """Make a range zeros."""

    @abstractmethod
    def sync(self) -> None:
        """Make what was written durable."""


def target_of(disk: Disk, fd: int, size: int, *, sparse: bool, stopping: threading.Event) -> ImageTarget:
    """Return the target behind a descriptor, ready to take ``size`` bytes. Raises ImageUnusable and ``failure``."""
    try:
        status = os.fstat(fd)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFREG:
            if status.st_size:
                raise ImageUnusable(reason="the file is not empty", remedy="Name a new file.")
            os.ftruncate(fd, size)
            return FileTarget(disk, fd, sparse=sparse)
        if kind == stat.S_IFBLK:
            length = os.lseek(fd, 0, os.SEEK_END)
            if length < size:
                reason = f"the device has {length} bytes, and {size} are needed"
                raise ImageUnusable(reason=reason, remedy="Name a device that is large enough.")
            return DeviceTarget(disk, fd, sparse=False)
    except OSError as exc:
        raise failure(exc) from exc
    if kind in (stat.S_IFIFO, stat.S_IFSOCK):
        return StreamTarget(fd, stopping)
    raise ImageUnusable(
        reason="it is neither a file nor a block device nor a pipe",
        remedy="Name a new file or a block device, or send it into a pipe: -",
    )


class FileTarget(ImageTarget):
    """A new regular file, as long as the image."""

    def __init__(self, disk: Disk, fd: int, *, sparse: bool) -> None:
        self._disk = disk
        self._fd = fd
        self._sparse = sparse
        self.threads = 2

    def write(self, offset: int, data: memoryview) -> None:
        try:
            while len(data):
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count
        except OSError as exc:
            raise failure(exc) from exc

    def zero(self, offset: int, length: int) -> None:
        if not self._sparse:
            self._write_zeros(offset, length)

    def _write_zeros(self, offset: int, length: int) -> None:
        end = offset + length
        for at in range(offset, end, len(_ZEROS)):
            self.write(at, memoryview(_ZEROS)[: end - at])

    def sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as exc:
            raise failure(exc) from exc


class DeviceTarget(FileTarget):
    """A block device at least as long as the image; what lies behind the image stays."""

    _punches = True

    def zero(self, offset: int, length: int) -> None:
        end = offset + length
        for at in range(offset, end, _ZERO_STEP):
            piece = min(_ZERO_STEP, end - at)
            if self._punches:
                try:
                    # Of a block device the kernel promises zeros, or refuses (fallocate(2), BLKDEV_ZERO_NOFALLBACK).
                    self._disk.punch(self._fd, at, piece)
                    continue
                except OSError as exc:
                    if exc.errno not in _NO_PUNCH:
                        raise failure(exc) from exc
                    self._punches = False
            self._write_zeros(at, piece)


class StreamTarget(ImageTarget):
    """A pipe or stream socket, written from the beginning to the end."""

    threads = 1

    def __init__(self, fd: int, stopping: threading.Event) -> None:
        self._fd = fd
        self._stopping = stopping

    def write(self, offset: int, data: memoryview) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while len(data) and not self._stopping.is_set():
            if not poll.poll(POLL_MILLISECONDS):
                continue
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                continue
            except OSError as exc:
                raise failure(exc) from exc

    def zero(self, offset: int, length: int) -> None:
        left = length
        while left and not self._stopping.is_set():
            piece = min(left, len(_ZEROS))
            self.write(0, memoryview(_ZEROS)[:piece])
            left -= piece

    def sync(self) -> None:
        """A stream has nothing to be made durable."""
