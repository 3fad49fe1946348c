"""The engine's end of its holder: what is deposited there, and what a successor finds.

Configuration and signed bodies only, no secret but the key itself, which is memory of its own and never in a message:

| name | value | descriptors | when |
|---|---|---|---|
| ``volume`` | ebsd's configuration, check value of the key | control listener, lineage directory | at attach |
| ``key`` | its length | secret memory | at attach, if there is a key |
| ``leaves`` | - | memory with the layers whose leaves were compared with a signed root, and that body | at attach |
| ``record`` | the body that was signed last | - | at attach, and before each later one is answered |
| ``maps`` | size of the volume | durable map (watched), live map | at attach, after a growth |
| ``growth`` | the same | the same and further segments (watched) of the head | before a growth |
| ``head-N`` | N | segments of layer N (watched) | at attach; before a seal may switch to it |
| ``next`` | N | segments of layer N | before the record that knows it is answered |
| ``sealed`` | the last seal's answer | - | before it is given |
| ``fuse`` | - | the connection | before requests are read |

A successor writes to the newest ``head-N``: the record that knows it is on the disk, and if the dead engine had
switched, going back would change a snapshot (rule R18). Of the live maps it takes the first, in the order ``maps``,
``growth``, that still has a name: a longer one takes the place of the present one by rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from ebsd.domain.errors import ProtocolError, RemoteError
from ebsd.ipc.blocking_channel import BlockingChannel
from ebsd.volume.holder import ENGINE_CHANNEL

DEADLINE: Final = 60.0
"""Seconds for the holder to take a deposit; it does nothing else meanwhile."""


class Deposit(NamedTuple):
    """What the holder gives to a successor; the descriptors are the receiver's."""

    value: dict[str, Any]
    fds: list[int]


class Holding(Protocol):
    """Where an engine leaves what its successor needs. Every call returns when it is done; for a thread."""

    @property
    def pid(self) -> int:
        """The process that stands for the volume as long as it is served."""
        ...

    def keep(self, name: str, value: Mapping[str, Any], fds: Sequence[int] = (), *, watch: Sequence[int] = ()) -> None:
        """Deposit in place of what has that name; the descriptors stay the caller's.

        ``watch``: places in ``fds`` of files whose errors of write-back must be found out if this engine dies.
        """
        ...

    def drop(self, name: str) -> None: ...

    def arm(self, *, failed_at: int, deaths: int) -> None:
        """Have this engine replaced if it dies; ``failed_at``: offset of the failed flag in a live map."""
        ...

    def serving(self) -> None:
        """Say that this engine, which goes on for another one, serves: until then it has a deadline."""
        ...

    def done(self) -> None:
        """Have this engine replaced no more, and the key wiped."""
        ...


class NoHolder:
    """For an engine that nobody replaces."""

    @property
    def pid(self) -> int:
        return os.getpid()

    def keep(self, name: str, value: Mapping[str, Any], fds: Sequence[int] = (), *, watch: Sequence[int] = ()) -> None:
        """Nothing."""

    def drop(self, name: str) -> None:
        """Nothing."""

    def arm(self, *, failed_at: int, deaths: int) -> None:
        """Nothing."""

    def serving(self) -> None:
        """Nothing."""

    def done(self) -> None:
        """Nothing."""


class AtHolder:
    """A real holder, this process's parent."""

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel
        self._asking = threading.Lock()
        self.pid = os.getppid()

    def keep(self, name: str, value: Mapping[str, Any], fds: Sequence[int] = (), *, watch: Sequence[int] = ()) -> None:
        self._ask("keep", {"Name": name, "Value": dict(value), "Watch": list(watch)}, fds)

    def drop(self, name: str) -> None:
        self._ask("drop", {"Name": name})

    def arm(self, *, failed_at: int, deaths: int) -> None:
        self._ask("arm", {"FailedAt": failed_at, "Deaths": deaths})

    def serving(self) -> None:
        with contextlib.suppress(RemoteError):  # a holder that an earlier version started waits for nothing
            self._ask("serving", {})

    def done(self) -> None:
        self._ask("done", {})

    def _ask(self, method: str, params: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        with self._asking:
            self._channel.request(method, params, fds, deadline=DEADLINE)


class Succession(NamedTuple):
    """What a successor is told of its beginning."""

    number: int
    """How many engines there were before it."""
    since: float
    """Time of the monotonic clock at which the one before was seen dead."""
    deposits: dict[str, Deposit]


def meet_holder() -> tuple[AtHolder, Succession | None]:
    """Take the channel to the holder; with what an earlier engine left there, if this one is to go on for it.

    Blocks until it is all there. Raises ProtocolError when the holder ends meanwhile.
    """
    os.set_inheritable(ENGINE_CHANNEL, False)
    channel = BlockingChannel(socket.socket(fileno=ENGINE_CHANNEL))
    first = _packet(channel).value
    if not first["Resume"]:
        return AtHolder(channel), None
    deposits: dict[str, Deposit] = {}
    for _ in range(first["Items"]):
        value, fds = _packet(channel)
        deposits[value["Name"]] = Deposit(value["Value"], fds)
    return AtHolder(channel), Succession(first["Successor"], first["Since"], deposits)


def _packet(channel: BlockingChannel) -> Deposit:
    packet = channel.receive()
    if packet is None:
        raise ProtocolError(reason="the holder is gone")
    return Deposit(packet.message, packet.fds)


def content_of(fd: int) -> Any:
    """Return what ``sealed_memfd`` of a JSON document holds."""
    return json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
