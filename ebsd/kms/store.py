"""The model and its documents together: decide on the loop, write in one thread, then let the change be seen.

1. A mutation holds the lock from its decision to its commit, so what it decided on is still true.
2. Reads need no lock: the model changes only between checkpoints, after the commit.
3. Writing runs in a thread of its own limiter: a slow disk delays mutations, never the loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from ebsd.crypto.secret import Secret
from ebsd.domain.errors import IntegrityFailure
from ebsd.kms.documents import Change, DocumentStore, Put, Row
from ebsd.kms.epoch import Epoch
from ebsd.kms.model import Model, model_of
from ebsd.kms.records import Kind

Commit = Callable[..., Awaitable[None]]
"""``await commit(*changes)``: durable and visible when it returns; nothing changed when it raises."""


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
