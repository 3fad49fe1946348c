"""Key policies against what nobody thought of: any JSON is read or refused, and no statement does what it must not.

EBSD_POLICIES says how many documents each test tries (default 60).
"""

from __future__ import annotations

import json
import os
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebsd.domain.errors import MalformedPolicy
from ebsd.domain.ids import AccountId, KeyId, key_arn
from ebsd.domain.model import Caller
from ebsd.kms.keys import KeyRequest, customer_key
from ebsd.kms.policy import Requester, check_replacement
from ebsd.kms.policydocument import OPERATORS, AccessRequest, Effect, Policy, parse_policy
from ebsd.wire.messages import error_members

fuzzed = settings(
    max_examples=int(os.environ.get("EBSD_POLICIES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

ALICE, BOB = AccountId("000000001001"), AccountId("000000001002")
ARN = key_arn(ALICE, KeyId("12345678-1234-1234-1234-123456789abc"))
ROLE = f"arn:aws:sts::{ALICE}:assumed-role/aws:ec2-infrastructure/ebsd"
PRINCIPALS = [
    "*", ALICE, BOB, f"arn:aws:iam::{ALICE}:root", f"arn:aws:iam::{BOB}:root", f"arn:aws:iam::{BOB}:user/bob",
    f"arn:aws:iam::{ALICE}:user/alice", ROLE,
]  # fmt: skip
ACTIONS = ["*", "kms:*", "kms:Decrypt", "kms:De*", "kms:?ecrypt", "KMS:decrypt", "kms:Encrypt", "kms:CreateGrant"]
RESOURCES = ["*", ARN, ARN[:-1] + "?", "arn:aws:kms:*", ARN[:-1] + "0", ""]
KEYS = [
    "kms:ViaService", "kms:viaservice", "kms:CallerAccount", "kms:GrantOperations", "kms:EncryptionContextKeys",
    "kms:EncryptionContext:Dept", "kms:EncryptionContext:dept", "aws:ResourceTag/Env", "kms:RotationPeriodInDays",
    "kms:GrantIsForAWSResource",
]  # fmt: skip
TEXTS = ["a", "b", "A", "a*", "?", "*", "", "1", "2", "true", "false", "[a]", "a[", "\\", "*a*b?", "ü"]
NAMES = [
    f"{prefix}{name}{suffix}"
    for prefix in ("", "ForAnyValue:", "ForAllValues:")
    for name in OPERATORS
    for suffix in ("", "IfExists")
] + ["Null"]


def some(values: list[str]) -> st.SearchStrategy[Any]:
    """One of the values, or a list of them, as policies have it."""
    return st.sampled_from(values) | st.lists(st.sampled_from(values), min_size=1, max_size=3)


def values_for(name: str) -> st.SearchStrategy[Any]:
    operator = name.rpartition(":")[2].removesuffix("IfExists")
    if operator in ("Bool", "Null"):
        return some(["true", "false"]) | st.booleans()
    return some(["1", "2", "1.5"]) | st.integers(0, 3) if operator.startswith("Numeric") else some(TEXTS)


@st.composite
def conditions(draw: st.DrawFn) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=2, unique=True)):
        keys = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=2, unique_by=str.lower))
        found[name] = {key: draw(values_for(name)) for key in keys}
    return found


@st.composite
def statements(draw: st.DrawFn, effect: str | None = None) -> dict[str, Any]:
    chosen = effect or draw(st.sampled_from(["Allow", "Deny"]))
    made: dict[str, Any] = {"Effect": chosen}
    principal = draw(st.just("*") | some(PRINCIPALS).map(lambda who: {"AWS": who}))
    made["NotPrincipal" if chosen == "Deny" and draw(st.booleans()) else "Principal"] = principal
    made["NotAction" if draw(st.booleans()) else "Action"] = draw(some(ACTIONS))
    made["NotResource" if draw(st.booleans()) else "Resource"] = draw(some(RESOURCES))
    if draw(st.booleans()):
        made["Condition"] = draw(conditions())
    return made


requests = st.builds(
    AccessRequest,
    principal=st.sampled_from([f"arn:aws:iam::{ALICE}:user/alice", f"arn:aws:iam::{BOB}:user/bob", ROLE]),
    account=st.sampled_from([ALICE, BOB]),
    action=st.sampled_from(["kms:Decrypt", "kms:Encrypt", "kms:CreateGrant", "kms:PutKeyPolicy"]),
    resource=st.just(ARN),
    keys=st.dictionaries(
        st.sampled_from(sorted({key.lower() for key in KEYS})),
        st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3).map(tuple),
    ),
)


def read(*parts: dict[str, Any]) -> Policy:
    return parse_policy(json.dumps({"Version": "2012-10-17", "Statement": list(parts)}))


# --- no document crashes it

WORDS = [
    "Version", "2012-10-17", "2008-10-17", "Id", "Statement", "Sid", "Effect", "Allow", "Deny", "Principal", "AWS",
    "NotPrincipal", "Action", "NotAction", "Resource", "NotResource", "Condition", "Service", "kms:*", "${aws:x}",
    "\ud800", "\0", *PRINCIPALS[:4], *KEYS[:3], *NAMES[:4],
]  # fmt: skip
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=8)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=25,
)


@st.composite
def spoilt(draw: st.DrawFn) -> dict[str, Any]:
    """A good document with something else in one of its places."""
    document: dict[str, Any] = {"Version": "2012-10-17", "Statement": draw(st.lists(statements(), min_size=1))}
    place: Any = document
    while True:
        at = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[at], dict | list) or not place[at] or draw(st.booleans()):
            break
        place = place[at]
    place[at] = draw(anything)
    return document


def judge(text: str, asked: AccessRequest) -> bool:
    """Read, put and ask as the key service does; whatever it is, it is a decision or a refusal. True: it was read."""
    key = customer_key(KeyId(ARN[-36:]), ALICE, KeyRequest("", {}), bytes(32), "2026-01-01T00:00:00Z")
    requester = Requester(Caller(1001, "alice", ALICE, is_admin=False), via_service=False)
    for bypass in (True, False):
        try:
            check_replacement(requester, key, text, bypass=bypass)
        except MalformedPolicy as refusal:
            told = error_members(refusal)["Message"]
            if told != refusal.message or len(told) > 500:
                raise AssertionError(f"a refusal that cannot be sent: {told!r}") from refusal
    try:
        policy = parse_policy(text)
    except MalformedPolicy:
        return False
    assert policy.decide(asked) in (Effect.ALLOW, Effect.DENY, None)
    return True


@fuzzed
@given(anything, requests)
def test_any_json_is_read_or_refused(document: Any, asked: AccessRequest) -> None:
    judge(json.dumps(document), asked)


@fuzzed
@given(spoilt(), requests)
def test_a_document_with_one_thing_wrong_is_read_or_refused(document: Any, asked: AccessRequest) -> None:
    judge(json.dumps(document), asked)


@fuzzed
@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: raw.decode("latin-1")), requests)
def test_any_text_is_refused(text: str, asked: AccessRequest) -> None:
    judge(text, asked)


@fuzzed
@given(st.lists(statements(), min_size=1, max_size=4), requests)
def test_what_the_grammar_makes_is_read(parts: list[dict[str, Any]], asked: AccessRequest) -> None:
    assert judge(json.dumps({"Version": "2012-10-17", "Statement": parts}), asked)


# --- what statements do to each other


@fuzzed
@given(st.lists(statements(), min_size=1, max_size=3), statements("Deny"), requests)
def test_a_deny_that_is_added_grants_nothing(
    parts: list[dict[str, Any]], deny: dict[str, Any], asked: AccessRequest
) -> None:
    before, after = read(*parts).decide(asked), read(*parts, deny).decide(asked)
    assert after in (before, Effect.DENY)


@fuzzed
@given(st.lists(statements(), min_size=1, max_size=3), statements("Allow"), requests)
def test_an_allow_that_is_taken_away_grants_nothing_and_denies_nothing(
    parts: list[dict[str, Any]], allow: dict[str, Any], asked: AccessRequest
) -> None:
    with_it, without = read(*parts, allow).decide(asked), read(*parts).decide(asked)
    assert without in (with_it, None)
    assert (with_it is Effect.DENY) is (without is Effect.DENY)


@fuzzed
@given(st.lists(statements(), min_size=2, max_size=4), st.randoms(), requests)
def test_the_order_of_statements_says_nothing(parts: list[dict[str, Any]], dice: Any, asked: AccessRequest) -> None:
    shuffled = list(parts)
    dice.shuffle(shuffled)
    assert read(*parts).decide(asked) is read(*shuffled).decide(asked)


@fuzzed
@given(st.lists(statements(), min_size=1, max_size=3), requests)
def test_the_document_is_what_its_statements_are(parts: list[dict[str, Any]], asked: AccessRequest) -> None:
    """Against a reading of IAM's pages that shares no code with the one tested."""
    effects = {part["Effect"] for part in parts if applies(part, asked)}
    expected = Effect.DENY if "Deny" in effects else Effect.ALLOW if "Allow" in effects else None
    assert read(*parts).decide(asked) is expected


# --- another reading of the same pages


def many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def like(text: str, pattern: str) -> bool:
    """Wildcards, one character at a time."""
    reached = {0}
    for character in pattern:
        if character == "*":
            reached = set(range(min(reached), len(text) + 1)) if reached else set()
        else:
            reached = {at + 1 for at in reached if at < len(text) and character in ("?", text[at])}
    return len(text) in reached


def is_meant(who: str, asked: AccessRequest) -> bool:
    if who in ("*", asked.principal):
        return True
    prefix = f"arn:aws:iam::{asked.account}:"
    if not asked.principal.startswith(prefix + "user/"):
        return False
    return who == asked.account or who == prefix + "root" or who.startswith(prefix + "user/")


def applies(part: dict[str, Any], asked: AccessRequest) -> bool:
    def selected(name: str, fits: Any) -> bool:
        if name in part:
            return any(fits(each) for each in many(part[name]))
        return not any(fits(each) for each in many(part[f"Not{name}"]))

    who = part.get("Principal", part.get("NotPrincipal"))
    meant = any(is_meant(each, asked) for each in many("*" if who == "*" else who["AWS"]))
    return (
        meant is ("Principal" in part)
        and selected("Action", lambda each: like(asked.action.lower(), each.lower()))
        and selected("Resource", lambda each: like(asked.resource, each))
        and all(
            holds(name, key, [shown(value) for value in many(values)], asked, part["Effect"])
            for name, tests in part.get("Condition", {}).items()
            for key, values in tests.items()
        )
    )


def shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def holds(name: str, key: str, wanted: list[str], asked: AccessRequest, effect: str) -> bool:
    found = asked.keys.get(key.lower())
    if name == "Null":
        return ("false" if found else "true") in wanted
    quantifier, _, rest = name.rpartition(":")
    operator = rest.removesuffix("IfExists")
    positive = operator.replace("Not", "")
    negated = positive != operator
    if not found:
        return {"ForAllValues": True, "ForAnyValue": False, "": negated or rest != operator}[quantifier]
    results = [any(compare(positive, value, each) for each in wanted) is not negated for value in found]
    if quantifier:
        return any(results) if quantifier == "ForAnyValue" else all(results)
    if key.lower().startswith(("kms:encryptioncontext:", "aws:resourcetag/")):
        return any(results) if effect == "Deny" else all(results)
    return all(results) if negated else any(results)


def compare(operator: str, value: str, wanted: str) -> bool:
    if operator.startswith("Numeric"):
        try:
            left, right = float(value), float(wanted)
        except ValueError:
            return False
        sign = {"Equals": left == right, "LessThan": left < right, "LessThanEquals": left <= right,
                "GreaterThan": left > right, "GreaterThanEquals": left >= right}  # fmt: skip
        return sign[operator.removeprefix("Numeric")]
    if operator in ("Bool", "StringEqualsIgnoreCase"):
        return value.lower() == wanted.lower()
    return value == wanted if operator == "StringEquals" else like(value, wanted)
