"""The sweep: what some map names stays, whatever is cut when; what none names comes back as space."""

from __future__ import annotations

import os
import random
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_rig import LINEAGE, VOLUME, Died, FakeDisk
from hypothesis import given, settings
from hypothesis import strategies as st

from ebsd.domain.errors import StoreDamaged
from ebsd.domain.ids import LineageId, SnapshotId, VolumeId
from ebsd.domain.model import Cipher
from ebsd.domain.units import CHUNK, CHUNKS_PER_SEGMENT, MIB, SECTOR, SEGMENT
from ebsd.store.disk import RealDisk, opened
from ebsd.store.durablemap import DurableMap, MapHeader, create_durable_map
from ebsd.store.layers import create_layer, seal_layer, segment_name
from ebsd.store.layertable import LayerEntry, LayerTable
from ebsd.store.layout import StateLayout
from ebsd.store.sealedmap import write_sealed_map
from ebsd.store.sweep import (
    BLOCK,
    PUNCH_STEP,
    DurableSource,
    Known,
    SealedSource,
    SweepReport,
    find_orphans,
    remove_orphans,
    sweep,
    sweep_deleted,
)

DISK = RealDisk()
SNAPSHOT = SnapshotId("snap-0123456789abcdef0")
CHUNKS = 24
SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None


def uuid_of(layer: int) -> bytes:
    return layer.to_bytes(16, "big")


@dataclass
class Memory:
    """A map in memory, of any length."""

    entries: list[int]
    name: str = "memory"
    synced: bool = False

    def read(self) -> Iterator[bytes]:
        raw = b"".join(entry.to_bytes(4, "little") for entry in self.entries)
        for at in range(0, len(raw), BLOCK):
            yield raw[at : at + BLOCK]

    def sync(self) -> None:
        self.synced = True


class Lineage:
    """A directory with layers, filled as a plan says: layer -> chunks that hold data."""

    def __init__(self, root: Path, plan: dict[int, set[int]], *, size: int = CHUNKS * CHUNK) -> None:
        self.root = root
        self.dirfd = os.open(root, os.O_RDONLY)
        self.plan = plan
        entries = tuple(LayerEntry(n, uuid_of(n), VOLUME) for n in range(1, max(plan) + 1))
        self.table = LayerTable(LINEAGE, SECTOR, Cipher.AES_256_XTS, entries)
        for layer, chunks in plan.items():
            create_layer(DISK, self.dirfd, layer, uuid_of(layer), size)
            for chunk in chunks:
                with self.path(layer, chunk // CHUNKS_PER_SEGMENT).open("r+b") as file:
                    file.seek(chunk % CHUNKS_PER_SEGMENT * CHUNK)
                    file.write(bytes([layer]) * CHUNK)
            seal_layer(DISK, self.dirfd, layer, uuid_of(layer), size)

    def path(self, layer: int, segment: int = 0) -> Path:
        return self.root / segment_name(layer, uuid_of(layer), segment)

    def holds(self, layer: int, chunk: int) -> bool:
        path = self.path(layer, chunk // CHUNKS_PER_SEGMENT)
        if not path.exists():
            return False
        with path.open("rb") as file:
            file.seek(chunk % CHUNKS_PER_SEGMENT * CHUNK)
            data = file.read(CHUNK)
        assert data in (bytes(CHUNK), bytes([layer]) * CHUNK)
        return any(data)

    def content(self) -> dict[int, set[int]]:
        return {layer: {c for c in chunks if self.holds(layer, c)} for layer, chunks in self.plan.items()}

    def close(self) -> None:
        os.close(self.dirfd)


@pytest.fixture
def lineage(tmp_path):
    made: list[Lineage] = []

    def make(plan: dict[int, set[int]], **kwargs) -> Lineage:
        made.append(Lineage(tmp_path, plan, **kwargs))
        return made[-1]

    yield make
    for item in made:
        item.close()


# --- trees of maps


@st.composite
def trees(draw):
    """Maps that grew from one another as snapshots and restores do; the layers they came by; which are protected."""
    maps: list[list[int]] = [[0] * CHUNKS]
    written: dict[int, set[int]] = {}
    for layer in range(1, draw(st.integers(1, 6)) + 1):
        source = list(draw(st.sampled_from(maps)))
        chunks = draw(st.sets(st.integers(0, CHUNKS - 1), max_size=8))
        written[layer] = chunks
        for chunk in chunks:
            source[chunk] = layer
        for chunk in draw(st.sets(st.integers(0, CHUNKS - 1), max_size=4)):
            source[chunk] = 0
        maps.append(source)
    kept = draw(st.lists(st.sampled_from(maps), max_size=len(maps)))
    protected = draw(st.sets(st.sampled_from(sorted(written)), max_size=2))
    return written, kept, protected


def check(lineage: Lineage, kept: list[list[int]], protected: set[int]) -> None:
    """What must be there after a whole sweep, and what must not."""
    named = {(layer, chunk) for entries in kept for chunk, layer in enumerate(entries) if layer}
    for layer, chunks in lineage.plan.items():
        for chunk in chunks:
            wanted = layer in protected or (layer, chunk) in named
            assert lineage.holds(layer, chunk) is wanted, (layer, chunk)
        alive = layer in protected or any(number == layer for number, _ in named)
        assert lineage.path(layer).exists() is alive
        if alive and layer not in protected:
            assert stat.S_IMODE(lineage.path(layer).stat().st_mode) == 0o440


@settings(max_examples=60, deadline=None)
@given(trees())
def test_exactly_what_no_map_names_goes_and_the_second_sweep_finds_nothing(tree):
    written, kept, protected = tree
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        lineage = Lineage(Path(directory), written)
        try:
            maps = [Memory(entries) for entries in kept]
            report = sweep(DISK, lineage.dirfd, lineage.table, protected=protected, maps=iter(maps))
            assert all(item.synced for item in maps)
            check(lineage, kept, protected)
            gone = sum(
                len(chunks) - len(lineage.content()[layer])
                for layer, chunks in written.items()
                if layer not in report.removed
            )
            assert report.punched_chunks == gone
            again = sweep(DISK, lineage.dirfd, lineage.table, protected=protected, maps=[Memory(e) for e in kept])
            assert again == SweepReport((), 0, 0)
        finally:
            lineage.close()


@settings(max_examples=40, deadline=None)
@given(trees(), st.integers(0, 12), st.integers(0, 2**16))
def test_a_sweep_that_dies_at_any_call_lost_nothing_that_is_named_and_the_next_one_ends_it(tree, calls, seed):
    written, kept, protected = tree
    named = {(layer, chunk) for entries in kept for chunk, layer in enumerate(entries) if layer}
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        lineage = Lineage(Path(directory), written)
        disk = FakeDisk()
        disk.die_at = calls
        try:
            try:
                sweep(disk, lineage.dirfd, lineage.table, protected=protected, maps=[Memory(e) for e in kept])
            except Died:
                disk.reset()
                disk.cut_power(random.Random(seed))
            for layer, chunks in written.items():
                for chunk in chunks:
                    if layer in protected or (layer, chunk) in named:
                        assert lineage.holds(layer, chunk)
            sweep(DISK, lineage.dirfd, lineage.table, protected=protected, maps=[Memory(e) for e in kept])
            for layer, chunk in named:
                assert chunk not in written[layer] or lineage.holds(layer, chunk)
        finally:
            lineage.close()


# --- the order


def test_a_map_is_made_durable_after_it_was_read_and_before_anything_goes(lineage, tmp_path):
    """The page cache says that chunk 0 left layer 1; the disk does not yet, and the power goes after the punch."""
    tree = lineage({1: {0, 1}, 2: set()})
    disk = FakeDisk()
    path = tmp_path / "map"
    create_durable_map(DISK, path, MapHeader(LINEAGE, VOLUME, 2, CHUNKS), _page([1, 1]))
    durable = DurableMap.open(disk, path)
    durable.write_page(0, bytes(_page([2, 1]).cast("B")))
    for seed in range(20):
        report = sweep(disk, tree.dirfd, tree.table, protected={2}, maps=[DurableSource(disk, path)])
        disk.cut_power(random.Random(seed))
        if report.punched_chunks:
            break
    durable.close()
    durable = DurableMap.open(DISK, path)
    entries = durable.entries().tolist()[:2]
    durable.close()
    assert entries == [2, 1]
    order = [name for name, *_ in disk.log if name in ("fdatasync", "punch")]
    assert order.index("fdatasync") < order.index("punch")


def _page(entries: list[int]) -> memoryview:
    page = memoryview(bytearray(4096)).cast("I")
    for at, value in enumerate(entries):
        page[at] = value
    return page


def test_the_layers_are_chosen_before_the_maps_are_read(lineage):
    """A layer that appears while the maps are read is not judged by them."""
    tree = lineage({1: {0}, 2: {0}})
    hidden = tree.path(2).rename(tree.root / "hidden")

    def maps() -> Iterator[Memory]:
        yield Memory([1])
        hidden.rename(tree.path(2))

    report = sweep(DISK, tree.dirfd, tree.table, protected=(), maps=maps())
    assert report == SweepReport((), 0, 0)
    assert tree.holds(2, 0)


class Broken(Memory):
    def read(self) -> Iterator[bytes]:
        yield bytes(BLOCK)
        raise OSError(5, "broken")


class Unsyncable(Memory):
    def sync(self) -> None:
        raise OSError(5, "broken")


@pytest.mark.parametrize("kind", [Broken, Unsyncable])
def test_a_map_that_cannot_be_read_or_synced_stops_the_sweep_before_anything_goes(lineage, kind):
    tree = lineage({1: {0, 1}, 2: {3}})
    with pytest.raises(OSError, match="broken"):
        sweep(DISK, tree.dirfd, tree.table, protected=(), maps=[Memory([1]), kind([])])
    assert tree.content() == {1: {0, 1}, 2: {3}}


@pytest.mark.parametrize("value", [3, 0xFFFFFEFF, 0xFFFFFF00, 0xFFFFFFFF])
def test_a_map_with_an_entry_that_cannot_be_stops_the_sweep(lineage, value):
    tree = lineage({1: {0, 1}, 2: {3}})
    with pytest.raises(StoreDamaged, match="unknown layer"):
        sweep(DISK, tree.dirfd, tree.table, protected=(), maps=[Memory([1, value])])
    assert tree.content() == {1: {0, 1}, 2: {3}}


def test_files_that_the_table_does_not_have_are_not_the_sweeps(lineage):
    tree = lineage({1: {0}, 2: {0}})
    tree.path(2).rename(tree.root / segment_name(2, bytes(range(16)), 0))
    (tree.root / segment_name(3, uuid_of(3), 0)).write_bytes(b"new")
    (tree.root / "table").write_bytes(b"table")
    assert sweep(DISK, tree.dirfd, tree.table, protected=(), maps=[]).removed == (1,)
    assert len(os.listdir(tree.root)) == 3


# --- syncs that fail


class Errseq(RealDisk):
    """A disk whose failed syncs are told as Linux does it: once through each descriptor that was open by then."""

    def __init__(self) -> None:
        self.failures = 0
        self.told: dict[int, int] = {}

    def open(self, path, flags, mode=0o600, dir_fd=None):
        fd = super().open(path, flags, mode, dir_fd)
        self.told[fd] = self.failures
        return fd

    def fdatasync(self, fd):
        told, self.told[fd] = self.told[fd], self.failures
        if told < self.failures:
            raise OSError(5, "a sync failed")
        super().fdatasync(fd)


def test_a_map_whose_sync_failed_since_it_was_held_stops_the_sweep(lineage, tmp_path):
    """The page cache says that chunk 0 left layer 1; the disk never will. A descriptor of now would not be told."""
    tree = lineage({1: {0}, 2: {0}})
    disk, path = Errseq(), tmp_path / "map"
    create_durable_map(DISK, path, MapHeader(LINEAGE, VOLUME, 2, CHUNKS), _page([2]))
    with opened(disk, path, os.O_RDONLY) as held:
        disk.failures += 1
        with pytest.raises(OSError, match="a sync failed"):
            sweep(disk, tree.dirfd, tree.table, protected={2}, maps=[DurableSource(disk, path, held)])
    assert tree.content() == {1: {0}, 2: {0}}
    DurableSource(disk, path).sync()  # that nobody is told by


def test_maps_beyond_the_relatives_are_durable_before_anything_goes(lineage):
    """One that left the layer in the page cache names chunk 0 on the disk, and nobody else needs that."""

    class Remembered(Memory):
        def read(self) -> Iterator[bytes]:
            assert tree.holds(1, 0)
            return super().read()

        def sync(self) -> None:
            assert tree.holds(1, 0)
            super().sync()

    tree = lineage({1: {0, 1}, 2: {0}})
    beyond = Remembered([2, 0])
    report = sweep_deleted(
        DISK, tree.dirfd, tree.table, deleted=Memory([0, 1]), also=(), relatives={"near": Memory([0, 1])},
        beyond={"near": [beyond]}, protected={2},
    )  # fmt: skip
    assert report.punched_chunks == 1
    assert beyond.synced
    assert tree.content() == {1: {1}, 2: {0}}


# --- maps


def test_durable_and_sealed_maps_as_sources(lineage, tmp_path):
    tree = lineage({1: {0, 1, 2}, 2: {0, 1}, 3: {5}})
    path, sealed = tmp_path / "map", tmp_path / "sealed"
    create_durable_map(DISK, path, MapHeader(LINEAGE, VOLUME, 3, CHUNKS), _page([2, 1]))
    write_sealed_map(DISK, sealed, SNAPSHOT, LINEAGE, _page([1]), CHUNKS)
    sources = [DurableSource(DISK, path), SealedSource(DISK, sealed, SNAPSHOT)]
    report = sweep(DISK, tree.dirfd, tree.table, protected=(), maps=sources)
    assert report.removed == (3,)
    assert report.punched_chunks == 2
    assert tree.content() == {1: {0, 1}, 2: {0}, 3: set()}
    sealed.write_bytes(sealed.read_bytes()[:-1])
    with pytest.raises(StoreDamaged):
        sweep(DISK, tree.dirfd, tree.table, protected=(), maps=[SealedSource(DISK, sealed, SNAPSHOT)])


def test_blocks_that_are_equal_at_other_places_are_not_confused(lineage):
    """Two blocks of one map with the same bytes name different chunks."""
    blocks = BLOCK // 4
    tree = lineage({1: {0, blocks, 2 * blocks}}, size=3 * blocks * CHUNK)
    first = [1] + [0] * (blocks - 1)
    report = sweep(DISK, tree.dirfd, tree.table, protected=(), maps=[Memory(first + first), Memory(first)])
    assert report.punched_chunks == 1
    assert tree.content() == {1: {0, blocks}}


def test_a_block_of_one_layer_and_a_short_last_block(lineage):
    blocks = BLOCK // 4
    tree = lineage({1: {0, 5, blocks, blocks + 1}, 2: {blocks + 2}}, size=2 * blocks * CHUNK)
    report = sweep(DISK, tree.dirfd, tree.table, protected=(), maps=[Memory([1] * (blocks + 1))])
    assert (report.removed, report.punched_chunks) == ((2,), 1)
    assert tree.content() == {1: {0, 5, blocks}, 2: set()}


# --- space and files


def test_the_space_really_comes_back(lineage):
    tree = lineage({1: set(range(20)), 2: set(range(10))})
    before = sum(path.stat().st_blocks for path in tree.root.iterdir())
    report = sweep(DISK, tree.dirfd, tree.table, protected=(), maps=[Memory([1, 0, 1])])
    after = sum(path.stat().st_blocks for path in tree.root.iterdir())
    assert (before - after) * 512 == report.freed == 28 * CHUNK
    assert after * 512 == 2 * CHUNK


def test_every_segment_of_a_layer_is_looked_at(lineage):
    far = CHUNKS_PER_SEGMENT + 3
    tree = lineage({1: {0, far, far + 1}, 2: {far}}, size=SEGMENT + MIB)
    entries = [(0, 1), (far, 1)]

    class Sparse(Memory):
        def read(self) -> Iterator[bytes]:
            for block in range(far * 4 // BLOCK + 1):
                page = memoryview(bytearray(BLOCK)).cast("I")
                for chunk, layer in entries:
                    if chunk * 4 // BLOCK == block:
                        page[chunk - block * BLOCK // 4] = layer
                yield bytes(page.cast("B"))

    report = sweep(DISK, tree.dirfd, tree.table, protected=(), maps=[Sparse([])])
    assert report.removed == (2,)
    assert not tree.path(2, 0).exists()
    assert not tree.path(2, 1).exists()
    assert tree.content() == {1: {0, far}, 2: set()}


def test_a_removal_that_was_cut_between_segments_is_ended_by_the_next_sweep(lineage):
    tree = lineage({1: {0}}, size=2 * SEGMENT)
    tree.path(1, 0).unlink()
    assert sweep(DISK, tree.dirfd, tree.table, protected=(), maps=[]).removed == (1,)
    assert os.listdir(tree.root) == []


def test_a_punch_takes_a_bounded_number_of_chunks(lineage):
    tree = lineage({1: {0}}, size=3 * PUNCH_STEP * CHUNK)
    with tree.path(1).open("r+b") as file:
        file.truncate(0)
        file.truncate(3 * PUNCH_STEP * CHUNK)

    class Dense(FakeDisk):
        def lseek(self, fd: int, offset: int, whence: int) -> int:
            if whence == os.SEEK_HOLE:
                return os.fstat(fd).st_size
            return offset if offset < os.fstat(fd).st_size else super().lseek(fd, offset, whence)

        def punch(self, fd: int, offset: int, length: int) -> None:
            self.log.append(("punch", fd, offset, length))

    disk = Dense()
    report = sweep(disk, tree.dirfd, tree.table, protected=(), maps=[Memory([1])])
    assert report.punched_chunks == 3 * PUNCH_STEP - 1
    lengths = [length for name, _, _, length in disk.log if name == "punch"]
    assert [length // CHUNK for length in lengths] == [PUNCH_STEP, PUNCH_STEP, PUNCH_STEP - 1]


def test_a_segment_that_was_sealed_is_sealed_again_whatever_happens(lineage):
    tree = lineage({1: {0, 1}})

    class Refusing(RealDisk):
        def punch(self, fd: int, offset: int, length: int) -> None:
            raise OSError(95, "no holes here")

    with pytest.raises(OSError, match="no holes"):
        sweep(Refusing(), tree.dirfd, tree.table, protected=(), maps=[Memory([1])])
    assert stat.S_IMODE(tree.path(1).stat().st_mode) == 0o440
    assert tree.content() == {1: {0, 1}}


# --- orphans

OTHER = LineageId("00000000-0000-4000-8000-000000000001")


@pytest.fixture
def state(tmp_path):
    layout = StateLayout(tmp_path / "state")
    layout.create(DISK)
    for lineage in (LINEAGE, OTHER):
        directory = layout.create_lineage(DISK, lineage)
        (directory / "table").write_bytes(b"t")
        (directory / segment_name(1, uuid_of(1), 0)).write_bytes(b"a")
        (directory / segment_name(2, uuid_of(2), 0)).write_bytes(b"b")
    (layout.lineage(LINEAGE) / ".table.tmp").write_bytes(b"x")
    for directory in (layout.maps, layout.records):
        for name in (VOLUME, SNAPSHOT, f".{VOLUME}.tmp", "README", "vol-1"):
            (directory / name).write_bytes(b"m")
    (layout.layers / "lost+found").mkdir()
    return layout


def names(layout: StateLayout, paths: list[Path]) -> set[str]:
    return {str(path.relative_to(layout.root)) for path in paths}


def test_orphans_are_what_no_row_names_and_carries_a_name_of_ours(state):
    known = Known({LINEAGE: [(1, uuid_of(1)), (2, bytes(16))]}, [VOLUME])
    found = find_orphans(DISK, state, lambda: known)
    assert names(state, found) == {
        f"layers/{LINEAGE}/{segment_name(2, uuid_of(2), 0)}",
        f"layers/{LINEAGE}/.table.tmp",
        f"layers/{OTHER}/{segment_name(1, uuid_of(1), 0)}",
        f"layers/{OTHER}/{segment_name(2, uuid_of(2), 0)}",
        f"layers/{OTHER}/table",
        f"layers/{OTHER}",
        f"maps/{SNAPSHOT}",
        f"maps/.{VOLUME}.tmp",
        f"records/{SNAPSHOT}",
        f"records/.{VOLUME}.tmp",
    }
    for _ in range(2):
        remove_orphans(DISK, found)
        assert find_orphans(DISK, state, lambda: known) == []
    assert sorted(os.listdir(state.maps)) == sorted([VOLUME, "README", "vol-1"])
    assert sorted(os.listdir(state.layers)) == sorted([LINEAGE, "lost+found"])


def test_nothing_is_an_orphan_when_every_file_has_its_row(state):
    (state.lineage(LINEAGE) / ".table.tmp").unlink()
    for directory in (state.maps, state.records):
        (directory / f".{VOLUME}.tmp").unlink()
    layers = [(1, uuid_of(1)), (2, uuid_of(2))]
    known = Known({LINEAGE: layers, OTHER: layers}, [VOLUME, SNAPSHOT])
    assert find_orphans(DISK, state, lambda: known) == []


def test_a_file_that_came_with_its_row_after_the_listing_is_no_orphan(state):
    """The row precedes the file: rows that are read after the files were listed know every listed file."""
    new = VolumeId("vol-00000000000000001")

    def known() -> Known:
        (state.maps / new).write_bytes(b"new")
        layers = [(1, uuid_of(1)), (2, uuid_of(2))]
        return Known({LINEAGE: layers, OTHER: layers}, [VOLUME, SNAPSHOT])

    assert state.maps / new not in find_orphans(DISK, state, known)


def test_a_directory_with_something_foreign_stays(state):
    (state.lineage(OTHER) / "notes").write_bytes(b"mine")
    found = find_orphans(DISK, state, lambda: Known({LINEAGE: [(1, uuid_of(1)), (2, uuid_of(2))]}, [VOLUME, SNAPSHOT]))
    remove_orphans(DISK, found)
    assert os.listdir(state.lineage(OTHER)) == ["notes"]


def test_the_removal_of_orphans_can_be_cut_and_repeated(state):
    known = Known({}, [])
    for calls in range(12):
        disk = FakeDisk()
        disk.die_at = calls
        try:
            remove_orphans(disk, find_orphans(disk, state, lambda: known))
        except Died:
            continue
    remove_orphans(DISK, find_orphans(DISK, state, lambda: known))
    assert find_orphans(DISK, state, lambda: known) == []
