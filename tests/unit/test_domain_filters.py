"""EC2's filters: wildcards, escapes, limits, and what is told of a filter that does not exist."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebsd.control.describe import JOB_FILTERS, MODIFICATION_FILTERS, SNAPSHOT_FILTERS, VOLUME_FILTERS
from ebsd.domain.errors import EbsdError, FilterLimitExceeded, InvalidFilter, InvalidParameterValue
from ebsd.domain.filters import parse_filters, passes

VOLUME: dict[str, Any] = {
    "VolumeId": "vol-0123456789abcdef0",
    "Name": "db-1",
    "OwnerId": "000000001000",
    "State": "in-use",
    "Size": 10,
    "Encrypted": True,
    "KmsKeyId": "arn:aws:kms:local:000000001000:key/1",
    "AvailabilityZone": "local-1a",
    "VolumeType": "ebsd",
    "CreateTime": "2026-01-02T03:04:05Z",
    "Integrity": "verified",
    "Attachments": [{"State": "attached", "Device": "/dev/loop5000", "InstanceId": "i-1", "AttachTime": "2026-02-03"}],
    "Tags": [{"Key": "env", "Value": "lab*1"}, {"Key": "team", "Value": ""}],
}


def chosen(*filters: tuple[str, list[str]]) -> bool:
    return passes(VOLUME, parse_filters([{"Name": n, "Values": v} for n, v in filters], VOLUME_FILTERS))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("volume-id", "vol-0123456789abcdef0", True),
        ("volume-id", "vol-*", True),
        ("volume-id", "VOL-*", False),
        ("name", "db-?", True),
        ("name", "db-??", False),
        ("status", "in-use", True),
        ("state", "in-use", True),
        ("encrypted", "true", True),
        ("encrypted", "True", False),
        ("size", "10", True),
        ("size", "1", False),
        ("create-time", "2026-01-02T*", True),
        ("create-time", "2026-01-03T*", False),
        ("kms-key-id", "*key/1", True),
        ("snapshot-id", "", True),
        ("snapshot-id", "snap-*", False),
        ("attachment.device", "/dev/loop*", True),
        ("attachment.attach-time", "2026-02*", True),
        ("attachment.instance-id", "i-2", False),
        ("tag-key", "env", True),
        ("tag-key", "environment", False),
        ("tag:env", "lab*", True),
        ("tag:env", r"lab\*1", True),
        ("tag:env", r"lab\*2", False),
        ("tag:env", r"la\b*", True),
        ("tag:team", "", True),
        ("tag:absent", "*", False),
    ],
)
def test_one_filter(name: str, value: str, expected: bool) -> None:
    assert chosen((name, [value])) is expected


def test_values_are_alternatives_and_filters_are_not() -> None:
    assert chosen(("status", ["available", "in-use"]), ("encrypted", ["true"]))
    assert not chosen(("status", ["available", "in-use"]), ("encrypted", ["false"]))


@given(st.text("ab*?\\", max_size=12), st.text("ab*?\\", max_size=12))
def test_the_matcher_agrees_with_a_regular_expression(pattern: str, text: str) -> None:
    expression, at = "", 0
    while at < len(pattern):
        if pattern[at] == "\\":
            expression += re.escape(pattern[at + 1 : at + 2] or "\\")
            at += 2
            continue
        expression += {"*": ".*", "?": "."}.get(pattern[at]) or re.escape(pattern[at])
        at += 1
    expected = re.fullmatch(expression, text, re.DOTALL) is not None
    found = parse_filters([{"Name": "name", "Values": [pattern]}], VOLUME_FILTERS)
    assert passes({**VOLUME, "Name": text}, found) is expected


@pytest.mark.parametrize("known", [VOLUME_FILTERS, SNAPSHOT_FILTERS, MODIFICATION_FILTERS, JOB_FILTERS])
@pytest.mark.parametrize("name", ["flavour", "tag:", "Status", ""])
def test_an_unknown_filter_lists_those_that_there_are(known: Any, name: str) -> None:
    if name == "tag:" and name in known:
        return  # a tag without a key is none that a resource has
    with pytest.raises(InvalidFilter) as caught:
        parse_filters([{"Name": name, "Values": ["x"]}], known)
    assert caught.value.code == "InvalidParameterValue"
    assert caught.value.message == f"The filter '{name}' is invalid."
    for each in known:
        assert (each if each != "tag:" else "tag:KEY") in caught.value.hint


@pytest.mark.parametrize(
    ("filters", "error"),
    [
        ([("status", ["x"])] * 51, FilterLimitExceeded),
        ([("status", ["x"] * 201)], FilterLimitExceeded),
        ([("status", [])], InvalidParameterValue),
    ],
)
def test_limits(filters: list[tuple[str, list[str]]], error: type[EbsdError]) -> None:
    with pytest.raises(error):
        chosen(*filters)
    assert chosen(*[("status", ["in-use"])] * 50)
    assert chosen(("status", ["in-use"] * 200))
