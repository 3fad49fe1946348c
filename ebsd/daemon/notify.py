"""sd_notify: tell systemd about the state of the service.

Protocol: one datagram of NAME=VALUE lines to $NOTIFY_SOCKET (sd_notify(3)).
"""

from __future__ import annotations

import socket


def notify(address: str | None, *lines: str) -> None:
    """Send the lines when a service manager listens; without one this does nothing."""
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.sendall("\n".join(lines).encode())
