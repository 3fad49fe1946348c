"""A volume that grows while it is attached: old bytes stay, new ones are zeros, a kill leaves one size or the other."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from pathlib import Path

import pytest
from dice_scheduler import DiceScheduler
from engine_rig import LINEAGE, VOLUME, Died, FakeDisk, Rig, engine_kind  # noqa: F401 - runs everything over both engines

from ebsd.domain.errors import MemoryForMapMissing, StoreDamaged
from ebsd.domain.geometry import chunk_count
from ebsd.domain.units import CHUNK, GIB, MIB, SECTOR, SEGMENT
from ebsd.store.disk import RealDisk
from ebsd.store.durablemap import DurableMap, MapHeader, grow_durable_map
from ebsd.store.entries import map_hash
from ebsd.store.layers import create_layer, grow_layer, open_layer, segment_name
from ebsd.store.livemap import LiveMap, LiveMapInUse
from ebsd.store.salvage import SalvageOutcome
from ebsd.volume.engine import EngineClosed, EngineFailed, Head
from ebsd.volume.scheduling import run_sync

SIZE = 4 * CHUNK - 5 * SECTOR
BIGGER = 1030 * CHUNK
"""Another map page, and another length of the file."""
SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None
POINTS = ["grow.before-claim", "grow.claimed", "grow.switched"]
DISK = RealDisk()


@pytest.fixture
def rig():
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        rig = Rig(Path(directory), SIZE)
        yield rig
        rig.close()


def do(scheduler: DiceScheduler, *steps) -> None:
    for step in steps:
        task = scheduler.spawn("set up", step)
        scheduler.run_to(task, "done")
        if task.error is not None:
            raise task.error


def test_a_grown_volume_keeps_its_bytes_and_takes_writes_behind_them(rig):
    rig.start()
    rig.write(0, b"a" * SIZE)
    run_sync(rig.grow(BIGGER))
    assert rig.read(0, SIZE) == b"a" * SIZE
    assert rig.read(SIZE, BIGGER) == bytes(BIGGER - SIZE)
    rig.write(BIGGER - 10, b"0123456789")
    rig.write(SIZE - 2, b"wxyz")
    rig.flush()
    rig.power_cut(random.Random(1))
    rig.start()
    assert rig.read(BIGGER - 10, 10) == b"0123456789"
    assert rig.read(SIZE - 3, 6) == b"awxyz\0"


def test_growing_again_and_again(rig):
    rig.start()
    for turn in range(1, 6):
        size = SIZE + turn * 300 * CHUNK + turn * SECTOR
        run_sync(rig.grow(size))
        rig.write(size - 1, bytes([turn]))
    assert [rig.read(SIZE + t * 300 * CHUNK + t * SECTOR - 1, 1)[0] for t in range(1, 6)] == [1, 2, 3, 4, 5]
    digest = run_sync(rig.engine.close())
    assert digest == map_hash(rig.live.raw_entries, chunk_count(rig.size))


def test_growth_inside_the_last_chunk(rig):
    rig.start()
    rig.write(0, b"a" * SIZE)
    run_sync(rig.grow(SIZE + SECTOR))
    assert rig.read(0, 2 * SIZE) == b"a" * SIZE + bytes(SECTOR)


def test_the_hash_of_a_volume_whose_maps_are_longer_covers_its_size(rig):
    """Killed between the growth of the durable map and the catalog: the next attachment has the old size."""
    grow_durable_map(rig.disk, rig.map_path, BIGGER)
    rig.start()
    rig.write(0, b"a")
    assert rig.live.chunks == chunk_count(BIGGER)
    assert run_sync(rig.engine.close()) == map_hash(rig.live.raw_entries, chunk_count(SIZE))


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("end", ["salvage", "salvage then cut", "cut", "adopt"])
def test_a_kill_at_each_point_leaves_one_live_map_or_the_other(rig, point, end):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    do(scheduler, engine.write(0, b"f" * SIZE), engine.flush())
    grow = scheduler.spawn("grow", rig.grow(BIGGER))
    scheduler.run_to(grow, "grow.before-claim")
    do(scheduler, engine.write(0, b"a" * CHUNK), engine.discard(CHUNK, CHUNK))
    scheduler.run_to(grow, point)
    rig.drop()
    grow.coroutine.close()
    expected = b"a" * CHUNK + bytes(CHUNK) + b"f" * (SIZE - 2 * CHUNK)
    if end == "cut":
        rig.power_cut(random.Random(1))
        rig.check_durable()
        rig.start()
        assert rig.read(2 * CHUNK, SIZE) == b"f" * (SIZE - 2 * CHUNK)
        return
    if end == "adopt":
        if point == "grow.switched":
            rig.size = BIGGER
        elif chunk_count(rig.size) != DurableMap.open(rig.disk, rig.map_path).header.chunks:
            with pytest.raises(ValueError, match="differ in length"):  # salvage first
                rig.start(adopt=True)
            rig.drop()
            end = "salvage"
    if end != "adopt":
        assert rig.salvage().outcome is SalvageOutcome.APPLIED
        assert not rig.live_path.exists()
        if "cut" in end:
            rig.power_cut(random.Random(1))
    rig.start(adopt=end == "adopt")
    assert rig.read(0, SIZE) == expected
    run_sync(rig.engine.close())
    rig.drop()
    assert [path.name for path in rig.root.iterdir() if path.name.endswith(".grown")] == []


class FullDisk(FakeDisk):
    """Has no block left: only what has blocks already can be written."""

    full = False

    def pwrite(self, fd, data, offset):
        if self.full:
            try:
                hole = os.lseek(fd, offset, os.SEEK_HOLE)
            except OSError:
                hole = offset
            if hole < offset + len(data):
                raise OSError(errno.ENOSPC, "no space")
        return super().pwrite(fd, data, offset)


def test_on_a_full_disk_a_flush_needs_no_blocks_for_what_a_growth_has_added(tmp_path):
    """Found by a random schedule: the pass wrote out the whole extent, the new and empty pages too, and was fatal."""
    rig = Rig(tmp_path, SIZE, disk=FullDisk())
    rig.start()
    rig.write(0, b"a" * SIZE)
    run_sync(rig.grow(BIGGER))
    rig.disk.full = True
    rig.write(0, b"b" * SECTOR)
    run_sync(rig.engine.discard(2 * CHUNK, CHUNK))
    with pytest.raises(OSError, match="no space"):
        rig.write(BIGGER - SECTOR, b"c" * SECTOR)
    rig.flush()
    assert not rig.engine.failed
    assert rig.durable_entries()[:4] == [3, 3, 0, 3]
    rig.disk.full = False
    rig.write(BIGGER - SECTOR, b"c" * SECTOR)
    rig.flush()
    rig.power_cut(random.Random(1))
    rig.start()
    assert rig.read(BIGGER - SECTOR, SECTOR) == b"c" * SECTOR
    assert rig.read(0, SECTOR) == b"b" * SECTOR
    rig.close()


def test_what_is_marked_and_frozen_goes_over_to_the_new_map(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    do(scheduler, engine.write(0, b"a" * CHUNK))
    flush = scheduler.spawn("flush", engine.flush())
    scheduler.run_to(flush, "flush.data-synced")
    rig.live.init_values = bytes(range(64))
    grow = scheduler.spawn("grow", rig.grow(BIGGER))
    while grow.ready:
        grow.go()
    assert engine.size == BIGGER
    assert not grow.done  # waits for the pass, which may use the old durable map
    assert rig.growing.marked_pages() == [0]
    assert rig.growing.init_values == bytes(range(64))
    do(scheduler, engine.write(BIGGER - CHUNK, b"z" * CHUNK))
    rig.drop()  # the marks of the pass and of the write are there
    flush.coroutine.close()
    grow.coroutine.close()
    assert rig.salvage().pages == 2
    rig.size = BIGGER
    rig.start()
    assert rig.read(0, CHUNK) == b"a" * CHUNK
    assert rig.read(BIGGER - CHUNK, CHUNK) == b"z" * CHUNK


def test_a_pass_that_fails_during_the_growth_leaves_its_flag_in_the_map_in_use(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    do(scheduler, engine.write(0, b"a" * CHUNK))
    rig.disk.reset()
    flush = scheduler.spawn("flush", engine.flush())
    scheduler.run_to(flush, "flush.data-synced")
    grow = scheduler.spawn("grow", rig.grow(BIGGER))
    scheduler.run_to(grow, "grow.switched")
    rig.disk.reset()
    rig.disk.fail["fdatasync", 0] = errno.EIO
    scheduler.run()
    assert isinstance(flush.error, EngineFailed)
    assert grow.error is None
    assert rig.live.failed


def test_the_failed_flag_goes_over_to_the_new_map(rig):
    rig.start()
    live = LiveMap.grown(rig.disk, rig.live_path, rig.live, 2000)
    rig.live.mark_failed()
    live.replace(rig.live)
    assert live.failed
    live.close()


def test_the_file_in_place_is_the_one_that_the_engine_stores_into_whenever_others_run(rig):
    """Were there an await between the rename and the switch, a failed flag could go into a file that is gone."""
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    grow = scheduler.spawn("grow", rig.grow(BIGGER))
    while not grow.done:
        grow.go()
        assert os.stat(rig.live_path).st_ino == os.fstat(engine._live._fd).st_ino
    assert grow.error is None


def test_readers_and_writers_in_work_are_drained_before_the_maps_are_switched(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    do(scheduler, engine.write(0, b"a" * CHUNK), engine.write(2 * CHUNK, b"c" * CHUNK))
    reader = scheduler.spawn("reader", engine.read(0, SIZE))
    scheduler.run_to(reader, "read.looked-up")
    grow = scheduler.spawn("grow", rig.grow(BIGGER))
    scheduler.run_to(grow, "event")
    assert not grow.ready
    late = scheduler.spawn("late", engine.write(CHUNK, b"b" * CHUNK))
    late.go()
    assert not late.ready
    scheduler.run()
    assert (grow.error, late.error) == (None, None)
    assert bytes(reader.result)[: 2 * CHUNK] == b"a" * CHUNK + bytes(CHUNK)
    assert rig.live.entries[:3].tolist() == [3, 3, 3]


def test_an_engine_that_stopped_before_the_claim_does_not_grow(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    grow = scheduler.spawn("grow", rig.grow(BIGGER))
    scheduler.run_to(grow, "grow.before-claim")
    do(scheduler, engine.close())
    scheduler.run()
    assert isinstance(grow.error, EngineClosed)
    assert engine.size == SIZE


def test_a_failed_rename_changes_nothing(rig):
    engine = rig.start()
    rig.disk.reset()
    rig.disk.rename = lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no"))
    with pytest.raises(OSError, match="no"):
        run_sync(rig.grow(BIGGER))
    del rig.disk.rename
    rig.growing.close()
    rig.growing = None
    assert not rig.root.joinpath(".live.grown").exists()
    rig.next_fds = ()
    assert engine.size == SIZE
    rig.write(0, b"a" * SIZE)
    rig.flush()
    run_sync(rig.grow(BIGGER))
    assert rig.read(0, SIZE) == b"a" * SIZE


def test_arguments_that_do_not_fit_are_refused(rig):
    engine = rig.start()
    extra = rig.grow_files(BIGGER)
    live = LiveMap.grown(rig.disk, rig.live_path, rig.live, chunk_count(BIGGER))
    with pytest.raises(ValueError, match="not one for"):  # the durable map has not been told
        run_sync(engine.grow(BIGGER, extra, live, rig.durable))
    live.close()
    rig.durable.refresh()
    live = LiveMap.grown(rig.disk, rig.live_path, rig.live, chunk_count(BIGGER))
    for size, fds in ((SIZE, ()), (SIZE - SECTOR, ()), (BIGGER + 1, ()), (BIGGER * 2, ()), (BIGGER, (0,))):
        with pytest.raises(ValueError):
            run_sync(engine.grow(size, fds, live, rig.durable))
    live.close()
    with pytest.raises(ValueError, match="shrink"):
        LiveMap.grown(rig.disk, rig.live_path, rig.live, 1)


def test_growth_and_seal_exclude_each_other(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    grow = scheduler.spawn("grow", rig.grow(BIGGER))
    scheduler.run_to(grow, "grow.claimed")
    seal = scheduler.spawn("seal", engine.seal(Head(4, rig.head_fds), rig.table))
    seal.go()
    assert isinstance(seal.error, OSError)
    assert seal.error.errno == errno.EBUSY
    scheduler.run()
    assert grow.error is None


def test_a_seal_after_a_growth_and_a_growth_after_a_seal(rig):
    rig.start()
    rig.write(0, b"a" * CHUNK)
    run_sync(rig.grow(8 * CHUNK))
    first = run_sync(rig.seal())
    assert first.chunks == 8
    run_sync(rig.grow(20 * CHUNK))
    rig.write(19 * CHUNK, b"z" * CHUNK)
    second = run_sync(rig.seal())
    assert second.entries.tolist() == [3] + [0] * 18 + [4]
    assert first.entries.tolist() == [3] + [0] * 7


def grow_schedule(rig: Rig, seed: int) -> None:
    """Whole chunks of the old size, and the last one of the present size; growth while everybody works."""
    dice = random.Random(seed)
    rig.seal_content({c: dice.randint(1, 2) for c in range(3) if dice.random() < 0.5}, seed)
    scheduler = DiceScheduler(dice.randrange(2**32))
    engine = rig.start(scheduler)
    values: dict[int, list[tuple[int, bytes]]] = {c: [(0, _direct(rig, c))] for c in range(3)}
    """Chunk -> (number of the write, contents), from the one on that a flush has made durable."""
    busy: set[int] = set()
    answered: dict[int, int] = {}
    numbers = iter(range(1, 1000))

    async def writer() -> None:
        for _ in range(4):
            chunk = dice.choice([0, 1, 2, engine.size // CHUNK - 1])
            if chunk in busy:
                continue
            busy.add(chunk)
            number = next(numbers)
            value = b"" if dice.random() < 0.4 else dice.randbytes(16) * (CHUNK // 16)
            values.setdefault(chunk, [(0, bytes(CHUNK))]).append((number, value or bytes(CHUNK)))
            if value:
                await engine.write(chunk * CHUNK, value)
            else:
                await engine.discard(chunk * CHUNK, CHUNK)
            answered[chunk] = number
            busy.discard(chunk)

    async def flusher() -> None:
        for _ in range(2):
            before = dict(answered)
            await engine.flush()
            for chunk, number in before.items():
                values[chunk][:] = [item for item in values[chunk] if item[0] >= number]
            await engine.reclaim()

    async def grower() -> None:
        await rig.grow(10 * CHUNK)
        await rig.grow(BIGGER)

    for task in (writer(), writer(), writer(), flusher(), flusher(), grower()):
        scheduler.spawn("task", task)
    scheduler.run(dice.choice([None, dice.randrange(20, 150)]))
    for task in scheduler.tasks:
        if task.error is not None:
            raise task.error
        if not task.done:
            task.coroutine.close()
    size = engine.size
    if cut := dice.random() < 0.5:
        rig.power_cut(dice)
    else:
        rig.drop()
        assert rig.salvage().outcome is SalvageOutcome.APPLIED
    rig.check_durable()
    rig.size = size
    rig.start()
    for chunk, line in values.items():
        allowed = [value for number, value in line if cut or number >= answered.get(chunk, 0)]
        got = _direct(rig, chunk)
        for at in range(0, CHUNK, 512):
            if not any(got[at : at + 512] == value[at : at + 512] for value in allowed):
                pytest.fail(f"chunk {chunk}, {cut}")


@pytest.mark.parametrize("block", range(4))
def test_growth_under_random_schedules(block):
    for seed in range(block * 25, block * 25 + 25):
        with tempfile.TemporaryDirectory(dir=SHM) as directory:
            rig = Rig(Path(directory), SIZE)
            try:
                grow_schedule(rig, seed)
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
            finally:
                rig.close()


def _direct(rig: Rig, chunk: int) -> bytes:
    """Read a chunk whatever scheduler the engine has."""
    scheduler = DiceScheduler()
    task = scheduler.spawn("read", rig.engine.read(chunk * CHUNK, CHUNK))
    scheduler.run_to(task, "done")
    assert task.error is None
    return bytes(task.result).ljust(CHUNK, b"\0")


# --- the files


def test_a_longer_live_map_is_locked_from_the_start_and_gone_when_it_was_not_used(rig):
    rig.start()
    live = LiveMap.grown(rig.disk, rig.live_path, rig.live, 2000)
    path = rig.root / ".live.grown"
    assert path.exists()
    live.close()
    assert not path.exists()
    live = LiveMap.grown(rig.disk, rig.live_path, rig.live, 2000)
    live.replace(rig.live)
    rig.live.close()
    with pytest.raises(LiveMapInUse):
        LiveMap.open(rig.disk, rig.live_path, rig.identity)
    with pytest.raises(ValueError, match="already"):
        live.replace(live)
    live.close()
    again = LiveMap.open(rig.disk, rig.live_path, rig.identity)
    assert again.chunks == 2000
    again.close()


def test_no_memory_for_a_longer_live_map(rig):
    class Full(FakeDisk):
        def fallocate(self, fd: int, offset: int, length: int) -> None:
            raise OSError(errno.ENOSPC, "full")

    rig.start()
    with pytest.raises(MemoryForMapMissing):
        LiveMap.grown(Full(), rig.live_path, rig.live, 2000)
    assert not (rig.root / ".live.grown").exists()


def test_what_a_killed_growth_left_is_removed_by_the_next_one_and_by_the_next_attachment(rig):
    rig.start()
    path = rig.root / ".live.grown"
    path.write_bytes(b"left")
    LiveMap.grown(rig.disk, rig.live_path, rig.live, 2000).close()
    assert not path.exists()
    path.write_bytes(b"left")
    run_sync(rig.engine.close())
    rig.drop()
    rig.start()
    assert not path.exists()


def test_a_durable_map_learns_its_new_length(tmp_path):
    path = tmp_path / "map"
    durable = DurableMap.create(DISK, path, MapHeader(LINEAGE, VOLUME, 3, 1000))
    durable.write_out(0, 1000)
    grow_durable_map(DISK, path, 400_000 * CHUNK)
    durable.refresh()
    assert durable.header.chunks == 400_000
    durable.write_out(0, 400_000)
    assert os.stat(path).st_blocks * 512 >= 400_000 * 4  # the rest of the first MiB, too, has blocks now
    durable.write_page(390, bytes(4096))
    other = tmp_path / "other"
    DurableMap.create(DISK, other, MapHeader(LINEAGE, VOLUME, 3, 1000)).close()
    os.pwrite(durable.fd, other.read_bytes()[:512], 0)
    with pytest.raises(StoreDamaged, match="shrank"):
        durable.refresh()
    durable.close()


def test_a_growth_of_the_durable_map_that_was_cut_leaves_a_map_as_good_as_before(tmp_path):
    path = tmp_path / "map"
    DurableMap.create(DISK, path, MapHeader(LINEAGE, VOLUME, 3, 1000)).close()
    os.truncate(path, 4096 * 3)
    durable = DurableMap.open(DISK, path)
    assert durable.header.chunks == 1000
    assert len(durable.entries()) == 1024
    durable.close()
    for wrong in (4096 * 3 + 1, 4096):
        os.truncate(path, wrong)
        with pytest.raises(StoreDamaged):
            DurableMap.open(DISK, path)


def test_a_layer_grows_durably_and_again(tmp_path):
    dirfd = os.open(tmp_path, os.O_RDONLY)
    uuid = bytes(16)
    create_layer(DISK, dirfd, 7, uuid, 10 * MIB)
    first = tmp_path / segment_name(7, uuid, 0)
    with first.open("r+b") as file:
        file.write(b"data")
    for _ in range(2):
        grow_layer(DISK, dirfd, 7, uuid, 10 * MIB, 2 * SEGMENT + GIB)
    assert [os.stat(tmp_path / segment_name(7, uuid, n)).st_size for n in range(3)] == [SEGMENT, SEGMENT, GIB]
    with first.open("rb") as file:
        assert file.read(4) == b"data"
    for fd in open_layer(DISK, dirfd, 7, uuid, 2 * SEGMENT + GIB, writable=True):
        os.close(fd)
    grow_layer(DISK, dirfd, 7, uuid, GIB, GIB)  # never shorter
    assert os.stat(first).st_size == SEGMENT
    with pytest.raises(ValueError, match="shrink"):
        grow_layer(DISK, dirfd, 7, uuid, GIB, MIB)
    with pytest.raises(StoreDamaged, match="missing"):
        grow_layer(DISK, dirfd, 8, uuid, GIB, 2 * GIB)
    os.truncate(first, MIB)
    with pytest.raises(StoreDamaged, match="has only"):
        grow_layer(DISK, dirfd, 7, uuid, GIB, 2 * GIB)
    os.mkfifo(tmp_path / segment_name(7, uuid, 3))
    with pytest.raises(StoreDamaged, match="regular"):
        grow_layer(DISK, dirfd, 7, uuid, 2 * SEGMENT + GIB, 4 * SEGMENT)
    os.close(dirfd)


def test_a_growth_of_the_files_can_be_cut_at_every_call(rig):
    for calls in range(12):
        rig.disk.reset()
        rig.disk.die_at = calls
        try:
            rig.grow_files(BIGGER)
        except Died:
            rig.disk.reset()
            rig.start()  # at the old size, with whatever is there
            rig.write(0, b"a")
            run_sync(rig.engine.close())
            rig.drop()
            rig.live_path.unlink()
    rig.disk.reset()
    rig.start()
    run_sync(rig.grow(BIGGER))
    assert rig.read(0, 1) == b"a"
