"""An ordinary user tries what an attacker would, against an installation of root with a volume that is attached.

What he is refused here the kernel or ebsd refuses. Each attack is made by a process of his, and afterwards all of
root's is as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from installation import Installation, installation

pytestmark = [
    pytest.mark.root,
    pytest.mark.other_user,
    pytest.mark.skipif(os.geteuid() != 0, reason="root is attacked"),
]

ATTACKER: Final = 4242

PROGRAM: Final = r"""
import ctypes, errno, json, os, socket, struct, sys, array, threading
given = json.load(sys.stdin)
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

def met(attack, *arguments):
    try:
        result = attack(*arguments)
        return "done" if result is None else result
    except OSError as exc:
        return errno.errorcode.get(exc.errno, str(exc.errno))

def call(*arguments):
    result = libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "")

def connect(path, kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.connect(path)

def opened(path, flags=os.O_RDONLY):
    os.close(os.open(path, flags))

def ask(method, parameters, fds=(), sock="users"):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(given[sock])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        client.sendmsg([json.dumps({"method": method, "parameters": parameters}).encode() + bytes(1)], rights)
        answer = b""
        while not answer.endswith(bytes(1)):
            more = client.recv(65536)
            if not more:
                return "hung up"
            answer += more
    reply = json.loads(answer[:-1])
    return reply["parameters"].get("Code", reply["error"]) if "error" in reply else "done"

def imported(fd):
    return ask("io.ebsd.Control.ImportVolume", {"Name": "stolen%d" % fd, "Image": 0, "SizeBytes": 1 << 20}, [fd])

def in_a_user_namespace(attack, *arguments):
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            uid = os.getuid()
            if libc.unshare(0x10000000 | 0x00020000):
                raise OSError(ctypes.get_errno(), "")
            open("/proc/self/setgroups", "w").write("deny")
            open("/proc/self/uid_map", "w").write("0 %d 1" % uid)
            assert os.getuid() == 0
            os.write(writing, met(attack, *arguments).encode())
        except OSError as exc:
            os.write(writing, b"no user namespaces")
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    return os.read(reading, 1000).decode()

def processes():
    found = {}
    for role, pid in given["pids"].items():
        found[role] = {
            "memory": met(opened, "/proc/%d/mem" % pid), "maps": met(opened, "/proc/%d/maps" % pid),
            "environment": met(opened, "/proc/%d/environ" % pid), "descriptors": met(os.listdir, "/proc/%d/fd" % pid),
            "root": met(os.listdir, "/proc/%d/root" % pid), "attach": met(call, 101, 16, pid, 0, 0),
            "seize": met(call, 101, 0x4206, pid, 0, 0), "read": met(peek, pid),
            "signal": met(os.kill, pid, 19), "descriptor": met(steal, pid), "limits": met(limit, pid),
        }
    return found

def steal(pid):
    call(438, os.pidfd_open(pid), 3, 0)

def peek(pid):
    room = ctypes.create_string_buffer(8)
    here = (ctypes.c_uint64 * 2)(ctypes.addressof(room), 8)
    there = (ctypes.c_uint64 * 2)(0x400000, 8)
    call(310, pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)

def limit(pid):
    call(302, pid, 7, ctypes.byref((ctypes.c_uint64 * 2)(1, 1)), 0)

def files():
    found = {}
    for name, path in given["paths"].items():
        found[name] = {
            "read": met(opened, path), "write": met(opened, path, os.O_RDWR), "list": met(os.listdir, path),
            "rename": met(os.rename, path, path + ".x"), "remove": met(os.unlink, path),
            "link": met(os.link, path, given["mine"] + "/link"), "mode": met(os.chmod, path, 0o777),
            "make": met(opened, path + "/new", os.O_CREAT | os.O_WRONLY),
            "attribute": met(os.setxattr, path, "user.x", b"y"),
        }
    return found

def sockets():
    return {
        "kms": met(connect, given["kms"]),
        "control": met(connect, given["control"], socket.SOCK_SEQPACKET),
        "replace": met(os.unlink, given["users"]),
        "as root of a namespace": in_a_user_namespace(ask, "io.ebsd.Control.CheckStore", {}),
        "volume, as root of a namespace": in_a_user_namespace(
            ask, "io.ebsd.EC2.DeleteVolume", {"VolumeId": given["volume"]}
        ),
        "with credentials of root": met(forged),
    }

def forged():
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(given["users"])
        client.sendmsg([b"{}"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("3i", 1, 0, 0))])

def descriptors():
    mine = given["mine"]
    os.symlink("/etc/shadow", mine + "/shadow")
    made = {
        "directory": os.open(mine, os.O_RDONLY), "path only": os.open("/etc/shadow", os.O_PATH),
        "link": os.open(mine + "/shadow", os.O_PATH | os.O_NOFOLLOW),
        "write only": os.open(mine + "/w", os.O_CREAT | os.O_WRONLY),
        "epoll": libc.epoll_create1(0),
        "terminal": os.open("/dev/null", os.O_RDWR), "nothing": os.eventfd(1),
        "proc": os.open("/proc/self/mem", os.O_RDWR), "process": os.pidfd_open(os.getpid()),
    }
    return {name: met(imported, fd) for name, fd in made.items()}

def devices():
    loop = given["loop"]
    return {
        "node": met(opened, loop), "raw": met(opened, loop, os.O_RDWR),
        "loop-control": met(opened, "/dev/loop-control", os.O_RDWR),
        "block file": met(opened, given["file"]), "block file, status": met(os.truncate, given["file"], 0),
        "link": met(os.unlink, given["link"]),
        "own node": met(os.mknod, given["mine"] + "/node", 0o60666, os.makedev(7, 5000)),
        "links": met(os.symlink, "/dev/zero", "/dev/ebsd/x"),
    }

def names():
    found = {}
    odd = ("../../../etc/x", "a/b", "a\n", "-rf", "vol-0123456789abcdef0", "\u202e", ".", "..", "alias/x", "a\0b")
    for name in (*odd, "x" * 300):
        found[repr(name)] = met(ask, "io.ebsd.EC2.CreateVolume", {"SizeBytes": 1 << 20, "Name": name})
    return found

print(json.dumps({"processes": processes(), "files": files(), "sockets": sockets(), "descriptors": descriptors(),
                  "devices": devices(), "names": names()}))
"""


@pytest.fixture(scope="module")
def ebsd() -> Iterator[Installation]:
    root = Path(tempfile.mkdtemp(prefix="ebsd-attacks-"))
    root.chmod(0o711)
    try:
        with installation(root) as made:
            made.ok("create", "data", "--size", "16M")
            made.ok("attach", "data")
            yield made
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def met(ebsd: Installation) -> Any:
    """What each attack met; errno names, codes of ebsd, or ``done``."""
    attachment = ebsd.ctl_json("show", "data")["Attachments"][0]
    volume = ebsd.ctl_json("show", "data")["VolumeId"]
    mine = ebsd.root / "attacker"
    mine.mkdir(mode=0o700)
    os.chown(mine, ATTACKER, ATTACKER)
    pids = {role: pids[0] for role, pids in ebsd.processes().items() if pids}
    given = {
        "pids": pids,
        "paths": {
            "state": str(ebsd.state), "keys": str(ebsd.kms_state), "root key": str(ebsd.root / "root.key"),
            "live": str(ebsd.runtime / "live"), "control": str(ebsd.runtime / "control"),
            "catalog": str(ebsd.state / "catalog.sqlite"), "record": str(ebsd.state / "records" / volume),
        },
        "users": str(ebsd.socket), "kms": str(ebsd.runtime / "kms.sock"), "mine": str(mine), "volume": volume,
        "control": str(ebsd.runtime / "control" / f"{volume}.sock"), "file": str(ebsd.runtime / "volumes" / volume),
        "loop": attachment["Device"], "link": f"/dev/ebsd/{volume}",
    }  # fmt: skip
    done = subprocess.run(
        ["setpriv", f"--reuid={ATTACKER}", f"--regid={ATTACKER}", "--clear-groups", "/usr/bin/env", "-i",
         sys.executable, "-I", "-c", PROGRAM],
        input=json.dumps(given), capture_output=True, text=True, timeout=110, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


REFUSALS: Final = {"EPERM", "EACCES", "EIO"}


def test_no_process_of_root_can_be_looked_into_or_touched(met: Any) -> None:
    assert set(met["processes"]) == {"daemon", "broker", "volumes", "holders"}
    for role, attacks in met["processes"].items():
        assert not {n: a for n, a in attacks.items() if a not in REFUSALS | {"ESRCH"}}, role
        assert attacks["memory"] in REFUSALS


def test_no_file_of_root_can_be_reached(met: Any) -> None:
    for place, attacks in met["files"].items():
        assert set(attacks.values()) <= REFUSALS | {"ENOTDIR", "EISDIR", "EXDEV"}, (place, attacks)


def test_sockets_know_who_asks(met: Any) -> None:
    sockets = met["sockets"]
    assert sockets["kms"] in REFUSALS
    assert sockets["control"] in REFUSALS
    assert sockets["replace"] in REFUSALS
    assert sockets["as root of a namespace"] in ("UnauthorizedOperation", "no user namespaces")
    assert sockets["volume, as root of a namespace"] in ("InvalidVolume.NotFound", "no user namespaces")
    assert sockets["with credentials of root"] == "EPERM"


def test_descriptors_that_are_no_images_are_refused(met: Any) -> None:
    for what, answer in met["descriptors"].items():
        assert answer not in ("done", "InternalFailure", "hung up"), (what, answer)


def test_devices_and_block_files_are_their_owners(met: Any) -> None:
    assert set(met["devices"].values()) <= REFUSALS, met["devices"]


def test_names_that_would_be_something_else_are_refused(met: Any) -> None:
    assert set(met["names"].values()) <= {"InvalidParameterValue", "Ebsd.InvalidName"}, met["names"]


def test_everything_of_roots_is_as_it_was(met: Any, ebsd: Installation) -> None:
    assert ebsd.ctl_json("show", "data")["Attachments"][0]["State"] == "attached"
    assert len(ebsd.ctl_json("list")["Volumes"]) == 1
    assert "incident" not in ebsd.log.read_text()


def test_nobody_mounts_on_what_a_symbolic_link_of_a_user_names(met: Any, ebsd: Installation) -> None:
    """The admin names a directory below one of the user's, who makes it a link to /etc at the wrong moment."""
    from ebsctl.mounting import Programs, mount_command
    from ebsd.domain.errors import InvalidParameterValue

    place = ebsd.root / "attacker" / "place"
    place.symlink_to("/etc")
    with pytest.raises(InvalidParameterValue):
        Programs().mount(mount_command("ext4", "/dev/null", str(place), read_only=False))
    assert not os.path.ismount("/etc")
