"""The processes of a running ebsd are confined as the table says, and do their work so."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from installation import Installation, installation, run

from ebsd.ipc import landlock, seccomp
from ebsd.ipc.capabilities import Capability, permitted
from ebsd.ipc.confinement import ALLOWANCES, Kind

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="looks at processes of root"),
    pytest.mark.skipif(not seccomp.is_available(), reason="needs libseccomp2"),
]


@pytest.fixture(scope="module")
def ebsd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installation(tmp_path_factory.mktemp("confined")) as made:
        made.ok("create", "data", "--size", "64M")
        made.ok("attach", "data")
        yield made


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def running(module: str, ebsd: Installation) -> list[int]:
    """Return the pids of the processes of this installation that run a module."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            parent = status_of(int(process.name))["PPid"]
        except OSError:
            continue
        if module.encode() in words and int(parent) == ebsd.daemon_pid():
            found.append(int(process.name))
    return found


def check_confined(pid: int, kind: Kind) -> None:
    found = status_of(pid)
    kept = sum(1 << capability for capability in ALLOWANCES[kind].capabilities) & permitted()
    if not permitted() & 1 << Capability.SYS_RESOURCE:
        kept |= 1 << Capability.IPC_LOCK & permitted()
    for name in ("CapEff", "CapPrm", "CapBnd"):
        assert int(found[name], 16) == kept, f"{kind}: {name} {found[name]}"
    assert int(found["CapInh"], 16) == int(found["CapAmb"], 16) == 0
    assert found["NoNewPrivs"] == "1"
    assert found["Seccomp"] == "2"
    for thread in Path(f"/proc/{pid}/task").iterdir():
        text = (thread / "status").read_text()
        assert "Seccomp:\t2" in text
        assert f"CapEff:\t{kept:016x}" in text, f"{kind}: thread {thread.name}"


def test_the_volume_process_and_the_broker_are_confined(ebsd: Installation) -> None:
    pids = ebsd.processes()
    check_confined(pids["volumes"][0], Kind.VOLUME)
    check_confined(pids["broker"][0], Kind.BROKER)


def test_the_holder_of_a_volume_has_nothing_but_programs_to_start(ebsd: Installation) -> None:
    found = status_of(ebsd.processes()["holders"][0])
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    spared = 0 if permitted() & 1 << Capability.SYS_RESOURCE else 1 << Capability.IPC_LOCK
    assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == spared & permitted()


def test_a_worker_is_confined_while_it_works(ebsd: Installation) -> None:
    reading, writing = os.pipe()
    with subprocess.Popen(
        [
            Path(__file__).parents[2] / ".venv/bin/ebsctl",
            "--socket",
            ebsd.socket,
            "import",
            "-",
            "piped",
            "--size",
            "8M",
        ],
        stdin=reading,
    ) as job:
        os.close(reading)
        os.write(writing, b"x" * 4096)
        deadline = time.monotonic() + 60
        while not (pids := running("ebsd.volume.importer", ebsd)) or status_of(pids[0])["Seccomp"] != "2":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        check_confined(pids[0], Kind.WORKER)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(bytes((8 << 20) - 4096))
        assert job.wait(60) == 0


def test_their_logs_tell_of_nothing_that_this_host_could_do(ebsd: Installation) -> None:
    told = [line for line in ebsd.log.read_text().splitlines() if "confinement" in line]
    assert not [line for line in told if "system call" in line]
    if landlock.version():
        assert not [line for line in told if "path" in line or "threads" in line]


def test_a_volume_process_that_was_taken_over_does_all_its_work_confined(ebsd: Installation) -> None:
    """Seal, leaves, growth, drain and a clean end: what opens files by name after the confinement."""
    path = Path(ebsd.ctl_json("show", "data")["Attachments"][0]["Path"])
    ebsd.kill()
    ebsd.start()
    for name in ("one", "two"):
        run("dd", "if=/dev/urandom", f"of={path}", "bs=1M", "count=4", "conv=notrunc,fsync", "status=none")
        ebsd.ok("snapshot", "data", "--name", name)
    ebsd.ok("resize", "data", "128M")
    ebsd.ok("delete", "one", "--yes")
    ebsd.ok("detach", "data")
    ebsd.ok("verify", "two")
    assert ebsd.ctl_json("show", "data")["State"] == "available"
    said = [line for line in ebsd.log.read_text().splitlines() if "confinement" not in line]
    assert not [line for line in said if "ermission denied" in line or "not permitted" in line]


def test_doctor_says_that_they_are_confined_and_what_of_the_host_is_amiss(ebsd: Installation) -> None:
    ebsd.ok("attach", "data")
    findings = {finding["Check"]: finding for finding in ebsd.ctl_json("doctor")["Findings"]}
    assert findings["confinement"]["Level"] == "ok"
    assert findings["confinement"]["Message"].startswith("3 processes"), "the key service, a holder and its engine"
    assert findings["locked memory"]["Level"] == "ok"
    assert findings["root key"]["Level"] == "warning", "it lies beside the state here"
    assert findings.keys() >= {"swap", "hibernation", "core files", "group disk", "clock", "open files"}
    assert all(finding.get("Fix") for finding in findings.values() if finding["Level"] in ("warning", "failure"))
