"""Authorisation: who may do what with a CMK, by its policy and its grants. Pure.

1. ``authorise`` is the only judge; everything else asks it.
2. The caller's identity is SO_PEERCRED (or ebsd's word on kms.sock); that a call came through ebsd
   (kms:ViaService) follows from the socket, never from a message.
3. An account is one Unix user, so what IAM would say is "everything" for the account's own user; the key policy says
   who else. An administrator acts on others' keys under the owner's principal.
4. An AWS managed key has a policy like any other, which nobody can change.
Source: KMS Developer Guide, "AWS managed keys" and the policy of ``alias/aws/ebs`` (Encrypt, Decrypt,
ReEncrypt*, GenerateDataKey*, CreateGrant and DescribeKey under kms:ViaService; never edited or deleted).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ebsd.domain.errors import AccessDenied, ForeignAccessDenied, MalformedPolicy
from ebsd.domain.ids import REGION, AccountId, account_root_arn, user_arn
from ebsd.domain.model import Caller
from ebsd.kms.policydocument import CONTEXT_KEY, TAG_KEY, AccessRequest, Effect, Policy, parse_policy
from ebsd.kms.policyvocabulary import refuse_unknown
from ebsd.kms.records import Cmk, Constraints, Grant, KeyManager


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
    LIST_GRANTS = "ListGrants"
    REVOKE_GRANT = "RevokeGrant"
    RETIRE_GRANT = "RetireGrant"
    GET_KEY_POLICY = "GetKeyPolicy"
    PUT_KEY_POLICY = "PutKeyPolicy"
    LIST_KEY_POLICIES = "ListKeyPolicies"
    ENABLE_KEY_ROTATION = "EnableKeyRotation"
    DISABLE_KEY_ROTATION = "DisableKeyRotation"
    ROTATE_KEY_ON_DEMAND = "RotateKeyOnDemand"
    GET_KEY_ROTATION_STATUS = "GetKeyRotationStatus"
    LIST_KEY_ROTATIONS = "ListKeyRotations"
    SCHEDULE_KEY_DELETION = "ScheduleKeyDeletion"
    CANCEL_KEY_DELETION = "CancelKeyDeletion"


NOT_ALLOWED: Final = "no resource-based policy allows the kms:{action} action"
MANAGED_NEVER: Final = "it is an AWS managed key, which only the service itself changes"
MANAGED_DIRECT: Final = "it is an AWS managed key, which is used through ebsd only"
EXPLICIT_DENY: Final = " with an explicit deny in a resource-based policy"

SERVICE: Final = f"ec2.{REGION}.amazonaws.com"
"""What kms:ViaService says of calls that ebsd makes for its users."""

ADMINISTRATION: Final = frozenset(
    (Action.ENABLE_KEY, Action.DISABLE_KEY, Action.CREATE_ALIAS, Action.UPDATE_ALIAS, Action.DELETE_ALIAS,
     Action.PUT_KEY_POLICY, Action.ENABLE_KEY_ROTATION, Action.DISABLE_KEY_ROTATION, Action.ROTATE_KEY_ON_DEMAND,
     Action.SCHEDULE_KEY_DELETION, Action.CANCEL_KEY_DELETION)
)  # fmt: skip
"""What nobody does to an AWS managed key, whatever its policy says."""

WAY_BACK: Final = frozenset((Action.GET_KEY_POLICY, Action.PUT_KEY_POLICY))
"""What an administrator may do whatever the policy says: a policy that locks its owner out would lock the volumes
out with him, and on AWS that is a case for their support."""

OF_GRANTS: Final = frozenset((Action.CREATE_GRANT, Action.LIST_GRANTS, Action.REVOKE_GRANT))
"""The actions whose requests have kms:GrantIsForAWSResource."""

UNCONSTRAINED: Final = frozenset((Action.DESCRIBE_KEY, Action.CREATE_GRANT, Action.RETIRE_GRANT))
"""Grant operations whose requests have no encryption context, so that constraints do not narrow them."""


SHARED_USE: Final = (
    Action.DESCRIBE_KEY, Action.CREATE_GRANT, Action.GENERATE_DATA_KEY_WITHOUT_PLAINTEXT, Action.RE_ENCRYPT_FROM,
    Action.RE_ENCRYPT_TO, Action.DECRYPT,
)  # fmt: skip
"""What an account must be allowed to do with the key of a snapshot that is shared with it (EBS user guide, "Share the
KMS key used to encrypt a shared Amazon EBS snapshot"). Fewer would do here, but not on AWS."""


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


@dataclass(frozen=True, slots=True)
class Facts:
    """What of a request conditions may ask for, besides caller, channel and key; None is "the request has it not"."""

    context: Mapping[str, str] | None = None
    """The encryption context of a cryptographic operation, empty or not."""
    grant_operations: tuple[str, ...] | None = None
    grantee: str | None = None
    retiring: str | None = None
    constraints: Constraints | None = None
    """Of the grant that CreateGrant asks for."""
    on_same_key: bool | None = None
    """ReEncrypt: whether source and destination are one key."""
    bypass_lockout_check: bool | None = None
    rotation_period: int | None = None
    """Days, of EnableKeyRotation."""
    deletion_window: int | None = None
    """Days, of ScheduleKeyDeletion."""
    request_alias: str | None = None
    """The alias by which the request named the key."""
    resource_aliases: tuple[str, ...] = ()
    """All aliases of the key."""


NO_FACTS: Final = Facts()


def denied(requester: Requester, action: Action, resource: str, reason: str | None = None) -> AccessDenied:
    """Return AWS's refusal: ``User: P is not authorized to perform: kms:A on resource: R because ...``."""
    text = NOT_ALLOWED.format(action=action.value) if reason is None else reason
    return _refusal(requester, action, resource, f" because {text}")


def denied_abroad(requester: Requester, action: Action) -> ForeignAccessDenied:
    """Return AWS's refusal to another account: a key that is not there, one whose policy says nothing and one whose
    policy denies are told alike, and nothing is told that the requester did not say itself.
    """
    return ForeignAccessDenied(principal=requester.principal, action=f"kms:{action.value}")


def _refusal(requester: Requester, action: Action, resource: str, reason: str) -> AccessDenied:
    return AccessDenied(principal=requester.principal, action=f"kms:{action.value}", resource=resource, reason=reason)


def may_touch_account(requester: Requester, account: AccountId) -> bool:
    """Say whether keys of this account are the requester's own business, or that of an administrator."""
    return account == requester.account or requester.caller.is_admin


def authorise(
    requester: Requester, action: Action, key: Cmk, facts: Facts = NO_FACTS, grants: Iterable[Grant] = ()
) -> None:
    """Return when the requester may perform the action on the key; else raise AccessDenied with AWS's text, or
    ForeignAccessDenied where the key is another account's.

    ``grants``: those of the key. Order: an explicit deny of the key policy, its allows, then grants. An administrator
    acts on others' keys under the owner's principal, so what the owner denies itself he is denied, too.
    """
    if key.manager is KeyManager.AWS and action in ADMINISTRATION:
        if not may_touch_account(requester, key.account):
            raise denied_abroad(requester, action)
        raise denied(requester, action, key.arn, MANAGED_NEVER)
    if requester.caller.is_admin and action in WAY_BACK:
        return
    effect = parse_policy(key.policy).decide(access_request(requester, action, key, facts))
    if effect is Effect.ALLOW or (effect is None and _granted(requester, action, facts, grants)):
        return
    if not may_touch_account(requester, key.account):
        raise denied_abroad(requester, action)
    if effect is Effect.DENY:
        raise _refusal(requester, action, key.arn, EXPLICIT_DENY)
    if key.manager is KeyManager.AWS:
        raise denied(requester, action, key.arn, MANAGED_DIRECT if not requester.via_service else MANAGED_NEVER)
    raise denied(requester, action, key.arn)


def is_denied(principal: str, action: Action, key: Cmk, facts: Facts) -> bool:
    """Say whether the key policy denies the action to a principal that acts for the service (a volume process)."""
    keys = _condition_keys(principal, key.account, True, key, facts)
    keys["aws:principaltype"] = ("AssumedRole",)
    request = AccessRequest(principal, key.account, f"kms:{action.value}", key.arn, keys)
    return parse_policy(key.policy).decide(request) is Effect.DENY


def access_request(requester: Requester, action: Action, key: Cmk, facts: Facts) -> AccessRequest:
    """Return the request as the key policy sees it."""
    account, principal = requester.account, requester.principal
    if requester.caller.is_admin and account != key.account:
        account, principal = key.account, account_root_user(key.account)
    keys = _condition_keys(principal, account, requester.via_service, key, facts)
    if action in OF_GRANTS:
        # "... only when an AWS service integrated with KMS sends the request on the principal's behalf".
        keys["kms:grantisforawsresource"] = ("true" if requester.via_service else "false",)
    return AccessRequest(principal, account, f"kms:{action.value}", key.arn, keys)


def account_root_user(account: AccountId) -> str:
    """Return the principal under which an administrator acts for an account: its user, whatever the name."""
    return user_arn(account, "*")


def _condition_keys(
    principal: str, account: AccountId, via_service: bool, key: Cmk, facts: Facts
) -> dict[str, tuple[str, ...]]:
    """Return the condition keys that the request has, names in lower case."""
    single = {
        "kms:CallerAccount": account,
        "kms:ViaService": SERVICE if via_service else None,
        "kms:KeySpec": key.spec,
        "kms:KeyUsage": key.usage,
        "kms:KeyOrigin": "AWS_KMS",
        "kms:MultiRegion": "false",
        "kms:EncryptionAlgorithm": None if facts.context is None else key.spec,
        "kms:GranteePrincipal": facts.grantee,
        "kms:RetiringPrincipal": facts.retiring,
        "kms:GrantConstraintType": _constraint_type(facts.constraints),
        "kms:ReEncryptOnSameKey": _truth(facts.on_same_key),
        "kms:BypassPolicyLockoutSafetyCheck": _truth(facts.bypass_lockout_check),
        "kms:RotationPeriodInDays": _number(facts.rotation_period),
        "kms:ScheduleKeyDeletionPendingWindowInDays": _number(facts.deletion_window),
        "kms:RequestAlias": facts.request_alias,
        "aws:PrincipalArn": principal,
        "aws:PrincipalAccount": account,
        "aws:PrincipalType": "User",
        "aws:ResourceAccount": key.account,
    }
    keys: dict[str, tuple[str, ...]] = {name.lower(): (value,) for name, value in single.items() if value is not None}
    for name, value in (facts.context or {}).items():  # two names may differ by case only
        named = CONTEXT_KEY + name.lower()
        keys[named] = (*keys.get(named, ()), value)
    for name, value in key.tags.items():
        named = TAG_KEY + name.lower()
        keys[named] = (*keys.get(named, ()), value)
    many = {
        "kms:encryptioncontextkeys": tuple(facts.context or ()),
        "kms:grantoperations": facts.grant_operations or (),
        "kms:resourcealiases": facts.resource_aliases,
    }
    keys.update({name: values for name, values in many.items() if values})
    return keys


def _constraint_type(constraints: Constraints | None) -> str | None:
    if constraints is None:
        return None
    if constraints.equals is not None:
        return "EncryptionContextEquals"
    return "EncryptionContextSubset" if constraints.subset is not None else None


def _truth(value: bool | None) -> str | None:
    return None if value is None else str(value).lower()


def _number(value: int | None) -> str | None:
    return None if value is None else str(value)


def _granted(requester: Requester, action: Action, facts: Facts, grants: Iterable[Grant]) -> bool:
    return any(
        action.value in grant.operations
        and stands_for(grant.grantee, requester.account)
        and (action in UNCONSTRAINED or context_fits(grant, facts.context or {}))
        and (action is not Action.CREATE_GRANT or _covers(grant, facts))
        for grant in grants
    )


def _covers(parent: Grant, facts: Facts) -> bool:
    """Say whether a grant made under ``parent`` would be no wider than it (KMS API, CreateGrant)."""
    child = facts.constraints or Constraints()
    if not set(facts.grant_operations or ()) <= set(parent.operations):
        return False
    if parent.constraints.equals is not None and child.equals != parent.constraints.equals:
        return False
    needed = (parent.constraints.subset or {}).items()
    return not needed or any(needed <= (pairs or {}).items() for pairs in (child.equals, child.subset))


def context_fits(grant: Grant, context: Mapping[str, str]) -> bool:
    """Say whether an encryption context is within the grant's constraints."""
    equals, subset = grant.constraints.equals, grant.constraints.subset
    return (equals is None or equals == dict(context)) and (subset is None or subset.items() <= context.items())


def stands_for(principal: str | None, account: AccountId) -> bool:
    """Say whether a principal is an account's user: the number decides, the name in it is decoration."""
    return principal is not None and (
        principal == account_root_arn(account) or principal.startswith(user_arn(account, ""))
    )


def check_replacement(requester: Requester, key: Cmk, document: str, *, bypass: bool) -> Policy:
    """Return the policy of a document that may become the key's.

    Raises MalformedPolicy: for what is wrong with it, and, unless ``bypass``, when the requester could not change it
    again (KMS API, PutKeyPolicy, BypassPolicyLockoutSafetyCheck).
    """
    policy = parse_policy(document)
    refuse_unknown(policy)
    facts = Facts(bypass_lockout_check=False)
    if not bypass and policy.decide(access_request(requester, Action.PUT_KEY_POLICY, key, facts)) is not Effect.ALLOW:
        raise MalformedPolicy(reason="The new key policy will not allow you to update the key policy in the future")
    return policy


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
                        "kms:ViaService": SERVICE,
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
