"""Commands on the deletion of a key: schedule it, once what is lost with the key was told, and cancel it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from ebsctl import render, terminal
from ebsctl.app import App
from ebsctl.commands.keys import describe_key, key, key_reference
from ebsctl.render import Document
from ebsd.domain.errors import ExitStatus, KeyStillUsed, KmsValidation
from ebsd.domain.ids import looks_like_volume_id
from ebsd.domain.states import ACTIVE_JOBS

MIN_WINDOW, MAX_WINDOW = 7, 30
"""Days; the key service has the last word."""
MAX_SHOWN = 100
"""Volumes and snapshots that are named before a deletion is scheduled."""
MAX_NAMED = 10
"""Of these in one error message."""


@key.command("schedule-deletion", short_help="Delete KEY after a waiting period.")
@click.argument("reference", metavar="KEY")
@click.option("--days", type=int, metavar="N", help="Delete it in N days, 7 to 30; 30 without it.")
@click.option("--yes", is_flag=True, help="Do not ask, and accept that what the key encrypts is lost.")
@click.pass_obj
def schedule_deletion(app: App, reference: str, days: int | None, yes: bool) -> int:
    """Delete KEY after a waiting period, and print when. It is unusable at once.

    First all volumes and snapshots are named that nobody can read without KEY; while there are any, it takes a
    confirmation. Attached volumes go on until they are detached. Until the date `ebsctl key cancel-deletion` keeps
    the key; afterwards only a backup of the keys from before has it.

    \b
    Examples:
      ebsctl key schedule-deletion old --days 7
      ebsctl key schedule-deletion old --yes
    """
    if days is not None and not MIN_WINDOW <= days <= MAX_WINDOW:  # before a question whose answer would not count
        raise KmsValidation(reason=f"PendingWindowInDays must be between {MIN_WINDOW} and {MAX_WINDOW}")
    metadata = describe_key(app, reference)
    # By ARN: between the question and the answer an alias may have got another target.
    arn = metadata["Arn"]
    lost, total = [], 0
    if metadata["KeyState"] != "PendingDeletion":  # nothing is to be asked then: the key service refuses it
        found = app.client.key_service("ListKeyResources", KeyId=arn)
        lost, total = found["Resources"], found["Total"]
    if lost:
        lines = _told(app, lost)
        app.note(f"Without {arn} nobody can read:")
        for line in [*lines[:MAX_SHOWN], *_more(total, len(lines[:MAX_SHOWN]))]:
            app.note(f"  {line}")
        if not yes and not terminal.is_interactive():
            raise KeyStillUsed(key=arn, what=", ".join([*lines[:MAX_NAMED], *_more(total, len(lines[:MAX_NAMED]))]))
        if not yes and not terminal.confirm(f"Delete the key, and with it the data of these {total}?"):
            app.report("Ebsd.NotConfirmed", "It was not confirmed; the key stays.", "")
            return ExitStatus.FAILED
    reply = app.client.kms(
        "ScheduleKeyDeletion", KeyId=arn, PendingWindowInDays=days, AcceptDataLoss=True if lost else None
    )
    app.emit(reply, reply["DeletionDate"])
    app.note(f"note: until then: ebsctl key cancel-deletion {metadata['KeyId']}")
    return ExitStatus.DONE


def _told(app: App, lost: Sequence[Document]) -> list[str]:
    """Return a line for each: id, name and state where this user may see them, and the job that works on it."""
    known: dict[str, Document] = {}
    if any(looks_like_volume_id(item["ResourceId"]) for item in lost):
        known |= {item["VolumeId"]: item for item in app.client.volumes()}
    if not all(looks_like_volume_id(item["ResourceId"]) for item in lost):
        known |= {item["SnapshotId"]: item for item in app.client.snapshots()}
    jobs = [job for job in app.client.control("DescribeJobs")["Jobs"] if job["State"] in ACTIVE_JOBS]
    return [_line(item, known.get(item["ResourceId"]), jobs) for item in lost]


def _line(item: Document, described: Document | None, jobs: Sequence[Mapping[str, str]]) -> str:
    ident = item["ResourceId"]
    words = [ident]
    if described is None:
        words.append(f"of account {item['OwnerId']}")
    else:
        words += [render.printable(described["Name"]), described["State"]]
    words += [job["JobId"] for job in jobs if ident in (job["SourceId"], job["DestinationId"])]
    return " ".join(words)


def _more(total: int, shown: int) -> list[str]:
    return [f"and {total - shown} more"] if total > shown else []


@key.command("cancel-deletion", short_help="Keep KEY, whose deletion was scheduled.")
@click.argument("reference", metavar="KEY")
@click.pass_obj
def cancel_deletion(app: App, reference: str) -> None:
    """Keep KEY, whose deletion was scheduled. It is disabled then: `ebsctl key enable` makes it usable."""
    reply = app.client.kms("CancelKeyDeletion", KeyId=key_reference(reference))
    app.emit(reply)
    app.note(f"note: the key is disabled; to use it again: ebsctl key enable {render.printable(reference)}")
