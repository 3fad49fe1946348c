"""Aliases: names that accounts give their keys. Pure.

Source: KMS API reference, CreateAlias, UpdateAlias, DeleteAlias, ListAliases, and "Quotas" (aliases per key).
"""

from __future__ import annotations

from typing import Final

import msgspec

from ebsd.domain.errors import AliasExists, AliasNotFound, InvalidAliasName, KmsLimitExceeded, KmsValidation
from ebsd.domain.ids import MANAGED_ALIAS, AccountId, alias_arn, is_alias
from ebsd.kms.keystates import Group, check_state
from ebsd.kms.model import Model
from ebsd.kms.policy import MANAGED_NEVER, Action, Requester, denied
from ebsd.kms.records import Alias, Cmk

RESERVED: Final = "alias/aws/"
MAX_ALIASES_PER_KEY: Final = 50


def full_name(text: str) -> str:
    """Return ``alias/NAME`` for an AliasName parameter; a bare word gets the prefix. Raises InvalidAliasName."""
    name = text if text.startswith("alias/") else f"alias/{text}"
    if not is_alias(name):
        raise InvalidAliasName(alias=text, reason="it has characters or a length that aliases do not have")
    return name


def create(model: Model, requester: Requester, text: str, target: Cmk, now: str) -> Alias:
    """Return the new alias of the requester's account.

    Raises InvalidAliasName (also for the reserved ``alias/aws/``), AliasExists, KmsLimitExceeded, KmsInvalidState.
    """
    name = full_name(text)
    if name.startswith(RESERVED):
        raise InvalidAliasName(alias=name, reason=f"{RESERVED} is reserved for AWS managed keys")
    _check_same_account(requester.account, target)
    check_state(target.arn, target.state, Group.LABEL)
    if (requester.account, name) in model.aliases:
        raise AliasExists(alias=alias_arn(requester.account, name))
    _check_quota(model, target)
    return Alias(requester.account, name, target.id, now, now)


def update(model: Model, requester: Requester, text: str, target: Cmk, now: str) -> Alias:
    """Return the alias pointing to another key; volumes keep the key they were made with.

    Raises AliasNotFound, AccessDenied for AWS's own, KmsLimitExceeded, KmsInvalidState.
    """
    alias = _existing(model, requester, text, Action.UPDATE_ALIAS)
    _check_same_account(alias.account, target)
    check_state(target.arn, target.state, Group.NEW_ALIAS_TARGET)
    if target.id != alias.target:
        _check_quota(model, target)
    return msgspec.structs.replace(alias, target=target.id, updated=now)


def delete(model: Model, requester: Requester, text: str) -> Alias:
    """Return the alias to delete; raises AliasNotFound, AccessDenied for AWS's own."""
    return _existing(model, requester, text, Action.DELETE_ALIAS)


def managed(account: AccountId, target: Cmk, now: str) -> Alias:
    """Return the alias of an account's AWS managed key."""
    return Alias(account, MANAGED_ALIAS, target.id, now, now)


def _existing(model: Model, requester: Requester, text: str, action: Action) -> Alias:
    name = full_name(text)
    if name.startswith(RESERVED):
        raise denied(requester, action, alias_arn(requester.account, name), MANAGED_NEVER)
    alias = model.aliases.get((requester.account, name))
    if alias is None:
        raise AliasNotFound(alias=alias_arn(requester.account, name))
    return alias


def _check_same_account(account: AccountId, target: Cmk) -> None:
    if target.account != account:
        raise KmsValidation(reason="An alias and its key must be of the same account")


def _check_quota(model: Model, target: Cmk) -> None:
    if sum(alias.target == target.id for alias in model.aliases.values()) >= MAX_ALIASES_PER_KEY:
        raise KmsLimitExceeded(what=f"a key has at most {MAX_ALIASES_PER_KEY} aliases")
