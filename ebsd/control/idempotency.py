"""Requests with a client token: done once, however often they are sent.

The token is committed with the row of what it makes, and goes with that row. So after a crash it names something
exactly where something was made, or is still being made; and a token counts for as long as its resource is there: once
that is deleted, or came to nothing, the same request makes a new one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from ebsd.control.catalogue import Catalogue
from ebsd.domain.tokens import ClientToken

Made = TypeVar("Made")


class ClientTokens:
    """Serialises the requests with one token: whoever comes second waits, and gets what the first one made."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._locks: dict[tuple[str, str, str], tuple[trio.Lock, int]] = {}
        """Lock, and how many hold it or wait for it."""

    async def once(
        self,
        token: ClientToken | None,
        make: Callable[[], Awaitable[Made]],
        again: Callable[[str], Awaitable[Made]],
    ) -> Made:
        """Make it, or return what was made by this request before. Raises IdempotentParameterMismatch.

        ``make`` commits the token with the resource's first row; ``again`` finds the answer for the resource's id.
        """
        if token is None:
            return await make()
        key = (token.account, token.action, token.token)
        lock, users = self._locks.get(key, (trio.Lock(), 0))
        self._locks[key] = lock, users + 1
        try:
            async with lock:
                resource = await self._catalogue.run(lambda t: t.made_with(token))
                return await make() if resource is None else await again(resource)
        finally:
            lock, users = self._locks.pop(key)
            if users > 1:
                self._locks[key] = lock, users - 1
