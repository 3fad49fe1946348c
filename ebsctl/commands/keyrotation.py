"""Commands on key material: when a key gets a new one, and what is wrapped under it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import click

from ebsctl import render
from ebsctl.app import App, UsageFailure
from ebsctl.commands.keys import key, key_reference
from ebsctl.terminal import ProgressBar
from ebsd.domain.errors import ExitStatus, ProtocolError, exit_status_of


@key.command("rotation", short_help="Show or change when KEY rotates, or rotate it now.")
@click.argument("reference", metavar="KEY")
@click.option("--enable", is_flag=True, help="Have the key rotate by itself.")
@click.option("--days", type=int, metavar="N", help="With --enable: every N days, 90 to 2560; 365 without it.")
@click.option("--disable", is_flag=True, help="Have it rotate no more.")
@click.option("--now", is_flag=True, help="Rotate it now, whatever its period.")
@click.pass_obj
def key_rotation(app: App, reference: str, enable: bool, days: int | None, disable: bool, now: bool) -> None:
    """Show the key material of KEY and when it rotates, or change that.

    New key material wraps the data keys of new volumes; the old one keeps opening the others. No data is rewritten.

    \b
    Examples:
      ebsctl key rotation backup
      ebsctl key rotation backup --enable --days 180
      ebsctl key rotation backup --now
    """
    if enable + disable + now > 1:
        raise UsageFailure("--enable, --disable and --now are three commands.", "Give one of them.")
    if days is not None and not enable:
        raise UsageFailure("--days goes with --enable.", "Add --enable.")
    name = key_reference(reference)
    if enable:
        app.client.kms("EnableKeyRotation", KeyId=name, RotationPeriodInDays=days)
    elif disable:
        app.client.kms("DisableKeyRotation", KeyId=name)
    elif now:
        app.client.kms("RotateKeyOnDemand", KeyId=name)
    status = app.client.kms("GetKeyRotationStatus", KeyId=name)
    rotations = app.client.kms("ListKeyRotations", KeyId=name, IncludeKeyMaterial="ALL_KEY_MATERIAL")["Rotations"]
    document = {**status, "Rotations": rotations}
    if not (enable or disable or now) or app.as_json:
        rows = [
            (entry["KeyMaterialId"], entry["KeyMaterialState"], entry.get("RotationType"), _made(entry))
            for entry in rotations
        ]
        fields = [(name, status[name]) for name in render.ROTATION_FIELDS if name in status]
        table = render.table(render.ROTATION_HEADER, rows, for_people=app.for_people)
        app.emit(document, f"{render.fields(fields, for_people=app.for_people)}\n{table}")


def _made(entry: Mapping[str, Any]) -> object:
    """Return when a backing key was made, which for all but the first one is when it was rotated to."""
    return entry.get("CreationDate") or entry.get("RotationDate")


@key.command("rewrap", short_help="Wrap data keys anew, with the newest key material.")
@click.argument("reference", metavar="KEY")
@click.argument("resources", nargs=-1, metavar="[ID]...")
@click.option("--to", "target", metavar="KEY", help="Refused unless it is KEY: the key of a volume cannot change.")
@click.pass_obj
def key_rewrap(app: App, reference: str, resources: tuple[str, ...], target: str | None) -> int:
    """Wrap the data keys under KEY anew, with its newest key material: of all your volumes and snapshots, or of ID.

    No data is read or written, nothing is detached, and the data keys stay the same. It may be cut and repeated.

    \b
    Examples:
      ebsctl key rotation backup --now && ebsctl key rewrap backup
      ebsctl key rewrap backup data monday
    """
    report = _follow(
        app,
        KeyId=key_reference(reference),
        Resources=list(resources) or None,
        DestinationKeyId=None if target is None else key_reference(target),
    )
    names = ("KeyId", "Rewrapped", "Current", "Skipped", "Failed")
    app.emit(report, render.fields([(name, report.get(name)) for name in names], for_people=app.for_people))
    if not report["Failed"]:
        return ExitStatus.DONE
    for failure in report["Failures"]:
        app.note(f"error: {failure['ResourceId']}: {render.printable(failure['Error']['Message'])}")
    return exit_status_of(report["Failures"][0]["Error"]["Code"])


def _follow(app: App, **members: object) -> dict[str, Any]:
    bar = ProgressBar(wanted=not app.as_json, things="data keys")
    last: dict[str, Any] | None = None
    try:
        with contextlib.closing(app.client.control_stream("RewrapDataKeys", **members)) as replies:
            for last in replies:
                bar.show(last["Done"], last["Total"])
    finally:
        bar.clear()
    if last is None or "KeyId" not in last:
        raise ProtocolError(reason="it stopped telling of the rewrap before its end")
    return last
