"""Pages of long lists of views, oldest first: how much one reply holds, behind what it begins, and what follows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from ebsd.domain.errors import InvalidParameterValue

Row = TypeVar("Row")

MAX_PAGE: Final = 1000
"""Views in one reply, as in EC2 (DescribeVolumes, DescribeSnapshots)."""

PAGE_BYTES: Final = 512 * 1024
"""JSON of views after which a reply ends: a message has at most 1 MiB."""


@dataclass(frozen=True, slots=True)
class Page:
    size: int
    after: tuple[str, str] | None
    """(time, id) of the last row of the page before."""


def parse_page(limit: int | None, token: str | None, is_id: Callable[[str], bool]) -> Page:
    """Read MaxResults and NextToken. Raises InvalidParameterValue for what cannot be."""
    size = MAX_PAGE if limit is None else limit
    if not 1 <= size <= MAX_PAGE:
        raise InvalidParameterValue(value=size, parameter="MaxResults", reason=f"it is from 1 to {MAX_PAGE}")
    if token is None:
        return Page(size, None)
    time, _, ident = token.partition("/")
    if not is_id(ident):
        raise InvalidParameterValue(value=token, parameter="NextToken", reason="it is none that a reply has given")
    return Page(size, (time, ident))


def taken(
    rows: Sequence[Row],
    size: int,
    place: Callable[[Row], tuple[str, str]],
    view: Callable[[Row], dict[str, Any] | None],
) -> tuple[list[dict[str, Any]], str | None]:
    """Return the views of up to ``size`` rows, and the token of what follows; None when all of ``rows`` are in.

    ``place``: (time, id) of a row. ``view``: None for a row that is not wanted; it counts as taken.
    """
    found: list[dict[str, Any]] = []
    room = PAGE_BYTES
    for at, row in enumerate(rows):
        if at == size or room < 0:
            return found, "/".join(place(rows[at - 1]))
        seen = view(row)
        if seen is not None:
            found.append(seen)
            room -= len(json.dumps(seen))
    return found, None
