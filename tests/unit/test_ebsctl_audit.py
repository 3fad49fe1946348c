"""``ebsctl audit`` against a real key broker: looking, following, taking the key away, verifying here and elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from kms_rig import VOLUME, context
from test_kms_process import Host

from ebsctl import render
from ebsctl.cli import cli
from ebsctl.client import Client
from ebsctl.commands.audit import start_time
from ebsd.domain.errors import InvalidParameterValue, RemoteError

UID = os.getuid()


class Installation:
    """A broker as ebsd starts it, with some history."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.host = Host(directory)
        self.host.start()
        self.client = Client(str(directory / "ebsd.sock"))

    def fill(self) -> None:
        self.arn: str = self.client.kms("CreateKey")["KeyMetadata"]["Arn"]
        self.client.kms("CreateAlias", AliasName="alias/team", TargetKeyId=self.arn)
        wanted = {"KeyId": self.arn, "NumberOfBytes": 64, "EncryptionContext": context(team="blue")}
        self.ebsd("GenerateDataKeyWithoutPlaintext", Caller={"Uid": UID, "Name": "owner"}, **wanted)
        with pytest.raises(RemoteError):
            self.ebsd("GenerateDataKeyWithoutPlaintext", Caller={"Uid": UID + 1, "Name": "stranger"}, **wanted)
        self.client.kms("DisableKey", KeyId=self.arn)
        with pytest.raises(RemoteError):
            self.client.kms("GenerateDataKeyWithoutPlaintext", KeyId=self.arn, NumberOfBytes=64)

    @property
    def log(self) -> Path:
        return self.directory / "state" / "audit"

    def ebsd(self, method: str, **parameters: Any) -> dict[str, Any]:
        reply = self.client.call(str(self.directory / "kms.sock"), f"io.ebsd.Broker.{method}", parameters)
        for descriptor in reply.descriptors:
            os.close(descriptor)
        return reply.parameters

    def run(self, *words: str) -> Result:
        return CliRunner().invoke(cli, ["--socket", str(self.directory / "ebsd.sock"), *words])

    def ok(self, *words: str) -> str:
        result = self.run(*words)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    def records(self, *words: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.ok("audit", "--json", *words))["Records"]
        return found

    def names(self, *words: str) -> list[str]:
        return [record["eventName"] for record in self.records(*words)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    installation = Installation(tmp_path_factory.mktemp("audit"))
    try:
        installation.fill()
        yield installation
    finally:
        installation.host.end()


def test_looking(made: Installation) -> None:
    names = made.names()
    assert names[0] == "BeginAuditChain"
    assert [name for name in names if name not in ("BeginAuditChain", "DescribeKey")][:2] == [
        "CreateKey",
        "CreateAlias",
    ]
    for words, expected in (
        (("--event", "DisableKey"), {"DisableKey"}),
        (("--volume", VOLUME), {"GenerateDataKeyWithoutPlaintext"}),
        (("--errors", "--event", "GenerateDataKeyWithoutPlaintext", "--user", str(UID).zfill(12)), None),
        (("--key", made.arn), None),
        (("--key", "team"), None),
        (("--since", "1h"), None),
    ):
        found = made.names(*words)
        assert found, words
        assert expected is None or set(found) == expected
    assert made.names("--key", "0" * 8 + "-0000-4000-8000-" + "0" * 12) == []
    assert made.names("--since", "2999-01-01") == []
    assert made.names("--user", "nobody-like-this") == []
    (record,) = made.records("--volume", VOLUME, "--user", "owner")
    assert record["requestParameters"]["encryptionContext"] == context(team="blue")
    errors = made.records("--errors")
    assert {record["errorCode"] for record in errors} >= {"DisabledException"}


def test_what_people_and_scripts_see(made: Installation) -> None:
    line = made.ok("audit", "--event", "DisableKey").splitlines()[0].split("\t")
    assert line[1] == "DisableKey"
    assert line[4] == made.arn.rpartition("/")[2]
    nothing = made.run("audit", "--event", "NoSuchThing")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "No such records" in nothing.stderr
    text = render.table(render.AUDIT_HEADER, [render.audit_row(made.records()[0])], for_people=True)
    assert "ebsd-kms" in text


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--since", "yesterday"], 2),
        (["--verify", "--errors"], 2),
        (["--verify", "--take-key", "x"], 2),
        (["--head", "1:" + "0" * 64], 2),
        (["--verify", "--head", "1:xyz"], 2),
        (["--verify", "--private-key", "/no/such/file"], 2),
        (["--verify", "--log", "/no/such/directory"], 2),
        (["--key", "nothing-of-this-name"], 3),
    ],
)
def test_what_is_no_command(made: Installation, words: list[str], status: int) -> None:
    assert made.run("audit", *words).exit_code == status


def test_following_shows_what_comes(made: Installation) -> None:
    command = [sys.executable, "-m", "ebsctl", "--socket", str(made.directory / "ebsd.sock")]
    with subprocess.Popen(
        [*command, "audit", "--follow", "--json", "--event", "EnableKey"], stdout=subprocess.PIPE
    ) as tail:
        try:
            made.client.kms("EnableKey", KeyId=made.arn)
            assert tail.stdout is not None
            assert json.loads(tail.stdout.readline())["eventName"] == "EnableKey"
        finally:
            tail.send_signal(signal.SIGKILL)


def test_pages_join_without_loss_or_repetition(made: Installation) -> None:
    whole = [json.dumps(record) for record in made.records()]
    token, parts = None, []
    while True:
        reply = made.client.audit("LookupEvents", MaxResults=2, NextToken=token)
        parts += [json.dumps(json.loads(event["CloudTrailEvent"])) for event in reply["Events"]]
        token = reply["NextToken"]
        if reply["Complete"]:
            break
    assert parts[: len(whole)] == whole
    for bad in ("x", "0.1", "-1.0"):
        with pytest.raises(RemoteError) as caught:
            made.client.audit("LookupEvents", NextToken=bad)
        assert caught.value.code == "InvalidParameterValue"
    for members in ({"MaxResults": 0}, {"MaxResults": 1000}, {"StartTime": "2026-01-01"}):
        with pytest.raises(RemoteError) as caught:
            made.client.audit("LookupEvents", **members)
        assert caught.value.code == "InvalidParameterValue"
    with pytest.raises(RemoteError):
        made.client.audit_segment("../keys.sqlite")


def test_the_verification_key_leaves_once_and_verifies_elsewhere(made: Installation, tmp_path: Path) -> None:
    here = made.log / "verification-key"
    assert here.exists()
    assert "still lies on this host" in made.run("audit", "--verify").stderr
    taken = tmp_path / "audit-key"
    taken.write_text("precious")
    assert made.run("audit", "--take-key", str(taken)).exit_code == 4
    taken.unlink()
    assert made.run("audit", "--take-key", str(tmp_path / "no" / "file")).exit_code == 2
    assert here.exists()
    content = here.read_bytes()
    made.ok("audit", "--take-key", str(taken))
    assert taken.read_bytes() == content
    assert stat.S_IMODE(taken.stat().st_mode) == 0o600
    assert not here.exists()
    again = tmp_path / "again"
    assert made.run("audit", "--take-key", str(again)).exit_code == 4
    assert not again.exists()
    assert made.names("--event", "TakeVerificationKey") == ["TakeVerificationKey"] * 2

    report = json.loads(made.ok("audit", "--verify", "--private-key", str(taken), "--json"))
    assert (report["Level"], report["Intact"], report["KnownHeadsMet"]) == ("keyed", True, 1)
    head = report["Head"]
    assert f"audit head {head}" in (made.directory / "log").read_text() or report["Records"] > 1

    copy = tmp_path / "copy"
    shutil.copytree(made.log, copy)
    elsewhere = ["audit", "--verify", "--log", str(copy), "--head", head]
    assert made.run(*elsewhere, "--private-key", str(taken)).exit_code == 0
    assert made.run("--json", *elsewhere).exit_code == 0
    (segment,) = copy.glob("log-*.jsonl")
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"eventName"', b'"eventNAME"'), *lines[3:]]))
    for words in ([], ["--private-key", str(taken)]):
        result = made.run(*elsewhere, *words)
        assert result.exit_code == 7
        assert f"{segment.name} line " in result.stderr
        assert "changed" in result.stdout or "MAC" in result.stdout
    segment.write_bytes(b"".join(lines[:3]))
    result = made.run(*elsewhere)
    assert (result.exit_code, "cut off" in result.stderr) == (7, True)
    assert made.run(*elsewhere, "--private-key", str(segment)).exit_code == 2


def test_a_tail_cut_under_the_running_broker_is_found(made: Installation, tmp_path: Path) -> None:
    (segment,) = made.log.glob("log-*.jsonl")
    content = segment.read_bytes()
    os.truncate(segment, content.rindex(b"\n", 0, -1) + 1)
    try:
        result = made.run("audit", "--verify")
        assert result.exit_code == 7
        assert "cut off" in result.stderr
    finally:
        segment.write_bytes(content)
    assert made.run("audit", "--verify").exit_code == 0


def test_start_times() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert start_time("2h", now) == "2026-01-02T01:04:05+00:00"
    assert start_time("7d", now) == "2025-12-26T03:04:05+00:00"
    assert start_time("2026-01-01T09:00Z", now) == datetime(2026, 1, 1, 9, tzinfo=UTC).astimezone().isoformat()
    for text in ("", "2x", "h", "monday"):
        with pytest.raises(InvalidParameterValue):
            start_time(text, now)
