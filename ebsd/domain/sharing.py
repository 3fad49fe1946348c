"""Sharing of snapshots: what a change of permissions may say, what may be shared with whom, and what is asked of lists.

An account with a create volume permission can make volumes and copies from a snapshot, and nothing else.
Sources: EC2 API reference, ModifySnapshotAttribute, DescribeSnapshots, EnableSnapshotBlockPublicAccess; EBS user guide,
"Share an Amazon EBS snapshot".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from ebsd.domain.errors import (
    DefaultKeySnapshotNotShareable,
    EncryptedSnapshotNotPublic,
    InvalidParameterCombination,
    InvalidParameterValue,
    InvalidPermissionGroup,
    MissingParameter,
    PublicSharingBlocked,
    UserIdMalformed,
)
from ebsd.domain.ids import AccountId, SnapshotId

EVERYBODY: Final = "all"
"""The group that makes a snapshot public; stands where an account could."""

SELF: Final = "self"
"""What OwnerIds and RestorableByUserIds take for the caller's own account."""

MAX_CHANGES: Final = 500
"""Permissions that one ModifySnapshotAttribute may change."""

MAX_SHARES: Final = 1000
"""Accounts that a snapshot can be shared with; a bound of ours, so that nobody fills the catalog."""

ATTRIBUTE: Final = "createVolumePermission"
PRODUCT_CODES: Final = "productCodes"

_ACCOUNT: Final = re.compile(r"[0-9]{12}")
_HIGHEST_UID: Final = 2**32 - 2
"""(uid_t)-1 is nobody."""


class PublicAccess(StrEnum):
    """An account's block public access for snapshots."""

    UNBLOCKED = "unblocked"
    BLOCK_NEW = "block-new-sharing"
    """No snapshot becomes public; those that are stay so."""
    BLOCK_ALL = "block-all-sharing"
    """Those that are public are treated as private, and their permissions stay what they are."""


def parse_blocking(state: str) -> PublicAccess:
    """Read the State of EnableSnapshotBlockPublicAccess. Raises InvalidParameterValue."""
    blocking = (PublicAccess.BLOCK_ALL.value, PublicAccess.BLOCK_NEW.value)
    if state not in blocking:
        raise InvalidParameterValue(value=state, parameter="State", reason=f"it is {' or '.join(blocking)}")
    return PublicAccess(state)


def parse_account(text: str) -> AccountId:
    """Return an account from its 12 digits. Raises UserIdMalformed."""
    if _ACCOUNT.fullmatch(text) is None or int(text) > _HIGHEST_UID:
        raise UserIdMalformed(user=text)
    return AccountId(text)


# --- permissions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PermissionChange:
    """What ModifySnapshotAttribute adds or takes away: accounts and EVERYBODY. One of the two is empty."""

    add: frozenset[str] = frozenset()
    remove: frozenset[str] = frozenset()


def check_attribute(attribute: str | None, *known: str) -> None:
    """Raise InvalidParameterValue unless this is an attribute that the action takes; None is the only one there is."""
    if attribute is not None and attribute not in known:
        raise InvalidParameterValue(value=attribute, parameter="Attribute", reason=f"it is {' or '.join(known)}")


def parse_change(
    *,
    operation: str | None,
    users: Sequence[str],
    groups: Sequence[str],
    permissions: Mapping[str, Sequence[Mapping[str, Any]] | None] | None,
) -> PermissionChange:
    """Read a change in either form of EC2: OperationType with UserIds and GroupNames, or CreateVolumePermission.

    Raises InvalidParameterCombination, InvalidParameterValue, MissingParameter, UserIdMalformed and
    InvalidPermissionGroup.
    """
    add, remove = (list((permissions or {}).get(member) or ()) for member in ("Add", "Remove"))
    named = len(users) + len(groups)
    if operation not in (None, "add", "remove"):
        raise InvalidParameterValue(value=operation, parameter="OperationType", reason="it is add or remove")
    if named and operation is None:
        raise MissingParameter(parameter="OperationType")
    if (operation == "add" and remove) or (operation == "remove" and add) or (add and remove):
        raise InvalidParameterCombination(reason="One request adds permissions or removes them, and cannot do both")
    if named + len(add) + len(remove) > MAX_CHANGES:
        raise InvalidParameterCombination(reason=f"One request changes at most {MAX_CHANGES} permissions")
    direct = {*map(parse_account, users), *map(_group, groups)}
    change = PermissionChange(
        frozenset({*map(_permission, add), *(direct if operation == "add" else ())}),
        frozenset({*map(_permission, remove), *(direct if operation == "remove" else ())}),
    )
    if not change.add and not change.remove:
        raise MissingParameter(parameter="CreateVolumePermission")
    return change


def _permission(item: Mapping[str, Any]) -> str:
    user, group = item.get("UserId"), item.get("Group")
    if (user is None) == (group is None):
        raise InvalidParameterCombination(reason="A permission names either a UserId or a Group")
    return parse_account(user) if user is not None else _group(str(group))


def _group(name: str) -> str:
    if name != EVERYBODY:
        raise InvalidPermissionGroup(group=name)
    return name


def permissions_of(whom: Iterable[str]) -> list[dict[str, str]]:
    """Return EC2's CreateVolumePermissions, the group first."""
    return [
        {"Group": one} if one == EVERYBODY else {"UserId": one}
        for one in sorted(whom, key=lambda one: (one != EVERYBODY, one))
    ]


def check_change(
    change: PermissionChange,
    snapshot: SnapshotId,
    account: AccountId,
    *,
    encrypted: bool,
    under_managed_key: bool,
    blocked: PublicAccess,
) -> None:
    """Raise what forbids the change; taking permissions away is always allowed.

    Raises DefaultKeySnapshotNotShareable, EncryptedSnapshotNotPublic and PublicSharingBlocked.
    """
    if not change.add:
        return
    if under_managed_key:
        raise DefaultKeySnapshotNotShareable(snapshot=snapshot)
    if EVERYBODY not in change.add:
        return
    if encrypted:
        raise EncryptedSnapshotNotPublic(snapshot=snapshot)
    if blocked is not PublicAccess.UNBLOCKED:
        raise PublicSharingBlocked(account=account, state=blocked.value)


# --- lists ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scope:
    """Which snapshots DescribeSnapshots looks among: OwnerIds and RestorableByUserIds, ``self`` resolved."""

    owners: frozenset[AccountId] | None = None
    restorable_by: frozenset[str] | None = None
    """Accounts and EVERYBODY."""

    @property
    def reaches_public(self) -> bool:
        """Say whether public snapshots of others can be in it: EC2's own default list would be full of them."""
        return self.owners is not None or EVERYBODY in (self.restorable_by or ())


ORDINARY: Final = Scope()
"""What is listed when nothing is asked for: the caller's own and those shared with him by name."""


def parse_scope(account: AccountId, owners: Sequence[str] | None, restorable_by: Sequence[str] | None) -> Scope:
    """Read OwnerIds and RestorableByUserIds of a caller of this account. Raises UserIdMalformed."""

    def one(text: str) -> AccountId:
        return account if text == SELF else parse_account(text)

    return Scope(
        frozenset(map(one, owners)) if owners else None,
        frozenset(text if text == EVERYBODY else one(text) for text in restorable_by) if restorable_by else None,
    )
