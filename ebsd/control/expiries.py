"""What ends by the clock: locks of snapshots, and what lies in the recycle bin; looked at every minute.

Nothing ends before the wall clock has gone evenly for an hour (``domain.clockwatch``): a jump destroys nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from ebsd.control.host import Host
from ebsd.domain.errors import EbsdError
from ebsd.ipc.incidents import as_ebsd_error, log_incident

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 60.0


class Expiries:
    """Calls what lets time pass, for as long as ebsd serves."""

    def __init__(self, host: Host, looks: Sequence[Callable[[], Awaitable[None]]]) -> None:
        self._host = host
        self._looks = looks

    async def tend(self) -> None:
        while True:
            await self.look()
            await trio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Let what is over end, when the clock is to be trusted; what fails is tried again at the next look."""
        if not self._host.clock_is_even():
            return
        for look in self._looks:
            try:
                await look()
            except (EbsdError, OSError) as exc:
                log.error("what is over by the clock could not be ended, and is tried again: %s", exc)
            except Exception as exc:  # noqa: BLE001 - a bug here must not end ebsd, and again at each start
                log.error("what is over by the clock could not be ended: %s", as_ebsd_error(exc, log_incident))
