"""Checker: examines the store in a process of its own, so that ebsd's event loop does nothing that grows with it.

It gets one request on descriptor 0, with four descriptors: the image of the catalog, what to look at and what the key
service knows (JSON), a file for the findings (JSON), and 16 bytes in which it counts (chunks looked at, chunks in all).
It has no key, and it only reads.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import sys
from pathlib import Path
from typing import Any, Final

from ebsd.ipc import confinement
from ebsd.ipc.blocking_channel import BlockingChannel
from ebsd.ipc.confinement import Kind
from ebsd.store.check import Anchor, Examination
from ebsd.store.disk import RealDisk, pread_all, pwrite_all
from ebsd.store.layout import StateLayout

log = logging.getLogger("ebsd-checker")

COUNTERS: Final = struct.Struct("<QQ")
MOST_FINDINGS: Final = 10_000
Result = tuple[dict[str, Any], list[int]]


def check(params: dict[str, Any], fds: list[int]) -> Result:
    """Examine; the findings go to the third descriptor. Returns how many there are in all."""
    image_fd, request_fd, output, counters = fds
    confinement.enclose(log, paths=(params["StateDirectory"], params["LiveDirectory"]))
    disk = RealDisk()
    try:
        image = _all_of(disk, image_fd)
        request = json.loads(_all_of(disk, request_fd))
        anchors, lineages = request["Anchors"], request["Lineages"]
        examination = Examination(
            disk,
            StateLayout(Path(params["StateDirectory"])),
            Path(params["LiveDirectory"]),
            params["BootId"],
            os.geteuid(),
            image if params["HasCatalog"] else None,
            None if anchors is None else {name: None if a is None else Anchor(*a) for name, a in anchors.items()},
            None if lineages is None else frozenset(lineages),
            lambda done, total: pwrite_all(disk, counters, COUNTERS.pack(done, total), 0),
        )
        findings = examination.run()
        members = [finding.as_members() for finding in findings[:MOST_FINDINGS]]
        pwrite_all(disk, output, json.dumps(members).encode(), 0)
        return {"Count": len(findings)}, []
    finally:
        for fd in fds:
            os.close(fd)


def _all_of(disk: RealDisk, fd: int) -> bytes:
    return bytes(pread_all(disk, fd, os.fstat(fd).st_size, 0, "request"))


def main() -> None:
    """Serve the one request on descriptor 0, behind everybody else on this host."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    confinement.begin(log, Kind.CHECKER)
    with contextlib.suppress(OSError):
        os.nice(10)
    BlockingChannel.of_descriptor().serve_one({"check": check})


if __name__ == "__main__":
    main()
