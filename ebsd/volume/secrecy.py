"""How a process begins that will hold a data key: hardened, tested, and with descriptor 0 as its only way out."""

from __future__ import annotations

import logging
import os
import socket

from ebsd.crypto import selftest
from ebsd.ipc.hardening import join_write_back, lock_memory
from ebsd.ipc.process import harden


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


def take_parent() -> socket.socket:
    """Return the socket on descriptor 0, and put /dev/null there, so that nothing else can read from it."""
    parent = socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    return parent
