"""Any story of volumes and snapshots, with crashes anywhere, against the model: see ``world.tree``.

The default run is the same stories each time. ``EBSD_EXAMPLES=5000`` tells that many new ones (minutes) and prints the
seed that tells them again: ``EBSD_SEED=...``.
"""

from __future__ import annotations

import errno
import os
import random

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from world import Broken, CrashDisk, Lost, World
from world.tree import Death, Failure, Span, Tree

from ebsd.control import volume_files
from ebsd.control.lineage_files import LineageFiles
from ebsd.domain.errors import EbsdError, RemoteError
from ebsd.domain.units import CHUNK
from ebsd.store.salvage import Salvage, SalvageOutcome
from ebsd.volume.engine import BlockEngine

EXAMPLES = int(os.environ.get("EBSD_EXAMPLES", "0"))
DEFAULT = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[*HealthCheck],
    print_blob=True,
)


@pytest.mark.timeout(0 if EXAMPLES else 600)
def test_any_story_is_the_models():
    if not EXAMPLES:
        run_state_machine_as_test(Tree, settings=DEFAULT)
        return
    number = int(os.environ.get("EBSD_SEED") or random.SystemRandom().randrange(2**32))
    print(f"EBSD_EXAMPLES={EXAMPLES} EBSD_SEED={number}")
    run_state_machine_as_test(
        seed(number)(type("Tree", (Tree,), {})), settings=settings(DEFAULT, max_examples=EXAMPLES, derandomize=False)
    )


# --- bugs that it must find


def sweep_without_a_map(patch: pytest.MonkeyPatch) -> None:
    real = LineageFiles.sweep_deleted

    def sweep_deleted(self, lineage, deleted, also, relatives, *rest):
        return real(self, lineage, deleted, also, dict(list(relatives.items())[:-1]), *rest)

    patch.setattr(LineageFiles, "sweep_deleted", sweep_deleted)


def what_a_volume_left_is_nobody_elses(patch: pytest.MonkeyPatch) -> None:
    real = LineageFiles.sweep_deleted

    def sweep_deleted(self, lineage, deleted, also, relatives, *rest):
        return real(self, lineage, deleted, also, {} if deleted is None else relatives, *rest)

    patch.setattr(LineageFiles, "sweep_deleted", sweep_deleted)


def tail_that_is_not_zeros(patch: pytest.MonkeyPatch) -> None:
    """What lies behind the end of a volume shows when a restore or a growth makes it longer."""
    real = BlockEngine._whole_chunk

    async def whole_chunk(self, chunk, offset, end):
        whole = await real(self, chunk, offset, end)
        behind = max(0, (chunk + 1) * CHUNK - self.size)
        whole[CHUNK - behind :] = b"\xaa" * behind
        return whole

    patch.setattr(BlockEngine, "_whole_chunk", whole_chunk)


def copy_without_its_edges(patch: pytest.MonkeyPatch) -> None:
    async def whole_chunk(self, chunk, offset, end):
        return memoryview(bytearray(CHUNK))

    patch.setattr(BlockEngine, "_whole_chunk", whole_chunk)


def discard_without_its_edges(patch: pytest.MonkeyPatch) -> None:
    async def zero_edge(self, offset, end):
        return None

    patch.setattr(BlockEngine, "_zero_edge", zero_edge)


def salvage_that_applies_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(volume_files, "salvage", lambda *args, **kwargs: Salvage(SalvageOutcome.ABSENT))


def sync_that_lies(patch: pytest.MonkeyPatch) -> None:
    real = CrashDisk.fdatasync

    def fdatasync(self, fd):
        self.lies = {"fdatasync"}
        real(self, fd)

    patch.setattr(CrashDisk, "fdatasync", fdatasync)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "bug",
    [
        sweep_without_a_map,
        what_a_volume_left_is_nobody_elses,
        tail_that_is_not_zeros,
        copy_without_its_edges,
        discard_without_its_edges,
        salvage_that_applies_nothing,
        sync_that_lies,
    ],
)
def test_a_bug_is_found(bug, monkeypatch):
    bug(monkeypatch)
    with pytest.raises((Lost, Broken)):
        run_state_machine_as_test(Tree, settings=settings(DEFAULT, phases=[Phase.generate], report_multiple_bugs=False))


# --- what it found


def grown_tree(world: World) -> tuple[str, str, str]:
    """Return an attached volume, a detached one, and a snapshot of the first."""
    first = world.create()
    world.attach(first)
    world.write(first, 100, b"x" * CHUNK)
    snapshot = world.snapshot(first)
    world.write(first, 0, b"y" * 5000)
    second = world.create(World.ODD, encrypted=False)
    world.attach(second)
    world.write(second, 0, b"z" * CHUNK)
    world.detach(second)
    return first, second, snapshot


@pytest.mark.parametrize(
    "operation",
    [
        lambda world, first, second, snapshot: world.snapshot(first),
        lambda world, first, second, snapshot: world.snapshot(second),
        lambda world, first, second, snapshot: world.copy(snapshot),
        lambda world, first, second, snapshot: world.copy(snapshot, new_key=True),
    ],
    ids=["snapshot, attached", "snapshot, detached", "copy", "copy under a new key"],
)
def test_what_a_start_completes_after_a_kill_is_durable(operation):
    """What the killed one had written, renamed or appended may never have been synced: the power goes next."""
    die_at, died = 0, True
    while died:
        with World(seed=3) as world:
            tree = grown_tree(world)
            world.disk.arm(die_at=die_at)
            with world.may_die():
                operation(world, *tree)
            died = world.disk.is_dead()
            world.crash("kill")
            world.recover()
            world.check(settle=False)
            world.crash("power", "lose")
            world.recover()
            world.check()
        die_at += 1
    assert die_at > 10


@pytest.mark.parametrize("attached", [False, True], ids=["detached", "attached"])
def test_a_growth_that_was_cut_may_be_followed_by_a_smaller_one(attached):
    """The map may have grown already, and ask for no less; nothing of the first attempt stays."""
    die_at, died = 0, True
    while died:
        with World(seed=5) as world:
            volume = world.create()
            world.attach(volume)
            world.write(volume, 5 * CHUNK, b"x" * CHUNK)
            if not attached:
                world.detach(volume)
            world.disk.arm(die_at=die_at)
            with world.may_die():
                world.resize(volume, World.SIZE + 3 * CHUNK)
            died = world.disk.is_dead()
            world.crash("kill")
            world.recover()
            size = world.row(volume).size
            world.resize(volume, size + CHUNK)
            world.check()
            world.delete_volume(volume)
            world.check()
            assert not [path.name for path in (world.base / "run" / "live").iterdir()]
        die_at += 1
    assert die_at > 3


def test_a_snapshot_after_a_growth_that_failed_is_of_the_size_that_was_signed():
    """The durable map may be longer by then, and no signature covers that: nobody could restore such a snapshot."""
    failed = 0
    for at in range(30):
        with World(seed=5) as world:
            volume = world.create()
            world.attach(volume)
            world.write(volume, 0, b"x" * CHUNK)
            world.detach(volume)
            world.disk.arm(fail_at={at: errno.EIO})
            try:
                world.resize(volume, World.SIZE + CHUNK)
            except (EbsdError, OSError):
                failed += 1
            world.disk.disarm()
            world.attach(world.restore(world.snapshot(volume)))
            world.check()
    assert failed > 10


@pytest.mark.parametrize("mode", ["lose", "keep"])
def test_after_a_failed_sync_only_what_is_on_the_disk_is_shown(mode):
    """The cache shows what the failing disk never got; what is read, and sealed, would be gone after the next cut."""
    for at in range(24):
        state = Tree()
        try:
            state.begin(key="one", branch=False, many=[Span(0, 0, 4096)], size=World.SIZE)
            state.arm_disk(dice=0, fault=Failure(at, errno.EIO))
            state.sweep(compare=False, disable=None)
            state.arm_death(dice=0, fault=Death(0, "power", mode))
            state.snapshot(n=0)
        finally:
            state.teardown()


def test_a_table_whose_last_entry_is_zeros_takes_the_next_layer():
    """A power cut in an append may leave the longer file and not the bytes."""
    with World(seed=1) as world:
        volume = world.create()
        with world.state.table(world.row(volume).lineage).open("ab") as table:
            table.write(bytes(64))
        world.attach(volume)
        world.write(volume, 0, b"x" * CHUNK)
        world.snapshot(volume)
        world.detach(volume)
        world.sweep()
        world.check()


def test_a_detach_whose_last_step_failed_can_be_repeated():
    """The process had signed and wiped its key when the disk refused to remove the live map: it must answer again."""
    with World(seed=1) as world:
        volume = world.create()
        world.attach(volume)
        world.write(volume, 0, b"x" * CHUNK)
        world.disk.judge = lambda call: errno.EIO if call.name == "unlink" and "/live/" in call.path else None
        with pytest.raises(RemoteError):
            world.detach(volume)
        world.disk.judge = None
        world.detach(volume)
        world.check()
        world.attach(volume)
        world.read(volume, 0, CHUNK)


def test_a_volume_process_that_dies_while_it_is_unmounted_is_detached_all_the_same():
    """Its last flush comes when the kernel has unmounted already."""
    died = 0
    for at in range(20):
        with World(seed=1) as world:
            volume = world.create()
            world.attach(volume)
            world.write(volume, 0, b"x" * CHUNK)
            world.disk.arm(die_at=at, scope="volume")
            world.detach(volume)
            died += world.disk._die_in is None
            world.disk.disarm()
            assert world.row(volume).attachment is None
            world.check()
    assert 4 < died < 20
