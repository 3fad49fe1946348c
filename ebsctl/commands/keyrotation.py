"""The command on when a key gets new key material."""

from __future__ import annotations

import click

from ebsctl import render
from ebsctl.app import App, UsageFailure
from ebsctl.commands.keys import key, key_reference


@key.command("rotation")
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
            (entry["KeyMaterialId"], entry["KeyMaterialState"], entry.get("RotationType"), entry.get("RotationDate"))
            for entry in rotations
        ]
        fields = [(name, status[name]) for name in render.ROTATION_FIELDS if name in status]
        table = render.table(render.ROTATION_HEADER, rows, for_people=app.for_people)
        app.emit(document, f"{render.fields(fields, for_people=app.for_people)}\n{table}")
