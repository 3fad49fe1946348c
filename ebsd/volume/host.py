"""Host helper: mount, loop and link operations in a short-lived process.

ebsd never does these itself: each of them can block on a volume process that only ebsd can end.
The helper gets requests on descriptor 0 (``ipc/channel.py``), and answers them until the other end is closed.

Loop rules: own minors, so that no device of somebody else is ever touched; node 0600 root, so that udev's
``disk`` group cannot read it; direct I/O, so that no second cache of plaintext exists; no partition scan; a
device counts as gone only when LOOP_CTL_REMOVE succeeded, because LOOP_CLR_FD succeeds while others still
have it open (drivers/block/loop.c).
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ebsd.domain.errors import HostUnsupported, VolumeBusy, WritesFailed, WritesLackedSpace
from ebsd.domain.mountinfo import Mount, mounts_of_device, parse_mountinfo
from ebsd.domain.units import SECTOR
from ebsd.ipc import confinement
from ebsd.ipc.blocking_channel import BlockingChannel, BlockingHandler
from ebsd.ipc.confinement import Kind

LOOP_MAJOR: Final = 7
FIRST_MINOR: Final = 5000
LAST_MINOR: Final = 9999
LINKS: Final = Path("/dev/ebsd")
SIZE_SECONDS: Final = 5.0
"""How long the kernel may be asked for a new size before writes leave it the time."""
UDEV: Final = Path("/run/udev")
UDEV_NOTES: Final = Path("/run/ebsd-udev")
"""One file per loop device, from which the udev rule has the links (systemd/59-ebsd.rules)."""
UDEV_PATIENCE: Final = 5.0
"""Seconds in which udev has dealt with what happened to a device before."""

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MNT_FORCE, _MNT_DETACH, _UMOUNT_NOFOLLOW = 1, 2, 8
_LOOP_CONFIGURE, _LOOP_CLR_FD, _LOOP_SET_STATUS64, _LOOP_GET_STATUS64 = 0x4C0A, 0x4C01, 0x4C04, 0x4C05
_LOOP_SET_CAPACITY: Final = 0x4C07
_LOOP_CTL_ADD, _LOOP_CTL_REMOVE = 0x4C80, 0x4C81
_BLKFLSBUF, _BLKRASET = 0x1261, 0x1262
_READ_AHEAD: Final = 512 << 10
"""Bytes that the kernel reads ahead of who reads a device, or a file on it, from its page cache in order. Each such
request wakes three threads, whatever its size: with the kernel's own 128 KiB that is much of its time. Not more, as
a page fault in mapped memory reads so much around it, wanted or not."""
_LO_READ_ONLY, _LO_AUTOCLEAR, _LO_DIRECT_IO = 1, 4, 16
_LOOP_INFO = struct.Struct("=QQQQQIIII64s64s32sQQ")
"""struct loop_info64 of linux/loop.h, 232 bytes."""

_libc = ctypes.CDLL(None, use_errno=True)
Result = tuple[dict[str, Any], list[int]]


def _mount(source: str, target: str, fs_type: str, flags: int, data: str) -> None:
    if _libc.mount(source.encode(), os.fsencode(target), fs_type.encode(), ctypes.c_ulong(flags), data.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def _umount(target: str, flags: int) -> None:
    if _libc.umount2(os.fsencode(target), flags | _UMOUNT_NOFOLLOW):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def mount_fuse(request: dict[str, Any]) -> Result:
    """Mount FUSE on the regular file ``path`` for ``uid``/``gid`` and return the connection's descriptor.

    nosuid, nodev and noexec whoever asks: mode and owner of the root inode come from the volume process, and a
    compromised one must not be able to serve a setuid file.
    """
    path, uid, gid, read_only = request["path"], request["uid"], request["gid"], request["read_only"]
    if os.geteuid() != 0:
        return {}, [_fusermount(path, read_only)]
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise HostUnsupported(
            reason=f"/dev/fuse cannot be opened ({exc.strerror})",
            remedy="Load the module: modprobe fuse. In a container, pass the device: --device /dev/fuse.",
        ) from exc
    if os.fstat(fuse).st_rdev != os.makedev(10, 229):
        os.close(fuse)
        raise HostUnsupported(
            reason="/dev/fuse is another device",
            remedy="It must be the character device 10:229: mknod /dev/fuse c 10 229.",
        )
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | (_MS_RDONLY if read_only else 0)
    options = f"fd={fuse},rootmode=100600,user_id={uid},group_id={gid},allow_other,default_permissions"
    try:
        _mount("ebsd", path, "fuse.ebsd", flags, options)
    except OSError as exc:
        os.close(fuse)
        raise HostUnsupported(
            reason=f"The block file cannot be mounted ({exc.strerror})",
            remedy="ebsd run by root needs CAP_SYS_ADMIN for mount(2).",
        ) from exc
    return {}, [fuse]


def _fusermount(path: str, read_only: bool) -> int:
    """Mount through the setuid helper of FUSE, which passes the connection back over _FUSE_COMMFD."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    options = "nosuid,nodev,noexec,default_permissions,fsname=ebsd,subtype=ebsd" + (",ro" if read_only else "")
    with ours, theirs:
        try:
            done = subprocess.run(
                ["fusermount3", "-o", options, "--", path],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
        except FileNotFoundError as exc:
            raise HostUnsupported(
                reason="fusermount3 is not installed", remedy="Install it: apt-get install fuse3."
            ) from exc
        if done.returncode != 0:
            raise HostUnsupported(
                reason=f"fusermount3 cannot mount the block file: {done.stderr.strip() or done.returncode}",
                remedy="fusermount3 wants a name for your uid: add it to the user database (/etc/passwd)."
                if "username" in done.stderr
                else "/dev/fuse must exist and be readable and writable for you (mode 0666 on most systems).",
            )
        fds = array.array("i")
        _data, ancillary, _flags, _address = ours.recvmsg(16, socket.CMSG_SPACE(fds.itemsize))
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: fds.itemsize])
        os.set_inheritable(fds[0], False)
        return fds[0]


def unmount_fuse(request: dict[str, Any]) -> Result:
    """Unmount the block file ``path``; ``force`` aborts its connection first and detaches lazily.

    Raises VolumeBusy while somebody has the block file open. Succeeds when nothing is mounted there.
    """
    path, force = request["path"], request["force"]
    if not _is_mounted(path):
        return {}, []
    if os.geteuid() != 0:
        done = subprocess.run(
            ["fusermount3", "-u", *(["-z"] if force else []), "--", path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0 and _is_mounted(path):
            raise VolumeBusy(volume=request["volume"], reason="its block file is open", path=path)
        return {}, []
    try:
        if force:
            with contextlib.suppress(OSError):
                _umount(path, _MNT_FORCE)  # aborts the connection, so that nothing waits for a dead server
            if _is_mounted(path):
                _umount(path, _MNT_DETACH)
        else:
            _umount(path, 0)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise VolumeBusy(volume=request["volume"], reason="its block file is open", path=path) from exc
        raise
    return {}, []


def _is_mounted(path: str) -> bool:
    return any(mount.mount_point == path for mount in _mounts())


def _mounts() -> list[Mount]:
    return parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))


def loop_attach(request: dict[str, Any]) -> Result:
    """Bind a fresh loop device to the block file ``path`` and answer its minor and size in bytes."""
    volume, path, read_only, avoid = request["volume"], request["path"], request["read_only"], set(request["avoid"])
    discard = request.get("discard", False)  # an ebsd of a version without it has volume processes without it
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise HostUnsupported(
            reason=f"/dev/loop-control cannot be opened ({exc.strerror})",
            remedy="Load the module (modprobe loop), or attach the block file alone: ebsctl attach --file.",
        ) from exc
    try:
        minor = _add_minor(control, avoid)
        try:
            _bind(minor, path, volume, read_only, discard=discard)
        except BaseException:
            fcntl.ioctl(control, _LOOP_CTL_REMOVE, minor)
            raise
    finally:
        os.close(control)
    return {"minor": minor, "device": f"/dev/loop{minor}", "device_number": f"{LOOP_MAJOR}:{minor}"}, []


def _add_minor(control: int, avoid: set[int]) -> int:
    for minor in range(FIRST_MINOR, LAST_MINOR + 1):
        if minor in avoid:
            continue
        try:
            return fcntl.ioctl(control, _LOOP_CTL_ADD, minor)
        except OSError as exc:
            if exc.errno != errno.EEXIST:
                raise
    raise HostUnsupported(
        reason=f"All loop devices from {FIRST_MINOR} to {LAST_MINOR} are in use", remedy="Detach some volumes."
    )


def _bind(minor: int, path: str, volume: str, read_only: bool, *, discard: bool) -> None:
    node = Path(f"/dev/loop{minor}")
    # In a container /dev is a plain tmpfs, where nobody makes the node.
    with contextlib.suppress(FileExistsError):
        os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(LOOP_MAJOR, minor))
    device = os.open(node, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(device).st_rdev != os.makedev(LOOP_MAJOR, minor):
            raise HostUnsupported(reason=f"{node} is another device", remedy=f"Remove {node}.")
        os.fchown(device, 0, 0)
        os.fchmod(device, 0o600)
        backing = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            flags = _LO_DIRECT_IO | (_LO_READ_ONLY if read_only else 0)
            info = _LOOP_INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, f"ebsd:{volume}".encode(), b"", b"", 0, 0)
            fcntl.ioctl(device, _LOOP_CONFIGURE, bytearray(struct.pack("=II", backing, SECTOR) + info + bytes(64)))
        finally:
            os.close(backing)
        if not discard:
            _disable_discard(minor)
        fcntl.ioctl(device, _BLKRASET, _READ_AHEAD // 512)  # last: whatever changes limits of the queue resets it
    finally:
        os.close(device)


def _disable_discard(minor: int) -> None:
    """Turn discard off: pyfuse3 has no fallocate, and the kernel reports the first discard as done all the same."""
    setting = Path(f"/sys/block/loop{minor}/queue/discard_max_bytes")
    try:
        setting.write_text("0")
    except OSError as exc:
        print(f"discard stays on for loop{minor}: {exc.strerror}", file=sys.stderr)  # noqa: T201


def loop_detach(request: dict[str, Any]) -> Result:
    """Flush and release the loop device ``minor`` of ``volume``; raises VolumeBusy while anybody uses it.

    Raises WritesLackedSpace or WritesFailed, and changes nothing, when something cannot be written out.

    Answers ``removed``: false when somebody still has a forced one open, whose number stays, empty after their close.

    The O_EXCL open finds mounts in every namespace; LOOP_CLR_FD on a mounted device would succeed and only arm
    the kernel's auto-clear, a one-way door. With ``force`` that is done all the same, and users get errors.
    ``dead`` says that nobody serves the block file any more, so that flushing to it could only fail.
    """
    minor, volume, force, dead = request["minor"], request["volume"], request["force"], request["dead"]
    node = f"/dev/loop{minor}"
    if _is_of_somebody_else(node, volume):
        # Ours is gone, and the number has another owner: ebsd died between the two.
        return {"removed": True}, []
    try:
        device = os.open(node, os.O_RDONLY | os.O_CLOEXEC | (0 if force else os.O_EXCL))
    except FileNotFoundError:
        return {"removed": True}, []
    except OSError as exc:
        if exc.errno in (errno.ENXIO, errno.ENODEV):
            return _remove_minor(minor, volume, force)
        if exc.errno == errno.EBUSY:
            raise VolumeBusy(volume=volume, reason=_users(minor), path=node) from exc
        raise
    try:
        bound_to = _bound_name(device)
        if bound_to is not None and bound_to != f"ebsd:{volume}":
            raise HostUnsupported(reason=f"{node} is not the device of {volume}", remedy="Nothing was changed.")
        if bound_to is not None:
            if not (force or dead):
                _flush(device, volume)
                fcntl.ioctl(device, _BLKFLSBUF, 0)
            fcntl.ioctl(device, _LOOP_CLR_FD, 0)
            if not force and _still_bound(device):
                _stay_bound(device)
                raise VolumeBusy(volume=volume, reason=_users(minor), path=node)
    finally:
        os.close(device)
    return _remove_minor(minor, volume, force)


def _flush(device: int, volume: str) -> None:
    """Write out what is cached of the device; also tells once of what could not be written since it was opened.

    Raises WritesLackedSpace, WritesFailed.
    """
    try:
        os.fsync(device)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WritesLackedSpace(volume=volume) from exc
        raise WritesFailed(volume=volume, reason=exc.strerror or str(exc)) from exc


def _is_of_somebody_else(node: str, volume: str) -> bool:
    """Say whether the device is bound, and not for this volume. Opened without O_EXCL, so its users do not matter."""
    try:
        probe = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False  # absent or unbound: the caller's open says which
    try:
        return _bound_name(probe) not in (None, f"ebsd:{volume}")
    finally:
        os.close(probe)


def show_size(request: dict[str, Any]) -> Result:
    """Make the kernel ask for the block file's size, then have the loop device, if any, take it over."""
    _await_size(request["path"])
    if request["minor"] is None:
        return {}, []
    device = os.open(f"/dev/loop{request['minor']}", os.O_RDWR | os.O_CLOEXEC)
    try:
        if _bound_name(device) != f"ebsd:{request['volume']}":
            raise HostUnsupported(reason="The loop device is not that of the volume", remedy="Nothing was changed.")
        fcntl.ioctl(device, _LOOP_SET_CAPACITY, 0)
    finally:
        os.close(device)
    return {}, []


def _await_size(path: str) -> None:
    """Return when the inode of the block file has the size that stat(2) is answered with.

    The kernel drops what it was answered when a write ended meanwhile (fuse_change_attributes), but for the one who
    asked: the loop device would get the new size, the file beneath it keep the old one, and fail what lies behind it.
    Raises TimeoutError.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + SIZE_SECONDS
        while os.lseek(file, 0, os.SEEK_END) != os.fstat(file).st_size:
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "the kernel does not take the new size over", path)
    finally:
        os.close(file)


def _still_bound(device: int) -> bool:
    """Say whether somebody else has the cleared device open; a prober gets a second to go away.

    LOOP_CLR_FD takes the binding away at once from a sole opener; else it only arms auto-clear for the last close.
    """
    deadline = time.monotonic() + 1
    while _bound_name(device) is not None:
        if time.monotonic() > deadline:
            return True
        time.sleep(0.02)
        with contextlib.suppress(OSError):
            fcntl.ioctl(device, _LOOP_CLR_FD, 0)
    return False


def _stay_bound(device: int) -> None:
    """Disarm auto-clear again, so that the device outlives the close of whoever has it open."""
    info = bytearray(_LOOP_INFO.size)
    fcntl.ioctl(device, _LOOP_GET_STATUS64, info)
    fields = list(_LOOP_INFO.unpack(info))
    fields[8] &= ~_LO_AUTOCLEAR
    fcntl.ioctl(device, _LOOP_SET_STATUS64, bytearray(_LOOP_INFO.pack(*fields)))


def _bound_name(device: int) -> str | None:
    info = bytearray(_LOOP_INFO.size)
    try:
        fcntl.ioctl(device, _LOOP_GET_STATUS64, info)
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            return None
        raise
    return bytes(_LOOP_INFO.unpack(info)[9]).rstrip(b"\0").decode(errors="replace")


def _remove_minor(minor: int, volume: str, force: bool) -> Result:
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + 3
        while True:
            try:
                fcntl.ioctl(control, _LOOP_CTL_REMOVE, minor)
                break
            except OSError as exc:
                if exc.errno == errno.ENODEV:
                    break
                if force:
                    # Somebody still has it open. It reads errors from now on, and the kernel clears it at their close.
                    print(f"loop{minor} stays until its last user closes it", file=sys.stderr)  # noqa: T201
                    return {"removed": False}, []
                # The kernel clears the binding at the last close, which may be a prober's; wait a little.
                if exc.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise VolumeBusy(volume=volume, reason=_users(minor), path=f"/dev/loop{minor}") from exc
                time.sleep(0.02)
    finally:
        os.close(control)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"/dev/loop{minor}")  # only where no devtmpfs does it
    return {"removed": True}, []


def _users(minor: int) -> str:
    mounts = mounts_of_device(_mounts(), f"/dev/loop{minor}", f"{LOOP_MAJOR}:{minor}")
    if mounts:
        return "it is mounted on " + ", ".join(m.mount_point for m in mounts)
    return "a process has the device open, or it is mounted in another mount namespace"


def make_links(request: dict[str, Any]) -> Result:
    """Make the links in /dev/ebsd named in ``links`` to ``device``; one that leads elsewhere alive is left alone.

    Where udev runs it makes them, too, and units wait for devices by the links that it knows.
    """
    _tell_udev(request["device"], request["links"])
    for name in request["links"]:
        link = LINKS / name
        for directory in (LINKS, link.parent):
            directory.mkdir(exist_ok=True)
            directory.chmod(0o755)  # the links are no secret, whatever the umask
        if link.is_symlink() and not link.exists():
            link.unlink()
        with contextlib.suppress(FileExistsError):
            link.symlink_to(request["device"])
    return {}, []


def remove_links(request: dict[str, Any]) -> Result:
    """Remove all links that lead to ``device``, also under names the volume once had, and directories left empty."""
    _tell_udev(request["device"], [])
    for link in (*LINKS.glob("*"), *(LINKS / "unencrypted").glob("*")):
        if link.is_symlink() and os.readlink(link) == request["device"]:
            link.unlink()
    for directory in (LINKS / "unencrypted", LINKS):
        with contextlib.suppress(OSError):
            directory.rmdir()
    return {}, []


def _tell_udev(device: str, links: list[str]) -> None:
    """Have udev know the links of a device, and wait until it has nothing to do; without udev nothing happens."""
    if not (UDEV / "control").exists():
        return
    name = Path(device).name
    note = UDEV_NOTES / name
    if links:
        UDEV_NOTES.mkdir(mode=0o755, exist_ok=True)
        note.write_text("".join(f'EBSD_LINK_{number}="ebsd/{link}"\n' for number, link in enumerate(links, 1)))
    else:
        note.unlink(missing_ok=True)
    event = Path(f"/sys/block/{name}/uevent")
    if event.exists():
        event.write_text("change")
    # What was still to be done for an earlier device of this number would take our links away.
    deadline = time.monotonic() + UDEV_PATIENCE
    while (UDEV / "queue").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def mount_tmpfs(request: dict[str, Any]) -> Result:
    """Mount a tmpfs, mode 0700, on the directory ``path``: live maps must not survive a reboot."""
    _mount("ebsd", request["path"], "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "mode=0700,size=50%")
    return {}, []


def unmount_tmpfs(request: dict[str, Any]) -> Result:
    """Unmount the tmpfs of live maps again."""
    _umount(request["path"], 0)
    return {}, []


OPERATIONS: Final[dict[str, Callable[[dict[str, Any]], Result]]] = {
    "mount_fuse": mount_fuse,
    "unmount_fuse": unmount_fuse,
    "loop_attach": loop_attach,
    "loop_detach": loop_detach,
    "show_size": show_size,
    "make_links": make_links,
    "remove_links": remove_links,
    "mount_tmpfs": mount_tmpfs,
    "unmount_tmpfs": unmount_tmpfs,
}


def _handler(name: str, operation: Callable[[dict[str, Any]], Result]) -> BlockingHandler:
    """Return the operation as a handler; an unexpected OSError becomes HostUnsupported with its text."""

    def perform(params: dict[str, Any], fds: list[int]) -> Result:
        try:
            return operation(params)
        except OSError as exc:
            raise HostUnsupported(
                reason=f"{name.replace('_', ' ')} failed: {exc}",
                remedy="`ebsctl doctor` checks what the host must have.",
            ) from exc

    return perform


def main() -> None:
    """Serve the requests on descriptor 0."""
    confinement.begin(logging.getLogger("ebsd-host"), Kind.HELPER)
    channel, handlers = BlockingChannel.of_descriptor(), {name: _handler(name, run) for name, run in OPERATIONS.items()}
    while channel.serve_one(handlers):
        pass


if __name__ == "__main__":
    main()
