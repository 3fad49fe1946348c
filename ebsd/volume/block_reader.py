"""The block reader: blocks of verified snapshots of one lineage, decrypted, each into a sealed memory file.

Started by ebsd for one caller and lineage, kept for a while, and told everything over descriptor 0 (``open``,
``list``, ``changed``, ``get``; what they take and give stands at their handlers). It ends with that channel.

1. Nothing is listed or read before record, table and map were verified under the data key, as for a copy.
2. Every chunk is compared with its leaf, where there is one, before it is decrypted.
3. Plaintext leaves in sealed memory files only, never in a message.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from ebsd.crypto.codec import CodecFactory
from ebsd.crypto.secret import Secret
from ebsd.domain.blocks import BLOCK, MOST_AT_ONCE, block_chunks, encode_checksum
from ebsd.domain.errors import IncorrectState, IntegrityFailure
from ebsd.domain.units import CHUNK, SECTOR
from ebsd.ipc.channel import ChannelHandler
from ebsd.ipc.memfds import sealed_memfd
from ebsd.store.blocklists import changed_blocks, holds_data, stored_blocks
from ebsd.store.disk import Disk, RealDisk
from ebsd.store.entries import HOLE
from ebsd.store.leaftable import read_slots
from ebsd.volume import keysession
from ebsd.volume.copier import Run, SourceFiles
from ebsd.volume.inputs import claim_of, found_in, record_of, sealed_map_of, table_of
from ebsd.volume.verify import Claim, check_leaf_root, covered_layers
from ebsd.volume.verify_snapshot import believe_snapshot, check_snapshot_map, check_snapshot_table
from ebsd.volume.worker import run_worker, serve_until_gone

log = logging.getLogger("ebsd-block-reader")

EXACT_SECONDS: Final = 5.0
"""How long one ``changed`` compares bytes at most; then its page is short."""

_SECTORS_PER_CHUNK: Final = CHUNK // SECTOR


@dataclass(slots=True)
class Opened:
    """A snapshot that was verified; its files and keys are this reader's."""

    claim: Claim
    entries: memoryview
    """u32 per chunk, format I."""
    chunks: int
    files: SourceFiles
    uuids: dict[int, bytes]
    lineage_fd: int


def opened_snapshot(
    disk: Disk, claim: Claim, answer: keysession.Answer, members: dict[str, Any], lineage_fd: int, map_fd: int
) -> Opened:
    """Verify a snapshot and return what it is; takes ``lineage_fd`` over when it returns.

    ``members``: {"AuthorityIds", "Record"}. Raises IntegrityFailure, RecordTooOld, StoreDamaged, HostFailure.
    """
    with found_in(claim):
        record = record_of(members["Record"])
        authority_ids = [str(item) for item in members["AuthorityIds"]]
        believed = believe_snapshot(claim, answer.anchor, answer.data_key, record, authority_ids)
        table = table_of(disk, lineage_fd, believed.table_count)
        check_snapshot_table(claim, believed, table)
        sealed = sealed_map_of(disk, map_fd, claim)
        check_snapshot_map(claim, believed, sealed)
        covered = covered_layers(believed.covering, sealed.entries)
        slots = read_slots(disk, lineage_fd, table.lineage, {number: table.uuid_of(number) for number in covered})
        check_leaf_root(claim, believed.covering, covered, slots)
    uuids = {entry.number: entry.uuid for entry in table.layers}
    files = SourceFiles(disk, lineage_fd, table)
    return Opened(claim, sealed.entries, sealed.chunks, files, uuids, lineage_fd)


class BlockReader:
    """The snapshots that were opened, and one data key for all of them."""

    def __init__(self, disk: Disk | None = None) -> None:
        self._disk: Disk = disk or RealDisk()
        self._opened: dict[str, Opened] = {}
        self._key: Secret | None = None
        self._factory: CodecFactory | None = None
        self._buffers = [memoryview(bytearray(BLOCK)) for _ in range(2)]

    async def run(self, parent: socket.socket) -> None:
        """Serve ebsd until it is gone; then wipe and return."""
        handlers: dict[str, ChannelHandler] = {
            "open": self._open, "list": self._list, "changed": self._changed, "get": self._get
        }  # fmt: skip
        try:
            await serve_until_gone(parent, handlers)
        finally:
            self.wipe()

    def wipe(self) -> None:
        """Clear the key and the plaintext, and close all files."""
        if self._factory is not None:
            self._factory.close()
        if self._key is not None:
            self._key.wipe()
        for buffer in self._buffers:
            buffer[:] = bytes(BLOCK)
        for opened in self._opened.values():
            opened.files.close()
            os.close(opened.lineage_fd)
        self._opened.clear()

    # --- requests of ebsd

    async def _open(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Verify a snapshot; a second one must be of the same lineage and have the same data key.

        {"Source": {"ResourceId", "Owner", "Lineage", "Size", "Cipher", "KeyArn"}, "AuthorityIds", "Record"}, as for a
        copy. Descriptors: key session, lineage directory, sealed map. {} as answer. Raises IntegrityFailure,
        RecordTooOld, the error of the session.
        """
        await trio.to_thread.run_sync(self._open_in_thread, params, fds)
        return {}, ()

    async def _list(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """{"ResourceId", "Start", "Limit"} -> {"Blocks": [number], "Next": number, or null at the end}."""
        opened = self._of(params["ResourceId"])
        found = await trio.to_thread.run_sync(stored_blocks, opened.entries, int(params["Start"]), int(params["Limit"]))
        return {"Blocks": found.blocks, "Next": found.following}, ()

    async def _changed(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Compare two snapshots.

        {"First", "Second", "Start", "Limit", "Exact"} -> {"Blocks": [[number, first holds data, second does]],
        "Next"}. With Exact, blocks that were written and have the same bytes are left out.
        """
        blocks, following = await trio.to_thread.run_sync(self._compare, params)
        return {"Blocks": blocks, "Next": following}, ()

    async def _get(self, params: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """{"ResourceId", "Blocks": [number]} -> {"Checksums": [SHA-256 in base64]}, and a sealed memory file.

        It has 512 KiB for each block, in this order; holes, and what lies behind the end of the volume, are zeros.
        Raises StoreDamaged when what is stored is not what it was.
        """
        checksums, fd = await trio.to_thread.run_sync(self._read, params["ResourceId"], params["Blocks"])
        return {"Checksums": checksums}, (fd,)

    # --- in a thread

    def _open_in_thread(self, params: dict[str, Any], fds: list[int]) -> None:
        left = list(fds)
        try:
            session_fd, lineage_fd, map_fd = left
            claim = claim_of(params["Source"], head=0)
            left.remove(session_fd)
            answer = keysession.ask(socket.socket(fileno=session_fd))
            try:
                self._check_kin(claim, answer.data_key)
                if claim.volume in self._opened:
                    raise IncorrectState(reason=f"This reader has opened {claim.volume} already")
                opened = opened_snapshot(self._disk, claim, answer, params, lineage_fd, map_fd)
            except BaseException:
                if answer.data_key is not None:
                    answer.data_key.wipe()
                raise
            left.remove(lineage_fd)
            self._opened[claim.volume] = opened
            if self._factory is None:
                self._key = answer.data_key
                self._factory = CodecFactory(answer.data_key, cipher=claim.cipher)
            elif answer.data_key is not None:
                answer.data_key.wipe()
        finally:
            for fd in left:
                os.close(fd)

    def _check_kin(self, claim: Claim, key: Secret | None) -> None:
        for other in self._opened.values():
            if (other.claim.lineage, other.claim.cipher) != (claim.lineage, claim.cipher):
                raise IncorrectState(reason=f"{claim.volume} is not of the lineage of {other.claim.volume}")
        if self._factory is None:
            return
        same = self._key.equals(key) if self._key is not None and key is not None else self._key is key
        if not same:
            raise IntegrityFailure(resource=claim.volume, reason="its data key is not that of its lineage")

    def _of(self, ident: str) -> Opened:
        try:
            return self._opened[ident]
        except KeyError:
            raise IncorrectState(reason=f"This reader has not opened {ident}") from None

    def _compare(self, params: dict[str, Any]) -> tuple[list[list[Any]], int | None]:
        first, second = self._of(params["First"]), self._of(params["Second"])
        start, limit = int(params["Start"]), int(params["Limit"])
        found = changed_blocks(first.entries, second.entries, start, limit)
        wanted, following = found.blocks, found.following
        if params["Exact"]:
            wanted, following = self._really_changed(first, second, wanted, following)
        return [[n, holds_data(first.entries, n), holds_data(second.entries, n)] for n in wanted], following

    def _really_changed(
        self, first: Opened, second: Opened, blocks: Sequence[int], following: int | None
    ) -> tuple[list[int], int | None]:
        kept: list[int] = []
        until = time.monotonic() + EXACT_SECONDS
        one, other = self._buffers
        try:
            for block in blocks:
                if time.monotonic() > until:
                    return kept, block
                self._fill(first, block, one)
                self._fill(second, block, other)
                if hashlib.sha256(one).digest() != hashlib.sha256(other).digest():
                    kept.append(block)
        finally:
            for buffer in self._buffers:
                buffer[:] = bytes(BLOCK)
        return kept, following

    def _read(self, ident: str, blocks: Sequence[int]) -> tuple[list[str], int]:
        opened = self._of(ident)
        if not 1 <= len(blocks) <= MOST_AT_ONCE:
            raise IncorrectState(reason=f"{len(blocks)} blocks at once")
        content = memoryview(bytearray(BLOCK * len(blocks)))
        try:
            checksums = []
            for at, block in enumerate(blocks):
                view = content[at * BLOCK : (at + 1) * BLOCK]
                self._fill(opened, block, view)
                checksums.append(encode_checksum(hashlib.sha256(view).digest()))
            return checksums, sealed_memfd(content)
        finally:
            content[:] = bytes(len(content))

    def _fill(self, opened: Opened, block: int, view: memoryview) -> None:
        """Read and decrypt a block; raises StoreDamaged, HostFailure."""
        if self._factory is None:
            raise AssertionError("BUG: a snapshot without a codec")
        view[:] = bytes(BLOCK)
        chunks = block_chunks(block, opened.chunks)
        at = chunks.start
        while at < chunks.stop:
            layer, first = opened.entries[at], at
            at += 1
            if layer == HOLE:
                continue
            while at < chunks.stop and opened.entries[at] == layer:
                at += 1
            part = view[(first - chunks.start) * CHUNK : (at - chunks.start) * CHUNK]
            opened.files.read(Run(first, at - first, layer), part)
            self._factory.codec(opened.uuids[layer]).decrypt_into(part, part, first * _SECTORS_PER_CHUNK)
        beyond = (block + 1) * BLOCK - opened.claim.size
        if beyond > 0:
            # Behind the end of the volume nobody could write.
            view[max(0, BLOCK - beyond) :] = bytes(min(beyond, BLOCK))


def main() -> None:
    """Become a holder of a key, serve descriptor 0, and end with it."""
    run_worker(log, BlockReader().run)


if __name__ == "__main__":
    main()
