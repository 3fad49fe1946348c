"""Commands on the service and the program: status, doctor, bench, version, completion."""

from __future__ import annotations

from typing import Any, Final

import click

from ebsctl import render
from ebsctl.app import App, Command
from ebsd import __version__
from ebsd.domain.errors import DaemonUnreachable, EbsdError, ExitStatus

PATIENCE: Final = 10.0
"""Seconds that status and doctor wait for an answer: they are called when something hangs."""


@click.command(cls=Command, short_help="Show whether ebsd and its key service run.")
@click.pass_obj
def status(app: App) -> int:
    """Show whether ebsd and its key service run, and from which directories.

    Works without ebsd too; the exit status is 9 then.
    """
    client = app.impatient_client(PATIENCE)
    try:
        document = client.control("GetStatus")
    except DaemonUnreachable as error:
        document = {"State": "unreachable", "Reason": error.facts["reason"], "Socket": client.path}
        document["KeyService"] = _key_service_status(app)
        _emit_status(app, document)
        return app.report_error(error)
    _emit_status(app, {**document, "Socket": client.path})
    return ExitStatus.DONE


def _emit_status(app: App, document: dict[str, Any]) -> None:
    pairs = render.status_fields(document, for_people=app.for_people)
    app.emit(document, render.fields(pairs, for_people=app.for_people))


def _key_service_status(app: App) -> dict[str, Any]:
    """Return the key service's own word in the shape of KeyServiceStatus; it may outlive ebsd."""
    try:
        reply = app.impatient_client(PATIENCE).key_service("GetStatus")
    except EbsdError as error:
        return {"State": "unreachable", "Reason": error.message}
    members = ("State", "Reason", "StateDirectory", "RootKey", "RootKeyKind", "ConfiguredRootKey", "Pid")
    return {name: reply[name] for name in members if reply.get(name) is not None}


@click.command(cls=Command, short_help="Look for what is wrong with host and ebsd, and how to mend it.")
@click.pass_obj
def doctor(app: App) -> int:
    """Look for what is wrong with this host and with ebsd, and say how to mend it.

    Works without ebsd too. The exit status is 1 when there is a failure, else 0.
    """
    from ebsctl.doctor import examine

    findings = examine(app.impatient_client(PATIENCE), app.programs, app.uid)
    app.emit({"Findings": findings}, render.findings_text(findings, for_people=app.for_people))
    return ExitStatus.FAILED if any(finding["Level"] == "failure" for finding in findings) else ExitStatus.DONE


@click.command(cls=Command, short_help="Measure how fast this host encrypts.")
@click.pass_obj
def bench(app: App) -> None:
    """Measure how fast this host encrypts, on one core, for about three seconds.

    The figures compare with `openssl speed -evp aes-256-xts`; scripts/bench of the project measures whole volumes.
    """
    app.note("measuring")
    measured = app.client.control("Benchmark")
    rows = [(row["Name"], row["RequestBytes"], f"{row['BytesPerSecond'] / 1e6:.0f}") for row in measured["Rows"]]
    header = ("OPERATION", "REQUEST BYTES", "MB/S")
    app.emit(measured, render.table(header, rows, for_people=app.for_people))


@click.command(cls=Command, short_help="Print the version of ebsctl.")
@click.pass_obj
def version(app: App) -> None:
    """Print the version of ebsctl; `ebsctl status` shows that of ebsd."""
    app.emit({"Version": __version__}, f"ebsctl {__version__}")


@click.command(cls=Command, short_help="Print a completion script for bash, zsh or fish.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_obj
def completion(app: App, shell: str) -> None:
    """Print a completion script; names of volumes are completed too.

    \b
    bash: ebsctl completion bash > /etc/bash_completion.d/ebsctl
    zsh:  ebsctl completion zsh > "${fpath[1]}/_ebsctl"
    fish: ebsctl completion fish > ~/.config/fish/completions/ebsctl.fish
    """
    from click.shell_completion import ShellComplete, get_completion_class

    from ebsctl.cli import COMPLETE_VARIABLE, cli

    kind = get_completion_class(shell)
    if kind is None:
        raise AssertionError(f"BUG: click has no completion for {shell}")
    # Not kind.source(): for bash that starts a bash to look at its version.
    script = ShellComplete.source(kind(cli, {}, "ebsctl", COMPLETE_VARIABLE))
    app.emit({"Shell": shell, "Script": script}, script)
