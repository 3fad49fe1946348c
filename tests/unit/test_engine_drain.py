"""Draining: chunks of layers that only this volume names move into the head, and nothing else changes."""

from __future__ import annotations

import errno
import os
import random
from collections import Counter

import pytest
import trio
import trio.testing
from dice_scheduler import DiceScheduler
from engine_rig import LINEAGE, Died, Rig, engine_kind  # noqa: F401 - runs everything over both engines

from ebsd.domain.errors import StoreDamaged
from ebsd.domain.units import CHUNK, MIB, SECTOR
from ebsd.store.layers import segment_name
from ebsd.volume.draining import BURST, BUSY_PAUSE, KEPT, MANY, SMALL, Drainer, to_drain
from ebsd.volume.engine import EngineClosed
from ebsd.volume.hashing import LeafChecks, hash_layer, late_runs
from ebsd.volume.scheduling import DirectScheduler, run_sync
from ebsd.volume.trio_scheduling import TrioScheduler

SIZE = 20 * CHUNK + 3 * SECTOR
PLAN = {0: 1, 1: 1, 2: 2, 5: 1, 20: 1}


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path, SIZE)
    yield rig
    rig.close()


def content_of(engine) -> bytes:
    return bytes(run_sync(engine.read(0, engine.size)))


def drain(engine, layers, **gates) -> Drainer:
    drainer = Drainer(engine, DirectScheduler(), **gates)
    drainer.begin(layers)
    assert drainer.pending
    run_sync(drainer.make_pass())
    assert not drainer.pending
    return drainer


def damage(rig: Rig, chunk: int, layer: int = 1) -> None:
    with (rig.directory / segment_name(layer, bytes([layer]) * 16, 0)).open("r+b") as file:
        file.seek(chunk * CHUNK)
        (value,) = file.read(1)
        file.seek(chunk * CHUNK)
        file.write(bytes([value ^ 4]))


# --- the choice


def test_small_layers_are_chosen_and_large_ones_stay():
    assert to_drain({1: SMALL, 2: SMALL + 1, 3: 1, 4: 1}, {1, 2, 3, 9}) == {1, 3}


def test_of_many_large_layers_the_smallest_are_chosen():
    chunks = {layer: SMALL + layer for layer in range(1, MANY + 2)}
    assert to_drain({layer: chunks[layer] for layer in range(1, MANY + 1)}, chunks) == frozenset()
    assert to_drain(chunks, chunks) == {*range(1, MANY + 2 - KEPT)}


def test_a_chunk_is_moved_a_few_times_however_many_snapshots_come_and_go():
    """A layer with a hundredth of the volume for each of 3000 snapshots: what is moved in all, per chunk written."""
    dice, written, moved, unit = random.Random(1), 0, 0, 100
    owner = [0] * 1000
    for head in range(1, 3000):
        first = dice.randrange(len(owner) - 10)
        owner[first : first + 10] = [head] * 10
        written += 10
        chunks = {layer: count * unit for layer, count in Counter(owner).items()}
        chosen = to_drain(chunks, {*chunks} - {head})
        if chosen:
            moved += sum(chunks[layer] for layer in chosen) // unit
            owner = [head if layer in chosen else layer for layer in owner]
        assert len({*owner}) <= MANY + 2
    assert moved <= 3 * written, f"{moved / written:.1f} chunks are moved for each that is written"


# --- moving


def test_what_was_drained_reads_the_same_and_its_layer_is_left(rig):
    content = rig.seal_content(PLAN, 3)
    engine = rig.start()
    drainer = drain(engine, {1})
    assert drainer.moved == 4
    assert engine.statistics().drained_chunks == 4
    assert content_of(engine) == content
    assert {chunk: layer for chunk, layer in enumerate(engine.entries_of(0, 99)[::4]) if layer} == {
        0: 3, 1: 3, 2: 2, 5: 3, 20: 3,
    }  # fmt: skip
    assert engine.left == {1}
    assert not engine.needs_flush
    rig.power_cut(random.Random(1))
    assert content_of(rig.start()) == content


def test_layers_that_are_not_said_to_be_exclusive_are_not_drained(rig):
    rig.seal_content(PLAN, 3)
    engine = rig.start()
    assert drain(engine, {2, 3, 17}).moved == 1
    assert engine.left == {2}
    assert not run_sync(engine.drain(0))
    assert not run_sync(engine.drain(1 << 20))


def test_nothing_is_drained_read_only(rig):
    rig.seal_content(PLAN, 3)
    engine = rig.start(read_only=True)
    assert drain(engine, {1, 2}).moved == 0


def test_a_seal_ends_it(rig):
    content = rig.seal_content(PLAN, 3)
    engine = rig.start()
    engine.let_drain({1, 2})
    run_sync(engine.drain(0))
    copy = run_sync(rig.seal())
    assert engine.exclusive == frozenset()
    assert not run_sync(engine.drain(1))
    assert rig.content_of(copy.entries) == content
    assert copy.left == {1}


def test_a_part_of_a_chunk_behind_the_end_is_zeros_when_the_volume_grows(rig):
    rig.seal_content(PLAN, 3)
    with (rig.directory / segment_name(1, bytes([1]) * 16, 0)).open("r+b") as file:
        file.seek(21 * CHUNK - 3 * SECTOR)
        file.write(b"x" * SECTOR)
    engine = rig.start()
    drain(engine, {1})
    run_sync(rig.grow(SIZE + 4 * SECTOR))
    assert bytes(run_sync(engine.read(SIZE, 4 * SECTOR))) == bytes(4 * SECTOR)


def test_damage_stays_where_it_is_and_the_rest_is_drained(rig):
    content = rig.seal_content(PLAN, 3)
    uuid = bytes([1]) * 16
    hash_layer(rig.disk, rig.dirfd, LINEAGE, 1, uuid, late_runs(rig.disk, rig.dirfd, 1, uuid, []))
    damage(rig, 1)
    checks = LeafChecks(rig.disk, rig.dirfd, LINEAGE)
    engine = rig.start(leaves=checks)
    drainer = drain(engine, {1, 2}, forget_all_but=checks.forget_all_but)
    assert drainer.moved == 2  # chunk 0 before it was met, and that of the other layer
    assert engine.entries_of(0, 6)[4] == 1
    with pytest.raises(StoreDamaged, match="chunk 1 of layer 1 has changed"):
        run_sync(engine.drain(1))
    drainer.begin({1, 2})
    run_sync(drainer.make_pass())
    assert drainer.moved == 0
    damage(rig, 1)
    assert content_of(engine) == content
    checks.close()


def test_a_missing_layer_fails_its_chunk_alone(rig):
    rig.seal_content(PLAN, 3)
    engine = rig.start()
    os.unlink(rig.directory / segment_name(1, bytes([1]) * 16, 0))
    assert drain(engine, {1, 2}).moved == 1


@pytest.mark.parametrize("call", ["pwrite", "pread"])
def test_an_error_leaves_the_chunk_where_it_was(rig, call):
    content = rig.seal_content(PLAN, 3)
    engine = rig.start()
    engine.let_drain({1})
    rig.disk.reset()
    rig.disk.fail = {(call, 0): errno.EIO}
    with pytest.raises(OSError, match="Input/output error"):
        run_sync(engine.drain(0))
    assert engine.entries_of(0, 1)[0] == 1
    assert content_of(engine) == content


def test_without_space_it_ends_and_nothing_is_lost(rig):
    content = rig.seal_content(PLAN, 3)
    engine = rig.start()
    rig.disk.reset()
    rig.disk.fail = {("pwrite", 1): errno.ENOSPC}
    drainer = drain(engine, {1})
    assert drainer.moved == 1
    assert engine.statistics().punch_queue == 1  # what a part of the pwrite may have left
    assert content_of(engine) == content
    drainer.begin({1})
    run_sync(drainer.make_pass())
    assert drainer.moved == 3
    assert content_of(engine) == content


def test_only_what_there_is_ample_space_for_is_drained(rig):
    rig.seal_content(PLAN, 3)
    engine = rig.start()
    assert drain(engine, {1, 2}, is_ample=lambda chunks: chunks < 5).moved == 1
    assert engine.left == {2}
    room = iter([True, True, True, False])
    assert drain(engine, {1}, is_ample=lambda chunks: next(room)).moved == 2


def test_what_is_told_as_left_is_told_until_it_is_taken_back(rig):
    rig.seal_content(PLAN, 3)
    engine = rig.start()
    engine.let_drain({1, 2})
    run_sync(engine.drain(0))
    assert engine.tell_left() == {1}
    run_sync(engine.drain(1))
    run_sync(engine.drain(2))
    engine.forget_left({1})
    assert engine.left == {1, 2}  # chunk 1 was moved off layer 1 after it was told
    assert engine.tell_left() == {1, 2}
    engine.forget_left({1, 2})
    assert engine.left == frozenset()


def test_files_of_layers_that_no_chunk_is_in_any_more_are_closed(rig):
    rig.seal_content(PLAN, 3)
    engine = rig.start()
    content_of(engine)
    assert {layer for layer, _ in engine._sealed} == {1, 2}
    drain(engine, {1})
    drain(engine, {1})
    assert {layer for layer, _ in engine._sealed} == {2}


def test_bursts_are_flushed(rig):
    plan = dict.fromkeys(range(20), 1)
    rig.seal_content(plan, 3)
    slept: list[float] = []
    passes: list[int] = []

    class Scheduler(DirectScheduler):
        async def sleep(self, seconds: float) -> None:
            slept.append(seconds)
            passes.append(engine.statistics().flush_passes)

    engine = rig.start()
    drainer = Drainer(engine, Scheduler())
    drainer.begin({1})
    run_sync(drainer.make_pass())
    assert BURST == MIB // CHUNK == 16
    assert passes == [1]
    assert slept[0] < BUSY_PAUSE


def test_beside_requests_the_bursts_are_far_apart(rig):
    rig.seal_content(dict.fromkeys(range(20), 1), 3)
    slept: list[float] = []

    class Scheduler(DirectScheduler):
        async def blocking(self, function, *args):
            if function == engine._read_whole:
                await engine.read(0, SECTOR)
            return function(*args)

        async def sleep(self, seconds: float) -> None:
            slept.append(seconds)

    engine = rig.start(Scheduler())
    drainer = Drainer(engine, Scheduler())
    drainer.begin({1})
    run_sync(drainer.make_pass())
    assert drainer.moved == 20
    assert len(slept) == 1
    assert slept[0] >= BUSY_PAUSE


@pytest.mark.trio
async def test_an_end_stops_it_between_two_chunks(rig):
    class SlowDisk(TrioScheduler):
        async def blocking(self, fn, *args):
            await trio.sleep(0.02)
            return await super().blocking(fn, *args)

    content = rig.seal_content(dict.fromkeys(range(20), 1), 3)
    engine = rig.start(SlowDisk())
    drainer = Drainer(engine, TrioScheduler())
    await drainer.end()  # nothing runs yet
    ready = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drainer.run, lambda: ready)
        drainer.begin({1})
        await trio.testing.wait_all_tasks_blocked()
        assert drainer.moved == 0, "the layers are not hashed yet"
        ready = True
        while drainer.moved < 3:
            await trio.sleep(0.01)
        await drainer.end()
    moved = engine.statistics().drained_chunks
    assert 3 <= moved < 20
    assert not drainer.pending
    assert bytes(await engine.read(0, SIZE)) == content
    assert len(engine._locks) == 0
    assert sum(1 for layer in engine.entries_of(0, 20)[::4] if layer == 1) == 20 - moved
    await engine.close()


def test_a_closed_engine_ends_it(rig):
    rig.seal_content(PLAN, 3)
    engine = rig.start()
    run_sync(engine.close())
    assert drain(engine, {1}).moved == 0
    with pytest.raises(EngineClosed):
        run_sync(engine.drain(0))


# --- others at the same time


@pytest.mark.parametrize("seed", range(60))
def test_requests_beside_it_lose_nothing(rig, seed):
    """Writes, discards, reads, flushes and a seal, each at any point of a drain."""
    dice = random.Random(seed)
    content = bytearray(rig.seal_content(PLAN, seed))
    scheduler = DiceScheduler(seed)
    engine = rig.start(scheduler)
    engine.let_drain({1, 2})
    copies = []

    async def change(chunk: int) -> None:
        if dice.random() < 0.3:
            await engine.discard(chunk * CHUNK, CHUNK)
            content[chunk * CHUNK : (chunk + 1) * CHUNK] = bytes(CHUNK)
            return
        offset = chunk * CHUNK + dice.choice([0, 100])
        data = dice.randbytes(dice.choice([300, SECTOR]))
        await engine.write(offset, data)
        content[offset : offset + len(data)] = data

    async def drains() -> None:
        for chunk in (0, 1, 2, 5):
            await engine.drain(chunk)

    async def seals() -> None:
        copies.append(await rig.seal())

    for chunk in dice.sample((0, 1, 2, 5), 3):
        scheduler.spawn("write", change(chunk))
    scheduler.spawn("drain", drains())
    scheduler.spawn("flush", engine.flush())
    if dice.random() < 0.5:
        scheduler.spawn("seal", seals())
    scheduler.run()
    assert not [task.error for task in scheduler.tasks if task.error is not None]
    quiet = DiceScheduler(1)
    read = quiet.spawn("read", engine.read(0, engine.size))
    quiet.run()
    assert bytes(read.result) == bytes(content)


@pytest.mark.parametrize("die_at", range(12))
def test_a_kill_or_a_cut_anywhere_loses_nothing(rig, die_at):
    content = rig.seal_content(PLAN, 3)
    for power in (False, True):
        engine = rig.start()
        rig.disk.reset()
        rig.disk.die_at = die_at
        try:
            drain(engine, {1, 2})
            engine.let_drain({1, 2})
        except Died:
            pass
        rig.disk.reset()
        if power:
            rig.power_cut(random.Random(die_at))
        else:
            rig.drop()
            rig.salvage()
        assert content_of(rig.start()) == content
        rig.drop()
