"""Says whether the host's wall clock may be trusted with what cannot be undone.

That is the end of a key's waiting period, of a snapshot's lock, of what lies in the recycle bin. A wrong clock at
boot (an empty battery, before the network's time has come) or a jump of years would end all of them at once. So nothing
of the kind happens before the wall clock has gone as evenly as the boot-time clock for a while. KMS itself deletes up
to 24 hours after the date (KMS API reference, ScheduleKeyDeletion).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

SETTLED_SECONDS: Final = 3600.0
"""How long the two clocks have to agree: long enough for a host to ask the network for the time after its boot."""

TOLERANCE: Final = 60.0
"""Seconds that the clocks may drift apart between two looks; steps of NTP below that are of no consequence here."""


class ClockWatch:
    """Two clocks, in seconds, looked at by ``look`` from time to time."""

    def __init__(self, wall: Callable[[], float], steady: Callable[[], float]) -> None:
        self._wall = wall
        self._steady = steady
        self._last = self._since = (wall(), steady())

    def look(self) -> bool:
        """Compare both clocks with the last look; return whether they have agreed for SETTLED_SECONDS."""
        now = (self._wall(), self._steady())
        wall_went, steady_went = now[0] - self._last[0], now[1] - self._last[1]
        if abs(wall_went - steady_went) > TOLERANCE:
            self._since = now
        self._last = now
        return now[1] - self._since[1] >= SETTLED_SECONDS
