"""What an examination of the store can find: a fixed list of codes, each with its severity and what to do.

``store/FORMAT.md``, section Check, shows the same list to readers. A code is never used for something else later.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple


class Severity(StrEnum):
    DAMAGE = "damage"
    """Something cannot be used, or would give wrong bytes if nothing refused it."""
    INCONSISTENCY = "inconsistency"
    """Two places disagree, and no data is affected."""
    LEAK = "leak"
    """Space that nothing uses."""
    NOTE = "note"
    """Nothing is wrong; it is said because it limits what the examination can tell."""


class Code(StrEnum):
    CATALOG_DAMAGED = "catalog-damaged"
    CATALOG_ROW = "catalog-row"
    CATALOG_REFERENCE = "catalog-reference"
    UNREADABLE = "unreadable"
    UNSUPPORTED = "unsupported"
    NOT_A_FILE = "not-a-file"
    RECORD_MISSING = "record-missing"
    RECORD_DAMAGED = "record-damaged"
    RECORD_FOREIGN = "record-foreign"
    RECORD_DISAGREES = "record-disagrees"
    RECORD_OLD = "record-old"
    ANCHOR_DISAGREES = "anchor-disagrees"
    TABLE_MISSING = "table-missing"
    TABLE_DAMAGED = "table-damaged"
    TABLE_DISAGREES = "table-disagrees"
    LAYER_MISSING = "layer-missing"
    LAYER_DAMAGED = "layer-damaged"
    LAYER_UNKNOWN = "layer-unknown"
    MAP_MISSING = "map-missing"
    MAP_DAMAGED = "map-damaged"
    MAP_FOREIGN = "map-foreign"
    MAP_DISAGREES = "map-disagrees"
    MAP_ENTRY = "map-entry"
    MAP_UNSIGNED = "map-unsigned"
    DATA_MISSING = "data-missing"
    LEAVES_DAMAGED = "leaves-damaged"
    LIVE_MISSING = "live-missing"
    MODE = "mode"
    OWNER = "owner"
    RESOURCE_UNKNOWN = "resource-unknown"
    PENDING = "pending"
    ORPHAN = "orphan"
    TEMPORARY = "temporary"
    LEAKED_SPACE = "leaked-space"
    ATTACHED = "attached"
    UNVERIFIED = "unverified"
    LIVE_VOID = "live-void"
    FOREIGN = "foreign"
    SET_ASIDE = "set-aside"
    NOT_COMPARED = "not-compared"


class Rule(NamedTuple):
    """What a code means: severity, whether a repair may touch it, and the advice."""

    severity: Severity
    repairable: bool
    advice: str


_OLDER: Final = (
    "Put the newest copy of the file back: this one is from an earlier time. What was restored is accepted by "
    "`ebsctl attach --accept-rollback`, of a snapshot `ebsctl verify --accept-rollback`."
)
_BACKUP: Final = "Put the file back from a backup of the state directory; the other volumes are not affected."
_REBUILD: Final = "Rebuild the catalog: ebsctl check --rebuild-catalog (see its help)."
_WHY: Final = "Find out who writes to the state directory besides ebsd."
_D, _I, _L, _N = Severity.DAMAGE, Severity.INCONSISTENCY, Severity.LEAK, Severity.NOTE

RULES: Final[dict[Code, Rule]] = {
    Code.CATALOG_DAMAGED: Rule(_D, False, _REBUILD),
    Code.CATALOG_ROW: Rule(_D, False, _REBUILD),
    Code.CATALOG_REFERENCE: Rule(_I, False, _REBUILD),
    Code.UNREADABLE: Rule(_D, False, "See the kernel's log for errors of the disk, and copy the directory off it."),
    Code.UNSUPPORTED: Rule(_D, False, "It was written by a newer ebsd, or changed by somebody: use that version."),
    Code.NOT_A_FILE: Rule(_D, False, _BACKUP),
    Code.RECORD_MISSING: Rule(_D, False, _BACKUP),
    Code.RECORD_DAMAGED: Rule(_D, False, _BACKUP),
    Code.RECORD_FOREIGN: Rule(_D, False, _BACKUP),
    Code.RECORD_DISAGREES: Rule(_D, False, _BACKUP),
    Code.RECORD_OLD: Rule(_D, False, _OLDER),
    Code.ANCHOR_DISAGREES: Rule(_D, False, "Put state directory and key service back from backups of one time."),
    Code.TABLE_MISSING: Rule(_D, False, _BACKUP),
    Code.TABLE_DAMAGED: Rule(_D, False, _BACKUP),
    Code.TABLE_DISAGREES: Rule(_D, False, _BACKUP),
    Code.LAYER_MISSING: Rule(_D, False, _BACKUP),
    Code.LAYER_DAMAGED: Rule(_D, False, _BACKUP),
    Code.LAYER_UNKNOWN: Rule(_I, False, _REBUILD),
    Code.MAP_MISSING: Rule(_D, False, _BACKUP),
    Code.MAP_DAMAGED: Rule(_D, False, _BACKUP),
    Code.MAP_FOREIGN: Rule(_D, False, _BACKUP),
    Code.MAP_DISAGREES: Rule(_D, False, _BACKUP),
    Code.MAP_ENTRY: Rule(_D, False, _BACKUP),
    Code.MAP_UNSIGNED: Rule(_D, False, _BACKUP),
    Code.DATA_MISSING: Rule(_D, False, _BACKUP),
    Code.LEAVES_DAMAGED: Rule(_D, False, _BACKUP),
    Code.LIVE_MISSING: Rule(_D, False, "Do not kill its volume process: detach the volume, which writes its map out."),
    Code.MODE: Rule(_I, True, "ebsctl check --repair sets it."),
    Code.OWNER: Rule(_I, True, "ebsctl check --repair sets it."),
    Code.RESOURCE_UNKNOWN: Rule(_I, False, _REBUILD),
    Code.PENDING: Rule(_I, True, "ebsctl check --repair, or the next start of ebsd, finishes or removes it."),
    Code.ORPHAN: Rule(_L, True, "ebsctl check --repair sets it aside, below STATE/aside; nothing is deleted."),
    Code.TEMPORARY: Rule(_L, True, "ebsctl check --repair, or the next start of ebsd, removes it."),
    Code.LEAKED_SPACE: Rule(_L, True, "ebsctl check --repair, or the next start of ebsd, gives it back."),
    Code.ATTACHED: Rule(_N, False, ""),
    Code.UNVERIFIED: Rule(_N, False, "Attach and detach it once: its map is signed then."),
    Code.LIVE_VOID: Rule(_N, False, "It goes away by itself."),
    Code.FOREIGN: Rule(_N, False, _WHY),
    Code.SET_ASIDE: Rule(_N, False, "Delete the directory when nothing in it is needed."),
    Code.NOT_COMPARED: Rule(_N, False, ""),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. ``resource`` is the id of a volume or snapshot, a lineage, or "" for the store itself."""

    code: Code
    resource: str
    file: str
    """Path, relative to the state directory where it lies in it; "" when no file is meant."""
    detail: str
    lineage: str = ""
    """The lineage whose locks must be held to look again; "" when it belongs to none."""
    note: bool = False
    """Shown as a note whatever its code says: a limit of the examination."""

    @property
    def severity(self) -> Severity:
        return Severity.NOTE if self.note else RULES[self.code].severity

    def as_members(self) -> dict[str, Any]:
        """Return the finding as plain data, for a channel between processes."""
        return {
            "code": self.code.value,
            "resource": self.resource,
            "file": _text(self.file),
            "detail": _text(self.detail),
            "lineage": self.lineage,
            "note": self.note,
        }

    @classmethod
    def from_members(cls, members: dict[str, Any]) -> Finding:
        return cls(**{**members, "code": Code(members["code"])})


def _text(name: str) -> str:
    """Return a text that JSON can carry: names of files may hold any bytes."""
    return name.encode("utf-8", "backslashreplace").decode()
