"""Account settings: encryption by default, the default key, block public access for snapshots. Pure.

Source: EC2 API reference, EnableEbsEncryptionByDefault, ModifyEbsDefaultKmsKeyId, ResetEbsDefaultKmsKeyId,
EnableSnapshotBlockPublicAccess.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ebsd.domain.errors import KmsInvalidState, NoVolumeKey
from ebsd.domain.ids import KeyId, key_arn
from ebsd.domain.sharing import PublicAccess
from ebsd.kms.keys import ENCRYPT_DECRYPT, SYMMETRIC
from ebsd.kms.keystates import Group, KeyState, check_state
from ebsd.kms.records import Account, KeyManager
from ebsd.kms.service import KeyDescription


def with_encryption_by_default(account: Account, value: bool | None) -> Account:
    """Return the settings with the given value; None leaves it."""
    return account if value is None else msgspec.structs.replace(account, encryption_by_default=value)


def with_default_key(account: Account, key: KeyDescription | None) -> Account:
    """Return the settings with this default key; None, or the account's own AWS managed key, is alias/aws/ebs again.

    Raises NoVolumeKey, KeyDisabled, KmsInvalidState: a default that no volume could use is refused.
    """
    if key is None:
        return msgspec.structs.replace(account, default_key="")
    if key.spec != SYMMETRIC or key.usage != ENCRYPT_DECRYPT:
        raise NoVolumeKey(key=key.arn, spec=key.spec, usage=key.usage)
    if key.state not in set(KeyState):  # AWS has states that keys of this host do not have
        raise KmsInvalidState(key=key.arn, state=key.state)
    check_state(key.arn, KeyState(key.state), Group.CRYPTO)
    own_managed = key.manager == KeyManager.AWS and key.arn == key_arn(account.id, KeyId(key.key_id))
    return msgspec.structs.replace(account, default_key="" if own_managed else key.arn)


def with_public_access(account: Account, value: PublicAccess | None) -> Account:
    """Return the settings with the given block public access for snapshots; None leaves it."""
    return account if value is None else msgspec.structs.replace(account, snapshot_public_access=value)


def as_members(account: Account) -> dict[str, Any]:
    """Return what GetAccount shows."""
    return {
        "EbsEncryptionByDefault": account.encryption_by_default,
        "EbsDefaultKmsKeyId": account.default_key,
        "SnapshotBlockPublicAccess": account.snapshot_public_access.value,
    }
