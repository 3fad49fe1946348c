"""Each kind of process loses what the table says, as processes find that try; a host that lacks means is told of."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from confined_child import CACHESTAT, call, met

from ebsd.ipc import landlock, seccomp
from ebsd.ipc.confinement import ALLOWANCES, Kind

CHILD = Path(__file__).with_name("confined_child.py")
ROOT = os.geteuid() == 0

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="system calls are tried by their numbers of x86_64"),
    pytest.mark.skipif(not seccomp.is_available(), reason="needs libseccomp2"),
    pytest.mark.skipif(landlock.version() == 0, reason="needs Landlock"),
]

NEVER = ("ptrace", "bpf", "keyctl", "init_module", "kexec_load", "process_vm_readv", "open_by_handle_at",
         "io_uring_setup", "mount", "unshare", "setns")  # fmt: skip


@dataclass
class Tried:
    met: dict[str, str]
    early: dict[str, str]
    log: str


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A directory with a file of the process's own, and one of somebody else's (for root)."""
    directory = tmp_path / "told"
    directory.mkdir()
    for name in ("file", "stranger", "../outside"):
        (directory / name).write_text(name)
        (directory / name).chmod(0o600)
    if ROOT:
        os.chown(directory / "stranger", 4711, 4711)
    return directory


def attempt(kind: Kind, told: Path, *more: str, uid: int | None = None) -> Tried:
    uid = os.geteuid() if uid is None else uid
    if uid != os.geteuid():
        for path in (told, told / "file", told.parent / "outside"):
            os.chown(path, uid, uid)
        for parent in told.parents:
            if parent.owner() == "root" and parent.stat().st_mode & 0o777 == 0o700:
                parent.chmod(0o711)  # of this test's own base
    done = subprocess.run(
        [sys.executable, str(CHILD), kind.name, str(told), str(uid), *more], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    return Tried(report["met"], report["early"], done.stderr)


USUAL = {
    **dict.fromkeys((*NEVER, "execve", "fork", "ip socket", "unix socket", "unix datagram", "kill another"), "EPERM"),
    **dict.fromkeys(
        ("socketpair", "thread", "kill itself", "read its directory", "make there", "a later import", "much memory",
         "a secret"),
        "done",
    ),
    **dict.fromkeys(("out by ..", "read outside", "read /etc/shadow"), "EACCES"),
    "read a stranger's file there": "EACCES" if ROOT else "done",
    "what is cached": met(lambda: call(CACHESTAT)),  # ENOSYS of a kernel before 6.5, else that there is no range
}  # fmt: skip

DIFFERENT: dict[Kind, dict[str, str]] = {
    Kind.VOLUME: {},
    Kind.WORKER: {},
    Kind.PROBE: {},
    Kind.CHECKER: {"read its directory": "EACCES", "make there": "EACCES", "read a stranger's file there": "done"},
    Kind.BROKER: {"out by ..": "done", "read outside": "done", "read /etc/shadow": "done" if ROOT else "EACCES"},
    Kind.BROKER_SERVICE: {
        "unix socket": "ENOSYS", "unix datagram": "done", "out by ..": "done", "read outside": "done",
        "read /etc/shadow": "done" if ROOT else "EACCES",
    },
    Kind.BROKER_AWS: {
        **dict.fromkeys(("fork", "ip socket", "unix socket", "unix datagram", "kill another"), "done"),
        "execve": "ENOENT",
        "out by ..": "done", "read outside": "done", "read /etc/shadow": "done" if ROOT else "EACCES",
        "read a stranger's file there": "done",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", DIFFERENT, ids=lambda kind: kind.name)
def test_a_process_gets_what_its_kind_keeps_and_nothing_else(kind: Kind, told: Path) -> None:
    assert attempt(kind, told).met == USUAL | DIFFERENT[kind]


def test_every_kind_is_tried_except_the_one_that_must_mount() -> None:
    assert set(ALLOWANCES) == set(Kind) == {*DIFFERENT, Kind.HELPER}


@pytest.mark.skipif(not ROOT, reason="becomes another user")
def test_a_process_without_root_is_confined_alike(told: Path) -> None:
    expected = USUAL | {"read a stranger's file there": "EACCES"}
    assert attempt(Kind.VOLUME, told, uid=65534).met == expected


def test_a_process_may_be_enclosed_further_than_who_started_it(told: Path) -> None:
    """As an engine is by itself, under the filter of its holder."""
    tried = attempt(Kind.VOLUME, told, "--under-a-holder")
    assert tried.met == USUAL
    assert "system call" not in tried.log
    assert "Landlock" not in tried.log


def test_the_filter_binds_threads_that_run_already_and_landlock_says_that_it_does_not(told: Path) -> None:
    tried = attempt(Kind.WORKER, told, "--thread")
    assert tried.early == {"ip socket": "EPERM", "ptrace": "EPERM"}
    assert "2 threads run before Landlock" in tried.log


@pytest.mark.parametrize(
    ("lacking", "text", "changed"),
    [
        ("landlock", "the kernel has no Landlock", ("out by ..", "read outside", "read /etc/shadow")),
        ("seccomp", "any system call stays possible", ("execve", "fork", "ip socket", "unix socket", "unix datagram")),
    ],
)
def test_a_host_that_lacks_a_means_is_told_of_and_the_rest_holds(
    lacking: str, text: str, changed: Sequence[str], told: Path
) -> None:
    tried = attempt(Kind.VOLUME, told, lacking)
    assert text in tried.log
    other = set(USUAL) - set(changed) - {*NEVER, "kill another"}
    assert {name: tried.met[name] for name in other} == {name: USUAL[name] for name in other}
    assert all(tried.met[name] != USUAL[name] for name in changed if ROOT or name != "read /etc/shadow")


def test_without_begin_nothing_is_taken_from_a_process(told: Path) -> None:
    """The tests run the code of all processes in their own."""
    import logging

    from ebsd.ipc import confinement

    confinement.enclose(logging.getLogger("test"), ())
    assert (told.parent / "outside").read_text()
    assert "Seccomp:\t0" in Path("/proc/self/status").read_text()


@pytest.mark.parametrize(
    ("abi", "last"), [(0, None), (1, "MAKE_SYM"), (2, "REFER"), (3, "TRUNCATE"), (4, "TRUNCATE"), (5, "IOCTL_DEV"),
                      (7, "IOCTL_DEV")]
)  # fmt: skip
def test_an_older_landlock_is_asked_for_what_it_knows(abi: int, last: str | None) -> None:
    rights = landlock.known_rights(abi)
    if last is None:
        assert not rights
        return
    assert landlock.Access[last] in rights
    assert int(rights) == 2 * int(landlock.Access[last]) - 1
