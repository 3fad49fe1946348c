"""The audit log of a real ebsd: what attaching, refusing and administering leave in it, and who may see what."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from installation import BIN, Installation, Outcome, installation, run

from ebsd.kms.audit.log import AuditLog
from ebsd.kms.audit.verify import Segment, Verifier

OWNER, STRANGER = 31003, 31004

pytestmark = pytest.mark.other_user


@pytest.fixture(scope="module")
def ebsd() -> Iterator[Installation]:
    root = Path(tempfile.mkdtemp(prefix="ebsd-audit-"))
    root.chmod(0o711)
    try:
        with installation(root) as made:
            yield made
    finally:
        shutil.rmtree(root)


def run_as(ebsd: Installation, uid: int, *arguments: str) -> Outcome:
    done = subprocess.run(
        [
            "setpriv",
            f"--reuid={uid}",
            f"--regid={uid}",
            "--clear-groups",
            BIN / "ebsctl",
            "--socket",
            ebsd.socket,
            *arguments,
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def records(outcome: Outcome) -> list[dict[str, Any]]:
    assert outcome.status == 0, outcome.stderr
    found: list[dict[str, Any]] = outcome.json["Records"]
    return found


def names(outcome: Outcome) -> list[str]:
    return [record["eventName"] for record in records(outcome)]


def test_the_story_of_a_volume_in_the_log(ebsd: Installation) -> None:
    def owner(*arguments: str) -> str:
        outcome = run_as(ebsd, OWNER, *arguments)
        assert outcome.status == 0, outcome.stderr
        return outcome.stdout.strip()

    key = owner("key", "create", "mine")
    volume = owner("create", "data", "--size", "8M", "--encrypted", "--key", "mine")
    owner("attach", "data", "--file")
    owner("detach", "data")
    owner("key", "disable", "mine")
    assert run_as(ebsd, OWNER, "attach", "data", "--file").status == 6
    assert run_as(ebsd, STRANGER, "key", "enable", f"arn:aws:kms:local:{OWNER:012}:key/{key}").status == 5

    told = names(run_as(ebsd, OWNER, "audit", "--json", "--volume", "data"))
    assert told[:5] == ["GenerateDataKeyWithoutPlaintext", "CreateAnchor", "CreateGrant", "Decrypt", "CreateGrant"]
    (grant,) = records(run_as(ebsd, OWNER, "audit", "--json", "--event", "RetireGrant"))
    made, refused = records(run_as(ebsd, OWNER, "audit", "--json", "--event", "CreateGrant"))
    (decrypt,) = records(run_as(ebsd, OWNER, "audit", "--json", "--event", "Decrypt", "--since", "1h"))
    assert decrypt["requestParameters"]["encryptionContext"]["aws:ebs:id"] == volume
    assert decrypt["userIdentity"]["arn"].endswith(":assumed-role/aws:ec2-infrastructure/ebsd")
    assert made["userIdentity"]["accountId"] == f"{OWNER:012}"
    assert made["userIdentity"]["invokedBy"] == "ec2.local.amazonaws.com"
    assert made["requestID"] == decrypt["requestID"]
    assert made["responseElements"]["grantId"] == grant["requestParameters"]["grantId"]
    assert refused["errorCode"] == "DisabledException"

    mine = records(run_as(ebsd, OWNER, "audit", "--json", "--errors"))
    assert [record["errorCode"] for record in mine] == ["DisabledException", "AccessDeniedException"]
    theirs = records(run_as(ebsd, STRANGER, "audit", "--json"))
    assert [(record["eventName"], record.get("errorCode")) for record in theirs] == [
        ("DescribeKey", "AccessDeniedException")  # ebsctl asks which key it is, and comes no further
    ]
    assert len(records(ebsd.ctl("audit", "--json"))) > len(mine) + len(theirs)
    assert run_as(ebsd, OWNER, "audit", "--verify").status == 5
    owner("key", "enable", "mine")
    owner("delete", "data", "--yes")
    assert names(run_as(ebsd, OWNER, "audit", "--json", "--volume", volume))[-1] == "DeleteAnchor"


def test_the_log_outlives_a_killed_broker_and_shows_what_was_done_to_it(ebsd: Installation) -> None:
    file = ebsd.root / "audit-key"
    ebsd.ok("audit", "--take-key", file)
    report = ebsd.ctl_json("audit", "--verify", "--private-key", file)
    assert (report["Level"], report["Intact"], report["KnownHeadsMet"]) == ("keyed", True, 1)
    head = report["Head"]

    (broker,) = ebsd.processes()["broker"]
    os.kill(broker, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while ebsd.processes()["broker"] in ([], [broker]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    report = ebsd.ctl_json("audit", "--verify", "--private-key", file, "--head", head)
    assert (report["Intact"], report["KnownHeadsMet"], report["Chains"]) == (True, 2, 2)
    assert "without closing its chain" in report["Notes"][0]
    assert "audit head " in ebsd.log.read_text()

    copy = ebsd.root / "copy"
    shutil.copytree(ebsd.kms_state / "audit", copy)
    (segment,) = copy.glob("log-*.jsonl")
    content = segment.read_bytes()
    forged = content.replace(f'"accountId":"{STRANGER:012}"'.encode(), b'"accountId":"000000031009"', 1)
    assert forged != content
    segment.write_bytes(forged)
    for words in (["--private-key", str(file)], ["--head", head]):
        outcome = ebsd.ctl("audit", "--verify", "--log", copy, *words)
        assert outcome.status == 7
        assert f"{segment.name} line " in outcome.stderr


def test_a_restart_in_order_leaves_no_question(ebsd: Installation) -> None:
    before = ebsd.ctl_json("audit", "--verify")
    ebsd.stop()
    ebsd.start()
    after = ebsd.ctl_json("audit", "--verify", "--head", before["Head"])
    assert after["Chains"] == before["Chains"] + 1
    assert after["Notes"] == before["Notes"]
    last = [json.loads(line)["record"]["eventName"] for path in (ebsd.kms_state / "audit").glob("log-*.jsonl")
            for line in path.read_text().splitlines()]  # fmt: skip
    assert last[-2:] == ["EndAuditChain", "BeginAuditChain"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 2 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=2M,mode=0700", "tmpfs", place)
    try:
        yield place
    finally:
        run("umount", place)


def test_on_a_full_disk_what_was_admitted_is_recorded_and_nothing_else_is(small_disk: Path) -> None:
    def chain_record(name: str, details: dict[str, Any]) -> dict[str, Any]:
        return {"eventName": name, "userIdentity": {"type": "AWSService"}, "serviceEventDetails": details}

    def fill() -> None:
        while True:
            hog.write(bytes(4096))

    def append_for_ever() -> None:
        while True:
            log.append([{"eventName": "Decrypt", "pad": "x" * 60_000}], sync=True)

    log = AuditLog(small_disk / "audit", chain_record, lambda: "T")
    log.open()
    log.make_room()
    hog = (small_disk / "hog").open("wb", buffering=0)
    with pytest.raises(OSError, match="No space"):
        fill()
    hog.close()
    admitted = 0
    while log.has_room():
        log.promise()
        admitted += 1
    assert admitted > 1
    with pytest.raises(OSError, match="No space"):
        log.make_room()
    for _ in range(admitted):
        log.append([{"eventName": "Decrypt", "pad": "x" * 60_000}], sync=True)
        log.redeem()
    count = log.head.count
    with pytest.raises(OSError, match="No space"):
        append_for_ever()
    (small_disk / "hog").unlink()
    log.make_room()
    log.append([{"eventName": "Decrypt"}], sync=True)
    assert log.head.count > count
    log.close()
    segments = (Segment(path.name, path.read_bytes().splitlines(keepends=True)) for path in log.segments())
    report = Verifier([log.head]).run(segments)
    assert (report.findings, report.heads_met) == ([], 1)
