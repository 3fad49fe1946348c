"""What doctor makes of hosts that this one is not: one table of what was read and what is said."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ebsd.control import hostchecks
from ebsd.control.hostchecks import Finding, ProcessState

SWAPS = "Filename\tType\tSize\tUsed\tPriority\n"
CONFINED = ProcessState("vol-1", no_new_privs=True, filtered=True, capabilities=1 << 14, locked=1 << 20)


def levels(found: list[Finding]) -> dict[str, str]:
    return {finding.Check: finding.Level for finding in found}


@pytest.mark.parametrize(
    ("found", "check", "level"),
    [
        (hostchecks.swap(SWAPS, lambda area: ""), "swap", "ok"),
        (hostchecks.swap(SWAPS + "/dev/sda2 partition 1 0 -2\n", lambda area: ""), "swap", "warning"),
        (hostchecks.swap(SWAPS + "/dev/dm-0 partition 1 0 -2\n", lambda area: "encrypted"), "swap", "ok"),
        (hostchecks.swap(SWAPS + "/dev/zram0 partition 1 0 -2\n", lambda area: "memory"), "swap", "ok"),
        (hostchecks.hibernation("freeze mem disk", "[platform] shutdown"), "hibernation", "note"),
        (hostchecks.hibernation("freeze mem disk", "[disabled]"), "hibernation", "ok"),
        (hostchecks.hibernation("freeze mem", ""), "hibernation", "ok"),
        (hostchecks.disk_group([]), "group disk", "ok"),
        (hostchecks.disk_group(["ada"]), "group disk", "warning"),
        (hostchecks.clock(True), "clock", "ok"),
        (hostchecks.clock(False), "clock", "note"),
        (hostchecks.limits(65536), "open files", "ok"),
        (hostchecks.limits(1024), "open files", "warning"),
        (hostchecks.core_files("|/usr/lib/systemd/systemd-coredump %P"), "core files", "ok"),
        (hostchecks.locked_memory([CONFINED], True), "locked memory", "ok"),
        (hostchecks.locked_memory([ProcessState("vol-1", True, True, 0, 0)], True), "locked memory", "warning"),
        (hostchecks.locked_memory([ProcessState("vol-1", True, True, 0, 0)], False), "locked memory", "note"),
        (hostchecks.locked_memory([ProcessState("the key service", True, True, 0, 0)], True), "locked memory", "ok"),
    ],
)  # fmt: skip
def test_a_host_is_judged(found: list[Finding], check: str, level: str) -> None:
    assert levels(found) == {check: level}
    assert all(finding.Fix for finding in found if finding.Level not in ("ok",))


def test_processes_that_are_not_confined_are_named() -> None:
    assert levels(hostchecks.confinement([CONFINED], 7, True)) == {"confinement": "ok"}
    for bare in (
        ProcessState("vol-2", True, False, 0, 0),
        ProcessState("vol-2", False, True, 0, 0),
        ProcessState("vol-2", True, True, 1 << 21, 0),
    ):
        (found,) = hostchecks.confinement([CONFINED, bare], 7, True)
        assert found.Level == "warning"
        assert "vol-2" in found.Message
        assert "vol-1" not in found.Message


def test_what_the_host_lacks_for_confinement_is_told_with_its_remedy() -> None:
    assert levels(hostchecks.confinement([], 0, False)) == {"system call filter": "warning", "Landlock": "note"}
    assert levels(hostchecks.confinement([], 1, True)) == {}


def test_the_state_of_a_process_is_read_from_proc() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        found, of_child = hostchecks.read_processes({"me": os.getpid(), "gone": 2**22 + 1})
        child.kill()
    assert of_child.name == "me"
    text = Path("/proc/self/status").read_text()
    assert found.name == "me"
    assert f"CapEff:\t{found.capabilities:016x}" in text
    assert not found.filtered


def test_this_host_can_be_examined() -> None:
    found = levels(hostchecks.examine_host({}))
    assert found.keys() >= {"swap", "hibernation", "core files", "group disk", "clock", "open files", "locked memory"}
