"""Volumes under keys of AWS KMS: the whole job against an endpoint of its own, and what its failures may not touch."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aws_endpoint import CREDENTIALS, REGION, Endpoint, endpoint
from installation import Installation, installation, run

SETTINGS = """
[key_service.aws]
region = "{region}"
endpoint_url = "{url}"
connect_timeout = 1
read_timeout = 0.7
attempts = 2
deadline = 5
"""


@dataclass
class Site:
    """An ebsd with both back ends; its volume ``kept`` has a key of AWS and stays attached and mounted at ``mount``."""

    ebsd: Installation
    kms: Endpoint
    admin: Any
    """A boto3 client: keys of AWS are administered from there."""
    arn: str
    mount: Path

    def volume(self, name: str) -> str:
        """Make an empty volume under the key of AWS; return its id."""
        return self.ebsd.ok("create", name, "--size", "64M", "--encrypted", "--key", self.arn)

    def switch(self, *, enabled: bool) -> None:
        key_id = self.arn.rpartition("/")[2]
        (self.admin.enable_key if enabled else self.admin.disable_key)(KeyId=key_id)

    def check_kept(self) -> None:
        """Write to the attached volume through to its files, and read it back from them."""
        content = os.urandom(300_000)
        with (self.mount / "kept").open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        Path("/proc/sys/vm/drop_caches").write_text("3")
        assert (self.mount / "kept").read_bytes() == content
        assert self.ebsd.ctl_json("show", "kept")["Attachments"][0]["State"] == "attached"

    def nothing_of(self, volume: str) -> None:
        """See that a refused attachment left no device, no process and no grant."""
        runtime = self.ebsd.runtime
        assert not (runtime / "volumes" / volume).exists()
        assert not (runtime / "control" / f"{volume}.sock").exists()
        assert volume not in Path("/proc/self/mountinfo").read_text()
        shown = self.ebsd.ctl_json("show", volume)
        assert (shown["State"], shown["Attachments"]) == ("available", [])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("aws")
    with pytest.MonkeyPatch.context() as patch, endpoint(root / "endpoint.log") as kms:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        admin = kms.client()
        arn = admin.create_key()["KeyMetadata"]["Arn"]
        with installation(root, SETTINGS.format(region=REGION, url=kms.url)) as ebsd:
            mount = root / "kept"
            ebsd.ok("create", "kept", "--size", "64M", "--encrypted", "--key", arn)
            ebsd.ok("attach", "kept", "--mkfs", "ext4", "--mount", mount)
            yield Site(ebsd, kms, admin, arn, mount)


@pytest.fixture(autouse=True)
def all_is_well(site: Site) -> Iterator[None]:
    yield
    site.check_kept()


def write_files(directory: Path) -> None:
    for number in range(40):
        (directory / f"d{number % 4}").mkdir(exist_ok=True)
        (directory / f"d{number % 4}" / str(number)).write_bytes(os.urandom(1 + number * 4001))
    os.sync()


def digests(directory: Path) -> dict[str, str]:
    Path("/proc/sys/vm/drop_caches").write_text("3")
    found = {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }
    assert found
    return found


def grants_of(site: Site) -> list[str]:
    return [grant["Name"] for grant in site.admin.list_grants(KeyId=site.arn)["Grants"]]


def test_the_whole_job_under_a_key_of_aws(site: Site, tmp_path: Path) -> None:
    ebsd = site.ebsd
    site.admin.create_alias(AliasName="alias/job", TargetKeyId=site.arn)
    alias = site.arn.partition("key/")[0] + "alias/job"
    made = ebsd.ctl_json("create", "data", "--size", "64M", "--encrypted", "--key", alias)
    assert made["KmsKeyId"] == site.arn
    mounts = {name: tmp_path / name for name in ("data", "again", "here", "there")}
    ebsd.ok("attach", "data", "--mkfs", "ext4", "--mount", mounts["data"])
    write_files(mounts["data"])
    before = digests(mounts["data"])
    ebsd.ok("snapshot", "data", "--name", "s1")
    (mounts["data"] / "later").write_text("not in the snapshot")

    def check(volume: str, snapshot: str, *arguments: str) -> Any:
        ebsd.ok("create", volume, "--from", snapshot, *arguments)
        ebsd.ok("attach", volume, "--mount", mounts[volume])
        assert digests(mounts[volume]) == before
        return ebsd.ctl_json("show", volume)

    again = check("again", "s1")
    assert (again["KmsKeyId"], again["DataEncryptionKeyId"]) == (site.arn, made["DataEncryptionKeyId"])

    # To a key of this host, and from there to AWS again: a new data key each time.
    ebsd.ok("key", "create", "own")
    ebsd.ok("copy", "s1", "--name", "s2", "--encrypted", "--key", "own")
    here = check("here", "s2")
    assert here["KmsKeyId"].startswith("arn:aws:kms:local:")
    ebsd.ok("copy", "s2", "--name", "s3", "--encrypted", "--key", site.arn)
    there = check("there", "s3")
    assert there["KmsKeyId"] == site.arn
    assert len({made["DataEncryptionKeyId"], here["DataEncryptionKeyId"], there["DataEncryptionKeyId"]}) == 3

    assert len(grants_of(site)) == 4  # kept, data, again, there; those of the copies are retired
    for name in mounts:
        ebsd.ok("detach", name)
    assert len(grants_of(site)) == 1
    ebsd.ok("attach", "data", "--mount", mounts["data"])
    assert (mounts["data"] / "later").read_text() == "not in the snapshot"
    assert ebsd.ctl_json("show", "data")["Integrity"] == "verified"
    ebsd.ok("detach", "data")
    seen = ebsd.ctl("--json", "audit", "--key", site.arn, "--event", "Decrypt")
    assert made["VolumeId"] in seen.stdout  # the audit log is this host's, whosever the key


def test_a_disabled_key_refuses_the_next_attachment_and_no_earlier_one(site: Site) -> None:
    volume = site.volume("switched")
    site.switch(enabled=False)
    try:
        status, error = site.ebsd.refused("attach", "switched")
        assert (status, error["Code"]) == (6, "CustomerKeyHasBeenRevoked")
        assert f"{site.arn} is disabled." in error["Message"]
        assert "ebsctl key show" in error["Hint"]
        site.nothing_of(volume)
        site.check_kept()
        site.ebsd.ok("snapshot", "kept", "--name", "while-disabled")  # needs no key, as in EBS
        status, error = site.ebsd.refused("create", "more", "--size", "64M", "--encrypted", "--key", site.arn)
        assert (status, error["Code"]) == (6, "DisabledException")
        assert site.ebsd.ctl_json("key", "show", site.arn)["KeyState"] == "Disabled"
    finally:
        site.switch(enabled=True)
    site.ebsd.ok("attach", "switched")
    site.ebsd.ok("detach", "switched")


FAULTS: dict[str, tuple[dict[str, Any], tuple[int, str], str]] = {
    "answers 500": ({"fault": "body", "status": 500, "body": "oops"}, (6, "KMSInternalException"), "HTTP status 500"),
    "answers nonsense": ({"fault": "body", "body": "<html>"}, (6, "KMSInternalException"), "cannot be understood"),
    "is slow": ({"fault": "slow", "seconds": 2}, (6, "KMSInternalException"), "did not answer in time"),
    "denies": ({"fault": "error", "code": "AccessDeniedException"}, (5, "AccessDeniedException"), "AWS KMS"),
}


@pytest.mark.parametrize(
    ("operation", "faults"), [("CreateGrant", ["answers nonsense", "is slow"]), ("Decrypt", list(FAULTS))]
)
def test_an_endpoint_that_fails_refuses_an_attachment_before_there_is_a_device(
    site: Site, operation: str, faults: list[str]
) -> None:
    volume = site.volume(f"unlucky-{operation}")
    for what in faults:
        fault, expected, text = FAULTS[what]
        site.kms.order(**fault, on=[operation])
        status, error = site.ebsd.refused("attach", volume)
        assert (status, error["Code"]) == expected, what
        assert text in error["Message"]
        site.nothing_of(volume)
    site.check_kept()
    site.kms.order()
    site.ebsd.ok("attach", volume)
    site.ebsd.ok("detach", volume)
    if operation == "Decrypt":
        assert f"attach-{volume}" not in {grant.rpartition("-")[0] for grant in grants_of(site)}


def test_an_endpoint_that_hangs_holds_up_nothing_else(site: Site) -> None:
    volume = site.volume("hung")
    site.ebsd.ok("create", "local", "--size", "64M")
    site.kms.stall()
    try:
        begun = time.monotonic()
        status, error = site.ebsd.refused("attach", volume)
        assert (status, error["Code"]) == (6, "KMSInternalException")
        assert time.monotonic() - begun < 15
        site.nothing_of(volume)
        site.ebsd.ok("attach", "local")  # its key is this host's
        site.ebsd.ok("detach", "local")
        findings = {found["Check"]: found for found in site.ebsd.ctl("--json", "doctor").json["Findings"]}
        assert findings["AWS KMS"]["Level"] == "failure"
    finally:
        site.kms.resume()
    findings = {found["Check"]: found for found in site.ebsd.ctl("--json", "doctor").json["Findings"]}
    assert findings["AWS KMS"]["Level"] == "ok"
    assert site.kms.url in findings["AWS KMS"]["Message"]


def test_a_key_of_aws_is_administered_by_its_providers_tools(site: Site) -> None:
    shown = site.ebsd.ctl_json("key", "show", site.arn)
    assert (shown["Arn"], shown["KeyState"]) == (site.arn, "Enabled")
    for command in (
        ["disable", site.arn],
        ["rotation", site.arn, "--now"],
        ["policy", site.arn],
        ["schedule-deletion", site.arn],
        ["alias", "create", "here", site.arn],
    ):
        status, error = site.ebsd.refused("key", *command)
        assert (status, error["Code"]) == (2, "UnsupportedOperationException"), command
        assert f"--region {REGION} --key-id {site.arn}" in error["Hint"]
    assert site.admin.describe_key(KeyId=site.arn)["KeyMetadata"]["Enabled"]


def test_the_default_key_may_be_one_of_aws(site: Site) -> None:
    site.ebsd.ok("defaults", "set-key", site.arn)
    try:
        assert site.ebsd.ctl_json("create", "by-default", "--size", "64M")["KmsKeyId"] == site.arn
    finally:
        site.ebsd.ok("defaults", "reset-key")


def test_keys_of_aws_that_no_volume_can_have_are_refused_at_once(site: Site) -> None:
    """EBS accepts the call and lets the volume vanish; here the caller is told, and nothing is made."""
    made = {
        "asymmetric": {"KeySpec": "RSA_2048", "KeyUsage": "ENCRYPT_DECRYPT"},
        "signing": {"KeySpec": "ECC_NIST_P256", "KeyUsage": "SIGN_VERIFY"},
        "disabled": {},
        "pending": {},
    }
    arns = {name: site.admin.create_key(**more)["KeyMetadata"]["Arn"] for name, more in made.items()}
    site.admin.disable_key(KeyId=arns["disabled"].rpartition("/")[2])
    site.admin.schedule_key_deletion(KeyId=arns["pending"].rpartition("/")[2], PendingWindowInDays=7)
    arns["missing"] = f"{site.arn.partition('key/')[0]}key/00000000-0000-4000-8000-000000000000"
    arns["elsewhere"] = site.arn.replace(REGION, "ap-south-1")
    expected = {
        "asymmetric": ("InvalidKeyUsageException", 2, "key spec RSA_2048 and key usage ENCRYPT_DECRYPT", "symmetric"),
        "signing": ("InvalidKeyUsageException", 2, "key spec ECC_NIST_P256 and key usage SIGN_VERIFY", "symmetric"),
        "disabled": ("DisabledException", 6, "is disabled.", "aws kms enable-key --key-id"),
        "pending": ("KMSInvalidStateException", 6, "is pending deletion.", "aws kms cancel-key-deletion --key-id"),
        "missing": ("NotFoundException", 3, arns["missing"], ""),
        "elsewhere": ("NotFoundException", 3, arns["elsewhere"], ""),
    }
    ebsd = site.ebsd
    ebsd.ok("create", "small", "--size", "1M")
    ebsd.ok("snapshot", "small", "--name", "small-snap")
    verbs = (
        ["create", "refused", "--size", "1M"],
        ["create", "refused", "--from", "small-snap"],
        ["copy", "small-snap", "--name", "refused"],
    )
    before = resources(ebsd)
    for name, (code, status, message, hint) in expected.items():
        for verb in verbs:
            found, error = ebsd.refused(*verb, "--encrypted", "--key", arns[name])
            assert (found, error["Code"]) == (status, code), (name, verb, error)
            assert message in error["Message"], error
            assert hint in error["Hint"], error
    assert resources(ebsd) == before


def resources(ebsd: Installation) -> list[str]:
    """Return the ids of all volumes, snapshots and jobs."""
    volumes, snapshots, jobs = (ebsd.ctl_json("list", kind) for kind in ("volumes", "snapshots", "jobs"))
    return sorted(
        [volume["VolumeId"] for volume in volumes["Volumes"]]
        + [snapshot["SnapshotId"] for snapshot in snapshots["Snapshots"]]
        + [job["JobId"] for job in jobs["Jobs"]]
    )


def test_a_new_broker_goes_on_with_what_is_attached(site: Site, tmp_path: Path) -> None:
    site.volume("outlives")
    site.ebsd.ok("attach", "outlives", "--mkfs", "ext4", "--mount", tmp_path / "mnt")
    (tmp_path / "mnt" / "file").write_text("content")
    (broker,) = site.ebsd.processes()["broker"]
    os.kill(broker, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while site.ebsd.ctl_json("status")["KeyService"]["State"] != "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    retired = len(grants_of(site)) - 1
    site.ebsd.ok("detach", "outlives")  # by its id: this broker never had the grant's token
    assert len(grants_of(site)) == retired
    site.ebsd.ok("attach", "outlives", "--mount", tmp_path / "mnt")
    assert (tmp_path / "mnt" / "file").read_text() == "content"
    site.ebsd.ok("detach", "outlives")


def test_credentials_reach_the_broker_and_nothing_else(site: Site) -> None:
    """Not in an environment or arguments of a child, not in a log, not in a file of the state."""
    secret = CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode()
    processes = site.ebsd.processes()
    for pid in processes["broker"] + processes["volumes"]:
        for what in ("environ", "cmdline"):
            assert secret not in Path(f"/proc/{pid}/{what}").read_bytes()
    files = [path for path in site.ebsd.root.rglob("*") if path.is_file() and not path.is_relative_to(site.mount)]
    assert site.ebsd.log in files
    for path in files:
        if path.stat().st_size < 2**20:
            assert secret not in path.read_bytes(), path


def test_an_endpoint_that_dies_in_the_middle_of_a_request(site: Site, tmp_path: Path) -> None:
    """The last test: with the endpoint its keys are gone."""
    volume = site.volume("orphan")
    site.volume("bereft")
    site.ebsd.ok("attach", "bereft", "--mkfs", "ext4", "--mount", tmp_path / "mnt")
    site.kms.order("die", on=["Decrypt"])
    for reason in ("", "cannot be reached"):
        status, error = site.ebsd.refused("attach", volume)
        assert (status, error["Code"]) == (6, "KMSInternalException")
        assert reason in error["Message"]
        site.nothing_of(volume)
    run("fsfreeze", "-f", tmp_path / "mnt")
    run("fsfreeze", "-u", tmp_path / "mnt")
    site.ebsd.ok("detach", "bereft")  # a grant that cannot be retired holds up nobody
    assert "could not be retired" in site.ebsd.log.read_text()
