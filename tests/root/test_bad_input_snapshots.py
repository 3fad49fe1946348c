"""Shows that wrong commands on snapshots, copies, jobs and growth are refused with code, status, message and hint.

Each row of the table is run with --json and without against one running daemon. After each run volumes, snapshots,
jobs, keys and the files of a reference snapshot are what they were, and a reference volume still holds its data. What
needs a moment that nobody can hit from outside is made to stand still: a process of ebsd is stopped with SIGSTOP.
Keys of another user are tried by a plain user only: root is an administrator and may use every key.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from installation import Installation, Outcome, installation
from test_bad_input import (
    DATA,
    NO_ID,
    NO_KEY,
    NO_SUCH,
    NO_VOLUME,
    STRANGER,
    VALUE,
    Row,
    World,
    check_json,
    check_plain,
    filled,
    read_data,
    row,
    write_data,
)

from ebsd.domain.errors import EbsdError

MIB = 1 << 20
BULK = 200 * MIB
NO_SNAPSHOT = "snap-00000000000000000"
NO_JOB = "job-00000000000000000"

NO_SNAP = "InvalidSnapshot.NotFound"
BAD_SNAP = "InvalidSnapshotID.Malformed"
NO_SUCH_JOB = "Ebsd.JobNotFound"
STATE = "IncorrectState"
SNAPSHOT_HINT = "`ebsctl list snapshots`"
JOB_HINT = "`ebsctl job list`"
SIZE_HINT = "powers of 1024"
NAME_HINT = "1 to 63 characters"
FINAL = ("completed", "failed", "cancelled")


def until(said: Callable[[], Any], what: str, patience: float = 20.0) -> Any:
    """Ask again and again until the answer is true, and return it."""
    end = time.monotonic() + patience
    while not (answer := said()):
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.005)
    return answer


@dataclass
class Snapshotted(World):
    """A daemon with snapshots and a job's result, and what must never change there."""

    digest: str = field(default="")
    """That of the first BULK bytes of the volume ``bulk`` and of its snapshot."""

    def snapshots(self) -> Any:
        return self.client.ec2("DescribeSnapshots")["Snapshots"]

    def jobs(self) -> Any:
        return self.client.control("DescribeJobs")["Jobs"]

    def job(self, ident: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.control("DescribeJobs", JobIds=[ident])["Jobs"][0]
        return found

    def names(self) -> list[str]:
        return sorted(item["Name"] for item in (*self.volumes(), *self.snapshots()))

    def everything(self) -> Any:
        """Return all that a refused command must leave alone."""
        return self.volumes(), self.snapshots(), self.jobs(), self.keys(), self.reference_files()

    def reference_files(self) -> dict[str, str]:
        """Return the digests of map and record of ``base``, and how many layers there are in all."""
        names = [path for path in self.ebsd.state.glob(f"*/*{self.words['base-id']}*") if path.is_file()]
        assert len(names) == 2, names
        found = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in names}
        found["files"] = str(sorted(str(path) for path in self.ebsd.state.glob("*/**/*") if path.is_file()))
        return found

    def bytes_used(self) -> int:
        data = (self.ebsd.state / name for name in ("layers", "maps", "records"))
        return sum(f.stat().st_blocks * 512 for top in data for f in top.rglob("*") if f.is_file())

    def ok(self, *arguments: str) -> str:
        """Run ebsctl as root and return its output without the newline; any failure fails the test with the log."""
        outcome = self.ctl_as(0, *arguments)
        assert outcome.status == 0, f"{arguments}: {outcome.stderr}\n{self.ebsd.log.read_text()[-4000:]}"
        return outcome.stdout.strip()

    def show(self, *arguments: str) -> Any:
        return json.loads(self.ok("--json", *(arguments if len(arguments) > 1 else ("show", *arguments))))

    def refused(self, *arguments: str) -> tuple[int, dict[str, str]]:
        """Run ebsctl --json as root, which must fail; returns exit status and the error."""
        outcome = self.ctl_as(0, "--json", *arguments)
        assert outcome.status != 0, f"{arguments} was to fail and printed {outcome.stdout}"
        return outcome.status, outcome.error

    @contextmanager
    def attached_for_a_while(self, name: str) -> Iterator[str]:
        """As a file, which takes less time than a device."""
        self.ok("attach", name, "--file")
        try:
            yield self.device_of(name)
        finally:
            self.ok("detach", name)

    def check_base(self) -> None:
        """Restore the reference snapshot and see that it verifies and holds its data."""
        self.ok("create", "probe", "--from", "base")
        with self.attached_for_a_while("probe") as device:
            assert self.show("probe")["Integrity"] == "verified"
            assert read_data(device) == DATA
        self.ok("delete", "probe", "--yes")

    def bulk_digest(self, name: str) -> str:
        """Return the digest of what a volume holds where ``bulk`` has its data."""
        with self.attached_for_a_while(name) as device, open(device, "rb", buffering=0) as file:
            digest = hashlib.sha256()
            for _ in range(BULK // MIB):
                digest.update(file.read(MIB))
            return digest.hexdigest()

    def workers(self) -> list[int]:
        """Return the pids of this daemon's copy workers."""
        return children(self.ebsd, "ebsd.volume.copier")


def children(ebsd: Installation, module: str) -> list[int]:
    """Return the pids of the children of this daemon that run a module."""
    assert ebsd.daemon is not None
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(") ")[2].split()[1])
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == ebsd.daemon.pid and module.encode() in arguments:
            found.append(int(process.name))
    return found


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Let a process stand still for the body; it may be gone afterwards."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def world() -> Iterator[Snapshotted]:
    # Not below pytest's own directory, which other users may not enter.
    root = Path(tempfile.mkdtemp(prefix="ebsd-bad-"))
    root.chmod(0o755)
    try:
        with installation(root) as ebsd:
            made = Snapshotted(ebsd)
            for alias in ("good", "off", "gone"):
                made.ok("key", "create", alias)
            stranger = made.ctl_as(STRANGER, "--json", "key", "create", "theirs")
            for name in ("kept", "idle", "watched"):
                made.ok("create", name, "--size", "8M")
            made.ok("create", "locked", "--size", "8M", "--encrypted", "--key", "off")
            with made.attached_for_a_while("idle") as device:
                write_data(device)
            made.ok("snapshot", "idle", "--name", "base")
            made.ok("snapshot", "locked", "--name", "locked-snap")
            made.ok("copy", "base", "--name", "copied", "--encrypted", "--key", "good")
            made.ok("attach", "kept")
            write_data(made.device_of("kept"))
            made.ok("attach", "watched", "--read-only")
            made.digest = fill_bulk(made)
            their = made.ctl_as(STRANGER, "--json", "create", "own", "--size", "1M")
            assert made.ctl_as(STRANGER, "snapshot", "own", "--name", "own-snap").status == 0
            (job,) = made.jobs()
            made.words = {
                "kept-id": made.show("kept")["VolumeId"],
                "kept-device": made.device_of("kept"),
                "idle-id": made.show("idle")["VolumeId"],
                "base-id": made.show("base")["SnapshotId"],
                "watched-id": made.show("watched")["VolumeId"],
                "their-id": their.json["VolumeId"],
                "done-id": job["JobId"],
                "good-id": made.show("key", "show", "good")["KeyId"],
                "good-arn": made.show("key", "show", "good")["Arn"],
                "their-arn": stranger.json["Arn"],
            }
            made.ok("key", "disable", "off")
            yield made
    finally:
        shutil.rmtree(root)


def fill_bulk(world: Snapshotted) -> str:
    """Make the volume ``bulk`` with much data and its snapshot ``bulk-snap``; return the digest of its data."""
    world.ok("create", "bulk", "--size", "512M")
    chance, digest = random.Random(3), hashlib.sha256()
    with world.attached_for_a_while("bulk") as device, open(device, "r+b", buffering=0) as file:
        for _ in range(BULK // MIB):
            piece = chance.randbytes(MIB)
            digest.update(piece)
            file.write(piece)
        os.fsync(file.fileno())
    world.ok("snapshot", "bulk", "--name", "bulk-snap")
    return digest.hexdigest()


# --- the table --------------------------------------------------------------------------------------------


def _snapshot_rows() -> list[Row]:
    volumes = {
        "a name nobody has": ("nobody", NO_SUCH, "'nobody'"),
        "an id nobody has": (NO_VOLUME, NO_SUCH, NO_VOLUME),
        "a malformed id": ("vol-123", "InvalidVolumeID.Malformed", '"vol-123"'),
        "a snapshot's id": ("{base-id}", NO_SUCH, "{base-id}"),
        "a snapshot's name": ("base", NO_SUCH, "'base'"),
        "a job's id": ("{done-id}", NO_SUCH, "{done-id}"),
        "a key's id": ("{good-id}", NO_SUCH, "{good-id}"),
        "a key's alias": ("alias/good", NO_SUCH, "alias/good"),
        "nothing by name": ("", NO_SUCH, "''"),
    }
    names = {
        "kept": ("Ebsd.NameInUse", 4, "'kept' is in use by {kept-id}", "rename"),
        "base": ("Ebsd.NameInUse", 4, "'base' is in use by {base-id}", "rename"),
        "vol-1": (VALUE, 2, "reads like an id", NAME_HINT),
        "snap-x": (VALUE, 2, "reads like an id", NAME_HINT),
        "job-x": (VALUE, 2, "reads like an id", NAME_HINT),
        "alias/x": (VALUE, 2, "an alias", NAME_HINT),
        "": (VALUE, 2, "characters or a length", NAME_HINT),
        "a b": (VALUE, 2, "characters or a length", NAME_HINT),
        "a@b": (VALUE, 2, "characters or a length", NAME_HINT),
        "../up": (VALUE, 2, "characters or a length", NAME_HINT),
        "a\x1b[31mb": (VALUE, 2, "characters or a length", NAME_HINT),
        "a" * 64: (VALUE, 2, "characters or a length", NAME_HINT),
    }
    verbs = {
        "snapshot": ("snapshot", "idle"),
        "snapshot of an attached volume with": ("snapshot", "kept"),
        "copy with": ("copy", "base"),
        "copy with a key and": ("copy", "base", "--encrypted", "--key", "good"),
    }
    return [
        *[
            row(
                f"snapshot of {what}",
                ("snapshot", "--", name),
                code,
                3,
                message,
                "`ebsctl list`" if code == NO_SUCH else "17",
            )
            for what, (name, code, message) in volumes.items()
        ],
        *[
            row(f"{verb} the name {name[:12]!a}", (*words, f"--name={name}"), code, status, message, hint)
            for name, (code, status, message, hint) in names.items()
            for verb, words in verbs.items()
            if verb == "snapshot" or name in ("kept", "base", "vol-1", "a b")
        ],
        row("snapshot of nothing", "snapshot", "Usage", 2, "say which volumes", "--all-attached"),
        row("snapshot of two, one of them not there", "snapshot idle nowhere", NO_SUCH, 3, "nowhere", "`ebsctl list`"),
        row("snapshot with a tag without =", "snapshot idle --tag word", VALUE, 2, "KEY=VALUE"),
        row("snapshot with a tag of AWS's", "snapshot kept --tag aws:x=1", VALUE, 2, "reserved", "KEY=VALUE"),
        row(
            "snapshot with 51 tags",
            ("snapshot", "kept", *(f"--tag=t{n}=x" for n in range(51))),
            "TagLimitExceeded",
            2,
            "more than 50 tags",
        ),
    ]


def _source_rows() -> list[Row]:
    """Restores and copies of what is no completed snapshot of the caller."""
    sources = {
        "a name nobody has": ("nobody", NO_SNAP, "'nobody'", SNAPSHOT_HINT, 0),
        "an id nobody has": (NO_SNAPSHOT, NO_SNAP, NO_SNAPSHOT, SNAPSHOT_HINT, 0),
        "a malformed id": ("snap-123", BAD_SNAP, '"snap-123"', "", 0),
        "a volume's name": ("idle", NO_SNAP, "'idle'", SNAPSHOT_HINT, 0),
        "a volume's id": ("{idle-id}", NO_SNAP, "{idle-id}", SNAPSHOT_HINT, 0),
        "a job's id": ("{done-id}", NO_SNAP, "{done-id}", SNAPSHOT_HINT, 0),
        "nothing by name": ("", NO_SNAP, "''", SNAPSHOT_HINT, 0),
        "root's name": ("base", NO_SNAP, "'base'", SNAPSHOT_HINT, STRANGER),
        "root's id": ("{base-id}", NO_SNAP, "{base-id}", SNAPSHOT_HINT, STRANGER),
    }
    verbs = {
        "restore of": lambda source: ("create", "new", f"--from={source}"),
        "copy of": lambda source: ("copy", "--name=new", "--", source),
    }
    return [
        row(f"{verb} {what}", words(source), code, 3, message, hint, uid=uid)
        for what, (source, code, message, hint, uid) in sources.items()
        for verb, words in verbs.items()
    ]


def _key_rows() -> list[Row]:
    keys = {
        "an alias that is not": ("none", "NotFoundException", 3, "alias/none is not found", "key alias list"),
        "a key id that is not": (NO_KEY, "NotFoundException", 3, NO_KEY, "`ebsctl key list`"),
        "a malformed ARN": ("arn:aws:kms:x", "InvalidArnException", 3, "arn:aws:kms:x", ""),
        "a snapshot": ("{base-id}", "NotFoundException", 3, "{base-id}", "key"),
        "a disabled key": ("off", "DisabledException", 6, "is disabled", "ebsctl key enable"),
    }
    verbs = {"copy": ("copy", "base", "--name=new"), "restore": ("create", "new", "--from=base")}
    rows = [
        row(f"{verb} under {what}", (*words, "--encrypted", f"--key={key}"), code, status, message, hint)
        for what, (key, code, status, message, hint) in keys.items()
        for verb, words in verbs.items()
    ]
    for verb, words in verbs.items():
        for key in ("good", "off", "none"):
            rows.append(
                row(
                    f"{verb} under the key {key} without --encrypted",
                    (*words, f"--key={key}"),
                    "InvalidParameterDependency",
                    2,
                    "KmsKeyId requires the parameter Encrypted",
                    "--encrypted",
                )
            )
    theirs = {"copy": ("copy", "own-snap", "--name=new"), "restore": ("create", "new", "--from=own-snap")}
    for verb, words in theirs.items():
        for what, key, code, status, message in (
            ("by ARN", "{good-arn}", "AccessDeniedException", 5, "not authorized"),
            ("by id", "{good-id}", "NotFoundException", 3, "{good-id}"),
            ("by alias", "good", "NotFoundException", 3, "alias/good"),
        ):
            rows.append(
                row(
                    f"{verb} of a user under root's key, {what}",
                    (*words, "--encrypted", f"--key={key}"),
                    code,
                    status,
                    message,
                    uid=STRANGER,
                )
            )
    return rows


def _size_rows() -> list[Row]:
    wrong = {
        "0": (VALUE, 2, "positive", SIZE_HINT),
        "-1": (VALUE, 2, "not a number", SIZE_HINT),
        "-4M": (VALUE, 2, "not a number", SIZE_HINT),
        "4M": (VALUE, 2, "cannot be smaller than existing size, 8388608 bytes", ""),
        str(8 * MIB - 4096): (VALUE, 2, "cannot be smaller than existing size", ""),
        str(8 * MIB + 1): (VALUE, 2, "multiple of the sector", SIZE_HINT),
        str(8 * MIB + 512): (VALUE, 2, "multiple of the sector", SIZE_HINT),
        str((64 << 40) + 4096): (VALUE, 2, "largest volume is 64 TiB", SIZE_HINT),
        "65T": (VALUE, 2, "largest volume is 64 TiB", SIZE_HINT),
        "9" * 20 + "T": (VALUE, 2, "largest volume is 64 TiB", SIZE_HINT),
        "+64T": (VALUE, 2, "largest volume is 64 TiB", SIZE_HINT),
        "+1": (VALUE, 2, "multiple of the sector", SIZE_HINT),
        "+-4096": (VALUE, 2, "not a number", SIZE_HINT),
        "++4M": (VALUE, 2, "not a number", SIZE_HINT),
        "+": (VALUE, 2, "not a number", SIZE_HINT),
        "": (VALUE, 2, "not a number", SIZE_HINT),
        "16X": (VALUE, 2, "not a number", SIZE_HINT),
        "1.5G": (VALUE, 2, "not a number", SIZE_HINT),
    }
    return [
        row(f"resize {name} to {size!a}", ("resize", "--", name, size), code, status, message, hint)
        for size, (code, status, message, hint) in wrong.items()
        for name in ("idle", "kept")
        if name == "idle" or size in ("0", "4M", "+1")
    ]


ROWS: list[Row] = [
    *_snapshot_rows(),
    *_source_rows(),
    *_key_rows(),
    *_size_rows(),
    # Restores.
    row(
        "restore smaller than the snapshot",
        "create new --from base --size 4M",
        VALUE,
        2,
        "smaller than snapshot {base-id}, expect size >= 8388608",
    ),
    row("restore to the size 0", "create new --from base --size 0", VALUE, 2, "positive", SIZE_HINT),
    row("restore to no whole sectors", f"create new --from base --size {8 * MIB + 1}", VALUE, 2, "sector", SIZE_HINT),
    row("restore beyond the largest size", "create new --from base --size 65T", VALUE, 2, "64 TiB", SIZE_HINT),
    row(
        "restore smaller under another key",
        "create new --from base --size 4M --encrypted --key good",
        VALUE,
        2,
        "smaller than snapshot {base-id}",
    ),
    row(
        "restore and format", "create new --from base --mkfs ext4", "Usage", 2, "--mkfs cannot be used", "only --mount"
    ),
    row(
        "restore, mount and not wait",
        "create new --from base --no-wait --mount /nowhere",
        "Usage",
        2,
        "--no-wait cannot be used",
        "Attach",
    ),
    row("restore under a name in use", "create kept --from base", "Ebsd.NameInUse", 4, "in use by {kept-id}", "rename"),
    row(
        "restore under a name in use, and another key",
        "create kept --from base --encrypted --key good",
        "Ebsd.NameInUse",
        4,
        "in use by {kept-id}",
        "rename",
    ),
    row("restore under a bad name", "create snap-1 --from base", VALUE, 2, "reads like an id", NAME_HINT),
    row(
        "restore with a context of ours",
        "create new --from base --context ebsd:format=x",
        "ValidationException",
        2,
        "ebsd:",
    ),
    row(
        "restore what a disabled key locks",
        "create new --from locked-snap",
        "DisabledException",
        6,
        "disabled",
        "enable",
    ),
    row(
        "copy what a disabled key locks under it",
        "copy locked-snap --encrypted --key off",
        "DisabledException",
        6,
        "disabled",
    ),
    # Keys.
    row(
        "an asymmetric key",
        "key create odd --spec RSA_2048",
        "UnsupportedOperationException",
        2,
        "RSA_2048",
        "symmetric",
    ),
    row("an elliptic key", "key create odd --spec ECC_NIST_P256", "UnsupportedOperationException", 2, "ECC_NIST_P256"),
    # Growth.
    row("resize a name nobody has", "resize nobody 16M", NO_SUCH, 3, "'nobody'", "`ebsctl list`"),
    row("resize an id nobody has", f"resize {NO_VOLUME} 16M", NO_SUCH, 3, NO_VOLUME, "`ebsctl list`"),
    row("resize a malformed id", "resize vol-1 16M", "InvalidVolumeID.Malformed", 3, '"vol-1"', "17"),
    row("resize a snapshot", "resize base 16M", NO_SUCH, 3, "'base'", "`ebsctl list`"),
    row("resize a snapshot by id", "resize {base-id} +8M", NO_SUCH, 3, "{base-id}", "`ebsctl list`"),
    row("resize root's volume", "resize {idle-id} 16M", NO_SUCH, 3, "{idle-id}", "`ebsctl list`", uid=STRANGER),
    row("resize without a size", "resize idle", "Usage", 2, "Missing argument", "--help"),
    row(
        "resize what is attached read-only",
        "resize watched 16M",
        "OperationNotPermitted",
        4,
        "{watched-id} is attached read-only",
        "Detach it",
    ),
    row(
        "resize what is attached read-only, by a little",
        "resize watched +4096",
        "OperationNotPermitted",
        4,
        "{watched-id} is attached read-only",
        "Detach it",
    ),
    # Jobs.
    *[
        row(f"{' '.join(words)} {what}", (*words, ident), NO_SUCH_JOB, 3, f"'{ident}'", JOB_HINT, uid=uid)
        for words in (("job", "show"), ("job", "wait"), ("job", "cancel"))
        for what, ident, uid in (
            ("an id nobody has", NO_JOB, 0),
            ("a malformed id", "job-1", 0),
            ("nothing by name", "", 0),
            ("a snapshot", "{base-id}", 0),
            ("a job of root's", "{done-id}", STRANGER),
        )
    ],
    row("show a job nobody has", f"show {NO_JOB}", NO_SUCH_JOB, 3, NO_JOB, JOB_HINT),
    row("wait for a job nobody has", f"wait {NO_JOB} --for completed", NO_SUCH_JOB, 3, NO_JOB, JOB_HINT),
    row("cancel a job that has ended", "job cancel {done-id}", STATE, 4, "The job {done-id} is completed"),
    row("delete a job", "delete {done-id} --yes", "Usage", 2, "A job cannot be deleted", "job cancel"),
    row("rename a job", "rename {done-id} mine", "Usage", 2, "A job cannot be", "job cancel"),
    row("tag a job", "tag {done-id} a=b", "Usage", 2, "A job cannot be", "job cancel"),
    row(
        "filter jobs by what is not",
        "list jobs --filter flavour=x",
        VALUE,
        2,
        "The filter 'flavour' is invalid",
        "destination-id",
    ),
    row(
        "filter snapshots by what is not",
        "list snapshots --filter flavour=x",
        VALUE,
        2,
        "The filter 'flavour' is invalid",
        "volume-size",
    ),
    # Wait.
    row(
        "wait too short for a volume",
        "wait idle --for in-use --timeout 0.2",
        "Ebsd.Timeout",
        8,
        "Waiting for idle to be in-use did not finish within 0.2 seconds",
    ),
    row(
        "wait too short for a deletion", "wait base --for deleted --timeout 0", "Usage", 2, "never deleted", "completed"
    ),
    row("wait no time at all", "wait kept --for available --timeout 0", "Ebsd.Timeout", 8, "within 0 seconds"),
    row("wait a negative time", "wait idle --for in-use --timeout -1", "Usage", 2, "-1", "--help"),
    row(
        "wait for what a snapshot never is",
        "wait {base-id} --for available",
        "Usage",
        2,
        "never available",
        "completed",
    ),
    row("wait for what a job never is", "wait {done-id} --for available", "Usage", 2, "never available", "cancelled"),
    row("wait for what nothing ever is", "wait base --for happy", "Usage", 2, "'happy' is not one of", "--help"),
    row("wait for what cannot come any more", "wait base --for error", STATE, 4, "does not become error by itself"),
    row("wait for a job that ended otherwise", "wait {done-id} --for failed", STATE, 4, "has ended as completed"),
    row("wait for a name nobody has", "wait nobody --for completed", NO_ID, 3, "'nobody'", "`ebsctl list`"),
    row(
        "wait for a snapshot nobody has", f"wait {NO_SNAPSHOT} --for completed", NO_SNAP, 3, NO_SNAPSHOT, SNAPSHOT_HINT
    ),
    row(
        "wait for root's snapshot",
        "wait {base-id} --for completed",
        NO_SNAP,
        3,
        "{base-id}",
        SNAPSHOT_HINT,
        uid=STRANGER,
    ),
    # Delete, show and the rest, on snapshots.
    row("delete a snapshot nobody has", f"delete {NO_SNAPSHOT} --yes", NO_SNAP, 3, NO_SNAPSHOT, SNAPSHOT_HINT),
    row("delete a malformed snapshot", "delete snap-x --yes", BAD_SNAP, 3, '"snap-x"'),
    row("delete a snapshot without --yes", "delete base", "Usage", 2, "needs a confirmation", "--yes"),
    row("attach a snapshot", "attach base", NO_SUCH, 3, "'base'", "`ebsctl list`"),
    row("attach a snapshot by id", "attach {base-id}", NO_SUCH, 3, "{base-id}", "`ebsctl list`"),
    row("rename a snapshot to a name in use", "rename base kept", "Ebsd.NameInUse", 4, "in use by {kept-id}", "rename"),
    *[
        row(f"{words[0]} root's snapshot", words, NO_SNAP, 3, "{base-id}", SNAPSHOT_HINT, uid=STRANGER)
        for words in (
            ("show", "{base-id}"),
            ("delete", "{base-id}", "--yes"),
            ("rename", "{base-id}", "mine"),
            ("tag", "{base-id}", "a=b"),
        )
    ],
    row("show root's snapshot by name", "show base", NO_ID, 3, "'base'", "`ebsctl list`", uid=STRANGER),
    row("snapshot of root's volume", "snapshot {kept-id}", NO_SUCH, 3, "{kept-id}", "`ebsctl list`", uid=STRANGER),
]


def test_no_two_rows_are_about_the_same() -> None:
    names = [entry.what for entry in ROWS]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("entry", ROWS, ids=lambda entry: entry.what.replace(" ", "-"))
def test_a_wrong_command_is_refused_and_nothing_is_lost(world: Snapshotted, entry: Row) -> None:
    arguments = [filled(argument, world.words) for argument in entry.arguments]
    message, hint = filled(entry.message, world.words), filled(entry.hint, world.words)
    before = world.everything()
    for as_json in (True, False):
        outcome = world.ctl_as(entry.uid, *(["--json"] if as_json else []), *arguments)
        if outcome.status == 0:
            world.ctl_as(entry.uid, "delete", "new", "--yes")
        assert outcome.status == entry.status, outcome
        assert outcome.stdout == ""
        (check_json if as_json else check_plain)(entry, outcome, message, hint)
    assert world.everything() == before
    assert read_data(world.words["kept-device"]) == DATA
    check_log(world)


def check_log(world: Snapshotted) -> None:
    log = world.ebsd.log.read_text()
    assert "incident" not in log, log[log.index("incident") - 200 :][:4000]


def test_after_all_of_that_the_reference_volume_and_snapshot_verify(world: Snapshotted) -> None:
    with world.attached_for_a_while("idle") as device:
        assert world.show("idle")["Integrity"] == "verified"
        assert read_data(device) == DATA
    world.check_base()


CALLS: list[tuple[str, str, dict[str, Any], str, int, str]] = [
    ("copy unencrypted", "CopySnapshot", {"SourceSnapshotId": "base", "Encrypted": False}, VALUE, 2, "(false)"),
    (
        "copy unencrypted under a key",
        "CopySnapshot",
        {"SourceSnapshotId": "base", "Encrypted": False, "KmsKeyId": "alias/good"},
        VALUE,
        2,
        "(false)",
    ),
    ("copy nothing", "CopySnapshot", {"Name": "new"}, "MissingParameter", 2, "SourceSnapshotId"),
    ("copy with a number", "CopySnapshot", {"SourceSnapshotId": 7}, VALUE, 2, "SourceSnapshotId"),
    ("snapshot nothing", "CreateSnapshot", {}, "MissingParameter", 2, "VolumeId"),
    ("snapshot with more", "CreateSnapshot", {"VolumeId": "idle", "Colour": 1}, "UnknownParameter", 2, "Colour"),
    ("grow by nothing", "ModifyVolume", {"VolumeId": "idle"}, "MissingParameter", 2, "Size"),
    (
        "grow to two sizes",
        "ModifyVolume",
        {"VolumeId": "idle", "Size": 1, "SizeBytes": 16 * MIB},
        "InvalidParameterCombination",
        2,
        "Size and SizeBytes",
    ),
    ("grow below zero", "ModifyVolume", {"VolumeId": "idle", "SizeBytes": -4096}, VALUE, 2, "positive"),
    ("grow to 0 GiB", "ModifyVolume", {"VolumeId": "idle", "Size": 0}, VALUE, 2, "positive"),
    ("grow to 65537 GiB", "ModifyVolume", {"VolumeId": "idle", "Size": 65537}, VALUE, 2, "largest"),
    ("grow to 2**63", "ModifyVolume", {"VolumeId": "idle", "SizeBytes": 2**63 - 4096}, VALUE, 2, "largest"),
    ("grow to true", "ModifyVolume", {"VolumeId": "idle", "SizeBytes": True}, VALUE, 2, "SizeBytes"),
    ("shrink by whole GiB", "ModifyVolume", {"VolumeId": "bulk", "SizeBytes": 8 * MIB}, VALUE, 2, "smaller"),
    (
        "restore below zero",
        "CreateVolume",
        {"SnapshotId": "base", "SizeBytes": -1, "Name": "new"},
        VALUE,
        2,
        "positive",
    ),
    ("delete a volume as a snapshot", "DeleteSnapshot", {"SnapshotId": "idle"}, NO_SNAP, 3, "'idle'"),
    ("delete a snapshot as a volume", "DeleteVolume", {"VolumeId": "base"}, NO_SUCH, 3, "'base'"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].replace(" ", "-"))
def test_a_wrong_call_that_ebsctl_does_not_make_is_refused(
    world: Snapshotted, call: tuple[str, str, dict[str, Any], str, int, str]
) -> None:
    _, action, members, code, status, message = call
    before = world.everything()
    with pytest.raises(EbsdError) as refused:
        world.client.ec2(action, **members)
    assert (refused.value.code, refused.value.exit_status) == (code, status)
    assert message in refused.value.message
    assert world.everything() == before
    check_log(world)


# --- what is no error -------------------------------------------------------------------------------------


def test_a_volume_from_an_encrypted_snapshot_is_encrypted_whatever_one_asks(world: Snapshotted) -> None:
    world.ok("defaults", "disable-encryption")
    try:
        outcome = world.ebsd.ctl("create", "overruled", "--from", "base", "--no-encrypted")
        assert outcome.status == 0
        assert "note: The volume is encrypted: its snapshot is" in outcome.stderr
        shown, source = world.show("overruled"), world.show("base")
        assert shown["Encrypted"] is True
        assert shown["KmsKeyId"] == source["KmsKeyId"]
        assert shown["DataEncryptionKeyId"] == source["DataEncryptionKeyId"]
        with world.attached_for_a_while("overruled") as device:
            assert read_data(device) == DATA
        world.ok("delete", "overruled", "--yes")
        outcome = world.ebsd.ctl("copy", "base", "--name", "overruled")
        assert outcome.status == 0
        assert world.show("overruled")["Encrypted"] is True
        world.ok("delete", "overruled", "--yes")
    finally:
        world.ok("defaults", "enable-encryption")


@pytest.mark.parametrize("name", ["idle", "kept"])
@pytest.mark.parametrize("size", ["+0", "8M"])
def test_growth_by_nothing_changes_nothing(world: Snapshotted, name: str, size: str) -> None:
    before = world.everything()
    outcome = world.ctl_as(0, "--json", "resize", name, size)
    assert (outcome.status, outcome.json["SizeBytes"]) == (0, 8 * MIB), outcome
    assert world.everything() == before
    assert read_data(world.words["kept-device"]) == DATA


def test_another_user_sees_nothing_of_roots(world: Snapshotted) -> None:
    snapshots = world.ctl_as(STRANGER, "--json", "list", "snapshots").json["Snapshots"]
    assert [item["Name"] for item in snapshots] == ["own-snap"]
    assert world.ctl_as(STRANGER, "--json", "job", "list").json == {"Jobs": []}
    assert world.ctl_as(STRANGER, "--json", "list", "jobs").json == {"Jobs": []}
    # Names are the account's own.
    assert world.ctl_as(STRANGER, "snapshot", "own", "--name", "base").status == 0
    assert world.ctl_as(STRANGER, "--json", "show", "base").json["OwnerId"] == f"{STRANGER:012d}"
    assert world.ctl_as(STRANGER, "delete", "base", "--yes").status == 0
    assert world.show("base")["SnapshotId"] == world.words["base-id"]


# --- what is still in use elsewhere -----------------------------------------------------------------------


def test_snapshots_outlive_their_volume_and_restored_volumes_their_snapshot(world: Snapshotted) -> None:
    used = world.bytes_used()
    world.ok("create", "parent", "--size", "8M")
    with world.attached_for_a_while("parent") as device:
        write_data(device)
    world.ok("snapshot", "parent", "--name", "first")
    world.ok("copy", "first", "--name", "second")
    world.ok("delete", "parent", "--yes")
    world.ok("create", "child", "--from", "first")
    world.ok("attach", "child")
    world.ok("delete", "first", "--yes")
    status, error = world.refused("delete", "first", "--yes")
    assert (status, error["Code"]) == (3, "InvalidID")
    assert read_data(world.device_of("child")) == DATA
    world.ok("detach", "child")
    with world.attached_for_a_while("child") as device:
        assert world.show("child")["Integrity"] == "verified"
        assert read_data(device) == DATA
    world.ok("create", "grandchild", "--from", "second")
    world.ok("delete", "child", "--yes")
    world.ok("delete", "second", "--yes")
    with world.attached_for_a_while("grandchild") as device:
        assert read_data(device) == DATA
    world.ok("delete", "grandchild", "--yes")
    assert world.bytes_used() == used
    world.check_base()


def test_the_second_of_two_deletions_finds_nothing(world: Snapshotted) -> None:
    ident = world.ok("snapshot", "idle", "--name", "twice")
    before = len(world.snapshots())
    world.ok("delete", ident, "--yes")
    status, error = world.refused("delete", ident, "--yes")
    assert (status, error["Code"]) == (3, NO_SNAP)
    with pytest.raises(EbsdError) as refused:
        world.client.ec2("DeleteSnapshot", SnapshotId=ident)
    assert refused.value.code == NO_SNAP
    assert len(world.snapshots()) == before - 1
    # Two at once: one of them does it.
    ident = world.ok("snapshot", "idle", "--name", "twice")
    told: list[str] = []

    def remove() -> None:
        try:
            world.client.ec2("DeleteSnapshot", SnapshotId=ident)
            told.append("")
        except EbsdError as error:
            told.append(error.code)

    threads = [threading.Thread(target=remove) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == ["", NO_SNAP]
    check_log(world)


# --- while a snapshot is pending --------------------------------------------------------------------------


def check_refused(world: Snapshotted, command: str, code: str, status: int, message: str, hint: str = "") -> None:
    """See that a command is refused soon, as a row of the table would be."""
    entry = row(command, command, code, status, message, hint)
    began = time.monotonic()
    for as_json in (True, False):
        outcome = world.ctl_as(0, *(["--json"] if as_json else []), *command.split())
        assert outcome.status == status, (command, outcome)
        (check_json if as_json else check_plain)(entry, outcome, message, hint)
    assert time.monotonic() - began < 4, f"{command} did wait"


def test_while_a_snapshot_is_pending_the_volume_gives_no_second_one(world: Snapshotted) -> None:
    """The volume process stands still, so that the seal cannot end."""
    ebsd = world.ebsd
    world.ok("create", "frozen", "--size", "8M")
    world.ok("attach", "frozen")
    write_data(world.device_of("frozen"))
    volume = world.show("frozen")
    (pid,) = [p for p in ebsd.processes()["volumes"] if holds(ebsd, volume["VolumeId"], p)]
    first: list[Outcome] = []
    thread = threading.Thread(target=lambda: first.append(ebsd.ctl("--json", "snapshot", "frozen", "--name", "cold")))
    with stopped(pid):
        thread.start()
        (pending,) = until(lambda: [s for s in world.snapshots() if s["State"] == "pending"], "a pending snapshot")
        ident = pending["SnapshotId"]
        names = world.names()
        check_refused(
            world,
            "snapshot frozen",
            "ConcurrentSnapshotLimitExceeded",
            4,
            f"A snapshot of {volume['VolumeId']} is being taken already",
            "Wait until it is completed",
        )
        told = f"Snapshot '{ident}' is in the 'pending' state"
        for command in ("create new --from cold", f"create new --from {ident} --size 16M", "copy cold --name new"):
            check_refused(world, command, STATE, 4, told, f"ebsctl wait {ident} --for completed")
        check_refused(world, "copy cold --encrypted --key good", STATE, 4, told, f"ebsctl wait {ident} --for completed")
        check_refused(world, "delete cold --yes", STATE, 4, told, f"ebsctl wait {ident} --for completed")
        check_refused(world, "wait cold --for completed --timeout 0.2", "Ebsd.Timeout", 8, "cold to be completed")
        assert world.names() == names
        assert not first
    thread.join(30)
    (outcome,) = first
    assert outcome.status == 0, outcome
    assert outcome.json["State"] == "completed"
    world.ok("wait", "cold", "--for", "completed", "--timeout", "5")
    assert read_data(world.device_of("frozen")) == DATA
    world.ok("create", "thawed", "--from", "cold")
    with world.attached_for_a_while("thawed") as device:
        assert read_data(device) == DATA
    world.ok("detach", "frozen")
    for name in ("thawed", "cold", "frozen"):
        world.ok("delete", name, "--yes")
    world.check_base()
    check_log(world)


def holds(ebsd: Installation, volume: str, pid: int) -> bool:
    """Say whether a volume process serves this volume: it has its durable map open."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if os.readlink(fd) == str(ebsd.state / "maps" / volume):
                return True
    return any(os.readlink(fd).endswith(volume) for fd in Path(f"/proc/{pid}/fd").iterdir())


# --- while a job copies -----------------------------------------------------------------------------------


@dataclass
class Job:
    """A job in the middle of its work, whose worker stands still."""

    ident: str
    destination: str
    worker: int


COPY = ("copy", "bulk-snap", "--name", "half", "--encrypted", "--key", "good", "--no-wait")
RESTORE = ("create", "half", "--from", "bulk-snap", "--encrypted", "--key", "good", "--no-wait")


@contextmanager
def half_done(world: Snapshotted, *command: str) -> Iterator[Job]:
    """Start a job and let its worker stand still once it has written something, and not all."""
    used = world.bytes_used()
    document = world.ctl_as(0, "--json", *command)
    assert document.status == 0, document
    (job,) = until(lambda: [job for job in world.jobs() if job["State"] == "running"], "a running job")
    (worker,) = until(world.workers, "a worker")
    with stopped(worker):
        # Data may be there before ebsd knows that the worker has begun; then it still needs the key service.
        until(
            lambda: (world.bytes_used() > used + MIB and world.job(job["JobId"])["Total"] > 0) or let_run(worker),
            "data in the copy",
        )
        assert world.bytes_used() < used + BULK, "the copy was too fast"
        assert world.job(job["JobId"])["State"] == "running"
        yield Job(job["JobId"], job["DestinationId"], worker)


def grants_of(world: Snapshotted, key: str, job: str) -> list[str]:
    grants = json.loads(world.ok("--json", "key", "grants", key))["Grants"]
    return [grant["GrantId"] for grant in grants if grant.get("Name", "").startswith(job)]


def let_run(pid: int) -> None:
    """Let a process that stands still run for a moment."""
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.005)
    os.kill(pid, signal.SIGSTOP)


def test_while_a_copy_is_made_nothing_can_be_taken_from_under_it(world: Snapshotted) -> None:
    names = world.names()
    with half_done(world, *COPY) as job:
        source = world.show("bulk-snap")["SnapshotId"]
        told = f"Snapshot '{job.destination}' is in the 'pending' state"
        check_refused(
            world, "delete bulk-snap --yes", "InvalidSnapshot.InUse", 4, f"{source} is currently in use by {job.ident}",
            f"ebsctl job wait {job.ident}",
        )  # fmt: skip
        for command in ("delete half --yes", "create new --from half", "copy half"):
            check_refused(world, command, STATE, 4, told, f"ebsctl wait {job.destination}")
        for command in (f"wait {job.ident} --for completed --timeout 0.2", "wait half --for completed --timeout 0.2"):
            check_refused(world, command, "Ebsd.Timeout", 8, "to be completed did not finish within 0.2 seconds")
        for command in ("show", "wait", "cancel"):
            outcome = world.ctl_as(STRANGER, "--json", "job", command, job.ident)
            assert (outcome.status, outcome.error["Code"]) == (3, NO_SUCH_JOB)
        assert world.ctl_as(STRANGER, "--json", "list", "jobs").json == {"Jobs": []}
        assert world.job(job.ident)["State"] == "running"
    assert world.show("job", "wait", job.ident)["State"] == "completed"
    assert world.names() == sorted([*names, "half"])
    # After its end there is nothing to cancel, and the copy is whole.
    check_refused(world, f"job cancel {job.ident}", STATE, 4, f"The job {job.ident} is completed")
    assert world.show("half")["State"] == "completed"
    world.ok("create", "whole", "--from", "half")
    assert world.bulk_digest("whole") == world.digest
    for name in ("whole", "half"):
        world.ok("delete", name, "--yes")
    assert world.names() == names
    check_log(world)


def test_while_a_volume_is_made_it_cannot_be_used_or_deleted(world: Snapshotted) -> None:
    names = world.names()
    with half_done(world, *RESTORE) as job:
        told = f"Volume '{job.destination}' is in the 'creating' state"
        for command in ("attach half", "snapshot half", "resize half 1G"):
            check_refused(world, command, STATE, 4, told)
        check_refused(world, "detach half", STATE, 4, "'creating' state")
        check_refused(world, "delete half --yes", STATE, 4, job.ident, f"ebsctl job cancel {job.ident}")
        check_refused(world, "delete bulk-snap --yes", "InvalidSnapshot.InUse", 4, job.ident, "job wait")
        check_refused(world, "wait half --for available --timeout 0.2", "Ebsd.Timeout", 8, "half to be available")
        assert world.show("half")["State"] == "creating"
    assert world.show("job", "wait", job.ident)["State"] == "completed"
    assert world.bulk_digest("half") == world.digest
    world.ok("delete", "half", "--yes")
    assert world.names() == names
    check_log(world)


def check_cancelled(world: Snapshotted, job: str, names: list[str], used: int) -> None:
    """See that a job is cancelled for everybody, and that nothing is left of it."""
    assert world.job(job)["State"] == "cancelled"
    assert world.names() == names
    assert world.bytes_used() == used
    check_refused(world, f"job cancel {job}", STATE, 4, f"The job {job} is cancelled")
    check_refused(world, f"job wait {job}", "Ebsd.JobCancelled", 1, f"The job {job} was cancelled")
    check_refused(world, f"wait {job} --for completed", STATE, 4, "has ended as cancelled", "was cancelled")
    assert world.ctl_as(0, "wait", job, "--for", "cancelled").status == 0
    until(lambda: not world.workers(), "no worker")
    check_log(world)


@pytest.mark.parametrize("command", [COPY, RESTORE], ids=["copy", "restore"])
def test_a_job_cancelled_in_the_middle_leaves_nothing(world: Snapshotted, command: tuple[str, ...]) -> None:
    names, used = world.names(), world.bytes_used()
    with half_done(world, *command) as job:
        outcome = world.ctl_as(0, "--json", "job", "cancel", job.ident)
        assert (outcome.status, outcome.json["State"]) == (0, "cancelled"), outcome
    check_cancelled(world, job.ident, names, used)
    status, error = world.refused("show", job.destination)
    assert (status, error["Code"]) == (3, NO_SNAP if command is COPY else NO_SUCH)


@pytest.mark.parametrize("command", [COPY, RESTORE], ids=["copy", "restore"])
def test_a_job_cancelled_at_once_leaves_nothing(world: Snapshotted, command: tuple[str, ...]) -> None:
    names, used = world.names(), world.bytes_used()
    action = "CopySnapshot" if command is COPY else "CreateVolume"
    source = "SourceSnapshotId" if command is COPY else "SnapshotId"
    for _ in range(5):
        reply = world.client.ec2(action, **{source: "bulk-snap", "Name": "half", "Encrypted": True, "KmsKeyId": "good"})
        cancelled = world.client.control("CancelJob", JobId=reply["JobId"])["Job"]
        assert cancelled["State"] == "cancelled"
    check_cancelled(world, reply["JobId"], names, used)


def test_the_command_that_waits_for_a_cancelled_job_says_what_became_of_it(world: Snapshotted) -> None:
    names, used = world.names(), world.bytes_used()
    told: list[Outcome] = []
    thread = threading.Thread(target=lambda: told.append(world.ebsd.ctl("--json", *COPY[:-1])))
    thread.start()
    (worker,) = until(world.workers, "a worker")
    with stopped(worker):
        (job,) = [job for job in world.jobs() if job["State"] == "running"]
        world.ok("job", "cancel", job["JobId"])
    thread.join(30)
    (outcome,) = told
    assert (outcome.status, outcome.stdout) == (1, "")
    assert outcome.error["Code"] == "Ebsd.JobCancelled"
    assert f"{job['DestinationId']} is gone" in outcome.error["Hint"]
    check_cancelled(world, job["JobId"], names, used)


def test_a_job_that_ends_while_it_is_cancelled_has_completed(world: Snapshotted) -> None:
    """Whoever was told that it completed may use the copy already: a cancellation that comes late is refused.

    The key service stands still where the job raises the floor of what it made, which is behind its last word.
    """
    names = world.names()
    told: list[str] = []

    def cancel(job: str) -> None:
        try:
            told.append(world.client.control("CancelJob", JobId=job)["Job"]["State"])
        except EbsdError as error:
            told.append(error.code)

    with half_done(world, *COPY) as job:
        # The job has done with the key service until then: its grants are retired while the worker runs already.
        for key in {world.show(name)["KmsKeyId"] for name in ("bulk-snap", "half")}:
            until(lambda key=key: not grants_of(world, key, job.ident), "grants retired")
        (broker,) = children(world.ebsd, "ebsd.kms")
        os.kill(broker, signal.SIGSTOP)
    try:
        finished = world.ebsd.state / "maps" / job.destination
        until(finished.exists, "the map of the copy")
        thread = threading.Thread(target=cancel, args=(job.ident,))
        thread.start()
        time.sleep(0.3)
    finally:
        os.kill(broker, signal.SIGCONT)
    thread.join(30)
    ended = world.job(job.ident)["State"]
    assert (told, ended) == ([STATE], "completed")
    assert world.names() == sorted([*names, "half"])
    world.ok("delete", "half", "--yes")
    check_log(world)


def test_a_copy_of_what_a_disabled_key_locks_fails_and_leaves_nothing(world: Snapshotted) -> None:
    """Whether the source can be read shows only in the job, as in EBS."""
    names, used = world.names(), world.bytes_used()
    for command in (("copy", "locked-snap", "--name", "new"), ("create", "new", "--from", "locked-snap")):
        status, error = world.refused(*command, "--encrypted", "--key", "good")
        assert status == 6, error
        assert "disabled" in error["Message"]
        assert world.names() == names
        assert world.bytes_used() == used
    assert all(job["State"] in FINAL for job in world.jobs())
    check_log(world)


def test_at_the_end_the_source_of_all_these_copies_is_what_it_was(world: Snapshotted) -> None:
    assert all(job["State"] in FINAL for job in world.jobs())
    world.ok("create", "again", "--from", "bulk-snap")
    assert world.bulk_digest("again") == world.digest
    world.ok("delete", "again", "--yes")
    with world.attached_for_a_while("bulk"):
        assert world.show("bulk")["Integrity"] == "verified"
    world.check_base()
    assert read_data(world.words["kept-device"]) == DATA


# --- a store that cannot take it --------------------------------------------------------------------------


@contextmanager
def small_store(root: Path, size: int, *options: str) -> Iterator[Installation]:
    """Run an ebsd whose state directory is an ext4 of its own."""
    image, state = root / "image", root / "state"
    state.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", *options, image], check=True)
    subprocess.run(["mount", "-o", "loop", image, state], check=True)
    try:
        made = Installation(root)
        made.start()
        try:
            yield made
        finally:
            made.ctl("detach", "--all")
            made.ctl("detach", "--all", "--force")
            made.stop()
    finally:
        subprocess.run(["umount", state], check=True)
    assert not made.leftovers()


def test_a_copy_that_fills_the_store_fails_whole_and_succeeds_with_more_space(tmp_path: Path) -> None:
    commands = [("copy", "s", "--name", "c"), ("create", "c", "--from", "s")]
    with small_store(tmp_path, 64 * MIB) as ebsd:
        world = Snapshotted(ebsd)
        world.ok("key", "create", "good")
        world.ok("create", "data", "--size", "32M")
        piece = random.Random(5).randbytes(20 * MIB)
        with world.attached_for_a_while("data") as device, open(device, "r+b", buffering=0) as file:
            file.write(piece)
            os.fsync(file.fileno())
        world.ok("snapshot", "data", "--name", "s")
        (ebsd.state / "weight").write_bytes(bytes(24 * MIB))
        names, used, snapshots = world.names(), world.bytes_used(), world.snapshots()
        for count, command in enumerate((*commands, *commands), 1):
            status, error = world.refused(*command, "--encrypted", "--key", "good")
            assert (status, error["Code"]) == (10, "Ebsd.NoSpace"), error
            assert "Delete snapshots or volumes" in error["Hint"]
            assert "is gone" in error["Hint"]
            assert [job["State"] for job in world.jobs()] == ["failed"] * count
            assert all(job["Error"]["Code"] == "Ebsd.NoSpace" for job in world.jobs())
            assert world.names() == names
            assert world.snapshots() == snapshots
            assert world.bytes_used() == used
        assert any(job["Done"] > 0 for job in world.jobs()), "the store was to be full in the middle, not at once"
        check_refused(
            world, f"job wait {world.jobs()[0]['JobId']}", "Ebsd.NoSpace", 10, "not enough space", "Delete snapshots"
        )
        (ebsd.state / "weight").unlink()
        for command in commands:
            world.ok(*command, "--encrypted", "--key", "good")
            volume = "c"
            if command[0] == "copy":
                volume = "again"
                world.ok("create", volume, "--from", "c")
                world.ok("delete", "c", "--yes")
            with world.attached_for_a_while(volume) as device:
                assert world.show(volume)["Integrity"] == "verified"
                assert Path(device).read_bytes()[: len(piece)] == piece
            world.ok("delete", volume, "--yes")
        assert world.names() == names
        with world.attached_for_a_while("data") as device:
            assert world.show("data")["Integrity"] == "verified"
            assert Path(device).read_bytes()[: len(piece)] == piece
        check_log(world)


def test_a_size_that_the_host_file_system_cannot_hold_is_refused(tmp_path: Path) -> None:
    """An ext4 with blocks of 1 KiB and no extents takes files of 16 GiB."""
    with small_store(tmp_path, 96 * MIB, "-b", "1024", "-O", "^extent,^64bit,^huge_file,^metadata_csum") as ebsd:
        world = Snapshotted(ebsd)
        world.ok("create", "data", "--size", "8M")
        world.ok("snapshot", "data", "--name", "s")
        world.ok("attach", "data")
        write_data(world.device_of("data"))
        for attached in (True, False):
            before = (world.volumes(), world.snapshots(), world.bytes_used())
            for command in ("resize data 20G", "create new --size 20G", "create new --from s --size 20G"):
                check_refused(world, command, *TOO_LARGE)
                assert (world.volumes(), world.snapshots(), world.bytes_used()) == before, command
            if attached:
                assert read_data(world.device_of("data")) == DATA
                world.ok("detach", "data")
        world.ok("resize", "data", "16M")
        with world.attached_for_a_while("data") as device:
            assert world.show("data")["Integrity"] == "verified"
            assert read_data(device) == DATA
        check_log(world)


TOO_LARGE = ("Ebsd.HostUnsupported", 1, "cannot hold a file of that size", "Choose a smaller size")
