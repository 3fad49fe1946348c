"""Shows that ebsd run by an ordinary user serves that user block files, keeps his data, and leaves nothing behind.

The daemon's uid needs a /dev/fuse it may open and a name in the user database (fusermount3 asks for it). Neither is
sure on a test host, and the host's own must stay as they are: so everything here runs in a mount namespace with a
0666 node, a passwd file and a /dev/shm of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from installation import BIN, Installation

pytestmark = pytest.mark.other_user

OWNER = 23457
STRANGER = 23458
NAMELESS = 23459
"""A uid that no passwd file knows."""

SIZE = 64 << 20

# Mounts of other ebsd instances would stay alive, and their devices busy, for as long as this copy of them exists.
_DROP_FOREIGN_MOUNTS = r"""
awk '{ for (i = 7; $i != "-"; i++); if ($(i+1) == "fuse.ebsd" || $(i+2) == "ebsd" || $(i+2) ~ /loop/) print $5 }' \
    /proc/self/mountinfo | tac | while read -r place; do umount -l "$place" 2>/dev/null; done || true
"""

_PREPARE = """
set -e
mount -t tmpfs -o mode=1777 shm /dev/shm
mkdir {own}
mount -t tmpfs -o mode=0755 own {own}
mknod -m {mode} {own}/fuse c 10 229
chmod {mode} {own}/fuse
mount --bind {own}/fuse /dev/fuse
cp /etc/passwd {own}/passwd
echo 'ebsd-owner:x:{owner}:{owner}::/nonexistent:/bin/sh' >> {own}/passwd
mount --bind {own}/passwd /etc/passwd
echo ready
exec sleep 3600
"""


@dataclass
class Namespace:
    """A mount namespace, kept by a sleeping process, and what runs in it."""

    root: Path
    keeper: subprocess.Popen[str]

    def command_as(self, uid: int) -> list[str]:
        user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "env", f"HOME={self.root}"]
        return ["nsenter", "-m", "-t", str(self.keeper.pid), *(user if uid else [])]

    def run(self, *command: str | Path, uid: int = OWNER) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.command_as(uid), *command], capture_output=True, text=True, timeout=60)

    def ok(self, *command: str | Path, uid: int = OWNER) -> str:
        done = self.run(*command, uid=uid)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def mounts(self) -> list[str]:
        """Return the mounts below the test's directory, the namespace's own fittings left out."""
        lines = Path(f"/proc/{self.keeper.pid}/mountinfo").read_text().splitlines()
        return [line for line in lines if str(self.root) in line and line.split()[4] != str(self.root / "own")]

    def shared_memory(self, uid: int) -> list[Path]:
        """Return what lies in /dev/shm/ebsd-UID."""
        base = Path(f"/proc/{self.keeper.pid}/root/dev/shm/ebsd-{uid}")
        return sorted(base.rglob("*")) if base.exists() else []


@contextmanager
def namespace(*, fuse_mode: str = "0666") -> Iterator[Namespace]:
    root = Path(tempfile.mkdtemp(prefix="ebsd-user-"))
    root.chmod(0o755)
    script = _DROP_FOREIGN_MOUNTS + _PREPARE.format(own=root / "own", mode=fuse_mode, owner=OWNER)
    keeper = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "bash", "-c", script], stdout=subprocess.PIPE, text=True
    )
    try:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == "ready\n"
        yield Namespace(root, keeper)
    finally:
        keeper.kill()
        keeper.communicate()
        shutil.rmtree(root)


@contextmanager
def daemon_of(space: Namespace, uid: int) -> Iterator[Installation]:
    """Run an ebsd of this user; afterwards nothing of it may be mounted in the namespace."""
    home = space.root / f"user-{uid}"
    home.mkdir(mode=0o755)
    os.chown(home, uid, uid)
    made = Installation(home, prefix=space.command_as(uid))
    made.start()
    try:
        yield made
    finally:
        made.close()
    assert space.mounts() == []


@pytest.fixture(scope="module")
def space() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture(scope="module")
def ebsd(space: Namespace) -> Iterator[Installation]:
    with daemon_of(space, OWNER) as running:
        yield running
    assert space.shared_memory(OWNER) == []


def attached(ebsd: Installation, name: str) -> Path:
    """Make a volume and return its block file."""
    ebsd.ok("create", name, "--size", str(SIZE))
    return Path(ebsd.ok("attach", name, "--file"))


def refusal(space: Namespace, ebsd: Installation, uid: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return space.run(BIN / "ebsctl", "--socket", ebsd.socket, *arguments, uid=uid)


def test_the_daemon_runs_as_the_user_and_says_so(ebsd: Installation) -> None:
    status = ebsd.ctl_json("status")
    assert status["Uid"] == OWNER
    findings = {finding["Check"]: finding for finding in ebsd.ctl_json("doctor")["Findings"]}
    assert findings["/dev/fuse"]["Level"] == "ok"
    assert "block files" in findings["loop devices"]["Message"]


def test_attach_file_gives_a_block_file_that_only_its_owner_can_open(space: Namespace, ebsd: Installation) -> None:
    block_file = attached(ebsd, "private")
    assert space.ok("stat", "-c", "%F %s %a %u", block_file).split() == [
        "regular",
        "file",
        str(SIZE),
        "600",
        str(OWNER),
    ]
    assert space.run("head", "-c1", block_file, uid=STRANGER).returncode != 0
    assert space.run("head", "-c1", block_file, uid=0).returncode != 0, "FUSE shuts even root out"
    ebsd.ok("detach", "private")


def test_ext4_in_the_block_file_survives_detach_restart_and_attach(space: Namespace, ebsd: Installation) -> None:
    block_file = attached(ebsd, "linux")
    content = os.urandom(3 << 20)
    original = ebsd.root / "original"
    original.write_bytes(content)
    original.chmod(0o644)
    space.ok("mkfs.ext4", "-q", "-F", block_file)
    space.ok("debugfs", "-w", "-R", f"write {original} kept", block_file)
    space.ok("e2fsck", "-fn", block_file)

    ebsd.stop()
    space.ok("e2fsck", "-fn", block_file)  # ebsd is away, the volume is not
    ebsd.start()
    space.ok("e2fsck", "-fn", block_file)
    ebsd.ok("detach", "linux")
    assert space.mounts() == []
    ebsd.stop()
    assert space.shared_memory(OWNER) == []
    ebsd.start()

    assert Path(ebsd.ok("attach", "linux", "--file")) == block_file
    assert ebsd.ctl_json("show", "linux")["Integrity"] == "verified"
    space.ok("e2fsck", "-fn", block_file)
    read_back = ebsd.root / "read-back"
    space.ok("debugfs", "-R", f"dump kept {read_back}", block_file)
    assert read_back.read_bytes() == content
    ebsd.ok("detach", "linux")
    stored = b"".join(path.read_bytes() for path in (ebsd.state / "layers").rglob("*") if path.is_file())
    assert content[:512] not in stored


def test_mkfs_works_on_a_block_file(space: Namespace, ebsd: Installation) -> None:
    ebsd.ok("create", "formatted", "--size", str(SIZE))
    block_file = ebsd.ok("attach", "formatted", "--file", "--mkfs", "ext4")
    space.ok("e2fsck", "-fn", block_file)
    ebsd.ok("detach", "formatted")


def test_qemu_uses_the_block_file_as_a_raw_image(space: Namespace, ebsd: Installation) -> None:
    block_file = attached(ebsd, "machine")
    assert f'"virtual-size": {SIZE}' in space.ok("qemu-img", "info", "--output=json", "-f", "raw", block_file)
    image = ebsd.root / "image.qcow2"
    space.ok("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE))
    space.ok("qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 1M 3M", "-c", "write -P 0xa5 40M 64k", image)
    space.ok("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", image, block_file)
    space.ok("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, block_file)
    space.ok("qemu-io", "-f", "raw", "-c", "write -P 0x77 8M 512", "-c", "flush", block_file)
    assert space.run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, block_file).returncode == 1
    ebsd.ok("detach", "machine")
    ebsd.ok("attach", "machine", "--file", "--read-only")
    read = space.ok(
        "qemu-io", "-r", "-f", "raw", "-c", "read -P 0x5a 1M 3M", "-c", "read -P 0x77 8M 512", "-c", "read -P 0 0 1M",
        block_file,
    )  # fmt: skip
    assert "verification failed" not in read
    assert space.run("qemu-io", "-f", "raw", "-c", "write 0 4k", block_file).returncode != 0
    ebsd.ok("detach", "machine")


@pytest.mark.parametrize("options", [(), ("--mount", "there"), ("--mkfs", "ext4")], ids=" ".join)
def test_attach_without_file_says_what_to_do_and_changes_nothing(ebsd: Installation, options: Sequence[str]) -> None:
    name = f"no-loop-{len(options)}{''.join(options)[2:4]}"
    ebsd.ok("create", name, "--size", "1M")
    directory = ebsd.root / "there"
    wanted = [str(directory) if word == "there" else word for word in options]
    status, error = ebsd.refused("attach", name, *wanted)
    assert (status, error["Code"]) == (5, "UnauthorizedOperation")
    assert "root" in error["Message"]
    assert "--file" in error["Hint"]
    assert not directory.exists()
    assert ebsd.ctl_json("show", name)["State"] == "available"


def test_detach_is_refused_while_the_block_file_is_open_and_works_afterwards(
    space: Namespace, ebsd: Installation
) -> None:
    block_file = attached(ebsd, "open")
    space.ok("qemu-io", "-f", "raw", "-c", "write -P 0x11 0 1M", block_file)
    holder = subprocess.Popen(
        [*space.command_as(OWNER), "bash", "-c", 'exec 7<>"$0"; echo open; exec sleep 600', str(block_file)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        status, error = ebsd.refused("detach", "open")
        assert (status, error["Code"]) == (4, "Ebsd.VolumeBusy")
        assert str(block_file) in error["Hint"]
        space.ok("qemu-io", "-f", "raw", "-c", "read -P 0x11 0 1M", "-c", "write -P 0x22 1M 1M", block_file)
    finally:
        holder.kill()
        holder.communicate()
    deadline = time.monotonic() + 10
    while ebsd.ctl("detach", "open").status != 0:
        assert time.monotonic() < deadline
    ebsd.ok("attach", "open", "--file")
    read = space.ok("qemu-io", "-f", "raw", "-c", "read -P 0x11 0 1M", "-c", "read -P 0x22 1M 1M", block_file)
    assert "verification failed" not in read
    ebsd.ok("detach", "open")


@pytest.mark.parametrize("arguments", [("list",), ("status",), ("create", "theirs", "--size", "1M"), ("show", "none")])
def test_another_user_is_refused(space: Namespace, ebsd: Installation, arguments: Sequence[str]) -> None:
    before = ebsd.ctl_json("list")
    done = refusal(space, ebsd, STRANGER, *arguments)
    assert done.returncode == 5
    assert "AuthFailure" in done.stderr
    assert f"serves only its own user, uid {OWNER}" in done.stderr
    assert ebsd.ctl_json("list") == before


def test_the_key_service_refuses_another_user_too(space: Namespace, ebsd: Installation) -> None:
    done = refusal(space, ebsd, STRANGER, "key", "create", "theirs")
    assert done.returncode == 5, f"uid {STRANGER} made a key in the key service of uid {OWNER}: {done.stdout}"
    assert "AuthFailure" in done.stderr


def test_root_may_administer_the_users_ebsd(space: Namespace, ebsd: Installation) -> None:
    ebsd.ok("create", "seen-by-root", "--size", "1M")
    assert "seen-by-root" in refusal(space, ebsd, 0, "list").stdout


def test_a_user_without_a_name_is_told_so() -> None:
    with namespace() as space, daemon_of(space, NAMELESS) as ebsd:
        ebsd.ok("create", "data", "--size", "1M")
        status, error = ebsd.refused("attach", "data", "--file")
        assert (status, error["Code"]) == (1, "Ebsd.HostUnsupported")
        assert "fusermount3" in error["Message"]
        assert ebsd.ctl_json("show", "data")["State"] == "available"
        assert not list((ebsd.runtime / "volumes").iterdir())
        assert not list((ebsd.runtime / "control").iterdir())
        assert "passwd" in error["Hint"], error["Hint"]


def test_a_device_that_the_user_may_not_open_is_named_with_its_cure() -> None:
    with namespace(fuse_mode="0600") as space, daemon_of(space, OWNER) as ebsd:
        ebsd.ok("create", "data", "--size", "1M")
        status, error = ebsd.refused("attach", "data", "--file")
        assert (status, error["Code"]) == (1, "Ebsd.HostUnsupported")
        assert "/dev/fuse" in error["Message"]
        assert "0666" in error["Hint"]
        findings = {finding["Check"]: finding for finding in ebsd.ctl("--json", "doctor").json["Findings"]}
        assert findings["/dev/fuse"]["Level"] == "failure"
        assert ebsd.ctl_json("show", "data")["State"] == "available"


def test_a_failed_attach_leaves_nothing_in_shared_memory() -> None:
    with namespace(fuse_mode="0600") as space, daemon_of(space, OWNER) as ebsd:
        ebsd.ok("create", "data", "--size", "1M")
        ebsd.refused("attach", "data", "--file")
        ebsd.stop()
        assert space.shared_memory(OWNER) == []
