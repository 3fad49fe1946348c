"""Space: how much of the store's file system is kept free, and what a state of it is called. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ebsd.domain.units import GIB, MIB

DEFAULT_FULL_WAIT: Final = 30.0
"""Seconds: long enough for somebody or something to delete a snapshot, short of the 120 s after which the kernel
complains of hung tasks."""

MAX_FULL_WAIT: Final = 86400.0

LOW: Final = 3
"""Times the reserve: with less free space than that the state is ``low``."""


LARGEST_WRITE: Final = MIB
"""Bytes above the reserve that a write may need at once; with less room some are refused."""


class SpaceState(StrEnum):
    """What the free space of the store allows."""

    OK = "ok"
    LOW = "low"
    FULL = "full"
    """Below the reserve: nothing new is made, and volumes take no new chunks."""


@dataclass(frozen=True, slots=True)
class SpaceLimits:
    """The limits in force; sizes in bytes."""

    reserve: int
    """Free space that new chunks leave alone: metadata, punches and deletions need it."""
    ballast: int
    """Length of the ballast file when there is room for it."""
    full_wait: float
    """Seconds for which a write waits for space before it fails."""

    def allows(self, free: int, needed: int = 0) -> bool:
        """Say whether something new that takes ``needed`` bytes may be made with this many free bytes."""
        return free - needed >= self.reserve + LARGEST_WRITE

    def state(self, free: int) -> SpaceState:
        """Return the state for this many free bytes."""
        if not self.allows(free):
            return SpaceState.FULL
        return SpaceState.LOW if free < LOW * self.reserve else SpaceState.OK


def space_limits(total: int, *, reserve: int | None, ballast: int | None, full_wait: float | None) -> SpaceLimits:
    """Return the limits for a file system of ``total`` bytes; what is None gets its default.

    The reserve is 1 % of the file system, between 4 MiB and 1 GiB; the ballast 1 %, between 1 MiB and 256 MiB.
    """
    return SpaceLimits(
        min(max(total // 100, 4 * MIB), GIB) if reserve is None else reserve,
        min(max(total // 100, MIB), 256 * MIB) if ballast is None else ballast,
        DEFAULT_FULL_WAIT if full_wait is None else full_wait,
    )
