"""Allocating a file's blocks ahead of its end, so that appending to it cannot meet a full disk."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

_KEEP_SIZE: Final = 1  # FALLOC_FL_KEEP_SIZE, linux/falloc.h

_libc: Final = ctypes.CDLL(None, use_errno=True)
_fallocate: Final = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int


def allocate(descriptor: int, length: int) -> None:
    """Allocate blocks up to ``length`` bytes; the file's size stays. Raises OSError, ENOSPC among others.

    On a file system that cannot do it nothing is promised: there an append may fail after the operation.
    """
    while _fallocate(descriptor, _KEEP_SIZE, 0, length) != 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
