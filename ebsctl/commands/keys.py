"""Commands on keys, for the key service: create, list, show, enable, disable, alias, backup, restore."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from ebsctl import render
from ebsctl.app import App, Group, UsageFailure
from ebsctl.lookup import matches
from ebsctl.mounting import with_more_hint
from ebsctl.render import Document
from ebsctl.terminal import passphrase_pipe, read_passphrase
from ebsd.domain.errors import (
    AliasExists,
    EbsdError,
    IncorrectState,
    InvalidAliasName,
    InvalidParameterValue,
    RemoteError,
)
from ebsd.domain.ids import foreign_region, is_alias, is_key_id

ALIAS = "alias/"
RESERVED_ALIAS = "alias/aws/"


def names_a_key(text: str) -> bool:
    """Say whether a text that may name anything names a key: an id, an ARN or ``alias/NAME``."""
    return is_key_id(text) or text.startswith((ALIAS, "arn:aws:kms:")) or foreign_region(text) is not None


def key_reference(text: str) -> str:
    """Return KMS's KeyId for what the user wrote: a bare word is an alias."""
    return text if names_a_key(text) or text.startswith("arn:") else ALIAS + text


def alias_name(text: str) -> str:
    """Return ``alias/NAME`` for NAME or ``alias/NAME``; raises InvalidAliasName."""
    alias = text if text.startswith(ALIAS) else ALIAS + text
    if not is_alias(alias):
        raise InvalidAliasName(alias=text, reason="it has characters or a length that aliases do not have")
    if alias.startswith(RESERVED_ALIAS):
        raise InvalidAliasName(alias=text, reason=f"{RESERVED_ALIAS} is reserved for keys that the service makes")
    return alias


def describe_key(app: App, reference: str) -> dict[str, Any]:
    """Return the KeyMetadata of what the user wrote."""
    metadata: dict[str, Any] = app.client.kms("DescribeKey", KeyId=key_reference(reference))["KeyMetadata"]
    return metadata


def key_to_change(app: App, reference: str) -> str:
    """Return the id of a key; of one of AWS the ARN, by which the key service refuses to change it and says how to."""
    metadata = describe_key(app, reference)
    return str(metadata["KeyId"] if foreign_region(metadata["Arn"]) is None else metadata["Arn"])


def emit_key(app: App, reference: str) -> None:
    """Print one key with its aliases."""
    metadata = describe_key(app, reference)
    try:
        found = app.client.kms("ListAliases", KeyId=metadata["Arn"])["Aliases"]
    except RemoteError as error:
        if error.code != "AccessDeniedException":
            raise
        found = []  # somebody else's key, which this user may describe and no more
    document = {**metadata, "Aliases": found}
    app.emit(document, render.fields(render.key_fields(document), for_people=app.for_people))


def emit_keys(app: App, filters: Sequence[Mapping[str, Any]] | None) -> None:
    """Print the caller's keys that match, each with its aliases."""
    aliases = app.client.kms("ListAliases")["Aliases"]
    keys: list[Document] = []
    for entry in app.client.kms("ListKeys")["Keys"]:
        try:
            metadata = app.client.kms("DescribeKey", KeyId=entry["KeyId"])["KeyMetadata"]
        except RemoteError as error:
            if error.code == "NotFoundException":  # gone since it was listed
                continue
            raise
        keys.append({**metadata, "Aliases": [a for a in aliases if a.get("TargetKeyId") == entry["KeyId"]]})
    shown = [key for key in keys if matches(key, filters, "keys")]
    rows = [render.key_row(key) for key in shown]
    app.emit({"Keys": shown}, render.table(render.KEY_HEADER, rows, for_people=app.for_people))
    if not shown and app.for_people:
        app.note("No key matches." if filters else "No keys yet: ebsctl key create NAME")


@click.group(cls=Group)
def key() -> None:
    """Keys (KMS keys) that encrypt the data keys of volumes.

    KEY is an alias (backup or alias/backup), a key id or a key ARN. Keys of AWS KMS, where the configuration has
    [key_service.aws], are named by ARN; they are shown here, and administered with `aws kms`.
    """


@key.command("create", short_help="Create a key, with an alias if given.")
@click.argument("name", required=False)
@click.option("--description", metavar="TEXT", help="What the key is for.")
@click.option("--spec", metavar="SPEC", help="Key spec; volumes need SYMMETRIC_DEFAULT, the default.")
@click.pass_obj
def key_create(app: App, name: str | None, description: str | None, spec: str | None) -> None:
    """Create a key, with the alias NAME if given, and print its id.

    \b
    Examples:
      ebsctl key create backup --description "off-site copies"
      ebsctl create data --size 10G --encrypted --key backup
    """
    alias = None if name is None else alias_name(name)
    # A key cannot be deleted at once, so the alias is checked before the key is made.
    if alias is not None and any(entry["AliasName"] == alias for entry in app.client.kms("ListAliases")["Aliases"]):
        raise AliasExists(alias=alias)
    metadata = app.client.kms("CreateKey", Description=description, KeySpec=spec)["KeyMetadata"]
    if alias is not None:
        try:
            app.client.kms("CreateAlias", AliasName=alias, TargetKeyId=metadata["KeyId"])
        except EbsdError as error:
            key_id = metadata["KeyId"]
            text = f"The key {key_id} was made without an alias: ebsctl key alias create NAME {key_id}"
            raise with_more_hint(error, text) from error.__cause__
    app.emit(metadata, metadata["KeyId"])
    if not app.as_json and app.is_administrator():
        app.note("hint: back up your keys: ebsctl key backup FILE")


@key.command("list", short_help="List your keys.")
@click.pass_obj
def key_list(app: App) -> None:
    """List your keys; the same as `ebsctl list keys`."""
    emit_keys(app, None)


@key.command("show")
@click.argument("reference", metavar="KEY")
@click.pass_obj
def key_show(app: App, reference: str) -> None:
    """Show one key and its aliases."""
    emit_key(app, reference)


@key.command("enable")
@click.argument("reference", metavar="KEY")
@click.pass_obj
def key_enable(app: App, reference: str) -> None:
    """Make a disabled key usable again."""
    _switch(app, reference, "EnableKey")


@key.command("disable", short_help="Make a key unusable until it is enabled.")
@click.argument("reference", metavar="KEY")
@click.pass_obj
def key_disable(app: App, reference: str) -> None:
    """Make a key unusable until it is enabled; attached volumes go on."""
    _switch(app, reference, "DisableKey")


def _switch(app: App, reference: str, action: str) -> None:
    # KMS takes an id here, but no alias.
    key_id = key_to_change(app, reference)
    app.client.kms(action, KeyId=key_id)
    if app.as_json:
        app.emit(describe_key(app, key_id))


# --- aliases ----------------------------------------------------------------------------------------------


@key.group("alias")
def key_alias() -> None:
    """Names of keys. NAME may be written with or without alias/ before it."""


@key_alias.command("create")
@click.argument("name")
@click.argument("reference", metavar="KEY")
@click.pass_obj
def alias_create(app: App, name: str, reference: str) -> None:
    """Let NAME name KEY."""
    _point(app, "CreateAlias", name, reference)


@key_alias.command("update", short_help="Let the existing alias NAME name KEY from now on.")
@click.argument("name")
@click.argument("reference", metavar="KEY")
@click.pass_obj
def alias_update(app: App, name: str, reference: str) -> None:
    """Let the existing alias NAME name KEY from now on; volumes stay under the key they were made with."""
    _point(app, "UpdateAlias", name, reference)


def _point(app: App, action: str, name: str, reference: str) -> None:
    alias = alias_name(name)
    key_id = key_to_change(app, reference)
    app.client.kms(action, AliasName=alias, TargetKeyId=key_id)
    app.emit({"AliasName": alias, "TargetKeyId": key_id})


@key_alias.command("delete")
@click.argument("name")
@click.pass_obj
def alias_delete(app: App, name: str) -> None:
    """Delete the alias NAME; its key stays."""
    alias = alias_name(name)
    app.client.kms("DeleteAlias", AliasName=alias)
    app.emit({"AliasName": alias})


@key_alias.command("list")
@click.pass_obj
def alias_list(app: App) -> None:
    """List your aliases and the keys they name."""
    aliases = app.client.kms("ListAliases")["Aliases"]
    rows = [(entry["AliasName"], entry.get("TargetKeyId")) for entry in aliases]
    app.emit({"Aliases": aliases}, render.table(render.ALIAS_HEADER, rows, for_people=app.for_people))


# --- backup and restore -----------------------------------------------------------------------------------


def passphrase_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --passphrase-file and --passphrase-fd."""
    for option in (
        click.option("--passphrase-file", metavar="PATH", help="Read the passphrase from a file."),
        click.option("--passphrase-fd", metavar="N", type=click.IntRange(min=0), help="Read it from a descriptor."),
    ):
        command = option(command)
    return command


def check_sources(passphrase_fd: int | None, passphrase_file: str | None) -> None:
    """Raise UsageFailure when both are given."""
    if passphrase_fd is not None and passphrase_file is not None:
        raise UsageFailure("--passphrase-fd and --passphrase-file exclude each other.", "Give one of them.")


@key.command("backup", short_help="Write all keys to a file, under a passphrase.")
@click.argument("file", type=click.Path())
@passphrase_options
@click.pass_obj
def key_backup(app: App, file: str, passphrase_fd: int | None, passphrase_file: str | None) -> None:
    """Write all keys to the new FILE, sealed under a passphrase. Only for administrators.

    Without the keys no encrypted volume can be read: keep the file away from this host, and the passphrase
    away from the file. A line feed at the end of a passphrase from a file or descriptor does not count.
    """
    check_sources(passphrase_fd, passphrase_file)
    if file == "-":
        raise UsageFailure(
            "The backup needs a file, not standard output.", "Write it to a file that only you can read."
        )
    if os.path.lexists(file):  # before the passphrase is typed; O_EXCL decides
        raise _exists(file)
    if not os.path.isdir(os.path.dirname(os.path.abspath(file))):
        raise InvalidParameterValue(value=file, parameter="FILE", reason="its directory does not exist")
    passphrase = read_passphrase(descriptor=passphrase_fd, path=passphrase_file, twice=True)
    try:
        destination = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as exc:
        raise _exists(file) from exc
    except OSError as exc:
        raise InvalidParameterValue(value=file, parameter="FILE", reason=exc.strerror) from exc
    try:
        try:
            reply = _with_passphrase(app, "Backup", "Destination", destination, passphrase)
            os.fsync(destination)
        finally:
            os.close(destination)
    except BaseException:
        # It holds nothing, or a part that nobody can restore.
        with contextlib.suppress(OSError):
            os.unlink(file)
        raise
    app.emit({"Keys": reply["Keys"], "Bytes": reply["Bytes"]})
    app.note(f"note: keys in {file}: {reply['Keys']}; without the passphrase it is worthless")


def _exists(file: str) -> IncorrectState:
    error = IncorrectState(reason=f"{file} exists already")
    error.hint = "Name a new file: a backup never replaces another."
    return error


@key.command("restore", short_help="Take the keys of a backup file.")
@click.argument("file", type=click.Path())
@passphrase_options
@click.pass_obj
def key_restore(app: App, file: str, passphrase_fd: int | None, passphrase_file: str | None) -> None:
    """Take the keys of a backup FILE. Only for administrators.

    Refused unless the key service has no keys yet, or cannot read its own.
    """
    check_sources(passphrase_fd, passphrase_file)
    try:
        source = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise InvalidParameterValue(value=file, parameter="FILE", reason=exc.strerror) from exc
    try:
        passphrase = read_passphrase(descriptor=passphrase_fd, path=passphrase_file, twice=False)
        reply = _with_passphrase(app, "Restore", "Source", source, passphrase)
    finally:
        os.close(source)
    app.emit({"Keys": reply["Keys"]})
    app.note(f"note: keys restored: {reply['Keys']}")


def _with_passphrase(app: App, method: str, member: str, descriptor: int, passphrase: bytes) -> dict[str, Any]:
    """Call Backup or Restore: descriptor 0 of the message is the file, 1 the passphrase."""
    pipe = passphrase_pipe(passphrase)
    try:
        return app.client.key_service(method, (descriptor, pipe), **{member: 0, "PassphraseDescriptor": 1})
    finally:
        os.close(pipe)
