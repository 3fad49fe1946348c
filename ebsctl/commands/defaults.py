"""``ebsctl defaults``: the account's encryption by default, default key, and whether its snapshots can be public."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ebsctl import render
from ebsctl.app import App, Group


@click.group(cls=Group, short_help="Encryption by default, the default key, public snapshots.")
def defaults() -> None:
    """What new volumes get when `create` does not say, and whether snapshots can be public. Each user has their own."""


@defaults.command("show", short_help="Show encryption, key, public snapshots, limits.")
@click.pass_obj
def show(app: App) -> None:
    """Show encryption by default, the default key, whether public snapshots are blocked, and use and limits."""
    document = {
        **app.client.ec2("GetEbsEncryptionByDefault"),
        **app.client.ec2("GetEbsDefaultKmsKeyId"),
        "SnapshotBlockPublicAccess": app.client.ec2("GetSnapshotBlockPublicAccess")["State"],
    }
    account = app.client.control("DescribeAccountLimits")
    pairs = [*document.items(), *(_limit(limit, for_people=app.for_people) for limit in account["Limits"])]
    app.emit(
        {**document, "MayCreate": account["MayCreate"], "Limits": account["Limits"]},
        render.fields(pairs, for_people=app.for_people),
    )
    if not account["MayCreate"]:
        app.note("You may make no volumes and no snapshots here.")


def _limit(limit: Mapping[str, Any], *, for_people: bool) -> tuple[str, object]:
    def cell(number: int) -> object:
        return render.size_cell(number, for_people=for_people) if limit["Name"] == "VolumeBytes" else number

    most = "no limit" if limit.get("Limit") is None else cell(limit["Limit"])
    return limit["Name"], f"{cell(limit['Used'])} of {most}"


@defaults.command("enable-encryption")
@click.pass_obj
def enable_encryption(app: App) -> None:
    """Encrypt every new volume, whatever `create` says. Existing volumes stay as they are."""
    app.emit(app.client.ec2("EnableEbsEncryptionByDefault"))
    app.note("New volumes are encrypted.")


@defaults.command("disable-encryption", short_help="Encrypt a new volume only when `create` says so.")
@click.pass_obj
def disable_encryption(app: App) -> None:
    """Encrypt a new volume only when `create` says --encrypted."""
    app.emit(app.client.ec2("DisableEbsEncryptionByDefault"))
    app.note("New volumes are encrypted only with --encrypted.")


@defaults.command("set-key", short_help="Encrypt new volumes under KEY.")
@click.argument("key")
@click.pass_obj
def set_key(app: App, key: str) -> None:
    """Encrypt new volumes under KEY where `create` names none."""
    reply = app.client.ec2("ModifyEbsDefaultKmsKeyId", KmsKeyId=key)
    app.emit(reply)
    app.note(f"The default key is {render.printable(reply['KmsKeyId'])}.")


@defaults.command("reset-key")
@click.pass_obj
def reset_key(app: App) -> None:
    """Make alias/aws/ebs the default key again."""
    reply = app.client.ec2("ResetEbsDefaultKmsKeyId")
    app.emit(reply)
    app.note(f"The default key is {render.printable(reply['KmsKeyId'])}.")


@defaults.command("block-public-snapshots", short_help="Let no snapshot of yours be public.")
@click.option("--new-only", is_flag=True, help="Those that are public stay so.")
@click.pass_obj
def block_public_snapshots(app: App, new_only: bool) -> None:
    """Keep your snapshots from being public: those that are, too, whose permissions stay what they are."""
    state = "block-new-sharing" if new_only else "block-all-sharing"
    app.emit(app.client.ec2("EnableSnapshotBlockPublicAccess", State=state))
    app.note("No snapshot of yours becomes public." if new_only else "No snapshot of yours is public.")


@defaults.command("allow-public-snapshots", short_help="Let snapshots of yours be public again.")
@click.pass_obj
def allow_public_snapshots(app: App) -> None:
    """Let your snapshots be public again: those at once that were before it was blocked."""
    app.emit(app.client.ec2("DisableSnapshotBlockPublicAccess"))
    app.note("Snapshots of yours can be public: ebsctl share SNAPSHOT --public.")
