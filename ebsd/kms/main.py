"""The broker process: hardened, self-tested, configured by the ebsd that started it, and outliving that ebsd.

Descriptor 0 is a SOCK_SEQPACKET channel (ipc/channel.py). Its first request is ``configure``, with the listening
sockets of kms.sock and keys.sock, in this order. That ebsd's death does not end the broker; Shutdown and SIGTERM do.
As a service of its own (daemon/keyservice.py) it finds that request waiting, with nobody at the other end.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import trio

from ebsd.crypto import selftest
from ebsd.domain.clockwatch import ClockWatch
from ebsd.domain.errors import ConfigurationError, EbsdError, IncorrectState, NotSupported, ProtocolError
from ebsd.ipc import confinement
from ebsd.ipc.channel import Channel, serve
from ebsd.ipc.confinement import Kind
from ebsd.ipc.hostclock import host_clock
from ebsd.ipc.servicemanager import keep_alive, log_to_stderr, notify, unix_listener
from ebsd.ipc.sockets import close_all
from ebsd.kms.aws import AwsKeys
from ebsd.kms.aws_settings import AwsSettings
from ebsd.kms.broker import Broker, Settings
from ebsd.kms.rootplace import RootKeyPlace, absolute
from ebsd.kms.server import Servers
from ebsd.kms.sessions import Sessions

CONFIGURATION_VERSION: Final = 1
_LAST_WORDS: Final = 0.2
"""Seconds between Shutdown and the end, so that its reply gets out."""

LOOK_SECONDS: Final = 600.0
"""Between two looks for keys that are due; a rotation on demand is refused for longer than that before one."""

LEFTOVER_SECONDS: Final = 60.0
"""Between two looks for grants that AWS gave no answer about."""

_DESCRIPTORS: Final = 65536

_log = logging.getLogger("ebsd.kms")


class Configuration(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of ``configure``."""

    version: int
    state_dir: str
    root_key: RootKeyPlace
    admin_uid: int
    may_create: bool
    aws: AwsSettings | None = None
    credentials_directory: str | None = None
    """Where the service manager put its credentials, for a change of the root key to one of them."""


def parse_configuration(parameters: dict[str, Any]) -> Configuration:
    """Return the configuration; raises NotSupported for another version, ProtocolError for a wrong shape."""
    if parameters.get("version") != CONFIGURATION_VERSION:
        raise NotSupported(what="This version of the key broker's configuration", remedy="Use one version of ebsd.")
    try:
        return msgspec.convert(parameters, Configuration)
    except msgspec.ValidationError as exc:
        raise ProtocolError(reason=f"configure: {exc}") from exc


def _listener(fd: int) -> socket.socket:
    """Take over a descriptor that must be a listening Unix stream socket."""
    try:
        return unix_listener(fd, "of configure")
    except ConfigurationError as exc:
        os.close(fd)
        raise ProtocolError(reason="configure: a descriptor is no listening Unix socket") from exc


def _kind(configuration: Configuration) -> Kind:
    if configuration.aws is not None:
        return Kind.BROKER_AWS
    return Kind.BROKER_SERVICE if os.environ.get("NOTIFY_SOCKET") else Kind.BROKER


class Process:
    """What one broker process does from its start to its end."""

    def __init__(self) -> None:
        self.exit_status = 0
        self._stopping = trio.Event()
        self._configured = False
        self._broker: Broker | None = None

    async def run(self, parent: socket.socket) -> None:
        """Serve until Shutdown or SIGTERM, or until a parent goes that never configured us."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._signals)
                nursery.start_soon(self._parent, parent, nursery)
                await self._stopping.wait()
                notify(os.environ.get("NOTIFY_SOCKET"), "STOPPING=1")
                nursery.cancel_scope.cancel()
        finally:
            if self._broker is not None:
                with trio.CancelScope(shield=True):
                    await self._broker.close()
        _log.info("ended")

    async def _signals(self, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                _log.info("received %s", signal.Signals(number).name)
                self._stopping.set()

    async def _parent(self, parent: socket.socket, nursery: trio.Nursery) -> None:
        async def configure(parameters: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
            return await self._configure(parameters, fds, nursery), ()

        async with Channel(parent) as channel:
            try:
                await serve(channel, {"configure": configure})
            except ProtocolError as exc:
                _log.warning("the channel to ebsd: %s", exc.message)
        if self._configured:
            _log.info("the ebsd that started this broker is gone; going on")
        else:
            _log.error("ebsd went away before it configured this broker")
            self.exit_status = 1
            self._stopping.set()

    async def _configure(self, parameters: dict[str, Any], fds: list[int], nursery: trio.Nursery) -> dict[str, Any]:
        if self._configured:
            close_all(fds)
            raise IncorrectState(reason="The key broker is configured already")
        listeners: list[socket.socket] = []
        rest = list(fds)
        try:
            configuration = parse_configuration(parameters)
            confinement.enclose(_log, kind=_kind(configuration))
            if len(fds) != 2:
                raise ProtocolError(reason="configure takes the listening sockets of kms.sock and keys.sock")
            while rest:
                listeners.append(_listener(rest.pop(0)))
            broker = Broker(
                Settings(
                    absolute(configuration.state_dir, "state_dir"),
                    configuration.root_key.source(absolute(configuration.state_dir, "state_dir")),
                    configuration.may_create,
                    configuration.aws,
                    configuration.credentials_directory,
                )
            )
            await trio.to_thread.run_sync(broker.open)
        except BaseException as exc:
            close_all(rest)
            for listener in listeners:
                listener.close()
            if isinstance(exc, EbsdError):  # of a service of its own nobody reads the answer
                _log.error("%s", exc.message)
            raise
        self._broker = broker
        self._configured = True
        servers = Servers(
            broker,
            Sessions(nursery),
            admin_uid=configuration.admin_uid,
            shutdown=lambda: nursery.start_soon(self._stop_soon),
        )
        kms, keys = (trio.socket.from_stdlib_socket(listener) for listener in listeners)
        nursery.start_soon(servers.serve, kms, keys)
        nursery.start_soon(_look_after_keys, broker, host_clock())
        if broker.aws is not None:
            nursery.start_soon(_look_after_aws, broker.aws)
        nursery.start_soon(broker.trail.tell_heads)
        status = broker.status()
        _log.info("%s, %d keys, state in %s", status.state, status.keys, status.directory)
        nursery.start_soon(keep_alive, dict(os.environ))
        notify(os.environ.get("NOTIFY_SOCKET"), "READY=1")
        return {"State": status.state, "Reason": status.reason, "Pid": os.getpid()}

    async def _stop_soon(self) -> None:
        await trio.sleep(_LAST_WORDS)
        self._stopping.set()


async def _look_after_aws(aws: AwsKeys) -> None:
    """Load boto3 now, once all else works: the first attachment need not wait for it, and an upgrade not change it.

    Then retire, now and then, the grants that AWS gave no answer about.
    """
    problem = await aws.client.connect()
    if problem is not None:
        _log.warning("%s", problem.message)
    while True:
        await trio.sleep(LEFTOVER_SECONDS)
        try:
            if settled := await aws.retire_leftovers():
                _log.info("%d attach grants that were left over in AWS are retired", settled)
        except EbsdError as exc:
            _log.warning("attach grants are left over in AWS: %s", exc.message)


async def _look_after_keys(broker: Broker, clock: ClockWatch) -> None:
    """Delete and rotate keys when their time comes, also when it came while no broker ran: periods are days."""
    while True:
        looks = [("deleted", _delete_due)] if clock.look() else []
        for what, look in (*looks, ("rotated", _rotate_due)):
            try:
                await look(broker)
            except (EbsdError, OSError) as exc:  # in rescue, or the disk is full: the next look tries again
                _log.warning("keys that are due were not %s: %s", what, exc)
        await trio.sleep(LOOK_SECONDS)


async def _delete_due(broker: Broker) -> None:
    async with broker.trail.admitted():  # what cannot be undone does not happen unrecorded
        for key in await broker.destroy_due():
            _log.warning("%s, due since %s, is deleted, and what it encrypted is lost", key.arn, key.deletion_date)
            await broker.trail.key_event("DeleteKey", key.arn, {"deletionDate": key.deletion_date})


async def _rotate_due(broker: Broker) -> None:
    for key in await broker.running.keys.rotate_due():
        _log.info("%s rotated, %d backing keys", key.arn, len(key.backing))
        details = {"rotationType": "AUTOMATIC", "keyMaterialId": key.current.id}
        await broker.trail.key_event("RotateKey", key.arn, details)


def _take_parent_socket() -> socket.socket:
    """Return the channel at descriptor 0 and leave /dev/null there: no library shall read or reuse it."""
    parent = socket.socket(fileno=os.dup(0))
    os.set_inheritable(parent.fileno(), False)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    return parent


def _raise_descriptor_limit() -> None:
    """Take all descriptors we may have: users' connections and secrets need one each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(_DESCRIPTORS, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> int:
    """Run the broker; returns the exit status."""
    # Standard error may be a pipe of an ebsd that is gone: a log line that cannot be written is no error.
    logging.raiseExceptions = False
    log_to_stderr("ebsd-kms: %(levelname)s: %(message)s", os.environ)
    confinement.begin(_log, None)
    selftest.run()
    _raise_descriptor_limit()
    try:
        parent = _take_parent_socket()
    except OSError:
        _log.error("descriptor 0 is no socket: ebsd starts this program, not a user")
        return 2
    process = Process()
    trio.run(process.run, parent)
    return process.exit_status
