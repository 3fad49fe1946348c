"""Lineages: one lock each, and the sweep that gives back what no volume or snapshot of them names any more."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import trio

from ebsd.control.catalogue import Catalogue
from ebsd.control.lineage_files import LineageFiles
from ebsd.control.volume_link import VolumeLink
from ebsd.domain.errors import EbsdError, StoreDamaged
from ebsd.domain.ids import LineageId, VolumeId
from ebsd.domain.model import Layer, LayerState, Snapshot, Volume
from ebsd.domain.states import SnapshotState, VolumeState
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)


class Lineages:
    """Serialises what changes the set of maps and layers of a lineage: snapshot, restore, delete, sweep.

    Lock order: a volume's lock before its lineage's.
    """

    def __init__(self, catalogue: Catalogue, files: LineageFiles, links: Mapping[VolumeId, VolumeLink]) -> None:
        self._catalogue = catalogue
        self._files = files
        self._links = links
        self._locks: dict[LineageId, trio.Lock] = {}

    def lock(self, lineage: LineageId) -> trio.Lock:
        return self._locks.setdefault(lineage, trio.Lock())

    async def sweep(self, lineage: LineageId) -> None:
        """Punch what no map names and remove layers that none does; the caller holds the lineage's lock.

        A failure costs space, never data: it is logged, and the next deletion or start tries again.
        """
        try:
            await self._sweep(lineage)
        except (EbsdError, OSError) as exc:
            log.error("lineage %s: space could not be given back: %s", lineage, exc)

    async def _sweep(self, lineage: LineageId) -> None:
        def load(t: Transaction) -> tuple[list[Volume], list[Snapshot], list[Layer]]:
            # Volumes and snapshots by what the catalog says of each; whether that is all of them is checked below.
            return t.lineage_volumes(lineage), t.lineage_snapshots(lineage), t.layers(lineage)

        volumes, snapshots, layers = await self._catalogue.run(load)
        await self._refuse_doubtful(lineage, layers)
        if not volumes and not snapshots:
            await trio.to_thread.run_sync(self._files.remove_lineage, lineage)
            await self._catalogue.run(lambda t: t.remove_lineage(lineage))
            self._locks.pop(lineage, None)
            return
        if not may_sweep(volumes, snapshots):
            log.info("lineage %s: not swept, something in it is being made or waits for its detach", lineage)
            return
        for volume in volumes:
            link = self._links.get(volume.id)
            if volume.attachment is not None:
                if link is None:
                    return
                # A whole flush that began after the last seal: from here on the durable map names whatever sealed layer
                # the live one does, and later changes only go to the head or to 0.
                await link.flush()
        report = await trio.to_thread.run_sync(
            self._files.sweep, lineage, volumes, snapshots, protected_layers(volumes, layers)
        )
        gone = set(report.removed)

        def note(t: Transaction) -> None:
            for number in gone:
                t.remove_layer(lineage, number)

        await self._catalogue.run(note)
        if report.removed or report.punched_chunks:
            log.info("lineage %s: %d layers removed, %d chunks punched", lineage, len(gone), report.punched_chunks)

    async def tidy(self) -> None:
        """Remove half-written files, and sweep every lineage once: at start, before any request.

        Whole files that no row of the catalog names are left alone: the catalog may be the one that is wrong.
        """
        for path in await trio.to_thread.run_sync(self._files.remove_temporary):
            log.warning("removed %s, which was never finished", path)
        for lineage in await self._catalogue.run(lambda t: t.lineages()):
            async with self.lock(lineage):
                await self.sweep(lineage)

    async def _refuse_doubtful(self, lineage: LineageId, layers: list[Layer]) -> None:
        """Raise unless the catalog knows everything that may name chunks of this lineage.

        A sweep trusts the catalog with data. A restored or edited one may lack a volume whose files are there, or say
        that it belongs to another lineage; then nothing may be given back.
        """

        def load(t: Transaction) -> tuple[set[str], set[str]]:
            volumes, snapshots = t.volumes(), t.snapshots()
            known = {*(v.id for v in volumes), *(s.id for s in snapshots), *t.removing()}
            elsewhere = {str(v.id) for v in volumes if v.lineage != lineage}
            elsewhere |= {str(s.id) for s in snapshots if s.lineage != lineage}
            return known, elsewhere

        known, elsewhere = await self._catalogue.run(load)
        strangers = await trio.to_thread.run_sync(self._files.resources_on_disk) - known
        if strangers:
            names = ", ".join(sorted(strangers)[:5])
            raise StoreDamaged(file="catalog", reason=f"it does not know {names}, whose records are there")
        moved = {str(layer.volume) for layer in layers} & elsewhere
        if moved:
            raise StoreDamaged(
                file="catalog", reason=f"it says of {min(moved)} that it is of another lineage than its layers"
            )


def may_sweep(volumes: list[Volume], snapshots: list[Snapshot]) -> bool:
    """Say whether every map of the lineage is known: nothing is half made, no live map waits to be salvaged."""
    if any(snapshot.state is SnapshotState.PENDING for snapshot in snapshots):
        return False
    return not any(volume.state in (VolumeState.CREATING, VolumeState.ERROR) for volume in volumes)


def protected_layers(volumes: list[Volume], layers: list[Layer]) -> frozenset[int]:
    """Return the layers the sweep may not touch: heads, layers being made, and all that an attached process may write.

    An attached process writes to its attachment's head or, while a snapshot is being taken, to a later one that was
    made for the same volume.
    """
    protected = {volume.head for volume in volumes}
    protected |= {layer.number for layer in layers if layer.state is LayerState.CREATING}
    for volume in volumes:
        if volume.attachment is not None:
            first = volume.attachment.head
            protected |= {layer.number for layer in layers if layer.volume == volume.id and layer.number >= first}
    return frozenset(protected)
