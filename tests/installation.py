"""A whole ebsd for tests: real daemon, broker and volume processes in directories of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BIN = ROOT / ".venv" / "bin"


@dataclass
class Outcome:
    """What one run of ebsctl answered."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    @property
    def error(self) -> dict[str, str]:
        """The error document, which notes may precede."""
        start = self.stderr.index("{")
        return json.JSONDecoder().raw_decode(self.stderr, start)[0]


@dataclass
class Installation:
    """One state and one runtime directory, and the ebsd that serves them."""

    root: Path
    settings: str = ""
    """Further lines for ebsd.toml, before its tables."""
    prefix: Sequence[str] = ()
    """What to run programs under, for example unshare or runuser."""
    daemon: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def runtime(self) -> Path:
        return self.root / "run"

    @property
    def kms_state(self) -> Path:
        return self.root / "keys"

    @property
    def log(self) -> Path:
        return self.root / "ebsd.log"

    @property
    def socket(self) -> Path:
        return self.runtime / "ebsd.sock"

    def write_config(self) -> None:
        (self.root / "ebsd.toml").write_text(
            f'state_dir = "{self.state}"\nruntime_dir = "{self.runtime}"\n{self.settings}\n'
            f'[key_service.local]\nstate_dir = "{self.kms_state}"\nroot_key = "{self.root / "root.key"}"\n'
        )

    def start(self) -> None:
        """Start ebsd and wait until it answers."""
        self.write_config()
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                [*self.prefix, BIN / "ebsd", "--config", self.root / "ebsd.toml"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while self.ctl("status").status != 0:
            assert self.daemon.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """End ebsd in order; attached volumes go on."""
        if self.daemon is not None:
            self.daemon.send_signal(signal.SIGTERM)
            assert self.daemon.wait(30) == 0, self.log.read_text()
            self.daemon = None

    def kill(self) -> None:
        """End ebsd as a crash does; volume processes and the broker go on."""
        assert self.daemon is not None
        os.kill(self.daemon_pid(), signal.SIGKILL)
        self.daemon.wait(30)
        self.daemon = None

    def daemon_pid(self) -> int:
        return int(self.ctl_json("status")["Pid"])

    def ctl(self, *arguments: str | Path, stdin: bytes | None = None, env: dict[str, str] | None = None) -> Outcome:
        """Run ebsctl."""
        done = subprocess.run(
            [*self.prefix, BIN / "ebsctl", "--socket", self.socket, *arguments],
            input=stdin,
            stdin=None if stdin is not None else subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            env=None if env is None else {**os.environ, **env},
        )
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())

    def ctl_json(self, *arguments: str | Path) -> Any:
        """Run ebsctl --json and return its document; any failure fails the test."""
        return json.loads(self.ok("--json", *arguments))

    def ok(self, *arguments: str | Path) -> str:
        """Run ebsctl and return its output without the newline; any failure fails the test with the log."""
        outcome = self.ctl(*arguments)
        assert outcome.status == 0, f"{arguments}: {outcome.stderr}\n{self.log.read_text()[-4000:]}"
        return outcome.stdout.strip()

    def refused(self, *arguments: str | Path) -> tuple[int, dict[str, str]]:
        """Run ebsctl --json, which must fail; returns exit status and the error."""
        outcome = self.ctl("--json", *arguments)
        assert outcome.status != 0, f"{arguments} was to fail and printed {outcome.stdout}"
        return outcome.status, outcome.error

    def processes(self) -> dict[str, list[int]]:
        """Return the pids of this installation's processes: daemon, broker, volumes (their engines), holders."""
        status = self.ctl_json("status")
        broker = status["KeyService"].get("Pid")
        volumes = []
        for path in (self.runtime / "control").glob("*.sock"):
            volumes += [pid for pid in _listeners_of(path) if pid != status["Pid"]]
        return {
            "daemon": [status["Pid"]],
            "broker": [broker] if broker else [],
            "volumes": volumes,
            "holders": [holder_of(pid) for pid in volumes],
        }

    def close(self) -> None:
        """End everything: detach what is attached, end ebsd, and see that nothing is left."""
        try:
            if self.daemon is None or self.daemon.poll() is not None:
                self.daemon = None
                self.start()
            self.ctl("detach", "--all")
            self.ctl("detach", "--all", "--force")
            for volume in json.loads(self.ctl("--json", "list").stdout or '{"Volumes": []}')["Volumes"]:
                if volume["Attachments"]:  # of other users, where a test ended early
                    self.ctl("detach", volume["VolumeId"], "--force")
        finally:
            self.stop()
        assert not self.leftovers(), self.leftovers()

    def leftovers(self) -> list[str]:
        """Return what this installation left on the host: mounts, loop devices, processes."""
        left = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self.root) in line]
        for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
            try:
                if str(self.root) in backing.read_text():
                    left.append(str(backing))
            except OSError:
                continue
        return left


def is_holder(pid: int) -> bool:
    """Say whether a process is one that keeps things for an engine, and serves nothing itself."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"ebsd.volume.holder\0")


def holder_of(engine: int) -> int:
    """Return the process that started an engine."""
    parent = int(Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[1])
    assert is_holder(parent)
    return parent


def _listeners_of(path: Path) -> list[int]:
    """Return the pids of the processes that serve a listening socket bound to the path."""
    inodes = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[7] == str(path) and fields[5] == "01":
            inodes.add(f"socket:[{fields[6]}]")
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if is_holder(int(process.name)):
                continue
            for fd in (process / "fd").iterdir():
                if os.readlink(fd) in inodes:
                    pids.append(int(process.name))
                    break
        except OSError:
            continue
    return pids


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program of the host that must succeed, such as mkfs or mount."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


@contextmanager
def installation(root: Path, settings: str = "", prefix: Sequence[str] = ()) -> Iterator[Installation]:
    """Run an ebsd for the body; whatever happens, nothing stays on the host."""
    made = Installation(root, settings, prefix)
    made.start()
    try:
        yield made
    finally:
        made.close()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Let a process stand still for the body, as on a host that hangs; it must be there at the end."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
