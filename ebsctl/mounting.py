"""File systems on attached devices: mkfs, mount, umount and growing, with the caller's rights.

1. Choosing is pure; only ``Programs`` and ``read_mounts`` touch the host.
2. Only a mount that is of this device *and* stands where ``ebsctl`` recorded it is ever ended: a path alone
   may by now name somebody else's mount.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from typing import Final

from ebsd.domain.errors import (
    CommandFailed,
    EbsdError,
    HostUnsupported,
    IncorrectState,
    InvalidParameterValue,
    VolumeBusy,
)
from ebsd.domain.mountinfo import Mount, mounts_of_device, parse_mountinfo

FILE_SYSTEMS: Final = ("ext4", "xfs", "btrfs")

PACKAGE_OF: Final = {
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "e2fsck": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "xfs_growfs": "xfsprogs",
    "btrfs": "btrfs-progs",
    "mount": "mount",
    "sync": "coreutils",
    "umount": "mount",
    "blkid": "util-linux",
    "qemu-img": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "systemctl": "systemd",
}
"""Program -> Debian package that has it."""

_FITRIM: Final = 0xC0185879

# A plain user's PATH lacks the directories of mkfs and blkid on Debian.
_SYSTEM_PATH: Final = "/usr/sbin:/sbin:/usr/bin:/bin"


def mounts_to_end(
    mounts: Iterable[Mount], *, device_number: str | None, device: str | None, recorded: str | None
) -> list[Mount]:
    """Return the mounts of this device at the recorded mount point, the topmost first.

    ``device_number`` is the attachment's ``major:minor``. btrfs shows an anonymous number instead, so there
    the source must be the path ``device``.
    """
    if recorded is None or device_number is None:
        return []
    found = mounts_of_device(mounts, device, device_number)
    return [mount for mount in found if mount.mount_point == recorded][::-1]


def is_mount_point(mounts: Iterable[Mount], path: str) -> bool:
    """Say whether something is mounted at the absolute path."""
    return any(mount.mount_point == path for mount in mounts)


def mkfs_command(file_system: str, path: str, *, regular_file: bool) -> list[str]:
    """Return the command that makes a file system.

    No -f for xfs and btrfs: the volume is blank, and should it not be, they refuse. mkfs.ext4 needs -F to
    take a regular file at all.
    """
    force = ["-F"] if file_system == "ext4" and regular_file else []
    return [f"mkfs.{file_system}", "-q", *force, path]


def mount_command(file_system: str, device: str, directory: str, *, read_only: bool) -> list[str]:
    """Return the mount(8) command. XFS refuses a second file system of the same UUID, which a restored snapshot is."""
    options = [*(["ro"] if read_only else []), *(["nouuid"] if file_system == "xfs" else [])]
    return ["mount", "-t", file_system, *(["-o", ",".join(options)] if options else []), device, directory]


def usable_mount(mounts: Iterable[Mount], *, device: str, device_number: str) -> Mount | None:
    """Return a mount of this device whose mount point is not covered by a later one, None when there is none."""
    known = list(mounts)
    uppermost = {mount.mount_point: mount for mount in known}
    found = mounts_of_device(known, device, device_number)
    return next((mount for mount in found if uppermost[mount.mount_point] == mount), None)


def growth_commands(file_system: str, device: str, mount_point: str | None) -> list[list[str]]:
    """Return the commands that let a file system fill its device; none when it must be mounted for that.

    An ext4 that is not mounted is checked first: resize2fs refuses one that was not (resize2fs(8)).
    """
    if file_system == "ext4":
        grow = ["resize2fs", device]
        return [grow] if mount_point is not None else [["e2fsck", "-f", "-p", device], grow]
    if mount_point is None:
        return []
    return [
        ["xfs_growfs", mount_point] if file_system == "xfs" else ["btrfs", "filesystem", "resize", "max", mount_point]
    ]


def read_mounts(path: str = "/proc/self/mountinfo") -> list[Mount]:
    """Return the mounts this process sees."""
    # surrogateescape: a path may have any bytes, and must come out as os.path gives it.
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return parse_mountinfo(file.read())


class Programs:
    """The host's mkfs, mount, umount, blkid and the like, run with the caller's rights and their output captured."""

    def __init__(self, path: str | None = None) -> None:
        """Look programs up in ``path``, by default PATH and then the system's directories."""
        self._path = path or f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"

    def is_installed(self, program: str) -> bool:
        import shutil

        return shutil.which(program, path=self._path) is not None

    def require(self, program: str) -> str:
        """Return the path of a program, or raise HostUnsupported naming the package to install."""
        import shutil

        found = shutil.which(program, path=self._path)
        if found is None:
            remedy = f"Install it: apt install {PACKAGE_OF[program]}"
            raise HostUnsupported(reason=f"The program {program} is not installed", remedy=remedy)
        return found

    def mount(self, command: Sequence[str]) -> None:
        """Run a mount command, on the very directory that its last word names now.

        Who owns a directory above it could put a symbolic link there before mount(8) looks, and have root mount over
        /etc: so the directory is opened, seen to be at that path, and named by its descriptor. Raises as ``run``, and
        InvalidParameterValue when the path leads elsewhere.
        """
        *words, target = command
        try:
            fd = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as exc:
            raise InvalidParameterValue(value=target, parameter="--mount", reason=exc.strerror) from exc
        try:
            place = f"/proc/self/fd/{fd}"
            if os.readlink(place) != target:
                raise InvalidParameterValue(value=target, parameter="--mount", reason="it leads elsewhere by now")
            self.run([words[0], "--no-canonicalize", *words[1:], place], pass_fds=(fd,))
        finally:
            os.close(fd)

    def run(self, command: Sequence[str], pass_fds: Sequence[int] = ()) -> str:
        """Run a command to its end and return what it wrote to standard output.

        Raises CommandFailed with everything it wrote when its exit status is not 0, HostUnsupported when it
        is not installed.
        """
        import subprocess  # 10 ms that most commands need not spend

        program = self.require(command[0])
        # LC_ALL: the output is read for "busy" below.
        environment = {**os.environ, "LC_ALL": "C", "PATH": self._path}
        result = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            pass_fds=pass_fds,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
        if result.returncode != 0:
            output = " ".join((result.stderr + result.stdout).split()) or "it printed nothing"
            raise CommandFailed(command=" ".join(command), status=result.returncode, output=output)
        return result.stdout

    def file_system_of(self, device: str) -> str | None:
        """Return which of FILE_SYSTEMS the device holds, None for anything else."""
        try:
            found = self.run(["blkid", "-p", "-o", "value", "-s", "TYPE", device]).strip()
        except CommandFailed as error:
            if error.facts["status"] == 2:  # blkid(8): nothing was found
                return None
            raise
        return found if found in FILE_SYSTEMS else None

    def check_ext4(self, command: Sequence[str]) -> None:
        """Run e2fsck; that it mended something (its exit status 1) is no failure."""
        try:
            self.run(command)
        except CommandFailed as error:
            if error.facts["status"] != 1:
                raise

    def trim(self, mount_point: str) -> int:
        """Have the file system mounted there discard all that it does not use; returns how many bytes it discarded.

        Raises IncorrectState when it, or its device, does not discard; CommandFailed; OSError.
        """
        import fcntl
        import struct

        self.run(["sync", "-f", mount_point])  # what was deleted a moment ago is not free before
        directory = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            wanted = bytearray(struct.pack("=QQQ", 0, 2**64 - 1, 0))  # struct fstrim_range of linux/fs.h
            fcntl.ioctl(directory, _FITRIM, wanted)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
                raise IncorrectState(reason=f"{mount_point} cannot be trimmed: {error.strerror}") from error
            raise
        finally:
            os.close(directory)
        trimmed: int = struct.unpack("=QQQ", wanted)[1]
        return trimmed

    def unmount(self, volume: str, mount_point: str, *, lazily: bool = False) -> None:
        """Unmount; raises VolumeBusy when something uses it, CommandFailed for other failures."""
        try:
            self.run(["umount", *(["-l"] if lazily else []), mount_point])
        except CommandFailed as error:
            if "busy" not in str(error.facts["output"]):
                raise
            raise VolumeBusy(volume=volume, reason=f"{mount_point} is in use", path=mount_point) from error


def with_more_hint(error: EbsdError, text: str) -> EbsdError:
    """Add a sentence to the hint of an error and return it."""
    error.hint = f"{error.hint} {text}".strip()
    return error
