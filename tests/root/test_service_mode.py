"""ebsd and its key service as two services, with sockets that somebody else holds: what the unit files ask of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from installation import BIN, Installation, Outcome

# The service manager's part that a test cannot do from outside: the variables name the process they are for.
START = """
import os, sys
names = sys.argv[1].split(":")
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": sys.argv[1]}
os.execv(sys.argv[2], sys.argv[2:])
"""


def listening(path: Path, mode: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    path.chmod(mode)
    sock.listen(64)
    return sock


@dataclass
class Service:
    """One service: its program, its sockets, which outlive each of its processes, and what it says."""

    root: Path
    name: str
    command: list[str]
    sockets: dict[str, socket.socket]
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    notified: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))

    def __post_init__(self) -> None:
        self.address = self.root / f"{self.name}.notify"
        self.notified.bind(str(self.address))
        self.notified.settimeout(60)

    @property
    def log(self) -> Path:
        return self.root / f"{self.name}.log"

    def start(self) -> None:
        """Start it and wait for READY=1."""
        self.begin()
        assert self.said("READY=1"), self.log.read_text()

    def begin(self) -> None:
        def place() -> None:
            for at, sock in enumerate(self.sockets.values()):
                os.dup2(sock.fileno(), 100 + at)
            for at in range(len(self.sockets)):
                os.dup2(100 + at, 3 + at)
            os.closerange(3 + len(self.sockets), 256)

        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", START, ":".join(self.sockets), *self.command],
                env={**self.environment, "NOTIFY_SOCKET": str(self.address), "WATCHDOG_USEC": "1000000"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                close_fds=False,
                preexec_fn=place,
            )

    def said(self, line: str) -> bool:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process is not None and self.process.poll() is None:
            self.notified.settimeout(0.2)
            try:
                if self.notified.recv(100).decode() == line:
                    return True
            except TimeoutError:
                continue
        return False

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            assert self.process.wait(30) == (0 if number == signal.SIGTERM else -number), self.log.read_text()
            self.process = None


@dataclass
class Services:
    kms: Service
    ebsd: Service
    root: Path

    def look(self) -> None:
        """Do what systemd has root do before each start of the key service."""
        subprocess.run(
            [BIN / "python", "-m", "ebsd.daemon.keyservice", "--config", self.root / "ebsd.toml", "--look"],
            env=self.kms.environment,
            check=True,
            timeout=60,
        )

    def ctl(self, *arguments: str) -> Outcome:
        done = subprocess.run(
            [BIN / "ebsctl", "--socket", self.root / "run/ebsd.sock", *arguments], capture_output=True, timeout=120
        )
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())

    def ok(self, *arguments: str) -> str:
        outcome = self.ctl(*arguments)
        assert outcome.status == 0, f"{outcome.stderr}\n{self.ebsd.log.read_text()}\n{self.kms.log.read_text()}"
        return outcome.stdout.strip()

    def key_service(self) -> dict[str, str]:
        return dict(json.loads(self.ok("--json", "status"))["KeyService"])


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    made = Installation(tmp_path)
    made.runtime.mkdir()
    (tmp_path / "credentials").mkdir()
    (tmp_path / "kms-run").mkdir()
    (tmp_path / "credentials" / "ebsd-root-key").write_text(f"ebsd-root-key-1 {'A' * 43}=\n")
    (tmp_path / "ebsd.toml").write_text(
        f'state_dir = "{made.state}"\nruntime_dir = "{made.runtime}"\n[key_service.local]\nservice = true\n'
        f'state_dir = "{made.kms_state}"\nroot_key = "credential:ebsd-root-key"\n'
    )
    clean = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    kms_environment = {
        **clean,
        "CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"),
        "RUNTIME_DIRECTORY": str(tmp_path / "kms-run"),
    }
    config = ["--config", str(tmp_path / "ebsd.toml")]
    with ExitStack() as stack:
        sockets = {
            name: stack.enter_context(listening(made.runtime / f"{name}.sock", mode))
            for name, mode in (("kms", 0o600), ("keys", 0o666), ("ebsd", 0o666))
        }
        kms = Service(
            tmp_path,
            "kms",
            [str(BIN / "python"), "-I", "-m", "ebsd.daemon.keyservice", *config],
            {name: sockets[name] for name in ("kms", "keys")},
            kms_environment,
        )
        ebsd = Service(tmp_path, "ebsd", [str(BIN / "ebsd"), *config], {"ebsd": sockets["ebsd"]}, clean)
        found = Services(kms, ebsd, tmp_path)
        try:
            yield found
        finally:
            if ebsd.process is not None:
                found.ctl("detach", "--all", "--force")
            ebsd.end()
            kms.end()
            ebsd.notified.close()
            kms.notified.close()
    assert not made.leftovers(), made.leftovers()


def test_two_services_serve_a_volume_through_restarts_of_each(services: Services) -> None:
    services.look()
    services.kms.start()
    services.ebsd.start()
    services.ok("create", "data", "--size", "4M", "--encrypted")
    device = services.ok("attach", "data", "--file")
    content = os.urandom(1 << 20)
    with open(device, "r+b") as file:  # not "wb": a block file is not truncated
        file.write(content)
    key_service = services.key_service()
    assert (key_service["State"], key_service["RootKeyKind"]) == ("running", "credential")

    # ebsd away: who asks meanwhile waits in its socket, and is answered by the next one
    services.ebsd.end()
    with subprocess.Popen(
        [BIN / "ebsctl", "--socket", services.root / "run/ebsd.sock", "show", "data"], stdout=subprocess.PIPE
    ) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        services.ebsd.start()
        assert b"in-use" in waiting.communicate(timeout=60)[0]
    assert services.key_service()["Pid"] == key_service["Pid"], "the end of ebsd is not that of the key service"

    # and the key service: it is found again on the same sockets, by ebsd and by users
    services.kms.end(signal.SIGKILL)
    assert Path(device).read_bytes()[: len(content)] == content
    services.look()
    services.kms.start()
    services.ok("detach", "data")
    device = services.ok("attach", "data", "--file", "--read-only")
    assert Path(device).read_bytes()[: len(content)] == content
    services.ok("key", "list")


def test_a_key_service_that_comes_later_is_waited_for(services: Services) -> None:
    services.ebsd.begin()
    time.sleep(1)
    services.look()
    services.kms.start()
    assert services.ebsd.said("READY=1"), services.ebsd.log.read_text()
    services.ok("create", "data", "--size", "4M")


def test_no_keys_are_made_where_volumes_miss_theirs(services: Services) -> None:
    services.look()
    services.kms.start()
    services.ebsd.start()
    services.ok("create", "data", "--size", "4M")
    services.ebsd.end()
    services.kms.end()
    for path in (services.root / "keys").iterdir():
        path.rename(services.root / f"moved-{path.name}")
    services.look()
    services.kms.start()
    services.ebsd.start()
    key_service = services.key_service()
    assert key_service["State"] == "rescue"
    assert not (services.root / "keys" / "epoch").exists()


def test_both_say_that_they_live_and_that_they_end(services: Services) -> None:
    services.look()
    for service in (services.kms, services.ebsd):
        service.start()
        assert service.said("WATCHDOG=1"), service.log.read_text()
    for service in (services.ebsd, services.kms):
        assert service.process is not None
        service.process.send_signal(signal.SIGTERM)
        assert service.said("STOPPING=1")
        assert service.process.wait(30) == 0
        service.process = None


def test_without_sockets_or_credentials_the_key_service_says_so(services: Services) -> None:
    services.kms.sockets = {"kms": services.kms.sockets["kms"]}
    services.kms.begin()
    assert services.kms.process is not None
    assert services.kms.process.wait(60) == 2
    assert "systemd passes the sockets kms and keys" in services.kms.log.read_text()
    services.kms.process = None
