"""What doctor says of the host: each check decides on what was read, so that it can be tried without such a host.

What a check cannot read is no finding: a container hides much of this, and ebsd works there.
"""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import resource
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ebsd.ipc import landlock, seccomp

FEW_DESCRIPTORS: Final = 4096
"""A limit of open files below this is felt: ebsd needs one for each connection and ten for each attached volume."""

_UNSYNCHRONISED: Final = 0x40
_CLOCK_ERROR: Final = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of doctor; ``Level`` is ok, note, warning or failure."""

    Check: str
    Level: str
    Message: str
    Fix: str | None = field(default=None)


@dataclass(frozen=True, slots=True)
class ProcessState:
    """What /proc/PID/status says of one of our processes."""

    name: str
    no_new_privs: bool
    filtered: bool
    capabilities: int
    locked: int
    """Bytes of locked memory."""

    @classmethod
    def parse(cls, name: str, status: str) -> ProcessState:
        fields = {key: value.strip() for key, _, value in (line.partition(":") for line in status.splitlines())}
        return cls(
            name,
            fields.get("NoNewPrivs") == "1",
            fields.get("Seccomp") == "2",
            int(fields.get("CapEff", "0"), 16),
            int(fields.get("VmLck", "0 kB").split()[0]) * 1024,
        )


def confinement(processes: Sequence[ProcessState], landlock_version: int, has_filters: bool) -> list[Finding]:
    """Say what the running processes lack of their confinement, and what of it this host cannot do at all."""
    found = []
    if not has_filters:
        found.append(
            Finding(
                "system call filter",
                "warning",
                "libseccomp2 is not installed: processes with keys may make any system call",
                "apt-get install libseccomp2, then attach volumes anew",
            )
        )
    if landlock_version == 0:
        found.append(
            Finding(
                "Landlock",
                "note",
                "the kernel has none: processes with keys may open every file of their user",
                "Linux 5.13 or newer, with landlock in the boot option lsm=",
            )
        )
    bare = sorted({p.name for p in processes if not (p.filtered and p.no_new_privs) or p.capabilities & _MIGHTY})
    if bare and has_filters:
        text = f"not confined: {', '.join(bare)}"
        found.append(Finding("confinement", "warning", text, "Detach and attach them, and restart ebsd; see its log."))
    elif processes and has_filters:
        found.append(Finding("confinement", "ok", f"{len(processes)} processes with keys are confined"))
    return found


_MIGHTY: Final = sum(1 << number for number in (1, 6, 7, 16, 19, 21))
"""DAC_OVERRIDE, SETGID, SETUID, SYS_MODULE, SYS_PTRACE and SYS_ADMIN: no process with keys has any of them."""


def locked_memory(processes: Sequence[ProcessState], has_swap: bool) -> list[Finding]:
    """Say whether what volume processes work with can be swapped out."""
    loose = sorted({p.name for p in processes if p.name.startswith("vol-") and not p.locked})
    if not loose:
        return [Finding("locked memory", "ok", "plaintext and keys of volume processes stay off swap")]
    text = f"memory of {', '.join(loose)} is not locked"
    fix = "Raise the limit of locked memory of ebsd (LimitMEMLOCK=infinity), then attach anew."
    return [Finding("locked memory", "warning" if has_swap else "note", text, fix)]


def swap(swaps: str, kind_of: Callable[[str], str]) -> list[Finding]:
    """Judge /proc/swaps; ``kind_of`` a swap area: ``encrypted``, ``memory`` or empty."""
    areas = [line.split()[0] for line in swaps.splitlines()[1:] if line.strip()]
    if not areas:
        return [Finding("swap", "ok", "none")]
    clear = [area for area in areas if not kind_of(area)]
    if not clear:
        return [Finding("swap", "ok", "encrypted, or in memory")]
    return [
        Finding(
            "swap",
            "warning",
            f"{', '.join(clear)}: data of mounted volumes can be written there in clear",
            "Turn it off (swapoff), or encrypt it (crypttab: swap,cipher=aes-xts-plain64). Data keys are locked in "
            "memory either way.",
        )
    ]


def hibernation(states: str, mode: str) -> list[Finding]:
    """Judge /sys/power/state and /sys/power/disk: hibernation writes all memory to the swap area."""
    if "disk" not in states.split() or "[disabled]" in mode:
        return [Finding("hibernation", "ok", "not possible")]
    text = (
        "possible: it writes the memory of mounted volumes to the swap area (a data key in secret memory prevents it)"
    )
    return [Finding("hibernation", "note", text, "systemctl mask hibernate.target hybrid-sleep.target")]


def core_files(pattern: str) -> list[Finding]:
    """ebsd's processes are never dumped; programs that use volumes may be."""
    if pattern.strip().startswith(("|/bin/false", "|/bin/true")) or not pattern.strip():
        return [Finding("core files", "ok", "none are written")]
    text = f"no process of ebsd leaves one; others, with what they read from volumes, go to {pattern.strip()}"
    return [Finding("core files", "ok", text)]


def disk_group(members: Sequence[str]) -> list[Finding]:
    """Group ``disk`` reads the disks below everything, root's files included."""
    if not members:
        return [Finding("group disk", "ok", "it has no members")]
    text = f"{', '.join(members)} can read and write the disks below: state, root key file and all files of root"
    return [Finding("group disk", "warning", text, f"gpasswd --delete {members[0]} disk")]


def clock(synchronised: bool) -> list[Finding]:
    """Deletions of keys, locks and schedules go by the clock."""
    if synchronised:
        return [Finding("clock", "ok", "synchronised")]
    text = "not synchronised: dates of key deletions, locks and schedules go by it"
    return [Finding("clock", "note", text, "timedatectl set-ntp true")]


def limits(descriptors: int) -> list[Finding]:
    """Judge the limit of open files that ebsd runs with."""
    if descriptors >= FEW_DESCRIPTORS:
        return [Finding("open files", "ok", f"at most {descriptors} for each process")]
    text = f"at most {descriptors} for each process: few connections and attached volumes at once"
    return [Finding("open files", "warning", text, "LimitNOFILE=65536 in its unit, or ulimit -n 65536 before ebsd")]


# --- what is read


def read_processes(pids: Mapping[str, int]) -> list[ProcessState]:
    """Return what can be read of each process and of those that it started, as a holder its engine, under its name.

    One that has ended is left out.
    """
    found = []
    for name, pid in pids.items():
        started = _text(f"/proc/{pid}/task/{pid}/children").split()
        for each in (str(pid), *started):
            with suppress(OSError, ValueError):
                found.append(ProcessState.parse(name, Path(f"/proc/{each}/status").read_text()))
    return found


def examine_host(pids: Mapping[str, int]) -> list[Finding]:
    """Return all findings on the host and on the running processes {name: pid}; blocks shortly."""
    processes = read_processes(pids)
    swaps = _text("/proc/swaps")
    found = confinement(processes, landlock.version(), seccomp.is_available())
    found += locked_memory(processes, len(swaps.splitlines()) > 1)
    found += swap(swaps, _kind_of_swap)
    found += hibernation(_text("/sys/power/state"), _text("/sys/power/disk"))
    found += core_files(_text("/proc/sys/kernel/core_pattern"))
    found += disk_group(_members("disk"))
    found += clock(_is_synchronised())
    return found + limits(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _kind_of_swap(area: str) -> str:
    """``memory`` for zram, ``encrypted`` for dm-crypt on any level that the device shows by itself."""
    name = os.path.basename(os.path.realpath(area))
    if name.startswith("zram"):
        return "memory"
    return "encrypted" if _text(f"/sys/class/block/{name}/dm/uuid").startswith("CRYPT-") else ""


def _members(group: str) -> list[str]:
    try:
        found = grp.getgrnam(group)
    except KeyError:
        return []
    primary = (user.pw_name for user in pwd.getpwall() if user.pw_gid == found.gr_gid)
    return sorted({*found.gr_mem, *primary} - {"root"})


def _is_synchronised() -> bool:
    """Ask the kernel (adjtimex(2)); where it does not say, that is no finding."""
    buffer = (ctypes.c_long * 64)()
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(buffer))
    status = ctypes.c_int.from_buffer(buffer, 5 * ctypes.sizeof(ctypes.c_long)).value
    return state < 0 or not (state == _CLOCK_ERROR or status & _UNSYNCHRONISED)
