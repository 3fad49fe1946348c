"""Grants: what CreateGrant accepts, what a grant allows, and who may retire it. Pure.

1. A grant allows, it never denies; ``policy.authorise`` asks the policy first, then the grants.
2. The grant that ebsd gets for an attachment is Decrypt with EncryptionContextEquals, for the principal that
   volume processes stand for; nothing wider can be made over kms.sock.
Source: KMS API reference, CreateGrant, RetireGrant, GrantConstraints; Developer Guide, "Grants in AWS KMS".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from ebsd.domain.errors import InvalidGrantToken, KmsLimitExceeded, KmsValidation
from ebsd.domain.ids import AccountId, KeyId, account_root_arn
from ebsd.kms.model import Model
from ebsd.kms.policy import SERVICE, Facts, Requester, context_fits, stands_for
from ebsd.kms.records import Cmk, Constraints, Grant

OPERATIONS: Final = (
    "Decrypt", "Encrypt", "GenerateDataKey", "GenerateDataKeyWithoutPlaintext", "ReEncryptFrom", "ReEncryptTo",
    "CreateGrant", "RetireGrant", "DescribeKey",
)  # fmt: skip
"""The grant operations of AWS that a symmetric encryption key has here."""

MAX_GRANTS_PER_KEY: Final = 50_000
MAX_CONSTRAINT_PAIRS: Final = 8
MAX_CONSTRAINT_TEXT: Final = 384
_MAX_TOKENS: Final = 8
"""Repeating CreateGrant gives another token each time; the oldest of more than these are forgotten."""

_NAME = re.compile(r"[a-zA-Z0-9:/_-]{1,256}")
_PRINCIPAL = re.compile(r"arn:aws:(iam|sts)::[0-9]{12}:[\w+=,.@/:-]{1,200}|[a-z0-9.-]{1,100}\.amazonaws\.com", re.ASCII)


@dataclass(frozen=True, slots=True)
class GrantRequest:
    """The parameters of CreateGrant, checked."""

    grantee: str
    operations: tuple[str, ...]
    constraints: Constraints
    retiring: str | None
    name: str


def infrastructure_principal(account: AccountId) -> str:
    """Return the principal that volume processes stand for towards an account's keys, in the shape EC2 gives it."""
    return f"arn:aws:sts::{account}:assumed-role/aws:ec2-infrastructure/ebsd"


def attach_request(account: AccountId, context: Mapping[str, str], name: str | None) -> GrantRequest:
    """Return the only request that ebsd can make: Decrypt of exactly this context, under a key of ``account``."""
    if name is not None:
        _check_name(name)
    return GrantRequest(
        infrastructure_principal(account), ("Decrypt",), Constraints(equals=dict(context)), SERVICE, name or ""
    )


def check_request(
    *,
    grantee: str,
    operations: Sequence[str],
    equals: Mapping[str, str] | None,
    subset: Mapping[str, str] | None,
    retiring: str | None,
    name: str | None,
) -> GrantRequest:
    """Return a user's request when KMS would take it; raises KmsValidation."""
    for member, principal in (("GranteePrincipal", grantee), ("RetiringPrincipal", retiring)):
        if principal is not None and _PRINCIPAL.fullmatch(principal) is None:
            raise KmsValidation(reason=f"{member} must be the ARN of a principal")
    if not operations:
        raise KmsValidation(reason="Operations must not be empty")
    for operation in operations:
        if operation not in OPERATIONS:
            raise KmsValidation(reason=f"Grant operation {operation[:64]!r} is not one of {', '.join(OPERATIONS)}")
    for pairs in (equals, subset):
        _check_constraint(pairs)
    if name is not None:
        _check_name(name)
    return GrantRequest(
        grantee,
        tuple(dict.fromkeys(operations)),
        Constraints(None if equals is None else dict(equals), None if subset is None else dict(subset)),
        retiring,
        name or "",
    )


def grant_facts(request: GrantRequest) -> Facts:
    """Return what conditions and parent grants may ask of a CreateGrant request."""
    return Facts(
        grant_operations=request.operations,
        grantee=request.grantee,
        retiring=request.retiring,
        constraints=request.constraints,
    )


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise KmsValidation(reason="Name must have 1 to 256 characters from a-z, A-Z, 0-9, ':', '/', '_' and '-'")


def _check_constraint(pairs: Mapping[str, str] | None) -> None:
    if pairs is None:
        return
    if not 1 <= len(pairs) <= MAX_CONSTRAINT_PAIRS:
        raise KmsValidation(reason=f"A grant constraint has 1 to {MAX_CONSTRAINT_PAIRS} pairs")
    if any(len(text) > MAX_CONSTRAINT_TEXT for pair in pairs.items() for text in pair):
        raise KmsValidation(reason=f"A grant constraint has texts of at most {MAX_CONSTRAINT_TEXT} characters")


# --- making -------------------------------------------------------------------------------------------------


def token_hash(token: str) -> str:
    """Return what is kept of a grant token. A token has 256 random bits, so a plain hash is enough."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def existing(model: Model, key: Cmk, issuer: AccountId, request: GrantRequest) -> Grant | None:
    """Return the grant that a repeated request means: same name and same parameters (KMS API, CreateGrant, Name)."""
    if not request.name:
        return None
    for grant in model.grants_of(key.id):
        if (
            grant.name == request.name
            and grant.issuing_account == issuer
            and grant.grantee == request.grantee
            and grant.operations == request.operations
            and grant.constraints == request.constraints
            and grant.retiring == request.retiring
        ):
            return grant
    return None


def create(
    model: Model, key: Cmk, issuer: AccountId, request: GrantRequest, grant_id: bytes, token: str, now: str
) -> Grant:
    """Return the grant (new, or the one that the request repeats) with a further token. Raises KmsLimitExceeded."""
    known = existing(model, key, issuer, request)
    if known is not None:
        tokens = (*known.token_hashes, token_hash(token))[-_MAX_TOKENS:]
        return msgspec.structs.replace(known, token_hashes=tokens)
    if model.grant_count(key.id) >= MAX_GRANTS_PER_KEY:
        raise KmsLimitExceeded(what=f"a key has at most {MAX_GRANTS_PER_KEY} grants")
    if model.grants_issued(issuer) >= MAX_GRANTS_PER_KEY:
        raise KmsLimitExceeded(what=f"an account makes at most {MAX_GRANTS_PER_KEY} grants")
    return Grant(
        id=grant_id.hex(),
        key=key.id,
        grantee=request.grantee,
        operations=request.operations,
        constraints=request.constraints,
        retiring=request.retiring,
        name=request.name,
        created=now,
        issuing_account=issuer,
        token_hashes=(token_hash(token),),
    )


# --- use ----------------------------------------------------------------------------------------------------


def allows(grant: Grant, operation: str, context: Mapping[str, str]) -> bool:
    """Say whether the grant allows the operation under this encryption context."""
    return operation in grant.operations and context_fits(grant, context)


def session_grant(model: Model, key: Cmk, grant_id: str, context: Mapping[str, str]) -> Grant:
    """Return the grant that opens a key session, which must allow Decrypt of *exactly* this context.

    A grant of a user, with another grantee or a wider constraint, opens none. Raises InvalidGrantToken.
    """
    grant = model.grants.get(grant_id)
    if (
        grant is None
        or grant.key != key.id
        or grant.grantee != infrastructure_principal(key.account)
        or grant.constraints.equals is None
        or not allows(grant, "Decrypt", context)
    ):
        raise InvalidGrantToken(grant=grant_id[:80])
    return grant


def check_may_retire(model: Model, requester: Requester, grant: Grant | None, shown: str) -> Grant:
    """Return the grant when the requester may retire it: its retiring principal, a grantee with RetireGrant, the
    account that issued it, or an administrator. Raises InvalidGrantToken, for an unknown grant alike.
    """
    if grant is None:
        raise InvalidGrantToken(grant=shown)
    if (
        requester.caller.is_admin
        or grant.issuing_account == requester.account
        or stands_for(grant.retiring, requester.account)
        or ("RetireGrant" in grant.operations and stands_for(grant.grantee, requester.account))
    ):
        return grant
    raise InvalidGrantToken(grant=shown)


def of_key(model: Model, key_id: KeyId, grant_id: str) -> Grant | None:
    """Return a grant by its id when it is of this key."""
    grant = model.grants.get(grant_id)
    return grant if grant is not None and grant.key == key_id else None


def as_members(grant: Grant) -> dict[str, Any]:
    """Return KMS's GrantListEntry of a grant."""
    members: dict[str, Any] = {
        "KeyId": grant.key,
        "GrantId": grant.id,
        "CreationDate": grant.created,
        "GranteePrincipal": grant.grantee,
        "IssuingAccount": account_root_arn(grant.issuing_account),
        "Operations": list(grant.operations),
    }
    if grant.name:
        members["Name"] = grant.name
    if grant.retiring is not None:
        members["RetiringPrincipal"] = grant.retiring
    constraints = {
        "EncryptionContextEquals": grant.constraints.equals,
        "EncryptionContextSubset": grant.constraints.subset,
    }
    given = {name: pairs for name, pairs in constraints.items() if pairs is not None}
    if given:
        members["Constraints"] = given
    return members
