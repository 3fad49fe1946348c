"""Jobs in the catalog."""

from __future__ import annotations

import json
from typing import Any

from ebsd.domain.errors import JobNotFound
from ebsd.domain.ids import AccountId, JobId, parse_job_id
from ebsd.domain.limits import Counted
from ebsd.domain.model import Caller, Job
from ebsd.domain.states import ACTIVE_JOBS, JobKind, JobState
from ebsd.store.catalog_rows import Rows, json_column


class JobRows(Rows):
    """Rows of jobs."""

    def put_job(self, job: Job) -> None:
        present = self._row("SELECT state FROM job WHERE id=?", job.id)
        if job.state in ACTIVE_JOBS and (present is None or JobState(present[0]) not in ACTIVE_JOBS):
            self.note_growth(job.account, Counted.JOBS)
        self._rows(
            "INSERT OR REPLACE INTO job VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            job.id,
            job.account,
            job.owner,
            job.kind.value,
            job.state.value,
            job.source,
            job.destination,
            job.total,
            job.done,
            job.done_through,
            job.started,
            job.ended,
            None if job.error is None else json_column(job.error),
            job.rate,
            json_column(job.parameters),
            json_column(job.checkpoint),
        )

    def note_progress(self, job: Job) -> None:
        """Keep how far a job is, and nothing else of it: its limit may be changed meanwhile."""
        self._rows(
            "UPDATE job SET total=?, done=?, done_through=?, checkpoint=? WHERE id=?",
            job.total,
            job.done,
            job.done_through,
            json_column(job.checkpoint),
            job.id,
        )

    def set_job_rate(self, job: JobId, rate: int | None) -> None:
        self._rows("UPDATE job SET rate=? WHERE id=?", rate, job)

    def forget_ended_jobs(self, account: AccountId, keep: int) -> None:
        """Remove the ended jobs of an account, but for the ``keep`` that were started last."""
        active = ",".join("?" * len(ACTIVE_JOBS))
        self._rows(
            f"DELETE FROM job WHERE account=? AND state NOT IN ({active}) AND id NOT IN (SELECT id FROM job"
            f" WHERE account=? AND state NOT IN ({active}) ORDER BY started DESC, id DESC LIMIT ?)",
            account,
            *(state.value for state in ACTIVE_JOBS),
            account,
            *(state.value for state in ACTIVE_JOBS),
            keep,
        )

    def jobs(self, account: AccountId | None = None) -> list[Job]:
        """Return all jobs, or those of one account, oldest first."""
        where, args = ("", ()) if account is None else ("WHERE account=?", (account,))
        return [_job_from_row(row) for row in self._rows(f"SELECT * FROM job {where} ORDER BY started, id", *args)]

    def active_jobs(self) -> list[Job]:
        """Return the jobs of all accounts that have not ended, oldest first."""
        states = [state.value for state in ACTIVE_JOBS]
        query = f"SELECT * FROM job WHERE state IN ({','.join('?' * len(states))}) ORDER BY started, id"
        return [_job_from_row(row) for row in self._rows(query, *states)]

    def find_job(self, caller: Caller, ident: str) -> Job:
        """Return a job by its id; raises JobNotFound, also for another account's."""
        row = self._row("SELECT * FROM job WHERE id=?", parse_job_id(ident))
        if row is None or (row[1] != caller.account and not caller.is_admin):
            raise JobNotFound(job=ident)
        return _job_from_row(row)


def _job_from_row(row: tuple[Any, ...]) -> Job:
    ident, account, owner, kind, state, source, destination, total, done, done_through, *others = row
    started, ended, error, rate, parameters, checkpoint = others
    return Job(
        id=JobId(ident),
        account=AccountId(account),
        owner=owner,
        kind=JobKind(kind),
        state=JobState(state),
        source=source,
        destination=destination,
        total=total,
        done=done,
        done_through=done_through,
        started=started,
        ended=ended,
        error=None if error is None else json.loads(error),
        rate=rate,
        parameters=json.loads(parameters),
        checkpoint=json.loads(checkpoint),
    )
