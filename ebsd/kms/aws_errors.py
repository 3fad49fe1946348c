"""Errors of AWS KMS and of the way to it, as the errors that the local back end has for the same things. Pure.

1. ``BY_CODE`` has one row for each code that an operation of ours can meet; a code that is not in it means that
   the key service is of no use just now.
2. Texts of the other side are shown where they tell something, cut to a line of printable characters.
Source: KMS API reference, errors of each action and "Common Errors"; botocore/exceptions.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ebsd.domain.errors import (
    AwsAccessDenied,
    AwsKeyDisabled,
    EbsdError,
    IncorrectKey,
    InvalidCiphertext,
    InvalidGrantId,
    InvalidGrantToken,
    InvalidKeyArn,
    InvalidKeyUsage,
    KeyNotFound,
    KeyServiceUnavailable,
    KmsInvalidState,
    KmsLimitExceeded,
    KmsValidation,
)

_MAX_TEXT: Final = 300
_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e]+")


class Garbled(ValueError):
    """An answer whose form is right and whose content is not; never shows the content, which may be a key."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What is known of a request that failed."""

    place: str
    operation: str
    key: str
    """What the request named."""
    message: str
    """The other side's, cleaned."""
    grant: str = ""

    def unavailable(self, reason: str) -> EbsdError:
        return KeyServiceUnavailable(reason=f"{self.place} {reason}")


Rule = Callable[[Failure], EbsdError]


def _state(failure: Failure) -> EbsdError:
    # "arn:aws:kms:... is pending deletion."
    state = failure.message.rpartition(" is ")[2].rstrip(".")
    return KmsInvalidState(key=failure.key, state=state or "in a state that does not allow this")


def _denied(failure: Failure) -> EbsdError:
    reason = failure.message or "access denied"
    return AwsAccessDenied(reason=reason, action=failure.operation, resource=failure.key)


def _throttled(failure: Failure) -> EbsdError:
    return failure.unavailable("limits the rate of requests, which was exceeded")


def _credentials(failure: Failure) -> EbsdError:
    return failure.unavailable(f"refused the credentials: {failure.message}".rstrip(": ."))


def _internal(failure: Failure) -> EbsdError:
    return failure.unavailable(f"failed: {failure.message or failure.operation}".rstrip("."))


BY_CODE: Final[Mapping[str, Rule]] = {
    "AccessDeniedException": _denied,
    "AccessDenied": _denied,
    "NotAuthorized": _denied,
    "DisabledException": lambda f: AwsKeyDisabled(key=f.key),
    "KMSInvalidStateException": _state,
    "NotFoundException": lambda f: KeyNotFound(key=f.key),
    "InvalidArnException": lambda f: InvalidKeyArn(key=f.key),
    "InvalidCiphertextException": lambda f: InvalidCiphertext(),
    "IncorrectKeyException": lambda f: IncorrectKey(),
    "InvalidKeyUsageException": lambda f: InvalidKeyUsage(
        key=f.key, usage="another than ENCRYPT_DECRYPT", operation=f.operation
    ),
    "InvalidGrantTokenException": lambda f: InvalidGrantToken(grant=f.grant),
    "InvalidGrantIdException": lambda f: InvalidGrantId(grant=f.grant),
    "LimitExceededException": lambda f: KmsLimitExceeded(what=f.message.rstrip(".") or f.operation),
    "ValidationException": lambda f: KmsValidation(reason=f.message.rstrip(".") or "AWS KMS gave no reason"),
    "KMSInternalException": _internal,
    "InternalFailure": _internal,
    "InternalServerError": _internal,
    "ServiceUnavailable": _internal,
    "KeyUnavailableException": _internal,
    "DependencyTimeoutException": _internal,
    "ThrottlingException": _throttled,
    "Throttling": _throttled,
    "TooManyRequestsException": _throttled,
    "RequestLimitExceeded": _throttled,
    "UnrecognizedClientException": _credentials,
    "InvalidClientTokenId": _credentials,
    "InvalidSignatureException": _credentials,
    "SignatureDoesNotMatch": _credentials,
    "ExpiredTokenException": _credentials,
    "ExpiredToken": _credentials,
    "IncompleteSignature": _credentials,
    "MissingAuthenticationTokenException": _credentials,
    "MissingAuthenticationToken": _credentials,
    "OptInRequired": _credentials,
}

UNREACHED: Final[Mapping[str, str]] = {
    "NoCredentialsError": "cannot be asked: no credentials were found",
    "PartialCredentialsError": "cannot be asked: the credentials are incomplete",
    "CredentialRetrievalError": "cannot be asked: the credentials could not be fetched",
    "TokenRetrievalError": "cannot be asked: the credentials could not be fetched",
    "SSOError": "cannot be asked: the credentials could not be fetched",
    "ProfileNotFound": "cannot be asked: the profile does not exist",
    "ConfigParseError": "cannot be asked: the AWS configuration file cannot be read",
    "UnknownServiceError": "cannot be asked: this boto3 does not know the service",
    "DataNotFoundError": "cannot be asked: boto3's data files are missing",
    "EndpointConnectionError": "cannot be reached",
    "ConnectTimeoutError": "cannot be reached: connecting took too long",
    "ReadTimeoutError": "did not answer in time",
    "ConnectionClosedError": "closed the connection before it had answered",
    "ProxyConnectionError": "cannot be reached: the proxy refused",
    "SSLError": "cannot be trusted: TLS failed",
    "ResponseStreamingError": "broke off its answer",
    "IncompleteReadError": "broke off its answer",
    "HTTPClientError": "broke off the exchange",
}
"""What failed on the way -> the rest of a sentence. By name: botocore is not there where nobody uses it."""

GARBLED: Final = "gave an answer that cannot be understood"


def clean(text: object) -> str:
    """Return a text of the other side as one line of printable characters."""
    return _UNPRINTABLE.sub(" ", str(text)).strip()[:_MAX_TEXT]


def from_answer(response: Any, place: str, operation: str, key: str, grant: str = "") -> EbsdError:
    """Return the error that an error answer (``ClientError.response``) means."""
    error = response.get("Error") if isinstance(response, Mapping) else None
    error = error if isinstance(error, Mapping) else {}
    metadata = response.get("ResponseMetadata") if isinstance(response, Mapping) else None
    status = metadata.get("HTTPStatusCode") if isinstance(metadata, Mapping) else None
    failure = Failure(place, operation, key, clean(error.get("Message") or ""), grant)
    code = clean(error.get("Code") or "")
    rule = BY_CODE.get(code)
    if rule is not None:
        return rule(failure)
    what = code if code and code != str(status) else f"HTTP status {status}"
    return failure.unavailable(f"answered with {what}{': ' if failure.message else ''}{failure.message.rstrip('.')}")


def from_way(exc: BaseException, place: str) -> EbsdError:
    """Return the error for an exception of botocore that is no answer; its text is not shown (it may quote one)."""
    for kind in type(exc).__mro__:
        if kind.__name__ in UNREACHED:
            return KeyServiceUnavailable(reason=f"{place} {UNREACHED[kind.__name__]}")
    return KeyServiceUnavailable(reason=f"{place} {GARBLED} ({type(exc).__name__})")
