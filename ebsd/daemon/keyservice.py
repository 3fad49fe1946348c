"""``ebsd-kms``: the key broker as a service of its own, with its own user, sockets, directory and credentials.

1. This program reads the configuration and becomes the broker by exec: what runs on is the same program, with the same
   channel, as the one that ebsd starts, and nobody is on the other end of the channel any more.
2. The service manager passes the sockets ``kms`` and ``keys``; of the environment, only its own variables are left.
3. Whether keys may be made where there are none depends on ebsd's directory, which the key service cannot enter:
   ``--look``, run by root before each start, leaves the answer as a file in the service's runtime directory.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ebsd import __version__
from ebsd.daemon.broker_process import MODULE, configure_parameters
from ebsd.daemon.config import Config, load
from ebsd.domain.errors import ConfigurationError, EbsdError
from ebsd.ipc.blocking_channel import BlockingChannel
from ebsd.ipc.commands import ENVIRONMENT
from ebsd.ipc.packets import make_request
from ebsd.ipc.process import command
from ebsd.ipc.servicemanager import take_listeners
from ebsd.store.disk import RealDisk
from ebsd.store.layout import StateLayout
from ebsd.store.rebuild import has_resources

ROOT: Final = 0
"""Whom the broker serves on kms.sock, and whose configuration and directories these are."""

KEPT: Final = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "JOURNAL_STREAM")

MAY_CREATE: Final = "may-create"
"""File in the runtime directory: there is nothing yet that keys could be missing for."""


def main() -> None:
    """Become the broker, or look whether it may make keys; exits with the status of the error that stopped it."""
    parser = argparse.ArgumentParser(prog="ebsd-kms", description="The key service of ebsd. systemd starts it.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration (default: /etc/ebsd/ebsd.toml)")
    parser.add_argument("--look", action="store_true", help="as root: note whether there are volumes, and end")
    parser.add_argument("--version", action="version", version=f"ebsd-kms {__version__}")
    arguments = parser.parse_args()
    try:
        listeners = take_listeners(os.environ)
        config = load(file=arguments.config, state_dir=None, runtime_dir=None, uid=ROOT, environment=os.environ)
        directory = _runtime_directory(os.environ)
        if arguments.look:
            look(config.state_dir, directory)
        else:
            become_broker(config, listeners, os.environ, may_create=(directory / MAY_CREATE).exists())
    except EbsdError as exc:
        print(f"ebsd-kms: {exc.message}", file=sys.stderr)  # noqa: T201
        sys.exit(exc.exit_status)


def look(state_dir: Path, runtime_directory: Path) -> None:
    """Note whether ebsd has volumes or snapshots, whose keys must be there. Raises ConfigurationError."""
    note = runtime_directory / MAY_CREATE
    try:
        note.unlink(missing_ok=True)
        if not has_resources(RealDisk(), StateLayout(state_dir), missing_ok=True):
            # The directory is the key service's, and we are root: no link of its making is followed.
            os.close(os.open(note, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444))
    except OSError as exc:
        raise ConfigurationError(file=state_dir, reason=f"it cannot be looked into: {exc.strerror}") from exc


def become_broker(
    config: Config, listeners: Mapping[str, socket.socket], environment: Mapping[str, str], *, may_create: bool
) -> None:
    """Execute the broker with its configuration waiting on descriptor 0; returns only by ConfigurationError."""
    if set(listeners) != {"kms", "keys"}:
        raise ConfigurationError(file="LISTEN_FDNAMES", reason="systemd passes the sockets kms and keys")
    if config.root_key["kind"] == "credential" and not config.root_key["directory"]:
        raise ConfigurationError(file="key_service.local.root_key", reason="systemd passed no credentials")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parameters = configure_parameters(
        state_dir=config.kms_state_dir,
        root_key=config.root_key,
        admin_uid=ROOT,
        aws=config.aws,
        may_create=may_create,
        credentials_directory=environment.get("CREDENTIALS_DIRECTORY") or None,
    )
    # The packet stays in the socket when this end is closed, which exec does.
    BlockingChannel(ours).send(
        make_request(1, "configure", parameters), [listeners["kms"].fileno(), listeners["keys"].fileno()]
    )
    os.dup2(theirs.fileno(), 0)
    arguments = command(MODULE)
    os.execve(arguments[0], arguments, {**ENVIRONMENT, **{n: environment[n] for n in KEPT if n in environment}})


def _runtime_directory(environment: Mapping[str, str]) -> Path:
    directory = environment.get("RUNTIME_DIRECTORY")
    if not directory:
        raise ConfigurationError(file="RUNTIME_DIRECTORY", reason="it is not set: systemd starts this program")
    return Path(directory)


if __name__ == "__main__":
    main()
