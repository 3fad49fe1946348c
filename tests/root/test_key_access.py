"""Key policies and grants as their users meet them: root, an owner and a stranger at the sockets, through ebsctl."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from installation import BIN, Installation, Outcome, installation

OWNER, STRANGER = 31001, 31002
OWNER_ACCOUNT = f"{OWNER:012}"
STRANGER_ARN = f"arn:aws:iam::{STRANGER:012}:user/{STRANGER}"


pytestmark = pytest.mark.other_user


@pytest.fixture(scope="module")
def ebsd() -> Iterator[Installation]:
    root = Path(tempfile.mkdtemp(prefix="ebsd-access-"))
    root.chmod(0o711)
    try:
        with installation(root) as made:
            yield made
    finally:
        shutil.rmtree(root)


def run_as(ebsd: Installation, uid: int, *arguments: str | Path, stdin: str | None = None) -> Outcome:
    """Run ebsctl as another user."""
    ctl = (BIN / "ebsctl", "--socket", ebsd.socket)
    done = subprocess.run(
        ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *ctl, *arguments],
        input=stdin,
        stdin=None if stdin is not None else subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def ok(outcome: Outcome) -> str:
    assert outcome.status == 0, outcome.stderr
    return outcome.stdout.strip()


def refused(outcome: Outcome, code: str, status: int = 5) -> None:
    assert outcome.status == status, outcome
    assert code in outcome.stderr


def test_the_story_of_a_key_of_two_users(ebsd: Installation) -> None:
    key = ok(run_as(ebsd, OWNER, "key", "create", "team"))
    arn = json.loads(ok(run_as(ebsd, OWNER, "--json", "key", "show", "team")))["Arn"]
    refused(run_as(ebsd, STRANGER, "key", "show", arn), "AccessDeniedException")
    refused(run_as(ebsd, STRANGER, "key", "show", key), "NotFoundException", 3)
    refused(run_as(ebsd, STRANGER, "create", "mine", "--size", "8M", "--encrypted", "--key", arn), "AccessDenied")

    policy = json.loads(ok(run_as(ebsd, OWNER, "key", "policy", "team")))
    assert policy["Statement"][0]["Principal"]["AWS"] == f"arn:aws:iam::{OWNER_ACCOUNT}:root"
    policy["Statement"].append(
        {
            "Sid": "Volumes of the other user, through ebsd only",
            "Effect": "Allow",
            "Principal": {"AWS": STRANGER_ARN},
            "Action": ["kms:DescribeKey", "kms:GenerateDataKeyWithoutPlaintext", "kms:CreateGrant", "kms:ReEncrypt*"],
            "Resource": "*",
            "Condition": {"StringEquals": {"kms:ViaService": "ec2.local.amazonaws.com"}},
        }
    )
    ok(run_as(ebsd, OWNER, "key", "policy", "team", "--set", "-", stdin=json.dumps(policy)))
    ok(run_as(ebsd, STRANGER, "create", "mine", "--size", "8M", "--encrypted", "--key", arn))
    block = ok(run_as(ebsd, STRANGER, "attach", "mine", "--file"))
    assert Path(block).name.startswith("vol-")
    (grant,) = json.loads(ok(run_as(ebsd, OWNER, "--json", "key", "grants", "team")))["Grants"]
    assert grant["Operations"] == ["Decrypt"]
    refused(run_as(ebsd, STRANGER, "key", "grants", arn), "AccessDeniedException")
    refused(run_as(ebsd, STRANGER, "key", "revoke", arn, grant["GrantId"]), "AccessDeniedException")
    ok(run_as(ebsd, OWNER, "key", "revoke", "team", grant["GrantId"]))
    assert json.loads(ok(run_as(ebsd, OWNER, "--json", "key", "grants", "team")))["Grants"] == []
    data = os.urandom(1 << 20)
    with open(block, "r+b", buffering=0) as file:  # the volume goes on
        file.write(data)
        os.fsync(file)
    ok(run_as(ebsd, STRANGER, "snapshot", "mine", "--name", "after-revocation"))
    ok(run_as(ebsd, STRANGER, "detach", "mine"))
    with open(ok(run_as(ebsd, STRANGER, "attach", "mine", "--file")), "rb", buffering=0) as file:
        assert file.read(1 << 20) == data
    (again,) = json.loads(ok(run_as(ebsd, OWNER, "--json", "key", "grants", "team")))["Grants"]
    assert again["GrantId"] != grant["GrantId"]
    ok(run_as(ebsd, STRANGER, "delete", "after-revocation", "--yes"))
    ok(run_as(ebsd, STRANGER, "detach", "mine"))

    del policy["Statement"][-1]
    ok(run_as(ebsd, OWNER, "key", "policy", "team", "--set", "-", stdin=json.dumps(policy)))
    denied = run_as(ebsd, STRANGER, "attach", "mine", "--file")
    assert denied.status in (5, 6)
    assert "AccessDenied" in denied.stderr or "CustomerKeyHasBeenRevoked" in denied.stderr
    ok(run_as(ebsd, STRANGER, "delete", "mine", "--yes"))


def test_root_acts_for_the_owner_and_mends_a_locked_key(ebsd: Installation) -> None:
    ok(run_as(ebsd, OWNER, "key", "create", "locked"))
    arn = json.loads(ok(run_as(ebsd, OWNER, "--json", "key", "show", "locked")))["Arn"]
    deny = {"Effect": "Deny", "Principal": "*", "Action": "kms:*", "Resource": "*"}
    document = json.dumps({"Version": "2012-10-17", "Statement": [deny]})
    refused(run_as(ebsd, OWNER, "key", "policy", "locked", "--set", "-", stdin=document), "MalformedPolicyDocument", 2)
    ok(run_as(ebsd, OWNER, "key", "policy", "locked", "--set", "-", "--allow-lockout", stdin=document))
    refused(run_as(ebsd, OWNER, "key", "show", "locked"), "AccessDeniedException")
    refused(run_as(ebsd, OWNER, "key", "policy", "locked"), "AccessDeniedException")
    policy = json.loads(ebsd.ok("key", "policy", arn))
    assert policy["Statement"] == [deny]
    policy["Statement"][0] |= {"Effect": "Allow", "Principal": {"AWS": OWNER_ACCOUNT}}
    outcome = ebsd.ctl("key", "policy", arn, "--set", "-", stdin=json.dumps(policy).encode())
    assert outcome.status == 0, outcome.stderr
    ok(run_as(ebsd, OWNER, "key", "show", "locked"))


def test_grants_for_another_user(ebsd: Installation) -> None:
    ok(run_as(ebsd, OWNER, "key", "create", "lent"))
    arn = json.loads(ok(run_as(ebsd, OWNER, "--json", "key", "show", "lent")))["Arn"]
    made = ok(run_as(ebsd, OWNER, "key", "grant", "lent", "--to", STRANGER_ARN, "--operation", "DescribeKey"))
    ok(run_as(ebsd, STRANGER, "key", "show", arn))
    assert made in ok(run_as(ebsd, OWNER, "key", "grants", "lent"))
    ok(run_as(ebsd, OWNER, "key", "revoke", "lent", made))
    refused(run_as(ebsd, STRANGER, "key", "show", arn), "AccessDeniedException")


def test_a_rotation_leaves_volumes_as_they_are(ebsd: Installation) -> None:
    ok(run_as(ebsd, OWNER, "key", "create", "turning"))
    ok(run_as(ebsd, OWNER, "create", "old", "--size", "8M", "--encrypted", "--key", "turning"))
    Path(ok(run_as(ebsd, OWNER, "attach", "old", "--file")))
    ok(run_as(ebsd, OWNER, "detach", "old"))
    ok(run_as(ebsd, OWNER, "key", "rotation", "turning", "--now"))
    ok(run_as(ebsd, OWNER, "key", "rotation", "turning", "--enable", "--days", "100"))
    shown = json.loads(ok(run_as(ebsd, OWNER, "--json", "key", "rotation", "turning")))
    assert (shown["KeyRotationEnabled"], shown["RotationPeriodInDays"]) == (True, 100)
    assert [entry["KeyMaterialState"] for entry in shown["Rotations"]] == ["NON_CURRENT", "CURRENT"]
    text = ok(run_as(ebsd, OWNER, "key", "rotation", "turning"))
    assert "ON_DEMAND" in text
    ok(run_as(ebsd, OWNER, "attach", "old", "--file"))
    ok(run_as(ebsd, OWNER, "snapshot", "old", "--name", "old-1"))
    ok(run_as(ebsd, OWNER, "create", "new", "--from", "old-1"))
    ok(run_as(ebsd, OWNER, "attach", "new", "--file"))
    for name in ("new", "old"):
        ok(run_as(ebsd, OWNER, "detach", name))
    for name in ("new", "old-1", "old"):
        ok(run_as(ebsd, OWNER, "delete", name, "--yes"))


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "status"),
    [
        (("key", "policy", "wrong", "--set", "-"), "{", "MalformedPolicyDocumentException", 2),
        (("key", "policy", "wrong", "--set", "-"), "{}", "MalformedPolicyDocumentException", 2),
        (("key", "policy", "wrong", "--set", "-"), "x" * 70000, "MalformedPolicyDocumentException", 2),
        (("key", "policy", "wrong", "--set", "/nonexistent"), None, "cannot be read", 2),
        (("key", "policy", "wrong", "--allow-lockout"), None, "--set", 2),
        (("key", "policy", "nowhere"), None, "NotFoundException", 3),
        (("key", "grant", "wrong", "--to", "no-such-user", "--operation", "Decrypt"), None, "no user", 2),
        (("key", "grant", "wrong", "--to", STRANGER_ARN, "--operation", "Fly"), None, "ValidationException", 2),
        (("key", "grant", "wrong", "--to", STRANGER_ARN), None, "--operation", 2),
        (
            ("key", "grant", "wrong", "--to", STRANGER_ARN, "--operation", "Decrypt", "--context", "x"),
            None,
            "NAME=VALUE",
            2,
        ),
        (("key", "rotation", "wrong", "--now", "--enable"), None, "three commands", 2),
        (("key", "rotation", "wrong", "--days", "100"), None, "--enable", 2),
        (("key", "rotation", "wrong", "--enable", "--days", "10"), None, "ValidationException", 2),
        (("key", "rotation", "alias/aws/ebs", "--now"), None, "AccessDeniedException", 5),
        (("key", "revoke", "wrong", "0" * 64), None, "InvalidGrantIdException", 3),
        (("key", "policy", "alias/aws/ebs", "--set", "-"), "{}", "AccessDeniedException", 5),
    ],
)
def test_wrong_commands(
    ebsd: Installation, arguments: tuple[str, ...], stdin: str | None, code: str, status: int
) -> None:
    if "wrong" not in ok(run_as(ebsd, OWNER, "key", "alias", "list")):
        ok(run_as(ebsd, OWNER, "key", "create", "wrong"))
    outcome = run_as(ebsd, OWNER, *arguments, stdin=stdin)
    assert outcome.status == status, outcome
    assert code in outcome.stderr
    assert "Traceback" not in outcome.stderr
