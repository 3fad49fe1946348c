"""Texts for standard output: JSON documents, tables and fields. Pure.

1. On a terminal a table has a header and aligned columns, and sizes are written for people.
2. Elsewhere a row is one line of tab-separated cells without a header, and sizes are bytes; an empty cell
   is ``-``, because a shell's ``read`` folds empty cells away.
3. What the server sent cannot steer the terminal or break a row: control characters are replaced.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ebsd.domain.units import format_size

Document = Mapping[str, Any]
"""A JSON object as it came from the server, with AWS's member names."""

EMPTY = "-"

VOLUME_HEADER = ("NAME", "ID", "SIZE", "STATE", "KEY", "PATH", "MOUNTPOINT", "OWNER", "ALLOCATED", "UNIQUE")
SNAPSHOT_HEADER = ("NAME", "ID", "SIZE", "STATE", "PROGRESS", "VOLUME", "KEY", "START", "ALLOCATED", "UNIQUE")
JOB_HEADER = ("ID", "KIND", "STATE", "PROGRESS", "SIZE", "SOURCE", "DESTINATION", "START")
MODIFICATION_HEADER = ("VOLUME", "STATE", "FROM", "TO", "PROGRESS", "START", "END", "MESSAGE")
LOCK_HEADER = ("SNAPSHOT", "STATE", "DAYS", "EXPIRES", "COOLS-OFF-UNTIL", "CREATED")
BINNED_HEADER = ("NAME", "ID", "KIND", "SIZE", "DELETED", "UNTIL", "OWNER")
RULE_HEADER = ("ID", "TYPE", "DAYS", "TAGS", "EXCEPT", "OWNER", "DESCRIPTION")
KEY_HEADER = ("ALIASES", "ID", "STATE", "MANAGER", "SPEC", "DESCRIPTION")
ALIAS_HEADER = ("ALIAS", "KEY")
ROTATION_FIELDS = ("KeyId", "KeyRotationEnabled", "RotationPeriodInDays", "NextRotationDate")
ROTATION_HEADER = ("MATERIAL", "STATE", "ROTATION", "DATE")
GRANT_HEADER = ("ID", "NAME", "GRANTEE", "OPERATIONS", "CONTEXT")
AUDIT_HEADER = ("TIME", "EVENT", "USER", "RESOURCE", "KEY", "ERROR")
TAMPERING_HEADER = ("SEGMENT", "LINE", "RECORD", "WHAT")
DAMAGE_HEADER = ("CHUNK", "CHUNKS", "OFFSET", "LENGTH", "LAYER", "FILE", "WHAT")
FINDING_HEADER = ("LEVEL", "CHECK", "MESSAGE", "FIX")


def json_text(document: object) -> str:
    """Return one JSON document over several lines; ASCII only, so every locale can print it."""
    return json.dumps(document, indent=2)


def printable(value: object) -> str:
    """Return a cell: ``-`` for nothing, yes or no for a boolean, and no control characters."""
    if value is None or value == "":
        return EMPTY
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, for_people: bool) -> str:
    """Return rows as an aligned table under a header, or as tab-separated lines; "" when there is no row."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if not cells:
        return ""
    if not for_people:
        return "\n".join("\t".join(row) for row in cells)
    lines = [list(header), *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def fields(pairs: Iterable[tuple[str, object]], *, for_people: bool) -> str:
    """Return ``name: value`` lines with aligned values, or ``name<TAB>value`` lines."""
    cells = [(name, printable(value)) for name, value in pairs]
    if not for_people:
        return "\n".join(f"{name}\t{value}" for name, value in cells)
    width = max(len(name) for name, _ in cells) + 1
    return "\n".join(f"{name + ':':<{width}} {value}" for name, value in cells)


def size_cell(size: int | None, *, for_people: bool) -> object:
    """Return a number of bytes as a cell."""
    if size is None:
        return None
    return format_size(size) if for_people else size


def key_id_of(key: str | None) -> str | None:
    """Return the id at the end of a key ARN; other texts as they are."""
    return None if key is None else key.rpartition("/")[2]


def first_attachment(volume: Document) -> Document:
    """Return the attachment of a volume, which has at most one; an empty object when it has none."""
    attachments: Sequence[Document] = volume["Attachments"]
    return attachments[0] if attachments else {}


def volume_row(volume: Document, *, for_people: bool) -> tuple[object, ...]:
    """Return the cells under VOLUME_HEADER."""
    attachment = first_attachment(volume)
    return (
        volume["Name"],
        volume["VolumeId"],
        size_cell(volume["SizeBytes"], for_people=for_people),
        volume["State"],
        key_id_of(volume.get("KmsKeyId")),
        attachment.get("Path"),
        attachment.get("MountPoint"),
        volume["OwnerId"],
        size_cell(volume.get("AllocatedBytes"), for_people=for_people),
        size_cell(volume.get("UniqueBytes"), for_people=for_people),
    )


def usage_fields(resource: Document, *, for_people: bool) -> list[tuple[str, object]]:
    """Return what a volume or snapshot uses: allocated, shared with others, given back by its deletion."""
    return [
        (name, size_cell(resource.get(f"{name}Bytes"), for_people=for_people))
        for name in ("Allocated", "Shared", "Unique")
    ]


def volume_fields(volume: Document, *, for_people: bool) -> list[tuple[str, object]]:
    """Return the fields of one volume under AWS's member names, attachment and tags included."""
    pairs: list[tuple[str, object]] = [("VolumeId", volume["VolumeId"]), ("Name", volume["Name"])]
    pairs.append(("State", volume["State"]))
    if volume.get("StateReason"):
        pairs.append(("StateReason", volume["StateReason"]))
    pairs += [
        ("Size", size_cell(volume["SizeBytes"], for_people=for_people)),
        *usage_fields(volume, for_people=for_people),
        *([("Preallocated", True)] if volume.get("Preallocated") else []),
        ("Encrypted", volume["Encrypted"]),
        *((name, volume.get(name)) for name in ("KmsKeyId", "DataEncryptionKeyId", "SnapshotId")),
        *data_key_fields(volume),
        *((name, volume[name]) for name in ("Integrity", "OwnerId", "AvailabilityZone", "VolumeType", "CreateTime")),
    ]
    pairs += verification_fields(volume)
    for attachment in volume["Attachments"]:
        pairs += [
            ("Attachment", attachment["State"]),
            *((name, attachment.get(name)) for name in ("Path", "MountPoint", "ReadOnly", "AttachTime")),
        ]
    pairs += [(f"Tag {tag['Key']}", tag.get("Value")) for tag in volume["Tags"]]
    return pairs


def data_key_fields(resource: Document) -> list[tuple[str, object]]:
    """Return how old a data key is and the backing key that wraps it, where the key service told that."""
    names = ("DataKeyCreationDate", "KeyMaterialId", "KeyMaterialCreationDate", "KeyMaterialState")
    return [(name, resource[name]) for name in names if resource.get(name) is not None]


def verification_fields(resource: Document) -> list[tuple[str, object]]:
    """Return the field that tells of the last verification of a volume or snapshot; none when there was none."""
    found: Document | None = resource.get("LastVerification")
    if found is None:
        return []
    damage = f"{found['DamagedChunks']} of {found['Chunks']} chunks damaged"
    if found["DamagedFiles"]:
        damage += f", {found['DamagedFiles']} other files damaged"
    if not found["DamagedChunks"] and not found["DamagedFiles"]:
        damage = f"no damage in {found['Chunks']} chunks"
    return [("LastVerification", f"{found['Time']}, {found['Kind']}: {damage}")]


def report_text(report: Document, *, for_people: bool) -> str:
    """Return a VerificationReport: its fields, and a line for each damaged range or file."""
    names = ("ResourceId", "Kind", "Note", "Chunks")
    pairs: list[tuple[str, object]] = [(name, report.get(name)) for name in names if report.get(name) is not None]
    pairs.append(("Size", size_cell(report["Bytes"], for_people=for_people)))
    pairs += [(name, report[name]) for name in ("WithoutLeaf", "HashedNow", "DamagedChunks")]
    text = fields(pairs, for_people=for_people)
    if report["Damage"]:
        rows = [
            (d.get("Chunk"), d.get("Chunks"), d.get("Offset"), d.get("Length"), d["Layer"], d["File"], d["Reason"])
            for d in report["Damage"]
        ]
        text += "\n" + table(DAMAGE_HEADER, rows, for_people=for_people)
    return text if report["Complete"] else f"{text}\n(further damage is not listed)"


def snapshot_row(snapshot: Document, *, for_people: bool) -> tuple[object, ...]:
    """Return the cells under SNAPSHOT_HEADER."""
    return (
        snapshot["Name"],
        snapshot["SnapshotId"],
        size_cell(snapshot["SizeBytes"], for_people=for_people),
        snapshot["State"],
        snapshot["Progress"],
        snapshot["VolumeId"],
        key_id_of(snapshot.get("KmsKeyId")),
        snapshot["StartTime"],
        size_cell(snapshot.get("AllocatedBytes"), for_people=for_people),
        size_cell(snapshot.get("UniqueBytes"), for_people=for_people),
    )


def snapshot_fields(snapshot: Document, *, for_people: bool) -> list[tuple[str, object]]:
    """Return the fields of one snapshot under AWS's member names, tags included."""
    pairs: list[tuple[str, object]] = [
        (name, snapshot.get(name))
        for name in ("SnapshotId", "Name", "Description", "State", "StateMessage", "Progress")
        if name != "StateMessage" or snapshot.get(name)
    ]
    pairs.append(("Size", size_cell(snapshot["SizeBytes"], for_people=for_people)))
    pairs += usage_fields(snapshot, for_people=for_people)
    names = ("VolumeId", "Encrypted", "KmsKeyId", "DataEncryptionKeyId", "Integrity", "OwnerId", "StartTime")
    pairs += [(name, snapshot.get(name)) for name in (*names, "CompletionTime")]
    pairs += data_key_fields(snapshot)
    pairs += verification_fields(snapshot)
    if snapshot.get("PauseMicroseconds") is not None:
        pairs.append(("PauseMicroseconds", snapshot["PauseMicroseconds"]))
    pairs += [(f"Tag {tag['Key']}", tag.get("Value")) for tag in snapshot["Tags"]]
    return pairs


def job_progress(job: Document) -> str:
    """Return how much of a job is done, as snapshots show it: ``42%``."""
    if job["Total"] <= 0:
        return "100%" if job["State"] == "completed" else "0%"
    return f"{min(100 * job['Done'] // job['Total'], 100)}%"


def job_row(job: Document, *, for_people: bool) -> tuple[object, ...]:
    """Return the cells under JOB_HEADER."""
    return (
        job["JobId"],
        job["Kind"],
        job["State"],
        job_progress(job),
        size_cell(job["Total"], for_people=for_people),
        job["SourceId"],
        job["DestinationId"],
        job["StartTime"],
    )


def modification_row(found: Document, *, for_people: bool) -> tuple[object, ...]:
    """Return the cells under MODIFICATION_HEADER."""
    return (
        found["VolumeId"],
        found["ModificationState"],
        size_cell(found["OriginalSizeBytes"], for_people=for_people),
        size_cell(found["TargetSizeBytes"], for_people=for_people),
        f"{found['Progress']}%",
        found["StartTime"],
        found.get("EndTime"),
        found.get("StatusMessage"),
    )


def lock_row(lock: Document) -> tuple[object, ...]:
    """Return the cells under LOCK_HEADER."""
    members = ("SnapshotId", "LockState", "LockDuration", "LockExpiresOn", "CoolOffPeriodExpiresOn", "LockCreatedOn")
    return tuple(lock.get(name) for name in members)


def lock_fields(lock: Document) -> list[tuple[str, object]]:
    """Return the fields of one lock, those that it has."""
    return list(lock.items())


def binned_row(kind: str, item: Document, *, for_people: bool) -> tuple[object, ...]:
    """Return the cells under BINNED_HEADER."""
    return (
        item["Name"],
        item["VolumeId" if kind == "volume" else "SnapshotId"],
        kind,
        size_cell(item["SizeBytes"], for_people=for_people),
        item["RecycleBinEnterTime"],
        item["RecycleBinExitTime"],
        item["OwnerId"],
    )


def rule_row(rule: Document) -> tuple[object, ...]:
    """Return the cells under RULE_HEADER."""
    tags, excluded = (
        ",".join(tag["Key"] + (f"={tag['Value']}" if "Value" in tag else "") for tag in rule[member])
        for member in ("ResourceTags", "ExcludeResourceTags")
    )
    return (
        rule["Identifier"], rule["ResourceType"], rule["RetentionDays"], tags or "all", excluded, rule["OwnerId"],
        rule["Description"],
    )  # fmt: skip


def rate_cell(rate: int | None, *, for_people: bool) -> object:
    """Return bytes per second as people read them, or as they are; 0 is no rate."""
    return f"{format_size(rate)}/s" if rate and for_people else rate or None


def job_fields(job: Document, *, for_people: bool) -> list[tuple[str, object]]:
    """Return the fields of one job; a failure gives its code, message and hint."""
    pairs: list[tuple[str, object]] = [(name, job[name]) for name in ("JobId", "Kind", "State")]
    pairs += [
        ("Progress", job_progress(job)),
        *((name, size_cell(job[name], for_people=for_people)) for name in ("Done", "Total")),
        ("RateLimit", rate_cell(job.get("RateLimit"), for_people=for_people)),
        ("BytesPerSecond", rate_cell(job.get("BytesPerSecond"), for_people=for_people)),
        ("SecondsLeft", job.get("SecondsLeft")),
        *((name, job[name]) for name in ("SourceId", "DestinationId", "OwnerId", "StartTime")),
        ("EndTime", job.get("EndTime")),
    ]
    failure: Document = job.get("Error") or {}
    pairs += [(f"Error.{name}", value) for name, value in failure.items()]
    return pairs


def progress_line(done: int, total: int, *, gained: int, seconds: float, width: int) -> str:
    """Return one line about a job for a terminal of this width: bar, percent, bytes, rate and time left.

    ``gained`` bytes were done in the ``seconds`` that one has been watching; what was done before says nothing
    about the rate.
    """
    share = min(done / total, 1.0) if total > 0 else 1.0
    parts = [f"{int(share * 100):3d}%", f"{format_size(done)} of {format_size(total)}"]
    if gained > 0 and seconds > 0:
        rate = gained / seconds
        parts += [f"{format_size(int(rate))}/s", f"ETA {clock(max(total - done, 0) / rate)}"]
    text = "  ".join(parts)
    room = min(width - len(text) - 5, 40)  # the brackets, two blanks, and the last column, which may wrap
    if room >= 10:
        filled = int(share * room)
        text = f"[{'#' * filled}{'-' * (room - filled)}]  {text}"
    return text[: max(width - 1, 0)]


def clock(seconds: float) -> str:
    """Write a time span as ``0:07``, ``12:34`` or ``1:02:03``, rounded up."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def alias_names(key: Document) -> str:
    """Return the aliases of a key, joined by commas."""
    return ",".join(alias["AliasName"] for alias in key["Aliases"])


def key_row(key: Document) -> tuple[object, ...]:
    """Return the cells under KEY_HEADER of a key with its ``Aliases``."""
    return (
        alias_names(key),
        key["KeyId"],
        key["KeyState"],
        key["KeyManager"],
        key["KeySpec"],
        key["Description"],
    )


def key_fields(key: Document) -> list[tuple[str, object]]:
    """Return the fields of one key with its ``Aliases``."""
    names = ("KeyId", "Arn", "KeyState", "KeyManager", "KeySpec", "KeyUsage", "Origin", "Description")
    pairs: list[tuple[str, object]] = [(name, key[name]) for name in names]
    pairs += [("Aliases", alias_names(key)), ("CreationDate", key["CreationDate"])]
    if key.get("DeletionDate"):
        pairs.append(("DeletionDate", key["DeletionDate"]))
    pairs.append(("CurrentKeyMaterialId", key["CurrentKeyMaterialId"]))
    return pairs


def status_fields(status: Document, *, for_people: bool) -> list[tuple[str, object]]:
    """Return the fields of a status document; an object in it gives one field per member."""
    pairs: list[tuple[str, object]] = []
    for name, value in status.items():
        if isinstance(value, Mapping):
            members = [(f"{name}.{member}", inner) for member, inner in value.items()]
        else:
            members = [(name, value)]
        for member, inner in members:
            if inner is not None:
                is_size = member.endswith("Bytes")
                pairs.append((member, size_cell(inner, for_people=for_people) if is_size else inner))
    return pairs


def findings_text(findings: Sequence[Document], *, for_people: bool) -> str:
    """Return findings, one per line, with the fix below it on a terminal, as the last cell elsewhere."""
    if not for_people:
        rows = [(f["Level"], f["Check"], f["Message"], f.get("Fix")) for f in findings]
        return table(FINDING_HEADER, rows, for_people=False)
    width = max((len(f["Check"]) for f in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding['Level']:<8} {printable(finding['Check']):<{width}}  {printable(finding['Message'])}")
        if finding.get("Fix"):
            lines.append(f"{'':<8} {'':<{width}}  fix: {printable(finding['Fix'])}")
    return "\n".join(lines)


def audit_row(record: Document) -> tuple[object, ...]:
    """Return the cells under AUDIT_HEADER of a CloudTrail record."""
    identity: Document = record["userIdentity"]
    arns = [str(item["ARN"]) for item in record["resources"]]
    context: Document = (record.get("requestParameters") or {}).get("encryptionContext") or {}
    resources = [arn.rpartition("/")[2] for arn in arns if ":ec2:" in arn]
    keys = [arn.rpartition("/")[2] for arn in arns if ":key/" in arn]
    who = identity.get("userName") or str(identity.get("arn") or identity.get("invokedBy") or "").rpartition("/")[2]
    return (
        record["eventTime"],
        record["eventName"],
        who or identity.get("invokedBy"),
        resources[0] if resources else context.get("aws:ebs:id"),
        keys[0] if keys else None,
        record.get("errorCode"),
    )
