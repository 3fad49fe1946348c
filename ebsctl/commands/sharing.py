"""``ebsctl share``: who else can make volumes and copies from a snapshot."""

from __future__ import annotations

import pwd
from collections.abc import Sequence
from typing import Any, Final

import click

from ebsctl import render
from ebsctl.app import App, Command, UsageFailure
from ebsctl.lookup import complete_snapshot
from ebsd.domain.errors import UserNotFound
from ebsd.domain.ids import account_of_uid, uid_of_account

ATTRIBUTE: Final = "createVolumePermission"
_ACCOUNT_DIGITS: Final = 12


def account_of(user: str, *, must_exist: bool = True) -> str:
    """Return the account of a user: his name, his uid, or the 12 digits themselves. Raises UserNotFound."""
    try:
        if not (user.isascii() and user.isdecimal()):
            return account_of_uid(pwd.getpwnam(user).pw_uid)
        if len(user) == _ACCOUNT_DIGITS:
            return user
        return account_of_uid(pwd.getpwuid(int(user)).pw_uid if must_exist else int(user))
    except (KeyError, OverflowError):
        raise UserNotFound(user=user) from None


def user_of(account: str) -> str:
    """Return the name of an account's user, or "" where there is none."""
    try:
        return pwd.getpwuid(uid_of_account(account)).pw_name  # type: ignore[arg-type]
    except (KeyError, OverflowError, ValueError):
        return ""


@click.command(cls=Command, short_help="Let other users use a snapshot.")
@click.argument("snapshot", shell_complete=complete_snapshot)
@click.argument("users", metavar="[USER]...", nargs=-1)
@click.option("--add", "action", flag_value="add", help="Share it with these users.")
@click.option("--remove", "action", flag_value="remove", help="Stop sharing it with them.")
@click.option("--public", "action", flag_value="public", help="Share it with everybody on this host, unencrypted.")
@click.option("--private", "action", flag_value="private", help="End --public; named users keep it.")
@click.option("--reset", "action", flag_value="reset", help="Share it with nobody.")
@click.option("--show", "action", flag_value="show", help="Print whom it is shared with; also without any option.")
@click.pass_obj
def share(app: App, snapshot: str, users: tuple[str, ...], action: str | None) -> None:
    """Let other users make volumes and copies from SNAPSHOT and read its blocks, or show who can.

    USER is a name, a uid or the 12 digits of an account. They name the snapshot by its id, and see it in `ebsctl list
    snapshots`; what they make of it is theirs, under keys of theirs, and needs all its data to be copied. They cannot
    change, verify, export, share or delete it.

    An encrypted snapshot takes two permissions: this one, and one for its key (`ebsctl key policy` or `key grant`):
    DescribeKey, CreateGrant, GenerateDataKeyWithoutPlaintext, ReEncryptFrom, ReEncryptTo and Decrypt. Under
    alias/aws/ebs it cannot be shared: make a copy under a key of yours. Who made something of it keeps that whatever
    is taken back later. A permission is its uid's, whoever has that.

    \b
    Examples:
      ebsctl share monday --add alice bob
      ebsctl share monday --remove bob
      ebsctl share monday
      ebsctl create mine --from snap-0123456789abcdef0      (by alice)
    """
    _check(users, action)
    if action in ("add", "remove"):
        accounts = [account_of(user, must_exist=action == "add") for user in users]
        app.client.ec2("ModifySnapshotAttribute", SnapshotId=snapshot, OperationType=action, UserIds=accounts)
    elif action in ("public", "private"):
        operation = "add" if action == "public" else "remove"
        app.client.ec2("ModifySnapshotAttribute", SnapshotId=snapshot, OperationType=operation, GroupNames=["all"])
    elif action == "reset":
        app.client.ec2("ResetSnapshotAttribute", SnapshotId=snapshot, Attribute=ATTRIBUTE)
    if action in (None, "show") or app.as_json:
        _show(app, app.client.ec2("DescribeSnapshotAttribute", SnapshotId=snapshot, Attribute=ATTRIBUTE))


def _check(users: Sequence[str], action: str | None) -> None:
    if action in ("add", "remove") and not users:
        raise UsageFailure(f"--{action} needs users.", f"Name them: ebsctl share SNAPSHOT --{action} USER...")
    if users and action not in ("add", "remove"):
        raise UsageFailure("Users go with --add or --remove.", "Say which: ebsctl share SNAPSHOT --add USER...")


def _show(app: App, document: dict[str, Any]) -> None:
    rows = []
    for permission in document["CreateVolumePermissions"]:
        account = permission.get("UserId")
        rows.append([permission["Group"], ""] if account is None else [account, render.printable(user_of(account))])
    app.emit(document, render.table(["ACCOUNT", "USER"], rows, for_people=app.for_people))
    if not rows and app.for_people:
        app.note("It is shared with nobody.")
