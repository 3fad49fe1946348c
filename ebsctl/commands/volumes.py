"""Commands on volumes: create, attach, detach."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import click

from ebsctl.app import (
    App,
    Command,
    Interruption,
    UsageFailure,
    client_token_option,
    parse_pairs,
    parse_rate,
    rate_option,
    tag_list,
)
from ebsctl.boot import attach_at_boot, require_units
from ebsctl.following import await_result, note_running, what_is_left
from ebsctl.lookup import VOLUME, Found, complete_snapshot, complete_volume, describe_volume
from ebsctl.mounting import (
    FILE_SYSTEMS,
    is_mount_point,
    mkfs_command,
    mount_command,
    mounts_to_end,
    with_more_hint,
)
from ebsctl.render import Document, first_attachment
from ebsctl.rollback import confirmed_rollback
from ebsd.domain.errors import (
    AttachFailed,
    CommandFailed,
    EbsdError,
    ExitStatus,
    IncorrectState,
    InvalidParameterValue,
    NeedsRoot,
    NotBlank,
    RemoteError,
    VolumeAlreadyAttached,
)
from ebsd.domain.mountinfo import mounts_of_device
from ebsd.domain.units import check_volume_size, parse_size

# --- create -----------------------------------------------------------------------------------------------


@click.command(cls=Command, short_help="Create a volume, empty or from a snapshot.")
@click.argument("name")
@click.option(
    "--size", metavar="SIZE", help="Such as 10G or 512M (powers of 1024), or bytes. With --from: at least its size."
)
@click.option("--from", "snapshot", metavar="SNAPSHOT", shell_complete=complete_snapshot, help="With its contents.")
@click.option(
    "--encrypted/--no-encrypted",
    default=None,
    help="Encrypt, or do not, instead of what `ebsctl defaults show` says. As in EBS, --no-encrypted does "
    "not overrule encryption by default.",
)
@click.option("--key", metavar="KEY", help="Encrypt under this key, of this host or of AWS KMS; needs --encrypted.")
@click.option("--tag", "tags", multiple=True, metavar="K=V", help="Add a tag; may be repeated.")
@click.option(
    "--context",
    "context_pairs",
    multiple=True,
    metavar="K=V",
    help="Add a pair to the encryption context of the data key; may be repeated. Not secret.",
)
@click.option("--mkfs", type=click.Choice(FILE_SYSTEMS), help="Attach it and make a file system.")
@click.option("--mount", "directory", metavar="DIR", type=click.Path(), help="Attach it and mount it there, as attach.")
@click.option("--no-wait", is_flag=True, help="Do not wait until the data of a snapshot are re-encrypted.")
@click.option(
    "--allow-damaged",
    is_flag=True,
    help="From a snapshot in which `ebsctl verify` found damage, under its own key: what is damaged stays so.",
)
@click.option(
    "--preallocate",
    is_flag=True,
    help="Allocate all its space now, so that no write lacks any until its first snapshot. Only without --from.",
)
@rate_option()
@client_token_option()
@click.pass_obj
def create(
    app: App,
    name: str,
    size: str | None,
    snapshot: str | None,
    encrypted: bool | None,
    key: str | None,
    tags: tuple[str, ...],
    context_pairs: tuple[str, ...],
    mkfs: str | None,
    directory: str | None,
    no_wait: bool,
    allow_damaged: bool,
    preallocate: bool,
    rate: str | None,
    client_token: str | None,
) -> None:
    """Create the volume NAME, empty or from a snapshot, and print its id.

    The volume is thin: it takes space as it is written, or all at once with --preallocate. A snapshot ends that: what
    was not written is given back, and what is written from then on takes space again.
    Attach it to use it, or let --mkfs and --mount do so.
    From a snapshot under another key all data are re-encrypted, and the command waits for that. Ctrl-C ends the
    command, not the work. A volume that was created stays when a later step fails.

    \b
    Examples:
      ebsctl create data --size 10G
      ebsctl create data --size 10G --encrypted --key backup --tag env=lab
      ebsctl create data --size 10G --mkfs ext4 --mount /srv/data
      ebsctl create again --from monday --mount /srv/again
    """
    _check_create(size=size, snapshot=snapshot, mkfs=mkfs, directory=directory, no_wait=no_wait)
    size_bytes = None if size is None else check_volume_size(parse_size(size))
    tag_members, context = tag_list(tags), parse_pairs("--context", context_pairs) or None
    plan = None
    if mkfs is not None or directory is not None:
        # Without root there are no loop devices, but mkfs works on the block file.
        plan = _plan(app, name, read_only=False, as_file=app.uid != 0, mkfs=mkfs, directory=directory)
    reply = app.client.ec2(
        "CreateVolume",
        Name=name,
        SizeBytes=size_bytes,
        SnapshotId=snapshot,
        Encrypted=encrypted,
        KmsKeyId=key,
        EncryptionContext=context,
        Tags=tag_members,
        AllowDamaged=True if allow_damaged else None,
        Preallocate=True if preallocate else None,
        Rate=parse_rate(rate),
        ClientToken=client_token,
    )
    made, job = Found(VOLUME, reply["Volume"]), reply.get("JobId")
    app.note_of(reply)
    if job is not None:
        if no_wait:
            note_running(app, job, made)
        else:
            made = await_result(app, job, made)
    if plan is not None:
        made = _attach_new(app, made, plan)
    app.emit(made.document, made.ident)
    if made.document["Encrypted"] and not app.as_json:
        _advise_backup(app)


def _check_create(
    *, size: str | None, snapshot: str | None, mkfs: str | None, directory: str | None, no_wait: bool
) -> None:
    if size is None and snapshot is None:
        raise click.UsageError("Missing option '--size', or '--from' for the contents of a snapshot.")
    if mkfs is not None and snapshot is not None:
        raise UsageFailure(
            "--mkfs cannot be used with --from.", "The volume has what the snapshot holds: add only --mount."
        )
    if no_wait and (mkfs is not None or directory is not None):
        raise UsageFailure(
            "--no-wait cannot be used with --mkfs or --mount.", "Attach the volume when it is available."
        )


def _attach_new(app: App, made: Found, plan: _Plan) -> Found:
    """Attach a new volume as planned; whatever happens, it stays, and the error says so."""
    try:
        attached = Found(VOLUME, _carry_out(app, made.ident, plan))
    except EbsdError as error:
        raise with_more_hint(error, what_is_left(app, made)) from error.__cause__
    except KeyboardInterrupt:
        raise Interruption(what_is_left(app, made)) from None
    where = f" and mounted on {plan.target}" if plan.target is not None else ""
    app.note(f"note: attached as {first_attachment(attached.document)['Path']}{where}")
    return attached


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


@click.command(cls=Command, short_help="Attach a volume: a device or block file to open.")
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
@click.option(
    "--accept-rollback", is_flag=True, help="It was restored from a backup: accept that it went back. Needs root."
)
@click.option("--if-needed", is_flag=True, help="That it is attached already is as good; print its path.")
@click.option(
    "--persist", is_flag=True, help="Also at every boot, until it is deleted. Needs root, and ebsd as a service."
)
@click.option("--yes", is_flag=True, help="With --accept-rollback: do not ask.")
@click.pass_obj
def attach(
    app: App,
    volume: str,
    read_only: bool,
    as_file: bool,
    mkfs: str | None,
    directory: str | None,
    accept_rollback: bool,
    if_needed: bool,
    persist: bool,
    yes: bool,
) -> int:
    """Attach VOLUME and print the path to open: a loop device, or the block file.

    A volume whose record is older than the key service remembers is refused. --accept-rollback is for the administrator
    who restored it from a backup: it says what is lost, asks, and accepts that one state of that one volume.

    --mkfs never touches a volume that was written to: it fails with exit status 4, and nothing is changed.
    When a step fails, what this command did before is undone.

    \b
    Examples:
      ebsctl attach data --mkfs ext4 --mount /srv/data     the first time
      ebsctl attach data --mount /srv/data                 from then on
      ebsctl attach data --persist                         at every boot; mounts: see ebsd-volume@.service
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
    if if_needed and (mkfs is not None or directory is not None or accept_rollback):
        raise UsageFailure(
            "--if-needed cannot be used with --mkfs, --mount or --accept-rollback.",
            "It attaches, or finds attached, and does nothing else.",
        )
    if persist and (read_only or as_file):
        raise UsageFailure(
            "--persist cannot be used with --read-only or --file.",
            "At boot a volume gets a device to write to.",
        )
    plan = _plan(app, volume, read_only=read_only, as_file=as_file, mkfs=mkfs, directory=directory)
    if persist:
        require_units(app)
        plan = plan._replace(persist=True)
    if accept_rollback:
        accepted = confirmed_rollback(app, volume, yes=yes)
        if accepted is None:
            return ExitStatus.FAILED
        plan = plan._replace(accept=accepted.generation)
    try:
        attached = _carry_out(app, volume, plan)
    except RemoteError as error:
        if not if_needed or error.code != VolumeAlreadyAttached.code:
            raise
        attached = _as_wanted(describe_volume(app.client, volume), plan, error)
        if persist:
            attach_at_boot(app, attached["VolumeId"])
    app.emit(attached, first_attachment(attached)["Path"])
    return ExitStatus.DONE


def _as_wanted(volume: Document, plan: _Plan, refusal: RemoteError) -> Document:
    """Return a volume that is attached already, as far as it is usable in the way that was asked for."""
    attachment = first_attachment(volume)
    is_wanted = (
        volume["State"] == "in-use"
        and attachment.get("State") == "attached"
        and bool(attachment.get("ReadOnly")) == plan.read_only
        and (plan.as_file or attachment.get("Device") is not None)
    )
    if not is_wanted:
        raise refusal
    return volume


class _Plan(NamedTuple):
    """How to attach a volume, as far as it can be checked before anything is changed."""

    read_only: bool
    as_file: bool
    mkfs: str | None
    target: str | None
    """Absolute path to mount on."""
    accept: int | None = None
    """Generation of its record that is accepted although it went back."""
    persist: bool = False
    """At every boot, too."""


def _plan(app: App, volume: str, *, read_only: bool, as_file: bool, mkfs: str | None, directory: str | None) -> _Plan:
    """Return what is to be done, or raise what would fail later: no root, a bad mount point, missing programs."""
    if directory is not None and app.uid != 0:
        raise NeedsRoot(
            operation="--mount",
            remedy="An ext4 file system can be mounted without root (Debian package fuse2fs): "
            f'fuse2fs "$(ebsctl attach {volume} --file)" {directory}',
        )
    target = None if directory is None else _mount_target(app, directory)
    for program in _programs_needed(mkfs, mount=target is not None):
        app.programs.require(program)
    return _Plan(read_only, as_file, mkfs, target)


def _carry_out(app: App, volume: str, plan: _Plan) -> Document:
    """Attach, format and mount; return the Volume. When a step fails, those before it are undone."""
    undo = _Undo()
    try:
        if plan.target is not None:
            _make_directory(app, plan.target, undo)
        attached = _attach(app, volume, plan, undo)
        if plan.persist:
            attach_at_boot(app, attached["VolumeId"])
        return attached
    except EbsdError as error:
        raise with_more_hint(error, undo.run()) from error.__cause__
    except BaseException:  # an interrupt leaves nothing behind either
        if told := undo.run():
            app.note(f"note: {told}")
        raise


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


def _attach(app: App, name: str, plan: _Plan, undo: _Undo) -> Document:
    """Attach, format and mount; return the Volume. What was done is in ``undo`` before the next step."""
    mkfs, target = plan.mkfs, plan.target
    try:
        reply = app.client.ec2(
            "AttachVolume",
            VolumeId=name,
            ReadOnly=True if plan.read_only else None,
            ExposeAs="file" if plan.as_file else None,
            AcceptGeneration=plan.accept,
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
        app.programs.mount(mount_command(file_system, device, target, read_only=plan.read_only))
    except CommandFailed as error:
        raise AttachFailed(volume=name, reason=_text_of(error), remedy="") from error
    undo.add(lambda: app.programs.unmount(volume_id, target), left=f"{volume_id} stays mounted on {target}")
    _check_mounted(app, name, device, attachment.get("DeviceNumber") or "", target)
    app.client.control("RecordMount", VolumeId=volume_id, MountPoint=target)
    try:
        return describe_volume(app.client, volume_id)  # with the mount point, as the server reads it from mountinfo
    except EbsdError:
        return volume  # everything is done; the reply of AttachVolume says almost as much


def _check_mounted(app: App, volume: str, device: str, number: str, target: str) -> None:
    """Raise AttachFailed when another device was mounted than the one that was asked for.

    Before Linux 6.7, btrfs answers the mount of a second device with the same file system id, as a restored snapshot
    has, by mounting the first one again.
    """
    if not any(mount.mount_point == target for mount in mounts_of_device(app.mounts(), device, number)):
        raise AttachFailed(
            volume=volume,
            reason=f"the kernel mounted another device on {target}, which has the same file system id",
            remedy="Detach the other one first, or give this one a new id: btrfstune -u DEVICE.",
        )


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


@click.command(cls=Command, short_help="Unmount and detach a volume, or all.")
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
        detached = _detach(app, describe_volume(app.client, volume), force=force)
        app.emit(detached)
        return ExitStatus.DONE
    return _detach_all(app, force=force)


def _detach_all(app: App, *, force: bool) -> int:
    account = f"{app.uid:012d}"
    attached = [volume for volume in app.client.volumes() if volume["Attachments"]]
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
