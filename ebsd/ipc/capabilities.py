"""Capabilities of this thread: which it has, and giving up all but a few of them for good (capabilities(7)).

They belong to threads: give them up before there is a second one. A process of uid 0 is nothing but an owner of root's
files afterwards, and no program that it executes has more.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Set
from enum import IntEnum
from typing import Final

_VERSION_3: Final = 0x20080522
_PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 23, 24, 47, 4
_MOST: Final = 64


class Capability(IntEnum):
    """Those of linux/capability.h that any process of ours has use for."""

    CHOWN = 0
    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    FOWNER = 3
    IPC_LOCK = 14
    SYS_ADMIN = 21
    SYS_RESOURCE = 24
    MKNOD = 27


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


_libc: Final = ctypes.CDLL(None, use_errno=True)


def permitted() -> int:
    """Return the bit set of the capabilities that this thread has or may take."""
    data = (_Data * 2)()
    _check(_libc.capget(ctypes.byref(_Header(_VERSION_3, 0)), data))
    return int(data[0].permitted) | int(data[1].permitted) << 32


def keep_only(kept: Set[Capability]) -> list[str]:
    """Give up everything else, in the bounding, ambient and inheritable sets too; returns what could not be done."""
    failures = []
    mask = sum(1 << capability for capability in kept) & permitted()
    try:
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
        for number in range(_MOST):
            if not mask & 1 << number and _libc.prctl(_PR_CAPBSET_READ, ctypes.c_ulong(number), 0, 0, 0) == 1:
                _prctl(_PR_CAPBSET_DROP, number)
    except OSError as exc:
        # Without CAP_SETPCAP there is nothing to bound either, unless somebody else's program is executed as root.
        if permitted():
            failures.append(f"the bounding set of capabilities stays: {exc.strerror}")
    data = (_Data * 2)(_Data(mask & 0xFFFFFFFF, mask & 0xFFFFFFFF, 0), _Data(mask >> 32, mask >> 32, 0))
    try:
        _check(_libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), data))
    except OSError as exc:
        failures.append(f"capabilities cannot be given up: {exc.strerror}")
    return failures


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)))


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
