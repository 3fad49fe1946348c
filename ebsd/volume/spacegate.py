"""The gate for new chunks: below a floor of free space they wait, for a time, and then fail with ENOSPC.

1. Only what takes space asks: writes into the head, reads, discards, flushes and snapshots' deletions never do.
2. The gauge is not looked at for every write. A look gives credit, a sixteenth of the room above the floor, and holds
   for as long as the fastest disk would need to use that room up: the nearer to the floor, the more looks.
3. Who waits holds nothing: no claim, no lock, no pass. It asks again every POLL_SECONDS.
4. Patience belongs to the shortage, not to the request: it runs from the first write that was held up until one gets
   its space. Otherwise a write-back of a thousand dirty pages would take a thousand times the limit to fail.
5. ENOSPC and EDQUOT of the disk itself are a shortage too, whatever the gauge says: a quota is not on it.

The floor is soft. Several volumes share the room, and a write that was admitted may need more than its chunks; what
lies below the floor is there for that, and for what keeps the store alive: maps, records, the catalog, punches.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable
from typing import Final, Protocol

from ebsd.domain.space import LOW
from ebsd.domain.units import CHUNK, GIB
from ebsd.store.disk import Disk
from ebsd.volume.scheduling import Scheduler

NO_SPACE_ERRORS: Final = frozenset((errno.ENOSPC, errno.EDQUOT))

POLL_SECONDS: Final = 0.25
"""How often a write that waits asks again."""

MAX_WAITING: Final = 48
"""Writes that wait at once. The transport works on 64 requests; the rest is for those that need no space."""

_SHARE: Final = 16
"""Part of the room that one look gives as credit: many volumes may look at the same moment."""

_MAX_CREDIT: Final = 16384
"""Chunks, 1 GiB: what a look is good for on a disk with all the room in the world."""

_NO_LIMIT: Final = 1 << 40
"""Chunks: more than any file system has."""

_FASTEST: Final = 8 * GIB
"""Bytes per second: nothing fills a file system faster than this."""

_MAX_AGE: Final = 1.0
"""Seconds after which a look is repeated whatever the room: others write to the file system as well."""


class Gate(Protocol):
    """What the engine asks before and after it writes chunks that its head does not hold."""

    def admits(self, chunks: int) -> bool:
        """Say whether this many new chunks may be written now."""
        ...

    def written(self) -> None:
        """New chunks were written: the shortage, if there was one, is over."""
        ...

    def lend(self) -> tuple[int, float]:
        """Give away what is left of the credit of the last look: (chunks, until when by ``time.monotonic``).

        For a writer that does not ask for each write; it gives none of it back.
        """
        ...

    async def wait(self, since: float | None) -> float:
        """Wait a little after a refusal or an ENOSPC; returns when this request was first refused.

        ``since`` is what the last call for the same request returned, None at first. Raises OSError ENOSPC when
        the patience is at its end.
        """
        ...


class OpenGate:
    """Admits everything; an ENOSPC of the disk fails its request at once."""

    def admits(self, chunks: int) -> bool:
        """Always."""
        return True

    def written(self) -> None:
        """Nothing."""

    def lend(self) -> tuple[int, float]:
        """As much as there is, for ever."""
        return _NO_LIMIT, math.inf

    async def wait(self, since: float | None) -> float:
        """Not at all."""
        raise no_space()


def no_space() -> OSError:
    """Return the error of a write that found no space."""
    return OSError(errno.ENOSPC, "there is no space for new chunks")


class SpaceGate:
    """The gate of one volume, over the file system that holds its layers. For one event loop."""

    def __init__(
        self,
        *,
        disk: Disk,
        scheduler: Scheduler,
        fd: int,
        floor: int,
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``fd``: any descriptor on the file system, borrowed. ``floor`` in bytes, ``patience`` in seconds."""
        self._disk = disk
        self._scheduler = scheduler
        self._fd = fd
        self._floor = floor
        self._patience = patience
        self._clock = clock
        self._credit = 0
        self._valid_until = clock()
        self._refusing = False
        self._since: float | None = None
        """When the first write of the present shortage was held up."""
        self.hurried = False
        """Set while nobody shall wait any more: the volume is being detached."""
        self.waiting = 0
        """Writes that wait now."""
        self.waits = 0
        """Writes that had to wait, since the start."""
        self.failures = 0
        """Writes that failed for want of space, since the start."""

    @property
    def short(self) -> bool:
        """Whether writes are being held up, or failed, and none got its space since."""
        return self._since is not None

    def admits(self, chunks: int) -> bool:
        """See ``Gate``; looks at the gauge when the credit of the last look is used up or out of date."""
        self._credit -= chunks
        if self._credit >= 0 and self._clock() < self._valid_until:
            return True
        return self._look(chunks)

    def is_ample(self, chunks: int) -> bool:
        """Say whether so many chunks may be written that nobody has to have: afterwards the space is not even low."""
        if self.short:
            return False
        try:
            usage = self._disk.statvfs(self._fd)
        except OSError:
            return False
        return usage.f_bavail * usage.f_frsize - chunks * CHUNK >= LOW * self._floor

    def _look(self, chunks: int) -> bool:
        now = self._clock()
        if self._refusing and now < self._valid_until:
            return False
        try:
            usage = self._disk.statvfs(self._fd)
        except OSError:
            # A broken gauge must not stop writes: what the disk says to them counts.
            self._credit, self._valid_until, self._refusing = 0, now, False
            return True
        room = usage.f_bavail * usage.f_frsize - self._floor
        if room < chunks * CHUNK:
            self._credit, self._valid_until, self._refusing = 0, now + POLL_SECONDS / 2, True
            return False
        self._credit = min(room // CHUNK // _SHARE, _MAX_CREDIT) - chunks
        self._valid_until = now + min(room / _FASTEST, _MAX_AGE)
        self._refusing = False
        return True

    def written(self) -> None:
        """See ``Gate``."""
        self._since = None

    def lend(self) -> tuple[int, float]:
        """See ``Gate``."""
        chunks, self._credit = max(self._credit, 0), 0
        return chunks, self._valid_until

    async def wait(self, since: float | None) -> float:
        """See ``Gate``."""
        now = self._clock()
        if since is None:
            since = now
            self.waits += 1
        if self._since is None:
            self._since = now
        over = now - self._since >= self._patience or now - since >= self._patience
        if over or self.hurried or self.waiting >= MAX_WAITING:
            self.failures += 1
            raise no_space()
        self.waiting += 1
        try:
            await self._scheduler.sleep(POLL_SECONDS)
        finally:
            self.waiting -= 1
        return since
