"""Questions and passphrases."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from ebsctl import terminal
from ebsctl.terminal import MAX_PASSPHRASE, ProgressBar, confirm, passphrase_pipe, read_passphrase
from ebsd.domain.errors import InvalidParameterValue, MissingParameter


@pytest.mark.parametrize(
    ("typed", "answer"),
    [("y\n", True), ("YES\n", True), (" y \n", True), ("n\n", False), ("\n", False), ("", False), ("yep\n", False)],
)
def test_only_yes_is_a_yes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, answer: bool
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert confirm("Really?") is answer
    assert capsys.readouterr() == ("", "Really? [y/N] ")


@pytest.mark.parametrize(
    ("content", "passphrase"),
    [
        (b"word", b"word"),
        (b"word\n", b"word"),
        (b"word\n\n", b"word\n"),
        (b" \xff\0 ", b" \xff\0 "),
        (b"x" * MAX_PASSPHRASE + b"\n", b"x" * MAX_PASSPHRASE),
    ],
)
def test_a_file_gives_all_but_one_line_feed(tmp_path: Path, content: bytes, passphrase: bytes) -> None:
    path = tmp_path / "p"
    path.write_bytes(content)
    assert read_passphrase(descriptor=None, path=str(path), twice=True) == passphrase


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * (MAX_PASSPHRASE + 1), b"x" * 100_000])
def test_empty_and_endless_passphrases_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p"
    path.write_bytes(content)
    with pytest.raises(InvalidParameterValue) as caught:
        read_passphrase(descriptor=None, path=str(path), twice=True)
    assert "xxx" not in caught.value.message


def test_an_unreadable_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterValue, match="No such file"):
        read_passphrase(descriptor=None, path=str(tmp_path / "none"), twice=True)
    with pytest.raises(InvalidParameterValue, match="Is a directory"):
        read_passphrase(descriptor=None, path=str(tmp_path), twice=True)
    with pytest.raises(InvalidParameterValue, match="Bad file descriptor"):
        read_passphrase(descriptor=987, path=None, twice=True)


def test_a_descriptor_that_gives_little_at_a_time_is_read_to_its_end() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        for piece in (b"open ", b"sesame", b"\n"):
            os.write(writer, piece)
        os._exit(0)
    os.close(writer)
    assert read_passphrase(descriptor=reader, path=None, twice=True) == b"open sesame"
    os.waitpid(pid, 0)
    os.close(reader)


def test_without_terminal_and_source_there_is_no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(MissingParameter, match="--passphrase-fd"):
        read_passphrase(descriptor=None, path=None, twice=True)


def test_the_end_of_input_at_the_prompt_is_no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(_prompt: str, stream: object = None) -> str:
        raise EOFError

    monkeypatch.setattr(terminal, "is_interactive", lambda: True)
    monkeypatch.setattr("getpass.getpass", ended)
    with pytest.raises(InvalidParameterValue, match="none was typed"):
        read_passphrase(descriptor=None, path=None, twice=False)


def test_the_longest_passphrase_fits_a_pipe_that_ends() -> None:
    reader = passphrase_pipe(b"x" * MAX_PASSPHRASE)
    assert os.read(reader, 100_000) == b"x" * MAX_PASSPHRASE
    assert os.read(reader, 1) == b""
    os.close(reader)


class Terminal(io.StringIO):
    """A terminal without a size, as some are."""

    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_over_and_wiped_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal_out = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal_out)
    bar = ProgressBar(wanted=True)
    bar.show(1, 4)
    bar.show(4, 4)
    bar.clear()
    bar.clear()
    text = terminal_out.getvalue()
    assert text.count("\r") == 4
    assert "25%" in text
    assert "100%" in text
    assert text.endswith(" \r")
    assert "\n" not in text


def test_work_that_is_not_counted_yet_is_not_shown_as_done(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal_out = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal_out)
    bar = ProgressBar(wanted=True)
    bar.show(0, 0)
    assert terminal_out.getvalue() == ""
    bar.show(0, 4)
    assert "0%" in terminal_out.getvalue()


@pytest.mark.parametrize(("stream", "wanted"), [(Terminal(), False), (io.StringIO(), True), (None, True)])
def test_without_a_terminal_there_is_silence(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None, wanted: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    bar = ProgressBar(wanted=wanted)
    bar.show(1, 4)
    bar.clear()
    assert stream is None or stream.getvalue() == ""
