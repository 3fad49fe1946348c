"""Tags and descriptions: the limits EC2 sets on them.

Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/Using_Tags.html (restrictions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ebsd.domain.errors import InvalidDescription, InvalidTag, TagLimitExceeded

MAX_TAGS: Final = 50
MAX_KEY: Final = 128
MAX_VALUE: Final = 256
MAX_DESCRIPTION: Final = 255


def parse_tag(text: str) -> tuple[str, str]:
    """Read ``KEY=VALUE``; the value may be empty and may hold further equal signs. Raises InvalidTag."""
    key, equals, value = text.partition("=")
    if not equals:
        raise InvalidTag(tag=text, reason="it has no '='")
    check_tag(key, value)
    return key, value


def check_tag(key: str, value: str) -> None:
    """Raise InvalidTag when EC2 would not take this tag."""
    if not 1 <= len(key) <= MAX_KEY:
        raise InvalidTag(tag=key, reason=f"a key has 1 to {MAX_KEY} characters")
    if len(value) > MAX_VALUE:
        raise InvalidTag(tag=key, reason=f"a value has at most {MAX_VALUE} characters")
    if key.lower().startswith("aws:"):
        raise InvalidTag(tag=key, reason="keys that start with 'aws:' are reserved")
    if any(not c.isprintable() for c in key + value):
        raise InvalidTag(tag=key, reason="it holds control characters")


def merged_tags(resource: str, present: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """Return the tags after CreateTags: new values overwrite. Raises InvalidTag or TagLimitExceeded."""
    for key, value in added.items():
        check_tag(key, value)
    result = {**present, **added}
    if len(result) > MAX_TAGS:
        raise TagLimitExceeded(resource=resource, limit=MAX_TAGS)
    return result


def tags_of_members(members: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Read EC2's list of Tags; raises InvalidTag for a key that comes twice, as EC2 refuses it."""
    tags: dict[str, str] = {}
    for member in members:
        key = str(member["Key"])
        if key in tags:
            raise InvalidTag(tag=key, reason="it is given twice")
        tags[key] = str(member.get("Value") or "")
    return tags


def check_description(text: str) -> str:
    """Return the description of a snapshot, or raise InvalidDescription (CreateSnapshot: at most 255 characters)."""
    if len(text) > MAX_DESCRIPTION:
        raise InvalidDescription(reason=f"it has {len(text)} characters, and may have {MAX_DESCRIPTION}")
    if not text.isprintable():
        raise InvalidDescription(reason="it holds control characters")
    return text
