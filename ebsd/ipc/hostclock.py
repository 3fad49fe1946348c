"""The host's two clocks, watched: the broker's keys and ebsd's locks end by the same rule."""

from __future__ import annotations

import time

from ebsd.domain.clockwatch import ClockWatch


def host_clock() -> ClockWatch:
    """Return a watch of the wall clock and of the boot-time clock, which begins now."""
    return ClockWatch(time.time, _boottime)


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the host is suspended, as time itself does
