"""How the engine waits: the few things it asks of an event loop, so that any loop, or a test's dice, can drive it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Event(Protocol):
    """Set once; never cleared."""

    def set(self) -> None: ...

    async def wait(self) -> object: ...


class Scheduler(Protocol):
    """What an event loop gives the engine. ``trio.Event`` and ``trio.to_thread.run_sync`` fit."""

    async def point(self, name: str) -> None:
        """A named place where a test may preempt, kill or fail. In production: returns at once, no checkpoint."""
        ...

    async def blocking(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function that may block for long (fdatasync), outside the loop. Not abandoned by a cancellation."""
        ...

    def event(self) -> Event: ...

    async def sleep(self, seconds: float) -> None:
        """Let others go on for about this long. A cancellation ends it."""
        ...


class _NeverEvent:
    """The event of a scheduler with a single task: who waits for an event that is not set waits for ever."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    async def wait(self) -> None:
        if not self._is_set:
            raise AssertionError("BUG: the only task waits for an event that nobody can set")


class DirectScheduler:
    """Runs everything at once, in the caller's thread: for tests, tools and recovery."""

    async def point(self, name: str) -> None:
        """Nothing."""

    async def blocking(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)

    def event(self) -> Event:
        return _NeverEvent()

    async def sleep(self, seconds: float) -> None:
        """Nothing: nobody else would go on."""


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Drive a coroutine that never really waits, to its end; returns or raises what it does."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise AssertionError("BUG: a coroutine under DirectScheduler waited")
