"""How a process begins that will hold a data key: hardened, tested, and with descriptor 0 as its only way out."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
from typing import Final

from ebsd.crypto import selftest
from ebsd.ipc.process import harden

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_PR_SET_IO_FLUSHER: Final = 57


def begin(log: logging.Logger, *, serves_device: bool) -> socket.socket:
    """Harden this process, lock its memory, test the cryptography, and return the socket that was descriptor 0.

    ``serves_device``: the process is in the path of writing back dirty pages, see ``join_write_back``. What the
    host does not allow is logged and left; a failed self-test raises (``ebsd.crypto.selftest``).
    """
    for failure in harden(strict=False):
        log.warning("%s", failure)
    lock_memory()
    if serves_device:
        join_write_back()
    selftest.run()
    return take_parent()


def lock_memory() -> None:
    """Keep plaintext buffers off swap.

    It needs a privilege or a limit that an unprivileged user may lack; then it is left, and ``doctor`` tells of
    swap.
    """
    ctypes.CDLL(None, use_errno=True).mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)


def join_write_back() -> None:
    """Keep this process out of a reclaim deadlock with the disk it serves (prctl(2), PR_SET_IO_FLUSHER)."""
    zeros = [ctypes.c_ulong(0)] * 3
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_IO_FLUSHER, ctypes.c_ulong(1), *zeros)


def take_parent() -> socket.socket:
    """Return the socket on descriptor 0, and put /dev/null there, so that nothing else can read from it."""
    parent = socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    return parent
