"""``ebsctl trim``: what a file system has freed goes back to the host."""

from __future__ import annotations

import click

from ebsctl.app import App, Command
from ebsctl.lookup import complete_volume, describe_volume
from ebsctl.mounting import usable_mount
from ebsctl.render import Document, first_attachment
from ebsd.domain.errors import IncorrectState, IncorrectVolumeState, NeedsRoot
from ebsd.domain.units import format_size


@click.command(cls=Command)
@click.argument("volume", shell_complete=complete_volume)
@click.pass_obj
def trim(app: App, volume: str) -> None:
    """Give back the space of files deleted on VOLUME.

    Prints how many bytes the host got back. The volume is mounted. A file system keeps what it has freed until it
    discards it: at once when it is mounted with -o discard, else with this command or fstrim(8). What snapshots still
    need stays theirs.

    \b
    Examples:
      ebsctl trim data
    """
    found = describe_volume(app.client, volume)
    ident = found["VolumeId"]
    place = _mount_point(app, found)
    if app.uid != 0:
        raise NeedsRoot(operation="trim", remedy="Let root do it: sudo ebsctl trim.")
    before = app.client.control("ReclaimVolume", VolumeId=ident)["ReclaimedBytes"]
    try:
        trimmed = app.programs.trim(place)
    except IncorrectState as error:
        error.hint = (
            f'Its file system or its device does not discard: with transport = "pyfuse3" no device does. Set '
            f'transport = "native" in ebsd.toml, restart ebsd, detach {ident} and attach it again.'
        )
        raise
    after = app.client.control("ReclaimVolume", VolumeId=ident)["ReclaimedBytes"]
    came_back = max(0, after - before)
    app.emit({"VolumeId": ident, "TrimmedBytes": trimmed, "ReclaimedBytes": came_back}, str(came_back))
    app.note(f"note: {place}: {format_size(trimmed)} discarded, {format_size(came_back)} given back")


def _mount_point(app: App, volume: Document) -> str:
    """Return where the volume's file system is reached; raises IncorrectState where that is nowhere."""
    ident, attachment = volume["VolumeId"], first_attachment(volume)
    if not attachment:
        error = IncorrectVolumeState(volume=ident, state=volume["State"])
        error.hint = f"Attach it and mount its file system: ebsctl attach {ident} --mount DIR."
        raise error
    device, number = attachment.get("Device"), attachment.get("DeviceNumber")
    if device is None or number is None:
        raise _not_mounted(ident, "it is attached as a file", f"On the file itself: fallocate -p {attachment['Path']}.")
    mount = usable_mount(app.mounts(), device=device, device_number=number)
    if mount is None:
        raise _not_mounted(ident, "it is not mounted here", f"Mount {device} first; all of it discards: blkdiscard.")
    return mount.mount_point


def _not_mounted(volume: str, reason: str, hint: str) -> IncorrectState:
    error = IncorrectState(reason=f"The file system on {volume} cannot be trimmed: {reason}")
    error.hint = hint
    return error
