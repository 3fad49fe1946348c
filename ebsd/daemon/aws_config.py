"""``[key_service.aws]``: what the configuration file says of AWS KMS, checked, and as the broker is told it.

Credentials are boto3's business and never stand in this file. The environment variables that its chain reads are
handed to the broker over its channel, for its own environment is cleared.
"""

from __future__ import annotations

import ipaddress
import math
import pwd
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from ebsd.domain.errors import ConfigurationError
from ebsd.domain.ids import REGION, foreign_region

MAX_DEADLINE: Final = 25.0
"""Seconds; ebsd waits 30 for the broker."""
MAX_ATTEMPTS: Final = 10
_REGION: Final = re.compile(r"[a-z]{2,}(-[a-z0-9]+)+")
_PRINCIPAL: Final = re.compile(r"arn:aws[a-z-]*:(iam|sts)::[0-9]{12}:[\w+=,.@/:-]{1,200}", re.ASCII)
_ALIAS: Final = re.compile(r"alias/[A-Za-z0-9/_-]{1,250}")
_VARIABLES: Final = frozenset(
    ("HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "REQUESTS_CA_BUNDLE")
)


class AwsKeyService(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[key_service.aws]``."""

    region: str
    endpoint_url: str | None = None
    profile: str | None = None
    principal: str | None = None
    default_key: str | None = None
    """Key or alias ARN that stands for alias/aws/ebs with ``default = "aws"``."""
    users: list[str | int] = []
    """Names or uids of users that may use keys there, besides administrators; ``["*"]`` means everyone."""
    connect_timeout: float = 2.0
    read_timeout: float = 4.0
    attempts: int = 3
    deadline: float = 20.0


def aws_parameters(
    file: Path, settings: AwsKeyService | None, default: str, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """Return the broker's ``aws`` parameter (kms/aws_settings.py); raises ConfigurationError."""
    reason = _problem(settings, default)
    if reason is not None:
        raise ConfigurationError(file=file, reason=f"key_service.{reason}")
    if settings is None:
        return None
    return {
        **{name: getattr(settings, name) for name in AwsKeyService.__struct_fields__ if name != "users"},
        "users": None if "*" in settings.users else [_uid(file, user) for user in settings.users],
        "environment": {
            name: value for name, value in environment.items() if name.startswith("AWS_") or name in _VARIABLES
        },
    }


def _problem(settings: AwsKeyService | None, default: str) -> str | None:
    """Return what is wrong, from the name of the key on; None when all is well."""
    if settings is None:
        return None if default == "local" else 'default: "aws" needs a table [key_service.aws]'
    times = (settings.connect_timeout, settings.read_timeout, settings.deadline)
    rules = (
        (
            _REGION.fullmatch(settings.region) is None or settings.region == REGION,
            "aws.region: it is the code of a region of AWS, such as eu-central-1",
        ),
        (
            settings.endpoint_url is not None and not _is_safe_url(settings.endpoint_url),
            "aws.endpoint_url: it is an https URL, or http to this host: data keys cross it in clear",
        ),
        (
            settings.principal is not None and _PRINCIPAL.fullmatch(settings.principal) is None,
            "aws.principal: it is the ARN of a user, role or assumed role",
        ),
        (
            default == "aws" and settings.default_key is None,
            'default: "aws" needs aws.default_key, for AWS keeps its own alias/aws/ebs to EC2',
        ),
        (
            default == "local" and settings.default_key is not None,
            'aws.default_key: it has a meaning with default = "aws" only',
        ),
        (
            settings.default_key is not None and not _is_key(settings.default_key, settings.region),
            "aws.default_key: it is an alias, or the ARN of a key or alias in this region",
        ),
        (
            not all(math.isfinite(seconds) and seconds > 0 for seconds in times) or settings.deadline > MAX_DEADLINE,
            f"aws: time-outs are more than 0 seconds, and the deadline at most {MAX_DEADLINE:g}",
        ),
        (
            settings.connect_timeout + settings.read_timeout > settings.deadline,
            "aws.deadline: it leaves no time for one attempt",
        ),
        (
            not 1 <= settings.attempts <= MAX_ATTEMPTS,
            f"aws.attempts: it is a number from 1 to {MAX_ATTEMPTS}",
        ),
    )
    return next((reason for is_wrong, reason in rules if is_wrong), None)


def _is_safe_url(text: str) -> bool:
    """Say whether nobody but the endpoint reads what is sent there."""
    try:
        url = urlsplit(text)
        host = url.hostname
    except ValueError:
        return False
    if not host or url.username is not None or url.query or url.fragment:
        return False
    return url.scheme == "https" or (url.scheme == "http" and _is_this_host(host))


def _is_this_host(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_key(text: str, region: str) -> bool:
    return _ALIAS.fullmatch(text) is not None or foreign_region(text) == region


def _uid(file: Path, user: str | int) -> int:
    try:
        return user if isinstance(user, int) else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigurationError(
            file=file, reason=f"key_service.aws.users: no user of this host is called {user!r}"
        ) from None
