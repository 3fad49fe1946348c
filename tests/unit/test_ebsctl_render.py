"""Tables, fields and cells of ebsctl."""

from __future__ import annotations

import json

import pytest
from ebsctl_fakes import FAILURE, GIB, attachment, job, key, snapshot, volume

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


def test_snapshot_cells_and_fields() -> None:
    item = snapshot(State="error", StateMessage="no space", PauseMicroseconds=0, Tags=[{"Key": "a"}])
    assert len(render.snapshot_row(item, for_people=True)) == len(render.SNAPSHOT_HEADER)
    assert render.snapshot_row(item, for_people=True)[2] == "10 GiB"
    pairs = dict(render.snapshot_fields(item, for_people=True))
    assert (pairs["StateMessage"], pairs["PauseMicroseconds"], pairs["Tag a"]) == ("no space", 0, None)
    assert not {"StateMessage", "PauseMicroseconds"} & set(dict(render.snapshot_fields(snapshot(), for_people=True)))


def test_job_cells_and_fields() -> None:
    item = job(State="failed", Error=FAILURE)
    assert len(render.job_row(item, for_people=True)) == len(render.JOB_HEADER)
    assert dict(render.job_fields(item, for_people=False))["Error.Code"] == FAILURE["Code"]
    assert dict(render.job_fields(item, for_people=True))["Total"] == "4 GiB"


@pytest.mark.parametrize(
    ("done", "total", "state", "progress"),
    [
        (0, 4 * GIB, "running", "0%"),
        (4 * GIB - 1, 4 * GIB, "running", "99%"),
        (4 * GIB, 4 * GIB, "completed", "100%"),
        (5 * GIB, 4 * GIB, "running", "100%"),
        (0, 0, "running", "0%"),
        (0, 0, "completed", "100%"),
    ],
)
def test_the_progress_of_a_job(done: int, total: int, state: str, progress: str) -> None:
    assert render.job_progress(job(Done=done, Total=total, State=state)) == progress


def test_a_progress_line_has_bar_percent_bytes_rate_and_time() -> None:
    line = render.progress_line(2 * GIB, 4 * GIB, gained=GIB, seconds=4.0, width=80)
    assert line == f"[{'#' * 17}{'-' * 17}]   50%  2 GiB of 4 GiB  256 MiB/s  ETA 0:08"


@pytest.mark.parametrize(("gained", "seconds"), [(0, 5.0), (GIB, 0.0)])
def test_without_a_rate_there_is_no_time_left(gained: int, seconds: float) -> None:
    assert "ETA" not in render.progress_line(GIB, 4 * GIB, gained=gained, seconds=seconds, width=80)


@pytest.mark.parametrize("width", [0, 1, 10, 40, 60, 79, 80, 200])
@pytest.mark.parametrize(("done", "total"), [(0, 0), (0, GIB), (GIB, GIB), (2 * GIB, GIB), (1, 64 << 40)])
def test_a_progress_line_never_wraps(width: int, done: int, total: int) -> None:
    assert len(render.progress_line(done, total, gained=1, seconds=9.0, width=width)) <= max(width - 1, 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (0.1, "0:01"), (59.5, "1:00"), (754, "12:34"), (3723, "1:02:03"), (360000, "100:00:00")],
)
def test_time_spans(seconds: float, text: str) -> None:
    assert render.clock(seconds) == text
