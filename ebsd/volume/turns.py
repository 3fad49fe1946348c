"""Turns: pyfuse3's tasks read requests from a seat (``seats.py``) instead of going through trio for each.

pyfuse3 takes a lock, a registration and two epoll_wait for every request. Measured on a busy two-core VM with 4 KiB
random reads at depth 1: 34 instead of 88 us of CPU per request, 2.5 times the requests.

1. trio gets a turn at least every LOOP_SECONDS, and at once when a request waits for something.
2. It takes the place of ``pyfuse3._wait_fuse_readable``, which is private; where that is missing, pyfuse3 goes its
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

from ebsd.volume import seats
from ebsd.volume.seats import Seat

log = logging.getLogger(__name__)

POLL_MS: Final = 1
"""How long a wait for the next request may hold up the event loop, while no request waits for anything."""

LOOP_SECONDS: Final = 0.002
"""How long requests may follow each other before the event loop has its turn."""

_HOOK: Final = "_wait_fuse_readable"
_AT_THE_END: Final = select.POLLERR | select.POLLHUP | select.POLLNVAL


class Turns(Seat):
    """The reader's seat of one FUSE connection."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._last_turn = 0.0

    async def wait(self) -> bool:
        """Return True when a request can be read, False at the end of the connection: pyfuse3's contract."""
        if not await self.take():
            return False
        events: list[tuple[int, int]] = []
        if time.monotonic() - self._last_turn < LOOP_SECONDS:
            events = self._poll.poll(0 if self.suspended else POLL_MS)
        if not events:
            try:
                await trio.lowlevel.wait_readable(self._fd)
            except trio.ClosedResourceError:
                self.end()
                return False
            except BaseException:
                self.hand_over()  # cancelled: the seat must not be left with a task that is gone
                raise
            self._last_turn = time.monotonic()
            events = self._poll.poll(0)
        if events and events[0][1] & _AT_THE_END:
            self.end()
            return False
        return True  # without an event, what was there is gone: libfuse's read answers EAGAIN, and pyfuse3 comes again


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
    """Run a handler of pyfuse3 from the reader's seat; returns or raises what it does."""
    return seats.drive(handler, _turns)
