"""Draining: what little a volume has left in old layers of its own moves into its head, so that the layers can go.

A layer that snapshots named stays when they are deleted, as long as the volume has one chunk in it. ebsd says which
sealed layers no other map names; each chunk that is moved is an ordinary copy-on-write (``BlockEngine.drain``).

1. Few chunks are moved at once; of many layers the smallest go first. So each chunk is moved a number of times that
   grows with the logarithm of the volume, and the layers that stay are bounded.
2. Beside the device: a little per second while there are requests, half of the time while there are none. Each burst
   is flushed, so that nobody's flush has to write back more than one. It begins when the layers were hashed, so that
   what is copied is compared with its leaf.
3. Where space is low nothing is moved. A chunk that cannot be read keeps its layer, and its damage stays to be seen.
4. What is cut costs nothing: a chunk is in its old layer or in the head. What was moved is told to ebsd, which gives
   layers and chunks back by the rules of the sweep.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Final

import trio

from ebsd.domain.errors import EbsdError
from ebsd.domain.units import CHUNK, MIB
from ebsd.store.entries import ENTRY, HOLE
from ebsd.volume.engine import BlockEngine, EngineClosed, EngineFailed
from ebsd.volume.scheduling import Event, Scheduler
from ebsd.volume.spacegate import NO_SPACE_ERRORS

log = logging.getLogger("ebsd-volume")

SMALL: Final = 16 * MIB // CHUNK
"""Chunks: a layer with no more is drained at once. The deletion that made it exclusive cost more than moving that."""

MANY: Final = 32
"""Larger exclusive layers that may stay. One more, and the smallest are drained until KEPT stay."""

KEPT: Final = 16
"""Half of MANY: fewer would move large layers often, more would be at it all the time."""

BURST: Final = MIB // CHUNK
"""Chunks between two pauses. A flush of somebody else may have to write back so much more."""

BUSY_PAUSE: Final = 1.0
"""Seconds between two bursts while there are requests: 1 MiB per second takes 1 % of a slow disk."""

_BLOCK: Final = 16384
"""Entries that are looked at together."""


def to_drain(chunks: Mapping[int, int], exclusive: Collection[int]) -> frozenset[int]:
    """Choose layers; ``chunks``: layer -> how many the map names in it."""
    mine = sorted((chunks[layer], layer) for layer in exclusive if chunks.get(layer))
    large = [layer for count, layer in mine if count > SMALL]
    chosen = {layer for count, layer in mine if count <= SMALL}
    if len(large) > MANY:
        chosen.update(large[: len(large) - KEPT])
    return frozenset(chosen)


class Drainer:
    """Drains the layers of one volume, a pass at a time. For the event loop of its engine."""

    def __init__(
        self,
        engine: BlockEngine,
        scheduler: Scheduler,
        *,
        is_ample: Callable[[int], bool] = lambda chunks: True,
        forget_all_but: Callable[[Collection[int]], None] = lambda layers: None,
    ) -> None:
        """``is_ample``: whether so many chunks may be written; ``forget_all_but`` hears which layers are in use."""
        self._engine = engine
        self._scheduler = scheduler
        self._is_ample = is_ample
        self._forget_all_but = forget_all_but
        self._wanted: Event = scheduler.event()
        self._scope: trio.CancelScope | None = None
        self._ended: Event = scheduler.event()
        self._damaged: set[int] = set()
        """Layers with a chunk that could not be read; the next process tries again."""
        self.pending = False
        """A pass is under way, or to come."""
        self.moved = 0
        """Chunks that the last pass moved."""

    def begin(self, layers: Collection[int]) -> None:
        """Have a pass look at these layers, which no other map names, and at no others from now on."""
        self._engine.let_drain(layers)
        self.pending = True
        self._wanted.set()

    async def run(self, is_ready: Callable[[], bool]) -> None:
        """Make the passes that are wanted until ``end``, each when ``is_ready``. Raises nothing that is not a bug."""
        try:
            with trio.CancelScope() as self._scope:
                while True:
                    await self._wanted.wait()
                    self._wanted = self._scheduler.event()
                    while not is_ready():
                        await self._scheduler.sleep(BUSY_PAUSE)
                    await self.make_pass()
        finally:
            self._ended.set()

    async def end(self) -> None:
        """Stop where it is; at return it does nothing any more."""
        if self._scope is not None:
            self._scope.cancel()
            await self._ended.wait()

    async def make_pass(self) -> None:
        """Choose and drain. What fails is logged; a later pass goes on where this one ended."""
        self.pending, self.moved = True, 0
        try:
            await self._make_pass()
        except (EbsdError, OSError) as exc:
            if not isinstance(exc, (EngineClosed, EngineFailed)):
                log.warning("draining ends for now: %s", exc)
        finally:
            self.pending = False
            self._engine.let_pages_go()

    async def _make_pass(self) -> None:
        engine = self._engine
        chunks = await self._count()
        # What is unlinked keeps its blocks as long as somebody has it open.
        engine.close_all_but(chunks)
        self._forget_all_but(chunks)
        layers = self._affordable(to_drain(chunks, engine.exclusive - self._damaged), chunks)
        if layers:
            try:
                await self._drain(layers)
            finally:
                log.info("%d chunks of %d layers drained", self.moved, len(layers))
            await engine.flush()

    async def _count(self) -> Counter[int]:
        """Return layer -> chunks that the map names in it; of chunks that change meanwhile it may be either layer."""
        chunks: Counter[int] = Counter()
        found: Counter[int] = Counter()
        first, before = 0, b""
        while block := self._engine.entries_of(first, _BLOCK):
            if block != before:
                found = await self._scheduler.blocking(_counted, block)
            chunks.update(found)
            first, before = first + _BLOCK, block
        del chunks[HOLE]
        return chunks

    def _affordable(self, layers: frozenset[int], chunks: Mapping[int, int]) -> set[int]:
        """Return those that there is space for, before any of theirs is given back."""
        needed, affordable = 0, set()
        for layer in sorted(layers, key=lambda layer: chunks[layer]):
            needed += chunks[layer]
            if self._is_ample(needed):
                affordable.add(layer)
        return affordable

    async def _drain(self, layers: set[int]) -> None:
        engine, burst = self._engine, _Burst(self._engine, self._scheduler)
        first = 0
        while block := engine.entries_of(first, _BLOCK):
            for at, layer in await self._scheduler.blocking(_places, block, frozenset(layers)):
                if layer in self._damaged:
                    continue
                if not self._is_ample(1):
                    return
                if await self._move(first + at, layer):
                    await burst.count()
            first += len(block) // ENTRY

    async def _move(self, chunk: int, layer: int) -> bool:
        """Drain one chunk; raises what ends the pass: no space, or an engine that has stopped."""
        try:
            moved = await self._engine.drain(chunk)
        except (EbsdError, OSError) as exc:
            if isinstance(exc, EngineClosed | EngineFailed) or getattr(exc, "errno", None) in NO_SPACE_ERRORS:
                raise
            log.error("chunk %d stays in layer %d: %s", chunk, layer, exc)
            self._damaged.add(layer)
            return False
        self.moved += moved
        return moved


class _Burst:
    """The pace: after BURST chunks a flush and a pause."""

    def __init__(self, engine: BlockEngine, scheduler: Scheduler) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._begin()

    def _begin(self) -> None:
        self._chunks, self._began, self._requests = 0, time.monotonic(), self._engine.requests

    async def count(self) -> None:
        self._chunks += 1
        if self._chunks < BURST:
            return
        busy = self._engine.requests != self._requests
        await self._engine.flush()
        took = time.monotonic() - self._began
        await self._scheduler.sleep(max(BUSY_PAUSE, took) if busy else took)
        self._begin()


def _counted(block: bytes) -> Counter[int]:
    return Counter(memoryview(block).cast("I"))


def _places(block: bytes, layers: Collection[int]) -> list[tuple[int, int]]:
    """Return (place, layer) of the entries that name one of these layers."""
    return [(at, layer) for at, layer in enumerate(memoryview(block).cast("I")) if layer in layers]


__all__ = ["BURST", "KEPT", "MANY", "SMALL", "Drainer", "to_drain"]
