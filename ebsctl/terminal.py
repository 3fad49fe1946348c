"""What is asked of a person: yes or no, and passphrases, which never stand in argv or the environment. And what a
person sees while it takes long: one line of progress."""

from __future__ import annotations

import os
import sys
import time
from typing import Final

from ebsctl.render import progress_line
from ebsd.domain.errors import InvalidParameterValue, MissingParameter

MAX_PASSPHRASE: Final = 1024
"""Bytes; the key service takes no more. Less than a pipe holds (65536): writing one to a pipe cannot block."""


def is_interactive() -> bool:
    """Say whether a person can be asked: questions go to standard error, answers come from standard input."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr is not None and sys.stderr.isatty()


def confirm(question: str) -> bool:
    """Ask ``question [y/N]`` on the terminal; anything but y or yes is a no, the end of input too."""
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def read_passphrase(
    *, descriptor: int | None, path: str | None, twice: bool, prompt: str = "Passphrase of the key backup"
) -> bytes:
    """Return a passphrase from an open descriptor, from a file, or typed unseen (twice where an error costs).

    From a descriptor or file everything is taken, but for one line feed at its end. Raises
    InvalidParameterValue for a passphrase that is empty, too long or typed differently, or a source that
    cannot be read; MissingParameter when no source is named and there is no terminal.
    """
    if descriptor is not None:
        return _checked(_read_all(descriptor, "--passphrase-fd", str(descriptor)), "--passphrase-fd")
    if path is not None:
        try:
            opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise InvalidParameterValue(value=path, parameter="--passphrase-file", reason=exc.strerror) from exc
        try:
            return _checked(_read_all(opened, "--passphrase-file", path), "--passphrase-file")
        finally:
            os.close(opened)
    if not is_interactive():
        error = MissingParameter(parameter="--passphrase-fd or --passphrase-file")
        error.hint = "Without a terminal the passphrase comes from a descriptor or a file."
        raise error
    return _typed(twice, prompt)


def _typed(twice: bool, prompt: str) -> bytes:
    import getpass  # few commands need it

    try:
        first = getpass.getpass(f"{prompt}: ", stream=sys.stderr)
        again = getpass.getpass("The same again: ", stream=sys.stderr) if twice else first
    except EOFError:
        raise InvalidParameterValue(value="", parameter="passphrase", reason="none was typed") from None
    if again != first:
        raise InvalidParameterValue(value="hidden", parameter="passphrase", reason="the two differ")
    return _checked(first.encode("utf-8", "surrogateescape"), "passphrase")


def _read_all(descriptor: int, parameter: str, value: str) -> bytes:
    data = b""
    try:
        # One byte more than allowed plus the line feed shows that it is too long.
        while len(data) <= MAX_PASSPHRASE + 1 and (piece := os.read(descriptor, MAX_PASSPHRASE + 2 - len(data))):
            data += piece
    except OSError as exc:
        raise InvalidParameterValue(value=value, parameter=parameter, reason=exc.strerror) from exc
    return data.removesuffix(b"\n")


def _checked(passphrase: bytes, parameter: str) -> bytes:
    if not passphrase:
        raise InvalidParameterValue(value="", parameter=parameter, reason="the passphrase is empty")
    if len(passphrase) > MAX_PASSPHRASE:
        reason = f"a passphrase has at most {MAX_PASSPHRASE} bytes"
        raise InvalidParameterValue(value="hidden", parameter=parameter, reason=reason)
    return passphrase


def passphrase_pipe(passphrase: bytes) -> int:
    """Return the reading end of a pipe that holds the passphrase and then ends; the caller closes it.

    A pipe rather than a file: its pages are never written to swap.
    """
    reader, writer = os.pipe()
    try:
        os.write(writer, passphrase)
    finally:
        os.close(writer)
    return reader


class ProgressBar:
    """One line on standard error, drawn over and over; nothing at all where that is no terminal."""

    def __init__(self, *, wanted: bool, things: str = "") -> None:
        """``things``: what is counted, where that is not bytes."""
        self._things = things
        self._visible = wanted and sys.stderr is not None and sys.stderr.isatty()
        self._began: tuple[float, int] | None = None
        self._length = 0

    def show(self, done: int, total: int, rate: int | None = None) -> None:
        """``rate``: bytes per second of late, where somebody knows better than who just began to look."""
        if not self._visible or not total:
            return  # a job that has not counted its work yet: 0 of 0 would look done
        now = time.monotonic()
        if self._began is None:
            self._began = (now, done)
        since, done_then = self._began
        line = f"{done} of {total} {self._things}"
        if not self._things:
            gained, seconds = (done - done_then, now - since) if rate is None else (rate, 1.0)
            line = progress_line(done, total, gained=gained, seconds=seconds, width=_columns())
        self._write("\r" + line.ljust(self._length))
        self._length = len(line)

    def clear(self) -> None:
        """Leave an empty line."""
        if self._length:
            self._write(f"\r{'':{self._length}}\r")
            self._length = 0

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
