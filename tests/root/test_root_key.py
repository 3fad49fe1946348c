"""Where the root key comes from, from the outside: passphrase, key file, credential."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from installation import BIN, Installation, Outcome

LOCKED = (6, "Ebsd.KeyServiceLocked")
WORDS = "correct horse battery"


class WithPassphrase(Installation):
    """An installation whose root key is under a passphrase."""

    place = "passphrase"

    def write_config(self) -> None:
        super().write_config()
        path = self.root / "ebsd.toml"
        path.write_text(path.read_text().replace(str(self.root / "root.key"), self.place))

    def unlock(self, words: str = WORDS) -> Outcome:
        path = self.root / "words"
        path.write_text(words)
        return self.ctl("--json", "key", "unlock", "--passphrase-file", path)

    def close(self) -> None:
        if self.daemon is None:
            self.start()
        if self.ctl_json("status")["State"] == "locked":
            assert self.unlock().status == 0
        super().close()


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[WithPassphrase]:
    made = WithPassphrase(tmp_path)
    made.start()
    try:
        yield made
    finally:
        made.close()


def refused(ebsd: Installation, *arguments: str | Path) -> tuple[int, str]:
    status, error = ebsd.refused(*arguments)
    return status, error["Code"]


def test_a_locked_key_service_and_its_volumes(locked: WithPassphrase) -> None:
    ebsd = locked
    status = ebsd.ctl_json("status")
    assert (status["State"], status["KeyService"]["State"]) == ("locked", "locked")
    for command in (("list",), ("create", "x", "--size", "1M"), ("key", "create"), ("check",)):
        assert refused(ebsd, *command) == LOCKED
    assert ebsd.ctl("doctor").status == 1
    assert "ebsctl key unlock" in ebsd.ctl("doctor").stdout
    outcome = ebsd.unlock("short")
    assert (outcome.status, outcome.error["Code"]) == (2, "ValidationException")
    assert ebsd.unlock().status == 0
    status = ebsd.ctl_json("status")
    assert (status["State"], status["KeyService"]["RootKey"]) == ("running", "passphrase")
    ebsd.ok("create", "data", "--size", "1M")
    path = ebsd.ok("attach", "data", "--file")
    with open(path, "r+b", buffering=0) as file:
        file.write(b"1" * 4096)

    ebsd.kill()  # the key service outlives it, unlocked
    ebsd.start()
    assert ebsd.ctl_json("status")["State"] == "running"
    os.kill(ebsd.processes()["broker"][0], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while ebsd.ctl_json("status")["KeyService"]["State"] != "locked":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert refused(ebsd, "create", "x", "--size", "1M") == LOCKED
    assert ebsd.unlock().status == 0
    ebsd.ok("snapshot", "data", "--name", "s")

    ebsd.stop()
    ebsd.start()  # locked again, and the volume goes on
    with open(path, "r+b", buffering=0) as file:
        assert file.read(4096) == b"1" * 4096
    assert refused(ebsd, "detach", "data") == LOCKED
    outcome = ebsd.unlock("something else")
    assert (outcome.status, outcome.error["Code"]) == (5, "Ebsd.WrongPassphrase")
    assert ebsd.ctl_json("status")["State"] == "locked"
    assert ebsd.unlock().status == 0
    outcome = ebsd.unlock()
    assert (outcome.status, outcome.error["Code"]) == (4, "IncorrectState")
    ebsd.ok("detach", "data")
    for file_of_ours in ebsd.root.rglob("*"):
        if file_of_ours.is_file() and file_of_ours.name != "words":
            assert WORDS.encode() not in file_of_ours.read_bytes(), file_of_ours


def started(ebsd: Installation, words: str) -> None:
    """Start ebsd with a passphrase in a descriptor."""
    ebsd.write_config()
    reader, writer = os.pipe()
    os.write(writer, words.encode())
    os.close(writer)
    with ebsd.log.open("ab") as log:
        ebsd.daemon = subprocess.Popen(
            [BIN / "ebsd", "--config", ebsd.root / "ebsd.toml", "--passphrase-fd", str(reader)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(reader,), start_new_session=True,
        )  # fmt: skip
    os.close(reader)
    deadline = time.monotonic() + 60
    while ebsd.ctl("status").status != 0:
        assert ebsd.daemon.poll() is None, ebsd.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_passphrase_in_a_descriptor_and_on_a_terminal(locked: WithPassphrase) -> None:
    ebsd = locked
    assert ebsd.unlock().status == 0
    ebsd.ok("create", "data", "--size", "1M")
    ebsd.stop()
    started(ebsd, "not the right one")
    assert ebsd.ctl_json("status")["State"] == "locked", "a wrong one leaves it locked"
    assert "does not open the root key" in ebsd.log.read_text()
    ebsd.stop()
    started(ebsd, WORDS + "\n")
    assert ebsd.ctl_json("status")["State"] == "running"
    for name in ("cmdline", "environ"):
        for pid in (pid for pids in ebsd.processes().values() for pid in pids):
            assert WORDS.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    ebsd.stop()

    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(BIN / "ebsd", ["ebsd", "--config", str(ebsd.root / "ebsd.toml")])
    try:
        for words in ("not the right one", WORDS):
            assert b"Passphrase" in read_until(terminal, b"Passphrase of the key service: ")
            os.write(terminal, words.encode() + b"\n")
        deadline = time.monotonic() + 30
        while ebsd.ctl("status").status != 0 or ebsd.ctl_json("status")["State"] != "running":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ebsd.ok("attach", "data", "--file")
        ebsd.ok("detach", "data")
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        os.close(terminal)
    ebsd.start()


def read_until(terminal: int, text: bytes) -> bytes:
    found = b""
    deadline = time.monotonic() + 30
    while text not in found:
        assert time.monotonic() < deadline, found
        if select.select([terminal], [], [], 0.5)[0]:
            found += os.read(terminal, 4096)
    return found
