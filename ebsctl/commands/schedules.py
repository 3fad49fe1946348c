"""Commands on snapshot schedules: create, list, show, pause, resume, run, delete."""

from __future__ import annotations

import re
from typing import Any, Final

import click

from ebsctl import render
from ebsctl.app import App, Group, UsageFailure
from ebsctl.lookup import complete_volume
from ebsctl.terminal import confirm, is_interactive
from ebsd.domain.errors import ExitStatus, InvalidParameterValue
from ebsd.domain.tags import parse_tag

UNITS: Final = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_duration(option: str, text: str) -> int:
    """Return the seconds of ``90m``, ``6h``, ``30d`` or ``4w``; raises InvalidParameterValue."""
    match = re.fullmatch(r"([0-9]{1,9})([mhdw])", text)
    if match is None:
        raise InvalidParameterValue(value=text, parameter=option, reason="write it as 90m, 6h, 30d or 4w")
    return int(match[1]) * UNITS[match[2]]


def _duration(seconds: int) -> str:
    for unit, length in reversed(UNITS.items()):
        if seconds % length == 0:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


@click.group(cls=Group, short_help="Snapshots that ebsd takes and deletes by itself.")
def schedule() -> None:
    """Snapshots that ebsd takes by itself, and deletes again."""


@schedule.command(short_help="Have ebsd take snapshots of a volume.")
@click.argument("name")
@click.argument("volume", required=False, shell_complete=complete_volume)
@click.option("--tagged", metavar="K=V", help="Of all your volumes with this tag, at one moment.")
@click.option("--every", metavar="TIME", help="How often: 90m, 6h, 1d; counted from midnight UTC.")
@click.option("--at", "times", multiple=True, metavar="HH:MM", help="A time of the day, UTC; may be repeated.")
@click.option("--keep", type=int, metavar="N", help="Keep the newest N of each volume.")
@click.option("--keep-for", metavar="TIME", help="Keep what is younger: 12h, 30d, 8w. With --keep, keep both.")
@click.option("--prefix", metavar="NAME", help="What the names of the snapshots begin with, instead of the volume's.")
@click.pass_obj
def create(
    app: App,
    name: str,
    volume: str | None,
    tagged: str | None,
    every: str | None,
    times: tuple[str, ...],
    keep: int | None,
    keep_for: str | None,
    prefix: str | None,
) -> None:
    """Have ebsd take snapshots of VOLUME, and print the id of the schedule NAME.

    A run that was missed while ebsd did not run is made once; one that finds nothing changed is skipped. Only what the
    schedule made is ever deleted by it, and never the newest good snapshot or a locked one. Without --keep and
    --keep-for nothing is deleted.

    \b
    Examples:
      ebsctl schedule create hourly data --every 1h --keep 24
      ebsctl schedule create nightly --tagged app=db --at 02:30 --keep 7 --keep-for 30d
    """
    if (volume is None) is (tagged is None):
        raise click.UsageError("Give either VOLUME or --tagged K=V.")
    if (every is None) is (not times):
        raise click.UsageError("Give either --every or --at.")
    tag = None if tagged is None else dict(zip(("Key", "Value"), parse_tag(tagged), strict=True))
    made = app.client.control(
        "CreateSchedule",
        Name=name,
        VolumeId=volume,
        TargetTag=tag,
        EverySeconds=None if every is None else parse_duration("--every", every),
        Times=list(times) or None,
        RetainCount=keep,
        RetainSeconds=None if keep_for is None else parse_duration("--keep-for", keep_for),
        NamePrefix=prefix,
    )["Schedule"]
    app.emit(made, made["ScheduleId"])
    app.note(f"note: the first run is at {made['NextRunTime']}")


@schedule.command("list")
@click.pass_obj
def list_schedules(app: App) -> None:
    """List your schedules and how their last runs ended."""
    reply = app.client.control("DescribeSchedules")
    rows = [
        [each["Name"], _target(each), _when(each), each["State"], each.get("NextRunTime", "-"),
         each.get("LastRunState", "-"), str(len(each["SnapshotIds"]))]
        for each in reply["Schedules"]
    ]  # fmt: skip
    header = ["NAME", "OF", "WHEN", "STATE", "NEXT", "LAST", "SNAPSHOTS"]
    app.emit(reply, render.table(header, rows, for_people=app.for_people))


def _target(each: dict[str, Any]) -> str:
    tag = each.get("TargetTag")
    return str(each["VolumeId"]) if tag is None else f"{tag['Key']}={tag.get('Value') or ''}"


def _when(each: dict[str, Any]) -> str:
    return f"every {_duration(each['EverySeconds'])}" if "EverySeconds" in each else f"at {', '.join(each['Times'])}"


@schedule.command(short_help="Show a schedule and its last run.")
@click.argument("name")
@click.pass_obj
def show(app: App, name: str) -> None:
    """Show the schedule NAME, and why its last run was skipped or failed."""
    _show(app, app.client.control("DescribeSchedules", ScheduleIds=[name])["Schedules"][0])


def _show(app: App, each: dict[str, Any]) -> None:
    kept = []
    if "RetainCount" in each:
        kept.append(f"the newest {each['RetainCount']}")
    if "RetainSeconds" in each:
        kept.append(f"what is younger than {_duration(each['RetainSeconds'])}")
    pairs = {
        "Name": each["Name"],
        "Id": each["ScheduleId"],
        "Of": _target(each),
        "When": f"{_when(each)} (UTC)",
        "Keeps": " and ".join(kept) or "everything",
        "State": each["State"],
        "Next run": each.get("NextRunTime", "-"),
        "Last run": " ".join(each[member] for member in ("LastRunTime", "LastRunState") if member in each) or "-",
        "Message": each.get("LastRunMessage", "-"),
        "Snapshots": " ".join(each["SnapshotIds"]) or "-",
    }
    app.emit(each, render.fields(pairs.items(), for_people=app.for_people))


@schedule.command()
@click.argument("name")
@click.pass_obj
def run(app: App, name: str) -> ExitStatus:
    """Make a run of the schedule NAME now, and show how it ended."""
    made = app.client.control("RunSchedule", ScheduleId=name)["Schedule"]
    _show(app, made)
    return ExitStatus.FAILED if made["LastRunState"] == "failed" else ExitStatus.DONE


@schedule.command(short_help="Take and delete nothing for a while.")
@click.argument("name")
@click.pass_obj
def pause(app: App, name: str) -> None:
    """Take and delete nothing for the schedule NAME until `ebsctl schedule resume`."""
    app.emit(app.client.control("PauseSchedule", ScheduleId=name, Paused=True)["Schedule"])


@schedule.command()
@click.argument("name")
@click.pass_obj
def resume(app: App, name: str) -> None:
    """Go on with the schedule NAME; what it missed is not made up."""
    app.emit(app.client.control("PauseSchedule", ScheduleId=name, Paused=False)["Schedule"])


@schedule.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def delete(app: App, name: str, yes: bool) -> ExitStatus:
    """Delete the schedule NAME; the snapshots that it made stay."""
    if not yes and not is_interactive():
        raise UsageFailure("Deleting needs a confirmation, and there is no terminal to ask on.", "Add --yes.")
    if not yes and not confirm(f"Delete the schedule {name}? Its snapshots stay, and nothing deletes them any more."):
        app.report("Ebsd.NotConfirmed", "It was not confirmed; nothing was deleted.", "")
        return ExitStatus.FAILED
    app.emit(app.client.control("DeleteSchedule", ScheduleId=name))
    return ExitStatus.DONE
