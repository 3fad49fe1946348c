"""The catalog's client tokens: which resource a request made that carried one."""

from __future__ import annotations

from ebsd.domain.errors import IdempotentParameterMismatch
from ebsd.domain.tokens import ClientToken
from ebsd.store.catalog_rows import Rows


class TokenRows(Rows):
    """A row is written with that of its resource, in one transaction, and goes with it."""

    def note_token(self, token: ClientToken, resource: str) -> None:
        self._rows(
            "INSERT INTO client_token VALUES (?,?,?,?,?)",
            token.account, token.action, token.token, token.digest, resource,
        )  # fmt: skip

    def made_with(self, token: ClientToken) -> str | None:
        """Return what was made with a token; raises IdempotentParameterMismatch when it was other parameters'."""
        row = self._row(
            "SELECT digest, resource FROM client_token WHERE account=? AND action=? AND token=?",
            token.account, token.action, token.token,
        )  # fmt: skip
        if row is None:
            return None
        if bytes(row[0]) != token.digest:
            raise IdempotentParameterMismatch(token=token.token, resource=row[1])
        return str(row[1])
