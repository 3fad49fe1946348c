"""The systemd units allow the system calls that the processes in them allow themselves.

A call that a unit refuses is answered EPERM, which no library takes for "this kernel has it not": what it was for
fails, or is silently done in a slower way, as copies were that could not ask what of their source is cached.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from ebsd.ipc import seccomp

ROOT: Final = Path(__file__).resolve().parents[2]
SETS: Final = Path(__file__).parent / "vectors" / "systemd-252-syscalls.txt"

NOT_BY_THE_KEY_SERVICE: Final = {
    "cachestat": "it copies no layers",
    "mincore": "it maps no files",
}


def sets() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in SETS.read_text().splitlines():
        if line.startswith("@"):
            found[line] = names = set()
        elif not line.startswith("#"):
            names |= set(line.split())
    return found


def allowed_by(unit: str) -> set[str]:
    """Return what a unit's SystemCallFilter= lines come to (systemd.exec(5)): the first one allows, "~" takes away."""
    known, result = sets(), set[str]()
    for line in re.findall(r"^SystemCallFilter=(.*)$", (ROOT / "systemd" / unit).read_text(), re.MULTILINE):
        takes = line.startswith("~")
        for word in line.removeprefix("~").split():
            names = known[word] if word.startswith("@") else {word}
            result = result - names if takes else result | names
    return result


def test_the_unit_of_ebsd_allows_what_its_processes_allow_themselves() -> None:
    wanted = {*seccomp._BASE, *seccomp._NETWORK, *seccomp._PROGRAMS}
    assert wanted - allowed_by("ebsd.service") == set()


def test_the_unit_of_the_key_service_takes_only_what_it_means_to() -> None:
    taken = set(seccomp._BASE) - allowed_by("ebsd-kms.service")
    assert taken - sets()["@privileged"] - sets()["@resources"] == NOT_BY_THE_KEY_SERVICE.keys()


@pytest.mark.parametrize("name", seccomp._NUMBERS)
def test_what_only_its_number_names_is_allowed_by_name(name: str) -> None:
    assert name in allowed_by("ebsd.service")
