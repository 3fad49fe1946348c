"""Client tokens: what makes a request that is sent again give the same resource, and not a second one.

Source: https://docs.aws.amazon.com/ec2/latest/devguide/ec2-api-idempotency.html: at most 64 ASCII characters; the same
token with other parameters is IdempotentParameterMismatch. A token counts for one account and one action.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ebsd.domain.errors import InvalidParameterValue
from ebsd.domain.ids import AccountId

MAX_TOKEN: Final = 64

MEMBER: Final = "ClientToken"


@dataclass(frozen=True, slots=True)
class ClientToken:
    """A token, where it counts, and a digest of the parameters that it came with."""

    account: AccountId
    action: str
    token: str
    digest: bytes


def parse_client_token(account: AccountId, action: str, parameters: Mapping[str, Any]) -> ClientToken | None:
    """Return the token of a request, None when it has none. Raises InvalidParameterValue.

    The digest is SHA-256 of the other members as JSON: what is compared is what was asked, not what came of it.
    """
    text = parameters.get(MEMBER)
    if text is None:
        return None
    if not 1 <= len(text) <= MAX_TOKEN or not text.isascii() or not text.isprintable():
        reason = f"it has 1 to {MAX_TOKEN} printable ASCII characters"
        raise InvalidParameterValue(value=ascii(text[:80]), parameter=MEMBER, reason=reason)
    others = {name: value for name, value in parameters.items() if name != MEMBER and value is not None}
    return ClientToken(account, action, text, hashlib.sha256(json.dumps(others, sort_keys=True).encode()).digest())
