"""Files that volumes are imported from and exported to, opened with the caller's rights; and qemu's programs for
formats other than raw.

1. ebsd gets descriptors and opens nothing. What qemu opens, it opens as the caller, too.
2. An image of another format may name further files: a backing file, a data file, extents. Whoever made the image chose
   them, so they are refused: an import would read what the importer may read and the maker may not.
3. A new file has no name before it is whole (O_TMPFILE), so what was cut leaves nothing. Where the file system has no
   such files, its name says that it is partial. It is readable by its owner alone: it is not encrypted.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ebsctl.app import App, UsageFailure
from ebsd.domain.errors import CommandFailed, ImageUnusable, OutputExists, Timeout

if TYPE_CHECKING:
    import subprocess

RAW: Final = "raw"
AUTO: Final = "auto"
FORMATS: Final = (RAW, "qcow2", "vmdk", "vdi", "vhdx")
STREAM: Final = "-"

SERVE_SECONDS: Final = 20.0
"""How long qemu-nbd may take until it serves, and until it has ended."""

_MAGICS: Final = {
    (0, b"QFI\xfb"): "qcow2",
    (0, b"KDMV"): "vmdk",
    (0, b"# Disk DescriptorFile"): "vmdk",
    (0, b"vhdxfile"): "vhdx",
    (0x40, b"\x7f\x10\xda\xbe"): "vdi",
}
"""(offset, bytes) -> the format of an image that has them there."""


@dataclass(slots=True)
class Image:
    """An open image: what is passed to ebsd."""

    fds: list[int]
    """The image, and a connection to what serves it where it is not raw."""
    form: str
    size: int | None = None
    """Bytes that a served image holds."""
    server: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())

    def end_server(self) -> None:
        """End what serves it, if it has not ended: by itself it does so only after somebody has negotiated with it."""
        if self.server is not None and self.server.poll() is None:
            self.server.kill()
            self.server.wait()


def form_of(head: bytes) -> str:
    """Return the format of an image by its first bytes; what is none of the known ones is raw."""
    return next((form for (at, magic), form in _MAGICS.items() if head[at:].startswith(magic)), RAW)


# --- import


def open_image(app: App, name: str, form: str) -> Image:
    """Open an image to import; ``form`` is one of FORMATS or AUTO. Raises ImageUnusable, UsageFailure, OSError."""
    if name == STREAM:
        return _open_input(form)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as exc:
        raise ImageUnusable(reason=f"{name} cannot be opened: {exc.strerror}", remedy="") from exc
    image = Image([fd], RAW)
    try:
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        found = form_of(os.pread(fd, 512, 0)) if regular else RAW
        image.form = found if form == AUTO else form
        if form == AUTO and found != RAW:
            app.note(f"note: {name} is taken for a {found} image; --format raw imports it as it is")
        if image.form != RAW:
            if not regular:
                raise ImageUnusable(reason=f"a {image.form} image must be a regular file", remedy="")
            _serve_image(app, image, name)
    except BaseException:
        image.close()
        image.end_server()
        raise
    return image


def _open_input(form: str) -> Image:
    if form not in (RAW, AUTO):
        raise UsageFailure(f"A stream cannot be {form}.", "Such an image is read in any order; name a file.")
    if os.isatty(0):
        raise UsageFailure("Standard input is a terminal.", "Send the image into a pipe, or name a file.")
    with contextlib.suppress(OSError):
        if os.lseek(0, 0, os.SEEK_CUR):
            raise UsageFailure("A part of standard input was read already.", "Name the file instead of -.")
    return Image([os.dup(0)], RAW)


def _serve_image(app: App, image: Image, name: str) -> None:
    """Look at an image with qemu-img, and have qemu-nbd serve it: this file, whatever its name stands for by now."""
    path = _plain_path(image.fds[0])
    info = describe_image(app, path, image.form, name)
    image.size = int(info["virtual-size"])
    layers: dict[str, Any] = {"driver": image.form, "file": {"driver": "file", "filename": path}}
    if image.form == "qcow2":
        layers["backing"] = None
    _serve(app, image, ["--read-only", f"json:{json.dumps(layers)}"])


def _plain_path(fd: int) -> str:
    """Return a path that names what is open, without characters that qemu gives a meaning."""
    return f"/proc/{os.getpid()}/fd/{fd}"


def describe_image(app: App, path: str, form: str, name: str) -> dict[str, Any]:
    """Return what qemu-img says of an image. Raises ImageUnusable when it needs other files, or is encrypted."""
    try:
        text = app.programs.run(["qemu-img", "info", "--output=json", "-U", "-f", form, path])
    except CommandFailed as exc:
        remedy = "`--format raw` imports a file as it is."
        raise ImageUnusable(
            reason=f"qemu-img does not know it as {form} ({exc.facts['output']})", remedy=remedy
        ) from exc
    info: dict[str, Any] = json.loads(text)
    if reason := needs_more(info, path):
        raise ImageUnusable(
            reason=reason,
            remedy="What it needs was chosen by whoever made it. If you trust that, convert it first: "
            f"qemu-img convert -O qcow2 {name} WHOLE.qcow2",
        )
    return info


def needs_more(info: dict[str, Any], path: str) -> str:
    """Return why an image is not whole by itself, or an empty text; ``info`` is what qemu-img info prints."""
    try:
        return _needs(info, path)
    except (AttributeError, TypeError):
        return "qemu-img describes it in a way that this version does not know"


def _needs(info: dict[str, Any], path: str) -> str:
    data = info.get("format-specific", {}).get("data", {})
    if info.get("backing-filename") or info.get("full-backing-filename"):
        return f"it has the backing file {info.get('backing-filename') or info['full-backing-filename']}"
    if data.get("data-file"):
        return f"its data are in the file {data['data-file']}"
    if info.get("encrypted") or data.get("encrypt"):
        return "it is encrypted"
    others = [extent.get("filename") for extent in data.get("extents", []) if extent.get("filename") != path]
    if others:
        return f"a part of it is in the file {others[0]}"
    return ""


def _serve(app: App, image: Image, arguments: list[str]) -> None:
    """Start qemu-nbd, connect to it, and take its socket's name away; it ends when the last of us hangs up."""
    import subprocess

    program = app.programs.require("qemu-nbd")
    directory = tempfile.mkdtemp(prefix="ebsctl-nbd-")
    path = f"{directory}/socket"
    try:
        image.server = subprocess.Popen(
            [program, "--socket", path, "--shared=1", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=image.fds,
            # Ctrl-C is for this command: what it does about the job comes first.
            start_new_session=True,
        )
        image.fds.append(_connected(image.server, path))
    except BaseException:
        if image.server is not None:
            image.server.kill()
            image.server.wait()
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.rmdir(directory)


def _connected(server: subprocess.Popen[bytes], path: str) -> int:
    deadline = time.monotonic() + SERVE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.connect(path)
            return sock.detach()
        if server.poll() is not None:
            break
        time.sleep(0.02)
    else:
        server.kill()
    said = server.stderr.read().decode(errors="replace") if server.stderr else ""
    raise ImageUnusable(reason=f"qemu-nbd does not serve it ({' '.join(said.split()) or 'it says nothing'})", remedy="")


# --- export


@dataclass(slots=True)
class Output:
    """Where an export goes: what is passed to ebsd, and how it gets its name."""

    image: Image
    path: str | None
    """The final name of a new file; None for a device or a stream."""
    partial: str | None
    """The name that it has until then, where it must have one."""

    def finish(self) -> None:
        """Wait for what serves it, and give the file its name; durable at return. Raises OSError, CommandFailed."""
        while len(self.image.fds) > 1:
            os.close(self.image.fds.pop())
        if self.image.server is not None:
            status = _ended(self.image.server)
            if status:
                said = self.image.server.stderr.read().decode(errors="replace") if self.image.server.stderr else ""
                raise CommandFailed(command="qemu-nbd", status=status, output=" ".join(said.split()))
        if self.path is None:
            return
        (fd,) = self.image.fds
        os.fsync(fd)
        opened = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if self.partial is None:
                self.partial = f"{self.path}.ebsd-partial-{os.getpid()}"
                # With a descriptor of the directory: only then does Python follow the link to what has no name.
                os.link(f"/proc/self/fd/{fd}", os.path.basename(self.partial), dst_dir_fd=opened)
            os.rename(self.partial, self.path)
            self.partial = None
            os.fsync(opened)
        finally:
            os.close(opened)

    def abandon(self) -> None:
        """Take away what there is of a file."""
        if self.partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.partial)
        if self.path is None and self.image.fds and stat.S_ISREG(os.fstat(self.image.fds[0]).st_mode):
            with contextlib.suppress(OSError):
                os.ftruncate(self.image.fds[0], 0)  # the shell made it; what it holds is no image
        self.image.end_server()


def _ended(server: subprocess.Popen[bytes]) -> int:
    """Wait until a server has ended; raises Timeout."""
    import subprocess

    try:
        return server.wait(timeout=SERVE_SECONDS)
    except subprocess.TimeoutExpired:
        raise Timeout(operation="qemu-nbd", seconds=f"{SERVE_SECONDS:g}") from None


@contextlib.contextmanager
def output(app: App, name: str, form: str, size: int, *, force: bool) -> Iterator[Output]:
    """Open where an export of ``size`` bytes goes; an exception of the body takes away what there is of a new file."""
    opened = _open_output(app, name, form, force=force)
    try:
        if form != RAW:
            _serve_new(app, opened, form, size)
        yield opened
    except BaseException:
        opened.abandon()
        raise
    finally:
        opened.image.close()
        if opened.image.server is not None:
            with contextlib.suppress(Exception):
                opened.image.server.wait(timeout=1)


def _open_output(app: App, name: str, form: str, *, force: bool) -> Output:
    if name == STREAM:
        if form != RAW:
            raise UsageFailure(f"A stream cannot be {form}.", "Such an image is written in any order; name a file.")
        if app.as_json:
            raise UsageFailure("--json cannot be used when the image goes to standard output.", "Name a file.")
        if sys.stdout is not None and os.isatty(1):
            raise UsageFailure("Standard output is a terminal.", "Send the image into a pipe, or name a file.")
        return Output(Image([os.dup(1)], RAW), None, None)
    path = os.path.realpath(name)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        status = None
    except OSError as exc:
        raise ImageUnusable(reason=f"{name} cannot be written: {exc.strerror}", remedy="") from exc
    if status is not None and stat.S_ISBLK(status.st_mode):
        return _open_device(name, form, force=force)
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise ImageUnusable(reason=f"{name} is neither a file nor a block device", remedy="Name a new file.")
    if status is not None and not force:
        raise OutputExists(file=name)
    return _new_file(path, form)


def _open_device(name: str, form: str, *, force: bool) -> Output:
    if form != RAW:
        raise UsageFailure(f"A device cannot be {form}.", "Only raw images go to a device.")
    if not force:
        raise OutputExists(file=name)
    try:
        # O_EXCL: not a device that is mounted, or used by another device.
        return Output(Image([os.open(name, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)], RAW), None, None)
    except OSError as exc:
        raise ImageUnusable(reason=f"{name} cannot be written: {exc.strerror}", remedy="") from exc


def _new_file(path: str, form: str) -> Output:
    directory = os.path.dirname(path)
    try:
        with contextlib.suppress(OSError):
            fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            return Output(Image([fd], form), path, None)
        partial = f"{path}.ebsd-partial-{os.getpid()}"
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return Output(Image([fd], form), path, partial)
    except OSError as exc:
        raise ImageUnusable(reason=f"{path} cannot be made: {exc.strerror}", remedy="") from exc


def _serve_new(app: App, opened: Output, form: str, size: int) -> None:
    place = _plain_path(opened.image.fds[0])
    app.programs.run(["qemu-img", "create", "-q", "-f", form, place, str(size)])
    layers = {"driver": form, "discard": "unmap", "file": {"driver": "file", "filename": place}}
    _serve(app, opened.image, [f"json:{json.dumps(layers)}"])
