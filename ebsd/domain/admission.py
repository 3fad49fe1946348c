"""Admission: whether what a request would make may be made, judged by its resolved key. Pure.

Encryption by default mends a request; admission refuses it, as an S3 bucket policy does that denies PutObject under
any key but the listed ones (S3 user guide, "Using server-side encryption with AWS KMS keys": the condition is on the
key that is used, the default one included).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ebsd.domain.errors import AdmissionRefused, InvalidParameterValue, OperationNotPermitted
from ebsd.domain.ids import AccountId, KeyArn, is_account_id

MAX_ALLOWED_KEYS: Final = 100
MAX_PATTERN: Final = 512


class Making(Enum):
    """What is made, as messages call it."""

    VOLUME = "volume"
    COPY = "copy"
    SNAPSHOT = "snapshot"


@dataclass(frozen=True, slots=True)
class AdmissionRule:
    """What somebody makes must be encrypted, and under one of these keys if there are any."""

    account: AccountId | None
    """Whom it binds; None: everybody on this host, administrators too."""
    allowed_keys: tuple[str, ...]
    """Key ARNs with the wildcards of StringLike, ``*`` and ``?``; empty: any key."""

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return (
            "the admission rule for all accounts" if self.account is None else f"the admission rule of {self.account}"
        )


def admit(making: Making, key: KeyArn | None, *, allow_unencrypted: bool) -> None:
    """Return when the configuration admits it under this key (None: unencrypted); raises OperationNotPermitted."""
    if key is None and not allow_unencrypted:
        raise OperationNotPermitted(
            reason=f"The {making.value} would be unencrypted, and this installation does not allow unencrypted volumes",
            remedy="Add --encrypted, turn encryption by default on (ebsctl defaults enable-encryption), "
            "or set allow_unencrypted = true in the configuration of ebsd.",
        )


def refuse_unlisted(making: Making, key: KeyArn | None, rules: Iterable[AdmissionRule]) -> None:
    """Return when all rules admit it under this key; raises AdmissionRefused, which names the first that does not."""
    for rule in rules:
        listed = "" if not rule.allowed_keys else f"--key {rule.allowed_keys[0]}"
        if key is None:
            raise AdmissionRefused(
                rule=rule.name,
                reason=f"the {making.value} would be unencrypted",
                remedy=f"add --encrypted {listed}".strip(),
            )
        if rule.allowed_keys and not any(is_like(key, pattern) for pattern in rule.allowed_keys):
            raise AdmissionRefused(
                rule=rule.name,
                reason=f"the {making.value} would be encrypted under {key}, which the rule does not list",
                remedy=f"add --encrypted {listed}",
            )


def check_allowed_keys(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the patterns of a rule without repetitions; raises InvalidParameterValue for what no key's ARN is like."""
    if len(patterns) > MAX_ALLOWED_KEYS:
        raise InvalidParameterValue(
            value=f"{len(patterns)} keys", parameter="AllowedKeys", reason=f"at most {MAX_ALLOWED_KEYS} can be listed"
        )
    for pattern in patterns:
        if not _can_match(pattern):
            error = InvalidParameterValue(
                value=pattern[:MAX_PATTERN], parameter="AllowedKeys", reason="no ARN of a KMS key is like it"
            )
            error.hint = (
                "A key is listed by its ARN (ebsctl key show), in which * and ? are wildcards; not by an alias."
            )
            raise error
    return tuple(dict.fromkeys(patterns))


def check_rule_account(account: str | None) -> AccountId | None:
    """Return whom a rule binds; raises InvalidParameterValue for what is no account."""
    if account is None:
        return None
    if not is_account_id(account):
        raise InvalidParameterValue(value=account[:64], parameter="AccountId", reason="an account has twelve digits")
    return AccountId(account)


def _can_match(pattern: str) -> bool:
    """Say whether a pattern is like the ARN of some key, as far as its literal parts tell.

    A rule that nothing can fulfil refuses everything: whoever lists an alias, or a bare id, is told at once.
    """
    if not pattern or len(pattern) > MAX_PATTERN or not pattern.isprintable():
        return False
    literal = pattern.partition("*")[0].partition("?")[0]
    begins = "arn:aws"
    if not (literal.startswith(begins) or begins.startswith(literal)):
        return False
    return "*" in pattern or ":key/" in pattern


def is_like(value: str, pattern: str) -> bool:
    """Say whether a value is like a pattern, case included: ``*`` is any text, ``?`` one character (IAM, StringLike).

    In time proportional to the product of their lengths, whatever the pattern.
    """
    place = at = 0
    star, resumed = -1, 0
    while place < len(value):
        if at < len(pattern) and pattern[at] == "*":
            star, resumed = at, place
            at += 1
        elif at < len(pattern) and pattern[at] in ("?", value[place]):
            place, at = place + 1, at + 1
        elif star >= 0:
            resumed += 1
            place, at = resumed, star + 1
        else:
            return False
    return all(character == "*" for character in pattern[at:])
