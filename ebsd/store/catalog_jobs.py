"""Jobs in the catalog."""

from __future__ import annotations

import json
from typing import Any

from ebsd.domain.errors import JobNotFound
from ebsd.domain.ids import AccountId, JobId, SnapshotId, parse_job_id
from ebsd.domain.model import Caller, Job
from ebsd.domain.states import JobKind, JobState
from ebsd.store.catalog_rows import Rows, json_column


class JobRows(Rows):
    """Rows of jobs."""

    def put_job(self, job: Job) -> None:
        self._rows(
            "INSERT OR REPLACE INTO job VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
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
        )

    def jobs(self, account: AccountId | None = None) -> list[Job]:
        """Return all jobs, or those of one account, oldest first."""
        where, args = ("", ()) if account is None else ("WHERE account=?", (account,))
        return [_job_from_row(row) for row in self._rows(f"SELECT * FROM job {where} ORDER BY started, id", *args)]

    def find_job(self, caller: Caller, ident: str) -> Job:
        """Return a job by its id; raises JobNotFound, also for another account's."""
        row = self._row("SELECT * FROM job WHERE id=?", parse_job_id(ident))
        if row is None or (row[1] != caller.account and not caller.is_admin):
            raise JobNotFound(job=ident)
        return _job_from_row(row)


def _job_from_row(row: tuple[Any, ...]) -> Job:
    ident, account, owner, kind, state, source, destination, total, done, done_through, started, ended, error = row
    return Job(
        id=JobId(ident),
        account=AccountId(account),
        owner=owner,
        kind=JobKind(kind),
        state=JobState(state),
        source=SnapshotId(source),
        destination=destination,
        total=total,
        done=done,
        done_through=done_through,
        started=started,
        ended=ended,
        error=None if error is None else json.loads(error),
    )
