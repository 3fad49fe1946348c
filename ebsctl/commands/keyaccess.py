"""Commands on who may use a key: its policy and its grants."""

from __future__ import annotations

import json
import os
import pwd
from typing import Any

import click

from ebsctl import render
from ebsctl.app import App, UsageFailure
from ebsctl.commands.keys import key, key_reference
from ebsd.domain.errors import MalformedPolicy
from ebsd.domain.ids import account_of_uid, user_arn

MAX_DOCUMENT = 1 << 16
"""Bytes of a policy file that are read; the service takes fewer, and says so."""


@key.command("policy", short_help="Print or set the key policy of KEY.")
@click.argument("reference", metavar="KEY")
@click.option("--set", "file", metavar="FILE", help="Put the policy in FILE (- for standard input) in place of it.")
@click.option("--allow-lockout", is_flag=True, help="With --set: even a policy that you could not change again.")
@click.pass_obj
def key_policy(app: App, reference: str, file: str | None, allow_lockout: bool) -> None:
    """Print the key policy of KEY, an AWS policy document, or set it.

    \b
    Examples:
      ebsctl key policy backup > policy.json
      ebsctl key policy backup --set policy.json
    """
    if file is None:
        if allow_lockout:
            raise UsageFailure("--allow-lockout goes with --set FILE.", "Give the new policy with --set.")
        policy = app.client.kms("GetKeyPolicy", KeyId=key_reference(reference))["Policy"]
        app.emit({"PolicyName": "default", "Policy": policy}, _indented(policy))
        return
    text = _read_document(file)
    members: dict[str, Any] = {"KeyId": key_reference(reference), "Policy": text}
    if allow_lockout:
        members["BypassPolicyLockoutSafetyCheck"] = True
    app.client.kms("PutKeyPolicy", **members)
    app.emit({"PolicyName": "default", "Policy": text})


def _read_document(file: str) -> str:
    try:
        with click.open_file(file, "rb") as source:
            raw: bytes = source.read(MAX_DOCUMENT + 1)
    except OSError as error:
        raise UsageFailure(
            f"The policy file {file} cannot be read: {os.strerror(error.errno or 0)}.", "Look at its name and mode."
        ) from error
    if len(raw) > MAX_DOCUMENT:
        raise MalformedPolicy(reason=f"It is longer than {MAX_DOCUMENT} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise MalformedPolicy(reason="It is not UTF-8 text") from error


def _indented(policy: str) -> str:
    """Return a policy for people to read; it was parsed before it was stored."""
    return json.dumps(json.loads(policy), indent=2, ensure_ascii=False)


# --- grants -----------------------------------------------------------------------------------------------


def principal(text: str) -> str:
    """Return the ARN of a principal: an ARN stays, and a user's name becomes his. Raises UsageFailure."""
    if text.startswith("arn:") or text.endswith(".amazonaws.com"):
        return text
    try:
        user = pwd.getpwnam(text)
    except KeyError:
        raise UsageFailure(f"There is no user {text!r} on this host.", "Give a user's name or an ARN.") from None
    return user_arn(account_of_uid(user.pw_uid), user.pw_name)


@key.command("grant", short_help="Let a user do some operations with KEY.")
@click.argument("reference", metavar="KEY")
@click.option("--to", "grantee", metavar="USER", required=True, help="Who may use the key: a user's name or an ARN.")
@click.option(
    "--operation", "operations", metavar="NAME", multiple=True, required=True, help="Such as Decrypt; repeat."
)
@click.option("--context", "equals", metavar="K=V", multiple=True, help="Only under exactly this encryption context.")
@click.option("--context-subset", "subset", metavar="K=V", multiple=True, help="Only under a context with these pairs.")
@click.option("--retiring", metavar="USER", help="Who may retire the grant.")
@click.option("--name", metavar="NAME", help="Repeating a request of the same name makes no second grant.")
@click.pass_obj
def key_grant(
    app: App,
    reference: str,
    grantee: str,
    operations: tuple[str, ...],
    equals: tuple[str, ...],
    subset: tuple[str, ...],
    retiring: str | None,
    name: str | None,
) -> None:
    """Let a user do some operations with KEY, and print the grant's id.

    \b
    Examples:
      ebsctl key grant backup --to alice --operation Decrypt --operation DescribeKey
      ebsctl key grant backup --to alice --operation Encrypt --context-subset dept=it
    """
    constraints = {
        member: _pairs(pairs)
        for member, pairs in (("EncryptionContextEquals", equals), ("EncryptionContextSubset", subset))
        if pairs
    }
    made = app.client.kms(
        "CreateGrant",
        KeyId=key_reference(reference),
        GranteePrincipal=principal(grantee),
        Operations=list(operations),
        RetiringPrincipal=None if retiring is None else principal(retiring),
        Constraints=constraints or None,
        Name=name,
    )
    # The token is as good as the grant itself, so it is shown to programs that ask for everything, and not on a screen.
    app.emit(made, made["GrantId"])


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageFailure(f"{text!r} is no pair of an encryption context.", "Write it as NAME=VALUE.")
        pairs[name] = value
    return pairs


@key.command("grants", short_help="List the grants of KEY.")
@click.argument("reference", metavar="KEY")
@click.pass_obj
def key_grants(app: App, reference: str) -> None:
    """List the grants of KEY; each attached volume has one, to aws:ec2-infrastructure."""
    found: list[dict[str, Any]] = []
    marker: str | None = None
    while True:
        page = app.client.kms("ListGrants", KeyId=key_reference(reference), Limit=100, Marker=marker)
        found += page["Grants"]
        marker = page.get("NextMarker")
        if not page["Truncated"] or marker is None:
            break
    rows = [
        (
            grant["GrantId"],
            grant.get("Name"),
            grant["GranteePrincipal"],
            ",".join(grant["Operations"]),
            _constraint_text(grant.get("Constraints") or {}),
        )
        for grant in found
    ]
    app.emit({"Grants": found}, render.table(render.GRANT_HEADER, rows, for_people=app.for_people))


def _constraint_text(constraints: dict[str, Any]) -> str | None:
    texts = [
        f"{sign} {','.join(f'{name}={value}' for name, value in sorted((constraints.get(member) or {}).items()))}"
        for member, sign in (("EncryptionContextEquals", "="), ("EncryptionContextSubset", "has"))
        if constraints.get(member) is not None
    ]
    return "; ".join(texts) or None


@key.command("revoke", short_help="Take a grant from KEY.")
@click.argument("reference", metavar="KEY")
@click.argument("grant", metavar="GRANT")
@click.pass_obj
def key_revoke(app: App, reference: str, grant: str) -> None:
    """Take GRANT, an id that `ebsctl key grants` shows, from KEY; what is attached goes on."""
    app.client.kms("RevokeGrant", KeyId=key_reference(reference), GrantId=grant)
    app.emit({"GrantId": grant})


@key.command("retire", short_help="Give up a grant that was made for you.")
@click.argument("reference", metavar="KEY")
@click.argument("grant", metavar="GRANT")
@click.pass_obj
def key_retire(app: App, reference: str, grant: str) -> None:
    """Give up GRANT, which was made for you or which you may retire. KEY is the key's ARN when it is not yours."""
    app.client.kms("RetireGrant", KeyId=key_reference(reference), GrantId=grant)
    app.emit({"GrantId": grant})
