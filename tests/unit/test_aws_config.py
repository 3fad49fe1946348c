"""``[key_service.aws]`` of the configuration file: what is accepted, what is refused, and what the broker is told."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from ebsd.daemon import config
from ebsd.daemon.aws_config import AwsKeyService, aws_parameters
from ebsd.domain.errors import ConfigurationError
from ebsd.kms.aws_settings import AwsSettings
from ebsd.kms.main import parse_configuration

ARN = "arn:aws:kms:eu-central-1:123456789012:alias/ebsd"


def load(directory: Path, text: str, environment: dict[str, str] | None = None) -> config.Config:
    file = directory / "ebsd.toml"
    file.write_text(text)
    return config.load(
        file=file, state_dir=directory, runtime_dir=directory, uid=os.getuid(), environment=environment or {}
    )


def table(**members: Any) -> str:
    lines = [f"{name} = {value!r}".replace("'", '"') for name, value in {"region": "eu-central-1", **members}.items()]
    return "\n".join(["[key_service.aws]", *lines, ""])


def test_without_the_table_there_is_no_aws(tmp_path: Path) -> None:
    assert load(tmp_path, "").aws is None
    assert load(tmp_path, '[key_service]\ndefault = "local"\n').aws is None


def test_the_broker_takes_what_the_file_gives(tmp_path: Path) -> None:
    environment = {"AWS_SECRET_ACCESS_KEY": "hush", "AWS_PROFILE": "p", "HOME": "/root", "PATH": "/bin", "SECRET": "x"}
    me = pwd.getpwuid(os.getuid()).pw_name
    loaded = load(
        tmp_path,
        '[key_service]\ndefault = "aws"\n'
        + table(default_key=ARN, users=[me, 4711], endpoint_url="https://kms.example", deadline=10.5),
        environment,
    )
    assert "hush" not in repr(loaded)
    parameters = {
        "version": 1,
        "state_dir": "/x",
        "root_key": {"kind": "file", "path": "/y"},
        "admin_uid": 0,
        "may_create": True,
        "aws": loaded.aws,
    }
    told = parse_configuration(parameters).aws
    assert told == AwsSettings(
        region="eu-central-1",
        endpoint_url="https://kms.example",
        default_key=ARN,
        users=(os.getuid(), 4711),
        deadline=10.5,
        environment={"AWS_SECRET_ACCESS_KEY": "hush", "AWS_PROFILE": "p", "HOME": "/root"},
    )


def test_both_ends_have_the_same_settings() -> None:
    """What is not said in the file is what the broker would take by itself."""
    given = aws_parameters(Path("x"), AwsKeyService(region="eu-central-1"), "local", {})
    assert given is not None
    assert set(given) == set(AwsSettings.__struct_fields__)
    own = AwsSettings(region="eu-central-1")
    assert {name: tuple(value) if name == "users" else value for name, value in given.items()} == {
        name: getattr(own, name) for name in AwsSettings.__struct_fields__
    }


def test_everyone_is_a_star(tmp_path: Path) -> None:
    aws = load(tmp_path, table(users=["*"])).aws
    assert aws is not None
    assert aws["users"] is None


@pytest.mark.parametrize("url", ["http://127.0.0.1:5000", "http://[::1]:4566/", "http://localhost", "https://kms"])
def test_endpoints(tmp_path: Path, url: str) -> None:
    assert load(tmp_path, table(endpoint_url=url)).aws is not None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[key_service]\ndefault = "aws"\n', "needs a table"),
        ('[key_service]\ndefault = "vault"\n', "vault"),
        ("[key_service.aws]\n", "region"),
        (table(region="local"), "aws.region"),
        (table(region="mars"), "aws.region"),
        (table(region=""), "aws.region"),
        (table(endpoint_url="http://kms.example"), "in clear"),
        (table(endpoint_url="http://10.0.0.1"), "in clear"),
        (table(endpoint_url="https://user@kms.example"), "in clear"),
        (table(endpoint_url="ftp://kms"), "in clear"),
        (table(endpoint_url="http://[::1"), "in clear"),
        (table(principal="ebsd"), "aws.principal"),
        (table(default_key=ARN), "aws.default_key"),
        ('[key_service]\ndefault = "aws"\n' + table(), "needs aws.default_key"),
        ('[key_service]\ndefault = "aws"\n' + table(default_key="backup"), "aws.default_key"),
        ('[key_service]\ndefault = "aws"\n' + table(default_key=ARN.replace("eu-", "us-")), "aws.default_key"),
        (table(deadline=26), "at most 25"),
        (table(connect_timeout=0), "more than 0"),
        (table(read_timeout=25.0), "no time for one attempt"),
        (table(attempts=0), "aws.attempts"),
        (table(attempts=11), "aws.attempts"),
        (table(users=["nobody-of-this-name"]), "nobody-of-this-name"),
        (table(secret_access_key="hush"), "unknown field"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match="(?s)" + reason.replace("[", r"\[")) as caught:
        load(tmp_path, text)
    assert "hush" not in caught.value.message
