"""Attachments at every boot: whether systemd starts a volume's unit is all that is remembered of the wish.

The unit (systemd/ebsd-volume@.service) attaches, or finds attached, and detaches in order when the host goes down. It
is named by the volume's id, so that a new name of the volume changes nothing.
"""

from __future__ import annotations

from typing import Final

from ebsctl.app import App
from ebsd.domain.errors import CommandFailed, HostUnsupported, NeedsRoot

UNIT: Final = "ebsd-volume@{volume}.service"


def require_units(app: App) -> None:
    """Raise what keeps volumes from being attached at boot here: no root, or ebsd is no service of systemd."""
    if app.uid != 0:
        raise NeedsRoot(operation="--persist", remedy="The units of the host are root's.")
    app.programs.require("systemctl")
    try:
        app.programs.run(["systemctl", "cat", "--quiet", UNIT.format(volume="")])
    except CommandFailed as error:
        raise HostUnsupported(
            reason="ebsd is not a service of systemd here", remedy="Install it as one: scripts/install, or its package."
        ) from error


def attach_at_boot(app: App, volume: str) -> None:
    """Have a volume, which is attached now, attached at every boot. Raises CommandFailed."""
    unit = UNIT.format(volume=volume)
    app.programs.run(["systemctl", "enable", "--quiet", "--now", unit])
    app.note(f"note: attached at every boot; to end that: systemctl disable {unit}")


def end_at_boot(app: App, volume: str) -> None:
    """Have a volume that was deleted attached at no further boot; a failure is told, for it is deleted all the same."""
    unit = UNIT.format(volume=volume)
    if not app.programs.is_installed("systemctl"):
        return
    try:
        app.programs.run(["systemctl", "is-enabled", "--quiet", unit])
    except CommandFailed:
        return
    try:
        if app.uid != 0:
            raise NeedsRoot(operation="systemctl disable", remedy="The units of the host are root's.")
        app.programs.run(["systemctl", "disable", "--quiet", unit])
    except (CommandFailed, NeedsRoot):
        app.note(
            f"note: its unit is still started at every boot, and will fail; root can end that: systemctl disable {unit}"
        )
    else:
        app.note("note: it is attached at boot no more")
