"""How worker processes begin and end: as holders of keys that serve descriptor 0, and do not wait for stuck threads."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NoReturn

import trio

from ebsd.domain.errors import EbsdError
from ebsd.ipc import confinement
from ebsd.ipc.channel import Channel, ChannelClosed, ChannelHandler, serve
from ebsd.ipc.confinement import Kind
from ebsd.volume import secrecy


async def serve_until_gone(parent: socket.socket, handlers: Mapping[str, ChannelHandler]) -> None:
    """Answer ebsd's requests until its end of the channel is closed; confined from the first on."""
    async with Channel(parent) as channel:
        with contextlib.suppress(ChannelClosed):
            await serve(channel, enclosing(handlers))


def enclosing(handlers: Mapping[str, ChannelHandler]) -> dict[str, ChannelHandler]:
    """Return handlers the first of which to be called confines the process to the directories that came with it."""
    enclosed = False

    def guarded(handler: ChannelHandler) -> ChannelHandler:
        async def handle(params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
            nonlocal enclosed
            if not enclosed:
                enclosed = True
                confinement.enclose(logging.getLogger("ebsd-worker"), fds)
            return await handler(params, fds)

        return handle

    return {name: guarded(handler) for name, handler in handlers.items()}


def run_worker(
    log: logging.Logger, run: Callable[[socket.socket], Awaitable[None]], *, gently: bool = False
) -> NoReturn:
    """Become a holder of keys, have ``run`` serve the socket on descriptor 0, and end the process with it.

    ``gently``: behind everybody else who wants the CPU. An EbsdError that ends ``run`` is logged; exit status 1.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    parent = secrecy.begin(log, Kind.WORKER)
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
