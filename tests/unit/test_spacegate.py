"""The gate for new chunks: its decisions over a gauge that tests set, and the engine under shortage and schedules."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from dice_scheduler import DiceScheduler
from engine_rig import FakeDisk, Rig, engine_kind  # noqa: F401 - runs everything over both engines

from ebsd.domain.space import LOW
from ebsd.domain.units import CHUNK, GIB, MIB
from ebsd.store.disk import RealDisk
from ebsd.volume.engine import EngineClosed
from ebsd.volume.scheduling import DirectScheduler, run_sync
from ebsd.volume.spacegate import MAX_WAITING, POLL_SECONDS, SpaceGate

FLOOR = 4 * MIB
PATIENCE = 30.0
SIZE = 20 * CHUNK
SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None


class Gauge(RealDisk):
    """A disk whose free space the test sets; counts the looks."""

    def __init__(self, free: int) -> None:
        super().__init__()
        self.free = free
        self.looks = 0
        self.broken = False

    def statvfs(self, place: object) -> os.statvfs_result:
        self.looks += 1
        if self.broken:
            raise OSError(errno.EIO, "no gauge")
        blocks = self.free // 4096
        return os.statvfs_result((4096, 4096, 1 << 30, blocks + 1000, blocks, 0, 0, 0, 0, 255))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """A gauge, a clock that sleeping moves on, and a gate over both."""

    def __init__(self, free: int, *, patience: float = PATIENCE, scheduler: DiceScheduler | None = None) -> None:
        self.disk = Gauge(free)
        self.clock = Clock()
        if scheduler is not None:
            scheduler.on_sleep = self.slept
        self.gate = SpaceGate(
            disk=self.disk,
            scheduler=scheduler or DirectScheduler(),
            fd=0,
            floor=FLOOR,
            patience=patience,
            clock=self.clock,
        )

    def slept(self, seconds: float) -> None:
        self.clock.now += seconds


@pytest.fixture
def rig():
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        rig = Rig(Path(directory), SIZE)
        yield rig
        rig.close()


# --- decisions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "chunks", "ample"),
    [
        (LOW * FLOOR + 16 * CHUNK, 16, True),
        (LOW * FLOOR + 15 * CHUNK, 16, False),
        (LOW * FLOOR, 0, True),
        (LOW * FLOOR - 4096, 0, False),
    ],
)
def test_there_is_ample_space_while_it_is_not_even_low_afterwards(free, chunks, ample):
    assert World(free).gate.is_ample(chunks) is ample


def test_space_is_not_ample_while_a_write_waits_or_nobody_knows():
    world = World(100 * GIB)
    run_sync(world.gate.wait(None))
    assert not world.gate.is_ample(1)
    world.gate.written()
    assert world.gate.is_ample(1)
    world.disk.broken = True
    assert not world.gate.is_ample(1)


@pytest.mark.parametrize(
    ("free", "chunks", "admitted"),
    [
        (100 * GIB, 16, True),
        (FLOOR + CHUNK, 1, True),
        (FLOOR + CHUNK - 4096, 1, False),
        (FLOOR + 15 * CHUNK, 16, False),
        (FLOOR + 16 * CHUNK, 16, True),
        (FLOOR, 1, False),
        (0, 1, False),
    ],
)
def test_new_chunks_leave_the_floor_alone(free: int, chunks: int, admitted: bool) -> None:
    assert World(free).gate.admits(chunks) is admitted


def test_a_gauge_that_is_broken_stops_nobody() -> None:
    world = World(0)
    world.disk.broken = True
    assert world.gate.admits(16)


def test_looks_are_rare_with_room_and_frequent_near_the_floor() -> None:
    looks = {}
    for room in (64 * GIB, 32 * MIB, 8 * MIB):
        world = World(FLOOR + room)
        for _ in range(64):
            assert world.gate.admits(1)
            world.disk.free -= CHUNK
            world.clock.now += 1e-5
        looks[room] = world.disk.looks
    assert looks[64 * GIB] == 1
    assert looks[64 * GIB] < looks[32 * MIB] < looks[8 * MIB]


def test_what_one_look_admits_never_reaches_the_floor_of_sixteen_volumes() -> None:
    room = 160 * MIB
    worlds = [World(FLOOR + room) for _ in range(16)]
    admitted = 0
    for world in worlds:
        world.gate.admits(1)
        while world.disk.looks == 1:
            admitted += 1
            world.gate.admits(1)
    assert 0 < admitted * CHUNK <= room


def test_an_old_look_is_not_trusted() -> None:
    world = World(FLOOR + 64 * GIB)
    assert world.gate.admits(1)
    world.disk.free = 0
    world.clock.now += 2
    assert not world.gate.admits(1)


def test_a_refusal_is_not_looked_up_again_at_once() -> None:
    world = World(0)
    for _ in range(100):
        assert not world.gate.admits(1)
    assert world.disk.looks == 1
    world.disk.free = FLOOR + GIB
    world.clock.now += POLL_SECONDS
    assert world.gate.admits(1)


# --- patience ---------------------------------------------------------------------------------------------


def wait(world: World, since: float | None) -> float:
    since = run_sync(world.gate.wait(since))
    world.slept(POLL_SECONDS)
    return since


def test_patience_ends_and_belongs_to_the_shortage() -> None:
    world = World(0)
    since = None
    for _ in range(int(PATIENCE / POLL_SECONDS)):
        since = wait(world, since)
    with pytest.raises(OSError) as caught:
        wait(world, since)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError):  # the next one does not wait another time
        wait(world, None)
    assert (world.gate.waits, world.gate.failures, world.gate.short) == (2, 2, True)
    world.gate.written()
    assert not world.gate.short
    wait(world, None)


def test_a_request_that_others_overtake_is_not_held_for_ever() -> None:
    world = World(0)
    since = wait(world, None)
    for _ in range(int(PATIENCE / POLL_SECONDS) - 1):
        world.gate.written()
        since = wait(world, since)
    world.gate.written()
    with pytest.raises(OSError):
        wait(world, since)


@pytest.mark.parametrize("how", ["no patience", "hurried"])
def test_nobody_waits_when_nobody_shall(how: str) -> None:
    world = World(0, patience=0 if how == "no patience" else PATIENCE)
    world.gate.hurried = how == "hurried"
    with pytest.raises(OSError) as caught:
        wait(world, None)
    assert caught.value.errno == errno.ENOSPC


def test_not_all_requests_of_a_transport_wait_at_once() -> None:
    scheduler = DiceScheduler()
    world = World(0, scheduler=scheduler)
    tasks = [scheduler.spawn(str(n), world.gate.wait(None)) for n in range(MAX_WAITING + 1)]
    for task in tasks:
        task.go()
    assert [task.done for task in tasks] == [False] * MAX_WAITING + [True]
    assert world.gate.waiting == MAX_WAITING


# --- the engine -------------------------------------------------------------------------------------------


def do(scheduler: DiceScheduler, coroutine) -> object:
    """Run one request to its end while the others stand still."""
    task = scheduler.spawn("now", coroutine)
    while not task.done:
        assert task.ready, f"it waits at {task.at}"
        task.go()
    if task.error is not None:
        raise task.error
    return task.result


def short_engine(rig: Rig) -> tuple[World, DiceScheduler]:
    """An engine whose chunk 0 is in the head and chunk 1 in a sealed layer, on a disk without room."""
    rig.seal_content({1: 1}, 7)
    scheduler = DiceScheduler()
    world = World(GIB, scheduler=scheduler)
    rig.start(scheduler, space=world.gate)
    do(scheduler, rig.engine.write(0, b"a" * CHUNK))
    world.disk.free = 0
    world.clock.now += 2
    return world, scheduler


def test_all_but_new_chunks_goes_on_while_a_write_waits(rig):
    world, scheduler = short_engine(rig)
    engine = rig.engine
    before = do(scheduler, engine.read(CHUNK, CHUNK))
    waiting = scheduler.spawn("waiting", engine.write(CHUNK + 5, b"late"))
    scheduler.run_to(waiting, "sleep")
    assert do(scheduler, engine.write(0, b"b" * CHUNK)) == CHUNK
    assert do(scheduler, engine.read(CHUNK, CHUNK)) == before
    do(scheduler, engine.flush())
    do(scheduler, engine.discard(0, CHUNK))
    do(scheduler, engine.flush())
    assert do(scheduler, engine.reclaim()) == 1
    assert waiting.at == "sleep"

    world.disk.free = FLOOR + GIB
    scheduler.run()
    assert waiting.result == 4
    after = bytearray(before)
    after[5:9] = b"late"
    assert do(scheduler, engine.read(CHUNK, CHUNK)) == after
    assert do(scheduler, engine.read(0, CHUNK)) == bytes(CHUNK)
    assert world.gate.failures == 0
    assert not world.gate.short


def test_a_write_that_waited_in_vain_changed_nothing(rig):
    world, scheduler = short_engine(rig)
    before = do(scheduler, rig.engine.read(0, SIZE))
    with pytest.raises(OSError) as caught:
        do(scheduler, rig.engine.write(CHUNK - 10, b"x" * 20))
    assert caught.value.errno == errno.ENOSPC
    assert do(scheduler, rig.engine.read(0, SIZE)) == before
    assert not rig.engine.failed
    assert world.gate.waiting == 0


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("comes_back", [True, False])
def test_the_disk_itself_without_space_is_a_shortage_too(rig, error, comes_back):
    """Also of the map's own blocks, which come first; the gauge knows nothing of a quota."""
    scheduler = DiceScheduler()
    world = World(GIB, scheduler=scheduler)
    engine = rig.start(scheduler, space=world.gate)
    disk = rig.disk
    for number in range(2 if comes_back else 10_000):  # the extent of the map, and the page alone
        disk.fail["pwrite", disk.calls.get("pwrite", 0) + number] = error
    if comes_back:
        assert do(scheduler, engine.write(0, b"a" * CHUNK)) == CHUNK
        disk.fail["pwrite", disk.calls["pwrite"]] = error
        assert do(scheduler, engine.write(CHUNK, b"b")) == 1
        assert do(scheduler, engine.read(0, CHUNK + 1)) == b"a" * CHUNK + b"b"
        assert world.gate.waits == 2
    else:
        with pytest.raises(OSError) as caught:
            do(scheduler, engine.write(0, b"a" * CHUNK))
        assert caught.value.errno == errno.ENOSPC
        assert world.clock.now >= 1000 + PATIENCE
        assert engine.is_blank()
        do(scheduler, engine.flush())  # which must not need the blocks that the map did not get
    assert not engine.failed


def test_what_a_failed_write_left_in_the_head_is_punched(rig):
    class Partly(FakeDisk):
        """Writes a part, and has no space for the rest."""

        full = False

        def pwrite(self, fd, data, offset):
            if self.full and len(data) > CHUNK // 2:
                return super().pwrite(fd, memoryview(data)[: CHUNK // 2], offset)
            if self.full:
                raise OSError(errno.ENOSPC, "full")
            return super().pwrite(fd, data, offset)

    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        partly = Rig(Path(directory), SIZE, disk=Partly())
        engine = partly.start()
        partly.write(0, b"1")  # the map is written out
        blocks = os.fstat(partly.head_fds[0]).st_blocks
        partly.disk.full = True
        with pytest.raises(OSError):
            partly.write(5 * CHUNK, b"x" * CHUNK)
        assert os.fstat(partly.head_fds[0]).st_blocks > blocks
        partly.disk.full = False
        run_sync(engine.flush())
        run_sync(engine.reclaim())
        assert os.fstat(partly.head_fds[0]).st_blocks == blocks
        assert partly.read(5 * CHUNK, CHUNK) == bytes(CHUNK)
        partly.close()


def test_a_cancelled_waiter_leaves_nothing(rig):
    world, scheduler = short_engine(rig)
    waiting = scheduler.spawn("waiting", rig.engine.write(CHUNK, b"x"))
    scheduler.run_to(waiting, "sleep")
    waiting.cancel()
    assert world.gate.waiting == 0
    world.disk.free = FLOOR + GIB
    world.clock.now += 1
    assert do(scheduler, rig.engine.write(CHUNK, b"y")) == 1


def test_a_seal_does_not_wait_for_a_write_that_waits(rig):
    world, scheduler = short_engine(rig)
    waiting = scheduler.spawn("waiting", rig.engine.write(2 * CHUNK, b"z" * CHUNK))
    scheduler.run_to(waiting, "sleep")
    copy = do(scheduler, rig.seal())
    assert list(copy.entries[:3]) == [3, 1, 0], "the write was not answered, so the snapshot does not have it"
    # What was in place before needs a chunk of the new head now.
    with pytest.raises(OSError):
        do(scheduler, rig.engine.write(0, b"c"))
    world.gate.written()
    world.disk.free = FLOOR + GIB
    world.clock.now += 1
    scheduler.run()
    assert waiting.result == CHUNK
    assert do(scheduler, rig.engine.read(2 * CHUNK, CHUNK)) == b"z" * CHUNK


def test_a_growth_does_not_wait_for_a_write_that_waits(rig):
    world, scheduler = short_engine(rig)
    waiting = scheduler.spawn("waiting", rig.engine.write(2 * CHUNK, b"z"))
    scheduler.run_to(waiting, "sleep")
    do(scheduler, rig.grow(2 * SIZE))
    world.disk.free = FLOOR + GIB
    scheduler.run()
    assert waiting.result == 1
    assert do(scheduler, rig.engine.read(2 * CHUNK, 1)) == b"z"


def test_an_engine_closes_while_a_write_waits(rig):
    _, scheduler = short_engine(rig)
    waiting = scheduler.spawn("waiting", rig.engine.write(CHUNK, b"x"))
    scheduler.run_to(waiting, "sleep")
    do(scheduler, rig.engine.close())
    scheduler.run()
    assert isinstance(waiting.error, EngineClosed)


def test_a_chunk_that_a_seal_takes_away_while_the_write_queues_is_judged_anew(rig):
    """In place when it came, a new chunk when its turn comes: the judgement is made under the claim."""
    world, scheduler = short_engine(rig)
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.claimed")
    queued = scheduler.spawn("queued", rig.engine.write(0, b"q"))
    queued.go()
    while not seal.done:
        seal.go()
    scheduler.run_to(queued, "sleep")
    world.disk.free = FLOOR + GIB
    scheduler.run()
    assert queued.result == 1


def test_space_that_comes_and_goes_loses_no_write(rig):
    """Writers, a discarder and a flusher over a gauge that jumps: each write is there, or failed with ENOSPC."""
    content = rig.seal_content(dict.fromkeys(range(0, 20, 2), 1), 3)
    for seed in range(30):
        scheduler = DiceScheduler(seed)
        world = World(GIB, patience=3.0, scheduler=scheduler)
        engine = rig.start(scheduler, space=world.gate)
        dice = scheduler.dice

        def slept(seconds: float, world: World = world, dice=dice) -> None:
            world.clock.now += seconds
            world.disk.free = dice.choice([0, FLOOR, FLOOR + CHUNK, FLOOR + GIB])

        scheduler.on_sleep = slept
        world.disk.free = 0
        writers = []
        for chunk in range(20):
            data = dice.randbytes(dice.choice([100, CHUNK]))
            writers.append((chunk, data, scheduler.spawn(f"write {chunk}", engine.write(chunk * CHUNK, data))))
        scheduler.spawn("flush", engine.flush())
        scheduler.run()
        for chunk, data, task in writers:
            if task.error is None:
                content[chunk * CHUNK : chunk * CHUNK + len(data)] = data
            else:
                assert isinstance(task.error, OSError)
                assert task.error.errno == errno.ENOSPC
        assert do(scheduler, engine.read(0, SIZE)) == content
        do(scheduler, engine.close())
        rig.drop()
