"""The reader's seat: which task reads the next request of a connection, without a pass of the event loop for each.

Nearly all requests of a block file are answered without waiting, so the task that answered one reads the next directly,
and hands over only when its request has to wait. One task at most is the reader; the others are parked.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import Any

import trio


class Seat:
    """The reader's seat of one connection. ``on_empty`` is called when it is given up and nobody is parked."""

    def __init__(self, on_empty: Callable[[], None] = lambda: None) -> None:
        self._on_empty = on_empty
        self.reader: trio.lowlevel.Task | None = None
        self.parked = trio.lowlevel.ParkingLot()
        self.ended = False
        self.suspended = 0
        """Requests that wait for something; while there are any, the event loop is not held up at all."""

    async def take(self) -> bool:
        """Wait until the running task is the reader; False at the end of the connection."""
        task = trio.lowlevel.current_task()
        while self.reader is not task:
            if self.ended:
                return False
            if self.reader is None:
                self.reader = task
                break
            await self.parked.park()
        return not self.ended

    def end(self) -> None:
        """The connection has ended: nobody reads any more."""
        self.ended = True
        self.reader = None
        self.parked.unpark_all()

    def hand_over(self) -> None:
        """Give the seat up when the running task has it: its request is about to wait, somebody else reads on."""
        if self.reader is trio.lowlevel.current_task():
            self.reader = None
            if not self.parked.unpark():
                self._on_empty()


def drive(handler: Coroutine[Any, Any, Any], seat: Seat | None) -> Generator[Any, Any, Any]:
    """Run a handler, and give the reader's seat up at its first suspension; returns or raises what it does."""
    try:
        trap = handler.send(None)
    except StopIteration as done:
        return done.value
    if seat is not None:
        seat.suspended += 1
        seat.hand_over()
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
        if seat is not None:
            seat.suspended -= 1
