"""How many bytes of documents an account may have: what it makes is in memory and in every start and backup.

Numbers of keys, aliases and grants are bounded as AWS bounds them, but a grant or a policy can be short or long.
"""

from __future__ import annotations

from typing import Final, TypeVar

from ebsd.domain.errors import KmsLimitExceeded
from ebsd.domain.ids import AccountId, account_of_uid
from ebsd.kms.model import Model, document_bytes
from ebsd.kms.records import Alias, Cmk, Grant

MAX_ACCOUNT_BYTES: Final = 32 * 1024 * 1024
"""Of an account's keys with policies and tags, its aliases, and the grants that it made: their JSON, as sealed."""
_EXEMPT: Final[AccountId] = account_of_uid(0)
"""root's account: who can write the database needs no budget."""

D = TypeVar("D", Cmk, Alias, Grant)


def within(model: Model, document: D) -> D:
    """Return the document that is to be put; raises KmsLimitExceeded when it makes its account's documents too many.

    Only what grows can be refused: who is above the budget may still make things smaller. What the service does by
    itself (rotation, alias/aws/ebs, states of keys) does not ask.
    """
    account, size = document_bytes(document)
    growth = size - model.present_bytes(document)
    if account != _EXEMPT and growth > 0 and model.account_bytes(account) + growth > MAX_ACCOUNT_BYTES:
        raise KmsLimitExceeded(
            what=f"an account has at most {MAX_ACCOUNT_BYTES // 2**20} MiB of keys, policies, aliases and grants"
        )
    return document
