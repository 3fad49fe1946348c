"""Draining, ebsd's part: it knows which layers only one volume names, tells its process, and gives back what was left.

1. After an attachment or an adoption, after a deletion in the lineage, and now and then: a volume that is written to
   leaves chunks in old layers, too, and a drain that found no space tries again.
2. No lock is held while a process drains, and none is waited for with: a process that does not answer is met by a
   question that holds none.
3. What it does not get to do costs space until the next time.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import Final

import trio

from ebsd.control.catalogue import Catalogue
from ebsd.control.host import Host
from ebsd.control.lineages import Lineages
from ebsd.control.volume_link import VolumeLink
from ebsd.domain.errors import EbsdError, NotSupported, RemoteError
from ebsd.domain.ids import LineageId, VolumeId
from ebsd.domain.model import Volume

log = logging.getLogger(__name__)

SETTLE_SECONDS: Final = 3.0
"""After what makes a look worth while: snapshots are often deleted one after the other."""

ROUND_SECONDS: Final = 3600.0
"""Between two looks that nothing asked for. One reads the maps of the nearest relatives and all of the live map."""

POLL_SECONDS: Final = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Pauses between two questions whether a process has done."""

MAX_LAYERS: Final = 10_000
"""Layers, the oldest, that are told at once: they must fit a packet."""


class Drains:
    """Follows the attached volumes, one task each."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        lineages: Lineages,
        links: Mapping[VolumeId, VolumeLink],
        nursery: trio.Nursery,
    ) -> None:
        self._enabled = host.drain
        self._catalogue = catalogue
        self._lineages = lineages
        self._links = links
        self._nursery = nursery
        self._wanted: dict[VolumeId, tuple[LineageId, trio.Event]] = {}
        """Of each volume that is followed: its lineage, and what is set to have a look at it."""
        lineages.on_sweep = self._want

    def follow(self, volume: Volume, link: VolumeLink) -> None:
        """Look after an attached volume from now on, until its process is another one."""
        if not self._enabled or volume.attachment is None or volume.attachment.read_only:
            return
        if volume.id in self._wanted:
            self._wanted[volume.id][1].set()  # for the task of the process before, which ends then
        self._wanted[volume.id] = volume.lineage, trio.Event()
        self._nursery.start_soon(self._follow_drains, volume.id, volume.lineage, link)

    def _want(self, lineage: LineageId) -> None:
        for where, wanted in self._wanted.values():
            if where == lineage:
                wanted.set()

    async def _follow_drains(self, ident: VolumeId, lineage: LineageId, link: VolumeLink) -> None:
        while True:
            await trio.sleep(SETTLE_SECONDS)
            if self._links.get(ident) is not link:
                return
            wanted = trio.Event()
            self._wanted[ident] = lineage, wanted
            try:
                await self._round(ident, link)
            except (EbsdError, OSError) as exc:
                if isinstance(exc, RemoteError) and exc.code == NotSupported.code:
                    return  # a process of an earlier version
                if not link.stopping:
                    log.warning("%s is not drained: %s", ident, exc)
            with trio.move_on_after(ROUND_SECONDS):
                await wanted.wait()

    async def _round(self, ident: VolumeId, link: VolumeLink) -> None:
        await link.drained()
        while await self.begin(ident):
            for pause in itertools.chain(POLL_SECONDS, itertools.repeat(POLL_SECONDS[-1])):
                await trio.sleep(pause)
                if not (await link.drained()).pending:
                    break
            if not await self.collect(ident):
                return

    async def begin(self, ident: VolumeId) -> bool:
        """Tell a volume's process what it may drain; False when nobody can say that now. Raises EbsdError, OSError."""
        link = self._links.get(ident)
        volume = await self._catalogue.run(lambda t: t.volume(ident))
        async with self._lineages.lock(volume.lineage):
            layers = await self._lineages.exclusive_layers(ident, volume.lineage)
            if layers is None or link is None:
                return False
            await link.drain(layers[:MAX_LAYERS])
        return True

    async def collect(self, ident: VolumeId) -> int:
        """Give back what a volume has left; returns the chunks that its last drain moved. Raises EbsdError, OSError."""
        link = self._links.get(ident)
        if link is None:
            return 0
        volume = await self._catalogue.run(lambda t: t.volume(ident))
        moved = await self._lineages.take_left(ident, volume.lineage, link)
        if moved:
            log.info("%s: %d chunks drained", ident, moved)
        return moved
