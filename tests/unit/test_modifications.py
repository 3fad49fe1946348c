"""What DescribeVolumesModifications tells of a growth: done, failed, cut at each of its calls."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from world import World
from world.crash_disk import EVERYBODY, Died
from world.stories import BY_NAME, history
from world.world import ROOT

from ebsd.domain.errors import HostFailure, InvalidFilter, ModificationNotFound, VolumeNotFound
from ebsd.domain.ids import account_of_uid
from ebsd.domain.model import Caller
from ebsd.domain.units import CHUNK

GROWN = 20 * CHUNK
ALICE = Caller(1000, "alice", account_of_uid(1000), is_admin=False)


def told(
    world: World, names: list[str] | None = None, *, caller: Caller = ROOT, **filters: str
) -> list[dict[str, Any]]:
    wanted = [{"Name": name.replace("_", "-"), "Values": [value]} for name, value in filters.items()]
    found, _ = world._run(world.use.growth.describe, caller, names, wanted, None, None)
    return found


def test_the_latest_modification_of_each_volume():
    with World(seed=3) as world:
        first, second = world.create(), world.create()
        with pytest.raises(ModificationNotFound):
            told(world, [first])
        assert told(world) == []
        world.resize(first, GROWN)
        world.resize(first, 2 * GROWN)
        world.attach(second)
        world.resize(second, GROWN)
        assert [(m["VolumeId"], m["OriginalSizeBytes"], m["TargetSizeBytes"]) for m in told(world)] == [
            (first, GROWN, 2 * GROWN),
            (second, World.SIZE, GROWN),
        ]
        assert {(m["ModificationState"], m["Progress"]) for m in told(world)} == {("completed", 100)}
        assert all(m["EndTime"] > m["StartTime"] for m in told(world))
        assert [m["VolumeId"] for m in told(world, modification_state="completed", volume_id=f"{second[:-1]}?")] == [
            second
        ]
        assert told(world, modification_state="failed") == []
        with pytest.raises(InvalidFilter):
            told(world, flavour="x")
        assert told(world, caller=ALICE) == []
        with pytest.raises(VolumeNotFound):
            told(world, [first], caller=ALICE)
        world.reopen()
        assert len(told(world)) == 2
        world.delete_volume(first)
        assert [m["VolumeId"] for m in told(world)] == [second]


def test_a_growth_that_fails_says_why():
    with World(seed=4) as world:
        volume = world.create()
        broken = mock.patch.object(
            world.use.growth._files, "grow", side_effect=HostFailure(where="at the disk", reason="it is away")
        )
        with broken, pytest.raises(HostFailure):
            world.resize(volume, GROWN)
        (found,) = told(world)
        assert (found["ModificationState"], found["TargetSizeBytes"]) == ("failed", GROWN)
        assert "it is away" in found["StatusMessage"]
        assert world.row(volume).size == World.SIZE
        world.resize(volume, GROWN)
        assert [m["ModificationState"] for m in told(world)] == ["completed"]


@pytest.mark.parametrize("name", ["resize attached", "resize detached"])
@pytest.mark.parametrize("kind", ["kill", "ebsd"])
def test_a_cut_growth_is_decided_at_the_next_start(name: str, kind: Any):
    operation = BY_NAME[name]
    states = set()
    for at in range(40):
        with World(seed=11) as world:
            names = history(world, attached=operation.volatile)
            operation.before(world, names)
            volume = names["volume"]
            before = world.row(volume).size
            world.disk.arm(die_at=at, scope=EVERYBODY if kind == "kill" else "ebsd")
            try:
                operation.run(world, names)
            except Died:
                pass
            else:
                break
            world.disk.disarm()
            world.crash(kind)
            world.recover(detach=False)
            size = world.row(volume).size
            for found in told(world):
                states.add(found["ModificationState"])
                if found["ModificationState"] == "completed":
                    assert size == found["TargetSizeBytes"]
                else:
                    assert found["ModificationState"] == "failed"
                    assert (size, found["OriginalSizeBytes"]) == (before, before)
            if not told(world):
                assert size == before
    else:
        raise AssertionError("it has more calls than are cut here")
    assert states == {"completed", "failed"}
