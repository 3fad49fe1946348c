"""The recycle bin: what is in it, back out of it, and the rules."""

from __future__ import annotations

from typing import Any, Final

import click

from ebsctl import render
from ebsctl.app import App, Command, Group, UsageFailure
from ebsctl.lookup import SNAPSHOT, VOLUME, kind_of_id
from ebsctl.render import Document
from ebsd.domain.errors import EbsdError, ExitStatus

_LIST: Final = {VOLUME: ("ListVolumesInRecycleBin", "Volumes"), SNAPSHOT: ("ListSnapshotsInRecycleBin", "Snapshots")}
_NAMES: Final = {VOLUME: "VolumeIds", SNAPSHOT: "SnapshotIds"}
_RESTORE: Final = {
    VOLUME: ("RestoreVolumeFromRecycleBin", "VolumeId", "Volume"),
    SNAPSHOT: ("RestoreSnapshotFromRecycleBin", "SnapshotId", "Snapshot"),
}


def find_in_bin(app: App, name_or_id: str) -> tuple[str, Document]:
    """Return (kind, what the bin tells of it); raises the NotFound error of what was looked for last."""
    named = kind_of_id(name_or_id)
    kinds = [named] if named in (VOLUME, SNAPSHOT) else [VOLUME, SNAPSHOT]
    for at, kind in enumerate(kinds):
        method, answer = _LIST[kind]
        try:
            return kind, app.client.ec2(method, **{_NAMES[kind]: [name_or_id]})[answer][0]
        except EbsdError as error:
            if error.exit_status is not ExitStatus.NOT_FOUND or at == len(kinds) - 1:
                raise
    raise AssertionError("BUG: the last kind raises")


@click.command(cls=Command, short_help="Take a volume or snapshot out of the recycle bin.")
@click.argument("resource", metavar="ID")
@click.pass_obj
def undelete(app: App, resource: str) -> None:
    """Take the volume or snapshot ID out of the recycle bin, as it was, and print its id.

    It is named by its id or by the name that it had, and has that name again where nothing else has it now.
    """
    kind, binned = find_in_bin(app, resource)
    method, member, answer = _RESTORE[kind]
    found = app.client.ec2(method, **{member: binned[member]})[answer]
    app.emit(found, found[member])
    if found["Name"] != binned["Name"]:
        app.note(f"note: the name {render.printable(binned['Name'])} is in use; its name is its id")


@click.group("recycle-bin", cls=Group, short_help="The recycle bin: list, rules.")
def recycle_bin() -> None:
    """What was deleted and a rule keeps for a time. `ebsctl undelete ID` takes it out again.

    What is in it takes its space; `ebsctl delete ID --permanently` is an administrator's way to have that back.
    """


@recycle_bin.command("list", short_help="List what is in the recycle bin.")
@click.pass_obj
def list_content(app: App) -> None:
    """List what is in the recycle bin, and until when."""
    volumes, snapshots = app.client.binned("Volumes"), app.client.binned("Snapshots")
    rows = [
        render.binned_row(kind, item, for_people=app.for_people)
        for kind, items in ((VOLUME, volumes), (SNAPSHOT, snapshots))
        for item in items
    ]
    document = {"Volumes": volumes, "Snapshots": snapshots}
    app.emit(document, render.table(render.BINNED_HEADER, rows, for_people=app.for_people))
    if not rows and app.for_people:
        app.note("The recycle bin is empty.")


@recycle_bin.group("rule", cls=Group, short_help="Which deletions are kept: create, list, delete.")
def rule() -> None:
    """Rules: what your account deletes is kept by the rule that matches with the most days."""


def _choice(text: str) -> dict[str, str]:
    key, equals, value = text.partition("=")
    if not key:
        raise UsageFailure(f"{text!r} is no tag.", "Write KEY=VALUE, or KEY for any value.")
    return {"Key": key, "Value": value} if equals else {"Key": key}


@rule.command("create", short_help="Keep what is deleted from now on.")
@click.option("--type", "kind", type=click.Choice([VOLUME, SNAPSHOT]), required=True, help="What is kept.")
@click.option("--days", type=int, required=True, metavar="N", help="For so many days, 1 to 3650.")
@click.option("--tag", "tags", multiple=True, metavar="K[=V]", help="Only with this tag, or another one given.")
@click.option("--exclude-tag", "excluded", multiple=True, metavar="K[=V]", help="All but those with this tag.")
@click.option("--description", metavar="TEXT", help="What it is for.")
@click.pass_obj
def create(
    app: App, kind: str, days: int, tags: tuple[str, ...], excluded: tuple[str, ...], description: str | None
) -> None:
    """Keep volumes or snapshots that are deleted from now on in the recycle bin, and print the rule's id.

    \b
    Examples:
      ebsctl recycle-bin rule create --type snapshot --days 14
      ebsctl recycle-bin rule create --type volume --days 7 --exclude-tag scratch
    """
    made = app.client.control(
        "CreateRecycleBinRule",
        ResourceType=kind,
        RetentionDays=days,
        ResourceTags=[_choice(text) for text in tags] or None,
        ExcludeResourceTags=[_choice(text) for text in excluded] or None,
        Description=description,
    )["Rule"]
    app.emit(made, made["Identifier"])


@rule.command("list")
@click.pass_obj
def list_rules(app: App) -> None:
    """List your rules."""
    found: list[dict[str, Any]] = app.client.control("ListRecycleBinRules")["Rules"]
    rows = [render.rule_row(each) for each in found]
    app.emit({"Rules": found}, render.table(render.RULE_HEADER, rows, for_people=app.for_people))
    if not found and app.for_people:
        app.note("No rules: what is deleted is gone.")


@rule.command("delete")
@click.argument("ident", metavar="RULE")
@click.pass_obj
def delete(app: App, ident: str) -> None:
    """Delete RULE; what is in the recycle bin stays until its time."""
    app.client.control("DeleteRecycleBinRule", Identifier=ident)
    app.emit({"Identifier": ident})
