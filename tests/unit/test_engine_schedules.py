"""The engine under random schedules: every point preempts; kills and power cuts fall anywhere."""

from __future__ import annotations

import errno
import random
import tempfile
from pathlib import Path

import pytest
from dice_scheduler import DiceScheduler
from engine_rig import BLOCK, Rig, engine_kind  # noqa: F401 - runs everything over both engines

from ebsd.domain.units import CHUNK, SECTOR
from ebsd.store.salvage import SalvageOutcome
from ebsd.volume.engine import EngineFailed
from ebsd.volume.scheduling import run_sync

CHUNKS = 4
SIZE = CHUNKS * CHUNK
SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.fixture
def rig():
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        rig = Rig(Path(directory), SIZE)
        yield rig
        rig.close()


class History:
    """What each sector may hold. Sectors are written whole here, by writers that never overlap in flight.

    ``values[s]``: (value, acknowledged) in order since the last flush that is known to cover the first one.
    """

    def __init__(self, content: bytes) -> None:
        self.values = {s: [(content[s * SECTOR : (s + 1) * SECTOR], True)] for s in range(SIZE // SECTOR)}

    def begin(self, sector: int, value: bytes) -> list[object]:
        entry = [value, False]
        self.values[sector].append(entry)  # type: ignore[arg-type]
        return entry

    def live(self, sector: int) -> set[bytes]:
        """The last acknowledged value, and everything later."""
        line = self.values[sector]
        newest = max(i for i, (_, acknowledged) in enumerate(line) if acknowledged)
        return {value for value, _ in line[newest:]}

    def after_cut(self, sector: int) -> set[bytes]:
        return {value for value, _ in self.values[sector]}

    def mark(self) -> dict[int, int]:
        """Index of the newest acknowledged value of each sector: what a flush begun now makes durable."""
        return {s: max(i for i, (_, a) in enumerate(line) if a) for s, line in self.values.items()}

    def flushed(self, mark: dict[int, object]) -> None:
        for sector, entry in mark.items():
            line = self.values[sector]
            for at, item in enumerate(line):
                if item is entry:
                    del line[:at]
                    break

    def settle(self, content: bytes) -> None:
        self.__init__(content)  # type: ignore[misc]


def schedule(rig: Rig, seed: int) -> None:
    dice = random.Random(seed)
    plan = {c: dice.randint(1, 2) for c in range(CHUNKS) if dice.random() < 0.5}
    content = bytes(rig.seal_content(plan, seed))
    history = History(content)
    for _ in range(3):
        scheduler = DiceScheduler(dice.randrange(2**32))
        engine = rig.start(scheduler)
        busy: set[int] = set()

        async def writer(engine=engine, busy=busy) -> None:
            for _ in range(dice.randrange(1, 4)):
                count = dice.choice([1, 1, 2, 16])
                first = dice.randrange(SIZE // SECTOR - count + 1)
                if dice.random() < 0.3:
                    first, count = first // 16 * 16, 16
                sectors = range(first, first + count)
                if busy.intersection(sectors):
                    continue
                busy.update(sectors)
                zero = dice.random() < 0.4
                values = [bytes(SECTOR) if zero else dice.randbytes(8) * (SECTOR // 8) for _ in sectors]
                entries = [history.begin(s, v) for s, v in zip(sectors, values, strict=True)]
                if zero:
                    await engine.discard(first * SECTOR, count * SECTOR)
                else:
                    await engine.write(first * SECTOR, b"".join(values))
                for entry in entries:
                    entry[1] = True
                busy.difference_update(sectors)

        async def reader(engine=engine) -> None:
            for _ in range(3):
                count = dice.choice([1, 4, 20])
                first = dice.randrange(SIZE // SECTOR - count + 1)
                before = [history.live(s) for s in range(first, first + count)]
                data = bytes(await engine.read(first * SECTOR, count * SECTOR))
                for at, allowed in enumerate(before):
                    sector = first + at
                    got = data[at * SECTOR : (at + 1) * SECTOR]
                    assert got in allowed | history.after_cut(sector), f"sector {sector} is garbage"

        async def flusher(engine=engine) -> None:
            for _ in range(2):
                mark = {s: next(e for e in reversed(line) if e[1]) for s, line in history.values.items()}
                await engine.flush()
                history.flushed(mark)
                if dice.random() < 0.6:
                    await engine.reclaim()

        for at in range(4):
            scheduler.spawn(f"writer{at}", writer())
        for at in range(2):
            scheduler.spawn(f"reader{at}", reader())
        for at in range(2):
            scheduler.spawn(f"flusher{at}", flusher())
        scheduler.run(dice.choice([None, None, dice.randrange(10, 200)]))
        for task in scheduler.tasks:
            if task.error is not None:
                raise task.error
            if not task.done:
                task.coroutine.close()
        end = dice.choice(["kill", "kill", "cut", "cut", "adopt then cut"])
        if end == "kill":
            rig.drop()
            assert rig.salvage().outcome is SalvageOutcome.APPLIED
            allowed = history.live
        elif end == "cut":
            rig.power_cut(dice)
            rig.check_durable()
            allowed = history.after_cut
        else:
            rig.drop()
            engine = rig.start(adopt=True)
            state = rig.read(0, SIZE)
            for s in range(SIZE // SECTOR):
                assert state[s * SECTOR : (s + 1) * SECTOR] in history.live(s)
            history.settle(state)
            rig.flush()
            rig.power_cut(dice)
            allowed = history.after_cut
        rig.start()
        content = rig.read(0, SIZE)
        for s in range(SIZE // SECTOR):
            got = content[s * SECTOR : (s + 1) * SECTOR]
            choices = allowed(s)
            if got not in choices:  # a cut mixes blocks of 512 bytes
                for at in range(0, SECTOR, BLOCK):
                    assert any(got[at : at + BLOCK] == c[at : at + BLOCK] for c in choices), (end, s)
        history.settle(content)
        run_sync_close(rig)


def run_sync_close(rig: Rig) -> None:
    run_sync(rig.engine.close())
    rig.drop()
    rig.live_path.unlink()


@pytest.mark.parametrize("block", range(8))
def test_random_schedules_with_kills_and_power_cuts_lose_nothing(block):
    for seed in range(block * 25, block * 25 + 25):
        with tempfile.TemporaryDirectory(dir=SHM) as directory:
            rig = Rig(Path(directory), SIZE)
            try:
                schedule(rig, seed)
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
            finally:
                rig.close()


def test_a_flush_that_comes_after_the_freeze_is_not_answered_by_that_pass(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    first = scheduler.spawn("first", engine.flush())
    scheduler.run_to(first, "flush.frozen")
    late_write = scheduler.spawn("write", engine.write(0, b"late" * 1024))
    scheduler.run_to(late_write, "done")
    second = scheduler.spawn("second", engine.flush())
    second.go()
    while not first.done:
        first.go()
    assert not second.done
    scheduler.run()
    assert engine.statistics().flush_passes == 2
    rig.power_cut(random.Random(1))
    rig.start()
    assert rig.read(0, 4096) == b"late" * 1024


def test_flushes_that_come_before_the_freeze_share_one_pass(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    running = scheduler.spawn("running", engine.flush())
    scheduler.run_to(running, "flush.frozen")
    for n in range(5):
        scheduler.spawn(f"flush{n}", engine.flush()).go()
    scheduler.run()
    assert engine.statistics().flushes == 6
    assert engine.statistics().flush_passes == 2


def test_a_pass_writes_the_entries_it_copied_and_not_later_ones(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    write = scheduler.spawn("write", engine.write(0, bytes(CHUNK)))
    scheduler.run_to(write, "done")
    flush = scheduler.spawn("flush", engine.flush())
    scheduler.run_to(flush, "flush.data-synced")
    later = scheduler.spawn("later", engine.write(CHUNK, bytes(CHUNK)))
    scheduler.run_to(later, "done")
    scheduler.run_to(flush, "done")
    assert rig.durable_entries()[:2] == [rig.head, 0]
    assert rig.live.marked_pages() == [0]
    scheduler.run_to(scheduler.spawn("flush", engine.flush()), "done")
    assert rig.durable_entries()[:2] == [rig.head, rig.head]
    assert rig.live.marked_pages() == []


def test_marks_of_a_pass_stay_until_the_map_is_durable(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    scheduler.run_to(scheduler.spawn("write", engine.write(0, b"kept" * 1024)), "done")
    flush = scheduler.spawn("flush", engine.flush())
    scheduler.run_to(flush, "flush.data-synced")
    rig.drop()  # killed between the copies and their pwrite
    assert rig.salvage().pages == 1
    rig.start()
    assert rig.read(0, 4096) == b"kept" * 1024


@pytest.mark.parametrize("point", ["flush.before-freeze", "flush.frozen", "flush.data-synced", "flush.map-written"])
def test_a_cancelled_flush_answers_nobody_and_the_next_one_does_its_work(rig, point):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    scheduler.run_to(scheduler.spawn("first", engine.flush()), "done")
    scheduler.run_to(scheduler.spawn("write", engine.write(0, b"kept" * 1024)), "done")
    leader = scheduler.spawn("leader", engine.flush())
    joiner = scheduler.spawn("joiner", engine.flush())
    leader.go()
    joiner.go()
    assert joiner.at == "event"
    scheduler.run_to(leader, point)
    leader.cancel()
    assert not joiner.done
    scheduler.run()
    assert joiner.error is None
    rig.power_cut(random.Random(1))
    rig.start()
    assert rig.read(0, 4096) == b"kept" * 1024


def test_a_cancelled_waiter_gives_its_place_in_the_queue_up(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    holder = scheduler.spawn("holder", engine.write(0, bytes(SECTOR)))
    scheduler.run_to(holder, "write.claimed")
    waiter = scheduler.spawn("waiter", engine.write(0, bytes(SECTOR)))
    reader = scheduler.spawn("reader", engine.read(0, SECTOR))
    waiter.go()
    reader.go()
    waiter.cancel()
    scheduler.run()
    assert reader.result == bytes(SECTOR)
    assert len(engine._locks) == 0


def test_readers_share_a_chunk_and_a_writer_waits_for_them(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    scheduler.run_to(scheduler.spawn("write", engine.write(0, bytes([1]) * CHUNK)), "done")
    readers = [scheduler.spawn("reader", engine.read(0, CHUNK)) for _ in range(2)]
    for reader in readers:
        scheduler.run_to(reader, "read.looked-up")
    writer = scheduler.spawn("writer", engine.write(0, bytes([2]) * CHUNK))
    writer.go()
    assert not writer.ready
    late = scheduler.spawn("late reader", engine.read(0, CHUNK))
    late.go()
    assert not late.ready  # behind the writer: nobody starves
    scheduler.run()
    assert [bytes(r.result) for r in readers] == [bytes([1]) * CHUNK] * 2
    assert bytes(late.result) == bytes([2]) * CHUNK


def test_a_queued_punch_is_cancelled_by_a_rewrite(rig):
    rig.start()
    rig.write(0, bytes([1]) * CHUNK)
    rig.flush()
    run_sync(rig.engine.discard(0, CHUNK))
    rig.flush()
    rig.write(0, bytes([2]) * CHUNK)
    assert run_sync(rig.engine.reclaim()) == 0
    assert rig.read(0, CHUNK) == bytes([2]) * CHUNK


def test_a_chunk_discarded_again_after_a_flush_waits_for_the_next_flush(rig):
    rig.start()
    rig.write(0, bytes([1]) * CHUNK)
    rig.flush()
    run_sync(rig.engine.discard(0, CHUNK))
    rig.flush()
    rig.write(0, bytes([2]) * CHUNK)
    rig.flush()  # the durable entry names the head again
    run_sync(rig.engine.discard(0, CHUNK))
    assert run_sync(rig.engine.reclaim()) == 0
    rig.flush()
    assert run_sync(rig.engine.reclaim()) == 1


def test_a_punch_that_waited_looks_again_whether_the_zero_is_durable(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    for step in (engine.write(0, bytes([1]) * CHUNK), engine.flush(), engine.discard(0, CHUNK), engine.flush()):
        scheduler.run_to(scheduler.spawn("set up", step), "done")
    writer = scheduler.spawn("writer", engine.write(0, bytes([2]) * CHUNK))
    scheduler.run_to(writer, "write.claimed")
    discard = scheduler.spawn("discard", engine.discard(0, CHUNK))
    discard.go()
    reclaim = scheduler.spawn("reclaim", engine.reclaim())
    reclaim.go()
    assert (discard.at, reclaim.at) == ("event", "event")
    scheduler.run_to(writer, "done")
    scheduler.run_to(scheduler.spawn("flush", engine.flush()), "done")  # the durable entry names the head again
    scheduler.run()
    assert reclaim.result == 0
    rig.power_cut(random.Random(1))
    rig.start()
    assert rig.read(0, CHUNK) == bytes([2]) * CHUNK


def test_a_punch_never_runs_under_a_reader(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    for step in (engine.write(0, bytes([1]) * CHUNK), engine.flush()):
        scheduler.run_to(scheduler.spawn("set up", step), "done")
    reader = scheduler.spawn("reader", engine.read(0, CHUNK))
    scheduler.run_to(reader, "read.looked-up")

    async def discard_flush_punch() -> None:
        await engine.discard(0, CHUNK)
        await engine.flush()
        await engine.reclaim()

    other = scheduler.spawn("other", discard_flush_punch())
    while other.ready:
        other.go()
    scheduler.run()
    assert bytes(reader.result) == bytes([1]) * CHUNK
    assert rig.disk.calls["punch"] == 1


def test_a_failed_pass_fails_every_flush_that_joined_it_and_everything_after(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    flushes = [scheduler.spawn(f"flush{n}", engine.flush()) for n in range(3)]
    rig.disk.reset()
    rig.disk.fail[("fdatasync", 0)] = errno.EIO
    scheduler.run()
    assert all(isinstance(flush.error, EngineFailed) for flush in flushes)
    for request in (engine.read(0, 1), engine.write(0, b"x"), engine.flush(), engine.discard(0, 1), engine.close()):
        task = scheduler.spawn("after", request)
        scheduler.run()
        assert isinstance(task.error, EngineFailed)
        assert task.error.errno == errno.EIO
    assert rig.live.failed
