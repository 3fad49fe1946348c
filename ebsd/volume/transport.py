"""The portable transport: a block engine served as one FUSE file by pyfuse3.

1. The FUSE root inode is the file itself, so the mount point is a regular file and there is no directory to list.
2. Every handler answers or raises FUSEError: pyfuse3 ends its main loop, and the volume with it, on anything else.
3. ``fsync`` is implemented: the default answers ENOSYS, after which the kernel never asks again and every later
   flush "succeeds" without reaching us (fs/fuse/file.c, no_fsync).
4. The kernel's write-back cache stays off: with it sync(2) does not wait for FUSE data.
5. Files are opened for direct I/O, so that no second cache of plaintext exists in the FUSE inode.
"""

from __future__ import annotations

import errno
import os
import stat
import types
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Final, TypeVar

import pyfuse3

from ebsd.volume import turns
from ebsd.volume.transports import ATTRIBUTE_SECONDS, MAX_TASKS, BlockDevice, error_number

F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, Any]])

ROOT: Final = pyfuse3.ROOT_INODE
ORDINARY: Final = 1
SYNCHRONOUS: Final = 2
"""File handles: of an open with O_SYNC or O_DSYNC, each write is durable before it is answered."""


def _answers_always(handler: F) -> F:
    @wraps(handler)
    @types.coroutine
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return (yield from turns.drive(handler(*args, **kwargs)))
        except pyfuse3.FUSEError:
            raise
        except Exception as exc:
            raise pyfuse3.FUSEError(error_number(exc)) from exc

    return guarded  # type: ignore[return-value]


class BlockFile(pyfuse3.Operations):
    """The FUSE operations of one block file; see the rules above."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, device: BlockDevice, *, uid: int, gid: int) -> None:
        super().__init__()
        self._device = device
        self._uid = uid
        self._gid = gid

    def _attributes(self) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = ROOT
        entry.st_mode = stat.S_IFREG | (0o400 if self._device.read_only else 0o600)
        entry.st_nlink = 1
        entry.st_uid = self._uid
        entry.st_gid = self._gid
        entry.st_size = self._device.size
        entry.st_blksize = 65536
        entry.st_blocks = self._device.size // 512
        entry.attr_timeout = ATTRIBUTE_SECONDS
        entry.entry_timeout = ATTRIBUTE_SECONDS
        return entry

    @_answers_always
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext | None = None) -> pyfuse3.EntryAttributes:
        return self._attributes()

    @_answers_always
    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> pyfuse3.EntryAttributes:
        # A block device has no size, owner or mode to set; times are nobody's business but touch(1) may try.
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        if fields.update_size and attr.st_size != self._device.size:
            raise pyfuse3.FUSEError(errno.EPERM)
        return self._attributes()

    @_answers_always
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if self._device.read_only and flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        if flags & os.O_TRUNC:
            # The kernel takes the file for empty after this, and a loop device on it then reads nothing.
            raise pyfuse3.FUSEError(errno.EPERM)
        # For direct I/O the kernel leaves O_SYNC and O_DSYNC to us: no FSYNC follows such a write.
        handle = SYNCHRONOUS if flags & os.O_DSYNC else ORDINARY
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), direct_io=True, keep_cache=False)

    @_answers_always
    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self._device.read(off, size)  # type: ignore[return-value]  # any buffer does

    @_answers_always
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        written = await self._device.write(off, buf)
        if fh == SYNCHRONOUS:
            await self._device.flush()
        return written

    @_answers_always
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._device.flush()

    @_answers_always
    async def flush(self, fh: int) -> None:
        """Nothing at close(2): POSIX promises no durability there, and the device is not going away."""

    @_answers_always
    async def release(self, fh: int) -> None:
        """Handles have no state."""

    @_answers_always
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = 65536  # sets the discard granularity of a loop device on this file to the chunk
        data.f_frsize = 65536
        data.f_blocks = self._device.size // 65536
        data.f_bfree = data.f_bavail = 0
        data.f_files = 1
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data


class Pyfuse3Connection:
    """A block file on a FUSE connection, one per process; see ``transports.Connection`` and ``transports.Transport``.

    libfuse takes the mount point ``/dev/fd/N`` as "already mounted, here is the descriptor".
    """

    def __init__(
        self,
        device: BlockDevice,
        fuse_fd: int,
        *,
        uid: int,
        gid: int,
        hot: int | None = None,
        keep_init: Callable[[bytes], None] = lambda values: None,
        resume: bytes | None = None,
        on_zeroed: Callable[[int], None] = lambda length: None,
    ) -> None:
        if resume is not None:
            raise OSError(errno.EOPNOTSUPP, "pyfuse3 cannot take a connection over")
        os.set_inheritable(fuse_fd, True)  # libfuse checks the descriptor flags of what it is given
        options = set(pyfuse3.default_options)
        options.add("fsname=ebsd")
        pyfuse3.init(BlockFile(device, uid=uid, gid=gid), f"/dev/fd/{fuse_fd}", options)
        turns.install(fuse_fd)

    async def serve(self) -> None:
        """Answer requests until the file is unmounted or its connection aborted."""
        await pyfuse3.main(min_tasks=4, max_tasks=MAX_TASKS)

    def forget_attributes(self) -> None:
        """Tell the kernel that the file's attributes changed. Waits for the kernel, so not on the event loop."""
        pyfuse3.invalidate_inode(pyfuse3.InodeT(ROOT), attr_only=True)

    def close(self) -> None:
        """Let go of the connection; the mount itself is the business of whoever made it."""
        pyfuse3.close(unmount=False)
