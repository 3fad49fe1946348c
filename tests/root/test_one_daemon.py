"""One ebsd per state directory, one key service per key directory: the second refuses, a killed first does not bar."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from installation import BIN, Installation

IN_USE = 4


def run_second(root: Path, state: Path, keys: Path) -> tuple[int, str]:
    """Run another ebsd with a runtime directory of its own, which must end by itself."""
    root.mkdir()
    (root / "ebsd.toml").write_text(
        f'state_dir = "{state}"\nruntime_dir = "{root / "run"}"\n'
        f'[key_service.local]\nstate_dir = "{keys}"\nroot_key = "{state.parent / "root.key"}"\n'
    )
    done = subprocess.run([BIN / "ebsd", "--config", root / "ebsd.toml"], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_a_second_ebsd_on_the_state_directory_refuses(ebsd: Installation, tmp_path: Path) -> None:
    ebsd.ok("create", "data", "--size", "4M")
    status, text = run_second(tmp_path / "second", ebsd.state, tmp_path / "other-keys")
    assert status == IN_USE
    assert f"Another ebsd uses {ebsd.state}" in text
    assert "stop the other one" in text
    assert not (tmp_path / "second" / "run").exists(), "it came before anything was made"
    assert ebsd.ctl_json("show", "data")["State"] == "available"


def test_a_second_key_service_on_the_key_directory_refuses(ebsd: Installation, tmp_path: Path) -> None:
    ebsd.ok("create", "data", "--size", "4M")
    status, text = run_second(tmp_path / "second", tmp_path / "other-state", ebsd.kms_state)
    assert status == IN_USE
    assert f"Another ebsd-kms uses {ebsd.kms_state}" in text
    path = ebsd.ok("attach", "data", "--file")
    assert Path(path).exists()


def test_after_a_kill_the_next_one_may_start(ebsd: Installation) -> None:
    ebsd.ok("create", "data", "--size", "4M")
    path = ebsd.ok("attach", "data", "--file")
    broker = ebsd.processes()["broker"]
    ebsd.kill()
    for pid in broker:
        os.kill(pid, signal.SIGKILL)
    ebsd.start()
    assert ebsd.ctl_json("show", "data")["State"] == "in-use"
    assert Path(path).read_bytes() == bytes(4 << 20)
