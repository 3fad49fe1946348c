"""Authorisation: who may do what with a CMK. Pure.

1. ``authorise`` is the only judge; everything else asks it. Key policies and grants go behind it.
2. The caller's identity is SO_PEERCRED (or ebsd's word on kms.sock); that a call came through ebsd
   (kms:ViaService) follows from the socket, never from a message.
3. Rules as of now: the owner's account may do everything with its keys, an administrator acts on others'
   keys under the owner's principal, nobody else may do anything. An AWS managed key is used through ebsd only.
Source: KMS Developer Guide, "AWS managed keys" and the policy of ``alias/aws/ebs`` (Encrypt, Decrypt,
ReEncrypt*, GenerateDataKey*, CreateGrant and DescribeKey under kms:ViaService; never edited or deleted).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final

from ebsd.domain.errors import AccessDenied
from ebsd.domain.ids import AccountId, account_root_arn, user_arn
from ebsd.domain.model import Caller
from ebsd.kms.records import Cmk, KeyManager


class Action(StrEnum):
    """IAM actions of KMS, without their ``kms:``."""

    DESCRIBE_KEY = "DescribeKey"
    LIST_ALIASES = "ListAliases"
    ENABLE_KEY = "EnableKey"
    DISABLE_KEY = "DisableKey"
    CREATE_ALIAS = "CreateAlias"
    UPDATE_ALIAS = "UpdateAlias"
    DELETE_ALIAS = "DeleteAlias"
    ENCRYPT = "Encrypt"
    DECRYPT = "Decrypt"
    GENERATE_DATA_KEY = "GenerateDataKey"
    GENERATE_DATA_KEY_WITHOUT_PLAINTEXT = "GenerateDataKeyWithoutPlaintext"
    RE_ENCRYPT_FROM = "ReEncryptFrom"
    RE_ENCRYPT_TO = "ReEncryptTo"
    CREATE_GRANT = "CreateGrant"
    RETIRE_GRANT = "RetireGrant"


class Managed(Enum):
    """What may be done with an AWS managed key."""

    ALWAYS = "by its account, on any channel"
    VIA_SERVICE = "for its account, through ebsd"
    NEVER = "by nobody"


MANAGED_RULES: Final[dict[Action, Managed]] = {
    Action.DESCRIBE_KEY: Managed.ALWAYS,
    Action.LIST_ALIASES: Managed.ALWAYS,
    Action.ENABLE_KEY: Managed.NEVER,
    Action.DISABLE_KEY: Managed.NEVER,
    Action.CREATE_ALIAS: Managed.NEVER,
    Action.UPDATE_ALIAS: Managed.NEVER,
    Action.DELETE_ALIAS: Managed.NEVER,
    Action.ENCRYPT: Managed.VIA_SERVICE,
    Action.DECRYPT: Managed.VIA_SERVICE,
    Action.GENERATE_DATA_KEY: Managed.VIA_SERVICE,
    Action.GENERATE_DATA_KEY_WITHOUT_PLAINTEXT: Managed.VIA_SERVICE,
    Action.RE_ENCRYPT_FROM: Managed.VIA_SERVICE,
    Action.RE_ENCRYPT_TO: Managed.VIA_SERVICE,
    Action.CREATE_GRANT: Managed.VIA_SERVICE,
    Action.RETIRE_GRANT: Managed.ALWAYS,
}

NOT_ALLOWED: Final = "no resource-based policy allows the kms:{action} action"
MANAGED_NEVER: Final = "it is an AWS managed key, which only the service itself changes"
MANAGED_DIRECT: Final = "it is an AWS managed key, which is used through ebsd only"


@dataclass(frozen=True, slots=True)
class Requester:
    """Who asks, and over which channel."""

    caller: Caller
    via_service: bool
    """The call came over kms.sock: ebsd acts for the caller."""

    @property
    def account(self) -> AccountId:
        return self.caller.account

    @property
    def principal(self) -> str:
        return user_arn(self.caller.account, self.caller.name)


def denied(requester: Requester, action: Action, resource: str, reason: str | None = None) -> AccessDenied:
    """Return AWS's refusal: ``User: P is not authorized to perform: kms:A on resource: R because ...``."""
    text = NOT_ALLOWED.format(action=action.value) if reason is None else reason
    return AccessDenied(
        principal=requester.principal,
        action=f"kms:{action.value}",
        resource=resource,
        reason=f" because {text}",
    )


def may_touch_account(requester: Requester, account: AccountId) -> bool:
    """Say whether keys of this account are the requester's business at all."""
    return account == requester.account or requester.caller.is_admin


def authorise(requester: Requester, action: Action, key: Cmk) -> None:
    """Return when the requester may perform the action on the key; else raise AccessDenied with AWS's text."""
    if not may_touch_account(requester, key.account):
        raise denied(requester, action, key.arn)
    if key.manager is KeyManager.AWS:
        rule = MANAGED_RULES[action]
        if rule is Managed.NEVER:
            raise denied(requester, action, key.arn, MANAGED_NEVER)
        if rule is Managed.VIA_SERVICE and not requester.via_service:
            raise denied(requester, action, key.arn, MANAGED_DIRECT)


def default_policy(account: AccountId) -> str:
    """Return the policy of a key made without one: the account's root may do everything.

    Source: KMS Developer Guide, "Default key policy" (keys created with the API).
    """
    return _policy(
        "key-default-1",
        [
            {
                "Sid": "Enable IAM User Permissions",
                "Effect": "Allow",
                "Principal": {"AWS": account_root_arn(account)},
                "Action": "kms:*",
                "Resource": "*",
            }
        ],
    )


def managed_policy(account: AccountId) -> str:
    """Return the policy of alias/aws/ebs, ``auto-ebs-2``."""
    return _policy(
        "auto-ebs-2",
        [
            {
                "Sid": "Allow access through EBS for all principals in the account that are authorized to use EBS",
                "Effect": "Allow",
                "Principal": {"AWS": "*"},
                "Action": [
                    "kms:Encrypt",
                    "kms:Decrypt",
                    "kms:ReEncrypt*",
                    "kms:GenerateDataKey*",
                    "kms:CreateGrant",
                    "kms:DescribeKey",
                ],
                "Resource": "*",
                "Condition": {
                    "StringEquals": {
                        "kms:CallerAccount": account,
                        "kms:ViaService": "ec2.local.amazonaws.com",
                    }
                },
            },
            {
                "Sid": "Allow direct access to key metadata to the account",
                "Effect": "Allow",
                "Principal": {"AWS": account_root_arn(account)},
                "Action": ["kms:Describe*", "kms:Get*", "kms:List*", "kms:RevokeGrant"],
                "Resource": "*",
            },
        ],
    )


def _policy(policy_id: str, statements: list[dict[str, object]]) -> str:
    return json.dumps({"Version": "2012-10-17", "Id": policy_id, "Statement": statements})
