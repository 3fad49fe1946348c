"""``ebsctl defaults``: the account's encryption by default and default key."""

from __future__ import annotations

import click

from ebsctl import render
from ebsctl.app import App, Group


@click.group(cls=Group, short_help="Encryption by default, and the default key.")
def defaults() -> None:
    """What new volumes get when `create` does not say: encryption and the key. Each user has their own."""


@defaults.command("show")
@click.pass_obj
def show(app: App) -> None:
    """Show encryption by default and the default key."""
    document = {**app.client.ec2("GetEbsEncryptionByDefault"), **app.client.ec2("GetEbsDefaultKmsKeyId")}
    app.emit(document, render.fields(document.items(), for_people=app.for_people))


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
