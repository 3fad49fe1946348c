"""The daemon's end of a volume process: start it, speak to it, find it again, see it die."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from ebsd.domain.errors import DaemonUnreachable, EbsdError, ProtocolError
from ebsd.ipc.channel import Channel
from ebsd.ipc.process import Child, adopt, start_with_channel
from ebsd.ipc.sockets import connect
from ebsd.wire import sockets as blocking_sockets

MODULE: Final = "ebsd.volume"
CONFIGURE_DEADLINE: Final = 60.0
CONTROL_DEADLINE: Final = 15.0
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


class VolumeLink:
    """One running volume process. Requests are answered one at a time."""

    def __init__(self, volume: str, child: Child, channel: Channel) -> None:
        self.volume = volume
        self.child = child
        self._channel = channel
        self.stopping = False
        """Set when its end is wanted, so that nobody takes it for a crash."""

    @classmethod
    def start(cls, volume: str) -> VolumeLink:
        """Start a volume process; it does nothing until ``configure``."""
        return cls(volume, *start_with_channel(MODULE))

    @classmethod
    async def find(cls, volume: str, control_socket: Path) -> VolumeLink | None:
        """Take over a volume process that an earlier ebsd started; None when none answers.

        The socket lies in a directory that only ebsd's uid can enter and was bound by ebsd itself, so who
        answers is a process ebsd gave it to.
        """
        try:
            stream = await connect(control_socket, kind=socket.SOCK_SEQPACKET, deadline=CONTROL_DEADLINE)
        except DaemonUnreachable:
            return None
        channel = Channel(stream)
        try:
            hello = (await channel.request("hello", {}, deadline=CONTROL_DEADLINE)).message
            if hello["VolumeId"] != volume:
                raise ProtocolError(reason=f"the control socket of {volume} is answered for {hello['VolumeId']}")
            return cls(volume, adopt(int(hello["Pid"])), channel)
        except (EbsdError, ProcessLookupError):
            await channel.aclose()
            return None

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
        return (await self._channel.request("status", {}, deadline=CONTROL_DEADLINE)).message

    async def prepare_seal(self, head: int, segments: Sequence[int]) -> tuple[int, bytes]:
        """Hand over the head that a snapshot will switch to; returns (generation, signed record that knows it)."""
        answer = (
            await self._channel.request("prepare_seal", {"Head": head}, segments, deadline=CONTROL_DEADLINE)
        ).message
        return answer["Generation"], base64.b64decode(answer["Record"])

    async def seal(self, snapshot: str, account: str, output: int) -> Sealed:
        """Take the point in time and switch heads; the sealed map goes to ``output``, durable at return."""
        params = {"SnapshotId": snapshot, "Account": account}
        answer = (await self._channel.request("seal", params, [output], deadline=STOP_DEADLINE)).message
        return Sealed.of(answer)

    async def sealed_again(self, snapshot: str) -> Sealed:
        """Return the answer of the last ``seal`` again, whose receiver is gone."""
        answer = (await self._channel.request("sealed", {"SnapshotId": snapshot}, deadline=STOP_DEADLINE)).message
        return Sealed.of(answer)

    async def hashed(self, taken: Sequence[str]) -> tuple[bool, dict[str, tuple[int, bytes]]]:
        """Fetch records of snapshots that the process signed again; ``taken`` are on the disk and not wanted any more.

        Returns (whether more may come, snapshot -> (generation, signed record)).
        """
        answer = (await self._channel.request("hashed", {"Taken": list(taken)}, deadline=CONTROL_DEADLINE)).message
        records = {
            snapshot: (int(found["Generation"]), base64.b64decode(found["Record"]))
            for snapshot, found in answer["Records"].items()
        }
        return bool(answer["Pending"]), records

    async def grow(self, size: int, segments: Sequence[int]) -> None:
        """Tell the process that its volume has grown; ``segments`` are those of the head beyond the ones it has."""
        await self._channel.request("grow", {"Size": size}, segments, deadline=STOP_DEADLINE)

    async def flush(self) -> None:
        await self._channel.request("flush", {}, deadline=STOP_DEADLINE)

    async def stop(self) -> Stopped:
        """Flush, sign and wipe.

        The FUSE connection must be gone. The process waits for ``end`` afterwards, so that the record can be
        written while its flock still keeps others from the live map.
        """
        self.stopping = True
        answer = (await self._channel.request("stop", {}, deadline=STOP_DEADLINE)).message
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


def control_listener(path: Path) -> socket.socket:
    """Bind the control socket of a volume process; the process inherits it, ebsd keeps none."""
    path.unlink(missing_ok=True)
    return blocking_sockets.listen(path, 0o600, socket.SOCK_SEQPACKET)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
