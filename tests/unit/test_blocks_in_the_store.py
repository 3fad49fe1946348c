"""Snapshots made of blocks among others: their space, their end by time, and deletions around them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from world.world import ROOT, World

from ebsd.control import block_writes
from ebsd.control.block_writes import BlockWrites, StartRequest
from ebsd.domain.blocks import BLOCK
from ebsd.domain.errors import BlocksNotFound, DirectSnapshotTimedOut, EbsdError, SnapshotInUse, TooManyPendingSnapshots
from ebsd.domain.units import CHUNK

SIZE = 3 * BLOCK


@pytest.fixture
def world() -> Iterator[World]:
    with World(seed=3) as made:
        yield made


def parent_of(world: World) -> tuple[str, str]:
    """Make a volume with two snapshots; returns it and the first one."""
    volume = world.create(SIZE)
    world.attach(volume)
    world.write(volume, 0, b"a" * (12 * CHUNK))
    first = world.snapshot(volume)
    world.write(volume, CHUNK, b"b" * CHUNK)
    world.snapshot(volume)
    world.detach(volume)
    return volume, first


def begin(world: World, parent: str | None, timeout: int = 60) -> str:
    async def start() -> str:
        encrypted = None if parent is not None else True
        request = StartRequest(None, SIZE, parent, None, "", {}, encrypted, None, timeout, "token")
        snapshot, _ = await world.use.block_writes.start(ROOT, request)
        await world._put_blocks(snapshot.id, {1: b"z" * BLOCK})
        return str(snapshot.id)

    return world._run(start)


def active(world: World, ident: str) -> int:
    """Return when the last block came."""
    found = world._transaction(lambda t: t.direct(ident))
    assert found is not None
    return found.active


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::4], ids=str)
def test_deletions_in_many_orders_give_back_what_nobody_names(world: World, order: tuple[int, ...]) -> None:
    volume, first = parent_of(world)
    filled = world.fill(first, SIZE, {0: b"c" * BLOCK, 2: bytes(BLOCK)})
    restored = world.restore(filled)
    world.attach(restored)
    world.write(restored, 5 * CHUNK, b"d" * CHUNK)
    world.detach(restored)
    ways = [
        lambda: world.delete_volume(volume),
        lambda: world.delete_snapshot(first),
        lambda: world.delete_snapshot(filled),
        lambda: world.delete_volume(restored),
    ]
    for which in order:
        ways[which]()
        world.check()


def test_a_snapshot_without_blocks_is_its_parent(world: World) -> None:
    _, first = parent_of(world)

    async def fill() -> str:
        request = StartRequest(None, SIZE, first, None, "", {}, None, None, None, None)
        snapshot, _ = await world.use.block_writes.start(ROOT, request)
        await world.use.block_writes.complete(ROOT, snapshot.id, changed=0, checksum=None)
        return str(snapshot.id)

    ident = world._run(fill)
    world.truth[ident] = world.truth[first].copy()
    world.check()
    world.delete_snapshot(ident)
    world.check()


@pytest.mark.parametrize("with_parent", [True, False])
def test_what_nobody_writes_to_is_removed_in_time(
    world: World, with_parent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, first = parent_of(world)
    ident = begin(world, first if with_parent else None, timeout=10)
    if with_parent:
        with pytest.raises(SnapshotInUse, match=ident):
            world._run(world.use.snapshots.delete, ROOT, first)
        world.delete_volume(volume)
    start = active(world, ident)
    for later, gone in ((599, False), (600, True)):
        monkeypatch.setattr(BlockWrites, "_now", lambda self, at=start + later: at)
        world._run(world.use.block_writes._time_out, ident)
        assert (ident not in {row.id for row in world.snapshots()}) is gone
    with pytest.raises(DirectSnapshotTimedOut):
        world._run(world._put_blocks, ident, {0: bytes(BLOCK)})
    with pytest.raises(DirectSnapshotTimedOut):
        world._run(lambda: world.use.block_writes.complete(ROOT, ident, changed=1, checksum=None))
    world.check()
    if with_parent:
        world.delete_snapshot(first)
        world.check()
    world._run(world.use.block_writes._catalogue.run, lambda t: t.forget_directs(start + 2 * 86400))
    with pytest.raises(BlocksNotFound):
        world._run(world._put_blocks, ident, {0: bytes(BLOCK)})


def test_an_account_has_so_many_pending(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_writes, "MAX_PENDING", 2)

    async def start() -> str:
        request = StartRequest(None, SIZE, None, None, "", {}, True, None, None, None)
        snapshot, _ = await world.use.block_writes.start(ROOT, request)
        return str(snapshot.id)

    first, second = world._run(start), world._run(start)
    with pytest.raises(TooManyPendingSnapshots):
        world._run(start)
    world._run(world.use.block_writes.abandon, ROOT, first)
    third = world._run(start)
    for ident in (second, third):
        world._run(world.use.block_writes.abandon, ROOT, ident)
    world.check()


def test_a_put_that_comes_too_late_ends_it_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ident = begin(world, None, timeout=10)
    start = active(world, ident)
    monkeypatch.setattr(BlockWrites, "_now", lambda self: start + 600)
    with pytest.raises(DirectSnapshotTimedOut):
        world._run(world._put_blocks, ident, {0: bytes(BLOCK)})
    assert world.snapshots() == []
    world.check()


def test_a_completion_that_fails_is_begun_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = parent_of(world)
    ident = begin(world, first)
    broker = world.broker

    async def away(*args: object) -> None:
        raise EbsdErrorOfATest

    class EbsdErrorOfATest(EbsdError):
        code = "Ebsd.Test"
        exit_status = BlocksNotFound.exit_status
        template = "away"

    monkeypatch.setattr(broker, "raise_floor", away)
    with pytest.raises(EbsdErrorOfATest):
        world._run(lambda: world.use.block_writes.complete(ROOT, ident, changed=1, checksum=None))
    monkeypatch.undo()
    with pytest.raises(EbsdError, match="takes no blocks"):
        world._run(world._put_blocks, ident, {0: bytes(BLOCK)})
    world._run(lambda: world.use.block_writes.complete(ROOT, ident, changed=1, checksum=None))
    world.truth[ident] = world.truth[first].copy()
    world.truth[ident].base[BLOCK : 2 * BLOCK] = b"z" * BLOCK
    world.check()
