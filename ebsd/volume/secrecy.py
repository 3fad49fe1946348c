"""How a process begins that will hold a data key: confined, tested, and with descriptor 0 as its only way out."""

from __future__ import annotations

import logging
import os
import socket

from ebsd.crypto import selftest
from ebsd.ipc import confinement
from ebsd.ipc.confinement import Kind


def begin(log: logging.Logger, kind: Kind) -> socket.socket:
    """Be ready to hold a key, and return the socket that was descriptor 0; see ``confine``."""
    confine(log, kind)
    return take_parent()


def confine(log: logging.Logger, kind: Kind) -> None:
    """Take from this process what its kind does not need, and test the cryptography.

    What the host does not allow is logged and left; a failed self-test raises (``ebsd.crypto.selftest``).
    """
    confinement.begin(log, kind)
    selftest.run()


def take_parent() -> socket.socket:
    """Return the socket on descriptor 0, and put /dev/null there, so that nothing else can read from it."""
    parent = socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    return parent
