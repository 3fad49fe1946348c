"""Archives between two hosts: full and incremental, byte for byte; strangers; damage; kills at both ends."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from installation import BIN, Installation, installation, run

MIB = 1 << 20
PASSPHRASE = "correct horse battery staple\n"


class Hosts:
    """Two installations, of which the second has the keys of the first, and a third that has not."""

    def __init__(self, here: Installation, there: Installation, stranger: Installation) -> None:
        self.here, self.there, self.stranger = here, there, stranger


def fill(ebsd: Installation, volume: str, *places: int, length: int = 64 * 1024) -> None:
    """Write bytes that do not compress at these offsets of a volume."""
    path = ebsd.ok("attach", volume, "--file")
    with open(path, "r+b", buffering=0) as file:
        for place in places:
            os.pwrite(file.fileno(), random.Random(f"{volume}{place}{time.monotonic()}").randbytes(length), place)
        os.fsync(file.fileno())
    ebsd.ok("detach", volume)


def digest(ebsd: Installation, snapshot: str) -> str:
    """Return SHA-256 of what a snapshot holds, read through a volume that is made of it."""
    name = f"look-{snapshot}"[:60]
    ebsd.ok("create", name, "--from", snapshot)
    with open(ebsd.ok("attach", name, "--file", "--read-only"), "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    ebsd.ok("detach", name)
    ebsd.ok("delete", name, "--yes")
    return found


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    root = tmp_path_factory.mktemp("hosts")
    for name in ("a", "b", "c"):
        (root / name).mkdir()
    phrase = root / "passphrase"
    phrase.write_text(PASSPHRASE)
    unencrypted = "allow_unencrypted = true"
    with (
        installation(root / "a", unencrypted) as here,
        installation(root / "b") as there,
        installation(root / "c") as stranger,
    ):
        here.ok("key", "create", "backup")
        here.ok("key", "create", "other")
        here.ok("create", "first", "--size", "1M", "--encrypted")  # makes alias/aws/ebs, which is in the backup then
        here.ok("key", "backup", root / "keys", "--passphrase-file", phrase)
        there.ok("key", "restore", root / "keys", "--passphrase-file", phrase)
        yield Hosts(here, there, stranger)


def snapshots_of(hosts: Hosts, name: str) -> tuple[str, str]:
    """Make two snapshots of a file system, the second with changes and growth; return their names."""
    here, mount = hosts.here, hosts.here.root / f"mnt-{name}"
    here.ok("create", name, "--size", "48M", "--encrypted", "--key", "backup")
    here.ok("attach", name, "--mkfs", "ext4", "--mount", mount)
    (mount / "kept").write_bytes(random.Random(1).randbytes(3 * MIB))
    (mount / "deleted").write_bytes(random.Random(2).randbytes(9 * MIB))
    run("sync", "-f", mount)
    here.ok("snapshot", name, "--name", f"{name}-1", "--description", "the first")
    (mount / "deleted").unlink()
    (mount / "new").write_bytes(random.Random(3).randbytes(2 * MIB))
    run("sync", "-f", mount)
    here.ok("detach", name)
    here.ok("resize", name, "56M")
    here.ok("snapshot", name, "--name", f"{name}-2")
    return f"{name}-1", f"{name}-2"


def test_full_and_incremental_archives_are_the_same_snapshots_elsewhere(hosts: Hosts, tmp_path: Path) -> None:
    here, there = hosts.here, hosts.there
    first, second = snapshots_of(hosts, "data")
    full, part, whole = tmp_path / "full", tmp_path / "part", tmp_path / "whole"
    made = here.ctl_json("archive", "export", first, full)
    here.ok("archive", "export", second, part, "--since", first)
    here.ok("archive", "export", second, whole)
    assert part.stat().st_size < whole.stat().st_size / 2
    assert full.stat().st_mode & 0o777 == 0o600
    assert random.Random(1).randbytes(3 * MIB)[4096:8192] not in full.read_bytes()
    shown = there.ctl_json("archive", "show", part)
    assert shown["BaseSnapshotId"] == here.ctl_json("show", first)["SnapshotId"]
    assert 2 * MIB <= shown["DataBytes"] < 9 * MIB, "what did not change is not in it"
    assert there.ctl_json("archive", "show", full)["ArchiveId"] == made["ArchiveId"]

    # An incremental archive needs its base, and no other.
    assert there.refused("archive", "import", part, "early")[0] == 4
    there.ok("archive", "import", full, "one")
    there.ok("archive", "import", whole, "two-whole")
    status, error = there.refused("archive", "import", part, "wrong", "--onto", "two-whole")
    assert (status, error["Code"]) == (4, "Ebsd.ArchiveNeedsBase")
    there.ok("archive", "import", part, "two")  # onto the one import that it can be
    expected = [digest(here, first), digest(here, second)]
    assert [digest(there, name) for name in ("one", "two", "two-whole")] == [*expected, expected[1]]
    one, two, two_whole = (there.ctl_json("show", name) for name in ("one", "two", "two-whole"))
    assert one["DataEncryptionKeyId"] == two["DataEncryptionKeyId"] != two_whole["DataEncryptionKeyId"]
    assert here.ctl_json("show", first)["DataEncryptionKeyId"] != one["DataEncryptionKeyId"]
    assert one["Description"] == "the first"

    # What was imported is as good as any snapshot: authentic, consistent, and it can be deleted in any order.
    for name in ("one", "two"):
        report = there.ctl_json("verify", name)
        assert (report["Kind"], report["DamagedChunks"]) == ("authenticity", 0), report
    mount = tmp_path / "mnt"
    there.ok("create", "again", "--from", "two", "--mount", mount)
    assert (mount / "new").read_bytes() == random.Random(3).randbytes(2 * MIB)
    assert (mount / "kept").read_bytes() == random.Random(1).randbytes(3 * MIB)
    assert not (mount / "deleted").exists()
    there.ok("detach", "again")
    there.ok("delete", "one", "--yes")
    assert digest(there, "two") == expected[1]
    there.ok("archive", "export", "two", tmp_path / "onward")
    for name in ("two", "two-whole", "again"):
        there.ok("delete", name, "--yes")
    there.ok("check")


def test_who_lacks_the_key_verifies_checksums_and_imports_nothing(hosts: Hosts, tmp_path: Path) -> None:
    here, stranger = hosts.here, hosts.stranger
    here.ok("create", "strange", "--size", "2M", "--encrypted", "--key", "backup")
    fill(here, "strange", 0, 1 << 20)
    here.ok("snapshot", "strange", "--name", "strange-1")
    file = tmp_path / "archive"
    here.ok("archive", "export", "strange-1", file)
    assert here.ctl_json("archive", "verify", file)["Kind"] == "authenticity"
    assert here.ctl_json("archive", "verify", file, "--scrub")["Kind"] == "integrity"
    before = sorted(path for path in (stranger.state / "records").iterdir())
    status, error = stranger.refused("archive", "import", file, "mine")
    assert (status, error["Code"]) == (6, "Ebsd.ArchiveKeyUnavailable"), error
    assert stranger.ctl_json("archive", "verify", file)["Kind"] == "integrity"
    assert stranger.ctl("list", "snapshots").stdout == ""
    assert sorted(path for path in (stranger.state / "records").iterdir()) == before
    assert not stranger.ctl_json("list", "jobs")["Jobs"]
    # A key that is there and disabled is refused as such.
    here.ok("key", "disable", "backup")
    try:
        assert here.refused("archive", "import", file, "mine")[0] == 6
    finally:
        here.ok("key", "enable", "backup")


def test_damage_anywhere_is_found_and_leaves_nothing(hosts: Hosts, tmp_path: Path) -> None:
    here, there = hosts.here, hosts.there
    here.ok("create", "hurt", "--size", "4M", "--encrypted", "--key", "backup")
    fill(here, "hurt", 0, 1 << 20, 2 << 20)
    here.ok("snapshot", "hurt", "--name", "hurt-1")
    file = tmp_path / "archive"
    here.ok("archive", "export", "hurt-1", file)
    good = file.read_bytes()
    dice = random.Random(5)
    # Every byte is tests/unit/test_archive_format.py's business; here, what is left behind.
    places = [200, len(good) - 1, dice.randrange(len(good) // 2, len(good))]
    damaged = [good[:at] + bytes([good[at] ^ 1 << dice.randrange(8)]) + good[at + 1 :] for at in places]
    damaged += [good[: len(good) // 2], good + b"\0", b""]
    for number, raw in enumerate(damaged):
        file.write_bytes(raw)
        assert there.refused("archive", "import", file, "hurt")[0] == 7, number
    assert there.refused("archive", "verify", file)[0] == 7
    assert there.ctl("list", "snapshots").stdout == ""
    assert not list((there.state / "records").glob("snap-*"))
    assert not list((there.state / "maps").iterdir())
    there.ok("check")


def test_a_pipe_from_one_host_to_the_other(hosts: Hosts) -> None:
    here, there = hosts.here, hosts.there
    here.ok("create", "piped", "--size", "4M", "--encrypted", "--key", "backup")
    fill(here, "piped", 0, 1 << 20, length=MIB)
    here.ok("snapshot", "piped", "--name", "piped-1")
    writer = subprocess.Popen(
        [BIN / "ebsctl", "--socket", here.socket, "archive", "export", "piped-1", "-"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    reader = subprocess.run(
        [BIN / "ebsctl", "--socket", there.socket, "archive", "import", "-", "piped"],
        stdin=writer.stdout, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert writer.wait(30) == 0
    assert writer.stdout is not None
    writer.stdout.close()
    assert reader.returncode == 0, reader.stderr
    assert digest(there, "piped") == digest(here, "piped-1")
    there.ok("delete", "piped", "--yes")


def test_an_unencrypted_snapshot_is_archived_under_a_named_key_only(hosts: Hosts, tmp_path: Path) -> None:
    here, there = hosts.here, hosts.there
    here.ok("defaults", "disable-encryption")
    here.ok("create", "plain", "--size", "2M", "--no-encrypted")
    here.ok("defaults", "enable-encryption")
    fill(here, "plain", 0)
    here.ok("snapshot", "plain", "--name", "plain-1")
    file = tmp_path / "archive"
    assert here.refused("archive", "export", "plain-1", file)[0] == 2
    here.ok("archive", "export", "plain-1", file, "--key", "other")
    assert here.ctl_json("archive", "show", file)["Encrypted"] is False
    there.ok("archive", "import", file, "plain", "--key", "backup")
    assert there.ctl_json("show", "plain")["Encrypted"] is True
    assert digest(there, "plain") == digest(here, "plain-1")
    there.ok("delete", "plain", "--yes")


def test_an_export_never_touches_a_file_of_something_else(hosts: Hosts, tmp_path: Path) -> None:
    here = hosts.here
    here.ok("create", "careful", "--size", "2M", "--encrypted", "--key", "backup")
    fill(here, "careful", 0)
    here.ok("snapshot", "careful", "--name", "careful-1")
    fill(here, "careful", 65536)
    here.ok("snapshot", "careful", "--name", "careful-2")
    file = tmp_path / "precious"
    archive = tmp_path / "archive"
    here.ok("archive", "export", "careful-1", archive)
    for content in (b"precious", archive.read_bytes(), archive.read_bytes()[:70000]):
        file.write_bytes(content)
        status, error = here.refused("archive", "export", "careful-2", file)
        assert (status, error["Code"]) == (4, "Ebsd.ArchiveOfAnother")
        assert file.read_bytes() == content
    # The same archive again is there already, and stays as it is.
    before = archive.read_bytes()
    here.ok("archive", "export", "careful-1", archive)
    assert archive.read_bytes() == before


# --- kills


def slow(ebsd: Installation, *arguments: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [BIN / "ebsctl", "--socket", ebsd.socket, "archive", *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def await_job(ebsd: Installation, kind: str, done: int) -> dict[str, object]:
    """Wait until a job of this kind has done so many bytes and still works."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for job in ebsd.ctl_json("list", "jobs")["Jobs"]:
            if job["Kind"] == kind and job["State"] == "running" and job["Done"] >= done:
                return dict(job)
        time.sleep(0.02)
    raise AssertionError(f"no {kind} got so far")


@pytest.fixture(scope="module")
def large(hosts: Hosts) -> str:
    """A snapshot with 24 MiB of data."""
    hosts.here.ok("create", "large", "--size", "32M", "--encrypted", "--key", "backup")
    fill(hosts.here, "large", *(at * MIB for at in range(24)), length=MIB)
    hosts.here.ok("snapshot", "large", "--name", "large-1")
    return "large-1"


def test_an_export_that_was_killed_goes_on_in_its_file(hosts: Hosts, large: str, tmp_path: Path) -> None:
    here = hosts.here
    file = tmp_path / "archive"
    with slow(here, "export", large, file, "--rate", "8M") as command:
        await_job(here, "export-archive", 3 * MIB)
        here.kill()
        assert command.wait(30) == 9
    here.start()
    begun = file.stat().st_size
    assert MIB < begun < 20 * MIB
    front = file.read_bytes()[: begun // 2]
    (job,) = [job for job in here.ctl_json("list", "jobs")["Jobs"] if job["State"] == "interrupted"]
    assert here.refused("archive", "verify", file)[0] == 7, "half an archive is none"
    here.ok("archive", "export", large, file)
    assert file.read_bytes().startswith(front), "what was there is continued"
    assert here.ctl_json("job", "show", job["JobId"])["State"] == "completed"
    hosts.there.ok("archive", "import", file, "large")
    assert digest(hosts.there, "large") == digest(here, large)
    hosts.there.ok("delete", "large", "--yes")


@pytest.mark.parametrize("victim", ["worker", "ebsd"])
def test_an_import_that_was_killed_goes_on(hosts: Hosts, large: str, tmp_path: Path, victim: str) -> None:
    here, there = hosts.here, hosts.there
    file = tmp_path / "archive"
    here.ok("archive", "export", large, file)
    with slow(there, "import", file, "killed", "--rate", "8M") as command:
        await_job(there, "import-archive", 3 * MIB)
        if victim == "worker":
            for process in Path("/proc").glob("[0-9]*"):
                if is_worker(process, there):
                    os.kill(int(process.name), signal.SIGKILL)
            assert command.wait(60) == 0
        else:
            there.kill()
            assert command.wait(30) == 9
            there.start()
            assert there.ctl_json("show", "killed")["State"] == "pending"
            assert there.ctl("create", "half", "--from", "killed").status == 4
            # Another archive does not get in under the same name, and the right one goes on.
            other = tmp_path / "other"
            here.ok("archive", "export", large, other)
            assert there.refused("archive", "import", other, "killed")[0] == 4
            there.ok("archive", "import", file, "killed")
    assert digest(there, "killed") == digest(here, large)
    there.ok("delete", "killed", "--yes")


def is_worker(process: Path, ebsd: Installation) -> bool:
    try:
        if b"archive_importer" not in (process / "cmdline").read_bytes():
            return False
        parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        return int(parent) == ebsd.daemon_pid()
    except OSError:
        return False


def test_a_cancelled_incremental_import_leaves_its_base_as_it_was(hosts: Hosts, large: str, tmp_path: Path) -> None:
    here, there = hosts.here, hosts.there
    fill(here, "large", *(at * MIB for at in range(20)), length=MIB)
    here.ok("snapshot", "large", "--name", "large-2")
    full, part = tmp_path / "full", tmp_path / "part"
    here.ok("archive", "export", large, full)
    here.ok("archive", "export", "large-2", part, "--since", large)
    there.ok("archive", "import", full, "base")
    before = stored(there)
    with slow(there, "import", part, "never", "--rate", "4M") as command:
        job = await_job(there, "import-archive", 2 * MIB)
        assert there.ctl("delete", "base", "--yes").status == 4, "it is in use"
        there.ok("job", "cancel", str(job["JobId"]))
        assert command.wait(30) == 1
    assert there.ctl("show", "never").status == 3
    assert stored(there) <= before + MIB
    assert digest(there, "base") == digest(here, large)
    there.ok("archive", "import", part, "second", "--onto", "base")
    assert digest(there, "second") == digest(here, "large-2")
    for name in ("base", "second"):
        there.ok("delete", name, "--yes")
    there.ok("check")


def stored(ebsd: Installation) -> int:
    return sum(path.stat().st_blocks * 512 for path in (ebsd.state / "layers").rglob("*") if path.is_file())


# --- two users


def test_a_user_who_may_use_the_key_imports_what_another_exported(hosts: Hosts, tmp_path: Path) -> None:
    """Whoever has the file has nothing: the key decides, on the side of the one who imports."""
    here = hosts.here
    shutil.chown(tmp_path, 0, 0)
    names = ("ebsd-arch-1", "ebsd-arch-2")
    for name in names:
        subprocess.run(["userdel", name], check=False, capture_output=True)
    try:
        uids = []
        for name in names:
            subprocess.run(["useradd", "--no-create-home", "--shell", "/usr/sbin/nologin", name], check=True)
            uids.append(int(run("id", "-u", name).stdout))
        file = tmp_path / "archive"

        def ctl(uid: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
            """Run ebsctl as a user, from this checkout, which he may not be able to enter."""
            command = [BIN / "ebsctl", "--socket", here.socket, *arguments]
            return subprocess.run(
                ["setpriv", "--reuid", str(uid), "--clear-groups", "--bounding-set=+all", *command],
                capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip

        one, two = uids
        for place in (tmp_path, here.root):
            for parent in (place, *place.parents):
                if not parent.stat().st_mode & 0o001:
                    os.chmod(parent, parent.stat().st_mode | 0o011)
        assert ctl(one, "key", "create", "mine").returncode == 0
        assert ctl(one, "create", "vault", "--size", "2M", "--encrypted", "--key", "mine").returncode == 0
        assert ctl(one, "snapshot", "vault", "--name", "vault-1").returncode == 0
        file.touch()
        os.chmod(file, 0o666)
        assert ctl(two, "archive", "export", "vault-1", file).returncode == 3, "it is not his"
        assert file.stat().st_size == 0
        made = ctl(one, "archive", "export", "vault-1", file)
        assert made.returncode == 0, made.stderr
        denied = ctl(two, "archive", "import", file, "loot")
        assert denied.returncode == 5, denied.stderr
        assert "intact" in ctl(two, "archive", "verify", file).stdout
        arn = json.loads(ctl(one, "--json", "key", "show", "mine").stdout)["Arn"]
        account = f"{two:012d}"
        allowed = ctl(one, "key", "grant", "mine", "--to", names[1], "--operation", "Decrypt")  # fmt: skip
        assert allowed.returncode == 0, allowed.stderr
        imported = ctl(two, "archive", "import", file, "loot")
        assert imported.returncode == 0, imported.stderr
        shown = json.loads(ctl(two, "--json", "show", "loot").stdout)
        assert shown["OwnerId"] == account
        assert shown["KmsKeyId"] != arn
        assert ctl(one, "show", "loot").returncode == 3
        assert ctl(two, "delete", "loot", "--yes").returncode == 0
    finally:
        for name in names:
            subprocess.run(["userdel", name], check=False, capture_output=True)
