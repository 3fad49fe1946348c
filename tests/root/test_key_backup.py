"""Lost keys, the way back: a backup under a passphrase brings volumes back on a host whose key service is gone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from installation import Installation


@pytest.fixture
def passphrase(tmp_path: Path) -> Path:
    path = tmp_path / "passphrase"
    path.write_text("correct horse battery staple\n")
    return path


def lose_the_keys(ebsd: Installation) -> None:
    ebsd.stop()
    shutil.rmtree(ebsd.kms_state)
    (ebsd.root / "root.key").unlink()


def test_a_backup_brings_a_volume_back_after_the_key_service_was_lost(
    ebsd: Installation, tmp_path: Path, passphrase: Path
) -> None:
    mount, backup = tmp_path / "mnt", tmp_path / "backup"
    ebsd.ok("key", "create", "mine")
    ebsd.ok("create", "data", "--size", "64M", "--encrypted", "--key", "mine")
    ebsd.ok("attach", "data", "--mkfs", "ext4", "--mount", mount)
    (mount / "file").write_text("precious")
    ebsd.ok("detach", "data")
    ebsd.ok("key", "backup", backup, "--passphrase-file", passphrase)
    assert backup.stat().st_mode & 0o777 == 0o600
    assert b"precious" not in backup.read_bytes()

    lose_the_keys(ebsd)
    ebsd.start()
    status, _ = ebsd.refused("attach", "data")
    assert status in (3, 5, 6, 7), "without its keys the volume does not open"
    wrong = tmp_path / "wrong"
    wrong.write_text("not the passphrase\n")
    status, error = ebsd.refused("key", "restore", backup, "--passphrase-file", wrong)
    assert (status, error["Code"]) == (7, "Ebsd.BackupRefused")
    ebsd.ok("key", "restore", backup, "--passphrase-file", passphrase)
    ebsd.ok("attach", "data", "--mount", mount)
    assert (mount / "file").read_text() == "precious"
    # The volume was attached: what the restored key service must not forget is in its state again.
    ebsd.ok("detach", "data")
    ebsd.stop()
    ebsd.start()
    ebsd.ok("attach", "data", "--mount", mount)
    assert (mount / "file").read_text() == "precious"


def test_a_lost_root_key_alone_is_told_and_never_replaced(ebsd: Installation, tmp_path: Path, passphrase: Path) -> None:
    backup = tmp_path / "backup"
    ebsd.ok("create", "data", "--size", "64M")
    ebsd.ok("key", "backup", backup, "--passphrase-file", passphrase)
    ebsd.stop()
    kept = (ebsd.root / "root.key").read_bytes()
    (ebsd.root / "root.key").unlink()
    ebsd.start()
    assert ebsd.ctl_json("status")["KeyService"]["State"] == "rescue"
    assert not (ebsd.root / "root.key").exists(), "a new root key would make the loss final"
    status, error = ebsd.refused("attach", "data")
    assert (status, error["Code"]) == (6, "Ebsd.RootKeyUnavailable")
    assert "key restore" in error["Hint"]
    assert ebsd.ctl("doctor").status == 1
    ebsd.ok("key", "restore", backup, "--passphrase-file", passphrase)
    assert len((ebsd.root / "root.key").read_bytes()) == len(kept)
    ebsd.ok("attach", "data")


def test_a_restore_never_overwrites_keys_that_are_in_use(ebsd: Installation, tmp_path: Path, passphrase: Path) -> None:
    backup = tmp_path / "backup"
    ebsd.ok("create", "data", "--size", "64M")
    ebsd.ok("key", "backup", backup, "--passphrase-file", passphrase)
    status, error = ebsd.refused("key", "restore", backup, "--passphrase-file", passphrase)
    assert (status, error["Code"]) == (4, "IncorrectState")
    status, _ = ebsd.refused("key", "backup", backup, "--passphrase-file", passphrase)
    assert status != 0, "an earlier backup is not overwritten"
    ebsd.ok("attach", "data")


def test_ebsd_tells_the_service_manager_when_it_is_ready(tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(60)
        made = Installation(tmp_path)
        made.write_config()
        daemon = subprocess.Popen(
            [Path(__file__).resolve().parents[2] / ".venv/bin/ebsd", "--config", tmp_path / "ebsd.toml"],
            env={**os.environ, "NOTIFY_SOCKET": str(address)},
            stderr=subprocess.DEVNULL,
        )
        try:
            assert manager.recv(4096) == b"READY=1"
            assert made.ctl("status").status == 0, "ready means that it answers"
            daemon.send_signal(signal.SIGTERM)
            assert manager.recv(4096) == b"STOPPING=1"
        finally:
            daemon.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 30
            while daemon.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
        assert daemon.returncode == 0
