"""The worker processes that read and write blocks: started on demand, kept warm for a while, then ended.

1. A worker serves one account. The right to use the key is asked for when a worker opens a snapshot, under the caller;
   a worker is not used for longer than MOST_AGE, so that is how long a refusal may take to be felt.
2. One request at a time for each worker: the lock of its place is held from the check of the catalog to the answer.
3. A worker that dies, hangs or answers nonsense is ended; where it died, the request is made once more with another.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import trio

from ebsd.control.broker import Broker
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.domain.errors import EbsdError, IntegrityFailure, RemoteError, TooManyBlockWorkers
from ebsd.domain.ids import AccountId, KeyArn
from ebsd.domain.model import Caller, Snapshot
from ebsd.ipc.channel import Channel, ChannelClosed
from ebsd.ipc.process import Child, start_with_channel

log = logging.getLogger(__name__)

IDLE_SECONDS: Final = 30.0
MOST_AGE: Final = 300.0
TEND_SECONDS: Final = 5.0
MOST_PER_ACCOUNT: Final = 8
"""Processes; each takes some 40 MB and the map of what it serves."""
MOST_OPENED: Final = 4
"""Snapshots that one reader has open."""

REQUEST_DEADLINE: Final = 120.0

Place = tuple[str, AccountId, str]
"""Direction, account, and lineage or snapshot."""

T = TypeVar("T")


@dataclass(slots=True)
class Worker:
    """A worker process."""

    child: Child
    channel: Channel
    started: float
    used: float
    opened: set[str] = field(default_factory=set)
    """A reader's: ids of the snapshots that it has open; a writer's: the account that its key was given to."""
    discarded: bool = False
    """It is replaced before its next use: what it was told has failed half-way."""

    async def request(
        self, method: str, params: dict[str, Any], fds: Sequence[int] = (), *, deadline: float = REQUEST_DEADLINE
    ) -> tuple[dict[str, Any], list[int]]:
        """Return the answer and its descriptors, which are the caller's."""
        packet = await self.channel.request(method, params, fds, deadline=deadline)
        return packet.message, packet.fds

    async def end(self) -> None:
        self.child.kill()
        await self.child.wait()
        self.channel.close()


class BlockWorkers:
    """All of them, by place."""

    def __init__(self, broker: Broker, files: SnapshotFiles) -> None:
        self._broker = broker
        self._files = files
        self._workers: dict[Place, Worker] = {}
        self._locks: dict[Place, trio.Lock] = {}

    async def use(self, place: Place, module: str, work: Callable[[Worker], Awaitable[T]]) -> T:
        """Do ``work`` with the worker of a place; it is started when there is none.

        Raises what ``work`` does, TooManyBlockWorkers.
        """
        async with self._held(place):
            try:
                return await self._use(place, module, work)
            except ChannelClosed as exc:
                log.error("a worker for %s: %s", place[2], exc)
            return await self._use(place, module, work)

    async def end(self, place: Place) -> None:
        """End the worker of a place, when there is one: at return it does nothing any more."""
        async with self._held(place):
            await self._end(place)

    @asynccontextmanager
    async def _held(self, place: Place) -> AsyncIterator[None]:
        lock = self._locks.setdefault(place, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if place not in self._workers and not lock.locked() and self._locks.get(place) is lock:
                del self._locks[place]

    async def _use(self, place: Place, module: str, work: Callable[[Worker], Awaitable[T]]) -> T:
        now = trio.current_time()
        worker = self._workers.get(place)
        if worker is not None and (worker.discarded or worker.child.poll() or now - worker.started > MOST_AGE):
            await self._end(place)
            worker = None
        if worker is None:
            await self._make_room(place[1])
            worker = self._workers[place] = Worker(*start_with_channel(module), started=now, used=now)
        try:
            result = await work(worker)
        except RemoteError:
            worker.used = trio.current_time()
            raise
        except BaseException:
            # Nobody knows what it is doing, or it has nothing open.
            await self._end(place)
            raise
        worker.used = trio.current_time()
        return result

    async def _end(self, place: Place) -> None:
        worker = self._workers.pop(place, None)
        if worker is not None:
            with trio.CancelScope(shield=True):
                await worker.end()

    async def _make_room(self, account: AccountId) -> None:
        """End workers until the account may have one more at return, when nobody else has run in between."""
        while len(own := [place for place in self._workers if place[1] == account]) >= MOST_PER_ACCOUNT:
            idle = [place for place in own if not self._locks[place].locked()]
            if not idle:
                raise TooManyBlockWorkers(limit=MOST_PER_ACCOUNT)
            chosen = min(idle, key=lambda place: self._workers[place].used)
            del self._locks[chosen]
            await self._end(chosen)

    async def tend(self) -> None:
        """End workers that have had nothing to do for a while, and all of them with ebsd."""
        try:
            while True:
                await trio.sleep(TEND_SECONDS)
                for place, worker in list(self._workers.items()):
                    lock = self._locks[place]
                    if trio.current_time() - worker.used > IDLE_SECONDS and not lock.locked():
                        async with lock:
                            if self._workers.get(place) is worker:
                                await self._end(place)
                        if not lock.locked() and self._locks.get(place) is lock:
                            del self._locks[place]
        finally:
            for place in list(self._workers):
                await self._end(place)

    # --- keys

    @asynccontextmanager
    async def session(self, caller: Caller, snapshot: Snapshot, role: str) -> AsyncIterator[int]:
        """Give a descriptor of a key session for a snapshot, opened with the caller's rights; retire its grant after.

        The descriptor is the receiver's to close. Raises what the key service says, IntegrityFailure.
        """
        if snapshot.key_arn is None:
            yield await self._broker.open_session(snapshot.id, key=None, grant=None, blob=None, context=None)
            return
        wrapped = (await trio.to_thread.run_sync(self._files.record_of, snapshot.id)).wrapped_key
        if wrapped is None:
            raise IntegrityFailure(resource=snapshot.id, reason="its record has no wrapped key, but it is encrypted")
        name = _grant_name(caller, snapshot, role)
        grant = await self._broker.create_grant(caller, snapshot.key_arn, wrapped.context, name)
        try:
            yield await self._broker.open_session(
                snapshot.id,
                key=snapshot.key_arn,
                grant=grant,
                blob=wrapped.blob,
                context=wrapped.context,
                recipient=None if snapshot.account == caller.account or caller.is_admin else caller,
            )
        finally:
            with trio.CancelScope(shield=True):
                await self._retire(snapshot.key_arn, grant, snapshot.id)

    async def retire_left(self, caller: Caller, snapshot: Snapshot, role: str) -> None:
        """Retire the grant of a session that an ebsd which was killed may have left; asking again gives its id."""
        if snapshot.key_arn is None:
            return
        try:
            wrapped = (await trio.to_thread.run_sync(self._files.record_of, snapshot.id)).wrapped_key
            if wrapped is not None:
                name = _grant_name(caller, snapshot, role)
                grant = await self._broker.create_grant(caller, snapshot.key_arn, wrapped.context, name)
                await self._broker.retire_grant(snapshot.key_arn, grant)
        except (EbsdError, OSError) as exc:
            log.warning("whether %s has a grant left cannot be said: %s", snapshot.id, exc)

    async def _retire(self, key: KeyArn, grant: str, ident: str) -> None:
        try:
            await self._broker.retire_grant(key, grant)
        except EbsdError as exc:
            log.warning("a grant for blocks of %s could not be retired: %s", ident, exc)


def _grant_name(caller: Caller, snapshot: Snapshot, role: str) -> str:
    return f"{snapshot.id}-{role}-{caller.account}"
