"""Reading snapshots block by block: ListSnapshotBlocks, ListChangedBlocks and GetSnapshotBlock of the EBS direct APIs.

1. A worker process of the caller verifies a snapshot before it lists or reads any of it. Plaintext goes from it to the
   client in a sealed memory file: ebsd passes the descriptor on and never looks at it.
2. While a worker reads, nothing of the lineage is given back, and that the snapshot is there is looked at after that.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import trio

from ebsd.control.block_workers import MOST_OPENED, BlockWorkers, Worker
from ebsd.control.catalogue import Catalogue
from ebsd.control.filling import claim_members
from ebsd.control.host import Host
from ebsd.control.lineages import Lineages
from ebsd.control.sharing import Sharing
from ebsd.control.snapshot_files import SnapshotFiles
from ebsd.control.volume_link import close_all
from ebsd.domain.blocks import (
    BLOCK_TOKEN_SECONDS,
    MOST_AT_ONCE,
    MOST_LISTED,
    TOKEN_KEY_BYTES,
    Tokens,
    block_count,
    check_block,
    check_results,
)
from ebsd.domain.errors import (
    BlockOutOfRange,
    BlocksNotFound,
    BlocksNotOwned,
    InvalidParameter,
    PublicSnapshotNotReadable,
    SnapshotIdMalformed,
    SnapshotNotFound,
    SnapshotNotOwned,
    SnapshotNotReadable,
    UnrelatedSnapshots,
)
from ebsd.domain.model import Caller, Snapshot
from ebsd.domain.states import SnapshotState
from ebsd.store.catalog import Transaction

MODULE: Final = "ebsd.volume.block_reader"
OPEN_DEADLINE: Final = 120.0
TOKEN_KEY: Final = "block_token_key"
"""Catalog setting: the secret of the tokens, in hexadecimal. It opens nothing: rights are checked at each call."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page:
    """Blocks with their tokens, and what follows."""

    snapshot: Snapshot
    blocks: list[dict[str, Any]]
    """Members of Block, or of ChangedBlock."""
    expires: str
    following: str | None


class BlockReads:
    """Use cases of whoever may read a snapshot."""

    def __init__(
        self,
        host: Host,
        catalogue: Catalogue,
        files: SnapshotFiles,
        lineages: Lineages,
        sharing: Sharing,
        workers: BlockWorkers,
    ) -> None:
        self._host = host
        self._sharing = sharing
        self._catalogue = catalogue
        self._files = files
        self._lineages = lineages
        self._workers = workers
        self._tokens: Tokens | None = None

    async def list(self, caller: Caller, name: str, *, most: int | None, token: str | None, start: int | None) -> Page:
        """Return blocks that hold data, ascending (ListSnapshotBlocks)."""
        limit, tokens = check_results(most), await self._secret()
        snapshot = await self._readable(caller, name)
        request = ("list", snapshot.id)
        begin = self._begin(tokens, caller, request, token, start, snapshot.size)
        params = {"ResourceId": snapshot.id, "Start": begin, "Limit": limit}
        answer = await self._ask(caller, [snapshot], "list", params)
        expires = self._expiry()
        blocks = [
            {"BlockIndex": block, "BlockToken": tokens.block(caller.account, snapshot.id, block, expires)}
            for block in answer["Blocks"]
        ]
        following = self._following(tokens, caller, request, answer["Next"])
        return Page(snapshot, blocks, _rfc3339(expires), following)

    async def changed(
        self,
        caller: Caller,
        first_name: str | None,
        second_name: str,
        *,
        most: int | None,
        token: str | None,
        start: int | None,
        exact: bool,
    ) -> Page:
        """Return the blocks that were written between two snapshots of a lineage (ListChangedBlocks), ascending.

        Without a first one, those of the second that hold data. ``exact``: not those whose bytes are the same.
        """
        limit, tokens = check_results(most), await self._secret()
        second = await self._readable(caller, second_name)
        if first_name is None:
            page = await self.list(caller, second_name, most=most, token=token, start=start)
            renamed = [{"BlockIndex": b["BlockIndex"], "SecondBlockToken": b["BlockToken"]} for b in page.blocks]
            return Page(second, renamed, page.expires, page.following)
        first = await self._readable(caller, first_name)
        if first.lineage != second.lineage:
            raise UnrelatedSnapshots(first=first.id, second=second.id)
        request = ("changed", first.id, second.id, str(exact))
        begin = self._begin(tokens, caller, request, token, start, max(first.size, second.size))
        params = {
            "First": first.id,
            "Second": second.id,
            "Start": begin,
            "Limit": min(limit, MOST_LISTED // 2),
            "Exact": exact,
        }
        answer = await self._ask(caller, [first, second], "changed", params)
        expires = self._expiry()
        blocks = []
        for block, in_first, in_second in answer["Blocks"]:
            members: dict[str, Any] = {"BlockIndex": block}
            if in_first:
                members["FirstBlockToken"] = tokens.block(caller.account, first.id, block, expires)
            if in_second:
                members["SecondBlockToken"] = tokens.block(caller.account, second.id, block, expires)
            blocks.append(members)
        following = self._following(tokens, caller, request, answer["Next"])
        return Page(second, blocks, _rfc3339(expires), following)

    async def get(self, caller: Caller, name: str, wanted: Sequence[tuple[int, str]]) -> tuple[Sequence[str], int]:
        """Return the checksums of blocks, (number, token) each, and a descriptor of a memory file with their data."""
        if not 1 <= len(wanted) <= MOST_AT_ONCE:
            raise InvalidParameter(parameter="Blocks", reason=f"it has from 1 to {MOST_AT_ONCE} blocks")
        tokens = await self._secret()
        snapshot = await self._readable(caller, name)
        now = self._now()
        for block, token in wanted:
            check_block(block, snapshot.size)
            tokens.check_block(token, caller.account, snapshot.id, block, now)

        async def read(worker: Worker) -> tuple[Sequence[str], int]:
            params = {"ResourceId": snapshot.id, "Blocks": [block for block, _ in wanted]}
            answer, fds = await worker.request("get", params)
            return answer["Checksums"], fds[0]

        return await self._with_worker(caller, [snapshot], read)

    # --- tokens

    async def _secret(self) -> Tokens:
        if self._tokens is None:
            fresh = self._host.random(TOKEN_KEY_BYTES)

            def load(t: Transaction) -> bytes:
                known = t.setting(TOKEN_KEY)
                if known is None:
                    t.set_setting(TOKEN_KEY, fresh.hex())
                    return fresh
                return bytes.fromhex(known)

            self._tokens = Tokens(await self._catalogue.run(load))
        return self._tokens

    def _begin(
        self, tokens: Tokens, caller: Caller, request: Sequence[str], token: str | None, start: int | None, size: int
    ) -> int:
        if token is not None:
            return tokens.read_page(token, caller.account, request, self._now())
        begin = start or 0
        if not 0 <= begin < block_count(size):
            raise BlockOutOfRange(block=begin)
        return begin

    def _following(self, tokens: Tokens, caller: Caller, request: Sequence[str], block: int | None) -> str | None:
        return None if block is None else tokens.page(caller.account, request, block, self._now())

    def _expiry(self) -> int:
        return int(self._now()) + BLOCK_TOKEN_SECONDS

    def _now(self) -> float:
        return seconds_of(self._host.now())

    # --- workers

    async def _readable(self, caller: Caller, name: str) -> Snapshot:
        """Return a snapshot that the caller may read: his own, or one that is shared with him by name.

        Raises BlocksNotFound, PublicSnapshotNotReadable, SnapshotNotReadable.
        """
        try:
            found = await self._sharing.reach(caller, name)
        except (SnapshotNotFound, SnapshotIdMalformed):
            raise BlocksNotFound(snapshot=name) from None
        own = found.account == caller.account or caller.is_admin
        if not own and not await self._catalogue.run(lambda t: t.is_shared_with(found.id, caller.account)):
            raise PublicSnapshotNotReadable(snapshot=found.id)
        return readable(found)

    async def _ask(
        self, caller: Caller, snapshots: Sequence[Snapshot], method: str, params: dict[str, Any]
    ) -> dict[str, Any]:
        async def ask(worker: Worker) -> dict[str, Any]:
            answer, fds = await worker.request(method, params)
            close_all(fds)
            return answer

        return await self._with_worker(caller, snapshots, ask)

    async def _with_worker(
        self, caller: Caller, snapshots: Sequence[Snapshot], work: Callable[[Worker], Awaitable[T]]
    ) -> T:
        lineage = snapshots[0].lineage
        place = ("read", caller.account, lineage)

        async def do(worker: Worker) -> T:
            if len(worker.opened | {snapshot.id for snapshot in snapshots}) > MOST_OPENED:
                raise _Full
            for snapshot in snapshots:
                if snapshot.id not in worker.opened:
                    await self._open(caller, worker, snapshot)
            return await work(worker)

        async with self._reading(caller, snapshots):
            with contextlib.suppress(_Full):
                return await self._workers.use(place, MODULE, do)
            return await self._workers.use(place, MODULE, do)

    @asynccontextmanager
    async def _reading(self, caller: Caller, snapshots: Sequence[Snapshot]) -> AsyncIterator[None]:
        """Keep what is read from being given back; what was deleted until then is not there."""
        lineage = snapshots[0].lineage
        try:
            with self._lineages.reading(lineage):
                for snapshot in snapshots:
                    await self._readable(caller, snapshot.id)
                yield
        finally:
            with trio.CancelScope(shield=True):
                await self._lineages.catch_up(lineage)

    async def _open(self, caller: Caller, worker: Worker, snapshot: Snapshot) -> None:
        # No other record may be signed, and its floor raised, between the record that the worker gets and the floor
        # that its session tells.
        async with self._lineages.lock(snapshot.lineage), AsyncExitStack() as stack:
            fds: list[int] = []
            stack.callback(close_all, fds)
            fds.append(await stack.enter_async_context(self._workers.session(caller, snapshot, "read")))
            members, files = await source_members(self._catalogue, self._files, snapshot)
            fds += files
            await worker.request("open", members, fds, deadline=OPEN_DEADLINE)
        worker.opened.add(snapshot.id)


class _Full(Exception):
    """The reader has too many snapshots open: it is ended, and another one started."""


async def source_members(
    catalogue: Catalogue, files: SnapshotFiles, snapshot: Snapshot
) -> tuple[dict[str, Any], list[int]]:
    """Return what a worker needs to verify a complete snapshot, and descriptors of its lineage and its map."""
    present = await catalogue.run(lambda t: t.snapshot(snapshot.id))
    record = await trio.to_thread.run_sync(files.record_bytes, snapshot.id)
    fds = await trio.to_thread.run_sync(files.open_source, snapshot)
    return {
        "Source": claim_members(present),
        "AuthorityIds": [present.authority] if present.authority else [],
        "Record": base64.b64encode(record).decode(),
    }, fds


async def find(catalogue: Catalogue, caller: Caller, name: str) -> Snapshot:
    """Return a snapshot of the caller's own. Raises BlocksNotFound, BlocksNotOwned."""
    try:
        return await catalogue.run(lambda t: t.find_snapshot(caller, name))
    except (SnapshotNotFound, SnapshotIdMalformed):
        raise BlocksNotFound(snapshot=name) from None
    except SnapshotNotOwned:
        raise BlocksNotOwned(snapshot=name) from None


def readable(snapshot: Snapshot) -> Snapshot:
    if snapshot.state is not SnapshotState.COMPLETED:
        raise SnapshotNotReadable(snapshot=snapshot.id, state=snapshot.state.value)
    return snapshot


def seconds_of(time: str) -> float:
    """Return an RFC 3339 time in seconds since 1970."""
    return datetime.fromisoformat(time).timestamp()


def _rfc3339(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
