"""Child processes: start by exec, wait and kill through a pidfd, harden, and helpers that answer one request.

A child gets nothing in its environment or arguments. Descriptor 0 is a socket to the parent
(``ipc/channel.py``), 1 and 2 are a log, and no other descriptor is open. It has its own session, so signals
for the daemon's terminal do not reach it. A pidfd names the process itself, so no signal can hit another that
got the same number.
"""

from __future__ import annotations

import os
import select
import signal
import site
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import trio

from ebsd.domain.errors import HostUnsupported
from ebsd.ipc.channel import Channel
from ebsd.ipc.commands import ENVIRONMENT, command_from_directory, package_directory
from ebsd.ipc.hardening import shut_off
from ebsd.ipc.packets import Packet

REAP_DEADLINE: Final = 1.0
"""Seconds that a killed helper has to vanish; one that hangs in the kernel is reaped later."""


class Child:
    """A process of ours: started here (its exit status is known) or adopted (it is not)."""

    def __init__(self, pid: int, pidfd: int, started: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self._started = started
        self._lock = trio.Lock()
        self._awaited = False
        """Somebody waits for the pidfd: he closes it."""
        self._ended = False
        self._status: int | None = None

    @property
    def ended(self) -> bool:
        """Whether the end was seen by ``wait`` or ``poll``."""
        return self._ended

    @property
    def status(self) -> int | None:
        """Exit status after the end, -N for signal N; None before it, and for an adopted process."""
        return self._status

    async def wait(self) -> int | None:
        """Wait for the end, reap it, close the pidfd and return ``status``. Any number of tasks may wait."""
        async with self._lock:
            if self.poll():
                return self._status
            self._awaited = True
            try:
                while not self.poll():
                    await trio.lowlevel.wait_readable(self.pidfd)
            finally:
                self._awaited = False
                if self._ended:
                    os.close(self.pidfd)
        return self._status

    def poll(self) -> bool:
        """Say whether the process has ended; if it has, reap it and close the pidfd. Never waits.

        While a task waits the pidfd stays open: epoll(7) forgets a closed one without a word, and nobody would wake it.
        """
        if self._ended:
            return True
        try:
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:  # adopted
            if not _is_readable(self.pidfd):
                return False
        else:
            if result is None:
                return False
            killed = result.si_code != os.CLD_EXITED
            self._status = -result.si_status if killed else result.si_status
        self._ended = True
        if self._started is not None:
            # It is reaped: tell the Popen, which would otherwise wait for whoever has this number next.
            self._started.returncode = self._status if self._status is not None else 0
        self._close()
        return True

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; nothing happens when the process has ended."""
        if not self._ended:
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                return

    def release(self) -> None:
        """Let the process go on without us: close the pidfd and forget it. For the daemon's own end."""
        if not self._ended:
            self._ended = True
            if self._started is not None:
                self._started.returncode = 0  # silences Popen's warning; the process becomes init's
            self._close()

    def _close(self) -> None:
        if not self._awaited:
            os.close(self.pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def start_module(
    module: str, *, stdin_socket: socket.socket, log_fd: int | None = None, arguments: Sequence[str] | None = None
) -> Child:
    """Start ``python -I -m module`` with the socket as descriptor 0; the caller closes its own copy of the
    socket.

    Output and errors go to ``log_fd``, without one to this process's standard error. ``arguments`` are instead of
    ``command(module)``. Raises OSError.
    """
    output = 2 if log_fd is None else log_fd
    started = subprocess.Popen(
        command(module) if arguments is None else arguments,
        stdin=stdin_socket.fileno(),
        stdout=output,
        stderr=output,
        env=ENVIRONMENT,
        close_fds=True,
        start_new_session=True,
        cwd="/",
        umask=0o077,
    )
    try:
        pidfd = os.pidfd_open(started.pid)  # not reaped yet, so the number is still this process's
    except BaseException:
        started.kill()
        started.wait()
        raise
    return Child(started.pid, pidfd, started)


def start_with_channel(module: str, arguments: Sequence[str] | None = None) -> tuple[Child, Channel]:
    """Start a module as ``start_module`` does, and return it with this end of the channel on its descriptor 0."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs:
            child = start_module(module, stdin_socket=theirs, arguments=arguments)
    except BaseException:
        ours.close()
        raise
    return child, Channel(ours)


def adopt(pid: int) -> Child:
    """Return a process that another process started. Raises ProcessLookupError when there is none.

    The caller must know from elsewhere that the number is still that process's: by SO_PEERCRED of a living
    channel.
    """
    return Child(pid, os.pidfd_open(pid))


def command(module: str) -> list[str]:
    """Return the arguments that start a module of this project in an isolated interpreter."""
    if package_directory() in site.getsitepackages():
        return [sys.executable, "-I", "-m", module]
    return command_from_directory(module)


async def run_helper(
    module: str,
    request: dict[str, Any],
    fds: Sequence[int] = (),
    *,
    deadline: float,
    log_fd: int | None = None,
) -> Packet:
    """Start a helper module, send it one request (``{"method", "params"}``), and return its result.

    The helper answers with ``BlockingChannel.of_descriptor().serve_one(...)``. It is killed at the deadline
    (Timeout, seconds) and whenever this is cancelled, and always reaped. Raises what ``Channel.request``
    raises. The descriptors sent stay the caller's.
    """
    async with helper_running(module, log_fd=log_fd) as channel:
        return await channel.request(request["method"], request.get("params"), fds, deadline=deadline)


@asynccontextmanager
async def helper_running(module: str, *, log_fd: int | None = None) -> AsyncIterator[Channel]:
    """Start a helper module, and give the channel to it; at the end it is killed and reaped, whatever it does."""
    _reap_leftovers()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    async with Channel(ours) as channel:
        with theirs:
            child = start_module(module, stdin_socket=theirs, log_fd=log_fd)
        try:
            yield channel
        finally:
            channel.close()
            with trio.CancelScope(shield=True):
                await end_child(child)


async def end_child(child: Child, patience: float = REAP_DEADLINE) -> None:
    """Kill and reap a process; one that cannot die within ``patience`` seconds is reaped when a later helper starts.

    A process that has a file of a client open may hang in the kernel for as long as the client's file system likes.
    """
    child.kill()
    with trio.move_on_after(patience):
        await child.wait()
    if not child.ended:
        _leftovers.append(child)


def _reap_leftovers() -> None:
    _leftovers[:] = [child for child in _leftovers if not child.poll()]


_leftovers: list[Child] = []


def harden(strict: bool, *, no_new_privs: bool = True) -> list[str]:
    """Close the ways by which this process's memory leaves it; call it before the first secret.

    No core files, not dumpable (which also bars ptrace and ``/proc/<pid>/mem`` for the same uid, prctl(2)),
    no new privileges (``no_new_privs=False`` where fusermount3, which is setuid, must be executed), umask
    077. Returns what could not be done; with ``strict`` that raises HostUnsupported instead. An exec undoes
    "not dumpable".
    """
    failures = shut_off(no_new_privs=no_new_privs)
    if strict and failures:
        raise HostUnsupported(reason="; ".join(failures), remedy="")
    return failures


def boot_id() -> str:
    """Return the id of this boot of the host as canonical UUID text (random(4))."""
    return str(uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()))


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
