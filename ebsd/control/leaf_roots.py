"""Fetching what volume processes sign a second time: the records of snapshots, with the root of their leaves.

A snapshot is complete without it. Its volume process hashes the sealed layer in the background, and ebsd asks now and
then until there is nothing left: after a snapshot, after it took the process over, and when it has stopped.
"""

from __future__ import annotations

import logging
from typing import Final

import trio

from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.lineages import Lineages
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.volume_link import VolumeLink
from ebsd.domain.errors import EbsdError, SnapshotNotFound, VolumeNotAnswering
from ebsd.domain.ids import SnapshotId, parse_snapshot_id

log = logging.getLogger(__name__)

POLL_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Pauses between two questions: short ones first, for a small layer is hashed at once."""


class LeafRoots:
    """Brings signed records from volume processes to the disk, and the floors of their anchors after them."""

    def __init__(
        self, catalogue: Catalogue, broker: Broker, files: SnapshotFiles, lineages: Lineages, nursery: trio.Nursery
    ) -> None:
        self._catalogue = catalogue
        self._broker = broker
        self._files = files
        self._lineages = lineages
        self._nursery = nursery
        self._followed: dict[VolumeLink, bool] = {}
        """Link -> whether more was to come since it was asked the last time."""

    def follow(self, link: VolumeLink) -> None:
        """Ask this process from now on, until it has nothing left."""
        if link not in self._followed:
            self._nursery.start_soon(self._follow, link)
        self._followed[link] = True

    async def _follow(self, link: VolumeLink) -> None:
        pauses = iter(POLL_SECONDS)
        try:
            while True:
                await trio.sleep(next(pauses, POLL_SECONDS[-1]))
                if self._followed[link]:
                    self._followed[link] = False
                    pauses = iter(POLL_SECONDS)
                try:
                    more = await self.collect(link)
                except VolumeNotAnswering:
                    more = await link.answering()
                if not more and not self._followed[link]:
                    return
        except (EbsdError, OSError) as exc:
            if not link.stopping:
                log.warning("the leaves of %s: %s", link.volume, exc)
        finally:
            self._followed.pop(link, None)

    async def collect(self, link: VolumeLink) -> bool:
        """Fetch and store what there is; say whether there may be more. Raises EbsdError, OSError."""
        pending, records = await link.hashed([])
        for snapshot, (generation, signed) in records.items():
            await self.store(parse_snapshot_id(snapshot), generation, signed)
        if records:
            pending, _ = await link.hashed(list(records))
        return pending

    async def store(self, ident: SnapshotId, generation: int, signed: bytes) -> bool:
        """Put a record that was signed again into its place, then raise the floor; False when it is not wanted.

        It is not when the snapshot is gone, or its record on the disk is not exactly one generation older.
        """
        try:
            snapshot = await self._catalogue.run(lambda t: t.snapshot(ident))
        except SnapshotNotFound:
            return False
        async with self._lineages.lock(snapshot.lineage):
            if not await trio.to_thread.run_sync(self._files.sign_again, ident, generation, signed):
                return False
            await self._broker.raise_floor_soon(ident, generation)
            await self._catalogue.run(lambda t: t.set_authority(ident, None))
        return True
