"""Commands on keys and on the account's defaults."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from ebsctl_fakes import KEY_1, KEY_2, OWN, Bench, key

from ebsctl import terminal
from ebsctl.app import App
from ebsctl.commands.keys import alias_name, key_reference, names_a_key
from ebsd.domain.errors import (
    AliasExists,
    BackupRefused,
    InvalidAliasName,
    KeyNotFound,
    RootKeyUnavailable,
    UnauthorizedOperation,
)

ARN = f"arn:aws:kms:local:{OWN}:key/{KEY_1}"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.server.close()


def with_keys(bench: Bench) -> None:
    bench.world.keys = {KEY_1: key(Description="first"), KEY_2: key(KEY_2, KeyManager="AWS")}
    bench.world.aliases = {"alias/backup": KEY_1, "alias/aws/ebs": KEY_2, "alias/archive": KEY_1}


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reference", "is_key"),
    [
        (KEY_1, KEY_1, True),
        (ARN, ARN, True),
        (f"arn:aws:kms:local:{OWN}:alias/x", f"arn:aws:kms:local:{OWN}:alias/x", True),
        ("alias/backup", "alias/backup", True),
        ("mrk-" + "0" * 32, "mrk-" + "0" * 32, True),
        ("backup", "alias/backup", False),
        ("arn:aws:s3:::x", "arn:aws:s3:::x", False),
    ],
)
def test_what_names_a_key(text: str, reference: str, is_key: bool) -> None:
    assert key_reference(text) == reference
    assert names_a_key(text) is is_key


@pytest.mark.parametrize("text", ["", "a b", "alias/", "alias/aws/ebs", "aws/mine", "x" * 251])
def test_bad_alias_names(text: str) -> None:
    with pytest.raises(InvalidAliasName):
        alias_name(text)


def test_alias_names_get_their_prefix() -> None:
    assert alias_name("backup") == alias_name("alias/backup") == "alias/backup"


# --- create, list, show, enable, disable ------------------------------------------------------------------


def test_key_create_prints_the_id_and_nothing_else(bench: Bench) -> None:
    result = bench.run("key", "create")
    assert (result.exit_code, result.stdout) == (0, KEY_1 + "\n")
    assert "ebsctl key backup" in result.stderr
    assert bench.server.calls == [("KMS.CreateKey", {})]


def test_key_create_with_a_name_makes_the_alias(bench: Bench) -> None:
    words = ["--description", "off-site", "--spec", "SYMMETRIC_DEFAULT"]
    assert bench.ok("key", "create", "backup", *words) == KEY_1 + "\n"
    sent = {"Description": "off-site", "KeySpec": "SYMMETRIC_DEFAULT"}
    assert bench.server.parameters("KMS.CreateKey") == sent
    assert bench.world.aliases == {"alias/backup": KEY_1}


def test_key_create_json_is_the_metadata(bench: Bench) -> None:
    assert bench.document("key", "create") == key()


def test_no_key_is_made_when_the_alias_is_taken_or_bad(bench: Bench) -> None:
    with_keys(bench)
    assert bench.error(4, "key", "create", "backup")["Code"] == "AlreadyExistsException"
    assert bench.error(2, "key", "create", "aws/ebs")["Code"] == "InvalidAliasNameException"
    assert "KMS.CreateKey" not in bench.server.methods


def test_a_key_left_without_its_alias_is_named(bench: Bench) -> None:
    bench.server.fail("KMS.CreateAlias", AliasExists(alias="alias/backup"))
    result = bench.run("key", "create", "backup")
    assert (result.exit_code, result.stdout) == (4, "")
    assert f"ebsctl key alias create NAME {KEY_1}" in result.stderr


@pytest.mark.parametrize("words", [["key", "list"], ["list", "keys"]])
def test_keys_are_listed_with_their_aliases(bench: Bench, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with_keys(bench)
    first, second = bench.ok(*words).splitlines()
    assert first.split("\t") == [
        "alias/backup,alias/archive",
        KEY_1,
        "Enabled",
        "CUSTOMER",
        "SYMMETRIC_DEFAULT",
        "first",
    ]
    assert second.split("\t")[3] == "AWS"
    document = bench.document(*words)
    assert [item["KeyId"] for item in document["Keys"]] == [KEY_1, KEY_2]
    assert [alias["AliasName"] for alias in document["Keys"][1]["Aliases"]] == ["alias/aws/ebs"]
    monkeypatch.setattr(App, "for_people", True)
    assert bench.ok(*words).startswith("ALIASES")


def test_no_keys_yet(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.document("key", "list") == {"Keys": []}
    monkeypatch.setattr(App, "for_people", True)
    assert "ebsctl key create" in bench.run("key", "list").stderr


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["KeyManager=AWS"], [KEY_2]),
        (["KeyManager=AWS", "KeyManager=CUSTOMER"], [KEY_1, KEY_2]),
        (["Enabled=true", "Description=first"], [KEY_1]),
        (["Enabled=false"], []),
    ],
)
def test_keys_are_filtered_by_their_members(bench: Bench, filters: list[str], expected: list[str]) -> None:
    with_keys(bench)
    words = [word for text in filters for word in ("--filter", text)]
    assert [item["KeyId"] for item in bench.document("list", "keys", *words)["Keys"]] == expected


def test_an_unknown_member_is_no_filter(bench: Bench) -> None:
    with_keys(bench)
    error = bench.error(2, "list", "keys", "--filter", "colour=red")
    assert "KeyState" in error["Message"]


def test_a_key_that_vanishes_while_listing_is_left_out(bench: Bench) -> None:
    with_keys(bench)
    bench.server.fail("KMS.DescribeKey", KeyNotFound(key=KEY_1))
    assert bench.document("key", "list") == {"Keys": []}


def test_another_failure_while_listing_is_a_failure(bench: Bench) -> None:
    with_keys(bench)
    bench.server.fail("KMS.DescribeKey", RootKeyUnavailable(reason="it is missing"))
    assert bench.error(6, "key", "list")["Code"] == "Ebsd.RootKeyUnavailable"


@pytest.mark.parametrize(
    "words", [["key", "show", "backup"], ["key", "show", ARN], ["show", "alias/backup"], ["show", KEY_1]]
)
def test_a_key_is_shown_with_its_aliases(bench: Bench, words: list[str]) -> None:
    with_keys(bench)
    lines = bench.ok(*words).splitlines()
    assert f"KeyId\t{KEY_1}" in lines
    assert "Aliases\talias/backup,alias/archive" in lines
    document = bench.document(*words)
    assert document["Arn"] == ARN
    assert {alias["TargetKeyId"] for alias in document["Aliases"]} == {KEY_1}


def test_show_of_an_unknown_key(bench: Bench) -> None:
    assert bench.error(3, "key", "show", "nothing")["Message"] == "Alias alias/nothing is not found."
    assert bench.error(3, "show", KEY_2)["Code"] == "NotFoundException"


def test_a_key_is_disabled_and_enabled_by_its_id(bench: Bench) -> None:
    with_keys(bench)
    assert bench.ok("key", "disable", "backup") == ""
    assert bench.server.parameters("KMS.DisableKey") == {"KeyId": KEY_1}
    assert bench.world.keys[KEY_1]["KeyState"] == "Disabled"
    assert bench.document("key", "enable", "alias/backup")["KeyState"] == "Enabled"
    assert bench.error(3, "key", "enable", "nothing")["Code"] == "NotFoundException"


# --- aliases ----------------------------------------------------------------------------------------------


def test_aliases_are_made_moved_listed_and_deleted(bench: Bench) -> None:
    with_keys(bench)
    assert bench.ok("key", "alias", "create", "new", KEY_1) == ""
    assert bench.world.aliases["alias/new"] == KEY_1
    moved = bench.document("key", "alias", "update", "alias/new", "aws/ebs")
    assert moved == {"AliasName": "alias/new", "TargetKeyId": KEY_2}
    assert f"alias/new\t{KEY_2}" in bench.ok("key", "alias", "list").splitlines()
    assert bench.document("key", "alias", "list")["Aliases"][0]["AliasName"] == "alias/backup"
    assert bench.document("key", "alias", "delete", "new") == {"AliasName": "alias/new"}
    assert "alias/new" not in bench.world.aliases


@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        (["create", "backup", KEY_1], 4, "AlreadyExistsException"),
        (["create", "bad name", KEY_1], 2, "InvalidAliasNameException"),
        (["create", "new", "nothing"], 3, "NotFoundException"),
        (["update", "nothing", KEY_1], 3, "NotFoundException"),
        (["delete", "nothing"], 3, "NotFoundException"),
        (["delete"], 2, "Usage"),
    ],
)
def test_alias_errors(bench: Bench, words: list[str], status: int, code: str) -> None:
    with_keys(bench)
    assert bench.error(status, "key", "alias", *words)["Code"] == code


# --- backup and restore -----------------------------------------------------------------------------------


@pytest.fixture
def passphrase(tmp_path: Path) -> str:
    path = tmp_path / "passphrase"
    path.write_bytes(b" open sesame \n")
    return str(path)


def test_a_backup_goes_to_a_new_private_file(bench: Bench, tmp_path: Path, passphrase: str) -> None:
    file = tmp_path / "backup"
    result = bench.run("key", "backup", str(file), "--passphrase-file", passphrase)
    assert (result.exit_code, result.stdout) == (0, "")
    assert str(file) in result.stderr
    assert file.read_bytes() == b"sealed keys"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert bench.world.passphrases == [b" open sesame "]
    assert bench.server.parameters("KeyService.Backup") == {"Destination": 0, "PassphraseDescriptor": 1}


def test_backup_json(bench: Bench, tmp_path: Path, passphrase: str) -> None:
    document = bench.document("key", "backup", str(tmp_path / "b"), "--passphrase-file", passphrase)
    assert document == {"Keys": 0, "Bytes": 11}


def test_a_passphrase_comes_from_a_descriptor(bench: Bench, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"from a pipe")
    os.close(writer)
    bench.ok("key", "backup", str(tmp_path / "b"), "--passphrase-fd", str(reader))
    os.close(reader)
    assert bench.world.passphrases == [b"from a pipe"]


def test_an_existing_file_is_never_overwritten(bench: Bench, tmp_path: Path, passphrase: str) -> None:
    file = tmp_path / "backup"
    file.write_bytes(b"precious")
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "elsewhere")
    for path in (file, dangling):
        error = bench.error(4, "key", "backup", str(path), "--passphrase-file", passphrase)
        assert "exists already" in error["Message"]
        assert "new file" in error["Hint"]
    assert file.read_bytes() == b"precious"
    assert bench.server.calls == []


def test_a_backup_into_no_directory_is_refused_before_a_passphrase_is_asked_for(bench: Bench, tmp_path: Path) -> None:
    error = bench.error(2, "key", "backup", str(tmp_path / "nowhere" / "backup"))
    assert error["Code"] == "InvalidParameterValue"
    assert "directory does not exist" in error["Message"]
    assert bench.server.calls == []


def test_a_failed_backup_leaves_no_file(bench: Bench, tmp_path: Path, passphrase: str) -> None:
    bench.server.fail("KeyService.Backup", UnauthorizedOperation(reason="only administrators back up keys"))
    bench.error(5, "key", "backup", str(tmp_path / "b"), "--passphrase-file", passphrase)
    assert not (tmp_path / "b").exists()


def test_a_backup_needs_a_place_for_its_file(bench: Bench, tmp_path: Path, passphrase: str) -> None:
    error = bench.error(2, "key", "backup", str(tmp_path / "no" / "b"), "--passphrase-file", passphrase)
    assert "directory does not exist" in error["Message"]
    assert bench.error(2, "key", "backup", "-", "--passphrase-file", passphrase)["Code"] == "Usage"


def test_restore_hands_over_the_file(bench: Bench, tmp_path: Path, passphrase: str) -> None:
    file = tmp_path / "backup"
    file.write_bytes(b"sealed keys")
    result = bench.run("key", "restore", str(file), "--passphrase-file", passphrase)
    assert (result.exit_code, result.stdout) == (0, "")
    assert bench.world.restored == [b"sealed keys"]
    assert bench.world.passphrases == [b" open sesame "]
    assert bench.server.parameters("KeyService.Restore") == {"Source": 0, "PassphraseDescriptor": 1}
    assert bench.document("key", "restore", str(file), "--passphrase-file", passphrase) == {"Keys": 2}


def test_restore_errors(bench: Bench, tmp_path: Path, passphrase: str) -> None:
    file = tmp_path / "backup"
    assert bench.error(2, "key", "restore", str(file), "--passphrase-file", passphrase)["Code"] == (
        "InvalidParameterValue"
    )
    file.write_bytes(b"sealed keys")
    bench.server.fail("KeyService.Restore", BackupRefused(reason="the passphrase does not open it"))
    assert bench.error(7, "key", "restore", str(file), "--passphrase-file", passphrase)["Code"] == (
        "Ebsd.BackupRefused"
    )
    assert file.exists()


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_without_a_terminal_a_passphrase_source_is_needed(bench: Bench, tmp_path: Path, command: str) -> None:
    file = tmp_path / "b"
    if command == "restore":
        file.write_bytes(b"sealed keys")
    error = bench.error(2, "key", command, str(file))
    assert error["Code"] == "MissingParameter"
    assert "--passphrase-fd" in error["Message"]
    assert file.exists() is (command == "restore")


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_one_passphrase_source_at_a_time(bench: Bench, tmp_path: Path, command: str) -> None:
    words = ["--passphrase-fd", "0", "--passphrase-file", "/x"]
    assert bench.error(2, "key", command, str(tmp_path / "b"), *words)["Code"] == "Usage"


@pytest.mark.parametrize(("typed", "status"), [(["a", "a"], 0), (["a", "b"], 2), (["", ""], 2)])
def test_a_backup_passphrase_is_typed_twice(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], status: int
) -> None:
    answers = iter(typed)
    monkeypatch.setattr(terminal, "is_interactive", lambda: True)
    monkeypatch.setattr("getpass.getpass", lambda _prompt, stream=None: next(answers))
    result = bench.run("key", "backup", str(tmp_path / "b"))
    assert result.exit_code == status, result.stderr
    assert (tmp_path / "b").exists() is (status == 0)
    assert next(answers, None) is None


def test_a_restore_passphrase_is_typed_once(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").write_bytes(b"sealed keys")
    monkeypatch.setattr(terminal, "is_interactive", lambda: True)
    monkeypatch.setattr("getpass.getpass", lambda _prompt, stream=None: "pässword")
    bench.ok("key", "restore", str(tmp_path / "b"))
    assert bench.world.passphrases == ["pässword".encode()]


# --- defaults ---------------------------------------------------------------------------------------------


def test_defaults_are_shown(bench: Bench) -> None:
    access = {"SnapshotBlockPublicAccess": "unblocked"}
    document = {"EbsEncryptionByDefault": True, "KmsKeyId": "alias/aws/ebs", **access}
    shown = bench.document("defaults", "show")
    assert {name: shown[name] for name in document} == document
    assert (shown["MayCreate"], len(shown["Limits"])) == (True, 4)
    assert bench.ok("defaults", "show") == (
        "EbsEncryptionByDefault\tyes\nKmsKeyId\talias/aws/ebs\nSnapshotBlockPublicAccess\tunblocked\n"
        "Volumes\t2 of 10\nVolumeBytes\t3221225472 of no limit\nSnapshots\t0 of 5\nJobs\t0 of no limit\n"
    )


@pytest.mark.parametrize(
    ("words", "method", "document"),
    [
        (["enable-encryption"], "EnableEbsEncryptionByDefault", {"EbsEncryptionByDefault": True}),
        (["disable-encryption"], "DisableEbsEncryptionByDefault", {"EbsEncryptionByDefault": False}),
        (["set-key", "backup"], "ModifyEbsDefaultKmsKeyId", {"KmsKeyId": ARN}),
        (["reset-key"], "ResetEbsDefaultKmsKeyId", {"KmsKeyId": "alias/aws/ebs"}),
        (["block-public-snapshots"], "EnableSnapshotBlockPublicAccess", {"State": "block-all-sharing"}),
        (["block-public-snapshots", "--new-only"], "EnableSnapshotBlockPublicAccess", {"State": "block-new-sharing"}),
        (["allow-public-snapshots"], "DisableSnapshotBlockPublicAccess", {"State": "unblocked"}),
    ],
)
def test_defaults_are_changed(bench: Bench, words: list[str], method: str, document: dict[str, object]) -> None:
    result = bench.run("defaults", *words)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr
    assert bench.document("defaults", *words) == document
    sent = {"set-key": {"KmsKeyId": "backup"}, "block-public-snapshots": document}.get(words[0], {})
    assert bench.server.parameters(f"EC2.{method}") == sent


def test_defaults_errors(bench: Bench) -> None:
    bench.server.fail("EC2.ModifyEbsDefaultKmsKeyId", KeyNotFound(key="alias/x"))
    assert bench.error(3, "defaults", "set-key", "x")["Code"] == "NotFoundException"
    assert bench.error(2, "defaults", "set-key")["Code"] == "Usage"
