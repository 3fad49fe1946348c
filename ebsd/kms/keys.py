"""CMKs: what CreateKey accepts, and what DescribeKey shows. Pure.

Source: KMS API reference, CreateKey, DescribeKey, KeyMetadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ebsd.domain.errors import KmsLimitExceeded, KmsValidation, NotSupported, UnsupportedKeySpec
from ebsd.domain.ids import AccountId, KeyId
from ebsd.domain.tags import merged_tags
from ebsd.kms.keystates import KeyState
from ebsd.kms.policy import default_policy, managed_policy
from ebsd.kms.records import BackingKey, Cmk, KeyManager

SYMMETRIC: Final = "SYMMETRIC_DEFAULT"
ENCRYPT_DECRYPT: Final = "ENCRYPT_DECRYPT"
MAX_DESCRIPTION: Final = 8192
MAX_KEYS_PER_ACCOUNT: Final = 10_000
"""AWS allows 100,000; here every user of the host can reach the socket, and each key costs about 2 KiB."""

KEY_SPECS: Final = (
    "RSA_2048", "RSA_3072", "RSA_4096", "ECC_NIST_P256", "ECC_NIST_P384", "ECC_NIST_P521", "ECC_SECG_P256K1",
    "ECC_NIST_EDWARDS25519", SYMMETRIC, "HMAC_224", "HMAC_256", "HMAC_384", "HMAC_512", "SM2",
    "ML_DSA_44", "ML_DSA_65", "ML_DSA_87",
)  # fmt: skip
KEY_USAGES: Final = ("SIGN_VERIFY", ENCRYPT_DECRYPT, "GENERATE_VERIFY_MAC", "KEY_AGREEMENT")
ORIGINS: Final = ("AWS_KMS", "EXTERNAL", "AWS_CLOUDHSM", "EXTERNAL_KEY_STORE")


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """The parameters of CreateKey that make a difference, checked."""

    description: str
    tags: dict[str, str]
    policy: str | None = None
    """None: the default policy."""
    bypass_lockout_check: bool = False


def check_create(
    *,
    description: str | None,
    spec: str | None,
    usage: str | None,
    origin: str | None,
    multi_region: bool | None,
    tags: Sequence[tuple[str, str]],
    policy: str | None = None,
    bypass_lockout_check: bool | None = None,
) -> KeyRequest:
    """Return the request when it asks for a key this service can make.

    Raises KmsValidation (AWS's ValidationException) for values that KMS does not know, UnsupportedKeySpec for
    the key specs and usages it knows and we do not have, NotSupported for other origins and multi-Region keys,
    InvalidTag and TagLimitExceeded.
    """
    spec, usage, origin = spec or SYMMETRIC, usage or ENCRYPT_DECRYPT, origin or "AWS_KMS"
    _check_enum("keySpec", spec, KEY_SPECS)
    _check_enum("keyUsage", usage, KEY_USAGES)
    _check_enum("origin", origin, ORIGINS)
    if spec != SYMMETRIC:
        raise UnsupportedKeySpec(spec=spec, usage=usage)
    if usage != ENCRYPT_DECRYPT:
        raise KmsValidation(reason=f"The operation failed because the KeyUsage value {usage} is not valid for {spec}")
    if origin != "AWS_KMS":
        raise NotSupported(what=f"Origin {origin}", remedy="Leave it out: the key service makes the key material.")
    if multi_region:
        raise NotSupported(what="A multi-Region key", remedy="One host is one Region; leave MultiRegion out.")
    if not _is_text(description or ""):
        raise KmsValidation(reason="Description holds text that UTF-8 cannot express")
    if len(description or "") > MAX_DESCRIPTION:
        raise KmsValidation(reason=f"Description must have at most {MAX_DESCRIPTION} characters")
    named = dict(tags)
    if len(named) != len(tags):
        raise KmsValidation(reason="Tags must not have the same TagKey twice")
    return KeyRequest(description or "", merged_tags("key", {}, named), policy, bool(bypass_lockout_check))


def _is_text(text: str) -> bool:
    """Say whether UTF-8 can express the text: JSON can bring half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_enum(member: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise KmsValidation(
            reason=f"1 validation error detected: Value '{value[:64]}' at '{member}' failed to satisfy constraint: "
            f"Member must satisfy enum value set: [{', '.join(allowed)}]"
        )


def check_key_quota(keys: int) -> None:
    """Raise KmsLimitExceeded when an account with this many keys may not have another one."""
    if keys >= MAX_KEYS_PER_ACCOUNT:
        raise KmsLimitExceeded(what=f"an account has at most {MAX_KEYS_PER_ACCOUNT} keys")


def customer_key(key_id: KeyId, account: AccountId, request: KeyRequest, backing_id: bytes, now: str) -> Cmk:
    """Return a new customer managed key whose first backing key has the given id (32 bytes)."""
    return Cmk(
        id=key_id,
        account=account,
        description=request.description,
        spec=SYMMETRIC,
        usage=ENCRYPT_DECRYPT,
        state=KeyState.ENABLED,
        manager=KeyManager.CUSTOMER,
        created=now,
        policy=default_policy(account) if request.policy is None else request.policy,
        tags=request.tags,
        backing=(BackingKey(backing_id.hex(), now),),
    )


def managed_key(key_id: KeyId, account: AccountId, backing_id: bytes, now: str) -> Cmk:
    """Return the key behind an account's alias/aws/ebs, with AWS's description of it."""
    return Cmk(
        id=key_id,
        account=account,
        description="Default key that protects my EBS volumes when no other key is defined",
        spec=SYMMETRIC,
        usage=ENCRYPT_DECRYPT,
        state=KeyState.ENABLED,
        manager=KeyManager.AWS,
        created=now,
        policy=managed_policy(account),
        tags={},
        backing=(BackingKey(backing_id.hex(), now),),
    )


def metadata(key: Cmk) -> dict[str, Any]:
    """Return KMS's KeyMetadata of a key."""
    members: dict[str, Any] = {
        "AWSAccountId": key.account,
        "KeyId": key.id,
        "Arn": key.arn,
        "CreationDate": key.created,
        "Enabled": key.state is KeyState.ENABLED,
        "Description": key.description,
        "KeyUsage": key.usage,
        "KeyState": key.state.value,
        "Origin": "AWS_KMS",
        "KeyManager": key.manager.value,
        "KeySpec": key.spec,
        "CustomerMasterKeySpec": key.spec,
        "EncryptionAlgorithms": [SYMMETRIC],
        "MultiRegion": False,
        "CurrentKeyMaterialId": key.current.id,
    }
    if key.deletion_date is not None:
        members["DeletionDate"] = key.deletion_date
    return members
