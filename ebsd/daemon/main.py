"""ebsd, the control daemon: reads its configuration, opens what there is, serves ebsd.sock, ends in order.

SIGTERM and SIGINT end ebsd and the key broker; attached volumes go on, and the next ebsd adopts them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import secrets
import signal
import socket
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import trio

from ebsd import __version__
from ebsd.control import host_helper
from ebsd.control.archive_jobs import ArchiveExports, ArchiveImports
from ebsd.control.archives import Archives
from ebsd.control.attachments import Attachments
from ebsd.control.block_reads import BlockReads
from ebsd.control.block_workers import BlockWorkers
from ebsd.control.block_writes import BlockWrites
from ebsd.control.broker import Broker
from ebsd.control.catalogue import Catalogue
from ebsd.control.cloning import Cloning
from ebsd.control.copying import Copying
from ebsd.control.creation import Creation
from ebsd.control.drains import Drains
from ebsd.control.encryption import Encryption
from ebsd.control.examination import StoreExamination
from ebsd.control.expiries import Expiries
from ebsd.control.exporting import Exporting
from ebsd.control.filesystems import TMPFS_MAGIC, magic_of, refuse_unsuitable
from ebsd.control.growth import Growth
from ebsd.control.host import Host, RuntimeLayout
from ebsd.control.idempotency import ClientTokens
from ebsd.control.importing import Importing
from ebsd.control.inspection import Inspection, Installation
from ebsd.control.jobs import Jobs
from ebsd.control.leaf_roots import LeafRoots
from ebsd.control.lineage_files import LineageFiles
from ebsd.control.lineages import Lineages
from ebsd.control.locking import SnapshotLocks
from ebsd.control.rebuilding import Rebuilding, Rescue
from ebsd.control.recycle_bin import RecycleBin
from ebsd.control.rewrapping import Rewrapping
from ebsd.control.rollback import Rollback
from ebsd.control.schedules import Schedules
from ebsd.control.sharing import Sharing
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.snapshot_sets import SnapshotSets
from ebsd.control.snapshots import Snapshots
from ebsd.control.space import Space
from ebsd.control.usage import AccountUsage
from ebsd.control.verification import Verifications
from ebsd.control.volume_files import VolumeFiles
from ebsd.control.volume_link import VolumeLink
from ebsd.control.volumes import Volumes
from ebsd.daemon.broker_process import broker_life
from ebsd.daemon.config import Config, load, root_key_name
from ebsd.daemon.locked import unlock_from, wait_until_unlocked, why_locked
from ebsd.daemon.services import Services, UseCases
from ebsd.daemon.services_transfers import Transfers
from ebsd.daemon.users_socket import UsersSocket
from ebsd.domain.errors import (
    AuthFailure,
    EbsdError,
    HostUnsupported,
    InvalidParameterValue,
    NoSpace,
    StateDirectoryInUse,
    StoreDamaged,
    UnsupportedFormat,
)
from ebsd.domain.ids import VolumeId, instance_id
from ebsd.domain.limits import AccountLimits
from ebsd.domain.space import space_limits
from ebsd.domain.states import JobKind
from ebsd.domain.units import MIB
from ebsd.ipc.hostclock import host_clock
from ebsd.ipc.peer import Peer, refuse_unusable, uid_map_is_identity
from ebsd.ipc.process import boot_id, harden
from ebsd.ipc.servicemanager import keep_alive, log_to_stderr, notify, take_listeners
from ebsd.ipc.varlink_server import VarlinkServer
from ebsd.store.ballast import Ballast, BallastedDisk
from ebsd.store.catalog import Catalog
from ebsd.store.disk import Disk
from ebsd.store.layout import LiveLayout, StateLayout
from ebsd.store.rebuild import has_resources

START_ROOM: Final = MIB
"""Free bytes that a start needs, for the log files of two databases."""

log = logging.getLogger("ebsd")

REPLY_SECONDS: Final = 1.0
"""How long whoever had the catalog rebuilt has to take the answer, before ebsd starts anew inside."""

_HELP: Final = """
ebsd serves encrypted block volumes. Use them with ebsctl.

SIGTERM ends ebsd, not the volumes: what is attached goes on, and the next ebsd takes it over.
To stop everything: ebsctl detach --all, then end ebsd.
"""


def main() -> None:
    """Parse the command line and run the daemon; exits with the status of the error that stopped it."""
    parser = argparse.ArgumentParser(
        prog="ebsd", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration (default: /etc/ebsd/ebsd.toml)")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="volumes and catalog (default: /var/lib/ebsd)")
    parser.add_argument("--runtime-dir", type=Path, metavar="DIR", help="sockets, block files (default: /run/ebsd)")
    parser.add_argument(
        "--passphrase-fd", type=int, metavar="N", help="read the root key's passphrase from this descriptor"
    )
    parser.add_argument("--version", action="version", version=f"ebsd {__version__}")
    arguments = parser.parse_args()
    # Children must find descriptors 0 to 2 taken, or a socket would land there and be taken for a log.
    _fill_standard_descriptors()
    log_to_stderr("%(name)s: %(message)s", os.environ)
    logging.getLogger("ebsd").name = "ebsd"
    try:
        config = load(
            file=arguments.config,
            state_dir=arguments.state_dir,
            runtime_dir=arguments.runtime_dir,
            uid=os.getuid(),
            environment=os.environ,
        )
        trio.run(run, config, _taken(arguments.passphrase_fd), take_listeners(os.environ).get("ebsd"))
    except EbsdError as exc:
        print(f"ebsd: {exc.message}", file=sys.stderr)  # noqa: T201
        if exc.hint:
            print(f"hint: {exc.hint}", file=sys.stderr)  # noqa: T201
        sys.exit(exc.exit_status)


def _taken(descriptor: int | None) -> int | None:
    """Return a copy of a descriptor that no child inherits; what was given is closed, unless it is a standard one."""
    if descriptor is None:
        return None
    try:
        copy = os.dup(descriptor)
    except OSError as exc:
        raise InvalidParameterValue(value=descriptor, parameter="--passphrase-fd", reason=exc.strerror) from exc
    if descriptor > 2:
        os.close(descriptor)
    return copy


def _fill_standard_descriptors() -> None:
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)


async def run(config: Config, passphrase: int | None = None, given: socket.socket | None = None) -> None:
    """Run the daemon until it is told to end; ``passphrase`` is a descriptor for a key service that is locked.

    ``given``: the listening socket for users, where the service manager has it.
    """
    if os.getuid() == 0 and not uid_map_is_identity():
        raise HostUnsupported(
            reason="ebsd runs as root of a user namespace, where it cannot tell the host's users apart",
            remedy="Run it in the initial user namespace.",
        )
    harden(strict=False, no_new_privs=False)
    state, runtime = StateLayout(config.state_dir), config.runtime_dir
    disk = BallastedDisk()
    _make_directory(config.state_dir, 0o700)
    refuse_unsuitable(config.state_dir)
    with _only_one(state.lock):
        state.create(disk)
        if not config.kms_is_service:
            _make_directory(config.kms_state_dir, 0o700)
        _make_directory(runtime, 0o755)
        # The receiver stays to the very end, and trio raises again what it still holds then: a second signal must not
        # cut an orderly end short.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        trio.lowlevel.spawn_system_task(keep_alive, dict(os.environ))
        with _only_one(runtime), trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with _prepared_runtime(runtime) as layout:
                users_socket = UsersSocket(layout.users_socket, given)
                while await _serve(config, state, layout, users_socket, disk, signals, passphrase):
                    passphrase = None  # it was read to its end
                    log.warning("there is a catalog again; starting anew inside")


async def _serve(
    config: Config,
    state: StateLayout,
    layout: RuntimeLayout,
    users_socket: UsersSocket,
    disk: BallastedDisk,
    signals: AsyncIterator[int],
    passphrase: int | None,
) -> bool:
    """Serve until a signal (False), or until the catalog was rebuilt (True)."""
    space = _space(config, state, disk)
    disk.ballast = space.ballast
    if space.free() < START_ROOM:
        space.ballast.release()  # catalog and key service make log files when they are opened
    host = Host(
        runtime=layout,
        boot_id=boot_id(),
        instance=instance_id(_machine_id()),
        admin_uid=os.getuid(),
        allow_unencrypted=config.allow_unencrypted,
        transport=config.transport,
        drain=config.drain,
        space=space,
        now=_now,
        random=secrets.token_bytes,
        job_rate=config.job_rate,
        engine_deaths=config.engine_deaths,
        clock_is_even=host_clock().look,
    )
    catalogue, why = _open_catalog(state, disk, space.ballast, config.limits)
    rescue = why.reason
    if rescue:
        log.error("rescue mode: %s", rescue)
    broker = Broker(layout.broker_socket, space.ballast)
    # Where something was made, there were keys: another root key would only hide that they are missing.
    broker_process = broker_life(config, layout, broker, host.admin_uid, may_create=not has_resources(disk, state))
    installation = Installation(
        state_dir=config.state_dir,
        kms_state_dir=config.kms_state_dir,
        root_key=root_key_name(config.root_key),
        root_key_beside_data=config.root_key_beside_data,
        started=_now(),
        rescue=rescue,
        kms_is_service=config.kms_is_service,
    )
    try:
        await broker_process.ensure()
        if passphrase is not None:
            await unlock_from(passphrase, broker, layout.keys_socket)
            os.close(passphrase)
        if locked := await why_locked(broker):
            log.warning("locked: %s", locked)
            told = Inspection(host, replace(installation, locked=locked), broker, None)
            examination = StoreExamination(host, state, broker, None, None, None, None)
            rebuilding = Rebuilding(host, state, disk, broker, why)
            services = Services(host, broker, told, examination, rebuilding, None, rescue, locked)
            notify(os.environ.get("NOTIFY_SOCKET"), "READY=1")
            print(f"ebsd: locked, listening on {layout.users_socket}: ebsctl key unlock", file=sys.stderr, flush=True)  # noqa: T201
            server = _server(services)
            if not await wait_until_unlocked(broker, broker_process, server, users_socket, signals):
                await broker_process.shut_down()
                return False
            log.info("the key service is unlocked")
        async with trio.open_nursery() as nursery:
            use_cases = None
            if catalogue is not None:
                files = VolumeFiles(disk, state, LiveLayout(layout.live), space.ballast)
                use_cases = compose(host, catalogue, broker, files, disk, state, nursery)
                await recover(use_cases)
            inspection = Inspection(
                host,
                installation,
                broker,
                catalogue,
                use_cases.attachments.processes if use_cases is not None else dict,
            )
            examination = StoreExamination(
                host,
                state,
                broker,
                catalogue,
                use_cases.volumes if use_cases is not None else None,
                use_cases.snapshots if use_cases is not None else None,
                use_cases.lineages if use_cases is not None else None,
            )
            rebuilding = Rebuilding(host, state, disk, broker, why)
            services = Services(host, broker, inspection, examination, rebuilding, use_cases, rescue)
            server = _server(services)
            nursery.start_soon(server.serve, users_socket.open())
            nursery.start_soon(broker_process.supervise)
            nursery.start_soon(broker.tend)
            nursery.start_soon(space.tend)
            if use_cases is not None:
                nursery.start_soon(use_cases.schedules.tend)
                nursery.start_soon(use_cases.expiries.tend)
                nursery.start_soon(use_cases.block_writes.tend)
            notify(os.environ.get("NOTIFY_SOCKET"), "READY=1")
            print(f"ebsd: listening on {layout.users_socket}", file=sys.stderr, flush=True)  # noqa: T201
            if config.root_key_beside_data:
                log.warning("the root key lies in the state directory; see `ebsctl doctor`")
            again = await _rebuilt_before_signal(rebuilding, signals)
            notify(os.environ.get("NOTIFY_SOCKET"), "STOPPING=1")
            nursery.cancel_scope.cancel()
        users_socket.close()
        if use_cases is not None:
            await use_cases.attachments.remove_empty_loops()
        await broker_process.shut_down()
        if use_cases is not None and use_cases.attachments.running:
            names = ", ".join(use_cases.attachments.running)
            print(  # noqa: T201
                f"ebsd: attached volumes go on: {names}. To stop everything: start ebsd again, ebsctl detach --all, "
                "end ebsd.",
                file=sys.stderr,
                flush=True,
            )
        return again
    finally:
        if catalogue is not None:
            catalogue.close()


def _server(services: Services) -> VarlinkServer:
    return VarlinkServer(
        vendor="ebsd",
        product="ebsd",
        version=__version__,
        url="",
        services=services.table(),
        admit=_admit,
        on_incident=_log_incident,
    )


def _open_catalog(
    state: StateLayout, disk: Disk, ballast: Ballast, limits: AccountLimits
) -> tuple[Catalogue | None, Rescue]:
    """Open the catalog, made anew where the store is empty; None with the reason when there is none to be used."""
    try:
        missing = not state.catalog.exists() or state.catalog.stat().st_size == 0
        if missing and has_resources(disk, state):
            reason = "there are volumes or snapshots, and the catalog is missing or empty"
            raise StoreDamaged(file=state.catalog, reason=reason)
        catalog = _opened_catalog(state.catalog, ballast)
        try:
            catalog.check_rows()
        except BaseException:
            catalog.close()
            raise
        return Catalogue(catalog, ballast, limits), Rescue("", may_rebuild=False)
    except (StoreDamaged, UnsupportedFormat, NoSpace) as exc:
        return None, Rescue(exc.message, may_rebuild=isinstance(exc, StoreDamaged))


async def _rebuilt_before_signal(rebuilding: Rebuilding, signals: AsyncIterator[int]) -> bool:
    """Wait for whichever comes first, and say whether it was the catalog."""
    async with trio.open_nursery() as nursery:

        async def on_signal() -> None:
            await anext(signals)
            nursery.cancel_scope.cancel()

        nursery.start_soon(on_signal)
        await rebuilding.done.wait()
        await trio.sleep(REPLY_SECONDS)
        nursery.cancel_scope.cancel()
        return True
    return False


def _space(config: Config, state: StateLayout, disk: BallastedDisk) -> Space:
    usage = disk.statvfs(state.root)
    limits = space_limits(
        usage.f_blocks * usage.f_frsize,
        reserve=config.space_reserve,
        ballast=config.space_ballast,
        full_wait=config.full_wait,
    )
    return Space(disk, state.root, state.ballast, limits)


def _opened_catalog(path: Path, ballast: Ballast) -> Catalog:
    """Open the catalog, for which a full disk may have to be made less full."""
    while True:
        try:
            return Catalog(path)
        except NoSpace:
            if not ballast.release():
                raise


async def recover(use_cases: UseCases) -> None:
    """Bring the store into order after whatever ended the last ebsd; before any request is served.

    The order matters: a pending snapshot may be completed by a process that was taken over before, a job by what its
    worker left under a temporary name, and only then are such names nobody's.
    """
    await use_cases.attachments.adopt_all()
    await use_cases.snapshots.recover()
    await use_cases.sets.recover()
    await use_cases.volumes.recover()
    await use_cases.jobs.recover()
    await use_cases.cloning.recover()
    await use_cases.growth.recover()
    await use_cases.block_writes.recover()
    await use_cases.rewrapping.recover()
    await use_cases.lineages.tidy()
    await use_cases.jobs.resume_all()
    await use_cases.block_writes.resume_all()
    await use_cases.transfers.exporting.tidy()


def compose(
    host: Host,
    catalogue: Catalogue,
    broker: Broker,
    files: VolumeFiles,
    disk: Disk,
    state: StateLayout,
    nursery: trio.Nursery,
) -> UseCases:
    """Put the use cases together around one catalog, one disk and one key service."""
    links: dict[VolumeId, VolumeLink] = {}
    lineages = Lineages(catalogue, LineageFiles(disk, state), links)
    snapshot_files = SnapshotFiles(disk, state, files)
    encryption = Encryption(host, broker)
    volumes = Volumes(host, catalogue, broker, encryption, files, lineages)
    roots = LeafRoots(catalogue, broker, snapshot_files, lineages, nursery)
    sharing = Sharing(catalogue, broker)
    snapshots = Snapshots(
        host, catalogue, broker, volumes, files, snapshot_files, lineages, links, roots, sharing, nursery
    )
    jobs = Jobs(host, catalogue, broker, snapshot_files, nursery)
    copying = Copying(host, catalogue, broker, volumes, snapshot_files, lineages, jobs)
    jobs.register(JobKind.COPY_SNAPSHOT, JobKind.RESTORE_VOLUME, work=copying)
    block_workers = BlockWorkers(broker, snapshot_files)
    imports = ArchiveImports(host, catalogue, broker, volumes, snapshot_files, lineages, jobs)
    jobs.register(JobKind.IMPORT_ARCHIVE, work=imports)
    exports = ArchiveExports(host, catalogue, broker, snapshot_files, lineages)
    jobs.register(JobKind.EXPORT_ARCHIVE, work=exports)
    importing = Importing(host, catalogue, broker, volumes, snapshot_files, lineages, jobs)
    exporting = Exporting(host, catalogue, snapshots, snapshot_files, lineages, jobs)
    jobs.register(JobKind.IMPORT_VOLUME, work=importing)
    jobs.register(JobKind.EXPORT_IMAGE, work=exporting)
    verifications = Verifications(host, catalogue, volumes, snapshot_files, lineages, roots, jobs)
    jobs.register(JobKind.VERIFY, work=verifications)
    drains = Drains(host, catalogue, lineages, links, nursery)
    locks = SnapshotLocks(host, catalogue)
    recycle_bin = RecycleBin(host, catalogue, volumes, snapshots, lineages)
    sets = SnapshotSets(host, catalogue, volumes, snapshots, snapshot_files, lineages, links, roots, nursery)
    return UseCases(
        volumes=volumes,
        attachments=Attachments(
            host, catalogue, broker, files, volumes, lineages, links, roots, drains, snapshot_files, nursery
        ),
        snapshots=snapshots,
        creation=Creation(host, catalogue, encryption, volumes, snapshots, copying, ClientTokens(catalogue), sharing),
        sharing=sharing,
        sets=sets,
        schedules=Schedules(host, catalogue, snapshots, sets, snapshot_files, links),
        cloning=Cloning(host, catalogue, volumes, snapshots, sets, copying, nursery),
        lineages=lineages,
        growth=Growth(host, catalogue, files, volumes, lineages, snapshots, links),
        jobs=jobs,
        archives=Archives(host, catalogue, broker, encryption, jobs, imports),
        drains=drains,
        block_reads=BlockReads(host, catalogue, snapshot_files, lineages, sharing, block_workers),
        block_writes=BlockWrites(
            host, catalogue, broker, encryption, volumes, snapshot_files, lineages, block_workers, nursery
        ),
        verifications=verifications,
        usage=AccountUsage(catalogue),
        rollback=Rollback(catalogue, broker, snapshot_files, lineages),
        locks=locks,
        recycle_bin=recycle_bin,
        expiries=Expiries(host, [locks.advance, recycle_bin.purge]),
        rewrapping=Rewrapping(catalogue, broker, volumes, snapshot_files, lineages),
        transfers=Transfers(importing, exporting),
    )


def _admit(peer: Peer) -> None:
    """Refuse users who cannot have an account here; without root, everybody but the daemon's own user and root."""
    refuse_unusable(peer)
    if os.getuid() not in (0, peer.uid) and peer.uid != 0:
        raise AuthFailure(uid=peer.uid, reason=f"this ebsd serves only its own user, uid {os.getuid()}")


@contextlib.contextmanager
def _only_one(place: Path) -> Any:
    """Lock a file, or a directory itself, for as long as the body runs."""
    flags = os.O_RDONLY | os.O_DIRECTORY if place.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    fd = os.open(place, flags | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateDirectoryInUse(program="ebsd", directory=place if place.is_dir() else place.parent) from None
        yield
    finally:
        os.close(fd)


@asynccontextmanager
async def _prepared_runtime(root: Path) -> AsyncIterator[RuntimeLayout]:
    """Make RUNTIME and its directories; take away the tmpfs for live maps when no volume uses it any more."""
    _make_directory(root, 0o755)
    _make_directory(root / "volumes", 0o711)
    _make_directory(root / "control", 0o700)
    live = root / "live"
    mounted = False
    if os.getuid() == 0 or magic_of(root) == TMPFS_MAGIC:
        _make_directory(live, 0o700)
        if magic_of(live) != TMPFS_MAGIC:
            await host_helper.mount_tmpfs(live)
        mounted = magic_of(root) != TMPFS_MAGIC
    else:
        live = _live_in_shared_memory(root)
    try:
        yield RuntimeLayout(root, live)
    finally:
        with trio.CancelScope(shield=True):
            if not any(live.iterdir()):
                if mounted:
                    await host_helper.unmount_tmpfs(live)
                elif live.parent != root:
                    live.rmdir()
            _remove_if_empty(root / "volumes", root / "control", root / "live", root)


def _live_in_shared_memory(root: Path) -> Path:
    """Return a directory of our own below /dev/shm/ebsd-UID, made for this RUNTIME; refuses one of somebody else."""
    base = Path(f"/dev/shm/ebsd-{os.getuid()}")
    _make_directory(base, 0o700)
    status = base.lstat()
    if base.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise HostUnsupported(reason=f"{base} is not a directory of yours alone", remedy=f"Have {base} removed.")
    live = base / f"live-{root.stat().st_dev:x}-{root.stat().st_ino:x}"
    _make_directory(live, 0o700)
    return live


def _remove_if_empty(*directories: Path) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.rmdir()


def _make_directory(path: Path, mode: int) -> None:
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        if path.stat().st_uid == os.getuid():
            path.chmod(mode)
    except OSError as exc:
        raise HostUnsupported(
            reason=f"The directory {path} cannot be made ({exc.strerror})",
            remedy="Name others with --state-dir and --runtime-dir.",
        ) from exc


def _machine_id() -> str:
    try:
        return Path("/etc/machine-id").read_text()
    except OSError:
        return "no machine id"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _log_incident(incident: str, exc: BaseException) -> None:
    # Frames and the type only: messages of unexpected errors may quote values.
    frames = "".join(traceback.format_tb(exc.__traceback__))
    log.error("incident %s: %s\n%s", incident, type(exc).__name__, frames)


if __name__ == "__main__":
    main()
