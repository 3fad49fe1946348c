"""Client tokens: one request is done once, whoever repeats it, at once or after ebsd was killed at any of its calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from unittest import mock

import pytest
import trio
from world import World
from world.crash_disk import EVERYBODY, Died
from world.memory_broker import arn
from world.stories import history
from world.world import ROOT

from ebsd.control.creation import CopyRequest
from ebsd.control.volumes import CreateRequest
from ebsd.domain.errors import IdempotentParameterMismatch, InvalidParameterValue, VolumeNotFound
from ebsd.domain.ids import account_of_uid
from ebsd.domain.model import Caller
from ebsd.domain.tokens import ClientToken, parse_client_token

ALICE = Caller(1000, "alice", account_of_uid(1000), is_admin=False)
Ask = Callable[[World, dict[str, str], str], Awaitable[str]]
"""Make something under a token; returns its id."""


def token(text: str, action: str = "CreateVolume", *, caller: Caller = ROOT, **parameters: Any) -> ClientToken:
    found = parse_client_token(caller.account, action, {**parameters, "ClientToken": text})
    assert found is not None
    return found


def volume_request(**more: Any) -> CreateRequest:
    fields: dict[str, Any] = {"name": None, "size": World.SIZE, "size_gib": None, "snapshot": None, "encrypted": True,
                              "key": None, "context": {}, "tags": {}}  # fmt: skip
    return CreateRequest(**{**fields, **more})


async def _create(world: World, names: dict[str, str], text: str) -> str:
    volume, _, _ = await world.use.creation.create_volume(ROOT, volume_request(name="once"), token(text))
    return volume.id


async def _restore(world: World, names: dict[str, str], text: str) -> str:
    request = volume_request(snapshot=names["first"], size=None, encrypted=None)
    volume, _, _ = await world.use.creation.create_volume(ROOT, request, token(text))
    return volume.id


async def _snapshot(world: World, names: dict[str, str], text: str) -> str:
    made = await world.use.creation.take_snapshot(
        ROOT, names["volume"], name="once", description="", tags={}, token=token(text, "CreateSnapshot")
    )
    return made.id


async def _copy(world: World, names: dict[str, str], text: str) -> str:
    key = world.row(names["first"]).key_arn
    request = CopyRequest(names["first"], "once", "", True, key, {})
    made, _, _ = await world.use.creation.copy_snapshot(ROOT, request, token(text, "CopySnapshot"))
    return made.id


async def _re_encrypt(world: World, names: dict[str, str], text: str) -> str:
    request = CopyRequest(names["first"], "once", "", True, arn("other"), {})
    made, job, _ = await world.use.creation.copy_snapshot(ROOT, request, token(text, "CopySnapshot"))
    assert job is not None
    async for _ in world.use.jobs.watch(ROOT, job):
        pass
    return made.id


KINDS = [_create, _restore, _snapshot, _copy, _re_encrypt]


def ids(world: World) -> set[str]:
    return {row.id for row in (*world.volumes(), *world.snapshots())}


@pytest.mark.parametrize("ask", KINDS)
def test_the_same_request_gives_the_same_resource(ask: Ask):
    with World(seed=21) as world:
        names = history(world, attached=True)
        before = ids(world)
        made = world._run(ask, world, names, "t-1")
        assert world._run(ask, world, names, "t-1") == made
        world.reopen()
        assert world._run(ask, world, names, "t-1") == made
        assert ids(world) - before == {made}


@pytest.mark.parametrize("ask", KINDS)
def test_requests_at_one_time_make_one_resource(ask: Ask):
    with World(seed=22) as world:
        names = history(world, attached=True)
        before = ids(world)
        answers: list[str] = []

        async def together() -> None:
            async def one() -> None:
                answers.append(await ask(world, names, "t-1"))

            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(one)

        world._run(together)
        assert len(answers) == 4
        assert ids(world) - before == set(answers)
        assert len(set(answers)) == 1
        assert not world.use.creation._tokens._locks


@pytest.mark.parametrize("ask", KINDS)
@pytest.mark.parametrize("kind", ["kill", "ebsd"])
def test_a_repetition_after_a_kill_makes_no_second_one(ask: Ask, kind: Any):
    """Now and then a call is one to die before; at last nothing is cut but the reply."""
    whole, at, made_before_reply = False, 0, 0
    while not whole:
        with World(seed=23) as world:
            names = history(world, attached=kind == "ebsd")
            before = ids(world)
            world.disk.disarm()
            world.disk.arm(die_at=at, scope=EVERYBODY if kind == "kill" else "ebsd")
            try:
                world._run(ask, world, names, "t-1")
                whole = True
            except Died:
                pass
            world.disk.disarm()
            world.crash(kind)
            world.open()
            left = ids(world) - before
            assert len(left) <= 1
            made = world._run(ask, world, names, "t-1")
            assert left <= {made}, "what was there was made by the same request"
            assert ids(world) - before == {made}
            made_before_reply += bool(left)
            at += 11 if ask is _re_encrypt else 5
    assert at > 10
    assert made_before_reply >= 1


def test_other_parameters_are_refused_and_other_tokens_are_others():
    with World(seed=24) as world:

        async def create(found: ClientToken, caller: Caller = ROOT, **more: Any) -> str:
            return (await world.use.creation.create_volume(caller, volume_request(**more), found))[0].id

        first = world._run(create, token("a", Size=1))

        async def with_other_parameters() -> None:
            with pytest.raises(IdempotentParameterMismatch) as caught:
                await create(token("a", Size=2))
            errors.append(caught.value)

        errors: list[IdempotentParameterMismatch] = []
        world._run(with_other_parameters)
        (error,) = errors
        assert first in error.message
        assert (error.code, int(error.exit_status)) == ("IdempotentParameterMismatch", 4)
        others = {
            world._run(create, token("b", Size=1)),
            world._run(create, token("a", "CopySnapshot", Size=1)),
            world._run(create, token("a", caller=ALICE, Size=1), ALICE),
        }
        assert len({first, *others}) == 4, "another token, action or account"
        assert len(world.volumes()) == 4


def test_a_token_goes_with_its_resource():
    with World(seed=25) as world:

        async def create() -> str:
            return (await world.use.creation.create_volume(ROOT, volume_request(), token("a")))[0].id

        first = world._run(create)
        world._run(world.use.volumes.delete, ROOT, first)
        second = world._run(create)
        assert second != first
        with pytest.raises(VolumeNotFound):
            world.row(first)
        assert [volume.id for volume in world.volumes()] == [second]


def test_a_request_that_failed_is_made_by_its_repetition():
    with World(seed=26) as world:
        request = volume_request()

        async def create() -> str:
            return (await world.use.creation.create_volume(ROOT, request, token("a")))[0].id

        async def refused(*_: Any, **__: Any) -> None:
            raise OSError("the disk is away")

        async def twice() -> str:
            with mock.patch.object(world.use.volumes, "wrap_new_key", refused), pytest.raises(OSError, match="away"):
                await create()
            return await create()

        assert world._run(twice) == world.volumes()[0].id
        assert len(world.volumes()) == 1


@pytest.mark.parametrize("text", ["", "x" * 65, "\x00", "tab\t", "ä"])
def test_what_is_no_token(text: str):
    with pytest.raises(InvalidParameterValue):
        parse_client_token(ROOT.account, "CreateVolume", {"ClientToken": text})


def test_absent_and_null_members_are_the_same_request():
    assert parse_client_token(ROOT.account, "CreateVolume", {"Size": 1}) is None
    assert token("a", Size=1) == token("a", Size=1, Name=None)
    assert token("a", Size=1) != token("a", Size=2)
