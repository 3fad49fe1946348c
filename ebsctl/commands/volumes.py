"""Commands on volumes: create, attach, detach, list, show, delete, rename, tag."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ebsctl import render
from ebsctl.app import App, Command, UsageFailure, parse_pairs
from ebsctl.mounting import (
    FILE_SYSTEMS,
    is_mount_point,
    mkfs_command,
    mount_command,
    mounts_to_end,
    with_more_hint,
)
from ebsctl.render import Document, first_attachment
from ebsctl.terminal import confirm, is_interactive
from ebsd.domain.errors import (
    AttachFailed,
    CommandFailed,
    EbsdError,
    ExitStatus,
    IncorrectState,
    InvalidParameterValue,
    InvalidTag,
    NeedsRoot,
    NotBlank,
    VolumeNotFound,
)
from ebsd.domain.tags import check_tag, parse_tag
from ebsd.domain.units import check_volume_size, format_size, parse_size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMPLETION_SECONDS = 0.2
"""Longest wait for ebsd while a shell completes a word."""


def complete_volume(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names and, after ``vol-``, the ids of volumes; nothing when ebsd does not answer."""
    from click.shell_completion import CompletionItem

    app = ctx.ensure_object(App)
    app.socket = ctx.find_root().params.get("socket")
    try:
        volumes = app.impatient_client(COMPLETION_SECONDS).ec2("DescribeVolumes")["Volumes"]
    except EbsdError:
        return []
    member = "VolumeId" if incomplete.startswith("vol-") else "Name"
    return [CompletionItem(volume[member]) for volume in volumes if volume[member].startswith(incomplete)]


def describe(app: App, volume: str) -> Document:
    """Return the Volume of a name or id; raises VolumeNotFound."""
    volumes: list[Document] = app.client.ec2("DescribeVolumes", VolumeIds=[volume])["Volumes"]
    if not volumes:
        raise VolumeNotFound(volume=volume)
    return volumes[0]


# --- create -----------------------------------------------------------------------------------------------


@click.command(cls=Command)
@click.argument("name")
@click.option("--size", required=True, metavar="SIZE", help="Such as 10G or 512M (powers of 1024), or bytes.")
@click.option(
    "--encrypted/--no-encrypted",
    default=None,
    help="Encrypt, or do not, instead of what `ebsctl defaults show` says. As in EBS, --no-encrypted does "
    "not overrule encryption by default.",
)
@click.option("--key", metavar="KEY", help="Encrypt under this key; needs --encrypted.")
@click.option("--tag", "tags", multiple=True, metavar="K=V", help="Add a tag; may be repeated.")
@click.option(
    "--context",
    "context_pairs",
    multiple=True,
    metavar="K=V",
    help="Add a pair to the encryption context of the data key; may be repeated. Not secret.",
)
@click.pass_obj
def create(
    app: App,
    name: str,
    size: str,
    encrypted: bool | None,
    key: str | None,
    tags: tuple[str, ...],
    context_pairs: tuple[str, ...],
) -> None:
    """Create the volume NAME and print its id.

    The volume is thin: it takes space as it is written. Attach it to use it.

    \b
    Examples:
      ebsctl create data --size 10G
      ebsctl create data --size 10G --encrypted --key backup --tag env=lab
    """
    size_bytes = check_volume_size(parse_size(size))
    pairs = parse_pairs("--tag", tags)
    for tag_key, value in pairs.items():
        check_tag(tag_key, value)
    reply = app.client.ec2(
        "CreateVolume",
        Name=name,
        SizeBytes=size_bytes,
        Encrypted=encrypted,
        KmsKeyId=key,
        EncryptionContext=parse_pairs("--context", context_pairs) or None,
        Tags=[{"Key": k, "Value": v} for k, v in pairs.items()] or None,
    )
    volume = reply["Volume"]
    app.emit(volume, volume["VolumeId"])
    if reply.get("Note"):
        app.note(f"note: {render.printable(reply['Note'])}")
    if volume["Encrypted"] and not app.as_json:
        _advise_backup(app)


def _advise_backup(app: App) -> None:
    """With the first volume, say that its data need the keys; only to those who can back them up."""
    try:
        first = app.impatient_client(2).control("GetStatus")["Volumes"] == 1
    except EbsdError:
        return  # the volume is made; advice is not worth an error
    if first and app.is_administrator():
        app.note("hint: without its keys this volume cannot be read: back up your keys: ebsctl key backup FILE")


# --- attach -----------------------------------------------------------------------------------------------


class _Undo:
    """What a command did to the host, to be taken back in reverse when a later step fails."""

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[[], object], str, str]] = []

    def add(self, step: Callable[[], object], *, undone: str = "", left: str) -> None:
        """Note how to take something back, and what to say when that was done, and when it cannot be done."""
        self._steps.append((step, undone, left))

    def run(self) -> str:
        """Take everything back and return what to tell the user about it; the first failure ends it."""
        told = []
        while self._steps:
            step, undone, left = self._steps.pop()
            try:
                step()
            except (EbsdError, OSError) as error:
                reason = error.message if isinstance(error, EbsdError) else f"{error.strerror}."
                return f"Undoing failed, {left}: {reason}"
            if undone:
                told.append(undone)
        return " ".join(told)


@click.command(cls=Command)
@click.argument("volume", shell_complete=complete_volume)
@click.option("--read-only", is_flag=True, help="Nothing can be written; the volume's record stays as it is.")
@click.option("--file", "as_file", is_flag=True, help="Only the block file, no loop device; needs no root.")
@click.option("--mkfs", type=click.Choice(FILE_SYSTEMS), help="Make a file system if the volume is blank, else fail.")
@click.option(
    "--mount",
    "directory",
    metavar="DIR",
    type=click.Path(),
    help="Mount it there; made if missing. Needs root.",
)
@click.pass_obj
def attach(app: App, volume: str, read_only: bool, as_file: bool, mkfs: str | None, directory: str | None) -> None:
    """Attach VOLUME and print the path to open: a loop device, or the block file.

    --mkfs never touches a volume that was written to: it fails with exit status 4, and nothing is changed.
    When a step fails, what this command did before is undone.

    \b
    Examples:
      ebsctl attach data --mkfs ext4 --mount /srv/data     the first time
      ebsctl attach data --mount /srv/data                 from then on
      fuse2fs "$(ebsctl attach data --file)" ~/data        without root (ext4)
    """
    if directory is not None and as_file:
        raise UsageFailure(
            "--mount cannot be used with --file.",
            "Mount an ext4 block file with `fuse2fs FILE DIR` (Debian package fuse2fs).",
        )
    if mkfs is not None and read_only:
        raise UsageFailure(
            "--mkfs cannot be used with --read-only.", "Attach it once without --read-only to format it."
        )
    if directory is not None and app.uid != 0:
        raise NeedsRoot(
            operation="--mount",
            remedy="An ext4 file system can be mounted without root (Debian package fuse2fs): "
            f'fuse2fs "$(ebsctl attach {volume} --file)" {directory}',
        )
    target = None if directory is None else _mount_target(app, directory)
    for program in _programs_needed(mkfs, mount=target is not None):
        app.programs.require(program)
    undo = _Undo()
    try:
        if target is not None:
            _make_directory(app, target, undo)
        attached = _attach(app, volume, read_only=read_only, as_file=as_file, mkfs=mkfs, target=target, undo=undo)
    except EbsdError as error:
        raise with_more_hint(error, undo.run()) from error.__cause__
    except BaseException:  # an interrupt leaves nothing behind either
        if told := undo.run():
            app.note(f"note: {told}")
        raise
    app.emit(attached, first_attachment(attached)["Path"])


def _programs_needed(mkfs: str | None, *, mount: bool) -> list[str]:
    """Return the programs an attach will run, so that a missing one is found before anything is changed."""
    needed = [] if mkfs is None else [f"mkfs.{mkfs}"]
    if mount:
        needed += ["mount", "umount"] if mkfs is not None else ["mount", "umount", "blkid"]
    return needed


def _mount_target(app: App, directory: str) -> str:
    """Return the absolute path to mount on, without symbolic links, as mountinfo will show it."""
    target = os.path.realpath(directory)
    if not target.isprintable():
        raise InvalidParameterValue(
            value=ascii(target), parameter="--mount", reason="the path has unprintable characters"
        )
    if os.path.lexists(target) and not os.path.isdir(target):
        raise InvalidParameterValue(value=target, parameter="--mount", reason="it is not a directory")
    if is_mount_point(app.mounts(), target):
        raise IncorrectState(reason=f"Something is mounted on {target} already")
    return target


def _make_directory(app: App, target: str, undo: _Undo) -> None:
    missing = []
    path = target
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    for path in reversed(missing):
        try:
            os.mkdir(path)
        except OSError as exc:
            raise InvalidParameterValue(value=target, parameter="--mount", reason=exc.strerror) from exc
        undo.add(partial(os.rmdir, path), left=f"the directory {path} stays")
    if missing:
        app.note(f"note: made the directory {target}")


def _attach(
    app: App, name: str, *, read_only: bool, as_file: bool, mkfs: str | None, target: str | None, undo: _Undo
) -> Document:
    """Attach, format and mount; return the Volume. What was done is in ``undo`` before the next step."""
    try:
        reply = app.client.ec2(
            "AttachVolume",
            VolumeId=name,
            ReadOnly=True if read_only else None,
            ExposeAs="file" if as_file else None,
        )
    except KeyboardInterrupt:
        app.note(f"note: ebsd may still attach {name}; `ebsctl show {name}` tells")
        raise
    volume: dict[str, Any] = reply["Volume"]
    attachment = reply["Attachment"]
    volume_id, path, device = volume["VolumeId"], attachment["Path"], attachment.get("Device")
    undo.add(
        lambda: app.client.ec2("DetachVolume", VolumeId=volume_id),
        undone="It was detached again.",
        left=f"{volume_id} stays attached",
    )
    if mkfs is not None:
        if not reply["Blank"]:
            raise NotBlank(volume=name, path="its device")
        _format(app, name, mkfs, path, regular_file=device is None)
    if target is None:
        return volume
    if device is None:
        raise AttachFailed(volume=name, reason="it has no device to mount", remedy="Only root gets a loop device.")
    file_system = mkfs or _detected_file_system(app, name, device, blank=reply["Blank"])
    try:
        app.programs.run(mount_command(file_system, device, target, read_only=read_only))
    except CommandFailed as error:
        raise AttachFailed(volume=name, reason=_text_of(error), remedy="") from error
    undo.add(lambda: app.programs.unmount(volume_id, target), left=f"{volume_id} stays mounted on {target}")
    app.client.control("RecordMount", VolumeId=volume_id, MountPoint=target)
    try:
        return describe(app, volume_id)  # with the mount point, as the server reads it from mountinfo
    except EbsdError:
        return volume  # everything is done; the reply of AttachVolume says almost as much


def _format(app: App, volume: str, file_system: str, path: str, *, regular_file: bool) -> None:
    try:
        app.programs.run(mkfs_command(file_system, path, regular_file=regular_file))
    except CommandFailed as error:
        raise AttachFailed(volume=volume, reason=_text_of(error), remedy="") from error


def _detected_file_system(app: App, volume: str, device: str, *, blank: bool) -> str:
    try:
        found = app.programs.file_system_of(device)
    except CommandFailed as error:
        raise AttachFailed(volume=volume, reason=_text_of(error), remedy="") from error
    if found is None:
        remedy = "It is blank: add --mkfs ext4." if blank else "Attach it without --mount and look at its contents."
        raise AttachFailed(volume=volume, reason=f"it holds no {', '.join(FILE_SYSTEMS)} file system", remedy=remedy)
    return found


def _text_of(error: CommandFailed) -> str:
    return error.message.removesuffix(".")


# --- detach -----------------------------------------------------------------------------------------------


@click.command(cls=Command)
@click.argument("volume", required=False, shell_complete=complete_volume)
@click.option(
    "--force", is_flag=True, help="Also when it is in use or its process is dead; unwritten data may be lost."
)
@click.option("--all", "every", is_flag=True, help="Detach all your attached volumes, going on after failures.")
@click.pass_obj
def detach(app: App, volume: str | None, force: bool, every: bool) -> int:
    """Unmount VOLUME where `ebsctl attach --mount` mounted it, and detach it.

    A volume that is in use is left as it is, with exit status 4. With --all the exit status is that of the
    first failure.

    \b
    Examples:
      ebsctl detach data
      ebsctl detach --all
    """
    if every == (volume is not None):
        raise UsageFailure("Name one VOLUME, or give --all.", "`ebsctl list` shows the volumes.")
    if volume is not None:
        detached = _detach(app, describe(app, volume), force=force)
        app.emit(detached)
        return ExitStatus.DONE
    return _detach_all(app, force=force)


def _detach_all(app: App, *, force: bool) -> int:
    account = f"{app.uid:012d}"
    attached = [volume for volume in app.client.ec2("DescribeVolumes")["Volumes"] if volume["Attachments"]]
    own = [volume for volume in attached if volume["OwnerId"] == account]
    detached: list[Document] = []
    failed: list[tuple[Document, EbsdError]] = []
    for volume in own:
        try:
            detached.append(_detach(app, volume, force=force))
        except EbsdError as error:
            failed.append((volume, error))
            if not app.as_json:
                app.report_error(error)
    if len(own) < len(attached):
        app.note(f"note: volumes of other users stay attached: {len(attached) - len(own)}")
    unsuccessful = [
        {
            "ResourceId": volume["VolumeId"],
            "Error": {"Code": error.code, "Message": error.message, "Hint": error.hint},
        }
        for volume, error in failed
    ]
    app.emit({"Volumes": detached, "Unsuccessful": unsuccessful})
    if not failed:
        return ExitStatus.DONE
    first = failed[0][1]
    if app.as_json:
        app.report_error(first)
    return first.exit_status


def _detach(app: App, volume: Document, *, force: bool) -> Document:
    """Unmount what ebsctl mounted of this volume, then detach it; return the Volume."""
    volume_id = volume["VolumeId"]
    attachment = first_attachment(volume)
    mounts = mounts_to_end(
        app.mounts(),
        device_number=attachment.get("DeviceNumber"),
        device=attachment.get("Device"),
        recorded=attachment.get("RecordedMountPoint"),
    )
    unmounted = False
    try:
        for mount in mounts:
            app.programs.unmount(volume_id, mount.mount_point, lazily=force)
            unmounted = True
        if unmounted:
            app.note(f"note: unmounted {mounts[0].mount_point}")
            app.client.control("RecordMount", VolumeId=volume_id)
        reply = app.client.ec2("DetachVolume", VolumeId=volume_id, Force=True if force else None)
    except EbsdError as error:
        if unmounted:
            raise with_more_hint(error, f"{mounts[0].mount_point} was unmounted before this.") from error.__cause__
        raise
    detached: Document = reply["Volume"]
    return detached


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


@click.command("list", cls=Command)
@click.argument("kind", type=click.Choice(["volumes", "keys"]), default="volumes")
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="K=V",
    help="Only what matches; may be repeated. Volumes: EC2's filters, such as status=available, tag:env=lab "
    "or encrypted=true. Keys: a member of KeyMetadata, such as KeyState=Enabled.",
)
@click.pass_obj
def list_resources(app: App, kind: str, filters: tuple[str, ...]) -> None:
    """List your volumes, or your keys.

    \b
    Examples:
      ebsctl list
      ebsctl list --filter status=available --filter tag:env=lab
      ebsctl list keys --json
    """
    if kind == "keys":
        from ebsctl.commands.keys import emit_keys

        emit_keys(app, parse_filters(filters))
        return
    volumes = app.client.ec2("DescribeVolumes", Filters=parse_filters(filters))["Volumes"]
    rows = [render.volume_row(volume, for_people=app.for_people) for volume in volumes]
    app.emit({"Volumes": volumes}, render.table(render.VOLUME_HEADER, rows, for_people=app.for_people))
    if not volumes and app.for_people:
        app.note("No volume matches." if filters else "No volumes yet: ebsctl create NAME --size 10G")


@click.command(cls=Command)
@click.argument("resource", metavar="ID", shell_complete=complete_volume)
@click.pass_obj
def show(app: App, resource: str) -> None:
    """Show the volume, or the key, that ID names.

    A key is named by its id, its ARN or alias/NAME; anything else names a volume.
    """
    from ebsctl.commands.keys import emit_key, names_a_key

    if names_a_key(resource):
        emit_key(app, resource)
        return
    volume = describe(app, resource)
    pairs = render.volume_fields(volume, for_people=app.for_people)
    app.emit(volume, render.fields(pairs, for_people=app.for_people))


# --- delete, rename, tag ----------------------------------------------------------------------------------


@click.command(cls=Command)
@click.argument("resource", metavar="ID", shell_complete=complete_volume)
@click.option("--yes", is_flag=True, help="Do not ask; needed where there is no terminal.")
@click.pass_obj
def delete(app: App, resource: str, yes: bool) -> int:
    """Delete the volume ID; its data cannot be recovered."""
    if not yes and not is_interactive():
        raise UsageFailure("Deleting needs a confirmation, and there is no terminal to ask on.", "Add --yes.")
    volume = describe(app, resource)
    volume_id = volume["VolumeId"]
    if not yes:
        name, size = render.printable(volume["Name"]), format_size(volume["SizeBytes"])
        if not confirm(f"Delete volume {name} ({volume_id}, {size})? Its data cannot be recovered."):
            app.report("Ebsd.NotConfirmed", "It was not confirmed; nothing was deleted.", "")
            return ExitStatus.FAILED
    # By id: between the question and now another volume may have got the name.
    app.client.ec2("DeleteVolume", VolumeId=volume_id)
    app.emit({"VolumeId": volume_id})
    return ExitStatus.DONE


@click.command(cls=Command)
@click.argument("resource", metavar="ID", shell_complete=complete_volume)
@click.argument("name")
@click.pass_obj
def rename(app: App, resource: str, name: str) -> None:
    """Give the volume ID the new name NAME; its id stays."""
    renamed = app.client.control("Rename", Resource=resource, Name=name)["ResourceId"]
    if app.as_json:
        app.emit(describe(app, renamed))


@click.command(cls=Command)
@click.argument("resource", metavar="ID", shell_complete=complete_volume)
@click.argument("changes", metavar="K=V|K-...", nargs=-1, required=True)
@click.pass_obj
def tag(app: App, resource: str, changes: tuple[str, ...]) -> None:
    """Set (K=V) and remove (K-) tags of the volume ID.

    \b
    Examples:
      ebsctl tag data env=lab owner=alice
      ebsctl tag data env-
    """
    added, removed = parse_tag_changes(changes)
    resource_id = app.client.control("Identify", Resource=resource)["ResourceId"]
    if removed:
        app.client.ec2("DeleteTags", Resources=[resource_id], Tags=[{"Key": key} for key in removed])
    if added:
        tags = [{"Key": key, "Value": value} for key, value in added.items()]
        app.client.ec2("CreateTags", Resources=[resource_id], Tags=tags)
    if app.as_json:
        app.emit(describe(app, resource_id))


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
