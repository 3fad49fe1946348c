"""Space of the state directory: what is free, what may still be made, and the ballast that deletions draw on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

import trio

from ebsd.domain.errors import NoSpace
from ebsd.domain.space import LOW, SpaceLimits, SpaceState
from ebsd.domain.units import format_size
from ebsd.store.ballast import Ballast
from ebsd.store.disk import Disk

log = logging.getLogger(__name__)

TEND_SECONDS: Final = 10.0
"""How often the ballast is built up again."""


class Space:
    """The file system of one state directory, and the limits kept on it."""

    def __init__(self, disk: Disk, root: Path, ballast_file: Path, limits: SpaceLimits) -> None:
        self._disk = disk
        self._root = root
        self.limits = limits
        # Built only while the state stays ok: it must not be what makes a disk short.
        self.ballast = Ballast(disk, ballast_file, limits.ballast, LOW * limits.reserve)

    def free(self) -> int:
        """Return the bytes that are free, as df shows them."""
        usage = self._disk.statvfs(self._root)
        return usage.f_bavail * usage.f_frsize

    def state(self) -> SpaceState:
        return self.limits.state(self.free())

    async def require(self, needed: int = 0) -> None:
        """Raise NoSpace unless something new may be made that takes ``needed`` bytes at once."""
        free = await trio.to_thread.run_sync(self.free)
        if self.limits.allows(free, needed):
            return
        kept = f"{format_size(free)} are free, and {format_size(self.limits.reserve)} are kept for what is there"
        wanted = f"for {format_size(needed)} " if needed else ""
        raise NoSpace(where=f"{wanted}in {self._root}: {kept}")

    def describe(self) -> dict[str, Any]:
        """Return the Space of io.ebsd.Control, without what is stored."""
        usage = self._disk.statvfs(self._root)
        free = usage.f_bavail * usage.f_frsize
        return {
            "State": self.limits.state(free).value,
            "TotalBytes": usage.f_blocks * usage.f_frsize,
            "FreeBytes": free,
            "ReserveBytes": self.limits.reserve,
            "BallastBytes": self.ballast.size,
        }

    async def tend(self) -> None:
        """Build the ballast, again and again, and say in the log when the state of the space changes."""
        known = SpaceState.OK
        while True:
            await trio.to_thread.run_sync(self.ballast.build)
            try:
                present = await trio.to_thread.run_sync(self.state)
            except OSError as exc:
                log.error("the space of %s cannot be told: %s", self._root, exc)
                present = known
            if present is not known:
                free = format_size(await trio.to_thread.run_sync(self.free))
                level = logging.INFO if present is SpaceState.OK else logging.WARNING
                log.log(level, "space: %s, %s free in %s", present.value, free, self._root)
                known = present
            await trio.sleep(TEND_SECONDS)
