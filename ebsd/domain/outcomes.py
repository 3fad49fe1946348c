"""Encryption outcomes: what CreateVolume and CopySnapshot make of parameters, source and the account's defaults.

The table is that of the EBS user guide, "Encryption outcomes"
(https://docs.aws.amazon.com/ebs/latest/userguide/encryption-examples.html), completed for an explicit
``Encrypted=false``, which EBS treats like an absent parameter wherever encryption is inherited or the default.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from ebsd.domain.errors import CopyNotPermitted, KmsKeyRequiresEncrypted, OperationNotPermitted


class Source(Enum):
    """What a volume is made from."""

    NONE = "none"
    PLAIN_SNAPSHOT = "unencrypted snapshot"
    OWN_ENCRYPTED_SNAPSHOT = "own encrypted snapshot"
    SHARED_ENCRYPTED_SNAPSHOT = "shared encrypted snapshot"


class Outcome(Enum):
    """Under which key the new volume is encrypted."""

    UNENCRYPTED = "unencrypted"
    DEFAULT_KEY = "the account's default key"
    SOURCE_KEY = "the key of the source"
    NAMED_KEY = "the named key"


_U, _DEF, _SAME, _K = Outcome.UNENCRYPTED, Outcome.DEFAULT_KEY, Outcome.SOURCE_KEY, Outcome.NAMED_KEY

CREATE_VOLUME: Final[dict[tuple[bool, Source], tuple[Outcome, Outcome, Outcome, Outcome]]] = {
    # (encryption by default, source): Encrypted absent, true, true with KmsKeyId, false
    (False, Source.NONE): (_U, _DEF, _K, _U),
    (False, Source.PLAIN_SNAPSHOT): (_U, _DEF, _K, _U),
    (False, Source.OWN_ENCRYPTED_SNAPSHOT): (_SAME, _SAME, _K, _SAME),
    (False, Source.SHARED_ENCRYPTED_SNAPSHOT): (_DEF, _DEF, _K, _DEF),
    (True, Source.NONE): (_DEF, _DEF, _K, _DEF),
    (True, Source.PLAIN_SNAPSHOT): (_DEF, _DEF, _K, _DEF),
    (True, Source.OWN_ENCRYPTED_SNAPSHOT): (_SAME, _SAME, _K, _SAME),
    (True, Source.SHARED_ENCRYPTED_SNAPSHOT): (_DEF, _DEF, _K, _DEF),
}


COPY_SNAPSHOT: Final[dict[tuple[bool, bool], tuple[Outcome, Outcome]]] = {
    # (encryption by default, source encrypted): Encrypted absent, true without KmsKeyId. Encrypted=false is refused.
    # An encrypted source without KmsKeyId goes to the default key, not to its own: CopySnapshot is unlike CreateVolume
    # here (CopySnapshot API reference, KmsKeyId: "If this parameter is not specified, your KMS key for EBS is used").
    (False, False): (_U, _DEF),
    (False, True): (_DEF, _DEF),
    (True, False): (_DEF, _DEF),
    (True, True): (_DEF, _DEF),
}


def decide_copy_snapshot(
    *,
    encrypted: bool | None,
    key_named: bool,
    source_encrypted: bool,
    encryption_by_default: bool,
    allow_unencrypted: bool,
) -> Outcome:
    """Return under which key CopySnapshot encrypts.

    Raises CopyNotPermitted for ``Encrypted=false``, KmsKeyRequiresEncrypted for a key without ``Encrypted=true``, and
    OperationNotPermitted when the copy would be unencrypted and the configuration does not allow that.
    """
    if encrypted is False:
        raise CopyNotPermitted()
    if key_named and encrypted is not True:
        raise KmsKeyRequiresEncrypted()
    if key_named:
        return Outcome.NAMED_KEY
    absent, true = COPY_SNAPSHOT[encryption_by_default, source_encrypted]
    outcome = true if encrypted else absent
    if outcome is Outcome.UNENCRYPTED and not allow_unencrypted:
        raise OperationNotPermitted(
            reason="The copy would be unencrypted, and this installation does not allow unencrypted volumes",
            remedy="Add --encrypted, or turn encryption by default on (ebsctl defaults enable-encryption).",
        )
    return outcome


@dataclass(frozen=True, slots=True)
class CreateVolumeDecision:
    """The outcome, and whether an explicit ``Encrypted=false`` was overruled (told to the user, not an error)."""

    outcome: Outcome
    overruled: bool


def decide_create_volume(
    *,
    encrypted: bool | None,
    key_named: bool,
    source: Source,
    encryption_by_default: bool,
    allow_unencrypted: bool,
) -> CreateVolumeDecision:
    """Return under which key CreateVolume encrypts.

    Raises KmsKeyRequiresEncrypted when a key is named without ``Encrypted=true`` (EC2's
    InvalidParameterDependency) and OperationNotPermitted when the outcome is an unencrypted volume and
    the configuration does not allow those.
    """
    if key_named and encrypted is not True:
        raise KmsKeyRequiresEncrypted()
    absent, true, true_with_key, false = CREATE_VOLUME[encryption_by_default, source]
    if encrypted is None:
        outcome = absent
    elif not encrypted:
        outcome = false
    else:
        outcome = true_with_key if key_named else true
    if outcome is Outcome.UNENCRYPTED and not allow_unencrypted:
        raise OperationNotPermitted(
            reason="The volume would be unencrypted, and this installation does not allow unencrypted volumes",
            remedy="Add --encrypted, turn encryption by default on (ebsctl defaults enable-encryption), "
            "or set allow_unencrypted = true in the configuration of ebsd.",
        )
    return CreateVolumeDecision(outcome, overruled=encrypted is False and outcome is not Outcome.UNENCRYPTED)
