"""ebsd while its key service waits for a passphrase: it tells so, and starts properly once that was given.

1. The passphrase goes from whoever types it to the key service, in a descriptor: never through ebsd's memory, argv or
   environment.
2. Where ebsd runs in the foreground of a terminal, ``ebsctl key unlock`` asks there, as anybody else may elsewhere.
3. Nothing of the store is adopted, recovered or served before: all of that needs the key service.
"""

from __future__ import annotations

import logging
import os
import sys
import termios
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import trio

from ebsd.control.broker import Broker
from ebsd.daemon.broker_process import BrokerLife
from ebsd.daemon.users_socket import UsersSocket
from ebsd.domain.errors import EbsdError, KeyServiceLocked, KeyServiceUnavailable
from ebsd.ipc.varlink_client import VarlinkClient
from ebsd.ipc.varlink_server import VarlinkServer

POLL_SECONDS: Final = 0.2
TRIES: Final = 3
"""Passphrases that are asked for on a terminal; after that somebody must call ``ebsctl key unlock``."""
_ENVIRONMENT: Final = ("PATH", "TERM", "LANG", "LC_ALL")

log = logging.getLogger("ebsd")


async def unlock_from(descriptor: int, broker: Broker, keys_socket: Path) -> None:
    """Have a locked key service read its passphrase from a descriptor; what it refuses is logged: it stays locked."""
    try:
        if (await broker.status())["State"] != "locked":
            log.info("the key service is not locked: the passphrase was not read")
            return
        async with await VarlinkClient.connect(keys_socket) as client:
            await client.call("io.ebsd.KeyService.Unlock", {"PassphraseDescriptor": 0}, fds=[descriptor])
    except EbsdError as exc:
        log.error("%s", exc.message)


async def why_locked(broker: Broker) -> str:
    """Return why the key service is locked, as KeyServiceLocked's reason; empty when it is not, or does not answer."""
    try:
        status = await broker.status()
    except KeyServiceUnavailable:
        return ""
    if status["State"] != "locked":
        return ""
    # The broker tells the whole message, which would stand twice in errors that are made of it.
    before, _, after = KeyServiceLocked.template.partition("{reason}")
    return str(status.get("Reason") or "").removeprefix(before).removesuffix(after)


async def wait_until_unlocked(
    broker: Broker,
    broker_process: BrokerLife,
    server: VarlinkServer,
    users_socket: UsersSocket,
    signals: AsyncIterator[int],
) -> bool:
    """Serve status and doctor until the key service is locked no more; False when a signal came first."""
    unlocked = False
    async with trio.open_nursery() as nursery:

        async def on_signal() -> None:
            await anext(signals)
            nursery.cancel_scope.cancel()

        nursery.start_soon(server.serve, users_socket.open())
        nursery.start_soon(broker_process.supervise)
        nursery.start_soon(on_signal)
        if _on_terminal():
            nursery.start_soon(_ask_on_terminal, users_socket.path)
        while not unlocked:
            await trio.sleep(POLL_SECONDS)
            try:
                unlocked = (await broker.status())["State"] != "locked"
            except EbsdError as exc:
                log.warning("%s", exc.message)
        nursery.cancel_scope.cancel()
    users_socket.close()
    return unlocked


def _on_terminal() -> bool:
    """Say whether a person looks at ebsd: in the background, reading from the terminal would stop it."""
    return os.isatty(0) and os.isatty(2) and os.tcgetpgrp(0) == os.getpgrp()


async def _ask_on_terminal(users_socket: Path) -> None:
    command = [sys.executable, "-m", "ebsctl", "--socket", str(users_socket), "key", "unlock"]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    before = termios.tcgetattr(0)
    try:
        for _ in range(TRIES):
            done = await trio.run_process(command, stdin=0, check=False, env=environment)
            if done.returncode == 0:
                return
    finally:
        termios.tcsetattr(0, termios.TCSANOW, before)  # one that was ended while it asked left the echo off
