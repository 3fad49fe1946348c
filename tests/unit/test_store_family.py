"""The sweep by relatives: never more than the sweep that reads every map, and in the end as much.

A world of maps in memory over real layers, with the catalog's real family: writes, discards, snapshots, snapshots that
do not come into being, restores, copies, deletions in any order, deletions whose sweep comes later. EBSD_WORLDS=N runs
N worlds instead of 12.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebsd.domain.errors import StoreDamaged
from ebsd.domain.ids import AccountId, LineageId, SnapshotId, VolumeId
from ebsd.domain.model import Cipher, Integrity, LayerState, Lineage, Snapshot, Volume
from ebsd.domain.states import SnapshotState, VolumeState
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.store.catalog import Catalog, Transaction
from ebsd.store.disk import RealDisk
from ebsd.store.layers import create_layer, parse_segment_name, segment_name
from ebsd.store.layertable import LayerEntry, LayerTable
from ebsd.store.sweep import BLOCK, sweep, sweep_deleted

DISK = RealDisk()
LINEAGE = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
ACCOUNT = AccountId("000000001000")
CHUNKS = 12


class Memory:
    """A map in memory; remembers whether it was made durable."""

    def __init__(self, name: str, entries: list[int]) -> None:
        self.name = name
        self._entries = entries

    def read(self) -> Iterator[bytes]:
        raw = b"".join(entry.to_bytes(4, "little") for entry in self._entries)
        for at in range(0, len(raw), BLOCK):
            yield raw[at : at + BLOCK]

    def sync(self) -> None:
        pass


class World:
    """One lineage: its catalog, its layers and what every map holds."""

    def __init__(self, root: Path, dice: random.Random) -> None:
        self.dice = dice
        self.root = root / "layers"
        self.root.mkdir()
        self.dirfd = os.open(self.root, os.O_RDONLY)
        self.catalog = Catalog(root / "catalog")
        self.catalog.run(lambda t: t.add_lineage(Lineage(LINEAGE, ACCOUNT, SECTOR, Cipher.NONE)))
        self.entries: list[LayerEntry] = []
        self.maps: dict[str, list[int]] = {}
        """Everything that is there, pending ones included."""
        self.deleted: dict[str, list[int]] = {}
        """Deleted, and its sweep is still to come."""
        self.heads: dict[str, int] = {}
        self.left: dict[str, set[int]] = {}
        self.made = 0
        self.volume([0] * CHUNKS, None)

    def close(self) -> None:
        self.catalog.close()
        os.close(self.dirfd)

    # --- what happens to a lineage

    def _layer(self, t: Transaction, volume: str) -> int:
        uuid = (len(self.entries) + 1).to_bytes(16, "big")
        layer = t.add_layer(LINEAGE, uuid, VolumeId(volume), CHUNKS * CHUNK)
        t.set_layer_state(LINEAGE, layer.number, LayerState.HEAD)
        self.entries.append(LayerEntry(layer.number, uuid, VolumeId(volume)))
        create_layer(DISK, self.dirfd, layer.number, uuid, CHUNKS * CHUNK)
        return layer.number

    def _id(self, kind: str) -> str:
        self.made += 1
        return f"{kind}-{self.made:017x}"

    def volume(self, entries: list[int], source: str | None) -> None:
        ident = VolumeId(self._id("vol"))

        def make(t: Transaction) -> None:
            head = self._layer(t, ident)
            t.add_volume(_volume(ident, head))
            if source is not None:
                t.note_made_from(ident, SnapshotId(source))
            self.heads[ident] = head

        self.catalog.run(make)
        self.maps[ident] = list(entries)
        self.left[ident] = set()

    def write(self, volume: str) -> None:
        head = self.heads[volume]
        for chunk in self.dice.sample(range(CHUNKS), self.dice.randint(1, 5)):
            old = self.maps[volume][chunk]
            new = self.dice.choice((head, head, 0))
            if new:
                with self.path(head).open("r+b") as file:
                    file.seek(chunk * CHUNK)
                    file.write(b"x" * CHUNK)
            if old not in (0, head, new):
                self.left[volume].add(old)
            self.maps[volume][chunk] = new

    def snapshot(self, volume: str, *, abandoned: bool) -> None:
        ident = SnapshotId(self._id("snap"))

        def take(t: Transaction) -> Snapshot:
            head = self._layer(t, volume)
            t.set_volume_head(VolumeId(volume), head)
            snapshot = _snapshot(ident, VolumeId(volume), head)
            t.add_snapshot(snapshot)
            t.note_taken(snapshot)
            self.heads[volume] = head
            return snapshot

        snapshot = self.catalog.run(take)
        self.maps[ident] = list(self.maps[volume])
        if abandoned:

            def abandon(t: Transaction) -> None:
                t.note_not_taken(snapshot)
                t.remove_snapshot(ident)

            self.catalog.run(abandon)
            del self.maps[ident]
        else:
            self.note_left(volume, ident)

    def copy(self, source: str) -> None:
        ident = SnapshotId(self._id("snap"))

        def make(t: Transaction) -> None:
            t.add_snapshot(_snapshot(ident, VolumeId("vol-0123456789abcdef0"), 0))
            t.note_made_from(ident, SnapshotId(source))

        self.catalog.run(make)
        self.maps[ident] = list(self.maps[source])

    def delete(self, ident: str) -> None:
        def forget(t: Transaction) -> None:
            t.begin_removing(ident)
            if ident.startswith("vol-"):
                t.remove_volume(VolumeId(ident))
            else:
                t.remove_snapshot(SnapshotId(ident))

        self.catalog.run(forget)
        self.deleted[ident] = self.maps.pop(ident)
        self.heads.pop(ident, None)
        self.left.pop(ident, None)

    # --- sweeps

    def table(self) -> LayerTable:
        return LayerTable(LINEAGE, SECTOR, Cipher.NONE, tuple(self.entries))

    def path(self, layer: int) -> Path:
        return self.root / segment_name(layer, self.entries[layer - 1].uuid, 0)

    def sources(self, idents: list[str]) -> dict[str, Memory]:
        return {ident: Memory(ident, self.maps[ident]) for ident in idents}

    def near(self, t: Transaction, ident: str) -> list[str]:
        kin = t.kin(ident)
        assert kin is not None
        return t.relatives(kin)

    def sweep_deleted(self, ident: str) -> None:
        def load(t: Transaction):
            kin = t.kin(ident)
            assert kin is not None
            own = t.layers_of(kin.writer, kin.first, kin.beyond)
            return t.relatives(kin), {*own, *kin.left}

        near, also = self.catalog.run(load)
        self._compare(Memory(ident, self.deleted[ident]), also, near)
        del self.deleted[ident]
        self.catalog.run(lambda t: t.end_removing(ident))

    def sweep_left(self, volume: str) -> None:
        self.note_left(volume)
        near, left = self.catalog.run(lambda t: (self.near(t, volume), t.kin(volume).left))
        self._compare(None, left, [volume, *near])
        self.catalog.run(lambda t: t.forget_left(VolumeId(volume), left))

    def note_left(self, volume: str, resource: str | None = None) -> None:
        left, self.left[volume] = self.left[volume], set()
        self.catalog.run(lambda t: t.note_left(VolumeId(resource or volume), left))

    def _compare(self, deleted: Memory | None, also: set[int], near: list[str]) -> None:
        beyond, written = self.catalog.run(
            lambda t: ({other: self.near(t, other) for other in near}, t.written_layers(LINEAGE))
        )
        with self.watched():
            report = sweep_deleted(
                DISK,
                self.dirfd,
                self.table(),
                deleted=deleted,
                also=also,
                relatives=self.sources(near),
                beyond={other: list(self.sources(others).values()) for other, others in beyond.items()},
                protected=written,
            )
        self.note(report.removed)

    def sweep_whole(self) -> None:
        written = self.catalog.run(lambda t: t.written_layers(LINEAGE))
        maps = list(self.sources(list(self.maps)).values())
        self.note(sweep(DISK, self.dirfd, self.table(), protected=written, maps=maps).removed)

    def note(self, removed: tuple[int, ...]) -> None:
        for layer in removed:
            self.catalog.run(lambda t, layer=layer: t.remove_layer(LINEAGE, layer))

    # --- what must be

    def holdings(self) -> set[tuple[int, int]]:
        held = set()
        for name in os.listdir(self.root):
            parsed = parse_segment_name(name)
            assert parsed is not None
            data = (self.root / name).read_bytes()
            held |= {(parsed[0], c) for c in range(CHUNKS) if any(data[c * CHUNK : (c + 1) * CHUNK])}
        return held

    def layers(self) -> set[int]:
        return {parsed[0] for parsed in map(parse_segment_name, os.listdir(self.root)) if parsed is not None}

    def shared_layers(self) -> set[int]:
        """Layers that two maps or more name."""
        named = [layer for entries in self.maps.values() for layer in set(entries)]
        return {layer for layer in named if named.count(layer) >= 2}

    def own_layers(self) -> set[int]:
        """Layers that were made for the writing of what is there, or that its volume left before it was taken."""

        def load(t: Transaction) -> set[int]:
            kin = [each for each in map(t.kin, self.maps) if each is not None]
            own = {n for each in kin for n in t.layers_of(each.writer, each.first, each.beyond)}
            return own.union(*(each.left for each in kin))

        return self.catalog.run(load)

    def watched(self) -> Watched:
        return Watched(self)

    def check_family(self) -> None:
        """The catalog keeps a deleted one only as a joint of two others or more."""

        def check(t: Transaction) -> None:
            for row in t._rows("SELECT id FROM family"):
                if row[0] not in self.maps and row[0] not in self.deleted:
                    (children,) = t._rows("SELECT count(*) FROM family WHERE parent=?", row[0])[0]
                    assert children >= 2

        self.catalog.run(check)


class Watched:
    """Around a sweep: what went must be named by nobody, and lie in no layer that is written to."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __enter__(self) -> None:
        self.before, self.layers = self.world.holdings(), self.world.layers()

    def __exit__(self, *_: object) -> None:
        gone = self.before - self.world.holdings()
        named = {(layer, chunk) for entries in self.world.maps.values() for chunk, layer in enumerate(entries) if layer}
        assert not gone & named
        written = set(self.world.heads.values())
        assert not {layer for layer, _ in gone} & written
        removed = self.layers - self.world.layers()
        assert not removed & (written | {layer for layer, _ in named})


def _volume(ident: VolumeId, head: int) -> Volume:
    return Volume(
        id=ident,
        account=ACCOUNT,
        owner="o",
        name=ident,
        size=CHUNKS * CHUNK,
        state=VolumeState.AVAILABLE,
        cipher=Cipher.NONE,
        key_arn=None,
        wrapped_key=None,
        context={},
        lineage=LINEAGE,
        head=head,
        snapshot=None,
        attach_generation=0,
        integrity=Integrity.NEW,
        authority=None,
        created="now",
        reason="",
        tags={},
        attachment=None,
    )


def _snapshot(ident: SnapshotId, volume: VolumeId, new_head: int) -> Snapshot:
    return Snapshot(
        id=ident,
        account=ACCOUNT,
        owner="o",
        name=ident,
        volume=volume,
        size=CHUNKS * CHUNK,
        state=SnapshotState.COMPLETED,
        message="",
        description="",
        cipher=Cipher.NONE,
        key_arn=None,
        wrapped_key=None,
        context={},
        lineage=LINEAGE,
        new_head=new_head,
        integrity=Integrity.NEW,
        authority=None,
        pause_us=None,
        started="now",
        completed="now",
        tags={},
    )


@pytest.fixture
def worlds():
    made: list[World] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as root:

        def make(seed: int) -> World:
            place = Path(root) / str(seed)
            place.mkdir()
            made.append(World(place, random.Random(seed)))
            return made[-1]

        yield make
        for world in made:
            world.close()


def live(world: World, seed: int) -> None:
    """A life of 60 events."""
    dice = world.dice
    for _ in range(60):
        volumes = [ident for ident in world.maps if ident.startswith("vol-")]
        snapshots = [ident for ident in world.maps if ident.startswith("snap-")]
        event = dice.choice(("write", "write", "write", "snapshot", "snapshot", "restore", "copy", "delete", "sweep"))
        if event == "write" and volumes:
            world.write(dice.choice(volumes))
        elif event == "snapshot" and volumes:
            world.snapshot(dice.choice(volumes), abandoned=dice.random() < 0.2)
        elif event == "restore" and snapshots:
            source = dice.choice(snapshots)
            world.volume(world.maps[source], source)
        elif event == "copy" and snapshots:
            world.copy(dice.choice(snapshots))
        elif event == "delete" and world.maps:
            world.delete(dice.choice([*volumes, *snapshots]))
            if not world.maps:
                break
            if dice.random() < 0.7:
                world.sweep_deleted(list(world.deleted)[-1])
        elif event == "sweep":
            if world.deleted:
                world.sweep_deleted(dice.choice(list(world.deleted)))
            if volumes:
                world.sweep_left(dice.choice(volumes))
        world.check_family()


@pytest.mark.parametrize("seed", range(int(os.environ.get("EBSD_WORLDS", "12"))))
def test_relatives_give_back_nothing_that_is_named_and_in_the_end_everything(worlds, seed):
    world = worlds(seed)
    live(world, seed)
    while world.deleted:
        world.sweep_deleted(world.dice.choice(list(world.deleted)))
    for volume in list(world.left):
        world.sweep_left(volume)
    # What a whole sweep finds now lies in layers that several maps share (rule 7), or that are looked at when one goes
    # that is there.
    own = world.own_layers()
    before, present = world.holdings(), world.layers()
    world.sweep_whole()
    shared = world.shared_layers()
    assert {layer for layer, _ in before - world.holdings()} <= shared | own
    assert present - world.layers() <= own
    # And without whole sweeps, when all is deleted in any order.
    rest = list(world.maps)
    world.dice.shuffle(rest)
    for ident in rest:
        world.delete(ident)
        world.sweep_deleted(ident)
    assert world.layers() == set()
    assert world.catalog.run(lambda t: t._rows("SELECT * FROM family")) == []


def test_without_whole_sweeps_everything_comes_back_too(worlds):
    for seed in range(1000, 1003):
        world = worlds(seed)
        live(world, seed)
        rest = list(world.maps)
        world.dice.shuffle(rest)
        for ident in rest:
            world.delete(ident)
        while world.deleted:
            world.sweep_deleted(world.dice.choice(list(world.deleted)))
        assert world.layers() == set()


def test_an_older_catalog_forgot_the_family_and_nothing_is_lost(worlds):
    """All relatives hang on one root then, as after the migration of an older catalog."""
    for seed in range(2000, 2003):
        world = worlds(seed)
        live(world, seed)
        while world.deleted:
            world.sweep_deleted(next(iter(world.deleted)))
        world.catalog.run(lambda t: t._rows("DELETE FROM family WHERE deleted=1"))
        world.catalog.run(lambda t: t._rows("UPDATE family SET parent=NULL, beyond=1, first=1 WHERE id LIKE 'snap-%'"))
        world.catalog.run(lambda t: t._rows("UPDATE family SET parent=NULL"))
        live(world, seed)


def test_a_family_with_a_missing_link_is_not_swept(worlds):
    world = worlds(1)
    world.snapshot(next(iter(world.maps)), abandoned=False)
    snapshot = list(world.maps)[-1]
    world.volume(world.maps[snapshot], snapshot)
    world.catalog.run(lambda t: t._rows("DELETE FROM family WHERE id=?", snapshot))
    with pytest.raises(StoreDamaged, match="made from"):
        world.catalog.run(lambda t: world.near(t, list(world.maps)[-1]))
