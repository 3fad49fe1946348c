"""What is taken away from each kind of process before it meets a client's bytes: one table, in two steps.

1. ``begin``, first of all: no core files, not dumpable, no new privileges, locked memory, capabilities.
2. ``enclose``, when the first request has told the process what it works on, and before it starts a thread: Landlock,
   then the filter of system calls. What is open by then stays open; by path it opens what it was told of, and the code
   of ebsd and Python, whose error paths may import.
3. What the host cannot do is a line in the log and a finding of ``ebsctl doctor``, and no reason not to start.

Nothing of this binds a process that tests run in their own: ``enclose`` does nothing where ``begin`` was not called.
"""

from __future__ import annotations

import logging
import os
import stat
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from ebsd.ipc import landlock, seccomp
from ebsd.ipc.capabilities import Capability, keep_only
from ebsd.ipc.hardening import join_write_back, lock_memory, shut_off, spare_locked_memory


class Kind(Enum):
    """The processes that ebsd starts; the holder of a volume is confined by itself (``volume/holder.py``)."""

    VOLUME = "volume process"
    WORKER = "worker"
    PROBE = "probe"
    """Looks at a descriptor or measures, and needs nothing by path."""
    CHECKER = "checker"
    HELPER = "host helper"
    BROKER = "key broker"
    BROKER_SERVICE = "key broker under a service manager"
    BROKER_AWS = "key broker with AWS KMS"


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one kind keeps."""

    capabilities: frozenset[Capability] = frozenset()
    calls: frozenset[seccomp.Keeps] | None = frozenset()
    """Beyond the common list; None: no filter."""
    paths: landlock.Access | None = landlock.FILES
    """Rights in the directories that it is told of; None: everything that its uid may."""
    locks_memory: bool = False
    flushes: bool = False
    """It serves a device that dirty pages are written back to (prctl(2), PR_SET_IO_FLUSHER)."""


ALLOWANCES: Final[dict[Kind, Allowance]] = {
    Kind.VOLUME: Allowance(locks_memory=True, flushes=True),
    Kind.WORKER: Allowance(locks_memory=True),
    Kind.PROBE: Allowance(),
    # It says whose files are somebody else's, and has to read them for that.
    Kind.CHECKER: Allowance(capabilities=frozenset({Capability.DAC_READ_SEARCH}), paths=landlock.READ),
    # mount(2), loop devices and their nodes; a block file belongs to its account. Who is enclosed cannot mount, and
    # without root it executes fusermount3, which is setuid.
    Kind.HELPER: Allowance(
        capabilities=frozenset(
            {
                Capability.SYS_ADMIN, Capability.MKNOD, Capability.CHOWN, Capability.FOWNER, Capability.DAC_OVERRIDE,
            }
        ),
        calls=None,
        paths=None,
    ),
    # A change of the root key makes a file wherever the administrator says.
    Kind.BROKER: Allowance(paths=None),
    Kind.BROKER_SERVICE: Allowance(paths=None, calls=frozenset({seccomp.Keeps.DATAGRAMS})),
    # botocore's credentials may be another user's file, or come out of a program (credential_process).
    Kind.BROKER_AWS: Allowance(
        capabilities=frozenset({Capability.DAC_READ_SEARCH}),
        calls=frozenset({seccomp.Keeps.NETWORK, seccomp.Keeps.PROGRAMS}),
        paths=None,
    ),
}  # fmt: skip

_SYSTEM: Final = ("/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/localtime", "/etc/ssl", "/etc/ld.so.cache",
                  "/sys/devices/system/cpu", "/dev/urandom")  # fmt: skip
"""What libraries read when it occurs to them; public on every host."""

_has_begun = False
_kind: Kind | None = None
_kept_besides: frozenset[Capability] = frozenset()
"""What this host makes it keep."""


def begin(log: logging.Logger, kind: Kind | None) -> None:
    """Take from this process what none of its kind needs, before its first secret and its second thread.

    ``kind``: None where ``enclose`` will say it; capabilities are given up there then.
    """
    global _has_begun, _kind, _kept_besides
    failures = shut_off(no_new_privs=kind is not Kind.HELPER or os.geteuid() == 0)
    _kept_besides = spare_locked_memory()
    if kind is not None:
        failures += _take_from(kind)
    _has_begun, _kind = True, kind
    _tell(log, failures)


def enclose(
    log: logging.Logger, fds: Iterable[int] = (), paths: Sequence[str] = (), *, kind: Kind | None = None
) -> None:
    """Confine this process to the directories among ``fds``, to ``paths`` and to the system calls of its kind.

    ``kind``: what it turned out to be, where ``begin`` did not know. It must have one thread.
    """
    if not _has_begun:
        return
    known = _kind or kind
    if known is None:
        raise AssertionError("BUG: a process of no kind")
    allowance = ALLOWANCES[known]
    failures = _take_from(known) if _kind is None else []
    if allowance.paths is not None:
        failures += _restrict_paths(allowance.paths, fds, paths)
    if allowance.calls is not None:
        failures += seccomp.confine(allowance.calls)
    _tell(log, failures)


def _take_from(kind: Kind) -> list[str]:
    allowance = ALLOWANCES[kind]
    failures = []
    if allowance.locks_memory:
        failures += lock_memory()
    if allowance.flushes:
        failures += join_write_back()
    return failures + keep_only(allowance.capabilities | _kept_besides)


def _tell(log: logging.Logger, failures: Sequence[str]) -> None:
    if failures:
        log.warning("this host does not allow all of the confinement: %s", "; ".join(failures))


def _restrict_paths(access: landlock.Access, fds: Iterable[int], paths: Sequence[str]) -> list[str]:
    abi = landlock.version()
    if abi == 0:
        return ["any path stays open to it: the kernel has no Landlock"]
    failures = []
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        failures.append(f"{threads} threads run before Landlock, which binds but one")
    made = landlock.open_places((*_SYSTEM, *_code()), landlock.READ)
    made += landlock.open_places(("/dev/null",), landlock.READ | landlock.Access.WRITE_FILE)
    made += landlock.open_places(paths, access)
    told = [(fd, access) for fd in fds if stat.S_ISDIR(os.fstat(fd).st_mode)]
    try:
        landlock.restrict([*made, *told], abi)
    except OSError as exc:
        failures.append(f"any path stays open to it: {exc.strerror}")
    finally:
        for fd, _ in made:
            os.close(fd)
    return failures


def _code() -> list[str]:
    """Return where the code of Python, of its packages and of ebsd is."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return [*(sysconfig.get_path(name) for name in names), str(Path(__file__).resolve().parents[1])]
