"""Turns: which of pyfuse3's tasks reads the next request, without a pass of the event loop for each.

pyfuse3 goes through trio for every request: a lock, a registration and two epoll_wait. Nearly all requests of a block
file are answered without waiting, so the task that answered one reads the next directly, and hands over only when its
request has to wait. Measured on a busy two-core VM with 4 KiB random reads at depth 1: 34 instead of 88 us of CPU per
request, 2.5 times the requests.

1. One task at most is the reader. It hands over when its handler suspends; the others are parked.
2. trio gets a turn at least every LOOP_SECONDS, and at once when a request waits for something.
3. It takes the place of ``pyfuse3._wait_fuse_readable``, which is private; where that is missing, pyfuse3 goes its
   own way.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Coroutine, Generator
from typing import Any, Final

import pyfuse3
import trio

log = logging.getLogger(__name__)

POLL_MS: Final = 1
"""How long a wait for the next request may hold up the event loop, while no request waits for anything."""

LOOP_SECONDS: Final = 0.002
"""How long requests may follow each other before the event loop has its turn."""

_HOOK: Final = "_wait_fuse_readable"
_AT_THE_END: Final = select.POLLERR | select.POLLHUP | select.POLLNVAL


class Turns:
    """The reader's seat of one FUSE connection."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._reader: trio.lowlevel.Task | None = None
        self._parked = trio.lowlevel.ParkingLot()
        self._ended = False
        self._last_turn = 0.0
        self.suspended = 0
        """Requests that wait for something; while there are any, the event loop is not held up at all."""

    async def wait(self) -> bool:
        """Return True when a request can be read, False at the end of the connection: pyfuse3's contract."""
        task = trio.lowlevel.current_task()
        while self._reader is not task:
            if self._ended:
                return False
            if self._reader is None:
                self._reader = task
                break
            await self._parked.park()
        events: list[tuple[int, int]] = []
        if time.monotonic() - self._last_turn < LOOP_SECONDS:
            events = self._poll.poll(0 if self.suspended else POLL_MS)
        if not events:
            try:
                await trio.lowlevel.wait_readable(self._fd)
            except trio.ClosedResourceError:
                return self._end()
            except BaseException:
                self.hand_over()  # cancelled: the seat must not be left with a task that is gone
                raise
            self._last_turn = time.monotonic()
            events = self._poll.poll(0)
        if events and events[0][1] & _AT_THE_END:
            return self._end()
        return True  # without an event, what was there is gone: libfuse's read answers EAGAIN, and pyfuse3 comes again

    def _end(self) -> bool:
        self._ended = True
        self._reader = None
        self._parked.unpark_all()
        return False

    def hand_over(self) -> None:
        """Give the seat up when the running task has it: its request is about to wait, somebody else reads on."""
        if self._reader is trio.lowlevel.current_task():
            self._reader = None
            self._parked.unpark()


_turns: Turns | None = None


def install(fd: int) -> None:
    """Have pyfuse3's tasks take turns on this connection; one per process, as pyfuse3 has one session."""
    global _turns
    if not hasattr(pyfuse3, _HOOK):
        log.warning("this pyfuse3 has no %s: requests go through the event loop, which is slower", _HOOK)
        return
    _turns = Turns(fd)
    setattr(pyfuse3, _HOOK, _turns.wait)


def drive(handler: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Run a handler, and give the reader's seat up at its first suspension; returns or raises what it does."""
    try:
        trap = handler.send(None)
    except StopIteration as done:
        return done.value
    turns = _turns
    if turns is not None:
        turns.suspended += 1
        turns.hand_over()
    try:
        while True:
            try:
                sent = yield trap
            except BaseException as exc:  # noqa: BLE001 - a cancellation is the handler's to see
                trap = handler.throw(exc)
            else:
                trap = handler.send(sent)
    except StopIteration as done:
        return done.value
    finally:
        if turns is not None:
            turns.suspended -= 1
