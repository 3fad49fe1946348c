"""What ``ebsctl doctor`` looks at by itself, so that it has something to say when ebsd does not run.

Each check returns a finding in the shape of io.ebsd.Control's Finding. Where ebsd answers, its finding
replaces the local one of the same name: it knows the host from where it stands.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Any, Final

from ebsctl.client import Client
from ebsctl.mounting import FILE_SYSTEMS, PACKAGE_OF, Programs
from ebsd.domain.errors import EbsdError

Finding = dict[str, Any]
"""Check, Level (ok, note, warning, failure), Message, and Fix or None."""

OLDEST_KERNEL: Final = (5, 10)
"""Debian 11's; nothing older was tried."""

RESENDING_KERNEL: Final = (6, 9)
"""The first whose FUSE gives an unanswered request again to whoever takes the connection over."""


def finding(check: str, level: str, message: str, fix: str | None = None) -> Finding:
    return {"Check": check, "Level": level, "Message": message, "Fix": fix}


def examine(client: Client, programs: Programs, uid: int) -> list[Finding]:
    """Return all findings: the sockets, this host, and what ebsd says of itself."""
    remote, findings = ask_ebsd(client)
    findings.append(check_keys_socket(client))
    if findings[-1]["Level"] == "ok":  # else each question would wait as long again
        findings += check_audit_log(client)
    findings.append(check_fuse("/dev/fuse"))
    if uid != 0:
        findings.append(check_fusermount(programs))
    findings += [
        check_loop_control("/dev/loop-control", uid),
        check_file_systems(programs),
        check_cpu(_text_of("/proc/cpuinfo")),
        check_kernel(os.uname().release),
    ]
    told = {item["Check"] for item in remote}
    return [item for item in findings if item["Check"] not in told] + remote


def ask_ebsd(client: Client) -> tuple[list[Finding], list[Finding]]:
    """Return (ebsd's own findings, the finding whether it answers)."""
    try:
        remote = client.control("Doctor")["Findings"]
    except EbsdError as error:
        return [], [finding("ebsd.sock", "failure", error.message, error.hint or None)]
    return remote, [finding("ebsd.sock", "ok", f"ebsd answers on {client.path}")]


def check_keys_socket(client: Client) -> Finding:
    try:
        status = client.key_service("GetStatus")
    except EbsdError as error:
        fix = "Start ebsd, which starts its key service, or ebsd-kms where it is a service of its own."
        return finding("keys.sock", "failure", error.message, fix)
    if status["State"] != "running":
        message = f"The key service is in state {status['State']}: {status.get('Reason') or 'no reason given'}"
        fix = "Put the root key back where it was, or restore the keys: ebsctl key restore FILE"
        if status["State"] == "locked":
            fix = "Unlock it: ebsctl key unlock"
        return finding("keys.sock", "failure", message, fix)
    return finding("keys.sock", "ok", f"the key service answers on {client.keys_path}")


def check_audit_log(client: Client) -> list[Finding]:
    """Say whether the log's verification key still lies beside it; nothing to users who may not know."""
    try:
        present = client.audit("GetLog")["VerificationKeyPresent"]
    except EbsdError:
        return []
    if present:
        message = "The audit log's verification key lies on this host, so root can rewrite the log's past"
        return [finding("audit log", "note", message, "ebsctl audit --take-key FILE, and keep FILE elsewhere")]
    return [finding("audit log", "ok", "the audit log's verification key is not on this host")]


def check_fuse(path: str) -> Finding:
    """Opening it makes an unconnected FUSE descriptor, which goes away with it."""
    problem = _why_not_openable(path)
    if problem is None:
        return finding("/dev/fuse", "ok", f"{path} can be opened")
    if problem == errno.ENOENT:
        fix = "modprobe fuse; in a container, pass the device: docker run --device /dev/fuse ..."
        return finding("/dev/fuse", "failure", f"{path} does not exist", fix)
    message = f"{path} cannot be opened: {os.strerror(problem)}"
    return finding("/dev/fuse", "warning", message, "An ebsd that runs as you cannot attach volumes: let root run it.")


def check_loop_control(path: str, uid: int) -> Finding:
    problem = _why_not_openable(path)
    if problem is None:
        return finding("loop devices", "ok", f"{path} can be opened")
    if problem == errno.ENOENT:
        fix = "modprobe loop; in a container, pass /dev/loop-control and the loop devices"
        return finding(
            "loop devices", "warning", f"{path} does not exist: volumes can be attached with --file only", fix
        )
    if uid != 0:
        return finding("loop devices", "note", "Loop devices are for root; use `ebsctl attach --file`")
    message = f"{path} cannot be opened: {os.strerror(problem)}; volumes can be attached with --file only"
    return finding("loop devices", "warning", message, "Run ebsd where root has CAP_SYS_ADMIN and its devices.")


def check_fusermount(programs: Programs) -> Finding:
    if programs.is_installed("fusermount3"):
        return finding("fusermount3", "ok", "fusermount3 is installed")
    message = "fusermount3 is not installed: an ebsd that runs as you cannot attach volumes"
    return finding("fusermount3", "warning", message, "apt install fuse3")


def check_file_systems(programs: Programs) -> Finding:
    missing = [f"mkfs.{name}" for name in FILE_SYSTEMS if not programs.is_installed(f"mkfs.{name}")]
    if not missing:
        return finding("mkfs", "ok", f"mkfs for {', '.join(FILE_SYSTEMS)} is installed")
    packages = " ".join(PACKAGE_OF[program] for program in missing)
    return finding(
        "mkfs", "note", f"{', '.join(missing)} not installed, for `attach --mkfs`", f"apt install {packages}"
    )


def check_cpu(cpuinfo: str) -> Finding:
    """Look for the AES instructions in the text of /proc/cpuinfo (x86 ``flags``, ARM ``Features``)."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features") and "aes" in value.split():
            return finding("AES instructions", "ok", "the processor has AES instructions")
    return finding(
        "AES instructions", "warning", "The processor has no AES instructions: encryption is slow and costs CPU time"
    )


def check_kernel(release: str) -> Finding:
    """Compare a kernel release such as ``6.1.0-18-amd64`` with OLDEST_KERNEL."""
    oldest = ".".join(str(part) for part in OLDEST_KERNEL)
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None:
        return finding("kernel", "note", f"Linux {release}: the version cannot be compared with {oldest}")
    if (int(match[1]), int(match[2])) < OLDEST_KERNEL:
        return finding("kernel", "warning", f"Linux {release} is older than {oldest}", "Use a newer kernel.")
    if (int(match[1]), int(match[2])) < RESENDING_KERNEL:
        message = f"Linux {release}: the device of a volume process that dies gives errors until it is attached again"
        return finding("kernel", "note", message, "Linux 6.9 or newer can hand unanswered requests to another process.")
    return finding("kernel", "ok", f"Linux {release}")


def _why_not_openable(path: str) -> int | None:
    """Return the errno of opening a device for reading and writing, None when it works."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return exc.errno or errno.EIO
    return None


def _text_of(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
