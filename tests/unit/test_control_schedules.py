"""Schedules at work: runs at their time over a mock clock, what is skipped, what fails, and what retention deletes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from test_snapshot_sets import ACCOUNT, CALLER, Ebsd, Process, World, new_world

from ebsd.control.schedules import ScheduleRequest, Schedules
from ebsd.domain.errors import (
    EbsdError,
    NoSpace,
    ScheduleNameInUse,
    ScheduleNotFound,
    SnapshotLimitExceeded,
    SnapshotLocked,
    SnapshotSetFailed,
    VolumeNotFound,
)
from ebsd.domain.ids import AccountId
from ebsd.domain.model import Caller, LayerState
from ebsd.domain.schedules import Retention, Timing, seconds_of, time_of
from ebsd.domain.states import VolumeState

pytestmark = pytest.mark.trio

START = seconds_of("2026-11-21T12:00:10Z")
HOURLY = Timing(3600, ())


class Rig:
    """A world with three volumes, and the schedules of one ebsd over it; the wall clock follows trio's."""

    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self.world = world
        self.ebsd = Ebsd(world, nursery)
        self.jump = 0
        self.even = True
        self.changed = True
        self.flushed: list[str] = []
        self.begun = trio.current_time()
        self.deleted: list[str] = []
        self.undeletable: dict[str, EbsdError] = {}
        host = self.ebsd.sets._host
        host.now = self.now
        host.clock_is_even = lambda: self.even
        snapshots = SimpleNamespace(delete=self.delete)
        files = SimpleNamespace(has_same_map=lambda volume, snapshot: not self.changed)
        for process in world.processes.values():
            process.flush = self.flush  # type: ignore[attr-defined]
        self.schedules = Schedules(
            host,
            self.ebsd.catalogue,
            snapshots,
            self.ebsd.sets,
            files,
            world.processes,  # type: ignore[arg-type]
        )

    def now(self) -> str:
        return time_of(int(START + trio.current_time() - self.begun) + self.jump)

    async def flush(self) -> None:
        self.flushed.append("flush")

    async def delete(self, caller: Caller, ident: str) -> bool:
        assert caller.account == ACCOUNT
        assert not caller.is_admin
        if ident in self.undeletable:
            raise self.undeletable[ident]
        self.deleted.append(self.world.catalog.run(lambda t: t.snapshot(ident).name))  # type: ignore[arg-type]
        self.world.catalog.run(lambda t: t.remove_snapshot(ident))  # type: ignore[arg-type]
        self.world.maps.discard(ident)
        return False

    async def create(self, name: str = "s", volume: str | None = "v1", **more: Any) -> dict[str, Any]:
        request = ScheduleRequest(name, volume, None, HOURLY, Retention(None, None), "")
        return await self.schedules.create(CALLER, replace(request, **more))

    async def show(self, name: str = "s") -> dict[str, Any]:
        return (await self.schedules.describe(CALLER, [name]))[0]

    def names(self) -> list[str]:
        return [s.name for s in self.world.catalog.run(lambda t: t.snapshots())]

    def outcome(self, shown: dict[str, Any]) -> tuple[str, str]:
        return shown["LastRunState"], shown.get("LastRunMessage", "")


async def inline(function: Any, *args: Any, **options: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return function(*args)


@pytest.fixture
async def rig(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> Rig:
    monkeypatch.setattr(trio.to_thread, "run_sync", inline)  # the clock would jump while a thread works
    return Rig(new_world(tmp_path), nursery)


async def test_runs_are_made_at_their_time(autojump_clock: trio.abc.Clock, rig: Rig, nursery: trio.Nursery) -> None:
    nursery.start_soon(rig.schedules.tend)
    await rig.create(timing=Timing(0, (13 * 3600, 14 * 3600 + 1800)))
    await trio.sleep(3500)
    assert rig.names() == []
    await trio.sleep(100)
    assert rig.names() == ["v1-20261121T130000Z"]
    await trio.sleep(3 * 3600)
    assert rig.names() == ["v1-20261121T130000Z", "v1-20261121T143000Z"]
    shown = await rig.show()
    assert rig.outcome(shown) == ("completed", "")
    assert len(shown["SnapshotIds"]) == 2
    assert shown["NextRunTime"] == "2026-11-22T13:00:00Z"


async def test_an_ebsd_that_was_away_makes_one_run_and_a_new_one_knows_its_own(
    autojump_clock: trio.abc.Clock, rig: Rig, nursery: trio.Nursery
) -> None:
    await rig.create(retention=Retention(2, None))
    rig.jump = 5 * 3600
    for _ in range(2):
        again = Rig(rig.world, nursery)
        again.jump = rig.jump
        await again.schedules.look()
    assert rig.names() == ["v1-20261121T170010Z"]
    for _ in range(3):
        again.jump += 3600
        await again.schedules.look()
    assert again.deleted == ["v1-20261121T170010Z", "v1-20261121T180010Z"]
    assert len(rig.names()) == 2


async def test_jumps_of_the_clock_harm_nothing(autojump_clock: trio.abc.Clock, rig: Rig) -> None:
    await rig.create(retention=Retention(None, 3600))
    for jump, even in ((3600, True), (3650 * 86400, False), (3650 * 86400 + 60, False), (7200, False), (7230, False)):
        rig.jump, rig.even = jump, even
        await rig.schedules.look()
    assert rig.names() == ["v1-20261121T130010Z", "v1-20361118T120010Z"]
    rig.jump = 3 * 3600
    await rig.schedules.look()
    assert len(rig.names()) == 3, "it is not silent for ten years"
    assert rig.deleted == [], "nothing is old when the clock is not to be trusted"


async def test_a_run_that_finds_nothing_changed_is_skipped_and_flushes_first(
    autojump_clock: trio.abc.Clock, rig: Rig
) -> None:
    await rig.create(retention=Retention(None, 60))
    await rig.schedules.run(CALLER, "s")
    assert rig.flushed == []
    rig.changed = False
    rig.jump = 7200
    shown = await rig.schedules.run(CALLER, "s")
    assert rig.outcome(shown) == ("skipped", "nothing has changed since the last snapshot")
    assert rig.flushed == ["flush"]
    assert len(rig.names()) == 1
    assert rig.deleted == [], "the last one stays, however old"
    rig.changed = True
    rig.jump += 60
    await rig.schedules.run(CALLER, "s")
    assert rig.deleted == ["v1-20261121T120010Z"]


async def test_no_space_skips_and_errors_fail_and_are_shown(autojump_clock: trio.abc.Clock, rig: Rig) -> None:
    await rig.create(retention=Retention(1, None))
    await rig.schedules.run(CALLER, "s")

    refusal: EbsdError = NoSpace(where="in /state")

    async def full() -> None:
        raise refusal

    space, was = rig.ebsd.sets._host.space, rig.ebsd.sets._host.space.require
    space.require = full
    rig.jump = 60
    state, message = rig.outcome(await rig.schedules.run(CALLER, "s"))
    assert state == "skipped"
    assert "/state" in message
    refusal = SnapshotLimitExceeded(used=11, limit=10)
    assert rig.outcome(await rig.schedules.run(CALLER, "s")) == ("skipped", refusal.message)
    space.require = was
    process: Process = next(iter(rig.world.processes.values()))
    for error, text in (
        (SnapshotSetFailed(volume="v1", reason="it died"), "it died"),
        (RuntimeError("a bug"), "incident"),
    ):
        process.fails["prepare"] = error  # type: ignore[assignment]
        rig.jump += 60
        state, message = rig.outcome(await rig.schedules.run(CALLER, "s"))
        assert state == "failed"
        assert text in message
    assert rig.deleted == [], "a run that failed deletes nothing"
    rig.jump += 60
    assert rig.outcome(await rig.schedules.run(CALLER, "s")) == ("completed", "")
    assert rig.deleted == ["v1-20261121T120010Z"]


async def test_what_cannot_be_deleted_is_told_and_locked_ones_are_not_even_tried(
    autojump_clock: trio.abc.Clock, rig: Rig
) -> None:
    await rig.create(retention=Retention(1, None))
    for jump in (0, 60, 120):
        rig.jump = jump
        made = await rig.schedules.run(CALLER, "s")
        rig.undeletable[made["SnapshotIds"][-1]] = (
            SnapshotLocked(snapshot="x", state="governance", until="never") if jump else OSError(5, "broken")
        )  # type: ignore[assignment]
    state, message = rig.outcome(made)
    assert state == "completed"
    assert "could not be deleted" in message
    assert message.count("snap-") == 1
    assert len(made["SnapshotIds"]) == 3


async def test_volumes_with_a_tag_are_one_set_and_a_broken_one_is_left_out(
    autojump_clock: trio.abc.Clock, rig: Rig
) -> None:
    await rig.create(volume=None, tag=("app", "db"), prefix="db")
    shown = await rig.schedules.run(CALLER, "s")
    assert rig.outcome(shown) == ("completed", "")
    assert rig.names() == ["db-v1-20261121T120010Z", "db-v2-20261121T120010Z"]

    def break_second(t: Any) -> None:
        second = t.find_volume(CALLER, "v2")
        t.set_volume_state(second.id, VolumeState.ERROR, "its process died")

    rig.world.catalog.run(break_second)
    rig.jump = 60
    state, message = rig.outcome(await rig.schedules.run(CALLER, "s"))
    assert state == "completed"
    assert message.startswith("left out: ")
    assert len(rig.names()) == 3
    await rig.create("none", volume=None, tag=("app", "web"))
    assert rig.outcome(await rig.schedules.run(CALLER, "none")) == (
        "skipped", "there is no volume to take a snapshot of",
    )  # fmt: skip


async def test_the_snapshots_of_a_deleted_volume_stay(autojump_clock: trio.abc.Clock, rig: Rig) -> None:
    await rig.create(volume="v3", retention=Retention(1, 60))
    for jump in (0, 60):
        rig.jump = jump
        await rig.schedules.run(CALLER, "s")
    before = rig.names()

    def remove(t: Any) -> None:
        volume = t.find_volume(CALLER, "v3")
        t.set_layer_state(volume.lineage, volume.head, LayerState.SEALED)
        t.remove_volume(volume.id)

    rig.world.catalog.run(remove)
    rig.jump = 10**7
    await rig.schedules.look()
    state, message = rig.outcome(await rig.show())
    assert state == "failed"
    assert "does not exist" in message
    assert rig.names() == before


async def test_a_schedule_deletes_only_what_it_made(autojump_clock: trio.abc.Clock, rig: Rig) -> None:
    await rig.create(retention=Retention(1, None))
    await rig.create("other", timing=Timing(60, ()))
    await rig.ebsd.snapshots.create(CALLER, "v1", name="mine", description="", tags={})
    for jump in (0, 60, 120):
        rig.jump = jump
        await rig.schedules.run(CALLER, "s")
        rig.jump += 1
        await rig.schedules.run(CALLER, "other")
    assert rig.deleted == ["v1-20261121T120010Z", "v1-20261121T120110Z"]
    assert "mine" in rig.names()
    assert len((await rig.show("other"))["SnapshotIds"]) == 3
    await rig.schedules.delete(CALLER, "other")
    assert len(rig.names()) == 5, "they stay"
    with pytest.raises(ScheduleNotFound):
        await rig.show("other")


async def test_a_paused_schedule_rests(autojump_clock: trio.abc.Clock, rig: Rig) -> None:
    await rig.create()
    assert (await rig.schedules.pause(CALLER, "s", paused=True))["State"] == "paused"
    rig.jump = 5 * 3600
    await rig.schedules.look()
    assert rig.names() == []
    assert "NextRunTime" not in await rig.show()
    await rig.schedules.pause(CALLER, "s", paused=False)
    await rig.schedules.look()
    assert rig.names() == []
    rig.jump += 3600
    await rig.schedules.look()
    assert len(rig.names()) == 1


async def test_schedules_are_their_owners(autojump_clock: trio.abc.Clock, rig: Rig) -> None:
    made = await rig.create()
    stranger = Caller(1001, "else", AccountId("000000001001"), is_admin=False)
    for name in ("s", made["ScheduleId"]):
        with pytest.raises(ScheduleNotFound):
            await rig.schedules.describe(stranger, [name])
        with pytest.raises(ScheduleNotFound):
            await rig.schedules.run(stranger, name)
        with pytest.raises(ScheduleNotFound):
            await rig.schedules.pause(stranger, name, paused=True)
        with pytest.raises(ScheduleNotFound):
            await rig.schedules.delete(stranger, name)
    assert await rig.schedules.describe(stranger, None) == []
    with pytest.raises(VolumeNotFound):
        await rig.schedules.create(
            stranger, ScheduleRequest("s", made["VolumeId"], None, HOURLY, Retention(None, None), "")
        )
    with pytest.raises(ScheduleNameInUse):
        await rig.create()
    admin = Caller(0, "root", AccountId("000000000000"), is_admin=True)
    assert [s["Name"] for s in await rig.schedules.describe(admin, None)] == ["s"]
