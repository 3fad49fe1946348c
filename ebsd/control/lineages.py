"""Lineages: one lock each, and the sweep that gives back what no volume or snapshot of them names any more."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from ebsd.control.catalogue import Catalogue
from ebsd.control.lineage_files import LineageFiles, MapsOfLineage, Usages, protected_by
from ebsd.control.volume_link import VolumeLink
from ebsd.domain.errors import EbsdError, StoreDamaged
from ebsd.domain.ids import LineageId, VolumeId
from ebsd.domain.model import Layer, LayerState, Snapshot, Volume
from ebsd.domain.states import SnapshotState, VolumeState
from ebsd.store.catalog import Transaction
from ebsd.store.catalog_family import Kin
from ebsd.store.sweep import SweepReport
from ebsd.store.usage import Usage

log = logging.getLogger(__name__)

MANY_RELATIVES: Final = 16
"""Nearest relatives of one map up to which those of each are looked at, too."""

LONG: Final = 0.25
"""Seconds: what takes longer to compute is not computed for every view."""

LISTING: Final = 30.0
"""Seconds for which the pages of one list show usages of one moment."""

TOGETHER: Final = 50
"""Lineages whose usages are computed in one go of a thread: to change threads takes longer than to look at a map that
is known."""

FEW_MAPS: Final = 100
"""Maps of a lineage up to which all of them are read at each start."""


class Lineages:
    """Serialises what changes the set of maps and layers of a lineage: snapshot, restore, delete, sweep.

    Lock order: a volume's lock before its lineage's.
    """

    def __init__(self, catalogue: Catalogue, files: LineageFiles, links: Mapping[VolumeId, VolumeLink]) -> None:
        self._catalogue = catalogue
        self._files = files
        self._links = links
        self._locks: dict[LineageId, trio.Lock] = {}
        self._readers: Counter[LineageId] = Counter()
        self._postponed: set[LineageId] = set()
        self._usages: dict[LineageId, tuple[float, frozenset[str], Usages]] = {}
        """When usages were computed, of which resources, and what they are."""
        self._maps: dict[LineageId, MapsOfLineage] = {}
        """What the catalog says that usages are computed from, for as long as nothing changes in it."""
        self._maps_as_of = -1
        self._complete = False
        """The catalog is known to have a row for every volume and snapshot whose files are there."""
        self.on_sweep: Callable[[LineageId], None] = lambda lineage: None
        """Called after each sweep of what was deleted: layers may have become a volume's own."""
        self._consistent: set[LineageId] = set()
        """Lineages whose volumes the catalog does not place elsewhere."""

    def lock(self, lineage: LineageId) -> trio.Lock:
        return self._locks.setdefault(lineage, trio.Lock())

    @contextlib.contextmanager
    def reading(self, lineage: LineageId) -> Iterator[None]:
        """Keep every chunk and layer of a lineage while it is read: until then nothing is given back, only noted."""
        self._readers[lineage] += 1
        try:
            yield
        finally:
            self._readers[lineage] -= 1
            if not self._readers[lineage]:
                del self._readers[lineage]

    async def catch_up(self, lineage: LineageId) -> None:
        """Give back what was deleted while the lineage was read; nothing when somebody still reads it."""
        if lineage not in self._postponed or lineage in self._readers:
            return
        self._postponed.discard(lineage)
        async with self.lock(lineage):
            await self.sweep(lineage)

    def _is_read(self, lineage: LineageId) -> bool:
        if lineage not in self._readers:
            return False
        self._postponed.add(lineage)
        log.info("lineage %s: not swept, it is being verified", lineage)
        return True

    async def sweep(self, lineage: LineageId) -> None:
        """Give back what was deleted from a lineage and is named by nobody else; the caller holds the lineage's lock.

        A failure costs space, never data: it is logged, and the next deletion or start tries again.
        """
        try:
            await self._sweep(lineage)
        except (EbsdError, OSError) as exc:
            log.error("lineage %s: space could not be given back: %s", lineage, exc)
        self.on_sweep(lineage)

    async def _sweep(self, lineage: LineageId) -> None:
        if self._is_read(lineage):
            return
        await self._refuse_doubtful(lineage)
        deleted, empty, settled = await self._catalogue.run(
            lambda t: (t.removing_of(lineage), t.is_empty(lineage), t.is_settled(lineage))
        )
        if empty:
            await self._remove(lineage, deleted)
        elif settled:
            for kin in deleted:
                await self._sweep_deleted(kin)
            await self._give_back(lineage)
        else:
            log.info("lineage %s: not swept, something in it is being made or waits for its detach", lineage)

    async def _remove(self, lineage: LineageId, deleted: Sequence[Kin]) -> None:
        await trio.to_thread.run_sync(self._files.remove_lineage, lineage)
        for kin in deleted:
            await trio.to_thread.run_sync(self._files.remove_map, kin.id)

        def forget(t: Transaction) -> None:
            for kin in deleted:
                t.end_removing(kin.id)
            t.remove_lineage(lineage)

        await self._catalogue.run(forget)
        self._locks.pop(lineage, None)
        self._usages.pop(lineage, None)

    async def _sweep_deleted(self, deleted: Kin) -> None:
        """Compare the map of what was deleted with those of its nearest relatives; then its map goes, too."""

        def load(t: Transaction) -> _Surroundings:
            own = t.layers_of(deleted.writer, deleted.first, deleted.beyond)
            return _surroundings(t, deleted, t.relatives(deleted), {*own, *deleted.left})

        if await self._compare(deleted.lineage, deleted.id, await self._catalogue.run(load)):
            await trio.to_thread.run_sync(self._files.remove_map, deleted.id)
            await self._catalogue.run(lambda t: t.end_removing(deleted.id))

    async def usages(self, lineages: Collection[LineageId], *, continued: bool = False) -> dict[str, Usage]:
        """Return what each volume and snapshot of these lineages uses; without those of which it cannot be told.

        Of an attached volume it is what its durable map says, which the last flush wrote. Where finding out takes
        long, what was found is shown for ten times as long, unless something was made or deleted meanwhile. A page that
        continues a list shows what was found for the pages before: to look at all maps again for each page of many
        resources would cost the square of their number.
        """
        found: dict[str, Usage] = {}
        stale: list[LineageId] = []
        for lineage in sorted(set(lineages)):
            known = self._usages.get(lineage)
            if known is not None and continued and trio.current_time() - known[0] < LISTING:
                found.update(known[2].of)
            else:
                stale.append(lineage)
        if stale:
            maps = await self._catalogue.run(lambda t: self._maps_of(t, stale))
            for at in range(0, len(maps), TOGETHER):
                found.update(await self._present_usages(maps[at : at + TOGETHER]))
        return found

    def _maps_of(self, t: Transaction, lineages: Sequence[LineageId]) -> list[tuple[LineageId, MapsOfLineage]]:
        if t.changes() != self._maps_as_of:
            self._maps, self._maps_as_of = {}, t.changes()
        for lineage in lineages:
            if lineage not in self._maps:
                self._maps[lineage] = _maps_of(t, lineage)
        return [(lineage, self._maps[lineage]) for lineage in lineages]

    async def _present_usages(self, lineages: Sequence[tuple[LineageId, MapsOfLineage]]) -> dict[str, Usage]:
        found: dict[str, Usage] = {}
        due: list[tuple[LineageId, frozenset[str], MapsOfLineage]] = []
        for lineage, maps in lineages:
            names = frozenset((*maps.volumes, *maps.snapshots))
            known = self._usages.get(lineage)
            cost = 0.0 if known is None or known[1] != names else known[2].cost
            if known is not None and trio.current_time() - known[0] < (10 * cost if cost > LONG else 0.0):
                found.update(known[2].of)
            else:
                due.append((lineage, names, maps))
        if due:
            computed = await trio.to_thread.run_sync(self._compute_usages, [maps for _, _, maps in due])
            for (lineage, names, _), usages in zip(due, computed, strict=True):
                if isinstance(usages, Usages):
                    self._usages[lineage] = trio.current_time(), names, usages
                    found.update(usages.of)
                else:
                    log.warning("lineage %s: what it uses cannot be told: %s", lineage, usages)
        return found

    def _compute_usages(self, lineages: Sequence[MapsOfLineage]) -> list[Usages | Exception]:
        computed: list[Usages | Exception] = []
        for maps in lineages:
            try:
                computed.append(self._files.usages(maps))
            except (EbsdError, OSError) as exc:
                computed.append(exc)
        return computed

    async def sweep_left(self, ident: VolumeId, lineage: LineageId) -> None:
        """Give back what a volume has moved off older layers since its last snapshot, where no other map names it."""
        async with self.lock(lineage):
            try:
                await self._sweep_left(ident, lineage)
            except (EbsdError, OSError) as exc:
                log.error("lineage %s: space could not be given back: %s", lineage, exc)

    async def take_left(self, ident: VolumeId, lineage: LineageId, link: VolumeLink) -> int:
        """Give back what an attached volume has moved off older layers by now; returns what its last drain moved.

        Note first: told of, and lost by an ebsd that ends, it would stay until a whole sweep. Under the lineage's lock
        and with nothing pending, or what was left before a snapshot would be looked for behind it, where nobody names
        it. Raises EbsdError, OSError.
        """
        async with self.lock(lineage):
            if not await self._catalogue.run(lambda t: t.is_settled(lineage)):
                return 0
            drained = await link.drained()
            if drained.left:
                await self._catalogue.run(lambda t: t.note_left(ident, drained.left))
                await link.drained(drained.left)
            await self._sweep_left(ident, lineage)
            return drained.moved

    async def exclusive_layers(self, ident: VolumeId, lineage: LineageId) -> list[int] | None:
        """Return the sealed layers that no map but this volume's names, perhaps not even that; None: not now.

        The caller holds the lineage's lock. By the maps of the nearest relatives (``store/sweep.py``, rule 6); what
        attached ones have not flushed is not looked at, which may make a layer look shared that is not. Raises
        StoreDamaged, OSError.
        """

        def load(t: Transaction) -> tuple[list[str], set[int]] | None:
            kin = t.kin(ident)
            if kin is None or kin.deleted or not t.is_settled(lineage):
                return None
            return t.relatives(kin), {layer.number for layer in t.layers(lineage)} - t.written_layers(lineage)

        found = await self._catalogue.run(load)
        if found is None or len(found[0]) > MANY_RELATIVES:
            return None
        near, layers = found
        named = await trio.to_thread.run_sync(self._files.named_layers, near)
        return sorted(layers - named)

    async def _sweep_left(self, ident: VolumeId, lineage: LineageId) -> None:
        def load(t: Transaction) -> _Surroundings | None:
            kin = t.kin(ident)
            if kin is None or kin.deleted or not kin.left or not t.is_settled(lineage):
                return None
            return _surroundings(t, kin, [ident, *t.relatives(kin)], kin.left)

        around = await self._catalogue.run(load)
        if around is None or self._is_read(lineage) or len(around.near) > MANY_RELATIVES:
            return
        await self._refuse_doubtful(lineage)
        if await self._compare(lineage, None, around):
            await self._catalogue.run(lambda t: t.forget_left(ident, around.also))

    async def _compare(self, lineage: LineageId, deleted: str | None, around: _Surroundings) -> bool:
        with self._files.holding(around.attached) as held:
            if not await self._flush(around.attached):
                return False
            known = await trio.to_thread.run_sync(self._files.known_layers, lineage)
            layers = await self._catalogue.run(lambda t: t.layers(lineage, known))
            report = await trio.to_thread.run_sync(
                self._files.sweep_deleted, lineage, deleted, around.also, around.near, layers, around.written, held
            )
        await self._note(lineage, report)
        return True

    async def _flush(self, attached: Sequence[VolumeId]) -> bool:
        """Have attached volumes flush; says whether all did.

        A whole flush that began after the last seal: from here on the durable map names whatever sealed layer the live
        one does, and later changes only go to the head or to 0.
        """
        for ident in attached:
            link = self._links.get(ident)
            if link is None:
                return False
            await link.flush()
        return True

    async def _note(self, lineage: LineageId, report: SweepReport) -> None:
        def note(t: Transaction) -> None:
            for number in report.removed:
                t.remove_layer(lineage, number)

        if report.removed:
            await self._catalogue.run(note)
        if report.removed or report.punched_chunks:
            log.info(
                "lineage %s: %d layers removed, %d chunks punched", lineage, len(report.removed), report.punched_chunks
            )

    async def sweep_whole(self, lineage: LineageId) -> None:
        """Give back what no map of a lineage names, by reading all of them; the caller holds the lineage's lock."""
        try:
            await self._sweep_whole(lineage)
        except (EbsdError, OSError) as exc:
            log.error("lineage %s: space could not be given back: %s", lineage, exc)

    async def _sweep_whole(self, lineage: LineageId) -> None:
        def load(t: Transaction) -> tuple[list[Volume], list[Snapshot], list[Layer], list[Kin]]:
            # Volumes and snapshots by what the catalog says of each; whether that is all of them is checked below.
            return t.lineage_volumes(lineage), t.lineage_snapshots(lineage), t.layers(lineage), t.removing_of(lineage)

        if self._is_read(lineage):
            return
        await self._refuse_doubtful(lineage)
        volumes, snapshots, layers, deleted = await self._catalogue.run(load)
        if not volumes and not snapshots:
            await self._remove(lineage, deleted)
            return
        if not may_sweep(volumes, snapshots):
            log.info("lineage %s: not swept, something in it is being made or waits for its detach", lineage)
            return
        attached = [volume.id for volume in volumes if volume.attachment is not None]
        with self._files.holding(attached) as held:
            if not await self._flush(attached):
                return
            report = await trio.to_thread.run_sync(
                self._files.sweep, lineage, volumes, snapshots, layers, protected_layers(volumes, layers), held
            )
        await self._note(lineage, report)
        for kin in deleted:
            await trio.to_thread.run_sync(self._files.remove_map, kin.id)
            await self._catalogue.run(lambda t, kin=kin: t.end_removing(kin.id))  # type: ignore[misc]
        await self._give_back(lineage)

    async def give_back(self, lineage: LineageId) -> None:
        """Give back what was preallocated in layers that nobody writes to any more and that no map names.

        The caller holds the lineage's lock. As with ``sweep`` a failure costs space until the next sweep.
        """
        try:
            await self._give_back(lineage)
        except (EbsdError, OSError) as exc:
            log.error("lineage %s: preallocated space could not be given back: %s", lineage, exc)

    async def _give_back(self, lineage: LineageId) -> None:
        if not await self._catalogue.run(lambda t: t.preallocated_layers(lineage)):
            return

        def load(t: Transaction) -> tuple[list[Volume], list[Snapshot], list[Layer]]:
            return t.lineage_volumes(lineage), t.lineage_snapshots(lineage), t.layers(lineage)

        volumes, snapshots, layers = await self._catalogue.run(load)
        written = protected_layers(volumes, layers)
        kept = {layer.number for layer in layers if layer.preallocated and layer.number not in written}
        if not kept or not may_sweep(volumes, snapshots) or self._is_read(lineage):
            return
        await self._refuse_doubtful(lineage)
        attached = [volume.id for volume in volumes if volume.attachment is not None]
        with self._files.holding(attached) as held:
            if not await self._flush(attached):
                return
            report = await trio.to_thread.run_sync(
                self._files.give_back, lineage, volumes, snapshots, layers, kept, held
            )

        def note(t: Transaction) -> None:
            for number in kept:
                t.set_given_back(lineage, number)

        await self._catalogue.run(note)
        log.info("lineage %s: %d preallocated bytes given back", lineage, report.freed)

    async def tidy(self) -> None:
        """Remove half-written files, and give back what was left over: at start, before any request.

        What was deleted is noted until its chunks are given back. What else may have been lost sight of, as when a
        volume process was killed, is looked for where that is cheap.
        Whole files that no row of the catalog names are left alone: the catalog may be the one that is wrong.
        """
        unfinished = await self._catalogue.run(_unfinished)
        for path in await trio.to_thread.run_sync(self._files.remove_temporary, unfinished):
            log.warning("removed %s, which was never finished", path)
        for lineage in await self._catalogue.run(lambda t: t.lineages()):
            async with self.lock(lineage):
                if await self._catalogue.run(lambda t, lineage=lineage: t.map_count(lineage)) <= FEW_MAPS:  # type: ignore[misc]
                    await self.sweep_whole(lineage)
                else:
                    await self.sweep(lineage)

    async def _refuse_doubtful(self, lineage: LineageId) -> None:
        """Raise unless the catalog knows everything that may name chunks of this lineage.

        A sweep trusts the catalog with data. A restored or edited one may lack a volume whose files are there, or say
        that it belongs to another lineage; then nothing may be given back. Looked at once: while ebsd runs it holds
        the catalog, and rows precede files.
        """
        if not self._complete:
            known = await self._catalogue.run(lambda t: t.resources())
            strangers = await trio.to_thread.run_sync(self._files.resources_on_disk) - known
            if strangers:
                names = ", ".join(sorted(strangers)[:5])
                raise StoreDamaged(file="catalog", reason=f"it does not know {names}, whose records are there")
            self._complete = True
        if lineage not in self._consistent:
            moved = await self._catalogue.run(lambda t: t.moved_away(lineage))
            if moved:
                raise StoreDamaged(
                    file="catalog", reason=f"it says of {moved} that it is of another lineage than its layers"
                )
            self._consistent.add(lineage)


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What of the catalog a sweep by relatives needs, read at one moment."""

    near: dict[str, list[str] | None]
    """The nearest relatives, and theirs; None where that would be all of a family that nobody remembers."""
    also: frozenset[int]
    written: frozenset[int]
    attached: list[VolumeId]


def _surroundings(t: Transaction, kin: Kin, near: Sequence[str], also: Collection[int]) -> _Surroundings:
    few = len(near) <= MANY_RELATIVES
    beyond = {ident: _relatives_of(t, ident) if few else None for ident in near}
    everybody = {*near, *(ident for others in beyond.values() for ident in others or ())}
    # Their maps are read, so they must flush.
    attached = [ident for ident in t.attached_volumes() if ident in everybody]
    return _Surroundings(beyond, frozenset(also), t.written_layers(kin.lineage), attached)


def _maps_of(t: Transaction, lineage: LineageId) -> MapsOfLineage:
    """Return what usages are computed from. Without a row per layer: there may be ten thousand snapshots."""
    volumes: dict[str, frozenset[int]] = {
        volume.id: frozenset(
            (volume.head, *(t.layers_of(volume.id, volume.attachment.head, 0) if volume.attachment else ()))
        )
        for volume in t.lineage_volumes(lineage)
    }
    return MapsOfLineage(t.lineage_snapshot_ids(lineage), volumes, t.written_layers(lineage))


def _relatives_of(t: Transaction, ident: str) -> list[str] | None:
    kin = t.kin(ident)
    near = [] if kin is None else t.relatives(kin)
    return near if kin is not None and len(near) <= MANY_RELATIVES else None


def may_sweep(volumes: list[Volume], snapshots: list[Snapshot]) -> bool:
    """Say whether every map of the lineage is known: nothing is half made, no live map waits to be salvaged."""
    if any(snapshot.state is SnapshotState.PENDING for snapshot in snapshots):
        return False
    return not any(volume.state in (VolumeState.CREATING, VolumeState.ERROR) for volume in volumes)


def protected_layers(volumes: list[Volume], layers: list[Layer]) -> frozenset[int]:
    """Return the layers the sweep may not touch: heads, layers being made, all that an attached process may write."""
    made = frozenset(layer.number for layer in layers if layer.state is LayerState.CREATING)
    return made.union(*(protected_by(volume, layers) for volume in volumes))


def _unfinished(t: Transaction) -> set[str]:
    """Return what somebody goes on to make: a job, or a process that has sealed the map of a pending snapshot."""
    return {job.destination for job in t.active_jobs()} | {str(snapshot.id) for snapshot in t.pending_snapshots()}
