"""Looks at one descriptor of a client, in a process that can be killed when his file does not answer."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from ebsd.domain.errors import IncorrectState
from ebsd.ipc import confinement
from ebsd.ipc.channel import BlockingChannel
from ebsd.ipc.confinement import Kind
from ebsd.volume.image_source import look_at


def _look(params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
    """{} with one descriptor -> {"Image": what ``look_at`` says}."""
    if len(fds) != 1:
        raise IncorrectState(reason="one descriptor is looked at")
    try:
        return {"Image": look_at(fds[0])}, ()
    finally:
        os.close(fds[0])


if __name__ == "__main__":
    log = logging.getLogger("ebsd-probe")
    confinement.begin(log, Kind.PROBE)
    confinement.enclose(log)
    with BlockingChannel.of_descriptor() as channel:
        channel.serve_one({"look": _look})
