"""The catalog behind a lock: one transaction at a time, off the event loop.

Limits of accounts are judged here, at the end of each transaction that makes an account have more: so nobody who adds
a row can forget it, and two that fit one by one are not both committed. A transaction that finds the disk full draws on
the ballast: what ends or removes something must be committed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from ebsd.domain.errors import NoSpace
from ebsd.domain.limits import AccountLimits
from ebsd.store.ballast import Ballast
from ebsd.store.catalog import Catalog, Transaction

T = TypeVar("T")


class Catalogue:
    """Runs catalog transactions in a worker thread; a commit under load can take a quarter of a second."""

    def __init__(self, catalog: Catalog, ballast: Ballast, limits: AccountLimits | None = None) -> None:
        self.limits = AccountLimits() if limits is None else limits
        self._catalog = catalog
        self._ballast = ballast
        self._lock = trio.Lock()

    async def run(self, use_case: Callable[[Transaction], T]) -> T:
        """Run one transaction and return its result; what it raises is raised, and nothing of it stays.

        Not cancellable while it runs: a commit either happened or did not, and the caller learns which.
        """
        async with self._lock:
            return await trio.to_thread.run_sync(self._run, use_case)

    def _run(self, use_case: Callable[[Transaction], T]) -> T:
        def judged(t: Transaction) -> T:
            result = use_case(t)
            for account, counted in sorted(t.grown, key=str):
                self.limits.check(account, counted, t.used(account, counted))
            return result

        while True:
            try:
                return self._catalog.run(judged)
            except NoSpace:
                if not self._ballast.release():
                    raise

    async def image(self) -> bytes:
        """Return the bytes of the catalog as of the last commit."""
        async with self._lock:
            return await trio.to_thread.run_sync(self._catalog.image)

    def close(self) -> None:
        self._catalog.close()
