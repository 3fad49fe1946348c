"""A file system in memory with a page cache: what was not synced may be lost, kept or torn by a power cut.

1. A block is what a disk writes whole. A power cut leaves for every block that was not synced any of its versions
   since the last sync, each block for itself.
2. Names are made durable by an fsync of their directory; a power cut keeps a front part of what was not.
3. After a sync that fails, the lost blocks stay in the cache, count as clean, and are old after a power cut.
4. Below ``/live`` lies the tmpfs: shared memory, gone with a power cut.
"""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, ClassVar

LAYER_BLOCK = 2048
SMALL_BLOCK = 512
LIVE = "/live"


class SharedMemory(bytearray):
    """What a mapped tmpfs file is to the code that maps it."""

    def close(self) -> None:
        """Nothing: the memory is the file's."""


class File:
    __slots__ = (
        "blocks",
        "durable_size",
        "failures",
        "ino",
        "links",
        "locked_by",
        "lost",
        "memory",
        "mode",
        "size",
        "unit",
        "versions",
    )

    def __init__(self, ino: int, unit: int) -> None:
        self.ino = ino
        self.unit = unit
        self.blocks: dict[int, bytes] = {}
        self.versions: dict[int, list[bytes | None]] = {}
        """Block -> its durable content, then every later one; None is a hole."""
        self.lost: dict[int, bytes | None] = {}
        """Block that a failed sync dropped -> what is on the disk instead."""
        self.size = 0
        self.durable_size = 0
        self.failures = 0
        """Syncs that failed; each descriptor that was open then tells of it once."""
        self.links = 1
        self.mode = 0o600
        self.locked_by: int | None = None
        self.memory: SharedMemory | None = None

    def _remember(self, block: int) -> list[bytes | None]:
        versions = self.versions.get(block)
        if versions is None:
            durable = self.lost.pop(block) if block in self.lost else self.blocks.get(block)
            versions = self.versions[block] = [durable]
        return versions

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        if self.memory is not None:
            self.memory[offset : offset + len(data)] = data
            return
        raw = bytes(data)
        unit = self.unit
        end = offset + len(raw)
        for block in range(offset // unit, -(-end // unit)):
            low, high = block * unit, (block + 1) * unit
            if offset <= low and high <= end:
                content = raw[low - offset : high - offset]
            else:
                whole = bytearray(self.blocks.get(block) or bytes(unit))
                first, last = max(low, offset), min(high, end)
                whole[first - low : last - low] = raw[first - offset : last - offset]
                content = bytes(whole)
            self._remember(block).append(content)
            self.blocks[block] = content
        self.size = max(self.size, end)

    def read(self, length: int, offset: int) -> bytes:
        if self.memory is not None:
            return bytes(self.memory[offset : offset + length])
        length = max(0, min(length, self.size - offset))
        unit, zeros, blocks = self.unit, bytes(self.unit), self.blocks
        first = offset // unit
        joined = b"".join([blocks.get(b, zeros) for b in range(first, -(-(offset + length) // unit))])
        start = offset - first * unit
        return joined if start == 0 and len(joined) == length else joined[start : start + length]

    def punch(self, offset: int, length: int) -> None:
        first, end = offset // self.unit, (offset + length) // self.unit
        for block in [b for b in self.blocks if first <= b < end]:
            self._remember(block).append(None)
            del self.blocks[block]

    def truncate(self, size: int) -> None:
        if size < self.size:
            for block in [b for b in self.blocks if b * self.unit >= size]:
                self._remember(block).append(None)
                del self.blocks[block]
        self.size = size

    def sync(self) -> None:
        self.versions.clear()
        self.durable_size = self.size

    def fail_sync(self, dice: random.Random) -> None:
        for block, versions in self.versions.items():
            self.lost[block] = dice.choice(versions)
        self.versions.clear()
        self.failures += 1

    def show_the_disk(self) -> None:
        for block, content in self.lost.items():
            if content is None:
                self.blocks.pop(block, None)
            else:
                self.blocks[block] = content
        self.lost.clear()

    def cut(self, dice: random.Random) -> None:
        left = dict(self.lost)
        for block, versions in self.versions.items():
            left[block] = dice.choice(versions)
        for block, content in left.items():
            if content is None:
                self.blocks.pop(block, None)
            else:
                self.blocks[block] = content
        self.lost.clear()
        self.versions.clear()
        self.size = self.durable_size if dice.random() < 0.5 else self.size
        self.durable_size = self.size
        self.locked_by = None

    def on_disk(self, block: int) -> list[bytes | None]:
        """Return all that a power cut may leave of a block."""
        if block in self.lost:
            return [self.lost[block]]
        return self.versions.get(block) or [self.blocks.get(block)]


class Status:
    __slots__ = ("st_blocks", "st_ino", "st_mode", "st_nlink", "st_size")

    def __init__(self, mode: int, size: int, links: int, blocks: int, ino: int) -> None:
        self.st_mode, self.st_size, self.st_nlink, self.st_blocks, self.st_ino = mode, size, links, blocks, ino


class Opened:
    __slots__ = ("file", "owner", "path", "told", "writable")

    def __init__(self, file: File | None, path: str, owner: object, writable: bool) -> None:
        self.file = file
        """None: a directory."""
        self.path = path
        self.owner = owner
        self.writable = writable
        self.told = 0 if file is None else file.failures
        """Failed syncs of the file that this descriptor need not tell of any more."""


class Files:
    """All files of the machine, and the descriptors of all its processes."""

    def __init__(self) -> None:
        self.names: dict[str, File] = {}
        self.durable_names: dict[str, File] = {}
        self.pending: dict[str, list[tuple[str, str, File | None]]] = {}
        """Directory -> changes of its names that were not synced, in order."""
        self.directories: set[str] = {"/", LIVE}
        self.fds: dict[int, Opened] = {}
        self._next_fd = 1000
        self._next_ino = 1

    # --- names

    def path(self, path: str | os.PathLike[str], dir_fd: int | None = None) -> str:
        name = os.fspath(path)
        if name.startswith("/proc/self/fd/"):
            number, _, rest = name[14:].partition("/")
            base = self.fds[int(number)].path
            return f"{base}/{rest}" if rest else base
        return name if dir_fd is None else f"{self.fds[dir_fd].path}/{name}"

    def _note(self, kind: str, path: str, file: File | None) -> None:
        if not path.startswith(LIVE):
            self.pending.setdefault(path.rpartition("/")[0], []).append((kind, path, file))

    def _replay(self, change: tuple[str, str, File | None]) -> None:
        kind, path, file = change
        if kind == "unlink":
            self.durable_names.pop(path, None)
        elif file is not None:
            self.durable_names[path] = file

    def sync_directory(self, path: str) -> None:
        for change in self.pending.pop(path, ()):
            self._replay(change)

    # --- the calls of ``ebsd.store.disk.Disk``

    def open(self, path: Any, flags: int, mode: int, dir_fd: int | None, owner: object) -> int:
        name = self.path(path, dir_fd)
        if name in self.directories:
            opened = Opened(None, name, owner, False)
        else:
            file = self.names.get(name)
            if file is None:
                if not flags & os.O_CREAT:
                    raise FileNotFoundError(errno.ENOENT, "no such file", name)
                unit = LAYER_BLOCK if name.startswith("/state/layers/") and not name.endswith("/table") else SMALL_BLOCK
                self._next_ino += 1
                file = self.names[name] = File(self._next_ino, unit)
                file.mode = mode
                self._note("link", name, file)
            elif flags & os.O_EXCL:
                raise FileExistsError(errno.EEXIST, "file exists", name)
            if flags & os.O_TRUNC and file.size:
                file.truncate(0)
            opened = Opened(file, name, owner, flags & os.O_ACCMODE != os.O_RDONLY)
        self._next_fd += 1
        self.fds[self._next_fd] = opened
        return self._next_fd

    def dup(self, fd: int, owner: object) -> int:
        old = self.fds[fd]
        self._next_fd += 1
        self.fds[self._next_fd] = Opened(old.file, old.path, owner, old.writable)
        return self._next_fd

    def close(self, fd: int) -> None:
        opened = self.fds.pop(fd, None)
        if opened is None:
            raise OSError(errno.EBADF, "bad descriptor")
        if opened.file is not None and opened.file.locked_by == fd:
            opened.file.locked_by = None

    def close_all_of(self, owner: object) -> None:
        for fd in [fd for fd, opened in self.fds.items() if opened.owner is owner]:
            self.close(fd)

    def opened(self, fd: int) -> Opened:
        if fd not in self.fds:
            raise OSError(errno.EBADF, "bad descriptor")
        return self.fds[fd]

    def file(self, fd: int) -> File:
        file = self.opened(fd).file
        if file is None:
            raise IsADirectoryError(errno.EISDIR, "a directory")
        return file

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        file = self.file(fd)
        unit = file.unit
        if offset >= file.size:
            raise OSError(errno.ENXIO, "behind the end")
        if whence == os.SEEK_DATA:
            later = [b for b in file.blocks if (b + 1) * unit > offset]
            start = max(offset, min(later) * unit) if later else file.size
            if start >= file.size:
                raise OSError(errno.ENXIO, "no data")
            return start
        block = offset // unit
        if block not in file.blocks:
            return offset
        while block in file.blocks:
            block += 1
        return min(block * unit, file.size)

    def fstat(self, fd: int) -> Status:
        file = self.fds[fd].file
        if file is None:
            return Status(stat.S_IFDIR | 0o700, 0, 2, 0, 1)
        size = len(file.memory) if file.memory is not None else file.size
        return Status(stat.S_IFREG | file.mode, size, file.links, len(file.blocks) * file.unit // 512, file.ino)

    def flock(self, fd: int) -> None:
        file = self.file(fd)
        if file.locked_by is not None and file.locked_by != fd:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")
        file.locked_by = fd

    def mmap(self, fd: int, length: int) -> SharedMemory:
        memory = self.file(fd).memory
        if memory is None or len(memory) != length:
            raise AssertionError("the live map was not given its pages before it was mapped")
        return memory

    def rename(self, source: Any, target: Any) -> None:
        old, new = self.path(source), self.path(target)
        if old not in self.names:
            raise AssertionError(f"{old} is to be renamed, and somebody removed it")
        file = self.names.pop(old)
        if new in self.names:
            self.names[new].links = 0
        self.names[new] = file
        # One change of the directory, as every journal makes it; a name at most, never none.
        self._note("link", new, file)
        self._note("unlink", old, None)

    def unlink(self, path: Any) -> None:
        name = self.path(path)
        if name in self.directories:
            raise IsADirectoryError(errno.EISDIR, "a directory", name)
        file = self.names.pop(name, None)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        file.links = 0
        self._note("unlink", name, None)

    def mkdir(self, path: Any) -> None:
        name = self.path(path)
        if name in self.directories:
            raise FileExistsError(errno.EEXIST, "there", name)
        self.directories.add(name)  # made once, before anything is tried

    def listdir(self, path: Any) -> list[str]:
        front = self.path(path).rstrip("/") + "/"
        return [name[len(front) :] for name in [*self.names, *self.directories] if self._is_child(name, front)]

    @staticmethod
    def _is_child(name: str, front: str) -> bool:
        return name.startswith(front) and "/" not in name[len(front) :] and name != front

    # --- accidents

    def cut_power(self, dice: random.Random) -> None:
        for changes in self.pending.values():
            for change in changes[: dice.randrange(len(changes) + 1)]:
                self._replay(change)
        self.pending.clear()
        self.fds.clear()
        self.names = dict(self.durable_names)
        for file in self.names.values():
            file.cut(dice)
            file.links = 1


Before = Callable[[str, str, int, int], None]


class ProcessDisk:
    """The ``Disk`` of one process: tells ``before`` of every call, and keeps descriptors by owner."""

    def __init__(self, files: Files, owner: object, before: Before) -> None:
        self._files = files
        self._owner = owner
        self._before = before

    def _at(self, name: str, fd: int, offset: int = 0, length: int = 0) -> Opened:
        self._before(name, self._files.fds[fd].path if fd in self._files.fds else "", offset, length)
        return self._files.opened(fd)

    def open(self, path: Any, flags: int, mode: int = 0o600, dir_fd: int | None = None) -> int:
        self._before("open", self._files.path(path, dir_fd), 0, 0)
        return self._files.open(path, flags, mode, dir_fd, self._owner)

    def close(self, fd: int) -> None:
        if not getattr(self._owner, "dead", False):  # else the kernel has closed it
            self._files.close(fd)

    def dup(self, fd: int) -> int:
        return self._files.dup(fd, self._owner)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self._at("pread", fd, offset, length)
        return self._files.file(fd).read(length, offset)

    def pread_into(self, fd: int, buffer: bytearray | memoryview, offset: int) -> int:
        self._at("pread", fd, offset, len(buffer))
        data = self._files.file(fd).read(len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        opened = self._at("pwrite", fd, offset, len(data))
        if not opened.writable:
            raise OSError(errno.EBADF, "not open for writing")
        self._files.file(fd).write(data, offset)
        return len(data)

    def fdatasync(self, fd: int) -> None:
        opened = self._at("fdatasync", fd)
        file = self._files.file(fd)
        if opened.told < file.failures:
            opened.told = file.failures
            raise OSError(errno.EIO, "a sync failed since this was opened")
        file.sync()

    def drop_cache(self, fd: int) -> None:
        self._at("drop_cache", fd)
        self._files.file(fd).show_the_disk()

    def fsync(self, fd: int) -> None:
        opened = self._at("fsync", fd)
        if opened.file is None:
            self._files.sync_directory(opened.path)
        else:
            opened.file.sync()

    def ftruncate(self, fd: int, length: int) -> None:
        self._at("ftruncate", fd, 0, length)
        self._files.file(fd).truncate(length)

    def fallocate(self, fd: int, offset: int, length: int) -> None:
        self._at("fallocate", fd, offset, length)
        file = self._files.file(fd)
        if file.memory is None:
            file.memory = SharedMemory(offset + length)

    def punch(self, fd: int, offset: int, length: int) -> None:
        opened = self._at("punch", fd, offset, length)
        if not opened.writable:
            raise OSError(errno.EBADF, "not open for writing")
        self._files.file(fd).punch(offset, length)

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        self._before("lseek", "", 0, 0)
        return self._files.lseek(fd, offset, whence)

    def fstat(self, fd: int) -> Status:
        self._before("fstat", "", 0, 0)
        return self._files.fstat(fd)

    def fchmod(self, fd: int, mode: int) -> None:
        self._before("fchmod", "", 0, 0)
        self._files.file(fd).mode = mode

    def flock(self, fd: int, operation: int) -> None:
        self._before("flock", "", 0, 0)
        self._files.flock(fd)

    def mmap(self, fd: int, length: int) -> SharedMemory:
        self._before("mmap", "", 0, 0)
        return self._files.mmap(fd, length)

    def rename(self, source: Any, target: Any) -> None:
        self._before("rename", self._files.path(target), 0, 0)
        self._files.rename(source, target)

    def unlink(self, path: Any) -> None:
        self._before("unlink", self._files.path(path), 0, 0)
        self._files.unlink(path)

    def mkdir(self, path: Any, mode: int) -> None:
        self._before("mkdir", self._files.path(path), 0, 0)
        self._files.mkdir(path)

    def rmdir(self, path: Any) -> None:
        self._files.directories.discard(self._files.path(path))

    def listdir(self, path: Any) -> list[str]:
        self._before("listdir", self._files.path(path), 0, 0)
        return self._files.listdir(path)


class DiskPath(PurePosixPath):
    """A path in ``Files``, with the few methods of ``pathlib.Path`` that the product calls on paths of the store."""

    files: ClassVar[Files]

    def exists(self) -> bool:
        return str(self) in self.files.names or self.is_dir()

    def stat(self) -> Status:
        file = self.files.names[str(self)]
        return Status(stat.S_IFREG | file.mode, file.size, file.links, len(file.blocks) * file.unit // 512, file.ino)

    def is_dir(self) -> bool:
        return str(self) in self.files.directories

    def iterdir(self) -> Iterator[DiskPath]:
        return (self / name for name in self.files.listdir(self))
