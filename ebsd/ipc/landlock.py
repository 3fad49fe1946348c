"""Landlock: what this process may open by path from now on, whatever its uid may (landlock(7)).

1. It binds the calling thread and those that it starts, not those that run already.
2. What is open stays open; descriptors that are received keep the rights that they were opened with.
3. Each version of the kernel knows more rights. Those that this one knows are taken away; ``version`` says which it is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from enum import IntFlag
from typing import Final

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""Numbers of the system calls, the same on all architectures."""

_VERSION_QUERY: Final = 1
_RULE_PATH_BENEATH: Final = 1


class Access(IntFlag):
    """Rights on files, linux/landlock.h."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


READ: Final = Access.READ_FILE | Access.READ_DIR
FILES: Final = READ | Access.WRITE_FILE | Access.TRUNCATE | Access.MAKE_REG | Access.REMOVE_FILE
"""What it takes to read, make, write, rename and remove regular files in a directory."""
ON_A_FILE: Final = Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV

_SINCE: Final = ((1, Access.MAKE_SYM), (2, Access.REFER), (3, Access.TRUNCATE), (5, Access.IOCTL_DEV))
"""(Version, the last right that it knows), in order."""
_SCOPES_SINCE: Final = 6
_SCOPES: Final = 3
"""Abstract sockets, and signals, of processes outside."""


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32))


_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def version() -> int:
    """Return which version of Landlock the kernel has; 0 when it has none or it is not switched on."""
    found = int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_QUERY)))
    return max(found, 0)


def known_rights(abi: int) -> Access:
    """Return the rights that a version of Landlock can take away."""
    last = Access(0)
    for since, right in _SINCE:
        if abi >= since:
            last = right
    return Access((last << 1) - 1) if last else Access(0)


def restrict(allowed: Iterable[tuple[int, Access]], abi: int) -> None:
    """Let this thread open only what lies beneath the given descriptors, each with its rights. Raises OSError.

    ``abi`` is what ``version`` said; no_new_privs must be set. Signals go to nobody outside where the kernel can see
    to that.
    """
    rights = known_rights(abi)
    scoped = _SCOPES if abi >= _SCOPES_SINCE else 0
    attributes = _Ruleset(int(rights), 0, scoped)
    size = 8 if abi < 4 else 16 if abi < _SCOPES_SINCE else 24  # an older kernel refuses what it does not know
    ruleset = _call(_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        for fd, access in allowed:
            is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
            given = access & rights & (~Access(0) if is_directory else ON_A_FILE)
            rule = _PathBeneath(int(given), fd)
            # A descriptor without a path (a memory file, a pipe) needs no rule, and can have none: EBADFD.
            try:
                _call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), ctypes.c_uint32(0))
            except OSError as exc:
                if exc.errno != errno.EBADFD:
                    raise
        _call(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


def open_places(paths: Iterable[str], access: Access) -> list[tuple[int, Access]]:
    """Return descriptors for ``restrict`` of those paths that exist; the caller closes them."""
    found = []
    for path in paths:
        with suppress(OSError):
            found.append((os.open(path, os.O_PATH | os.O_CLOEXEC), access))
    return found


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
