"""Locks of snapshots: lock, unlock, and their list."""

from __future__ import annotations

from typing import Any

import click

from ebsctl import render
from ebsctl.app import App, Command, UsageFailure
from ebsctl.lookup import complete_snapshot, describe_snapshot
from ebsctl.render import Document
from ebsctl.terminal import confirm, is_interactive
from ebsd.domain.errors import ExitStatus
from ebsd.domain.locks import COMPLIANCE, GOVERNANCE


@click.command(cls=Command, short_help="Lock a snapshot, so that it cannot be deleted.")
@click.argument("snapshot", shell_complete=complete_snapshot)
@click.option(
    "--mode",
    type=click.Choice([GOVERNANCE, COMPLIANCE]),
    default=GOVERNANCE,
    show_default=True,
    help="governance: an administrator can unlock it. compliance: nobody can, after the cooling-off period.",
)
@click.option("--days", type=int, metavar="N", help="For so many days, 1 to 36500.")
@click.option("--until", metavar="TIME", help="Until then, such as 2027-01-31 or 2027-01-31T12:00:00Z (UTC).")
@click.option(
    "--cool-off", type=int, metavar="HOURS", help="In compliance mode: time in which it can still be unlocked, 1 to 72."
)
@click.option("--yes", is_flag=True, help="Do not ask; needed for compliance where there is no terminal.")
@click.pass_obj
def lock(
    app: App, snapshot: str, mode: str, days: int | None, until: str | None, cool_off: int | None, yes: bool
) -> int:
    """Lock SNAPSHOT for a time, in which nobody can delete it, and print what the lock is.

    On a locked snapshot it changes the lock. A lock can always be made longer; making it shorter takes what unlocking
    takes. In compliance mode not even an administrator can take it back, so the command asks.

    \b
    Examples:
      ebsctl lock monday --days 30
      ebsctl lock monday --mode compliance --until 2030-01-01 --cool-off 24
    """
    if (days is None) == (until is None):
        raise UsageFailure("Give --days or --until.", "ebsctl lock SNAPSHOT --days 30")
    if mode == COMPLIANCE and not yes:
        if not is_interactive():
            raise UsageFailure("A compliance lock needs a confirmation, and there is no terminal.", "Add --yes.")
        found = describe_snapshot(app.client, snapshot)
        after = "" if cool_off is None else f" after {cool_off} hours"
        if not confirm(f"Lock {found['SnapshotId']}, so that{after} nobody can delete it before the lock ends?"):
            app.report("Ebsd.NotConfirmed", "It was not confirmed; nothing was locked.", "")
            return ExitStatus.FAILED
        snapshot = found["SnapshotId"]
    made = app.client.ec2(
        "LockSnapshot",
        SnapshotId=snapshot,
        LockMode=mode,
        LockDuration=days,
        ExpirationDate=until,
        CoolOffPeriod=cool_off,
    )
    app.emit(made, render.fields(render.lock_fields(made), for_people=app.for_people))
    return ExitStatus.DONE


@click.command(cls=Command, short_help="Unlock a snapshot.")
@click.argument("snapshot", shell_complete=complete_snapshot)
@click.pass_obj
def unlock(app: App, snapshot: str) -> None:
    """Unlock SNAPSHOT: in governance mode as an administrator, in compliance mode while it cools off.

    The key service is unlocked by `ebsctl key unlock`.
    """
    app.emit(app.client.ec2("UnlockSnapshot", SnapshotId=snapshot))


def emit_locks(app: App, filters: list[dict[str, Any]] | None) -> None:
    """Print the locks of the caller's snapshots that match."""
    found: list[Document] = app.client.locks(Filters=filters)
    rows = [render.lock_row(each) for each in found]
    app.emit({"Snapshots": found}, render.table(render.LOCK_HEADER, rows, for_people=app.for_people))
    if not found and app.for_people:
        app.note("No lock matches." if filters else "No snapshot is locked: ebsctl lock SNAPSHOT --days 30")
