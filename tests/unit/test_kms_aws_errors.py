"""What AWS KMS, and the way to it, can fail with, as the errors that users see."""

from __future__ import annotations

import re
from pathlib import Path

import botocore.exceptions
import pytest
from botocore.session import Session

from ebsd.domain.errors import ExitStatus, exit_status_of
from ebsd.kms import aws_errors
from ebsd.kms.aws_errors import BY_CODE, UNREACHED, from_answer, from_way

ARN = "arn:aws:kms:eu-central-1:123456789012:key/00000000-0000-4000-8000-000000000001"
PLACE = "AWS KMS in eu-central-1"

UNAVAILABLE = ("KMSInternalException", ExitStatus.KEY_UNAVAILABLE)
MEANINGS = {
    "AccessDeniedException": ("AccessDeniedException", ExitStatus.DENIED),
    "DisabledException": ("DisabledException", ExitStatus.KEY_UNAVAILABLE),
    "KMSInvalidStateException": ("KMSInvalidStateException", ExitStatus.KEY_UNAVAILABLE),
    "NotFoundException": ("NotFoundException", ExitStatus.NOT_FOUND),
    "InvalidArnException": ("InvalidArnException", ExitStatus.NOT_FOUND),
    "InvalidCiphertextException": ("InvalidCiphertextException", ExitStatus.INTEGRITY),
    "IncorrectKeyException": ("IncorrectKeyException", ExitStatus.INTEGRITY),
    "InvalidKeyUsageException": ("InvalidKeyUsageException", ExitStatus.USAGE),
    "InvalidGrantTokenException": ("InvalidGrantTokenException", ExitStatus.DENIED),
    "InvalidGrantIdException": ("InvalidGrantIdException", ExitStatus.NOT_FOUND),
    "LimitExceededException": ("LimitExceededException", ExitStatus.CONFLICT),
    "ValidationException": ("ValidationException", ExitStatus.USAGE),
    "KMSInternalException": UNAVAILABLE,
    "KeyUnavailableException": UNAVAILABLE,
    "DependencyTimeoutException": UNAVAILABLE,
    "ThrottlingException": UNAVAILABLE,
    "UnrecognizedClientException": UNAVAILABLE,
    "ExpiredTokenException": UNAVAILABLE,
    "SomethingNewException": UNAVAILABLE,
}


def answer(code: str, message: str = "", status: int = 400) -> dict[str, object]:
    return {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize("code", MEANINGS)
def test_each_code_has_its_error(code: str) -> None:
    error = from_answer(answer(code, f"{ARN} is pending deletion."), PLACE, "Decrypt", ARN, "g1")
    assert (error.code, error.exit_status) == MEANINGS[code]
    assert exit_status_of(error.code) is error.exit_status
    assert error.message


def test_every_error_that_the_operations_declare_is_in_the_table() -> None:
    """botocore's model of the service lists what each action may raise."""
    model = Session().get_service_model("kms")
    used = [
        "DescribeKey", "ListAliases", "GenerateDataKeyWithoutPlaintext", "Decrypt", "ReEncrypt", "CreateGrant",
        "RetireGrant", "ListGrants",
    ]  # fmt: skip
    declared = {shape.name for name in used for shape in model.operation_model(name).error_shapes}
    assert "KMSInternalException" in declared
    # DryRun is never asked for, and a Marker is never sent.
    assert declared - {"DryRunOperationException", "InvalidMarkerException"} <= set(BY_CODE)


def test_texts_of_the_other_side_are_told_where_they_help() -> None:
    told = from_answer(answer("AccessDeniedException", "User: x is not\n authorized"), PLACE, "Decrypt", ARN)
    assert told.message == "AWS KMS: User: x is not  authorized"
    assert "kms:Decrypt" in told.hint
    state = from_answer(answer("KMSInvalidStateException", f"{ARN} is pending deletion."), PLACE, "Decrypt", ARN)
    assert state.message == f"{ARN} is pending deletion."
    disabled = from_answer(answer("DisabledException"), PLACE, "Decrypt", ARN)
    assert disabled.message == f"{ARN} is disabled."
    assert "aws kms enable-key" in disabled.hint
    long = from_answer(answer("LimitExceededException", "\x1b[31m" + "x" * 10_000), PLACE, "CreateGrant", ARN)
    assert len(long.message) < 500
    assert "\x1b" not in long.message


@pytest.mark.parametrize("response", [{}, {"Error": None}, {"Error": []}, None, answer("502", "Bad Gateway", 502)])
def test_an_error_answer_that_says_nothing(response: object) -> None:
    error = from_answer(response, PLACE, "Decrypt", ARN)
    assert (error.code, error.exit_status) == UNAVAILABLE
    assert "HTTP status" in error.message


def test_what_fails_on_the_way_is_known_by_name() -> None:
    for name in UNREACHED:
        assert issubclass(getattr(botocore.exceptions, name), Exception)
    error = from_way(botocore.exceptions.ConnectTimeoutError(endpoint_url="https://x"), PLACE)
    assert (error.code, error.exit_status) == UNAVAILABLE
    assert error.message == f"The key service is not available: {PLACE} cannot be reached: connecting took too long."


def test_what_cannot_be_parsed_is_not_quoted() -> None:
    secret = "cGxhaW50ZXh0"
    error = from_way(ValueError(f"Unable to parse response: {secret}"), PLACE)
    assert (error.code, error.exit_status) == UNAVAILABLE
    assert secret not in f"{error.message}{error.hint}{error}"


def test_the_table_is_the_only_place_that_names_codes() -> None:
    text = (
        Path(aws_errors.__file__).with_name("aws.py").read_text()
        + Path(aws_errors.__file__).with_name("aws_client.py").read_text()
    )
    assert not re.findall(r'"\w+Exception"', text)
