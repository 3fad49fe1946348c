"""A process for test_confinement: becomes one kind of process, tries what it should not get, and says what it met.

Arguments: kind, directory that it is told of, uid, and what the host lacks ("landlock", "seccomp" or nothing).
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ebsd.crypto.secret import Secret
from ebsd.ipc import confinement, landlock, seccomp
from ebsd.ipc.capabilities import keep_only
from ebsd.ipc.hardening import shut_off, spare_locked_memory

NUMBERS = {"ptrace": 101, "bpf": 321, "keyctl": 250, "init_module": 175, "kexec_load": 246, "process_vm_readv": 310,
           "open_by_handle_at": 304, "io_uring_setup": 425, "mount": 165, "unshare": 272, "setns": 308}  # fmt: skip
"""System calls of x86_64, tried with arguments of zero."""

CACHESTAT = 451

libc = ctypes.CDLL(None, use_errno=True)


def met(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    return "done"


def call(number: int) -> object:
    if libc.syscall(number, *[ctypes.c_long(0)] * 6) < 0:
        raise OSError(ctypes.get_errno(), "")
    return None


def start_program() -> None:
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)


def attempts(told: Path, other: int) -> dict[str, Callable[[], object]]:
    directory = os.open(told, os.O_PATH | os.O_DIRECTORY)
    found: dict[str, Callable[[], object]] = {name: lambda n=number: call(n) for name, number in NUMBERS.items()}
    return found | {
        "what is cached": lambda: call(CACHESTAT),
        "execve": lambda: os.execv("/nonexistent", ["x"]),
        "fork": start_program,
        "ip socket": lambda: socket.socket(socket.AF_INET).close(),
        "unix socket": lambda: socket.socket(socket.AF_UNIX).close(),
        "unix datagram": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).close(),
        "socketpair": lambda: [end.close() for end in socket.socketpair()],
        "thread": lambda: threading.Thread(target=int).start(),
        "kill another": lambda: os.kill(other, 0),
        "kill itself": lambda: os.kill(os.getpid(), 0),
        "read its directory": lambda: os.close(os.open("file", os.O_RDWR, dir_fd=directory)),
        "make there": lambda: os.close(os.open("new", os.O_CREAT | os.O_RDWR, dir_fd=directory)),
        "read a stranger's file there": lambda: os.close(os.open("stranger", os.O_RDONLY, dir_fd=directory)),
        "out by ..": lambda: os.close(os.open("../outside", os.O_RDONLY, dir_fd=directory)),
        "read outside": lambda: os.close(os.open(told.parent / "outside", os.O_RDONLY)),
        "read /etc/shadow": lambda: os.close(os.open("/etc/shadow", os.O_RDONLY)),
        "a later import": lambda: __import__("wave"),
        "much memory": lambda: len(bytearray(64 << 20)),
        "a secret": lambda: Secret.random(64).wipe(),
    }


def main() -> None:
    kind, told, uid, lacking = confinement.Kind[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    if uid != os.geteuid():
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if "landlock" in lacking:
        landlock.version = lambda: 0
    if "seccomp" in lacking:
        seccomp._LIBRARY = "libnothere.so"
    ready, go = threading.Event(), threading.Event()
    early: dict[str, str] = {}

    def elsewhere() -> None:
        ready.set()
        go.wait()
        early["ip socket"] = met(lambda: socket.socket(socket.AF_INET).close())
        early["ptrace"] = met(lambda: call(NUMBERS["ptrace"]))

    log = logging.getLogger("confined")
    if "--under-a-holder" in lacking:
        assert not [
            *keep_only(spare_locked_memory()),
            *shut_off(),
            *seccomp.confine(frozenset({seccomp.Keeps.PROGRAMS})),
        ]
    late = kind.name.startswith("BROKER")  # which learns with its configuration which it is
    confinement.begin(log, None if late else kind)
    tried = attempts(told, os.getppid())
    if "seccomp" in lacking:
        tried = {name: attempt for name, attempt in tried.items() if name not in NUMBERS}  # they would do something
    directory = os.open(told, os.O_RDONLY | os.O_DIRECTORY)
    thread = threading.Thread(target=elsewhere)
    if "--thread" in lacking:
        thread.start()
        ready.wait()
    confinement.enclose(log, (directory,), kind=kind if late else None)
    report: dict[str, object] = {name: met(attempt) for name, attempt in tried.items()}
    if "--thread" in lacking:
        go.set()
        thread.join()
    print(json.dumps({"met": report, "early": early}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
