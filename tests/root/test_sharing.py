"""Snapshots shared between real users, all of it through ebsctl, with the data compared.

Alice owns, Bob is let use, Carol is a stranger. What Bob makes is his own; what he must not do he is refused; and Carol
is told of a snapshot that is not hers what she is told of none.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from installation import BIN, Installation, Outcome, installation

pytestmark = [pytest.mark.other_user, pytest.mark.timeout(300)]

MIB: Final = 1 << 20
SIZE: Final = 12 * MIB
NOBODYS: Final = "snap-00000000000000000"

WRITE = """
import os, sys
file = os.open(sys.argv[1], os.O_WRONLY)
for offset in sys.argv[2:]:
    length = int.from_bytes(sys.stdin.buffer.read(8), "big")
    os.pwrite(file, sys.stdin.buffer.read(length), int(offset))
os.fsync(file)
"""
CALL = """
import json, sys
from ebsctl.client import Client
print(json.dumps(Client(sys.argv[1]).ec2(sys.argv[2], **json.loads(sys.argv[3]))))
"""
READ = "import sys; f=open(sys.argv[1],'rb'); sys.stdout.buffer.write(f.read())"

RIGHTS: Final = [
    "kms:DescribeKey", "kms:CreateGrant", "kms:GenerateDataKey*", "kms:ReEncrypt*", "kms:Decrypt",
]  # fmt: skip
"""What EBS wants of a recipient's rights on the key of a shared snapshot."""


@dataclass
class User:
    """A user of the host at ebsctl."""

    ebsd: Installation
    name: str
    uid: int

    @property
    def account(self) -> str:
        return f"{self.uid:012}"

    def _run(self, *command: str | Path, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", *command],
            input=stdin, stdin=None if stdin is not None else subprocess.DEVNULL, capture_output=True, timeout=120,
            cwd="/",
        )  # fmt: skip

    def ctl(self, *words: str, stdin: bytes | None = None) -> Outcome:
        done = self._run(BIN / "ebsctl", "--socket", self.ebsd.socket, *words, stdin=stdin)
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())

    def ok(self, *words: str, stdin: bytes | None = None) -> str:
        done = self.ctl(*words, stdin=stdin)
        assert done.status == 0, f"{words}: {done.stderr}\n{self.ebsd.log.read_text()[-3000:]}"
        return done.stdout.strip()

    def json(self, *words: str) -> Any:
        return json.loads(self.ok("--json", *words))

    def refused(self, *words: str) -> tuple[int, str, str]:
        """Run what must fail; returns exit status, code and text."""
        done = self.ctl("--json", *words)
        assert done.status != 0, f"{words} was to fail: {done.stdout}"
        return done.status, done.error["Code"], done.error["Message"] + "|" + done.error["Hint"]

    @contextmanager
    def attached(self, volume: str, *more: str) -> Iterator[str]:
        path = self.ok("attach", volume, "--file", *more)
        try:
            yield path
        finally:
            self.ok("detach", volume)

    def write(self, volume: str, *pieces: tuple[int, bytes]) -> None:
        """Write (offset, content) pieces to a volume, and flush them."""
        with self.attached(volume) as path:
            content = b"".join(len(piece).to_bytes(8, "big") + piece for _, piece in pieces)
            offsets = [str(offset) for offset, _ in pieces]
            done = self._run(sys.executable, "-I", "-c", WRITE, path, *offsets, stdin=content)
            assert done.returncode == 0, done.stderr

    def call(self, action: str, **members: object) -> Any:
        """Call an action of EC2 that ebsctl has no word for."""
        done = self._run(sys.executable, "-I", "-c", CALL, self.ebsd.socket, action, json.dumps(members))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def read(self, volume: str) -> bytes:
        with self.attached(volume, "--read-only") as path:
            done = self._run(sys.executable, "-I", "-c", READ, path)
            assert done.returncode == 0, done.stderr
            return done.stdout

    def snapshots(self, *words: str) -> set[str]:
        return {found["SnapshotId"] for found in self.json("list", "snapshots", *words)["Snapshots"]}

    def everything(self) -> str:
        """Return all that the user has, without what changes by itself."""
        kinds = ("volumes", "snapshots", "keys")
        return json.dumps([self.json("list", kind) for kind in kinds], sort_keys=True)


@pytest.fixture(scope="module")
def ebsd() -> Iterator[Installation]:
    root = Path(tempfile.mkdtemp(prefix="ebsd-sharing-"))
    root.chmod(0o711)
    try:
        with installation(root, "allow_unencrypted = true") as made:
            yield made
    finally:
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def users(ebsd: Installation) -> Iterator[tuple[User, User, User]]:
    names = [f"ebsd-s{os.getpid()}-{letter}" for letter in "abc"]
    try:
        for name in names:
            subprocess.run(["useradd", "--no-create-home", "--shell", "/usr/sbin/nologin", name], check=True)
        alice, bob, carol = (User(ebsd, name, pwd.getpwnam(name).pw_uid) for name in names)
        yield alice, bob, carol
    finally:
        for name in names:
            subprocess.run(["userdel", name], check=False, capture_output=True)


def content(seed: int, length: int) -> bytes:
    return b"".join(((seed << 32) + at).to_bytes(8, "big") for at in range(length // 8))


@dataclass
class Shared:
    """An encrypted snapshot of Alice's under a key of hers that Bob may use."""

    key: str
    volume: str
    snapshot: str
    data: bytes


def allow(owner: User, key: str, whom: User, rights: list[str] = RIGHTS) -> None:
    """Let a user use a key, by its policy."""
    policy = json.loads(owner.ok("key", "policy", key))
    principal = {"AWS": f"arn:aws:iam::{whom.account}:root"}
    policy["Statement"][1:] = [{"Effect": "Allow", "Principal": principal, "Action": rights, "Resource": "*"}]
    owner.ok("key", "policy", key, "--set", "-", stdin=json.dumps(policy).encode())


def made(owner: User, tag: str, *options: str) -> tuple[str, str, bytes]:
    """Make a volume with data at both ends, and a snapshot with a name and a tag; returns volume, snapshot, data."""
    volume = owner.ok("create", tag, "--size", "12M", *options)
    head, tail = content(len(tag), 3 * MIB + 8), content(len(tag) + 1, MIB)
    owner.write(volume, (0, head), (SIZE - len(tail), tail))
    words = ("--name", f"{tag}-snap", "--tag", "team=secret-team", "--description", "for all")
    return volume, owner.ok("snapshot", volume, *words), head.ljust(SIZE - len(tail), b"\0") + tail


@pytest.fixture(scope="module")
def shared(users: tuple[User, User, User]) -> Shared:
    """What the tests before the last one leave as it was."""
    alice, bob, _ = users
    alice.ok("key", "create", "team")
    key = alice.json("key", "show", "team")["Arn"]
    allow(alice, key, bob)
    volume, snapshot, data = made(alice, "data", "--encrypted", "--key", key)
    alice.ok("share", snapshot, "--add", bob.name)
    return Shared(key, volume, snapshot, data)


def test_what_a_recipient_sees(users: tuple[User, User, User], shared: Shared) -> None:
    alice, bob, carol = users
    assert shared.snapshot in bob.snapshots()
    assert shared.snapshot in bob.snapshots("--restorable-by", "self")
    assert shared.snapshot in bob.snapshots("--owner", alice.name)
    assert shared.snapshot not in bob.snapshots("--owner", "self")
    assert shared.snapshot not in bob.snapshots("--restorable-by", carol.account)
    assert shared.snapshot in alice.snapshots("--restorable-by", str(bob.uid))
    assert shared.snapshot not in alice.snapshots("--restorable-by", carol.name)
    for words in ((), ("--owner", alice.name), ("--restorable-by", "self"), ("--restorable-by", "all")):
        assert shared.snapshot not in carol.snapshots(*words)
    seen, own = bob.json("show", shared.snapshot), alice.json("show", shared.snapshot)
    assert own["Tags"] == [{"Key": "team", "Value": "secret-team"}]
    assert (seen["OwnerId"], seen["Name"], seen["Tags"]) == (alice.account, shared.snapshot, [])
    assert (seen["Encrypted"], seen["KmsKeyId"], seen["Description"]) == (True, shared.key, "for all")
    assert "secret-team" not in json.dumps(seen)
    hidden = {"LastVerification", "UniqueBytes", "SharedBytes", "PauseMicroseconds", "KeyMaterialId"}
    assert not hidden & set(seen)
    assert shared.snapshot not in bob.snapshots("--filter", "tag:team=secret-team")
    # names are one's own
    assert bob.refused("show", own["Name"])[:2] == (3, "InvalidID")
    assert bob.refused("create", "x", "--from", own["Name"])[:2] == (3, "InvalidSnapshot.NotFound")
    listed = alice.json("share", shared.snapshot, "--show")
    assert listed["CreateVolumePermissions"] == [{"UserId": bob.account}]
    assert alice.ok("share", shared.snapshot) == f"{bob.account}\t{bob.name}"


OWNERS_OWN: Final = [
    ["delete", "$S", "--yes"],
    ["tag", "$S", "a=b"],
    ["tag", "$S", "team-"],
    ["rename", "$S", "stolen"],
    ["verify", "$S"],
    ["lock", "$S", "--days", "1"],
    ["unlock", "$S"],
    ["share", "$S", "--add", "$ME"],
    ["share", "$S", "--remove", "$ME"],
    ["share", "$S", "--public"],
    ["share", "$S", "--private"],
    ["share", "$S", "--reset"],
    ["share", "$S", "--show"],
]
"""What only its owner does to a snapshot."""
OF_ALL: Final = [
    ["show", "$S"],
    ["create", "x", "--from", "$S"],
    ["create", "x", "--from", "$S", "--size", "1M"],
    ["create", "x", "--from", "$S", "--encrypted", "--key", "alias/none"],
    ["copy", "$S"],
    ["copy", "$S", "--encrypted", "--allow-damaged"],
    ["wait", "$S", "--for", "completed"],
]


def test_a_recipient_does_nothing_else(users: tuple[User, User, User], shared: Shared) -> None:
    alice, bob, _ = users
    before = alice.everything(), alice.json("share", shared.snapshot)
    for words in OWNERS_OWN:
        filled = [{"$S": shared.snapshot, "$ME": bob.name}.get(word, word) for word in words]
        assert bob.refused(*filled)[:2] == (5, "AuthFailure"), words
    assert (alice.everything(), alice.json("share", shared.snapshot)) == before
    # The volume that it was taken of, and its key, are not shared with it.
    for words in (["show", shared.volume], ["attach", shared.volume, "--file"], ["snapshot", shared.volume]):
        assert bob.refused(*words)[:2] == (3, "InvalidVolume.NotFound")
    for words in (["key", "disable", shared.key], ["key", "policy", shared.key], ["key", "grants", shared.key]):
        assert bob.refused(*words)[1] in ("AccessDeniedException", "NotFoundException")


def test_a_stranger_learns_nothing(users: tuple[User, User, User], shared: Shared) -> None:
    alice, _, carol = users
    alice.ok("defaults", "disable-encryption")
    alice.ok("create", "hidden", "--size", "1M")
    hidden = alice.ok("snapshot", "hidden")
    alice.ok("share", hidden, "--public")
    alice.ok("defaults", "block-public-snapshots")
    try:
        for words in [*OWNERS_OWN[::3], *OF_ALL]:
            told = set()
            for snapshot in (NOBODYS, shared.snapshot, hidden):
                filled = [{"$S": snapshot, "$ME": carol.name}.get(word, word) for word in words]
                status, code, text = carol.refused(*filled)
                told.add((status, code, text.replace(snapshot, "SNAPSHOT")))
            assert len(told) == 1, words
            assert next(iter(told))[:2] == (3, "InvalidSnapshot.NotFound"), words
        for name in ("alice", "all", "self"):
            scope = ("--owner", alice.name) if name == "alice" else ("--restorable-by", name)
            assert not carol.snapshots(*scope) & {shared.snapshot, hidden}
    finally:
        alice.ok("defaults", "allow-public-snapshots")


def test_public_snapshots(users: tuple[User, User, User]) -> None:
    alice, bob, carol = users
    for user in (alice, carol):
        user.ok("defaults", "disable-encryption")
    _, snapshot, data = made(alice, "open", "--no-encrypted")
    alice.ok("share", snapshot, "--public")
    assert alice.json("share", snapshot)["CreateVolumePermissions"] == [{"Group": "all"}]
    assert snapshot not in carol.snapshots()
    assert snapshot in carol.snapshots("--restorable-by", "all")
    assert snapshot in carol.snapshots("--owner", alice.account)
    volume = carol.json("create", "from-open", "--from", snapshot)
    assert (volume["Encrypted"], volume["OwnerId"]) == (False, carol.account)
    assert carol.read("from-open") == data
    encrypted = bob.json("create", "from-open", "--from", snapshot)  # his encryption by default is on
    assert encrypted["Encrypted"]
    assert bob.read("from-open") == data

    alice.ok("defaults", "block-public-snapshots")
    assert alice.json("defaults", "show")["SnapshotBlockPublicAccess"] == "block-all-sharing"
    assert alice.json("share", snapshot)["CreateVolumePermissions"] == [{"Group": "all"}], "not edited"
    assert carol.refused("create", "y", "--from", snapshot)[:2] == (3, "InvalidSnapshot.NotFound")
    assert snapshot not in carol.snapshots("--restorable-by", "all")
    alice.ok("defaults", "block-public-snapshots", "--new-only")
    assert snapshot in carol.snapshots("--restorable-by", "all"), "only new ones are kept from it"
    alice.ok("share", snapshot, "--private")
    assert alice.refused("share", snapshot, "--public")[:2] == (4, "OperationNotPermitted")
    assert carol.refused("show", snapshot)[:2] == (3, "InvalidSnapshot.NotFound")
    alice.ok("share", snapshot, "--add", carol.name)
    assert carol.json("show", snapshot)["OwnerId"] == alice.account
    alice.ok("share", snapshot, "--reset")
    alice.ok("defaults", "allow-public-snapshots")
    alice.ok("share", snapshot, "--public")
    alice.ok("delete", snapshot, "--yes")
    assert carol.read("from-open") == data
    for user in (carol, bob):
        user.ok("delete", "from-open", "--yes")
    carol.ok("defaults", "enable-encryption")
    alice.ok("delete", "open", "--yes")


def test_what_cannot_be_shared(users: tuple[User, User, User], shared: Shared) -> None:
    alice, bob, _ = users
    alice.ok("create", "managed", "--size", "1M", "--encrypted")
    snapshot = alice.ok("snapshot", "managed")
    status, code, text = alice.refused("share", snapshot, "--add", bob.name)
    assert (status, code) == (4, "OperationNotPermitted")
    assert text.startswith("Encrypted snapshots with EBS default key cannot be shared.")
    status, code, text = alice.refused("share", shared.snapshot, "--public")
    assert (status, code) == (4, "OperationNotPermitted")
    assert text.startswith("Encrypted snapshots cannot be shared publicly.")
    assert alice.refused("share", shared.snapshot, "--add", "no-such-user")[:2] == (3, "InvalidUserID.Malformed")
    assert alice.refused("share", shared.volume, "--add", bob.name)[0] == 3
    assert alice.json("share", shared.snapshot)["CreateVolumePermissions"] == [{"UserId": bob.account}]


def test_the_right_to_use_the_key_is_asked(users: tuple[User, User, User], shared: Shared) -> None:
    alice, bob, _ = users
    before = bob.everything()

    def denied() -> None:
        for words in (["create", "no", "--from", shared.snapshot], ["copy", shared.snapshot, "--name", "no"]):
            status, code, text = bob.refused(*words)
            assert (status, code) == (5, "AccessDeniedException"), text
            assert "key policy" in text
        assert bob.everything() == before, "something was left behind"

    allow(alice, shared.key, bob, [right for right in RIGHTS if right != "kms:Decrypt"])
    denied()
    allow(alice, shared.key, bob, ["kms:ListAliases"])
    names = ("DescribeKey", "CreateGrant", "GenerateDataKeyWithoutPlaintext", "ReEncryptFrom", "ReEncryptTo", "Decrypt")
    granted = [word for name in names for word in ("--operation", name)]
    grant = alice.ok("key", "grant", shared.key, "--to", bob.name, *granted)
    bob.ok("create", "granted", "--from", shared.snapshot)
    assert bob.read("granted") == shared.data
    bob.ok("delete", "granted", "--yes")
    alice.ok("key", "revoke", shared.key, grant.split()[0])
    denied()
    allow(alice, shared.key, bob)
    alice.ok("key", "disable", shared.key)
    assert bob.refused("create", "no", "--from", shared.snapshot)[:2] == (6, "DisabledException")
    assert bob.everything() == before
    alice.ok("key", "enable", shared.key)


def test_the_audit_log_has_both(users: tuple[User, User, User], shared: Shared) -> None:
    alice, bob, carol = users
    bob.ok("create", "seen", "--from", shared.snapshot)
    for user in (alice, bob):
        events = user.json("audit", "--key", shared.key)["Records"]
        for_whom = [e["additionalEventData"].get("onBehalfOf") for e in events if e["eventName"] == "Decrypt"]
        assert bob.account in {whom["accountId"] for whom in for_whom if whom}, events
        grants = [e for e in events if e["eventName"] == "CreateGrant"]
        assert bob.account in {e["userIdentity"]["accountId"] for e in grants}
        assert alice.account in {r["accountId"] for e in grants for r in e["resources"]}
    assert shared.snapshot not in carol.ok("--json", "audit")


def test_a_recipient_reads_blocks(users: tuple[User, User, User], shared: Shared, ebsd: Installation) -> None:
    alice, bob, carol = users
    place = ebsd.root / "bobs"
    place.mkdir()
    os.chown(place, bob.uid, bob.uid)
    bob.ok("blocks", "get", shared.snapshot, str(place / "copy.img"))
    assert (place / "copy.img").read_bytes() == shared.data
    nothing = (3, "ResourceNotFoundException")
    assert carol.refused("blocks", "list", shared.snapshot)[:2] == nothing
    for words in (
        ["start", "--size", "12M", "--parent", shared.snapshot],
        ["complete", shared.snapshot, "--count", "0"],
    ):
        assert bob.refused("blocks", *words)[:2] == (5, "AccessDeniedException")
        assert carol.refused("blocks", *words)[:2] == nothing
    alice.ok("share", shared.snapshot, "--remove", bob.name)
    assert bob.refused("blocks", "list", shared.snapshot)[:2] == nothing  # whatever process has it open
    alice.ok("share", shared.snapshot, "--add", bob.name)
    alice.ok("defaults", "disable-encryption")
    _, plain, _ = made(alice, "seen-by-all", "--no-encrypted")
    alice.ok("defaults", "enable-encryption")
    alice.ok("share", plain, "--public")
    assert bob.refused("blocks", "list", plain)[:2] == (2, "ValidationException")
    alice.ok("share", plain, "--add", bob.name)
    assert bob.json("blocks", "list", plain)["Blocks"]
    allow(alice, shared.key, carol, [right for right in RIGHTS if right != "kms:Decrypt"])
    alice.ok("share", shared.snapshot, "--add", carol.name)
    assert carol.refused("blocks", "list", shared.snapshot)[:2] == (5, "AccessDeniedException")
    alice.ok("share", shared.snapshot, "--remove", carol.name)
    allow(alice, shared.key, bob)
    alice.ok("delete", plain, "--yes")
    alice.ok("delete", "seen-by-all", "--yes")


# --- jobs -------------------------------------------------------------------------------------------------

SLOW: Final = 512 * 1024
"""Bytes per second of a copy that something is done beside: its 4 MiB take 8 seconds."""


def begin_copy(bob: User, snapshot: str, name: str) -> tuple[str, str]:
    """Begin a slow copy; returns its job and itself."""
    reply = bob.call("CopySnapshot", SourceSnapshotId=snapshot, Name=name, Rate=SLOW)
    return reply["JobId"], reply["Snapshot"]["SnapshotId"]


def wait_until_it_copies(bob: User, job: str) -> None:
    deadline = time.monotonic() + 60
    while not bob.json("job", "show", job)["Done"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_has_begun_goes_on_whatever_is_taken_back(users: tuple[User, User, User], shared: Shared) -> None:
    alice, bob, _ = users
    job, copy = begin_copy(bob, shared.snapshot, "begun")
    wait_until_it_copies(bob, job)
    alice.ok("share", shared.snapshot, "--remove", bob.name)
    allow(alice, shared.key, bob, ["kms:ListAliases"])
    try:
        assert bob.refused("copy", shared.snapshot)[:2] == (3, "InvalidSnapshot.NotFound")
        status, code, text = alice.refused("delete", shared.snapshot, "--yes")
        assert (status, code) == (4, "InvalidSnapshot.InUse")
        assert bob.account in text
        assert job not in text, "his job is his"
        assert alice.refused("job", "show", job)[:2] == (3, "Ebsd.JobNotFound")
        bob.ok("job", "wait", job)
    finally:
        allow(alice, shared.key, bob)
        alice.ok("share", shared.snapshot, "--add", bob.name)
    bob.ok("create", "of-begun", "--from", copy)
    assert bob.read("of-begun") == shared.data


def test_a_job_that_is_started_anew_needs_the_key_again_and_not_the_snapshot(
    ebsd: Installation, users: tuple[User, User, User], shared: Shared
) -> None:
    alice, bob, _ = users
    job, copy = begin_copy(bob, shared.snapshot, "killed")
    wait_until_it_copies(bob, job)
    alice.ok("share", shared.snapshot, "--remove", bob.name)
    ebsd.kill()
    ebsd.start()
    bob.ok("job", "wait", job)
    bob.ok("create", "of-killed", "--from", copy)
    assert bob.read("of-killed") == shared.data

    alice.ok("share", shared.snapshot, "--add", bob.name)
    before = bob.everything()
    grants = alice.json("key", "grants", shared.key)
    job, copy = begin_copy(bob, shared.snapshot, "denied")
    wait_until_it_copies(bob, job)
    allow(alice, shared.key, bob, ["kms:DescribeKey", "kms:CreateGrant"])
    ebsd.kill()
    ebsd.start()
    try:
        status, code, _ = bob.refused("job", "wait", job)
        assert (status, code) == (5, "AccessDeniedException")
        assert bob.everything() == before
        assert alice.json("key", "grants", shared.key) == grants
    finally:
        allow(alice, shared.key, bob)


# --- the last one: the owner gives all of it up --------------------------------------------------------------


def test_a_recipient_restores_and_copies_under_keys_of_his_own(users: tuple[User, User, User], shared: Shared) -> None:
    alice, bob, _ = users
    volume = bob.json("create", "mine", "--from", shared.snapshot)
    assert volume["OwnerId"] == bob.account
    managed = bob.json("key", "show", "alias/aws/ebs")["Arn"]
    source = bob.json("show", shared.snapshot)
    assert (volume["KmsKeyId"], volume["SnapshotId"]) == (managed, shared.snapshot)
    assert volume["DataEncryptionKeyId"] != source["DataEncryptionKeyId"]
    assert bob.read("mine") == shared.data

    bob.ok("key", "create", "bobs")
    own = bob.json("key", "show", "bobs")["Arn"]
    named = bob.json("create", "named", "--from", shared.snapshot, "--encrypted", "--key", "bobs", "--size", "16M")
    assert named["KmsKeyId"] == own
    assert bob.read("named") == shared.data.ljust(16 * MIB, b"\0")

    copy = bob.json("copy", shared.snapshot, "--name", "kept", "--encrypted", "--key", "bobs")
    assert (copy["OwnerId"], copy["KmsKeyId"], copy["Tags"]) == (bob.account, own, [])
    again = bob.json("create", "again", "--from", "kept")
    assert again["DataEncryptionKeyId"] == copy["DataEncryptionKeyId"], "a restore of his own copy shares its key"

    # What he made needs neither the snapshot, nor the key, nor Alice.
    alice.ok("share", shared.snapshot, "--remove", bob.name)
    alice.ok("key", "disable", shared.key)
    alice.ok("delete", shared.snapshot, "--yes")
    alice.ok("delete", shared.volume, "--yes")
    bob.write("mine", (100, b"bob was here"))
    assert bob.read("mine")[:112] == shared.data[:100] + b"bob was here"
    assert bob.read("again") == shared.data
    assert bob.json("verify", "kept")["DamagedChunks"] == 0
