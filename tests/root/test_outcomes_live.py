"""All encryption outcomes on real volumes: every combination of CreateVolume, CopySnapshot and StartSnapshot.

Each makes what it makes with ebsctl; Encrypted and the key's ARN are compared with AWS's tables
(tests/published_outcomes.py), and its data with the source's, through the block file. `pytest -s` prints the tables.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import published_outcomes
import pytest
from installation import installation
from test_bad_input import World

pytestmark = pytest.mark.timeout(300)

USER: Final = 23456
OTHER: Final = 23457
SIZE: Final = 1 << 20
USE: Final = ("kms:DescribeKey", "kms:CreateGrant", "kms:GenerateDataKey*", "kms:ReEncrypt*", "kms:Decrypt")
"""What the recipient of an encrypted snapshot must be allowed with its key."""
CODES: Final = {"InvalidParameterDependency": "DEP", "InvalidParameterValue": "VAL"}
ASKED: Final = {None: [], True: ["--encrypted"], False: ["--no-encrypted"]}
READERS: Final = 3
"""Volumes that are attached at once to be read: the start of a process takes most of the time."""


@dataclass
class Source:
    """What is copied or restored: its name as the caller says it, its key, and its data."""

    name: str | None
    key: str | None
    data: bytes


@dataclass
class Outcomes(World):
    """A daemon, a user with a default key and another one, and a source of each kind."""

    arns: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    made: int = 0

    def as_(self, uid: int, *arguments: str) -> Any:
        outcome = self.ctl_as(uid, "--json", *arguments)
        assert outcome.status == 0, outcome
        return outcome.json if outcome.stdout else None

    def as_user(self, *arguments: str) -> Any:
        return self.as_(USER, *arguments)

    def new_name(self) -> str:
        self.made += 1
        return f"made-{self.made}"

    def letter(self, document: dict[str, Any], source: Source) -> str:
        """Return the table's name of the key that something was encrypted under."""
        if not document["Encrypted"]:
            assert "KmsKeyId" not in document
            return "U"
        return {source.key: "SAME", self.arns["named"]: "K", self.arns["usual"]: "DEF"}[document["KmsKeyId"]]

    def data_of(self, volume: str) -> bytes:
        """Return what a volume holds, read through its block file."""
        client = self.client
        path = client.ec2("AttachVolume", VolumeId=volume, ExposeAs="file")["Attachment"]["BlockFile"]
        data = Path(path).read_bytes()
        client.ec2("DetachVolume", VolumeId=volume)
        return data

    def make_source(self, name: str, *encryption: str, seed: int, uid: int = USER) -> Source:
        made = self.as_(uid, "create", name, "--size", str(SIZE), *encryption)
        data = random.Random(seed).randbytes(SIZE)
        client = self.client
        attached = client.ec2("AttachVolume", VolumeId=made["VolumeId"], ExposeAs="file")
        with open(attached["Attachment"]["BlockFile"], "r+b", buffering=0) as file:
            assert file.write(data) == SIZE
            os.fsync(file.fileno())
        client.ec2("DetachVolume", VolumeId=made["VolumeId"])
        taken = self.as_(uid, "snapshot", name, "--name", f"{name}-snap")
        if uid == USER:
            return Source(f"{name}-snap", made.get("KmsKeyId"), data)
        self.as_(uid, "share", f"{name}-snap", "--add", f"0000000{USER}")
        return Source(taken["SnapshotId"], made.get("KmsKeyId"), data)

    def allow(self, key: str, *actions: str) -> None:
        """Let the user do something with a key of somebody else."""
        policy = json.loads(self.ctl_as(OTHER, "key", "policy", key).stdout)
        principal = {"AWS": f"arn:aws:iam::0000000{USER}:root"}
        policy["Statement"].append(
            {"Effect": "Allow", "Principal": principal, "Action": list(actions), "Resource": "*"}
        )
        file = self.ebsd.root / f"{key}.json"
        file.write_text(json.dumps(policy))
        file.chmod(0o644)
        assert self.ctl_as(OTHER, "key", "policy", key, "--set", str(file)).status == 0


@pytest.fixture(scope="module")
def world() -> Iterator[Outcomes]:
    # Not below pytest's own directory, which other users may not enter.
    root = Path(tempfile.mkdtemp(prefix="ebsd-outcomes-"))
    root.chmod(0o755)
    try:
        with installation(root, "allow_unencrypted = true") as ebsd:
            made = Outcomes(ebsd)
            made.arns = {name: made.as_user("key", "create", name)["Arn"] for name in ("usual", "named", "first")}
            made.as_user("defaults", "set-key", "usual")
            made.as_user("defaults", "disable-encryption")
            made.sources = {
                "none": Source(None, None, bytes(SIZE)),
                "unencrypted, own": made.make_source("plain", seed=1),
                "encrypted, own": made.make_source("secret", "--encrypted", "--key", "first", seed=2),
            }
            made.as_(OTHER, "defaults", "disable-encryption")
            made.as_(OTHER, "key", "create", "shared")
            made.allow("shared", *USE)
            made.sources |= {
                "unencrypted, another's": made.make_source("their-plain", seed=3, uid=OTHER),
                "encrypted, another's": made.make_source(
                    "their-secret", "--encrypted", "--key", "shared", seed=4, uid=OTHER
                ),
            }
            try:
                yield made
            finally:
                for uid in (USER, OTHER):
                    made.ctl_as(uid, "detach", "--all", "--force")
    finally:
        shutil.rmtree(root)


def by_default(world: Outcomes, on: bool) -> None:
    world.as_user("defaults", "enable-encryption" if on else "disable-encryption")
    assert world.as_user("defaults", "show")["EbsEncryptionByDefault"] is on


@dataclass
class Made:
    """One row: what was asked for, what came of it, and the volume to read."""

    row: tuple[bool, str, bool | None, bool]
    expected: str
    letter: str
    volume: str | None
    data: bytes


def print_table(title: str, made: list[Made]) -> None:
    """Print what happened as AWS prints what should happen."""
    print(f"\n{title}\n| EBD | source                 | unset,- | unset,K | true,- | true,K | false,- | false,K |")
    for begin in range(0, len(made), len(published_outcomes.REQUESTS)):
        line = made[begin : begin + len(published_outcomes.REQUESTS)]
        default, source, *_ = line[0].row
        cells = " | ".join(f"{m.letter:{width}}" for m, width in zip(line, (7, 7, 6, 6, 7, 7), strict=True))
        print(f"| {'on ' if default else 'off'} | {source:22} | {cells} |")


def request(encrypted: bool | None, key: bool) -> list[str]:
    return [*ASKED[encrypted], *(["--key", "named"] if key else []), "--no-wait"]


def wait_for_jobs(world: Outcomes) -> None:
    """Wait until whatever is re-encrypted is there."""
    for job in world.client.control("DescribeJobs")["Jobs"]:
        ended = world.client.control("WaitJob", JobId=job["JobId"])["Job"]
        assert ended["State"] == "completed", ended


def check_data(world: Outcomes, made: list[Made]) -> None:
    rows = [m for m in made if m.volume is not None]
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda m: world.data_of(str(m.volume)), rows))
    for row, data in zip(rows, found, strict=True):
        assert data == row.data, f"{row.row} holds other data than its source"


def test_create_volume(world: Outcomes) -> None:
    made = []
    published = list(published_outcomes.combinations(published_outcomes.CREATE_VOLUME))
    for number, (default, kind, encrypted, key, expected) in enumerate(published):
        if number % (len(published) // 2) == 0:
            by_default(world, default)
        source, name = world.sources[kind], world.new_name()
        begin = ["--size", str(SIZE)] if source.name is None else ["--from", source.name]
        outcome = world.ctl_as(USER, "--json", "create", name, *begin, *request(encrypted, key))
        row = (default, kind, encrypted, key)
        if outcome.status:
            assert world.ctl_as(USER, "show", name).status == 3, "what was refused left something behind"
            made.append(Made(row, expected, CODES[outcome.error["Code"]], None, b""))
        else:
            volume = outcome.json
            made.append(Made(row, expected, world.letter(volume, source), volume["VolumeId"], source.data))
    print_table("CreateVolume", made)
    assert [(m.row, m.letter) for m in made] == [(m.row, m.expected) for m in made]
    wait_for_jobs(world)
    check_data(world, made)


def test_copy_snapshot(world: Outcomes) -> None:
    made, copies = [], {}
    published = list(published_outcomes.combinations(published_outcomes.COPY_SNAPSHOT))
    for number, (default, kind, encrypted, key, expected) in enumerate(published):
        if number % (len(published) // 2) == 0:
            by_default(world, default)
        source, name = world.sources[kind], world.new_name()
        outcome = world.ctl_as(USER, "--json", "copy", str(source.name), "--name", name, *request(encrypted, key))
        row = (default, kind, encrypted, key)
        if outcome.status:
            assert world.ctl_as(USER, "show", name).status == 3, "what was refused left something behind"
            made.append(Made(row, expected, CODES[outcome.error["Code"]], None, b""))
        else:
            copies[row] = outcome.json
            made.append(Made(row, expected, world.letter(outcome.json, source), None, source.data))
    print_table("CopySnapshot", made)
    assert [(m.row, m.letter) for m in made] == [(m.row, m.expected) for m in made]
    wait_for_jobs(world)
    by_default(world, False)
    for row in made:
        copy = copies.get(row.row)
        if copy is not None:
            restored = world.as_user("create", world.new_name(), "--from", copy["SnapshotId"])
            assert restored.get("KmsKeyId") == copy.get("KmsKeyId"), "a restore keeps its snapshot's key"
            row.volume = restored["VolumeId"]
    check_data(world, made)


START_SOURCES: Final = {
    "none": "none", "unencrypted": "unencrypted, own", "encrypted": "encrypted, own",
}  # fmt: skip
GIVEN: Final = {"omitted": None, "true": True, "false": False}


def test_start_snapshot(world: Outcomes) -> None:
    """Snapshots made of blocks: one block is written over what the parent holds, and all is read back."""
    block = random.Random(6).randbytes(512 * 1024)
    image = world.ebsd.root / "blocks.img"
    image.write_bytes(block + bytes(SIZE - len(block)))
    image.chmod(0o644)
    made, lines = [], {}
    for number, heading in ((3, True), (4, False)):
        by_default(world, heading)
        for line in published_outcomes.rows(published_outcomes.START_SNAPSHOT):
            parent, encrypted, key, expected = line[0], GIVEN[line[1]], line[2] == "specified", line[number]
            source, name = world.sources[START_SOURCES[parent]], world.new_name()
            given = ["--name", name, *ASKED[encrypted], *(["--key", world.arns["named"]] if key else [])]
            given += ["--parent", source.name] if source.name is not None else []
            outcome = world.ctl_as(USER, "--json", "blocks", "start", "--size", str(SIZE), *given)
            row = (heading, parent, encrypted, key)
            if outcome.status:
                assert outcome.error["Code"] == "ValidationException", outcome
                assert world.ctl_as(USER, "show", name).status == 3, "what was refused left something behind"
                made.append(Made(row, expected, "VALIDATION", None, b""))
            else:
                ident = outcome.json["SnapshotId"]
                world.as_user("blocks", "put", ident, str(image), "--block", "0")
                world.as_user("blocks", "complete", ident, "--count", "1")
                data = block + source.data[len(block) :]
                made.append(Made(row, expected, world.letter(world.as_user("show", ident), source), ident, data))
            lines.setdefault(tuple(line[:3]), []).append(made[-1].letter)
    print("\nStartSnapshot\n| parent      | Encrypted | KmsKeyArn | EBD on     | EBD off    |")
    for what, letters in lines.items():
        print(f"| {what[0]:11} | {what[1]:9} | {what[2]:9} | {letters[0]:10} | {letters[1]:10} |")
    assert [(m.row, m.letter) for m in made] == [(m.row, m.expected) for m in made]
    by_default(world, False)
    for row in made:
        if row.volume is not None:
            row.volume = world.as_user("create", world.new_name(), "--from", row.volume)["VolumeId"]
    check_data(world, made)


def test_create_snapshot(world: Outcomes) -> None:
    """A snapshot is what its volume is, whatever the default."""
    for default in (False, True):
        by_default(world, default)
        for volume, kind in (("plain", "unencrypted, own"), ("secret", "encrypted, own")):
            taken = world.as_user("snapshot", volume)
            assert world.letter(taken, world.sources[kind]) == ("SAME" if volume == "secret" else "U")


# --- keys that cannot be used -----------------------------------------------------------------------------

NOT_THERE: Final = "00000000-0000-4000-8000-000000000000"
VERBS: Final = {
    "create": ["create", "refused", "--size", "1M"],
    "restore": ["create", "refused", "--from", "plain-snap"],
    "restore under another key": ["create", "refused", "--from", "secret-snap"],
    "copy": ["copy", "plain-snap", "--name", "refused"],
    "copy under another key": ["copy", "secret-snap", "--name", "refused"],
}
UNUSABLE: Final = {
    # what: (how it is named, code, exit status, words of the message, words of the hint)
    "unknown id": (NOT_THERE, "NotFoundException", 3, f"{NOT_THERE}' does not exist", "ebsctl key list"),
    "unknown ARN": (
        f"arn:aws:kms:local:0000000{USER}:key/{NOT_THERE}",
        "NotFoundException", 3, f"{NOT_THERE}' does not exist", "ebsctl key list",
    ),
    "unknown alias": ("nothing", "NotFoundException", 3, "alias/nothing is not found", "ebsctl key alias list"),
    "malformed ARN": ("arn:aws:kms:local:1:key", "InvalidArnException", 3, "is not a key id, a key ARN", ""),
    "disabled": ("off", "DisabledException", 6, "{off} is disabled.", "ebsctl key enable {off}"),
    "pending deletion": (
        "going", "KMSInvalidStateException", 6, "{going} is pending deletion.", "ebsctl key cancel-deletion {going}",
    ),
    "another account's": (
        "{theirs}", "AccessDeniedException", 5, "is not authorized to perform: kms:DescribeKey", "ebsctl key grant",
    ),
    "another account's that may be seen and not used": (
        "{shown}", "AccessDeniedException", 5, "is not authorized to perform: kms:GenerateDataKeyWithoutPlaintext",
        "can allow kms:GenerateDataKeyWithoutPlaintext",
    ),
    "another region's, while AWS KMS is not configured": (
        f"arn:aws:kms:eu-central-1:123456789012:key/{NOT_THERE}", "KMSInternalException", 6, "[key_service.aws]",
        "ebsctl doctor",
    ),
}  # fmt: skip


def resources(world: Outcomes) -> tuple[list[str], list[str], list[str], list[Path]]:
    """Return what there is: volumes, snapshots, jobs that have not failed, and files of the store."""
    client = world.client
    files = [path for place in ("layers", "maps", "records") for path in (world.ebsd.state / place).rglob("*")]
    return (
        sorted(volume["VolumeId"] for volume in client.ec2("DescribeVolumes")["Volumes"]),
        sorted(snapshot["SnapshotId"] for snapshot in client.ec2("DescribeSnapshots")["Snapshots"]),
        sorted(job["JobId"] for job in client.control("DescribeJobs")["Jobs"] if job["State"] != "failed"),
        sorted(files),
    )


@pytest.fixture(scope="module")
def unusable(world: Outcomes) -> dict[str, str]:
    """Keys that a volume cannot have; returns their ARNs."""
    arns = {name: world.as_user("key", "create", name)["Arn"] for name in ("off", "going")}
    world.as_user("key", "disable", "off")
    world.as_user("key", "schedule-deletion", "going", "--yes")
    for name in ("theirs", "shown"):
        arns[name] = world.ctl_as(OTHER, "--json", "key", "create", name).json["Arn"]
    world.allow("shown", "kms:DescribeKey")
    return arns


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_key_that_cannot_be_used_is_refused_and_nothing_is_left(
    world: Outcomes, unusable: dict[str, str], what: str
) -> None:
    name, code, status, message, hint = UNUSABLE[what]
    before = resources(world)
    for verb, command in VERBS.items():
        outcome = world.ctl_as(USER, "--json", *command, "--encrypted", "--key", name.format(**unusable))
        told = f"{verb}: {outcome}"
        assert (outcome.status, outcome.error["Code"]) == (status, code), told
        assert message.format(**unusable) in outcome.error["Message"], told
        assert hint.format(**unusable) in outcome.error["Hint"], told
        assert resources(world) == before, told
    default = world.as_user("defaults", "show")["KmsKeyId"]
    outcome = world.ctl_as(USER, "--json", "defaults", "set-key", name.format(**unusable))
    if what != "another account's that may be seen and not used":  # a default is judged by DescribeKey, as in EC2
        assert (outcome.status, outcome.error["Code"]) == (status, code), outcome
        assert world.as_user("defaults", "show")["KmsKeyId"] == default


def test_a_default_key_that_cannot_be_used_any_more_is_named(world: Outcomes) -> None:
    """Neither create nor copy falls back to another key, or to none."""
    by_default(world, True)
    world.as_user("key", "disable", "usual")
    before = resources(world)
    for verb, command in VERBS.items():
        outcome = world.ctl_as(USER, "--json", *command)
        if verb == "restore under another key":  # under its snapshot's key, which the default does not concern
            assert outcome.json["KmsKeyId"] == world.arns["first"]
            assert world.ctl_as(USER, "delete", "refused", "--yes").status == 0
            continue
        assert (outcome.status, outcome.error["Code"]) == (6, "DisabledException"), f"{verb}: {outcome}"
        assert world.arns["usual"] in outcome.error["Message"]
        assert resources(world) == before
    world.as_user("key", "enable", "usual")
