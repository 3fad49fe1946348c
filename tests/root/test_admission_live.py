"""Admission rules on a real daemon with two users and root: what is refused, what is left, and what is recorded."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from installation import installation
from test_bad_input import World

from ebsd.domain.errors import EbsdError

pytestmark = pytest.mark.timeout(180)

ALICE: Final = 23456
BOB: Final = 23457
REFUSED: Final = (5, "UnauthorizedOperation")


@dataclass
class Ruled(World):
    arns: dict[str, str] = field(default_factory=dict)

    def as_(self, uid: int, *arguments: str) -> Any:
        outcome = self.ctl_as(uid, "--json", *arguments)
        assert outcome.status == 0, (arguments, outcome, self.ebsd.log.read_text()[-2000:])
        return outcome.json if outcome.stdout else None

    def refused(self, uid: int, *arguments: str) -> dict[str, str]:
        """Run a command that a rule refuses, and see that it made nothing."""
        before = self.everything()
        outcome = self.ctl_as(uid, "--json", *arguments)
        assert (outcome.status, outcome.error["Code"]) == REFUSED, (arguments, outcome)
        assert self.everything() == before
        return outcome.error

    def everything(self) -> list[str]:
        client = self.client
        files = [str(f) for place in ("layers", "maps", "records") for f in (self.ebsd.state / place).rglob("*")]
        return sorted(
            [v["VolumeId"] for v in client.ec2("DescribeVolumes")["Volumes"]]
            + [s["SnapshotId"] for s in client.ec2("DescribeSnapshots")["Snapshots"]]
            + [j["JobId"] for j in client.control("DescribeJobs")["Jobs"]]
            + files
        )


@pytest.fixture(scope="module")
def world() -> Iterator[Ruled]:
    # Not below pytest's own directory, which other users may not enter.
    root = Path(tempfile.mkdtemp(prefix="ebsd-admission-"))
    root.chmod(0o755)
    try:
        with installation(root, "allow_unencrypted = true") as ebsd:
            made = Ruled(ebsd)
            for name in ("good", "bad"):
                made.arns[name] = made.as_(ALICE, "key", "create", name)["Arn"]
            made.as_(ALICE, "defaults", "disable-encryption")
            for name, more in {
                "plain": [],
                "well": ["--encrypted", "--key", "good"],
                "ill": ["--encrypted", "--key", "bad"],
            }.items():
                made.as_(ALICE, "create", name, "--size", "1M", *more)
                made.as_(ALICE, "snapshot", name, "--name", f"{name}-snap")
            yield made
    finally:
        shutil.rmtree(root)


@pytest.fixture
def ruled(world: Ruled) -> Iterator[Ruled]:
    """The world, whose rules are gone after each test."""
    yield world
    for rule in world.as_(0, "admission", "show")["Rules"]:
        account = ["--account", rule["AccountId"]] if "AccountId" in rule else []
        world.as_(0, "admission", "remove", *account)


def test_a_rule_for_all_refuses_what_is_unencrypted_of_everybody(ruled: Ruled) -> None:
    ruled.as_(0, "admission", "set")
    ruled.as_(BOB, "defaults", "disable-encryption")
    for uid, *command in (
        (ALICE, "create", "new", "--size", "1M"),
        (ALICE, "create", "new", "--size", "1M", "--no-encrypted"),
        (ALICE, "create", "new", "--from", "plain-snap"),
        (ALICE, "copy", "plain-snap", "--name", "new"),
        (ALICE, "clone", "plain", "new"),
        (ALICE, "import", "/etc/hostname", "new", "--format", "raw"),
        (BOB, "create", "new", "--size", "1M"),
        (0, "create", "new", "--size", "1M", "--no-encrypted"),
    ):
        if uid == 0:
            ruled.as_(0, "defaults", "disable-encryption")
        error = ruled.refused(uid, *command)
        assert "would be unencrypted, and the admission rule for all accounts denies that" in error["Message"]
        assert "add --encrypted" in error["Hint"]
    for name, command in {
        "a": ("create", "a", "--size", "1M", "--encrypted"),
        "b": ("create", "b", "--from", "plain-snap", "--encrypted"),
        "c": ("create", "c", "--from", "ill-snap"),
    }.items():
        assert ruled.as_(ALICE, *command)["Encrypted"]
        ruled.ctl_as(ALICE, "delete", name, "--yes")
    # What is there stays usable, and can be snapshotted: nothing new is made of it.
    assert not ruled.as_(ALICE, "attach", "plain", "--file")["Encrypted"]
    ruled.as_(ALICE, "snapshot", "plain", "--name", "again")
    ruled.as_(ALICE, "detach", "plain")
    ruled.as_(0, "defaults", "enable-encryption")


def test_the_key_is_judged_that_is_used_however_it_came_about(ruled: Ruled) -> None:
    """Named by alias, the account's default, or a snapshot's: the list is of ARNs."""
    good = ruled.arns["good"]
    ruled.as_(0, "admission", "set", "--account", str(ALICE), "--allow-key", good)
    cases = (
        ("named", ["create", "new", "--size", "1M", "--encrypted", "--key", "bad"]),
        ("restore that inherits", ["create", "new", "--from", "ill-snap"]),
        ("clone that inherits", ["clone", "ill", "new"]),
        ("clone under", ["clone", "well", "new", "--key", "bad"]),
        ("restore under", ["create", "new", "--from", "well-snap", "--encrypted", "--key", "bad"]),
        ("copy under", ["copy", "well-snap", "--name", "new", "--encrypted", "--key", "bad"]),
    )
    for _, command in cases:
        error = ruled.refused(ALICE, *command)
        assert ruled.arns["bad"] in error["Message"]
        assert f"the admission rule of 0000000{ALICE}" in error["Message"]
        assert f"--key {good}" in error["Hint"]
    default = ["create", "new", "--size", "1M", "--encrypted"]
    assert "key/" in ruled.refused(ALICE, *default)["Message"]
    assert "key/" in ruled.refused(ALICE, "copy", "well-snap", "--name", "new")["Message"]
    ruled.as_(ALICE, "defaults", "set-key", "good")
    try:
        for name, command in {
            "d": ["create", "d", "--size", "1M", "--encrypted"],
            "e": ["create", "e", "--from", "well-snap"],
            "f": ["copy", "well-snap", "--name", "f"],
            "g": ["create", "g", "--from", "ill-snap", "--encrypted", "--key", "good"],
        }.items():
            assert ruled.as_(ALICE, *command)["KmsKeyId"] == good
            assert ruled.ctl_as(ALICE, "delete", name, "--yes").status == 0
    finally:
        ruled.as_(ALICE, "defaults", "reset-key")
    assert ruled.as_(BOB, "create", "free", "--size", "1M", "--encrypted")["Encrypted"], "Bob is not bound"
    ruled.ctl_as(BOB, "delete", "free", "--yes")


def test_snapshots_that_are_written_block_by_block_are_judged_too(ruled: Ruled) -> None:
    """StartSnapshot of the EBS direct APIs; the caller is root, whom a rule for all accounts binds."""
    ruled.as_(0, "admission", "set", "--allow-key", ruled.arns["good"])
    socket, method = str(ruled.ebsd.socket), "io.ebsd.EBS.StartSnapshot"
    before = ruled.everything()
    for members in ({"Encrypted": True, "KmsKeyArn": ruled.arns["bad"]}, {"Encrypted": True}):
        with pytest.raises(EbsdError, match="the admission rule for all accounts") as caught:
            ruled.client.call(socket, method, {"SizeBytes": 1 << 20, **members})
        assert caught.value.code == "UnauthorizedOperation"
        assert ruled.everything() == before


def test_both_rules_must_admit_and_wildcards_are_those_of_iam(ruled: Ruled) -> None:
    account = ruled.arns["good"].partition("key/")[0]
    ruled.as_(0, "admission", "set", "--allow-key", f"{account}key/*")
    ruled.as_(0, "admission", "set", "--account", str(ALICE), "--allow-key", ruled.arns["bad"])
    command = ["create", "new", "--size", "1M", "--encrypted", "--key"]
    assert f"rule of 0000000{ALICE}" in ruled.refused(ALICE, *command, "good")["Message"]
    assert ruled.as_(ALICE, *command, "bad")["KmsKeyId"] == ruled.arns["bad"]
    assert ruled.ctl_as(ALICE, "delete", "new", "--yes").status == 0
    error = ruled.refused(BOB, "create", "new", "--size", "1M", "--encrypted")
    assert "rule for all accounts" in error["Message"]


def test_only_administrators_change_rules(ruled: Ruled) -> None:
    for command in (["set"], ["set", "--account", str(ALICE)], ["remove"], ["remove", "--account", str(ALICE)]):
        outcome = ruled.ctl_as(ALICE, "--json", "admission", *command)
        assert (outcome.status, outcome.error["Code"]) == REFUSED
        assert "needs root" in outcome.error["Message"]
    ruled.as_(0, "admission", "set", "--account", str(ALICE), "--allow-key", ruled.arns["good"])
    ruled.as_(0, "admission", "set", "--account", str(BOB))
    (seen,) = ruled.as_(ALICE, "admission", "show")["Rules"]
    assert (seen["AccountId"], seen["AllowedKeys"]) == (f"0000000{ALICE}", [ruled.arns["good"]])
    assert len(ruled.as_(0, "admission", "show")["Rules"]) == 2
    for arguments, code, status in (
        (["set", "--allow-key", "arn:aws:kms:local:000000000000:alias/x"], "InvalidParameterValue", 2),
        (["set", "--allow-key", "no-such-alias"], "NotFoundException", 3),
        (["remove"], "Ebsd.AdmissionRuleNotFound", 3),
        (["set", "--account", "no-such-user"], "Usage", 2),
    ):
        outcome = ruled.ctl_as(0, "--json", "admission", *arguments)
        assert (outcome.status, outcome.error["Code"]) == (status, code), outcome


def test_rules_and_refusals_are_in_the_audit_log_and_outlive_the_daemon(ruled: Ruled) -> None:
    ruled.as_(0, "admission", "set", "--account", str(ALICE), "--allow-key", ruled.arns["good"])
    ruled.ebsd.stop()
    ruled.ebsd.start()
    ruled.refused(ALICE, "create", "new", "--size", "1M", "--encrypted", "--key", "bad")

    def last(event: str) -> Any:
        found = ruled.client.audit("LookupEvents", EventName=event, MaxResults=50)["Events"]
        return json.loads(found[-1]["CloudTrailEvent"])

    put = last("PutAdmissionRule")["requestParameters"]
    assert (put["accountId"], put["allowedKeys"]) == (f"0000000{ALICE}", [ruled.arns["good"]])
    refusal = last("Admit")
    assert refusal["errorCode"] == "UnauthorizedOperation"
    assert ruled.arns["bad"] in refusal["errorMessage"]
    assert refusal["userIdentity"]["accountId"] == f"0000000{ALICE}"
    assert refusal["requestParameters"]["keyId"] == ruled.arns["bad"]
