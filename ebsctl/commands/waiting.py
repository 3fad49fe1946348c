"""``ebsctl wait``: until a volume, snapshot or job has a state, or cannot come to it any more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

import click

from ebsctl import render
from ebsctl.app import App, Command, UsageFailure
from ebsctl.following import follow_job, job_failure
from ebsctl.lookup import DESCRIBE, ID_MEMBER, JOB, SNAPSHOT, VOLUME, complete_resource, identify, kind_of_id
from ebsctl.mounting import with_more_hint
from ebsctl.render import Document
from ebsd.domain.errors import EbsdError, IncorrectState, Timeout
from ebsd.domain.states import JobState

DELETED: Final = "deleted"

STATES: Final[dict[str, tuple[str, ...]]] = {
    VOLUME: ("available", "in-use", DELETED, "error"),
    SNAPSHOT: ("completed", "error"),
    JOB: ("completed", "failed", "cancelled"),
}
"""Kind -> the states one can wait for."""

DEAD_ENDS: Final[dict[tuple[str, str], frozenset[str]]] = {
    (VOLUME, "available"): frozenset(("deleting", DELETED, "error")),
    (VOLUME, "in-use"): frozenset(("deleting", DELETED, "error")),
    (VOLUME, DELETED): frozenset(),
    (VOLUME, "error"): frozenset(("deleting", DELETED)),
    (SNAPSHOT, "completed"): frozenset(("error", DELETED)),
    (SNAPSHOT, "error"): frozenset(("completed", DELETED)),
}
"""(kind, wanted state) -> the states that nothing leads out of by itself to the wanted one, as in EC2's waiters."""

NOT_FOUND: Final = frozenset(("InvalidVolume.NotFound", "InvalidSnapshot.NotFound", "InvalidID"))
"""Codes that say that something does not exist, but not that what one wrote cannot exist."""

FIRST_PAUSE: float = 0.2
LONGEST_PAUSE: float = 1.0
"""Seconds between two looks."""

LEAST_PATIENCE: Final = 1.0
"""Seconds that one look may take even when less than that is left."""


def pauses() -> Iterator[float]:
    """Yield the seconds to wait before each further look: from FIRST_PAUSE on, half as much more each time."""
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(pause * 1.5, LONGEST_PAUSE)


class _Patience:
    """How long one may wait for what."""

    def __init__(self, resource: str, wanted: str, seconds: float | None) -> None:
        self._what = f"Waiting for {resource} to be {wanted}"
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float | None:
        return None if self._end is None else self._end - time.monotonic()

    @property
    def for_one_call(self) -> float | None:
        left = self.left
        return None if left is None else max(left, LEAST_PATIENCE)

    def ended(self) -> Timeout:
        return Timeout(operation=self._what, seconds=f"{self._seconds:g}")


@click.command(cls=Command, short_help="Wait until a volume, snapshot or job is in a state.")
@click.argument("resource", metavar="ID", shell_complete=complete_resource)
@click.option(
    "--for",
    "wanted",
    required=True,
    metavar="STATE",
    type=click.Choice(list(dict.fromkeys(state for states in STATES.values() for state in states))),
    help="Volumes: available, in-use, deleted, error. Snapshots: completed, error. Jobs: completed, failed, cancelled.",
)
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Give up then, with exit status 8.")
@click.pass_obj
def wait(app: App, resource: str, wanted: str, timeout: float | None) -> None:
    """Wait until the volume, snapshot or job ID is in a state.

    When it comes to a state from which the wanted one cannot be reached any more, the exit status is 4. What
    does not exist is deleted.

    \b
    Examples:
      ebsctl wait monday --for completed
      ebsctl wait data --for available --timeout 60
    """
    if kind := kind_of_id(resource):
        _check_wanted(kind, wanted)
    patience = _Patience(resource, wanted, timeout)
    try:
        if kind == JOB:
            document = _await_job(app, resource, wanted, patience)
        else:
            document = _await_state(app, resource, wanted, patience)
    except Timeout as error:
        raise patience.ended() from error
    app.emit(document)


def _check_wanted(kind: str, wanted: str) -> None:
    if wanted not in STATES[kind]:
        raise UsageFailure(f"A {kind} is never {wanted}.", f"States of a {kind}: {', '.join(STATES[kind])}.")


def _await_job(app: App, job: str, wanted: str, patience: _Patience) -> Document:
    ended = follow_job(app, job, timeout=patience.for_one_call)
    if ended["State"] != wanted:
        reason = (ended.get("Error") or {}).get("Message")
        if ended["State"] == JobState.INTERRUPTED and (failure := job_failure(ended)):
            raise failure
        error = IncorrectState(reason=f"The job {job} has ended as {render.printable(ended['State'])}")
        raise with_more_hint(error, f"Its error: {reason}" if reason else "")
    return ended


def _await_state(app: App, resource: str, wanted: str, patience: _Patience) -> Document:
    """Look again and again; raises IncorrectState at a dead end, Timeout, and what the server says."""
    kind, ident, seen = None, resource, False
    for pause in pauses():
        client = app.impatient_client(patience.for_one_call)
        document: Document = {"State": DELETED}
        try:
            if kind is None:
                kind, ident = identify(client, resource)
                _check_wanted(kind, wanted)
            document = DESCRIBE[kind](client, ident)
            seen = True
        except EbsdError as error:
            # Whoever waits for anything else may have misspelled what was never there.
            if error.code not in NOT_FOUND or not (seen or wanted == DELETED):
                raise
        state = document["State"]
        if state == wanted:
            return document if state != DELETED else {ID_MEMBER[kind] if kind else "ResourceId": ident}
        if kind is not None and state in DEAD_ENDS[kind, wanted]:
            reason = f"{ident} is {render.printable(state)} and does not become {wanted} by itself"
            raise with_more_hint(IncorrectState(reason=reason), _why(document))
        left = patience.left
        if left is not None and left <= 0:
            raise patience.ended()
        time.sleep(pause if left is None else min(pause, left))
    raise AssertionError("BUG: there is always another pause")


def _why(document: Document) -> str:
    reason = document.get("StateReason") or document.get("StateMessage")
    return f"Its reason: {reason}" if reason else ""
