"""The recycle bin: which rule keeps what, that it is kept whole and out of sight, how long, and what crashes leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import trio
from world import World
from world.crash_disk import EVERYBODY, Died
from world.stories import history
from world.world import ROOT

from ebsd.control.volumes import CreateRequest
from ebsd.domain.errors import (
    AmbiguousName,
    EbsdError,
    HostFailure,
    InvalidParameterCombination,
    InvalidParameterValue,
    InvalidTag,
    RecycleBinRuleLimit,
    RecycleBinRuleNotFound,
    SnapshotLocked,
    SnapshotNotFound,
    UnauthorizedOperation,
    VolumeNotFound,
)
from ebsd.domain.ids import SnapshotId, VolumeId, account_of_uid
from ebsd.domain.locks import LockRequest
from ebsd.domain.model import Caller
from ebsd.domain.recycling import DAY, MAX_RULES, ResourceType, Rule, check_rule, longest
from ebsd.domain.states import SnapshotState, VolumeState
from ebsd.store.checkrows import read_rows

ALICE = Caller(1000, "alice", account_of_uid(1000), is_admin=False)
VOLUME, SNAPSHOT = ResourceType.VOLUME, ResourceType.SNAPSHOT
TIME = "2026-01-01T00:00:00Z"


def rule(kind: ResourceType = SNAPSHOT, days: int = 7, *, ident: str = "r", caller: Caller = ROOT, **more: Any) -> Rule:
    fields: dict[str, Any] = {"tags": (), "excluded": (), "description": "", "created": TIME, **more}
    return Rule(id=ident, account=caller.account, type=kind, days=days, **fields)


# --- rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "kind", "tags", "expected"),
    [
        ([], SNAPSHOT, {}, None),
        ([rule()], SNAPSHOT, {}, 7),
        ([rule()], VOLUME, {}, None),
        ([rule(), rule(days=30)], SNAPSHOT, {}, 30),
        ([rule(tags=(("env", "prod"),))], SNAPSHOT, {"env": "lab"}, None),
        ([rule(tags=(("env", "prod"),))], SNAPSHOT, {"env": "prod"}, 7),
        ([rule(tags=(("env", None),))], SNAPSHOT, {"env": ""}, 7),
        ([rule(tags=(("a", "1"), ("b", "2")))], SNAPSHOT, {"b": "2"}, 7),
        ([rule(excluded=(("scratch", None),))], SNAPSHOT, {"scratch": "yes"}, None),
        ([rule(excluded=(("scratch", None),))], SNAPSHOT, {"other": "yes"}, 7),
        ([rule(excluded=(("scratch", None),)), rule(days=2, tags=(("scratch", None),))], SNAPSHOT, {"scratch": ""}, 2),
        ([rule(days=5), rule(days=3, tags=(("env", None),))], SNAPSHOT, {"env": ""}, 5),
    ],
)
def test_the_longest_rule_that_holds(
    rules: list[Rule], kind: ResourceType, tags: Mapping[str, str], expected: int | None
) -> None:
    found = longest(rules, kind, tags)
    assert (None if found is None else found.days) == expected


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (rule(days=0), InvalidParameterValue),
        (rule(days=3651), InvalidParameterValue),
        (rule(tags=(("a", None),), excluded=(("b", None),)), InvalidParameterCombination),
        (rule(tags=tuple((f"k{i}", None) for i in range(51))), InvalidParameterValue),
        (rule(excluded=tuple((f"k{i}", None) for i in range(6))), InvalidParameterValue),
        (rule(tags=(("aws:x", None),)), InvalidTag),
        (rule(description="x" * 256), InvalidParameterValue),
    ],
)
def test_rules_that_cannot_be(wrong: Rule, error: type[EbsdError]) -> None:
    check_rule(rule(days=1))
    check_rule(rule(days=3650, tags=tuple((f"k{i}", None) for i in range(50))))
    if error is InvalidParameterValue and wrong.description:
        with pytest.raises(EbsdError) as caught:
            check_rule(wrong)
        assert caught.value.code == "InvalidParameterValue"
        return
    with pytest.raises(error):
        check_rule(wrong)


# --- in a store ---------------------------------------------------------------------------------------------


def run(world: World, function: Any, *args: Any, error: type[EbsdError] | None = None, **kwargs: Any) -> Any:
    """Run a use case; an error that is expected is caught inside, so that the model knows that nothing came of it."""

    async def inner() -> Any:
        if error is None:
            return await function(*args, **kwargs)
        with pytest.raises(error):
            await function(*args, **kwargs)
        return None

    return world._run(inner)


def kept(world: World, kind: ResourceType = SNAPSHOT, days: int = 7, **more: Any) -> None:
    ident = f"r{len(run(world, world.use.recycle_bin.rules, ROOT))}"
    run(world, world.use.recycle_bin.create_rule, more.get("caller", ROOT), rule(kind, days, ident=ident, **more))


def content(world: World, kind: ResourceType = SNAPSHOT, caller: Caller = ROOT) -> list[dict[str, Any]]:
    found, token = run(world, world.use.recycle_bin.content, caller, kind, None, None, None)
    assert token is None
    return found


def listed(world: World) -> set[str]:
    volumes, _ = run(world, world.use.volumes.describe, ROOT, None, [])
    snapshots, _ = run(world, world.use.snapshots.describe, ROOT, None, [])
    return {v["VolumeId"] for v in volumes} | {s["SnapshotId"] for s in snapshots}


def test_a_deleted_snapshot_is_kept_whole_and_comes_back():
    with World(seed=41) as world:
        names = history(world, attached=True)
        snapshot = names["first"]
        kept(world, days=3)
        kept(world, days=9)
        alone = run(world, world.use.snapshots.describe, ROOT, [snapshot], [])[0][0]["UniqueBytes"]
        assert run(world, world.use.snapshots.delete, ROOT, snapshot) is True
        held = run(world, world.use.recycle_bin.held, ROOT, with_sizes=True)
        assert held == {"Volumes": 0, "Snapshots": 1, "UniqueBytes": alone}
        assert "UniqueBytes" not in run(world, world.use.recycle_bin.held, ROOT, with_sizes=False)
        (found,) = content(world)
        assert (found["SnapshotId"], found["Name"], found["State"]) == (snapshot, snapshot, "recoverable")
        assert found["RecycleBinExitTime"][:10] == "2026-01-10", "the longest rule wins"
        assert snapshot not in listed(world)
        for use in (
            lambda: run(world, world.use.snapshots.describe, ROOT, [snapshot], [], error=SnapshotNotFound),
            lambda: run(world, world.use.snapshots.delete, ROOT, snapshot, error=SnapshotNotFound),
            lambda: run(world, world.use.volumes.rename, ROOT, snapshot, "x", error=SnapshotNotFound),
            lambda: run(world, world.use.volumes.add_tags, ROOT, [snapshot], {"a": "b"}, error=SnapshotNotFound),
            lambda: run(world, world.use.locks.lock, ROOT, snapshot, LockRequest("governance", 1, None, None),
                        error=SnapshotNotFound),
        ):  # fmt: skip
            use()
        # What only it and the volume have stays, although volume and relatives go.
        world.write(names["volume"], 0, b"z" * 100_000)
        world.detach(names["volume"])
        for other in ("volume", "other"):
            world.delete_volume(names[other])
        run(world, world.use.snapshots.delete, ROOT, names["second"], permanently=True)
        del world.truth[names["second"]]
        world.reopen()
        world.sweep()
        world.check()
        back = run(world, world.use.recycle_bin.restore, ROOT, snapshot, SNAPSHOT)
        assert back.state is SnapshotState.COMPLETED
        assert listed(world) == {snapshot}
        assert content(world) == []
        again = world.restore(snapshot)
        assert world.content(again) == world.content(snapshot)
        world.check()


def test_a_deleted_volume_is_kept_whole_and_comes_back():
    with World(seed=42) as world:
        names = history(world, attached=False)
        volume = names["volume"]
        kept(world, VOLUME)
        run(world, world.use.volumes.rename, ROOT, volume, "data")
        assert run(world, world.use.volumes.delete, ROOT, volume) is True
        assert world.row(volume).state is VolumeState.RECOVERABLE
        assert volume not in listed(world)
        run(world, world.use.attachments.attach, ROOT, volume, read_only=False, expose_as=None, error=VolumeNotFound)
        run(world, world.use.growth.grow, ROOT, volume, size=1 << 30, size_gib=None, error=VolumeNotFound)
        run(world, world.use.snapshots.create, ROOT, volume, name=None, description="", tags={}, error=VolumeNotFound)
        world.reopen()
        world.check()
        back = run(world, world.use.recycle_bin.restore, ROOT, "data", VOLUME)
        assert (back.id, back.name, back.state) == (volume, "data", VolumeState.AVAILABLE)
        world.attach(volume)
        world.write(volume, 0, b"y" * 1000)
        world.detach(volume)
        world.check()


def test_a_name_that_was_taken_meanwhile_stays_with_its_new_holder():
    with World(seed=43) as world:
        kept(world, VOLUME)
        first, second, third = (world.create() for _ in range(3))
        for ident in (first, second):
            run(world, world.use.volumes.rename, ROOT, ident, "data")
            run(world, world.use.volumes.delete, ROOT, ident)
        run(world, world.use.volumes.rename, ROOT, third, "data")
        assert [item["Name"] for item in content(world, VOLUME)] == ["data", "data"]
        run(world, world.use.recycle_bin.restore, ROOT, "data", VOLUME, error=AmbiguousName)
        back = run(world, world.use.recycle_bin.restore, ROOT, first, VOLUME)
        assert back.name == first
        assert world.row(third).name == "data"


def test_its_time_is_over_by_an_even_clock_only():
    with World(seed=44) as world:
        names = history(world, attached=False)
        kept(world, days=1)
        kept(world, VOLUME, days=2)
        run(world, world.use.snapshots.delete, ROOT, names["first"])
        run(world, world.use.volumes.delete, ROOT, names["other"])
        world.later = 10 * 365 * DAY
        world.clock_is_even = False
        run(world, world.use.expiries.look)
        assert len(content(world)) + len(content(world, VOLUME)) == 2, "a jump of the clock destroys nothing"
        world.later, world.clock_is_even = 1.5 * DAY, True
        run(world, world.use.expiries.look)
        assert content(world) == []
        assert len(content(world, VOLUME)) == 1
        del world.truth[names["first"]]
        world.check()
        world.later = 2.5 * DAY
        world.reopen()
        run(world, world.use.expiries.look)
        del world.truth[names["other"]]
        assert content(world, VOLUME) == []
        world.check()
        world.check_swept()


def test_a_rule_that_goes_leaves_what_is_in_the_bin():
    with World(seed=45) as world:
        kept(world, VOLUME)
        volume = world.create()
        run(world, world.use.volumes.delete, ROOT, volume)
        run(world, world.use.recycle_bin.delete_rule, ROOT, "r0")
        run(world, world.use.recycle_bin.delete_rule, ROOT, "r0", error=RecycleBinRuleNotFound)
        run(world, world.use.expiries.look)
        assert len(content(world, VOLUME)) == 1
        gone = world.create()
        assert run(world, world.use.volumes.delete, ROOT, gone) is False
        del world.truth[gone]
        world.check()


def test_who_may_what():
    with World(seed=46) as world:

        async def alices() -> str:
            request = CreateRequest("data", World.SIZE, None, None, True, None, {}, {"env": "prod"})
            return (await world.use.creation.create_volume(ALICE, request))[0].id

        volume = world._run(alices)
        kept(world, VOLUME)
        run(world, world.use.recycle_bin.create_rule, ALICE,
            rule(VOLUME, caller=ALICE, ident="alices", tags=(("env", "prod"),)))  # fmt: skip
        assert [r.id for r in run(world, world.use.recycle_bin.rules, ALICE)] == ["alices"]
        assert {r.id for r in run(world, world.use.recycle_bin.rules, ROOT)} == {"r0", "alices"}
        run(world, world.use.recycle_bin.delete_rule, ALICE, "r0", error=RecycleBinRuleNotFound)
        run(world, world.use.volumes.delete, ALICE, volume, permanently=True, error=UnauthorizedOperation)
        # Root deletes it: the rule that counts is that of its owner.
        assert run(world, world.use.volumes.delete, ROOT, volume) is True
        mallory = Caller(1001, "mallory", account_of_uid(1001), is_admin=False)
        assert content(world, VOLUME, mallory) == []
        run(world, world.use.recycle_bin.restore, mallory, volume, VOLUME, error=VolumeNotFound)
        run(world, world.use.volumes.delete, mallory, volume, permanently=True, error=UnauthorizedOperation)
        run(world, world.use.volumes.delete, ALICE, volume, permanently=True, error=UnauthorizedOperation)
        assert run(world, world.use.recycle_bin.held, mallory, with_sizes=True) is None
        held = run(world, world.use.recycle_bin.held, ALICE, with_sizes=True)
        assert held == {"Volumes": 1, "Snapshots": 0, "UniqueBytes": 0}
        assert run(world, world.use.volumes.delete, ROOT, volume, permanently=True) is False
        assert world.volumes() == []
        assert content(world, VOLUME) == []


def test_two_deletions_at_one_time_do_not_delete_it_for_good():
    """The second one finds it in the bin, where it is nobody's to delete."""
    with World(seed=47) as world:
        kept(world)
        kept(world, VOLUME)
        snapshot = world.snapshot(volume := world.create())
        ended: list[str] = []

        async def both() -> None:
            async def delete(use: Any, ident: str) -> None:
                try:
                    ended.append(str(await use.delete(ROOT, ident)))
                except EbsdError as exc:
                    ended.append(exc.code)

            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(delete, world.use.volumes, volume)
                    nursery.start_soon(delete, world.use.snapshots, snapshot)

        world._run(both)
        assert sorted(ended) == ["InvalidSnapshot.NotFound", "InvalidVolume.NotFound", "True", "True"]
        assert {row.id for row in (*world.volumes(), *world.snapshots())} == {volume, snapshot}
        world.check()


def test_what_is_taken_out_at_the_last_moment_stays():
    with World(seed=48) as world:
        kept(world, days=1)
        kept(world, VOLUME, days=1)
        snapshot = world.snapshot(volume := world.create())
        run(world, world.use.volumes.delete, ROOT, volume)
        run(world, world.use.snapshots.delete, ROOT, snapshot)
        world.later = 2 * DAY
        run(world, world.use.recycle_bin.restore, ROOT, snapshot, SNAPSHOT)
        run(world, world.use.recycle_bin.restore, ROOT, volume, VOLUME)
        run(world, world.use.snapshots.purge, SnapshotId(snapshot))
        run(world, world.use.volumes.purge, VolumeId(volume))
        # Deleted anew meanwhile, it has its whole time again.
        run(world, world.use.snapshots.delete, ROOT, snapshot)
        run(world, world.use.snapshots.purge, SnapshotId(snapshot))
        assert {row.id for row in (*world.volumes(), *world.snapshots())} == {volume, snapshot}
        world.check()


def test_a_locked_snapshot_does_not_go_into_the_bin():
    with World(seed=49) as world:
        kept(world)
        snapshot = world.snapshot(world.create())
        run(world, world.use.locks.lock, ROOT, snapshot, LockRequest("governance", 1, None, None))
        run(world, world.use.snapshots.delete, ROOT, snapshot, error=SnapshotLocked)
        run(world, world.use.snapshots.delete, ROOT, snapshot, permanently=True, error=SnapshotLocked)
        assert content(world) == []


def test_whom_it_is_shared_with_comes_back_with_it():
    with World(seed=52) as world:
        kept(world)
        snapshot = SnapshotId(world.snapshot(world.create()))

        async def seen() -> list[str]:
            async def nobody() -> frozenset[Any]:
                return frozenset()

            with mock.patch.object(world.use.sharing._broker, "accounts_without_public_snapshots", nobody, create=True):
                found, _ = await world.use.snapshots.describe(ALICE, None, [])
                try:
                    await world.use.sharing.reach(ALICE, snapshot)
                except SnapshotNotFound:
                    assert found == []
            return [item["SnapshotId"] for item in found]

        world._run(lambda: world.use.volumes._catalogue.run(lambda t: t.add_shares(snapshot, [ALICE.account])))
        assert world._run(seen) == [snapshot]
        run(world, world.use.snapshots.delete, ROOT, snapshot)
        assert world._run(seen) == []
        run(world, world.use.sharing.reach, ROOT, snapshot, error=SnapshotNotFound)
        world.reopen()
        assert world._run(seen) == []
        run(world, world.use.recycle_bin.restore, ROOT, snapshot, SNAPSHOT)
        assert world._run(seen) == [snapshot]


def test_what_cannot_go_is_tried_again_and_keeps_nothing_else():
    with World(seed=54) as world:
        kept(world, days=1)
        kept(world, VOLUME, days=1)
        snapshot = world.snapshot(volume := world.create())
        run(world, world.use.volumes.delete, ROOT, volume)
        run(world, world.use.snapshots.delete, ROOT, snapshot)
        world.later = 2 * DAY
        for error in (HostFailure(where="at the disk", reason="it is away"), ZeroDivisionError("a bug")):
            with mock.patch.object(world.use.snapshots, "purge", side_effect=error):
                run(world, world.use.expiries.look)
            assert [row.id for row in (*world.volumes(), *world.snapshots())] == [snapshot]
        run(world, world.use.expiries.look)
        assert world.volumes() == world.snapshots() == []
        world.truth.clear()
        world.check()


def test_a_check_finds_what_nobody_could_have_back():
    with World(seed=53) as world:
        kept(world)
        snapshot = SnapshotId(world.snapshot(volume := world.create()))
        run(world, world.use.snapshots.delete, ROOT, snapshot)
        catalog = world.use.volumes._catalogue

        def found() -> list[tuple[str, str]]:
            image = world._run(catalog.image)
            return [(finding.resource, finding.detail) for finding in read_rows(image, file="catalog").findings]

        assert found() == []
        (kept_row,) = world._transaction(lambda t: t.bin_content())
        world._transaction(lambda t: t.remove_binned(snapshot))
        assert found() == [(snapshot, "it is recoverable, and not in the recycle bin")]
        world._transaction(lambda t: t.put_binned(kept_row))
        world._transaction(lambda t: t.put_binned(replace(kept_row, resource=VolumeId(volume))))
        assert found() == [(volume, "it is available, and in the recycle bin")]
        gone = VolumeId("vol-0123456789abcdef0")
        world._transaction(lambda t: t.remove_binned(volume))
        world._transaction(lambda t: t.put_binned(replace(kept_row, resource=gone)))
        assert found() == [(gone, "it is in the recycle bin, and has no row")]


def test_an_account_has_a_limit_of_rules():
    with World(seed=50) as world:

        async def many() -> None:
            for number in range(MAX_RULES):
                await world.use.recycle_bin.create_rule(ROOT, rule(ident=f"r{number}"))
            with pytest.raises(RecycleBinRuleLimit):
                await world.use.recycle_bin.create_rule(ROOT, rule(ident="one-more"))

        world._run(many)


def _step(world: World, what: str, subject: str) -> None:
    use = world.use
    if what == "restore":
        world._run(use.recycle_bin.restore, ROOT, subject, SNAPSHOT)
    elif what.startswith("recycle"):
        world._run(use.volumes.delete if what.endswith("volume") else use.snapshots.delete, ROOT, subject)
    elif what == "purge volume":
        world._run(use.volumes.purge, VolumeId(subject))
    else:
        world._run(use.snapshots.purge, SnapshotId(subject))


@pytest.mark.parametrize("what", ["recycle snapshot", "recycle volume", "restore", "purge snapshot", "purge volume"])
def test_a_cut_leaves_it_there_in_the_bin_or_gone(what: str):
    outcomes = set()
    for at in range(60):
        with World(seed=51) as world:
            names = history(world, attached=False)
            kept(world, days=1)
            kept(world, VOLUME, days=1)
            snapshot, volume = names["first"], names["other"]
            if what == "restore" or what.startswith("purge"):
                run(world, world.use.snapshots.delete, ROOT, snapshot)
                run(world, world.use.volumes.delete, ROOT, volume)
            subject = volume if what.endswith("volume") else snapshot
            world.later = 2 * DAY if what.startswith("purge") else 0.0
            world.disk.disarm()
            world.disk.arm(die_at=at, scope=EVERYBODY)
            died = False
            try:
                _step(world, what, subject)
            except Died:
                died = True
            world.disk.disarm()
            world.crash("power" if at % 2 else "kill", "random")
            world.open()
            there = {row.id: row.state.value for row in (*world.volumes(), *world.snapshots())}
            outcomes.add(there.get(subject, "gone"))
            binned = {item.get("SnapshotId") if kind is SNAPSHOT else item["VolumeId"]
                      for kind in (SNAPSHOT, VOLUME) for item in content(world, kind)}  # fmt: skip
            assert {ident for ident, state in there.items() if state == "recoverable"} == binned
            if subject not in there:
                del world.truth[subject]
            world.check()
            if not died:
                break
    else:
        raise AssertionError("it has more calls than are cut here")
    if what == "restore":
        assert outcomes == {"recoverable", "completed"}
    elif what.startswith("recycle"):
        assert outcomes == {"recoverable", "available" if what.endswith("volume") else "completed"}
    else:
        assert outcomes == {"recoverable", "gone"}
