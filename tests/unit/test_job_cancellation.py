"""Cancelling a copy before there is a worker: while its destination's key and files are made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing
from world import World
from world.world import ROOT

from ebsd.control.creation import CopyRequest
from ebsd.domain.errors import KeyServiceUnavailable
from ebsd.domain.states import JobState


def gated(world: World, step: str) -> tuple[Any, trio.Event, trio.Event]:
    """Return a patch that holds a step of the copy, the event that says so, and the one that lets it go on."""
    copying = world.use.creation._copying
    owner = copying._volumes if step == "wrap_new_key" else copying._catalogue
    name = step if step == "wrap_new_key" else "run"
    real: Callable[..., Awaitable[Any]] = getattr(owner, name)
    reached, go_on = trio.Event(), trio.Event()

    async def slow(*args: Any) -> Any:
        if step == "wrap_new_key" or "_prepare" in args[0].__qualname__:
            reached.set()
            await go_on.wait()
        return await real(*args)

    return mock.patch.object(owner, name, slow), reached, go_on


@pytest.mark.parametrize("step", ["wrap_new_key", "note"])
def test_a_copy_is_cancelled_while_it_is_prepared(step: str):
    with World(seed=5) as world:
        volume = world.create()
        world.attach(volume)
        world.write(volume, 0, b"x" * 100_000)
        snapshot = world.snapshot(volume)
        request = CopyRequest(snapshot, None, "", True, "arn:aws:kms:local:000000000000:key/other", {})
        ended: list[JobState] = []

        async def story() -> None:
            patch, reached, go_on = gated(world, step)
            jobs = world.use.jobs

            async def cancel(ident: str) -> None:
                ended.append((await jobs.cancel(ROOT, ident)).job.state)

            with patch:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(world.use.creation.copy_snapshot, ROOT, request)
                    await reached.wait()
                    (job,) = world.use.jobs._running.values()
                    nursery.start_soon(cancel, job.job.id)
                    for _ in range(20):
                        await trio.lowlevel.checkpoint()
                    assert not ended, "the step under way is not cut in two"
                    go_on.set()

        world._run(story)
        assert ended == [JobState.CANCELLED]
        assert [s.id for s in world.snapshots()] == [snapshot]
        assert not world.use.jobs._running
        world.check()


def test_whoever_cancels_a_copy_that_cannot_be_prepared_learns_of_its_end():
    with World(seed=6) as world:
        volume = world.create()
        snapshot = world.snapshot(volume)
        request = CopyRequest(snapshot, None, "", True, "arn:aws:kms:local:000000000000:key/other", {})
        states: list[JobState] = []

        async def story() -> None:
            jobs = world.use.jobs
            reached, go_on = trio.Event(), trio.Event()

            async def refused(*_: Any) -> None:
                reached.set()
                await go_on.wait()
                raise KeyServiceUnavailable(reason="it is away")

            async def copy() -> None:
                with pytest.raises(KeyServiceUnavailable):
                    await world.use.creation.copy_snapshot(ROOT, request)

            async def cancel() -> None:
                (running,) = jobs._running.values()
                states.append((await jobs.cancel(ROOT, running.job.id)).job.state)

            with mock.patch.object(world.use.creation._copying._volumes, "wrap_new_key", refused):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(copy)
                    await reached.wait()
                    nursery.start_soon(cancel)
                    await trio.testing.wait_all_tasks_blocked()
                    go_on.set()

        world._run(story)
        assert states == [JobState.FAILED]
        assert [s.id for s in world.snapshots()] == [snapshot]
        world.check()
