"""Client of ebsd's sockets: blocking calls, with descriptors where a method takes them. Usable as a library::

    from ebsctl.client import Client

    client = Client()
    volume = client.ec2("CreateVolume", Name="data", SizeBytes=1 << 30)["Volume"]
    print(client.ec2("AttachVolume", VolumeId=volume["VolumeId"])["Attachment"]["Path"])
    for reply in client.control_stream("WaitJob", JobId="job-..."):  # as often as the job has something to tell
        print(reply["Job"]["Done"])

Methods and members are those of the interface files in ``ebsd/wire/interfaces``. Every error is an EbsdError:
RemoteError as the server sent it, DaemonUnreachable when nobody gives a readable answer, Timeout when the
answer takes longer than the caller wants to wait, KeyServiceNotAnswering when the key service hangs: it may take as
long as it likes for a call as long as it answers GetStatus beside it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from ebsd.domain.errors import (
    DaemonUnreachable,
    InvalidParameterValue,
    KeyServiceNotAnswering,
    ProtocolError,
    RemoteError,
    Timeout,
)
from ebsd.wire.descriptors import close_all, recv_with_fds, send_with_fds
from ebsd.wire.framing import FrameReader, encode
from ebsd.wire.messages import CallMessage, parse_reply
from ebsd.wire.sockets import connect

SYSTEM_SOCKET: Final = "/run/ebsd/ebsd.sock"
KEYS_SOCKET: Final = "keys.sock"
"""Name of the key service's socket, which lies beside ebsd.sock."""

EC2: Final = "io.ebsd.EC2"
CONTROL: Final = "io.ebsd.Control"
KMS: Final = "io.ebsd.KMS"
KEY_SERVICE: Final = "io.ebsd.KeyService"
AUDIT: Final = "io.ebsd.Audit"
ARCHIVES: Final = "io.ebsd.Archives"

SILENCE: Final = 5.0
"""Seconds without an answer of the key service after which GetStatus is asked beside a call, and again."""
PROBE: Final = 5.0
"""Seconds for that answer."""

_PIECE: Final = 64 * 1024
"""Bytes asked of the socket at once."""


def default_socket(environment: Mapping[str, str], uid: int) -> str:
    """Return where ebsd.sock is when no option names it.

    In this order: EBSD_SOCKET; EBSD_RUNTIME_DIR/ebsd.sock; XDG_RUNTIME_DIR/ebsd/ebsd.sock where it exists and
    belongs to ``uid`` (the variable may have come from another user through su or sudo); SYSTEM_SOCKET.
    """
    if named := environment.get("EBSD_SOCKET"):
        return named
    if runtime := environment.get("EBSD_RUNTIME_DIR"):
        return os.path.join(runtime, "ebsd.sock")
    if session := environment.get("XDG_RUNTIME_DIR"):
        path = os.path.join(session, "ebsd", "ebsd.sock")
        try:
            status = os.stat(path)
        except OSError:
            return SYSTEM_SOCKET
        if stat.S_ISSOCK(status.st_mode) and status.st_uid == uid:
            return path
    return SYSTEM_SOCKET


class Reply(NamedTuple):
    """What a method returned; the descriptors are the receiver's to close."""

    parameters: dict[str, Any]
    descriptors: list[int]


class Client:
    """Calls ebsd (``ec2``, ``control``) and its key service (``kms``, ``key_service``, ``audit``).

    Each call has a connection of its own, so a client can be kept for as long as one likes, used by several
    threads, and outlives restarts of the daemon. Members that are None are not sent.
    """

    def __init__(self, path: str | None = None, *, timeout: float | None = None) -> None:
        """Take the path of ebsd.sock (``default_socket`` if None) and the seconds to wait for a reply."""
        self.path = path if path else default_socket(os.environ, os.geteuid())
        self.timeout = timeout

    @property
    def keys_path(self) -> str:
        """Path of keys.sock, the sibling of ebsd.sock."""
        return os.path.join(os.path.dirname(self.path), KEYS_SOCKET)

    def ec2(self, action: str, **members: object) -> dict[str, Any]:
        """Call an action of io.ebsd.EC2 and return the members of its reply."""
        return self._plain_call(self.path, EC2, action, members)

    def volumes(self, **members: object) -> list[Mapping[str, Any]]:
        """Return all volumes that DescribeVolumes gives, however many replies that takes."""
        return self._all_pages("DescribeVolumes", "Volumes", members)

    def snapshots(self, **members: object) -> list[Mapping[str, Any]]:
        """Return all snapshots that DescribeSnapshots gives, however many replies that takes."""
        return self._all_pages("DescribeSnapshots", "Snapshots", members)

    def modifications(self, **members: object) -> list[Mapping[str, Any]]:
        """Return all that DescribeVolumesModifications gives, however many replies that takes."""
        return self._all_pages("DescribeVolumesModifications", "VolumesModifications", members)

    def locks(self, **members: object) -> list[Mapping[str, Any]]:
        """Return all locks that DescribeLockedSnapshots gives, however many replies that takes."""
        return self._all_pages("DescribeLockedSnapshots", "Snapshots", members)

    def binned(self, what: str) -> list[Mapping[str, Any]]:
        """Return all Volumes, or Snapshots, in the recycle bin, however many replies that takes."""
        return self._all_pages(f"List{what}InRecycleBin", what, {})

    def _all_pages(self, action: str, what: str, members: Mapping[str, object]) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        token: str | None = None
        while True:
            page = members if token is None else {**members, "NextToken": token}
            reply = self.ec2(action, **page)
            found += reply[what]
            token = reply.get("NextToken")
            if token is None:
                return found

    def control(self, method: str, descriptors: Sequence[int] = (), **members: object) -> dict[str, Any]:
        """Call a method of io.ebsd.Control and return the members of its reply."""
        return self._plain_call(self.path, CONTROL, method, members, descriptors)

    def control_stream(self, method: str, **members: object) -> Generator[dict[str, Any], None, None]:
        """Call a method of io.ebsd.Control with ``more`` and yield the members of each reply, the last included.

        The timeout counts for all of them together. Closing the generator hangs up.
        """
        with contextlib.closing(self._replies(self.path, f"{CONTROL}.{method}", members, more=True)) as replies:
            for reply in replies:
                close_all(reply.descriptors)
                yield reply.parameters

    def archives(self, method: str, descriptor: int, **members: object) -> dict[str, Any]:
        """Call a method of io.ebsd.Archives with the descriptor of an archive; return the members of its reply."""
        return self._plain_call(self.path, ARCHIVES, method, {**members, "Descriptor": 0}, [descriptor])

    def archives_stream(self, method: str, descriptor: int, **members: object) -> Generator[dict[str, Any], None, None]:
        """As ``archives`` with ``more``: yield the members of each reply, the last included."""
        wanted = {**members, "Descriptor": 0}
        replies = self._replies(self.path, f"{ARCHIVES}.{method}", wanted, [descriptor], more=True)
        with contextlib.closing(replies):
            for reply in replies:
                close_all(reply.descriptors)
                yield reply.parameters

    def kms(self, action: str, **members: object) -> dict[str, Any]:
        """Call an action of io.ebsd.KMS that returns no descriptor; return the members of its reply."""
        return self._plain_call(self.keys_path, KMS, action, members)

    def key_service(self, method: str, descriptors: Sequence[int] = (), **members: object) -> dict[str, Any]:
        """Call a method of io.ebsd.KeyService and return the members of its reply."""
        return self._plain_call(self.keys_path, KEY_SERVICE, method, members, descriptors)

    def audit(self, method: str, descriptors: Sequence[int] = (), **members: object) -> dict[str, Any]:
        """Call a method of io.ebsd.Audit that returns no descriptor; return the members of its reply."""
        return self._plain_call(self.keys_path, AUDIT, method, members, descriptors)

    def audit_segment(self, name: str) -> int:
        """Return the descriptor of a segment of the audit log, the caller's to close."""
        reply = self.call(self.keys_path, f"{AUDIT}.OpenSegment", {"Name": name})
        return reply.descriptors[int(reply.parameters["Descriptor"])]

    def _plain_call(
        self,
        path: str,
        interface: str,
        method: str,
        members: Mapping[str, object],
        descriptors: Sequence[int] = (),
    ) -> dict[str, Any]:
        reply = self.call(path, f"{interface}.{method}", members, descriptors)
        close_all(reply.descriptors)
        return reply.parameters

    def call(self, path: str, method: str, members: Mapping[str, object], descriptors: Sequence[int] = ()) -> Reply:
        """Call a method by its full name on the socket at ``path``; its descriptors stay the caller's."""
        with contextlib.closing(self._replies(path, method, members, descriptors)) as replies:
            return next(replies)

    def _replies(
        self,
        path: str,
        method: str,
        members: Mapping[str, object],
        descriptors: Sequence[int] = (),
        *,
        more: bool = False,
    ) -> Generator[Reply, None, None]:
        """Call a method and yield its replies, of which there are several only with ``more``."""
        wanted = {name: value for name, value in members.items() if value is not None}
        try:
            message = encode(CallMessage(method, wanted, more).as_message())
        except ProtocolError as exc:
            # The members come from the caller, so this is his mistake and not the server's.
            value, parameter = "not shown", method.rpartition(".")[2]
            raise InvalidParameterValue(value=value, parameter=parameter, reason=exc.facts["reason"]) from exc
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        look = self._find_silent if deadline is None and path == self.keys_path else None
        with connect(path) as sock:
            try:
                yield from self._exchange(sock, message, descriptors, deadline, look)
            except TimeoutError as exc:
                raise Timeout(operation=method.rpartition(".")[2], seconds=self.timeout) from exc
            except ConnectionError as exc:
                raise DaemonUnreachable(socket=path, reason="it hung up without an answer") from exc
            except ProtocolError as exc:
                raise DaemonUnreachable(
                    socket=path, reason=f"its answer is unreadable ({exc.facts['reason']})"
                ) from exc
            except OSError as exc:
                raise DaemonUnreachable(socket=path, reason=exc.strerror or str(exc)) from exc

    def _exchange(
        self,
        sock: socket.socket,
        message: bytes,
        descriptors: Sequence[int],
        deadline: float | None,
        look: Callable[[], None] | None,
    ) -> Generator[Reply, None, None]:
        """Send one call and yield the replies to it; raises ConnectionError when the peer hangs up before the last.

        ``look`` is called whenever there was none for ``SILENCE`` seconds, and ends the call by raising.
        """
        self._set_timeout(sock, deadline)
        # A server that refuses a connection answers and hangs up at once: its reason may still be there.
        with contextlib.suppress(ConnectionError):
            send_with_fds(sock, message, descriptors)
        reader = FrameReader()
        received: list[int] = []
        try:
            while True:
                self._set_timeout(sock, deadline)
                while look is not None and not select.select([sock], [], [], SILENCE)[0]:
                    look()
                data, fds = recv_with_fds(sock, _PIECE)
                received += fds
                if not data:
                    raise ConnectionResetError
                for reply in map(parse_reply, reader.feed(data)):
                    handed, received = received, []
                    yield Reply(reply.parameters, handed)
                    if not reply.continues:
                        return
                reader.check()  # what was bad behind good replies is told here, before waiting for more
        except BaseException:
            close_all(received)
            raise

    def _find_silent(self) -> None:
        """Raise KeyServiceNotAnswering unless the key service says anything at all."""
        try:
            Client(self.path, timeout=PROBE).key_service("GetStatus")
        except Timeout:
            raise KeyServiceNotAnswering(seconds=f"{SILENCE + PROBE:g}") from None
        except (DaemonUnreachable, RemoteError):
            return  # the call itself meets its end, or there is somebody who refuses

    @staticmethod
    def _set_timeout(sock: socket.socket, deadline: float | None) -> None:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            sock.settimeout(left)
