"""The broker's two sockets: kms.sock for ebsd, keys.sock for users, each with its interfaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import trio

import ebsd
from ebsd.ipc.peer import refuse_unusable
from ebsd.ipc.varlink_server import Handler, VarlinkServer
from ebsd.kms.audit.boundary import Boundary
from ebsd.kms.audit.throttle import Throttle
from ebsd.kms.audit_interface import AuditInterface
from ebsd.kms.broker import Broker
from ebsd.kms.broker_interface import BrokerInterface, admit_only
from ebsd.kms.descriptors import Descriptors
from ebsd.kms.keyservice_interface import KeyServiceInterface
from ebsd.kms.kms_interface import KmsInterface
from ebsd.kms.sessions import Sessions

_VENDOR: Final = "ebsd"
_PRODUCT: Final = "ebsd-kms"
_URL: Final = ""
_EBSD_CONNECTIONS: Final = 256
"""Connections on kms.sock; all of them are ebsd's own."""
_CALLS_PER_USER: Final = 4
"""Of keys.sock, at a time: policies are judged between all others' calls, and a user can write one that takes long."""


class Servers:
    """The two Varlink servers over one broker."""

    def __init__(
        self,
        broker: Broker,
        sessions: Sessions,
        *,
        admin_uid: int,
        shutdown: Callable[[], None],
        check_replies: bool = False,
        throttle: Throttle | None = None,
    ) -> None:
        descriptors = Descriptors()
        boundary = Boundary(broker.trail, broker, admin_uid, Throttle() if throttle is None else throttle)

        def audited(interface: str, handlers: Mapping[str, Handler]) -> dict[str, Mapping[str, Handler]]:
            """Return an entry of ``services``: nothing is served that the audit log does not see."""
            return {interface: boundary.audited(interface, handlers)}

        self.kms = VarlinkServer(
            vendor=_VENDOR,
            product=_PRODUCT,
            version=ebsd.__version__,
            url=_URL,
            services=audited(
                "io.ebsd.Broker",
                BrokerInterface(
                    broker, sessions, admin_uid, shutdown, boundary.session_answered, boundary.archive_answered
                ).handlers(),
            ),
            admit=admit_only(admin_uid),
            max_connections_per_uid=_EBSD_CONNECTIONS,
            check_replies=check_replies,
        )
        self.keys = VarlinkServer(
            vendor=_VENDOR,
            product=_PRODUCT,
            version=ebsd.__version__,
            url=_URL,
            services={
                **audited("io.ebsd.KMS", KmsInterface(broker, descriptors, admin_uid).handlers()),
                **audited("io.ebsd.KeyService", KeyServiceInterface(broker, descriptors, admin_uid).handlers()),
                **audited("io.ebsd.Audit", AuditInterface(broker.trail, descriptors, admin_uid).handlers()),
            },
            admit=refuse_unusable if admin_uid == 0 else admit_only(admin_uid),
            calls_per_uid=_CALLS_PER_USER,
            check_replies=check_replies,
        )

    async def serve(self, kms_listener: trio.socket.SocketType, keys_listener: trio.socket.SocketType) -> None:
        """Serve both sockets until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.kms.serve, kms_listener)
            nursery.start_soon(self.keys.serve, keys_listener)
