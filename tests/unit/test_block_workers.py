"""Workers for blocks: started on demand, kept warm, ended when idle, old, dead or too many."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from ebsd.control import block_workers
from ebsd.control.block_workers import IDLE_SECONDS, MOST_AGE, MOST_PER_ACCOUNT, BlockWorkers, Place, Worker
from ebsd.domain.errors import IntegrityFailure, RemoteError, TooManyBlockWorkers
from ebsd.domain.ids import AccountId
from ebsd.ipc.channel import ChannelClosed

ALICE, BOB = AccountId("000000001000"), AccountId("000000001001")


class Processes:
    """What was started, and what of it lives."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.alive: set[int] = set()

    def start(self, module: str) -> tuple[Any, Any]:
        number = len(self.started)
        self.started.append(module)
        self.alive.add(number)

        async def wait() -> None:
            await trio.lowlevel.checkpoint()

        child = SimpleNamespace(
            kill=lambda: self.alive.discard(number), wait=wait, poll=lambda: number not in self.alive, number=number
        )
        return child, SimpleNamespace(close=lambda: None)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    made = Processes()
    monkeypatch.setattr(block_workers, "start_with_channel", made.start)
    return made


def run(main: Callable[[BlockWorkers], Awaitable[None]]) -> None:
    workers = BlockWorkers(None, None)  # type: ignore[arg-type]

    async def whole() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(workers.tend)
            await main(workers)
            nursery.cancel_scope.cancel()

    trio.run(whole, clock=trio.testing.MockClock(autojump_threshold=0))


def place(name: str, account: AccountId = ALICE) -> Place:
    return "read", account, name


async def number_of(worker: Worker) -> int:
    await trio.lowlevel.checkpoint()
    return int(worker.child.number)  # type: ignore[attr-defined]


def test_a_worker_is_kept_until_it_is_idle_or_old(processes: Processes) -> None:
    async def main(workers: BlockWorkers) -> None:
        assert await workers.use(place("a"), "m", number_of) == 0
        assert await workers.use(place("a"), "m", number_of) == 0
        await trio.sleep(IDLE_SECONDS + 10)
        assert processes.alive == set()
        assert workers._locks == {}
        assert await workers.use(place("a"), "m", number_of) == 1
        for _ in range(int(MOST_AGE / 10) + 1):
            await trio.sleep(10)
            last = await workers.use(place("a"), "m", number_of)
        assert last == 2
        assert processes.alive == {2}

    run(main)
    assert processes.alive == set(), "a worker outlived ebsd"


def test_one_that_died_is_replaced_once(processes: Processes) -> None:
    async def main(workers: BlockWorkers) -> None:
        asked: list[int] = []

        async def dies(worker: Worker) -> None:
            asked.append(await number_of(worker))
            raise ChannelClosed(reason="the other end is gone")

        with pytest.raises(ChannelClosed):
            await workers.use(place("a"), "m", dies)
        assert asked == [0, 1]
        assert processes.alive == set()
        assert workers._locks == {}

    run(main)


def test_what_it_answers_keeps_it_and_what_goes_wrong_here_ends_it(processes: Processes) -> None:
    async def main(workers: BlockWorkers) -> None:
        async def refuses(worker: Worker) -> None:
            raise RemoteError("Code", "told")

        async def fails(worker: Worker) -> None:
            raise IntegrityFailure(resource="x", reason="y")

        async def discards(worker: Worker) -> None:
            worker.discarded = True
            raise RemoteError("Code", "told")

        for work, left in ((refuses, {0}), (fails, set()), (discards, {1})):
            with pytest.raises((RemoteError, IntegrityFailure)):
                await workers.use(place("a"), "m", work)
            assert processes.alive == left
        assert await workers.use(place("a"), "m", number_of) == 2
        with trio.move_on_after(1) as scope:
            await workers.use(place("a"), "m", lambda worker: trio.sleep_forever())
        assert scope.cancelled_caught
        assert processes.alive == set()

    run(main)


def test_an_account_has_a_share_of_processes(processes: Processes) -> None:
    async def main(workers: BlockWorkers) -> None:
        for at in range(MOST_PER_ACCOUNT):
            await workers.use(place(str(at)), "m", number_of)
            await trio.sleep(0.01)
        await workers.use(place("b", BOB), "m", number_of)
        await workers.use(place("0"), "m", number_of)
        await workers.use(place("new"), "m", number_of)
        assert len(processes.alive) == MOST_PER_ACCOUNT + 1
        assert 1 not in processes.alive, "the one that was not used for longest"
        async with trio.open_nursery() as nursery:
            for at in range(MOST_PER_ACCOUNT):
                nursery.start_soon(workers.use, place(f"busy{at}"), "m", lambda worker: trio.sleep(5))
            await trio.sleep(1)
            with pytest.raises(TooManyBlockWorkers):
                await workers.use(place("more"), "m", number_of)
            await workers.use(place("b", BOB), "m", number_of)
        await workers.use(place("more"), "m", number_of)

    run(main)


def test_requests_of_one_place_are_made_one_after_the_other(processes: Processes) -> None:
    async def main(workers: BlockWorkers) -> None:
        inside = 0

        async def work(worker: Worker) -> None:
            nonlocal inside
            inside += 1
            assert inside == 1
            await trio.sleep(1)
            inside -= 1

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(workers.use, place("a"), "m", work)
        await workers.end(place("a"))
        assert processes.alive == set()
        assert len(processes.started) == 1

    run(main)
