"""Admission rules in the key service's sealed documents: whoever edits the catalog cannot remove one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ebsd.domain.admission import AdmissionRule, check_allowed_keys, check_rule_account
from ebsd.domain.errors import AdmissionRuleNotFound
from ebsd.domain.ids import AccountId
from ebsd.kms.model import Model
from ebsd.kms.records import Admission

ALL_ACCOUNTS: Final = "*"
"""Id of the document that binds every account."""


def made(account: str | None, allowed_keys: Sequence[str], now: str) -> Admission:
    """Return the document of a rule; raises InvalidParameterValue for a key or account that is none."""
    return Admission(check_rule_account(account) or ALL_ACCOUNTS, check_allowed_keys(allowed_keys), now)


def existing(model: Model, account: str | None) -> Admission:
    """Return the rule of an account, or of all; raises AdmissionRuleNotFound."""
    found = model.admissions.get(check_rule_account(account) or ALL_ACCOUNTS)
    if found is None:
        raise AdmissionRuleNotFound(whom="all accounts" if account is None else account)
    return found


def binding(model: Model, account: AccountId) -> list[Admission]:
    """Return the rules that an account is judged by: that of all accounts, then its own."""
    return [found for doc_id in (ALL_ACCOUNTS, account) if (found := model.admissions.get(doc_id)) is not None]


def as_rule(document: Admission) -> AdmissionRule:
    account = None if document.account == ALL_ACCOUNTS else AccountId(document.account)
    return AdmissionRule(account, document.allowed_keys)


def as_members(document: Admission) -> dict[str, Any]:
    """Return what ListAdmissionRules shows of a rule."""
    members: dict[str, Any] = {"AllowedKeys": list(document.allowed_keys), "ChangeTime": document.changed}
    if document.account != ALL_ACCOUNTS:
        members["AccountId"] = document.account
    return members
