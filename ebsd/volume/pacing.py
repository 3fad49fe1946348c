"""Keeping the thread of a job to a number of bytes per second, which may be changed while it works."""

from __future__ import annotations

import heapq
import threading
import time
from typing import Final

LOOK_SECONDS: Final = 0.1
"""A waiting thread notices after so long that the limit has changed."""


class Pacer:
    """One thread at a time spends, any other may change the limit."""

    def __init__(self, rate: int = 0) -> None:
        """``rate``: bytes per second, 0 for no limit."""
        self._rate = rate
        self._debt = 0.0
        """Bytes that were spent and not earned yet."""
        self._at = time.monotonic()

    def limit(self, rate: int) -> None:
        self._rate = rate

    def spend(self, count: int, stopping: threading.Event) -> None:
        """Return when ``count`` further bytes have been earned, or ``stopping`` is set.

        Time in which nothing is spent earns nothing: there is no burst after a pause.
        """
        if not self._rate:
            self._debt, self._at = 0.0, time.monotonic()
            return
        # The step itself took time, which counts; what was earned before it does not.
        self._debt = max(self._debt, 0.0) + count
        while (rate := self._rate) and not stopping.is_set():
            now = time.monotonic()
            self._debt -= (now - self._at) * rate
            self._at = now
            if self._debt <= 0:
                return
            stopping.wait(min(self._debt / rate, LOOK_SECONDS))


class PacerOfMany:
    """Any threads spend, each at a place of its own: of those that wait, the one with the least goes first.

    What is done in the order of places then gets on at the rate, whichever thread asks first.
    """

    def __init__(self, rate: int = 0) -> None:
        """``rate``: bytes per second, 0 for no limit."""
        self._pacer = Pacer(rate)
        self._changed = threading.Condition()
        self._waiting: list[int] = []
        """A heap of places."""
        self._busy = False
        self.limit = self._pacer.limit

    def spend(self, place: int, count: int, stopping: threading.Event) -> None:
        """Return when ``count`` further bytes have been earned for ``place``, or ``stopping`` is set."""
        with self._changed:
            heapq.heappush(self._waiting, place)
            self._changed.wait_for(lambda: not self._busy and self._waiting[0] == place)
            heapq.heappop(self._waiting)
            self._busy = True
        try:
            self._pacer.spend(count, stopping)
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
