"""Jobs: work that takes long, each in a worker process of its own, that survives a restart of ebsd.

What differs from kind to kind is a table (``domain/jobs.py``) and a ``JobWork`` (``control/job_work.py``, which says
how to add one). What is here is the same for all:

1. A worker dies with ebsd. The next ebsd starts another one from ``done_through``, which was committed only after
   the worker had made durable what lies below. A kind that needs a descriptor of its client is ``interrupted`` instead,
   and goes on when the client brings it.
2. A worker that dies by itself is started again, as often as it comes further than the one before.
3. Cancelling, and a final error, remove what the job has made. That it is cancelled is as final as an error.
4. What is committed of a running job is its progress only, so that its limit can be changed meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import trio

from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.describe import JOB_FILTERS, describe_job
from ebsd.control.host import Host
from ebsd.control.job_work import FINISH_DEADLINE, JobWork, Sessions, Worker, close_given
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.domain.errors import EbsdError, IncorrectState, JobCancelled, KeyServiceUnavailable, RemoteError
from ebsd.domain.filters import parse_filters, passes
from ebsd.domain.ids import JobId
from ebsd.domain.jobs import KEPT_ENDED, KINDS, JobView, Pace, Resumption, check_rate
from ebsd.domain.model import Caller, Job
from ebsd.domain.states import JobEvent, JobKind, JobState, next_job_state
from ebsd.ipc.channel import ChannelClosed
from ebsd.ipc.incidents import as_ebsd_error, host_failure, log_incident
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.2
RESTART_PAUSE: Final = (0.1, 1.0, 5.0)
"""Seconds before each further start of a worker, as long as none comes further than the one before."""

Prepare = Callable[[Callable[[], bool]], Awaitable[None]]
"""Makes what a job needs before its first worker; is told by the call whether the job was cancelled meanwhile."""


class _Running:
    """The in-memory side of a job that is at work."""

    def __init__(self, job: Job, given: Sequence[int] = ()) -> None:
        self.job = job
        self.given = list(given)
        """Descriptors of the client, kept until the end: a further worker needs them, too."""
        self.pace = Pace()
        self.changed = trio.Event()
        self.ended = trio.Event()
        self.scope = trio.CancelScope()
        self.cancelled = False

    def update(self, job: Job) -> None:
        self.job = job
        self.changed.set()
        self.changed = trio.Event()


class Jobs:
    """Starts, watches, limits, resumes and cancels jobs."""

    def __init__(
        self, host: Host, catalogue: Catalogue, broker: Broker, files: SnapshotFiles, nursery: trio.Nursery
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._broker = broker
        self._files = files
        self._nursery = nursery
        self._works: dict[JobKind, JobWork] = {}
        self._running: dict[JobId, _Running] = {}

    def register(self, *kinds: JobKind, work: JobWork) -> None:
        """Say who does the work of some kinds; before the first call of anything else."""
        for kind in kinds:
            self._works[kind] = work

    # --- start

    async def start(
        self,
        job: Job,
        intend: Callable[[Transaction], None],
        prepare: Prepare | None = None,
        given: Sequence[int] = (),
    ) -> Job:
        """Commit a new job together with what ``intend`` writes, prepare it, and set a worker to it.

        ``given``: descriptors of the client; taken over, whatever happens. After an error of ``prepare`` the job has
        failed, what it had made is removed, and the error is raised.
        """
        running = self._running[job.id] = _Running(job, given)  # it can be cancelled as soon as it can be seen

        def commit(t: Transaction) -> None:
            intend(t)
            t.put_job(job)

        try:
            check_rate(job.rate)
            await self._catalogue.run(commit)
        except BaseException:
            self._forget(running)
            raise
        try:
            if prepare is not None:
                await prepare(lambda: running.cancelled)
        except BaseException as exc:
            with trio.CancelScope(shield=True):
                await self._end(job, JobEvent.FAIL, exc if isinstance(exc, EbsdError) else None, running)
                self._forget(running)
            raise
        self._nursery.start_soon(self._work, running)
        return job

    async def recover(self) -> None:
        """Complete the jobs that had ended but for the catalog; at start, before temporary files are removed."""
        for job in await self._catalogue.run(lambda t: t.active_jobs()):
            try:
                answer = await self._works[job.kind].answer_left(job)
                if answer is not None:
                    log.warning("%s had ended when ebsd did", job.id)
                    await self._complete(_Running(job), answer)
            except (EbsdError, OSError) as exc:
                log.error("%s: %s", job.id, exc)

    async def resume_all(self) -> None:
        """Go on with the jobs that had not ended when ebsd did; called once at start."""
        for job in await self._catalogue.run(lambda t: t.active_jobs()):
            if not await self._works[job.kind].is_prepared(job):
                await self._end(job, JobEvent.FAIL, None)
            elif KINDS[job.kind].resumption is Resumption.BY_ITSELF:
                self._go_on(_Running(job))
            elif job.state is JobState.RUNNING:
                log.warning("%s waits for its client to go on from chunk %d", job.id, job.done_through)
                interrupted = _moved(job, JobEvent.INTERRUPT)
                await self._catalogue.run(lambda t, job=interrupted: t.put_job(job))  # type: ignore[misc]

    def _go_on(self, running: _Running) -> None:
        log.warning("%s goes on from chunk %d", running.job.id, running.job.done_through)
        self._running[running.job.id] = running
        self._nursery.start_soon(self._work, running)

    def _forget(self, running: _Running) -> None:
        """Let those who wait for the end of a job look at what the catalog says of it."""
        self._running.pop(running.job.id, None)
        running.ended.set()
        running.changed.set()
        given, running.given = running.given, []
        if given:
            # A thread of its own, that nobody waits for: the client may make closing take as long as he likes.
            self._nursery.start_soon(close_given, given)

    # --- work

    async def _work(self, running: _Running) -> None:
        job = running.job
        error: EbsdError | None = None
        try:
            with running.scope:
                await trio.lowlevel.checkpoint()  # it may have been cancelled while it was prepared
                await self._run_workers(running)
        except EbsdError as exc:
            error = exc
        except OSError as exc:
            error = host_failure(exc)
        except Exception as exc:  # noqa: BLE001 - a bug in one job must not end ebsd, and again at each start
            error = as_ebsd_error(exc, log_incident)
        if error is not None:
            log.error("%s failed: %s", job.id, error)
        with trio.CancelScope(shield=True):
            if running.job.state is JobState.COMPLETED:
                pass  # whatever came after that: others may use what it made
            elif running.cancelled:
                await self._end(running.job, JobEvent.CANCEL, JobCancelled(job=job.id), running)
            elif error is not None:
                await self._end(running.job, JobEvent.FAIL, error, running)
            elif running.scope.cancelled_caught:
                return  # ebsd ends; the next one goes on
            self._forget(running)

    async def _run_workers(self, running: _Running) -> None:
        """Run a worker to its end, and another one from where it had come to when it died, or the key service did."""
        attempts = 0
        while True:
            before = running.job.done_through
            try:
                return await self._run_worker(running)
            except EbsdError as exc:
                if not isinstance(exc, ChannelClosed) and exc.code != KeyServiceUnavailable.code:
                    raise
                attempts = 0 if running.job.done_through > before else attempts
                if attempts == len(RESTART_PAUSE):
                    raise
                log.error("%s: %s", running.job.id, exc)
            await trio.sleep(RESTART_PAUSE[attempts])
            attempts += 1
            log.warning("%s goes on from chunk %d", running.job.id, running.job.done_through)

    async def _run_worker(self, running: _Running) -> None:
        work = self._works[running.job.kind]
        async with work.around(running.job):
            await self._run_worker_of(work, running)

    async def _run_worker_of(self, work: JobWork, running: _Running) -> None:
        worker = Worker.begin(KINDS[running.job.kind].worker)
        sessions = Sessions(self._broker, self._files, running.job)
        try:
            await work.hand_over(running.job, worker, sessions, running.given, self._limit(running.job))
            await sessions.retire()  # the worker has its keys, and ebsd may end without an end of the job
            await self._follow(running, worker)
            answer = await worker.request("finish", {}, deadline=FINISH_DEADLINE)
            with trio.CancelScope(shield=True):
                await self._complete(running, answer)
        finally:
            with trio.CancelScope(shield=True):
                await worker.end()
                await sessions.retire()

    async def _follow(self, running: _Running, worker: Worker) -> None:
        """Keep what a worker says of its progress, until it is done; raises what it failed with."""
        committed = running.job.done_through
        while True:
            progress = await worker.request("progress", {"Rate": self._limit(running.job)})
            job = replace(
                running.job,
                total=progress["Total"],
                done=progress["Done"],
                done_through=progress["DoneThrough"],
                checkpoint=progress.get("Checkpoint", running.job.checkpoint),
            )
            running.pace.note(trio.current_time(), job.done)
            running.update(job)
            if progress["State"] == "failed":
                raise _failure(progress["Error"])
            if job.done_through > committed or progress["State"] == "done":
                await self._catalogue.run(lambda t, job=job: t.note_progress(job))  # type: ignore[misc]
                committed = job.done_through
            if progress["State"] == "done":
                return
            await trio.sleep(POLL_SECONDS)

    def _limit(self, job: Job) -> int:
        return self._host.job_rate if job.rate is None else job.rate

    # --- end

    async def _complete(self, running: _Running, answer: Mapping[str, Any]) -> None:
        job, work = running.job, self._works[running.job.kind]
        commit = await work.conclude(job, answer)

        def end(t: Transaction) -> Job:
            commit(t)
            return self._put_ended(t, running.job, JobEvent.COMPLETE, done=running.job.total)

        running.update(await self._catalogue.run(end))
        await work.concluded(job)
        log.info("%s completed: %s", job.id, job.destination or job.source)

    async def _end(self, job: Job, event: JobEvent, error: EbsdError | None, running: _Running | None = None) -> None:
        """Remove what the job has made and commit how it ended.

        What cannot be removed is left to the next start, where nothing says any more that a job fills it. The job has
        ended all the same: one that seems to run for ever could be neither waited for nor cancelled.
        """
        left = ""
        try:
            await self._works[job.kind].remove(job)
        except (EbsdError, OSError) as exc:
            log.error("%s: what it had made stays until the next start: %s", job.id, exc)
            left = f"{job.destination} could not be removed ({exc}); the next start of ebsd removes it."
            if error is None:
                error = exc if isinstance(exc, EbsdError) else host_failure(exc)
        members = None
        if error is not None:
            members = {"Code": error.code, "Message": error.message, "Hint": f"{error.hint} {left}".strip()}
        ended = await self._catalogue.run(lambda t: self._put_ended(t, job, event, error=members))
        if running is not None:
            running.update(ended)

    def _put_ended(self, t: Transaction, job: Job, event: JobEvent, **more: Any) -> Job:
        ended = replace(_moved(job, event), ended=self._host.now(), **more)
        t.put_job(ended)
        t.forget_ended_jobs(job.account, KEPT_ENDED)
        return ended

    # --- requests

    async def describe(
        self, caller: Caller, idents: Sequence[str] | None, filters: Sequence[Mapping[str, Any]] = ()
    ) -> list[JobView]:
        """Return the jobs of these ids, or all that the caller can see, that pass the filters; oldest first."""
        chosen = parse_filters(filters, JOB_FILTERS)

        def load(t: Transaction) -> list[Job]:
            if idents is not None:
                return [t.find_job(caller, ident) for ident in idents]
            return t.jobs(None if caller.is_admin else caller.account)

        views = [self._view(job) for job in await self._catalogue.run(load)]
        return [view for view in views if passes(describe_job(view), chosen)]

    def _view(self, job: Job) -> JobView:
        running = self._running.get(job.id)
        if running is None:
            return JobView(job, self._limit(job))
        job, pace = running.job, running.pace
        if job.state is not JobState.RUNNING:
            return JobView(job, self._limit(job))
        return JobView(job, self._limit(job), pace.rate, pace.seconds_left(job.total))

    async def watch(self, caller: Caller, ident: str) -> AsyncIterator[JobView]:
        """Yield the job now, at every change, and last when it has ended or waits for its client."""
        job = await self._catalogue.run(lambda t: t.find_job(caller, ident))
        running = self._running.get(job.id)
        while running is not None and not running.ended.is_set():
            changed = running.changed
            yield self._view(running.job)
            await changed.wait()
        yield self._view(await self._catalogue.run(lambda t: t.find_job(caller, ident)))

    async def cancel(self, caller: Caller, ident: str) -> JobView:
        """End a job that has not ended and remove what it made; returns when that is done.

        Raises IncorrectState for a job that had ended, also when it completed before it could be ended.
        """
        job = await self._catalogue.run(lambda t: t.find_job(caller, ident))
        running = self._running.get(job.id)
        if running is not None and job.is_active:
            running.cancelled = True
            running.scope.cancel()
            await running.ended.wait()
        elif job.state is JobState.INTERRUPTED:
            running = self._running[job.id] = _Running(job)
            running.cancelled = True
            try:
                await self._catalogue.run(lambda t: _still_interrupted(t, job))
                with trio.CancelScope(shield=True):
                    await self._end(job, JobEvent.CANCEL, JobCancelled(job=job.id), running)
            finally:
                self._forget(running)
        else:
            raise _is(job)
        ended = await self._catalogue.run(lambda t: t.find_job(caller, ident))
        if ended.state is JobState.COMPLETED or ended.is_active:
            raise _is(ended)
        return self._view(ended)

    async def limit(self, caller: Caller, ident: str, rate: int | None) -> JobView:
        """Change how fast a job may go, in bytes per second; 0: no limit, None: the configured one."""
        check_rate(rate)

        def change(t: Transaction) -> Job:
            job = t.find_job(caller, ident)
            if not job.is_active:
                raise _is(job)
            t.set_job_rate(job.id, rate)
            return replace(job, rate=rate)

        job = await self._catalogue.run(change)
        running = self._running.get(job.id)
        if running is not None:
            running.update(replace(running.job, rate=rate))  # its worker is told when it is asked next
        return self._view(job)

    async def resume(self, caller: Caller, ident: str, given: Sequence[int]) -> JobView:
        """Go on with an interrupted job; ``given``: the descriptors that it needs, taken over whatever happens.

        Raises IncorrectState for a job that is not interrupted, and what its kind says of the descriptors.
        """
        running: _Running | None = None
        try:
            job = await self._catalogue.run(lambda t: t.find_job(caller, ident))
            await self._works[job.kind].check_given(job, given)
            if job.id in self._running:
                raise _is(self._running[job.id].job)
            running = self._running[job.id] = _Running(_moved(job, JobEvent.RESUME), given)

            def go_on(t: Transaction) -> Job:
                running_again = _moved(_still_interrupted(t, job), JobEvent.RESUME)
                t.put_job(running_again)
                return running_again

            running.job = await self._catalogue.run(go_on)
        except BaseException:
            if running is None:
                self._nursery.start_soon(close_given, list(given))
            else:
                self._forget(running)
            raise
        self._go_on(running)
        return self._view(running.job)


def _moved(job: Job, event: JobEvent) -> Job:
    """Return the job after the event; raises IncorrectState when that cannot happen to it now."""
    return replace(job, state=next_job_state(job.id, job.state, event))


def _still_interrupted(t: Transaction, job: Job) -> Job:
    """Return the job as it is in the catalog; raises IncorrectState when somebody else was quicker."""
    (present,) = [each for each in t.active_jobs() if each.id == job.id] or [job]
    if present is job or present.state is not JobState.INTERRUPTED:
        raise IncorrectState(reason=f"The job {job.id} has gone on or ended meanwhile")
    return present


def _is(job: Job) -> IncorrectState:
    return IncorrectState(reason=f"The job {job.id} is {job.state.value}")


def _failure(members: dict[str, str]) -> EbsdError:
    return RemoteError(members["Code"], members["Message"], members.get("Hint", ""))
