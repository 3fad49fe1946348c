"""A verification is a job: it is listed, limited, cancelled, and goes on where it was when its worker or ebsd dies."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from installation import BIN, Installation, installation

from ebsctl.client import Client

MIB = 1024**2
SIZE = 128 * MIB

pytestmark = pytest.mark.timeout(180)


def verifier_of(ebsd: Installation) -> int:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = os.readlink(process / "fd" / "2") == str(ebsd.log)
            if ours and b"ebsd.volume.verifier" in (process / "cmdline").read_bytes():
                return int(process.name)
    raise AssertionError("there is no verifier")


def test_a_verification_that_is_killed_goes_on(tmp_path: Path) -> None:
    with installation(tmp_path) as ebsd:
        ebsd.ok("create", "data", "--size", str(SIZE))
        with open(ebsd.ok("attach", "data", "--file"), "r+b", buffering=0) as file:
            file.write(os.urandom(SIZE))
        snapshot = ebsd.ok("snapshot", "data", "--name", "s1")
        ebsd.ok("detach", "data")
        ebsd.ok("verify", "s1")  # hashes and signs what nobody had yet
        client = Client(str(ebsd.socket))
        command = [BIN / "ebsctl", "--socket", ebsd.socket, "verify", "s1", "--rate", "12M"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as told:
            (job,) = wait_for_jobs(client)
            assert (job["Kind"], job["SourceId"], job["RateLimit"]) == ("verify", snapshot, 12 * MIB)
            status, error = ebsd.refused("verify", "s1")
            assert (status, error["Code"]) == (4, "IncorrectState"), error
            wait_until_done(client, job["JobId"], 40 * MIB)
            os.kill(verifier_of(ebsd), signal.SIGKILL)
            wait_for_resumption(ebsd, job["JobId"], 1)
            ebsd.ok("job", "limit", job["JobId"], "0")
            output, errors = told.communicate(timeout=60)
            assert (told.returncode, errors) == (0, ""), errors
            assert "authenticity" in output
        (chunk,) = resumed(ebsd, job["JobId"])
        assert 0 < chunk < SIZE // 65536
        verified = ebsd.ctl_json("show", "s1")["LastVerification"]
        assert (verified["Chunks"], verified["DamagedChunks"]) == (SIZE // 65536, 0), "what both workers read counts"

        # What an earlier worker found is not forgotten; the client goes, and the verification does not.
        segment = max(tmp_path.glob("state/layers/*/*.000"), key=lambda path: path.stat().st_blocks)
        segment.chmod(0o600)
        with open(segment, "r+b", buffering=0) as raw:
            os.pwrite(raw.fileno(), bytes(16), 3 * MIB)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as told:
            (job,) = wait_for_jobs(client)
            wait_until_done(client, job["JobId"], 40 * MIB)
            told.kill()
        ebsd.kill()
        ebsd.start()
        assert resumed(ebsd, job["JobId"])[-1] > 0
        ebsd.ok("job", "limit", job["JobId"], "0")
        assert ebsd.ctl("job", "wait", job["JobId"]).status == 7
        ended = ebsd.ctl_json("job", "show", job["JobId"])
        assert (ended["State"], ended["Error"]["Code"]) == ("failed", "Ebsd.DamageFound")
        verified = ebsd.ctl_json("show", "s1")["LastVerification"]
        assert (verified["Chunks"], verified["DamagedChunks"]) == (SIZE // 65536, 1)

        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as told:
            (job,) = wait_for_jobs(client)
            ebsd.ok("job", "cancel", job["JobId"])
            _, errors = told.communicate(timeout=60)
            assert (told.returncode, "cancelled" in errors) == (1, True), errors
        assert ebsd.ctl_json("show", "s1")["State"] == "completed", "the snapshot stays"


def wait_for_jobs(client: Client) -> list[dict[str, object]]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        active = [{"Name": "state", "Values": ["running"]}]
        if jobs := client.control("DescribeJobs", Filters=active)["Jobs"]:
            return list(jobs)
        time.sleep(0.02)
    raise AssertionError("there is no job")


def wait_until_done(client: Client, job: object, least: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        (found,) = client.control("DescribeJobs", JobIds=[job])["Jobs"]
        assert found["State"] == "running", found
        if found["Done"] >= least:
            return
        time.sleep(0.05)
    raise AssertionError("it does not come so far")


def resumed(ebsd: Installation, job: object) -> list[int]:
    return [int(chunk) for chunk in re.findall(rf"{job} goes on from chunk (\d+)", ebsd.log.read_text())]


def wait_for_resumption(ebsd: Installation, job: object, times: int) -> None:
    deadline = time.monotonic() + 60
    while len(resumed(ebsd, job)) < times:
        assert time.monotonic() < deadline
        time.sleep(0.05)
