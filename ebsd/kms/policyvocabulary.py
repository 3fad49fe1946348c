"""The names that a key policy may use: what is no action and no condition key is refused when a policy is put. Pure.

A name that nothing ever has is no error to IAM: a Deny of ``kms:Decypt``, or on a condition key that is misspelt, is
taken and denies nothing. Here it is refused. Names of AWS whose requests are never made here (asymmetric keys, custom
key stores, networks) are taken, for policies that come from there; they match nothing, as they should.
Condition keys that every request to AWS has and none here (``aws:username``, ``aws:SourceIp``) are refused: a Deny on
them would be silence. So are policy variables (``${...}``), which are not replaced.
Policies that are in place already are not asked again. Source: Service Authorization Reference, "AWS Key Management
Service"; IAM User Guide, "AWS global condition context keys".
"""

from __future__ import annotations

from typing import Final

from ebsd.domain.errors import MalformedPolicy
from ebsd.kms.policydocument import CONTEXT_KEY, TAG_KEY, Policy, Statement, is_like

ACTIONS: Final = frozenset(
    (
        "CancelKeyDeletion", "ConnectCustomKeyStore", "CreateAlias", "CreateCustomKeyStore", "CreateGrant", "CreateKey",
        "Decrypt", "DeleteAlias", "DeleteCustomKeyStore", "DeleteImportedKeyMaterial", "DeriveSharedSecret",
        "DescribeCustomKeyStores", "DescribeKey", "DisableKey", "DisableKeyRotation", "DisconnectCustomKeyStore",
        "EnableKey", "EnableKeyRotation", "Encrypt", "GenerateDataKey", "GenerateDataKeyPair",
        "GenerateDataKeyPairWithoutPlaintext", "GenerateDataKeyWithoutPlaintext", "GenerateMac", "GenerateRandom",
        "GetKeyLastUsage", "GetKeyPolicy", "GetKeyRotationStatus", "GetParametersForImport", "GetPublicKey",
        "ImportKeyMaterial", "ListAliases", "ListGrants", "ListKeyPolicies", "ListKeyRotations", "ListKeys",
        "ListResourceTags", "ListRetirableGrants", "PutKeyPolicy", "ReEncryptFrom", "ReEncryptTo", "ReplicateKey",
        "RetireGrant", "RevokeGrant", "RotateKeyOnDemand", "ScheduleKeyDeletion", "Sign", "SynchronizeMultiRegionKey",
        "TagResource", "UntagResource", "UpdateAlias", "UpdateCustomKeyStore", "UpdateKeyDescription",
        "UpdatePrimaryRegion", "Verify", "VerifyMac",
    )
)  # fmt: skip
"""The actions of AWS KMS."""

CONDITION_KEYS: Final = frozenset(
    name.lower()
    for name in (
        # that requests here have
        "kms:BypassPolicyLockoutSafetyCheck", "kms:CallerAccount", "kms:EncryptionAlgorithm",
        "kms:EncryptionContextKeys", "kms:GrantConstraintType", "kms:GranteePrincipal", "kms:GrantIsForAWSResource",
        "kms:GrantOperations", "kms:KeyOrigin", "kms:KeySpec", "kms:KeyUsage", "kms:MultiRegion",
        "kms:ReEncryptOnSameKey", "kms:RequestAlias", "kms:ResourceAliases", "kms:RetiringPrincipal",
        "kms:RotationPeriodInDays", "kms:ScheduleKeyDeletionPendingWindowInDays", "kms:ViaService",
        "aws:PrincipalAccount", "aws:PrincipalArn", "aws:PrincipalType", "aws:ResourceAccount",
        # that requests here never have, nor any of their kind at AWS
        "kms:CustomerMasterKeySpec", "kms:CustomerMasterKeyUsage", "kms:DataKeyPairSpec", "kms:ExpirationModel",
        "kms:GrantConstraintSourceArn", "kms:GranteeServicePrincipal", "kms:KeyAgreementAlgorithm", "kms:MacAlgorithm",
        "kms:MessageType", "kms:MultiRegionKeyType", "kms:PrimaryRegion", "kms:ReplicaRegion",
        "kms:RetiringServicePrincipal", "kms:SigningAlgorithm", "kms:ValidTo", "kms:WrappingAlgorithm",
        "kms:WrappingKeySpec", "aws:CalledVia", "aws:CalledViaFirst", "aws:CalledViaLast", "aws:FederatedProvider",
        "aws:MultiFactorAuthAge", "aws:MultiFactorAuthPresent", "aws:PrincipalIsAWSService", "aws:PrincipalOrgID",
        "aws:PrincipalOrgPaths", "aws:PrincipalServiceName", "aws:PrincipalServiceNamesList", "aws:ResourceOrgID",
        "aws:ResourceOrgPaths", "aws:SourceAccount", "aws:SourceArn", "aws:SourceOrgID", "aws:SourceOrgPaths",
        "aws:SourceVpc", "aws:SourceVpcArn", "aws:SourceVpce", "aws:TokenIssueTime", "aws:ViaAWSService",
        "aws:VpcSourceIp",
    )
)  # fmt: skip

_FAMILIES: Final = (
    CONTEXT_KEY, "kms:recipientattestation:", "aws:principaltag/", "aws:requesttag/", TAG_KEY,
)  # fmt: skip
"""Condition keys that go on with a name of the user's."""

_LOWER_ACTIONS: Final = tuple(f"kms:{name.lower()}" for name in sorted(ACTIONS))


def refuse_unknown(policy: Policy) -> None:
    """Raise MalformedPolicy for the first name in the policy that nothing could ever have."""
    for number, statement in enumerate(policy.statements, 1):
        _check_statement(statement, f"Statement {number}")


def _check_statement(statement: Statement, where: str) -> None:
    for pattern in (*(statement.actions or ()), *(statement.not_actions or ())):
        if not any(is_like(action, pattern.lower()) for action in _LOWER_ACTIONS):
            raise MalformedPolicy(reason=f"{where}: {pattern[:64]!r} is no action of KMS")
    for resource in (*(statement.resources or ()), *(statement.not_resources or ())):
        _refuse_variable(resource, where)
    for condition in statement.conditions:
        if condition.key not in CONDITION_KEYS and not _is_of_a_family(condition.key):
            raise MalformedPolicy(reason=f"{where}: {condition.key[:64]!r} is no condition key that requests have here")
        for value in condition.values:
            _refuse_variable(value, where)


def _is_of_a_family(key: str) -> bool:
    return any(key.startswith(family) and len(key) > len(family) for family in _FAMILIES)


def _refuse_variable(text: str, where: str) -> None:
    if "${" in text:
        raise MalformedPolicy(reason=f"{where}: policy variables ({text[:64]!r}) are not replaced here")
