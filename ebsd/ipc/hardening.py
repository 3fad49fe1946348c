"""How a process shuts itself off, and stays of use when memory is short; imports next to nothing."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from typing import Final

from ebsd.ipc.capabilities import Capability, permitted

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_IO_FLUSHER: Final = 57
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4

_libc: Final = ctypes.CDLL(None, use_errno=True)


def shut_off(*, no_new_privs: bool = True) -> list[str]:
    """Close the ways by which this process's memory leaves it, and return what could not be done; see ``harden``."""
    failures: list[str] = []
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as exc:
        failures.append(f"core files cannot be turned off: {exc}")
    if reason := _prctl(_PR_SET_DUMPABLE, 0):
        failures.append(f"the process stays dumpable: {reason}")
    if no_new_privs and (reason := _prctl(_PR_SET_NO_NEW_PRIVS, 1)):
        failures.append(f"new privileges stay possible: {reason}")
    os.umask(0o077)
    return failures


def spare_locked_memory() -> frozenset[Capability]:
    """Lift the limit of locked memory, and return what has to be kept where that is not possible.

    Without CAP_IPC_LOCK each page of a secret counts against the limit, and so does, after ``lock_memory``, whatever is
    allocated later: it would fail.
    """
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        except (OSError, ValueError):
            return frozenset({Capability.IPC_LOCK})
    return frozenset()


def lock_memory() -> list[str]:
    """Keep plaintext buffers, and what is needed when memory is short, off swap; returns what could not be done.

    It needs a privilege or a limit that an unprivileged user may lack; then it is left, and ``doctor`` tells of it.
    """
    unlimited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY
    if not unlimited and not permitted() & 1 << Capability.IPC_LOCK:
        return ["memory is not locked: RLIMIT_MEMLOCK"]
    if _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0:
        return []
    return [f"memory is not locked: {os.strerror(ctypes.get_errno())}"]


def join_write_back() -> list[str]:
    """Keep this process out of a reclaim deadlock with the disk it serves (prctl(2), PR_SET_IO_FLUSHER)."""
    reason = _prctl(_PR_SET_IO_FLUSHER, 1)
    return [f"it may wait for its own device when memory is short: {reason}"] if reason else []


def die_with_parent() -> str:
    """Have the kernel kill this process when the thread that started it ends; returns why not, or an empty text.

    A parent that ended before this call is not noticed: compare ``os.getppid()`` afterwards. It outlives an exec.
    """
    return _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> str:
    """Return why prctl(2) failed, or an empty text."""
    arguments = (ctypes.c_ulong(number) for number in (value, 0, 0, 0))
    if _libc.prctl(ctypes.c_int(option), *arguments) == 0:
        return ""
    return os.strerror(ctypes.get_errno())
