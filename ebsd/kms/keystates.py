"""Key states: which operations AWS KMS allows in which state of a CMK. Pure.

1. ``MATRIX`` is the only place that judges a key state; an operation names its group, never a state.
2. A pair that is not in the table is a bug, not a refusal.
3. The states of imported key material, of custom key stores and of multi-Region keys do not occur here.
Source: AWS KMS Developer Guide, "Key states of AWS KMS keys" (key-state table). Where AWS lists two errors
for PendingDeletion, KMSInvalidStateException is taken: DisabledException is left to disabled keys.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Final

from ebsd.domain.errors import KeyDisabled, KeyPendingDeletion, KmsInvalidState


class KeyState(StrEnum):
    ENABLED = "Enabled"
    DISABLED = "Disabled"
    PENDING_DELETION = "PendingDeletion"


class Group(Enum):
    """Operations that every key state treats alike, by AWS's names; those that we do not have are left out."""

    CRYPTO = ("Encrypt", "Decrypt", "ReEncrypt", "GenerateDataKey", "GenerateDataKeyWithoutPlaintext")
    CREATE_GRANT = ("CreateGrant",)
    READ = (
        "DescribeKey", "ListKeys", "ListAliases", "ListGrants", "ListKeyPolicies", "ListKeyRotations",
        "GetKeyRotationStatus", "GetKeyPolicy", "PutKeyPolicy", "RetireGrant", "RevokeGrant", "DeleteAlias",
    )  # fmt: skip
    """Allowed in every state, so that nothing asks ``check_state`` for it."""
    LABEL = ("CreateAlias",)
    NEW_ALIAS_TARGET = ("UpdateAlias",)
    """Of the key that the alias shall name; the state of the one that it names does not matter."""
    SWITCH = ("EnableKey", "DisableKey")
    ROTATION = ("EnableKeyRotation", "DisableKeyRotation", "RotateKeyOnDemand")
    SCHEDULE_DELETION = ("ScheduleKeyDeletion",)
    CANCEL_DELETION = ("CancelKeyDeletion",)


class Verdict(Enum):
    OK = "ok"
    DISABLED = "DisabledException"
    PENDING_DELETION = "KMSInvalidStateException: is pending deletion"
    NOT_PENDING_DELETION = "KMSInvalidStateException: is not pending deletion"


_OK, _OFF, _PENDING, _NOT = Verdict.OK, Verdict.DISABLED, Verdict.PENDING_DELETION, Verdict.NOT_PENDING_DELETION

MATRIX: Final[dict[tuple[Group, KeyState], Verdict]] = {
    (group, state): verdict
    for group, row in {
        # Enabled, Disabled, PendingDeletion
        Group.CRYPTO: (_OK, _OFF, _PENDING),
        Group.CREATE_GRANT: (_OK, _OFF, _PENDING),
        Group.READ: (_OK, _OK, _OK),
        Group.LABEL: (_OK, _OK, _PENDING),
        Group.NEW_ALIAS_TARGET: (_OK, _OK, _PENDING),
        Group.SWITCH: (_OK, _OK, _PENDING),
        Group.ROTATION: (_OK, _OFF, _PENDING),
        Group.SCHEDULE_DELETION: (_OK, _OK, _PENDING),
        Group.CANCEL_DELETION: (_NOT, _NOT, _OK),
    }.items()
    for state, verdict in zip(KeyState, row, strict=True)
}


def check_state(arn: str, state: KeyState, group: Group) -> None:
    """Return when the key's state allows the group; else raise KeyDisabled, KeyPendingDeletion or KmsInvalidState.

    ``arn`` is the key's ARN: AWS's texts name the key by it, whatever name the request used.
    """
    verdict = MATRIX[group, state]
    if verdict is Verdict.DISABLED:
        raise KeyDisabled(key=arn)
    if verdict is Verdict.PENDING_DELETION:
        raise KeyPendingDeletion(key=arn)
    if verdict is Verdict.NOT_PENDING_DELETION:
        raise KmsInvalidState(key=arn, state="not pending deletion")
