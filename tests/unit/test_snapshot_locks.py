"""Locks of snapshots: what each mode allows to whom, and that neither a jump of the clock nor a crash releases one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from world import World
from world.crash_disk import EVERYBODY, Died
from world.world import ROOT

from ebsd.control.creation import CopyRequest
from ebsd.domain import locks
from ebsd.domain.errors import (
    EbsdError,
    IncorrectState,
    InvalidParameterCombination,
    InvalidParameterValue,
    MissingParameter,
    SnapshotLocked,
    UnauthorizedOperation,
)
from ebsd.domain.ids import SnapshotId, account_of_uid
from ebsd.domain.locks import Lock, LockRequest, check_deletion, check_unlock, decide_lock, started_at, strict_state
from ebsd.domain.model import Caller
from ebsd.domain.states import LockState
from ebsd.domain.times import plus

NOW = "2026-01-01T00:00:00Z"
SNAP = SnapshotId("snap-0123456789abcdef0")
ALICE = Caller(1000, "alice", account_of_uid(1000), is_admin=False)


def request(mode: str = "governance", days: int | None = 10, until: str | None = None, cool: int | None = None) -> Any:
    return LockRequest(mode, days, until, cool)


def decide(present: Lock | None, wanted: LockRequest, *, now: str = NOW, **more: Any) -> Lock:
    facts = {"completed": "2025-12-31T00:00:00Z", "even": True, "is_admin": False, **more}
    return decide_lock(SNAP, present, wanted, now=now, **facts)


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        (request("legal-hold"), InvalidParameterValue),
        (request(days=None), MissingParameter),
        (request(until="2027-01-01"), InvalidParameterCombination),
        (request(days=0), InvalidParameterValue),
        (request(days=36501), InvalidParameterValue),
        (request(days=None, until="2025-12-31"), InvalidParameterValue),
        (request(days=None, until="2126-12-31"), InvalidParameterValue),
        (request(days=None, until="tomorrow"), InvalidParameterValue),
        (request(cool=1), InvalidParameterCombination),
        (request("compliance", cool=0), InvalidParameterValue),
        (request("compliance", cool=73), InvalidParameterValue),
    ],
)
def test_parameters_that_cannot_be(wanted: LockRequest, error: type[EbsdError]) -> None:
    with pytest.raises(error):
        decide(None, wanted)


def test_what_a_new_lock_is() -> None:
    plain = decide(None, request())
    assert (plain.state, plain.days, plain.expires) == (LockState.GOVERNANCE, 10, "2026-01-11T00:00:00Z")
    dated = decide(None, request("compliance", None, "2026-01-03T12:00:00+02:00", 24))
    assert (dated.state, dated.days, dated.expires) == (LockState.COMPLIANCE_COOLOFF, 3, "2026-01-03T10:00:00Z")
    assert dated.cool_off_expires == "2026-01-02T00:00:00Z"
    assert decide(None, request("compliance")).state is LockState.COMPLIANCE


def test_the_duration_of_a_pending_snapshots_lock_begins_with_its_completion() -> None:
    lock = decide(None, request(), completed=None)
    assert (lock.started, lock.expires) == (None, None)
    with pytest.raises(SnapshotLocked):
        check_deletion(lock, now="2099-01-01T00:00:00Z", even=True)
    begun = started_at(lock, "2026-02-01T00:00:00Z")
    assert (begun.started, begun.expires) == ("2026-02-01T00:00:00Z", "2026-02-11T00:00:00Z")
    assert started_at(begun, "2027-01-01T00:00:00Z") == begun


GOVERNED = decide(None, request())
COOLING = decide(None, request("compliance", cool=24))
STRICT = decide(None, request("compliance"))


@pytest.mark.parametrize(
    ("present", "wanted", "hours", "admin", "outcome"),
    [
        # governance: longer by anybody, weaker by administrators
        (GOVERNED, request(days=20), 0, False, LockState.GOVERNANCE),
        (GOVERNED, request(days=5), 0, False, UnauthorizedOperation),
        (GOVERNED, request(days=5), 0, True, LockState.GOVERNANCE),
        (GOVERNED, request(days=10), 48, False, LockState.GOVERNANCE),
        (GOVERNED, request("compliance"), 0, False, LockState.COMPLIANCE),
        # a cooling-off period would be a way to unlock it
        (GOVERNED, request("compliance", cool=1), 0, False, UnauthorizedOperation),
        (GOVERNED, request("compliance", cool=1), 0, True, LockState.COMPLIANCE_COOLOFF),
        # while it cools off everything may be changed
        (COOLING, request(days=1), 23, False, LockState.GOVERNANCE),
        (COOLING, request("compliance", days=2, cool=72), 23, False, LockState.COMPLIANCE_COOLOFF),
        (COOLING, request("compliance", days=2), 23, False, LockState.COMPLIANCE),
        (COOLING, request("compliance", days=9), 24, True, SnapshotLocked),
        (COOLING, request("compliance", days=10), 24, True, LockState.COMPLIANCE),
        # compliance: longer only, not even by administrators otherwise
        (STRICT, request("compliance", days=11), 0, False, LockState.COMPLIANCE),
        (STRICT, request("compliance", days=9), 0, True, SnapshotLocked),
        (STRICT, request("compliance", days=99, cool=1), 0, True, SnapshotLocked),
        (STRICT, request(days=99), 0, True, SnapshotLocked),
        (STRICT, request("compliance", None, "2026-01-10"), 0, True, SnapshotLocked),
        # over: as if there were none
        (STRICT, request(days=1), 240, False, LockState.GOVERNANCE),
        (GOVERNED, request("compliance", cool=1), 240, False, LockState.COMPLIANCE_COOLOFF),
    ],
)
def test_changes(present: Lock, wanted: LockRequest, hours: int, admin: bool, outcome: Any) -> None:
    now = plus(NOW, hours * 3600)
    if isinstance(outcome, LockState):
        changed = decide(present, wanted, now=now, is_admin=admin)
        assert changed.state is outcome
        assert changed.created == (now if hours == 240 else NOW)
        return
    with pytest.raises(outcome):
        decide(present, wanted, now=now, is_admin=admin)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("state", list(LockState))
@pytest.mark.parametrize("hours", [0, 23, 24, 239, 240, 10**6])
def test_who_may_unlock_and_delete(state: LockState, even: bool, hours: int) -> None:
    """Written out again: stored state, evenness of the clock and its time, against what is allowed."""
    lock = replace(COOLING, state=state)
    now = plus(NOW, hours * 3600)
    over = state is LockState.EXPIRED or (even and hours >= 240)
    if over:
        check_deletion(lock, now=now, even=even)
        check_unlock(lock, now=now, even=even, is_admin=False)
        return
    with pytest.raises(SnapshotLocked) as caught:
        check_deletion(lock, now=now, even=even)
    assert ("try again" in caught.value.hint) is (hours >= 240)
    cooled = state is LockState.COMPLIANCE or (state is LockState.COMPLIANCE_COOLOFF and hours >= 24)
    for admin in (True, False):
        if cooled:
            with pytest.raises(SnapshotLocked):
                check_unlock(lock, now=now, even=even, is_admin=admin)
        elif state is LockState.GOVERNANCE and not admin:
            with pytest.raises(UnauthorizedOperation):
                check_unlock(lock, now=now, even=even, is_admin=admin)
        else:
            check_unlock(lock, now=now, even=even, is_admin=admin)


def test_a_clock_that_is_set_back_does_not_reopen_what_was_noted() -> None:
    noted = locks.advanced(COOLING, plus(NOW, 25 * 3600))
    assert noted.state is LockState.COMPLIANCE
    assert strict_state(noted, NOW, even=True) is LockState.COMPLIANCE
    over = locks.advanced(COOLING, plus(NOW, 240 * 3600))
    assert over.state is LockState.EXPIRED
    check_deletion(over, now=NOW, even=False)


# --- in a store ---------------------------------------------------------------------------------------------


def taken(world: World) -> str:
    volume = world.create()
    world.attach(volume)
    world.write(volume, 0, b"x" * 1000)
    snapshot = world.snapshot(volume)
    world.detach(volume)
    return snapshot


def run(world: World, function: Any, *args: Any, error: type[EbsdError] | None = None, **kwargs: Any) -> Any:
    """Run a use case; an error that is expected is caught inside, so that the model knows that nothing came of it."""

    async def inner() -> Any:
        if error is None:
            return await function(*args, **kwargs)
        with pytest.raises(error):
            await function(*args, **kwargs)
        return None

    return world._run(inner)


@pytest.mark.parametrize("mode", ["governance", "compliance"])
def test_a_locked_snapshot_stays(mode: str):
    with World(seed=31) as world:
        snapshot = taken(world)
        run(world, world.use.locks.lock, ROOT, snapshot, request(mode))
        run(world, world.use.snapshots.delete, ROOT, snapshot, error=SnapshotLocked)
        world.reopen()
        run(world, world.use.snapshots.delete, ROOT, snapshot, error=SnapshotLocked)
        run(world, world.use.locks.unlock, ROOT, snapshot, error=SnapshotLocked if mode == "compliance" else None)
        if mode == "governance":
            run(world, world.use.locks.unlock, ROOT, snapshot, error=IncorrectState)
            world.delete_snapshot(snapshot)
        found, _ = run(world, world.use.locks.describe, ROOT, None, [], None, None)
        assert [(lock["SnapshotId"], lock["LockState"]) for lock in found] == (
            [(snapshot, "compliance")] if mode == "compliance" else []
        )
        world.check()


def test_a_jump_of_the_clock_releases_nothing_at_once():
    with World(seed=32) as world:
        snapshot = taken(world)
        run(world, world.use.locks.lock, ROOT, snapshot, request("compliance", 1))
        clock = world.use.locks._host
        late = replace(clock, now=lambda: "2126-01-01T00:00:00Z")
        for use_case in (world.use.locks, world.use.snapshots, world.use.expiries):
            use_case._host = late
        world.clock_is_even = False
        run(world, world.use.expiries.look)
        run(world, world.use.snapshots.delete, ROOT, snapshot, error=SnapshotLocked)
        run(world, world.use.locks.unlock, ROOT, snapshot, error=SnapshotLocked)
        world.clock_is_even = True
        run(world, world.use.expiries.look)
        (lock,), _ = run(world, world.use.locks.describe, ROOT, None, [], None, None)
        assert lock["LockState"] == "expired"
        world.clock_is_even = False
        world.delete_snapshot(snapshot)
        assert world.snapshots() == []


def test_the_lock_of_a_copy_begins_when_it_is_complete():
    with World(seed=33) as world:
        snapshot = taken(world)

        async def copy() -> str:
            wanted = CopyRequest(snapshot, None, "", True, "arn:aws:kms:local:000000000000:key/other", {})
            made, job, _ = await world.use.creation.copy_snapshot(ROOT, wanted)
            locked = await world.use.locks.lock(ROOT, made.id, request())
            assert "LockExpiresOn" not in locked
            assert job is not None
            async for _ in world.use.jobs.watch(ROOT, job):
                pass
            return made.id

        made = world._run(copy)
        row = world.row(made)
        (lock,), _ = run(world, world.use.locks.describe, ROOT, [made], [], None, None)
        assert (lock["LockDurationStartTime"], lock["LockState"]) == (row.completed, "governance")
        run(world, world.use.snapshots.delete, ROOT, made, error=SnapshotLocked)


@pytest.mark.parametrize("at", range(3))
def test_a_kill_leaves_the_lock_or_none(at: int):
    with World(seed=34) as world:
        snapshot = taken(world)
        world.disk.disarm()
        world.disk.arm(die_at=at, scope=EVERYBODY)
        died = False
        try:
            world._run(world.use.locks.lock, ROOT, snapshot, request("compliance"))
        except Died:
            died = True
        world.disk.disarm()
        world.crash("power", "lose")
        world.recover()
        found, _ = run(world, world.use.locks.describe, ROOT, None, [], None, None)
        assert died is (at == 0)
        assert len(found) == (0 if died else 1), "what was answered is there, whatever was lost"
        if found:
            run(world, world.use.snapshots.delete, ROOT, snapshot, error=SnapshotLocked)
