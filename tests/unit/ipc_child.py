"""A child for test_ipc_process: reports what it was given, or does as it is told."""

import os
import resource
import sys
import time
from pathlib import Path

from ebsd.domain.errors import VolumeNotFound
from ebsd.ipc.blocking_channel import BlockingChannel
from ebsd.ipc.process import harden


def report(params, fds):
    mask = os.umask(0)
    os.umask(mask)
    return {
        "argv": sys.argv,
        "cmdline": Path("/proc/self/cmdline").read_text().split("\0"),
        "environment": dict(os.environ),
        "isolated": sys.flags.isolated,
        "cwd": os.getcwd(),
        "umask": mask,
        "session": os.getsid(0) == os.getpid(),
        "open": [int(name) for name in os.listdir("/proc/self/fd")],
        "received": len(fds),
        "params": params,
    }, []


def hand_out(params, fds):
    read, write = os.pipe()
    os.write(write, b"from the child")
    os.close(write)
    return {}, [read]


def hang(params, fds):
    time.sleep(1000)


def fail(params, fds):
    raise VolumeNotFound(volume="vol-1")


def crash(params, fds):
    raise ValueError("a secret")


def die(params, fds):
    os._exit(7)


def tightened(params, fds):
    failures = harden(True)
    status = Path("/proc/self/status").read_text()
    return {
        "failures": failures,
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "no_new_privs": "NoNewPrivs:\t1" in status,
        "dumpable": _dumpable(),
    }, []


def _dumpable() -> int:
    import ctypes

    return ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)  # PR_GET_DUMPABLE


HANDLERS = {
    "report": report,
    "hand_out": hand_out,
    "hang": hang,
    "fail": fail,
    "crash": crash,
    "die": die,
    "tightened": tightened,
}

if __name__ == "__main__":
    with BlockingChannel.of_descriptor() as channel:
        while channel.serve_one(HANDLERS):
            pass
