"""Accepting a rollback: one resource, one generation, by an administrator; what was given up does not come back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from kms_rig import ALICE, OTHER, ROOT, VOLUME, Reply, Rig, ask, caller, memory_directory, refused


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from memory_directory()


@pytest.fixture
async def rig(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, nursery)
    yield rig
    await rig.close()


async def accept(rig: Rig, generation: int, uid: int = ROOT, resource: str = VOLUME) -> Reply:
    return await rig.ebsd("AcceptRollback", Caller=caller(uid), ResourceId=resource, Generation=generation)


async def floor(rig: Rig, resource: str = VOLUME) -> int:
    return int((await rig.ebsd("DescribeAnchor", ResourceId=resource))["Anchor"]["Floor"])


@pytest.mark.trio
async def test_the_floor_of_one_resource_falls_and_the_session_tells_what_was_given_up(
    rig: Rig, tmp_path: Path, nursery: trio.Nursery
) -> None:
    key = await rig.key()
    blob = await rig.anchored(key)
    await rig.anchored(key, resource=OTHER)
    for resource in (VOLUME, OTHER):
        await rig.ebsd("RaiseFloor", ResourceId=resource, Generation=9)
    assert (await accept(rig, 4))["FormerFloor"] == 9
    assert (await floor(rig), await floor(rig, OTHER)) == (4, 9)
    await rig.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=6)
    assert (await accept(rig, 2))["FormerFloor"] == 6
    await rig.close()
    again = Rig(tmp_path, nursery)
    answer = await ask(await again.session(key, await again.grant(key), blob))
    assert (answer.anchor.floor, answer.anchor.passed) == (2, 9), "the highest of all that were given up"
    assert answer.data_key is not None
    answer.data_key.wipe()
    await again.close()


@pytest.mark.trio
async def test_who_may_not_and_what_cannot_be_accepted(rig: Rig) -> None:
    await rig.anchored(await rig.key())
    await rig.ebsd("RaiseFloor", ResourceId=VOLUME, Generation=9)
    with refused("UnauthorizedOperation"):
        await accept(rig, 4, uid=ALICE)
    for generation in (9, 10, -1):
        with refused("IncorrectState"):
            await accept(rig, generation)
    with refused("Ebsd.IntegrityFailure", "no anchor"):
        await accept(rig, 0, resource=OTHER)
    assert await floor(rig) == 9


@pytest.mark.trio
async def test_no_first_state_is_made_where_keys_are_missing(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig = Rig(tmp_path, nursery, may_create=False)
    assert rig.status == "rescue"
    with refused("Ebsd.KeysMissing", "root.key, is not there either"):
        await rig.key()
    assert not rig.key_file.exists()
    await rig.close()
