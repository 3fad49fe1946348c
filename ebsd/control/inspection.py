"""Status and doctor: what runs, what is wrong with the host or the installation, and what to do about it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import trio

from ebsd import __version__
from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.filesystems import MAGIC_REFUSED, MAGIC_WARNED, TMPFS_MAGIC, magic_of
from ebsd.control.host import Host
from ebsd.control.hostchecks import Finding, examine_host
from ebsd.domain.errors import EbsdError
from ebsd.domain.model import Caller
from ebsd.domain.space import SpaceState
from ebsd.domain.units import format_size

LOOK_SECONDS: Final = 4.0
"""For a key service that does not answer: whoever asks for the status of things does not wait long himself."""

SEALED_ROOT_KEY: Final = Path("/etc/ebsd/root-key.cred")
"""What an installation makes, and systemd opens for the key service (systemd/ebsd-kms.service)."""
HOST_SECRET: Final = Path("/var/lib/systemd/credential.secret")
SEALED_TO_HOST: Final = b"Whxqht+dQJax1aZeCGLx"
"""Base64 of the first 15 bytes of CRED_AES256_GCM_BY_HOST (systemd, creds-util.h)."""


@dataclass(frozen=True, slots=True)
class Installation:
    """Where things are; for display."""

    state_dir: Path
    kms_state_dir: Path
    root_key: str
    root_key_beside_data: bool
    started: str
    rescue: str
    """Why the daemon runs in rescue mode; empty when it does not."""
    kms_is_service: bool = False
    """The key service is a service of its own, with its own user."""
    locked: str = ""
    """Why it serves nothing but status before its key service is unlocked; empty when that is open."""

    @property
    def state(self) -> str:
        """``running``, ``locked`` or ``rescue``."""
        return "rescue" if self.rescue else "locked" if self.locked else "running"


class Inspection:
    """Read-only views on the installation; they answer in rescue mode too."""

    def __init__(
        self,
        host: Host,
        installation: Installation,
        broker: Broker,
        catalogue: Catalogue | None,
        volume_processes: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """``volume_processes``: {volume id: pid} of those that run."""
        self._host = host
        self._installation = installation
        self._broker = broker
        self._catalogue = catalogue
        self._volume_processes = volume_processes

    async def status(self, caller: Caller) -> dict[str, Any]:
        """Return the members of Control.GetStatus."""
        total = attached = 0
        if self._catalogue is not None:
            volumes = await self._catalogue.run(
                lambda t: t.volumes(None if caller.is_admin else caller.account, in_bin=False)
            )
            total, attached = len(volumes), sum(1 for v in volumes if v.attachment is not None)
        installation = self._installation
        status: dict[str, Any] = {
            "Version": __version__,
            "State": installation.state,
            "Pid": os.getpid(),
            "Uid": os.getuid(),
            "StateDirectory": str(installation.state_dir),
            "RuntimeDirectory": str(self._host.runtime.root),
            "StartTime": installation.started,
            "Volumes": total,
            "AttachedVolumes": attached,
            "FreeBytes": _free(installation.state_dir),
            "Space": await trio.to_thread.run_sync(self._space),
            "KeyService": await self._key_service(),
        }
        reason = installation.rescue or installation.locked
        return {**status, "Reason": reason} if reason else status

    def _space(self) -> dict[str, Any]:
        space = self._host.space.describe()
        stored = _stored(self._installation.state_dir / "layers")
        return space if stored is None else {**space, "StoredBytes": stored}

    async def _asked_key_service(self) -> dict[str, Any]:
        try:
            return await self._broker.status(deadline=LOOK_SECONDS)
        except EbsdError as exc:
            return {"State": "unreachable", "Reason": exc.message}

    async def _key_service(self) -> dict[str, Any]:
        found = await self._asked_key_service()
        return {
            name: found[name]
            for name in ("State", "Reason", "StateDirectory", "RootKey", "RootKeyKind", "ConfiguredRootKey", "Pid")
            if found.get(name) is not None
        }

    async def doctor(self) -> list[dict[str, Any]]:
        """Return the findings of all checks."""
        findings = [
            finding
            for check in _CHECKS
            for finding in await trio.to_thread.run_sync(check, self._host, self._installation)
        ]
        key_service = await self._asked_key_service()
        pids = dict(self._volume_processes())
        if "Pid" in key_service:
            pids["the key service"] = int(key_service["Pid"])
        findings += await trio.to_thread.run_sync(examine_host, pids)
        if key_service["State"] == "running":
            if configured := key_service.get("ConfiguredRootKey"):
                now = key_service["RootKey"]
                findings.append(
                    Finding(
                        "root key, changed",
                        "warning",
                        f"it is {now} now, and the configuration still names {configured}",
                        f'Set [key_service.local] root_key = "{now}", restart ebsd, then remove the old one.',
                    )
                )
            findings.append(Finding("key service", "ok", f"running, root key from {key_service.get('RootKey')}"))
        else:
            findings.append(
                Finding(
                    "key service",
                    "failure",
                    f"{key_service['State']}: {key_service.get('Reason', '')}",
                    "Unlock it: ebsctl key unlock"
                    if key_service["State"] == "locked"
                    else "Put the root key back, or restore the keys: ebsctl key restore FILE",
                )
            )
        if key_service["State"] != "unreachable":
            findings += await self._aws()
        findings += _deletion_findings(key_service.get("PendingDeletion"))
        return [{name: value for name, value in asdict(f).items() if value is not None} for f in findings]

    async def _aws(self) -> list[Finding]:
        """Return whether AWS KMS answers, where it is configured."""
        try:
            found = await self._broker.check_aws()
        except EbsdError:  # what is wrong with the broker itself is another finding
            return []
        if "Place" not in found:
            return []
        if "Problem" in found:
            fix = "Check [key_service.aws] and the credentials of ebsd; attached volumes are not affected."
            return [Finding("AWS KMS", "failure", f"{found['Place']}: {found['Problem']}", fix)]
        text = f"{found['Place']} answers {found['Principal']} within {found['Milliseconds']} ms"
        return [Finding("AWS KMS", "ok", text)]


def _deletion_findings(pending: dict[str, Any] | None) -> list[Finding]:
    """Tell of keys that wait for their deletion: what they encrypt is lost with them."""
    if pending is None:
        return []
    text = f"{pending['Keys']} wait for their deletion, the first until {pending['Next']}"
    if not pending["Resources"]:
        return [Finding("keys", "note", f"{text}; nothing is encrypted under them")]
    lost = f"{text}; {pending['Resources']} volumes and snapshots can never be read afterwards"
    return [Finding("keys", "warning", lost, "To keep a key: ebsctl key list, ebsctl key cancel-deletion KEY")]


def _free(path: Path) -> int:
    usage = os.statvfs(path)
    return usage.f_bavail * usage.f_frsize


def _stored(layers: Path) -> int | None:
    """Return the bytes that the files of all lineages take; None when that cannot be told."""
    total = 0
    try:
        with os.scandir(layers) as lineages:
            for lineage in lineages:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(lineage) as files:
                    total += sum(file.stat(follow_symlinks=False).st_blocks * 512 for file in files)
    except OSError:
        return None
    return total


def _check_rescue(host: Host, installation: Installation) -> list[Finding]:
    if not installation.rescue:
        return [Finding("catalog", "ok", f"{installation.state_dir / 'catalog.sqlite'} is usable")]
    fix = "Rebuild it: ebsctl check --rebuild-catalog; or put the state directory back from a backup."
    return [Finding("catalog", "failure", installation.rescue, fix)]


def _check_fuse(host: Host, installation: Installation) -> list[Finding]:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return [Finding("/dev/fuse", "failure", str(exc), "modprobe fuse; in a container pass --device /dev/fuse")]
    return [Finding("/dev/fuse", "ok", "can be opened")]


def _check_loop(host: Host, installation: Installation) -> list[Finding]:
    if not host.is_root:
        return [
            Finding("loop devices", "note", "ebsd does not run as root: volumes can be attached as block files only")
        ]
    try:
        os.close(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return [Finding("loop devices", "failure", str(exc), "modprobe loop; or attach with --file")]
    return [Finding("loop devices", "ok", "/dev/loop-control can be opened")]


def _check_state(host: Host, installation: Installation) -> list[Finding]:
    magic = magic_of(installation.state_dir)
    found: list[Finding] = []
    if magic in MAGIC_WARNED or magic in MAGIC_REFUSED:
        name = MAGIC_WARNED.get(magic) or MAGIC_REFUSED[magic]
        found.append(
            Finding("state directory", "warning", f"it lies on {name}", "Use a directory on ext4, xfs or btrfs.")
        )
    found.append(_space_finding(host, installation))
    return found


def _space_finding(host: Host, installation: Installation) -> Finding:
    space = host.space.describe()
    free, reserve = format_size(space["FreeBytes"]), format_size(space["ReserveBytes"])
    text = f"{free} free in {installation.state_dir}, of which {reserve} are kept in reserve"
    state = SpaceState(space["State"])
    if state is SpaceState.OK:
        return Finding("space", "ok", text)
    remedy = "Delete snapshots or volumes, or grow the file system."
    if state is SpaceState.LOW:
        return Finding("space", "warning", text, remedy)
    return Finding("space", "failure", f"{text}: volumes take no new chunks", remedy)


def _check_live(host: Host, installation: Installation) -> list[Finding]:
    if magic_of(host.runtime.live) != TMPFS_MAGIC:
        return [Finding("live maps", "failure", f"{host.runtime.live} is not on a tmpfs", "Restart ebsd.")]
    return [Finding("live maps", "ok", f"{format_size(_free(host.runtime.live))} free in {host.runtime.live}")]


def _check_root_key(host: Host, installation: Installation) -> list[Finding]:
    if installation.root_key_beside_data:
        return [
            Finding(
                "root key",
                "warning",
                f"{installation.root_key} lies in the state directory: whoever copies that can read everything",
                "Set [key_service.local] root_key to a file elsewhere, or to a systemd credential.",
            )
        ]
    if installation.root_key == "passphrase":
        return [Finding("root key", "ok", "under a passphrase, which each start of the key service asks for")]
    if not installation.root_key.startswith("credential:") and _on_one_disk(
        Path(installation.root_key), installation.state_dir
    ):
        return [
            Finding(
                "root key",
                "warning",
                f"{installation.root_key} lies on the disk of the state directory: who has that disk reads all",
                "Keep it elsewhere: ebsctl key root change --help (a passphrase, a credential, another disk)",
            )
        ]
    if not installation.root_key.startswith("credential:"):
        return [
            Finding(
                "root key",
                "note",
                f"it is the file {installation.root_key}: a thief of the whole disk has it too",
                "Keep it off the disk: a passphrase, or a systemd credential sealed to the TPM (systemd-creds).",
            )
        ]
    if is_sealed_to_host(SEALED_ROOT_KEY) and _on_one_disk(HOST_SECRET, installation.state_dir):
        return [
            Finding(
                "root key",
                "warning",
                f"{SEALED_ROOT_KEY} is sealed with {HOST_SECRET}, on the disk of the state directory: who has it "
                "reads all",
                "Seal it to the TPM as well (systemd-creds), or keep it elsewhere: ebsctl key root change --help",
            )
        ]
    return [Finding("root key", "ok", f"from {installation.root_key}")]


def is_sealed_to_host(credential: Path) -> bool:
    """Say whether a file is a credential that systemd encrypted with nothing but the host's secret."""
    try:
        with credential.open("rb") as file:
            return file.read(len(SEALED_TO_HOST)) == SEALED_TO_HOST
    except OSError:
        return False


def _on_one_disk(one: Path, other: Path) -> bool:
    """Say whether two paths lie on one file system; what cannot be looked at does not."""
    try:
        return one.stat().st_dev == other.stat().st_dev
    except OSError:
        return False


def _check_separation(host: Host, installation: Installation) -> list[Finding]:
    who = "all processes but the key service" if installation.kms_is_service else "all processes"
    return [
        Finding(
            "separation",
            "note",
            f"{who} run as uid {host.admin_uid}: separate, but not protected from each other",
        )
    ]


def _check_aes(host: Host, installation: Installation) -> list[Finding]:
    if " aes" in Path("/proc/cpuinfo").read_text():
        return [Finding("AES instructions", "ok", "the processor has them")]
    return [Finding("AES instructions", "warning", "the processor has none: expect a tenth of the speed")]


_CHECKS: Final[tuple[Callable[[Host, Installation], list[Finding]], ...]] = (
    _check_rescue,
    _check_fuse,
    _check_loop,
    _check_state,
    _check_live,
    _check_root_key,
    _check_separation,
    _check_aes,
)
