"""``ebsctl audit``: who used which key, when, and what came of it; and whether the log is what was written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import click

from ebsctl import render
from ebsctl.app import App, Command, UsageFailure
from ebsctl.commands.keys import describe_key, names_a_key
from ebsd.domain.errors import CommandFailed, ExitStatus, IncorrectState, InvalidParameterValue
from ebsd.domain.ids import looks_like_snapshot_id, looks_like_volume_id

_PAUSE: Final = 0.5
"""Seconds between two looks of --follow: a user has a few calls at a time in the key service, so none waits in it."""
_AGE: Final = re.compile(r"([0-9]{1,6})([smhdw])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@click.command(cls=Command, short_help="Show or verify the log of all operations on keys.")
@click.option("--key", metavar="KEY", help="Only what concerned this key.")
@click.option("--volume", metavar="ID", help="Only what concerned this volume or snapshot, deleted ones included.")
@click.option("--event", metavar="NAME", help="Only this operation, by AWS's name, such as Decrypt.")
@click.option("--user", metavar="NAME", help="Only what this user (or account) asked for.")
@click.option(
    "--since", metavar="TIME", help="Only what is not older: 30m, 2h, 7d, or a time such as 2026-01-31T09:00."
)
@click.option("--errors", is_flag=True, help="Only what was refused or failed.")
@click.option("--follow", is_flag=True, help="Go on with what comes; with --json one record a line.")
@click.option("--verify", is_flag=True, help="Check that the log is what was written.")
@click.option(
    "--head", "heads", metavar="COUNT:HASH", multiple=True, help="With --verify: a head known from elsewhere."
)
@click.option("--private-key", metavar="FILE", type=click.Path(path_type=Path), help="With --verify: check the MACs.")
@click.option(
    "--log", metavar="DIR", type=click.Path(path_type=Path), help="With --verify: a copy of the log, anywhere."
)
@click.option("--take-key", metavar="FILE", help="Move the verification key off this host, into FILE.")
@click.pass_obj
def audit(
    app: App,
    key: str | None,
    volume: str | None,
    event: str | None,
    user: str | None,
    since: str | None,
    errors: bool,
    follow: bool,
    verify: bool,
    heads: tuple[str, ...],
    private_key: Path | None,
    log: Path | None,
    take_key: str | None,
) -> int:
    """Show the audit log of the key service: every operation on keys, refusals included.

    You see what concerns your account; administrators see all. --json prints CloudTrail records.

    --verify compares the log with itself, with the running key service, and with heads that the journal has
    ("audit head COUNT:HASH"). With --private-key it also checks that each record was written before the key service
    forgot that record's key: keep that file on another machine (--take-key FILE), and verify there (--log DIR).
    The exit status is 7 when something was changed, removed, added or moved.

    \b
    Examples:
      ebsctl audit --volume data --since 7d
      ebsctl audit --errors --follow
      ebsctl audit --verify --head 1042:9f6b...
      ebsctl audit --take-key /media/usb/audit-key
    """
    filters = any((key, volume, event, user, since, errors, follow))
    if ((verify or take_key) and filters) or (verify and take_key):
        raise UsageFailure("--verify, --take-key and looking are three commands.", "Give one of them.")
    if not verify and (heads or private_key or log):
        raise UsageFailure("--head, --private-key and --log go with --verify.", "Add --verify.")
    if verify:
        return _verify(app, heads, private_key, log)
    if take_key:
        _take(app, take_key)
        return ExitStatus.DONE
    members: dict[str, Any] = {
        "KeyId": None if key is None else _key_id(app, key),
        "ResourceId": None if volume is None else _resource_id(app, volume),
        "EventName": event,
        "Username": user,
        "StartTime": None if since is None else start_time(since, datetime.now(UTC)),
        "ErrorsOnly": errors or None,
    }
    if follow:
        _follow(app, members)
    else:
        _show(app, members)
    return ExitStatus.DONE


# --- looking ----------------------------------------------------------------------------------------------


def start_time(text: str, now: datetime) -> str:
    """Return RFC 3339 of an age or a time, which is local unless it says otherwise; raises InvalidParameterValue."""
    age = _AGE.fullmatch(text)
    if age is not None:
        return (now - timedelta(**{_UNITS[age[2]]: int(age[1])})).isoformat()
    try:
        return datetime.fromisoformat(text).astimezone().isoformat()
    except (ValueError, OverflowError) as exc:
        reason = "write an age such as 30m, 2h or 7d, or a time such as 2026-01-31T09:00"
        raise InvalidParameterValue(value=text, parameter="--since", reason=reason) from exc


def _key_id(app: App, reference: str) -> str:
    """Return a key's ARN or id as it is, since the key may be gone; an alias is asked for."""
    if names_a_key(reference) and not reference.startswith("alias/") and ":alias/" not in reference:
        return f"key/{reference.rpartition('/')[2]}"
    return f"key/{describe_key(app, reference)['KeyId']}"


def _resource_id(app: App, name: str) -> str:
    if looks_like_volume_id(name) or looks_like_snapshot_id(name):
        return name
    return str(app.client.control("Identify", Resource=name)["ResourceId"])


def _pages(app: App, members: dict[str, Any], *, forever: bool) -> Iterator[list[dict[str, Any]]]:
    token: str | None = None
    while True:
        reply = app.client.audit("LookupEvents", **members, NextToken=token)
        yield [json.loads(event["CloudTrailEvent"]) for event in reply["Events"]]
        token = reply["NextToken"]
        if reply["Complete"]:
            if not forever:
                return
            time.sleep(_PAUSE)


def _show(app: App, members: dict[str, Any]) -> None:
    if app.as_json:
        app.emit({"Records": [record for page in _pages(app, members, forever=False) for record in page]})
        return
    rows = [render.audit_row(record) for page in _pages(app, members, forever=False) for record in page]
    app.emit(None, render.table(render.AUDIT_HEADER, rows, for_people=app.for_people))
    if not rows:
        app.note("No such records.")


def _follow(app: App, members: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        for page in _pages(app, members, forever=True):
            for record in page:
                click.echo(
                    json.dumps(record)
                    if app.as_json
                    else render.table((), [render.audit_row(record)], for_people=False)
                )


# --- the verification key ---------------------------------------------------------------------------------


def _take(app: App, file: str) -> None:
    path = os.path.abspath(file)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError as exc:
        raise IncorrectState(reason=f"{path} exists already") from exc
    except OSError as exc:
        raise InvalidParameterValue(value=file, parameter="--take-key", reason=str(exc.strerror)) from exc
    try:
        app.client.audit("TakeVerificationKey", [descriptor], Destination=0)
    except BaseException:
        with contextlib.suppress(OSError):
            if not os.fstat(descriptor).st_size:  # what came is the only copy
                os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    app.emit({"File": path})
    app.note(f"The verification key of the audit log is in {path}, and only there: keep it on another machine.")


# --- verification -----------------------------------------------------------------------------------------


def _verify(app: App, heads: tuple[str, ...], private_key: Path | None, log: Path | None) -> int:
    for head in heads:
        if re.fullmatch(r"[0-9]{1,15}:[0-9a-f]{64}", head) is None:
            raise InvalidParameterValue(value=head, parameter="--head", reason="a head is COUNT:HASH")
    task: dict[str, Any] = {"heads": list(heads), "segments": []}
    with contextlib.ExitStack() as stack:
        if log is None:
            found = app.client.audit("GetLog")
            task["heads"].append(found["Head"])
            task["until"] = int(found["Head"].partition(":")[0])
            if found["VerificationKeyPresent"]:
                app.note("note: the verification key still lies on this host: ebsctl audit --take-key FILE")
            opened = ((name, app.client.audit_segment(name)) for name in found["Segments"])
        else:
            opened = ((path.name, _open(path, "--log")) for path in _segments(log))
        for name, descriptor in opened:
            stack.callback(os.close, descriptor)
            task["segments"].append({"name": name, "fd": descriptor})
        if private_key is not None:
            task["key"] = _open(private_key, "--private-key")
            stack.callback(os.close, task["key"])
        report = _run(task)
    return _report(app, report)


def _segments(log: Path) -> list[Path]:
    found = sorted(log.glob("log-*.jsonl"))
    if not found:
        raise InvalidParameterValue(value=str(log), parameter="--log", reason="it holds no log-*.jsonl")
    return found


def _open(path: Path, option: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise InvalidParameterValue(value=str(path), parameter=option, reason=str(exc.strerror)) from exc


def _run(task: dict[str, Any]) -> dict[str, Any]:
    """Run the verifier, a program of its own: ebsctl itself has no cryptography."""
    fds = [part["fd"] for part in task["segments"]] + ([task["key"]] if "key" in task else [])
    done = subprocess.run(
        [sys.executable, "-I", "-m", "ebsd.kms.audit.verify"],
        input=json.dumps(task),
        pass_fds=fds,
        capture_output=True,
        text=True,
    )
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError as exc:
        words = done.stderr.strip().rpartition("\n")[2] or "it said nothing"
        raise CommandFailed(command="verifier of the audit log", status=done.returncode, output=words) from exc
    if "Error" in report:
        raise InvalidParameterValue(value="its content", parameter="--private-key", reason=report["Error"])
    return report


def _report(app: App, report: dict[str, Any]) -> int:
    rows = [(found["Segment"], found["Line"], found["Record"], found["What"]) for found in report["Findings"]]
    fields = [(name, report[name]) for name in ("Level", "Intact", "Records", "Chains", "Head", "KnownHeadsMet")]
    text = render.fields(fields, for_people=app.for_people)
    if rows:
        text += "\n" + render.table(render.TAMPERING_HEADER, rows, for_people=app.for_people)
    app.emit(report, text)
    for note in report["Notes"]:
        app.note(f"note: {render.printable(note)}")
    if report["Level"] == "public":
        app.note("note: this compares the log with itself and with known heads; --private-key also checks who wrote it")
    if report["Intact"]:
        return ExitStatus.DONE
    first = report["Findings"][0]
    app.note(f"error: the audit log is not what was written: {first['Segment']} line {first['Line']}: {first['What']}")
    return ExitStatus.INTEGRITY
