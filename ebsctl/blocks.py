"""Blocks of snapshots for programs: all pages of a list, and many blocks at once to and from memory files::

    from ebsctl.blocks import Blocks
    from ebsctl.client import Client

    blocks = Blocks(Client())
    for number, token in blocks.stored("monday"):
        (data,) = blocks.read("monday", [(number, token)])

Every block that is read is compared with its checksum. Errors as of ``ebsctl.client``, and ProtocolError for data that
is not what the reply says.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Final

from ebsctl.client import Client
from ebsd.domain.blocks import BLOCK, MOST_AT_ONCE
from ebsd.domain.errors import ProtocolError
from ebsd.wire.descriptors import close_all

EBS: Final = "io.ebsd.EBS"


class Blocks:
    """The methods of io.ebsd.EBS, several calls of them where one does not do."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def call(self, method: str, **members: object) -> dict[str, Any]:
        """Call a method without data and return the members of its reply."""
        reply = self._client.call(self._client.path, f"{EBS}.{method}", members)
        close_all(reply.descriptors)
        return reply.parameters

    def pages(self, method: str, **members: object) -> Iterator[dict[str, Any]]:
        """Yield the replies to ListSnapshotBlocks or ListChangedBlocks until there is no further one."""
        token: str | None = None
        while True:
            reply = self.call(method, **members, NextToken=token)
            yield reply
            token = reply.get("NextToken")
            if token is None:
                return

    def stored(self, snapshot: str) -> Iterator[tuple[int, str]]:
        """Yield (number, token) of every block that holds data, ascending."""
        for page in self.pages("ListSnapshotBlocks", SnapshotId=snapshot):
            for block in page["Blocks"]:
                yield block["BlockIndex"], block["BlockToken"]

    def changed(self, first: str, second: str, *, exact: bool = False) -> Iterator[tuple[int, str | None]]:
        """Yield (number, token in the second snapshot) of every block that was changed; None: it reads as zeros."""
        pages = self.pages(
            "ListChangedBlocks", FirstSnapshotId=first, SecondSnapshotId=second, Exact=True if exact else None
        )
        for page in pages:
            for block in page["ChangedBlocks"]:
                yield block["BlockIndex"], block.get("SecondBlockToken")

    def read(self, snapshot: str, blocks: Sequence[tuple[int, str]]) -> list[bytes]:
        """Return the data of up to 32 blocks, (number, token) each."""
        wanted = [{"BlockIndex": number, "BlockToken": token} for number, token in blocks]
        members = {"SnapshotId": snapshot, "Blocks": wanted}
        reply = self._client.call(self._client.path, f"{EBS}.GetSnapshotBlocks", members)
        try:
            fd = reply.descriptors[int(reply.parameters["DataDescriptor"])]
            data = [os.pread(fd, BLOCK, at * BLOCK) for at in range(len(blocks))]
        except (IndexError, OSError) as exc:
            raise ProtocolError(reason="the data did not come with the reply") from exc
        finally:
            close_all(reply.descriptors)
        for one, checksum in zip(data, reply.parameters["Checksums"], strict=True):
            if len(one) != BLOCK or digest(one) != checksum:
                raise ProtocolError(reason="a block does not have its checksum")
        return data

    def write(self, snapshot: str, blocks: Sequence[tuple[int, bytes]]) -> None:
        """Write up to 32 blocks, (number, 512 KiB) each; they are durable at return."""
        fd = os.memfd_create("blocks", os.MFD_CLOEXEC)
        try:
            for _, data in blocks:
                os.write(fd, data)
            given = [{"BlockIndex": number, "Checksum": digest(data)} for number, data in blocks]
            members = {"SnapshotId": snapshot, "Blocks": given, "DataDescriptor": 0}
            reply = self._client.call(self._client.path, f"{EBS}.PutSnapshotBlocks", members, [fd])
            close_all(reply.descriptors)
        finally:
            os.close(fd)


def digest(data: bytes) -> str:
    """Return a checksum as the API has it: SHA-256 in base64."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def batches(items: Iterator[Any]) -> Iterator[list[Any]]:
    """Yield as many as one call takes at a time."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == MOST_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
