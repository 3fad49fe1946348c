"""The key broker as a process: start it, adopt a running one, start it again when it dies or hangs; or wait for one.

The broker outlives an ebsd that crashes, so that a root key that was unlocked stays unlocked; it ends with an
ebsd that ends in order. Where it is a service of its own, all of that is the service manager's.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from ebsd.control.broker import Broker
from ebsd.control.host import RuntimeLayout
from ebsd.daemon.config import Config
from ebsd.domain.errors import EbsdError, KeyServiceNotAnswering, KeyServiceUnavailable
from ebsd.ipc.channel import Channel
from ebsd.ipc.process import Child, adopt, start_with_channel
from ebsd.wire import sockets

log = logging.getLogger(__name__)

MODULE: Final = "ebsd.kms"
START_DEADLINE: Final = 60.0
ADOPTION_DEADLINE: Final = 30.0
"""Seconds in which a broker that runs already must answer."""
RESTART_PAUSE: Final = (0.1, 0.5, 2.0, 10.0)
"""Seconds before each further start of a broker that keeps dying."""
WATCH_PAUSE: Final = 5.0
"""Seconds between two questions whether the broker is alive."""
WATCH_PATIENCE: Final = 10.0
"""Seconds for an answer."""
MISSES: Final = 4
"""So many questions in a row without one, and it is killed: a minute, as a service manager would have it."""


def configure_parameters(
    *,
    state_dir: Path,
    root_key: Mapping[str, str],
    admin_uid: int,
    aws: Mapping[str, Any] | None,
    may_create: bool,
    credentials_directory: str | None,
) -> dict[str, Any]:
    """Return the parameters of the broker's ``configure`` (kms/main.py)."""
    parameters = {
        "version": 1,
        "state_dir": str(state_dir),
        "root_key": dict(root_key),
        "admin_uid": admin_uid,
        "may_create": may_create,
        "credentials_directory": credentials_directory,
    }
    return parameters if aws is None else {**parameters, "aws": dict(aws)}


class BrokerLife(Protocol):
    """What ebsd does about the broker from its own start to its own end."""

    async def ensure(self) -> None:
        """Return once a broker answers, locked or in rescue perhaps; raises KeyServiceUnavailable, EbsdError."""

    async def supervise(self) -> None:
        """Keep it so; never returns."""

    async def shut_down(self) -> None:
        """Do what the end of ebsd means for the broker."""


class BrokerService:
    """The broker as a service of its own: its sockets are there, and what happens behind them is not ours."""

    def __init__(self, broker: Broker, *, patience: float = START_DEADLINE) -> None:
        self._broker = broker
        self._patience = patience

    async def ensure(self) -> None:
        limit = trio.current_time() + self._patience
        while True:
            try:
                status = await self._broker.status()
            except KeyServiceUnavailable:
                if trio.current_time() > limit:
                    raise
                await trio.sleep(RESTART_PAUSE[1])
            else:
                log.info("the key service is %s (pid %s)", status["State"], status["Pid"])
                return

    async def supervise(self) -> None:
        await trio.sleep_forever()

    async def shut_down(self) -> None:
        await trio.lowlevel.checkpoint()


class BrokerProcess:
    """Keeps one broker running on the two sockets."""

    def __init__(
        self,
        broker: Broker,
        *,
        broker_socket: Path,
        keys_socket: Path,
        state_dir: Path,
        root_key: Mapping[str, str],
        admin_uid: int,
        aws: Mapping[str, Any] | None = None,
        may_create: bool,
        credentials_directory: str | None = None,
    ) -> None:
        self._broker = broker
        self._broker_socket = broker_socket
        self._keys_socket = keys_socket
        self._configuration = configure_parameters(
            state_dir=state_dir,
            root_key=root_key,
            admin_uid=admin_uid,
            aws=aws,
            may_create=may_create,
            credentials_directory=credentials_directory,
        )
        self._listeners: tuple[socket.socket, socket.socket] | None = None
        self._child: Child | None = None
        self._channel: Channel | None = None

    async def ensure(self) -> None:
        """Adopt a broker that answers, or start one. A broker that is locked or in rescue counts as started."""
        try:
            status = await self._broker.status(deadline=ADOPTION_DEADLINE)
            self._child = adopt(int(status["Pid"]))
        except (KeyServiceUnavailable, OSError, OverflowError):  # nobody answers, or who answered is gone by now
            await self._start()
            return
        log.info("the key broker is running already (pid %s)", status["Pid"])

    def _listen(self) -> tuple[socket.socket, socket.socket]:
        """Return the two sockets. Raises KeyServiceUnavailable where a broker listens: it hangs, or was stopped, for it
        did not answer; it has the keys, so no other can be started.
        """
        made: list[socket.socket] = []
        try:
            for path, mode in ((self._broker_socket, 0o600), (self._keys_socket, 0o666)):
                made.append(sockets.listen(path, mode))
        except OSError as exc:
            for listener in made:
                listener.close()
            if exc.errno == errno.EADDRINUSE:
                reason = f"a key broker listens on {exc.filename} and does not answer"
                raise KeyServiceUnavailable(reason=reason) from exc
            raise
        return made[0], made[1]

    async def _start(self) -> None:
        if self._listeners is None:
            self._listeners = self._listen()
        child, channel = start_with_channel(MODULE)
        try:
            answer = await channel.request(
                "configure", self._configuration, [s.fileno() for s in self._listeners], deadline=START_DEADLINE
            )
        except BaseException:
            child.kill()
            with trio.CancelScope(shield=True):
                await child.wait()
            await channel.aclose()
            raise
        # Kept open: nothing is said on it any more, but the broker may not see an end before ebsd's.
        earlier, self._child, self._channel = self._channel, child, channel
        if earlier is not None:
            await earlier.aclose()
        if answer.message["State"] != "running":
            log.error("the key broker is %s: %s", answer.message["State"], answer.message["Reason"])

    async def supervise(self) -> None:
        """Start the broker again whenever it dies; never returns. Attached volumes do not notice."""
        deaths = 0
        while True:
            if self._child is not None:
                started = trio.current_time()
                await self._watched(self._child)
                deaths = 0 if trio.current_time() - started > 60 else deaths + 1
                log.error("the key broker ended unexpectedly; starting it again")
            await trio.sleep(RESTART_PAUSE[min(deaths, len(RESTART_PAUSE) - 1)])
            try:
                await self._start()
            except (EbsdError, OSError) as exc:
                deaths += 1
                self._child = None
                log.error("the key broker cannot be started: %s", exc)

    async def _watched(self, child: Child) -> None:
        """Wait for the end of the broker, and see to it where it hangs."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._guard, child)
            await child.wait()
            nursery.cancel_scope.cancel()

    async def _guard(self, child: Child) -> None:
        misses = 0
        while True:
            await trio.sleep(WATCH_PAUSE)
            try:
                await self._broker.status(deadline=WATCH_PATIENCE)
            except KeyServiceNotAnswering:
                misses += 1
            except EbsdError:  # it says something, or ends
                misses = 0
            else:
                misses = 0
            if misses == MISSES:
                log.error("the key broker (pid %d) does not answer; ending it", child.pid)
                child.kill()

    async def shut_down(self) -> None:
        """End the broker in order and wait for it; a broker that does not end within 10 s is killed."""
        child, self._child = self._child, None
        if child is None:
            return
        try:
            await self._broker.shutdown()
        except KeyServiceUnavailable as exc:
            log.warning("the key broker did not take the request to end: %s", exc)
        with trio.move_on_after(10) as patience:
            await child.wait()
        if patience.cancelled_caught:
            child.kill()
            await child.wait()
        for path in (self._broker_socket, self._keys_socket):
            path.unlink(missing_ok=True)


def broker_life(
    config: Config, layout: RuntimeLayout, broker: Broker, admin_uid: int, *, may_create: bool
) -> BrokerLife:
    """Return what the configuration wants: a broker of our own, or the service that is there."""
    if config.kms_is_service:
        return BrokerService(broker)
    return BrokerProcess(
        broker,
        broker_socket=layout.broker_socket,
        keys_socket=layout.keys_socket,
        state_dir=config.kms_state_dir,
        root_key=config.root_key,
        admin_uid=admin_uid,
        aws=config.aws,
        may_create=may_create,
        credentials_directory=os.environ.get("CREDENTIALS_DIRECTORY") or None,
    )
