"""Commands on what exists, whatever it is: list, show, delete, rename, tag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ebsctl import render
from ebsctl.app import App, Command, UsageFailure
from ebsctl.boot import end_at_boot
from ebsctl.lookup import ID_MEMBER, JOB, VOLUME, Found, complete_resource, describe, kind_of_id
from ebsctl.render import Document
from ebsctl.terminal import confirm, is_interactive
from ebsd.domain.errors import EbsdError, ExitStatus, InvalidParameterValue, InvalidTag
from ebsd.domain.tags import check_tag, parse_tag
from ebsd.domain.units import format_size

# --- list and show ----------------------------------------------------------------------------------------


def parse_filters(texts: Sequence[str]) -> list[dict[str, Any]] | None:
    """Read NAME=VALUE texts as EC2's filters: values of one name are alternatives, all names must match."""
    values: dict[str, list[str]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidParameterValue(value=text, parameter="--filter", reason="write it as NAME=VALUE")
        values.setdefault(name, []).append(value)
    return [{"Name": name, "Values": found} for name, found in values.items()] or None


@click.command("list", cls=Command, short_help="List volumes, snapshots, keys, jobs, locks.")
@click.argument(
    "kind", type=click.Choice(["volumes", "snapshots", "keys", "jobs", "locks", "modifications"]), default="volumes"
)
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="K=V",
    help="Only what matches; may be repeated. EC2's filters, such as status=available, tag:env=lab or 'name=db-*' "
    "(* and ? as in EC2); a wrong one is answered with those that there are. Keys: a member of KeyMetadata, such as "
    "KeyState=Enabled.",
)
@click.option("--owner", "owners", multiple=True, metavar="USER", help="Snapshots of this user, or self; repeat.")
@click.option(
    "--restorable-by",
    multiple=True,
    metavar="USER",
    help="Snapshots that this user may use, or self; public ones with all; repeat.",
)
@click.pass_obj
def list_resources(
    app: App, kind: str, filters: tuple[str, ...], owners: tuple[str, ...], restorable_by: tuple[str, ...]
) -> None:
    """List your volumes, snapshots, keys, jobs or locks of snapshots, or the latest growth of each volume.

    Snapshots that are shared with you by name are listed, too.

    \b
    Examples:
      ebsctl list
      ebsctl list --filter status=available --filter tag:env=lab
      ebsctl list snapshots --filter volume-id=vol-0123456789abcdef0
      ebsctl list snapshots --owner alice
      ebsctl list keys --json
    """
    wanted = parse_filters(filters)
    if kind != "snapshots" and (owners or restorable_by):
        raise UsageFailure("--owner and --restorable-by are about snapshots.", "Write: ebsctl list snapshots ...")
    if kind == "keys":
        from ebsctl.commands.keys import emit_keys

        emit_keys(app, wanted)
    elif kind == "jobs":
        from ebsctl.commands.jobs import emit_jobs

        emit_jobs(app, wanted)
    elif kind == "locks":
        from ebsctl.commands.locks import emit_locks

        emit_locks(app, wanted)
    elif kind == "modifications":
        _list_modifications(app, wanted)
    elif kind == "snapshots":
        _list_snapshots(
            app, wanted, OwnerIds=_accounts(owners) or None, RestorableByUserIds=_accounts(restorable_by) or None
        )
    else:
        _list_volumes(app, wanted)


def _list_volumes(app: App, filters: list[dict[str, Any]] | None) -> None:
    volumes: list[Document] = app.client.volumes(Filters=filters)
    rows = [render.volume_row(volume, for_people=app.for_people) for volume in volumes]
    app.emit({"Volumes": volumes}, render.table(render.VOLUME_HEADER, rows, for_people=app.for_people))
    if not volumes and app.for_people:
        app.note("No volume matches." if filters else "No volumes yet: ebsctl create NAME --size 10G")


def _accounts(users: Sequence[str]) -> list[str]:
    from ebsctl.commands.sharing import account_of

    return [user if user in ("self", "all") else account_of(user) for user in users]


def _list_snapshots(app: App, filters: list[dict[str, Any]] | None, **scope: list[str] | None) -> None:
    snapshots: list[Document] = app.client.snapshots(Filters=filters, **scope)
    rows = [render.snapshot_row(snapshot, for_people=app.for_people) for snapshot in snapshots]
    app.emit({"Snapshots": snapshots}, render.table(render.SNAPSHOT_HEADER, rows, for_people=app.for_people))
    if not snapshots and app.for_people:
        narrowed = filters or any(scope.values())
        app.note("No snapshot matches." if narrowed else "No snapshots yet: ebsctl snapshot VOLUME")


def _list_modifications(app: App, filters: list[dict[str, Any]] | None) -> None:
    found: list[Document] = app.client.modifications(Filters=filters)
    rows = [render.modification_row(each, for_people=app.for_people) for each in found]
    app.emit({"VolumesModifications": found}, render.table(render.MODIFICATION_HEADER, rows, for_people=app.for_people))
    if not found and app.for_people:
        app.note("No modification matches." if filters else "No volume was ever grown.")


@click.command(cls=Command)
@click.argument("resource", metavar="ID", shell_complete=complete_resource)
@click.pass_obj
def show(app: App, resource: str) -> None:
    """Show the volume, snapshot, key or job that ID names.

    A key is named by its id, its ARN or alias/NAME, a job by its id; anything else names a volume or snapshot.
    """
    from ebsctl.commands.keys import emit_key, names_a_key

    if names_a_key(resource):
        emit_key(app, resource)
        return
    found = describe(app, resource)
    if found.kind == JOB:
        from ebsctl.commands.jobs import emit_job

        emit_job(app, found.document)
        return
    fields_of = render.volume_fields if found.kind == VOLUME else render.snapshot_fields
    pairs = fields_of(found.document, for_people=app.for_people)
    app.emit(found.document, render.fields(pairs, for_people=app.for_people))


# --- delete, rename, tag ----------------------------------------------------------------------------------


def _refuse_job(resource: str) -> None:
    if kind_of_id(resource) == JOB:
        raise UsageFailure("A job cannot be deleted, renamed or tagged.", f"`ebsctl job cancel {resource}` ends it.")


@click.command(cls=Command, short_help="Delete a volume or snapshot.")
@click.argument("resource", metavar="ID", shell_complete=complete_resource)
@click.option("--yes", is_flag=True, help="Do not ask; needed where there is no terminal.")
@click.option("--permanently", is_flag=True, help="Not into the recycle bin, or out of it; for administrators.")
@click.pass_obj
def delete(app: App, resource: str, yes: bool, permanently: bool) -> int:
    """Delete the volume or snapshot ID; its data cannot be recovered, unless a rule of the recycle bin keeps it.

    Volumes made from a snapshot, and snapshots of a volume, stay complete. A volume that was attached with --persist is
    attached at boot no more, also when it comes back from the recycle bin.
    """
    _refuse_job(resource)
    if not yes and not is_interactive():
        raise UsageFailure("Deleting needs a confirmation, and there is no terminal to ask on.", "Add --yes.")
    found = _find_for_deletion(app, resource) if permanently else describe(app, resource)
    if not yes and not confirm(_question(found)):
        app.report("Ebsd.NotConfirmed", "It was not confirmed; nothing was deleted.", "")
        return ExitStatus.FAILED
    # By id: between the question and now something else may have got the name.
    members: dict[str, Any] = {ID_MEMBER[found.kind]: found.ident}
    action = "DeleteVolume" if found.kind == VOLUME else "DeleteSnapshot"
    reply = app.client.ec2(action, **members, Permanently=True if permanently else None)
    if found.kind == VOLUME:
        end_at_boot(app, found.ident)
    if reply.get("InRecycleBin"):
        members["InRecycleBin"] = True
        app.note(f"note: it is in the recycle bin; to have it back: ebsctl undelete {found.ident}")
    app.emit(members)
    return ExitStatus.DONE


def _find_for_deletion(app: App, resource: str) -> Found:
    """Return what a name or id means, in the recycle bin too; of the two NotFound errors the first."""
    from ebsctl.commands.recyclebin import find_in_bin

    try:
        return describe(app, resource)
    except EbsdError as error:
        if error.exit_status is not ExitStatus.NOT_FOUND:
            raise
        try:
            return Found(*find_in_bin(app, resource))
        except EbsdError:
            raise error from None


def _question(found: Found) -> str:
    name, size = render.printable(found.document["Name"]), format_size(found.document["SizeBytes"])
    return f"Delete {found.kind} {name} ({found.ident}, {size})? Its data cannot be recovered."


@click.command(cls=Command, short_help="Give a volume or snapshot a new name.")
@click.argument("resource", metavar="ID", shell_complete=complete_resource)
@click.argument("name")
@click.pass_obj
def rename(app: App, resource: str, name: str) -> None:
    """Give the volume or snapshot ID the new name NAME; its id stays."""
    _refuse_job(resource)
    renamed = app.client.control("Rename", Resource=resource, Name=name)["ResourceId"]
    if app.as_json:
        app.emit(describe(app, renamed).document)


@click.command(cls=Command, short_help="Set and remove tags of a volume or snapshot.")
@click.argument("resource", metavar="ID", shell_complete=complete_resource)
@click.argument("changes", metavar="K=V|K-...", nargs=-1, required=True)
@click.pass_obj
def tag(app: App, resource: str, changes: tuple[str, ...]) -> None:
    """Set (K=V) and remove (K-) tags of the volume or snapshot ID.

    \b
    Examples:
      ebsctl tag data env=lab owner=alice
      ebsctl tag data env-
    """
    _refuse_job(resource)
    added, removed = parse_tag_changes(changes)
    resource_id = app.client.control("Identify", Resource=resource)["ResourceId"]
    if removed:
        app.client.ec2("DeleteTags", Resources=[resource_id], Tags=[{"Key": key} for key in removed])
    if added:
        tags = [{"Key": key, "Value": value} for key, value in added.items()]
        app.client.ec2("CreateTags", Resources=[resource_id], Tags=tags)
    if app.as_json:
        app.emit(describe(app, resource_id).document)


def parse_tag_changes(texts: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return (tags to set, keys to remove); raises InvalidTag, also for a key that comes twice."""
    added: dict[str, str] = {}
    removed: list[str] = []
    for text in texts:
        if "=" not in text and text.endswith("-"):
            key = text.removesuffix("-")
            check_tag(key, "")
        else:
            key, value = parse_tag(text)
        if key in added or key in removed:
            raise InvalidTag(tag=key, reason="it is given twice")
        if "=" in text:
            added[key] = value
        else:
            removed.append(key)
    return added, removed
