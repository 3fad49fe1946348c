"""Replacing a small file so that a crash leaves the old bytes or the new ones (I5)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ebsd.store.disk import Disk, fsync_directory, opened, pwrite_all


def write_file_atomically(disk: Disk, path: Path, data: bytes, mode: int = 0o600) -> None:
    """Make ``data`` the contents of ``path``, durable at return.

    Order: write a temporary file beside it, fsync it, rename it over, fsync the directory. Without the first
    fsync a power cut may leave the new name with no bytes; without the last one it may bring the old file back
    after the caller went on. There is one writer of the store, so the temporary name is fixed, and one left by
    a crash is simply overwritten. Raises OSError; the old file is then still there, or the new one is complete.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with opened(disk, temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode) as fd:
            pwrite_all(disk, fd, data, 0)
            disk.fsync(fd)
        disk.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.unlink(temporary)
        raise
    fsync_directory(disk, path.parent)
