"""Waiting for jobs: the progress of one on a terminal, and what its end means for the command.

A job belongs to ebsd and not to the command that asked for it: Ctrl-C, a timeout or a lost connection never
ends it.
"""

from __future__ import annotations

import contextlib
from typing import Any

from ebsctl.app import App, Interruption
from ebsctl.lookup import Found, describe
from ebsctl.mounting import with_more_hint
from ebsctl.render import Document
from ebsctl.terminal import ProgressBar
from ebsd.domain.errors import (
    DaemonUnreachable,
    EbsdError,
    ExitStatus,
    IncorrectState,
    JobCancelled,
    ProtocolError,
    RemoteError,
)
from ebsd.domain.states import JobState
from ebsd.domain.units import format_size


def follow_job(app: App, job: str, *, timeout: float | None = None) -> Document:
    """Wait until a job has ended, however it ends, or waits for its client, and return it.

    Raises Timeout, and Interruption for Ctrl-C.
    """
    client = app.client if timeout is None else app.impatient_client(timeout)
    bar = ProgressBar(wanted=not app.as_json)
    last: dict[str, Any] = {}
    try:
        with contextlib.closing(client.control_stream("WaitJob", JobId=job)) as replies:
            for reply in replies:
                last = reply["Job"]
                bar.show(last["Done"], last["Total"], last.get("BytesPerSecond"))
    except KeyboardInterrupt:
        raise Interruption(
            f"The job {job} goes on: `ebsctl job wait {job}` waits for it, `ebsctl job cancel {job}` ends it."
        ) from None
    except DaemonUnreachable as error:
        raise with_more_hint(error, f"`ebsctl job show {job}` then tells what became of the job.") from error.__cause__
    finally:
        bar.clear()
    if last["State"] == JobState.RUNNING:
        raise ProtocolError(reason=f"it stopped telling of {job} before its end")
    return last


def job_failure(job: Document) -> EbsdError | None:
    """Return the error of a job that has ended, None when it did what it was for."""
    if job["State"] == JobState.COMPLETED:
        return None
    failure: Document | None = job.get("Error")
    if failure is not None:
        return RemoteError(failure["Code"], failure["Message"], failure["Hint"])
    if job["State"] == JobState.INTERRUPTED:
        error = IncorrectState(reason=f"The job {job['JobId']} is interrupted: it needs its file again")
        error.hint = f"Repeat the command that began it, with --resume {job['JobId']}, or cancel it."
        return error
    if job["State"] == JobState.CANCELLED:
        return JobCancelled(job=job["JobId"])
    return RemoteError("InternalFailure", f"The job {job['JobId']} failed.")


def await_result(app: App, job: str, result: Found) -> Found:
    """Wait for the job that fills a new volume or snapshot, and return that as it is then.

    When the job fails, or is left alone, the error says what is known of the new resource.
    """
    app.note(f"note: {job} re-encrypts up to {format_size(result.document['SizeBytes'])}")
    try:
        ended = follow_job(app, job)
        if failure := job_failure(ended):
            raise failure
    except Interruption as interruption:
        raise Interruption(f"{interruption.hint} It fills {result.ident}.") from None
    except EbsdError as error:
        raise with_more_hint(error, what_is_left(app, result)) from error.__cause__
    return refreshed(app, result)


def refreshed(app: App, result: Found) -> Found:
    """Return a resource as it is now, or as it was where that cannot be learned: everything was done."""
    try:
        return describe(app, result.ident)
    except EbsdError:
        return result


def what_is_left(app: App, result: Found) -> str:
    """Return a sentence on a new resource after a failure; nothing here ever deletes it."""
    kind, ident = result.kind, result.ident
    try:
        found = describe(app, ident)
    except EbsdError as error:
        if error.exit_status is ExitStatus.NOT_FOUND:
            return f"The new {kind} {ident} is gone."
        return f"`ebsctl show {ident}` tells what became of the new {kind}."
    state = found.document["State"]
    return f"The new {kind} {ident} stays, in state {state}; `ebsctl delete {ident}` removes it."


def note_running(app: App, job: str, result: Found) -> None:
    """Tell of a job that the command does not wait for."""
    state = result.document["State"]
    app.note(f"note: {result.ident} is {state} until {job} has ended: ebsctl job wait {job}")
