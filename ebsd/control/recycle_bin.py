"""The recycle bin: its rules, what lies in it, how something comes out of it again or leaves it for good.

A deletion that a rule matches changes the row's state and its name, and nothing else: that is one commit, and so is the
way back. What its time is over for is deleted as if by a user, by whoever tends the clock (``expiries``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ebsd.control.catalogue import Catalogue
from ebsd.control.describe import describe_snapshot
from ebsd.control.host import Host
from ebsd.control.lineages import Lineages
from ebsd.control.pages import parse_page, taken
from ebsd.control.snapshots import Snapshots
from ebsd.control.volumes import Volumes
from ebsd.domain.errors import (
    AmbiguousName,
    EbsdError,
    NameInUse,
    RecycleBinRuleLimit,
    RecycleBinRuleNotFound,
    SnapshotNotFound,
    VolumeNotFound,
)
from ebsd.domain.ids import SnapshotId, VolumeId, looks_like_snapshot_id, looks_like_volume_id, parse_resource_id
from ebsd.domain.model import Caller, Snapshot, Volume
from ebsd.domain.recycling import MAX_RULES, Binned, ResourceType, Rule, check_rule
from ebsd.domain.states import SnapshotEvent, VolumeEvent, next_snapshot_state, next_volume_state
from ebsd.domain.units import gib_rounded_up
from ebsd.store.catalog import Transaction

log = logging.getLogger(__name__)

RULE_ID_BYTES: Final = 6

_PREFIX: Final = {ResourceType.SNAPSHOT: "snap-", ResourceType.VOLUME: "vol-"}
_LOOKS_LIKE: Final[Mapping[ResourceType, Callable[[str], bool]]] = {
    ResourceType.SNAPSHOT: looks_like_snapshot_id,
    ResourceType.VOLUME: looks_like_volume_id,
}


class RecycleBin:
    """Use cases on the rules and on what is in the bin; the way into it is that of a deletion."""

    def __init__(
        self, host: Host, catalogue: Catalogue, volumes: Volumes, snapshots: Snapshots, lineages: Lineages
    ) -> None:
        self._host = host
        self._catalogue = catalogue
        self._volumes = volumes
        self._snapshots = snapshots
        self._lineages = lineages

    # --- rules

    async def create_rule(self, caller: Caller, rule: Rule) -> Rule:
        """Add a rule of the caller's account; raises RecycleBinRuleLimit and what ``check_rule`` does."""
        checked = check_rule(rule)

        def add(t: Transaction) -> None:
            if len(t.bin_rules(caller.account)) >= MAX_RULES:
                raise RecycleBinRuleLimit(limit=MAX_RULES)
            t.put_bin_rule(checked)

        await self._catalogue.run(add)
        return checked

    def new_rule_id(self) -> str:
        return self._host.random(RULE_ID_BYTES).hex()[:11]

    async def rules(self, caller: Caller) -> list[Rule]:
        return await self._catalogue.run(lambda t: t.bin_rules(None if caller.is_admin else caller.account))

    async def delete_rule(self, caller: Caller, ident: str) -> None:
        """Remove a rule; what is in the bin keeps its date. Raises RecycleBinRuleNotFound, also for another's."""

        def remove(t: Transaction) -> None:
            mine = t.bin_rules(None if caller.is_admin else caller.account)
            if ident not in {rule.id for rule in mine}:
                raise RecycleBinRuleNotFound(rule=ident)
            t.remove_bin_rule(ident)

        await self._catalogue.run(remove)

    # --- what is in it

    async def content(
        self, caller: Caller, kind: ResourceType, names: Sequence[str] | None, limit: int | None, token: str | None
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Return what is in the bin of one type, as List...InRecycleBin does, oldest first, in pages.

        Raises VolumeNotFound or SnapshotNotFound for a named one that is not in it.
        """
        page = parse_page(limit, token, _LOOKS_LIKE[kind])

        def load(t: Transaction) -> list[tuple[Binned, Volume | Snapshot]]:
            if names is not None:
                found = [_find(t, caller, name, kind) for name in names]
            else:
                account = None if caller.is_admin else caller.account
                found = t.bin_content(account, page.after, page.size + 1, _PREFIX[kind])
            return [(each, _row(t, each)) for each in found]

        rows = await self._catalogue.run(load)
        size = page.size if names is None else len(names)
        return taken(rows, size, lambda row: (row[0].entered, row[0].resource), lambda row: _describe(*row))

    async def restore(self, caller: Caller, name_or_id: str, kind: ResourceType) -> Volume | Snapshot:
        """Take something out of the bin, under its name where that is free, else under its id."""

        def back(t: Transaction) -> Volume | Snapshot:
            found = _find(t, caller, name_or_id, kind)
            row = _row(t, found)
            if isinstance(row, Volume):
                t.set_volume_state(row.id, next_volume_state(row.id, row.state, VolumeEvent.RECOVER))
            else:
                state = next_snapshot_state(row.id, row.state, SnapshotEvent.RECOVER)
                if state is None:
                    raise AssertionError("BUG: a recovery ends no snapshot")
                t.set_snapshot_state(row.id, state)
                t.resume_shares(row.id)
            t.remove_binned(row.id)
            try:
                t.give_name(found.account, found.name, row.id)
            except NameInUse as exc:
                log.warning("%s keeps its id as its name: %s", row.id, exc.message)
            return _row(t, found)

        return await self._catalogue.run(back)

    async def held(self, caller: Caller, *, with_sizes: bool) -> dict[str, Any] | None:
        """Return RecycleBinStatus: how much of whom is in the bin; None when nothing is.

        ``with_sizes``: also the bytes that each one's deletion would give back, added up, for which maps are read.
        """

        account = None if caller.is_admin else caller.account
        # Of the ids alone: status is asked often, and there may be thousands.
        idents = [each.resource for each in await self._catalogue.run(lambda t: t.bin_content(account))]
        if not idents:
            return None
        snapshots = sum(1 for ident in idents if looks_like_snapshot_id(ident))
        status: dict[str, Any] = {"Snapshots": snapshots, "Volumes": len(idents) - snapshots}
        if with_sizes:
            lineages = await self._catalogue.run(lambda t: t.bin_lineages(account))
            usages = await self._lineages.usages(lineages)
            status["UniqueBytes"] = sum(usages[ident].unique for ident in idents if ident in usages)
        return status

    async def purge(self) -> None:
        """Delete for good what its time is over for; called now and then while the clock is to be trusted."""
        now = self._host.now()
        for due in await self._catalogue.run(lambda t: t.bin_due(now)):
            log.info("%s leaves the recycle bin, where it was since %s", due.resource, due.entered)
            try:
                if looks_like_volume_id(due.resource):
                    await self._volumes.purge(VolumeId(due.resource))
                else:
                    await self._snapshots.purge(SnapshotId(due.resource))
            except (EbsdError, OSError) as exc:  # one that cannot go shall not keep the others
                log.error("%s stays in the recycle bin for now: %s", due.resource, exc)


def _find(t: Transaction, caller: Caller, name_or_id: str, kind: ResourceType) -> Binned:
    """Return what a caller means in the bin: by its id, or by the name that it had in his account."""
    looks_like, prefix = _LOOKS_LIKE[kind], _PREFIX[kind]
    if looks_like(name_or_id):
        found = t.binned(parse_resource_id(name_or_id))
        matching = [] if found is None or not (caller.is_admin or found.account == caller.account) else [found]
    else:
        matching = [each for each in t.bin_content(caller.account, kind=prefix) if each.name == name_or_id]
    if len(matching) > 1:
        raise AmbiguousName(name=name_or_id, resources=", ".join(each.resource for each in matching))
    if not matching:
        error = (
            VolumeNotFound(volume=name_or_id) if kind is ResourceType.VOLUME else SnapshotNotFound(snapshot=name_or_id)
        )
        error.hint = "`ebsctl recycle-bin list` shows what is in the recycle bin."
        raise error
    return matching[0]


def _row(t: Transaction, found: Binned) -> Volume | Snapshot:
    if looks_like_volume_id(found.resource):
        return t.volume(VolumeId(found.resource))
    return t.snapshot(SnapshotId(found.resource))


def _describe(found: Binned, row: Volume | Snapshot) -> dict[str, Any]:
    described: dict[str, Any] = {
        "Name": found.name,
        "OwnerId": row.account,
        "State": row.state.value,
        "SizeBytes": row.size,
        "RecycleBinEnterTime": found.entered,
        "RecycleBinExitTime": found.leaves,
    }
    if isinstance(row, Volume):
        source = {} if row.snapshot is None else {"SnapshotId": row.snapshot}
        return {"VolumeId": row.id, "Size": gib_rounded_up(row.size), "CreateTime": row.created, **source, **described}
    shown = describe_snapshot(row, 100)
    return {name: shown[name] for name in ("SnapshotId", "VolumeId", "Description")} | described


def describe_rule(rule: Rule) -> dict[str, Any]:
    """Return the RecycleBinRule of io.ebsd.Control."""
    return {
        "Identifier": rule.id,
        "OwnerId": rule.account,
        "ResourceType": rule.type.value,
        "RetentionDays": rule.days,
        "ResourceTags": [_tag(*each) for each in rule.tags],
        "ExcludeResourceTags": [_tag(*each) for each in rule.excluded],
        "Description": rule.description,
        "CreationTime": rule.created,
    }


def _tag(key: str, value: str | None) -> dict[str, str]:
    return {"Key": key} if value is None else {"Key": key, "Value": value}
