"""``ebsctl resize``: let a volume grow, and the file system on it."""

from __future__ import annotations

import click

from ebsctl.app import App, Command, Interruption
from ebsctl.lookup import complete_volume, describe_volume
from ebsctl.mounting import FILE_SYSTEMS, growth_commands, usable_mount, with_more_hint
from ebsctl.render import Document, first_attachment
from ebsd.domain.errors import EbsdError, IncorrectState, NeedsRoot
from ebsd.domain.units import check_volume_size, format_size, parse_size


@click.command(cls=Command)
@click.argument("volume", shell_complete=complete_volume)
@click.argument("size", metavar="SIZE|+SIZE")
@click.option("--grow-fs", is_flag=True, help="Let the ext4, xfs or btrfs on the attached volume grow as well.")
@click.pass_obj
def resize(app: App, volume: str, size: str, grow_fs: bool) -> None:
    """Let VOLUME grow to SIZE, or by +SIZE, attached or not. It cannot shrink.

    With --grow-fs a volume that has the size already is fine: only the file system grows then. xfs and btrfs
    grow while they are mounted, ext4 also when it is not.

    \b
    Examples:
      ebsctl resize data 20G --grow-fs
      ebsctl resize data +5G
    """
    relative = size.startswith("+")
    amount = parse_size(size.removeprefix("+"))
    if not relative:
        check_volume_size(amount)
    present = describe_volume(app.client, volume)
    ident, before = present["VolumeId"], present["SizeBytes"]
    wanted = check_volume_size(before + amount) if relative else amount
    commands: list[list[str]] = []
    obstacle: IncorrectState | None = None
    if grow_fs:
        try:
            commands = _commands(app, present)
        except IncorrectState as error:
            obstacle = error  # the volume can grow all the same
        for command in commands:
            app.programs.require(command[0])
    grown = present
    if not (grow_fs and wanted == before):
        # By id: the size was taken from this volume, whatever has its name by now.
        grown = app.client.ec2("ModifyVolume", VolumeId=ident, SizeBytes=wanted)["Volume"]
    size_now = format_size(grown["SizeBytes"])
    # The way to go on is exact: +SIZE would let the volume grow once more.
    rest = f"The volume has {size_now}; for its file system: ebsctl resize {ident} {grown['SizeBytes']} --grow-fs"
    if obstacle is not None:
        raise with_more_hint(obstacle, rest)
    _grow_file_system(app, commands, rest)
    app.emit(grown)
    _tell(app, present, grown, grow_fs=grow_fs)


def _commands(app: App, volume: Document) -> list[list[str]]:
    """Return what grows the file system; raises IncorrectState where it cannot grow as things are."""
    ident, attachment = volume["VolumeId"], first_attachment(volume)
    if not attachment:
        raise _not_grown(ident, "it is not attached", f"Attach it first: ebsctl attach {ident}.")
    device, number = attachment.get("Device"), attachment.get("DeviceNumber")
    if device is None or number is None:
        path = attachment["Path"]
        reason = "it is attached as a file, and whether a program uses that file cannot be seen"
        raise _not_grown(ident, reason, f"End what uses {path}; for ext4 then: e2fsck -f -p {path} && resize2fs {path}")
    if attachment["ReadOnly"]:
        raise _not_grown(ident, "it is attached read-only", "Attach it without --read-only.")
    if app.uid != 0:
        raise NeedsRoot(operation="--grow-fs", remedy="Nothing was changed; without --grow-fs the volume alone grows.")
    mount = usable_mount(app.mounts(), device=device, device_number=number)
    if mount is not None:
        file_system: str | None = mount.file_system
    else:
        file_system = app.programs.file_system_of(device)
    if file_system not in FILE_SYSTEMS:
        raise _not_grown(ident, f"it holds no {', '.join(FILE_SYSTEMS)} file system", "")
    commands = growth_commands(file_system, device, mount.mount_point if mount else None)
    if not commands:
        raise _not_grown(ident, f"{file_system} grows only while it is mounted", f"Mount {device} first.")
    return commands


def _not_grown(volume: str, reason: str, hint: str) -> IncorrectState:
    error = IncorrectState(reason=f"The file system on {volume} was not grown: {reason}")
    error.hint = hint
    return error


def _grow_file_system(app: App, commands: list[list[str]], rest: str) -> None:
    try:
        for command in commands:
            if command[0] == "e2fsck":
                app.programs.check_ext4(command)
            else:
                app.programs.run(command)
    except EbsdError as error:
        raise with_more_hint(error, rest) from error.__cause__
    except KeyboardInterrupt:
        raise Interruption(rest) from None


def _tell(app: App, before: Document, now: Document, *, grow_fs: bool) -> None:
    ident, size_before, size_now = now["VolumeId"], before["SizeBytes"], now["SizeBytes"]
    if size_before != size_now:
        app.note(f"note: {ident} grew from {format_size(size_before)} to {format_size(size_now)}")
    if grow_fs:
        app.note("note: its file system fills it")
    elif first_attachment(now):
        app.note(f"hint: its file system grows with: ebsctl resize {ident} {size_now} --grow-fs")
