"""Times as the catalog and the interfaces have them: RFC 3339 in UTC, whole seconds, so that texts sort as times do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from ebsd.domain.errors import InvalidParameterValue


def plus(time: str, seconds: float) -> str:
    """Return the time so many seconds later; the last second of the year 9999 for what is beyond it."""
    try:
        return _text(_moment(time) + timedelta(seconds=seconds))
    except OverflowError:
        return "9999-12-31T23:59:59Z"


def seconds_between(earlier: str, later: str) -> float:
    return (_moment(later) - _moment(earlier)).total_seconds()


def parse_time(text: str, parameter: str) -> str:
    """Return a user's time, a date or RFC 3339, without a zone in UTC; raises InvalidParameterValue."""
    try:
        return _text(_moment(text))
    except (ValueError, OverflowError):
        raise InvalidParameterValue(
            value=ascii(text[:40]), parameter=parameter, reason="write it as 2027-01-31 or 2027-01-31T12:00:00Z"
        ) from None


def _moment(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ").zfill(20)
