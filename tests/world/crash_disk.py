"""A disk that forgets, fails and dies: real files, and a memory of everything that a power cut may take back.

1. Below ``root`` nothing is durable before it is synced: data (per 512 bytes: old, or any later version), lengths,
   and names (creations, renames, removals), the latter until the fsync of their directory. POSIX promises no more; an
   fsync of a file does not make its name durable. Below ``volatile`` (a tmpfs) nothing is remembered.
2. Every call is counted. A changing one can be the place of a death (``Died``, before the call is made), every one that
   of an error. Who is dead stays dead: each further call of it raises ``Died`` again, until ``revive``.
3. ``cut_power`` rewrites the files into a state that the cut may leave. A death of processes alone leaves them as they
   are: the page cache outlives a process.
4. What was unlinked or renamed over, and may come back, waits in ``grave``.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ebsd.store.disk import RealDisk, StrPath

BLOCK = 512
"""What a disk writes whole."""

PAGE = 4096
"""What a kill leaves whole of a write that it cuts short."""

Mode = Literal["lose", "keep", "random"]
EVERYBODY = ""


class Died(BaseException):
    """The process was killed, or the power went, before this call."""


class Call(NamedTuple):
    """A line of the log."""

    actor: str
    name: str
    path: str
    offset: int
    length: int


@dataclass
class _File:
    """What is not durable of one inode."""

    lengths: list[int]
    """The durable length, then every later one."""
    changes: list[tuple[int, bytes, bytes]] = field(default_factory=list)
    """(offset, bytes before, bytes after), whole blocks, zeros behind the end."""
    poison: dict[int, bytes] = field(default_factory=dict)
    """Blocks whose sync failed, and what is durable of them: the kernel calls them clean, and no later sync writes them
    unless they are written to again."""

    def sync_failed(self) -> None:
        for start, before, _ in self.changes:
            for at in range(0, len(before), BLOCK):
                self.poison.setdefault(start + at, before[at : at + BLOCK])
        self.changes.clear()

    def touch(self, start: int, before: bytes) -> None:
        """A change begins: what of it had failed to be synced is dirty once more."""
        for at in range(0, len(before), BLOCK):
            durable = self.poison.pop(start + at, None)
            if durable is not None:
                self.changes.append((start + at, durable, before[at : at + BLOCK]))


class _Op(NamedTuple):
    """A change of a directory: ``name`` goes (and becomes ``target``) or comes; ``old`` is the inode it takes away."""

    kind: Literal["create", "unlink", "rename"]
    name: str
    inode: int
    target: str = ""
    old: int | None = None


class CrashDisk(RealDisk):
    """See the module. ``lies``: names of calls (fdatasync, fsync, fsync_directory) that sync nothing."""

    def __init__(self, root: Path, *, volatile: Path, grave: Path) -> None:
        super().__init__()
        self.root = os.path.realpath(root)
        self.volatile = os.path.realpath(volatile) + "/"
        self.grave = Path(os.path.realpath(grave))
        self.grave.mkdir(exist_ok=True)
        self.actor = "ebsd"
        """Who makes the calls now; ``acting`` changes it."""
        self.lies: set[str] = set()
        self.log: list[Call] = []
        """The changing calls since ``disarm``."""
        self.every: list[Call] = []
        """All calls since ``disarm``, those that change nothing included."""
        self.calls: dict[str, int] = {}
        """How many calls of each name since ``disarm``."""
        self.total = 0
        """How many calls of any name since ``disarm``."""
        self.violations: list[str] = []
        """Writes that no order of events allows: to a sealed layer."""
        self._files: dict[int, _File] = {}
        self._ops: dict[int, list[_Op]] = {}
        self._where: dict[int, Path] = {}
        self._graves = 0
        self._dead: set[str] = set()
        self.disarm()

    # --- deaths, errors

    def disarm(self) -> None:
        """No death, no error; counters and log begin anew. Who is dead stays dead."""
        self._die_in: int | None = None
        self._scope = EVERYBODY
        self._tear: random.Random | None = None
        self._fail: dict[tuple[str, int], int] = {}
        self._fail_at: dict[int, int] = {}
        self._short: random.Random | None = None
        self.judge: Callable[[Call], int | None] | None = None
        """Asked at every call; an errno that it returns is raised (ENOSPC for as long as a test wants)."""
        self.log.clear()
        self.every.clear()
        self.calls.clear()
        self.total = 0

    def arm(
        self,
        *,
        die_at: int | None = None,
        scope: str = EVERYBODY,
        tear: random.Random | None = None,
        fail: dict[tuple[str, int], int] | None = None,
        fail_at: dict[int, int] | None = None,
        short: random.Random | None = None,
    ) -> None:
        """``die_at``: changing calls of ``scope`` that still happen before it dies. ``scope``: everybody, or actors
        whose name begins so (ebsd, volume, worker): only the one that makes the call dies. ``tear``: a write that is
        cut leaves some first pages. ``fail``: (name, its number) -> errno. ``fail_at``: number of the call -> errno.
        ``short``: short counts and EINTR.
        """
        self.disarm()
        self._die_in, self._scope, self._tear = die_at, scope, tear
        self._fail, self._fail_at, self._short = dict(fail or {}), dict(fail_at or {}), short

    @contextlib.contextmanager
    def acting(self, actor: str) -> Iterator[None]:
        """Let ``actor`` be who makes the calls of the block."""
        before, self.actor = self.actor, actor
        try:
            yield
        finally:
            self.actor = before

    def is_dead(self, actor: str | None = None) -> bool:
        return EVERYBODY in self._dead or (actor or self.actor) in self._dead

    def kill(self, actor: str = EVERYBODY) -> None:
        self._dead.add(actor)

    def revive(self) -> None:
        """New processes begin where dead ones were; nothing is armed."""
        self._dead.clear()
        self.disarm()

    def changing(self, name: str, path: str = "", offset: int = 0, length: int = 0) -> None:
        """Count a changing call, of the disk or of anything else with a durable effect; it may be where one dies."""
        call = Call(self.actor, name, path, offset, length)
        if self.is_dead():
            raise Died(name)
        if self._die_in is not None and self.actor.startswith(self._scope):
            if self._die_in == 0:
                self._die_in = None
                self._dead.add(self.actor if self._scope else EVERYBODY)
                raise Died(f"{self.actor}: {name} {path} {offset} {length}")
            self._die_in -= 1
        self.log.append(call)
        self._count(call)

    def reading(self, name: str, path: str = "", offset: int = 0, length: int = 0) -> None:
        """Count a call that changes nothing."""
        if self.is_dead():
            raise Died(name)
        self._count(Call(self.actor, name, path, offset, length))

    def _count(self, call: Call) -> None:
        number = self.calls.get(call.name, 0)
        self.calls[call.name] = number + 1
        total = self.total
        self.total += 1
        self.every.append(call)
        code = self._fail.get((call.name, number)) or self._fail_at.get(total)
        if code is None and self.judge is not None:
            code = self.judge(call)
        if code is not None:
            raise OSError(code, os.strerror(code), call.path or None)

    # --- what is remembered

    def _path(self, fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    def _remembers(self, path: str) -> bool:
        return (
            path.startswith(self.root) and not path.startswith(self.volatile) and not path.endswith(" (deleted)")
        ) or path.startswith(os.fspath(self.grave))

    def _file(self, fd: int, path: str) -> _File:
        status = os.fstat(fd)
        self._where[status.st_ino] = Path(path)
        return self._files.setdefault(status.st_ino, _File([status.st_size]))

    def _change(self, fd: int, offset: int, length: int, change: Callable[[], int]) -> int:
        path = self._path(fd)
        if not self._remembers(path) or not length:
            return change()
        file = self._file(fd, path)
        start, end = offset // BLOCK * BLOCK, -(-(offset + length) // BLOCK) * BLOCK
        before = _look(fd, end - start, start)
        file.touch(start, before)
        result = change()
        after = _look(fd, end - start, start)
        file.changes.append((start, before, after))
        size = os.fstat(fd).st_size
        if size != file.lengths[-1]:
            file.lengths.append(size)
        return result

    def _directory(self, path: str) -> int | None:
        """Return the inode of a directory whose names are remembered."""
        real = os.path.realpath(path)
        if not self._remembers(real + "/"):
            return None
        inode = os.stat(real).st_ino
        self._where[inode] = Path(real)
        return inode

    def _note(self, directory: int, op: _Op) -> None:
        self._ops.setdefault(directory, []).append(op)

    def _bury(self, path: str) -> int:
        """Take a name away, keep the file; return its inode."""
        inode = os.lstat(path).st_ino
        self._graves += 1
        self._move(Path(path), self.grave / str(self._graves), inode)
        return inode

    def _move(self, source: Path, target: Path, inode: int) -> None:
        os.rename(source, target)
        prefix = f"{source}/"
        for other, path in self._where.items():
            if os.fspath(path).startswith(prefix):
                self._where[other] = target / os.fspath(path)[len(prefix) :]
        self._where[inode] = target

    def _forget(self, inode: int) -> None:
        path = self._where.pop(inode, None)
        self._files.pop(inode, None)
        self._ops.pop(inode, None)
        if path is not None and path.parent == self.grave:
            if path.is_dir():
                for below in [i for i, p in self._where.items() if p.is_relative_to(path)]:
                    self._forget(below)
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    # --- the calls

    def open(self, path: StrPath, flags: int, mode: int = 0o600, dir_fd: int | None = None) -> int:
        text = os.fspath(path)
        if not flags & (os.O_CREAT | os.O_TRUNC):
            self.reading("open", text)
            return super().open(path, flags, mode, dir_fd=dir_fd)
        self.changing("open", text)
        whole = text if dir_fd is None or os.path.isabs(text) else f"/proc/self/fd/{dir_fd}/{text}"
        there = os.path.lexists(whole)
        fd = super().open(path, flags & ~os.O_TRUNC, mode, dir_fd=dir_fd)
        if not there:
            directory = self._directory(os.path.dirname(whole))
            if directory is not None:
                name = os.path.basename(whole)
                inode = os.fstat(fd).st_ino
                self._where[inode] = self._where[directory] / name
                self._files[inode] = _File([0])
                self._note(directory, _Op("create", name, inode))
        elif flags & os.O_TRUNC:
            self._truncate(fd, 0)
        return fd

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self.reading("pread", self._path(fd), offset, length)
        return super().pread(fd, length, offset)

    def make_direct(self, fd: int) -> bool:
        return False  # every read and write is seen by this object

    def pread_into(self, fd: int, buffer: bytearray | memoryview, offset: int) -> int:
        self.reading("pread", self._path(fd), offset, len(buffer))
        if self._short is not None and len(buffer) > 1:
            if self._short.random() < 0.2:
                raise InterruptedError(errno.EINTR, "interrupted")
            buffer = memoryview(buffer)[: self._short.randrange(1, len(buffer) + 1)]
        return super().pread_into(fd, buffer, offset)

    def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        path = self._path(fd)
        try:
            self.changing("pwrite", path, offset, len(data))
        except Died:
            if self._tear is not None and len(data) > PAGE:
                part = memoryview(data)[: self._tear.randrange(len(data)) // PAGE * PAGE]
                self._tear = None
                self._change(fd, offset, len(part), lambda: os.pwrite(fd, part, offset))
            raise
        if stat.S_IMODE(os.fstat(fd).st_mode) == 0o440:
            self.violations.append(f"{path} is sealed and written to")
        if self._short is not None and len(data) > BLOCK:
            if self._short.random() < 0.2:
                raise InterruptedError(errno.EINTR, "interrupted")
            data = memoryview(data)[: self._short.randrange(BLOCK, len(data) + 1) // BLOCK * BLOCK]
        return self._change(fd, offset, len(data), lambda: os.pwrite(fd, data, offset))

    def punch(self, fd: int, offset: int, length: int) -> None:
        self.changing("punch", self._path(fd), offset, length)

        def change() -> int:
            RealDisk.punch(self, fd, offset, length)
            return 0

        self._change(fd, offset, length, change)

    def fallocate(self, fd: int, offset: int, length: int) -> None:
        path = self._path(fd)
        self.changing("fallocate", path, offset, length)
        file = self._file(fd, path) if self._remembers(path) else None
        super().fallocate(fd, offset, length)
        if file is not None:
            file.lengths.append(os.fstat(fd).st_size)

    def ftruncate(self, fd: int, length: int) -> None:
        self.changing("ftruncate", self._path(fd), 0, length)
        self._truncate(fd, length)

    def _truncate(self, fd: int, length: int) -> None:
        path = self._path(fd)
        if not self._remembers(path):
            os.ftruncate(fd, length)
            return
        file = self._file(fd, path)
        size = os.fstat(fd).st_size
        if length < size:
            self._change(fd, length, size - length, lambda: os.ftruncate(fd, length) or 0)
        else:
            os.ftruncate(fd, length)
            file.lengths.append(length)

    def fdatasync(self, fd: int) -> None:
        inode = os.fstat(fd).st_ino
        self._syncing("fdatasync", fd, inode)
        if "fdatasync" not in self.lies:
            self._synced(fd, inode)

    def drop_cache(self, fd: int) -> None:
        file = self._files.get(os.fstat(fd).st_ino)
        if file is not None:
            with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as writable:
                for at, durable in file.poison.items():
                    os.pwrite(writable.fileno(), durable, at)
            file.poison.clear()

    def _syncing(self, name: str, fd: int, inode: int) -> None:
        try:
            self.changing(name, self._path(fd))
        except OSError:
            if inode in self._files:
                self._files[inode].sync_failed()
            raise

    def _synced(self, fd: int, inode: int) -> None:
        file = self._files.pop(inode, None)
        if file is not None and file.poison:
            self._files[inode] = _File([os.fstat(fd).st_size], poison=file.poison)

    def fsync(self, fd: int) -> None:
        status = os.fstat(fd)
        is_directory = stat.S_ISDIR(status.st_mode)
        name = "fsync_directory" if is_directory else "fsync"
        self._syncing(name, fd, status.st_ino)
        if name in self.lies:
            return
        if not is_directory:
            self._synced(fd, status.st_ino)
            return
        for op in self._ops.pop(status.st_ino, []):
            for inode in (op.old, op.inode if op.kind == "unlink" else None):
                if inode is not None:
                    self._forget(inode)

    def fchmod(self, fd: int, mode: int) -> None:
        self.changing("fchmod", self._path(fd), 0, mode)
        super().fchmod(fd, mode)

    def rename(self, source: StrPath, target: StrPath) -> None:
        old, new = os.fspath(source), os.fspath(target)
        self.changing("rename", f"{old} -> {os.path.basename(new)}")
        directory = self._directory(os.path.dirname(new))
        if directory is None:
            os.rename(old, new)
            return
        assert directory == self._directory(os.path.dirname(old)), "no renames across directories"
        inode = os.lstat(old).st_ino
        over = self._bury(os.path.realpath(new)) if os.path.lexists(new) else None
        self._move(Path(os.path.realpath(old)), self._where[directory] / os.path.basename(new), inode)
        self._note(directory, _Op("rename", os.path.basename(old), inode, os.path.basename(new), over))

    def unlink(self, path: StrPath) -> None:
        text = os.fspath(path)
        self.changing("unlink", text)
        if not os.path.lexists(text) or os.path.isdir(text):
            os.unlink(text)  # for its error
        self._remove(text, os.unlink)

    def rmdir(self, path: StrPath) -> None:
        text = os.fspath(path)
        self.changing("rmdir", text)
        if not os.path.isdir(text) or os.listdir(text):
            os.rmdir(text)  # for its error
        self._remove(text, os.rmdir)

    def _remove(self, path: str, really: Callable[[str], None]) -> None:
        directory = self._directory(os.path.dirname(path))
        if directory is None:
            really(path)
            return
        real = os.fspath(self._where[directory] / os.path.basename(path))
        self._note(directory, _Op("unlink", os.path.basename(path), self._bury(real)))

    def mkdir(self, path: StrPath, mode: int) -> None:
        text = os.fspath(path)
        self.changing("mkdir", text)
        super().mkdir(path, mode)
        directory = self._directory(os.path.dirname(text))
        if directory is not None:
            inode = os.stat(text).st_ino
            self._where[inode] = self._where[directory] / os.path.basename(text)
            self._note(directory, _Op("create", os.path.basename(text), inode))

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        self.reading("lseek", self._path(fd), offset)
        return super().lseek(fd, offset, whence)

    def mmap(self, fd: int, length: int) -> mmap.mmap:
        self.reading("mmap", self._path(fd), 0, length)
        return super().mmap(fd, length)

    def listdir(self, path: StrPath) -> list[str]:
        self.reading("listdir", os.fspath(path))
        return sorted(super().listdir(path))

    # --- the cut

    def unsynced(self) -> list[str]:
        """Say what a power cut now could take back: for the message of a test that failed."""
        lines = [f"data of {self._where.get(inode)}" for inode, file in self._files.items() if file.changes]
        lines += [f"length of {self._where.get(i)}: {f.lengths}" for i, f in self._files.items() if len(f.lengths) > 1]
        for inode, ops in self._ops.items():
            lines += [f"{self._where.get(inode)}: {op.kind} {op.name} {op.target}" for op in ops]
        return lines

    def cut_power(self, dice: random.Random, mode: Mode = "random") -> None:
        """Put a state on the files that a power cut may leave. ``mode``: what happens to what was not synced."""
        if mode != "keep":
            wanted = {directory: self._names_after(directory, dice, mode) for directory in list(self._ops)}
            for directory, names in wanted.items():
                self._put(directory, names)
            for inode, file in list(self._files.items()):
                path = self._where.get(inode)
                if path is not None and path.parent != self.grave and path.exists():
                    _tear(path, file, dice, mode)
        self._files.clear()
        self._ops.clear()
        self._where.clear()
        for left in self.grave.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _names_after(self, directory: int, dice: random.Random, mode: Mode) -> dict[str, int]:
        with os.scandir(self._where[directory]) as entries:
            names = {entry.name: entry.inode() for entry in entries}
        ops = self._ops[directory]
        for op in reversed(ops):
            _undo(names, op)
        if mode == "lose":
            return names
        journal = ops[: dice.randrange(len(ops) + 1)]  # what came later is lost with what came before
        kept = journal if dice.random() < 0.5 else [op for op in ops if dice.random() < 0.5]
        for op in kept:
            _redo(names, op, both=dice.random() < 0.1)
        return names

    def _put(self, directory: int, names: dict[str, int]) -> None:
        with os.scandir(self._where[directory]) as entries:
            present = {entry.name: entry.inode() for entry in entries}
        for name, inode in present.items():
            if names.get(name) != inode:
                self._bury(os.fspath(self._where[directory] / name))
        placed: dict[int, Path] = {i: self._where[directory] / n for n, i in present.items() if names.get(n) == i}
        for name, inode in names.items():
            target = self._where[directory] / name
            if inode not in placed:
                self._move(self._where[inode], target, inode)
                placed[inode] = target
            elif placed[inode] != target:
                shutil.copy2(placed[inode], target)


def _look(fd: int, length: int, offset: int) -> bytes:
    """Return what lies in a file, zeros behind its end; the descriptor may be one for writing only."""
    try:
        return os.pread(fd, length, offset).ljust(length, b"\0")
    except OSError as exc:
        if exc.errno != errno.EBADF:
            raise
    with open(f"/proc/self/fd/{fd}", "rb", buffering=0) as again:
        return os.pread(again.fileno(), length, offset).ljust(length, b"\0")


def _undo(names: dict[str, int], op: _Op) -> None:
    if op.kind == "create":
        names.pop(op.name, None)
    elif op.kind == "unlink":
        names[op.name] = op.inode
    else:
        names[op.name] = op.inode
        if op.old is None:
            names.pop(op.target, None)
        else:
            names[op.target] = op.old


def _redo(names: dict[str, int], op: _Op, *, both: bool) -> None:
    """Do one change to the names; ``both``: a rename may leave the old name beside the new one."""
    if op.kind == "create":
        names[op.name] = op.inode
    elif op.kind == "unlink":
        if names.get(op.name) == op.inode:
            del names[op.name]
    else:
        if names.get(op.name) == op.inode and not both:
            del names[op.name]
        names[op.target] = op.inode


def _tear(path: Path, file: _File, dice: random.Random, mode: Mode) -> None:
    """Give each block of a file its durable contents or any later version, and the file any of its lengths."""
    versions: dict[int, list[bytes]] = {}
    for start, before, after in file.changes:
        for at in range(0, len(before), BLOCK):
            line = versions.setdefault(start + at, [before[at : at + BLOCK]])
            line.append(after[at : at + BLOCK])
    for at, durable in file.poison.items():
        with open(path, "rb") as current:
            versions[at] = [durable, os.pread(current.fileno(), BLOCK, at).ljust(BLOCK, b"\0")]
    length = file.lengths[0] if mode == "lose" else dice.choice(file.lengths)
    permissions = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0o600)
    fd = os.open(path, os.O_RDWR)
    try:
        os.ftruncate(fd, length)
        for at, line in versions.items():
            block = line[0] if mode == "lose" else dice.choice(line)
            if at < length and os.pread(fd, BLOCK, at).ljust(BLOCK, b"\0") != block:
                os.pwrite(fd, block[: length - at], at)
    finally:
        os.close(fd)
        path.chmod(permissions)


__all__ = ["BLOCK", "EVERYBODY", "Call", "CrashDisk", "Died", "Mode"]
