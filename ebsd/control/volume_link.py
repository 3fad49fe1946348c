"""The daemon's end of a volume process: start it, speak to it, find it again, see it die.

1. A request that is not answered in time costs the channel, never the volume: the next request connects again through
   the process's control socket. The process handles what was sent before, in order, before what comes later.
2. What may take minutes is asked only of a process that answers ``hello`` now.
3. What ebsd watches is the holder. When its engine ends and it does not, another engine goes on: what may be asked
   twice is asked again, and of the rest the outcome is unknown, as when a process does not answer.
"""

from __future__ import annotations

import base64
import math
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from ebsd.domain.errors import (
    DaemonUnreachable,
    EbsdError,
    EngineReplaced,
    ProtocolError,
    Timeout,
    VolumeNotAnswering,
)
from ebsd.ipc.channel import Channel, ChannelClosed
from ebsd.ipc.commands import light_command
from ebsd.ipc.process import Child, adopt, start_with_channel
from ebsd.ipc.sockets import connect
from ebsd.wire import sockets as blocking_sockets

MODULE: Final = "ebsd.volume.holder"
CONFIGURE_DEADLINE: Final = 60.0
CONTROL_DEADLINE: Final = 15.0
TAKE_OVER_DEADLINE: Final = 30.0
"""Seconds in which an engine must go on for one that ended; it may have to wait for what the host cached."""

ATTEMPTS: Final = 4
"""How often one thing is asked, of one engine after the other."""

SUCCESSOR_PAUSE: Final = 0.02
"""Seconds between two attempts to reach an engine."""

END_PATIENCE: Final = 1.0
"""Seconds in which a holder ends after its engine, if no other is to follow."""

HOLD_DEADLINE: Final = 4.0
"""For requests to be held, which waits for those under way; below what the processes grant (``volume/meeting.py``)."""

STOP_DEADLINE: Final = 600.0
"""The last flush of a volume may have to write back what the host cached for it."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What the volume process found, before anything is exposed."""

    size: int
    generation: int
    unverified: bool
    blank: bool
    next_record: bytes | None
    """Signed record open{g+1} for the record file; None for a read-only attachment."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """What a volume process says of a point in time it took."""

    record: bytes
    """The snapshot's signed record."""
    pause_us: int
    """Microseconds for which I/O was held."""
    left: frozenset[int]
    """Layers that the volume moved chunks off between the snapshot before and this one."""

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Sealed:
        # A process that an earlier version started says nothing of layers that it left.
        return cls(
            base64.b64decode(answer["Record"]), int(answer["PauseMicroseconds"]), frozenset(answer.get("Left", ()))
        )


@dataclass(frozen=True, slots=True)
class Stopped:
    """What a volume process says at its end."""

    generation: int
    record: bytes | None
    """Signed record clean{g+1}; None when read-only."""
    left: frozenset[int]
    """Layers that the volume moved chunks off since its last snapshot."""


@dataclass(frozen=True, slots=True)
class Drained:
    """What a volume process says of draining."""

    pending: bool
    """It is at it."""
    moved: int
    """Chunks that the last pass moved."""
    left: frozenset[int]
    """Layers that chunks were moved off, by this or by writes, since the last snapshot; without what was taken."""


class VolumeLink:
    """One running volume process. Requests are answered one at a time."""

    def __init__(self, volume: str, child: Child, channel: Channel, control_socket: Path) -> None:
        self.volume = volume
        self.child = child
        self._channel = channel
        self._control_socket = control_socket
        self._asking = trio.Lock()
        self.stopping = False
        """Set when its end is wanted, so that nobody takes it for a crash."""

    @classmethod
    def start(cls, volume: str, control_socket: Path) -> VolumeLink:
        """Start a volume process; it does nothing until ``configure``."""
        return cls(volume, *start_with_channel(MODULE, light_command(MODULE)), control_socket)

    @classmethod
    async def find(cls, volume: str, control_socket: Path) -> VolumeLink | None:
        """Take over a volume process that an earlier ebsd started; None when none answers.

        The socket lies in a directory that only ebsd's uid can enter and was bound by ebsd itself, so who
        answers is a process ebsd gave it to.
        """
        try:
            channel, pid = await _greet_any(volume, control_socket, deadline=CONTROL_DEADLINE)
        except EbsdError:
            return None
        try:
            return cls(volume, adopt(pid), channel, control_socket)
        except ProcessLookupError:
            await channel.aclose()
            return None

    async def answering(self) -> bool:
        """Wait, however long, until the process answers; False when it has ended instead."""
        answered = False
        async with trio.open_nursery() as nursery:

            async def greet() -> None:
                nonlocal answered
                try:
                    channel, _ = await _greet_any(self.volume, self._control_socket, deadline=math.inf)
                except EbsdError:
                    return  # nobody listens there: only its end is left to wait for
                await channel.aclose()
                answered = True
                nursery.cancel_scope.cancel()

            nursery.start_soon(greet)
            await self.child.wait()
            nursery.cancel_scope.cancel()
        return answered

    async def _ask(
        self,
        method: str,
        params: Mapping[str, Any],
        fds: Sequence[int] = (),
        *,
        deadline: float = CONTROL_DEADLINE,
        greet: bool = True,
        once: bool = False,
        ends: bool = False,
    ) -> dict[str, Any]:
        """Ask one thing, over a new channel when the last one was given up; see the rules of the module.

        ``once``: what an engine was asked that ended then may have been done. ``ends``: to end is its answer.
        """

        async def ask() -> dict[str, Any]:
            if greet and deadline > CONTROL_DEADLINE:
                await self._channel.request("hello", {}, deadline=CONTROL_DEADLINE)
            return (await self._channel.request(method, params, fds, deadline=deadline)).message

        async with self._asking:
            try:
                if self._channel.closed:
                    await self._find_successor()
                for _ in range(ATTEMPTS):
                    try:
                        return await ask()
                    except ChannelClosed:
                        await self._find_successor()
                    if ends:
                        return {}
                    if once:
                        break
                raise EngineReplaced(volume=self.volume, reason="its engine ended, and another one goes on")
            except Timeout as exc:
                raise VolumeNotAnswering(volume=self.volume, reason=exc.message.rstrip(".")) from exc

    async def _find_successor(self) -> None:
        """Connect to whichever engine serves now; raises ChannelClosed when none will any more."""
        with trio.move_on_after(TAKE_OVER_DEADLINE):
            while True:
                try:
                    self._channel = await self._connected_again()
                except ChannelClosed:
                    if self.child.poll() or not await self.answering():
                        raise
                else:
                    return
        raise VolumeNotAnswering(volume=self.volume, reason="its engine ended, and no other has answered yet")

    async def _connected_again(self) -> Channel:
        if self.child.poll():
            raise ChannelClosed(reason=f"the volume process of {self.volume} has ended")
        try:
            channel, pid = await _greet(self.volume, self._control_socket, deadline=CONTROL_DEADLINE)
        except DaemonUnreachable as exc:
            with trio.move_on_after(END_PATIENCE):  # it is not gone quite at once
                await self.child.wait()
                raise ChannelClosed(reason=f"the volume process of {self.volume} has ended") from exc
            raise VolumeNotAnswering(volume=self.volume, reason="nobody listens on its control socket") from exc
        if pid != self.child.pid:
            await channel.aclose()
            raise ProtocolError(reason=f"the control socket of {self.volume} is answered by another process")
        return channel

    async def configure(self, configuration: Mapping[str, Any], record: bytes, fds: Sequence[int]) -> Verified:
        """Hand over everything but the FUSE connection; raises what the verification found wrong."""
        params = {**configuration, "Record": base64.b64encode(record).decode()}
        answer = (await self._channel.request("configure", params, fds, deadline=CONFIGURE_DEADLINE)).message
        next_record = answer["NextRecord"]
        return Verified(
            answer["Size"],
            answer["Generation"],
            answer["Unverified"],
            answer["Blank"],
            None if next_record is None else base64.b64decode(next_record),
        )

    async def serve(self, fuse: int) -> None:
        """Hand over the FUSE connection; returns when requests are answered."""
        await self._channel.request("serve", {}, [fuse], deadline=CONTROL_DEADLINE)

    async def status(self) -> dict[str, Any]:
        return await self._ask("status", {})

    async def prepare_seal(self, head: int, segments: Sequence[int]) -> tuple[int, bytes]:
        """Hand over the head that a snapshot will switch to; returns (generation, signed record that knows it)."""
        answer = await self._ask("prepare_seal", {"Head": head}, segments)
        return answer["Generation"], base64.b64decode(answer["Record"])

    async def seal(self, snapshot: str, account: str, output: int) -> Sealed:
        """Take the point in time and switch heads; the sealed map goes to ``output``, durable at return."""
        params = {"SnapshotId": snapshot, "Account": account}
        return Sealed.of(await self._ask("seal", params, [output], deadline=STOP_DEADLINE, once=True))

    async def gather(self, snapshot: str, account: str, output: int) -> None:
        """Begin a seal that shares its moment with other volumes, up to where it only waits for them.

        A process that an earlier version started answers NotSupported.
        """
        params = {"SnapshotId": snapshot, "Account": account}
        await self._ask("gather", params, [output], deadline=STOP_DEADLINE, once=True)

    async def hold(self, snapshot: str) -> None:
        """Have requests held from before the return until ``go``, or until the process loses patience."""
        await self._ask("hold", {"SnapshotId": snapshot}, deadline=HOLD_DEADLINE, once=True)

    async def go(self, snapshot: str) -> Sealed:
        """Take the point in time for which requests are held; otherwise as ``seal``."""
        # No greeting before: every millisecond is one for which I/O stands still.
        params = {"SnapshotId": snapshot}
        return Sealed.of(await self._ask("go", params, deadline=STOP_DEADLINE, greet=False, once=True))

    async def let_go(self, snapshot: str) -> None:
        """Have requests go on without a point in time."""
        await self._ask("let_go", {"SnapshotId": snapshot})

    async def sealed_again(self, snapshot: str) -> Sealed:
        """Return the answer of the last ``seal`` again, whose receiver is gone."""
        return Sealed.of(await self._ask("sealed", {"SnapshotId": snapshot}, deadline=STOP_DEADLINE))

    async def hashed(self, taken: Sequence[str]) -> tuple[bool, dict[str, tuple[int, bytes]]]:
        """Fetch records of snapshots that the process signed again; ``taken`` are on the disk and not wanted any more.

        Returns (whether more may come, snapshot -> (generation, signed record)).
        """
        answer = await self._ask("hashed", {"Taken": list(taken)})
        records = {
            snapshot: (int(found["Generation"]), base64.b64decode(found["Record"]))
            for snapshot, found in answer["Records"].items()
        }
        return bool(answer["Pending"]), records

    async def drain(self, layers: Sequence[int]) -> None:
        """Say which sealed layers no other map names: the process moves its chunks off the small ones of them."""
        await self._ask("drain", {"Layers": list(layers)})

    async def drained(self, taken: Iterable[int] = ()) -> Drained:
        """Ask how far that is, and what the volume has left; ``taken`` was told before, and is noted."""
        answer = await self._ask("drained", {"Taken": sorted(taken)})
        return Drained(bool(answer["Pending"]), int(answer["Moved"]), frozenset(answer["Left"]))

    async def grow(self, size: int, head: int, segments: Sequence[int]) -> None:
        """Tell the process that its volume has grown; ``segments`` are those of ``head`` beyond the ones it has."""
        await self._ask("grow", {"Size": size, "Head": head}, segments, deadline=STOP_DEADLINE)

    async def flush(self) -> None:
        await self._ask("flush", {}, deadline=STOP_DEADLINE)

    async def reclaim(self) -> int:
        """Have the blocks of what was discarded given back; returns how many bytes were, since the process began."""
        return int((await self._ask("reclaim", {}, deadline=STOP_DEADLINE))["Freed"])

    async def hurry(self, hurried: bool) -> None:
        """Have writes that wait for space fail at once, or let them wait again."""
        await self._ask("hurry", {"Hurried": hurried})

    async def restart_engine(self) -> int:
        """Have another engine go on, of the program as it is now; returns the ms for which nothing was served.

        Raises RemoteError (UnsupportedOperation) where none can.
        """
        await self._ask("restart", {}, deadline=STOP_DEADLINE, ends=True)
        return int((await self.status())["Engine"]["PauseMilliseconds"])

    async def stop(self) -> Stopped:
        """Flush, sign and wipe.

        The FUSE connection must be gone. The process waits for ``end`` afterwards, so that the record can be
        written while its flock still keeps others from the live map.
        """
        self.stopping = True
        answer = await self._ask("stop", {}, deadline=STOP_DEADLINE)
        record = answer["Record"]
        return Stopped(
            answer["Generation"],
            None if record is None else base64.b64decode(record),
            frozenset(answer.get("Left", ())),
        )

    async def end(self) -> None:
        """Wait until the process is gone, killing it if it does not go by itself."""
        self.stopping = True
        await self._channel.aclose()
        with trio.move_on_after(10):
            await self.child.wait()
            return
        await self.kill()

    async def leave(self) -> None:
        """Let the process go on without this link."""
        await self._channel.aclose()
        self.child.release()

    async def kill(self) -> None:
        """End the process at once and wait for it: after this no write of it can come any more."""
        self.stopping = True
        self.child.kill()
        with trio.CancelScope(shield=True):
            await self.child.wait()
        await self._channel.aclose()


async def _greet(volume: str, control_socket: Path, *, deadline: float) -> tuple[Channel, int]:
    """Connect to a control socket; returns the channel and the pid of the volume process that answers.

    Raises DaemonUnreachable when nobody listens, Timeout when nobody answers, ProtocolError for another volume's.
    """
    channel = Channel(await connect(control_socket, kind=socket.SOCK_SEQPACKET, deadline=deadline))
    try:
        hello = (await channel.request("hello", {}, deadline=None if deadline == math.inf else deadline)).message
        if hello["VolumeId"] != volume:
            raise ProtocolError(reason=f"the control socket of {volume} is answered for {hello['VolumeId']}")
        return channel, int(hello["Pid"])
    except BaseException:
        channel.close()
        raise


async def _greet_any(volume: str, control_socket: Path, *, deadline: float) -> tuple[Channel, int]:
    """As ``_greet``, but an engine that ends meanwhile may have a successor, which listens at the same socket."""
    while True:
        try:
            return await _greet(volume, control_socket, deadline=deadline)
        except ChannelClosed:
            await trio.sleep(SUCCESSOR_PAUSE)


def control_listener(path: Path) -> socket.socket:
    """Bind the control socket of a volume process; the process inherits it, ebsd keeps none."""
    path.unlink(missing_ok=True)
    return blocking_sockets.listen(path, 0o600, socket.SOCK_SEQPACKET)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
