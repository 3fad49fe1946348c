"""The recycle bin: which deleted snapshots and volumes are kept, and for how long. Pure.

Source: https://docs.aws.amazon.com/ebs/latest/userguide/recycle-bin.html and the API reference of Recycle Bin (rbin):
a rule holds for one account and one type, for all resources (except those that have one of up to five tags) or for
those that have one of its up to 50 tags; 1 to 3650 days. Where several match, the longest wins. What is in the bin
keeps its date when the rule goes. Here an administrator can also delete at once: the disk of a host may be full.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ebsd.domain.errors import InvalidParameterCombination, InvalidParameterValue
from ebsd.domain.ids import AccountId, SnapshotId, VolumeId
from ebsd.domain.tags import check_description, check_tag

MAX_DAYS: Final = 3650
MAX_TAGS: Final = 50
MAX_EXCLUDED: Final = 5
MAX_RULES: Final = 250
"""Of one account."""

DAY: Final = 86400

TagChoice = tuple[str, str | None]
"""Key, and the value that it must have; None for any."""


class ResourceType(StrEnum):
    SNAPSHOT = "snapshot"
    VOLUME = "volume"


@dataclass(frozen=True, slots=True)
class Rule:
    """A retention rule."""

    id: str
    account: AccountId
    type: ResourceType
    days: int
    tags: tuple[TagChoice, ...]
    """Resources with one of these; empty for all."""
    excluded: tuple[TagChoice, ...]
    description: str
    created: str

    def holds_for(self, kind: ResourceType, tags: Mapping[str, str]) -> bool:
        if kind is not self.type:
            return False
        return _has_one(tags, self.tags) if self.tags else not _has_one(tags, self.excluded)


@dataclass(frozen=True, slots=True)
class Binned:
    """What lies in the bin. Times: RFC 3339."""

    resource: VolumeId | SnapshotId
    account: AccountId
    name: str
    """The name that it had; in the bin its id stands for it, and others may take the name."""
    entered: str
    leaves: str
    rule: str


def check_rule(rule: Rule) -> Rule:
    """Return a rule that can be; raises InvalidParameterValue, InvalidParameterCombination, InvalidTag."""
    if not 1 <= rule.days <= MAX_DAYS:
        raise InvalidParameterValue(
            value=rule.days, parameter="RetentionDays", reason=f"it is from 1 to {MAX_DAYS} days"
        )
    if rule.tags and rule.excluded:
        raise InvalidParameterCombination(
            reason="ExcludeResourceTags are for rules that hold for all resources, which have no ResourceTags"
        )
    for tags, parameter, most in (
        (rule.tags, "ResourceTags", MAX_TAGS), (rule.excluded, "ExcludeResourceTags", MAX_EXCLUDED),
    ):  # fmt: skip
        if len(tags) > most:
            raise InvalidParameterValue(value=len(tags), parameter=parameter, reason=f"it has at most {most} tags")
        for key, value in tags:
            check_tag(key, value or "")
    check_description(rule.description)
    return rule


def longest(rules: Iterable[Rule], kind: ResourceType, tags: Mapping[str, str]) -> Rule | None:
    """Return the rule that a deleted resource is kept by; None when it is kept by none."""
    matching = [rule for rule in rules if rule.holds_for(kind, tags)]
    return max(matching, key=lambda rule: rule.days, default=None)


def _has_one(tags: Mapping[str, str], wanted: Iterable[TagChoice]) -> bool:
    return any(key in tags and value in (None, tags[key]) for key, value in wanted)
