"""Lineages: nothing of one is given back while it is read; and what its maps use, for long lists."""

from __future__ import annotations

import errno
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ebsd.control.catalogue import Catalogue
from ebsd.control.lineage_files import LineageFiles, MapsOfLineage, Usages
from ebsd.control.lineages import Lineages
from ebsd.control.sharing import Sharing
from ebsd.control.snapshots import Snapshots
from ebsd.control.volume_link import Drained
from ebsd.domain.ids import AccountId, LineageId, SnapshotId, VolumeId
from ebsd.domain.model import Caller, Cipher, Integrity, Lineage, Snapshot
from ebsd.domain.states import SnapshotState
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.store.catalog import Catalog, Transaction
from ebsd.store.usage import Usage

pytestmark = pytest.mark.trio
LINEAGE = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
ACCOUNT = AccountId("000000001000")
VOLUME = VolumeId("vol-0123456789abcdef0")
OTHER = LineageId("00000000-9dad-41d1-80b4-00c04fd430c8")


class Sweeps(Lineages):
    """Counts the sweeps that were not put off."""

    def __init__(self) -> None:
        super().__init__(None, None, {})  # type: ignore[arg-type]
        self.swept: list[LineageId] = []

    async def _refuse_doubtful(self, lineage: LineageId, *args: Any) -> None:
        self.swept.append(lineage)
        raise OSError("no further")


@pytest.mark.parametrize("how", ["sweep", "sweep_whole"])
async def test_a_lineage_that_is_read_is_swept_when_the_last_reader_has_ended(how: str) -> None:
    lineages = Sweeps()
    sweep = getattr(lineages, how)
    with lineages.reading(LINEAGE):
        with lineages.reading(LINEAGE):
            await sweep(LINEAGE)
            await sweep(OTHER)
        await lineages.catch_up(LINEAGE)
        assert lineages.swept == [OTHER]
    await lineages.catch_up(LINEAGE)
    assert lineages.swept == [OTHER, LINEAGE]
    await lineages.catch_up(LINEAGE)
    assert lineages.swept == [OTHER, LINEAGE], "nothing was put off since"
    await sweep(LINEAGE)
    assert lineages.swept == [OTHER, LINEAGE, LINEAGE]


async def test_a_reader_that_fails_reads_no_more() -> None:
    lineages = Sweeps()
    with pytest.raises(ValueError, match="broken"), lineages.reading(LINEAGE):
        raise ValueError("broken")
    await lineages.sweep(LINEAGE)
    assert lineages.swept == [LINEAGE]


class TidiedFiles(LineageFiles):
    """Files of a store that has nothing but temporary ones."""

    def __init__(self) -> None:
        self.kept: set[str] = set()

    def remove_temporary(self, unfinished: Collection[str] = ()) -> list[Path]:
        self.kept = set(unfinished)
        return []


async def test_the_map_that_a_process_sealed_for_a_pending_snapshot_outlives_the_start(tmp_path) -> None:
    """Its record could not be written at the start, for lack of space say; later it can, and wants the map."""
    catalog = Catalog(tmp_path / "catalog")
    pending = replace(snapshot(1), state=SnapshotState.PENDING)

    def fill(t: Transaction) -> None:
        t.add_lineage(Lineage(LINEAGE, ACCOUNT, SECTOR, Cipher.NONE))
        t.add_snapshot(pending)
        t.add_snapshot(snapshot(2))

    catalog.run(fill)
    files = TidiedFiles()
    lineages = Lineages(Catalogue(catalog, None), files, {})  # type: ignore[arg-type]
    with lineages.reading(LINEAGE):  # no sweep: there are no files
        await lineages.tidy()
    assert files.kept == {pending.id}
    catalog.close()


# --- usages


def snapshot(number: int) -> Snapshot:
    return Snapshot(
        id=SnapshotId(f"snap-{number:017x}"), account=ACCOUNT, owner="o", name=f"s{number}", volume=VOLUME, size=CHUNK,
        state=SnapshotState.COMPLETED, message="", description="", cipher=Cipher.NONE, key_arn=None, wrapped_key=None,
        context={}, lineage=LINEAGE, new_head=0, integrity=Integrity.NEW, authority=None, pause_us=None,
        started=f"{number // 3:03d}", completed=None,
    )  # fmt: skip


class CountingFiles(LineageFiles):
    """Says that a map uses as many bytes as the maps were looked at times."""

    def __init__(self) -> None:
        self.looked = 0

    def usages(self, maps: MapsOfLineage) -> Usages:
        self.looked += 1
        return Usages(dict.fromkeys(maps.snapshots, Usage(self.looked, 0, 0)), 0.0)


async def test_the_maps_are_looked_at_once_for_all_pages_of_a_list(tmp_path) -> None:
    files = CountingFiles()
    catalog = Catalog(tmp_path / "catalog")

    def fill(t: Transaction) -> None:
        t.add_lineage(Lineage(LINEAGE, ACCOUNT, SECTOR, Cipher.NONE))
        for number in range(20):
            t.add_snapshot(snapshot(number))

    catalog.run(fill)
    catalogue = Catalogue(catalog, None)  # type: ignore[arg-type]
    lineages = Lineages(catalogue, files, {})
    sharing = Sharing(catalogue, None)  # type: ignore[arg-type]
    snapshots = Snapshots(  # type: ignore[arg-type]
        None, catalogue, None, None, None, None, lineages, {}, None, sharing, None
    )
    for admin in (False, True):  # whether the account is a condition
        caller = Caller(1000, "somebody", ACCOUNT, is_admin=admin)
        files.looked = 0
        seen, token = [], None
        while True:
            found, token = await snapshots.describe(caller, None, [], 3, token)
            seen += found
            if token is None:
                break
        assert [s["SnapshotId"] for s in seen] == [snapshot(number).id for number in range(20)]
        assert {s["AllocatedBytes"] for s in seen} == {1}
    found, _ = await snapshots.describe(caller, None, [], 3)
    assert {s["AllocatedBytes"] for s in found} == {2}, "another list looks again"
    catalog.close()


async def test_the_catalog_is_asked_again_only_after_it_changed(tmp_path: Any) -> None:
    other = LineageId("11111111-2222-4333-8444-555555555555")
    files = CountingFiles()
    catalog = Catalog(tmp_path / "catalog")

    def fill(t: Transaction) -> None:
        for lineage in (LINEAGE, other):
            t.add_lineage(Lineage(lineage, ACCOUNT, SECTOR, Cipher.NONE))
        t.add_snapshot(snapshot(1))

    catalog.run(fill)
    lineages = Lineages(Catalogue(catalog, None), files, {})  # type: ignore[arg-type]
    assert set(await lineages.usages([LINEAGE, other])) == {snapshot(1).id}
    assert set(await lineages.usages([LINEAGE, other])) == {snapshot(1).id}
    assert files.looked == 4, "files change without the catalog"
    catalog.run(lambda t: t.add_snapshot(replace(snapshot(2), lineage=other)))
    assert set(await lineages.usages([LINEAGE, other])) == {snapshot(1).id, snapshot(2).id}
    with pytest.raises(ZeroDivisionError):
        catalog.run(lambda t: (t.add_snapshot(snapshot(3)), 1 // 0))
    assert set(await lineages.usages([LINEAGE, other])) == {snapshot(1).id, snapshot(2).id}
    catalog.close()


class UnreadableFiles(CountingFiles):
    """Has one lineage whose maps cannot be read."""

    def usages(self, maps: MapsOfLineage) -> Usages:
        if snapshot(1).id in maps.snapshots:
            raise OSError(errno.EIO, "broken")
        return super().usages(maps)


async def test_what_cannot_be_read_of_one_lineage_is_left_out(tmp_path: Any) -> None:
    other = LineageId("11111111-2222-4333-8444-555555555555")
    catalog = Catalog(tmp_path / "catalog")

    def fill(t: Transaction) -> None:
        for lineage in (LINEAGE, other):
            t.add_lineage(Lineage(lineage, ACCOUNT, SECTOR, Cipher.NONE))
        t.add_snapshot(snapshot(1))
        t.add_snapshot(replace(snapshot(2), lineage=other))

    catalog.run(fill)
    lineages = Lineages(Catalogue(catalog, None), UnreadableFiles(), {})  # type: ignore[arg-type]
    assert set(await lineages.usages([LINEAGE, other])) == {snapshot(2).id}
    catalog.close()


class Attached:
    """A catalog, and the process of a volume that has left layer 4 and that nobody else has a part of."""

    def __init__(self, *, settled: bool) -> None:
        self.done: list[str] = []
        self._transaction = SimpleNamespace(
            is_settled=lambda lineage: settled,
            note_left=lambda ident, layers: self.done.append(f"note {sorted(layers)}"),
            kin=lambda ident: None,
        )

    async def run(self, use_case: Any) -> Any:
        return use_case(self._transaction)

    async def drained(self, taken: frozenset[int] = frozenset()) -> Drained:
        self.done.append(f"take {sorted(taken)}" if taken else "ask")
        return Drained(False, 1, frozenset((4,)))


VOLUME = VolumeId("vol-0123456789abcdef0")


async def test_what_a_volume_left_is_taken_when_it_is_noted() -> None:
    attached = Attached(settled=True)
    lineages = Lineages(attached, None, {})  # type: ignore[arg-type]
    assert await lineages.take_left(VOLUME, LINEAGE, attached) == 1  # type: ignore[arg-type]
    assert attached.done == ["ask", "note [4]", "take [4]"]


async def test_what_a_volume_left_is_not_asked_for_while_a_snapshot_is_pending() -> None:
    """It may be what was left before that: behind it nobody names such a layer, and yet its parent may."""
    attached = Attached(settled=False)
    lineages = Lineages(attached, None, {})  # type: ignore[arg-type]
    assert await lineages.take_left(VOLUME, LINEAGE, attached) == 0  # type: ignore[arg-type]
    assert attached.done == []
