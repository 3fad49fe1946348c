"""``ebsctl verify``: is what a snapshot or volume holds still what was written?"""

from __future__ import annotations

import contextlib
from typing import Any

import click

from ebsctl import render
from ebsctl.app import App, Command, Interruption, parse_rate
from ebsctl.lookup import complete_resource
from ebsctl.rollback import confirmed_rollback
from ebsctl.terminal import ProgressBar
from ebsd.domain.errors import ExitStatus, ProtocolError


@click.command(cls=Command, short_help="Read a snapshot or volume and compare it with its digests.")
@click.argument("resource", metavar="ID", shell_complete=complete_resource)
@click.option("--scrub", is_flag=True, help="Without its key: finds damage, but not what an attacker made to fit.")
@click.option(
    "--accept-rollback", is_flag=True, help="A snapshot restored from a backup: accept that it went back. Needs root."
)
@click.option("--yes", is_flag=True, help="With --accept-rollback: do not ask.")
@click.option("--rate", metavar="RATE", help="Read at most so many bytes per second, such as 50M; 0: no limit.")
@click.pass_obj
def verify(app: App, resource: str, scrub: bool, accept_rollback: bool, yes: bool, rate: str | None) -> int:
    """Read all of the snapshot or detached volume ID, and compare it with its digests.

    With its key: authenticity, as far as digests are signed. Without (--scrub, or when the key cannot be used):
    integrity only. The exit status is 7 when something is damaged; what was found is shown by `ebsctl show` too.
    Ctrl-C ends the command and not the verification, which is a job: see `ebsctl job`.

    \b
    Examples:
      ebsctl verify monday
      ebsctl verify monday --scrub --json
    """
    if accept_rollback:
        found = confirmed_rollback(app, resource, yes=yes)
        if found is None:
            return ExitStatus.FAILED
        if found.is_back:
            app.client.control("AcceptRollback", Resource=found.ident, Generation=found.generation)
    report = _follow(app, resource, scrub, parse_rate(rate))
    damaged = bool(report["Damage"])
    app.emit(report, render.report_text(report, for_people=app.for_people))
    if report["WithoutLeaf"]:
        app.note(f"note: {report['WithoutLeaf']} chunks have no digest yet and were only read: no snapshot sealed them")
    if report["HashedNow"]:
        app.note(f"note: {report['HashedNow']} chunks were hashed only now: damage before that cannot be seen")
    if damaged:
        # On standard error, as what fails is: with --json the report itself says it.
        app.note(f"error: {render.printable(report['ResourceId'])} is damaged")
    return ExitStatus.INTEGRITY if damaged else ExitStatus.DONE


def _follow(app: App, resource: str, scrub: bool, rate: int | None) -> dict[str, Any]:
    bar = ProgressBar(wanted=not app.as_json)
    last: dict[str, Any] = {}
    try:
        replies = app.client.control_stream("Verify", Resource=resource, Scrub=True if scrub else None, Rate=rate)
        with contextlib.closing(replies):
            for last in replies:
                bar.show(last["Done"], last["Total"])
    except KeyboardInterrupt:
        job = last.get("JobId")
        hint = f"The verification goes on; `ebsctl show {resource}` tells what it found when it has ended."
        if job:
            hint = (
                f"The verification goes on as {job}: `ebsctl job wait {job}` waits for it, `ebsctl job cancel {job}` "
                "ends it."
            )
        raise Interruption(hint) from None
    finally:
        bar.clear()
    report: dict[str, Any] | None = last.get("Report")
    if report is None:
        raise ProtocolError(reason="it stopped telling of the verification before its end")
    return report
