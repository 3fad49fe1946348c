"""Where the root key comes from, from the outside: passphrase, key file, credential."""

from __future__ import annotations

import base64
import json
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
    told = "The key service is locked: it is new, and its passphrase was not chosen yet."
    assert ebsd.refused("list")[1]["Message"] == told
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


# --- change -----------------------------------------------------------------------------------------------------


def configured(ebsd: Installation, before: str, after: str) -> None:
    """Put another place of the root key into the configuration, as its administrator does."""
    path = ebsd.root / "ebsd.toml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    ebsd.write_config = lambda: None  # type: ignore[method-assign]


def findings(ebsd: Installation, check: str) -> list[str]:
    found = json.loads(ebsd.ctl("--json", "doctor").stdout)["Findings"]
    return [finding["Level"] for finding in found if finding["Check"] == check]


def test_the_root_key_is_changed_while_a_volume_is_attached(ebsd: Installation, tmp_path: Path) -> None:
    old, stick = str(tmp_path / "root.key"), str(tmp_path / "stick" / "root.key")
    ebsd.ok("create", "data", "--size", "1M")
    path = ebsd.ok("attach", "data", "--file")
    assert refused(ebsd, "key", "root", "change", "--to", f"file:{old}") == (4, "IncorrectState")
    assert refused(ebsd, "key", "root", "change", "--to", "credential:none") == (2, "InvalidParameterValue")
    outcome = ebsd.ctl("key", "root", "change", "--to", f"file:{stick}")
    assert (outcome.status, outcome.stdout.strip()) == (0, stick)
    assert f'root_key = "{stick}"' in outcome.stderr
    status = ebsd.ctl_json("status")["KeyService"]
    assert (status["RootKey"], status["ConfiguredRootKey"]) == (stick, old)
    assert findings(ebsd, "root key, changed") == ["warning"]

    ebsd.stop()
    ebsd.start()  # with the configuration as it was: the old root key leads to the new one
    assert ebsd.ctl_json("status")["KeyService"]["RootKey"] == stick
    ebsd.ok("snapshot", "data", "--name", "s")
    ebsd.stop()
    configured(ebsd, old, stick)
    ebsd.start()
    assert findings(ebsd, "root key, changed") == []
    Path(old).unlink()

    words = tmp_path / "words"
    words.write_text(WORDS)
    outcome = ebsd.ctl("key", "root", "change", "--to", "passphrase", "--passphrase-file", words)
    assert (outcome.status, outcome.stdout.strip()) == (0, "passphrase")
    ebsd.stop()
    configured(ebsd, stick, "passphrase")
    Path(stick).unlink()
    ebsd.start()
    assert ebsd.ctl_json("status")["State"] == "locked"
    assert ebsd.ctl("key", "unlock", "--passphrase-file", words).status == 0
    with open(path, "r+b", buffering=0) as file:
        file.write(b"2" * 4096)
    ebsd.ok("detach", "data")
    ebsd.ok("attach", "data", "--file")
    ebsd.ok("detach", "data")
    words.write_text("another passphrase")
    outcome = ebsd.ctl("key", "root", "change", "--to", "passphrase", "--passphrase-file", words)
    assert "old passphrase opens nothing" in outcome.stderr
    ebsd.stop()
    ebsd.start()
    assert ebsd.ctl("key", "unlock", "--passphrase-file", words).status == 0
    ebsd.ok("attach", "data", "--file")
    outcome = ebsd.ctl("key", "root", "change", "--to", f"file:{tmp_path / 'last.key'}")
    assert "each start needs the old passphrase, too" in outcome.stderr
    assert "remove it" not in outcome.stderr


def test_a_credential_of_the_service_manager(ebsd: Installation, tmp_path: Path) -> None:
    """LoadCredentialEncrypted= gives the service a decrypted file in $CREDENTIALS_DIRECTORY; systemd is not needed."""
    credentials = tmp_path / "credentials"
    credentials.mkdir(mode=0o500)
    ebsd.ok("create", "data", "--size", "1M")
    ebsd.stop()
    (credentials / "ebsd-root").write_bytes((tmp_path / "root.key").read_bytes())
    (credentials / "next").write_text("ebsd-root-key-1 " + base64.b64encode(os.urandom(32)).decode() + "\n")
    (tmp_path / "root.key").unlink()
    configured(ebsd, str(tmp_path / "root.key"), "credential:ebsd-root")
    ebsd.prefix = ("env", f"CREDENTIALS_DIRECTORY={credentials}")
    ebsd.start()
    assert ebsd.ctl_json("status")["KeyService"]["RootKey"] == "credential:ebsd-root"
    assert findings(ebsd, "root key") == ["ok"]
    ebsd.ok("attach", "data", "--file")
    assert ebsd.ctl("key", "root", "change", "--to", "credential:next").stdout.strip() == "credential:next"
    ebsd.ok("detach", "data")
    ebsd.stop()
    configured(ebsd, "credential:ebsd-root", "credential:next")
    (credentials / "ebsd-root").unlink()
    ebsd.start()
    ebsd.ok("attach", "data", "--file")
