"""Tables, fields and cells of ebsctl."""

from __future__ import annotations

import json

import pytest
from ebsctl_fakes import attachment, key, volume

from ebsctl import render


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (None, "-"),
        ("", "-"),
        (True, "yes"),
        (False, "no"),
        (0, "0"),
        ("a b", "a b"),
        ("a\tb\nc", "a?b?c"),
        ("\x1b[31mred", "?[31mred"),
        ("Schlüssel", "Schlüssel"),
    ],
)
def test_a_cell_never_steers_the_terminal(value: object, cell: str) -> None:
    assert render.printable(value) == cell


def test_a_table_for_people_is_aligned_under_a_header() -> None:
    text = render.table(("NAME", "ID"), [("a", 1), ("longer", None)], for_people=True)
    assert text == "NAME    ID\na       1\nlonger  -"


def test_a_table_for_programs_is_tab_separated() -> None:
    assert render.table(("NAME", "ID"), [("a", 1), ("b", None)], for_people=False) == "a\t1\nb\t-"


@pytest.mark.parametrize("for_people", [True, False])
def test_no_row_gives_no_table(for_people: bool) -> None:
    assert render.table(("NAME",), [], for_people=for_people) == ""


def test_fields() -> None:
    pairs = [("Name", "data"), ("Encrypted", True)]
    assert render.fields(pairs, for_people=True) == "Name:      data\nEncrypted: yes"
    assert render.fields(pairs, for_people=False) == "Name\tdata\nEncrypted\tyes"


def test_a_volume_row_has_sizes_for_its_reader() -> None:
    item = volume(Attachments=[attachment(MountPoint="/srv/data")])
    row = render.volume_row(item, for_people=True)
    assert len(row) == len(render.VOLUME_HEADER)
    assert row[2] == "10 GiB"
    assert render.volume_row(item, for_people=False)[2] == 10 * 2**30
    assert row[4] == item["KmsKeyId"].rpartition("/")[2]
    assert row[5:7] == ("/dev/loop5001", "/srv/data")


def test_an_unencrypted_available_volume_has_empty_cells() -> None:
    row = render.volume_row(volume(Encrypted=False, KmsKeyId=None), for_people=True)
    assert row[4:7] == (None, None, None)


def test_volume_fields_have_reason_attachment_and_tags() -> None:
    item = volume(
        State="error",
        StateReason="the volume process died",
        Attachments=[attachment()],
        Tags=[{"Key": "env", "Value": "lab"}, {"Key": "bare"}],
    )
    pairs = dict(render.volume_fields(item, for_people=True))
    assert pairs["StateReason"] == "the volume process died"
    assert pairs["Path"] == "/dev/loop5001"
    assert (pairs["Tag env"], pairs["Tag bare"]) == ("lab", None)
    assert "StateReason" not in dict(render.volume_fields(volume(), for_people=True))


def test_key_cells_and_fields() -> None:
    item = {**key(DeletionDate="2026-02-01T00:00:00Z"), "Aliases": [{"AliasName": "alias/a"}, {"AliasName": "alias/b"}]}
    assert len(render.key_row(item)) == len(render.KEY_HEADER)
    assert render.key_row(item)[0] == "alias/a,alias/b"
    assert dict(render.key_fields(item))["DeletionDate"] == "2026-02-01T00:00:00Z"


def test_findings_show_the_fix_below_or_as_a_cell() -> None:
    findings = [
        {"Check": "fuse", "Level": "failure", "Message": "it is missing", "Fix": "modprobe fuse"},
        {"Check": "aes", "Level": "ok", "Message": "it is there", "Fix": None},
    ]
    assert render.findings_text(findings, for_people=True).splitlines() == [
        "failure  fuse  it is missing",
        "               fix: modprobe fuse",
        "ok       aes   it is there",
    ]
    assert render.findings_text(findings, for_people=False).splitlines() == [
        "failure\tfuse\tit is missing\tmodprobe fuse",
        "ok\taes\tit is there\t-",
    ]


def test_json_is_ascii_and_one_document() -> None:
    text = render.json_text({"Name": "Schlüssel"})
    assert text.isascii()
    assert json.loads(text) == {"Name": "Schlüssel"}
