"""Identifiers and names: how each is written, read and told from the others.

Random parts come in as bytes, so this module makes no randomness of its own.
"""

from __future__ import annotations

import re
import uuid
from typing import Final, NewType

from ebsd.domain.errors import InvalidKeyArn, InvalidName, JobNotFound, SnapshotIdMalformed, VolumeIdMalformed

VolumeId = NewType("VolumeId", str)
SnapshotId = NewType("SnapshotId", str)
JobId = NewType("JobId", str)
LineageId = NewType("LineageId", str)
"""UUID text of a lineage: the volumes and snapshots that share one data key; EC2's DataEncryptionKeyId."""
KeyId = NewType("KeyId", str)
"""UUID text of a CMK."""
KeyArn = NewType("KeyArn", str)
AccountId = NewType("AccountId", str)
"""The uid of a Unix user as 12 decimal digits."""

REGION: Final = "local"
ZONE: Final = "local-1a"
MANAGED_ALIAS: Final = "alias/aws/ebs"
"""The AWS managed key that a volume gets when no other is named; made on first use."""

COPY_SOURCE: Final = VolumeId("vol-ffffffffffffffff0")
"""What a copied snapshot shows as its volume; EC2 shows such an id that belongs to no volume, too."""

ID_RANDOM_BYTES: Final = 9
"""Random bytes that ``new_id`` wants; 17 hexadecimal digits (68 bits) of them are used, as EC2 does."""

_HEX17 = "[0-9a-f]{17}"
_VOLUME = re.compile(f"vol-{_HEX17}")
_SNAPSHOT = re.compile(f"snap-{_HEX17}")
_JOB = re.compile(f"job-{_HEX17}")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ID_LIKE = re.compile(r"(vol|snap|job|key|i|arn|alias|mrk)[-:/].*", re.IGNORECASE)
_KEY_ARN = re.compile(r"arn:aws:kms:(?P<region>[a-z0-9-]+):(?P<account>[0-9]{12}):key/(?P<key>[A-Za-z0-9-]+)")
_ALIAS_ARN = re.compile(r"arn:aws:kms:local:(?P<account>[0-9]{12}):(?P<alias>alias/[A-Za-z0-9/_-]{1,250})")
_ARN = re.compile(
    r"arn:(?P<partition>aws[a-z-]*):kms:(?P<region>[a-z]{2,}(-[a-z0-9]+)+):(?P<account>[0-9]{12}):"
    r"(?P<resource>key/[A-Za-z0-9-]{1,64}|alias/[A-Za-z0-9/_-]{1,250})"
)
_ALIAS = re.compile(r"alias/[A-Za-z0-9/_-]{1,250}")


def new_id(prefix: str, random: bytes) -> str:
    """Return ``prefix-`` and 17 hexadecimal digits taken from ID_RANDOM_BYTES random bytes."""
    if len(random) != ID_RANDOM_BYTES:
        raise ValueError(f"{ID_RANDOM_BYTES} random bytes wanted, {len(random)} given")
    return f"{prefix}-{random.hex()[:17]}"


def looks_like_volume_id(text: str) -> bool:
    return text.startswith("vol-")


def looks_like_snapshot_id(text: str) -> bool:
    return text.startswith("snap-")


def parse_volume_id(text: str) -> VolumeId:
    """Return the id, or raise VolumeIdMalformed (EC2's InvalidVolumeID.Malformed)."""
    if _VOLUME.fullmatch(text) is None:
        raise VolumeIdMalformed(volume=text)
    return VolumeId(text)


def parse_snapshot_id(text: str) -> SnapshotId:
    """Return the id, or raise SnapshotIdMalformed (EC2's InvalidSnapshotID.Malformed)."""
    if _SNAPSHOT.fullmatch(text) is None:
        raise SnapshotIdMalformed(snapshot=text)
    return SnapshotId(text)


def parse_resource_id(text: str) -> VolumeId | SnapshotId:
    """Return the id of a volume or snapshot, or raise the error of the kind that its prefix names."""
    return parse_snapshot_id(text) if looks_like_snapshot_id(text) else parse_volume_id(text)


def parse_job_id(text: str) -> JobId:
    """Return the id, or raise JobNotFound."""
    if _JOB.fullmatch(text) is None:
        raise JobNotFound(job=text)
    return JobId(text)


def parse_name(text: str) -> str:
    """Return the name of a volume or snapshot, or raise InvalidName.

    Names that read like an id, an ARN or an alias are refused: everything that takes a name takes an id too.
    """
    if _ID_LIKE.fullmatch(text):
        raise InvalidName(name=text, reason="it reads like an id, an ARN or an alias")
    if _NAME.fullmatch(text) is None:
        raise InvalidName(name=text, reason="it has characters or a length that names do not have")
    return text


def parse_uuid(text: str) -> bytes:
    """Return the 16 bytes of a canonical UUID text; raises ValueError for any other text."""
    if _UUID.fullmatch(text) is None:
        raise ValueError(f"not a UUID: {text!r}")
    return uuid.UUID(text).bytes


def format_uuid(raw: bytes) -> str:
    """Return the canonical text of 16 UUID bytes."""
    return str(uuid.UUID(bytes=raw))


def account_of_uid(uid: int) -> AccountId:
    """Return the account of a Unix user: the uid as 12 digits."""
    return AccountId(f"{uid:012d}")


def is_account_id(text: str) -> bool:
    """Say whether the text is written as an account is: twelve decimal digits."""
    return len(text) == 12 and text.isascii() and text.isdecimal()


def uid_of_account(account: AccountId) -> int:
    """Return the uid of an account."""
    return int(account)


def user_arn(account: AccountId, name: str) -> str:
    """Return the principal of a Unix user, ``arn:aws:iam::<account>:user/<name>``."""
    return f"arn:aws:iam::{account}:user/{name}"


def account_root_arn(account: AccountId) -> str:
    """Return the principal that stands for a whole account in key policies."""
    return f"arn:aws:iam::{account}:root"


def key_arn(account: AccountId, key: KeyId) -> KeyArn:
    """Return the ARN of a CMK of the local back end."""
    return KeyArn(f"arn:aws:kms:{REGION}:{account}:key/{key}")


def alias_arn(account: AccountId, alias: str) -> str:
    """Return the ARN of an alias such as ``alias/backup``."""
    return f"arn:aws:kms:{REGION}:{account}:{alias}"


def volume_arn(account: AccountId, volume: VolumeId) -> str:
    return f"arn:aws:ec2:{REGION}:{account}:volume/{volume}"


def split_key_arn(text: str) -> tuple[str, AccountId, KeyId]:
    """Return (region, account, key id) of a key ARN, or raise InvalidKeyArn."""
    match = _KEY_ARN.fullmatch(text)
    if match is None:
        raise InvalidKeyArn(key=text)
    return match["region"], AccountId(match["account"]), KeyId(match["key"])


def split_alias_arn(text: str) -> tuple[AccountId, str] | None:
    """Return (account, alias) when the text is an alias ARN, else None."""
    match = _ALIAS_ARN.fullmatch(text)
    return None if match is None else (AccountId(match["account"]), match["alias"])


def foreign_region(text: str) -> str | None:
    """Return the region of an ARN of a key or alias of AWS KMS; None for what is this host's or no such ARN.

    Codes of AWS's regions have hyphens, which REGION has not.
    """
    match = _ARN.fullmatch(text)
    return None if match is None else match["region"]


def is_alias(text: str) -> bool:
    """Say whether the text is a well-formed alias name, ``alias/...``."""
    return _ALIAS.fullmatch(text) is not None


def is_key_id(text: str) -> bool:
    """Say whether the text is a bare key id: a UUID, or a multi-Region id ``mrk-`` and 32 digits."""
    return _UUID.fullmatch(text) is not None or re.fullmatch(r"mrk-[0-9a-f]{32}", text) is not None


def instance_id(machine_id: str) -> str:
    """Return the InstanceId of this host: ``i-`` and 17 digits of a digest of its machine id.

    machine-id(5) asks not to expose the id itself, so a labelled SHA-256 of it is shown.
    """
    import hashlib  # 4 ms of each start of ebsctl, which needs none of it

    digest = hashlib.sha256(b"ebsd/1/instance\0" + machine_id.strip().encode()).hexdigest()
    return f"i-{digest[:17]}"
