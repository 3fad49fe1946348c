"""How worker processes begin and end: as holders of keys that serve descriptor 0, and do not wait for stuck threads."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import NoReturn

import trio

from ebsd.domain.errors import EbsdError
from ebsd.ipc.channel import Channel, ChannelClosed, ChannelHandler, serve
from ebsd.volume import secrecy


async def serve_until_gone(parent: socket.socket, handlers: Mapping[str, ChannelHandler]) -> None:
    """Answer ebsd's requests until its end of the channel is closed."""
    async with Channel(parent) as channel:
        with contextlib.suppress(ChannelClosed):
            await serve(channel, handlers)


def run_worker(
    log: logging.Logger, run: Callable[[socket.socket], Awaitable[None]], *, gently: bool = False
) -> NoReturn:
    """Become a holder of keys, have ``run`` serve the socket on descriptor 0, and end the process with it.

    ``gently``: behind everybody else who wants the CPU. An EbsdError that ends ``run`` is logged; exit status 1.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    parent = secrecy.begin(log, serves_device=False)
    if gently:
        with contextlib.suppress(OSError):
            os.nice(10)
    status = 0
    try:
        trio.run(run, parent)
    except* EbsdError as group:
        log.error("%s", group.exceptions[0])
        status = 1
    # A thread may be in a system call that does not return, as of a pipe: the interpreter would wait for it.
    os._exit(status)
