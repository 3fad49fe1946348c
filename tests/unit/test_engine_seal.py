"""Snapshots of a running engine: exactly the point in time, durable at return, and the old head never written again."""

from __future__ import annotations

import errno
import random
import tempfile
from pathlib import Path

import pytest
from dice_scheduler import DiceScheduler
from engine_rig import Died, Rig, engine_kind  # noqa: F401 - runs everything over both engines
from test_engine_schedules import History

from ebsd.domain.errors import StoreDamaged
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.store.entries import check_map_structure
from ebsd.store.salvage import SalvageOutcome, salvage
from ebsd.volume.engine import EngineClosed, EngineFailed, Head, SealedCopy
from ebsd.volume.scheduling import run_sync

CHUNKS = 4
SIZE = CHUNKS * CHUNK
SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None
POINTS = ["seal.before-claim", "seal.claimed", "seal.copied", "seal.switched", "seal.synced"]


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


# --- random schedules


class Point:
    """A snapshot: what it must show, noted while the engine holds everybody back, and the copy once it is there."""

    def __init__(self) -> None:
        self.expected: bytes | None = None
        self.copy: SealedCopy | None = None


def schedule(rig: Rig, seed: int) -> None:
    dice = random.Random(seed)
    plan = {c: dice.randint(1, 2) for c in range(CHUNKS) if dice.random() < 0.5}
    history = History(bytes(rig.seal_content(plan, seed)))
    points: list[Point] = []
    adopt = False
    for _ in range(3):
        scheduler = DiceScheduler(dice.randrange(2**32))
        engine = rig.start(scheduler, adopt=adopt)
        busy: set[int] = set()

        async def writer(engine=engine, busy=busy) -> None:
            for _ in range(dice.randrange(1, 4)):
                count = dice.choice([1, 1, 2, 16, 16])
                first = dice.randrange(SIZE // SECTOR - count + 1)
                if count == 16:
                    first = first // 16 * 16
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
                    got = data[at * SECTOR : (at + 1) * SECTOR]
                    assert got in allowed | history.after_cut(first + at), f"sector {first + at} is garbage"

        async def flusher(engine=engine) -> None:
            for _ in range(2):
                mark = {s: next(e for e in reversed(line) if e[1]) for s, line in history.values.items()}
                await engine.flush()
                history.flushed(mark)
                if dice.random() < 0.3:
                    await engine.find_leaks()
                if dice.random() < 0.6:
                    await engine.reclaim()

        async def sealer() -> None:
            for _ in range(dice.choice([1, 1, 2])):
                points.append(Point())
                points[-1].copy = await rig.seal()

        def note() -> None:
            points[-1].expected = b"".join(
                next(value for value, done in reversed(line) if done) for _, line in sorted(history.values.items())
            )

        scheduler.hooks["seal.claimed"] = note
        for name, task in (("writer", writer), ("writer", writer), ("writer", writer), ("reader", reader)):
            scheduler.spawn(name, task())
        scheduler.spawn("flusher", flusher())
        scheduler.spawn("sealer", sealer())
        scheduler.run(dice.choice([None, None, dice.randrange(10, 150)]))
        for task in scheduler.tasks:
            if task.error is not None:
                raise task.error
            if not task.done:
                task.coroutine.close()
        points[:] = [point for point in points if point.copy is not None]
        end = dice.choice(["kill", "cut", "cut", "adopt", "salvage then cut"])
        adopt = end == "adopt"
        if end == "cut":
            rig.power_cut(dice)
        else:
            rig.drop()
            if not adopt:
                assert rig.salvage().outcome is SalvageOutcome.APPLIED
            if end == "salvage then cut":
                rig.power_cut(dice)
        rig.check_durable()
        for point in points:
            assert point.copy is not None
            assert point.copy.chunks == CHUNKS
            check_map_structure(
                memoryview(bytes(point.copy.entries).ljust(4096, b"\0")), CHUNKS, range(1, rig.head), file="copy"
            )
            assert rig.content_of(point.copy.entries) == point.expected, f"not the point in time, after {end}"
        rig.start(adopt=adopt)
        content = rig.read(0, SIZE)
        for s in range(SIZE // SECTOR):
            got, choices = content[s * SECTOR : (s + 1) * SECTOR], history.after_cut(s)
            if end not in ("cut", "salvage then cut"):
                assert got in history.live(s), (end, s)
            for at in range(0, SECTOR, 512):  # a cut mixes blocks of 512 bytes
                assert any(got[at : at + 512] == c[at : at + 512] for c in choices), (end, s)
        if adopt:
            history.settle(content)
            rig.flush()
            rig.drop()
        else:
            history.settle(content)
            run_sync(rig.engine.close())
            rig.drop()
            rig.live_path.unlink()


@pytest.mark.parametrize("block", range(8))
def test_a_snapshot_is_the_point_in_time_whatever_happens_around_it(block):
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


# --- one by one


def test_a_snapshot_shows_the_moment_and_the_volume_goes_on(rig):
    rig.start()
    rig.write(0, b"a" * 2 * CHUNK)
    copy = run_sync(rig.seal())
    assert copy.layer == 3
    assert rig.engine.head == rig.live.head == 4
    assert copy.entries.tolist() == [3, 3, 0, 0]
    assert copy.entries.format == "I"
    assert copy.entries.readonly
    assert 0 <= copy.wait_us <= copy.pause_us
    rig.write(CHUNK, b"b")
    rig.flush()
    assert rig.durable_entries() == [3, 4, 0, 0]
    assert rig.content_of(copy.entries) == b"a" * 2 * CHUNK + bytes(2 * CHUNK)
    assert rig.read(0, 2 * CHUNK) == b"a" * CHUNK + b"b" + b"a" * (CHUNK - 1)


def test_there_is_no_sync_while_requests_are_held_back(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    do(scheduler, engine.write(0, b"a" * SIZE))
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.before-claim")
    do(scheduler, engine.write(0, b"b" * SIZE))
    rig.disk.reset()
    scheduler.run_to(seal, "flush.before-freeze")
    assert rig.disk.calls == {}
    assert rig.live.head == 4
    scheduler.run()
    assert seal.error is None


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("end", ["salvage", "salvage then cut", "cut", "adopt", "adopt then cut"])
def test_a_kill_at_each_point_loses_nothing_that_was_answered(rig, point, end):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    do(scheduler, engine.write(0, b"f" * SIZE), engine.flush())
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.before-claim")
    do(scheduler, engine.write(0, b"a" * CHUNK), engine.discard(3 * CHUNK, CHUNK))
    scheduler.run_to(seal, point)
    if point == "seal.synced":
        do(scheduler, engine.write(CHUNK, b"b" * 512))
    written = b"b" * 512 if point == "seal.synced" else b"f" * 512
    rig.drop()
    seal.coroutine.close()
    expected = b"a" * CHUNK + written + b"f" * (2 * CHUNK - 512) + bytes(CHUNK)
    if end == "cut":
        rig.power_cut(random.Random(1))
        rig.check_durable()
        rig.start()
        content = rig.read(0, SIZE)
        assert content[2 * CHUNK : 3 * CHUNK] == b"f" * CHUNK
        assert set(content[:CHUNK]) <= set(b"fa")
        assert set(content[3 * CHUNK :]) <= set(b"f\0")
        return
    if "adopt" in end:
        rig.start(adopt=True)
        assert rig.live.head == rig.head == 4
        assert rig.read(0, SIZE) == expected
        rig.flush()
        assert rig.live.oldest_unsynced == 4
    else:
        assert rig.salvage().outcome is SalvageOutcome.APPLIED
    if "cut" in end:
        rig.power_cut(random.Random(1))
    rig.drop()
    rig.check_durable()
    rig.live_path.unlink(missing_ok=True)
    rig.start()
    assert rig.read(0, SIZE) == expected


def test_salvage_syncs_the_old_head_and_the_new_one(rig):
    """Killed after the switch, entries name data in both layers that was never synced."""
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.before-claim")
    do(scheduler, engine.write(0, b"a" * CHUNK))
    scheduler.run_to(seal, "flush.before-freeze")
    do(scheduler, engine.write(CHUNK, b"b" * CHUNK))
    assert (rig.live.oldest_unsynced, rig.live.head) == (3, 4)
    rig.drop()
    seal.coroutine.close()
    assert rig.salvage().outcome is SalvageOutcome.APPLIED
    rig.power_cut(random.Random(1))
    rig.start()
    assert rig.read(0, 2 * CHUNK) == b"a" * CHUNK + b"b" * CHUNK
    assert rig.durable.header.head == 4


def test_a_salvage_that_cannot_know_the_layers_refuses(rig):
    scheduler = DiceScheduler()
    rig.start(scheduler)
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.switched")
    rig.drop()
    seal.coroutine.close()
    rig.start(adopt=True)
    live, durable = rig.live, rig.durable
    live.close()
    with pytest.raises(ValueError, match="layers 3 to 4"):
        salvage(
            rig.disk, rig.live_path, rig.identity, durable,
            data_fds=rig.head_fds, layers=rig.table.numbers(), head=4,
        )  # fmt: skip
    assert rig.live_path.exists()


def test_a_search_for_leaks_outlives_the_descriptors_of_a_head_that_is_sealed_meanwhile(rig):
    """Found by a random schedule: the helper thread asked a descriptor that the seal's caller had closed."""
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    do(scheduler, engine.write(0, b"a" * CHUNK), engine.discard(0, CHUNK))
    search = scheduler.spawn("search", engine.find_leaks())
    scheduler.run_to(search, "blocking")
    do(scheduler, rig.seal())
    scheduler.run()
    assert search.error is None
    assert search.result == 0
    assert engine.statistics().punch_queue == 0


def test_the_new_head_is_in_the_header_before_anything_can_be_in_it(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    seen: list[int] = []
    scheduler.hooks["seal.copied"] = lambda: seen.append(rig.live.head)
    scheduler.hooks["seal.switched"] = lambda: seen.append(rig.live.head)
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.switched")
    writer = scheduler.spawn("writer", engine.write(0, b"x" * CHUNK))
    writer.go()
    assert writer.at == "event"
    assert seen == [3, 4]
    scheduler.run()
    assert (seal.error, writer.error) == (None, None)


def test_a_pass_that_froze_before_the_pause_does_not_answer_for_what_came_after(rig):
    """Its copies and its segments are of the old head; writes between its freeze and the pause are for the next."""
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.before-claim")
    do(scheduler, engine.write(0, b"a" * CHUNK))
    flush = scheduler.spawn("flush", engine.flush())
    scheduler.run_to(flush, "flush.frozen")
    do(scheduler, engine.write(CHUNK, b"b" * CHUNK))
    scheduler.run_to(seal, "seal.switched")
    while not flush.done:
        flush.go()
    assert rig.live.oldest_unsynced == 3
    scheduler.run()
    assert seal.error is None
    assert rig.live.oldest_unsynced == 4
    rig.power_cut(random.Random(2))
    assert rig.content_of(seal.result.entries)[: 2 * CHUNK] == b"a" * CHUNK + b"b" * CHUNK


def test_a_kill_after_a_pass_that_synced_before_the_pause_loses_nothing(rig):
    """The salvage syncs the old head for what came after that pass synced it, though it has ended since the switch."""
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.before-claim")
    do(scheduler, engine.write(0, b"a" * CHUNK))
    flush = scheduler.spawn("flush", engine.flush())
    scheduler.run_to(flush, "flush.data-synced")
    do(scheduler, engine.write(CHUNK, b"b" * CHUNK))
    scheduler.run_to(seal, "seal.switched")
    while not flush.done:
        flush.go()
    rig.drop()
    seal.coroutine.close()
    assert rig.salvage().outcome is SalvageOutcome.APPLIED
    rig.power_cut(random.Random(1))
    rig.start()
    assert rig.read(0, 2 * CHUNK) == b"a" * CHUNK + b"b" * CHUNK


def test_a_flush_that_arrives_during_the_pause_covers_the_writes_before_it(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    do(scheduler, engine.write(0, b"a" * CHUNK), engine.flush())
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.before-claim")
    do(scheduler, engine.write(0, b"b" * CHUNK))
    scheduler.run_to(seal, "seal.switched")
    flush = scheduler.spawn("flush", engine.flush())
    while not flush.done:
        flush.go()
    rig.power_cut(random.Random(3))
    seal.coroutine.close()
    rig.start()
    assert rig.read(0, CHUNK) == b"b" * CHUNK


def test_readers_and_writers_in_work_are_drained_and_later_ones_wait(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    do(scheduler, engine.write(0, b"a" * CHUNK))
    reader = scheduler.spawn("reader", engine.read(0, CHUNK))
    scheduler.run_to(reader, "read.looked-up")
    writer = scheduler.spawn("writer", engine.write(CHUNK, b"b" * CHUNK))
    scheduler.run_to(writer, "write.data-written")
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "event")
    late = scheduler.spawn("late", engine.write(2 * CHUNK, b"c" * CHUNK))
    late.go()
    assert (seal.ready, late.ready) == (False, False)
    scheduler.run_to(writer, "done")
    assert not seal.ready  # the reader is still at work
    scheduler.run()
    assert rig.content_of(seal.result.entries) == b"a" * CHUNK + b"b" * CHUNK + bytes(2 * CHUNK)
    assert rig.live.entries[:4].tolist() == [3, 3, 4, 0]


def test_pages_that_change_while_the_map_is_copied_are_copied_again(rig):
    """The copy is made while requests run."""
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    do(scheduler, engine.write(0, b"a" * 2 * CHUNK))
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "flush.map-synced")
    scheduler.run_to(seal, "blocking")  # the copy is about to begin
    do(scheduler, engine.write(2 * CHUNK, b"b" * CHUNK))
    seal.go()
    assert seal.at == "blocked"
    do(scheduler, engine.discard(0, CHUNK))
    scheduler.run()
    assert seal.result.entries.tolist() == [0, 3, 3, 0]


def test_chunks_of_the_old_head_are_not_punched_after_the_seal(rig):
    """Discarded, flushed and queued: the snapshot before it may name them, and the layer is sealed."""
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    do(scheduler, engine.write(0, b"a" * CHUNK), engine.flush(), engine.discard(0, CHUNK))
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "done")
    assert seal.error is None
    do(scheduler, engine.flush())
    punch = scheduler.spawn("reclaim", engine.reclaim())
    scheduler.run_to(punch, "done")
    assert (punch.error, punch.result) == (None, 0)
    assert rig.disk.calls.get("punch", 0) == 0


def test_leaks_of_the_old_head_are_not_looked_for_in_the_new_one(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    do(scheduler, engine.write(0, b"a" * SIZE), engine.flush(), engine.discard(0, SIZE), engine.flush())
    engine._punch_queue.clear()
    leaks = scheduler.spawn("leaks", engine.find_leaks())
    scheduler.run_to(leaks, "blocked")
    do(scheduler, rig.seal())
    scheduler.run()
    assert leaks.result == 0
    assert engine.statistics().punch_queue == 0


def test_one_seal_at_a_time(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.claimed")
    with pytest.raises(OSError) as caught:
        run_sync(engine.seal(Head(5, rig.head_fds), rig.table))
    assert caught.value.errno == errno.EBUSY
    scheduler.run()
    do(scheduler, rig.seal())
    assert engine.head == 5


def test_a_head_or_a_table_that_does_not_fit_is_refused_and_nothing_changes(rig):
    engine = rig.start()
    new = rig.announce_head()
    for head, table in (
        (Head(3, rig.head_fds), rig.table),
        (Head(5, new.fds), rig.table),
        (Head(4, ()), rig.table),
        (Head(4, new.fds), type(rig.table)(rig.table.lineage, 4096, rig.table.cipher, rig.table.layers[1:])),
    ):
        with pytest.raises(ValueError):
            run_sync(engine.seal(head, table))
    assert engine.head == rig.live.head == 3
    run_sync(engine.seal(new, rig.table))
    assert engine.head == 4


def test_a_read_only_engine_is_not_sealed(rig):
    engine = rig.start(read_only=True)
    with pytest.raises(OSError) as caught:
        run_sync(engine.seal(Head(4, rig.head_fds), rig.table))
    assert caught.value.errno == errno.EROFS


def test_an_error_of_the_sync_after_the_switch_ends_the_engine(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.before-claim")
    do(scheduler, engine.write(0, b"a" * CHUNK))
    rig.disk.reset()
    rig.disk.fail["fdatasync", 0] = errno.EIO
    scheduler.run()
    assert isinstance(seal.error, EngineFailed)
    assert rig.live.failed
    assert engine.head == 4


def test_an_engine_that_fails_or_closes_before_the_pause_is_not_switched(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.before-claim")
    do(scheduler, engine.close())
    scheduler.run()
    assert isinstance(seal.error, EngineClosed)
    assert rig.live.head == 3
    with pytest.raises(EngineClosed):
        run_sync(engine.seal(Head(4, rig.next_fds), rig.table))


def test_an_engine_that_failed_during_the_pause_is_not_switched(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.before-claim")
    do(scheduler, engine.write(0, b"a"))
    rig.disk.reset()
    rig.disk.fail["fdatasync", 0] = errno.EIO
    flush = scheduler.spawn("flush", engine.flush())
    scheduler.run_to(flush, "blocking")
    scheduler.run_to(seal, "seal.copied")
    scheduler.run_to(flush, "done")
    scheduler.run()
    assert isinstance(seal.error, EngineFailed)
    assert (engine.head, rig.live.head) == (3, 3)


def test_seals_one_after_the_other_and_copy_on_write_through_all_layers(rig):
    rig.start()
    copies = []
    for turn in range(5):
        rig.write(turn % CHUNKS * CHUNK, bytes([turn + 1]) * 512)
        copies.append((rig.read(0, SIZE), run_sync(rig.seal())))
    for content, copy in copies:
        assert rig.content_of(copy.entries) == content
    rig.write(0, b"x")
    assert rig.live.entries[0] == rig.head == 8


def test_the_hash_at_the_end_is_of_the_whole_map_after_a_seal(rig):
    rig.start()
    rig.write(0, b"a")
    run_sync(rig.seal())
    rig.write(CHUNK, b"b")
    assert run_sync(rig.engine.close())
    assert rig.durable_entries() == [3, 4, 0, 0]


def test_an_engine_that_takes_a_newer_head_over_says_so_before_its_first_write(rig):
    """The row of the new head was committed, and the engine that was to be sealed died."""
    rig.start()
    rig.write(0, b"a" * CHUNK)
    rig.announce_head()
    rig.drop()
    rig.start(adopt=True)
    assert (rig.live.oldest_unsynced, rig.live.head, rig.engine.head) == (3, 4, 4)
    rig.write(CHUNK, b"b" * CHUNK)
    rig.drop()
    assert rig.salvage().outcome is SalvageOutcome.APPLIED
    rig.power_cut(random.Random(5))
    rig.start()
    assert rig.read(0, 2 * CHUNK) == b"a" * CHUNK + b"b" * CHUNK


def test_the_first_pass_syncs_what_was_the_head_lately_whatever_the_caller_knows(rig):
    scheduler = DiceScheduler()
    engine = rig.start(scheduler)
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.before-claim")
    do(scheduler, engine.write(0, b"a" * CHUNK))
    scheduler.run_to(seal, "seal.switched")
    rig.drop()
    seal.coroutine.close()
    rig.start(adopt=True)._unsynced = ()
    rig.flush()
    rig.power_cut(random.Random(1))
    rig.start()
    assert rig.read(0, CHUNK) == b"a" * CHUNK


def test_an_engine_never_goes_back_to_an_older_head(rig):
    rig.start()
    run_sync(rig.seal())
    rig.drop()
    rig.head = 3
    with pytest.raises(ValueError):
        rig.start(adopt=True)


def test_a_missing_recent_layer_is_found_by_the_salvage(rig):
    scheduler = DiceScheduler()
    rig.start(scheduler)
    seal = scheduler.spawn("seal", rig.seal())
    scheduler.run_to(seal, "seal.switched")
    rig.drop()
    seal.coroutine.close()
    (rig.directory / f"0000000003-{'03' * 16}.000").unlink()
    with pytest.raises(StoreDamaged):
        rig.salvage()
    assert rig.live_path.exists()


def test_dying_in_the_sync_after_the_switch(rig):
    for calls in range(6):
        rig.start()
        rig.write(0, bytes([calls + 1]) * CHUNK)
        rig.disk.reset()
        rig.disk.die_at = calls + 3
        try:
            run_sync(rig.seal())
        except Died:
            rig.drop()
            rig.disk.reset()
            assert rig.salvage().outcome is SalvageOutcome.APPLIED
        else:
            run_sync(rig.engine.close())
            rig.drop()
            rig.disk.reset()
            rig.live_path.unlink()
        rig.power_cut(random.Random(calls))
        rig.start()
        assert rig.read(0, CHUNK) == bytes([calls + 1]) * CHUNK
        run_sync(rig.engine.close())
        rig.drop()
        rig.live_path.unlink()
