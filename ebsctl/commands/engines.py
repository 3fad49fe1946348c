"""``ebsctl restart-engine``: attached volumes go on with the program as it is installed now."""

from __future__ import annotations

from typing import Any

import click

from ebsctl.app import App, Command, UsageFailure
from ebsctl.lookup import complete_volume
from ebsd.domain.errors import EbsdError, ExitStatus


@click.command(cls=Command, name="restart-engine", short_help="Have an attached volume go on with a new process.")
@click.argument("volume", required=False, shell_complete=complete_volume)
@click.option("--all", "every", is_flag=True, help="All your attached volumes, going on after failures.")
@click.pass_obj
def restart_engine(app: App, volume: str | None, every: bool) -> int:
    """Replace the process that serves VOLUME by one of the program as it is installed now.

    For upgrades: until then an attached volume goes on with the program that it was attached with. Who uses the
    volume sees a pause, which is told, and no error. It takes the native transport and Linux 6.9 or newer.

    \b
    Examples:
      ebsctl restart-engine data
      ebsctl restart-engine --all
    """
    if every == (volume is not None):
        raise UsageFailure("Name one VOLUME, or give --all.", "`ebsctl list` shows the volumes.")
    if volume is not None:
        app.emit(_restart(app, volume))
        return ExitStatus.DONE
    account = f"{app.uid:012d}"
    restarted: list[dict[str, Any]] = []
    failed: list[tuple[str, EbsdError]] = []
    for found in app.client.volumes():
        if not found["Attachments"] or found["OwnerId"] != account:
            continue
        try:
            restarted.append(_restart(app, found["VolumeId"]))
        except EbsdError as error:
            failed.append((found["VolumeId"], error))
            if not app.as_json:
                app.report_error(error)
    unsuccessful = [
        {"ResourceId": ident, "Error": {"Code": error.code, "Message": error.message, "Hint": error.hint}}
        for ident, error in failed
    ]
    app.emit({"Volumes": restarted, "Unsuccessful": unsuccessful})
    if not failed:
        return ExitStatus.DONE
    if app.as_json:
        app.report_error(failed[0][1])
    return failed[0][1].exit_status


def _restart(app: App, volume: str) -> dict[str, Any]:
    reply = app.client.control("RestartEngine", VolumeId=volume)
    app.note(f"note: {reply['VolumeId']} stood still for {reply['PauseMilliseconds']} ms")
    return reply
