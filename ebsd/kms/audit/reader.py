"""Reading the audit log in pages: which records a query means, and whose they are.

A position is ``<number of the segment>.<offset>``, always at the beginning of a line, so a page is found at once
however long the log is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ebsd.domain.errors import InvalidParameterValue
from ebsd.domain.ids import AccountId
from ebsd.kms.audit.lines import parse_line
from ebsd.kms.audit.records import accounts_of

MAX_RESULTS: Final = 200
MAX_BYTES: Final = 256 * 1024
"""Of records in one page."""
MAX_SCAN: Final = 8 * 1024 * 1024
"""Bytes of the log that one page looks at."""

_POSITION: Final = re.compile(r"([0-9]{1,15})\.([0-9]{1,15})")
_TIME: Final = re.compile(rb'"eventTime":"([^"]*)"')


@dataclass(frozen=True, slots=True)
class Query:
    """What a record must be; None is anything."""

    account: AccountId | None = None
    """Records that concern this account."""
    key: str | None = None
    """Id of a key."""
    resource: str | None = None
    """Id of a volume or snapshot, wherever in the record."""
    event: str | None = None
    user: str | None = None
    """Name or account of who asked."""
    since: str | None = None
    """RFC 3339 UTC to the millisecond, as records have it."""
    errors_only: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    records: tuple[tuple[int, str], ...]
    """(number, JSON text)"""
    position: str
    complete: bool
    """The end of the log was reached."""


def read_page(segments: Sequence[Path], position: str | None, count: int, query: Query, limit: int) -> Page:
    """Return the next records of the first ``count`` that fit, at most ``limit``. Blocks; raises OSError.

    Raises InvalidParameterValue for a position that is none.
    """
    first, offset = _parse(position)
    found: list[tuple[int, str]] = []
    scanned = size = 0
    at = f"{first}.{offset}"
    for path in segments:
        segment = int(path.stem.removeprefix("log-"))
        if segment < first:
            continue
        start = offset if segment == first else 0
        with path.open("rb") as file:
            if start:
                file.seek(start - 1)
                if file.read(1) != b"\n":
                    raise _no_position(position)
            for raw in file:
                line = parse_line(raw[:-1]) if raw.endswith(b"\n") else None
                if line is None or line.number >= count:
                    return Page(tuple(found), at, complete=True)
                if len(found) >= limit or size >= MAX_BYTES or scanned >= MAX_SCAN:
                    return Page(tuple(found), at, complete=False)
                start += len(raw)
                scanned += len(raw)
                at = f"{segment}.{start}"
                if _may_fit(raw, query) and fits(record := line.record(), query):
                    text = json.dumps(record, separators=(",", ":"))
                    found.append((line.number, text))
                    size += len(text)
    return Page(tuple(found), at, complete=True)


def fits(record: Mapping[str, Any], query: Query) -> bool:
    """Say whether a record is one of those that the query means."""
    identity = record["userIdentity"]
    parameters = record.get("requestParameters") or {}
    arns = [item["ARN"] for item in record["resources"]] + [str(parameters.get("keyId", ""))]
    return (
        (query.account is None or query.account in accounts_of(record))
        and (query.key is None or any(arn.rpartition("/")[2] == query.key for arn in arns))
        and (query.event is None or record["eventName"] == query.event)
        and (query.user is None or query.user in (identity.get("userName"), identity.get("accountId")))
        and (not query.errors_only or "errorCode" in record)
    )


def _may_fit(raw: bytes, query: Query) -> bool:
    """Say whether a line is worth reading: what is looked for stands in it somewhere."""
    if query.since is not None:
        time = _TIME.search(raw)
        if time is not None and time[1].decode("ascii", "replace") < query.since:
            return False
    needles = (query.account, query.key, query.resource, query.event, query.user)
    return all(needle is None or json.dumps(needle)[1:-1].encode() in raw for needle in needles)


def _parse(position: str | None) -> tuple[int, int]:
    if position is None:
        return 0, 0
    match = _POSITION.fullmatch(position)
    if match is None:
        raise _no_position(position)
    return int(match[1]), int(match[2])


def _no_position(position: str | None) -> InvalidParameterValue:
    return InvalidParameterValue(
        value=str(position)[:64], parameter="NextToken", reason="LookupEvents gave no such token"
    )
