"""Benchmark helper: how fast this host's cryptography is, in a short-lived process.

The figures are those of the product's own code paths, so that they can be compared with ``openssl speed -evp
aes-256-xts`` and ``cryptsetup benchmark`` on the same host; bytes are counted against elapsed time on one core.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from ebsd.crypto import xts
from ebsd.crypto.kdf import layer_key
from ebsd.crypto.secret import Secret
from ebsd.domain.model import Cipher
from ebsd.domain.units import KIB, MIB, SECTOR
from ebsd.ipc import confinement
from ebsd.ipc.blocking_channel import BlockingChannel
from ebsd.ipc.confinement import Kind

REQUESTS: Final = (4 * KIB, 64 * KIB, MIB)
SECONDS: Final = 0.4
"""How long each row is measured."""


def measure(params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
    """Return ``{"Rows": [{"Name", "RequestBytes", "BytesPerSecond"}], "DerivationMicroseconds"}``."""
    rows = []
    with Secret.random(64) as data_key:
        started = time.perf_counter()
        derived = layer_key(data_key, bytes(16), 0, SECTOR, Cipher.AES_256_XTS)
        derivation = time.perf_counter() - started
        with derived, xts.XtsKey(derived) as key:
            for size in REQUESTS:
                source, target = bytearray(size), bytearray(size)
                for name, run in (("encrypt", key.encrypt), ("decrypt", key.decrypt)):
                    rate = _rate(lambda run=run, a=source, b=target: run(a, b, unit=SECTOR, first_tweak=0), size)  # type: ignore[misc]
                    rows.append({"Name": f"aes-256-xts {name}", "RequestBytes": size, "BytesPerSecond": rate})
    return {"Rows": rows, "DerivationMicroseconds": round(derivation * 1e6)}, []


def _rate(step: Callable[[], None], size: int) -> int:
    step()
    steps = 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < SECONDS:
        for _ in range(8):
            step()
        steps += 8
    return round(steps * size / elapsed)


def main() -> None:
    """Serve the one request on descriptor 0."""
    log = logging.getLogger("ebsd-bench")
    confinement.begin(log, Kind.PROBE)
    confinement.enclose(log)
    BlockingChannel.of_descriptor().serve_one({"measure": measure})


if __name__ == "__main__":
    main()
