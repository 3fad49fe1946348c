"""The model and its documents together: decide on the loop, write in one thread, then let the change be seen.

1. A mutation holds the lock from its decision to its commit, so what it decided on is still true.
2. Reads need no lock: the model changes only between checkpoints, after the commit.
3. Writing runs in a thread of its own limiter: a slow disk delays mutations, never the loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import IntegrityFailure
from ebsd.kms.documents import Change, DocumentStore, Drop, Put, Row
from ebsd.kms.epoch import Epoch
from ebsd.kms.model import Model, model_of
from ebsd.kms.records import Kind

Commit = Callable[..., Awaitable[None]]
"""``await commit(*changes)``: durable and visible when it returns; nothing changed when it raises."""
Destroy = Callable[[Sequence[Drop]], Awaitable[None]]
"""``await destroy(drops)``: the documents are gone for good when it returns."""
Rewrite = Callable[[DocumentStore, Sequence[Drop]], DocumentStore]
"""Writes another state without some documents and opens it; blocks."""


class Store:
    """The one owner of a verified DocumentStore."""

    def __init__(self, documents: DocumentStore) -> None:
        """Raises IntegrityFailure when a document names a key that is not there."""
        self.model: Model = model_of(documents.documents)
        for sentence in self.model.dangling():
            raise IntegrityFailure(resource="The key database", reason=sentence)
        self._documents = documents
        self._lock = trio.Lock()
        self._limiter = trio.CapacityLimiter(1)

    @property
    def epoch(self) -> Epoch:
        """The epoch that all documents are sealed under."""
        return self._documents.epoch

    @asynccontextmanager
    async def mutation(self) -> AsyncIterator[Commit]:
        """Hold the store for one decision; yields the function that commits it, to be called at most once."""
        async with self._lock:
            yield self._commit

    async def _commit(self, *changes: Change) -> None:
        # Shielded: a commit that is on the disk must be in the model as well.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._documents.write, changes, limiter=self._limiter)
        for change in changes:
            if isinstance(change, Put):
                self.model.put(change.document)
            else:
                self.model.drop(change.kind, change.id)

    @asynccontextmanager
    async def destruction(self, rewrite: Rewrite) -> AsyncIterator[Destroy]:
        """Hold the store for one decision, as ``mutation``; yields what carries it out by another state of the files.

        Reads go on meanwhile. When it raises, nothing has changed, or ``is_open`` is false: then what is on the disk
        decides, and this object writes no more.
        """

        async def destroy(drops: Sequence[Drop]) -> None:
            with trio.CancelScope(shield=True):
                old = self._documents
                self._documents = await trio.to_thread.run_sync(rewrite, old, drops, limiter=self._limiter)
            for drop in drops:
                self.model.drop(drop.kind, drop.id)
            old.close()

        async with self._lock:
            yield destroy

    @property
    def is_open(self) -> bool:
        """Say whether changes can be written."""
        return self._documents.is_writable

    def secrets(self, kind: Kind, doc_id: str) -> tuple[Secret, ...]:
        """Open the secrets of a document; the caller wipes them. Takes some ten microseconds, on the loop."""
        return self._documents.secrets(kind, doc_id)

    async def copy(self) -> list[Row]:
        """Return all sealed rows, the head among them, of one moment."""
        async with self._lock:
            return self._documents.rows()

    async def close(self) -> None:
        """Wait for the mutation under way, then close the database; may be called again."""
        with trio.CancelScope(shield=True):
            async with self._lock:
                await trio.to_thread.run_sync(self._documents.close, limiter=self._limiter)
