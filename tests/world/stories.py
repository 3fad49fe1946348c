"""The operations of a store, each with a little history before it: what crash tests cut, fail and mutate.

Each ``Operation`` is told twice from the same seed: once whole, to count its calls, then once per crash. ``history``
makes one lineage with snapshots, copied-on-write chunks, discards, and data that was not flushed yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ebsd.domain.blocks import BLOCK
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.volume.engine import BlockEngine
from ebsd.volume.scheduling import run_sync

from .world import World

Names = dict[str, str]
"""What the history made: ``attached`` and ``detached`` volumes, ``first`` and ``second`` snapshot, and so on."""

BIGGER: Final = 20 * CHUNK


@dataclass(frozen=True)
class Operation:
    """``before`` is never cut, ``run`` is."""

    name: str
    run: Callable[[World, Names], object]
    before: Callable[[World, Names], object] = lambda world, names: None
    volatile: bool = True
    """``run`` needs the attached volume attached; else it is detached before."""


def history(world: World, *, attached: bool) -> Names:
    """Two volumes and two snapshots of one lineage; the last writes are not flushed while it is attached."""
    names: Names = {}
    volume = names["volume"] = world.create(World.ODD)
    world.attach(volume)
    world.write(volume, 100, b"a" * (2 * CHUNK + 777))
    world.write(volume, 8 * CHUNK, b"e" * CHUNK)
    world.flush(volume)
    names["first"] = world.snapshot(volume)
    world.write(volume, CHUNK - 300, b"b" * 1000)
    world.write(volume, 6 * CHUNK, b"f" * CHUNK)
    world.flush(volume)
    names["second"] = world.snapshot(volume)
    names["other"] = world.restore(names["first"], size=BIGGER)
    world.write(volume, 5 * CHUNK, b"c" * CHUNK)
    world.flush(volume)
    world.write(volume, 5 * CHUNK + 5000, b"d" * SECTOR)
    world.write(volume, 7 * CHUNK, b"g" * (CHUNK + 10))
    world.discard(volume, 8 * CHUNK, CHUNK)
    if not attached:
        world.detach(volume)
    return names


def _dirty(world: World, names: Names) -> None:
    """Some more that is not flushed: in place, copied, and zeroed."""
    volume = names["volume"]
    world.write(volume, 5 * CHUNK + 9 * SECTOR, b"h" * SECTOR)
    world.write(volume, 100, b"i" * 100)
    world.discard(volume, 6 * CHUNK, CHUNK)


def _write(world: World, names: Names) -> None:
    """Whole chunks, in place and new, over two layers."""
    world.write(names["volume"], 4 * CHUNK, b"j" * (4 * CHUNK))


def _write_unaligned(world: World, names: Names) -> None:
    world.write(names["volume"], CHUNK - 777, b"k" * (CHUNK + 1555))
    world.write(names["volume"], 5 * CHUNK + 10, b"l" * 20)
    world.write(names["volume"], 18 * CHUNK + SECTOR, b"l" * 20)


def _zero_unaligned(world: World, names: Names) -> None:
    world.write_zeroes(names["volume"], CHUNK - 700, 5 * CHUNK + 1400)


def _flush_between(world: World, names: Names) -> None:
    """A flush, then a write to what it froze, then another one."""
    _dirty(world, names)
    world.flush(names["volume"])
    world.write(names["volume"], 100, b"m" * 100)
    world.write(names["volume"], 3 * CHUNK, b"n" * CHUNK)
    world.flush(names["volume"])


def _attach_write_detach(world: World, names: Names) -> None:
    world.attach(names["volume"])
    world.write(names["volume"], CHUNK + 5, b"o" * 5000)
    world.detach(names["volume"])


def _hash_and_detach(world: World, names: Names) -> None:
    """The record of a detach is signed over the leaves of what was hashed."""
    world.hash_layers(names["volume"])
    world.write(names["volume"], CHUNK + 5, b"o" * 5000)
    world.detach(names["volume"])


def _snapshot_and_write(world: World, names: Names) -> None:
    """What is written right after the switch must not be in the snapshot, and not be lost."""
    world.snapshot(names["volume"])
    world.write(names["volume"], 5 * CHUNK, b"p" * CHUNK)
    world.flush(names["volume"])


def _delete_chain(world: World, names: Names) -> None:
    """Layers go, and chunks of the ones that stay."""
    world.delete_volume(names["other"])
    world.delete_snapshot(names["first"])


def _detached_writer(world: World, names: Names) -> None:
    """Let the sweep have chunks to punch: overwritten since the snapshot that named them is to go."""
    world.write(names["volume"], 0, b"q" * (CHUNK))
    world.flush(names["volume"])


def _forget_first(world: World, names: Names) -> None:
    """Make the sweep's work without letting it do it: a kill right behind the commit of a deletion."""
    world.write(names["volume"], 0, b"q" * CHUNK)
    world.flush(names["volume"])
    world.detach(names["volume"])


def _killed(world: World, names: Names) -> None:
    _dirty(world, names)
    world.kill_process(names["volume"])


def _alone(world: World, names: Names) -> None:
    names["alone"] = world.create(World.SIZE)


def _reserved(world: World, names: Names) -> None:
    """A preallocated volume that is in use: written, zeroed, and written again without a flush."""
    volume = names["reserved"] = world.create(World.ODD, preallocate=True)
    world.attach(volume)
    world.write(volume, 100, b"r" * (3 * CHUNK))
    world.discard(volume, CHUNK, CHUNK)
    world.flush(volume)
    world.write(volume, 5 * CHUNK - 50, b"s" * 100)


def _snapshot_reserved(world: World, names: Names) -> None:
    world.snapshot(names["reserved"])
    world.write(names["reserved"], 0, b"t" * 500)


def _own_layers(world: World, names: Names) -> None:
    """Two layers that only the volume names, of snapshots that came and went, and one that is shared."""
    volume = names["volume"]
    for at in (3, 4):
        snapshot = world.snapshot(volume)
        world.write(volume, at * CHUNK + 77, b"u" * (CHUNK + 5))
        world.delete_snapshot(snapshot)
    world.write(volume, 0, b"v" * 300)
    world.discard(volume, 7 * CHUNK, CHUNK)


def _drain_and_write(world: World, names: Names) -> None:
    """What is written and zeroed after a drain is in the same chunks."""
    volume = names["volume"]
    world.drain(volume)
    world.write(volume, 5 * CHUNK + 300, b"w" * 700)
    world.discard(volume, 3 * CHUNK, CHUNK)
    world.flush(volume)


def _drain_under_a_snapshot(world: World, names: Names) -> None:
    """A snapshot between the moves and the notice of them."""
    volume = names["volume"]
    process = world._process(volume)
    world._run(world.use.drains.begin, volume)
    world._as_volume(volume, lambda: run_sync(_some_moves(process.own._engine)))
    world.snapshot(volume)
    world.drain(volume)


async def _some_moves(engine: BlockEngine | None) -> None:
    assert engine is not None
    for chunk in range(6):
        await engine.drain(chunk)


def _large(world: World, names: Names) -> None:
    names["large"] = world.create(1020 * CHUNK)


def _cancelled(world: World, names: Names) -> None:
    world.cancelled_copy(names["second"])


def _fill(world: World, names: Names) -> None:
    """Over a parent: a block in place of data, one of zeros, and the last one, which the size cuts."""
    cut = BIGGER - 2 * BLOCK
    world.fill(names["second"], BIGGER, {0: b"r" * BLOCK, 1: bytes(BLOCK), 2: b"s" * cut + bytes(BLOCK - cut)})


def _fill_alone(world: World, names: Names) -> None:
    world.fill(None, 2 * BLOCK, {1: b"t" * BLOCK})


def _crashed(world: World, names: Names) -> None:
    """A snapshot, cut in its middle by a death of everything; its recovery is what comes next."""
    world.disk.arm(die_at=38)
    with world.may_die():
        world.snapshot(names["volume"])
    world.crash("kill")


def _crashed_restore(world: World, names: Names) -> None:
    world.disk.arm(die_at=12)
    with world.may_die():
        world.restore(names["second"], size=BIGGER)
    world.crash("kill")


def _crashed_copy(world: World, names: Names) -> None:
    world.disk.arm(die_at=40)
    with world.may_die():
        world.copy(names["second"], new_key=True)
    world.crash("kill")


def _crashed_power(world: World, names: Names) -> None:
    world.disk.arm(die_at=38)
    with world.may_die():
        world.snapshot(names["volume"])
    world.crash("power")


def _unused_head(world: World, names: Names) -> None:
    """A snapshot was given up before the process had switched to the new head: after the detach nobody names that."""
    world.disk.arm(die_at=10, scope="ebsd")
    with world.may_die():
        world.snapshot(names["volume"])
    world.crash("ebsd")
    world.recover(detach=False)
    world.detach(names["volume"])


def _recover(world: World, names: Names) -> None:
    world.recover()


OPERATIONS: Final = (
    Operation("create", lambda w, n: w.create(World.SIZE), volatile=False),
    Operation("create unencrypted", lambda w, n: w.create(World.SIZE, encrypted=False), volatile=False),
    Operation("create preallocated", lambda w, n: w.create(World.SIZE, preallocate=True), volatile=False),
    Operation("attach", lambda w, n: w.attach(n["volume"]), volatile=False),
    Operation("attach restored", lambda w, n: w.attach(n["other"])),
    Operation("write", _write),
    Operation("write unaligned", _write_unaligned),
    Operation("flush", lambda w, n: w.flush(n["volume"]), before=_dirty),
    Operation("flush between writes", _flush_between),
    Operation("tick", lambda w, n: w.tick(n["volume"]), before=_dirty),
    Operation("discard", lambda w, n: w.discard(n["volume"], 0, 7 * CHUNK)),
    Operation("write zeroes", _zero_unaligned),
    Operation("snapshot attached", _snapshot_and_write),
    Operation("snapshot detached", lambda w, n: w.snapshot(n["volume"]), volatile=False),
    Operation("snapshot preallocated", _snapshot_reserved, before=_reserved, volatile=False),
    Operation("restore", lambda w, n: w.restore(n["second"])),
    Operation("restore bigger", lambda w, n: w.restore(n["second"], size=2 * BIGGER)),
    Operation("restore under another key", lambda w, n: w.restore(n["second"], key="another")),
    Operation("copy", lambda w, n: w.copy(n["second"])),
    Operation("copy under another key", lambda w, n: w.copy(n["second"], new_key=True)),
    Operation("cancelled copy", _cancelled),
    Operation("blocks over a parent", _fill),
    Operation("resize attached", lambda w, n: w.resize(n["volume"], 2 * BIGGER)),
    Operation("resize detached", lambda w, n: w.resize(n["volume"], 2 * BIGGER), volatile=False),
    Operation("delete snapshot", lambda w, n: w.delete_snapshot(n["second"]), before=_detached_writer),
    Operation("delete snapshot, detached", lambda w, n: w.delete_snapshot(n["second"]), volatile=False),
    Operation("delete volume", lambda w, n: w.delete_volume(n["volume"]), volatile=False),
    Operation("delete volume and snapshot", _delete_chain),
    Operation("sweep", lambda w, n: w.sweep(), before=_dirty),
    Operation("drain", _drain_and_write, before=_own_layers),
    Operation("drain under a snapshot", _drain_under_a_snapshot, before=_own_layers),
    Operation("detach", lambda w, n: w.detach(n["volume"]), before=_dirty),
    Operation("detach after a death", lambda w, n: w.detach(n["volume"]), before=_killed),
    Operation("attach, write, detach", _attach_write_detach, volatile=False),
    Operation("hash sealed layers", lambda w, n: w.hash_layers(n["volume"])),
    Operation("hash, write, detach", _hash_and_detach),
    Operation("reopen", lambda w, n: w.reopen(), before=_dirty),
    Operation("recovery of a snapshot", _recover, before=_crashed),
    Operation("recovery of a restore", _recover, before=_crashed_restore),
    Operation("recovery of a copy", _recover, before=_crashed_copy),
    Operation("recovery after a power cut", _recover, before=_crashed_power),
)
"""Every operation of the product."""

FURTHER: Final = (
    Operation("blocks alone", _fill_alone),
    Operation("sweep of a whole layer", lambda w, n: w.sweep(), before=_unused_head),
    Operation("delete all of a lineage", lambda w, n: w.delete_volume(n["alone"]), before=_alone, volatile=False),
    Operation("resize over a map page", lambda w, n: w.resize(n["large"], 1030 * CHUNK), before=_large, volatile=False),
)
"""What single crashes are asked of, and what is too long, or too much like another one, to be cut everywhere."""

BY_NAME: Final = {operation.name: operation for operation in (*OPERATIONS, *FURTHER)}

__all__ = ["BIGGER", "BY_NAME", "FURTHER", "OPERATIONS", "Names", "Operation", "history"]
