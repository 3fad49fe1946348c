"""Key rotation: when a CMK gets a new backing key, and what is told about it. Pure.

1. A rotation adds a backing key, which wraps from then on; the older ones keep opening what they wrapped. It never
   touches a data key or a volume.
2. A customer managed key rotates by itself while that is enabled, and on demand; an AWS managed key every year.
3. A disabled key, or one that waits for its deletion, does not rotate; it catches up once when it is enabled again.
Source: KMS API reference, EnableKeyRotation, DisableKeyRotation, GetKeyRotationStatus, RotateKeyOnDemand,
ListKeyRotations; Developer Guide, "Rotate AWS KMS keys".
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec

from ebsd.domain.errors import KmsConflict, KmsLimitExceeded, KmsValidation
from ebsd.kms.keystates import Group, KeyState, check_state
from ebsd.kms.records import BackingKey, Cmk, KeyManager

MIN_PERIOD: Final = 90
MAX_PERIOD: Final = 2560
DEFAULT_PERIOD: Final = 365
"""Days."""
MAX_ON_DEMAND: Final = 25
"""Rotations on demand that one key may have."""
TOO_NEAR: Final = timedelta(minutes=20)
"""A rotation on demand is refused when an automatic one is due so soon."""

AUTOMATIC: Final = "AUTOMATIC"
ON_DEMAND: Final = "ON_DEMAND"


def parse_time(text: str) -> datetime:
    """Return the moment of a time as documents have it, RFC 3339 in UTC."""
    return datetime.fromisoformat(text).astimezone(UTC)


def format_time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _after(now: str, days: int) -> str:
    return format_time(parse_time(now) + timedelta(days=days))


def enabled(key: Cmk, period: int | None, now: str) -> Cmk:
    """Return the key rotating every ``period`` days (None: 365), first after a whole period.

    Repeating it with the present period changes nothing. Raises KmsValidation, KeyDisabled, KmsInvalidState.
    """
    days = DEFAULT_PERIOD if period is None else period
    if not MIN_PERIOD <= days <= MAX_PERIOD:
        raise KmsValidation(reason=f"RotationPeriodInDays must be between {MIN_PERIOD} and {MAX_PERIOD}")
    check_state(key.arn, key.state, Group.ROTATION)
    if key.rotation_period_days == days:
        return key
    return msgspec.structs.replace(key, rotation_period_days=days, next_rotation=_after(now, days))


def disabled(key: Cmk) -> Cmk:
    """Return the key that rotates no more by itself. Raises KeyDisabled, KmsInvalidState."""
    check_state(key.arn, key.state, Group.ROTATION)
    return msgspec.structs.replace(key, rotation_period_days=None, next_rotation=None)


def next_rotation(key: Cmk) -> datetime | None:
    """Return when the key is due, None when it never is."""
    if key.manager is KeyManager.AWS:
        return parse_time(key.current.created) + timedelta(days=DEFAULT_PERIOD)
    return None if key.next_rotation is None else parse_time(key.next_rotation)


def is_due(key: Cmk, now: str) -> bool:
    """Say whether the key is to be rotated now."""
    due = next_rotation(key)
    return key.state is KeyState.ENABLED and due is not None and due <= parse_time(now)


def rotated(key: Cmk, material: bytes, kind: str, now: str) -> Cmk:
    """Return the key with a further backing key of the id ``material`` (32 bytes).

    An automatic rotation that is late counts from now on: what was missed is not made up for.
    """
    backing = (*key.backing, BackingKey(material.hex(), now, kind))
    following = key.next_rotation
    if kind == AUTOMATIC and key.rotation_period_days is not None:
        following = _after(now, key.rotation_period_days)
    return msgspec.structs.replace(key, backing=backing, next_rotation=following)


def check_on_demand(key: Cmk, now: str) -> None:
    """Raise unless the key may be rotated on demand: KeyDisabled, KmsInvalidState, KmsConflict, KmsLimitExceeded."""
    check_state(key.arn, key.state, Group.ROTATION)
    due = next_rotation(key)
    if due is not None and due - parse_time(now) < TOO_NEAR:
        raise KmsConflict(reason="An automatic rotation of the key is due within 20 minutes")
    if sum(material.rotation == ON_DEMAND for material in key.backing) >= MAX_ON_DEMAND:
        raise KmsLimitExceeded(what=f"a key is rotated at most {MAX_ON_DEMAND} times on demand")


def status(key: Cmk) -> dict[str, Any]:
    """Return what GetKeyRotationStatus shows."""
    due = next_rotation(key)
    pending = key.state is KeyState.PENDING_DELETION
    members: dict[str, Any] = {"KeyId": key.arn, "KeyRotationEnabled": due is not None and not pending}
    if due is not None and not pending:
        members["RotationPeriodInDays"] = key.rotation_period_days or DEFAULT_PERIOD
        members["NextRotationDate"] = format_time(due)
    return members


def material_state(key: Cmk, material: BackingKey) -> str:
    """Return KMS's KeyMaterialState of a backing key."""
    return "CURRENT" if material is key.current else "NON_CURRENT"


def rotations(key: Cmk, *, all_material: bool) -> list[dict[str, Any]]:
    """Return the entries of ListKeyRotations, oldest first; with ``all_material`` the first backing key, too."""
    entries = []
    for material in key.backing:
        if not material.rotation and not all_material:
            continue
        entry = {
            "KeyId": key.arn,
            "KeyMaterialId": material.id,
            "KeyMaterialState": material_state(key, material),
            "CreationDate": material.created,
        }
        if material.rotation:
            entry |= {"RotationDate": material.created, "RotationType": material.rotation}
        entries.append(entry)
    return entries
