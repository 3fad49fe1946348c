"""Key policies: reads an AWS policy document and decides what it says of one request. Pure.

1. An explicit Deny wins; else one matching Allow is enough; else the document is silent (``Effect | None``).
2. A document is refused as a whole for anything in it that is not known by name: a misspelt Deny must not be silence.
3. A principal that is an account (its number, or ``:root``) stands for the account's user: each account has exactly
   one, and what IAM would say for it is "everything". The name in a user's ARN is decoration; the number decides.
4. A condition key that the request does not have fails a positive operator and passes a negated one, ``Null`` and
   ``...IfExists``, exactly as IAM does it.
5. Names of pairs of an encryption context, and of tags, are compared without case, so two of them may mean one
   condition key. Then an Allow needs both to pass, and one is enough for a Deny: the ambiguity is nobody's way in.
Source: IAM User Guide, "IAM JSON policy elements" (grammar, condition operators, multivalued keys, variables are not
supported); KMS Developer Guide, "Key policies in AWS KMS" and "Condition keys for AWS KMS".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import translate
from functools import lru_cache
from typing import Any, Final

from ebsd.domain.errors import MalformedPolicy
from ebsd.domain.ids import AccountId, account_root_arn, user_arn

MAX_POLICY: Final = 32 * 1024
"""Bytes of a key policy document (KMS quota)."""
VERSIONS: Final = ("2012-10-17", "2008-10-17")

_SID = re.compile(r"[\w ,.:=+@/-]{0,200}", re.ASCII)
_ACCOUNT = re.compile(r"[0-9]{12}")
_PRINCIPAL = re.compile(
    r"arn:aws:iam::([0-9]{12}):(?:root|(?:user|role)/[\w+=,.@/-]{1,200})"
    r"|arn:aws:sts::([0-9]{12}):assumed-role/[\w+=,.@:/-]{1,200}",
    re.ASCII,
)
_SERVICE = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)*\.amazonaws\.com", re.ASCII)
_ACTION = re.compile(r"\*|kms:[A-Za-z*?]{1,128}", re.ASCII | re.IGNORECASE)
_KEY = re.compile(r"(?:aws|kms):[^\x00-\x1f]{1,512}", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?[0-9]{1,300}(?:\.[0-9]{1,300})?")
CONTEXT_KEY: Final = "kms:encryptioncontext:"
TAG_KEY: Final = "aws:resourcetag/"
"""What stands before the name of a pair of the encryption context and of a tag, in lower case as all condition keys."""

Values = tuple[str, ...]


class Effect(Enum):
    ALLOW = "Allow"
    DENY = "Deny"


@dataclass(frozen=True, slots=True)
class AccessRequest:
    """One action of one principal on one key, with the condition keys that it has.

    ``keys``: condition key, lower case, to its values; a single-valued key has one. A key that the request does not
    have is not in it.
    """

    principal: str
    account: AccountId
    action: str
    """With its prefix: ``kms:Decrypt``."""
    resource: str
    """ARN of the key."""
    keys: Mapping[str, Values]


# --- conditions


def is_like(value: str, pattern: str) -> bool:
    """Say whether a value is like a pattern with IAM's wildcards; both have their case."""
    regex, literal = _pattern(pattern)
    return literal in value and regex.match(value) is not None


def _boolean(value: str, wanted: str) -> bool:
    return value.lower() == wanted.lower()


def _number(compare: Callable[[float, float], bool]) -> Callable[[str, str], bool]:
    def test(value: str, wanted: str) -> bool:
        try:
            return compare(float(value), float(wanted))
        except ValueError:
            return False

    return test


@dataclass(frozen=True, slots=True)
class Operator:
    """A condition operator: ``test(value of the request, value of the policy)``, and whether it is negated."""

    test: Callable[[str, str], bool]
    negated: bool = False
    check: Callable[[str], bool] = field(default=lambda _text: True)
    """Says whether a value of the policy is one at all."""


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def _is_boolean(text: str) -> bool:
    return text.lower() in ("true", "false")


def _equals(value: str, wanted: str) -> bool:
    return value == wanted


def _equals_ignoring_case(value: str, wanted: str) -> bool:
    return value.lower() == wanted.lower()


OPERATORS: Final[dict[str, Operator]] = {
    "StringEquals": Operator(_equals),
    "StringNotEquals": Operator(_equals, negated=True),
    "StringEqualsIgnoreCase": Operator(_equals_ignoring_case),
    "StringNotEqualsIgnoreCase": Operator(_equals_ignoring_case, negated=True),
    "StringLike": Operator(is_like),
    "StringNotLike": Operator(is_like, negated=True),
    "ArnEquals": Operator(is_like),
    "ArnNotEquals": Operator(is_like, negated=True),
    "ArnLike": Operator(is_like),
    "ArnNotLike": Operator(is_like, negated=True),
    "Bool": Operator(_boolean, check=_is_boolean),
    "NumericEquals": Operator(_number(lambda a, b: a == b), check=_is_number),
    "NumericNotEquals": Operator(_number(lambda a, b: a == b), negated=True, check=_is_number),
    "NumericLessThan": Operator(_number(lambda a, b: a < b), check=_is_number),
    "NumericLessThanEquals": Operator(_number(lambda a, b: a <= b), check=_is_number),
    "NumericGreaterThan": Operator(_number(lambda a, b: a > b), check=_is_number),
    "NumericGreaterThanEquals": Operator(_number(lambda a, b: a >= b), check=_is_number),
}
"""All but Null, which looks at whether there is a value; ArnEquals is ArnLike in IAM, too."""

_NULL: Final = "Null"
_ANY: Final = "ForAnyValue"
_ALL: Final = "ForAllValues"
_IF_EXISTS: Final = "IfExists"


@dataclass(frozen=True, slots=True)
class Condition:
    """One operator on one condition key; all conditions of a statement must hold."""

    operator: str
    quantifier: str | None
    if_exists: bool
    key: str
    """Lower case: names of condition keys are compared without case."""
    values: Values

    def holds(self, keys: Mapping[str, Values], effect: Effect) -> bool:
        """Say whether the request has what the condition of a statement of this effect asks for."""
        found = keys.get(self.key)
        if self.operator == _NULL:
            return any((found is None) is (wanted.lower() == "true") for wanted in self.values)
        operator = OPERATORS[self.operator]
        if not found:
            # IAM: ForAllValues of nothing is true; ForAnyValue of nothing is false, with ...IfExists as well; a negated
            # operator matches a key that is not there.
            return self.quantifier == _ALL or (self.quantifier is None and (self.if_exists or operator.negated))
        passing = [self._passes(operator, value) for value in found]
        if self.quantifier == _ALL:
            return all(passing)
        if self.quantifier == _ANY:
            return any(passing)
        if self.key.startswith((CONTEXT_KEY, TAG_KEY)):
            return any(passing) if effect is Effect.DENY else all(passing)
        return all(passing) if operator.negated else any(passing)

    def _passes(self, operator: Operator, value: str) -> bool:
        matches = any(operator.test(value, wanted) for wanted in self.values)
        return matches is not operator.negated


# --- statements


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement; a list that the document does not have is None."""

    effect: Effect
    principals: Values | None
    not_principals: Values | None
    actions: Values | None
    not_actions: Values | None
    resources: Values | None
    not_resources: Values | None
    conditions: tuple[Condition, ...]

    def applies(self, request: AccessRequest) -> bool:
        """Say whether the statement speaks of the request."""
        return (
            _selected(self.principals, self.not_principals, lambda each: _is_principal(each, request))
            and _selected(self.actions, self.not_actions, lambda each: is_like(request.action.lower(), each.lower()))
            and _selected(self.resources, self.not_resources, lambda each: is_like(request.resource, each))
            and all(condition.holds(request.keys, self.effect) for condition in self.conditions)
        )


def _selected(wanted: Values | None, unwanted: Values | None, matches: Callable[[str], bool]) -> bool:
    if wanted is not None:
        return any(map(matches, wanted))
    return not any(map(matches, unwanted or ()))


def _is_principal(pattern: str, request: AccessRequest) -> bool:
    if pattern == "*" or pattern == request.principal:
        return True
    users = user_arn(request.account, "")
    if not request.principal.startswith(users):
        return False  # a role or a service is nobody's user: it is meant only where it is named
    return pattern in (request.account, account_root_arn(request.account)) or pattern.startswith(users)


@dataclass(frozen=True, slots=True)
class Policy:
    """A key policy, read and checked."""

    statements: tuple[Statement, ...]

    def decide(self, request: AccessRequest) -> Effect | None:
        """Return what the document says: DENY, ALLOW, or None when it is silent."""
        effects = {statement.effect for statement in self.statements if statement.applies(request)}
        if Effect.DENY in effects:
            return Effect.DENY
        return Effect.ALLOW if effects else None


# --- reading


_STATEMENT_MEMBERS: Final = frozenset(
    ("Sid", "Effect", "Principal", "NotPrincipal", "Action", "NotAction", "Resource", "NotResource", "Condition")
)


@lru_cache(maxsize=256)
def parse_policy(text: str) -> Policy:
    """Read a policy document of up to MAX_POLICY bytes. Raises MalformedPolicy with the first thing wrong with it."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_POLICY:
        raise MalformedPolicy(reason=f"It is longer than {MAX_POLICY} bytes")
    try:
        document = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        raise MalformedPolicy(reason=f"It is not a JSON document: {str(exc)[:120]}") from None
    if not isinstance(document, dict):
        raise MalformedPolicy(reason="It is not a JSON object")
    _known(document, frozenset(("Version", "Id", "Statement")), "The policy")
    if document.get("Version", VERSIONS[1]) not in VERSIONS:
        raise MalformedPolicy(reason=f"Version must be {VERSIONS[0]}")
    if not isinstance(document.get("Id", ""), str):
        raise MalformedPolicy(reason="Id must be text")
    statements = document.get("Statement")
    if isinstance(statements, dict):
        statements = [statements]
    if not isinstance(statements, list) or not statements:
        raise MalformedPolicy(reason="Statement must hold at least one statement")
    read = tuple(_statement(each, f"Statement {number}") for number, each in enumerate(statements, 1))
    sids = [each["Sid"] for each in statements if each.get("Sid")]
    if len(sids) != len(set(sids)):
        raise MalformedPolicy(reason="Two statements have the same Sid")
    return Policy(read)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a member that is there twice: which of them counts would be a guess."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is there twice")
    return members


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _known(members: dict[str, Any], names: frozenset[str], where: str) -> None:
    for name in members:
        if name not in names:
            raise MalformedPolicy(reason=f"{where} has the unknown member {name[:64]!r}")


def _statement(raw: Any, where: str) -> Statement:
    if not isinstance(raw, dict):
        raise MalformedPolicy(reason=f"{where} is not an object")
    _known(raw, _STATEMENT_MEMBERS, where)
    sid = raw.get("Sid", "")
    if not isinstance(sid, str) or _SID.fullmatch(sid) is None:
        raise MalformedPolicy(reason=f"{where} has a Sid with other characters than letters, digits and spaces")
    try:
        effect = Effect(raw.get("Effect"))
    except ValueError:
        raise MalformedPolicy(reason=f"{where}: Effect must be Allow or Deny") from None
    principals, not_principals = _either(raw, "Principal", where, _principals)
    actions, not_actions = _either(raw, "Action", where, _actions)
    resources, not_resources = _either(raw, "Resource", where, _texts_of)
    conditions = tuple(_conditions(raw.get("Condition", {}), where))
    if effect is Effect.ALLOW and not_principals is not None:
        raise MalformedPolicy(reason=f"{where}: NotPrincipal with Allow would allow everybody else; it goes with Deny")
    return Statement(effect, principals, not_principals, actions, not_actions, resources, not_resources, conditions)


def _either(
    raw: dict[str, Any], name: str, where: str, read: Callable[[Any, str], Values]
) -> tuple[Values | None, Values | None]:
    """Return (X, None) or (None, NotX): exactly one of the two must be there."""
    if (name in raw) == (f"Not{name}" in raw):
        raise MalformedPolicy(reason=f"{where} must have {name} or Not{name}, and not both")
    if name in raw:
        return read(raw[name], f"{where}: {name}"), None
    return None, read(raw[f"Not{name}"], f"{where}: Not{name}")


def _texts_of(raw: Any, where: str) -> Values:
    values = [raw] if isinstance(raw, str) else raw
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise MalformedPolicy(reason=f"{where} must be a text or a list of texts")
    return tuple(values)


def _actions(raw: Any, where: str) -> Values:
    values = _texts_of(raw, where)
    for value in values:
        if _ACTION.fullmatch(value) is None:
            raise MalformedPolicy(reason=f"{where}: {value[:64]!r} is no kms: action")
    return values


def _principals(raw: Any, where: str) -> Values:
    if raw == "*":
        return ("*",)
    if not isinstance(raw, dict) or not raw:
        raise MalformedPolicy(reason=f"{where} must be '*' or an object with AWS or Service")
    _known(raw, frozenset(("AWS", "Service")), where)
    found: list[str] = []
    for value in _texts_of(raw["AWS"], where) if "AWS" in raw else ():
        if value != "*" and _ACCOUNT.fullmatch(value) is None and _PRINCIPAL.fullmatch(value) is None:
            raise MalformedPolicy(reason=f"{where}: {value[:128]!r} is no account and no ARN of a principal")
        found.append(value)
    for value in _texts_of(raw["Service"], where) if "Service" in raw else ():
        if _SERVICE.fullmatch(value) is None:
            raise MalformedPolicy(reason=f"{where}: {value[:128]!r} is no service principal")
        found.append(value)
    return tuple(found)


def _conditions(raw: Any, where: str) -> Iterable[Condition]:
    if not isinstance(raw, dict):
        raise MalformedPolicy(reason=f"{where}: Condition must be an object")
    for name, tests in raw.items():
        quantifier, operator, if_exists = _operator(name, where)
        if not isinstance(tests, dict) or not tests:
            raise MalformedPolicy(reason=f"{where}: {name} must be an object of condition keys")
        for key, values in tests.items():
            if _KEY.fullmatch(key) is None:
                raise MalformedPolicy(reason=f"{where}: {key[:64]!r} is no condition key of aws: or kms:")
            texts = _condition_values(values, f"{where}: {name} {key[:64]}")
            check = _is_boolean if operator == _NULL else OPERATORS[operator].check
            for text in texts:
                if not check(text):
                    raise MalformedPolicy(reason=f"{where}: {name} cannot compare with {text[:64]!r}")
            yield Condition(operator, quantifier, if_exists, key.lower(), texts)


def _operator(name: str, where: str) -> tuple[str | None, str, bool]:
    quantifier: str | None = None
    operator = name
    prefix, colon, rest = name.partition(":")
    if colon:
        if prefix not in (_ANY, _ALL):
            raise MalformedPolicy(reason=f"{where}: {name[:64]!r} is no condition operator")
        quantifier, operator = prefix, rest
    if_exists = operator.endswith(_IF_EXISTS)
    operator = operator.removesuffix(_IF_EXISTS)
    known = operator in OPERATORS or (operator == _NULL and quantifier is None and not if_exists)
    if not known:
        raise MalformedPolicy(reason=f"{where}: {name[:64]!r} is no condition operator")
    return quantifier, operator, if_exists


def _condition_values(raw: Any, where: str) -> Values:
    values = raw if isinstance(raw, list) else [raw]
    texts: list[str] = []
    for value in values:
        if isinstance(value, bool):
            texts.append("true" if value else "false")
        elif isinstance(value, str | int | float):
            texts.append(str(value))
        else:
            raise MalformedPolicy(reason=f"{where} must be a text, a number, true or false, or a list of them")
    if not texts:
        raise MalformedPolicy(reason=f"{where} has no value")
    return tuple(texts)


@lru_cache(maxsize=8192)
def _pattern(text: str) -> tuple[re.Pattern[str], str]:
    """Return the pattern of IAM's wildcards (``*`` any text, ``?`` one character, anything else itself), and the
    longest text that whatever matches has in it: most patterns are done with when that is not there.
    """
    return re.compile(translate(text.replace("[", "[[]"))), max(re.split(r"[*?]", text), key=len)
