"""Filters of Describe calls: the rules EC2 has for them, with its wildcards and limits.

Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/Using_Filtering.html: values of one filter are alternatives,
several filters must all match; ``*`` stands for any characters, ``?`` for one, a backslash takes their meaning from
them; values are case-sensitive; at most 50 filters and 200 values in a request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ebsd.domain.errors import FilterLimitExceeded, InvalidFilter, InvalidParameterValue

MAX_FILTERS: Final = 50
MAX_VALUES: Final = 200
"""Values of all filters of a request together."""

TAG: Final = "tag:"

_ANY: Final = object()
_ONE: Final = object()

Texts = Callable[[Mapping[str, Any]], Sequence[str]]
"""The texts of a described resource that a filter's values are compared with."""

Pattern = tuple[object, ...]
"""Characters, ``_ONE`` and ``_ANY``."""


@dataclass(frozen=True, slots=True)
class Filter:
    """One filter of a request, known to exist."""

    texts: Texts
    patterns: tuple[Pattern, ...]

    def passes(self, resource: Mapping[str, Any]) -> bool:
        return any(_matches(text, pattern) for text in self.texts(resource) for pattern in self.patterns)


def parse_filters(given: Sequence[Mapping[str, Any]], known: Mapping[str, Texts]) -> list[Filter]:
    """Read the Filters of a request. ``known``: filter -> texts; TAG in it stands for ``tag:KEY`` of a resource's Tags.

    Raises InvalidFilter for one that is not known, FilterLimitExceeded, InvalidParameterValue for one without values.
    """
    values = sum(len(each["Values"]) for each in given)
    for count, what, limit in ((len(given), "filters", MAX_FILTERS), (values, "filter values", MAX_VALUES)):
        if count > limit:
            raise FilterLimitExceeded(count=count, what=what, limit=limit)
    return [_parse(str(each["Name"]), each["Values"], known) for each in given]


def _parse(name: str, values: Sequence[str], known: Mapping[str, Texts]) -> Filter:
    if TAG in known and name.startswith(TAG):
        texts = _tag_values(name.removeprefix(TAG))
    elif name in known and name != TAG:
        texts = known[name]
    else:
        listed = sorted("tag:KEY" if each == TAG else each for each in known)
        raise InvalidFilter(name=name, known=", ".join(listed))
    if not values:
        raise InvalidParameterValue(value=name, parameter="Filter", reason="it has no values")
    return Filter(texts, tuple(_pattern(value) for value in values))


def _tag_values(key: str) -> Texts:
    return lambda resource: [tag["Value"] for tag in resource["Tags"] if tag["Key"] == key]


def passes(resource: Mapping[str, Any], filters: Sequence[Filter]) -> bool:
    """Say whether a described resource passes every filter."""
    return all(each.passes(resource) for each in filters)


def _pattern(value: str) -> Pattern:
    found: list[object] = []
    characters = iter(value)
    for character in characters:
        if character == "\\":
            found.append(next(characters, "\\"))  # a last one stands for itself
        elif character == "*":
            if not found or found[-1] is not _ANY:
                found.append(_ANY)
        else:
            found.append(_ONE if character == "?" else character)
    return tuple(found)


def _matches(text: str, pattern: Pattern) -> bool:
    """Compare in at most len(text) * len(pattern) steps: users choose both, and a regular expression would have no end.

    After a mismatch the last ``*`` takes one character more.
    """
    at = of = 0
    star, taken = -1, 0
    while at < len(text):
        if of < len(pattern) and pattern[of] is _ANY:
            star, taken = of, at
            of += 1
        elif of < len(pattern) and (pattern[of] is _ONE or pattern[of] == text[at]):
            at += 1
            of += 1
        elif star >= 0:
            taken += 1
            at, of = taken, star + 1
        else:
            return False
    return all(each is _ANY for each in pattern[of:])
