"""One volume's part in a snapshot of several: it waits for the others with its requests held, and never for long.

1. ``arrived``: everything slow is done (flush, copy of the map), requests still run. Waited for without a hurry.
2. ``holding``: the engine has claimed everything. From here to the switch nothing is answered that was not answered
   before, so whoever says "go" after the last of all volumes came here has one moment for all of them (rule R26).
3. Who is left alone gives up by itself: after HOLD_SECONDS, or at once when ebsd's connection ends. What was given up
   seals nothing, ever: a later "go" is refused, and the set with it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from ebsd.domain.errors import EbsdError, SnapshotSetFailed
from ebsd.ipc.incidents import as_ebsd_error, log_incident

HOLD_SECONDS: Final = 5.0
"""How long requests are held at most for the sake of the other volumes: far below what makes a file system complain."""

GATHER_SECONDS: Final = 120.0
"""How long a volume that is ready waits for the others, whose flush may take long; it serves requests meanwhile."""


class Meeting:
    """One seal that waits for others. ``run`` is a task of its own; the rest is asked by ebsd, in this order."""

    def __init__(self, volume: str, snapshot: str) -> None:
        self._volume = volume
        self.snapshot = snapshot
        self._arrived = trio.Event()
        self._may_hold = trio.Event()
        self._held = trio.Event()
        self._go = trio.Event()
        self._ended = trio.Event()
        self._given_up: str | None = None
        self._answer: dict[str, Any] | None = None
        self._error: EbsdError | None = None

    # --- the engine's side

    async def run(self, seal: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        """Seal, which calls ``arrived`` and ``holding``; whatever it raises is the answer. Raises nothing."""
        try:
            self._answer = await seal()
        except Exception as exc:  # noqa: BLE001 - an answer, as that of a request; the process serves its volume on
            self._error = as_ebsd_error(exc, log_incident)
        finally:
            self._ended.set()
            for event in (self._arrived, self._held):
                event.set()

    async def arrived(self) -> None:
        self._arrived.set()
        with trio.move_on_after(GATHER_SECONDS):
            await self._may_hold.wait()
        self._refuse(waited=self._may_hold, seconds=GATHER_SECONDS)

    async def holding(self) -> None:
        self._held.set()
        with trio.move_on_after(HOLD_SECONDS):
            await self._go.wait()
        self._refuse(waited=self._go, seconds=HOLD_SECONDS)

    def _refuse(self, *, waited: trio.Event, seconds: float) -> None:
        if self._given_up is None and not waited.is_set():
            self._given_up = f"the other volumes did not come within {seconds:.0f} seconds"
        if self._given_up is not None:
            raise SnapshotSetFailed(volume=self._volume, reason=self._given_up)

    # --- ebsd's side

    async def gathered(self) -> None:
        """Return when the volume is ready to hold its requests; raises what went wrong instead."""
        await self._arrived.wait()
        self._check()

    async def hold(self) -> None:
        """Return when the requests are held; raises what went wrong instead."""
        self._may_hold.set()
        await self._held.wait()
        self._check()

    async def go(self) -> dict[str, Any]:
        """Seal now, and return the answer; raises SnapshotSetFailed when it is too late."""
        self._go.set()
        await self._ended.wait()
        self._check()
        if self._answer is None:
            raise AssertionError("BUG: a seal without an answer or an error")
        return self._answer

    async def give_up(self, reason: str) -> None:
        """Let requests go on at once, unless the word was given already; returns when the seal is over."""
        self.let_go(reason)
        await self._ended.wait()

    def let_go(self, reason: str) -> None:
        """As ``give_up``, without waiting."""
        if self._given_up is None and not self._go.is_set() and not self._ended.is_set():
            self._given_up = reason
            self._may_hold.set()
            self._go.set()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
