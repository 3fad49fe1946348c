"""``ebsctl admission``: what may be made at all; rules by which administrators refuse it."""

from __future__ import annotations

import pwd
from collections.abc import Mapping
from typing import Any

import click

from ebsctl import render
from ebsctl.app import App, Group, UsageFailure
from ebsd.domain.ids import account_of_uid, is_account_id

HEADER = ("ACCOUNT", "ALLOWED KEY", "CHANGED")


@click.group(cls=Group, short_help="Rules that refuse unencrypted volumes, or keys: show, set, remove.")
def admission() -> None:
    """What may be made at all: rules that refuse, where encryption by default only mends.

    A rule refuses every volume, copy, snapshot or import that would be unencrypted, or under a key that it does not
    list: whether the key was named, is the default or a snapshot's. The rule for all accounts binds administrators,
    too. What is there already stays usable. Rules are kept by the key service; refusals are in its audit log.
    """


@admission.command("show")
@click.pass_obj
def show(app: App) -> None:
    """Show the rules that bind you; for administrators, all rules."""
    rules = app.client.control("DescribeAdmissionRules")["Rules"]
    app.emit({"Rules": rules}, render.table(HEADER, _rows(rules), for_people=app.for_people))
    if not rules and app.for_people:
        app.note("There is no rule: everybody may make what he likes.")


@admission.command("set", short_help="Refuse what is not encrypted, or not under a listed key.")
@click.option("--account", metavar="USER", help="Bind this user only: a name, a uid or an account. Else everybody.")
@click.option(
    "--allow-key",
    "allowed",
    metavar="KEY",
    multiple=True,
    help="Allow this key, and no other that is not listed: a key of yours by any name, or an ARN, in which * and ? are "
    "wildcards; may be repeated.",
)
@click.pass_obj
def set_rule(app: App, account: str | None, allowed: tuple[str, ...]) -> None:
    """Refuse what would be unencrypted, or under a key that is not listed. Only for administrators.

    Takes the place of an earlier rule of the same account. Where there is one for all accounts as well, both must
    allow it.

    \b
    Examples:
      ebsctl admission set
      ebsctl admission set --allow-key 'arn:aws:kms:local:000000000000:key/*'
      ebsctl admission set --account alice --allow-key backup
    """
    keys = [_pattern(app, key) for key in allowed]
    rule = app.client.control("PutAdmissionRule", AccountId=_account(account), AllowedKeys=keys)["Rule"]
    app.emit(rule)
    whom = render.printable(rule.get("AccountId", "everybody"))
    app.note(f"From now on {whom} makes nothing unencrypted{' or under another key' if keys else ''}.")


@admission.command("remove")
@click.option("--account", metavar="USER", help="The rule that binds this user only. Else the one for everybody.")
@click.pass_obj
def remove(app: App, account: str | None) -> None:
    """Remove a rule. Only for administrators."""
    app.client.control("DeleteAdmissionRule", AccountId=_account(account))
    app.emit({})
    app.note("The rule is gone.")


def _rows(rules: list[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    return [
        (rule.get("AccountId", "all"), key, rule["ChangeTime"])
        for rule in rules
        for key in rule["AllowedKeys"] or ["any"]
    ]


def _account(user: str | None) -> str | None:
    """Return the account of a user's name, a uid or an account; raises UsageFailure."""
    if user is None or is_account_id(user):
        return user
    if user.isascii() and user.isdecimal():
        return account_of_uid(int(user))
    try:
        return account_of_uid(pwd.getpwnam(user).pw_uid)
    except KeyError:
        raise UsageFailure(f"There is no user {user!r} on this host.", "Give a user's name, uid or account.") from None


def _pattern(app: App, key: str) -> str:
    """Return an ARN as it is, and the ARN of a key that is named otherwise."""
    if key.startswith("arn:") or "*" in key or "?" in key:
        return key
    return str(app.client.kms("DescribeKey", KeyId=key)["KeyMetadata"]["Arn"])
