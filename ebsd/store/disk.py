"""The disk as an argument: every file-system call of the store and of the engine goes through ``Disk``.

1. A method is one system call. It may be short or fail; what repeats and completes are the helpers below, so that
   a fake that answers short, fails at the n-th call or forgets unsynced data meets the same loops as a real disk.
2. Offsets and lengths are bytes. Errors are ``OSError`` with the errno of the call.
3. Descriptors are opened close-on-exec and never through a symbolic link in the last component.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TypeAlias

from ebsd.domain.errors import StoreDamaged

UNREADABLE: Final = frozenset((errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.EILSEQ))
"""What a disk or file system answers to a read when it has lost what was stored."""

StrPath: TypeAlias = str | os.PathLike[str]

_FALLOC_FL_KEEP_SIZE: Final = 0x01
_FALLOC_FL_PUNCH_HOLE: Final = 0x02
_CACHESTAT: Final = ctypes.c_long(451)
"""cachestat(2), Linux 6.5, which glibc 2.36 has no name for; the number is that of x86-64 and arm64."""


class _CacheRange(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = (("pages", ctypes.c_uint64), ("rest", ctypes.c_uint64 * 4))


class Disk(Protocol):
    """What the store asks of an operating system."""

    def open(self, path: StrPath, flags: int, mode: int = 0o600, dir_fd: int | None = None) -> int: ...

    def close(self, fd: int) -> None: ...

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """Return up to ``length`` bytes; empty only at the end of the file."""
        ...

    def pread_into(self, fd: int, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill the front of ``buffer``; return the count, 0 only at the end of the file."""
        ...

    def is_cached(self, fd: int, offset: int, length: int) -> bool:
        """Say whether all of the range is in the page cache, and have nothing read; False where nobody can say."""
        ...

    def make_direct(self, fd: int) -> bool:
        """Have a descriptor go past the page cache (O_DIRECT); False, and nothing changed, where that is not possible.

        Buffers, lengths and offsets are multiples of a page then.
        """
        ...

    def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        """Write the front of ``data``; return the count."""
        ...

    def fdatasync(self, fd: int) -> None: ...

    def drop_cache(self, fd: int) -> None:
        """Have reads of a file come from the disk again, as far as nobody waits to write it (POSIX_FADV_DONTNEED).

        After a failed sync the kernel calls pages clean that are on no disk, and shows them while it keeps them.
        """
        ...

    def fsync(self, fd: int) -> None:
        """Make a file with all its attributes durable, or the names in a directory."""
        ...

    def ftruncate(self, fd: int, length: int) -> None: ...

    def fallocate(self, fd: int, offset: int, length: int) -> None:
        """Give the range blocks (pages on tmpfs), so that no later store in it can lack space."""
        ...

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Take the blocks of the range away; it reads as zeros and the length stays."""
        ...

    def lseek(self, fd: int, offset: int, whence: int) -> int: ...

    def fstat(self, fd: int) -> os.stat_result: ...

    def statvfs(self, place: StrPath | int) -> os.statvfs_result:
        """Say how much space the file system of a path or descriptor has."""
        ...

    def fchmod(self, fd: int, mode: int) -> None: ...

    def flock(self, fd: int, operation: int) -> None: ...

    def mmap(self, fd: int, length: int) -> mmap.mmap:
        """Map the file shared, for reading and writing."""
        ...

    def rename(self, source: StrPath, target: StrPath) -> None: ...

    def unlink(self, path: StrPath) -> None: ...

    def mkdir(self, path: StrPath, mode: int) -> None: ...

    def rmdir(self, path: StrPath) -> None: ...

    def listdir(self, path: StrPath) -> list[str]: ...


class RealDisk:
    """The operating system itself."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        # Python has posix_fallocate only; punching needs fallocate(2) with its mode.
        self._fallocate = libc.fallocate64 if hasattr(libc, "fallocate64") else libc.fallocate
        self._fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        self._fallocate.restype = ctypes.c_int
        self._syscall = libc.syscall
        self._syscall.restype = ctypes.c_long

    def open(self, path: StrPath, flags: int, mode: int = 0o600, dir_fd: int | None = None) -> int:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return os.pread(fd, length, offset)

    def pread_into(self, fd: int, buffer: bytearray | memoryview, offset: int) -> int:
        return os.preadv(fd, (buffer,), offset)

    def is_cached(self, fd: int, offset: int, length: int) -> bool:
        # Not by reading with RWF_NOWAIT: what is missing is read ahead into the cache then.
        wanted, found = _CacheRange(offset, length), _CacheStat()
        if self._syscall(_CACHESTAT, fd, ctypes.byref(wanted), ctypes.byref(found), 0) != 0:
            return False  # a kernel before 6.5, or a file system without
        return int(found.pages) * mmap.PAGESIZE >= length

    def make_direct(self, fd: int) -> bool:
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError as exc:
            if exc.errno == errno.EINVAL:
                return False
            raise
        return True

    def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def drop_cache(self, fd: int) -> None:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def ftruncate(self, fd: int, length: int) -> None:
        os.ftruncate(fd, length)

    def fallocate(self, fd: int, offset: int, length: int) -> None:
        os.posix_fallocate(fd, offset, length)

    def punch(self, fd: int, offset: int, length: int) -> None:
        mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        while self._fallocate(fd, mode, offset, length) != 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        return os.lseek(fd, offset, whence)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def statvfs(self, place: StrPath | int) -> os.statvfs_result:
        return os.statvfs(place)

    def fchmod(self, fd: int, mode: int) -> None:
        os.fchmod(fd, mode)

    def flock(self, fd: int, operation: int) -> None:
        fcntl.flock(fd, operation)

    def mmap(self, fd: int, length: int) -> mmap.mmap:
        return mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    def rename(self, source: StrPath, target: StrPath) -> None:
        os.rename(source, target)

    def unlink(self, path: StrPath) -> None:
        os.unlink(path)

    def mkdir(self, path: StrPath, mode: int) -> None:
        os.mkdir(path, mode)

    def rmdir(self, path: StrPath) -> None:
        os.rmdir(path)

    def listdir(self, path: StrPath) -> list[str]:
        return os.listdir(path)


def pwrite_all(disk: Disk, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of ``data`` (bytes, or a view of format B) at ``offset``; loops over short counts and EINTR.

    Raises the OSError of the first call that fails; what was written before it stays written.
    """
    length = len(data)
    done = 0
    view: bytes | bytearray | memoryview = data
    while done < length:
        try:
            count = disk.pwrite(fd, view, offset + done)
        except InterruptedError:
            continue
        if count <= 0:
            raise OSError(errno.EIO, "pwrite wrote nothing and gave no error")
        done += count
        if done < length:
            view = memoryview(data)[done:]


def pread_into_all(disk: Disk, fd: int, buffer: bytearray | memoryview, offset: int, file: str) -> None:
    """Fill ``buffer`` from ``offset``; loops over short counts and EINTR.

    The end of the file inside the range is StoreDamaged with ``file`` as its name: the files of the store have
    their full length from the start, so an end is damage and never zeros.
    """
    length = len(buffer)
    done = 0
    view: bytearray | memoryview = buffer
    while done < length:
        try:
            count = disk.pread_into(fd, view, offset + done)
        except InterruptedError:
            continue
        if count <= 0:
            raise StoreDamaged(file=file, reason=f"it ends before byte {offset + length}")
        done += count
        if done < length:
            view = memoryview(buffer)[done:]


def pread_all(disk: Disk, fd: int, length: int, offset: int, file: str) -> bytearray:
    """Return exactly ``length`` bytes from ``offset``; errors as ``pread_into_all``."""
    buffer = bytearray(length)
    pread_into_all(disk, fd, buffer, offset, file)
    return buffer


def read_file(disk: Disk, path: StrPath, limit: int) -> bytearray:
    """Return a whole small regular file.

    Raises FileNotFoundError when it is missing and StoreDamaged when it is no regular file or longer than
    ``limit`` bytes.
    """
    fd, status = open_regular(disk, path, os.O_RDONLY)
    try:
        if status.st_size > limit:
            raise StoreDamaged(file=os.fspath(path), reason=f"it is longer than {limit} bytes")
        return pread_all(disk, fd, status.st_size, 0, os.fspath(path))
    finally:
        disk.close(fd)


def open_regular(disk: Disk, path: StrPath, flags: int, dir_fd: int | None = None) -> tuple[int, os.stat_result]:
    """Open a file of the store without waiting for anybody (a FIFO); return its descriptor and status.

    Raises StoreDamaged for what is no regular file, FileNotFoundError, OSError.
    """
    try:
        fd = disk.open(path, flags | os.O_NONBLOCK, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise StoreDamaged(file=os.fspath(path), reason="it is not a regular file") from error
        raise
    try:
        status = disk.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StoreDamaged(file=os.fspath(path), reason="it is not a regular file")
    except BaseException:
        disk.close(fd)
        raise
    return fd, status


def open_present(disk: Disk, path: StrPath, flags: int, dir_fd: int | None = None) -> tuple[int, os.stat_result]:
    """As ``open_regular``; a file that is missing is StoreDamaged, too: something says that it is there."""
    try:
        return open_regular(disk, path, flags, dir_fd)
    except FileNotFoundError as error:
        raise StoreDamaged(file=os.fspath(path), reason="it is missing") from error


def fsync_directory(disk: Disk, path: StrPath) -> None:
    """Make the names in a directory durable."""
    with opened(disk, path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        disk.fsync(fd)


@contextmanager
def opened(disk: Disk, path: StrPath, flags: int, mode: int = 0o600, dir_fd: int | None = None) -> Iterator[int]:
    """Open a descriptor for the length of a block."""
    fd = disk.open(path, flags, mode, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        disk.close(fd)
