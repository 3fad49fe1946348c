"""The way into the recycle bin, and past it: what the deletions of volumes and snapshots have in common."""

from __future__ import annotations

from ebsd.domain.errors import UnauthorizedOperation
from ebsd.domain.model import Caller, Snapshot, Volume
from ebsd.domain.recycling import DAY, Binned, ResourceType, longest
from ebsd.domain.states import (
    SnapshotEvent,
    SnapshotState,
    VolumeEvent,
    VolumeState,
    next_snapshot_state,
    next_volume_state,
)
from ebsd.domain.times import plus
from ebsd.store.catalog import Transaction


def put_into_bin(t: Transaction, resource: Volume | Snapshot, now: str) -> bool:
    """Put what is being deleted into the bin when a rule of its account matches; says whether one did.

    In the bin its id is its name: the name is free for others. Whom a snapshot is shared with comes back with it.
    """
    kind = ResourceType.VOLUME if isinstance(resource, Volume) else ResourceType.SNAPSHOT
    if resource.state not in (VolumeState.AVAILABLE, SnapshotState.COMPLETED):
        return False
    rule = longest(t.bin_rules(resource.account), kind, resource.tags)
    if rule is None:
        return False
    if isinstance(resource, Volume):
        t.set_volume_state(resource.id, next_volume_state(resource.id, resource.state, VolumeEvent.RECYCLE))
    else:
        state = next_snapshot_state(resource.id, resource.state, SnapshotEvent.RECYCLE)
        if state is None:
            raise AssertionError("BUG: what goes into the bin is still there")
        t.set_snapshot_state(resource.id, state)
        t.suspend_shares(resource.id)
    t.put_binned(Binned(resource.id, resource.account, resource.name, now, plus(now, rule.days * DAY), rule.id))
    t.give_name(resource.account, resource.id, resource.id)
    return True


def check_permanently(caller: Caller) -> None:
    """Raise UnauthorizedOperation for who may not delete past the bin: a rule guards against its owner's mistakes."""
    if not caller.is_admin:
        raise UnauthorizedOperation(reason="only an administrator may delete without regard to the recycle bin")
