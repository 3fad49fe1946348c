"""How the engine waits in a volume process: trio events, and worker threads for what may wait for a disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import trio

T = TypeVar("T")


class TrioScheduler:
    """The production ``Scheduler``: points cost one call, syncs leave the event loop to other requests."""

    async def point(self, name: str) -> None:
        """A named place between two steps; nothing happens here in production."""

    async def blocking(self, fn: Callable[..., T], *args: Any) -> T:
        """Run in a thread, to its end: whether a sync happened must be known, so it is never abandoned."""
        # Not abandoned by a cancellation: that is trio's default for threads.
        return await trio.to_thread.run_sync(fn, *args)

    def event(self) -> trio.Event:
        return trio.Event()

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        """Call ``ready`` on this loop whenever ``fd`` is readable, until the loop ends; ``ready`` reads it empty."""

        async def watching() -> None:
            while True:
                await trio.lowlevel.wait_readable(fd)
                ready()

        trio.lowlevel.spawn_system_task(watching)
