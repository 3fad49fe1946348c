"""The holder of an attached volume: it starts the engine, keeps what the next one needs, and replaces one that dies.

1. One thread, blocking, next to no imports, and nothing a user of the volume writes ever comes here: it outlives what
   engines die of. It looks into none of what is deposited but the failed flag.
2. An engine deposits before it lets anything depend on it, and waits for the answer.
3. A successor is started only after ``waitid``: no thread of the dead one is left, so no late write can come.
4. It is started only while nothing says that data was lost: not with the failed flag, and not when a witness reports
   an error of write-back. Witnesses are descriptors of their own, opened before the first write and never synced
   otherwise: an engine that is killed in a sync can take the only report of an error with it.
5. An engine does not outlive its holder (PR_SET_PDEATHSIG), and the lock on the live map is that of the open file
   deposited here: who waits for that lock waits for both.
6. More deaths in a minute than were agreed, and nothing more is tried: what killed each engine comes again with the
   requests. The holder ends, with it the connection, and everybody gets errors.
7. A successor that hangs before it serves is killed when its time is over, which is a death. A death in set-up is not
   forgotten after a minute, but when an engine has come to serve: else such deaths would never be too many.

The protocol is that of ``ipc/packets.py``, without its imports: ``keep``, ``drop``, ``arm``, ``serving``, ``done``.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import mmap
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from ebsd.ipc import seccomp
from ebsd.ipc.capabilities import keep_only
from ebsd.ipc.commands import ENVIRONMENT, command_from_directory
from ebsd.ipc.hardening import die_with_parent, join_write_back, lock_memory, shut_off, spare_locked_memory

ENGINE: Final = "ebsd.volume"
ENGINE_CHANNEL: Final = 3
"""The descriptor at which an engine finds the channel to its holder."""
RESTART: Final = 75
"""Exit status of an engine that asks to be replaced, for an upgrade: no death."""
WINDOW: Final = 60.0
"""Seconds in which deaths are counted."""
SETUP: Final = 60.0
"""Seconds for a successor to take its deposits, and as many again until it serves: it may wait for a slow disk."""

KEY: Final = "key"
"""The deposit that is secret memory: mapped and locked here, and wiped at the end."""
MAPS: Final = ("maps", "growth")
"""Deposits whose second descriptor is a live map, the present one or one that may have taken its place."""

_MAX_PACKET: Final = 192 * 1024
_MAX_FDS: Final = 253
_INT: Final = array.array("i").itemsize
_FLAG: Final = 4


class Deposit:
    """What an engine left here under a name."""

    def __init__(self, value: dict[str, Any], fds: list[int], watched: set[tuple[int, int]]) -> None:
        self.value = value
        self.fds = fds
        self.watched = watched
        self.secret: mmap.mmap | None = None

    def close(self) -> None:
        if self.secret is not None:
            self.secret[:] = bytes(len(self.secret))
            self.secret.close()
        for fd in self.fds:
            os.close(fd)


class Engine(NamedTuple):
    pid: int
    channel: socket.socket


class Holder:
    """What is kept for one volume; ``run`` is the whole life of it."""

    def __init__(self, start: Callable[[int], Engine]) -> None:
        """``start`` starts an engine with the descriptor it is given as descriptor 0."""
        self._start = start
        self._deposits: dict[str, Deposit] = {}
        self._witnesses: dict[tuple[int, int], int] = {}
        """(device, inode) of a file -> a descriptor that nothing but a take-over syncs."""
        self._arms: dict[str, Any] | None = None
        self._deaths: list[float] = []
        self._successors = 0
        self._served = True
        """The present engine does not have to be waited for: it serves, or is the first one, which ebsd looks after."""
        self._engine: Engine | None = None

    def run(self, parent: int) -> int:
        """Start the first engine on ``parent``, replace it while that is right, and return the exit status."""
        engine = self._begin(parent, {"Resume": False})
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, parent)
        os.close(null)
        try:
            while True:
                status = self._serve(engine)
                if not self._is_replaced(status):
                    return status if status >= 0 else 1
                successor = self._succeed(time.monotonic())
                if successor is None:
                    return 1
                engine = successor
        finally:
            for deposit in self._deposits.values():
                deposit.close()

    def signalled(self, number: int, frame: object) -> None:
        """Pass a signal on: a request to end means "flush and stay", and only the engine can flush."""
        if self._engine is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._engine.pid, number)

    # --- one engine

    def _begin(self, parent: int, first: dict[str, Any]) -> Engine:
        self._engine = self._start(parent)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died at once: the next wait will say so
            _send(self._engine.channel, first, [])
        return self._engine

    def _serve(self, engine: Engine) -> int:
        """Take deposits until the engine is gone, all of it; returns its exit status, -N for signal N."""
        limit = time.monotonic() + SETUP
        with engine.channel:
            while (packet := self._next(engine, limit)) is not None:
                message, fds = packet
                answer: dict[str, Any] = {"id": message.get("id")}
                try:
                    self._handle(str(message.get("method")), message["params"], fds)
                    answer["result"] = {}
                except Exception as exc:  # noqa: BLE001 - the engine hears it and ends its step; the holder goes on
                    answer["error"] = {"Code": "InternalFailure", "Message": f"The holder: {exc!r}", "Hint": ""}
                with contextlib.suppress(OSError):
                    _send(engine.channel, answer, [])
        self._engine = None
        return os.waitstatus_to_exitcode(os.waitpid(engine.pid, 0)[1])

    def _next(self, engine: Engine, limit: float) -> tuple[dict[str, Any], list[int]] | None:
        """Return the next packet, None at the end, to which an engine is brought that does not serve by then."""
        if not self._served:
            _set_patience(engine.channel, socket.SO_RCVTIMEO, max(limit - time.monotonic(), 0.001))
            try:
                return _receive(engine.channel)
            except BlockingIOError:
                self._kill_hung(engine)
        return _receive(engine.channel)

    def _kill_hung(self, engine: Engine) -> None:
        _say(f"engine {self._successors + 1} does not come to serve; ending it")
        os.kill(engine.pid, signal.SIGKILL)
        self._wait_for_ever(engine)

    def _wait_for_ever(self, engine: Engine) -> None:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            _set_patience(engine.channel, option, 0)

    def _handle(self, method: str, params: dict[str, Any], fds: list[int]) -> None:
        if method == "keep":
            self._keep(params["Name"], params["Value"], fds, params["Watch"])
        elif method == "drop":
            self._drop(params["Name"])
        elif method == "arm":
            self._arms = params
        elif method == "serving":
            self._served = True
            if self._engine is not None:
                self._wait_for_ever(self._engine)
        elif method == "done":
            self._arms = None
            self._drop(KEY)
        else:
            _close(fds)
            raise ValueError(f"no request: {method}")

    def _keep(self, name: str, value: dict[str, Any], fds: list[int], watch: list[int]) -> None:
        """Take a deposit in place of the one of that name. A file that is watched has its witness from the first
        time on: a new one would not report what an earlier sync was told.
        """
        watched: set[tuple[int, int]] = set()
        deposit = Deposit(value, fds, watched)
        try:
            for at in watch:
                found = os.fstat(fds[at])
                file = found.st_dev, found.st_ino
                if file not in self._witnesses:
                    self._witnesses[file] = os.open(f"/proc/self/fd/{fds[at]}", os.O_RDONLY | os.O_CLOEXEC)
                watched.add(file)
            if name == KEY:
                deposit.secret = _locked(fds[0], value["Length"])
        except BaseException:
            _close(fds)
            self._unwatch(watched)
            raise
        earlier = self._deposits.get(name)
        self._deposits[name] = deposit
        if earlier is not None:
            earlier.close()
            self._unwatch(earlier.watched)

    def _drop(self, name: str) -> None:
        deposit = self._deposits.pop(name, None)
        if deposit is not None:
            deposit.close()
            self._unwatch(deposit.watched)

    def _unwatch(self, files: set[tuple[int, int]]) -> None:
        used = {file for deposit in self._deposits.values() for file in deposit.watched}
        for file in files - used:
            os.close(self._witnesses.pop(file))

    # --- the next one

    def _is_replaced(self, status: int) -> bool:
        """Say whether an engine that ended so gets a successor."""
        arms = self._arms
        if arms is None:
            return False
        if self._has_failed(arms["FailedAt"]):
            _say("the engine has failed; it gets no successor")
            return False
        if status == RESTART:
            return True
        now = time.monotonic()
        if self._served:
            self._deaths = [then for then in self._deaths if now - then < WINDOW]
        self._deaths.append(now)
        _say(f"the engine ended ({_shown(status)}); death {len(self._deaths)} within {WINDOW:g} seconds")
        if len(self._deaths) > arms["Deaths"]:
            _say("that was one death too many: the volume is given up")
            return False
        return True

    def _succeed(self, since: float) -> Engine | None:
        """Start an engine and hand it everything, or return None when data may have been lost."""
        self._successors += 1
        self._served = False
        first = {"Resume": True, "Items": len(self._deposits), "Successor": self._successors, "Since": since}
        # Started before the witnesses are asked, which may take long: it waits for what it needs.
        engine = self._begin(0, first)
        for fd in self._witnesses.values():
            try:
                os.fdatasync(fd)
            except OSError as exc:
                _say(f"what was written is not on the disk: {exc.strerror}; the engine gets no successor")
                self._mark_failed()
                os.kill(engine.pid, signal.SIGKILL)
                os.waitpid(engine.pid, 0)
                engine.channel.close()
                return None
        _set_patience(engine.channel, socket.SO_SNDTIMEO, SETUP)
        try:
            for name, deposit in self._deposits.items():
                _send(engine.channel, {"Name": name, "Value": deposit.value}, deposit.fds)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died, too: the next wait will say so
        except BlockingIOError:
            self._kill_hung(engine)
        return engine

    def _live_maps(self) -> list[int]:
        return [self._deposits[name].fds[1] for name in MAPS if name in self._deposits]

    def _has_failed(self, at: int) -> bool:
        return any(os.pread(fd, _FLAG, at) != bytes(_FLAG) for fd in self._live_maps())

    def _mark_failed(self) -> None:
        if self._arms is not None:
            for fd in self._live_maps():
                os.pwrite(fd, (1).to_bytes(_FLAG, sys.byteorder), self._arms["FailedAt"])


def _locked(fd: int, length: int) -> mmap.mmap:
    """Map secret memory, so that it stays locked while no engine has it."""
    pages = mmap.mmap(fd, length)
    holder = ctypes.c_char.from_buffer(pages)
    ctypes.CDLL(None).mlock(ctypes.c_void_p(ctypes.addressof(holder)), ctypes.c_size_t(length))
    del holder
    return pages


def start_engine(parent: int) -> Engine:
    """Start an engine with ``parent`` as descriptor 0, the channel to it as the next, and nothing else but the log."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 * 1024)
    arguments, this = command_from_directory(ENGINE), os.getpid()
    with theirs:
        pid = os.fork()
        if pid == 0:
            try:
                die_with_parent()
                if os.getppid() != this:
                    os._exit(1)
                channel = os.dup(theirs.fileno())  # not at its place already, where dup2 would leave it to be closed
                os.dup2(parent, 0)
                os.dup2(channel, ENGINE_CHANNEL)
                os.execve(arguments[0], arguments, ENVIRONMENT)
            finally:
                os._exit(127)
    return Engine(pid, ours)


def _set_patience(channel: socket.socket, option: int, seconds: float) -> None:
    """Set after how many seconds the kernel gives a call on the channel up (socket(7)); 0 is never."""
    channel.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000)))


def _send(channel: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
    channel.sendmsg([json.dumps(message, separators=(",", ":")).encode()], control)


def _receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next packet and its descriptors; None at the end."""
    try:
        room = socket.CMSG_LEN(_MAX_FDS * _INT)
        data, control, flags, _ = channel.recvmsg(_MAX_PACKET, room, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return None
    fds = array.array("i")
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _INT])
    if not data:
        return None
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        _close(list(fds))
        return {"method": "a packet that was cut", "params": {}}, []
    return json.loads(data), list(fds)


def _close(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _shown(status: int) -> str:
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"ebsd-holder: {text}\n".encode())


def main() -> None:
    """Hold the volume whose ebsd is at descriptor 0."""
    # Its engines take less for themselves: what is given up here none of them has.
    failures = [*shut_off(), *join_write_back()]
    kept = spare_locked_memory()
    failures += [*lock_memory(), *keep_only(kept), *seccomp.confine(frozenset({seccomp.Keeps.PROGRAMS}))]
    for failure in failures:
        _say(f"this host does not allow all of the confinement: {failure}")
    holder = Holder(start_engine)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, holder.signalled)
    # Not through the interpreter's end: there is nothing to clean up that the kernel does not.
    os._exit(holder.run(0))
