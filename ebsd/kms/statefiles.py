"""The broker's state directory: its lock, files written whole or not at all, and the change of a whole state.

1. A file is written beside its place, synced, renamed, and the directory is synced: a crash leaves the old file
   or the new one.
2. A whole state (epoch file and database) changes by a switch: both files stand complete as ``NAME.new``, then the
   file ``switch`` appears, which is the point of no return, then the renames follow; ``finish_switch`` repeats them
   after a crash. Old files are kept as ``NAME.before-restore-<time>``, or, when the switch is there to destroy what
   they hold, overwritten, with the ones that earlier switches kept.
3. ``.new`` files without ``switch`` are leftovers of something that never happened, and are removed.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ebsd.domain.errors import ConfigurationError, StateDirectoryInUse

EPOCH: Final = "epoch"
DATABASE: Final = "keys.sqlite"
LOCK: Final = "lock"
AUDIT: Final = "audit"
SWITCH: Final = "switch"
DESTROY: Final = "destroy"
"""Second word in the file ``switch``: the old files are not kept."""
KEPT: Final = ".before-restore-"
NEW: Final = ".new"
_COMPANIONS: Final = {EPOCH: ("",), DATABASE: ("", "-wal", "-shm", "-journal")}
"""Files that belong together: SQLite finds a journal by the name of its database."""


def prepare_directory(directory: Path) -> Path:
    """Make the state directory (0700) where there is none and return its real path.

    Raises ConfigurationError when it is somebody else's; a wider mode of our own directory is narrowed.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    real = Path(os.path.realpath(directory))
    status = real.stat()
    if status.st_uid != os.geteuid():
        raise ConfigurationError(file=str(real), reason=f"it belongs to uid {status.st_uid}, not to this service")
    if stat.S_IMODE(status.st_mode) != 0o700:
        real.chmod(0o700)
    return real


def lock_directory(directory: Path) -> int:
    """Take the lock of the state directory and return its descriptor, which holds it; raises StateDirectoryInUse."""
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(descriptor)
        raise StateDirectoryInUse(program="ebsd-kms", directory=str(directory)) from exc
    return descriptor


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes | bytearray | memoryview) -> None:
    """Write everything, however often write(2) stops short."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_synced(path: Path, content: bytes | bytearray) -> None:
    """Write a new file (0600) and sync it; an earlier file of this name is replaced. The directory is not synced."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_limited(path: Path, limit: int) -> bytes:
    """Return a file's content, at most ``limit`` + 1 bytes of it; symlinks are refused (OSError)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(limit + 1)


def overwrite(path: Path) -> None:
    """Write zeros over a file in its place and sync it; what is no regular file is left alone.

    On a file system that writes elsewhere (btrfs, a log on flash) the old blocks stay until they are used again.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        if path.is_file() and not path.is_symlink():
            raise
        return
    try:
        overwrite_open(descriptor)
    finally:
        os.close(descriptor)


def overwrite_open(descriptor: int) -> None:
    """Write zeros over an open regular file, which may have no name any more, and sync it."""
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        os.lseek(descriptor, 0, os.SEEK_SET)
        zeros = bytes(1 << 16)
        for start in range(0, status.st_size, len(zeros)):
            write_all(descriptor, zeros[: status.st_size - start])
        os.fsync(descriptor)


@contextmanager
def log_of_database(directory: Path) -> Iterator[int | None]:
    """Yield a descriptor of the database's write-ahead log, which SQLite unlinks as it closes; None when there is none.

    Closing it drops none of SQLite's locks: those are on the database itself.
    """
    try:
        descriptor = os.open(directory / f"{DATABASE}-wal", os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def exists(directory: Path) -> bool:
    """Say whether any part of a state is there: then no new state, and no new root key, may be made."""
    return any((directory / name).exists() or (directory / name).is_symlink() for name in (EPOCH, DATABASE))


def commit_switch(directory: Path, stamp: str, *, destroy: bool = False) -> None:
    """Make the ``.new`` files the state; the old files are kept under a name with ``stamp``, or destroyed.

    The ``.new`` files must be complete and synced. When this returns, the change has happened and is durable.
    """
    sync_directory(directory)
    intent = directory / (SWITCH + NEW)
    write_synced(intent, f"{stamp} {DESTROY}\n".encode() if destroy else f"{stamp}\n".encode())
    intent.rename(directory / SWITCH)
    sync_directory(directory)
    finish_switch(directory)


def finish_switch(directory: Path) -> bool:
    """Finish a switch that was committed, or remove the leftovers of one that was not; say which (True, False).

    Every step may have happened before: repeating it does nothing.
    """
    switch = directory / SWITCH
    try:
        words = read_limited(switch, 64).decode("ascii", "replace").split()
    except FileNotFoundError:
        for name in (*_COMPANIONS, SWITCH):
            for companion in _COMPANIONS.get(name, ("",)):
                (directory / f"{name}{NEW}{companion}").unlink(missing_ok=True)
        return False
    if not words or not words[0].isalnum() or words[1:] not in ([], [DESTROY]):
        raise ConfigurationError(file=str(switch), reason="it does not name a time")
    destroy = words[1:] == [DESTROY]
    for name, companions in _COMPANIONS.items():
        new = directory / (name + NEW)
        if new.exists():
            for companion in companions:
                old = directory / (name + companion)
                if old.exists() and destroy:
                    overwrite(old)
                    old.unlink()
                elif old.exists():
                    old.rename(directory / f"{name}{KEPT}{words[0]}{companion}")
            new.rename(directory / name)
    if destroy:
        for kept in sorted(directory.glob(f"*{KEPT}*")):
            overwrite(kept)
            kept.unlink()
    sync_directory(directory)
    switch.unlink()
    sync_directory(directory)
    return True
