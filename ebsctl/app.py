"""What all commands share: the settings of one invocation, where output goes, ``--json``, command classes.

1. Standard output carries the result and nothing else: one JSON document with ``--json``, else what a script
   wants.
2. Notes for people go to standard error; with ``--json`` they are left out, so that whatever stands there is
   one error document.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ebsctl import render
from ebsctl.mounting import Programs, read_mounts
from ebsd.domain.errors import EbsdError, ExitStatus, InvalidParameterValue
from ebsd.domain.mountinfo import Mount
from ebsd.domain.tags import check_tag
from ebsd.domain.units import parse_size

if TYPE_CHECKING:
    from ebsctl.client import Client


F = TypeVar("F", bound=Callable[..., Any])


class App:
    """One invocation: socket, output form, and the host's programs."""

    def __init__(
        self,
        *,
        programs: Programs | None = None,
        mountinfo: str = "/proc/self/mountinfo",
        uid: int | None = None,
    ) -> None:
        self.socket: str | None = None
        self.as_json = False
        self.programs = programs or Programs()
        self._mountinfo = mountinfo
        self.uid = os.geteuid() if uid is None else uid
        """The user whom the daemon sees."""

    @cached_property
    def client(self) -> Client:
        return self.impatient_client(None)

    def impatient_client(self, timeout: float | None) -> Client:
        """Return a client that waits at most ``timeout`` seconds for an answer."""
        from ebsctl.client import Client  # 5 to 10 ms that `version`, `completion` and --help need not spend

        return Client(self.socket, timeout=timeout)

    @property
    def for_people(self) -> bool:
        """Whether standard output is a terminal."""
        return sys.stdout is not None and sys.stdout.isatty()

    def is_administrator(self) -> bool:
        """Say whether the user may back up keys: root, or who runs ebsd himself; False when ebsd does not say."""
        if self.uid == 0:
            return True
        try:
            return bool(self.impatient_client(2).control("GetStatus")["Uid"] == self.uid)
        except EbsdError:
            return False

    def mounts(self) -> list[Mount]:
        return read_mounts(self._mountinfo)

    def emit(self, document: object, plain: str = "") -> None:
        """Print the result: the document with --json, else the plain text, of which "" prints nothing."""
        if self.as_json:
            click.echo(render.json_text(document))
        elif plain:
            click.echo(plain)

    def note(self, text: str) -> None:
        """Tell people something on standard error."""
        if not self.as_json:
            click.echo(text, err=True)

    def note_of(self, reply: render.Document) -> None:
        """Pass on what the server has to say to people about what it did."""
        if reply.get("Note"):
            self.note(f"note: {render.printable(reply['Note'])}")

    def report(self, code: str, message: str, hint: str) -> None:
        """Print an error on standard error."""
        if self.as_json:
            click.echo(render.json_text({"Code": code, "Message": message, "Hint": hint}), err=True)
            return
        # Server texts may quote file names and names of users: nothing in them may steer the terminal.
        click.echo(f"error: {_line(message)} [{code}]" if code != "Usage" else f"error: {_line(message)}", err=True)
        if hint:
            click.echo(f"hint: {_line(hint)}", err=True)

    def report_error(self, error: EbsdError) -> ExitStatus:
        """Print an error and return the exit status it means."""
        self.report(error.code, error.message, error.hint)
        return error.exit_status


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


class Interruption(KeyboardInterrupt):
    """Ctrl-C at a place where a person must be told what goes on without him."""

    def __init__(self, hint: str) -> None:
        super().__init__(hint)
        self.hint = hint


class UsageFailure(click.UsageError):
    """A usage error with a hint of its own."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def _set_json(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(App).as_json = True


def json_option() -> click.Option:
    """Return the --json option that every group and command has: people type it anywhere."""
    return click.Option(
        ["--json"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_json,
        help="Print one JSON document with AWS's member names.",
    )


class Command(click.Command):
    """A command with --json."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(json_option())


class Group(click.Group):
    """A group with --json, whose commands have it too."""

    command_class = Command
    group_class = type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(json_option())


def parse_pairs(parameter: str, texts: Sequence[str]) -> dict[str, str]:
    """Read ``KEY=VALUE`` texts of one option; raises InvalidParameterValue, also for a key given twice."""
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidParameterValue(value=text, parameter=parameter, reason="write it as KEY=VALUE")
        if key in pairs:
            raise InvalidParameterValue(value=text, parameter=parameter, reason=f"{key} is given twice")
        pairs[key] = value
    return pairs


def client_token_option() -> Callable[[F], F]:
    """Return the --client-token option of the commands that make something."""
    return click.option(
        "--client-token",
        metavar="TOKEN",
        help="Do it once: the same command with the same token gives what the first one made. At most 64 characters.",
    )


def rate_option() -> Callable[[F], F]:
    """Return the --rate option of the commands that start a job; its value is what ``parse_rate`` reads."""
    return click.option(
        "--rate",
        metavar="RATE",
        help="Re-encrypt at most so many bytes per second, such as 50M; 0: no limit. Without it as configured.",
    )


def parse_rate(text: str | None) -> int | None:
    """Read ``50M``, ``50M/s`` or a number of bytes per second, 0 for no limit; None stays None. Raises InvalidSize."""
    return None if text is None else parse_size(text.removesuffix("/s"))


def tag_list(texts: Sequence[str]) -> list[dict[str, str]] | None:
    """Read the K=V texts of --tag as EC2's tags, None when there are none; raises InvalidTag too."""
    pairs = parse_pairs("--tag", texts)
    for key, value in pairs.items():
        check_tag(key, value)
    return [{"Key": key, "Value": value} for key, value in pairs.items()] or None
