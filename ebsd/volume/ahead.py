"""Opening ahead: the sealed layers that a volume's map names are opened before a request needs them.

After thousands of snapshots nearly every chunk may lie in a layer of its own. The first request that meets one opens
its file, derives its key and, to copy from it, reads its leaf file: 50 us, and the way through Python besides.

1. One pass of an engine, from when it serves, beside the device: a burst, and a pause while there are requests. What is
   sealed later is one layer for each snapshot, and is opened when it is used.
2. What may wait for a disk is done in a thread and holds no claim; the engine takes what is still of use.
3. It fills the room that there is, and pushes nothing out. An engine without room ends the pass for good.
4. What cannot be opened is passed over: the request that needs it is told.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Collection, Sequence
from typing import Final

import trio

from ebsd.domain.errors import EbsdError
from ebsd.domain.units import CHUNKS_PER_SEGMENT
from ebsd.store.entries import ENTRY, HOLE
from ebsd.volume.engine import BlockEngine, Opened
from ebsd.volume.scheduling import Scheduler

log = logging.getLogger("ebsd-volume")

BURST: Final = 32
"""Layers between two pauses: two milliseconds of one processor."""

PAUSE_FACTOR: Final = 3.0
"""How many times as long as a burst the pause after it is, while there are requests."""

_BLOCK: Final = 16384
"""Entries that are looked at together; a divisor of those of a segment."""

_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)


class LookAhead:
    """The pass of one engine. For the event loop of that engine."""

    def __init__(self, engine: BlockEngine, scheduler: Scheduler) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._running = False
        self.opened = 0
        """Segments that the engine took."""

    async def run(self) -> None:
        """Make the pass, unless ``end`` comes before its end. Raises nothing that is not a bug."""
        self._running = True
        try:
            with self._scope:
                await self.make_pass()
        finally:
            self._ended.set()

    async def end(self) -> None:
        """Stop where it is; at return it does nothing any more, nor later."""
        self._scope.cancel()
        if self._running:
            await self._ended.wait()

    async def make_pass(self) -> None:
        """Open what the map names, from the first chunk on, while the engine has room."""
        engine = self._engine
        seen = {HOLE}
        first, before = 0, b""
        try:
            while engine.room_ahead and (block := engine.entries_of(first, _BLOCK)):
                if first % CHUNKS_PER_SEGMENT == 0:
                    seen, before = {HOLE}, b""  # another file of each layer
                if block != before:
                    found = await self._scheduler.blocking(_new_places, block, seen)
                    seen.update(layer for _, layer in found)
                    for at in range(0, len(found), BURST):
                        if not await self._burst([(first + place, layer) for place, layer in found[at : at + BURST]]):
                            return
                first, before = first + len(block) // ENTRY, block
        finally:
            engine.let_pages_go()
        log.debug("%d segments opened ahead", self.opened)

    async def _burst(self, places: Sequence[tuple[int, int]]) -> bool:
        """Open a few, and pause; False when no more can be opened."""
        engine, began = self._engine, time.monotonic()
        before = engine.requests
        wanted = [(chunk, layer) for chunk, layer in places if engine.is_of_use_ahead(chunk, layer)]
        if wanted:
            opened = await self._scheduler.blocking(self._open, wanted[: engine.room_ahead])
            # No await up to the end: what was opened is kept or closed.
            self.opened += sum([engine.take_opened(each) for each in opened if each is not None])
            if None in opened:
                return False
        busy = engine.requests != before
        await self._scheduler.sleep(PAUSE_FACTOR * (time.monotonic() - began) if busy else 0)
        return engine.room_ahead > 0

    def _open(self, places: Sequence[tuple[int, int]]) -> list[Opened | None]:
        """Open (chunk, layer)s; None at the end: there are no descriptors. For a thread."""
        opened: list[Opened | None] = []
        for chunk, layer in places:
            try:
                opened.append(self._engine.open_ahead(chunk, layer))
            except (EbsdError, OSError) as exc:
                if getattr(exc, "errno", None) in _NO_DESCRIPTORS:
                    return [*opened, None]
        return opened


def _new_places(block: bytes, seen: Collection[int]) -> list[tuple[int, int]]:
    """Return (place, value) of values of entries that were not seen, each once, in order of their first place."""
    values = memoryview(block).cast("I").tolist()
    if not set(values).difference(seen):
        return []
    first = dict(zip(reversed(values), range(len(values) - 1, -1, -1), strict=True))
    return sorted((place, value) for value, place in first.items() if value not in seen)


__all__ = ["BURST", "PAUSE_FACTOR", "LookAhead"]
