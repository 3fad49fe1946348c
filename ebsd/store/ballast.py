"""The ballast: a file of real blocks that is given up piece by piece when a deletion finds the disk full.

1. It holds nothing and may vanish at any time. What it guards is the way out of a full disk: the catalog's log and
   the file system's own metadata need blocks before a deletion gives any back.
2. It is built only out of space above a floor, so that it never makes a disk short.
3. A shrunk file gives its blocks back for use when the file system has committed that: hence the fsync.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from ebsd.domain.units import MIB
from ebsd.store.disk import Disk, RealDisk, StrPath, opened

T = TypeVar("T")

STEPS: Final = 8
"""Parts in which a ballast is given up."""

LEAST_STEP: Final = MIB // 4

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class Ballast:
    """The ballast file of one STATE directory. Every method blocks and may be called from any thread."""

    def __init__(self, disk: Disk, path: Path, wanted: int, floor: int) -> None:
        """``wanted``: bytes of the whole ballast; ``floor``: free bytes that building it leaves."""
        self._disk = disk
        self._path = path
        self._wanted = wanted
        self._floor = floor
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes that it holds now; 0 when there is none."""
        try:
            with opened(self._disk, self._path, os.O_RDONLY | os.O_NONBLOCK) as fd:
                return self._disk.fstat(fd).st_blocks * 512
        except OSError:
            return 0

    def release(self) -> bool:
        """Give a part back to the file system; False when nothing is left to give."""
        with self._lock:
            try:
                with opened(self._disk, self._path, os.O_RDWR | os.O_NONBLOCK) as fd:
                    length = self._disk.fstat(fd).st_size
                    if length == 0:
                        return False
                    self._disk.ftruncate(fd, max(0, length - max(self._wanted // STEPS, LEAST_STEP)))
                    self._disk.fsync(fd)
                    return True
            except OSError:
                return False

    def build(self) -> int:
        """Make it as long as it shall be, or as there is room for; returns the bytes added. Raises no OSError."""
        with self._lock:
            try:
                with opened(self._disk, self._path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK) as fd:
                    return self._lengthen(fd)
            except OSError:
                return 0

    def _lengthen(self, fd: int) -> int:
        length = self._disk.fstat(fd).st_size
        if length > self._wanted:
            self._disk.ftruncate(fd, self._wanted)
        usage = self._disk.statvfs(fd)
        room = usage.f_bavail * usage.f_frsize - self._floor
        step = max(self._wanted // STEPS, LEAST_STEP)
        target = length + min(self._wanted - length, room // step * step)
        if target <= length:
            return 0
        try:
            self._disk.fallocate(fd, length, target - length)
            self._disk.fsync(fd)
        except OSError:
            # Without blocks a length is no ballast.
            with contextlib.suppress(OSError):
                self._disk.ftruncate(fd, length)
            raise
        return target - length

    def relieved(self, function: Callable[[], T]) -> T:
        """Call a function that may be repeated; while it finds the disk full, give a part up and call it again."""
        while True:
            try:
                return function()
            except OSError as error:
                if error.errno not in _FULL or not self.release():
                    raise


class BallastedDisk(RealDisk):
    """The operating system, whose deletions draw on the ballast when the file system has no room for them."""

    def __init__(self) -> None:
        super().__init__()
        self.ballast: Ballast | None = None
        """Set once, by who composes the daemon: the ballast itself needs a disk."""

    def _relieved(self, function: Callable[[], T]) -> T:
        return function() if self.ballast is None else self.ballast.relieved(function)

    def unlink(self, path: StrPath) -> None:
        unlink = super().unlink
        self._relieved(lambda: unlink(path))

    def rmdir(self, path: StrPath) -> None:
        rmdir = super().rmdir
        self._relieved(lambda: rmdir(path))

    def punch(self, fd: int, offset: int, length: int) -> None:
        punch = super().punch
        self._relieved(lambda: punch(fd, offset, length))
