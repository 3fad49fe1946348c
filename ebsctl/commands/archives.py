"""``ebsctl archive``: export, import, verify, show: snapshots as portable, encrypted files."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any, Final

import click

from ebsctl import render
from ebsctl.app import App, Group, Interruption, UsageFailure, tag_list
from ebsctl.following import follow_job, job_failure, note_running
from ebsctl.lookup import SNAPSHOT, Found, complete_snapshot, describe
from ebsctl.mounting import with_more_hint
from ebsctl.terminal import ProgressBar
from ebsd.domain.errors import EbsdError, ExitStatus, HostFailure, IncorrectState, ProtocolError, RemoteError
from ebsd.domain.states import JobState
from ebsd.domain.units import format_size, parse_size

STREAM: Final = "-"
_FILE = click.Path(allow_dash=True)


class Refused(Exception):
    """ebsd has refused to export, and so nobody writes into the file."""

    def __init__(self, error: RemoteError) -> None:
        super().__init__(error)
        self.error = error


@click.group(cls=Group, short_help="Snapshots as portable, encrypted files: export, import, verify, show.")
def archive() -> None:
    """Snapshots as portable, encrypted files.

    An archive is encrypted and authentic from end to end under a KMS key. Another ebsd imports it if its key service
    has that key (the same AWS KMS, or `ebsctl key backup` and `key restore`) and lets you use it.
    """


@archive.command("export", short_help="Write SNAPSHOT to an archive.")
@click.argument("snapshot", shell_complete=complete_snapshot)
@click.argument("file", metavar="FILE|-", type=_FILE)
@click.option(
    "--since", metavar="SNAPSHOT", shell_complete=complete_snapshot, help="Only what changed since this snapshot of it."
)
@click.option("--key", metavar="KEY", help="Encrypt the archive under this key instead of the snapshot's.")
@click.option("--rate", metavar="RATE", help="Bytes per second at most, such as 50M; 0 for no limit.")
@click.pass_obj
def export(app: App, snapshot: str, file: str, since: str | None, key: str | None, rate: str | None) -> None:
    """Write all of SNAPSHOT, or what changed since another one, to FILE, and print the id of the archive.

    A FILE with the beginning of this archive is continued, so an export that was interrupted is repeated with the same
    command. A FILE with anything else is left alone. Holes stay holes. The size of an archive tells how much is stored
    in the snapshot, and its description and names can be read by everybody; nothing is compressed.

    \b
    Examples:
      ebsctl archive export monday /media/usb/monday.ebsd
      ebsctl archive export tuesday tuesday.ebsd --since monday
      ebsctl archive export monday - | ssh host ebsctl archive import - monday
    """
    if file == STREAM and app.as_json:
        raise UsageFailure("--json and an archive cannot both go to standard output.", "Name a file.")
    with _output(file) as fd:
        members = {"SnapshotId": snapshot, "SinceSnapshotId": since, "KmsKeyId": key}
        try:
            reply = app.client.archives("Export", fd, Rate=None if rate is None else parse_size(rate), **members)
        except RemoteError as error:
            raise Refused(error) from None
        if reply["Resumed"]:
            app.note(f"note: {render.printable(file)} is continued")
        _follow(app, reply["JobId"], is_stream=file == STREAM, again="the same command goes on with it")
        if file != STREAM:
            _sync_name(file)
    app.note(f"note: encrypted under {render.printable(reply['KmsKeyId'])}")
    app.emit(reply, "" if file == STREAM else reply["ArchiveId"])


@archive.command("import", short_help="Make the snapshot NAME of an archive.")
@click.argument("file", metavar="FILE|-", type=_FILE)
@click.argument("name")
@click.option(
    "--onto",
    metavar="SNAPSHOT",
    shell_complete=complete_snapshot,
    help="For an incremental archive: the snapshot that its base was imported as. Found by itself where it is yours.",
)
@click.option("--key", metavar="KEY", help="Encrypt the snapshot under this key instead of your default key.")
@click.option("--description", metavar="TEXT", help="What it is for, instead of the archive's description.")
@click.option("--tag", "tags", multiple=True, metavar="K=V", help="Add a tag; may be repeated.")
@click.option("--rate", metavar="RATE", help="Bytes per second at most, such as 50M; 0 for no limit.")
@click.option("--no-wait", is_flag=True, help="Do not wait until all is there.")
@click.pass_obj
def import_archive(
    app: App,
    file: str,
    name: str,
    onto: str | None,
    key: str | None,
    description: str | None,
    tags: tuple[str, ...],
    rate: str | None,
    no_wait: bool,
) -> None:
    """Make the snapshot NAME of an archive and print its id.

    You must be allowed to use the KMS key that the archive is under; whoever is can have made it. The snapshot gets a
    data key of its own. One of an incremental archive shares what did not change with the snapshot that it goes onto.
    An import that was interrupted by a restart of ebsd goes on with the same command.

    \b
    Examples:
      ebsctl archive import monday.ebsd monday
      ebsctl archive import tuesday.ebsd tuesday --onto monday
    """
    if file == STREAM and no_wait:
        raise UsageFailure("--no-wait cannot be used with a stream.", "Whether it came to its end is known then only.")
    with _input(file) as fd:
        reply = app.client.archives(
            "Import",
            fd,
            Name=name,
            OntoSnapshotId=onto,
            KmsKeyId=key,
            Description=description,
            Tags=tag_list(tags),
            Rate=None if rate is None else parse_size(rate),
        )
        made = Found(SNAPSHOT, describe(app, reply["SnapshotId"]).document)
        app.note(f"note: the archive is under {render.printable(reply['KmsKeyId'])}: who may use that can have made it")
        if no_wait:
            note_running(app, reply["JobId"], made)
        else:
            again = "the same command goes on with it"
            _follow(app, reply["JobId"], is_stream=file == STREAM, again=again)
            made = describe(app, made.ident)
    app.emit(made.document, made.ident)


@archive.command("verify", short_help="Read all of an archive and check it.")
@click.argument("file", metavar="FILE|-", type=_FILE)
@click.option("--scrub", is_flag=True, help="Without its key: finds damage, but not what an attacker made to fit.")
@click.pass_obj
def verify(app: App, file: str, scrub: bool) -> None:
    """Read all of an archive and check every byte of it; exit status 7 when it cannot be trusted.

    With its key: authenticity. Without (--scrub, or when you cannot use the key): integrity only, by checksums.
    """
    bar = ProgressBar(wanted=not app.as_json)
    last: dict[str, Any] = {}
    with _input(file) as fd:
        status = os.fstat(fd)
        total = status.st_size if stat.S_ISREG(status.st_mode) else 0
        try:
            replies = app.client.archives_stream("Verify", fd, Scrub=True if scrub else None)
            with contextlib.closing(replies):
                for last in replies:
                    bar.show(last["Done"], total)
        finally:
            bar.clear()
    if not last.get("Ended"):
        raise ProtocolError(reason="it stopped telling of the verification before its end")
    kind = "authentic" if last["Authentic"] else "intact"
    app.emit({**last, "Kind": "authenticity" if last["Authentic"] else "integrity"}, kind)
    if not last["Authentic"]:
        app.note(f"note: only checksums were compared, which anybody can compute: {render.printable(last['Note'])}")


@archive.command("show", short_help="Show what an archive says of itself.")
@click.argument("file", metavar="FILE|-", type=_FILE)
@click.pass_obj
def show(app: App, file: str) -> None:
    """Show what an archive says of itself. No key is needed, and nothing of it is verified."""
    with _input(file) as fd:
        found = app.client.archives("Describe", fd)["Archive"]
    sizes = ("SizeBytes", "DataBytes", "HoleBytes")
    pairs = [(name, format_size(value) if name in sizes and app.for_people else value) for name, value in found.items()]
    app.emit(found, render.fields(pairs, for_people=app.for_people))


# --- files and jobs


@contextlib.contextmanager
def _output(file: str) -> Iterator[int]:
    """Open what an archive is written to, with the caller's rights; a file is kept, and made where there is none."""
    if file == STREAM:
        if sys.stdout is not None and sys.stdout.isatty():
            raise UsageFailure("An archive is not written to a terminal.", "Name a file, or use a pipe.")
        yield 1
        return
    is_new = not os.path.lexists(file)
    with _opened(file, os.O_RDWR | os.O_CREAT) as fd:
        try:
            yield fd
        except Refused as refusal:
            # The job was not made. Whatever else went wrong, one may be about to write into this file.
            if is_new and os.fstat(fd).st_size == 0:
                with contextlib.suppress(OSError):
                    os.unlink(file)
            raise refusal.error from None


@contextlib.contextmanager
def _input(file: str) -> Iterator[int]:
    if file == STREAM:
        yield 0
        return
    with _opened(file, os.O_RDONLY) as fd:
        yield fd


@contextlib.contextmanager
def _opened(file: str, flags: int) -> Iterator[int]:
    try:
        fd = os.open(file, flags | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise HostFailure(where=f"at {file}", reason=exc.strerror or str(exc)) from exc
    try:
        yield fd
    finally:
        os.close(fd)


def _sync_name(file: str) -> None:
    """Make the name of a new file durable, too; where a file system cannot, its content is all the same."""
    with contextlib.suppress(OSError):
        fd = os.open(os.path.dirname(os.path.abspath(file)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _follow(app: App, job: str, *, is_stream: bool, again: str) -> None:
    """Wait for a job; Ctrl-C ends one over a stream, which nobody could go on with."""
    try:
        ended = follow_job(app, job)
    except Interruption:
        if not is_stream:
            raise
        with contextlib.suppress(EbsdError):
            app.client.control("CancelJob", JobId=job)
        raise Interruption("The job is cancelled: a stream cannot be continued.") from None
    except EbsdError as error:
        if is_stream or error.exit_status is not ExitStatus.UNREACHABLE:
            raise
        raise with_more_hint(error, f"When ebsd is there again, {again}.") from error.__cause__
    if ended["State"] == JobState.INTERRUPTED:
        raise with_more_hint(IncorrectState(reason=f"{job} was interrupted"), f"Then {again}.")
    if failure := job_failure(ended):
        raise failure
