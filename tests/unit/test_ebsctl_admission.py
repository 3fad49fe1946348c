"""``ebsctl admission``: what it asks of ebsd, and how it shows rules."""

from __future__ import annotations

import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest
from ebsctl_fakes import KEY_1, Bench, key

ARN = key(KEY_1)["Arn"]
USER = pwd.getpwall()[0]
ACCOUNT = f"{USER.pw_uid:012d}"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.server.close()


def test_without_rules_nothing_is_printed_but_a_note(bench: Bench) -> None:
    result = bench.run("admission", "show")
    assert (result.exit_code, result.stdout) == (0, "")
    assert bench.document("admission", "show") == {"Rules": []}


@pytest.mark.parametrize("named", [USER.pw_name, str(USER.pw_uid), ACCOUNT])
def test_a_rule_binds_a_user_by_name_uid_or_account(bench: Bench, named: str) -> None:
    assert bench.document("admission", "set", "--account", named)["AccountId"] == ACCOUNT
    assert bench.server.parameters("Control.PutAdmissionRule") == {"AccountId": ACCOUNT, "AllowedKeys": []}
    assert bench.ok("admission", "show") == f"{ACCOUNT}\tany\t2026-01-02T03:04:05Z\n"
    bench.ok("admission", "remove", "--account", named)
    assert bench.error(3, "admission", "remove", "--account", named)["Code"] == "Ebsd.AdmissionRuleNotFound"


def test_keys_are_resolved_and_patterns_stay(bench: Bench) -> None:
    bench.ok("key", "create")
    patterns = ["arn:aws:kms:local:000000000000:key/*", "*"]
    bench.ok("admission", "set", *(word for k in (KEY_1, *patterns) for word in ("--allow-key", k)))
    assert bench.server.parameters("Control.PutAdmissionRule") == {"AllowedKeys": [ARN, *patterns]}
    lines = bench.ok("admission", "show").splitlines()
    assert [line.split("\t")[:2] for line in lines] == [["all", ARN], ["all", patterns[0]], ["all", "*"]]


def test_a_user_that_is_not_there_is_a_usage_error(bench: Bench) -> None:
    error = bench.error(2, "admission", "set", "--account", "no-such-user-of-this-host")
    assert "no-such-user-of-this-host" in error["Message"]
    assert bench.server.calls == []
