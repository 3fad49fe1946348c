"""The test world itself: it runs the product through every operation and crash, and it notices what it must notice."""

from __future__ import annotations

import errno
import logging
import os

import pytest
from world import Broken, Died, Lost, World

from ebsd.domain.units import CHUNK, SECTOR
from ebsd.store.layers import segment_name


@pytest.fixture
def world():
    with World(seed=1) as made:
        yield made


def written(world: World, size: int = World.SIZE, *, encrypted: bool = True) -> str:
    """Return an attached volume with flushed data over three chunks."""
    volume = world.create(size, encrypted=encrypted)
    world.attach(volume)
    world.write(volume, 100, b"a" * (2 * CHUNK + 777))
    world.flush(volume)
    return volume


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_story_with_every_operation(world: World, encrypted: bool):
    volume = written(world, World.ODD, encrypted=encrypted)
    first = world.snapshot(volume)
    world.write(volume, CHUNK - 300, b"b" * 1000)
    world.discard(volume, 0, 2 * SECTOR)
    assert world.read(volume, 0, 4 * SECTOR)[: 2 * SECTOR] == bytes(2 * SECTOR)
    world.resize(volume, 20 * CHUNK)
    world.write(volume, 19 * CHUNK, b"c" * CHUNK)
    world.tick(volume)
    world.check(settle=False)
    world.reopen()
    world.detach(volume)
    second = world.snapshot(volume)
    restored = world.restore(first)
    larger = world.restore(second, size=24 * CHUNK)
    if encrypted:
        other_key = world.restore(first, key="another")
        world.delete_volume(other_key)
        world.copy(second, new_key=True)
    copied = world.copy(first)
    for clone in (restored, larger):
        world.attach(clone)
        world.write(clone, 3 * CHUNK, b"d" * 5000)
    world.check(settle=False)
    world.delete_snapshot(first)
    world.detach(restored)
    world.delete_volume(restored)
    world.detach(larger)
    world.delete_snapshot(copied)
    world.sweep()
    world.check()
    assert world.leaks() == []


@pytest.mark.parametrize("mode", ["lose", "keep", "random"])
def test_a_power_cut_keeps_what_was_flushed(world: World, mode: str):
    volume = written(world)
    world.snapshot(volume)
    world.write(volume, 0, b"b" * CHUNK)
    world.flush(volume)
    world.write(volume, 0, b"c" * CHUNK)
    boot = world.boot
    world.crash("power", mode)
    world.recover()
    assert world.boot != boot
    assert not any(v.attachment for v in world.volumes())
    content = world.content(volume)
    world.check()
    if mode == "lose":
        assert content[:CHUNK] == b"b" * CHUNK


def test_a_kill_keeps_what_was_answered(world: World):
    volume = written(world)
    world.write(volume, CHUNK, b"k" * CHUNK)
    world.crash("kill")
    world.recover()
    assert world.content(volume)[CHUNK : 2 * CHUNK] == b"k" * CHUNK
    world.check()


def test_volume_processes_outlive_ebsd_and_are_taken_over(world: World):
    volume = written(world)
    engine = world._engine(volume)
    world.crash("ebsd")
    world.recover()
    assert world._engine(volume) is engine
    world.write(volume, 0, b"after")
    world.detach(volume)
    world.check()


def test_the_death_of_a_volume_process_is_found_and_its_data_kept(world: World):
    volume = written(world)
    world.write(volume, 0, b"w" * CHUNK)
    world.kill_process(volume)
    world.detach(volume)
    assert world.content(volume)[:CHUNK] == b"w" * CHUNK
    world.check()


@pytest.mark.parametrize("kind", ["power", "kill", "ebsd"])
def test_a_snapshot_cut_at_some_calls_is_there_or_not(kind: str):
    with World(seed=2) as world:
        volume = written(world)
        calls = world.count(lambda: world.snapshot(volume))
        assert calls > 30
    outcomes = set()
    for die_at in (*range(0, calls, 5), calls - 1):
        with World(seed=2) as world:
            volume = written(world)
            world.disk.arm(die_at=die_at, scope="ebsd" if kind == "ebsd" else "")
            with world.may_die():
                world.snapshot(volume)
            world.crash(kind)
            world.recover()
            world.check()
            outcomes.add(len(world.snapshots()))
    assert outcomes == {0, 1}


def test_one_seed_is_one_story():
    logs = []
    for _ in range(2):
        with World(seed=7) as world:
            volume = written(world)
            snapshot = world.snapshot(volume)
            world.disk.disarm()
            world.copy(snapshot, new_key=True)
            names = [(c.name, os.path.basename(c.path), c.offset, c.length) for c in world.disk.log]
            logs.append([(n, "" if p.isdigit() else p, o, x) for n, p, o, x in names])
    assert logs[0] == logs[1]


def test_an_error_at_a_call_is_an_error_of_the_operation(world: World):
    volume = written(world)
    world.disk.arm(fail={("rename", 0): errno.ENOSPC})
    with pytest.raises(Exception, match="space"):
        world.snapshot(volume)
    world.disk.disarm()
    world.truth[volume].check(world.content(volume), volume)
    world.detach(volume)
    world.check()


def test_short_counts_and_interrupted_calls_change_nothing(world: World):
    world.disk.arm(short=world.dice)
    volume = written(world)
    world.snapshot(volume)
    world.write(volume, 5, b"s" * CHUNK)
    world.read(volume, 0, 4 * CHUNK)
    world.detach(volume)
    world.disk.disarm()
    world.check()


# --- what it must notice


def test_a_sync_of_data_that_lies_is_noticed(world: World):
    world.disk.lies = {"fdatasync"}
    written(world)
    world.crash("power", "lose")
    world.recover()
    with pytest.raises(Lost, match="wrong blocks"):
        world.check()


def test_a_sync_of_names_that_lies_is_noticed(world: World):
    volume = written(world)
    world.detach(volume)
    world.disk.lies = {"fsync_directory"}
    snapshot = world.snapshot(volume)
    world.disk.lies = set()
    world.crash("power", "lose")
    world.recover()
    with pytest.raises((Broken, OSError), match=f"{snapshot}|layers"):
        world.check()


def test_a_missing_sync_before_a_rename_is_noticed(world: World):
    world.disk.lies = {"fsync"}
    volume = written(world)
    world.detach(volume)
    with pytest.raises(BaseException, match=r"damage|wrong|too short|ends before|record|checksum"):  # noqa: PT012
        for _ in range(5):
            world.crash("power")
            world.recover()
            world.check()


def test_a_write_to_a_sealed_layer_is_noticed(world: World):
    volume = written(world)
    snapshot = world.snapshot(volume)
    world.invariants()
    row = world.row(snapshot)
    path = next((world.state.layers / row.lineage).glob("0000000001-*"))
    assert path.name.startswith(segment_name(1, bytes(16), 0)[:10])
    with open(path, "r+b") as file:
        file.seek(CHUNK)
        file.write(b"!")
    with pytest.raises(Broken, match="I2"):
        world.invariants()


def test_a_lost_acknowledged_write_is_noticed(world: World):
    volume = written(world)
    world.write(volume, 0, b"x" * SECTOR)
    world.truth[volume].acknowledge(world.truth[volume].begin(0, b"y" * SECTOR))
    with pytest.raises(Lost):
        world.read(volume, 0, SECTOR)


def test_files_that_nobody_names_are_noticed(world: World):
    written(world)
    (world.state.maps / "snap-0123456789abcdef0").write_bytes(b"")
    with pytest.raises(Broken, match="I3"):
        world.invariants()


def test_dead_is_dead(world: World):
    volume = written(world)
    world.disk.kill()
    with pytest.raises(Died):
        world.write(volume, 0, b"x")
    with pytest.raises(Died):
        world.snapshot(volume)
    world.crash("kill")
    world.recover()
    world.check()


def test_nothing_is_left_behind():
    before = {*os.listdir("/proc/self/fd")}
    logging.getLogger("ebsd").info("warm")
    with World(seed=3) as world:
        written(world)
        base = world.base
        world.crash("ebsd")
        world.recover()
    assert not base.exists()
    assert len({*os.listdir("/proc/self/fd")}) <= len(before)
