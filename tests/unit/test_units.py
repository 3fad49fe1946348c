"""The unit files: programs, users, sockets and credentials that they name exist, and systemd understands them."""

from __future__ import annotations

import base64
import configparser
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from ebsd.control.inspection import SEALED_ROOT_KEY, is_sealed_to_host
from ebsd.daemon.config import load
from ebsd.daemon.keyservice import MAY_CREATE
from ebsd.volume.host import FIRST_MINOR, LAST_MINOR, UDEV_NOTES

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = ROOT / "systemd"
UNITS = sorted((*SYSTEMD.glob("*.service"), *SYSTEMD.glob("*.socket")))
PROGRAMS = {
    f"/usr/lib/ebsd/bin/{name}" for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
} | {"/usr/bin/ebsctl", "/bin/true"}


def settings(path: Path) -> dict[str, list[str]]:
    """Return all settings of a unit, each with its values in order."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_a_unit_starts_programs_that_are_installed(path: Path) -> None:
    unit = settings(path)
    for name in ("ExecStart", "ExecStartPre", "ExecStop"):
        for command in unit.get(name, []):
            assert command.lstrip("+-").split()[0] in PROGRAMS
    assert unit["Description"][0]


def test_the_user_of_the_key_service_is_made() -> None:
    declared = {line.split()[1] for line in (SYSTEMD / "ebsd.sysusers").read_text().splitlines()}
    assert set(settings(SYSTEMD / "ebsd-kms.service")["User"]) == declared


def test_each_service_gets_the_sockets_that_its_program_asks_for() -> None:
    names: dict[str, set[str]] = {}
    for path in SYSTEMD.glob("*.socket"):
        unit = settings(path)
        names.setdefault(unit["Service"][0], set()).update(unit["FileDescriptorName"])
        (listen,) = unit["ListenStream"]
        assert listen == f"/run/ebsd/{unit['FileDescriptorName'][0]}.sock"
        assert unit["SocketMode"] == ["0600" if listen.endswith("/kms.sock") else "0666"], "kms.sock is ebsd's alone"
    assert names == {"ebsd.service": {"ebsd"}, "ebsd-kms.service": {"kms", "keys"}}
    assert set(settings(SYSTEMD / "ebsd-kms.service")["Sockets"][0].split()) == {"ebsd-kms.socket", "ebsd-keys.socket"}


def test_the_configuration_names_the_credential_that_the_unit_loads() -> None:
    nowhere = {"CREDENTIALS_DIRECTORY": "/run/credentials/ebsd-kms.service"}
    for environment in ({}, nowhere):  # ebsd's own, and the key service's
        config = load(file=SYSTEMD / "ebsd.toml", state_dir=None, runtime_dir=None, uid=0, environment=environment)
        assert config.kms_is_service
        assert str(config.state_dir) == "/var/lib/ebsd"
        assert str(config.kms_state_dir) == "/var/lib/ebsd-kms"
        assert str(config.runtime_dir) == "/run/ebsd"
        name, _, place = settings(SYSTEMD / "ebsd-kms.service")["LoadCredentialEncrypted"][0].partition(":")
        assert config.root_key["name"] == name
        assert f"CREDENTIAL={place}\n" in (ROOT / "packaging" / "activate").read_text()
    assert MAY_CREATE, "a file in RuntimeDirectory="
    assert settings(SYSTEMD / "ebsd-kms.service")["RuntimeDirectory"] == ["ebsd-kms"]


def test_doctor_looks_at_the_root_key_that_the_unit_loads() -> None:
    assert str(SEALED_ROOT_KEY) in settings(SYSTEMD / "ebsd-kms.service")["LoadCredentialEncrypted"][0]


@pytest.mark.parametrize(("kind", "expected"), [("tpm", False), ("host", True)])
def test_a_credential_that_a_disk_opens_is_known(tmp_path: Path, kind: str, expected: bool) -> None:
    """The head says what it takes to open it: here the secret of the host alone, or the TPM (creds-util.h)."""
    sealed = {"host": "5a1c6a86df9d4096b1d5a65e0862f19a", "tpm": "0c7cc07b117645919c4b0bea08bc20fe"}[kind]
    path = tmp_path / "root-key.cred"
    path.write_bytes(base64.b64encode(bytes.fromhex(sealed) + bytes(100)))
    assert is_sealed_to_host(path) is expected
    assert not is_sealed_to_host(tmp_path / "absent")


def test_the_end_of_ebsd_is_not_the_end_of_volumes() -> None:
    unit = settings(SYSTEMD / "ebsd.service")
    assert unit["KillMode"] == ["process"]
    assert unit["RuntimeDirectoryPreserve"] == ["yes"], "block files and live maps are there"
    for name in ("ebsd-volume@.service", "ebsd-detach.service"):
        dependent = settings(SYSTEMD / name)
        assert not {"Requires", "BindsTo", "PartOf", "Requisite"} & set(dependent), "a stop of ebsd is no detach"
        assert dependent["After"] == ["ebsd.service"]


def test_block_files_are_mounted_where_everybody_sees_them() -> None:
    """Each of these gives the service a mount namespace of its own (systemd.exec(5))."""
    unit = set(settings(SYSTEMD / "ebsd.service"))
    assert not {name for name in unit if name.startswith(("Private", "Protect", "ReadOnlyPaths", "Inaccessible"))}
    assert not {"TemporaryFileSystem", "BindPaths", "MountFlags", "RootDirectory", "ReadWritePaths"} & unit


def test_the_udev_rule_is_for_our_devices_and_our_notes() -> None:
    rule = (SYSTEMD / "59-ebsd.rules").read_text()
    assert (FIRST_MINOR, LAST_MINOR) == (5000, 9999)
    assert 'KERNEL!="loop[5-9][0-9][0-9][0-9]"' in rule
    assert f'IMPORT{{file}}="{UDEV_NOTES}/%k"' in rule
    assert f"d {UDEV_NOTES} 0755 root root -" in (SYSTEMD / "ebsd.tmpfiles").read_text()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root directory with the units and programs that they can be found to start."""
    place = tmp_path / "usr/lib/systemd/system"
    place.mkdir(parents=True)
    for path in UNITS:
        shutil.copy(path, place)
    for name in ("sysinit", "basic", "shutdown", "sockets", "multi-user", "umount"):
        (place / f"{name}.target").write_text("[Unit]\nDescription=made for this test\n")
    for name in ("systemd-modules-load", "systemd-udevd"):
        (place / f"{name}.service").write_text("[Service]\nExecStart=/bin/true\n")
    for program in PROGRAMS:
        file = tmp_path / program.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
    return tmp_path


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60)


def test_systemd_understands_every_line(tree: Path) -> None:
    names = [path.name.replace("@.", "@data.") for path in UNITS]
    done = analyze("verify", "--man=no", f"--root={tree}", *names)
    ours = [line for line in done.stderr.splitlines() if "ebsd" in line]
    assert not ours, "\n".join(ours)


def test_the_key_service_is_well_shut_in(tree: Path) -> None:
    """The threshold is ten times the exposure that is shown: 2.0 of 10."""
    done = analyze("security", "--offline=true", "--threshold=20", f"--root={tree}", "ebsd-kms.service")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "packaging").iterdir()), ids=lambda p: p.name)
def test_a_maintainer_script_can_be_read_by_sh(path: Path) -> None:
    subprocess.run(["sh", "-n", path], check=True)


def test_unit_files_are_of_the_form_that_the_other_tests_read() -> None:
    for path in UNITS:
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read(path)
        assert {"Unit"} < set(parser.sections())
