"""Anchors: what the key service remembers of each volume and snapshot, so that nobody can swap it on the disk. Pure.

An anchor says whether the resource is encrypted, under which CMK, with which data key (by check value), whose it
is, and the lowest record generation it may show. It finds a substituted key, an "unencrypted" flag set by a
tamperer, and a store that was rolled back without the broker's state.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from ebsd.crypto.kdf import DATA_KEY_BYTES, key_check_value
from ebsd.crypto.secret import Secret
from ebsd.domain.errors import IncorrectState, IntegrityFailure, InvalidParameterValue, KmsValidation
from ebsd.domain.ids import AccountId, looks_like_snapshot_id, parse_resource_id
from ebsd.kms.model import Model
from ebsd.kms.records import Anchor

MAX_GENERATION: Final = 2**63 - 1
"""Generations are kept as signed 64-bit numbers."""


def check_resource(text: str) -> str:
    """Return the id of a volume or snapshot; raises VolumeIdMalformed or SnapshotIdMalformed."""
    return parse_resource_id(text)


def create(
    model: Model,
    resource: str,
    owner: AccountId,
    key_arn: str | None,
    kcv: bytes | None,
    context_id: str | None,
    made_from: str | None = None,
    *,
    now: str,
) -> Anchor:
    """Return a new anchor; ``key_arn``, ``kcv`` (16 bytes) and ``context_id`` are None for an unencrypted resource.

    Raises IncorrectState when there is one already: an anchor never changes what it says but for its floor.
    Raises IntegrityFailure when the context names another resource than this one. ``made_from`` is the snapshot whose
    signed record it carries at first, and whose data key it then has, if that is the same: of the same age.
    """
    _refuse_second(model, resource)
    if context_id is not None and context_id != resource:
        raise IntegrityFailure(resource=resource, reason=f"the encryption context names {context_id}")
    source = None if made_from is None else model.anchors.get(check_resource(made_from))
    check_value = None if kcv is None else kcv.hex()
    return Anchor(
        resource=resource,
        owner=owner,
        encrypted=key_arn is not None,
        key_arn=key_arn,
        kcv=check_value,
        context_id=context_id,
        data_key_created=_data_key_created(source, check_value, now),
        **_authority(source),
    )


def _authority(source: Anchor | None) -> dict[str, Any]:
    """Return what covers the map of something made from the source: its record, or, unsigned, what covers its own."""
    if source is None:
        return {}
    if source.floor > 0:
        return {"authority": source.resource, "authority_floor": source.floor}
    return {"authority": source.authority, "authority_floor": source.authority_floor}


def _data_key_created(source: Anchor | None, kcv: str | None, now: str) -> str | None:
    if kcv is None:
        return None
    return source.data_key_created if source is not None and source.kcv == kcv else now


def inherited(model: Model, resource: str, owner: AccountId, source: str) -> Anchor:
    """Return a new anchor for a snapshot that inherits the wrapped key of its source, or the lack of one.

    Nothing is unwrapped: EBS takes snapshots of a volume whose CMK is disabled, too. Raises IncorrectState for a second
    anchor, IntegrityFailure when the source has none or is another account's.
    """
    _refuse_second(model, resource)
    if not looks_like_snapshot_id(resource):
        raise InvalidParameterValue(value=resource, parameter="ResourceId", reason="only a snapshot inherits a key")
    anchor = existing(model, source)
    if anchor.owner != owner:
        raise IntegrityFailure(resource=source, reason=f"it belongs to {anchor.owner}, not to {owner}")
    return msgspec.structs.replace(anchor, resource=resource, floor=0, **_authority(anchor))


def _refuse_second(model: Model, resource: str) -> None:
    if resource in model.anchors:
        raise IncorrectState(reason=f"The key service already has an anchor for {resource}")


def existing(model: Model, resource: str) -> Anchor:
    """Return the anchor of a resource; raises IntegrityFailure when the key service knows of none."""
    anchor = model.anchors.get(check_resource(resource))
    if anchor is None:
        raise IntegrityFailure(resource=resource, reason="the key service has no anchor for it")
    return anchor


def raised(anchor: Anchor, generation: int) -> Anchor:
    """Return the anchor with the floor at least at ``generation``; it never falls. Raises InvalidParameterValue."""
    if not 0 <= generation <= MAX_GENERATION:
        raise InvalidParameterValue(
            value=generation, parameter="Generation", reason="a generation is a number from 0 to 2**63 - 1"
        )
    return anchor if generation <= anchor.floor else msgspec.structs.replace(anchor, floor=generation)


def lowered(anchor: Anchor, generation: int) -> Anchor:
    """Return the anchor of a resource that an administrator restored from a backup, with the floor at its record.

    Raises IncorrectState when its floor is not above that: nothing is to be accepted then.
    """
    if not 0 <= generation < anchor.floor:
        raise IncorrectState(reason=f"{anchor.resource} may have a record of generation {generation} already")
    return msgspec.structs.replace(anchor, floor=generation, passed=max(anchor.passed, anchor.floor))


def check_key(anchor: Anchor, key_arn: str | None) -> None:
    """Raise IntegrityFailure unless this is what the anchor says: its CMK, or no key at all (None)."""
    if key_arn is None and anchor.encrypted:
        raise IntegrityFailure(
            resource=anchor.resource, reason="the key service knows it as encrypted, but no key was named"
        )
    if key_arn is not None and not anchor.encrypted:
        raise IntegrityFailure(
            resource=anchor.resource, reason="the key service knows it as unencrypted, but a key was named"
        )
    if key_arn is not None and anchor.key_arn != key_arn:
        raise IntegrityFailure(
            resource=anchor.resource, reason=f"its key is {anchor.key_arn}, not {key_arn}, which was named"
        )


def check_session(anchor: Anchor, key_arn: str, context: Mapping[str, str]) -> None:
    """Raise IntegrityFailure unless the CMK and the encryption context of a wrapped key are the anchor's."""
    check_key(anchor, key_arn)
    if context.get("aws:ebs:id") != anchor.context_id:
        raise IntegrityFailure(resource=anchor.resource, reason="the encryption context names another resource")


def check_value(data_key: Secret) -> bytes:
    """Return the key check value (16 bytes) of a volume's data key; raises KmsValidation for one of another length."""
    if len(data_key) != DATA_KEY_BYTES:
        raise KmsValidation(reason=f"The data key of a volume has {DATA_KEY_BYTES} bytes, this one {len(data_key)}")
    return key_check_value(data_key)


def check_data_key(anchor: Anchor, data_key: Secret) -> None:
    """Raise IntegrityFailure unless this is the data key that the anchor remembers."""
    if anchor.kcv is None or not hmac.compare_digest(check_value(data_key), bytes.fromhex(anchor.kcv)):
        raise IntegrityFailure(
            resource=anchor.resource, reason="the wrapped key opens to another data key than the one recorded"
        )


def unchanged(before: Anchor, after: Anchor) -> Anchor:
    """Return the later one of two readings of an anchor; raises IntegrityFailure when more than the floor differs."""
    if msgspec.structs.replace(before, floor=0) != msgspec.structs.replace(after, floor=0):
        raise IntegrityFailure(resource=before.resource, reason="it was made anew while its key was asked for")
    return after


def as_members(anchor: Anchor) -> dict[str, Any]:
    """Return what DescribeAnchor shows."""
    members: dict[str, Any] = {
        "ResourceId": anchor.resource,
        "OwnerId": anchor.owner,
        "Encrypted": anchor.encrypted,
        "Floor": anchor.floor,
    }
    if anchor.key_arn is not None:
        members["KeyId"] = anchor.key_arn
    return members
