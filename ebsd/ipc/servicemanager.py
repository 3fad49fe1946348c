"""The service manager's protocols: readiness, watchdog, listening sockets and the journal, as systemd has them.

1. Nothing here does anything where no service manager speaks to this process: every variable is optional.
2. A variable that names another process (``LISTEN_PID``, ``WATCHDOG_PID``) is somebody else's and is ignored.
Sources: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3), systemd.exec(5) on JOURNAL_STREAM.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Mapping, MutableMapping
from typing import Final

import trio

from ebsd.domain.errors import ConfigurationError

FIRST_DESCRIPTOR: Final = 3
"""SD_LISTEN_FDS_START."""

_log = logging.getLogger(__name__)


def notify(address: str | None, *lines: str, wait: bool = True) -> None:
    """Send NAME=VALUE lines to $NOTIFY_SOCKET as one datagram; without a service manager this does nothing.

    ``wait``: until a service manager that is behind with reading takes it; without that BlockingIOError is raised then.
    """
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(wait)
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.sendall("\n".join(lines).encode())


class JournalFormatter(logging.Formatter):
    """Begins each line with its level, as the journal reads it from standard error (sd-daemon(3))."""

    _LEVELS: Final = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"))

    def format(self, record: logging.LogRecord) -> str:
        prefix = next((prefix for level, prefix in self._LEVELS if record.levelno >= level), "<7>")
        return "\n".join(prefix + line for line in super().format(record).split("\n"))


def log_to_stderr(form: str, environment: Mapping[str, str]) -> None:
    """Have this process log to standard error, with levels where that is the journal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((JournalFormatter if _is_journal(environment) else logging.Formatter)(form))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _is_journal(environment: Mapping[str, str]) -> bool:
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def watchdog_pause(environment: Mapping[str, str]) -> float | None:
    """Return the seconds between two signs of life that the service manager wants: half its patience; None for none."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = environment.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2_000_000 if microseconds.isdecimal() and int(microseconds) else None


async def keep_alive(environment: Mapping[str, str]) -> None:
    """Send signs of life for as long as the event loop turns: run it as a task of that loop. Never returns."""
    pause = watchdog_pause(environment)
    if pause is None:
        await trio.sleep_forever()
    while True:
        try:
            # The event loop does not stand still for a service manager that does.
            notify(environment.get("NOTIFY_SOCKET"), "WATCHDOG=1", wait=False)
        except OSError as exc:  # one that executes itself anew is back for the next sign
            _log.warning("no sign of life could be sent: %s", exc.strerror)
        await trio.sleep(pause)


def take_listeners(environment: MutableMapping[str, str]) -> dict[str, socket.socket]:
    """Return the listening sockets that the service manager passed, by their names, and remove the variables.

    No child inherits them. Raises ConfigurationError for one that is not a listening Unix stream socket, or has no name
    of its own; nothing is left open then.
    """
    count, pid = environment.pop("LISTEN_FDS", ""), environment.pop("LISTEN_PID", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    found: dict[str, socket.socket] = {}
    descriptors = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count))
    try:
        if len(names) != len(descriptors) or len(set(names)) != len(names):
            raise ConfigurationError(file="LISTEN_FDNAMES", reason="each socket has a name of its own")
        for name, descriptor in zip(names, descriptors, strict=True):
            found[name] = unix_listener(descriptor, name)
    except BaseException:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        for sock in found.values():
            sock.detach()
        raise
    return found


def unix_listener(descriptor: int, name: str) -> socket.socket:
    """Take over a listening Unix stream socket, not inherited from now on; raises ConfigurationError for another."""
    try:
        sock = socket.socket(fileno=descriptor)
        is_listener = (
            sock.family == socket.AF_UNIX
            and sock.type == socket.SOCK_STREAM
            and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )
    except OSError as exc:
        raise ConfigurationError(file=f"socket {name}", reason=exc.strerror) from exc
    if not is_listener:
        sock.detach()
        raise ConfigurationError(file=f"socket {name}", reason="it is no listening Unix socket")
    os.set_inheritable(descriptor, False)
    sock.setblocking(False)
    return sock
