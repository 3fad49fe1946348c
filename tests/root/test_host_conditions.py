"""Shows that a bad host means a clear error and no loss: full disk, no FUSE, no daemon, garbage on sockets."""

from __future__ import annotations

import array
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from installation import BIN, Installation, Outcome, installation, run

from ebsd.wire.idl import Interface

STRANGER = 23456
MIB = 1 << 20


def piece(number: int) -> bytes:
    return random.Random(number).randbytes(MIB)


# --- directories by other names -----------------------------------------------------------------------------


def test_directories_that_are_named_through_links_are_cleaned_up_like_others(tmp_path: Path) -> None:
    """As /var/run is: the kernel lists mounts by the path without links."""
    real, link = tmp_path / "real", tmp_path / "link"
    (real / "inner").mkdir(parents=True)
    link.symlink_to(real)
    with installation(link / "inner" / "..") as ebsd:
        ebsd.ok("create", "data", "--size", "16M", "--encrypted")
        mount = tmp_path / "mounted"
        mount.mkdir()
        ebsd.ok("attach", "data", "--mkfs", "ext4", "--mount", mount)
        assert str(real / "run" / "volumes") in Path("/proc/self/mountinfo").read_text()
        ebsd.ok("detach", "--all")
        assert f"{real}/run/volumes/" not in Path("/proc/self/mountinfo").read_text()
        assert ebsd.ctl_json("show", "data")["State"] == "available"
        assert not ebsd.processes().get("ebsd-holder")


# --- full disk --------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Installation]:
    """An ebsd whose state lies on an ext4 of 64 MiB, 8 of which a file `weight` takes, for a test to free."""
    image, state = tmp_path / "image", tmp_path / "state"
    state.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    run("mkfs.ext4", "-q", "-m", "0", image)
    run("mount", "-o", "loop", image, state)
    try:
        (state / "weight").write_bytes(bytes(8 * MIB))
        (state / "reserve").write_bytes(bytes(MIB))  # so that the volumes of a failed test can be detached
        made = Installation(tmp_path, "[space]\nfull_wait = 0")
        made.start()
        try:
            yield made
        finally:
            (state / "reserve").unlink()
            made.ctl("detach", "--all")
            made.ctl("detach", "--all", "--force")
            made.stop()
    finally:
        run("umount", state)
    assert not made.leftovers()


def fill(path: str) -> tuple[int, OSError]:
    """Write and flush pieces until that fails; returns how many were flushed, and the failure."""
    fd = os.open(path, os.O_RDWR)
    flushed = 0
    try:
        while True:
            try:
                os.pwrite(fd, piece(flushed), flushed * MIB)
                os.fsync(fd)
            except OSError as exc:
                return flushed, exc
            flushed += 1
    finally:
        os.close(fd)


def write_without_end(file: Any, size: int) -> None:
    while True:
        file.write(b"x" * size)
        os.fsync(file.fileno())


def check_pieces(path: str, count: int) -> None:
    run("blockdev", "--flushbufs", path) if Path(path).is_block_device() else None
    with open(path, "rb") as file:
        for number in range(count):
            assert file.read(MIB) == piece(number), f"piece {number} of {count}"


@pytest.mark.parametrize("options", [("--file",), ()], ids=["block file", "loop device"])
def test_a_full_disk_is_an_error_of_the_write_and_everything_flushed_survives(
    small: Installation, options: tuple[str, ...]
) -> None:
    small.ok("create", "data", "--size", "256M")
    path = small.ok("attach", "data", *options)
    flushed, failure = fill(path)
    assert failure.errno == errno.ENOSPC or (not options and failure.errno == errno.EIO), failure
    assert 20 <= flushed < 64
    check_pieces(path, flushed)
    again, _ = fill(path)
    assert again == flushed, "pieces that have their place can be written again, no other can"

    shown = small.ctl_json("show", "data")
    assert (shown["State"], shown["Attachments"][0]["State"]) == ("in-use", "attached")
    (small.state / "weight").unlink()
    more, _ = fill(path)
    assert more > flushed, "work goes on when there is space again"
    check_pieces(path, more)
    assert "incident" not in small.log.read_text()


def test_detach_on_a_full_disk_loses_nothing(small: Installation) -> None:
    small.ok("create", "data", "--size", "256M")
    path = small.ok("attach", "data")
    flushed, _ = fill(path)
    outcome = small.ctl("--json", "detach", "data")
    if outcome.status:
        assert (outcome.status, outcome.error["Code"]) == (10, "Ebsd.NoSpace"), outcome
        assert "space" in outcome.error["Hint"]
    (small.state / "weight").unlink()
    if outcome.status:
        small.ok("detach", "data")
    path = small.ok("attach", "data")
    assert small.ctl_json("show", "data")["Integrity"] == "verified"
    check_pieces(path, flushed)
    small.ok("detach", "data")


def test_create_on_a_full_disk_says_so_and_leaves_no_half_made_volume(small: Installation) -> None:
    small.ok("create", "first", "--size", "8M")
    with (small.state / "filler").open("wb", buffering=0) as filler:
        for size in (MIB, 4096):
            with pytest.raises(OSError, match="No space left"):
                write_without_end(filler, size)
    before = small.ctl_json("list")
    status, error = small.refused("create", "second", "--size", "8M")
    assert (status, error["Code"]) == (10, "Ebsd.NoSpace"), error
    assert "space" in error["Message"]
    assert error["Hint"]
    assert small.ctl_json("list") == before
    (small.state / "weight").unlink()
    small.ok("create", "second", "--size", "8M")
    for name in ("first", "second"):
        small.ok("attach", name)
        small.ok("detach", name)
    lineages = [path for path in (small.state / "layers").iterdir() if path.is_dir()]
    assert len(lineages) == 2, "the volume that could not be made left files behind"
    assert "Traceback" not in small.log.read_text()


def test_a_full_disk_can_be_relieved_by_deleting_a_volume(small: Installation) -> None:
    for name in ("old", "new"):
        small.ok("create", name, "--size", "256M")
    with open(small.ok("attach", "old"), "r+b") as file:
        file.write(piece(0) * 8)
    small.ok("detach", "old")
    path = small.ok("attach", "new")
    flushed, _ = fill(path)
    small.ok("delete", "old", "--yes")
    more, _ = fill(path)
    assert more > flushed
    check_pieces(path, more)


def test_a_daemon_started_on_a_full_disk_answers_and_says_what_is_wrong(small: Installation) -> None:
    small.ok("create", "data", "--size", "256M")
    path = small.ok("attach", "data")
    flushed, _ = fill(path)
    small.stop()
    small.start()
    findings = {finding["Check"]: finding for finding in small.ctl("--json", "doctor").json["Findings"]}
    assert findings["space"]["Level"] == "failure"
    check_pieces(path, flushed)


# --- no /dev/fuse -----------------------------------------------------------------------------------------

_DROP_FOREIGN_MOUNTS = """
awk '{ for (i = 7; $i != "-"; i++); if ($(i+1) == "fuse.ebsd" || $(i+2) == "ebsd" || $(i+2) ~ /loop/) print $5 }' \\
    /proc/self/mountinfo | tac | while read -r place; do umount -l "$place" 2>/dev/null; done || true
"""
"""Mounts of other ebsd instances would stay alive, and their devices busy, for as long as a copy of them exists."""

_DEVICE_IS_ANOTHER = "mount --bind /dev/null /dev/fuse"
_DEVICE_IS_ABSENT = """
new=$(mktemp -d /tmp/ebsd-dev-XXXXXX)
mount -t tmpfs -o mode=0755 dev "$new"
rmdir_later=$new
cp -a /dev/null /dev/zero /dev/urandom /dev/random /dev/loop-control "$new"
mkdir "$new/shm"
mount --move "$new" /dev
rmdir "$rmdir_later"
"""


@contextmanager
def hidden_fuse(root: Path, how: str) -> Iterator[Installation]:
    """Run ebsd in a mount namespace where /dev/fuse is not what it should be."""
    script = f'set -e\n{_DROP_FOREIGN_MOUNTS}\n{how}\nexec "$@"'
    prefix = ["unshare", "-m", "--propagation", "private", "bash", "-c", script, "bash"]
    made = Installation(root, prefix=prefix)
    made.start()
    try:
        yield made
    finally:
        made.stop()
    assert not made.leftovers()


@pytest.mark.parametrize("how", [_DEVICE_IS_ABSENT, _DEVICE_IS_ANOTHER], ids=["absent", "another device"])
@pytest.mark.parametrize("options", [(), ("--file",)], ids=["loop device", "block file"])
def test_without_dev_fuse_attach_says_what_to_do_and_leaves_nothing(
    tmp_path: Path, how: str, options: tuple[str, ...]
) -> None:
    with hidden_fuse(tmp_path, how) as ebsd:
        ebsd.ok("create", "data", "--size", "8M")
        status, error = ebsd.refused("attach", "data", *options)
        assert (status, error["Code"]) == (1, "Ebsd.HostUnsupported")
        plain = ebsd.ctl("attach", "data", *options).stderr.splitlines()
        assert plain[0].startswith("error: ")
        assert plain[1].startswith("hint: ")
        shown = ebsd.ctl_json("show", "data")
        assert (shown["State"], shown["Attachments"]) == ("available", [])
        for directory in ("volumes", "control"):
            assert list((ebsd.runtime / directory).iterdir()) == []
        processes = [path.read_text() for path in Path("/proc").glob("[0-9]*/cmdline") if _is_child(path, ebsd)]
        assert [text for text in processes if "ebsd.volume" in text] == []
        assert "/dev/fuse" in error["Message"]
        assert "modprobe fuse" in error["Hint"] or "/dev/fuse" in error["Hint"]


def _is_child(path: Path, ebsd: Installation) -> bool:
    assert ebsd.daemon is not None
    try:
        return int((path.parent / "stat").read_text().rsplit(")", 1)[1].split()[1]) == ebsd.daemon.pid
    except OSError:
        return False


def test_without_dev_fuse_doctor_reports_a_failure(tmp_path: Path) -> None:
    with hidden_fuse(tmp_path, _DEVICE_IS_ABSENT) as ebsd:
        outcome = ebsd.ctl("--json", "doctor")
        assert outcome.status == 1
        found = [finding for finding in outcome.json["Findings"] if finding["Check"] == "/dev/fuse"]
        assert {finding["Level"] for finding in found} == {"failure"}
        assert all("modprobe fuse" in finding["Fix"] for finding in found)


def test_a_failed_attach_leaves_no_live_map(tmp_path: Path) -> None:
    with hidden_fuse(tmp_path, _DEVICE_IS_ABSENT) as ebsd:
        ebsd.ok("create", "data", "--size", "8M")
        ebsd.refused("attach", "data")
        assert ebsd.daemon is not None
        live = Path(f"/proc/{ebsd.daemon.pid}/root{ebsd.runtime}/live")
        assert list(live.iterdir()) == []


# --- no daemon --------------------------------------------------------------------------------------------

COMMANDS = [("list",), ("status",), ("create", "x", "--size", "8M"), ("key", "list"), ("detach", "--all")]


def ctl_at(path: Path, *arguments: str, uid: int = 0) -> Outcome:
    user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
    done = subprocess.run(
        [*user, BIN / "ebsctl", "--socket", path, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def make_nothing(path: Path) -> None:
    """Leave the path absent."""


def make_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def make_directory(path: Path) -> None:
    path.mkdir()


def make_file(path: Path) -> None:
    path.write_text("no socket\n")


def make_datagram(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))


def make_link_to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "absent": (make_nothing, "there is no such socket"),
    "stale": (make_stale, "nobody listens"),
    "a directory": (make_directory, ""),
    "a file": (make_file, ""),
    "a datagram socket": (make_datagram, ""),
    "a dangling link": (make_link_to_nowhere, "there is no such socket"),
}


@pytest.mark.parametrize("place", PLACES)
def test_without_a_daemon_every_command_exits_9_and_names_the_socket(tmp_path: Path, place: str) -> None:
    make, reason = PLACES[place]
    for name in ("ebsd.sock", "keys.sock"):
        make(tmp_path / name)
    for arguments in COMMANDS:
        wanted = tmp_path / ("keys.sock" if arguments[0] == "key" else "ebsd.sock")
        outcome = ctl_at(tmp_path / "ebsd.sock", "--json", *arguments)
        assert outcome.status == 9, outcome
        error = json.loads(outcome.stderr)
        assert error["Code"] == "Ebsd.DaemonUnreachable"
        assert str(wanted) in error["Message"]
        assert reason in error["Message"]
        assert "systemctl start ebsd" in error["Hint"]
    plain = ctl_at(tmp_path / "ebsd.sock", "list").stderr.splitlines()
    assert [line.split(":")[0] for line in plain] == ["error", "hint"]


@pytest.mark.other_user
def test_a_socket_that_one_may_not_use_exits_9_and_says_so() -> None:
    root = Path(tempfile.mkdtemp(prefix="ebsd-closed-"))
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(root / "ebsd.sock"))
            sock.listen()
            outcome = ctl_at(root / "ebsd.sock", "--json", "list", uid=STRANGER)
            root.chmod(0o755)
            (root / "ebsd.sock").chmod(0o600)
            second = ctl_at(root / "ebsd.sock", "--json", "list", uid=STRANGER)
        for answer in (outcome, second):
            assert answer.status == 9
            assert json.loads(answer.stderr)["Code"] == "Ebsd.DaemonUnreachable"
            assert "you may not use it" in json.loads(answer.stderr)["Message"]
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "hung up without an answer"),
        (b'{"parameters"', "hung up without an answer"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n\0", "unreadable"),
        (b"[]\0", "unreadable"),
        (b"\xff\xfe\0", "unreadable"),
        (b"x" * (2 * MIB), "unreadable"),
        (b"[" * 100_000 + b"\0", "unreadable"),
    ],
    ids=["nothing", "half a reply", "HTTP", "a list", "no UTF-8", "2 MiB without an end", "deep JSON"],
)
def test_a_socket_of_something_else_exits_9(tmp_path: Path, answer: bytes, told: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "ebsd.sock"))
        sock.listen()

        def serve() -> None:
            connection, _ = sock.accept()
            with connection:
                connection.recv(65536)
                try:
                    connection.sendall(answer)
                except OSError:
                    return

        server = threading.Thread(target=serve)
        server.start()
        outcome = ctl_at(tmp_path / "ebsd.sock", "--json", "list")
        server.join()
    assert outcome.status == 9, outcome
    assert told in json.loads(outcome.stderr)["Message"]


# --- a second daemon --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ebsd() -> Iterator[Installation]:
    """A running daemon with one attached volume, where other users can reach it."""
    root = Path(tempfile.mkdtemp(prefix="ebsd-host-"))
    root.chmod(0o755)
    try:
        with installation(root) as running:
            running.ok("create", "data", "--size", "8M")
            path = running.ok("attach", "data")
            with open(path, "r+b") as file:
                file.write(piece(0))
            yield running
    finally:
        shutil.rmtree(root)


def check_alive(ebsd: Installation) -> None:
    """See that the daemon, its broker and the attached volume work, and that the log tells of no bug."""
    assert ebsd.daemon is not None
    assert ebsd.daemon.poll() is None
    assert ebsd.ctl_json("status")["KeyService"]["State"] == "running"
    shown = ebsd.ctl_json("show", "data")
    assert shown["State"] == "in-use"
    check_pieces(shown["Attachments"][0]["Path"], 1)
    log = ebsd.log.read_text()
    assert "Traceback" not in log, log[-4000:]
    assert "incident" not in log, log[-4000:]


def second_daemon(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "ebsd", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
    )


def test_a_second_daemon_on_the_same_state_directory_is_refused(ebsd: Installation, tmp_path: Path) -> None:
    before = {path: path.stat().st_ino for path in ebsd.runtime.iterdir()}
    status = ebsd.ctl_json("status")
    for arguments in (
        ("--config", ebsd.root / "ebsd.toml"),
        ("--config", ebsd.root / "ebsd.toml", "--runtime-dir", tmp_path / "run"),
        ("--state-dir", ebsd.state, "--runtime-dir", tmp_path / "run"),
    ):
        done = second_daemon(*arguments)
        assert done.returncode == 4, done
        assert f"Another ebsd uses {ebsd.state}" in done.stderr
        assert "\nhint: One ebsd serves one state directory" in done.stderr
        assert "Traceback" not in done.stderr
    assert {path: path.stat().st_ino for path in ebsd.runtime.iterdir()} == before
    assert ebsd.ctl_json("status")["KeyService"] == status["KeyService"]
    check_alive(ebsd)


def test_a_second_daemon_on_the_same_runtime_directory_is_refused(ebsd: Installation, tmp_path: Path) -> None:
    broker = ebsd.ctl_json("status")["KeyService"]
    process = subprocess.Popen(
        [BIN / "ebsd", "--state-dir", tmp_path / "state", "--runtime-dir", ebsd.runtime],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("a second daemon serves the runtime directory of the first")
    finally:
        told = process.communicate()[1]
    time.sleep(1)
    assert ebsd.ctl_json("status")["KeyService"] == broker, "the second daemon ended the first one's key service"
    assert process.returncode == 4, told
    assert "Traceback" not in told
    assert f"{ebsd.runtime}" in told
    check_alive(ebsd)


def test_a_refused_second_daemon_takes_nothing_of_the_runtime_directory_away(tmp_path: Path) -> None:
    """The first has no volume attached, so all its directories are empty."""
    with installation(tmp_path) as first:
        first.ok("create", "data", "--size", "8M")
        before = sorted(path.name for path in first.runtime.iterdir())
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(first.runtime) in line]
        process = subprocess.Popen(
            [BIN / "ebsd", "--state-dir", tmp_path / "other", "--runtime-dir", first.runtime],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(15)
        finally:
            process.kill()
        now = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(first.runtime) in line]
        try:
            assert sorted(path.name for path in first.runtime.iterdir()) == before
            assert now == mounts
            first.ok("attach", "data")
        finally:
            for name in ("volumes", "control", "live"):  # what the second took away, so that the first can end
                (first.runtime / name).mkdir(mode=0o700, exist_ok=True)
            if now != mounts:
                run("mount", "-t", "tmpfs", "-o", "mode=0700", "ebsd", first.runtime / "live")


# --- garbage on the sockets -------------------------------------------------------------------------------

SOCKETS = {
    "ebsd.sock": ("io.ebsd.EC2", "io.ebsd.Control", "org.varlink.service"),
    "keys.sock": ("io.ebsd.KMS", "io.ebsd.KeyService", "io.ebsd.Audit", "org.varlink.service"),
    "kms.sock": ("io.ebsd.Broker", "org.varlink.service"),
}

STATUS = {"ebsd.sock": "io.ebsd.Control", "keys.sock": "io.ebsd.KeyService", "kms.sock": "io.ebsd.Broker"}


class Raw:
    """A connection on which anything can be said."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))  # without a time limit it waits for its turn in a full backlog
        self.sock.settimeout(20)
        self.rest = b""

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        """Send what the other side takes; it may hang up in the middle."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def reply(self) -> Any:
        """Return the next reply, None when the other side hung up instead."""
        while b"\0" not in self.rest:
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self.rest += data
        frame, self.rest = self.rest.split(b"\0", 1)
        return json.loads(frame)

    def call(self, method: str, parameters: Any = None, **more: Any) -> Any:
        self.send(json.dumps({"method": method, "parameters": parameters or {}, **more}).encode() + b"\0")
        return self.reply()


def garbage() -> dict[str, bytes]:
    noise = random.Random(1).randbytes(65536)
    return {
        "random bytes": noise,
        "random bytes without an end": noise.replace(b"\0", b"x"),
        "only ends": b"\0" * 1000,
        "2 MiB without an end": b"x" * (2 * MIB),
        "2 MiB of text": b'{"method": "' + b"x" * (2 * MIB) + b'"}\0',
        "no UTF-8": b'{"method": "\xff\xfe"}\0',
        "half a surrogate": b'{"method": "io.ebsd.Control.Identify", "parameters": {"Resource": "\\ud800"}}\0',
        "a NUL in a text": b'{"method": "io.ebsd.Control.Identify", "parameters": {"Resource": "a\\u0000b"}}\0',
        "deep lists": b"[" * 500_000 + b"\0",
        "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\0",
        "deep parameters": b'{"method": "io.ebsd.Control.GetStatus", "parameters": '
        + b'{"a":' * 50_000 + b"1" + b"}" * 50_001 + b"\0",
        "a huge number": b'{"method": "x", "parameters": {"a": ' + b"9" * 100_000 + b"}}\0",
        "no number": b'{"method": "x", "parameters": {"a": NaN}}\0',
        "the same member twice": b'{"method": "a.b", "method": "c.d"}\0',
        "a list": b"[]\0",
        "a text": b'"io.ebsd.Control.GetStatus"\0',
        "null": b"null\0",
        "no method": b"{}\0",
        "a number as method": b'{"method": 7}\0',
        "a list as parameters": b'{"method": "io.ebsd.Control.GetStatus", "parameters": []}\0',
        "a word without an interface": b'{"method": "GetStatus"}\0',
        "an unknown interface": b'{"method": "io.ebsd.Nothing.Do"}\0',
        "an unknown method": b'{"method": "io.ebsd.EC2.TerminateInstances"}\0',
        "an unknown member": b'{"method": "io.ebsd.Control.GetStatus", "colour": "red"}\0',
        "an upgrade": b'{"method": "io.ebsd.Control.GetStatus", "upgrade": true}\0',
        "oneway": b'{"method": "io.ebsd.Control.GetStatus", "oneway": true}\0',
        "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "half a call": b'{"method": "io.ebsd.EC2.Create',
        "half an ended call": b'{"method": "io.ebsd.EC2.Create\0',
        "many calls at once": b'{"method": "org.varlink.service.GetInfo"}\0' * 2000,
    }  # fmt: skip


@pytest.mark.parametrize("name", SOCKETS)
def test_garbage_hurts_only_the_connection_it_comes_on(ebsd: Installation, name: str) -> None:
    path = ebsd.runtime / name
    with Raw(path) as bystander:
        for what, data in garbage().items():
            with Raw(path) as raw:
                raw.send(data)
                raw.sock.shutdown(socket.SHUT_WR)
                while (reply := raw.reply()) is not None:
                    assert reply.get("error", "") != f"{STATUS[name]}.InternalFailure", (what, reply)
                    assert reply.get("parameters", {}).get("Code") != "InternalFailure", (what, reply)
            with Raw(path) as raw:  # and one that does not wait for an answer
                raw.send(data)
            assert "parameters" in bystander.call(f"{STATUS[name]}.GetStatus"), what
    check_alive(ebsd)


def test_calls_that_ask_for_what_is_not_get_varlinks_own_errors(ebsd: Installation) -> None:
    with Raw(ebsd.socket) as raw:
        assert raw.call("io.ebsd.Nothing.Do")["error"] == "org.varlink.service.InterfaceNotFound"
        assert raw.call("io.ebsd.Broker.Shutdown")["error"] == "org.varlink.service.InterfaceNotFound"
        assert raw.call("io.ebsd.EC2.Nothing")["error"] == "org.varlink.service.MethodNotFound"
        described = raw.call("org.varlink.service.GetInterfaceDescription", {"interface": 7})
        assert described["error"] == "org.varlink.service.InvalidParameter"
        refused = raw.call("io.ebsd.EC2.DeleteVolume", {"VolumeId": "data", "Colour": "red"})
        assert refused["parameters"]["Code"] == "UnknownParameter"
        assert raw.call("io.ebsd.Control.GetStatus")["parameters"]["State"] == "running"


WRONG: list[Any] = [
    None, True, 0, -1, 2**63, 10**400, 1.5, "", "x", "\x00", "\ud800", "x" * 100_000, [], {}, [[]], [{}], {"": ""},
    ["x"] * 1000, [None], {"Key": 1}, [{"Key": "k", "Value": 7}],
]  # fmt: skip


def _wrong_calls(interfaces: tuple[str, ...]) -> Iterator[tuple[str, str, Any, dict[str, str]]]:
    """Yield (method, parameter, value, other parameters)."""
    for interface in interfaces:
        for method, declared in Interface.load(interface).methods.items():
            if method == "Shutdown":
                continue
            fields = list(declared.parameters.fields)
            for field in fields:
                for value in WRONG:
                    yield f"{interface}.{method}", field, value, {}
                    yield f"{interface}.{method}", field, value, {other: "x" for other in fields if other != field}


@pytest.mark.parametrize("name", SOCKETS)
def test_wrong_types_for_every_parameter_are_refused_by_name(ebsd: Installation, name: str) -> None:
    """Every value is tried for every parameter, alone and with the others filled in with texts."""
    before = ebsd.ctl_json("list")["Volumes"]
    tried = 0
    connection: Raw | None = None
    for call, field, value, others in _wrong_calls(SOCKETS[name]):
        if connection is None:
            connection = Raw(ebsd.runtime / name)
        reply = connection.call(call, {**others, field: value})
        assert reply is not None, (call, field, value, "hung up without a word")
        code = reply.get("parameters", {}).get("Code")
        assert code != "InternalFailure", (call, field, value, reply)
        if code == "Ebsd.Protocol":  # no text that can be expressed: the server ends the connection after saying so
            connection.sock.close()
            connection = None
        tried += 1
    with Raw(ebsd.runtime / name) as raw:
        assert "parameters" in raw.call(f"{STATUS[name]}.GetStatus")
    if connection is not None:
        connection.sock.close()
    assert tried > 100
    after = ebsd.ctl_json("list")["Volumes"]
    assert [volume["VolumeId"] for volume in after] == [volume["VolumeId"] for volume in before]
    check_alive(ebsd)


@pytest.mark.other_user
@pytest.mark.parametrize("name", SOCKETS)
def test_200_connections_at_once_do_not_keep_others_out(ebsd: Installation, name: str) -> None:
    path = ebsd.runtime / name
    with ExitStack() as stack:
        flood = [stack.enter_context(Raw(path)) for _ in range(200)]
        for raw in flood[::2]:
            raw.send(b'{"method": "')
        if name == "ebsd.sock":
            outcome = ctl_at(path, "--json", "list", uid=STRANGER)
            assert (outcome.status, outcome.json) == (0, {"Volumes": []})
            refused = ctl_at(path, "--json", "list")
            assert refused.status == 1
            assert json.loads(refused.stderr)["Code"] == "RequestLimitExceeded"
        elif name == "keys.sock":
            outcome = ctl_at(ebsd.socket, "--json", "key", "list", uid=STRANGER)
            assert (outcome.status, outcome.json) == (0, {"Keys": []})
            assert ebsd.ctl("list").status == 0
        else:
            assert ebsd.ctl("--json", "defaults", "show").status == 0
    deadline = time.monotonic() + 10
    while ebsd.ctl("list").status or ebsd.ctl("key", "list").status:
        assert time.monotonic() < deadline
    check_alive(ebsd)


def send_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    try:
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    except (BrokenPipeError, ConnectionResetError):
        return


@pytest.mark.parametrize("name", SOCKETS)
def test_floods_of_descriptors_are_closed_again(ebsd: Installation, name: str) -> None:
    status = ebsd.ctl_json("status")
    pid = status["Pid"] if name == "ebsd.sock" else status["KeyService"]["Pid"]
    fds = Path(f"/proc/{pid}/fd")
    before = len(list(fds.iterdir()))
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        for count in (1, 16, 17, 253):
            for data in (b"x", b'{"method": "org.varlink.service.GetInfo"}\0', b"\0", b'{"method": "'):
                for _ in range(5):
                    with Raw(ebsd.runtime / name) as raw:
                        for _ in range(4):
                            send_fds(raw.sock, data, [null] * count)
                        raw.sock.shutdown(socket.SHUT_WR)
                        while raw.reply() is not None:
                            pass
    finally:
        os.close(null)
    deadline = time.monotonic() + 10
    while len(list(fds.iterdir())) > before:
        assert time.monotonic() < deadline, f"{len(list(fds.iterdir())) - before} descriptors stayed open"
        time.sleep(0.1)
    check_alive(ebsd)


def test_kms_sock_is_for_root_alone(ebsd: Installation) -> None:
    program = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    user = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"]
    done = subprocess.run(
        [*user, "/usr/bin/python3", "-c", program, ebsd.runtime / "kms.sock"], capture_output=True, text=True
    )
    assert "PermissionError" in done.stderr


def test_a_volume_process_cannot_be_reached_over_its_control_socket_by_others(ebsd: Installation) -> None:
    assert (ebsd.runtime / "control").stat().st_mode & 0o777 == 0o700
    assert (ebsd.runtime / "volumes").stat().st_mode & 0o777 == 0o711


# --- the reference client ---------------------------------------------------------------------------------


def reference(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "varlink.cli", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done
    return done.stdout


@pytest.mark.parametrize("name", SOCKETS)
def test_the_reference_client_reads_what_the_service_says_of_itself(ebsd: Installation, name: str) -> None:
    address = f"unix:{ebsd.runtime / name}"
    told = reference("info", address)
    for interface in SOCKETS[name]:
        assert interface in told
        assert f"interface {interface}" in reference("help", f"{address}/{interface}")


def test_the_reference_client_calls_methods(ebsd: Installation) -> None:
    address = f"unix:{ebsd.socket}"
    status = json.loads(reference("call", f"{address}/io.ebsd.Control.GetStatus"))
    assert status["Pid"] == ebsd.daemon_pid()
    volumes = json.loads(reference("call", f"{address}/io.ebsd.EC2.DescribeVolumes", "{}"))
    assert volumes["Volumes"] == ebsd.ctl_json("list")["Volumes"]
    done = subprocess.run(
        [sys.executable, "-m", "varlink.cli", "call", f"{address}/io.ebsd.EC2.DeleteVolume", '{"VolumeId": "none"}'],
        capture_output=True,
        text=True,
    )
    assert "io.ebsd.EC2.ServiceError" in done.stdout + done.stderr
    assert "InvalidVolume.NotFound" in done.stdout + done.stderr


def test_the_daemon_still_ends_in_order_after_all_of_that(ebsd: Installation) -> None:
    ebsd.stop()
    ebsd.start()
    check_alive(ebsd)
    assert ebsd.daemon is not None
    ebsd.daemon.send_signal(signal.SIGINT)
    assert ebsd.daemon.wait(30) == 0
    ebsd.daemon = None
    ebsd.start()
    check_alive(ebsd)
