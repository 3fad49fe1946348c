"""``ebsctl job``: list, show, wait, limit, cancel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from ebsctl import render
from ebsctl.app import App, Group, parse_rate
from ebsctl.commands.resources import parse_filters
from ebsctl.following import follow_job, job_failure
from ebsctl.lookup import complete_job, describe_job
from ebsd.domain.states import ACTIVE_JOBS


def emit_jobs(app: App, filters: Sequence[Mapping[str, Any]] | None) -> None:
    """Print the caller's jobs that match."""
    jobs = sorted(app.client.control("DescribeJobs", Filters=filters)["Jobs"], key=_order)
    rows = [render.job_row(job, for_people=app.for_people) for job in jobs]
    app.emit({"Jobs": jobs}, render.table(render.JOB_HEADER, rows, for_people=app.for_people))
    if not jobs and app.for_people:
        app.note("No job matches." if filters else "No jobs.")


def _order(job: render.Document) -> tuple[bool, str]:
    """Jobs that have not ended first; of these the oldest first, of the others the one that ended last."""
    active = job["State"] in ACTIVE_JOBS
    return (False, job["StartTime"]) if active else (True, _reversed(job.get("EndTime") or ""))


def _reversed(time: str) -> str:
    """Return a text that sorts the other way round."""
    return "".join(chr(0x7F - ord(character)) for character in time)


def emit_job(app: App, job: render.Document) -> None:
    """Print the fields of one job."""
    app.emit(job, render.fields(render.job_fields(job, for_people=app.for_people), for_people=app.for_people))


@click.group(cls=Group, short_help="Jobs, which re-encrypt and verify data: list, show, wait, limit, cancel.")
def job() -> None:
    """Jobs: what takes long, such as copies of snapshots, and volumes made from snapshots, under another key.

    A job goes on when the command that asked for it is interrupted, when ebsd is started again, and after a reboot.
    """


@job.command("list")
@click.option("--active", is_flag=True, help="Only jobs that have not ended.")
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="K=V",
    help="Only what matches, such as state=failed or kind=copy-snapshot; may be repeated.",
)
@click.pass_obj
def list_jobs(app: App, active: bool, filters: tuple[str, ...]) -> None:
    """List your jobs: first those that have not ended, then the latest. The last 500 ended ones are kept."""
    wanted = [*filters, *(f"state={state.value}" for state in sorted(ACTIVE_JOBS) if active)]
    emit_jobs(app, parse_filters(wanted))


@job.command("show")
@click.argument("ident", metavar="JOB", shell_complete=complete_job)
@click.pass_obj
def show(app: App, ident: str) -> None:
    """Show JOB."""
    emit_job(app, describe_job(app.client, ident))


@job.command("wait", short_help="Wait until JOB has ended.")
@click.argument("ident", metavar="JOB", shell_complete=complete_job)
@click.pass_obj
def wait(app: App, ident: str) -> None:
    """Wait until JOB has ended; the exit status is that of its error when it failed.

    Ctrl-C ends the waiting and not the job.
    """
    ended = follow_job(app, ident)
    if failure := job_failure(ended):
        raise failure
    app.emit(ended)


@job.command("limit", short_help="Change how fast JOB may go.")
@click.argument("ident", metavar="JOB", shell_complete=complete_job)
@click.argument("rate", metavar="RATE")
@click.pass_obj
def limit(app: App, ident: str, rate: str) -> None:
    """Let JOB do at most RATE bytes per second from now on, such as 50M; 0: no limit.

    It holds at once, and stays when ebsd is started again. `default` takes the limit that is configured (jobs.rate).
    """
    wanted = None if rate == "default" else parse_rate(rate)
    app.emit(app.client.control("LimitJob", JobId=ident, Rate=wanted)["Job"])


@job.command("cancel")
@click.argument("ident", metavar="JOB", shell_complete=complete_job)
@click.pass_obj
def cancel(app: App, ident: str) -> None:
    """End JOB and remove what it had made.

    A job that has ended already is left as it is, with exit status 4.
    """
    cancelled = app.client.control("CancelJob", JobId=ident)["Job"]
    app.emit(cancelled)
    if cancelled["DestinationId"]:
        app.note(f"note: {render.printable(cancelled['DestinationId'])}, which it was making, is removed")
