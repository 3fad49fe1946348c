"""Limits of accounts: who may make volumes and snapshots, how many, and how large. Pure.

Source of the codes: EC2 API reference, "Error codes": VolumeLimitExceeded is for both number and storage of volumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from ebsd.domain.errors import (
    EbsdError,
    JobLimitExceeded,
    MayNotCreate,
    SnapshotLimitExceeded,
    VolumeBytesExceeded,
    VolumeLimitExceeded,
)
from ebsd.domain.ids import AccountId, uid_of_account


class Counted(Enum):
    """What an account can have a limit of; the value is the member of the configuration."""

    VOLUMES = "volumes"
    VOLUME_BYTES = "volume_bytes"
    """Bytes provisioned: the sizes of its volumes, whether they are written or not."""
    SNAPSHOTS = "snapshots"
    JOBS = "jobs"
    """That have not ended, one that waits to go on included."""


Limits = Mapping[Counted, int]
"""What is not in it has no limit."""

_EXCEEDED: Final[Mapping[Counted, type[EbsdError]]] = {
    Counted.VOLUMES: VolumeLimitExceeded,
    Counted.VOLUME_BYTES: VolumeBytesExceeded,
    Counted.SNAPSHOTS: SnapshotLimitExceeded,
    Counted.JOBS: JobLimitExceeded,
}
_MADE: Final = (Counted.VOLUMES, Counted.SNAPSHOTS)


@dataclass(frozen=True, slots=True)
class AccountLimits:
    """The limits of all accounts. Administrators have none: who can change the configuration needs none."""

    everybody: Limits = field(default_factory=dict)
    users: Mapping[int, Limits] = field(default_factory=dict)
    """By uid; what a user's own limits do not name is as for everybody."""
    creators: frozenset[int] | None = None
    """Uids of those who may make anything; None: everybody."""
    administrators: frozenset[int] = frozenset({0})

    def of(self, account: AccountId) -> Limits:
        """Return the limits of an account."""
        uid = uid_of_account(account)
        return {} if uid in self.administrators else {**self.everybody, **self.users.get(uid, {})}

    def may_create(self, account: AccountId) -> bool:
        uid = uid_of_account(account)
        return self.creators is None or uid in self.creators or uid in self.administrators

    def check(self, account: AccountId, counted: Counted, used: int) -> None:
        """Return when an account may have come to use that much; raises the error of what it may not."""
        if counted in _MADE and not self.may_create(account):
            raise MayNotCreate(account=account)
        limit = self.of(account).get(counted)
        if limit is not None and used > limit:
            raise _EXCEEDED[counted](used=used, limit=limit)
