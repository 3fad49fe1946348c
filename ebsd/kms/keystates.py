"""Key states: which group of operations AWS KMS allows in which state of a CMK. Pure.

1. ``MATRIX`` is the only place that judges a key state; an operation names its group, never a state.
2. A pair that is not in the table is a bug, not a refusal.
Source: AWS KMS Developer Guide, "Key states of AWS KMS keys" (key-state table). Where AWS lists two errors
for PendingDeletion, KMSInvalidStateException is taken: DisabledException is left to disabled keys.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Final

from ebsd.domain.errors import KeyDisabled, KmsInvalidState


class KeyState(StrEnum):
    ENABLED = "Enabled"
    DISABLED = "Disabled"
    PENDING_DELETION = "PendingDeletion"
    """Reserved: no action leads here yet, but a document may say so and is then obeyed."""


class Group(Enum):
    """Operations that a key state treats alike."""

    CRYPTO = "Encrypt, Decrypt, ReEncrypt, GenerateDataKey*"
    CREATE_GRANT = "CreateGrant"
    READ = "DescribeKey, List*, GetKeyRotationStatus, Get/PutKeyPolicy, RetireGrant, RevokeGrant, DeleteAlias"
    LABEL = "CreateAlias, TagResource, UntagResource, UpdateKeyDescription"
    NEW_ALIAS_TARGET = "UpdateAlias, the key it shall point to"
    SWITCH = "EnableKey, DisableKey"
    ROTATION = "EnableKeyRotation, DisableKeyRotation, RotateKeyOnDemand"
    CANCEL_DELETION = "CancelKeyDeletion"


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
        Group.CANCEL_DELETION: (_NOT, _NOT, _OK),
    }.items()
    for state, verdict in zip(KeyState, row, strict=True)
}


def check_state(arn: str, state: KeyState, group: Group) -> None:
    """Return when the key's state allows the group; else raise KeyDisabled or KmsInvalidState.

    ``arn`` is the key's ARN: AWS's texts name the key by it, whatever name the request used.
    """
    verdict = MATRIX[group, state]
    if verdict is Verdict.DISABLED:
        raise KeyDisabled(key=arn)
    if verdict is Verdict.PENDING_DELETION:
        raise KmsInvalidState(key=arn, state="pending deletion")
    if verdict is Verdict.NOT_PENDING_DELETION:
        raise KmsInvalidState(key=arn, state="not pending deletion")
