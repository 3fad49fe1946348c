"""What a kind of job has of its own; ``control/jobs.py`` does what all kinds have in common.

To add a kind:

1. Name it in ``domain/states.py`` (JobKind) and give it a row in ``domain/jobs.py`` (KINDS): its worker's module, what
   it makes, and whether it goes on by itself after a restart of ebsd or needs its client's descriptor again. Name it in
   ``io.ebsd.Control.varlink`` (Job.Kind).
2. Write the worker, a module that is started as a process and serves descriptor 0; ``volume/copier.py`` is the model.
   It ends with its channel, and at any moment by SIGKILL. It answers

   - ``start {..., "DoneThrough", "Rate"}``, with descriptors: verifies everything and begins. ``hand_over`` sends it.
   - ``progress {"Rate"}``, five times a second, with ``{"State", "Done", "Total", "DoneThrough", "Checkpoint"?,
     "Error"?}``. State is done, failed (then with Error) or anything else. ``Rate`` is the limit of now in bytes per
     second, 0 for none; ``volume/pacing.py`` keeps to it. Only what is durable may be below ``DoneThrough``, and
     ``Checkpoint`` is of the same moment. Both are committed, and are in the ``job`` of the next ``hand_over``.
   - ``finish {}`` with what ``conclude`` gets; asked when the state is done.

3. Write a ``JobWork`` and give it to ``Jobs.register``. A kind that makes a volume or a snapshot derives from
   ``Filling`` (``control/filling.py``), which makes, completes and removes it; what is left is ``hand_over``.
4. A use case makes a job with ``new_job`` and gives it to ``Jobs.start`` (``Filling.fill`` does), with the descriptors
   of its client, if any. They are kept, so that a worker that dies is started again without the client. They are lost
   with ebsd: then a kind WITH_CLIENT is ``interrupted`` until ResumeJob brings them again. ``check_given`` looks at
   them before anything is changed.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import trio

from ebsd.control.broker import Broker
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.volume_link import close_all
from ebsd.domain.errors import EbsdError, IntegrityFailure, InvalidParameterValue
from ebsd.domain.ids import KeyArn, uid_of_account
from ebsd.domain.jobs import KINDS, Resumption
from ebsd.domain.model import Caller, Job, Snapshot, Volume
from ebsd.ipc.channel import Channel
from ebsd.ipc.process import Child, end_child, start_with_channel
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)

START_DEADLINE: Final = 120.0
FINISH_DEADLINE: Final = 600.0
END_SECONDS: Final = 5.0
"""How long the end of a job waits for its killed worker, which may hang in a file of the client's."""

DEADLINE: Final = 60.0
"""Seconds for the answer of a worker."""


@dataclass(slots=True)
class Worker:
    """A worker process."""

    child: Child
    channel: Channel

    @classmethod
    def begin(cls, module: str) -> Worker:
        return cls(*start_with_channel(module))

    async def request(
        self, method: str, params: dict[str, Any], fds: Sequence[int] = (), *, deadline: float = DEADLINE
    ) -> dict[str, Any]:
        return (await self.channel.request(method, params, fds, deadline=deadline)).message

    async def end(self) -> None:
        """End the worker at once: whatever is not durable is done again."""
        self.channel.close()
        await end_child(self.child, END_SECONDS)


_closers: Final = trio.CapacityLimiter(8)
"""Threads of their own, or a client whose file system hangs could take all that ebsd has."""


async def close_given(fds: Sequence[int]) -> None:
    """Close descriptors of a client, which may take as long as he likes; a cancellation leaves the rest to a thread."""
    await trio.to_thread.run_sync(close_all, list(fds), limiter=_closers, abandon_on_cancel=True)


class Sessions:
    """The key sessions of one worker, and the grants that they need until the worker has its keys."""

    def __init__(self, broker: Broker, files: SnapshotFiles, job: Job) -> None:
        self._broker = broker
        self._files = files
        self._job = job
        self._grants: list[tuple[KeyArn, str]] = []

    async def open(self, resource: Snapshot | Volume, role: str) -> int:
        """Return a session for the data key of a resource; the caller closes it.

        ``role`` tells the sessions of one job apart. Raises IntegrityFailure, and what the key service says.
        """
        if resource.key_arn is None:
            return await self._broker.open_session(resource.id, key=None, grant=None, blob=None, context=None)
        wrapped = (await trio.to_thread.run_sync(self._files.record_of, resource.id)).wrapped_key
        if wrapped is None:
            raise IntegrityFailure(resource=resource.id, reason="its record has no wrapped key, but it is encrypted")
        # Whose job it is, whosesoever the resource: what is shared with him is read under his rights on its key.
        job = self._job
        for_whom = Caller(uid_of_account(job.account), job.owner, job.account, is_admin=False)
        grant = await self._broker.create_grant(for_whom, resource.key_arn, wrapped.context, f"{job.id}-{role}")
        self._grants.append((resource.key_arn, grant))
        return await self._broker.open_session(
            resource.id,
            key=resource.key_arn,
            grant=grant,
            blob=wrapped.blob,
            context=wrapped.context,
            recipient=None if resource.account == job.account else for_whom,
        )

    async def retire(self) -> None:
        """Retire the grants; a failure is logged."""
        while self._grants:
            key, grant = self._grants.pop()
            try:
                await self._broker.retire_grant(key, grant)
            except EbsdError as exc:
                log.warning("a grant of %s could not be retired: %s", self._job.id, exc)


class JobWork(ABC):
    """What the jobs of one kind do. What is not abstract may be left as it is."""

    @abstractmethod
    async def hand_over(self, job: Job, worker: Worker, sessions: Sessions, given: Sequence[int], rate: int) -> None:
        """Send ``start`` to a worker that was just started, with everything from ``job.done_through`` on.

        ``given``: descriptors of the client, which stay the caller's. ``rate``: the limit in bytes per second, or 0.
        """

    @abstractmethod
    async def conclude(self, job: Job, answer: Mapping[str, Any]) -> Callable[[Transaction], None]:
        """Do what must be done on the disk and in the key service for the job to be complete.

        Returns what is committed together with the end of the job. May be done again after a crash. An error fails
        the job.
        """

    @abstractmethod
    async def remove(self, job: Job) -> None:
        """Remove what a job that does not complete has made; may be repeated."""

    async def concluded(self, job: Job) -> None:
        """Do what may be done after the commit."""
        return

    def around(self, job: Job) -> AbstractAsyncContextManager[None]:
        """Return what must hold while a worker of the job works."""
        return nullcontext()

    async def is_prepared(self, job: Job) -> bool:
        """Say whether there is something that a worker could go on with; else the job fails at the start of ebsd."""
        return True

    async def answer_left(self, job: Job) -> Mapping[str, Any] | None:
        """Return what a worker answered to ``finish`` before ebsd ended, as far as ``conclude`` had kept it.

        Called at the start of ebsd, before temporary files are removed; it may put the catalog into order as well.
        """
        return None

    async def check_given(self, job: Job, given: Sequence[int]) -> None:
        """Judge the descriptors with which a client goes on with an interrupted job, before anything is changed."""
        if given and KINDS[job.kind].resumption is not Resumption.WITH_CLIENT:
            raise InvalidParameterValue(value=len(given), parameter="Descriptors", reason="this job needs none")
