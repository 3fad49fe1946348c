"""The program ``ebsctl``: the command tree, and the one place where errors become texts and exit statuses."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from typing import Any, Final, NoReturn

import click

from ebsctl.app import App, Group, Interruption, UsageFailure
from ebsd import __version__
from ebsd.domain.errors import EbsdError, ExitStatus, ProtocolError

# Modules are imported when one of their commands is called: start-up is most of what `ebsctl list` costs.
COMMANDS: Final = {
    "create": "volumes:create",
    "attach": "volumes:attach",
    "detach": "volumes:detach",
    "restart-engine": "engines:restart_engine",
    "resize": "growth:resize",
    "trim": "trimming:trim",
    "snapshot": "snapshots:snapshot",
    "copy": "snapshots:copy",
    "clone": "cloning:clone",
    "schedule": "schedules:schedule",
    "share": "sharing:share",
    "list": "resources:list_resources",
    "show": "resources:show",
    "delete": "resources:delete",
    "undelete": "recyclebin:undelete",
    "recycle-bin": "recyclebin:recycle_bin",
    "rename": "resources:rename",
    "tag": "resources:tag",
    "wait": "waiting:wait",
    "lock": "locks:lock",
    "unlock": "locks:unlock",
    "verify": "verify:verify",
    "blocks": "blocks:blocks",
    "archive": "archives:archive",
    "import": "transfers:import_image",
    "export": "transfers:export",
    "job": "jobs:job",
    "defaults": "defaults:defaults",
    "admission": "admission:admission",
    "key": "keyfamily:key",
    "audit": "audit:audit",
    "status": "service:status",
    "doctor": "service:doctor",
    "check": "check:check",
    "bench": "service:bench",
    "version": "service:version",
    "completion": "service:completion",
}
"""Command -> module of ebsctl.commands and function, in the order of the help text."""

ELSEWHERE: Final = {
    "backup": "ebsctl key backup FILE",
    "describe": "ebsctl show ID",
    "discard": "ebsctl trim VOLUME",
    "fstrim": "ebsctl trim VOLUME",
    "grow": "ebsctl resize VOLUME SIZE",
    "info": "ebsctl show ID",
    "ls": "ebsctl list",
    "mkfs": "ebsctl attach VOLUME --mkfs ext4",
    "mount": "ebsctl attach VOLUME --mount DIR",
    "remove": "ebsctl delete ID",
    "restore": "ebsctl create NAME --from SNAPSHOT; for keys: ebsctl key restore FILE",
    "rm": "ebsctl delete ID",
    "rotate": "ebsctl key rotation KEY --now",
    "restore-from-bin": "ebsctl undelete ID",
    "umount": "ebsctl detach VOLUME",
    "unshare": "ebsctl share SNAPSHOT --remove USER",
    "unmount": "ebsctl detach VOLUME",
}
"""What people look for under another name -> the command line that does it."""

COMPLETE_VARIABLE: Final = "_EBSCTL_COMPLETE"

_HELP: Final = """Encrypted block volumes on this host, with the names of Amazon EBS and AWS KMS.

VOLUME and SNAPSHOT are names or ids (vol-..., snap-...), JOB is an id (job-...). KEY is an alias (backup or
alias/backup), a key id or a key ARN.

\b
Examples:
  ebsctl create data --size 10G
  ebsctl attach data --mkfs ext4 --mount /srv/data
  ebsctl snapshot data --name monday
  ebsctl create again --from monday --mount /srv/again
  ebsctl list
  ebsctl detach data
  ebsctl key backup /media/usb/ebsd-keys

To stop everything: ebsctl detach --all, then stop ebsd. Stopping ebsd alone leaves attached volumes running.

Without --json, standard output carries only the result (an id, a path, a table); notes go to standard error.
In a pipe, tables are tab-separated without a header, with sizes in bytes and - for nothing.

\b
Exit status:
  0  done                    6  key unavailable
  1  failed                  7  integrity failure
  2  usage                   8  timeout
  3  not found               9  ebsd cannot be reached
  4  conflict, wrong state  10  no space left
  5  denied                130  interrupted
"""


class Root(Group):
    """The command tree, which loads its commands when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = COMMANDS.get(cmd_name)
        if place is None:
            return None
        module, _, function = place.partition(":")
        command: click.Command = getattr(importlib.import_module(f"ebsctl.commands.{module}"), function)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if word not in COMMANDS and not word.startswith("-") and not ctx.resilient_parsing:
            raise UsageFailure(f"No such command '{word}'.", _instead(word))
        return super().resolve_command(ctx, args)

    def main(  # type: ignore[override]
        self,
        args: list[str] | None = None,
        prog_name: str | None = None,
        obj: App | None = None,
        **extra: Any,
    ) -> NoReturn:
        """Run one command line and exit with its status."""
        words = sys.argv[1:] if args is None else list(args)
        app = obj or App()
        sys.exit(int(self._run(app, words, extra)))

    def _run(self, app: App, words: list[str], extra: dict[str, Any]) -> int:
        extra.pop("standalone_mode", None)
        try:
            result = super().main(
                words,
                prog_name="ebsctl",
                complete_var=COMPLETE_VARIABLE,
                standalone_mode=False,
                obj=app,
                **extra,
            )
        except EbsdError as error:
            return app.report_error(error)
        except KeyError as error:
            problem = ProtocolError(reason=f"a reply has no member {error}")
            problem.hint = "ebsctl and ebsd are probably of different versions."
            return app.report_error(problem)
        except click.UsageError as error:
            # The parser may have failed before it came to --json.
            app.as_json = app.as_json or "--json" in words
            return _report_usage(app, error)
        except click.ClickException as error:
            app.report("Usage", error.format_message(), "")
            return ExitStatus.USAGE
        except (click.Abort, KeyboardInterrupt) as error:
            # click makes an Abort of what Ctrl-C raised.
            cause = error.__cause__ if isinstance(error, click.Abort) else error
            app.report("Interrupted", "Interrupted.", cause.hint if isinstance(cause, Interruption) else "")
            return ExitStatus.INTERRUPTED
        except OSError as error:
            # Standard output or error cannot be written, for instance: the disk behind them is full.
            _forget_output()
            app.report("Ebsd.CommandFailed", f"{error.strerror}: {error.filename or 'output'}.", "")
            return ExitStatus.FAILED
        return result if isinstance(result, int) else ExitStatus.DONE


def _instead(word: str) -> str:
    """Return the hint for a word that is no command."""
    if word in ELSEWHERE:
        return f"Use: {ELSEWHERE[word]}"
    from difflib import get_close_matches  # only a typing error needs it

    close = get_close_matches(word, COMMANDS, n=1)
    return f"Did you mean `ebsctl {close[0]}`?" if close else "`ebsctl --help` lists the commands."


def _forget_output() -> None:
    """Let what is still buffered for standard output go nowhere: its flush at exit would fail once more."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _report_usage(app: App, error: click.UsageError) -> ExitStatus:
    context = error.ctx
    if context is not None and not app.as_json and isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(context.get_help(), err=True)
        return ExitStatus.USAGE
    if isinstance(error, UsageFailure):
        hint = error.hint
    else:
        hint = f"`{context.command_path if context else 'ebsctl'} --help` explains the command."
    if context is not None and not app.as_json:
        click.echo(context.get_usage(), err=True)
    app.report("Usage", error.format_message(), hint)
    return ExitStatus.USAGE


@click.group(cls=Root, help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--socket",
    metavar="PATH",
    envvar="EBSD_SOCKET",
    show_envvar=True,
    help="Socket of ebsd. Otherwise EBSD_RUNTIME_DIR/ebsd.sock, your own XDG_RUNTIME_DIR/ebsd/ebsd.sock "
    "where there is one, or /run/ebsd/ebsd.sock.",
)
@click.version_option(__version__, "-V", "--version", message="ebsctl %(version)s")
@click.pass_obj
def cli(app: App, socket: str | None) -> None:
    app.socket = socket


def main() -> NoReturn:
    """Run the program on sys.argv."""
    # What was imported stays, and so does a long list. To look for garbage in them is a seventh of what `ebsctl list`
    # costs with a thousand volumes.
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)
    cli.main()
    raise AssertionError("BUG: main returned")
