"""``ebsctl job``: list, show, wait, cancel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from ebsctl import render
from ebsctl.app import App, Group
from ebsctl.following import follow_job, job_failure
from ebsctl.lookup import complete_job, describe_job


def emit_jobs(app: App, filters: Sequence[Mapping[str, Any]] | None) -> None:
    """Print the caller's jobs that match."""
    jobs = app.client.control("DescribeJobs", Filters=filters)["Jobs"]
    rows = [render.job_row(job, for_people=app.for_people) for job in jobs]
    app.emit({"Jobs": jobs}, render.table(render.JOB_HEADER, rows, for_people=app.for_people))
    if not jobs and app.for_people:
        app.note("No job matches." if filters else "No jobs.")


def emit_job(app: App, job: render.Document) -> None:
    """Print the fields of one job."""
    app.emit(job, render.fields(render.job_fields(job, for_people=app.for_people), for_people=app.for_people))


@click.group(cls=Group, short_help="Jobs that re-encrypt data: list, show, wait, cancel.")
def job() -> None:
    """Jobs that re-encrypt data: copies of snapshots, and volumes made from snapshots, under another key.

    A job goes on when the command that asked for it is interrupted.
    """


@job.command("list")
@click.pass_obj
def list_jobs(app: App) -> None:
    """List your jobs, running and ended."""
    emit_jobs(app, None)


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


@job.command("cancel")
@click.argument("ident", metavar="JOB", shell_complete=complete_job)
@click.pass_obj
def cancel(app: App, ident: str) -> None:
    """End JOB and remove what it had made.

    A job that has ended already is left as it is, with exit status 4.
    """
    cancelled = app.client.control("CancelJob", JobId=ident)["Job"]
    app.emit(cancelled)
    app.note(f"note: {render.printable(cancelled['DestinationId'])}, which it was making, is removed")
